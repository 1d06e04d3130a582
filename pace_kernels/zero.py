"""``ZeroRedundancyOptimizer``: each rank's optimizer averages its own parameters; this sends the averages to all."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_MODULE = "torch.distributed.optim.zero_redundancy_optimizer"
_together: set[int] = set()  # ids of optimizers whose averages are on their way to the other ranks


def is_zero(optimizer: object) -> bool:
    module = sys.modules.get(_MODULE)
    return module is not None and isinstance(optimizer, module.ZeroRedundancyOptimizer)


def check_alone(optimizer: torch.optim.Optimizer, what: str) -> None:
    """Refuses the optimizer of one rank of several, whose swap would leave the parameters of the others live. The
    ZeroRedundancyOptimizer is found among the objects that refer to it."""
    dist = torch.distributed
    if id(optimizer) in _together or _MODULE not in sys.modules or not (dist.is_available() and dist.is_initialized()):
        return
    for holder in gc.get_referrers(optimizer):
        # Up to Python 3.10 an object's dict refers to what it holds, later as a rule the object itself.
        known = holder if isinstance(holder, dict) else vars(holder) if is_zero(holder) else {}
        if known.get("optim") is optimizer and "_optim_constructor" in known and known["world_size"] > 1:
            raise RuntimeError(
                f"{what}: this is one rank's part of a ZeroRedundancyOptimizer, and the parameters of the other ranks "
                "would stay live. On all ranks, pace_kernels.averaged(model, zero) evaluates the averages of all; to "
                "export them, call zero.consolidate_state_dict() as in docs/sharding.md"
            )


@contextmanager
def averaged_on_all_ranks(zero: Any, model: torch.nn.Module) -> Iterator[None]:
    """Within this context each rank's model holds the averages of all ranks' parameters. All ranks have to enter."""
    dist, ranks, inner = torch.distributed, zero.process_group, zero.optim
    params: list[Tensor] = [param for group in zero.param_groups for param in group["params"]]
    here = {id(param) for group in inner.param_groups for param in group["params"]}
    owned: list[Any] = [None] * zero.world_size
    dist.all_gather_object(owned, [i for i, param in enumerate(params) if id(param) in here], group=ranks)
    others = [param for param in params if id(param) not in here]
    live = [param.detach().clone() for param in others]
    was_swapped = inner._swapped
    _together.add(id(inner))
    try:
        inner._eval(model, "averaged()")
        for rank, indices in enumerate(owned):
            for i in indices:
                dist.broadcast(params[i].detach(), dist.get_global_rank(ranks, rank), group=ranks)
        torch.autograd.graph.increment_version(others)
        inner._forget_derived(model)
        left = [param._version for param in params]
        yield
        if left != [param._version for param in params]:
            raise RuntimeError("averaged(): weights were changed inside; the live ones are back. Load after the block")
    finally:
        _together.discard(id(inner))
        for param, value in zip(others, live, strict=True):
            param.detach().copy_(value)
        if not was_swapped:
            inner.train(model, keep="live")
