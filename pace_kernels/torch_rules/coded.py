"""Weights and states of a step as they are stored, plain or in the formats of codes.py: read into floats, and written
once the rule has run. csrc/cpu/coded.h does the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..definitions.kit import Definition, Operand, Scalar
from . import codes
from .codes import E_CODES, M_CODE, V_CODE
from .common import Keep


class Averaging(NamedTuple):
    """How far an average moves in a step, whether it does, and how often it does."""

    weight: Scalar
    moves: Scalar
    update_freq: Scalar


class Dither:
    """The bits that the roundings of one parameter's step are dithered by, computed where one asks for them: of the new
    weight and second moment before they are rounded, or of what ``new`` has in its place (``further`` in
    csrc/codes.h)."""

    def __init__(self, x: Tensor, new: Mapping[str, Tensor | None], count: Tensor) -> None:
        self._x, self._new, self._count = x, new, count
        self._words: list[Tensor] = []

    def word(self, operand: Operand) -> Tensor:
        while len(self._words) <= operand.dither // 2:
            self._words.append(codes.further(self._words[-1]) if self._words else self._first())
        return self._words[operand.dither // 2]

    def half(self, operand: Operand) -> Tensor:
        """From the operand's own 16 bits on."""
        return self.word(operand) >> 16 * (operand.dither % 2)

    def _first(self) -> Tensor:
        key, v = codes.dither_key(self._count), self._new.get("v")
        if v is not None:
            return codes.dither(self._x, v, key)
        settled = next(a for symbol in ("l", "e") if (a := self._new.get(symbol)) is not None)
        return codes.dither_by(self._x, codes.settled(settled), key)


def _flat(a: Tensor) -> Tensor:
    return a.reshape(-1)


class Stored:
    """The tensors of one parameter, by their symbols, and what lies beside those that are not plain."""

    def __init__(self, coded: Coded, i: int) -> None:
        self._operands = {o.symbol: o for o in coded.definition.operands if coded.lists.get(o.symbol)}
        self._tensors = {symbol: coded.lists[symbol][i] for symbol in self._operands}
        self._beside = {symbol: side[i] for symbol, side in coded.beside.items() if side and symbol in self._operands}
        self._weight = coded.definition.operands[0].symbol
        self._dtype, self._stochastic, self._nearest = coded.dtype, coded.stochastic, coded.nearest
        self._place: codes.Place | None = None

    def read(self) -> dict[str, Tensor]:
        """As floats: float32, or float64 where the states are."""
        found: dict[str, Tensor] = {}
        for symbol, operand in self._operands.items():
            found[symbol] = self._read(operand, found)
        return found

    def _read(self, operand: Operand, found: dict[str, Tensor]) -> Tensor:
        a, side, codec = self._tensors[operand.symbol], self._beside.get(operand.symbol), operand.codec
        if side is None:
            return a.to(self._dtype)
        if a.dtype == torch.bfloat16:
            return codes.joined(a, side)
        if codec in ("moment", "square"):
            return (M_CODE if codec == "moment" else V_CODE).load(_flat(a), _flat(side)).view(a.shape)
        beside = found.get("before", found[self._weight])  # a base may have moved the weight since
        self._place = E_CODES[8 * a.element_size()].load(_flat(a), _flat(side), _flat(beside))
        return self._place.value().view(a.shape)

    @property
    def on_grid(self) -> bool:
        """Whether an average or an iterate was read that lies on a grid beside the weights."""
        return self._place is not None

    def write(self, keep: Keep, new: Mapping[str, Tensor | None], t: Scalar, average: Averaging | None = None) -> None:
        """What a rule makes of them, in the order of ``new``; of an iterate on a grid, how far it moves. Without the
        weight, that stays. ``t`` is this step."""
        was = self._tensors[self._weight]
        count = t if isinstance(t, Tensor) else torch.tensor(int(t), device=was.device)  # float32 counts to 2^24
        x = new.get(self._weight)
        dither = Dither(was.to(self._dtype) if x is None else x, new, count)
        back = was.to(self._dtype) if x is None else self._write_weight(keep, x, dither)
        for symbol, value in new.items():
            if value is None or symbol == self._weight or symbol not in self._operands:
                continue
            operand = self._operands[symbol]
            if operand.codec in ("average", "iterate"):
                self._write_average(keep, operand, value, back, dither, count, average)
            else:
                self._write_moment(keep, operand, value, dither)

    def _write_weight(self, keep: Keep, x: Tensor, dither: Dither) -> Tensor:
        """The weight as it will be read back."""
        operand = self._operands[self._weight]
        to, rest = self._tensors[self._weight], self._beside.get(self._weight)
        if rest is not None:
            bits = 32 if rest.dtype == torch.int16 else 24
            back = x if bits == 32 else codes.rounded(x, 24, dither.word(operand))
            _put(keep, (to, rest), codes.split(back, bits))
            return back
        if self._stochastic and to.dtype == torch.bfloat16:
            back = codes.rounded(x, 16, dither.word(operand))
            keep.copy_(to, _in_bfloat16(back))
            return back
        keep.copy_(to, x)
        return x if to.dtype == x.dtype else x.to(to.dtype).to(x.dtype)

    def _write_moment(self, keep: Keep, operand: Operand, value: Tensor, dither: Dither) -> None:
        to, scales = self._tensors[operand.symbol], self._beside.get(operand.symbol)
        if scales is not None:
            code, h = (M_CODE, dither.half) if operand.codec == "moment" else (V_CODE, dither.word)
            _put(keep, (to, scales), code.store(_flat(value), _flat(h(operand))))
        elif to.dtype == torch.bfloat16 and not (self._nearest and operand.codec == "second"):
            keep.copy_(to, _in_bfloat16(codes.rounded(value, 16, dither.half(operand))))
        else:
            keep.copy_(to, value)

    def _write_average(
        self,
        keep: Keep,
        operand: Operand,
        value: Tensor,
        back: Tensor,
        dither: Dither,
        count: Tensor,
        average: Averaging | None,
    ) -> None:
        to, side = self._tensors[operand.symbol], self._beside.get(operand.symbol)
        moves = 1.0 if average is None else average.moves
        if self._place is not None:
            if average is None:
                moved, spread = self._place._replace(increment=_flat(value)), _flat(dither.word(operand))
            else:
                at, zero = average.weight, 0.0
                weight = torch.where(moves != 0, at, zero) if isinstance(moves, Tensor) else at * moves
                spread = codes.evenly(torch.floor_divide(count, average.update_freq), back.numel())
                moved = self._place.moved(_flat(back), weight)
            _put(keep, (to, side), E_CODES[8 * to.element_size()].store(moved, _flat(back), spread))
            return
        if not isinstance(moves, Tensor) and not moves:
            return
        parts: tuple[Tensor, ...] = (value,)
        if side is not None:
            parts = codes.split(codes.rounded(value, 24, dither.word(operand) >> 24), 24)
        for old, now in zip((to, side), parts, strict=False):
            assert old is not None
            keep.copy_(old, torch.where(moves != 0, now, old) if isinstance(moves, Tensor) else now)


def _in_bfloat16(a: Tensor) -> Tensor:
    """The bfloat16 of floats that have no more bits. torch's own conversion has more than one NaN."""
    return codes.split(a, 32)[0]


def _put(keep: Keep, to: tuple[Tensor, Tensor | None], parts: tuple[Tensor, Tensor]) -> None:
    for target, value in zip(to, parts, strict=True):
        assert target is not None
        keep.copy_(target, value.view(target.shape))


class Coded:
    """The operands of a call by their symbols, and the lists of what lies beside them; each of these is None or empty
    where its operands are plain. ``dtype``: what is computed with; ``stochastic``: rounding of weights in bfloat16 with
    nothing beside them; ``nearest``: that of a "second" moment."""

    def __init__(
        self,
        definition: Definition,
        dtype: torch.dtype,
        lists: Mapping[str, Sequence[Tensor]],
        beside: Mapping[str, Sequence[Tensor] | None],
        *,
        stochastic: bool = False,
        nearest: bool = False,
    ) -> None:
        self.definition, self.dtype, self.lists, self.beside = definition, dtype, lists, beside
        self.stochastic, self.nearest = stochastic, nearest

    def stored(self, i: int) -> Stored:
        return Stored(self, i)
