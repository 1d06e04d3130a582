"""Train a small language model with AdamW, AdamW + EMA, PACE and MADA at six learning rates each, and compare.

    python examples/train_lm.py            a table, out/loss.png and out/results.json in under 2 minutes on 2 cores
    python examples/train_lm.py --quick    the same in a few seconds, to see that it works

The text is the source of Python's standard library, or a file of your own (--data). Every run starts from the same
weights, sees the same batches, and has a constant learning rate after a short warm-up. AdamW + EMA has three decays to
choose from and PACE three strengths of its pull. Each row of the table is the best of its settings and learning rates,
by the validation loss of the weights that it hands back: the average, where there is one.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import torch
from gpt import GPT, GPTConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pace_kernels

MODEL = GPTConfig(layers=2, width=64, heads=4)  # 0.12 M parameters
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
WARMUP_SHARE = 0.1  # of all steps; the learning rate is constant from there on
GRADIENT_NORM = 1.0  # longer gradients are scaled down to it

# As many settings for one as for the other. No average changes AdamW's trajectory, so one run has all of the decays.
EMA_DECAYS = (0.9, 0.95, 0.98)
PULLS = (0.15, 1.5, 15.0)  # lambda_pullback; the first is the default

FULL_RUN = {"steps": 400, "lrs": [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2], "validation_windows": 64}
QUICK_RUN = {"steps": 6, "lrs": [1e-3, 2e-3], "validation_windows": 4}
BATCH = 4  # windows of GPTConfig.context bytes
# Nats per byte: twice the standard deviation over seeds of a difference between optimizers, 0.016 to 0.021 in six seeds
# of this task (bench/results, "MADA before the protocol"), rounded up.
SEED_NOISE = 0.05
NEAR = 0.1  # nats per byte: a learning rate is borne if the loss is within this of the best

HELD_OUT = 10  # one file, or one byte of a single file, in so many is for validation
STDLIB_BYTES = 8_000_000  # upper limit on the standard library's text
EXIT_INTERRUPTED = 130  # what shells report for a process that Ctrl-C ended

ParamGroups = list[dict[str, Any]]


# --- Optimizers ---


def build(name: str, groups: ParamGroups, lr: float, pull: float) -> Optimizer:
    if name == "AdamW":
        return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)
    if name == "PACE":
        return pace_kernels.PACE(groups, lr=lr, betas=BETAS, lambda_pullback=pull)
    return pace_kernels.MADA(groups, lr=lr, betas=BETAS)


# Row of the table -> the optimizer that trains it, and how the names of the weights begin that it hands back.
ROWS = {
    "AdamW": ("AdamW", "live"),
    "AdamW + EMA": ("AdamW", "EMA"),
    "PACE": ("PACE", "average"),
    "MADA": ("MADA", "live"),
}
OURS = ("PACE", "MADA")


def parameter_groups(model: nn.Module) -> ParamGroups:
    """Weight decay for matrices and embeddings; none for biases and normalization, the parameters of one dimension."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


# --- Text ---


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes to validate on."""

    description: str
    train: Tensor  # uint8, one dimension
    validation: Tensor

    @staticmethod
    def from_bytes(description: str, train: bytes, validation: bytes) -> Corpus:
        shortest = GPTConfig.context + 1
        if min(len(train), len(validation)) < shortest:
            raise ValueError(f"{description}: too short, both parts of the text need at least {shortest} bytes")
        # bytearray because torch warns about memory that it may not write to
        parts = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (train, validation))
        return Corpus(description, *parts)

    def sha256(self) -> str:
        digest = hashlib.sha256(self.train.numpy())
        digest.update(self.validation.numpy())
        return digest.hexdigest()


def stdlib_corpus() -> Corpus:
    """The source of this Python's standard library, every tenth file held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    skipped |= {"encodings", "pydoc_data"}  # generated tables, a fifth of the bytes
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    total = 0
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    for index, path in enumerate(path for path in paths if skipped.isdisjoint(path.parts)):
        source = (root / path).read_bytes()
        total += len(source)
        if total > STDLIB_BYTES:
            break
        parts[index % HELD_OUT == HELD_OUT - 1].append(source)
    description = f"source of Python {platform.python_version()}'s standard library"
    return Corpus.from_bytes(description, *(b"\n".join(part) for part in parts))


def file_corpus(path: Path) -> Corpus:
    """One file, its last tenth held out."""
    text = path.read_bytes()
    split = len(text) - len(text) // HELD_OUT
    return Corpus.from_bytes(path.name, text[:split], text[split:])


def windows(text: Tensor, starts: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token windows at `starts` and the same shifted by one byte, both (len(starts), context)."""
    span = text[starts[:, None] + torch.arange(GPTConfig.context + 1)].long().to(device)
    return span[:, :-1], span[:, 1:]


def batches(text: Tensor, batch: int, seed: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random windows: the same ones for every optimizer that trains with this seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - GPTConfig.context, (batch,), generator=generator)
        yield windows(text, starts, device)


def validation_set(text: Tensor, count: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The same evenly spread windows at every evaluation, in chunks whose activations stay in the cache."""
    starts = torch.linspace(0, len(text) - GPTConfig.context - 1, count).long()
    return [windows(text, chunk, device) for chunk in starts.split(16)]


@functools.cache
def corpus_of(path: Path | None) -> Corpus:
    return file_corpus(path) if path else stdlib_corpus()


@torch.inference_mode()
def validation_loss(model: nn.Module, chunks: Sequence[tuple[Tensor, Tensor]]) -> float:
    weighted = [model.loss(tokens, targets).item() * targets.numel() for tokens, targets in chunks]
    return sum(weighted) / sum(targets.numel() for _, targets in chunks)


# --- Training ---


@dataclass(frozen=True)
class Task:
    """What all runs have in common."""

    data: Path | None  # None: the standard library
    steps: int
    validation_windows: int
    device: torch.device


@dataclass
class Run:
    """One training run. What it measured has the names of the weights as keys: live, or those of an average."""

    optimizer: str
    lr: float
    seed: int
    pull: float  # of PACE alone
    losses: dict[str, float]  # validation loss at the end, nats per byte; infinite after a divergence
    step_ms: dict[str, float]  # median, the average's update included
    state_bytes: dict[str, float]  # per parameter, the average's copy included

    def __str__(self) -> str:
        pull = f", pull {self.pull:g}" if self.optimizer == "PACE" else ""
        losses = ", ".join(f"{name} {loss:.3f}" for name, loss in self.losses.items())
        return f"{self.optimizer} at {self.lr:g}{pull}: {losses}"


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * time.perf_counter()

    began = now()
    call()
    return now() - began


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Memory behind the tensors, shared memory counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def train(task: Task, name: str, lr: float, seed: int, pull: float) -> Run:
    torch.manual_seed(seed)
    corpus = corpus_of(task.data)
    model = GPT(MODEL).to(task.device)
    optimizer = build(name, parameter_groups(model), lr, pull)
    beside = {}  # averages that torch keeps
    if name == "AdamW":
        for decay in EMA_DECAYS:
            beside[f"EMA {decay}"] = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    training = batches(corpus.train, BATCH, seed, task.device)
    warmup = max(1, round(WARMUP_SHARE * task.steps))
    spent: dict[str, list[float]] = {weights: [] for weights in ("step", *beside)}

    for step in range(1, task.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / warmup)
        model.loss(*next(training)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        spent["step"].append(milliseconds(optimizer.step, task.device))
        for weights, average in beside.items():
            spent[weights].append(milliseconds(lambda: average.update_parameters(model), task.device))  # noqa: B023
        optimizer.zero_grad()

    shown = {"live": (model, nullcontext())}
    if name == "PACE":
        shown["average"] = (model, optimizer.averaged())  # within it the model has the average
    shown |= {weights: (average.module, nullcontext()) for weights, average in beside.items()}
    validation = validation_set(corpus.validation, task.validation_windows, task.device)
    median = {weights: statistics.median(values) for weights, values in spent.items()}
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    parameters = sum(p.numel() for p in model.parameters())
    run = Run(name, lr, seed, pull, {}, {}, {})
    for weights, (holder, within) in shown.items():
        with within:
            loss = validation_loss(holder, validation)
        run.losses[weights] = loss if math.isfinite(loss) else math.inf
        run.step_ms[weights] = median["step"] + median.get(weights, 0.0)
        extra = beside[weights].parameters() if weights in beside else ()
        run.state_bytes[weights] = bytes_of([*states, *extra]) / parameters
    return run


def all_runs(task: Task, lrs: Sequence[float], seeds: int, processes: int) -> list[Run]:
    """Several at once, one thread each: for so small a model that is twice as fast as several threads for one."""
    queue = [
        (name, lr, seed, pull)
        for seed in range(seeds)
        for lr in lrs
        for name, pulls in (("AdamW", (0.0,)), ("PACE", PULLS), ("MADA", (0.0,)))
        for pull in pulls
    ]
    runs: list[Run] = []
    began = time.monotonic()

    def finished(run: Run) -> None:
        runs.append(run)
        left = round((time.monotonic() - began) * (len(queue) - len(runs)) / len(runs))
        print(f"[{len(runs)}/{len(queue)}] {run}  {left // 60}:{left % 60:02d} left", file=sys.stderr, flush=True)

    if processes == 1:
        for words in queue:
            finished(train(task, *words))
        return runs
    # Spawned, since torch's threads do not survive a fork.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, torch.set_num_threads, (1,)) as pool:
        try:
            for future in as_completed([pool.submit(train, task, *words) for words in queue]):
                finished(future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return runs


# --- Report: from what results.json has ---


def setting(run: Run, weights: str) -> str:
    return {"EMA": f"decay {weights[4:]}", "average": f"pull {run.pull:g}"}.get(weights.split(" ")[0], "-")


def row(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    """The best learning rate and setting of a row, by the mean loss over seeds."""
    trainer, begins = ROWS[name]
    found: dict[tuple[float, str], list[tuple[Run, str]]] = {}
    for run in sorted((run for run in runs if run.optimizer == trainer), key=lambda run: (run.lr, run.pull, run.seed)):
        for weights in run.losses:
            if weights.startswith(begins):
                found.setdefault((run.lr, setting(run, weights)), []).append((run, weights))
    loss = {choice: statistics.mean(run.losses[weights] for run, weights in same) for choice, same in found.items()}
    lr, chosen = best = min(loss, key=lambda choice: loss[choice])
    by_lr = [min(loss[choice] for choice in loss if choice[0] == one) for one in dict.fromkeys(lr for lr, _ in loss)]
    lrs = list(dict.fromkeys(one for one, _ in loss))
    borne = [one for one, value in zip(lrs, by_lr, strict=True) if value <= loss[best] + NEAR]
    return {
        "optimizer": name,
        "lr": lr,
        "at_edge": len(lrs) > 1 and lr in (lrs[0], lrs[-1]),
        "setting": chosen,
        "loss": loss[best],
        "loss_by_lr": by_lr,
        "borne": [borne[0], borne[-1]],
        "step_ms": statistics.median(run.step_ms[weights] for run, weights in found[best]),
        "state_bytes": found[best][0][0].state_bytes[found[best][0][1]],
    }


def number(loss: float | None) -> float:
    """A loss from JSON, which has null after a divergence."""
    return math.inf if loss is None else loss


def cells(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table, its heads first."""
    lines = [("optimizer", "lr", "setting", "loss", f"lr within {NEAR:g}", "ms per step", "state bytes / parameter")]
    for place in report["rows"]:
        lr, (low, high) = f"{place['lr']:g}" + "*" * place["at_edge"], place["borne"]
        costs = (f"{place['step_ms']:.2f}", f"{place['state_bytes']:.1f}")
        lines.append(
            (place["optimizer"], lr, place["setting"], f"{number(place['loss']):.3f}", f"{low:g} to {high:g}", *costs)
        )
    return lines


def table(report: dict[str, Any]) -> str:
    lines = cells(report)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def says(report: dict[str, Any]) -> str:
    """What there is to see."""
    pace, ema = (next(place for place in report["rows"] if place["optimizer"] == n) for n in ("PACE", "AdamW + EMA"))
    losses = [number(place["loss"]) for place in (pace, ema)]
    near = abs(losses[0] - losses[1]) <= SEED_NOISE
    return (
        f"PACE is within {NEAR:g} of its best loss up to a learning rate of {pace['borne'][1]:g}, AdamW + EMA up to"
        f" {ema['borne'][1]:g}. Their best losses, {losses[0]:.3f} and {losses[1]:.3f}, are"
        f" {'too near to each other to name a winner' if near else 'apart by more than the noise of a seed'}."
    )


def notes(report: dict[str, Any]) -> str:
    lrs, decays, pulls = (", ".join(f"{x:g}" for x in some) for some in (report["lrs"], EMA_DECAYS, PULLS))
    text = f"""\
A higher rate is no gain in itself: where a pull is so strong that it clamps every coordinate, the average takes w_t of
AdamW's step, 0.30 at step 400 (docs/settings.md). And over six seeds of longer runs no difference between PACE and
AdamW + EMA was found at a constant rate; with a decaying one PACE was better (docs/benchmarks.md).

loss           on held-out text, nats per byte, after {report["steps"]} steps; seeds: {report["seeds"]}
lr, setting    the best of {lrs} (constant after warm-up),
               and of EMA decays {decays} or PACE's pulls {pulls}
lr within {NEAR:g}  the lowest and the highest with a loss within {NEAR:g} of the row's best
ms per step    optimizer.step() and torch's update of the average; for so small a model, the time of calls"""
    if any(place["at_edge"] for place in report["rows"]):
        text += "\n*              at the edge of the learning rates tried, so one beyond might be better"
    return text


def plot(report: dict[str, Any], path: Path) -> None:
    """Loss over learning rates, a line for each row of the table."""
    from plots import OTHERS as GREY
    from plots import OURS as BLUE
    from plots import label_line_ends, new_figure, save

    figure, (axes,) = new_figure([8.4], height=4.8)
    first, rest = says(report).split(". ", 1)
    title = f"{first}.\n{rest}\nBlue: PACE and MADA, ours. Grey: AdamW. Thick: averaged weights. Lower is better."
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    places, lines = list(range(len(report["lrs"]))), []
    for place in report["rows"]:
        color, losses = BLUE if place["optimizer"] in OURS else GREY, [number(loss) for loss in place["loss_by_lr"]]
        averaged = place["setting"] != "-"
        axes.plot(places, losses, color=color, linewidth=2.6 if averaged else 1.4, linestyle="-" if averaged else "--")
        axes.plot(report["lrs"].index(place["lr"]), number(place["loss"]), "o", color=color, markersize=8)
        lines.append((place["optimizer"], places, losses, color))
    axes.set_xticks(places, [f"{lr:g}" for lr in report["lrs"]])
    axes.set(xlabel="learning rate, constant; each is twice the one before", ylabel="held-out loss, nats per byte")
    label_line_ends(axes, lines)
    save(figure, path)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def without_infinity(value: Any) -> Any:
    """The same, with null for the losses of a diverged run, which JSON cannot express."""
    if isinstance(value, dict):
        return {key: without_infinity(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_infinity(item) for item in value]
    return None if isinstance(value, float) and math.isinf(value) else value


# --- Command line ---


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse type that accepts only numbers above zero."""

    def convert(text: str) -> Any:
        number = kind(text)
        if not 0 < number < math.inf:
            raise ValueError
        return number

    convert.__name__ = f"positive {kind.__name__}"  # argparse puts it into "invalid ... value"
    return convert


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rates = " ".join(f"{lr:g}" for lr in FULL_RUN["lrs"])
    for name, kind, default, said in (
        ("steps", int, None, f"optimizer steps of each training run ({FULL_RUN['steps']})"),
        ("seeds", int, 1, "repetitions with other weights and batches (1)"),
        ("processes", int, None, "runs at the same time (as many as there are cores; 1 on a GPU)"),
    ):
        parser.add_argument(f"--{name}", type=positive(kind), metavar="N", default=default, help=said)
    parser.add_argument("--lrs", type=positive(float), nargs="+", metavar="LR", help=f"learning rates to try ({rates})")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="where to train (cpu)")
    parser.add_argument("--data", type=Path, metavar="FILE", help="text to train on (Python's standard library)")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="folder of the results (out)")
    parser.add_argument("--quick", action="store_true", help="a few steps: shows that everything works, and no more")
    quick = parser.parse_args(argv).quick
    parser.set_defaults(**(QUICK_RUN if quick else FULL_RUN))
    arguments = parser.parse_args(argv)
    alone = quick or arguments.device.type != "cpu"  # for a few steps other processes start too slowly
    arguments.processes = arguments.processes or (1 if alone else os.cpu_count() or 1)
    arguments.lrs = sorted(set(arguments.lrs))
    try:
        arguments.corpus = corpus_of(arguments.data)
    except (OSError, ValueError) as error:
        parser.error(f"{error}" + ("" if arguments.data else ", give a text of your own with --data FILE"))
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    task = Task(arguments.data, arguments.steps, arguments.validation_windows, arguments.device)
    corpus, parameters = arguments.corpus, sum(p.numel() for p in GPT(MODEL).parameters())
    print(
        f"GPT of {parameters / 1e6:.2f} M parameters, {task.steps} steps of {BATCH} x {GPTConfig.context} bytes of the"
        f" {corpus.description}, torch {torch.__version__}\n",
        flush=True,
    )
    began = time.monotonic()
    try:
        runs = all_runs(task, arguments.lrs, arguments.seeds, arguments.processes)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    report = without_infinity(
        {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cpu": cpu_name(),
            "device": torch.cuda.get_device_name(task.device) if task.device.type == "cuda" else "cpu",
            "processes": arguments.processes,
            "seconds": round(time.monotonic() - began),
            "cpu_seconds": round(sum(os.times()[:4])),  # of all processes
            "seeds": arguments.seeds,
            "lrs": arguments.lrs,
            "steps": task.steps,
            "batch": BATCH,
            "validation_windows": task.validation_windows,
            "corpus": {"description": corpus.description, "sha256": corpus.sha256()},
            "model": asdict(MODEL),
            "rows": [row(name, runs) for name in ROWS],
            "runs": [asdict(run) for run in runs],
        }
    )
    plot(report, arguments.out / "loss.png")
    (arguments.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{table(report)}\n\n{says(report)}\n\n{notes(report)}")
    print(f"\n{report['seconds']} s, of all processes {report['cpu_seconds']} s of CPU time; written: ", end="")
    print(f"{arguments.out / 'loss.png'}, {arguments.out / 'results.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
