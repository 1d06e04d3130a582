"""Averages in host memory, for ``ema_device="cpu"``: ``e₊ = e + w_t (x − e)`` on the CPU, while training goes on.

Every ``ema_update_freq`` steps the weights are copied to pinned memory. The copy is a part of the current stream, so
that whatever writes weights next, also other code than ours, comes behind it; the host does not wait. A worker waits
for the copy and moves the average by the CPU's kernel of the pullback, without a pull: the operations of PACE's own
average, so its bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backend import choose
from .checks import Group, require
from .conversions import weight_in
from .definitions import PULLBACK
from .definitions.kit import AVERAGING
from .formats import REMAINDER, asked
from .lanes import lane_of
from .sharding import is_sharded, is_wrapper
from .states import Work
from .torch_rules.common import at_hand
from .worker import Worker

OPTION = "ema_device"
_CPU = torch.device("cpu")
_WHERE = 'ema_device="cpu"'


def is_away(group: Group) -> bool:
    """Whether the group's averages are in host memory."""
    return group.get(OPTION) is not None


def check_ema_device(group: Group) -> None:
    """Raises ValueError where averages can't be in host memory with the group's other options."""
    value = group.get(OPTION)
    require(value is None or (isinstance(value, str) and value == "cpu"), OPTION, 'None or "cpu"', value)
    if value is None:
        return
    if group["lambda_pullback"] > 0.0:
        raise ValueError(
            f"{_WHERE} needs lambda_pullback=0, got {group['lambda_pullback']!r}: a pull reads the average at every "
            "step, and host memory is too far away for that"
        )
    if not group["use_ema_eval"]:
        raise ValueError(f"{_WHERE} needs use_ema_eval=True: without it and without a pull no average is kept")
    if (bits := asked(group).ema) != 32:
        raise ValueError(f"{_WHERE} needs ema_bits=32, got {bits}: averages in host memory are not compressed")
    if group["capturable"]:
        raise ValueError(f"{_WHERE} needs capturable=False: a CUDA graph runs nothing on the host")


def check_works(works: list[Work], twins: bool) -> None:
    """Raises RuntimeError where a step has parameters whose average can't be in host memory."""
    away = [work for work in works if is_away(work.group)]
    if away and twins:
        raise RuntimeError(f"two parameters are one memory, which {_WHERE} can't average: tie them as one parameter")
    for work in away:
        for owner in work.owners:
            if is_sharded(owner) or is_wrapper(owner):
                raise RuntimeError(
                    f"{_WHERE} is for plain tensors, and a parameter of shape {tuple(owner.shape)} is a "
                    f"{type(owner).__name__}: leave {OPTION} out, or shard with fully_shard(offload_policy=...)"
                )
        found_inf = work.scaling.get("found_inf")
        if found_inf is not None and not at_hand(found_inf):
            raise RuntimeError(
                f"{_WHERE} has to know on the host which steps count, and skip_nonfinite or a GradScaler with "
                "fused=True tells it on the GPU alone: use fused=False, or leave one of them out"
            )


class HostAverages:
    """What moves the averages of an optimizer, or waits to."""

    def __init__(self) -> None:
        self.worker = Worker()
        self._staged: dict[Tensor, Tensor] = {}  # by average: the memory that weights are copied to

    @torch.no_grad()
    def move(self, group: Group, params: list[Tensor], states: list[dict[str, Any]]) -> None:
        """After a step of these parameters."""
        freq = group["ema_update_freq"]
        rows = [
            (param, state, count)
            for param, state in zip(params, states, strict=True)
            if "ema" in state and (count := float(state["step"])) % freq == 0 and count > 0
        ]
        if not rows:
            return
        self.worker.join()  # the last move has read what is written here
        lanes: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        calls: dict[torch.dtype, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
        for param, state, count in rows:
            x = weight_in(param, state) if REMAINDER in state else param.detach()
            average = state["ema"]
            columns = calls.setdefault(x.dtype, ([], [], []))
            here = self._memory(x, average), average, torch.tensor(count - 1.0, dtype=torch.float64, device=_CPU)
            for column, value in zip(columns, here, strict=True):
                column.append(value)
            lanes.setdefault(x.device, []).append((x, columns[0][-1]))
        copied = [(lane_of(device), lane_of(device).in_order(pairs)) for device, pairs in lanes.items()]
        alone = {option.name: group[option.name] for option in AVERAGING}
        alone |= {"lr": 0.0, "lambda_pullback": 0.0, "gain": None, "clamp_pullback": True, "beta2": 0.0, "eps": 1.0}

        def average_them() -> None:
            for lane, event in copied:
                lane.block(event)
            for dtype, (weights, averages, counts) in calls.items():
                operator = choose(None, _CPU, dtype, False).op(PULLBACK.op)
                operator(weights, [], [], averages, counts, None, **alone, step_offset=0, capturable=False)

        self.worker.submit(average_them)

    def _memory(self, x: Tensor, average: Tensor) -> Tensor:
        """Host memory for these weights."""
        kept = self._staged.get(average)
        if kept is None or kept.dtype != x.dtype or kept.shape != x.shape:
            kept = self._staged[average] = lane_of(x.device).host(x)
        return kept
