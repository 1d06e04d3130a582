"""The states of a step: existing ones, new ones, and those that follow a parameter that was changed by hand."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import partial
from itertools import repeat
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .checks import Group
from .conversions import STATES, as_coded, converted, new_state, weight_in
from .formats import CODED, GRADIENTS, MOMENTS, REMAINDER, SECONDS, dtype_of, is_beside, names_of, whole_name
from .memory import aligned, check_whole
from .planning import Planning
from .sharding import is_sharded, local, placed_alike
from .states import PLAIN, Formats, Work, as_state, empty_state, exact_on, moved
from .whole import at_once, each

NO_STATE: Mapping[str, Tensor] = MappingProxyType({})


class Fitting(Planning):
    """An optimizer that finds the states of its steps, or makes them. Not for direct use."""

    def _states(self, work: Work) -> dict[str, list[Tensor]]:
        formats = work.formats
        names = ("step", *names_of(formats, self._state_tensors(work.group)))
        if formats is not PLAIN or self._left:
            self._check_unedited("step()", work.owners)
        usual = self._usual_states(work, names)
        if usual is not None:
            return usual
        columns: dict[str, list[Tensor]] = {name: [] for name in names}
        for i, (owner, param) in enumerate(zip(work.owners, work.params, strict=True)):
            state = self.state.get(owner)
            work.records.append(work.changes.setdefault(i, {}) if state is None else state)
            if state:
                self._convert(owner, state, formats)
                for name, fitted in self._fitted(owner, state, names[1], param is owner, formats).items():
                    work.put(i, name, fitted)
            now = {**(state or {}), **work.changes[i]} if i in work.changes else state or {}
            for name in names:
                value: Tensor | None = now.get(name)
                if value is None:
                    value = self._first(name, owner, work, now)
                    now = {**now, name: value}
                    work.put(i, name, value)
                columns[name].append(value if type(value) is Tensor else local(value))
        self._place_steps(work, columns["step"])
        return columns

    def _usual_states(self, work: Work, names: tuple[str, ...]) -> dict[str, list[Tensor]] | None:
        """The states if all of them exist, are plain and fit. One check of the whole list takes half the time."""
        records: list[Any] = list(map(self.state.get, work.owners))
        try:
            columns = {name: [record[name] for record in records] for name in names}
            more = sum(map(len, records)) > len(names) * len(records)  # as what was kept in other formats
        except (KeyError, TypeError):  # some are missing
            return None
        first = columns[names[1]] if len(names) > 1 else []
        if (
            {kind for column in columns.values() for kind in map(type, column)} != {Tensor}
            or more
            or not self._have_dtypes(work, names, columns)
            or [value.shape for value in first] != [param.shape for param in work.params]
            or not all(map(operator.is_, work.owners, work.params))  # local parts of DTensors
        ):
            return None
        work.records = records
        self._place_steps(work, columns["step"])
        return columns

    def _have_dtypes(self, work: Work, names: tuple[str, ...], columns: dict[str, list[Tensor]]) -> bool:
        """Whether the states are of the dtypes of their formats; plain ones all are of one."""
        looked_at = names[1:2] if work.formats is PLAIN else names[1:]
        plain = (name for name in looked_at if name not in self._STATE_ROWS)
        wanted = {name: dtype_of(name, work.formats, work.params[0]) for name in plain}
        same = ({value.dtype for value in columns[name]} == {dtype} for name, dtype in wanted.items())
        return bool(wanted) and all(same)

    def _convert(self, param: Tensor, state: dict[str, Tensor], formats: Formats) -> None:
        """Converts a state in other formats, as from a checkpoint or from before the options changed, to these. Its
        meaning stays the same."""
        if formats is PLAIN and not any(name in CODED for name in state):
            return
        there = [name for name in state if name in CODED or name in STATES]
        wanted = names_of(formats, {whole_name(name) for name in there if name != REMAINDER})
        if all(name in wanted and state[name].dtype is dtype_of(name, formats, param) for name in there):
            return  # one that is missing is new, as every other state
        self._check_unedited("step()", (param,))
        new = converted(state, param, formats)
        at_once([each(dict.pop, repeat(state), there, repeat(None)), partial(dict.update, state, new)])  # type: ignore[arg-type]
        self._note_left([param] if is_beside(state) else ())

    def _first(self, name: str, param: Tensor, work: Work, state: Mapping[str, Tensor]) -> Tensor:
        """A state at a parameter's first step; ``state`` has those before it."""
        coded = name in CODED or (name in MOMENTS and work.formats.state == 16)
        if not coded:
            first = self._initial(name, param, work.group, state)
            narrow = name in (*SECONDS, *GRADIENTS) and dtype_of(name, work.formats, param) is not first.dtype
            return as_state(param, first, dtype_of(name, work.formats, param)) if narrow else first
        check_whole((local(param),))
        return new_state(name, work.formats, param, state)

    def _place_steps(self, work: Work, steps: list[Tensor]) -> None:
        """Moves step counts to the parameters' device if only it knows whether a step counts: with ``found_inf``; and
        with ``capturable``, since a captured graph advances them there."""
        device = work.device
        work.on_device = work.group["capturable"]
        if device.type == "cpu":
            return
        away = [i for i, step in enumerate(steps) if step.device.type == "cpu"]
        work.on_device = work.on_device or "found_inf" in work.scaling or len(away) < len(steps)
        if work.on_device:
            for i in away:
                steps[i] = moved(steps[i], device)
                work.put(i, "step", steps[i])
            if exact_on(device, work.group.get("ema_update_freq", 1)):
                for i, step in enumerate(steps):
                    if step.dtype != torch.float64:
                        steps[i] = step.double()
                        work.put(i, "step", steps[i])

    def _fitted(
        self, param: Tensor, state: dict[str, Tensor], name: str, plain: bool, formats: Formats = PLAIN
    ) -> dict[str, Tensor]:
        """New states if they have to follow a parameter whose dtype or shards were changed by hand; a change of its
        shape is refused."""
        value = state.get(name)
        if value is None:  # options changed: it will be created
            shaped = (key for key in self._STATE_TENSORS if not key.endswith("_scales"))
            name = next((key for key in shaped if key in state), name)
            value = state.get(name)
        if value is None:
            return {}
        placed = not is_sharded(value) if plain else is_sharded(value) and placed_alike(value, param)
        if placed and value.dtype is dtype_of(name, formats, param) and value.shape == param.shape:
            return {}
        if value.shape != param.shape:
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} has a state of shape {tuple(value.shape)}: was it resized?"
            )
        kept = {key: state[key] for key in self._STATE_TENSORS if key in state}
        if "ema" in kept and kept["ema"].shape != param.shape:
            del kept["ema"]
        check_whole(map(local, kept.values()))
        return {
            key: as_coded(key, param, value) if key in CODED else as_state(param, value, dtype_of(key, formats, param))
            for key, value in kept.items()
        }

    def _initial(self, name: str, param: Tensor, group: Group, state: Mapping[str, Tensor] = NO_STATE) -> Tensor:
        """A state at a parameter's first step; ``state`` has those before it."""
        if name == "step":
            return torch.zeros((), dtype=torch.float32, device=param.device if group["capturable"] else "cpu")
        if name == "ema":
            check_whole((local(param),))
            here = param if is_sharded(param) else aligned(param)
            return as_state(param, weight_in(here, state) if REMAINDER in state else here)
        zeros = empty_state(param)
        local(zeros).zero_()
        return zeros
