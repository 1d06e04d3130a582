"""The optimal control behind the pullback, in closed form; and the rate of a pulled SGD on convex losses.

**Control.** Near its minimum x* a coordinate moves by dX = −a (X − x*) dt + u dt + σ dW. The control u minimizes
E[(A − x*)²] + λ ∫ E[u²] dt over [0, T], where A = ∫ ω X dt is the average at T: ω = 1 / T (uniform), or ω =
b exp(−b (T − t)), an exponential average that starts at X. With Y = X − x*, Z = ∫₀ᵗ ω Y dt, r = T − t,

    φ(r) = ∫ₜᵀ ω(s) exp(−a (s − t)) ds,    I(r) = ∫₀ʳ φ² dr

p = Z + φ Y is the error that A will have without control, and dp = φ u dt + φ σ dW. So the Riccati equation is a
scalar's, its solution is P = λ / (λ + I), and u = −φ / (λ + I) (Z + φ Y). Of the uniform average, with φ(r) =
(1 − exp(−a r)) / a and Z and I without their 1 / T, that is −φ / (λ T² + I) (Z + φ (X − x*)). The error is
(P p₀)² + σ² P I, at r = T, and p₀² + σ² I without control.

x* is unknown. With the average so far in its place Z is 0, and u = −φ² / (λ + I) (X − A_t) pulls toward the average. We
take this for eq. 7 of Au and Block, arXiv 2606.25086, whose text was not at hand. Where X starts far from x*, the
average lags behind, and the pull holds X back.

**Rate.** x₊ = x − α g + Π (e − x), e₊ = e + β (x₊ − e), g a subgradient at x, E|g|² ≤ G², s = Π + β − β Π. Then
z = (β (1 − Π) x + Π e) / s moves by z₊ = z − (α β / s) g: SGD of a smaller rate, whose gradients are taken beside z.
d = x − e moves by d₊ = (1 − β) ((1 − Π) d − α g), so that E|d|² ≤ ((1 − β) α G / s)², and x − z = Π d / s. With the
usual bound of Σ ⟨g, z − x*⟩, |x₀ − x*| = D and α = D / (G √T), the mean of f(x) − f* over T steps is at most D G
times `rate_bound` / √T: the standard rate, up to a factor of β and Π. That of e is at most D G / (β T) more, since e is
an average of the x before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, expm1

import torch
from torch import nn

from pace_kernels import Pullback

CONTROLS = ("none", "x* known", "eq. 7", "constant gain 1")


@dataclass(frozen=True)
class Problem:
    start: float  # X − x* at 0
    rate: float | None = None  # b; None: the uniform average
    a: float = 1.0
    noise: float = 1.0
    penalty: float = 0.03
    horizon: float = 20.0

    def weight(self, r: float) -> float:
        return 1 / self.horizon if self.rate is None else self.rate * exp(-self.rate * r)

    def so_far(self, r: float) -> float:
        """The weight in A of what was before."""
        return (self.horizon - r) / self.horizon if self.rate is None else exp(-self.rate * r)

    def phi(self, r: float) -> float:
        a, b = self.a, self.rate
        return -expm1(-a * r) / (a * self.horizon) if b is None else b * (exp(-a * r) - exp(-b * r)) / (b - a)

    def energy(self, r: float) -> float:
        """I(r)."""
        a, b = self.a, self.rate
        terms = ((0.0, 1), (a, -1)) if b is None else ((a, 1), (b, -1))
        scale = 1 / (a * self.horizon) if b is None else b / (b - a)
        whole = sum(p * q * (-expm1(-(x + y) * r) / (x + y) if x + y else r) for x, p in terms for y, q in terms)
        return scale**2 * whole

    def error(self, controlled: bool) -> float:
        """E[(A − x*)²] with x* known, or without control."""
        energy = self.energy(self.horizon)
        share = self.penalty / (self.penalty + energy) if controlled else 1.0
        before = (self.so_far(self.horizon) + self.phi(self.horizon)) * self.start
        return (share * before) ** 2 + self.noise**2 * share * energy

    def gains(self, control: str, r: float) -> tuple[float, float]:
        """(p, q) of u = −p Z − q Y."""
        phi, weight = self.phi(r), self.so_far(r)
        share = phi / (self.penalty + self.energy(r))
        if control == "x* known":
            return share, share * phi
        if control == "none" or weight == 0:
            return 0.0, 0.0
        gain = share * phi if control == "eq. 7" else 1.0
        return -gain / weight, gain

    def simulated(self, control: str, steps: int) -> float:
        """The error in Euler's scheme of so many steps. It is linear, so that second moments say all of all paths."""
        h, z0 = self.horizon / steps, self.so_far(self.horizon) * self.start
        zz, zy, yy = z0**2, z0 * self.start, self.start**2
        for k in range(steps):
            r = self.horizon - k * h
            (p, q), w = self.gains(control, r), self.weight(r) * h
            p, q = -p * h, 1 - (self.a + q) * h
            zz, zy, yy = (
                zz + 2 * w * zy + w * w * yy,
                p * zz + (q + p * w) * zy + w * q * yy,
                p * p * zz + 2 * p * q * zy + q * q * yy + self.noise**2 * h,
            )
        return zz


PROBLEMS = {
    "uniform, starts at x*": Problem(0.0),
    "uniform, starts 3 away": Problem(3.0),
    "exponential, starts at x*": Problem(0.0, rate=0.2),
    "exponential, starts 10 away": Problem(10.0, rate=0.2),
}


def rate_bound(beta: float, gain: float) -> float:
    s = gain + beta - beta * gain
    return s / (2 * beta) + beta / (2 * s) + gain * (1 - beta) / s**2


def absolute_loss(steps: int, beta: float, gains: Sequence[float], coordinates: int) -> list[list[float]]:
    """Mean loss of x and of e over the steps: f(x) = |x| from 1, gradients with normal noise, so that D = 1, G² = 2."""
    generator = torch.Generator().manual_seed(2606)
    runs = []
    for gain in gains:
        x = nn.Parameter(torch.ones(coordinates, dtype=torch.float64))
        sgd = torch.optim.SGD([x], lr=(2 * steps) ** -0.5)
        runs.append((x, Pullback(sgd, gain=gain, ema_kappa=None, beta_ema=beta), [0.0, 0.0]))
    for _ in range(steps):
        noise = torch.randn(coordinates, generator=generator, dtype=torch.float64)
        for x, optimizer, means in runs:
            for k, weights in enumerate((x, optimizer.state[x].get("ema", x))):
                means[k] += weights.detach().abs().mean().item() / steps
            x.grad = x.detach().sign() + noise
            optimizer.step()
    return [means for _, _, means in runs]
