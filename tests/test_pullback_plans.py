"""Promise: a Pullback's step that takes up the plan of the last one is that step, to the bit; what changed ends it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_plans import (
    BAD,
    CHANGES,
    Pair,
    Two,
    assert_same_bits,
    everything,
    first,
    in_two_groups,
    other_memory,
    weights,
)

from pace_kernels import Pullback
from pace_kernels.plan import CAPTURED
from pace_kernels.pull_plan import PullPlan

BASES: dict[str, Callable[[Any], Pullback]] = {
    "AdamW, fused": lambda params: Pullback(torch.optim.AdamW(params, lr=0.01, fused=True), 3.0, log_stats=True),
    "Adam, from the step": lambda params: Pullback(torch.optim.Adam(params, lr=0.01), 3.0, pullback_from="step"),
    "SGD": lambda params: Pullback(torch.optim.SGD(params, lr=0.1), gain=0.25, ema_update_freq=2),
    "SGD, no pull": lambda params: Pullback(torch.optim.SGD(params, lr=0.1, momentum=0.9), gain=0.0),
    "RMSprop": lambda params: Pullback(torch.optim.RMSprop(params, lr=0.01), 3.0),
}
OF_THE_BASE = ("replace_state", "drop_an_entry")  # AdamW's first moment is no operand of the pull


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("make", [weights, in_two_groups])
def test_steps_by_plans_have_the_bits_of_others(base: str, make: Callable[[], Any]) -> None:
    pair = Pair(BASES[base], make)
    taken = [pair.step() for _ in range(8)]
    assert all(taken[4:])
    assert pair.optimizer.get_step_stats() == pair.twin.get_step_stats()


@pytest.mark.parametrize("base", ["AdamW, fused", "SGD"])
@pytest.mark.parametrize("change", [name for name in CHANGES if "dtype" not in name and name not in OF_THE_BASE])
def test_what_ends_a_plan(base: str, change: str) -> None:
    if base == "SGD" and change == "replace_step":
        pytest.skip("SGD keeps no such state")
    pair = Pair(BASES[base]).under_plan()
    pair.do(CHANGES[change])
    assert pair.step() is False
    for _ in range(3):
        pair.step()


def test_options_and_gradients_that_change() -> None:
    pair = Pair(BASES["AdamW, fused"], in_two_groups).under_plan()
    cycles = [torch.optim.lr_scheduler.OneCycleLR(o, 0.01, total_steps=40) for o in pair.both]
    for k in range(6):
        assert pair.step()
        for cycle in cycles:
            cycle.step()
        pair.do(lambda o, k=k: o.param_groups[0].update(weight_decay=0.01 * (1 + k)))
    pair.do(lambda o: o.param_groups[1].update(lambda_pullback=0.0))
    assert pair.step() is False
    pair.step(without=(1,))
    pair.step()
    pair.do(lambda o: o.param_groups[0].update(lr=-1.0))
    pair.gradients()
    for optimizer in pair.both:
        with pytest.raises(ValueError, match="lr"):
            optimizer.step()
    pair.do(lambda o: o.param_groups[0].update(lr=0.01))
    pair.step()
    pair.do(lambda o: o.eval())
    for optimizer in pair.both:
        with pytest.raises(RuntimeError, match="weights are swapped in"):
            optimizer.step()
    pair.do(lambda o: o.train())
    for _ in range(3):
        pair.step()


@pytest.mark.parametrize("base", BASES)
def test_what_schedulers_set_needs_no_look_by_python(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(BASES[base], lambda: [*in_two_groups(), {"params": weights([(2,)])}])
    for _ in range(5):
        pair.step(without=(4,))
    monkeypatch.setattr(PullPlan, "_looks_at", lambda *args: pytest.fail("Python looked"))
    for k in range(1, 5):
        for option, value in {"lr": 0.01 * k, "betas": (0.8, 0.9 + 0.01 * k), "weight_decay": 0.1 * k}.items():
            if option in pair.optimizer.param_groups[0]:
                pair.do(lambda o, it={option: value}: [group.update(it) for group in o.param_groups])
        assert pair.step(without=(4,))


def refusal(optimizer: Any) -> str:
    try:
        optimizer.step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("without", [(), (2, 3)], ids=["stepped", "without gradients"])
@pytest.mark.parametrize(
    "option, value",
    [*BAD, ("lambda_pullback", -1.0), ("gain", 2.0), ("ema_rho", None)],
    ids=lambda value: repr(value)[:20],
)
def test_a_bad_option_changes_nothing(option: str, value: Any, without: tuple[int, ...]) -> None:
    """What AdamW itself takes, such as a negative weight_decay, is its own affair; but plan or not, it is the same."""
    pair = Pair(BASES["AdamW, fused"], in_two_groups)
    for _ in range(5):
        pair.step(without=without)
    pair.do(lambda o: o.param_groups[0].update(lr=0.02))
    pair.do(lambda o: o.param_groups[1].update({option: value}))
    before = [t.clone() for t in everything(pair.optimizer)]
    pair.gradients(without)
    said = [refusal(optimizer) for optimizer in pair.both]
    assert said[0] == said[1]
    if option in ("lr", "lambda_pullback", "gain", "ema_rho"):
        assert option in said[0]
        assert all(map(torch.equal, before, everything(pair.optimizer)))
    assert_same_bits(*pair.both)


@pytest.mark.parametrize("base", ["AdamW, fused", "Adam, from the step"])
@pytest.mark.parametrize("value", [(0.9, 0.0), [0.8, 0.9], (torch.tensor(0.9), torch.tensor(0.99)), Two((0.8, 0.9))])
def test_betas_of_any_kind_hold_at_once_and_when_edited(base: str, value: Any) -> None:
    pair = Pair(BASES[base], in_two_groups).under_plan()
    before = pair.optimizer.param_groups[1]["betas"]
    pair.do(lambda o: o.param_groups[1].update(betas=copy.deepcopy(value)))
    if isinstance(value[0], torch.Tensor):
        pair.do(lambda o: o.param_groups[1].update(lr=torch.tensor(0.01)))
    for _ in range(3):
        pair.step()
        for betas in (o.param_groups[1]["betas"] for o in pair.both):
            if isinstance(betas, list):
                betas[1] -= 0.1
            elif isinstance(betas[1], torch.Tensor):
                betas[1].mul_(0.9)
    pair.do(lambda o: o.param_groups[1].update(betas=before))
    pair.step()
    pair.step()


def test_betas_that_are_tensors_may_be_edited_in_place() -> None:
    def build(params: Any) -> Pullback:
        betas = (torch.tensor(0.9), torch.tensor(0.99))
        return Pullback(torch.optim.AdamW(params, lr=0.01, betas=betas, foreach=False), 3.0)  # type: ignore[arg-type]

    pair = Pair(build).under_plan()
    pair.do(lambda o: o.param_groups[0]["betas"][1].fill_(0.5))
    for _ in range(2):
        assert pair.step()


def test_a_memory_that_went_is_refused_before_the_base_steps() -> None:
    pair = Pair(BASES["AdamW, fused"]).under_plan()
    pair.gradients()
    counts = [float(o.state[first(o)]["step"]) for o in pair.both]
    pair.do(lambda o: o.state[first(o)]["ema"].untyped_storage().resize_(0))
    for optimizer in pair.both:
        with pytest.raises(RuntimeError, match="more elements than memory"):
            optimizer.step()
    assert counts == [float(o.state[first(o)]["step"]) for o in pair.both]


def test_hooks_run_once_for_the_pullback_and_its_base() -> None:
    pair = Pair(BASES["AdamW, fused"]).under_plan()
    heard: list[str] = []
    pair.optimizer.register_step_post_hook(lambda o, args, kwargs: heard.append("pullback"))
    pair.optimizer.base.register_step_post_hook(lambda o, args, kwargs: heard.append("base"))
    assert pair.step()
    assert heard == ["base", "pullback"]


def step_once_more(o: Any) -> None:
    torch.optim.AdamW.step(o)


def fill_lr(o: Any) -> None:
    for group in o.param_groups:
        group["lr"] = group["lr"].mul_(0.5) if isinstance(group["lr"], torch.Tensor) else torch.tensor(0.01)


def states(o: Any) -> list[Any]:
    return [state for state in o.state.values() if "exp_avg_sq" in state]


# What a base may do in its step beside AdamW's.
MORE: dict[str, Callable[[Any], Any]] = {
    "set lr": lambda o: [group.update(lr=0.01 / o.taken) for group in o.param_groups],
    "fill lr": fill_lr,
    "set betas": lambda o: [group.update(betas=(0.9, 0.99 - 0.01 * o.taken)) for group in o.param_groups],
    "step once more": step_once_more,
    "begin anew": lambda o: [state["step"].zero_() for state in states(o)],
    "drop a gradient": lambda o: setattr(first(o), "grad", None),
    "freeze": lambda o: first(o).requires_grad_(False),
    "replace states": lambda o: [state.update(exp_avg_sq=state["exp_avg_sq"] * 2) for state in states(o)],
    "replace memory": other_memory,
}


class Odd(torch.optim.AdamW):
    def __init__(self, params: Any, more: str, behind: bool, every: int) -> None:
        super().__init__(params, lr=0.01)
        self.taken, self.more, self.behind, self.every = 0, MORE[more], behind, every

    def step(self, closure: Any = None) -> None:
        self.taken += 1
        steps = [super().step]
        if self.taken % self.every == 0:
            steps.insert(self.behind, lambda: self.more(self))
        for step in steps:
            step()


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("behind, every", [(False, 1), (True, 1), (False, 5), (True, 5)])
def test_bases_that_do_more_in_their_step(more: str, behind: bool, every: int) -> None:
    """The twin remembers nothing at all of its last step."""
    if (more, behind, every) == ("drop a gradient", False, 1):
        pytest.skip("AdamW makes no state of that parameter, which is refused")
    pair = Pair(lambda params: Pullback(Odd(params, more, behind, every), 3.0), in_two_groups)
    whole, remembered = pair.twin.step, pair.twin._scratch.plans
    pair.twin.step = lambda: (remembered.clear(), whole())[1]
    taken = []
    for k in range(14):
        if k % 5 == 4:  # as a scheduler does, also before the steps in which a base does more
            pair.do(lambda o, k=k: [group.update(lr=0.02, betas=(0.9, 0.99 - 0.01 * k)) for group in o.param_groups])
        taken.append(pair.step())
    if more in ("set lr", "replace memory"):
        assert all(taken[2:])
    assert every == 1 or any(taken)


def test_a_rate_that_a_base_sets_and_somebody_puts_back() -> None:
    """The same object as before: it says nothing of what the step in between pulled by."""
    pair = Pair(lambda params: Pullback(Odd(params, "set lr", False, 1), 3.0), in_two_groups).under_plan()
    lr = pair.optimizer.param_groups[0]["lr"]
    for _ in range(3):
        pair.do(lambda o: [group.update(lr=lr) for group in o.param_groups])
        pair.do(lambda o: setattr(o.base, "every", 2))
        assert pair.step()


def test_a_base_without_states_is_refused_by_name() -> None:
    base = torch.optim.AdamW(weights())
    base.step = lambda: None
    optimizer = Pullback(base)
    first(optimizer).grad = torch.ones(4, 5)
    with pytest.raises(RuntimeError, match="AdamW keeps no state 'exp_avg_sq' of a parameter, but none"):
        optimizer.step()


def test_a_captured_step_that_does_not_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pace_kernels.pulling.stream_of", lambda device: CAPTURED)
    optimizer = BASES["SGD"](weights())
    steps = [torch.zeros(())]
    pull = SimpleNamespace(group={}, device=torch.device("cuda", 0), steps=steps, found_inf=None)
    with pytest.raises(RuntimeError, match="only with capturable=True"):
        optimizer._place_steps(pull)
