"""Promise: a GPU kernel addresses every layout and size, and trades weights with averages, as the CPU's does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import on_gpu
import pytest
import torch
from on_gpu import DEVICE, assert_same, both, contents, each, need
from torch import Tensor


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)))


# Weights and gradient. A view keeps its strides on the device: storage and all go there (`like`).
LAYOUTS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "transposed": lambda: (normal(37, 53).t(), normal(53, 37)),
    "both transposed": lambda: (normal(37, 53).t(), normal(37, 53).t()),
    "gradient transposed": lambda: (normal(53, 37), normal(37, 53).t()),
    "channels last": lambda: (normal(4, 6, 5, 7).to(memory_format=torch.channels_last), normal(4, 6, 5, 7)),
    "both channels last": lambda: (
        normal(4, 6, 5, 7).to(memory_format=torch.channels_last),
        normal(4, 6, 5, 7).mul(2).to(memory_format=torch.channels_last),
    ),
    "expanded gradient": lambda: (normal(64, 48), normal(48).expand(64, 48)),
    "scalar expanded": lambda: (normal(3000), normal().expand(3000)),
    "every other column": lambda: (normal(50, 90)[:, ::2], normal(50, 45)),
    "misaligned weights": lambda: (normal(5001)[1:], normal(5000)),
    "misaligned gradient": lambda: (normal(5000), normal(5003)[3:]),
    "both misaligned": lambda: (normal(5001)[1:], normal(5003)[3:]),
    "narrowed rows": lambda: (normal(40, 70)[:, 3:66], normal(40, 63)),
    "zero-dimensional": lambda: (normal(), normal()),
    "one element": lambda: (normal(1), normal(1)),
    "no elements": lambda: (normal(0, 5), normal(0, 5)),
    "interleaved strides": lambda: (normal(8).as_strided((2, 3), (3, 2)), normal(2, 3)),
    "one more than a block": lambda: (normal(16385), normal(16385)),
}


def like(view: Tensor, dtype: torch.dtype) -> Tensor:
    """The same strides and offset, on the device in this format."""
    storage = torch.empty(0).set_(view.untyped_storage()).to(DEVICE, dtype, copy=True)
    return storage.as_strided(view.size(), view.stride(), view.storage_offset())


@both
@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype, kind: str, backend: str) -> None:
    options: dict[str, Any] = {"hyper_lr": 0.0, "gamma": 0.5} if kind == "MADA" else {}
    found = []
    for contiguous in (False, True):
        start, grad = (like(view, dtype) for view in LAYOUTS[layout]())
        if contiguous:
            start, grad = start.clone(memory_format=torch.contiguous_format), grad.contiguous()
        param = torch.nn.Parameter(start)
        optimizer = on_gpu.OPTIMIZERS[kind]([param], lr=1e-2, backend=need(backend), use_ema_eval=True, **options)
        for _ in range(3):
            param.grad = grad
            optimizer.step()
        with optimizer.averaged():
            average = param.detach().cpu()
        found.append(contents([param], optimizer) | {"average": average})
    assert_same(found[0], found[1])


@both
@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tensor_of_more_than_2_to_the_31_elements(dtype: torch.dtype, kind: str, backend: str) -> None:
    """Stretches around 2^31 elements, 2^31 and 2^32 bytes, and at both ends end as they do in a tensor of their own."""
    n = 2**20 + 17 if on_gpu.DRY else 2**31 + 2**16 + 17
    options: dict[str, Any] = {"MADA": {"hyper_lr": 0.0, "learn": ("beta1", "gamma"), "beta3": 0.0}, "PACE": {}}[kind]
    # Beside weights and gradient: m, v, e of PACE; m, v, ṽ, l and the last gradient of MADA with these two learned.
    size = 2 * torch.empty((), dtype=dtype).element_size() + 4 * (3 if kind == "PACE" else 5)
    if on_gpu.free_bytes() < 1.05 * n * size:
        pytest.skip(f"needs {1.05 * n * size / 1e9:.0f} GB of memory, {on_gpu.free_bytes() / 1e9:.0f} GB are free")
    stretch = 4096
    marks = [m for m in (0, 2**29, 2**30, 2**31, n - stretch) if m + stretch <= n]
    pieces = [slice(max(0, m - 100), max(0, m - 100) + stretch) for m in marks] + [slice(n - stretch, n)]
    block = normal(4_099).to(DEVICE, dtype)  # a prime: stretches get different values

    def filled(factor: float) -> Tensor:
        whole = torch.empty(n, dtype=dtype, device=DEVICE)
        rows = n // block.numel()
        whole[: rows * block.numel()].view(rows, -1).copy_(block * factor)
        whole[rows * block.numel() :].copy_(block[: n - rows * block.numel()] * factor)
        return whole

    param, grad = torch.nn.Parameter(filled(1.0)), filled(-0.3)
    twins = [torch.nn.Parameter(param.detach()[piece].clone()) for piece in pieces]
    optimizer = on_gpu.OPTIMIZERS[kind]([param], lr=1e-2, backend=need(backend), **options)
    theirs = on_gpu.OPTIMIZERS[kind](twins, lr=1e-2, backend=backend, **options)
    param.grad = grad
    for twin, piece in zip(twins, pieces, strict=True):
        twin.grad = grad[piece].clone()
    for _ in range(2):
        optimizer.step()
        theirs.step()
    for twin, piece in zip(twins, pieces, strict=True):
        assert torch.equal(param.detach()[piece], twin.detach()), piece
        for name, value in optimizer.state[param].items():
            if value.shape == param.shape:
                assert torch.equal(value[piece], theirs.state[twin][name]), (name, piece)


@both
@pytest.mark.parametrize("dtype", on_gpu.DTYPES, ids=str)
def test_swap_of_weights_and_averages(dtype: torch.dtype, backend: str) -> None:
    params, optimizer = on_gpu.train("PACE", need(backend), DEVICE, dtype, 3)
    live = contents(params, optimizer)
    optimizer.eval()
    for i, param in enumerate(params):
        assert torch.equal(param.detach().cpu(), live[f"{i} ema"].to(dtype))
    with pytest.raises(RuntimeError, match="swapped"):
        optimizer.step()
    optimizer.train()
    assert_same(contents(params, optimizer), live)
    with optimizer.averaged():
        assert torch.equal(params[0].detach().cpu(), live["0 ema"].to(dtype))
    assert_same(contents(params, optimizer), live)
