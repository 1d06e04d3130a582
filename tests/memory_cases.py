"""The conformance cases with every tensor at the very end, or the very start, of memory that can't be overstepped
unseen. Run by tests/test_sanitizers.py in a process of its own:

    python tests/memory_cases.py heap     # exact allocations: the redzones of AddressSanitizer are around them
    python tests/memory_cases.py guard    # a page without access behind each tensor or before it: any build, real code

Prints a JSON object of counts at the end, and a digest of all weights and states.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import mmap
import sys
from collections.abc import Callable, Iterator
from typing import Any

import mada_cases
import pace_cases
import torch
from torch import Tensor

from pace_kernels import _C, MADA, PACE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Around the tile of PACE (64), the tile of MADA (256) and the block (16,384); the last makes the whole more than torch
# gives to one thread.
LENGTHS = (0, 1, *(n + d for n in (64, 256, 16384) for d in (-1, 0, 1)), 40_003)
STEPS = 3
THREADS = (1, 2, 3)

Place = Callable[[int, torch.dtype], Tensor]


def heap(count: int, dtype: torch.dtype) -> Tensor:
    """torch asks posix_memalign for exactly these bytes."""
    return torch.empty(count, dtype=dtype)


class Guarded:
    """Elements next to a page that nothing may touch: by turns behind them and before them."""

    def __init__(self) -> None:
        self.calls = 0
        self.libc = ctypes.CDLL(None, use_errno=True)

    def __call__(self, count: int, dtype: torch.dtype) -> Tensor:
        if count == 0:
            return torch.empty(0, dtype=dtype)
        size = count * dtype.itemsize
        inside = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, inside + 2 * mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for page in (start, start + mmap.PAGESIZE + inside):
            if self.libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        self.calls += 1
        offset = mmap.PAGESIZE + (inside - size if self.calls % 2 else 0)
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)


def placed(place: Place, value: Tensor, lead: int = 0, stride: int = 1) -> Tensor:
    """A copy of ``value``, contiguous but for ``stride``, whose last element is the last of its allocation; ``lead``
    elements, left over before the first one, misalign it."""
    span = (value.numel() - 1) * stride + 1 if value.numel() else 0
    flat = place(lead + span, value.dtype)
    strides = [s * stride for s in torch.empty(value.shape, device="meta").stride()]
    return flat.as_strided(value.shape, strides, lead).copy_(value)


# How weights and gradients lie; states follow the weights.
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "misaligned by one element": {"lead": 1},
    "weights strided": {"stride": 2},
    "gradients strided, misaligned": {"grad_stride": 3, "lead": 3},
    "gradients expanded": {"expand": True},
}


def lay_out(place: Place, weights: list[Tensor], lead: int = 0, stride: int = 1, **_: Any) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(placed(place, w.detach(), lead, stride)) for w in weights]


def gradient(
    place: Place, value: Tensor, lead: int = 0, grad_stride: int = 1, expand: bool = False, **_: Any
) -> Tensor:
    if expand and value.numel():
        return placed(place, value.reshape(-1)[:1]).reshape(()).expand(value.shape)
    return placed(place, value, lead, grad_stride)


def cases() -> Iterator[tuple[type, str, dict[str, Any], torch.dtype, torch.dtype, str]]:
    """Every switch in every dtype; each of them in one layout, and each layout with every dtype and many switches."""
    formats = [(d, d) for d in DTYPES] + [(d, torch.float32) for d in DTYPES[1:]]
    for kind, named in ((PACE, pace_cases.CASES), (MADA, mada_cases.CASES)):
        layouts = itertools.cycle(LAYOUTS)
        for name, options in named.items():
            for dtype, grad_dtype in formats:
                yield kind, name, options, dtype, grad_dtype, next(layouts)
            next(layouts)  # five formats, five layouts: not the same pairs each time


def train(
    place: Place, kind: type, options: dict[str, Any], dtype: torch.dtype, grad_dtype: torch.dtype, layout: str
) -> Any:
    generator = torch.Generator().manual_seed(len(layout))
    start = [*pace_cases.weights(dtype), *(torch.randn(n, generator=generator).to(dtype) for n in LENGTHS)]
    how = LAYOUTS[layout]
    params = lay_out(place, start, **how)
    # Sums are added in another order where elements lie otherwise: the coefficients rest.
    rest = {"hyper_lr": 0.0} if kind is MADA and options.get("learn") != () else {"log_stats": kind is PACE}
    optimizer = kind(
        params, **{"lr": 1e-2, **options, **{k: v for k, v in rest.items() if v is not False}}, backend="cpu"
    )
    for step in range(STEPS):
        for param in params:
            param.grad_dtype = grad_dtype
            value = torch.randn(param.shape, generator=generator).to(grad_dtype)
            param.grad = gradient(place, value, **how)
        optimizer.step()
        if step == 0:  # the states, now that they are there, at an end of memory too
            for param in params:
                for key, value in optimizer.state[param].items():
                    if value.shape == param.shape and value.numel():
                        strided = how.get("stride", 1) if key != "step" else 1
                        optimizer.state[param][key] = placed(place, value, how.get("lead", 0), strided)
    optimizer.eval()
    optimizer.train()
    return params, optimizer


def main() -> None:
    place = {"heap": heap, "guard": Guarded()}[sys.argv[1]]
    digest = hashlib.sha256()
    counts = {"PACE": 0, "MADA": 0}
    threads = itertools.cycle(THREADS)
    tensors = 0
    for kind, name, options, dtype, grad_dtype, layout in cases():
        torch.set_num_threads(next(threads))
        print(kind.__name__, name, dtype, grad_dtype, layout, torch.get_num_threads(), file=sys.stderr, flush=True)
        params, optimizer = train(place, kind, options, dtype, grad_dtype, layout)
        counts[kind.__name__] += 1
        for param in params:
            for tensor in (param.detach(), *(v for _, v in sorted(optimizer.state[param].items()))):
                tensors += 1
                plain = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
                digest.update(plain.view(torch.uint8).numpy().tobytes())
    print(json.dumps({"isa": _C.cpu_isa(), "cases": counts, "tensors": tensors, "digest": digest.hexdigest()}))


if __name__ == "__main__":
    main()
