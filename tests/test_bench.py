"""The scripts under bench/ run, and count bytes as documented. What they measure is not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"
pytest.importorskip("matplotlib", reason="the scripts under bench/ draw")


@pytest.mark.parametrize(
    ("script", "written"),
    [
        ("bench_step.py", ("step.json", "step.png")),
        ("convex.py", ("convex.json", "convex.png")),
        ("train_lm.py", ("results.json", "loss.png")),
    ],
)
def test_script_runs_and_leaves_its_files(script: str, written: tuple[str, str], tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(BENCH / script), "--quick", "--out", str(tmp_path)],
        cwd=BENCH.parent,
        # Greek letters in tables, whatever the locale. One thread: on a busy machine, which a test must bear, several
        # spend their time waiting for each other.
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    numbers, picture = (tmp_path / name for name in written)
    assert json.loads(numbers.read_text(encoding="utf-8"))
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return pytest.importorskip("harness")


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
    [("pace", 36, 30), ("adamw-fused", 28, 14), ("mada", 64, 58), ("mada-autograd", 64, 58), ("mada-adamw", 28, 22)],
)
def test_rows_move_the_documented_bytes(bench_step: ModuleType, key: str, float32: int, bfloat16: int) -> None:
    (row,) = (row for row in bench_step.ROWS if row.key == key)
    assert (row.moved(torch.float32), row.moved(torch.bfloat16)) == (float32, bfloat16)


@pytest.mark.parametrize("key", ["pace", "adamw-fused", "mada", "mada-adamw", "mada-autograd"])
def test_rows_hold_the_documented_bytes(bench_step: ModuleType, harness: ModuleType, key: str) -> None:
    """Step counts and the like aside, which are a few numbers a tensor."""
    (row,) = (row for row in bench_step.ROWS if row.key == key)
    parameters = harness.make_parameters([(10_000,)], torch.float32, torch.device("cpu"))
    contender = row.make(parameters)
    for _ in range(2):
        contender.step()
    assert harness.bytes_of(contender.state()) / 10_000 == pytest.approx(row.held(torch.float32), abs=0.05)


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
