"""The task of the experiments on language: a GPT of 0.12 M parameters on the source of Python's standard library.

The model and text of `examples/train_lm.py`, of which a run of 400 steps takes some 5 seconds of one core: 2 layers,
width 64, batches of 4 windows of 128 bytes. Losses are in nats per byte, on 64 windows of held-out files.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from gpt import GPT, GPTConfig
from train_lm import GRADIENT_NORM, Corpus, parameter_groups, stdlib_corpus, validation_loss, validation_set, windows

import pace_kernels

MODEL = GPTConfig(layers=2, width=64, heads=4)
BATCH = 4
VALIDATION_WINDOWS = 64
WARMUP_SHARE = 0.1  # of all steps, at most
DECAY_SHARE = 0.2  # of all steps: WSD's last part, in which the learning rate falls to 0 in a straight line
COSINE_FLOOR = 0.1  # of the learning rate
POWER = 0.2  # PACE's averaging weight falls as (1 + t)^(−0.2) by default
BETAS = (0.9, 0.95)
CPU = torch.device("cpu")


@functools.cache
def corpus() -> Corpus:
    return stdlib_corpus()


def about() -> dict[str, Any]:
    """What runs have in common, for runs.complete."""
    return {
        "corpus": {"description": corpus().description, "sha256": corpus().sha256()},
        "task": {
            "model": dataclasses.asdict(MODEL),
            "batch": BATCH,
            "betas": list(BETAS),
            "gradient_norm": GRADIENT_NORM,
            "warmup_share": WARMUP_SHARE,
            "decay_share": DECAY_SHARE,
            "cosine_floor": COSINE_FLOOR,
            "power": POWER,
            "validation_windows": VALIDATION_WINDOWS,
        },
    }


# --- learning rates ---


def factor(schedule: str, step: int, steps: int) -> float:
    """Of the learning rate at a step, counted from 1."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step <= warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        share = (step - warmup) / max(1, steps - warmup)
        return COSINE_FLOOR + (1 - COSINE_FLOOR) * 0.5 * (1 + math.cos(math.pi * share))
    if schedule == "wsd":
        return min(1.0, (steps - step) / (DECAY_SHARE * steps))
    if schedule == "cosine to 0":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
    if schedule == "linear to 0":
        return (steps - step) / (steps - warmup)
    raise ValueError(f"no schedule {schedule!r}")


# --- optimizers ---

Builder = Callable[..., Optimizer]


def schedule_free(groups: Any, lr: float, **options: Any) -> Optimizer:
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(groups, lr=lr, **{"betas": BETAS, **options})


# By the name in a spec.
OPTIMIZERS: dict[str, Builder] = {
    "AdamW": lambda groups, lr, **o: torch.optim.AdamW(groups, lr=lr, fused=True, **{"betas": BETAS, **o}),
    "PACE": lambda groups, lr, **o: pace_kernels.PACE(groups, lr=lr, log_stats=True, **{"betas": BETAS, **o}),
    "schedule-free": schedule_free,
}


class Average:
    """An average beside the optimizer, e ← (1 − w) e + w x after each step: "EMA 0.99" has w = 0.01, "power 0.2" PACE's
    w = (1 + t)^(−0.2)."""

    def __init__(self, name: str, model: nn.Module) -> None:
        kind, number = name.split(" ")
        self.weight: Callable[[int], float]
        if kind == "EMA":
            self.weight = lambda t: 1 - float(number)
        else:
            self.weight = lambda t: (1 + t) ** -float(number)
        self.weights = [p.detach() for p in model.parameters()]
        self.values = [p.clone() for p in self.weights]
        self.taken = 0

    def update(self) -> None:
        self.taken += 1
        torch._foreach_lerp_(self.values, self.weights, self.weight(self.taken))

    def swap(self) -> None:
        for x, e in zip(self.weights, self.values, strict=True):
            kept = x.clone()
            x.copy_(e)
            e.copy_(kept)


# --- training ---


class Training:
    """A model in training by a spec: `optimizer`, `lr`, `seed`, its `options`, and `batch` and `width` where these are
    others than above. ``start``: its weights instead of
    new ones; ``text``: of another corpus than this file's."""

    def __init__(
        self, spec: Mapping[str, Any], start: Mapping[str, Tensor] | None = None, text: Corpus | None = None
    ) -> None:
        torch.manual_seed(spec["seed"])
        self.batch = spec.get("batch", BATCH)
        self.text = text or corpus()
        self.model = self.new_model(spec)
        if start is not None:
            self.model.load_state_dict(start)
        self.lr = spec["lr"]
        self.optimizer: Any = OPTIMIZERS[spec["optimizer"]](
            parameter_groups(self.model), self.lr, **spec.get("options", {})
        )
        self.averages = {name: Average(name, self.model) for name in spec.get("averages", ())}
        self.generator = torch.Generator().manual_seed(spec["seed"])
        self.validation = self.evenly(self.text.validation, VALIDATION_WINDOWS)

    def new_model(self, spec: Mapping[str, Any]) -> Any:
        return GPT(dataclasses.replace(MODEL, width=spec.get("width", MODEL.width)))

    def evenly(self, text: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
        """Evenly spread windows, in chunks."""
        return validation_set(text, count, CPU)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        text = self.text.train
        starts = torch.randint(len(text) - GPTConfig.context, (self.batch,), generator=self.generator)
        return windows(text, starts, CPU)

    def step(self, scale: float) -> float:
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        for group in self.optimizer.param_groups:
            group["lr"] = scale * self.lr
        loss: Tensor = self.model.loss(*self.next_batch())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for average in self.averages.values():
            average.update()
        return loss.item()

    def losses(self, live: bool = True) -> dict[str, float]:
        """Of the live weights, of the average that the optimizer keeps, where it keeps one, and of those beside it."""
        found = {}
        # "ema" is ours, "z" schedule-free's.
        if any(name in state for state in self.optimizer.state.values() for name in ("ema", "z")):
            self.optimizer.eval()
            found["average"] = validation_loss(self.model, self.validation)
            self.optimizer.train()
        if live:
            found["live"] = validation_loss(self.model, self.validation)
        for name, average in self.averages.items():
            average.swap()
            found[name] = validation_loss(self.model, self.validation)
            average.swap()
        return {name: loss if math.isfinite(loss) else math.inf for name, loss in found.items()}

    def snapshot(self) -> Callable[[], None]:
        """What puts everything back as it is now, the batches to come included."""
        weights = copy.deepcopy(self.model.state_dict())
        state = copy.deepcopy(self.optimizer.state_dict())
        averages = {
            name: (average.taken, [e.clone() for e in average.values]) for name, average in self.averages.items()
        }
        drawn = self.generator.get_state()

        def restore() -> None:
            self.model.load_state_dict(weights)
            self.optimizer.load_state_dict(state)
            for name, (taken, values) in averages.items():
                self.averages[name].taken = taken
                torch._foreach_copy_(self.averages[name].values, values)
            self.generator.set_state(drawn)

        return restore

    def series(self) -> dict[str, float]:
        """What the optimizer tells of itself: the share of clamped coordinates, or the coefficients that it learns."""
        if isinstance(self.optimizer, pace_kernels.PACE):
            stats = self.optimizer.get_step_stats()  # without a clamp nothing is clipped
            return {name: stats[name] for name in ("lambda_clipped_frac",) if name in stats}
        if isinstance(self.optimizer, pace_kernels.MADA):
            return {name: self.optimizer.coefficients[name] for name in self.optimizer.param_groups[0]["learn"]}
        return {}


def train(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Losses and series at `evaluations` evenly spread steps, of which the last step is one. A loss that is not finite
    is written as null, and ends the run."""
    steps, evaluations = spec["steps"], spec.get("evaluations", 4)
    at = {round(steps * (i + 1) / evaluations) for i in range(evaluations)}
    training = Training(spec)
    found: dict[str, Any] = {"steps": [], "losses": {}, "series": {}}
    for step in range(1, steps + 1):
        loss = training.step(factor(spec["schedule"], step, steps))
        if step not in at and math.isfinite(loss):
            continue
        found["steps"].append(step)
        for name, value in training.losses().items():
            found["losses"].setdefault(name, []).append(plain(value))
        for name, value in training.series().items():
            found["series"].setdefault(name, []).append(plain(value))
        if found["losses"]["live"][-1] is None:
            break
    return found


def plain(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def final(result: Mapping[str, Any], weights: str) -> float:
    """The last loss of these weights; infinite after a divergence."""
    losses = result["losses"][weights]
    return math.inf if losses[-1] is None else float(losses[-1])
