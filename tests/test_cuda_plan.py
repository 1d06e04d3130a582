"""Promise: the plan of CUDA launches covers every element once, with as few launches as its tables allow."""

from __future__ import annotations

from typing import Any

import pytest
from emulated import build
from emulated.device import FORMATS
from hypothesis import given
from hypothesis import strategies as st

from pace_kernels.definitions import DEFINITIONS

OPTIONS: dict[str, Any] = {
    "lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01, "lambda_pullback": 5.0,
    "clamp_pullback": True, "beta_ema": 0.01, "ema_kappa": 0.2, "ema_rho": 0.0, "ema_gamma": 1.0, "ema_update_freq": 1,
    "pullback_from_step": False, "maximize": False, "capturable": False,
}  # fmt: skip
MADA = {
    **OPTIONS, "learn": 0, "beta3": 0.9, "rho": 0.0, "c": 1.0, "gamma": 1.0, "lion_beta1": 0.9, "lion_beta2": 0.9,
    "second_max": False,
}  # fmt: skip
REQUEST: dict[str, Any] = {
    **dict.fromkeys(("lr_tensor", "grad_scale", "clip_coef", "found_inf", "result", "numbers")),
    "lr_is_double": False,
    "lists": 0b1111111111,
}
PLAN = build.plan_module()


def tensor(numel: int, **changes: Any) -> dict[str, Any]:
    address = 0x1000 if numel > 0 else None
    kept = {"operands": [address] * 10, "row": None, "step": None, "x_format": "float32", "g_format": "float32"}
    return {**kept, "numel": numel, "steps_taken": 0.0, **changes}


def plan(tensors: list[dict[str, Any]], **request: Any) -> list[dict[str, Any]]:
    return PLAN.pace_step_(tensors, OPTIONS, {**REQUEST, **request}, lambda size: 0x2000)


def blocks(numel: int) -> int:
    return -(-numel // PLAN.CHUNK)


def test_thousands_of_small_tensors_are_few_launches() -> None:
    for count in (1, 2000, 5000):
        calls = plan([tensor(1000) for _ in range(count)])
        assert len(calls) == -(-count // PLAN.CAPACITY(5))
        assert sum(c["blocks"] for c in calls) == count
        on_device = plan([tensor(1000, step=0x3000) for _ in range(count)])
        scalars = -(-count // PLAN.SCALARS_CAPACITY)
        assert [c["kind"] for c in on_device] == ["scalars"] * scalars + ["sweep"] * len(calls)
    assert PLAN.CAPACITY(5) == 571 and PLAN.CAPACITY(10) == 333


def test_parameters_fit_the_limit() -> None:
    mada = PLAN.mada_step_([tensor(1000)], MADA, REQUEST, lambda size: 0x2000)
    for call in [*plan([tensor(1000, step=0x3000)], result=0x4000), *mada]:
        assert len(call["parameters"]) <= PLAN.PARAMETER_BYTES == 32764


def test_tensors_beyond_32_bits() -> None:
    (call,) = plan([tensor(2**33 + 1)])
    assert call["blocks"] == 2**33 // PLAN.CHUNK + 1
    # A launch has no more than 2^30 blocks, so that these are cut.
    assert [c["blocks"] for c in plan([tensor(2**41), tensor(2**41), tensor(5)])] == [2**29 * 2, 1]
    assert [c["blocks"] for c in plan([tensor(2**42), tensor(2**42)])] == [2**30, 2**30]


@given(
    st.lists(
        st.tuples(st.integers(0, 20_000), st.sampled_from(["float32", "bfloat16", "float16"]), st.integers(0, 3)),
        min_size=1,
        max_size=40,
    ),
    st.booleans(),
)
def test_every_element_is_in_one_launch(tensors: list[tuple[int, str, int]], on_device: bool) -> None:
    """Launches are cut by format and, where scalars come from the host, by step count; and by nothing else."""
    made = [
        tensor(n, x_format=x, g_format=x, steps_taken=float(t), step=0x3000 if on_device else None)
        for n, x, t in tensors
    ]
    calls = [c for c in plan(made) if c["kind"] == "sweep"]
    kinds = {(x, None if on_device else t) for n, x, t in tensors}
    alive = {(x, None if on_device else t) for n, x, t in tensors if n > 0}
    assert len(alive) <= len(calls) <= len(kinds)
    assert sum(c["blocks"] for c in calls) == sum(blocks(n) for n, _, _ in tensors)


def formats(*names: str) -> int:
    """Of the operands x, g, m, v and e, as `Formats` in csrc/cuda/launches.h has them."""
    return sum(FORMATS.index(name) << (4 * k) for k, name in enumerate(names))


def test_codes_have_kernels_by_their_formats() -> None:
    """One for weights and averages where moments have 8 bits; one for all others together, and for sums."""
    frequent = formats("Pair32", "BFloat16", "Moment8", "Square8", "Grid8")
    rare = [formats("Pair32", "BFloat16", "Dithered16", "Dithered16", "Grid8")]
    rare += [formats("Float16", "Float16", "Moment8", "Square8", "Grid16")]
    made = [tensor(8192, formats=f) for f in (frequent, *rare, formats(*["Float32"] * 5))] * 2
    calls = plan(made)
    assert sorted((c["kind"], c["known"], c["blocks"]) for c in calls) == sorted(
        [("sweep", False, 4), ("coded", True, 4), ("coded", False, 4), ("coded", False, 4)]
    )
    known = next(c for c in calls if c["known"])
    assert known["formats"][0] == "Pair32" and known["e"] == "Grid8"
    summed = plan([tensor(8192, formats=frequent)], result=0x4000)
    assert [(c["kind"], c["known"]) for c in summed] == [("coded", False), ("sum", False)]
    dithered = plan([tensor(64, formats=formats("Dithered16", "BFloat16", "Moment8", "Square8", "Pair24"))])
    assert [(c["formats"][0], c["e"], c["known"]) for c in dithered] == [("BFloat16", "Pair24", True)]


@pytest.mark.parametrize(
    ("kept", "learn", "group"), [("m v l", 0, 0), ("m v n l last_g", 0, 1), ("m v w", 0, 1), ("m v last_g", 3, 2)]
)
def test_the_groups_of_madas_kernels_of_codes(kept: str, learn: int, group: int) -> None:
    symbols = [operand.symbol for operand in DEFINITIONS["mada_step_"].operands]
    lists = sum(1 << symbols.index(symbol) for symbol in ["x", "g", *kept.split()])
    number = FORMATS.index("Moment8") << 4 * symbols.index("m")
    made = [tensor(64, formats=number), tensor(64, formats=0)]
    calls = PLAN.mada_step_(made, MADA | {"learn": learn}, REQUEST | {"lists": lists}, lambda size: 0x2000)
    found = sorted((c["kind"], c["group"]) for c in calls if c["kind"] in ("coded", "sweep"))
    assert found == [("coded", group), ("sweep", 0)]


@pytest.mark.parametrize("name", ["BFloat16", "Dithered16"])
def test_one_state_in_bfloat16_takes_a_kernel_of_codes(name: str) -> None:
    """Also one that is rounded to the nearest, as plain weights are: other sweeps read states in float32."""
    k = [operand.symbol for operand in DEFINITIONS["mada_step_"].operands].index("w")
    made = [tensor(64, formats=FORMATS.index(name) << 4 * k)]
    *_, call = PLAN.mada_step_(made, MADA, REQUEST, lambda size: 0x2000)
    assert call["kind"] == "coded"


def test_an_average_at_rest_beside_its_weight_is_walked() -> None:
    """Its codes change with the weight; where nothing is in codes such a step walks no memory."""
    options = OPTIONS | {"gain": 0.0, "step_offset": 0, "ema_update_freq": 2}
    e = [operand.symbol for operand in DEFINITIONS["pullback_"].operands].index("e")
    for name, kinds in (("Grid8", ["coded"]), ("Pair24", []), ("Float32", [])):
        made = [tensor(64, formats=FORMATS.index(name) << 4 * e)]
        calls = PLAN.pullback_(made, options, REQUEST | {"lists": 0b1011}, lambda size: 0x2000)
        assert [c["kind"] for c in calls] == kinds


def test_thousands_of_tensors_in_codes_are_few_launches() -> None:
    frequent = formats("Pair32", "BFloat16", "Moment8", "Square8", "Grid8")
    assert [c["blocks"] for c in plan([tensor(4096, formats=frequent)] * 700)] == [333, 333, 34]


def test_step_counts_of_the_host_reach_the_device_by_value() -> None:
    """Where only the gradient's scale is on the device, the scalars are computed there, for each step count."""
    calls = plan([tensor(10, steps_taken=float(t)) for t in (3, 1, 3, 2)], grad_scale=0x5000)
    assert [c["kind"] for c in calls] == ["scalars"] * 3 + ["sweep"]


@pytest.mark.parametrize(("rows", "launches"), [(1, 1), (1024, 1), (1025, 2), (1024**2, 2), (1024**2 + 1, 3)])
def test_levels_of_sums(rows: int, launches: int) -> None:
    calls = plan([tensor(rows * PLAN.CHUNK)], result=0x4000)
    sums = [c for c in calls if c["kind"] == "sum"]
    assert len(sums) == launches and sums[-1]["blocks"] == 1


@pytest.mark.parametrize("order", [(0, 10), (10, 0)])
def test_an_empty_tensor_hides_nothing(order: tuple[int, int]) -> None:
    """It has no addresses, as its operands have not; what is in play is said by the call."""
    (pace,) = plan([tensor(n) for n in order])
    assert pace["flags"] == 0b0111  # moment, pull, average
    *_, mada = PLAN.mada_step_([tensor(n) for n in order], MADA, REQUEST, lambda size: 0x2000)
    assert mada["flags"] == 0b0111110  # diff, second, lion, adam, average


def test_nothing_to_do() -> None:
    assert plan([tensor(0)]) == []
    assert [c["kind"] for c in plan([tensor(0)], result=0x4000)] == ["sum"]
