"""Promise: an operand without its memory, or at an address that is no multiple of its element size, ends in a sentence
before anything is written, also where found_inf leaves the step undone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from step_count_cases import OPERATORS
from test_mada_native import LEARN
from torch import Tensor


def emptied(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def shrunk(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(t.nbytes - 1)
    return t


def askew(t: Tensor) -> Tensor:
    raw = torch.frombuffer(bytearray(t.nbytes + 8), dtype=torch.uint8)
    start = next(k for k in range(8) if (raw.data_ptr() + k) % t.element_size() == 1)
    return torch.frombuffer(raw.numpy().data, dtype=t.dtype, offset=start, count=t.numel()).view(t.shape).copy_(t)


FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "emptied": (emptied, "has more elements than memory"),
    "shrunk": (shrunk, "has more elements than memory"),
    "askew": (askew, "must lie at a multiple of its element size"),
}


def learning() -> dict[str, Any]:
    names = ("coefficients", "momenta", "hypergradients")
    six: dict[str, Any] = {name: torch.rand(6, dtype=torch.float64) for name in names}
    sums = [torch.rand(7, dtype=torch.float64) for _ in range(2)]
    return six | {"hyper_step": torch.tensor(2.0, dtype=torch.float64), "sums": sums}


ALL = {**OPERATORS, "mada_learn_": (learning, LEARN)}


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ALL)
def test_each_operand_is_looked_at_before_the_first_write(name: str, fault: str, skipped: bool) -> None:
    spoil, message = FAULTS[fault]
    operands, options = ALL[name]
    small = {"lr_tensor": torch.tensor(0.01), "found_inf": torch.tensor(float(skipped))}
    small |= {} if name == "pullback_" else {"grad_scale": torch.tensor(2.0), "clip_coef": torch.tensor(0.5)}
    small = {"found_inf": small["found_inf"]} if name == "mada_learn_" else small
    for operand in (*operands(), *small):
        torch.manual_seed(0)
        call = {**operands(), **{k: v.clone() for k, v in small.items()}}
        value = call[operand]
        if isinstance(value, list):
            value[-1] = spoil(value[-1])
        else:
            call[operand] = spoil(value)
        sound = [
            t
            for v in call.values()
            for t in (v if isinstance(v, list) else [v])
            if t.untyped_storage().nbytes() >= t.nbytes
        ]
        before = [t.clone() for t in sound]
        with pytest.raises(RuntimeError, match=rf"\b{operand}(\[1\])? {message}"):
            getattr(torch.ops.pace_kernels, name)(**call, **options)
        assert all(torch.equal(a, b) for a, b in zip(sound, before, strict=True)), operand
