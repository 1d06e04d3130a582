"""What a Pullback's step keeps for the next. If nothing changed, that looks at no parameter in Python."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from .pulls import AVERAGE, OURS, STEP, Moves, Own, Pull, ahead, count_of, is_fake, versions
from .second_moments import SecondMoment
from .states import FLOAT32_LAST
from .torch_rules.common import at_hand

_call = operator.methodcaller("__call__")
_local = operator.attrgetter("_local_tensor")
_form = operator.attrgetter("shape", "dtype")


class LastPull:
    """A pull as a step left it. The next step reuses it if all its parts are there and unchanged, which comparisons in
    C tell (1.6 µs per parameter instead of 5). References are weak, so that replaced tensors are freed. Parameters go
    by their ids, since torch can't swap the contents of a tensor with weak references, as it does to convert a DTensor:
    one with the id of another, over its memory and with its states, is pulled as that was."""

    def __init__(self, pull: Pull, entries: list[dict[str, Any]]) -> None:
        corrected = pull.moment is not None and pull.moment.beta2 != 0.0
        columns = (pull.emas, pull.steps, pull.seconds, pull.befores)
        self.emas, self.steps, self.seconds, self.befores = map(_refs, columns)
        self.owners = list(map(id, pull.owners))
        self.base_steps = _refs(entry["step"] for entry in entries) if corrected else []
        self.template = replace(
            pull,
            group={},
            owners=[],
            params=[],
            emas=[],
            steps=[],
            seconds=[],
            befores=[],
            new=[],
            hidden=[],
            found_inf=None,
        )
        self.template.planned = True
        self.hidden = _is_bare(entries[0])
        self.capturable = pull.group.get("capturable")
        self.lengths = list(map(len, entries))
        self.memory = _memory(pull.params), _memory(_locals(pull.emas, pull.sharded))
        # A float32 count has to become float64 before it stops. On a device nobody reads it.
        short = [step for step in pull.steps if step.is_cpu and step.dtype is torch.float32]
        self.left = FLOAT32_LAST - max(map(count_of, short), default=0) - 1
        self.moves = Moves(self._versions())

    @classmethod
    def of(cls, pull: Pull, states: Any) -> LastPull | None:
        """None if a step has to look closer."""
        if (
            pull.alone
            or pull.askew
            or pull.dtype.is_complex
            or pull.device.type not in ("cpu", "cuda")
            or is_fake(pull.params[0])
            or any(pull.rounds)
            or pull.scales  # averages in codes: plans of whole steps take them up
        ):
            return None
        entries = list(map(states.get, pull.owners))
        if not all(type(entry) is dict for entry in entries) or len(set(map(_is_bare, entries))) > 1:
            return None
        moment = pull.moment
        if moment is not None:
            if any(entry.get(moment.name) is not second for entry, second in zip(entries, pull.seconds, strict=True)):
                return None
            if moment.beta2 != 0.0 and not all(isinstance(entry.get("step"), Tensor) for entry in entries):
                return None
        plan = cls(pull, entries)
        return plan if plan._offsets_stay() else None

    def note(self) -> None:
        """Remembers the versions of the step counts: as long as they move as ever, the offsets stay."""
        self.moves.note(self._versions(), self._offsets_stay)
        self.left -= 1

    def _versions(self) -> list[int]:
        return versions(map(_call, chain(self.steps, self.base_steps)))

    def _offsets_stay(self) -> bool:
        """False only if that is known without waiting for a device."""
        if not self.base_steps:
            return True
        ours, theirs = (list(map(_call, refs)) for refs in (self.steps, self.base_steps))
        if any(step is None for step in chain(ours, theirs)):
            return False
        return not all(map(at_hand, chain(ours, theirs))) or ahead(ours, theirs) == self.template.offsets

    def again(self, group: dict[str, Any], own: Own, moment: SecondMoment | None, states: Any) -> Pull | None:
        """The pull, if all is as it was."""
        old = self.template
        if own is not old.own or group.get("capturable") is not self.capturable or self.left <= 0:
            return None
        if (old.moment and (old.moment.name, old.moment.beta2 != 0)) != (moment and (moment.name, moment.beta2 != 0)):
            return None
        owners = [param for param in group["params"] if param.grad is not None]
        entries = list(map(states.get, owners))
        if not all(entries) or list(map(len, entries)) != self.lengths or list(map(id, owners)) != self.owners:
            return None
        if not _same(self.emas, emas := _column(entries, AVERAGE)):
            return None
        if not _same(self.steps, steps := _column(entries, STEP)):
            return None
        seconds, base_steps = [], []
        if moment is not None and not _same(self.seconds, seconds := _column(entries, moment.name)):
            return None
        if self.base_steps and not _same(self.base_steps, base_steps := _column(entries, "step")):
            return None
        params = _locals(owners, old.sharded)
        if (_memory(params), _memory(_locals(emas, old.sharded))) != self.memory:
            return None
        if versions(chain(steps, base_steps)) != self.moves.seen:
            return None
        befores = list(map(_call, self.befores))
        return replace(
            old,
            group=group,
            moment=moment,
            owners=owners,
            params=params,
            emas=emas,
            steps=steps,
            seconds=seconds,
            befores=befores if all(before is not None for before in befores) else [],
            hidden=owners if self.hidden else [],
        )


def _is_bare(entry: dict[str, Any]) -> bool:
    """Whether a state holds nothing of the base."""
    return all(name in OURS for name in entry)


def _refs(tensors: Iterable[Any]) -> list[weakref.ref[Any]]:
    return list(map(weakref.ref, tensors))


def _same(refs: list[weakref.ref[Any]], tensors: list[Any]) -> bool:
    # What is gone, of state and memory, is None on both sides.
    if len(refs) != len(tensors) or any(map(operator.is_, tensors, repeat(None))):
        return False
    return all(map(operator.is_, map(_call, refs), tensors))


def _column(entries: list[dict[str, Any]], name: str) -> list[Any]:
    return list(map(dict.get, entries, repeat(name)))


def _locals(tensors: list[Any], sharded: bool) -> list[Any]:
    return list(map(_local, tensors)) if sharded else tensors


def _memory(tensors: list[Any]) -> tuple[list[Any], ...]:
    """The addresses of tensors and the sizes of their storages, which ``tensor.data =`` and resizing change."""
    sizes = map(torch.UntypedStorage.nbytes, map(Tensor.untyped_storage, tensors))
    return list(map(Tensor.data_ptr, tensors)), list(sizes), list(map(_form, tensors))
