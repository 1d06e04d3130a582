"""What the tests of this folder share: the device, the backends, and stand-ins for what a CPU does not have."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from pace_cases import gradients, weights
from torch import Tensor, nn

from pace_kernels import MADA, PACE, ScheduleFreeAdamW, backends

DRY = os.environ.get("PACE_GPU_DRY_RUN", "0") not in ("", "0")
HERE = DRY or torch.cuda.is_available()
DEVICE = torch.device("cpu" if DRY else "cuda")
STARTED = time.monotonic()
BACKENDS = ("cpu", "torch") if DRY else ("cuda", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIMIZERS: dict[str, Any] = {"PACE": PACE, "MADA": MADA, "schedule-free": ScheduleFreeAdamW}
# Backends that take the scalars of a step from the same double-precision C++ on the host and on the device
# (csrc/scalars.h). Powers on a GPU may be 2 units of float64 off: rounded to float32 they agree but once in 2^27.
EXACT_SCALARS = ("cuda", "cpu")

both = pytest.mark.parametrize("backend", BACKENDS)
each = pytest.mark.parametrize("kind", ("PACE", "MADA"))
gpu_only = pytest.mark.skipif(DRY, reason="a dry run on the CPU")


def seconds_left() -> float:
    """Of the time limit of a run, where it has one."""
    return float(os.environ.get("PACE_GPU_TEST_SECONDS") or "inf") - (time.monotonic() - STARTED)


def need(backend: str) -> str:
    """Skips where the backend is not there, by its reason."""
    row = backends()[backend]
    if not row.available:
        pytest.skip(f"backend {backend}: {row.reason}")
    return backend


def reference() -> str:
    """The backend on the CPU to compare with. Either gives the kernels' bits."""
    return "cpu" if backends()["cpu"].available else "torch"


def on(device: torch.device, tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.to(device) for t in tensors]


def parameters(device: torch.device = DEVICE, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().to(device)) for p in weights(dtype)]


def train(
    kind: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    steps: int,
    path: list[list[float]] | None = None,
    **options: Any,
) -> tuple[list[Any], Any]:
    """The cases' weights after `steps` of the cases' gradients, and the optimizer. ``path``: the coefficients to step
    with, from a run before, since sums over coordinates differ in the last place."""
    params = parameters(device, dtype)
    optimizer = OPTIMIZERS[kind](params, backend=backend, **{"lr": 1e-2, **options})
    values = optimizer.param_groups[0].get("coefficient_values")
    for t, grads in enumerate(gradients(steps, dtype)):
        give(params, grads)
        if path is not None and values is not None:
            if t < len(path):
                values.copy_(torch.tensor(path[t], dtype=torch.float64))
            else:
                path.append(values.tolist())
        optimizer.step()
    return params, optimizer


def give(params: list[nn.Parameter], grads: Iterable[Tensor]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.to(param.device)


def contents(params: list[Any], optimizer: Any) -> dict[str, Tensor]:
    """Weights and states by name, copied to the CPU."""
    found = {}
    for i, param in enumerate(params):
        found[f"{i} weights"] = param.detach().to("cpu", copy=True)
        for name, value in optimizer.state[param].items():
            found[f"{i} {name}"] = value.detach().to("cpu", copy=True)
    values = optimizer.param_groups[0].get("coefficient_values")
    if values is not None:
        found["coefficients"] = values.to("cpu", copy=True)
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], but: tuple[str, ...] = ()) -> None:
    """The same bits in everything, but those named."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        wanted = expected[name]
        if name in but or torch.equal(value, wanted):
            continue
        off = (value.double() - wanted.double()).abs()
        where = int(off.argmax())
        came, should = value.reshape(-1)[where].item(), wanted.reshape(-1)[where].item()
        raise AssertionError(
            f"{name}: {int((value != wanted).sum())} of {value.numel()} differ, most at {where}: "
            f"{came!r}, not {should!r}"
        )


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Raises where anything waits for the device."""
    if DRY:
        yield
        return
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextlib.contextmanager
def beside(ordered: bool = True) -> Iterator[None]:
    """A stream of its own: after what was issued before, and before what is issued afterwards, or unordered."""
    if DRY:
        yield
        return
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    if ordered:
        stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    if ordered:
        current.wait_stream(stream)


def occupy(milliseconds: float) -> None:
    """Keeps the current stream busy, so that what does not wait for it is seen to come too early."""
    if not DRY:
        torch.cuda._sleep(int(1.5e6 * milliseconds))  # clock cycles, at 1.5 GHz


class Graph:
    """A captured call; on the CPU the call itself."""

    def __init__(self, call: Callable[[], object], bare: bool = False) -> None:
        """`bare`: on the current stream, and nothing waits for the device before, as torch.cuda.graph does."""
        self.replay: Callable[[], object] = call
        if not DRY:
            graph = torch.cuda.CUDAGraph()
            if bare:
                graph.capture_begin()
                call()
                graph.capture_end()
            else:
                with torch.cuda.graph(graph):
                    call()
            self.replay = graph.replay


def free_bytes() -> int:
    if DRY:
        return 2**30
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
