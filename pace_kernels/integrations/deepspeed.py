"""DeepSpeed: exports the averages from an engine of any ZeRO stage.

An engine trains float32 pieces of its own and copies them into the module's weights: a swap of the optimizer's averages
would reach only the pieces. So export the averages, and load them into a second model to validate.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import zero
from deepspeed.utils import safe_get_full_optimizer_state
from torch import Tensor

from ..averaging import Averaging
from ..sharding import on_first_rank
from .callbacks import stepping


@torch.no_grad()
def ema_state_dict(engine: Any) -> dict[str, Any]:
    """A copy of ``engine.module.state_dict()`` with averaged weights, on the CPU of rank 0; elsewhere an empty dict.

    All ranks have to make the call, after at least one step. Each weight comes in its own dtype, and one weight is
    gathered at a time. Frozen parameters and buffers come as they are.

    Arguments:
        engine: the engine that ``deepspeed.initialize`` returned, with ZeRO 0, 1, 2 or 3, around :class:`PACE`,
            :class:`MADA` or :class:`Pullback`.

    Raises:
        TypeError: the engine steps another optimizer.
        RuntimeError: there is no average yet.
        ValueError: a trainable parameter has no average, or hooks of the module's ``state_dict()`` return something
            else than the parameter, so that its average is unknown.

    >>> averages = ema_state_dict(engine)  # doctest: +SKIP
    """
    optimizer = stepping(engine.optimizer)
    if not isinstance(optimizer, Averaging):
        raise TypeError(f"ema_state_dict(): the engine steps {type(optimizer).__name__}, not PACE, MADA or Pullback")
    if optimizer._AVERAGE != "ema":
        raise TypeError(f"ema_state_dict(): {type(optimizer).__name__} keeps no average as a state to gather")
    if not any("ema" in state for state in optimizer.state.values()):
        raise RuntimeError("ema_state_dict(): the optimizer has no average yet: call it after a step")
    module, first = engine.module, on_first_rank()
    copies = _float32_copies(engine.optimizer)
    exported: dict[str, Any] = module.state_dict(keep_vars=True)
    params = dict(module.named_parameters(remove_duplicate=False))
    kept = [*params.values(), *module.buffers()]
    for name, value in exported.items():
        if isinstance(value, Tensor) and not any(value is tensor for tensor in kept):
            raise ValueError(f"ema_state_dict(): state_dict() has a tensor {name!r} that is no parameter or buffer")
    done: dict[Tensor, Tensor] = {}
    for name, value in exported.items():
        if not isinstance(value, Tensor):
            continue
        if value not in done:
            whole = _whole(value, optimizer, copies, name)
            done[value] = whole.to("cpu", value.dtype, copy=True) if first else whole.new_empty(0, device="cpu")
        exported[name] = done[value].clone()  # of each name its own, as safetensors wants it
    return exported if first else {}


def _whole(value: Tensor, optimizer: Averaging, copies: dict[Tensor, Tensor], name: str) -> Tensor:
    """The average of a parameter; the value itself of a frozen one and of a buffer."""
    state = optimizer.state.get(copies.get(value, value), {})
    average: Tensor | None = state.get("ema")
    if average is None and isinstance(value, torch.nn.Parameter):
        average = safe_get_full_optimizer_state(value, "ema")
    if average is not None:
        return average
    if value.requires_grad:
        raise ValueError(f"ema_state_dict(): parameter {name!r} requires a gradient and has no average")
    if value.numel() < getattr(value, "ds_numel", 0):  # a frozen one of ZeRO 3, in pieces too
        with zero.GatheredParameters([value]):
            return value.detach().clone()
    return value


def _float32_copies(optimizer: Any) -> dict[Tensor, Tensor]:
    """With ZeRO 0 and 16-bit weights: the float32 copy of each, which the engine steps."""
    narrow, wide = getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ())
    return {
        weight: copy
        for weights, group in zip(narrow, wide, strict=False)
        for weight, copy in zip(weights, group, strict=False)
    }
