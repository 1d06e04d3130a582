"""Promise: the native kernels compute the same bits on every instruction set, for every number of threads and every
memory layout; they are vectorized; and each instruction set's code is its own."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pace_kernels
from pace_kernels import _C, PACE

ROOT = Path(__file__).parent.parent
BUILD = runpy.run_path(str(ROOT / "setup.py"), run_name="build settings")
OPTIONS = {
    "lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01, "lambda_pullback": 5.0,
    "clamp_pullback": True, "beta_ema": 0.01, "ema_kappa": 0.2, "ema_rho": 0.0, "ema_gamma": 1.0, "ema_update_freq": 1,
    "pullback_from_step": False, "maximize": False, "capturable": False,
}  # fmt: skip


def processor_isas() -> list[str]:
    """Those of this build that this processor has: the widest is the one that was chosen here."""
    names = list(BUILD["ISA_FLAGS"])
    return names[: names.index(_C.cpu_isa()) + 1] if "PACE_CPU_ISA" not in os.environ else [_C.cpu_isa()]


# ---- instruction sets and threads ----

RUN = """
import hashlib, json, sys, torch
from pace_cases import CASES, gradients, weights
from pace_kernels import PACE, _C
torch.set_num_threads(int(sys.argv[1]))
digest, stats = hashlib.sha256(), []
for options in CASES.values():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        params = weights(dtype) + [torch.nn.Parameter(torch.linspace(-1, 1, 100_003).to(dtype))]
        optimizer = PACE(params, **{"lr": 1e-2, **options, "log_stats": True})
        for grads in gradients(4, dtype):
            for param, grad in zip(params, [*grads, torch.linspace(3, -2, 100_003).to(dtype)]):
                param.grad = grad
            optimizer.step()
        for param in params:
            for tensor in (param, *optimizer.state[param].values()):
                digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        stats.append(optimizer.get_step_stats())
print(json.dumps([_C.cpu_isa(), digest.hexdigest(), stats]))
"""


def run_in_a_process(isa: str, threads: int) -> tuple[str, str, list[dict[str, float]]]:
    env = {**os.environ, "PACE_CPU_ISA": isa, "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(threads)], env=env, capture_output=True, text=True, check=True
    )
    return tuple(json.loads(done.stdout))


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, int], tuple[str, str, list[dict[str, float]]]]:
    wanted = {(isa, 1) for isa in processor_isas()} | {(_C.cpu_isa(), threads) for threads in (1, 2, 3)}
    return {key: run_in_a_process(*key) for key in sorted(wanted)}


@pytest.mark.slow
def test_threads_do_not_change_a_bit(runs: dict) -> None:
    isa = _C.cpu_isa()
    assert runs[isa, 1] == runs[isa, 2] == runs[isa, 3]  # statistics too: compared as printed, to the last digit


def test_instruction_sets_give_the_same_bits(runs: dict) -> None:
    for isa in processor_isas():
        name, digest, stats = runs[isa, 1]
        assert name == isa
        assert digest == runs["baseline", 1][1]
        for ours, theirs in zip(stats, runs["baseline", 1][2], strict=True):
            # The order of a tile's 256 float additions differs: at most 255 roundings of u = 2^-24 each, in either sum.
            assert ours == pytest.approx(theirs, rel=2 * 255 * 2**-24)


def test_an_instruction_set_that_is_not_there_is_refused_with_the_reason() -> None:
    code = (
        "import pace_kernels, torch; r = pace_kernels.backends()['cpu']; print(r.available, r.reason)\n"
        "try: pace_kernels.PACE([torch.zeros(1)], backend='cpu')\n"
        "except RuntimeError as e: print(e)"
    )
    env = {**os.environ, "PACE_CPU_ISA": "abacus"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    row, error = done.stdout.splitlines()
    assert row.startswith("False PACE_CPU_ISA=abacus: this build on this processor has baseline")
    assert error == "backend='cpu' is not available: " + row.removeprefix("False ")


# ---- machine code ----


# Of each rule: instances that take square roots, instances without, and of these those that at least multiply. The
# others do nothing, sum what is constant, or take signs alone.
INSTANCES = {"Pace": (16, 0, 0), "Mada": (40, 2, 2), "Pullback": (8, 12, 10)}


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
@pytest.mark.parametrize("rule", INSTANCES)
def test_every_loop_is_vectorized_at_full_width(rule: str) -> None:
    """Square roots and products are packed, the widest of their instruction set. Where MADA redoes the last step, it
    takes two divisions and no third."""
    code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", _C.__file__], capture_output=True, text=True).stdout
    roots, products, divisions = [], 0, []
    for function in re.split(r"\n(?=[0-9a-f]+ <)", code):
        if f"TileOfINS0_{len(rule)}{rule}ILj" not in function.split("\n", 1)[0]:
            continue
        packed = re.findall(r"\bv?sqrtps\b.*%([xyz])mm|\bfsqrt\s+v\d+\.(4)s", function)
        roots.append(max(("".join(p) for p in packed), default="none"))
        products += roots[-1] == "none" and bool(re.search(r"\bv?mulps\b.*%[xyz]mm|\bfmul\s+v\d+\.4s", function))
        divisions.append(len(re.findall(rf"\bv?divps\b.*%{roots[-1]}mm|\bfdiv\s+v\d+\.4s", function)))
    expected = {"baseline": "x", "avx2": "y", "avx512": "z"} if "avx2" in BUILD["ISA_FLAGS"] else {"baseline": "4"}
    with_roots, without, multiply = INSTANCES[rule]
    counts = {width: with_roots for width in expected.values()} | {"none": without * len(expected)}
    assert Counter(roots) == {kind: n for kind, n in counts.items() if n}
    assert products >= multiply * len(expected)
    assert (
        rule != "Mada" or max(divisions) <= 3
    )  # baseline and AVX2 keep a half-width epilogue in the same registers' names


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.parametrize("isa", BUILD["ISA_FLAGS"])
@pytest.mark.slow
def test_no_symbol_leaks_between_instruction_sets(isa: str, tmp_path: Path) -> None:
    """The linker keeps one of several equal weak symbols: if it were the AVX-512 one, other processors would crash."""
    names = " ".join(f"X({name})" for name in BUILD["ISA_FLAGS"])
    flags = [*BUILD["COMMON_FLAGS"], *BUILD["KERNEL_FLAGS"], *BUILD["ISA_FLAGS"][isa]]
    defines = [f"-DPACE_CPU_VARIANTS={names}", f"-DPACE_ISA={isa}"]
    out = tmp_path / "kernels.o"
    subprocess.run(["g++", "-fPIC", *flags, *defines, "-c", str(ROOT / BUILD["KERNELS"]), "-o", str(out)], check=True)
    symbols = subprocess.run(["nm", "-C", str(out)], capture_output=True, text=True, check=True).stdout.splitlines()
    shared = {s for line in symbols if (s := line[17:])[0] not in "tdrbn"}  # lower case: local to this object
    assert {s for s in shared if not s.startswith("U ")} == {f"D pace_kernels_{isa}"}
    assert {s for s in shared if s.startswith("U ")} <= {"U memcpy", "U memset", "U _GLOBAL_OFFSET_TABLE_"}


def test_sources_contract_nothing() -> None:
    assert "-ffp-contract=off" in BUILD["COMMON_FLAGS"]


# ---- storage ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_storage_formats_load_every_value(dtype: torch.dtype) -> None:
    """A step that moves nothing loads and stores each of the 65,536 bit patterns unchanged."""
    before = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    param = torch.nn.Parameter(before.clone())
    param.grad = torch.ones_like(param)
    PACE([param], lr=0.0, weight_decay=0.0, lambda_pullback=0.0, use_ema_eval=False, backend="cpu").step()
    number = ~before.isnan()
    assert torch.equal(param.detach()[number].view(torch.int16), before[number].view(torch.int16))
    assert param.detach()[~number].isnan().all()


def test_float16_survives_a_processor_that_flushes_subnormals() -> None:
    """torch.set_flush_denormal, and any library built with -ffast-math, turn float32's subnormals into zeros. float16's
    are ordinary float32 numbers, and stay."""
    before = torch.tensor([1e-5, 3e-5, 6e-5, 6e-8, 1e-4], dtype=torch.float16)
    param = torch.nn.Parameter(before.clone())
    param.grad = torch.zeros_like(param)
    supported = torch.set_flush_denormal(True)
    try:
        PACE([param], lr=0.0, lambda_pullback=0.0, weight_decay=0.0, backend="cpu").step()
    finally:
        torch.set_flush_denormal(False)
    if not supported:
        pytest.skip("this processor cannot flush subnormals")
    assert torch.equal(param.detach(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_storage_formats_round_as_torch_does(dtype: torch.dtype) -> None:
    """On every midpoint between neighbours, and on the floats next to it, of both signs, beyond the largest too."""
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite() & (values >= 0)].double().unique()
    middle = ((values[1:] + values[:-1]) / 2).float()
    middle = torch.cat([middle, (values[-1:] * 1.5 - values[-2:-1] / 2).float()])
    near = [torch.nextafter(middle, torch.tensor(side)) for side in (-torch.inf, torch.inf)]
    wanted = torch.cat([middle, *near])
    wanted = torch.cat([wanted, -wanted])
    wanted = wanted[(wanted / 2) * 2 == wanted]  # float32's own subnormals lose a bit below
    # x = 0 − (α / (1 − β1)) (β1 m + (1 − β1) 0) / (0 + ε) = −m, exactly, with α = 1, β1 = 1/2, ε = 1.
    options = {
        **OPTIONS,
        "lr": 1.0,
        "beta1": 0.5,
        "beta2": 0.5,
        "eps": 1.0,
        "weight_decay": 0.0,
        "lambda_pullback": 0.0,
    }
    x, zero = torch.zeros(len(wanted), dtype=dtype), torch.zeros(len(wanted))
    lists = [[x], [zero.to(dtype)], [-wanted], [zero], [], [torch.zeros(())]]
    torch.ops.pace_kernels.pace_step_(*lists, None, **options)
    assert len(wanted) > 100_000
    assert torch.equal(x.view(torch.int16), wanted.to(dtype).view(torch.int16))


# ---- memory layouts ----


def contiguous_twin(param: torch.Tensor, grad: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    twin = torch.nn.Parameter(param.detach().clone(memory_format=torch.contiguous_format))
    optimizer = PACE([twin], lr=1e-2, backend="cpu")
    for _ in range(steps):
        twin.grad = grad.clone(memory_format=torch.contiguous_format)
        optimizer.step()
    return twin.detach(), optimizer.state[twin]["ema"]


def check_layout(param: torch.Tensor, grad: torch.Tensor) -> None:
    param = torch.nn.Parameter(param)
    expected, expected_ema = contiguous_twin(param, grad, 3)
    optimizer = PACE([param], lr=1e-2, backend="cpu")
    for _ in range(3):
        param.grad = grad
        optimizer.step()
    assert torch.equal(param.detach(), expected)
    assert torch.equal(optimizer.state[param]["ema"], expected_ema)
    with optimizer.averaged():
        assert torch.equal(param.detach(), expected_ema.to(param.dtype))
    assert torch.equal(param.detach(), expected)


LAYOUTS = {
    "transposed": lambda: (torch.randn(37, 53).t(), torch.randn(53, 37)),
    "both transposed": lambda: (torch.randn(37, 53).t(), torch.randn(37, 53).t()),
    "gradient transposed": lambda: (torch.randn(53, 37), torch.randn(37, 53).t()),
    "channels last": lambda: (torch.randn(4, 6, 5, 7).to(memory_format=torch.channels_last), torch.randn(4, 6, 5, 7)),
    "expanded gradient": lambda: (torch.randn(64, 48), torch.randn(48).expand(64, 48)),
    "scalar expanded": lambda: (torch.randn(3000), torch.randn(()).expand(3000)),
    "every other column": lambda: (torch.randn(50, 90)[:, ::2], torch.randn(50, 45)),
    "misaligned view": lambda: (torch.randn(5001)[1:], torch.randn(5003)[3:]),
    "narrowed rows": lambda: (torch.randn(40, 70)[:, 3:66], torch.randn(40, 63)),
    "zero-dimensional": lambda: (torch.randn(()), torch.randn(())),
    "no elements": lambda: (torch.randn(0, 5), torch.randn(0, 5)),
    "interleaved strides": lambda: (torch.randn(8).as_strided((2, 3), (3, 2)), torch.randn(2, 3)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    param, grad = LAYOUTS[layout]()
    if dtype == torch.bfloat16:
        param, grad = (
            torch.empty_strided(a.shape, a.stride(), dtype=dtype).copy_(a) for a in (param, grad.contiguous())
        )
    check_layout(param, grad)


@st.composite
def strided(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))

    def one(seed: int) -> torch.Tensor:
        order = draw(st.permutations(range(len(sizes))))
        steps = [draw(st.integers(1, 3)) for _ in sizes]
        base = np.random.default_rng(seed).standard_normal([sizes[d] * steps[d] for d in order]).astype(np.float32)
        view = torch.from_numpy(base)[tuple(slice(None, None, steps[d]) for d in order)]
        return view.permute([order.index(d) for d in range(len(sizes))])

    grad = one(1)
    if draw(st.booleans()):
        axis = draw(st.integers(0, len(sizes) - 1))
        grad = grad.narrow(axis, 0, 1).expand(sizes)
    return one(0), grad


@given(strided())
@settings(max_examples=150, deadline=None)
def test_any_strides(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    check_layout(*pair)


def test_states_take_the_layout_of_their_parameter() -> None:
    param = torch.nn.Parameter(torch.randn(4, 6, 5, 7).to(memory_format=torch.channels_last))
    param.grad = torch.randn_like(param)
    optimizer = PACE([param])
    optimizer.step()
    assert all(v.stride() == param.stride() for k, v in optimizer.state[param].items() if k != "step")


def test_a_tensor_beyond_32_bit_offsets_is_addressed_in_64_bits() -> None:
    """2^31 elements take 36 GB; strides reach as far without them: two rows 2^31 + 64 float32 elements apart, in memory
    that is never touched in between (the pages stay unmapped)."""
    apart = 2**31 + 64
    param = torch.empty(apart + 64).as_strided((2, 64), (apart, 1))
    param.copy_(torch.randn(2, 64))
    check_layout(param, torch.randn(2, 64))


# ---- the operators ----


def operands(n: int = 2) -> list[list[torch.Tensor]]:
    def tensors() -> list[torch.Tensor]:
        return [torch.randn(7, 3) for _ in range(n)]

    return [
        tensors(),
        tensors(),
        tensors(),
        [t.abs() for t in tensors()],
        tensors(),
        [torch.zeros(()) for _ in range(n)],
    ]


@pytest.mark.parametrize("stats", [False, True])
def test_opcheck(stats: bool) -> None:
    out = torch.zeros(len(pace_kernels.ops.PACE_STATS), dtype=torch.float64) if stats else None
    torch.library.opcheck(torch.ops.pace_kernels.pace_step_.default, (*operands(), out), OPTIONS)


def test_an_operator_compiles_into_a_graph() -> None:
    def step(lists: list[list[torch.Tensor]]) -> None:
        torch.ops.pace_kernels.pace_step_(*lists, None, **OPTIONS)

    lists = operands()
    twins = [[t.clone() for t in tensors] for tensors in lists]
    torch.compile(step, fullgraph=True)(lists)
    step(twins)
    for a, b in zip(lists, twins, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def bad(index: int, replacement: object) -> list[object]:
    lists: list[object] = list(operands())
    tensors = list(lists[index])
    tensors[1] = replacement
    lists[index] = tensors
    return lists


REFUSED = {
    "grads has 1 tensors, params has 2": lambda: [operands()[0], operands()[1][:1], *operands()[2:]],
    "steps has 0 tensors, params has 2": lambda: [*operands()[:5], []],
    "emas has 1 tensors, params has 2": lambda: [*operands()[:4], operands()[4][:1], operands()[5]],
    "emas has 0 tensors, params has 2": lambda: [*operands()[:4], [], operands()[5]],
    r"grads\[1\] has shape \(3, 7\), its parameter has \(7, 3\)": lambda: bad(1, torch.randn(3, 7)),
    r"params\[1\] must be float32, bfloat16 or float16": lambda: bad(0, torch.randn(7, 3).double()),
    r"exp_avg_sqs\[1\] must be float32 or bfloat16 without": lambda: bad(3, torch.randn(7, 3).half()),
    r"exp_avgs\[1\] overlaps itself": lambda: bad(2, torch.randn(3).expand(7, 3)),
    r"steps\[1\] must be a CPU tensor, float32 or float64, with one element": lambda: bad(5, torch.zeros(2)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_an_operator_refuses_before_it_writes(message: str) -> None:
    lists = REFUSED[message]()
    before = [[t.clone() for t in tensors] for tensors in lists]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pace_kernels.pace_step_(*lists, None, **OPTIONS)
    for a, b in zip(lists, before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", -1.0), ("lr", float("nan")), ("beta1", 1.0), ("beta2", -0.1), ("eps", 0.0), ("weight_decay", -1.0),
     ("lambda_pullback", -1.0), ("beta_ema", 1.5), ("ema_kappa", -1.0), ("ema_rho", -1.0), ("ema_gamma", float("inf")),
     ("ema_update_freq", 0)],
)  # fmt: skip
def test_an_operator_refuses_options(option: str, value: float) -> None:
    with pytest.raises(RuntimeError, match=option):
        torch.ops.pace_kernels.pace_step_(*operands(), None, **{**OPTIONS, option: value})
