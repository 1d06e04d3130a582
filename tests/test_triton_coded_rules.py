"""The cases of test_triton.py on MADA, schedule-free and the pullback in compressed formats, in Triton's interpreter.
By hand: ``TRITON_INTERPRET=1 pytest tests/test_triton_coded_rules.py``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

if not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("test_triton.py runs these in Triton's interpreter", allow_module_level=True)

from coded_cases import AVERAGES, COMMON, ITERATES, KERNELS, PLAIN, STATES, WEIGHTS, Lists, Mada, Pullback, ScheduleFree
from pace_kernels.triton_kernels import ops
from products import pairs_and_seed
from test_coded_rules import REFUSED
from test_triton_interpreted import launches as launches
from torch import Tensor

from pace_kernels.ops import PACE_STATS

TRITON = {Mada: ops.mada_step_, ScheduleFree: ops.schedule_free_step_, Pullback: ops.pullback_}
# A block of MADA's kernel is 256 elements where it is not aligned: two and a part, a code block, nothing.
SHAPES = ((17, 32), (1, 32), (0, 32))
# Each of the rules' flags is on in one of these and off in another; a case takes about half a second.
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


@pytest.mark.parametrize("name", ["MADA", "Lion", "schedule-free", "pullback"])
def test_counts_and_scaling_on_the_device(name: str) -> None:
    both(lambda: COMMON[name](shapes=SHAPES), range(1, 3), on_the_device)


def aligned(call: Lists) -> None:
    """At multiples of 64 bytes, where torch allocates."""
    for tensors in (*call.lists.values(), *(side for side in call.beside.values() if side)):
        tensors[:] = [t.clone() for t in tensors]


@pytest.mark.parametrize("name", ["MADA, 16 bits", "schedule-free", "pullback"])
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
    both(lambda: Mada("capturable", "24", 16, 24, shapes), range(1, 3))
    both(lambda: ScheduleFree("dithered", 16, 24, shapes), range(1, 3), strided)
    both(lambda: Pullback("default", "bfloat16", 24, shapes), range(1, 3), strided)


def test_formats_that_differ_between_tensors(launches: Any) -> None:
    def mixed(call: Lists) -> None:
        call.lists["last_grads"][0] = call.lists["last_grads"][0].float()
        call.lists["second_exp_avg_sqs"][1] = call.lists["second_exp_avg_sqs"][1].float()

    both(lambda: Mada("all, inside", "dithered", 8, None, ((3, 32), (2, 32), (1, 32))), range(1, 3), mixed)
    assert launches["_sweep_kernel"] == 6


@pytest.mark.parametrize("name", ["MADA, roles stay", "schedule-free, 8 bits", "pullback, 16 bits"])
def test_nothing_happens_where_a_gradient_is_not_finite(name: str) -> None:
    call = both(lambda: COMMON[name](shapes=SHAPES), range(1, 2))
    grads = call.gradients(1)
    if isinstance(call, Pullback):  # its base has stepped nevertheless
        call.lists["befores"] = [p.clone() for p in call.params]
    before = [t.clone() for t in call.everything()]
    arguments = [(call.lists | {"grads": grads})[entry.list] for entry in call.definition.lists]
    call.extras["found_inf"] = torch.ones(())
    TRITON[type(call)](*arguments, call.steps, **call.extras, **call.beside, **call.options | {"capturable": True})
    assert all(torch.equal(a, b) for a, b in zip(call.everything(), before, strict=True))


@pytest.mark.parametrize("name", ["pullback", "pullback, 24 bits"])
def test_statistics(name: str) -> None:
    found = []
    for functions in (TRITON, KERNELS):
        call = COMMON[name](shapes=SHAPES)
        call.extras["stats"] = torch.zeros(len(PACE_STATS), dtype=torch.float64)
        call.take(functions[type(call)], call.gradients(1))
        found.append(call.extras["stats"])
    torch.testing.assert_close(*found, rtol=80 * 2**-24, atol=0.0)
    assert found[0][0] == 17 * 32 + 32


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_written(message: str) -> None:
    """As on the CPU."""
    name, change = REFUSED[message]
    call = COMMON[name](shapes=((64, 32),))
    grads = call.gradients(0)
    change(call)

    def refused(*lists: list[Tensor], **named: Any) -> None:
        before = [t.clone() for t in call.everything()]
        with pytest.raises(RuntimeError, match=re.escape(message)):
            TRITON[type(call)](*lists, **named)
        assert all(torch.equal(a, b) for a, b in zip(call.everything(), before, strict=True))

    call.take(refused, grads)
