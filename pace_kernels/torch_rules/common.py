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


def square_root(a: Tensor) -> Tensor:
    """Rounded correctly, as the kernels' is; torch's in float32 is MKL's on a CPU, which may be a unit off. A root that
    is taken in float64 and then rounded to float32 is right, since 53 bits are at least 2 × 24 + 2."""
    return in_double(a).sqrt().to(a.dtype)


def averaged(e: Tensor, x: Tensor, weight: Scalar) -> Tensor:
    """e + w (x − e), but x itself where w is 1 in their dtype; ``averaged`` in csrc/rules/arith.h."""
    if isinstance(weight, Tensor):
        return torch.where(weight == 1.0, x, e + weight * (x - e))
    return x if weight >= 1.0 - torch.finfo(e.dtype).eps / 4 else e + weight * (x - e)


def grad_factor(grad_scale: Tensor | None, clip_coef: Tensor | None) -> Scalar:
    """What the gradient is multiplied with, float32: clip coefficient / gradient scale. A number where both are on the
    CPU or missing, a tensor on a device."""
    if grad_scale is None and clip_coef is None:
        return 1.0
    given = clip_coef if clip_coef is not None else grad_scale
    factor = torch.ones_like(given) if clip_coef is None else clip_coef  # type: ignore[arg-type]
    if grad_scale is not None:
        factor = factor / grad_scale
    return factor.item() if factor.device.type == "cpu" else factor.reshape(())


class Keep:
    """Writes results, but where ``found_inf`` is not 0 keeps what is there. On a device nothing waits for it."""

    def __init__(self, found_inf: Tensor | None) -> None:
        here = found_inf is not None and found_inf.device.type == "cpu"
        self.all = here and bool(found_inf)  # nothing is to be written at all
        self._found = None if here or found_inf is None else found_inf.reshape(()) != 0

    def copy_(self, target: Tensor, value: Tensor) -> None:
        target.copy_(value if self._found is None else torch.where(self._found, target, value.to(target.dtype)))


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
