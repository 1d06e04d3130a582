"""The plan of a Pullback's step, like those of planning.py, in two calls: before the base's step and after it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import Group, check_lr
from .definitions import DEFINITIONS
from .editing import version_of
from .launching import of_c
from .plan import CAPTURED, numbers_of, stream_of
from .planning import swaps_parameters
from .pulls import STEP, SWAPPED, Moves, Pull, Row, ahead, versions
from .sharding import PLAIN, is_sharded, local

if TYPE_CHECKING:
    from .pulling import Pulling

_grad = operator.attrgetter("grad")
_requires_grad = operator.attrgetter("requires_grad")
_local = operator.attrgetter("_local_tensor")
_DEFINITION = DEFINITIONS["pullback_"]


def _looked_at(group: Group) -> tuple[list[Any], bool]:
    """A group's values, and whether comparing these objects is enough: lists and tensors may hold other numbers
    later."""
    kinds = [type(value) for name, value in group.items() if name != "params"]
    return list(group.values()), not any(issubclass(kind, (list, Tensor)) for kind in kinds)


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
        self.pulls, self.rest, self.rows = pulls, rest, rows
        self.groups = [(group, list(group["params"]), *_looked_at(group)) for group in base.param_groups]
        self.all_params = [param for _, params, *_ in self.groups for param in params]
        self.unused = [param.grad is None for param in self.all_params]
        self.trained = list(map(_requires_grad, self.all_params))
        self.keys, self.states = list(base.state), list(base.state.values())
        self.owners = [owner for pull in pulls for owner in pull.owners]
        self.dicts = [base.state[owner] for owner in self.owners]
        if not all(isinstance(state, dict) for state in self.dicts):
            raise RuntimeError("a state is no dict, and comparisons in C know no other")
        self.lengths = list(map(len, self.dicts))
        self.params = [param for pull in pulls for param in pull.params]
        self.sharded = any(pull.sharded for pull in pulls)
        hidden = {id(owner) for pull in pulls for owner in pull.hidden}
        self.aside = [(p, state) for p, state in zip(self.owners, self.dicts, strict=True) if id(p) in hidden]
        self.values_of: list[tuple[Any, list[Any]]] = []
        self.counts: list[Tensor] = []  # by whose versions it is told that offsets stay
        self.counted: list[tuple[list[Tensor], list[Any], list[int]]] = []  # ours, the base's, the offsets
        start = 0
        for pull in pulls:
            dicts = self.dicts[start : start + len(pull.owners)]
            start += len(pull.owners)
            corrected = pull.moment is not None and pull.moment.beta2 != 0.0
            names = [*pull.names, STEP, *([pull.moment.name] if pull.moment else []), *(["step"] if corrected else [])]
            self.values_of.append((operator.itemgetter(*names), dicts))
            if corrected:
                theirs = [state["step"] for state in dicts]
                self.counts += chain(pull.steps, theirs)
                self.counted.append((pull.steps, theirs, pull.offsets))
            if pull.moment and not all(map(operator.is_, pull.seconds, (local(d[pull.moment.name]) for d in dicts))):
                raise RuntimeError("the second moment is in a dtype of its own")
            pull.new, pull.found_inf = [], None
        steps = [step.data_ptr() for pull in pulls for step in pull.steps]
        if len(set(steps)) < len(steps) or not self._offsets_stay():
            raise RuntimeError("parameters share a step count, or the base does not count by one in each step")
        self.values = list(self._values())
        self.wrappers = list(filter(is_sharded, chain(self.owners, self.values)))
        self.locals = list(map(_local, self.wrappers))
        self.numbers: list[list[float]] = []
        self._changed_numbers(optimizer)
        backend = pulls[0].backend
        self.device = self.params[0].device
        self.stream = stream_of(self.device)
        self.held = backend.new_plan()
        handle, add = self.held.handle, backend.op("plan_add_")
        self.copy = partial(of_c(backend.op("plan_before_")), handle, self.params[0])
        self.pull = partial(of_c(backend.op("plan_step_")), handle, self.params[0], ())
        for pull, row, numbers in zip(pulls, self._rows_by_pull(), self.numbers, strict=True):
            emas, scales = (list(map(local, some)) for some in (pull.emas, pull.scales))
            lists = [pull.params, pull.befores, pull.seconds, emas, pull.steps, *([scales] if scales else [])]
            extras = [None if row is None else row.stats, None]
            add(handle, _DEFINITION.op, list(chain.from_iterable(lists)), list(map(len, lists)), extras, numbers)
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

    def _values(self) -> chain[Any]:
        return chain.from_iterable(chain.from_iterable(map(values_of, dicts)) for values_of, dicts in self.values_of)

    def _numbers_of(self, optimizer: Pulling, pull: Pull) -> list[float]:
        return numbers_of(_DEFINITION, optimizer._options(pull, pull.offsets[0] if pull.offsets else 0))

    def _changed_numbers(self, optimizer: Pulling) -> Sequence[float]:
        """The options of all pulls, if some differ from those of the plan."""
        self.lrs = [pull.group.get("lr") for pull in self.pulls]
        numbers = [self._numbers_of(optimizer, pull) for pull in self.pulls]
        if numbers == self.numbers:
            return ()
        self.numbers = numbers
        return list(chain.from_iterable(numbers))

    def _offsets_stay(self) -> bool:
        return all(ahead(ours, theirs) == offsets for ours, theirs, offsets in self.counted)

    def _has_its_states(self, state: dict[Any, Any]) -> bool:
        return (
            len(state) == len(self.keys)
            and all(map(operator.is_, state, self.keys))
            and all(map(operator.is_, state.values(), self.states))
            and list(map(len, self.dicts)) == self.lengths
            and all(map(operator.is_, self._values(), self.values))
            and all(map(operator.is_, map(_local, self.wrappers), self.locals))
        )

    def is_of(self, optimizer: Pulling) -> bool:
        """Whether parameters and states are those of the plan."""
        groups = optimizer.base.param_groups
        params = [param for group in groups for param in group["params"]]
        return (
            len(groups) == len(self.groups)
            and len(params) == len(self.all_params)
            and all(map(operator.is_, params, self.all_params))
            and self._has_its_states(optimizer.base.state)
        )

    def _options_now(self, optimizer: Pulling) -> Sequence[float] | None:
        """The options to pass, if some changed; None if the plan does not fit."""
        groups = optimizer.base.param_groups
        if len(groups) != len(self.groups):
            return None
        changed = False
        for group, (kept, params, values, steady) in zip(groups, self.groups, strict=True):
            now = group["params"]
            if group is not kept or len(now) != len(params) or not all(map(operator.is_, now, params)):
                return None
            changed |= not (steady and len(group) == len(values) and all(map(operator.is_, group.values(), values)))
        if not changed:
            return ()
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
        self.groups = [(group, params, *_looked_at(group)) for group, params, *_ in self.groups]
        return self._changed_numbers(optimizer)

    def fits(self, optimizer: Pulling) -> bool:
        """Whether the plan fits; if so, the weights are copied, and nothing else is written. A plan that does not fit
        must be dropped."""
        try:
            options = self._options_now(optimizer)
            if options is None:
                return False
            grads = map(_grad, self.all_params)
            if (
                list(map(operator.is_, grads, repeat(None))) != self.unused
                or list(map(_requires_grad, self.all_params)) != self.trained
                or not self._has_its_states(optimizer.base.state)
                or versions(self.counts) != self.moves.seen
                or stream_of(self.device) != self.stream
                or not all(map(operator.eq, map(optimizer._left.get, self.beside), map(version_of, self.lie)))
            ):
                return False
            self.copy(options)
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError):
            return False  # the usual step says why
        return True

    def written(self) -> list[Any]:
        """The tensors that tell whether the base wrote anything: the weights, and the first of each state."""
        return [*self.all_params, *map(next, map(iter, map(dict.values, self.dicts)))]

    def taken(self, optimizer: Pulling) -> bool:
        """Pulls, after the base's step; False if that left other states than before."""
        if not self._has_its_states(optimizer.base.state):
            return False
        lrs = [pull.group.get("lr") for pull in self.pulls]
        if not all(map(_is_at_hand, lrs)):
            return False
        torch.autograd.graph.increment_version(self.params)
        if self.sharded:
            torch.autograd.graph.increment_version(self.owners)
        # A base may set lr in its step, also within the tensor that it is.
        same = all(map(operator.is_, lrs, self.lrs)) and not any(isinstance(lr, Tensor) for lr in lrs)
        try:
            options = () if same else self._changed_numbers(optimizer)
        except (TypeError, ValueError):  # the usual way says why
            return False
        try:
            self.pull(options)
        except RuntimeError:  # so it does here; a ValueError says that some parts have stepped
            return False
        optimizer._left.update(zip(self.beside, map(version_of, self.lie), strict=True))
        optimizer._scratch.rows = self.rows
        self.moves.note(versions(self.counts), self._offsets_stay)
        return True
