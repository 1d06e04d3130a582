"""Promise: every switch of the rule, in every dtype and on every backend, is the formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pace_bound import Reference
from pace_cases import CASES, assert_same_bits, gradients, weights

from pace_kernels import PACE, backends
from pace_kernels.definitions.pace import pace_scalars
from pace_kernels.torch_rules.pace import PaceOptions, pace_rule

STEPS = 40
BACKENDS = [name for name, row in backends().items() if row.available]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def train(dtype: torch.dtype, backend: str | None, steps: int = STEPS, **options: Any) -> tuple[list[Any], PACE]:
    params = weights(dtype)
    optimizer = PACE(params, backend=backend, **{"lr": 1e-2, **options})
    for grads in gradients(steps, dtype):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
    return params, optimizer


def test_the_native_kernel_is_here() -> None:
    """Otherwise the tests below would pass without ever running it."""
    assert backends()["cpu"].available, backends()["cpu"].reason


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.slow
def test_within_the_derived_bound_of_float64(case: str, dtype: torch.dtype, backend: str) -> None:
    params, optimizer = train(dtype, backend, **CASES[case])
    options = optimizer.param_groups[0]
    references = [Reference.start(p.detach(), **options) for p in weights(dtype)]
    for grads in gradients(STEPS, dtype):
        for reference, grad in zip(references, grads, strict=True):
            reference.step(grad, dtype)
    for param, reference in zip(params, references, strict=True):
        state = optimizer.state[param]
        held = {"exp_avg": reference.m, "exp_avg_sq": reference.v, "ema": reference.e}
        assert ("exp_avg" in state) == (options["betas"][0] > 0)
        assert ("ema" in state) == (options["lambda_pullback"] > 0 or options["use_ema_eval"])
        for value, bounded in [(param, reference.x), *((state[k], r) for k, r in held.items() if k in state)]:
            assert bool(((value.double() - bounded.value).abs() <= bounded.error).all())
        assert state["step"].item() == STEPS
    # The bound must mean something, and clamped and unclamped coordinates must both occur. Weights that are rounded at
    # every step lose up to 40 halves of a place: bfloat16 0.16, float16 0.02 of their value.
    meaning = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.03}[dtype]
    for reference in references[:2]:
        for bounded in (reference.x, reference.m, reference.v, reference.e):
            relative = bounded.error / bounded.value.abs().clamp(min=1e-3)
            assert float(relative.median()) < (meaning if bounded is reference.x or bounded is reference.e else 1e-4)
    if case in ("default", "strong pullback", "from the step"):
        share = sum(r.clamped for r in references) / sum(r.coordinates for r in references)
        assert 0.02 < share < 0.98


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_and_torch_give_the_same_bits(case: str, dtype: torch.dtype) -> None:
    assert_same_bits(train(dtype, "cpu", **CASES[case]), train(dtype, "torch", **CASES[case]))


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3}, {"betas": (0.5, 0.9)}, {"maximize": True}], ids=str)
def test_without_pullback_it_is_adamw(options: dict[str, Any]) -> None:
    params, optimizer = train(torch.float64, None, lambda_pullback=0.0, **options)
    natives, _ = train(torch.float32, "cpu", lambda_pullback=0.0, **options)
    theirs = weights(torch.float64)
    adamw = torch.optim.AdamW(theirs, lr=1e-2, foreach=False, **{"weight_decay": 0.01, **options})
    for grads in gradients(STEPS, torch.float64):
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad
        adamw.step()
    references = [Reference.start(p.detach(), **optimizer.param_groups[0]) for p in weights(torch.float32)]
    for grads in gradients(STEPS, torch.float32):
        for reference, grad in zip(references, grads, strict=True):
            reference.step(grad, torch.float32)
    for ours, other, native, reference in zip(params, theirs, natives, references, strict=True):
        # In float64 a few units of the last place, at the size of a weight.
        torch.testing.assert_close(ours, other, rtol=8 * 2.0**-52, atol=8 * 2.0**-52)
        start = 2.0**-24 * 5  # float64 starts at the same deviates, here rounded to float32
        assert bool(((native.double() - other).abs() <= reference.x.error + start).all())


def test_the_rule_written_out_by_hand() -> None:
    """Two steps of one coordinate in plain Python floats, line by line: no code is shared with the package."""
    lr, beta1, beta2, eps, decay, c, kappa, rho, gamma = 0.1, 0.9, 0.99, 1e-8, 0.1, 0.5, 0.7, 0.5, 2.0
    x = e = 1.5
    m = v = 0.0
    for t, g in ((1, 0.3), (2, -0.2)):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        D = math.sqrt(v / (1 - beta2**t)) + eps
        stepped = x * (1 - lr * decay) - lr * (m / (1 - beta1**t)) / D
        w = max((1 + gamma * max(0.0, t - rho)) ** (-kappa), 1e-4)
        x = stepped + min(lr * c * w / D, 1.0) * (e - x)
        e = e + w * (x - e)
    param = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    opt = PACE([param], lr, (beta1, beta2), eps, decay, c, ema_kappa=kappa, ema_rho=rho, ema_gamma=gamma)
    for g in (0.3, -0.2):
        param.grad = torch.tensor(g, dtype=torch.float64)
        opt.step()
    assert param.item() == pytest.approx(x, rel=1e-14)
    assert opt.state[param]["ema"].item() == pytest.approx(e, rel=1e-14)


def test_a_clamped_coordinate_lands_on_the_average_when_measured_from_the_step() -> None:
    param = torch.nn.Parameter(torch.tensor([2.0, -3.0]))
    optimizer = PACE([param], lr=1.0, lambda_pullback=1e6, pullback_from="step", weight_decay=0.0)
    param.grad = torch.tensor([1.0, -1.0])
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.tensor([2.0, -3.0]), rtol=2**-22, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["default", "strong pullback", "no clamp", "averaged AdamW", "everything"])
def test_statistics_are_what_they_say(case: str, backend: str) -> None:
    options = {**CASES[case], "log_stats": True}
    params, optimizer = train(torch.float32, backend, steps=STEPS - 1, **options)
    before = [(p.detach().double(), {k: v.double() for k, v in optimizer.state[p].items()}) for p in params]
    *_, grads = gradients(STEPS, torch.float32)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()
    group = optimizer.param_groups[0]
    o = PaceOptions(**optimizer._options(group))
    raw, effective, clamped, adamw, pullback, update = [], [], [], [], [], []
    for (x, state), g in zip(before, grads, strict=True):
        s = pace_scalars(o, float(STEPS))
        step = pace_rule(s, g.double(), x, state["exp_avg"], state["exp_avg_sq"], state["ema"], o.lambda_pullback > 0)
        w = 1.0 if o.ema_kappa is None else max((1 + o.ema_gamma * max(0, STEPS - o.ema_rho)) ** -o.ema_kappa, 1e-4)
        raw.append((w * step.inv_D).flatten())
        effective.append((o.lr * o.lambda_pullback * w * step.inv_D).flatten())
        clamped.append(effective[-1].clamp(max=1.0) if o.clamp_pullback else effective[-1])
        adamw.append(step.adamw.flatten())
        pullback.append(step.pullback.flatten())
        update.append(step.update.flatten())
    expected = {}
    for name, parts in (("raw_lambda", raw), ("effective_lambda", effective), ("lambda", clamped)):
        values = torch.cat(parts)
        expected |= {f"{name}_mean": values.mean(), f"{name}_max": values.max(), f"{name}_min": values.min()}
    expected["lambda_clipped_frac"] = (torch.cat(effective) >= 1).double().mean()
    for name, parts in (("adam_step_norm", adamw), ("pullback_norm", pullback), ("update_norm", update)):
        expected[name] = torch.cat(parts).norm()
    stats = optimizer.get_step_stats()
    assert stats.keys() == expected.keys()
    # A term has a relative error of at most 20 u, u = 2^-24: those of 1 / D and a few products. A float sum of a tile's
    # 256 terms adds 255 u. The pullback is a difference of e and x, both below 4: off by 2^-22 for each of 8,600.
    for name, value in expected.items():
        atol = math.sqrt(8600) * 2**-22 if name.endswith("norm") else 0.0
        assert stats[name] == pytest.approx(value.item(), rel=280 * 2**-24, abs=atol), name


def test_statistics_of_nothing() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = PACE([param], log_stats=True)
    assert optimizer.get_step_stats() == {}
    optimizer.step()
    assert optimizer.get_step_stats() == {}
    param.grad = torch.ones(3)
    optimizer.step()
    assert len(optimizer.get_step_stats()) == 13


def test_statistics_keep_nan_visible() -> None:
    param = torch.nn.Parameter(torch.ones(5))
    param.grad = torch.tensor([1.0, float("nan"), 1.0, 1.0, 1.0])
    optimizer = PACE([param], log_stats=True, backend="cpu")
    optimizer.step()
    stats = optimizer.get_step_stats()
    assert math.isnan(stats["raw_lambda_max"]) and math.isnan(stats["update_norm"])


def test_averaging_weight_of_the_first_group_that_averages() -> None:
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = PACE(
        [{"params": [a], "lambda_pullback": 0.0, "use_ema_eval": False}, {"params": [b], "ema_kappa": 0.5}]
    )
    assert optimizer.get_ema_beta_t() == 1.0
    for _ in range(3):
        a.grad = b.grad = torch.ones(2)
        optimizer.step()
    assert optimizer.get_ema_beta_t() == pytest.approx(4**-0.5)
    optimizer.param_groups[1]["ema_kappa"] = None
    assert optimizer.get_ema_beta_t() == 0.01
    assert PACE([a], lambda_pullback=0.0, use_ema_eval=False).get_ema_beta_t() is None


def test_the_torch_rule_compiles_in_one_graph() -> None:
    o = PaceOptions(**PACE([torch.nn.Parameter(torch.ones(1))])._options(PACE([torch.zeros(1)]).param_groups[0]))
    s = pace_scalars(o, 3.0)
    operands = [torch.randn(50) for _ in range(5)]
    operands[3].abs_()
    compiled = torch.compile(lambda g, x, m, v, e: pace_rule(s, g, x, m, v, e)[:4], fullgraph=True)
    for ours, expected in zip(compiled(*operands), pace_rule(s, *operands), strict=False):
        # The compiler may contract to fused multiply-adds: a few units.
        torch.testing.assert_close(ours, expected, rtol=8 * 2**-23, atol=1e-6)
