"""Promise: mixed precision with a gradient scale, and clipping, happen within the pass."""

from __future__ import annotations

from typing import Any

import on_gpu
import pytest
import torch
from on_gpu import DEVICE, assert_same, both, contents, each, need
from pace_cases import gradients

OVERFLOW = 4  # the iteration


def loop(kind: str, backend: str, unscale_first: bool, fused: bool) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Ten iterations in float16 with an overflow in one of them; weights and states, and the scales."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 1)).to(DEVICE)
    params = list(model.parameters())
    optimizer: Any = on_gpu.OPTIMIZERS[kind](params, lr=1e-2, fused=fused, backend=need(backend))
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10, growth_interval=100)
    inputs = torch.randn(10, 32, 64).to(DEVICE)
    scales = []
    for t in range(10):
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype=torch.float16):
            loss = model(inputs[t]).float().square().mean()
        scaler.scale(loss * (1e30 if t == OVERFLOW else 1.0)).backward()
        before = contents(params, optimizer) if t == OVERFLOW else {}
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if t == OVERFLOW:
            assert not all(p.grad.isfinite().all() for p in params)
            assert_same(contents(params, optimizer), before)
        scales.append(scaler.get_scale())
    return contents(params, optimizer), scales


@both
@each
def test_a_loop_in_half_precision_with_an_overflow(kind: str, backend: str) -> None:
    """The scale is a power of two, so that unscaling within the pass and before it, by the loop or by the scaler, are
    the same bits."""
    within, scales = loop(kind, backend, unscale_first=False, fused=True)
    for unscale_first, fused in ((True, True), (True, False), (False, False)):
        before, same_scales = loop(kind, backend, unscale_first, fused)
        assert_same(within, before)
        assert scales == same_scales
    assert scales == [2.0**10] * OVERFLOW + [2.0**9] * (10 - OVERFLOW)
    assert within["0 step"].item() == 9
    assert all(bool(value.isfinite().all()) for value in within.values())


@both
@each
@pytest.mark.parametrize("kept", ["number", "CPU tensor", "device tensor"])
def test_a_clip_coefficient_multiplies_the_gradients(kept: str, kind: str, backend: str) -> None:
    c = torch.tensor(0.37)
    given: Any = {"number": 0.37, "CPU tensor": c, "device tensor": c.to(DEVICE)}[kept]
    found = []
    for within in (True, False):
        params = on_gpu.parameters()
        optimizer = on_gpu.OPTIMIZERS[kind](params, lr=1e-2, backend=need(backend))
        for grads in gradients(4, torch.float32):
            on_gpu.give(params, grads if within else [g * c for g in grads])
            if within:
                optimizer.step(clip_coef=given)
                assert torch.equal(params[0].grad.cpu(), grads[0])  # gradients stay as they are
            else:
                optimizer.step()
        found.append(contents(params, optimizer))
    assert_same(found[0], found[1])
