"""A plan: the tensors and options of a step, in C++ already, and what tells whether they are unchanged
(planning.py)."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import Group
from .definitions import DEFINITIONS
from .definitions.kit import Definition
from .formats import has_average
from .launching import of_c
from .sharding import is_sharded
from .states import Work
from .torch_rules.common import at_hand
from .whole import Call

if TYPE_CHECKING:
    from .backend import Backend
    from .planning import Planning

_requires_grad = operator.attrgetter("requires_grad")
_local = operator.attrgetter("_local_tensor")
_placed = operator.attrgetter("_spec.placements", "_spec.mesh")
_NOT_A_NUMBER = float("nan")
NO_PLACES: Mapping[str, Any] = MappingProxyType({})
CAPTURED = -1


def numbers_of(definition: Definition, given: Group) -> list[float]:
    """Options as plans take them: None is NaN."""
    given = definition.defaults | given
    names = [option.name for option in definition.options] + ["capturable"]
    return [_NOT_A_NUMBER if (value := given[name]) is None else float(value) for name in names]


def check_dicts(*given: Any) -> None:
    """Raises RuntimeError if something is no dict, or gives other values than those that C finds in it."""
    if not all(getattr(type(one), "__getitem__", None) is dict.__getitem__ for one in given):
        raise RuntimeError("a state is no dict, and comparisons in C know no other")


def stream_of(device: torch.device) -> int:
    """The current stream of a GPU; −1 while a graph is captured, 0 on other devices.

    A plan owns memory for sums and statistics, which is freed with it in the order of the stream on which it was made.
    Kernels on another stream, or relaunched by a captured graph, could write to it later."""
    if device.type != "cuda":
        return 0
    return CAPTURED if torch.cuda.is_current_stream_capturing() else torch._C._cuda_getCurrentRawStream(device.index)


def seen(group: Group, params: list[Any], values: list[Any] | None, names: Any, places: Mapping[str, Any]) -> list[Any]:
    """A group as Plan.changed_groups takes it (csrc/same.h)."""
    return [group, params, values, list(names), list(map(places.get, names))]


class _Part:
    """A call of a step's operator: its options as numbers, and its states."""

    def __init__(
        self, definition: Definition, work: Work, names: tuple[str, ...], now: tuple[str, ...], call: partial[None]
    ) -> None:
        """``now``: the present names of the states, if they will have changed places when this plan's turn comes."""
        self.group = work.group
        self.numbers = numbers_of(definition, call.keywords)
        self.dicts = list(work.records)
        source = dict(zip(names, now, strict=True))
        self.values = [record[source.get(name, name)] for record in self.dicts for name in record]


def _may_change(lr: Any) -> bool:
    """Whether the same object may be another number at the next step. A tensor on a device is read there at each
    step."""
    return isinstance(lr, Tensor) and at_hand(lr)


class _Options:
    """A group's dict as the plan last saw it."""

    def __init__(self, group: Group, places: Mapping[str, Any] = NO_PLACES) -> None:
        """``places``: of options in the plan's list of numbers, as ``Plan.changed_groups`` takes them."""
        self.group, self.params, self.places = group, list(group["params"]), places
        self.names, self.values = list(dict.keys(group)), list(dict.values(group))  # as C finds them
        # What may change and stay the same object: lists by their copies, and a learning rate that is a tensor.
        self.lists = {k: list(v) for k, v in group.items() if type(v) is list and k != "params"}
        self.lr = _may_change(group["lr"])
        self.lr_away = isinstance(group["lr"], Tensor) and not self.lr  # on a device: an operand of the plan
        self.seen = seen(group, self.params, self.values, self.names, places)
        self._steady()

    def _steady(self) -> None:
        """Tells whether comparing objects is enough."""
        self.seen[2] = None if self.lists or self.lr else self.values

    def changed(self) -> Sequence[str] | None:
        """The names of options that were replaced or edited; None if the group has other names than before, or its lr
        on a device was replaced."""
        group = self.group
        if list(dict.keys(group)) != self.names:
            return None
        same = map(operator.is_, dict.values(group), self.values)
        found = [name for name, kept in zip(self.names, same, strict=True) if not kept]
        if self.lr_away and "lr" in found:
            return None
        if self.lists:
            found += [name for name, kept in self.lists.items() if group[name] != kept and name not in found]
        return [*found, "lr"] if self.lr and "lr" not in found else found

    def keep(self, names: Sequence[str]) -> None:
        for name in names:
            value = self.values[self.names.index(name)] = self.group[name]
            self.lists.pop(name, None)
            if type(value) is list:
                self.lists[name] = list(value)
            if name == "lr":
                self.lr = _may_change(value)
        self._steady()


class Kept:
    """What plans of every kind keep: the tensors of a step and its options as numbers, and what tells whether these
    are unchanged."""

    seen: list[list[Any]]  # groups as they were, as Plan.changed_groups takes them
    numbers: list[float]  # the options of all calls, one after the other, of groups as they are in `seen`
    stale = False  # whether the plan in C++ has other numbers

    def __init__(
        self,
        groups: Sequence[Group],
        state: Mapping[Any, Any],
        backend: Backend,
        owners: list[Any],
        params: list[Any],
        dicts: list[Any],
        values: list[Any],
    ) -> None:
        """``dicts``: the states of the owners, and ``values`` what is in these, one after the other."""
        self.all_params = [param for group in groups for param in group["params"]]
        self.unused = [param.grad is None for param in self.all_params]
        self.trained = list(map(_requires_grad, self.all_params))
        self.owners, self.params, self.dicts, self.values = owners, params, dicts, values
        self.sharded = any(map(is_sharded, owners))
        self.wrappers = list(filter(is_sharded, chain(owners, values))) if self.sharded else []
        self.locals = list(map(_local, self.wrappers))
        self.device = params[0].device
        self.on_gpu = self.device.type == "cuda"
        self.stream = stream_of(self.device)
        self.keys, self.states = list(state), list(state.values())
        self.held = backend.new_plan()
        self.gradients = partial(self.held.gradients, self.all_params, self.unused, self.trained)
        self.holds = partial(self.held.holds_states, self.keys, self.states, dicts, values)

    def has_its_states(self, state: Any) -> bool:
        """Whether the optimizer's states are those of the plan. This hashes no tensor, which would take 90 ns each."""
        return self.holds(state) and not (self.wrappers and self.are_replaced())

    def are_replaced(self) -> bool:
        """Whether a DTensor has another local part."""
        return any(map(operator.is_not, map(_local, self.wrappers), self.locals))

    def is_of(self, optimizer: Any) -> bool:
        """Whether parameters and states are those of the plan."""
        changed = self.held.changed_groups(optimizer.param_groups, self.seen)
        return changed is not None and self.has_its_states(optimizer.state)


class Plan(Kept):
    """One step's calls. ``after``: the plan of the following step, if that is another one; it then takes this one's
    place, with this one as its ``after``. So there is no reference cycle."""

    def __init__(
        self, optimizer: Planning, works: list[Work], mask: tuple[bool, ...], rows: list[tuple[Any, ...]]
    ) -> None:
        definition = DEFINITIONS[optimizer._OPERATOR]
        self.parts = [_Part(definition, work, *row) for work, row in zip(works, rows, strict=True)]
        self.backend = works[0].backend
        super().__init__(
            optimizer.param_groups,
            optimizer.state,
            self.backend,
            [owner for work in works for owner in work.owners],
            [param for work in works for param in work.params],
            list(chain.from_iterable(part.dicts for part in self.parts)),
            list(chain.from_iterable(part.values for part in self.parts)),
        )
        self.numbers = list(chain.from_iterable(part.numbers for part in self.parts))
        self.place = {option.name: k for k, option in enumerate(definition.options)}
        self.options = [_Options(group, self._places(optimizer, group)) for group in optimizer.param_groups]
        self.seen = [options.seen for options in self.options]
        # Parameters beside which averages lie, and their local parts.
        lying = [work for work in works if work.formats.on_grid and optimizer._keeps_average(work.group)]
        self.beside = [owner for work in lying for owner in work.owners]
        self.lie = [param for work in lying for param in work.params]
        self.placed = list(map(_placed, self.owners)) if self.sharded else []
        self.mask = mask
        # Of parameters that do not train: a step that finds an average there drops it.
        frozen = (optimizer.state.get(param) for param in self.all_params if not param.requires_grad)
        self.at_rest = [state for state in frozen if state is not None]
        # Works take the parameters of a group by device and dtype: where that is another order, gradients follow it.
        place = {id(param): i for i, param in enumerate(self.all_params)}
        self.order = [place[id(owner)] for owner in self.owners]
        self.takes_all = self.order == list(range(len(self.all_params))) and not self.sharded
        self.step = partial(of_c(self.backend.op("plan_step_")), self.held.handle)
        self.on_device = any(work.on_device for work in works)
        self.after: Plan | None = None
        self.then: Call | None = None  # what follows the step, in the same call of C
        self.left: list[Any] = []  # what get_step_stats() reads
        add = self.backend.op("plan_add_")
        count = len(definition.lists) + 1
        fresh = definition.lists_of("gradient")
        for part, (*_, call) in zip(self.parts, rows, strict=True):
            lists = list(call.args[:count])
            beside = [call.keywords.get(name) or [] for name in definition.beside]
            tensors = chain.from_iterable(
                tensors for entry, tensors in zip([*definition.lists, None], lists, strict=True)
                if entry is None or entry.list not in fresh
            )  # fmt: skip
            extras = [*call.args[count:], call.keywords.get("lr_tensor")]
            if any(beside):
                lists, tensors = [*lists, *beside], chain(tensors, *beside)
            add(self.held.handle, definition.op, list(tensors), list(map(len, lists)), extras, part.numbers)

    def _places(self, optimizer: Planning, group: Group) -> dict[str, Any]:
        """Where the options of a group are that schedulers change."""
        starts = range(0, len(self.numbers), len(self.numbers) // len(self.parts))
        its = [start for start, part in zip(starts, self.parts, strict=True) if part.group is group]
        places: dict[str, Any] = dict.fromkeys(group.keys() - optimizer.defaults.keys() - optimizer._BOOKS, ...)
        for name, targets in optimizer._SCHEDULED.items():
            rows = tuple(tuple(start + self.place[target] for start in its) for target in targets)
            places[name] = rows if len(rows) > 1 else rows[0]
        return places | dict.fromkeys(optimizer._MOVING - {"lr"}, ...)

    def has_its_states(self, state: Any) -> bool:
        return super().has_its_states(state) and not (self.at_rest and any(map(has_average, self.at_rest)))

    def put(self, group: Group, numbers: Mapping[str, float]) -> None:
        """Replaces options of the group, by the operator's names."""
        width = len(self.numbers) // len(self.parts)
        for k, part in enumerate(self.parts):
            for name, number in numbers.items() if part.group is group else ():
                self.numbers[k * width + self.place[name]] = number
        self.stale = True

    def can_skip(self, found_inf: Tensor) -> bool:
        """Whether a step by this plan can be skipped: by the host, or by the device if only its memory depends on
        that."""
        return at_hand(found_inf) or (self.on_device and self.then is None)

    def learn(self, learned: list[Tensor], parts: list[int], options: Group) -> None:
        """Adds what ``mada_learn_`` does after the step."""
        lists = (options[name] for name in ("hyper_lr", "hyper_momentum", "lower", "upper"))
        numbers = [float(options["learn"]), options["clip"], float(options["warmup"]), *chain.from_iterable(lists)]
        self.backend.op("plan_learn_")(self.held.handle, learned, parts, numbers)

    def fresh(self, grads: list[Any]) -> list[Tensor] | None:
        """The gradients as the call takes them; None if one is not placed as its parameter."""
        given = [grads[i] for i in self.order]
        if self.sharded:
            if list(map(_placed, given)) != self.placed:
                return None
            given = list(map(_local, given))
        return given
