"""Promise: a step waits for nothing on the device, whatever it is handed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import on_gpu
import pytest
import torch
from mada_cases import INSIDE, SOON
from on_gpu import DEVICE, both, each, need, no_waiting
from pace_cases import gradients

from pace_kernels import clip_coefficient


def plain(optimizer: Any) -> None:
    optimizer.step()


def clipped(optimizer: Any) -> None:
    coefficient, _ = clip_coefficient([p for g in optimizer.param_groups for p in g["params"]], max_norm=1.0)
    optimizer.step(clip_coef=coefficient)


def scaled(optimizer: Any) -> None:
    optimizer.scaler.step(optimizer)
    optimizer.scaler.update()


def scaled_and_clipped(optimizer: Any) -> None:
    params = [p for g in optimizer.param_groups for p in g["params"]]
    coefficient, _ = clip_coefficient(params, max_norm=1.0, grad_scale=optimizer.scaler._get_scale_async())
    optimizer.scaler.step(optimizer, clip_coef=coefficient)
    optimizer.scaler.update()


STEPS: dict[str, Callable[[Any], None]] = {
    "plain": plain,
    "clipped": clipped,
    "scaled": scaled,
    "scaled and clipped": scaled_and_clipped,
}


@both
@each
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_waits_for_nothing(step: str, capturable: bool, kind: str, backend: str) -> None:
    params = on_gpu.parameters()
    options: dict[str, Any] = {**INSIDE, **SOON} if kind == "MADA" else {"log_stats": True}
    # With fused=False the scaler itself waits, for whether a gradient is not finite.
    optimizer = on_gpu.OPTIMIZERS[kind](params, capturable=capturable, fused=True, backend=need(backend), **options)
    optimizer.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=4.0)
    optimizer.scaler.scale(torch.zeros((), device=DEVICE))  # creates the scale
    rows = [on_gpu.on(DEVICE, grads) for grads in gradients(6, torch.float32)]
    for t, grads in enumerate(rows):
        on_gpu.give(params, grads)
        if t < 2:  # creates states, and compiles
            STEPS[step](optimizer)
            continue
        with no_waiting():
            STEPS[step](optimizer)
    assert optimizer.state[params[0]]["step"].item() == 6
    assert params[0].isfinite().all()


@both
@each
def test_a_learning_rate_on_the_device_is_not_read(kind: str, backend: str) -> None:
    params = on_gpu.parameters()
    lr = torch.tensor(1e-2, device=DEVICE)
    optimizer = on_gpu.OPTIMIZERS[kind](params, lr=lr, backend=need(backend))
    rows = [on_gpu.on(DEVICE, grads) for grads in gradients(4, torch.float32)]
    for t, grads in enumerate(rows):
        on_gpu.give(params, grads)
        if t < 2:
            optimizer.step()
            continue
        with no_waiting():
            lr.mul_(0.5)
            optimizer.step()


@both
def test_the_swap_of_average_and_weights_waits_for_nothing(backend: str) -> None:
    params = on_gpu.parameters()
    optimizer = on_gpu.PACE(params, backend=need(backend))
    on_gpu.give(params, next(gradients(1, torch.float32)))
    optimizer.step()
    with optimizer.averaged():
        pass
    with no_waiting():
        optimizer.eval()
        optimizer.train()
