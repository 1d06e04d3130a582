"""The operators of ``pace_kernels/ops.py`` in Triton: check, lay out, launch, add up. Nothing waits for the device.

Launches of a step: the scalars of all tensors (one for each distinct step count, if counts are on the CPU), the sweep
(one for each set of formats, aligned to 16 bytes or not), and one or two that add up the sums of the sweep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from . import learn_kernel, sums, table
from .checks import (
    Call,
    check_call,
    check_coded,
    check_doubles,
    check_one,
    check_operands,
    check_ranges,
    counts_taken,
    require,
)
from .launch import Rule, Summed, launch, target_of
from .rules import CODED, RULES
from .scalars import FACTOR_WIDTH, LANES, OPTIONS, _scalars_kernel
from .sweep import CHUNK, _sweep_kernel
from .table import Plan, Uploads, plan, upload

_hyper_options = Uploads(1 << 16)
_NO_OPTIONS = dict.fromkeys(OPTIONS, 0.0)
_NO_CONSTANTS: dict[str, Any] = {}

# ---- layouts --------------------------------------------------------------------------------------------------------


def _steps(t: Tensor) -> tuple[int, ...]:
    return tuple(stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1)


def _is_dense(t: Tensor) -> bool:
    expected = 1
    for stride, size in sorted((st, sz) for sz, st in zip(t.shape, t.stride(), strict=True) if sz > 1):
        if stride != expected:
            return False
        expected *= size
    return True


class Staged:
    """Operands that can be swept as flat memory: dense, and with the strides of their parameter. Others are copied, and
    those that the kernel writes are copied back."""

    def __init__(self, lists: dict[int, list[Tensor]], written: set[int], contiguous: bool) -> None:
        self.columns = lists
        self._back: list[tuple[Tensor, Tensor]] = []
        if contiguous:
            return
        self.columns = {column: list(tensors) for column, tensors in lists.items()}
        for i, operands in enumerate(zip(*lists.values(), strict=True)):
            param = operands[0]
            if all(map(Tensor.is_contiguous, operands)) or param.numel() == 0:
                continue
            if _is_dense(param) and len({_steps(t) for t in operands}) == 1:
                continue
            memory = param if _is_dense(param) else torch.empty_like(param)  # dense, in the parameter's order
            for column, t in zip(lists, operands, strict=True):
                if _is_dense(t) and _steps(t) == _steps(memory):
                    continue
                copy = torch.empty_strided(memory.shape, memory.stride(), dtype=t.dtype, device=t.device).copy_(t)
                self.columns[column][i] = copy
                if column in written:
                    self._back.append((t, copy))

    def write_back(self) -> None:
        for t, copy in self._back:
            t.copy_(copy)


@dataclass
class Layout:
    plan: Plan
    staged: Staged
    taken: list[tuple[float, int]]  # step counts before the step, where they live on the CPU, each of how many tensors


def _lay_out(rule: Rule, call: Call, flags: Any) -> Layout:
    """The checked addresses of all tensors. Tensors with the same step count come side by side."""
    taken = [0.0] * len(call.steps) if call.counts_on_device else counts_taken(call.steps)
    order = None
    runs = [(count, len(list(members))) for count, members in groupby(taken)]
    if len(runs) > len(set(taken)):
        order = sorted(range(len(taken)), key=taken.__getitem__)
        runs = [(count, taken.count(count)) for count in sorted(set(taken))]

    def ordered(values: Any) -> Any:
        return (
            values if order is None or not isinstance(values, (list, tuple)) else type(values)(values[i] for i in order)
        )

    count = len(rule.definition.operands)
    formats: list[Any] = [None] * (rule.columns - table.OPERANDS.value)
    lists, scales, written, contiguous = {}, {}, set(), True
    for k, (operand, (reads, writes)) in enumerate(zip(rule.definition.operands, rule.in_play(flags), strict=True)):
        if not (reads or writes):
            continue
        tensors, column = call.lists[operand.symbol], table.OPERANDS.value + k
        writes = operand.mutable and (writes or operand.role != "weight")
        others = None
        if operand.codec is not None:
            beside = call.beside.get(operand.symbol, [])
            dtypes, others, flat = check_coded(operand, tensors, beside, call)
        else:
            dtypes, flat = check_operands(operand.list, tensors, call, operand.role, writes)
        contiguous = contiguous and flat
        lists[column], formats[k] = ordered(tensors), ordered(dtypes)
        if others is not None:
            formats[count + k] = ordered(others)
            (scales if others == torch.uint8 else lists)[column + count] = ordered(beside)
        if writes:
            written |= {column, column + count}
    staged = Staged(lists, written, contiguous)
    columns = staged.columns | scales
    if call.counts_on_device:
        columns[table.STEP.value] = ordered(call.steps)
    if call.rows:
        columns[table.LAST_SCALARS.value] = ordered(call.rows)
    return Layout(plan(columns, tuple(formats), call.device, CHUNK.value), staged, runs)


# ---- launches -------------------------------------------------------------------------------------------------------


def _each_step_count(rule: Rule, call: Call, layout: Layout, **tables: Any) -> None:
    """The scalars of all tensors: a launch for each step count, or a single one if the device keeps the counts."""
    values = [float("nan") if value is None else float(value) for value in call.options.values()]
    given = call.tensors
    arguments = {
        "table_ptr": layout.plan.table,
        "numbers_ptr": rule.numbers and given[rule.numbers],
        "lr_ptr": given["lr_tensor"],
        "grad_scale_ptr": given.get("grad_scale"),
        "clip_coef_ptr": given.get("clip_coef"),
        "found_inf_ptr": given["found_inf"],
        **tables,
        **_NO_OPTIONS,
        **dict(zip(OPTIONS, values, strict=False)),
    }
    constants = rule.scalar_constants(bool(call.rows), call.counts_on_device)
    at = 0
    for steps_taken, count in layout.taken:
        numbers = {"first": at, "count": count, "steps_taken": steps_taken}
        launch(_scalars_kernel, -(-count // LANES.value), call.device, {}, constants, **arguments, **numbers)
        at += count


def _add_up(summed: Summed, rows: Tensor, result: Tensor, learn: int = 0, lr: float = 0.0, **tables: Any) -> None:
    """The sum of all rows into `result`, through rows of partial sums if they are many."""
    last = False
    while not last:
        programs = max(1, -(-len(rows) // sums.ROWS_OF_A_PROGRAM.value))
        last = programs == 1
        out = result if last else rows.new_empty(programs, summed.width)
        launch(
            sums._add_up_kernel, programs, rows.device, {"num_warps": 4}, summed.constants(out.shape[-1]),
            rows_ptr=rows, out_ptr=out, count=len(rows), learn=learn, lr=lr, **tables,
        )  # fmt: skip
        rows = out


# ---- the operators --------------------------------------------------------------------------------------------------


@torch.no_grad()
def _step(rule: Rule, *values: Any, **named: Any) -> None:
    call = Call(rule.definition, values, named)
    if call.coded:
        rule = CODED[rule.definition.op]
    check_ranges(rule.definition, call.options)
    play = rule.module.play(call)
    check_call(call, play)
    layout = _lay_out(rule, call, play.flags)

    count, device, summed = len(call.params), call.device, rule.sums(play.flags)
    found_inf, result = (call.tensors["found_inf"], rule.summed and call.tensors[rule.summed.extra])
    scalars = torch.empty(count, len(rule.fields), dtype=torch.float32, device=device)
    factors = rows = None
    if summed is not None:
        factors = torch.empty(count, FACTOR_WIDTH.value, dtype=torch.float64, device=device)
        rows = torch.empty(layout.plan.rows, summed.width, dtype=torch.float64, device=device)
    _each_step_count(rule, call, layout, scalars_ptr=scalars, factors_ptr=factors)
    tables = {"table_ptr": layout.plan.table, "blocks_ptr": layout.plan.blocks, "scalars_ptr": scalars}
    tables |= {"factors_ptr": factors, "rows_ptr": rows, "found_inf_ptr": found_inf}
    for part in layout.plan.parts:
        options, constants = (
            rule.compiled_with(target_of(device)),
            rule.constants(part.formats, part.aligned, play.flags),
        )
        launch(_sweep_kernel, part.blocks, device, options, constants, first_block=part.first_block, **tables)

    layout.staged.write_back()
    if call.steps and not call.counts_on_device:
        torch._foreach_add_(call.steps, torch.tensor(1.0), alpha=1.0)  # a number would become a tensor for each
    if rule.summed is not None and result is not None:
        if rows is None:  # nothing was asked for, and nothing is there to be added up
            rows = torch.empty(0, rule.summed.width, dtype=torch.float64, device=device)
        learn, lr = call.options.get("learn", 0), float(call.options["lr"])
        _add_up(rule.summed, rows, result, learn, lr, lr_ptr=call.tensors["lr_tensor"], found_inf_ptr=found_inf)


def _operator(name: str) -> Callable[..., None]:
    def step(*values: Any, **named: Any) -> None:
        _step(RULES[name], *values, **named)

    step.__name__, step.__doc__ = name, f"What the operator ``{name}`` does."
    return step


pace_step_ = _operator("pace_step_")
mada_step_ = _operator("mada_step_")
pullback_ = _operator("pullback_")
schedule_free_step_ = _operator("schedule_free_step_")


@torch.no_grad()
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
    """What the operator ``mada_learn_`` does."""
    device = coefficients.device
    named = {"coefficients": coefficients, "momenta": momenta, "hypergradients": hypergradients}
    for name, t in named.items():
        check_doubles(name, t, 6, device)
    check_doubles("hyper_step", hyper_step, 1, device)
    values = [*hyper_lr, *hyper_momentum, *lower, *upper]
    for options in (hyper_lr, hyper_momentum, lower, upper):
        require(len(options) == 6, f"hyper options must have 6 entries, got {len(options)}")
    for row in sums:
        check_doubles("sums", row, 7, device)
    check_one("found_inf", found_inf, device)
    rows = sums[0] if len(sums) == 1 else torch.stack(sums) if sums else coefficients.new_empty(0)
    key = (coefficients.data_ptr(), *values)  # of these coefficients alone: see Uploads
    kept = _hyper_options.get(device, key, lambda: upload(torch.tensor(values, dtype=torch.float64), device))
    launch(
        learn_kernel._mada_learn_kernel,
        1,
        device,
        {},
        _NO_CONSTANTS,
        coefficients_ptr=coefficients,
        momenta_ptr=momenta,
        hypergradients_ptr=hypergradients,
        hyper_step_ptr=hyper_step,
        sums_ptr=rows,
        options_ptr=kept.tensor,
        found_inf_ptr=found_inf,
        calls=len(sums),
        learn=learn,
        hyper_warmup=warmup,
        clip=float(clip),
    )
