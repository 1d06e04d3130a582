"""The runs of an experiment: what is done is kept in one JSON file, the rest is spread over the cores.

An experiment is a list of specs, plain dictionaries that say everything about a run, and a function that turns a spec
into a result. After every run the file is written anew, whole or not at all. So an experiment can be ended at any time
and goes on where it was; and what a run's spec has changed in since is run again.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import harness
from harness import cpu_model, write

import pace_kernels

# |t| beyond which 1 in 20 goes by chance where there is no difference, by the number of seeds.
CRITICAL = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}

RESULTS = Path(__file__).resolve().parents[1] / "bench/results"

Spec = dict[str, Any]


def parser(documentation: str, file: str, quick: str) -> argparse.ArgumentParser:
    """With the options that every command of an experiment has."""
    found = argparse.ArgumentParser(description=documentation.partition("\n")[0])
    found.add_argument("--out", type=Path, help=f"folder of {file}.xz (bench/results)")
    found.add_argument("--processes", type=int, default=2, help="at once; 0: one, in this process")
    found.add_argument("--quick", action="store_true", help=f"{quick}, into out/quick")
    return found


def path_of(arguments: argparse.Namespace, file: str) -> Path:
    return (arguments.out or (Path("out/quick") if arguments.quick else RESULTS)) / file


def key_of(spec: Mapping[str, Any]) -> str:
    """A name that is read easily: its values, those of nested dictionaries included."""

    def parts(items: Mapping[str, Any]) -> Iterator[str]:
        for name, value in items.items():
            if isinstance(value, Mapping):
                yield from parts(value)
            elif isinstance(value, list | tuple):
                yield f"{name} {'/'.join(map(str, value))}"
            else:
                yield value if isinstance(value, str) else f"{name} {'none' if value is None else f'{value:g}'}"

    return ", ".join(parts(spec))


def load(path: Path) -> dict[str, Any]:
    """What the file has; nothing where there is none."""
    if not path.exists() and not harness.packed(path).exists():
        return {"about": {}, "runs": {}}
    return harness.load(path)


def save(kept: Mapping[str, Any], path: Path) -> None:
    """A line for each run: half the size, and what changed is seen."""
    rest = json.dumps({name: part for name, part in kept.items() if name != "runs"}, indent=1)
    lines = (f"  {json.dumps(key)}: {json.dumps(run)}" for key, run in kept["runs"].items())
    write(path, rest.removesuffix("\n}") + ',\n "runs": {\n' + ",\n".join(lines) + "\n }\n}\n")


def done(kept: Mapping[str, Any], spec: Spec) -> bool:
    run = kept["runs"].get(key_of(spec))
    return run is not None and run["spec"] == spec


def result(kept: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    return kept["runs"][key_of(spec)]["result"]


def made() -> str:
    """Where and when, for a run's entry."""
    date = datetime.datetime.now(datetime.timezone.utc).date()
    isa = torch.backends.cpu.get_cpu_capability()
    ours = f"pace_kernels {pace_kernels.__version__}"
    if not pace_kernels.backends()["cpu"].available:
        ours += " without its kernels"
    return f"{date}, {cpu_model()} ({isa}), torch {torch.__version__}, {ours}"


def provenance(kept: Mapping[str, Any]) -> str:
    """In a sentence, how many runs were made where and when."""
    counts = collections.Counter(run["made"] for run in kept["runs"].values())
    return "; ".join(f"{count} runs: {where}" for where, count in sorted(counts.items())) + ". One thread a run."


def spread(losses: Sequence[float]) -> str:
    """Mean and standard deviation of those that are finite, and how many diverged."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    diverged = sum(map(math.isinf, losses))
    lost = f"{diverged} of {len(losses)} diverged" if diverged else ""
    if not finite:
        return lost or "–"
    deviation = f" ± {statistics.stdev(finite):.4f}" if len(finite) > 1 else ""
    return f"{statistics.mean(finite):.4f}{deviation}" + (f" ({lost})" if lost else "")


def _alone() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def _results(
    run: Callable[[Spec], dict[str, Any]], specs: Sequence[Spec], processes: int
) -> Iterator[tuple[Spec, dict[str, Any], float]]:
    """Each as soon as it is there, with its seconds."""
    if processes == 0:
        yield from ((spec, *_timed(run, spec)) for spec in specs)
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _alone)
    try:
        pending = {pool.submit(_timed, run, spec): spec for spec in specs}
        yield from ((pending[future], *future.result()) for future in as_completed(pending))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def complete(
    path: Path,
    about: Mapping[str, Any],
    specs: Iterable[Spec],
    run: Callable[[Spec], dict[str, Any]],
    processes: int | None = None,
) -> dict[str, Any]:
    """Runs what is not done yet, one thread a run, and returns everything in the file. With 0 processes it runs here.

    ``about`` says what all runs have in common, the corpus, say; a file that was made with another one is refused.
    """
    kept = load(path)
    for name, value in about.items():
        known = kept["about"].get(name) if kept["runs"] else value
        if known != value:
            raise SystemExit(
                f"{path} was made with {name} = {known!r}, this would be {value!r}: give another --out, or remove it"
            )
        kept["about"][name] = value
    by_key: dict[str, Spec] = {}
    for spec in specs:
        assert by_key.setdefault(key_of(spec), spec) == spec, f"two runs of one name: {key_of(spec)}"
    missing = [spec for spec in by_key.values() if not done(kept, spec)]
    if not missing:
        return kept
    start, workers = time.monotonic(), (os.cpu_count() or 1) if processes is None else processes
    for count, (spec, found, seconds) in enumerate(_results(run, missing, workers), start=1):
        kept["runs"][key_of(spec)] = {"spec": spec, "result": found, "seconds": round(seconds, 2), "made": made()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save(kept, path)
        left = (time.monotonic() - start) / count * (len(missing) - count)
        print(f"[{count}/{len(missing)}, {left / 60:.0f} min left] {key_of(spec)}", file=sys.stderr, flush=True)
    return kept


def _timed(run: Callable[[Spec], dict[str, Any]], spec: Spec) -> tuple[dict[str, Any], float]:
    start = time.monotonic()
    return run(spec), time.monotonic() - start
