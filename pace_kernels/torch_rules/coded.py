"""Weights and states of a step as they are stored, plain or in the formats of codes.py: read into floats, and written
once the rule has run. csrc/cpu/coded.h does the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import codes
from .codes import E_CODES, M_CODE, V_CODE
from .common import Keep, Scalar


class Floats(NamedTuple):
    x: Tensor
    m: Tensor | None
    v: Tensor
    e: Tensor | None


class Stepped(Protocol):
    """The results of a rule."""

    @property
    def x(self) -> Tensor: ...
    @property
    def m(self) -> Tensor: ...
    @property
    def v(self) -> Tensor: ...
    @property
    def e(self) -> Tensor | None: ...


def _flat(a: Tensor) -> Tensor:
    return a.reshape(-1)


@dataclass
class Stored:
    """The tensors of one parameter. The tensor beside another is None if that is plain."""

    x: Tensor
    rest: Tensor | None
    m: Tensor | None
    m_scales: Tensor | None
    v: Tensor
    v_scales: Tensor | None
    e: Tensor | None
    e_scales: Tensor | None
    stochastic: bool  # rounding of a weight in bfloat16

    def read(self) -> Floats:
        """As floats: float32, or float64 if the state v is."""
        dtype = torch.float64 if self.v.dtype == torch.float64 else torch.float32
        x = self.x.to(dtype) if self.rest is None else codes.joined(self.x, self.rest)
        m = None if self.m is None else _moment(M_CODE, self.m, self.m_scales)
        e = self.e
        if self.e_scales is not None and e is not None:
            e = codes.joined(e, self.e_scales) if e.dtype == torch.bfloat16 else self._place(x).value().view_as(x)
        return Floats(x, m, _moment(V_CODE, self.v, self.v_scales), e)

    def _place(self, x: Tensor) -> codes.Place:
        assert self.e is not None and self.e_scales is not None
        return E_CODES[8 * self.e.element_size()].load(_flat(self.e), _flat(self.e_scales), _flat(x))

    def write(self, keep: Keep, was: Floats, new: Stepped, s: Any, t: Scalar, update_freq: Scalar) -> None:
        """``s`` has the average's ``weight`` and ``moves``, ``t`` is this step, ``update_freq`` how often it moves."""
        count = t if isinstance(t, Tensor) else torch.tensor(int(t), device=self.x.device)  # float32 counts to 2^24
        h = codes.dither(new.x, new.v, codes.dither_key(count)) if self._is_dithered() else None
        place = self._place(was.x) if self._on_grid() else None  # before the weight is written
        back = self._write_weight(keep, new.x, h)
        if self.m is not None:
            _write_moment(keep, M_CODE, self.m, self.m_scales, new.m, h, 0)
        _write_moment(keep, V_CODE, self.v, self.v_scales, new.v, h, 16)
        if self.e is None or new.e is None:
            return
        if place is not None:
            weight = torch.where(s.moves != 0, s.weight, 0.0) if isinstance(s.moves, Tensor) else s.weight * s.moves
            spread = codes.evenly(torch.floor_divide(count, update_freq), back.numel())
            moved = place.moved(_flat(back), weight)
            both = E_CODES[8 * self.e.element_size()].store(moved, _flat(back), spread)
            _put(keep, (self.e, self.e_scales), both)
        elif isinstance(s.moves, Tensor) or s.moves:
            stays: Callable[[Tensor, Tensor], Tensor] = lambda old, now: now  # noqa: E731
            if isinstance(s.moves, Tensor):
                stays = lambda old, now: torch.where(s.moves != 0, now, old)  # noqa: E731
            if self.e_scales is None:
                keep.copy_(self.e, stays(self.e, new.e))
                return
            assert h is not None
            high, rest = codes.split(codes.rounded(new.e, 24, h >> 24), 24)
            _put(keep, (self.e, self.e_scales), (stays(self.e, high), stays(self.e_scales, rest)))

    def _on_grid(self) -> bool:
        return self.e_scales is not None and self.e is not None and self.e.dtype != torch.bfloat16

    def _is_dithered(self) -> bool:
        rest, e = self.rest, self.e
        return (
            (self.stochastic and rest is None and self.x.dtype == torch.bfloat16)
            or (rest is not None and rest.dtype == torch.int8)
            or any(a is not None and a.dtype in (torch.bfloat16, torch.uint8) for a in (self.m, self.v))
            or (e is not None and self.e_scales is not None and e.dtype == torch.bfloat16)
        )

    def _write_weight(self, keep: Keep, x: Tensor, h: Tensor | None) -> Tensor:
        """The weight as it will be read back."""
        if self.rest is not None:
            bits = 32 if self.rest.dtype == torch.int16 else 24
            back = x if h is None or bits == 32 else codes.rounded(x, 24, h)
            _put(keep, (self.x, self.rest), codes.split(back, bits))
            return back
        if self.stochastic and self.x.dtype == torch.bfloat16 and h is not None:
            back = codes.rounded(x, 16, h)
            keep.copy_(self.x, _in_bfloat16(back))
            return back
        keep.copy_(self.x, x)
        return x if self.x.dtype == x.dtype else x.to(self.x.dtype).to(x.dtype)


def _moment(code: Any, a: Tensor, scales: Tensor | None) -> Tensor:
    if scales is not None:
        loaded: Tensor = code.load(_flat(a), _flat(scales))
        return loaded.view(a.shape)
    return a.float() if a.dtype == torch.bfloat16 else a


def _write_moment(
    keep: Keep, code: Any, a: Tensor, scales: Tensor | None, value: Tensor, h: Tensor | None, shift: int
) -> None:
    if scales is not None:
        assert h is not None
        _put(keep, (a, scales), code.store(_flat(value), _flat(h)))
    elif a.dtype == torch.bfloat16:
        assert h is not None
        keep.copy_(a, _in_bfloat16(codes.rounded(value, 16, h >> shift)))
    else:
        keep.copy_(a, value)


def _in_bfloat16(a: Tensor) -> Tensor:
    """The bfloat16 of floats that have no more bits. torch's own conversion has more than one NaN."""
    return codes.split(a, 32)[0]


def _put(keep: Keep, to: tuple[Tensor, Tensor | None], parts: tuple[Tensor, Tensor]) -> None:
    for target, value in zip(to, parts, strict=True):
        assert target is not None
        keep.copy_(target, value.view(target.shape))


class Coded:
    """The lists of a call beside its operands; each is None or empty if these are plain."""

    def __init__(self, stochastic: bool, *beside: list[Tensor] | None) -> None:
        self.stochastic, self.beside = stochastic, beside

    def stored(self, i: int, *operands: Tensor | None) -> Stored:
        """``operands`` of parameter i, in the order of the lists."""
        pairs = [(a, scales[i] if scales else None) for a, scales in zip(operands, self.beside, strict=True)]
        return Stored(*[part for pair in pairs for part in pair], self.stochastic)  # type: ignore[arg-type, call-arg]
