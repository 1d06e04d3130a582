"""Accelerate: the methods of an optimizer through the wrapper that ``Accelerator.prepare`` puts around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from .callbacks import OURS


class PreparedOptimizer(AcceleratedOptimizer):  # type: ignore[misc]
    """Accelerate's wrapper, with all methods and attributes of the optimizer inside."""

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not there yet, as while it is unpickled
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    @property
    def clip_coef(self) -> Any:
        return self.optimizer.clip_coef

    @clip_coef.setter
    def clip_coef(self, value: Any) -> None:
        self.optimizer.clip_coef = value

    def step(self, closure: Callable[[], Any] | None = None, *, clip_coef: Tensor | float | None = None) -> None:
        """Accelerate's step; ``clip_coef`` applies to this step, as in :meth:`PACE.step`."""
        if clip_coef is None:
            super().step(closure)
            return
        before = self.clip_coef
        self.clip_coef = clip_coef
        try:
            super().step(closure)
        finally:
            self.clip_coef = before


def prepare(accelerator: Any, *objects: Any, **options: Any) -> Any:
    """``accelerator.prepare(*objects)``. The wrappers it returns have the methods of this package's optimizers too:
    ``averaged``, ``get_step_stats``, ``ema_state_dict`` and so on, and ``clip_coef`` as an argument of ``step()`` and
    as an attribute.

    >>> model, optimizer = prepare(Accelerator(), model, optimizer)  # doctest: +SKIP
    """
    prepared = accelerator.prepare(*objects, **options)
    for result in prepared if isinstance(prepared, tuple) else (prepared,):
        if type(result) is AcceleratedOptimizer and isinstance(result.optimizer, OURS):
            result.__class__ = PreparedOptimizer  # in place: the accelerator keeps this object
    return prepared
