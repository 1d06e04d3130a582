"""Everything that only a machine with a GPU can show, in one command, which `make gpu` runs.

    python tools/gpu.py [--budget 540] [--stages correctness,host]

With the Python that runs it, and without downloads, in stages, each of which has the budget in seconds:

    correctness  builds the extension in place for this GPU, with the variants of kernels to measure; runs tests/gpu,
                 some once more with other allocators. Where bits are wrong, no other stage is run
    host         steps of tensors of 4 elements, and a profile: what the host does
    kernels      sweeps: in graphs, of gradients in buckets, of compressed formats; then beside AdamW and others
    peers        beside the packages whose wheels `make gpu-wheels` has put into out/wheels
    training     whole training steps (bench/throughput.py)
    tuning       fine-tuning of SmolLM2 (research/protocol.py --smollm); what it fetches is in out/finetuning before

`bench/harness.py` says how steps are timed; the most telling rows come first. `gpu-<device>.json` is complete JSON at
any moment, `gpu-<device>.md` has the tables of all stages with what is in them by then, and, with matplotlib, there is
`gpu-<device>.webp`. Where stages are named, those of an earlier run are kept.

A benchmark runs in its own process, which names its row before every sample. If it dies, or hangs in one row for more
than two minutes, another process goes on without that row; one that fails is a row with the reason.

`--device cpu --dry-run` does the same on the CPU with tiny sizes: it shows that the command works, and no speed.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import ctypes
import gc
import json
import os
import pstats
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

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
    fill_,
    from_json,
    held_bytes,
    itemsize,
    machine,
    make_parameters,
    markdown,
    markdown_table,
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
BUILD_UNTIL, TESTS_UNTIL = 0.4, 0.8  # shares of the budget; what is left of it is for tests once more
# Tests that are run once more, and how memory is allocated then.
ALLOCATORS = ("backend:cudaMallocAsync", "expandable_segments:True")
AGAIN = "streams or graphs"
OUTCOMES = ("passed", "failed", "skipped")
WHEELS = ROOT / "out/wheels"
STAGES = ("correctness", "host", "kernels", "peers", "training", "tuning")
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
    """`main` are timed for all sizes; the others, one of which is a set, with the anchors again."""

    main: list[Row]
    more: list[Row]
    kernels: list[Row]
    peers: list[Row]
    ours: tuple[str, ...]  # keys of those that run pace_kernels
    anchors: tuple[str, ...]

    @property
    def all(self) -> dict[str, Row]:
        return {row.key: row for row in (*self.main, *self.more, *self.kernels, *self.peers)}

    def set(self, name: str) -> list[Row]:
        if name in ("main", "host"):
            return self.main
        return [r for r in self.main if r.key in self.anchors] + getattr(self, name)


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


Make = Callable[[list[nn.Parameter]], Contender]


def of_buckets(make: Make) -> Make:
    """With gradients that are views of one bucket, as DDP's and FSDP2's are: at no multiple of 16 bytes."""

    def build(parameters: list[nn.Parameter]) -> Contender:
        own = [nn.Parameter(p.detach()) for p in parameters]
        bucket = fill_(torch.empty(1 + sum(p.numel() for p in own), dtype=own[0].dtype, device=own[0].device))
        at = 1
        for p in own:
            p.grad = bucket[at : at + p.numel()].view_as(p)
            at += p.numel()
        return make(own)

    return build


def of_variant(make: Make) -> Make:
    """Of the kernels that csrc/cuda/pace.cu has under PACE_VARIANTS."""

    def build(parameters: list[nn.Parameter]) -> Contender:
        from pace_kernels import _cuda

        if b"PaceTight" not in Path(_cuda.__file__).read_bytes():
            raise RuntimeError("the library is built without PACE_CUDA_DEFINES=-DPACE_VARIANTS")
        os.environ["PACE_VARIANT"] = "1"
        try:
            return make(parameters)  # captured with it
        finally:
            del os.environ["PACE_VARIANT"]

    return build


def compiled_adamw(parameters: list[nn.Parameter]) -> Contender:
    torch.compiler.reset()
    made = AdamW(parameters, lr=torch.tensor(1e-3, device=parameters[0].device))
    return Contender(torch.compile(made.step), lambda: made.state)


def rows_for(device: torch.device) -> Rows:
    from bench_compressed import FORMATS, named, of_copies
    from bench_peers import ROWS as PEERS
    from bench_peers import guarded, of
    from bench_step import (
        ROWS,
        adamw_and_foreach_ema,
        captured_mada_moved,
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
            Row(f"mada-graph-{b}", f"MADA, {b}, graph", graphed(MADA, backend=b), captured_mada_moved, mada_held),
        )
    ]
    fused = known[REFERENCE]
    adamw_graph = Row("adamw-graph", "AdamW fused, graph", graphed(AdamW, fused=True), fused.moved, fused.held)
    ema = known["adamw-ema"]
    foreach_ema = Row(
        "adamw-ema-foreach", "AdamW fused + EMA, foreach", adamw_and_foreach_ema, ema.moved, ema.held, scratch=4
    )
    pullback = [known["pullback-adamw"], known["pullback-adamw-0"]]
    lion = Row(
        f"mada-lion-{first}",
        f'MADA, preset "lion", {first}',
        optimizer(lambda params, **o: MADA.preset("lion", params, **o), backend=first),
        lambda dtype: moved_bytes(dtype, states=1),
        lambda dtype: held_bytes(dtype, states=1),
    )

    def with_bucket(dtype: torch.dtype) -> int:
        return pace_held(dtype) + itemsize(dtype)

    in_graph = graphed(PACE, backend=first)
    kernels = [
        graphs[0],
        Row("tight", f"PACE, {first}, graph, 6 blocks", of_variant(in_graph), pace_moved, pace_held),
        Row("buckets", f"PACE, {first}, buckets", of_buckets(optimizer(PACE, backend=first)), pace_moved, with_bucket),
        *(
            Row(f"buckets-graph-{b}", f"PACE, {b}, buckets, graph", of_buckets(graphed(PACE, backend=b)), pace_moved,
                with_bucket)
            for b in backends
        ),
        Row("buckets-adamw", "AdamW fused, buckets", of_buckets(optimizer(AdamW, fused=True)), fused.moved,
            lambda dtype: fused.held(dtype) + itemsize(dtype)),
        *(
            Row(f"{how}{key}", f"{named(options)}{title}", of_copies(make(PACE, backend=first, **options)),
                lambda _, b=held: round(6 + 2 * b, 1), lambda _, b=held: b + 2)
            for key, (options, held) in FORMATS.items()
            if options
            for how, title, make in (("", "", optimizer), ("graph-", ", graph", graphed))
        ),
    ]  # fmt: skip
    keys = ("torchao-8bit", "torchao-4bit", "bnb-8bit", "bnb-32bit", "schedulefree")
    wheels: list[Row] = [replace(row, make=guarded(row), compiles=False) for row in PEERS if row.key in keys]
    flash = of_copies(of("flashoptim", "FlashAdamW"))  # 8 bits of each moment, and of what the weight has not
    wheels.append(Row("flash", "FlashAdamW, 24-bit weights", flash, lambda d: 3 * itemsize(d) + 6, lambda _: 5))
    compiled = Row("adamw-compile", "AdamW, torch.compile", compiled_adamw, fused.moved, fused.held, compiles=True)
    ours = (*pace, *mada, *preset, *stats, *graphs, *pullback, lion, *(k for k in kernels if k.key != "buckets-adamw"))
    return Rows(
        [*pace, fused, *mada, foreach_ema, ema, known["adamw-foreach"], *preset],
        [*graphs, adamw_graph, *pullback, *stats, lion, known["pace-eager"], known["pace-compile"], compiled],
        kernels,
        wheels,
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
    **{f"host{n}": (f"{n:,} tensors of 4", n * [(4,)]) for n in (1, 148, 2000)},
}
TINY_SIZES = {
    "one": ("One tensor of 64 K", [(64 * 2**10,)]),
    "gpt2": ("A tiny GPT-2", gpt2(vocabulary=503, context=64, layers=1, width=64)),
    "small": ("8 tensors of 1,000", 8 * [(1000,)]),
    "1.7b": ("A tiny Llama", llama(vocabulary=251, layers=1, width=64, hidden=256)),
    **{f"host{n}": (f"{n // 100 + 1} tensors of 4", (n // 100 + 1) * [(4,)]) for n in (1, 148, 2000)},
}
# The most telling first: if the time is up, the later ones are missing.
PLAN = [
    "host148:float32:host", "host1:float32:host", "host2000:float32:host", "gpt2:bfloat16:kernels",
    "one:bfloat16:kernels", "one:float32:main", "gpt2:bfloat16:main", "gpt2:float32:main", "small:float32:main",
    "1.7b:bfloat16:main", "one:bfloat16:main", "small:float32:more", "one:float32:more", "1.7b:float32:main",
    "gpt2:bfloat16:more", "small:bfloat16:main", "gpt2:float32:more", "small:bfloat16:more", "one:bfloat16:more",
    "1.7b:bfloat16:more", "gpt2:bfloat16:peers", "1.7b:bfloat16:peers", "one:float32:peers",
]  # fmt: skip
OF_STAGE = {"host": ("host",), "kernels": ("kernels", "main", "more"), "peers": ("peers",)}  # their sets of rows


def sizes(report: Mapping[str, Any]) -> dict[str, tuple[str, list[tuple[int, ...]]]]:
    return TINY_SIZES if report["dry_run"] else SIZES


def plan(stage: str) -> list[str]:
    return [key for key in PLAN if key.rpartition(":")[2] in OF_STAGE[stage]]


# ---- the report ----


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def headings(rows: Rows) -> dict[str, str]:
    return {REFERENCE: "/ AdamW fused", rows.anchors[0]: "/ PACE"}


def cases_of(report: Mapping[str, Any], rows: Rows) -> dict[str, Case]:
    def known(saved: dict[str, Any]) -> dict[str, Any]:  # rows may have been left out since
        return saved | {"rows": [row for row in saved["rows"] if row["key"] in rows.all]}

    shapes = {key: sizes(report)[key.split(":")[0]][1] for key in report["cases"]}
    return {key: from_json(known(saved), rows.all, shapes[key]) for key, saved in report["cases"].items()}


def notice(report: Mapping[str, Any]) -> str:
    about = report["machine"]
    where = about.get("gpu") or about["cpu"]
    first = f"{where}, torch {about['torch']}, {about['date']}"
    return f"DRY RUN: tiny sizes, no speed is meant. {first}" if report["dry_run"] else first


def as_markdown(report: Mapping[str, Any], rows: Rows, out: Path) -> str:
    parts = [f"# {notice(report)}", "Written by `make gpu`; `bench/harness.py` says how things are measured."]
    parts += report.get("notes", [])  # written by hand into the JSON: what is known of the run since
    cases = cases_of(report, rows)
    for name in ("build", "tests", *STAGES[1:]):
        stage = report["stages"].get(name, {"summary": ""})
        parts += [f"## {name}\n\n{stage['summary']}"] if name in report["stages"] else []
        parts += [markdown_table(stage["lines"])] if stage.get("lines") else []
        parts += [f"- {line}" for line in stage.get("failures", [])]
        mine = [case for key, case in cases.items() if key.split(":")[2] in OF_STAGE.get(name, ())]
        parts += [markdown(case, headings(rows)) for case in mine]
        if name == "training" and name in report["stages"]:
            parts += [path.read_text(encoding="utf-8") for path in sorted(out.glob("throughput-*.md"))]
    parts += [f"{row.name}: {row.note}" for row in rows.all.values() if row.note]
    return "\n\n".join(parts) + "\n"


def draw(report: Mapping[str, Any], rows: Rows, path: Path) -> str:
    """What became of the picture."""
    try:
        import bench_step
    except ImportError as reason:
        return f"no picture: {reason}"
    shown = []
    for key, case in cases_of(report, rows).items():
        size, _, which = key.split(":")
        if case.probe_samples and which == "main":
            case.title = sizes(report)[size][0]
            shown.append(case)
    if not shown:
        return "no picture: no case was measured"
    try:
        keys = [row.key for row in rows.main][:10]
        bench_step.draw(shown, path, notice(report), keys, rows.ours, rows.anchors[0])
    except ImportError as reason:
        return f"no picture: {reason}"
    return str(path)


# ---- the benchmark, in a process of its own ----


def profile(device: torch.device, count: int) -> list[list[str]]:
    """Where a step of PACE spends the host's time, by the profiler, which costs calls of Python some 0.1 µs each."""
    from pace_kernels import PACE

    optimizer, steps = PACE(make_parameters(count * [(4,)], torch.float32, device)), 100
    for _ in range(5):
        optimizer.step()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(steps):
        optimizer.step()
    profiler.disable()
    found = pstats.Stats(profiler).stats.items()  # type: ignore[attr-defined]
    most = sorted(((own, calls, where) for where, (_, calls, own, *_) in found), reverse=True)[:12]
    lines = [[f"PACE, {count} tensors: function", "calls a step", "µs a step"]]
    return lines + [
        [f"{Path(file).name}, {name}", f"{n / steps:g}", f"{1e6 * s / steps:.1f}"] for s, n, (file, _, name) in most
    ]


def benchmark(path: Path, until: float, stage: str) -> None:
    """Runs the part of a stage's plan that the report does not have yet. `until`: a value of time.time()."""
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
        left_out = "left out of a dry run: compiling takes minutes"
        report["failed"].setdefault("", {}).update({"pace-compile": left_out, "adamw-compile": left_out})

    def show() -> None:
        write(path.with_suffix(".md"), as_markdown(report, rows, path.parent))

    for key in plan(stage):
        if key in report["complete"] or time.time() > until:
            continue
        size, dtype, which = key.split(":")
        title, shapes = sizes(report)[size]

        def progress(case: Case, key: str = key) -> None:
            report["cases"][key] = as_json(case)
            save(report, path)
            show()

        def running(row: str, key: str = key) -> None:
            marker.write_text(f"{key}\n{row}", encoding="utf-8")

        watch = Watch(running, progress, keep_going=True, deadline=time.monotonic() + until - time.time())
        excluded = report["failed"].get("", {}) | report["failed"].get(key, {})
        try:
            case = measure(
                title if which in ("main", "host") else f"{title}, {which}",
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
        show()
        print(f"\n{table(case, headings(rows))}", flush=True)
    if stage == "host" and time.time() < until:
        report["stages"].setdefault("host", {"summary": ""})["lines"] = profile(device, 4 if dry else 148)
        save(report, path)
        show()


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


def run_benchmark(path: Path, environment: Mapping[str, str], until: float, stage: str) -> str:
    """A summary."""
    marker = path.with_suffix(".running")
    processes = 0
    while time.time() < until:
        marker.unlink(missing_ok=True)
        processes += 1
        command = [sys.executable, str(Path(__file__).resolve()), "--go-on", str(path), "--until", str(until - ROUND_S)]
        command += ["--stages", stage]
        why = follow(subprocess.Popen(command, env=dict(environment), preexec_fn=end_with_parent), marker, until)
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
    done = sum(report["complete"].get(key) == "" for key in plan(stage))
    return f"{done} of {len(plan(stage))} cases complete, in {processes} process{'es' * (processes > 1)}"


# ---- stages ----


@dataclass
class Run:
    path: Path  # of the report
    report: dict[str, Any]
    environment: dict[str, str]
    scratch: Path
    build: bool
    limit_s: float  # of each stage
    start: float = 0.0  # of the stage

    @property
    def left_s(self) -> float:
        return self.limit_s - (time.time() - self.start)

    @property
    def device(self) -> torch.device:
        return torch.device(self.report["device"])

    def keep(self, name: str, stage: dict[str, Any]) -> None:
        self.report["stages"][name] = stage
        save(self.report, self.path)
        write(self.path.with_suffix(".md"), as_markdown(self.report, rows_for(self.device), self.path.parent))

    def tell(self, name: str) -> None:
        print(f"{name}: {self.report['stages'][name]['summary']}", flush=True)


def tail(text: str, lines: int = 15) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def end_with_parent() -> None:
    """For a process to end when this one is killed, so that it does not keep the GPU."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run_limited(
    command: Sequence[str],
    cwd: Path,
    environment: Mapping[str, str],
    limit_s: float,
    progress: Callable[[str], object] = lambda said: None,
) -> tuple[str, str]:
    """The status, "" on success, and the output, which `progress` gets whenever there is more of it. Processes that the
    command started end with it."""
    until = time.monotonic() + max(limit_s, 1.0)
    with tempfile.TemporaryFile() as out:

        def said() -> str:  # at no offset of its own: the process writes at that
            return os.pread(out.fileno(), os.fstat(out.fileno()).st_size, 0).decode("utf-8", "replace")

        process = subprocess.Popen(
            command, cwd=cwd, env=dict(environment), stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=end_with_parent,
        )  # fmt: skip
        seen = ""
        while (code := process.poll()) is None and time.monotonic() < until:
            time.sleep(0.2)
            if (now := said()) != seen:
                progress(seen := now)
        if code is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"not done within {limit_s:.0f} s", said()
        return "" if code == 0 else f"exit status {code}", said()


def build(environment: Mapping[str, str], device: torch.device, limit_s: float) -> dict[str, Any]:
    """Builds for this GPU alone, which takes the least time; if that fails, as setup.py would by default; then without
    CUDA, since a failed build leaves nothing, and tests compare with the CPU kernels."""
    start = time.monotonic()
    attempts: list[dict[str, str]] = [{}, {"PACE_CUDA": "0"}]
    if device.type == "cuda" and torch.version.hip is None and not environment.get("PACE_CUDA_ARCHS"):
        major, minor = torch.cuda.get_device_capability(device)
        attempts.insert(0, {"PACE_CUDA_ARCHS": f"{major}.{minor}", "PACE_CUDA_DEFINES": "-DPACE_VARIANTS"})
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


def test(run: Run) -> None:
    """Runs tests/gpu, and some once more for each of ALLOCATORS; the table is complete whenever there is more of it.
    Tests that start after the limit skip themselves; one that hangs is ended some time later."""
    command = [sys.executable, "-u", "-m", "pytest", "-vv", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    # tests/conftest.py is about hypothesis, which need not be here.
    command += ["--confcutdir", str(ROOT / "tests/gpu"), "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    said: dict[str, str] = {}  # by the allocator
    failed: list[str] = []

    def told(how: str, output: str) -> None:
        said[how] = output
        counts: Counter[str] = Counter()
        stage: dict[str, Any] = {"lines": [["tests", *OUTCOMES]], "failures": [], "skipped": {}}
        for how, output in said.items():
            files, failures, skipped = read_tests(output)
            for name, mine in files.items():
                stage["lines"].append([f"{name} {how}".strip(), *(f"{mine[what]}" for what in OUTCOMES)])
                counts += mine
            stage["failures"] += failures
            stage["skipped"] |= skipped
        stage["summary"] = ", ".join(f"{counts[what]} {what}" for what in OUTCOMES) if counts else "no results"
        stage["summary"] += "".join(f" ({why})" for why in failed)
        run.keep("tests", stage | {"failed": ", ".join(failed), "counts": dict(counts)})

    for how in ("", *ALLOCATORS):
        left_s = run.left_s - (0.0 if how else (1.0 - TESTS_UNTIL) * run.limit_s)
        if how and (left_s < 10.0 or run.device.type != "cuda"):
            break
        limited = {**run.environment, "PACE_GPU_TEST_SECONDS": f"{0.9 * left_s:.0f}", "COLUMNS": "400"}
        limited |= {"PYTORCH_CUDA_ALLOC_CONF": how} if how else {}
        chosen = ["-k", AGAIN] if how else []
        arguments = [*command, *chosen, str(ROOT / "tests/gpu")]
        status, output = run_limited(arguments, run.scratch / "path", limited, left_s, partial(told, how))
        failed += [status] if status else []
        told(how, output)
        if status:
            print(tail(output, 60), flush=True)


def read_tests(output: str) -> tuple[dict[str, Counter[str]], list[str], dict[str, int]]:
    """What `pytest -vv` has said by now: by file how many passed, failed and were skipped; those that failed, and why,
    if it has come so far; the reasons of skips, with their number."""
    files: dict[str, Counter[str]] = {}
    failures: dict[str, str] = {}
    skipped: Counter[str] = Counter()
    for line in output.splitlines():
        if found := re.match(r"\S*?(\w+)\.py::(.+?) (PASSED|FAILED|ERROR|SKIPPED)(?: \((.*)\))?", line):
            file, name, what, why = found.groups()
            files.setdefault(file, Counter())[{"ERROR": "failed"}.get(what, what.lower())] += 1
            skipped.update([why or ""] if what == "SKIPPED" else [])
            failures |= {f"{file}::{name}": ""} if what in ("FAILED", "ERROR") else {}
        elif found := re.match(r"(?:FAILED|ERROR) \S*?(\w+)\.py::(.+?) - (.*)", line):
            failures[f"{found[1]}::{found[2]}"] = found[3][:300]
    return files, [f"{name}: {why}" for name, why in failures.items()], dict(skipped)


def correctness(run: Run) -> None:
    if run.build:
        stage = build(run.environment, run.device, BUILD_UNTIL * run.limit_s)
        output = stage.pop("output")  # long, and full of this machine's paths
        run.keep("build", stage)
        run.tell("build")
        if stage["failed"]:
            print(tail(output), flush=True)
    use_package(run)
    test(run)
    stage = run.report["stages"]["tests"]
    for line in [*stage["failures"], *(f"skipped {n} × {why}" for why, n in stage["skipped"].items())]:
        print(f"  {line}", flush=True)


def timed_by(name: str) -> Callable[[Run], None]:
    def stage(run: Run) -> None:
        if name == "peers" and any(WHEELS.glob("*.whl")):
            target = str(run.scratch / "peers")
            command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet", "--target", target]
            status, output = run_limited([*command, *map(str, WHEELS.glob("*.whl"))], ROOT, run.environment, 120.0)
            print(f"wheels: {tail(output) if status else 'installed'}", flush=True)
            run.environment["PYTHONPATH"] += os.pathsep + target
        run.keep(name, {"summary": "under way"})
        summary = run_benchmark(run.path, run.environment, run.start + run.limit_s - RESERVE_S, name)
        run.report |= load(run.path)
        run.keep(name, run.report["stages"][name] | {"summary": summary, "seconds": time.time() - run.start})
        rows = rows_for(run.device)
        for key, case in cases_of(run.report, rows).items():
            if key in plan(name) and key not in run.report["complete"]:  # its process was ended before it could say
                print(f"\ncut off: {table(case, headings(rows))}")

    return stage


def training(run: Run) -> None:
    dry = run.report["dry_run"]
    sizes = ("tiny", "tiny-lora") if dry else ("gpt2", "gpt2-256", "lora")
    said, offload = [], ""
    for dtype, size in (("bfloat16", "1.7b"), ("float32", "gpt2")):
        command = [sys.executable, str(ROOT / "bench/bench_offload.py"), "--device", str(run.device), "--dtype", dtype]
        command += ["--quick"] if dry else ["--size", size, "--seconds", "20"]
        status, output = run_limited(command, run.scratch / "path", run.environment, 0.15 * run.limit_s)
        offload += f"{tail(output, 40)}\n\n"
        said.append(f"offload, {dtype}: {status or 'done'}")
    write(run.path.parent / "throughput-offload.md", offload)
    for i, size in enumerate(sizes):
        limit = run.left_s / (len(sizes) - i)
        command = [sys.executable, str(ROOT / "bench/throughput.py"), "--device", str(run.device), "--size", size]
        command += ["--out", str(run.path.parent), "--seconds", f"{limit - 2 * ROUND_S:.0f}"]
        command += ["--rounds", "2", "--steps", "1"] if dry else []

        def progress(output: str, size: str = size) -> None:
            run.keep("training", {"summary": "; ".join([*said, f"{size}: under way"])})

        status, output = run_limited(command, run.scratch / "path", run.environment, limit, progress)
        print(tail(output, 40), flush=True)
        said.append(f"{size}: {status or 'done'}")
        run.keep("training", {"summary": "; ".join(said), "failed": status})


def tuning(run: Run) -> None:
    """A dry run fetches nothing: it takes the protocol's short runs, which train."""
    command = [sys.executable, "-u", str(ROOT / "research/protocol.py"), "--out", str(run.path.parent)]
    minutes = f"{(run.left_s - 3 * ROUND_S) / 60:.2f}"
    command += ["--quick"] if run.report["dry_run"] else ["--smollm", "--minutes", minutes]

    def keep(output: str, status: str = "under way", failed: str = "") -> None:
        lines = [[Path(command[2]).name], *([line.replace("|", "/")] for line in output.splitlines()[-40:])]
        run.keep("tuning", {"summary": status, "failed": failed, "lines": lines})

    status, output = run_limited(command, run.scratch / "path", run.environment, run.left_s - RESERVE_S, keep)
    keep(output, status or "done", status)


RUNS: dict[str, Callable[[Run], None]] = {
    "correctness": correctness,
    **{name: timed_by(name) for name in OF_STAGE},
    "training": training,
    "tuning": tuning,
}


def use_package(run: Run) -> None:
    """From here on processes import the package as it is built now, and the report tells its backends."""
    if not (run.scratch / "path").exists():
        run.environment["PYTHONPATH"] = str(lay_out(run.scratch / "path"))
        sys.path.insert(0, run.environment["PYTHONPATH"])
        described = "import json, pace_kernels.backend as b; print(json.dumps(b.describe()))"
        command = [sys.executable, "-c", described]
        status, output = run_limited(command, run.scratch / "path", run.environment, 60.0)
        if status:
            sys.exit(f"the package cannot be imported:\n{tail(output)}")
        run.report["machine"] |= json.loads(output.splitlines()[-1])
        print("\n".join(f"  {b}: {what}" for b, what in run.report["machine"]["backends"].items()), flush=True)


# ---- the command ----


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    def stages(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(STAGES):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(STAGES)}")
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes: shows that the command works, no speed")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for each stage (default: 540)")
    parser.add_argument("--stages", type=stages, help=f"of {','.join(STAGES)}, with commas between (default: all)")
    parser.add_argument("--no-build", action="store_true", help="with the extension that is there")
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default: bench/results; of a dry run: out/bench)"
    )
    parser.add_argument("--go-on", type=Path, help=argparse.SUPPRESS)  # the benchmark's own process
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out or (ROOT / "out/bench" if arguments.dry_run else ROOT / "bench/results")
    return arguments


def begun(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The report: that of an earlier run on this machine, where stages are named, without theirs; or a new one."""
    about = machine(arguments.device)
    report: dict[str, Any] = {
        "dry_run": arguments.dry_run,
        "device": str(arguments.device),
        "machine": about,
        "budget_s": arguments.budget,
        "stages": {},
        "cases": {},  # key of PLAN -> what was measured
        "complete": {},  # key -> "", or why it is not all that was meant
        "failed": {},  # key -> row -> why it is not run any more; key "": in all cases
    }
    old = load(path) if arguments.stages and path.exists() else {"machine": {}}
    if all(old["machine"].get(key) == about.get(key) for key in ("gpu", "cpu", "torch")):
        again = {key for stage in arguments.stages if stage in OF_STAGE for key in plan(stage)}
        for part in ("stages", "cases", "complete", "failed"):
            report[part] = {key: value for key, value in old[part].items() if key not in again}
    return report


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.go_on:
        benchmark(arguments.go_on, arguments.until, arguments.stages[0])
        return 0
    device = arguments.device
    if device.type == "cuda" and not torch.cuda.is_available():
        kind = torch.version.cuda or torch.version.hip or "no GPU at all"
        print(
            f"gpu: torch {torch.__version__} (built for {kind}) finds no GPU; --device cpu --dry-run needs none",
            file=sys.stderr,
        )
        return 2
    name = f"gpu-{slug(machine(device))}{'-dry-run' if arguments.dry_run else ''}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out.resolve() / f"{name}.json"
    report = begun(path, arguments)
    save(report, path)
    stages = [stage for stage in STAGES if stage in (arguments.stages or STAGES)]
    print(f"{notice(report)}; {arguments.budget:.0f} s for each of {', '.join(stages)}", flush=True)
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "PYTHONIOENCODING": "utf-8",
            # A dry run shares the CPU with whatever else there is: several threads would wait for each other.
            **({"OMP_NUM_THREADS": "1"} if arguments.dry_run else {}),
            "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor"),  # empty: compile times are those of a first run
        }
        run = Run(path, report, environment, Path(folder), not arguments.no_build, arguments.budget)
        for stage in stages:
            run.start = time.time()
            if stage != "correctness":
                use_package(run)
            RUNS[stage](run)
            run.tell("tests" if stage == "correctness" else stage)
            if any("test_gpu_bits" in failure for failure in report["stages"].get("tests", {}).get("failures", [])):
                print("weights or states have wrong bits: nothing else is measured", flush=True)
                break
        print(f"{path}\n{path.with_suffix('.md')}\n{draw(report, rows_for(device), path.with_suffix('.webp'))}")
    print(f"{time.time() - start:.0f} s in all")
    return 1 if any(stage.get("failed") for stage in report["stages"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
