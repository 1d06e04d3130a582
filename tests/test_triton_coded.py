"""The cases of test_triton.py on weights and states in codes, in Triton's interpreter. By hand:
``TRITON_INTERPRET=1 pytest tests/test_triton_coded.py``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

if not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("test_triton.py runs these in Triton's interpreter", allow_module_level=True)

from pace_kernels.triton_kernels import ops
from products import pairs_and_seed
from test_coded import AVERAGES, NATIVE, STATES, WEIGHTS, Call
from test_triton_interpreted import launches as launches
from torch import Tensor

from pace_kernels import PACE
from pace_kernels.ops import PACE_STATS
from pace_kernels.torch_rules import codes

# A block of the unaligned kernel is 512 elements: one and a part, a code block, nothing.
SHAPES = ((17, 32), (1, 32), (0, 32))
HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "on the device": {"capturable": True, "lr_tensor": torch.tensor(0.02)},
    "scaled": {"grad_scale": torch.tensor(3.0), "clip_coef": torch.tensor(0.7), "found_inf": torch.zeros(())},
    "resting": {"ema_update_freq": 2, "lambda_pullback": 0.0},
    "no first moment": {"beta1": 0.0, "pullback_from_step": True},
}


def both(
    case: Any, steps: int, shapes: Any = SHAPES, change: Callable[[Call], None] | None = None, **options: Any
) -> None:
    """Steps by the kernel of the CPU and here: the same bits in every tensor of the call."""
    ours, theirs = Call(*case, shapes), Call(*case, shapes)
    for call in (ours, theirs) if change else ():
        change(call)
    for step in range(steps):
        grads = ours.gradients(step + 1)
        for call, function in ((ours, ops.pace_step_), (theirs, NATIVE)):
            changed = options if case[2] is not None else options | {"lambda_pullback": 0.0}
            call.take(function, [g.clone() for g in grads], **changed)
        for k, (a, b) in enumerate(zip(ours.everything(), theirs.everything(), strict=True)):
            assert torch.equal(a, b), (step, k)


CASES = pairs_and_seed(WEIGHTS, STATES, AVERAGES, HOW, sample=8)


@pytest.mark.parametrize(("weights", "states", "average", "how"), CASES)
def test_the_bits_of_the_cpu(weights: str, states: int, average: int | None, how: str) -> None:
    both((weights, states, average), 4, **HOW[how])


def aligned(call: Call) -> None:
    """At multiples of 64 bytes, where torch allocates."""
    for tensors in (*call.lists, *(side for side in call.beside.values() if side)):
        tensors[:] = [t.clone() for t in tensors]


@pytest.mark.parametrize("case", [("32", 8, 8), ("24", 8, 16), ("dithered", 16, 24)], ids=str)
def test_aligned_in_several_programs(case: Any, launches: Any) -> None:
    """A program has 4,096 elements, a block 2,048."""
    both(case, 2, ((131, 64), (2, 32)), aligned)
    assert launches == {"_scalars_kernel": 2, "_sweep_kernel": 2}


def test_step_counts_that_differ() -> None:
    def counted(call: Call) -> None:
        for step, taken in zip(call.steps, (4.0, 9.0, 4.0), strict=True):
            step.fill_(taken)
        call.steps[1] = torch.tensor(2.0**33 + 5, dtype=torch.float64)

    both(("24", 8, 8), 2, change=counted)
    both(("24", 8, 8), 2, change=counted, capturable=True)


def test_tensors_of_any_size_where_nothing_is_in_blocks() -> None:
    """Two groups of 16 and a rest, a rest alone; and strides of their own, which are copied."""

    def strided(call: Call) -> None:
        call.params[0] = torch.stack([call.params[0]] * 2, dim=-1)[..., 0]

    both(("24", 16, 24), 3, ((37,), (5,)))
    both(("32", 32, 32), 2, ((37,), (5,)), strided)
    both(("dithered", 16, 24), 2, ((6, 7), (5,)), strided)


def test_formats_that_differ_between_tensors(launches: Any) -> None:
    def mixed(call: Call) -> None:
        call.params[1] = call.params[1].float()
        call.lists[0][2] = call.lists[0][2].float()

    both(("dithered", 16, 8), 2, ((3, 32), (2, 32), (1, 32)), mixed)
    assert launches["_sweep_kernel"] == 6


def test_statistics_and_nothing_where_a_gradient_is_not_finite() -> None:
    found = []
    for function in (ops.pace_step_, NATIVE):
        call, stats = Call("32", 8, 8, SHAPES), torch.zeros(len(PACE_STATS), dtype=torch.float64)
        grads = call.gradients(0)
        call.take(function, grads, stats=stats)
        before = [t.clone() for t in call.everything()]
        found.append((stats.clone(), before))
        call.take(function, grads, stats=stats, found_inf=torch.ones(()), capturable=True)
        assert all(torch.equal(a, b) for a, b in zip(call.everything(), before, strict=True))
        assert stats.tolist() == [torch.inf if name.endswith("_min") else 0.0 for name in PACE_STATS]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=80 * 2**-24, atol=0)
    assert found[0][0][0] == 17 * 32 + 32
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def short(tensors: list[Tensor] | None) -> list[Tensor]:
    assert tensors is not None
    return tensors[:-1]


# By the sentence of both kernels: a case, and what is wrong with it.
REFUSED: dict[str, tuple[Any, Callable[[Call], None]]] = {
    "remainders has 2 tensors, params has 3": (
        ("32", 8, 8), lambda c: c.beside.update(remainders=short(c.beside["remainders"]))
    ),
    "params[0] must be bfloat16, with remainders": (
        ("32", 32, 32), lambda c: c.params.__setitem__(0, c.params[0].half())
    ),
    "remainders[1] must be int16 or int8": (
        ("32", 32, 32), lambda c: c.beside["remainders"].__setitem__(1, c.beside["remainders"][1].int())
    ),
    "remainders[0] has shape (32, 17), its parameter has (17, 32)": (
        ("24", 32, 32), lambda c: c.beside["remainders"].__setitem__(0, c.beside["remainders"][0].view(32, 17))
    ),
    "exp_avgs[0] must be float32 or bfloat16 without exp_avg_scales": (
        ("32", 8, 8), lambda c: c.beside.update(exp_avg_scales=None)
    ),
    "exp_avg_sqs[0] must be uint8, with exp_avg_sq_scales": (
        ("32", 8, 8), lambda c: c.lists[1].__setitem__(0, c.lists[1][0].float())
    ),
    "emas[0] must be float32 without ema_scales": (("32", 8, 8), lambda c: c.beside.update(ema_scales=None)),
    "emas[2] must be int8, int16 or bfloat16, with ema_scales": (
        ("32", 8, 8), lambda c: c.lists[2].__setitem__(2, c.lists[2][2].float())
    ),
    "ema_scales[1] must be int8": (
        ("32", 8, 24), lambda c: c.beside["ema_scales"].__setitem__(1, c.beside["ema_scales"][1].short())
    ),
    "ema_scales[0] must be contiguous, uint8, with an element for 32 of its codes": (
        ("32", 8, 8), lambda c: c.beside["ema_scales"].__setitem__(0, c.beside["ema_scales"][0][1:])
    ),
    "exp_avg_sqs[0] and its parameter must be contiguous, with exp_avg_sq_scales": (
        ("float32", 8, None),
        lambda c: (c.lists[0].clear(), c.params.__setitem__(0, torch.empty(32, 17).t().copy_(c.params[0]))),
    ),
    "params[1] must have a multiple of 32 elements, with exp_avg_scales": (
        ("32", 8, None),
        lambda c: [
            tensors.__setitem__(1, tensors[1][:, :31])
            for tensors in (c.params, c.beside["remainders"], *c.lists[:2])
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_written(message: str) -> None:
    case, change = REFUSED[message]
    for function in (NATIVE, ops.pace_step_):
        call = Call(*case, SHAPES)
        change(call)
        options = {"beta1": 0.0} if not call.lists[0] else {}
        before = [t.clone() for t in call.everything()]
        with pytest.raises(RuntimeError, match=re.escape(message)):
            call.take(function, [torch.zeros_like(p) for p in call.params], **options)
        assert all(torch.equal(a, b) for a, b in zip(call.everything(), before, strict=True))


def test_scales_and_rests_of_averages_are_not_mixed() -> None:
    """The CPU has both in one call."""
    grid, apart = Call("32", 8, 8, SHAPES), Call("32", 8, 24, SHAPES)
    grid.beside["ema_scales"][1] = apart.beside["ema_scales"][1]
    grid.lists[2][1] = apart.lists[2][1]
    with pytest.raises(RuntimeError, match="ema_scales must all be of one dtype where some are uint8"):
        grid.take(ops.pace_step_, grid.gradients(0))


@pytest.mark.parametrize(
    "options",
    [{"state_bits": 8, "master_weight_bits": 32}, {"state_bits": 8, "master_weight_bits": 24, "ema_bits": 16},
     {"state_bits": 16, "stochastic_rounding": True, "capturable": True}],
    ids=str,
)  # fmt: skip
def test_an_optimizer_steps_alike(options: dict[str, Any]) -> None:
    found = []
    for backend in ("cpu", "triton"):
        generator = torch.Generator().manual_seed(1)
        params = [torch.nn.Parameter(torch.randn(s, generator=generator).bfloat16()) for s in ((64, 64), (7,))]
        optimizer = PACE(params, lr=1e-2, backend=backend, **options)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).bfloat16()
            optimizer.step()
        with optimizer.averaged():
            averages = [p.detach().clone() for p in params]
        found.append([*averages, *(t for p in params for t in (p.detach(), *optimizer.state[p].values()))])
    assert any(t.dtype in (torch.uint8, torch.int8, torch.bfloat16) for t in found[1])
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype and torch.equal(codes.settled(a.float()), codes.settled(b.float()))
