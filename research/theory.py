"""What theory says of a constant pullback: how much closer to the minimum the average ends, over gain and curvature.

    python research/theory.py            tables, out/bench/theory.webp and out/bench/theory.json, in half a minute
    python research/theory.py --quick    few coordinates and steps, to see that it works

SGD with a constant gain on noisy quadratics: the closed form of quadratics.py (derived in tests/test_theory.py)
and simulations with the kernels. Left: V(Π) / V(0), the limiting error of the average with the gain Π over that
without it, at the averaging weight β = 0.01, bars of two standard errors. Right: Proposition 3, and what it costs: the
dashed line has no pullback, and averages so long that it forgets the start as Π = 1 does.

Tables, not drawn: what is lost of the optimal control when the minimum is not known, and the rate of a pulled SGD on a
convex loss (control.py).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import control
import numpy as np
import plots
import quadratics
import torch
from harness import machine, markdown_table, save
from matplotlib.axes import Axes
from quadratics import limiting_error

BETA = 0.01  # PACE's default beta_ema
CURVATURES = (0.05, 0.5, 1.4)  # curvatures of the left panel
GAINS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
EPSILONS = (1 / 4, 1 / 10, 1 / 20, 1 / 40)  # of the right panel's simulations
COORDINATES, QUICK_COORDINATES = 1 << 12, 1 << 7
RATE_GAINS, RATE_STEPS = (0.0, 0.1, 1.0), (64, 256, 1024, 4096)


@dataclass
class Point:
    """A simulated limiting error in units of (α σ)², its standard error, and the closed form."""

    curvature: float
    beta: float
    gain: float
    simulated: float
    standard_error: float
    closed_form: float


def simulate(beta: float, gains: Sequence[float], a: float, coordinates: int, within: float) -> list[Point]:
    """Those of the gains at which the curvature is stable. The χ² law of the mean of e² gives its standard error."""
    gains = [gain for gain in gains if quadratics.is_stable(a, beta, gain)]
    steps = max(quadratics.settling_steps(a, beta, gain, within=within) for gain in gains)
    build = [quadratics.pulled_sgd(beta, gain) for gain in gains]
    errors = quadratics.simulate(build, [a], coordinates, steps, seed=2606)[:, 0].tolist()
    exact = [limiting_error(a, beta, gain) for gain in gains]
    return [
        Point(a, beta, gain, error, value * math.sqrt(2 / coordinates), value)
        for gain, error, value in zip(gains, errors, exact, strict=True)
    ]


def draw_points(axes: Axes, points: Sequence[Point]) -> None:
    axes.set(xlabel="gain Π of the pull; 0 is none, 1 the clamp", ylabel="error, × that without a pull")
    axes.set_title("A pull helps, but near the largest stable αh")
    lines = []
    for a in CURVATURES:
        without = limiting_error(a, BETA, 0.0)
        gains = np.linspace(0.0, 1.0, 301)
        gains = gains[quadratics.is_stable(a, BETA, gains)]
        if len(gains) < 301:  # up to just before the pole at the stability limit
            gains = gains[gains < 0.97 * (2 - BETA) * (2 - a) / (2 * (1 - BETA))]
        values = limiting_error(a, BETA, gains) / without
        axes.plot(gains, values, color=plots.OURS)
        there = [p for p in points if p.curvature == a]
        axes.errorbar(
            [p.gain for p in there],
            [p.simulated / without for p in there],
            yerr=[2 * p.standard_error / without for p in there],
            fmt="o",
            markersize=3.5,
            capsize=3,
            color=plots.OURS,
        )
        lines.append((f"αh = {a}", list(gains), list(values), plots.OURS))
    axes.set(xlim=(-0.02, 1.02), ylim=(0, 1.3))
    plots.label_line_ends(axes, lines)


def draw_proposition_3(axes: Axes, pairs: Sequence[tuple[Point, Point]]) -> None:
    inverse = np.linspace(1.2, 1.05 / min(EPSILONS), 200)
    epsilon = 1 / inverse
    without = limiting_error(epsilon, epsilon, 0.0)
    slowest = np.array([quadratics.slowest_rate(x, x, 1.0) for x in epsilon])
    curves = (
        ("Π = 1", without / limiting_error(epsilon, epsilon, 1.0), plots.OURS),
        ("Π = 0.1", without / limiting_error(epsilon, epsilon, 0.1), plots.OURS),
        ("no pull, longer average", without / limiting_error(epsilon, slowest, 0.0), plots.OTHERS),
    )
    axes.set(xlabel="1 / (αh), at β = αh", ylabel="error without a pull / with it")
    axes.set_title("But a longer average needs none")
    for _, values, color in curves:
        axes.plot(inverse, values, color=color, linestyle="-" if color == plots.OURS else "--")
    for none, full in pairs:
        ratio = none.simulated / full.simulated
        # As if the two were independent; their noise is shared, so it is rather less.
        spread = 2 * ratio * math.hypot(none.standard_error / none.closed_form, full.standard_error / full.closed_form)
        axes.errorbar(1 / none.curvature, ratio, yerr=spread, fmt="o", markersize=3.5, capsize=3, color=plots.OURS)
    axes.set(xlim=(0, inverse[-1]), ylim=(0, None))
    plots.label_line_ends(axes, [(text, list(inverse), list(values), color) for text, values, color in curves])


def draw(numbers: Mapping[str, Any], path: Path) -> None:
    """From what was saved."""
    points = [Point(**p) for p in numbers["points"]]
    pairs = [(Point(**none), Point(**full)) for none, full in numbers["proposition_3"]]
    figure, (left, right) = plots.new_figure([5.0, 5.8], height=4.1)
    draw_points(left, points)
    draw_proposition_3(right, pairs)
    figure.suptitle(
        "Blue: the average's limiting error with a pull, the closed form and, as dots, the kernels.\n"
        f"αh is the learning rate times the curvature, β the averaging weight, {BETA} on the left.",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    plots.save(figure, path)


def tables(numbers: Mapping[str, Any]) -> str:
    """Of the controls and of the rate."""
    rows = [["E[(average − x*)²]", *control.CONTROLS]]
    rows += [[name, *(f"{error:.4f}" for error in found)] for name, found in numbers["controls"].items()]
    rate = [["loss of e × √T, β = 0.1", *(f"Π = {gain:g}" for gain in RATE_GAINS)]]
    rate += [[f"T = {t}", *(f"{e * int(t) ** 0.5:.2f}" for _, e in found)] for t, found in numbers["rate"].items()]
    return f"{markdown_table(rows)}\n\n{markdown_table(rate)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder of the files (default: out/bench)")
    parser.add_argument("--quick", action="store_true", help="few coordinates and steps: a test, no result")
    arguments = parser.parse_args()
    coordinates, within = (QUICK_COORDINATES, 0.5) if arguments.quick else (COORDINATES, 1e-3)
    began = time.perf_counter()
    points = [point for a in CURVATURES for point in simulate(BETA, GAINS, a, coordinates, within)]
    pairs = []
    for epsilon in EPSILONS:
        none, full = simulate(epsilon, (0.0, 1.0), epsilon, coordinates, within)
        pairs.append((none, full))

    print("    αh       β       Π   V / (ασ)²   simulated  off, standard errors")
    for p in [*points, *(point for pair in pairs for point in pair)]:
        off = (p.simulated - p.closed_form) / p.standard_error
        print(
            f"{p.curvature:6.3f}  {p.beta:6.3f}  {p.gain:6.3f}  {p.closed_form:10.6f}  {p.simulated:10.6f}  {off:+6.1f}"
        )
    euler = 50 if arguments.quick else 4000
    more = {
        "controls": {
            name: [problem.simulated(kind, euler) for kind in control.CONTROLS]
            for name, problem in control.PROBLEMS.items()
        },
        "rate": {
            str(t): control.absolute_loss(t, 0.1, RATE_GAINS, coordinates // 8)
            for t in RATE_STEPS[: 1 if arguments.quick else None]
        },
    }
    print(tables(more))
    print(f"{coordinates} coordinates each, {time.perf_counter() - began:.0f} s")

    numbers = {
        "machine": machine(torch.device("cpu")),
        "coordinates": coordinates,
        "points": [asdict(p) for p in points],
        "proposition_3": [[asdict(p) for p in pair] for pair in pairs],
        **more,
    }
    draw(numbers, arguments.out / "theory.webp")
    save(numbers, arguments.out / "theory.json")
    print(f"written: {arguments.out / 'theory.webp'}, {arguments.out / 'theory.json'}")


if __name__ == "__main__":
    main()
