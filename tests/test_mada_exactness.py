"""Promise: MADA's hypergradients are autograd's, and so are the trajectories of weights and coefficients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mada_oracle import NAMES, Oracle
from torch import Tensor

from pace_kernels import MADA

STEPS = 220
U = 2.0**-53

Problem = Callable[[list[Tensor], int], Tensor]


def stochastic_quadratic(generator: torch.Generator) -> tuple[list[Tensor], Problem]:
    """Curvatures over two orders of magnitude, and a minimum that jumps about at every step."""
    start = [torch.randn(7, generator=generator), torch.randn((3, 4), generator=generator)]
    curvature = [10.0 ** torch.empty(x.shape).uniform_(-1, 1, generator=generator).double() for x in start]
    noise = [torch.randn((STEPS + 1, *x.shape), generator=generator).double() for x in start]

    def loss(xs: list[Tensor], t: int) -> Tensor:
        return (
            torch.stack([(c * (x - b[t]) ** 2).sum() for x, c, b in zip(xs, curvature, noise, strict=True)]).sum() / 2
        )

    return start, loss


def small_network(generator: torch.Generator) -> tuple[list[Tensor], Problem]:
    start = [torch.randn(shape, generator=generator) for shape in ((5, 4), (5,), (1, 5))]
    inputs = torch.randn((STEPS + 1, 16, 4), generator=generator).double()

    def loss(xs: list[Tensor], t: int) -> Tensor:
        hidden = torch.tanh(inputs[t] @ xs[0].T + xs[1])
        return ((hidden @ xs[2].T).squeeze(1) - inputs[t].sum(1).sin()).square().mean()

    return start, loss


PROBLEMS = {"quadratic": stochastic_quadratic, "network": small_network}
INSIDE = {"beta3": 0.4, "rho": 0.35, "c": 0.6, "gamma": 0.7}
FAST = {"hyper_warmup": 5, "lr": 5e-3}
BOUNDS = {"rho": (0.3, 0.4), "c": (0.55, 0.7), "beta1": (0.7, 0.95)}
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    **{f"{name} alone, inside": {**INSIDE, **FAST, "learn": (name,)} for name in NAMES},
    **{f"{name} alone, others at Adam": {"beta3": 0.0, "rho": 1.0, **FAST, "learn": (name,)} for name in NAMES},
    "all, inside": {**INSIDE, **FAST},
    "all, from Adam": {"beta3": 0.0, "rho": 1.0, **FAST},
    "all, from Lion": {"gamma": 0.0, "beta3": 0.5, **FAST},
    "all, from Yogi": {"c": 0.0, "beta3": 0.0, "rho": 1.0, **FAST},
    "all, from AMSGrad": {**FAST, "second_moment": "max", "beta3": 0.0},
    "maximum, inside": {**INSIDE, **FAST, "second_moment": "max"},
    "no differences": {**INSIDE, **FAST, "beta3": 0.0, "learn": ("beta1", "beta2", "rho", "c", "gamma")},
    "no mean": {**INSIDE, **FAST, "rho": 1.0, "learn": ("beta1", "beta3", "c", "gamma")},
    "no Lion": {**INSIDE, **FAST, "gamma": 1.0, "learn": ("beta2", "beta3", "rho")},
    "momentum": {**INSIDE, **FAST, "hyper_momentum": 0.5},
    "momentum by name": {**INSIDE, **FAST, "hyper_momentum": {"rho": 0.9, "beta3": 0.3}},
    "clip": {**INSIDE, **FAST, "hyper_clip": 2e-3, "hyper_lr": 0.02},
    "bounds": {**INSIDE, **FAST, "hyper_lr": 0.3, "bounds": BOUNDS},
    "large eps": {**INSIDE, **FAST, "eps": 1e-2},
    "pullback": {**INSIDE, **FAST, "lambda_pullback": 5.0},
    "pullback from the step": {**INSIDE, **FAST, "lambda_pullback": 5.0, "pullback_from": "step"},
    "free pullback from the step": {
        **INSIDE, **FAST, "lambda_pullback": 0.5, "pullback_from": "step", "clamp_pullback": False, "eps": 1e-2,
        "ema_kappa": None, "ema_update_freq": 3,
    },
    "maximize": {**INSIDE, **FAST, "maximize": True, "lr": 1e-4},
    "published": {**INSIDE, **FAST, "hyper_order": "published", "hyper_momentum": 0.5},
    "published, no differences": {**INSIDE, **FAST, "hyper_order": "published", "beta3": 0.0, "learn": ("beta2", "c")},
    "published, averaged": {
        **INSIDE, **FAST, "hyper_order": "published", "lambda_pullback": 5.0, "pullback_from": "step",
        "ema_kappa": None, "ema_update_freq": 3,
    },
}  # fmt: skip


def oracle_run(
    problem: str,
    groups: list[list[int]],
    options: list[dict[str, Any]],
    coefficients: str,
    off_by: float,
    rest: int = 0,
) -> list[tuple[list[Tensor], list[dict[str, float]], list[dict[str, float]]]]:
    """The trajectory of weights, coefficients and hypergradients, started ``off_by`` (relative) away."""
    generator = torch.Generator().manual_seed(7)
    start, loss = PROBLEMS[problem](generator)
    shift = [1 + off_by * torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in start]
    start = [x.double() * f for x, f in zip(start, shift, strict=True)]
    oracle = Oracle([[start[k] for k in group] for group in groups], options, coefficients)
    order = [k for group in groups for k in group]
    path = []
    for t in range(STEPS):
        resting = (rest - 1,) if rest and t % 3 == 1 else ()
        oracle.step(lambda xs: loss([xs[order.index(k)] for k in range(len(xs))], t), resting)  # noqa: B023
        path.append(
            ([w.x.detach() for w in oracle.weights], [dict(s.q) for s in oracle.sets], [s.h for s in oracle.sets])
        )
    return path


def our_run(
    problem: str, groups: list[list[int]], options: list[dict[str, Any]], coefficients: str, rest: int = 0
) -> tuple[list[tuple[list[Tensor], list[dict[str, float]], list[dict[str, float]]]], MADA]:
    start, loss = PROBLEMS[problem](torch.Generator().manual_seed(7))
    params = [torch.nn.Parameter(x.double()) for x in start]
    ours = [{"params": [params[k] for k in group], **o} for group, o in zip(groups, options, strict=True)]
    optimizer = MADA(ours, coefficients=coefficients)
    order = [k for group in groups for k in group]
    path = []
    for t in range(STEPS):
        optimizer.zero_grad()
        loss(params, t).backward()
        if rest and t % 3 == 1:
            params[order[rest - 1]].grad = None
        optimizer.step()
        q, h = optimizer.coefficients, optimizer.hypergradients
        q, h = (a if isinstance(a, list) else [a] for a in (q, h))
        path.append(([params[k].detach().clone() for k in order], q, h))
    return path, optimizer


def assert_on_the_path(
    problem: str, groups: list[list[int]], options: list[dict[str, Any]], coefficients: str = "global", rest: int = 0
) -> MADA:
    """A step rounds about 60 times in either code, each time by u = 2^-53 relative. What becomes of such errors over
    the steps is the conditioning of the trajectory, sums that cancel included; it is measured: the oracle is started
    off by 2^-30, and that far apart, at most, its two paths drift. So rounding may carry ours
    (60 + 60) u / 2^-30 as far away for each step that rounds."""
    off_by = 2.0**-30
    exact = oracle_run(problem, groups, options, coefficients, 0.0, rest)
    moved = oracle_run(problem, groups, options, coefficients, off_by, rest)
    ours, optimizer = our_run(problem, groups, options, coefficients, rest)
    drift = {"x": 0.0, **dict.fromkeys(NAMES, 0.0)} | {f"h {name}": 0.0 for name in NAMES}
    learned = options[0].get("learn", NAMES)
    for t, ((x, q, h), (x_off, q_off, h_off), (x_our, q_our, h_our)) in enumerate(zip(exact, moved, ours, strict=True)):
        rounding = 120 * (t + 1) * U / off_by

        def close(name: str, a: float, b: float, off: float, scale: float) -> None:
            drift[name] = max(drift[name], abs(a - off))
            assert abs(a - b) <= rounding * (drift[name] + off_by * scale), (t, name, a, b, drift[name])  # noqa: B023

        gap = max(float((a - b).abs().max()) for a, b in zip(x, x_off, strict=True))
        drift["x"] = max(drift["x"], gap)
        for a, b in zip(x, x_our, strict=True):
            assert float((a - b).abs().max()) <= rounding * (drift["x"] + off_by * float(a.abs().max())), (t, "x")
        for k in range(len(q)):
            assert h_our[k].keys() == set(learned)
            for name in learned:
                close(name, q[k][name], q_our[k][name], q_off[k][name], 1.0)
                close(
                    f"h {name}", h[k][name], h_our[k][name], h_off[k][name], max(abs(s[k][name]) for _, _, s in exact)
                )
    return optimizer


@pytest.mark.parametrize(
    ("case", "problem"), [(case, p) for case in CASES for p in PROBLEMS if p == "quadratic" or "alone" not in case]
)
@pytest.mark.slow
def test_trajectories_are_those_of_autograd(case: str, problem: str) -> None:
    everything = [0, 1] if problem == "quadratic" else [0, 1, 2]
    optimizer = assert_on_the_path(problem, [everything], [CASES[case]])
    learned = CASES[case].get("learn", NAMES)
    start = MADA([torch.nn.Parameter(torch.ones(1))], **CASES[case]).coefficients
    for name, value in optimizer.coefficients.items():
        if name not in learned:
            assert value == start[name], name


@pytest.mark.parametrize("coefficients", ["global", "group"])
@pytest.mark.parametrize("rest", [0, 1, 2])
@pytest.mark.slow
def test_groups_and_resting_parameters(coefficients: str, rest: int) -> None:
    options = [{**INSIDE, **FAST}, {**INSIDE, **FAST, "lr": 1e-2, "weight_decay": 0.0, "eps": 1e-6}]
    if coefficients == "group":
        options[1] |= {"rho": 0.9, "hyper_lr": {"rho": 0.02}}
    assert_on_the_path("network", [[2, 0], [1]], options, coefficients, rest)


@pytest.mark.slow
def test_the_cases_move_the_coefficients() -> None:
    """Otherwise the tests above would compare constants."""
    for case in ("all, inside", "clip", "bounds", "momentum"):
        path, _ = our_run("network", [[0, 1, 2]], [CASES[case]], "global")
        for name in NAMES:
            values = [q[0][name] for _, q, _ in path]
            assert max(values) - min(values) > 1e-5, (case, name)
    path, _ = our_run("network", [[0, 1, 2]], [CASES["bounds"]], "global")
    assert any(q[0]["rho"] in (0.3, 0.4) for _, q, _ in path)
    clipped = [abs(h[0]["gamma"]) > 2e-3 for _, _, h in our_run("network", [[0, 1, 2]], [CASES["clip"]], "global")[0]]
    assert 0 < sum(clipped) < len(clipped)
