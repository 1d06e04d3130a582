"""The operators of ``pace_kernels/ops.py`` in Triton: check, lay out, launch, add up. Nothing waits for the device.

Launches of a step: the scalars of all tensors (one for each distinct step count, where those live on the CPU), the
sweep (one for each pair of formats, aligned to 16 bytes or not), and one or two that add up what the sweep summed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .. import definitions
from . import learn_kernel, scalars, schedule_free_kernel, sums, table
from .checks import (
    check_doubles,
    check_length,
    check_lr,
    check_one,
    check_operands,
    check_options,
    check_ranges,
    check_steps,
    counts_taken,
    require,
)
from .launch import MADA, PACE, PULLBACK, SCHEDULE_FREE, Sweep, launch, target_of
from .sweep import CHUNK
from .table import Plan, Uploads, plan, upload

_CPU = torch.device("cpu")
_hyper_options = Uploads(1 << 16)

# What the kernels of scalars take by the names of the operators' options.
_NUMBERS = ("beta1", "beta2", "eps", "weight_decay", "lambda_pullback", "beta_ema", "ema_rho", "ema_gamma")
_PULLBACK_NUMBERS = ("beta2", "eps", "lambda_pullback", "beta_ema", "ema_rho", "ema_gamma")
_MADA_NUMBERS = ("beta3", "rho", "c", "gamma", "lion_beta1", "lion_beta2")
_SWITCHES = ("clamp_pullback", "ema_update_freq", "pullback_from_step", "maximize")


def _scalar_options(o: dict[str, Any], names: tuple[str, ...], switches: tuple[str, ...] = _SWITCHES) -> dict[str, Any]:
    kappa = o["ema_kappa"]
    return {
        **{name: float(o[name]) for name in ("lr", *names)},
        "decays": int(kappa is not None),
        "ema_kappa": 0.0 if kappa is None else float(kappa),
        **{name: int(o[name]) for name in switches},
    }


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


_READ_ONLY = (table.G.value, table.BEFORE.value)


class Staged:
    """Operands that can be swept as flat memory: dense, and all of a parameter with the strides of the parameter.
    Others are copied, and those that the kernel writes are copied back."""

    def __init__(self, lists: dict[int, list[Tensor]]) -> None:
        self.columns = lists
        self._back: list[tuple[Tensor, Tensor]] = []
        if all(all(map(Tensor.is_contiguous, tensors)) for tensors in lists.values()):
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
                if column not in _READ_ONLY:
                    self._back.append((t, copy))

    def write_back(self) -> None:
        for t, copy in self._back:
            t.copy_(copy)


# ---- what the operators share ---------------------------------------------------------------------------------------

# The column of each list in the table.
_COLUMNS = {
    "params": table.X.value,
    "grads": table.G.value,
    "exp_avgs": table.M.value,
    "exp_avg_sqs": table.V.value,
    "exp_avg_diffs": table.N.value,
    "second_exp_avg_sqs": table.W.value,
    "exp_avg_lions": table.L.value,
    "last_grads": table.LAST_G.value,
    "older_grads": table.OLDER_G.value,
    "emas": table.E.value,
    "zs": table.Z.value,
    "befores": table.BEFORE.value,
    "second_moments": table.G.value,  # in the place of the gradient, since it may be as narrow
}


def _device(params: list[Tensor], otherwise: Tensor | None = None) -> torch.device:
    if params:
        return params[0].device
    return _CPU if otherwise is None else otherwise.device


_READ = ("grads", "befores", "second_moments")


def _check_lists(lists: dict[str, list[Tensor]], device: torch.device) -> None:
    for name, tensors in lists.items():
        read = name in _READ
        check_operands(name, tensors, lists["params"], device, state=not read and name != "params", written=not read)


@dataclass
class Layout:
    device: torch.device
    plan: Plan
    staged: Staged
    taken: list[float]  # step counts before the step, where they live on the CPU


def _lay_out(
    lists: dict[str, list[Tensor]],
    steps: list[Tensor],
    last_scalars: list[Tensor],
    on_device: bool,
    device: torch.device,
) -> Layout:
    """Where everything lies. Tensors of the same step count come side by side."""
    taken = [0.0] * len(steps) if on_device else counts_taken(steps)
    order = None
    if len(list(groupby(taken))) > len(set(taken)):
        order = sorted(range(len(taken)), key=taken.__getitem__)
        taken = [taken[i] for i in order]

    def ordered(tensors: list[Tensor]) -> list[Tensor]:
        return tensors if order is None else [tensors[i] for i in order]

    staged = Staged({_COLUMNS[name]: ordered(tensors) for name, tensors in lists.items()})
    columns = dict(staged.columns)
    numels = list(map(Tensor.numel, columns[table.X.value]))
    if on_device:
        columns[table.STEP.value] = ordered(steps)
    if last_scalars:
        columns[table.LAST_SCALARS.value] = ordered(last_scalars)
    return Layout(device, plan(columns, numels, device, CHUNK.value), staged, taken)


def _finish(layout: Layout, steps: list[Tensor], on_device: bool) -> None:
    layout.staged.write_back()
    if steps and not on_device:
        torch._foreach_add_(steps, torch.tensor(1.0), alpha=1.0)  # a number would become a tensor for each


def _each_step_count(layout: Layout, kernel: Any, **named: Any) -> None:
    """The scalars of all tensors: a launch for each step count, which is one where the device keeps them."""
    at = 0
    for steps_taken, members in groupby(layout.taken):
        count = len(list(members))
        programs = -(-count // scalars.LANES.value)
        numbers = {"first": at, "count": count, "steps_taken": steps_taken}
        launch(kernel, programs, layout.device, {}, table_ptr=layout.plan.table, **numbers, **named)
        at += count


def _scaling_arguments(
    device: torch.device,
    lr_tensor: Tensor | None,
    grad_scale: Tensor | None,
    clip_coef: Tensor | None,
    found_inf: Tensor | None,
) -> dict[str, Tensor | None]:
    check_lr(lr_tensor, device)
    check_one("grad_scale", grad_scale, device)
    check_one("clip_coef", clip_coef, device)
    check_one("found_inf", found_inf, device)
    return {
        "lr_ptr": lr_tensor,
        "grad_scale_ptr": grad_scale,
        "clip_coef_ptr": clip_coef,
        "found_inf_ptr": found_inf,
    }


def _counts_on_device(capturable: bool, found_inf: Tensor | None, device: torch.device) -> bool:
    """With found_inf only the device knows whether a step counts. (On the CPU, in the interpreter, the device is where
    step counts always are.)"""
    require(
        capturable or found_inf is None or device == _CPU,
        "found_inf needs capturable: the step counts must be on the device, which alone knows whether a step counts",
    )
    return capturable or found_inf is not None


def _sweep(sweep: Sweep, layout: Layout, **named: Any) -> None:
    where = {"table_ptr": layout.plan.table, "blocks_ptr": layout.plan.blocks}
    options = sweep.options(target_of(layout.device))
    for part in layout.plan.parts:
        arguments = {"first_block": part.first_block, **where, **named, **sweep.constants(part)}
        launch(sweep.kernel, part.blocks, layout.device, options, **arguments)


def _add_up(kernel: Any, rows: Tensor, result: Tensor, **named: Any) -> None:
    """The sum of all rows into `result`, over rows of sums in between where they are many."""
    count, device, options = len(rows), rows.device, {"num_warps": 4}
    while count > sums.ROWS_OF_A_PROGRAM.value:
        programs = -(-count // sums.ROWS_OF_A_PROGRAM.value)
        out = rows.new_empty(programs, rows.shape[1])
        arguments = {"rows_ptr": rows, "out_ptr": out, "count": count, "OUT_WIDTH": rows.shape[1]}
        launch(kernel, programs, device, options, **arguments, **named)
        rows, count = out, programs
    arguments = {"rows_ptr": rows, "out_ptr": result, "count": count, "OUT_WIDTH": result.numel()}
    launch(kernel, 1, device, options, **arguments, **named)


# ---- the operators --------------------------------------------------------------------------------------------------


@torch.no_grad()
def pace_step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[Tensor],
    steps: list[Tensor],
    stats: Tensor | None = None,
    lr_tensor: Tensor | None = None,
    grad_scale: Tensor | None = None,
    clip_coef: Tensor | None = None,
    found_inf: Tensor | None = None,
    **options: Any,
) -> None:
    """What the operator ``pace_step_`` does."""
    check_options(options)
    moment, average = options["beta1"] != 0.0, bool(emas)
    pull = average and options["lambda_pullback"] != 0.0
    check_length("grads", grads, params)
    check_length("exp_avgs", exp_avgs, params, None if moment else "; it may be empty, since beta1 is 0")
    check_length("exp_avg_sqs", exp_avg_sqs, params)
    why = "; it may be empty, since lambda_pullback is 0" if options["lambda_pullback"] == 0.0 else None
    check_length("emas", emas, params, why)
    check_length("steps", steps, params)
    device = _device(params, stats)
    check_doubles("stats", stats, 14, device)
    given = _scaling_arguments(device, lr_tensor, grad_scale, clip_coef, found_inf)
    on_device = _counts_on_device(options["capturable"], found_inf, device)
    check_steps(steps, device if on_device else _CPU)
    lists = {"params": params, "grads": grads, "exp_avg_sqs": exp_avg_sqs}
    lists |= ({"exp_avgs": exp_avgs} if moment else {}) | ({"emas": emas} if average else {})
    _check_lists(lists, device)

    layout = _lay_out(lists, steps, [], on_device, device)
    scalar_rows = torch.empty(len(params), scalars.PACE_WIDTH.value, dtype=torch.float32, device=device)
    stat_rows = rows = None
    if stats is not None:
        stat_rows = torch.empty(len(params), scalars.STAT_WIDTH.value, dtype=torch.float64, device=device)
        rows = torch.empty(layout.plan.rows, sums.STATS_WIDTH.value, dtype=torch.float64, device=device)
    _each_step_count(
        layout,
        scalars._pace_scalars_kernel,
        scalars_ptr=scalar_rows,
        stat_scalars_ptr=stat_rows,
        **given,
        **_scalar_options(options, _NUMBERS),
        ON_DEVICE=on_device,
    )
    flags = {"MOMENT": moment, "PULL": pull, "AVERAGE": average, "STATS": stats is not None}
    tables = {"scalars_ptr": scalar_rows, "stat_scalars_ptr": stat_rows, "rows_ptr": rows, "found_inf_ptr": found_inf}
    _sweep(PACE, layout, **tables, **flags)
    _finish(layout, steps, on_device)
    if stats is not None and rows is not None:
        _add_up(sums._sum_stats_kernel, rows, stats, found_inf_ptr=found_inf)


def _check_in_play(lists: dict[str, list[Tensor]], learn: int, o: dict[str, Any], coefficients: Tensor | None) -> None:
    """Which lists may be empty, as in csrc/arguments.h."""
    adam, lag, pull = bool(lists["exp_avg_sqs"]), learn != 0, o["lambda_pullback"] != 0.0

    def in_play(bit: int, name: str, vertex: float) -> bool:
        return bool(learn >> bit & 1) or o[name] != vertex

    lion, diff, second = lists["exp_avg_lions"], lists["exp_avg_diffs"], lists["second_exp_avg_sqs"]
    require(
        adam or not (lag or diff or second or pull or in_play(5, "gamma", 0.0)),
        "exp_avg_sqs may be empty only where gamma is 0 and nothing is learned or pulls",
    )
    require(bool(lion) or not in_play(5, "gamma", 1.0), "exp_avg_lions may be empty only where gamma is fixed at 1")
    require(
        not adam or bool(diff) or not in_play(2, "beta3", 0.0),
        "exp_avg_diffs may be empty only where beta3 is fixed at 0",
    )
    require(
        not adam or bool(second) or not in_play(3, "rho", 1.0),
        "second_exp_avg_sqs may be empty only where rho is fixed at 1",
    )
    require(not lag or coefficients is not None, "coefficients may be missing only where nothing is learned")


@torch.no_grad()
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
    *,
    learn: int,
    **options: Any,
) -> None:
    """What the operator ``mada_step_`` does."""
    check_options(options)
    for name in ("beta3", "lion_beta1", "lion_beta2"):
        require(0.0 <= options[name] < 1.0, f"{name} must lie in [0, 1), got {options[name]}")
    for name in ("rho", "c", "gamma"):
        require(0.0 <= options[name] <= 1.0, f"{name} must lie in [0, 1], got {options[name]}")
    states = {
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "exp_avg_diffs": exp_avg_diffs,
        "second_exp_avg_sqs": second_exp_avg_sqs,
        "exp_avg_lions": exp_avg_lions,
        "last_grads": last_grads,
        "older_grads": older_grads,
        "emas": emas,
    }
    _check_in_play(states, learn, options, coefficients)
    adam, diff, second, lion = (bool(a) for a in (exp_avg_sqs, exp_avg_diffs, second_exp_avg_sqs, exp_avg_lions))
    lag, average = learn != 0, bool(emas)
    pull = average and adam and options["lambda_pullback"] != 0.0
    grads_kept = bool(last_scalars)
    needed = {
        "exp_avgs": adam,
        "last_grads": lag or diff,
        "older_grads": lag and diff,
        "emas": options["lambda_pullback"] != 0.0,
    }
    check_length("grads", grads, params)
    for name, tensors in states.items():
        check_length(name, tensors, params, None if needed.get(name) else "")
    check_length("last_scalars", last_scalars, params, None if lag or diff else "")
    check_length("steps", steps, params)
    device = _device(params, hypergradients)
    for i, row in enumerate(last_scalars):
        check_doubles(f"last_scalars[{i}]", row, 8, device)
    check_doubles("coefficients", coefficients, 6, device)
    check_doubles("hypergradients", hypergradients, 7, device)
    given = _scaling_arguments(device, lr_tensor, grad_scale, clip_coef, found_inf)
    on_device = _counts_on_device(options["capturable"], found_inf, device)
    check_steps(steps, device if on_device else _CPU)
    in_play = {
        "exp_avgs": adam,
        "exp_avg_sqs": adam,
        "last_grads": lag or diff,
        "older_grads": lag and diff,
    }
    lists = {"params": params, "grads": grads}
    lists |= {name: tensors for name, tensors in states.items() if tensors and in_play.get(name, True)}
    _check_lists(lists, device)

    layout = _lay_out(lists, steps, last_scalars, on_device, device)
    scalar_rows = torch.empty(len(params), scalars.MADA_WIDTH.value, dtype=torch.float32, device=device)
    factors = rows = None
    if lag:
        factors = torch.empty(len(params), scalars.FACTOR_WIDTH.value, dtype=torch.float64, device=device)
        rows = torch.empty(layout.plan.rows, sums.HYPER_WIDTH.value, dtype=torch.float64, device=device)
    numbers = _scalar_options(options, (*_NUMBERS, *_MADA_NUMBERS))
    _each_step_count(
        layout,
        scalars._mada_scalars_kernel,
        scalars_ptr=scalar_rows,
        factors_ptr=factors,
        coefficients_ptr=coefficients,
        learn=learn,
        second_max=int(options["second_max"]),
        **given,
        **numbers,
        ON_DEVICE=on_device,
        LAG=lag,
        GRADS_KEPT=grads_kept,
    )
    _sweep(
        MADA,
        layout,
        scalars_ptr=scalar_rows,
        factors_ptr=factors,
        rows_ptr=rows,
        found_inf_ptr=found_inf,
        LAG=lag,
        DIFF=diff,
        SECOND=second,
        LION=lion,
        ADAM=adam,
        AVERAGE=average,
        PULL=pull,
        ROLES_STAY=options["capturable"] and lag and diff,
    )
    _finish(layout, steps, on_device)
    if hypergradients is not None:
        if rows is None:
            rows = torch.empty(0, sums.HYPER_WIDTH.value, dtype=torch.float64, device=device)
        lr = {"lr_ptr": lr_tensor, "lr": numbers["lr"]}
        _add_up(sums._sum_hypergradients_kernel, rows, hypergradients, found_inf_ptr=found_inf, learn=learn, **lr)


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
    kept = _hyper_options.get(device, tuple(values), lambda: upload(torch.tensor(values, dtype=torch.float64), device))
    launch(
        learn_kernel._mada_learn_kernel,
        1,
        device,
        {},
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


@torch.no_grad()
def pullback_(
    params: list[Tensor],
    befores: list[Tensor],
    second_moments: list[Tensor],
    emas: list[Tensor],
    steps: list[Tensor],
    stats: Tensor | None = None,
    lr_tensor: Tensor | None = None,
    found_inf: Tensor | None = None,
    *,
    gain: float | None,
    step_offset: int,
    **options: Any,
) -> None:
    """What the operator ``pullback_`` does."""
    check_options({**options, "beta1": 0.0, "weight_decay": 0.0})
    require(gain is None or 0.0 <= gain <= 1.0, f"gain must lie in [0, 1], got {gain}")
    require(step_offset >= 0, f"step_offset must be >= 0, got {step_offset}")
    pull = options["lambda_pullback"] != 0.0 if gain is None else gain != 0.0
    require(pull or not befores, "befores must be empty where nothing pulls")
    require(pull or not second_moments, "second_moments must be empty where nothing pulls")
    require(gain is None or not second_moments, "second_moments must be empty where gain is given")
    check_length("befores", befores, params, "")
    check_length("second_moments", second_moments, params, "" if gain is not None or not pull else None)
    check_length("emas", emas, params)
    check_length("steps", steps, params)
    device = _device(params, stats)
    check_doubles("stats", stats, 14, device)
    given = _scaling_arguments(device, lr_tensor, None, None, found_inf)
    on_device = _counts_on_device(options["capturable"], found_inf, device)
    check_steps(steps, device if on_device else _CPU)
    before, moment = bool(befores), bool(second_moments)
    lists = {"params": params, "emas": emas}
    lists |= ({"befores": befores} if before else {}) | ({"second_moments": second_moments} if moment else {})
    _check_lists(lists, device)
    for i, t in enumerate(befores):
        require(t.dtype == params[i].dtype, f"befores[{i}] must be of its parameter's dtype")

    layout = _lay_out(lists, steps, [], on_device, device)
    scalar_rows = torch.empty(len(params), scalars.PULLBACK_WIDTH.value, dtype=torch.float32, device=device)
    stat_rows = rows = None
    if stats is not None:
        stat_rows = torch.empty(len(params), scalars.STAT_WIDTH.value, dtype=torch.float64, device=device)
        rows = torch.empty(layout.plan.rows, sums.STATS_WIDTH.value, dtype=torch.float64, device=device)
    _each_step_count(
        layout,
        scalars._pullback_scalars_kernel,
        scalars_ptr=scalar_rows,
        stat_scalars_ptr=stat_rows,
        lr_ptr=given["lr_ptr"],
        found_inf_ptr=found_inf,
        constant=int(gain is not None),
        gain=0.0 if gain is None else float(gain),
        step_offset=step_offset,
        **_scalar_options(options, _PULLBACK_NUMBERS, ("clamp_pullback", "ema_update_freq")),
        ON_DEVICE=on_device,
    )
    flags = {"BEFORE": before, "MOMENT": moment, "PULL": pull, "STATS": stats is not None}
    tables = {"scalars_ptr": scalar_rows, "stat_scalars_ptr": stat_rows, "rows_ptr": rows, "found_inf_ptr": found_inf}
    _sweep(PULLBACK, layout, **tables, **flags)
    _finish(layout, steps, on_device)
    if stats is not None and rows is not None:
        _add_up(sums._sum_stats_kernel, rows, stats, found_inf_ptr=found_inf)


@torch.no_grad()
def schedule_free_step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg_sqs: list[Tensor],
    zs: list[Tensor],
    steps: list[Tensor],
    schedule: Tensor | None = None,
    lr_tensor: Tensor | None = None,
    grad_scale: Tensor | None = None,
    clip_coef: Tensor | None = None,
    found_inf: Tensor | None = None,
    **options: Any,
) -> None:
    """What the operator ``schedule_free_step_`` does."""
    check_ranges(definitions.SCHEDULE_FREE, options)
    lists = {"params": params, "grads": grads, "exp_avg_sqs": exp_avg_sqs, "zs": zs}
    for name, tensors in (lists | {"steps": steps}).items():
        check_length(name, tensors, params)
    device = _device(params, schedule)
    check_doubles("schedule", schedule, 2, device)
    given = _scaling_arguments(device, lr_tensor, grad_scale, clip_coef, found_inf)
    on_device = _counts_on_device(options["capturable"], found_inf, device)
    check_steps(steps, device if on_device else _CPU)
    _check_lists(lists, device)

    layout = _lay_out(lists, steps, [], on_device, device)
    width = schedule_free_kernel.SCHEDULE_FREE_WIDTH.value
    scalar_rows = torch.empty(len(params), width, dtype=torch.float32, device=device)
    _each_step_count(
        layout,
        schedule_free_kernel._schedule_free_scalars_kernel,
        scalars_ptr=scalar_rows,
        schedule_ptr=schedule,
        **given,
        **{name: float(options[name]) for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "share")},
        step=float(options["count"]),
        maximize=int(options["maximize"]),
        ON_DEVICE=on_device,
    )
    _sweep(SCHEDULE_FREE, layout, scalars_ptr=scalar_rows, found_inf_ptr=found_inf)
    _finish(layout, steps, on_device)
