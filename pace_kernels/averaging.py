"""The average of the weights: put in their place for an evaluation, taken out again, exported.

It is a state, `ema`, or computed from another state and the live weights (``_average_of``). The live weights are copied
into the state `live` before the average is copied over them, and copied back before `live` is removed. So at each
moment, also for a signal handler that saves, `live` is right where it is there, and where it is not, the weights are
live.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import derived, zero
from .backend import say_once
from .checks import Group, require
from .conversions import average_in, encode_again, hash_of, state_in, weight_in
from .formats import AVERAGES_BESIDE, CODED, HASH, REMAINDER, is_beside
from .memory import check_whole, overlapping, region, share_memory
from .sharding import is_sharded, local
from .whole import Whole, at_once, each

# The versions of a parameter, wrapper and local part.
Version = tuple[int, int]
# Of each parameter that train() put back: its version since, and those before eval(), of the last 8 swaps, which had
# the same contents. By it an optimizer knows its weights and averages again after another one swapped them.
_restored: Any = WeakTensorKeyDictionary()
_SWAPS = 8


@dataclass
class _Entry:
    """A parameter with an average, and its state."""

    group: Group
    place: int  # in the group
    param: Tensor
    state: dict[str, Any]


class Averaging(Whole, torch.optim.Optimizer):
    """An optimizer whose weights have an average. Not for direct use."""

    # The state that a parameter has an average by: it is that, or is computed from it.
    _AVERAGE = "ema"

    # The versions of swapped weights before the swap, and as it left them: a later one was written by others.
    # One object for wrappers that copy attributes, such as Lightning's, and never part of a checkpoint.
    _versions: dict[Tensor, tuple[Version, Version]]
    # The versions of weights beside which averages lie, as the last step or swap left them. A step notes its own before
    # it begins, so weights may be one behind where a signal's handler comes in between.
    _left: Any = MappingProxyType({})
    # The key of a group that says whether its average is swapped in. Groups are shared with wrappers that pass for this
    # optimizer, such as Lightning's; an attribute set through one of them would stay there.
    _MARK = "swapped"

    # ---- what a subclass brings ------------------------------------------------------------------------------------

    def _keeps_average(self, group: Group) -> bool:
        """Whether parameters of this group have an average."""
        raise NotImplementedError

    def _average_of(self, entry: _Entry) -> Any:
        """The average of a parameter whose live weights are in its state `live`, or what writes it into a tensor; of a
        sharded one, the local part will do."""
        if self._AVERAGE in entry.state:
            return entry.state[self._AVERAGE]
        return state_in("ema", entry.state, weight_in(entry.state["live"], entry.state))

    def _holds_average(self, entry: _Entry) -> bool:
        """Whether the parameter holds its average."""
        return "live" in entry.state

    def _to_put_back(self, entries: list[_Entry], loaded: set[int]) -> list[_Entry]:
        """Which of the swapped parameters get their states `live` back. ``loaded`` are the ids of those that were
        written in the meantime and are to stay so."""
        return [entry for entry in entries if id(entry.param) not in loaded]

    def _option(self, group: Group, name: str) -> Any:
        """An option of a group."""
        return group[name]

    def _name(self, group: Group, i: int) -> str:
        """What errors call a parameter."""
        if "param_names" in group:
            return f"parameter {group['param_names'][i]!r}"
        g = next(k for k, other in enumerate(self.param_groups) if other is group)
        return f"param_groups[{g}]['params'][{i}]"

    def _forget_dry_run(self) -> None:
        """Drops the states of a dry run, so that averages start at the weights as they are now."""

    # ---- the swap --------------------------------------------------------------------------------------------------

    @property
    def _swapped(self) -> bool:
        return any(group.get(self._MARK, False) for group in self.param_groups)

    def _require_live(self, what: str) -> None:
        if self._swapped:
            raise RuntimeError(f"{what} while the averaged weights are swapped in: call optimizer.train() first")

    def eval(self, model: torch.nn.Module | None = None) -> None:
        """Puts the average in place of the weights, in groups with ``use_ema_eval``; a second call does nothing.

        Until ``train()`` the live weights are kept as the state `live`: 4 bytes a float32 parameter, about what its
        gradient takes in training.

        Arguments:
            model: whose weights these are. FSDP2 and autocast then forget the copies that they derived from them.
                Without it the FSDP2 modules are found by the parameters, which needs internals of torch.

        A graph that was recorded before must not be run backward afterwards: torch raises its version error, but where
        FSDP2 gathers the weights anew it cannot notice.

        Raises:
            RuntimeError: in the middle of a step; for parameters of FSDP1; under Inductor's freezing.
            ValueError: ``model`` has trainable parameters, and this optimizer steps none of them.
            TypeError: ``model`` is no module.
        """
        self._eval(model, "eval()")

    @torch.no_grad()
    def _eval(self, model: torch.nn.Module | None, what: str) -> None:
        self._require_whole(what)
        if self._swapped:
            return
        self._forget_dry_run()
        groups = [group for group in self.param_groups if self._option(group, "use_ema_eval")]
        entries = self._entries(groups)
        derived.check_no_frozen_graphs(what)
        derived.check_no_flat_parameters(self._params(), what)
        self._check_swap(what, model, entries)
        self._versions.clear()
        before = [_version(entry.param) for entry in entries]
        self._swap_in(entries, groups)
        self._forget_derived(model)
        self._versions.update({e.param: (was, _version(e.param)) for e, was in zip(entries, before, strict=True)})

    @torch.no_grad()
    def train(self, model: torch.nn.Module | None = None, *, keep: Literal["loaded", "live"] | None = None) -> None:
        """Puts the weights back that ``eval()`` took out; a second call does nothing.

        Arguments:
            model: as in :meth:`eval`.
            keep: what becomes of weights that were changed since ``eval()``, as by ``model.load_state_dict()``:
                "loaded" trains on from them, "live" puts those of before ``eval()`` back. The average stays as it was.

        Raises:
            RuntimeError: weights were changed since ``eval()``, and ``keep`` is None.
        """
        require(keep in (None, "loaded", "live"), "keep", '"loaded", "live" or None', keep)
        if not self._swapped:
            return
        entries = self._entries(self.param_groups, "live")
        changed = [e for e in entries if self._is_changed(e.param)]
        if changed and keep is None:
            raise RuntimeError(
                f"{self._name(changed[0].group, changed[0].place)} was changed between eval() and train(), as by "
                'load_state_dict() of the model. optimizer.train(keep="loaded") trains on from what it holds now; '
                'optimizer.train(keep="live") puts the weights of before eval() back. The average stays as it was'
            )
        self._check_swap("train()", model, entries)
        loaded = _with_others([e.param for e in entries], [e.param for e in changed] if keep == "loaded" else [])
        back = self._to_put_back(entries, loaded)
        before = {param: was for param, (was, _) in self._versions.items()}
        kept = [(e, average_in(e.state, weight_in(e.state["live"], e.state))) for e in entries if id(e.param) in loaded]
        self._versions.clear()
        lying = [entry.param for entry in back if is_beside(entry.state)]
        self._swap_out(back, [*entries, *back], [group for group in self.param_groups if self._MARK in group], lying)
        for entry, average in kept:  # remainders, and codes of averages, were those of the weights of before
            encode_again(entry.param, entry.state, None, average)
            self._note_left([entry.param] if is_beside(entry.state) else ())
        for param in (entry.param for entry in back if entry.param in before):
            was, (left, same) = before[param], _restored.get(param, (None, ()))
            _restored[param] = (_version(param), (was, *(same if left == was else ()))[:_SWAPS])
        self._forget_derived(model)

    def _unwritten(self) -> list[tuple[Tensor, Tensor]]:
        """Weights that hold their averages, as the swap wrote them, and the live ones."""
        entries = self._entries(self.param_groups, "live") if self._swapped else []
        return [
            (e.param, e.state["live"]) for e in entries if e.param in self._versions and not self._is_changed(e.param)
        ]

    def _live_again(self, unwritten: list[tuple[Tensor, Tensor]]) -> None:
        """After a checkpoint was loaded: where it was not saved swapped, what still holds averages would be taken for
        live weights."""
        if unwritten and not self._swapped:
            for param, live in unwritten:
                _write(param, live)
            self._forget_derived(None)

    @contextmanager
    def averaged(self, model: torch.nn.Module | None = None) -> Iterator[None]:
        """Within this context the parameters hold their averages, whatever is raised inside. See :meth:`eval`.

        Where weights are loaded inside, its end raises RuntimeError; then call ``train(keep=...)``.

        >>> with optimizer.averaged(model):  # doctest: +SKIP
        ...     validate(model)
        """
        was_swapped = self._swapped
        if not any(self._option(group, "use_ema_eval") for group in self.param_groups):
            say_once(f"averaged() of {type(self).__name__}: no group has use_ema_eval=True, so the weights stay live")
        try:
            self._eval(model, "averaged()")
            yield
        finally:
            if not was_swapped:
                self.train(model)

    def _entries(self, groups: Sequence[Group], name: str | None = None) -> list[_Entry]:
        """Of the groups' parameters those that have this state; without a name, an average."""
        names = (name,) if name is not None else (self._AVERAGE, *(("ema_codes",) if self._AVERAGE == "ema" else ()))
        return [
            _Entry(group, i, param, self.state[param])
            for group in groups
            for i, param in enumerate(group["params"])
            if not self.state.get(param, {}).keys().isdisjoint(names)
        ]

    def _is_changed(self, param: Tensor) -> bool:
        """Whether a swapped parameter was written since ``eval()``, but for swaps of others in and out again."""
        if param not in self._versions:
            return False
        _, left = self._versions[param]
        now = _version(param)
        return now != left and left not in _equal_since(param)

    def _check_swap(self, what: str, model: torch.nn.Module | None, entries: list[_Entry]) -> None:
        """Refuses what can't be swapped, before anything has changed."""
        if what != "train()":
            zero.check_alone(self, what)
        if model is not None:
            if not isinstance(model, torch.nn.Module):
                raise TypeError(f"{what}: model must be a torch.nn.Module, got {type(model).__name__}")
            derived.forget(model, ())  # so that its parameters are the sharded ones again
            _check_trains(model, self._params(), what)
        self._check_unedited(what, [entry.param for entry in entries if "live" not in entry.state])
        for entry in entries:
            for name in (self._AVERAGE, "ema_codes", "live"):
                value = entry.state.get(name)
                if value is not None and local(value).shape != local(entry.param).shape:
                    raise RuntimeError(
                        f"{what}: {self._name(entry.group, entry.place)} has shape {tuple(entry.param.shape)}, its "
                        f"state {name!r} has {tuple(value.shape)}: was it resized?"
                    )
        names = (self._AVERAGE, *CODED, "live")
        values = (t for e in entries for t in (e.param, *(e.state.get(name) for name in names)))
        check_whole(local(value) for value in values if value is not None)

    def _swap_in(self, entries: list[_Entry], groups: Sequence[Group]) -> None:
        copies = _live_copies(entries)  # it may run out of memory, so before anything has changed
        self._set_marks(entries, copies, groups)
        try:
            for entry in entries:  # in step order: of parameters over one memory the last has seen the steps of all
                _write(entry.param, self._average_of(entry))
        except Exception:
            self._swap_out(entries, entries, groups, [e.param for e in entries if is_beside(e.state)])
            raise

    def _swap_out(
        self, back: list[_Entry], entries: list[_Entry], groups: Sequence[Group], lying: Iterable[Tensor] = ()
    ) -> None:
        """``lying``: parameters beside which averages lie again then."""
        for entry in back:
            if "live" in entry.state:
                _write(entry.param, entry.state["live"])
        self._note_left(lying)
        self._set_marks(entries, None, groups)

    def _set_marks(self, entries: list[_Entry], copies: list[Tensor] | None, groups: Sequence[Group]) -> None:
        """Sets the states `live` and the groups' marks, or removes them, in one call of C code: Python runs handlers of
        signals between its own instructions, so none sees a part of it."""
        states = [entry.state for entry in entries]
        if copies is None:
            lives = each(dict.pop, states, repeat("live"), repeat(None))
        else:
            lives = each(dict.__setitem__, states, repeat("live"), copies)
        at_once([lives, each(dict.__setitem__, groups, repeat(self._MARK), repeat(copies is not None))])

    def _note_left(self, params: Iterable[Tensor], more: int = 0) -> None:
        """Averages lie beside these weights as they are now, or will be after so many writes ``more``."""
        for param in params:
            self._left[param] = version_of(local(param)) + more

    def _check_unedited(self, what: str, params: Iterable[Tensor], loaded: bool = True) -> None:
        """Raises RuntimeError where weights were written since averages were left beside them, which would go along;
        and, with ``loaded``, where averages of a checkpoint are beside other weights than they were."""
        for param in params:
            state = self.state.get(param, {})
            if "live" in state or not is_beside(state):  # it lies beside the live ones
                continue
            if loaded and HASH in state:
                if int(state[HASH]) != hash_of(param):
                    raise RuntimeError(
                        f"{what}: the checkpoint has an average of {AVERAGES_BESIDE}, and a parameter of shape "
                        f"{tuple(param.shape)} holds other weights than it did there. Load the model that was saved "
                        "with it; or load_state_dict(..., reset_average=True); or save with ema_bits=24, whose "
                        "averages stand alone"
                    )
                self._note_left([param])
                del state[HASH]
            left, now = self._left.get(param), version_of(local(param))
            if left is not None and not (
                now in (left, left - 1) or any(same == left for _, same in _equal_since(param))
            ):
                raise RuntimeError(
                    f"{what}: a parameter of shape {tuple(param.shape)} was written since the last step, and it has an "
                    f"average of {AVERAGES_BESIDE}. Edit weights within `with optimizer.editing_weights():`, or "
                    "take ema_bits=24, whose averages stand alone"
                )

    @contextmanager
    def editing_weights(self) -> Iterator[None]:
        """Within this context weights may be written between steps, as by ``load_state_dict()`` of the model, a clamp
        or a mask: averages stay what they are, within half a step of their codes. With ``ema_bits`` of 8 or 16 such
        writes are refused elsewhere. Until its end it holds averages and weights once more, in float32.

        >>> with optimizer.editing_weights():  # doctest: +SKIP
        ...     model.weight.clamp_(-1, 1)
        """
        self._require_whole("editing_weights()")
        self._require_live("editing_weights()")
        entries = [
            _Entry(group, i, param, self.state[param])
            for group in self.param_groups
            for i, param in enumerate(group["params"])
            if not self.state.get(param, {}).keys().isdisjoint(("ema_scales", REMAINDER))
        ]
        with torch.no_grad():
            self._check_unedited("editing_weights()", [entry.param for entry in entries])
            self._note_left([entry.param for entry in entries if is_beside(entry.state)])
            kept = [
                (e, float(e.state["step"]), local(e.param).clone(), average_in(e.state, weight_in(e.param, e.state)))
                for e in entries
            ]
        try:
            yield
        finally:
            with torch.no_grad():
                for entry, count, before, average in kept:
                    state = self.state.get(entry.param)
                    if state is not entry.state or "live" in state or float(state["step"]) != count:
                        continue  # it was loaded, is swapped, or took a step: that average is newer
                    encode_again(entry.param, state, before, average)
                    self._note_left([entry.param] if is_beside(state) else ())

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _forget_derived(self, model: torch.nn.Module | None) -> None:
        derived.forget(model, self._params())

    # ---- export ----------------------------------------------------------------------------------------------------

    def ema_state_dict(self, model: torch.nn.Module, *, full: bool = False) -> dict[str, Any]:
        """A copy of ``model.state_dict()`` with averaged weights, to save or to export. See :func:`ema_state_dict`."""
        from .exports import ema_state_dict

        return ema_state_dict(model, self, full=full)

    def master_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """A copy of ``model.state_dict()`` with master weights in float32. See :func:`master_state_dict`."""
        from .exports import master_state_dict

        return master_state_dict(model, self)


def _check_trains(model: torch.nn.Module, params: list[Tensor], what: str) -> None:
    """Raises ValueError where the model has parameters to train, and ``params`` are none of them."""
    trained = [param for param in model.parameters() if param.requires_grad]
    if trained and not share_memory(model.parameters(), params):
        raise ValueError(
            f"{what}: model has no parameter that this optimizer steps, but {len(trained)} trainable ones. It may be a "
            "copy, or a library such as DeepSpeed steps copies of them"
        )


def _live_copies(entries: list[_Entry]) -> list[Tensor]:
    """Copies of the weights; one where parameters are the same elements."""
    copies: dict[Any, Tensor] = {}
    keys = [(region(e.param) or id(e.param), e.param.shape, e.param.stride()) for e in entries]
    for key, entry in zip(keys, entries, strict=True):
        if key not in copies:
            copies[key] = entry.param.detach().clone()
    return [copies[key] for key in keys]


def _write(param: Tensor, value: Tensor | Callable[[Tensor], object]) -> None:
    """Writes contents; the versions of the parameter and of its local part move."""
    if isinstance(value, Tensor):
        local(param).copy_(local(value))
    else:
        value(local(param))
    if is_sharded(param):
        torch.autograd.graph.increment_version(param)


def _with_others(params: list[Tensor], some: list[Tensor]) -> set[int]:
    """The ids of ``some`` of the parameters, and of those that share memory with them."""
    known = set(map(id, some))
    groups = overlapping(params) if some else []
    return {id(param) for group in groups if not known.isdisjoint(map(id, group)) for param in group}


def _equal_since(param: Tensor) -> tuple[Version, ...]:
    """The versions that had the contents which the parameter has, as swaps in and out tell."""
    now, same = _restored.get(param, (None, ()))
    return same if now == _version(param) else ()


def _version(param: Tensor) -> Version:
    return param._version, local(param)._version


def version_of(tensor: Tensor) -> int:
    """How often it was written, as far as torch counts that."""
    return 0 if tensor.is_inference() else tensor._version
