"""Checkpoints: what is saved beside torch's states and options, what is checked and translated when one is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from .checks import Group, checked_count, require, shortened
from .conversions import scales_shape
from .formats import (
    HASH,
    PARTS,
    REMAINDER,
    asked,
    has_average,
    is_beside,
    parts_of,
)
from .options import Record, check_given, make_plain
from .saved import check_parts, check_saved, copied
from .saving import AT_REST, Saving
from .states import CODED_FORMAT, FORMAT, GROUP_STATE, LAST_STEP, holds, step_dtype

# Options that torch.optim.Adam and AdamW keep in their groups and that mean nothing here.
_FOREIGN_OPTIONS = ("amsgrad", "foreach", "fused", "differentiable", "decoupled_weight_decay")
# Options of torch's other optimizers: lr and weight_decay mean something else there.
_OF_OTHERS = ("momentum", "dampening", "nesterov", "alpha", "centered", "rho", "lr_decay", "lambd", "etas", "max_iter")
# State of the published pace-optimizer: the same tensors under other names. `theta` is its copy of the live weights.
_FOREIGN_NAMES = {"m": "exp_avg", "v": "exp_avg_sq"}
_FOREIGN_STATE = {"theta", "last_ema_step", "max_exp_avg_sq"}


# By an optimizer's own option, the options that the groups of no other have.
_ONLY: dict[str, tuple[str, ...]] = {}


class Checkpoints(Saving):
    """An optimizer whose checkpoints are checked before they change anything. Not for direct use."""

    # Names of the state tensors that this class of optimizer may keep, beside `step` and, while swapped, `live`.
    _STATE_TENSORS: ClassVar[tuple[str, ...]] = ()
    # Names of small float64 states, with their number of elements.
    _STATE_ROWS: ClassVar[dict[str, int]] = {}
    # An option that the groups of no other optimizer have: by it a checkpoint is known for one of this class.
    _OWN_OPTION: ClassVar[str]
    # All of those that no other optimizer's groups have: others leave them out of a checkpoint of this class.
    _ONLY_OPTIONS: ClassVar[tuple[str, ...]] = ()

    _backend_name: str | None
    _drops_averages = False  # while a checkpoint is loaded
    _dry: bool  # the states come from a dry run: the first real step creates them anew
    _incoming: dict[Tensor, dict[str, Tensor]] | None
    _records: dict[int, Record]  # by id of a group
    _step_supports_amp_scaling: bool
    _unchecked: set[int]  # ids of parameters that were frozen when they came
    _changed: list[Group]  # groups whose options were replaced, lr aside, since the last step

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_OWN_OPTION" in cls.__dict__:
            _ONLY[cls._OWN_OPTION] = cls._ONLY_OPTIONS

    def _check_options(self, group: Group) -> None:
        """Raises ValueError or TypeError where an option of the group is not allowed."""
        raise NotImplementedError

    def _state_tensors(self, group: Group) -> tuple[str, ...]:
        """The names of the state tensors that parameters of this group need."""
        raise NotImplementedError

    def _required_states(self, group: Group) -> tuple[str, ...]:
        """The names of states, beside `step`, without which another optimizer's checkpoint does not fit this one."""
        return ("exp_avg_sq",)

    def _initial(self, name: str, param: Tensor, group: Group) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any], *, reset_average: bool = False) -> None:
        """Loads a state of this class, of ``torch.optim.Adam`` / ``AdamW``, or of the published ``pace-optimizer``;
        MADA one of PACE, and PACE one of a MADA that is AdamW.

        States are copied, whatever the parameter's dtype, and are float32 (float64 for float64 parameters) or of the
        formats that the groups here ask for. The options of formats are the constructor's. All others come from the
        checkpoint, ``capturable`` too; one that it does not have keeps its present value. What does not fit raises
        ValueError or TypeError and changes nothing. States go to the parameters by their position, as in
        ``torch.optim``. A state saved between ``eval()`` and ``train()`` comes back swapped. Weights are not touched,
        except that live ones which ``eval()`` took out come back: load the model too, and, for a checkpoint of
        ``pace-optimizer`` saved in eval mode, load it first.

        States of any format are converted to any other at their first use, rounded to the nearest; equal formats keep
        their bits. Codes need parameters that can have codes: of the same shape, contiguous, not channels_last.
        Averages of ``ema_bits`` 8 or 16 are valid only with the checkpoint's weights, which may be loaded before or
        after; with other weights their next use raises RuntimeError. ``reset_average`` drops all averages, and they
        start at the weights before the next step.
        """
        self._drops_averages = reset_average
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")

        # Last of the pre-hooks, so that those of the user see the checkpoint as it was saved.
        def translate(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            try:
                return self._translated(loaded, notes)
            except (ArithmeticError, AttributeError, LookupError, NotImplementedError) as error:
                raise ValueError(f"state_dict is none that state_dict() made: {error!r}") from error

        notes: list[str] = []
        unwritten = self._unwritten()
        handle = self.register_load_state_dict_pre_hook(translate)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._incoming = None
            self._drops_averages = False
        self._unfinished.clear()
        self._live_again(unwritten)
        for note in notes:
            warnings.warn(note, stacklevel=3)  # beyond no_grad

    def _translated(self, loaded: dict[str, Any], notes: list[str]) -> dict[str, Any]:
        """``loaded`` in our names and checked. The states are kept aside: torch would cast them to the parameter's
        dtype, and looks each of them up in the lists of parameters, which takes 5 s for 10,000 of them."""
        saved_groups = self._checked_structure(loaded)
        if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in self.param_groups]:
            return loaded  # torch says what is wrong
        known = {key for saved in saved_groups for key in saved["params"]}
        if strangers := sorted(str(key) for key in loaded["state"] if key not in known):
            raise ValueError(
                f"state_dict has states of parameters that are in none of its groups: {', '.join(strangers)}"
            )
        self._check_names(loaded["state"], saved_groups)  # before options: they tell best what it is
        without = False
        groups: list[Group] = []
        incoming: dict[Tensor, dict[str, Tensor]] = {}
        for number, (saved, group) in enumerate(zip(saved_groups, self.param_groups, strict=True)):
            options = self._loaded_options(saved, group, number)
            if options["weight_decay"] and saved.get("decoupled_weight_decay") is False:
                notes.append(
                    f"param_groups[{number}]: weight_decay {saved['weight_decay']} was Adam's, added to the gradient; "
                    "here it is decoupled, as in AdamW"
                )
            if "decoupled_weight_decay" in saved and "amsgrad" not in saved:  # which Adam and AdamW have both
                notes.append(
                    f"param_groups[{number}] is of RAdam: its moments are Adam's and are taken over, its rectification "
                    f"of the first steps is not done by {type(self).__name__}"
                )
            names = names_of_states = options.pop("state_names")
            groups.append(options | {"state_names": None})
            if names is None or self._OWN_OPTION not in saved:
                names = (*(names or ()), *self._required_states(options))
            rests = AT_REST in names and any(has_average(loaded["state"].get(key, ())) for key in saved["params"])
            later = {name.removeprefix(f"{AT_REST} without ") for name in names if name.startswith(f"{AT_REST} ")}
            names = [name for name in names if not name.startswith(AT_REST)]
            at_rest = [name for name in names if name != "ema" and name not in later]
            ordered, present = saved.get("param_names"), group.get("param_names")
            if ordered and present and ordered != present and sorted(ordered) == sorted(present):
                notes.append(
                    f"param_groups[{number}] was saved with its parameters in another order. States go by position, "
                    "not by name, as in torch.optim"
                )
            for i, (key, param) in enumerate(zip(saved["params"], group["params"], strict=True)):
                if key not in loaded["state"] or not loaded["state"][key]:
                    continue
                name = f"the state of {self._name(group, i)}"
                needed = at_rest if rests and not has_average(loaded["state"][key]) else names
                incoming[param] = self._translated_state(loaded["state"][key], param, options, needed, name, notes)
            loaded_here = [incoming[param] for param in group["params"] if param in incoming]
            if names_of_states and not loaded_here:
                # torch's helper has looked them up, and takes what is left of that, {}, for states to fill.
                for param in [param for param, state in self.state.items() if not state]:
                    del self.state[param]
                raise ValueError(
                    f"param_groups[{number}] was saved with states ({', '.join(names_of_states)}), and none of them "
                    "came along. Flattened distributed checkpoints bring those that the optimizer has at the load, and "
                    "torch makes none where parameters have gradients: load before the first backward(), or after "
                    "optimizer.zero_grad()"
                )
            if "ema" in self._state_tensors(options) and AT_REST not in (names_of_states or ()):
                without |= not all(map(has_average, loaded_here))
            lost = any(has_average(state) and "live" not in state for state in loaded_here)
            if saved.get("swapped") and lost:
                raise ValueError(
                    f"param_groups[{number}] was saved between eval() and train(), and its live weights did not come "
                    "along (distributed checkpoints drop them): call optimizer.train() before saving"
                )
            groups[-1]["swapped"] = bool(saved.get("swapped")) or any("live" in state for state in loaded_here)
        if without and not self._drops_averages:
            notes.append("the checkpoint has no averages: they start at the weights before the next step")
        self._incoming = incoming
        return {**loaded, "state": {}, "param_groups": groups}

    def _checked_structure(self, loaded: dict[str, Any]) -> list[Group]:
        """The groups of what is to be loaded, if it is a state dict at all."""
        for part, kind in (("state", Mapping), ("param_groups", (list, tuple))):
            if not isinstance(loaded.get(part), kind):
                came = (
                    type(loaded[part]).__name__
                    if part in loaded
                    else f"only {', '.join(map(str, loaded)) or 'nothing'}"
                )
                raise ValueError(
                    f"state_dict must have 'state' and 'param_groups', as state_dict() does: {part} is {came}"
                )
        groups: list[Group] = list(loaded["param_groups"])
        for number, saved in enumerate(groups):
            if not isinstance(saved, Mapping) or not isinstance(saved.get("params"), (list, tuple)):
                raise ValueError(f"param_groups[{number}] of the state_dict must be a dict with a list 'params'")
        for key, state in loaded["state"].items():
            if not isinstance(state, Mapping):
                raise ValueError(f"the state of parameter {key} must be a dict, got {type(state).__name__}")
        return groups

    def _check_names(self, states: Mapping[Any, Mapping[str, Any]], saved_groups: list[Group]) -> None:
        known = {"step", "live", *self._STATE_TENSORS, HASH, *self._STATE_ROWS, *_FOREIGN_NAMES, *_FOREIGN_STATE}
        for saved, group in zip(saved_groups, self.param_groups, strict=True):
            for i, key in enumerate(saved["params"]):
                if unknown := sorted(map(str, states.get(key, {}).keys() - known)):
                    raise ValueError(
                        f"the state of {self._name(group, i)} has {', '.join(unknown)}, which is no state of "
                        f"{type(self).__name__}"
                    )

    def _loaded_options(self, saved: Group, group: Group, number: int) -> Group:
        """The options of a group after loading, checked."""
        self._check_format(saved, number)
        if "betas" not in saved and (foreign := [name for name in _OF_OTHERS if name in saved]):
            raise ValueError(
                f"param_groups[{number}] of the checkpoint has {', '.join(foreign)} and no betas: it is neither of "
                f"{type(self).__name__} nor of Adam or AdamW"
            )
        check_given(saved, self.defaults, f"param_groups[{number}] of the checkpoint", type(self).__name__)
        try:
            options = self._merged(saved, group) | {"format_version": FORMAT}
            self._check_options(options)
            swapped, skipped, names = (options[name] for name in ("swapped", "skipped_steps", "state_names"))
            require(isinstance(swapped, bool), "swapped", "True or False", swapped)
            if skipped is not None:
                count = checked_count("skipped_steps", skipped, 2**63 - 1).to(torch.int64, copy=True)
                options["skipped_steps"] = count if count > 0 else None
            listed = isinstance(names, (tuple, list)) and all(isinstance(name, str) for name in names)
            require(names is None or listed, "state_names", "None or a tuple of names", names)
            ordered = saved.get("param_names")
            if ordered is not None:
                named = isinstance(ordered, (tuple, list)) and all(isinstance(name, str) for name in ordered)
                named = named and len(ordered) == len(saved["params"])
                require(named, "param_names", "a name for each parameter", ordered)
        except TypeError as error:
            raise TypeError(f"param_groups[{number}] of the checkpoint: {error}") from error
        except (ValueError, ArithmeticError, AttributeError, LookupError, RuntimeError) as error:
            # The last four: of values that do not even answer to what is asked of an option.
            raise ValueError(f"param_groups[{number}] of the checkpoint: {error}") from error
        return options

    def _check_format(self, saved: Group, number: int) -> None:
        version = saved.get("format_version", 0)
        if isinstance(version, bool) or not isinstance(version, int) or version < 0:
            raise ValueError(
                f"param_groups[{number}]: format_version must be an integer >= 0, got {shortened(version)}"
            )
        if version > CODED_FORMAT:
            raise ValueError(
                f"param_groups[{number}] was saved in format {shortened(version)} by a later pace_kernels; this one "
                f"reads formats up to {CODED_FORMAT}"
            )

    def _merged(self, saved: Group, group: Group) -> Group:
        """The options of a group after loading: the saved ones, and the present ones where none was saved."""
        options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        options |= GROUP_STATE  # of what is loaded, not of what was here
        others = (names for own, names in _ONLY.items() if own in saved and own != self._OWN_OPTION)
        dropped = {*_FOREIGN_OPTIONS, *chain.from_iterable(others)}
        options |= {k: v for k, v in saved.items() if k not in dropped}
        make_plain(options, self.defaults)
        return options

    def _translated_state(
        self,
        saved: dict[str, Any],
        param: Tensor,
        group: Group,
        required: Sequence[str],
        name: str,
        notes: list[str],
    ) -> dict[str, Tensor]:
        """A parameter's saved state in our names, copied and checked; it must have what is ``required``."""
        state = {_FOREIGN_NAMES.get(k, k): v for k, v in saved.items()}
        for needed in ("step", *required):
            there = needed in state or any(part in state for part in PARTS.get(needed, ()))
            if not there and needed != "live":  # that one is asked for with "swapped"
                raise ValueError(f"{name} lacks {needed}: is it the state of another optimizer, or incomplete?")
        if (
            "max_exp_avg_sq" not in (*self._state_tensors(group), *required)
            and state.pop("max_exp_avg_sq", None) is not None
        ):
            notes.append(f"{name}: the maximum that AMSGrad keeps is dropped")
        state.pop("last_ema_step", None)
        if (theta := state.pop("theta", None)) is not None and "ema" in state:
            # The published code holds the live weights twice. They are needed only where it was saved in eval mode.
            same = self._held(param, theta)
            if not same and self._held(param, state["ema"]):
                state["live"] = theta
            elif not same:
                notes.append(f"{name}: the model holds neither its weights nor its average; load the model first")
        step = checked_count(f"{name}: step", state.pop("step"), LAST_STEP)
        step = step.to(step_dtype(step.item()))
        if self._drops_averages:
            dropped = (*parts_of(self._AVERAGE), HASH)
            state = {key: value for key, value in state.items() if key not in dropped}
            if param.dtype != torch.bfloat16 and state.pop(REMAINDER, None) is not None:
                notes.append(
                    f"{name}: the master weight of a bfloat16 parameter is dropped, since this one is {param.dtype}"
                )
        check_parts(state, name, param)
        if not asked(group).weight and not is_beside(state):  # codes beside a weight are beside its remainder too
            state.pop(REMAINDER, None)
        for key, value in state.items():
            shape = (self._STATE_ROWS[key],) if key in self._STATE_ROWS else tuple(param.shape)
            shape = () if key == HASH else scales_shape(param) if key.endswith("_scales") else shape
            check_saved(name, key, value, shape, param)
        ours = {"step": step.reshape(()).to(param.device if group["capturable"] else "cpu", copy=True)}
        for key, value in state.items():
            row = key in self._STATE_ROWS
            ours[key] = self._initial(key, param, group).copy_(value) if row else copied(key, value, param, group)
        return ours

    @staticmethod
    def _held(param: Tensor, value: Any) -> bool:
        return isinstance(value, Tensor) and value.shape == param.shape and holds(param, value)

    def __getstate__(self) -> dict[str, Any]:
        self._require_whole("copying or pickling")
        kept = {name: getattr(self, name) for name in ("_backend_name", "_dry", "_step_supports_amp_scaling")}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._records, self._changed = {}, []
        self._unchecked = {id(p) for group in self.param_groups for p in group["params"] if not self.state.get(p)}
        for name in ("_versions", "_left", "_dtypes"):
            self.__dict__.setdefault(name, {}).clear()
        self.__dict__.setdefault("_unfinished", [])
        self.__dict__.setdefault("_incoming", None)
        self.__dict__.setdefault("_dry", False)
        self.__dict__.setdefault("_backend_name", None)
        for group in self.param_groups:  # pickled before there were these
            for name, value in {**GROUP_STATE, "skip_nonfinite": False}.items():
                group.setdefault(name, value)
            group["swapped"] = group["swapped"] or any("live" in self.state.get(p, {}) for p in group["params"])
        if self._incoming is not None:
            self.state.clear()
            self.state.update(self._incoming)
            self._dry = False
        else:  # a copy, of the weights too
            lying = [param for param, state in self.state.items() if is_beside(state) and HASH not in state]
            self._note_left(lying)
