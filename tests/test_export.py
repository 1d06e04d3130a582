"""Promise: what is exported is what the model's own ``state_dict()`` gives while the averages are in it, whatever hooks
and modules make of the weights, and shares no memory with the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ranks import run
from test_schedule_free import average_of
from torch import Tensor, nn

import pace_kernels
from pace_kernels import MADA, PACE, Pullback, ScheduleFreeAdamW

RULES: dict[str, Callable[[Any], Any]] = {
    "PACE": lambda params: PACE(params, lr=0.1),
    "averaged MADA": lambda params: MADA(params, lr=0.1, use_ema_eval=True),
    "Pullback": lambda params: Pullback(torch.optim.SGD(params, lr=0.1), gain=0.05),
    "schedule-free": lambda params: ScheduleFreeAdamW(params, lr=0.1),
    "not evaluated": lambda params: PACE(params, lr=0.1, use_ema_eval=False),
}


def hooked(change: Callable[[dict[str, Any], str], None]) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    model[0].register_state_dict_post_hook(lambda module, state, prefix, _: change(state, prefix))
    return model


def each(change: Callable[[Tensor], Any]) -> Callable[[], nn.Module]:
    def of_weights(state: dict[str, Any], prefix: str) -> None:
        for name in [name for name in state if name.startswith(prefix)]:
            state[name] = change(state[name])

    return lambda: hooked(of_weights)


def renamed(state: dict[str, Any], prefix: str) -> None:
    state["other." + prefix] = state.pop(prefix + "weight")


class OwnSaving(nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"], destination[prefix + "bias"] = self.weight.detach(), self.bias.detach()


class OwnExtra(nn.Linear):
    """Views of its weights among what it saves beside them."""

    def get_extra_state(self) -> Any:
        return {"rows": [row for row in self.weight.detach()], "pair": (self.bias.detach(), 1), "text": "kept"}

    def set_extra_state(self, state: Any) -> None:
        pass


class NoArguments(nn.Linear):
    def state_dict(self) -> dict[str, Any]:
        return {"w": self.weight.detach(), "b": self.bias}


class Cached(nn.Linear):
    """Hands out a dict that it keeps."""

    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.kept: dict[str, Any] = {}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.kept.update(super().state_dict(*args, **kwargs))
        return self.kept


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


def with_lazy_part() -> nn.Module:
    return nn.ModuleDict({"seen": nn.Linear(3, 3), "unseen": nn.LazyLinear(2)})


def with_buffers() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("compressed", torch.eye(3).to_sparse_csr())
    model.register_buffer("quantized", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
    model.register_buffer("complex", torch.ones(2, dtype=torch.complex64))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)),
    "a hook that casts": each(lambda value: value.half()),
    "a hook that clones": each(lambda value: value.detach().clone()),
    "a hook that transposes": each(lambda value: value.t()),
    "a hook that makes sparse": each(lambda value: value.detach().to_sparse()),
    "a hook that takes parts": each(lambda value: list(value.detach().unbind())),
    "a hook that renames": lambda: hooked(renamed),
    "its own saving": lambda: nn.Sequential(OwnSaving(3, 3), nn.Linear(3, 1)),
    "its own extra state": lambda: nn.Sequential(OwnExtra(3, 3), nn.Linear(3, 1)),
    "state_dict(self)": lambda: NoArguments(3, 1),
    "a dict that it keeps": lambda: Cached(3, 1),
    "tied": tied,
    "lazy": with_lazy_part,
    "sparse and quantized buffers": with_buffers,
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
    "compiled": lambda: torch.compile(nn.Linear(3, 1)),
}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if not nn.parameter.is_lazy(p)]


def trained(rule: str, model: nn.Module) -> Any:
    torch.manual_seed(1)
    optimizer = RULES[rule](trainable(model))
    for _ in range(4):
        for p in trainable(model):
            p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from tensors(inner)


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if nn.parameter.is_lazy(value) else value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(inner) for key, inner in value.items()}
    return type(value)(map(copied, value)) if isinstance(value, (list, tuple)) else value


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        if nn.parameter.is_lazy(a):
            return a is b
        if (a.dtype, a.layout, a.shape) != (b.dtype, b.layout, b.shape):
            return False
        if a.layout is not torch.strided:
            a, b = a.to_dense(), b.to_dense()
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(alike, a, b))
    return bool(a == b)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", MODELS)
def test_it_is_the_state_dict_of_a_model_that_holds_the_averages(kind: str, rule: str) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]()
    optimizer = trained(rule, model)
    live = [p.detach().clone() for p in trainable(model)]
    with torch.no_grad():
        for p in trainable(model):
            p.copy_(average_of(optimizer, p))
    wanted = copied(dict(model.state_dict()))
    with torch.no_grad():
        for p, value in zip(trainable(model), live, strict=True):
            p.copy_(value)

    for exported in (optimizer.ema_state_dict(model), pace_kernels.ema_state_dict(model, optimizer)):
        assert alike(dict(exported), wanted)
        assert all(map(torch.equal, trainable(model), live))
        assert not any("live" in state for state in optimizer.state.values())
        held = {t.untyped_storage().data_ptr() for t in trainable(model)}
        own = [t for t in tensors(dict(exported)) if t.layout is torch.strided and not nn.parameter.is_lazy(t)]
        assert not held & {t.untyped_storage().data_ptr() for t in own}
        assert len({t.untyped_storage().data_ptr() for t in own}) == len(own)
        assert all(t.is_contiguous() and not t.requires_grad for t in own)
    if kind == "a dict that it keeps":
        assert torch.equal(model.kept["weight"], model.weight)


def replicated() -> list[bool]:
    """The norm between two parallel layers is a DTensor that every rank has all of."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    model = nn.Linear(3, 2)
    for name, p in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Replicate()])))
    optimizer = PACE(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    exported = optimizer.ema_state_dict(model, full=True)
    before = {name: value.clone() for name, value in exported.items()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    return [torch.equal(before[name], value) for name, value in exported.items()]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_a_whole_export_of_replicated_weights_is_a_copy_too() -> None:
    assert run(2, replicated) == [[True, True], []]
