"""The cases of test_triton.py on weights and states in codes, in Triton's interpreter. By hand:
``TRITON_INTERPRET=1 pytest tests/test_triton_coded.py``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

if not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("test_triton.py runs these in Triton's interpreter", allow_module_level=True)

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
from pace_kernels.triton_kernels import ops
from products import pairs_and_seed
from test_triton_interpreted import launches as launches

from pace_kernels import PACE
from pace_kernels.ops import PACE_STATS
from pace_kernels.torch_rules import codes

TRITON = {kind: getattr(ops, kind.definition.op) for kind in KERNELS}
# A block of PACE's kernel is 512 elements where it is not aligned, of MADA's 256: some and a part, 32, nothing.
SHAPES = ((17, 32), (1, 32), (0, 32))
HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "on the device": {"capturable": True, "lr_tensor": torch.tensor(0.02)},
    "scaled": {"grad_scale": torch.tensor(3.0), "clip_coef": torch.tensor(0.7), "found_inf": torch.zeros(())},
    "resting": {"ema_update_freq": 2, "lambda_pullback": 0.0},
    "no first moment": {"beta1": 0.0, "pullback_from_step": True},
}
# Each of the other rules' flags is on in one of these and off in another; a case takes about half a second.
MADA_CASES = (
    *("all, inside", "all, maximum", "hyperadam", "fixed, inside", "averaged Lion", "pulled, every third step"),
    "capturable",
)
PULLBACK_CASES = (
    *("default", "from the step, narrow moment", "constant", "average every third step, no pull", "everything"),
    *("capturable constant",),
)


def both(
    make: Callable[[], Lists], steps: range = range(2, 5), change: Callable[[Lists], None] | None = None, **options: Any
) -> Lists:
    """Steps by the kernel of the CPU and here: the same bits in every tensor of the call. The third step's gradients
    have what is not finite, the fourth's are 0. Hypergradients have the same terms, in sums of another order."""
    ours, theirs = make(), make()
    for call in (ours, theirs) if change else ():
        change(call)
    for step in steps:
        grads = ours.gradients(step)
        for call, functions in ((ours, TRITON), (theirs, KERNELS)):
            call.take(functions[type(call)], [g.clone() for g in grads], **options)
        for k, (a, b) in enumerate(zip(ours.everything(), theirs.everything(), strict=True)):
            assert torch.equal(a, b), (step, k)
        for name, sums in ours.extras.items():
            torch.testing.assert_close(sums, theirs.extras[name], rtol=1e-4, atol=1e-8, equal_nan=True)
    return ours


@pytest.mark.parametrize(
    ("weights", "state_bits", "ema_bits", "how"), pairs_and_seed(WEIGHTS, STATES, AVERAGES, HOW, sample=8)
)
def test_pace(weights: str, state_bits: int, ema_bits: int | None, how: str) -> None:
    both(lambda: Pace(weights, state_bits, ema_bits, SHAPES, **HOW[how]), range(1, 5))


@pytest.mark.parametrize(
    ("case", "weights", "state_bits", "ema_bits"), pairs_and_seed(MADA_CASES, WEIGHTS, STATES, AVERAGES, sample=2)
)
def test_mada(case: str, weights: str, state_bits: int, ema_bits: int | None) -> None:
    both(lambda: Mada(case, weights, state_bits, ema_bits, SHAPES))


@pytest.mark.parametrize(("weights", "state_bits", "z_bits"), pairs_and_seed(WEIGHTS, STATES, ITERATES, sample=4))
def test_schedule_free(weights: str, state_bits: int, z_bits: int) -> None:
    both(lambda: ScheduleFree(weights, state_bits, z_bits, SHAPES))


@pytest.mark.parametrize(("case", "weights", "ema_bits"), pairs_and_seed(PULLBACK_CASES, PLAIN, ITERATES, sample=4))
def test_the_pullback(case: str, weights: str, ema_bits: int) -> None:
    both(lambda: Pullback(case, weights, ema_bits, SHAPES))


def on_the_device(call: Lists) -> None:
    """Step counts that differ, one of them beyond what float32 counts; learning rate, scaling and schedule in
    tensors."""
    call.options["capturable"] = True
    call.extras["lr_tensor"] = torch.tensor(0.02)
    if "grad_scale" in call.definition.scaling:
        call.extras |= {"grad_scale": torch.tensor(3.0), "clip_coef": torch.tensor(0.7)}
    call.extras["found_inf"] = torch.zeros(())
    if isinstance(call, ScheduleFree):
        call.extras["schedule"] = torch.tensor([7.0, 0.2], dtype=torch.float64)
    call.steps[:] = [torch.tensor(4.0), torch.tensor(2.0**33 + 5, dtype=torch.float64), torch.tensor(9.0)]


@pytest.mark.parametrize("name", ["PACE", "MADA", "Lion", "schedule-free", "pullback"])
def test_counts_and_scaling_on_the_device(name: str) -> None:
    both(lambda: COMMON[name](shapes=SHAPES), range(1, 3), on_the_device)


def test_counts_that_differ_on_the_host() -> None:
    def counted(call: Lists) -> None:
        call.steps[:] = [torch.tensor(4.0), torch.tensor(2.0**33 + 5, dtype=torch.float64), torch.tensor(9.0)]

    both(lambda: COMMON["PACE, 16 bits"](shapes=SHAPES), range(1, 3), counted)


def aligned(call: Lists) -> None:
    """At multiples of 64 bytes, where torch allocates."""
    for tensors in (*call.lists.values(), *(side for side in call.beside.values() if side)):
        tensors[:] = [t.clone() for t in tensors]


@pytest.mark.parametrize(
    "name", ["PACE", "PACE, 16 bits", "PACE, 24 bits", "MADA, 16 bits", "schedule-free", "pullback"]
)
def test_aligned_in_several_programs(name: str, launches: Any) -> None:
    """A program has 4,096 elements, a block 512 (MADA) to 2,048."""
    call = both(lambda: COMMON[name](shapes=((66, 64), (2, 32))), range(1, 3), aligned)
    learns = isinstance(call, Mada)
    assert launches == {"_scalars_kernel": 2, "_sweep_kernel": 2} | ({"_add_up_kernel": 2} if learns else {})


def test_tensors_of_any_size_where_nothing_is_in_blocks() -> None:
    """Two groups of 16 and a rest, a rest alone; and strides of their own, which are copied."""

    def strided(call: Lists) -> None:
        call.params[0] = torch.stack([call.params[0]] * 2, dim=-1)[..., 0]

    shapes = ((37,), (5,))
    both(lambda: Pace("24", 16, 24, shapes), range(1, 4))
    both(lambda: Pace("32", 32, 32, shapes), range(1, 3), strided)
    both(lambda: Pace("dithered", 16, 24, ((6, 7), (5,))), range(1, 3), strided)
    both(lambda: Mada("capturable", "24", 16, 24, shapes), range(1, 3))
    both(lambda: ScheduleFree("dithered", 16, 24, shapes), range(1, 3), strided)
    both(lambda: Pullback("default", "bfloat16", 24, shapes), range(1, 3), strided)


@pytest.mark.parametrize("rule", ["PACE", "MADA"])
def test_formats_that_differ_between_tensors(rule: str, launches: Any) -> None:
    shapes = ((3, 32), (2, 32), (1, 32))

    def mixed(call: Lists) -> None:
        places = {"PACE": (("params", 1), ("exp_avgs", 2)), "MADA": (("last_grads", 0), ("second_exp_avg_sqs", 1))}
        for name, i in places[rule]:
            call.lists[name][i] = call.lists[name][i].float()

    if rule == "PACE":
        both(lambda: Pace("dithered", 16, 8, shapes), range(1, 3), mixed)
    else:
        both(lambda: Mada("all, inside", "dithered", 8, None, shapes), range(1, 3), mixed)
    assert launches["_sweep_kernel"] == 6


@pytest.mark.parametrize("name", ["PACE", "MADA, roles stay", "schedule-free, 8 bits", "pullback, 16 bits"])
def test_nothing_happens_where_a_gradient_is_not_finite(name: str) -> None:
    call = both(lambda: COMMON[name](shapes=SHAPES), range(1, 2))
    grads = call.gradients(1)
    if isinstance(call, Pullback):  # its base has stepped nevertheless
        call.lists["befores"] = [p.clone() for p in call.params]
    before = [t.clone() for t in call.everything()]
    arguments = [(call.lists | {"grads": grads})[entry.list] for entry in call.definition.lists]
    call.extras["found_inf"] = torch.ones(())
    stats = torch.ones(len(PACE_STATS), dtype=torch.float64)
    if name == "PACE":
        call.extras["stats"] = stats
    TRITON[type(call)](*arguments, call.steps, **call.extras, **call.beside, **call.options | {"capturable": True})
    assert all(torch.equal(a, b) for a, b in zip(call.everything(), before, strict=True))
    if name == "PACE":
        assert stats.tolist() == [torch.inf if entry.endswith("_min") else 0.0 for entry in PACE_STATS]


@pytest.mark.parametrize("name", ["PACE", "pullback", "pullback, 24 bits"])
def test_statistics(name: str) -> None:
    found = []
    for functions in (TRITON, KERNELS):
        call = COMMON[name](shapes=SHAPES)
        call.extras["stats"] = torch.zeros(len(PACE_STATS), dtype=torch.float64)
        call.take(functions[type(call)], call.gradients(1))
        found.append(call.extras["stats"])
    torch.testing.assert_close(*found, rtol=80 * 2**-24, atol=0.0)
    assert found[0][0] == 17 * 32 + 32


@each_refusal
def test_what_does_not_fit_is_refused_before_anything_is_written(message: str, name: str, change: Any) -> None:
    """As on the CPU."""
    assert_refused(lambda call: TRITON[type(call)], message, name, change)


def test_scales_and_rests_of_averages_are_not_mixed() -> None:
    """The CPU has both in one call."""
    grid, apart = Pace("32", 8, 8, SHAPES), Pace("32", 8, 24, SHAPES)
    grid.beside["ema_scales"][1] = apart.beside["ema_scales"][1]
    grid.lists["emas"][1] = apart.lists["emas"][1]
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
