"""What an optimizer holds: bytes by tensor, what is compressed, and why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .backend import choose, passed_over
from .formats import BLOCK, dtype_of, formats_of, names_of, why_float32
from .sharding import is_wrapper, local
from .states import FLOATING, is_away

if TYPE_CHECKING:
    from .optimizer import KernelOptimizer
    from .pull_reports import PullReports


@dataclass(frozen=True)
class TensorMemory:
    """One parameter: its elements on this rank, and bytes; one that is lazy has none yet. ``backend`` is "none" where
    nothing steps it: of lazy ones, and of frozen ones in a dtype that is not trained. ``why_backend``: why it is not
    the fastest one of its device; None where it is. ``states`` has a number of bytes for each state that it has or,
    before its first step, will have. ``compressed``: whether states of it are, of at least one kind. ``why_float32``:
    why they are not, although its group asks for it; None where it does not ask, and where they are compressed.
    ``asked``: what the group asks to be compressed, "states" or "averages"; "" for nothing.
    ``host``: bytes in host memory, by ``ema_device`` of its average and of the copy of its weights, in ``Offload`` of
    its states and of copies of weight and gradient; ``away``: of these, states."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    backend: str
    elements: int
    weight: int
    gradient: int
    states: Mapping[str, int]
    why_float32: str | None
    compressed: bool = False
    asked: str = ""
    device: str = "cpu"
    why_backend: str | None = None
    host: int = 0
    away: int = 0

    @property
    def kept(self) -> str:
        """What of a parameter is not compressed, and in which dtype that is."""
        return f"{'float64' if self.dtype == torch.float64 else 'float32'} {self.asked or 'states'}"


@dataclass(frozen=True)
class Memory:
    """What ``optimizer.memory()`` returns; printed, it is a summary."""

    kind: str
    tensors: tuple[TensorMemory, ...]

    @property
    def elements(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def weights(self) -> int:
        return sum(tensor.weight for tensor in self.tensors)

    @property
    def gradients(self) -> int:
        return sum(tensor.gradient for tensor in self.tensors)

    @property
    def states(self) -> int:
        return sum(sum(tensor.states.values()) for tensor in self.tensors)

    @property
    def host(self) -> int:
        """Bytes in host memory: of states or averages, which ``states`` has too, and of copies."""
        return sum(tensor.host for tensor in self.tensors)

    def __str__(self) -> str:
        stepped = [tensor for tensor in self.tensors if tensor.backend != "none"]
        reasons = [f", since {t.why_backend}" if t.why_backend else "" for t in stepped]
        backends = Counter((t.backend, t.device + why) for t, why in zip(stepped, reasons, strict=True))
        by_state: Counter[str] = Counter()
        for tensor in self.tensors:
            by_state.update(tensor.states)
        of_states = ", ".join(f"{name} {_size(count)}" for name, count in by_state.items() if count)
        away = sum(tensor.away for tensor in self.tensors)
        apart = "averages" if all(t.away == t.states.get("ema") for t in self.tensors if t.away) else "states"
        each = (self.weights + self.gradients + self.states - away) / max(self.elements, 1)
        gradients = f"gradients {_size(self.gradients)}" if self.gradients else "without gradients"
        lines = [
            f"{self.kind}: {self.elements:,} elements in {len(self.tensors)} tensors",
            *(f"  {n} step{'s' * (n == 1)} by backend {name} on {where}" for (name, where), n in backends.items()),
            f"  weights {_size(self.weights)}, {gradients}, states {_size(self.states)}: {each:.2f} bytes per element"
            f"{' beside host memory' if away else ''}",
            *([f"  {of_states}"] if of_states else []),
            *([f"  in host memory: {apart} {_size(away)}, copies {_size(self.host - away)}"] if away else []),
        ]
        plain = [(tensor.kept, tensor.why_float32) for tensor in self.tensors if tensor.why_float32 is not None]
        if any(tensor.compressed for tensor in self.tensors):
            plain += [(t.kept, "the options of its group ask for that") for t in stepped if not t.asked]
        for (kept, why), count in Counter(plain).most_common():
            lines.append(f"  {count} keep{'s' * (count == 1)} {kept}, {'' if count == 1 else 'each '}since {why}")
        if idle := len(self.tensors) - len(stepped):
            lines.append(f"  {idle} {'is' if idle == 1 else 'are'} lazy, or frozen in a dtype that is not trained")
        return "\n".join(lines)


def _size(count: int) -> str:
    if 0 < count < 0.1 * 2**20:
        return f"{count / 2**10:.2f} KiB"
    return f"{count / 2**20:.2f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def _bytes(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    here = local(tensor)
    return here.numel() * here.element_size()


def _backend_of(optimizer: KernelOptimizer | PullReports, param: Tensor) -> tuple[str, str | None]:
    """Its name, and why it is not the fastest one there."""
    if is_lazy(param) or (not param.requires_grad and param.dtype not in FLOATING):
        return "none", None
    wrapped = is_wrapper(local(param))
    row = choose(optimizer._backend_name, param.device, param.dtype, wrapped)
    if optimizer._backend_name is not None:
        return row.name, "it was asked for by name"
    if wrapped:
        return row.name, "it wraps other tensors"
    if param.dtype == torch.float64:
        return row.name, "there are no kernels for float64"
    passed = passed_over(row, param.device, param.dtype)
    return row.name, "; ".join(f"{other} can't: {why}" for other, why in passed.items()) or None


def memory_of(optimizer: KernelOptimizer | PullReports) -> Memory:
    found = []
    for group in optimizer.param_groups:
        wanted = optimizer._wanted(group)
        for i, param in enumerate(group["params"]):
            formats, here = formats_of(wanted, param), local(param)
            shape = () if is_lazy(param) else tuple(param.shape)
            elements = 0 if is_lazy(param) else here.numel()
            state = optimizer.state.get(param)
            if is_lazy(param):
                states = {}
            elif state:
                states = {name: _bytes(value) for name, value in state.items() if isinstance(value, Tensor)}
            elif param.requires_grad:
                states = {optimizer._STEPS: 4}
                for name in names_of(formats, optimizer._state_tensors(group)):
                    if name in optimizer._STATE_ROWS:
                        states[name] = 8 * optimizer._STATE_ROWS[name]
                        continue
                    size = dtype_of(name, formats, param).itemsize
                    states[name] = here.numel() * size // (BLOCK if name.endswith("_scales") else 1)
            else:
                states = {}
            copied = 4 if formats.weight else param.dtype.itemsize
            backend, why_backend = _backend_of(optimizer, param)
            asked = "states" if wanted.state < 32 else "averages" if wanted.ema < 32 else ""
            asked = asked if backend != "none" else ""
            found.append(
                TensorMemory(
                    optimizer._name(group, i),
                    shape,
                    param.dtype,
                    backend,
                    elements,
                    _bytes(param) if elements else 0,
                    _bytes(param.grad) if elements else 0,
                    states,
                    why_float32(param) if asked else None,
                    bool(asked) and (formats.state < 32 or formats.ema < 32),
                    asked,
                    str(param.device),
                    why_backend,
                    states["ema"] + copied * elements if is_away(group) and "ema" in states else 0,
                    states["ema"] if is_away(group) and "ema" in states else 0,
                )
            )
    return Memory(type(optimizer).__name__, tuple(found))
