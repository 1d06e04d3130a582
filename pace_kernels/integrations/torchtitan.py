"""torchtitan: its container of optimizers, which also takes the names of this package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torchtitan.components import optimizer as titan

import pace_kernels

_OURS = ("PACE", "MADA", "ScheduleFreeAdamW")


class OptimizersContainer(titan.OptimizersContainer):  # type: ignore[misc]
    """torchtitan's container; ``optimizer_name`` may also be "PACE", "MADA" or "ScheduleFreeAdamW".

    >>> config.optimizer = OptimizersContainer.Config(  # doctest: +SKIP
    ...     param_groups=[ParamGroupConfig(pattern=".*", optimizer_name="PACE", optimizer_kwargs={"lr": 3e-4})]
    ... )
    """

    @dataclass(kw_only=True, slots=True)
    class Config(titan.OptimizersContainer.Config):  # type: ignore[misc]
        pass

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
        if name in _OURS:
            return getattr(pace_kernels, name)  # type: ignore[no-any-return]
        return titan.OptimizersContainer._resolve_optimizer_factory(name)  # type: ignore[no-any-return]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context all model parts hold their averages, to validate."""
        ours = [o for o in self.optimizers if hasattr(o, "averaged")]
        before = [o._swapped for o in ours]
        try:
            for optimizer in ours:
                optimizer.eval()
            yield
        finally:
            for optimizer, swapped in zip(ours, before, strict=True):
                if not swapped:
                    optimizer.train()

    def get_step_stats(self) -> dict[str, float]:
        """The statistics of all optimizers, by the optimizer's number: ``0/lambda_mean``."""
        ours = [(i, o.get_step_stats()) for i, o in enumerate(self) if hasattr(o, "get_step_stats")]
        return {f"{i}/{name}": value for i, stats in ours for name, value in stats.items()}
