"""Promise: a parameter that did not require a gradient at the last step is live in the average that is evaluated,
exported and saved; when it steps again, its average starts anew at its weights."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pace_kernels import MADA, PACE

KINDS: dict[str, Callable[..., Any]] = {
    "PACE": lambda params, **k: PACE(params, lr=0.1, **k),
    "no pull": lambda params, **k: PACE(params, lr=0.1, lambda_pullback=0.0, ema_kappa=None, **k),
    "MADA": lambda params, **k: MADA(params, lr=0.1, use_ema_eval=True, hyper_warmup=0, **k),
    "adan": lambda params, **k: MADA.preset("adan", params, lr=0.1, use_ema_eval=True, **k),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_backend = pytest.mark.parametrize("backend", [None, "torch"])


def parts(count: int = 2) -> torch.nn.ParameterDict:
    generator = torch.Generator().manual_seed(0)
    names = ("backbone", "head", "other")[:count]
    return torch.nn.ParameterDict({n: torch.nn.Parameter(torch.randn(3, 2, generator=generator)) for n in names})


def step(model: torch.nn.ParameterDict, optimizer: Any, t: int, names: tuple[str, ...]) -> None:
    for name, param in model.items():
        generator = torch.Generator().manual_seed(100 * t + len(name))
        param.grad = torch.randn(param.shape, generator=generator) if name in names else None
    optimizer.step()


@every_backend
@every_kind
def test_a_frozen_part_is_live_in_the_average(kind: str, backend: str | None) -> None:
    model = parts()
    optimizer = KINDS[kind](model.parameters(), backend=backend)
    for t in range(3):
        step(model, optimizer, t, ("backbone", "head"))
    model["backbone"].requires_grad_(False)
    average = optimizer.ema_state_dict(model)["backbone"]
    assert not torch.equal(average, model["backbone"])  # not before a step
    step(model, optimizer, 3, ("head",))
    live = copy.deepcopy(model.state_dict())
    exported = optimizer.ema_state_dict(model)
    with optimizer.averaged():
        assert torch.equal(model["backbone"], live["backbone"]) and torch.equal(model["head"], exported["head"])
    assert torch.equal(exported["backbone"], live["backbone"]) and not torch.equal(exported["head"], live["head"])
    assert all(torch.equal(model[name], live[name]) for name in live)
    assert "ema" not in optimizer.state[model["backbone"]]


@every_kind
def test_waking_starts_the_average_at_the_weights(kind: str) -> None:
    """As that of a parameter whose average had been there and equal to its weights."""
    model, other = parts(), parts()
    one, two = KINDS[kind](model.parameters()), KINDS[kind](other.parameters())
    for pair, optimizer in ((model, one), (other, two)):
        for t in range(3):
            step(pair, optimizer, t, ("backbone", "head"))
        pair["backbone"].requires_grad_(False)
        step(pair, optimizer, 3, ("head",))
        pair["backbone"].data.add_(1.0)  # merged with an adapter, say
        pair["backbone"].requires_grad_(True)
    two.state[other["backbone"]]["ema"] = other["backbone"].detach().clone()
    for t in (4, 5):
        step(model, one, t, ("backbone", "head"))
        step(other, two, t, ("backbone", "head"))
    for name in model:
        assert torch.equal(model[name], other[name])
        assert torch.equal(one.state[model[name]]["ema"], two.state[other[name]]["ema"])


@every_kind
def test_no_gradient_in_a_step_keeps_the_average(kind: str) -> None:
    model = parts()
    optimizer = KINDS[kind](model.parameters())
    step(model, optimizer, 0, ("backbone", "head"))
    kept = optimizer.state[model["backbone"]]["ema"].clone()
    step(model, optimizer, 1, ("head",))
    assert torch.equal(optimizer.state[model["backbone"]]["ema"], kept)


@every_kind
def test_freezing_around_an_evaluation_or_the_step_of_another_optimizer_changes_nothing(kind: str) -> None:
    """PEFT's disable_adapter(), and the alternation of a GAN."""

    def trained(alternate: bool) -> Any:
        generator, critic = parts(), parts()
        one, two = KINDS[kind](generator.parameters()), KINDS[kind](critic.parameters())
        exported = []
        for t in range(6):
            if alternate:
                generator.requires_grad_(False)
            step(critic, two, t, ("backbone", "head"))
            if alternate:
                generator.requires_grad_(True)
                critic.requires_grad_(False)
            step(generator, one, t + 10, ("backbone", "head"))
            critic.requires_grad_(True)
            if alternate:
                for model in (generator, critic):
                    model.requires_grad_(False)
            exported.append((one.ema_state_dict(generator), two.ema_state_dict(critic)))
            for model in (generator, critic):
                model.requires_grad_(True)
        return exported

    for a, b in zip(trained(True), trained(False), strict=True):
        for x, y in zip(a, b, strict=True):
            assert all(torch.equal(x[name], y[name]) for name in x)


@every_kind
@pytest.mark.parametrize("resting", [("backbone",), ("backbone", "head")], ids=["one", "all"])
def test_rest_is_saved(kind: str, resting: tuple[str, ...]) -> None:
    model = parts()
    optimizer = KINDS[kind](model.parameters())
    step(model, optimizer, 0, ("backbone", "head"))
    for name in resting:
        model[name].requires_grad_(False)
    step(model, optimizer, 1, tuple(set(model) - set(resting)))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, states = torch.load(file)
    other = parts()
    other.load_state_dict(weights)
    for name in resting:
        other[name].requires_grad_(False)
    resumed = KINDS[kind](other.parameters())
    resumed.load_state_dict(states)
    exported = resumed.ema_state_dict(other)
    for name, value in optimizer.ema_state_dict(model).items():
        assert torch.equal(exported[name], value)
        assert torch.equal(value, model[name]) is (name in resting)
    for pair, each in ((model, optimizer), (other, resumed)):
        pair.requires_grad_(True)
        step(pair, each, 2, ("backbone", "head"))
    for name in model:
        assert torch.equal(optimizer.state[model[name]]["ema"], resumed.state[other[name]]["ema"])


@every_kind
def test_an_average_lost_by_all_is_refused_beside_one_at_rest(kind: str) -> None:
    model = parts(3)
    optimizer = KINDS[kind](model.parameters())
    step(model, optimizer, 0, ("backbone", "head", "other"))
    model["backbone"].requires_grad_(False)
    step(model, optimizer, 1, ("head", "other"))
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state.pop("ema", None)
    with pytest.raises(ValueError, match="lacks ema"):
        optimizer.load_state_dict(saved)


@every_kind
def test_a_frozen_parameter_with_a_gradient_left_steps_as_in_torch_and_is_live(kind: str) -> None:
    model = parts()
    optimizer = KINDS[kind](model.parameters())
    step(model, optimizer, 0, ("backbone", "head"))
    model["backbone"].requires_grad_(False)
    before = model["backbone"].clone()
    step(model, optimizer, 1, ("backbone", "head"))
    assert not torch.equal(before, model["backbone"])
    assert torch.equal(optimizer.ema_state_dict(model)["backbone"], model["backbone"])


@pytest.mark.parametrize("options", [{"skip_nonfinite": True}, {"fused": True}], ids=["skip_nonfinite", "found_inf"])
def test_a_step_that_is_left_undone_puts_nothing_at_rest(options: dict[str, bool]) -> None:
    frozen, other = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = PACE([frozen, other], **options)
    for p in (frozen, other):
        p.grad = torch.ones(3)
    optimizer.step()
    frozen.requires_grad_(False)
    frozen.grad, other.grad = None, torch.full((3,), float("nan"))
    if "fused" in options:
        optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert "ema" in optimizer.state[frozen]
    if "fused" in options:
        del optimizer.found_inf
    other.grad = torch.ones(3)
    optimizer.step()
    assert "ema" not in optimizer.state[frozen]


@pytest.mark.parametrize("options", [{}, {"state_bits": 8}])
def test_a_state_that_comes_into_play_meanwhile_is_not_missing(options: dict[str, Any]) -> None:
    """Its own checkpoint was refused: the parameter at rest has no first moment, and the others have."""
    params = [torch.nn.Parameter(torch.randn(64, 64)) for _ in range(2)]
    optimizer = PACE(params, betas=(0.0, 0.99), **options)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    params[1].requires_grad_(False)
    params[1].grad = None
    optimizer.param_groups[0]["betas"] = (0.9, 0.99)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    other = PACE([torch.nn.Parameter(param.detach().clone()) for param in params], **options)
    other.load_state_dict(saved)
    _, rest = other.state.values()
    assert any(name.startswith("exp_avg_") for name in rest) and not {"exp_avg", "exp_avg_codes"} & rest.keys()
    lost = saved["state"][0]
    for name in [name for name in lost if name in ("exp_avg", "exp_avg_codes", "exp_avg_scales")]:
        del lost[name]
    with pytest.raises(ValueError, match="lacks exp_avg"):
        PACE(params, **options).load_state_dict(saved)
