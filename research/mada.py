"""MADA beside the optimizers that it contains, at a scale that two cores can repeat: what holds of its paper here?

    python research/mada.py            runs what is missing (25 minutes on 2 cores), tables, a figure
    python research/mada.py --render   tables and figure of what is there
    python research/mada.py --time     times and memory, on an idle machine
    python research/mada.py --quick    few and short runs into out/quick, to see that it works

Two tasks: the small GPT of `lm.py`, and a small CNN on scikit-learn's handwritten digits. All optimizers see the same
batches under the same cosine schedule, each at the best of equally many learning rates, a factor of 2 apart (Lion's are
lower). Seeds that choose the rate are not among those that are reported.

Starts: "good" is what is usual for a rule (β1, β2 = 0.9, 0.95 of language models for AdamW, AVGrad, HyperAdam and MADA;
the published ones of Adan and Lion), "poor" is 0.5, 0.6 in place of the rule's two decay rates: those are ours.
The grid of starts keeps the learning rates that were best from the good start.

MADA-FS starts with the coefficients that MADA ended with, of the same seed and at MADA's best rate, and learns nothing.
Its learning rate is searched as that of the others is, so that it has had twice the trainings. "MADA fixed" stays where
MADA starts, at β3 0.9, ρ 0, c 1, γ 1, which is no AdamW: only what MADA gains over it is gained by learning.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import harness
import lm
import plots
import runs
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from runs import CRITICAL, Spec

from pace_kernels import MADA

MADA_FS = "MADA-FS"  # comes after MADA, whose coefficients it takes
FIXED = "MADA fixed"
COEFFICIENTS = ("beta1", "beta2", "beta3", "rho", "c", "gamma")
SYMBOLS = dict(zip(COEFFICIENTS, ("β1", "β2", "β3", "ρ", "c", "γ"), strict=True))
TASKS = {"language": "GPT on bytes", "digits": "CNN on digits"}
COLORS = dict(
    zip(
        ("AdamW", "MADA", MADA_FS, FIXED, "HyperAdam", "AVGrad", "Adan", "Lion"),
        (plots.PALETTE[0], plots.PALETTE[1], "#56B4E9", "#000000", *plots.PALETTE[2:]),
        strict=True,
    )
)

# Everything that decides about the runs. Plain lists, since it is kept in the file and compared with it.
TUNED_ALIKE = ("AdamW", "MADA", MADA_FS, FIXED, "HyperAdam", "AVGrad", "Adan")
SETTINGS: dict[str, Any] = {
    "tasks": {
        "language": {
            "steps": 400,
            "evaluations": 8,
            "starts": ["good", "poor"],
            "choose": [0, 7, 8],
            "seeds": [1, 2, 3, 4, 5, 6],
        },
        "digits": {
            "steps": 400,
            "evaluations": 8,
            "starts": ["good"],
            "choose": [0, 1, 2],
            "seeds": [3, 4, 5, 6, 7, 8],
        },
    },
    "schedule": "cosine",
    "rates": {
        "language": {name: [1e-3, 2e-3, 4e-3, 8e-3, 16e-3] for name in TUNED_ALIKE}
        | {"Lion": [1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3]},
        "digits": {name: [5e-3, 1e-2, 2e-2, 4e-2, 8e-2, 16e-2] for name in TUNED_ALIKE}
        | {"Lion": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 16e-3]},
    },
    "grid": {"beta1": [0.5, 0.8, 0.9, 0.95], "beta2": [0.6, 0.9, 0.95, 0.99], "seeds": [1, 2, 3, 4]},
    "hyper": {
        "hyper learning rates / 10": {"hyper_lr": {**dict.fromkeys(COEFFICIENTS, 0.01), "beta1": 5e-5, "beta2": 5e-5}},
        "hyper learning rates × 10": {"hyper_lr": {**dict.fromkeys(COEFFICIENTS, 1.0), "beta1": 5e-3, "beta2": 5e-3}},
        "hyper momentum 0.5": {"hyper_momentum": 0.5},
    },
}
QUICK: dict[str, Any] = {
    "tasks": {
        "language": {"steps": 3, "evaluations": 1, "starts": ["good", "poor"], "choose": [0], "seeds": [1, 2]},
        "digits": {"steps": 20, "evaluations": 2, "starts": ["good"], "choose": [0], "seeds": [1, 2]},
    },
    "schedule": "cosine",
    "rates": {
        "language": {"AdamW": [1e-3, 4e-3], "MADA": [4e-3], MADA_FS: [4e-3], FIXED: [4e-3], "Lion": [5e-4]},
        "digits": {"AdamW": [5e-3], "MADA": [5e-3], MADA_FS: [5e-3]},
    },
    "grid": {"beta1": [0.5, 0.9], "beta2": [0.95], "seeds": [0, 1]},
    "hyper": {"hyper momentum 0.5": {"hyper_momentum": 0.5}},
}
GRIDDED = ("AdamW", "MADA", FIXED)

# --- optimizers ---


def adamw(groups: Any, lr: float, betas: Sequence[float] = lm.BETAS, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), fused=True, **options)


lm.OPTIMIZERS |= {
    "AdamW": adamw,
    "MADA": lambda groups, lr, **o: MADA(groups, lr=lr, **o),
    MADA_FS: lambda groups, lr, **o: MADA(groups, lr=lr, learn=(), **o),
    FIXED: lambda groups, lr, **o: MADA(groups, lr=lr, learn=(), **o),
    "HyperAdam": lambda groups, lr, **o: MADA.preset("hyperadam", groups, lr=lr, **o),
    "AVGrad": lambda groups, lr, **o: MADA.preset("avgrad", groups, lr=lr, **o),
    "Adan": lambda groups, lr, **o: MADA.preset("adan", groups, lr=lr, **o),
    "Lion": lambda groups, lr, **o: MADA.preset("lion", groups, lr=lr, **o),
}

POOR = [0.5, 0.6]


def start_options(optimizer: str, start: str) -> dict[str, Any]:
    """Options of a start by its name. MADA's other coefficients start at its defaults: β3 0.9, ρ 0, c 1, γ 1."""
    if optimizer == "Lion":
        return {"lion_betas": [0.9, 0.99] if start == "good" else POOR}
    if optimizer == "Adan":
        return {"betas": [0.98, 0.99] if start == "good" else POOR}
    return {"betas": [0.9, 0.95] if start == "good" else POOR}


# --- digits ---

TRAIN, VALIDATION = 897, 300  # images; the 600 others are the test set
BATCH = 32


@functools.cache
def digits() -> tuple[tuple[Tensor, Tensor], ...]:
    """(images, labels) to train on, to choose the learning rate by, and to test with: the same for all seeds."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(found.target)[order].long()
    sizes = [TRAIN, VALIDATION, len(labels) - TRAIN - VALIDATION]
    return tuple(zip(images.split(sizes), labels.split(sizes), strict=True))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 10),
    )


@torch.no_grad()
def judged(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Loss and accuracy."""
    outputs = model(images)
    return F.cross_entropy(outputs, labels).item(), (outputs.argmax(1) == labels).float().mean().item()


def train_cnn(spec: Spec) -> dict[str, Any]:
    """In the form of lm.train; "live" is the loss on the validation images."""
    torch.manual_seed(spec["seed"])
    model = cnn()
    optimizer: Any = lm.OPTIMIZERS[spec["optimizer"]](lm.parameter_groups(model), spec["lr"], **spec["options"])
    (images, labels), validation, test = digits()
    generator = torch.Generator().manual_seed(spec["seed"])
    steps = spec["steps"]
    at = {round(steps * (i + 1) / spec["evaluations"]) for i in range(spec["evaluations"])}
    found: dict[str, Any] = {"steps": [], "losses": {"live": [], "test": []}, "accuracy": [], "series": {}}
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lm.factor(spec["schedule"], step, steps) * spec["lr"]
        chosen = torch.randint(len(labels), (BATCH,), generator=generator)
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), lm.GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if step not in at:
            continue
        found["steps"].append(step)
        for name, part in (("live", validation), ("test", test)):
            loss, accuracy = judged(model, *part)
            found["losses"][name].append(round(loss, 6) if math.isfinite(loss) else None)
        found["accuracy"].append(round(accuracy, 6))  # of the test images, the last ones above
        if isinstance(optimizer, MADA):
            for name in optimizer.param_groups[0]["learn"]:
                found["series"].setdefault(name, []).append(round(optimizer.coefficients[name], 6))
    return found


def run(spec: Spec) -> dict[str, Any]:
    return lm.train(spec) if spec["task"] == "language" else train_cnn(spec)


# --- what is to be run, given what has been ---


class Found:
    """The runs of a file by what they are for. What is not known yet is None, and `wanted` grows as runs come in."""

    def __init__(self, kept: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> None:
        self.kept = kept
        self.settings: Mapping[str, Any] = settings or kept["about"]["settings"]

    def spec(self, task: str, optimizer: str, lr: float, seed: int, options: Mapping[str, Any]) -> Spec:
        """Curves are drawn of the seeds that are reported; of the others the end is enough."""
        shape = self.settings["tasks"][task]
        return {
            "task": task,
            "optimizer": optimizer,
            "schedule": self.settings["schedule"],
            "steps": shape["steps"],
            "evaluations": shape["evaluations"] if seed in shape["seeds"] else 1,
            "lr": lr,
            "seed": seed,
            "options": dict(options),
        }

    def done(self, spec: Spec) -> bool:
        return runs.done(self.kept, spec)

    def loss(self, spec: Spec) -> float:
        return lm.final(runs.result(self.kept, spec), "live")

    def seeds(self, task: str) -> list[int]:
        """Those that are reported."""
        return self.settings["tasks"][task]["seeds"]

    def conditions(self) -> Iterator[tuple[str, str]]:
        for task, shape in self.settings["tasks"].items():
            for start in shape["starts"]:
                yield task, start

    def optimizers(self, task: str) -> list[str]:
        return [name for name in COLORS if name in self.settings["rates"][task]]

    def options(self, task: str, start: str, optimizer: str, seed: int) -> dict[str, Any] | None:
        if optimizer != MADA_FS:
            return start_options(optimizer, start)
        learned = self.best(task, start, "MADA", seed)
        if learned is None or not self.done(learned):
            return None
        ends = {name: values[-1] for name, values in runs.result(self.kept, learned)["series"].items()}
        return {"betas": [ends.pop("beta1"), ends.pop("beta2")], **ends}

    def search(self, task: str, start: str, optimizer: str) -> tuple[list[Spec], float | None]:
        """The runs of the learning-rate search, and the best rate, by the mean loss, once they are done."""
        specs: dict[float, list[Spec]] = {}
        for lr in self.settings["rates"][task][optimizer]:
            for seed in self.settings["tasks"][task]["choose"]:
                options = self.options(task, start, optimizer, seed)
                if options is None:
                    return [], None
                specs.setdefault(lr, []).append(self.spec(task, optimizer, lr, seed, options))
        every = [spec for of_rate in specs.values() for spec in of_rate]
        if not all(map(self.done, every)):
            return every, None
        return every, min(specs, key=lambda lr: statistics.mean(map(self.loss, specs[lr])))

    def best(self, task: str, start: str, optimizer: str, seed: int) -> Spec | None:
        _, rate = self.search(task, start, optimizer)
        options = self.options(task, start, optimizer, seed)
        return None if rate is None or options is None else self.spec(task, optimizer, rate, seed, options)

    def results(self, task: str, start: str, optimizer: str) -> list[dict[str, Any]] | None:
        """Of all seeds at the best rate; None while some are missing."""
        specs = [self.best(task, start, optimizer, seed) for seed in self.seeds(task)]
        if any(spec is None or not self.done(spec) for spec in specs):
            return None
        return [runs.result(self.kept, spec) for spec in specs if spec is not None]

    def finals(self, task: str, start: str, optimizer: str) -> list[float] | None:
        """The loss that is reported: on held-out text, or on the test images."""
        results = self.results(task, start, optimizer)
        return results and [lm.final(result, "live" if task == "language" else "test") for result in results]

    def grid(self) -> dict[tuple[str, float, float], list[Spec]]:
        """By optimizer, β1, β2: a run for each seed."""
        found = {}
        for optimizer in GRIDDED:
            _, rate = self.search("language", "good", optimizer)
            if rate is None:
                continue
            for beta1 in self.settings["grid"]["beta1"]:
                for beta2 in self.settings["grid"]["beta2"]:
                    options = {"betas": [beta1, beta2]}
                    found[optimizer, beta1, beta2] = [
                        self.spec("language", optimizer, rate, seed, options) for seed in self.settings["grid"]["seeds"]
                    ]
        return found

    def grid_losses(self) -> dict[str, list[list[list[float]]]] | None:
        """Of each optimizer a row for each β1, and in that for each β2 a list over the seeds; None while some are
        missing."""
        specs, grid = self.grid(), self.settings["grid"]
        starts = len(grid["beta1"]) * len(grid["beta2"])
        if len(specs) < len(GRIDDED) * starts or not all(self.done(spec) for of in specs.values() for spec in of):
            return None
        return {
            name: [
                [[self.loss(spec) for spec in specs[name, beta1, beta2]] for beta2 in grid["beta2"]]
                for beta1 in grid["beta1"]
            ]
            for name in GRIDDED
        }

    def hyper(self, name: str) -> list[Spec]:
        """MADA with these hyper options, from the good start at its best rate, for each seed; empty as long as that is
        not known."""
        specs = [self.best("language", "good", "MADA", seed) for seed in self.seeds("language")]
        changed = self.settings["hyper"][name]
        return [
            {**spec, "evaluations": 1, "options": {**spec["options"], **changed}} for spec in specs if spec is not None
        ]

    def wanted(self) -> list[Spec]:
        specs: dict[str, Spec] = {}
        for task, start in self.conditions():
            for optimizer in self.optimizers(task):
                tried, _ = self.search(task, start, optimizer)
                seeds = [self.best(task, start, optimizer, seed) for seed in self.seeds(task)]
                specs |= {runs.key_of(spec): spec for spec in (*tried, *seeds) if spec is not None}
        specs |= {runs.key_of(spec): spec for of_start in self.grid().values() for spec in of_start}
        specs |= {runs.key_of(spec): spec for name in self.settings["hyper"] for spec in self.hyper(name)}
        return list(specs.values())


def complete(path: Path, settings: Mapping[str, Any], processes: int | None = None) -> dict[str, Any]:
    about = lm.about() | {"settings": settings}
    kept = runs.load(path)
    while True:
        specs = Found(kept, settings).wanted()
        stage = [spec for spec in specs if not runs.done(kept, spec)]
        if not stage:
            return kept
        print(f"{len(stage)} runs, {sum(spec['steps'] for spec in stage):,} steps", file=sys.stderr)
        kept = runs.complete(path, about, specs, run, processes)


# --- numbers ---


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Mean of a − b seed by seed, and its standard error. Infinite losses make it infinite or undefined."""
    if not all(map(math.isfinite, (*a, *b))):
        return (statistics.mean(a) - statistics.mean(b), math.nan)
    return mean_and_error([x - y for x, y in zip(a, b, strict=True)])


def certainty(mean: float, error: float, seeds: int) -> str:
    if not math.isfinite(error):
        return "with runs that diverged"
    if mean == 0:
        return f"no difference at all in {seeds} seeds"
    t = abs(mean) / error if error else math.inf
    if t > CRITICAL[seeds]:
        return f"clear at {seeds} seeds: {t:.1f} standard errors"
    if t > 2:
        return f"a hint of {seeds} seeds: {t:.1f} standard errors"
    return f"no difference that {seeds} seeds show: {t:.1f} standard errors"


def accuracies(results: Sequence[Mapping[str, Any]]) -> list[float]:
    """Of the test images, at the end."""
    return [result["accuracy"][-1] for result in results]


def signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def conclusions(kept: Mapping[str, Any]) -> list[str]:
    """Sentences whose numbers and verdicts are computed. They stand beside the claims of the paper's abstract: MADA
    "consistently outperforms Adam and other popular optimizers", and "is robust against sub-optimally tuned
    hyper-parameters"."""
    found = Found(kept)
    lines = []
    for task, start in found.conditions():
        seeds = len(found.seeds(task))
        losses = {name: found.finals(task, start, name) for name in found.optimizers(task)}
        known = {name: values for name, values in losses.items() if values is not None}
        where = f"{TASKS[task]}, {start} start"
        if len(known) < 2 or "AdamW" not in known:
            continue
        ranking = sorted(known, key=lambda name: statistics.mean(known[name]))
        best = ranking[0]
        if best == "AdamW":
            by = difference(known[ranking[1]], known["AdamW"])
            lines.append(f"{where}: AdamW ends lowest, {ranking[1]} {signed(by[0])} behind ({certainty(*by, seeds)}).")
        else:
            by = difference(known[best], known["AdamW"])
            lines.append(f"{where}: {best} ends lowest, {signed(by[0])} to AdamW ({certainty(*by, seeds)}).")
        if "MADA" not in known:
            continue
        if best != "AdamW" and best != "MADA":
            by = difference(known["MADA"], known["AdamW"])
            lines.append(f"{where}: MADA is at {signed(by[0])} to AdamW ({certainty(*by, seeds)}).")
        if task == "digits":
            both = [accuracies(found.results(task, start, name) or []) for name in ("MADA", "AdamW")]
            mean, error = difference(both[0], both[1])
            lines.append(
                f"{where}: MADA's accuracy is {signed(100 * mean)} points to AdamW's ({certainty(mean, error, seeds)})."
            )
        beaten, lost, open_ = [], [], []
        for name in ranking:
            if name in ("MADA", MADA_FS, FIXED):
                continue
            mean, error = difference(known["MADA"], known[name])
            decided = math.isfinite(error) and abs(mean) > CRITICAL[seeds] * error
            (open_ if not decided else beaten if mean < 0 else lost).append(name)
        claim = "holds" if not lost and not open_ else "does not hold" if lost else "is not decided by these seeds"
        parts = [(beaten, "is below"), (lost, "is above"), (open_, "is not clearly apart from")]
        said = "; ".join(f"{verb} {', '.join(names)}" for names, verb in parts if names)
        lines.append(f'{where}: that MADA "consistently outperforms" the others {claim}: MADA {said}.')
        for name in (MADA_FS, FIXED):
            if name in known:
                by = difference(known[name], known["MADA"])
                lines.append(f"{where}: {name} is at {signed(by[0])} to MADA ({certainty(*by, seeds)}).")
    lines += _robustness(found)
    lines += _coefficients_in_words(found)
    return lines


def poor_start_costs(found: Found) -> dict[str, list[float]]:
    """Of each optimizer, by seed, from the good start to the poor one, each at its own best rate."""
    costs = {}
    for name in found.optimizers("language"):
        good, poor = (found.finals("language", start, name) for start in ("good", "poor"))
        if good and poor and name != MADA_FS:
            costs[name] = [b - a for a, b in zip(good, poor, strict=True)]
    return costs


def _robustness(found: Found) -> list[str]:
    lines, costs = [], poor_start_costs(found)
    if {"AdamW", "MADA"} <= costs.keys():
        mean, error = difference(costs["MADA"], costs["AdamW"])
        less = "less" if mean < 0 else "more"
        how_sure = certainty(mean, error, len(found.seeds("language")))
        lines.append(f"The poor start costs MADA {abs(mean):.4f} {less} than AdamW ({how_sure}).")
    grid = found.grid_losses()
    if grid:
        by_start = {name: [losses for row in rows for losses in row] for name, rows in grid.items()}
        means = {name: [statistics.mean(losses) for losses in starts] for name, starts in by_start.items()}
        seeds = len(found.settings["grid"]["seeds"])
        for other in ("AdamW", FIXED):
            lower = sum(a < b for a, b in zip(means["MADA"], means[other], strict=True))
            lines.append(
                f"Grid of starts, means over {seeds} seeds: MADA ends lower than {other} from {lower} of "
                f"{len(means[other])}. The median start ends at {statistics.median(means['MADA']):.4f} with MADA, at "
                f"{statistics.median(means[other]):.4f} with {other}."
            )
        for without in (0, 1):
            spans = {
                name: [spanned([losses[i] for losses in starts], without) for i in range(seeds)]
                for name, starts in by_start.items()
            }
            less = difference(spans["MADA"], spans["AdamW"])
            of_what = "each one's worst start left out, by" if without else "over all starts by"
            lines.append(
                f"Grid of starts: from best to worst the loss differs, {of_what} "
                + ", ".join(f"{statistics.mean(values):.4f} with {name}" for name, values in spans.items())
                + f"; MADA − AdamW {signed(less[0])} ({certainty(*less, seeds)})."
            )
    return lines


def spanned(losses: Sequence[float], without: int) -> float:
    """From the lowest to the highest but for so many of the highest."""
    ordered = sorted(losses)
    return ordered[-1 - without] - ordered[0]


def _coefficients_in_words(found: Found) -> list[str]:
    lines = []
    for task, start in found.conditions():
        results = found.results(task, start, "MADA")
        if not results:
            continue
        ends = []
        for name in COEFFICIENTS:
            values = [result["series"][name][-1] for result in results]
            ends.append(f"{SYMBOLS[name]} {min(values):.3f} to {max(values):.3f}")
        moved = max(
            abs(value - begin)
            for result in results
            for name, begin in zip(("beta1", "beta2"), start_options("MADA", start)["betas"], strict=True)
            for value in result["series"][name]
        )
        lines.append(
            f"{TASKS[task]}, {start} start: over the seeds MADA's coefficients end at {', '.join(ends)}; β1 and β2 are "
            f"never seen further than {moved:.4f} from where they start."
        )
    return lines


# --- tables ---


def render(kept: Mapping[str, Any]) -> str:
    """Markdown, from the file's content alone."""
    found = Found(kept)
    parts = [runs.provenance(kept)]
    for task, start in found.conditions():
        shape, seeds = found.settings["tasks"][task], found.seeds(task)
        measure = "held-out loss, nats per byte" if task == "language" else "test loss"
        extra = [] if task == "language" else ["test accuracy"]
        head = ["", "learning rate", "of", measure, "spread over seeds", "− AdamW, by seed", *extra]
        rows = [head, ["---", *["---:"] * (len(head) - 1)]]
        reference = found.finals(task, start, "AdamW")
        for name in found.optimizers(task):
            losses, results = found.finals(task, start, name), found.results(task, start, name)
            _, rate = found.search(task, start, name)
            if losses is None or results is None:
                rows.append([name, "not run yet", *[""] * (len(head) - 2)])
                continue
            rates = found.settings["rates"][task][name]
            edge = " (edge)" if rate in (rates[0], rates[-1]) and len(rates) > 1 else ""
            row = [name, f"{rate:g}{edge}", f"{rates[0]:g} to {rates[-1]:g}", f"{statistics.mean(losses):.4f}"]
            row += [f"{min(losses):.4f} to {max(losses):.4f}"]
            if name == "AdamW" or reference is None:
                row.append("")
            else:
                mean, error = difference(losses, reference)
                row.append(f"{signed(mean)} ± {error:.4f}")
            if extra:
                mean, error = mean_and_error(accuracies(results))
                row.append(f"{100 * mean:.2f} ± {100 * error:.2f} %")
            rows.append(row)
        chosen = f"rates chosen on {listed(shape['choose'])}, reported: {listed(seeds)}"
        title = f"{TASKS[task]}, {start} start: {shape['steps']} steps; {chosen}"
        parts.append(f"{title}\n\n{table(rows)}")
    parts.append("± is one standard error of the mean over the seeds.")
    plain, seeds = found.finals("language", "good", "MADA"), found.seeds("language")
    rows = [["MADA from the good start, with", "− MADA with its defaults, by seed", ""], ["---", "---:", "---"]]
    for name in found.settings["hyper"]:
        specs = found.hyper(name)
        if plain is not None and len(specs) == len(seeds) and all(map(found.done, specs)):
            by = difference([found.loss(spec) for spec in specs], plain)
            rows.append([name, f"{signed(by[0])} ± {by[1]:.4f}", certainty(*by, len(seeds))])
    if len(rows) > 2:
        parts.append(f"Hyper options:\n\n{table(rows)}")
    rows = [["", "poor start − good start, by seed", ""], ["---", "---:", "---"]]
    for name, costs in poor_start_costs(found).items():
        by = difference(costs, [0.0] * len(costs))
        rows.append([name, f"{signed(by[0])} ± {by[1]:.4f}", certainty(*by, len(costs))])
    if len(rows) > 2:
        parts.append(f"What the poor start costs, each at its own best rates:\n\n{table(rows)}")
    grid = found.grid_losses()
    if grid:
        rates = ", ".join(f"{name} {found.search('language', 'good', name)[1]:g}" for name in GRIDDED)
        betas2 = found.settings["grid"]["beta2"]
        rows = [["β1 \\ β2", *[f"{beta2:g}" for beta2 in betas2]], ["---", *["---:"] * len(betas2)]]
        means = {name: mean_over_seeds(losses) for name, losses in grid.items()}
        for i, beta1 in enumerate(found.settings["grid"]["beta1"]):
            cells = zip(*(means[name][i] for name in ("MADA", "AdamW", FIXED)), strict=True)
            rows.append([f"{beta1:g}", *[f"{a:.3f} ({signed(a - b)}, {signed(a - c)})" for a, b, c in cells]])
        parts.append(
            f"MADA's loss from each start, and in parentheses that minus AdamW's and minus {FIXED}'s; rates {rates}; "
            f"means over {len(found.settings['grid']['seeds'])} seeds\n\n{table(rows)}"
        )
    if "time" in kept:
        parts.append(time_table(kept["time"]))
    parts.append("\n".join(f"- {line}" for line in conclusions(kept)))
    judged = sum(part.count("standard errors") + part.count("no difference at all") for part in parts)
    points = ", ".join(f"{point:g} for {seeds} seeds" for seeds, point in CRITICAL.items())
    parts.append(
        f"Clear is what lies beyond the 5 % point of Student's t ({points}), a hint what is within it but beyond 2 "
        f"standard errors. So chance calls 1 of 20 comparisons without a difference clear; {judged} are judged in "
        'words here, and in each "consistently outperforms" those with every other optimizer.'
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def listed(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def mean_over_seeds(rows: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    return [[statistics.mean(losses) for losses in row] for row in rows]


# --- times and memory ---


def measure(rounds: int, steps: int) -> dict[str, Any]:
    """Whole training steps, and steps of the optimizer alone, interleaved: one thread, as in the runs."""
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    names = [name for name in COLORS if name != MADA_FS]  # its memory depends on where its coefficients ended
    spec = {"lr": 1e-3, "seed": 0}
    trainings = {
        name: lm.Training(spec | {"optimizer": name, "options": start_options(name, "good")}) for name in names
    }
    samples: dict[str, dict[str, dict[int, float]]] = {"step": {}, "alone": {}}

    def failed(name: str, reason: Exception) -> None:
        raise RuntimeError(f"{name} could not be timed") from reason

    def time_(kind: str, calls: Mapping[str, Any], repeated: int) -> None:
        def keep(name: str, number: int, sample: harness.Sample) -> None:
            samples[kind].setdefault(name, {})[number] = sample.seconds

        harness.time_interleaved(calls, cpu, rounds=rounds, keep=keep, failed=failed, steps=repeated, budget_s=1e6)

    time_("step", {name: functools.partial(training.step, 1.0) for name, training in trainings.items()}, steps)
    for training in trainings.values():
        training.model.loss(*training.next_batch()).backward()
    # So little that the same gradient over and over leads nowhere; at lr 0 MADA would learn nothing.
    for training in trainings.values():
        for group in training.optimizer.param_groups:
            group["lr"] = 1e-9
    time_("alone", {name: training.optimizer.step for name, training in trainings.items()}, 5 * steps)
    numel = sum(p.numel() for p in trainings["AdamW"].model.parameters())
    rows = {}
    for name, training in trainings.items():
        rows[name] = {"state_bytes": round(harness.bytes_of(training.optimizer.state) / numel, 2)}
        for kind, taken in samples.items():
            rows[name][f"{kind}_ms"] = [round(1e3 * s, 4) for s in harness.quartiles(taken[name])]
            rows[name][f"{kind}_ratio"] = round(harness.ratio(taken[name], taken["AdamW"])[1], 3)
    return {"machine": harness.machine(cpu), "parameters": numel, "rounds": rounds, "steps": steps, "rows": rows}


def time_table(found: Mapping[str, Any]) -> str:
    about = found["machine"]
    lines = [
        f"Time and memory: {found['parameters']:,} parameters, float32, 1 thread, {about['cpu']} ({about['isa']}), "
        f"torch {about['torch']}, {about['date'][:10]}; medians of {found['rounds']} interleaved rounds",
        "",
        "| | ms a training step | quartiles | × AdamW | ms of it, optimizer | × AdamW | state, bytes / parameter |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in found["rows"].items():
        low, middle, high = row["step_ms"]
        lines.append(
            f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} | {row['step_ratio']:.3f} | {row['alone_ms'][1]:.3f} "
            f"| {row['alone_ratio']:.2f} | {row['state_bytes']:.1f} |"
        )
    return "\n".join(lines)


# --- the figure ---


def draw_losses(axes: Axes, found: Found, start: str) -> None:
    """Mean over the seeds, and a band from the lowest to the highest. Early losses, all alike, are cut off."""
    lines, shown = [], []
    for name in found.optimizers("language"):
        results = found.results("language", start, name)
        if not results or not all(len(r["steps"]) == len(results[0]["steps"]) for r in results):
            continue
        steps = results[0]["steps"]
        columns = list(zip(*(r["losses"]["live"] for r in results), strict=True))
        if any(value is None for column in columns for value in column):
            continue
        means = [statistics.mean(column) for column in columns]
        axes.fill_between(
            steps, [min(c) for c in columns], [max(c) for c in columns], color=COLORS[name], alpha=0.15, linewidth=0
        )
        axes.plot(steps, means, color=COLORS[name])
        lines.append((name, steps, means, COLORS[name]))
        shown += [value for column in columns[len(columns) // 3 :] for value in column]
    axes.set(xlabel="step", ylabel="held-out loss, nats per byte")
    axes.set_title(f"GPT, {start} start")
    if lines:
        margin = 0.04 * (max(shown) - min(shown))
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
        plots.label_line_ends(axes, lines)


def draw_grid(axes: Axes, found: Found) -> None:
    losses = found.grid_losses()
    axes.set_title("MADA − AdamW, by start")
    if losses is None:
        return
    betas1, betas2 = found.settings["grid"]["beta1"], found.settings["grid"]["beta2"]
    means = [mean_over_seeds(losses[name]) for name in ("MADA", "AdamW")]
    gaps = [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(*means, strict=True)]
    sizes = sorted(abs(gap) for row in gaps for gap in row if math.isfinite(gap)) or [0.0]
    large = sizes[int(0.8 * (len(sizes) - 1))] or 1.0  # one start that diverges takes not all shades
    norm = TwoSlopeNorm(0.0, vmin=-1.6 * large, vmax=1.6 * large)  # most shades not too dark for the numbers on them
    axes.imshow(gaps, cmap="RdBu_r", norm=norm, origin="lower", aspect="auto")
    for i, row in enumerate(gaps):
        for j, gap in enumerate(row):
            axes.annotate(
                f"{gap:+.3f}".replace("-", "−"), (j, i), ha="center", va="center", fontsize=9,
                color=plots.INK if abs(gap) < 1.3 * large else "white",
            )  # fmt: skip
    axes.grid(False)
    axes.set(xlabel="β2 at the start", ylabel="β1 at the start")
    axes.set_xticks(range(len(betas2)), [f"{beta:g}" for beta in betas2])
    axes.set_yticks(range(len(betas1)), [f"{beta:g}" for beta in betas1])


def draw(kept: Mapping[str, Any], path: Path) -> None:
    found = Found(kept)
    figure, (good, poor, grid) = plots.new_figure([5.0, 5.0, 4.0], height=4.2)
    draw_losses(good, found, "good")
    draw_losses(poor, found, "poor")
    draw_grid(grid, found)
    plots.save(figure, path, colors=20)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of mada.json and the figure (out/experiments)")
    parser.add_argument("--quick", action="store_true", help="few and short runs, into out/quick")
    parser.add_argument("--render", action="store_true", help="runs nothing")
    parser.add_argument("--time", action="store_true", help="times the optimizers, for which the machine must be idle")
    arguments = parser.parse_args(argv)
    folder = arguments.out or Path("out/quick" if arguments.quick else "out/experiments")
    path = folder / "mada.json"
    if arguments.time:
        kept = runs.load(path)
        kept["time"] = measure(*((2, 1) if arguments.quick else (21, 10)))
        runs.save(kept, path)
        print(time_table(kept["time"]))
        return
    kept = runs.load(path) if arguments.render else complete(path, QUICK if arguments.quick else SETTINGS)
    if not kept["runs"]:
        raise SystemExit(f"{path} has no runs")
    print(render(kept))
    draw(kept, path.with_suffix(".webp"))
    print(f"written: {path} and {path.with_suffix('.webp')}")


if __name__ == "__main__":
    main()
