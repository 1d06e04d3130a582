"""Schedule-free AdamW's rule in the sweep, and its scalars."""

from __future__ import annotations

import triton
import triton.language as tl

from .scalars import LANES, advanced, double, power, read_factor, read_lr, single, skipped, store_fields
from .schedule_free import ScheduleFreeScalars, schedule_free_rule
from .storage import load, store
from .sweep import GROUP, find_stretch, operand, whole_groups
from .table import TABLE_WIDTH, G, V, X, Z

SCHEDULE_FREE_WIDTH = tl.constexpr(16)  # floats a tensor in the table of scalars


@triton.jit(do_not_specialize=["first", "count", "maximize"])
def _schedule_free_scalars_kernel(
    table_ptr,
    scalars_ptr,
    schedule_ptr,
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
    step: tl.float64,
    share: tl.float64,
    maximize,
    ON_DEVICE: tl.constexpr,
):
    """The scalars of `count` tensors of the table, from `first` on, and the next of their step counts. `step` and
    `share` are the options count and share, in whose place there may be a `schedule`."""
    if skipped(found_inf_ptr):
        return
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    mask = lane < count
    tensor = (first + lane).to(tl.int64)
    advanced(table_ptr + tensor * TABLE_WIDTH, steps_taken, mask, ON_DEVICE)
    t = tl.load(schedule_ptr) if schedule_ptr is not None else double(step)
    c = tl.load(schedule_ptr + 1) if schedule_ptr is not None else double(share)
    alpha = read_lr(lr, lr_ptr)
    factor = read_factor(grad_scale_ptr, clip_coef_ptr)
    s = ScheduleFreeScalars(
        grad_factor=single(tl.where(maximize != 0, -factor, factor)),
        beta2=single(double(beta2)),
        one_minus_beta2=single(1.0 - double(beta2)),
        inv_bias2=single(1.0 / (1.0 - power(double(beta2), t))),
        eps=single(double(eps)),
        weight_decay=single(double(weight_decay)),
        share=single(c),
        y_size=single(alpha * (1.0 - double(beta1) * (1.0 - c))),
        z_size=single(alpha),
    )
    store_fields(scalars_ptr + tensor * SCHEDULE_FREE_WIDTH, s, mask)


@triton.jit
def _schedule_free_round(
    s, y_ptr, g_ptr, v_ptr, z_ptr, at, end, X_FORMAT: tl.constexpr, G_FORMAT: tl.constexpr, BLOCK: tl.constexpr
):
    """The elements of one block that lie before `end`."""
    i = at + tl.arange(0, BLOCK)
    mask = i < end
    g = load(g_ptr + i, mask, G_FORMAT)
    y = load(y_ptr + i, mask, X_FORMAT)
    v = load(v_ptr + i, mask, tl.float32)
    z = load(z_ptr + i, mask, tl.float32)
    r = schedule_free_rule(s, g, y, v, z)
    store(y_ptr + i, r.y, mask, X_FORMAT)
    store(v_ptr + i, r.v, mask, tl.float32)
    store(z_ptr + i, r.z, mask, tl.float32)


@triton.jit(do_not_specialize=["first_block"])
def _schedule_free_kernel(
    table_ptr,
    blocks_ptr,
    scalars_ptr,
    found_inf_ptr,
    first_block,
    X_FORMAT: tl.constexpr,
    G_FORMAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One step of a stretch of one tensor."""
    if skipped(found_inf_ptr):
        return
    part = find_stretch(table_ptr, blocks_ptr, first_block)
    ptr = scalars_ptr + part.tensor * SCHEDULE_FREE_WIDTH
    s = ScheduleFreeScalars(
        grad_factor=tl.load(ptr),
        beta2=tl.load(ptr + 1),
        one_minus_beta2=tl.load(ptr + 2),
        inv_bias2=tl.load(ptr + 3),
        eps=tl.load(ptr + 4),
        weight_decay=tl.load(ptr + 5),
        share=tl.load(ptr + 6),
        y_size=tl.load(ptr + 7),
        z_size=tl.load(ptr + 8),
    )
    y_ptr = operand(part, X, X_FORMAT, ALIGNED)
    g_ptr = operand(part, G, G_FORMAT, ALIGNED)
    v_ptr = operand(part, V, tl.float32, ALIGNED)
    z_ptr = operand(part, Z, tl.float32, ALIGNED)
    whole = whole_groups(part.count)
    for at in range(0, whole, BLOCK):
        _schedule_free_round(s, y_ptr, g_ptr, v_ptr, z_ptr, at, whole, X_FORMAT, G_FORMAT, BLOCK)
    if whole < part.count:
        _schedule_free_round(s, y_ptr, g_ptr, v_ptr, z_ptr, whole, part.count, X_FORMAT, G_FORMAT, GROUP)
