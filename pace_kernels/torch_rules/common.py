"""Functions that the rules in plain torch share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..definitions.kit import Definition, Options, Scalar

Scalars = TypeVar("Scalars", bound=tuple[Any, ...])

# Elements a row of a sum. A sum over less than torch's grain of 32,768 elements is done by one thread.
_ROW = 16384


def has_values(tensor: Tensor) -> bool:
    """Whether there are values; tensors on meta and under a FakeTensorMode have none."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def at_hand(tensor: Tensor) -> bool:
    """Whether the values can be read, and without waiting for a device."""
    return tensor.device.type == "cpu" and has_values(tensor)


def check_steps(steps: Sequence[Tensor]) -> None:
    """Raises if a readable count is float32 and has reached 2^24, where adding 1 changes nothing in float32."""
    for i, step in enumerate(steps):
        if step.dtype == torch.float32 and at_hand(step) and step.item() >= 2**24:
            raise RuntimeError(
                f"steps[{i}] is float32 and has reached 2^24, where float32 stops counting: make it float64"
            )


def options_type(definition: Definition) -> Any:
    """A dataclass of the operator's options, by the names that its definition has for them."""
    fields = [
        (option.name, Any, dataclasses.field(default=definition.defaults[option.name]))
        if option.name in definition.defaults
        else (option.name, Any)
        for option in definition.options
    ]
    return dataclasses.make_dataclass(
        f"{definition.name}Options", [*fields, ("capturable", bool)], frozen=True, kw_only=True
    )


def by_graph(device: torch.device) -> bool:
    """Whether the device compiles the operations that it is sent. torch_xla treats a Python number that is 0, 1 or
    equal to another one as a constant, and compiles anew each time that this changes between steps. So it gets all
    numbers as tensors, which are data."""
    return device.type == "xla"


def data(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Numbers as tensors without dimensions, by one copy to the device."""
    return torch.tensor(numbers, dtype=dtype, device=device).unbind()


def place(states: Sequence[Tensor]) -> tuple[torch.device, torch.dtype]:
    """The device of a call's states, and the dtype in which they are computed."""
    if not states:
        return torch.device("cpu"), torch.float32
    return states[0].device, torch.float64 if states[0].dtype == torch.float64 else torch.float32


def handed_over(
    make: Callable[[Scalar], Scalars], counts: Sequence[Scalar], dtype: torch.dtype, device: torch.device
) -> list[Scalars]:
    """The scalars of each tensor's step as the device takes them: as data in ``dtype``, rounded on the host.

    Tensors with the same count, usually all, share them: on XLA's CPU each scalar takes a kernel, and 60 tensors with
    their own scalars took 20 s to compile. Which counts are equal changes only when a step leaves some tensors out, and
    that is another graph anyway.
    """
    rows = {t: make(t) for t in dict.fromkeys(counts)}
    if by_graph(device) and rows:
        sent = iter(data([a for row in rows.values() for a in row if isinstance(a, float)], dtype, device))
        rows = {t: type(row)(*(next(sent) if isinstance(a, float) else a for a in row)) for t, row in rows.items()}
    return [rows[t] for t in counts]


def counted(steps: Sequence[Tensor], keep: Keep, capturable: bool) -> list[Scalar]:
    """Counts this step of each tensor, and returns the counts as numbers, or as tensors if they can't be read."""
    for step in steps:
        keep.copy_(step, step + 1)
    tensors = capturable or not all(map(at_hand, steps))
    return [in_double(step) if tensors else step.item() for step in steps]


def computed_there(
    options: Options, counts: list[Scalar], device: torch.device, tensors: bool
) -> tuple[Options, list[Scalar]]:
    """The options and counts from which scalars are computed. If some are tensors (``tensors``, or the counts), a
    device that compiles its operations gets the rest as data too, in double precision."""
    if not by_graph(device) or not counts or not (tensors or isinstance(counts[0], Tensor)):
        return options, counts
    whole = list(dict.fromkeys(t for t in counts if not isinstance(t, Tensor)))
    numbers = {name: value for name, value in vars(options).items() if isinstance(value, float)}
    sent = iter(data([*numbers.values(), *whole], torch.float64, device))
    options = dataclasses.replace(options, **{name: next(sent) for name in numbers})
    of_count = dict(zip(whole, sent, strict=True))
    return options, [t if isinstance(t, Tensor) else of_count[t] for t in counts]


def in_double(scalar: Tensor) -> Tensor:
    return scalar if scalar.device.type == "mps" else scalar.double()  # MPS has no float64


def number(scalar: Scalar) -> Scalar:
    """A learning rate in double precision, without dimensions."""
    return in_double(scalar).reshape(()) if isinstance(scalar, Tensor) else scalar


def rounded(scalars: Scalars, dtype: torch.dtype) -> Scalars:
    """Tensors among the scalars in the dtype of the states: otherwise 0-dimensional parameters would become float64."""
    fields: list[Any] = [a.to(dtype) if isinstance(a, Tensor) else a for a in scalars]
    return type(scalars)(*fields)


def square_root(a: Tensor) -> Tensor:
    """The root, rounded correctly as in the kernels. torch's float32 root on a CPU is MKL's, which may be a unit off. A
    root taken in float64 and then rounded to float32 is right, since 53 bits are at least 2 × 24 + 2. XLA's float32
    root stays: a TPU has no float64 in hardware."""
    return a.sqrt() if by_graph(a.device) else in_double(a).sqrt().to(a.dtype)


def averaged(e: Tensor, x: Tensor, weight: Scalar) -> Tensor:
    """e + w (x − e), but x itself where w is 1 in their dtype; ``averaged`` in csrc/rules/arith.h."""
    if isinstance(weight, Tensor):
        return torch.where(weight == 1.0, x, e + weight * (x - e))
    return x if weight >= 1.0 - torch.finfo(e.dtype).eps / 4 else e + weight * (x - e)


def grad_factor(grad_scale: Tensor | None, clip_coef: Tensor | None) -> Scalar:
    """The factor of the gradient, float32: clip coefficient / gradient scale. It is a number if both are on the CPU or
    missing, and a tensor on a device."""
    if grad_scale is None and clip_coef is None:
        return 1.0
    given = clip_coef if clip_coef is not None else grad_scale
    factor = torch.ones_like(given) if clip_coef is None else clip_coef  # type: ignore[arg-type]
    if grad_scale is not None:
        factor = factor / grad_scale
    return factor.item() if at_hand(factor) else factor.reshape(())


class Keep:
    """Writes results, but keeps the old values if ``found_inf`` is not 0. Nothing waits for a device."""

    def __init__(self, found_inf: Tensor | None) -> None:
        here = found_inf is not None and at_hand(found_inf)
        self.all = here and bool(found_inf)  # nothing is to be written at all
        self._found = None if here or found_inf is None else found_inf.reshape(()) != 0

    def copy_(self, target: Tensor, value: Tensor) -> None:
        target.copy_(value if self._found is None else torch.where(self._found, target, value.to(target.dtype)))


class Begun:
    """The start of a step, for every rule: its options and counts, and how results are kept.

    ``options`` are the operator's, ``given`` those that tensors replace; ``states`` tell on which device scalars
    belong. ``tensors``: scalars depend on other tensors too.
    """

    def __init__(
        self,
        kind: Any,
        options: dict[str, Any],
        steps: Sequence[Tensor],
        states: Sequence[Tensor],
        given: dict[str, Any],
        *,
        tensors: bool = False,
        grad_scale: Tensor | None = None,
        clip_coef: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        check_steps(steps)
        self.keep = Keep(found_inf)
        self.factor = grad_factor(grad_scale, clip_coef)
        self.device, self.dtype = place(states)
        counts = [] if self.keep.all else counted(steps, self.keep, options["capturable"])
        o = kind(**options | {name: number(value) for name, value in given.items() if value is not None})
        tensors = tensors or any(isinstance(value, Tensor) for value in given.values())
        self.o, self.counts = computed_there(o, counts, self.device, tensors)

    def scalars(self, make: Callable[[Scalar], Scalars], dtype: torch.dtype | None = None) -> list[Scalars]:
        """The scalars of each tensor, from its count; none if the step is skipped."""
        return handed_over(make, self.counts, dtype or self.dtype, self.device)


def fixed_order_sum(a: Tensor) -> Tensor:
    """The sum in float64, the same bits for every number of threads: each row by one thread, then their sums."""
    flat = in_double(a.reshape(-1))
    whole = flat.numel() // _ROW * _ROW
    rows = flat[:whole].view(-1, _ROW).sum(dim=1)
    return rows.sum() + flat[whole:].sum()
