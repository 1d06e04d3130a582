"""How a step is taken: first all checks that can refuse it, then all changes, in one call of C if possible.

A step's operator calls, the new states of its parameters, and its other changes are prepared as calls without
arguments. On native backends all of them are made at once (whole.py). Otherwise the step marks itself as under way.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection
from functools import partial
from itertools import chain, repeat
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .backend import say_once
from .checkpoints import Checkpoints
from .formats import HASH, has_average, parts_of
from .memory import aligned, as_bytes, is_askew, overlap_in_part, region
from .operands import check_operands
from .sharding import PLAIN, local
from .states import Work, counts_no_further
from .whole import Call, each

States = dict[str, list[Tensor]]
Prepared = list[tuple[Work, States]]

ASKEW = (
    "the addresses of some parameters are no multiple of their element size: pace_kernels steps them through copies, "
    "which is slower. Clone them once"
)
RESIZED = "a parameter has another shape than its average: the average starts anew at the weights"


def of_c(function: Any) -> Any:
    """The C function behind an operator, if there is one: calling the operator itself runs a line of Python first."""
    return getattr(function, "_op", function)


def _is_of_c(call: Call) -> bool:
    function = call.func if isinstance(call, partial) else call
    return function is deque or isinstance(function, BuiltinFunctionType | type(dict.update))


class Launching(Checkpoints):
    """An optimizer that takes steps. Not for direct use."""

    # Addresses of parameters that were found not to overlap others in part.
    _apart: set[int]
    # Those of one address that are one memory: region, dtype, shape, strides.
    _twins: set[Any]
    # Whether some tensor lay at an address that is no multiple of its element size: then all of them are looked at.
    _askew: bool
    # Ids of parameters that wait for a later call of the same step, which needs their averages.
    _waits: Collection[int] = ()
    # What a step changes beside its works: the count of steps that were left undone.
    _counting: list[Call]

    def _states(self, work: Work) -> States:
        """The states of the work's parameters. Missing ones are made here and entered by the step."""
        raise NotImplementedError

    def _launch(self, work: Work, states: States) -> Call:
        """The operator's call. ``states`` has `step` and each of `_state_tensors`, a list as long as the parameters."""
        raise NotImplementedError

    def _afterwards(self, prepared: Prepared) -> list[Call]:
        """The calls that follow those of the operators once new states are entered."""
        return []

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, value in {"_apart": set(), "_twins": set(), "_askew": False, "_counting": []}.items():
            self.__dict__.setdefault(name, value)

    # ---- memory ----------------------------------------------------------------------------------------------------

    def _check_overlaps(self) -> None:
        """Raises ValueError if parameters to train share some of their elements, but not all."""
        named = [
            (group, i, param)
            for group in self.param_groups
            for i, param in enumerate(group["params"])
            if (param.requires_grad or param.grad is not None) and not is_lazy(param)
        ]
        pair = overlap_in_part([param for *_, param in named])
        if pair is not None:
            one, other = (self._name(*named[k][:2]) for k in pair)
            raise ValueError(f"{one} and {other} share a part of their memory: they must share all or none")
        self._apart = {0, *(where[1] for *_, param in named if (where := region(param)) is not None)}

    def _separated(self, works: list[Work]) -> list[Work]:
        """The works, split so that no two parameters of one share memory: an operator steps its parameters in parallel,
        but parameters over one memory have to be stepped one after the other, as in ``torch.optim``."""
        found: list[int] = []
        for work in works:
            if set(map(type, work.params)) <= PLAIN and work.device.type in ("cpu", "cuda"):
                found += map(Tensor.data_ptr, work.params)
            else:
                found += (where[1] for param in work.params if (where := region(param)) is not None)
        distinct = set(found)
        if not distinct <= self._apart:
            self._check_overlaps()
            self._apart |= distinct
        if len(distinct) == len(found):
            return works
        params = [param for work in works for param in work.params]
        starts = Counter(where[1] for param in params if (where := region(param)) is not None)
        twins = frozenset(
            (where, param.dtype, param.shape, param.stride())
            for param in params
            if (where := region(param)) is not None and starts[where[1]] > 1
        )
        if twins - self._twins:
            self._check_overlaps()
            self._twins |= twins
        return [part for work in works for part in _split(work)]

    # ---- the step --------------------------------------------------------------------------------------------------

    def _run(self, works: list[Work]) -> None:
        """Takes the step, or raises with nothing changed."""
        works = self._separated(works)
        prepared = [(work, self._states(work)) for work in works]
        if self._askew:
            for work, states in prepared:
                _align(work, states)
        try:
            self._launch_all(prepared)
        except RuntimeError:
            # The operators look at all addresses and shapes anyway: asking costs nothing until one of them refuses.
            if self._unfinished or not self._mend(works):
                raise
            self._run(works)
            return
        self._plan_next(prepared)

    def _plan_next(self, prepared: Prepared) -> None:
        """Runs after a step that was taken."""

    def _mend(self, works: list[Work]) -> bool:
        """Whether a step that was refused can be taken in another way."""
        mended = False
        for work in works:
            for i, owner in enumerate(work.owners):
                state = self.state.get(owner, {})
                here = [work.params[i], *work.grads[i : i + 1], *map(local, state.values())]
                if not self._askew and any(map(is_askew, here)):
                    self._askew = mended = True
                    say_once(ASKEW)
                if "step" in state and counts_no_further(state["step"]):
                    state["step"] = state["step"].double()
                    mended = True
                average = state.get("ema", state.get("ema_codes"))
                if average is not None and average.shape != owner.shape:
                    for name in (*parts_of("ema"), HASH):  # as that of a parameter at rest; the step makes a new one
                        state.pop(name, None)
                    mended = True
                    say_once(RESIZED)
        return mended

    def _launch_all(self, prepared: Prepared) -> None:
        works = [work for work, _ in prepared]
        calls = [self._launch(work, states) for work, states in prepared]
        self._check_operands(prepared, calls)
        then = self._changes(prepared)
        copies = any(work.copies for work in works)
        if not copies and all(map(_is_of_c, calls)) and all(map(_is_of_c, then)):
            self._note_left(self._lying(works), 1)
            for work in works:  # before: a handler in between must not find new weights of an old version
                _new_version(work)
            self._at_once(calls, then)
            self._note_left(self._lying(works))  # once more: views of one tensor count their writes together
            return
        written = [t for work, states in prepared for t in chain(work.params, *states.values())]
        with self._under_way(written):
            for work, call in zip(works, calls, strict=True):
                for original, copy in work.copies:
                    copy.copy_(original)  # once more: it may be the memory of a parameter that was stepped since
                if work.backend.name != "torch":  # whose writes count by themselves
                    _new_version(work)
                call()
                for original, copy in work.copies:
                    original.copy_(copy)
                if work.backend.name == "torch":
                    _new_version(work)
            for call in then:
                call()
            self._note_left(self._lying(works))

    def _lying(self, works: list[Work]) -> list[Tensor]:
        """The parameters beside which averages are stored."""
        return [p for work in works if work.formats.on_grid and self._keeps_average(work.group) for p in work.owners]

    def _changes(self, prepared: Prepared) -> list[Call]:
        """The changes of the step other than the operators' writes."""
        works = [work for work, _ in prepared]
        calls, fresh = self._entering([work for work in works if not work.left_undone()])
        calls += self._afterwards(prepared)
        if any(work.left_undone() for work in works):
            return [*calls, *self._counting]
        params = (p for group in self.param_groups for p in group["params"])
        frozen = [p for p in params if not p.requires_grad and id(p) not in self._waits]
        at_rest = [s for p in frozen if (s := self.state.get(p, fresh.get(p))) is not None]
        stepped = any(p.grad is not None for p in frozen)
        if self._AVERAGE == "ema" and (stepped or any(map(has_average, at_rest))):
            # A parameter at rest is live in the average: where it steps again, its average starts anew.
            calls += [each(dict.pop, at_rest, repeat(name), repeat(None)) for name in (*parts_of("ema"), HASH)]
        return [*calls, *self._counting]

    def _entering(self, works: list[Work]) -> tuple[list[Call], dict[Tensor, dict[str, Tensor]]]:
        """Enters the new states of the works. A skipped step enters none: averages start at the weights before the
        first step that counts."""
        fresh = {w.owners[i]: new for w in works for i, new in w.changes.items() if new is w.records[i]}
        changed = [(w.records[i], new) for w in works for i, new in w.changes.items() if new is not w.records[i]]
        calls: list[Call] = []
        if fresh:
            calls.append(partial(dict.update, self.state, fresh))  # type: ignore[arg-type]
        if changed:
            calls.append(each(dict.update, *zip(*changed, strict=True)))
        return calls, fresh

    def _check_operands(self, prepared: Prepared, calls: list[Call]) -> None:
        """Runs every check that can make an operator refuse, before any operator writes. The first native operator does
        so itself: it checks everything before it writes."""
        for number, ((work, states), call) in enumerate(zip(prepared, calls, strict=True)):
            native = isinstance(call, partial) and isinstance(call.func, BuiltinFunctionType)
            if native and work.backend.name == "cpu" and number > 0:
                undone = torch.ones((), device="cpu")  # with which the operator returns where it would write
                call.func(*call.args, **{**call.keywords, "found_inf": undone})  # type: ignore[attr-defined]
            elif work.backend.name == "torch" or number > 0:
                check_operands(work, states, self._STATE_ROWS)


def _new_version(work: Work) -> None:
    torch.autograd.graph.increment_version(work.params)
    if work.axes:
        torch.autograd.graph.increment_version(work.owners)


def _align(work: Work, states: States) -> None:
    """Replaces tensors whose address is no multiple of their element size by copies."""
    for i, param in enumerate(work.params):
        if is_askew(param):
            work.params[i] = copy = aligned(param)
            work.copies.append((as_bytes(param), as_bytes(copy)))
        if work.grads:
            work.grads[i] = aligned(work.grads[i])
        for name, column in states.items():
            if is_askew(column[i]):
                column[i] = aligned(column[i])
                work.put(i, name, column[i])


def _split(work: Work) -> list[Work]:
    """The work in parts, none with two parameters over one memory."""
    parts: list[Work] = [work.part()]
    seen: set[Any] = set()
    for i, param in enumerate(work.params):
        where = region(param)
        if where is not None and where in seen:
            parts.append(work.part())
            seen = set()
        seen.add(where)
        parts[-1].owners.append(work.owners[i])
        parts[-1].params.append(param)
        parts[-1].grads += work.grads[i : i + 1]
    return parts
