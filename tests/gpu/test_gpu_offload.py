"""Promise: `Offload` on a GPU has the bits of the CPU, whatever is late: gradients, their copies, or weights."""

from __future__ import annotations

from typing import Any

import on_gpu
import pytest
import torch
from on_gpu import DEVICE, assert_same, contents
from pace_cases import gradients

from pace_kernels import Offload

CASES: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("PACE", torch.float32, {}),
    ("PACE", torch.bfloat16, {"master_weight_bits": 32}),
    ("schedule-free", torch.float32, {}),
]


@pytest.mark.parametrize("fraction", (1.0, 0.5))
@pytest.mark.parametrize("clips", (False, True))
@pytest.mark.parametrize("kind, dtype, options", CASES)
def test_bits(kind: str, dtype: torch.dtype, options: dict[str, Any], fraction: float, clips: bool) -> None:
    found = []
    for device in (DEVICE, torch.device("cpu")):
        late, params = device is DEVICE, on_gpu.parameters(device, dtype)
        given: dict[str, Any] = {"lr": 1e-2, **options}
        how = {"fraction": fraction, "bucket_bytes": 4096}
        made = on_gpu.OPTIMIZERS[kind]
        optimizer = Offload(params, made, **how, **given) if late else made(params, **given)
        seen = []
        with on_gpu.beside():
            for k, grads in enumerate(gradients(5, dtype)):
                optimizer.zero_grad()
                ready = on_gpu.on(device, grads)
                if late:
                    on_gpu.occupy(10.0)
                torch.autograd.backward([(p * g).sum() for p, g in zip(params, ready, strict=True)])
                if clips:  # behind the copies, in place
                    torch._foreach_mul_([p.grad for p in params], 0.5)
                optimizer.step()
                for param in params:  # frees gradients that may be read yet, and writes over their memory
                    param.grad = None
                noise = [torch.full_like(p, float("nan")) for p in params]
                seen.append(torch.cat([p.detach().reshape(-1) for p in params]))
                del noise
                if k == 2:  # written by others: copied down anew
                    with torch.no_grad():
                        torch._foreach_mul_(params, 1.5)
        with optimizer.averaged():
            seen.append(torch.cat([p.detach().reshape(-1) for p in params]))
        found.append(contents(params, optimizer) | {f"seen {k}": one.cpu() for k, one in enumerate(seen)})
        if late and fraction == 1.0:
            assert all(v.is_cpu for p in params for v in optimizer.state[p].values())
            assert on_gpu.DRY or all(twin.tensor.is_pinned() for twin in optimizer._twins.order)
    assert_same(*found)
