"""The average of the weights: put in their place for an evaluation, taken out again, exported."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .backend import choose
from .checks import Group
from .sharding import gathered, is_sharded, local, on_first_rank
from .states import as_state


class uninterrupted:
    """Within this context a Ctrl-C waits. Python raises KeyboardInterrupt between any two of its instructions, so also
    between a kernel and what belongs to it: weights and states would then be of different steps."""

    def __enter__(self) -> None:
        self._handler, self._came, self._frame = None, False, None
        if threading.current_thread() is threading.main_thread():  # no other one gets it
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                self._handler = handler
                signal.signal(signal.SIGINT, self._later)

    def _later(self, number: int, frame: Any) -> None:
        self._came, self._frame = True, frame

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            if self._came:
                self._handler(signal.SIGINT, self._frame)


class Averaging(torch.optim.Optimizer):
    """An optimizer that keeps an average of its weights as their state `ema`. Not for direct use."""

    _backend_name: str | None

    def _state_tensors(self, group: Group) -> tuple[str, ...]:
        """The names of the state tensors that parameters of this group need."""
        raise NotImplementedError

    def _forget_dry_run(self) -> None:
        """Drops the states of a dry run, so that averages start at the weights as they are now."""

    @property
    def _swapped(self) -> bool:
        """Of the groups, which wrappers that pass for this optimizer share with it, such as Lightning's: an attribute
        set through one of them would stay there, and training go on from the average."""
        return any(group["swapped"] for group in self.param_groups)

    def _require_live(self, what: str) -> None:
        if self._swapped:
            raise RuntimeError(f"{what} while the weights are swapped to EMA: call train() first")

    @torch.no_grad()
    def eval(self) -> None:
        """Puts the average in place of the weights, in groups with ``use_ema_eval``; again is harmless.

        float32 weights and their averages trade places without a copy; narrower weights are kept beside.
        """
        if not self._swapped:
            with uninterrupted():
                self._swap_in()

    def _swap_in(self) -> None:
        self._forget_dry_run()
        groups = [group for group in self.param_groups if group["use_ema_eval"]]
        entries = [(p, self.state[p]) for group in groups for p in group["params"] if "ema" in self.state.get(p, {})]
        for param, state in entries:
            if local(state["ema"]).shape != local(param).shape:
                raise RuntimeError(f"a parameter of shape {tuple(param.shape)} has an average of another shape")
        self._check_memory(tensor for p, state in entries for tensor in (local(p), local(state["ema"])))
        traded = [(p, state) for p, state in entries if p.dtype == state["ema"].dtype]
        copied = [(p, state, as_state(p, p, p.dtype)) for p, state in entries if p.dtype != state["ema"].dtype]
        self._trade([(param, state["ema"]) for param, state in traded])  # may refuse, so before what may not
        for param, state, _ in copied:
            local(param).copy_(local(state["ema"]))
        # Only now that the contents are in place: an exception above leaves the state as it was.
        for param, state in traded:
            state["live"], state["ema"] = state["ema"], param.detach()
        for _, state, live in copied:
            state["live"] = live
        for group in groups:
            group["swapped"] = True

    @torch.no_grad()
    def train(self) -> None:
        """Puts the weights back that ``eval()`` took out; again is harmless."""
        if self._swapped:
            with uninterrupted():
                self._swap_out()

    def _swap_out(self) -> None:
        entries = [
            (p, self.state[p]) for g in self.param_groups for p in g["params"] if "live" in self.state.get(p, {})
        ]
        for param, state in entries:
            if local(state["live"]).shape != local(param).shape:
                raise RuntimeError(f"a parameter of shape {tuple(param.shape)} has live weights of another shape")
        self._check_memory(tensor for p, state in entries for tensor in (local(p), local(state["live"])))
        places = [(local(p), local(state["ema"])) for p, state in entries]
        shared = [here.numel() > 0 and average.data_ptr() == here.data_ptr() for here, average in places]
        self._trade([(p, state["live"]) for (p, state), trade in zip(entries, shared, strict=True) if trade])
        for (param, state), trade in zip(entries, shared, strict=True):
            if not trade:
                local(param).copy_(local(state["live"]))
        for (_, state), trade in zip(entries, shared, strict=True):
            live = state.pop("live")
            if trade:
                state["ema"] = live
        for group in self.param_groups:
            group["swapped"] = False

    @staticmethod
    def _check_memory(tensors: Iterable[Tensor]) -> None:
        """torch's copies into a tensor whose storage was emptied, as FSDP puts parameters away, end the process."""
        for tensor in tensors:
            if tensor.data_ptr() == 0 and tensor.numel() > 0 and tensor.device.type != "meta":
                shape = tuple(tensor.shape)
                raise RuntimeError(f"a tensor of shape {shape} has more elements than memory: was its storage resized?")

    def _trade(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Exchanges the contents of each pair, a kernel call a device and dtype."""
        buckets: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for a, b in pairs:
            left, right = buckets.setdefault((a.device, a.dtype), ([], []))
            left.append(local(a))
            right.append(local(b))
        for (device, dtype), (left, right) in buckets.items():
            choose(self._backend_name, device, dtype).op("swap_")(left, right)
            torch.autograd.graph.increment_version(left)
        torch.autograd.graph.increment_version([a for a, _ in pairs if is_sharded(a)])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the parameters hold their averages, whatever is raised inside.

        >>> with optimizer.averaged():  # doctest: +SKIP
        ...     validate(model)
        """
        was_swapped = self._swapped
        try:
            self.eval()
            yield
        finally:
            if not was_swapped:
                self.train()

    @torch.no_grad()
    def ema_state_dict(self, model: torch.nn.Module, *, full: bool = False) -> dict[str, Any]:
        """A copy of ``model.state_dict()`` with averaged weights, to save or to export; nothing is swapped.

        Its tensors are contiguous and share no memory, as safetensors wants them: tied weights come under each of their
        names, each with a copy of its own.
        Every parameter that has an average comes averaged, in its own dtype, also where ``use_ema_eval`` is False. One
        that took no step yet, or is not ours, comes as it is. Raises RuntimeError where this optimizer keeps no
        average, ValueError where it knows no parameter of the model (a copy of a model has its own).

        Sharded weights (DTensors) come sharded. ``full``: gathered, on the CPU of rank 0; the other ranks get an empty
        dict, and hold one whole tensor at a time. All ranks have to call it then.
        """
        if not any(self._keeps_average(group) for group in self.param_groups):
            raise RuntimeError("ema_state_dict(): no group of this optimizer keeps an average")
        self._forget_dry_run()
        ours = {param for group in self.param_groups for param in group["params"]}
        exported: dict[str, Any] = model.state_dict(keep_vars=True)
        if not any(isinstance(value, Tensor) and value in ours for value in exported.values()):
            raise ValueError("ema_state_dict(): model has no parameter that this optimizer trains")
        for name, value in list(exported.items()):
            if isinstance(value, Tensor):
                average = self.state.get(value, {}).get("ema", value)
                copy = as_state(value, average, value.dtype)
                exported[name] = (gathered(copy) if full else copy).contiguous()
        return exported if not full or on_first_rank() else {}

    def _keeps_average(self, group: Group) -> bool:
        return "ema" in self._state_tensors(group)
