"""Sharded tensors: the kernels work on the local part of a DTensor, and states are DTensors as their parameters are.

Nothing here uses DTensor's dispatch, which costs tens of microseconds per operation: local parts are attributes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# The axes of device meshes that a tensor is sharded over, as (mesh, number of the axis): what has to be added up for a
# sum over all of its elements. Axes that hold copies are not among them.
Axes: TypeAlias = tuple[tuple[Any, int], ...]

PLAIN = {Tensor, torch.nn.Parameter}
_SHARDED: set[type] = set()  # DTensor, once one was seen


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor. None exists before torch.distributed.tensor is imported, which takes a second."""
    kind = type(tensor)
    if kind in PLAIN or kind in _SHARDED:
        return kind in _SHARDED
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(tensor, module.DTensor):
        return False
    _SHARDED.add(kind)
    return True


def is_wrapper(tensor: Tensor) -> bool:
    """Whether the tensor does its operations in its own way, as subclasses that wrap others do (quantized weights). A
    kernel would be called once for each tensor inside, but with one step count for all."""
    kind = type(tensor)
    if kind in PLAIN or isinstance(tensor, FakeTensor):
        return False
    return kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


def unwrapped(tensor: Tensor) -> list[Tensor]:
    """The tensors that a wrapper wraps; any other tensor itself."""
    if not is_wrapper(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [part for name in names for part in unwrapped(getattr(tensor, name))]


def placed_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two DTensors are split in the same way over the same mesh."""
    one, other = a._spec, b._spec  # type: ignore[attr-defined]
    return one is other or ((one.mesh is other.mesh or one.mesh == other.mesh) and one.placements == other.placements)


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor on this rank; a plain tensor itself."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def axes(tensor: Tensor) -> Axes:
    """The axes over which a DTensor is sharded; none for a plain tensor."""
    if not is_sharded(tensor):
        return ()
    spec = tensor._spec  # type: ignore[attr-defined]
    # Worked out once a spec, which does not change and which a parameter keeps: it takes longer than a small step.
    known: Axes | None = spec.__dict__.get("_pace_kernels_axes")
    if known is None:
        mesh, placements = spec.mesh, spec.placements
        known = tuple((mesh, k) for k, p in enumerate(placements) if not p.is_replicate() and mesh.size(k) > 1)
        spec.__dict__["_pace_kernels_axes"] = known
    return known


def is_partial(tensor: Tensor) -> bool:
    """Whether the ranks hold summands of a DTensor instead of its elements."""
    return is_sharded(tensor) and any(placed.is_partial() for placed in tensor.placements)  # type: ignore[attr-defined]


def local_as(param: Tensor, value: Tensor) -> Tensor:
    """The part of ``value``, which has the shape of ``param``, that belongs to the local part of ``param``.

    A DTensor with another placement is redistributed; all ranks of its mesh have to take part.
    """
    if not is_sharded(param):
        # A whole DTensor for a plain parameter, as a checkpoint of a sharded run may have it.
        return value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined, no-any-return]
    if is_sharded(value) and placed_alike(param, value):
        return _arrived(local(value))
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    if not is_sharded(value):
        from torch.distributed.tensor import distribute_tensor

        # Every rank has all of it and takes its part: no communication.
        value = distribute_tensor(value.to(param.device), mesh, placements, src_data_rank=None)
    else:
        value = value.redistribute(mesh, placements)  # type: ignore[attr-defined]
    return _arrived(local(value))


def _arrived(tensor: Tensor) -> Tensor:
    """Collectives of DTensor are asynchronous: a kernel may read the result only after a wait."""
    if type(tensor) not in PLAIN and hasattr(tensor, "wait"):
        return tensor.wait()  # type: ignore[no-any-return]
    return tensor


def reduce_(rows: Iterable[tuple[Tensor, Axes]], op: str = "SUM") -> None:
    """Adds up each row in place (or takes the MAX or MIN) over the ranks along its axes: rows of one dtype and length.
    One collective for each axis, whatever the number of rows (and for each device, should there be several)."""
    by_axis: dict[tuple[Any, int, torch.device], list[Tensor]] = {}
    for row, its_axes in rows:
        for mesh, k in its_axes:
            by_axis.setdefault((mesh, k, row.device), []).append(row)
    for (mesh, k, _), some in by_axis.items():
        all_reduce_(some, mesh.get_group(k), op)


def all_reduce_(rows: list[Tensor], process_group: Any, op: str = "SUM") -> None:
    """Adds up each row in place over the ranks of a process group, all in one collective."""
    import torch.distributed as dist

    packed = torch.stack(rows)
    if dist.get_backend(process_group) == "nccl" and packed.device.type == "cpu":
        packed = packed.cuda()
    dist.all_reduce(packed, getattr(dist.ReduceOp, op), group=process_group)
    for row, reduced in zip(rows, packed.unbind(), strict=True):
        row.copy_(reduced)


def gathered_rows(row: Tensor, its_axes: Axes) -> list[Tensor]:
    """The rows of all ranks along the axes, in the ranks' order."""
    rows = [row]
    for mesh, k in its_axes:
        packed = torch.stack(rows)
        parts = [torch.empty_like(packed) for _ in range(mesh.size(k))]
        torch.distributed.all_gather(parts, packed, group=mesh.get_group(k))
        rows = list(torch.cat(parts).unbind())
    return rows


def on_host(rows: list[Tensor]) -> list[Tensor]:
    """The rows in float64 on the CPU, in order: one copy, and one wait, per device."""
    by_device = {device: [row for row in rows if row.device == device] for device in {row.device for row in rows}}
    sent = {device: iter(torch.stack(here).to("cpu", torch.float64)) for device, here in by_device.items()}
    return [next(sent[row.device]) for row in rows]


def agree(value: bool, device: torch.device, its_axes: Axes) -> bool:
    """Whether ``value`` is true on all ranks along the axes."""
    if not its_axes:
        return value
    row = torch.tensor(float(value), device=device)
    reduce_([(row, its_axes)], "MIN")
    return bool(row)


def gathered(tensor: Tensor) -> Tensor:
    """A whole tensor on the CPU; if it is sharded, only on rank 0 (empty elsewhere)."""
    if is_sharded(tensor):
        tensor = tensor.full_tensor()  # type: ignore[attr-defined]
        if not on_first_rank():
            return tensor.new_empty(0, device="cpu")
    return tensor.cpu()


def on_first_rank() -> bool:
    """Whether this is rank 0, or the only one."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0
