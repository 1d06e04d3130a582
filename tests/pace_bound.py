"""PACE in float64 together with a bound on what the same steps may give in float32.

The bound is carried along with the values, coordinate by coordinate: each line of the rule turns the errors of its
operands into the error of its result, by the derivative of the line and one rounding (relative error u = 2^-24) an
operation, in the order of csrc/rules/pace.h. Scalars are rounded once more. Products of errors are covered by the
factor `SLACK`, and results below the normal range by `TINY`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

U = 2.0**-24
SLACK = 1.001
TINY = 2.0**-148
# Half the distance between neighbours, relative, and the same absolute in the subnormal range.
STORE = {torch.float32: (0.0, 0.0), torch.bfloat16: (2.0**-8, 2.0**-133), torch.float16: (2.0**-11, 2.0**-25)}


@dataclass
class Bounded:
    """A float64 value and how far a float32 computation of it may be off."""

    value: Tensor
    error: Tensor

    @classmethod
    def exact(cls, value: Tensor) -> Bounded:
        return cls(value.double(), torch.zeros_like(value, dtype=torch.float64))

    def rounded(self, roundings: float = 1.0) -> Bounded:
        return Bounded(self.value, SLACK * (self.error + roundings * U * self.value.abs()) + TINY)

    def __add__(self, other: Bounded) -> Bounded:
        return Bounded(self.value + other.value, self.error + other.error).rounded()

    def __sub__(self, other: Bounded) -> Bounded:
        return Bounded(self.value - other.value, self.error + other.error).rounded()

    def __mul__(self, other: Bounded) -> Bounded:
        error = self.error * other.value.abs() + self.value.abs() * other.error + self.error * other.error
        return Bounded(self.value * other.value, error).rounded()

    def times(self, scalar: float) -> Bounded:
        """A product with a scalar: one rounding of the scalar, one of the product."""
        return Bounded(self.value * scalar, self.error * abs(scalar)).rounded(2.0)


def averaged(e: Bounded, x: Bounded, w: float) -> Bounded:
    """e + w (x − e): what its three operations and w's rounding add with e and x as they are; and the errors of these,
    in which e's own cancels but for 1 − w. Where w is 1, x itself."""
    if w == 1.0:
        return x
    distance = Bounded(x.value - e.value, torch.zeros_like(e.value)).rounded()
    distance.error += U * (x.error + e.error)
    moved = Bounded(e.value, torch.zeros_like(e.value)) + distance.times(w)
    moved.error += SLACK * ((1 - w + 2 * U * w) * e.error + (1 + 2 * U) * w * x.error)
    return moved


@dataclass
class Reference:
    """One tensor's trajectory."""

    options: dict
    x: Bounded
    m: Bounded
    v: Bounded
    e: Bounded
    t: int = 0
    clamped: int = 0
    coordinates: int = 0

    @classmethod
    def start(cls, x: Tensor, **options: object) -> Reference:
        zero = torch.zeros_like(x)
        return cls(options, *(Bounded.exact(a) for a in (x, zero, zero, x)))

    def step(self, grad: Tensor, dtype: torch.dtype) -> None:
        o = self.options
        self.t += 1
        t, lr, (beta1, beta2) = self.t, o["lr"], o["betas"]
        kappa, pull, averages = o["ema_kappa"], o["lambda_pullback"] > 0, o["lambda_pullback"] > 0 or o["use_ema_eval"]
        decaying = 1.0 if kappa is None else max((1 + o["ema_gamma"] * max(0.0, t - o["ema_rho"])) ** -kappa, 1e-4)
        w = o["beta_ema"] if kappa is None else decaying
        g = Bounded.exact(-grad if o["maximize"] else grad)

        m = self.m.times(beta1) + g.times(1 - beta1) if beta1 > 0 else g
        v = self.v.times(beta2) + (g * g).times(1 - beta2)
        s = v.times(1 / (1 - beta2**t))
        root = s.value.sqrt()
        # |sqrt(s + δ) − sqrt(s)| is at most δ / sqrt(s), and at most sqrt(δ).
        root_error = torch.minimum(s.error / root.clamp(min=1e-300), s.error.sqrt())
        D = Bounded(root, root_error).rounded()
        D = Bounded(D.value + o["eps"], D.error + U * o["eps"]).rounded()
        inv_D = Bounded(
            1 / D.value, D.error / (D.value * (D.value - D.error).clamp(min=o["eps"] * (1 - 4 * U)))
        ).rounded()
        adamw_move = m.times(lr / (1 - beta1**t)) * inv_D
        decay = 1 - lr * o["weight_decay"]
        x, e = self.x, self.e
        x_adamw = x.times(decay) - adamw_move
        if not pull:
            x_new = x_adamw
        else:
            gain = inv_D.times(lr * o["lambda_pullback"] * decaying)
            cap = 1.0 if o["clamp_pullback"] else math.inf
            clipped = Bounded(gain.value.clamp(max=cap), gain.error)
            self.clamped += int((gain.value >= cap).sum())
            self.coordinates += gain.value.numel()
            base = x_adamw if o["pullback_from"] == "step" else x
            # The rounding and the gain's error, with e and the base as they are; what the errors of e and of x
            # contribute is added with their whole derivative, in which Λ and the decay cancel.
            distance = Bounded(e.value - base.value, torch.zeros_like(e.value)).rounded()
            distance.error += U * (e.error + base.error)
            pullback = clipped * distance
            x_new = Bounded(x_adamw.value, x_adamw.error - decay * x.error) + pullback
            lam, d_lam = clipped.value, clipped.error
            along_x = lam * decay if o["pullback_from"] == "step" else lam
            from_move = lam * (x_adamw.error - decay * x.error) if o["pullback_from"] == "step" else 0.0
            x_new.error += (
                SLACK * ((decay - along_x).abs() + d_lam) * x.error + SLACK * (lam + d_lam) * e.error + from_move
            )
        if averages and t % o["ema_update_freq"] == 0:
            self.e = averaged(e, x_new, w)
        relative, absolute = STORE[dtype]
        self.x = Bounded(x_new.value, x_new.error + relative * (x_new.value.abs() + x_new.error) + absolute)
        self.m, self.v = m, v
