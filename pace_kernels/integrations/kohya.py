"""kohya's sd-scripts call ``eval()`` before they sample and save, and ``train()`` after it, only if
``--optimizer_type`` ends in "schedulefree". So these names do:
``--optimizer_type=pace_kernels.integrations.kohya.PACEScheduleFree``.

With such names the scripts use no learning-rate schedule: the rate is constant, for PACE too. Options go into
``--optimizer_args``, such as ``lambda_pullback=0.1``.
"""

from __future__ import annotations

from ..mada import MADA
from ..pace import PACE
from ..schedule_free import ScheduleFreeAdamW
from .around import PullbackAround


class PACEScheduleFree(PACE):
    """:class:`PACE` under a name with which sd-scripts use the average."""


class MADAScheduleFree(MADA):
    """:class:`MADA` under a name with which sd-scripts use the average, which it keeps by default."""

    def __init__(self, params, lr=1e-3, *, use_ema_eval=True, **options):  # type: ignore[no-untyped-def]
        super().__init__(params, lr, use_ema_eval=use_ema_eval, **options)


class PullbackScheduleFree(PullbackAround):
    """:class:`Pullback` under a name with which sd-scripts use the average: ``base=torch.optim.SGD``."""

    def __init__(self, params, lr=1e-3, base="torch.optim.AdamW", base_options=None, **pullback):  # type: ignore[no-untyped-def]
        super().__init__(params, base, {"lr": lr, **(base_options or {})}, **pullback)


class AdamWScheduleFree(ScheduleFreeAdamW):
    """:class:`ScheduleFreeAdamW` under schedulefree's own name."""
