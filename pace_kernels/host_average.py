"""Averages in host memory, for ``ema_device="cpu"``: ``e₊ = e + w_t (x − e)`` on the CPU, while training goes on.

Every ``ema_update_freq`` steps the weights are copied to pinned memory. The copy is a part of the current stream, so
that whatever writes weights next, also other code than ours, comes behind it; the host does not wait. A worker waits
for the copy and moves the average by the CPU's kernel of the pullback, without a pull: the operations of PACE's own
average, so its bits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .backend import choose, say_once
from .checks import Group, require
from .compressing import Compressing
from .conversions import weight_in
from .definitions import PULLBACK
from .definitions.kit import AVERAGING
from .formats import OPTIONS, REMAINDER, asked
from .lanes import Lane, lane_of
from .launching import RESIZED, Prepared
from .memory import aligned, are_twins
from .plan import Plan
from .sharding import is_sharded, is_wrapper
from .states import EMA_DEVICE, Work, is_away
from .torch_rules.common import at_hand
from .whole import UnderWay
from .worker import Worker

_CPU = torch.device("cpu")
_WHERE = f'{EMA_DEVICE}="cpu"'
# A group, parameters of it that have stepped, and their states.
Stepped = tuple[Group, list[Tensor], list[dict[str, Any]]]
_NO_PULL = {"lr": 0.0, "lambda_pullback": 0.0, "gain": None, "clamp_pullback": True, "beta2": 0.0, "eps": 1.0}


def check_ema_device(group: Group) -> None:
    """Raises ValueError where averages can't be in host memory with the group's other options."""
    value = group.get(EMA_DEVICE)
    require(value is None or (isinstance(value, str) and value == "cpu"), EMA_DEVICE, 'None or "cpu"', value)
    if value is None:
        return
    pull, bits = group["lambda_pullback"], asked(group).ema
    for fits, needed, why in (
        (not pull > 0.0, f"lambda_pullback=0, got {pull!r}", "a pull reads the average at every step"),
        (group["use_ema_eval"], "use_ema_eval=True", "without it and without a pull no average is kept"),
        (bits == 32, f"ema_bits=32, got {bits}", "averages in host memory are not compressed"),
        (not group["capturable"], "capturable=False", "a CUDA graph runs nothing on the host"),
    ):
        if not fits:
            raise ValueError(f"{_WHERE} needs {needed}: {why}")


def _check_works(works: list[Work], twins: bool) -> None:
    """Raises RuntimeError where a step has parameters whose average can't be in host memory."""
    away = [work for work in works if is_away(work.group)]
    if twins and are_twins((param, is_away(work.group)) for work in works for param in work.params):
        raise RuntimeError(f"two parameters are one memory, which {_WHERE} can't average: tie them as one parameter")
    for work in away:
        for owner in work.owners:
            if is_sharded(owner) or is_wrapper(owner):
                raise RuntimeError(
                    f"{_WHERE} is for plain tensors, and a parameter of shape {tuple(owner.shape)} is a "
                    f"{type(owner).__name__}: leave {EMA_DEVICE} out, or shard with fully_shard(offload_policy=...)"
                )
        found_inf = work.scaling.get("found_inf")
        if found_inf is not None and not at_hand(found_inf):
            raise RuntimeError(
                f"{_WHERE} has to know on the host which steps count, and skip_nonfinite or a GradScaler with "
                "fused=True tells it on the GPU alone: use fused=False, or leave one of them out"
            )


class HostAverages:
    """The averages of an optimizer that are in host memory. One object, because wrappers that pass for an optimizer
    copy its attributes."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """What is still done is for states of before."""
        self.used = False
        self.marks: list[str] = []  # while a step is taken whose averages were not asked for yet
        self._worker = Worker()
        self._staged: Any = WeakIdKeyDictionary()  # by average: the memory that weights are copied to
        self._moving: set[int] = set()  # ids of averages that the worker has, which it keeps alive

    @property
    def broken(self) -> bool:
        self._worker.look()
        return bool(self.marks or self._worker.failed)

    def check(self, what: str) -> None:
        """Raises RuntimeError if averages are not those of the weights, nor will be."""
        if self.used and self.broken:
            why = self._worker.failed or "a step was interrupted, or is under way"
            raise RuntimeError(
                f"{what}: the average in host memory is not that of the weights ({why}). After an exception, load the "
                "last checkpoint of model and optimizer, with load_state_dict()"
            ) from self._worker.failed

    def join(self) -> None:
        if self.used:
            self._worker.join()
            self._moving.clear()

    def move(self, stepped: list[Stepped]) -> None:
        """After a step of these."""
        due = [
            (group, param, state, count)
            for group, params, states in stepped
            for param, state in zip(params, states, strict=True)
            if "ema" in state and (count := float(state["step"])) % group["ema_update_freq"] == 0 and count > 0
        ]
        if not self._moving.isdisjoint(id(state["ema"]) for _, _, state, _ in due):
            self.join()  # the last move has read what is written here
        lanes: dict[torch.device, Lane] = {}
        calls: dict[tuple[int, torch.dtype], tuple[Group, list[Tensor], list[Tensor], list[Tensor]]] = {}
        for group, param, state, count in due:
            x = weight_in(param, state) if REMAINDER in state else aligned(param.detach())
            lane = lanes.setdefault(x.device, lane_of(x.device))
            kept = self._staged.get(state["ema"])
            if kept is None or (kept.dtype, kept.shape) != (x.dtype, x.shape):
                kept = self._staged[state["ema"]] = lane.host(x)
            lane.copy(x, kept)
            _, weights, averages, counts = calls.setdefault((id(group), x.dtype), (group, [], [], []))
            weights.append(kept)
            averages.append(state["ema"])
            counts.append(torch.tensor(count - 1.0, dtype=torch.float64, device=_CPU))
            self._moving.add(id(state["ema"]))
        copied = [(lane, lane.event()) for lane in lanes.values()]
        moves = [
            partial(
                choose(None, _CPU, dtype, False).op(PULLBACK.op), weights, [], [], averages, counts, None, **_NO_PULL,
                **{option.name: group[option.name] for option in AVERAGING}, step_offset=0, capturable=False,
            )
            for (_, dtype), (group, weights, averages, counts) in calls.items()
        ]  # fmt: skip

        def job() -> None:
            for lane, event in copied:
                lane.block(event)
            for move in moves:
                move()

        if due:
            self._worker.submit(job)


class HostAveraging(Compressing):
    """An optimizer with the option ``ema_device``. Not for direct use."""

    _UNSAID = {**OPTIONS, EMA_DEVICE: None}  # noqa: RUF012
    _LIE_BY = (*OPTIONS, EMA_DEVICE)

    _skips = False  # whether the step that is being taken is left undone

    def __init__(self, params: Any, defaults: dict[str, Any], backend: str | None) -> None:
        self._host = HostAverages()
        super().__init__(params, defaults, backend)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_host", HostAverages()).forget()
        self._host.used = any(map(is_away, self.param_groups))

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _translated_state(self, saved: dict[str, Any], param: Tensor, group: Group, *rest: Any) -> dict[str, Tensor]:
        state = super()._translated_state(saved, param, group, *rest)
        if is_away(group) and "ema" in state:
            state["ema"] = state["ema"].cpu()
        return state

    def _require_whole(self, what: str) -> None:
        super()._require_whole(what)
        if not what.startswith("step()"):  # which waits only for what it writes
            self._host.join()
        self._host.check(what)

    # ---- the step ---------------------------------------------------------------------------------------------------

    def _separated(self, works: list[Work]) -> list[Work]:
        parts = super()._separated(works)
        _check_works(parts, parts is not works)
        return parts

    def _initial(self, name: str, param: Tensor, group: Group, *rest: Any) -> Tensor:
        first = super()._initial(name, param, group, *rest)
        return first.cpu() if name == "ema" and is_away(group) else first

    def _states(self, work: Work) -> dict[str, list[Tensor]]:
        away = is_away(work.group)
        if self._host.used:
            self._host.join()  # options or parameters changed, and averages with them; the next steps go by a plan
            for state in () if away else filter(None, map(self.state.get, work.owners)):
                if "ema" in state and state["ema"].device != work.device:
                    state["ema"] = state["ema"].to(work.device)
        states = super()._states(work)
        for i, (average, owner) in enumerate(zip(states.pop("ema"), work.owners, strict=True) if away else ()):
            if average.shape != owner.shape:  # as _mend() does where an operator refuses it
                say_once(RESIZED)
                work.put(i, "ema", self._initial("ema", owner, work.group, work.records[i]))
            elif not average.is_cpu:  # it was there before, or was converted there
                work.put(i, "ema", average.cpu())
        return states

    def _again(self, scaling: dict[str, Tensor]) -> bool:
        host, found_inf = self._host, scaling.get("found_inf")
        if not host.used:
            return super()._again(scaling)
        if host.broken or (found_inf is not None and not at_hand(found_inf)):
            return False  # the usual step refuses it
        self._skips = found_inf is not None and bool(found_inf)
        with UnderWay(host.marks, self._params()):
            return super()._again(scaling)

    def _taken_by(self, plan: Plan) -> None:
        super()._taken_by(plan)
        if not self._host.used or self._skips:
            return
        stepped: list[Stepped] = []
        begin = 0
        for part in plan.parts:
            end = begin + len(part.dicts)
            if is_away(part.group):
                stepped.append((part.group, plan.owners[begin:end], part.dicts))
            begin = end
        self._host.move(stepped)

    def _launch_all(self, prepared: Prepared) -> None:
        away = [work for work, _ in prepared if is_away(work.group)]
        if not away:
            super()._launch_all(prepared)
            return

        def counts() -> list[float]:
            return [float(self.state.get(p, {}).get("step", 0.0)) for work in away for p in work.owners]

        self._host.check("step()")
        self._host.used, before = True, counts()
        self._host.marks.append("step")
        try:
            super()._launch_all(prepared)
            done = [work for work in away if not work.left_undone()]
            self._host.move([(work.group, work.owners, [self.state[p] for p in work.owners]) for work in done])
        except BaseException:
            if counts() == before:  # it was refused; if a part of it was taken, super() has marked that
                self._host.marks.clear()
            raise
        self._host.marks.clear()
