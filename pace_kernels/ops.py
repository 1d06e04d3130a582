"""The operators: their schemas and fakes, which exist without a compiler. Kernels attach to them by dispatch key.

Every operator does a whole list of tensors, mutates its arguments in place and returns nothing. Steps are counted by
the operator: ``steps`` holds the number of steps taken before the call, and is one higher after it.

A call computes, or raises before anything has changed; nothing but the arguments that its schema marks is ever written
(tests/fuzz_ops.py). Where two tensors of a call share memory, what they hold afterwards is not defined.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("pace_kernels", "DEF")

# Every step takes four tensors with one element on the device of the parameters, each of which may be missing, and none
# of which is waited for: `lr_tensor` in place of lr; `grad_scale`, which divides the gradients, and `clip_coef`, which
# multiplies them (float32; both within the pass: the gradients themselves stay as they are); and `found_inf` (float32):
# where it is not 0, nothing changes. `capturable`: the step counts live on the device of the parameters, otherwise on
# the CPU. Where `found_inf` is given off the CPU they have to, since only the device knows whether a step counts. They
# are float32 or float64. float32 counts to 2^24: a count that is there is refused on the CPU; on a device, where nobody
# reads it, it stays there.
#
# One PACE step (csrc/rules/pace.h). `exp_avgs` may be empty where beta1 is 0, `emas` where lambda_pullback is 0.
_LIBRARY.define(
    "pace_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] emas, Tensor(e!)[] steps, Tensor(f!)? stats=None, Tensor? lr_tensor=None, Tensor? grad_scale=None, "
    "Tensor? clip_coef=None, Tensor? found_inf=None, *, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, float lambda_pullback, bool clamp_pullback, float beta_ema, float? ema_kappa, float ema_rho, "
    "float ema_gamma, int ema_update_freq, bool pullback_from_step, bool maximize, bool capturable) -> ()"
)
# One MADA step (csrc/rules/mada.h). A list may be empty where nothing needs it; those that are there say what is in
# play: `exp_avgs` and `exp_avg_sqs` Adam's moments, `exp_avg_diffs` the differences of gradients, `second_exp_avg_sqs`
# the running mean or maximum, `exp_avg_lions` Lion's moment, `emas` the average. `last_grads` are there where
# differences are in play or something is learned, and with them `last_scalars` (LAST_SCALARS each). Where something is
# learned, moments are one step behind and `last_grads` holds the gradient of that step; where differences are in play
# too, `older_grads` holds the one before, the new one is written over it, and the caller exchanges the two lists; with
# `capturable` the lists keep their roles. Coefficient i is coefficients[i] where bit i of `learn` is set, otherwise the
# option of its name. The sums over all coordinates of this call are written to `hypergradients` (HYPERGRADIENTS); where
# `found_inf` says that nothing happens, zeros.
_LIBRARY.define(
    "mada_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] exp_avg_diffs, Tensor(e!)[] second_exp_avg_sqs, Tensor(f!)[] exp_avg_lions, "
    "Tensor(g!)[] last_grads, Tensor(h!)[] older_grads, Tensor(i!)[] last_scalars, Tensor(j!)[] emas, "
    "Tensor(k!)[] steps, Tensor? coefficients=None, Tensor(l!)? hypergradients=None, Tensor? lr_tensor=None, "
    "Tensor? grad_scale=None, Tensor? clip_coef=None, Tensor? found_inf=None, *, int learn, float lr, float beta1, "
    "float beta2, float beta3, float rho, float c, float gamma, float eps, float weight_decay, "
    "float lion_beta1, float lion_beta2, bool second_max, float lambda_pullback, bool clamp_pullback, float beta_ema, "
    "float? ema_kappa, float ema_rho, float ema_gamma, int ema_update_freq, bool pullback_from_step, bool maximize, "
    "bool capturable) -> ()"
)
# Moves the learned coefficients after all mada_step_ calls of a step: adds up their sums, in order, into
# `hypergradients` (6), clips them, adds them to `momenta` (6), descends and projects. Float64, all on one device. Where
# the learning rates add up to 0 nothing but `hypergradients` changes, and in the first `warmup` steps `hyper_step` too.
# Where `found_inf` is not 0, nothing does.
_LIBRARY.define(
    "mada_learn_(Tensor(a!) coefficients, Tensor(b!) momenta, Tensor(c!) hypergradients, Tensor(d!) hyper_step, "
    "Tensor[] sums, Tensor? found_inf=None, *, int learn, float[] hyper_lr, float[] hyper_momentum, float[] lower, "
    "float[] upper, float clip, "
    "int warmup) -> ()"
)
# The average and the pullback behind another optimizer's step (csrc/rules/pullback.h), which left its weights in
# `params`. The pull is `gain` where it is given, otherwise that of `second_moments` (the parameter's dtype or float32;
# empty with `gain`), bias-corrected by beta2 at the step that is `step_offset` beyond that of `steps`. The distance is
# measured from `befores`, the weights before the base's step, in the parameter's dtype; where the list is empty, from
# `params`. Where nothing pulls (gain or, without it, lambda_pullback 0) both are empty and `params` is only read.
_LIBRARY.define(
    "pullback_(Tensor(a!)[] params, Tensor[] befores, Tensor[] second_moments, Tensor(b!)[] emas, Tensor(c!)[] steps, "
    "Tensor(d!)? stats=None, Tensor? lr_tensor=None, Tensor? found_inf=None, *, float lr, float lambda_pullback, "
    "float? gain, bool clamp_pullback, float beta2, float eps, int step_offset, float beta_ema, float? ema_kappa, "
    "float ema_rho, float ema_gamma, int ema_update_freq, bool capturable) -> ()"
)

# What `stats` holds after a step, float64: sums, minima and maxima over all coordinates of the call. PaceStat in
# csrc/stats.h has the same order. "raw" is the gain before alpha c, "effective" before the clamp, "lambda"
# after it.
PACE_STATS = (
    *("count", "raw_sum", "raw_min", "raw_max", "effective_sum", "effective_min", "effective_max"),
    *("lambda_sum", "lambda_min", "lambda_max", "clipped", "adam_sq", "pullback_sq", "update_sq"),
)

# The lists of mada_step_ after params and grads, in its order.
MADA_STATES = (
    *("exp_avgs", "exp_avg_sqs", "exp_avg_diffs", "second_exp_avg_sqs", "exp_avg_lions"),
    *("last_grads", "older_grads", "last_scalars", "emas", "steps"),
)
# MADA's coefficients, in the order of every tensor and list of six; MadaCoefficient in csrc/rules/mada.h has the same.
COEFFICIENTS = ("beta1", "beta2", "beta3", "rho", "c", "gamma")
# What a call of mada_step_ leaves in `hypergradients`, float64: a sum for each coefficient, and the learning rate.
HYPERGRADIENTS = (*COEFFICIENTS, "lr")
# What a parameter remembers of its last step, float64: what can be done about it, and what it used. `taken` is REDO
# where the moments are those before it, DONE where they are those after it, NO_GRADIENT where there is no gradient of a
# last step: then the step takes its own for it, so that differences are 0. LastScalar in csrc/scalars.h.
LAST_SCALARS = ("taken", "lr", *COEFFICIENTS)
REDO, DONE, NO_GRADIENT = 1.0, 0.0, -1.0


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _check_devices(*values: Any) -> None:
    """One tensor on meta sends the whole call there, where nothing happens: then all of them have to be."""
    types = {t.device.type for t in _tensors(values)}
    if "meta" in types and len(types) > 1:
        raise ValueError(f"all tensors must be on meta, or none, got some on {', '.join(sorted(types))}")


def _check_lengths(params: list[Tensor], required: dict[str, list[Tensor]], optional: dict[str, list[Tensor]]) -> None:
    for name, tensors in (required | {k: v for k, v in optional.items() if v}).items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} has {len(tensors)} tensors, params has {len(params)}")


@torch.library.register_fake("pace_kernels::pace_step_", lib=_LIBRARY)
def _(params, grads, exp_avgs, exp_avg_sqs, emas, steps, *tensors, **options):  # type: ignore[no-untyped-def]
    _check_devices(params, grads, exp_avgs, exp_avg_sqs, emas, steps, *tensors)
    required = {"grads": grads, "exp_avg_sqs": exp_avg_sqs, "steps": steps}
    _check_lengths(params, required, {"exp_avgs": exp_avgs, "emas": emas})


@torch.library.register_fake("pace_kernels::mada_step_", lib=_LIBRARY)
def _(params, grads, *lists, **options):  # type: ignore[no-untyped-def]
    _check_devices(params, grads, *lists)
    states = dict(zip(MADA_STATES, lists, strict=False))
    _check_lengths(params, {"grads": grads, "steps": states.pop("steps")}, states)


@torch.library.register_fake("pace_kernels::mada_learn_", lib=_LIBRARY)
def _(coefficients, momenta, hypergradients, hyper_step, sums, found_inf=None, **options):  # type: ignore[no-untyped-def]
    _check_devices(coefficients, momenta, hypergradients, hyper_step, sums, found_inf)


@torch.library.register_fake("pace_kernels::pullback_", lib=_LIBRARY)
def _(params, befores, second_moments, emas, steps, *tensors, **options):  # type: ignore[no-untyped-def]
    _check_devices(params, befores, second_moments, emas, steps, *tensors)
    _check_lengths(params, {"emas": emas, "steps": steps}, {"befores": befores, "second_moments": second_moments})


def _resolve_negative(name: str) -> None:
    """Negative views (``x.conj().imag``; their memory holds minus what they are) are copied where they are read, and
    refused where they are written. torch's own fallback raises for some calls only after the kernel has run."""
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


for _name in ("pace_step_", "mada_step_", "mada_learn_", "pullback_"):
    _resolve_negative(_name)

# The libraries that hold the kernels register them when they are loaded; why one can't be, backends() says.
with contextlib.suppress(ImportError):
    from . import _C  # noqa: F401
if torch.version.cuda is not None:
    with contextlib.suppress(ImportError):
        from . import _cuda  # noqa: F401
