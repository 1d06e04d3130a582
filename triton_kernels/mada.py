"""MADA: a parameterized optimizer, its coefficients learned by hypergradient descent.
Source: Ozkara et al., "MADA: Meta-Adaptive Optimizers through Hyper-Gradient Descent", ICML 2024 (PMLR 235),
sections 2, 3, 4.1, C.1, D.

[formula: MADA]
  d   = g − g₋                                  g₋: the previous gradient; at a parameter's first step d = 0
  m   ← β1 m + (1 − β1) g                       Adam's first moment
  n   ← β3 n + (1 − β3) d                       Adan's gradient-difference moment
  ĝ   = g + β3 d
  s   = sign(ĝ² − v̄)                            v̄: the value before this step
  g̃²  = c ĝ² + (1 − c)(v̄ + ĝ² s)                c = 1 Adam, c = 0 Yogi
  v̄   ← β2 v̄ + (1 − β2) g̃²
  ṽ   ← (v̄ + (t − 1) ṽ) / t                     AVGrad; second_moment="max": ṽ ← max(ṽ, v̄), AMSGrad
  V   = (ρ v̄ + (1 − ρ) ṽ) / (1 − β2^t)          ρ = 1 Adam, ρ = 0 AVGrad
  N   = m / (1 − β1^t) + β3 n
  u   = λ1 l + (1 − λ1) g                       Lion; l: the value before this step
  l   ← λ2 l + (1 − λ2) g
  U   = γ N / (sqrt(V) + ε) + (1 − γ) sign(u)   γ = 0 Lion
  x₊  = x (1 − α λ_wd) − α U
[end]

Its hypergradients, with the states before the step and ṽ held constant, and b1 = 1 − β1^t, b2 = 1 − β2^t,
R = α γ N / D² / (2 sqrt(V)), which is 0 where V = 0; m₋, n₋, v̄₋ are the values before the step:

[formula: MADA hypergradients]
  ∂x/∂β1 = −(α γ / D) [ (m₋ − g)/b1 + m t β1^(t−1) / b1² ]
  ∂x/∂β2 =  R [ ρ (v̄₋ − g̃²) / b2 + V t β2^(t−1) / b2 ]
  ∂x/∂β3 = −(α γ / D) [ n + β3 (n₋ − d) ] + R ρ (1 − β2) 2 ĝ (c + (1 − c) s) d / b2
  ∂x/∂ρ  =  R (v̄ − ṽ) / b2
  ∂x/∂c  =  R ρ (1 − β2)(ĝ² − v̄₋ − ĝ² s) / b2
  ∂x/∂γ  = −α [ N / D − sign(u) ]
[end]

The operations and their order are those of ``csrc/rules/mada.h``, where the reasons are.
"""

from __future__ import annotations

from collections import namedtuple

import triton
import triton.language as tl

from .arith import LARGEST, SMALLEST_NORMAL, averaged, divided, larger, sign, smaller, square_root

# What one step of one tensor needs; the fields of ``MadaScalars`` in csrc/rules/mada.h, float32.
MadaScalars = namedtuple(
    "MadaScalars",
    "beta1 one_minus_beta1 beta2 one_minus_beta2 beta3 one_minus_beta3 lion_beta1 one_minus_lion_beta1 lion_beta2 "
    "one_minus_lion_beta2 rho one_minus_rho c one_minus_c mean_new mean_old eps inv_eps inv_bias1 inv_bias2 adam_size "
    "lion_size bias1_slope bias2_slope square_slope pull_gain gain_cap second_max",
)


# The terms of the hypergradients, next_g ∂x/∂q but for a factor that all coordinates share (`mada_factors` in
# scalars.py); and their sums.
HyperTerms = namedtuple("HyperTerms", "beta1 beta2 beta3 rho c gamma")


# The moments after the step, w being ṽ; α U and 1 / D; and the terms of the hypergradients.
MadaStep = namedtuple("MadaStep", "m n v w l update inv_D terms")


@triton.jit
def mada_rule(s, g, last_g, next_g, m, n, v, w, l, F: tl.constexpr, LEARN: tl.constexpr):  # noqa: E741
    """One step without weight decay and pullback. If a flag is off, its operands are not touched. LEARN: with the terms
    of the hypergradients, for which ``next_g`` is the gradient after the step."""
    zero = tl.zeros_like(g)
    m_old, n_old, v_old = m, n, v
    d = zero
    g_hat = g
    if F.diff:
        d = g - last_g
        g_hat = g + s.beta3 * d
    # Squares that overflow are the largest number: 0 times infinity would be NaN. These comparisons let NaN through.
    exact = g_hat * g_hat
    square = tl.where(exact > LARGEST, LARGEST, exact)
    s_v = sign(square - v_old)
    added = v_old + square * s_v
    yogi = tl.where(added > LARGEST, LARGEST, added)
    g_tilde = s.c * square + s.one_minus_c * yogi
    m = s.beta1 * m_old + s.one_minus_beta1 * g
    v = s.beta2 * v_old + s.one_minus_beta2 * g_tilde
    N = m * s.inv_bias1
    if F.diff:
        n = s.beta3 * n_old + s.one_minus_beta3 * d
        N = N + s.beta3 * n
    V = v * s.inv_bias2
    if F.second:
        w = tl.where(s.second_max != 0.0, larger(w, v), s.mean_new * v + s.mean_old * w)
        V = (s.rho * v + s.one_minus_rho * w) * s.inv_bias2
    root = square_root(V)
    D = root + s.eps
    inv_D = divided(1.0, D)
    sign_u = zero
    if F.lion:
        sign_u = sign(s.lion_beta1 * l + s.one_minus_lion_beta1 * g)
        l = s.lion_beta2 * l + s.one_minus_lion_beta2 * g  # noqa: E741
    update = s.lion_size * sign_u
    if F.adam:
        adam = (s.adam_size * N) * inv_D
        update = adam + update if F.lion else adam
    terms = HyperTerms(zero, zero, zero, zero, zero, zero)
    if LEARN:
        # One division for 1 / D and 1 / (2 sqrt(V)).
        product = root * D
        inv = divided(1.0, product)
        divides = product >= SMALLEST_NORMAL
        inv_D_again = tl.where(divides, inv * root, s.inv_eps)
        half_inv_root = tl.where(divides, (0.5 * inv) * D, 0.0)
        h = next_g
        if F.average:  # (1 − Λ) x' + Λ e, where the pullback is from the step
            h = next_g * (1.0 - smaller(s.pull_gain * inv_D_again, s.gain_cap))
        A = h * inv_D_again
        U = N * inv_D_again
        R = (A * U) * half_inv_root
        beta3, rho, gamma = None, None, None
        if F.diff:
            square_term = (g_hat * (s.c + s.one_minus_c * s_v)) * d
            beta3 = R * (s.square_slope * square_term) - A * (n + s.beta3 * (n_old - d))
        if F.second:
            rho = R * (v - w)
        if F.lion:
            gamma = h * (sign_u - U)
        terms = HyperTerms(
            A * ((m_old - g) + m * s.bias1_slope),
            R * (s.rho * (v_old - g_tilde) + V * s.bias2_slope),
            beta3,
            rho,
            R * ((square - v_old) - square * s_v),
            gamma,
        )
    return MadaStep(m, n, v, w, l, update, inv_D, terms)


MadaWeights = namedtuple("MadaWeights", "x e")


@triton.jit
def mada_weights(p, x, e, update, inv_D, PULL: tl.constexpr, AVERAGE: tl.constexpr):
    """The weights after the step, with weight decay and PACE's pullback, and the average. ``p`` are PACE's scalars."""
    stepped = x * p.decay - update
    if PULL:
        gain = smaller(p.gain * inv_D, p.gain_cap)
        pulled = stepped + gain * (e - tl.where(p.from_step != 0.0, stepped, x))
        stepped = tl.where(p.gain != 0.0, pulled, stepped)  # 0 times infinity would be NaN
    if AVERAGE:
        e = averaged(e, stepped, p.weight)
    return MadaWeights(stepped, e)


HyperStep = namedtuple("HyperStep", "q b")


@triton.jit
def hyper_rule(lr, momentum, lower, upper, clip, h, q, b):
    """One step of the coefficients q and their momenta b down the hypergradients h: b ← μ b + clip(h), q ← Π[q −
    hyper_lr b]. Float64. A value that is not finite moves nothing: it would spoil the coefficients of all."""
    finite = h - h == 0.0
    clipped = tl.where(h < -clip, -clip, tl.where(h > clip, clip, h))
    moved_b = momentum * b + clipped
    moved = q - lr * moved_b
    moved = tl.where(moved < lower, lower, tl.where(moved > upper, upper, moved))
    return HyperStep(tl.where(finite, moved, q), tl.where(finite, moved_b, b))
