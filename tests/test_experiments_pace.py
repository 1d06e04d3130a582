"""Promise: the experiment runs every stage, goes on where it was ended, and its page needs the JSON alone."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "bench/experiments"


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    import lm
    import pace

    monkeypatch.setattr(lm, "VALIDATION_WINDOWS", 2)
    yield pace
    for name in set(sys.modules) - before:  # `pace`, `lm`, `runs` are names that others may have
        if getattr(sys.modules[name], "__file__", None) and FOLDER in Path(sys.modules[name].__file__ or "").parents:
            del sys.modules[name]


def test_all_stages_and_resuming(
    pace: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pace.main(["--quick", "--processes", "0", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {"pace.json", "pace-sweep.png", "pace-curves.png"}
    kept = json.loads((tmp_path / "pace.json").read_text())
    assert {run["spec"]["optimizer"] for run in kept["runs"].values()} == {"AdamW", "PACE", "schedule-free"}
    assert pace.render(kept, pace.QUICK) in printed
    for method in pace.METHODS:
        assert f"| constant | {method} |" in printed

    # Ended after all but one run, it does that one alone.
    ran: list[Any] = []
    real = pace.run
    monkeypatch.setattr(pace, "run", lambda spec: ran.append(spec) or real(spec))
    lost = next(key for key in kept["runs"] if key.startswith("budgets, PACE"))
    expected = kept["runs"].pop(lost)
    (tmp_path / "pace.json").write_text(json.dumps(kept))
    pace.main(["--quick", "--processes", "0", "--out", str(tmp_path)])
    again = json.loads((tmp_path / "pace.json").read_text())
    assert ran == [expected["spec"]] and again["runs"][lost]["result"] == expected["result"]

    kept["about"]["corpus"]["sha256"] = "another"
    (tmp_path / "pace.json").write_text(json.dumps(kept))
    with pytest.raises(SystemExit, match="corpus"):
        pace.main(["--quick", "--processes", "0", "--out", str(tmp_path)])


def test_schedules(pace: ModuleType) -> None:
    lm = sys.modules["lm"]
    for schedule in pace.SCHEDULES:
        rates = [lm.factor(schedule, step, 100) for step in range(1, 101)]
        assert rates[:10] == [(i + 1) / 10 for i in range(10)] and max(rates) == 1.0
    assert lm.factor("constant", 100, 100) == 1.0
    assert lm.factor("cosine", 100, 100) == pytest.approx(0.1)
    assert lm.factor("wsd", 80, 100) == 1.0 and lm.factor("wsd", 90, 100) == 0.5 and lm.factor("wsd", 100, 100) == 0.0


def test_a_branch_leaves_its_trunk_as_it_was(pace: ModuleType) -> None:
    lm = sys.modules["lm"]
    spec = {"optimizer": "AdamW", "lr": 1e-3, "seed": 3, "averages": ["EMA 0.9"]}
    losses = []
    for branches in (False, True):
        training = lm.Training(spec)
        for _ in range(3):
            training.step(1.0)
        if branches:
            restore = training.snapshot()
            training.step(0.5)
            restore()
        losses.append([training.step(1.0), training.losses()])
    assert losses[0] == losses[1]


def test_differences_are_paired_by_seed(pace: ModuleType) -> None:
    mean, error, count = pace.paired([1.0, 2.0, math.inf, 4.0], [0.5, 1.0, 1.0, 2.5])
    assert (mean, count) == (1.0, 3) and error == pytest.approx(0.5 / math.sqrt(3))
    assert pace.verdict(-1.0, 0.1, 4) == "better" and pace.verdict(1.0, 0.1, 4) == "worse"
    assert "no difference" in pace.verdict(0.3, 0.1, 4) and "one seed" in pace.verdict(1.0, math.nan, 1)
