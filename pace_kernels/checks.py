"""Checks of options, numbers and tensors: each error names the argument, what came and what is allowed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .torch_rules.common import at_hand

Group: TypeAlias = dict[str, Any]


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of a strided tensor share memory."""
    dims = sorted((st, sz) for sz, st in zip(tensor.shape, tensor.stride(), strict=True) if sz > 1)
    if tensor.numel() == 0 or not dims:
        return False
    reach = 0  # the last element that the narrower dimensions touch
    for stride, size in dims:
        if stride <= reach:
            break
        reach += stride * (size - 1)
    else:
        return False
    if dims[0][0] == 0:
        return True
    # Interleaved strides, as in as_strided((2, 3), (3, 2)), may or may not overlap: count the places.
    places = torch.zeros((), dtype=torch.int64)
    for stride, size in dims:
        places = places.unsqueeze(-1) + stride * torch.arange(size)
    return int(torch.unique(places).numel()) < tensor.numel()


def require(condition: bool, argument: str, allowed: str, came: object) -> None:
    if not condition:
        raise ValueError(f"{argument} must be {allowed}, got {came!r}")


def check_number(argument: str, value: object, allowed: str, ok: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{argument} must be a number, got {value!r}")
    require(math.isfinite(value) and ok(float(value)), argument, allowed, value)


def checked_count(name: str, value: Any, last: int) -> Tensor:
    """A count that was saved, as a tensor without dimensions."""
    allowed = f"one whole number >= 0 and <= {last}"
    if isinstance(value, Tensor):
        require(value.numel() == 1 and not value.is_complex() and not value.is_meta, name, allowed, value)
        count, number = value.detach().reshape(()), value.item()
    else:
        require(isinstance(value, numbers.Real), name, allowed, value)
        number = plain_number(value)
        count = torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else None)
    whole = not isinstance(number, bool) and math.isfinite(number) and number == int(number)
    require(whole and 0 <= number <= last, name, allowed, value)
    return count


def plain_number(value: Any) -> Any:
    """Numbers of other libraries, such as NumPy's, as Python's; everything else as it is."""
    if isinstance(value, (bool, int, float)) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def check_lr(lr: object) -> None:
    if isinstance(lr, Tensor):
        require(lr.numel() == 1, "lr", "a number or a tensor with one element", lr)
        if at_hand(lr):  # elsewhere, reading it would wait for the device
            check_number("lr", lr.item(), "finite and >= 0", lambda a: a >= 0)
        else:
            require(lr.dtype in (torch.float32, torch.float64), "lr", "float32 or float64 on a device", lr.dtype)
    else:
        check_number("lr", lr, "finite and >= 0", lambda a: a >= 0)


def check_common_options(group: Group) -> None:
    """The options that every optimizer here has: lr, betas, eps, weight_decay."""
    check_lr(group["lr"])
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
    for i in (0, 1):
        check_number(f"betas[{i}]", betas[i], "in [0, 1)", lambda a: 0 <= a < 1)
    # Below float32's normal numbers 1 / D could be infinite, and 0 times that is NaN.
    check_number("eps", group["eps"], "finite and at least 2**-126", lambda a: a >= 2.0**-126)
    check_number("weight_decay", group["weight_decay"], "finite and >= 0", lambda a: a >= 0)
    for name in ("maximize", "capturable", "skip_nonfinite"):
        require(isinstance(group[name], bool), name, "True or False", group[name])


def check_average_options(group: Group) -> None:
    """The options of the average and the pullback."""
    for name in ("lambda_pullback", "ema_rho", "ema_gamma"):
        check_number(name, group[name], "finite and >= 0", lambda a: a >= 0)
    check_number("beta_ema", group["beta_ema"], "in [0, 1]", lambda a: 0 <= a <= 1)
    if group["ema_kappa"] is not None:
        check_number("ema_kappa", group["ema_kappa"], "None, or finite and >= 0", lambda a: a >= 0)
    freq = group["ema_update_freq"]
    counts = isinstance(freq, numbers.Integral) and not isinstance(freq, bool) and int(freq) >= 1
    require(counts, "ema_update_freq", "an integer >= 1", freq)
    for name in ("clamp_pullback", "use_ema_eval"):
        require(isinstance(group[name], bool), name, "True or False", group[name])
    form = group["pullback_from"]
    require(form in ("weights", "step"), "pullback_from", '"weights" or "step"', form)
