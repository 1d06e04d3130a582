"""Fused one-pass optimizer kernels for PyTorch.

:class:`PACE` is AdamW with a moving average of the weights and a clipped pullback toward it, at the memory traffic of
one pass. :class:`MADA` learns by hypergradient descent which optimizer to be, in one pass too. :class:`Pullback` puts
PACE's average and pullback around any other optimizer. :class:`ScheduleFreeAdamW` is AdamW without a schedule of the
learning rate. :class:`Offload` keeps one of them in host memory. :func:`backends` lists what can compute here.
"""

from . import ops
from .backend import backends
from .clipping import clip_coefficient
from .exports import averaged, ema_state_dict, master_state_dict
from .in_backward import step_in_backward
from .mada import MADA
from .offload import Offload
from .pace import PACE
from .pullback import Pullback
from .schedule_free import ScheduleFreeAdamW

__all__ = [
    "MADA",
    "PACE",
    "Offload",
    "Pullback",
    "ScheduleFreeAdamW",
    "averaged",
    "backends",
    "clip_coefficient",
    "ema_state_dict",
    "master_state_dict",
    "ops",
    "step_in_backward",
]
__version__ = "0.1.0"


def __dir__() -> list[str]:
    """What is meant to be used, without the modules that it is made of."""
    return sorted([*__all__, "__version__", "__doc__", "__file__", "__name__", "__path__"])
