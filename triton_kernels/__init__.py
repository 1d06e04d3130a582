"""The rules in Triton; installed as ``pace_kernels.triton_kernels``.

A function here with the name of an operator (pace_kernels/ops.py) does what the operator does. ``pace.py``,
``mada.py``, ``pullback.py`` and ``schedule_free.py`` are the rules. The rest follows from ``pace_kernels/definitions``:
``checks.py`` reads and checks a call, ``table.py`` lists the addresses of its tensors, ``scalars.py``, ``sweep.py`` and
``sums.py`` have one kernel each for all rules, and ``ops.py`` puts them together.

To add a rule, write ``new.py``, the rule in float32 on blocks, and ``new_kernel.py`` with ``Flags`` and ``FIELDS`` (the
names of its scalars) and three functions: ``play`` (what a call puts in play), ``new_scalars`` (from options in float64
to scalars), and ``new_round`` (loads, rule, stores; storage.py knows the formats, and does nothing for an operand that
is not in play). Then add a row in ``rules.py``, a line in ``ops.py`` and here, and in ``aot.py`` names of sets of its
flags, if it has some. To add an option, use ``o.name`` in ``new_scalars``.

Operands in codes (``codes.py``, the formats of ``csrc/codes.h``) have their own scalars and round around the same rule:
``pace_coded_kernel.py``. A call with such operands takes its row of ``CODED`` in ``rules.py``.
"""

from .ops import mada_learn_, mada_step_, pace_step_, pullback_, schedule_free_step_

__all__ = ["mada_learn_", "mada_step_", "pace_step_", "pullback_", "schedule_free_step_"]
