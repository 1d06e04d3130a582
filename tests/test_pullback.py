"""Promise: Pullback around any optimizer is the base's step, then the formula, for each kind of base and gain; around
AdamW it is PACE; without a pull it is an EMA; and what it can't wrap it refuses with a sentence why."""

from __future__ import annotations

import copy
import math
import pickle
import sys
import types
from typing import Any

import pytest
import torch
from pace_bound import SLACK, STORE, TINY, Reference, U
from pace_cases import SHAPES, assert_same_bits, gradients, weights
from torch import optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pace_kernels import MADA, PACE, Pullback, ScheduleFreeAdamW, backends

BACKENDS = [name for name, row in backends().items() if row.available]
STEPS = 20


def give(params: list[Any], grads: list[torch.Tensor]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()


# ---- the formula around each base ----

# By name: the base, what its parameters are, the wrapper's options; the name of the second moment, β2, ε.
BASES: dict[str, tuple[Any, str, dict[str, Any], tuple[str, float, float] | None]] = {
    "SGD": (lambda p: optim.SGD(p, lr=0.1), "all", {"gain": 0.05}, None),
    "SGD with momentum, from the step": (
        *(lambda p: optim.SGD(p, lr=0.1, momentum=0.9), "all", {"gain": 0.3, "pullback_from": "step"}),
        None,
    ),
    "Muon": (lambda p: optim.Muon(p, lr=0.02), "matrices", {"gain": 0.1}, None),
    "Adagrad, named": (
        *(lambda p: optim.Adagrad(p, lr=0.05), "all", {"second_moment": "sum", "lambda_pullback": 3.0}),
        ("sum", 0.0, 1e-10),
    ),
    "RMSprop": (lambda p: optim.RMSprop(p, lr=0.01), "all", {"lambda_pullback": 5.0}, ("square_avg", 0.0, 1e-8)),
    "RMSprop, centered": (
        *(lambda p: optim.RMSprop(p, lr=0.01, centered=True), "all", {"lambda_pullback": 5.0}),
        ("square_avg", 0.0, 1e-8),
    ),
    "Adafactor": (
        *(lambda p: optim.Adafactor(p, lr=0.01), "vectors", {"lambda_pullback": 5.0}),
        ("variance", 0.0, 2.0**-23),
    ),
    "Adafactor, matrices": (lambda p: optim.Adafactor(p, lr=0.01), "matrices", {"gain": 0.2}, None),
    "Adam": (lambda p: optim.Adam(p, lr=0.01), "all", {"lambda_pullback": 5.0}, ("exp_avg_sq", 0.999, 1e-8)),
    "AdamW": (
        *(lambda p: optim.AdamW(p, lr=0.01, betas=(0.9, 0.95), eps=1e-3), "all", {"clamp_pullback": False}),
        ("exp_avg_sq", 0.95, 1e-3),
    ),
    "AMSGrad": (
        *(lambda p: optim.AdamW(p, lr=0.01, amsgrad=True), "all", {"lambda_pullback": 5.0}),
        ("max_exp_avg_sq", 0.999, 1e-8),
    ),
    "NAdam": (lambda p: optim.NAdam(p, lr=0.01), "all", {"ema_update_freq": 3}, ("exp_avg_sq", 0.999, 1e-8)),
    "RAdam, from the step": (
        *(lambda p: optim.RAdam(p, lr=0.01), "all", {"pullback_from": "step", "lambda_pullback": 5.0}),
        ("exp_avg_sq", 0.999, 1e-8),
    ),
}  # fmt: skip


def parameters(kind: str, dtype: torch.dtype) -> tuple[list[Any], list[int]]:
    """Parameters, and which of pace_cases' they are."""
    chosen = [i for i, shape in enumerate(SHAPES) if kind == "all" or (len(shape) == 2) == (kind == "matrices")]
    chosen = [i for i in chosen if math.prod(SHAPES[i]) > 0 and (kind != "vectors" or len(SHAPES[i]) <= 1)]
    every = weights(dtype)
    return [every[i] for i in chosen], chosen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BASES)
def test_each_base_step_is_followed_by_the_formula(name: str, backend: str) -> None:
    """In each step the base moves a twin from the same weights and states; then the formula in float64, with no code
    of the package. A step's result is off by its own roundings alone: a relative error, in u = 2^-24, of 2 of the
    scalars, of 8 of 1 / D and Λ, of 1 for each sum and product of the values: 16 u of |x'| + Λ (|e| + |x|) in all."""
    make, kind, options, moment = BASES[name]
    params, chosen = parameters(kind, torch.float32)
    optimizer = Pullback(make(params), **options, backend=backend)
    own = optimizer._own(optimizer.param_groups[0]).values
    average = [p.detach().double() for p in params]
    clamped = count = 0
    for t, grads in enumerate(gradients(STEPS, torch.float32), 1):
        grads = [grads[i].clamp(-1e3, 1e3) for i in chosen]
        twins = copy.deepcopy(optimizer)
        before = [p.detach().double() for p in params]
        give(params, grads)
        optimizer.step()
        theirs = twins.base.param_groups[0]["params"]
        give(theirs, grads)
        twins.base.step()
        w = max((1 + own["ema_gamma"] * max(0.0, t - own["ema_rho"])) ** -own["ema_kappa"], 1e-4)
        for k, (param, twin, x) in enumerate(zip(params, theirs, before, strict=True)):
            stepped, e = twin.detach().double(), average[k]
            if moment is None:
                gain = torch.full_like(stepped, options["gain"])
            else:
                state, beta2, eps = moment
                D = (twins.base.state[twin][state].double() / (1 - beta2**t)).sqrt() + eps
                gain = optimizer.param_groups[0]["lr"] * own["lambda_pullback"] * w / D
                clamped, count = clamped + int((gain >= 1).sum()), count + gain.numel()
                if own["clamp_pullback"]:
                    gain = gain.clamp(max=1.0)
            distance = e - (stepped if own["pullback_from"] == "step" else x)
            moved = stepped + gain * distance
            bound = 16 * U * (stepped.abs() + gain * (e.abs() + x.abs() + stepped.abs())) + TINY
            assert bool(((param.detach().double() - moved).abs() <= bound).all())
            now = e + w * (param.detach().double() - e) if t % own["ema_update_freq"] == 0 else e
            ema = optimizer.state[param]["ema"].double()
            assert bool(((ema - now).abs() <= 6 * U * (e.abs() + param.detach().abs().double()) + TINY).all())
            average[k] = ema
    assert moment is None or name == "AdamW" or 0.02 < clamped / count < 0.98


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"lambda_pullback": 20.0}, {"pullback_from": "step", "lambda_pullback": 20.0}, {"ema_update_freq": 3},
     {"ema_kappa": None, "beta_ema": 0.05}, {"clamp_pullback": False, "eps": 1e-2}],
    ids=str,
)  # fmt: skip
def test_around_adamw_it_is_pace(options: dict[str, Any], dtype: torch.dtype) -> None:
    """PACE is off from float64 by the bound carried in `Reference`; Pullback(AdamW) by that and, at each step, by the
    roundings of AdamW itself: 16 operations on values no larger than |x| and the update (at most 0.02 here), u each.
    They do not grow: with Λ ≤ 1, x₊ depends on x and e by 1 − Λ and Λ. Narrower weights: one step, since then the
    moments too are narrow; x' is rounded to the weights' format, which in PACE it is not, and the update made of such
    moments."""
    eps = options.get("eps", 1e-8)
    own = {k: v for k, v in options.items() if k != "eps"}
    params, twins = weights(dtype), weights(dtype)
    pace = PACE(params, lr=1e-2, eps=eps, **own)
    base = torch.optim.AdamW(twins, lr=1e-2, eps=eps, foreach=False)
    ours = Pullback(base, **own)
    store, tiny = STORE[dtype]
    references = [Reference.start(p.detach(), **pace.param_groups[0]) for p in params]
    for t, grads in enumerate(gradients(10 if dtype == torch.float32 else 1, dtype)):
        give(params, grads)
        give(twins, grads)
        pace.step()
        ours.step()
        for reference, param, twin, grad in zip(references, params, twins, grads, strict=True):
            reference.step(grad, dtype)
            base_roundings = 16 * U * (reference.x.value.abs() + 0.02 * (t + 1))
            narrow = 2 * store * (reference.x.value.abs() + 0.02) + tiny
            bound = 2 * reference.x.error + SLACK * (t + 1) * (base_roundings + narrow)
            gap = (param.detach().double() - twin.detach().double()).abs()
            assert bool((gap <= bound).all()), (t, float((gap - bound).max()))
            average = (pace.state[param]["ema"] - ours.state[twin]["ema"]).double().abs()
            assert bool((average <= 2 * reference.e.error + bound).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_pull_it_is_an_average(backend: str) -> None:
    """torch's foreach EMA with decay d: e + (1 − d)(x − e) by lerp, three roundings; ours e + w (x − e), three too, and
    each scalar one. The difference is at most 8 u of the larger of both, and shrinks by d at each step."""
    model = torch.nn.Linear(33, 257)
    optimizer = Pullback(
        torch.optim.SGD(model.parameters(), lr=0.1), 0.0, ema_kappa=None, beta_ema=0.05, backend=backend
    )
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))
    theirs.update_parameters(model)  # the first is a copy, as ours starts at the weights
    largest = 0.0
    for seed in range(STEPS):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        model(torch.randn(8, 33)).square().mean().backward()
        plain = [p.detach() - 0.1 * p.grad for p in model.parameters()]
        optimizer.step()
        theirs.update_parameters(model)
        for p, moved in zip(model.parameters(), plain, strict=True):
            torch.testing.assert_close(p.detach(), moved, rtol=2 * U, atol=2 * U)  # the weights are only read
        largest = max(largest, *(float(p.detach().abs().max()) for p in model.parameters()))
    ours = optimizer.ema_state_dict(model)
    for name, value in theirs.module.state_dict().items():
        assert float((ours[name] - value).abs().max()) <= 8 * U * largest / 0.05
        assert not torch.equal(ours[name], model.state_dict()[name])


def test_every_backend_gives_the_same_bits_in_a_training() -> None:
    runs = []
    for backend in ("cpu", "torch"):
        params = weights(torch.float32)
        optimizer = Pullback(torch.optim.RMSprop(params, foreach=False), gain=0.125, backend=backend)
        for grads in gradients(STEPS, torch.float32):
            give(params, grads)
            optimizer.step()
        runs.append((params, optimizer))
    assert_same_bits(*runs)


# ---- options and groups ----


def test_a_group_has_options_of_its_own() -> None:
    a, b, c = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    groups = [{"params": [a], "gain": 0.5}, {"params": [b]}, {"params": [c], "gain": 0.0, "use_ema_eval": False}]
    optimizer = Pullback(torch.optim.SGD(groups, lr=1.0), gain=0.25, pullback_from="step", ema_kappa=None)
    give([a, b, c], [torch.ones(3)] * 3)
    optimizer.step()
    assert (a[0].item(), b[0].item(), c[0].item()) == (0.5, 0.25, 0.0)  # from 0 toward 1
    assert c not in optimizer.state
    optimizer.param_groups[0]["gain"] = 1.0  # at any time
    optimizer.step()
    assert a[0].item() == pytest.approx(1 - 0.01 * 0.5)  # on the average, as it was
    optimizer.param_groups[1]["gain"] = 1.5
    with pytest.raises(ValueError, match=r"gain must be None, or in \[0, 1\], got 1.5"):
        optimizer.step()


def test_groups_are_added_in_training() -> None:
    a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = Pullback(torch.optim.AdamW([a]))
    give([a], [torch.ones(3)])
    optimizer.step()
    with pytest.raises(ValueError, match="gain"):
        optimizer.add_param_group({"params": [b], "gain": -1.0})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [b], "lr": 0.5, "gain": 0.5})
    give([a, b], [torch.ones(3)] * 2)
    optimizer.step()
    assert [optimizer.state[p]["pullback_step"].item() for p in (a, b)] == [2, 1]


def test_a_base_that_trained_before_keeps_its_bias_correction() -> None:
    param = torch.nn.Parameter(torch.ones(5))
    base = torch.optim.Adam([param], lr=0.0)
    for _ in range(10):
        give([param], [torch.full((5,), 2.0)])
        base.step()
    optimizer = Pullback(base, lambda_pullback=1.0, log_stats=True)
    optimizer.step()
    # v / (1 − β2^11) is g² = 4 at any step, so D = 2; w_1 = 2^-0.2.
    assert optimizer.get_step_stats()["raw_lambda_mean"] == pytest.approx(2**-0.2 / 2, rel=1e-4)


def test_a_parameter_without_a_gradient_takes_no_part() -> None:
    a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = Pullback(torch.optim.SGD([a, b], lr=0.1), gain=0.5)
    a.grad = torch.ones(3)
    optimizer.step()
    assert b not in optimizer.state and torch.equal(b.detach(), torch.ones(3))


def test_sparse_gradients_where_the_base_takes_them() -> None:
    table = torch.nn.Embedding(10, 4, sparse=True)
    optimizer = Pullback(torch.optim.SGD(table.parameters(), lr=0.1), gain=0.5)
    table(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert optimizer.state[table.weight]["pullback_step"].item() == 1


def schedulefree() -> Any:
    module = types.ModuleType("schedulefree.sgd")
    kind = type("SGDScheduleFree", (torch.optim.SGD,), {"__module__": module.__name__})
    return kind([torch.nn.Parameter(torch.ones(1))], lr=0.1)


ONE = [torch.nn.Parameter(torch.ones(2, 2))]
REFUSED = {
    "SGD has no second moment known here": lambda: Pullback(torch.optim.SGD(ONE, lr=0.1)),
    "Muon has no second moment": lambda: Pullback(torch.optim.Muon(ONE)),
    "for matrices Adafactor keeps a factored": lambda: Pullback(torch.optim.Adafactor(ONE)),
    "PACE carries the pullback in its own pass": lambda: Pullback(PACE(ONE)),
    "MADA carries the pullback in its own pass": lambda: Pullback(MADA(ONE)),
    "ScheduleFreeAdamW: it evaluates an average already": lambda: Pullback(ScheduleFreeAdamW(ONE)),
    "LBFGS moves the weights several times": lambda: Pullback(torch.optim.LBFGS(ONE)),
    "is a Pullback already": lambda: Pullback(Pullback(torch.optim.SGD(ONE), gain=0.1)),
    "schedulefree: it evaluates an average already": lambda: Pullback(schedulefree()),
    "optimizer must be a torch.optim.Optimizer, got 3": lambda: Pullback(3),
    r"gain must be None, or in \[0, 1\], got 2": lambda: Pullback(torch.optim.SGD(ONE), gain=2.0),
    "lambda_pullback must be finite and >= 0, got -1": lambda: Pullback(torch.optim.Adam(ONE), -1.0),
    "second_moment must be None or the name": lambda: Pullback(torch.optim.SGD(ONE), second_moment=3),
    "pullback_from must be": lambda: Pullback(torch.optim.Adam(ONE), pullback_from="average"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", None)  # known by its name, never imported
    with pytest.raises((ValueError, TypeError), match=message):
        REFUSED[message]()


def test_a_second_moment_that_is_not_there() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    base = torch.optim.Adagrad([param])
    optimizer = Pullback(base, second_moment="exp_avg_sq")
    give([param], [torch.ones(3)])
    with pytest.raises(RuntimeError, match="Adagrad keeps no state 'exp_avg_sq' of a parameter, but step, sum"):
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones(3))  # Adagrad makes its states at once, so that it shows before


# ---- what trainers do ----


def test_statistics_mean_what_they_say() -> None:
    param = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = Pullback(torch.optim.SGD([param], lr=1.0), gain=0.25, log_stats=True, ema_kappa=None, beta_ema=0.0)
    assert optimizer.get_step_stats() == {}
    give([param], [torch.tensor([3.0, 4.0])])
    optimizer.step()
    optimizer.step()
    stats = optimizer.get_step_stats()
    assert stats == {
        **{f"{name}_{of}": 0.25 for name in ("effective_lambda", "lambda") for of in ("mean", "max", "min")},
        "lambda_clipped_frac": 0.0,
        "base_step_norm": 5.0,
        "pullback_norm": 0.25 * 5.0,  # the average is at the start, the weights one step away
        "update_norm": 0.75 * 5.0,
    }


def test_the_swap() -> None:
    params = weights(torch.bfloat16)
    optimizer = Pullback(torch.optim.SGD(params, lr=0.1), gain=0.1)
    for grads in gradients(3, torch.bfloat16):
        give(params, grads)
        optimizer.step()
    live = [p.detach().clone() for p in params]
    with optimizer.averaged():
        with pytest.raises(RuntimeError, match="weights are swapped in"):
            optimizer.step()
        for p in params:
            assert torch.equal(p.detach(), optimizer.state[p]["ema"].to(p.dtype))
    assert all(torch.equal(p.detach(), x) for p, x in zip(params, live, strict=True))
    assert optimizer.get_ema_beta_t() == pytest.approx(4**-0.2)


def test_schedulers_hooks_and_closures() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = Pullback(torch.optim.SGD([param], lr=1.0), gain=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.base.register_step_post_hook(lambda *_: calls.append("base"))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = param.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    scheduler.step()
    assert calls == ["pre", "base", "post"]
    assert optimizer.param_groups[0]["lr"] == optimizer.base.param_groups[0]["lr"] == 0.5
    optimizer.step(closure)


class OnTheCpu(torch.amp.GradScaler):
    def __init__(self) -> None:
        super().__init__("cpu", init_scale=1024.0, growth_interval=2)


@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_scaler_with_an_overflow(fused: bool) -> None:
    runs = []
    for scaled in (True, False):
        params = weights(torch.float32)[:2]
        optimizer = Pullback(torch.optim.AdamW(params, lr=0.01, fused=fused))
        scaler = OnTheCpu()
        for t, grads in enumerate(gradients(4, torch.float32)):
            grads = [g.clamp(-1, 1) for g in grads[:2]]
            if scaled:
                scaler.scale(torch.ones(()))  # it starts with the first loss
                scale = scaler.get_scale()
                give(params, [g * (math.inf if t == 1 else scale) for g in grads])
                scaler.step(optimizer)
                scaler.update()
                assert not hasattr(optimizer.base, "found_inf")
            elif t != 1:
                give(params, grads)
                optimizer.step()
        assert {s["pullback_step"].item() for s in optimizer.state.values()} == {3.0}
        runs.append((params, optimizer))
    assert_same_bits(*runs)


def test_an_error_in_the_base_leaves_no_average_behind() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = Pullback(torch.optim.SGD([param], lr=0.1), gain=0.5)
    give([param], [torch.ones(3)])
    handle = optimizer.base.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert not optimizer.state
    handle.remove()
    optimizer.step()


def test_copies_train_on_alike() -> None:
    params = weights(torch.float32)
    optimizer = Pullback(torch.optim.AdamW(params), gain=None, log_stats=True)
    source = list(gradients(6, torch.float32))
    for grads in source[:3]:
        give(params, grads)
        optimizer.step()
    twins = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for one in (optimizer, *twins):
        own = one.param_groups[0]["params"]
        for grads in source[3:]:
            give(own, grads)
            one.step()
        assert_same_bits((params, optimizer), (own, one))
        assert one is optimizer or own[0] is not params[0]


def test_a_compiled_training_step() -> None:
    param = torch.nn.Parameter(torch.ones(8))
    optimizer = Pullback(torch.optim.SGD([param], lr=0.1), gain=0.5)

    def step() -> None:
        param.grad = param.detach() * 0.5
        optimizer.step()

    run = torch.compile(step, backend="aot_eager")
    for _ in range(3):
        run()
    assert optimizer.state[param]["pullback_step"].item() == 3
