"""Copies between a device and host memory beside the computation: the only file that knows streams and events.

An event stands for all that was asked of its stream before it. The host waits for one by ``block``, the current stream
by ``wait``; nothing else here waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

Pairs = Iterable[tuple[Tensor, Tensor]]  # from, to


class Lane:
    """The device is the CPU: copies are made where they are asked for, and nothing is left to wait for."""

    def host(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Host memory for a tensor."""
        return torch.empty_like(like, dtype=dtype or like.dtype, device="cpu", requires_grad=False)

    def here(self) -> Any:
        """All that was asked of the current stream."""
        return None

    def in_order(self, pairs: Pairs) -> Any:
        """Copies as a part of the current stream: what is asked of it later comes behind them."""
        for source, to in pairs:
            to.copy_(source)

    def to_host(self, pairs: Pairs, after: Any) -> Any:
        """Copies to host memory behind ``after``, beside what is asked of the current stream later."""
        return self.in_order(pairs)

    def to_device(self, pairs: Pairs, after: Any) -> Any:
        """Copies to the device behind ``after``. Until :meth:`wait` nobody may use what is written."""
        return self.in_order(pairs)

    def wait(self, event: Any) -> None:
        """What is asked of the current stream from here on comes behind the event."""

    def block(self, event: Any) -> None:
        """Returns when the event has happened."""


class CudaLane(Lane):
    """A GPU with a stream for each direction. ``cuda`` is torch.cuda, or what a test puts in its place."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device, self._cuda = device, cuda
        self._down, self._up = cuda.Stream(device), cuda.Stream(device)

    def host(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        # Pinned: copies from and to other memory are not asynchronous.
        memory = torch.empty_like(like, dtype=dtype or like.dtype, device="cpu", requires_grad=False)
        return memory.pin_memory() if like.is_cuda else memory

    def here(self) -> Any:
        return self._event(self._cuda.current_stream(self._device))

    def in_order(self, pairs: Pairs) -> Any:
        for source, to in pairs:
            self._copy(source, to)
        return self.here()

    def to_host(self, pairs: Pairs, after: Any) -> Any:
        return self._beside(self._down, pairs, after)

    def to_device(self, pairs: Pairs, after: Any) -> Any:
        return self._beside(self._up, pairs, after)

    def wait(self, event: Any) -> None:
        self._cuda.current_stream(self._device).wait_event(event)

    def block(self, event: Any) -> None:
        event.synchronize()

    def _event(self, stream: Any) -> Any:
        event = self._cuda.Event()
        event.record(stream)
        return event

    def _beside(self, stream: Any, pairs: Pairs, after: Any) -> Any:
        stream.wait_event(after)
        with self._cuda.stream(stream):
            for source, to in pairs:
                self._copy(source, to)
                for tensor in (source, to):
                    if tensor.is_cuda:  # its memory may be freed meanwhile: it is used again only behind this copy
                        tensor.record_stream(stream)
        return self._event(stream)

    def _copy(self, source: Tensor, to: Tensor) -> None:
        to.copy_(source, non_blocking=True)


_LANES: dict[torch.device, Lane] = {}


def lane_of(device: torch.device) -> Lane:
    """The lane of a device. Of devices other than CUDA's, copies wait."""
    if device not in _LANES:
        _LANES[device] = CudaLane(device) if device.type == "cuda" else Lane()
    return _LANES[device]
