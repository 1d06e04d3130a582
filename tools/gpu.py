"""Everything that only a machine with a GPU can show, in one command, which `make gpu` runs.

    python tools/gpu.py [--budget 540]

With the Python that runs it, and without downloads, it builds the extension in place, runs the tests that need a GPU
(tests/gpu), then times PACE and MADA beside AdamW and others (`bench/harness.py` says how). It has a time budget in
seconds: the build may take up to 40 % of it, tests up to 70 %, and the benchmark the rest, the most important rows
first. The rest runs even if the build or tests fail; a benchmark row that fails becomes a row with the reason. The
results are in `gpu-<device>.json`, a file that is complete JSON at any moment, in `gpu-<device>.md`, and, with
matplotlib, in `gpu-<device>.webp`.

The benchmark runs in its own process, which names its row before every sample. If it dies, or hangs in one row for more
than two minutes, another process goes on without that row.

`--device cpu --dry-run` does the same on the CPU with tiny sizes: it shows that the command works, and no speed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import torch
from harness import (
    BandwidthProbe,
    Case,
    ColdWalk,
    Contender,
    CopyProbe,
    DeviceLost,
    Row,
    Watch,
    as_json,
    from_json,
    held_bytes,
    machine,
    markdown,
    measure,
    moved_bytes,
    save,
    slug,
    table,
    write,
)
from shapes import gpt2, llama
from torch import nn
from torch.optim import AdamW

ROOT = Path(__file__).resolve().parents[1]
BUILD_UNTIL, TESTS_UNTIL = 0.4, 0.7  # shares of the budget
START_S = 120.0  # for a process to come to its first row
STUCK_S = 120.0  # a row that takes longer, compilation included, is given up
RESERVE_S = 8.0  # for the last picture
ROUND_S = 10.0  # for the round that is under way when the time is up
CPU_BUILD_S = 60.0  # of the build's time, kept for the CPU kernels
LOST = 3  # exit status of a benchmark whose device answers no more
REFERENCE = "adamw-fused"


# ---- rows ----


@dataclass(frozen=True)
class Rows:
    """`main` are timed first, for all sizes; `more` after that, with the anchors again."""

    main: list[Row]
    more: list[Row]
    ours: tuple[str, ...]  # keys of those that run pace_kernels
    anchors: tuple[str, ...]

    @property
    def all(self) -> dict[str, Row]:
        return {row.key: row for row in (*self.main, *self.more)}

    def set(self, name: str) -> list[Row]:
        return self.main if name == "main" else [r for r in self.main if r.key in self.anchors] + self.more


def graphed(build: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[list[nn.Parameter]], Contender]:
    """A step captured into a CUDA graph, and replayed."""

    def make(parameters: list[nn.Parameter]) -> Contender:
        if parameters[0].device.type != "cuda":
            raise RuntimeError("CUDA graphs need a GPU")
        made = build(parameters, capturable=True, **options)
        beside, current = torch.cuda.Stream(), torch.cuda.current_stream()
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            for _ in range(2):  # states, and whatever is compiled or allocated once
                made.step()
        current.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made.step()
        return Contender(graph.replay, lambda: made.state)

    return make


def adamw_and_foreach_ema(parameters: list[nn.Parameter]) -> Contender:
    adamw = AdamW(parameters, fused=True)
    averages = [p.detach().clone() for p in parameters]
    weights = [p.detach() for p in parameters]

    def step() -> None:
        adamw.step()
        torch._foreach_lerp_(averages, weights, 0.01)

    return Contender(step, lambda: [adamw.state, averages])


def elsewhere(module: str, name: str, **options: Any) -> Callable[[list[nn.Parameter]], Contender]:
    """An optimizer of another package, if that is installed."""

    def make(parameters: list[nn.Parameter]) -> Contender:
        made = getattr(import_module(module), name)(parameters, lr=1e-3, weight_decay=0.01, **options)
        return Contender(made.step, lambda: made.state)

    return make


def rows_for(device: torch.device) -> Rows:
    from bench_step import (
        ROWS,
        mada_held,
        mada_moved,
        optimizer,
        pace_held,
        pace_moved,
        preset_held,
        preset_moved,
    )

    from pace_kernels import MADA, PACE

    known = {row.key: row for row in ROWS}
    backends = ("cuda", "triton") if device.type == "cuda" else ("cpu", "torch")
    pace = [Row(f"pace-{b}", f"PACE, {b}", optimizer(PACE, backend=b), pace_moved, pace_held) for b in backends]
    mada = [Row(f"mada-{b}", f"MADA, {b}", optimizer(MADA, backend=b), mada_moved, mada_held) for b in backends]
    first = backends[0]

    def adamw(params: list[nn.Parameter], **options: Any) -> MADA:
        return MADA.preset("adamw", params, **options)

    preset = [
        Row(f"mada-adamw-{first}", f'MADA, preset "adamw", {first}', optimizer(adamw, backend=first), preset_moved,
            preset_held)
    ]  # fmt: skip
    stats = [
        Row(f"pace-stats-{first}", f"PACE, log_stats, {first}", optimizer(PACE, backend=first, log_stats=True),
            pace_moved, pace_held)
    ]  # fmt: skip
    graphs = [
        row
        for b in backends
        for row in (
            Row(f"pace-graph-{b}", f"PACE, {b}, graph", graphed(PACE, backend=b), pace_moved, pace_held),
            Row(f"mada-graph-{b}", f"MADA, {b}, graph", graphed(MADA, backend=b), mada_moved, mada_held),
        )
    ]
    fused = known[REFERENCE]
    adamw_graph = Row("adamw-graph", "AdamW fused, graph", graphed(AdamW, fused=True), fused.moved, fused.held)
    ema = known["adamw-ema"]
    foreach_ema = Row(
        "adamw-ema-foreach", "AdamW fused + EMA, foreach", adamw_and_foreach_ema, ema.moved, ema.held, scratch=4
    )
    # Their states are float32, as ours are.
    others = [
        Row("apex", "apex FusedAdam", elsewhere("apex.optimizers", "FusedAdam"), preset_moved, preset_held),
        Row("te", "Transformer Engine FusedAdam", elsewhere("transformer_engine.pytorch.optimizers", "FusedAdam"),
            preset_moved, preset_held),
        Row("bnb", "bitsandbytes AdamW, 32 bit", elsewhere("bitsandbytes.optim", "AdamW", optim_bits=32), preset_moved,
            preset_held),
    ]  # fmt: skip
    pullback = [known["pullback-adamw"], known["pullback-adamw-0"]]
    lion = Row(
        f"mada-lion-{first}",
        f'MADA, preset "lion", {first}',
        optimizer(lambda params, **o: MADA.preset("lion", params, **o), backend=first),
        lambda dtype: moved_bytes(dtype, states=1),
        lambda dtype: held_bytes(dtype, states=1),
    )
    ours = (*pace, *mada, *preset, *stats, *graphs, *pullback, lion)
    return Rows(
        [*pace, fused, *mada, foreach_ema, ema, known["adamw-foreach"], *preset],
        [*graphs, adamw_graph, *pullback, *stats, lion, known["pace-eager"], *others, known["pace-compile"]],
        tuple(row.key for row in ours),
        (f"pace-{first}", REFERENCE),
    )


# ---- cases ----

# key -> title, shapes
SIZES = {
    "one": ("One tensor of 32 M", [(32 * 2**20,)]),
    "gpt2": ("GPT-2 124M", gpt2()),
    "small": ("2,000 tensors of 1,000", 2000 * [(1000,)]),
    "1.7b": ("Llama shapes, 1.7 B", llama(vocabulary=49152, layers=24, width=2048, hidden=8192)),
}
TINY_SIZES = {
    "one": ("One tensor of 64 K", [(64 * 2**10,)]),
    "gpt2": ("A tiny GPT-2", gpt2(vocabulary=503, context=64, layers=1, width=64)),
    "small": ("8 tensors of 1,000", 8 * [(1000,)]),
    "1.7b": ("A tiny Llama", llama(vocabulary=251, layers=1, width=64, hidden=256)),
}
# The most telling first: if the time is up, the later ones are missing.
PLAN = [
    ("one", "float32", "main"),
    ("gpt2", "bfloat16", "main"),
    ("gpt2", "float32", "main"),
    ("small", "float32", "main"),
    ("1.7b", "bfloat16", "main"),
    ("one", "bfloat16", "main"),
    ("small", "float32", "more"),
    ("one", "float32", "more"),
    ("1.7b", "float32", "main"),
    ("gpt2", "bfloat16", "more"),
    ("small", "bfloat16", "main"),
    ("gpt2", "float32", "more"),
    ("small", "bfloat16", "more"),
    ("one", "bfloat16", "more"),
    ("1.7b", "bfloat16", "more"),
]


def sizes(report: Mapping[str, Any]) -> dict[str, tuple[str, list[tuple[int, ...]]]]:
    return TINY_SIZES if report["dry_run"] else SIZES


def plan(report: Mapping[str, Any]) -> dict[str, tuple[str, str, str]]:
    return {":".join(item): item for item in PLAN}


# ---- the report ----


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def headings(rows: Rows) -> dict[str, str]:
    return {REFERENCE: "/ AdamW fused", rows.anchors[0]: "/ PACE"}


def cases_of(report: Mapping[str, Any], rows: Rows) -> dict[str, Case]:
    return {
        key: from_json(saved, rows.all, sizes(report)[key.split(":")[0]][1]) for key, saved in report["cases"].items()
    }


def notice(report: Mapping[str, Any]) -> str:
    about = report["machine"]
    where = about.get("gpu") or about["cpu"]
    first = f"{where}, torch {about['torch']}, {about['date']}"
    return f"DRY RUN: tiny sizes, no speed is meant. {first}" if report["dry_run"] else first


def as_markdown(report: Mapping[str, Any], rows: Rows) -> str:
    parts = [f"# {notice(report)}", "Written by `make gpu`; `bench/harness.py` says how things are measured."]
    parts += [f"{name}: {stage['summary']}" for name, stage in report["stages"].items()]
    parts += report.get("notes", [])  # written by hand into the JSON: what is known of the run since
    parts += [markdown(case, headings(rows)) for case in cases_of(report, rows).values()]
    parts += [f"{row.name}: {row.note}" for row in rows.all.values() if row.note]
    return "\n\n".join(parts) + "\n"


def draw(report: Mapping[str, Any], rows: Rows, path: Path) -> str:
    """What became of the picture."""
    try:
        import bench_step
    except ImportError as reason:
        return f"no picture: {reason}"
    shown: dict[str, Case] = {}
    for key, case in cases_of(report, rows).items():
        if not case.probe_samples:
            continue
        size, dtype, _ = key.split(":")
        if f"{size}:{dtype}" in shown:
            there = shown[f"{size}:{dtype}"]
            there.results += [r for r in case.results if r.row.key not in rows.anchors]
        else:
            case.title = sizes(report)[size][0]
            shown[f"{size}:{dtype}"] = case
    if not shown:
        return "no picture: no case was measured"
    try:
        measured = [r for r in rows.all.values() if any(case.result(r.key) for case in shown.values())]
        bench_step.draw(list(shown.values()), path, notice(report), measured, rows.ours)
    except ImportError as reason:
        return f"no picture: {reason}"
    return str(path)


# ---- the benchmark, in a process of its own ----


def benchmark(path: Path, until: float) -> None:
    """Runs the part of the plan that the report does not have yet. `until`: a value of time.time()."""
    report = load(path)
    device, dry = torch.device(report["device"]), report["dry_run"]
    rows = rows_for(device)
    gc.freeze()  # what is imported stays: a collection would look through it, 0.2 s each, several times a row
    marker = path.with_suffix(".running")
    probe = BandwidthProbe(device, 2**16) if dry else BandwidthProbe(device)
    tools = {
        "walk": ColdWalk(device, 2**20 if dry else None),
        "probe": probe,
        "copy": CopyProbe(probe.arrays),
        "rounds": 2 if dry else 15,
        "steps": 1 if dry else 4,
        "anchors": rows.anchors,
    }
    if dry:
        report["failed"].setdefault("", {})["pace-compile"] = "left out of a dry run: compiling takes minutes"

    for key, (size, dtype, which) in plan(report).items():
        if key in report["complete"] or time.time() > until:
            continue
        title, shapes = sizes(report)[size]

        def progress(case: Case, key: str = key) -> None:
            report["cases"][key] = as_json(case)
            save(report, path)

        def running(row: str, key: str = key) -> None:
            marker.write_text(f"{key}\n{row}", encoding="utf-8")

        watch = Watch(running, progress, keep_going=True, deadline=time.monotonic() + until - time.time())
        excluded = report["failed"].get("", {}) | report["failed"].get(key, {})
        try:
            case = measure(
                title if which == "main" else f"{title}, more rows",
                rows.set(which),
                shapes,
                getattr(torch, dtype),
                device,
                excluded=excluded,
                watch=watch,
                **tools,
            )
        except DeviceLost as reason:
            _, row = marker.read_text(encoding="utf-8").split("\n")
            print(f"{key}, {row}: the device was lost, {reason}; going on in another process", flush=True)
            report["failed"].setdefault(key, {})[row] = f"the device was lost: {reason}"
            save(report, path)
            # No clean-up: destructors would only meet the same error.
            os._exit(LOST)
        except Exception as reason:  # of the case as a whole, such as no memory for its weights
            report["complete"][key] = f"{type(reason).__name__}: {reason}".splitlines()[0]
            print(f"\n{title}, {dtype}: not measured, {report['complete'][key]}", flush=True)
            save(report, path)
            continue
        report["complete"][key] = "the time was up" if watch.is_late() else ""
        save(report, path)
        write(path.with_suffix(".md"), as_markdown(report, rows))
        print(f"\n{table(case, headings(rows))}", flush=True)


def follow(process: subprocess.Popen[bytes], marker: Path, until: float) -> str:
    """Waits for the benchmark; returns why it ended early, or "" if it did not."""
    at = time.time()  # of the last sign of life
    while process.poll() is None:
        time.sleep(0.1)
        with contextlib.suppress(FileNotFoundError):
            at = max(at, marker.stat().st_mtime)
        why = ""
        limit_s = STUCK_S if marker.exists() else START_S
        if time.time() - at > limit_s:
            why = f"no answer within {limit_s:.0f} s"
        if time.time() > until:
            why = "the time was up"
        if why:
            process.kill()
            process.wait()
            return why
    if process.returncode in (0, LOST):
        return "" if process.returncode == 0 else "lost"
    code = process.returncode
    return f"the process died of {signal.Signals(-code).name}" if code < 0 else f"the process ended with status {code}"


def run_benchmark(path: Path, environment: Mapping[str, str], until: float) -> str:
    """A summary."""
    marker = path.with_suffix(".running")
    processes = 0
    while time.time() < until:
        marker.unlink(missing_ok=True)
        processes += 1
        command = [sys.executable, str(Path(__file__).resolve()), "--go-on", str(path), "--until", str(until - ROUND_S)]
        why = follow(subprocess.Popen(command, env=dict(environment)), marker, until)
        if not why or why == "the time was up":
            break
        if why == "lost":
            continue
        if not marker.exists():
            return f"failed before its first row: {why}"
        key, row = marker.read_text(encoding="utf-8").split("\n")
        print(f"{key}, {row}: {why}; going on without it", flush=True)
        report = load(path)
        if row in report["failed"].get(key, {}) or row in ("probe", "copy"):
            report["complete"][key] = why  # it is not the row: give up the case
        report["failed"].setdefault(key, {})[row] = why
        save(report, path)
    marker.unlink(missing_ok=True)
    report = load(path)
    done = sum(not why for why in report["complete"].values())
    return f"{done} of {len(plan(report))} cases complete, in {processes} process{'es' * (processes > 1)}"


# ---- build and tests ----


def tail(text: str, lines: int = 15) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def run_limited(command: Sequence[str], cwd: Path, environment: Mapping[str, str], limit_s: float) -> tuple[str, str]:
    """The status, "" on success, and the output. Processes that the command started end with it."""
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            command, cwd=cwd, env=dict(environment), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(max(limit_s, 1.0))
            status = "" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = f"not done within {limit_s:.0f} s"
        out.seek(0)
        return status, out.read().decode("utf-8", "replace")


def build(environment: Mapping[str, str], device: torch.device, limit_s: float) -> dict[str, Any]:
    """Builds for this GPU alone, which takes the least time; if that fails, as setup.py would by default; then without
    CUDA, since a failed build leaves nothing, and tests compare with the CPU kernels."""
    start = time.monotonic()
    attempts: list[dict[str, str]] = [{}, {"PACE_CUDA": "0"}]
    if device.type == "cuda" and torch.version.hip is None and not environment.get("PACE_CUDA_ARCHS"):
        major, minor = torch.cuda.get_device_capability(device)
        attempts.insert(0, {"PACE_CUDA_ARCHS": f"{major}.{minor}"})
    said: list[str] = []
    output, failed = "", ""
    for attempt in attempts:
        left = limit_s - (time.monotonic() - start)
        if attempt is not attempts[-1]:
            left -= CPU_BUILD_S
        if left < 1.0:
            continue
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        status, told = run_limited(command, ROOT, {"PACE_CUDA": "auto", **environment, **attempt}, left)
        named = " ".join(f"{name}={value}" for name, value in attempt.items()) or "by default"
        output += f"--- {named}\n{tail(told, 60)}\n"
        said += [line for line in told.splitlines() if line.startswith("pace_kernels:")]
        if not status:
            said.append(f"built {named}")
            break
        failed = failed or status
        said.append(f"{named} FAILED ({status}: {tail(told, 1)})")
    took = time.monotonic() - start
    return {"summary": "; ".join([f"{took:.0f} s", *said]), "failed": failed, "seconds": took, "output": output}


def lay_out(folder: Path) -> Path:
    """A folder of links from which the package imports as if installed: in a checkout, the Triton kernels are not in
    the package but in a folder of the repository."""
    package = folder / "pace_kernels"
    package.mkdir(parents=True)
    for entry in (ROOT / "pace_kernels").iterdir():
        (package / entry.name).symlink_to(entry)
    (package / "triton_kernels").symlink_to(ROOT / "triton_kernels")
    return folder


def test(environment: Mapping[str, str], cwd: Path, limit_s: float) -> dict[str, Any]:
    """Runs tests/gpu. Tests that start after the limit skip themselves; one that hangs is ended some time later."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
        command += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
        # tests/conftest.py is about hypothesis, which need not be here.
        command += ["--confcutdir", str(ROOT / "tests/gpu"), f"--junitxml={xml}", str(ROOT / "tests/gpu")]
        limited = {**environment, "PACE_GPU_TEST_SECONDS": f"{0.9 * limit_s:.0f}"}
        status, output = run_limited(command, cwd, limited, limit_s)
        counts, failures, skipped = read_junit(xml) if xml.exists() else ({}, [], {})
    took = time.monotonic() - start
    said = ", ".join(f"{n} {what}" for what, n in counts.items()) or "no results"
    summary = f"{said} in {took:.0f} s" + (f" ({status})" if status else "")
    return {
        "summary": summary,
        "failed": status,
        "seconds": took,
        "counts": counts,
        "failures": failures,
        "skipped": skipped,
        "output": tail(output, 60),
    }


def read_junit(xml: Path) -> tuple[dict[str, int], list[str], dict[str, int]]:
    """How many passed, failed and skipped; those that failed and why; the reasons of skips, with their number."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures: list[str] = []
    skipped: dict[str, int] = {}
    for case in ElementTree.parse(xml).iter("testcase"):
        skip = case.find("skipped")
        if skip is not None:
            counts["skipped"] += 1
            reason = skip.get("message", "")
            skipped[reason] = skipped.get(reason, 0) + 1
        elif (found := next((f for f in case if f.tag in ("failure", "error")), None)) is not None:
            counts["failed"] += 1
            said = found.get("message", "").strip()
            failures.append(
                f"{case.get('classname')}::{case.get('name')}: {said.splitlines()[0][:300] if said else ''}"
            )
        else:
            counts["passed"] += 1
    return counts, failures, skipped


# ---- the command ----


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes: shows that the command works, no speed")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything (default: 540)")
    parser.add_argument("--no-build", action="store_true", help="with the extension that is there")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default: bench/results; of a dry run: out/bench)"
    )
    parser.add_argument("--go-on", type=Path, help=argparse.SUPPRESS)  # the benchmark's own process
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out or (ROOT / "out/bench" if arguments.dry_run else ROOT / "bench/results")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    start = time.time()
    arguments = parse_arguments(argv)
    if arguments.go_on:
        benchmark(arguments.go_on, arguments.until)
        return 0
    device = arguments.device
    if device.type == "cuda" and not torch.cuda.is_available():
        kind = torch.version.cuda or torch.version.hip or "no GPU at all"
        print(
            f"gpu: torch {torch.__version__} (built for {kind}) finds no GPU; --device cpu --dry-run needs none",
            file=sys.stderr,
        )
        return 2
    about = machine(device)
    name = f"gpu-{slug(about)}{'-dry-run' if arguments.dry_run else ''}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out.resolve() / f"{name}.json"
    report: dict[str, Any] = {
        "dry_run": arguments.dry_run,
        "device": str(device),
        "machine": about,
        "budget_s": arguments.budget,
        "stages": {},
        "cases": {},  # key of PLAN -> what was measured
        "complete": {},  # key -> "", or why it is not all that was meant
        "failed": {},  # key -> row -> why it is not run any more; key "": in all cases
    }
    save(report, path)
    print(f"{notice(report)}; {arguments.budget:.0f} s", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        environment = {
            **os.environ,
            "PYTHONIOENCODING": "utf-8",
            # A dry run shares the CPU with whatever else there is: several threads would wait for each other.
            **({"OMP_NUM_THREADS": "1"} if arguments.dry_run else {}),
            "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),  # empty: compile times are those of a first run
        }
        if not arguments.no_build:
            report["stages"]["build"] = build(environment, device, BUILD_UNTIL * arguments.budget)
            print(f"build: {report['stages']['build']['summary']}", flush=True)
            if report["stages"]["build"]["failed"]:
                print(tail(report["stages"]["build"]["output"]), flush=True)
            del report["stages"]["build"]["output"]  # long, and full of this machine's paths
            save(report, path)
        environment["PYTHONPATH"] = str(lay_out(scratch / "path"))
        if not arguments.no_tests:
            limit = TESTS_UNTIL * arguments.budget - (time.time() - start)
            report["stages"]["tests"] = test(environment, scratch / "path", limit)
            stage = report["stages"]["tests"]
            print(f"tests: {stage['summary']}", flush=True)
            for line in [*stage["failures"], *(f"skipped {n} × {why}" for why, n in stage["skipped"].items())]:
                print(f"  {line}", flush=True)
            if stage["failed"]:
                print(stage["output"], flush=True)
            del stage["output"]
            save(report, path)
        described = "import json, pace_kernels.backend as b; print(json.dumps(b.describe()))"
        status, output = run_limited([sys.executable, "-c", described], scratch / "path", environment, 60.0)
        if status:
            print(f"the package cannot be imported:\n{tail(output)}", flush=True)
            return 1
        report["machine"] |= json.loads(output.splitlines()[-1])
        save(report, path)
        print("\n".join(f"  {b}: {what}" for b, what in report["machine"]["backends"].items()), flush=True)

        summary = run_benchmark(path, environment, start + arguments.budget - RESERVE_S)
        report = load(path)
        report["stages"]["benchmark"] = {"summary": summary, "seconds": time.time() - start}
        save(report, path)
        sys.path.insert(0, str(scratch / "path"))
        rows = rows_for(device)
        for key, case in cases_of(report, rows).items():
            if key not in report["complete"]:  # its process was ended before it could say
                print(f"\ncut off: {table(case, headings(rows))}")
        print(f"\nbenchmark: {summary}", flush=True)
        write(path.with_suffix(".md"), as_markdown(report, rows))
        print(f"{path}\n{path.with_suffix('.md')}\n{draw(report, rows, path.with_suffix('.webp'))}")
        print(f"{time.time() - start:.0f} s in all")
    bad = [stage for stage in report["stages"].values() if stage.get("failed")]
    return 1 if bad or not any(not why for why in report["complete"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
