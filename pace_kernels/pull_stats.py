"""The readable parts of a Pullback: the statistics of its last step, and its part of the base's states."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .formats import parts_of
from .ops import PACE_STATS
from .pulls import AVERAGE, STEP, Row
from .sharding import gathered_rows, on_host
from .torch_rules.pace import merge_stats

if TYPE_CHECKING:
    from .pullback_checkpoints import PullbackCheckpoints


def _merged(rows: list[Row]) -> dict[str, float]:
    found = [row for r in rows for row in gathered_rows(r.stats, r.axes)]
    if not found:
        return {}
    values = merge_stats(on_host(found)).tolist()
    s = dict(zip(PACE_STATS, values, strict=True))
    return s if s["count"] > 0 else {}


def statistics(rows: list[Row]) -> dict[str, float]:
    """The statistics of a step, from its calls; empty if none left any."""
    stats: dict[str, float] = {}
    s = _merged(rows)
    raw = s if all(r.moment for r in rows) else _merged([r for r in rows if r.moment])
    if not s:
        return {}
    for key, name, of in (
        ("raw", "raw_lambda", raw),
        ("effective", "effective_lambda", s),
        ("lambda", "lambda", s),
    ):
        if of:
            stats[f"{name}_mean"] = of[f"{key}_sum"] / of["count"]
            stats[f"{name}_max"] = of[f"{key}_max"]
            stats[f"{name}_min"] = of[f"{key}_min"]
    stats["lambda_clipped_frac"] = s["clipped"] / s["count"]
    stats["pullback_norm"] = math.sqrt(s["pullback_sq"])
    if all(r.before for r in rows):
        stats["base_step_norm"] = math.sqrt(s["adam_sq"])
        stats["update_norm"] = math.sqrt(s["update_sq"])
    return stats


class Averager(Mapping[Tensor, dict[str, Any]]):
    """What a Pullback keeps of each parameter that has an average: a view of the base's states."""

    def __init__(self, optimizer: PullbackCheckpoints) -> None:
        self._optimizer = optimizer

    @property
    def state(self) -> Averager:
        return self

    @property
    def _buffers(self) -> list[Tensor]:
        """The copies of the weights from before a step."""
        return list(self._optimizer._scratch.befores.values())

    def __getitem__(self, param: Tensor) -> dict[str, Any]:
        state = self._optimizer.state.get(param) or {}
        found = {"step": state.get(STEP, torch.zeros(()))}
        return found | {name: state[name] for name in (*parts_of(AVERAGE), "live") if name in state}

    def __iter__(self) -> Iterator[Tensor]:
        return iter([p for p, state in self._optimizer.state.items() if STEP in state])

    def __len__(self) -> int:
        return len(list(iter(self)))
