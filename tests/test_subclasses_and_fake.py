"""Promise: tensors without an address are stepped, swapped and saved: subclasses that wrap others or dress a tensor up,
fake tensors, and parameters on meta. Where there are no values, none are read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor

from pace_kernels import MADA, PACE, Pullback

AdamW = torch.optim.AdamW

KINDS: dict[str, Callable[..., Any]] = {
    "PACE": PACE,
    "PACE, skips, logs": lambda p, **k: PACE(p, skip_nonfinite=True, log_stats=True, **k),
    "PACE, capturable": lambda p, **k: PACE(p, capturable=True, ema_update_freq=2, **k),
    "MADA": lambda p, **k: MADA(p, hyper_warmup=0, lambda_pullback=1.0, use_ema_eval=True, **k),
    "MADA, Adan": lambda p, **k: MADA.preset("adan", p, use_ema_eval=True, **k),
    "MADA, Lion": lambda p, **k: MADA.preset("lion", p, use_ema_eval=True, **k),
    "Pullback": lambda p, **k: Pullback(AdamW(p, **k)),
}
# Of these, each coordinate's step depends on that coordinate alone.
BY_COORDINATE = {name: kind for name, kind in KINDS.items() if name != "MADA"}
by_coordinate = pytest.mark.parametrize("kind", BY_COORDINATE.values(), ids=BY_COORDINATE)
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def gradients(count: int, steps: int = 3) -> list[list[Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [[torch.randn(4, 3, generator=g) for _ in range(count)] for _ in range(steps)]


def weights(k: int) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(10 + k))


def stepped(optimizer: Any, params: list[Tensor], grads: list[list[Tensor]]) -> None:
    for row in grads:
        for p, g in zip(params, row, strict=True):
            p.grad = g.clone()
        optimizer.step()


@by_coordinate
@pytest.mark.parametrize("groups", [1, 2])
def test_a_wrapper_is_stepped_as_what_it_wraps(kind: Callable[..., Any], groups: int) -> None:
    one, other, beside = (Parameter(weights(k)) for k in range(3))
    plain = kind([{"params": [p]} for p in (one, other, beside)], lr=0.1)
    stepped(plain, [one, other, beside], gradients(3))

    wrapper, plain_one = Parameter(TwoTensor(weights(0), weights(1))), Parameter(weights(2))
    params = [wrapper, plain_one]
    optimizer = kind(params if groups == 1 else [{"params": [p]} for p in params], lr=0.1)
    both = [[TwoTensor(a, b), c] for a, b, c in gradients(3)]
    stepped(optimizer, params, both[:1])
    states = {name: id(value) for name, value in optimizer.state[wrapper].items()}
    stepped(optimizer, params, both[1:])

    assert type(wrapper) is TwoTensor
    # "last_grad" and "older_grad" change places; no state is made anew.
    assert sorted(states.values()) == sorted(id(value) for value in optimizer.state[wrapper].values())
    if "step" in states:
        assert float(optimizer.state[wrapper]["step"]) == len(both)

    def same() -> None:
        # The wrapper is stepped by torch's operations, which divide and contract as the kernels do.
        torch.testing.assert_close(wrapper.a, one.data, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(wrapper.b, other.data, rtol=1e-6, atol=1e-6)
        assert torch.equal(plain_one, beside)

    same()
    with optimizer.averaged(), plain.averaged():
        same()
    same()


@every_kind
def test_a_wrapper_is_saved_and_loaded(kind: Callable[..., Any]) -> None:
    params = [Parameter(TwoTensor(weights(0), weights(1))), Parameter(weights(2))]
    optimizer = kind(params, lr=0.1)
    rows = [[TwoTensor(a, b), c] for a, b, c in gradients(3, steps=6)]
    stepped(optimizer, params, rows[:3])
    saved, there = copy.deepcopy(optimizer.state_dict()), [Parameter(p.detach().clone()) for p in params]
    stepped(optimizer, params, rows[3:])
    loaded = kind(there, lr=0.1)
    loaded.load_state_dict(saved)
    stepped(loaded, there, rows[3:])
    assert torch.equal(there[0].a, params[0].a) and torch.equal(there[0].b, params[0].b)
    assert torch.equal(there[1], params[1])


def test_kernels_asked_for_by_name_refuse_a_wrapper() -> None:
    with pytest.raises(RuntimeError, match="tensor subclass that wraps others"):
        PACE([Parameter(TwoTensor(weights(0), weights(1)))], backend="cpu")


class Dressed(torch.Tensor):
    """A subclass of other methods, as libraries make them with as_subclass."""


@every_kind
def test_a_subclass_that_dresses_a_tensor_up_is_stepped_as_that_tensor(kind: Callable[..., Any]) -> None:
    plain, dressed = weights(0).requires_grad_(), weights(0).as_subclass(Dressed).requires_grad_()
    reference, optimizer = kind([plain], lr=0.1), kind([dressed], lr=0.1)
    rows = gradients(1)
    stepped(reference, [plain], rows)
    stepped(optimizer, [dressed], rows[:1])
    states = {id(value) for value in optimizer.state[dressed].values()}
    stepped(optimizer, [dressed], rows[1:])
    assert states == {id(value) for value in optimizer.state[dressed].values()}
    assert type(dressed) is Dressed and torch.equal(dressed.as_subclass(Tensor), plain)
    with optimizer.averaged(), reference.averaged():
        assert torch.equal(dressed.as_subclass(Tensor), plain)
    assert torch.equal(dressed.as_subclass(Tensor), plain)


def walk_through(kind: Callable[..., Any], device: str, backend: str | None, lr: Any, groups: int) -> None:
    """Steps, a change of options, clipping, a swap, an export, a checkpoint."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, device=device), torch.nn.Linear(3, 1, device=device))
    chosen = {} if backend is None else {"backend": backend}
    params = [{"params": list(layer.parameters())} for layer in model] if groups == 2 else model.parameters()
    optimizer = kind(params, lr=lr, **chosen)
    for k in range(3):
        model(torch.randn(2, 3, device=device)).sum().backward()
        if k == 2:
            for group in optimizer.param_groups:
                group["eps"] = 1e-6
        clip = {} if isinstance(optimizer, Pullback) else {"clip_coef": 0.5}
        optimizer.step(**clip)
        optimizer.zero_grad()
    with optimizer.averaged():
        model(torch.randn(2, 3, device=device))
    assert optimizer.ema_state_dict(model)["0.weight"].shape == (3, 3)
    saved = optimizer.state_dict()["state"][0]["ema"]
    assert saved.shape == (3, 3) and saved.device.type == device


SETTINGS = [(None, 1e-3, 1), (None, 0.0, 2), ("torch", 1e-3, 2)]
each_setting = pytest.mark.parametrize(("backend", "lr", "groups"), SETTINGS)


@every_kind
@each_setting
def test_nothing_is_read_of_fake_tensors(kind: Callable[..., Any], backend: str | None, lr: float, groups: int) -> None:
    with FakeTensorMode():  # it raises where a value is read
        walk_through(kind, "cpu", backend if kind is not KINDS["Pullback"] else None, lr, groups)


@every_kind
def test_a_learning_rate_in_a_fake_tensor_is_not_read(kind: Callable[..., Any]) -> None:
    with FakeTensorMode():
        walk_through(kind, "cpu", None, torch.tensor(1e-3), 1)


@every_kind
@each_setting
def test_nothing_is_read_of_parameters_on_meta(
    kind: Callable[..., Any], backend: str | None, lr: float, groups: int
) -> None:
    walk_through(kind, "meta", backend if kind is not KINDS["Pullback"] else None, lr, groups)


def test_learning_on_a_device_is_learning_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator coefficients and the scalars of the last step are tensors, while step counts are numbers of the
    CPU. Before the first step they are 0, and what is divided by them must not raise, nor leave NaN."""

    def run() -> tuple[MADA, list[Tensor]]:
        params = [Parameter(weights(0)), Parameter(weights(1))]
        optimizer = MADA(params, lr=0.1, hyper_warmup=0, rho=0.5, c=0.5, gamma=0.5, backend="torch")
        stepped(optimizer, params, gradients(2, steps=8))
        return optimizer, [p.data for p in params]

    numbers, expected = run()
    monkeypatch.setattr("pace_kernels.torch_rules.mada._numbers", lambda row: row.unbind())
    tensors, got = run()
    # Both compute scalars in float64; its power function on tensors may differ from Python's in the last place.
    assert tensors.coefficients == pytest.approx(numbers.coefficients, rel=1e-9)
    assert numbers.coefficients != MADA([Parameter(weights(0))], rho=0.5, c=0.5, gamma=0.5).coefficients
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
