"""What the callbacks for trainers share: the optimizer within its wrappers, and batch normalization."""

from __future__ import annotations

import warnings
from typing import Any, Literal, cast

from torch import Tensor

from .. import batchnorm
from ..averaging import Averaging
from ..holding import Holding
from ..memory import share_memory

OURS = (Averaging, Holding)


def stepping(optimizer: Any) -> Any:
    """The optimizer inside the wrappers that trainers put around it."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def averaging(optimizer: Any, model: Any) -> Averaging | None:
    """The optimizer that averages the weights of this model, without its wrappers; None for another package's.

    Raises RuntimeError for DeepSpeed's wrapper, which does not step the model's own weights.
    """
    inner = stepping(optimizer)
    if not isinstance(inner, OURS):
        return None
    outer = optimizer
    while outer is not inner:
        if type(outer).__module__.startswith("deepspeed.") and not share_memory(model.parameters(), inner._params()):
            raise RuntimeError(
                f"UseAverage does not work with DeepSpeed's {type(outer).__name__}: it steps float32 pieces of its own "
                "and copies them into the model, so the average cannot be put into the model. Leave the callback out, "
                "and export with pace_kernels.integrations.deepspeed.ema_state_dict(engine)"
            )
        outer = outer.optimizer
    return cast(Averaging, inner)


def averages(ours: Any) -> list[Any]:
    """Its groups whose average is swapped in."""
    return [group for group in ours.param_groups if ours._option(group, "use_ema_eval")]


class RunningStatistics:
    """Batch normalization beside an average: warns once that its statistics are the live model's, or recomputes them
    for the average and puts the live ones back.

    ``update_bn``: batches or a function, as for :func:`pace_kernels.averaged`; False: no warning; None: a warning.
    """

    def __init__(self, update_bn: batchnorm.Batches | Literal[False] | None) -> None:
        if isinstance(update_bn, bool) and update_bn:
            raise ValueError("update_bn must be batches, a function of the model, False or None, got True")
        self.update_bn = update_bn
        self._said = False
        self.live: dict[str, Tensor] = {}  # the live ones, while those of the average are in the model

    def say(self, model: Any) -> None:
        count = 0 if self.update_bn is not None or self._said else len(batchnorm.layers(model))
        if count:
            self._said = True
            warnings.warn(
                f"UseAverage: {count} layers of batch normalization are evaluated and saved with statistics of the "
                "live weights. UseAverage(update_bn=batches) recomputes them for the average and restores the live "
                "ones afterwards; update_bn=False turns this warning off",
                stacklevel=3,
            )

    def recompute(self, model: Any) -> None:
        """Recomputes them for the average, which the model holds; a second call before put_back() is harmless."""
        if self.update_bn and not self.live:
            self.live = batchnorm.recompute(model, self.update_bn)

    def put_back(self, model: Any) -> None:
        batchnorm.put_back(model, self.live)
        self.live = {}


def step_statistics(optimizer: Any, prefix: str = "optimizer/") -> dict[str, float]:
    """``get_step_stats()`` of the optimizer inside its wrappers, under names for a logger; {} for other optimizers."""
    read = getattr(stepping(optimizer), "get_step_stats", None)
    return {f"{prefix}{name}": value for name, value in read().items()} if read else {}
