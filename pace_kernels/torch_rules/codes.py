"""Codes of compressed states, and weights with a rest beside their bfloat16 part, in plain torch: the bits of
csrc/codes.h, which says what they are and why.

Floats are float32. Codes and scales are flat tensors, with one scale per block of 32 elements. Integers are int64 in
between, since torch has few operations on unsigned ones: temporaries take eight bytes per element.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 32
NEAREST_24, NEAREST_16 = 0x80, 0x8000  # what rounded() is dithered by to round to the nearest
_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B1 - 2**32  # signed: products with it fit into int64
_INFINITY, _NAN = 0x7F800000, 0x7FC00000
_ROUNDER = 12582912.0  # 1.5 · 2^23


def bits_of(a: Tensor) -> Tensor:
    return a.view(torch.int32).to(torch.int64) & _WORD


def float_of(u: Tensor) -> Tensor:
    return torch.where(u >= 2**31, u - 2**32, u).to(torch.int32).view(torch.float32)


def _power_of_two(b: Tensor) -> Tensor:
    return float_of(b << 23)


# ---- dither ----------------------------------------------------------------------------------------------------------


def _mixed(h: Tensor) -> Tensor:
    h = h ^ h >> 16
    h = h * 0x21F0AAAD & _WORD
    h = h ^ h >> 15
    h = h * 0x735A2D97 & _WORD
    return h ^ h >> 15


def dither_key(step: Tensor) -> Tensor:
    """Of a step count, on its device."""
    return _mixed((step.to(torch.int64) & _WORD) * _GOLDEN & _WORD)


def settled(a: Tensor) -> Tensor:
    """The bits of a float, with one NaN for all."""
    return torch.where(torch.isnan(a), _NAN, bits_of(a))


def settled_square(v: Tensor) -> Tensor:
    """A second moment with infinity for NaN."""
    return float_of(bits_of(v).clamp(max=_INFINITY))


def dither(x: Tensor, v: Tensor, key: Tensor) -> Tensor:
    """32 bits for each element of the new weights and second moments before they are rounded."""
    return dither_by(x, bits_of(settled_square(v)), key)


def dither_by(x: Tensor, bits: Tensor, key: Tensor) -> Tensor:
    """The same of other bits where there is no second moment."""
    return _mixed((settled(x) * _GOLDEN & _WORD) ^ bits ^ key)


def further(h: Tensor) -> Tensor:
    """The next 32 bits after such."""
    return _mixed(h + _GOLDEN & _WORD)


def hashed(bits: Tensor, begin: int) -> Tensor:
    """The sum of the hashes of integers at the places from ``begin`` on, which tells what is where."""
    place = torch.arange(begin, begin + bits.numel(), device=bits.device)
    return _mixed(((bits.to(torch.int64) & _WORD) * _GOLDEN ^ _mixed(place & _WORD)) & _WORD).sum()


def evenly(moves: Tensor, n: int) -> Tensor:
    """The dithers of n elements of an average, after so many moves of it."""
    place = torch.arange(n, device=moves.device) % BLOCK
    return (((moves.to(torch.int64) & _WORD) >> 1) * _GOLDEN + place * 0x6487ED51) & _WORD


# ---- m and v ---------------------------------------------------------------------------------------------------------


def _largest(a: Tensor) -> Tensor:
    """The bits of the largest finite magnitude of each block."""
    magnitude = bits_of(a) & 0x7FFFFFFF
    return torch.where(magnitude < _INFINITY, magnitude, 0).view(-1, BLOCK).amax(1)


def _each(scales: Tensor) -> Tensor:
    """The scale of each element."""
    return scales.to(torch.int64).repeat_interleave(BLOCK)


class _MuLaw:
    """16 codes a binade, evenly spaced below 2^(b − 127)."""

    DROPPED = 19
    NEAREST = 1 << 18

    def __init__(self, bits: int) -> None:
        self.last, self.binades = (1 << bits) - 1, 1 << (bits - 4)

    def scales(self, a: Tensor) -> Tensor:
        largest = _largest(a)
        full = (largest & 0x7FFFFF) >= 0x700000 - (1 << (24 - self.binades))
        return ((largest >> 23) + full.long() + 1 - self.binades).clamp(24, 254 - self.binades)

    def encoded(self, magnitude: Tensor, b: Tensor, d: Tensor | int) -> Tensor:
        u = bits_of(magnitude + _power_of_two(b)) + d & _WORD
        return ((u >> self.DROPPED) - 16 * b).clamp(max=self.last)

    def decoded(self, codes: Tensor, b: Tensor) -> Tensor:
        return float_of((codes << self.DROPPED) + (b << 23)) - _power_of_two(b)


class MCode(_MuLaw):
    def store(self, m: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes and scales of first moments, dithered by ``h``; None: the nearest codes."""
        scales = self.scales(m)
        d = self.NEAREST if h is None else (h & 0xFF) << 11 | 0x400
        sign = torch.where(torch.isnan(m), 0, bits_of(m) >> 24 & 0x80)
        codes = self.encoded(float_of(bits_of(m) & 0x7FFFFFFF), _each(scales), d) | sign
        return codes.to(torch.uint8), scales.to(torch.uint8)

    def load(self, codes: Tensor, scales: Tensor) -> Tensor:
        c = codes.to(torch.int64)
        return float_of(bits_of(self.decoded(c & 0x7F, _each(scales))) | (c & 0x80) << 24)


class VCode(_MuLaw):
    def store(self, v: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes and scales of second moments, dithered by ``h``; None: the nearest codes. None is that of 0."""
        v = settled_square(v)
        scales = self.scales(v)
        d = self.NEAREST if h is None else (h >> 8 & 0x7FF) << 8 | 0x80
        return self.encoded(v, _each(scales), d).clamp(min=1).to(torch.uint8), scales.to(torch.uint8)

    def load(self, codes: Tensor, scales: Tensor) -> Tensor:
        return torch.where(codes == 0xFF, torch.inf, self.decoded(codes.to(torch.int64), _each(scales)))


M_CODE, V_CODE = MCode(7), VCode(8)


# ---- e ---------------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """The value of an average, ``grid + offset``, and by how much it moves."""

    grid: Tensor
    offset: Tensor
    increment: Tensor | float

    def value(self) -> Tensor:
        return self.grid + self.offset

    def moved(self, x: Tensor, w: float | Tensor) -> Place:
        """e₊ = e + w (x₊ − e), x₊ the weight as it will be read back."""
        weight = torch.as_tensor(w, dtype=torch.float32, device=x.device)
        copy = weight == 1.0
        increment = torch.where(copy, 0.0, weight * (x - (self.grid + self.offset)))
        return Place(torch.where(copy, x, self.grid), torch.where(copy, 0.0, self.offset), increment)


class GridCode:
    """Averages beside their weights, in 8 or 16 bits."""

    def __init__(self, bits: int) -> None:
        self.bits, self.most = bits, float((1 << (bits - 1)) - 1)
        self.full = 0x780000 if bits == 8 else 0x7FFA00
        self.dtype = torch.int8 if bits == 8 else torch.int16

    @staticmethod
    def _grid(x: Tensor, b: Tensor) -> Tensor:
        a = x * _power_of_two(254 - b)
        return torch.where(a.abs() < 2.0**22, _nearest_whole(a) * _power_of_two(b), x)

    def load(self, codes: Tensor, scales: Tensor, x: Tensor) -> Place:
        b = _each(scales).clamp(min=1)
        return Place(self._grid(x, b), codes.to(torch.float32) * _power_of_two(b), 0.0)

    def store(self, place: Place, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes and scales of where an average has moved to, dithered by :func:`evenly`; None: the nearest codes."""
        largest = _largest(((place.grid - x) + place.offset) + place.increment)
        full = (largest & 0x7FFFFF) >= self.full
        scales = ((largest >> 23) + full.long() - (self.bits - 2)).clamp(min=1)
        b = _each(scales)
        inverse = _power_of_two(254 - b)
        a = (place.offset + (place.grid - self._grid(x, b))) * inverse
        whole = _nearest_whole(a)
        u = 0.5 if h is None else float_of(0x3F800000 | h >> 9) - 1.0
        t = whole + _floor(((a - whole) + place.increment * inverse) + u)
        codes = torch.where(torch.isnan(t), self.most, t.clamp(-self.most, self.most))
        return codes.to(self.dtype), scales.to(torch.uint8)


def _nearest_whole(a: Tensor) -> Tensor:
    return (a + _ROUNDER) - _ROUNDER


def _floor(a: Tensor) -> Tensor:
    r = _nearest_whole(a)
    return r - (r > a).to(r.dtype)


E_CODES = {8: GridCode(8), 16: GridCode(16)}


# ---- x, and e on its own ---------------------------------------------------------------------------------------------


def rounded(a: Tensor, bits: int, d: Tensor | int) -> Tensor:
    """Floats of 16 or 24 of their 32 bits, rounded by the lowest bits of ``d``, from 0 to all of those that go."""
    below = (1 << (32 - bits)) - 1
    return float_of((settled(a) + (d & below) & _WORD) & ~below)


def split(a: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The nearest bfloat16 and the rest, int16 of 32 bits and int8 of 24, of floats that have no more."""
    u = settled(a)
    high = u + 0x8000 >> 16
    rest = u - (high << 16)
    part = torch.where(high >= 2**15, high - 2**16, high).to(torch.int16).view(torch.bfloat16)
    return part, rest.to(torch.int16) if bits == 32 else (rest >> 8).to(torch.int8)


def joined(high: Tensor, rest: Tensor) -> Tensor:
    """The floats that were split."""
    u = (high.view(torch.int16).to(torch.int64) & 0xFFFF) << 16
    low = rest.to(torch.int64)
    low = torch.where((u & 0x7FFF0000) == 0, low.clamp(min=0), low)  # others wrote 0
    return float_of(u + (low if rest.dtype == torch.int16 else low << 8) & _WORD)
