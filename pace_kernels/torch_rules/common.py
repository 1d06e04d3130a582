"""What the rules in plain torch share."""

from __future__ import annotations

from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

# A number on the host, or a 0-dimensional tensor where the step count or the learning rate is one (capturable).
Scalar: TypeAlias = "float | Tensor"
Scalars = TypeVar("Scalars", bound=tuple[Any, ...])

# Elements a row of a sum. A sum over less than torch's grain of 32,768 elements is done by one thread.
_ROW = 16384


def in_double(scalar: Tensor) -> Tensor:
    return scalar if scalar.device.type == "mps" else scalar.double()  # MPS has no float64


def number(scalar: Scalar) -> Scalar:
    """A learning rate in double precision, without dimensions."""
    return in_double(scalar).reshape(()) if isinstance(scalar, Tensor) else scalar


def rounded(scalars: Scalars, dtype: torch.dtype) -> Scalars:
    """Tensors among the scalars in the dtype of the states: otherwise 0-dimensional parameters would become float64."""
    fields: list[Any] = [a.to(dtype) if isinstance(a, Tensor) else a for a in scalars]
    return type(scalars)(*fields)


def at_least(value: Scalar, low: float) -> Scalar:
    return value.clamp(min=low) if isinstance(value, Tensor) else max(value, low)


def fixed_order_sum(a: Tensor) -> Tensor:
    """The sum in float64, the same bits for every number of threads: each row by one thread, then their sums."""
    flat = in_double(a.reshape(-1))
    whole = flat.numel() // _ROW * _ROW
    rows = flat[:whole].view(-1, _ROW).sum(dim=1)
    return rows.sum() + flat[whole:].sum()


def swap_(a: list[Tensor], b: list[Tensor]) -> None:
    """What the operator ``swap_`` does, with one tensor's copy at a time."""
    for left, right in zip(a, b, strict=True):
        kept = left.clone()
        left.copy_(right)
        right.copy_(kept)
