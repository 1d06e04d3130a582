"""Promise: the CUDA kernels of MADA, schedule-free and the pullback with weights and states in compressed formats,
executed from their PTX, give the CPU kernels' bits for every combination of formats, option and alignment, and move no
byte twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mada_cases
import pullback_cases
import pytest
import torch
from coded_cases import AVERAGES, COMMON, ITERATES, KERNELS, PLAIN, STATES, WEIGHTS, Lists, Mada, Pullback, ScheduleFree
from emulated import build
from emulated.device import Device
from products import pairs_and_seed
from test_cuda_coded import ASKEW, ODD, U, device

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


@pytest.mark.parametrize(
    ("case", "weights", "state_bits", "ema_bits", "askew"),
    pairs_and_seed(mada_cases.CASES, WEIGHTS, STATES, AVERAGES, ASKEW, sample=2),
)
def test_mada(case: str, weights: str, state_bits: int, ema_bits: int | None, askew: str) -> None:
    same_bits(device(askew), lambda: Mada(case, weights, state_bits, ema_bits, SHAPES), ema_update_freq=2)


@pytest.mark.parametrize(
    ("weights", "state_bits", "z_bits", "askew"), pairs_and_seed(WEIGHTS, STATES, ITERATES, ASKEW, sample=2)
)
def test_schedule_free(weights: str, state_bits: int, z_bits: int, askew: str) -> None:
    same_bits(device(askew), lambda: ScheduleFree(weights, state_bits, z_bits, SHAPES), steps=4)


@pytest.mark.parametrize(
    ("case", "weights", "ema_bits", "askew"), pairs_and_seed(pullback_cases.CASES, PLAIN, ITERATES, ASKEW, sample=2)
)
def test_pullback(case: str, weights: str, ema_bits: int, askew: str) -> None:
    same_bits(device(askew), lambda: Pullback(case, weights, ema_bits, SHAPES), steps=4, ema_update_freq=2)


@pytest.mark.parametrize("name", COMMON)
def test_gradients_that_no_training_should_meet(name: str) -> None:
    """From the first step on: infinities, NaN, and 0."""
    on = device()
    same_bits(on, lambda: COMMON[name](shapes=SHAPES), steps=6, first=0)
    assert any("general_kernel" in launch for launch in on.launches)
