"""MADA's coefficients take a step: `learn` in csrc/cpu/mada_ops.cpp."""

from __future__ import annotations

import triton
import triton.language as tl

from .mada import hyper_rule
from .scalars import skipped

# Lanes, of which six or seven are used.
WIDTH = tl.constexpr(8)


@triton.jit(do_not_specialize=["calls", "learn", "hyper_warmup"])
def _mada_learn_kernel(
    coefficients_ptr,
    momenta_ptr,
    hypergradients_ptr,
    hyper_step_ptr,
    sums_ptr,
    options_ptr,
    found_inf_ptr,
    calls,
    learn,
    hyper_warmup,
    clip: tl.float64,
):
    """`sums`: a row of seven for each call of the step. `options`: rows of six: hyper_lr, hyper_momentum, lower,
    upper."""
    if skipped(found_inf_ptr):
        return
    k = tl.arange(0, WIDTH)
    six = k < 6
    total = tl.zeros((WIDTH,), tl.float64)
    for call in range(0, calls):
        total += tl.load(sums_ptr + call * 7 + k, mask=k < 7, other=0.0)
    tl.store(hypergradients_ptr + k, total, mask=six)
    lr = tl.sum(tl.where(k == 6, total, 0.0), axis=0)
    if lr > 0.0:
        step = tl.load(hyper_step_ptr) + 1.0
        tl.store(hyper_step_ptr, step)
        if step > hyper_warmup:
            learned = six & (((learn >> k) & 1) != 0)
            q = tl.load(coefficients_ptr + k, mask=six, other=0.0)
            b = tl.load(momenta_ptr + k, mask=six, other=0.0)
            r = hyper_rule(
                tl.load(options_ptr + k, mask=six, other=0.0),
                tl.load(options_ptr + 6 + k, mask=six, other=0.0),
                tl.load(options_ptr + 12 + k, mask=six, other=0.0),
                tl.load(options_ptr + 18 + k, mask=six, other=0.0),
                tl.full((), clip, tl.float64),
                total,
                q,
                b,
            )
            tl.store(coefficients_ptr + k, r.q, mask=learned)
            tl.store(momenta_ptr + k, r.b, mask=learned)
