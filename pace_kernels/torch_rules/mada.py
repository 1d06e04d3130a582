"""MADA in plain torch: a parameterized optimizer, its coefficients learned by hypergradient descent.
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

A pullback toward the average then acts as in :mod:`.pace`, by D = sqrt(V) + ε.

Its sensitivities, with the states before the step and ṽ held constant, and b1 = 1 − β1^t, b2 = 1 − β2^t,
R = α γ N / D² / (2 sqrt(V)), which is 0 where V = 0; m₋, n₋, v̄₋ are the values before the step:

[formula: MADA hypergradients]
  ∂x/∂β1 = −(α γ / D) [ (m₋ − g)/b1 + m t β1^(t−1) / b1² ]
  ∂x/∂β2 =  R [ ρ (v̄₋ − g̃²) / b2 + V t β2^(t−1) / b2 ]
  ∂x/∂β3 = −(α γ / D) [ n + β3 (n₋ − d) ] + R ρ (1 − β2) 2 ĝ (c + (1 − c) s) d / b2
  ∂x/∂ρ  =  R (v̄ − ṽ) / b2
  ∂x/∂c  =  R ρ (1 − β2)(ĝ² − v̄₋ − ĝ² s) / b2
  ∂x/∂γ  = −α [ N / D − sign(u) ]
[end]

The hypergradient of q is the sum over all coordinates of the new gradient times the last step's ∂x/∂q. The six
sensitivities are not kept: moments are kept one step behind, beside the last gradient, and :func:`mada_rule` redoes the
last step. The operations and their order are those of ``csrc/rules/mada.h``, one rounding each: from the same
coefficients, both give the same bits in float32 (on MPS, which has no float64, but for torch's own square root). The
sums of the hypergradients run in another order, so that learned coefficients differ by roundings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..definitions import MADA
from ..definitions.kit import Options, Scalar
from ..definitions.mada import COEFFICIENTS, DONE, NO_GRADIENT, REDO, MadaScalars, mada_scalars
from ..definitions.pace import PaceScalars, pace_scalars
from .coded import Averaging, Coded
from .common import (
    Begun,
    Keep,
    at_hand,
    averaged,
    by_graph,
    data,
    fixed_order_sum,
    rounded,
    square_root,
)
from .mada_scalars import MadaOptions, coefficients_of, last_step


class MadaMoments(NamedTuple):
    """m, n, v̄, ṽ (``w``) and l; those that are not in play are None."""

    m: Tensor | None
    n: Tensor | None
    v: Tensor | None
    w: Tensor | None
    l: Tensor | None  # noqa: E741


class MadaTerms(NamedTuple):
    """The terms of Adam's part that the sensitivities share."""

    d: Tensor | None
    g_hat: Tensor
    square: Tensor
    s: Tensor
    g_tilde: Tensor
    V: Tensor
    N: Tensor
    root: Tensor
    D: Tensor


class MadaStep(NamedTuple):
    """The moments after the step, α U, and 1 / D, sign(u) and the terms if they are in play."""

    moments: MadaMoments
    update: Tensor
    inv_D: Tensor | None
    sign_u: Tensor | None
    terms: MadaTerms | None


def mada_rule(s: MadaScalars, g: Tensor, last_g: Tensor | None, before: MadaMoments) -> MadaStep:
    """One step without weight decay and pullback. ``last_g`` is None if β3 is not in play."""
    m, n, v, w, l = before  # noqa: E741
    update = inv_D = sign_u = terms = None
    if m is not None and v is not None:
        d = None if last_g is None else g - last_g
        g_hat = g if d is None else g + s.beta3 * d
        largest = torch.finfo(g.dtype).max  # of squares that overflow: 0 times infinity would be NaN
        square = (g_hat * g_hat).clamp(max=largest)
        s_v = (square - v).sign()
        g_tilde = s.c * square + s.one_minus_c * (v + square * s_v).clamp(max=largest)
        m = s.beta1 * m + s.one_minus_beta1 * g
        v = s.beta2 * v + s.one_minus_beta2 * g_tilde
        if w is not None:
            # Not torch.maximum: of codes a v that was NaN comes back as infinity, and a w that was stays.
            w = torch.where(w > v, w, v) if s.second_max else s.mean_new * v + s.mean_old * w
        V = v * s.inv_bias2 if w is None else (s.rho * v + s.one_minus_rho * w) * s.inv_bias2
        N = m * s.inv_bias1
        if n is not None and d is not None:
            n = s.beta3 * n + s.one_minus_beta3 * d
            N = N + s.beta3 * n
        root = square_root(V)
        D = root + s.eps
        inv_D = 1.0 / D
        update = (s.adam_size * N) * inv_D
        terms = MadaTerms(d, g_hat, square, s_v, g_tilde, V, N, root, D)
    if l is not None:
        sign_u = (s.lion_beta1 * l + s.one_minus_lion_beta1 * g).sign()
        l = s.lion_beta2 * l + s.one_minus_lion_beta2 * g  # noqa: E741
        update = s.lion_size * sign_u if update is None else update + s.lion_size * sign_u
    return MadaStep(MadaMoments(m, n, v, w, l), cast(Tensor, update), inv_D, sign_u, terms)


def hypergradient_terms(
    s: MadaScalars, g: Tensor, next_g: Tensor, before: MadaMoments, step: MadaStep
) -> list[Tensor | None]:
    """``next_g`` times ∂x/∂q of a step without the factors of :func:`mada_factors`, in the order of COEFFICIENTS; None
    for a coefficient that is not in play."""
    m, n, v, w, _ = step.moments
    assert step.terms is not None and m is not None and v is not None and before.m is not None and before.v is not None
    d, g_hat, square, s_v, g_tilde, V, N, root, D = step.terms
    product = root * D
    divides = product >= torch.finfo(product.dtype).tiny
    inv = 1.0 / product  # one division for 1 / D and 1 / (2 sqrt(V))
    inv_D = torch.where(divides, inv * root, s.inv_eps)
    half_inv_root = torch.where(divides, (0.5 * inv) * D, 0.0)
    h = next_g * (1.0 - (s.pull_gain * inv_D).clamp(max=s.gain_cap))  # (1 − Λ) x' + Λ e, where it is from the step
    A = h * inv_D
    U = N * inv_D
    R = (A * U) * half_inv_root
    beta1 = A * ((before.m - g) + m * s.bias1_slope)
    beta2 = R * (s.rho * (before.v - g_tilde) + V * s.bias2_slope)
    beta3 = rho = gamma = None
    if n is not None and before.n is not None and d is not None:
        square_term = (g_hat * (s.c + s.one_minus_c * s_v)) * d
        beta3 = R * (s.square_slope * square_term) - A * (n + s.beta3 * (before.n - d))
    if w is not None:
        rho = R * (v - w)
    c = R * ((square - before.v) - square * s_v)
    if step.sign_u is not None:
        gamma = h * (step.sign_u - U)
    return [beta1, beta2, beta3, rho, c, gamma]


def pulled(s: PaceScalars, x: Tensor, step: MadaStep, e: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The weights after the step, with weight decay and PACE's pullback by MADA's D, and the average."""
    stepped = x * s.decay - step.update
    if e is None:
        return stepped, None
    if step.inv_D is not None:
        gain = (s.gain * step.inv_D).clamp(max=s.gain_cap)
        towards = stepped + gain * (e - (stepped if s.from_step else x))
        if isinstance(s.gain, Tensor):
            stepped = torch.where(s.gain != 0.0, towards, stepped)
        elif s.gain != 0.0:  # 0 times infinity would be NaN
            stepped = towards
    if isinstance(s.moves, Tensor):
        return stepped, torch.where(s.moves != 0, averaged(e, stepped, s.weight), e)
    return stepped, averaged(e, stepped, s.weight) if s.moves else e


def _numbers(row: Tensor) -> Sequence[Scalar]:
    """The entries of a small tensor: numbers if they are at hand, tensors on a device."""
    return row.tolist() if at_hand(row) else row.unbind()  # type: ignore[no-any-return]


def _row(like: Tensor, values: Sequence[Scalar]) -> Tensor:
    """The values as a small tensor, without waiting for a device."""
    if by_graph(like.device):
        sent = iter(data([a for a in values if not isinstance(a, Tensor)], like.dtype, like.device))
        return torch.stack([a.to(like.dtype) if isinstance(a, Tensor) else next(sent) for a in values])
    row = torch.empty_like(like)
    for k, value in enumerate(values):
        row[k] = value
    return row


def _or_new(taken: Scalar, last_g: Tensor, g: Tensor) -> Tensor:
    """The gradient of the last step, or this step's if none was kept yet."""
    if isinstance(taken, Tensor):
        return torch.where(taken == NO_GRADIENT, g, last_g)
    return g if taken == NO_GRADIENT else last_g


def _remembered(last_g: Tensor, g: Tensor, both: bool, roles_stay: bool) -> dict[str, Tensor]:
    """Where the new gradient is written, in order; over the older one where there is one, since the caller exchanges
    the two."""
    if not both:
        return {"last_g": g}
    return {"older_g": last_g, "last_g": g} if roles_stay else {"last_g": last_g, "older_g": g}


def mada_step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    exp_avg_diffs: list[Tensor],
    second_exp_avg_sqs: list[Tensor],
    exp_avg_lions: list[Tensor],
    last_grads: list[Tensor],
    older_grads: list[Tensor],
    last_scalars: list[Tensor],
    emas: list[Tensor],
    steps: list[Tensor],
    coefficients: Tensor | None = None,
    hypergradients: Tensor | None = None,
    lr_tensor: Tensor | None = None,
    grad_scale: Tensor | None = None,
    clip_coef: Tensor | None = None,
    found_inf: Tensor | None = None,
    remainders: list[Tensor] | None = None,
    exp_avg_scales: list[Tensor] | None = None,
    exp_avg_sq_scales: list[Tensor] | None = None,
    exp_avg_diff_scales: list[Tensor] | None = None,
    exp_avg_lion_scales: list[Tensor] | None = None,
    ema_scales: list[Tensor] | None = None,
    **options: Any,
) -> None:
    """What the operator ``mada_step_`` does, tensor by tensor; on any device, and in float64 for float64 parameters.

    Off the CPU the coefficients stay tensors, so that nothing waits for the device.
    """
    if options["learn"]:
        _check_redone(steps, last_scalars)
    scaling: dict[str, Any] = {"grad_scale": grad_scale, "clip_coef": clip_coef, "found_inf": found_inf}
    states = exp_avgs or exp_avg_lions
    learned = None if coefficients is None else _numbers(coefficients)
    begun = Begun(MadaOptions, options, steps, states, {"lr": lr_tensor}, tensors=learned is not None, **scaling)
    o, keep, counts, device = begun.o, begun.keep, begun.counts, begun.device
    q, lr = coefficients_of(o, learned), o.lr
    pulls = begun.scalars(lambda t: pace_scalars(o, t, begun.factor))
    scalars = begun.scalars(lambda t: mada_scalars(o, t, lr, q))
    roles_stay = o.capturable or by_graph(device)  # of tensors that change places, a graph of its own is made
    row = _row(last_scalars[0], (REDO if o.learn else DONE, lr, *q)) if last_scalars else None
    sums: list[Scalar] = [0.0] * len(COEFFICIENTS)
    lists = {
        "x": params, "m": exp_avgs, "v": exp_avg_sqs, "n": exp_avg_diffs, "w": second_exp_avg_sqs, "l": exp_avg_lions,
        "last_g": last_grads, "older_g": older_grads, "e": emas,
    }  # fmt: skip
    beside = {
        "x": remainders, "m": exp_avg_scales, "v": exp_avg_sq_scales, "n": exp_avg_diff_scales,
        "l": exp_avg_lion_scales, "e": ema_scales,
    }  # fmt: skip
    dtype = begun.dtype
    coded = Coded(MADA, dtype, lists, beside, stochastic=o.stochastic_rounding, nearest=o.second_max)
    for i, (_, t) in enumerate(zip(params, counts, strict=not keep.all)):
        stored = coded.stored(i)
        was = stored.read()
        kept = MadaMoments(*(was.get(symbol) for symbol in MadaMoments._fields))
        last_g, older_g = was.get("last_g"), was.get("older_g")
        pull = rounded(pulls[i], dtype)
        g = pull.grad_factor * grads[i].to(dtype)
        before = kept
        last = _numbers(last_scalars[i]) if last_scalars else ()
        if last_g is not None:
            last_g = _or_new(last[0], last_g, g)
        if o.learn and last_g is not None:
            redo, factors = last_step(o, t - 1.0, last)
            redo = rounded(redo, dtype)
            redone = mada_rule(redo, last_g, older_g, kept)
            before = redone.moments
            if hypergradients is not None:
                terms = hypergradient_terms(redo, last_g, g, kept, redone)
                for k, (shared, term) in enumerate(zip(factors, terms, strict=True)):
                    if term is not None and o.learn >> k & 1:
                        sums[k] = sums[k] + shared * fixed_order_sum(term)
        previous_g = last_g if exp_avg_diffs else None
        new = mada_rule(rounded(scalars[i], dtype), g, previous_g, before)
        x, average = pulled(pull, was["x"], new, was.get("e"))
        now: dict[str, Tensor | None] = {"x": x, "e": average, **(before if o.learn else new.moments)._asdict()}
        if last_g is not None and row is not None:
            now |= _remembered(last_g, g, older_g is not None, roles_stay)
            keep.copy_(last_scalars[i], row)
        stored.write(keep, now, t, Averaging(pull.weight, pull.moves, o.ema_update_freq))
    if hypergradients is not None:
        hypergradients.zero_()
        keep.copy_(hypergradients, _row(hypergradients, (*sums, 0.0 if keep.all else lr)))


def _check_redone(steps: list[Tensor], last_scalars: list[Tensor]) -> None:
    """Refuses to redo a last step with a count of 0: the bias corrections of step 0 divide by 0."""
    for i, (step, last) in enumerate(zip(steps, last_scalars, strict=False)):
        if at_hand(step) and at_hand(last) and step.item() == 0 and last[0].item() == REDO:
            raise RuntimeError(
                f"steps[{i}] is 0, but last_scalars has a last step to redo: was it set back by hand? Drop the whole "
                "state"
            )


def caught_up(
    o: Options, t: Scalar, last: Sequence[Scalar], g: Tensor, last_g: Tensor | None, kept: MadaMoments
) -> MadaMoments:
    """The moments after step ``t``, the last one taken, from the moments before it."""
    return mada_rule(rounded(last_step(o, t, last)[0], g.dtype), g, last_g, kept).moments


def mada_learn_(
    coefficients: Tensor,
    momenta: Tensor,
    hypergradients: Tensor,
    hyper_step: Tensor,
    sums: list[Tensor],
    found_inf: Tensor | None = None,
    *,
    learn: int,
    hyper_lr: list[float],
    hyper_momentum: list[float],
    lower: list[float],
    upper: list[float],
    clip: float,
    warmup: int,
) -> None:
    """What the operator ``mada_learn_`` does; nothing waits for the device."""
    keep = Keep(found_inf)
    if keep.all:
        return
    total = torch.zeros_like(sums[0])
    for row in sums:
        total = total + row

    def constant(values: list[float]) -> Tensor:
        if by_graph(hyper_step.device):
            return torch.tensor(values, dtype=hyper_step.dtype, device=hyper_step.device)
        return torch.stack([torch.full_like(hyper_step, value) for value in values])

    bits = constant([float(learn >> k & 1) for k in range(len(COEFFICIENTS))]) > 0
    moves = total[-1] > 0
    keep.copy_(hyper_step, hyper_step + moves.to(hyper_step.dtype))
    moves = bits & moves & (hyper_step > warmup)
    keep.copy_(hypergradients, total[:-1])
    moves = moves & total[:-1].isfinite()  # what is not is seen in the hypergradients, and moves nothing
    b = constant(hyper_momentum) * momenta + total[:-1].clamp(-clip, clip)
    q = torch.minimum(torch.maximum(coefficients - constant(hyper_lr) * b, constant(lower)), constant(upper))
    keep.copy_(momenta, torch.where(moves, b, momenta))
    keep.copy_(coefficients, torch.where(moves, q, coefficients))
