"""Promise: a training that is saved and loaded goes on bit for bit, and foreign checkpoints load for what they are."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from pace_kernels import MADA, PACE

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def model_of(dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.Linear(5, 2)).to(dtype)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range, flip: bool = False) -> None:
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = -grad if flip else grad
        optimizer.step()


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(a: torch.nn.Module, oa: Any, b: torch.nn.Module, ob: Any) -> None:
    """Of MADA its coefficients too, and what they are learned by."""
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
        assert oa.state[p].keys() == ob.state[q].keys()
        for key, value in oa.state[p].items():
            other = ob.state[q][key]
            assert torch.equal(value, other) and value.dtype == other.dtype and value.device == other.device, key
    if isinstance(oa, MADA):
        assert oa.coefficients == ob.coefficients and oa.hypergradients == ob.hypergradients
        for ga, gb in zip(oa.param_groups, ob.param_groups, strict=True):
            for name in ("coefficient_momenta", "hyper_step"):
                assert ga[name] is gb[name] is None or torch.equal(ga[name], gb[name])


INSIDE = {"beta3": 0.4, "rho": 0.35, "c": 0.6, "gamma": 0.7, "lr": 1e-2, "hyper_warmup": 2}


def groups_of(model: torch.nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model[0].parameters())}, {"params": list(model[1].parameters()), "lr": 3e-3}]


def shared(optimizer: MADA) -> bool:
    first, *others = optimizer.param_groups
    return all(g["coefficient_values"] is first["coefficient_values"] for g in others)


LEARNING = {**INSIDE, "use_ema_eval": True, "hyper_momentum": 0.3}
KINDS: dict[str, Any] = {
    "PACE": lambda model, **o: PACE(model.parameters(), **{"lr": 1e-2, **o}),
    "MADA": lambda model, **o: MADA(groups_of(model), **{**LEARNING, **o}),
    "MADA by groups": lambda model, **o: MADA(groups_of(model), coefficients="group", **{**LEARNING, **o}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def goes_on_as(model: torch.nn.Module, optimizer: Any, other: torch.nn.Module, resumed: Any, steps: range) -> None:
    """The two are the same, and stay it."""
    assert_same(model, optimizer, other, resumed)
    train(model, optimizer, steps)
    train(other, resumed, steps)
    assert_same(model, optimizer, other, resumed)


def resume(
    saved_model: dict[str, Any], saved: dict[str, Any], dtype: torch.dtype, kind: str = "PACE", **options: Any
) -> tuple[Any, Any]:
    model = model_of(dtype, seed=9)
    optimizer = KINDS[kind](model, **options)
    optimizer.load_state_dict(saved)
    model.load_state_dict(saved_model)
    return model, optimizer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"betas": (0.0, 0.9)}, {"lambda_pullback": 0, "use_ema_eval": False}], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_save_load_go_on(dtype: torch.dtype, options: dict[str, Any], memory_format: torch.memory_format) -> None:
    model = model_of(dtype).to(memory_format=memory_format)
    optimizer = PACE(model.parameters(), lr=1e-2, **options)
    train(model, optimizer, range(4))
    other, resumed = resume(*through_a_file([model.state_dict(), optimizer.state_dict()]), dtype, lr=5.0)
    assert resumed.param_groups[0]["lr"] == 1e-2
    goes_on_as(model, optimizer, other, resumed, range(4, 7))


@every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_saved_swapped", [True, False])
def test_saved_while_swapped(dtype: torch.dtype, model_saved_swapped: bool, kind: str) -> None:
    model = model_of(dtype)
    optimizer = KINDS[kind](model)
    train(model, optimizer, range(4))
    live = copy.deepcopy(model.state_dict())
    optimizer.eval()
    average = copy.deepcopy(model.state_dict())
    saved = through_a_file([average if model_saved_swapped else live, optimizer.state_dict()])
    other, resumed = resume(*saved, dtype, kind, lr=5.0)
    assert kind == "PACE" or shared(resumed) == (kind == "MADA")
    with pytest.raises(RuntimeError, match="weights are swapped in"):
        resumed.step()
    optimizer.train()
    resumed.train()
    goes_on_as(model, optimizer, other, resumed, range(4, 7))
    with resumed.averaged(), optimizer.averaged():
        assert_same(model, optimizer, other, resumed)


def test_saved_while_swapped_by_a_helper_that_drops_the_live_weights() -> None:
    """Flattened distributed checkpoints keep only what a fresh optimizer has: not `live`. That is said, instead of
    going on from the average."""
    model = model_of()
    optimizer = PACE(model.parameters())
    train(model, optimizer, range(3))
    optimizer.eval()
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = get_optimizer_state_dict(model, optimizer, options=flat)
    other = model_of()
    with pytest.raises(ValueError, match=r"saved between eval\(\) and train\(\)"):
        set_optimizer_state_dict(other, PACE(other.parameters()), saved, options=flat)
    optimizer.train()
    saved = get_optimizer_state_dict(model, optimizer, options=flat)
    resumed = PACE(other.parameters())
    set_optimizer_state_dict(other, resumed, saved, options=flat)
    other.load_state_dict(model.state_dict())
    assert_same(model, optimizer, other, resumed)


def test_states_stay_float32_although_torch_casts_them() -> None:
    model = model_of(torch.bfloat16)
    optimizer = PACE(model.parameters())
    train(model, optimizer, range(3))
    _, resumed = resume(model.state_dict(), optimizer.state_dict(), torch.bfloat16)
    for state in resumed.state.values():
        assert {v.dtype for v in state.values()} == {torch.float32}
    first, second = next(iter(optimizer.state.values())), next(iter(resumed.state.values()))
    assert not torch.equal(first["ema"], first["ema"].bfloat16().float())  # a cast would have lost bits
    assert torch.equal(first["ema"], second["ema"])
    assert first["ema"].data_ptr() != second["ema"].data_ptr()


def test_a_checkpoint_moves_between_dtypes() -> None:
    model = model_of()
    optimizer = PACE(model.parameters())
    train(model, optimizer, range(3))
    other = model_of(torch.float64)
    resumed = PACE(other.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert resumed.state[q]["exp_avg"].dtype == torch.float64
        assert torch.equal(resumed.state[q]["exp_avg"].float(), optimizer.state[p]["exp_avg"])


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("how", [{"foreach": True}, {"fused": True}, {"capturable": False}], ids=str)
def test_an_adamw_checkpoint_loads(kind: type[torch.optim.Optimizer], how: dict[str, Any]) -> None:
    model = model_of()
    adamw = kind(model.parameters(), lr=3e-3, betas=(0.8, 0.95), weight_decay=0.0, **how)
    train(model, adamw, range(5))
    other, resumed = resume(model.state_dict(), through_a_file(adamw.state_dict()), torch.float32, lambda_pullback=0.3)
    group = resumed.param_groups[0]
    assert (group["lr"], group["betas"], group["lambda_pullback"]) == (3e-3, (0.8, 0.95), 0.3)
    assert not {"amsgrad", "foreach", "fused"} & group.keys()
    before = [p.detach().clone() for p in other.parameters()]
    train(other, resumed, range(5, 6))
    for p, q, start in zip(model.parameters(), other.parameters(), before, strict=True):
        state = resumed.state[q]
        assert state["step"].item() == 6
        # The average started at the weights, so that this first step had nothing to pull: it is AdamW's.
        weight = (1 + 6) ** -0.2  # w_t at t = 6
        torch.testing.assert_close(state["ema"], (1 - weight) * start + weight * q.detach(), rtol=1e-6, atol=1e-7)
        assert adamw.state[p]["step"].item() == 5
    train(model, adamw, range(5, 6))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2**-20, atol=2**-22)


def test_what_cannot_carry_over_from_adam_is_said() -> None:
    model = model_of()
    adam = torch.optim.Adam(model.parameters(), weight_decay=0.1, amsgrad=True)
    train(model, adam, range(2))
    with pytest.warns(UserWarning) as said:
        PACE(model.parameters()).load_state_dict(adam.state_dict())
    text = " ".join(str(w.message) for w in said)
    assert "weight_decay 0.1 was Adam's" in text and "AMSGrad" in text


def published(model: torch.nn.Module, optimizer: PACE, live: list[torch.Tensor]) -> dict[str, Any]:
    """The same state under the names of the published optimizer."""
    state = optimizer.state_dict()
    for k, weights in enumerate(live):
        own = state["state"][k]
        state["state"][k] = {
            "step": int(own["step"]), "m": own["exp_avg"], "v": own["exp_avg_sq"], "ema": own["ema"],
            "theta": weights, "last_ema_step": int(own["step"]),
        }  # fmt: skip
    for group in state["param_groups"]:
        for ours in ("pullback_from", "maximize", "capturable"):
            del group[ours]
    return state


@pytest.mark.parametrize("swapped", [False, True])
def test_a_checkpoint_of_the_published_pace_loads(swapped: bool) -> None:
    model = model_of()
    optimizer = PACE(model.parameters(), lr=1e-2)
    train(model, optimizer, range(4))
    live = [p.detach().clone() for p in model.parameters()]
    theirs = through_a_file(published(model, optimizer, live))
    other = model_of(seed=5)
    if swapped:  # they save the average as the model, and the weights as theta
        other.load_state_dict(optimizer.ema_state_dict(model))
    else:
        other.load_state_dict(model.state_dict())
    resumed = PACE(other.parameters())
    resumed.load_state_dict(theirs)
    if swapped:
        with pytest.raises(RuntimeError, match="weights are swapped in"):
            resumed.step()
        resumed.train()
    goes_on_as(model, optimizer, other, resumed, range(4, 6))


def test_a_published_checkpoint_without_its_model_is_pointed_out() -> None:
    model = model_of()
    optimizer = PACE(model.parameters())
    train(model, optimizer, range(2))
    theirs = published(model, optimizer, [p.detach().clone() for p in model.parameters()])
    with pytest.warns(UserWarning, match="load the model first") as said:
        PACE(model_of(seed=3).parameters()).load_state_dict(theirs)
    assert said[0].filename == __file__


def broken(saved: dict[str, Any], change: Any) -> dict[str, Any]:
    saved = copy.deepcopy(saved)
    change(saved)
    return saved


BROKEN = {
    "of another shape": (lambda s: s["state"][0].update(exp_avg=torch.ones(2)), r"exp_avg must be a tensor of shape"),
    "no tensor": (lambda s: s["state"][1].update(ema=3.0), r"ema must be a tensor of shape \(4,\), got float"),
    "of SGD": (lambda s: s["state"].update({0: {"momentum_buffer": torch.ones(3)}}), "momentum_buffer, which is no"),
    "no second moment": (lambda s: s["state"][0].pop("exp_avg_sq"), "lacks exp_avg_sq: is it the state of another"),
    "no step": (lambda s: s["state"][3].pop("step"), r"state of param_groups\[0\]\['params'\]\[3\] lacks step"),
    "a negative step": (lambda s: s["state"][0].update(step=torch.tensor(-1.0)), "step must be one whole number >= 0"),
    "bad options": (lambda s: s["param_groups"][0].update(eps=-1.0), "eps must be finite"),
    "fewer parameters": (lambda s: s["param_groups"][0]["params"].pop(), "doesn't match the size of optimizer's group"),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_a_state_that_does_not_fit_changes_nothing(how: str) -> None:
    model = model_of()
    optimizer = PACE(model.parameters())
    train(model, optimizer, range(3))
    change, message = BROKEN[how]
    saved = broken(optimizer.state_dict(), change)
    twin, kept = copy.deepcopy((model, optimizer))
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["eps"] == 1e-8
    goes_on_as(model, optimizer, twin, kept, range(3, 5))


def test_load_hooks_see_the_checkpoint_as_saved_and_the_state_as_loaded() -> None:
    model = model_of(torch.bfloat16)
    adamw = torch.optim.AdamW(model.parameters())
    train(model, adamw, range(2))
    optimizer = PACE(model.parameters())
    seen: list[Any] = []
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append("amsgrad" in state["param_groups"][0]))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append({s["exp_avg"].dtype for s in o.state.values()}))
    optimizer.load_state_dict(adamw.state_dict())
    assert seen == [True, {torch.float32}]
    optimizer.load_state_dict(adamw.state_dict())
    assert len(seen) == 4  # no hook of ours stays behind


# ---- torch.distributed.checkpoint's first step ----


@pytest.mark.parametrize("tensor_lr", [False, True])
@every_kind
def test_the_dry_step_of_the_distributed_helper_leaves_no_trace(kind: str, tensor_lr: bool) -> None:
    lr = torch.tensor(1e-2) if tensor_lr else 1e-2
    model, fresh = model_of(), model_of()
    optimizer, undisturbed = KINDS[kind](model, lr=lr), KINDS[kind](fresh, lr=lr)
    before = copy.deepcopy(model.state_dict())
    saved = get_optimizer_state_dict(model, optimizer)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for p in model.parameters():
        assert optimizer.state[p]["step"].item() == 0
        assert torch.equal(optimizer.state[p]["ema"], p)
    assert saved["state"]
    # Weights that are loaded after it are where the average starts, and what it is until the first step.
    with torch.no_grad():
        for module in (model, fresh):
            for p in module.parameters():
                p.add_(1.0)
    now = copy.deepcopy(model.state_dict())
    assert all(torch.equal(v, now[k]) for k, v in optimizer.ema_state_dict(model).items())
    with optimizer.averaged():
        assert all(torch.equal(v, now[k]) for k, v in model.state_dict().items())
    train(model, optimizer, range(3))
    train(fresh, undisturbed, range(3))
    assert_same(model, optimizer, fresh, undisturbed)


@every_kind
def test_save_and_load_through_the_distributed_helper(kind: str) -> None:
    model = model_of()
    optimizer = KINDS[kind](model)
    train(model, optimizer, range(4))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other = model_of(seed=3)
    other.load_state_dict(model.state_dict())
    resumed = KINDS[kind](other, lr=1.0)
    set_optimizer_state_dict(other, resumed, saved)
    assert kind == "PACE" or shared(resumed) == (kind == "MADA")
    goes_on_as(model, optimizer, other, resumed, range(4, 7))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
@every_kind
def test_pickle_and_deepcopy(kind: str, how: Any) -> None:
    model = model_of()
    optimizer = KINDS[kind](model)
    train(model, optimizer, range(4))
    other, twin = how((model, optimizer))
    kept = copy.deepcopy(optimizer.state_dict())
    train(other, twin, range(4, 5))  # nothing is shared but what the groups of one share
    assert str(optimizer.state_dict()) == str(kept)
    assert kind == "PACE" or shared(twin) == (kind == "MADA")
    train(model, optimizer, range(4, 5))
    goes_on_as(model, optimizer, other, twin, range(5, 8))


def test_steps_with_a_learning_rate_of_zero_are_counted() -> None:
    """As a warm-up begins: the moments move, the weights do not."""
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    optimizer = PACE(model.parameters(), lr=0.0)
    train(model, optimizer, range(2))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for p in model.parameters():
        assert optimizer.state[p]["step"].item() == 2
        assert optimizer.state[p]["exp_avg"].abs().sum() > 0


@pytest.mark.parametrize("other", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adadelta, torch.optim.Rprop])
@pytest.mark.parametrize("kind", [PACE, MADA])
def test_a_checkpoint_of_another_kind_of_optimizer_is_refused(kind: Any, other: Any) -> None:
    """Even where it has no states that could tell."""
    saved = other([torch.nn.Parameter(torch.ones(3))], lr=0.1).state_dict()
    optimizer = kind([torch.nn.Parameter(torch.ones(3))], lr=1e-3)
    with pytest.raises(ValueError, match=r"param_groups\[0\] of the checkpoint has .* and no betas"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 1e-3
