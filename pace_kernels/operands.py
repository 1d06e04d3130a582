"""Checks of a step's tensors, for backends that do not check all of them before they write."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .formats import BLOCK, dtype_of
from .memory import is_askew, is_whole
from .sharding import local
from .states import Work, counts_no_further


def check_operands(work: Work, states: dict[str, list[Tensor]], rows: Mapping[str, int]) -> None:
    """Raises RuntimeError if a parameter, a gradient or a state can't be stepped, in the words of csrc/checks.h.
    ``rows`` are the names of small states, with their numbers of elements."""
    for i, param in enumerate(work.params):
        _check_dense(f"params[{i}]", param, param, written=True)
        if work.grads:
            _check_dense(f"grads[{i}]", work.grads[i], param, written=False)
        for name, column in states.items():
            value, entry = column[i], f"{name}[{i}]"
            if name == "step":
                check_step(entry, value, work.device)
                _require(
                    not counts_no_further(value), entry, "is float32 and has reached 2^24, where float32 stops counting"
                )
            elif name in rows:
                _require(
                    value.numel() == rows[name] and value.is_floating_point(), entry, f"must have {rows[name]} numbers"
                )
                _require(value.device == work.device, entry, f"must be on {work.device}")
            else:
                if name.endswith("_scales"):
                    elements = param.numel() // BLOCK
                    _require(
                        value.numel() == elements and value.is_contiguous(), entry, f"must have {elements} elements"
                    )
                    _check_memory(entry, value)
                else:
                    _check_dense(entry, value, param, written=True)
                dtype = dtype_of(name, work.formats, param)
                _require(value.dtype == dtype, entry, f"must be {dtype}, is {value.dtype}")
                continue
            _check_memory(entry, value)


def _require(good: bool, entry: str, sentence: str) -> None:
    if not good:
        raise RuntimeError(f"{entry} {sentence}")


def _check_memory(entry: str, tensor: Tensor) -> None:
    here = local(tensor)
    _require(is_whole(here), entry, "has more elements than memory: was its storage resized?")
    _require(not is_askew(here), entry, "must lie at a multiple of its element size: clone it")


def check_step(entry: str, step: Tensor, device: torch.device) -> None:
    """Raises RuntimeError if a step count can't be advanced, or is neither on the host nor on this device."""
    good = step.numel() == 1 and step.dtype in (torch.float32, torch.float64)
    _require(good, entry, "must be float32 or float64, with one element")
    _require(step.device.type == "cpu" or step.device == device, entry, f"must be on {device}")


def check_placed(entry: str, tensor: Tensor, param: Tensor, *, written: bool = True) -> None:
    """Raises RuntimeError if a tensor is not dense, of the parameter's shape and on its device, or is written and has
    one element at several places."""
    _require(tensor.device == param.device, entry, f"must be on {param.device}, is on {tensor.device}")
    _require(tensor.layout is torch.strided, entry, f"must be a dense (strided) tensor, is {tensor.layout}")
    shapes = tuple(tensor.shape), tuple(param.shape)
    _require(shapes[0] == shapes[1], entry, f"has shape {shapes[0]}, its parameter has {shapes[1]}")
    if written and not tensor.is_contiguous():
        once = all(size <= 1 or stride != 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        _require(once, entry, "overlaps itself: it has stride 0")


def _check_dense(entry: str, tensor: Tensor, param: Tensor, *, written: bool) -> None:
    check_placed(entry, tensor, param, written=written)
    _check_memory(entry, tensor)
