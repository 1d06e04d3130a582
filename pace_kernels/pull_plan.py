"""The plan of a Pullback's step, like those of planning.py, in two calls: before the base's step and after it."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import Group, check_lr, plain_number
from .definitions import DEFINITIONS
from .editing import version_of
from .plan import CAPTURED, Kept, check_dicts, numbers_of, seen, stream_of
from .planning import increment_version, swaps_parameters
from .pulls import STEP, SWAPPED, Moves, Pull, Row, ahead, versions
from .sharding import PLAIN, is_sharded, local

if TYPE_CHECKING:
    from .pulling import Pulling

_DEFINITION = DEFINITIONS["pullback_"]
_NAMES = [option.name for option in _DEFINITION.options]
_LR, _BETA2, _WIDTH = _NAMES.index("lr"), _NAMES.index("beta2"), len(_NAMES) + 1  # with capturable
_NOT_OURS = {"weight_decay": ..., "momentum": ...}  # which schedulers set beside these


def _looked_at(group: Group, params: list[Any], places: Mapping[str, Any]) -> list[Any]:
    """A group as Plan.changed_groups takes it: without its values if they may hold other numbers later, as lists and
    tensors do, and tuples of tensors."""
    given = [value for name, value in group.items() if name != "params"]
    kinds = {type(one) for value in given for one in (value if type(value) is tuple else (value,))}
    steady = not any(issubclass(kind, list | Tensor) for kind in kinds)
    return seen(group, params, list(dict.values(group)) if steady else None, dict.keys(group), places)


def _counts_at_hand(steps: list[Any]) -> bool:
    """Whether the calls of the plan can read these step counts."""
    return all(
        isinstance(step, Tensor) and step.is_cpu and step.numel() == 1 and step.dtype in (torch.float32, torch.float64)
        for step in steps
    )


def _is_at_hand(lr: Any) -> bool:
    return not isinstance(lr, Tensor) or lr.is_cpu


def _is_as_it_was(optimizer: Pulling, pulls: list[Pull], rest: list[Tensor]) -> bool:
    """Whether the next step would pull the same: a base may change options, or which parameters have gradients or
    require them, in its step."""
    groups = [(group, optimizer._own(group)) for group in optimizer.base.param_groups]
    kept = [param for group, own in groups if own.keeps for param in group["params"]]
    owners = {id(owner) for pull in pulls for owner in pull.owners}
    if {id(p) for p in kept if p.grad is not None} != owners:
        return False
    if {id(p) for p in kept if not p.requires_grad} != set(map(id, rest)):
        return False
    now = {id(group): own for group, own in groups}
    return all(
        now.get(id(pull.group)) is pull.own and optimizer._moment(pull.group, pull.own, pull.dtype) == pull.moment
        for pull in pulls
    )


class PullPlan(Kept):
    """The pulls of a step, for the next one. ``pulls`` are single calls, and ``rows`` their statistics."""

    def __init__(self, optimizer: Pulling, pulls: list[Pull], rest: list[Tensor], rows: list[Row]) -> None:
        base = optimizer.base
        self.sets_grad_mode = type(base).__module__.startswith("torch.optim")  # in its step, as all of torch do
        self.pulls, self.rest, self.rows = pulls, rest, rows
        owners = [owner for pull in pulls for owner in pull.owners]
        dicts = [base.state[owner] for owner in owners]
        check_dicts(base.state, *base.param_groups, *dicts)
        hidden = {id(owner) for pull in pulls for owner in pull.hidden}
        self.aside = [(p, state) for p, state in zip(owners, dicts, strict=True) if id(p) in hidden]
        values: list[Any] = []  # of all states, one after the other; those that are no operands may be any
        self.counts: list[Tensor] = []  # on a device: by whose versions it is told that offsets stay
        self.counted: list[tuple[list[Tensor], list[Any], list[int]]] = []  # ours, the base's, the offsets
        others: list[list[Any]] = []  # the base's step counts of each pull that its calls compare with ours
        start = 0
        for pull in pulls:
            its = dicts[start : start + len(pull.owners)]
            start += len(pull.owners)
            corrected = pull.moment is not None and pull.moment.beta2 != 0.0
            names = {*pull.names, STEP, *([pull.moment.name] if pull.moment else []), *(["step"] if corrected else [])}
            if not all(map(names.issubset, its)):
                raise RuntimeError("the base keeps its states in another way")
            values += (value if name in names else ... for state in its for name, value in state.items())
            theirs = [state["step"] for state in its] if corrected else []
            others.append(theirs if _counts_at_hand(theirs) else [])
            if corrected:
                self.counts += chain(pull.steps, theirs) if not others[-1] else ()
                self.counted.append((pull.steps, theirs, pull.offsets))
            if pull.moment and not all(map(operator.is_, pull.seconds, (local(d[pull.moment.name]) for d in its))):
                raise RuntimeError("the second moment is in a dtype of its own")
            pull.new, pull.found_inf = [], None
        steps = [step.data_ptr() for pull in pulls for step in pull.steps]
        if len(set(steps)) < len(steps) or not self._offsets_stay():
            raise RuntimeError("parameters share a step count, or the base does not count by one in each step")
        backend, params = pulls[0].backend, [param for pull in pulls for param in pull.params]
        super().__init__(base.param_groups, base.state, backend, owners, params, dicts, values)
        self.numbers = self._numbers_now(optimizer)
        self.seen = [_looked_at(group, list(group["params"]), self._places(group)) for group in base.param_groups]
        add = backend.op("plan_add_")
        for pull, row, start, theirs in zip(pulls, self._rows_by_pull(), self._starts(), others, strict=True):
            emas, scales = (list(map(local, some)) for some in (pull.emas, pull.scales))
            lists = [pull.params, pull.befores, pull.seconds, emas, pull.steps, scales, theirs]
            extras = [None if row is None else row.stats, None]
            tensors = list(chain.from_iterable(lists))
            numbers = self.numbers[start : start + _WIDTH]
            add(self.held.handle, _DEFINITION.op, tensors, list(map(len, lists)), extras, numbers)
        # The versions that tell whether the base wrote anything: of weights, and of the first tensor of each state.
        self.written = partial(self.held.versions, self.all_params, self.dicts)
        self.moves = Moves(versions(self.counts))
        lying = [pull for pull in pulls if pull.formats.on_grid]
        self.beside = [owner for pull in lying for owner in pull.owners]
        self.lie = [param for pull in lying for param in pull.params]

    @classmethod
    def of(cls, optimizer: Pulling, pulls: list[Pull], rest: list[Tensor], rows: list[Row]) -> PullPlan | None:
        """None if a step has to look closer."""
        if not pulls or optimizer._scratch.unsure or not _is_as_it_was(optimizer, pulls, rest):
            return None
        if stream_of(pulls[0].device) == CAPTURED:
            return None
        if len({(pull.backend.name, pull.params[0].device) for pull in pulls}) > 1:
            return None  # one call a device
        if pulls[0].device.type != "cpu" and any(pull.befores for pull in pulls):
            return None  # kept, the weights before would take 4 bytes per float32 parameter of a GPU
        for pull in pulls:
            kinds = set(map(type, pull.owners))
            if (
                not pull.backend.keeps_plans
                or pull.dtype.is_complex
                or pull.on_device
                or pull.alone
                or pull.askew
                or any(pull.rounds)
                or not _is_at_hand(pull.group.get("lr"))
                or min(pull.offsets, default=0) < 0
                or not (kinds <= PLAIN or all(map(is_sharded, pull.owners)))
                or (swaps_parameters() and not pull.sharded)
                or any(param.is_inference() for param in pull.params)
            ):
                return None
        try:
            return cls(optimizer, pulls, rest, rows)
        except (KeyError, AttributeError, RuntimeError):  # of a base that keeps its states in another way
            return None

    def _rows_by_pull(self) -> list[Row | None]:
        rows = iter(self.rows)
        return [next(rows) if pull.own.values["log_stats"] else None for pull in self.pulls]

    def _starts(self) -> Sequence[int]:
        """Where the options of each pull are in the list of numbers."""
        return range(0, _WIDTH * len(self.pulls), _WIDTH)

    def _numbers_now(self, optimizer: Pulling) -> list[float]:
        options = (optimizer._options(pull, pull.offsets[0] if pull.offsets else 0) for pull in self.pulls)
        return [number for given in options for number in numbers_of(_DEFINITION, given)]

    def _places(self, group: Group) -> dict[str, Any]:
        """Where the options of a base's group are that schedulers change; the gain and β2 follow from two of them."""
        its = [(start, p.moment) for start, p in zip(self._starts(), self.pulls, strict=True) if p.group is group]
        by_moment = [start for start, moment in its if moment is not None]
        corrected = tuple(
            start + _BETA2 for start in by_moment
        )  # 0 where nothing is: then another β2 is Python's to see
        return {"lr": tuple(start + _LR for start in by_moment), "betas": ((), corrected), **_NOT_OURS}

    def _offsets_stay(self) -> bool:
        return all(ahead(ours, theirs) == offsets for ours, theirs, offsets in self.counted)

    def _looks_at(self, optimizer: Pulling, found: Sequence[int]) -> bool:
        """Whether the plan fits the options of these groups; if so, its numbers are theirs."""
        groups = optimizer.base.param_groups
        if any(group[SWAPPED] or not _is_at_hand(group.get("lr")) for group in groups):
            return False
        for group in groups:
            if optimizer._own(group).by_moment:
                check_lr(group["lr"])
        for pull in self.pulls:
            group, own = pull.group, optimizer._own(pull.group)
            moment = optimizer._moment(group, own, pull.dtype)
            form = (moment.name, moment.beta2 != 0.0) if moment else None
            before = (pull.moment.name, pull.moment.beta2 != 0.0) if pull.moment else None
            if own is not pull.own or form != before or bool(group.get("capturable", False)):
                return False
            pull.moment = moment
        for k in found:
            group, params, *_ = self.seen[k]
            self.seen[k][:] = _looked_at(group, params, self._places(group))
        self.numbers = self._numbers_now(optimizer)
        return True

    def fits(self, optimizer: Pulling) -> bool:
        """Whether the plan fits; if so, the weights are copied, and nothing else is written. A plan that does not fit
        must be dropped."""
        base, held = optimizer.base, self.held
        try:
            found = held.changed_groups(base.param_groups, self.seen, self.numbers)
            if found:
                self.stale = True
            if (
                found is None
                or (found and found is not True and not self._looks_at(optimizer, found))
                or self.gradients() is None
                or not self.holds(base.state)
                or (self.wrappers and self.are_replaced())
                or (self.counts and versions(self.counts) != self.moves.seen)
                or (self.on_gpu and stream_of(self.device) != self.stream)
                or (self.lie and list(map(optimizer._left.get, self.beside)) != list(map(version_of, self.lie)))
            ):
                return False
            held.before(self.numbers if self.stale else ())
            self.stale = False
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError):
            return False  # the usual step says why
        return True

    def _with_rates(self) -> list[float]:
        """The numbers of a step in which the base set lr, maybe within the tensor that it is."""
        numbers = list(self.numbers)
        for start, pull in zip(self._starts(), self.pulls, strict=True):
            if pull.moment is not None:
                numbers[start + _LR] = float(plain_number(pull.group["lr"]))
        return numbers

    def taken(self, optimizer: Pulling) -> bool:
        """Pulls, after the base's step; False if that left other states than before."""
        base, held = optimizer.base, self.held
        if not self.holds(base.state) or (self.wrappers and self.are_replaced()):
            return False
        # A base may set lr in its step, also within the tensor that it is.
        changed = held.changed_groups(base.param_groups, self.seen)
        if changed is None or (changed and not all(_is_at_hand(pull.group.get("lr")) for pull in self.pulls)):
            return False
        increment_version(self.params)
        if self.sharded:
            increment_version(self.owners)
        numbers: Sequence[float] = ()
        try:
            if changed and (now := self._with_rates()) != self.numbers:  # which stay those of the groups in `seen`
                numbers, self.stale = now, True
        except (RuntimeError, TypeError, ValueError):  # the usual way says why
            return False
        try:
            held.step(numbers)
        except RuntimeError:  # so it does here; a ValueError says that some parts have stepped
            return False
        if self.lie:
            optimizer._left.update(zip(self.beside, map(version_of, self.lie), strict=True))
        optimizer._scratch.rows = self.rows
        if self.counts:
            self.moves.note(versions(self.counts), self._offsets_stay)
        return True

    def left(self) -> list[Pull]:
        """The pulls, for the usual way to go on after the base's step: C may have taken another β2 for them."""
        for start, pull in zip(self._starts(), self.pulls, strict=True):
            if pull.moment is not None:
                pull.moment = replace(pull.moment, beta2=self.numbers[start + _BETA2])
        return self.pulls
