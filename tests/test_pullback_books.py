"""Promise: a Pullback keeps no second books. The average lies where the base's state lies, and what is done to that is
done to it: cleared, moved, replaced, removed, copied, freed."""

from __future__ import annotations

import copy
import gc
import math
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo  # torch's first optimizer loads it, and what it loads keeps the frames that asked for it

from pace_kernels import Pullback

BASES: dict[str, Callable[[Any], Pullback]] = {
    "AdamW": lambda p: Pullback(torch.optim.AdamW(p, lr=0.01), 3.0),
    "AdamW, fused": lambda p: Pullback(torch.optim.AdamW(p, lr=0.01, fused=True), 3.0),
    "SGD": lambda p: Pullback(torch.optim.SGD(p, lr=0.1), gain=0.25),
    "SGD with momentum": lambda p: Pullback(torch.optim.SGD(p, lr=0.1, momentum=0.9), gain=0.25, pullback_from="step"),
    "RMSprop": lambda p: Pullback(torch.optim.RMSprop(p, lr=0.01), 3.0),
}


def param(*shape: int, seed: int = 0) -> Any:
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def step(optimizer: Any, seed: int) -> None:
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + i)).to(p.dtype)
    optimizer.step()


def trained(base: str, count: int = 2, steps: int = 3) -> tuple[list[Any], Pullback]:
    params = [param(4, 3, seed=i) for i in range(count)]
    optimizer = BASES[base]([{"params": [p]} for p in params])
    for t in range(steps):
        step(optimizer, t)
    return params, optimizer


def same(a: list[Any], one: Pullback, b: list[Any], other: Pullback) -> bool:
    return all(
        torch.equal(p, q)
        and one.state[p].keys() == other.state[q].keys()
        and all(torch.equal(torch.as_tensor(v), torch.as_tensor(other.state[q][k])) for k, v in one.state[p].items())
        for p, q in zip(a, b, strict=True)
    )


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# ---- freed ----


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_an_optimizer_is_freed_at_once(base: str, swapped: bool) -> None:
    params, optimizer = trained(base)
    optimizer.load_state_dict(optimizer.state_dict())
    step(optimizer, 4)
    if swapped:
        optimizer.eval()
    states = [v for p in params for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    refs = [weakref.ref(t) for t in (optimizer, optimizer.base, *states, *optimizer._scratch.rows)]
    assert len(states) >= 2 * len(params)
    del optimizer, states
    assert [ref() for ref in refs] == [None] * len(refs)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("base", BASES)
def test_a_parameter_that_is_taken_out_is_freed(base: str) -> None:
    params, optimizer = trained(base)
    ref, average = weakref.ref(params[1]), weakref.ref(optimizer.state[params[1]]["ema"])
    kept = len(optimizer.averager._buffers)
    del optimizer.param_groups[1]
    del optimizer.state[params[1]], params[1]
    gc.collect()  # a plan has them until then, or until the next step
    assert ref() is None and average() is None
    assert len(optimizer.averager._buffers) == kept // 2
    step(optimizer, 4)


def test_a_base_outlives_its_pullback() -> None:
    params, optimizer = trained("AdamW")
    base = optimizer.base
    del optimizer
    step(base, 4)
    base.load_state_dict(base.state_dict())
    again = Pullback(base, 3.0)
    assert float(again.state[params[0]]["pullback_step"]) == 3  # the average is there, and goes on
    step(again, 5)
    assert float(again.state[params[0]]["pullback_step"]) == 4


# ---- cleared and reset ----


def clear_all(optimizer: Pullback, p: Any) -> None:
    optimizer.state.clear()


def clear_one(optimizer: Pullback, p: Any) -> None:
    optimizer.state[p].clear()


def replace_all(optimizer: Pullback, p: Any) -> None:
    optimizer.state = defaultdict(dict)


def clear_of_base(optimizer: Pullback, p: Any) -> None:
    optimizer.base.state.pop(p)


def zero_all(optimizer: Pullback, p: Any) -> None:
    for value in optimizer.state[p].values():
        value.zero_()


def moments_alone(optimizer: Pullback, p: Any) -> None:
    for name in [name for name in optimizer.state[p] if name not in ("ema", "pullback_step")]:
        del optimizer.state[p][name]


def counts_alone(optimizer: Pullback, p: Any) -> None:
    optimizer.state[p]["step"].zero_()
    optimizer.state[p]["exp_avg_sq"].zero_()


def average_alone(optimizer: Pullback, p: Any) -> None:
    del optimizer.state[p]["ema"], optimizer.state[p]["pullback_step"]


# How, and the steps of the average afterwards, of 200 before.
RESETS: dict[str, tuple[Callable[[Pullback, Any], None], int]] = {
    "nothing": (lambda *_: None, 200),
    "state.clear()": (clear_all, 0),
    "of one parameter": (clear_one, 0),
    "state = ...": (replace_all, 0),
    "base.state": (clear_of_base, 0),
    "all tensors zeroed": (zero_all, 0),
    "the base's part": (moments_alone, 200),
    "the base's count zeroed": (counts_alone, 200),
    "the average's part": (average_alone, 0),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("how", RESETS)
def test_the_gain_is_the_formulas_whatever_is_reset(how: str, fused: bool) -> None:
    reset, t = RESETS[how]
    p = param(1000)
    base = torch.optim.AdamW([p], lr=1e-2, weight_decay=0.0, fused=fused)
    optimizer = Pullback(base, log_stats=True)
    for seed in range(200):
        step(optimizer, seed)
    reset(optimizer, p)
    for seed in range(300, 302):  # the second finds all as the first left it
        step(optimizer, seed)
        t += 1
        state = base.state[p]
        v = state["exp_avg_sq"].double() / (1 - 0.999 ** float(state["step"]))
        gain = (1e-2 * 0.15 * (1 + t) ** -0.2 / (v.sqrt() + 1e-8)).clamp(max=1).mean()
        assert float(state["pullback_step"]) == t
        assert optimizer.get_step_stats()["lambda_mean"] == pytest.approx(float(gain), rel=1e-5)


def test_an_average_that_was_cleared_starts_at_the_weights() -> None:
    params, optimizer = trained("SGD", count=1)
    optimizer.state.clear()
    start = params[0].detach().clone()
    step(optimizer, 4)
    w = 2**-0.2
    average = optimizer.state[params[0]]["ema"]
    torch.testing.assert_close(average, start + w * (params[0].detach() - start))


# ---- moved and replaced ----


def regroup(optimizer: Pullback, params: list[Any]) -> None:
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]


def regroup_base(optimizer: Pullback, params: list[Any]) -> None:
    optimizer.base.param_groups[:] = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]


def renew(optimizer: Pullback, params: list[Any]) -> None:
    """Another object of the same contents, with the state moved along."""
    for i, group in enumerate(optimizer.param_groups):
        state = optimizer.state.pop(group["params"][0])
        group["params"][0] = params[i] = torch.nn.Parameter(group["params"][0].detach().clone())
        optimizer.state[params[i]] = state


def new_dicts(optimizer: Pullback, params: list[Any]) -> None:
    for p in params:
        optimizer.state[p] = {name: value.clone() for name, value in optimizer.state[p].items()}


def other_memory(optimizer: Pullback, params: list[Any]) -> None:
    for p in params:
        p.data = p.data.clone()
        optimizer.state[p]["ema"].data = optimizer.state[p]["ema"].data.clone()


def copied(optimizer: Pullback, params: list[Any]) -> None:
    """The optimizer that goes on is a copy."""
    twin = copy.deepcopy(optimizer)
    params[:] = [p for group in twin.param_groups for p in group["params"]]
    optimizer.__dict__.update(twin.__dict__)


@pytest.mark.parametrize("change", [regroup, regroup_base, renew, new_dicts, other_memory, copied])
@pytest.mark.parametrize("base", BASES)
def test_what_is_moved_goes_on_to_the_same_bits(base: str, change: Callable[[Pullback, list[Any]], None]) -> None:
    (params, optimizer), (others, untouched) = trained(base), trained(base)
    for t in range(3, 9):
        if t % 2:
            change(optimizer, params)
        step(optimizer, t)
        step(untouched, t)
        with optimizer.averaged():
            pass
    assert same(params, optimizer, others, untouched)


@pytest.mark.parametrize("base", BASES)
def test_parameters_that_grow_start_their_average_anew_and_say_so_once(base: str) -> None:
    params, optimizer = trained(base)
    said: list[Any] = []
    for t in range(4):
        old = params[0]
        state = optimizer.state.pop(old)
        for name in state.keys() - {"ema", "pullback_step", "step"}:
            state[name] = torch.cat([state[name], torch.zeros(2, 3)])
        params[0] = optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(
            torch.cat([old.detach(), torch.ones(2, 3)])
        )
        optimizer.state[params[0]] = state
        start = params[0].detach().clone()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(optimizer, 10 + t)
        said += [w for w in caught if "start anew" in str(w.message)]
        state = optimizer.state[params[0]]
        assert float(state["pullback_step"]) == 1
        torch.testing.assert_close(state["ema"], start + 2**-0.2 * (params[0].detach() - start))
        assert float(optimizer.state[params[1]]["pullback_step"]) == 4 + t
    assert len(said) == 1
    assert len(optimizer.state) == len(optimizer.averager) == 2
    optimizer.state_dict()


def test_parameters_change_their_dtype() -> None:
    params, optimizer = trained("SGD", count=1)
    params[0].data = params[0].data.double()
    params[0].grad = None
    step(optimizer, 4)
    assert optimizer.state[params[0]]["ema"].dtype is torch.float64
    assert float(optimizer.state[params[0]]["pullback_step"]) == 4


# ---- options ----


class Gained(torch.optim.SGD):
    """It has an option of its own that is called as one of ours."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=1.0)
        self.defaults["gain"] = 7.0
        for group in self.param_groups:
            group["gain"] = 7.0


def test_a_bases_own_option_stays_its_own() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Pullback(Gained([p]), gain=0.5, pullback_from="step")
    p.grad = torch.ones(3)
    optimizer.step()
    assert p[0].item() == 0.5
    saved = optimizer.state_dict()
    assert (saved["param_groups"][0]["gain"], saved["param_groups"][0]["pullback_gain"]) == (7.0, 0.5)
    optimizer.load_state_dict(saved)


def test_an_option_that_goes_comes_back_as_the_default() -> None:
    p = torch.nn.Parameter(torch.ones(1))
    optimizer = Pullback(torch.optim.SGD([{"params": [p], "gain": 1.0}], lr=1.0), gain=0.0, pullback_from="step")
    p.grad = torch.ones(1)
    optimizer.step()
    assert p.item() == 1.0  # the base went to 0, the pull back to the average
    del optimizer.param_groups[0]["gain"]
    optimizer.step()
    assert p.item() == 0.0


# ---- at rest ----


@pytest.mark.parametrize("base", BASES)
def test_a_frozen_parameter_is_live_and_starts_anew(base: str) -> None:
    params, optimizer = trained(base)
    model = torch.nn.ParameterList(params)
    params[0].requires_grad_(False)  # between two steps: an evaluation, and nothing has changed
    frozen = optimizer.ema_state_dict(model)
    assert torch.equal(frozen["0"], optimizer.state[params[0]]["ema"])
    params[0].grad, params[1].grad = None, torch.ones(4, 3)
    optimizer.step()
    live = params[0].detach().clone()
    exported = optimizer.ema_state_dict(model)
    assert torch.equal(exported["0"], live) and not torch.equal(exported["1"], params[1])
    with optimizer.averaged():
        assert torch.equal(params[0], live)
    twins = [torch.nn.Parameter(p.detach().clone(), p.requires_grad) for p in params]
    other = BASES[base]([{"params": [p]} for p in twins])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for some, one in ((params, optimizer), (twins, other)):
        some[0].requires_grad_(True)
        step(one, 5)
        w = (1 + float(one.state[some[0]]["pullback_step"])) ** -0.2
        average = live + w * (some[0].detach() - live)
        torch.testing.assert_close(one.state[some[0]]["ema"], average)
    assert same(params, optimizer, twins, other)
    assert math.isclose(float(optimizer.state[params[1]]["pullback_step"]), 5)


def test_what_had_no_gradient_keeps_its_average() -> None:
    params, optimizer = trained("AdamW")
    average = optimizer.state[params[0]]["ema"].clone()
    params[0].grad = None
    optimizer.step()
    assert torch.equal(optimizer.state[params[0]]["ema"], average)


# ---- one memory ----


@pytest.mark.parametrize("groups", [1, 2])
def test_two_parameters_over_one_memory_are_pulled_in_turn(groups: int) -> None:
    """SGD goes from 1 by −1 for each of the two, to −1. Each is pulled by half of the way that its average, at 1, is
    from where the pull finds it: to 0, then to 0.5."""
    one = torch.nn.Parameter(torch.ones(100_000))
    two = torch.nn.Parameter(one.detach())
    given = [one, two] if groups == 1 else [{"params": [one]}, {"params": [two]}]
    optimizer = Pullback(torch.optim.SGD(given, lr=1.0), gain=0.5, pullback_from="step", ema_kappa=None, beta_ema=0.0)
    one.grad, two.grad = torch.ones_like(one), torch.ones_like(two)
    optimizer.step()
    assert torch.equal(one.detach(), torch.full_like(one, 0.5))
    optimizer.step()  # 0.5, −1.5, −0.25, 0.375
    assert torch.equal(two.detach(), torch.full_like(two, 0.375))
    with optimizer.averaged():
        assert torch.equal(one.detach(), torch.ones_like(one))
    assert torch.equal(one.detach(), torch.full_like(one, 0.375))
