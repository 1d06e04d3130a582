"""Fused one-pass optimizer kernels for PyTorch.

:class:`PACE` is AdamW with a moving average of the weights and a clipped pullback toward it, at the memory traffic of
one pass. :class:`MADA` learns by hypergradient descent which optimizer to be, in one pass too. :func:`backends` tells
what computes here.
"""

from . import ops
from .backend import backends
from .clipping import clip_coefficient
from .mada import MADA
from .pace import PACE

__all__ = ["MADA", "PACE", "backends", "clip_coefficient", "ops"]
__version__ = "0.1.0"
