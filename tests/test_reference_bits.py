"""The bits of weights and states, as they were before the kernels got their common house.

A hash for each case of ``pace_cases`` and ``mada_cases``, and for the pullback around two bases, in tests/data. Inputs
are made of integers, exactly, so that they are the same everywhere. Where something is learned, its coefficients stay:
sums of hypergradients have the bits of their instruction set. A case whose rule is meant to change gets its new hashes
by ``python tests/test_reference_bits.py``; the commit says why.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mada_cases
import pace_cases
import pytest
import torch
from torch import Tensor

from pace_kernels import MADA, PACE, Pullback, backends

FILE = Path(__file__).parent / "data" / "reference_bits.json"
SHAPES = ((67, 33), (19,), (), (3, 1, 5))
STEPS = 7
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Make = Callable[[list[Tensor], str], torch.optim.Optimizer]


def numbers(shape: tuple[int, ...], seed: int, low: int, high: int) -> Tensor:
    """Float32 numbers of 16 bits and either sign, between 2^low and 2^high."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.int64) + 104729 * seed
    i = (i * 2654435761) % 4294967296
    i = ((i ^ (i >> 15)) * 2246822519) % 4294967296
    i = i ^ (i >> 13)
    mantissa = 1.0 + (i % 65536).double() / 65536.0
    exponent = low + (i // 65536 % 4096) % (high - low)
    sign = 1.0 - 2.0 * (i // 268435456 % 2).double()
    return torch.ldexp(sign * mantissa, exponent).float().reshape(shape)


class Base(torch.optim.AdamW):
    """In place of AdamW's arithmetic, which torch does in other ways on other machines, one rounding a tensor."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] += 1
            state["exp_avg_sq"].copy_(p.grad * p.grad)
            p.sub_(p.grad * 2.0**-6)


def pullback(**options: Any) -> Make:
    def make(params: list[Tensor], backend: str) -> torch.optim.Optimizer:
        return Pullback(Base(params, lr=0.01), backend=backend, **options)

    return make


def cases() -> Iterator[tuple[str, Make]]:
    for name, options in pace_cases.CASES.items():
        yield f"PACE, {name}", lambda params, backend, o=options: PACE(params, lr=0.01, backend=backend, **o)
    for name, options in mada_cases.CASES.items():
        still = {"hyper_warmup": 1000} if options.get("learn", True) else {}
        chosen = {"lr": 0.01, **options, **still}
        yield f"MADA, {name}", lambda params, backend, o=chosen: MADA(params, backend=backend, **o)
    yield "Pullback", pullback(lambda_pullback=2.0)
    yield "Pullback, from the step", pullback(lambda_pullback=2.0, pullback_from="step")
    yield "Pullback, average every third step", pullback(lambda_pullback=0.0, ema_update_freq=3)
    yield "Pullback, constant", pullback(gain=0.25)


def fingerprint(make: Make, backend: str, dtype: torch.dtype, transposed: bool) -> str:
    params = [numbers(shape, k, -4, 1).to(dtype) for k, shape in enumerate(SHAPES)]
    if transposed:
        params[0] = params[0].t()
    params = [torch.nn.Parameter(p) for p in params]
    optimizer = make(params, backend)
    low, high = (-12, 4) if dtype == torch.float16 else (-30, 10)
    for step in range(STEPS):
        for k, p in enumerate(params):
            p.grad = numbers(tuple(p.shape), 1000 * (step + 1) + k, low, high).to(dtype)
        optimizer.step()
    digest = hashlib.sha256()
    for p in params:
        for name, value in {"": p.detach(), **dict(sorted(optimizer.state[p].items()))}.items():
            if isinstance(value, Tensor):
                plain = value.detach().contiguous().reshape(-1)
                plain = torch.where(plain.isnan(), torch.nan, plain)  # one NaN for all machines
                digest.update(name.encode() + plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


CASES = dict(cases())


def fingerprints(name: str, backend: str) -> dict[str, str]:
    made = {label: fingerprint(CASES[name], backend, dtype, False) for label, dtype in DTYPES.items()}
    return made | {"transposed": fingerprint(CASES[name], backend, torch.float32, True)}


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_of_record(name: str, backend: str) -> None:
    row = backends()[backend]
    if not row.available:
        pytest.skip(str(row.reason))
    assert fingerprints(name, backend) == json.loads(FILE.read_text())[name]


if __name__ == "__main__":
    recorded = {name: fingerprints(name, "torch") for name in CASES}
    FILE.write_text(json.dumps(recorded, indent=0, ensure_ascii=False) + "\n")
