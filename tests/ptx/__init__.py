"""An interpreter of PTX on numpy: runs what nvcc and Triton emit, without a GPU.

    memory = Memory()
    address = memory.upload(array)
    stats = run(ptx, "kernel", grid, block, [address, 3, 0.5, struct], memory)
    result = memory.download(address)

It reports out-of-bounds, misaligned and read-only accesses, divergent barriers and warp instructions, and counts the
bytes that a kernel loads and stores. What it does not do: ``rcp.approx`` is computed exactly, where hardware differs by
a few units in the last place; every NaN that arithmetic makes has the host's bits; nothing orders the memory accesses
of different blocks but the order in which they run; ``add`` and ``mul`` without a rounding are rounded, where the
assembler may fuse them. It knows the instructions and forms that compilers were seen to emit; all others raise: matrix
instructions, copies in bulk, float16 and bfloat16 arithmetic, sums with a carry, directed roundings, saturation.

The way of a kernel: `parser` (text), `program` (blocks of steps over slots), `executor` (threads and barriers), and the
instructions in `access`, `arithmetic`, `bits`, `compare`, `convert` and `warp`, on top of `floats` and `memory`.
"""

from .dtypes import PtxError
from .executor import run
from .memory import Memory
from .parser import parse

__all__ = ["Memory", "PtxError", "parse", "run"]
