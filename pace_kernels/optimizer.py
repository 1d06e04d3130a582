"""The base of every optimizer here: parameter groups, the parameters to step, the step.

A subclass adds what its rule needs: option checks, the names of its state tensors, and the operator's arguments. The
average is in averaging.py, states are in fitting.py, checkpoints in checkpoints.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import ParamsT

from .backend import choose, requested
from .checks import Group, check_lr, check_number, lr_is_zero, overlaps_itself, require
from .formats import HASH, REMAINDER, asked, formats_of, whole_name
from .memory import check_whole
from .nonfinite import SkippingNonfinite
from .options import Record, check_given, check_spelling, make_plain, shown
from .planning import Plans, is_observed
from .report import Memory, memory_of
from .sharding import (
    Axes,
    axes,
    is_partial,
    is_sharded,
    is_wrapper,
    local,
    local_as,
    reduce_,
)
from .states import FLOATING, GROUP_STATE, PLAIN, Formats, Work, moved, state_dtype
from .torch_rules.common import by_graph, has_values
from .whole import at_once, each

_NO_AXES: Axes = ()
# What torch 2.10 has under the second name, a later torch under the first; there the second warns.
_HEALTH_CHECKS = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")


class KernelOptimizer(SkippingNonfinite):
    """Base class; not for direct use."""

    # True with fused=True, as in torch.optim: torch.amp.GradScaler then sets the attributes grad_scale and found_inf
    # for the time of a step, and leaves it to the step to unscale the gradients, and to do nothing where one is not
    # finite. Lightning clips gradients by itself only where this is False.
    _step_supports_amp_scaling = False
    _health_check = getattr(torch.optim.Optimizer, next(n for n in _HEALTH_CHECKS if hasattr(torch.optim.Optimizer, n)))

    # Whether gradients are operands of the step. Where they are not, having one is what puts a parameter into a step.
    _READS_GRADIENTS: ClassVar[bool] = True

    def __init__(self, params: ParamsT, defaults: dict[str, Any], backend: str | None) -> None:
        self._backend_name = requested(backend)
        self._dry = False
        self._incoming = None
        self._records, self._changed, self._unchecked = {}, [], set()
        self._versions, self._left, self._dtypes = {}, {}, {}
        self._unfinished = []
        self._apart, self._twins, self._askew, self._counting = set(), set(), False, []
        self._plans = Plans()
        # Part of the groups, because that is what every kind of checkpoint carries.
        super().__init__(params, {**defaults, **GROUP_STATE})

    # ---- groups and state ------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group with its own options, also during training. See ``torch.optim.Optimizer``."""
        if isinstance(param_group, dict):
            name, kind = f"param_groups[{len(self.param_groups)}]", type(self).__name__
            check_given(param_group, self.defaults, name, kind)
            check_spelling(param_group, self.defaults, name, kind)
            param_group = self._completed(param_group)
        self._plans.end()
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            make_plain(group, self.defaults)
            self._check_options(group)
            for i, param in enumerate(group["params"]):
                if param.requires_grad:
                    self._check_param(param, self._name(group, i))
                else:  # frozen, of any dtype and layout: checked once it has a gradient
                    self._unchecked.add(id(param))
            if len(set(group["params"])) < len(group["params"]):
                raise ValueError("params has the same parameter more than once in one group")
            self._check_overlaps()
        except Exception:
            self.param_groups.pop()
            raise

    def _completed(self, param_group: Group) -> Group:
        """The group with those of its options that are not the optimizer's defaults."""
        return param_group

    def _record(self, group: Group) -> Record:
        """The record of the group's last check, even if its dict was replaced by a copy."""
        record = self._records.get(id(group))
        if record is None or not record.is_of(group):
            if group["params"]:
                record = next((kept for kept in self._records.values() if kept.is_of(group)), record)
            here = {id(known) for known in self.param_groups}
            self._records = {key: kept for key, kept in self._records.items() if key in here}
            record = self._records[id(group)] = record or Record()
            record.follow(group)
        return record

    def _check_param(self, param: Tensor, name: str) -> None:
        if param.layout is not torch.strided:
            raise ValueError(f"{name} is {param.layout}: parameters must be dense")
        if param.dtype not in FLOATING:
            raise ValueError(f"{name} is {param.dtype}: parameters must be one of {', '.join(map(str, FLOATING))}")
        if is_partial(param):
            raise ValueError(f"{name} is a DTensor with Partial placements: parameters must be replicated or sharded")
        if not is_lazy(param) and overlaps_itself(local(param)):
            raise ValueError(f"{name} overlaps itself in memory (strides {local(param).stride()}): clone it")
        if self._backend_name is not None:
            choose(self._backend_name, param.device, param.dtype, is_wrapper(local(param)))

    def _local_grad(self, param: Tensor, grad: Tensor, group: Group, i: int) -> Tensor:
        """The local part of a DTensor's gradient, placed as the parameter is."""
        if not is_sharded(grad):
            name = self._name(group, i)
            raise RuntimeError(f"the gradient of {name} is a plain tensor: it must be a DTensor like the parameter")
        if grad.shape != param.shape:
            shapes = f"{tuple(grad.shape)}, not {tuple(param.shape)}"
            raise RuntimeError(f"the gradient of {self._name(group, i)} has shape {shapes}")
        return local_as(param, grad)

    def _check_grad(self, param: Tensor, grad: Tensor, name: str) -> None:
        if is_sharded(grad):
            raise RuntimeError(f"the gradient of {name} is a DTensor, the parameter is not")
        if grad.layout is not torch.strided:
            raise RuntimeError(f"the gradient of {name} is {grad.layout}: gradients must be dense")
        if grad.shape != param.shape:
            raise RuntimeError(f"the gradient of {name} has shape {tuple(grad.shape)}, not {tuple(param.shape)}")
        if grad.device != param.device:
            raise RuntimeError(f"the gradient of {name} is on {grad.device}, not on {param.device}")
        if grad.dtype not in (param.dtype, state_dtype(param)):
            raise RuntimeError(f"the gradient of {name} is {grad.dtype}, not {param.dtype} or {state_dtype(param)}")

    def _check_changed(self, group: Group) -> None:
        """Checks the options that were replaced or edited in place since the last step: usually none, or only lr.
        Checking them all takes longer than the rest of a small step."""
        record = self._record(group)
        if changed := record.changed(group):
            make_plain(group, self.defaults)
            if not self._MOVING.issuperset(changed):
                self._check_options(group)
                self._changed.append(group)
            record.keep(group)
        check_lr(group["lr"])

    def _settle(self, groups: list[Group]) -> None:
        """Prepares groups whose options changed, once all are checked; it may raise before it changes anything."""
        for group in groups:
            self._record(group).prepared = None
            self._drop_unused(group)

    def _drop_unused(self, group: Group) -> None:
        """Drops a state whose option was turned off: it would be stale when the option comes back, so it starts
        anew."""
        used = {*self._state_tensors(group), REMAINDER}
        unused = {name for name in (*self._STATE_TENSORS, *self._STATE_ROWS) if whole_name(name) not in used}
        if "ema" in unused:
            unused.add(HASH)
        for param in group["params"]:
            for name in unused & self.state.get(param, {}).keys():
                del self.state[param][name]

    def _scaling(self, clip_coef: Tensor | float | None) -> dict[str, Tensor]:
        """The checked arguments of mixed precision and clipping: float32 tensors with one element."""
        given = {
            "grad_scale": getattr(self, "grad_scale", None),
            "clip_coef": self._plans.clip_coef if clip_coef is None else clip_coef,
            "found_inf": getattr(self, "found_inf", None),
        }
        scaling = {}
        for name, value in given.items():
            if value is None:
                continue
            if not isinstance(value, Tensor):
                check_number(name, value, "finite and >= 0", lambda a: a >= 0)
                value = torch.tensor(float(value), dtype=torch.float32, device="cpu")
            require(value.numel() == 1, name, "a number or a tensor with one element", value)
            check_whole((value,))
            scaling[name] = value.detach().to(torch.float32)
        return scaling

    def _collect(self, scaling: dict[str, Tensor]) -> list[Work]:
        """The checked parameters to step. If this raises, nothing has changed."""
        works: list[Work] = []
        here: dict[torch.device, dict[str, Tensor]] = {}
        unchecked = self._unchecked
        for group in self.param_groups:
            self._check_changed(group)
            wanted, formats = asked(group), PLAIN
            buckets: dict[tuple[torch.device, torch.dtype, Axes, bool, Formats], Work] = {}
            device, dtype, work = None, None, None
            over: Axes = ()
            wraps = False
            for i, owner in enumerate(group["params"]):
                grad = owner.grad
                if grad is None:
                    continue
                if unchecked and id(owner) in unchecked:
                    self._check_param(owner, self._name(group, i))
                    unchecked.discard(id(owner))
                param, its_axes = owner, _NO_AXES
                if is_sharded(owner):
                    param, its_axes = local(owner), axes(owner)
                    if self._READS_GRADIENTS:
                        grad = self._local_grad(owner, grad, group, i)
                wrapper = is_wrapper(param)
                its_formats = PLAIN if wanted is PLAIN else formats_of(wanted, owner)
                if (
                    work is None
                    or param.dtype is not dtype
                    or param.device != device
                    or its_axes != over
                    or wrapper is not wraps
                    or its_formats != formats
                ):
                    device, dtype, over, wraps, formats = param.device, param.dtype, its_axes, wrapper, its_formats
                    work = buckets.get((device, dtype, over, wraps, formats))
                    if work is None:
                        if device not in here:
                            here[device] = {k: moved(v, device) for k, v in scaling.items()}
                        backend = choose(self._backend_name, device, dtype, wraps)
                        work = Work(group, backend, here[device], over, formats)
                        buckets[device, dtype, over, wraps, formats] = work
                work.owners.append(owner)
                work.params.append(param)
                if not self._READS_GRADIENTS:
                    continue
                if (
                    grad.dtype is not dtype
                    or grad.layout is not torch.strided
                    or grad.shape != param.shape
                    or grad.device != device
                    or (param is owner and is_sharded(grad))
                ):
                    self._check_grad(param, grad, self._name(group, i))
                work.grads.append(grad)
            works += buckets.values()
        if self._changed:
            self._settle(self._changed)
            self._changed = []
        return works

    def _keeps_average(self, group: Group) -> bool:
        return "ema" in self._state_tensors(group)

    def memory(self) -> Memory:
        """The bytes of weights, gradients and states by tensor on this rank, which states are compressed, and why the
        others are not; which backend steps each tensor, and why not a faster one. Before the first step it reports what
        they will be. Print it at the start of a run: it is a summary then.

        >>> optimizer = pace_kernels.PACE(torch.nn.Linear(64, 64).parameters(), state_bits=8)  # doctest: +SKIP
        >>> print(optimizer.memory())  # doctest: +SKIP
        """
        return memory_of(self)

    def __repr__(self) -> str:
        return shown(type(self).__name__, self.param_groups, {*GROUP_STATE, *self._BOOKS})

    # ---- the step --------------------------------------------------------------------------------------------------

    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, clip_coef: Tensor | float | None = None
    ) -> Any:
        """Takes one step. ``closure`` recomputes the loss, as in ``torch.optim``; the step returns its value.

        ``clip_coef`` (>= 0, a number or a tensor with one element, on any device) multiplies the gradients within the
        pass, so that clipping by :func:`pace_kernels.clip_coefficient` costs no pass of its own; the gradients
        themselves stay unchanged. The step does not read the coefficient back from its device.
        """
        observed = is_observed(self)
        # A subclass with a step of its own has torch's hooks around that one.
        if observed and type(self).step is KernelOptimizer.step:
            given: dict[str, Any] = {} if clip_coef is None else {"clip_coef": clip_coef}
            return self._observed_step(*(() if closure is None else (closure,)), **given)
        if closure is None and not observed and self._plans.next is not None:
            scales = clip_coef is not None or self._plans.clip_coef is not None
            scales = scales or hasattr(self, "found_inf") or hasattr(self, "grad_scale")
            if self._again(self._scaling(clip_coef) if scales else {}):
                return None
        return self._unobserved_step(closure, clip_coef=clip_coef)

    # torch's own wrapper, of hooks and a profiler's range, takes 12 µs: here it is around what needs it.
    step.hooked = True  # type: ignore[attr-defined]

    @torch.no_grad()
    def _unobserved_step(
        self, closure: Callable[[], Any] | None = None, *, clip_coef: Tensor | float | None = None
    ) -> Any:
        self._health_check()
        self._require_whole("step()")
        self._require_live("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            self._require_whole("step() with a closure that returns")
            self._require_live("step() with a closure that returns")
        self._step(clip_coef)
        return loss

    _observed_step = torch.optim.Optimizer.profile_hook_step(_unobserved_step)

    # One operator call a group is all there is to compile: torch.compile runs it as it is, between its graphs.
    # The mark is torch.optim's: torch.compiler.disable would load torch._dynamo and triton here, at import: 2.4 s.
    @_disable_dynamo
    def _step(self, clip_coef: Tensor | float | None = None) -> None:
        scaling = self._scaling(clip_coef)
        if self._again(scaling):
            return
        works = self._collect(scaling)
        if not self.state and self._is_dry_run(works):
            for work in works:
                self._states(work)
            self._dry = True
            at_once(self._entering(works)[0])
            return
        self._forget_dry_run()
        self._find_nonfinite(works)
        self._run(works)

    def _is_dry_run(self, works: list[Work]) -> bool:
        """torch.distributed.checkpoint creates empty states by a first step with zero gradients and lr = 0. Such a step
        leaves everything as a real first step expects it, and is not counted. If a warm-up starts at lr = 0, this check
        waits for the device once."""
        if not works or not all(lr_is_zero(group["lr"]) for group in self.param_groups):
            return False
        if not all(has_values(grad) for work in works for grad in work.grads):
            return False  # there is nothing to tell it by
        check_whole(grad for work in works for grad in work.grads)
        moves = [float(_any_nonzero(work)) for work in works]
        # All ranks have to take the step for the same: on some of them a shard may have no gradient but zeros.
        sharded = [(torch.tensor(a, device=work.device), work.axes) for a, work in zip(moves, works, strict=True)]
        rows = [(row, over) for row, over in sharded if over]
        reduce_(rows, "MAX")
        return not (any(moves) or any(bool(row) for row, _ in rows))

    def _forget_dry_run(self) -> None:
        """Drops the states of a dry run, so that averages start at the weights as they are now."""
        if self._dry:
            empty = [p for p, state in self.state.items() if "step" in state and state["step"].item() == 0]
            at_once([each(dict.clear, [self.state[param] for param in empty])])
            for param in empty:
                del self.state[param]
            self._dry = False


def _any_nonzero(work: Work) -> bool:
    """Whether any gradient of the work is not zero. It waits for the device; with graphs, once."""
    found = (grad.any() for grad in work.grads)
    return bool(torch.stack(list(found)).any()) if by_graph(work.device) else any(map(bool, found))
