"""PACE beside AdamW and AdamW + EMA on a small language model: what the paper claims, at our scale.

    python research/pace.py             what is not run yet, then tables and figures; 40 minutes on 2 cores
    python research/pace.py --render    tables and figures from what is there
    python research/pace.py --quick     a few short runs into out/quick, to see that it works

Five stages (`lm.py` says what is trained; betas (0.9, 0.95), weight decay 0.1 on matrices, gradients clipped to 1):

1. **Sweep**, one seed: learning rate × pullback strength λ × averaging exponent κ × schedule, and the rate alone at the
   default λ and κ. λ = 0 is AdamW with the average that PACE would keep; AdamW's runs carry plain EMAs of four decays
   beside those. Schedule-free AdamW (Defazio et al., 2024) at a constant rate, which is what it is made for, over the
   learning rate and its β1. As a control, AdamW and its averages under a rate that falls as PACE's averaging weight
   does, (1 + t)^(−0.2): where all coordinates are clamped, PACE's average moves by w_t times AdamW's steps, and that
   fall alone could be what helps.
2. **Seeds**: the best cell of each method and schedule, on seeds that the sweep has not seen, so that choosing the
   best of many does not flatter who has more to choose from. Differences are paired by seed: the same start and the
   same batches.
3. **Budgets**, the paper's appendix C: one PACE run at a constant rate, stopped anywhere, against AdamW that for each
   budget decays its rate over the last fifth (branches of one trunk), and against AdamW's plain EMA on that trunk.
4. **Variants** of the best cell at a constant rate, on four of its seeds: the average moves every 2, 5, 10 or 20
   steps; the pull is measured from the stepped weights; nothing is clamped.
5. **Rates** around the best one of each method, everything else as it is at its best cell, on four seeds: what a rate
   costs that is a quarter, a half, twice, four times as high.

The share of clamped coordinates, the paper's Figure 4, comes from the runs of the seeds.

Source of the claims: Au and Block, Training for the Model You Return (arXiv 2606.25086).
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import lm
import plots
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from runs import CRITICAL, Spec, complete, done, load, provenance, result

LRS = (2e-3, 4e-3, 8e-3, 16e-3, 32e-3)
LOWER_LRS = (5e-4, 1e-3)  # for AdamW, whose best was at the edge without them
LAMBDAS = (0.05, 0.2, 0.8, 3.2, 12.8)
KAPPAS = (0.1, 0.2, 0.5, 0.8)
SCHEDULES = ("constant", "cosine", "wsd")
CONTROLS = ("power",)  # schedules of AdamW alone
EMA_DECAYS = (0.9, 0.95, 0.98, 0.99)
BETA1S = (0.9, 0.95)  # of schedule-free AdamW
SEEDS = (1, 2, 3, 4, 5, 6)  # of stage 2; the sweep has seed 0
BUDGETS = (200, 400, 800, 1600)
BUDGET_SEEDS = (1, 2, 3, 4)
STEPS = 400
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"the average moves every {n} steps": {"ema_update_freq": n} for n in (2, 5, 10, 20)},
    "the pull is measured from the stepped weights": {"pullback_from": "step"},
    "no clamp": {"clamp_pullback": False},
}
VARIANT_SEEDS = (1, 2, 3, 4)
AROUND = (0.25, 0.5, 2.0, 4.0)  # times the best rate
DEFAULTS = (0.15, 0.2)  # λ and κ

METHODS = ("AdamW", "AdamW + EMA", "PACE", "PACE, default λ", "schedule-free")
COLORS = dict(zip(METHODS, plots.PALETTE, strict=False))


@dataclass(frozen=True)
class Size:
    """How much is run."""

    steps: int = STEPS
    lrs: tuple[float, ...] = LRS
    lower_lrs: tuple[float, ...] = LOWER_LRS
    lambdas: tuple[float, ...] = LAMBDAS
    kappas: tuple[float, ...] = KAPPAS
    decays: tuple[float, ...] = EMA_DECAYS
    schedules: tuple[str, ...] = SCHEDULES
    controls: tuple[str, ...] = CONTROLS
    beta1s: tuple[float, ...] = BETA1S
    seeds: tuple[int, ...] = SEEDS
    budgets: tuple[int, ...] = BUDGETS
    budget_seeds: tuple[int, ...] = BUDGET_SEEDS
    around: tuple[float, ...] = AROUND

    @property
    def adamw_lrs(self) -> tuple[float, ...]:
        return (*self.lower_lrs, *self.lrs)

    def pace_cells(self) -> list[tuple[float, float, float]]:
        """κ, λ, learning rate."""
        return list(itertools.product(self.kappas, self.lambdas, self.lrs))

    @property
    def variant_seeds(self) -> list[int]:
        return [seed for seed in VARIANT_SEEDS if seed in self.seeds]

    @property
    def averages(self) -> list[str]:
        """Beside AdamW's weights."""
        return [f"EMA {decay}" for decay in self.decays] + [f"power {kappa}" for kappa in self.kappas]


FULL = Size()
QUICK = Size(
    steps=3,
    lrs=LRS[1:2],
    lower_lrs=(),
    lambdas=LAMBDAS[1:2],
    kappas=KAPPAS[:1],
    decays=EMA_DECAYS[:1],
    schedules=SCHEDULES[:1],
    controls=CONTROLS,
    beta1s=BETA1S[:1],
    seeds=(1, 2),
    budgets=(2, 5),
    budget_seeds=(1, 2),
    around=AROUND[2:3],
)


# ---- specs ----


def adamw(size: Size, lr: float, schedule: str, seed: int = 0, evaluations: int = 1) -> Spec:
    return {
        "optimizer": "AdamW", "lr": lr, "schedule": schedule, "steps": size.steps, "seed": seed,
        "evaluations": evaluations, "averages": size.averages,
    }  # fmt: skip


def pace(
    size: Size, lr: float, schedule: str, strength: float, kappa: float, seed: int = 0, evaluations: int = 1
) -> Spec:
    return {
        "optimizer": "PACE", "lr": lr, "schedule": schedule, "steps": size.steps, "seed": seed,
        "evaluations": evaluations, "options": {"lambda_pullback": strength, "ema_kappa": kappa},
    }  # fmt: skip


def schedule_free(size: Size, lr: float, beta1: float, seed: int = 0, evaluations: int = 1) -> Spec:
    return {
        "optimizer": "schedule-free", "lr": lr, "schedule": "constant", "steps": size.steps, "seed": seed,
        "evaluations": evaluations, "options": {"betas": [beta1, 0.95]},
    }  # fmt: skip


def sweep(size: Size) -> list[Spec]:
    """The shorter lists first, so that a sweep that was ended early is still balanced."""
    found = [adamw(size, lr, schedule) for schedule in (*size.schedules, *size.controls) for lr in size.adamw_lrs]
    found += [schedule_free(size, lr, beta1) for lr in size.lrs for beta1 in size.beta1s]
    found += [pace(size, lr, schedule, *DEFAULTS) for schedule in size.schedules for lr in size.lrs]
    found += [
        pace(size, lr, schedule, strength, kappa)
        for schedule in size.schedules
        for kappa, strength, lr in size.pace_cells()
    ]
    return found


# ---- the best cells ----


@dataclass(frozen=True)
class Cell:
    """A setting and the weights that it hands back."""

    method: str
    schedule: str
    spec: Spec  # of seed 0
    weights: str
    loss: float

    def seeded(self, seed: int) -> Spec:
        return {**self.spec, "seed": seed, "evaluations": 10}

    @property
    def settings(self) -> str:
        options = self.spec.get("options", {})
        found = [f"lr {self.spec['lr']:g}"]
        if self.method == "AdamW + EMA":
            found.append(self.weights)
        if self.method.startswith("PACE"):
            found += [f"λ {options['lambda_pullback']:g}", f"κ {options['ema_kappa']:g}"]
        if self.method == "schedule-free":
            found.append(f"β1 {options['betas'][0]:g}")
        return ", ".join(found)


def cells(kept: Mapping[str, Any], size: Size, method: str, schedule: str) -> list[Cell]:
    """All of a method's settings that the sweep has tried."""
    specs: list[tuple[Spec, Sequence[str]]]
    if method in ("AdamW", "AdamW + EMA"):
        weights = ("live",) if method == "AdamW" else size.averages
        specs = [(adamw(size, lr, schedule), weights) for lr in size.adamw_lrs]
    elif method == "PACE":
        specs = [(pace(size, lr, schedule, strength, kappa), ("average",)) for kappa, strength, lr in size.pace_cells()]
    elif method == "PACE, default λ":
        specs = [(pace(size, lr, schedule, *DEFAULTS), ("average",)) for lr in size.lrs]
    elif schedule == "constant":
        specs = [(schedule_free(size, lr, beta1), ("average",)) for lr in size.lrs for beta1 in size.beta1s]
    else:
        specs = []
    return [
        Cell(method, schedule, spec, name, lm.final(result(kept, spec), name))
        for spec, names in specs
        if done(kept, spec)
        for name in names
    ]


def best_cells(kept: Mapping[str, Any], size: Size) -> list[Cell]:
    found = []
    for schedule in (*size.schedules, *size.controls):
        for method in METHODS if schedule in size.schedules else METHODS[:2]:
            tried = cells(kept, size, method, schedule)
            if tried:
                found.append(min(tried, key=lambda cell: cell.loss))
    return found


def of_seeds(kept: Mapping[str, Any], size: Size, cell: Cell) -> list[float]:
    """The final losses on the seeds of stage 2; nan where a run is missing."""
    specs = [cell.seeded(seed) for seed in size.seeds]
    return [lm.final(result(kept, spec), cell.weights) if done(kept, spec) else math.nan for spec in specs]


# ---- budgets ----


def budget_specs(size: Size, best: Sequence[Cell]) -> dict[str, list[Spec]]:
    """By method. AdamW decays at the rate that is best with WSD, and its EMA is taken at the rate best for that."""

    def spec(method: str, schedule: str) -> Spec | None:
        cell = next((c for c in best if c.method == method and c.schedule == schedule), None)
        if cell is None:
            return None
        kept = {k: v for k, v in cell.spec.items() if k in ("optimizer", "lr", "options", "averages")}
        return {"task": "budgets", **kept, "budgets": list(size.budgets), "branches": method == "AdamW"}

    wanted = {"AdamW": ("AdamW", "wsd"), "AdamW + EMA": ("AdamW + EMA", "constant"), "PACE": ("PACE", "constant")}
    if "wsd" not in size.schedules:
        wanted["AdamW"] = ("AdamW", "constant")
    return {
        name: [{**found, "seed": seed} for seed in size.budget_seeds]
        for name, cell in wanted.items()
        if (found := spec(*cell)) is not None
    }


def train_budgets(spec: Spec) -> dict[str, Any]:
    """Losses at each budget. With `branches`: of branches of the training whose learning rate falls to 0 over the
    last fifth; else of the run itself, at a constant rate."""
    training, budgets = lm.Training(spec), sorted(spec["budgets"])
    warmup = max(1, round(lm.WARMUP_SHARE * 2 * budgets[0]))
    starts = {round((1 - lm.DECAY_SHARE) * budget): budget for budget in budgets} if spec["branches"] else {}
    found: dict[str, dict[str, float | None]] = {}
    for step in range(1, budgets[-1] + 1):
        training.step(min(1.0, step / warmup))
        if step in budgets and not spec["branches"]:
            found[str(step)] = {k: lm.plain(v) for k, v in training.losses().items()}
        if step in starts:
            budget, restore = starts[step], training.snapshot()
            for late in range(step + 1, budget + 1):
                training.step((budget - late) / (budget - step))
            found[str(budget)] = {k: lm.plain(v) for k, v in training.losses().items()}
            if budget == budgets[-1]:
                break
            restore()
    return {"losses": found}


def budget_losses(kept: Mapping[str, Any], specs: Sequence[Spec], weights: str) -> dict[int, list[float]]:
    """By budget, over the seeds; nan where a run is missing."""
    found: dict[int, list[float]] = {budget: [] for spec in specs for budget in spec["budgets"]}
    for spec in specs:
        losses = result(kept, spec)["losses"] if done(kept, spec) else {}
        for budget, values in found.items():
            value = losses.get(str(budget), {weights: math.nan}).get(weights)
            values.append(math.inf if value is None else value)
    return found


def weights_of_budgets(best: Sequence[Cell]) -> dict[str, str]:
    ema = next((c.weights for c in best if c.method == "AdamW + EMA" and c.schedule == "constant"), "live")
    return {"AdamW": "live", "AdamW + EMA": ema, "PACE": "average"}


# ---- variants ----


def variant(cell: Cell, options: Mapping[str, Any], seed: int) -> Spec:
    return {**cell.seeded(seed), "evaluations": 1, "options": {**cell.spec["options"], **options}}


def variants(size: Size, best: Sequence[Cell]) -> dict[str, list[Spec]]:
    cell = next((c for c in best if c.method == "PACE" and c.schedule == "constant"), None)
    return (
        {}
        if cell is None
        else {n: [variant(cell, o, seed) for seed in size.variant_seeds] for n, o in VARIANTS.items()}
    )


def variant_differences(kept: Mapping[str, Any], size: Size) -> dict[str, tuple[float, float, int]]:
    """To the cell itself, paired by seed."""
    best = best_cells(kept, size)
    return {
        name: against_best(kept, best, "PACE", specs, "average")
        for name, specs in variants(size, best).items()
        if any(done(kept, spec) for spec in specs)
    }


# ---- rates around the best one ----


def at_rate(cell: Cell, factor: float, seed: int) -> Spec:
    return {**cell.seeded(seed), "evaluations": 1, "lr": float(f"{cell.spec['lr'] * factor:.3g}")}


def rates(size: Size, best: Sequence[Cell]) -> dict[str, dict[float, list[Spec]]]:
    """By method and factor, the best cells at a constant rate with another rate."""
    return {
        cell.method: {factor: [at_rate(cell, factor, seed) for seed in size.variant_seeds] for factor in size.around}
        for cell in best
        if cell.schedule == "constant"
    }


def cost_of_rates(kept: Mapping[str, Any], size: Size) -> dict[str, dict[float, tuple[float, float, int]]]:
    """What each costs, paired by seed with the best rate."""
    best = best_cells(kept, size)
    weights = {cell.method: cell.weights for cell in best if cell.schedule == "constant"}
    return {
        method: {factor: against_best(kept, best, method, specs, weights[method]) for factor, specs in found.items()}
        for method, found in rates(size, best).items()
    }


def against_best(
    kept: Mapping[str, Any], best: Sequence[Cell], method: str, specs: Sequence[Spec], weights: str
) -> tuple[float, float, int]:
    """Of runs minus those of the method's best cell at a constant rate, paired by seed, as far as both are done."""
    cell = next(c for c in best if c.method == method and c.schedule == "constant")
    pairs = [(spec, cell.seeded(spec["seed"])) for spec in specs]
    there = [pair for pair in pairs if all(done(kept, spec) for spec in pair)]
    columns = list(zip(*there, strict=True)) or [(), ()]
    return paired(*([lm.final(result(kept, spec), weights) for spec in column] for column in columns))


# ---- running ----


def run(spec: Spec) -> dict[str, Any]:
    return train_budgets(spec) if spec.get("task") == "budgets" else lm.train(spec)


def run_all(path: Path, size: Size, processes: int | None = None) -> dict[str, Any]:
    about = lm.about()
    complete(path, about, sweep(size), run, processes)
    best = best_cells(load(path), size)
    seeded = [cell.seeded(seed) for seed in size.seeds for cell in best]
    complete(path, about, seeded, run, processes)
    rest = [spec for specs in budget_specs(size, best).values() for spec in specs]
    rest += [spec for specs in variants(size, best).values() for spec in specs]
    rest += [spec for found in rates(size, best).values() for specs in found.values() for spec in specs]
    return complete(path, about, rest, run, processes)


# ---- what came out ----


def paired(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, int]:
    """Mean of a − b over the seeds, its standard error, and how many there are; nan is a run that is missing. Infinite
    where one side diverged, on whatever seed: a mean over the others would flatter it."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if not (math.isnan(x) or math.isnan(y))]
    if any(math.isinf(x) for x, _ in pairs):
        return math.inf, math.nan, len(pairs)
    if any(math.isinf(y) for _, y in pairs):
        return -math.inf, math.nan, len(pairs)
    differences = [x - y for x, y in pairs]
    if not differences:
        return math.nan, math.nan, 0
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return statistics.mean(differences), error, len(differences)


def verdict(mean: float, error: float, count: int) -> str:
    """In words, by Student's t at 95 % for so few seeds."""
    if math.isinf(mean):
        return "diverged" if mean > 0 else "the other one diverged"
    if count < 2 or not math.isfinite(error):
        return "one seed says nothing"
    if abs(mean) <= CRITICAL[count] * error:
        return "no difference that these seeds can tell"
    return "better" if mean < 0 else "worse"


def stated(mean: float, error: float, count: int) -> str:
    size = "" if math.isinf(mean) else f"{mean:+.4f} ± {error:.4f} nats per byte "
    return f"{size}({count} seeds): {verdict(mean, error, count)}"


def cost(mean: float, error: float, count: int) -> str:
    if not count:
        return "not run"
    return verdict(mean, error, count) if math.isinf(mean) else f"{mean:+.4f} ± {error:.4f}"


def spread(values: Sequence[float]) -> str:
    finite = [v for v in values if math.isfinite(v)]
    diverged = sum(map(math.isinf, values))
    lost = f"{diverged} of {len(values)} diverged" if diverged else ""
    if not finite:
        return lost or "–"
    deviation = f" ± {statistics.stdev(finite):.4f}" if len(finite) > 1 else ""
    return f"{statistics.mean(finite):.4f}{deviation}" + (f" ({lost})" if lost else "")


def conclusions(kept: Mapping[str, Any], size: Size = FULL) -> list[str]:
    """Sentences whose numbers and verdicts are computed here."""
    best, said = best_cells(kept, size), []
    by = {(c.method, c.schedule): c for c in best}

    def compare(ours: tuple[str, str], theirs: tuple[str, str], words: str) -> None:
        if ours in by and theirs in by:
            found = paired(of_seeds(kept, size, by[ours]), of_seeds(kept, size, by[theirs]))
            if found[2]:
                said.append(f"{words} = {stated(*found)}.")

    for schedule in size.schedules:
        for other in ("AdamW", "AdamW + EMA", "schedule-free"):
            compare(("PACE", schedule), (other, schedule), f"{schedule}: PACE − {other}")
        compare(("PACE, default λ", schedule), ("AdamW + EMA", schedule), f"{schedule}: PACE, default λ − AdamW + EMA")
    for method in METHODS[:2]:
        words = f"Control: PACE at a constant rate − {method} at a rate that falls as PACE's averaging weight"
        compare(("PACE", "constant"), (method, "power"), words)
    specs, weights = budget_specs(size, best), weights_of_budgets(best)
    if {"AdamW", "PACE"} <= specs.keys():
        decayed = budget_losses(kept, specs["AdamW"], weights["AdamW"])
        ours_at = budget_losses(kept, specs["PACE"], weights["PACE"])
        for budget in sorted(decayed.keys() & ours_at.keys()):
            found = paired(ours_at[budget], decayed[budget])
            if found[2]:
                words = f"{budget} steps: PACE at a constant rate − AdamW decayed for that budget"
                said.append(f"{words} = {stated(*found)}.")
    said.append(
        f"Those are {len(said)} comparisons, and {len(variant_differences(kept, size))} of variants, each at the 5 % "
        "level: 1 in 20 would come out as better or worse where there is no difference. Cells were chosen on one seed, "
        "so that a method whose loss varies much between seeds may have got a cell that is not its best."
    )
    for cell in best:
        shares = clip_shares(kept, size, cell) if cell.method == "PACE" else []
        if shares:
            first, last = (statistics.mean(s[i] for _, s in shares) for i in (0, -1))
            said.append(
                f"{cell.schedule}: at PACE's best cell {100 * first:.1f} % of the coordinates are clamped at the first "
                f"evaluation, {100 * last:.1f} % at the last one."
            )
    return said


def clip_shares(kept: Mapping[str, Any], size: Size, cell: Cell) -> list[tuple[list[int], list[float]]]:
    """Steps and shares of clamped coordinates, of each seed."""
    found = []
    for seed in size.seeds:
        spec = cell.seeded(seed)
        if done(kept, spec):
            run_ = result(kept, spec)
            found.append((run_["steps"], run_["series"]["lambda_clipped_frac"]))
    return found


def render(kept: Mapping[str, Any], size: Size = FULL) -> str:
    """The tables, from the JSON alone."""
    best = best_cells(kept, size)
    corpus = kept["about"].get("corpus", {}).get("description", "")
    parts = [
        provenance(kept),
        f"GPT of 0.12 M parameters, {size.steps} steps of {lm.BATCH} × {lm.MODEL.context} bytes, {corpus}; validation "
        f"loss in nats per byte. The best cell of the sweep (seed 0), and its loss on seeds "
        f"{', '.join(map(str, size.seeds))} (mean ± standard deviation).",
    ]
    lines = [
        "| schedule | method | best of | settings | seed 0 | other seeds |",
        "| --- | --- | ---: | --- | ---: | ---: |",
    ]
    for cell in best:
        tried = len(cells(kept, size, cell.method, cell.schedule))
        lines.append(
            f"| {cell.schedule} | {cell.method} | {tried} | {cell.settings} | {cell.loss:.4f} "
            f"| {spread(of_seeds(kept, size, cell))} |"
        )
    parts.append("\n".join(lines))
    specs, weights = budget_specs(size, best), weights_of_budgets(best)
    titles = {
        "AdamW": "AdamW, decayed for the budget",
        "AdamW + EMA": "AdamW + EMA, constant rate",
        "PACE": "PACE, constant rate",
    }
    lines = [f"| budget in steps | {' | '.join(titles[m] for m in specs)} |", f"| ---: |{' ---: |' * len(specs)}"]
    losses = {m: budget_losses(kept, specs[m], weights[m]) for m in specs}
    for budget in size.budgets:
        lines.append(f"| {budget} | {' | '.join(spread(losses[m].get(budget, [])) for m in specs)} |")
    same = f", at the rates that are best for {size.steps} steps"
    same += ", where the trainings are those above" if size.steps in size.budgets else ""
    parts.append(f"Budgets, {len(size.budget_seeds)} seeds{same}:\n\n" + "\n".join(lines))
    costs = cost_of_rates(kept, size)
    lines = [
        f"| times the best rate | {' | '.join(f'{factor:g}' for factor in size.around)} |",
        f"| --- |{' ---: |' * len(size.around)}",
    ]
    for method, found in costs.items():
        lines.append(f"| {method} | {' | '.join(cost(*found[factor]) for factor in size.around)} |")
    parts.append(
        "What a learning rate costs that is not the best one, at a constant rate, all else as in the best cell; nats "
        "per byte, mean and standard error over seeds, as below:\n\n" + "\n".join(lines)
    )
    differences = variant_differences(kept, size)
    if differences:
        lines = ["| PACE at its best cell, constant rate, but | loss − that of the cell | |", "| --- | ---: | --- |"]
        lines += [f"| {name} | {cost(*found)} | {verdict(*found)} |" for name, found in differences.items()]
        parts.append("Variants, mean and standard error over seeds:\n\n" + "\n".join(lines))
    parts.append("\n".join(f"- {sentence}" for sentence in conclusions(kept, size)))
    return "\n\n".join(parts) + "\n"


# ---- figures ----


def draw_sweep(kept: Mapping[str, Any], size: Size, path: Path) -> None:
    """Loss of the average over learning rate and strength, for each schedule and κ."""
    grids: dict[tuple[str, float], list[list[float]]] = {}
    strengths, lrs = (0.0, *size.lambdas), size.adamw_lrs
    for schedule in size.schedules:
        for kappa in size.kappas:
            rows = []
            for strength in strengths:
                row = []
                for lr in lrs:
                    spec = pace(size, lr, schedule, strength, kappa) if strength else adamw(size, lr, schedule)
                    name = "average" if strength else f"power {kappa}"
                    row.append(lm.final(result(kept, spec), name) if done(kept, spec) else math.nan)
                rows.append(row)
            grids[schedule, kappa] = rows
    shown = sorted(v for rows in grids.values() for row in rows for v in row if math.isfinite(v))
    if not shown:
        return
    norm = Normalize(shown[0], shown[int(0.9 * (len(shown) - 1))])
    figure, _ = plots.new_figure([4.4] * len(size.kappas), 2.6 * len(size.schedules))
    figure.clear()
    grid = figure.subplots(len(size.schedules), len(size.kappas), squeeze=False)
    image = None
    for row, schedule in zip(grid, size.schedules, strict=True):
        for axes, kappa in zip(row, size.kappas, strict=True):
            values = grids[schedule, kappa]
            image = axes.imshow(values, norm=norm, cmap="viridis_r", aspect="auto", origin="lower")
            axes.grid(visible=False)
            axes.set_xticks(range(len(lrs)), [f"{lr:g}" for lr in lrs])
            axes.set_yticks(range(len(strengths)), [f"{s:g}" for s in strengths])
            axes.tick_params(labelsize=8)
            axes.set_title(f"{schedule}, κ {kappa:g}")
            for y, line in enumerate(values):
                for x, value in enumerate(line):
                    if math.isfinite(value):
                        dark = norm(value) < 0.5
                        axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8,
                                  color=plots.INK if dark else "white")  # fmt: skip
    figure.suptitle("Seed 0", fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("learning rate")
    for axes in grid[:, 0]:
        axes.set_ylabel("pullback strength λ")
    if image is not None:
        figure.colorbar(image, ax=list(grid.flat), label="validation loss of the average", shrink=0.6, extend="max")
    plots.save(figure, path, colors=24)


def band(axes: Axes, xs: Sequence[float], curves: Sequence[Sequence[float]], color: str) -> list[float]:
    """The mean and the range over seeds."""
    columns = list(zip(*curves, strict=True))
    means = [statistics.mean(c) for c in columns]
    axes.plot(xs, means, color=color, linewidth=1.8)
    axes.fill_between(xs, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.18, linewidth=0)
    return means


def draw_curves(kept: Mapping[str, Any], size: Size, path: Path) -> None:
    best = best_cells(kept, size)
    figure, (curves, budgets, clamped) = plots.new_figure([6.0, 6.0, 4.6], 4.0)
    lines, shown = [], []
    for cell in best:
        specs = [cell.seeded(seed) for seed in size.seeds]
        losses = [result(kept, s)["losses"][cell.weights] for s in specs if done(kept, s)]
        if cell.schedule != "constant" or not losses or any(None in row for row in losses):
            continue
        steps = result(kept, specs[0])["steps"]
        means = band(curves, steps, losses, COLORS[cell.method])
        lines.append((cell.method, steps, means, COLORS[cell.method]))
        shown += means[len(means) // 3 :]
    if shown:
        curves.set_ylim(min(shown) - 0.02, max(shown) + 0.03)
        curves.set(
            xlabel="step", ylabel="validation loss (nats per byte)", title="Constant rate, best cells, mean and range"
        )
        plots.label_line_ends(curves, lines)

    specs, weights, lines = budget_specs(size, best), weights_of_budgets(best), []
    titles = {"AdamW": "AdamW, decayed", "AdamW + EMA": "AdamW + EMA", "PACE": "PACE"}
    for method, its in specs.items():
        losses_at = budget_losses(kept, its, weights[method])
        if all(math.isfinite(loss) for losses in losses_at.values() for loss in losses):
            xs = sorted(losses_at)
            means = band(budgets, xs, list(zip(*(losses_at[x] for x in xs), strict=True)), COLORS[method])
            lines.append((titles[method], xs, means, COLORS[method]))
    if lines:
        budgets.set_xscale("log")
        budgets.set_xticks(size.budgets, [str(b) for b in size.budgets])
        budgets.minorticks_off()
        budgets.set(xlabel="budget in steps", title="Budgets: a decay for each, or stop anywhere")
        plots.label_line_ends(budgets, lines)

    lines = []
    for cell, color in zip([c for c in best if c.method == "PACE"], (plots.INK, *plots.PALETTE[4:]), strict=False):
        shares = clip_shares(kept, size, cell)
        if shares:
            steps = shares[0][0]
            means = band(clamped, steps, [[100 * v for v in s] for _, s in shares], color)
            lines.append((cell.schedule, steps, means, color))
    if lines:
        clamped.set(xlabel="step", ylabel="clamped coordinates, %", title="PACE's best cells")
        clamped.set_ylim(-4, 104)  # room for a label at 0
        plots.label_line_ends(clamped, lines)
    plots.save(figure, path)


def draw(kept: Mapping[str, Any], folder: Path, size: Size = FULL) -> None:
    draw_sweep(kept, size, folder / "pace-sweep.webp")
    draw_curves(kept, size, folder / "pace-curves.webp")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of pace.json and the figures (out/experiments)")
    parser.add_argument("--quick", action="store_true", help="a few short runs, into out/quick")
    parser.add_argument("--render", action="store_true", help="runs nothing")
    parser.add_argument("--processes", type=int, help="at once (as many as there are cores); 0: in this one")
    arguments = parser.parse_args(argv)
    size = QUICK if arguments.quick else FULL
    folder = arguments.out or Path("out/quick" if arguments.quick else "out/experiments")
    path = folder / "pace.json"
    kept = load(path) if arguments.render else run_all(path, size, arguments.processes)
    draw(kept, folder, size)
    print(render(kept, size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
