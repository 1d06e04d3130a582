"""The average of the weights: put in their place for an evaluation, taken out again, exported.

It is a state, `ema`, or computed from another state and the live weights (``_average_of``). The live weights are copied
into the state `live` before the average is copied over them, and copied back before `live` is removed. So at each
moment, also for a signal handler that saves, `live` is right where it is there, and where it is not, the weights are
live.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any, Literal

import torch
from torch import Tensor

from . import derived, zero
from .backend import say_once
from .checks import Group, require
from .conversions import average_in, state_in
from .editing import Editing, Entry, Version, both_versions, equal_since, note_restored, restored
from .formats import CODED, is_beside
from .memory import check_whole, overlapping, region, share_memory
from .sharding import is_sharded, local
from .whole import at_once, each

_SWAPS = 8  # in and out again, that are known of a parameter


class Exporting:
    """An optimizer whose averages and master weights can be exported. Not for direct use."""

    def ema_state_dict(
        self: Any, model: torch.nn.Module, *, full: bool = False, dtype: torch.dtype | None = None
    ) -> dict[str, Any]:
        """A copy of ``model.state_dict()`` with averaged weights, to save or to export. See :func:`ema_state_dict`."""
        from .exports import ema_state_dict

        return ema_state_dict(model, self, full=full, dtype=dtype)

    def master_state_dict(self: Any, model: torch.nn.Module) -> dict[str, Any]:
        """A copy of ``model.state_dict()`` with master weights in float32. See :func:`master_state_dict`."""
        from .exports import master_state_dict

        return master_state_dict(model, self)


class Averaging(Exporting, Editing):
    """An optimizer whose weights have an average. Not for direct use."""

    # The versions of swapped weights before the swap, and as it left them: a later one was written by others.
    # One object for wrappers that copy attributes, such as Lightning's, and never part of a checkpoint.
    _versions: dict[Tensor, tuple[Version, Version]]

    # ---- what a subclass brings ------------------------------------------------------------------------------------

    def _keeps_average(self, group: Group) -> bool:
        """Whether parameters of this group have an average."""
        raise NotImplementedError

    def _average_of(self, entry: Entry) -> Any:
        """The average of a parameter whose live weights are in its state `live`, or what writes it into a tensor; of a
        sharded one, the local part will do."""
        if self._AVERAGE in entry.state:
            return entry.state[self._AVERAGE]
        return state_in(self._AVERAGE, entry.state, self._weight_in(entry.state["live"], entry.state))

    def _average_in(self, entry: Entry) -> Tensor:
        """The local average of a swapped parameter, with the bits that the optimizer has."""
        average = self._average_of(entry)
        return local(average if isinstance(average, Tensor) else entry.param)  # else it has these bits

    def _holds_average(self, entry: Entry) -> bool:
        """Whether the parameter holds its average."""
        return "live" in entry.state

    def _to_put_back(self, entries: list[Entry], loaded: set[int]) -> list[Entry]:
        """Which of the swapped parameters get their states `live` back. ``loaded`` are the ids of those that were
        written in the meantime and are to stay so."""
        return [entry for entry in entries if id(entry.param) not in loaded]

    def _option(self, group: Group, name: str) -> Any:
        """An option of a group."""
        return group[name]

    def _forget_dry_run(self) -> None:
        """Drops the states of a dry run, so that averages start at the weights as they are now."""

    # ---- the swap --------------------------------------------------------------------------------------------------

    def eval(self, model: torch.nn.Module | None = None) -> None:
        """Puts the average in place of the weights, in groups with ``use_ema_eval``; a second call does nothing.

        Until ``train()`` the live weights are kept as the state `live`: 4 bytes per float32 parameter, as much as its
        gradient.

        Arguments:
            model: whose weights these are. FSDP2 and autocast then forget the copies that they derived from them.
                Without it the FSDP2 modules are found by the parameters, which needs internals of torch.

        Do not run the backward pass of a graph from before ``eval()``: torch raises its version error, but cannot
        notice if FSDP2 gathers the weights anew.

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
        before = [both_versions(entry.param) for entry in entries]
        self._swap_in(entries, groups)
        self._forget_derived(model)
        self._versions.update({e.param: (was, both_versions(e.param)) for e, was in zip(entries, before, strict=True)})

    @torch.no_grad()
    def train(self, model: torch.nn.Module | None = None, *, keep: Literal["loaded", "live"] | None = None) -> None:
        """Puts the weights back that ``eval()`` took out; a second call does nothing.

        Arguments:
            model: as in :meth:`eval`.
            keep: what to do with weights that were changed since ``eval()``, as by ``model.load_state_dict()``:
                "loaded" continues from them, "live" restores those from before ``eval()``. The average is kept.

        Raises:
            RuntimeError: weights were changed since ``eval()``, and ``keep`` is None.
        """
        require(keep in (None, "loaded", "live"), "keep", '"loaded", "live" or None', keep)
        if not self._swapped:
            return
        entries = self._entries(self.param_groups, ("live",))
        changed = [e for e in entries if self._is_changed(e.param)]
        if changed and keep is None:
            raise RuntimeError(
                f"{self._name(changed[0].group, changed[0].place)} was changed between eval() and train(), as by "
                'load_state_dict() of the model. optimizer.train(keep="loaded") continues from its present values; '
                'optimizer.train(keep="live") puts the weights of before eval() back. The average stays as it was'
            )
        self._check_swap("train()", model, entries)
        loaded = _with_others([e.param for e in entries], [e.param for e in changed] if keep == "loaded" else [])
        written = [entry for entry in entries if id(entry.param) in loaded]
        kept = [(e, average_in(e.state, self._weight_in(e.state["live"], e.state))) for e in written]
        back = self._to_put_back(entries, loaded)
        before = {param: was for param, (was, _) in self._versions.items()}
        self._versions.clear()
        lying = [entry.param for entry in back if is_beside(entry.state)]
        self._swap_out(back, [*entries, *back], [group for group in self.param_groups if self._MARK in group], lying)
        for entry, average in kept:  # remainders, and codes of averages, were those of the weights of before
            self._encode_again(entry, None, average)
            self._note_left([entry.param] if is_beside(entry.state) else ())
        for param in (entry.param for entry in back if entry.param in before):
            was, (left, same) = before[param], restored(param)
            note_restored(param, (was, *(same if left == was else ()))[:_SWAPS])
        self._forget_derived(model)

    def _unwritten(self) -> list[tuple[Tensor, Tensor]]:
        """Weights that hold their averages, as the swap wrote them, and the live ones."""
        entries = self._entries(self.param_groups, ("live",)) if self._swapped else []
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

    def _is_changed(self, param: Tensor) -> bool:
        """Whether a swapped parameter was written since ``eval()``, but for swaps of others in and out again."""
        if param not in self._versions:
            return False
        _, left = self._versions[param]
        now = both_versions(param)
        return now != left and left not in equal_since(param)

    def _check_swap(self, what: str, model: torch.nn.Module | None, entries: list[Entry]) -> None:
        """Refuses what can't be swapped, before anything has changed."""
        if what != "train()":
            zero.check_alone(self, what)
        if model is not None:
            if not isinstance(model, torch.nn.Module):
                raise TypeError(f"{what}: model must be a torch.nn.Module, got {type(model).__name__}")
            derived.forget(model, ())  # so that its parameters are the sharded ones again
            check_trains(model, self._params(), what)
        self._check_unedited(what, [entry.param for entry in entries])
        for entry in entries:
            for name in (self._AVERAGE, f"{self._AVERAGE}_codes", "live"):
                value = entry.state.get(name)
                if value is not None and local(value).shape != local(entry.param).shape:
                    raise RuntimeError(
                        f"{what}: {self._name(entry.group, entry.place)} has shape {tuple(entry.param.shape)}, its "
                        f"state {name!r} has {tuple(value.shape)}: was it resized?"
                    )
        names = (self._AVERAGE, *CODED, "live")
        values = (t for e in entries for t in (e.param, *(e.state.get(name) for name in names)))
        check_whole(local(value) for value in values if isinstance(value, Tensor))

    def _swap_in(self, entries: list[Entry], groups: Sequence[Group], versions: Any = None) -> None:
        copies = _live_copies(entries)  # it may run out of memory, so before anything has changed
        self._set_marks(entries, copies, groups)
        try:
            for entry in entries:  # in step order: of parameters over one memory the last has seen the steps of all
                _write(entry.param, self._average_of(entry))
        except Exception:
            self._swap_out(entries, entries, groups, [e.param for e in entries if is_beside(e.state)], versions)
            raise

    def _swap_out(
        self,
        back: list[Entry],
        entries: list[Entry],
        groups: Sequence[Group],
        lying: Iterable[Tensor] = (),
        versions: Any = None,
    ) -> None:
        """``lying``: parameters beside which averages lie again then. ``versions``: torch's context that has those of
        before, which come back as long as the swap is marked: without its marks they have to be right."""
        for entry in back:
            if "live" in entry.state:
                _write(entry.param, entry.state["live"])
        if versions is not None:
            versions.__exit__(None, None, None)
        self._note_left(lying)
        self._set_marks(entries, None, groups)

    def _set_marks(self, entries: list[Entry], copies: list[Tensor] | None, groups: Sequence[Group]) -> None:
        """Sets the states `live` and the groups' marks, or removes them, in one call of C code: Python runs handlers of
        signals between its own instructions, so none sees a part of it."""
        states = [entry.state for entry in entries]
        if copies is None:
            lives = each(dict.pop, states, repeat("live"), repeat(None))
        else:
            lives = each(dict.__setitem__, states, repeat("live"), copies)
        at_once([lives, each(dict.__setitem__, groups, repeat(self._MARK), repeat(copies is not None))])

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _forget_derived(self, model: torch.nn.Module | None) -> None:
        derived.forget(model, self._params())

    # ---- export ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _opened(self, what: str) -> Iterator[Averaging]:
        """The optimizer that has the averages; within this context with the parameters that it steps."""
        yield self

    def _owner(self, param: Tensor) -> Tensor:
        """The model's parameter for one that is stepped."""
        return param


def check_trains(model: torch.nn.Module, params: list[Tensor], what: str) -> None:
    """Raises ValueError where the model has parameters to train, and ``params`` are none of them."""
    trained = [param for param in model.parameters() if param.requires_grad]
    if trained and not share_memory(model.parameters(), params):
        raise ValueError(
            f"{what}: model has no parameter that this optimizer steps, but {len(trained)} trainable ones. It may be a "
            "copy, or a library such as DeepSpeed steps copies of them"
        )


def _live_copies(entries: list[Entry]) -> list[Tensor]:
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
