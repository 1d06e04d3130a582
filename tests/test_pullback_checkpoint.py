"""Promise: a training under Pullback goes on from its checkpoint as if never stopped, bit for bit, through every kind
of checkpoint; what does not fit is refused, and the running optimizer, base and average, stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from pace_cases import gradients
from test_checkpoint import through_a_file
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from pace_kernels import PACE, Pullback

BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


def made(base: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[torch.nn.Module, Pullback]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.Linear(7, 3, bias=False)).to(dtype)
    gain = {"gain": 0.1} if base == "SGD" else {}
    return model, Pullback(BASES[base](model.parameters()), **{"lambda_pullback": 3.0, **gain, **options})


def run(model: torch.nn.Module, optimizer: Pullback, seeds: range) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def contents(model: torch.nn.Module, optimizer: Pullback) -> list[torch.Tensor]:
    found = [p.detach() for p in model.parameters()]
    for p in model.parameters():
        found += [torch.as_tensor(value) for _, value in sorted(optimizer.state[p].items())]
    return [t.clone() for t in found]


def assert_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert len(a) == len(b)
    assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("swapped", [False, True])
def test_it_goes_on_as_if_never_stopped(base: str, dtype: torch.dtype, swapped: bool) -> None:
    model, optimizer = made(base, dtype)
    run(model, optimizer, range(5))
    if swapped:
        optimizer.eval()
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    optimizer.train()
    run(model, optimizer, range(5, 9))
    twin, other = made(base, dtype, lambda_pullback=0.5, pullback_from="step")  # options come from the checkpoint
    run(twin, other, range(20, 22))
    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    other.train()
    run(twin, other, range(5, 9))
    assert_equal(contents(model, optimizer), contents(twin, other))


@pytest.mark.parametrize("base", BASES)
def test_distributed_checkpoint(base: str, tmp_path: Path) -> None:
    model, optimizer = made(base)
    run(model, optimizer, range(4))
    dcp.save({"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path)
    run(model, optimizer, range(4, 8))
    twin, other = made(base)
    state = {"model": twin.state_dict(), "optim": get_optimizer_state_dict(twin, other)}
    dcp.load(state, checkpoint_id=tmp_path)
    set_model_state_dict(twin, state["model"])
    set_optimizer_state_dict(twin, other, state["optim"])
    run(twin, other, range(4, 8))
    assert_equal(contents(model, optimizer), contents(twin, other))


def test_a_dry_run_of_distributed_checkpoint_counts_no_step_of_the_average() -> None:
    model, optimizer = made("SGD")
    get_optimizer_state_dict(model, optimizer)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(2.0)
    run(model, optimizer, range(1))
    for p in model.parameters():
        state = optimizer.state[p]
        assert state["pullback_step"].item() == 1
        # From 2, not from where the dry run was: 2 + w (x − 2) with w = 2^-0.2.
        torch.testing.assert_close(state["ema"], 2.0 + 2**-0.2 * (p.detach() - 2.0))


def test_a_checkpoint_of_the_base_alone_and_for_it() -> None:
    model, optimizer = made("AdamW")
    run(model, optimizer.base, range(3))
    plain = through_a_file(optimizer.base.state_dict())
    twin, other = made("AdamW")
    run(twin, other, range(2))
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(plain)
    assert not any("ema" in state for state in other.state.values())
    run(twin, other, range(1))
    assert all(other.state[p]["pullback_step"].item() == 1 for p in twin.parameters())
    assert all(other.state[p]["step"].item() == 4 for p in twin.parameters())
    alone = torch.optim.AdamW(twin.parameters())
    alone.load_state_dict(other.base.state_dict())
    run(twin, alone, range(1, 2))


def test_what_is_saved() -> None:
    model, optimizer = made("SGD")
    run(model, optimizer, range(1))
    with optimizer.averaged():
        saved = optimizer.state_dict()
    for state in saved["state"].values():
        assert set(state) == {"momentum_buffer", "ema", "pullback_step", "live"}
    assert saved["param_groups"][0]["pullback_gain"] == 0.1
    assert "pullback_gain" not in optimizer.base.state_dict()["param_groups"][0]


def test_overrides_of_groups_come_along() -> None:
    def build() -> tuple[Any, Pullback]:
        p = torch.nn.Parameter(torch.ones(4))
        return p, Pullback(torch.optim.SGD([{"params": [p], "gain": 0.25}], lr=0.1), gain=0.5)

    (p, optimizer), (_, other) = build(), build()
    optimizer.param_groups[0]["gain"] = 0.75
    p.grad = torch.ones(4)
    optimizer.step()
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.param_groups[0]["gain"] == other._own(other.param_groups[0]).values["gain"] == 0.75
    plain = torch.optim.SGD([torch.nn.Parameter(torch.ones(4))], lr=0.2).state_dict()
    other.load_state_dict(plain)
    assert other.param_groups[0]["gain"] == 0.75 and other.param_groups[0]["lr"] == 0.2


def first(saved: dict[str, Any]) -> dict[str, Any]:
    return saved["state"][0]


BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "the checkpoint has 2 parameter groups": lambda s: s["param_groups"].append(dict(s["param_groups"][0])),
    "2 parameters in the checkpoint, 3 here": lambda s: s["param_groups"][0]["params"].pop(),
    r"ema must be a tensor of shape \(7, 9\)": lambda s: first(s).update(ema=torch.ones(3)),
    "has an average without pullback_step": lambda s: first(s).pop("pullback_step"),
    "lacks ema": lambda s: first(s).pop("ema"),
    "step must be one whole number >= 0": lambda s: first(s).update(pullback_step=torch.tensor(-1.0)),
    r"exp_avg_sq has shape \(2,\), expected \(7, 9\)": lambda s: first(s).update(exp_avg_sq=torch.ones(2)),
    "lacks exp_avg_sq, which AdamW keeps": lambda s: first(s).pop("exp_avg_sq"),
    "by a later pace_kernels": lambda s: s["param_groups"][0].update(pullback_format_version=99),
    "lambda_pullback must be finite": lambda s: s["param_groups"][0].update(pullback_lambda_pullback=-1.0),
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_does_not_fit_changes_nothing(message: str) -> None:
    model, optimizer = made("AdamW")
    run(model, optimizer, range(3))
    saved = through_a_file(optimizer.state_dict())
    BROKEN[message](saved)
    before, options = contents(model, optimizer), optimizer._own(optimizer.param_groups[0]).values
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_equal(before, contents(model, optimizer))
    assert options == optimizer._own(optimizer.param_groups[0]).values
    run(model, optimizer, range(3, 4))


def test_a_checkpoint_of_pace_is_refused() -> None:
    model, optimizer = made("AdamW")
    run(model, optimizer, range(1))
    pace = PACE(model.parameters())
    run(model, pace, range(1))
    before = contents(model, optimizer)
    with pytest.raises(ValueError, match="has an average without pullback_step"):
        optimizer.load_state_dict(pace.state_dict())
    assert_equal(before, contents(model, optimizer))


def test_averages_stay_float32_beside_narrow_weights() -> None:
    model, optimizer = made("AdamW", torch.bfloat16)
    run(model, optimizer, range(2))
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    assert {s["ema"].dtype for s in optimizer.state.values()} == {torch.float32}
    assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {torch.bfloat16}


def test_hooks_of_checkpoints_run() -> None:
    model, optimizer = made("SGD")
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("saving"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: calls.append(f"loading {saved['mine']}"))
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    run(model, optimizer, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["saving", "loading 1", "loaded"]


def test_float16_and_many_shapes_survive() -> None:
    from pace_cases import weights

    params = weights(torch.float16)
    optimizer = Pullback(torch.optim.SGD(params, lr=0.1), gain=0.5)
    source = list(gradients(4, torch.float16))
    for grads in source[:2]:
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
    before = [optimizer.state[p]["ema"].clone() for p in params]
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    for p, e in zip(params, before, strict=True):
        assert torch.equal(optimizer.state[p]["ema"], e)


@pytest.mark.parametrize("count", [7, 2**24, 2**24 + 1])
def test_a_count_is_saved_in_the_dtype_that_holds_it(count: int) -> None:
    model, optimizer = made("AdamW")
    run(model, optimizer, range(1))
    for state in optimizer.base.state.values():
        state["pullback_step"] = torch.tensor(float(count), dtype=torch.float64)
    for saved in optimizer.state_dict()["state"].values():
        assert saved["pullback_step"].item() == count
        assert saved["pullback_step"].dtype == (torch.float32 if count <= 2**24 else torch.float64)
    assert all(state["pullback_step"].dtype == torch.float64 for state in optimizer.base.state.values())
