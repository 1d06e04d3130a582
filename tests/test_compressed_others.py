"""Promise: every optimizer holds and saves what its options of formats say, goes on with the same bits, converts from
each format to each other, and never takes an average for one of other weights. More of PACE: test_compressed.py."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from test_compressed import bits, net, step, through_a_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from pace_kernels import MADA, PACE, Pullback, ScheduleFreeAdamW, backends, ema_state_dict, master_state_dict
from pace_kernels.conversions import converted, in_floats, weight_in
from pace_kernels.formats import OPTIONS, asked, formats_in, formats_of
from pace_kernels.states import CODED_FORMAT, Formats

AVERAGED: dict[str, Any] = {"use_ema_eval": True, "ema_kappa": 0.5}
MIXED: dict[str, Any] = {"learn": (), "beta3": 0.9, "rho": 0.5, "c": 0.9, "gamma": 0.9, "lambda_pullback": 0.15}


def around(base: Any, **options: Any) -> Any:
    def make(params: Any, **given: Any) -> Pullback:
        groups = list(params)
        known = {name: value for name, value in given.items() if name in ("ema_bits", "backend")}
        if given.get("state_bits", 32) < 32:
            known.setdefault("ema_bits", given["state_bits"])
        return Pullback(base(groups), ema_kappa=0.5, **options, **known)

    return make


KINDS: dict[str, Any] = {
    "PACE": lambda p, **k: PACE(p, **{"lr": 1e-2, "ema_kappa": 0.5, **k}),
    "MADA": lambda p, **k: MADA(p, **{"lr": 1e-2, **MIXED, **AVERAGED, **k}),
    "MADA that learns": lambda p, **k: MADA(p, **{"lr": 1e-2, "hyper_warmup": 0, **AVERAGED, **k}),
    "adan": lambda p, **k: MADA.preset("adan", p, **{"lr": 1e-2, **AVERAGED, **k}),
    "amsgrad": lambda p, **k: MADA.preset("amsgrad", p, **{"lr": 1e-2, "lambda_pullback": 0.15, **AVERAGED, **k}),
    "lion": lambda p, **k: MADA.preset("lion", p, **{"lr": 1e-3, **AVERAGED, **k}),
    "schedule-free": lambda p, **k: ScheduleFreeAdamW(p, **{"lr": 1e-2, "warmup_steps": 2, **k}),
    "pullback": around(lambda p: torch.optim.AdamW(p, lr=1e-2)),
    "pullback from the step": around(lambda p: torch.optim.SGD(p, lr=1e-2), gain=0.05, pullback_from="step"),
    "average": around(lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), lambda_pullback=0.0),
}
OURS = [kind for kind in KINDS if not (kind == "average" or "pullback" in kind)]
FORMATS: dict[str, dict[str, Any]] = {
    "8 beside 32": {"state_bits": 8, "master_weight_bits": 32},
    "16 dithered": {"state_bits": 16, "ema_bits": 16, "stochastic_rounding": True},
    "8 and 24": {"state_bits": 8, "ema_bits": 24, "master_weight_bits": 24},
    "the average alone": {"ema_bits": 8},
}


def trained(kind: str, options: dict[str, Any], count: int = 4, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    model = net(dtype)
    optimizer = KINDS[kind](model.parameters(), **options)
    for t in range(count):
        step(optimizer, t)
    return model, optimizer


def floats(optimizer: Any) -> list[dict[str, Tensor]]:
    """All states, in float32 where they are compressed."""
    saved = optimizer.float_state_dict()["state"]
    return [{k: v.clone() for k, v in saved[key].items() if isinstance(v, Tensor)} for key in sorted(saved)]


def name_of_average(kind: str) -> str:
    return "z" if kind == "schedule-free" else "ema"


@pytest.mark.parametrize("which", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_every_backend_of_plans_and_what_memory_says(kind: str, which: str) -> None:
    before = KINDS[kind](net().parameters(), **FORMATS[which]).memory()
    _, ours = trained(kind, FORMATS[which], 6)
    names = [name for name, row in backends().items() if row.available and row.devices in (None, ("cpu",))]
    for name in names:
        _, theirs = trained(kind, {**FORMATS[which], "backend": name}, 6)
        if kind != "MADA that learns":  # what it learns by is summed in another order
            assert bits(ours) == bits(theirs), name
    assert "cpu" not in names or ours._plans_held().next is not None
    report = ours.memory()
    held = sum(v.numel() * v.element_size() for s in ours.state.values() for v in s.values() if isinstance(v, Tensor))
    assert report.states == held
    if kind in OURS:
        assert before.states == held
    assert sum(tensor.why_float32 is None for tensor in report.tensors) == 2
    first = next(iter(ours.state.values()))
    average = name_of_average(kind)
    assert f"{average}_codes" in first and average not in first
    states = FORMATS[which].get("state_bits", 32)
    if kind in OURS and states < 32:
        moments = {name for name in first if name.startswith("exp_avg")}
        assert all(name.endswith(("_codes", "_scales")) == (states == 8) for name in moments)
        narrow = {"mean_exp_avg_sq", "max_exp_avg_sq", "last_grad", "older_grad"} & first.keys()
        assert {first[name].dtype for name in narrow} <= {torch.bfloat16}


@pytest.mark.parametrize("kind", [kind for kind in OURS if kind != "MADA that learns"])
def test_master_weights_have_the_bits_of_float32_parameters(kind: str) -> None:
    model, optimizer = net(), None
    optimizer = KINDS[kind](model.parameters(), master_weight_bits=32)
    other = net().float()
    plain = KINDS[kind](other.parameters())
    for t in range(5):
        gen = torch.Generator().manual_seed(t)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=gen).bfloat16()
            q.grad = p.grad.float()
        optimizer.step()
        plain.step()
    masters = master_state_dict(model, optimizer)
    assert all(torch.equal(masters[name], value) for name, value in other.state_dict().items())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        ours, theirs = in_floats(optimizer.state[p], p), plain.state[q]
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("way", ["file", "pickle", "deepcopy", "nested", "flat"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_goes_on_with_the_same_bits(kind: str, way: str) -> None:
    for number, options in enumerate(list(FORMATS.values())[:3]):
        model, first = trained(kind, options)
        weights = copy.deepcopy(model.state_dict())
        first.zero_grad()
        other = net()
        with torch.no_grad():
            for param in other.parameters():
                param.fill_(9)
        second = KINDS[kind](other.parameters(), **options)
        if way in ("pickle", "deepcopy"):
            both = (model, first)
            other, second = pickle.loads(pickle.dumps(both)) if way == "pickle" else copy.deepcopy(both)
        elif way == "file":
            saved = through_a_file(first.state_dict())
            load = lambda: second.load_state_dict(saved)  # noqa: B023, E731
        else:
            dcp = StateDictOptions(flatten_optimizer_state_dict=way == "flat")
            saved = through_a_file(get_optimizer_state_dict(model, first, options=dcp))
            load = lambda: set_optimizer_state_dict(other, second, saved, options=dcp)  # noqa: B023, E731
        if way not in ("pickle", "deepcopy"):
            calls = [lambda: other.load_state_dict(weights), load]  # noqa: B023
            for call in calls if number % 2 else calls[::-1]:
                call()
        for optimizer in (first, second):
            for t in (7, 8):
                step(optimizer, t)
        assert bits(first) == bits(second), options


@pytest.mark.parametrize("kind", OURS)
def test_every_format_goes_into_every_other(kind: str) -> None:
    every = [*FORMATS.values(), {}]
    for options in every:
        trained_model, first = trained(kind, options)
        wanted, saved = floats(first), first.state_dict()
        for to in every:
            model = copy.deepcopy(trained_model)
            second = KINDS[kind](model.parameters(), **to)
            second.load_state_dict(copy.deepcopy(saved))
            for param, before in zip(model.parameters(), wanted, strict=True):
                state, formats = second.state[param], formats_of_options(to, param)
                new = converted(state, param, formats)
                assert formats_in(new)._replace(stochastic=False, state=0) == formats._replace(
                    stochastic=False, state=0
                )
                after = in_floats(new, param)
                for name, value in after.items():
                    bound = bound_of(name, before[name], weight_in(param, state), formats)
                    assert bool(((value - before[name]).abs() <= bound).all()), (options, to, name)
            step(second, 5)


PLACES = {32: 0.0, 24: 2.0**-16, 16: 2.0**-8}  # of a float: half a place, relative


def formats_of_options(options: dict[str, Any], param: Tensor) -> Formats:
    return formats_of(asked(options), param)


def allowed(name: str, value: Tensor, weight: Tensor, formats: Formats) -> Tensor:
    """Half a place of each element's format; of codes in blocks, of the largest of its block at least."""
    bits = formats.ema if name == "ema" else formats.state
    if bits in PLACES and not (name == "ema" and bits == 16):
        return value.abs() * PLACES[bits] + 1e-45
    blocks = value.reshape(-1, 32)
    if name == "ema":
        # δ is 2^-6 (8 bits) or 2^-14 of the largest difference at most: half of it, and a rounding of e beside x.
        apart = (value - weight).reshape(-1, 32).abs().amax(1, keepdim=True)
        step = apart * 2.0 ** -(formats.ema - 2)
        return (step + blocks.abs() * 2**-23).view(value.shape)
    # 16 codes a binade of |m| + o: half of one is (|m| + o) 2^-5; o is at most 2^-6.8 of the largest, 2^-14.8 of v's.
    smallest = blocks.abs().amax(1, keepdim=True) * (2.0**-11.7 if name == "exp_avg" else 2.0**-19)
    return (blocks.abs() * 2.0**-5 + smallest).view(value.shape)


def bound_of(name: str, value: Tensor, weight: Tensor, formats: Formats) -> Tensor:
    if name in ("mean_exp_avg_sq", "max_exp_avg_sq", "last_grad", "older_grad"):
        return value.abs() * (0.0 if formats.state == 32 else 2.0**-8) + 1e-45
    like = {"z": "ema", "exp_avg_diff": "exp_avg", "exp_avg_lion": "exp_avg"}
    return allowed(like.get(name, name), value, weight, formats)


@pytest.mark.parametrize("to", (None, 32, 24, 16, 8))
def test_averages_of_a_pullback_go_into_every_format(to: int | None) -> None:
    for ema_bits in (32, 24, 16, 8):
        model, first = trained("average", {"ema_bits": ema_bits})
        wanted = floats(first)
        second = Pullback(torch.optim.SGD(model.parameters(), lr=0.0), 0.0, ema_kappa=None, beta_ema=0.0, ema_bits=to)
        saved = {**copy.deepcopy(first.state_dict())}
        for group in saved["param_groups"]:
            group |= {"lr": 0.0, "momentum": 0.0, "pullback_ema_kappa": None, "pullback_beta_ema": 0.0}
        second.load_state_dict(saved)
        weights = [p.detach().clone() for p in model.parameters()]
        step(second, 5)
        assert all(map(torch.equal, weights, model.parameters()))
        for param, before, after in zip(model.parameters(), wanted, floats(second), strict=True):
            formats = formats_of_options({"ema_bits": to}, param)
            bound = allowed("ema", before["ema"], param.detach().float(), formats)
            assert bool(((after["ema"] - before["ema"]).abs() <= bound).all()), ema_bits


@pytest.mark.parametrize("which", list(FORMATS)[:3])
@pytest.mark.parametrize("kind", KINDS)
def test_evaluations_show_the_average_and_change_no_bit(kind: str, which: str) -> None:
    model, optimizer = trained(kind, FORMATS[which])
    _, twin = trained(kind, FORMATS[which])
    for t in range(4, 7):
        live = [p.detach().clone() for p in model.parameters()]
        wanted = floats(optimizer)
        masters = [weight_in(p, optimizer.state[p] if kind in OURS else {}) for p in model.parameters()]
        if kind == "schedule-free":
            averages = [y + (1 - 1 / 0.9) * (s["z"] - y) for y, s in zip(masters, wanted, strict=True)]
        else:
            averages = [s["ema"] for s in wanted]
        exported = ema_state_dict(model, optimizer, dtype=torch.float32)
        with optimizer.averaged(model):
            assert not torch.equal(model[0].weight, live[0])
            for (name, p), average in zip(model.named_parameters(), averages, strict=True):
                assert torch.allclose(exported[name], average, rtol=1e-6, atol=1e-7), name
                assert torch.equal(p, exported[name].to(p.dtype)), name
        assert all(map(torch.equal, model.parameters(), live))
        if t == 5:
            optimizer.eval()
            saved = through_a_file(optimizer.state_dict())
            optimizer.load_state_dict(saved)
            optimizer.train()
        for each in (optimizer, twin):
            step(each, t)
    assert bits(optimizer) == bits(twin)


@pytest.mark.parametrize("ema_bits", (8, 16))
@pytest.mark.parametrize("kind", KINDS)
def test_changed_weights_are_refused_and_edited_ones_keep_their_averages(kind: str, ema_bits: int) -> None:
    average = name_of_average(kind)
    model, optimizer = trained(kind, {"ema_bits": ema_bits})
    uses = (lambda: step(optimizer, 9), optimizer.eval, optimizer.state_dict, lambda: ema_state_dict(model, optimizer))
    with torch.no_grad():
        model[0].weight.mul_(1.25)
    before = bits(optimizer)
    if kind not in OURS:  # also where the averages are to lie in floats now
        optimizer.param_groups[0]["ema_bits"] = 32
        with pytest.raises(RuntimeError, match="was written since the last step"):
            step(optimizer, 9)
        del optimizer.param_groups[0]["ema_bits"]
    for use in uses:
        with pytest.raises(RuntimeError, match=r"param_groups\[0\]\['params'\]\[0\] was written since the last step"):
            use()
    assert bits(optimizer) == before
    with optimizer.editing_weights(reset_average=True):
        pass
    assert torch.equal(floats(optimizer)[0][average], model[0].weight.float())
    step(optimizer, 9)

    model, optimizer = trained(kind, {"ema_bits": ema_bits})
    kept = floats(optimizer)
    with optimizer.editing_weights(), torch.no_grad():
        model[0].weight[:2].mul_(1.25)
    now = floats(optimizer)
    apart = (kept[0][average] - model[0].weight.float()).view(-1, 32).abs().amax(1, keepdim=True)
    error = (now[0][average] - kept[0][average]).view(-1, 32).abs()
    assert bool((error <= apart * 2.0 ** -(ema_bits - 1) * 1.033).all())
    assert torch.equal(now[1][average], kept[1][average])
    step(optimizer, 9)
    model.float()
    with pytest.raises(RuntimeError, match=r"is torch.float32, and it has an average"):
        step(optimizer, 10)


@pytest.mark.parametrize("kind", KINDS)
def test_averages_that_stand_alone_let_weights_be_edited(kind: str) -> None:
    average = name_of_average(kind)
    model, optimizer = trained(kind, {"state_bits": 8, "ema_bits": 24})
    before = floats(optimizer)
    with torch.no_grad():
        model[0].weight.mul_(1.25)
    assert all(torch.equal(a[average], b[average]) for a, b in zip(before, floats(optimizer), strict=True))
    step(optimizer, 9)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_beside_other_weights_are_refused_or_reset(kind: str) -> None:
    _, first = trained(kind, FORMATS["8 beside 32"])
    saved = through_a_file(first.state_dict())
    version = "pullback_format_version" if isinstance(first, Pullback) else "format_version"
    assert saved["param_groups"][0][version] == CODED_FORMAT and "weights_hash" in saved["state"][0]
    other = net()
    second = KINDS[kind](other.parameters(), **FORMATS["8 beside 32"])
    second.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="does not hold the weights of the checkpoint"):
        step(second, 9)
    with second.editing_weights(reset_average=True):
        pass
    step(second, 9)
    second.load_state_dict(saved, reset_average=True)
    step(second, 9)
    assert f"{name_of_average(kind)}_codes" in second.state[other[0].weight]


@pytest.mark.parametrize("kind", KINDS)
def test_groups_have_formats_of_their_own_and_may_change_them(kind: str) -> None:
    average, model = name_of_average(kind), net()
    first, *others = model.parameters()
    optimizer = KINDS[kind]([{"params": [first], "ema_bits": 8}, {"params": others}])
    for t in range(3):
        step(optimizer, t)
    assert f"{average}_codes" in optimizer.state[first] and average in optimizer.state[others[3]]
    saved = through_a_file(optimizer.state_dict())
    again = KINDS[kind]([{"params": [first], "ema_bits": 16}, {"params": others}])
    again.load_state_dict(saved)
    assert again.param_groups[0]["ema_bits"] == 16
    optimizer.param_groups[0]["ema_bits"] = 32
    step(optimizer, 3)
    assert average in optimizer.state[first] and f"{average}_codes" not in optimizer.state[first]
    optimizer.param_groups[0]["ema_bits"] = 12
    before = bits(optimizer)
    with pytest.raises(ValueError, match="ema_bits must be one of None, 32, 24, 16, 8, got 12"):
        step(optimizer, 4)
    assert bits(optimizer) == before


@pytest.mark.parametrize("kind", OURS)
def test_steps_that_are_left_undone_change_nothing(kind: str) -> None:
    for options in list(FORMATS.values())[:3]:
        model, optimizer = trained(kind, {**options, "skip_nonfinite": True})
        before = bits(optimizer)
        model[0].weight.grad[0, 0] = torch.nan
        optimizer.step()
        assert bits(optimizer) == before and optimizer.skipped_steps == 1
        step(optimizer, 9)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_at_rest_get_new_averages(kind: str) -> None:
    """But schedule-free's, which keeps z."""
    model, optimizer = trained(kind, {"ema_bits": 8})
    model[0].weight.requires_grad_(False)
    model[0].weight.grad = None
    step(optimizer, 5)
    keeps = kind == "schedule-free"
    assert ("ema_codes" in optimizer.state[model[0].weight]) is False
    assert ("z_codes" in optimizer.state[model[0].weight]) is keeps
    if not keeps:
        with torch.no_grad():
            model[0].weight.mul_(1.25)  # nothing lies beside it
    for bits_then in (8, 32):
        other = KINDS[kind](net().parameters(), ema_bits=bits_then)
        other.load_state_dict(through_a_file(optimizer.state_dict()))
    model[0].weight.requires_grad_(True)
    step(optimizer, 6)
    assert f"{name_of_average(kind)}_codes" in optimizer.state[model[0].weight]


@pytest.mark.parametrize("kind", OURS)
def test_on_device_counts_take_the_same_steps(kind: str) -> None:
    if kind == "MADA that learns":
        pytest.skip("what it learns is summed otherwise")
    options = FORMATS["8 beside 32"]
    _, plain = trained(kind, options)
    _, on_device = trained(kind, {**options, "capturable": True})
    assert [{**a, "step": 0} for a in bits(plain)] == [{**a, "step": 0} for a in bits(on_device)]


@pytest.mark.parametrize("state_bits", (8, 16))
def test_what_is_learned_can_be_frozen_and_changed(state_bits: int) -> None:
    """Moments that are one step behind are redone from what lies in codes."""
    model, optimizer = trained("MADA that learns", {"state_bits": state_bits, "master_weight_bits": 32})
    before = optimizer.coefficients
    optimizer.param_groups[0]["eps"] = 1e-6
    step(optimizer, 5)  # which learns nothing
    step(optimizer, 6)
    optimizer.freeze()
    kept = optimizer.coefficients
    assert kept != before and not {"older_grad"} & optimizer.state[model[0].weight].keys()
    step(optimizer, 6)
    assert optimizer.coefficients == kept
    exact, plain = trained("MADA that learns", {"master_weight_bits": 32})
    plain.freeze()
    _, rounded = trained("MADA that learns", {"state_bits": state_bits, "master_weight_bits": 32})
    rounded.freeze()
    for name in ("exp_avg", "exp_avg_sq", "exp_avg_diff"):
        a, b = floats(plain)[0][name], floats(rounded)[0][name]
        assert float((a - b).norm() / a.norm()) < 0.1, name
    assert exact is not model


def test_pace_and_mada_take_each_others_codes() -> None:
    torch.manual_seed(0)
    model = net()
    options: dict[str, Any] = {"state_bits": 8, "master_weight_bits": 32}
    pace = PACE(model.parameters(), lr=1e-2, **options)
    for t in range(3):
        step(pace, t)
    mada = MADA.preset("adamw", model.parameters(), lambda_pullback=0.15, use_ema_eval=True, **options)
    mada.load_state_dict(through_a_file(pace.state_dict()))
    for name, value in pace.state[model[0].weight].items():
        assert torch.equal(mada.state[model[0].weight][name], value), name
    again = PACE(model.parameters(), **options)
    again.load_state_dict(through_a_file(mada.state_dict()))
    step(again, 5)


def test_weights_loaded_while_schedule_free_evaluates_keep_z() -> None:
    model, optimizer = trained("schedule-free", FORMATS["8 beside 32"])
    z = floats(optimizer)[0]["z"]
    optimizer.eval()
    with torch.no_grad():
        model[0].weight.mul_(1.25)
    x = model[0].weight.float()
    optimizer.train(keep="loaded")
    y = model[0].weight.float()
    assert torch.allclose(y, x + (z - x) * 0.1, rtol=2**-7, atol=1e-6)  # β1 = 0.9: y = β1 x + (1 − β1) z
    apart = (z - y).view(-1, 32).abs().amax(1, keepdim=True)
    error = (floats(optimizer)[0]["z"] - z).view(-1, 32).abs()
    assert bool((error <= apart * 2.0**-7 * 1.033).all())
    step(optimizer, 9)
    assert optimizer.get_step_stats()["average_distance_norm"] > 0.0


def test_live_weights_that_a_checkpoint_lost_are_missed() -> None:
    _, optimizer = trained("schedule-free", FORMATS["8 beside 32"])
    optimizer.eval()
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state.pop("live", None)
    with pytest.raises(ValueError, match=r"live weights, beside which z lies, did not come along"):
        KINDS["schedule-free"](net().parameters(), **FORMATS["8 beside 32"]).load_state_dict(saved)


@pytest.mark.parametrize("kind", KINDS)
def test_floats_for_optimizers_without_formats(kind: str) -> None:
    model, optimizer = trained(kind, FORMATS["8 beside 32"])
    saved = copy.deepcopy(optimizer.float_state_dict())
    names = {name for state in saved["state"].values() for name in state}
    assert not any(name.endswith(("_codes", "_scales", "_remainder")) for name in names)
    assert OPTIONS.keys().isdisjoint(saved["param_groups"][0])
    plain = KINDS[kind](model.parameters())
    plain.load_state_dict(saved)
    for a, b in zip(floats(optimizer), floats(plain), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    step(plain, 9)


@pytest.mark.parametrize("name", ("AdamW", "Adam"))
@pytest.mark.parametrize("kind", OURS)
def test_torch_takes_the_floats_of_all_that_have_both_moments(kind: str, name: str) -> None:
    """As the docstring of float_state_dict() says."""
    model = net()
    ours = KINDS[kind](model.parameters(), **FORMATS["8 beside 32"])
    step(ours, 0)
    torchs = getattr(torch.optim, name)(model.parameters())
    torchs.load_state_dict(ours.float_state_dict())
    if kind in ("lion", "schedule-free"):
        with pytest.raises(KeyError, match="exp_avg"):
            step(torchs, 1)
        return
    before = model[0].weight.detach().clone()
    step(torchs, 1)
    assert not torch.equal(before, model[0].weight) and torchs.state[model[0].weight]["step"] == 2


def test_a_remainder_among_a_bases_states_is_the_bases() -> None:
    class Remaining(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            for param in self.param_groups[0]["params"]:
                self.state[param]["remainder"] = torch.full_like(param, 7)

    model = net()
    optimizer = Pullback(Remaining(model.parameters(), lr=1e-2), gain=0.05, ema_bits=8)
    for t in range(3):
        step(optimizer, t)
    with optimizer.editing_weights(), torch.no_grad():
        model[0].weight.mul_(1.25)
    assert bool((optimizer.state[model[0].weight]["remainder"] == 7).all())
    e = floats(optimizer)[0]["ema"]
    with optimizer.averaged(model):
        assert torch.equal(model[0].weight, e.bfloat16())
    assert set(master_state_dict(model, optimizer)) == set(model.state_dict())
    assert master_state_dict(model, optimizer)["0.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["pullback", "pullback from the step"])
def test_parameters_over_one_memory_are_refused(kind: str) -> None:
    one = torch.ones(64, 64)
    optimizer = KINDS[kind]([nn.Parameter(one), nn.Parameter(one)], ema_bits=8)
    with pytest.raises(RuntimeError, match="two parameters share one memory"):
        step(optimizer, 0)
    assert bool((one == 1).all())
    step(KINDS[kind]([nn.Parameter(one), nn.Parameter(one)], ema_bits=24), 0)
