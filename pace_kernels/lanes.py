"""Copies between a device and host memory: the only file that knows streams and events."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


class Lane:
    """Of devices whose copies are there when they return: the CPU, and others than CUDA's."""

    @torch.inference_mode(False)  # whose tensors have no versions
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

    def fetch(self, source: Tensor, to: Tensor) -> Any:
        """Copies to host memory beside the current stream, behind what that was asked before. ``to`` may be used once
        :meth:`block` of the returned event returns. What is asked later may free the source, but not write to it: then
        it has to be fetched anew."""
        to.copy_(source)

    def send(self, source: Tensor, to: Tensor, after: Any) -> None:
        """Copies to the device beside the current stream, behind the event ``after``. See :meth:`follow`."""
        to.copy_(source)

    def follow(self) -> Any:
        """Puts what is asked of the current stream from now on behind all that was sent. The sources may be written
        once :meth:`block` of the returned event returns."""

    def within(self) -> Any:
        """A context for another thread, in which its current stream is that of the thread that makes this call."""
        return contextlib.nullcontext()


class CudaLane(Lane):
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._down: Any = None  # streams of copies; two, because the bus carries both ways at once
        self._up: Any = None

    @torch.inference_mode(False)  # whose tensors have no versions
    def host(self, like: Tensor) -> Tensor:
        # Pinned: to other memory the host itself waits for the copy.
        return torch.empty_like(like, device="cpu", requires_grad=False, pin_memory=True)

    def copy(self, source: Tensor, to: Tensor) -> None:
        to.copy_(source, non_blocking=True)

    def event(self) -> Any:
        return self._event_of(torch.cuda.current_stream(self._device))

    def _event_of(self, stream: Any) -> Any:
        event = torch.cuda.Event(blocking=True)  # the thread that waits sleeps; by default it would take a core
        event.record(stream)
        return event

    def block(self, event: Any) -> None:
        if event is not None:
            event.synchronize()

    def fetch(self, source: Tensor, to: Tensor) -> Any:
        down = self._down = self._down or torch.cuda.Stream(self._device)
        down.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(down):
            to.copy_(source, non_blocking=True)
        source.record_stream(down)  # or its memory could be given to others before the copy
        return self._event_of(down)

    def send(self, source: Tensor, to: Tensor, after: Any) -> None:
        up = self._up = self._up or torch.cuda.Stream(self._device)
        up.wait_event(after)
        with torch.cuda.stream(up):
            to.copy_(source, non_blocking=True)

    def follow(self) -> Any:
        if self._up is None:
            return None
        torch.cuda.current_stream(self._device).wait_stream(self._up)
        return self._event_of(self._up)

    def within(self) -> Any:
        return torch.cuda.stream(torch.cuda.current_stream(self._device))


def lane_of(device: torch.device) -> Lane:
    return CudaLane(device) if device.type == "cuda" else Lane()
