"""Promise: the experiment on compressed states runs all that it says, compares averages of the very same weights, and
its sentences follow from the numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from experiments import imported


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with imported("storage", monkeypatch) as found:
        yield found


def test_all_parts(storage: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert storage.main(["--quick", "--processes", "0", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    kept = json.loads((tmp_path / "storage.json").read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["storage.json"]
    assert storage.render(kept, storage.QUICK) in printed
    for name in (*storage.OURS, *storage.OTHERS, *storage.WHOLE):
        assert f"| {name} | " in printed
    for text in ("not run", "nan", "diverged"):
        assert text not in printed
    # Weights, moments and averages in these formats hold what they say, small tensors included.
    for name, least in (("float32", 16), ("master 32, states 8", 7.09), ("master 24, states 8", 6.09)):
        (its, _) = (storage.result(kept, spec) for spec in storage.QUICK.whole(name))
        assert least <= its["bytes"] <= 1.03 * least, name


def test_float32_with_master_weights_is_float32_for_the_same_gradients(storage: ModuleType) -> None:
    """So the reference and what stands beside it train alike but for the weights that are shown."""
    spec = {**storage.QUICK.whole("master 32, states 32")[0], "lr": 4e-3}
    narrow, wide = storage.Whole(spec), storage.Whole({**spec, "weights": "float32", "options": storage.PULL})
    shared = [torch.randn_like(p).bfloat16().float() for p in wide.model.parameters()]
    start = [p.detach().bfloat16().float() for p in wide.model.parameters()]
    for training in (narrow, wide):
        for p, g, x in zip(training.model.parameters(), shared, start, strict=True):
            p.grad = g.clone()
            p.data.copy_(x)
        training.optimizer.step()
    masters = narrow.optimizer.master_state_dict(narrow.trained)
    for name, p in wide.model.named_parameters():
        assert torch.equal(p, masters[name])
        assert torch.equal(dict(narrow.model.named_parameters())[name], p.bfloat16().float())


def test_weights_that_part_are_noticed(storage: ModuleType) -> None:
    training = storage.Beside(storage.QUICK.averages()[0])
    training.step(1.0)
    training.measure()
    with torch.no_grad():
        next(training.model.parameters()).add_(1e-6)
    with pytest.raises(RuntimeError, match="beside which grid, 16 bits lies are no longer the same"):
        training.measure()


def test_formats_of_others(storage: ModuleType) -> None:
    """Each stores what its format can, and moves as it says."""
    n, generator = 32 * 256, torch.Generator().manual_seed(1)
    x = torch.randn(n, generator=generator)
    to = x + 0.01 * torch.randn(n, generator=generator)
    exact = x + 0.25 * (to - x)
    off = {}
    for name, new in storage.OTHERS.items():
        average = new(x.bfloat16().float(), 1) if "bfloat16" in name else new(x, 1)
        average.update(x, to, 0.25)
        off[name] = (average.value(to) - exact).abs()
    assert torch.equal(storage.Bfloat16(x).value(x), x.bfloat16().float())
    largest = (exact - to).view(-1, 32).abs().amax(1, keepdim=True).expand(-1, 32).flatten()
    assert bool((off["int8 difference, nearest"] <= largest / 127 + 1e-6).all())  # half a step, of up to twice as much
    assert bool((off["int8 softsign difference, nearest"] <= 1.01 * largest / 127 + 1e-6).all())
    assert bool((off["bfloat16, dithered"] < 2.0**-7 * exact.abs() + 0.01).all())
    # A dithered average is right in the mean, and one to the nearest stays where it is.
    e = [torch.full((2**14,), 1.0), torch.full((2**14,), 1.0)]
    kinds = [storage.Bfloat16(e[0], 1), storage.Bfloat16(e[1])]
    for average in kinds:
        for _ in range(100):
            average.update(e[0], torch.full((2**14,), 1.1), 1e-3)
    assert abs(kinds[0].value(e[0]).mean() - (1.1 - 0.1 * 0.999**100)) < 2e-4
    assert torch.equal(kinds[1].value(e[1]), e[1])


def test_bands(storage: ModuleType) -> None:
    band = storage.BAND
    for found, said in (
        ((0.0, 0.0), "inside"), ((0.4 * band, 0.3 * band), "inside"),
        ((-0.4 * band, 0.31 * band), "its mean is inside"),
        ((1.4 * band, 0.3 * band), "its mean is outside"), ((-1.7 * band, 0.3 * band), "**outside**"),
        ((math.inf, math.nan), "diverged"), ((math.nan, math.nan), "not run"),
    ):  # fmt: skip
        assert storage.verdict_of_band(found) == said
    for found, said in (
        ((0.02, 0.01), "no loss to be seen"), ((-0.1, 0.01), "no loss to be seen"), ((0.0201, 0.01), "**a loss**"),
        ((math.inf, math.nan), "**diverged**"), ((math.nan, math.nan), "not run"),
    ):  # fmt: skip
        assert storage.verdict_of_control(found) == said
    assert storage.difference([1.0, 2.0], [0.5, 1.0]) == (0.75, pytest.approx(0.25))
    assert storage.difference([1.0, math.inf], [1.0, 1.0])[0] == math.inf
    assert math.isnan(storage.difference([1.0, math.nan], [1.0, 1.0])[0])


def invented(storage: ModuleType, spec: dict[str, Any]) -> dict[str, Any]:
    noise = 1e-4 * (-1) ** spec["seed"]
    if spec["task"] == "averages":
        off = {
            "24 bits, dithered": -0.003,
            "grid, 8 bits": 0.001,
            "bfloat16, nearest": 1.0,
            "int8 difference, nearest": 0.00205,
        }
        names = [storage.REFERENCE, *storage.OURS, *storage.OTHERS]
        losses = {n: [2.5 + (1 + noise) * off.get(n, 0.0)] * 3 for n in names}
        return {
            "steps": [800, 1600, 2400],
            "loss": losses,
            "ahead": {n: [0.25] * 3 for n in names},
            "off": {n: [0.5] * 3 for n in names},
        }
    if spec["task"] == "whole":
        bits = spec["options"].get("state_bits", 32)
        return {"average": 2.5 + (0.01 if bits == 8 else 0.0) + noise * (bits % 3), "live": 2.4, "bytes": 7.0}
    return {when: [[0.001, 0.5, 0.1], [1.0, 1.0, 0.07]] for when in ("steady", "fallen")}


def test_sentences_follow_the_numbers(storage: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "run", lambda spec: invented(storage, spec))
    kept = storage.run_all(tmp_path / "storage.json", storage.FULL, 0)
    assert len(kept["runs"]) == 4 + 4 + 8 * len(storage.WHOLE)
    said = storage.render(kept)
    assert (
        "| grid, 16 bits | 2.03 | +0.00000 ± 0.00000 |" in said and "| grid, 8 bits | 1.03 | +0.0010 ± 0.0000 |" in said
    )
    assert "Of the formats of others bfloat16, nearest differs most in loss at the end: +1.0000 ± 0.0001." in said
    assert "24 bits, dithered: beyond the band with -0.0030 ± 0.0000 at 800 steps and -0.0030 ± 0.0000 at 1,600" in said
    assert "ahead of the float32 average by +25.00 % and +25.00 % and +25.00 % of the way" in said
    assert "Grid, 8 bits: beyond" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("| int8 difference, nearest")]
    assert line.endswith("| **outside** | 25.00 | 50.00 |")
    (line,) = [line for line in said.splitlines() if line.startswith("| master 24, states 8")]
    assert "**a loss**" in line and line.endswith("| +0.0101 |")
    (line,) = [line for line in said.splitlines() if line.startswith("| master 32, states 16")]
    assert "no loss to be seen" in line
    assert "| 8, 0.999 | fallen | 1.00 ± 0.07 | 0.50 ± 0.10 |" in said

    for run in kept["runs"].values():  # one run diverges
        if run["spec"].get("seed") == 103 and run["spec"].get("options", {}).get("state_bits") == 16:
            run["result"]["average"] = None
    said = storage.render(kept)
    assert all(word in said for word in ("**diverged**", "inf"))
