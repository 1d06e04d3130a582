"""Promise: thousands of small tensors take few launches, and the bits of each tensor are its own."""

from __future__ import annotations

import on_gpu
import pytest
import torch
from on_gpu import DEVICE, assert_same, both, contents, each, need

N = 60 if on_gpu.DRY else 3000


def many(kind: str, backend: str, device: torch.device) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """Sizes from 0 to 96 elements, and in the middle one of many blocks."""
    generator = torch.Generator().manual_seed(0)
    sizes = [i % 97 for i in range(N)]
    sizes[N // 2] = 100_003
    params = [torch.nn.Parameter(torch.randn(n, generator=generator).to(device)) for n in sizes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(device)
    return params, on_gpu.OPTIMIZERS[kind](params, lr=1e-2, backend=backend, **FIXED[kind])


FIXED = {"PACE": {}, "MADA": {"learn": ()}}  # sums over coordinates would differ in the last place


@both
@each
def test_each_of_many_tensors_is_stepped(kind: str, backend: str) -> None:
    found = []
    for name, device in ((need(backend), DEVICE), (on_gpu.reference(), torch.device("cpu"))):
        params, optimizer = many(kind, name, device)
        for _ in range(2):
            optimizer.step()
        found.append(contents(params, optimizer))
    assert_same(found[0], found[1])


@both
@each
@on_gpu.gpu_only
def test_launches(kind: str, backend: str, record_property: pytest.RecordProperty) -> None:
    """At most one for twenty tensors. torch's own fused AdamW takes one for about thirty."""
    params, optimizer = many(kind, need(backend), DEVICE)
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    on_device = [name for name in on_device if not name.startswith("Optimizer.step#")]  # torch's mark around a step
    kernels = [name for name in on_device if not name.startswith(("Memcpy", "Memset"))]
    if not kernels:
        pytest.skip("the profiler sees no kernels on this machine")
    record_property("kernels", len(kernels))
    record_property("copies", len(on_device) - len(kernels))
    assert len(kernels) <= len(params) // 20, sorted(set(kernels))
    assert len(on_device) - len(kernels) <= len(params) // 20
