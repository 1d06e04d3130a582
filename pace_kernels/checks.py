"""Checks of options, numbers and tensors: each error names the argument, what came and what is allowed."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .definitions.kit import AT_LEAST_ONE, Option
from .memory import is_whole
from .torch_rules.common import at_hand

Group: TypeAlias = dict[str, Any]
_LARGEST = sys.float_info.max


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
    places = torch.zeros((), dtype=torch.int64, device="cpu")
    for stride, size in dims:
        places = places.unsqueeze(-1) + stride * torch.arange(size, device="cpu")
    return int(torch.unique(places).numel()) < tensor.numel()


def shortened(value: object) -> str:
    """The value that came, as text for an error."""
    if isinstance(value, Tensor) and not is_whole(value):
        return f"a tensor of shape {tuple(value.shape)} with less memory than elements"
    try:
        text = repr(value)
    except Exception:  # of an integer with more than 4300 digits, or by an object of somebody else
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 300 else text[:300] + "..."


def require(condition: bool, argument: str, allowed: str, came: object) -> None:
    if not condition:
        raise ValueError(f"{argument} must be {allowed}, got {shortened(came)}")


def check_number(argument: str, value: object, allowed: str, ok: Callable[[float], bool]) -> None:
    number = plain_number(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{argument} must be a number, got {shortened(value)}")
    require(abs(number) <= _LARGEST and ok(float(number)), argument, allowed, value)


def check_count(argument: str, value: object, first: int) -> None:
    """An option that is passed on as a 64-bit integer."""
    number = plain_number(value)
    counts = isinstance(number, int) and not isinstance(number, bool) and number >= first
    require(counts, argument, f"an integer >= {first}", value)
    require(number < 2**63, argument, f"an integer >= {first} and < 2**63", value)


def check_switch(argument: str, value: object) -> None:
    require(isinstance(value, bool), argument, "True or False", value)


def check_word(argument: str, value: object, words: tuple[str, ...]) -> None:
    require(isinstance(value, str) and value in words, argument, " or ".join(f'"{word}"' for word in words), value)


def check_pair(argument: str, value: object) -> None:
    """Requires two numbers in [0, 1), in a plain sequence."""
    two = isinstance(value, (tuple, list)) and len(value) == 2
    require(two, argument, "two numbers in [0, 1)", value)
    for i, number in enumerate(value):  # type: ignore[arg-type, var-annotated]
        check_number(f"{argument}[{i}]", number, "in [0, 1)", lambda a: 0 <= a < 1)


def checked_count(name: str, value: Any, last: int) -> Tensor:
    """A count that was saved, as a tensor without dimensions."""
    allowed = f"one whole number >= 0 and <= {last}"
    number = plain_number(value)
    fits = isinstance(number, (int, float)) and not isinstance(number, bool) and 0 <= number <= last
    require(fits and number == int(number), name, allowed, value)
    if isinstance(value, Tensor):
        return value.detach().reshape(())
    return torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else None)


def plain_number(value: Any) -> Any:
    """A number of another library, such as NumPy's, or in a tensor or an array with one element, as Python's;
    everything else as it is. Reading a tensor waits for its device."""
    if type(value) in (bool, int, float):  # NumPy's float64 is a float too
        return value
    if isinstance(value, Tensor):
        require(is_whole(value), "an option", "a number, or a tensor that has memory", value)
        real = value.numel() == 1 and not value.is_complex() and not value.is_meta and value.dtype != torch.bool
        return value.item() if real else value
    if not isinstance(value, numbers.Real) and getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # an array without a dimension
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    try:
        return float(value)
    except OverflowError:  # of a fraction
        return math.inf


def lr_is_zero(lr: float | Tensor) -> bool:
    """True only if that is known without waiting for a device."""
    return (not isinstance(lr, Tensor) or lr.device.type == "cpu") and float(lr) == 0.0


def check_lr(lr: object) -> None:
    if isinstance(lr, Tensor):
        require(lr.numel() == 1, "lr", "a number or a tensor with one element", lr)
        if at_hand(lr):  # elsewhere, reading it would wait for the device
            check_number("lr", lr.item(), "finite and >= 0", lambda a: a >= 0)
        else:
            require(lr.dtype in (torch.float32, torch.float64), "lr", "float32 or float64 on a device", lr.dtype)
    else:
        check_number("lr", lr, "finite and >= 0", lambda a: a >= 0)


def check_common_options(group: Group, options: Iterable[Option]) -> None:
    """The options that every optimizer here has, and those of its operator that the group has by the same name."""
    check_lr(group["lr"])
    check_pair("betas", group["betas"])
    # Below float32's normal numbers 1 / D could be infinite, and 0 times that is NaN.
    check_number("eps", group["eps"], "finite and at least 2**-126", lambda a: a >= 2.0**-126)
    check_defined(group, options)
    for name in ("capturable", "skip_nonfinite"):
        check_switch(name, group[name])
    check_torchs_options(group)


def check_defined(group: Group, options: Iterable[Option]) -> None:
    """Checks the group's options that a definition has too against the ranges written there. Numbers without a range,
    and lr and eps, for which the front end has a narrower one, are checked elsewhere."""
    for option in options:
        name = option.name
        if name not in group or name in ("lr", "eps"):
            continue
        value, allowed = group[name], option.allowed
        if option.type == "bool":
            check_switch(name, value)
        elif allowed is None or (option.type == "float?" and value is None):
            continue
        elif option.type == "int":
            check_count(name, value, 1 if allowed is AT_LEAST_ONE else 0)
        else:
            text = f"None, or {allowed.text}" if option.type == "float?" else allowed.text
            check_number(name, value, text, allowed.allows)


def check_torchs_options(options: Mapping[str, Any]) -> None:
    """The options that change nothing here, but that configurations for ``torch.optim`` may contain."""
    for name in ("foreach", "fused"):
        value = options.get(name)
        require(value is None or isinstance(value, bool), name, "None, True or False", value)
    value = options.get("differentiable", False)
    require(value is False, "differentiable", "False, as no gradient goes through a step here", value)


def check_average_options(group: Group) -> None:
    """The options of the average and the pullback that no operator has under this name."""
    check_switch("use_ema_eval", group["use_ema_eval"])
    check_word("pullback_from", group["pullback_from"], ("weights", "step"))
