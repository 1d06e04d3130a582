"""From an optimizer's options and a step count to the scalars of a rule: on the device, in float64, rounded to float32
once, so that nothing waits for step counts, learning rates and coefficients that are there.

The expressions and their order are those of ``csrc/scalars.h``. Powers are exp(y log x), off by at most
(1 + 1.5 |y log x|) 2^-52: below 2^-41 of the power, where |y log x| > 745 would underflow. 1 − β^t is then off by
2^-51 / (1 − β) of itself, 4e-13 for β = 0.999, where half a unit of float32 is 3e-8 to 6e-8: about one scalar in 1e5 is
a unit of float32 away from that of the CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .table import LAST_SCALARS, STEP

# Tensors a program: a warp's lanes.
LANES = tl.constexpr(32)
# Doubles a tensor of what its sums are multiplied with: MADA has six.
FACTOR_WIDTH = tl.constexpr(8)


class Lanes(NamedTuple):
    """The places of a rule's scalars, one lane per tensor: its row of scalars, its row of factors of sums (None if
    nothing is summed), and its memory of the last step (None if it has none)."""

    scalars: tl.tensor
    factors: tl.tensor
    last: tl.tensor
    mask: tl.tensor


class Given(NamedTuple):
    """Values that only the device knows: the step that is taken, float64; the gradient's factor, float32; and a pointer
    to further numbers, or None."""

    t: tl.tensor
    factor: tl.tensor
    numbers: tl.tensor


@triton.jit
def double(a):
    """A number among a kernel's arguments as float64, even if the interpreter passes a Python number."""
    return tl.full((), a, tl.float64)


@triton.jit
def single(a):
    return a.to(tl.float32)


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
    return tl.where(o.ema_kappa == o.ema_kappa, w, double(1.0))


@triton.jit
def average_moves(o, t):
    return t.to(tl.int64) % o.ema_update_freq.to(tl.int64) == 0


@triton.jit
def read_lr(lr, lr_ptr):
    return tl.load(lr_ptr).to(tl.float64) if lr_ptr is not None else double(lr)


@triton.jit
def read_factor(grad_scale_ptr, clip_coef_ptr):
    """The factor of the gradient: clip coefficient / gradient scale, rounded once."""
    factor = tl.full((), 1.0, tl.float32)
    if clip_coef_ptr is not None:
        factor = tl.load(clip_coef_ptr)
    if grad_scale_ptr is not None:
        factor = tl.div_rn(factor, tl.load(grad_scale_ptr))
    return factor


@triton.jit
def grad_factor(o, factor):
    return single(tl.where(o.maximize != 0.0, -factor, factor))


@triton.jit
def skipped(found_inf_ptr):
    return tl.load(found_inf_ptr) != 0.0 if found_inf_ptr is not None else tl.full((), 0, tl.int1)


@triton.jit
def store_fields(ptr, fields, mask):
    """The fields of a tuple side by side in memory; each field has its own lane values, or one value for all lanes."""
    for k in tl.static_range(len(fields)):
        tl.store(ptr + k, fields[k], mask=mask)


@triton.jit
def load_fields(ptr, COUNT: tl.constexpr):
    return [tl.load(ptr + k) for k in tl.tuple(range(COUNT))]


@triton.jit
def advanced(row_ptr, steps_taken, mask, ON_DEVICE: tl.constexpr):
    """The present step, float64; a count on the device advances to it."""
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


# A kernel's number is float64 only by its annotation, which elements of a tuple can't have: so the options come one by
# one, by their place in the definition. MADA has 22 of them.
OPTIONS = tuple(f"o{k}" for k in range(24))


@triton.jit(do_not_specialize=["first", "count"], repr=lambda compiled: compiled.constants["SCALARS"].__name__)
def _scalars_kernel(
    table_ptr, scalars_ptr, factors_ptr, numbers_ptr, lr_ptr, grad_scale_ptr, clip_coef_ptr, found_inf_ptr,
    first, count, steps_taken: tl.float64,
    o0: tl.float64, o1: tl.float64, o2: tl.float64, o3: tl.float64, o4: tl.float64, o5: tl.float64,
    o6: tl.float64, o7: tl.float64, o8: tl.float64, o9: tl.float64, o10: tl.float64, o11: tl.float64,
    o12: tl.float64, o13: tl.float64, o14: tl.float64, o15: tl.float64, o16: tl.float64, o17: tl.float64,
    o18: tl.float64, o19: tl.float64, o20: tl.float64, o21: tl.float64, o22: tl.float64, o23: tl.float64,
    SCALARS: tl.constexpr, NAMES: tl.constexpr, FIELDS: tl.constexpr,
    COLUMNS: tl.constexpr, LAST: tl.constexpr, ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """The scalars of `count` tensors of the table, from `first` on, and the next of their step counts. NAMES and FIELDS
    are the options and scalars in their order, which kernels that are kept on disk are then known by."""
    if skipped(found_inf_ptr):
        return
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    mask = lane < count
    tensor = (first + lane).to(tl.int64)
    row_ptr = table_ptr + tensor * COLUMNS
    t = advanced(row_ptr, steps_taken, mask, ON_DEVICE)
    all = (o0, o1, o2, o3, o4, o5, o6, o7, o8, o9, o10, o11,
           o12, o13, o14, o15, o16, o17, o18, o19, o20, o21, o22, o23)  # fmt: skip
    options = [read_lr(all[k], lr_ptr) if NAMES[k] == "lr" else double(all[k]) for k in tl.tuple(range(len(NAMES)))]
    last = None
    if LAST:
        last = tl.load(row_ptr + LAST_SCALARS, mask=mask, other=0).to(tl.pointer_type(tl.float64))
    factors = None
    if factors_ptr is not None:
        factors = factors_ptr + tensor * FACTOR_WIDTH
    given = Given(t, read_factor(grad_scale_ptr, clip_coef_ptr), numbers_ptr)
    SCALARS(options, given, Lanes(scalars_ptr + tensor * len(FIELDS), factors, last, mask))
