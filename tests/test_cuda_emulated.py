"""Promise: the CUDA kernels, executed from their real PTX with the real plan of launches, give the CPU kernels' bits
for every switch, format and layout; they read each tensor once and write it once; no barrier is missing."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import mada_cases
import numpy as np
import pace_cases
import pytest
import step_count_cases
import test_schedule_free
import torch
from emulated import build
from emulated.device import RULES, Device, Operand, translated
from pace_cases import assert_same_bits, gradients, weights

from pace_kernels import MADA, PACE, Pullback, ScheduleFreeAdamW
from pace_kernels.mada_options import step_options
from pace_kernels.ops import COEFFICIENTS, PACE_STATS
from pace_kernels.torch_rules.mada import MadaMoments, MadaOptions, hypergradient_terms, last_step, mada_rule

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))

STEPS = 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
U = 2.0**-24


def device(**options: Any) -> Device:
    return Device(rng=np.random.default_rng(0), **options)


def train(
    kind: Any,
    on: Device | None,
    dtype: torch.dtype,
    path: list[list[float]] | None = None,
    grad_dtype: torch.dtype | None = None,
    steps: int = STEPS,
    **options: Any,
) -> tuple[list[Any], Any]:
    """``path``: MADA's coefficients to step with, from a run before, since sums differ in their last places."""
    params = weights(dtype)
    with on.in_place_of_the_cpu() if on is not None else nullcontext():
        optimizer = kind(params, **{"lr": 1e-2, **options}, backend="cpu")
        values = optimizer.param_groups[0].get("coefficient_values")
        for t, grads in enumerate(gradients(steps, grad_dtype or dtype)):
            for param, grad in zip(params, grads, strict=True):
                if grad_dtype is not None:
                    param.grad_dtype = grad_dtype
                param.grad = grad
            if path is not None and values is not None:
                if t < len(path):
                    values.copy_(torch.tensor(path[t], dtype=torch.float64))
                else:
                    path.append(values.tolist())
            optimizer.step()
    return params, optimizer


def test_only_where_a_tensor_begins_is_an_address() -> None:
    """A word of a switch and padding, in which a part of an address was left, was changed once in 20,000 tests."""
    tensor, room = 0x7F2C00001000, 0x7F2C00009000
    operands = [Operand("e", tensor, 4096, True, 1, 0x500003), Operand("workspace", room, 64, True, 0, 0x900000)]
    words = np.array([tensor, tensor + 1, tensor + 0x100, tensor - 1, room + 8, room + 64, 1], np.uint64)
    there = np.frombuffer(translated(words.tobytes(), operands), np.uint64)
    assert there.tolist() == [0x500003, 0x500004, tensor + 0x100, tensor - 1, 0x900008, room + 64, 1]


# ---- the same bits as the CPU ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", pace_cases.CASES)
def test_pace_gives_the_bits_of_the_cpu(case: str, dtype: torch.dtype) -> None:
    on = device()
    assert_same_bits(
        train(PACE, on, dtype, **pace_cases.CASES[case]), train(PACE, None, dtype, **pace_cases.CASES[case])
    )
    assert on.launches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", mada_cases.CASES)
def test_mada_gives_the_bits_of_the_cpu(case: str, dtype: torch.dtype) -> None:
    on = device()
    options = mada_cases.CASES[case]
    path: list[list[float]] = []
    assert_same_bits(train(MADA, on, dtype, path, **options), train(MADA, None, dtype, path, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", test_schedule_free.CASES)
def test_schedule_free_gives_the_bits_of_the_cpu(case: str, dtype: torch.dtype) -> None:
    """With the schedule on the host; and on the device, where the operator finds it in a tensor."""
    on, options = device(), test_schedule_free.CASES[case]
    ours, cpus = (train(ScheduleFreeAdamW, where, dtype, **options) for where in (on, None))
    assert_same_bits(ours, cpus)
    assert set(on.launches) == {build_name for build_name in on.launches if "ScheduleFree<0u>" in build_name}
    found = []
    for op in (on.schedule_free_step_, torch.ops.pace_kernels.schedule_free_step_):
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(5000, generator=generator).to(dtype) for _ in range(2)]
        lists = [[t] for t in (*made, torch.rand(5000, generator=generator), torch.randn(5000, generator=generator))]
        schedule = torch.tensor([4.0, 0.3], dtype=torch.float64)
        named = {"lr": 9.0, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "count": 1.0, "share": 1.0}
        scaling = {"lr_tensor": torch.tensor(0.02), "grad_scale": torch.tensor(8.0), "found_inf": torch.zeros(())}
        op(*lists, [torch.tensor(3.0)], schedule, **named, maximize=False, capturable=True, **scaling)
        found.append(lists)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [PACE, MADA, ScheduleFreeAdamW])
def test_float32_gradients_of_narrower_weights(kind: type, dtype: torch.dtype) -> None:
    on = device()
    path: list[list[float]] = []
    ours = train(kind, on, dtype, path, grad_dtype=torch.float32)
    assert_same_bits(ours, train(kind, None, dtype, path, grad_dtype=torch.float32))
    assert any("Float16,pace::Float32" in name for name in on.launches)


@pytest.mark.parametrize("misalign", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_misaligned_tensors(dtype: torch.dtype, misalign: int) -> None:
    kinds = (PACE, pace_cases.CASES["default"]), (MADA, mada_cases.CASES["pulled"]), (ScheduleFreeAdamW, {})
    for kind, options in kinds:
        on = device(misalign=misalign)
        path: list[list[float]] = []
        ours = train(kind, on, dtype, path, **options)
        assert_same_bits(ours, train(kind, None, dtype, path, **options))
        if dtype == torch.bfloat16 or misalign >= 4:  # otherwise float32 stays aligned
            assert not any(width == 16 for family, _, width in on.widths if family in ("pace", "mada", "schedule_free"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_one_tensor_is_not_aligned_each_is_read_once_and_written_once(dtype: torch.dtype) -> None:
    """As gradients in the buckets of DDP and FSDP2. The same bytes, an element an access."""
    numel = 3 * build.plan_module().CHUNK + 1030
    param = torch.nn.Parameter(torch.randn(numel).to(dtype))
    on = device(misalign=param.element_size())
    with on.in_place_of_the_cpu():
        optimizer = PACE([param], backend="cpu")
        for _ in range(2):
            param.grad = torch.randn(numel).to(dtype)
            on.moved.clear()
            on.widths.clear()
            optimizer.step()
    moved = {(name, kind): count for (family, name, kind), count in on.moved.items() if family == "pace"}
    sizes = {name: param.element_size() if name in "xg" else 4 for name in "xgmve"}
    reads = {(name, "ld"): numel * size for name, size in sizes.items()}
    writes = {(name, "st"): numel * size for name, size in sizes.items() if name != "g"}
    assert {key: count for key, count in moved.items() if key[0] in sizes} == reads | writes


@pytest.mark.parametrize("arch", build.ptx_archs())
@pytest.mark.parametrize("kind", [PACE, MADA, ScheduleFreeAdamW])
def test_one_warp_at_a_time_in_every_ptx(kind: type, arch: str) -> None:
    """Lock step hides a missing barrier; a warp that runs ahead does not."""
    on = device(arch=arch, warp_serial=True)
    options = {PACE: {"log_stats": True}, MADA: mada_cases.CASES["all, inside"]}.get(kind, {})
    path: list[list[float]] = []
    ours = train(kind, on, torch.bfloat16, path, **options)
    assert_same_bits(ours, train(kind, None, torch.bfloat16, path, **options))


# ---- plans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("kind", [PACE, MADA, ScheduleFreeAdamW])
def test_from_the_second_step_on_a_plan_takes_it(kind: type, capturable: bool) -> None:
    on, steps = device(), 5
    ours = train(kind, on, torch.float32, steps=steps, capturable=capturable)
    assert_same_bits(ours, train(kind, None, torch.float32, steps=steps, capturable=capturable))
    assert on.calls[kind._OPERATOR] == 1 and on.calls["plan_step_"] == steps - 1, on.calls


def test_a_pullback_is_planned_too() -> None:
    runs = []
    for on in (device(), None):
        params = weights(torch.float32)
        with on.in_place_of_the_cpu() if on is not None else nullcontext():
            optimizer = Pullback(torch.optim.SGD(params, lr=0.1, momentum=0.9), gain=0.1, backend="cpu")
            for grads in gradients(4, torch.float32):
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad
                optimizer.step()
        if on is not None:
            assert on.calls["pullback_"] == 1 and on.calls["Plan.before"] == on.calls["Plan.step"] == 3, on.calls
        runs.append((params, optimizer.base))
    assert_same_bits(*runs)


def moved_weights(params: list[torch.nn.Parameter], optimizer: PACE) -> None:
    params[0].data = params[0].data.clone()


def moved_state(params: list[torch.nn.Parameter], optimizer: PACE) -> None:
    optimizer.state[params[0]]["ema"].set_(optimizer.state[params[0]]["ema"].clone())


def another_order(params: list[torch.nn.Parameter], optimizer: PACE) -> None:
    params[0].grad = params[0].grad.t().contiguous().t()


def other_options(params: list[torch.nn.Parameter], optimizer: PACE) -> None:
    optimizer.param_groups[0].update(lr=0.5, weight_decay=0.3, betas=(0.8, 0.9))


def no_gradient(params: list[torch.nn.Parameter], optimizer: PACE) -> None:
    params[1].grad = None


# What is done before a step, and which operators then take it.
CHANGES: dict[str, tuple[Any, str]] = {
    "weights that moved": (moved_weights, "pace_step_"),
    "a state that moved": (moved_state, "pace_step_"),
    "a gradient in another order": (another_order, "plan_step_"),
    "other options": (other_options, "plan_step_"),
    "a parameter without a gradient": (no_gradient, "pace_step_"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_plan_takes_and_what_ends_it(change: str) -> None:
    change_it, expected = CHANGES[change]
    runs = []
    for on in (device(), None):
        params = weights(torch.float32)
        with on.in_place_of_the_cpu() if on is not None else nullcontext():
            optimizer = PACE(params, lr=1e-2, backend="cpu")
            for t, grads in enumerate(gradients(4, torch.float32)):
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad
                if t == 2:
                    change_it(params, optimizer)
                    before = Counter(on.calls) if on is not None else Counter()
                optimizer.step()
                if t == 2 and on is not None:
                    assert (on.calls - before)[expected] == 1, (on.calls, before)
        runs.append((params, optimizer))
    assert_same_bits(*runs)


@pytest.mark.parametrize("at", [1, 2])
def test_a_launch_that_fails_in_a_plan(at: int) -> None:
    """In the first group the usual step follows; behind it the step is half done, and no group steps twice."""
    on, params = device(), weights(torch.float32)[:2]
    with on.in_place_of_the_cpu():
        optimizer = PACE([{"params": [param]} for param in params], backend="cpu")
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.step()
        launched, left = on._launched, [at]

        def failing(call: dict[str, Any]) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise RuntimeError("out of memory")
            launched(call)

        on._launched = failing  # type: ignore[method-assign]
        with nullcontext() if at == 1 else pytest.raises(RuntimeError):
            optimizer.step()
        with nullcontext() if at == 1 else pytest.raises(RuntimeError, match="in the middle of a step"):
            optimizer.step()
    assert [float(optimizer.state[param]["step"]) for param in params] == ([4, 4] if at == 1 else [3, 2])


# ---- sums -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["default", "strong pullback", "no clamp", "everything"])
def test_statistics(case: str) -> None:
    options = {**pace_cases.CASES[case], "log_stats": True}
    _, ours = train(PACE, device(), torch.float32, **options)
    _, cpus = train(PACE, None, torch.float32, **options)
    # Either sums float32 terms in rows of at most 64, and beyond in float64: 63 roundings of u each.
    assert ours.get_step_stats() == pytest.approx(cpus.get_step_stats(), rel=2 * 63 * U)


def magnitudes(optimizer: MADA, grads: list[torch.Tensor]) -> dict[str, float]:
    """The sums of the magnitudes of the coming step's hypergradient terms, by the plain rule in float64."""
    group = optimizer.param_groups[0]
    o = MadaOptions(**step_options(group) | {"lr": group["lr"]})
    total = dict.fromkeys(COEFFICIENTS, 0.0)
    for param, grad in zip(group["params"], grads, strict=True):
        state = {k: v.double() for k, v in optimizer.state[param].items()}
        second = "max_exp_avg_sq" if o.second_max else "mean_exp_avg_sq"
        kept = MadaMoments(*(state.get(k) for k in ("exp_avg", "exp_avg_diff", "exp_avg_sq", second, "exp_avg_lion")))
        redo, factors = last_step(o, state["step"].item(), state["last_scalars"].tolist())
        g = -grad.double() if o.maximize else grad.double()
        redone = mada_rule(redo, state["last_grad"], state.get("older_grad"), kept)
        terms = hypergradient_terms(redo, state["last_grad"], g, kept, redone)
        for name, factor, term in zip(COEFFICIENTS, factors, terms, strict=True):
            total[name] += 0.0 if term is None else abs(float(factor)) * float(term.abs().sum())
    return total


@pytest.mark.parametrize("case", [name for name, o in mada_cases.CASES.items() if o.get("learn", True)])
def test_hypergradients(case: str) -> None:
    """The terms are the CPU's bits, and only the order of their sums differs: float32 sums of 32 terms here, of 16 and
    more there, and float64 beyond. So by 31 u and at most 255 u of the sum of the terms' magnitudes."""
    options = mada_cases.CASES[case]
    path: list[list[float]] = []
    _, cpus = train(MADA, None, torch.float32, path, **options)
    _, ours = train(MADA, device(), torch.float32, path, **options)
    _, before = train(MADA, None, torch.float32, path, steps=STEPS - 1, **options)
    *_, last = gradients(STEPS, torch.float32)
    scale = magnitudes(before, last)
    for name, value in cpus.hypergradients.items():
        assert abs(ours.hypergradients[name] - value) <= (31 + 255) * U * scale[name], name
    assert any(cpus.hypergradients.values())


def many_blocks() -> list[torch.nn.Parameter]:
    torch.manual_seed(3)
    sizes = [1, 4095, 4096, 4097, 3 * 4096 + 5, 0, 17]
    return [torch.nn.Parameter(torch.randn(n)) for n in sizes]


def test_sums_are_the_same_bits_in_any_order_of_blocks() -> None:
    results = []
    for seed in range(3):
        params = many_blocks()
        on = Device(rng=np.random.default_rng(seed))
        with on.in_place_of_the_cpu():
            pace = PACE(params, lr=1e-2, log_stats=True, backend="cpu")
            mada = MADA([torch.nn.Parameter(p.detach().clone()) for p in params], hyper_warmup=0, backend="cpu")
            for t in range(3):
                for optimizer in (pace, mada):
                    for k, p in enumerate(optimizer.param_groups[0]["params"]):
                        generator = torch.Generator().manual_seed(100 * t + k)
                        p.grad = torch.randn(p.shape, generator=generator)
                    optimizer.step()
        results.append((pace.get_step_stats(), mada.hypergradients, mada.coefficients))
    assert results[0] == results[1] == results[2]
    assert results[0][0]["lambda_max"] > 0 and sum(value != 0 for value in results[0][1].values()) >= 4


def test_sums_over_more_blocks_than_one_launch_adds_up() -> None:
    """1,100 blocks: two levels of sums. Weights and gradients are constant, so that the sum is known."""
    numel = 1100 * build.plan_module().CHUNK
    param = torch.nn.Parameter(torch.ones(numel, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    on = device()
    with on.in_place_of_the_cpu():
        PACE([param], lr=1e-2, log_stats=True, backend="cpu").step()
        assert Counter(on.launches)["pace::sum_kernel<pace::PaceRow>"] == 2


@pytest.mark.parametrize("count", [3000, 3001, 6500])
def test_learning_from_more_sums_than_a_launch_has_room_for(count: int) -> None:
    """As with a group for each parameter."""
    found = []
    for op in (device().mada_learn_, torch.ops.pace_kernels.mada_learn_):
        generator = torch.Generator().manual_seed(0)
        learned = [torch.full((6,), 0.5, dtype=torch.float64) for _ in range(3)] + [
            torch.zeros((), dtype=torch.float64)
        ]
        sums = list(torch.rand(count, 7, dtype=torch.float64, generator=generator) - 0.3)
        lists = {"hyper_lr": [1e-4] * 6, "hyper_momentum": [0.5] * 6, "lower": [0.0] * 6, "upper": [1.0] * 6}
        op(*learned, sums, learn=63, **lists, clip=1e6, warmup=0)
        found.append(torch.cat([tensor.reshape(-1) for tensor in learned]))
    assert torch.equal(*found)


# ---- mixed precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skipped", [(), (0,), (1,), (0, 2)])
@pytest.mark.parametrize("kind", [PACE, MADA, ScheduleFreeAdamW])
def test_scaling_clipping_and_skipping(kind: type, skipped: tuple[int, ...]) -> None:
    options = {PACE: {"log_stats": True}, MADA: mada_cases.CASES["pulled"]}.get(kind, {})
    runs = []
    for on in (device(), None):
        params = weights(torch.float32)
        with on.in_place_of_the_cpu() if on is not None else nullcontext():
            optimizer = kind(params, lr=1e-2, capturable=True, **options, backend="cpu")
            for t, grads in enumerate(gradients(4, torch.float32)):
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad * (float("inf") if t in skipped else 1000.0)
                optimizer.grad_scale = torch.tensor(1000.0)
                optimizer.found_inf = torch.tensor(float(t in skipped))
                optimizer.step(clip_coef=0.7)
        runs.append((params, optimizer))
    counts = {optimizer.state[p]["step"].item() for params, optimizer in runs for p in params}
    assert counts == {4.0 - len(skipped)}
    assert_same_bits(*runs)


def test_a_skipped_step_leaves_statistics_of_nothing() -> None:
    param = torch.nn.Parameter(torch.ones(5000))
    param.grad = torch.full_like(param, float("inf"))
    with device().in_place_of_the_cpu():
        optimizer = PACE([param], log_stats=True, capturable=True, backend="cpu")
        optimizer.found_inf = torch.ones(1)
        optimizer.step()
    assert optimizer.get_step_stats() == {} and torch.equal(param.detach(), torch.ones(5000))
    ((stats, _),) = optimizer._step_stats
    assert stats.tolist() == [float("inf") if name.endswith("_min") else 0.0 for name in PACE_STATS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_learning_rate_on_the_device(dtype: torch.dtype) -> None:
    """Its scalars are computed there, in double as on the host: the same but for the last place of a power."""
    options = {**PACE([torch.nn.Parameter(torch.ones(1))])._options(PACE([torch.zeros(1)]).param_groups[0]), "lr": 9.0}
    results = []
    for op in (device().pace_step_, torch.ops.pace_kernels.pace_step_):
        torch.manual_seed(0)
        lists = [[torch.randn(5000).abs()] for _ in range(5)] + [[torch.full((), 6.0)]]
        op(*lists, None, lr_tensor=torch.tensor(0.02, dtype=dtype), **options)
        results.append(torch.cat([tensors[0].reshape(-1) for tensors in lists]))
    assert torch.equal(*results)


# ---- step counts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", step_count_cases.OPERATORS)
def test_steps_beyond_float32(name: str, capturable: bool) -> None:
    step_count_cases.moves_every_third_step(getattr(device(), name), name, capturable)


# ---- bytes ----------------------------------------------------------------------------------------------------------


# By name: the optimizer, its options, the dtype; bytes read and written of a parameter's operands, RULES.md's figures.
ADAM = {"beta3": 0.0, "rho": 1.0, "learn": ()}
BYTES: dict[str, tuple[type, dict[str, Any], torch.dtype, int]] = {
    "PACE": (PACE, {}, torch.float32, 36),
    "PACE, statistics": (PACE, {"log_stats": True}, torch.float32, 36),
    "PACE, capturable": (PACE, {"capturable": True}, torch.float32, 36),
    "PACE, the average rests": (PACE, {"ema_update_freq": 2}, torch.float32, 32),
    "PACE, a resting average that does not pull": (
        PACE,
        {"ema_update_freq": 2, "lambda_pullback": 0},
        torch.float32,
        28,
    ),
    "PACE, momentum-free": (PACE, {"betas": (0.0, 0.999)}, torch.float32, 28),
    "PACE as AdamW": (PACE, {"lambda_pullback": 0, "use_ema_eval": False}, torch.float32, 28),
    "PACE, bfloat16": (PACE, {}, torch.bfloat16, 30),
    "PACE, float16": (PACE, {}, torch.float16, 30),
    "MADA": (MADA, {}, torch.float32, 64),
    "MADA, capturable": (MADA, {"capturable": True}, torch.float32, 68),
    "MADA, bfloat16": (MADA, {}, torch.bfloat16, 58),
    "MADA, pulled": (MADA, {"lambda_pullback": 1.0}, torch.float32, 72),
    "HyperAdam": (MADA, {**ADAM, "learn": ("beta1", "beta2")}, torch.float32, 36),
    "MADA-FS": (MADA, {"learn": (), **mada_cases.INSIDE}, torch.float32, 60),
    "AdamW": (MADA, ADAM, torch.float32, 28),
    "AVGrad": (MADA, {**ADAM, "rho": 0.0}, torch.float32, 36),
    "Adan": (MADA, {**ADAM, "beta3": 0.9}, torch.float32, 44),
    "Lion": (MADA, {**ADAM, "gamma": 0.0}, torch.float32, 20),
    "schedule-free": (ScheduleFreeAdamW, {}, torch.float32, 28),
    "schedule-free, capturable": (ScheduleFreeAdamW, {"capturable": True}, torch.float32, 28),
    "schedule-free, bfloat16": (ScheduleFreeAdamW, {}, torch.bfloat16, 22),
}
OPERANDS = set("xgmnvwleyz") | {"last_g", "older_g"}


@pytest.mark.parametrize("case", BYTES)
def test_each_tensor_is_read_once_and_written_once(case: str) -> None:
    kind, options, dtype, expected = BYTES[case]
    chunk = build.plan_module().CHUNK
    numel, blocks = 3 * chunk + 8, 4
    param = torch.nn.Parameter(torch.randn(numel).to(dtype))
    on = device()
    with on.in_place_of_the_cpu():
        optimizer = kind([param], **options, backend="cpu")
        for _ in range(3):  # the last of which rests, and has a step to redo
            param.grad = torch.randn(numel).to(dtype)
            on.moved.clear()
            on.widths.clear()
            optimizer.step()
    family = "schedule_free" if kind is ScheduleFreeAdamW else kind.__name__.lower()
    moved = {key[1:]: count for key, count in on.moved.items() if key[0] == family}
    of_operands = {key: count for key, count in moved.items() if key[0] in OPERANDS}
    assert sum(of_operands.values()) == expected * numel
    for (name, _), count in of_operands.items():
        assert count == numel * (param.element_size() if name in "xyg" else 4), name  # once
    assert ("g", "st") not in of_operands
    # All of it in accesses of 128 bits.
    assert {w for f, _, w in on.widths if f == family and on.widths[f, "ld", w] > 1000 * blocks} == {16}
    assert sum(on.widths[family, k, 16] for k in ("ld", "st")) == expected * numel
    # Bookkeeping: a block reads its scalars, where they are on the device, and writes its sums. MADA's partial sums are
    # 48 bytes for 4,096 parameters, PACE's statistics 112.
    scalars, row = build.plan_module().SIZES[RULES[family]]
    group = optimizer.param_groups[0]
    sums = group.get("log_stats") if family == "pace" else group.get("learn")
    on_device = any(name.startswith("pace::scalars_kernel") for name in on.launches)
    assert moved.get(("workspace", "ld"), 0) == (scalars * blocks if on_device else 0)
    assert moved.get(("workspace", "st"), 0) == (row * blocks if sums else 0)
