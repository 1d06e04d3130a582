"""Promise: what goes on around a Pullback leaves base and average as they belong together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from pace_kernels import Pullback


def snapshot(optimizer: Pullback) -> Any:
    return copy.deepcopy((optimizer.state_dict(), [g["params"] for g in optimizer.param_groups]))


def assert_untouched(optimizer: Pullback, before: Any) -> None:
    saved, params = before
    now = optimizer.state_dict()
    assert now["param_groups"] == saved["param_groups"]
    assert now["state"].keys() == saved["state"].keys()
    for key, state in saved["state"].items():
        assert all(torch.equal(value, now["state"][key][name]) for name, value in state.items())
    for group, kept in zip(optimizer.param_groups, params, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(group["params"], kept, strict=True))


def trained(kind: Any = torch.optim.SGD, steps: int = 3, **options: Any) -> tuple[torch.nn.Linear, Pullback]:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    gain = {"gain": 0.3} if kind is torch.optim.SGD else {}
    optimizer = Pullback(kind(model.parameters(), lr=0.05, **options), **gain)
    go_on(model, optimizer, steps)
    return model, optimizer


def go_on(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()


def test_asking_for_a_distributed_checkpoint_is_no_step() -> None:
    """torch takes one, with zero gradients and lr = 0, wherever a base has no state: SGD has none at any time."""
    model, optimizer = trained()
    before = snapshot(optimizer)
    get_optimizer_state_dict(model, optimizer)
    assert_untouched(optimizer, before)


def test_named_parameters_in_several_groups() -> None:
    one, other, third = (torch.nn.Linear(2, 2) for _ in range(3))
    base = torch.optim.SGD([{"params": one.named_parameters()}, {"params": other.named_parameters(), "lr": 0.2}])
    optimizer = Pullback(base, gain=0.1)
    optimizer.add_param_group({"params": third.named_parameters()})
    for p in (*one.parameters(), *third.parameters()):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state.keys() == {*one.parameters(), *third.parameters()}


BAD: dict[str, Any] = {
    "of SGD": lambda: trained()[1].state_dict(),
    "of plain SGD": lambda: trained(momentum=0.9)[1].base.state_dict(),
    "empty": lambda: {},
    "of a model": lambda: {"weight": torch.ones(2)},
    "groups that are none": lambda: {"state": {}, "param_groups": 5},
    "states that are none": lambda: {"state": [], "param_groups": []},
    "a state that is none": lambda: {"state": {0: 3}, "param_groups": [{"params": [0, 1]}]},
}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("what", BAD)
def test_a_checkpoint_of_something_else_changes_nothing(what: str, steps: int) -> None:
    model, optimizer = trained(torch.optim.AdamW, steps=steps)
    other, untouched = trained(torch.optim.AdamW, steps=steps)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"state|checkpoint|param_groups"):
        optimizer.load_state_dict(BAD[what]())
    assert_untouched(optimizer, before)
    go_on(model, optimizer, 2)
    go_on(other, untouched, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_no_dict_at_all() -> None:
    with pytest.raises(TypeError, match="state_dict must be a dict, got NoneType"):
        trained()[1].load_state_dict(None)


def test_loading_copies_the_base_too() -> None:
    _, optimizer = trained(torch.optim.AdamW)
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    model, other = trained(torch.optim.AdamW, steps=0)
    other.load_state_dict(saved)
    go_on(model, other, 2)
    for key, state in kept["state"].items():
        assert all(torch.equal(value, saved["state"][key][name]) for name, value in state.items())


def test_the_base_may_be_loaded_behind_its_back() -> None:
    """What the base loads has its averages with it; the bias correction is that of the steps that the base has then."""
    _, ahead = trained(torch.optim.AdamW, steps=5)
    model, optimizer = trained(torch.optim.AdamW, steps=2)
    optimizer.base.load_state_dict(copy.deepcopy(ahead.base.state_dict()))
    assert {state["pullback_step"].item() for state in optimizer.state.values()} == {5.0}
    alone = torch.optim.AdamW(model.parameters())
    go_on(model, alone, 3)
    optimizer.base.load_state_dict(copy.deepcopy(alone.state_dict()))
    assert not any("ema" in state for state in optimizer.state.values())
    go_on(model, optimizer, 1)
    assert {(s["step"].item(), s["pullback_step"].item()) for s in optimizer.state.values()} == {(4.0, 1.0)}


class Keeps(torch.optim.SGD):
    """It has a state of its own that is called as the average is."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["ema"] = torch.ones(())
        return super().step(closure)


def test_a_state_of_the_same_name_is_not_lost_in_silence() -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = Pullback(Keeps(model.parameters(), lr=0.1), gain=0.1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Keeps has a state 'ema': the average"):
            go_on(model, optimizer, 1)
    assert all(set(state) == {"ema"} for state in optimizer.state.values())


class Needs(torch.optim.SGD):
    def step(self, closure: Any) -> Any:
        return super().step(closure)


def test_a_base_that_needs_a_closure_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Needs\.step needs a closure"):
        Pullback(Needs([torch.nn.Parameter(torch.ones(2))], lr=0.1), gain=0.1)
