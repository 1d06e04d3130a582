"""Promise: a step that takes up the plan of the last one is that step, to the bit; what changed ends the plan.

Each test steps an optimizer beside a twin that never plans, and compares all weights and states after every step.
"""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import threading
import weakref
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from pace_kernels import MADA, PACE, ScheduleFreeAdamW
from pace_kernels.plan import CAPTURED, _Options

SHAPES = [(3,), (4, 5), (), (2, 3, 4)]
BUILDS: dict[str, Callable[..., Any]] = {
    "PACE": PACE,
    "PACE, stats": partial(PACE, log_stats=True),
    "AdamW": partial(MADA.preset, "adamw"),
    "Lion": partial(MADA.preset, "lion"),
    "Adan": partial(MADA.preset, "adan"),
    "MADA": partial(MADA, hyper_warmup=0, hyper_lr=1e-2),
    "MADA, three learned": partial(MADA, learn=("beta1", "rho", "c"), beta3=0.0, hyper_warmup=0, hyper_lr=1e-2),
    "schedule-free": partial(ScheduleFreeAdamW, warmup_steps=5, r=0.5),
    "MADA by group": partial(MADA, coefficients="group", lambda_pullback=0.1, hyper_warmup=0, hyper_lr=1e-2),
}
SOME = ["PACE", "MADA"]


def weights(shapes: list[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def in_two_groups() -> list[dict[str, Any]]:
    params = weights()
    return [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "weight_decay": 0.0, "lr": 3e-3}]


def everything(optimizer: Any) -> list[torch.Tensor]:
    """The weights, states and learned coefficients, in order."""
    found = []
    for group in optimizer.param_groups:
        found += [value for value in group.values() if isinstance(value, torch.Tensor)]
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            found += [param, *(state[name] for name in sorted(state) if isinstance(state[name], torch.Tensor))]
    return [getattr(t, "_local_tensor", t).detach() for t in found]


def assert_same_bits(a: Any, b: Any) -> None:
    left, right = everything(a), everything(b)
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.dtype is other.dtype
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


class Pair:
    """An optimizer and its twin."""

    def __init__(self, build: Callable[..., Any], make: Callable[[], list[Any]] = weights) -> None:
        self.optimizer, self.twin = build(make()), build(make())
        self.twin._again = lambda *args: False
        self.both = (self.optimizer, self.twin)
        self.random = torch.Generator().manual_seed(1)

    def gradients(self, without: tuple[int, ...] = ()) -> None:
        pairs = zip(*([p for group in o.param_groups for p in group["params"]] for o in self.both), strict=True)
        for i, params in enumerate(pairs):
            grad = torch.randn(params[0].shape, generator=self.random)
            for param in params:
                param.grad = None if i in without else grad.to(param.dtype)

    def step(self, *, without: tuple[int, ...] = (), given: bool = False, **arguments: Any) -> bool:
        """Takes a step; whether by a plan. ``given``: gradients are there already."""
        if not given:
            self.gradients(without)
        with counted(self.optimizer) as taken:
            for optimizer in self.both:
                optimizer.step(**arguments)
        assert_same_bits(*self.both)
        return taken == [True]

    def under_plan(self) -> Pair:
        """Until steps are taken by plans: what alternates needs one more."""
        for _ in range(4):
            self.step()
        assert self.step()
        return self

    def do(self, change: Callable[[Any], Any]) -> None:
        for optimizer in self.both:
            change(optimizer)

    def refuses(self, message: str, kind: type[Exception] | tuple[type[Exception], ...] = RuntimeError) -> None:
        """The step raises the same sentence with a plan and without, and changes nothing."""
        before = [t.clone() for t in everything(self.optimizer)]
        said = []
        for optimizer in self.both:
            with pytest.raises(kind, match=message) as error:
                optimizer.step()
            said.append(str(error.value))
        assert said[0] == said[1]
        for one, other in zip(before, everything(self.optimizer), strict=True):
            assert torch.equal(one, other)


@contextmanager
def counted(optimizer: Any) -> Iterator[list[bool]]:
    """Of each step, whether it was taken by a plan."""
    taken: list[bool] = []
    again = optimizer._again

    def spied(*args: Any) -> bool:
        taken.append(again(*args))
        return taken[-1]

    optimizer._again = spied
    try:
        yield taken
    finally:
        del optimizer._again


def first(optimizer: Any) -> nn.Parameter:
    param: nn.Parameter = optimizer.param_groups[0]["params"][1]
    return param


# ---- the usual step is the oracle ----


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("make", [weights, in_two_groups, partial(weights, dtype=torch.bfloat16)])
def test_steps_by_plans_have_the_bits_of_others(name: str, make: Callable[[], Any]) -> None:
    pair = Pair(BUILDS[name], make)
    taken = [pair.step() for _ in range(12)]
    assert all(taken[4:])


def test_states_of_two_dtypes_and_an_order_of_their_own() -> None:
    def mixed() -> list[nn.Parameter]:
        one, other = weights(), weights(dtype=torch.bfloat16)
        return [p for two in zip(one, other, strict=True) for p in two]

    pair = Pair(PACE, mixed).under_plan()
    assert pair.step(without=(0, 3)) is False
    assert pair.step(without=(0, 3))


def test_parameters_that_are_equal_are_not_the_same() -> None:
    pair = Pair(PACE, lambda: [nn.Parameter(torch.ones(())) for _ in range(3)]).under_plan()
    pair.do(lambda o: o.param_groups[0]["params"].__setitem__(1, nn.Parameter(o.param_groups[0]["params"][0].clone())))
    assert pair.step() is False
    assert pair.step()


# ---- what ends a plan ----


def replace_param(o: Any) -> None:
    o.param_groups[0]["params"][1] = nn.Parameter(torch.ones(4, 5))


def reverse_params(o: Any) -> None:
    o.param_groups[0]["params"].reverse()


def replace_state(o: Any) -> None:
    state = o.state[first(o)]
    name = next(name for name in state if name.startswith("exp_avg"))
    state[name] = state[name] * 2


def replace_step(o: Any) -> None:
    o.state[first(o)]["step"] = torch.tensor(40.0)


def replace_state_dict(o: Any) -> None:
    o.state[first(o)] = copy.deepcopy(dict(o.state[first(o)]))


def drop_state(o: Any) -> None:
    del o.state[first(o)]


def drop_an_entry(o: Any) -> None:
    state = o.state[first(o)]
    del state[next(name for name in state if name.startswith("exp_avg"))]


def clear_states(o: Any) -> None:
    o.state.clear()


def other_memory(o: Any) -> None:
    first(o).data = first(o).data.clone()


def other_strides(o: Any) -> None:
    first(o).data = first(o).data.t().contiguous().t()


def other_dtype(o: Any) -> None:
    first(o).data = first(o).data.bfloat16()


def states_in_other_memory(o: Any) -> None:
    for state in o.state.values():
        for value in state.values():
            value.data = value.data.clone()


def other_state_dtype(o: Any) -> None:
    first(o).data = first(o).data.double()


def freeze_one(o: Any) -> None:
    first(o).requires_grad_(False)


CHANGES = {
    function.__name__: function
    for function in (
        *(replace_param, reverse_params, replace_state, replace_step, replace_state_dict, drop_state, drop_an_entry),
        *(
            clear_states,
            other_memory,
            other_strides,
            other_dtype,
            states_in_other_memory,
            other_state_dtype,
            freeze_one,
        ),
    )
}


@pytest.mark.parametrize("name", [*SOME, "Lion"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_ends_a_plan(name: str, change: str) -> None:
    pair = Pair(BUILDS[name]).under_plan()
    pair.do(CHANGES[change])
    assert pair.step() is False
    for _ in range(3):
        pair.step()
    if change != "other_state_dtype" and change != "freeze_one":  # float64 has no native kernel
        assert pair.step()


OPTIONS: dict[str, Any] = {
    "betas": (0.0, 0.99),
    "eps": 1e-3,
    "lambda_pullback": 0.0,
    "ema_update_freq": 2,
    "maximize": True,
    "capturable": True,
    "skip_nonfinite": True,
    "log_stats": True,
    "ema_kappa": None,
    "lr": torch.tensor(0.1),
    "weight_decay": 0,
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_are_replaced_hold_at_once(option: str) -> None:
    pair = Pair(PACE, in_two_groups).under_plan()
    before = pair.optimizer.param_groups[1][option]
    pair.do(lambda o: o.param_groups[1].update({option: OPTIONS[option]}))
    pair.step()
    pair.step()
    pair.do(lambda o: o.param_groups[1].update({option: before}))
    for _ in range(3):
        pair.step()


@pytest.mark.parametrize("name", [*BUILDS])
def test_schedules_keep_the_plan(name: str) -> None:
    """OneCycleLR replaces lr and betas at each step."""
    pair = Pair(BUILDS[name], in_two_groups)
    cycles = [
        torch.optim.lr_scheduler.OneCycleLR(
            *(optimizer, 0.01), total_steps=40, cycle_momentum=not optimizer.param_groups[0].get("learn")
        )
        for optimizer in pair.both
    ]
    taken = []
    for k in range(20):
        taken.append(pair.step())
        for cycle in cycles:
            cycle.step()
        pair.do(lambda o, k=k: o.param_groups[0].update(weight_decay=0.01 * (1 + k)))
    assert all(taken[5:])


def test_a_tensor_lr_and_lists_are_read_at_each_step() -> None:
    pair = Pair(lambda params: PACE(params, lr=torch.tensor(0.1), betas=[0.9, 0.99])).under_plan()
    for k in range(3):
        pair.do(lambda o, k=k: o.param_groups[0]["lr"].fill_(0.1 * k))
        assert pair.step()
    betas = [0.8, 0.9]
    pair.do(lambda o: o.param_groups[0].update(betas=betas))
    pair.step()
    pair.step()
    betas[0] = 0.5
    pair.step()
    pair.step()
    betas[0] = 0.0
    pair.step()


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("by_mask", [False, True])
def test_options_that_come_back_to_what_they_were(name: str, by_mask: bool) -> None:
    """A plan takes other options, which no usual step sees; a usual step has the old objects again."""
    pair = Pair(BUILDS[name], in_two_groups).under_plan()
    if by_mask:
        for _ in range(4):
            pair.step(without=(0,))
    before = {id(g): (g["weight_decay"], g["betas"]) for o in pair.both for g in o.param_groups}
    pair.do(lambda o: [g.update(weight_decay=0.7, betas=(0.5, 0.6)) for g in o.param_groups])
    pair.step()
    pair.do(lambda o: [g.update(zip(("weight_decay", "betas"), before[id(g)], strict=True)) for g in o.param_groups])
    if by_mask:
        pair.step(without=(0,))
    pair.do(replace_state_dict)
    assert pair.step() is False
    pair.step()


def test_a_learning_rate_on_a_device_ends_the_plan_that_holds_it() -> None:
    group = {"params": [], "lr": torch.ones((), device="meta"), "eps": 1e-8}
    kept = _Options(group)
    assert kept.changed() == []
    group["lr"] = 0.1
    assert kept.changed() is None


@pytest.mark.parametrize("name", BUILDS)
def test_what_schedulers_set_needs_no_look_by_python(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a group that is stepped in several calls, and in one without gradients."""

    def in_three_groups() -> list[dict[str, Any]]:
        groups = in_two_groups()
        mixed = groups[0]["params"] + weights([(6,)], torch.bfloat16)
        return [{**groups[0], "params": mixed, "tag": 0.0}, groups[1], {"params": weights([(2,)])}]

    pair = Pair(BUILDS[name], in_three_groups)
    for _ in range(9):
        pair.step(without=(5,))
    monkeypatch.setattr(_Options, "changed", lambda self: pytest.fail("Python looked"))
    for k in range(1, 5):
        for i in range(3):
            new = {"lr": 0.01 * k, "betas": (0.9 - 0.1 * k, 0.9 + 0.01 * k), "weight_decay": 0.1 * k}
            pair.do(lambda o, i=i, new=new: o.param_groups[i].update(dict(list(new.items())[i:])))
        pair.do(lambda o, k=k: o.param_groups[0].update(tag=-float(k)))
        assert pair.step(without=(5,))


class Float(float):
    """A number of another library, as NumPy's float64 is."""


class Two(tuple[float, ...]):
    pass


HUGE = 10**400
BAD_NUMBERS = [-1.0, float("nan"), float("inf"), HUGE, -1, None, "1", True, 1j, torch.ones(2), torch.tensor(-1.0)]
BAD: list[tuple[str, Any]] = [
    *(("lr", value) for value in BAD_NUMBERS),
    *(("weight_decay", value) for value in BAD_NUMBERS[:-1]),  # a tensor would become a number first
    *(("betas", (0.9, value)) for value in [1.0, *BAD_NUMBERS]),
    *(("betas", (value, 0.9)) for value in [1.0, *BAD_NUMBERS]),
    *(("betas", value) for value in [(0.9,), (0.9, 0.9, 0.9), 0.9, None, [0.9, 1.0], Two((0.9, 1.0))]),
    *(("eps", value) for value in [0.0, float("nan"), None]),
]


@pytest.mark.parametrize("without", [(), (2, 3)], ids=["stepped", "without gradients"])
@pytest.mark.parametrize("name", [*SOME, "Lion", "schedule-free"])
def test_a_bad_option_is_refused_by_name_and_changes_nothing(name: str, without: tuple[int, ...]) -> None:
    def build(params: Any) -> Any:
        return MADA(params, learn=("rho",)) if name == "MADA" else BUILDS[name](params)

    pair = Pair(build, in_two_groups)
    for k, (option, value) in enumerate(BAD):
        for _ in range(5):
            taken = pair.step(without=without)
        assert taken
        before = pair.optimizer.param_groups[1][option]
        pair.do(lambda o, k=k: o.param_groups[0].update(lr=0.001 * (k + 1)))
        pair.do(lambda o, option=option, value=value: o.param_groups[1].update({option: value}))
        pair.gradients(without)
        pair.refuses(r"^\(?'?(betas|weight_decay|lr|eps)", (TypeError, ValueError))
        pair.do(lambda o, option=option, before=before: o.param_groups[1].update({option: before}))
        pair.step(without=without)


GOOD: list[tuple[str, Any]] = [
    *(("lr", value) for value in (Float(0.02), 0, 1, 10**100, 1e100, torch.tensor(0.02), torch.tensor([2]))),
    *(("weight_decay", value) for value in (Float(0.02), 0, 1, -0.0, torch.tensor(0.02))),
    *(("betas", value) for value in ([0.8, 0.9], Two((0.8, 0.9)), (Float(0.8), 0.9), (0.5, 0), (0.5, -0.0))),
    *(("betas", value) for value in ((0.0, 0.9), (0, 0.9), (torch.tensor(0.5), 0.9))),
    *(("tag", value) for value in (0.5, float("nan"), HUGE, "x", [1.0], torch.ones(2))),
]


@pytest.mark.parametrize("name", [*SOME, "Lion", "schedule-free"])
def test_numbers_of_any_kind_hold_at_once_and_when_edited(name: str) -> None:
    pair = Pair(BUILDS[name], in_two_groups)
    for option, value in GOOD:
        if name == "schedule-free" and option == "betas" and float(value[0]) == 0.0:
            continue
        for _ in range(5):
            pair.step()
        before = pair.optimizer.param_groups[1].get(option, 0.0)
        pair.do(lambda o, option=option, value=value: o.param_groups[1].update({option: copy.deepcopy(value)}))
        pair.step()
        pair.step()
        for group in (o.param_groups[1] for o in pair.both):
            if isinstance(group[option], torch.Tensor):
                group[option].fill_(1)
            elif isinstance(group[option], list):
                group[option][0] = 0.25
        pair.step()
        pair.do(lambda o, option=option, before=before: o.param_groups[1].update({option: before}))
        pair.step()
        pair.step()
    pair.under_plan()


@pytest.mark.parametrize("name", [*SOME, "schedule-free"])
@pytest.mark.parametrize("option", ["lr", "betas", "weight_decay", "tag"])
@pytest.mark.parametrize("renamed", [False, True])
def test_options_that_are_gone(name: str, option: str, renamed: bool) -> None:
    """Renamed, another one is in its place, the last of the dict."""
    pair = Pair(BUILDS[name], in_two_groups)
    pair.do(lambda o: o.param_groups[1].update(tag=0.5))
    pair.do(lambda o: o.param_groups[1].update({option: o.param_groups[1].pop(option)}))
    pair.under_plan()
    pair.do(lambda o: o.param_groups[1].pop(option))
    if renamed:
        pair.do(lambda o: o.param_groups[1].update(other=(0.5, 0.6) if option == "betas" else 0.25))
    if option == "tag":
        pair.step()
        assert pair.step()
    else:
        pair.gradients()
        pair.refuses(option, (KeyError, ValueError, RuntimeError))


@pytest.mark.parametrize("name", [*SOME, "schedule-free"])
def test_options_taken_before_another_group_does_not_fit(name: str) -> None:
    """The step is refused, and the next time that group is again as it was."""
    pair = Pair(BUILDS[name], in_two_groups).under_plan()
    eps = pair.optimizer.param_groups[1]["eps"]
    pair.do(lambda o: o.param_groups[0].update(lr=0.5))
    gone = [o.param_groups[1]["params"].pop() for o in pair.both]
    pair.do(lambda o: o.param_groups[1].update(eps=0.0))
    pair.gradients()
    pair.refuses("eps", ValueError)
    pair.do(lambda o: o.param_groups[1].update(eps=eps))
    for optimizer, param in zip(pair.both, gone, strict=True):
        optimizer.param_groups[1]["params"].append(param)
    pair.step()
    pair.under_plan()


@pytest.mark.parametrize("name", SOME)
def test_options_of_a_plan_that_did_not_step(name: str) -> None:
    """It took them, and then found other gradients; the next time the old objects are back."""
    pair = Pair(BUILDS[name], in_two_groups).under_plan()
    before = [(group, dict(group)) for o in pair.both for group in o.param_groups]
    for new in ({"lr": 0.02}, {"weight_decay": 0.7}, {"betas": (0.5, 0.6)}, {"lr": torch.tensor(0.02)}):
        pair.do(lambda o, new=new: [group.update(new) for group in o.param_groups])
        pair.step(without=(0,))
        for group, values in before:
            group.update({option: values[option] for option in new})
        for _ in range(3):
            pair.step()


@pytest.mark.parametrize("name", SOME)
def test_gradients_that_come_and_go_have_plans_of_their_own(name: str) -> None:
    pair = Pair(BUILDS[name])
    sets: list[tuple[int, ...]] = [(), (1,), (0, 2)]
    for _ in range(4):
        for without in sets:
            pair.step(without=without)
    if name == "PACE":  # where gradients change places, plans of other sets are of other places
        assert all(pair.step(without=without) for without in 2 * sets)
    pair.gradients((0, 1, 2, 3))
    pair.step(given=True)


@pytest.mark.parametrize("name", SOME)
def test_strided_gradients(name: str) -> None:
    pair = Pair(BUILDS[name]).under_plan()
    pair.gradients()
    strided = torch.randn(5, 4).t()
    pair.do(lambda o: setattr(first(o), "grad", strided))
    pair.step(given=True)
    assert pair.step()


@pytest.mark.parametrize("name", SOME)
def test_what_a_step_refuses_is_said_as_ever(name: str) -> None:
    pair = Pair(BUILDS[name]).under_plan()
    pair.gradients()
    pair.do(lambda o: first(o).untyped_storage().resize_(0))
    said = []
    for optimizer in pair.both:
        with pytest.raises(RuntimeError, match="more elements than memory") as error:
            optimizer.step()
        said.append(str(error.value))
    assert said[0] == said[1]


def test_a_gradient_that_does_not_fit_is_named() -> None:
    pair = Pair(PACE).under_plan()
    pair.gradients()
    pair.do(lambda o: setattr(first(o), "grad", torch.ones(4, 5).to_sparse()))
    pair.refuses(r"the gradient of param_groups\[0\]\['params'\]\[1\] is torch.sparse_coo")
    pair.step()
    assert pair.step()


def test_a_count_that_ends_in_float32_goes_on() -> None:
    pair = Pair(PACE).under_plan()
    pair.do(lambda o: o.state[first(o)]["step"].fill_(2.0**24 - 2))
    for _ in range(5):
        pair.step()
    assert pair.optimizer.state[first(pair.optimizer)]["step"].dtype is torch.float64
    assert pair.optimizer.state[first(pair.optimizer)]["step"] == 2**24 + 3
    assert pair.step()


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_plan_for_themselves(name: str, copied: Callable[[Any], Any]) -> None:
    pair = Pair(BUILDS[name]).under_plan()
    twin_of = copied(pair.optimizer)
    pair.step()
    if copied is copy.copy:  # shares its parameters: it goes on with them
        return
    twin_of._again = lambda *args: False
    for param in (p for group in twin_of.param_groups for p in group["params"]):
        param.grad = torch.ones_like(param)
    twin_of.step()
    pair.step()


@pytest.mark.parametrize("name", SOME)
def test_loaded_states_are_stepped_and_old_ones_are_gone(name: str) -> None:
    pair = Pair(BUILDS[name]).under_plan()
    saved = copy.deepcopy(pair.optimizer.state_dict())
    pair.step()
    gc.disable()
    try:
        old = [weakref.ref(value) for state in pair.optimizer.state.values() for value in state.values()]
        pair.do(lambda o: o.load_state_dict(copy.deepcopy(saved)))
        gone = [ref() is None for ref in old]
    finally:
        gc.enable()
    assert all(gone)
    assert pair.step() is False
    for _ in range(3):
        pair.step()
    assert pair.step()


@pytest.mark.parametrize("name", SOME)
def test_groups_that_share_a_step_count(name: str) -> None:
    """Each group moves it on, and a plan reads the counts of all groups before the first one steps."""
    pair = Pair(BUILDS[name], in_two_groups).under_plan()
    pair.do(lambda o: [state.update(step=next(iter(o.state.values()))["step"]) for state in o.state.values()])
    assert not any(pair.step() for _ in range(4))


def test_states_that_are_no_dicts() -> None:
    pair = Pair(PACE).under_plan()
    pair.do(lambda o: o.state.update({first(o): UserDict(o.state[first(o)])}))
    assert not any(pair.step() for _ in range(3))
    pair.do(lambda o: o.state.update({first(o): OrderedDict(o.state[first(o)])}))
    pair.step()
    assert pair.step()


@pytest.mark.parametrize("name", ["PACE", "MADA by group"])
def test_averages_that_are_swapped_in_and_out(name: str) -> None:
    pair = Pair(partial(BUILDS[name], use_ema_eval=True)).under_plan()
    pair.do(lambda o: o.eval())
    pair.refuses("weights are swapped in")
    pair.do(lambda o: o.train())
    for _ in range(4):
        pair.step()
    assert pair.step()


@pytest.mark.parametrize("name", SOME)
def test_groups_that_are_added(name: str) -> None:
    pair = Pair(BUILDS[name]).under_plan()
    pair.do(lambda o: o.add_param_group({"params": [nn.Parameter(torch.ones(3))], "weight_decay": 0.5}))
    assert pair.step() is False
    for _ in range(3):
        pair.step()
    assert pair.step()
    pair.do(lambda o: o.param_groups.pop())
    pair.step()


@pytest.mark.parametrize("name", ["coefficient_values", "coefficient_momenta", "hyper_step"])
def test_learned_tensors_that_are_replaced(name: str) -> None:
    pair = Pair(BUILDS["MADA"]).under_plan()
    pair.do(lambda o: o.param_groups[0].update({name: o.param_groups[0][name] * 0.5}))
    assert pair.step() is False
    before = [o.param_groups[0][name] for o in pair.both]
    pair.do(lambda o: o.param_groups[0].update({name: 0.5}))
    pair.gradients()
    pair.refuses(f"{name} must be a contiguous float64 tensor", ValueError)
    for o, value in zip(pair.both, before, strict=True):
        o.param_groups[0][name] = value
    pair.do(lambda o: o.param_groups[0]["coefficient_values"].mul_(0.9))
    assert [pair.step() for _ in range(4)][-1]


def test_frozen_coefficients() -> None:
    pair = Pair(BUILDS["MADA"]).under_plan()
    pair.do(lambda o: o.freeze())
    for _ in range(3):
        pair.step()
    assert pair.step()


def test_a_parameter_that_comes_to_rest_loses_its_average() -> None:
    pair = Pair(PACE).under_plan()
    pair.do(lambda o: first(o).requires_grad_(False))
    pair.step(without=(1,))
    assert "ema" not in pair.optimizer.state[first(pair.optimizer)]
    pair.step(without=(1,))
    pair.do(lambda o: first(o).requires_grad_(True))
    pair.step()
    pair.step()


# ---- what goes on with one ----


def test_hooks_and_a_profilers_range() -> None:
    pair = Pair(PACE).under_plan()
    heard: list[Any] = []

    def hook(kind: str) -> Callable[..., None]:
        return lambda o, args, kwargs: heard.append((kind, o is pair.optimizer, args[1:], kwargs))

    handles = [
        pair.optimizer.register_step_pre_hook(hook("pre")),
        pair.optimizer.register_step_post_hook(hook("post")),
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
    ]
    try:
        assert pair.step()
    finally:
        for handle in handles:
            handle.remove()
    own = [kind for kind, its, *_ in heard if its]
    assert own == ["global pre", "pre", "post", "global post"]
    assert all(rest == ((), {}) for _, _, *two in heard for rest in [tuple(two)])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        pair.step()
    ranges = [event.name for event in profile.events() if event.name.startswith("Optimizer.step")]
    assert ranges == ["Optimizer.step#PACE.step"] * 2
    heard.clear()
    assert pair.step()
    assert not heard


def test_hooks_of_classes_that_step_in_their_own_way_run_once() -> None:
    class Own(PACE):
        def step(self, closure: Any = None, **given: Any) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            return super().step(closure, **given)

    pair = Pair(Own).under_plan()
    heard: list[int] = []
    pair.optimizer.register_step_post_hook(lambda *_: heard.append(1))
    assert pair.step()
    assert heard == [1]
    assert pair.optimizer.calls == 6


def test_a_hook_that_replaces_arguments_is_heard() -> None:
    pair = Pair(PACE).under_plan()
    pair.do(lambda o: o.register_step_pre_hook(lambda o, args, kwargs: (args, {**kwargs, "clip_coef": 0.5})))
    assert pair.step()
    assert pair.step(clip_coef=0.25)


def test_a_gradient_scale_that_a_class_has() -> None:
    pair = Pair(type("Scaled", (PACE,), {"grad_scale": property(lambda o: torch.tensor(o.scale)), "scale": 1.0}))
    pair.under_plan().do(lambda o: setattr(o, "scale", 8.0))
    assert pair.step()


@pytest.mark.parametrize("name", SOME)
def test_gradient_scalers_clipping_and_closures(name: str) -> None:
    pair = Pair(partial(BUILDS[name], fused=True)).under_plan()
    for found in (0.0, 1.0, 0.0):

        def scaled(o: Any, found: float = found) -> None:
            o.grad_scale, o.found_inf = torch.tensor(4.0), torch.tensor(found)

        pair.do(scaled)
        steps = float(pair.optimizer.state[first(pair.optimizer)]["step"])
        pair.step()
        assert float(pair.optimizer.state[first(pair.optimizer)]["step"]) == steps + (found == 0.0)
    pair.do(lambda o: (delattr(o, "grad_scale"), delattr(o, "found_inf")))
    assert pair.step() or pair.step() or pair.step()
    pair.step(clip_coef=0.5)
    pair.step(clip_coef=torch.tensor([0.25], dtype=torch.float64))
    pair.gradients()
    for optimizer in pair.both:
        with pytest.raises((ValueError, TypeError), match="clip_coef"):
            optimizer.step(clip_coef=-1.0)
    pair.step()
    graph: list[bool] = []

    def closure() -> float:
        graph.append(torch.is_grad_enabled())
        return 3.0

    pair.gradients()
    assert [o.step(closure) for o in pair.both] == [3.0, 3.0]
    assert graph == [True, True]
    assert_same_bits(*pair.both)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(3):
        pair.gradients()
        params = [p for group in pair.optimizer.param_groups for p in group["params"]]
        scaler.scale(sum(p.square().sum() for p in params)).backward()
        scaler.step(pair.optimizer)
        scaler.update()


@pytest.mark.parametrize("name", ["PACE", "MADA by group", "schedule-free"])
def test_a_layer_that_is_frozen_again_and_again(name: str) -> None:
    """A plan of the first freezing knows nothing of the average that the layer got since."""
    pair = Pair(BUILDS[name])

    def frozen(yes: bool) -> None:
        for optimizer in pair.both:
            for param in optimizer.param_groups[0]["params"][:2]:
                param.requires_grad_(not yes)

    for _ in range(3):
        for yes, steps in ((False, 3), (True, 3)):
            frozen(yes)
            for _ in range(steps):
                pair.step(without=(0, 1) if yes else ())


@pytest.mark.parametrize("name", SOME)
def test_steps_with_skip_nonfinite(name: str) -> None:
    pair = Pair(partial(BUILDS[name], skip_nonfinite=True))
    for k in range(8):
        pair.gradients()
        if k == 5:
            pair.do(lambda o: first(o).grad.fill_(float("nan")))
        pair.step(given=True)
    assert pair.optimizer.skipped_steps == 1


def test_statistics_are_those_of_the_last_step() -> None:
    pair = Pair(BUILDS["PACE, stats"], in_two_groups).under_plan()
    for _ in range(3):
        assert pair.step()
        assert pair.optimizer.get_step_stats() == pair.twin.get_step_stats() != {}


def test_versions_of_weights_count() -> None:
    pair = Pair(PACE).under_plan()
    before = first(pair.optimizer)._version
    assert pair.step()
    assert first(pair.optimizer)._version > before
    weight = nn.Parameter(torch.ones(3))
    optimizer = PACE([weight])
    for _ in range(4):
        weight.grad = torch.ones(3)
        loss = (weight * weight).sum()
        optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_threads_and_grad_modes() -> None:
    pair = Pair(MADA).under_plan()
    taken = []
    thread = threading.Thread(target=lambda: taken.append(pair.step()))
    thread.start()
    thread.join()
    assert taken == [True]
    with torch.no_grad():
        assert pair.step()
    with torch.inference_mode():
        pair.step()
    pair.step()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("name", [*SOME, "schedule-free"])
def test_a_default_device_changes_nothing(name: str) -> None:
    def make() -> list[dict[str, Any]]:
        between = torch.ones(3, 4).split(2, 1)  # whose elements are counted
        return [*in_two_groups(), {"params": list(map(nn.Parameter, between))}]

    pair = Pair(partial(BUILDS[name], skip_nonfinite=name == "PACE"), make)
    pair.gradients()
    for _ in range(4):
        with torch.device("meta"):
            pair.do(lambda o: o.step(clip_coef=0.5))
        assert_same_bits(*pair.both)


def test_an_optimizer_without_a_hash() -> None:
    Pair(type("Equal", (PACE,), {"__eq__": lambda a, b: a is b, "__hash__": None})).under_plan()


def test_a_fork_steps_for_itself() -> None:
    pair = Pair(PACE).under_plan()
    pair.gradients()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            pair.optimizer.step()
            pair.twin.step()
            assert_same_bits(*pair.both)
            os.write(write, b"same")
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read, "rb") as said:
        assert said.read() == b"same"
    pair.step(given=True)


def test_wrappers_that_copy_attributes_share_what_there_is() -> None:
    """As Lightning's optimizers do."""

    def wrapped(o: Any) -> Any:
        class Wrapper(type(o)):
            def __init__(self) -> None:
                self.__dict__.update(o.__dict__)

        return Wrapper()

    pair = Pair(MADA).under_plan()
    others = [wrapped(o) for o in pair.both]
    for k in range(8):
        pair.gradients()
        for optimizer in others if k % 3 else pair.both:
            optimizer.step()
        assert_same_bits(*pair.both)


@pytest.mark.slow
def test_compiled_steps() -> None:
    pair = Pair(PACE).under_plan()
    pair.gradients()
    torch.compile(pair.optimizer.step)()
    pair.twin.step()
    assert_same_bits(*pair.both)
    pair.step()


def test_under_a_dispatch_mode_operators_are_seen() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    pair = Pair(PACE).under_plan()
    pair.gradients()
    with Watch():
        pair.optimizer.step()
    assert any("pace_step_" in name for name in seen)
    pair.twin.step()
    assert_same_bits(*pair.both)


# ---- what a plan holds ----


@pytest.mark.parametrize("name", SOME)
def test_a_plan_goes_with_its_optimizer(name: str) -> None:
    pair = Pair(BUILDS[name]).under_plan()
    optimizer = pair.optimizer
    refs = [weakref.ref(t) for t in (first(optimizer), *optimizer.state[first(optimizer)].values())]
    gc.collect()
    gc.disable()
    try:
        del optimizer, pair
        gone = [ref() is None for ref in refs]
    finally:
        gc.enable()
    assert all(gone)


@pytest.mark.parametrize("name", SOME)
def test_what_was_replaced_is_free_after_the_next_step(name: str) -> None:
    pair = Pair(BUILDS[name]).under_plan()
    optimizer = pair.optimizer
    refs = [weakref.ref(t) for t in (first(optimizer), *optimizer.state[first(optimizer)].values())]
    memory = first(optimizer).untyped_storage()
    old = weakref.ref(memory) if hasattr(memory, "__weakref__") else None
    del memory

    def forget(o: Any) -> None:
        del o.state[first(o)]
        replace_param(o)

    gc.collect()
    gc.disable()
    try:
        pair.do(forget)
        pair.step()
        gone = [ref() is None for ref in refs]
    finally:
        gc.enable()
    assert all(gone)
    assert old is None or old() is None


@pytest.mark.parametrize("name", SOME)
def test_a_full_collection_frees_what_was_let_go(name: str) -> None:
    """Where no step follows that would find out: states that are put away, or a group that is taken out."""
    pair = Pair(BUILDS[name], in_two_groups).under_plan()
    optimizer = pair.optimizer
    refs = [weakref.ref(t) for param, state in optimizer.state.items() for t in (param, *state.values())]
    gc.collect()
    assert pair.step()
    optimizer.state.clear()
    del optimizer.param_groups[1]
    gc.collect()
    kept = {id(param) for param in optimizer.param_groups[0]["params"]}
    assert all(ref() is None or id(ref()) in kept for ref in refs)


def test_wrappers_that_copy_attributes_hold_no_plan_of_their_own() -> None:
    pair = Pair(PACE).under_plan()
    copied = dict(pair.optimizer.__dict__)
    pair.do(drop_state)
    pair.step()
    assert copied["_plans"] is pair.optimizer._plans


def test_gradients_are_not_held() -> None:
    pair = Pair(PACE).under_plan()
    ref = weakref.ref(first(pair.optimizer).grad)
    gc.collect()
    gc.disable()
    try:
        pair.do(lambda o: o.zero_grad())
        gone = ref() is None
    finally:
        gc.enable()
    assert gone


def test_a_checkpoint_has_nothing_of_a_plan() -> None:
    pair = Pair(MADA).under_plan()
    buffer = io.BytesIO()
    torch.save(pair.optimizer.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert loaded["param_groups"][0].keys() == pair.twin.state_dict()["param_groups"][0].keys()


# ---- streams, which a CPU has not ----


@pytest.mark.parametrize("name", SOME)
def test_a_plan_stays_on_the_stream_that_it_was_made_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(BUILDS[name]).under_plan()
    for now, capturing, taken in ((7, False, True), (8, False, False), (7, True, False), (7, False, True)):
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index, now=now: now, raising=False)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda its=capturing: its)
        for plan in filter(None, (pair.optimizer._plans.next, pair.optimizer._plans.next.after)):
            plan.device, plan.on_gpu, plan.stream = torch.device("cuda", 0), True, 7
        assert pair.step() is taken
    monkeypatch.setattr("pace_kernels.planning.stream_of", lambda device: CAPTURED)
    pair = Pair(BUILDS[name])
    assert not any(pair.step() for _ in range(3))


# ---- DTensors ----


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PACE", "AdamW", "MADA"])
def test_sharded_parameters(mesh: Any, name: str) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def make() -> list[nn.Parameter]:
        return [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in weights([(3,), (4, 5)])]

    pair = Pair(BUILDS[name], make)

    def step(placement: Any = None) -> bool:
        for i, params in enumerate(zip(*(o.param_groups[0]["params"] for o in pair.both), strict=True)):
            grad = torch.randn(params[0].shape, generator=pair.random)
            for param in params:
                place = placement if placement is not None and i == 1 else Shard(0)
                param.grad = distribute_tensor(grad, mesh, [place])
        return pair.step(given=True)

    taken = [step() for _ in range(6)]
    assert taken[-1]
    step(Replicate())
    step()

    def other_local(o: Any) -> None:
        param = o.param_groups[0]["params"][0]
        param._local_tensor = param._local_tensor.clone()

    def other_local_state(o: Any) -> None:
        for state in o.state.values():
            name = next(name for name in state if name.startswith("exp_avg"))
            state[name]._local_tensor = state[name]._local_tensor * 2

    for change in (other_local, other_local_state):
        with torch.no_grad():
            pair.do(change)
        assert step() is False
        assert [step() for _ in range(3)][-1]
