"""Promise: steps with weights and states in compressed formats have the same bits in torch and in every kernel of the
CPU, for every combination of formats, layout and number of threads, however rows are sharded; what is stored is the
plain step's result, rounded as csrc/codes.h says; bad gradients stay alone; nothing stalls; and what does not fit is
refused before anything is written."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mada_cases
import pullback_cases
import pytest
import torch
from coded_cases import (
    AVERAGES,
    COMMON,
    ITERATES,
    KERNELS,
    PLAIN,
    SHAPES,
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
from products import FULL, day, pairs_and_seed
from test_native import BUILD, ROOT, processor_isas
from torch import Tensor

from pace_kernels import torch_rules
from pace_kernels.ops import COEFFICIENTS
from pace_kernels.torch_rules import codes
from pace_kernels.torch_rules.mada import MadaMoments, MadaOptions, hypergradient_terms, last_step, mada_rule

TORCH = {kind: getattr(torch_rules, kind.definition.op) for kind in KERNELS}
SMALL = ((64, 32), (1, 32), (3, 5, 64), (0, 32))
Make = Callable[[], Lists]


def assert_equal(ours: Lists, theirs: Lists, at: Any = "") -> None:
    for k, (a, b) in enumerate(zip(ours.everything(), theirs.everything(), strict=True)):
        assert torch.equal(a, b), (at, k, int((a != b).sum()))


def same_bits(make: Make, steps: int = 6, **early: Any) -> None:
    """In torch and in the kernels, the first three steps with other options."""
    ours, theirs = make(), make()
    for step in range(steps):
        grads = ours.gradients(step)
        changed = early if step < 3 else {}
        ours.take(KERNELS[type(ours)], grads, **changed)
        theirs.take(TORCH[type(theirs)], [g.clone() for g in grads], **changed)
        assert_equal(ours, theirs, step)


# ---- torch and the kernels -------------------------------------------------------------------------------------------


def of_pace() -> Iterator[tuple[str, int, int | None]]:
    every = list(itertools.product(WEIGHTS, STATES, AVERAGES))
    yield from every if FULL else (*random.Random(day()).sample(every, 24), ("32", 8, 8), ("24", 8, 16))


@pytest.mark.parametrize("case", list(of_pace()), ids=str)
def test_pace_in_torch_and_in_the_kernels(case: tuple[str, int, int | None]) -> None:
    same_bits(lambda: Pace(*case, SMALL), steps=8, ema_update_freq=2, lambda_pullback=0.0)


@pytest.mark.parametrize("count", (2**24, 2**24 + 2, 2**32 + 1, 2**40 + 3))
def test_steps_beyond_what_float32_counts(count: int) -> None:
    def make() -> Lists:
        call = Pace("24", 8, 16, SMALL, ema_update_freq=3)
        call.steps = [torch.tensor(count, dtype=torch.float64) for _ in call.steps]
        return call

    same_bits(make, steps=1)


@pytest.mark.parametrize(
    ("case", "weights", "state_bits", "ema_bits"),
    pairs_and_seed(mada_cases.CASES, WEIGHTS, STATES, AVERAGES, sample=8),
)
def test_mada_in_torch_and_in_the_kernels(case: str, weights: str, state_bits: int, ema_bits: int | None) -> None:
    same_bits(lambda: Mada(case, weights, state_bits, ema_bits, SMALL), ema_update_freq=2)


@pytest.mark.parametrize(("weights", "state_bits", "z_bits"), pairs_and_seed(WEIGHTS, STATES, ITERATES, sample=8))
def test_schedule_free_in_torch_and_in_the_kernels(weights: str, state_bits: int, z_bits: int) -> None:
    same_bits(lambda: ScheduleFree(weights, state_bits, z_bits))


@pytest.mark.parametrize(
    ("case", "weights", "ema_bits"), pairs_and_seed(pullback_cases.CASES, PLAIN, ITERATES, sample=8)
)
def test_the_pullback_in_torch_and_in_the_kernels(case: str, weights: str, ema_bits: int) -> None:
    same_bits(lambda: Pullback(case, weights, ema_bits, SMALL), ema_update_freq=2)


@pytest.mark.parametrize("name", COMMON)
def test_tensors_longer_than_a_block(name: str) -> None:
    same_bits(lambda: COMMON[name](shapes=SHAPES), steps=3)


@pytest.mark.parametrize("name", COMMON)
def test_shards_have_the_bits_of_the_whole(name: str) -> None:
    """Rows of a parameter, cut unevenly, stepped as parameters of their own."""
    whole = COMMON[name](shapes=((64, 32),))
    parts = COMMON[name](shapes=((64, 32),))
    _shard(parts, (17, 1, 46))
    for step in (1, 0, 3, 4):
        grads = whole.gradients(step)
        whole.take(KERNELS[type(whole)], grads)
        parts.take(KERNELS[type(parts)], list(grads[0].split((17, 1, 46))))
    joined = {name: [torch.cat(list(ts))] for name, ts in parts.lists.items() if ts and name != "last_scalars"}
    for name, (tensor,) in joined.items():
        assert torch.equal(_settled(tensor), _settled(whole.lists[name][0])), name
    for name, side in parts.beside.items():
        assert side is None or torch.equal(torch.cat(side), whole.beside[name][0]), name  # type: ignore[index]


def _settled(t: Tensor) -> Tensor:
    return codes.settled(t.float()) if t.is_floating_point() else t


def _shard(lists: Lists, rows: tuple[int, ...]) -> None:
    """In place of each tensor, copies of its rows, each of which is a block."""

    def cut(ts: list[Tensor]) -> list[Tensor]:
        return [part.clone() for t in ts for part in t.split(rows)]

    for name, ts in lists.lists.items():
        lists.lists[name] = [ts[0].clone() for _ in rows] if ts and name == "last_scalars" else cut(ts)
    lists.params = lists.lists[lists.definition.operands[0].list]
    lists.beside = {name: cut(side) if side else side for name, side in lists.beside.items()}
    lists.steps = [torch.zeros(()) for _ in rows]


# ---- what is stored --------------------------------------------------------------------------------------------------


def floats(c: Lists) -> dict[str, Tensor]:
    """The first parameter's operands as float32."""
    found: dict[str, Tensor] = {}
    for o in c.definition.operands:
        if not c.lists[o.list]:
            continue
        t = c.lists[o.list][0]
        sides = c.beside.get(o.beside) if o.beside else None
        if not sides:
            found[o.symbol] = t.float().clone()
        elif t.dtype == torch.bfloat16:
            found[o.symbol] = codes.joined(t, sides[0])
        elif t.dtype == torch.uint8:
            code = codes.M_CODE if o.codec == "moment" else codes.V_CODE
            found[o.symbol] = code.load(t.reshape(-1), sides[0]).view(t.shape)
        else:
            x = found["before" if "before" in found else c.definition.operands[0].symbol]
            grid = codes.E_CODES[8 * t.element_size()]
            found[o.symbol] = grid.load(t.reshape(-1), sides[0], x.reshape(-1)).value().view(t.shape)
    return found


def words(x: Tensor, second: Tensor, t: int) -> list[Tensor]:
    """The dither of STORED: three words an element, by integers."""

    def mixed(h: Tensor) -> Tensor:
        h = (h ^ h >> 16) * 0x21F0AAAD & 0xFFFFFFFF
        h = (h ^ h >> 15) * 0x735A2D97 & 0xFFFFFFFF
        return h ^ h >> 15

    golden = 0x9E3779B1
    key = mixed(torch.tensor(t * golden & 0xFFFFFFFF))
    found = [mixed((codes.settled(x) * (golden - 2**32) & 0xFFFFFFFF) ^ second ^ key)]
    for _ in range(2):
        found.append(mixed(found[-1] + golden & 0xFFFFFFFF))
    return found


# Which word each state of MADA's is dithered by, and from which of its bits on.
STORED = {"m": (0, 0), "v": (0, 16), "n": (1, 0), "l": (1, 16), "w": (2, 0), "last_g": (2, 16), "older_g": (2, 16)}


@pytest.mark.parametrize("state_bits", [16, 8])
@pytest.mark.parametrize("case", ["all, inside", "all, maximum", "capturable", "hyperadam", "fixed, inside", "Lion"])
def test_mada_stores_the_rounded_result_of_a_plain_step(case: str, state_bits: int) -> None:
    """Where it learns too, where moments are one step behind: the last step is redone from what was stored, the next
    one goes on from unrounded moments, and each is rounded once a step. The hypergradients are those of what was
    stored."""
    shape = ((40, 64),)
    ours = Mada(case, "32", state_bits, None, shape)
    for t in range(1, 6):
        plain = Mada(case, "float32", 32, None, shape)
        plain.taken = ours.taken
        for symbol, value in floats(ours).items():
            name = next(o.list for o in plain.definition.operands if o.symbol == symbol)
            plain.lists[name] = [value]
        plain.params = plain.lists["params"]
        plain.lists["last_scalars"] = [row.clone() for row in ours.lists["last_scalars"]]
        plain.steps = [step.clone() for step in ours.steps]
        grads = [torch.randn(shape[0], generator=ours.gen).bfloat16()]
        ours.take(KERNELS[Mada], grads)
        plain.take(KERNELS[Mada], grads)
        now, then = floats(ours), floats(plain)
        assert torch.equal(now["x"], then["x"])
        if "hypergradients" in ours.extras:
            torch.testing.assert_close(
                ours.extras["hypergradients"], plain.extras["hypergradients"], rtol=1e-12, atol=0.0
            )
        second = codes.bits_of(then["v"]) if "v" in then else codes.settled(then["l"])
        h = words(then["x"], second, t)
        for symbol, (word, shift) in STORED.items():
            if symbol not in then:
                continue
            value, d = then[symbol], h[word]
            if symbol == "w" and ours.options["second_max"]:
                expected = value.bfloat16().float()
            elif symbol in ("m", "n", "l") and state_bits == 8:
                pair = codes.M_CODE.store(value.reshape(-1), d.reshape(-1) >> shift)
                expected = codes.M_CODE.load(*pair).view(value.shape)
            elif symbol == "v" and state_bits == 8:
                pair = codes.V_CODE.store(value.reshape(-1), d.reshape(-1))
                expected = codes.V_CODE.load(*pair).view(value.shape)
            else:
                expected = codes.rounded(value, 16, d >> shift)
            assert torch.equal(now[symbol], expected), (t, symbol)
            assert not torch.equal(value, expected) or symbol.endswith("g") or t < 3, (t, symbol)


@pytest.mark.parametrize("z_bits", [24, 16, 8])
def test_schedule_free_moves_z_by_its_own_increment(z_bits: int) -> None:
    shape = ((40, 64),)
    ours = ScheduleFree("32", 8, z_bits, shape)
    for t in range(1, 7):
        plain, still = (ScheduleFree("float32", 32, 32, shape) for _ in range(2))
        was = floats(ours)
        for call, z in ((plain, was["z"]), (still, torch.zeros(shape[0]))):
            call.lists |= {"params": [was["y"].clone()], "exp_avg_sqs": [was["v"].clone()], "zs": [z.clone()]}
            call.params, call.steps = call.lists["params"], [step.clone() for step in ours.steps]
            call.options["count"] = ours.options["count"]
        grads = [torch.randn(shape[0], generator=ours.gen).bfloat16()]
        state, side = ours.lists["zs"][0].clone(), (ours.beside["z_scales"] or [])[0].clone()
        for call in (ours, plain, still):
            call.take(KERNELS[ScheduleFree], grads)
        then, increment = floats(plain), still.lists["zs"][0]
        h = words(then["y"], codes.bits_of(then["v"]), t)[1]
        if z_bits == 24:
            expected = codes.rounded(then["z"], 24, h >> 24)
        else:
            grid = codes.E_CODES[z_bits]
            place = grid.load(state.reshape(-1), side, was["y"].reshape(-1))
            place = place._replace(increment=increment.reshape(-1))
            pair = grid.store(place, then["y"].reshape(-1), h.reshape(-1))
            expected = grid.load(*pair, then["y"].reshape(-1)).value().view(shape[0])
        assert torch.equal(floats(ours)["z"], expected), t


@pytest.mark.parametrize("weights", PLAIN)
def test_the_pullbacks_average_does_not_go_along_with_the_base(weights: str) -> None:
    """Codes were written beside the weights of before the base's step: those of a base that jumps stay where they are,
    and are known beside the new weights to half a step of the grid."""
    ours, plain = (Pullback("average", weights, bits, ((40, 64),)) for bits in (16, 32))
    for call in (ours, plain):
        call.options |= {"ema_kappa": None, "beta_ema": 0.01}
        for t in range(4):
            call.gen.manual_seed(t)
            call.take(KERNELS[Pullback], call.gradients(1), beta_ema=0.01 if t else 1.0)
    befores = [p.clone() for p in ours.params]
    for call in (ours, plain):
        for b, p in zip(call.lists["befores"], call.params, strict=False):
            b.copy_(p)
        call.params[0].add_(3.0)
        lists = [call.lists[entry.list] for entry in call.definition.lists]
        KERNELS[Pullback](*lists, call.steps, **call.beside, **call.options | {"beta_ema": 0.0})
    assert not torch.equal(befores[0], ours.params[0])
    ours.lists["befores"] = []  # what floats() reads beside
    now, then = floats(ours)["e"], plain.lists["emas"][0]
    assert float((now - then).abs().max()) < 2.0**-12 < 1e-3 * float((now - ours.params[0].float()).abs().min())


# ---- hypergradients --------------------------------------------------------------------------------------------------

# What codes may add to a hypergradient's sampling noise, the root of the sum of its terms' squares: each term is off by
# this much of itself, each in its own way. v takes steps of (1 − β2)(g² − v), whose rounding to a code of Δ ≤ v / 16
# (bfloat16: v / 192 as a rule) has the variance step · Δ, and forgets at the rate 1 − β2: σ(v) ≤ sqrt(Δ / 2) = 0.17 v
# (0.05), half of it in D, of which terms have up to the third power: 0.26 (0.08). m: Δ / sqrt(6 (1 − β1²)) = 0.04 of
# itself, twice: 0.28 in all. Terms with a sign, of ĝ² − v̄ and of u, change it in σ(v) / 5 of the coordinates, each by
# twice itself: 2 sqrt(0.17 / 5) = 0.37 (0.2). Measured: 0.08 (0.02) and 0.25 (0.1).
SMOOTH, SIGNED = {16: 0.08, 8: 0.28}, {16: 0.2, 8: 0.37}


def terms(call: Mada, g: Tensor) -> list[Tensor | None]:
    """Of the hypergradients that the next step of a plain call computes from the gradient g."""
    states = floats(call)
    kept = MadaMoments(*(states.get(symbol) for symbol in MadaMoments._fields))
    redo, factors = last_step(MadaOptions(**call.options), call.steps[0].item(), call.lists["last_scalars"][0].tolist())
    last_g = states["last_g"]
    step = mada_rule(redo, last_g, states.get("older_g"), kept)
    found = hypergradient_terms(redo, last_g, g, kept, step)
    return [None if term is None else (shared * term).double() for shared, term in zip(factors, found, strict=True)]


@pytest.mark.parametrize("signal", [0.0, 0.3])
@pytest.mark.parametrize("state_bits", [16, 8])
@pytest.mark.parametrize("case", ["all, inside", "all, maximum", "hyperadam"])
def test_hypergradients_of_codes(case: str, state_bits: int, signal: float) -> None:
    shape = (128, 128)
    plain, coded = Mada(case, "float32", 32, None, (shape,)), Mada(case, "32", state_bits, None, (shape,))
    gen = torch.Generator().manual_seed(0)
    mean, size = torch.randn(shape, generator=gen), 10.0 ** (1.5 * torch.rand(shape, generator=gen) - 3.0)
    off: dict[str, list[float]] = {name: [] for name in COEFFICIENTS}
    for t in range(60):
        g = ((signal * mean + torch.randn(shape, generator=gen)) * size).bfloat16()
        its = terms(plain, g.float()) if t >= 5 else []
        plain.take(KERNELS[Mada], [g.float()])
        coded.take(KERNELS[Mada], [g])
        difference = coded.extras["hypergradients"] - plain.extras["hypergradients"]
        for name, term, d in zip(COEFFICIENTS, its, difference.tolist(), strict=False):
            if term is not None and plain.options["learn"] >> COEFFICIENTS.index(name) & 1:
                off[name].append(d / float(term.square().sum().sqrt()))
    if case == "all, maximum":
        del off["rho"]  # the maximum of a v that is dithered is ahead of float32's
    for name, found in off.items():
        bound = (SIGNED if name in ("c", "gamma") else SMOOTH)[state_bits]
        assert not found or torch.tensor(found).square().mean().sqrt() < bound, name
        assert not found or max(map(abs, found)) < 4 * bound, name
    assert off["beta1"]


# ---- bad gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
@pytest.mark.parametrize("name", COMMON)
def test_a_bad_gradient_stays_alone(name: str, value: float) -> None:
    """Its coordinate's block is rounded to another scale for a while; nobody's finiteness changes, and other blocks
    keep their bits."""
    good, bad = (COMMON[name](shapes=((32, 64),)) for _ in range(2))
    for step in range(12):
        grads = [good.noise(p.shape) for p in good.params]
        grads = [g.to(p.dtype) if step % 2 else g for g, p in zip(grads, good.params, strict=True)]
        spoiled = [g.clone() for g in grads]
        if step == 3:
            spoiled[0].view(-1)[5] = value
        good.take(KERNELS[type(good)], grads)
        bad.take(KERNELS[type(bad)], spoiled)
    if "befores" in good.lists:
        for call in (good, bad):
            call.lists["befores"] = []  # what floats() reads beside
    ours, theirs = floats(good), floats(bad)
    elsewhere = torch.ones(32 * 64, dtype=torch.bool)
    elsewhere[:32] = False
    neighbors = ~elsewhere
    neighbors[5] = False
    for symbol, a in ours.items():
        a, b = a.reshape(-1), theirs[symbol].reshape(-1)
        assert torch.equal(a[elsewhere], b[elsewhere]), symbol
        assert b[neighbors].isfinite().all(), symbol
    weight = good.definition.operands[0].symbol
    x, y = ours[weight].reshape(-1)[neighbors], theirs[weight].reshape(-1)[neighbors]
    assert float((x - y).abs().max()) < 12 * 3e-2, "a neighbor ran away"  # 12 steps of lr 1e-2, pulled or not


# ---- nothing stalls --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("z_bits", [24, 16, 8])
def test_schedule_free_does_not_stall(z_bits: int, lr: float) -> None:
    """Weights of 0.05, half of them on their way, half of them stopped after half of it: the mean way of z, of y and of
    the average within 3 % of float32's; with 8 bits each 0.02 to 0.04 of the way off (rms), with 16 at most 0.004."""
    shape = (128, 64)
    found = []
    for bits in (32, z_bits):
        call = ScheduleFree("float32", 32, bits, (shape,), lr=lr)
        call.options |= {"beta2": 0.999, "weight_decay": 0.0}
        gen = torch.Generator().manual_seed(7)
        start = codes.rounded(torch.randn(shape, generator=gen) * 0.05, 24, codes.NEAREST_24)
        call.params[0].copy_(start)
        if bits >= 24:
            parts = codes.split(start, 24) if bits == 24 else (start,)
            for to, part in zip((call.lists["zs"][0], (call.beside["z_scales"] or [None])[0]), parts, strict=False):
                to.copy_(part)
        toward = torch.randn(shape, generator=gen).sign()
        size = 10.0 ** (2.0 * torch.rand(shape, generator=gen) - 1.0)
        for t in range(300):
            g = toward * (1.0 + 0.3 * torch.randn(shape, generator=gen))
            if t >= 150:
                g[:64] = torch.randn((64, 64), generator=gen)
            call.take(KERNELS[ScheduleFree], [g * size])
        now = floats(call)
        x = torch_rules.schedule_free.schedule_free_average(now["y"], now["z"], 0.9)
        found.append([(a - start) * -toward for a in (now["y"], now["z"], x)])
    noise = {8: 0.06, 16: 0.01, 24: 0.4 if lr < 1e-6 else 0.01}[z_bits]
    for way, expected in zip(found[1], found[0], strict=True):
        for half in (slice(0, 64), slice(64, 128)):
            assert abs(way[half].mean() / expected[half].mean() - 1.0) < 0.03
            assert (way[half] - expected[half]).square().mean().sqrt() < noise * expected[half].square().mean().sqrt()


# ---- refusals --------------------------------------------------------------------------------------------------------


@each_refusal
def test_refused_before_anything_is_written(message: str, name: str, change: Any) -> None:
    assert_refused(lambda call: KERNELS[type(call)], message, name, change)


# ---- instruction sets, threads, machine code -------------------------------------------------------------------------


def digest(threads: int) -> None:
    """Prints a hash of all bits after a few steps of large tensors, in the common formats."""
    torch.set_num_threads(threads)
    found = hashlib.sha256()
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
