"""The comparison of `research/PROTOCOL.md`: run by run, over as many sittings as it takes.

    python research/protocol.py --minutes 50    goes on with what is missing; without --minutes until all is done
    python research/protocol.py --processes 2   two runs at once, for two quiet cores
    python research/protocol.py --fine-tuning   the same for fine-tuning, into protocol-finetuning.json.xz
    python research/protocol.py --smollm        of SmolLM2-135M, for a GPU, into protocol-smollm.json.xz
    python research/protocol.py --variants      the short one of variants, into protocol-variants.json.xz
    python research/protocol.py --cells         the settings that were drawn, and runs nothing
    python research/protocol.py --minutes 0     what is there and what is missing, and runs nothing
    python research/protocol.py --add FILE      takes over the runs of a file that was made elsewhere
    python research/protocol.py --quick         a few short runs into out/quick, to see that it works

Results go into `bench/results/protocol.json.xz` after each run, and `make results` brings them onto the page. Only one
command may write a file at a time: two would lose runs of each other.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import finetuning
import harness
import lm
import torch
import variants
from runs import CRITICAL, Spec, complete, done, load, path_of, provenance, result, save, spread
from train_lm import Corpus

import pace_kernels

TRUNK = ("constant", "wsd")  # alike up to the fork: one run
DECAYS = ("cosine to 0", "linear to 0")
SCHEDULES = (*TRUNK, *DECAYS)
CRITICAL_99 = {2: 63.66, 3: 9.92, 4: 5.84, 5: 4.60, 6: 4.03}  # |t|, by the number of seeds
MATTERS = 0.005  # nats per byte
CLAMPING = 1e9  # c of "PACE, clamped": Λ = min(α c w_t / D, 1) is 1 where α > 1e-5 × D, since w_t ≥ 1e-4


@dataclass(frozen=True)
class Plan:
    """How much is run: kept in the file, and compared with it."""

    steps: int = 4880
    windows: int = 1024
    cells: int = 24
    finalists: int = 4  # at constant rate and WSD
    rate_finalists: int = 2
    factors: list[float] = field(default_factory=lambda: [0.5, 0.8, 1.25, 2.0, 3.2])  # of the rate, for cosine, linear
    choose: list[int] = field(default_factory=lambda: [0, 1, 2])  # seeds
    report: list[int] = field(default_factory=lambda: [3, 4, 5, 6, 7, 8])
    task: str = "training"  # from new weights; or the fine-tuning of a model
    start: int = 0  # steps that the model which is fine-tuned was trained for here
    rates: list[float] = field(default_factory=lambda: [5e-4, 0.032])  # the range

    def listed(self) -> dict[str, Any]:
        """As files have it; those of training were there before fine-tuning was."""
        later = {"task", "start", "rates"} if self.task == "training" else set()
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in later}


FINE_TUNING = Plan(
    *(1200, 1024, 12, 3), task="fine-tuning", start=finetuning.START_STEPS, rates=[1e-4, 0.016]
)  # of the model that lm.py trains
SMOLLM = Plan(300, 256, 8, 2, task="SmolLM2-135M", rates=[3e-6, 1e-3])
VARIANTS = Plan(300, 256, 6, 2, report=[3, 4, 5, 6], task="variants")
QUICK = Plan(3, 2, 2, 1, 1, [0.5], [0, 1], [2, 3])

# ---- cells ----

Cell = dict[str, float]


def draw(count: int, rates: Sequence[float] = tuple(Plan().rates)) -> list[Cell]:
    """A Latin hypercube. random.Random(15).random() is the same in every version of Python."""
    generator = random.Random(15)

    def logarithmic(low: float, high: float, share: float) -> float:
        return low * (high / low) ** share

    def column() -> list[float]:
        order = sorted(range(count), key=[generator.random() for _ in range(count)].__getitem__)
        return [(place + generator.random()) / count for place in order]

    rows = zip(*(column() for _ in range(8)), strict=True)
    cells = [
        {
            "lr": logarithmic(*rates, rate),
            "beta1": 1 - logarithmic(0.02, 0.5, first),
            "beta2": 1 - logarithmic(0.002, 0.4, second),
            "horizon": logarithmic(10, 1000, horizon),
            "kappa": 0.1 + 0.7 * kappa,
            "strength": logarithmic(0.05, 50, strength),
            "hyper": logarithmic(0.1, 10, hyper),
            "hyper_momentum": 0.5 * (momentum < 0.5),
        }
        for rate, first, second, horizon, kappa, strength, hyper, momentum in rows
    ]
    return [{name: float(f"{value:.4g}") for name, value in cell.items()} for cell in cells]


def cells_of(plan: Plan) -> list[Cell]:
    """Of variants: horizons are as much shorter as the runs are, and weak pulls have a c of their own."""
    cells = draw(plan.cells, plan.rates)
    if plan.task != "variants":
        return cells
    for cell in cells:
        cell["horizon"] = max(1.0, float(f"{cell['horizon'] * plan.steps / Plan().steps:.4g}"))
        cell["weak"] = float(f"{cell['strength'] * variants.WEAK:.4g}")
    return cells


# ---- methods ----


def trajectory(name: str, cell: Cell) -> tuple[str, dict[str, Any], list[str], list[str]]:
    """Optimizer, its options, the averages beside it, and the weights that are judged."""
    betas = {"betas": [cell["beta1"], cell["beta2"]]}
    longer, same = f"EMA {1 - 1 / cell['horizon']}", f"power {cell['kappa']}"
    if name == "AdamW":
        return "AdamW", betas, [longer, same], ["live", longer, same]
    if name == "PACE":
        options = {"lambda_pullback": cell["strength"], "ema_kappa": cell["kappa"]}
        return "PACE", betas | options, [longer], ["average", longer]
    if name == "PACE, clamped":
        return "PACE", betas | {"lambda_pullback": CLAMPING, "ema_kappa": cell["kappa"]}, [], ["average"]
    if name == "schedule-free":
        return "ScheduleFreeAdamW", betas, [], ["average"]
    rates = dict.fromkeys(("beta3", "rho", "c", "gamma"), 0.1 * cell["hyper"])
    rates |= dict.fromkeys(("beta1", "beta2"), 5e-4 * cell["hyper"])
    mada = betas | {"hyper_lr": rates, "hyper_momentum": cell["hyper_momentum"]}
    if name == "MADA":
        return "MADA", mada, [], ["live"]
    return *variants.trajectory(name, cell, mada), [], ["average"]


# By name: the trajectory, which of its weights, and the options that are searched beside rate and betas.
METHODS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "AdamW": ("AdamW", 0, ()),
    "AdamW + EMA": ("AdamW", 1, ("horizon",)),
    "AdamW + PACE's average": ("AdamW", 2, ("kappa",)),
    "PACE": ("PACE", 0, ("kappa", "strength")),
    "PACE, longer average": ("PACE", 1, ("kappa", "strength", "horizon")),
    "PACE, clamped": ("PACE, clamped", 0, ("kappa",)),
    "schedule-free": ("schedule-free", 0, ()),
    "MADA": ("MADA", 0, ("hyper", "hyper_momentum")),
}
EVERY = METHODS | variants.METHODS
SYMBOLS = {
    "horizon": "H",
    "kappa": "κ",
    "strength": "c",
    "weak": "weak c or Π",
    "hyper": "hyper rates ×",
    "hyper_momentum": "their momentum",
}
FIRST, THEN = list(METHODS)[:5], list(METHODS)[5:]
ROUNDS = ((FIRST, TRUNK), (THEN, TRUNK), (FIRST, DECAYS), (THEN, DECAYS))
FINE_TUNED = (([*FIRST, "schedule-free"], TRUNK),)
VARIED = (([*FIRST[1:4], *variants.METHODS], TRUNK),)


def rounds(plan: Plan) -> tuple[tuple[list[str], tuple[str, ...]], ...]:
    return {"training": ROUNDS, "variants": VARIED}.get(plan.task, FINE_TUNED)


# Ours, theirs, the schedules, and those that are primary: PROTOCOL.md says what each decides.
COMPARISONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("PACE", "AdamW + EMA", TRUNK),
    ("PACE", "AdamW + PACE's average", TRUNK),
    ("PACE", "AdamW", ()),
    ("PACE, clamped", "PACE", ()),
    ("PACE, longer average", "PACE", ()),
    ("PACE, longer average", "AdamW + EMA", ()),
    ("schedule-free", "AdamW + EMA", ()),
    ("MADA", "AdamW", ()),
)

# ---- one run ----

lm.OPTIMIZERS |= {
    "ScheduleFreeAdamW": lambda groups, lr, **o: pace_kernels.ScheduleFreeAdamW(groups, lr=lr, **o),
    "MADA": lambda groups, lr, **o: pace_kernels.MADA(groups, lr=lr, **o),
}


@dataclass(frozen=True)
class Task:
    file: str  # of its runs
    corpus: Callable[[], Corpus]
    training: type[lm.Training] = lm.Training
    unit: str = "byte"


# By the name in a plan. Texts are looked up when they are needed.
TASKS = {
    "training": Task("protocol.json", lambda: lm.corpus()),
    "fine-tuning": Task("protocol-finetuning.json", lambda: finetuning.shakespeare()),
    "variants": Task("protocol-variants.json", lambda: lm.corpus()),
    "SmolLM2-135M": Task("protocol-smollm.json", lambda: finetuning.tokens(), finetuning.SmolLM, "token"),
}


def part(name: str, held_out: torch.Tensor) -> torch.Tensor:
    """The first half of the held-out text, or the second."""
    middle = len(held_out) // 2
    return held_out[:middle] if name == "validation" else held_out[middle:]


def fork(schedules: Sequence[str], steps: int) -> int:
    """How many first steps are the same under all these schedules."""
    same = (len({lm.factor(schedule, step, steps) for schedule in schedules}) == 1 for step in range(1, steps + 1))
    return next((step for step, alike in enumerate(same) if not alike), steps)


def train(plan: Plan, cells: Sequence[Cell], spec: Spec) -> dict[str, Any]:
    """By schedule, the last losses of the weights that are judged; null after a divergence."""
    cell, schedules = cells[spec["cell"]], spec["schedules"]
    optimizer, options, beside, judged = trajectory(spec["trajectory"], cell)
    common = {"optimizer": optimizer, "lr": cell["lr"] * spec["factor"], "seed": spec["seed"]}
    start = finetuning.start(plan.start) if plan.start else None
    task = TASKS[plan.task]
    training = task.training(common | {"options": options, "averages": beside}, start, task.corpus())
    training.validation = training.evenly(part(spec["text"], training.text.validation), plan.windows)

    def go(schedule: str, first: int, last: int) -> bool:
        steps = range(first, last + 1)
        return all(math.isfinite(training.step(lm.factor(schedule, step, plan.steps))) for step in steps)

    split = fork(schedules, plan.steps)
    alive, restore, found = go(schedules[0], 1, split), training.snapshot(), {}
    for index, schedule in enumerate(schedules):
        if index:
            restore()
        losses = training.losses("live" in judged) if alive and go(schedule, split + 1, plan.steps) else {}
        found[schedule] = [lm.plain(round(losses.get(name, math.inf), 5)) for name in judged]
        if "series" not in found and (series := training.series()) and losses:
            found["series"] = [float(f"{value:.3g}") for value in series.values()]
    return found | ({} if start is None else {"start": finetuning.name_of(start)})


# ---- what is needed, in order ----


@dataclass(frozen=True)
class Course:
    """A method under a schedule: what is done, and which runs come next."""

    method: str
    schedule: str
    parts: list[list[Spec]]  # search, finalists, report, as far as they are known
    counts: list[int]  # how many each will have
    chosen: tuple[int, float] | None = None  # cell, and factor of its rate
    validation: float = math.nan  # of the chosen setting, the mean of its seeds


def reading(kept: Mapping[str, Any], spec: Spec, method: str, schedule: str) -> float:
    value = result(kept, spec)[schedule][EVERY[method][1]]
    return math.inf if value is None else value


def course(kept: Mapping[str, Any], plan: Plan, method: str, schedule: str) -> Course:
    trunk = schedule in TRUNK
    keep = plan.finalists if trunk else plan.rate_finalists
    candidates = [(cell, 1.0) for cell in range(plan.cells)]
    parts: list[list[Spec]] = []
    counts = [plan.cells, keep * (len(plan.choose) - 1), len(plan.report)]
    if not trunk:
        counts[0] = len(plan.factors)
        base = course(kept, plan, method, "wsd").chosen
        if base is None:
            return Course(method, schedule, parts, counts)
        candidates = [(base[0], factor) for factor in plan.factors]

    def spec(candidate: tuple[int, float], seed: int, name: str) -> Spec:
        return {"trajectory": EVERY[method][0], "cell": candidate[0], "factor": candidate[1],
                "schedules": list(TRUNK) if trunk else [schedule], "text": name, "seed": seed}  # fmt: skip

    def mean(candidate: tuple[int, float], seeds: Sequence[int]) -> float:
        return statistics.fmean(reading(kept, spec(candidate, seed, "validation"), method, schedule) for seed in seeds)

    parts.append([spec(candidate, plan.choose[0], "validation") for candidate in candidates])
    if not all(done(kept, its) for its in parts[-1]):
        return Course(method, schedule, parts, counts)
    finalists = sorted(candidates, key=lambda candidate: mean(candidate, plan.choose[:1]))[:keep]
    parts.append([spec(candidate, seed, "validation") for candidate in finalists for seed in plan.choose[1:]])
    if not all(done(kept, its) for its in parts[-1]):
        return Course(method, schedule, parts, counts)
    chosen = min(finalists, key=lambda candidate: mean(candidate, plan.choose))
    parts.append([spec(chosen, seed, "test") for seed in plan.report])
    return Course(method, schedule, parts, counts, chosen, mean(chosen, plan.choose))


def missing(kept: Mapping[str, Any], plan: Plan) -> Iterator[Spec]:
    """What is known by now, in the order of the protocol: a round's search cell by cell, then what follows."""
    for methods, schedules in rounds(plan):
        courses = [course(kept, plan, method, schedule) for schedule in schedules for method in methods]
        for part in range(3):
            listed = [each.parts[part] for each in courses if len(each.parts) > part]
            for index in range(max(map(len, listed), default=0)):
                for specs in listed:
                    if index < len(specs) and not done(kept, specs[index]):
                        yield specs[index]


def about(plan: Plan, cells: Sequence[Cell]) -> dict[str, Any]:
    names = ("model", "batch", "gradient_norm", "warmup_share", "decay_share")
    common = lm.about()
    task = {name: common["task"][name] for name in names}
    text = TASKS[plan.task].corpus()
    described = {"description": text.description, "sha256": text.sha256()}
    return {"corpus": described, "task": task, "plan": plan.listed(), "cells": list(cells)}


def go_on(path: Path, plan: Plan, minutes: float, processes: int) -> dict[str, Any]:
    """Runs what is missing until all is done, or until the next run would end too late."""
    start, cells = time.monotonic(), cells_of(plan)
    if plan.start and minutes > 0:
        finetuning.start(plan.start)  # before the processes, each of which would make it
    common, run = about(plan, cells), functools.partial(train, plan, cells)
    kept, longest = complete(path, common, [], run, 0), 60.0
    while todo := list({str(spec): spec for spec in missing(kept, plan)}.values())[: max(1, 4 * processes)]:
        before = time.monotonic()
        if before + longest * len(todo) / max(1, processes) > start + 60 * minutes:
            break
        kept = complete(path, common, todo, run, processes)
        harness.pack(path)
        longest = max(each["seconds"] for each in list(kept["runs"].values())[-len(todo) :])
    return kept


def add(path: Path, other: Path, plan: Plan) -> None:
    """Runs of another file, which must be of the same protocol; those that are here already stay."""
    kept = complete(path, about(plan, cells_of(plan)), [], dict, 0)
    theirs = load(other.with_name(other.name.removesuffix(".xz")))
    if theirs["about"] != kept["about"]:
        raise SystemExit(f"{other} was made by another protocol or on another text than {path}: nothing was added")
    kept["runs"] = {**theirs["runs"], **kept["runs"]}
    save(kept, path)
    harness.pack(path)


# ---- the page ----


def settings(plan: Plan, cells: Sequence[Cell], each: Course) -> str:
    if each.chosen is None:
        return "–"
    index, factor = each.chosen
    cell = cells[index]
    rates = [other["lr"] for other in cells]
    margin = 1 if len(rates) < 8 else 2
    edge = sorted(rates).index(cell["lr"]) not in range(margin, len(rates) - margin)
    if each.schedule in DECAYS:
        edge = factor in (min(plan.factors), max(plan.factors))
    found = [f"lr {cell['lr'] * factor:.3g}{' (edge)' * edge}", f"β {cell['beta1']:.3g}, {cell['beta2']:.3g}"]
    return ", ".join(found + [f"{SYMBOLS[name]} {cell[name]:.3g}" for name in EVERY[each.method][2]])


def tests(kept: Mapping[str, Any], each: Course) -> list[float]:
    """On the seeds of the report; nan where a run is missing."""
    return [
        reading(kept, spec, each.method, each.schedule) if done(kept, spec) else math.nan
        for specs in each.parts[2:]
        for spec in specs
    ]


def difference(
    ours: Sequence[float], theirs: Sequence[float], seeds: int, critical: Mapping[int, float] = CRITICAL
) -> tuple[float, float] | str:
    """Paired: the mean and half the width of its interval, or why there is none."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=False) if not math.isnan(a + b)]
    if len(pairs) < seeds:
        return f"{len(pairs)} of {seeds} seeds: not decided"
    if any(math.isinf(loss) for pair in pairs for loss in pair):
        return "a seed diverged"
    differences = [a - b for a, b in pairs]
    return statistics.mean(differences), critical[seeds] * statistics.stdev(differences) / math.sqrt(seeds)


def judged(ours: Sequence[float], theirs: Sequence[float], primary: bool, seeds: int) -> str:
    """The paired difference and what it says."""
    found = difference(ours, theirs, seeds, CRITICAL_99 if primary else CRITICAL)
    if isinstance(found, str):
        return found
    mean, half = found
    said = "lower" if mean + half < 0 else "higher" if mean - half > 0 else "no difference found"
    if said != "no difference found" and abs(mean) < MATTERS:
        said = "no difference that matters"
    return f"{mean:+.4f} ± {half:.4f} ({99 if primary else 95} %): {said}"


def courses_of(kept: Mapping[str, Any]) -> dict[tuple[str, str], Course]:
    plan = Plan(**kept["about"]["plan"])
    pairs = [(m, s) for methods, schedules in rounds(plan) for s in schedules for m in methods]
    return {(m, s): course(kept, plan, m, s) for m, s in pairs}


def compared(kept: Mapping[str, Any], courses: Mapping[tuple[str, str], Course]) -> Iterator[tuple[str, str, str, str]]:
    """Ours, theirs, the schedule and what their difference says, where both settings are chosen."""
    for ours, theirs, decisive in COMPARISONS:
        primary = () if kept["about"]["plan"].get("task") == "variants" else decisive
        for schedule in SCHEDULES:
            pair = [courses[name, schedule] for name in (ours, theirs) if (name, schedule) in courses]
            if len(pair) == 2 and all(each.chosen for each in pair):
                losses = [tests(kept, each) for each in pair]
                verdict = judged(*losses, schedule in primary, pair[0].counts[2])
                yield ours, theirs, schedule, verdict + ", primary" * (schedule in primary)


def short(kept: Mapping[str, Any]) -> str:
    """Test losses of the methods that are whole, and the comparisons that are decided."""
    courses = courses_of(kept)
    whole = {key: each for key, each in courses.items() if each.chosen and not math.isnan(sum(tests(kept, each)))}
    schedules, methods = (list(dict.fromkeys(key[k] for key in whole)) for k in (1, 0))
    losses = [
        [method, *(spread(tests(kept, whole[method, s])) if (method, s) in whole else "–" for s in schedules)]
        for method in methods
    ]
    said: dict[str, dict[str, str]] = {}
    for ours, theirs, schedule, verdict in compared(kept, {key: courses[key] for key in whole}):
        said.setdefault(f"{ours} − {theirs}", {})[schedule] = verdict
    differences = [[name, *(found.get(s, "–") for s in schedules)] for name, found in said.items()]
    return "\n\n".join(harness.markdown_table([["", *schedules], *rows]) for rows in (losses, differences) if rows)


def varied(kept: Mapping[str, Any]) -> str:
    """A row for each variant and schedule; bold: a difference that the seeds show and that matters."""
    plan, cells, courses = Plan(**kept["about"]["plan"]), kept["about"]["cells"], courses_of(kept)
    lines = [["", "", "loss", "− PACE", "− AdamW + EMA", "− counterpart", "rate"]]
    for (method, schedule), each in sorted(courses.items(), key=lambda item: list(EVERY).index(item[0][0])):
        losses = tests(kept, each)
        line = [method * (schedule == TRUNK[0]), schedule, f"{statistics.fmean(losses):.3f}" if losses else "–"]
        for other in ("PACE", "AdamW + EMA", variants.ROWS.get(method, ("",))[0] or method):
            found = difference(losses, tests(kept, courses[other, schedule]), each.counts[2])
            if isinstance(found, tuple):
                mark = "**" * (abs(found[0]) > max(found[1], MATTERS))
                found = f"{mark}{found[0]:+.3f}{mark} ± {found[1]:.3f}"
            line.append("" if other == method else found)
        lines.append([*line, settings(plan, cells, each).partition(",")[0].removeprefix("lr ")])
    return harness.markdown_table(lines)


def render(kept: Mapping[str, Any]) -> str:
    """From the JSON alone."""
    plan, cells, courses = Plan(**kept["about"]["plan"]), kept["about"]["cells"], courses_of(kept)
    lines = [
        "| schedule | method | search | finalists | report | chosen | validation | test, mean ± standard deviation |",
        "| --- | --- | ---: | ---: | ---: | --- | ---: | --- |",
    ]
    total = sum(sum(each.counts) for each in courses.values())
    there = 0
    for (method, schedule), each in courses.items():
        counts = [sum(done(kept, spec) for spec in part) for part in each.parts] + [0] * (3 - len(each.parts))
        there += sum(counts)
        if not sum(counts):
            continue
        shares = " | ".join(f"{count} of {of}" for count, of in zip(counts, each.counts, strict=True))
        tested = spread(tests(kept, each)) if counts[2] == each.counts[2] else "–"
        validation = "–" if each.chosen is None else f"{each.validation:.4f}"
        lines.append(f"| {schedule} | {method} | {shares} | {settings(plan, cells, each)} | {validation} | {tested} |")
    seconds = sorted(run["seconds"] for run in kept["runs"].values())
    parts = [
        f"**{'Complete' if there == total else 'Incomplete'}: {there} of {total} losses "
        f"({100 * there / total:.1f} %), from {len(kept['runs'])} runs.** `research/PROTOCOL.md` says what is compared "
        "and what it decides; nothing is decided by a comparison that lacks a seed. "
        f"Validation and test: {plan.windows:,} windows each, nats per {TASKS[plan.task].unit}; {plan.steps:,} steps.",
    ]
    starts = {run["result"]["start"] for run in kept["runs"].values() if "start" in run["result"]}
    if len(starts) > 1:
        parts.append(f"These runs have {len(starts)} starts, of different machines: their differences are not paired.")
    if seconds:
        parts += [provenance(kept) + f" {statistics.median(seconds):.0f} s a run by the clock.", "\n".join(lines)]
    if untouched := len(courses) - len(lines[2:]):
        parts.append(f"Not begun: {untouched} of {len(courses)} pairs of method and schedule.")
    said = [
        f"- {schedule}: {ours} − {theirs} = {verdict}" for ours, theirs, schedule, verdict in compared(kept, courses)
    ]
    decayed = [courses["AdamW", s] for s in ("wsd", *DECAYS) if ("AdamW", s) in courses]
    if decayed and all(each.chosen for each in decayed):
        best = min(decayed, key=lambda each: each.validation)
        losses = [tests(kept, courses["PACE", "constant"]), tests(kept, best)]
        said.append(f"- PACE at a constant rate − AdamW, {best.schedule} = {judged(*losses, False, len(plan.report))}")
    parts.append("\n".join(said) or "No comparison has begun: their settings are not chosen yet.")
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of protocol.json.xz (bench/results)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begins no run that would end later")
    parser.add_argument("--processes", type=int, default=0, help="at once; 0: one, in this process")
    parser.add_argument("--fine-tuning", action="store_true", help="of a trained model, on another text")
    parser.add_argument("--smollm", action="store_true", help="the same of SmolLM2-135M, for a GPU")
    parser.add_argument("--variants", action="store_true", help="the short one of variants, 300 steps a run")
    parser.add_argument("--cells", action="store_true", help="lists the settings that were drawn, runs nothing")
    parser.add_argument("--add", type=Path, metavar="FILE", help="takes over the runs of another protocol.json.xz")
    parser.add_argument("--quick", action="store_true", help="a few short runs, into out/quick")
    arguments = parser.parse_args(argv)
    asked = {"fine_tuning": FINE_TUNING, "smollm": SMOLLM, "variants": VARIANTS}
    plan = next((plan for name, plan in asked.items() if getattr(arguments, name)), Plan())
    if arguments.quick:
        plan = dataclasses.replace(QUICK, task=plan.task, start=2 if plan.start else 0, rates=plan.rates)
    if arguments.cells:
        for index, cell in enumerate(cells_of(plan)):
            print(index, ", ".join(f"{name} {value:g}" for name, value in cell.items()))
        return 0
    path = path_of(arguments, TASKS[plan.task].file)
    if arguments.add:
        add(path, arguments.add, plan)
    print(render(go_on(path, plan, 0 if arguments.add else arguments.minutes, arguments.processes)))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    sys.exit(main())
