"""Promise: with master_weight_bits=32, bfloat16 parameters are trained as float32 ones, to the last bit."""

from __future__ import annotations

import copy
import hashlib
import io
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from pace_cases import CASES, assert_same_bits, gradients, weights
from test_native import OPTIONS, operands, processor_isas
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from pace_kernels import MADA, PACE, Pullback, ema_state_dict
from pace_kernels.torch_rules.codes import joined, settled, split

BACKENDS = ("cpu", "torch")
LAYOUTS = {
    "contiguous": lambda a: a,
    "transposed": lambda a: a.t().contiguous().t() if a.dim() == 2 else a,
    "every second": lambda a: torch.stack([a, a], dim=-1)[..., 0],
    "odd address": lambda a: torch.cat([a.reshape(-1)[:1].new_zeros(1), a.reshape(-1)])[1:].view(a.shape),
}


def pair(layout: str = "contiguous", **options: Any) -> tuple[PACE, PACE]:
    """An optimizer of bfloat16 parameters with master weights, and one of the same parameters in float32."""
    put = LAYOUTS[layout]
    start = [torch.nn.Parameter(put(p.detach())) for p in weights(torch.bfloat16)]
    options = {"lr": 1e-2, **options}
    return PACE(start, master_weight_bits=32, **options), PACE(
        [torch.nn.Parameter(p.detach().float()) for p in start], **options
    )


def params(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return optimizer.param_groups[0]["params"]


def step(optimizer: PACE, grads: list[torch.Tensor]) -> None:
    for param, grad in zip(params(optimizer), grads, strict=True):
        if hasattr(param, "grad_dtype"):
            param.grad_dtype = None
        param.grad = grad
    optimizer.step()


def whole(optimizer: PACE, param: torch.Tensor) -> torch.Tensor:
    return joined(param.detach(), optimizer.state[param]["remainder"])


def assert_equal(ours: PACE, theirs: PACE) -> None:
    for p, q in zip(params(ours), params(theirs), strict=True):
        x, state, exact = whole(ours, p), dict(ours.state[p]), theirs.state[q]
        assert torch.equal(settled(x), settled(q.detach()))
        assert torch.equal(split(x, 32)[0].nan_to_num(7), p.detach().nan_to_num(7))
        assert state.pop("remainder").dtype == torch.int16 and state.keys() == exact.keys()
        assert all(torch.equal(settled(value), settled(exact[name])) for name, value in state.items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_the_bits_of_float32_parameters(case: str, backend: str) -> None:
    ours, theirs = pair(backend=backend, **CASES[case])
    for grads in gradients(100 if case == "default" else 20, torch.bfloat16):
        step(ours, grads)
        step(theirs, [grad.float() for grad in grads])
    assert_equal(ours, theirs)
    assert any(bool(ours.state[p]["remainder"].any()) for p in params(ours))
    assert ours.get_step_stats() == theirs.get_step_stats() if CASES[case].get("log_stats") else True


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_float32_gradients_and_what_is_not_finite(layout: str, backend: str) -> None:
    ours, theirs = pair(layout, backend=backend)
    for k, grads in enumerate(gradients(10, torch.float32)):
        if k == 4:
            grads[0][:4, 0] = torch.tensor([torch.nan, torch.inf, 1e30, 3e38])
        step(ours, [LAYOUTS[layout](grad) for grad in grads])
        step(theirs, grads)
    assert_equal(ours, theirs)


def test_what_leaves_a_step_undone_and_clipping() -> None:
    ours, theirs = pair(skip_nonfinite=True)
    for k, grads in enumerate(gradients(6, torch.bfloat16)):
        if k == 3:
            grads[1][0] = torch.nan
        for optimizer, dtype in ((ours, torch.bfloat16), (theirs, torch.float32)):
            for param, grad in zip(params(optimizer), grads, strict=True):
                param.grad = grad.to(dtype)
            optimizer.step(clip_coef=0.5)
    assert ours.skipped_steps == theirs.skipped_steps == 1
    assert_equal(ours, theirs)


def test_plans_are_taken_and_end_with_a_remainder_that_is_another() -> None:
    ours, theirs = pair()
    for k, grads in enumerate(gradients(8, torch.bfloat16)):
        plan = ours._plans.next
        assert (plan is None) == (k == 0)
        if k == 3:
            state = ours.state[params(ours)[0]]
            state["remainder"] = state["remainder"].clone()
        if k == 5:
            with ours.averaged():
                pass
        step(ours, grads)
        if k in (2, 7):
            assert ours._plans.next is plan
        step(theirs, [grad.float() for grad in grads])
    assert_equal(ours, theirs)


RUN = """
import hashlib, torch
torch.set_num_threads(2)
from pace_kernels import PACE
p = torch.nn.Parameter(torch.linspace(-1, 1, 100_003).bfloat16())
ours = PACE([p], lr=1e-2, master_weight_bits=32)
for k in range(5):
    p.grad = torch.linspace(3, -2 - k, 100_003).bfloat16()
    ours.step()
both = [p.detach().view(torch.int16).numpy().tobytes(), ours.state[p]["remainder"].numpy().tobytes()]
print(hashlib.sha256(b"".join(both)).hexdigest())
"""


def test_instruction_sets_and_threads() -> None:
    digests = set()
    for isa in processor_isas():
        env = {**os.environ, "PACE_CPU_ISA": isa}
        done = subprocess.run([sys.executable, "-c", RUN], env=env, capture_output=True, text=True, check=True)
        digests.add(done.stdout)
    theirs = PACE([torch.nn.Parameter(torch.linspace(-1, 1, 100_003).bfloat16().float())], lr=1e-2)
    for k in range(5):
        step(theirs, [torch.linspace(3, -2 - k, 100_003).bfloat16().float()])
    high, rest = split(params(theirs)[0].detach(), 32)
    digests.add(hashlib.sha256(high.view(torch.int16).numpy().tobytes() + rest.numpy().tobytes()).hexdigest() + "\n")
    assert len(digests) == 1


# ---- averages, edits, checkpoints ------------------------------------------------------------------------------------


def trained(steps: int = 5, **options: Any) -> PACE:
    ours, _ = pair(**options)
    for grads in gradients(steps, torch.bfloat16):
        step(ours, grads)
    return ours


def test_evaluation_brings_all_bits_back() -> None:
    ours = trained()
    before = [(p.detach().clone(), whole(ours, p)) for p in params(ours)]
    with ours.averaged():
        for p in params(ours):
            assert torch.equal(p, ours.state[p]["ema"].bfloat16())
        with pytest.raises(RuntimeError, match="swapped"):
            ours.step()
    for p, (high, x) in zip(params(ours), before, strict=True):
        assert torch.equal(p, high) and torch.equal(whole(ours, p), x)


def test_weights_loaded_during_an_evaluation_have_no_remainder() -> None:
    ours = trained()
    ours.eval()
    with torch.no_grad():
        params(ours)[0].fill_(0.5)
    ours.train(keep="loaded")
    first, second, *_ = params(ours)
    assert bool((whole(ours, first) == 0.5).all()) and bool(ours.state[second]["remainder"].any())


def test_an_average_that_starts_anew_starts_at_the_whole_weights() -> None:
    ours = trained(use_ema_eval=False, lambda_pullback=0.0)
    before = [whole(ours, p) for p in params(ours)]
    ours.param_groups[0].update(use_ema_eval=True, ema_kappa=None, beta_ema=0.0)
    step(ours, [torch.ones_like(p) for p in params(ours)])
    assert all(torch.equal(ours.state[p]["ema"], x) for p, x in zip(params(ours), before, strict=True))


def test_weights_that_others_write_are_off_by_half_a_place_at_most() -> None:
    ours = trained()
    for k, value in enumerate((0.0, -0.0, 1.0, -3.0, 1e-38)):
        for p in params(ours):
            p.data.fill_(value)
            ours.state[p]["remainder"].fill_((-1) ** k * 32767)
            x = whole(ours, p)
            assert bool(((x - value).abs() <= max(abs(value) * 2**-7, 2.0**-126)).all())
    step(ours, [torch.zeros_like(p) for p in params(ours)])
    assert all(bool(p.isfinite().all()) for p in params(ours))


def test_the_option_comes_and_goes() -> None:
    ours = trained()
    ours.param_groups[0]["master_weight_bits"] = None
    step(ours, [torch.ones_like(p) for p in params(ours)])
    assert not any("remainder" in ours.state[p] for p in params(ours))
    ours.param_groups[0]["master_weight_bits"] = 32
    step(ours, [torch.ones_like(p) for p in params(ours)])
    assert all("remainder" in ours.state[p] for p in params(ours))
    ours.param_groups[0]["master_weight_bits"] = 24
    step(ours, [torch.ones_like(p) for p in params(ours)])
    assert all(ours.state[p]["remainder"].dtype == torch.int8 for p in params(ours))
    ours.param_groups[0]["master_weight_bits"] = 16
    with pytest.raises(ValueError, match="master_weight_bits must be one of None, 24, 32, got 16"):
        ours.step()


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize("way", ("file", "deepcopy", "distributed", "flat"))
def test_checkpoints_go_on_with_the_same_bits(way: str) -> None:
    model = torch.nn.Linear(7, 5).bfloat16()
    first = PACE(model.parameters(), lr=1e-2, master_weight_bits=32)
    grads = [[torch.randn_like(p) for p in model.parameters()] for _ in range(4)]
    for k in (0, 1):
        step(first, grads[k])
    first.zero_grad()
    other = copy.deepcopy(model)
    second = PACE(other.parameters(), lr=1e-2, master_weight_bits=32)
    if way in ("file", "deepcopy"):
        second.load_state_dict((through_a_file if way == "file" else copy.deepcopy)(first.state_dict()))
    else:
        options = StateDictOptions(flatten_optimizer_state_dict=way == "flat")
        saved = through_a_file(get_optimizer_state_dict(model, first, options=options))
        set_optimizer_state_dict(other, second, saved, options=options)
    for optimizer in (first, second):
        assert all(bool(optimizer.state[p]["remainder"].any()) for p in params(optimizer))
        for k in (2, 3):
            step(optimizer, grads[k])
    assert_same_bits((params(first), first), (params(second), second))


def test_checkpoints_of_other_formats() -> None:
    ours = trained()
    plain = PACE([p.detach().clone() for p in params(ours)], lr=1e-2)
    plain.load_state_dict(ours.state_dict())
    assert plain.param_groups[0].get("master_weight_bits") is None
    assert not any("remainder" in state for state in plain.state.values())
    again = PACE([p.detach().clone() for p in params(ours)], lr=1e-2, master_weight_bits=32)
    again.load_state_dict(plain.state_dict())
    assert again.param_groups[0]["master_weight_bits"] == 32
    for optimizer in (plain, again):
        step(optimizer, [torch.ones_like(p) for p in params(optimizer)])
    mada = MADA([p.detach().clone() for p in params(ours)])
    mada.load_state_dict(ours.state_dict())
    assert not any("remainder" in state for state in mada.state.values())
    saved = copy.deepcopy(ours.state_dict())
    saved["state"][0]["remainder"] = saved["state"][0]["remainder"].bfloat16()
    before = copy.deepcopy(again.state_dict())
    with pytest.raises(
        ValueError, match=r"remainder must be dense, of torch\.int16 or torch\.int8, got torch\.bfloat16"
    ):
        again.load_state_dict(saved)
    assert str(again.state_dict()) == str(before)


def test_exports_and_copies() -> None:
    model = torch.nn.Linear(7, 5).bfloat16()
    ours = PACE(model.parameters(), lr=1e-2, master_weight_bits=32)
    step(ours, [torch.randn_like(p) for p in model.parameters()])
    exported = ema_state_dict(model, ours)
    assert torch.equal(exported["weight"], ours.state[model.weight]["ema"].bfloat16())
    twin = copy.deepcopy(ours)
    for p, q in zip(params(ours), params(twin), strict=True):
        assert torch.equal(ours.state[p]["remainder"], twin.state[q]["remainder"])


# ---- refusals --------------------------------------------------------------------------------------------------------


def parameter(dtype: torch.dtype = torch.bfloat16) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("bits", (16, 8, "32", 32.0, True))
def test_other_bits_are_refused(bits: Any) -> None:
    with pytest.raises(ValueError, match=f"master_weight_bits must be one of None, 24, 32, got {bits!r}"):
        PACE([parameter()], master_weight_bits=bits)


@pytest.mark.parametrize("dtype", (torch.float16, torch.float64))
def test_other_parameters_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(
        ValueError, match=f"is {dtype}: master_weight_bits is for torch.bfloat16, .*master_weight_bits=None"
    ):
        PACE([parameter(), parameter(dtype)], master_weight_bits=32)
    ours = PACE([parameter()], master_weight_bits=32)
    with pytest.raises(ValueError, match=f"is {dtype}"):
        ours.add_param_group({"params": [parameter(dtype)]})
    assert len(ours.param_groups) == 1
    (p,) = params(ours)
    step(ours, [torch.ones_like(p)])
    p.data = p.data.to(dtype)  # behind its back
    p.grad = torch.ones_like(p)
    before, state = p.detach().clone(), copy.deepcopy(ours.state[p])
    with pytest.raises(RuntimeError, match=f"is {dtype}"):
        ours.step()
    assert torch.equal(p, before) and all(torch.equal(state[k], ours.state[p][k]) for k in state)


def test_a_pullback_refuses_it() -> None:
    with pytest.raises(TypeError, match="master_weight_bits"):
        Pullback(torch.optim.SGD([parameter()], lr=0.1), master_weight_bits=32)
    with pytest.raises(ValueError, match=r"param_groups\[0\] has master_weight_bits, and neither Pullback nor SGD has"):
        Pullback(torch.optim.SGD([{"params": [parameter()], "master_weight_bits": 32}], lr=0.1))


def test_tied_memory() -> None:
    one = torch.ones(3, dtype=torch.bfloat16)
    twins = PACE([torch.nn.Parameter(one), torch.nn.Parameter(one)], master_weight_bits=32)
    with pytest.raises(RuntimeError, match="two parameters share one memory"):
        step(twins, [torch.ones(3).bfloat16()] * 2)
    assert bool((one == 1).all()) and not twins.state


def call() -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
    lists = [list(entry) for entry in operands()]
    lists[0], lists[1] = ([a.detach().bfloat16() for a in entry] for entry in lists[:2])
    return lists, [torch.zeros_like(p, dtype=torch.int16) for p in lists[0]]


@pytest.mark.parametrize(
    ("first", "message"),
    (
        (lambda p: torch.zeros_like(p), r"remainders\[0\] must be int16"),
        (lambda p: torch.zeros(2, dtype=torch.int16), r"remainders\[0\] has shape \(2\), its parameter has"),
        (lambda p: torch.zeros(1, dtype=torch.int16).expand(p.shape), r"remainders\[0\] overlaps itself"),
    ),
)
def test_the_operator_refuses_what_does_not_fit(first: Any, message: str) -> None:
    lists, wrong = call()
    wrong[0] = first(lists[0][0])
    before = [p.clone() for p in lists[0]]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pace_kernels.pace_step_(*lists, None, remainders=wrong, **OPTIONS)
    with pytest.raises(RuntimeError, match="remainders has 1 tensors, params has"):
        torch.ops.pace_kernels.pace_step_(*lists, None, remainders=wrong[1:2], **OPTIONS)
    assert all(map(torch.equal, lists[0], before))


def test_opcheck() -> None:
    lists, rest = call()
    torch.library.opcheck(torch.ops.pace_kernels.pace_step_.default, (*lists, None), {"remainders": rest, **OPTIONS})
