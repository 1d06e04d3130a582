"""What compressed states cost in quality, on the small language model of lm.py (0.12 M parameters).

    python research/storage.py             what is not run yet, then tables; 35 minutes on a busy core
    python research/storage.py --render    tables from what is there
    python research/storage.py --quick     a few short runs into out/quick, to see that it works

This text is the protocol. It was written, and committed, before the runs.

1. **Averages beside one trajectory**, seeds 101 to 104: PACE without a pull in float32 at a constant learning rate of
   0.002, 2,400 steps, of which 240 warm up. Beside it lie averages of the very same weights with an averaging weight of
   1e-3, in every format. Ours are PACE's own `ema_bits` 32, 16, 8 and 24, by as many optimizers that get the same
   gradients, and whose weights are checked to be the same bits. Those of others are as they are written down here:
   bfloat16, nearest and dithered; the difference to the weight in int8, in blocks of 32, rounded to the nearest, with a
   power of two as the scale; the same behind a softsign with a float32 as the scale. Tensors that PACE does not
   compress are in float32 in all of them.
   Measured at 800, 1,600 and 2,400 steps: validation loss minus that of the float32 average, mean and standard error
   over the seeds. These differences have no noise of training in them. The band is 0.002 nats per byte: a format is
   *inside* where the mean and two standard errors on either side lie within it, *outside* where they all lie beyond it;
   in between the table says on which side the mean is. What counts is the last of the times.

2. **Whole optimizers**, seeds 101 to 108, 800 steps at a constant rate of 0.004 (80 warm up), λ = 3.2, and ρ = 50,
   κ = 1, γ = 1.33: the averaging weight is 1 up to step 50, 0.02 at 86 and 0.001 at 800. Rate and λ are the best of
   four pairs that were tried in float32 on seed 99. Weights and gradients are in bfloat16, activations in float32; the
   loss is that of the average in float32, so that what is compared is what the states have lost, and no rounding of
   what is handed back. With master weights of 32 bits: state_bits 32 (float32 PACE for such gradients), 16, 8; with
   those of 24 bits: 8; all in float32, with float32 gradients; and weights in bare bfloat16 to the nearest, which shows
   whether a loss could be seen here at all. 800 steps, fewer than in 1, because the cores are shared.
   Any rounding moves a run, and a single run by far more than a format costs. So the *control* is a harmless rounding:
   m and v in dithered bfloat16, the average in float32 (state_bits 16, ema_bits 32, master weights of 32 bits). A
   format has *no loss to be seen* where its loss minus the control's, paired by seed, is at most two standard errors
   above 0 in the mean. No more than that is claimed. Beside it stands the mean plus two standard errors: a larger loss
   would have been seen.

3. **Rates**: what the dither of v does to single coordinates. Gradients are noise; in each block of 32 one coordinate
   is loud and the others have a share of its size. The rate of a coordinate is 1 / sqrt(v) over that of float32 for the
   same gradients: mean and standard deviation over coordinates, after 5 / (1 − β2) steps, and again 3 / (1 − β2) steps
   after all but the loud ones have fallen to a tenth. state_bits 8 and 16, β2 0.95 and 0.999. Nothing is decided by it.

Since the runs were seen: the control moves averages by far less than was expected, 0.0007 nats (earlier runs, with
large averaging weights, by 0.02). Part 1 was run again, with the same losses, to measure as well how far, and in which
direction, averages lie from the float32 one: because the loss of that of 8 bits came out lower at all times. It ran
ahead by 0.5 %, and since then averages are dithered in pairs (`evenly` in csrc/codes.h): all runs with an average on
the grid were made anew.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import lm
import torch
from runs import Spec, complete, done, load, provenance, result
from torch import Tensor, nn

from pace_kernels import PACE
from pace_kernels.formats import BLOCK, why_float32

BAND = 0.002  # nats per byte
ERRORS = 2.0  # standard errors
REFERENCE = "float32"
OURS = {"grid, 16 bits": 16, "grid, 8 bits": 8, "24 bits, dithered": 24}  # ema_bits

# Names of the table, where weights and gradients lie, and options. CONTROL is what the others are measured against.
PLAIN_STATES = "master 32, states 32"
CONTROL = "m and v in dithered bfloat16: the control"
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    REFERENCE: ("float32", {}),
    PLAIN_STATES: ("bfloat16", {"master_weight_bits": 32}),
    CONTROL: ("bfloat16", {"state_bits": 16, "ema_bits": 32, "master_weight_bits": 32}),
    "master 32, states 16": ("bfloat16", {"state_bits": 16, "master_weight_bits": 32}),
    "master 32, states 8": ("bfloat16", {"state_bits": 8, "master_weight_bits": 32}),
    "master 24, states 8": ("bfloat16", {"state_bits": 8, "master_weight_bits": 24}),
    "bare bfloat16, nearest, states 32": ("bfloat16", {}),
}
PULL = {"lambda_pullback": 3.2, "ema_kappa": 1.0, "ema_gamma": 1.33, "ema_rho": 50}

LOUD = 7  # of each block, the coordinate that is loud
SHARES = (1.0, 0.1, 0.03, 0.01, 0.003, 0.001)  # of the others' gradients


@dataclass(frozen=True)
class Size:
    """How much is run."""

    steps: int = 2400
    seeds: tuple[int, ...] = (101, 102, 103, 104)
    whole_steps: int = 800
    whole_seeds: tuple[int, ...] = (101, 102, 103, 104, 105, 106, 107, 108)
    blocks: int = 512
    beta2s: tuple[float, ...] = (0.95, 0.999)

    def averages(self) -> list[Spec]:
        return [
            {"task": "averages", "lr": 2e-3, "steps": self.steps, "evaluations": 3, "weight": 1e-3, "seed": seed}
            for seed in self.seeds
        ]

    def whole(self, name: str) -> list[Spec]:
        weights, formats = WHOLE[name]
        return [
            {
                "task": "whole", "lr": 4e-3, "steps": self.whole_steps, "options": {**PULL, **formats},
                "weights": weights, "seed": seed,
            }
            for seed in self.whole_seeds
        ]  # fmt: skip

    def rates(self) -> list[Spec]:
        return [
            {"task": "rates", "state_bits": bits, "beta2": beta2, "blocks": self.blocks, "seed": 101}
            for bits in (8, 16)
            for beta2 in self.beta2s
        ]


FULL = Size()
QUICK = Size(steps=3, seeds=(101, 102), whole_steps=2, whole_seeds=(101, 102), blocks=128, beta2s=(0.5,))


# ---- averages in the formats of others ----


class Bfloat16:
    BYTES = 2.0

    def __init__(self, x: Tensor, seed: int | None = None) -> None:
        self.e = x.bfloat16()
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def update(self, before: Tensor, x: Tensor, w: float) -> None:
        e = self.e.float() + w * (x - self.e.float())
        if self.generator is not None:  # up with the chance of what is beyond the 16 bits
            dither = torch.randint(1 << 16, e.shape, generator=self.generator, dtype=torch.int32)
            e = (e.view(torch.int32) + dither & -(1 << 16)).view(torch.float32)
        self.e = e.bfloat16()

    def value(self, x: Tensor) -> Tensor:
        return self.e.float()


class Int8Difference:
    """The difference to the weight, 255 codes evenly spaced, with a power of two as the scale of a block."""

    BYTES = 1 + 1 / BLOCK

    def __init__(self, x: Tensor) -> None:
        self.difference = torch.zeros_like(x)  # as it is decoded

    def update(self, before: Tensor, x: Tensor, w: float) -> None:
        e = before + self.difference
        e += w * (x - e)
        self.difference = self.stored((e - x).view(-1, BLOCK)).view(-1)

    def stored(self, d: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(d.abs().amax(1, keepdim=True) / 127)
        scale = torch.ldexp(torch.ones_like(mantissa), exponent)
        return (d / scale).round().clamp(-127, 127) * scale

    def value(self, x: Tensor) -> Tensor:
        return x + self.difference


class Int8Softsign(Int8Difference):
    """The same behind φ(a) = 2a / (1 + |a|), which has finer codes near 0, with the largest of a block as the scale."""

    BYTES = 1 + 4 / BLOCK

    def stored(self, d: Tensor) -> Tensor:
        scale = d.abs().amax(1, keepdim=True).clamp(min=1e-30)
        code = (127 * 2 * (d / scale) / (1 + (d / scale).abs())).round() / 127
        return scale * code / (2 - code.abs())


Others = Bfloat16 | Int8Difference
OTHERS: dict[str, Callable[[Tensor, int], Others]] = {
    "bfloat16, dithered": lambda x, seed: Bfloat16(x, seed),
    "bfloat16, nearest": lambda x, seed: Bfloat16(x),
    "int8 difference, nearest": lambda x, seed: Int8Difference(x),
    "int8 softsign difference, nearest": lambda x, seed: Int8Softsign(x),
}
BYTES = {
    REFERENCE: 4.0, "grid, 16 bits": 2 + 1 / BLOCK, "grid, 8 bits": 1 + 1 / BLOCK, "24 bits, dithered": 3.0,
    "bfloat16, dithered": Bfloat16.BYTES, "bfloat16, nearest": Bfloat16.BYTES,
    "int8 difference, nearest": Int8Difference.BYTES, "int8 softsign difference, nearest": Int8Softsign.BYTES,
}  # fmt: skip


# ---- 1: averages beside one trajectory ----


def compressed(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if why_float32(p) is None]


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in compressed(model)])


class Beside(lm.Training):
    """A training that keeps averages of its weights in every format."""

    def __init__(self, spec: Spec) -> None:
        self.weight = spec["weight"]
        options = {"lambda_pullback": 0.0, "ema_kappa": None, "beta_ema": self.weight}
        super().__init__({"optimizer": "PACE", "lr": spec["lr"], "seed": spec["seed"], "options": options})
        self.twins: dict[str, tuple[nn.Module, PACE]] = {REFERENCE: (self.model, self.optimizer)}
        for name, bits in OURS.items():
            model = copy.deepcopy(self.model)
            optimizer = PACE(lm.parameter_groups(model), lr=self.lr, betas=lm.BETAS, ema_bits=bits, **options)
            self.twins[name] = model, optimizer
        self.before = flat(self.model)
        self.others = {name: new(self.before, spec["seed"]) for name, new in OTHERS.items()}
        self.optimizer.register_step_post_hook(self.follow)

    def follow(self, *_: Any) -> None:
        """The same step for the others, and their averages."""
        for model, optimizer in list(self.twins.values())[1:]:
            for p, q in zip(self.model.parameters(), model.parameters(), strict=True):
                q.grad = p.grad
            for group in optimizer.param_groups:
                group["lr"] = self.optimizer.param_groups[0]["lr"]
            optimizer.step()
        x = flat(self.model)
        for average in self.others.values():
            average.update(self.before, x, self.weight)
        self.before = x

    def values(self) -> dict[str, Tensor]:
        """The averages of what is compressed."""
        found = {}
        for name, (model, optimizer) in self.twins.items():
            for p, q in zip(self.model.parameters(), model.parameters(), strict=True):
                if not torch.equal(p, q):
                    raise RuntimeError(f"the weights beside which {name} lies are no longer the same")
            with optimizer.averaged():
                found[name] = flat(model)
        return found | {name: average.value(self.before) for name, average in self.others.items()}

    def measure(self) -> dict[str, dict[str, float]]:
        """By format: the loss; of the difference to the float32 average e, over the distance x − e from there to the
        weights, the part in that direction ("ahead") and all of it ("off")."""
        found, values = {}, self.values()
        e = values[REFERENCE].double()
        away = self.before.double() - e
        with self.optimizer.averaged():
            shown = copy.deepcopy(self.model)
        for name, value in values.items():
            params = compressed(shown)
            for p, part in zip(params, value.split([p.numel() for p in params]), strict=True):
                p.detach().copy_(part.view_as(p))
            moved = value.double() - e
            found[name] = {
                "loss": lm.validation_loss(shown, self.validation),
                "ahead": (moved.dot(away) / away.dot(away)).item(),
                "off": (moved.norm() / away.norm()).item(),
            }
        return found


def train_averages(spec: Spec) -> dict[str, Any]:
    steps, training = spec["steps"], Beside(spec)
    at = [round(steps * (i + 1) / spec["evaluations"]) for i in range(spec["evaluations"])]
    found: dict[str, dict[str, list[float | None]]] = {"loss": {}, "ahead": {}, "off": {}}
    for step in range(1, steps + 1):
        training.step(lm.factor("constant", step, steps))
        if step in at:
            for name, its in training.measure().items():
                for what, value in its.items():
                    found[what].setdefault(name, []).append(lm.plain(value))
    return {"steps": at, **found}


# ---- 2: whole optimizers ----


class Whole(lm.Training):
    """Arithmetic in float32; weights and gradients in float32 or bfloat16."""

    def __init__(self, spec: Spec) -> None:
        super().__init__({**spec, "optimizer": "PACE", "options": {}})
        self.trained = self.model
        if spec["weights"] == "bfloat16":
            self.trained = copy.deepcopy(self.model).bfloat16()
        groups = lm.parameter_groups(self.trained)
        self.optimizer = PACE(groups, lr=self.lr, betas=lm.BETAS, **spec["options"])
        if self.trained is not self.model:
            self.show()
            self.optimizer.register_step_pre_hook(self.narrow)
            self.optimizer.register_step_post_hook(self.show)

    def narrow(self, *_: Any) -> None:
        """Hands the gradients over."""
        for p, q in zip(self.model.parameters(), self.trained.parameters(), strict=True):
            assert p.grad is not None
            q.grad, p.grad = p.grad.bfloat16(), None

    def show(self, *_: Any) -> None:
        self.model.load_state_dict(self.trained.state_dict())

    def losses(self) -> dict[str, float]:
        """Of the average and of the weights, both with all the bits that they have."""
        shown = copy.deepcopy(self.model)
        shown.load_state_dict(self.optimizer.master_state_dict(self.trained))
        found = {"live": lm.validation_loss(shown, self.validation)}
        state = self.optimizer.float_state_dict()["state"]
        # Parameters are numbered as the groups have them.
        params = [p for group in lm.parameter_groups(shown) for p in group["params"]]
        with torch.no_grad():
            for i, p in enumerate(params):
                p.copy_(state[i]["ema"])
        return {"average": lm.validation_loss(shown, self.validation), **found}


def train_whole(spec: Spec) -> dict[str, Any]:
    training = Whole(spec)
    for step in range(1, spec["steps"] + 1):
        training.step(lm.factor("constant", step, spec["steps"]))
    held = training.optimizer.memory()
    bytes_each = (held.weights + held.states) / held.elements
    return {**{name: lm.plain(loss) for name, loss in training.losses().items()}, "bytes": round(bytes_each, 3)}


# ---- 3: rates ----


def measure_rates(spec: Spec) -> dict[str, Any]:
    beta2, generator = spec["beta2"], torch.Generator().manual_seed(spec["seed"])
    shares = torch.tensor(SHARES).repeat(BLOCK)[:BLOCK]
    sizes = torch.where(torch.arange(BLOCK) == LOUD, 1.0, shares)
    params = [nn.Parameter(torch.ones(spec["blocks"], BLOCK)) for _ in range(2)]
    kinds = (spec["state_bits"], 32)
    optimizers = [
        PACE([p], lr=0.0, betas=(0.9, beta2), lambda_pullback=0.0, use_ema_eval=False, state_bits=bits)
        for p, bits in zip(params, kinds, strict=True)
    ]
    found = {}
    for when, steps, scale in (("steady", 5, 1.0), ("fallen", 3, 0.1)):
        sizes = torch.where(torch.arange(BLOCK) == LOUD, 1.0, scale * shares)
        for _ in range(round(steps / (1 - beta2))):
            gradient = sizes * torch.randn(params[0].shape, generator=generator)
            for p, optimizer in zip(params, optimizers, strict=True):
                p.grad = gradient
                optimizer.step()
        coded, exact = (optimizer.float_state_dict()["state"][0]["exp_avg_sq"] for optimizer in optimizers)
        rate = (exact / coded).sqrt()
        quiet = torch.arange(BLOCK) != LOUD
        each = {share: rate[:, quiet & (shares == share)] for share in shares.unique().tolist()}
        found[when] = [
            [round(share, 6), lm.plain(its.mean().item()), lm.plain(its.std().item())] for share, its in each.items()
        ]
    return found


# ---- running ----


def run(spec: Spec) -> dict[str, Any]:
    tasks = {"averages": train_averages, "whole": train_whole, "rates": measure_rates}
    return tasks[spec["task"]](spec)


def run_all(path: Path, size: Size, processes: int | None = None) -> dict[str, Any]:
    """Seed by seed, so that a run that was ended early can be compared."""
    whole = [spec for its in zip(*(size.whole(name) for name in WHOLE), strict=True) for spec in its]
    return complete(path, lm.about(), [*size.rates(), *size.averages(), *whole], run, processes)


# ---- what came out ----

Difference = tuple[float, float]  # mean and standard error


def difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Of a − b, paired. Infinite where a run has diverged; nan where one is missing."""
    both = list(zip(a, b, strict=True))
    if any(math.isinf(x) or math.isinf(y) for x, y in both):
        return math.inf, math.nan
    each = [x - y for x, y in both]
    if len(each) < 2 or any(map(math.isnan, each)):
        return math.nan, math.nan
    return statistics.mean(each), statistics.stdev(each) / math.sqrt(len(each))


def verdict_of_band(found: Difference) -> str:
    mean, error = found
    if math.isinf(mean):
        return "diverged"
    if math.isnan(mean):
        return "not run"
    if abs(mean) + ERRORS * error <= BAND:
        return "inside"
    if abs(mean) - ERRORS * error > BAND:
        return "**outside**"
    return "its mean is inside" if abs(mean) <= BAND else "its mean is outside"


def verdict_of_control(found: Difference) -> str:
    mean, error = found
    if math.isinf(mean):
        return "**diverged**"
    if math.isnan(mean):
        return "not run"
    return "no loss to be seen" if mean <= ERRORS * error else "**a loss**"


def stated(found: Difference, digits: int = 4) -> str:
    return "–" if not math.isfinite(found[0]) else f"{found[0]:+.{digits}f} ± {found[1]:.{digits}f}"


def loss(value: float | None) -> float:
    return math.inf if value is None else value


def of_averages(
    kept: Mapping[str, Any], size: Size, what: str = "loss"
) -> tuple[list[int], dict[str, list[list[float]]]]:
    """The steps, and by format and step what was measured on the seeds."""
    runs = [result(kept, spec) for spec in size.averages() if done(kept, spec)]
    if not runs:
        return [], {}
    names, steps = runs[0][what], runs[0]["steps"]
    return steps, {name: [[loss(r[what][name][i]) for r in runs] for i in range(len(steps))] for name in names}


def of_whole(kept: Mapping[str, Any], size: Size, name: str, weights: str = "average") -> list[float]:
    """Final losses over the seeds; nan where a run is missing."""
    specs = size.whole(name)
    return [loss(result(kept, spec)[weights]) if done(kept, spec) else math.nan for spec in specs]


def table_of_averages(kept: Mapping[str, Any], size: Size) -> str:
    steps, losses = of_averages(kept, size)
    if not steps:
        return "Averages beside one trajectory: not run."
    heads = " | ".join(f"{step:,} steps" for step in steps)
    lines = [
        f"| average | bytes | {heads} | at the last | ahead, % | off, % |",
        f"| --- | ---: |{' ---: |' * len(steps)} --- | ---: | ---: |",
    ]
    distances = [of_averages(kept, size, what)[1] for what in ("ahead", "off")]
    for name, its in losses.items():
        if name == REFERENCE:
            cells = [f"{statistics.mean(column):.4f}" for column in its]
            lines.append(f"| float32: its loss | 4 | {' | '.join(cells)} | | | |")
            continue
        found = [difference(a, b) for a, b in zip(its, losses[REFERENCE], strict=True)]
        digits = 4 if abs(found[-1][0]) >= 5e-5 else 5
        cells = [stated(each, digits) for each in found]
        cells += [verdict_of_band(found[-1]), *(f"{100 * statistics.mean(its[name][-1]):.2f}" for its in distances)]
        lines.append(f"| {name} | {BYTES[name]:.3g} | {' | '.join(cells)} |")
    return (
        f"**Averages beside one trajectory**, averaging weight {size.averages()[0]['weight']:g}, {len(size.seeds)} "
        "seeds: validation loss minus that of the float32 average, nats per byte, mean ± standard error. The band is "
        f"{BAND:g}. Ahead and off: at the last time, the difference to the float32 average over the distance from "
        "there to the weights, in that direction and in all.\n\n"
    ) + "\n".join(lines)


def table_of_whole(kept: Mapping[str, Any], size: Size) -> str:
    if not any(done(kept, spec) for name in WHOLE for spec in size.whole(name)):
        return "Whole optimizers: not run."
    lines = [
        "| PACE with | bytes | its loss | − float32's | − the control's | | mean + 2 errors |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    control, reference = (of_whole(kept, size, name) for name in (CONTROL, REFERENCE))
    for name in WHOLE:
        its, first = of_whole(kept, size, name), size.whole(name)[0]
        against = difference(its, control)
        cells = [
            f"{result(kept, first)['bytes']:.3g}" if done(kept, first) else "–",
            f"{statistics.mean(its):.4f}",
            "" if name == REFERENCE else stated(difference(its, reference)),
            *(("", "", "") if name == CONTROL else (stated(against), verdict_of_control(against), seen(against))),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return (
        f"**Whole optimizers**, {size.whole_steps} steps, {len(size.whole_seeds)} seeds, averaging weight down to "
        f"{averaging_weight(size.whole_steps):.2g}: final loss of the average, differences paired by seed. Bytes are "
        "those of weights and states for each parameter of this model, small tensors included.\n\n"
    ) + "\n".join(lines)


def seen(found: Difference) -> str:
    mean, error = found
    return f"{mean + ERRORS * error:+.4f}" if math.isfinite(mean) else "–"


def averaging_weight(step: int) -> float:
    return max(float((1 + PULL["ema_gamma"] * max(0, step - PULL["ema_rho"])) ** -PULL["ema_kappa"]), 1e-4)


def table_of_rates(kept: Mapping[str, Any], size: Size) -> str:
    specs = [spec for spec in size.rates() if done(kept, spec)]
    if not specs:
        return "Rates: not run."
    shares = [share for share, _, _ in result(kept, specs[0])["steady"]][::-1]
    lines = [
        f"| state_bits, β2 | | {' | '.join(f'{share:g}' for share in shares)} |",
        f"| --- | --- |{' ---: |' * len(shares)}",
    ]
    for spec in specs:
        for when, its in result(kept, spec).items():
            cells = [f"{mean:.2f} ± {spread:.2f}" for _, mean, spread in its[::-1]]
            lines.append(f"| {spec['state_bits']}, {spec['beta2']:g} | {when} | {' | '.join(cells)} |")
    return (
        "**What is noisy or slow**: the rate of a coordinate, 1 / sqrt(v) over float32's for the same gradients, by "
        "the size of its gradients over those of the loudest of its block; mean ± standard deviation over coordinates. "
        "*Fallen*: after all but the loudest have fallen to a tenth. In 8 bits v is at least 2^−20 of the largest of "
        "its block, so that the quietest are slow. What the dither adds to v is forgotten as v is: within "
        "1 / (1 − β2) steps.\n\n"
    ) + "\n".join(lines)


def sentences(kept: Mapping[str, Any], size: Size) -> str:
    """What follows from the numbers, and what does not."""
    said = []
    steps, losses = of_averages(kept, size)
    ahead = of_averages(kept, size, "ahead")[1]
    for name in OURS if steps else ():
        found = [difference(a, b) for a, b in zip(losses[name], losses[REFERENCE], strict=True)]
        beyond = [i for i, (mean, _) in enumerate(found) if abs(mean) > BAND]
        if beyond:
            each = " and ".join(f"{stated(found[i])} at {steps[i]:,} steps" for i in beyond)
            shares = " and ".join(f"{100 * statistics.mean(ahead[name][i]):+.2f} %" for i in beyond)
            title = name[0].upper() + name[1:]
            said.append(
                f"{title}: beyond the band with {each}. There it is ahead of the float32 average by {shares} of the "
                "way to the weights. That is an error also where the loss is lower, and no gain."
            )
    for names, words in ((OURS, "Of our formats"), (OTHERS, "Of the formats of others")):
        if steps:
            found_by = {n: difference(losses[n][-1], losses[REFERENCE][-1]) for n in names}
            worst = max(found_by, key=lambda n: abs(found_by[n][0]))
            said.append(f"{words} {worst} differs most in loss at the end: {stated(found_by[worst])}.")
    moved = {
        weights: [
            abs(a - b)
            for a, b in zip(
                of_whole(kept, size, CONTROL, weights), of_whole(kept, size, PLAIN_STATES, weights), strict=True
            )
        ]
        for weights in ("average", "live")
    }
    if all(map(math.isfinite, moved["average"])):
        average, live = (f"{statistics.mean(its):.4f} (at most {max(its):.4f})" for its in moved.values())
        said.append(
            f"The harmless rounding of the control moves the loss of a run's average by {average} and that of its "
            f"weights by {live} nats, in the mean of the magnitudes: single runs tell nothing of less than that."
        )
    said.append(
        f"{len(size.whole_seeds)} seeds of a model of 0.12 M parameters: no loss to be seen here is no proof that a "
        "format loses nothing elsewhere."
    )
    return "\n".join(f"- {sentence}" for sentence in said)


def render(kept: Mapping[str, Any], size: Size = FULL) -> str:
    """The tables, from the JSON alone."""
    tables = (table_of_averages, table_of_whole, table_of_rates, sentences)
    return "\n\n".join([f"{provenance(kept)} The protocol: `research/storage.py`.", *(t(kept, size) for t in tables)])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of storage.json (out/experiments)")
    parser.add_argument("--quick", action="store_true", help="a few short runs, into out/quick")
    parser.add_argument("--render", action="store_true", help="runs nothing")
    parser.add_argument("--processes", type=int, help="at once (as many as there are cores); 0: in this one")
    arguments = parser.parse_args(argv)
    size = QUICK if arguments.quick else FULL
    folder = arguments.out or Path("out/quick" if arguments.quick else "out/experiments")
    path = folder / "storage.json"
    kept = load(path) if arguments.render else run_all(path, size, arguments.processes)
    print(render(kept, size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
