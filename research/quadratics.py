"""SGD with a constant pullback on noisy quadratics: the limiting error of the average in closed form, and simulated.

On f(x) = ½ Σ h x², with gradients g = h x + σ ξ, ξ standard normal, each coordinate is on its own. A step of learning
rate α, averaging weight β and gain Π is

    x₊ = x − α g + Π (e − x)                  pullback_from="weights", eq. 8 of Au and Block, arXiv 2606.25086
    x₊ = (x − α g) + Π (e − (x − α g))        pullback_from="step"
    e₊ = (1 − β) e + β x₊

α and h enter as their product, the curvature a = α h, and errors scale with (α σ)²: here they are given in units of it.
The derivations, and their tests, are in tests/test_theory.py. All functions but `simulate` take numbers of any kind:
floats, fractions, tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pace_kernels import Pullback

ALPHA = 2.0**-3  # the simulated learning rate; a power of two, so that α h = a exactly

Build = Callable[[list[nn.Parameter]], Pullback]


def autoregression(a: Any, beta: Any, gain: Any, pullback_from: str = "weights") -> tuple[Any, Any, Any]:
    """(φ1, φ2, s) of the average, e₊ = φ1 e + φ2 e₋ + s ξ: how it moves once x is eliminated."""
    share = 1 if pullback_from == "weights" else 1 - gain  # of the noise that gets into x
    kept = 1 - a - gain if pullback_from == "weights" else (1 - gain) * (1 - a)  # of x itself
    return 1 - beta + kept + beta * gain, -(1 - beta) * kept, beta * share


def is_stable(a: Any, beta: Any, gain: Any, pullback_from: str = "weights") -> Any:
    """Whether the error has a limit: (φ1, φ2) lies in the stationarity triangle of AR(2) processes."""
    phi1, phi2, _ = autoregression(a, beta, gain, pullback_from)
    return (phi1 + phi2 < 1) & (phi2 - phi1 < 1) & (phi2 > -1)


def limiting_error(a: Any, beta: Any, gain: Any, pullback_from: str = "weights") -> Any:
    """lim E[e²] in units of (α σ)², by Yule and Walker, where `is_stable`."""
    phi1, phi2, scale = autoregression(a, beta, gain, pullback_from)
    return scale**2 * (1 - phi2) / ((1 + phi2) * (1 - phi1 - phi2) * (1 + phi1 - phi2))


def best_gain(a: Any, beta: Any) -> Any:
    """The constant gain, measured from the weights, with the smallest limiting error; it is `best_error`."""
    return 1 - a + (1 - (a * beta) ** 0.5) / (1 - beta)


def best_error(a: Any, beta: Any) -> Any:
    """The smallest limiting error that a constant gain can reach, in units of (α σ)²."""
    return beta / (a * (2 - (a * beta) ** 0.5) ** 2)


def even_gain(a: Any, beta: Any) -> Any:
    """The gain whose limiting error is that of gain 0: between the two, where it is positive, the pullback helps."""
    return 1 - a + (1 - a * beta / (1 + (1 - beta) * (1 - a))) / (1 - beta)


def largest_curvature(beta: Any) -> Any:
    """The a up to which a small gain lowers the limiting error: from 1 (β → 1) to 2 (β → 0)."""
    root = (beta + 4 * (1 - beta) * (2 - beta)) ** 0.5 - beta**0.5
    return (root / (2 * (1 - beta))) ** 2


def slowest_rate(a: float, beta: float, gain: float) -> float:
    """d, where the average forgets its start like (1 − d)^t; for a ≤ 1 and gains from 0 to 1."""
    total = a + beta + (1 - beta) * gain
    return 2 * a * beta / (total + (total**2 - 4 * a * beta) ** 0.5)


def settling_steps(a: float, beta: float, gain: float, pullback_from: str = "weights", within: float = 1e-4) -> int:
    """Steps from x = e = 0 until E[e²] is within this share of its limit.

    e is then a sum of t noises, weighted with the AR(2)'s impulse response ψ, and E[e²] is s² Σ ψ².
    """
    phi1, phi2, scale = autoregression(a, beta, gain, pullback_from)
    enough = (1 - within) * limiting_error(a, beta, gain, pullback_from) / scale**2
    before, psi, total, steps = 0.0, 1.0, 1.0, 1
    while total < enough:
        before, psi = psi, phi1 * psi + phi2 * before
        total += psi**2
        steps += 1
    return steps


def pulled_sgd(beta: float, gain: float, pullback_from: str = "weights") -> Build:
    """SGD with a constant gain."""
    return lambda parameters: Pullback(
        torch.optim.SGD(parameters, lr=ALPHA), gain=gain, ema_kappa=None, beta_ema=beta, pullback_from=pullback_from
    )


def simulate(
    build: Sequence[Build],
    curvatures: Sequence[float],
    coordinates: int,
    steps: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Mean of e² over the coordinates after that many steps from x = e = 0, in units of (α σ)²: [optimizer, curvature].

    σ is 1. The coordinates are independent. Optimizers and curvatures share their noise, which makes ratios between
    them less noisy than the values.
    """
    generator = torch.Generator().manual_seed(seed)
    h = torch.tensor(curvatures, dtype=dtype).div(ALPHA).unsqueeze(1)
    runs = []
    for make in build:
        x = nn.Parameter(torch.zeros(len(curvatures), coordinates, dtype=dtype))
        x.grad = torch.empty_like(x)
        runs.append((make([x]), x, x.grad))
    noise = torch.empty(coordinates)
    for _ in range(steps):
        noise.normal_(generator=generator)
        for optimizer, x, gradient in runs:
            torch.addcmul(noise.to(dtype), x.detach(), h, out=gradient)
            optimizer.step()
    errors = []
    for optimizer, x, _ in runs:
        with optimizer.averaged():
            errors.append(x.detach().double().square().mean(dim=1) / ALPHA**2)
    return torch.stack(errors)
