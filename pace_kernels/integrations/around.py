"""Pullback for trainers and command lines that pass parameters to a class: it makes its base itself."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from ..pullback import Pullback

_FROM_ARGUMENTS = ("lr", "betas", "eps", "weight_decay")


class PullbackAround(Pullback):
    """:class:`Pullback` around an optimizer that it makes from a name, as in a YAML file.

    Arguments:
        params: parameters, or groups of them, for the base.
        base: the class of the base, or its dotted name, such as "torch.optim.SGD".
        base_options: the base's arguments, such as {"lr": 0.1}.
        pullback: the arguments of :class:`Pullback`.

    Raises:
        ValueError: ``base`` is no class of an optimizer.

    >>> optimizer = PullbackAround(params, "torch.optim.SGD", {"lr": 0.1}, gain=0.05)  # doctest: +SKIP
    """

    def __init__(
        self,
        params: ParamsT,
        base: str | type[torch.optim.Optimizer] = "torch.optim.AdamW",
        base_options: Mapping[str, Any] | None = None,
        **pullback: Any,
    ) -> None:
        super().__init__(class_of(base)(params, **dict(base_options or {})), **pullback)


def class_of(base: str | type[torch.optim.Optimizer]) -> Any:
    found: Any = base
    if isinstance(base, str):
        module, _, name = base.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f'base must be a class, or its dotted name as "torch.optim.SGD", got {base!r}') from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ValueError(f"base must be a class of torch.optim.Optimizer, got {base!r}")
    return found


def for_arguments(
    cls: type[torch.optim.Optimizer], given: Mapping[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of ``cls``: those of the trainer that it takes, overridden by ``options``. For
    :class:`PullbackAround` the trainer's arguments go to the base."""
    if issubclass(cls, PullbackAround):
        base = class_of(options.get("base", "torch.optim.AdamW"))
        own = for_arguments(base, given, dict(options.get("base_options") or {}))
        return {**options, "base": base, "base_options": own}
    taken = inspect.signature(cls).parameters
    return {name: given[name] for name in _FROM_ARGUMENTS if name in given and name in taken} | options
