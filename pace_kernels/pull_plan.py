"""The plan of a Pullback's step, like those of planning.py, in two calls: before the base's step and after it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import Group, check_lr
from .definitions import DEFINITIONS
from .editing import version_of
from .plan import CAPTURED, check_dicts, numbers_of, stream_of
from .planning import increment_version, swaps_parameters
from .pulls import STEP, SWAPPED, Moves, Pull, Row, ahead, versions
from .sharding import PLAIN, is_sharded, local

if TYPE_CHECKING:
    from .pulling import Pulling

_requires_grad = operator.attrgetter("requires_grad")
_local = operator.attrgetter("_local_tensor")
_DEFINITION = DEFINITIONS["pullback_"]


def _looked_at(group: Group, params: list[Any]) -> list[Any]:
    """A group as Plan.changed_groups takes it: without its values if they may hold other numbers later, as lists and
    tensors do, and tuples of tensors."""
    given = [value for name, value in group.items() if name != "params"]
    kinds = {type(one) for value in given for one in (value if type(value) is tuple else (value,))}
    steady = not any(issubclass(kind, list | Tensor) for kind in kinds)
    return [group, params, list(dict.values(group)) if steady else None]


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


class PullPlan:
    """The pulls of a step, for the next one. ``pulls`` are single calls, and ``rows`` their statistics."""

    def __init__(self, optimizer: Pulling, pulls: list[Pull], rest: list[Tensor], rows: list[Row]) -> None:
        base = optimizer.base
        self.sets_grad_mode = type(base).__module__.startswith("torch.optim")  # in its step, as all of torch do
        self.pulls, self.rest, self.rows = pulls, rest, rows
        self.seen = [_looked_at(group, list(group["params"])) for group in base.param_groups]
        self.all_params = [param for _, params, _ in self.seen for param in params]
        self.unused = [param.grad is None for param in self.all_params]
        self.trained = list(map(_requires_grad, self.all_params))
        self.keys, self.states = list(base.state), list(base.state.values())
        self.owners = [owner for pull in pulls for owner in pull.owners]
        self.dicts = [base.state[owner] for owner in self.owners]
        check_dicts(base.state, *base.param_groups, *self.dicts)
        self.params = [param for pull in pulls for param in pull.params]
        self.sharded = any(pull.sharded for pull in pulls)
        hidden = {id(owner) for pull in pulls for owner in pull.hidden}
        self.aside = [(p, state) for p, state in zip(self.owners, self.dicts, strict=True) if id(p) in hidden]
        self.values: list[Any] = []  # of all states, one after the other; those that are no operands may be any
        self.counts: list[Tensor] = []  # on a device: by whose versions it is told that offsets stay
        self.counted: list[tuple[list[Tensor], list[Any], list[int]]] = []  # ours, the base's, the offsets
        others: list[list[Any]] = []  # the base's step counts of each pull that its calls compare with ours
        start = 0
        for pull in pulls:
            dicts = self.dicts[start : start + len(pull.owners)]
            start += len(pull.owners)
            corrected = pull.moment is not None and pull.moment.beta2 != 0.0
            names = {*pull.names, STEP, *([pull.moment.name] if pull.moment else []), *(["step"] if corrected else [])}
            if not all(map(names.issubset, dicts)):
                raise RuntimeError("the base keeps its states in another way")
            self.values += (value if name in names else ... for state in dicts for name, value in state.items())
            theirs = [state["step"] for state in dicts] if corrected else []
            others.append(theirs if _counts_at_hand(theirs) else [])
            if corrected:
                self.counts += chain(pull.steps, theirs) if not others[-1] else ()
                self.counted.append((pull.steps, theirs, pull.offsets))
            if pull.moment and not all(map(operator.is_, pull.seconds, (local(d[pull.moment.name]) for d in dicts))):
                raise RuntimeError("the second moment is in a dtype of its own")
            pull.new, pull.found_inf = [], None
        steps = [step.data_ptr() for pull in pulls for step in pull.steps]
        if len(set(steps)) < len(steps) or not self._offsets_stay():
            raise RuntimeError("parameters share a step count, or the base does not count by one in each step")
        self.wrappers = list(filter(is_sharded, chain(self.owners, self.values)))
        self.locals = list(map(_local, self.wrappers))
        self.numbers: list[list[float]] = []
        self._changed_numbers(optimizer)
        backend = pulls[0].backend
        self.device = self.params[0].device
        self.stream, self.on_gpu = stream_of(self.device), self.device.type == "cuda"
        self.held = backend.new_plan()
        add = backend.op("plan_add_")
        for pull, row, numbers, theirs in zip(pulls, self._rows_by_pull(), self.numbers, others, strict=True):
            emas, scales = (list(map(local, some)) for some in (pull.emas, pull.scales))
            lists = [pull.params, pull.befores, pull.seconds, emas, pull.steps, scales, theirs]
            extras = [None if row is None else row.stats, None]
            tensors = list(chain.from_iterable(lists))
            add(self.held.handle, _DEFINITION.op, tensors, list(map(len, lists)), extras, numbers)
        # The versions that tell whether the base wrote anything: of weights, and of the first tensor of each state.
        self.written = partial(self.held.versions, self.all_params, self.dicts)
        self.gradients = partial(self.held.gradients, self.all_params, self.unused, self.trained)
        self.holds = partial(self.held.holds_states, self.keys, self.states, self.dicts, self.values)
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

    def _numbers_of(self, optimizer: Pulling, pull: Pull) -> list[float]:
        return numbers_of(_DEFINITION, optimizer._options(pull, pull.offsets[0] if pull.offsets else 0))

    def _changed_numbers(self, optimizer: Pulling) -> Sequence[float]:
        """The options of all pulls, if some differ from those of the plan."""
        numbers = [self._numbers_of(optimizer, pull) for pull in self.pulls]
        if numbers == self.numbers:
            return ()
        self.numbers = numbers
        return list(chain.from_iterable(numbers))

    def _offsets_stay(self) -> bool:
        return all(ahead(ours, theirs) == offsets for ours, theirs, offsets in self.counted)

    def _has_its_states(self, state: dict[Any, Any]) -> bool:
        return self.holds(state) and not (
            self.wrappers and any(map(operator.is_not, map(_local, self.wrappers), self.locals))
        )

    def is_of(self, optimizer: Pulling) -> bool:
        """Whether parameters and states are those of the plan."""
        changed = self.held.changed_groups(optimizer.base.param_groups, self.seen)
        return changed is not None and self._has_its_states(optimizer.base.state)

    def _options_now(self, optimizer: Pulling, changed: Sequence[int]) -> Sequence[float] | None:
        """The options to pass, where those of some groups changed; None if the plan does not fit."""
        groups = optimizer.base.param_groups
        if any(group[SWAPPED] or not _is_at_hand(group.get("lr")) for group in groups):
            return None
        for pull in self.pulls:
            group, own = pull.group, optimizer._own(pull.group)
            moment = optimizer._moment(group, own, pull.dtype)
            form = (moment.name, moment.beta2 != 0.0) if moment else None
            before = (pull.moment.name, pull.moment.beta2 != 0.0) if pull.moment else None
            if own is not pull.own or form != before or bool(group.get("capturable", False)):
                return None
            if own.by_moment:
                check_lr(group["lr"])
            pull.moment = moment
        for k in changed:
            self.seen[k][:] = _looked_at(*self.seen[k][:2])
        return self._changed_numbers(optimizer)

    def fits(self, optimizer: Pulling) -> bool:
        """Whether the plan fits; if so, the weights are copied, and nothing else is written. A plan that does not fit
        must be dropped."""
        base = optimizer.base
        try:
            options = self.held.changed_groups(base.param_groups, self.seen)
            if options:
                options = self._options_now(optimizer, options)
            if (
                options is None
                or self.gradients() is None
                or not self._has_its_states(base.state)
                or (self.counts and versions(self.counts) != self.moves.seen)
                or (self.on_gpu and stream_of(self.device) != self.stream)
                or (self.lie and list(map(optimizer._left.get, self.beside)) != list(map(version_of, self.lie)))
            ):
                return False
            self.held.before(options)
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError):
            return False  # the usual step says why
        return True

    def taken(self, optimizer: Pulling) -> bool:
        """Pulls, after the base's step; False if that left other states than before."""
        if not self._has_its_states(optimizer.base.state):
            return False
        # A base may set lr in its step, also within the tensor that it is.
        changed = self.held.changed_groups(optimizer.base.param_groups, self.seen)
        if changed is None or (changed and not all(_is_at_hand(pull.group.get("lr")) for pull in self.pulls)):
            return False
        increment_version(self.params)
        if self.sharded:
            increment_version(self.owners)
        try:
            options = self._changed_numbers(optimizer) if changed else ()
        except (TypeError, ValueError):  # the usual way says why
            return False
        try:
            self.held.step(options)
        except RuntimeError:  # so it does here; a ValueError says that some parts have stepped
            return False
        if self.lie:
            optimizer._left.update(zip(self.beside, map(version_of, self.lie), strict=True))
        optimizer._scratch.rows = self.rows
        if self.counts:
            self.moves.note(versions(self.counts), self._offsets_stay)
        return True
