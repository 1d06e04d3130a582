"""A fuzz target over the operators' arguments: whatever they are given, they compute or they refuse.

    python tests/fuzz_ops.py --seed 0 --seconds 60                            # or --cases 1000
    python tests/on_sanitizers.py tests/fuzz_ops.py --seed 0 --seconds 60         # the same under the sanitizers
    python tests/fuzz_ops.py --seed 0 --only 1234 --verbose                   # one case again

Each case is a valid call that none, one or several of the changes in the tables below were made to. Then:

- a refusal is an exception, and no byte of any tensor has changed;
- where it computes, no byte outside the tensors that the schema marks as written has changed, and, where no two tensors
  share memory, a call with plain contiguous copies gives the same bits;
- nothing crashes: the number of each case is printed before it runs, so that a process that ends tells which.

A new operator is a new row of OPERATORS.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import re
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pace_kernels import _C, ops
from pace_kernels.definitions import DEFINITIONS, MADA, PACE, PULLBACK, SCHEDULE_FREE
from pace_kernels.definitions.kit import Definition

Rng = random.Random
NARROW = (torch.float32, torch.bfloat16, torch.float16)
NUMBERS = (0.0, -0.0, 1.0, -1.0, 1e-30, -1e30, 5e-324, 1.7e308, 3.5e38, math.inf, -math.inf, math.nan)
INTEGERS = (0, 1, -1, 2, 7, 63, 64, 2**31, 2**62, 2**63 - 1, -(2**63))
STEPS = (0.0, 1.0, 7.0, -1.0, -2.0, 0.5, 2.0**24 - 1, 2.0**24, 2.0**25, 1e30, math.inf, -math.inf, math.nan)
LENGTHS = (0, 1, 2, 3, 63, 64, 65, 255, 256, 257, 16383, 16384, 16385, 33000)


# ---- valid calls -----------------------------------------------------------------------------------------------------


def some_shape(rng: Rng) -> tuple[int, ...]:
    if rng.random() < 0.3:
        return (rng.choice(LENGTHS),)
    if rng.random() < 0.2:
        return (rng.randint(0, 5), 32 * rng.randint(1, 3))  # whole blocks of codes
    return tuple(
        rng.choice((0, 1, 2, 3, 5, 9)) if rng.random() < 0.15 else rng.randint(1, 9) for _ in range(rng.randint(0, 4))
    )


def filled(rng: Rng, value: Tensor) -> Tensor:
    """Normal deviates; now and then with a few numbers that no training should meet."""
    if not value.numel():
        return value
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    numbers = torch.randn(value.shape, generator=generator, dtype=torch.float64) * 10.0 ** rng.choice(
        (0, 0, 0, -30, 30)
    )
    if rng.random() < 0.2:
        flat = numbers.reshape(-1)
        flat[rng.randrange(flat.numel())] = rng.choice(NUMBERS)
        numbers = flat.reshape(value.shape)
    return value.copy_(numbers)


def laid_out(rng: Rng, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of that shape with an offset, gaps and an order of dimensions of its own, whose last element is the last
    of its storage; as a rule a plain one."""
    order = list(range(len(shape)))
    lead, gap = 0, 1
    if rng.random() < 0.3:
        rng.shuffle(order)
        lead, gap = rng.choice((0, 0, 1, 3)), rng.choice((1, 1, 1, 2))
    strides, reach = [0] * len(shape), gap
    for d in order[::-1]:
        strides[d] = reach
        reach *= max(shape[d], 1)
    empty = 0 in shape
    last = 0 if empty else sum(s * (n - 1) for s, n in zip(strides, shape, strict=True)) + 1
    return filled(rng, torch.empty(lead + last, dtype=dtype).as_strided(shape, strides, lead))


def like(dtype: torch.dtype = torch.float32) -> Callable[[Rng, Tensor], Tensor]:
    return lambda rng, param: laid_out(rng, tuple(param.shape), dtype)


def squares(rng: Rng, param: Tensor) -> Tensor:
    return like()(rng, param).abs_()


def gradient(rng: Rng, param: Tensor) -> Tensor:
    value = laid_out(rng, tuple(param.shape), rng.choice((param.dtype, torch.float32)))
    if param.dim() and rng.random() < 0.1:
        d = rng.randrange(param.dim())
        value = value.narrow(d, 0, min(1, param.shape[d])).expand(param.shape)
    return value


def step_count(rng: Rng, param: Tensor) -> Tensor:
    dtype = torch.float64 if rng.random() < 0.3 else torch.float32
    return torch.tensor(rng.choice(STEPS) if rng.random() < 0.2 else float(rng.randint(0, 20)), dtype=dtype)


def last_scalars(rng: Rng, param: Tensor) -> Tensor:
    row = [rng.choice((ops.REDO, ops.DONE, ops.NO_GRADIENT)), 1e-2, 0.9, 0.95, 0.9, 0.5, 0.5, 0.5]
    if rng.random() < 0.2:
        row[rng.randrange(len(row))] = rng.choice(NUMBERS)
    return torch.tensor(row, dtype=torch.float64)


def doubles(count: int) -> Callable[[Rng], Tensor]:
    return lambda rng: torch.rand(
        count, dtype=torch.float64, generator=torch.Generator().manual_seed(rng.getrandbits(32))
    )


def one(value: float, dtype: torch.dtype = torch.float32) -> Callable[[Rng], Tensor]:
    return lambda rng: torch.tensor(rng.choice((value, value, value, *NUMBERS)), dtype=torch.float64).to(dtype)


def numbers(*allowed: float) -> Callable[[Rng], float]:
    return lambda rng: rng.choice(allowed)


def six(rng: Rng) -> list[float]:
    return [rng.random() for _ in range(6)]


AVERAGING: dict[str, Callable[[Rng], Any]] = {
    "lr": numbers(1e-2, 1e-2, 0.0, 1.0, 1e-8),
    "beta1": numbers(0.9, 0.9, 0.0, 0.999),
    "beta2": numbers(0.99, 0.99, 0.0, 0.9999),
    "eps": numbers(1e-8, 1e-8, 2.0**-126, 1.0),
    "weight_decay": numbers(0.01, 0.0, 10.0),
    "lambda_pullback": numbers(1.0, 0.0, 100.0),
    "clamp_pullback": numbers(True, True, False),
    "beta_ema": numbers(0.01, 0.0, 1.0),
    "ema_kappa": numbers(0.2, None, 0.0, 5.0),
    "ema_rho": numbers(0.0, 3.0),
    "ema_gamma": numbers(1.0, 0.0),
    "ema_update_freq": numbers(1, 1, 2, 2**63 - 1),
    "pullback_from_step": numbers(False, True),
    "maximize": numbers(False, True),
    "capturable": numbers(False, True),
}
SCALING: dict[str, Callable[[Rng], Any]] = {
    "lr_tensor": lambda rng: one(1e-3, rng.choice((torch.float32, torch.float64)))(rng),
    "grad_scale": one(1024.0),
    "clip_coef": one(0.5),
    "found_inf": one(0.0),
}


def with_codes(definition: Definition) -> Callable[[Rng, dict[str, Any]], None]:
    """Now and then operands lie in other formats, of any contents: what has no blocks in another layout too."""
    of_codec = {
        codec: [o for o in definition.operands if o.codec == codec]
        for codec in ("weight", "moment", "square", "second", "gradient", "average", "iterate")
    }
    averages = of_codec["average"] + of_codec["iterate"]

    def fit(rng: Rng, call: dict[str, Any]) -> None:
        params = call["params"]

        def some(count: Callable[[Tensor], int], dtype: torch.dtype) -> list[Tensor]:
            spread = [torch.arange(count(p)).mul_(9973).add_(rng.getrandbits(16)) for p in params]
            return [a.to(dtype) for a in spread]

        def shaped(dtype: torch.dtype) -> list[Tensor]:
            if rng.random() < 0.5:
                return [
                    a.view(*p.shape, 2)[..., 0]
                    for a, p in zip(some(lambda p: 2 * p.numel(), dtype), params, strict=True)
                ]
            return [a.view(p.shape) for a, p in zip(some(Tensor.numel, dtype), params, strict=True)]

        def coded(dtype: torch.dtype) -> list[Tensor]:
            return [a.view(p.shape) for a, p in zip(some(Tensor.numel, dtype), params, strict=True)]

        scales = lambda: some(lambda p: p.numel() // 32, torch.uint8)  # noqa: E731
        if of_codec["weight"] and rng.random() < 0.3 and all(param.dtype == torch.bfloat16 for param in params):
            call["remainders"] = shaped(rng.choice((torch.int16, torch.int8)))
        if rng.random() < 0.2:
            for operand in (o for codec in ("moment", "square", "second", "gradient") for o in of_codec[codec]):
                if call[operand.list]:
                    state = shaped(torch.bfloat16)
                    signed = operand.codec in ("moment", "gradient")
                    call[operand.list] = state if signed else [a.abs() for a in state]
        for operand in averages:
            if rng.random() < 0.2 and call[operand.list]:
                call[operand.list], call[str(operand.beside)] = shaped(torch.bfloat16), shaped(torch.int8)
        if rng.random() < 0.5 and all(p.numel() % 32 == 0 and p.is_contiguous() for p in params):
            for operand in (*of_codec["moment"], *of_codec["square"]):
                if call[operand.list]:
                    call[operand.list], call[str(operand.beside)] = coded(torch.uint8), scales()
            for operand in averages:
                if call[operand.list] and rng.random() < 0.7:
                    kind = rng.choice((torch.int8, torch.int16))
                    call[operand.list], call[str(operand.beside)] = coded(kind), scales()

    return fit


def pulled(rng: Rng, call: dict[str, Any]) -> None:
    """pullback_ refuses lists that it would not read, and averages on a grid without the weights before."""
    if rng.random() < 0.5:
        with_codes(PULLBACK)(rng, call)
    pulls = call["lambda_pullback"] != 0.0 if call["gain"] is None else call["gain"] != 0.0
    grid = any(e.dtype in (torch.int8, torch.int16) for e in call["emas"])
    if not pulls and not grid:
        call["befores"] = []
    if grid:
        call["befores"] = [torch.empty_like(p).copy_(p) for p in call["params"]]  # as plans want them, without gaps
    if not pulls or call["gain"] is not None:
        call["second_moments"] = []


@dataclass
class Operator:
    """How a valid call is made. ``lists``: a tensor for each parameter of the first list, and those that are named in
    ``may_be_empty`` left out now and then; ``single``: tensors; ``optional``: tensors that are given now and then,
    those named in ``likely`` as a rule; ``options``: the rest."""

    lists: dict[str, Callable[[Rng, Tensor], Tensor]]
    single: dict[str, Callable[[Rng], Tensor]] = field(default_factory=dict)
    optional: dict[str, Callable[[Rng], Tensor]] = field(default_factory=dict)
    options: dict[str, Callable[[Rng], Any]] = field(default_factory=dict)
    may_be_empty: tuple[str, ...] = ()
    likely: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] | None = NARROW  # of the first list; None: it is made like the others
    sums: tuple[str, ...] = ()  # written in the order of memory, so that their last places depend on the layout
    fit: Callable[[Rng, dict[str, Any]], None] | None = None  # what options rule out is left out

    def call(self, rng: Rng) -> dict[str, Any]:
        shapes = [some_shape(rng) for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3, 5)))]
        first, *others = self.lists
        if self.dtypes is not None:
            dtype = rng.choice(self.dtypes)
            params = [laid_out(rng, shape, dtype) for shape in shapes]
        else:
            params = [self.lists[first](rng, torch.empty(shape)) for shape in shapes]
        empty = rng.random() < 0.2
        call: dict[str, Any] = {first: params}
        for name in others:
            dropped = empty and name in self.may_be_empty and rng.random() < 0.5
            call[name] = [] if dropped else [self.lists[name](rng, p) for p in params]
        call |= {name: make(rng) for name, make in self.single.items()}
        for name, make in self.optional.items():
            call[name] = make(rng) if rng.random() < (0.95 if name in self.likely else 0.4) else None
        call |= {name: make(rng) for name, make in self.options.items()}
        if self.fit is not None and rng.random() < 0.9:
            self.fit(rng, call)
        return call


OPERATORS: dict[str, Operator] = {
    "pace_step_": Operator(
        lists={
            "params": like(), "grads": gradient, "exp_avgs": like(), "exp_avg_sqs": squares, "emas": like(),
            "steps": step_count,
        },
        optional={"stats": doubles(len(ops.PACE_STATS)), **SCALING},
        options={**AVERAGING, "stochastic_rounding": numbers(False, True)},
        may_be_empty=("exp_avgs", "emas"),
        sums=("stats",),
        fit=with_codes(PACE),
    ),
    "mada_step_": Operator(
        lists={
            "params": like(), "grads": gradient,
            **{name: like() for name in ops.MADA_STATES},
            "exp_avg_sqs": squares, "second_exp_avg_sqs": squares, "last_scalars": last_scalars, "steps": step_count,
        },
        optional={
            "coefficients": doubles(len(ops.COEFFICIENTS)), "hypergradients": doubles(len(ops.HYPERGRADIENTS)),
            **SCALING,
        },
        options={
            **AVERAGING, "learn": numbers(63, 63, 0, 1, 5, 32), "beta3": numbers(0.9, 0.0), "rho": numbers(0.5, 1.0),
            "c": numbers(0.5, 1.0), "gamma": numbers(0.5, 0.0, 1.0), "lion_beta1": numbers(0.9),
            "lion_beta2": numbers(0.98), "second_max": numbers(False, True),
            "stochastic_rounding": numbers(False, True),
        },
        may_be_empty=tuple(name for name in ops.MADA_STATES if name != "steps"),
        likely=("coefficients", "hypergradients"),
        sums=("hypergradients",),
        fit=with_codes(MADA),
    ),
    "mada_learn_": Operator(
        lists={"sums": lambda rng, _: doubles(len(ops.HYPERGRADIENTS))(rng)},
        single={**{k: doubles(6) for k in ("coefficients", "momenta", "hypergradients")}, "hyper_step": doubles(1)},
        optional={"found_inf": one(0.0)},
        options={
            "learn": numbers(63, 5),
            **{k: six for k in ("hyper_lr", "hyper_momentum", "lower", "upper")},
            "clip": numbers(10.0, 0.0), "warmup": numbers(0, 50),
        },
        dtypes=None,
    ),
    "pullback_": Operator(
        lists={
            "params": like(), "befores": lambda rng, p: laid_out(rng, tuple(p.shape), p.dtype),
            "second_moments": squares, "emas": like(), "steps": step_count,
        },
        optional={"stats": doubles(len(ops.PACE_STATS)), **{k: SCALING[k] for k in ("lr_tensor", "found_inf")}},
        options={
            **{
                k: v for k, v in AVERAGING.items()
                if k not in ("beta1", "weight_decay", "maximize")
            },
            "gain": numbers(None, None, 0.5, 0.0), "step_offset": numbers(0, 0, 40, 7, 2**63 - 1),
        },
        may_be_empty=("befores",),
        sums=("stats",),
        fit=pulled,
    ),
    "schedule_free_step_": Operator(
        lists={
            "params": like(), "grads": gradient, "exp_avg_sqs": squares, "zs": like(), "steps": step_count,
        },
        optional={"schedule": lambda rng: torch.tensor([3.0, rng.random()], dtype=torch.float64), **SCALING},
        options={
            **{k: AVERAGING[k] for k in ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize", "capturable")},
            "count": numbers(1.0, 5.0, 2.0**53), "share": numbers(0.1, 0.0, 1.0),
            "stochastic_rounding": numbers(False, True),
        },
        fit=with_codes(SCHEDULE_FREE),
    ),
}  # fmt: skip


# ---- what is done to a call ------------------------------------------------------------------------------------------

ALL_DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)


class Named(torch.Tensor):
    """A subclass that changes nothing."""


class Wrapper(torch.Tensor):
    """A subclass that holds its tensor inside."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        self.inner = inner
        return self  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def inner(value: Any) -> Any:
            return value.inner if isinstance(value, Wrapper) else value

        return func(*torch.utils._pytree.tree_map(inner, args), **torch.utils._pytree.tree_map(inner, kwargs or {}))


def of_dtype(rng: Rng, t: Tensor) -> Tensor:
    dtype = rng.choice(ALL_DTYPES)
    if dtype.is_floating_point or dtype.is_complex or not dtype.is_signed:
        try:
            return t.detach().to(dtype)
        except (RuntimeError, NotImplementedError):
            pass
    return torch.empty(t.shape, dtype=dtype)


def overlapping(rng: Rng, t: Tensor) -> Tensor:
    """Elements share memory, without stride 0."""
    sizes = list(t.shape)
    strides = [rng.randint(1, 2) for _ in sizes]
    last = sum(s * (n - 1) for s, n in zip(strides, sizes, strict=True)) + 1 if t.numel() else 0
    return torch.zeros(max(last, 0), dtype=t.dtype).as_strided(sizes, strides)


def byte_offset(rng: Rng, t: Tensor) -> Tensor:
    """Its address is no multiple of its element's size, which torch.frombuffer allows. torch's own copy_ of such a one
    may end the process."""
    size = t.numel() * t.dtype.itemsize
    if size == 0 or t.dtype not in (*NARROW, torch.float64):
        return t
    value = torch.frombuffer(bytearray(size + 1), dtype=t.dtype, offset=1).view(t.shape)
    value.fragile = True  # type: ignore[attr-defined]
    return value


def shrunk(rng: Rng, t: Tensor) -> Tensor:
    """Its storage was made smaller behind its back, as FSDP does to parameters that it has put away."""
    value = t.detach().clone(memory_format=torch.contiguous_format)
    size = value.untyped_storage().nbytes()
    value.untyped_storage().resize_(rng.choice((0, size // 2, max(size - 1, 0))))
    value.fragile = True  # type: ignore[attr-defined]
    return value


def vast_strides(rng: Rng, t: Tensor) -> Tensor:
    """No elements, and strides whose products no int64 holds."""
    shape = [0, *[max(2, n) for n in t.shape[1:]]] if t.dim() else [0, 3]
    return torch.empty(0, dtype=t.dtype).as_strided(shape, [rng.choice((1, 2**40, 2**62, 2**63 - 1)) for _ in shape])


def wrong_shape(rng: Rng, t: Tensor) -> Tensor:
    shape = list(t.shape)
    change = rng.randrange(4)
    if change == 0:
        shape.append(rng.choice((1, 2)))
    elif change == 1 and shape:
        shape.pop(rng.randrange(len(shape)))
    elif change == 2 and len(shape) > 1:
        rng.shuffle(shape)
    else:
        shape = [n + rng.choice((-1, 1)) if n else 1 for n in shape]
    return torch.zeros(shape, dtype=t.dtype)


def nested(rng: Rng, t: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor(
            [torch.zeros(2), torch.zeros(3)], layout=rng.choice((torch.strided, torch.jagged))
        )


def fake(rng: Rng, t: Tensor) -> Tensor:
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode().from_tensor(t.detach().clone())


def inference(rng: Rng, t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.detach().clone()


def expanded(rng: Rng, t: Tensor) -> Tensor:
    return torch.zeros((), dtype=t.dtype).expand(t.shape)


def quantized(rng: Rng, t: Tensor) -> Tensor:
    return torch.quantize_per_tensor(torch.zeros(t.shape), 0.1, 0, torch.quint8)


TENSORS: dict[str, Callable[[Rng, Tensor], Any]] = {
    "another dtype": of_dtype,
    "on meta": lambda rng, t: t.to("meta"),
    "sparse": lambda rng, t: torch.zeros(t.shape, dtype=t.dtype).to_sparse(),
    "sparse rows": lambda rng, t: torch.eye(3).to_sparse_csr(),
    "mkldnn": lambda rng, t: torch.zeros(t.shape).to_mkldnn(),
    "quantized": quantized,
    "nested": nested,
    "subclass": lambda rng, t: t.detach().as_subclass(Named),
    "wrapper subclass": lambda rng, t: Wrapper(t.detach().clone()),
    "requires a gradient": lambda rng, t: t.detach().clone().requires_grad_(t.is_floating_point() or t.is_complex()),
    "not a leaf": lambda rng, t: t.detach().clone().requires_grad_(t.is_floating_point() or t.is_complex()) * 1,
    "from inference mode": inference,
    "zeros without memory": lambda rng, t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "negative view": lambda rng, t: torch._neg_view(t.detach().clone()),
    "lazy copy": lambda rng, t: torch._lazy_clone(t.detach()),
    "functional": lambda rng, t: torch._to_functional_tensor(t.detach().clone()),
    "fake": fake,
    "expanded": expanded,
    "overlapping itself": overlapping,
    "transposed": lambda rng, t: (
        t.detach().clone().t() if t.dim() == 2 else t.detach().clone().movedim(0, -1) if t.dim() else t
    ),
    "not aligned to its elements": byte_offset,
    "of a shrunk storage": shrunk,
    "empty, vast strides": vast_strides,
    "another shape": wrong_shape,
    "None": lambda rng, t: None,
    "a number": lambda rng, t: 1.0,
}


# Where a plain copy is not the same call, or torch can't make one.
WITHOUT_TWIN = ("overlapping itself", "fake", "functional", "on meta", "shrunk", "not aligned")


def _lists(call: dict[str, Any]) -> list[str]:
    return [k for k, v in call.items() if isinstance(v, list) and (not v or not isinstance(v[0], (float, int)))]


def ordinary(value: Any) -> bool:
    """A tensor that can be changed further. Not one that torch itself would crash on: a negative view of a quantized
    one recurses without end."""
    dense = type(value) is Tensor and value.layout is torch.strided and value.is_cpu and not value.is_quantized
    return dense and not hasattr(value, "fragile")


def change_tensor(rng: Rng, call: dict[str, Any]) -> str:
    places = [(k, i) for k in _lists(call) for i in range(len(call[k]))]
    places += [(k, None) for k, v in call.items() if isinstance(v, Tensor)]
    if not places:
        return "nothing to change"
    name, i = rng.choice(places)
    what = rng.choice(list(TENSORS))
    old = call[name] if i is None else call[name][i]
    if not ordinary(old):
        return "nothing to change"
    try:
        new = TENSORS[what](rng, old)
    except Exception:
        return "nothing to change"  # torch can't make such a tensor
    if i is None:
        call[name] = new
    else:
        call[name][i] = new
    return f"a tensor {what}"


def change_list(rng: Rng, call: dict[str, Any]) -> str:
    lists = _lists(call)
    if not lists:
        return "nothing to change"
    name, other = rng.choice(lists), rng.choice(lists)
    what = rng.choice(
        ("shorter", "longer", "emptied", "twice the same", "another list", "shared memory", "interleaved")
    )
    values = call[name]
    if what == "shorter" and values:
        values.pop(rng.randrange(len(values)))
    elif what == "longer" and (values or call[other]):
        values.append(rng.choice(values if values else call[other]))
    elif what == "emptied":
        values.clear()
    elif what == "twice the same" and len(values) > 1:
        values[0] = values[1]
    elif what == "another list":
        call[name] = list(call[other])
    elif what == "shared memory" and values and call[other]:
        i = rng.randrange(min(len(values), len(call[other])))
        if isinstance(call[other][i], Tensor):
            values[i] = call[other][i]
    elif what == "interleaved" and values and ordinary(values[0]) and not values[0].is_nested:
        # Two tensors of one storage, every other element each.
        t = values[0]
        both = torch.zeros(2 * t.numel(), dtype=t.dtype)
        values[0] = both[::2].view(t.shape) if t.numel() else t
        if len(values) > 1 and isinstance(values[1], Tensor) and values[1].shape == t.shape and t.numel():
            values[1] = both[1::2].view(t.shape)
    return f"a list {what}"


def change_option(rng: Rng, call: dict[str, Any]) -> str:
    names = [k for k, v in call.items() if isinstance(v, (bool, int, float)) and not isinstance(v, Tensor)]
    names += [k for k, v in call.items() if isinstance(v, list) and v and isinstance(v[0], float)]
    if not names:
        return "nothing to change"
    name = rng.choice(names)
    value = call[name]
    if isinstance(value, bool):
        call[name] = rng.choice((not value, 2, "yes", None))
    elif isinstance(value, int):
        call[name] = rng.choice((*INTEGERS, 2**64, 0.5))
    elif isinstance(value, float):
        call[name] = rng.choice((*NUMBERS, None))
    elif rng.random() < 0.5:
        call[name] = value[: rng.randrange(7)] + [1.0] * rng.randrange(2)
    else:
        value[rng.randrange(len(value))] = rng.choice(NUMBERS)
    return "an option"


def change_optional(rng: Rng, call: dict[str, Any]) -> str:
    names = [k for k in (*SCALING, "stats", "coefficients", "hypergradients") if k in call]
    if not names:
        return "nothing to change"
    tensors = [t for k in _lists(call) for t in call[k] if isinstance(t, Tensor)]
    scalars = torch.zeros(()), torch.zeros(3), torch.ones(1, dtype=torch.float64), torch.zeros(14).double()
    call[rng.choice(names)] = rng.choice((*scalars, *tensors[:3]))
    return "an optional tensor"


CHANGES = (change_tensor, change_tensor, change_tensor, change_list, change_option, change_optional)


# ---- running a call --------------------------------------------------------------------------------------------------


KINDS = {"bool": bool, "int": int, "float": (int, float), "float?": (int, float, type(None))}


def by_plan(name: str) -> Callable[..., None]:
    """The operator's call as a plan takes it: kept first, then run with the gradients."""
    definition = DEFINITIONS[name]
    later = [entry.list in definition.lists_of("gradient") for entry in definition.lists] + [False]
    kinds = {option.name: option.type for option in definition.options} | {"capturable": "bool"}

    def function(*positional: Any, **keywords: Any) -> None:
        if not all(isinstance(keywords[key], KINDS[kind]) for key, kind in kinds.items()):
            raise TypeError("options of another type, as the operator refuses them")
        if any(kind == "float?" and keywords[key] != keywords[key] for key, kind in kinds.items()):
            raise ValueError("NaN, which plans take for None")
        numbers = [math.nan if keywords[key] is None else float(keywords[key]) for key in kinds]
        lists, rest = positional[: len(later)], positional[len(later) :]
        extras, scaling = rest[: len(definition.extras) + 1], rest[len(definition.extras) + 1 :]
        kept = [t for tensors, fresh in zip(lists, later, strict=True) if not fresh for t in tensors]
        grads = [t for tensors, fresh in zip(lists, later, strict=True) if fresh for t in tensors]
        scaling, beside = scaling[: len(definition.scaling)], scaling[len(definition.scaling) :]
        if any(beside):
            filled = [side or [] for side in beside] + [[]] * (len(definition.beside) - len(beside))
            kept, lists = [*kept, *itertools.chain(*filled)], (*lists, *filled)
        plan = _C.Plan()
        torch.ops.pace_kernels.plan_add_(plan.handle, name, kept, list(map(len, lists)), list(extras), numbers)
        if not grads and all(value is None for value in scaling):
            plan.step([])
            return
        named = dict(zip(definition.scaling, scaling, strict=False))
        torch.ops.pace_kernels.plan_step_(plan.handle, grads, [], **named)

    return function


# The operators, each called as it is; and those of steps by plans too.
WAYS: list[tuple[str, Callable[..., None] | None]] = [(name, None) for name in OPERATORS]
WAYS += [(name, by_plan(name)) for name in DEFINITIONS]


def tensors_of(call: dict[str, Any]) -> list[tuple[str, Tensor]]:
    flat = [(name, t) for name, v in call.items() for t in (v if isinstance(v, list) else [v])]
    return [(name, t.inner if isinstance(t, Wrapper) else t) for name, t in flat if isinstance(t, Tensor)]


def storage_of(t: Tensor) -> torch.UntypedStorage | None:
    """The memory behind a tensor, where it has some that can be seen."""
    try:
        storage = t.untyped_storage()
        return storage if storage.device.type == "cpu" and storage.data_ptr() and storage.nbytes() else None
    except (RuntimeError, NotImplementedError):
        return None


def bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def mark(covered: Tensor, t: Tensor) -> None:
    """Sets the bytes of ``t`` in the mask of its storage."""
    size = t.element_size()
    shape, strides = [*t.shape, size], [*(s * size for s in t.stride()), 1]
    if t.numel() and t.storage_offset() * size + sum(s * (n - 1) for s, n in zip(strides, shape, strict=True)) < len(
        covered
    ):
        covered.as_strided(shape, strides, t.storage_offset() * size).fill_(True)


def plain(value: Any) -> Any:
    """A contiguous copy with the same values."""
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, Tensor):
        value = value.inner if isinstance(value, Wrapper) else value
        with torch.no_grad():
            return torch.empty(value.shape, dtype=value.dtype, device=value.device).copy_(value)
    return value


def described(value: Any) -> Any:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) and not value.is_nested else value


def same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = plain(a), plain(b)
    if a.dtype.is_floating_point and a.element_size() == 1:
        a, b = a.float(), b.float()  # torch's functions below know few of these formats; float32 holds all their values
    return torch.equal(torch.isnan(a), torch.isnan(b)) and torch.equal(a.nan_to_num(), b.nan_to_num())


def reason(error: BaseException) -> str:
    """Which check refused, without the particulars."""
    line = str(error).strip().split("\n")[0]
    line = re.sub(r"^.*?\.h:\d+, |/\S*/", "", line)
    line = re.sub(r"pace_kernels::\w+", "OP", line)
    line = re.sub(r"\b\w+\[\d+\]", "LIST[i]", line)
    line = re.sub(r"got .*|'[^']*'|\b\d+(\.\d+)?(e[-+]?\d+)?\b|-?\binf\b|-?\bnan\b|\([^)]*\)", "#", line)
    line = re.sub(rf"\b({'|'.join(('grads', 'params', *ops.MADA_STATES))})\b", "LIST", line)
    return f"{type(error).__name__}: {line[:90]}"


class Failure(AssertionError):
    """What must never happen."""


def run_case(
    seed: int, number: int, verbose: bool = False, function: Callable[..., None] | None = None
) -> tuple[str, str, list[str]]:
    """The operator, the outcome and what was done to the call. ``function``: in place of the operator."""
    rng = Rng(f"{seed}/{number}")
    name, by = WAYS[number % len(WAYS)]
    operator = OPERATORS[name]
    call = operator.call(rng)
    changes = [rng.choice(CHANGES)(rng, call) for _ in range(rng.choice((0, 1, 1, 1, 1, 2, 3)))]
    op = getattr(torch.ops.pace_kernels, name).default
    label = name if by is None else f"{name} by a plan"
    schema = op._schema.arguments
    written = {a.name for a in schema if a.alias_info is not None and a.alias_info.is_write}
    if verbose:
        print(name, changes)
        for key, value in call.items():
            print(f"  {key}: {[described(v) for v in value] if isinstance(value, list) else described(value)}")

    storages: dict[int, torch.UntypedStorage] = {}
    covered: dict[int, Tensor] = {}
    owners = Counter()
    for argument, t in tensors_of(call):
        if isinstance(t, torch._subclasses.FakeTensor) or (storage := storage_of(t)) is None:
            continue
        key = storage.data_ptr()
        owners[key] += 1
        storages[key] = storage
        mask = covered.setdefault(key, torch.zeros(storage.nbytes(), dtype=torch.bool))
        if argument in written and t.layout is torch.strided and not t.is_quantized and not t.is_nested:
            mark(mask, t)
    before = {key: bytes_of(s).clone() for key, s in storages.items()}
    twin = None
    if all(count == 1 for count in owners.values()) and not any(what in str(changes) for what in WITHOUT_TWIN):
        try:
            twin = {k: plain(v) for k, v in call.items()}
        except (RuntimeError, NotImplementedError, TypeError):
            twin = None

    def split(arguments: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        return (
            [arguments.get(a.name) for a in schema if not a.kwarg_only],
            {a.name: arguments[a.name] for a in schema if a.kwarg_only and a.name in arguments},
        )

    positional, keywords = split(call)
    try:
        (function or by or op)(*positional, **keywords)
    except Exception as error:
        for key, s in storages.items():
            if not torch.equal(bytes_of(s), before[key]):
                raise Failure(f"case {number}: {label} refused ({error}), and had written; {changes}") from error
        return label, f"refused: {reason(error)}", changes
    if len({t.device.type for _, t in tensors_of(call)}) > 1:
        raise Failure(f"case {number}: {label} took tensors on several devices for a call that it can do; {changes}")
    for key, s in storages.items():
        changed = bytes_of(s) != before[key]
        if (changed & ~covered[key]).any():
            raise Failure(f"case {number}: {label} wrote beside its tensors; {changes}")
    if twin is None:
        return label, "computed", changes
    positional, keywords = split(twin)
    op(*positional, **keywords)
    for argument in written - set(operator.sums):
        ours, theirs = call.get(argument), twin.get(argument)
        for a, b in zip(*(v if isinstance(v, list) else [v] for v in (ours, theirs)), strict=True):
            if isinstance(a, Tensor) and not same_bits(a, b):
                raise Failure(
                    f"case {number}: {label} computed other bits than with plain copies, {argument}; {changes}"
                )
    return label, "computed, as with plain copies", changes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--cases", type=int, help="this many cases instead of --seconds")
    parser.add_argument("--only", type=int, help="this case alone")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--keep-going", action="store_true", help="report failures and go on")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    # torch prints tensors into some of its refusals. It ends the process where one has no memory; and where it can't
    # print one, it goes on without its handling of zeros without memory.
    torch.Tensor.__repr__ = lambda self, **_: f"a tensor of {self.dtype}"  # type: ignore[method-assign,misc]
    if arguments.only is not None:
        print(run_case(arguments.seed, arguments.only, verbose=True))
        return
    end = time.monotonic() + arguments.seconds
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    made: Counter[str] = Counter()
    total, failures = 0, []
    for number in itertools.count():
        if number >= arguments.cases if arguments.cases is not None else time.monotonic() > end:
            break
        print(f"seed {arguments.seed} case {number}", file=sys.stderr, flush=True)
        try:
            name, outcome, changes = run_case(arguments.seed, number, arguments.verbose)
        except Failure as failure:
            if not arguments.keep_going:
                raise
            failures.append(str(failure))
            continue
        outcomes[name][outcome] += 1
        made.update(changes or ["nothing"])
        total += 1
    report = {"cases": total, "failures": failures, "changes": dict(made.most_common())}
    report["outcomes"] = {name: dict(count.most_common()) for name, count in outcomes.items()}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
