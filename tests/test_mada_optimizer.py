"""Promise: MADA is a torch.optim optimizer in every respect, and its coefficients are part of it."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from typing import Any

import pytest
import torch
from test_checkpoint import INSIDE, assert_same, groups_of, model_of, shared, train

from pace_kernels import MADA, PACE, backends

BACKENDS = [name for name, row in backends().items() if row.available]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = ("beta1", "beta2", "beta3", "rho", "c", "gamma")


# ---- the coefficients ----


def test_global_and_group_coefficients() -> None:
    model = model_of()
    optimizer = MADA(groups_of(model), **INSIDE)
    assert optimizer.coefficients == {"beta1": 0.9, "beta2": 0.95, "beta3": 0.4, "rho": 0.35, "c": 0.6, "gamma": 0.7}
    assert optimizer.hypergradients == dict.fromkeys(NAMES, 0.0)
    assert shared(optimizer)
    train(model, optimizer, range(6))
    assert all(h != 0.0 for h in optimizer.hypergradients.values())
    assert all(optimizer.coefficients[n] != v for n, v in INSIDE.items() if n in NAMES)

    model = model_of()
    optimizer = MADA(groups_of(model), coefficients="group", **INSIDE)
    assert not shared(optimizer)
    train(model, optimizer, range(6))
    a, b = optimizer.coefficients
    assert a["rho"] != b["rho"] and optimizer.hypergradients[0] != optimizer.hypergradients[1]


def test_warm_up_counts_steps() -> None:
    model = model_of()
    optimizer = MADA(model.parameters(), hyper_lr=0.1, **{**INSIDE, "hyper_warmup": 4})
    start = optimizer.coefficients
    train(model, optimizer, range(4))
    assert optimizer.coefficients == start and optimizer.hypergradients["rho"] != 0.0
    train(model, optimizer, range(4, 5))
    assert optimizer.coefficients != start


def test_fixed_coefficients_follow_their_options() -> None:
    model, other = model_of(), model_of()
    scheduled, constant = MADA(model.parameters(), learn=("rho",)), MADA(other.parameters(), learn=("rho",))
    scheduled.param_groups[0]["betas"] = (0.5, 0.6)
    scheduled.param_groups[0]["gamma"] = 0.25
    assert scheduled.coefficients == {"beta1": 0.5, "beta2": 0.6, "beta3": 0.9, "rho": 0.0, "c": 1.0, "gamma": 0.25}
    train(model, scheduled, range(3))
    train(other, constant, range(3))
    assert not torch.equal(next(model.parameters()), next(other.parameters()))
    assert "exp_avg_lion" in scheduled.state[next(model.parameters())]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_learning_rate_of_zero_leaves_the_coefficients_alone(backend: str) -> None:
    model = model_of()
    optimizer = MADA(groups_of(model), hyper_momentum=0.5, backend=backend, **INSIDE)
    train(model, optimizer, range(5))
    before = optimizer.coefficients
    rates = [g["lr"] for g in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.0) if backend == "torch" else 0.0
    train(model, optimizer, range(5, 7))
    assert optimizer.coefficients == before
    optimizer.param_groups[1]["lr"] = rates[1]  # one group is enough
    train(model, optimizer, range(7, 9))
    assert optimizer.coefficients != before


def test_a_parameter_without_a_gradient_rests_and_contributes_nothing() -> None:
    model, alone = model_of(), model_of()
    optimizer = MADA(model.parameters(), **INSIDE)
    train(model, optimizer, range(3))
    resting = list(model[1].parameters())
    before = {p: (p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}) for p in resting}
    for p in model[0].parameters():
        p.grad = torch.ones_like(p)
    for p in resting:
        p.grad = None
    twin_model, without = copy.deepcopy((model, optimizer))  # the twin has no resting parameters at all
    without.param_groups[0]["params"] = list(twin_model[0].parameters())
    for p in twin_model[0].parameters():
        p.grad = torch.ones_like(p)
    without.step()
    optimizer.step()
    for p, (x, state) in before.items():
        assert torch.equal(p, x) and all(torch.equal(optimizer.state[p][k], v) for k, v in state.items())
    halves = MADA(alone[0].parameters(), **INSIDE)
    train(alone[0], halves, range(1))
    assert optimizer.hypergradients == without.hypergradients
    assert optimizer.coefficients == without.coefficients
    coefficients = optimizer.coefficients
    optimizer.zero_grad()
    optimizer.step()  # nobody has a gradient
    assert optimizer.coefficients == coefficients


def test_freeze_goes_on_with_fixed_coefficients() -> None:
    for case in ({}, {"learn": ("rho", "c")}, {"beta3": 0.0, "learn": ("rho",)}, {"coefficients": "group"}):
        model = model_of(torch.float64)
        optimizer = MADA(groups_of(model), **{**INSIDE, "lambda_pullback": 0.1, **case})
        train(model, optimizer, range(6))
        twin_model = copy.deepcopy(model)
        twin = MADA(groups_of(twin_model), **{**INSIDE, "lambda_pullback": 0.1, **case})
        twin.load_state_dict(optimizer.state_dict())
        learned = optimizer.coefficients
        optimizer.freeze()
        assert optimizer.coefficients == learned and optimizer.freeze() is None
        assert all(g["learn"] == () and g["coefficient_values"] is None for g in optimizer.param_groups)
        for group in twin.param_groups:  # the twin learns on, but at a rate of 0
            group["hyper_lr"] = dict.fromkeys(NAMES, 0.0)
        train(model, optimizer, range(6, 12))
        train(twin_model, twin, range(6, 12))
        for p, q in zip(model.parameters(), twin_model.parameters(), strict=True):
            assert torch.equal(p, q)
            state = optimizer.state[p]
            assert "older_grad" not in state
            assert ("last_scalars" in state) == ("last_grad" in state) == ("exp_avg_diff" in state)


def test_freeze_drops_what_the_end_values_do_not_need() -> None:
    param = torch.nn.Parameter(torch.ones(4))
    bounds = {"beta3": (0.0, 0.5), "rho": (0.9, 1.0), "gamma": (0.9, 1.0)}
    optimizer = MADA([param], beta3=0.0, rho=1.0, gamma=1.0, bounds=bounds, hyper_lr=0.0)
    for _ in range(3):
        param.grad = torch.ones(4)
        optimizer.step()
    assert {"exp_avg_diff", "mean_exp_avg_sq", "exp_avg_lion", "older_grad"} <= optimizer.state[param].keys()
    optimizer.freeze()
    assert optimizer.state[param].keys() == {"step", "exp_avg", "exp_avg_sq"}
    adamw = torch.nn.Parameter(torch.ones(4))
    plain = MADA.preset("adamw", [adamw], betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(3):
        adamw.grad = torch.ones(4)
        plain.step()
    assert all(torch.equal(plain.state[adamw][k], optimizer.state[param][k]) for k in ("exp_avg", "exp_avg_sq"))


# ---- groups ----


def test_a_group_added_in_mid_training_shares_the_coefficients() -> None:
    model = model_of()
    optimizer = MADA(model[0].parameters(), **INSIDE)
    train(model[0], optimizer, range(5))
    learned = optimizer.coefficients
    optimizer.add_param_group({"params": model[1].parameters(), "lr": 1e-3})
    assert shared(optimizer) and optimizer.coefficients == learned
    train(model, optimizer, range(5, 8))
    assert [optimizer.state[p]["step"].item() for p in model.parameters()] == [8, 8, 3, 3]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"learn": ("rho",)}, "learn differs between groups"),
        ({"rho": 0.5}, "rho is learned and shared between groups, but starts at 0.35 in one and 0.5 in another"),
        ({"hyper_lr": {"rho": 0.5}}, "hyper_lr differs between groups"),
        ({"hyper_clip": 1.0}, "hyper_clip differs between groups"),
        ({"coefficients": "group"}, "coefficients must be the same in all groups"),
        ({"learn": ("delta",)}, "learn must be coefficients, of beta1, beta2, beta3, rho, c, gamma, got 'delta'"),
    ],
)
def test_groups_that_share_must_agree(group: dict[str, Any], message: str) -> None:
    model = model_of()
    optimizer = MADA(model[0].parameters(), **INSIDE)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": list(model[1].parameters()), **group})
    assert len(optimizer.param_groups) == 1
    if "coefficients" not in group and "delta" not in str(group):
        MADA([{"params": list(model[0].parameters())}, {"params": list(model[1].parameters()), **group}],
             coefficients="group", **INSIDE)  # fmt: skip


def test_maximize_is_minimizing_the_negative() -> None:
    a, b = model_of(), model_of()
    up, down = MADA(a.parameters(), maximize=True, **INSIDE), MADA(b.parameters(), **INSIDE)
    train(a, up, range(7), flip=True)
    train(b, down, range(7))
    assert_same(a, up, b, down)


@pytest.mark.parametrize("backend", BACKENDS)
def test_capturable_and_tensor_learning_rates_change_nothing(backend: str) -> None:
    runs = []
    for options in ({}, {"capturable": True}, {"lr": torch.tensor(1e-2, dtype=torch.float64)}):
        model = model_of()
        optimizer = MADA(model.parameters(), backend=backend, **{**INSIDE, "lambda_pullback": 0.2, **options})
        train(model, optimizer, range(6))
        runs.append((model, optimizer))
    for other in runs[1:]:
        for p, q in zip(runs[0][0].parameters(), other[0].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    if backend == "cpu":
        assert_same(*runs[0], *runs[1])
        assert_same(*runs[0], *runs[2])


def test_mixed_dtypes_in_one_group() -> None:
    params = [torch.nn.Parameter(torch.ones(3, dtype=d)) for d in DTYPES]
    optimizer = MADA(params, **INSIDE)
    for t in range(5):
        for p in params:
            p.grad = torch.full_like(p, (-1) ** t * 0.5 + t)
        optimizer.step()
    assert [optimizer.state[p]["exp_avg"].dtype for p in params] == [torch.float32] * 3 + [torch.float64]
    torch.testing.assert_close(params[0].double(), params[3], rtol=1e-5, atol=1e-6)


# ---- the average ----


def test_the_average_is_kept_and_swapped() -> None:
    model = model_of(torch.bfloat16)
    optimizer = MADA(model.parameters(), use_ema_eval=True, **INSIDE)
    train(model, optimizer, range(4))
    live = [p.detach().clone() for p in model.parameters()]
    with optimizer.averaged():
        assert all(torch.equal(p, optimizer.state[p]["ema"].to(p.dtype)) for p in model.parameters())
        with pytest.raises(RuntimeError, match="weights are swapped in"):
            optimizer.step()
    assert all(torch.equal(p, x) for p, x in zip(model.parameters(), live, strict=True))
    plain = MADA(model.parameters())
    train(model, plain, range(1))
    assert all("ema" not in plain.state[p] for p in model.parameters())


def test_as_adamw_with_a_pullback_it_is_pace() -> None:
    a, b = model_of(torch.float64), model_of(torch.float64)
    options = {"lr": 1e-2, "lambda_pullback": 0.5, "ema_update_freq": 2}
    ours, pace = MADA.preset("adamw", a.parameters(), **options), PACE(b.parameters(), **options)
    train(a, ours, range(12))
    train(b, pace, range(12))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-15)  # m / b1 and α / b1 are rounded elsewhere
        torch.testing.assert_close(ours.state[p]["ema"], pace.state[q]["ema"], rtol=1e-14, atol=1e-15)


# ---- checkpoints ----


def test_a_checkpoint_brings_its_own_way_of_learning() -> None:
    model = model_of()
    optimizer = MADA(groups_of(model), coefficients="group", **INSIDE)
    train(model, optimizer, range(4))
    other = MADA(groups_of(copy.deepcopy(model)), learn=())
    other.load_state_dict(optimizer.state_dict())
    assert other.coefficients == optimizer.coefficients
    optimizer.freeze()
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["learn"] == () and other.param_groups[0]["coefficient_values"] is None


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adamw_checkpoint_loads(amsgrad: bool, dtype: torch.dtype) -> None:
    """The moments come as they are, after the last step: the first step has nothing to redo, and learns nothing."""
    model = model_of(dtype)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.8, 0.99), amsgrad=amsgrad)
    train(model, adamw, range(4))
    kind = {"second_moment": "max", "rho": 0.0} if amsgrad else {"rho": 1.0}
    learning = MADA(model.parameters(), beta3=0.0, hyper_warmup=0, **kind)
    learning.load_state_dict(adamw.state_dict())
    assert learning.coefficients["beta1"] == 0.8
    assert learning.param_groups[0]["lr"] == 1e-2
    twin = copy.deepcopy(model)
    plain = MADA.preset("amsgrad" if amsgrad else "adamw", twin.parameters())
    plain.load_state_dict(adamw.state_dict())
    train(model, learning, range(4, 5))
    train(twin, plain, range(4, 5))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        assert learning.state[p]["step"].item() == 5
    assert learning.hypergradients == dict.fromkeys(NAMES, 0.0)
    train(model, learning, range(5, 6))
    assert learning.hypergradients["beta1"] != 0.0


def test_checkpoints_that_do_not_fit_change_nothing() -> None:
    model = model_of()
    optimizer = MADA(groups_of(model), **INSIDE)
    train(model, optimizer, range(3))

    def broken(change: Any) -> dict[str, Any]:
        saved = copy.deepcopy(optimizer.state_dict())
        change(saved)
        return saved

    def options(name: str, value: Any) -> Any:
        return lambda saved: saved["param_groups"][1].update({name: value})

    cases = {
        "last_scalars must be a tensor of shape": lambda s: s["state"][0].update(last_scalars=torch.zeros(3)),
        "older_grad must be a tensor of shape": lambda s: s["state"][1].update(older_grad=torch.zeros(3)),
        "lacks exp_avg_sq": lambda s: s["state"][0].pop("exp_avg_sq"),
        "learn differs": options("learn", ("rho",)),
        "second_moment must be": options("second_moment", "median"),
        "coefficients must be the same": options("coefficients", "group"),
        "has momentum_buffer": lambda s: s["state"][0].update(momentum_buffer=torch.zeros(3)),
    }
    before = copy.deepcopy(optimizer.state_dict())
    for message, change in cases.items():
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(broken(change))
        after = optimizer.state_dict()
        assert str(before) == str(after)


# ---- the rest of torch.optim ----


def test_schedules() -> None:
    model = model_of()
    optimizer = MADA(model.parameters(), learn=("rho",), **{k: v for k, v in INSIDE.items() if k != "beta3"})
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=12)
    rates, betas = [], []
    for t in range(10):
        train(model, optimizer, range(t, t + 1))
        rates.append(optimizer.state[next(model.parameters())]["last_scalars"][1].item())
        betas.append(optimizer.state[next(model.parameters())]["last_scalars"][2].item())
        schedule.step()
    assert len(set(rates)) == 10 and max(rates) == pytest.approx(0.1, rel=0.05)
    assert len(set(betas)) > 5  # momentum is cycled too


def test_closures_hooks_and_names() -> None:
    model = model_of()
    optimizer = MADA(model.named_parameters(), **INSIDE)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) > float(optimizer.step(closure))
    assert seen == ["before", "after"] * 2
    assert optimizer.param_groups[0]["param_names"][0] == "0.weight"


def test_no_reference_cycle_keeps_the_memory() -> None:
    model = model_of()
    optimizer = MADA(model.parameters(), **INSIDE)
    train(model, optimizer, range(2))
    gone = weakref.ref(optimizer.state[next(model.parameters())]["exp_avg"])
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()


def test_a_compiled_training_step() -> None:
    torch._dynamo.reset()
    models = [torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [MADA(m.parameters(), **INSIDE) for m in models]
    x = torch.randn(8, 4)

    def step(model: torch.nn.Module, optimizer: MADA) -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    compiled = torch.compile(step, backend="eager")
    for _ in range(5):
        compiled(models[0], optimizers[0])
        step(models[1], optimizers[1])
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)
    assert optimizers[0].state[next(models[0].parameters())]["step"].item() == 5
    assert optimizers[0].coefficients == optimizers[1].coefficients


# ---- bad input ----

BAD: list[tuple[dict[str, Any], str]] = [
    ({"learn": ("beta4",)}, "learn must be coefficients, of beta1, beta2, beta3, rho, c, gamma, got 'beta4'"),
    ({"learn": ("rho",), "hyper_lr": {"delta": 1.0}}, "hyper_lr must be coefficients, of .*, got 'delta'"),
    ({"hyper_momentum": {"delta": 1.0}}, "hyper_momentum must be coefficients"),
    ({"bounds": {"delta": (0, 1)}}, "bounds must be coefficients"),
    ({"hyper_lr": -1.0}, r"hyper_lr\['beta1'\] must be finite and >= 0, got -1"),
    ({"hyper_lr": {"rho": float("nan")}}, r"hyper_lr\['rho'\] must be finite"),
    ({"hyper_lr": float("inf")}, r"hyper_lr\['beta1'\] must be finite"),
    ({"hyper_momentum": 1.0}, r"hyper_momentum\['beta1'\] must be in \[0, 1\), got 1"),
    ({"hyper_clip": 0.0}, "hyper_clip must be > 0, got 0"),
    ({"hyper_warmup": -1}, "hyper_warmup must be an integer >= 0, got -1"),
    ({"hyper_warmup": 1.5}, "hyper_warmup must be an integer >= 0, got 1.5"),
    ({"betas": (0.995, 0.95)}, r"beta1 must be within its bounds, \[0.01, 0.99\], got 0.995"),
    ({"betas": (0.9, 0.3)}, r"beta2 must be within its bounds, \[0.501, 0.999\], got 0.3"),
    ({"rho": 0.5, "bounds": {"rho": (0.6, 0.9)}}, r"rho must be within its bounds, \[0.6, 0.9\], got 0.5"),
    ({"bounds": {"rho": (0.9, 0.6)}}, r"bounds\['rho'\] must be \(low, high\), low <= high"),
    ({"bounds": {"rho": (-0.1, 1)}}, r"bounds\['rho'\] must be within \[0, 1\], got -0.1"),
    ({"bounds": {"beta1": (0.1, 1.0)}}, r"bounds\['beta1'\] must be .*within \[0, 1\)"),
    ({"bounds": {"rho": 0.5}}, r"bounds must be pairs \(low, high\), got 0.5"),
    ({"coefficients": "each"}, 'coefficients must be "global" or "group", got \'each\''),
    ({"second_moment": "median"}, 'second_moment must be "mean" or "max", got \'median\''),
    ({"learn": (), "beta3": 1.0}, r"beta3 must be in \[0, 1\), got 1"),
    ({"learn": (), "rho": 1.5}, r"rho must be in \[0, 1\], got 1.5"),
    ({"learn": (), "gamma": -0.1}, r"gamma must be in \[0, 1\], got -0.1"),
    ({"learn": (), "c": float("nan")}, r"c must be in \[0, 1\], got nan"),
    ({"lion_betas": (0.9, 1.0)}, r"lion_betas\[1\] must be in \[0, 1\), got 1"),
    ({"lion_betas": 0.9}, r"lion_betas must be two numbers in \[0, 1\), got 0.9"),
    ({"learn": (), "hyper_lr": 0.1}, "hyper_lr was given, but learn is empty: name the coefficients to learn"),
    ({"learn": (), "hyper_momentum": 0.5}, "hyper_momentum was given, but learn is empty"),
    ({"learn": (), "hyper_clip": 1.0}, "hyper_clip was given, but learn is empty"),
    ({"learn": (), "hyper_warmup": 0}, "hyper_warmup was given, but learn is empty"),
    ({"learn": (), "bounds": {"rho": (0, 1)}}, "bounds was given, but learn is empty"),
    ({"lr": -1.0}, "lr must be finite and >= 0, got -1"),
    ({"eps": 0.0}, "eps must be finite and at least"),
    ({"lambda_pullback": -1.0}, "lambda_pullback must be finite and >= 0"),
    ({"ema_update_freq": 0}, "ema_update_freq must be an integer >= 1"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(o) for o, _ in BAD])
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MADA([torch.nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize("options", [{"learn": "rho"}, {"bounds": (0, 1)}, {"hyper_clip": "10"}, {"hyper_lr": "fast"}])
def test_options_of_the_wrong_type(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(options))):
        MADA([torch.nn.Parameter(torch.ones(2))], **options)


def test_options_that_go_bad_in_training_change_nothing() -> None:
    model = model_of()
    optimizer = MADA(model.parameters(), **INSIDE)
    train(model, optimizer, range(3))
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    group = optimizer.param_groups[0]
    bad = [("hyper_lr", {"rho": -1.0}), ("lr", float("nan")), ("eps", -1.0), ("hyper_clip", -1.0)]
    for name, value in bad:
        kept = group[name]
        group[name] = value
        with pytest.raises(ValueError, match=name):
            optimizer.step()
        group[name] = kept
    assert str(before) == str([model.state_dict(), optimizer.state_dict()])
    optimizer.step()


# ---- options that change in training ----


@pytest.mark.parametrize(
    "change",
    [
        {"hyper_lr": "fast"},
        {"hyper_momentum": {"c": 1.0}},
        {"hyper_clip": None},
        {"hyper_warmup": True},
        {"bounds": (0, 1)},
        {"bounds": {"c": (0.9, 0.1)}},
        {"hyper_lr": (0.1, 0.2)},
        {"learn": ("rho",)},
        {"eps": 2.0**-60},
    ],
    ids=str,
)
def test_a_broken_second_group_leaves_the_first_alone(change: dict[str, Any]) -> None:
    model = model_of()
    optimizer = MADA(groups_of(model), learn=("rho", "beta1"), coefficients="group", lr=1e-2)
    train(model, optimizer, range(3))
    optimizer.param_groups[0]["gamma"] = 0.5  # valid, and takes effect where the step does
    before = str([model.state_dict(), optimizer.state])
    kept = {name: optimizer.param_groups[1][name] for name in change}
    optimizer.param_groups[1].update(change)
    with pytest.raises((ValueError, TypeError), match=next(iter(change))):
        optimizer.step()
    assert str([model.state_dict(), optimizer.state]) == before
    optimizer.param_groups[1].update(kept)
    optimizer.step()


def test_hyper_options_are_replaced_not_edited() -> None:
    model = model_of()
    optimizer = MADA(groups_of(model), **INSIDE)
    train(model, optimizer, range(3))
    with pytest.raises(TypeError):
        optimizer.param_groups[0]["hyper_lr"]["rho"] = 0.0
    for group in optimizer.param_groups:
        group["hyper_lr"] = {"rho": 0.0}
    before = optimizer.coefficients
    train(model, optimizer, range(3, 5))
    after = optimizer.coefficients
    assert before["rho"] == after["rho"] and before["c"] != after["c"]
    optimizer.param_groups[1]["hyper_lr"] = 0.5
    with pytest.raises(ValueError, match="hyper_lr differs between groups"):
        optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "values",
    [
        {"gamma": (1.0, 0.5)},
        {"beta3": (0.4, 0.0, 0.4)},
        {"rho": (1.0, 0.3)},
        {"lion_betas": ((0.95, 0.98), (0.8, 0.7))},
        {"eps": (1e-8, 1e-3)},
        {"second_moment": ("mean", "max")},
    ],
    ids=str,
)
def test_options_change_as_where_nothing_is_learned(values: dict[str, Any], backend: str) -> None:
    (name, sequence), runs = next(iter(values.items())), []
    for learn in (("c",), ()):
        model = model_of(torch.float32 if backend == "cpu" else torch.float64)
        fixed = {"gamma": 0.7, "rho": 0.35, "beta3": 0.4, "c": 0.6, "lr": 1e-2, name: sequence[0], "learn": learn}
        optimizer = MADA(model.parameters(), backend=backend, **fixed, **({"hyper_lr": 0.0} if learn else {}))
        for k, value in enumerate(sequence):
            optimizer.param_groups[0][name] = value
            train(model, optimizer, range(4 * k, 4 * k + 4))
        optimizer.freeze()
        runs.append((model, optimizer))
    (a, oa), (b, ob) = runs
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
        assert oa.state[p].keys() == ob.state[q].keys()
        assert all(torch.equal(v, ob.state[q][k]) for k, v in oa.state[p].items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_square_that_overflows_spoils_nothing(backend: str) -> None:
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))]
    optimizer = MADA(params, learn=("rho",), rho=0.5, beta3=0.0, hyper_warmup=0, backend=backend)
    for t in range(4):
        for k, p in enumerate(params):
            p.grad = torch.full((3,), 1e20 if t == 1 and k == 0 else 1.0)
        optimizer.step()
    assert all(p.isfinite().all() for p in params)
    assert not optimizer.state[params[0]]["exp_avg_sq"].isnan().any()
    params[0].grad[0] = float("inf")
    optimizer.step()
    optimizer.step()
    assert not math.isfinite(optimizer.hypergradients["rho"])
    assert math.isfinite(optimizer.coefficients["rho"])


def test_lagged_states_are_loaded_whole() -> None:
    model = model_of()
    optimizer = MADA(model.parameters(), **INSIDE)
    train(model, optimizer, range(3))
    before = str(optimizer.state_dict())
    for name in ("older_grad", "exp_avg_lion", "last_grad"):
        saved = copy.deepcopy(optimizer.state_dict())
        del saved["state"][0][name]
        with pytest.raises(ValueError, match=f"lacks {name}"):
            optimizer.load_state_dict(saved)
    for name in ("coefficient_values", "coefficient_momenta", "hypergradients", "hyper_step"):
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0][name] = torch.zeros(4)
        with pytest.raises(ValueError, match=f"{name} must be a tensor of shape"):
            optimizer.load_state_dict(saved)
    assert str(optimizer.state_dict()) == before


def test_a_group_added_takes_what_the_first_has_now() -> None:
    model = model_of()
    optimizer = MADA(model[0].parameters(), **INSIDE)
    optimizer.param_groups[0]["hyper_lr"] = 0.3
    optimizer.add_param_group({"params": list(model[1].parameters())})
    assert optimizer.param_groups[1]["hyper_lr"] == (0.3,) * 6
    train(model, optimizer, range(2))


def test_gradients_are_freed_by_zero_grad() -> None:
    """Between steps nothing holds them: they are a copy of the weights, for the time of the next backward pass."""
    param = torch.nn.Parameter(torch.ones(5))
    optimizer = MADA([param])
    for _ in range(2):
        param.grad = torch.ones(5)
        grad = weakref.ref(param.grad)
        optimizer.step()
        optimizer.zero_grad()
        assert grad() is None


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_count_that_was_set_back_is_refused_while_a_step_is_to_be_redone(backend: str) -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = MADA(params, backend=backend)
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    optimizer.state[params[1]]["step"].zero_()
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=r"steps\[1\] is 0, but last_scalars has a last step to redo"):
        optimizer.step()
    assert all(map(torch.equal, params, before)) and optimizer.state[params[0]]["step"].item() == 1
    optimizer.state.pop(params[1])
    optimizer.step()
    assert all(p.isfinite().all() and not torch.equal(p, old) for p, old in zip(params, before, strict=True))
