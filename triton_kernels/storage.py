"""Storage: how an element lies in memory. A format loads to float32 and stores from it; rules never see it.

bfloat16 goes through integer arithmetic as in ``csrc/storage.h``: rounding to nearest, ties to even, and one NaN,
0x7fc0 (the conversion instruction of sm_80 and up makes it 0x7fff). float16 is converted by instruction, with the NaN
of ``csrc/storage.h``: 0x7e00 and the sign.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pointer(address, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of a tensor as a pointer to its elements; bfloat16 lies there as uint16."""
    if FORMAT == tl.bfloat16:  # noqa: SIM300
        ptr = address.to(tl.pointer_type(tl.uint16))
    elif FORMAT == tl.float16:  # noqa: SIM300
        ptr = address.to(tl.pointer_type(tl.float16))
    else:
        ptr = address.to(tl.pointer_type(tl.float32))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def load(ptr, mask, FORMAT: tl.constexpr):
    if FORMAT == tl.bfloat16:  # noqa: SIM300
        value = (tl.load(ptr, mask=mask, other=0).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif FORMAT == tl.float16:  # noqa: SIM300
        value = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    else:
        value = tl.load(ptr, mask=mask, other=0.0)
    return value


@triton.jit
def store(ptr, value, mask, FORMAT: tl.constexpr):
    if FORMAT == tl.bfloat16:  # noqa: SIM300
        u = value.to(tl.uint32, bitcast=True)
        rounded = u + (((u >> 16) & 1) + 0x7FFF)  # half an ulp, or a bit less where the last bit is even
        tl.store(ptr, tl.where(value == value, rounded >> 16, 0x7FC0).to(tl.uint16), mask=mask)
    elif FORMAT == tl.float16:  # noqa: SIM300
        nan = (((value.to(tl.uint32, bitcast=True) >> 16) & 0x8000) | 0x7E00).to(tl.uint16)
        tl.store(ptr, tl.where(value == value, value.to(tl.float16), nan.to(tl.float16, bitcast=True)), mask=mask)
    else:
        tl.store(ptr, value, mask=mask)
