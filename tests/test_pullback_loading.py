"""Promise: averages get through every kind of checkpoint to the same bits, in float32, whoever loads it: Pullback, its
base, torch.distributed.checkpoint; of version 0.1.0 too; and what lost them on its way is refused."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from data import checkpoint, make_pullback
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import pace_kernels
from pace_kernels import Pullback

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
OURS = ("ema", "pullback_step")


class OwnLoading(torch.optim.SGD):
    """It loads as bitsandbytes does: no hooks run, all values of a state are taken for tensors and cast."""

    def load_state_dict(self, state_dict: Any) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        state: Any = defaultdict(dict)
        for key, param in zip(keys, params, strict=True):
            if key in state_dict["state"]:
                cast = {k: v.to(param.dtype, copy=True) for k, v in state_dict["state"][key].items()}
                assert cast.keys() <= {"momentum_buffer"}
                state[param] = cast
        groups = copy.deepcopy(state_dict["param_groups"])
        for group, now in zip(groups, self.param_groups, strict=True):
            group["params"] = now["params"]
        self.__setstate__({"state": state, "param_groups": groups})


class OwnSetting(torch.optim.SGD):
    """It walks over all values of its states when they are put in place."""

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        for values in self.state.values():
            for value in values.values():
                assert value.isfinite().all()


BASES: dict[str, Callable[[Any], Pullback]] = {
    "AdamW": lambda p: Pullback(torch.optim.AdamW(p, lr=0.01), 3.0),
    "AdamW, fused": lambda p: Pullback(torch.optim.AdamW(p, lr=0.01, fused=True), 3.0),
    "SGD": lambda p: Pullback(torch.optim.SGD(p, lr=0.1), gain=0.25),
    "SGD with momentum": lambda p: Pullback(torch.optim.SGD(p, lr=0.1, momentum=0.9), gain=0.25, pullback_from="step"),
    "an average alone": lambda p: Pullback(torch.optim.SGD(p, lr=0.1), 0.0),
    "one that loads itself": lambda p: Pullback(OwnLoading(p, lr=0.1, momentum=0.9), gain=0.25),
    "one that loads itself, without states": lambda p: Pullback(OwnLoading(p, lr=0.1), gain=0.25),
    "one that sets itself": lambda p: Pullback(OwnSetting(p, lr=0.1, momentum=0.9), gain=0.25),
}
OF_TORCH = [base for base in BASES if "itself" not in base]


def made(base: str, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Linear, Pullback]:
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3).to(dtype)
    return model, BASES[base](model.parameters())


def run(model: torch.nn.Module, optimizer: Any, seeds: range) -> None:
    for seed in seeds:
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * seed + i)).to(p.dtype)
        optimizer.step()
        optimizer.zero_grad()


def values(model: torch.nn.Module, optimizer: Any) -> list[dict[str, Any]]:
    return [
        {"param": p.detach().clone(), **{k: copy.deepcopy(v) for k, v in optimizer.state.get(p, {}).items()}}
        for p in model.parameters()
    ]


def assert_same(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


# ---- the cast ----


def by_itself(model: Any, optimizer: Pullback, other_model: Any, other: Pullback) -> None:
    other.load_state_dict(optimizer.state_dict())


def by_the_base(model: Any, optimizer: Pullback, other_model: Any, other: Pullback) -> None:
    other.base.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch takes tensors as they are


def from_base_to_base(model: Any, optimizer: Pullback, other_model: Any, other: Pullback) -> None:
    other.base.load_state_dict(copy.deepcopy(optimizer.base.state_dict()))


def by_dcp(model: Any, optimizer: Pullback, other_model: Any, other: Pullback) -> None:
    set_optimizer_state_dict(other_model, other, get_optimizer_state_dict(model, optimizer))


def by_dcp_flat(model: Any, optimizer: Pullback, other_model: Any, other: Pullback) -> None:
    set_optimizer_state_dict(other_model, other, get_optimizer_state_dict(model, optimizer, options=FLAT), options=FLAT)


def by_dcp_to_the_base(model: Any, optimizer: Pullback, other_model: Any, other: Pullback) -> None:
    run(other_model, other, range(90, 91))  # so that the base has states
    other_model.load_state_dict(model.state_dict())
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer.base))
    set_optimizer_state_dict(other_model, other.base, saved)


def by_accelerate(model: Any, optimizer: Pullback, other_model: Any, other: Pullback) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.prepare(other).load_state_dict(accelerator.prepare(optimizer).state_dict())


WAYS = [by_itself, by_the_base, from_base_to_base, by_dcp, by_dcp_flat, by_dcp_to_the_base, by_accelerate]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base", BASES)
def test_averages_and_counts_arrive_as_they_were(base: str, way: Callable[..., None], dtype: torch.dtype) -> None:
    """300 steps: bfloat16 counts to 256."""
    if "loads itself" in base and way in (by_the_base, from_base_to_base, by_dcp_to_the_base):
        pytest.skip("such a base knows nothing of averages")
    if base == "one that sets itself" and way in (by_the_base, from_base_to_base, by_dcp_to_the_base):
        pytest.skip("such a base looks at everything that it is given")
    model, optimizer = made(base, dtype)
    run(model, optimizer, range(300))
    wanted = values(model, optimizer)
    other_model, other = made(base, dtype)
    other_model.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        way(model, optimizer, other_model, other)
    found = values(other_model, other)
    assert {one["ema"].dtype for one in found} == {torch.float32}
    assert {float(one["pullback_step"]) for one in found} == {300.0}
    assert_same(found, wanted)
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        assert optimizer.state[p]["ema"].data_ptr() != other.state[q]["ema"].data_ptr()
    run(model, optimizer, range(300, 303))
    run(other_model, other, range(300, 303))
    assert_same(values(other_model, other), values(model, optimizer))


@pytest.mark.parametrize("base", OF_TORCH)
@pytest.mark.parametrize("way", [by_itself, by_the_base, from_base_to_base, by_dcp])
def test_swapped_it_comes_back_swapped(base: str, way: Callable[..., None]) -> None:
    model, optimizer = made(base, torch.bfloat16)
    run(model, optimizer, range(5))
    live = values(model, optimizer)
    other_model, other = made(base, torch.bfloat16)
    with optimizer.averaged():
        way(model, optimizer, other_model, other)
        other_model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="swapped"):
        run(other_model, other, range(1))
    other.train()
    assert_same(values(other_model, other), live)


@pytest.mark.parametrize("way", [by_itself, by_the_base, from_base_to_base])
def test_loaded_while_swapped_the_weights_are_live_again(way: Callable[..., None]) -> None:
    model, optimizer = made("AdamW")
    run(model, optimizer, range(3))
    other_model, other = made("AdamW")
    run(other_model, other, range(10, 14))
    live = [p.detach().clone() for p in other_model.parameters()]
    other.eval()
    way(model, optimizer, other_model, other)
    assert all(torch.equal(p, x) for p, x in zip(other_model.parameters(), live, strict=True))
    run(other_model, other, range(4, 5))


def test_hooks_of_the_base_may_give_states_other_keys() -> None:
    """As in torch's recipe for parameters that are in another order."""
    model, optimizer = made("AdamW")
    run(model, optimizer, range(3))
    other = Pullback(torch.optim.AdamW([model.bias, model.weight], lr=0.01), 3.0)

    def reorder(_: Any, loaded: dict[str, Any]) -> dict[str, Any]:
        return {**loaded, "state": {0: loaded["state"][1], 1: loaded["state"][0]}}

    other.register_load_state_dict_pre_hook(reorder)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(values(model, other), values(model, optimizer))
    bare = Pullback(torch.optim.SGD([torch.nn.Parameter(torch.ones(2)) for _ in range(2)], lr=1.0), gain=0.5)
    for i, p in enumerate(bare.param_groups[0]["params"]):
        p.grad = torch.full((2,), float(i))
    bare.step()
    averages = [bare.state[p]["ema"].clone() for p in bare.param_groups[0]["params"]]
    bare.base.register_load_state_dict_pre_hook(reorder)
    bare.load_state_dict(copy.deepcopy(bare.state_dict()))
    assert [bare.state[p]["ema"].tolist() for p in bare.param_groups[0]["params"]] == [
        average.tolist() for average in reversed(averages)
    ]


def test_a_base_that_rounded_averages_is_told_of() -> None:
    model, optimizer = made("SGD with momentum", torch.bfloat16)
    run(model, optimizer, range(3))
    for p in model.parameters():
        for name in OURS:
            optimizer.state[p][name] = optimizer.state[p][name].bfloat16()
    with pytest.warns(UserWarning, match="rounded it"):
        run(model, optimizer, range(3, 4))
    assert {optimizer.state[p][name].dtype for p in model.parameters() for name in OURS} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_around_bitsandbytes(dtype: torch.dtype) -> None:
    """Its step asks ``len(state) == 0``; it saves its states in a form of its own, and loads by code of its own."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def build() -> tuple[torch.nn.Linear, Pullback]:
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64).to(dtype)
        base = bitsandbytes.optim.AdamW(model.parameters(), lr=0.01)
        return model, Pullback(base, 3.0, second_moment="state2")

    model, optimizer = build()
    try:
        run(model, optimizer, range(300))
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"bitsandbytes has no such step here: {error}")
    other_model, other = build()
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(values(other_model, other), values(model, optimizer))
    run(model, optimizer, range(300, 303))
    run(other_model, other, range(300, 303))
    assert_same(values(other_model, other), values(model, optimizer))


# ---- what lost its averages on its way ----


def flattened(base: str, swapped: bool = False) -> Any:
    model, optimizer = made(base)
    run(model, optimizer, range(3))
    if swapped:
        optimizer.eval()
    return copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=FLAT))


@pytest.mark.parametrize("base", OF_TORCH)
def test_gradients_that_were_there_when_a_flat_checkpoint_was_loaded(base: str) -> None:
    """torch then makes no states first, and takes from the file only what there are places for: nothing."""
    flat = flattened(base)
    model, optimizer = made(base)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="its averages are missing"):
        set_optimizer_state_dict(model, optimizer, flat, options=FLAT)
    assert not any(optimizer.state.values())


def test_a_base_that_had_stepped_when_a_flat_checkpoint_was_loaded() -> None:
    flat = flattened("AdamW")
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    run(model, base, range(1))
    optimizer = Pullback(base, 3.0)
    with pytest.raises(ValueError, match="its averages are missing"):
        set_optimizer_state_dict(model, optimizer, flat, options=FLAT)


@pytest.mark.parametrize("base", OF_TORCH)
def test_a_flat_checkpoint_loses_live_weights(base: str) -> None:
    model, optimizer = made(base)
    with pytest.raises(ValueError, match=r"saved between eval\(\) and train\(\)"):
        set_optimizer_state_dict(model, optimizer, flattened(base, swapped=True), options=FLAT)


def test_flat_checkpoints_through_files(tmp_path: Path) -> None:
    model, optimizer = made("AdamW", torch.bfloat16)
    run(model, optimizer, range(4))
    flat = get_optimizer_state_dict(model, optimizer, options=FLAT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(flat, checkpoint_id=tmp_path)
        other_model, other = made("AdamW", torch.bfloat16)
        other_model.load_state_dict(model.state_dict())
        place = get_optimizer_state_dict(other_model, other, options=FLAT)
        dcp.load(place, checkpoint_id=tmp_path)
    set_optimizer_state_dict(other_model, other, place, options=FLAT)
    assert_same(values(other_model, other), values(model, optimizer))


def test_a_checkpoint_before_the_first_step_is_a_start() -> None:
    model, optimizer = made("AdamW")
    run(model, optimizer.base, range(3))
    for other in (made("AdamW")[1], optimizer):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        other.base.load_state_dict(copy.deepcopy(optimizer.base.state_dict()))
        assert not any("ema" in state for state in other.state.values())
    run(model, optimizer, range(3, 4))
    assert all(float(state["pullback_step"]) == 1 for state in optimizer.state.values())


# ---- names, hooks, other things that torch allows ----


@pytest.mark.parametrize("base", OF_TORCH)
def test_names_come_along(base: str) -> None:
    w = torch.nn.Parameter(torch.ones(3))
    named, plain = BASES[base]([("w", w)]), BASES[base]([w])
    w.grad = torch.ones(3)
    named.step()
    plain.load_state_dict(copy.deepcopy(named.state_dict()))
    assert plain.param_groups[0]["param_names"] == ["w"]
    v = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="with/without names"):
        plain.add_param_group({"params": [v]})
    plain.add_param_group({"params": [("v", v)]})
    v.grad = torch.ones(2)
    plain.step()
    assert [float(plain.state[p]["pullback_step"]) for p in (w, v)] == [2.0, 1.0]


def test_options_of_groups_come_back_as_they_were_saved() -> None:
    def build(**options: Any) -> Pullback:
        params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
        groups = [{"params": [params[0]]}, {"params": [params[1]], "ema_update_freq": 3}]
        return Pullback(torch.optim.AdamW(groups), **options)

    saved = build(lambda_pullback=2.0, ema_kappa=None).state_dict()
    other = build(pullback_from="step")
    other.load_state_dict(saved)
    values = [other._own(group).values for group in other.param_groups]
    assert [v["lambda_pullback"] for v in values] == [2.0, 2.0] and values[0]["ema_kappa"] is None
    assert [v["ema_update_freq"] for v in values] == [1, 3]
    # Of version 0.1.0: a group whose options differ, though it has none of its own.
    saved["param_groups"][1]["pullback_lambda_pullback"] = 0.5
    other.load_state_dict(saved)
    assert [other._own(g).values["lambda_pullback"] for g in other.param_groups] == [2.0, 0.5]


# ---- by a bare base ----


@pytest.mark.parametrize("swapped", (False, True))
@pytest.mark.parametrize("momentum", (0.0, 0.9))
@pytest.mark.parametrize("ema_bits", (8, 16, 24))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_codes_that_a_bare_base_cast_start_anew_or_are_loaded_again(
    dtype: torch.dtype, ema_bits: Any, momentum: float, swapped: bool
) -> None:
    def step(optimizer: Pullback, seed: int) -> None:
        gen = torch.Generator().manual_seed(seed)
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.randn(p.shape, generator=gen).to(dtype)
        optimizer.step()

    params = [torch.nn.Parameter(torch.ones(64, 64, dtype=dtype)), torch.nn.Parameter(torch.ones(3, dtype=dtype))]
    optimizer = Pullback(torch.optim.SGD(params, lr=0.1, momentum=momentum), gain=0.05, ema_bits=ema_bits)
    for seed in range(4):
        step(optimizer, seed)
    if swapped:
        optimizer.eval()
    saved = copy.deepcopy(optimizer.base.state_dict())
    others = copy.deepcopy(params)
    optimizer.train()
    base = torch.optim.SGD(others, lr=0.1, momentum=momentum)
    base.load_state_dict(saved)
    match = r"\['params'\]\[0\] has .* in torch.*cast the codes.*start anew at the weights.*load the checkpoint again"
    with pytest.warns(UserWarning, match=match):
        other = Pullback(base, gain=0.05, ema_bits=ema_bits)
    anew = copy.deepcopy(other)
    anew.train()
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the plain averages beside: rounded, not in codes
            step(anew, 4)
        with anew.averaged():
            pass
        anew.load_state_dict(anew.state_dict())
    assert float(anew.state[anew.param_groups[0]["params"][0]]["pullback_step"]) == (6 if swapped else 2)
    other.load_state_dict(saved)
    other.train()
    for o in (optimizer, other):
        step(o, 4)
        o.eval()
    for p, same in zip(params, others, strict=True):
        assert torch.equal(p, same)


# ---- of version 0.1.0 ----


@pytest.mark.parametrize("dtype", make_pullback.DTYPES, ids=str)
@pytest.mark.parametrize("case", make_pullback.CASES)
def test_checkpoints_of_0_1_0_go_on_to_the_same_weights(case: str, dtype: torch.dtype) -> None:
    """The averages rest in the steps that follow. A base's own roundings depend on the processor: after three steps the
    weights are within 3 of 4 roundings each."""
    file = torch.load(checkpoint(f"pullback-{case}.pt"), weights_only=True)[str(dtype)]
    model = make_pullback.model_of(dtype)
    optimizer = make_pullback.optimizer_of(pace_kernels, case, model)
    model.load_state_dict(file["saved"]["model"])
    flat = make_pullback.CASES[case][-1] == "flat"
    saved = file["saved"]["optimizer"]
    if flat:
        set_optimizer_state_dict(model, optimizer, saved, options=FLAT)
    else:
        optimizer.load_state_dict(saved)
    for p, average in zip(model.parameters(), file["averages"], strict=True):
        assert optimizer.state[p]["ema"].dtype is torch.float32
        assert torch.equal(optimizer.state[p]["ema"], average)
        assert float(optimizer.state[p]["pullback_step"]) == 4
    optimizer.train()
    make_pullback.train(model, optimizer, range(4, 7))
    for name, p in model.state_dict().items():
        unit = 2.0**-24 if dtype is torch.float32 else 2.0**-8
        bound = 3 * 4 * unit * float(file["ends"][name].abs().max())
        torch.testing.assert_close(p, file["ends"][name], rtol=0, atol=bound)
    for p, average in zip(model.parameters(), file["averages"], strict=True):
        assert torch.equal(optimizer.state[p]["ema"], average)
