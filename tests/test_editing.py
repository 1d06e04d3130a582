"""Promise: averages that lie beside weights are never used beside others, whoever changed these and how; the error
names the parameter, and there is a way on without a checkpoint."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from test_averaging import Stop, at_each_line
from torch import Tensor, nn

from pace_kernels import MADA, PACE, Pullback, ScheduleFreeAdamW, ema_state_dict
from pace_kernels.conversions import in_floats
from pace_kernels.formats import has_average


def step(optimizer: PACE, t: int) -> None:
    gen = torch.Generator().manual_seed(t)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn(param.shape, generator=gen).to(param.dtype)
    optimizer.step()


def trained(dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple[nn.Module, PACE]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96)).to(dtype)
    optimizer = PACE(model.named_parameters(), lr=1e-2, ema_kappa=0.5, **{"state_bits": 8, **options})
    for t in range(4):
        step(optimizer, t)
    return model, optimizer


def average(model: nn.Module, optimizer: PACE, i: int = 0) -> Tensor:
    return in_floats(optimizer.state[model[i].weight], model[i].weight)["ema"]


CONVERSIONS: dict[str, Any] = {
    "bfloat16 to float32": (torch.bfloat16, torch.float32, {"master_weight_bits": 32}),
    "float32 to bfloat16": (torch.float32, torch.bfloat16, {}),
    "float32 to float16": (torch.float32, torch.float16, {}),
    "float32 to float64": (torch.float32, torch.float64, {}),
}


@pytest.mark.parametrize("ema_bits", (8, 16))
@pytest.mark.parametrize("which", CONVERSIONS)
def test_converted_weights_are_refused_and_converted_where_that_is_said(which: str, ema_bits: int) -> None:
    begin, to, options = CONVERSIONS[which]
    model, optimizer = trained(begin, ema_bits=ema_bits, **options)
    before = average(model, optimizer)
    model.to(to)
    uses = (lambda: step(optimizer, 9), optimizer.eval, optimizer.state_dict, lambda: ema_state_dict(model, optimizer))
    for use in uses:
        with pytest.raises(RuntimeError, match=rf"parameter '0.weight' is {to}, and it has an average.*were {begin}"):
            use()
    model, optimizer = trained(begin, ema_bits=ema_bits, **options)
    with optimizer.editing_weights():
        model.to(to)
    apart = (average(model, optimizer) - before).view(-1, 32).abs().amax(1)
    if to != torch.float64:  # whose averages are float64
        beside = (before - model[0].weight.float()).view(-1, 32).abs().amax(1)
        assert bool((apart <= beside * 2.0 ** -(ema_bits - 1) * 1.033).all())
    step(optimizer, 9)
    optimizer.state_dict()


def test_weights_converted_while_averages_are_swapped_in() -> None:
    model, optimizer = trained(master_weight_bits=32)
    optimizer.eval()
    model.float()
    with pytest.raises(RuntimeError, match=r"parameter '0.weight' is torch.float32.*back, call optimizer.train"):
        optimizer.train()
    model.bfloat16()
    optimizer.train()
    with optimizer.editing_weights():
        model.float()
    step(optimizer, 9)


@pytest.mark.parametrize("ema_bits", (8, 16))
def test_averages_of_edited_weights_start_anew_where_one_asks_for_it(ema_bits: int) -> None:
    model, optimizer = trained(ema_bits=ema_bits)
    other = average(model, optimizer, 1)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    with pytest.raises(RuntimeError, match=r"parameter '0.weight' was written.*editing_weights\(reset_average=True\)"):
        step(optimizer, 9)
    with pytest.raises(RuntimeError, match=r"parameter '0.weight' was written"), optimizer.editing_weights():
        pass
    with optimizer.editing_weights(reset_average=True), torch.no_grad():
        model[0].weight[0].add_(1.0)
        model[1].weight[0].add_(0.0)
    assert torch.equal(average(model, optimizer), model[0].weight.float())
    assert torch.equal(average(model, optimizer, 1), other)
    step(optimizer, 9)
    assert not torch.equal(average(model, optimizer), model[0].weight.float())


def test_averages_of_a_checkpoint_of_other_weights_start_anew_too() -> None:
    _, optimizer = trained()
    other = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96)).bfloat16()
    second = PACE(other.named_parameters(), state_bits=8)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(RuntimeError, match=r"parameter '0.weight' does not hold the weights of the checkpoint"):
        step(second, 9)
    with second.editing_weights(reset_average=True):
        pass
    assert torch.equal(average(other, second), other[0].weight.float())
    step(second, 9)
    assert "weights_hash" in second.state_dict()["state"][0]


@pytest.mark.parametrize("ema_bits", (32, 24, 16, 8))
@pytest.mark.parametrize(("begin", "to"), ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)))
@pytest.mark.parametrize("base", (torch.optim.AdamW, torch.optim.SGD))
def test_a_pullback_says_that_the_states_of_its_base_are_not_converted(
    base: Any, begin: torch.dtype, to: torch.dtype, ema_bits: int
) -> None:
    model = nn.Linear(64, 64).to(begin)
    optimizer = Pullback(base(model.parameters(), lr=1e-3), gain=0.05, ema_bits=ema_bits)
    step(optimizer, 0)
    with warnings.catch_warnings(record=True) as caught, optimizer.editing_weights():
        warnings.simplefilter("always")
        model.to(to)
    sentence = rf"is {to} now, and AdamW keeps states of {begin} for it.*load_state_dict\(optimizer.state_dict\(\)\)"
    assert [bool(re.search(sentence, str(w.message))) for w in caught] == ([True] if base is torch.optim.AdamW else [])
    assert all(w.filename == __file__ for w in caught)
    if caught:
        with pytest.raises(RuntimeError):
            step(copy.deepcopy((model, optimizer))[1], 1)
    optimizer.load_state_dict(optimizer.state_dict())
    step(optimizer, 1)
    assert has_average(optimizer.state[model.weight])


def other(kind: type, dtype: torch.dtype, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    model = nn.Linear(64, 64).to(dtype)
    if kind is Pullback:
        return model, Pullback(torch.optim.AdamW(model.parameters()), **options)
    return model, kind(model.parameters(), **options)


ACROSS: dict[str, Any] = {
    "codes of both": (PACE, {"state_bits": 8}),
    "codes and master": (PACE, {"state_bits": 8, "master_weight_bits": 32}),
    "average that stands alone": (PACE, {"state_bits": 8, "ema_bits": 24, "master_weight_bits": 32}),
    "master alone": (PACE, {"master_weight_bits": 32}),
    "no average": (MADA, {"state_bits": 8, "use_ema_eval": False, "master_weight_bits": 24}),
    "schedule-free": (ScheduleFreeAdamW, {"state_bits": 16, "ema_bits": 16}),
    "pullback": (Pullback, {"ema_bits": 8}),
}


@pytest.mark.parametrize("model_first", (True, False))
@pytest.mark.parametrize("begin", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("which", ACROSS)
@pytest.mark.filterwarnings("ignore:master_weight_bits is for")
def test_a_checkpoint_of_another_dtype_is_refused_by_that_name(
    which: str, begin: torch.dtype, model_first: bool
) -> None:
    kind, options = ACROSS[which]
    to = torch.float32 if begin == torch.bfloat16 else torch.bfloat16
    model, optimizer = other(kind, begin, options)
    step(optimizer, 1)
    saved, floats = copy.deepcopy(optimizer.state_dict()), optimizer.float_state_dict()
    masters = optimizer.master_state_dict(model)
    model, optimizer = other(kind, to, options)
    step(optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    tells = any(name in saved["state"][0] for name in ("weights_hash", "remainder"))
    if tells:
        with pytest.raises(ValueError, match=rf"saved from a parameter of {begin}, and this one is {to}.*float_state"):
            optimizer.load_state_dict(saved)
        assert str(optimizer.state_dict()) == str(before)
    else:
        assert begin == torch.float32  # floats, which go into any dtype
    for load in (0, 1) if model_first else (1, 0):
        (lambda: optimizer.load_state_dict(floats), lambda: model.load_state_dict(masters))[load]()
    step(optimizer, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.load_state_dict(saved, reset_average=True)
    assert any("master weight" in str(w.message) for w in caught) == ("remainder" in saved["state"][0])
    step(optimizer, 4)


def test_reset_average_is_a_switch() -> None:
    _, optimizer = trained()
    with pytest.raises(ValueError, match="reset_average must be True or False, got 1"):
        optimizer.editing_weights(reset_average=1).__enter__()  # type: ignore[arg-type]


KINDS: dict[str, Any] = {
    "PACE": lambda p: PACE(p, lr=1e-2, ema_kappa=0.5, state_bits=8),
    "adan": lambda p: MADA.preset("adan", p, use_ema_eval=True, state_bits=8),
    "schedule-free": lambda p: ScheduleFreeAdamW(p, lr=1e-2, state_bits=8),
    "pullback": lambda p: Pullback(torch.optim.AdamW(p, lr=1e-2), ema_bits=8),
}
CALLS: dict[str, Any] = {
    "eval": lambda model, optimizer: optimizer.eval(),
    "train": lambda model, optimizer: optimizer.train(),
    "ema_state_dict": lambda model, optimizer: ema_state_dict(model, optimizer),
}


def of(kind: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)).bfloat16()
    optimizer = KINDS[kind](model.parameters())
    for t in range(3):
        step(optimizer, t)
    return model, optimizer


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_what_a_handler_saves_is_right_at_each_line(kind: str, call: str) -> None:
    """Model and optimizer are saved at every line, loaded elsewhere, and train() is called there."""
    model, optimizer = of(kind)
    live, exported = copy.deepcopy(model.state_dict()), ema_state_dict(model, optimizer)
    if call == "train":
        optimizer.eval()
    saved: list[Any] = []
    both = lambda: (copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()))  # noqa: E731
    with at_each_line(lambda _: saved.append(both())):
        CALLS[call](model, optimizer)
    assert len(saved) > 20
    other = of(kind)[0]
    for weights, state in saved:
        other.load_state_dict(weights)
        loaded = KINDS[kind](other.parameters())
        loaded.load_state_dict(state)
        loaded.train()
        assert all(torch.equal(value, live[name]) for name, value in other.state_dict().items())
        shown = ema_state_dict(other, loaded)
        assert all(torch.equal(value, exported[name]) for name, value in shown.items())


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_at_any_line_of_an_export_leaves_no_refusal(kind: str) -> None:
    model, optimizer = of(kind)
    weights, before = copy.deepcopy(model.state_dict()), ema_state_dict(model, optimizer)
    last = 0
    for k in range(1, 2000):

        def act(number: int, k: int = k) -> None:
            if number == k:
                raise Stop

        try:
            with at_each_line(act):
                ema_state_dict(model, optimizer)
        except Stop:
            last = k
        else:
            break
        optimizer.train()
        optimizer.state_dict()
        after = ema_state_dict(model, optimizer)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert last > 20
    step(optimizer, 9)


def test_an_export_says_in_which_dtype() -> None:
    model, optimizer = trained(master_weight_bits=32)
    plain, wide = ema_state_dict(model, optimizer), optimizer.ema_state_dict(model, dtype=torch.float32)
    assert plain.keys() == wide.keys()
    for name, param in model.named_parameters():
        assert plain[name].dtype == torch.bfloat16 and wide[name].dtype == torch.float32
        assert torch.equal(wide[name], in_floats(optimizer.state[param], param)["ema"])
        assert torch.equal(wide[name].bfloat16(), plain[name])
    optimizer.eval()
    again = ema_state_dict(model, optimizer, dtype=torch.float32)
    assert all(torch.equal(again[name], wide[name]) for name in wide)
    optimizer.train()
    with pytest.raises(ValueError, match=r"dtype must be None or a floating-point torch.dtype"):
        ema_state_dict(model, optimizer, dtype=torch.int8)
    hook = model.register_state_dict_post_hook(lambda _, saved, *__: saved.update({"0.weight": saved["0.weight"] + 0}))
    with pytest.raises(RuntimeError, match=r"has 0.weight not as the parameter that it is"):
        ema_state_dict(model, optimizer, dtype=torch.float32)
    hook.remove()
    step(optimizer, 9)
