"""Plans: what a step was made of, kept for the next one, which then only looks whether all is as it was.

A usual step collects, checks and lists its tensors in Python, which takes longer than AdamW's whole step where tensors
are small. A plan has these lists in C++ already. The next step compares by identity, at the speed of C, that
parameters, states and options are those of the plan, and makes one call, ``plan_step_``: it looks at the memory of all
tensors, and at the gradients, before it writes any. Where something is not as it was, the usual step is taken, which
knows what to make of it and how to call it.

A plan holds tensors; options are its arguments: those that schedulers change at each step are handed over anew.
"""

from __future__ import annotations

import contextlib
import gc
import operator
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain, repeat
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from .checks import Group
from .definitions import DEFINITIONS
from .definitions.kit import Definition
from .launching import Launching, Prepared, of_c
from .sharding import PLAIN, is_sharded, local
from .states import Work
from .torch_rules.common import at_hand
from .whole import at_once, each

_grad = operator.attrgetter("grad")
_requires_grad = operator.attrgetter("requires_grad")
_local = operator.attrgetter("_local_tensor")
_placed = operator.attrgetter("_spec.placements", "_spec.mesh")
_increment_version = torch.autograd.graph.increment_version
_is_profiling = torch._C._autograd._profiler_enabled
_MOST_PLANS = 4  # of an optimizer: one for each set of parameters that have gradients
_NOT_A_NUMBER = float("nan")
NO_ROLES: Mapping[str, str] = {}


def _numbers(definition: Definition, given: Group) -> list[float]:
    """Options as plans take them: None is NaN."""
    names = [option.name for option in definition.options] + ["capturable"]
    return [_NOT_A_NUMBER if (value := given[name]) is None else float(value) for name in names]


class _Part:
    """A call of a step's operator: its options as numbers, and where its states are."""

    def __init__(
        self, definition: Definition, work: Work, names: tuple[str, ...], now: tuple[str, ...], call: partial[None]
    ) -> None:
        """``now``: the names that the states have at present, where they have changed places when this plan's turn
        comes."""
        self.group = work.group
        self.numbers = _numbers(definition, call.keywords)
        self.place = {option.name: k for k, option in enumerate(definition.options)}
        self.dicts = list(work.records)
        source = dict(zip(names, now, strict=True))
        self.values = [record[source.get(name, name)] for record in self.dicts for name in record]


class _Options:
    """A group's dict as the plan last saw it."""

    def __init__(self, group: Group) -> None:
        self.group, self.params = group, list(group["params"])
        self.names, self.values = list(group), list(group.values())
        # What may change and stay the same object: lists by their copies, and a learning rate that is a tensor.
        self.lists = {k: list(v) for k, v in group.items() if type(v) is list and k != "params"}
        self.lr = isinstance(group["lr"], Tensor)
        self.size, self.steady = len(group), not self.lists and not self.lr

    def changed(self) -> Sequence[str] | None:
        """The names of options that were replaced, or edited; None where the group has others than it had."""
        group = self.group
        if list(group) != self.names:
            return None
        same = map(operator.is_, group.values(), self.values)
        found = [name for name, kept in zip(self.names, same, strict=True) if not kept]
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
                self.lr = isinstance(value, Tensor)
        self.steady = not self.lists and not self.lr


# A group's dict, the names of its options that changed, and the operator's names and values of them.
Change: TypeAlias = tuple[_Options, Sequence[str], dict[str, float]]


class Plan:
    """One step's calls. ``after``: the plan of the step that follows, where that is another one; it takes this one's
    place then, and has this one after it. So they hold each other in no circle."""

    def __init__(self, optimizer: Planning, works: list[Work], mask: list[bool], rows: list[tuple[Any, ...]]) -> None:
        from . import _C  # a plan is made once kernels have run

        definition = DEFINITIONS[optimizer.OPERATOR]
        self.options = [_Options(group) for group in optimizer.param_groups]
        self.all_params = params = [param for options in self.options for param in options.params]
        self.requires_grad = list(map(_requires_grad, params))
        self.owners = [owner for work in works for owner in work.owners]
        self.params = [param for work in works for param in work.params]
        self.sharded = any(map(is_sharded, self.owners))
        self.placed = list(map(_placed, self.owners)) if self.sharded else []
        self.mask, self.key = mask, tuple(mask)
        self.parts = [_Part(definition, work, *row) for work, row in zip(works, rows, strict=True)]
        self.keys, self.states = list(optimizer.state), list(optimizer.state.values())
        self.dicts = list(chain.from_iterable(part.dicts for part in self.parts))
        self.values = list(chain.from_iterable(part.values for part in self.parts))
        # Works take the parameters of a group by device and dtype: where that is another order, gradients follow it.
        place = {id(param): i for i, param in enumerate(params)}
        self.order = [place[id(owner)] for owner in self.owners]
        self.takes_all = self.order == list(range(len(params))) and not self.sharded
        self.held = _C.Plan()
        self.step = partial(of_c(torch.ops.pace_kernels.plan_step_.default), self.held.handle, self.params[0])
        self.after: Plan | None = None
        self.turned: tuple[list[dict[str, Any]], list[dict[str, Any]]] | None = None  # states, and what they get
        self.left: list[Any] = []  # what get_step_stats() reads
        add = torch.ops.pace_kernels.plan_add_.default
        count = len(definition.lists) + 1
        fresh = definition.lists_of("gradient")
        for part, (*_, call) in zip(self.parts, rows, strict=True):
            lists = list(call.args[:count])
            tensors = chain.from_iterable(
                tensors for entry, tensors in zip([*definition.lists, None], lists, strict=True)
                if entry is None or entry.list not in fresh
            )  # fmt: skip
            extras = [*call.args[count:], call.keywords.get("lr_tensor")]
            add(self.held.handle, definition.op, list(tensors), list(map(len, lists)), extras, part.numbers)

    def has_its_states(self, state: Mapping[Tensor, Any]) -> bool:
        """Whether the optimizer's states are those of the plan: told without a hash, which of a tensor takes 90 ns."""
        return (
            len(state) == len(self.keys)
            and all(map(operator.is_, state, self.keys))
            and all(map(operator.is_, state.values(), self.states))
            and sum(map(len, self.dicts)) == len(self.values)
            and all(map(operator.is_, chain.from_iterable(map(dict.values, self.dicts)), self.values))
        )

    def with_options(self, changes: list[Change]) -> list[float]:
        """The options of all parts, changed. A plan that did not take them is of no use any more."""
        for part in self.parts:
            for kept, _, numbers in changes:
                if part.group is kept.group:
                    for name, number in numbers.items():
                        part.numbers[part.place[name]] = number
        return list(chain.from_iterable(part.numbers for part in self.parts))

    def learn(self, learned: list[Tensor], parts: list[int], options: Group) -> None:
        """Adds what ``mada_learn_`` does after the step."""
        lists = (options[name] for name in ("hyper_lr", "hyper_momentum", "lower", "upper"))
        numbers = [float(options["learn"]), options["clip"], float(options["warmup"]), *chain.from_iterable(lists)]
        torch.ops.pace_kernels.plan_learn_.default(self.held.handle, learned, parts, numbers)

    def fresh(self, grads: list[Any]) -> list[Tensor] | None:
        """The gradients as the call takes them; None where one is not placed as its parameter."""
        given = [grads[i] for i in self.order]
        if self.sharded:
            if list(map(_placed, given)) != self.placed:
                return None
            if not all(map(operator.is_, map(_local, self.owners), self.params)):
                return None
            given = list(map(_local, given))
        return given

    def is_of(self, optimizer: Planning) -> bool:
        """Whether parameters and states are those of the plan."""
        groups = [(group, group["params"]) for group in optimizer.param_groups]
        return (
            len(groups) == len(self.options)
            and all(group is kept.group for (group, _), kept in zip(groups, self.options, strict=True))
            and all(len(now) == len(kept.params) for (_, now), kept in zip(groups, self.options, strict=True))
            and all(map(operator.is_, chain.from_iterable(now for _, now in groups), self.all_params))
            and self.has_its_states(optimizer.state)
        )


class Plans:
    """The plans of an optimizer. One object, because wrappers that pass for an optimizer copy its attributes; copies of
    the optimizer begin with none."""

    def __init__(self) -> None:
        self.next: Any = None  # that of the next step, as far as that can be told
        self.by_mask: dict[tuple[bool, ...], Plan] = {}  # by the parameters without a gradient
        self.vain = 0  # how many were made since one was of use

    def end(self) -> None:
        self.next, self.by_mask = None, {}

    def __reduce__(self) -> Any:
        return Plans, ()

    def __deepcopy__(self, memo: Any) -> Plans:
        return Plans()


# A plan holds parameters and states. Where an optimizer let go of some, and takes no step that would find out, the next
# full garbage collection frees them.
WITH_PLANS: weakref.WeakSet[Any] = weakref.WeakSet()


def _end_stale(phase: str, info: dict[str, int]) -> None:
    if phase != "stop" or info["generation"] != 2:
        return
    for optimizer in list(WITH_PLANS):
        plans = optimizer.plans()
        with contextlib.suppress(AttributeError, KeyError):  # of groups or states that are being replaced
            if plans.next is not None and all(plan.is_of(optimizer) for plan in [plans.next, *plans.by_mask.values()]):
                continue
        plans.end()


gc.callbacks.append(_end_stale)


def is_observed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether hooks, a profiler or torch.compile are to see the step."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
        or _is_profiling()
        or torch.compiler.is_compiling()
    )


class Planning(Launching):
    """An optimizer whose next step may take up what the last one was made of. Not for direct use."""

    OPERATOR: ClassVar[str] = ""  # of the step; one without a definition makes no plans
    # Options that change neither which states there are nor which kernels run, as the operator calls them.
    SCHEDULED: ClassVar[dict[str, tuple[str, ...]]] = {
        "lr": ("lr",), "weight_decay": ("weight_decay",), "betas": ("beta1", "beta2"),
    }  # fmt: skip

    _plans: Plans

    def plans(self) -> Plans:
        return self._plans

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.setdefault("_plans", Plans()).end()  # before states are loaded: it holds those that they replace
        super().__setstate__(state)

    def _option_numbers(self, group: Group) -> Group:
        """The operator's options of a group, as they were prepared; those of SCHEDULED are replaced in it."""
        raise NotImplementedError

    # ---- the next step ----------------------------------------------------------------------------------------------

    def _again(self, scaling: dict[str, Tensor]) -> bool:
        """Takes the step by a plan; False where there is none that fits, and nothing has changed."""
        plans = self._plans
        plan = plans.next
        if plan is None or self._unfinished or torch._C._len_torch_dispatch_stack():
            return False
        if len(plans.by_mask) > 1:
            params = [param for group in self.param_groups for param in group["params"]]
            plan = plans.by_mask.get(tuple(param.grad is None for param in params), plan)
        changes = self._changes_since(plan)
        if changes is None:
            return False
        grads = list(map(_grad, plan.all_params))
        try:
            if (
                list(map(operator.is_, grads, repeat(None))) != plan.mask
                or list(map(_requires_grad, plan.all_params)) != plan.requires_grad
                or not plan.has_its_states(self.state)
            ):
                return False
            fresh = grads if plan.takes_all else plan.fresh(grads)
        except (AttributeError, KeyError):  # a state is gone, or a gradient is no DTensor
            return False
        found_inf = scaling.get("found_inf")
        if fresh is None or not (found_inf is None or at_hand(found_inf)):
            return False
        turned = None if found_inf is not None and bool(found_inf) else plan.turned
        # Before: a handler in between must not find new weights of an old version.
        _increment_version(plan.params)
        if plan.sharded:
            _increment_version(plan.owners)
        try:
            options = plan.with_options(changes) if changes else ()
            if turned:
                at_once([partial(plan.step, fresh, options, **scaling), each(dict.update, *turned)])
            else:
                plan.step(fresh, options, **scaling)
        except (RuntimeError, TypeError, NotImplementedError):
            plans.end()  # the usual step says why, or does it otherwise
            return False
        for kept, names, numbers in changes:  # once the plan has them: what it refuses is nowhere
            self._option_numbers(kept.group).update((k, number) for k, number in numbers.items() if k != "lr")
            kept.keep(names)
        self._taken_by(plan)
        if turned and plan.after is not None:
            following, plan.after = plan.after, None
            following.after = plan
            plans.by_mask[plan.key] = plan = following
        plans.next, plans.vain = plan, 0
        return True

    def _taken_by(self, plan: Plan) -> None:
        """What a step by this plan leaves to be read."""

    def _changes_since(self, plan: Plan) -> list[Change] | None:
        """What changed of options since the plan's last step; None where the plan does not fit."""
        groups = self.param_groups
        if len(groups) != len(plan.options):
            return None
        changes: list[Change] = []
        for group, kept in zip(groups, plan.options, strict=True):
            params = group["params"]
            if group is not kept.group or len(params) != len(kept.params):
                return None
            if not all(map(operator.is_, params, kept.params)):
                return None
            if kept.steady and len(group) == kept.size and all(map(operator.is_, group.values(), kept.values)):
                continue
            names = kept.changed()
            numbers = None if names is None else self._scheduled(group, names)
            if names is None or numbers is None:
                return None
            if names:
                changes.append((kept, names, numbers))
        return changes

    def _scheduled(self, group: Group, names: Sequence[str]) -> dict[str, float] | None:
        """The operator's names and values of options that were replaced; None where they need a closer look."""
        numbers: dict[str, float] = {}
        for name in names:
            targets = self.SCHEDULED.get(name)
            if targets is None:
                if name in self.defaults:
                    return None
                continue  # of a scheduler or of the user
            value = group[name]
            if name == "lr" and isinstance(value, Tensor) and at_hand(value) and value.numel() == 1:
                value = value.item()
            values = value if len(targets) > 1 and type(value) in (tuple, list) else (value,)
            if len(values) != len(targets) or not all(isinstance(number, float) for number in values):
                return None
            numbers.update(zip(targets, values, strict=True))
        if "beta1" in numbers and (numbers["beta1"] == 0.0) is not (self._option_numbers(group)["beta1"] == 0.0):
            return None  # without a first moment, or with one
        return numbers

    # ---- the plan of a step that was taken --------------------------------------------------------------------------

    def _plan_next(self, prepared: Prepared) -> None:
        """Makes a plan of a usual step, for the next one."""
        works = [work for work, _ in prepared]
        plans = self._plans
        plans.vain += 1
        seldom = plans.vain > 2 * _MOST_PLANS and plans.vain % 64 != 0  # something changes at each step
        if seldom or not self._can_plan(works):
            plans.end()
            return
        mask = [param.grad is None for group in self.param_groups for param in group["params"]]
        others = {key: plan for key, plan in plans.by_mask.items() if key != tuple(mask) and plan.is_of(self)}
        plans.by_mask = others if len(others) < _MOST_PLANS else {}
        try:
            plans.next = plans.by_mask[tuple(mask)] = self._planned(works, mask)
            WITH_PLANS.add(self)
        except (KeyError, RuntimeError):  # the next usual step tells, if there is something to tell
            plans.end()

    def _planned(self, works: list[Work], mask: list[bool], roles: Mapping[str, str] = NO_ROLES) -> Plan:
        """A plan of these works. ``roles``: by the name of a state, the present name of what it will be then."""
        rows = []
        for work in works:
            work.records = [self.state[owner] for owner in work.owners]
            names = ("step", *self._state_tensors(work.group))
            now = tuple(roles.get(name, name) for name in names)
            columns = [[record[name] for record in work.records] for name in now]
            if is_sharded(work.owners[0]):
                columns = [list(map(local, column)) for column in columns]
            states = dict(zip(names, columns, strict=True))
            rows.append((names, now, self._launch(work, states)))
        return Plan(self, works, mask, rows)

    def _can_plan(self, works: list[Work]) -> bool:
        if not self.OPERATOR or not works or self._askew or self._dry:
            return False
        if any(group["skip_nonfinite"] or group["swapped"] for group in self.param_groups):
            return False
        for work in works:
            lr = work.group["lr"]
            if not work.backend.keeps_plans or work.copies or work.left_undone():
                return False
            if isinstance(lr, Tensor) and not at_hand(lr):
                return False
            kinds = set(map(type, work.owners))
            if not (kinds <= PLAIN or all(map(is_sharded, work.owners))):
                return False
            if any(param.is_inference() for param in work.params):
                return False
        return True
