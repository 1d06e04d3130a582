"""PTX's types as numpy's."""

from __future__ import annotations

import numpy as np

DTYPES: dict[str, np.dtype] = {
    f"{kind}{bits}": np.dtype(f"{code}{bits // 8}")
    for kind, code in {"u": "u", "s": "i", "b": "u"}.items()
    for bits in (8, 16, 32, 64)
}
DTYPES |= {name: np.dtype(code) for name, code in {"f16": "f2", "f32": "f4", "f64": "f8", "pred": "?"}.items()}
DTYPES["bf16"] = np.dtype("u2")  # numpy has no bfloat16: its bits
SIZES: dict[str, int] = {
    **{name: dtype.itemsize for name, dtype in DTYPES.items()},
    **{"u16x2": 4, "s16x2": 4, "f32x2": 8},
}
FLOATS = frozenset({"f16", "bf16", "f32", "f64"})
UNSIGNED: dict[int, np.dtype] = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
SIGNED: dict[int, np.dtype] = {size: np.dtype(f"i{size}") for size in (1, 2, 4, 8)}


class PtxError(Exception):
    """What real hardware would refuse, corrupt or hang on, and what this interpreter does not know."""
