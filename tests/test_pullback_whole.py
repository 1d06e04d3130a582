"""Promise: a step of Pullback is whole or not at all. What can refuse does so before the base steps; who looks at it in
the middle is told so; and an exception leaves all as it was, or says that it did not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_whole import kept, same, saved_at_every_line, set_grads, stopped_at_every_line

from pace_kernels import Pullback, taking


def emptied(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().resize_(0)


def shrunk(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().resize_(8)


KINDS: dict[str, Callable[[Any], Pullback]] = {
    "AdamW": lambda groups: Pullback(torch.optim.AdamW(groups, lr=0.1), log_stats=True),
    "SGD": lambda groups: Pullback(torch.optim.SGD(groups, lr=0.1), gain=0.25),
    "SGD with momentum": lambda groups: Pullback(torch.optim.SGD(groups, lr=0.1, momentum=0.9), gain=0.25),
    "RMSprop, in torch": lambda groups: Pullback(torch.optim.RMSprop(groups, lr=0.1), backend="torch"),
}


IN_CODES: dict[str, Callable[[Any], Pullback]] = {
    "AdamW in codes": lambda groups: Pullback(torch.optim.AdamW(groups, lr=0.1), ema_bits=8),
    "SGD in codes, in torch": lambda groups: Pullback(
        torch.optim.SGD(groups, lr=0.1), gain=0.25, ema_bits=16, backend="torch"
    ),
}


def built(kind: str) -> tuple[torch.nn.Module, Pullback]:
    """Two groups, of which the second has two dtypes."""
    torch.manual_seed(0)
    dtypes = [[torch.float32], [torch.bfloat16, torch.float64]]
    shape = (128, 32) if kind in IN_CODES else (3, 2)
    model = torch.nn.ParameterList(torch.randn(shape).to(dtype) for dtypes in dtypes for dtype in dtypes)
    groups = [{"params": [model[0]]}, {"params": [model[1], model[2]]}]
    return model, (KINDS | IN_CODES)[kind](groups)


# ---- refused before the base steps ----

REFUSED: dict[str, tuple[Callable[[Pullback, Any], None], str]] = {
    "no memory": (lambda o, p: emptied(p), "more elements than memory"),
    "less memory": (lambda o, p: shrunk(p), "more elements than memory"),
    "an average without memory": (lambda o, p: emptied(o.state[p]["ema"]), "more elements than memory"),
    "an average with less memory": (lambda o, p: shrunk(o.state[p]["ema"]), "more elements than memory"),
    "a count of two elements": (lambda o, p: o.state[p].update(pullback_step=torch.ones(2)), "one element"),
    "an average of the base's": (lambda o, p: o.state[p].pop("pullback_step"), "the average needs that name"),
    "an option": (lambda o, p: o.param_groups[1].update(ema_kappa=-1.0), "ema_kappa must be"),
    "a lr that is none": (lambda o, p: o.param_groups[1].update(lr=float("nan")), "lr must be"),
    "no second moment": (lambda o, p: o.state[p].pop("exp_avg_sq"), "keeps no state 'exp_avg_sq'"),
    "a second moment of a row": (lambda o, p: o.state[p].update(exp_avg_sq=torch.ones(3, 1)), "per coordinate"),
    "a second moment in bytes": (lambda o, p: o.state[p].update(exp_avg_sq=p.byte()), "per coordinate"),
    "a second moment elsewhere": (lambda o, p: o.state[p].update(exp_avg_sq=p.to("meta")), "per coordinate"),
}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("what", REFUSED)
def test_everything_that_refuses_does_so_before_the_base_steps(what: str, steps: int) -> None:
    change, message = REFUSED[what]
    model, optimizer = built("AdamW")
    for t in range(steps):
        set_grads(model, t)
        optimizer.step()
    set_grads(model, 9)
    change(optimizer, model[2])
    first = [t for p in (model[0], model[1]) for t in (p.detach(), *optimizer.state[p].values())]
    before = [t.clone() for t in first]
    count = optimizer.state[model[2]]["step"].clone()
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError), match=message):
            optimizer.step()
    assert all(map(torch.equal, first, before))
    assert torch.equal(optimizer.state[model[2]]["step"], count)


def test_a_parameter_is_named() -> None:
    p = torch.nn.Parameter(torch.ones(8))
    optimizer = Pullback(torch.optim.SGD([("layer.weight", p)], lr=0.1), gain=0.1)
    p.grad = torch.ones(8)
    optimizer.step()
    emptied(optimizer.state[p]["ema"])
    with pytest.raises(RuntimeError, match=r"layer\.weight|shape \(8,\)"):
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_running_out_of_memory_in_the_first_step_leaves_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = built(kind)
    reference, other = built(kind)
    set_grads(model, 0)
    set_grads(reference, 0)
    before, calls = kept(model, optimizer), 0

    def until(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("no memory left")
        return as_state(*args)

    as_state = taking.as_state
    monkeypatch.setattr(taking, "as_state", until)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert same(kept(model, optimizer), before)
    optimizer.step()
    other.step()
    assert same(kept(model, optimizer), kept(reference, other))


# ---- in the middle ----


@pytest.mark.parametrize("t", [0, 3], ids=["first step", "fourth step"])
@pytest.mark.parametrize("kind", [*KINDS, *IN_CODES])
def test_who_saves_at_any_line_of_a_step_has_a_whole_state(kind: str, t: int) -> None:
    model, optimizer = built(kind)
    for earlier in range(t):
        set_grads(model, earlier)
        optimizer.step()
    set_grads(model, t)
    before = kept(model, optimizer)
    saves = [
        lambda state=state: (model.state_dict(), state()) for state in (optimizer.state_dict, optimizer.base.state_dict)
    ]
    found, refused = saved_at_every_line(optimizer.step, saves)
    after = kept(model, optimizer)
    assert len(found) > 40 and refused > 20
    for model_state, state in found:
        wanted = before if same(model_state, before[0]) else after
        assert same(model_state, wanted[0])
        assert same(state["state"], wanted[1]["state"])


@pytest.mark.parametrize("kind", ["AdamW", "SGD", *IN_CODES])
def test_an_exception_at_any_line_of_a_step_leaves_a_whole_state_or_says_so(kind: str) -> None:
    model, optimizer = built(kind)
    set_grads(model, 0)
    optimizer.step()
    set_grads(model, 1)
    before = kept(model, optimizer)
    reference, other = built(kind)
    reference.load_state_dict(before[0])
    other.load_state_dict(copy.deepcopy(before[1]))
    set_grads(reference, 1)
    other.step()
    after = kept(reference, other)
    calls = [optimizer.step, optimizer.eval, optimizer.base.state_dict, lambda: copy.copy(optimizer)]
    ends = stopped_at_every_line(model, optimizer, before, after, calls)
    assert ends["before"] > 20 and ends["refused"] > 5, ends


class Fails(torch.optim.SGD):
    """It raises before or after it has written; a class of its own, that may write past the versions of tensors."""

    when = ""

    def step(self, closure: Any = None) -> Any:
        if self.when == "before":
            raise ZeroDivisionError
        if self.when == "through data":
            self.param_groups[0]["params"][0].data.mul_(2.0)
            raise ZeroDivisionError
        loss = super().step(closure)
        if self.when == "after":
            raise ZeroDivisionError
        return loss


@pytest.mark.parametrize("when", ["before", "after", "through data"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_base_that_fails(when: str, steps: int) -> None:
    model = torch.nn.Linear(3, 2)
    base = Fails(model.parameters(), lr=0.1)
    optimizer = Pullback(base, gain=0.5)
    for t in range(steps):
        set_grads(model, t)
        optimizer.step()
    before = kept(model, optimizer)
    set_grads(model, 9)
    base.when = when
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    base.when = ""
    if when == "before":
        assert same(kept(model, optimizer), before)
    else:
        with pytest.raises(RuntimeError, match=r"step\(\) in the middle of a step"):
            optimizer.step()
        model.load_state_dict(before[0])
        optimizer.load_state_dict(before[1])
    optimizer.step()
    assert all(float(optimizer.state[p]["pullback_step"]) == steps + 1 for p in model.parameters())


# ---- what bases allow ----


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda p: Pullback(torch.optim.SGD(p, lr=0.5, momentum=0.5), gain=0.25),
        lambda p: Pullback(torch.optim.SGD(p, lr=0.5), gain=0.25, pullback_from="step"),
        lambda p: Pullback(torch.optim.AdamW(p, lr=0.1, foreach=False), 5.0),
        lambda p: Pullback(torch.optim.Adagrad(p, lr=0.1, foreach=False), 5.0, second_moment="sum"),
    ],
)
def test_complex_parameters_are_pairs_of_real_ones(make: Callable[[Any], Pullback], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(4, 3, dtype=dtype))
    q = torch.nn.Parameter(torch.view_as_real(p.detach()).clone())
    one, other = make([p]), make([q])
    for t in range(6):
        if t == 3:
            one.load_state_dict(copy.deepcopy(one.state_dict()))
        p.grad = torch.randn(4, 3, dtype=dtype)
        q.grad = torch.view_as_real(p.grad).clone()
        one.step()
        other.step()
    assert one.state[p]["ema"].dtype is dtype
    torch.testing.assert_close(torch.view_as_real(p.detach()), q.detach())
    torch.testing.assert_close(torch.view_as_real(one.state[p]["ema"]), other.state[q]["ema"])
    with one.averaged():
        assert torch.equal(p.detach(), one.state[p]["ema"])


def test_frozen_parameters_of_any_dtype_are_not_looked_at() -> None:
    p = torch.nn.Parameter(torch.randn(3))
    frozen = [
        torch.nn.Parameter(torch.zeros(4, dtype=dtype), requires_grad=False)
        for dtype in (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.complex64)
    ]
    frozen.append(torch.nn.Parameter(torch.zeros(1).expand(4), requires_grad=False))
    optimizer = Pullback(torch.optim.AdamW([*frozen, p]))
    p.grad = torch.ones(3)
    optimizer.step()
    with optimizer.averaged():
        pass
    optimizer.load_state_dict(optimizer.state_dict())
    assert next(q for q in optimizer.state if "ema" in optimizer.state[q]) is p
