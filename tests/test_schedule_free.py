"""Promise: ScheduleFreeAdamW is the paper's algorithm and the package's optimizer, in numbers, use and checkpoints."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import schedulefree
import torch
from torch import Tensor

from pace_kernels import PACE, ScheduleFreeAdamW, backends, schedule_free
from pace_kernels.torch_rules.schedule_free import Schedule, advanced, schedule_free_average

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "weight decay": {"weight_decay": 0.1},
    "warm-up": {"warmup_steps": 30},
    "late steps weigh more": {"r": 1.0},
    "equal weights": {"weight_lr_power": 0.0},
    "no memory of squares": {"betas": (0.9, 0.0)},
    "everything": {"lr": 0.1, "betas": (0.98, 0.95), "eps": 1e-3, "weight_decay": 0.3}
    | {"warmup_steps": 11, "r": 0.5, "weight_lr_power": 1.3},
}
SHAPES = [(7, 5), (3,), (), (0, 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NATIVE = [name for name, row in backends().items() if row.available and name != "torch"]
every_case = pytest.mark.parametrize("case", CASES)


def weights(dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def gradients(steps: int, dtype: torch.dtype = torch.float64) -> Iterator[list[Tensor | None]]:
    """Of the second parameter only some come, the first of them late."""
    generator = torch.Generator().manual_seed(1)
    for t in range(steps):
        grads = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES]
        yield [None if i == 1 and (t < 3 or t % 4 == 0) else g for i, g in enumerate(grads)]


def step(params: list[Any], optimizer: Any, grads: list[Any]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.clone()  # the package writes into gradients
    optimizer.step()


def trained(kind: Any, steps: int = 200, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[list[Any], Any]:
    """Under a schedule that halves lr at times; evaluated in between."""
    params = weights(dtype)
    optimizer = kind(params, **options)
    optimizer.train()
    for t, grads in enumerate(gradients(steps, dtype)):
        for group in optimizer.param_groups:
            group["lr"] = options.get("lr", 0.0025) * (0.5 if 60 < t < 90 else 1.0)
        step(params, optimizer, grads)
        if t % 50 == 20:
            optimizer.eval()
            optimizer.train()
    return params, optimizer


def average_of(optimizer: Any, param: Tensor) -> Tensor:
    """The average of a parameter that is live, whether it is a state or computed."""
    state = optimizer.state[param]
    return state["ema"] if "ema" in state else schedule_free_average(param.detach(), state["z"], 0.9)


def averages(params: list[Any], optimizer: Any) -> list[Tensor]:
    optimizer.eval()
    values = [p.detach().clone() for p in params]
    optimizer.train()
    return values


def assert_near(one: tuple[list[Any], Any], other: tuple[list[Any], Any], units: float) -> None:
    """Weights, states, averages and counters, within a few units of the last place of the dtype of the weights."""
    dtype = one[0][0].dtype
    close = {"rtol": units * torch.finfo(dtype).eps, "atol": units * torch.finfo(dtype).eps}
    for p, q, x, y in zip(one[0], other[0], averages(*one), averages(*other), strict=True):
        torch.testing.assert_close(p, q, **close)
        torch.testing.assert_close(x, y, **close)
        assert one[1].state[p].keys() - {"step", "live"} == other[1].state[q].keys() - {"step", "live"}
        for name in ("z", "exp_avg_sq"):
            torch.testing.assert_close(one[1].state[p][name], other[1].state[q][name], check_dtype=False, **close)
    for name in ("k", "weight_sum", "lr_max", "scheduled_lr", "train_mode"):
        values = [float(optimizer.param_groups[0][name]) for _, optimizer in (one, other)]
        assert values[0] == pytest.approx(values[1], rel=1e-12), name


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_as_the_package(case: str, dtype: torch.dtype) -> None:
    """What 200 roundings add up to: sqrt(200) halves of a place at a time, 8 for where they do not cancel."""
    theirs = trained(schedulefree.AdamWScheduleFree, dtype=dtype, **CASES[case])
    assert_near(trained(ScheduleFreeAdamW, dtype=dtype, **CASES[case]), theirs, 64)


@every_case
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("backend", NATIVE)
def test_kernels_give_the_bits_of_the_torch_rule(case: str, dtype: torch.dtype, backend: str) -> None:
    one, other = (trained(ScheduleFreeAdamW, 40, dtype, backend=name, **CASES[case]) for name in (backend, "torch"))
    for p, q, x, y in zip(one[0], other[0], averages(*one), averages(*other), strict=True):
        assert torch.equal(p, q) and torch.equal(x, y)
        assert all(torch.equal(value, other[1].state[q][name]) for name, value in one[1].state[p].items())


class Paper:
    """Algorithm 1 for one parameter: x, y and z, each as it is written there."""

    def __init__(self, start: Tensor) -> None:
        self.x, self.z, self.v, self.total = start.clone(), start.clone(), torch.zeros_like(start), 0.0

    def step(self, g: Tensor, t: int, lr: float, highest: float, o: dict[str, Any]) -> None:
        beta1, beta2 = o["betas"]
        y = (1 - beta1) * self.z + beta1 * self.x
        self.v = beta2 * self.v + (1 - beta2) * g**2
        self.z = self.z - lr * g / ((self.v / (1 - beta2**t)).sqrt() + o["eps"]) - lr * o["weight_decay"] * y
        weight = t ** o["r"] * highest ** o["weight_lr_power"]
        self.total += weight
        c = weight / self.total
        self.x = (1 - c) * self.x + c * self.z


@every_case
def test_as_the_paper(case: str) -> None:
    params = weights()
    optimizer = ScheduleFreeAdamW(params, **CASES[case])
    o = optimizer.param_groups[0]
    (paper, *_), lrs = [Paper(p.detach()) for p in params], []
    for t, grads in enumerate(gradients(200), 1):
        lrs.append(o["lr"] * min(t / (o["warmup_steps"] or 1), 1.0))
        paper.step(grads[0], t, lrs[-1], max(lrs), o)
        step(params, optimizer, grads)
    x = averages(params, optimizer)[0]
    torch.testing.assert_close(x, paper.x, rtol=1e-12, atol=1e-12)
    y = (1 - o["betas"][0]) * paper.z + o["betas"][0] * paper.x
    torch.testing.assert_close(params[0].detach(), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_train_brings_back_the_bits(dtype: torch.dtype) -> None:
    params, optimizer = trained(ScheduleFreeAdamW, 30, dtype)
    live = [p.detach().clone() for p in params]
    assert not torch.equal(averages(params, optimizer)[0], live[0])
    assert all(map(torch.equal, params, live))
    for p, y in zip(params, live, strict=True):
        state = optimizer.state[p]
        assert state["z"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        x = y.to(state["z"].dtype) + (1 - 1 / 0.9) * (state["z"] - y)
        with optimizer.averaged():
            torch.testing.assert_close(p.detach(), x.to(dtype))


# ---- use and checkpoints as in the package ----


def test_use_as_of_the_package() -> None:
    params = weights()
    optimizer = ScheduleFreeAdamW(params)
    for call in (optimizer.eval, optimizer.train, optimizer.train):  # before the first step too
        call()
    optimizer.eval()
    assert optimizer.param_groups[0]["train_mode"] is False
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\) first"):
        optimizer.step()
    theirs = schedulefree.AdamWScheduleFree(params)
    assert theirs.defaults.keys() <= optimizer.defaults.keys()
    ours = {name: optimizer.defaults[name] for name in theirs.defaults}
    assert ours | {"train_mode": False} == theirs.defaults
    names = [*inspect.signature(schedulefree.AdamWScheduleFree).parameters]
    assert [*inspect.signature(ScheduleFreeAdamW).parameters][: len(names)] == names


@every_case
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_checkpoints_of_either_load_in_the_other(case: str, mode: str, order: str) -> None:
    kinds = [ScheduleFreeAdamW, schedulefree.AdamWScheduleFree]
    for saving, loading in (kinds, kinds[::-1], kinds[:1] * 2):
        params, optimizer = trained(saving, 50, **CASES[case])
        getattr(optimizer, mode)()
        saved = copy.deepcopy(([p.detach() for p in params], optimizer.state_dict()))
        others = weights()
        other = loading(others)

        def load_model(others: list[Any] = others, values: list[Tensor] = saved[0]) -> None:
            for p, value in zip(others, values, strict=True):
                p.data.copy_(value)

        if order == "model first":
            load_model()
        other.load_state_dict(saved[1])
        if order == "optimizer first":
            load_model()
        optimizer.train()
        other.train()
        for grads in gradients(20):
            step(params, optimizer, grads)
            step(others, other, grads)
        assert_near((params, optimizer), (others, other), 64)


def test_live_weights_that_the_package_handed_on_are_not_taken_for_its_own() -> None:
    params, optimizer = trained(ScheduleFreeAdamW, 10)
    optimizer.eval()
    theirs = schedulefree.AdamWScheduleFree(params)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    theirs.train()
    for grads in gradients(10):
        step(params, theirs, grads)
    live = [p.detach().clone() for p in params]
    for mode in ("train", "eval"):
        getattr(theirs, mode)()
        again = ScheduleFreeAdamW(params)
        again.load_state_dict(copy.deepcopy(theirs.state_dict()))
        again.train()
        for p, y in zip(params, live, strict=True):
            torch.testing.assert_close(p.detach(), y, rtol=1e-15, atol=1e-15)
        assert again.param_groups[0]["k"] == 20


def test_exports_and_saves_where_the_package_left_off() -> None:
    """Loaded in eval mode there are no live weights: the parameters hold the average, which is exported as it is."""
    params, theirs = trained(schedulefree.AdamWScheduleFree, 30)
    y = [p.detach().clone() for p in params]
    theirs.eval()
    model = torch.nn.ParameterList(params)
    optimizer = ScheduleFreeAdamW(model.parameters())
    optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
    x = copy.deepcopy(model.state_dict())
    exported = optimizer.ema_state_dict(model)
    assert all(torch.equal(exported[name], x[name]) for name in x)
    again = ScheduleFreeAdamW(model.parameters())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(RuntimeError, match=r"optimizer.train\(\) first"):
        again.step()
    again.train()
    for p, wanted in zip(params, y, strict=True):
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-15, atol=1e-15)
    again.eval()
    for p, (name, _) in zip(params, model.named_parameters(), strict=True):
        torch.testing.assert_close(p.detach(), x[name], rtol=1e-15, atol=1e-15)


def test_checkpoints_of_other_optimizers_are_refused() -> None:
    for kind in (torch.optim.AdamW, PACE):
        params = weights()
        step(params, other := kind(params), [torch.ones_like(p) for p in params])
        with pytest.raises(ValueError, match="exp_avg"):
            ScheduleFreeAdamW(weights()).load_state_dict(other.state_dict())
    _, optimizer = trained(ScheduleFreeAdamW, 5)
    with pytest.raises(ValueError):
        PACE(weights()).load_state_dict(optimizer.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0]["z"]
    with pytest.raises(ValueError, match="lacks z"):
        ScheduleFreeAdamW(weights()).load_state_dict(saved)


# ---- the step ----


BAD = [
    ({"betas": (0.0, 0.9)}, r"betas\[0\] must be in \(0, 1\)"),
    ({"warmup_steps": -1}, "warmup_steps must be finite and >= 0"),
    ({"r": float("nan")}, "r must be finite"),
    ({"weight_lr_power": -1.0}, "weight_lr_power must be finite and >= 0"),
    ({"lr": -1.0}, "lr must be finite and >= 0"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD)
def test_options_out_of_range(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ScheduleFreeAdamW(weights(), **options)
    optimizer = ScheduleFreeAdamW(weights())
    optimizer.param_groups[0].update(options)
    with pytest.raises(ValueError, match=sentence):
        optimizer.step()
    assert optimizer.param_groups[0]["k"] == 0


def test_weights_of_steps_beyond_float64_change_nothing() -> None:
    params, optimizer = trained(ScheduleFreeAdamW, 2, r=1000.0)
    before = copy.deepcopy((params, optimizer.state_dict()))
    with pytest.raises(ValueError, match="the weights of the steps add up beyond float64 at step 3"):
        step(params, optimizer, next(gradients(1)))
    assert all(map(torch.equal, params, before[0])) and optimizer.param_groups[0]["k"] == 2


def test_a_step_that_is_left_undone_counts_nothing() -> None:
    for where in ("found_inf", "skip_nonfinite"):
        params, optimizer = trained(ScheduleFreeAdamW, 5, skip_nonfinite=where == "skip_nonfinite", warmup_steps=9)
        before = copy.deepcopy((params, optimizer.state_dict()))
        *_, grads = gradients(6)
        if where == "found_inf":
            optimizer.found_inf = torch.ones(())
        else:
            grads[0][0] = float("nan")
        step(params, optimizer, grads)
        assert all(map(torch.equal, params, before[0]))
        after = optimizer.state_dict()
        assert {**after["param_groups"][0], "skipped_steps": None} == {
            **before[1]["param_groups"][0],
            "skipped_steps": None,
        }
        assert all(torch.equal(v, after["state"][i][n]) for i, s in before[1]["state"].items() for n, v in s.items())


def test_scaling_clipping_and_maximizing_are_of_the_gradient() -> None:
    wanted = trained(ScheduleFreeAdamW, 10)
    params = weights()
    optimizer = ScheduleFreeAdamW(params, maximize=True)
    for grads in gradients(10):
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else -8.0 * g
        optimizer.grad_scale = torch.tensor(4.0)
        optimizer.step(clip_coef=0.5)
    assert_near((params, optimizer), wanted, 1)


@every_case
def test_on_a_device_the_schedule_is_in_tensors(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it can't be read: every number is a tensor then, always the same one."""
    wanted = trained(ScheduleFreeAdamW, 40, **CASES[case])
    monkeypatch.setattr(schedule_free, "at_hand", lambda tensor: False)
    params = weights()
    optimizer = ScheduleFreeAdamW(
        params, **{**CASES[case], "lr": torch.tensor(CASES[case].get("lr", 0.0025), dtype=torch.float64)}
    )
    held: list[int] = []
    for t, grads in enumerate(gradients(40)):
        optimizer.found_inf = torch.tensor(float(t == 7))
        if t == 7:
            step(params, optimizer, [None if g is None else g + 1.0 for g in grads])
            optimizer.found_inf.zero_()
        step(params, optimizer, grads)
        if t % 50 == 20:
            optimizer.eval()
            optimizer.train()
        held = held or [id(optimizer.param_groups[0][name]) for name in ("k", "weight_sum", "lr_max", "scheduled_lr")]
        assert held == [id(optimizer.param_groups[0][name]) for name in ("k", "weight_sum", "lr_max", "scheduled_lr")]
    assert_near((params, optimizer), wanted, 64)
    saved = optimizer.state_dict()["param_groups"][0]
    assert saved["k"] == 40 and type(saved["k"]) is int and type(saved["weight_sum"]) is float


def test_the_operator_is_as_it_says() -> None:
    lists = [[torch.rand(7, 3) for _ in range(2)] for _ in range(4)] + [[torch.zeros(()) for _ in range(2)]]
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "count": 1.0, "share": 1.0}
    operator = torch.ops.pace_kernels.schedule_free_step_.default
    torch.library.opcheck(operator, (*lists, None), options | {"maximize": False, "capturable": False})
    before = copy.deepcopy(lists)
    for name, value in (("count", 0.0), ("share", 1.5), ("beta1", 1.0), ("lr", -1.0), ("eps", 0.0)):
        with pytest.raises(RuntimeError, match=f"{name} must"):
            operator(*lists, None, **{**options, name: value}, maximize=False, capturable=False)
    with pytest.raises(RuntimeError, match="zs has 1 tensors, params has 2"):
        operator(*lists[:3], lists[3][:1], lists[4], None, **options, maximize=False, capturable=False)
    with pytest.raises(RuntimeError, match="schedule must be a CPU tensor, contiguous, float64, with 2 elements"):
        operator(*lists, torch.zeros(2), **options, maximize=False, capturable=False)
    assert all(
        torch.equal(a, b) for one, other in zip(before, lists, strict=True) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("capturable", [False, True])
def test_on_meta_nothing_is_read(capturable: bool) -> None:
    param = torch.nn.Parameter(torch.ones(3, device="meta"))
    optimizer = ScheduleFreeAdamW([param], warmup_steps=3, capturable=capturable)
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.eval()
        optimizer.train()
    assert isinstance(optimizer.param_groups[0]["k"], Tensor) is capturable


def test_a_frozen_parameter_keeps_its_average_as_in_the_package() -> None:
    pairs = [trained(kind, 20) for kind in (ScheduleFreeAdamW, schedulefree.AdamWScheduleFree)]
    for params, optimizer in pairs:
        params[0].requires_grad_(False)
        for grads in gradients(5):
            step(params, optimizer, [None, *grads[1:]])
    assert_near(*pairs, 8)


def test_statistics() -> None:
    assert ScheduleFreeAdamW(weights()).get_step_stats() == {}
    params, optimizer = trained(ScheduleFreeAdamW, 8, warmup_steps=16, weight_lr_power=1.0)
    x, y = averages(params, optimizer), [p.detach() for p in params]
    distance = sum(float((a - b).square().sum()) for a, b in zip(x, y, strict=True)) ** 0.5
    wanted = {"scheduled_lr": 0.0025 / 2, "share": 8 / 36, "average_distance_norm": distance}
    assert optimizer.get_step_stats() == pytest.approx(wanted)
    with optimizer.averaged():
        assert optimizer.get_step_stats() == pytest.approx(wanted)


def test_a_warm_up_from_lr_0_starts_the_average_at_its_first_step() -> None:
    for kind in (ScheduleFreeAdamW, schedulefree.AdamWScheduleFree):
        params, optimizer = weights(), None
        optimizer = kind(params)
        optimizer.train()
        for t, grads in enumerate(gradients(3)):
            optimizer.param_groups[0]["lr"] = 0.01 * t
            step(params, optimizer, grads)
    assert optimizer.param_groups[0]["weight_sum"] == pytest.approx(5e-4)


def test_schedule_of_one_tensor_and_of_numbers_are_one() -> None:
    s = Schedule(3, 0.5, 0.2, 0.1)
    tensors = Schedule(*(torch.tensor(float(a), dtype=torch.float64) for a in s))
    for lr in (0.1, 0.3):
        now, share = advanced(s, lr, 10, 0.5, 2.0)
        then, other = advanced(tensors, torch.tensor(lr, dtype=torch.float64), 10, 0.5, 2.0)
        assert [float(a) for a in then] == pytest.approx(list(now)) and float(other) == pytest.approx(share)
