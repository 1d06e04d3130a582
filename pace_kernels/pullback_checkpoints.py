"""Checkpoints of a Pullback: its averages are among the base's states, and must survive what a base does to these."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor

from .checkpoints import Checkpoints
from .checks import Group, checked_count, require
from .conversions import as_coded, scales_shape, with_hash
from .formats import CODED, HASH, has_average, is_beside, parts_of
from .memory import is_whole
from .pulling import Pulling
from .pulls import AT_REST, AVERAGE, FORMAT_VERSION, LIVE, OPTIONS, OURS, SAVED_OPTIONS, STEP, SWAPPED
from .saved import check_parts, check_saved, with_short_count
from .sharding import local
from .states import CODED_FORMAT, FORMAT, LAST_STEP, as_state, step_dtype

_PREFIX = "pullback_"  # of the options in the groups of a checkpoint


class _Kept:
    """A value on its way through a base's load_state_dict, which would cast a tensor to the parameter's dtype: an
    average to bfloat16, a count of 257 to 256."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Hook:
    """A hook of the base that does not keep the Pullback alive, nor goes along into copies and files."""

    def __init__(self, optimizer: PullbackCheckpoints, name: str) -> None:
        self.ref, self.name = weakref.ref(optimizer), name

    def __call__(self, base: torch.optim.Optimizer, *args: Any) -> Any:
        optimizer = self.ref()
        return None if optimizer is None else getattr(optimizer, self.name)(*args)

    def __reduce__(self) -> Any:
        return _nothing, ()


def _nothing(*_: Any) -> None: ...


class PullbackCheckpoints(Pulling):
    """Saving and loading of a Pullback. Not for direct use."""

    def _hook_base(self) -> None:
        base = self.base
        base.register_state_dict_pre_hook(_Hook(self, "_before_saving"))
        base.register_state_dict_post_hook(_Hook(self, "_after_saving"), prepend=True)
        base.register_load_state_dict_pre_hook(_Hook(self, "_before_loading"))
        base.register_load_state_dict_post_hook(_Hook(self, "_after_loading"), prepend=True)

    @property
    def _loads_as_torch(self) -> bool:
        """Whether the base loads by torch's code: then hooks run, and values that are no tensors pass through. Other
        bases, such as bitsandbytes', may save their states in their own form and never see ours."""
        names = ("state_dict", "load_state_dict", "__setstate__")
        return all(getattr(type(self.base), name).__module__.startswith("torch.") for name in names)

    # ---- saving ----------------------------------------------------------------------------------------------------

    def _before_saving(self) -> None:
        self._require_whole("state_dict()")
        self._check_unedited("state_dict()", self._lying_params(), False)
        self._mark_groups()
        for group in self.base.param_groups:
            states = (self.base.state.get(param) or {} for param in group["params"])
            if any(f"{AVERAGE}_codes" in state for state in states):
                group[FORMAT_VERSION] = CODED_FORMAT

    def _after_saving(self, saved: dict[str, Any]) -> None:
        """Averages that lie beside weights say beside which."""
        keys = chain.from_iterable(packed["params"] for packed in saved["param_groups"])
        for key, param in zip(keys, self._params(), strict=True):
            state = saved["state"].get(key)
            if isinstance(state, dict) and is_beside(state):
                saved["state"][key] = with_hash(state, param)

    def _lying_params(self) -> list[Tensor]:
        states = ((param, self.base.state.get(param)) for param in self._params())
        return [param for param, state in states if isinstance(state, dict) and is_beside(state)]

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The base's state dict, which contains the averages, with the pullback's options among those of the base. As
        in ``torch.optim``, the tensors are the optimizer's own."""
        self._require_whole("state_dict()")
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self._before_saving()
        saved = self.base.state_dict()
        groups = []
        for packed, group in zip(saved["param_groups"], self.base.param_groups, strict=True):
            ours = {
                _PREFIX + name: value
                for name, value in self._own(group).values.items()
                if name in SAVED_OPTIONS and self._shared(name, group)
            }
            groups.append({**packed, **ours})
        # Dicts of their own: train() would take `live` out of those of a state saved while swapped.
        states = {
            key: with_short_count(dict(state) if isinstance(state, dict) else state, STEP)
            for key, state in saved["state"].items()
        }
        saved = {**saved, "state": states, "param_groups": groups}
        self._after_saving(saved)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            result = post_hook(self, saved)
            saved = saved if result is None else result
        return saved

    def _shared(self, name: str, group: Group) -> bool:
        """Whether a group has this option from the Pullback, not one of its own."""
        return name not in group or name in self.base.defaults

    # ---- loading ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any], *, reset_average: bool = False) -> None:
        """Loads a state of this class, or of the base alone: the average then starts at the weights.

        Averages are of the constructor's ``ema_bits``, or float32 (float64 for float64 parameters), also where the
        base's own ``load_state_dict`` is called: those of every format go into these when they are used first. An
        option that the checkpoint does not have keeps its present value. A state that does not fit raises ValueError or
        TypeError and changes nothing, in the base neither. ``reset_average`` drops all averages, and they begin at the
        weights that the next step finds.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")
        loaded = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, loaded)
            loaded = loaded if result is None else result
        loaded, entries = self._translated(loaded, reset_average)
        if reset_average:  # as of parameters at rest
            kept = {key: {k: v for k, v in ours.items() if k in (STEP, LIVE)} for key, ours in entries.items()}
            entries = {key: {**ours, AT_REST: True} for key, ours in kept.items()}
        hooked = self._loads_as_torch
        self._scratch.unwritten = self._unwritten()
        if hooked:
            states = {k: {**v, **_kept(entries.get(k, {}))} for k, v in loaded["state"].items()}
            loaded["state"] = states | {k: _kept(v) for k, v in entries.items() if k not in states}
        self._load_base(loaded)
        if not hooked:
            self._put_back(loaded, entries)
        self._after_loading()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _load_base(self, state_dict: dict[str, Any]) -> None:
        """torch puts new groups and states in place before a base finds out that they are not its own."""
        kind = type(self.base).__name__
        before = (self.base.state, self.base.param_groups)
        options = [self.base.defaults.keys() & group.keys() for group in self.base.param_groups]
        self._scratch.loading = True
        try:
            # Copies: torch takes tensors as they are, and would train those of the checkpoint.
            states = {k: _copied(state) for k, state in state_dict["state"].items()}
            self.base.load_state_dict({**state_dict, "state": states})
            for number, group in enumerate(self.base.param_groups):
                if missing := sorted(options[number] - group.keys()):
                    raise ValueError(f"param_groups[{number}] lacks {', '.join(missing)}, which {kind} has")
        except (KeyError, AttributeError, ValueError) as error:
            self.base.state, self.base.param_groups = before
            raise ValueError(f"the checkpoint is not one of {kind}: {error}") from error
        except BaseException:
            self.base.state, self.base.param_groups = before
            raise
        finally:
            self._scratch.loading = False

    def _put_back(self, loaded: dict[str, Any], entries: dict[Any, Group]) -> None:
        """Enters the averages if the base has its own load_state_dict, which did not see them."""
        params = chain.from_iterable(group["params"] for group in self.base.param_groups)
        keys = chain.from_iterable(group["params"] for group in loaded["param_groups"])
        for key, param in zip(keys, params, strict=True):
            if key in entries:
                state = self.base.state.get(param)
                if state is None:
                    state = self.base.state[param] = {}
                state.update(_kept(entries[key]))

    def _before_loading(self, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Runs when anyone calls the base's load_state_dict."""
        if self._scratch.loading:
            return None
        loaded, entries = self._translated(state_dict)
        self._scratch.unwritten = self._unwritten()
        states = {k: {**v, **_kept(entries.get(k, {}))} for k, v in loaded["state"].items()}
        loaded["state"] = states | {k: _kept(v) for k, v in entries.items() if k not in states}
        return loaded

    @torch.no_grad()
    def _after_loading(self) -> None:
        """Copies of the averages come in place of what was kept from the base; options of the checkpoint are ours."""
        shared: Group = {}
        for group in self.base.param_groups:
            options = {name: group.pop(_PREFIX + name) for name in SAVED_OPTIONS if _PREFIX + name in group}
            for name, value in options.items():
                if shared.setdefault(name, value) != value:
                    group[name] = value
            on_device = bool(group.get("capturable", False))
            for param in group["params"]:
                state = self.base.state.get(param) or {}
                for name, value in state.items():
                    if isinstance(value, _Kept):
                        state[name] = _as_ours(name, value.value, param, on_device)
                if STEP in state and not state[STEP].is_meta and state[STEP].device.type == "cpu":
                    self._scratch.unsure |= float(state[STEP]) == 0.0
        self._defaults.update(shared)
        self._scratch.plans.clear()
        self._scratch.step_plans.end()
        self._mark_groups()
        unwritten, self._scratch.unwritten = self._scratch.unwritten, []
        for noted in (self._versions, self._left, self._dtypes):
            noted.clear()
        self._live_again(unwritten)
        self._unfinished.clear()

    # ---- what is loaded, checked -----------------------------------------------------------------------------------

    def _translated(self, loaded: dict[str, Any], resets: bool = False) -> tuple[dict[str, Any], dict[Any, Group]]:
        """The base's part of a checkpoint, with our options in its groups, and ours of each parameter's state."""
        saved_groups = Checkpoints._checked_structure(cast(Any, self), loaded)
        present = self.base.param_groups
        if len(saved_groups) != len(present):
            raise ValueError(
                f"the checkpoint has {len(saved_groups)} parameter groups, the optimizer has {len(present)}"
            )
        groups, states, entries = [], dict(loaded["state"]), {}
        for number, (saved, group) in enumerate(zip(saved_groups, present, strict=True)):
            if len(saved["params"]) != len(group["params"]):
                counts = f"{len(saved['params'])} parameters in the checkpoint, {len(group['params'])} here"
                raise ValueError(f"param_groups[{number}] has {counts}")
            for i, (key, param) in enumerate(zip(saved["params"], group["params"], strict=True)):
                if key not in states:
                    continue
                name = f"the state of {self._name(group, i)}"
                # {}: what DCP makes of a state that a flattened checkpoint does not have.
                ours = {k: v for k, v in states[key].items() if k in OURS and not (isinstance(v, dict) and not v)}
                if resets:  # an average that is dropped may have lain beside weights of any dtype
                    ours.pop(HASH, None)
                theirs = {k: v for k, v in states[key].items() if k not in OURS}
                if self._loads_as_torch:
                    self._check_base_state(key, theirs, param)
                if ours:
                    entries[key] = _checked_ours(name, key, ours, param)
                if theirs or not ours:
                    states[key] = theirs
                else:
                    del states[key]
            groups.append(self._loaded_group(saved, group, number, loaded["state"], entries))
        return {**loaded, "state": states, "param_groups": groups}, entries

    def _loaded_group(
        self, saved: Group, group: Group, number: int, states: Mapping[Any, Any], entries: dict[Any, Group]
    ) -> Group:
        """A group after loading: the saved options, and our present ones if none were saved."""
        version, swapped = saved.get(FORMAT_VERSION, 0), saved.get(SWAPPED, False)
        Checkpoints._check_format(cast(Any, self), {"format_version": version}, number)
        own = {name: group[name] for name in OPTIONS if not self._shared(name, group)}
        merged = own | {SWAPPED: False, FORMAT_VERSION: 0} | saved
        if self._shared("ema_bits", group):
            merged.pop("ema_bits", None)
        else:
            merged["ema_bits"] = group["ema_bits"]
        options = dict(self._own(group).values)
        options |= {name: saved[_PREFIX + name] for name in SAVED_OPTIONS if _PREFIX + name in saved}
        options |= {name: merged[name] for name in OPTIONS if not self._shared(name, merged)}
        try:
            require(isinstance(swapped, bool), "swapped", "True or False", swapped)
            self._checked({**group, "lr": merged.get("lr", group.get("lr", 0.0))}, options)
        except (ValueError, TypeError) as error:
            raise type(error)(f"param_groups[{number}] of the checkpoint: {error}") from error
        loaded = [entries[key] for key in saved["params"] if key in entries]
        # Only what keeps no options, as a flattened checkpoint, loses states.
        flat = not any(_PREFIX + name in saved for name in SAVED_OPTIONS)
        there = [key for key in saved["params"] if key in states]
        if version and flat and there and (not loaded or not all(states[key] for key in there)):
            raise ValueError(
                f"param_groups[{number}] was saved by a Pullback, and its averages are missing. Flattened distributed "
                "checkpoints bring only states that the loading optimizer has: load before there are gradients, and "
                "wrap a base before it has stepped"
            )
        if swapped and any(has_average(state) and LIVE not in state for state in loaded):
            raise ValueError(
                f"param_groups[{number}] was saved between eval() and train(), and its live weights are missing "
                "(distributed checkpoints drop them): call optimizer.train() before saving"
            )
        merged[SWAPPED] = swapped or any(LIVE in state for state in loaded)
        merged[FORMAT_VERSION] = FORMAT if loaded else 0
        return merged

    def _check_base_state(self, key: Any, state: Group, param: Tensor) -> None:
        """torch checks no shapes: only a step, too late, would find that a state is from another model or optimizer."""
        have = {k: v for k, v in self.base.state.get(param, {}).items() if k not in OURS}
        if have and state and (missing := sorted(map(str, have.keys() - state.keys()))):
            kind = type(self.base).__name__
            raise ValueError(
                f"state[{key!r}] lacks {', '.join(missing)}, which {kind} keeps: is it from another optimizer?"
            )
        for name, value in state.items():
            if isinstance(value, Tensor) and not is_whole(local(value)):
                raise ValueError(f"state[{key!r}]: {name} has more elements than memory: was its storage resized?")
            like = have.get(name)
            shape = like.shape if isinstance(like, Tensor) else param.shape
            checked = isinstance(like, Tensor) or name in ("exp_avg", "exp_avg_sq", "square_avg", "momentum_buffer")
            if checked and isinstance(value, Tensor) and value.shape != shape and value.numel() != 1:
                raise ValueError(f"state[{key!r}]: {name} has shape {tuple(value.shape)}, expected {tuple(shape)}")


def _kept(state: Group) -> Group:
    return {name: _Kept(value) for name, value in state.items()}


def _copied(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}


def _checked_ours(name: str, key: Any, ours: Group, param: Tensor) -> Group:
    """Our part of a parameter's saved state, checked."""
    if STEP not in ours:
        raise ValueError(f"state[{key!r}] has an average without pullback_step: is it of another optimizer?")
    if not has_average(ours) and not ours.get(AT_REST):
        raise ValueError(f"{name} lacks ema: is it incomplete?")
    checked_count(f"{name}: pullback_step", ours[STEP], LAST_STEP)
    check_parts(ours, name, param)
    for k in (*parts_of(AVERAGE), HASH, LIVE):
        if k in ours:
            shape = () if k == HASH else scales_shape(param) if k.endswith("_scales") else tuple(param.shape)
            check_saved(name, k, ours[k], shape, param)
    return ours


def _as_ours(name: str, value: Any, param: Tensor, on_device: bool) -> Any:
    """A copy of a saved value as a state of the parameter."""
    if name == STEP:
        count = checked_count(STEP, value, LAST_STEP)
        count = count.to(step_dtype(count.item()))
        return count.reshape(()).to(param.device if on_device else "cpu", copy=True)
    if name == AT_REST:
        return bool(value)
    if name == HASH:
        return value.detach().cpu().clone()
    if name in CODED:
        return as_coded(name, param, value)
    return as_state(param, value, value.dtype if name == LIVE else None)
