"""Floating point with PTX's roundings, on numpy arrays.

numpy rounds to nearest, ties to even, and has no fused multiply-add. The rest is built from error-free transformations:
a sum or a product is a rounded value plus an error that is itself a number. Rounding that pair *to odd* keeps, in the
last bit, that something lies beyond; a second rounding to a format at least two bits shorter is then the single
rounding of the exact result (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

TINY32 = np.float32(2.0**-126)  # the smallest normal float32
_F64 = np.float64
_SPLITTER = 2.0**27 + 1.0
_BITS = {8: np.int64, 4: np.int32}


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 to zero of the same sign (``.ftz``)."""
    return np.where(np.abs(x) < TINY32, np.copysign(np.float32(0), x), x)


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


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16's bits; every NaN becomes 0x7fff, as in hardware."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded >> np.uint32(16)).astype(np.uint16).reshape(np.shape(x))


# float32: its products are exact in float64, and a float64 is long enough to be rounded to odd before.


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


# float64


def _round_fraction(exact: Fraction) -> float:
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


def fma_f64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Fused multiply-add of float64, rounded once."""
    a, b, c = np.broadcast_arrays(*np.atleast_1d(a, b, c))
    # Scalars of a step are computed alike in all lanes: once is enough.
    if a.size > 8 and _uniform(a) and _uniform(b) and _uniform(c):
        return np.broadcast_to(_fma_f64_exact(a[:1], b[:1], c[:1]), a.shape)
    if a.size < 8:
        return _fma_f64_exact(a, b, c)
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
        result[unsafe] = _fma_f64_exact(a[unsafe], b[unsafe], c[unsafe])
    return result


def _uniform(x: np.ndarray) -> bool:
    if x.strides[0] == 0:
        return True
    bits = x.view(np.int64)  # which tell -0 from +0
    return bool(bits[0] == bits[-1] and (bits == bits[0]).all())


def _fma_f64_exact(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Lane by lane with fractions: slow, and right everywhere. The plain expression serves infinities and NaN, and
    gives an exact zero its sign."""
    result = np.asarray(a * b + c, _F64).copy()
    for lane, values in enumerate(zip(a.tolist(), b.tolist(), c.tolist(), strict=True)):
        if all(map(math.isfinite, values)):
            x, y, z = map(Fraction, values)
            if exact := x * y + z:
                result[lane] = _round_fraction(exact)
    return result


def reciprocal_seed(x: np.ndarray) -> np.ndarray:
    """``rcp.approx.ftz.f64``: of the upper 32 bits, with the lower 32 zero, subnormals flushed."""
    tiny = np.finfo(_F64).tiny
    x = (np.ascontiguousarray(x).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(_F64)
    y = np.divide(1.0, np.where(np.abs(x) < tiny, np.copysign(0.0, x), x))
    y = np.where(np.abs(y) < tiny, np.copysign(0.0, y), y)
    return (y.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(_F64)


def signed_zeros(result: np.ndarray, a: np.ndarray, b: np.ndarray, largest: bool) -> np.ndarray:
    """min and max order -0 below +0, numpy's do not."""
    zeros = (a == 0) & (b == 0)
    if not zeros.any():
        return result
    sign = (np.signbit(a) & np.signbit(b)) if largest else (np.signbit(a) | np.signbit(b))
    zero = np.where(sign, -0.0, 0.0).astype(result.dtype)
    return np.where(zeros, zero, result)
