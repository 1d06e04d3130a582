"""Promise: the CUDA kernels of weights and states in codes, executed from their PTX, give the CPU kernels' bits for
every combination of formats, option and alignment, move no byte twice, and refuse what the CPU refuses."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from emulated import build
from emulated.device import Device
from pace_cases import assert_same_bits
from products import pairs_and_seed
from test_coded import AVERAGES, NATIVE, STATES, WEIGHTS, Call, odd

from pace_kernels import PACE

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))

# A warp takes 256 elements, and a block of threads 4,096.
SHAPES = ((129, 32), (9, 1, 64), (1, 32), (0, 32), (1, 256))
ODD = ((7, 3), (1,), (4099,), (16, 16))  # where nothing is in blocks
U = 2.0**-24

# What a step is called with beside the options of test_coded.
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
ASKEW = {"aligned": (0, ""), "gradients askew": (2, "g"), "all askew": (2, "")}


def device(askew: str = "aligned", **options: Any) -> Device:
    misalign, names = ASKEW[askew]
    only = {"askew": {names}} if names else {}
    return Device(rng=np.random.default_rng(0), misalign=misalign, **only, **options)


def calls_of(case: tuple[Any, ...], called: dict[str, Any], shapes: Any = SHAPES) -> list[Call]:
    found = [Call(*case, shapes=shapes) for _ in range(2)]
    for call in found:
        if called.get("beta1") == 0.0:
            call.lists[0] = []
            call.beside["exp_avg_scales"] = None
    return found


def same_bits(on: Device, ours: Call, theirs: Call, steps: int = 4, first: int = 0, **called: Any) -> None:
    for step in range(first, first + steps):
        grads = ours.gradients(step)
        named = {name: value for name, value in called.items() if name != "lambda_pullback" or ours.lists[2]}
        ours.take(on.pace_step_, grads, **named)
        theirs.take(NATIVE, [g.clone() for g in grads], **named)
        for k, (a, b) in enumerate(zip(ours.everything(), theirs.everything(), strict=True)):
            assert torch.equal(a, b), (step, k, int((a != b).sum()))


@pytest.mark.parametrize(
    ("weights", "state_bits", "ema_bits", "called", "askew"),
    pairs_and_seed(WEIGHTS, STATES, AVERAGES, CALLS, ASKEW, sample=8),
)
def test_cuda_gives_the_bits_of_the_cpu(
    weights: str, state_bits: int, ema_bits: int | None, called: str, askew: str
) -> None:
    on = device(askew)
    case = (weights, state_bits, ema_bits)
    same_bits(on, *calls_of(case, CALLS[called]), first=1, **CALLS[called])
    plain = weights in ("float32", "bfloat16", "float16") and state_bits == 32 and ema_bits in (None, 32)
    assert plain != any("coded_kernel" in name for name in on.launches), on.launches


@pytest.mark.parametrize("ema_bits", [8, 16, 24, None])
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "dithered", "24", "32"])
def test_the_frequent_formats_have_kernels_of_their_own(weights: str, ema_bits: int | None) -> None:
    """Each of them, from the first step through gradients of infinities, NaN and 0, to an average that rests."""
    on = device()
    ours, theirs = calls_of((weights, 8, ema_bits), {})
    same_bits(on, ours, theirs, steps=6)
    same_bits(on, ours, theirs, steps=1, first=6, ema_update_freq=2)
    assert all("coded_kernel<pace::Known" in name for name in on.launches)


@pytest.mark.parametrize("askew", ASKEW)
@pytest.mark.parametrize(
    ("weights", "state_bits", "ema_bits"), [("32", 32, 24), ("24", 16, 32), ("dithered", 16, 24), ("float16", 16, None)]
)
def test_formats_without_blocks_have_any_shape(weights: str, state_bits: int, ema_bits: int | None, askew: str) -> None:
    same_bits(device(askew), *calls_of((weights, state_bits, ema_bits), {}, shapes=ODD))


@pytest.mark.parametrize(("m_bits", "v_bits"), list(itertools.permutations((32, 16, 8), 2)))
def test_moments_of_unlike_formats(m_bits: int, v_bits: int) -> None:
    pair = []
    for _ in range(2):
        call, other = Call("32", m_bits, 8, shapes=SHAPES), Call("32", v_bits, 8, shapes=SHAPES)
        call.lists[1] = other.lists[1]
        call.beside["exp_avg_sq_scales"] = other.beside["exp_avg_sq_scales"]
        pair.append(call)
    same_bits(device(), *pair)


def test_codes_and_plain_tensors_in_one_call() -> None:
    """With stochastic rounding the bfloat16 parameters of a call are coded, those in float32 are not."""
    pair = [Call("dithered", 32, 32, shapes=SHAPES) for _ in range(2)]
    for call in pair:
        call.params[1] = call.params[1].float()
        call.params[0] = call.params[0].half()
    on = device()
    same_bits(on, *pair)
    assert {name.split("<")[0] for name in on.launches} == {"pace::sweep_kernel", "pace::coded_kernel"}


def test_weights_that_others_wrote() -> None:
    """Rests of other weights: where the weight is 0 now a negative one counts as 0, as on the CPU."""
    for weights, ema_bits in (("24", 8), ("32", 16), ("24", 24), ("32", None)):
        pair = calls_of((weights, 8, ema_bits), {})
        for call in pair:
            rests = call.beside["remainders"]
            assert rests is not None
            for p, rest in zip(call.params, rests, strict=True):
                rest.view(-1)[::3] = -5
                p.view(-1)[::2] = 0.0
                p.view(-1)[1::4] = -0.0
            if ema_bits == 24:
                for e, rest in zip(call.lists[2], call.beside["ema_scales"] or [], strict=True):
                    rest.view(-1)[::3] = -5
                    e.view(-1)[::2] = -0.0
        same_bits(device(), *pair, steps=2)


def test_averages_beyond_their_grid() -> None:
    """Weights that move by less than 2^-22 of themselves: beyond, a float's own places are the grid."""
    for weights, ema_bits in (("float32", 8), ("32", 8), ("24", 16)):
        pair = calls_of((weights, 8, ema_bits), {})
        same_bits(device(), *pair, steps=3, lr=1e-9)


@pytest.mark.parametrize("arch", build.ptx_archs())
@pytest.mark.parametrize("case", [("32", 8, 8), ("float16", 16, 16)])
def test_one_warp_at_a_time_in_every_ptx(case: tuple[str, int, int], arch: str) -> None:
    same_bits(device(arch=arch, warp_serial=True), *calls_of(case, {}), steps=2)


def test_a_skipped_step_changes_nothing() -> None:
    call, before = calls_of(("32", 8, 8), {})
    call.take(device().pace_step_, call.gradients(3), capturable=True, found_inf=torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(call.everything(), before.everything(), strict=True))


@pytest.mark.parametrize("case", [("32", 8, 8), ("24", 8, None), ("dithered", 16, 16), ("float32", 8, 24)])
def test_statistics(case: tuple[str, int, int | None]) -> None:
    ours, theirs = calls_of(case, {})
    found = [torch.zeros(14, dtype=torch.float64) for _ in range(2)]
    on = device("gradients askew")
    for step in (0, 1):
        grads = ours.gradients(step)
        ours.take(on.pace_step_, grads, stats=found[0])
        theirs.take(NATIVE, grads, stats=found[1])
    assert all(torch.equal(a, b) for a, b in zip(ours.everything(), theirs.everything(), strict=True))
    # As test_cuda_emulated.test_statistics has it.
    assert found[0].tolist() == pytest.approx(found[1].tolist(), rel=2 * 63 * U)
    assert found[0][0] == sum(p.numel() for p in ours.params)


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
    for names in (("params",), ("remainders",), ("params", "remainders"), ("v",), ("e", "ema_scales")):
        pair = [Call(weights, 16, 24, shapes=((40, 24), (3, 5))) for _ in range(2)]
        for call in pair:
            lists: dict[str, Any] = {"params": call.params, "v": call.lists[1], "e": call.lists[2], **call.beside}
            for name in names:
                lists[name][:] = [change(t) for t in lists[name]]
        same_bits(device(), *pair, steps=2)


def cut(call: Call, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    lists: dict[str, Any] = {"params": call.params, "v": call.lists[1], "e": call.lists[2], **call.beside}
    lists[name][0] = change(lists[name][0])


REFUSED: dict[str, tuple[Callable[[Call], Any], str]] = {
    "codes that are not contiguous": (lambda c: cut(c, "v", turned), r"exp_avg_sqs\[0\] and its parameter must be con"),
    "a parameter that is not": (lambda c: cut(c, "params", turned), r"exp_avgs\[0\] and its parameter must be contig"),
    "scales too few": (lambda c: cut(c, "ema_scales", lambda t: t[1:]), r"ema_scales\[0\] must be contiguous, uint8"),
    "rests of no format": (lambda c: cut(c, "remainders", lambda t: t.int()), r"remainders\[0\] must be int16 or int8"),
    "codes of no format": (lambda c: cut(c, "e", lambda t: t.int()), r"emas\[0\] must be int8, int16 or bfloat16"),
    "floats with scales": (lambda c: cut(c, "v", lambda t: t.float()), r"exp_avg_sqs\[0\] must be uint8"),
    "codes without scales": (lambda c: c.beside.update(exp_avg_scales=None), r"exp_avgs\[0\] must be float32 or bfl"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_cpu_refuses_is_refused(case: str) -> None:
    change, sentence = REFUSED[case]
    for op in (device().pace_step_, NATIVE):
        call = Call("32", 8, 8, shapes=SHAPES)
        change(call)
        before = [t.clone() for t in call.everything()]
        with pytest.raises(RuntimeError, match=sentence):
            call.take(op, call.gradients(0))
        assert all(torch.equal(a, b) for a, b in zip(before, call.everything(), strict=True))


def test_a_number_of_elements_that_no_blocks_make_up() -> None:
    call = Call("32", 32, None, shapes=((5, 33),))
    call.lists[1] = [odd(165, torch.uint8).view(5, 33)]
    call.beside["exp_avg_sq_scales"] = [odd(5, torch.uint8)]
    with pytest.raises(RuntimeError, match=r"params\[0\] must have a multiple of 32 elements, with exp_avg_sq_scales"):
        call.take(device().pace_step_, call.gradients(0))


# ---- optimizers -----------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "master 32": (torch.bfloat16, {"state_bits": 8, "master_weight_bits": 32}),
    "master 24, averages of 16": (torch.bfloat16, {"state_bits": 8, "ema_bits": 16, "master_weight_bits": 24}),
    "float32": (torch.float32, {"state_bits": 8, "ema_bits": 24}),
    "16 bits": (torch.bfloat16, {"state_bits": 16, "stochastic_rounding": True}),
}


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("case", OPTIMIZERS)
def test_plans(case: str, capturable: bool) -> None:
    """From the second step on, with matrices in codes and a vector that is not."""
    dtype, options = OPTIMIZERS[case]
    runs = []
    for on in (device(), None):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((66, 64), (64,), (2, 32, 64))]
        with on.in_place_of_the_cpu() if on is not None else nullcontext():
            optimizer = PACE(params, lr=1e-2, capturable=capturable, backend="cpu", **options)
            for _ in range(4):
                for p in params:
                    p.grad = torch.randn(p.shape).to(dtype)
                optimizer.step()
        if on is not None:
            assert on.calls["plan_step_"] == 3 and any("coded_kernel" in name for name in on.launches), on.calls
        runs.append((params, optimizer))
    assert_same_bits(*runs)


# ---- bytes ----------------------------------------------------------------------------------------------------------

# Read and written of a parameter, with its gradient and scales (STORAGE.md's figures).
BYTES: dict[tuple[str, int, int | None], float] = {
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
@pytest.mark.parametrize("case", BYTES, ids=str)
def test_each_tensor_is_read_once_and_written_once(case: tuple[str, int, int | None], askew: str) -> None:
    on = device(askew)
    call = Call(*case, shapes=((50, 256),))
    grads = [g.to(p.dtype) for g, p in zip(call.gradients(1), call.params, strict=True)]
    call.take(on.pace_step_, grads)
    moved = {(name, kind): count for (family, name, kind), count in on.moved.items() if family == "pace"}
    moved = {key: count for key, count in moved.items() if key[0] not in ("steps", "workspace")}
    for key in moved:
        if key[0].endswith("scales") and not (key[0] == "ema_scales" and case[2] == 24) and key[1] == "ld":
            moved[key] //= 4  # the threads of a block, whose reads of one byte are one of memory
    assert sum(moved.values()) == BYTES[case] * 50 * 256, moved
    assert ("g", "st") not in moved
    wide = {width for family, _, width in on.widths if family == "pace" and width >= 8}
    scales = sum(count for (name, _), count in moved.items() if "scales" in name)
    narrow = sum(count for (family, _, width), count in on.widths.items() if family == "pace" and width == 1)
    if askew == "aligned":  # all but scales in accesses of 16 bytes, 8 of bytes
        assert wide <= {8, 16} and narrow <= 4 * scales + 1
