"""The bases of a Pullback: where each keeps its second moment, and which are refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import Group
from .optimizer import KernelOptimizer
from .schedule_free import ScheduleFreeAdamW


@dataclass(frozen=True)
class SecondMoment:
    """Where a base keeps its second moment: the name of the state; β2 of its bias correction, 0 without one; ε."""

    name: str
    beta2: float
    eps: float


def _of_adam(group: Group, dtype: torch.dtype) -> SecondMoment:
    name = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
    return SecondMoment(name, float(group["betas"][1]), float(group["eps"]))


def _of_rmsprop(group: Group, dtype: torch.dtype) -> SecondMoment:
    return SecondMoment("square_avg", 0.0, float(group["eps"]))


def _of_adafactor(group: Group, dtype: torch.dtype) -> SecondMoment:
    eps = group["eps"][0]
    return SecondMoment("variance", 0.0, torch.finfo(dtype).eps if eps is None else float(eps))


# By class; AdamW is one of Adam.
_BASES: tuple[tuple[type, Callable[[Group, torch.dtype], SecondMoment]], ...] = (
    (torch.optim.Adam, _of_adam),
    (torch.optim.NAdam, _of_adam),
    (torch.optim.RAdam, _of_adam),
    (torch.optim.RMSprop, _of_rmsprop),
    (torch.optim.Adafactor, _of_adafactor),
)


def second_moment_of(
    base: torch.optim.Optimizer, group: Group, name: str | None, dtype: torch.dtype
) -> SecondMoment | None:
    """The second moment of a group's parameters; None where none is known. ``name`` is the option ``second_moment``."""
    known = next((of for kind, of in _BASES if isinstance(base, kind)), None)
    found = None if known is None else known(group, dtype)
    if name is None or (found is not None and found.name == name):
        return found
    eps = group.get("eps", 1e-8)
    return SecondMoment(name, 0.0, float(eps) if isinstance(eps, (int, float)) else 1e-8)


def require_second_moment(base: torch.optim.Optimizer, group: Group, name: str | None) -> None:
    """Raises ValueError if the clipped gain has no second moment per coordinate to divide by."""
    found = second_moment_of(base, group, name, torch.float32)
    if found is None:
        raise ValueError(
            f"{type(base).__name__} has no second moment known here, and the clipped gain needs one: give gain= (a "
            'constant in [0, 1]), or second_moment="name" of the state that holds one'
        )
    if isinstance(base, torch.optim.Adafactor) and found.name == "variance":
        for i, param in enumerate(group["params"]):
            if param.dim() > 1:
                raise ValueError(
                    f"parameter {i} of the group has shape {tuple(param.shape)}: for matrices Adafactor keeps a "
                    "factored second moment, not one per coordinate; give gain= (a constant in [0, 1]), or put "
                    'matrices into a group of their own with a "gain"'
                )


def lacks(base: torch.optim.Optimizer, name: str, state: dict[str, Tensor]) -> RuntimeError:
    """The error if a parameter's state holds no second moment of that name."""
    return RuntimeError(
        f"{type(base).__name__} keeps no state {name!r} of a parameter, but {', '.join(map(str, state)) or 'none'}: "
        "give the name of its second moment as second_moment=, or give gain="
    )


def refuse(base: object) -> None:
    """Raises if a pullback around this optimizer would mean nothing, or something else."""
    name = type(base).__name__
    if not isinstance(base, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {base!r}")
    theirs = any(kind.__module__.split(".")[0] == "schedulefree" for kind in type(base).__mro__)
    if theirs or isinstance(base, ScheduleFreeAdamW):
        raise ValueError(
            f"{name}{' of schedulefree' if theirs else ''}: it evaluates an average already, and its own train() and "
            "eval() exchange that with the weights at which it takes gradients; a pullback would act on the wrong ones"
        )
    if isinstance(base, KernelOptimizer):
        raise ValueError(f"{name} carries the pullback in its own pass: give it lambda_pullback instead of wrapping it")
    if isinstance(base, torch.optim.LBFGS):
        raise ValueError("LBFGS moves the weights several times within a step, so no single step can be pulled back")
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"{name}.step needs a closure, which here runs before it: no single step can be pulled back")
