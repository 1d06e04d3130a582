"""Copies from a device to host memory: the only file that knows streams and events."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Lane:
    """Of devices whose copies are there when they return: the CPU, and others than CUDA's."""

    def host(self, like: Tensor) -> Tensor:
        """Host memory for a tensor."""
        return torch.empty_like(like, device="cpu", requires_grad=False)

    def copy(self, source: Tensor, to: Tensor) -> None:
        """Copies to host memory as a part of the current stream: what is asked of that later comes behind the copy, so
        the source may be written or freed at once. ``to`` may be used once :meth:`block` of a later event returns."""
        to.copy_(source)

    def event(self) -> Any:
        """An event that has happened when all is done that was asked of the current stream."""
        return None

    def block(self, event: Any) -> None:
        """Returns when the event has happened."""


class CudaLane(Lane):
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def host(self, like: Tensor) -> Tensor:
        # Pinned: to other memory the host itself waits for the copy.
        return torch.empty_like(like, device="cpu", requires_grad=False, pin_memory=True)

    def copy(self, source: Tensor, to: Tensor) -> None:
        to.copy_(source, non_blocking=True)

    def event(self) -> Any:
        event = torch.cuda.Event(blocking=True)  # the thread that waits sleeps; by default it would take a core
        event.record(torch.cuda.current_stream(self._device))
        return event

    def block(self, event: Any) -> None:
        event.synchronize()


def lane_of(device: torch.device) -> Lane:
    return CudaLane(device) if device.type == "cuda" else Lane()
