"""Promise: `make gpu` works before a GPU is there to run it: on the CPU, with tiny sizes, through every stage."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools"
ENVIRONMENT = {**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}


COMMAND = [sys.executable, str(TOOLS / "gpu.py"), "--device", "cpu", "--dry-run", "--no-build"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.syspath_prepend(str(TOOLS))
    yield pytest.importorskip("gpu")


@pytest.fixture
def report(gpu: ModuleType, tmp_path: Path) -> Path:
    """A report as the command begins it, with one case to measure."""
    path = tmp_path / "gpu-none-dry-run.json"
    gpu.save(
        {
            "dry_run": True,
            "device": "cpu",
            "machine": gpu.machine(torch.device("cpu")),
            "stages": {},
            "cases": {},
            "complete": {key: "not this time" for key in gpu.plan("kernels") if key != "one:float32:main"},
            "failed": {"": {"mada-torch": "not this time"}},
        },
        path,
    )
    return path


def test_a_dry_run_goes_through_every_stage(gpu: ModuleType, tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "--out", str(tmp_path)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = tmp_path.glob("gpu-*-dry-run.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["complete"] == dict.fromkeys([key for stage in gpu.OF_STAGE for key in gpu.plan(stage)], "")
    assert found["stages"].keys() == {"tests", *gpu.STAGES[1:]}
    assert "skipped" in found["stages"]["tests"]["summary"] and list(found["stages"]["tests"]["skipped"]) == ["no GPU"]
    for case in found["cases"].values():
        rows = {row["key"]: row for row in case["rows"]}
        assert rows["pace-cpu"]["seconds_median"] > 0
        assert case["rmw_bandwidth_bytes_per_s"] > 0 and case["copy_bandwidth_bytes_per_s"] > 0
        missing = {key: row["missing"] for key, row in rows.items() if row["missing"]}
        elsewhere = {row.key for row in gpu.rows_for(torch.device("cpu")).peers}
        assert {key for key in missing if "graph" not in key} <= {"pace-compile", "adamw-compile", "tight", *elsewhere}
        assert all("GPU" in why for key, why in missing.items() if "graph" in key)
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert text.startswith("# DRY RUN") and "| PACE, cpu |" in text
    assert "DRY RUN" in done.stdout and "AdamW fused" in done.stdout
    assert not path.with_suffix(".running").exists()
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "no picture" in done.stdout
    else:
        assert path.with_suffix(".webp").read_bytes()[8:12] == b"WEBP"


@pytest.mark.parametrize(
    ("stage", "shown"),
    [
        ("correctness", r"\| test_gpu_bits \|"),
        ("host", r"\| PACE, cpu \| \d"),
        ("kernels", r"\| PACE, cpu, buckets \| \d"),
        ("peers", r"\| PACE, cpu \| \d"),
        ("training", r"\| PACE, step in backward \| \d"),
        ("tuning", r"AdamW, cell 0"),
    ],
)
def test_a_stage_that_is_killed_leaves_its_table(stage: str, shown: str, tmp_path: Path) -> None:
    """And what a stage before has left there. Killed is the command itself, as by the limit of a machine."""
    environment = {**ENVIRONMENT, "PACE_GPU_DRY_RUN": "1"}  # so that tests take their time
    command = [*COMMAND, "--out", str(tmp_path), "--stages", stage]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        text, until = "", time.monotonic() + 250
        while not re.search(shown, text) and time.monotonic() < until:
            assert process.poll() is None, "it came to its end"
            time.sleep(0.05)
            text = "".join(path.read_text(encoding="utf-8") for path in tmp_path.glob("gpu-*.md"))
    finally:
        process.kill()
        process.wait()
    text = next(tmp_path.glob("gpu-*.md")).read_text(encoding="utf-8")
    assert re.search(shown, text) and text.startswith("# DRY RUN")
    found = json.loads(next(tmp_path.glob("gpu-*.json")).read_text(encoding="utf-8"))
    assert ("tests" if stage == "correctness" else stage) in found["stages"]


def test_stages_that_are_named_keep_the_others(gpu: ModuleType, report: Path) -> None:
    gpu.benchmark(report, float("inf"), "kernels")
    arguments = gpu.parse_arguments(["--device", "cpu", "--dry-run", "--stages", "peers"])
    kept = gpu.begun(report, arguments)
    assert kept["cases"].keys() == {"one:float32:main"} and kept["complete"]["one:float32:main"] == ""
    arguments = gpu.parse_arguments(["--device", "cpu", "--dry-run", "--stages", "kernels"])
    assert gpu.begun(report, arguments)["cases"] == {} == gpu.begun(report, arguments)["complete"]


def test_wrong_bits_end_the_command(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = (
        "tests/gpu/test_gpu_bits.py::test_pace[PACE, all-cuda] FAILED [ 50%]\n"
        "tests/gpu/test_gpu_sync.py::test_it SKIPPED (no GPU (at all)) [100%]\n"
        "FAILED tests/gpu/test_gpu_bits.py::test_pace[PACE, all-cuda] - AssertionError: 3 differ\n"
    )
    monkeypatch.setattr(gpu, "run_limited", lambda *_: ("exit status 1", output))
    monkeypatch.setattr(gpu, "use_package", lambda run: None)
    arguments = ["--device", "cpu", "--dry-run", "--no-build", "--out", str(tmp_path)]
    assert gpu.main(arguments) == 1
    (path,) = tmp_path.glob("gpu-*.json")
    stages = gpu.load(path)["stages"]
    assert stages.keys() == {"tests"} and stages["tests"]["counts"] == {"failed": 1, "skipped": 1}
    assert stages["tests"]["failures"] == ["test_gpu_bits::test_pace[PACE, all-cuda]: AssertionError: 3 differ"]


def test_rows_that_came_too_late_say_so(gpu: ModuleType, report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = iter(range(1000))
    monkeypatch.setattr(gpu.Watch, "is_late", lambda self: next(asked) >= 3)
    gpu.benchmark(report, float("inf"), "kernels")
    found = gpu.load(report)
    assert found["complete"]["one:float32:main"] == "the time was up"
    rows = found["cases"]["one:float32:main"]["rows"]
    assert [row["key"] for row in rows if "seconds_median" in row] == ["pace-cpu", "pace-torch", "adamw-fused"]
    assert all(row["missing"] for row in rows if "seconds_median" not in row)


def crashing(monkeypatch: pytest.MonkeyPatch, gpu: ModuleType, key: str, crash: Any) -> None:
    """The rows, of which one does not come back."""
    rows = gpu.rows_for(torch.device("cpu"))
    at = next(i for i, row in enumerate(rows.main) if row.key == key)
    rows.main[at] = gpu.Row(key, "crashes", crash, rows.main[at].moved, rows.main[at].held)
    monkeypatch.setattr(gpu, "rows_for", lambda device: rows)


def test_a_row_that_raises_is_a_row_with_the_reason(
    gpu: ModuleType, report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(parameters: list[torch.nn.Parameter]) -> None:
        raise ValueError("no such thing")

    crashing(monkeypatch, gpu, "adamw-foreach", crash)
    gpu.benchmark(report, float("inf"), "kernels")
    rows = {row["key"]: row for row in gpu.load(report)["cases"]["one:float32:main"]["rows"]}
    assert rows["adamw-foreach"]["missing"] == "ValueError: no such thing"
    assert rows["mada-torch"]["missing"] == "not this time"
    assert rows["pace-cpu"]["seconds_median"] > 0 and rows["adamw-ema"]["seconds_median"] > 0


CRASH = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import gpu, harness, torch
rows = gpu.rows_for(torch.device("cpu"))
def crash(parameters):
    if sys.argv[2] == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif sys.argv[2] == "hangs":
        time.sleep(60)
    harness.check_alive = lost
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def lost(device):
    raise harness.DeviceLost("CUDA error")
for i, row in enumerate(rows.main):
    if row.key == "adamw-foreach":
        rows.main[i] = gpu.Row(row.key, row.name, crash, row.moved, row.held)
gpu.rows_for = lambda device: rows
sys.exit(gpu.main(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("dies", "the process died of SIGSEGV"),
        ("hangs", "no answer within 10 s"),
        ("loses the device", "the device was lost: CUDA error"),
    ],
)
def test_a_row_that_ends_its_process_is_left_out_by_the_next_one(
    how: str, why: str, gpu: ModuleType, report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "crash.py"
    script.write_text(CRASH)
    monkeypatch.setattr(gpu, "STUCK_S", 10.0 if how == "hangs" else 120.0)
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda command, **o: popen([command[0], str(script), str(TOOLS), how, *command[2:]], **o),
    )
    summary = gpu.run_benchmark(report, ENVIRONMENT, gpu.time.time() + 200.0, "kernels")
    found = gpu.load(report)
    assert summary == "1 of 17 cases complete, in 2 processes"
    assert found["failed"]["one:float32:main"] == {"adamw-foreach": why}
    rows = {row["key"]: row for row in found["cases"]["one:float32:main"]["rows"]}
    assert rows["adamw-foreach"]["missing"] == why and rows["adamw-ema"]["seconds_median"] > 0


def test_a_report_that_was_saved_reads_back_as_it_was(gpu: ModuleType, report: Path) -> None:
    gpu.benchmark(report, float("inf"), "kernels")
    found, rows = gpu.load(report), gpu.rows_for(torch.device("cpu"))
    (case,) = gpu.cases_of(found, rows).values()
    again, saved = json.loads(json.dumps(gpu.as_json(case))), found["cases"]["one:float32:main"]
    # They follow from samples, which are kept with five digits.
    for name in ("copy_bandwidth_bytes_per_s", "rmw_bandwidth_bytes_per_s"):
        assert again.pop(name) == pytest.approx(saved.pop(name), rel=1e-4)
    assert again == saved


def test_without_a_gpu_the_command_says_so(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main([]) == 2
    assert "finds no GPU" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there to run them")
def test_the_tests_for_a_gpu_are_skipped_as_a_whole_without_one() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    reasons = {line.rsplit(": ", 1)[-1] for line in done.stdout.splitlines() if line.startswith("SKIPPED")}
    assert reasons == {"no GPU"}


def test_the_code_of_the_tests_for_a_gpu_runs_on_the_cpu() -> None:
    """In float32, with "cpu" and "torch" in the place of "cuda" and "triton"."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--confcutdir", "tests/gpu", "tests/gpu"]
    done = subprocess.run(
        [*command, "-k", "not float16 and not bfloat16"],
        cwd=ROOT,
        env={**ENVIRONMENT, "PACE_GPU_DRY_RUN": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_the_tests_for_a_gpu_need_only_torch_and_pytest() -> None:
    """As on a machine to which nothing can be downloaded."""
    code = (
        "import sys, pytest\n"
        "for name in ('hypothesis', 'numpy', 'matplotlib', 'pytorch_optimizer', 'pytest_benchmark'):\n"
        "    sys.modules[name] = None\n"
        "sys.exit(pytest.main(['-q', '--collect-only', '-p', 'no:cacheprovider', '--confcutdir', 'tests/gpu',"
        " 'tests/gpu']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**ENVIRONMENT, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
