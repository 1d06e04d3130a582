"""Recomputes the running statistics of batch normalization, which are those of the live weights, for the average."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

# Batches to pass through a model, or a function that passes them through it.
Batches: TypeAlias = Iterable[Any] | Callable[[nn.Module], Any]


def layers(model: nn.Module) -> list[Any]:
    """The layers of a model that keep running statistics of their batches."""
    kinds = nn.modules.batchnorm._BatchNorm
    return [module for module in model.modules() if isinstance(module, kinds) and module.running_mean is not None]


@contextmanager
def recomputed(model: nn.Module, batches: Batches) -> Iterator[None]:
    """Within this context the running statistics are those of the weights that the model holds on entry; see
    :func:`recompute`."""
    kept = recompute(model, batches)
    try:
        yield
    finally:
        put_back(model, kept)


@torch.no_grad()
def put_back(model: nn.Module, kept: dict[str, Tensor]) -> None:
    """Puts back what :func:`recompute` returned."""
    buffers = dict(model.named_buffers())
    for name, value in kept.items():
        buffers[name].copy_(value)


def recompute(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Makes running statistics the mean over ``batches`` under the weights that the model holds. Modes of modules and
    the state of the random numbers stay as they were. Returns copies of what all buffers held before, by name. A model
    without such a layer is left alone, and the result is empty.

    Arguments:
        batches: what each forward pass gets: tensors; lists and tuples, whose first entry is passed; or mappings,
            passed by keyword. Or a function of the model that runs the forward passes.
    """
    found = layers(model)
    if not found:
        return {}
    kept = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    modes = [(module, module.training) for module in model.modules()]
    momenta = [layer.momentum for layer in found]

    accelerator = next((b.device for b in kept.values() if b.device.type != "cpu"), None)
    devices = [] if accelerator is None else [accelerator.index or 0]
    kind = "cuda" if accelerator is None else accelerator.type
    try:
        with torch.no_grad(), torch.random.fork_rng(devices, device_type=kind):
            _pass_through(model, found, batches)
    except BaseException:
        put_back(model, kept)
        raise
    finally:
        for layer, momentum in zip(found, momenta, strict=True):
            layer.momentum = momentum
        for module, training in modes:
            module.training = training
    return kept


def _pass_through(model: nn.Module, found: list[Any], batches: Batches) -> None:
    model.train()
    for layer in found:
        layer.reset_running_stats()
        layer.momentum = None  # a mean over all batches
    if callable(batches):
        batches(model)
        return
    device = found[0].running_mean.device
    for batch in batches:
        if isinstance(batch, Mapping):
            model(**{name: _on(value, device) for name, value in batch.items()})
        else:
            model(_on(batch[0] if isinstance(batch, (list, tuple)) else batch, device))


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
