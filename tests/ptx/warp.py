"""Shuffles, votes and reductions over a warp."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .dtypes import DTYPES, FLOATS
from .parser import Instruction
from .program import Builder, Step
from .table import instruction

if TYPE_CHECKING:
    from .executor import Lanes


@instruction("shfl")
def make_shuffle(builder: Builder, ins: Instruction) -> Step:
    """``c`` holds the segments' mask in bits 8 to 12 and the clamp in bits 0 to 4."""
    mode = next(m for m in ins.modifiers if m in ("up", "down", "bfly", "idx"))
    targets = [t.strip() for t in ins.operands[0].split("|")]
    source, distance, clamp = (builder.read(operand, "b32") for operand in ins.operands[1:4])
    members = builder.read(ins.operands[4], "b32") if ins.has("sync") else None
    result = builder.write(targets[0], "b32")
    valid = builder.write(targets[1], "pred") if len(targets) > 1 else None

    def step(lanes: Lanes) -> None:
        values, machine, lane = lanes.values, lanes.machine, lanes.lane
        if members is not None:
            machine.check_members(lanes, values[members], ins.text)
        by = np.asarray(values[distance], np.int64) & 31
        control = np.asarray(values[clamp], np.int64)
        segment, last = (control >> 8) & 31, control & 31
        first = lane & segment
        most = first | (last & ~segment)
        if mode == "up":
            other = lane - by
            inside = other >= most
        else:
            other = {"down": lane + by, "bfly": lane ^ by, "idx": first | (by & ~segment)}[mode]
            inside = other <= most
        other = np.where(inside, other, lane)
        # What a thread that does not run now would give shows as a pattern.
        everyone = np.full(machine.lanes, 0xDEADBEEF, np.uint32)
        everyone[lanes.threads] = values[source]
        origin = lanes.numbers - lane + other
        if lanes.count < machine.lanes and not machine.all_run(lanes, origin):
            machine.stats["shfl_from_inactive"] += 1
        values[result][...] = everyone[origin]
        if valid is not None:
            values[valid][...] = inside

    return step


@instruction("activemask")
def make_active_mask(builder: Builder, ins: Instruction) -> Step:
    result = builder.write(ins.operands[0], "b32")

    def step(lanes: Lanes) -> None:
        lanes.values[result][...] = lanes.machine.active(lanes)

    return step


@instruction("vote")
def make_vote(builder: Builder, ins: Instruction) -> Step:
    mode = next(m for m in ins.modifiers if m in ("ballot", "any", "all", "uni"))
    predicate = builder.read(ins.operands[1], "pred")
    members = builder.read(ins.operands[2], "b32") if ins.has("sync") else None
    result = builder.write(ins.operands[0], "b32" if mode == "ballot" else "pred")

    def step(lanes: Lanes) -> None:
        machine = lanes.machine
        if members is not None:
            machine.check_members(lanes, lanes.values[members], ins.text)
        yes = machine.active(lanes, lanes.values[predicate])
        if mode == "ballot":
            lanes.values[result][...] = yes
            return
        every = yes == machine.active(lanes)
        lanes.values[result][...] = {"any": yes != 0, "all": every, "uni": every | (yes == 0)}[mode]

    return step


@instruction("redux")
def make_reduce(builder: Builder, ins: Instruction) -> Step:
    type_ = ins.type
    operation = next(m for m in ins.modifiers if m in ("add", "min", "max", "and", "or", "xor"))
    if ins.has("abs"):
        raise builder.error()
    source, members = builder.read(ins.operands[1], type_), builder.read(ins.operands[2], "b32")
    result = builder.write(ins.operands[0], type_)
    dtype = DTYPES[type_]
    if type_ in FLOATS:
        neutral: float = {"min": np.inf, "max": -np.inf}[operation]
        reduce = {"min": np.minimum, "max": np.maximum} if ins.has("NaN") else {"min": np.fmin, "max": np.fmax}
    else:
        limits = np.iinfo(dtype)
        all_ones = limits.max if type_[0] != "s" else -1
        neutral = {"min": limits.max, "max": limits.min, "and": all_ones}.get(operation, 0)
        reduce = {"add": np.add, "min": np.minimum, "max": np.maximum}
        reduce |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}

    def step(lanes: Lanes) -> None:
        machine = lanes.machine
        machine.check_members(lanes, lanes.values[members], ins.text)
        totals = np.full(machine.lanes // 32, neutral, dtype)
        reduce[operation].at(totals, lanes.warp, lanes.values[source])
        lanes.values[result][...] = totals[lanes.warp]

    return step


@instruction("bar", "barrier")
def make_warp_barrier(builder: Builder, ins: Instruction) -> Step:
    """``bar.warp.sync``; a barrier of the block ends a block of the program instead."""
    members = builder.read(ins.operands[0], "b32")

    def step(lanes: Lanes) -> None:
        lanes.machine.check_members(lanes, lanes.values[members], ins.text)

    return step
