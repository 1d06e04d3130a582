"""Adam at the wrong end of a convex problem, and MADA that learns its way out: MADA's section C.3.

    python research/convex.py            a table, out/convex.webp and out/convex.json in about a minute on 2 cores
    python research/convex.py --quick    three thousand steps, to see that it works

The problem is Reddi, Kale and Kumar's ("On the Convergence of Adam and Beyond", ICLR 2018): f_t(x) = 1010 x when
t mod 101 = 1, else −10 x, on [−1, 1]. Over a cycle the sum is +10 x, so the best point is −1; but the rare large
gradient inflates Adam's second moment just when it matters, and Adam ends near +1. All start at x = 0 with betas
(0.9, 0.99), learning rate 0.7 / sqrt(t) and no weight decay, and x is projected after each step.

MADA starts as Adam (ρ = 1) and learns ρ alone. The projection is no part of its hypergradient.

What shows: ρ falls from 1 to 0 and x goes to −1 where ρ interpolates between Adam and AMSGrad (`second_moment="max"`).
What does not: between Adam and AVGrad (`second_moment="mean"`) ρ falls as well, but settles near 0.07, where its
hypergradient is about zero on average, and at that ρ x still drifts to +1; AVGrad itself (ρ fixed at 0) reaches −1. Of
hyper learning rates from 0.001 to 10, clips from 0.01 to none and learning rates from 0.2 to 1, decaying, or 0.001 and
0.01, constant, none brought this MADA to −1 in 200,000 steps; nor did a few other betas.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import plots
import torch
from harness import machine, save, significant
from torch import Tensor, nn

from pace_kernels import MADA

ALPHA = 0.7  # the learning rate at step t is ALPHA / sqrt(t)
HYPER_LR = 0.1  # MADA's default
CYCLE, LARGE, SMALL = 101, 1010.0, -10.0
SETTINGS = {"lr": ALPHA, "betas": (0.9, 0.99), "weight_decay": 0.0}
TIMED_STEPS = 2000
DEFAULT_STEPS, QUICK_STEPS = 2000 * CYCLE, 30 * CYCLE

Build = Callable[[list[nn.Parameter]], MADA]


def preset(name: str) -> Build:
    return lambda params: MADA.preset(name, params, **SETTINGS)


def learns_rho(second_moment: str, order: Literal["algorithm", "published"] = "algorithm") -> Build:
    """Adam, but for a ρ that may move; nothing else is learned, and β3 = 0 leaves Adan's term out."""
    learned = {"learn": ("rho",), "rho": 1.0, "beta3": 0.0, "hyper_lr": HYPER_LR, "hyper_order": order}
    return lambda params: MADA(params, second_moment=second_moment, **learned, **SETTINGS)


CONTENDERS: dict[str, Build] = {
    "Adam": preset("adamw"),
    "AMSGrad": preset("amsgrad"),
    "AVGrad": preset("avgrad"),
    "MADA, max": learns_rho("max"),
    "MADA, mean": learns_rho("mean"),
    "MADA, mean, published": learns_rho("mean", "published"),
}
TITLE = "Adam ends at 1, where the loss is worst. Blue: MADA starts as Adam and learns ρ; max finds −1, mean does not."


@dataclass
class Run:
    """One optimizer's way: values after the steps in `steps`. Regret at T: Σ_{t≤T} (f_t(x_t) − f_t(−1)) / T."""

    name: str
    steps: list[int]
    x: list[float]
    regret: list[float]
    rho: list[float]
    us_per_step: float = 0.0

    @property
    def learns(self) -> bool:
        return self.name.startswith("MADA")

    @property
    def color(self) -> str:
        return plots.OURS if self.learns else plots.OTHERS


def marks(steps: int, points: int = 400) -> set[int]:
    """Steps to record: ends of cycles, evenly spread on a log axis. Within a cycle x goes to and fro like a saw."""
    cycles = steps // CYCLE
    return {CYCLE * round(cycles ** (i / points)) for i in range(points + 1) if cycles} | {steps}


def start(build: Build) -> tuple[nn.Parameter, MADA]:
    # float32, as the kernels compute; float64 would take the fallback in plain torch, at several times the cost.
    x = nn.Parameter(torch.zeros(1))
    return x, build([x])


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.full_like(x, LARGE), torch.full_like(x, SMALL)


def optimize(name: str, steps: int) -> Run:
    """All steps of one optimizer, one thread."""
    torch.set_num_threads(1)
    param, optimizer = start(CONTENDERS[name])
    value = param.detach()
    large, small = gradients(value)
    group = optimizer.param_groups[0]
    recorded = marks(steps)
    run = Run(name, [], [], [], [])
    x, total = 0.0, 0.0
    for t in range(1, steps + 1):
        slope, param.grad = (LARGE, large) if t % CYCLE == 1 else (SMALL, small)
        total += slope * (x + 1.0)
        group["lr"] = ALPHA / t**0.5
        optimizer.step()
        value.clamp_(-1.0, 1.0)
        x = value.item()
        if t in recorded:
            run.steps.append(t)
            run.x.append(x)
            run.regret.append(total / t)
            run.rho.append(optimizer.coefficients["rho"])
    return run


def us_per_step(build: Build, rounds: int = 5) -> float:
    """Microseconds of `step()` alone on this one number: its fixed cost. Median over rounds, no other run beside it."""
    torch.set_num_threads(1)
    param, optimizer = start(build)
    _, param.grad = gradients(param.detach())
    optimizer.step()
    samples = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(TIMED_STEPS // rounds):
            optimizer.step()
        samples.append((time.perf_counter() - began) / (TIMED_STEPS // rounds))
    return 1e6 * statistics.median(samples)


# ---- results ----


def table(runs: Sequence[Run]) -> str:
    lines = [f"{'':12} {'final x':>8} {'average regret':>15} {'final ρ':>8} {'µs per step':>12}"]
    lines += [
        f"{run.name:12} {run.x[-1]:8.3f} {run.regret[-1]:15.3f} {run.rho[-1]:8.3f} {run.us_per_step:12.1f}"
        for run in runs
    ]
    return "\n".join(lines)


def draw(runs: Sequence[Run], path: Path) -> None:
    figure, panels = plots.new_figure([4.6, 4.6], height=3.6)
    figure.suptitle(TITLE, x=0.01, ha="left", fontsize=11)
    learning = [run for run in runs if run.learns]
    for axes, shown, name, symbol, title in (
        (panels[0], runs, "x", "x", "x, of which −1 is the best"),
        (panels[1], learning, "rho", "ρ", "ρ of MADA; 1 is Adam"),
    ):
        lines = []
        for run in shown:
            steps, values = [step / 1000 for step in run.steps], getattr(run, name)
            axes.plot(steps, values, color=run.color, linewidth=2.2 if run.learns else 1.4)
            lines.append((run.name, steps, values, run.color))
        axes.set(xlabel="steps, thousands", ylabel=symbol, title=title)
        axes.set(xlim=(0, 1.01 * runs[0].steps[-1] / 1000), ylim=(-1.05, 1.05) if name == "x" else (-0.03, 1.03))
        plots.label_line_ends(axes, lines)
    plots.save(figure, path)


def rounded(run: dict[str, Any]) -> dict[str, Any]:
    lists = {name: [significant(value, 4) for value in run[name]] for name in ("x", "regret", "rho")}
    return run | lists


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, help=f"of each optimizer (default: {DEFAULT_STEPS:,})")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of convex.webp and convex.json (out)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS:,} steps: a test, no result")
    arguments = parser.parse_args(argv)
    steps = arguments.steps or (QUICK_STEPS if arguments.quick else DEFAULT_STEPS)
    if steps < 1:
        parser.error(f"--steps must be at least 1, got {steps}")

    fixed_costs = [us_per_step(build) for build in CONTENDERS.values()]
    if steps < 10_000:  # less than it takes to start processes
        runs = [optimize(name, steps) for name in CONTENDERS]
    else:
        # One process each, two at a time, the slow ones first; spawned, since torch's threads do not survive a fork.
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = {name: pool.submit(optimize, name, steps) for name in reversed(CONTENDERS)}
            runs = [futures[name].result() for name in CONTENDERS]
    for run, cost in zip(runs, fixed_costs, strict=True):
        run.us_per_step = cost

    print(f"f_t(x) = {LARGE:g} x when t mod {CYCLE} = 1, else {SMALL:g} x, on [−1, 1]; {steps:,} steps\n")
    print(table(runs))
    print("\nMADA starts as Adam and learns ρ: between Adam and AMSGrad (max), or Adam and AVGrad (mean).")
    numbers = {
        "machine": machine(torch.device("cpu")),
        "quick": arguments.quick,
        "steps": steps,
        "alpha": ALPHA,
        "hyper_lr": HYPER_LR,
        "runs": [rounded(asdict(run)) for run in runs],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    save(numbers, arguments.out / "convex.json")
    draw(runs, arguments.out / "convex.webp")
    print(f"written: {arguments.out / 'convex.webp'}, {arguments.out / 'convex.json'}")


if __name__ == "__main__":
    main()
