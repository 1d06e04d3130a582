"""Promise: the CUDA kernels of weights and states in compressed formats, executed from their PTX, give the CPU kernels'
bits for every combination of formats, option and alignment, move no byte twice, and refuse what the CPU refuses."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import mada_cases
import numpy as np
import pullback_cases
import pytest
import torch
from coded_cases import (
    AVERAGES,
    COMMON,
    ITERATES,
    KERNELS,
    PLAIN,
    STATES,
    WEIGHTS,
    Lists,
    Mada,
    Pace,
    Pullback,
    ScheduleFree,
    assert_refused,
    each_refusal,
)
from emulated import build
from emulated.device import Device
from pace_cases import assert_same_bits
from products import FULL, day, pairs_and_seed

from pace_kernels import MADA, PACE, ScheduleFreeAdamW
from pace_kernels import Pullback as PullbackOptimizer

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))

# A warp takes 256 elements (PACE) or 128, and a block of threads 4,096.
SHAPES = ((129, 32), (9, 1, 64), (1, 32), (0, 32), (1, 256))
ODD = ((7, 3), (1,), (4099,), (16, 16))  # where nothing is in blocks
U = 2.0**-24
Make = Callable[..., Lists]

ASKEW = {"aligned": (0, ""), "gradients askew": (2, "g"), "all askew": (2, "")}


def device(askew: str = "aligned", **options: Any) -> Device:
    misalign, names = ASKEW[askew]
    only = {"askew": {names}} if names else {}
    return Device(rng=np.random.default_rng(0), misalign=misalign, **only, **options)


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


# What PACE is called with beside its usual options.
CALLS: dict[str, dict[str, Any]] = {
    "default": {},
    "capturable": {"capturable": True, "clip_coef": torch.tensor(0.7), "grad_scale": torch.tensor(3.0)},
    "found_inf is 0": {"capturable": True, "found_inf": torch.zeros(())},
    "no momentum": {"beta1": 0.0},
    "the average is the weight": {"ema_kappa": None, "beta_ema": 1.0},
    "no pull": {"lambda_pullback": 0.0},
    "from the step": {"pullback_from_step": True, "clamp_pullback": False, "maximize": True},
    "the average rests": {"ema_update_freq": 3},
    "the average rests, no pull": {"ema_update_freq": 3, "lambda_pullback": 0.0},
}


@pytest.mark.parametrize(
    ("weights", "state_bits", "ema_bits", "called", "askew"),
    pairs_and_seed(WEIGHTS, STATES, AVERAGES, CALLS, ASKEW, sample=8),
)
def test_pace(weights: str, state_bits: int, ema_bits: int | None, called: str, askew: str) -> None:
    on = device(askew)
    same_bits(on, lambda: Pace(weights, state_bits, ema_bits, SHAPES, **CALLS[called]), steps=4)
    plain = weights in PLAIN and state_bits == 32 and ema_bits in (None, 32)
    assert plain != any("coded_kernel" in name for name in on.launches), on.launches


@pytest.mark.parametrize("ema_bits", [8, 16, 24, None])
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "dithered", "24", "32"])
def test_the_frequent_formats_of_pace_have_kernels_of_their_own(weights: str, ema_bits: int | None) -> None:
    """Each of them, from an average that rests through gradients of infinities, NaN and 0."""
    on = device()
    same_bits(on, lambda: Pace(weights, 8, ema_bits, SHAPES), steps=6, first=0, ema_update_freq=2)
    assert all("coded_kernel<pace::Known" in name for name in on.launches)


@pytest.mark.parametrize(("m_bits", "v_bits"), list(itertools.permutations((32, 16, 8), 2)))
def test_moments_of_unlike_formats(m_bits: int, v_bits: int) -> None:
    same_bits(device(), lambda: Pace("32", m_bits, 8, SHAPES, v_bits=v_bits), steps=4, first=0)


@pytest.mark.parametrize(("weights", "ema_bits"), [("24", 8), ("32", 16), ("24", 24), ("32", None)])
def test_weights_that_others_wrote(weights: str, ema_bits: int | None) -> None:
    """Rests of other weights: where the weight is 0 now a negative one counts as 0, as on the CPU."""

    def make() -> Lists:
        call = Pace(weights, 8, ema_bits, SHAPES)
        for p, rest in zip(call.params, call.beside["remainders"] or [], strict=True):
            rest.view(-1)[::3] = -5
            p.view(-1)[::2] = 0.0
            p.view(-1)[1::4] = -0.0
        for e, rest in zip(call.lists["emas"], call.beside["ema_scales"] or [], strict=True) if ema_bits == 24 else ():
            rest.view(-1)[::3] = -5
            e.view(-1)[::2] = -0.0
        return call

    same_bits(device(), make, steps=2, first=0)


@pytest.mark.parametrize(("weights", "ema_bits"), [("float32", 8), ("32", 8), ("24", 16)])
def test_averages_beyond_their_grid(weights: str, ema_bits: int) -> None:
    """Weights that move by less than 2^-22 of themselves: beyond, a float's own places are the grid."""
    same_bits(device(), lambda: Pace(weights, 8, ema_bits, SHAPES, lr=1e-9), first=0)


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


@pytest.mark.parametrize("name", [name for name in COMMON if "PACE" not in name])
def test_gradients_that_no_training_should_meet(name: str) -> None:
    """From the first step on: infinities, NaN, and 0."""
    on = device()
    same_bits(on, lambda: COMMON[name](shapes=SHAPES), steps=5, first=0)
    assert any("general_kernel" in launch for launch in on.launches)


NO_BLOCKS: dict[str, Make] = {
    "PACE": lambda shapes: Pace("32", 32, 24, shapes),
    "PACE, 32 bits": lambda shapes: Pace("24", 16, 32, shapes),
    "PACE, dithered": lambda shapes: Pace("dithered", 16, 24, shapes),
    "PACE, no average": lambda shapes: Pace("float16", 16, None, shapes),
    "MADA": lambda shapes: Mada("pulled", "32", 16, 24, shapes),
    "MADA, dithered": lambda shapes: Mada("all, maximum", "dithered", 16, None, shapes),
    "Lion": lambda shapes: Mada("averaged Lion", "24", 16, 24, shapes),
    "schedule-free": lambda shapes: ScheduleFree("24", 16, 24, shapes),
    "pullback": lambda shapes: Pullback("default", "float16", 24, shapes),
}


@pytest.mark.parametrize("askew", ASKEW)
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


@pytest.mark.parametrize(("rule", "kernel"), [("PACE", "coded"), ("MADA", "general")])
def test_codes_and_plain_tensors_in_one_call(rule: str, kernel: str) -> None:
    """With stochastic rounding the bfloat16 parameters of a call are coded, those in float32 are not."""

    def make() -> Lists:
        call: Lists = Pace("dithered", 32, 32, SHAPES)
        if rule == "MADA":
            call = Mada("fixed, inside", "dithered", 32, None, SHAPES)
        call.params[1], call.params[0] = call.params[1].float(), call.params[0].half()
        return call

    on = device()
    same_bits(on, make)
    assert {name.split("<")[0] for name in on.launches} >= {"pace::sweep_kernel", f"pace::{kernel}_kernel"}


SCALING = {"clip_coef": torch.tensor(0.7), "grad_scale": torch.tensor(3.0), "found_inf": torch.zeros(())}
CAPTURABLE: dict[str, Make] = {
    "PACE": lambda: Pace("32", 8, 8, SHAPES),
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
@pytest.mark.parametrize("name", ["PACE", "PACE, float16 weights", "MADA", "schedule-free", "pullback"])
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


STATISTICS: dict[str, Make] = {
    "PACE": lambda: Pace("32", 8, 8, SHAPES),
    "PACE, no average": lambda: Pace("24", 8, None, SHAPES),
    "PACE, 16 bits": lambda: Pace("dithered", 16, 16, SHAPES),
    "PACE, 24 bits": lambda: Pace("float32", 8, 24, SHAPES),
    "pullback": lambda: Pullback("default", "bfloat16", 8, SHAPES),
    "pullback, from the step": lambda: Pullback("constant from the step", "bfloat16", 16, SHAPES),
    "pullback, narrow moment": lambda: Pullback("narrow moment", "bfloat16", 24, SHAPES),
}


@pytest.mark.parametrize("askew", ["gradients askew", "all askew"])
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics(name: str, askew: str) -> None:
    ours, theirs = STATISTICS[name](), STATISTICS[name]()
    on = device(askew)
    for call, op in ((ours, getattr(on, ours.definition.op)), (theirs, KERNELS[type(theirs)])):
        call.extras["stats"] = torch.zeros(14, dtype=torch.float64)
        for step in (1, 2):
            call.take(op, call.gradients(step))
    assert all(torch.equal(a, b) for a, b in zip(ours.everything(), theirs.everything(), strict=True))
    # As test_cuda_emulated.test_statistics has it.
    assert ours.extras["stats"].tolist() == pytest.approx(theirs.extras["stats"].tolist(), rel=2 * 63 * U)
    assert ours.extras["stats"][0] == sum(p.numel() for p in ours.params)


# ---- layouts --------------------------------------------------------------------------------------------------------


def turned(t: torch.Tensor) -> torch.Tensor:
    return t.t().contiguous().t()


def with_gaps(t: torch.Tensor) -> torch.Tensor:
    wide = torch.zeros(*t.shape, 2, dtype=t.dtype)
    wide[..., 0] = t
    return wide[..., 0]


@pytest.mark.parametrize("change", [turned, with_gaps])
@pytest.mark.parametrize("weights", ["24", "32"])
def test_pairs_may_lie_otherwise_than_their_parameter(
    weights: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """The parameter, what lies beside it, or another operand: their copies are walked, and written back."""
    for names in (("params",), ("remainders",), ("params", "remainders"), ("exp_avg_sqs",), ("emas", "ema_scales")):

        def make(names: tuple[str, ...] = names) -> Lists:
            call = Pace(weights, 16, 24, ((40, 24), (3, 5)))
            for name in names:
                tensors = (call.lists | call.beside)[name]
                tensors[:] = [change(t) for t in tensors]  # type: ignore[index, union-attr]
            return call

        same_bits(device(), make, steps=2, first=0)


# ---- bytes ----------------------------------------------------------------------------------------------------------

# Read and written of a parameter, with its gradient and scales (STORAGE.md's figures).
OF_PACE: dict[tuple[str, int, int | None], float] = {
    ("32", 8, 8): 16 + 6 / 32,
    ("24", 8, 8): 14 + 6 / 32,
    ("dithered", 8, 8): 12 + 6 / 32,
    ("32", 8, 16): 18 + 6 / 32,
    ("32", 8, 24): 20 + 4 / 32,
    ("24", 8, None): 12 + 4 / 32,
    ("float32", 8, 8): 18 + 6 / 32,
    ("32", 16, 16): 22 + 2 / 32,
    ("32", 32, 32): 34,
}


@pytest.mark.parametrize("askew", ASKEW)
@pytest.mark.parametrize("case", OF_PACE, ids=str)
def test_each_tensor_of_pace_is_read_once_and_written_once(case: tuple[str, int, int | None], askew: str) -> None:
    on = device(askew)
    call = Pace(*case, ((50, 256),))
    grads = [g.to(p.dtype) for g, p in zip(call.gradients(1), call.params, strict=True)]
    call.take(on.pace_step_, grads)
    moved = {(name, kind): count for (family, name, kind), count in on.moved.items() if family == "pace"}
    moved = {key: count for key, count in moved.items() if key[0] not in ("steps", "workspace")}
    for key in moved:
        if key[0].endswith("scales") and not (key[0] == "ema_scales" and case[2] == 24) and key[1] == "ld":
            moved[key] //= 4  # the threads of a block, whose reads of one byte are one of memory
    assert sum(moved.values()) == OF_PACE[case] * 50 * 256, moved
    assert ("g", "st") not in moved
    wide = {width for family, _, width in on.widths if family == "pace" and width >= 8}
    scales = sum(count for (name, _), count in moved.items() if "scales" in name)
    narrow = sum(count for (family, _, width), count in on.widths.items() if family == "pace" and width == 1)
    if askew == "aligned":  # all but scales in accesses of 16 bytes, 8 of bytes
        assert wide <= {8, 16} and narrow <= 4 * scales + 1


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


@each_refusal
def test_what_the_cpu_refuses_is_refused(message: str, name: str, change: Any) -> None:
    assert_refused(lambda call: getattr(device(), call.definition.op), message, name, change)


# ---- optimizers -----------------------------------------------------------------------------------------------------

ADAM = {"beta3": 0.0, "rho": 1.0, "learn": ()}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "PACE": lambda p, **o: PACE(p, state_bits=8, master_weight_bits=32, **o),
    "PACE, averages of 16": lambda p, **o: PACE(p, state_bits=8, ema_bits=16, master_weight_bits=24, **o),
    "PACE, float32": lambda p, **o: PACE(p, state_bits=8, ema_bits=24, **o),
    "PACE, 16 bits": lambda p, **o: PACE(p, state_bits=16, stochastic_rounding=True, **o),
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
    dtype = torch.float32 if "float32" in name else torch.bfloat16
    kernel = "coded_kernel" if "PACE" in name else "general_kernel"
    path: list[torch.Tensor] = []
    if pulls and capturable:
        pytest.skip("torch.optim's capturable is of its own device")
    named = {"lr": 1e-2} if pulls else {"lr": 1e-2, "capturable": capturable, "backend": "cpu"}
    for on in (device(), None):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((66, 64), (64,), (2, 32, 64))]
        with on.in_place_of_the_cpu() if on is not None else nullcontext():
            optimizer = OPTIMIZERS[name](params, **named)
            values = optimizer.param_groups[0].get("coefficient_values")
            for t in range(4):
                if values is not None and on is None:
                    values.copy_(path[t])
                elif values is not None:
                    path.append(values.clone())
                for p in params:
                    p.grad = torch.randn(p.shape).to(dtype)
                optimizer.step()
        if on is not None:
            steps = on.calls["Plan.step" if pulls else "plan_step_"]
            assert steps == 3 and any(kernel in launch for launch in on.launches), on.calls
        runs.append((params, optimizer.base if pulls else optimizer))
    assert_same_bits(*runs)
