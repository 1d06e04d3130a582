"""Promise: the CUDA kernels of MADA, schedule-free and the pullback with weights and states in compressed formats,
executed from their PTX, give the CPU kernels' bits for every combination of formats, option and alignment, and move no
byte twice."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import mada_cases
import pullback_cases
import pytest
import torch
from coded_cases import AVERAGES, COMMON, ITERATES, KERNELS, PLAIN, STATES, WEIGHTS, Lists, Mada, Pullback, ScheduleFree
from emulated import build
from emulated.device import Device
from pace_cases import assert_same_bits
from products import FULL, day, pairs_and_seed
from test_cuda_coded import ASKEW, ODD, U, device

from pace_kernels import MADA, ScheduleFreeAdamW
from pace_kernels import Pullback as PullbackOptimizer

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))

# A warp takes 128 elements, and a block of threads 4,096.
SHAPES = ((129, 32), (9, 1, 64), (1, 32), (0, 32), (1, 256))
Make = Callable[..., Lists]


def same_bits(on: Device, make: Make, steps: int = 3, first: int = 1, **early: Any) -> tuple[Lists, Lists]:
    """The first two steps with other options."""
    ours, theirs = make(), make()
    op = getattr(on, ours.definition.op)
    for step in range(first, first + steps):
        grads = ours.gradients(step)
        changed = early if step < first + 2 else {}
        ours.take(op, grads, **changed)
        theirs.take(KERNELS[type(theirs)], [g.clone() for g in grads], **changed)
        for k, (a, b) in enumerate(zip(ours.everything(), theirs.everything(), strict=True)):
            assert torch.equal(a, b), (step, k, int((a != b).sum()))
    return ours, theirs


def with_cases(cases: Iterable[str], *formats: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Every pair of formats, with cases in turn, in an order of the day: arithmetic and formats have nothing to do with
    each other. Their product where FULL."""
    names = list(cases)
    if FULL:
        return list(itertools.product(names, *formats))
    names = random.Random(day()).sample(names, len(names))
    return [(name, *case) for name, case in zip(itertools.cycle(names), pairs_and_seed(*formats, sample=4))]


# One of MADA's cases for each value of its flags, and those in which averages rest and roles stay.
MADAS = [
    *("all, maximum", "no differences", "no mean", "no Lion", "differences alone", "mean alone", "Lion alone"),
    *("hyperadam", "fixed, inside", "fixed, no differences", "AVGrad", "Yogi", "Adan", "averaged Lion"),
    *("Adam and Lion", "pulled, every third step", "capturable"),
]
# Flags that no case of mada_cases has.
MORE: dict[str, dict[str, Any]] = {
    "Adan and AVGrad": {"beta3": 0.92, "rho": 0.5, "learn": ()},
    "Adan and Lion": {"beta3": 0.92, "rho": 1.0, "gamma": 0.5, "learn": ()},
}


def test_mada_has_all_its_flags() -> None:
    parts = ("exp_avg_sqs", "exp_avg_diffs", "second_exp_avg_sqs", "exp_avg_lions")
    with mock.patch.dict(mada_cases.CASES, MORE):
        calls = [Mada(case, "float32", 32, None, ((1, 32),)) for case in (*MADAS, *MORE)]
    assert len({(call.options["learn"] != 0, *(bool(call.lists[name]) for name in parts)) for call in calls}) == 17


@pytest.mark.parametrize(
    ("case", "weights", "state_bits", "ema_bits", "askew"),
    with_cases((*MADAS, *MORE), WEIGHTS, STATES, AVERAGES, ASKEW),
)
def test_mada(case: str, weights: str, state_bits: int, ema_bits: int | None, askew: str) -> None:
    with mock.patch.dict(mada_cases.CASES, MORE):
        same_bits(device(askew), lambda: Mada(case, weights, state_bits, ema_bits, SHAPES), steps=2, ema_update_freq=2)


@pytest.mark.parametrize(
    ("weights", "state_bits", "z_bits", "askew"), pairs_and_seed(WEIGHTS, STATES, ITERATES, ASKEW, sample=4)
)
def test_schedule_free(weights: str, state_bits: int, z_bits: int, askew: str) -> None:
    same_bits(device(askew), lambda: ScheduleFree(weights, state_bits, z_bits, SHAPES))


@pytest.mark.parametrize(
    ("case", "weights", "ema_bits", "askew"), with_cases(pullback_cases.CASES, PLAIN, ITERATES, ASKEW)
)
def test_pullback(case: str, weights: str, ema_bits: int, askew: str) -> None:
    same_bits(device(askew), lambda: Pullback(case, weights, ema_bits, SHAPES), ema_update_freq=2)


@pytest.mark.parametrize("name", COMMON)
def test_gradients_that_no_training_should_meet(name: str) -> None:
    """From the first step on: infinities, NaN, and 0."""
    on = device()
    same_bits(on, lambda: COMMON[name](shapes=SHAPES), steps=5, first=0)
    assert any("general_kernel" in launch for launch in on.launches)


NO_BLOCKS: dict[str, Make] = {
    "MADA": lambda shapes: Mada("pulled", "32", 16, 24, shapes),
    "MADA, dithered": lambda shapes: Mada("all, maximum", "dithered", 16, None, shapes),
    "Lion": lambda shapes: Mada("averaged Lion", "24", 16, 24, shapes),
    "schedule-free": lambda shapes: ScheduleFree("24", 16, 24, shapes),
    "pullback": lambda shapes: Pullback("default", "float16", 24, shapes),
}


@pytest.mark.parametrize("askew", ["aligned", "all askew"])
@pytest.mark.parametrize("name", NO_BLOCKS)
def test_formats_without_blocks_have_any_shape(name: str, askew: str) -> None:
    same_bits(device(askew), lambda: NO_BLOCKS[name](ODD), steps=2)


def with_one_state_in_codes(symbol: str, bits: int, **changed: Any) -> Mada:
    call = Mada("all, inside", "bfloat16", 32, 32, SHAPES)
    call.options |= changed
    operand = next(o for o in call.definition.operands if o.symbol == symbol)
    call._add(operand.codec, operand.list, operand.beside, bits)
    return call


ALONE = [("w", 16, True), *((k, n, False) for k, n in (("w", 16), ("v", 8), ("n", 16), ("l", 8), ("last_g", 16)))]


@pytest.mark.parametrize(("symbol", "bits", "second_max"), ALONE)
def test_one_state_alone_in_codes(symbol: str, bits: int, second_max: bool) -> None:
    """Also a maximum in bfloat16, which is rounded to the nearest, as plain weights are."""
    on = device()
    same_bits(on, lambda: with_one_state_in_codes(symbol, bits, second_max=second_max), steps=2)
    assert any("general_kernel" in launch for launch in on.launches)


def test_codes_and_plain_tensors_in_one_call() -> None:
    """With stochastic rounding the bfloat16 parameters of a call are coded, those in float32 are not."""

    def make() -> Lists:
        call = Mada("fixed, inside", "dithered", 32, None, SHAPES)
        call.params[1], call.params[0] = call.params[1].float(), call.params[0].half()
        return call

    on = device()
    same_bits(on, make)
    assert {name.split("<")[0] for name in on.launches} >= {"pace::sweep_kernel", "pace::general_kernel"}


SCALING = {"clip_coef": torch.tensor(0.7), "grad_scale": torch.tensor(3.0), "found_inf": torch.zeros(())}
CAPTURABLE: dict[str, Make] = {
    "MADA": lambda: Mada("capturable", "32", 8, 8, SHAPES),
    "Adan": lambda: Mada("Adan", "24", 8, None, SHAPES),
    "schedule-free": lambda: ScheduleFree("32", 8, 8, SHAPES),
    "pullback": lambda: Pullback("capturable", "bfloat16", 8, SHAPES),
}


@pytest.mark.parametrize("name", CAPTURABLE)
def test_scalars_of_the_device(name: str) -> None:
    made = CAPTURABLE[name]()
    named = SCALING if made.definition.scaling[0] == "grad_scale" else {"found_inf": SCALING["found_inf"]}
    same_bits(device(), CAPTURABLE[name], capturable=True, **named)
    skipped, before = CAPTURABLE[name](), CAPTURABLE[name]()
    op = getattr(device(), skipped.definition.op)
    if name == "pullback":
        before.take(lambda *_, **__: None, before.gradients(3))  # its base has stepped
    skipped.take(op, skipped.gradients(3), capturable=True, **named | {"found_inf": torch.ones(())})
    assert all(torch.equal(a, b) for a, b in zip(skipped.everything(), before.everything(), strict=True))


@pytest.mark.parametrize("arch", build.ptx_archs())
@pytest.mark.parametrize("name", ["MADA", "schedule-free", "pullback"])
def test_one_warp_at_a_time_in_every_ptx(name: str, arch: str) -> None:
    same_bits(device(arch=arch, warp_serial=True), lambda: COMMON[name](shapes=SHAPES), steps=2)


# ---- sums -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("askew", ["aligned", "all askew"])
def test_hypergradients(askew: str) -> None:
    """Of the same terms, in another order: as test_cuda_emulated has it, 4,096 terms of a float32 sum."""
    ours, theirs = (Mada("all, inside", "32", 8, 8, SHAPES) for _ in range(2))
    on = device(askew)
    for _ in range(3):
        grads = [ours.noise(p.shape).to(p.dtype) for p in ours.params]
        ours.take(on.mada_step_, grads)
        theirs.take(KERNELS[Mada], [g.clone() for g in grads])
    assert all(torch.equal(a, b) for a, b in zip(ours.everything()[:-1], theirs.everything()[:-1], strict=True))
    found, expected = ours.extras["hypergradients"], theirs.extras["hypergradients"]
    assert expected.abs().min() > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(("case", "bits"), [("default", 8), ("constant from the step", 16), ("narrow moment", 24)])
def test_statistics(case: str, bits: int) -> None:
    ours, theirs = (Pullback(case, "bfloat16", bits, SHAPES) for _ in range(2))
    on = device("all askew")
    for call, op in ((ours, on.pullback_), (theirs, KERNELS[Pullback])):
        call.extras["stats"] = torch.zeros(14, dtype=torch.float64)
        for step in (1, 2):
            call.take(op, call.gradients(step))
    assert all(torch.equal(a, b) for a, b in zip(ours.everything(), theirs.everything(), strict=True))
    # As test_cuda_emulated.test_statistics has it.
    assert ours.extras["stats"].tolist() == pytest.approx(theirs.extras["stats"].tolist(), rel=2 * 63 * U)
    assert ours.extras["stats"][0] == sum(p.numel() for p in ours.params)


# ---- bytes ----------------------------------------------------------------------------------------------------------

# Read and written of a parameter, with its gradient, and scales of 32.
BYTES: dict[str, tuple[Make, float]] = {
    "AdamW": (lambda shapes: Mada("AdamW", "32", 8, None, shapes), 2 * 4 + 2 + 2 * 2 + 4 / 32),
    "Lion, averaged": (lambda shapes: Mada("averaged Lion", "24", 8, 8, shapes), 2 * 3 + 2 + 2 * 2 + 4 / 32),
    "MADA": (lambda shapes: Mada("all, inside", "32", 8, None, shapes), 2 * 4 + 2 + 4 * 2 + 4 + 3 * 2 + 8 / 32),
    "MADA, pulled": (lambda shapes: Mada("pulled", "32", 8, 8, shapes), 2 * 4 + 2 + 5 * 2 + 4 + 3 * 2 + 10 / 32),
    "MADA, roles stay": (
        lambda shapes: Mada("capturable", "32", 16, None, shapes),
        2 * 4 + 2 + 4 * 4 + 4 + 4 * 2,
    ),
    "schedule-free": (lambda shapes: ScheduleFree("32", 8, 16, shapes), 2 * 4 + 2 + 2 + 4 + 4 / 32),
    "schedule-free, 8 bits": (lambda shapes: ScheduleFree("24", 8, 8, shapes), 2 * 3 + 2 + 2 + 2 + 4 / 32),
    "pullback": (lambda shapes: Pullback("default", "bfloat16", 8, shapes), 2 * 2 + 2 + 4 + 2 + 2 / 32),
    "pullback, 24 bits": (lambda shapes: Pullback("default", "float32", 24, shapes), 2 * 4 + 4 + 4 + 6),
    "pullback, nothing pulls": (lambda shapes: Pullback("average", "bfloat16", 16, shapes), 2 + 2 + 4 + 2 / 32),
}


@pytest.mark.parametrize("askew", ["aligned", "all askew"])
@pytest.mark.parametrize("case", BYTES)
def test_each_tensor_is_read_once_and_written_once(case: str, askew: str) -> None:
    make, expected = BYTES[case]
    call, on = make(((50, 256),)), device(askew)
    op = getattr(on, call.definition.op)
    for _ in range(2):
        on.moved.clear()
        on.widths.clear()
        call.take(op, [g.to(p.dtype) for g, p in zip(call.gradients(1), call.params, strict=True)])
    family = call.definition.op.removesuffix("_").removesuffix("_step")
    scales = {name for name, side in call.beside.items() if side and side[0].dtype == torch.uint8}
    symbols = {operand.symbol for operand in call.definition.operands} | set(call.definition.beside)
    moved = {(name, kind): n for (of, name, kind), n in on.moved.items() if of == family and name in symbols}
    for name in scales:
        moved[name, "ld"] //= 8  # the threads of a block, whose reads of one byte are one of memory
    assert sum(moved.values()) == expected * 50 * 256, moved
    assert ("g", "st") not in moved and ("before", "st") not in moved
    if askew == "aligned":  # all but scales
        narrow = sum(n for (of, _, width), n in on.widths.items() if of == family and width in (1, 2))
        assert narrow == 9 * len(scales) * 50 * 256 // 32


# ---- refusals -------------------------------------------------------------------------------------------------------


def changed(make: Callable[[], Lists], name: str, change: Callable[[torch.Tensor], torch.Tensor] | None) -> Lists:
    call = make()
    lists = call.beside if name in call.beside else call.lists
    lists[name] = [] if change is None else [change(t) for t in lists[name] or []]
    return call


REFUSED: dict[str, tuple[Callable[[], Lists], str]] = {
    "nothing to read an average beside": (
        lambda: changed(lambda: Pullback("default", "bfloat16", 8, SHAPES), "befores", None),
        "befores must not be empty where emas are int8 or int16",
    ),
    "codes without scales": (
        lambda: changed(lambda: Mada("Adan", "32", 8, None, SHAPES), "exp_avg_diff_scales", None),
        r"exp_avg_diffs\[0\] must be float32 or bfl",
    ),
    "last gradients in float16": (
        lambda: changed(lambda: Mada("hyperadam", "32", 8, None, SHAPES), "last_grads", torch.Tensor.half),
        r"last_grads\[0\] must be float32 or bfloat16",
    ),
    "iterates of no format": (
        lambda: changed(lambda: ScheduleFree("32", 8, 8, SHAPES), "zs", torch.Tensor.int),
        r"zs\[0\] must be int8, int16 or bfloat16, with z_scales",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_cpu_refuses_is_refused(case: str) -> None:
    make, sentence = REFUSED[case]
    for on in (device(), None):
        call = make()
        before = [t.clone() for t in call.everything()]
        op = KERNELS[type(call)] if on is None else getattr(on, call.definition.op)
        grads = [torch.zeros_like(p) for p in call.params]
        with pytest.raises(RuntimeError, match=sentence):
            call.take(op, grads)
        assert all(torch.equal(a, b) for a, b in zip(before, call.everything(), strict=True))


# ---- optimizers -----------------------------------------------------------------------------------------------------

ADAM = {"beta3": 0.0, "rho": 1.0, "learn": ()}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "AdamW": lambda p, **o: MADA(p, **ADAM, state_bits=8, master_weight_bits=32, **o),
    "Adan": lambda p, **o: MADA(p, **ADAM | {"beta3": 0.9}, state_bits=8, master_weight_bits=24, **o),
    "MADA": lambda p, **o: MADA(p, lambda_pullback=1.0, state_bits=8, master_weight_bits=32, **o),
    "MADA, 16 bits": lambda p, **o: MADA(p, state_bits=16, stochastic_rounding=True, **o),
    "schedule-free": lambda p, **o: ScheduleFreeAdamW(p, state_bits=8, master_weight_bits=32, **o),
    "pullback": lambda p, **o: PullbackOptimizer(torch.optim.AdamW(p, **o), ema_bits=8, backend="cpu"),
    "pullback, 24 bits": lambda p, **o: PullbackOptimizer(torch.optim.AdamW(p, **o), ema_bits=24, backend="cpu"),
}


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_plans(name: str, capturable: bool) -> None:
    """From the second step on, with matrices in codes and a vector that is not. Learned coefficients are those of the
    first run, since sums differ in their last places."""
    pulls, runs = name.startswith("pullback"), []
    path: list[torch.Tensor] = []
    if pulls and capturable:
        pytest.skip("torch.optim's capturable is of its own device")
    named = {"lr": 1e-2} if pulls else {"lr": 1e-2, "capturable": capturable, "backend": "cpu"}
    for on in (device(), None):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape).bfloat16()) for shape in ((66, 64), (64,), (2, 32, 64))]
        with on.in_place_of_the_cpu() if on is not None else nullcontext():
            optimizer = OPTIMIZERS[name](params, **named)
            values = optimizer.param_groups[0].get("coefficient_values")
            for t in range(4):
                if values is not None and on is None:
                    values.copy_(path[t])
                elif values is not None:
                    path.append(values.clone())
                for p in params:
                    p.grad = torch.randn(p.shape).bfloat16()
                optimizer.step()
        if on is not None:
            assert on.calls["plan_step_"] == 3 and any("general_kernel" in launch for launch in on.launches), on.calls
        runs.append((params, optimizer.base if pulls else optimizer))
    assert_same_bits(*runs)
