"""The rules by the names of their operators: a new rule is a new row."""

from __future__ import annotations

from .. import definitions
from ..definitions.kit import PACE_STATS
from . import (
    mada_coded_kernel,
    mada_kernel,
    pace_coded_kernel,
    pace_kernel,
    pullback_coded_kernel,
    pullback_kernel,
    schedule_free_coded_kernel,
    schedule_free_kernel,
)
from .launch import Rule, Summed


def _ending(end: str) -> int:
    return sum(1 << k for k, name in enumerate(PACE_STATS) if name.endswith(end))


_STATISTICS = Summed(
    *("stats", "stats", 6, pace_kernel.store_statistics, 16, len(PACE_STATS), _ending("_min"), _ending("_max"))
)
_HYPERGRADIENTS = Summed("lag", "hypergradients", 6, mada_kernel.store_hypergradients, 8, 6)

# PACE takes 46 to 55 registers, with eight elements of bfloat16 a thread (16 bytes) 68 to 80: four (three) programs of
# 8 warps fit on an SM. MADA with everything learned takes 184: with 168, and nothing spilled, three programs of 4 warps
# fit instead of two. With eight elements it would take 255 and spill, so weights and gradients in bfloat16, 6 of its 58
# bytes an element, are moved 8 bytes at a time. ptxas 12.8 and 13, sm_80 to sm_120.
_RULES = (
    Rule(definitions.PACE, pace_kernel, _STATISTICS),
    Rule(definitions.MADA, mada_kernel, _HYPERGRADIENTS, numbers="coefficients", warps=4, narrow=4, registers=168),
    Rule(definitions.PULLBACK, pullback_kernel, _STATISTICS),
    Rule(definitions.SCHEDULE_FREE, schedule_free_kernel, numbers="schedule"),
)
RULES = {rule.definition.op: rule for rule in _RULES}
# Of calls with operands in the formats of codes.py. MADA with everything learned takes 166 registers on sm_90, and with
# an average that pulls 222, so that two programs fit on an SM: with 168 it would spill.
_CODED = (
    Rule(definitions.PACE, pace_coded_kernel, _STATISTICS, coded=True),
    Rule(definitions.MADA, mada_coded_kernel, _HYPERGRADIENTS, numbers="coefficients", warps=4, narrow=4, coded=True),
    Rule(definitions.PULLBACK, pullback_coded_kernel, _STATISTICS, coded=True),
    Rule(definitions.SCHEDULE_FREE, schedule_free_coded_kernel, numbers="schedule", coded=True),
)
CODED = {rule.definition.op: rule for rule in _CODED}
