"""The work of a step: the parameters of a group that step together, and their states."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import Backend
from .checks import Group, plain_number
from .sharding import Axes, agree, axes, is_wrapper, local, local_as
from .torch_rules.common import at_hand

# Of the groups and states in a checkpoint. 1: the first that says so. What has none is of before (0) or of another
# optimizer; the states of 0 have the same names and meaning. 2: some states are in codes.
FORMAT = 1
CODED_FORMAT = 2
# What the groups hold beside options: whether the average is swapped in, the format of a checkpoint, how many steps
# skip_nonfinite left undone (a tensor that the groups share, once there is something to count), and, in checkpoints
# alone, the names that all states of the group have: what a checkpoint lost on its way can be told by them.
GROUP_STATE: Group = {"swapped": False, "format_version": FORMAT, "skipped_steps": None, "state_names": None}
FLOAT32_LAST = 2**24  # float32 counts to here: with one more it is the same number
LAST_STEP = 2**53  # and float64 to here
EMA_DEVICE = "ema_device"  # an option, which stands only in groups whose averages are in host memory
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_away(group: Group) -> bool:
    """Whether the group's averages are in host memory."""
    return group.get(EMA_DEVICE) is not None


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on that device. Only a copy to the CPU waits. Of pinned memory, which is read once the device gets
    there, a copy is sent, so that the caller may write to it at once; not within a capture: replays read it again."""
    if device.type == "cuda" and tensor.is_cpu and not torch.cuda.is_current_stream_capturing() and tensor.is_pinned():
        tensor = tensor.clone()
    return tensor.to(device, non_blocking=device.type != "cpu")


class Formats(NamedTuple):
    """The bits of a parameter's moments, average and master weights (0: none), and how bfloat16 weights are rounded."""

    state: int = 32
    ema: int = 32
    weight: int = 0
    stochastic: bool = False

    @property
    def on_grid(self) -> bool:
        """Whether the average can be read only together with the weights."""
        return self.ema in (8, 16)


PLAIN = Formats()


@dataclass
class Work:
    """The parameters of one group that step together: on one device, in one dtype, each with a gradient, and sharded
    over the same ``axes`` of a mesh, if they are, with weights and states in the same ``formats``.

    ``owners`` are the group's parameters, to which states belong; ``params`` and ``grads`` are the kernels' tensors:
    the same ones, or the local parts of DTensors. ``scaling`` has the given ones of the operators' arguments
    grad_scale, clip_coef and found_inf. ``on_device``: the step counts are on the parameters' device, and nothing may
    be read from it.
    """

    group: Group
    backend: Backend
    scaling: dict[str, Tensor]
    axes: Axes = ()
    formats: Formats = PLAIN
    owners: list[Tensor] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    on_device: bool = False
    # The state of each owner, as it will be in the optimizer; by number, what the step enters into it: for one that has
    # no state yet, the whole of it. And bytes of parameters, with those of the copies that are stepped in their place.
    records: list[dict[str, Any]] = field(default_factory=list, init=False)
    changes: dict[int, dict[str, Any]] = field(default_factory=dict, init=False)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False)

    def put(self, i: int, name: str, value: Tensor) -> None:
        """Enters a state of the parameter with this number when the step is taken."""
        self.changes.setdefault(i, {})[name] = value

    def part(self) -> Work:
        """A work of the same kind, without parameters."""
        return Work(self.group, self.backend, self.scaling, self.axes, self.formats)

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    def lr(self) -> dict[str, Any]:
        """The learning rate as arguments of an operator; on a device it is not read."""
        lr = self.group["lr"]
        if not isinstance(lr, Tensor):
            return {"lr": plain_number(lr)}
        if lr.is_meta and self.device.type != "meta":
            raise ValueError(f"lr must be a number, or a tensor with a value, got one on meta for {self.device}")
        if at_hand(lr):
            return {"lr": lr.item()}
        return {"lr": 0.0, "lr_tensor": moved(lr, self.device)}

    def left_undone(self) -> bool:
        """Whether ``found_inf`` skips the step, as far as that is known without waiting for a device."""
        found_inf = self.scaling.get("found_inf")
        return found_inf is not None and at_hand(found_inf) and bool(found_inf)


def counts_no_further(step: Tensor) -> bool:
    """Whether a count on the CPU is float32 and at 2^24. Operators refuse it before they write, so no step has to look
    for it; it then becomes float64."""
    return step.dtype == torch.float32 and at_hand(step) and step.item() >= FLOAT32_LAST


def step_dtype(count: float) -> torch.dtype:
    """The dtype of a step count in a checkpoint, and on the CPU: torch's float32, up to its limit."""
    return torch.float32 if count <= FLOAT32_LAST else torch.float64


def exact_on(device: torch.device, update_freq: int) -> bool:
    """Whether counts on this device, which the host does not read, are float64 from the start: if they decide in which
    steps an average moves. MPS has no float64."""
    return update_freq > 1 and device.type not in ("cpu", "mps")


def state_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's states: float32, or float64 if the parameter is float64; complex if it is."""
    if param.dtype.is_complex:
        return torch.complex128 if param.dtype == torch.complex128 else torch.complex64
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def as_state(param: Tensor, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of ``value`` as a state of ``param``: its device, memory layout and shards, in the dtype of states."""
    state = empty_state(param, dtype)
    local(state).copy_(local_as(param, value))
    return state


def empty_state(param: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A new state of ``param``, of any contents. For subclasses that wrap no other tensor, the state is plain; those
    that wrap others support zeros_like, which AdamW calls, but not always empty_like."""
    new = torch.zeros_like if is_wrapper(local(param)) else torch.empty_like
    with torch._C.DisableTorchFunctionSubclass():
        return new(param, dtype=dtype or state_dtype(param), requires_grad=False)


def holds(param: Tensor, value: Tensor) -> bool:
    """Whether the parameter holds these values, on every rank that has a part of it."""
    here = local(param)
    return agree(torch.equal(local_as(param, value).to(here), here), here.device, axes(param))
