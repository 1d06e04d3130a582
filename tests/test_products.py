"""Promise: a part of a product (tests/products.py) leaves out no pair of values, and what it samples is the day's."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from products import pairs_and_seed

SHAPES = {
    "one axis": (4,),
    "two axes": (3, 5),
    "equal axes": (3, 3, 3, 3),
    "unequal axes": (7, 2, 5, 3, 2),
    "an axis of one value": (1, 4, 4),
}


def pairs(cases: list[tuple[int, ...]]) -> set[tuple[tuple[int, int], ...]]:
    return {pair for case in cases for pair in itertools.combinations(enumerate(case), min(2, len(case)))}


def odd_sum(*case: int) -> bool:
    return sum(case) % 2 == 1


@pytest.mark.parametrize("allowed", [None, odd_sum])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_pair_that_the_product_has_is_there(shape: tuple[int, ...], allowed) -> None:
    whole = [case for case in itertools.product(*map(range, shape)) if allowed is None or allowed(*case)]
    part = pairs_and_seed(*map(range, shape), sample=0, allowed=allowed, full=False)
    assert pairs(part) == pairs(whole)
    assert set(part) <= set(whole) and part == sorted(set(part))
    assert pairs_and_seed(*map(range, shape), allowed=allowed, full=True) == whole


def test_it_is_a_small_part() -> None:
    """5 axes of 4 values: 1024 cases, of which at least 16 are needed; a greedy choice takes some more."""
    part = pairs_and_seed(*[range(4)] * 5, sample=0, full=False)
    assert 16 <= len(part) <= 32
    assert len(pairs_and_seed(*[range(4)] * 5, sample=10, full=False)) == len(part) + 10


def test_the_sample_is_of_the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(day: str) -> list[tuple[int, ...]]:
        monkeypatch.setenv("PACE_DAY", day)
        return pairs_and_seed(*[range(4)] * 5, sample=10, full=False)

    assert on("1") == on("1") != on("2")
    monkeypatch.delenv("PACE_DAY")
    monkeypatch.setenv("CI", "true")
    assert pairs_and_seed(*[range(4)] * 5, sample=10, full=False) == on("0")


def test_values_need_not_be_hashable_and_no_case_is_no_error() -> None:
    options = [{"lr": 1.0}, {"lr": 2.0}]
    assert pairs_and_seed(options, [[1], [2]], full=False) == list(itertools.product(options, [[1], [2]]))
    assert pairs_and_seed(options, [1], allowed=lambda *_: False, full=False) == []


@pytest.mark.parametrize(("value", "full"), [("1", True), ("0", False), ("", False)])
def test_pace_full_takes_the_whole(value: str, full: bool) -> None:
    code = "from products import pairs_and_seed as p; print(len(p(*[range(3)] * 4, sample=0)) == 81)"
    environment = {**os.environ, "PACE_FULL": value}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert done.stdout == f"{full}\n", done.stderr
