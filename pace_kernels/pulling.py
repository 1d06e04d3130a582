"""What follows a base's step: the weights are pulled toward their average, and the average in its states moves."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from itertools import chain, repeat
from typing import Any, ClassVar

import torch
from torch import Tensor

from .backend import say_once
from .checks import Group, check_lr, plain_number
from .conversions import weight_in
from .formats import HASH, parts_of
from .last_pull import LastPull
from .launching import ASKEW
from .memory import aligned, are_twins, as_bytes, check_whole, is_askew, overlapping
from .operands import check_placed, check_step
from .ops import PACE_STATS
from .plan import CAPTURED, stream_of
from .planning import WITH_PLANS, Plans
from .pull_plan import PullPlan
from .pulls import (
    AT_REST,
    AVERAGE,
    FORMAT_VERSION,
    OURS,
    STEP,
    SWAPPED,
    Pull,
    Row,
    count_of,
    is_fake,
)
from .sharding import PLAIN, local
from .states import PLAIN as PLAIN_FORMATS
from .states import Formats, counts_no_further, exact_on, moved
from .taking import Taking

_SMALLEST_EPS = 2.0**-126  # below, 1 / D could be infinite


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


class Pulling(Taking):
    """The step of a Pullback. Not for direct use."""

    _MARK = SWAPPED
    _STEPS = STEP
    _STATE_ROWS: ClassVar[dict[str, int]] = {}

    def _wanted(self, group: Group) -> Formats:
        return self._own(group).formats

    def _state_tensors(self, group: Group) -> tuple[str, ...]:
        return (AVERAGE,) if self._own(group).keeps else ()

    def _weight_in(self, weight: Tensor, state: Mapping[str, Any]) -> Tensor:
        return weight_in(weight, {})  # a remainder would be the base's

    def _parts_in(self, state: Group) -> Group:
        return {name: state[name] for name in OURS if name in state}

    def _forget_others(self) -> None:
        self._scratch.forget(self._params())

    def _plans_held(self) -> Plans:
        return self._scratch.step_plans

    def _option(self, group: Group, name: str) -> Any:
        return self._own(group).values[name]

    def _keeps_average(self, group: Group) -> bool:
        return self._own(group).keeps

    def _mark_groups(self) -> None:
        for group in self.base.param_groups:
            if SWAPPED not in group:
                group.update({SWAPPED: False, FORMAT_VERSION: 0})

    # ---- before the base's step ------------------------------------------------------------------------------------

    def _collect(self, found_inf: Tensor | None) -> tuple[list[Pull], list[Tensor]]:
        """The pulls, and the parameters that stop averaging; all are checked, and nothing has changed."""
        pulls: list[Pull] = []
        rest: list[Tensor] = []
        for group in self.base.param_groups:
            own = self._own(group)
            if own.by_moment:
                check_lr(group["lr"])
            if not own.keeps:
                continue
            if own.formats is not PLAIN_FORMATS:
                self._check_unedited("step()", [p for p in group["params"] if p.grad is not None])
            plan, again = self._scratch.plans.get(id(group)), None
            if plan is not None:
                moment = self._moment(group, own, plan.template.dtype)
                again = plan.again(group, own, moment, self.base.state)
            some = [again] if again is not None else self._bucketed(group, own)
            for pull in some:
                pull.found_inf = None if found_inf is None else moved(found_inf, pull.device)
                self._place_steps(pull)
            lr = group.get("lr")
            if isinstance(lr, Tensor) and lr.is_meta and any(pull.device.type != "meta" for pull in some):
                raise RuntimeError("lr is a tensor on meta, which has no value, but the parameters are not on meta")
            pulls += some
            rest += [p for p in group["params"] if not p.requires_grad]
        if not all(pull.planned for pull in pulls):
            self._take_turns(pulls)
            self._check_twins(pulls)
        for pull in pulls:
            if not pull.planned:
                self._check_memory(pull)
        return pulls, rest

    def _place_steps(self, pull: Pull) -> None:
        """Moves step counts to the parameters' device if only it knows whether a step counts: with ``found_inf``; and
        with ``capturable``, since a captured graph advances them there."""
        pull.on_device = bool(pull.group.get("capturable", False))
        if pull.device.type == "cpu":
            return
        away = [i for i, step in enumerate(pull.steps) if step.device.type == "cpu"]
        pull.on_device = pull.on_device or pull.found_inf is not None or len(away) < len(pull.steps)
        if not pull.on_device and stream_of(pull.device) == CAPTURED:
            raise RuntimeError(
                "a CUDA graph captures the step: replays count steps only with capturable=True in the group"
            )
        if pull.on_device:
            for i in away:
                pull.steps[i] = moved(pull.steps[i], pull.device)
            if exact_on(pull.device, pull.own.operator["ema_update_freq"]):
                pull.steps[:] = [step.double() for step in pull.steps]

    @staticmethod
    def _take_turns(pulls: list[Pull]) -> None:
        """Parameters over one memory are pulled one after the other."""
        owners = [owner for pull in pulls for owner in pull.params]
        with torch._C.DisableTorchFunctionSubclass():
            starts = {(p.untyped_storage()._cdata if type(p) in PLAIN else id(p)) for p in owners}
        if len(starts) == len(owners):  # no two of them over one storage
            return
        turns = {id(p): turn for group in overlapping(owners) for turn, p in enumerate(group)}
        for pull in pulls:
            pull.rounds = [turns.get(id(p), 0) for p in pull.params]

    @staticmethod
    def _check_twins(pulls: list[Pull]) -> None:
        if not any(any(pull.rounds) for pull in pulls):
            return
        if are_twins((p, pull.formats.on_grid) for pull in pulls for p in pull.params):
            raise RuntimeError(
                "two parameters share one memory, but each would have its own average: with ema_bits of "
                "8 or 16, tie them as one parameter"
            )

    def _check_memory(self, pull: Pull) -> None:
        """Raises before the base has stepped if an operator would raise, or worse, later. Nothing is written."""
        if pull.backend.name != "cpu":
            self._lengthen(pull)
        refused: RuntimeError | None = None
        if pull.backend.name == "cpu" and not is_fake(pull.params[0]):
            stand_in = list(map(_real, pull.params)) if pull.moment is not None else []
            try:  # the operator checks all and then finds that the step is to be left undone
                undone = torch.ones((), device="cpu")
                befores = pull.befores or (pull.params if pull.formats.on_grid else [])
                self._call(pull, stand_in, None, undone, max(0, pull.offsets[0]), befores)
                return
            except RuntimeError as error:
                if self._lengthen(pull):
                    self._check_memory(pull)
                    return
                refused = error
        check_whole(chain(pull.params, map(local, chain(pull.emas, pull.scales))))
        if pull.backend.name != "cpu" and not is_fake(pull.params[0]):
            for i, (param, ema, step) in enumerate(zip(pull.params, map(local, pull.emas), pull.steps, strict=True)):
                check_placed(f"emas[{i}]", ema, param)
                check_step(f"steps[{i}]", step, pull.device)
        if any(map(is_askew, chain(pull.params, map(local, chain(pull.emas, pull.scales))))):
            say_once(ASKEW)
            pull.askew, pull.emas = True, list(map(aligned, pull.emas))
            pull.scales = list(map(aligned, pull.scales))
        elif refused is not None:
            raise RuntimeError(self._named(pull, str(refused))) from refused

    @staticmethod
    def _lengthen(pull: Pull) -> bool:
        """Makes step counts that have reached float32's limit float64; returns whether there were any."""
        full = [i for i, step in enumerate(pull.steps) if counts_no_further(step)]
        for i in full:
            pull.steps[i] = pull.steps[i].double()
        return bool(full)

    def _named(self, pull: Pull, message: str) -> str:
        """An operator's message, with the name of its parameter."""
        entry = message.partition("[")[2].partition("]")[0]
        known = entry.isdigit() and int(entry) < len(pull.places)
        return f"{self._name(pull.group, pull.places[int(entry)])}: {message}" if known else message

    def _copy_weights(self, pull: Pull) -> None:
        if not pull.reads_before:
            return
        for owner, param in zip(pull.owners, pull.params, strict=True) if not pull.befores else ():
            if param.device.type != "cpu":
                pull.befores.append(torch.empty_like(param, requires_grad=False))
            else:
                pull.befores.append(self._scratch.before(owner, param))
        if pull.alone or pull.askew:
            for before, param in zip(pull.befores, pull.params, strict=True):
                before.copy_(aligned(param))
        else:
            torch._foreach_copy_(pull.befores, pull.params)

    # ---- after the base's step -------------------------------------------------------------------------------------

    def _missing(self, pulls: list[Pull]) -> RuntimeError | None:
        """The errors that only a first step of the base reveals: it keeps no such second moment, or a state with our
        name."""
        states = self.base.state
        for pull in pulls:
            for i in pull.new:
                state = states.get(pull.owners[i], {})
                if AVERAGE in state and STEP not in state:
                    kind = type(self.base).__name__
                    return RuntimeError(f"{kind} has a state {AVERAGE!r}: the average needs that name")
            if pull.moment is None:
                continue
            entries, name, seconds = [states.get(p) or {} for p in pull.owners], pull.moment.name, pull.seconds
            found = list(map(dict.get, entries, repeat(name)))
            if all(map(operator.is_, found, seconds)) and all(map(operator.is_not, found, repeat(None))):
                continue
            try:
                for k, state in enumerate(entries):
                    seconds[k] = self._second(pull.moment, state, pull.group, pull.places[k], pull.params[k])
            except RuntimeError as error:
                return error
        return None

    def _enter(self, pull: Pull) -> None:
        """Puts average and step count into the base's states, which its step may have replaced."""
        states = self.base.state
        entries: list[Any] = list(map(states.get, pull.owners))
        names, columns = (*pull.names, STEP), (*pull.columns(), pull.steps)
        if all(entries) and not pull.new:
            found = (map(dict.get, entries, repeat(name)) for name in names)
            if all(all(map(operator.is_, there, ours)) for there, ours in zip(found, columns, strict=True)):
                return
        others = [name for name in (*parts_of(AVERAGE), HASH, AT_REST) if name not in names]
        for owner, *values in zip(pull.owners, *columns, strict=True):
            state = states.get(owner)
            if state is None:
                state = states[owner] = {}
            state.update(zip(names, values, strict=True))
            for name in others:
                state.pop(name, None)

    def _plan(self, pulls: list[Pull], parts: list[Pull], rest: list[Tensor]) -> None:
        """What the next step may reuse."""
        scratch, step_plans = self._scratch, self._scratch.step_plans
        self._forget_others()
        step_plans.vain += 1
        seldom = step_plans.vain > 8 and step_plans.vain % 64 != 0  # something changes at each step
        step_plans.next = None if seldom else PullPlan.of(self, parts, rest, scratch.rows)
        if step_plans.next is not None:
            WITH_PLANS[id(self)] = self
            scratch.plans.clear()
            return
        plans = self._scratch.plans
        last, plans_before = None, dict(plans)
        plans.clear()
        for pull in pulls:
            key = id(pull.group)
            if pull.planned and not any(pull.rounds):
                plans[key] = plans_before[key]
                plans[key].note()
            elif pull.group is last:  # in several calls
                plans.pop(key, None)
            elif (plan := LastPull.of(pull, self.base.state)) is not None:
                plans[key] = plan
            last = pull.group

    def _pull_back(self, pull: Pull) -> None:
        stats = None
        if pull.own.values["log_stats"]:
            dtype = torch.float32 if pull.device.type == "mps" else torch.float64  # MPS has no float64
            stats = torch.empty(len(PACE_STATS), dtype=dtype, device=pull.device)
        originals = pull.params
        if pull.askew:
            pull.params = list(map(aligned, originals))
        self._call(pull, pull.seconds, stats, pull.found_inf, pull.offsets[0])
        for original, copy in zip(originals, pull.params, strict=True) if pull.askew else ():
            if copy is not original:
                as_bytes(original).copy_(as_bytes(copy))
        if stats is not None:
            self._scratch.rows.append(Row(stats, pull.axes, pull.moment is not None, pull.measures_before))
        torch.autograd.graph.increment_version(originals)
        if pull.axes:
            torch.autograd.graph.increment_version(pull.owners)

    def _call(
        self,
        pull: Pull,
        seconds: list[Tensor],
        stats: Tensor | None,
        found_inf: Tensor | None,
        offset: int,
        befores: list[Tensor] | None = None,
    ) -> None:
        options = self._options(pull, offset)
        emas, params = list(map(local, pull.emas)), pull.params
        befores = pull.befores if befores is None else befores
        if pull.scales:
            options["ema_scales"] = list(map(local, pull.scales))
        if pull.dtype.is_complex:
            params, befores, emas = (list(map(_real, some)) for some in (params, befores, emas))
        if found_inf is not None:
            options["found_inf"] = found_inf
        pull.backend.op("pullback_")(params, befores, seconds, emas, pull.steps, stats, **options)

    def _options(self, pull: Pull, offset: int) -> Group:
        """The operator's options, and the learning rate where it is a tensor on a device."""
        moment, lr = pull.moment, 0.0
        from_step: Group = {"pullback_from_step": not pull.measures_before} if pull.formats.on_grid else {}
        options = pull.own.operator | {"beta2": 0.0, "eps": 1.0, "step_offset": 0, "capturable": pull.on_device}
        if moment is not None:
            options |= {"beta2": moment.beta2, "eps": max(moment.eps, _SMALLEST_EPS), "step_offset": offset}
            lr = pull.group["lr"]
            if offset < 0:  # the base started anew after the average: β2^(t + offset) as a power t of another β2
                t = count_of(pull.steps[0]) + 1
                options |= {"beta2": moment.beta2 ** ((t + offset) / t), "step_offset": 0}
            if isinstance(lr, Tensor) and lr.device.type == "cpu":
                lr = lr.item()
            elif isinstance(lr, Tensor):
                options["lr_tensor"], lr = moved(lr, pull.device), 0.0
        return {**options, **from_step, "lr": plain_number(lr)}
