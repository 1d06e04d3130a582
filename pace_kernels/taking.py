"""Collects a pull: a group's options, and averages, step counts and second moments from the base's states."""

from __future__ import annotations

import operator
import warnings
from typing import Any

import torch
from torch import Tensor

from .averaging import Averaging
from .backend import backends, choose
from .checks import Group, check_average_options, check_defined, check_lr, lr_is_zero, require
from .conversions import as_coded, converted, new_state, scales_shape
from .definitions.pullback import PULLBACK
from .formats import CODED, HASH, PARTS, check_format_options, dtype_of, formats_of, is_beside, names_of, parts_of
from .formats import OPTIONS as FORMAT_OPTIONS
from .memory import aligned, check_whole
from .options import check_spelling
from .pulls import AT_REST, AVERAGE, LIVE, OPTIONS, OURS, STEP, Own, Pull, Scratch, count_of, is_fake
from .saved import saved_dtypes
from .second_moments import SecondMoment, lacks, require_second_moment, second_moment_of
from .sharding import PLAIN as PLAIN_KINDS
from .sharding import Axes, agree, axes, is_sharded, is_wrapper, local, placed_alike
from .states import PLAIN, Formats, as_state, state_dtype

_NO_AXES: Axes = ()


class Taking(Averaging):
    """A Pullback that knows its base's groups and states. Not for direct use."""

    base: torch.optim.Optimizer
    _defaults: Group  # the pullback's options
    _backend_name: str | None
    _scratch: Scratch

    # ---- options ---------------------------------------------------------------------------------------------------

    def _own(self, group: Group) -> Own:
        """The pullback's options of a group, checked if they changed. A name that the base has as an option of its own
        means the base's."""
        theirs = self.base.defaults
        values = [d if name in theirs else group.get(name, d) for name, d in self._defaults.items()]
        seen = self._scratch.own.get(id(group))
        if seen is not None and all(map(operator.is_, values, seen[0])):
            return seen[1]
        own = self._checked(group, dict(zip(self._defaults, values, strict=True)))
        self._scratch.own[id(group)] = (values, own)
        return own

    def _taken_over(self, group: Group) -> None:
        """Checks a group that the base has had before."""
        number = next(k for k, other in enumerate(self.base.param_groups) if other is group)
        named = {name: value for name, value in group.items() if name not in self.base.defaults}
        if others := [name for name in FORMAT_OPTIONS if name in named and name != "ema_bits"]:
            raise ValueError(
                f"param_groups[{number}] has {', '.join(others)}, and neither Pullback nor {type(self.base).__name__} "
                "has such an option: states and weights are the base's, and Pullback's is ema_bits"
            )
        check_spelling(named, OPTIONS, f"param_groups[{number}]", f"Pullback({type(self.base).__name__})")
        self._own(group)

    def _checked(self, group: Group, values: Group) -> Own:
        check_defined(values, PULLBACK.options)
        check_average_options(values)
        name = values["second_moment"]
        require(name is None or isinstance(name, str), "second_moment", "None or the name of a state", name)
        require(isinstance(values["log_stats"], bool), "log_stats", "True or False", values["log_stats"])
        check_format_options({"ema_bits": values["ema_bits"]})
        own = Own.of(values)
        if own.by_moment:
            if "lr" not in group:
                raise ValueError(f"{type(self.base).__name__} has no option lr, which the gain needs: give gain=")
            check_lr(group["lr"])
            require_second_moment(self.base, group, name)
        return own

    # ---- states ----------------------------------------------------------------------------------------------------

    def _drop_cast_averages(self) -> None:
        """A bare base casts what it loads to the parameters' dtype. Codes that went through that are none any more."""
        found = []
        for entry in self._entries(self.base.param_groups):
            state = entry.state
            parts = [(name, getattr(state.get(name), "dtype", None)) for name in (*PARTS[AVERAGE], HASH)]
            kinds = [f"{name} in {dtype}" for name, dtype in parts if dtype and dtype not in saved_dtypes(name)]
            if STEP not in state or not kinds:
                continue
            found.append(f"{self._name(entry.group, entry.place)} has {', '.join(kinds)}")
            for name in (*parts_of(AVERAGE), HASH):
                state.pop(name, None)
            step = state.pop(STEP, None)
            if LIVE in state:  # swapped: its weights come back yet
                state |= {STEP: torch.nan_to_num(step.detach().to("cpu", torch.float32, copy=True)), AT_REST: True}
        if found:
            others = f" (and so have {len(found) - 1} others)" if len(found) > 1 else ""
            warnings.warn(
                f"{found[0]}{others}: {type(self.base).__name__}.load_state_dict() cast the codes of an average, which "
                "can't be read then. Such averages start anew at the weights; to keep them, load the checkpoint again "
                "through this Pullback, by optimizer.load_state_dict()",
                stacklevel=3,
            )

    def _bucketed(self, group: Group, own: Own) -> list[Pull]:
        """The parameters of a group that have a gradient, by device, dtype and sharding."""
        buckets: dict[Any, Pull] = {}
        for i, owner in enumerate(group["params"]):
            if owner.grad is None:
                continue
            param, over, alone = owner, _NO_AXES, False
            sharded = type(owner) not in PLAIN_KINDS and is_sharded(owner)
            if type(owner) not in PLAIN_KINDS:
                param, over = local(owner), axes(owner)
                alone = is_wrapper(param)
            formats = formats_of(own.formats, owner)
            key = (param.device, param.dtype, over, sharded, alone, formats)
            pull = buckets.get(key)
            if pull is None:
                device, real = param.device, param.dtype.to_real()
                backend = backends()["torch"] if alone else choose(self._backend_name, device, real)
                moment = self._moment(group, own, param.dtype)
                pull = Pull(group, own, backend, device, param.dtype, over, moment, alone=alone, sharded=sharded)
                pull.formats = formats
                buckets[key] = pull
            self._take(pull, i, owner, param)
        return list(buckets.values())

    def _moment(self, group: Group, own: Own, dtype: torch.dtype) -> SecondMoment | None:
        """None if the gain is a constant, or nothing pulls."""
        if not own.by_moment:
            return None
        return second_moment_of(self.base, group, own.values["second_moment"], dtype.to_real())

    def _take(self, pull: Pull, i: int, owner: Tensor, param: Tensor) -> None:
        state = self.base.state.get(owner) or {}
        step = state.get(STEP)
        if step is not None and (not isinstance(step, Tensor) or step.numel() != 1):
            name = self._name(pull.group, i)
            raise RuntimeError(f"the state {STEP!r} of {name} must be a tensor with one element, got {step!r}")
        values: list[Any] = [state.get(name) for name in pull.names]
        if step is None or not all(
            _fits(name, value, pull.formats, owner, param) for name, value in zip(pull.names, values, strict=True)
        ):
            values, step = self._started(pull.group, i, owner, pull.formats, state)
            pull.new.append(len(pull.owners))
        offset, theirs = 0, any(name not in OURS for name in state)
        if state and not theirs:
            pull.hidden.append(owner)
        if pull.moment is not None:
            pull.seconds.append(self._second(pull.moment, state, pull.group, i, param) if theirs else None)
            if pull.moment.beta2 != 0.0:  # without a state of its own the base starts with this step
                offset = count_of(state.get("step", 0) if theirs else 0) - count_of(step)
        pull.places.append(i)
        pull.owners.append(owner)
        pull.params.append(param)
        for column, value in zip(pull.columns(), values, strict=True):
            column.append(value)
        pull.steps.append(step)
        pull.offsets.append(offset)
        pull.rounds.append(0)

    def _started(self, group: Group, i: int, owner: Tensor, formats: Formats, state: Group) -> tuple[list[Any], Tensor]:
        """The average of a parameter that has none that fits, in its formats, and its step count."""
        step: Any = state.get(STEP)
        there = {name: value for name in parts_of(AVERAGE) if (value := state.get(name)) is not None}
        ema = there.get(AVERAGE)
        if ema is not None and step is None:
            raise RuntimeError(f"{type(self.base).__name__} has a state {AVERAGE!r}: the average needs that name")
        first = there.get(AVERAGE, there.get(f"{AVERAGE}_codes"))
        if first is not None and first.shape != owner.shape:
            self._say(
                f"{self._name(group, i)} has shape {tuple(owner.shape)}, its average {tuple(first.shape)}: averages of "
                "parameters that were replaced by others of another shape start anew"
            )
            there, step = {}, None
        elif ema is not None and ema.dtype is not state_dtype(owner) and ema.dtype is owner.dtype:
            self._say(
                f"{self._name(group, i)} has an average in {ema.dtype}: the base's own load_state_dict rounded it; "
                "load through the Pullback"
            )
            step = step.to(torch.float32)
        if step is None:
            on_device = bool(group.get("capturable", False))
            step = torch.zeros((), dtype=torch.float32, device=owner.device if on_device else "cpu")
        check_whole(map(local, there.values()))
        if is_beside(there):
            self._check_unedited("step()", (owner,))
        names = names_of(formats, (AVERAGE,))
        if not there:
            check_whole((local(owner),))
            ema = owner if is_sharded(owner) else aligned(owner)
            if formats is PLAIN:
                return [as_state(owner, ema)], step
            return [new_state(name, formats, owner, {}) for name in names], step
        if formats is not PLAIN or AVERAGE not in there:
            there = converted(there, owner, formats)
        return [
            as_coded(name, owner, there[name]) if name in CODED else as_state(owner, there[name]) for name in names
        ], step

    def _say(self, message: str) -> None:
        kind = message.partition(": ")[2]
        if kind not in self._scratch.said:
            self._scratch.said.add(kind)
            warnings.warn(message, stacklevel=3)

    def _second(self, moment: SecondMoment, state: Group, group: Group, i: int, param: Tensor) -> Tensor:
        """The base's second moment of a parameter, as the operator takes it."""
        value = state.get(moment.name)
        if value is None:
            raise lacks(self.base, moment.name, {k: v for k, v in state.items() if k not in OURS})
        v = local(value) if isinstance(value, Tensor) else value
        fits = isinstance(v, Tensor) and v.shape == param.shape and v.layout is torch.strided
        if not fits or not (v.is_floating_point() or v.is_complex()) or v.device != param.device:
            came = f"a {v.dtype} tensor of shape {tuple(v.shape)} on {v.device}" if isinstance(v, Tensor) else repr(v)
            raise RuntimeError(
                f"the state {moment.name!r} of {self._name(group, i)} is {came}: give one of shape "
                f"{tuple(param.shape)}, a second moment per coordinate, or gain="
            )
        if param.is_complex():
            v = torch.view_as_real(v) if v.is_complex() else torch.stack([v, v], -1)
        real = param.dtype.to_real()
        return v if v.dtype is real or v.dtype is torch.float32 else v.to(state_dtype(param).to_real())

    # ---- steps that count for nothing --------------------------------------------------------------------------------

    def _is_dry_run(self) -> bool:
        """torch.distributed.checkpoint creates empty states by a first step with zero gradients and lr = 0. No average
        counts it, and the first real step starts all of them anew."""
        groups = self.base.param_groups
        owners = [p for group in groups for p in group["params"] if p.grad is not None]
        if not owners or any(is_fake(local(p)) for p in owners):
            return False
        if not all("lr" in group and lr_is_zero(group["lr"]) for group in groups):
            return False
        # All ranks have to take the step for the same: on some of them a shard may have no gradient but zeros.
        zero: dict[Any, bool] = {}
        for p in owners:
            grad = local(p.grad)
            values = grad._values() if grad.layout is torch.sparse_coo else grad
            key = (p.device, axes(p))
            zero[key] = zero.get(key, True) and not bool(values.any())
        return all([agree(value, device, over) for (device, over), value in zero.items()])

    def _forget_dry_run(self) -> None:
        if not self._scratch.unsure or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return
        for p, state in list(self.base.state.items()):
            if STEP in state and count_of(state[STEP]) == 0:
                for name in (*parts_of(AVERAGE), HASH, STEP):
                    state.pop(name, None)
                if not state:
                    del self.base.state[p]
        self._scratch.unsure = False


def _fits(name: str, value: Any, formats: Formats, owner: Tensor, param: Tensor) -> bool:
    """Whether a state is a part of the parameter's average as a step takes it."""
    if value is None or value.dtype is not dtype_of(name, formats, param):
        return False
    shape = owner.shape if not name.endswith("_scales") else torch.Size(scales_shape(owner))
    if value.shape != shape:
        return False
    if type(value) is not Tensor and is_sharded(value):
        return is_sharded(owner) and placed_alike(value, owner)
    return not (type(value) is Tensor and type(owner) not in PLAIN_KINDS and is_sharded(owner))
