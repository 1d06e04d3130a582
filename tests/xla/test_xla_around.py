"""Promise: what surrounds the step works on an XLA device: checkpoints, steps that are left undone, clipping, learning
rates in tensors, a warm-up from 0, parameters of unequal counts, swaps and exports."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_xla
from test_xla_training import CASES, DEVICE, at_most, trained, weights

from pace_kernels import MADA, PACE, Pullback, clip_coefficient

AdamW = torch.optim.AdamW
SOME = {name: CASES[name] for name in ("PACE", "PACE, capturable", "MADA", "MADA.adan", "Pullback")}
some_cases = pytest.mark.parametrize("make", SOME.values(), ids=SOME)
AVERAGING = {name: CASES[name] for name in ("PACE", "PACE, capturable", "MADA, pullback", "Pullback")}


def step(optimizer: Any, params: list[torch.Tensor], seed: int, **options: Any) -> None:
    g = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=g).to(DEVICE)
    optimizer.step(**options)
    torch_xla.sync()


def fresh(make: Callable[..., Any], **options: Any) -> tuple[Any, list[torch.Tensor]]:
    params = [torch.nn.Parameter(w.float().to(DEVICE)) for w in weights()]
    return make(params, **{"lr": 1e-2, **options}), params


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x.detach().cpu(), y.detach().cpu()) for x, y in zip(a, b, strict=True))


@some_cases
@pytest.mark.parametrize("swapped", [False, True])
def test_a_saved_optimizer_goes_on_to_the_same_bits(make: Callable[..., Any], swapped: bool) -> None:
    optimizer, params = trained(make, DEVICE, torch.float32, steps=3)
    averages = any("ema" in state for state in optimizer.state.values())
    if swapped and averages:
        optimizer.eval()
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "weights": [p.detach() for p in params]}, file)
    if swapped and averages:
        optimizer.train()
    for k in range(3):
        step(optimizer, params, k)

    file.seek(0)
    saved = torch.load(file, map_location="cpu")
    loaded, others = fresh(make)
    with torch.no_grad():
        for p, w in zip(others, saved["weights"], strict=True):
            p.copy_(w)
    loaded.load_state_dict(saved["optimizer"])
    if swapped and averages:
        loaded.train()
    for k in range(3):
        step(loaded, others, k)
    assert same(params, others)
    if averages:
        with optimizer.averaged(), loaded.averaged():
            assert same(params, others)


@pytest.mark.parametrize("make", AVERAGING.values(), ids=AVERAGING)
def test_a_swap_gives_the_averages_and_the_live_weights_back(make: Callable[..., Any]) -> None:
    optimizer, params = trained(make, DEVICE, torch.float32, steps=3)
    live = [p.detach().cpu().clone() for p in params]
    averages = [optimizer.state[p]["ema"].cpu().clone() for p in params]
    assert not same(live, averages)
    for _ in range(2):
        optimizer.eval()
        torch_xla.sync()
        assert same(params, averages)
        optimizer.train()
        torch_xla.sync()
        assert same(params, live)
    model = torch.nn.ParameterList(params)
    assert same(list(optimizer.ema_state_dict(model).values()), averages)
    assert same(params, live)


@pytest.mark.parametrize("kind", [PACE, MADA])
def test_a_step_with_a_gradient_that_is_not_finite_is_left_undone(kind: Callable[..., Any]) -> None:
    optimizer, params = fresh(kind, skip_nonfinite=True)
    step(optimizer, params, 0)
    before = [p.detach().cpu().clone() for p in params]
    states = [optimizer.state[p]["exp_avg_sq"].cpu().clone() for p in params]
    for p, value in zip(params, (1.0, math.inf), strict=True):
        p.grad = torch.full_like(p, value)
    optimizer.step()
    torch_xla.sync()
    assert same(params, before)
    assert same([optimizer.state[p]["exp_avg_sq"] for p in params], states)
    assert optimizer.skipped_steps == 1 and [float(optimizer.state[p]["step"]) for p in params] == [1.0, 1.0]
    # The finite steps alone, by an optimizer that met no others.
    step(optimizer, params, 1)
    other, others = fresh(kind, skip_nonfinite=True)
    step(other, others, 0)
    step(other, others, 1)
    assert same(params, others)


def test_clipping_and_scaling_within_the_step() -> None:
    optimizer, params = fresh(PACE)
    clipped, others = fresh(PACE)
    for k in range(3):
        g = torch.Generator().manual_seed(k)
        grads = [torch.randn(p.shape, generator=g) for p in params]
        for p, q, grad in zip(params, others, grads, strict=True):
            p.grad, q.grad = (0.25 * grad).to(DEVICE), (0.5 * grad).to(DEVICE)
        optimizer.step()
        clipped.step(clip_coef=0.5)  # powers of two: exact
    assert same(params, others)
    coefficient, norm = clip_coefficient(others, max_norm=1.0)
    expected = torch.linalg.vector_norm(torch.cat([(0.5 * grad).reshape(-1) for grad in grads])).item()
    assert norm.item() == pytest.approx(expected, rel=1e-6) and coefficient.device.type == "xla"
    assert coefficient.item() == pytest.approx(1.0 / (expected + 1e-6), rel=1e-6)


@pytest.mark.parametrize("device", ["cpu", "xla"])
def test_a_learning_rate_in_a_tensor_is_one_in_a_number(device: str) -> None:
    """On the device the scalars are computed there, in float64: the same but for their last place, so one unit of the
    float32 scalars, in each of 4 steps of at most 10 lr."""
    optimizer, params = fresh(PACE)
    other, others = fresh(PACE, lr=torch.tensor(1e-2, device=device))
    for k in range(4):
        step(optimizer, params, k)
        step(other, others, k)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach().cpu(), rtol=4 * 2.0**-23, atol=4 * 10 * 1e-2 * 2.0**-23)


@pytest.mark.parametrize("kind", [PACE, MADA])
def test_a_warm_up_from_zero_reads_the_gradients_once(kind: Callable[..., Any]) -> None:
    optimizer, params = fresh(kind)
    with at_most(4):  # whether any gradient is not 0; the first step; all others
        for k in range(10):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * k
            step(optimizer, params, k)
    assert [float(optimizer.state[p]["step"]) for p in params] == [10.0, 10.0]


def test_parameters_of_unequal_counts_compile_once_more() -> None:
    optimizer, params = fresh(PACE, ema_update_freq=2)
    one, other = params
    for k in range(3):
        step(optimizer, [one], k)
        other.grad = None
    with at_most(3):  # the other one's first step, and those of both
        for k in range(20):
            step(optimizer, params, k)
    assert [float(optimizer.state[p]["step"]) for p in params] == [23.0, 20.0]


def test_the_averaging_weight_is_that_of_the_step() -> None:
    for make in (PACE, lambda p, **k: PACE(p, capturable=True, **k), lambda p, **k: Pullback(AdamW(p, **k))):
        optimizer, params = fresh(make)
        for k in range(3):
            step(optimizer, params, k)
        assert optimizer.get_ema_beta_t() == pytest.approx((1.0 + 3.0) ** -0.2)
