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
    that differ it is the same by chance once in 2^32 (float32), or where elements change places, or as many
    signs change one way as the other."""
    return tensor.detach().view(_BITS[tensor.element_size()]).sum(dtype=torch.int64)


class Look:
    """Compares the prints of tensors with those of before, behind what the current stream was asked."""

    def __init__(self, lane: Lane, tensors: list[Tensor], before: list[Tensor]) -> None:
        differ = (torch.stack(list(map(print_of, tensors))) != torch.stack(before)).to(torch.float32)
        self._lane, self._found, self._tensors = lane, lane.host(differ), tensors
        self._event: Any = lane.fetch(differ, self._found)

    def written(self) -> list[Tensor]:
        """Those that were written since. It waits for the device."""
        self._lane.block(self._event)
        return [self._tensors[number] for number in self._found.nonzero().flatten().tolist()]


def looks(found: Iterable[tuple[Tensor, Tensor | None]], lane_of: Callable[[torch.device], Lane]) -> list[Look]:
    """A look for each device at the tensors that have a print."""
    by_device: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    for tensor, before in found:
        if before is not None:
            by_device.setdefault(tensor.device, []).append((tensor, before))
    return [Look(lane_of(device), *map(list, zip(*rows, strict=True))) for device, rows in by_device.items()]


def refusal(tensor: Tensor, is_gradient: bool) -> RuntimeError:
    what, when, how = "a parameter", "by the last step", "weights under torch.no_grad()"
    if is_gradient:
        what, when, how = "a gradient", "in backward()", "it in a way that counts, or pass overlap=False"
    return RuntimeError(
        f"{what} of shape {tuple(tensor.shape)} was written in a way that torch does not count, as through .data, "
        f"since it was copied {when}. Write {how}. If this was not the first step, load the last checkpoint of model "
        "and optimizer"
    )
