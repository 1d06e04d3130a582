"""The whole optimizer in host memory: weights and gradients are copied to and fro, and the CPU's kernels step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from .checks import Group, check_number, check_switch, require, shortened
from .holding import Holding
from .optimizer import KernelOptimizer
from .pace import PACE
from .pullback import Pullback
from .report import Memory
from .sharding import local
from .states import EMA_DEVICE
from .twins import Twin, Twins

_FACTORY = "Pass a class, as Offload(params, PACE, lr=1e-3), or a function of the groups that it makes the optimizer of"
# What of a group needs all gradients in one call, though PACE steps each parameter by itself.
_TOGETHER = ("skip_nonfinite", "log_stats")


class Offload(Holding):
    """PACE, MADA, ScheduleFreeAdamW or Pullback with states in host memory, where the CPU's kernels step: a GPU then
    holds weights and gradients alone.

    ::

        backward():  gradients are copied to pinned memory, beside the backward pass, as they come
        step():      a thread steps them there, bucket by bucket, as they are there, and copies the weights back

    Weights, averages and states have the bits that the optimizer has on a CPU without ``Offload``. ``param_groups``
    hold your parameters and all options. Schedulers, closures, hooks, clipping (``clip_coef``, or in place by
    ``torch.nn.utils.clip_grad_norm_``), accumulation of gradients, ``GradScaler``, ``averaged()``, the exports and
    ``memory()`` work as with the optimizer inside. So do checkpoints, which have its keys: they go to a run
    without ``Offload`` and back. A weight that other code writes, as ``load_state_dict()`` of the model, is copied
    anew. Writes that torch does not count, as through ``.data``, are refused: see ``check_writes``.

    Arguments:
        params: parameters, named parameters, or groups of them, as the optimizer takes them. A group may have its own
            ``fraction``.
        optimizer_class: a class, or a function that makes the optimizer of groups, as
            ``lambda groups: Pullback(torch.optim.AdamW(groups, lr=1e-3))``.
        fraction: of the elements of each group, in [0, 1], that is stepped in host memory; the last registered
            parameters, whose gradients come first. The others keep their states on their device and are stepped there,
            in the same ``step()``. So are those that are frozen when they come, empty, or no dense piece of memory.
        bucket_bytes: bytes of weights that are stepped together, ≥ 1. All are one bucket where the optimizer computes
            something of all gradients: in MADA, ScheduleFreeAdamW and Pullback, with ``skip_nonfinite`` and
            ``log_stats``, and in a first step.
        overlap: whether gradients are copied during ``backward()``. With False ``step()`` copies them, for code that
            writes gradients afterwards in ways that torch does not count, as by ``p.grad.data.clamp_(-1, 1)``. So it
            does on several ranks, where DistributedDataParallel averages gradients afterwards.
        check_writes: whether such writes to gradients, and to weights since the last step, are looked for, by sums of
            bits: each step then reads weights and gradients twice on the device, 16 bytes per float32 parameter. With
            False they are lost.
        options: of ``optimizer_class``.

    Raises:
        ValueError, TypeError: an argument is out of its range, or is no such optimizer; two parameters share memory; a
            parameter is sharded, lazy, or another subclass; a group has ``capturable`` or ``ema_device``.
        RuntimeError: as of the optimizer inside; something was written in a way that torch does not count. After an
            error half-way through the buckets all calls are refused until a checkpoint is loaded.

    >>> import torch
    >>> from pace_kernels import PACE, Offload
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = Offload(model.parameters(), PACE, lr=3e-3)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(8, 4)).square().mean().backward()
    ...     optimizer.step()
    >>> with optimizer.averaged(model):
    ...     loss = model(torch.ones(8, 4)).square().mean()
    """

    def __init__(
        self,
        params: ParamsT,
        optimizer_class: Callable[..., Any],
        *,
        fraction: float = 1.0,
        bucket_bytes: int = 2**26,
        overlap: bool = True,
        check_writes: bool = True,
        **options: Any,
    ) -> None:
        if not callable(optimizer_class):
            what = f"optimizer_class must be a class or a function, got {shortened(optimizer_class)}"
            raise TypeError(f"{what}. {_FACTORY}")
        check_number("bucket_bytes", bucket_bytes, ">= 1", lambda a: a >= 1)
        check_switch("overlap", overlap)
        check_switch("check_writes", check_writes)
        self._twins, self._fraction, self._bucket_bytes = Twins(overlap, check_writes), fraction, bucket_bytes
        given: list[Any] = [params] if isinstance(params, Tensor) else list(params)
        require(bool(given), "params", "parameters or groups of them", given)
        groups: list[Any] = given if given and isinstance(given[0], dict) else [{"params": given}]
        made = [self._stand_ins(group, f"param_groups[{i}]") for i, group in enumerate(groups)]
        inner = optimizer_class([group for group, _ in made], **options)
        if not isinstance(inner, (KernelOptimizer, Pullback)):
            raise TypeError(
                f"optimizer_class must make a PACE, MADA, ScheduleFreeAdamW or Pullback, got {type(inner).__name__}. "
                f"{_FACTORY}, as lambda groups: Pullback(torch.optim.AdamW(groups), lambda_pullback=0)"
            )
        twins = [twin for _, some in made for twin in some]
        stepped = [tensor for group in inner.param_groups for tensor in group["params"]]
        if list(map(id, stepped)) != [id(twin.tensor) for twin in twins]:
            raise TypeError(f"optimizer_class must make the optimizer of the groups that it gets. {_FACTORY}")
        for group in inner.param_groups:
            _check_group(group)
        self._inner, inner.__dict__["_is_held"] = inner, True
        self._set_up()
        self._twins.enter(twins)
        for group, (_, some) in zip(inner.param_groups, made, strict=True):
            group["params"] = [twin.owner for twin in some]
        inner._MOST_PLANS = len(twins) + 2  # type: ignore[union-attr]  # buckets, at the most
        with self._inside("Offload()"):
            pass

    def _stand_ins(self, group: Any, name: str) -> tuple[Group, list[Twin]]:
        """The group with what is stepped in place of its parameters."""
        if not isinstance(group, dict) or "params" not in group:
            raise TypeError(f"{name} must be a dict with 'params', got {shortened(group)}")
        params = group["params"]
        entries = [params] if isinstance(params, Tensor) else list(params)
        named = [
            entry if isinstance(entry, tuple) else (f"{name}['params'][{i}]", entry) for i, entry in enumerate(entries)
        ]
        for given, param in named:
            if not isinstance(param, Tensor):
                raise TypeError(f"{given} must be a tensor, got {type(param).__name__}")
            if param.requires_grad and not param.is_leaf:
                raise ValueError(f"{given} is no leaf: it was computed from others, and gets no gradient")
        twins = self._twins.made(named, group.get("fraction", self._fraction))
        there: list[Any] = [twin.tensor for twin in twins]
        if any(isinstance(entry, tuple) for entry in entries):
            there = [(given, tensor) for (given, _), tensor in zip(named, there, strict=True)]
        return {**{k: v for k, v in group.items() if k != "fraction"}, "params": there}, twins

    def __repr__(self) -> str:
        twins = self._twins.order
        return f"Offload({self._inner!r}, {sum(t.away for t in twins)} of {len(twins)} parameters in host memory)"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "an Offload can't be copied or pickled: its hooks are on parameters. Load its state_dict() into another one"
        )

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group, with options and a ``fraction`` of its own, also in the middle of training."""
        group, twins = self._stand_ins(param_group, f"param_groups[{len(self._inner.param_groups)}]")
        with self._inside("add_param_group()") as put:
            self._inner.add_param_group(group)
            added = self._inner.param_groups[-1]
            try:
                _check_group(added)
            except Exception:
                self._inner.param_groups.pop()
                raise
            self._twins.enter(twins)
            put.append(added)
            self._inner._MOST_PLANS += len(twins)  # type: ignore[union-attr]

    def memory(self) -> Memory:
        """As of the optimizer inside; what is in host memory apart."""
        with self._inside("memory()"):
            memory = self._inner.memory()
        found = []
        for tensor, twin in zip(memory.tensors, self._twins.order, strict=True):
            grad, states = twin.owner.grad, sum(tensor.states.values())
            tensor = replace(tensor, gradient=0 if grad is None else local(grad).nbytes)
            if twin.away:
                copies = tensor.weight + (0 if twin.gradient is None else twin.gradient.nbytes)
                where = f"cpu, for {twin.owner.device}"
                tensor = replace(tensor, host=states + copies, away=states, device=where, why_backend=None)
            found.append(tensor)
        return Memory(f"Offload({memory.kind})", tuple(found))

    # ---- the step ----------------------------------------------------------------------------------------------------

    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, clip_coef: Tensor | float | None = None
    ) -> Any:
        """Takes one step; see :meth:`PACE.step`. It returns when the last bucket is stepped and on its way back: what
        is asked of the current stream next comes behind it. An interrupt is raised once the step is done."""
        self._require_live()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            self._require_live()
        self._step(clip_coef)
        return loss

    def _require_live(self) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("Offload.step() while a CUDA graph is captured, which runs nothing on the host")
        self._inner._require_whole("step()")
        self._inner._require_live("step()")

    @_disable_dynamo
    @torch.no_grad()
    def _step(self, clip_coef: Tensor | float | None) -> None:
        given: dict[str, Any] = {} if clip_coef is None else {"clip_coef": _on_host(clip_coef)}
        scaling: dict[str, Any] = {
            name: _on_host(vars(self)[name]) for name in ("grad_scale", "found_inf") if name in vars(self)
        }
        twins, inner = self._twins, self._inner
        with self._inside("step()"):
            for group in inner.param_groups:
                _check_group(group)
            buckets = self._buckets(self._gradients(untouched=scaling.get("grad_scale") is not None))
            vars(inner).update(scaling)
            twins.look()
            after, contexts = twins.events(), twins.contexts()
            stepped = 0

            def job() -> None:
                nonlocal stepped
                with ExitStack() as stack:
                    for context in contexts:
                        stack.enter_context(context)
                    for bucket in buckets:
                        twins.put_gradients(bucket)
                        if len(buckets) == 1:  # which had to wait for all gradients: so nothing has changed yet
                            twins.check_looks()
                        inner.step(**given)
                        stepped += 1
                        twins.check_looks()
                        twins.send_back(bucket, after)

            try:
                interrupt = twins.do(job)
            finally:
                twins.wait(None)  # once more, for an interrupt right behind another
                twins.follow()
                for name in scaling:
                    vars(inner).pop(name, None)
                twins.forget_gradients(stepped=True)
            failed, twins.worker.failed = twins.worker.failed, None
            if failed is not None:
                if stepped and not inner._unfinished:
                    inner._unfinished.append("step")  # until a checkpoint is loaded
                raise failed
        if interrupt is not None:
            raise interrupt

    def _gradients(self, untouched: bool) -> list[Twin]:
        """The parameters with gradients, checked; those that are not there yet are sent on their way."""
        found = []
        groups = ((group, i) for group in self._inner.param_groups for i in range(len(group["params"])))
        for (group, i), twin in zip(groups, self._twins.order, strict=True):
            grad = twin.owner.grad
            if grad is None:
                continue
            if twin.away:
                KernelOptimizer._check_grad(cast(Any, self._inner), twin.owner, grad, self._inner._name(group, i))
            found.append((twin, grad))
        for twin, grad in found:
            if twin.away and not self._twins.is_copied(twin, grad, untouched):
                self._twins.fetch(twin, grad)
        return [twin for twin, _ in found]

    def _buckets(self, twins: list[Twin]) -> list[list[Twin]]:
        """In the order in which their gradients came; one with all of them where one call has to see them."""
        inner = self._inner
        together = not isinstance(inner, PACE) or any(group[name] for group in inner.param_groups for name in _TOGETHER)
        # A step drops the averages of all frozen parameters, also of those that it steps with a gradient of before.
        together = together or not all(twin.owner.requires_grad for twin in twins)
        if together or not all(inner.state.get(twin.tensor) for twin in twins):  # type: ignore[union-attr]
            return [twins]
        here = set(map(id, twins))
        buckets, held = [[twin for twin in twins if not twin.away]], self._bucket_bytes
        for twin in reversed([twin for twin in self._twins.order if twin.away]):
            if held >= self._bucket_bytes:
                buckets.append([])
                held = 0
            held += twin.tensor.nbytes
            if id(twin) in here:
                buckets[-1].append(twin)
        buckets = [bucket for bucket in buckets if bucket] or [[]]
        return sorted(buckets, key=lambda bucket: max((twin.place for twin in bucket if twin.away), default=-1))


def _check_group(group: Group) -> None:
    if group.get("capturable"):
        raise ValueError("Offload needs capturable=False: a CUDA graph runs nothing on the host")
    if group.get(EMA_DEVICE) is not None:
        raise ValueError(f"{EMA_DEVICE} must be None in an Offload, which has the averages in host memory anyway")


def _on_host(value: Any) -> Any:
    """What the host reads; of a device it waits for it once, instead of once a bucket."""
    return value.detach().cpu() if isinstance(value, Tensor) else value
