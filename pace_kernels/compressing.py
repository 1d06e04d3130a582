"""Optimizers whose groups say in which formats weights and states lie (formats.py has what there is)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .checks import Group
from .formats import OPTIONS, asked, check_format_options, formats_of, warn_if_idle
from .memory import are_twins
from .optimizer import KernelOptimizer
from .states import PLAIN, Work


class Compressing(KernelOptimizer):
    """An optimizer with the options of formats. Not for direct use."""

    # Options that stand only in groups where they are not at these defaults; formats.py says why.
    _UNSAID: Mapping[str, Any] = OPTIONS
    # Those by which states lie where they do: the constructor's, whatever a checkpoint says.
    _LIE_BY: tuple[str, ...] = tuple(OPTIONS)

    def __init__(self, params: Any, defaults: dict[str, Any], backend: str | None) -> None:
        super().__init__(params, defaults, backend)
        warn_if_idle(self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name, default in self._UNSAID.items():
            if group[name] == default:
                del group[name]

    def _check_formats(self, group: Group) -> None:
        """Raises ValueError where an option of formats is not allowed, or a parameter can't have what it asks for."""
        try:
            check_format_options(group)
        except ValueError as error:
            # The optimizer's own options are checked before there are groups.
            groups = self.__dict__.get("param_groups", ())
            number = next((k for k, known in enumerate(groups) if known is group), None)
            raise error if number is None else ValueError(f"param_groups[{number}]: {error}") from None
        if asked(group) is not PLAIN:
            for i, param in enumerate(group.get("params", ())):  # of a checkpoint's group they are numbers
                if isinstance(param, Tensor) and param.requires_grad and (why := self._no_codes(param, group)):
                    raise ValueError(f"{self._name(group, i)} {why}")

    def _no_codes(self, param: Tensor, group: Group) -> str | None:
        """Why a parameter can't be stepped in the formats that the group asks for; None where it can."""
        if asked(group).weight and param.dtype not in (torch.bfloat16, torch.float32):
            return (
                f"is {param.dtype}: master_weight_bits is for torch.bfloat16, in groups of their own; other parameters "
                "belong into a group with master_weight_bits=None"
            )
        return None

    def _states(self, work: Work) -> dict[str, list[Tensor]]:
        if asked(work.group) is not PLAIN:  # a parameter may have been changed since it was checked
            for owner in work.owners:
                if (why := self._no_codes(owner, work.group)) is not None:
                    raise RuntimeError(f"{self._name_of(owner)} {why}")
        return super()._states(work)

    def _separated(self, works: list[Work]) -> list[Work]:
        parts = super()._separated(works)
        if parts is not works and are_twins(
            (p, w.formats.weight or w.formats.on_grid) for w in works for p in w.params
        ):
            raise RuntimeError(
                "two parameters share one memory, but each would have its own remainder or codes: with "
                "master_weight_bits, or ema_bits of 8 or 16, tie them as one parameter"
            )
        return parts

    def _merged(self, saved: Group, group: Group) -> Group:
        options = super()._merged(saved, group)
        options = {k: v for k, v in options.items() if k not in self._LIE_BY}
        return options | {k: v for k, v in group.items() if k in self._LIE_BY}

    def _asked_of(self, group: Group, param: Tensor) -> Any:
        """The formats of a parameter of this group."""
        return formats_of(asked(group), param)
