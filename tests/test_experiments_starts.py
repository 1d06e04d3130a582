"""Promise: the experiment on MADA's starts runs every setting that it says, chooses before it reports, and MADA-FS gets
what MADA learned."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from experiments import imported


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with imported("starts", monkeypatch) as found:
        yield found


def test_every_setting(starts: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(starts, "WINDOWS", 2)
    monkeypatch.setitem(starts.TASKS["GPT"], "starts", starts.STARTS[1:2])
    mada = starts.lm.OPTIMIZERS["MADA"]  # learning begins after 50 steps; here at once

    def early(groups: Any, lr: float, **options: Any) -> Any:
        return mada(groups, lr, **options, **({} if "learn" in options else {"hyper_warmup": 0}))

    monkeypatch.setitem(starts.lm.OPTIMIZERS, "MADA", early)
    assert starts.main(["--quick", "--processes", "0", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    kept = sys.modules["runs"].load(tmp_path / "starts.json")
    # 4 methods of each task: 2 rates on a seed, then on 2 others the chosen one, or both.
    assert len(kept["runs"]) == 4 * (2 + 2) + 4 * (2 + 2 * 2) and "not whole" not in said and "nan" not in said
    for task in starts.TASKS:
        for row in starts.rows(kept, task):
            assert {run["spec"]["text"] for run in kept["runs"].values() if run["spec"] in row.report} == {"test"}
            losses = [starts.loss_of(kept["runs"][sys.modules["runs"].key_of(s)]["result"]) for [s] in row.search]
            assert row.rate == row.rates[losses.index(min(losses))]
    rows = {row.method: row for row in starts.rows(kept, "GPT")}
    for learned, fixed in zip(rows["MADA"].reported(), rows["MADA-FS"].report, strict=True):
        ends = learned["series"]
        assert ends["beta3"] != 0.9  # it has moved
        betas = [ends["beta1"], ends["beta2"]]
        assert fixed["options"] == {"betas": betas, "learn": [], **{name: ends[name] for name in list(ends)[2:]}}
    del kept["runs"][sys.modules["runs"].key_of(rows["AdamW"].report[0])]
    assert "1 of 4 rows are not whole yet" in starts.render(kept)


def test_divergence(starts: ModuleType) -> None:
    assert starts.loss_of({"loss": None}) == float("inf")
    assert starts.difference([1.0, 2.0], [1.5, float("inf")]) == "a seed diverged"
    assert starts.difference([1.0, 1.5], [1.25, 1.25]) == "+0.0000 ± 3.1775"
