"""The rules in plain torch: the oracle for the tests of the kernels (in float64), the fallback without a kernel (TPU,
MPS, float64), and a target for ``torch.compile``.

A function here with the name of an operator (pace_kernels/ops.py) does what the operator does.
"""

from .mada import mada_learn_, mada_step_
from .pace import pace_step_
from .pullback import pullback_
from .schedule_free import schedule_free_step_

__all__ = ["mada_learn_", "mada_step_", "pace_step_", "pullback_", "schedule_free_step_"]
