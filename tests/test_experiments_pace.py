"""Promise: the experiment runs every stage, goes on where it was ended, and its page needs the JSON alone."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from experiments import imported

import pace_kernels


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with imported("pace", monkeypatch) as found:
        yield found


def test_all_stages_and_resuming(
    pace: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pace.main(["--quick", "--processes", "0", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {"pace.json", "pace-sweep.webp", "pace-curves.webp"}
    kept = json.loads((tmp_path / "pace.json").read_text())
    assert {run["spec"]["optimizer"] for run in kept["runs"].values()} == {"AdamW", "PACE", "schedule-free"}
    assert pace.render(kept, pace.QUICK) in printed
    for method in pace.METHODS:
        assert f"| constant | {method} |" in printed
    assert all(run["made"].endswith(f"pace_kernels {pace_kernels.__version__}") for run in kept["runs"].values())
    assert f"{len(kept['runs'])} runs: {kept['runs'][next(iter(kept['runs']))]['made']}" in printed

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

    for name, part in (("corpus", "sha256"), ("task", "batch")):
        other = copy.deepcopy(kept)
        other["about"][name][part] = "another"
        (tmp_path / "pace.json").write_text(json.dumps(other))
        with pytest.raises(SystemExit, match=f"was made with {name} ="):
            pace.main(["--quick", "--processes", "0", "--out", str(tmp_path)])


def test_schedules(pace: ModuleType) -> None:
    lm = sys.modules["lm"]
    for schedule in pace.SCHEDULES:
        rates = [lm.factor(schedule, step, 100) for step in range(1, 101)]
        assert rates[:10] == [(i + 1) / 10 for i in range(10)] and max(rates) == 1.0
    assert lm.factor("constant", 100, 100) == 1.0
    assert lm.factor("cosine", 100, 100) == pytest.approx(0.1)
    power = [lm.factor("power", step, 100) for step in range(1, 101)]
    assert power.index(max(power)) == 9  # with no leap at the end of the warm-up
    assert max(power) == pytest.approx(11**-0.2) and power[99] == pytest.approx(101**-0.2)
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
    mean, error, count = pace.paired([1.0, 2.0, math.nan, 4.0], [0.5, 1.0, 1.0, 2.5])  # a run is missing
    assert (mean, count) == (1.0, 3) and error == pytest.approx(0.5 / math.sqrt(3))
    assert pace.verdict(-1.0, 0.1, 4) == "better" and pace.verdict(1.0, 0.1, 4) == "worse"
    assert "no difference" in pace.verdict(0.3, 0.1, 4) and "one seed" in pace.verdict(1.0, math.nan, 1)
    for count, critical in pace.CRITICAL.items():
        assert pace.verdict(-1.01 * critical, 1.0, count) == "better"
        assert "no difference" in pace.verdict(-0.99 * critical, 1.0, count)


def test_one_seed_that_diverged_is_not_left_out(pace: ModuleType) -> None:
    fine, lost = [1.0, 2.0, 3.0], [0.1, math.inf, 0.1]
    assert pace.verdict(*pace.paired(lost, fine)) == "diverged" == pace.cost(*pace.paired(lost, fine))
    assert pace.verdict(*pace.paired(fine, lost)) == "the other one diverged" == pace.cost(*pace.paired(fine, lost))
    assert pace.spread(lost) == "0.1000 ± 0.0000 (1 of 3 diverged)" and pace.spread(lost[1:2]) == "1 of 1 diverged"


def invented(pace: ModuleType, spec: dict[str, Any]) -> dict[str, Any]:
    """PACE 0.1 below the others with its strongest pull, best at 8e-3; AdamW at 2e-3, and 4e-2 a factor of 2 away."""
    ours, options = spec["optimizer"] == "PACE", spec.get("options", {})
    loss = 2.0 + 0.01 * spec["seed"] + 0.04 * abs(math.log2(spec["lr"] / (8e-3 if ours else 2e-3)))
    if ours and not (set(options) - {"lambda_pullback", "ema_kappa"}):
        loss -= 0.1 * (options["lambda_pullback"] >= 12) + 0.001 * spec["seed"] ** 2 * (-1) ** spec["seed"]
    names = ["average"] if spec["optimizer"] != "AdamW" else ["live", *spec["averages"]]
    if spec.get("task") == "budgets":
        return {"losses": {str(budget): dict.fromkeys(names, loss) for budget in spec["budgets"]}}
    series = {"lambda_clipped_frac": [0.25] * (spec["evaluations"] - 1) + [0.75]} if ours else {}
    steps = [round(spec["steps"] * (i + 1) / spec["evaluations"]) for i in range(spec["evaluations"])]
    return {"steps": steps, "losses": {name: [loss] * len(steps) for name in names}, "series": series}


def test_sentences_follow_the_numbers(pace: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "run", lambda spec: invented(pace, spec))
    path = tmp_path / "pace.json"
    said = pace.render(pace.run_all(path, pace.FULL, 0))
    for schedule in pace.SCHEDULES:
        assert f"| {schedule} | PACE | 100 | lr 0.008, λ 12.8, κ 0.1 |" in said
        assert f"- {schedule}: PACE − AdamW + EMA = -0.1035 ± 0.0086 nats per byte (6 seeds): better." in said
        assert f"- {schedule}: at PACE's best cell 25.0 % of the coordinates are clamped at the first" in said
    assert "Control: PACE at a constant rate − AdamW at a rate that falls as PACE's averaging weight = -0.1035" in said
    assert "PACE, default λ − AdamW + EMA = -0.0035 ± 0.0086 nats per byte (6 seeds): no difference that" in said
    for method in ("AdamW", "AdamW + EMA", "PACE"):
        assert f"| {method} | +0.0800 ± 0.0000 | +0.0400 ± 0.0000 | +0.0400 ± 0.0000 | +0.0800 ± 0.0000 |" in said
    assert "| no clamp | +0.1025 ± 0.0052 | worse |" in said

    kept = pace.load(path)  # PACE diverges on one seed
    for run in kept["runs"].values():
        if run["spec"]["optimizer"] == "PACE" and run["spec"]["seed"] == 2 and "steps" in run["spec"]:
            run["result"]["losses"]["average"][-1] = None
    said = pace.render(kept)
    assert "constant: PACE − AdamW + EMA = (6 seeds): diverged." in said


def test_a_file_that_does_not_say_what_it_was_made_with_is_refused(pace: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "pace.json"
    runs = {"x": {"spec": {}, "result": {}, "seconds": 1.0, "made": "here"}}
    path.write_text(json.dumps({"about": {}, "runs": runs}))
    with pytest.raises(SystemExit, match="was made with corpus = None"):
        pace.run_all(path, pace.QUICK, 0)
