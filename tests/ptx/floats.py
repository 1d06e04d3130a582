"""Floating point with PTX's roundings, on numpy arrays.

numpy rounds to nearest, ties to even, and has no fused multiply-add. The rest is built from error-free transformations:
a sum or a product is a rounded value plus an error that is itself a number. Rounding that pair *to odd* keeps, in the
last bit, that something lies beyond; a second rounding to a format at least two bits shorter is then the single
rounding of the exact result (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

TINY32 = np.float32(2.0**-126)  # the smallest normal float32
_F64 = np.float64
_SPLITTER = 2.0**27 + 1.0
_BITS = {8: np.int64, 4: np.int32}


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 to zero of the same sign (``.ftz``)."""
    return np.where(np.abs(x) < TINY32, np.copysign(np.float32(0), x), x)


def saturate(x: np.ndarray) -> np.ndarray:
    """To [0, 1]; NaN and -0 to +0 (``.sat``)."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


def rectify(x: np.ndarray) -> np.ndarray:
    """What is not above zero to +0, save NaN (``.relu``)."""
    return np.where((x > 0) | np.isnan(x), x, x.dtype.type(0))


def two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rounded sum and its exact error (Knuth)."""
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


def two_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rounded float64 product and its exact error (Dekker), without over- or underflow."""
    product = a * b
    scaled = a * _SPLITTER
    a_high = scaled - (scaled - a)
    a_low = a - a_high
    scaled = b * _SPLITTER
    b_high = scaled - (scaled - b)
    b_low = b - b_high
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def round_to_odd(total: np.ndarray, error: np.ndarray) -> np.ndarray:
    """total + error, rounded to odd; ``total`` is that sum rounded to nearest."""
    bits = np.ascontiguousarray(total).view(_BITS[total.dtype.itemsize])
    inexact = (error != 0) & ((bits & 1) == 0) & np.isfinite(total) & (total != 0)
    outward = np.where((error > 0) == (total > 0), 1, -1).astype(bits.dtype)
    return np.where(inexact, bits + outward, bits).view(total.dtype)


def directed(nearest: np.ndarray, side: np.ndarray, mode: str) -> np.ndarray:
    """From a neighbour of the exact result to the result rounded in ``mode``.

    ``side`` is the sign of the exact result minus that neighbour."""
    low, high = nearest.dtype.type(-np.inf), nearest.dtype.type(np.inf)
    # A directed rounding never passes the largest number, and rounding to nearest may have.
    down = (side < 0) & ((mode == "rm") | ((mode == "rz") & (nearest > 0)))
    up = (side > 0) & ((mode == "rp") | ((mode == "rz") & (nearest < 0)))
    result = np.where(down, np.nextafter(nearest, low), nearest)
    return np.where(up, np.nextafter(nearest, high), result).astype(nearest.dtype)


def narrow(x: np.ndarray, dtype: np.dtype, mode: str = "rn") -> np.ndarray:
    """A float64 to a shorter format of numpy's, rounded once."""
    nearest = np.asarray(x, _F64).astype(dtype)
    if mode == "rn":
        return nearest
    side = np.sign(x - nearest.astype(_F64))
    return directed(nearest, np.where(np.isnan(side), 0, side), mode)


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    """float32 to bfloat16's bits; every NaN becomes 0x7fff, as in hardware."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    if mode == "rn":
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    elif mode == "rna":
        rounded = bits + np.uint32(0x8000)
    elif mode == "rz":
        rounded = bits
    else:
        toward_infinity = (bits >> np.uint32(31)) == (mode == "rm")
        rounded = bits + np.where(toward_infinity, np.uint32(0xFFFF), np.uint32(0))
        rounded = np.where(np.isinf(x), bits, rounded)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded >> np.uint32(16)).astype(np.uint16).reshape(np.shape(x))


def f64_to_bf16(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    single = np.asarray(x, _F64).astype(np.float32)
    overflow = np.isinf(single) & np.isfinite(x)
    single = np.where(overflow, np.copysign(np.finfo(np.float32).max, x), single).astype(np.float32)
    return f32_to_bf16(round_to_odd(single, x - single.astype(_F64)), mode)


def f32_to_tf32(x: np.ndarray, mode: str) -> np.ndarray:
    """float32 rounded to 10 bits of fraction, ties away from zero or to even, as bits."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    half = np.uint32(0x1000) if mode == "rna" else np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    if mode == "rz":
        half = np.uint32(0)
    return np.where(np.isfinite(x), (bits + half) & np.uint32(0xFFFFE000), bits).astype(np.uint32)


# float32: its products are exact in float64, and a float64 is long enough to be rounded to odd before.


def add_f32(a: np.ndarray, b: np.ndarray, mode: str) -> np.ndarray:
    if mode == "rm":  # x - x is -0 then, which two_sum's nearest would not give
        return -add_f32(-a, -b, "rp")
    return narrow(round_to_odd(*two_sum(np.asarray(a, _F64), np.asarray(b, _F64))), np.float32, mode)


def mul_f32(a: np.ndarray, b: np.ndarray, mode: str) -> np.ndarray:
    return narrow(np.multiply(a, b, dtype=_F64), np.float32, mode)


def div_f32(a: np.ndarray, b: np.ndarray, mode: str) -> np.ndarray:
    quotient = np.asarray(a / b)
    # The remainder a - q b tells the side; q b is exact in float64, and an infinite quotient's is not looked at.
    product = np.multiply(np.where(np.isinf(quotient), np.finfo(np.float32).max, quotient), b, dtype=_F64)
    side = np.sign(np.asarray(a, _F64) - product) * np.sign(b)
    overflow = np.isinf(quotient) & np.isfinite(a) & (b != 0)
    side = np.where(overflow, -np.sign(quotient), np.where(np.isfinite(quotient) & np.isfinite(b), side, 0))
    return directed(quotient, side, mode)


def sqrt_f32(a: np.ndarray, mode: str) -> np.ndarray:
    root = np.asarray(np.sqrt(a))
    side = np.sign(np.asarray(a, _F64) - np.multiply(root, root, dtype=_F64))
    return directed(root, np.where(np.isfinite(root), side, 0), mode)


def fma_f32(a: np.ndarray, b: np.ndarray, c: np.ndarray, out: np.ndarray) -> None:
    """Fused multiply-add of float32, rounded once to nearest; ``out`` may be one of the operands.

    The float64 sum is rounded twice only where its last bits read as the middle between two float32 (or, in the
    subnormal range, may do so): 28 zeros at its end. Those lanes are done again by way of a rounding to odd."""
    product = np.multiply(a, b, dtype=_F64)
    total = np.add(product, c, dtype=_F64)
    doubtful = (total.view(np.uint64) & np.uint64(0x0FFFFFFF)) == 0
    if not doubtful.any():
        out[...] = total
        return
    lanes = np.broadcast_to(doubtful, out.shape).nonzero()[0]
    some_c = np.broadcast_to(c, out.shape)[lanes].astype(_F64)
    some = round_to_odd(*two_sum(np.broadcast_to(product, out.shape)[lanes], some_c))
    out[...] = total
    out[lanes] = some


def fma_f32_directed(a: np.ndarray, b: np.ndarray, c: np.ndarray, mode: str) -> np.ndarray:
    if mode == "rm":
        return -fma_f32_directed(-a, b, -c, "rp")
    total = two_sum(np.multiply(a, b, dtype=_F64), np.asarray(c, _F64))
    return narrow(round_to_odd(*total), np.float32, mode)


def fma_f16(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    total = two_sum(np.multiply(a, b, dtype=_F64), np.asarray(c, _F64))
    return round_to_odd(*total).astype(np.float16)


def fma_bf16(a: np.ndarray, b: np.ndarray, c: np.ndarray, mode: str = "rn") -> np.ndarray:
    """bfloat16 operands given as float32; the result as bits."""
    total = two_sum(np.multiply(a, b, dtype=_F64), np.asarray(c, _F64))
    return f64_to_bf16(round_to_odd(*total), mode)


# float64


def _round_fraction(exact: Fraction, mode: str) -> float:
    try:
        nearest = float(exact)
    except OverflowError:
        nearest = math.inf if exact > 0 else -math.inf
    if mode == "rn":
        return nearest
    side = np.float64(-math.copysign(1.0, nearest) if math.isinf(nearest) else _sign(exact - Fraction(nearest)))
    return float(directed(np.asarray(nearest), side, mode))


def _sign(x: Fraction) -> int:
    return (x > 0) - (x < 0)


def exact_f64(
    naive: Callable[..., float], exact: Callable[..., Fraction | None], mode: str, *operands: np.ndarray
) -> np.ndarray:
    """Lane by lane with fractions: slow, and right everywhere. ``naive`` serves zeros, infinities and NaN."""
    operands = np.broadcast_arrays(*np.atleast_1d(*operands)) if len(operands) > 1 else [np.atleast_1d(operands[0])]
    result = np.asarray(naive(*operands), _F64).copy()
    for lane, values in enumerate(zip(*(o.tolist() for o in operands), strict=True)):
        # An exact zero keeps the sign that the plain expression gave it.
        if all(map(math.isfinite, values)) and (value := exact(*map(Fraction, values))):
            result[lane] = _round_fraction(value, mode)
    return result


def add_f64(a: np.ndarray, b: np.ndarray, mode: str) -> np.ndarray:
    if mode == "rm":
        return -add_f64(-a, -b, "rp")
    return exact_f64(np.add, lambda x, y: x + y, mode, a, b)


def mul_f64(a: np.ndarray, b: np.ndarray, mode: str) -> np.ndarray:
    return exact_f64(np.multiply, lambda x, y: x * y, mode, a, b)


def div_f64(a: np.ndarray, b: np.ndarray, mode: str) -> np.ndarray:
    return exact_f64(np.divide, lambda x, y: x / y if y else None, mode, a, b)


def sqrt_f64(a: np.ndarray, mode: str) -> np.ndarray:
    root = np.atleast_1d(np.sqrt(a))
    side = [
        _sign(Fraction(x) - Fraction(r) ** 2) if math.isfinite(r) else 0
        for x, r in zip(np.atleast_1d(a).tolist(), root.tolist(), strict=True)
    ]
    return directed(root, np.array(side), mode)


def fma_f64(a: np.ndarray, b: np.ndarray, c: np.ndarray, mode: str = "rn") -> np.ndarray:
    """Fused multiply-add of float64, rounded once."""
    a, b, c = np.broadcast_arrays(*np.atleast_1d(a, b, c))
    if mode == "rm":
        return -fma_f64(-a, b, -c, "rp")
    if mode != "rn":
        return _fma_f64_exact(a, b, c, mode)
    # Scalars of a step are computed alike in all lanes: once is enough.
    if a.size > 8 and _uniform(a) and _uniform(b) and _uniform(c):
        return np.broadcast_to(_fma_f64_exact(a[:1], b[:1], c[:1], mode), a.shape)
    if a.size < 8:
        return _fma_f64_exact(a, b, c, mode)
    product, low = two_product(a, b)
    sum_high, sum_low = two_sum(c, low)
    high, rest = two_sum(product, sum_high)
    result = high + round_to_odd(*two_sum(sum_low, rest))
    naive = product + c
    result = np.where(result == 0, naive, result)  # which has the sign of an exact zero
    size = np.abs(product)
    splits = np.maximum(np.abs(a), np.abs(b)) < 2.0**990
    fits = (size < 2.0**1020) & (np.abs(c) < 2.0**1020) & ((size > 2.0**-960) | (a == 0) | (b == 0))
    unsafe = ~(splits & fits)
    if unsafe.any():
        result[unsafe] = _fma_f64_exact(a[unsafe], b[unsafe], c[unsafe], mode)
    return result


def _uniform(x: np.ndarray) -> bool:
    if x.strides[0] == 0:
        return True
    bits = x.view(np.int64)  # which tell -0 from +0
    return bool(bits[0] == bits[-1] and (bits == bits[0]).all())


def _fma_f64_exact(a: np.ndarray, b: np.ndarray, c: np.ndarray, mode: str) -> np.ndarray:
    return exact_f64(lambda x, y, z: x * y + z, lambda x, y, z: x * y + z, mode, a, b, c)


def reciprocal_seed(x: np.ndarray) -> np.ndarray:
    """``rcp.approx.ftz.f64``: of the upper 32 bits, with the lower 32 zero, subnormals flushed."""
    tiny = np.finfo(_F64).tiny
    x = (np.ascontiguousarray(x).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(_F64)
    y = np.divide(1.0, np.where(np.abs(x) < tiny, np.copysign(0.0, x), x))
    y = np.where(np.abs(y) < tiny, np.copysign(0.0, y), y)
    return (y.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(_F64)


def rsqrt_seed(x: np.ndarray) -> np.ndarray:
    """``rsqrt.approx.f64`` and its ``.ftz`` form: the lower 32 bits of the result are zero."""
    y = np.ascontiguousarray(1.0 / np.sqrt(x))
    return (y.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(_F64)


def signed_zeros(result: np.ndarray, a: np.ndarray, b: np.ndarray, largest: bool) -> np.ndarray:
    """min and max order -0 below +0, numpy's do not."""
    zeros = (a == 0) & (b == 0)
    if not zeros.any():
        return result
    sign = (np.signbit(a) & np.signbit(b)) if largest else (np.signbit(a) | np.signbit(b))
    zero = np.where(sign, -0.0, 0.0).astype(result.dtype)
    return np.where(zeros, zero, result)
