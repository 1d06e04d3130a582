"""What PACE's strength c means: how the best c moves with the batch and with the model, and whether a rule transfers.

    python research/strength.py             70 runs of 800 steps, half an hour of one core, into bench/results
    python research/strength.py --quick     a few steps into out/quick, to see that it works

The gain of the pull is Λ = min(α c w_t / D, 1), and D is as large as gradients are: a batch of 16 has smaller ones
than a batch of 1, so the same c pulls harder there. This was written before the runs: five settings, batches of 1, 4
and 16 windows at width 64, and widths 32 and 128 at a batch of 4. In each, seven strengths from none to every
coordinate clamped, on seeds 0 and 1. All else is PACE's best cell of the protocol's search: rate 0.007425 at a constant
rate, betas 0.9241 and 0.8642, κ 0.2333. Losses are those of the average.

Two rules are judged by what they cost: in each setting the loss at the c that the rule takes, minus the loss at the
best c there, as means of two seeds.

1. one c: the one whose largest cost over the five settings is least;
2. one share of clamped coordinates at step 200: in each setting the c whose share is nearest to the target. The target
   is that of all shares seen whose largest cost is least.

A rule transfers where its largest cost is at most 0.01 nats per byte. Each is chosen with all settings in view, so that
its cost is a lower limit.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import harness
import lm
import torch
from runs import Spec, complete, done, parser, path_of, provenance, result

SETTINGS = ((1, 64), (4, 64), (16, 64), (4, 32), (4, 128))  # batch, width
CLAMPED = 1e9
STRENGTHS = (0.0, 1.0, 4.0, 16.0, 64.0, 256.0, CLAMPED)
SEEDS = (0, 1)
STEPS, EVALUATIONS = 800, 4  # the first evaluation is at step 200
FIXED = {"betas": [0.9241, 0.8642], "ema_kappa": 0.2333}
TRANSFERS = 0.01

Setting = tuple[int, int]


def spec(setting: Setting, strength: float, seed: int, steps: int) -> Spec:
    """Without a pull PACE keeps no average unless it is asked to."""
    options = {**FIXED, "lambda_pullback": strength, "use_ema_eval": True}
    return {"optimizer": "PACE", "lr": 0.007425, "options": options, "batch": setting[0], "width": setting[1],
            "schedule": "constant", "steps": steps, "evaluations": EVALUATIONS, "seed": seed}  # fmt: skip


def found(kept: Mapping[str, Any], setting: Setting, steps: int) -> list[tuple[float, float]]:
    """By strength: the mean loss, and the mean share of clamped coordinates at the first evaluation."""
    rows = []
    for strength in STRENGTHS:
        runs = [result(kept, spec(setting, strength, seed, steps)) for seed in SEEDS]
        share = statistics.fmean(run["series"]["lambda_clipped_frac"][0] or 0.0 for run in runs)
        rows.append((statistics.fmean(lm.final(run, "average") for run in runs), share if strength else 0.0))
    return rows


def costs(
    table: Sequence[Sequence[tuple[float, float]]], take: Callable[[Sequence[tuple[float, float]]], int]
) -> float:
    """The largest cost of a rule, which takes a strength by its place."""
    return max(rows[take(rows)][0] - min(loss for loss, _ in rows) for rows in table)


def nearest(target: float, rows: Sequence[tuple[float, float]]) -> int:
    return min(range(len(rows)), key=lambda k: abs(rows[k][1] - target))


def render(kept: Mapping[str, Any]) -> str:
    steps = kept["about"]["steps"]
    every = [spec(setting, c, seed, steps) for setting in SETTINGS for c in STRENGTHS for seed in SEEDS]
    there = sum(done(kept, each) for each in every)
    if there < len(every):
        return f"Incomplete: {there} of {len(every)} runs. Nothing is judged before all are there.\n"
    table = [found(kept, setting, steps) for setting in SETTINGS]
    names = ["none", *(f"{c:g}" for c in STRENGTHS[1:-1]), "all clamped"]
    lines = [
        f"| batch | width | {' | '.join(f'c {name}' for name in names)} |",
        f"| --- | --- |{' ---: |' * len(names)}",
    ]
    for (batch, width), rows in zip(SETTINGS, table, strict=True):
        best = min(loss for loss, _ in rows)
        cells = (f"{'**' * (loss == best)}{loss:.4f}{'**' * (loss == best)} ({share:.2f})" for loss, share in rows)
        lines.append(f"| {batch} | {width} | {' | '.join(cells)} |")
    one = min(range(len(STRENGTHS)), key=lambda k: costs(table, lambda _: k))
    shares = sorted({share for rows in table for _, share in rows})
    target = min(shares, key=lambda share: costs(table, functools.partial(nearest, share)))
    rules = [
        (f"one c for all, {names[one]}", costs(table, lambda _: one)),
        (f"the c whose share of clamped coordinates at step {steps // EVALUATIONS} is nearest to {target:.2f}",
         costs(table, functools.partial(nearest, target))),
    ]  # fmt: skip
    said = []
    for rule, cost in rules:
        verdict = "transfers" if cost <= TRANSFERS else "does not transfer"
        said.append(f"- {rule}: costs at most {cost:.4f} over the settings, so it {verdict} (limit {TRANSFERS}).")
    about = (
        f"{provenance(kept)} Loss of the average, nats per byte, means of two seeds; in parentheses the share of "
        f"clamped coordinates at step {steps // EVALUATIONS}; {steps} steps."
    )
    return "\n\n".join([about, "\n".join(lines), "\n".join(said)]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    command = parser(__doc__, "strength.json", "four steps a run")
    arguments = command.parse_args(argv)
    steps = EVALUATIONS if arguments.quick else STEPS
    path = path_of(arguments, "strength.json")
    about = {"corpus": lm.about()["corpus"], "steps": steps}
    specs = [spec(setting, c, seed, steps) for setting in SETTINGS for seed in SEEDS for c in STRENGTHS]
    kept = complete(path, about, specs, lm.train, arguments.processes)
    harness.pack(path)
    print(render(kept))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    sys.exit(main())
