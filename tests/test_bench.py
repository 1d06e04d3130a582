"""The scripts of bench, examples and research run, and count bytes as documented. What they measure is not tested."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
pytest.importorskip("matplotlib", reason="the scripts under bench/ draw")


@pytest.mark.parametrize(
    ("script", "written"),
    [
        ("bench/bench_step.py", ("step.json", "step.webp")),
        ("bench/bench_sharded.py", ("sharded.json",)),
        ("research/convex.py", ("convex.json", "convex.webp")),
        ("research/theory.py", ("theory.json", "theory.webp")),
        ("examples/train_lm.py", ("results.json", "loss.png")),
    ],
)
def test_script_runs_and_leaves_its_files(script: str, written: tuple[str, ...], tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / script), "--quick", "--out", str(tmp_path)],
        cwd=ROOT,
        # Greek letters in tables, whatever the locale. One thread: on a busy machine, which a test must bear, several
        # spend their time waiting for each other.
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    numbers, *pictures = (tmp_path / name for name in written)
    assert json.loads(numbers.read_text(encoding="utf-8"))
    magic = {".png": slice(1, 4), ".webp": slice(8, 12)}
    for picture in pictures:
        assert picture.read_bytes()[magic[picture.suffix]].decode().lower() == picture.suffix[1:]


def test_offload_beside_what_it_is_made_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import bench_offload

    assert bench_offload.main(["--quick", "--device", "cpu", "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("| Offload(PACE) |", "| PACE on the CPU |", "| their sum |"))


def test_whole_training_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import throughput

    assert throughput.main(["--size", "tiny", "--rounds", "2", "--steps", "1", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("throughput-*.json")
    report = json.loads(path.read_text())
    assert report["rows"].keys() == {"none", *throughput.ROWS, *throughput.HOOKED} and report["rounds"] == 2
    missing = {key for key, row in report["rows"].items() if "seconds_median" not in row}
    assert missing <= {"torchao-offload"}
    assert report["rows"][throughput.REFERENCE]["ratio_to_adamw_fused"] == 1.0
    parameters = report["parameters"]
    for key, bytes_each in {
        "none": 0,
        "adamw-fused": 8,
        "adamw-ema-foreach": 12,
        "pace": 12,
        "pace-in-backward": 12,
    }.items():
        assert parameters * bytes_each <= report["rows"][key]["state_bytes"] <= parameters * bytes_each + 10_000
    for row in report["rows"].values():
        assert f"| {row['name']} |" in throughput.as_markdown(report)


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return pytest.importorskip("harness")


def test_rounds_of_slow_calls_are_among_those_of_faster_ones(harness: ModuleType) -> None:
    for rounds in (1, 5, 16, 21):
        chosen = [harness.spread_out(rounds, n) for n in range(rounds + 1)]
        assert [len(some) for some in chosen] == list(range(rounds + 1)) and chosen[-1] == set(range(rounds))
        assert all(fewer < more for fewer, more in itertools.pairwise(chosen))
    assert {min(round_ // 4, 3) for round_ in harness.spread_out(16, 4)} == {0, 1, 2, 3}  # over all of them


@pytest.fixture
def bench_step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return pytest.importorskip("bench_step")


def test_moved_bytes(harness: ModuleType) -> None:
    assert harness.moved_bytes(torch.float32, 3) == 36
    assert harness.moved_bytes(torch.bfloat16, 3) == 30
    assert harness.moved_bytes(torch.float32, 2, state_dtype=None) == 28
    assert harness.moved_bytes(torch.bfloat16, 2, state_dtype=None) == 14
    assert harness.moved_bytes(torch.float32, 6, read_only=1) == 64


@pytest.mark.parametrize(
    ("key", "float32", "bfloat16"),
    [
        ("pace", 36, 30),
        ("adamw-fused", 28, 14),
        ("mada", 64, 58),
        ("mada-autograd", 64, 58),
        ("mada-adamw", 28, 22),
        ("pullback-adamw", 60, 34),
        ("pullback-adamw-0", 40, 24),
        ("pullback-sgd-0", 24, 16),
    ],
)
def test_rows_move_the_documented_bytes(bench_step: ModuleType, key: str, float32: int, bfloat16: int) -> None:
    (row,) = (row for row in bench_step.ROWS if row.key == key)
    assert (row.moved(torch.float32), row.moved(torch.bfloat16)) == (float32, bfloat16)


@pytest.mark.parametrize(
    "key",
    [
        "pace",
        "adamw-fused",
        "mada",
        "mada-adamw",
        "mada-autograd",
        "pullback-adamw",
        "pullback-adamw-0",
        "pullback-sgd-0",
    ],
)
def test_rows_hold_the_documented_bytes(bench_step: ModuleType, harness: ModuleType, key: str) -> None:
    """Step counts and the like aside, which are a few numbers a tensor."""
    (row,) = (row for row in bench_step.ROWS if row.key == key)
    parameters = harness.make_parameters([(10_000,)], torch.float32, torch.device("cpu"))
    contender = row.make(parameters)
    for _ in range(2):
        contender.step()
    assert harness.bytes_of(contender.state()) / 10_000 == pytest.approx(row.held(torch.float32), abs=0.05)


def test_steps_on_a_gpu_are_timed_by_events(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device that does what it is told at once: it shows what is timed, and what is not."""
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.at - self.at)

    def advance(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: advance(0.5))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: advance(cycles / 2e9), raising=False)
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])
    device = torch.device("cuda")
    sample = harness.timed(lambda: advance(2.0), device, steps=3, before=lambda: advance(100.0), hidden_s=7.0)
    assert sample == (pytest.approx(2.0), pytest.approx(2.0), pytest.approx(2.5))  # on an idle device to its end


def test_adapters_are_many_small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import throughput

    assert 8 * throughput.SIZES["lora"][0].layers >= 400
    training = throughput.Training("tiny-lora", torch.device("cpu"))
    assert len(training.parameters) == 8 * throughput.SIZES["tiny-lora"][0].layers
    training.step(None)
    assert {p.requires_grad for p in training.model.parameters()} == {False, True}


def row(harness: ModuleType, key: str, held: int) -> object:
    return harness.Row(key, key, lambda parameters: None, lambda dtype: 0, lambda dtype: held)


def test_rows_that_do_not_fit_together_take_turns(harness: ModuleType) -> None:
    rows = [row(harness, "anchor", 3), row(harness, "a", 4), row(harness, "b", 4), row(harness, "c", 8)]

    def waves(budget: int) -> list[list[str]]:
        def fits(some: list) -> bool:
            return sum(r.held(torch.float32) for r in some) <= budget

        return [[r.key for r in wave] for wave in harness.waves(rows, ("anchor",), fits)]

    assert waves(19) == [["anchor", "a", "b", "c"]]
    assert waves(11) == [["anchor", "a", "b"], ["anchor", "c"]]
    assert waves(8) == [["anchor", "a"], ["anchor", "b"], ["c"]]  # no room for the anchor beside c


def test_autograd_mada_computes_what_the_kernels_do(monkeypatch: pytest.MonkeyPatch, harness: ModuleType) -> None:
    """A baseline that computed something else would be none. Float32, every coefficient in play."""
    monkeypatch.syspath_prepend(str(BENCH))
    from baselines import AutogradMADA

    from pace_kernels import MADA

    generator = torch.Generator().manual_seed(0)
    options = {"lr": 1e-3, "beta3": 0.5, "rho": 0.4, "c": 0.6, "gamma": 0.7, "hyper_warmup": 2}
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((500,), (7, 3))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    mada, autograd = MADA(ours, **options), AutogradMADA(theirs, **options)
    for _ in range(6):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = 0.1 * torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        mada.step()
        autograd.step()
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    found = torch.tensor(list(mada.hypergradients.values()), dtype=torch.float64)
    torch.testing.assert_close(autograd.hypergradients, found, rtol=1e-4, atol=1e-7)
    learned = torch.tensor(list(mada.coefficients.values()), dtype=torch.float64)
    torch.testing.assert_close(autograd.q, learned, rtol=0, atol=1e-7)
