"""axolotl: a plugin that trains with an optimizer of this package and saves the average.

.. code-block:: yaml

    plugins: [pace_kernels.integrations.axolotl.PacePlugin]
    pace_kernels: {optimizer: PACE, lambda_pullback: 0.1}
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

import pace_kernels

from .around import PullbackAround
from .transformers import UseAverage, optimizer_from

_CLASSES = {name: getattr(pace_kernels, name) for name in ("PACE", "MADA", "ScheduleFreeAdamW")}
_CLASSES["Pullback"] = PullbackAround


class PaceArgs(BaseModel):
    """What the plugin reads from axolotl's file: the optimizer's name (PACE by default) and its options."""

    pace_kernels: dict[str, Any] | None = None


class PacePlugin(BasePlugin):  # type: ignore[misc]
    """Learning rate, betas, eps, weight decay and groups come from axolotl's file; options under ``pace_kernels``
    override them. The plugin adds ``UseAverage``, so that the average is saved."""

    def get_input_args(self) -> str:
        return f"{__name__}.PaceArgs"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        options = dict(cfg.pace_kernels or {})
        name = options.pop("optimizer", "PACE")
        if name not in _CLASSES:
            raise ValueError(f"pace_kernels.optimizer must be one of {', '.join(_CLASSES)}, got {name!r}")
        trainer.optimizer_cls_and_kwargs = optimizer_from(trainer.args, _CLASSES[name], **options)
        trainer.add_callback(UseAverage())
