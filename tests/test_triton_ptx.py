"""Promise: what Triton compiles for a GPU does what the CPU kernels do, to the last bit, and moves the bytes that the
algorithm must move and no others. The operators' own host code runs here; their launches are compiled to PTX and run by
the interpreter in `ptx`."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("in Triton's interpreter there is nothing to compile", allow_module_level=True)

from coded_cases import COMMON, KERNELS
from pace_kernels.triton_kernels import aot, ops, table
from ptx import Memory, run
from test_mada_native import LEARN, LISTS
from test_mada_native import OPTIONS as MADA_OPTIONS
from test_native import OPTIONS as PACE_OPTIONS
from triton.backends.compiler import GPUTarget

from pace_kernels.ops import PACE_STATS
from pace_kernels.torch_rules import codes

# Whole programs, a few groups of 16, groups and a rest, a rest alone, one element, none.
SIZES = (2 * 4096, 3 * 1024 + 48, 1234, 11, 1, 0)


class Gpu:
    """Takes the place of `launch`: the tensors of a call are copied to the interpreter's memory, and the table's
    addresses with them."""

    def __init__(self, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        self.launches: Counter[str] = Counter()
        self.bytes = 0  # of operands, by sweeps
        self.known: list[torch.Tensor] = []
        self.random = np.random.default_rng(0)
        monkeypatch.setattr(ops, "launch", self.launch)
        monkeypatch.setattr(table, "_plans", table.Uploads(1))

    def call(self, operator: Any, *arguments: Any, **options: Any) -> None:
        given = (*arguments, *options.values())
        self.known = [t for a in given for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
        operator(*arguments, **options)

    def launch(self, kernel: Any, programs: int, device: Any, options: Any, fixed: Any, **arguments: Any) -> None:
        if programs == 0:
            return
        self.launches[kernel.__name__] += 1
        arguments |= fixed
        memory, tensors = Memory(), {}
        values = [a for a in arguments.values() if isinstance(a, torch.Tensor)]
        for t in [*self.known, *values]:
            if t.numel() > 0 and t.data_ptr() not in tensors:
                bits = t.detach().reshape(-1).view(torch.uint8).numpy()
                tensors[t.data_ptr()] = memory.upload(bits, misalign=t.data_ptr() % 16), t
        addresses = {host: here for host, (here, _) in tensors.items()}
        if "table_ptr" in arguments:
            rows = arguments["table_ptr"].clone()
            # Of step counts the lowest bit is not the address's: see table.STEP. Scales may lie at odd ones.
            step = table.STEP.value
            rows[:, step] = rows[:, step].apply_(lambda host: addresses.get(host & ~1, 0) | host & 1)
            rows[:, step + 1 :] = rows[:, step + 1 :].apply_(lambda host: addresses.get(host, 0))
            memory.write(addresses[arguments["table_ptr"].data_ptr()], rows.view(torch.uint8).numpy())
        names = kernel.arg_names
        constants = {n: a for n, a in arguments.items() if n.isupper() or a is None}
        compiled = aot.compiled(kernel, constants, self.target, options)
        given = [arguments[n] for n in names if n not in constants]
        numbers = [addresses.get(a.data_ptr(), 0) if isinstance(a, torch.Tensor) else a for a in given]
        block = 32 * compiled.metadata.num_warps
        stats = run(compiled.asm["ptx"], None, programs, block, numbers, memory, compiled.metadata.shared,
                    order=self.random)  # fmt: skip
        swept = {addresses[t.data_ptr()] for t in self.known if t.numel() > 0}
        if kernel.__name__ == "_sweep_kernel":
            for key in ("ld_bytes_by_buffer", "st_bytes_by_buffer"):
                self.bytes += sum(n for address, n in stats[key].items() if address in swept)
        for host, (here, t) in tensors.items():
            if "table_ptr" not in arguments or host != arguments["table_ptr"].data_ptr():
                t.view(-1).view(torch.uint8).copy_(torch.from_numpy(memory.download(here)))


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """sm_90, or what a test asks for."""
    return Gpu(getattr(request, "param", 90), monkeypatch)


def on(*pairs: tuple[int, str]) -> Any:
    """Parametrizes a test by compute capability and form."""
    ids = [f"sm_{arch}-{form}" for arch, form in pairs]
    return pytest.mark.parametrize(("gpu", "form"), pairs, ids=ids, indirect=["gpu"])


def tensors(dtype: torch.dtype, seed: int, misaligned: bool = False, like: str = "") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for size in SIZES:
        t = torch.randn(size + misaligned, generator=generator)
        if like == "scales":  # spread over many magnitudes, so that clamped and unclamped coordinates meet
            t *= 10.0 ** torch.empty(size + misaligned).uniform_(-6, 2, generator=generator)
        elif like == "squares":
            t = t.square()
        made.append(t.to(dtype)[int(misaligned) :])
    return made


def copied(value: Any) -> Any:
    if isinstance(value, list):
        return [copied(t) for t in value]
    if not isinstance(value, torch.Tensor):
        return value
    memory = torch.empty(value.numel() + 16, dtype=value.dtype)  # at the same place within 16 bytes
    copy = memory[(value.data_ptr() - memory.data_ptr()) % 16 // value.element_size() :][: value.numel()]
    return copy.view(value.shape).copy_(value)


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, value in ours.items():
        lists = (value, theirs[name]) if isinstance(value, list) else ([value], [theirs[name]])
        for i, (a, b) in enumerate(zip(*lists, strict=True)):
            assert a is None or torch.equal(a, b), f"{name}[{i}]"


def bytes_of(ours: dict[str, Any], reads: tuple[str, ...], writes: tuple[str, ...], warps: int) -> int:
    """The bytes of these lists. Of a tensor's rest, beyond groups of 16 elements, each warp reads two copies, all but
    one of them from the L1 cache; it is written once."""
    rest = sum(t.numel() % 16 * t.element_size() for name in reads for t in ours[name])
    return rest * (2 * warps - 1) + sum(t.numel() * t.element_size() for name in (*reads, *writes) for t in ours[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on((90, "aligned"), (90, "misaligned"), (90, "resting"), (90, "AdamW"), (80, "aligned"), (80, "stats"))
def test_pace(gpu: Gpu, dtype: torch.dtype, form: str) -> None:
    misaligned = form == "misaligned"
    ours: dict[str, Any] = {
        "params": tensors(dtype, 0, misaligned),
        "grads": tensors(dtype, 1, misaligned, "scales"),
        "exp_avgs": tensors(torch.float32, 2, misaligned),
        "exp_avg_sqs": tensors(torch.float32, 3, misaligned, "squares"),
        "emas": tensors(torch.float32, 4, misaligned) if form != "AdamW" else [],
        "steps": [torch.tensor(4.0) for _ in SIZES],
        "stats": torch.zeros(len(PACE_STATS), dtype=torch.float64) if form == "stats" else None,
    }
    options = {**PACE_OPTIONS, "capturable": True, "lambda_pullback": 0.0 if form in ("resting", "AdamW") else 5.0}
    options["ema_update_freq"] = 3 if form == "resting" else 1
    theirs = {name: copied(value) for name, value in ours.items()}
    for _ in range(2 if form != "resting" else 1):
        gpu.call(ops.pace_step_, *ours.values(), **options)
        torch.ops.pace_kernels.pace_step_(*theirs.values(), **options)
    if form == "stats":
        a, b = ours.pop("stats"), theirs.pop("stats")
        # At most 64 terms in float32 a sum on the CPU; counts, minima and maxima are the same.
        assert torch.allclose(a, b, rtol=64 * 2**-24, atol=0)
        same = [i for i, name in enumerate(PACE_STATS) if name.endswith(("_min", "_max", "count", "clipped"))]
        assert torch.equal(a[same], b[same])
    assert_same(ours, theirs)
    assert gpu.launches["_sweep_kernel"] == gpu.launches["_scalars_kernel"] == (1 if form == "resting" else 2)
    if form in ("aligned", "resting", "AdamW"):
        average = ("emas",) if form == "aligned" else ()
        moved = ("params", "exp_avgs", "exp_avg_sqs", *average)
        steps = 1 if form == "resting" else 2
        assert gpu.bytes == steps * bytes_of(ours, (*moved, "grads"), moved, warps=8)


# Bytes an element that a step reads and writes, operands that have scales, and threads that share a code block's.
MOVED = {"PACE": (9, 7, 3, 4), "MADA": (17, 13, 5, 8), "schedule-free": (9, 7, 2, 4), "pullback": (9, 3, 1, 4)}


@pytest.mark.parametrize(
    "name", [*MOVED, "PACE, 16 bits", "MADA, roles stay", "schedule-free, 8 bits", "pullback, 16 bits"]
)
def test_codes(gpu: Gpu, name: str) -> None:
    """PACE, MADA with everything learned and an average that pulls, schedule-free, the pullback: aligned as torch
    allocates; and others of each, of no alignment."""
    shapes = ((66, 64), (1, 32), (0, 32))  # two programs, one code block, none
    ours, theirs = (COMMON[name](shapes=shapes) for _ in range(2))
    for call in (ours, theirs) if name in MOVED else ():
        for tensors in (*call.lists.values(), *filter(None, call.beside.values())):
            tensors[:] = [t.clone() for t in tensors]
    for step in range(2):
        gpu.bytes = 0
        grads = ours.gradients(2 * step + 1)
        ours.take(lambda *lists, **o: gpu.call(getattr(ops, ours.definition.op), *lists, **o), grads)
        theirs.take(KERNELS[type(theirs)], [g.clone() for g in grads])
        for k, (a, b) in enumerate(zip(ours.everything(), theirs.everything(), strict=True)):
            assert torch.equal(a, b), (step, k)
        if "hypergradients" in ours.extras:
            a, b = (call.extras["hypergradients"] for call in (ours, theirs))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * b.nan_to_num().abs().max().item(), equal_nan=True)
    assert gpu.launches["_sweep_kernel"] == gpu.launches["_scalars_kernel"] == 2
    if name in MOVED:
        n, (read, written, scaled, sharing) = sum(p.numel() for p in ours.params), MOVED[name]
        assert gpu.bytes == n * (read + written) + (sharing + 1) * scaled * n // codes.BLOCK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on((90, "aligned"), (90, "misaligned"), (80, "schedule on device"))
def test_schedule_free(gpu: Gpu, dtype: torch.dtype, form: str) -> None:
    misaligned = form == "misaligned"
    ours: dict[str, Any] = {
        "params": tensors(dtype, 0, misaligned),
        "grads": tensors(dtype, 1, misaligned, "scales"),
        "exp_avg_sqs": tensors(torch.float32, 3, misaligned, "squares"),
        "zs": tensors(torch.float32, 4, misaligned),
        "steps": [torch.tensor(4.0) for _ in SIZES],
    }
    options = {name: PACE_OPTIONS[name] for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize")}
    options |= {"count": 6.0, "share": 0.25, "capturable": True}
    if form == "schedule on device":
        ours["schedule"] = torch.tensor([9.0, 0.125], dtype=torch.float64)
        options["lr_tensor"] = torch.tensor(0.02)
    theirs = {name: copied(value) for name, value in ours.items()}
    for _ in range(2):
        gpu.call(ops.schedule_free_step_, *ours.values(), **options)
        torch.ops.pace_kernels.schedule_free_step_(*theirs.values(), **options)
    assert_same(ours, theirs)
    if form == "aligned":
        moved = ("params", "exp_avg_sqs", "zs")
        assert gpu.bytes == 2 * bytes_of(ours, (*moved, "grads"), moved, warps=8)


def mada_operands(dtype: torch.dtype, misaligned: bool) -> dict[str, Any]:
    ours: dict[str, Any] = {
        name: tensors(torch.float32, seed, misaligned, "squares" if "sqs" in name else "")
        for seed, name in enumerate(LISTS)
    }
    ours["params"], ours["grads"] = tensors(dtype, 20, misaligned), tensors(dtype, 21, misaligned)
    row = [-1.0, 1e-2, 0.9, 0.95, 0.9, 0.5, 0.5, 0.5]  # no gradient was kept yet
    ours["last_scalars"] = [torch.tensor(row, dtype=torch.float64) for _ in SIZES]
    ours["steps"] = [torch.tensor(4.0) for _ in SIZES]
    ours["coefficients"] = torch.tensor(row[2:], dtype=torch.float64)
    ours["hypergradients"] = torch.zeros(7, dtype=torch.float64)
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on((90, "aligned"), (90, "misaligned"), (90, "pulled capturable"), (80, "aligned"), (80, "AdamW"))
def test_mada(gpu: Gpu, dtype: torch.dtype, form: str) -> None:
    ours = mada_operands(dtype, form == "misaligned")
    options = {**MADA_OPTIONS, "capturable": True, "lambda_pullback": 0.0}
    if form == "pulled capturable":
        options["lambda_pullback"] = 2.0
    else:
        ours["emas"] = []
    if form == "AdamW":
        options |= {"learn": 0, "beta3": 0.0, "rho": 1.0, "gamma": 1.0}
        absent = ("exp_avg_diffs", "second_exp_avg_sqs", "exp_avg_lions", "last_grads", "older_grads", "last_scalars")
        ours |= {name: [] for name in absent}
        ours["coefficients"] = None
    theirs = {name: copied(value) for name, value in ours.items()}
    for _ in range(2):
        gpu.bytes = 0
        gpu.call(ops.mada_step_, *ours.values(), **options)
        torch.ops.pace_kernels.mada_step_(*theirs.values(), **options)
    # Same terms, at most 256 of them in float32 a sum on the CPU; they are of either sign.
    a, b = ours.pop("hypergradients"), theirs.pop("hypergradients")
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-6 * b.abs().max().item())
    assert (b != 0).all() or form == "AdamW"
    assert_same(ours, theirs)
    assert gpu.launches["_sweep_kernel"] == gpu.launches["_scalars_kernel"] == 2
    if form == "AdamW":
        moved: tuple[str, ...] = ("params", "exp_avgs", "exp_avg_sqs")
        assert gpu.bytes == bytes_of(ours, (*moved, "grads"), moved, warps=4)
    elif form != "misaligned":
        # The gradients change their roles by a copy more, where they have to; the first step's one more is over.
        states = ("exp_avgs", "exp_avg_sqs", "exp_avg_diffs", "second_exp_avg_sqs", "exp_avg_lions", "older_grads")
        pulled = ("emas", "last_grads") if form == "pulled capturable" else ("last_grads",)
        moved = ("params", *states, *pulled)
        assert gpu.bytes == bytes_of(ours, (*moved, "grads"), moved, warps=4)


def test_bytes_a_parameter(gpu: Gpu) -> None:
    """float32: PACE 36, 32 while the average rests but pulls, 28 without one; schedule-free AdamW 28; MADA 64 with
    everything learned, where the caller exchanges the two gradients."""
    n = 4096 + 16 * 33

    def one() -> list[torch.Tensor]:
        return [torch.rand(n)]

    def pace(freq: int, pull: float) -> None:
        options = {**PACE_OPTIONS, "lambda_pullback": pull, "ema_update_freq": freq}
        gpu.call(ops.pace_step_, one(), one(), one(), one(), one(), [torch.tensor(4.0)], **options)

    def schedule_free() -> None:
        options = {name: PACE_OPTIONS[name] for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize")}
        lists = one(), one(), one(), one(), [torch.tensor(4.0)]
        gpu.call(ops.schedule_free_step_, *lists, **options, count=5.0, share=0.2, capturable=False)

    def mada() -> None:
        lists = {name: one() for name in LISTS} | {"emas": [], "steps": [torch.tensor(4.0)]}
        lists["last_scalars"] = [torch.full((8,), 0.5, dtype=torch.float64)]
        sums = torch.rand(6, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
        gpu.call(ops.mada_step_, *lists.values(), *sums, **{**MADA_OPTIONS, "lambda_pullback": 0.0})

    for expected, step in (
        (36, lambda: pace(1, 5.0)),
        (32, lambda: pace(3, 5.0)),
        (36, lambda: pace(1, 0.0)),
        (28, lambda: pace(3, 0.0)),
        (28, schedule_free),
        (64, mada),
    ):
        gpu.bytes = 0
        step()
        assert gpu.bytes == expected * n


def test_learning(gpu: Gpu) -> None:
    ours = [torch.rand(6, dtype=torch.float64) for _ in range(3)] + [torch.tensor(3.0, dtype=torch.float64)]
    theirs = [t.clone() for t in ours]
    sums = [torch.randn(7, dtype=torch.float64).abs() * 8 for _ in range(3)]
    gpu.call(ops.mada_learn_, *ours, sums, **LEARN)
    torch.ops.pace_kernels.mada_learn_(*theirs, sums, **LEARN)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_nothing_happens_where_a_gradient_is_not_finite(gpu: Gpu) -> None:
    ours = mada_operands(torch.float32, False)
    ours["hypergradients"].fill_(3.0)
    theirs = {name: copied(value) for name, value in ours.items()}
    gpu.call(ops.mada_step_, *ours.values(), found_inf=torch.ones(()), **{**MADA_OPTIONS, "capturable": True})
    assert ours.pop("hypergradients").tolist() == [0.0] * 7
    assert_same(ours, {name: value for name, value in theirs.items() if name != "hypergradients"})


def test_sums_of_many_rows(gpu: Gpu) -> None:
    rows = torch.randn(2500, 8, dtype=torch.float64)
    out = torch.empty(7, dtype=torch.float64)
    gpu.known = [rows, out]
    ops._add_up(ops.RULES["mada_step_"].summed, rows, out, 63, 0.25, found_inf_ptr=None, lr_ptr=None)
    assert torch.allclose(out[:6], rows[:, :6].sum(dim=0), rtol=0, atol=1e-12) and out[6] == 0.25
    assert gpu.launches["_add_up_kernel"] == 2
