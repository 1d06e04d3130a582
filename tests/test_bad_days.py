"""Promise: on a bad day PACE and MADA do what torch.optim.AdamW does, or say what they do: numbers that are not finite,
or at the ends of a format's range; tensors beyond 2^31 elements; threads, forks and exceptions. docs/bad-days.md."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mada_cases
import pytest
import torch
from torch import Tensor

from pace_kernels import MADA, PACE

ROOT = Path(__file__).parent.parent
FLT_MAX = torch.finfo(torch.float32).max
TINY = 2.0**-126  # float32's smallest normal number, and the smallest eps
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["cpu", "torch"]
COMMON: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.01}

# What is AdamW, each by its own kernels: PACE without average and pullback, MADA's preset.
PLAIN: dict[str, Callable[..., Any]] = {
    "PACE": lambda params, **o: PACE(params, **{**COMMON, "lambda_pullback": 0.0, "use_ema_eval": False, **o}),
    "MADA": lambda params, **o: MADA(params, **{**COMMON, **mada_cases.ADAM, **o}),
}


def adamw(params: list[Tensor], **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, **{**COMMON, **options}, foreach=False, fused=False)


def classes(value: Tensor) -> list[str]:
    """NaN, infinite (of which sign), or a number, coordinate by coordinate."""
    numbers = value.detach().double().reshape(-1).tolist()
    return ["nan" if a != a else str(a) if abs(a) == float("inf") else "number" for a in numbers]


def trained(
    make: Callable[..., Any], start: Tensor, grads: list[Tensor], **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    param = torch.nn.Parameter(start.clone())
    optimizer = make([param], **options)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach(), optimizer.state[param]


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=7.25), b.nan_to_num(nan=7.25)) and torch.equal(a.isnan(), b.isnan())


# ---- gradients that are not finite ----

BAD = {"nan": float("nan"), "+inf": float("inf"), "-inf": float("-inf")}
HIT = (3, 64, 199)  # the coordinates that get the bad gradient: in a first tile, at a border, the last


def gradients(dtype: torch.dtype, value: float | None, steps: int = 4) -> list[Tensor]:
    torch.manual_seed(1)
    grads = [torch.randn(200).to(dtype) for _ in range(steps)]
    if value is not None:
        grads[1][list(HIT)] = value
    return grads


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_is_not_finite_does_what_adamw_does(
    backend: str, kind: str, dtype: torch.dtype, bad: str
) -> None:
    """It enters that coordinate's moments and weight, and stays there; the other coordinates take the steps that they
    would have taken."""
    start = torch.linspace(-1, 1, 200).to(dtype)
    x, state = trained(PLAIN[kind], start, gradients(dtype, BAD[bad]), backend=backend)
    theirs, their_state = trained(adamw, start, gradients(dtype, BAD[bad]))
    clean, clean_state = trained(PLAIN[kind], start, gradients(dtype, None), backend=backend)
    for ours, other, unhurt in (
        (x, theirs, clean), *((state[k], their_state[k], clean_state[k]) for k in ("exp_avg", "exp_avg_sq")),
    ):  # fmt: skip
        # MADA's squares end at float32's largest number (csrc/rules/mada.h): its v stays a number, and its weight
        # becomes infinite where AdamW's, inf / inf, becomes NaN.
        saturated = kind == "MADA" and bad != "nan"
        if not (saturated and ours is state["exp_avg_sq"]):
            # A moment that is infinite stays so here; AdamW's m + (1 − β1)(g − m) turns it into NaN a step later.
            assert torch.equal(ours.isfinite(), other.isfinite())
            assert [i for i, what in enumerate(classes(ours)) if what != "number"] == list(HIT)
        if ours is x and not saturated:
            assert classes(ours) == classes(other)
        others = torch.ones(200, dtype=torch.bool)
        others[list(HIT)] = False
        assert torch.equal(ours[others], unhurt[others])
    assert state["step"].item() == their_state["step"].item() == 4


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_enters_the_average_too(backend: str, bad: str) -> None:
    start = torch.linspace(-1, 1, 200)
    options = {**COMMON, "lambda_pullback": 2.0, "backend": backend}
    x, state = trained(PACE, start, gradients(torch.float32, BAD[bad]), **options)
    clean, clean_state = trained(PACE, start, gradients(torch.float32, None), **options)
    others = torch.ones(200, dtype=torch.bool)
    others[list(HIT)] = False
    for ours, unhurt in ((x, clean), (state["ema"], clean_state["ema"])):
        assert torch.equal(ours.isnan(), ~others)
        assert torch.equal(ours[others], unhurt[others])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_madas_coefficients_rest(backend: str, bad: str) -> None:
    """The sums over all coordinates are not finite from then on: no coefficient moves by them, and none becomes NaN."""
    param = torch.nn.Parameter(torch.linspace(-1, 1, 200))
    optimizer = MADA([param], **{**COMMON, **mada_cases.INSIDE, **mada_cases.SOON}, backend=backend)
    seen = []
    for grad in [*gradients(torch.float32, None), *gradients(torch.float32, BAD[bad])]:
        param.grad = grad
        optimizer.step()
        seen.append(dict(optimizer.coefficients))
    assert seen[2] != seen[3] != seen[4]  # after the warm-up they moved
    assert all(torch.tensor(list(q.values())).isfinite().all() for q in seen)
    assert seen[5] == seen[6] == seen[7]  # from the bad gradient on they rest


# ---- lr 0 ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_lr_zero_moves_moments_and_counts_alone(backend: str, dtype: torch.dtype) -> None:
    start = torch.linspace(-1, 1, 200).to(dtype)
    grads = gradients(dtype, None)
    x, state = trained(PACE, start, grads, lr=0.0, lambda_pullback=5.0, backend=backend)
    m, m_state = trained(MADA, start, grads, lr=0.0, use_ema_eval=True, hyper_warmup=0, backend=backend)
    theirs, their_state = trained(adamw, start.float(), [g.float() for g in grads], lr=0.0, betas=(0.9, 0.999))
    assert torch.equal(x, start) and torch.equal(m, start) and torch.equal(theirs, start.float())
    for average in (state["ema"], m_state["ema"]):
        assert torch.equal(average, start.float())  # e + w (x − e) with x = e
    # Sums of four terms, each at most the largest gradient or its square, three roundings a step; twice, for AdamW's.
    largest = max(g.abs().max().item() for g in grads)
    for name, size in (("exp_avg", largest), ("exp_avg_sq", largest**2)):
        torch.testing.assert_close(state[name], their_state[name], rtol=0, atol=2 * 4 * 3 * 2**-24 * size)
    assert state["step"].item() == m_state["step"].item() == their_state["step"].item() == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_lr_zero_teaches_mada_nothing(backend: str) -> None:
    param = torch.nn.Parameter(torch.linspace(-1, 1, 200))
    optimizer = MADA([param], lr=0.0, **mada_cases.INSIDE, hyper_warmup=0, backend=backend)
    before = dict(optimizer.coefficients)
    for grad in gradients(torch.float32, None):
        param.grad = grad
        optimizer.step()
    assert dict(optimizer.coefficients) == before


# ---- the ends of the range ----

# g² leaves float32's range at both ends; 1e30 is beyond float16.
SIZES = {"1e-30": 1e-30, "1e30": 1e30, "subnormal": 1e-40, "the largest": FLT_MAX, "1e-20": 1e-20, "1e19": 1e19}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("eps", [1e-8, TINY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_any_size_end_as_in_adamw(
    backend: str, kind: str, dtype: torch.dtype, eps: float, size: str
) -> None:
    start = torch.linspace(-1, 1, 200).to(dtype)
    limit = torch.finfo(dtype).max
    grads = [(g.double() / 4 * SIZES[size]).clamp(-limit, limit).to(dtype) for g in gradients(dtype, None)]
    x, state = trained(PLAIN[kind], start, grads, eps=eps, backend=backend)
    # In AdamW states have the parameter's dtype; ours are float32, so compare with float32 weights too.
    narrow, _ = trained(adamw, start, grads, eps=eps)
    theirs, their_state = trained(adamw, start.float(), [g.float() for g in grads], eps=eps)
    assert classes(x) == classes(theirs) == classes(narrow)
    for name in ("exp_avg", "exp_avg_sq"):
        ours, other = state[name], their_state[name]
        if kind == "MADA":  # squares end at the largest number, so its v is one where AdamW's is infinite
            assert ours.isfinite().all() and (ours[other.isinf()] > (1 - 0.99) / 2 * FLT_MAX * 0.99**4).all()
        else:
            assert classes(ours) == classes(other)
        ours, other = ours[other.isfinite()], other[other.isfinite()]
        if ours.numel():  # sums of four terms, as above: close beside the largest of them
            atol = 2 * 4 * 3 * 2**-24 * 4 * other.abs().max().item()
            torch.testing.assert_close(ours, other, rtol=0, atol=max(atol, 2.0**-147))
    # A subnormal second moment has lost the places that the update is made of; beside an eps of 1e-8 that is nothing.
    if dtype == torch.float32 and (size == "1e19" or eps == 1e-8) and their_state["exp_avg_sq"].isfinite().all():
        torch.testing.assert_close(x, theirs, rtol=0, atol=1e-5)


def test_squares_beyond_float32_freeze_pace_and_adamw_but_not_mada() -> None:
    """An infinite v makes every further update 0. MADA's is the largest number, and lets the weight leap."""
    grads = [torch.tensor([g]) for g in (1.0, 1e30, 1.0, 1.0)]
    start = torch.ones(1)
    for make in (adamw, PLAIN["PACE"]):
        moved = [trained(make, start, grads[: n + 1], weight_decay=0.0)[0] for n in range(4)]
        assert moved[0] == moved[1] == moved[2] == moved[3] != start
    leap = trained(PLAIN["MADA"], start, grads)[0]
    assert leap.isfinite() and leap.abs() > 1e6


# Value and states of a coordinate, at float32's limits.
LIMITS = {
    "v at its largest": {"exp_avg_sq": FLT_MAX},
    "m at its largest": {"exp_avg": FLT_MAX},
    "m at its lowest": {"exp_avg": -FLT_MAX},
    "both": {"exp_avg": -FLT_MAX, "exp_avg_sq": FLT_MAX},
    "weights at their largest": {"x": FLT_MAX},
    "weights at their lowest": {"x": -FLT_MAX},
    "an average beyond the weights": {"ema": FLT_MAX},
    "weights and average apart": {"x": -FLT_MAX, "ema": FLT_MAX},
    "all": {"x": FLT_MAX, "exp_avg": FLT_MAX, "exp_avg_sq": FLT_MAX, "ema": -FLT_MAX},
    "v subnormal": {"exp_avg_sq": 2.0**-149, "exp_avg": 2.0**-149},
    "all subnormal": {"x": 2.0**-140, "exp_avg": -(2.0**-145), "exp_avg_sq": 2.0**-148, "ema": -(2.0**-140)},
}


def from_the_limit(make: Callable[..., Any], values: dict[str, float], dtype: torch.dtype, **options: Any) -> Any:
    param = torch.nn.Parameter(torch.linspace(-1, 1, 100).to(dtype))
    optimizer = make([param], **options)
    torch.manual_seed(2)
    for step in range(3):
        param.grad = torch.randn(100).to(dtype)
        if step == 1:
            for name, value in values.items():
                target = param.data if name == "x" else optimizer.state[param].get(name)
                if target is not None:
                    limit = torch.finfo(target.dtype).max
                    target[::2] = max(-limit, min(limit, value))
        optimizer.step()
    return param.detach(), optimizer.state[param]


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("eps", [1e-8, TINY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [PACE, MADA])
def test_states_at_the_limits_end_as_in_torch(kind: type, dtype: torch.dtype, eps: float, limit: str) -> None:
    options = {**COMMON, "eps": eps, "lambda_pullback": 1.0}
    if kind is MADA:
        options |= {**mada_cases.INSIDE, "learn": ()}
    ours, theirs = (from_the_limit(kind, LIMITS[limit], dtype, **options, backend=backend) for backend in BACKENDS)
    assert classes(ours[0]) == classes(theirs[0])
    torch.testing.assert_close(ours[0], theirs[0], equal_nan=True)
    assert ours[1].keys() == theirs[1].keys()
    for name, value in ours[1].items():
        assert classes(value) == classes(theirs[1][name]), name
        torch.testing.assert_close(value, theirs[1][name], equal_nan=True, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("limit", [k for k, v in LIMITS.items() if "ema" not in v])
@pytest.mark.parametrize("kind", PLAIN)
def test_states_at_the_limits_end_as_in_adamw(kind: str, limit: str) -> None:
    """MADA divides m by 1 − β1^t (0.19 here) before it multiplies by the learning rate, so that a moment within that
    factor of float32's limit overflows: a sixteenth of it does not."""
    scale = 1 / 16 if kind == "MADA" else 1.0
    values = {k: v * scale if abs(v) > 1 else v for k, v in LIMITS[limit].items()}
    ours = from_the_limit(PLAIN[kind], values, torch.float32)
    theirs = from_the_limit(adamw, values, torch.float32)
    assert classes(ours[0]) == classes(theirs[0])
    for name in ("exp_avg", "exp_avg_sq"):
        assert classes(ours[1][name]) == classes(theirs[1][name])


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [PACE, MADA])
def test_subnormal_gradients_weights_and_states(kind: type, dtype: torch.dtype, flush: bool) -> None:
    """Kept, or flushed where torch.set_flush_denormal says so, as in torch. (It says so to the calling thread alone: in
    a tensor that several threads share, the others go on keeping them, in torch and here.)"""
    if flush and not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        results = []
        for backend in BACKENDS:
            param = torch.nn.Parameter((torch.arange(-100, 100) * 1e-40).to(dtype))
            options = {**mada_cases.INSIDE, "learn": ()} if kind is MADA else {}
            optimizer = kind([param], lr=1e-38, betas=(0.9, 0.5), lambda_pullback=1.0, **options, backend=backend)
            for scale in (1e-39, -2e-40, 3e-23):  # the last one's squares are subnormal too
                param.grad = (torch.arange(200) * scale / 100).to(dtype)
                optimizer.step()
            results.append([param.detach(), *(v for _, v in sorted(optimizer.state[param].items()))])
    finally:
        torch.set_flush_denormal(False)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2.0**-149)
        assert torch.equal(ours == 0, theirs == 0)
    tiny = (results[0][0] != 0) & (results[0][0].abs().double() < TINY)
    assert tiny.any() != flush


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_beyond_2_24_steps_weights_go_as_in_adamw_and_the_count_goes_on(backend: str, kind: str) -> None:
    """float32 has no 2^24 + 1, where AdamW's count stops. Bias corrections are 1 there long since."""
    results = []
    for make, options in ((PLAIN[kind], {"backend": backend}), (adamw, {})):
        param = torch.nn.Parameter(torch.linspace(-1, 1, 50))
        optimizer = make([param], **options)
        for step in range(4):
            param.grad = torch.linspace(2, -1, 50)
            if step == 1:
                optimizer.state[param]["step"].fill_(2.0**24 - 1)
            optimizer.step()
        assert optimizer.state[param]["step"].item() == 2.0**24 + (2 if options else 0)
        results.append(param.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


# ---- more than 2^31 elements ----


def available_bytes() -> int:
    """What can be had without another process suffering: the machine's, or less where a control group says so."""
    sizes = []
    try:
        with open("/proc/meminfo") as lines:
            sizes += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        return 0
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            sizes.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    return min(sizes, default=0)


COUNT = 2**31 + 12_345
NEEDED = 6 * COUNT + 3 * 2**30  # bfloat16 weights, a float32 moment, and room


@pytest.mark.slow
@pytest.mark.skipif(available_bytes() < NEEDED, reason=f"needs {NEEDED / 2**30:.0f} GiB of free memory")
def test_more_than_2_31_elements() -> None:
    """bfloat16, β1 = 0 and no average, a gradient of one expanded element: 12 GiB. Weights differ at both ends, at 2^30
    (2^31 bytes of weights, 2^32 of the moment) and at 2^31 (2^32 bytes); everywhere else they are one number."""
    places = [slice(at, at + 4096) for at in (0, 2**30 - 2048, 2**31 - 2048, COUNT - 4096)]
    options = {**COMMON, "betas": (0.0, 0.99), "lambda_pullback": 0.0, "use_ema_eval": False, "backend": "cpu"}
    torch.manual_seed(3)
    special = torch.randn(4 * 4096).to(torch.bfloat16)
    small = torch.nn.Parameter(torch.cat([special, torch.tensor([0.5], dtype=torch.bfloat16)]))
    big = torch.nn.Parameter(torch.full((COUNT,), 0.5, dtype=torch.bfloat16))
    for place, values in zip(places, special.chunk(4), strict=True):
        big.data[place] = values
    grad = torch.tensor([0.25], dtype=torch.bfloat16)
    states = []
    for param in (big, small):
        optimizer = PACE([param], **options)
        param.grad = grad.expand(param.shape)
        optimizer.step()
        states.append(optimizer.state[param]["exp_avg_sq"])
    for value, reference in ((big.detach(), small.detach()), states):
        for place, expected in zip(places, reference[:-1].chunk(4), strict=True):
            assert torch.equal(value[place], expected)
            value[place] = reference[-1]
        constant = reference[-1].item()
        for chunk in value.split(2**26):
            low, high = chunk.aminmax()
            assert low.item() == high.item() == constant
    del big, small, states, optimizer, param, value, reference, chunk, low, high, expected
    gc.collect()


def test_mada_addresses_in_64_bits() -> None:
    """As test_native does with PACE: two rows 2^31 + 64 float32 elements apart (2^33 bytes), in memory that is never
    touched in between, for weights and for every state, which follow them."""
    apart = 2**31 + 64
    start, grads = torch.randn(2, 64), [torch.randn(2, 64) for _ in range(3)]
    results = []
    for far in (True, False):
        memory = torch.empty(apart + 64).as_strided((2, 64), (apart, 1)) if far else torch.empty(2, 64)
        param = torch.nn.Parameter(memory.copy_(start))
        optimizer = MADA([param], lr=1e-2, **mada_cases.INSIDE, hyper_lr=0.0, lambda_pullback=1.0, backend="cpu")
        param.grad = torch.zeros_like(start)
        for grad in grads:
            param.grad = grad
            optimizer.step()
            if far:
                for name, value in optimizer.state[param].items():
                    if value.shape == start.shape and value.stride() != param.stride():
                        there = torch.empty(apart + 64).as_strided((2, 64), (apart, 1))
                        optimizer.state[param][name] = there.copy_(value)
        if far:
            assert all(v.stride() == (apart, 1) for v in optimizer.state[param].values() if v.shape == start.shape)
        with optimizer.averaged():
            average = param.detach().clone()
        results.append([param.detach(), average, *(v for _, v in sorted(optimizer.state[param].items()))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# ---- threads and forks ----


def train_one(kind: type, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    param = torch.nn.Parameter(torch.randn(50_001, generator=generator))
    options = mada_cases.SOON if kind is MADA else {"log_stats": True}
    optimizer = kind([param], lr=1e-2, **options, backend="cpu")
    for _ in range(12):
        param.grad = torch.randn(50_001, generator=generator)
        optimizer.step()
        optimizer.eval()
        optimizer.train()
    return param.detach(), optimizer.state[param]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("kinds", [(PACE, PACE), (MADA, MADA), (PACE, MADA)], ids=str)
def test_two_optimizers_in_two_threads(kinds: tuple[type, type]) -> None:
    """Each has its own parameters. (One optimizer in two threads is not promised, here or in torch.)"""
    alone = [train_one(kind, seed) for seed, kind in enumerate(kinds)]
    for _ in range(3):
        together: dict[int, Any] = {}
        barrier = threading.Barrier(2)

        def work(seed: int, kind: type, out: dict[int, Any] = together, start: threading.Barrier = barrier) -> None:
            start.wait()
            out[seed] = train_one(kind, seed)

        threads = [threading.Thread(target=work, args=(seed, kind)) for seed, kind in enumerate(kinds)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for seed, (x, state) in enumerate(alone):
            assert torch.equal(together[seed][0], x)
            assert all(torch.equal(together[seed][1][k], v) for k, v in state.items())


FORK = """
import hashlib, os, sys, torch
from pace_kernels import MADA, PACE
kind, child_threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(2)
torch.manual_seed(0)
param = torch.nn.Parameter(torch.randn(300_000))
make = {"AdamW": lambda p: torch.optim.AdamW(p, fused=True), "PACE": PACE, "MADA": MADA}[kind]
optimizer = make([param])
def step():
    param.grad = torch.linspace(-1, 1, 300_000)
    optimizer.step()
    return hashlib.sha256(param.detach().numpy().tobytes()).hexdigest()
step()
pid = os.fork()
if pid == 0:
    if child_threads:
        torch.set_num_threads(child_threads)
    print("child", step(), flush=True)
    os._exit(0)
if child_threads:
    os.waitpid(pid, 0)
    print("parent", step())
else:
    import time
    end = time.monotonic() + float(sys.argv[3])
    while time.monotonic() < end and (done := os.waitpid(pid, os.WNOHANG)[0]) == 0:
        time.sleep(0.05)
    if not done:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    print("done" if done else "hung")
"""


def fork(kind: str, threads: int, patience: float = 0.0) -> list[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FORK, kind, str(threads), str(patience)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("kind", ["PACE", "MADA"])
@pytest.mark.slow
def test_a_fork_with_one_thread_steps_on(kind: str) -> None:
    """Also after the parent has stepped with several threads; the parent goes on undisturbed, with the same bits."""
    words = fork(kind, 1)
    assert words[0] == "child" and words[2] == "parent"
    assert words[1] == words[3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.slow
def test_a_fork_with_several_threads_does_as_adamw() -> None:
    """With torch's pool of OpenMP threads the child of a parent that used it waits forever for threads that it does not
    have, whatever operator it calls: AdamW(fused=True) too. Ours may be no worse."""
    if fork("AdamW", 0, patience=5.0)[-1] == "done":  # another pool of threads
        assert [fork(kind, 0, patience=60.0)[-1] for kind in ("PACE", "MADA")] == ["done", "done"]


class Rows(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> Tensor:
        return torch.full((40_000,), float(i)).sin()  # more than one thread's share


@pytest.mark.usefixtures("two_threads")
@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
@pytest.mark.parametrize("kind", [PACE, MADA])
@pytest.mark.slow
def test_data_loaders_forked_during_training(kind: type) -> None:
    """New workers each epoch, from a process whose threads have stepped: the bits of loading in the process."""
    results = []
    for workers in (0, 2):
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(40_000))
        optimizer = kind([param], lr=1e-2, backend="cpu")
        for _ in range(2):
            loader = torch.utils.data.DataLoader(
                Rows(), batch_size=8, num_workers=workers, timeout=60 if workers else 0,
                multiprocessing_context="fork" if workers else None,
            )  # fmt: skip
            for batch in loader:
                optimizer.zero_grad()
                (param * batch.mean(0)).square().sum().backward()
                optimizer.step()
        results.append([param.detach(), *(v for _, v in sorted(optimizer.state[param].items()))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# ---- exceptions half way ----


def swappable() -> tuple[list[torch.nn.Parameter], PACE]:
    """float32 weights, which trade places with their averages, and bfloat16 ones, which are kept beside."""
    torch.manual_seed(4)
    params = [torch.nn.Parameter(torch.randn(300).to(d)) for d in (torch.bfloat16, torch.float32) * 2]
    optimizer = PACE(params, lr=0.1, backend="cpu")
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(300).to(p.dtype)
        optimizer.step()
    return params, optimizer


def everything(params: list[torch.nn.Parameter], optimizer: PACE) -> list[Tensor]:
    states = [v for p in params for _, v in sorted(optimizer.state[p].items())]
    return [t.detach().clone() for t in (*params, *states)]


def assert_unchanged(before: list[Tensor], params: list[torch.nn.Parameter], optimizer: PACE) -> None:
    after = everything(params, optimizer)
    assert len(after) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_an_exception_inside_averaged() -> None:
    params, optimizer = swappable()
    before = everything(params, optimizer)
    with pytest.raises(KeyError), optimizer.averaged():
        assert not torch.equal(params[1], before[1])
        raise KeyError("validation")
    assert_unchanged(before, params, optimizer)
    optimizer.step()  # not swapped


@pytest.mark.parametrize("hurt", range(4))
def test_eval_swaps_nothing_where_a_parameter_was_resized(hurt: int) -> None:
    params, optimizer = swappable()
    kept = params[hurt].data
    params[hurt].data = kept[:200].clone()
    before = everything(params, optimizer)
    for call in (optimizer.eval, lambda: optimizer.averaged().__enter__()):
        with pytest.raises(RuntimeError, match=r"has shape \(200,\), its state 'ema' has \(300,\)"):
            call()
        assert_unchanged(before, params, optimizer)
    params[hurt].data = kept
    optimizer.step()


@pytest.mark.parametrize("hurt", range(4))
def test_train_swaps_nothing_where_a_parameter_was_resized(hurt: int) -> None:
    params, optimizer = swappable()
    live = everything(params, optimizer)
    optimizer.eval()
    kept = params[hurt].data
    params[hurt].data = kept[:200]
    before = everything(params, optimizer)
    with pytest.raises(RuntimeError, match="shape"):
        optimizer.train()
    assert_unchanged(before, params, optimizer)
    with pytest.raises(RuntimeError, match="swapped"):
        optimizer.step()
    params[hurt].data = kept
    optimizer.train()
    assert_unchanged(live, params, optimizer)


@pytest.mark.parametrize("hurt", [1, 3])
def test_eval_swaps_nothing_where_a_parameter_lost_its_memory(hurt: int) -> None:
    """As FSDP does with what it puts away."""
    params, optimizer = swappable()
    kept = params[hurt].detach().clone()
    storage = params[hurt].untyped_storage()
    size = storage.nbytes()
    others = [p for i, p in enumerate(params) if i != hurt]
    before = everything(others, optimizer)
    storage.resize_(0)
    with pytest.raises(RuntimeError, match="more elements than memory"):
        optimizer.eval()
    storage.resize_(size)
    params[hurt].data.copy_(kept)
    assert_unchanged(before, others, optimizer)
    assert all("live" not in optimizer.state[p] for p in params)
    optimizer.step()
