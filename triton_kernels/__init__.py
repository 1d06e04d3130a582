"""The rules in Triton; installed as ``pace_kernels.triton_kernels``.

A function here with the name of an operator (pace_kernels/ops.py) does what the operator does. ``pace.py``,
``mada.py``, ``pullback.py`` and ``schedule_free.py`` are the rules, ``storage.py`` the formats, ``sweep.py`` and
``*_kernel.py`` the walk over memory, ``scalars.py`` and ``sums.py`` what goes before and after it; ``ops.py`` puts them
together.
"""

from .ops import mada_learn_, mada_step_, pace_step_, pullback_, schedule_free_step_

__all__ = ["mada_learn_", "mada_step_", "pace_step_", "pullback_", "schedule_free_step_"]
