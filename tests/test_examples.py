"""Promise: each example runs to its end, and does what it is there to show."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def ran(folder: Path, command: str) -> str:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    words = [sys.executable, *command.split()]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_the_diff_makes_the_loop_evaluate_and_save_the_average(folder: Path) -> None:
    printed = [ran(folder, "examples/loop.py --steps 4")]
    subprocess.run(["git", "apply", "examples/loop.diff"], cwd=folder, check=True)
    assert "PACE(" in (folder / "examples/loop.py").read_text()
    printed.append(ran(folder, "examples/loop.py --steps 4"))
    assert all(4.0 < float(text.split()[1]) < 6.0 for text in printed) and printed[0] != printed[1]


@pytest.mark.parametrize(
    ("command", "said", "needs"),
    [
        ("examples/diffusion.py --steps 300", "averaged", ()),
        ("examples/sweep.py --steps 3", "lambda_pullback 5.0", ()),
        ("-m torch.distributed.run --nproc_per_node=2 examples/fsdp2.py --steps 3", "tensors to ship", ()),
        ("examples/sft.py --steps 4", "'optimizer/lambda_mean'", ("transformers", "accelerate")),
        ("examples/lightning_cli.py fit --config examples/lightning.yaml", "", ("lightning", "jsonargparse")),
    ],
)
def test_an_example_runs(command: str, said: str, needs: tuple[str, ...], folder: Path) -> None:
    for name in needs:
        pytest.importorskip(name)
    assert said in ran(folder, command)
    if "yaml" in command:
        (metrics,) = folder.rglob("metrics.csv")
        assert "optimizer/pullback_norm" in metrics.read_text()


def test_a_row_of_the_demo_is_the_best_of_its_settings_over_the_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import train_lm

    assert len(train_lm.EMA_DECAYS) == len(train_lm.PULLS)  # equal budgets
    near, never = train_lm.NEAR, float("inf")
    losses = {  # at each rate and pull: of two seeds, of which one alone would choose another pull
        (1e-3, 0.15): (3.0, 3.0),
        (1e-3, 1.5): (never, 1.0),
        (2e-3, 0.15): (2.0, 3.0),
        (2e-3, 1.5): (2.3, 2.3),
        (4e-3, 0.15): (2.3 + near / 2,) * 2,
        (8e-3, 0.15): (2.3 + near * 2,) * 2,
    }
    runs = [
        train_lm.Run("PACE", lr, seed, pull, {"live": 0.0, "average": loss}, {"average": seed}, {"average": 12.0})
        for (lr, pull), both in losses.items()
        for seed, loss in enumerate(both)
    ]
    runs.append(train_lm.Run("MADA", 8e-3, 0, 0.0, {"live": 1.0}, {"live": 1.0}, {"live": 28.0}))
    row = train_lm.row("PACE", runs)
    assert (row["lr"], row["setting"], row["at_edge"], row["borne"]) == (2e-3, "pull 1.5", False, [2e-3, 4e-3])
    assert (row["loss"], row["loss_by_lr"][0], row["step_ms"], row["state_bytes"]) == (2.3, 3.0, 0.5, 12.0)
    assert train_lm.row("PACE", [run for run in runs if run.lr < 4e-3])["at_edge"]
    assert train_lm.row("MADA", runs)["setting"] == "-"
    diverged = train_lm.row("PACE", [run for run in runs if run.losses.get("average") == never])
    assert train_lm.without_infinity(diverged)["loss"] is None
