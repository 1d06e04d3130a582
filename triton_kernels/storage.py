"""Storage: how an element is stored in memory. A format loads to float32 and stores from it; rules never see it.

bfloat16 goes through integer arithmetic as in ``csrc/storage.h``: rounding to nearest, ties to even, and one NaN,
0x7fc0 (the conversion instruction of sm_80 and up makes it 0x7fff). float16 is converted by instruction, with the NaN
of ``csrc/storage.h``: 0x7e00 and the sign.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pointer(address, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of a tensor as a pointer to its elements, whose type gives the format: bfloat16 is stored as uint16.
    None without a format: the operand is not in play."""
    ptr = None
    if FORMAT is not None:
        bits = tl.uint16 if FORMAT == tl.bfloat16 else FORMAT  # noqa: SIM300
        ptr = address.to(tl.pointer_type(bits))
        if ALIGNED:
            ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def load(ptr, i, mask, absent=None):
    """Loads elements i of an operand; `absent` if it is not in play."""
    value = absent
    if ptr is not None:
        if ptr.dtype.element_ty == tl.uint16:
            value = (tl.load(ptr + i, mask=mask, other=0).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        else:
            value = tl.load(ptr + i, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def store(ptr, i, value, mask):
    """Stores into elements i of an operand; nothing if it is not in play."""
    if ptr is not None:
        if ptr.dtype.element_ty == tl.uint16:
            u = value.to(tl.uint32, bitcast=True)
            rounded = u + (((u >> 16) & 1) + 0x7FFF)  # half an ulp, or a bit less where the last bit is even
            tl.store(ptr + i, tl.where(value == value, rounded >> 16, 0x7FC0).to(tl.uint16), mask=mask)
        elif ptr.dtype.element_ty == tl.float16:
            nan = (((value.to(tl.uint32, bitcast=True) >> 16) & 0x8000) | 0x7E00).to(tl.uint16)
            half = tl.where(value == value, value.to(tl.float16), nan.to(tl.float16, bitcast=True))
            tl.store(ptr + i, half, mask=mask)
        else:
            tl.store(ptr + i, value, mask=mask)
