"""Train a small language model with AdamW, AdamW + EMA, PACE and MADA, and compare what each hands back.

    python examples/train_lm.py            a table, out/loss.png and out/results.json in under 6 minutes on 2 cores
    python examples/train_lm.py --quick    the same in a few seconds, to see that it works

The text is the source of Python's standard library, or a file of your own (--data). Every optimizer starts from the
same weights, sees the same batches, and is tried at the same learning rates, constant after a short warm-up. Each row
of the table stands at its own best learning rate, judged by the validation loss of the weights it hands back.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import torch
from gpt import GPT, GPTConfig
from plots import PALETTE, label_line_ends, new_figure, save
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pace_kernels

# Shared by all optimizers: usual settings for language models, confirmed by the loss of AdamW.
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
WARMUP_SHARE = 0.1  # of all steps; the learning rate is constant from there on
GRADIENT_NORM = 1.0  # longer gradients are scaled down to it

# AdamW's trajectory does not depend on its average, so one run tries all of these and the row keeps the best.
EMA_DECAYS = (0.9, 0.95, 0.98, 0.99)

EVALUATIONS = 10  # points on a validation curve
HELD_OUT = 10  # one file, or one byte of a single file, in so many is for validation
STDLIB_BYTES = 8_000_000  # upper limit on the standard library's text
LIVE = "live"  # names the weights being trained, beside the names of their averages

FULL_RUN = {"steps": 500, "lrs": [1e-3, 2e-3, 4e-3], "batch": 8, "validation_windows": 128}
QUICK_RUN = {"steps": 12, "lrs": [5e-4, 1e-3], "batch": 2, "validation_windows": 8}

EXIT_INTERRUPTED = 130  # what shells report for a process that Ctrl-C ended

ParamGroups = list[dict[str, Any]]
Builder = Callable[[ParamGroups, float], Optimizer]


# --- Averages of the weights ---


class WeightAverage(Protocol):
    """An average of the weights over training, brought up to date after each optimizer step."""

    def update(self) -> None: ...

    def averaged(self) -> AbstractContextManager[nn.Module]:
        """A model that has the averaged weights inside the `with` block."""
        ...

    def extra_state(self) -> Iterable[Tensor]:
        """The tensors it keeps beside the optimizer's own state."""
        ...


class TorchEMA:
    """torch's exponential moving average, kept beside the optimizer."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, decay: float) -> None:
        self.model = model
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def update(self) -> None:
        self.average.update_parameters(self.model)

    def averaged(self) -> AbstractContextManager[nn.Module]:
        return nullcontext(self.average.module)

    def extra_state(self) -> Iterable[Tensor]:
        return [*self.average.parameters(), *self.average.buffers()]


class BuiltInAverage:
    """The average that an optimizer of this package keeps itself."""

    def __init__(self, model: nn.Module, optimizer: pace_kernels.PACE) -> None:
        self.model = model
        self.optimizer = optimizer

    def update(self) -> None:
        """Nothing is left to do: `optimizer.step()` has done it."""

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        with self.optimizer.averaged():
            yield self.model

    def extra_state(self) -> Iterable[Tensor]:
        return []


# --- Optimizers ---


def adamw(groups: ParamGroups, lr: float) -> Optimizer:
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)


def pace(groups: ParamGroups, lr: float) -> Optimizer:
    return pace_kernels.PACE(groups, lr=lr, betas=BETAS, lambda_pullback=0.15, ema_kappa=0.2)


def mada(groups: ParamGroups, lr: float) -> Optimizer:
    return pace_kernels.MADA(groups, lr=lr, betas=BETAS)


def coefficients(optimizer: pace_kernels.MADA) -> dict[str, float]:
    return dict(optimizer.coefficients)


def no_series(optimizer: Optimizer) -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class Contender:
    """One row of the table. Rows with the same `build` follow the same trajectory and share its training runs."""

    name: str
    build: Builder
    # Name -> average; the row hands back the best of them, or the live weights if there is none.
    averages: Mapping[str, Callable[[nn.Module, Any], WeightAverage]] = field(default_factory=dict)
    # Further values of the optimizer, such as learned coefficients, to plot over training.
    series: Callable[[Any], dict[str, float]] = no_series

    @property
    def returns(self) -> tuple[str, ...]:
        """Names of the weights that the row may hand back."""
        return tuple(self.averages) or (LIVE,)


CONTENDERS = (
    Contender("AdamW", adamw),
    Contender("AdamW + EMA", adamw, {f"EMA {decay}": partial(TorchEMA, decay=decay) for decay in EMA_DECAYS}),
    Contender("PACE", pace, {"built-in average": BuiltInAverage}),
    Contender("MADA", mada, series=coefficients),
)


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


# --- Progress ---


class Progress:
    """A bar on stderr with the time left. Without a terminal, as in a log, a line every 15 seconds instead."""

    WIDTH = 24

    def __init__(self, total_work: float) -> None:
        self.total_work = total_work
        self.done = 0.0
        self.text = ""
        self.interactive = sys.stderr.isatty()
        self.interval = 0.1 if self.interactive else 15.0  # seconds
        self.start = self.last_drawn = time.monotonic()

    def advance(self, work: float, text: str | None = None) -> None:
        self.done += work
        self.text = text or self.text
        now = time.monotonic()
        if now - self.last_drawn >= self.interval:
            self.last_drawn = now
            self._draw(now - self.start)

    def note(self, line: str) -> None:
        """Print a line that stays, above the bar."""
        self.clear()
        print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.interactive:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _draw(self, elapsed: float) -> None:
        share = min(1.0, self.done / self.total_work)
        left = round(elapsed * (1 - share) / share)
        filled = round(self.WIDTH * share)
        bar = "#" * filled + "." * (self.WIDTH - filled)
        line = f"[{bar}] {share:4.0%}  {self.text}  {left // 60}:{left % 60:02d} left"
        self.clear()
        print(line, end="" if self.interactive else "\n", file=sys.stderr, flush=True)


# --- Training ---


@dataclass
class Run:
    """What one training run measured. Dictionaries are keyed by the name of the weights: live, or an average."""

    optimizer: str
    lr: float
    seed: int
    steps: list[int] = field(default_factory=list)  # at which the following were evaluated
    losses: dict[str, list[float]] = field(default_factory=dict)  # validation loss in nats per byte
    series: dict[str, list[float]] = field(default_factory=dict)
    step_ms: dict[str, float] = field(default_factory=dict)  # median, the average's update included
    state_bytes: dict[str, float] = field(default_factory=dict)  # per parameter, the average's copy included

    @property
    def title(self) -> str:
        return f"{self.optimizer}  lr {self.lr:g}  seed {self.seed}"

    def final(self, weights: str) -> float:
        """Last validation loss; infinite after a divergence, so that such a run is never the best."""
        loss = self.losses[weights][-1]
        return loss if math.isfinite(loss) else math.inf


@dataclass(frozen=True)
class Task:
    """What all runs have in common."""

    corpus: Corpus
    steps: int
    batch: int
    validation_windows: int
    device: torch.device

    @property
    def evaluated_steps(self) -> set[int]:
        count = min(EVALUATIONS, self.steps)
        return {round(self.steps * (i + 1) / count) for i in range(count)}

    def work(self, averages: int) -> float:
        """Forward and backward passes of one run in windows; a forward pass alone counts for a third."""
        evaluated = len(self.evaluated_steps) * (1 + averages) * self.validation_windows
        return self.steps * self.batch + evaluated / 3


class Stopwatch:
    """Wall time of a `with` block in milliseconds, including the device's queued work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.milliseconds: list[float] = []

    def __enter__(self) -> None:
        self._synchronize()
        self.start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self._synchronize()
        self.milliseconds.append(1e3 * (time.perf_counter() - self.start))

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@torch.inference_mode()
def validation_loss(model: nn.Module, chunks: Sequence[tuple[Tensor, Tensor]]) -> float:
    weighted = [model.loss(tokens, targets).item() * targets.numel() for tokens, targets in chunks]
    return sum(weighted) / sum(targets.numel() for _, targets in chunks)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Memory behind the tensors, shared memory counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def train(sharing: Sequence[Contender], lr: float, seed: int, task: Task, progress: Progress) -> Run:
    """Train once for all contenders that share a trajectory."""
    run = Run(sharing[0].name, lr, seed)
    torch.manual_seed(seed)
    model = GPT(GPTConfig()).to(task.device)
    optimizer = sharing[0].build(parameter_groups(model), lr)
    averages = {name: build(model, optimizer) for contender in sharing for name, build in contender.averages.items()}
    step_watch = Stopwatch(task.device)
    update_watches = {name: Stopwatch(task.device) for name in averages}
    training = batches(task.corpus.train, task.batch, seed, task.device)
    validation = validation_set(task.corpus.validation, task.validation_windows, task.device)
    warmup = max(1, round(WARMUP_SHARE * task.steps))

    for step in range(1, task.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / warmup)
        loss = model.loss(*next(training))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        with step_watch:
            optimizer.step()
        for name, average in averages.items():
            with update_watches[name]:
                average.update()
        optimizer.zero_grad()
        progress.advance(task.batch, f"{run.title}  step {step}/{task.steps}  loss {loss.item():.3f}")

        if step in task.evaluated_steps:
            run.steps.append(step)
            run.losses.setdefault(LIVE, []).append(validation_loss(model, validation))
            for name, average in averages.items():
                with average.averaged() as averaged_model:
                    run.losses.setdefault(name, []).append(validation_loss(averaged_model, validation))
            for contender in sharing:
                for name, value in contender.series(optimizer).items():
                    run.series.setdefault(name, []).append(value)
            progress.advance((1 + len(averages)) * task.validation_windows / 3)

    parameters = sum(p.numel() for p in model.parameters())
    own_state = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    run.step_ms[LIVE] = statistics.median(step_watch.milliseconds)
    run.state_bytes[LIVE] = bytes_of(own_state) / parameters
    for name, average in averages.items():
        both = zip(step_watch.milliseconds, update_watches[name].milliseconds, strict=True)
        run.step_ms[name] = statistics.median(step + update for step, update in both)
        run.state_bytes[name] = bytes_of([*own_state, *average.extra_state()]) / parameters
    return run


# --- Report ---


@dataclass(frozen=True)
class Standing:
    """A contender at its best learning rate."""

    contender: Contender
    weights: str  # what it hands back: the live weights, or the name of its best average
    lr: float
    runs: Sequence[Run]  # at that learning rate, one a seed
    by_lr: Mapping[float, float]  # mean final loss of the weights it would hand back at each learning rate

    def loss(self, weights: str) -> str:
        """Final validation loss, with the standard deviation over seeds where there are several."""
        losses = [run.final(weights) for run in self.runs]
        mean = statistics.mean(losses)
        spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 and math.isfinite(mean) else ""
        return f"{mean:.3f}{spread}"

    @property
    def step_ms(self) -> float:
        return statistics.median(run.step_ms[self.weights] for run in self.runs)

    @property
    def state_bytes(self) -> float:
        return self.runs[0].state_bytes[self.weights]

    @property
    def at_edge(self) -> bool:
        """Whether a learning rate beyond the tried ones might be better still."""
        return len(self.by_lr) > 1 and self.lr in (min(self.by_lr), max(self.by_lr))

    def mean_curve(self, weights: str) -> list[float]:
        return [statistics.mean(losses) for losses in zip(*(run.losses[weights] for run in self.runs), strict=True)]


def standing(contender: Contender, runs: Sequence[Run]) -> Standing:
    """Choose learning rate and average together, by the mean final loss over seeds."""
    seeds_of: dict[float, list[Run]] = {}
    for run in runs:
        seeds_of.setdefault(run.lr, []).append(run)
    mean_loss = {
        (lr, weights): statistics.mean(run.final(weights) for run in seeds)
        for lr, seeds in seeds_of.items()
        for weights in contender.returns
    }
    lr, weights = min(mean_loss, key=lambda choice: mean_loss[choice])
    by_lr = {lr: min(mean_loss[lr, weights] for weights in contender.returns) for lr in sorted(seeds_of)}
    return Standing(contender, weights, lr, seeds_of[lr], by_lr)


def table(standings: Sequence[Standing]) -> str:
    head = ("optimizer", "lr", "live", "averaged", "average", "ms per step", "state bytes per parameter")
    rows = [head]
    for place in standings:
        averaged = place.weights != LIVE
        rows.append(
            (
                place.contender.name,
                f"{place.lr:g}" + ("*" if place.at_edge else ""),
                place.loss(LIVE),
                place.loss(place.weights) if averaged else "-",
                place.weights if averaged else "-",
                f"{place.step_ms:.2f}",
                f"{place.state_bytes:.1f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def footnotes(standings: Sequence[Standing], seeds: str, task: Task) -> str:
    lrs = sorted({lr for place in standings for lr in place.by_lr})
    lines = [
        f"live, averaged: validation loss in nats per byte after {task.steps} steps, {seeds}"
        + (", mean ± standard deviation" if any(len(place.runs) > 1 for place in standings) else ""),
        f"lr, average: the best of learning rates {', '.join(f'{lr:g}' for lr in lrs)} (constant after warm-up) and of"
        f" EMA decays {', '.join(f'{decay:g}' for decay in EMA_DECAYS)}, chosen by that same loss",
        "ms per step: median of optimizer.step(), and of the average's update where torch keeps it beside",
    ]
    if any(place.at_edge for place in standings):
        lines.insert(2, "*: at the edge of the learning rates tried, so one beyond might be better")
    for place in standings:  # after an interruption
        if len(place.by_lr) < len(lrs):
            tried = ", ".join(f"{lr:g}" for lr in place.by_lr)
            lines.append(f"{place.contender.name} was tried at {tried} only, so its row is at a disadvantage")
    return "\n".join(lines)


def plot(standings: Sequence[Standing], title: str, path: Path) -> None:
    """Validation loss over training, final loss over learning rates, and the optimizers' own series if any."""
    several_lrs = any(len(place.by_lr) > 1 for place in standings)
    series_names = sorted({name for place in standings for name in place.runs[0].series})
    figure, panels = new_figure([6.4] + [3.6] * several_lrs + [4.6] * bool(series_names), height=4.2)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    colors = {contender.name: PALETTE[index] for index, contender in enumerate(CONTENDERS)}

    axes, lines = panels.pop(0), []
    drawn, shown = set(), []
    for place in standings:
        color, steps = colors[place.contender.name], place.runs[0].steps
        for weights in dict.fromkeys([LIVE, place.weights]):
            curve = (place.contender.build, place.lr, weights)
            if curve in drawn:  # AdamW's own weights at the same learning rate are AdamW + EMA's live weights
                continue
            drawn.add(curve)
            losses = place.mean_curve(weights)
            axes.plot(steps, losses, color=color, linewidth=2.6 if weights != LIVE else 1.1)
            kind = "" if place.weights == LIVE else ", live" if weights == LIVE else ", averaged"
            lines.append((f"{place.contender.name}{kind}", steps, losses, color))
            shown += [loss for loss in losses[len(losses) // 4 :] if math.isfinite(loss)]
    if shown:  # the first quarter of the fall is cut off, since the differences are at the end
        margin = 0.05 * (max(shown) - min(shown))
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set(xlabel="step", ylabel="validation loss (nats per byte)", title="Each at its own best learning rate")
    axes.set_xlim(left=0)
    label_line_ends(axes, lines)

    if several_lrs:
        axes, lines = panels.pop(0), []
        for place in standings:
            lrs, losses, color = list(place.by_lr), list(place.by_lr.values()), colors[place.contender.name]
            axes.plot(lrs, losses, color=color, marker="o", markersize=4)
            axes.plot(place.lr, place.by_lr[place.lr], color=color, marker="o", markersize=8)
            lines.append((place.contender.name, lrs, losses, color))
        lrs = sorted({lr for place in standings for lr in place.by_lr})
        axes.set_xscale("log")
        axes.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
        axes.minorticks_off()
        axes.set(xlabel="learning rate", ylabel="validation loss after the last step", title="The weights handed back")
        label_line_ends(axes, lines)

    if series_names:
        axes, lines = panels.pop(0), []
        for place in standings:
            for name, values in place.runs[0].series.items():
                steps, color = place.runs[0].steps, PALETTE[series_names.index(name) % len(PALETTE)]
                axes.plot(steps, values, color=color)
                lines.append((name, steps, values, color))
        axes.set(xlabel="step", title="Learned coefficients")
        label_line_ends(axes, lines)
    save(figure, path)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def results(standings: Sequence[Standing], runs: Sequence[Run], task: Task) -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "device": torch.cuda.get_device_name(task.device) if task.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "seeds": len({run.seed for run in runs}),
        "lrs": sorted({run.lr for run in runs}),
        "steps": task.steps,
        "batch": task.batch,
        "validation_bytes": task.validation_windows * GPTConfig.context,
        "corpus": {"description": task.corpus.description, "sha256": task.corpus.sha256()},
        "model": asdict(GPTConfig()),
        "rows": [
            {
                "optimizer": place.contender.name,
                "lr": place.lr,
                "weights": place.weights,
                "live_loss": statistics.mean(run.final(LIVE) for run in place.runs),
                "returned_loss": place.by_lr[place.lr],
                "returned_loss_by_lr": {f"{lr:g}": loss for lr, loss in place.by_lr.items()},
                "seeds": len(place.runs),
                "step_ms": place.step_ms,
                "state_bytes_per_parameter": place.state_bytes,
            }
            for place in standings
        ],
        "runs": [asdict(run) for run in runs],
    }


def without_nan(value: Any) -> Any:
    """The same, with null for numbers that JSON cannot express (the losses of a diverged run)."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    full = FULL_RUN
    parser.add_argument(
        "--steps", type=positive(int), metavar="N", help=f"optimizer steps of each training run ({full['steps']})"
    )
    parser.add_argument(
        "--lrs",
        type=positive(float),
        nargs="+",
        metavar="LR",
        help=f"learning rates that every optimizer is tried at ({' '.join(f'{lr:g}' for lr in full['lrs'])})",
    )
    parser.add_argument(
        "--seeds", type=positive(int), default=1, metavar="N", help="repetitions with other weights and batches (1)"
    )
    parser.add_argument(
        "--batch",
        type=positive(int),
        metavar="N",
        help=f"windows of {GPTConfig.context} bytes in each training step ({full['batch']})",
    )
    parser.add_argument(
        "--device",
        type=torch.device,
        default=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        help="where to train: cpu, cuda, cuda:1 (cuda if there is one, else cpu)",
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="text to train on (Python's standard library)")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="folder of the results (out)")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps on little text: shows that everything works, and no more"
    )
    parser.set_defaults(**full)
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK_RUN)
    arguments = parser.parse_args(argv)
    arguments.lrs = sorted(set(arguments.lrs))
    try:
        arguments.corpus = file_corpus(arguments.data) if arguments.data else stdlib_corpus()
    except (OSError, ValueError) as error:
        parser.error(f"{error}" + ("" if arguments.data else ", give a text of your own with --data FILE"))
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    task = Task(arguments.corpus, arguments.steps, arguments.batch, arguments.validation_windows, arguments.device)
    trajectories: dict[Builder, list[Contender]] = {}
    for contender in CONTENDERS:
        trajectories.setdefault(contender.build, []).append(contender)

    parameters = sum(p.numel() for p in GPT(GPTConfig()).parameters())
    title = f"GPT of {parameters / 1e6:.2f} M parameters, {task.steps} steps, {task.corpus.description}"
    print(
        f"{title}\n{len(task.corpus.train) / 1e6:.1f} MB to train on, batches of {task.batch} x {GPTConfig.context}"
        f" bytes, {torch.get_num_threads()} threads, torch {torch.__version__}\n",
        flush=True,
    )

    # Seed by seed, and with the optimizers alternating, so that what an interrupted sweep leaves is nearly balanced.
    queue = [
        (sharing, lr, seed)
        for seed in range(arguments.seeds)
        for lr in arguments.lrs
        for sharing in trajectories.values()
    ]
    progress = Progress(sum(task.work(sum(len(c.averages) for c in sharing)) for sharing, _, _ in queue))
    runs: list[tuple[Builder, Run]] = []
    interrupted = False
    try:
        for sharing, lr, seed in queue:
            run = train(sharing, lr, seed, task, progress)
            runs.append((sharing[0].build, run))
            ends = ", ".join(f"{weights} {losses[-1]:.3f}" for weights, losses in run.losses.items())
            progress.note(f"{run.title}: validation loss {ends}")
    except KeyboardInterrupt:
        interrupted = True
    progress.clear()

    finished = len(runs)
    runs_a_seed = len(queue) // arguments.seeds
    complete_seeds = len(runs) // runs_a_seed
    if complete_seeds:  # then an incomplete one would only favour the optimizers or learning rates that it reached
        runs = runs[: complete_seeds * runs_a_seed]
    if interrupted:
        print(f"\nInterrupted: {finished} of {len(queue)} training runs are finished, {len(runs)} of them reported.")
    if not runs:
        return EXIT_INTERRUPTED
    runs_of: dict[Builder, list[Run]] = {}
    for build, run in runs:
        runs_of.setdefault(build, []).append(run)
    standings = [standing(c, runs_of[c.build]) for c in CONTENDERS if c.build in runs_of]
    seeds = "1 seed" if complete_seeds <= 1 else f"{complete_seeds} seeds"

    plot(standings, f"{title}, {seeds}", arguments.out / "loss.png")
    numbers = without_nan(results(standings, [run for _, run in runs], task))
    (arguments.out / "results.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"\n{table(standings)}\n\n{footnotes(standings, seeds, task)}")
    print(f"written: {arguments.out / 'loss.png'}, {arguments.out / 'results.json'}")
    return EXIT_INTERRUPTED if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
