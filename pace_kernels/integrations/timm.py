"""timm: importing this module adds the optimizers to timm's registry, as ``pace``, ``mada`` and ``schedulefreeadamw``,
for ``timm.optim.create_optimizer_v2`` and the option ``--opt`` of timm's scripts."""

from __future__ import annotations

from timm.optim._optim_factory import OptimInfo, default_registry

from ..mada import MADA
from ..pace import PACE
from ..schedule_free import ScheduleFreeAdamW

for _cls, _text in (
    (PACE, "AdamW with an average of the weights and a pull toward it"),
    (MADA, "learns which of Adam, AMSGrad, AVGrad, Adan, Yogi and Lion to be"),
    (ScheduleFreeAdamW, "AdamW without a schedule of the learning rate"),
):
    if _cls.__name__.lower() not in default_registry.list_optimizers():
        default_registry.register(OptimInfo(_cls.__name__.lower(), _cls, f"pace_kernels: {_text}", has_betas=True))
