"""Promise: the pullback's CUDA kernels, executed from their real PTX with the real plan of launches, give the CPU
kernels' bits for every switch, format and layout, and read and write each tensor once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from emulated import build
from emulated.device import Device
from pullback_cases import CASES, assert_same_lists, base_step, options_of, start, train

from pace_kernels.ops import PACE_STATS

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))

STEPS = 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.ops.pace_kernels.pullback_
U = 2.0**-24


def device(**options: object) -> Device:
    return Device(rng=np.random.default_rng(0), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_it_gives_the_bits_of_the_cpu(case: str, dtype: torch.dtype) -> None:
    on = device()
    assert_same_lists(train(on.pullback_, CASES[case], dtype, STEPS), train(CPU, CASES[case], dtype, STEPS))
    assert on.launches


@pytest.mark.parametrize("misalign", [2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_misaligned_tensors(dtype: torch.dtype, misalign: int) -> None:
    for case in ("default", "average"):
        on = device(misalign=misalign)
        assert_same_lists(train(on.pullback_, CASES[case], dtype, STEPS), train(CPU, CASES[case], dtype, STEPS))
        if dtype == torch.bfloat16 or misalign >= 4:
            assert not any(width == 16 for family, _, width in on.widths if family == "pullback")


@pytest.mark.parametrize("arch", build.ptx_archs())
def test_one_warp_at_a_time_in_every_ptx_with_statistics(arch: str) -> None:
    for case in ("default", "constant", "average"):
        found = []
        for op in (device(arch=arch, warp_serial=True).pullback_, CPU):
            stats = torch.zeros(len(PACE_STATS), dtype=torch.float64)
            found.append((train(op, CASES[case], torch.bfloat16, STEPS, stats), stats))
        assert_same_lists(found[0][0], found[1][0])
        # Either sums float32 terms in rows of at most 64, and beyond in float64: 63 roundings of u each.
        torch.testing.assert_close(found[0][1], found[1][1], rtol=2 * 63 * U, atol=0)


def test_a_skipped_step_changes_nothing() -> None:
    case = CASES["capturable"]
    lists, stats = start(case, torch.float32), torch.zeros(len(PACE_STATS), dtype=torch.float64)
    before = {name: [t.clone() for t in tensors] for name, tensors in lists.items()}
    device().pullback_(*lists.values(), stats, found_inf=torch.ones(1), **options_of(case))
    assert_same_lists(lists, before)
    assert stats.tolist() == [float("inf") if name.endswith("_min") else 0.0 for name in PACE_STATS]


# Bytes read and written of a parameter's operands, by case and dtype: x', x, v, e and x₊, e₊.
BYTES = {
    ("default", torch.float32): 24,
    ("default", torch.bfloat16): 18,
    ("narrow moment", torch.bfloat16): 16,
    ("from the step", torch.float32): 20,
    ("constant", torch.float32): 20,
    ("constant from the step", torch.float32): 16,
    ("average", torch.float32): 12,
    ("average", torch.bfloat16): 10,
}


@pytest.mark.parametrize(("case", "dtype"), BYTES, ids=str)
def test_each_tensor_is_read_once_and_written_once(case: str, dtype: torch.dtype) -> None:
    numel = 3 * build.plan_module().CHUNK + 8
    lists = start(CASES[case], dtype)
    for name, tensors in lists.items():
        if name != "steps" and tensors:
            lists[name] = [torch.rand(numel).to(tensors[0].dtype)]
    lists["steps"] = lists["steps"][:1]
    o, on = options_of(CASES[case]), device()
    base_step(lists, [torch.rand(numel).to(dtype)], o)
    on.pullback_(*lists.values(), None, **o)
    moved: Counter[str] = Counter()
    for (_, name, kind), count in on.moved.items():
        if name in ("x", "before", "v", "e"):
            moved[f"{name} {kind}"] += count
    assert sum(moved.values()) == BYTES[case, dtype] * numel, moved
    assert sum(on.widths["pullback", kind, 16] for kind in ("ld", "st")) == BYTES[case, dtype] * numel
    assert "before st" not in moved and "v st" not in moved and ("x st" in moved) == ("average" not in case)
