"""The averages of a model that one or several optimizers train: swapped in for a while, or copied out of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from . import derived
from .averaging import Averaging
from .batchnorm import Batches, recomputed
from .checks import require
from .conversions import in_float
from .editing import Entry
from .formats import formats_of
from .memory import check_whole, share_memory
from .sharding import gathered, is_sharded, local, on_first_rank
from .states import empty_state
from .zero import averaged_on_all_ranks, is_zero


@contextmanager
def averaged(
    model: torch.nn.Module, *optimizers: torch.optim.Optimizer, update_bn: Batches | None = None
) -> Iterator[None]:
    """Within this context a model that several optimizers train holds the averages of all of them.

    Arguments:
        model: the model, as it is called; its parameters may be wrapped, sharded, compiled.
        optimizers: :class:`PACE`, :class:`MADA`, :class:`Pullback`, :class:`ScheduleFreeAdamW`, each of which steps
            some of its parameters; or a ``ZeroRedundancyOptimizer`` around one: then all ranks have to make the call.
        update_bn: batches, or a function of the model that passes batches through it in its training mode. They
            recompute the running statistics of batch normalization for the averages; afterwards all buffers are
            restored bit for bit. Of a list or a tuple the first entry is passed; a mapping is passed by keyword.

    >>> import torch, pace_kernels
    >>> model = torch.nn.Linear(4, 1)
    >>> one, other = (pace_kernels.PACE([p]) for p in model.parameters())
    >>> with pace_kernels.averaged(model, one, other):
    ...     loss = model(torch.ones(8, 4)).square().mean()
    """
    with ExitStack() as stack:
        inner = [vars(optimizer)["optim"] if is_zero(optimizer) else optimizer for optimizer in optimizers]
        for outer, optimizer in zip(optimizers, _checked(inner, "averaged()"), strict=True):
            all_ranks = averaged_on_all_ranks(outer, model) if is_zero(outer) else None
            stack.enter_context(all_ranks or optimizer.averaged(model))
        if update_bn is not None:
            stack.enter_context(recomputed(model, update_bn))
        yield


@torch.no_grad()
def ema_state_dict(
    model: torch.nn.Module,
    *optimizers: torch.optim.Optimizer,
    full: bool = False,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """A copy of ``model.state_dict()`` with averaged weights, to save or to export.

    It is what the model's own ``state_dict()`` gives, hooks included, while the averages are in its parameters; these
    hold their live weights again afterwards. Every parameter that has an average comes averaged, also where
    ``use_ema_eval`` is False. One that took no step yet, did not require a gradient at the last step, or is not
    ours, comes as it is. Dense tensors are copies, contiguous, and share no memory, as safetensors wants them: tied
    weights come under each of their names. Sparse and quantized tensors are copied as they are, lazy ones passed on.

    Arguments:
        model: the model whose parameters the optimizers step (a copy of it has its own).
        optimizers: :class:`PACE`, :class:`MADA`, :class:`Pullback`, :class:`ScheduleFreeAdamW`.
        full: gather sharded weights (DTensors) on the CPU of rank 0, one at a time; the other ranks get an empty dict,
            and all ranks have to make the call. By default weights stay sharded.
        dtype: of the averages, rounded once from what the optimizer has: ``torch.float32`` for those of a bfloat16
            model, say. None: each in its parameter's dtype. All else comes in its own.

    Raises:
        RuntimeError: no group of the optimizers keeps an average; in the middle of a step; for parameters of FSDP1;
            ``dtype`` is given, and a hook of the model's ``state_dict()`` hands out something else than a parameter.
        ValueError: an optimizer steps no parameter of the model; ``dtype`` is no floating-point dtype.

    >>> import torch, pace_kernels
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = pace_kernels.PACE(model.parameters())
    >>> sorted(pace_kernels.ema_state_dict(model, optimizer))
    ['bias', 'weight']
    """
    chosen = _checked(optimizers, "ema_state_dict()")
    floating = dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)
    require(floating, "dtype", "None or a floating-point torch.dtype", dtype)
    if not any(optimizer._keeps_average(group) for optimizer in chosen for group in optimizer.param_groups):
        raise RuntimeError("ema_state_dict(): no group of this optimizer keeps an average: set use_ema_eval=True")
    swaps = []
    for optimizer in chosen:
        with optimizer._opened("ema_state_dict()") as inner:
            inner._require_whole("ema_state_dict()")
            inner._forget_dry_run()
            entries = [e for e in inner._entries(inner.param_groups) if not inner._holds_average(e)]
            derived.check_no_flat_parameters(inner._params(), "ema_state_dict()")
            inner._check_swap("ema_state_dict()", model if inner is optimizer else None, entries)
        if not share_memory(model.parameters(), optimizer._params()):
            raise ValueError("ema_state_dict(): model has no parameter that this optimizer steps")
        swaps.append((optimizer, entries))
    with ExitStack() as stack:
        stack.callback(derived.forget, model, ())
        for optimizer, entries in swaps:
            # Marked as swapped, so that train() ends what an exception out of a signal's handler leaves half done.
            with optimizer._opened("ema_state_dict()") as inner:
                groups = [] if inner._swapped else inner.param_groups
                versions = _versions(entries)
                stack.callback(_put_back, optimizer, entries, groups, versions)
                inner._swap_in(entries, groups, versions)
        derived.forget(model, ())
        exported: dict[str, Any] = _exported(model.state_dict(), full)
        if dtype is not None:
            found: dict[int, tuple[Averaging, Entry]] = {}
            for optimizer in chosen:
                with optimizer._opened("ema_state_dict()") as inner:
                    entries = inner._entries(inner.param_groups)
                found |= {id(optimizer._owner(entry.param)): (inner, entry) for entry in entries}
            _enter_averages(exported, model, found, full, dtype)
    return exported if not full or on_first_rank() else {}


def _put_back(optimizer: Any, entries: list[Entry], groups: list[Any], versions: Any) -> None:
    with optimizer._opened("ema_state_dict()") as inner:
        inner._swap_out(entries, entries, groups, versions=versions)


def _enter_averages(
    exported: dict[str, Any], model: torch.nn.Module, found: dict[int, tuple[Averaging, Entry]], full: bool, dtype: Any
) -> None:
    """Puts averages in this dtype in place of what swapped parameters hold; ``found`` has them by ids of these."""
    missing = {id(param): name for name, param in model.named_parameters() if id(param) in found}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in found:
            optimizer, entry = found[id(value)]
            missing.pop(id(value), None)
            average = empty_state(value, dtype)
            local(average).copy_(optimizer._average_in(entry))
            exported[name] = _exported(average, full)
    if missing:
        raise RuntimeError(
            f"ema_state_dict(dtype={dtype}): the model's state_dict() has {next(iter(missing.values()))} not as the "
            "parameter that it is, so it comes in the parameter's dtype alone: leave dtype out"
        )


def _versions(entries: list[Entry]) -> Any:
    """torch's context that brings their versions back: contents come back bit for bit, so that a graph which was
    recorded before stays right."""
    params = [entry.param for entry in entries]
    written = [*params, *(local(param) for param in params if is_sharded(param))]
    return torch.autograd.grad_mode._unsafe_preserve_version_counter(tuple(written))


@torch.no_grad()
def master_state_dict(model: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, Any]:
    """A copy of ``model.state_dict()`` with float32 master weights in place of the bfloat16 parameters that have them;
    all else comes as it is. Sharded weights stay sharded.

    Arguments:
        model: the model whose parameters the optimizers step.
        optimizers: :class:`PACE`, :class:`MADA` or :class:`ScheduleFreeAdamW` with ``master_weight_bits``.

    Raises:
        RuntimeError: a step is half done; averages are swapped in.

    >>> import torch, pace_kernels
    >>> model = torch.nn.Linear(4, 1).bfloat16()
    >>> optimizer = pace_kernels.PACE(model.parameters(), master_weight_bits=32)
    >>> pace_kernels.master_state_dict(model, optimizer)["weight"].dtype
    torch.float32
    """
    masters: dict[int, Tensor] = {}
    for optimizer in _checked(optimizers, "master_state_dict()"):
        with optimizer._opened("master_state_dict()") as inner:
            inner._require_whole("master_state_dict()")
            inner._require_live("master_state_dict()")
            for group in inner.param_groups:
                wanted = inner._wanted(group)
                for param in group["params"]:
                    if formats_of(wanted, param).weight:
                        owner = optimizer._owner(param)
                        masters[id(owner)] = in_float(param, inner.state.get(param, {})).to(owner.device)
    saved: dict[str, Any] = model.state_dict(keep_vars=True)
    for name, value in list(saved.items()):
        saved[name] = masters[id(value)] if id(value) in masters else _exported(value, False)
    return saved


def _exported(value: Any, full: bool) -> Any:
    """A copy of an entry, also within dicts and lists: it may be a view of the weights. Dense tensors become
    contiguous; sparse and quantized ones stay as they are, as do lazy ones, which hold nothing yet."""
    if isinstance(value, dict):
        copied = copy.copy(value)  # of its class and with its attributes, as the _metadata of state dicts
        for key, inner in value.items():
            copied[key] = _exported(inner, full)
        return copied
    if type(value) in (list, tuple):
        return type(value)(_exported(inner, full) for inner in value)
    if not isinstance(value, Tensor) or torch.nn.parameter.is_lazy(value):
        return value
    value = gathered(value.detach()) if full else value.detach()  # a replicated DTensor is gathered without a copy
    dense = value.layout is torch.strided and not value.is_quantized
    check_whole((local(value),))
    return value.clone(memory_format=torch.contiguous_format) if dense else value.clone()


def _checked(optimizers: Sequence[Any], what: str) -> list[Any]:
    from .offload import Offload

    if not optimizers:
        raise TypeError(f"{what} needs the model and at least one optimizer")
    chosen = []
    for i, optimizer in enumerate(optimizers):
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper
        if not isinstance(optimizer, (Averaging, Offload)):
            kinds = "PACE, MADA, Pullback, ScheduleFreeAdamW or an Offload of one"
            raise TypeError(f"{what}: optimizers[{i}] must be {kinds}, got {type(optimizer).__name__}")
        chosen.append(optimizer)
    return chosen
