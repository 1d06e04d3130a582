"""Cases out of a product of axes that is too large for every run. `make test-full` (PACE_FULL=1) takes all of it."""

from __future__ import annotations

import datetime
import itertools
import os
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

FULL = os.environ.get("PACE_FULL", "0") not in ("", "0")


def day() -> int:
    """The seed of the samples: the day's number, so that every day tries others; one and the same in CI, where a change
    must not fail for a case that it did not touch; or PACE_DAY, to run another day's sample again."""
    if given := os.environ.get("PACE_DAY"):
        return int(given)
    return 0 if os.environ.get("CI") else datetime.date.today().toordinal()


def pairs_and_seed(
    *axes: Iterable[Any], sample: int = 16, allowed: Callable[..., bool] | None = None, full: bool = FULL
) -> list[tuple[Any, ...]]:
    """Cases of the product of the axes for which ``allowed(*case)`` holds, in the order of the product: so many that
    every pair of values of two axes which is in an allowed case is in one of these, and ``sample`` others by the seed
    of the day. All of them where ``full``.

    For ``@pytest.mark.parametrize(("dtype", "layout", "clip"), pairs_and_seed(DTYPES, LAYOUTS, CLIPS))``.
    """
    values = [list(axis) for axis in axes]
    # By position, since values (dicts of options, tensors) need not be hashable.
    places = itertools.product(*(range(len(axis)) for axis in values))
    rows, cases = [], []
    for row, case in zip(places, itertools.product(*values), strict=True):
        if allowed is None or allowed(*case):
            rows.append(row)
            cases.append(case)
    if full:
        return cases
    chosen = _covering(rows)
    rest = [n for n in range(len(cases)) if n not in chosen]
    also = random.Random(day()).sample(rest, min(sample, len(rest)))
    return [cases[n] for n in sorted([*chosen, *also])]


def _covering(rows: Sequence[tuple[int, ...]]) -> set[int]:
    """Greedily: the row that brings the most pairs (of one column's value, where there is one column) that none brought
    yet, until none brings any. What a row brings only shrinks, so most rows need not be counted again."""
    width = min(2, len(rows[0])) if rows else 0
    pairs = [frozenset(itertools.combinations(enumerate(row), width)) for row in rows]
    bound = [len(p) for p in pairs]
    covered: set[tuple[tuple[int, int], ...]] = set()
    chosen: set[int] = set()
    while True:
        best, best_gain = -1, 0
        for n, most in enumerate(bound):
            if most > best_gain:
                bound[n] = len(pairs[n] - covered)
                if bound[n] > best_gain:
                    best, best_gain = n, bound[n]
        if best < 0:
            return chosen
        chosen.add(best)
        covered |= pairs[best]
