"""Promise: the experiment on PACE's strength runs every setting that it says, and judges its rules by the numbers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from experiments import imported


@pytest.fixture
def strength(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with imported("strength", monkeypatch) as found:
        yield found


def test_every_setting(strength: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(strength, "SETTINGS", ((1, 64), (2, 32)))
    assert strength.main(["--quick", "--processes", "0", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    kept = sys.modules["runs"].load(tmp_path / "strength.json")
    assert len(kept["runs"]) == 2 * len(strength.STRENGTHS) * len(strength.SEEDS)
    assert "| 2 | 32 | " in said and "all clamped" in said and "nan" not in said
    shares = [share for _, share in strength.found(kept, (1, 64), strength.EVALUATIONS)]
    assert shares[0] == 0.0 and shares[-1] > 0.99 and shares == sorted(shares)
    del kept["runs"][next(iter(kept["runs"]))]
    assert strength.render(kept) == "Incomplete: 27 of 28 runs. Nothing is judged before all are there.\n"


def test_rules_cost_what_they_lose(strength: ModuleType) -> None:
    table = [[(2.0, 0.0), (1.9, 0.2), (1.8, 0.6)], [(1.5, 0.0), (1.4, 0.6), (1.6, 0.9)]]
    assert strength.costs(table, lambda _: 2) == pytest.approx(0.2)
    assert strength.costs(table, lambda rows: strength.nearest(0.5, rows)) == 0.0
