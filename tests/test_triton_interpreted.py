"""The cases of test_triton.py, which runs them with TRITON_INTERPRET=1. By hand:
``TRITON_INTERPRET=1 pytest tests/test_triton_interpreted.py``."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("test_triton.py runs these in Triton's interpreter", allow_module_level=True)

import mada_cases
import pace_cases
import pullback_cases
import step_count_cases
import test_mada_native
import test_native
import test_pullback_native
import test_schedule_free
from pace_kernels.triton_kernels import checks, ops, table
from test_mada_native import LEARN
from triton.runtime import interpreter

from pace_kernels import MADA, PACE, backends
from pace_kernels.backend import choose
from pace_kernels.definitions.pace import pace_scalars
from pace_kernels.ops import PACE_STATS
from pace_kernels.torch_rules import mada as torch_mada
from pace_kernels.torch_rules.pace import PaceOptions


def _call(function: Any, *arguments: Any, **named: Any) -> Any:
    """A launch replaces the functions of triton.language by NumPy's. The interpreter does so again at each call of a
    function within the kernel, which takes several times as long as all the rest."""
    if function.fn.__module__.startswith("triton."):
        interpreter._patch_lang(function.fn)
    return function.rewrite()(*arguments, **named)


interpreter.InterpretedFunction.__call__ = _call

# The interpreter takes some 10 µs an operation. Two blocks of MADA, groups of 16 and a rest, a rest alone, nothing;
# several programs are a test of their own.
pace_cases.SHAPES[:] = [(17, 33), (19,), (0, 4)]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SOME = ("default", "everything", "no moments", "AdamW", "all, inside", "Lion", "pulled, every third step")


def pairs(cases: Any) -> list[Any]:
    """Each case in float32 and bfloat16, some in float16."""
    dtypes = [(name, dtype) for name in cases for dtype in (F32, BF16)] + [
        (name, F16) for name in cases if name in SOME
    ]
    return [pytest.param(name, dtype, id=f"{name}-{dtype}") for name, dtype in dtypes]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the launches by kernel."""
    counts: Counter[str] = Counter()
    launch = ops.launch

    def counted(kernel: Any, programs: int, *arguments: Any, **named: Any) -> None:
        counts[kernel.__name__] += programs > 0
        launch(kernel, programs, *arguments, **named)

    monkeypatch.setattr(ops, "launch", counted)
    return counts


def train(
    optimizer: Any,
    params: list[Any],
    steps: int,
    dtype: torch.dtype,
    path: list[list[float]] | None = None,
    each: Any = lambda: None,
) -> None:
    """``path``: the coefficients to step with, from a run before; ``each`` is called after each step."""
    values = optimizer.param_groups[0].get("coefficient_values")
    for t, grads in enumerate(pace_cases.gradients(steps, dtype)):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        if path is not None and values is not None:
            if t < len(path):
                values.copy_(torch.tensor(path[t], dtype=torch.float64))
            else:
                path.append(values.tolist())
        optimizer.step()
        each()


# ---- the rules ----


@pytest.mark.parametrize(("case", "dtype"), pairs(pace_cases.CASES))
def test_pace(case: str, dtype: torch.dtype) -> None:
    runs = []
    for backend in ("cpu", "triton"):
        params = pace_cases.weights(dtype)
        optimizer = PACE(params, backend=backend, **{"lr": 1e-2, **pace_cases.CASES[case]})
        train(optimizer, params, 3 if dtype == F32 else 2, dtype)
        runs.append((params, optimizer))
    pace_cases.assert_same_bits(*runs)


@pytest.mark.parametrize(("case", "dtype"), pairs(mada_cases.CASES))
def test_mada(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hypergradient's terms are the same, their sums run in another order: on the CPU through at most 256 terms in
    float32, here through 32, so that they differ by at most 288 u times the sum of the terms' sizes. That is what the
    torch rule gives where it sums sizes."""
    runs: dict[str, Any] = {}
    sums: dict[str, list[Any]] = {"cpu": [], "triton": [], "torch": []}
    path: list[list[float]] = []
    learns = mada_cases.CASES[case].get("learn") != ()
    for backend in ("cpu", "triton", "torch") if learns else ("cpu", "triton"):
        if backend == "torch":
            monkeypatch.setattr(torch_mada, "fixed_order_sum", lambda a: a.double().abs().sum())
        params = pace_cases.weights(dtype)
        optimizer = MADA(params, backend=backend, **{"lr": 1e-2, **mada_cases.CASES[case]})
        steps = 3 if dtype == F32 else 2
        train(optimizer, params, steps, dtype, path, lambda b=backend, o=optimizer: sums[b].append(o.hypergradients))
        runs[backend] = params, optimizer
    pace_cases.assert_same_bits(runs["cpu"], runs["triton"])
    for ours, theirs, sizes in zip(sums["triton"], sums["cpu"], sums["torch"], strict=False):
        assert ours.keys() == theirs.keys()
        for name, size in sizes.items():
            assert abs(ours[name] - theirs[name]) <= 288 * 2**-24 * abs(size) * 1.001, name
    if learns and steps > 2:
        assert any(value != 0.0 for value in sums["triton"][-1].values())


@pytest.mark.parametrize(("case", "dtype"), pairs(pullback_cases.CASES))
def test_pullback(case: str, dtype: torch.dtype) -> None:
    """With statistics: counts, minima and maxima are the same but for w_t in float64; sums as below."""
    found = []
    for op in (torch.ops.pace_kernels.pullback_, ops.pullback_):
        stats = torch.zeros(len(PACE_STATS), dtype=torch.float64)
        found.append((pullback_cases.train(op, pullback_cases.CASES[case], dtype, 3, stats), stats))
    pullback_cases.assert_same_lists(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=80 * 2**-24, atol=0)
    silent = pullback_cases.train(ops.pullback_, pullback_cases.CASES[case], dtype, 3)
    pullback_cases.assert_same_lists(found[0][0], silent)


@pytest.mark.parametrize(("case", "dtype"), pairs(test_schedule_free.CASES))
def test_of_schedule_free(case: str, dtype: torch.dtype) -> None:
    test_schedule_free.test_kernels_give_the_bits_of_the_torch_rule(case, dtype, "triton")


@pytest.mark.parametrize("message", test_pullback_native.REFUSED)
def test_the_pullback_refuses_before_it_writes(message: str) -> None:
    test_pullback_native.refused(ops.pullback_, message)


def test_a_skipped_pullback_changes_nothing() -> None:
    lists = test_pullback_native.operands()
    before = {name: [t.clone() for t in tensors] for name, tensors in lists.items()}
    stats = torch.full((len(PACE_STATS),), 3.0, dtype=torch.float64)
    ops.pullback_(*lists.values(), stats, found_inf=torch.ones(()), **{**pullback_cases.OPTIONS, "capturable": True})
    pullback_cases.assert_same_lists(lists, before)
    assert stats.tolist() == [math.inf if name.endswith("_min") else 0.0 for name in PACE_STATS]


@pytest.mark.parametrize("case", ["default", "no clamp", "averaged AdamW", "everything"])
def test_statistics(case: str) -> None:
    """At most 64 terms in float32 a sum on the CPU. Counts are the same; minima and maxima but for w_t in float64."""
    found = []
    for backend in ("cpu", "triton"):
        params = pace_cases.weights(F32)
        optimizer = PACE(params, backend=backend, **{"lr": 1e-2, **pace_cases.CASES[case], "log_stats": True})
        train(optimizer, params, 2, F32)
        found.append(optimizer._step_stats[0][0])
    theirs, ours = (dict(zip(PACE_STATS, row.tolist(), strict=True)) for row in found)
    assert ours["count"] == theirs["count"] == 17 * 33 + 19 and ours["clipped"] == theirs["clipped"]
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=2**-48 if name[-4:] in ("_min", "_max") else 80 * 2**-24, abs=0)


def test_scalars_are_those_of_the_host() -> None:
    """exp(t log β) instead of a power: the scalars, rounded to float32, are the same but for about one in 1e5."""
    count = 4096
    steps = torch.arange(count, dtype=torch.float32)
    rule = ops.RULES["pace_step_"]
    rows = torch.zeros(count, rule.columns, dtype=torch.int64)
    rows[:, table.STEP.value] = steps.data_ptr() + 4 * torch.arange(count)
    out = torch.empty(count, len(rule.fields))
    options = {**test_native.OPTIONS, "beta2": 0.999, "ema_rho": 3.0, "ema_update_freq": 7, "capturable": True}
    call = checks.Call(rule.definition, ([], [], [], [], [], []), options)
    call.device = steps.device
    layout = SimpleNamespace(plan=SimpleNamespace(table=rows), taken=[(0.0, count)])
    ops._each_step_count(rule, call, layout, scalars_ptr=out, factors_ptr=None)
    assert torch.equal(steps, torch.arange(1, count + 1))
    wanted = torch.tensor([[float(a) for a in pace_scalars(PaceOptions(**options), t + 1.0)] for t in range(count)])
    differing = out != wanted
    assert int(differing.sum()) <= 4
    torch.testing.assert_close(out, wanted, rtol=2**-23, atol=0)


# ---- the contract of the operators ----


def both(name: str, arguments: list[Any], **options: Any) -> None:
    """Runs an operator on clones by the CPU kernel and here: the same bits in every argument."""

    def clones(value: Any) -> Any:
        return [clones(t) for t in value] if isinstance(value, list) else value.clone() if value is not None else None

    ours, theirs = clones(arguments), clones(arguments)
    getattr(ops, name)(*ours, **options)
    getattr(torch.ops.pace_kernels, name)(*theirs, **options)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for x, y in zip(a, b, strict=True) if isinstance(a, list) else [(a, b)]:
            if x is not None and not (name == "mada_step_" and i == 13):
                assert torch.equal(x, y), i
            elif x is not None:
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-8)


ONE = torch.tensor(1.0)
SCALING: dict[str, dict[str, Any]] = {
    "scale": {"grad_scale": torch.tensor(1024.0)},
    "clip": {"clip_coef": torch.tensor([0.3])},
    "both": {"grad_scale": torch.tensor(3.0), "clip_coef": torch.tensor(0.7)},
    "lr": {"lr_tensor": torch.tensor(0.02)},
    "lr in float64": {"lr_tensor": torch.tensor([0.02], dtype=torch.float64)},
    "finite": {"found_inf": torch.zeros(())},
    "all": {"grad_scale": ONE * 8, "clip_coef": ONE / 3, "found_inf": torch.zeros(1), "lr_tensor": ONE / 7},
}


@pytest.mark.parametrize("scaling", SCALING)
def test_scaling_and_learning_rates_on_the_device(scaling: str) -> None:
    torch.manual_seed(0)
    both("pace_step_", [*test_native.operands(), None], **test_native.OPTIONS, **SCALING[scaling])
    named = test_mada_native.operands()
    both("mada_step_", list(named.values()), **{**test_mada_native.OPTIONS, "capturable": True}, **SCALING[scaling])


def test_nothing_happens_where_a_gradient_is_not_finite() -> None:
    found = torch.tensor(1.0)
    lists = test_native.operands()
    before = [[t.clone() for t in tensors] for tensors in lists]
    stats = torch.full((len(PACE_STATS),), 3.0, dtype=torch.float64)
    ops.pace_step_(*lists, stats, found_inf=found, **{**test_native.OPTIONS, "capturable": True})
    assert stats.tolist() == [math.inf if name.endswith("_min") else 0.0 for name in PACE_STATS]
    named = test_mada_native.operands()
    named["hypergradients"].fill_(3.0)
    kept = {k: [t.clone() for t in v] if isinstance(v, list) else [v.clone()] for k, v in named.items()}
    ops.mada_step_(*named.values(), found_inf=found, **{**test_mada_native.OPTIONS, "capturable": True})
    assert named["hypergradients"].tolist() == [0.0] * 7
    now = {k: v if isinstance(v, list) else [v] for k, v in named.items() if k != "hypergradients"}
    for a, b in zip([*lists, *now.values()], [*before, *(kept[k] for k in now)], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_step_counts_that_differ(launches: Counter[str]) -> None:
    lists = test_native.operands(6)
    lists[5] = [torch.tensor(t) for t in (4.0, 9.0, 4.0, 2.0, 9.0, 4.0)]
    both("pace_step_", lists, **test_native.OPTIONS)
    assert launches == {"_scalars_kernel": 3, "_sweep_kernel": 1}
    both("pace_step_", lists, **{**test_native.OPTIONS, "capturable": True})
    assert launches == {"_scalars_kernel": 4, "_sweep_kernel": 2}


def test_many_small_tensors_are_a_few_launches(launches: Counter[str]) -> None:
    count = 70
    lists = [[torch.rand(1 + i % 5) for i in range(count)] for _ in range(5)]
    steps = [torch.zeros(()) for _ in range(count)]
    both("pace_step_", [*lists, steps], **test_native.OPTIONS)
    assert launches == {"_scalars_kernel": 1, "_sweep_kernel": 1}


def test_formats_may_be_mixed(launches: Counter[str]) -> None:
    torch.manual_seed(0)
    lists = test_native.operands(4)
    lists[0] = [t.to(dtype) for t, dtype in zip(lists[0], (F32, BF16, F16, BF16), strict=True)]
    lists[1] = [t.to(dtype) for t, dtype in zip(lists[1], (F32, F32, F16, BF16), strict=True)]
    both("pace_step_", lists, **test_native.OPTIONS)
    assert launches == {"_scalars_kernel": 1, "_sweep_kernel": 4}


def test_several_programs_and_many_rows(launches: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs, the second with a rest, and sums of sums."""
    named = test_mada_native.operands(1)
    for name, value in named.items():
        if isinstance(value, list) and name not in ("steps", "last_scalars"):
            named[name] = [torch.rand(4096 + 1040 + 5)]
    both("mada_step_", list(named.values()), **test_mada_native.OPTIONS)
    pace = [*([torch.rand(4096 + 1040 + 5)] for _ in range(5)), [torch.tensor(4.0)]]
    both("pace_step_", pace, **test_native.OPTIONS)
    assert launches["_add_up_kernel"] == 1
    rows = torch.randn(2100, 16, dtype=torch.float64)
    rows[:, [2, 3, 5, 6, 8, 9]] = rows[:, [2, 3, 5, 6, 8, 9]].abs()
    rows[77, 3] = math.nan
    out = torch.empty(14, dtype=torch.float64)
    ops._add_up(ops.RULES["pace_step_"].summed, rows, out, found_inf_ptr=None, lr_ptr=None)
    assert launches["_add_up_kernel"] == 1 + 2
    assert out[3].isnan() and out[[2, 5, 8]].tolist() == rows[:, [2, 5, 8]].amin(dim=0).tolist()
    assert out[[6, 9]].tolist() == rows[:, [6, 9]].amax(dim=0).tolist()
    others = [0, 1, 4, 7, 10, 11, 12, 13]
    torch.testing.assert_close(out[others], rows[:, others].sum(dim=0), rtol=0, atol=1e-12)


def test_sums_are_the_same_bits_again() -> None:
    named = test_mada_native.operands(3)
    found = []
    for _ in range(2):
        copies = {k: [t.clone() for t in v] if isinstance(v, list) else v.clone() for k, v in named.items()}
        ops.mada_step_(*copies.values(), **test_mada_native.OPTIONS)
        found.append(copies["hypergradients"])
    assert torch.equal(*found)


@pytest.mark.parametrize("layout", test_native.LAYOUTS)
def test_layouts(layout: str) -> None:
    torch.manual_seed(0)
    start, grad = test_native.LAYOUTS[layout]()
    found = []
    for backend in ("cpu", "triton"):
        param = torch.nn.Parameter(start.clone() if layout != "interleaved strides" else start)
        if not start.is_contiguous() and layout != "interleaved strides":
            param = torch.nn.Parameter(torch.empty_strided(start.shape, start.stride()).copy_(start))
        kept = param.detach().clone()
        optimizer = PACE([param], lr=1e-2, backend=backend)
        for _ in range(2):
            param.grad = grad
            optimizer.step()
        with optimizer.averaged():
            average = param.detach().clone()
        found.append([param.detach().clone(), average, *optimizer.state[param].values()])
        with torch.no_grad():
            param.copy_(kept)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_misaligned_views_of_bfloat16() -> None:
    memory = torch.randn(3, 2000).bfloat16()
    params, grads = ([row[k : k + 700] for row, k in zip(memory, (1, 8, 3), strict=True)] for _ in range(2))
    states = [[torch.rand(703)[3:] for _ in range(3)] for _ in range(3)]
    both("pace_step_", [[p.clone() for p in params], grads, *states, [torch.zeros(()) for _ in range(3)]],
         **test_native.OPTIONS)  # fmt: skip


def test_nothing_to_do() -> None:
    stats = torch.empty(len(PACE_STATS), dtype=torch.float64)
    ops.pace_step_([], [], [], [], [], [], stats, **test_native.OPTIONS)
    assert stats[0] == 0 and stats[2] == math.inf
    empty = [torch.empty(0, 3)]
    steps = [torch.tensor(2.0)]
    ops.pace_step_(empty, empty, empty, empty, empty, steps, **test_native.OPTIONS)
    assert steps[0] == 3
    named = test_mada_native.operands(1)
    lists = {k: empty if isinstance(v, list) and k not in ("steps", "last_scalars") else v for k, v in named.items()}
    ops.mada_step_(*lists.values(), **test_mada_native.OPTIONS)
    assert named["steps"][0] == 5
    sums = named["hypergradients"]
    assert sums.tolist() == [0.0] * 6 + [test_mada_native.OPTIONS["lr"]]


LEARNING: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"hyper_momentum": [0.0, 0.5, 0.9, 0.1, 0.2, 0.3]},
    "bounds": {"lower": [0.4] * 6, "upper": [0.5] * 6},
    "clip": {"clip": 0.1},
    "warm-up": {"warmup": 4},
    "last step of the warm-up": {"warmup": 3},
    "some": {"learn": 0b010110},
}


@pytest.mark.parametrize("case", LEARNING)
def test_learning(case: str) -> None:
    torch.manual_seed(0)
    six = [torch.rand(6, dtype=torch.float64) for _ in range(3)]
    count = torch.tensor(3.0, dtype=torch.float64)
    sums = [torch.randn(7, dtype=torch.float64).abs() for _ in range(3)]
    options = {**LEARN, **LEARNING[case]}
    both("mada_learn_", [*six, count, sums], **options)
    sums[1][2], sums[0][4] = math.nan, math.inf
    both("mada_learn_", [*six[:2], torch.zeros(6).double(), count, [sums[2]]], **options)
    moved = [t.clone() for t in six]
    ops.mada_learn_(*moved, count, sums, found_inf=torch.ones(()), **options)
    assert all(torch.equal(a, b) for a, b in zip(moved, six, strict=True)) and count == 3
    ops.mada_learn_(*moved, count, sums, **options)
    for k in (2, 4):
        assert moved[0][k] == six[0][k] and moved[1][k] == six[1][k]
    for row in sums:
        row[6] = 0.0
    before = moved[0].clone()
    ops.mada_learn_(*moved, count, sums, **options)
    assert torch.equal(moved[0], before) and count == 4


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", step_count_cases.OPERATORS)
def test_steps_beyond_float32(name: str, capturable: bool) -> None:
    step_count_cases.moves_every_third_step(getattr(ops, name), name, capturable)


@pytest.mark.parametrize("name", step_count_cases.OPERATORS)
def test_float32_is_refused_where_it_stops_counting(name: str) -> None:
    step_count_cases.stops_before_it_loses_count(getattr(ops, name), name)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_storage_formats_round_as_the_cpu_does(dtype: torch.dtype) -> None:
    """On midpoints between neighbours and the floats next to them, of both signs, beyond the largest too, and NaN; by a
    step whose weights come out as minus the first moment."""
    values = torch.arange(0, 65536, 7, dtype=torch.int32).to(torch.int16).view(dtype)
    values = torch.cat([values[values.isfinite() & (values >= 0)], torch.tensor([torch.finfo(dtype).max], dtype=dtype)])
    values = values.double().unique()
    above = torch.nextafter(values.to(dtype), torch.tensor(torch.inf, dtype=dtype)).double()
    middle = ((values + above.clamp(max=2 * torch.finfo(dtype).max)) / 2).float()
    near = [torch.nextafter(middle, torch.tensor(side)) for side in (-torch.inf, torch.inf)]
    wanted = torch.cat([middle, *near, -middle, torch.tensor([math.nan, -math.nan, 0.0, -0.0, math.inf])])
    x, zero = torch.zeros(len(wanted), dtype=dtype), torch.zeros(len(wanted))
    options = {**test_native.OPTIONS, "lr": 1.0, "beta1": 0.5, "beta2": 0.5, "eps": 1.0, "weight_decay": 0.0}
    options["lambda_pullback"] = 0.0
    results = []
    for step in (ops.pace_step_, torch.ops.pace_kernels.pace_step_):
        lists = [[x.clone()], [zero.to(dtype)], [-wanted], [zero.clone()], [], [torch.zeros(())]]
        step(*lists, **options)
        results.append(lists[0][0].view(torch.int16))
    assert torch.equal(*results)


# ---- what is refused, what is kept ----


def refuses(operator: Any, arguments: list[Any], options: dict[str, Any], message: str) -> None:
    def flat() -> Iterator[torch.Tensor]:
        for value in arguments:
            yield from value if isinstance(value, list) else [value] if isinstance(value, torch.Tensor) else []

    before = [t.clone() for t in flat()]
    with pytest.raises(RuntimeError, match=message):
        operator(*arguments, **options)
    assert all(torch.equal(a, b) for a, b in zip(flat(), before, strict=True))


@pytest.mark.parametrize("message", test_native.REFUSED)
def test_pace_refuses_before_it_writes(message: str) -> None:
    refuses(ops.pace_step_, list(test_native.REFUSED[message]()), test_native.OPTIONS, message)


@pytest.mark.parametrize("message", test_mada_native.REFUSED)
def test_mada_refuses_before_it_writes(message: str) -> None:
    change = test_mada_native.REFUSED[message]
    named = test_mada_native.operands() | {k: v for k, v in change.items() if k not in test_mada_native.OPTIONS}
    options = test_mada_native.OPTIONS | {k: v for k, v in change.items() if k in test_mada_native.OPTIONS}
    refuses(ops.mada_step_, list(named.values()), options, message)


@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", -1.0), ("beta1", 1.0), ("beta2", -0.1), ("eps", 0.0), ("weight_decay", math.nan), ("beta_ema", 1.5),
     ("lambda_pullback", -1.0), ("ema_kappa", -1.0), ("ema_rho", -1.0), ("ema_gamma", math.inf),
     ("ema_update_freq", 0)],
)  # fmt: skip
def test_options_that_are_refused(option: str, value: float) -> None:
    refuses(ops.pace_step_, list(test_native.operands()), {**test_native.OPTIONS, option: value}, option)


@pytest.mark.parametrize(
    ("name", "value"),
    [("grad_scale", torch.ones(2)), ("clip_coef", torch.ones((), dtype=torch.float64)), ("found_inf", torch.ones(3)),
     ("lr_tensor", torch.ones((), dtype=torch.int64)), ("stats", torch.zeros(14))],
)  # fmt: skip
def test_tensors_that_are_refused(name: str, value: torch.Tensor) -> None:
    refuses(ops.pace_step_, list(test_native.operands()), {**test_native.OPTIONS, name: value}, name)


def test_a_tensor_without_memory_is_refused() -> None:
    """As a DTensor is, which says that it has elements: its kernels would write to address 0."""
    lists = list(test_native.operands())
    with pytest.MonkeyPatch.context() as patch:
        real = torch.Tensor.data_ptr
        patch.setattr(torch.Tensor, "data_ptr", lambda t: 0 if t is lists[0][1] else real(t))
        refuses(ops.pace_step_, lists, test_native.OPTIONS, "no memory of its own")


def test_tables_are_kept_while_addresses_stay_and_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = test_native.operands()
    ops.pace_step_(*lists, **test_native.OPTIONS)
    count = len(table._plans)
    first = list(table._plans._recent.values())[-1]
    ops.pace_step_(*lists, **test_native.OPTIONS)
    assert len(table._plans) == count and list(table._plans._recent.values())[-1] is first
    monkeypatch.setattr(table._plans, "_limit", 10 * first[1].nbytes)
    kept = [test_native.operands() for _ in range(20)]
    for each in kept:
        ops.pace_step_(*each, **test_native.OPTIONS)
    assert len(table._plans) == 10 and table._plans._held == 10 * first[1].nbytes


def test_what_a_capture_has_seen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; here by its absence."""
    capturing, stream = False, 7
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=stream))
    uploads, device = table.Uploads(2), torch.device("cuda")

    def get(key: str) -> Any:
        return uploads.get(device, key, lambda: SimpleNamespace(nbytes=1))

    eager = get("a")
    assert get("a") is eager
    capturing, stream = True, 8
    assert get("a") is eager  # its copy was made before, and a capture begins on an idle device
    within = get("b")
    assert get("b") is not within
    capturing = False
    assert get("b") is not within and get("a") is not eager  # another stream's copy may be under way
    for key in "cdef":
        get(key)
    assert len(uploads) == 2 and {id(eager), id(within)} <= uploads._captured.keys()


def test_what_a_capture_uploads_comes_from_memory_pinned_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch copies from nothing else within a capture, and what a graph reads again is given out once."""
    pinned: list[torch.Tensor] = []

    def pin(nbytes: int) -> torch.Tensor:
        pinned.append(torch.empty(nbytes, dtype=torch.uint8))
        return pinned[-1]

    reserve = table.Reserve(pin)
    source = torch.arange(5, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="take a step like it"):
        reserve.copy_of(source)
    reserve.provide(80)
    reserve.provide(64)
    assert [t.numel() for t in pinned] == [80]
    rows = torch.arange(6).view(3, 2)
    copies = [reserve.copy_of(source), reserve.copy_of(rows)]
    assert torch.equal(copies[0], source) and torch.equal(copies[1], rows)
    start = pinned[0].data_ptr()
    assert [c.data_ptr() - start for c in copies] == [0, 32]
    with pytest.raises(RuntimeError, match="of 20 bytes in pinned memory, and 0 bytes are set aside"):
        reserve.copy_of(source)
    reserve.provide(1 << 40)
    assert pinned[-1].numel() == table.Reserve.LIMIT

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(table, "_reserve", reserve)
    moved: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *_, **__: moved.append(t) or t)
    uploaded = table.upload(rows, torch.device("cuda"))
    assert uploaded.source is moved[0] is not rows and torch.equal(uploaded.tensor, rows)
    assert uploaded.source.data_ptr() == pinned[-1].data_ptr()


def test_the_backend_is_chosen_by_name_alone_here() -> None:
    row = backends()["triton"]
    assert row.available and row.reason is None
    cpu = torch.device("cpu")
    assert choose("triton", cpu, F32) is row and choose(None, cpu, F32) is not row
    with pytest.warns(RuntimeWarning, match="computes through torch"):  # addresses on a GPU mean nothing here
        assert choose(None, torch.device("cuda"), BF16).name == "torch"
    assert choose("triton", cpu, F32).op("pullback_") is ops.pullback_
    with pytest.raises(RuntimeError, match=r"it covers torch\.float32"):
        choose("triton", cpu, torch.float64)
