"""Copies of the weights that other software keeps: code that changes weights in place has to make it drop them.

- FSDP2 (``fully_shard``) gathers sharded weights into whole ones, and keeps those of the root, or with
  ``reshard_after_forward=False`` all, after a forward pass that no backward pass follows, as in a validation.
- Autocast keeps copies of the weights in its lower precision until the outermost context ends.
- Inductor's freezing folds weights into the graphs that it compiles for inference.
- FSDP1 keeps whole weights as FSDP2 does, and its parameters are views of one or the other.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .sharding import is_sharded


def check_no_frozen_graphs(what: str) -> None:
    """Raises RuntimeError if compiled graphs hold the weights as constants."""
    config = sys.modules.get("torch._inductor.config")
    if config is not None and getattr(config, "freezing", False):
        raise RuntimeError(
            f"{what} while torch._inductor.config.freezing is on: compiled graphs hold the weights as constants and "
            "would not see the change. Turn it off before you compile the model"
        )


def check_no_flat_parameters(params: Iterable[Tensor], what: str) -> None:
    """Raises RuntimeError for parameters of FSDP1."""
    if any(getattr(param, "_fsdp_flattened", False) for param in params):
        raise RuntimeError(
            f"{what} of parameters of FullyShardedDataParallel (FSDP1): it keeps gathered copies of the weights, which "
            "would go stale. Shard the model with fully_shard (FSDP2)"
        )


def forget(model: torch.nn.Module | None, params: Iterable[Tensor]) -> None:
    """Makes autocast and FSDP2 forget what they derived from these parameters, or from those of ``model``."""
    torch.clear_autocast_cache()
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not hasattr(fsdp, "FSDPModule"):
        return
    if model is not None:
        found = [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
    else:
        found = _fsdp_modules([param for param in params if is_sharded(param)])
    for module in found:
        _reshard(module)


def _reshard(module: Any) -> None:
    groups = getattr(_state(module), "_fsdp_param_groups", ())
    if any(getattr(group, "_all_gather_result", None) is not None for group in groups):
        module.unshard()  # waits for a gather that is on its way, and would bring the weights of before
    module.reshard()


def _state(module: Any) -> Any:
    get = getattr(module, "_get_fsdp_state", None)
    return None if get is None else get()


def _fsdp_modules(params: list[Tensor]) -> list[Any]:
    """The FSDP2 modules that hold these parameters: nothing public leads from a parameter to its module."""
    if not params:
        return []
    ours = set(map(id, params))
    try:
        from torch.distributed._composable_state import _module_state_mapping

        found = []
        for module in list(_module_state_mapping):
            state = _state(module)
            if state is None:
                continue
            groups = getattr(state, "_fsdp_param_groups", None)  # torch before 2.12 has one
            groups = [state._fsdp_param_group] if groups is None else groups
            held = (p.sharded_param for group in groups if group is not None for p in group.fsdp_params)
            if any(id(param) in ours for param in held):
                found.append(module)
        return found
    except (ImportError, AttributeError):
        warnings.warn(
            "weights and average were swapped, but this version of torch does not tell which FSDP modules hold "
            "gathered weights: pass the model, as in optimizer.eval(model), optimizer.train(model) and "
            "optimizer.averaged(model)",
            stacklevel=5,
        )
        return []
