"""The PTX interpreter against Python's integers and fractions, one instruction at a time, and on compilers' output."""

from __future__ import annotations

import itertools
import math
import operator
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptx import Memory, PtxError, parse, run

NVCC = shutil.which("nvcc")
HEADER = ".version 8.6\n.target sm_90\n.address_size 64\n"
BITS = {"8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}
WIDTH = {"f16x2": 32, "bf16x2": 32, "u16x2": 32, "f32x2": 64, "bf16": 16, "pred": 8}


def width(type_: str) -> int:
    return WIDTH.get(type_) or int(type_[1:])


# Numbers of a type: integers as Python's, floats as Python's, packed pairs as their bits.


def encode(values: list[Any], type_: str) -> np.ndarray:
    if type_ in ("f16", "f32", "f64"):
        return np.array(values, dtype=f"f{width(type_) // 8}").view(BITS[str(width(type_))])
    if type_ == "bf16":
        return (np.array(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    mask = (1 << width(type_)) - 1
    return np.array([int(v) & mask for v in values], BITS[str(width(type_))])


def decode(bits: np.ndarray, type_: str) -> list[Any]:
    if type_ in ("f16", "f32", "f64"):
        return bits.view(f"f{width(type_) // 8}").astype(np.float64).tolist()
    if type_ == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64).tolist()
    numbers = bits.tolist()
    half = 1 << (width(type_) - 1)
    return [n - 2 * half if type_[0] == "s" and n >= half else n for n in numbers]


def evaluate(body: str, types: tuple[str, ...], result: str, rows: list[tuple[Any, ...]]) -> list[Any]:
    """Run instructions once a row: the operands are %a, %b, %c, %d, the result is %o, and %p, %q, %r0..., %l0... are
    there to be used."""
    columns = [encode(list(column), type_) for column, type_ in zip(zip(*rows, strict=True), types, strict=True)]
    lines = [
        ".reg .pred %p, %q, %pa, %pb, %pc, %pd; .reg .b16 %h<8>; .reg .b32 %r<8>; .reg .b64 %l<8>, %at;",
        ".reg .b32 %tid, %cta, %n; .reg .f32 %f<8>; .reg .f64 %g<4>;",
        "mov.u32 %tid, %tid.x; mov.u32 %cta, %ctaid.x; mad.lo.s32 %tid, %cta, 64, %tid;",
        "ld.param.u32 %n, [count]; setp.ge.u32 %p, %tid, %n; @%p bra END;",
    ]
    for name, type_ in zip("abcd", types, strict=False):
        bits = width(type_)
        lines.append(f".reg .b{max(bits, 16)} %{name};")
        lines.append(f"ld.param.u64 %l0, [{name}]; mad.wide.u32 %at, %tid, {bits // 8}, %l0;")
        lines.append(f"ld.global.b{bits} %{name}, [%at];")
        if type_ == "pred":
            lines.append(f"setp.ne.b16 %p{name}, %{name}, 0;")
    bits = width(result)
    target = "%p" if result == "pred" else "%o"
    lines.append(f".reg .b{max(bits, 16)} %o; {body}")
    if result == "pred":
        lines.append(f"selp.u16 %o, 1, 0, {target};")
    lines.append(f"ld.param.u64 %l0, [out]; mad.wide.u32 %at, %tid, {bits // 8}, %l0;")
    lines.append(f"st.global.b{bits} [%at], %o; END: ret;")
    parameters = ", ".join(f".param .u64 {name}" for name in [*"abcd"[: len(types)], "out"])
    text = f"{HEADER}.visible .entry test({parameters}, .param .u32 count) {{\n" + "\n".join(lines) + "\n}"
    memory = Memory()
    addresses = [memory.upload(column, readonly=True) for column in columns]
    out = memory.upload(np.zeros(len(rows), BITS[str(bits)]))
    run(text, "test", -(-len(rows) // 64), 64, [*addresses, out, len(rows)], memory)
    return decode(memory.download(out), "u8" if result == "pred" else result)


# What floats should give: exact fractions, rounded once.

FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127)}
FORMATS["f64"] = (53, -1022, 1023)


def round_fraction(x: Fraction, format_: str) -> float:
    """To nearest, ties to even."""
    precision, lowest, highest = FORMATS[format_]
    if x == 0:
        return 0.0
    exponent = max(x.numerator.bit_length() - x.denominator.bit_length() - 1, lowest)
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    quantum = Fraction(2) ** (exponent - precision + 1)
    result = round(x / quantum) * quantum
    largest = (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** highest
    return (1 if x > 0 else -1) * (math.inf if abs(result) > largest else float(abs(result)))


def flushed(x: float) -> float:
    return math.copysign(0.0, x) if abs(x) < 2.0**-126 else x


def exactly(operation: Callable[..., Any], format_: str, ftz: bool = False) -> Callable[..., float]:
    """The operation on fractions, rounded once; where an operand is no number or the result is zero, as IEEE does."""

    def reference(*operands: float) -> float:
        if ftz:
            operands = tuple(map(flushed, operands))
        with np.errstate(all="ignore"):
            naive = float(operation(*map(np.float64, operands)))
            if not all(map(math.isfinite, operands)):
                return naive
            try:
                exact = operation(*map(Fraction, operands))
            except (ZeroDivisionError, TypeError):
                return naive
            if exact == 0:
                return naive
            result = round_fraction(Fraction(exact), format_)
            return flushed(result) if ftz else result

    return reference


def square_root(x: Any) -> Any:
    """Of a fraction: cut off far beyond any format, with a last digit that tells that more follows."""
    if not isinstance(x, Fraction):
        return np.sqrt(x)
    if x < 0:
        raise TypeError
    scaled = x.numerator * x.denominator << 2400
    root = math.isqrt(scaled)
    return Fraction(2 * root + (root * root != scaled), 2 * x.denominator << 1200)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return a == b


SINGLES = [0.0, -0.0, 1.0, -1.0, 1.5, 1 + 2.0**-23, 1 - 2.0**-24, 3.0, -7.25, 0.1, 2.0**-126, 2.0**-149, -(2.0**-140)]
SINGLES += [3.1e-39, 1e-30, 1e30, 2.0**127, -(2 - 2.0**-23) * 2.0**127, 2.0**24 + 2, math.inf, -math.inf, math.nan]
SINGLES = [float(np.float32(x)) for x in SINGLES]
DOUBLES = [*SINGLES[:9], 0.1, 1 + 2.0**-52, 1 - 2.0**-53, 5e-324, -3e-310, 2.0**-1022, 1e-200, 1e300, 1.7e308]
DOUBLES += [math.inf, -math.inf, math.nan, 2.0**53 - 1, -1e154]
HALVES = [0.0, -0.0, 1.0, -1.5, 1 + 2.0**-10, 65504.0, 2.0**-14, 2.0**-24, -3 * 2.0**-24, 0.0999755859375, 1000.0]
HALVES += [math.inf, math.nan]
BFLOATS = [0.0, -0.0, 1.0, -1.5, 1 + 2.0**-7, 2.0**-126, 2.0**-133, 3.0, 1e3 // 8 * 8, (2 - 2.0**-7) * 2.0**127]
BFLOATS += [math.inf, math.nan]
INTEGERS = {
    16: [0, 1, 2, 15, 16, 0x7FFF, 0x8000, 0xFFFF, 0x1234],
    32: [0, 1, 2, 7, 31, 32, 33, 255, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678, 0xDEADBEEF],
    64: [0, 1, 3, 63, 64, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 0x123456789ABCDEF0, 0xDEADBEEFCAFEF00D],
}
VALUES = {"f32": SINGLES, "f64": DOUBLES, "f16": HALVES, "bf16": BFLOATS, "pred": [0, 1], "u8": [0, 1, 127, 128, 255]}


def values_of(type_: str) -> list[Any]:
    if type_ in VALUES:
        return VALUES[type_]
    numbers = INTEGERS[width(type_)]
    return [n - (1 << width(type_)) if type_[0] == "s" and n >> (width(type_) - 1) else n for n in numbers]


@dataclass
class Case:
    """``text`` run on all combinations of ``values`` (by default the interesting ones of each type). An opcode alone
    gets as many operands as there are types."""

    text: str
    types: tuple[str, ...]
    result: str
    reference: Callable[..., Any]
    values: list[list[Any]] | None = None

    def __post_init__(self) -> None:
        if " " not in self.text:
            operands = [f"%{'p' * (type_ == 'pred')}{name}" for name, type_ in zip("abcd", self.types, strict=False)]
            self.text += f" %{'p' if self.result == 'pred' else 'o'}, {', '.join(operands)};"

    def rows(self) -> list[tuple[Any, ...]]:
        rows = list(itertools.product(*(self.values or [values_of(t) for t in self.types])))
        rng = np.random.default_rng(len(rows))
        return rows if len(rows) <= 1500 else [rows[i] for i in rng.choice(len(rows), 1500, replace=False)]


def table(types: str, text: str, values: list[list[Any]] | None = None) -> list[Case]:
    """For each of ``types`` a case of each line: instruction; types of its operands; type of its result; what is
    expected of a, b and c. T is the type, W its double width, n its number of bits."""
    cases = []
    for T in types.split():
        known = {**globals(), "T": T, "n": width(T)}
        kind = {"T": T, "W": f"{T[0]}{2 * width(T)}"}
        for line in text.strip().splitlines():
            instruction, operands, result, expected = re.split(r"\s{2,}", line.strip())
            kinds = tuple(kind.get(each, each) for each in operands.split())
            reference = eval(f"lambda {', '.join('abc'[: len(kinds)])}: {expected}", known)
            cases.append(Case(instruction.replace(".T", f".{T}"), kinds, kind.get(result, result), reference, values))
    return cases


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def bit_field(a: int, start: int, length: int, bits: int, signed: bool) -> int:
    start, length = start & 255, length & 255
    raw = a & ((1 << bits) - 1)
    last = min(start + length - 1, bits - 1)
    sign = raw >> last & 1 if signed and length else 0
    return sum((raw >> (start + i) & 1 if i < length and start + i < bits else sign) << i for i in range(bits))


def permuted(a: int, b: int, selector: int) -> int:
    source = (b << 32 | a).to_bytes(8, "little")
    result = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = source[nibble & 7]
        result |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * i
    return result


def packed(element: str, function: Callable[..., Any]) -> Callable[..., int]:
    """The reference of an instruction on packed pairs."""
    bits = width(element)

    def reference(*operands: int) -> int:
        halves = []
        for shift in (0, bits):
            values = decode(np.array([o >> shift & (1 << bits) - 1 for o in operands], BITS[str(bits)]), element)
            halves.append(int(encode([function(*values)], element)[0]))
        return halves[1] << bits | halves[0]

    return reference


def unordered(holds: Callable[..., bool], if_nan: bool) -> Callable[..., bool]:
    return lambda a, b: if_nan if math.isnan(a) or math.isnan(b) else holds(a, b)


ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip

INTEGER_CASES = [
    *table("s16 u16 s32 u32 s64 u64", """
        add.T       T T    T  a + b
        sub.T       T T    T  a - b
        mul.lo.T    T T    T  a * b
        mul.hi.T    T T    T  a * b >> n
        div.T       T T    T  truncated(a, b) if b else -1
        rem.T       T T    T  a - b * truncated(a, b) if b else a
        min.T       T T    T  min(a, b)
        max.T       T T    T  max(a, b)
        mad.lo.T    T T T  T  a * b + c
        shr.T       T u32  T  a >> min(b, n)
    """),
    *table("s16 u16 s32 u32", """
        mul.wide.T  T T    W  a * b
        mad.wide.T  T T W  W  a * b + c
    """),
    *table("s32 u64", "mad.hi.T  T T T  T  (a * b >> n) + c"),
    *table("b16 b32 b64", """
        and.T       T T    T  a & b
        or.T        T T    T  a | b
        xor.T       T T    T  a ^ b
        not.T       T      T  ~a
        shl.T       T u32  T  a << b if b < n else 0
    """),
    *table("b32 b64", """
        popc.T      T      u32  a.bit_count()
        clz.T       T      u32  n - a.bit_length()
    """),
    *table("s32 s64", """
        neg.T       T      T  -a
        abs.T       T      T  abs(a)
    """),
    *[
        case
        for type_ in ("u32", "s32", "u64", "s64")
        for case in table(type_, "bfe.T  T u32 u32  T  bit_field(a, b, c, n, T[0] == 's')",
                          [values_of(type_), [0, 1, 5, 31, 32, 63, 64, 256 + 3], [0, 1, 4, 31, 32, 33, 64, 255]])
    ],
    *table("u32", "prmt.b32  T T T  T  permuted(a, b, c & 0xFFFF)"),
    *table("u16x2", "max.T  T T  T  packed('u16', max)(a, b)",
           [[0x00010002, 0xFFFF0000, 0x8000007F], [0x00020001, 0x7FFF0001]]),
    # Selections, comparisons and their combinations.
    *table("u32", """
        selp.b32                                      T T pred  T     a if c else b
        mov.b32 %o, %a; selp.b32 %o, %o, %b, %pc;     T T pred  T     a if c else b
        mov.b32 %o, %b; selp.b32 %o, %a, %o, %pc;     T T pred  T     a if c else b
        setp.lo.s32                                   T T       pred  a < b
        setp.hs.u32                                   T T       pred  a >= b
        mov.u32 %o, 7; @%pa mov.u32 %o, %b;           pred T    T     b if a else 7
        mov.u32 %o, 7; @!%pa add.u32 %o, %b, 1;       pred T    T     7 if a else b + 1
    """),
    *[
        Case(f"setp.{name}.{type_}", (type_, type_), "pred", function)
        for type_ in ("s16", "u32", "s32", "s64", "u64")
        for name, function in ORDER.items()
    ],
    *table("s32", """
        setp.lt.and.s32 %p, %a, %b, %pc;              T T pred  pred  a < b and c
        setp.lt.or.s32 %p, %a, %b, %pc;               T T pred  pred  a < b or c
        setp.lt.xor.s32 %p, %a, %b, %pc;              T T pred  pred  (a < b) != c
        setp.lt.and.s32 %p, %a, %b, !%pc;             T T pred  pred  a < b and not c
        setp.lt.or.s32 %p, %a, %b, !%pc;              T T pred  pred  a < b or not c
        setp.lt.xor.s32 %p, %a, %b, !%pc;             T T pred  pred  (a < b) == c
        setp.lt.and.s32 %q|%p, %a, %b, %pc;           T T pred  pred  a >= b and c
    """),
    *table("pred", """
        and.T       T T    T  a & b
        xor.T       T T    T  a ^ b
        not.T       T      T  1 - a
    """),
    # Literals, vectors in braces, registers of two names in nested scopes.
    *table("u32", """
        xor.b32 %o, %a, 0xFF00FF00;                                 T    T  a ^ 0xFF00FF00
        add.u32 %o, %a, 0b101; add.u32 %o, %o, 010;                 T    T  a + 5 + 8
        mov.b32 {%h0, %h1}, %a; mov.b32 %o, {%h1, %h0};             T    T  a >> 16 | (a & 0xFFFF) << 16
        mov.b64 {_, %r1}, %a; mov.u32 %o, %r1;                      u64  T  a >> 32
    """),
    Case(
        "mov.u32 %o, 1; { .reg .b32 %o; mov.u32 %o, %a; { .reg .b32 %x; mov.u32 %x, %o; } } add.u32 %o, %o, %a;",
        ("u32",), "u32", lambda a: a + 1,
    ),
    # Narrow loads and conversions extend by the sign of the type into a wider register.
    *table("s32", """
        add.s32 %o, %a, -5;  T    T    a - 5
        cvt.s32.s8           u32  T    (a & 255) - 256 * (a >> 7 & 1)
        cvt.s8.s32           u32  T    (a & 255) - 256 * (a >> 7 & 1)
        cvt.u8.u32           u32  u32  a & 255
        cvt.u64.u32          u32  u64  a
        cvt.s64.s32          T    s64  a
        cvt.u32.u64          u64  u32  a
    """),
]  # fmt: skip


def smallest(a: float, b: float) -> float:
    if math.isnan(a) or math.isnan(b):
        return b if math.isnan(a) else a
    return min(a, b, key=lambda x: (x, math.copysign(1, x)))


def largest(a: float, b: float) -> float:
    return -smallest(-a, -b)


def or_nan(function: Callable[[float, float], float]) -> Callable[[float, float], float]:
    return lambda a, b: math.nan if math.isnan(a) or math.isnan(b) else function(a, b)


PAIRS = [
    [0x3F8000003F000000, 0xC0000000BF800000, 0x0000000133800001],
    [0x3E0000003F800000, 0x4000000040400000],
    [0x3F80000133800000, 0x80000000C0400000],
]
EXACT: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
    "fma": lambda a, b, c: a * b + c, "rcp": lambda a: 1 / a, "sqrt": square_root,
}  # fmt: skip
OPERANDS = {"fma": 3, "rcp": 1, "sqrt": 1}


def rounded(opcode: str, type_: str, values: list[list[Any]] | None = None) -> Case:
    """The operation, rounded once."""
    name, n = opcode.partition(".")[0], OPERANDS.get(opcode.partition(".")[0], 2)
    if type_ == "f32x2":
        reference: Callable[..., Any] = packed("f32", exactly(EXACT[name], "f32"))
    else:
        reference = exactly(EXACT[name], type_, ftz=".ftz" in opcode)
    return Case(f"{opcode}.{type_}", (type_,) * n, type_, reference, values and values[:n])


FLOAT_CASES = [
    *[rounded(f"{name}.rn", type_) for type_ in ("f32", "f64") for name in EXACT],
    *[rounded(f"{name}.rn.ftz", "f32") for name in ("add", "mul", "fma", "div")],
    *[rounded(f"{name}.rn", "f32x2", PAIRS) for name in ("add", "mul", "fma")],
    *table("f32 f64", """
        min.T  T T  T  smallest(a, b)
        max.T  T T  T  largest(a, b)
        abs.T  T    T  abs(a)
        neg.T  T    T  -a
    """),
    *[
        Case(f"setp.{name}{u}.{type_}", (type_, type_), "pred", unordered(function, u == "u"))
        for type_ in ("f32", "f64", "bf16")
        for u in ("", "u")
        for name, function in ORDER.items()
    ],
    *table("f32", """
        min.NaN.f32                T T      T     or_nan(smallest)(a, b)
        max.NaN.f32                T T      T     or_nan(largest)(a, b)
        copysign.f32               T T      T     math.copysign(b, a)
        setp.num.f32               T T      pred  not (math.isnan(a) or math.isnan(b))
        setp.nan.f64               f64 f64  pred  math.isnan(a) or math.isnan(b)
        setp.eq.ftz.f32            T T      pred  flushed(a) == flushed(b)
        add.f32 %o, %a, 0f3FC00000;          T    T    exactly(operator.add, T)(a, 1.5)
        mul.f64 %o, %a, 0dBFF8000000000000;  f64  f64  a * -1.5
    """),
]  # fmt: skip

INTEGRAL: dict[str, Callable[[Fraction], int]] = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


def to_integer(mode: str, type_: str) -> Callable[[float], int]:
    bits = width(type_)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if type_[0] == "s" else (0, (1 << bits) - 1)

    def reference(x: float) -> int:
        if math.isnan(x):
            return 0
        if math.isinf(x):
            return high if x > 0 else low
        return max(low, min(high, INTEGRAL[mode](Fraction(x))))

    return reference


def converted(format_: str) -> Callable[[float], float]:
    return lambda x: x if not math.isfinite(x) or x == 0 else round_fraction(Fraction(x), format_)


NARROWED = [*SINGLES, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 2.0**-8 + 2.0**-20, -65519.0, 65520.0, 2.0**-25]
NARROWED += [3.3895313892515355e38, 1.1 * 2.0**-133, -0.3333333432674408, 1 + 2.0**-10 + 2.0**-11]
NARROWED = [float(np.float32(x)) for x in NARROWED]
WIDE = [*NARROWED, 1 + 2.0**-24, 1 + 3 * 2.0**-24, 1 + 2.0**-24 + 2.0**-50, 2.0**-150, 2.0**-150 * (1 + 2.0**-40)]
WIDE += [1e-50, 3.4028235677973366e38, 3.4028235677973362e38, -1e300]
STEPS = [0.0, -0.0, 0.5, -0.5, 1.5, 2.5, -2.5, 0.49999997, 127.5, 128.0, -129.0, 255.5, 2.0**31 - 64]
STEPS += [2.0**31, -(2.0**31)]
STEPS += [2.0**32, 2.0**63, 2.0**64, -(2.0**63), -(2.0**64), 1e30, math.inf, -math.inf, math.nan, 1e-40]
STEPS = [float(np.float32(x)) for x in STEPS]
COUNTS = {
    "s32": [0, 1, -1, 2**24 + 1, 2**24 + 3, -(2**24) - 1, 2**31 - 1, -(2**31), 2**25 + 6],
    "u32": [0, 1, 2**24 + 1, 2**32 - 1, 2**31 + 127, 2**31 + 128, 2**31 + 384],
    "s64": [0, 2**53 + 1, 2**53 + 3, -(2**53) - 1, 2**63 - 1, -(2**63), 2**40 + 1, 2**62 + 2**38 + 1],
    "u64": [0, 2**53 + 1, 2**64 - 1, 2**63 + 1, 2**63 + 2**39, 2**63 + 2**39 + 1, 2**63 + 1024],
}

NUMBERS = [x for x in NARROWED if not math.isnan(x)]


def pair_of(to: str) -> Callable[[float, float], int]:
    short = converted(to)
    return lambda a, b: int(encode([short(a)], to)[0]) << 16 | int(encode([short(b)], to)[0])


def integral(mode: str) -> Callable[[float], float]:
    return lambda a: math.copysign(float(abs(INTEGRAL[mode](Fraction(a)))), a) if math.isfinite(a) else a


CONVERSIONS = [
    *table("f16 bf16", "cvt.rn.T.f32  f32  T  converted(T)(a)", [NARROWED]),
    *table("f16 f32", "cvt.rn.T.f64  f64  T  converted(T)(a)", [WIDE]),
    *table("f16 bf16", "cvt.f32.T  T  f32  a"),
    *table("f32", """
        cvt.f64.T      T  f64  a
        cvt.ftz.f64.T  T  f64  flushed(a)
    """),
    *[Case(f"cvt.rn.{to}x2.f32", ("f32", "f32"), f"{to}x2", pair_of(to), [NUMBERS, NUMBERS]) for to in ("f16", "bf16")],
    *[
        case
        for mode in INTEGRAL
        for to in ("s32", "u32", "s64", "u64", "s16")
        for case in table("f32 f64", f"cvt.{mode}.{to}.T  T  {to}  to_integer('{mode}', '{to}')(a)", [STEPS])
    ],
    *table("f32", "cvt.rzi.ftz.s32.T  T  s32  to_integer('rzi', 's32')(a)", [STEPS]),
    *[case for mode in INTEGRAL for case in table("f32 f64", f"cvt.{mode}.T.T  T  T  integral('{mode}')(a)", [STEPS])],
    *[
        case
        for origin, counts in COUNTS.items()
        for case in table("f32 f64", f"cvt.rn.T.{origin}  {origin}  T  round_fraction(Fraction(a), T)", [counts])
    ],
]  # fmt: skip


@pytest.mark.parametrize("case", [*INTEGER_CASES, *FLOAT_CASES, *CONVERSIONS], ids=lambda case: case.text[:60])
def test_instruction(case: Case) -> None:
    rows = case.rows()
    results = evaluate(case.text, case.types, case.result, rows)
    for row, result in zip(rows, results, strict=True):
        expected = case.reference(*row)
        if case.result[0] in "usb" and case.result[:2] != "bf":
            expected = decode(encode([expected], case.result), case.result)[0]
        elif case.result == "pred":
            expected = int(expected)
        assert same(result, expected), f"{case.text} of {row} gave {result}, not {expected}"


@pytest.mark.parametrize(
    ("text", "type_", "function", "units"),
    [
        ("sqrt.approx.f32 %o, %a;", "f32", np.sqrt, 1),
        ("rcp.approx.f32 %o, %a;", "f32", lambda x: 1 / x, 1),
        ("rcp.approx.ftz.f64 %o, %a;", "f64", lambda x: 1 / x, 2**33),
    ],
)
def test_approximation(text: str, type_: str, function: Callable[[np.ndarray], np.ndarray], units: int) -> None:
    x = np.random.default_rng(0).uniform(0.01, 30, 200).astype(type_.replace("f32", "f4").replace("f64", "f8"))
    result = np.array(evaluate(text, (type_,), type_, [(v,) for v in x.tolist()]))
    expected = function(x.astype(np.float64)).astype(x.dtype)
    assert (np.abs(result - expected) <= units * np.spacing(np.abs(expected))).all()


# Rounding, with drawn operands. Exponents lie close together often, so that sums cancel and halves meet.


def doubles(bits: int, spread: int, limit: int) -> st.SearchStrategy[float]:
    return st.one_of(
        st.builds(
            lambda sign, fraction, exponent: sign * math.ldexp(fraction, exponent - bits),
            st.sampled_from([1.0, -1.0]),
            st.integers(0, 2**bits - 1),
            st.one_of(st.integers(-spread, spread), st.integers(-limit, limit)),
        ),
        st.floats(width=64 if bits == 53 else 32),
    )


def rows_of(elements: st.SearchStrategy[float], operands: int) -> st.SearchStrategy[list[tuple[float, ...]]]:
    return st.lists(st.tuples(*[elements] * operands), min_size=1, max_size=40)


def check_rounding(text: str, type_: str, function: Callable[..., Any], rows: list[tuple[float, ...]]) -> None:
    reference = exactly(function, type_)
    # More than eight lanes, all different, are computed another way than few or equal ones.
    rows = [*rows, *[(1.25,) * len(rows[0]), (3.0,) * len(rows[0])] * 5]
    for row, result in zip(rows, evaluate(text, (type_,) * len(rows[0]), type_, rows), strict=True):
        assert same(result, reference(*row)), f"{text} of {row}"


@settings(max_examples=100, deadline=None)
@given(rows=rows_of(doubles(24, 30, 127).map(lambda x: float(np.float32(x))), 3))
def test_fma_f32(rows: list[tuple[float, ...]]) -> None:
    check_rounding("fma.rn.f32 %o, %a, %b, %c;", "f32", lambda a, b, c: a * b + c, rows)


@settings(max_examples=60, deadline=None)
@given(rows=rows_of(doubles(53, 60, 1020), 3))
def test_fma_f64(rows: list[tuple[float, ...]]) -> None:
    check_rounding("fma.rn.f64 %o, %a, %b, %c;", "f64", lambda a, b, c: a * b + c, rows)


def test_zeros_of_both_signs_are_not_taken_for_equal() -> None:
    rows = [(-0.0, 1.0, 0.0), (-0.0, 1.0, -0.0)] * 8
    results = evaluate("fma.rn.f64 %o, %a, %b, %c;", ("f64",) * 3, "f64", rows)
    assert [math.copysign(1, r) for r in results] == [1, -1] * 8


@settings(max_examples=40, deadline=None)
@given(values=st.lists(doubles(53, 40, 160), min_size=1, max_size=40))
def test_narrowing(values: list[float]) -> None:
    for to in ("f32", "f16"):
        results = evaluate(f"cvt.rn.{to}.f64 %o, %a;", ("f64",), to, [(v,) for v in values])
        assert all(same(r, converted(to)(v)) for r, v in zip(results, values, strict=True))


# Kernels: control flow, memory, warps, barriers, calls.


def kernel(body: str, parameters: str = ".param .u64 out", before: str = "") -> str:
    """``%i`` is the thread's number in its block, ``%out`` the first parameter plus 4 %i."""
    return f"""{HEADER}{before}
.visible .entry test({parameters})
{{
    .reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<32>, %i, %cta; .reg .b64 %l<16>, %out; .reg .f32 %f<8>;
    .reg .f64 %d<8>;
    mov.u32 %i, %tid.x; mov.u32 %cta, %ctaid.x;
    ld.param.u64 %l0, [out]; cvta.to.global.u64 %l0, %l0; mad.wide.u32 %out, %i, 4, %l0;
    {body}
    ret;
}}"""


def launch(
    body: str,
    threads: int = 64,
    size: int | np.ndarray | None = None,
    grid: int = 1,
    before: str = "",
    parameters: str = ".param .u64 out",
    arguments: tuple[Any, ...] = (),
    source: np.ndarray | None = None,
    **options: Any,
) -> tuple[np.ndarray, dict[str, Any]]:
    """What it left at ``out``, of ``size`` words or like an array, and its statistics. ``source`` may be read at
    [in]; the addresses of both are among the statistics."""
    memory = Memory()
    out = memory.upload(size if isinstance(size, np.ndarray) else np.zeros(size or threads, np.uint32))
    if source is not None:
        parameters, arguments = f"{parameters}, .param .u64 in", (memory.upload(source, readonly=True), *arguments)
    stats = run(kernel(body, parameters, before), "test", grid, threads, [out, *arguments], memory, **options)
    return memory.download(out), {**stats, "addresses": [out, *arguments]}


def test_special_registers() -> None:
    body = """mov.u32 %r0, %laneid; mov.u32 %r1, %warpid; mov.u32 %r2, %ntid.x; mov.u32 %r3, %lanemask_lt;
    shl.b32 %r0, %r0, 8; or.b32 %r0, %r0, %r1; shl.b32 %r2, %r2, 16; or.b32 %r0, %r0, %r2;
    popc.b32 %r3, %r3; shl.b32 %r3, %r3, 25; add.u32 %r0, %r0, %r3; st.global.u32 [%out], %r0;"""
    out, _ = launch(body)
    i = np.arange(64)
    assert (out == (i % 32 << 8 | i // 32 | 64 << 16) + (i % 32 << 25)).all()


def test_three_dimensions() -> None:
    memory = Memory()
    out = memory.upload(np.zeros((2, 3, 4, 5, 6, 7), np.uint32))
    text = f"""{HEADER}.entry test(.param .u64 out) {{ .reg .b32 %r<16>; .reg .b64 %l<4>;
    mov.u32 %r0, %ctaid.z; mov.u32 %r1, %ctaid.y; mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %tid.z; mov.u32 %r4, %tid.y; mov.u32 %r5, %tid.x;
    mov.u32 %r6, %nctaid.y; mad.lo.u32 %r7, %r0, %r6, %r1; mov.u32 %r6, %nctaid.x; mad.lo.u32 %r7, %r7, %r6, %r2;
    mov.u32 %r6, %ntid.z; mad.lo.u32 %r7, %r7, %r6, %r3; mov.u32 %r6, %ntid.y; mad.lo.u32 %r7, %r7, %r6, %r4;
    mov.u32 %r6, %ntid.x; mad.lo.u32 %r7, %r7, %r6, %r5;
    ld.param.u64 %l0, [out]; mad.wide.u32 %l1, %r7, 4, %l0; st.global.u32 [%l1], %r7; }}"""
    run(text, "test", (4, 3, 2), (7, 6, 5), [out], memory)
    assert (memory.download(out).ravel() == np.arange(5040)).all()


DIVERGENT = """
    mov.u32 %r0, 0; mov.u32 %r1, %i;
LOOP: setp.eq.u32 %p0, %r1, 0; @%p0 bra DONE;
    and.b32 %r2, %r1, 1; setp.ne.u32 %p1, %r2, 0; @%p1 bra ODD;
    add.u32 %r0, %r0, %r1; bra NEXT;
ODD: mad.lo.u32 %r0, %r1, 3, %r0;
NEXT: sub.u32 %r1, %r1, 1; bra.uni LOOP;
DONE: st.global.u32 [%out], %r0;"""


@pytest.mark.parametrize("serial", [False, True])
def test_divergence_and_reconvergence(serial: bool) -> None:
    out, _ = launch(DIVERGENT, 96, warp_serial=np.random.default_rng(0) if serial else None)
    assert out.tolist() == [sum(3 * k if k % 2 else k for k in range(i + 1)) for i in range(96)]


def test_divergence_ends_before_a_full_shuffle() -> None:
    body = """mov.u32 %r0, %i; and.b32 %r1, %i, 1; setp.eq.u32 %p0, %r1, 0; @%p0 bra JOIN; add.u32 %r0, %r0, 100;
    JOIN: shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1; st.global.u32 [%out], %r2;"""
    out, _ = launch(body)
    assert out.tolist() == [(i ^ 1) + 100 * ((i ^ 1) % 2) for i in range(64)]


def test_a_register_written_under_a_predicate_keeps_its_value() -> None:
    """From one round of a loop to the next, though the loop alone mentions it, and however arrays are shared."""
    body = """mov.u32 %r0, 0; mov.u32 %r1, 0;
    LOOP: setp.eq.u32 %p0, %r1, 0; @%p0 mov.u32 %r5, %i; @!%p0 add.u32 %r0, %r0, %r5;
    mul.lo.u32 %r6, %r1, 7; mul.lo.u32 %r7, %r6, 3; add.u32 %r8, %r7, %r6;
    add.u32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, 4; @%p1 bra LOOP;
    st.global.u32 [%out], %r0;"""
    assert launch(body)[0].tolist() == [3 * i for i in range(64)]


def test_early_exit_and_indexed_branch() -> None:
    body = """setp.ge.u32 %p0, %i, 40; @%p0 ret;
    and.b32 %r0, %i, 3;
    TARGETS: .branchtargets A, B, C, D;
    brx.idx %r0, TARGETS;
    A: mov.u32 %r1, 10; bra END;
    B: mov.u32 %r1, 20; bra END;
    C: mov.u32 %r1, 30; bra END;
    D: mov.u32 %r1, 40;
    END: st.global.u32 [%out], %r1;"""
    out, stats = launch(body)
    assert out.tolist() == [10 * (i % 4 + 1) if i < 40 else 0 for i in range(64)]
    assert stats["st_bytes"] == 160


REVERSE = """
    .shared .align 4 .b8 buffer[256];
    mov.u32 %r0, buffer; shl.b32 %r1, %i, 2; add.u32 %r2, %r0, %r1; st.shared.u32 [%r2], %i;
    {barrier}
    sub.u32 %r3, 252, %r1; add.u32 %r3, %r0, %r3; ld.shared.u32 %r4, [%r3]; st.global.u32 [%out], %r4;"""


def test_shared_memory_with_a_barrier() -> None:
    for serial in (None, np.random.default_rng(3)):
        out, stats = launch(REVERSE.replace("{barrier}", "bar.sync 0;"), warp_serial=serial)
        assert out.tolist() == list(range(63, -1, -1))
        assert stats["barriers"] == 1


def test_a_missing_barrier_shows_with_one_warp_at_a_time_only() -> None:
    body = REVERSE.replace("{barrier}", "")
    assert launch(body)[0].tolist() == list(range(63, -1, -1))
    assert launch(body, warp_serial=np.random.default_rng(3))[0].tolist() != list(range(63, -1, -1))


def test_warps_run_in_random_order() -> None:
    body = """and.b32 %r1, %i, 31; setp.ne.u32 %p0, %r1, 0; @%p0 ret; atom.global.add.u32 %r0, [%l0], 1;
    mov.u32 %r2, %warpid; mad.wide.u32 %l1, %r0, 4, %l0; st.global.u32 [%l1+4], %r2;"""
    lock_step, *serial = (
        launch(body, 256, 9, warp_serial=order)[0][1:].tolist()
        for order in (None, np.random.default_rng(0), np.random.default_rng(1))
    )
    assert lock_step == list(range(8))
    assert serial[0] != serial[1] and sorted(serial[0]) == sorted(serial[1]) == lock_step


def test_dynamic_shared_memory() -> None:
    before = ".extern .shared .align 16 .b8 pool[];"
    body = """.shared .align 8 .b8 fixed[8];
    mov.u32 %r0, pool; shl.b32 %r1, %i, 2; add.u32 %r2, %r0, %r1; st.shared.u32 [%r2], %i; st.shared.u32 [fixed], 5;
    bar.sync 0; xor.b32 %r3, %r1, 128; add.u32 %r3, %r0, %r3; ld.shared.u32 %r4, [%r3]; ld.shared.u32 %r5, [fixed];
    add.u32 %r4, %r4, %r5; st.global.u32 [%out], %r4;"""
    out, _ = launch(body, before=before, dynamic_shared=256)
    assert out.tolist() == [(i ^ 32) + 5 for i in range(64)]
    with pytest.raises(PtxError, match="out-of-bounds shared"):
        launch(body, before=before, dynamic_shared=252)


def test_barriers_of_some_threads_and_reductions_over_a_block() -> None:
    body = """setp.lt.u32 %p0, %i, 32; @%p0 bra FIRST; bar.sync 1, 64; bra JOIN;
    FIRST: bar.sync 1, 64;
    JOIN: and.b32 %r0, %i, 3; setp.eq.u32 %p1, %r0, 0; bar.red.popc.u32 %r1, 0, %p1; bar.red.and.pred %p2, 0, %p1;
    bar.red.or.pred %p3, 0, %p1; selp.u32 %r2, 100, 0, %p2; selp.u32 %r3, 1000, 0, %p3; add.u32 %r1, %r1, %r2;
    add.u32 %r1, %r1, %r3; st.global.u32 [%out], %r1;"""
    for serial in (None, np.random.default_rng(0)):
        assert set(launch(body, grid=3, warp_serial=serial)[0].tolist()) == {1016}


def test_divergent_barrier_is_reported() -> None:
    with pytest.raises(PtxError, match="divergent aligned barrier"):
        launch("setp.lt.u32 %p0, %i, 7; @%p0 bra SKIP; bar.sync 0; SKIP: st.global.u32 [%out], %i;")


def test_deadlock_at_a_barrier_is_reported() -> None:
    with pytest.raises(PtxError, match="deadlock"):
        launch("setp.lt.u32 %p0, %i, 32; @%p0 bra A; bar.sync 1; bra END; A: bar.sync 2; END: mov.u32 %r0, 0;")
    with pytest.raises(PtxError, match="deadlock"):
        launch("setp.lt.u32 %p0, %i, 32; @%p0 bra END; bar.sync 1, 64; END: mov.u32 %r0, 0;")


def test_endless_loop_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptx.executor._STEP_LIMIT", 1000)
    with pytest.raises(PtxError, match="no end"):
        launch("HERE: bra HERE;")


SHUFFLES = {
    "shfl.sync.up.b32 %r1, %i, 3, 0, -1": lambda i: i - 3 if i % 32 >= 3 else i,
    "shfl.sync.down.b32 %r1, %i, 5, 31, -1": lambda i: i + 5 if i % 32 + 5 < 32 else i,
    "shfl.sync.bfly.b32 %r1, %i, 17, 31, -1": lambda i: i ^ 17,
    "shfl.sync.idx.b32 %r1, %i, 9, 31, -1": lambda i: i // 32 * 32 + 9,
    "shfl.sync.idx.b32 %r1, %i, 9, 6175, -1": lambda i: i // 8 * 8 + 1,  # segments of 8 lanes
    "shfl.sync.down.b32 %r1, %i, 2, 7199, -1": lambda i: i + 2 if i % 4 < 2 else i,  # of 4 lanes
    "shfl.sync.up.b32 %r1, %i, 3, 6144, -1": lambda i: i - 3 if i % 8 >= 3 else i,
}


@pytest.mark.parametrize("text", SHUFFLES)
@pytest.mark.parametrize("serial", [False, True])
def test_shuffle(text: str, serial: bool) -> None:
    order = np.random.default_rng(0) if serial else None
    out, _ = launch(f"{text}; st.global.u32 [%out], %r1;", warp_serial=order)
    assert out.tolist() == [SHUFFLES[text](i) for i in range(64)]


def test_shuffle_tells_whether_its_source_was_in_range() -> None:
    body = "shfl.sync.up.b32 %r1|%p0, %i, 4, 0, -1; selp.u32 %r2, 1, 0, %p0; st.global.u32 [%out], %r2;"
    assert launch(body)[0].tolist() == [int(i % 32 >= 4) for i in range(64)]


def test_shuffle_of_a_double_in_halves() -> None:
    body = """cvt.rn.f64.u32 %d0, %i; div.rn.f64 %d0, %d0, 0d4008000000000000;
    mov.b64 {%r0, %r1}, %d0; shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1; shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;
    mov.b64 %d1, {%r2, %r3}; mul.f64 %d1, %d1, 0d4008000000000000; cvt.rni.u32.f64 %r4, %d1;
    st.global.u32 [%out], %r4;"""
    assert launch(body)[0].tolist() == [i ^ 1 for i in range(64)]


def test_divergent_shuffle_is_reported() -> None:
    body = "setp.lt.u32 %p0, %i, 16; @%p0 bra END; shfl.sync.bfly.b32 %r1, %i, 1, 31, {mask}; END: ret;"
    with pytest.raises(PtxError, match="divergent warp instruction"):
        launch(body.replace("{mask}", "-1"), 32)
    with pytest.raises(PtxError, match="not in the membermask"):
        launch(body.replace("{mask}", "0xFF000000"), 32)
    launch(body.replace("{mask}", "0xFFFF0000"), 32)


def test_shuffle_from_a_lane_that_does_not_run_is_counted() -> None:
    body = """setp.lt.u32 %p0, %i, 16; @%p0 bra END; shfl.sync.idx.b32 %r1, %i, 0, 31, 0xFFFF0000;
    END: st.global.u32 [%out], %r1;"""
    out, stats = launch(body, 32)
    assert stats["shfl_from_inactive"] == 1 and (out[16:] == 0xDEADBEEF).all()
    _, stats = launch("setp.lt.u32 %p0, %i, 16; @%p0 ret; bar.warp.sync -1;", 32)
    assert stats["mask_names_exited_lane"] == 1


VOTES = {
    "vote.sync.ballot.b32 %r1, %p0, -1": 0x49249249,
    "activemask.b32 %r1": 0xFFFFFFFF,
    "vote.sync.any.pred %p1, %p0, -1; selp.u32 %r1, 1, 0, %p1": 1,
    "vote.sync.all.pred %p1, %p0, -1; selp.u32 %r1, 1, 0, %p1": 0,
    "vote.sync.uni.pred %p1, %p0, -1; selp.u32 %r1, 1, 0, %p1": 0,
    "vote.sync.ballot.b32 %r1, !%p0, -1": 0xFFFFFFFF ^ 0x49249249,
    "redux.sync.add.u32 %r1, %i, -1": 496,
    "redux.sync.max.s32 %r1, %i, -1": 31,
    "redux.sync.min.u32 %r1, %i, -1": 0,
    "redux.sync.xor.b32 %r1, %i, -1": 0,
    "redux.sync.or.b32 %r1, %i, -1": 31,
    "redux.sync.and.b32 %r1, %i, -1": 0,
}


@pytest.mark.parametrize("text", VOTES)
def test_vote_and_reduction(text: str) -> None:
    body = f"rem.u32 %r0, %i, 3; setp.eq.u32 %p0, %r0, 0; {text}; st.global.u32 [%out], %r1;"
    assert set(launch(body, 32)[0].tolist()) == {VOTES[text]}


def test_atomics() -> None:
    body = """atom.global.add.u32 %r0, [%l0], 1; red.global.max.s32 [%l0+4], %i; atom.global.min.u32 %r1, [%l0+8], %i;
    red.global.or.b32 [%l0+12], %i; cvt.rn.f32.u32 %f0, %i; red.global.add.f32 [%l0+16], %f0;
    atom.global.inc.u32 %r2, [%l0+20], 9; atom.global.exch.b32 %r3, [%l0+24], %i;
    atom.global.cas.b32 %r4, [%l0+28], %i, 77; atom.global.dec.u32 %r5, [%l0+32], 5;
    mad.wide.u32 %l1, %r0, 4, %l0; st.global.u32 [%l1+64], %i;"""
    out, stats = launch(body, size=80)
    assert out[:4].tolist() == [64, 63, 0, 63]
    assert out[4:5].view(np.float32)[0] == 2016
    assert out[5:9].tolist() == [64 % 10, 63, 77, (-64) % 6]
    assert sorted(out[16:].tolist()) == list(range(64))  # each got a ticket of its own
    assert stats["atom_lanes"] == 9 * 64 and stats["st_bytes"] == 10 * 64 * 4


def test_atomics_in_shared_memory() -> None:
    body = """.shared .align 4 .b8 total[4]; setp.eq.u32 %p0, %i, 0; @%p0 st.shared.u32 [total], 0; bar.sync 0;
    atom.shared.add.u32 %r0, [total], 2; bar.sync 0; ld.shared.u32 %r1, [total]; st.global.u32 [%out], %r1;"""
    out, stats = launch(body, grid=2)
    assert set(out.tolist()) == {128} and stats["atom_lanes"] == 0


COPY = """ld.param.u64 %l1, [in]; mul.wide.u32 %l2, %i, 16; add.s64 %l1, %l1, %l2; add.s64 %l3, %l0, %l2; {copy}"""
COPIES = {
    "ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%l1]; st.global.v4.b32 [%l3], {%r0, %r1, %r2, %r3};": 16,
    """ld.global.nc.L1::no_allocate.v4.f32 {%f0, %f1, %f2, %f3}, [%l1];
    st.global.cs.v4.f32 [%l3], {%f0, %f1, %f2, %f3};""": 16,
    "ld.global.v2.b64 {%l4, %l5}, [%l1]; st.global.v2.b64 [%l3], {%l4, %l5};": 16,
    """ld.global.v2.u32 {%r0, %r1}, [%l1]; ld.global.v2.u32 {%r2, %r3}, [%l1+8]; st.global.v2.u32 [%l3], {%r0, %r1};
    st.global.v2.u32 [%l3+8], {%r2, %r3};""": 8,
    """{ .reg .b64 %policy; createpolicy.fractional.L2::evict_first.b64 %policy, 1.0;
    ld.global.L1::evict_first.L2::cache_hint.v4.b32 {%r0, %r1, %r2, %r3}, [%l1], %policy; }
    st.global.b64 [%l3], {%r0, %r1}; st.b64 [%l3+8], {%r2, %r3};""": 16,
}


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("predicate", ["", "setp.lt.u32 %p0, %i, 100; "])
def test_vector_copies_and_their_counts(copy: str, predicate: str) -> None:
    data = np.random.default_rng(0).integers(0, 2**32, 256, dtype=np.uint32)
    found, stats = launch(predicate + COPY.replace("{copy}", copy), size=np.zeros_like(data), source=data)
    out, source = stats["addresses"]
    assert (found == data).all()
    assert stats["ld_bytes_by_width"] == {COPIES[copy]: 1024}
    assert stats["ld_bytes"] == stats["st_bytes"] == 1024
    assert stats["ld_bytes_by_buffer"] == {source: 1024} and stats["st_bytes_by_buffer"] == {out: 1024}


def test_eight_wide_load() -> None:
    body = """ld.param.u64 %l1, [in]; mul.wide.u32 %l2, %i, 32; add.s64 %l1, %l1, %l2;
    ld.global.v8.b32 {%r0, %r1, %r2, %r3, %r4, %r5, %r6, %r7}, [%l1]; add.u32 %r0, %r0, %r7;
    st.global.u32 [%out], %r0;"""
    out, stats = launch(body, 8, source=np.arange(64, dtype=np.uint32))
    assert out.tolist() == [16 * i + 7 for i in range(8)]
    assert stats["ld_bytes_by_width"] == {32: 256}


def test_narrow_loads_extend() -> None:
    body = """ld.param.u64 %l1, [in]; cvt.u64.u32 %l2, %i; add.s64 %l1, %l1, %l2;
    ld.global.s8 %r0, [%l1]; ld.global.u8 %r1, [%l1]; mad.lo.s32 %r0, %r1, 1000, %r0; st.global.u32 [%out], %r0;"""
    b = np.arange(64) * 4
    out, _ = launch(body, size=np.zeros(64, np.int32), source=b.astype(np.uint8))
    assert (out == b * 1000 + (b ^ 128) - 128).all()


def test_scattered_accesses_of_many_buffers() -> None:
    rng = np.random.default_rng(0)
    memory = Memory()
    rows = [rng.integers(0, 2**32, n, dtype=np.uint32) for n in rng.integers(1, 9, 64)]
    addresses = [memory.upload(row, readonly=True) for row in rows]
    table = memory.upload(np.array(addresses, np.uint64))
    out = memory.upload(np.zeros(64, np.uint32))
    body = """ld.param.u64 %l1, [in]; mad.wide.u32 %l1, %i, 8, %l1; ld.global.u64 %l2, [%l1]; ld.global.u32 %r0, [%l2];
    st.global.u32 [%out], %r0;"""
    stats = run(kernel(body, ".param .u64 out, .param .u64 in"), "test", 1, 64, [out, table], memory)
    assert memory.download(out).tolist() == [int(row[0]) for row in rows]
    assert stats["ld_bytes_by_buffer"] == {**dict.fromkeys(addresses, 4), table: 512}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("st.global.u32 [%out+4], %i;", "out-of-bounds global access at 0x[0-9a-f]+ by 1 lanes: st.global.u32"),
        ("ld.global.u32 %r0, [%out+-4];", "out-of-bounds global"),
        ("mov.u64 %l1, 64; ld.global.u32 %r0, [%l1];", "out-of-bounds global"),
        ("setp.eq.u32 %p0, %i, 63; @%p0 ld.global.v2.u32 {%r0, %r1}, [%out];", "misaligned 8-byte"),
        ("st.global.u32 [%out+2], %i;", "misaligned 4-byte"),
        ("ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%out];", "misaligned 16-byte"),
        ("mov.u32 %r0, 60; st.shared.u32 [%r0], 1;", "out-of-bounds shared"),
        ("st.param.u32 [out], 1;", "unknown instruction: st.param.u32"),
        ("ld.param.u32 %r0, [out+8];", "out-of-bounds parameter"),
        ("trap;", "trap in 64 lanes"),
        ("wgmma.fence.sync.aligned;", "unknown instruction: wgmma.fence.sync.aligned"),
        ("add.f8 %r0, %r1, %r2;", "unknown instruction: add.f8"),
        ("atom.global.add.noftz.f16x2 %r0, [%out], %r1;", "unknown instruction: atom.global.add.noftz.f16x2"),
        ("cvt.rs.bf16x2.f32 %r0, %f0, %f1, %r1;", "unknown instruction: cvt.rs"),
        *(
            (f"{text};", "unknown instruction")
            for text in (
                "add.rz.f32 %f0, %f1, %f2",
                "fma.rp.f64 %d0, %d1, %d2, %d3",
                "add.sat.f32 %f0, %f1, %f2",
                "add.cc.u32 %r0, %r1, %r2",
                "addc.u32 %r0, %r1, %r2",
                "fma.rn.bf16 %h0, %h1, %h2, %h3",
                "add.rn.bf16 %h0, %h1, %h2",
                "neg.f16 %h0, %h1",
                "fma.rn.f16x2 %r0, %r1, %r2, %r3",
                "max.f32 %f0, %f1, %f2, %f3",
                "min.xorsign.abs.f32 %f0, %f1, %f2",
                "prmt.b32.rc8 %r0, %r1, %r2, %r3",
                "cvt.rz.f32.f64 %f0, %d0",
                "cvt.sat.u8.s32 %r0, %r1",
                "cvt.rna.tf32.f32 %r0, %f0",
                "cvt.rn.bf16.f64 %h0, %d0",
                "cvt.rn.relu.f16.f32 %h0, %f0",
                "cvt.rn.f16.s32 %h0, %r0",
                "cvt.rn.bf16x2.f64 %r0, %d0, %d1",
                "ld.global.b128 %l1, [%out]",
                "ex2.approx.f32 %f0, %f1",
            )
        ),
        ("mov.u32 %r0, %nothing;", "unknown operand %nothing"),
        ("ld.global.u64 %r0, [%out];", "narrower"),
    ],
)
def test_what_is_refused(body: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        launch(body)


def test_what_is_unknown_may_stand_where_no_thread_goes() -> None:
    launch("setp.gt.u32 %p0, %i, 1000; @%p0 wgmma.fence.sync.aligned; @!%p0 bra END; some.thing %r0; END: ret;")


def test_read_only_buffers() -> None:
    body = kernel("st.global.u32 [%out], %i;")
    for single in (True, False):
        memory = Memory()
        out = memory.upload(np.zeros(64, np.uint32), readonly=True)
        with pytest.raises(PtxError, match="read-only"):
            run(body, "test", 1, 1 if single else 64, [out], memory)
        assert not memory.download(out).any()


def test_misaligned_buffers() -> None:
    memory = Memory()
    data = np.arange(16, dtype=np.uint16)
    address = memory.upload(data, misalign=2)
    assert address % 256 == 2 and (memory.download(address) == data).all()
    with pytest.raises(PtxError, match="misaligned"):
        run(kernel("st.global.u32 [%out], %i;"), "test", 1, 4, [address], memory)


def test_memory_keeps_dtype_shape_and_neighbours() -> None:
    memory = Memory()
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(rng.integers(0, 50, 2)).astype(np.float32) for _ in range(3000)]
    addresses = [memory.upload(a, misalign=int(m)) for a, m in zip(arrays, rng.integers(0, 4, 3000) * 4, strict=True)]
    assert all(np.array_equal(memory.download(p), a) for p, a in zip(addresses, arrays, strict=True))
    scalar = memory.upload(np.float64(2.5))
    assert memory.download(scalar) == 2.5 and memory.download(scalar).shape == ()
    memory.write(scalar, np.float64(3.5))
    assert memory.download(scalar) == 3.5
    with pytest.raises(ValueError, match="8 bytes"):
        memory.write(addresses[0], np.float64(1))
    with pytest.raises(KeyError):
        memory.download(addresses[0] + 4)


def test_bfloat16_as_its_bits() -> None:
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    body = """ld.param.u64 %l1, [in]; mad.wide.u32 %l1, %i, 2, %l1; mad.wide.u32 %l2, %i, 2, %l0;
    ld.global.nc.b16 %h0, [%l1]; cvt.f32.bf16 %f0, %h0; add.f32 %f0, %f0, %f0; cvt.rn.bf16.f32 %h1, %f0;
    st.global.b16 [%l2], %h1;"""
    out, _ = launch(body, size=np.zeros(64, np.uint16), source=bits)
    assert ((out.astype(np.uint32) << 16).view(np.float32) == 2 * (bits.astype(np.uint32) << 16).view(np.float32)).all()


FUNCTION = """
.func (.param .b64 func_retval0) twice(.param .b64 twice_param_0)
;
.func (.param .b64 func_retval0) power(
    .param .b64 power_param_0, .param .align 4 .b8 power_param_1[8]
)
{
    .reg .pred %p<2>; .reg .b32 %r<8>; .reg .b64 %rd<8>; .reg .f64 %fd<8>;
    ld.param.f64 %fd1, [power_param_0]; ld.param.u32 %r1, [power_param_1+4];
    mov.b64 %rd1, power_param_1; ld.param.u32 %r2, [%rd1];
    setp.eq.u32 %p1, %r1, 0; @%p1 bra $L_ONE;
    mov.f64 %fd2, %fd1;
$L_AGAIN: sub.u32 %r1, %r1, 1; setp.eq.u32 %p1, %r1, 0; @%p1 bra $L_OUT; mul.f64 %fd2, %fd2, %fd1; bra.uni $L_AGAIN;
$L_OUT: { // callseq 0
    .param .b64 param0; st.param.f64 [param0+0], %fd2; .param .b64 retval0;
    call.uni (retval0),
    twice,
    (
    param0
    );
    ld.param.f64 %fd3, [retval0+0];
    }
    cvt.rn.f64.u32 %fd4, %r2; add.f64 %fd3, %fd3, %fd4; st.param.f64 [func_retval0+0], %fd3; ret;
$L_ONE: st.param.f64 [func_retval0], 0dBFF0000000000000; ret;
}
.func (.param .b64 func_retval0) twice(.param .b64 twice_param_0)
{
    .reg .f64 %fd<4>; ld.param.f64 %fd1, [twice_param_0]; add.f64 %fd2, %fd1, %fd1;
    st.param.f64 [func_retval0], %fd2; ret;
}
.func (.reg .u32 %result) sum(.reg .u32 %x, .reg .u32 %y) { add.u32 %result, %x, %y; ret; }
.func nothing() { ret; }
.func (.param .b32 r) again(.param .b32 n) { .param .b32 p; .param .b32 q; call (q), again, (p); ret; }
"""


def test_functions_with_bodies() -> None:
    body = """rem.u32 %r1, %i, 5; cvt.rn.f64.u32 %d0, %i;
    { .param .b64 param0; st.param.f64 [param0+0], %d0; .param .align 4 .b8 param1[8]; st.param.b32 [param1+0], 7;
    st.param.b32 [param1+4], %r1; .param .b64 retval0; call.uni (retval0), power, (param0, param1);
    ld.param.f64 %d1, [retval0+0]; }
    mov.u32 %r3, 0; setp.gt.u32 %p1, %i, 2; @%p1 call (%r3), sum, (%i, 1000); call nothing;
    cvt.rzi.s32.f64 %r2, %d1; add.s32 %r2, %r2, %r3; st.global.u32 [%out], %r2;"""
    for serial in (None, np.random.default_rng(0)):
        out, _ = launch(body, before=FUNCTION, warp_serial=serial)
        expected = [(2 * i ** (i % 5) + 7 if i % 5 else -1) + (i + 1000 if i > 2 else 0) for i in range(64)]
        assert out.view(np.int32).tolist() == expected


def test_calls_that_are_refused() -> None:
    with pytest.raises(PtxError, match="recursive"):
        launch("{ .param .b32 a; .param .b32 b; call (a), again, (b); }", before=FUNCTION)
    with pytest.raises(PtxError, match="arguments do not match"):
        launch("{ .param .b32 a; call (a), twice; }", before=FUNCTION)
    declared = ".extern .func __assertfail(.param .b64 a);\n.extern .func other(.param .b64 a);"
    with pytest.raises(PtxError, match="assertion failed in 64 lanes"):
        launch("{ .param .b64 a; call.uni __assertfail, (a); }", before=declared)
    with pytest.raises(PtxError, match=r"unknown instruction: call\.uni other"):
        launch("{ .param .b64 a; call.uni other, (a); }", before=declared)


@pytest.mark.parametrize(
    "load",
    [
        "ld.param.u32 %r0, [%l2+4];",
        "cvta.param.u64 %l3, %l2; ld.u32 %r0, [%l3+4];",
        "cvta.param.u64 %l3, %l2; add.s64 %l3, %l3, 4; ld.param.u32 %r0, [%l3];",
    ],
)
def test_struct_parameter_with_a_dynamic_index(load: str) -> None:
    size = 32764 - 8
    content = np.random.default_rng(0).integers(0, 2**32, size // 4, dtype=np.uint32)
    body = f"""mov.b64 %l1, table; mul.lo.u32 %r1, %i, 124; cvt.u64.u32 %l2, %r1; add.s64 %l2, %l1, %l2; {load}
    ld.param.u32 %r2, [table]; xor.b32 %r0, %r0, %r2; st.global.u32 [%out], %r0;"""
    parameters = f".param .u64 out, .param .align 4 .b8 table[{size}]"
    out, stats = launch(body, parameters=parameters, arguments=(content.tobytes(),))
    assert out.tolist() == [int(content[31 * i + 1] ^ content[0]) for i in range(64)]
    assert stats["ld_bytes"] == 0  # parameters are not global memory
    with pytest.raises(PtxError, match="bytes for table"):
        launch(body, parameters=parameters, arguments=(b"1234",))


def test_scalar_parameters() -> None:
    body = """ld.param.f32 %f0, [x]; ld.param.f64 %d0, [y]; ld.param.b32 %f1, [z]; ld.param.s32 %r0, [n];
    cvt.rn.f32.f64 %f2, %d0; add.f32 %f0, %f0, %f1; add.f32 %f0, %f0, %f2; cvt.rn.f32.s32 %f3, %r0;
    add.f32 %f0, %f0, %f3; st.global.f32 [%out], %f0;"""
    parameters = """.param .u64 .ptr .global .align 16 out, .param .f32 x, .param .f64 y, .param .b32 z, .param .s32 n,
    .param .u64 scratch"""
    out, _ = launch(body, parameters=parameters, arguments=(0.5, 0.25, 8.0, -3))
    assert set(out.view(np.float32).tolist()) == {5.75}
    with pytest.raises(PtxError, match="arguments for"):
        launch(body, arguments=(1, 2, 3))


def test_module_variables() -> None:
    before = """.global .align 4 .u32 counter = 5; .const .align 4 .b32 primes[4] = {2, 3, 0x5, 7};
    .global .align 8 .f64 half = 0d3FE0000000000000;"""
    body = """and.b32 %r0, %i, 3; mov.u64 %l1, primes; mad.wide.u32 %l2, %r0, 4, %l1; ld.const.u32 %r1, [%l2];
    ld.global.u32 %r2, [counter]; atom.global.add.u32 %r3, [counter], 1; ld.global.f64 %d0, [half];
    cvt.rpi.u32.f64 %r4, %d0; mad.lo.u32 %r1, %r1, %r2, %r4; st.global.u32 [%out], %r1;"""
    memory = Memory()
    out = memory.upload(np.zeros(64, np.uint32))
    for _ in range(2):  # they begin afresh
        stats = run(kernel(body, before=before), "test", 1, 64, [out], memory)
        assert memory.download(out).tolist() == [[2, 3, 5, 7][i % 4] * 5 + 1 for i in range(64)]
    assert len(memory.buffers) == 1
    assert stats["ld_bytes"] == 64 * 12  # not the constants


def test_local_memory() -> None:
    body = """.local .align 8 .b8 depot[32]; mov.u64 %l1, depot; cvta.local.u64 %l2, %l1;
    and.b32 %r0, %i, 7; mad.wide.u32 %l3, %r0, 4, %l2; st.u32 [%l3], %i; mad.wide.u32 %l4, %r0, 4, %l1;
    ld.local.u32 %r1, [%l4]; st.global.u32 [%out], %r1;"""
    assert launch(body)[0].tolist() == list(range(64))
    with pytest.raises(PtxError, match="out-of-bounds local"):
        launch(body.replace("and.b32 %r0, %i, 7", "mov.u32 %r0, 8"))


def test_a_generic_address_may_lie_anywhere() -> None:
    body = """.shared .align 4 .b8 cells[256]; mov.u64 %l1, cells; cvta.shared.u64 %l1, %l1;
    mad.wide.u32 %l1, %i, 4, %l1; setp.lt.u32 %p0, %i, 40;
    selp.b64 %l2, %l1, %out, %p0; add.u32 %r1, %i, 7; st.u32 [%l2], %r1; ld.u32 %r0, [%l2];
    st.global.u32 [%out], %r0;"""
    out, stats = launch(body)
    assert out.tolist() == [i + 7 for i in range(64)]
    assert stats["st_bytes"] == 24 * 4 + 64 * 4


def test_blocks_in_any_order() -> None:
    body = """.shared .align 4 .b8 x[4]; setp.ne.u32 %p0, %i, 0; @%p0 ret; atom.global.add.u32 %r0, [%l0], 1;
    mad.wide.u32 %l1, %r0, 4, %l0; st.global.u32 [%l1+4], %cta;"""
    for batch in (32, 1 << 13):
        ordered, _ = launch(body, 32, 101, grid=100, batch_lanes=batch)
        assert ordered[1:].tolist() == list(range(100))
        shuffled, _ = launch(body, 32, 101, grid=100, order=np.random.default_rng(0), batch_lanes=batch)
        assert shuffled[1:].tolist() != list(range(100)) and sorted(shuffled[1:].tolist()) == list(range(100))


def test_results_do_not_depend_on_batches() -> None:
    body = DIVERGENT.replace(
        "st.global.u32 [%out]", "mad.lo.u32 %r5, %cta, 70, %i; mad.wide.u32 %l1, %r5, 4, %l0; st.global.u32 [%l1]"
    )
    results = [launch(body, 70, 700, grid=10, batch_lanes=batch)[0] for batch in (1, 96, 300, 1 << 13)]
    assert results[0].any() and all((r == results[0]).all() for r in results)


def test_block_size_directives() -> None:
    memory = Memory()
    text = kernel("mov.u32 %r0, 0;").replace(".param .u64 out)\n{", ".param .u64 out)\n.reqntid 128, 1, 1\n{")
    run(text, "test", 1, 128, [memory.upload(np.zeros(1))], memory)
    with pytest.raises(PtxError, match="reqntid"):
        run(text, "test", 1, 64, [0], memory)
    with pytest.raises(PtxError, match="maxntid"):
        run(text.replace("reqntid", "maxntid"), "test", 1, 160, [0], memory)
    with pytest.raises(PtxError, match="no entry other"):
        run(text, "other", 1, 128, [0], memory)


def test_parse() -> None:
    module = parse(kernel("mov.u32 %r0, 0;", before=FUNCTION + ".global .align 4 .u32 counter = 5;"))
    assert set(module.functions) == {"power", "twice", "sum", "nothing", "again", "test"}
    assert [f.name for f in module.functions.values() if f.is_entry] == ["test"]
    assert module.variables[0].name == "counter"
    for text, message in {".entry test() {": "does not end", "what is this": "unknown text"}.items():
        with pytest.raises(PtxError, match=message):
            parse(text)
    with pytest.raises(PtxError, match="no semicolon"):
        run(".entry test() { mov.u32 %r0, 0 }", None, 1, 32, [], Memory())


# What compilers emit.

CUDA = r"""
// Sums over a warp by shuffles of doubles, over a block by shared memory, over the grid by the last block to finish.
extern "C" __global__ void total(const float* x, double* parts, unsigned* ticket, double* out, int n) {
  __shared__ double warps[4];
  __shared__ bool last;
  double sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
  for (int k = 16; k; k >>= 1) sum += __shfl_xor_sync(~0u, sum, k);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = warps[0] + warps[1] + warps[2] + warps[3];
    __threadfence();
    last = atomicAdd(ticket, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    double all = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) all += reinterpret_cast<volatile double*>(parts)[i];
    *out = all;
  }
}

extern "C" __global__ void doubles(const double* x, const double* y, double* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  out[5 * i] = pow(x[i], y[i]);
  out[5 * i + 1] = log(x[i]);
  out[5 * i + 2] = exp(y[i]);
  out[5 * i + 3] = sqrt(x[i]);
  out[5 * i + 4] = x[i] / y[i];
}
"""


@pytest.fixture(scope="module", params=[80, 100])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if NVCC is None:
        pytest.skip("nvcc is not installed")
    folder: Path = tmp_path_factory.mktemp("cuda")
    (folder / "kernels.cu").write_text(CUDA)
    subprocess.run(
        [NVCC, "-ptx", f"-arch=compute_{request.param}", "-o", folder / "kernels.ptx", folder / "kernels.cu"],
        check=True,
    )
    return (folder / "kernels.ptx").read_text()


@pytest.mark.parametrize("options", [{}, {"warp_serial": 1}, {"order": 2}, {"warp_serial": 3, "order": 4}])
def test_nvcc_sum_over_the_grid(compiled: str, options: dict[str, int]) -> None:
    x = np.random.default_rng(0).integers(-1000, 1000, 5000).astype(np.float32)
    memory = Memory()
    addresses = [memory.upload(a) for a in (x, np.zeros(9), np.zeros(1, np.uint32), np.zeros(1))]
    generators = {key: np.random.default_rng(seed) for key, seed in options.items()}
    stats = run(compiled, "total", 9, 128, [*addresses, len(x)], memory, **generators)
    assert memory.download(addresses[3])[0] == x.sum(dtype=np.float64)
    assert stats["atom_lanes"] == 9


def test_nvcc_double_precision(compiled: str) -> None:
    """pow, log and exp to their documented units in the last place; sqrt and division exactly."""
    rng = np.random.default_rng(0)
    n = 300
    x, y = np.abs(rng.standard_normal(n)) * 10.0 ** rng.integers(-5, 5, n), rng.standard_normal(n) * 10
    memory = Memory()
    out = memory.upload(np.zeros((n, 5)))
    run(compiled, "doubles", 3, 128, [memory.upload(x), memory.upload(y), out, n], memory)
    result = memory.download(out)
    for column, (expected, units) in enumerate(
        [(x**y, 2), (np.log(x), 1), (np.exp(y), 1), (np.sqrt(x), 0), (x / y, 0)]
    ):
        assert (np.abs(result[:, column] - expected) <= units * np.spacing(np.abs(expected))).all(), column


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_triton(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A masked kernel with a reduction, compiled ahead of time."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    source = tmp_path / "ptx_triton_kernel.py"
    source.write_text(
        """
import triton
import triton.language as tl


@triton.jit
def step_kernel(p_ptr, g_ptr, sums_ptr, n, lr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    p = tl.load(p_ptr + offsets, mask=mask)
    g = tl.load(g_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    tl.store(p_ptr + offsets, p - lr * g, mask=mask)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(g.to(tl.float64)))
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import ptx_triton_kernel

    signature = dict(p_ptr="*fp32", g_ptr="*bf16", sums_ptr="*fp64", n="i64", lr="fp32", BLOCK="constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    fn = ptx_triton_kernel.step_kernel
    ast = triton.compiler.ASTSource(fn=fn, signature=signature, constexprs={"BLOCK": 1024}, attrs=aligned)
    binary = triton.compile(
        ast, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "enable_fp_fusion": False}
    )
    n = 5 * 1024 - 48
    rng = np.random.default_rng(0)
    p = rng.integers(-512, 512, n).astype(np.float32)
    g_bits = (rng.integers(-128, 128, n).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    g = (g_bits.astype(np.uint32) << 16).view(np.float32)
    for serial in (None, np.random.default_rng(1)):
        memory = Memory()
        addresses = [memory.upload(p), memory.upload(g_bits, readonly=True), memory.upload(np.zeros(5))]
        arguments = [*addresses, n, 0.5]
        stats = run(
            binary.asm["ptx"], "step_kernel", 5, 128, arguments, memory, binary.metadata.shared, warp_serial=serial
        )
        assert (memory.download(addresses[0]) == p - np.float32(0.5) * g).all()
        sums = [g[1024 * i : 1024 * (i + 1)].sum(dtype=np.float64) for i in range(5)]
        assert memory.download(addresses[2]).tolist() == sums
        assert stats["ld_bytes_by_width"] == {16: 6 * n}
        assert stats["st_bytes_by_buffer"][addresses[0]] == 4 * n


def test_the_interpreter_needs_numpy_alone() -> None:
    probe = "import numpy, sys; before = set(sys.modules); import ptx; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True
    )
    assert {name.partition(".")[0] for name in done.stdout.split()} <= {"ptx", "numpy", *sys.stdlib_module_names}
