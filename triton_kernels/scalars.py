"""From an optimizer's options and a step count to the scalars of a rule: on the device, in float64, rounded to float32
once, so that step counts, learning rates and coefficients that live there are never waited for.

The expressions and their order are those of ``csrc/scalars.h``. Powers are exp(y log x), off by at most
(1 + 1.5 |y log x|) 2^-52: below 2^-41 of the power, where |y log x| > 745 would underflow. 1 − β^t is then off by
2^-51 / (1 − β) of itself, 4e-13 for β = 0.999, where half a unit of float32 is 3e-8 to 6e-8: about one scalar in 1e5 is
a unit of float32 away from that of the CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .mada import MadaScalars
from .pace import PaceScalars
from .pullback import PullbackScalars
from .table import LAST_SCALARS, STEP, TABLE_WIDTH

# Tensors a program: a warp's lanes.
LANES = tl.constexpr(32)

# Floats a tensor in the tables of scalars, and where MADA's parts begin: the new step, the one that is redone, the
# pullback; and whether no gradient was kept yet.
PACE_WIDTH = tl.constexpr(16)
PULLBACK_WIDTH = tl.constexpr(8)
MADA_REDO = tl.constexpr(28)
MADA_PULL = tl.constexpr(56)
MADA_FIRST = tl.constexpr(72)
MADA_WIDTH = tl.constexpr(80)
# Doubles a tensor: PACE's weight, gain and cap of the telemetry; MADA's six factors of the hypergradients.
STAT_WIDTH = tl.constexpr(4)
FACTOR_WIDTH = tl.constexpr(8)

# What `taken` in last_scalars says; pace_kernels/ops.py.
REDO = tl.constexpr(1.0)
DONE = tl.constexpr(0.0)
NO_GRADIENT = tl.constexpr(-1.0)


class PaceOptions(NamedTuple):
    """A parameter group's options, named as in pace_kernels.PACE; numbers in float64. `decays`: there is an
    ema_kappa."""

    lr: tl.tensor
    beta1: tl.tensor
    beta2: tl.tensor
    eps: tl.tensor
    weight_decay: tl.tensor
    lambda_pullback: tl.tensor
    clamp_pullback: tl.tensor
    beta_ema: tl.tensor
    decays: tl.tensor
    ema_kappa: tl.tensor
    ema_rho: tl.tensor
    ema_gamma: tl.tensor
    ema_update_freq: tl.tensor
    pullback_from_step: tl.tensor
    maximize: tl.tensor


class Coefficients(NamedTuple):
    beta1: tl.tensor
    beta2: tl.tensor
    beta3: tl.tensor
    rho: tl.tensor
    c: tl.tensor
    gamma: tl.tensor


@triton.jit
def double(a):
    """A number among a kernel's arguments, as float64 also where the interpreter hands over Python's own."""
    return tl.full((), a, tl.float64)


@triton.jit
def power(base, exponent):
    """base^exponent of a base that is not negative."""
    positive = tl.where(base > 0.0, base, double(1.0))
    of_zero = tl.where(exponent == 0.0, double(1.0), double(0.0))
    return tl.where(base > 0.0, tl.exp(exponent * tl.log(positive)), of_zero)


@triton.jit
def gain_weight(o, t):
    """w_t in the gain; 1 without a decay exponent."""
    late = t - o.ema_rho
    w = power(1.0 + o.ema_gamma * tl.where(late > 0.0, late, double(0.0)), -o.ema_kappa)
    w = tl.where(w < 1e-4, double(1e-4), w)
    return tl.where(o.decays != 0, w, double(1.0))


@triton.jit
def average_moves(o, t):
    return t.to(tl.int64) % o.ema_update_freq == 0


@triton.jit
def read_lr(lr, lr_ptr):
    return tl.load(lr_ptr).to(tl.float64) if lr_ptr is not None else double(lr)


@triton.jit
def read_factor(grad_scale_ptr, clip_coef_ptr):
    """What the gradient is multiplied with: clip coefficient / gradient scale, rounded once."""
    factor = tl.full((), 1.0, tl.float32)
    if clip_coef_ptr is not None:
        factor = tl.load(clip_coef_ptr)
    if grad_scale_ptr is not None:
        factor = tl.div_rn(factor, tl.load(grad_scale_ptr))
    return factor


@triton.jit
def skipped(found_inf_ptr):
    return tl.load(found_inf_ptr) != 0.0 if found_inf_ptr is not None else tl.full((), 0, tl.int1)


@triton.jit
def single(a):
    return a.to(tl.float32)


@triton.jit
def pace_scalars(o, t, factor):
    w_gain = gain_weight(o, t)
    w = tl.where(o.decays != 0, w_gain, o.beta_ema)
    return PaceScalars(
        grad_factor=single(tl.where(o.maximize != 0, -factor, factor)),
        beta1=single(o.beta1),
        one_minus_beta1=single(1.0 - o.beta1),
        beta2=single(o.beta2),
        one_minus_beta2=single(1.0 - o.beta2),
        inv_bias2=single(1.0 / (1.0 - power(o.beta2, t))),
        eps=single(o.eps),
        decay=single(1.0 - o.lr * o.weight_decay),
        shrink=single(o.lr * o.weight_decay),
        step_size=single(o.lr / (1.0 - power(o.beta1, t))),
        gain=single(o.lr * o.lambda_pullback * w_gain),
        gain_cap=single(tl.where(o.clamp_pullback != 0, 1.0, float("inf"))),
        weight=single(w),
        from_step=single(o.pullback_from_step),
        moves=single(average_moves(o, t)),
    )


@triton.jit
def pullback_gain(o, constant, gain, t):
    """The gain, but for 1 / D where there is a second moment: with `constant` it is `gain`."""
    return tl.where(constant != 0, gain, o.lr * o.lambda_pullback * gain_weight(o, t))


@triton.jit
def pullback_scalars(o, constant, gain, step_offset, t):
    w = tl.where(o.decays != 0, gain_weight(o, t), o.beta_ema)
    return PullbackScalars(
        inv_bias2=single(1.0 / (1.0 - power(o.beta2, t + step_offset))),
        eps=single(o.eps),
        gain=single(pullback_gain(o, constant, gain, t)),
        gain_cap=single(tl.where(o.clamp_pullback != 0, 1.0, float("inf"))),
        weight=single(w),
        moves=single(average_moves(o, t)),
    )


@triton.jit
def mada_scalars(o, lr, q, lion_beta1, lion_beta2, second_max, t):
    bias1 = 1.0 - power(q.beta1, t)
    bias2 = 1.0 - power(q.beta2, t)
    pull_gain = lr * o.lambda_pullback * gain_weight(o, t)
    return MadaScalars(
        beta1=single(q.beta1),
        one_minus_beta1=single(1.0 - q.beta1),
        beta2=single(q.beta2),
        one_minus_beta2=single(1.0 - q.beta2),
        beta3=single(q.beta3),
        one_minus_beta3=single(1.0 - q.beta3),
        lion_beta1=single(lion_beta1),
        one_minus_lion_beta1=single(1.0 - lion_beta1),
        lion_beta2=single(lion_beta2),
        one_minus_lion_beta2=single(1.0 - lion_beta2),
        rho=single(q.rho),
        one_minus_rho=single(1.0 - q.rho),
        c=single(q.c),
        one_minus_c=single(1.0 - q.c),
        mean_new=single(1.0 / t),
        mean_old=single((t - 1.0) / t),
        eps=single(o.eps),
        inv_eps=single(1.0 / o.eps),
        inv_bias1=single(1.0 / bias1),
        inv_bias2=single(1.0 / bias2),
        adam_size=single(lr * q.gamma),
        lion_size=single(lr * (1.0 - q.gamma)),
        bias1_slope=single(t * power(q.beta1, t - 1.0) / bias1),
        bias2_slope=single(t * power(q.beta2, t - 1.0)),
        square_slope=single(2.0 * q.rho * (1.0 - q.beta2) / bias2),
        pull_gain=single(tl.where(o.pullback_from_step != 0, pull_gain, double(0.0))),
        gain_cap=single(tl.where(o.clamp_pullback != 0, 1.0, float("inf"))),
        second_max=single(second_max != 0),
    )


@triton.jit
def no_step(second_max):
    """The scalars of a step that leaves the moments as they are and has no sensitivities."""
    one = tl.full((), 1.0, tl.float32)
    zero = one - one
    return MadaScalars(
        beta1=one,
        one_minus_beta1=zero,
        beta2=one,
        one_minus_beta2=zero,
        beta3=one,
        one_minus_beta3=zero,
        lion_beta1=zero,
        one_minus_lion_beta1=zero,
        lion_beta2=one,
        one_minus_lion_beta2=zero,
        rho=zero,
        one_minus_rho=zero,
        c=zero,
        one_minus_c=zero,
        mean_new=zero,
        mean_old=one,
        eps=one,
        inv_eps=zero,
        inv_bias1=zero,
        inv_bias2=zero,
        adam_size=zero,
        lion_size=zero,
        bias1_slope=zero,
        bias2_slope=zero,
        square_slope=zero,
        pull_gain=zero,
        gain_cap=zero,
        second_max=single(second_max != 0),
    )


@triton.jit
def mada_factors(lr, q, t):
    """What all coordinates' hypergradient terms share: h_q is the factor of q times the sum of the terms."""
    bias1 = 1.0 - power(q.beta1, t)
    bias2 = 1.0 - power(q.beta2, t)
    A = lr * q.gamma
    square = q.rho * (1.0 - q.beta2)
    return Coefficients(-A / bias1, A / bias2, A, A / bias2, A * square / bias2, lr)


@triton.jit
def store_fields(ptr, fields, mask):
    """The fields of a tuple side by side in memory; each a lane of its own, or one for all of them."""
    for k in tl.static_range(len(fields)):
        tl.store(ptr + k, fields[k], mask=mask)


@triton.jit
def store_chosen(ptr, condition, fields, otherwise, mask):
    for k in tl.static_range(len(fields)):
        tl.store(ptr + k, tl.where(condition, fields[k], otherwise[k]), mask=mask)


@triton.jit
def load_pace_scalars(ptr):
    return PaceScalars(
        grad_factor=tl.load(ptr),
        beta1=tl.load(ptr + 1),
        one_minus_beta1=tl.load(ptr + 2),
        beta2=tl.load(ptr + 3),
        one_minus_beta2=tl.load(ptr + 4),
        inv_bias2=tl.load(ptr + 5),
        eps=tl.load(ptr + 6),
        decay=tl.load(ptr + 7),
        shrink=tl.load(ptr + 8),
        step_size=tl.load(ptr + 9),
        gain=tl.load(ptr + 10),
        gain_cap=tl.load(ptr + 11),
        weight=tl.load(ptr + 12),
        from_step=tl.load(ptr + 13),
        moves=tl.load(ptr + 14),
    )


@triton.jit
def load_pullback_scalars(ptr):
    return PullbackScalars(
        inv_bias2=tl.load(ptr),
        eps=tl.load(ptr + 1),
        gain=tl.load(ptr + 2),
        gain_cap=tl.load(ptr + 3),
        weight=tl.load(ptr + 4),
        moves=tl.load(ptr + 5),
    )


@triton.jit
def load_mada_scalars(ptr):
    return MadaScalars(
        beta1=tl.load(ptr),
        one_minus_beta1=tl.load(ptr + 1),
        beta2=tl.load(ptr + 2),
        one_minus_beta2=tl.load(ptr + 3),
        beta3=tl.load(ptr + 4),
        one_minus_beta3=tl.load(ptr + 5),
        lion_beta1=tl.load(ptr + 6),
        one_minus_lion_beta1=tl.load(ptr + 7),
        lion_beta2=tl.load(ptr + 8),
        one_minus_lion_beta2=tl.load(ptr + 9),
        rho=tl.load(ptr + 10),
        one_minus_rho=tl.load(ptr + 11),
        c=tl.load(ptr + 12),
        one_minus_c=tl.load(ptr + 13),
        mean_new=tl.load(ptr + 14),
        mean_old=tl.load(ptr + 15),
        eps=tl.load(ptr + 16),
        inv_eps=tl.load(ptr + 17),
        inv_bias1=tl.load(ptr + 18),
        inv_bias2=tl.load(ptr + 19),
        adam_size=tl.load(ptr + 20),
        lion_size=tl.load(ptr + 21),
        bias1_slope=tl.load(ptr + 22),
        bias2_slope=tl.load(ptr + 23),
        square_slope=tl.load(ptr + 24),
        pull_gain=tl.load(ptr + 25),
        gain_cap=tl.load(ptr + 26),
        second_max=tl.load(ptr + 27),
    )


@triton.jit
def advanced(row_ptr, steps_taken, mask, ON_DEVICE: tl.constexpr):
    """The step that is taken now, float64; a count on the device moves on to it."""
    if ON_DEVICE:
        address = tl.load(row_ptr + STEP, mask=mask, other=0)
        is_double = (address & 1) != 0
        single_ptr = address.to(tl.pointer_type(tl.float32))
        double_ptr = (address - (address & 1)).to(tl.pointer_type(tl.float64))
        taken = tl.load(single_ptr, mask=mask & ~is_double, other=0.0).to(tl.float64)
        t = tl.where(is_double, tl.load(double_ptr, mask=mask & is_double, other=0.0), taken) + 1.0
        tl.store(single_ptr, t.to(tl.float32), mask=mask & ~is_double)
        tl.store(double_ptr, t, mask=mask & is_double)
    else:
        t = tl.full((LANES,), steps_taken, tl.float64) + 1.0
    return t


# Numbers that would otherwise be compiled in where they are 1 or a multiple of 16.
_RUNTIME = ["first", "count", "decays", "clamp_pullback", "ema_update_freq", "pullback_from_step", "maximize"]


@triton.jit(do_not_specialize=_RUNTIME)
def _pace_scalars_kernel(
    table_ptr,
    scalars_ptr,
    stat_scalars_ptr,
    lr_ptr,
    grad_scale_ptr,
    clip_coef_ptr,
    found_inf_ptr,
    first,
    count,
    steps_taken: tl.float64,
    lr: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    lambda_pullback: tl.float64,
    clamp_pullback,
    beta_ema: tl.float64,
    decays,
    ema_kappa: tl.float64,
    ema_rho: tl.float64,
    ema_gamma: tl.float64,
    ema_update_freq,
    pullback_from_step,
    maximize,
    ON_DEVICE: tl.constexpr,
):
    """The scalars of `count` tensors of the table, from `first` on, and the next of their step counts."""
    if skipped(found_inf_ptr):
        return
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    mask = lane < count
    tensor = (first + lane).to(tl.int64)
    t = advanced(table_ptr + tensor * TABLE_WIDTH, steps_taken, mask, ON_DEVICE)
    o = PaceOptions(
        read_lr(lr, lr_ptr),
        double(beta1),
        double(beta2),
        double(eps),
        double(weight_decay),
        double(lambda_pullback),
        clamp_pullback,
        double(beta_ema),
        decays,
        double(ema_kappa),
        double(ema_rho),
        double(ema_gamma),
        ema_update_freq,
        pullback_from_step,
        maximize,
    )
    s = pace_scalars(o, t, read_factor(grad_scale_ptr, clip_coef_ptr))
    store_fields(scalars_ptr + tensor * PACE_WIDTH, s, mask)
    if stat_scalars_ptr is not None:
        w = gain_weight(o, t)
        row_ptr = stat_scalars_ptr + tensor * STAT_WIDTH
        tl.store(row_ptr, w, mask=mask)
        tl.store(row_ptr + 1, o.lr * o.lambda_pullback * w, mask=mask)
        tl.store(row_ptr + 2, tl.where(o.clamp_pullback != 0, double(1.0), double(float("inf"))), mask=mask)


@triton.jit(do_not_specialize=[*_RUNTIME, "constant", "step_offset"])
def _pullback_scalars_kernel(
    table_ptr,
    scalars_ptr,
    stat_scalars_ptr,
    lr_ptr,
    found_inf_ptr,
    first,
    count,
    steps_taken: tl.float64,
    lr: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    lambda_pullback: tl.float64,
    clamp_pullback,
    constant,
    gain: tl.float64,
    step_offset,
    beta_ema: tl.float64,
    decays,
    ema_kappa: tl.float64,
    ema_rho: tl.float64,
    ema_gamma: tl.float64,
    ema_update_freq,
    ON_DEVICE: tl.constexpr,
):
    """The same for the pullback behind another optimizer's step. What belongs to AdamW's own step means nothing."""
    if skipped(found_inf_ptr):
        return
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    mask = lane < count
    tensor = (first + lane).to(tl.int64)
    t = advanced(table_ptr + tensor * TABLE_WIDTH, steps_taken, mask, ON_DEVICE)
    o = PaceOptions(
        read_lr(lr, lr_ptr),
        double(0.0),
        double(beta2),
        double(eps),
        double(0.0),
        double(lambda_pullback),
        clamp_pullback,
        double(beta_ema),
        decays,
        double(ema_kappa),
        double(ema_rho),
        double(ema_gamma),
        ema_update_freq,
        0,
        0,
    )
    given = double(gain)
    s = pullback_scalars(o, constant, given, step_offset, t)
    store_fields(scalars_ptr + tensor * PULLBACK_WIDTH, s, mask)
    if stat_scalars_ptr is not None:
        row_ptr = stat_scalars_ptr + tensor * STAT_WIDTH
        tl.store(row_ptr, gain_weight(o, t), mask=mask)
        tl.store(row_ptr + 1, pullback_gain(o, constant, given, t), mask=mask)
        tl.store(row_ptr + 2, tl.where(o.clamp_pullback != 0, double(1.0), double(float("inf"))), mask=mask)


@triton.jit
def read_coefficients(ptr, learn, beta1, beta2, beta3, rho, c, gamma):
    """Those whose bit of `learn` is set from memory, the others as given."""
    q = Coefficients(double(beta1), double(beta2), double(beta3), double(rho), double(c), double(gamma))
    if ptr is not None:
        q = Coefficients(
            tl.where((learn & 1) != 0, tl.load(ptr), q.beta1),
            tl.where((learn & 2) != 0, tl.load(ptr + 1), q.beta2),
            tl.where((learn & 4) != 0, tl.load(ptr + 2), q.beta3),
            tl.where((learn & 8) != 0, tl.load(ptr + 3), q.rho),
            tl.where((learn & 16) != 0, tl.load(ptr + 4), q.c),
            tl.where((learn & 32) != 0, tl.load(ptr + 5), q.gamma),
        )
    return q


@triton.jit(do_not_specialize=[*_RUNTIME, "learn", "second_max"])
def _mada_scalars_kernel(
    table_ptr,
    scalars_ptr,
    factors_ptr,
    coefficients_ptr,
    lr_ptr,
    grad_scale_ptr,
    clip_coef_ptr,
    found_inf_ptr,
    first,
    count,
    steps_taken: tl.float64,
    learn,
    lr: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    beta3: tl.float64,
    rho: tl.float64,
    c: tl.float64,
    gamma: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    lion_beta1: tl.float64,
    lion_beta2: tl.float64,
    second_max,
    lambda_pullback: tl.float64,
    clamp_pullback,
    beta_ema: tl.float64,
    decays,
    ema_kappa: tl.float64,
    ema_rho: tl.float64,
    ema_gamma: tl.float64,
    ema_update_freq,
    pullback_from_step,
    maximize,
    ON_DEVICE: tl.constexpr,
    LAG: tl.constexpr,
    GRADS_KEPT: tl.constexpr,
):
    """The same for MADA: the scalars of the new step, of the last one, which is redone where LAG, and of the pullback;
    and what the last step leaves to be remembered by the next."""
    if skipped(found_inf_ptr):
        return
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    mask = lane < count
    tensor = (first + lane).to(tl.int64)
    row_ptr = table_ptr + tensor * TABLE_WIDTH
    t = advanced(row_ptr, steps_taken, mask, ON_DEVICE)
    o = PaceOptions(
        read_lr(lr, lr_ptr),
        double(beta1),
        double(beta2),
        double(eps),
        double(weight_decay),
        double(lambda_pullback),
        clamp_pullback,
        double(beta_ema),
        decays,
        double(ema_kappa),
        double(ema_rho),
        double(ema_gamma),
        ema_update_freq,
        pullback_from_step,
        maximize,
    )
    lion1 = double(lion_beta1)
    lion2 = double(lion_beta2)
    q = read_coefficients(coefficients_ptr, learn, beta1, beta2, beta3, rho, c, gamma)
    out_ptr = scalars_ptr + tensor * MADA_WIDTH
    store_fields(out_ptr, mada_scalars(o, o.lr, q, lion1, lion2, second_max, t), mask)
    pull = pace_scalars(o, t, read_factor(grad_scale_ptr, clip_coef_ptr))
    store_fields(out_ptr + MADA_PULL, pull, mask)
    if GRADS_KEPT:
        last_ptr = tl.load(row_ptr + LAST_SCALARS, mask=mask, other=0).to(tl.pointer_type(tl.float64))
        taken = tl.load(last_ptr, mask=mask, other=0.0)
        tl.store(out_ptr + MADA_FIRST, (taken == NO_GRADIENT).to(tl.float32), mask=mask)
        if LAG:
            redo = taken > DONE
            last_lr = tl.load(last_ptr + 1, mask=mask, other=0.0)
            last_q = Coefficients(
                tl.load(last_ptr + 2, mask=mask, other=0.0),
                tl.load(last_ptr + 3, mask=mask, other=0.0),
                tl.load(last_ptr + 4, mask=mask, other=0.0),
                tl.load(last_ptr + 5, mask=mask, other=0.0),
                tl.load(last_ptr + 6, mask=mask, other=0.0),
                tl.load(last_ptr + 7, mask=mask, other=0.0),
            )
            last = mada_scalars(o, last_lr, last_q, lion1, lion2, second_max, t - 1.0)
            store_chosen(out_ptr + MADA_REDO, redo, last, no_step(second_max), mask)
            factors = mada_factors(last_lr, last_q, t - 1.0)
            for k in tl.static_range(len(factors)):
                value = tl.where(redo, factors[k], double(0.0))
                tl.store(factors_ptr + tensor * FACTOR_WIDTH + k, value, mask=mask)
        tl.store(last_ptr, REDO if LAG else DONE, mask=mask)
        tl.store(last_ptr + 1, o.lr, mask=mask)
        store_fields(last_ptr + 2, q, mask)
