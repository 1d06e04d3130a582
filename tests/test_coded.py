"""Promise: a step whose weights and states lie in codes has the same bits in torch and in every kernel, for every
combination of formats, layout and number of threads, and refuses what does not fit before it writes."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from coded_cases import COMMON, KERNELS, unusual
from products import FULL, day
from test_native import BUILD, ROOT, processor_isas
from torch import Tensor

from pace_kernels import torch_rules
from pace_kernels.torch_rules import codes

OPTIONS: dict[str, Any] = {
    "lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01, "lambda_pullback": 1.0,
    "clamp_pullback": True, "beta_ema": 0.01, "ema_kappa": 0.5, "ema_rho": 0.0, "ema_gamma": 1.0, "ema_update_freq": 1,
    "pullback_from_step": False, "maximize": False, "stochastic_rounding": False, "capturable": False,
}  # fmt: skip
NATIVE = torch.ops.pace_kernels.pace_step_.default

WEIGHTS = ("float32", "bfloat16", "float16", "dithered", "24", "32")
STATES = (32, 16, 8)
AVERAGES = (None, 32, 24, 16, 8)
SHAPES = ((64, 32), (1, 32), (3, 5, 64), (0, 32), (257, 64))  # the last is longer than a block of 16,384


def product() -> Iterator[tuple[str, int, int | None]]:
    every = list(itertools.product(WEIGHTS, STATES, AVERAGES))
    yield from every if FULL else (*random.Random(day()).sample(every, 24), ("32", 8, 8), ("24", 8, 16))


def odd(n: int, dtype: torch.dtype) -> Tensor:
    """Of no alignment but its element's."""
    return torch.zeros(n + 1, dtype=dtype)[1:]


class Call:
    """The tensors of a call, new states as the optimizers make them."""

    def __init__(
        self, weights: str, state_bits: int, ema_bits: int | None, shapes: Any = SHAPES, seed: int = 0
    ) -> None:
        self.gen = torch.Generator().manual_seed(seed)
        dtype = {"float32": torch.float32, "float16": torch.float16}.get(weights, torch.bfloat16)
        self.params = [self.noise(s).to(dtype) for s in shapes]
        self.steps = [torch.zeros(()) for _ in shapes]
        self.beside: dict[str, list[Tensor] | None] = dict.fromkeys(
            ("remainders", "exp_avg_scales", "exp_avg_sq_scales", "ema_scales")
        )
        if weights in ("24", "32"):
            kind = torch.int8 if weights == "24" else torch.int16
            self.beside["remainders"] = [odd(p.numel(), kind).view(p.shape) for p in self.params]
        kinds = {32: torch.float32, 16: torch.bfloat16, 8: torch.uint8}
        m, v = ([odd(p.numel(), kinds[state_bits]).view(p.shape) for p in self.params] for _ in range(2))
        if state_bits == 8:
            for name in ("exp_avg_scales", "exp_avg_sq_scales"):
                self.beside[name] = [odd(p.numel() // codes.BLOCK, torch.uint8) for p in self.params]
        e: list[Tensor] = []
        if ema_bits is not None:
            kinds = {32: torch.float32, 24: torch.bfloat16, 16: torch.int16, 8: torch.int8}
            e = [odd(p.numel(), kinds[ema_bits]).view(p.shape) for p in self.params]
            for a, p in zip(e, self.params, strict=True):
                if ema_bits in (24, 32):
                    a.copy_(p)
            if ema_bits == 24:
                self.beside["ema_scales"] = [odd(p.numel(), torch.int8).view(p.shape) for p in self.params]
                for a, rest, p in zip(e, self.beside["ema_scales"], self.params, strict=True):
                    for part, value in zip((a, rest), codes.split(codes.rounded(p.float(), 24, 128), 24), strict=True):
                        part.copy_(value)
            elif ema_bits < 24:
                self.beside["ema_scales"] = [odd(p.numel() // codes.BLOCK, torch.uint8) for p in self.params]
        self.lists = [m, v, e]
        self.options = OPTIONS | {"stochastic_rounding": weights == "dithered"}
        if ema_bits is None:
            self.options["lambda_pullback"] = 0.0

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.gen)

    def gradients(self, step: int) -> list[Tensor]:
        """Of every size, with what no training should meet."""
        grads = [self.noise(p.shape) * 10.0 ** float(self.noise((1,)) * 3) for p in self.params]
        return unusual(grads, self.params, step)

    def take(self, function: Any, grads: list[Tensor], **changed: Any) -> None:
        function(self.params, grads, *self.lists, self.steps, **self.beside, **self.options | changed)

    def everything(self) -> list[Tensor]:
        lists = [self.params, *self.lists, self.steps, *(side for side in self.beside.values() if side)]
        flat = (t.reshape(-1).contiguous() for tensors in lists for t in tensors)
        settled = (codes.settled(t.float()) if t.is_floating_point() else t for t in flat)
        return [t.view(torch.uint8) for t in settled]


@pytest.mark.parametrize("case", list(product()), ids=str)
def test_torch_and_the_kernels_have_the_same_bits(case: tuple[str, int, int | None]) -> None:
    ours, theirs = Call(*case), Call(*case)
    for step in range(8):
        grads = ours.gradients(step)
        changed: dict[str, Any] = {} if step < 6 else {"ema_update_freq": 2, "lambda_pullback": 0.0}
        ours.take(NATIVE, grads, **changed)
        theirs.take(torch_rules.pace_step_, [g.clone() for g in grads], **changed)
        for a, b in zip(ours.everything(), theirs.everything(), strict=True):
            assert torch.equal(a, b), step


@pytest.mark.parametrize("count", (2**24, 2**24 + 2, 2**32 + 1, 2**40 + 3))
def test_steps_beyond_what_float32_counts(count: int) -> None:
    ours, theirs = Call("24", 8, 16), Call("24", 8, 16)
    for call, function in ((ours, NATIVE), (theirs, torch_rules.pace_step_)):
        call.steps = [torch.tensor(count, dtype=torch.float64) for _ in call.steps]
        call.take(function, call.gradients(0), ema_update_freq=3)
    assert all(map(torch.equal, ours.everything(), theirs.everything()))


# ---- instruction sets, threads, machine code -------------------------------------------------------------------------


def digest(threads: int) -> None:
    """Prints a hash of all bits after a few steps of large tensors, in the common formats."""
    torch.set_num_threads(threads)
    found = hashlib.sha256()
    for case in (("32", 8, 8), ("24", 8, 16), ("dithered", 16, 24), ("float32", 8, 24), ("float16", 16, 8)):
        call = Call(*case, shapes=((70, 512), (64, 32)))
        for step in range(5):
            call.take(NATIVE, call.gradients(step))
        for tensor in call.everything():
            found.update(tensor.numpy().tobytes())
    for make in COMMON.values():
        its = make(shapes=((70, 512), (64, 32)))
        for step in range(5):
            its.take(KERNELS[type(its)], its.gradients(step))
        for tensor in its.everything():
            found.update(tensor.numpy().tobytes())
    print(found.hexdigest())


def test_instruction_sets_and_threads_have_the_same_bits() -> None:
    code = "import sys; from test_coded import digest; digest(int(sys.argv[1]))"
    found = set()
    for isa, threads in {(isa, 1) for isa in processor_isas()} | {(processor_isas()[-1], 3)}:
        env = {**os.environ, "PACE_CPU_ISA": isa, "PYTHONPATH": str(ROOT / "tests")}
        done = subprocess.run(
            [sys.executable, "-c", code, str(threads)], env=env, capture_output=True, text=True, check=True
        )
        found.add(done.stdout)
    assert len(found) == 1


@pytest.mark.slow
@pytest.mark.skipif(len(processor_isas()) < 2, reason="the baseline's vectors are the compiler's choice")
def test_every_loop_over_codes_is_vectorized(tmp_path: Path) -> None:
    """One choice or conversion written otherwise costs a factor of 2.5, and the compiler does not say so."""
    isa = processor_isas()[-1]
    flags = [*BUILD["COMMON_FLAGS"], *BUILD["KERNEL_FLAGS"], *BUILD["ISA_FLAGS"][isa], "-fopt-info-vec-optimized"]
    defines = ["-DPACE_CPU_VARIANTS=X(baseline)", "-DPACE_ISA=baseline"]
    source = ROOT / BUILD["KERNELS"]
    done = subprocess.run(
        ["g++", *flags, *defines, "-c", str(source), "-o", str(tmp_path / "kernels.o")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    wide = {
        int(line)
        for line in re.findall(r"coded\.h:(\d+):\d+: optimized: +loop vectorized using (?:32|64)", done.stderr)
    }
    lines = (source.parent / "coded.h").read_text().splitlines()
    loops = [i + 2 for i, line in enumerate(lines) if "#pragma omp simd" in line]  # lines are counted from 1
    assert len(loops) > 10
    for first, following in zip(loops, [*loops[1:], len(lines)], strict=True):
        # The conversions of a pair's rest are of few elements, and of bytes: vectors of 8 and 16 there.
        assert wide & set(range(first - 1, following)) or "joined" in lines[first - 1], lines[first - 1]
