"""Promise: a step runs on the current stream, in its order, and on the device of its parameters."""

from __future__ import annotations

from typing import Any

import on_gpu
import pytest
import torch
from on_gpu import DEVICE, assert_same, both, contents, each, need
from pace_cases import gradients


@both
@each
def test_a_step_follows_the_work_of_its_stream(kind: str, backend: str) -> None:
    """Gradients are written late on a side stream, and weights are overwritten after the steps there: a step on another
    stream would read the one too early, or write the other too late."""
    found = []
    for late in (True, False):
        params = on_gpu.parameters()
        optimizer = on_gpu.OPTIMIZERS[kind](params, lr=1e-2, backend=need(backend))
        for param in params:
            param.grad = torch.zeros_like(param)
        with on_gpu.beside():
            copies = []
            for grads in gradients(4, torch.float32):
                ready = on_gpu.on(DEVICE, grads)
                if late:
                    on_gpu.occupy(20.0)
                for param, grad in zip(params, ready, strict=True):
                    param.grad.copy_(grad)
                optimizer.step()
                copies.append(params[0].detach().clone())
        found.append(contents(params, optimizer) | {f"copy {i}": c.cpu() for i, c in enumerate(copies)})
    assert_same(found[0], found[1])


@both
@each
def test_memory_of_a_step_is_not_given_to_another_stream_too_early(kind: str, backend: str) -> None:
    """Scalars and tables of pointers that a step takes from torch's allocator are used after the call returns."""
    found = []
    for noisy in (True, False):
        params = on_gpu.parameters()
        optimizer = on_gpu.OPTIMIZERS[kind](params, lr=1e-2, backend=need(backend))
        for grads in gradients(5, torch.float32):
            on_gpu.give(params, grads)
            if noisy:
                on_gpu.occupy(5.0)  # the step's kernels start when its call has returned long ago
            optimizer.step()
            if noisy:
                for size in (64, 512, 4096, 65536):  # takes what was freed, and writes over it
                    torch.full((size,), 255, dtype=torch.uint8, device=DEVICE)
                    torch.full((size,), 255, dtype=torch.uint8, pin_memory=not on_gpu.DRY)
        found.append(contents(params, optimizer))
    assert_same(found[0], found[1])


@both
@each
def test_a_pinned_coefficient_may_be_changed_right_after_the_step(kind: str, backend: str) -> None:
    found = []
    for late in (True, False):
        params = on_gpu.parameters()
        optimizer = on_gpu.OPTIMIZERS[kind](params, lr=1e-2, backend=need(backend))
        coefficient = torch.full((), 0.5, pin_memory=not on_gpu.DRY)
        for grads in gradients(4, torch.float32):
            on_gpu.give(params, grads)
            if late:
                on_gpu.occupy(20.0)
            optimizer.step(clip_coef=coefficient.fill_(0.5))
            coefficient.fill_(100.0 if late else 0.5)
        found.append(contents(params, optimizer))
    assert_same(*found)


@both
@each
@on_gpu.gpu_only
def test_a_step_on_a_device_that_is_not_the_current_one(kind: str, backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    found = []
    for device in (torch.device("cuda", 1), torch.device("cuda", 0)):
        params = on_gpu.parameters(device)
        optimizer = on_gpu.OPTIMIZERS[kind](params, lr=1e-2, backend=need(backend), use_ema_eval=True)
        for grads in gradients(3, torch.float32):
            on_gpu.give(params, grads)
            optimizer.step()
            assert torch.cuda.current_device() == 0
        with optimizer.averaged():
            averages = [p.detach().cpu() for p in params]
        found.append(contents(params, optimizer) | {f"average {i}": a for i, a in enumerate(averages)})
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert_same(found[0], found[1])


@both
@pytest.mark.parametrize("bits", (None, 32))
def test_an_average_in_host_memory_is_that_of_weights_that_are_written_soon(backend: str, bits: int | None) -> None:
    """The copies come late, and the weights change right behind them."""
    found = []
    for away in (None, "cpu"):
        params = on_gpu.parameters(dtype=torch.float32 if bits is None else torch.bfloat16)
        options: dict[str, Any] = {"lambda_pullback": 0.0, "ema_device": away, "master_weight_bits": bits}
        optimizer = on_gpu.OPTIMIZERS["PACE"](params, lr=1e-2, backend=need(backend), **options)
        with on_gpu.beside():
            for grads in gradients(6, params[0].dtype):
                on_gpu.give(params, grads)
                on_gpu.occupy(5.0)
                optimizer.step()
                with torch.no_grad():
                    torch._foreach_mul_(params, 1.5)
        optimizer.state_dict()
        found.append(contents(params, optimizer))
        assert not away or all(state["ema"].is_cpu for state in optimizer.state.values())
    assert_same(found[0], found[1])
