"""The base of every optimizer here: parameter groups, state, checkpoints, the swap of weights and average, the checks.

A subclass brings what its rule needs: option checks, the names of its state tensors, and the operator's arguments.
"""

from __future__ import annotations

import math
import numbers
import operator
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import ParamsT

from .backend import Backend, choose, requested
from .sharding import (
    Axes,
    agree,
    all_reduce_,
    axes,
    gathered,
    is_partial,
    is_sharded,
    local,
    local_as,
    on_first_rank,
    placed_alike,
    reduce_,
)

Group: TypeAlias = dict[str, Any]

# Of the groups and states in a checkpoint. 1: the first that says so. What has none is of before (0) or of another
# optimizer; the states of 0 have the same names and meaning.
FORMAT = 1

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Options that torch.optim.Adam and AdamW keep in their groups and that mean nothing here.
_FOREIGN_OPTIONS = ("amsgrad", "foreach", "fused", "differentiable", "decoupled_weight_decay")
# State of the published pace-optimizer: the same tensors under other names. `theta` is its copy of the live weights.
_FOREIGN_NAMES = {"m": "exp_avg", "v": "exp_avg_sq"}
_FOREIGN_STATE = {"theta", "last_ema_step", "max_exp_avg_sq"}
# What the groups hold beside options: whether the average is swapped in, the format of a checkpoint, how many steps
# skip_nonfinite left undone (a tensor that the groups share, once there is something to count), and, in checkpoints
# alone, the names that all states of the group have: what a checkpoint lost on its way can be told by them.
_GROUP_STATE: Group = {"swapped": False, "format_version": FORMAT, "skipped_steps": None, "state_names": None}
# Step counts are float32, which counts no further.
_LAST_STEP = 2**24
_NO_AXES: Axes = ()
# What torch 2.10 has under the second name, a later torch under the first; there the second warns.
_HEALTH_CHECKS = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on that device. A copy to the CPU has to be waited for, others do not."""
    return tensor.to(device, non_blocking=device.type != "cpu")


class uninterrupted:
    """Within this context a Ctrl-C waits. Python raises KeyboardInterrupt between any two of its instructions, so also
    between a kernel and what belongs to it: weights and states would then be of different steps."""

    def __enter__(self) -> None:
        self._handler, self._came, self._frame = None, False, None
        if threading.current_thread() is threading.main_thread():  # no other one gets it
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                self._handler = handler
                signal.signal(signal.SIGINT, self._later)

    def _later(self, number: int, frame: Any) -> None:
        self._came, self._frame = True, frame

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            if self._came:
                self._handler(signal.SIGINT, self._frame)


@dataclass
class Work:
    """The parameters of one group that step together: on one device, in one dtype, each with a gradient, and sharded
    over the same ``axes`` of a mesh, if they are.

    ``owners`` are the parameters as the group has them, which states belong to; ``params`` and ``grads`` what the
    kernels get: the same tensors, or of DTensors the local parts. ``scaling`` are the arguments grad_scale, clip_coef
    and found_inf of the operators, those that were given. ``on_device``: the step counts live on the parameters'
    device, and nothing may be read from it.
    """

    group: Group
    backend: Backend
    scaling: dict[str, Tensor]
    axes: Axes = ()
    owners: list[Tensor] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    on_device: bool = False

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    def lr(self) -> dict[str, Any]:
        """The learning rate as arguments of an operator; on a device it is not read."""
        lr = self.group["lr"]
        if not isinstance(lr, Tensor):
            return {"lr": plain_number(lr)}
        if lr.device.type == "cpu":
            return {"lr": lr.item()}
        return {"lr": 0.0, "lr_tensor": moved(lr, self.device)}

    def left_undone(self) -> bool:
        """Whether ``found_inf`` says so, as far as that can be told without waiting for a device."""
        found_inf = self.scaling.get("found_inf")
        return found_inf is not None and found_inf.device.type == "cpu" and bool(found_inf)


def state_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's states: float32, or float64 where the parameter is float64."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def as_state(param: Tensor, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of ``value`` as a state of ``param``: its device, memory layout and shards, in the dtype of states."""
    state = torch.empty_like(param, dtype=dtype or state_dtype(param), requires_grad=False)
    local(state).copy_(local_as(param, value))
    return state


def holds(param: Tensor, value: Tensor) -> bool:
    """Whether the parameter holds these values, on every rank that has a part of it."""
    here = local(param)
    return agree(torch.equal(local_as(param, value).to(here), here), here.device, axes(param))


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of a strided tensor share memory."""
    dims = sorted((st, sz) for sz, st in zip(tensor.shape, tensor.stride(), strict=True) if sz > 1)
    if tensor.numel() == 0 or not dims:
        return False
    reach = 0  # the last element that the narrower dimensions touch
    for stride, size in dims:
        if stride <= reach:
            break
        reach += stride * (size - 1)
    else:
        return False
    if dims[0][0] == 0:
        return True
    # Interleaved strides, as in as_strided((2, 3), (3, 2)), may or may not overlap: count the places.
    places = torch.zeros((), dtype=torch.int64)
    for stride, size in dims:
        places = places.unsqueeze(-1) + stride * torch.arange(size)
    return int(torch.unique(places).numel()) < tensor.numel()


def require(condition: bool, argument: str, allowed: str, came: object) -> None:
    if not condition:
        raise ValueError(f"{argument} must be {allowed}, got {came!r}")


def check_number(argument: str, value: object, allowed: str, ok: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{argument} must be a number, got {value!r}")
    require(math.isfinite(value) and ok(float(value)), argument, allowed, value)


def checked_count(name: str, value: Any, last: int) -> Tensor:
    """A count that was saved, as a tensor without dimensions."""
    allowed = f"one whole number >= 0 and <= {last}"
    if isinstance(value, Tensor):
        require(value.numel() == 1 and not value.is_complex() and not value.is_meta, name, allowed, value)
        count, number = value.detach().reshape(()), value.item()
    else:
        require(isinstance(value, numbers.Real), name, allowed, value)
        number = plain_number(value)
        count = torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else None)
    whole = not isinstance(number, bool) and math.isfinite(number) and number == int(number)
    require(whole and 0 <= number <= last, name, allowed, value)
    return count


def plain_number(value: Any) -> Any:
    """Numbers of other libraries, such as NumPy's, as Python's; everything else as it is."""
    if isinstance(value, (bool, int, float)) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def check_lr(lr: object) -> None:
    if isinstance(lr, Tensor):
        require(lr.numel() == 1, "lr", "a number or a tensor with one element", lr)
        if lr.device.type == "cpu":  # elsewhere, reading it would wait for the device
            check_number("lr", lr.item(), "finite and >= 0", lambda a: a >= 0)
        else:
            require(lr.dtype in (torch.float32, torch.float64), "lr", "float32 or float64 on a device", lr.dtype)
    else:
        check_number("lr", lr, "finite and >= 0", lambda a: a >= 0)


def check_common_options(group: Group) -> None:
    """The options that every optimizer here has: lr, betas, eps, weight_decay."""
    check_lr(group["lr"])
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
    for i in (0, 1):
        check_number(f"betas[{i}]", betas[i], "in [0, 1)", lambda a: 0 <= a < 1)
    # Below float32's normal numbers 1 / D could be infinite, and 0 times that is NaN.
    check_number("eps", group["eps"], "finite and at least 2**-126", lambda a: a >= 2.0**-126)
    check_number("weight_decay", group["weight_decay"], "finite and >= 0", lambda a: a >= 0)
    for name in ("maximize", "capturable", "skip_nonfinite"):
        require(isinstance(group[name], bool), name, "True or False", group[name])


def check_average_options(group: Group) -> None:
    """The options of the average and the pullback."""
    for name in ("lambda_pullback", "ema_rho", "ema_gamma"):
        check_number(name, group[name], "finite and >= 0", lambda a: a >= 0)
    check_number("beta_ema", group["beta_ema"], "in [0, 1]", lambda a: 0 <= a <= 1)
    if group["ema_kappa"] is not None:
        check_number("ema_kappa", group["ema_kappa"], "None, or finite and >= 0", lambda a: a >= 0)
    freq = group["ema_update_freq"]
    counts = isinstance(freq, numbers.Integral) and not isinstance(freq, bool) and int(freq) >= 1
    require(counts, "ema_update_freq", "an integer >= 1", freq)
    for name in ("clamp_pullback", "use_ema_eval"):
        require(isinstance(group[name], bool), name, "True or False", group[name])
    form = group["pullback_from"]
    require(form in ("weights", "step"), "pullback_from", '"weights" or "step"', form)


class KernelOptimizer(torch.optim.Optimizer):
    """Base class; not for direct use."""

    # torch.amp.GradScaler then sets the attributes grad_scale and found_inf for the time of a step, and leaves it to
    # the step to unscale the gradients, and to do nothing where one is not finite.
    _step_supports_amp_scaling = True
    _health_check = getattr(torch.optim.Optimizer, next(n for n in _HEALTH_CHECKS if hasattr(torch.optim.Optimizer, n)))

    # Whether gradients are operands of the step. Where they are not, having one is what puts a parameter into a step.
    READS_GRADIENTS: ClassVar[bool] = True
    # Names of the state tensors that this class of optimizer may keep, beside `step` and, while swapped, `live`.
    STATE_TENSORS: ClassVar[tuple[str, ...]] = ()
    # Names of small float64 states, with their number of elements.
    STATE_ROWS: ClassVar[dict[str, int]] = {}
    # An option that the groups of no other optimizer have: by it a checkpoint is known for one of this class.
    OWN_OPTION: ClassVar[str]

    _backend_name: str | None
    _dry: bool  # the states come from a dry run: the first real step creates them anew
    _incoming: dict[Tensor, dict[str, Tensor]] | None
    # By id of a group: the options as they were last checked, and what the subclass made of them but for lr.
    _checked: dict[int, list[object]]
    _prepared: dict[int, Any]
    _changed: list[Group]  # groups whose options were replaced, lr aside, since the last step

    def __init__(self, params: ParamsT, defaults: dict[str, Any], backend: str | None) -> None:
        self._backend_name = requested(backend)
        self._dry = False
        self._incoming = None
        self._checked, self._prepared, self._changed = {}, {}, []
        # Part of the groups, because that is what every kind of checkpoint carries.
        super().__init__(params, {**defaults, **_GROUP_STATE})

    # ---- what a subclass brings ------------------------------------------------------------------------------------

    def _check_options(self, group: Group) -> None:
        """Raises ValueError or TypeError where an option of the group is not allowed."""
        raise NotImplementedError

    def _state_tensors(self, group: Group) -> tuple[str, ...]:
        """The names of the state tensors that parameters of this group need."""
        raise NotImplementedError

    def _required_states(self, group: Group) -> tuple[str, ...]:
        """The names of states, beside `step`, without which another optimizer's checkpoint does not fit this one."""
        return ("exp_avg_sq",)

    def _launch(self, work: Work, states: dict[str, list[Tensor]]) -> None:
        """Calls the operator. ``states`` has `step` and each of `_state_tensors`, a list as long as the parameters."""
        raise NotImplementedError

    # ---- groups and state ------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, with options of its own; also in the middle of training. See ``torch.optim.Optimizer``."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_options(group)
            for i, param in enumerate(group["params"]):
                self._check_param(param, self._name(group, i))
            if len(set(group["params"])) < len(group["params"]):
                raise ValueError("params has the same parameter more than once in one group")
        except Exception:
            self.param_groups.pop()
            raise

    def _name(self, group: Group, i: int) -> str:
        if "param_names" in group:
            return f"parameter {group['param_names'][i]!r}"
        g = next(k for k, other in enumerate(self.param_groups) if other is group)
        return f"param_groups[{g}]['params'][{i}]"

    def _check_param(self, param: Tensor, name: str) -> None:
        if param.layout is not torch.strided:
            raise ValueError(f"{name} is {param.layout}: parameters must be dense")
        if param.dtype not in _FLOATING:
            raise ValueError(f"{name} is {param.dtype}: parameters must be one of {', '.join(map(str, _FLOATING))}")
        if is_partial(param):
            raise ValueError(f"{name} is a DTensor with Partial placements: parameters must be replicated or sharded")
        if not is_lazy(param) and overlaps_itself(local(param)):
            raise ValueError(f"{name} overlaps itself in memory (strides {local(param).stride()}): clone it")
        if self._backend_name is not None:
            choose(self._backend_name, param.device, param.dtype)

    def _local_grad(self, param: Tensor, grad: Tensor, group: Group, i: int) -> Tensor:
        """The local part of a DTensor's gradient, placed as the parameter is."""
        if not is_sharded(grad):
            name = self._name(group, i)
            raise RuntimeError(f"the gradient of {name} is a plain tensor: it must be a DTensor as the parameter is")
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
        """Checks the options that were replaced since the last step: as a rule none, or lr alone. Checking them all
        takes longer than the rest of a small step."""
        values, seen = list(group.values()), self._checked.get(id(group), [])
        if len(values) != len(seen) or not all(map(operator.is_, values, seen)):
            changed = [k for k, a, b in zip_longest(group, values, seen) if a is not b]
            if isinstance(group["betas"], list):
                group["betas"] = tuple(group["betas"])  # so that no change in place goes unseen
            if changed != ["lr"]:
                self._check_options(group)
                self._changed.append(group)
        check_lr(group["lr"])
        self._checked[id(group)] = values

    def _settle(self, groups: list[Group]) -> None:
        """Makes ready groups whose options changed, once all are checked; it may raise before it changes anything."""
        for group in groups:
            self._prepared.pop(id(group), None)
            self._drop_unused(group)

    def _drop_unused(self, group: Group) -> None:
        """A state that its option was turned off for would be stale when the option comes back: it starts anew then."""
        unused = {*self.STATE_TENSORS, *self.STATE_ROWS} - set(self._state_tensors(group))
        for param in group["params"]:
            for name in unused & self.state.get(param, {}).keys():
                del self.state[param][name]

    def _scaling(self, clip_coef: Tensor | float | None) -> dict[str, Tensor]:
        """What mixed precision and clipping hand over, checked: float32 tensors with one element."""
        given = {
            "grad_scale": getattr(self, "grad_scale", None),
            "clip_coef": clip_coef,
            "found_inf": getattr(self, "found_inf", None),
        }
        scaling = {}
        for name, value in given.items():
            if value is None:
                continue
            if not isinstance(value, Tensor):
                check_number(name, value, "finite and >= 0", lambda a: a >= 0)
                value = torch.tensor(float(value), dtype=torch.float32)
            require(value.numel() == 1, name, "a number or a tensor with one element", value)
            scaling[name] = value.detach().to(torch.float32)
        return scaling

    def _collect(self, scaling: dict[str, Tensor]) -> list[Work]:
        """What there is to step, checked: nothing has changed where this raises."""
        works: list[Work] = []
        here: dict[torch.device, dict[str, Tensor]] = {}
        for group in self.param_groups:
            self._check_changed(group)
            buckets: dict[tuple[torch.device, torch.dtype, Axes], Work] = {}
            device, dtype, work = None, None, None
            over: Axes = ()
            for i, owner in enumerate(group["params"]):
                grad = owner.grad
                if grad is None:
                    continue
                param, its_axes = owner, _NO_AXES
                if is_sharded(owner):
                    param, its_axes = local(owner), axes(owner)
                    if self.READS_GRADIENTS:
                        grad = self._local_grad(owner, grad, group, i)
                if work is None or param.dtype is not dtype or param.device != device or its_axes != over:
                    device, dtype, over = param.device, param.dtype, its_axes
                    work = buckets.get((device, dtype, over))
                    if work is None:
                        if device not in here:
                            here[device] = {k: moved(v, device) for k, v in scaling.items()}
                        backend = choose(self._backend_name, device, dtype)
                        work = buckets[device, dtype, over] = Work(group, backend, here[device], over)
                work.owners.append(owner)
                work.params.append(param)
                if not self.READS_GRADIENTS:
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

    def _states(self, work: Work) -> dict[str, list[Tensor]]:
        """The states of the work's parameters; what is missing is created."""
        names = ("step", *self._state_tensors(work.group))
        columns: dict[str, list[Tensor]] = {name: [] for name in names}
        for owner, param in zip(work.owners, work.params, strict=True):
            state = self.state[owner]
            if state:
                self._fit(owner, state, names[1], param is owner)
            for name in names:
                value = state.get(name)
                if value is None:
                    value = state[name] = self._initial(name, owner, work.group)
                columns[name].append(value if type(value) is Tensor else local(value))
        self._place_steps(work, columns["step"])
        return columns

    def _place_steps(self, work: Work, steps: list[Tensor]) -> None:
        """Step counts follow the parameters to their device, and stay there, where only it knows whether a step counts:
        with ``found_inf``; and with ``capturable``, where a captured graph advances them."""
        device = work.device
        work.on_device = work.group["capturable"]
        if device.type == "cpu":
            return
        away = [i for i, step in enumerate(steps) if step.device.type == "cpu"]
        work.on_device = work.on_device or "found_inf" in work.scaling or len(away) < len(steps)
        if work.on_device:
            for i in away:
                steps[i] = self.state[work.owners[i]]["step"] = moved(steps[i], device)

    def _fit(self, param: Tensor, state: dict[str, Tensor], name: str, plain: bool) -> None:
        """States follow a parameter whose dtype or shards were changed by hand; a change of its shape is refused."""
        value = state.get(name)
        if value is None:  # options changed: it will be created
            value = next((state[key] for key in self.STATE_TENSORS if key in state), None)
        if value is None:
            return
        placed = type(value) is Tensor if plain else is_sharded(value) and placed_alike(value, param)
        if placed and value.dtype is state_dtype(param) and value.shape == param.shape:
            return
        if value.shape != param.shape:
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} has a state of shape {tuple(value.shape)}: was it resized?"
            )
        for key in self.STATE_TENSORS:
            if key in state:
                state[key] = as_state(param, state[key])

    def _initial(self, name: str, param: Tensor, group: Group) -> Tensor:
        if name == "step":
            return torch.zeros((), dtype=torch.float32, device=param.device if group["capturable"] else "cpu")
        if name == "ema":
            return as_state(param, param)
        zeros = torch.empty_like(param, dtype=state_dtype(param), requires_grad=False)
        local(zeros).zero_()
        return zeros

    # ---- the step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, clip_coef: Tensor | float | None = None
    ) -> Any:
        """One optimization step. ``closure`` recomputes the loss, as in ``torch.optim``; its value is returned.

        ``clip_coef`` (>= 0, a number or a tensor with one element, on any device) multiplies the gradients within the
        pass, so that clipping them by :func:`pace_kernels.clip_coefficient` costs no pass of its own; the gradients
        themselves stay as they are. It is not read back from its device.
        """
        self._health_check()
        self._require_live("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            self._require_live("step() with a closure that returns")
        self._step(clip_coef)
        return loss

    # One operator call a group is all there is to compile: torch.compile runs it as it is, between its graphs.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _step(self, clip_coef: Tensor | float | None = None) -> None:
        with uninterrupted():
            works = self._collect(self._scaling(clip_coef))
            if not self.state and self._is_dry_run(works):
                for work in works:
                    self._states(work)
                self._dry = True
                return
            self._forget_dry_run()
            self._find_nonfinite(works)
            if len(works) > 1:  # one operator call refuses before it writes, but not for those before it
                for work in works:
                    self._check_memory(chain(work.params, work.grads))
            prepared = [(work, self._states(work)) for work in works]
            self._launch_all(prepared)

    def _launch_all(self, prepared: list[tuple[Work, dict[str, list[Tensor]]]]) -> None:
        for work, states in prepared:
            self._launch(work, states)
            torch.autograd.graph.increment_version(work.params)
            if work.axes:
                torch.autograd.graph.increment_version(work.owners)

    def _find_nonfinite(self, works: list[Work]) -> None:
        """With ``skip_nonfinite``, makes the whole step one that is left undone where a gradient of such a group is not
        finite, on whichever rank: as if a gradient scaler had found it. Counts it. Nothing waits for a device."""
        self._nonfinite = None
        watched = [work for work in works if work.group["skip_nonfinite"]]
        ranks = self._ranks() if any(group["skip_nonfinite"] for group in self.param_groups) else None
        if not watched and ranks is None:
            return
        found = [self._largest(work) for work in watched] or [torch.zeros(())]
        reduce_(((value, work.axes) for value, work in zip(found, watched, strict=False)), "MAX")
        home = found[0].device
        bad = torch.stack([moved(value, home) for value in found]).amax()
        if ranks is not None:
            all_reduce_([bad], ranks, "MAX")
        self._nonfinite = bad
        for scaling in {id(work.scaling): work.scaling for work in works}.values():
            if "found_inf" in scaling:
                bad = torch.maximum(bad, (moved(scaling["found_inf"], home) != 0).to(bad.dtype).reshape(()))
        count = next((g["skipped_steps"] for g in self.param_groups if g["skipped_steps"] is not None), None)
        count = torch.zeros((), dtype=torch.int64) if count is None else count
        count = moved(count, home)
        count += bad.to(torch.int64)
        for group in self.param_groups:
            if group["skipped_steps"] is not count:
                group["skipped_steps"] = count
                self._checked.pop(id(group), None)
        for work in works:
            work.scaling["found_inf"] = moved(bad, work.device)

    def _ranks(self) -> Any:
        """A process group whose ranks hold other parameters than this one, as plain tensors; None: there is none."""
        return None

    @staticmethod
    def _largest(work: Work) -> Tensor:
        """1 where a gradient of the work is not finite, otherwise 0; float32. It reads each gradient once."""
        grads = [grad for grad in work.grads if grad.numel() > 0]
        if not grads:
            return torch.zeros((), dtype=torch.float32, device=work.device)
        largest = torch.stack(torch._foreach_norm(grads, math.inf))
        return (~largest.isfinite()).any().to(torch.float32)

    @property
    def skipped_steps(self) -> int:
        """How many steps ``skip_nonfinite`` left undone. Reading waits for the device."""
        counts = [group["skipped_steps"] for group in self.param_groups if group["skipped_steps"] is not None]
        return int(counts[0]) if counts else 0

    def _is_dry_run(self, works: list[Work]) -> bool:
        """torch.distributed.checkpoint creates empty states by a first step with zero gradients and lr = 0. Such a step
        leaves all as a real first step expects it: no step is counted. Where a warm-up starts at lr = 0, asking waits
        for the device, once."""
        if not works or not all(self._lr_is_zero(group["lr"]) for group in self.param_groups):
            return False
        moves = [float(any(bool(grad.any()) for grad in work.grads)) for work in works]
        # All ranks have to take the step for the same: on some of them a shard may have no gradient but zeros.
        rows = [torch.tensor(value, device=work.device) for value, work in zip(moves, works, strict=True)]
        reduce_(((row, work.axes) for row, work in zip(rows, works, strict=True)), "MAX")
        return not any(map(bool, rows))

    @staticmethod
    def _lr_is_zero(lr: float | Tensor) -> bool:
        """As far as that can be told without waiting for a device."""
        return (not isinstance(lr, Tensor) or lr.device.type == "cpu") and float(lr) == 0.0

    def _forget_dry_run(self) -> None:
        """Drops the states of a dry run, so that averages start at the weights as they are now."""
        if self._dry:
            for param in [p for p, state in self.state.items() if "step" in state and state["step"].item() == 0]:
                del self.state[param]
            self._dry = False

    # ---- the average -----------------------------------------------------------------------------------------------

    @property
    def _swapped(self) -> bool:
        """Of the groups, which wrappers that pass for this optimizer share with it, such as Lightning's: an attribute
        set through one of them would stay there, and training go on from the average."""
        return any(group["swapped"] for group in self.param_groups)

    def _require_live(self, what: str) -> None:
        if self._swapped:
            raise RuntimeError(f"{what} while the weights are swapped to EMA: call train() first")

    @torch.no_grad()
    def eval(self) -> None:
        """Puts the average in place of the weights, in groups with ``use_ema_eval``; again is harmless.

        float32 weights and their averages trade places without a copy; narrower weights are kept beside.
        """
        if not self._swapped:
            with uninterrupted():
                self._swap_in()

    def _swap_in(self) -> None:
        self._forget_dry_run()
        groups = [group for group in self.param_groups if group["use_ema_eval"]]
        entries = [(p, self.state[p]) for group in groups for p in group["params"] if "ema" in self.state.get(p, {})]
        for param, state in entries:
            if local(state["ema"]).shape != local(param).shape:
                raise RuntimeError(f"a parameter of shape {tuple(param.shape)} has an average of another shape")
        self._check_memory(tensor for p, state in entries for tensor in (local(p), local(state["ema"])))
        traded = [(p, state) for p, state in entries if p.dtype == state["ema"].dtype]
        copied = [(p, state, as_state(p, p, p.dtype)) for p, state in entries if p.dtype != state["ema"].dtype]
        self._trade([(param, state["ema"]) for param, state in traded])  # may refuse, so before what may not
        for param, state, _ in copied:
            local(param).copy_(local(state["ema"]))
        # Only now that the contents are in place: an exception above leaves the state as it was.
        for param, state in traded:
            state["live"], state["ema"] = state["ema"], param.detach()
        for _, state, live in copied:
            state["live"] = live
        for group in groups:
            group["swapped"] = True

    @torch.no_grad()
    def train(self) -> None:
        """Puts the weights back that ``eval()`` took out; again is harmless."""
        if self._swapped:
            with uninterrupted():
                self._swap_out()

    def _swap_out(self) -> None:
        entries = [
            (p, self.state[p]) for g in self.param_groups for p in g["params"] if "live" in self.state.get(p, {})
        ]
        for param, state in entries:
            if local(state["live"]).shape != local(param).shape:
                raise RuntimeError(f"a parameter of shape {tuple(param.shape)} has live weights of another shape")
        self._check_memory(tensor for p, state in entries for tensor in (local(p), local(state["live"])))
        places = [(local(p), local(state["ema"])) for p, state in entries]
        shared = [here.numel() > 0 and average.data_ptr() == here.data_ptr() for here, average in places]
        self._trade([(p, state["live"]) for (p, state), trade in zip(entries, shared, strict=True) if trade])
        for (param, state), trade in zip(entries, shared, strict=True):
            if not trade:
                local(param).copy_(local(state["live"]))
        for (_, state), trade in zip(entries, shared, strict=True):
            live = state.pop("live")
            if trade:
                state["ema"] = live
        for group in self.param_groups:
            group["swapped"] = False

    @staticmethod
    def _check_memory(tensors: Iterable[Tensor]) -> None:
        """torch's copies into a tensor whose storage was emptied, as FSDP puts parameters away, end the process."""
        for tensor in tensors:
            if tensor.data_ptr() == 0 and tensor.numel() > 0 and tensor.device.type != "meta":
                shape = tuple(tensor.shape)
                raise RuntimeError(f"a tensor of shape {shape} has more elements than memory: was its storage resized?")

    def _trade(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Exchanges the contents of each pair, a kernel call a device and dtype."""
        buckets: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for a, b in pairs:
            left, right = buckets.setdefault((a.device, a.dtype), ([], []))
            left.append(local(a))
            right.append(local(b))
        for (device, dtype), (left, right) in buckets.items():
            choose(self._backend_name, device, dtype).op("swap_")(left, right)
            torch.autograd.graph.increment_version(left)
        torch.autograd.graph.increment_version([a for a, _ in pairs if is_sharded(a)])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the parameters hold their averages, whatever is raised inside.

        >>> with optimizer.averaged():  # doctest: +SKIP
        ...     validate(model)
        """
        was_swapped = self._swapped
        try:
            self.eval()
            yield
        finally:
            if not was_swapped:
                self.train()

    @torch.no_grad()
    def ema_state_dict(self, model: torch.nn.Module, *, full: bool = False) -> dict[str, Any]:
        """A copy of ``model.state_dict()`` with averaged weights, to save or to export; nothing is swapped.

        Its tensors are contiguous and share no memory, as safetensors wants them: tied weights come under each of their
        names, each with a copy of its own.
        Every parameter that has an average comes averaged, in its own dtype, also where ``use_ema_eval`` is False. One
        that took no step yet, or is not ours, comes as it is. Raises RuntimeError where this optimizer keeps no
        average, ValueError where it knows no parameter of the model (a copy of a model has its own).

        Sharded weights (DTensors) come sharded. ``full``: gathered, on the CPU of rank 0; the other ranks get an empty
        dict, and hold one whole tensor at a time. All ranks have to call it then.
        """
        if not any(self._keeps_average(group) for group in self.param_groups):
            raise RuntimeError("ema_state_dict(): no group of this optimizer keeps an average")
        self._forget_dry_run()
        ours = {param for group in self.param_groups for param in group["params"]}
        exported: dict[str, Any] = model.state_dict(keep_vars=True)
        if not any(isinstance(value, Tensor) and value in ours for value in exported.values()):
            raise ValueError("ema_state_dict(): model has no parameter that this optimizer trains")
        for name, value in list(exported.items()):
            if isinstance(value, Tensor):
                average = self.state.get(value, {}).get("ema", value)
                copy = as_state(value, average, value.dtype)
                exported[name] = (gathered(copy) if full else copy).contiguous()
        return exported if not full or on_first_rank() else {}

    def _keeps_average(self, group: Group) -> bool:
        return "ema" in self._state_tensors(group)

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """States and options, to save. As in ``torch.optim``, the tensors are the optimizer's own, which its next step
        changes: save them, or ``copy.deepcopy`` them, before it."""

        # First of the hooks, so that those of the user see all of it.
        def complete(_: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
            for group, packed in zip(self.param_groups, saved["param_groups"], strict=True):
                packed.update(self._to_save(group))

        handle = self.register_state_dict_post_hook(complete, prepend=True)
        try:
            return super().state_dict()  # type: ignore[no-any-return]
        finally:
            handle.remove()

    def _to_save(self, group: Group) -> Group:
        """What a checkpoint has of the group beside its options."""
        names = [self.state[param].keys() for param in group["params"] if self.state.get(param)]
        saved: Group = {"state_names": tuple(sorted(set.intersection(*map(set, names)))) if names else None}
        if group["skipped_steps"] is None:  # distributed checkpoints load no tensor into what is None
            saved["skipped_steps"] = torch.zeros((), dtype=torch.int64)
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class, of ``torch.optim.Adam`` / ``AdamW``, or of the published ``pace-optimizer``;
        MADA one of PACE, and PACE one of a MADA that is AdamW.

        States are copied and stay float32 (float64 for float64 parameters), whatever the parameter's dtype. Options
        come from the checkpoint, ``capturable`` too; one that it does not have keeps its present value. What does not
        fit raises ValueError or TypeError and changes nothing. States go to the parameters by their position, as in
        ``torch.optim``. A state saved between ``eval()`` and ``train()`` comes back swapped. The weights themselves are
        the model's, and are not touched: load the model too, and, for a checkpoint of ``pace-optimizer`` saved in eval
        mode, load it first.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")

        # Last of the pre-hooks, so that those of the user see the checkpoint as it was saved.
        def translate(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            return self._translated(loaded, notes)

        notes: list[str] = []
        handle = self.register_load_state_dict_pre_hook(translate)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._incoming = None
        for note in notes:
            warnings.warn(note, stacklevel=3)  # beyond no_grad

    def _translated(self, loaded: dict[str, Any], notes: list[str]) -> dict[str, Any]:
        """``loaded`` in our names and checked. The tensors are kept aside: torch would cast them to the parameter's
        dtype."""
        saved_groups = self._checked_structure(loaded)
        if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in self.param_groups]:
            return loaded  # torch says what is wrong
        known = {key for saved in saved_groups for key in saved["params"]}
        if strangers := sorted(str(key) for key in loaded["state"] if key not in known):
            raise ValueError(
                f"state_dict has states of parameters that are in none of its groups: {', '.join(strangers)}"
            )
        self._check_names(loaded["state"], saved_groups)  # before options: they tell best what it is
        groups, states, incoming = [], {}, {}
        for number, (saved, group) in enumerate(zip(saved_groups, self.param_groups, strict=True)):
            if saved.get("weight_decay") and saved.get("decoupled_weight_decay") is False:
                notes.append(
                    f"param_groups[{number}]: weight_decay {saved['weight_decay']} was Adam's, added to the gradient; "
                    "here it is decoupled, as in AdamW"
                )
            options = self._loaded_options(saved, group, number)
            names = options.pop("state_names")
            groups.append(options | {"state_names": None})
            if names is None or self.OWN_OPTION not in saved:
                names = (*(names or ()), *self._required_states(options))
            ordered, present = saved.get("param_names"), group.get("param_names")
            if ordered and present and ordered != present and sorted(ordered) == sorted(present):
                notes.append(
                    f"param_groups[{number}] was saved with its parameters in another order. States go by position, "
                    "not by name, as in torch.optim"
                )
            for i, (key, param) in enumerate(zip(saved["params"], group["params"], strict=True)):
                if key not in loaded["state"] or not loaded["state"][key]:
                    continue
                name = f"the state of {self._name(group, i)}"
                states[key] = incoming[param] = self._translated_state(
                    loaded["state"][key], param, options, names, name, notes
                )
            loaded_here = [incoming[param] for param in group["params"] if param in incoming]
            lost = any("ema" in state and "live" not in state for state in loaded_here)
            if saved.get("swapped") and lost:
                raise ValueError(
                    f"param_groups[{number}] was saved between eval() and train(), and its live weights did not come "
                    "along (flattened distributed checkpoints drop them): call train() before saving"
                )
            groups[-1]["swapped"] = bool(saved.get("swapped")) or any("live" in state for state in loaded_here)
        self._incoming = incoming
        return {**loaded, "state": states, "param_groups": groups}

    def _checked_structure(self, loaded: dict[str, Any]) -> list[Group]:
        """The groups of what is to be loaded, if it is a state dict at all."""
        for part, kind in (("state", Mapping), ("param_groups", (list, tuple))):
            if not isinstance(loaded.get(part), kind):
                came = (
                    type(loaded[part]).__name__
                    if part in loaded
                    else f"only {', '.join(map(str, loaded)) or 'nothing'}"
                )
                raise ValueError(
                    f"state_dict must have 'state' and 'param_groups', as state_dict() does: {part} is {came}"
                )
        groups: list[Group] = list(loaded["param_groups"])
        for number, saved in enumerate(groups):
            if not isinstance(saved, Mapping) or not isinstance(saved.get("params"), (list, tuple)):
                raise ValueError(f"param_groups[{number}] of the state_dict must be a dict with a list 'params'")
        for key, state in loaded["state"].items():
            if not isinstance(state, Mapping):
                raise ValueError(f"the state of parameter {key} must be a dict, got {type(state).__name__}")
        return groups

    def _check_names(self, states: Mapping[Any, Mapping[str, Any]], saved_groups: list[Group]) -> None:
        known = {"step", "live", *self.STATE_TENSORS, *self.STATE_ROWS, *_FOREIGN_NAMES, *_FOREIGN_STATE}
        for saved, group in zip(saved_groups, self.param_groups, strict=True):
            for i, key in enumerate(saved["params"]):
                if unknown := sorted(map(str, states.get(key, {}).keys() - known)):
                    raise ValueError(
                        f"the state of {self._name(group, i)} has {', '.join(unknown)}, which is no state of "
                        f"{type(self).__name__}"
                    )

    def _loaded_options(self, saved: Group, group: Group, number: int) -> Group:
        """The options of a group after loading, checked."""
        self._check_format(saved, number)
        try:
            options = self._merged(saved, group) | {"format_version": FORMAT}
            self._check_options(options)
            swapped, skipped, names = (options[name] for name in ("swapped", "skipped_steps", "state_names"))
            require(isinstance(swapped, bool), "swapped", "True or False", swapped)
            if skipped is not None:
                count = checked_count("skipped_steps", skipped, 2**63 - 1).to(torch.int64, copy=True)
                options["skipped_steps"] = count if count > 0 else None
            listed = isinstance(names, (tuple, list)) and all(isinstance(name, str) for name in names)
            require(names is None or listed, "state_names", "None or a tuple of names", names)
        except (ValueError, TypeError) as error:
            raise type(error)(f"param_groups[{number}] of the checkpoint: {error}") from error
        return options

    def _check_format(self, saved: Group, number: int) -> None:
        version = saved.get("format_version", 0)
        if isinstance(version, bool) or not isinstance(version, int) or version < 0:
            raise ValueError(f"param_groups[{number}]: format_version must be an integer >= 0, got {version!r}")
        if version > FORMAT:
            raise ValueError(
                f"param_groups[{number}] was saved in format {version} by a later pace_kernels; this one reads formats "
                f"up to {FORMAT}"
            )

    def _merged(self, saved: Group, group: Group) -> Group:
        """The options of a group after loading: the saved ones, and the present ones where none was saved."""
        options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        options |= _GROUP_STATE  # of what is loaded, not of what was here
        return options | {k: v for k, v in saved.items() if k not in _FOREIGN_OPTIONS}

    def _translated_state(
        self,
        saved: dict[str, Any],
        param: Tensor,
        group: Group,
        required: Sequence[str],
        name: str,
        notes: list[str],
    ) -> dict[str, Tensor]:
        """A parameter's saved state in our names, copied and checked; it must have what is ``required``."""
        state = {_FOREIGN_NAMES.get(k, k): v for k, v in saved.items()}
        for needed in ("step", *required):
            if needed not in state and needed != "live":  # that one is asked for with "swapped"
                raise ValueError(f"{name} lacks {needed}: is it the state of another optimizer, or incomplete?")
        if (
            "max_exp_avg_sq" not in (*self._state_tensors(group), *required)
            and state.pop("max_exp_avg_sq", None) is not None
        ):
            notes.append(f"{name}: the maximum that AMSGrad keeps is dropped")
        state.pop("last_ema_step", None)
        if (theta := state.pop("theta", None)) is not None and "ema" in state:
            # The published code holds the live weights twice. They are needed only where it was saved in eval mode.
            same = theta.shape == param.shape and holds(param, theta)
            if not same and state["ema"].shape == param.shape and holds(param, state["ema"]):
                state["live"] = theta
            elif not same:
                notes.append(f"{name}: the model holds neither its weights nor its average; load the model first")
        step = checked_count(f"{name}: step", state.pop("step"), _LAST_STEP).to(torch.float32)
        for key, value in state.items():
            shape = (self.STATE_ROWS[key],) if key in self.STATE_ROWS else tuple(param.shape)
            if not isinstance(value, Tensor) or value.shape != shape:
                came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{name}: {key} must be a tensor of shape {shape}, got {came}")
            if value.dtype not in _FLOATING or value.layout is not torch.strided:
                kind = value.dtype if value.layout is torch.strided else value.layout
                raise ValueError(f"{name}: {key} must be dense, of {', '.join(map(str, _FLOATING))}, got {kind}")
            if value.is_meta and not param.is_meta:
                raise ValueError(f"{name}: {key} is on the meta device, where there are no values")
        ours = {"step": step.reshape(()).to(param.device if group["capturable"] else "cpu", copy=True)}
        for key, value in state.items():
            if key in self.STATE_ROWS:
                ours[key] = self._initial(key, param, group).copy_(value)
            else:
                ours[key] = as_state(param, value, value.dtype if key == "live" else None)
        return ours

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_backend_name": self._backend_name, "_dry": self._dry}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._checked, self._prepared, self._changed = {}, {}, []
        self.__dict__.setdefault("_incoming", None)
        self.__dict__.setdefault("_dry", False)
        self.__dict__.setdefault("_backend_name", None)
        for group in self.param_groups:  # pickled before there were these
            for name, value in {**_GROUP_STATE, "skip_nonfinite": False}.items():
                group.setdefault(name, value)
            group["swapped"] = group["swapped"] or any("live" in self.state.get(p, {}) for p in group["params"])
        if self._incoming is not None:
            self.state.clear()
            self.state.update(self._incoming)
            self._dry = False
