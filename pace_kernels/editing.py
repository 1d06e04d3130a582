"""Averages that lie beside weights: whether these are what they were, and a context in which they may be changed.

With ``ema_bits`` of 8 or 16 an average is known only together with its weights (csrc/codes.h). Weights that others
wrote since the last step, of another model or in another dtype, would take it along. So an optimizer notes the versions
and dtypes of such weights, and refuses to use their averages where they are others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .checks import Group, check_switch
from .conversions import average_in, dtype_beside, encode_again, hash_of, start_again, weight_in
from .formats import HASH, REMAINDER, SCALES_BESIDE, asked, is_beside, parts_of
from .sharding import local
from .states import Formats
from .whole import Whole

# The versions of a parameter, wrapper and local part.
Version = tuple[int, int]
# Group, place in it, the dtype in which an average was left beside this parameter, and whether it was written since.
Edited = tuple[int, int, torch.dtype, bool]
_NO_VERSION = -2  # of no tensor, nor one before that of any
# Of each parameter that train() put back: its version since, and those before eval(), of the last 8 swaps, which had
# the same contents. By it an optimizer knows its weights and averages again after another one swapped them.
# By ids of parameters and, since ids are used again, of memory that a weak reference keeps from being used again: weak
# references to parameters would keep torch from converting DTensors, whose contents it swaps.
_RESTORED: dict[int, tuple[StorageWeakRef, Version, tuple[Version, ...]]] = {}
_PRUNED = [64]  # the length of that at which entries of memory that is gone are dropped

_BESIDE = "an average of ema_bits 8 or 16, which can be read only with its weights"
_NOW = "`with optimizer.editing_weights(reset_average=True): pass` starts it anew at the weights that are there now"


@dataclass
class Entry:
    """A parameter with an average, and its state."""

    group: Group
    place: int  # in the group
    param: Tensor
    state: dict[str, Any]


class Editing(Whole, torch.optim.Optimizer):
    """An optimizer that knows whether averages lie beside the weights that they were made with. Not for direct use."""

    # The state that a parameter has an average by: it is that, or is computed from it.
    _AVERAGE = "ema"

    # The versions of weights beside which averages lie, as the last step or swap left them, and their dtypes. A step
    # notes its own before it begins, so weights may be one behind where a signal's handler comes in between.
    _left: Any = MappingProxyType({})
    _dtypes: Any = MappingProxyType({})
    # The key of a group that says whether its average is swapped in. Groups are shared with wrappers that pass for this
    # optimizer, such as Lightning's; an attribute set through one of them would stay there.
    _MARK = "swapped"

    # The state that counts the steps of an average.
    _STEPS = "step"

    def _wanted(self, group: Group) -> Formats:
        """The formats that a group asks for."""
        return asked(group)

    def _weight_in(self, weight: Tensor, state: Mapping[str, Any]) -> Tensor:
        """The local weight as a float, with the remainder that it has among the states of its parameter."""
        return weight_in(weight, state)

    def _parts_in(self, state: dict[str, Any]) -> dict[str, Any]:
        """A parameter's state, or what of it is ours."""
        return state

    def _plans_held(self) -> Any:
        """The plans of the next steps."""
        raise NotImplementedError

    @property
    def _swapped(self) -> bool:
        return any(group.get(self._MARK, False) for group in self.param_groups)

    def _require_live(self, what: str) -> None:
        if self._swapped:
            raise RuntimeError(f"{what} while the averaged weights are swapped in: call optimizer.train() first")

    def _name(self, group: Group, i: int) -> str:
        """What errors call a parameter."""
        if "param_names" in group:
            return f"parameter {group['param_names'][i]!r}"
        g = next(k for k, other in enumerate(self.param_groups) if other is group)
        return f"param_groups[{g}]['params'][{i}]"

    def _name_of(self, param: Tensor) -> str:
        for group in self.param_groups:
            for i, other in enumerate(group["params"]):
                if other is param:
                    return self._name(group, i)
        return f"a parameter of shape {tuple(param.shape)}"

    def _entries(self, groups: Sequence[Group], names: Iterable[str] | None = None) -> list[Entry]:
        """Of the groups' parameters those that have one of these states; without names, an average."""
        names = tuple(parts_of(self._AVERAGE) if names is None else names)
        return [
            Entry(group, i, param, self.state[param])
            for group in groups
            for i, param in enumerate(group["params"])
            if not self.state.get(param, {}).keys().isdisjoint(names)
        ]

    # ---- what lies beside weights ----------------------------------------------------------------------------------

    def _note_left(self, params: Iterable[Tensor], more: int = 0) -> None:
        """Averages lie beside these weights as they are now, or will be after so many writes ``more``."""
        for param in params:
            self._left[param] = version_of(local(param)) + more
            self._dtypes[param] = param.dtype

    def _check_unedited(self, what: str, params: Iterable[Tensor], loaded: bool = True) -> None:
        """Raises RuntimeError where weights were written or converted since averages were left beside them, which would
        go along; and, with ``loaded``, where averages of a checkpoint are beside other weights than they were."""
        for param in params:
            if (why := self._why_apart(param, loaded)) is not None:
                raise RuntimeError(f"{what}: {self._name_of(param)} {why}")

    def _why_apart(self, param: Tensor, loaded: bool = True) -> str | None:
        """What of a parameter's weights keeps its average from being used; None: nothing."""
        state = self.state.get(param, {})
        if not is_beside(state):
            return None
        live = state.get("live")  # while swapped it lies beside these
        dtype = (self._dtypes.get(param) or dtype_beside(state)) if live is None else live.dtype
        if dtype is not None and dtype is not param.dtype:
            back = "" if live is None else "convert it back, call optimizer.train(), and "
            way = f"To keep it, {back}convert the model within `with optimizer.editing_weights():`"
            return f"is {param.dtype}, and it has {_BESIDE}: these were {dtype}. {way}. To drop it, {_NOW}"
        if live is not None:
            return None
        if loaded and HASH in state:
            if int(state[HASH]) != hash_of(param):
                way = "Load the model that was saved with it; without it, load_state_dict(..., reset_average=True)"
                return f"does not hold the weights of the checkpoint, which has {_BESIDE}. {way}, or {_NOW}"
            self._note_left([param])
            del state[HASH]
        if not self._was_written(param):
            return None
        way = "Before an edit, enter `with optimizer.editing_weights():`, or take ema_bits=24. After it,"
        return f"was written since the last step, but it has {_BESIDE}. {way} {_NOW}"

    def _was_written(self, param: Tensor) -> bool:
        """Whether others wrote a parameter since an average was left beside it."""
        left, now = self._left.get(param), version_of(local(param))
        return not (left is None or now in (left, left - 1) or any(same == left for _, same in equal_since(param)))

    def _edited(self) -> list[Edited]:
        """What a copy has to know, whose tensors have versions of their own: which weights were written or converted
        since averages were left beside them."""
        places = [(param, g, i) for g, group in enumerate(self.param_groups) for i, param in enumerate(group["params"])]
        found = []
        for param, g, i in places:
            state = self.state.get(param)
            if not isinstance(state, dict) or not is_beside(state) or HASH in state or "live" in state:
                continue  # of these the state itself tells
            dtype, written = self._dtypes.get(param, param.dtype), self._was_written(param)
            if written or dtype is not param.dtype:
                found.append((g, i, dtype, written))
        return found

    def _note_copied(self, edited: Sequence[Edited]) -> None:
        """In a copy, of the weights too: averages lie beside them as they are, but for those edited in the original."""
        states = [(param, self.state.get(param)) for group in self.param_groups for param in group["params"]]
        lying = [(param, state) for param, state in states if isinstance(state, dict) and is_beside(state)]
        self._note_left([param for param, state in lying if HASH not in state])
        for g, i, dtype, written in edited:
            param = self.param_groups[g]["params"][i]
            self._dtypes[param] = dtype
            if written:
                self._left[param] = _NO_VERSION

    def _kept(self, entry: Entry, is_lost: bool) -> Tensor | None:
        """The average that lies beside a parameter."""
        return None if is_lost else average_in(entry.state, self._weight_in(entry.param, entry.state))

    def _encode_again(self, entry: Entry, before: Tensor | None, average: Tensor | None) -> None:
        """After others wrote a parameter, see :func:`encode_again`."""
        ours = dict(self._parts_in(entry.state))
        names = list(ours)
        encode_again(entry.param, ours, before, average)
        for name in names:
            if name not in ours:
                del entry.state[name]
        entry.state.update(ours)

    @contextmanager
    def editing_weights(self, *, reset_average: bool = False) -> Iterator[None]:
        """Within this context weights may be written between steps, as by ``load_state_dict()`` of the model, a clamp
        or a mask, and converted, as by ``model.bfloat16()``: averages keep their values, within half a step of their
        codes. With ``ema_bits`` of 8 or 16 such writes are refused outside of this context. It holds float32 copies of
        averages and weights until it ends.

        Arguments:
            reset_average: whether averages that are refused, because their weights were written or converted outside of
                such a context, start anew at the weights at the end of this one. All others are kept.

        Raises:
            RuntimeError: weights were written before, and ``reset_average`` is False; in the middle of a step; while
                averages are swapped in.

        >>> with optimizer.editing_weights():  # doctest: +SKIP
        ...     model.weight.clamp_(-1, 1)
        """
        check_switch("reset_average", reset_average)
        self._require_whole("editing_weights()")
        self._require_live("editing_weights()")
        self._plans_held().end()  # torch may swap the contents of parameters, unless others hold these
        entries = [
            entry
            for entry in self._entries(self.param_groups, (*SCALES_BESIDE, REMAINDER))
            if not self._parts_in(entry.state).keys().isdisjoint((*SCALES_BESIDE, REMAINDER))
        ]
        with torch.no_grad():
            lost = {id(e.param) for e in entries if reset_average and self._why_apart(e.param) is not None}
            self._check_unedited("editing_weights()", [e.param for e in entries if id(e.param) not in lost])
            self._note_left(
                [entry.param for entry in entries if is_beside(entry.state) and id(entry.param) not in lost]
            )
            kept = [
                (e, float(e.state[self._STEPS]), local(e.param).clone(), self._kept(e, id(e.param) in lost))
                for e in entries
            ]
        try:
            yield
        finally:
            with torch.no_grad():
                for entry, count, before, average in kept:
                    state = self.state.get(entry.param)
                    if state is not entry.state or "live" in state or float(state[self._STEPS]) != count:
                        continue  # it was loaded, is swapped, or took a step: that average is newer
                    self._encode_again(entry, before, average)
                    if id(entry.param) in lost:
                        start_again(state)
                    self._note_left([entry.param] if is_beside(state) else ())


def equal_since(param: Tensor) -> tuple[Version, ...]:
    """The versions that had the contents which the parameter has, as swaps in and out tell."""
    now, same = restored(param)
    return same if now == both_versions(param) else ()


def restored(param: Tensor) -> tuple[Version | None, tuple[Version, ...]]:
    """The parameter's version since train() put it back, and those before of the same contents."""
    kept = _RESTORED.get(id(param))
    memory = None if kept is None else _memory_of(param)
    if kept is None or memory is None or kept[0].cdata != memory._cdata:
        return None, ()
    return kept[1:]


def note_restored(param: Tensor, same: tuple[Version, ...]) -> None:
    """train() put the parameter back, which then holds what it held at the versions ``same``."""
    if len(_RESTORED) >= _PRUNED[0]:
        for key in [key for key, (memory, *_) in _RESTORED.items() if memory.expired()]:
            del _RESTORED[key]
        _PRUNED[0] = 2 * len(_RESTORED) + 64
    if (memory := _memory_of(param)) is not None:
        _RESTORED[id(param)] = StorageWeakRef(memory), both_versions(param), same


def _memory_of(param: Tensor) -> torch.UntypedStorage | None:
    try:
        return local(param).untyped_storage()
    except (NotImplementedError, RuntimeError):  # of a device without such, as XLA
        return None


def both_versions(param: Tensor) -> Version:
    return param._version, local(param)._version


def version_of(tensor: Tensor) -> int:
    """How often it was written, as far as torch counts that."""
    return 0 if tensor.is_inference() else tensor._version
