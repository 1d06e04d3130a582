"""MADA's checkpoints: what is saved beside what every optimizer here saves, and what is checked in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from torch import Tensor

from .checks import Group, check_number, checked_count, plain_number, require
from .coefficients import Coefficients
from .formats import has
from .mada_options import LEARNING, REDONE_BY, check_sharing, check_start, expanded
from .ops import COEFFICIENTS, DONE, LAST_SCALARS, NO_GRADIENT, REDO

_SWITCHES = ("second_max", "pullback_from_step", "clamp_pullback")  # of REDONE_BY


class MadaCheckpoints(Coefficients):
    """Learned coefficients and moments that are one step behind, in checkpoints. Not for direct use."""

    def _required_states(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg_sq",) if "exp_avg_sq" in self._state_tensors(group) else ("exp_avg_lion",)

    def _to_save(self, group: Group) -> Group:
        self._by_name(group)
        last = self._arguments(group)
        options = (tuple(last.step[name] for name in REDONE_BY), last.states)
        hyper = {name: group[name] for name in LEARNING}
        return {**super()._to_save(group), **hyper, "last_options": options}

    def _merged(self, saved: Group, group: Group) -> Group:
        options = super()._merged(saved, {**group, "last_options": None, "frozen": None})
        # What a dict of hyper options leaves out is as it is here; those that state_dict() saved are whole.
        kept = {k: v for k, v in self._arguments(group).learning.items() if isinstance(options[k], Mapping)}
        options = expanded(options, {**options, **kept})
        self._check_options(options)
        if options["learn"] and self._OWN_OPTION in saved:
            for name, fresh in self._fresh({**options, "params": group["params"]}).items():
                value = saved.get(name)
                shape = tuple(fresh.shape) if fresh is not None else ()
                came = tuple(value.shape) if isinstance(value, Tensor) else value
                require(came == shape, name, f"a tensor of shape {shape}", came)
                options[name] = self._checked_learned(name, value).to(fresh)  # type: ignore[arg-type]
        elif options["learn"]:
            # Another optimizer's checkpoint: learning starts at its options.
            check_start(options)
            options.update(self._fresh({**options, "params": group["params"]}))
        options["frozen"] = self._checked_frozen(options["frozen"])
        options["last_options"] = self._checked_last(options["last_options"])
        return options

    @staticmethod
    def _checked_frozen(frozen: Any) -> tuple[float | None, ...] | None:
        if frozen is None:
            return None
        six = isinstance(frozen, (tuple, list)) and len(frozen) == len(COEFFICIENTS)
        require(six, "frozen", f"None, or values of {', '.join(COEFFICIENTS)}", frozen)
        for name, value in zip(COEFFICIENTS, frozen, strict=True):
            if value is not None:
                check_number(f"frozen: {name}", value, "in [0, 1]", lambda a: 0 <= a <= 1)
        return tuple(map(plain_number, frozen))

    def _checked_last(self, last: Any) -> tuple[tuple[Any, ...], tuple[str, ...]] | None:
        """What the step to redo was taken with, and the names of its states."""
        if last is None:
            return None
        two = isinstance(last, (tuple, list)) and [isinstance(part, (tuple, list)) for part in last] == [True, True]
        allowed = f"None, or ({', '.join(REDONE_BY)}) and the names of states"
        require(two and len(last[0]) == len(REDONE_BY), "last_options", allowed, last)
        known = {*self._STATE_TENSORS, *self._STATE_ROWS}
        stranger = next((name for name in last[1] if not isinstance(name, str) or name not in known), None)
        require(stranger is None, "last_options", f"names of states, of {', '.join(sorted(known))}", stranger)
        for name, value in zip(REDONE_BY, last[0], strict=True):
            if name in _SWITCHES:
                require(isinstance(value, bool), f"last_options: {name}", "True or False", value)
            elif value is not None or name != "ema_kappa":
                check_number(f"last_options: {name}", value, "finite and >= 0", lambda a: a >= 0)
        return tuple(map(plain_number, last[0])), tuple(last[1])

    @staticmethod
    def _checked_learned(name: str, value: Tensor) -> Tensor:
        """What was saved of the learned coefficients. Outside of bounds that were narrowed since, a step moves them."""
        require(value.is_floating_point() and not value.is_meta, name, "of real numbers", value)
        numbers = value.reshape(-1).tolist()
        if name == "coefficient_values":
            for coefficient, number in zip(COEFFICIENTS, numbers, strict=True):
                beta = coefficient.startswith("beta")
                fits = 0 <= number <= 1 and (number < 1 or not beta)
                require(fits, f"{name}: {coefficient}", "in [0, 1)" if beta else "in [0, 1]", number)
        elif name == "hyper_step":
            checked_count(name, value, 2**53)
        elif name == "coefficient_momenta":
            for coefficient, number in zip(COEFFICIENTS, numbers, strict=True):
                check_number(f"{name}: {coefficient}", number, "finite", lambda _: True)
        return value

    def _translated_state(
        self,
        saved: dict[str, Any],
        param: Tensor,
        group: Group,
        required: Sequence[str],
        name: str,
        notes: list[str],
    ) -> dict[str, Tensor]:
        state = super()._translated_state(saved, param, group, required, name, notes)
        if "last_scalars" in state:
            self._check_last_scalars(state["last_scalars"], group, name)
            last = group["last_options"]
            for needed in last[1] if last else self._state_tensors(group):
                if not has(state, needed) and needed != "ema" and state["last_scalars"][0] == REDO:
                    raise ValueError(f"{name} lacks {needed}, without which its last step can't be redone")
        if "last_grad" in state and "last_scalars" not in state and "last_scalars" in self._state_tensors(group):
            # An earlier version kept scalars only where something was learned. The gradient is one of a step all the
            # same, but in the state of a dry run.
            state["last_scalars"] = self._initial("last_scalars", param, group)
            state["last_scalars"][0] = DONE if state["step"] > 0 else NO_GRADIENT
        return state

    @staticmethod
    def _check_last_scalars(row: Tensor, group: Group, name: str) -> None:
        taken, lr, *coefficients = row.tolist()
        known = taken in (DONE, NO_GRADIENT) or (taken == REDO and group["learn"])
        fits = taken == NO_GRADIENT or (lr >= 0 and math.isfinite(lr) and all(0 <= q <= 1 for q in coefficients))
        if not (known and fits):
            raise ValueError(f"{name}: last_scalars must be of a step ({', '.join(LAST_SCALARS)}), got {row.tolist()}")

    def _translated(self, loaded: dict[str, Any], notes: list[str]) -> dict[str, Any]:
        saved_groups = self._checked_structure(loaded)
        starts = not any(self._OWN_OPTION in group for group in saved_groups)
        loaded = super()._translated(loaded, notes)
        if self._incoming is not None:
            check_sharing(loaded["param_groups"], start=starts)
        return loaded

    def __getstate__(self) -> dict[str, Any]:
        ranks = self._hyper_process_group if self._hyper_process_group == "world" else None  # no pickle holds others
        last = [self._arguments(group) for group in self.param_groups]
        return {**super().__getstate__(), "_last": last, "_hyper_process_group": ranks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._sums = []
        self.__dict__.setdefault("_hyper_process_group", None)
        self._share()
        kept = self.__dict__.pop("_last", ())  # of a pickle
        for group, before in zip_longest(self.param_groups, kept):
            last = group.setdefault("last_options", None)
            group.setdefault("frozen", None)
            group["last_options"] = None
            if before is not None:
                self._record(group).prepared = before
                continue
            now = self._prepare(group)
            if last is not None:
                now = now._replace(step=now.step | dict(zip(REDONE_BY, last[0], strict=True)), states=tuple(last[1]))
            self._record(group).prepared = now
        self._default_to_frozen()
