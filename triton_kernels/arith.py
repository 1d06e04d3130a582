"""The few operations in which rules are written.

Arithmetic contract, that of ``csrc/rules/arith.h``: every operation is rounded once, in the order written, and nothing
is contracted into a fused multiply-add. Kernels are therefore launched with ``enable_fp_fusion=False``
(:mod:`.launch`), and divide and take roots by the IEEE forms here: Triton's ``/`` and ``sqrt`` are approximations. The
kernels wait for memory, so this costs nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

SMALLEST_NORMAL = tl.constexpr(2.0**-126)
LARGEST = tl.constexpr(3.4028234663852886e38)  # float32's


@triton.jit
def square_root(a):
    return tl.sqrt_rn(a)


@triton.jit
def divided(a, b):
    return tl.div_rn(a, b)


@triton.jit
def smaller(a, b):
    return tl.where(a < b, a, b)


@triton.jit
def larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def sign(a):
    """−1, 0 or 1; 0 of NaN."""
    return tl.where(a > 0.0, 1.0, tl.where(a < 0.0, -1.0, 0.0))


@triton.jit
def averaged(e, x, w):
    """e + w (x − e), and x itself if w is 1; csrc/rules/arith.h says why."""
    return tl.where(w == 1.0, x, e + w * (x - e))
