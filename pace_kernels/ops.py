"""The operators: their schemas and fakes, which exist without a compiler. Kernels attach to them by dispatch key.

Every operator steps a whole list of tensors, changes its arguments in place and returns nothing. The operator counts
steps: ``steps`` holds the number of steps taken before the call, and is one higher after it.

A call computes, or raises before anything has changed; it writes only the arguments that its schema marks
(tests/fuzz_ops.py). If two tensors of a call share memory, their contents afterwards are undefined.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .definitions import DEFINITIONS
from .definitions.kit import PACE_STATS, STEPS, Definition
from .definitions.mada import COEFFICIENTS, DONE, HYPERGRADIENTS, LAST_SCALARS, NO_GRADIENT, REDO

__all__ = ["COEFFICIENTS", "DONE", "HYPERGRADIENTS", "LAST_SCALARS", "MADA_STATES", "NO_GRADIENT", "PACE_STATS", "REDO"]

# The lists of mada_step_ after params and grads, in its order.
MADA_STATES = (*(entry.list for entry in DEFINITIONS["mada_step_"].lists[2:]), STEPS)
_LIBRARY = torch.library.Library("pace_kernels", "DEF")

# Every step takes four optional tensors with one element on the device of the parameters, and waits for none:
# `lr_tensor` in place of lr; `grad_scale`, which divides the gradients, and `clip_coef`, which multiplies them
# (float32; both within the pass: the gradients themselves stay as they are); and `found_inf` (float32): if it is not 0,
# nothing changes. `capturable`: the step counts are on the device of the parameters, otherwise on the CPU. With
# `found_inf` off the CPU they have to be on the device, since only that knows whether a step counts. They are float32
# or float64. float32 counts to 2^24: on the CPU a count that has reached it is refused; on a device, where the host
# does not read it, it stays there.
#
# Lists may lie in the formats of csrc/codes.h, a format a list and call: with `remainders` (int16 or int8) the
# parameters are bfloat16, each of 32 or 24 bits together with its remainder; moments (exp_avgs, exp_avg_sqs,
# exp_avg_diffs, exp_avg_lions) may be bfloat16, or uint8 with scales (`exp_avg_scales`, ...); second_exp_avg_sqs,
# last_grads and older_grads bfloat16; emas and zs bfloat16 with int8 `ema_scales` and `z_scales`, or int8 or int16 with
# uint8 ones. Codes with uint8 scales, one for 32 consecutive elements, are contiguous, and their parameters too. With
# `stochastic_rounding` bfloat16 parameters without remainders are rounded by the same dither.
#
# pace_step_ is one PACE step (csrc/rules/pace.h). `exp_avgs` may be empty where beta1 is 0, `emas` where
# lambda_pullback is 0.
#
# mada_step_ is one MADA step (csrc/rules/mada.h). A list may be empty if nothing needs it; the others say what is in
# play: `exp_avgs` and `exp_avg_sqs` Adam's moments, `exp_avg_diffs` the differences of gradients, `second_exp_avg_sqs`
# the running mean or maximum, `exp_avg_lions` Lion's moment, `emas` the average. If differences are in play or
# something is learned, the call has `last_grads` and `last_scalars` (LAST_SCALARS each). If something is learned,
# moments are one step behind and `last_grads` holds the gradient of that step; if differences are in play too,
# `older_grads` holds the gradient before, the new gradient overwrites it, and the caller exchanges the two lists; with
# `capturable` the lists keep their roles. Coefficient i is coefficients[i] if bit i of `learn` is set, otherwise the
# option of its name. The call writes its sums over all coordinates to `hypergradients` (HYPERGRADIENTS), or zeros if
# `found_inf` skips it.
#
# pullback_ is the average and the pullback behind another optimizer's step (csrc/rules/pullback.h), which left its
# weights in `params`. The pull is `gain` where it is given, otherwise that of `second_moments` (the parameter's dtype
# or float32; empty with `gain`), bias-corrected by beta2 at the step that is `step_offset` beyond that of `steps`. The
# distance is measured from `befores`, the weights before the base's step, in the parameter's dtype; where the list is
# empty, from `params`. Where nothing pulls (gain or, without it, lambda_pullback 0) both are empty and `params` is only
# read. Averages in int8 or int16 are read beside `befores`, which are there then even so; the distance is measured from
# `params` with `pullback_from_step`.
#
# schedule_free_step_ is one step of schedule-free AdamW (csrc/rules/schedule_free.h). lr, `count` and `share` are those
# of the whole group at this step, which the front end computes; `schedule` has the last two if only the device knows
# them. `steps` only count.
for _definition in DEFINITIONS.values():
    _LIBRARY.define(_definition.schema())
# Moves the learned coefficients after all mada_step_ calls of a step: adds up their sums, in order, into
# `hypergradients` (6), clips them, adds them to `momenta` (6), descends and projects. Float64, all on one device. If
# the learning rates add up to 0, only `hypergradients` changes; in the first `warmup` steps only that and `hyper_step`.
# If `found_inf` is not 0, nothing changes.
_LIBRARY.define(
    "mada_learn_(Tensor(a!) coefficients, Tensor(b!) momenta, Tensor(c!) hypergradients, Tensor(d!) hyper_step, "
    "Tensor[] sums, Tensor? found_inf=None, *, int learn, float[] hyper_lr, float[] hyper_momentum, float[] lower, "
    "float[] upper, float clip, "
    "int warmup) -> ()"
)
# Plans: the calls of a step, kept for the next one (planning.py). `plan` is the handle of a Plan of the device's
# module.
# plan_add_ adds a part, which is a call of `rule`: its lists one after the other without the gradients (lists beside
# others last, if any), the lengths of all of them, the optional tensors up to lr_tensor, the options as numbers.
# plan_learn_ adds the mada_learn_ of such parts. plan_step_ takes the gradients of all parts one after the other,
# checks that all its memory is where it was, and takes the step, or raises with nothing changed; `options` are those of
# all parts if some changed, or none. A pullback takes no gradients: its plan's calls are methods of Plan (plan_type.h).
# The schemas mark nothing as written: they are not for tracing, the operators above are.
for _schema in (
    "plan_add_(int plan, str rule, Tensor[] tensors, int[] lengths, Tensor?[] extras, float[] options) -> ()",
    "plan_learn_(int plan, Tensor[] learned, int[] parts, float[] options) -> ()",
    "plan_step_(int plan, Tensor[] fresh, float[] options, Tensor? grad_scale=None, Tensor? clip_coef=None, "
    "Tensor? found_inf=None) -> ()",
):
    _LIBRARY.define(_schema)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _check_devices(*values: Any) -> None:
    """One tensor on meta sends the whole call there, where nothing happens: so either all are on meta, or none."""
    types = {t.device.type for t in _tensors(values)}
    if "meta" in types and len(types) > 1:
        raise ValueError(f"all tensors must be on meta, or none, got some on {', '.join(sorted(types))}")


def _fake(definition: Definition) -> Callable[..., None]:
    """A step of tensors without values does nothing, if its lists fit."""
    lists = [entry.list for entry in definition.lists] + [STEPS]
    may_be_missing = {o.list for o in definition.operands if o.empty is not None} | {r.list for r in definition.rows}

    def fake(*values: Any, **options: Any) -> None:
        _check_devices(*values)
        given = dict(zip(lists, values, strict=False))
        for name, tensors in given.items():
            if len(tensors) != len(values[0]) and (tensors or name not in may_be_missing):
                raise ValueError(f"{name} has {len(tensors)} tensors, params has {len(values[0])}")

    return fake


for _definition in DEFINITIONS.values():
    torch.library.register_fake(f"pace_kernels::{_definition.op}", _fake(_definition), lib=_LIBRARY)


@torch.library.register_fake("pace_kernels::mada_learn_", lib=_LIBRARY)
def _(coefficients, momenta, hypergradients, hyper_step, sums, found_inf=None, **options):  # type: ignore[no-untyped-def]
    _check_devices(coefficients, momenta, hypergradients, hyper_step, sums, found_inf)


def _resolve_negative(name: str) -> None:
    """Copies negative views (``x.conj().imag``, whose memory holds the negated values) that are read, and refuses those
    that are written. torch's own fallback raises for some calls only after the kernel has run."""
    op = getattr(torch.ops.pace_kernels, name).default
    arguments = {argument.name: argument for argument in op._schema.arguments}

    def resolved(argument: str, value: Any) -> Any:
        negative = [t for t in _tensors([value]) if t.is_neg()]
        if not negative:
            return value
        alias = arguments[argument].alias_info
        if alias is not None and alias.is_write:
            raise RuntimeError(f"{argument} must not hold negative views: pass tensor.resolve_neg()")
        return [t.resolve_neg() for t in value] if isinstance(value, (list, tuple)) else value.resolve_neg()

    def call(*args: Any, **kwargs: Any) -> None:
        given = dict(zip(arguments, args, strict=False)) | kwargs
        values = {key: resolved(key, value) for key, value in given.items()}
        op(*list(values.values())[: len(args)], **{key: values[key] for key in kwargs})

    _LIBRARY.impl(name, call, "Negative")


for _name in (*DEFINITIONS, "mada_learn_"):
    _resolve_negative(_name)


def _refuse(*arguments: Any) -> None:
    raise RuntimeError("a plan must not hold negative views, or zeros without memory: pass copies")


# torch's fallbacks would hand them copies, which the plan would then keep and write. plan_step_ reads what it is given,
# so that there they are right.
for _name in ("plan_add_", "plan_learn_"):
    for _key in ("Negative", "ZeroTensor"):
        _LIBRARY.impl(_name, _refuse, _key)

# The libraries that hold the kernels register them when they are loaded; why one can't be, backends() says.
with contextlib.suppress(ImportError):
    from . import _C  # noqa: F401
if torch.version.cuda is not None:
    with contextlib.suppress(ImportError):
        from . import _cuda  # noqa: F401
