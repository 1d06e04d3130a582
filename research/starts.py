"""MADA after long runs: from four starts, with its own hyper rates and with its paper's for small models, and on a CNN.

    python research/starts.py            312 runs, about 2 hours of one core, into bench/results; goes on where it was
    python research/starts.py --quick    few and short runs into out/quick, to see that it works

This was written before the runs. Nothing of it is primary: the comparison that decides about MADA is PROTOCOL.md's.

- **GPT**: the task of lm.py for 5,000 steps under its cosine schedule, from four pairs of betas. AdamW, MADA, MADA with
  the paper's rates for small models (2.5e-3 for all six coefficients, momentum 0.5), and MADA-FS, which starts with the
  coefficients that MADA ended with, of the same seed, and learns nothing. All have the same three learning rates: one
  is chosen by the validation loss of seed 0, for each method and start; seeds 1 to 3 are reported on the test text.
- **CNN**: scikit-learn's digits, 400 steps under the same schedule; SGD with momentum 0.9 beside AdamW and both MADAs,
  from (0.9, 0.95). Six learning rates each, a factor of 2 apart, chosen by the validation loss of seeds 0 to 2; the
  test loss and accuracy of seeds 3 to 8 are reported, and of these seeds the test loss at every rate.

Two things changed after the CNN's first runs. SGD had AdamW's weight decay of 0.1, which is an L2 penalty there and
left it at a loss of 0.93; now it has the usual 5e-4, and four times the rates. And 300 images choose a rate poorly, so
that the losses at all rates are shown.

"edge": the chosen rate is the lowest or the highest. Differences to AdamW are paired by seed, with 95 % intervals by
Student's t.
"""

from __future__ import annotations

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
from runs import CRITICAL, Spec, complete, done, parser, path_of, provenance, result, spread

from pace_kernels import MADA

STARTS = [[0.9, 0.95], [0.7, 0.8], [0.5, 0.6], [0.95, 0.99]]
PAPERS, FINAL = "MADA, the paper's hyper rates", "MADA-FS"
HYPER: dict[str, dict[str, Any]] = {PAPERS: {"hyper_lr": 2.5e-3, "hyper_momentum": 0.5}, FINAL: {"learn": []}}
WINDOWS = 1024  # of the validation text, and of the test's: the halves of what is held out, as in PROTOCOL.md
SGD_RATE, SGD_DECAY = 4, 5e-4
BATCH = 32  # images
TRAIN, VALIDATION = 897, 300  # images; the 600 others are for the test

TASKS: dict[str, dict[str, Any]] = {
    "GPT": {
        "methods": ["AdamW", "MADA", PAPERS, FINAL],
        "starts": STARTS,
        "rates": [2e-3, 4e-3, 8e-3],
        "choose": [0],
        "report": [1, 2, 3],
        "steps": 5000,
    },
    "CNN": {
        "methods": ["AdamW", "SGD", "MADA", PAPERS],
        "starts": STARTS[:1],
        "rates": [5e-3, 1e-2, 2e-2, 4e-2, 8e-2, 16e-2],  # SGD's are SGD_RATE times these
        "choose": [0, 1, 2],
        "report": [3, 4, 5, 6, 7, 8],
        "steps": 400,
        "every rate": True,
    },
}

lm.OPTIMIZERS |= {
    "MADA": lambda groups, lr, **o: MADA(groups, lr=lr, **o),
    "SGD": lambda groups, lr, betas, **o: torch.optim.SGD(with_decay(groups), lr=lr, momentum=betas[0], **o),
}


def with_decay(groups: Any) -> Any:
    return [{**group, "weight_decay": SGD_DECAY if group["weight_decay"] else 0.0} for group in groups]


# ---- a run: its loss, null after a divergence; and where MADA's coefficients ended ----


def train_gpt(spec: Mapping[str, Any]) -> dict[str, Any]:
    training = lm.Training(spec)
    held_out = training.text.validation.tensor_split(2)[spec["text"] == "test"]
    training.validation = training.evenly(held_out, WINDOWS)
    steps = spec["steps"]
    alive = all(math.isfinite(training.step(lm.factor("cosine", step, steps))) for step in range(1, steps + 1))
    # Coefficients as packed files keep them: MADA-FS's specs have them.
    series = {name: float(f"{value:.6g}") for name, value in training.series().items()}
    return {"loss": lm.plain(training.losses()["live"]) if alive else None, "series": series}


@functools.cache
def digits() -> list[tuple[Tensor, Tensor]]:
    """Images and labels: to train on, for validation, and for the test; the same for all seeds."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(found.target)[order].long()
    sizes = [TRAIN, VALIDATION, len(labels) - TRAIN - VALIDATION]
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))


def train_cnn(spec: Mapping[str, Any]) -> dict[str, Any]:
    torch.manual_seed(spec["seed"])
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 4 * 4, 10))
    optimizer = lm.OPTIMIZERS[spec["optimizer"]](lm.parameter_groups(model), spec["lr"], **spec["options"])
    (images, labels), *held_out = digits()
    generator = torch.Generator().manual_seed(spec["seed"])
    for step in range(1, spec["steps"] + 1):
        for group in optimizer.param_groups:
            group["lr"] = lm.factor("cosine", step, spec["steps"]) * spec["lr"]
        drawn = torch.randint(len(labels), (BATCH,), generator=generator)
        F.cross_entropy(model(images[drawn]), labels[drawn]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), lm.GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
    images, labels = held_out[spec["text"] == "test"]
    with torch.no_grad():
        outputs = model(images)
    accuracy = (outputs.argmax(1) == labels).float().mean().item()
    return {"loss": lm.plain(F.cross_entropy(outputs, labels).item()), "accuracy": round(accuracy, 6)}


def run(spec: Spec) -> dict[str, Any]:
    return (train_cnn if spec["task"] == "CNN" else train_gpt)(spec)


def loss_of(found: Mapping[str, Any]) -> float:
    return math.inf if found["loss"] is None else found["loss"]


# ---- what is needed, as far as it is known ----


class Row:
    """A method on a task from a start."""

    def __init__(self, kept: Mapping[str, Any], task: str, method: str, start: Sequence[float]) -> None:
        self.kept, self.task, self.method, self.start = kept, task, method, start
        self.plan = kept["about"]["tasks"][task]
        choose = self.plan["choose"]
        rates = self.rates = [rate * (SGD_RATE if method == "SGD" else 1) for rate in self.plan["rates"]]
        self.search = [[self.spec(rate, seed, "validation") for seed in choose] for rate in rates]
        self.rate: float | None = None
        self.report: list[Spec | None] = []
        every = self.rates if self.plan.get("every rate") else []
        self.every = [[self.spec(rate, seed, "test") for seed in self.plan["report"]] for rate in every]
        if all(self.there(spec) for specs in self.search for spec in specs):
            means = [statistics.fmean(map(loss_of, self.results(specs))) for specs in self.search]
            self.rate = rate = rates[means.index(min(means))]
            self.report = [self.spec(rate, seed, "test") for seed in self.plan["report"]]

    def there(self, spec: Spec | None) -> bool:
        return spec is not None and done(self.kept, spec)

    def results(self, specs: Sequence[Spec | None]) -> list[dict[str, Any]]:
        return [result(self.kept, spec) for spec in specs if spec is not None]

    def spec(self, rate: float, seed: int, text: str) -> Spec | None:
        """None as long as MADA-FS's coefficients are not known."""
        options: dict[str, Any] = {"betas": list(self.start), **HYPER.get(self.method, {})}
        if self.method == FINAL:
            learned = Row(self.kept, self.task, "MADA", self.start)
            its = None if learned.rate is None else learned.spec(learned.rate, seed, text)
            if its is None or not done(self.kept, its):
                return None
            ends = dict(result(self.kept, its)["series"])
            options |= {"betas": [ends.pop("beta1"), ends.pop("beta2")], **ends}
        name = "MADA" if self.method.startswith("MADA") else self.method
        return {"task": self.task, "optimizer": name, "options": options, "lr": rate, "steps": self.plan["steps"],
                "text": text, "seed": seed}  # fmt: skip

    def wanted(self) -> Iterator[Spec]:
        yield from (spec for specs in [*self.search, self.report, *self.every] for spec in specs if spec is not None)

    def reported(self) -> list[dict[str, Any]]:
        """Of all seeds; empty where some are missing."""
        return self.results(self.report) if all(map(self.there, self.report)) else []


def rows(kept: Mapping[str, Any], task: str) -> list[Row]:
    plan = kept["about"]["tasks"][task]
    return [Row(kept, task, method, start) for start in plan["starts"] for method in plan["methods"]]


def difference(ours: Sequence[float], theirs: Sequence[float]) -> str:
    pairs = [a - b for a, b in zip(ours, theirs, strict=True)]
    if not all(map(math.isfinite, pairs)):
        return "a seed diverged"
    half = CRITICAL[len(pairs)] * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return f"{statistics.fmean(pairs):+.4f} ± {half:.4f}"


def render(kept: Mapping[str, Any]) -> str:
    parts = [provenance(kept)] if kept["runs"] else []
    for task, plan in kept["about"]["tasks"].items():
        digits = task == "CNN"
        table = [["start", "method", "rate", "test loss", "− AdamW, 95 %", "accuracy" if digits else "ends at"]]
        adamw: dict[str, list[float]] = {}
        every = rows(kept, task)
        for row in every:
            if not (found := row.reported()):
                continue
            start, losses = ", ".join(map(str, row.start)), [loss_of(each) for each in found]
            if row.method == "AdamW":
                adamw[start] = losses
            compared = "–" if row.method == "AdamW" or start not in adamw else difference(losses, adamw[start])
            if digits:
                last = f"{100 * statistics.fmean(each['accuracy'] for each in found):.2f} %"
            else:
                ends = [each["series"] for each in found]
                last = ", ".join(f"{name} {statistics.fmean(e[name] for e in ends):.3g}" for name in ends[0]) or "–"
            edge = " (edge)" * (row.rate in (row.rates[0], row.rates[-1]))
            table.append([start, row.method, f"{row.rate:g}{edge}", spread(losses), compared, last])
        missing = len(every) + 1 - len(table)
        said = f" {missing} of {len(every)} rows are not whole yet." if missing else ""
        parts.append(f"**{task}**, {plan['steps']:,} steps, {len(plan['report'])} seeds.{said}")
        if len(table) > 1:
            parts.append(harness.markdown_table(table))
        whole = [row for row in every if row.every and all(row.there(spec) for specs in row.every for spec in specs)]
        if whole:
            heads = ["test loss by rate", *(f"{rate:g}" for rate in plan["rates"])]
            names = [row.method + f", rates × {SGD_RATE}" * (row.method == "SGD") for row in whole]
            means = [[spread(list(map(loss_of, row.results(specs)))) for specs in row.every] for row in whole]
            parts.append(harness.markdown_table([heads, *([name, *of] for name, of in zip(names, means, strict=True))]))
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    command = parser(__doc__, "starts.json", "three steps a run, two rates")
    command.add_argument("--task", choices=list(TASKS), help="only this one")
    arguments = command.parse_args(argv)
    few = {"steps": 3, "rates": [2e-3, 8e-3], "choose": [0], "report": [5, 6]}
    tasks = {name: plan | few for name, plan in TASKS.items()} if arguments.quick else TASKS
    path = path_of(arguments, "starts.json")
    about = {"corpus": lm.about()["corpus"], "tasks": tasks}
    kept = complete(path, about, [], run, 0)
    chosen = [arguments.task] if arguments.task else list(tasks)
    while todo := [s for task in chosen for row in rows(kept, task) for s in row.wanted() if not done(kept, s)]:
        kept = complete(path, about, todo, run, arguments.processes)
        harness.pack(path)
    print(render(kept))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    sys.exit(main())
