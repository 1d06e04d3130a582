"""Plans: a step keeps its tensors and options for the next one, which then only checks that they are unchanged.

A usual step collects, checks and lists its tensors in Python, which takes longer than AdamW's whole step if tensors are
small. A plan has these lists in C++ already. The next step checks by identity, at the speed of C, that parameters,
states and options are those of the plan, and makes one call, ``plan_step_``: it checks the memory of all tensors, and
the gradients, before it writes any. If something has changed, the usual step is taken, which handles or refuses it.

A plan holds tensors; options are its arguments: options that schedulers change at each step are passed anew.
"""

from __future__ import annotations

import contextlib
import gc
import operator
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from .checks import Group
from .editing import version_of
from .formats import names_of
from .launching import Launching, Prepared
from .options import Record
from .plan import CAPTURED, Plan, check_dicts, stream_of
from .sharding import PLAIN, is_sharded, local
from .states import Work, moved
from .torch_rules.common import at_hand
from .whole import at_once

increment_version = torch._C._increment_version  # without the line of Python around it
_is_profiling = torch._C._autograd._profiler_enabled
NO_ROLES: Mapping[str, str] = {}


class Plans:
    """The plans of an optimizer. One object, because wrappers that pass for an optimizer copy its attributes; copies of
    the optimizer begin with none."""

    def __init__(self) -> None:
        self.next: Any = None  # that of the next step, as far as that can be told
        self.by_mask: dict[tuple[bool, ...], Plan] = {}  # by the parameters without a gradient
        self.vain = 0  # how many were made since one was of use
        self.clip_coef: Any = None  # the optimizer's attribute, which is set through such wrappers too

    def end(self) -> None:
        self.next, self.by_mask = None, {}

    def __reduce__(self) -> Any:
        return Plans, ()

    def __deepcopy__(self, memo: Any) -> Plans:
        return Plans()


# A plan holds parameters and states. Where an optimizer let go of some, and takes no step that would find out, the next
# full garbage collection frees them.
WITH_PLANS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # by id: some have no hash


def _end_stale(phase: str, info: dict[str, int]) -> None:
    if phase != "stop" or info["generation"] != 2:
        return
    for optimizer in list(WITH_PLANS.values()):
        if "_is_held" in optimizer.__dict__:  # between steps its groups have an Offload's parameters
            continue
        plans = optimizer._plans_held()
        with contextlib.suppress(AttributeError, KeyError, RuntimeError):  # of groups or states that change now
            if plans.next is not None and all(plan.is_of(optimizer) for plan in [plans.next, *plans.by_mask.values()]):
                continue
        plans.end()
        with contextlib.suppress(AttributeError, KeyError):
            optimizer._forget_others()


def swaps_parameters() -> bool:
    """Whether torch converts modules by swapping the contents of their parameters, which a plan that holds these keeps
    it from doing. DTensors it always swaps, and of these a plan holds local parts."""
    return torch.__future__.get_swap_module_params_on_conversion()


gc.callbacks.append(_end_stale)


def is_observed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether hooks, a profiler or torch.compile are to see the step. That of an optimizer within an Offload they see
    once, as the Offload's: a hook that edits gradients would edit the copies of each bucket again."""
    return "_is_held" not in optimizer.__dict__ and bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
        or _is_profiling()
        or torch.compiler.is_compiling()
    )


class Planning(Launching):
    """An optimizer whose next step may reuse the last one's plan. Not for direct use."""

    _OPERATOR: ClassVar[str] = ""  # of the step; one without a definition makes no plans
    # Options that change neither which states there are nor which kernels run, as the operator calls them.
    _SCHEDULED: ClassVar[dict[str, tuple[str, ...]]] = {
        "lr": ("lr",), "weight_decay": ("weight_decay",), "betas": ("beta1", "beta2"),
    }  # fmt: skip

    # What groups keep beside their options and GROUP_STATE.
    _BOOKS: ClassVar[frozenset[str]] = frozenset()
    # What may change from step to step without further checks.
    _MOVING: ClassVar[frozenset[str]] = frozenset({"lr"})

    _MOST_PLANS = 4  # one for each set of parameters that have gradients
    _plans: Plans

    @property
    def clip_coef(self) -> Tensor | float | None:
        """The ``clip_coef`` of every following ``step()`` that gets none; None: no clipping. For trainers that call
        ``step()`` themselves, also through the wrappers of Lightning and Fabric."""
        return self._plans.clip_coef  # type: ignore[no-any-return]

    @clip_coef.setter
    def clip_coef(self, value: Tensor | float | None) -> None:
        self._plans.clip_coef = value

    @clip_coef.deleter
    def clip_coef(self) -> None:
        self._plans.clip_coef = None

    def _forget_others(self) -> None:
        """Frees what is kept for parameters that are in no group any more."""

    def _plans_held(self) -> Plans:
        return self._plans

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.setdefault("_plans", Plans()).end()  # before states are loaded: it holds those that they replace
        super().__setstate__(state)

    def _option_numbers(self, group: Group) -> Group:
        """The operator's options of a group, as a usual step prepared them."""
        raise NotImplementedError

    def _record(self, group: Group) -> Record:
        """The last usual step's record of the group's options."""
        raise NotImplementedError

    # ---- the next step ----------------------------------------------------------------------------------------------

    def _again(self, scaling: dict[str, Tensor]) -> bool:
        """Takes the step by a plan; False if none fits, and then nothing has changed."""
        plans = self._plans
        plan = plans.next
        if plan is None or self._unfinished or torch._C._len_torch_dispatch_stack():
            return False
        if len(plans.by_mask) > 1:
            params = [param for group in self.param_groups for param in group["params"]]
            plan = plans.by_mask.get(tuple(param.grad is None for param in params), plan)
        if plan.on_gpu and stream_of(plan.device) != plan.stream:
            return False
        if not self._takes_options(plan):
            return False
        if plan.beside and not all(map(operator.eq, map(self._left.get, plan.beside), map(version_of, plan.lie))):
            return False  # the usual step says that weights were edited
        grads = plan.gradients()
        try:
            if grads is None or not plan.has_its_states(self.state):
                return False
            fresh = grads if plan.takes_all else plan.fresh(grads)
        except (AttributeError, KeyError):  # a state is gone, or a gradient is no DTensor
            return False
        if fresh is None:
            return False
        then = plan.then
        if scaling:
            found_inf = scaling.get("found_inf")
            if found_inf is not None and not plan.can_skip(found_inf):
                return False
            if found_inf is not None and at_hand(found_inf) and bool(found_inf):
                then = None
            scaling = {name: moved(value, plan.device) for name, value in scaling.items()}
        if plan.lie:  # before: a handler in between must not find new weights of an old version
            ahead = [version_of(param) + 1 for param in plan.lie]
            self._left.update(zip(plan.beside, ahead, strict=True))
        increment_version(plan.params)
        if plan.sharded:
            increment_version(plan.owners)
        try:
            options = plan.numbers if plan.stale else ()
            if then is not None:
                at_once([partial(plan.step, fresh, options, **scaling), then])
            else:
                plan.step(fresh, options, **scaling)
        except (RuntimeError, TypeError, NotImplementedError):
            plans.end()  # the usual step says why, or does it otherwise
            return False
        except ValueError as error:  # some parts have stepped, and the usual step would step them again
            plans.end()
            self._unfinished.append("step")
            raise RuntimeError(str(error)) from error
        plan.stale = False
        self._taken_by(plan)
        if plan.lie and (now := list(map(version_of, plan.lie))) != ahead:  # views count their writes together
            self._left.update(zip(plan.beside, now, strict=True))
        if then is not None and plan.after is not None:
            following, plan.after = plan.after, None
            following.after = plan
            plans.by_mask[plan.mask] = plan = following
        plans.next, plans.vain = plan, 0
        return True

    def _taken_by(self, plan: Plan) -> None:
        """The statistics that a step by this plan leaves."""

    def _takes_options(self, plan: Plan) -> bool:
        """Whether the plan fits the options as they are; if so, its numbers are theirs. A scheduler's usual changes C
        takes by itself: Python takes 12 to 20 µs for them, as long as for all else of a small step."""
        found = plan.held.changed_groups(self.param_groups, plan.seen, plan.numbers)
        if found is not False:  # also where others do not fit: some may have been taken before
            plan.stale = True
        if found is None:
            return False
        for kept in map(plan.options.__getitem__, found or ()) if found is not True else ():
            names = kept.changed()
            numbers = None if names is None else self._scheduled(kept.group, names)
            if names is None or numbers is None:
                return False
            plan.put(kept.group, numbers)
            kept.keep(names)
        return True

    def _scheduled(self, group: Group, names: Sequence[str]) -> dict[str, float] | None:
        """The operator's names and values of options that were replaced; None if they need a closer look."""
        numbers: dict[str, float] = {}
        for name in names:
            targets = self._SCHEDULED.get(name)
            if targets is None:
                if name in self.defaults:
                    return None
                continue  # of a scheduler or of the user
            value = group[name]
            if name == "lr" and isinstance(value, Tensor) and at_hand(value) and value.numel() == 1:
                value = value.item()
            pair = len(targets) > 1
            values, top = (value if type(value) in (tuple, list) else (), 1.0) if pair else ((value,), float("inf"))
            if len(values) != len(targets) or not all(isinstance(a, float) and 0.0 <= a < top for a in values):
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
        seldom = plans.vain > 2 * self._MOST_PLANS and plans.vain % 64 != 0  # something changes at each step
        if seldom or not self._can_plan(works):
            plans.end()
            return
        mask = tuple(param.grad is None for group in self.param_groups for param in group["params"])
        others = {key: plan for key, plan in plans.by_mask.items() if key != mask and plan.is_of(self)}
        plans.by_mask = others if len(others) < self._MOST_PLANS else {}
        try:
            plans.next = plans.by_mask[mask] = self._planned(works, mask)
            WITH_PLANS[id(self)] = self
        except (KeyError, RuntimeError):  # the next usual step tells, if there is something to tell
            plans.end()

    def _planned(self, works: list[Work], mask: tuple[bool, ...], roles: Mapping[str, str] = NO_ROLES) -> Plan:
        """A plan of these works. ``roles``: by the name of a state, the present name of what it will be then."""
        rows = []
        counts: list[Tensor] = []
        for work in works:
            work.records = [self.state[owner] for owner in work.owners]
            check_dicts(self.state, *self.param_groups, *work.records)
            names = ("step", *names_of(work.formats, self._state_tensors(work.group)))
            now = tuple(roles.get(name, name) for name in names)
            columns = [[record[name] for record in work.records] for name in now]
            if is_sharded(work.owners[0]):
                columns = [list(map(local, column)) for column in columns]
            states = dict(zip(names, columns, strict=True))
            counts += chain.from_iterable(states[name] for name in ("step", *self._STATE_ROWS) if name in states)
            rows.append((names, now, self._launch(work, states)))
        # A plan reads those of all parts before the first part moves its own.
        if len(set(map(Tensor.data_ptr, counts))) < len(counts):
            raise RuntimeError("parameters share a step count")
        return Plan(self, works, mask, rows)

    def _can_plan(self, works: list[Work]) -> bool:
        if not self._OPERATOR or not works or self._askew or self._dry:
            return False
        if any(group["skip_nonfinite"] or group["swapped"] for group in self.param_groups):
            return False
        if len({(work.backend.name, work.device, work.on_device) for work in works}) > 1:
            return False
        if stream_of(works[0].device) == CAPTURED:
            return False
        for work in works:
            lr = work.group["lr"]
            if not work.backend.keeps_plans or work.copies or work.left_undone():
                return False
            if isinstance(lr, Tensor) and not (at_hand(lr) or lr.device == work.device):
                return False
            kinds = set(map(type, work.owners))
            sharded = all(map(is_sharded, work.owners))
            if not (sharded or kinds <= PLAIN) or (swaps_parameters() and not sharded):
                return False
            if any(param.is_inference() for param in work.params):
                return False
        return True
