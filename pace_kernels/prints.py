"""Whether tensors were written in ways that torch does not count, as through ``.data``: by the sums of their bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .lanes import Lane

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def print_of(tensor: Tensor) -> Tensor:
    """The sum of the elements' bits as integers, on the tensor's device: one pass, and nothing waits. Of two contents
    that differ it is the same by chance once in 2^32 (float32), or where elements change places."""
    return tensor.detach().view(_BITS[tensor.element_size()]).sum(dtype=torch.int64)


class Look:
    """Compares the prints of tensors with those of before, behind what the current stream was asked."""

    def __init__(self, lane: Lane, named: list[tuple[str, Tensor]], before: list[Tensor]) -> None:
        differ = (torch.stack([print_of(tensor) for _, tensor in named]) != torch.stack(before)).to(torch.float32)
        self._lane, self._found, self._named = lane, lane.host(differ), named
        self._event: Any = lane.fetch(differ, self._found)

    def check(self) -> None:
        """Raises RuntimeError where one was written. It waits for the device."""
        self._lane.block(self._event)
        found = self._found.nonzero()
        if not len(found):
            return
        what, tensor = self._named[int(found[0, 0])]
        when, how = "in backward()", "it in a way that counts, or pass overlap=False"
        if what == "a parameter":
            when, how = "by the last step", "weights under torch.no_grad()"
        raise RuntimeError(
            f"{what} of shape {tuple(tensor.shape)} was written in a way that torch does not count, as through .data, "
            f"since it was copied {when}. Write {how}. If this was not the first step, load the last checkpoint of "
            "model and optimizer"
        )


def looks(
    found: Iterable[tuple[torch.device, str, Tensor, Tensor | None]], lane_of: Callable[[torch.device], Lane]
) -> list[Look]:
    """By device, of those that have a print: what it is, the tensor, and its print."""
    by_device: dict[torch.device, list[tuple[str, Tensor, Tensor]]] = {}
    for device, what, tensor, before in found:
        if before is not None:
            by_device.setdefault(device, []).append((what, tensor, before))
    return [
        Look(lane_of(device), [(what, tensor) for what, tensor, _ in rows], [before for *_, before in rows])
        for device, rows in by_device.items()
    ]
