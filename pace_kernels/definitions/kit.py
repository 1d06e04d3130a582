"""The parts of an optimizer's definition, and the operator's schema, which follows from it.

A definition says what every backend has to know: which tensors a step takes and which of them it changes, the names and
values of its options, and what is decided at compile time. The computation is written by hand in each language:
csrc/rules, triton_kernels, torch_rules. Nothing here needs torch: setup.py reads it to write the C++ header.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Range:
    """The values that an option may have; ``cpp`` is the name of the same check in csrc/checks.h."""

    cpp: str
    text: str
    allows: Callable[[float], bool]


_INFINITY = float("inf")
NONNEGATIVE = Range("nonnegative", "finite and >= 0", lambda a: 0.0 <= a < _INFINITY)
POSITIVE = Range("positive", "finite and > 0", lambda a: 0.0 < a < _INFINITY)
BELOW_ONE = Range("below_one", "in [0, 1)", lambda a: 0.0 <= a < 1.0)
UNIT = Range("unit", "in [0, 1]", lambda a: 0.0 <= a <= 1.0)
AT_LEAST_ONE = Range("at_least_one", ">= 1", lambda a: a >= 1)
NOT_NEGATIVE_COUNT = Range("not_negative", ">= 0", lambda a: a >= 0)


@dataclass(frozen=True)
class Option:
    name: str
    type: str = "float"  # of the schema: float, float?, int, bool
    allowed: Range | None = None
    default: str | None = None  # of the schema


@dataclass(frozen=True)
class Operand:
    """A tensor of the parameter's shape. ``reads`` and ``writes`` say when a step does, in terms of the definition's
    flags, as C++ has it. ``empty`` is the sentence that ends the refusal of a list of another length where the list may
    be missing; None: it has to be there. ``role`` says how it lies: a "weight"; a "gradient" or a "moment", in the
    weight's format or float32; a "copy", in the weight's format; a "state", in float32.

    ``codec`` says in what else it may lie (csrc/codes.h), and ``beside`` names the list of what lies beside it then,
    which as a rule is None: of a "weight" in bfloat16 what is left over of float32; of a "moment" or a "square" the
    scales of its codes; of an "average" or an "iterate", which differ in how they move, scales or what is left over of
    24 bits. A "second" moment's mean or maximum and a "gradient" that is kept lie in bfloat16 alone. ``dither`` says
    which 16 of the bits that an element's roundings are dithered by are its own, counted from the lowest: 2 k and
    2 k + 1 are the halves of the k-th word (`further` in csrc/codes.h)."""

    symbol: str  # in rules and kernels
    list: str  # of the operator
    role: str = "state"
    reads: str = "true"
    writes: str = "true"
    mutable: bool = True  # by the schema
    empty: str | None = None
    codec: str | None = None
    dither: int = 0

    @cached_property
    def beside(self) -> str | None:
        if self.codec in (None, "second", "gradient"):
            return None
        return "remainders" if self.codec == "weight" else f"{self.list.removesuffix('s')}_scales"

    def uses(self, flags: dict[str, bool]) -> tuple[bool, bool]:
        """Whether a step with these flags reads the operand, and whether it writes it."""
        names = {"true": True, "false": False, **flags}
        texts = (text.replace("||", " or ").replace("&&", " and ") for text in (self.reads, self.writes))
        reads, writes = (bool(eval(text, {}, names)) for text in texts)
        return reads, writes


@dataclass(frozen=True)
class Row:
    """A few float64 numbers that each parameter keeps between steps."""

    list: str
    numbers: int


@dataclass(frozen=True)
class Extra:
    """An optional tensor of float64 numbers of a call."""

    name: str
    numbers: int
    written: bool


STEPS = "steps"
SCALING = ("grad_scale", "clip_coef", "found_inf")


@dataclass(frozen=True)
class Definition:
    op: str  # the operator
    name: str  # in C++: NameOptions, NameDefinition
    lists: tuple[Operand | Row, ...]  # in the order of the schema; steps follow
    options: tuple[Option, ...]
    flags: tuple[str, ...]  # compile-time switches of the rule
    extras: tuple[Extra, ...] = ()
    scaling: tuple[str, ...] = SCALING
    sums: int = field(default=0)  # of the terms that a step can sum over coordinates

    @cached_property
    def operands(self) -> tuple[Operand, ...]:
        return tuple(entry for entry in self.lists if isinstance(entry, Operand))

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        return tuple(entry for entry in self.lists if isinstance(entry, Row))

    @cached_property
    def beside(self) -> tuple[str, ...]:
        """The lists of tensors stored beside operands, the last of the tensors. Rules do not see them: they see whole
        numbers."""
        return tuple(operand.beside for operand in self.operands if operand.beside is not None)

    def lists_of(self, *roles: str) -> tuple[str, ...]:
        return tuple(operand.list for operand in self.operands if operand.role in roles)

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """The values of the options that the schema has a default of."""
        return {o.name: json.loads(o.default.lower()) for o in self.options if o.default is not None}

    @cached_property
    def optional_tensors(self) -> tuple[str, ...]:
        return (*(extra.name for extra in self.extras), "lr_tensor", *self.scaling)

    def schema(self) -> str:
        letters: Iterator[str] = iter("abcdefghijklmnopqrstuvwxyz")

        def marked(kind: str, mutable: bool) -> str:
            return kind.replace("Tensor", f"Tensor({next(letters)}!)") if mutable else kind

        parts = [f"{marked('Tensor[]', not isinstance(e, Operand) or e.mutable)} {e.list}" for e in self.lists]
        parts.append(f"{marked('Tensor[]', True)} {STEPS}")
        parts += [f"{marked('Tensor?', extra.written)} {extra.name}=None" for extra in self.extras]
        parts += [f"Tensor? {name}=None" for name in ("lr_tensor", *self.scaling)]
        parts += [f"{marked('Tensor[]', True)}? {name}=None" for name in self.beside]
        defaults = [f"={option.default}" if option.default is not None else "" for option in self.options]
        options = [
            f"{option.type} {option.name}{default}" for option, default in zip(self.options, defaults, strict=True)
        ]
        return f"{self.op}({', '.join(parts)}, *, {', '.join(options)}, bool capturable) -> ()"


# Whether weights in bfloat16 with nothing beside them are rounded stochastically.
STOCHASTIC_ROUNDING = Option("stochastic_rounding", "bool", default="False")
# The options of the averaging weight and of the pull, which every rule with an average has.
PULLING = (Option("lambda_pullback", "float", NONNEGATIVE),)
AVERAGING = (
    Option("beta_ema", "float", UNIT),
    Option("ema_kappa", "float?", NONNEGATIVE),
    Option("ema_rho", "float", NONNEGATIVE),
    Option("ema_gamma", "float", NONNEGATIVE),
    Option("ema_update_freq", "int", AT_LEAST_ONE),
)
# What `stats` holds after a step, float64: sums, minima and maxima over all coordinates of the call. PaceStat in
# csrc/stats.h has the same order. "raw" is the gain before alpha c, "effective" before the clamp, "lambda" after it.
PACE_STATS = (
    *("count", "raw_sum", "raw_min", "raw_max", "effective_sum", "effective_min", "effective_max"),
    *("lambda_sum", "lambda_min", "lambda_max", "clipped", "adam_sq", "pullback_sq", "update_sq"),
)


# ---- the numbers of a step, in float64; csrc/scalars.h and triton_kernels compute the same ones ----------------------

# A number, or a tensor without dimensions where the step count or the learning rate is one.
Scalar: TypeAlias = Any
# The options of an operator, by name.
Options: TypeAlias = Any


def at_least(value: Scalar, low: Scalar) -> Scalar:
    return value.clamp(min=low) if hasattr(value, "clamp") else max(value, low)


def gain_weight(o: Options, t: Scalar) -> Scalar:
    """w_t in the gain; 1 without a decay exponent. ``o`` are the options of any rule that averages."""
    if o.ema_kappa is None:
        return 1.0
    return at_least((1.0 + o.ema_gamma * at_least(t - o.ema_rho, 0.0)) ** -o.ema_kappa, 1e-4)


def average_weight(o: Options, t: Scalar) -> Scalar:
    """w_t in the average; beta_ema without a decay exponent."""
    return o.beta_ema if o.ema_kappa is None else gain_weight(o, t)


def average_moves(o: Options, t: Scalar) -> Scalar:
    """1 or 0, as a number of t's kind."""
    moves = t % o.ema_update_freq == 0
    return moves.to(t.dtype) if hasattr(moves, "to") else float(moves)
