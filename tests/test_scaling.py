"""Promise: gradient scales, clipping within the pass, steps that are left undone and learning rates in tensors do what
they say and nothing else, on every backend."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mada_cases import INSIDE, SOON
from pace_cases import gradients as all_gradients
from pace_cases import weights as all_weights
from test_mada_native import LEARN, OPTIONS, operands
from test_native import OPTIONS as PACE_OPTIONS
from test_native import operands as pace_operands
from torch import Tensor

from pace_kernels import MADA, PACE, backends, clip_coefficient
from pace_kernels.torch_rules import common

BACKENDS = ["cpu", "torch"]
DTYPES = [torch.float32, torch.bfloat16]
Gradients = list[list[Tensor]]
Training = tuple[list[Any], Any]  # parameters and their optimizer

CASES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "PACE": (PACE, {"log_stats": True}),
    "PACE, from the step": (PACE, {"pullback_from": "step", "maximize": True, "ema_update_freq": 2, "log_stats": True}),
    "PACE, AdamW": (PACE, {"lambda_pullback": 0.0, "use_ema_eval": False, "betas": (0.0, 0.99)}),
    "PACE, capturable": (PACE, {"capturable": True}),
    "MADA": (MADA, {**INSIDE, **SOON, "hyper_momentum": 0.3}),
    "MADA, pulled": (MADA, {**INSIDE, **SOON, "lambda_pullback": 2.0, "pullback_from": "step"}),
    "MADA, maximize": (MADA, {**INSIDE, **SOON, "maximize": True, "second_moment": "max"}),
    "MADA, capturable": (MADA, {**INSIDE, **SOON, "capturable": True, "lambda_pullback": 0.5}),
    "MADA, no differences": (MADA, {**INSIDE, **SOON, "beta3": 0.0, "learn": ("rho", "c")}),
    "Adan": (partial(MADA.preset, "adan"), {}),
    "Lion": (partial(MADA.preset, "lion"), {"use_ema_eval": True}),
    "AdamW": (partial(MADA.preset, "adamw"), {"lambda_pullback": 0.5}),
}


def weights(dtype: torch.dtype) -> list[Any]:
    """A matrix, a vector and a number: what the kernels make of other shapes is tested elsewhere."""
    return all_weights(dtype)[:3]


def gradients(steps: int, dtype: torch.dtype) -> Iterator[list[Tensor]]:
    return (grads[:3] for grads in all_gradients(steps, dtype))


def start(case: str, backend: str, dtype: torch.dtype = torch.float32, **options: Any) -> Training:
    build, own = CASES[case]
    params = weights(dtype)
    return params, build(params, backend=backend, **{"lr": 1e-2, **own, **options})


def take(training: Training, grads: Iterable[Tensor], clip_coef: Any = None, **scaling: Tensor) -> None:
    """A step with these gradients; ``scaling`` is set on the optimizer for its time, as GradScaler does it."""
    params, optimizer = training
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    for name, value in scaling.items():
        setattr(optimizer, name, value)
    optimizer.step() if clip_coef is None else optimizer.step(clip_coef=clip_coef)
    for name in scaling:
        delattr(optimizer, name)
    for param, grad in zip(params, grads, strict=True):
        assert torch.equal(bits(param.grad), bits(grad))


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def everything(training: Training) -> dict[str, Any]:
    """Weights, states, learned coefficients and options of a training, tensors as their bits."""
    params, optimizer = training
    found: dict[str, Any] = {}
    for i, param in enumerate(params):
        found[f"{i}"] = bits(param)
        found |= {f"{i}.{name}": bits(value) for name, value in optimizer.state.get(param, {}).items()}
    for g, group in enumerate(optimizer.param_groups):
        options = {k: v for k, v in group.items() if k not in ("params", "capturable")}
        found |= {f"group {g}.{k}": bits(v) if isinstance(v, Tensor) else v for k, v in options.items()}
    if isinstance(optimizer, PACE):
        found["stats"] = str(optimizer.get_step_stats())
    return found


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    def same(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else bool(x == y)

    return [k for k in sorted(a.keys() | b.keys()) if k not in a or k not in b or not same(a[k], b[k])]


def assert_same(a: Training, b: Training) -> None:
    assert differences(everything(a), everything(b)) == []


def kept(optimizer: Any, param: Tensor) -> Tensor:
    """The gradient as the last step of these optimizers used it, read off their states."""
    state = optimizer.state[param]
    return state["last_grad"] if "last_grad" in state else state["exp_avg"] / 0.5


every_case = pytest.mark.parametrize("case", CASES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# ---- the factor of the gradient ----


@every_case
@every_backend
@every_dtype
def test_a_scale_of_a_power_of_two_changes_no_bit(case: str, backend: str, dtype: torch.dtype) -> None:
    plain, scaled, clipped, both = (start(case, backend, dtype) for _ in range(4))
    S = 2.0**16
    for grads in gradients(6, dtype):
        take(plain, grads)
        take(scaled, [g * S for g in grads], grad_scale=torch.tensor([S]))
        take(clipped, grads, clip_coef=0.3)
        take(both, [g * S for g in grads], clip_coef=0.3, grad_scale=torch.tensor(S))
    assert_same(plain, scaled)
    assert_same(clipped, both)
    assert differences(everything(plain), everything(clipped)) != []


FACTORS = [(3.0, None), (None, 0.7), (3.0, 0.7), (1e-3, 0.1), (65536.0, 1.0), (None, 0.0), (7.0, 0.0)]


@pytest.mark.parametrize(("scale", "clip"), FACTORS)
@pytest.mark.parametrize("maximize", [False, True])
@every_backend
@every_dtype
def test_the_gradient_is_multiplied_once_with_a_factor_rounded_once(
    scale: float | None, clip: float | None, maximize: bool, backend: str, dtype: torch.dtype
) -> None:
    one = np.float32(1.0)
    factor = (one if clip is None else np.float32(clip)) / (one if scale is None else np.float32(scale))
    assert factor.dtype == np.float32
    scaling = {} if scale is None else {"grad_scale": torch.tensor(scale)}
    # From a moment of 0 and with β1 = 1/2, PACE's first moment is half the gradient, without a rounding.
    pace = start("PACE", backend, dtype, betas=(0.5, 0.9), maximize=maximize)
    mada, adan = (start(case, backend, dtype, maximize=maximize) for case in ("MADA", "Adan"))
    (grads,) = gradients(1, dtype)
    for params, optimizer in (pace, mada, adan):
        take((params, optimizer), grads, clip_coef=clip, **scaling)
        for param, grad in zip(params, grads, strict=True):
            wanted = grad.float().numpy() * factor
            assert torch.equal(kept(optimizer, param), torch.from_numpy(np.asarray(-wanted if maximize else wanted)))


@every_case
@every_backend
def test_clipping_within_the_pass_is_clipping_before_it(case: str, backend: str) -> None:
    within, before = start(case, backend), start(case, backend)
    for grads in gradients(6, torch.float32):
        for param, grad in zip(before[0], grads, strict=True):
            param.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_(before[0], 1.0)
        before[1].step()
        for param, grad in zip(within[0], grads, strict=True):
            param.grad = grad
        coefficient, norm = clip_coefficient(within[0], 1.0)
        assert norm > 1.0 > coefficient
        take(within, grads, clip_coef=coefficient)
    assert_same(within, before)


@every_backend
def test_clipped_bfloat16_gradients_are_not_rounded_to_bfloat16(backend: str) -> None:
    """Within the pass the product has float32's unit of rounding, 2^-24. Before it each of four has bfloat16's, 2^-8: a
    tensor's norm, the total, the coefficient, the product."""
    within, before = (start("Adan", backend, torch.bfloat16) for _ in range(2))
    (grads,) = gradients(1, torch.bfloat16)
    for params in (within[0], before[0]):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
    coefficient, _ = clip_coefficient(within[0], 1.0)
    torch.nn.utils.clip_grad_norm_(before[0], 1.0)
    before[1].step()
    take(within, grads, clip_coef=coefficient)
    worst = 0.0
    for p, q, grad in zip(within[0], before[0], grads, strict=True):
        exact = grad.double() * coefficient.double()
        ours, theirs = (kept(t[1], a).double() - exact for t, a in ((within, p), (before, q)))
        assert (ours.abs() <= 2**-24 * exact.abs()).all()
        assert (theirs.abs() <= ((1 + 2**-8) ** 4 - 1) * exact.abs()).all()
        worst = max(worst, (theirs / exact).abs().max().item() if p.numel() else 0.0)
    assert worst > 2**-10


@every_backend
@pytest.mark.parametrize("case", ["PACE", "MADA"])
def test_a_coefficient_may_be_a_number_or_a_tensor(case: str, backend: str) -> None:
    kinds: list[Any] = [0.3, np.float64(0.3), *(torch.tensor(0.3, dtype=d) for d in (torch.float32, torch.float64))]
    kinds += [torch.tensor([0.3]), torch.tensor([[0.3]], dtype=torch.float64), torch.tensor(0.3, requires_grad=True)]
    runs = [start(case, backend) for _ in kinds]
    for grads in gradients(5, torch.float32):
        for run, kind in zip(runs, kinds, strict=True):
            take(run, grads, clip_coef=kind)
    for run in runs[1:]:
        assert_same(runs[0], run)


REFUSED: list[tuple[Any, type[Exception]]] = [
    (-0.5, ValueError), (math.nan, ValueError), (math.inf, ValueError), (torch.ones(2), ValueError),
    (torch.ones(0), ValueError), ("half", TypeError), (True, TypeError),
]  # fmt: skip


@pytest.mark.parametrize(("value", "error"), REFUSED, ids=[str(v) for v, _ in REFUSED])
@pytest.mark.parametrize("name", ["clip_coef", "grad_scale", "found_inf"])
@pytest.mark.parametrize("case", ["PACE", "MADA"])
def test_what_is_no_factor_is_refused_and_changes_nothing(
    case: str, name: str, value: Any, error: type[Exception]
) -> None:
    training = start(case, "cpu")
    first, second = gradients(2, torch.float32)
    take(training, first)
    before = everything(training)
    with pytest.raises(error, match=f"{name} must be a number|{name} must be finite and >= 0"):
        take(training, second, **{name: value})
    assert differences(everything(training), before) == []


@every_backend
def test_closures_are_clipped_too(backend: str) -> None:
    runs = [start("PACE", backend), start("PACE", backend)]
    for t in range(3):
        for (params, optimizer), inside in zip(runs, (True, False), strict=True):

            def closure(params: list[Any] = params, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = torch.stack([(p * p).sum() for p in params]).sum()
                loss.backward()
                return loss

            if inside:
                assert optimizer.step(closure, clip_coef=0.25 * t) > 0
            else:
                closure()
                for p in params:
                    p.grad *= 0.25 * t
                optimizer.step()
    assert_same(*runs)


# ---- clip_coefficient ----


@pytest.mark.parametrize("norm_type", [1, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.5, 1e12])
@every_dtype
def test_the_coefficient_is_that_of_clip_grad_norm(norm_type: float, max_norm: float, dtype: torch.dtype) -> None:
    params = [*weights(dtype), torch.nn.Parameter(torch.ones(3))]  # the last one has no gradient
    (grads,) = gradients(1, dtype)
    for param, grad in zip(params[:-1], grads, strict=True):
        param.grad = grad.clone()
    coefficient, norm = clip_coefficient(iter(params), max_norm, norm_type)
    S = 2.0**10
    for param, grad in zip(params, grads, strict=False):
        assert torch.equal(param.grad, grad)
        param.grad = grad * S
    # Sums of squares scale without a rounding, but torch's powers are good to 4 units or so: twice a power, 4/3 units
    # after its root, and twice a root.
    tolerance = 2 * (4 / 3 + 4) * 2**-24 if norm_type == 3.0 else 0.0
    wanted = torch.stack([coefficient, norm])
    assert wanted.dtype == torch.float32
    for scale in (torch.tensor([S]), S):
        scaled = clip_coefficient(params, max_norm, norm_type, grad_scale=scale)
        torch.testing.assert_close(torch.stack(scaled), wanted, rtol=tolerance, atol=0.0)
    for param, grad in zip(params, grads, strict=False):
        param.grad = grad.clone()
    theirs = torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type)
    assert norm.dim() == coefficient.dim() == 0 and (coefficient < 1.0) == (max_norm < 1.0)
    # Theirs are equal in float32. In bfloat16 they round the norm twice, and the coefficient and the product once more.
    u = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(theirs.float(), norm, rtol=(1 + u) ** 2 - 1, atol=0.0)
    for param, grad in zip(params, grads, strict=False):
        torch.testing.assert_close(param.grad.float(), grad.float() * coefficient, rtol=(1 + u) ** 4 - 1, atol=0.0)


def test_the_norm_of_scaled_float16_gradients_does_not_overflow() -> None:
    param = torch.nn.Parameter(torch.zeros(100, dtype=torch.float16))
    param.grad = torch.full_like(param, 1e4)  # 100 squares are 1e10, float16 ends at 65504
    coefficient, norm = clip_coefficient([param], 1.0, grad_scale=65536.0)
    assert norm.item() == pytest.approx(param.grad[0].item() * 10 / 65536, rel=2**-22)
    assert coefficient.item() == pytest.approx(min(1 / (norm.item() + 1e-6), 1.0), rel=2**-22)


def test_the_coefficient_of_one_parameter_and_of_none() -> None:
    param = torch.nn.Parameter(torch.zeros(4))
    assert [a.item() for a in clip_coefficient([param], 1.0)] == [1.0, 0.0]
    param.grad = torch.full((4,), 3.0)
    assert [round(a.item(), 5) for a in clip_coefficient(param, 1.5)] == [0.25, 6.0]
    param.grad.fill_(1e-6)
    small = [a.item() for a in clip_coefficient(param, 1e-6)]
    assert small == pytest.approx([1 / 3, 2e-6], rel=4 * 2**-24)  # the 1e-6 beside the norm counts; 4 roundings
    param.grad[0] = math.inf
    assert [a.item() for a in clip_coefficient(param, 1.5)] == [0.0, math.inf]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"max_norm": 0.0}, "max_norm"), ({"max_norm": -1.0}, "max_norm"), ({"max_norm": math.nan}, "max_norm"),
     ({"max_norm": math.inf}, "max_norm"), ({"norm_type": 0.0}, "norm_type"), ({"norm_type": -2.0}, "norm_type"),
     ({"norm_type": math.nan}, "norm_type"), ({"grad_scale": torch.ones(2)}, "grad_scale"),
     ({"grad_scale": 0.0}, "grad_scale"), ({"grad_scale": -2.0}, "grad_scale")],
    ids=str,
)  # fmt: skip
def test_clip_coefficient_refuses(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        clip_coefficient(weights(torch.float32), **{"max_norm": 1.0, **arguments})


# ---- steps that are left undone ----


def spoiled(grads: list[Tensor], t: int) -> list[Tensor]:
    return [torch.full_like(g, (math.inf, math.nan, -math.inf)[t % 3]) for g in grads]


def follow(training: Training, wanted: Gradients, pattern: Iterable[bool], found: float = 1.0) -> None:
    """Takes the wanted gradients, and before each of them, where the pattern says so, a step to be left undone."""
    S = 2.0**8
    for t, (skips, grads) in enumerate(zip(pattern, wanted, strict=True)):
        if skips:
            before = everything(training) if training[1].state else {}
            take(training, spoiled(grads, t), grad_scale=torch.tensor(S), found_inf=torch.tensor([found]))
            after = everything(training)
            # The statistics are of the step, which had none; at the first one, states are created.
            assert set(differences(before, after)) <= {"stats"} or not before
        take(training, [g * S for g in grads], grad_scale=torch.tensor(S), found_inf=torch.tensor(0.0))


@every_case
@pytest.mark.parametrize(
    ("backend", "dtype"), [("cpu", torch.float32), ("cpu", torch.bfloat16), ("torch", torch.float32)]
)
def test_a_step_left_undone_leaves_no_trace(case: str, backend: str, dtype: torch.dtype) -> None:
    undone, zero, plain = (start(case, backend, dtype) for _ in range(3))
    wanted = list(gradients(8, dtype))
    follow(undone, wanted, [True, False, True, True, False, True, False, True], found=2.0)
    for grads in wanted:
        take(zero, grads, found_inf=torch.tensor(0.0))
        take(plain, grads)
    assert_same(undone, plain)
    assert_same(zero, plain)
    if case.startswith("MADA"):  # the coefficients have moved
        assert undone[1].coefficients != start(case, backend)[1].coefficients


@every_case
@every_backend
def test_a_first_step_left_undone_leaves_no_states(case: str, backend: str) -> None:
    """So that the average starts at the weights before the first step that counts, should they be loaded until then."""
    training, fresh = start(case, backend), start(case, backend)
    (grads,) = gradients(1, torch.float32)
    take(training, spoiled(grads, 1), found_inf=torch.tensor(1.0))
    for param, untouched in zip(training[0], fresh[0], strict=True):
        assert torch.equal(param, untouched) and not training[1].state.get(param)
    if isinstance(training[1], PACE):
        assert training[1].get_step_stats() == {}


@given(st.sampled_from(sorted(CASES)), st.sampled_from(BACKENDS), st.lists(st.booleans(), min_size=2, max_size=9))
@settings(max_examples=25, deadline=None)
def test_any_pattern_of_steps_left_undone(case: str, backend: str, pattern: list[bool]) -> None:
    undone, plain = start(case, backend), start(case, backend)
    wanted = list(gradients(len(pattern), torch.float32))
    follow(undone, wanted, pattern)
    for grads in wanted:
        take(plain, grads)
    assert_same(undone, plain)


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules in torch take CPU tensors as those of a device: nothing is read, results are selected."""

    class Keep(common.Keep):
        def __init__(self, found_inf: Tensor | None) -> None:
            self.all = False
            self._found = None if found_inf is None else found_inf.reshape(()) != 0

    there = common.grad_factor

    def grad_factor(*given: Tensor | None) -> Any:
        return torch.tensor(there(*given), dtype=torch.float32)

    for module in ("common", "mada"):
        monkeypatch.setattr(f"pace_kernels.torch_rules.{module}.Keep", Keep)
    monkeypatch.setattr("pace_kernels.torch_rules.common.grad_factor", grad_factor)
    monkeypatch.setattr("pace_kernels.torch_rules.mada._numbers", lambda row: row.unbind())


@pytest.mark.parametrize("case", [case for case in CASES if "capturable" not in case])
def test_a_step_left_undone_on_a_device(case: str, as_on_a_device: None) -> None:
    undone, plain = (start(case, "torch", capturable=True) for _ in range(2))
    wanted = list(gradients(8, torch.float32))
    follow(undone, wanted, [True, False, True, True, False, False, True, True])
    for grads in wanted:
        take(plain, grads)
    assert_same(undone, plain)


@pytest.mark.parametrize("values", [{"beta3": 0.5}, {"rho": 0.2}, {"second_moment": "max"}], ids=str)
@every_backend
def test_options_that_change_at_a_step_left_undone(values: dict[str, Any], backend: str) -> None:
    options = {"beta3": 0.0, "rho": 0.5, "learn": ("c",), "gamma": 0.7}
    undone, plain = (start("MADA", backend, **options) for _ in range(2))
    wanted = list(gradients(8, torch.float32))
    follow(undone, wanted[:4], [False] * 4)
    undone[1].param_groups[0].update(values)
    take(undone, spoiled(wanted[0], 0), found_inf=torch.tensor(1.0))
    follow(undone, wanted[4:], [False] * 4)
    for t, grads in enumerate(wanted):
        if t == 4:
            plain[1].param_groups[0].update(values)
        take(plain, grads)
    assert_same(undone, plain)


# ---- GradScaler ----


def clipped_before(scaler: torch.amp.GradScaler, params: list[Any], optimizer: Any) -> None:
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(params, 0.5)
    scaler.step(optimizer)


def unscaled_before(scaler: torch.amp.GradScaler, params: list[Any], optimizer: Any) -> None:
    scaler.unscale_(optimizer)
    scaler.step(optimizer, clip_coef=clip_coefficient(params, 0.5)[0])


def within_the_pass(scaler: torch.amp.GradScaler, params: list[Any], optimizer: Any) -> None:
    coefficient, _ = clip_coefficient(params, 0.5, grad_scale=scaler._get_scale_async())
    scaler.step(optimizer, clip_coef=coefficient)


def not_at_all(scaler: torch.amp.GradScaler, params: list[Any], optimizer: Any) -> None:
    scaler.step(optimizer)


def linear_loss(params: list[Any], grads: list[Tensor]) -> Tensor:
    """Its gradients are those given; so are those of a multiple, but for the factor."""
    return torch.stack([(p * g).sum() for p, g in zip(params, grads, strict=True)]).sum()


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("how", [not_at_all, clipped_before, unscaled_before, within_the_pass])
@pytest.mark.parametrize("case", ["PACE", "MADA", "MADA, capturable", "Adan", "Lion"])
@every_backend
def test_training_with_a_grad_scaler(case: str, how: Callable[..., None], backend: str, fused: bool | None) -> None:
    """With fused=True it leaves the gradients to the step; without, it unscales them, and calls no step that overflows.
    The scales are powers of two: both give the same bits."""
    OVERFLOWS, PLAIN, SAVED = {2, 7}, {0, 1, 9}, 5
    (params, optimizer), reference = start(case, backend, fused=fused), start(case, backend)

    def new_scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)

    scaler, scale, streak = new_scaler(), 2.0**10, 0
    for t, grads in enumerate(gradients(11, torch.float32)):
        optimizer.zero_grad()
        if t in PLAIN:
            linear_loss(params, grads).backward()
            optimizer.step()
        else:
            scaler.scale(linear_loss(params, grads)).backward()
            if t in OVERFLOWS:
                params[1].grad[3] = (math.inf, math.nan)[t % 2]
            before = everything((params, optimizer))
            how(scaler, params, optimizer)
            if how in (not_at_all, within_the_pass):  # nobody went over the gradients before
                assert torch.equal(params[0].grad, grads[0] * scale if fused else grads[0])
            scaler.update()
            if t in OVERFLOWS:
                scale, streak = scale / 2, 0
                assert set(differences(everything((params, optimizer)), before)) <= {"stats"}
            else:
                scale, streak = (scale, streak + 1) if streak == 0 else (2 * scale, 0)
            assert scaler.get_scale() == scale
            assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
        if t not in OVERFLOWS:
            for p, g in zip(reference[0], grads, strict=True):
                p.grad = g.clone()
            if t not in PLAIN and how is not not_at_all:
                torch.nn.utils.clip_grad_norm_(reference[0], 0.5)
            reference[1].step()
        if t == SAVED:
            saved = copy.deepcopy([[p.detach() for p in params], optimizer.state_dict(), scaler.state_dict()])
            (params, optimizer), scaler = start(case, backend, fused=fused), new_scaler()
            optimizer.load_state_dict(saved[1])
            scaler.load_state_dict(saved[2])
            with torch.no_grad():
                for p, x in zip(params, saved[0], strict=True):
                    p.copy_(x)
    assert_same((params, optimizer), reference)
    assert all(optimizer.state[p]["step"].item() == 11 - len(OVERFLOWS) for p in params)


# ---- learning rates in tensors, capturable ----


@every_case
@every_backend
@pytest.mark.parametrize("lr", [torch.tensor(1e-2), torch.tensor([1e-2], dtype=torch.float64)], ids=["0-dim", "1-dim"])
def test_a_learning_rate_in_a_tensor_may_change_in_place(case: str, backend: str, lr: Tensor) -> None:
    lr = lr.clone()
    tensor, number = start(case, backend, lr=lr), start(case, backend)
    for t, grads in enumerate(gradients(6, torch.float32)):
        lr.fill_(1e-2 / (1 + t))
        number[1].param_groups[0]["lr"] = lr.item()
        take(tensor, grads)
        take(number, grads)
    number[1].param_groups[0]["lr"] = lr
    assert_same(tensor, number)


@pytest.mark.parametrize("case", [case for case in CASES if "capturable" not in case])
@every_dtype
def test_capturable_changes_no_bit(case: str, dtype: torch.dtype) -> None:
    runs = [start(case, "cpu", dtype, capturable=capturable) for capturable in (False, True)]
    for t, grads in enumerate(gradients(12, dtype)):
        for run in runs:
            take(run, grads)
        if t == 6:  # each goes on as the other one
            saved = [copy.deepcopy((r[1].state_dict(), [p.detach() for p in r[0]])) for r in runs]
            runs = [start(case, "cpu", dtype) for _ in runs]
            for (params, optimizer), (state, values), capturable in zip(runs, saved, (True, False), strict=True):
                optimizer.load_state_dict(state)
                optimizer.param_groups[0]["capturable"] = capturable
                with torch.no_grad():
                    for p, x in zip(params, values, strict=True):
                        p.copy_(x)
    assert_same(*runs)


@every_backend
def test_steps_under_torch_compile_are_clipped(backend: str) -> None:
    torch._dynamo.reset()
    runs = [start("PACE", backend), start("PACE", backend)]

    def step(params: list[Any], optimizer: Any) -> None:
        optimizer.zero_grad()
        torch.stack([(p * p).sum() for p in params]).sum().backward()
        optimizer.step(clip_coef=clip_coefficient(params, 0.5)[0])

    compiled = torch.compile(step, backend="eager")
    for _ in range(3):
        compiled(*runs[0])
        step(*runs[1])
    assert_same(*runs)


# ---- differences of gradients, and states of an earlier version ----


@pytest.mark.parametrize("step", [0, 1, 5])
@pytest.mark.parametrize("case", ["MADA", "MADA, no differences", "Adan", "Lion", "AdamW"])
@every_backend
def test_states_of_an_earlier_version_go_on(case: str, step: int, backend: str) -> None:
    """It kept ``last_scalars`` only where something is learned, with 1 where the last step is to be redone."""
    training = start(case, backend)
    wanted = list(gradients(9, torch.float32))
    for grads in wanted[:step]:
        take(training, grads)
    if step == 0:  # as torch.distributed.checkpoint creates them: by a step that is none
        training[1].param_groups[0]["lr"] = 0.0
        take(training, [torch.zeros_like(g) for g in wanted[0]])
        training[1].param_groups[0]["lr"] = 1e-2
    saved = copy.deepcopy(training[1].state_dict())
    for group in saved["param_groups"]:
        for later in ("format_version", "state_names", "skipped_steps", "last_options", "frozen"):
            del group[later]
    for state in saved["state"].values():
        if training[1].param_groups[0]["learn"]:
            assert state["last_scalars"][0].item() == (1.0 if step else -1.0)
        else:
            state.pop("last_scalars", None)
    resumed = start(case, backend)
    resumed[1].load_state_dict(saved)
    with torch.no_grad():
        for p, x in zip(resumed[0], training[0], strict=True):
            p.copy_(x)
    for grads in wanted[step:]:
        take(training, grads)
        take(resumed, grads)
    assert_same(training, resumed)


@every_backend
@pytest.mark.parametrize("learn", [("c",), ()], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_where_beta3_is_turned_on_the_first_difference_is_0(
    learn: tuple[str, ...], maximize: bool, backend: str
) -> None:
    """n ← β3 n + (1 − β3) d, from 0: the first n is 0, the second (1 − β3)(g − g₋)."""
    options = {"learn": learn, "beta3": 0.0, "rho": 1.0, "maximize": maximize}
    params = weights(torch.float32)
    training = params, (optimizer := MADA(params, lr=1e-2, backend=backend, **options))
    wanted = list(gradients(6, torch.float32))
    for t, grads in enumerate(wanted):
        if t == 3:
            optimizer.param_groups[0]["beta3"] = 0.25
        take(training, grads)
        if t == 3 and not learn:
            assert not any(optimizer.state[p]["exp_avg_diff"].any() for p in params)
        if t == 4:
            optimizer.freeze()  # brings moments up to date that are one step behind
            for p, g, last in zip(params, grads, wanted[3], strict=True):
                d = last - g if maximize else g - last
                assert torch.equal(optimizer.state[p]["exp_avg_diff"], 0.75 * d)
                assert torch.equal(optimizer.state[p]["last_grad"], -g if maximize else g)
    for p, g, last, before in zip(params, wanted[5], wanted[4], wanted[3], strict=True):
        d, earlier = (last - g, before - last) if maximize else (g - last, last - before)
        assert torch.equal(optimizer.state[p]["exp_avg_diff"], 0.25 * (0.75 * earlier) + 0.75 * d)


# ---- the operators ----

GIVEN = {"lr_tensor": 1e-2, "grad_scale": 4.0, "clip_coef": 0.5, "found_inf": 0.0}


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_opcheck_with_everything_given(found: float) -> None:
    given = {name: torch.tensor(value) for name, value in GIVEN.items()} | {"found_inf": torch.tensor(found)}
    pace, mada, learn = (
        getattr(torch.ops.pace_kernels, n).default for n in ("pace_step_", "mada_step_", "mada_learn_")
    )
    torch.library.opcheck(pace, (*pace_operands(), None), {**PACE_OPTIONS, **given})
    torch.library.opcheck(mada, tuple(operands().values()), {**OPTIONS, **given})
    six = [torch.rand(6, dtype=torch.float64) for _ in range(3)]
    sums = [torch.rand(7, dtype=torch.float64)]
    arguments = (*six, torch.zeros((), dtype=torch.float64), sums, given["found_inf"])
    torch.library.opcheck(learn, arguments, LEARN)


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("operator", ["pace_step_", "mada_step_"])
@pytest.mark.parametrize("value", [torch.ones(2), torch.ones(0), torch.ones(1, dtype=torch.int64)], ids=str)
def test_operators_refuse_what_is_not_one_float32_element(operator: str, name: str, value: Tensor) -> None:
    lists = [*pace_operands(), None] if operator == "pace_step_" else list(operands().values())
    options = PACE_OPTIONS if operator == "pace_step_" else OPTIONS
    before = copy.deepcopy(lists)
    wanted = "float32 or float64" if name == "lr_tensor" else "float32"
    with pytest.raises(RuntimeError, match=f"{name} must be a CPU tensor, {wanted}, with one element"):
        getattr(torch.ops.pace_kernels, operator)(*lists, **{**options, name: value})
    assert str(lists) == str(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_backend
def test_lr_tensor_is_in_place_of_lr(dtype: torch.dtype, backend: str) -> None:
    step = backends()[backend].op("pace_step_")
    lr, first = torch.tensor([0.03], dtype=dtype), pace_operands()
    second = copy.deepcopy(first)
    step(*first, **{**PACE_OPTIONS, "lr": lr.item()})
    step(*second, None, lr, **{**PACE_OPTIONS, "lr": 7.0})
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("where", [*BACKENDS, "as on a device"])
def test_learning_rests_where_the_step_is_left_undone(where: str, request: pytest.FixtureRequest) -> None:
    if where not in BACKENDS:
        request.getfixturevalue("as_on_a_device")
    learn = backends()[where if where in BACKENDS else "torch"].op("mada_learn_")
    tensors = [torch.rand(6, dtype=torch.float64) for _ in range(3)] + [torch.ones((), dtype=torch.float64)]
    before = copy.deepcopy(tensors)
    sums = [torch.ones(7, dtype=torch.float64)]
    learn(*tensors, sums, torch.tensor(1.0), **LEARN)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    learn(*tensors, sums, torch.tensor(0.0), **LEARN)
    assert not any(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
