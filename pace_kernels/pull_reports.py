"""What a Pullback tells of itself: statistics, its part of the states, bytes, and averages in float32."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .checks import Group
from .conversions import in_floats
from .definitions.kit import average_weight
from .formats import CODED, HASH, parts_of
from .pull_stats import Averager, statistics
from .pullback_checkpoints import PullbackCheckpoints
from .pulls import AVERAGE, FORMAT_VERSION, LIVE, OURS, STEP
from .report import Memory, memory_of
from .states import FORMAT
from .torch_rules.pullback import PullbackOptions


class PullReports(PullbackCheckpoints):
    """A Pullback to look at. Not for direct use."""

    def get_step_stats(self) -> dict[str, float]:
        """Statistics of the last step, over all groups with ``log_stats``: those of :meth:`PACE.get_step_stats`, of the
        base's step ``base_step_norm``. Where no second moment takes part there is no ``raw_lambda_*``, and where
        the weights before the step are not at hand (``pullback_from="step"``, or no pull) no ``base_step_norm`` and no
        ``update_norm``."""
        stats = statistics(self._scratch.rows)
        if not stats and not any(self._option(group, "log_stats") for group in self.param_groups):
            self._say("get_step_stats() is empty: no group has log_stats=True")
        return stats

    def get_ema_beta_t(self) -> float | None:
        """The averaging weight w_t at the last step of the first group that keeps an average; None where none does."""
        for group in self.base.param_groups:
            own = self._own(group)
            if own.keeps:
                states = [self.base.state.get(p) or {} for p in group["params"]]
                steps = [float(state[STEP]) for state in states if STEP in state]
                options: Group = {"lr": 0.0, "beta2": 0.0, "eps": 1.0, "step_offset": 0, "capturable": False}
                return float(average_weight(PullbackOptions(**options, **own.operator), max(steps, default=0.0)))
        return None

    @property
    def averager(self) -> Averager:
        """The average's part of the states, to look at."""
        return Averager(self)

    def memory(self) -> Memory:
        """The bytes of weights, gradients and states by tensor, on this rank; which averages are compressed, and why
        the others are not. Before the first step the states are the average's alone: nobody knows the base's yet."""
        return memory_of(self)

    @contextmanager
    def editing_weights(self, *, reset_average: bool = False) -> Iterator[None]:
        """Within this context weights may be written between steps, and converted, as by ``model.bfloat16()``: averages
        keep their values, see :meth:`PACE.editing_weights`. The base's states are left as they are, and many optimizers
        refuse states of another dtype than their parameters'. After a conversion
        ``optimizer.load_state_dict(optimizer.state_dict())`` casts them, as torch does at each load; a warning says so.
        """
        dtypes = {param: param.dtype for param in self._params()}
        with super().editing_weights(reset_average=reset_average):
            yield
        for param, was in dtypes.items():
            state = self.base.state.get(param) or {}
            theirs = (value.dtype for name, value in state.items() if name not in OURS and _is_like(value, param))
            if param.dtype is not was and (odd := next((dtype for dtype in theirs if dtype is not param.dtype), None)):
                kind = type(self.base).__name__
                warnings.warn(
                    f"{self._name_of(param)} is {param.dtype} now, and {kind} keeps states of {odd} for it, which its "
                    "step may refuse: optimizer.load_state_dict(optimizer.state_dict()) casts them",
                    stacklevel=3,  # beyond contextlib
                )
                return

    @torch.no_grad()
    def float_state_dict(self) -> dict[str, Any]:
        """``state_dict()`` with all averages in float32, for versions without codes."""
        saved = self.state_dict()
        keys = [key for packed in saved["param_groups"] for key in packed["params"]]
        for key, param in zip(keys, self._params(), strict=True):
            state = saved["state"].get(key)
            if isinstance(state, dict) and any(name in CODED for name in state.keys() & set(parts_of(AVERAGE))):
                self._check_unedited("float_state_dict()", [param])
                ours = {name: value for name, value in state.items() if name in (*parts_of(AVERAGE), LIVE)}
                others = {name: value for name, value in state.items() if name not in (*parts_of(AVERAGE), HASH)}
                saved["state"][key] = others | {AVERAGE: in_floats(ours, param)[AVERAGE]}
        for group in saved["param_groups"]:
            group[FORMAT_VERSION] = min(group[FORMAT_VERSION], FORMAT)
        return saved


def _is_like(value: Any, param: Tensor) -> bool:
    """Whether a state is of numbers for the elements of a parameter."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape == param.shape
