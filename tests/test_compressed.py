"""Promise: with state_bits, ema_bits, master_weight_bits and stochastic_rounding an optimizer holds and saves what it
says, goes on with the same bits, converts from each format to each other, and never takes an average for one of other
weights."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
import random
import warnings
from typing import Any

import pytest
import torch
from products import FULL, day
from torch import Tensor, nn

from pace_kernels import MADA, PACE, Pullback, ScheduleFreeAdamW, ema_state_dict, master_state_dict
from pace_kernels.conversions import converted, in_floats, weight_in
from pace_kernels.formats import OPTIONS
from pace_kernels.states import CODED_FORMAT, Formats

EVERY = [
    {"state_bits": state, "ema_bits": ema, **weights}
    for state, ema in itertools.product((32, 16, 8), (None, 32, 24, 16, 8))
    for weights in ({}, {"master_weight_bits": 24}, {"master_weight_bits": 32}, {"stochastic_rounding": True})
]
CASES = EVERY if FULL else random.Random(day()).sample(EVERY, 8)
CASES += [{"state_bits": 8, "master_weight_bits": 32}, {"state_bits": 8, "ema_bits": 24, "master_weight_bits": 24}]
PACKED = {"state_bits": 8, "master_weight_bits": 32}


def named(options: dict[str, Any]) -> str:
    return ",".join(f"{name.split('_')[0]}={value}" for name, value in options.items())


def net(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    """Two weights that are compressed, and a few that are not: too small, of odd rows, of one dimension."""
    torch.manual_seed(0)
    layers = (
        nn.Linear(96, 64),
        nn.LayerNorm(64),
        nn.Conv2d(32, 16, 3),
        nn.Linear(33, 128),
        nn.Linear(32, 64, bias=False),
    )
    return nn.Sequential(*layers).to(dtype)


def step(optimizer: Any, t: int) -> None:
    gen = torch.Generator().manual_seed(t)
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.requires_grad:
                param.grad = torch.randn(param.shape, generator=gen).to(param.dtype)
    optimizer.step()


def trained(options: dict[str, Any], count: int = 3, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, PACE]:
    model = net(dtype)
    optimizer = PACE(model.parameters(), lr=1e-2, ema_kappa=0.5, **options)
    for t in range(count):
        step(optimizer, t)
    return model, optimizer


def bits(optimizer: Any) -> list[Any]:
    """All weights and states, by name."""
    found = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = {"weight": param, **optimizer.state[param]}
            tensors = {name: value for name, value in sorted(state.items()) if isinstance(value, Tensor)}
            found.append(
                {k: v.detach().contiguous().reshape(-1).view(torch.uint8).tolist() for k, v in tensors.items()}
            )
    return found


def floats(optimizer: PACE) -> list[dict[str, Tensor]]:
    return [in_floats(optimizer.state[p], p) for group in optimizer.param_groups for p in group["params"]]


# ---- what lies where -------------------------------------------------------------------------------------------------


def test_the_defaults_change_nothing() -> None:
    _, optimizer = trained({})
    assert OPTIONS.keys().isdisjoint(optimizer.param_groups[0])
    assert {key for state in optimizer.state.values() for key in state} == {"step", "exp_avg", "exp_avg_sq", "ema"}
    assert optimizer.state_dict()["param_groups"][0]["format_version"] == 1


def test_what_is_asked_of_bfloat16_parameters_needs_some() -> None:
    for options in ({"master_weight_bits": 32}, {"stochastic_rounding": True}):
        for make in (PACE, MADA, ScheduleFreeAdamW, lambda p, **k: MADA.preset("adan", p, **k)):
            with pytest.warns(UserWarning, match="is for bfloat16 parameters, and there are none") as caught:
                make(net(torch.float32).parameters(), **options)
            assert [warning.filename for warning in caught] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            PACE(net().parameters(), **options)
            PACE([{"params": net(torch.float32).parameters()}, {"params": net().parameters()}], **options)
            PACE(net(torch.float32).parameters(), state_bits=8)


def test_memory_of_what_is_not_trained_or_not_there_yet() -> None:
    lazy, frozen = nn.LazyLinear(64), nn.Parameter(torch.zeros(64, 64, dtype=torch.int32), requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = PACE([*lazy.parameters(), frozen, torch.ones(64, 64), torch.ones(4096)], state_bits=8).memory()
    assert [tensor.backend == "none" for tensor in report.tensors] == [True, True, True, False, False]
    assert [tensor.elements for tensor in report.tensors] == [0, 0, 4096, 4096, 4096]
    assert [tensor.why_float32 for tensor in report.tensors[:4]] == [None] * 4
    assert "it has 1 dimension, fewer than 2" in str(report) and "3 are lazy, or frozen" in str(report)


def bare(*dtypes: torch.dtype) -> list[Tensor]:
    return [nn.Parameter(torch.zeros(64, 64, dtype=dtype)) for dtype in dtypes]


SAID: dict[str, Any] = {  # the optimizer, what it says, and what it does not say
    "float64": (
        lambda: PACE(bare(torch.float64, torch.float64), state_bits=8),
        [
            "2 keep float64 states, each since it is float64, for which there are no codes",
            "without gradients",
            "2 step by backend torch on cpu, since there are no kernels for float64",
        ],
        ["float32", "gradients 0"],
    ),
    "the average alone": (
        lambda: PACE([nn.Parameter(torch.ones(5)), *bare(torch.bfloat16)], ema_bits=8),
        ["1 keeps float32 averages, since it has 1 dimension", "weights 8.02 KiB"],
        ["states, since"],
    ),
    "pullback": (
        lambda: Pullback(torch.optim.AdamW([nn.Parameter(torch.ones(k)) for k in (5, 6)]), ema_bits=8),
        ["2 keep float32 averages, each since it has 1 dimension"],
        ["float32 states"],
    ),
    "groups": (
        lambda: PACE(
            [{"params": bare(torch.float32), "state_bits": 32}, {"params": bare(torch.bfloat16)}], state_bits=8
        ),
        ["1 keeps float32 states, since the options of its group ask for that"],
        ["each since"],
    ),
    "nobody asks": (lambda: PACE(bare(*[torch.float32] * 8)), ["weights 0.12 MiB", "8 step by backend"], ["keep"]),
    "a backend by name": (
        lambda: PACE(bare(torch.float32), backend="torch"),
        ["1 steps by backend torch on cpu, since it was asked for by name"],
        [],
    ),
}


@pytest.mark.parametrize("which", SAID)
def test_what_memory_prints(which: str) -> None:
    make, there, absent = SAID[which]
    report = make().memory()
    said = str(report)
    assert all(text in said for text in there), said
    assert not any(text in said for text in absent), said
    for tensor in report.tensors:
        assert tensor.compressed == any("codes" in name for name in tensor.states)


@pytest.mark.parametrize("options", CASES, ids=named)
def test_bits_of_torch_plans_and_what_memory_says(options: dict[str, Any]) -> None:
    before = PACE(net().parameters(), **options).memory()
    _, ours = trained(options, 6)
    _, theirs = trained({**options, "backend": "torch"}, 6)
    assert bits(ours) == bits(theirs)
    assert ours._plans.next is not None
    report = ours.memory()
    held = sum(value.numel() * value.element_size() for state in ours.state.values() for value in state.values())
    assert report.states == before.states == held
    assert report.weights == report.gradients == 2 * report.elements
    compressed = [tensor.name for tensor in report.tensors if tensor.why_float32 is None]
    plain = options["state_bits"] == 32 and options["ema_bits"] in (None, 32) if "ema_bits" in options else False
    assert len(compressed) == (len(report.tensors) if plain else 2)
    assert plain or ("fewer than 4096" in str(report) and "no multiple of 32" in str(report))


def test_bytes_of_the_table() -> None:
    """STORAGE.md, section 7: bytes a parameter that are held with a bfloat16 gradient."""
    for options, wanted in {
        (8, None, 32): 9.1, (8, 16, 32): 10.1, (8, 24, 32): 11.1, (8, None, 24): 8.1, (8, None, None): 7.1,
        (16, None, 32): 12.03,
    }.items():  # fmt: skip
        model = nn.Linear(1024, 1024, bias=False).bfloat16()
        optimizer = PACE(
            model.parameters(), **dict(zip(("state_bits", "ema_bits", "master_weight_bits"), options, strict=True))
        )
        step(optimizer, 0)
        report = optimizer.memory()
        total = (report.weights + report.gradients + report.states) / report.elements
        assert total == pytest.approx(wanted, abs=0.05)


def test_the_shape_decides() -> None:
    shapes = {
        (64, 64): None, (2, 2048): None, (128, 8, 4): None, (66, 63): "no multiple of 32", (4096,): "fewer than 2",
        (64, 32): "fewer than 4096", (2048, 2): "no multiple of 32", (8, 16, 33, 2): None,
    }  # fmt: skip
    optimizer = PACE([torch.ones(shape) for shape in shapes], state_bits=8)
    for tensor, why in zip(optimizer.memory().tensors, shapes.values(), strict=True):
        assert (tensor.why_float32 is None) if why is None else why in (tensor.why_float32 or "")
    away = torch.ones(128, 64).t()
    for param, why in ((away, "not contiguous"), (torch.ones(64, 64).double(), "float64")):
        assert why in (PACE([param], state_bits=8).memory().tensors[0].why_float32 or "")
    float32, wide = nn.Parameter(torch.ones(64, 64)), nn.Parameter(torch.ones(64, 64).double())
    mixed = PACE([float32, wide], state_bits=8, ema_bits=16)
    step(mixed, 0)
    assert "ema_codes" in mixed.state[float32] and mixed.state[wide]["ema"].dtype == torch.float64


WRONG: dict[str, Any] = {  # what is called, and what it raises
    "of PACE": (lambda p: PACE(p, state_bit=8), r"PACE\(\).*'state_bit': did you mean 'state_bits'\?"),
    "of MADA": (lambda p: MADA(p, master_weight_bit=32), r"MADA\(\).*did you mean 'master_weight_bits'\?"),
    "of a preset": (lambda p: MADA.preset("adan", p, ema_bit=8), r"MADA\(\).*did you mean 'ema_bits'\?"),
    "schedule-free": (lambda p: ScheduleFreeAdamW(p, warmup_step=8), "did you mean 'warmup_steps'"),
    "like none": (lambda p: PACE(p, zzz=8), "unexpected keyword argument 'zzz'$"),
    "states of a pullback": (
        lambda p: Pullback(torch.optim.AdamW(p), state_bits=8),
        r"Pullback\(\).*'state_bits': states and weights are those of the wrapped optimizer; ema_bits",
    ),
    "weights of a pullback": (lambda p: Pullback(torch.optim.AdamW(p), master_weight_bits=32), "; ema_bits says how"),
    "typo of a pullback": (lambda p: Pullback(torch.optim.AdamW(p), ema_bit=8), "did you mean 'ema_bits'"),
    "value": (lambda p: PACE(p, state_bits=7), "^state_bits must be one of 32, 16, 8, got 7"),
    "value of a group": (
        lambda p: PACE([{"params": p[:1]}, {"params": p[1:], "state_bits": 7}]),
        r"^param_groups\[1\]: state_bits must be one of 32, 16, 8, got 7",
    ),
    "two of a group": (
        lambda p: MADA([{"params": p, "stochastic_rounding": True, "master_weight_bits": 32}]),
        r"^param_groups\[0\]: stochastic_rounding is for",
    ),
}


@pytest.mark.parametrize("which", WRONG)
def test_what_is_misspelled_or_wrong_is_named(which: str) -> None:
    call, sentence = WRONG[which]
    with pytest.raises((TypeError, ValueError), match=sentence):
        call(list(net().parameters()))


def test_a_wrong_value_set_in_training_names_its_group_and_signatures_stay() -> None:
    first, *others = net().parameters()
    optimizer = PACE([{"params": others}, {"params": [first]}])
    optimizer.param_groups[1]["ema_bits"] = 5
    with pytest.raises(ValueError, match=r"^param_groups\[1\]: ema_bits must be one of"):
        step(optimizer, 0)
    for kind in (PACE, MADA, ScheduleFreeAdamW, Pullback):
        assert "ema_bits" in inspect.signature(kind).parameters
        with pytest.raises(TypeError, match="missing 1 required positional argument"):
            kind()


def test_groups_have_formats_of_their_own_and_may_change_them() -> None:
    model = net()
    first, *others = model.parameters()
    optimizer = PACE([{"params": [first], "state_bits": 8}, {"params": others}], lr=1e-2)
    for t in range(3):
        step(optimizer, t)
    assert "exp_avg_codes" in optimizer.state[first] and "exp_avg" in optimizer.state[others[2]]
    before = floats(optimizer)[0]
    optimizer.param_groups[0]["state_bits"] = 32
    optimizer.param_groups[0]["lr"] = 0.0
    weights = first.detach().clone()
    step(optimizer, 3)
    state = optimizer.state[first]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq", "ema"} and torch.equal(first, weights)
    assert state["exp_avg"].dtype == torch.float32 and not torch.equal(before["exp_avg"], state["exp_avg"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    (
        ({"state_bits": 4}, "state_bits must be one of 32, 16, 8, got 4"),
        ({"state_bits": None}, "state_bits must be one of 32, 16, 8, got None"),
        ({"ema_bits": 12}, "ema_bits must be one of None, 32, 24, 16, 8, got 12"),
        ({"ema_bits": True}, "ema_bits must be one of"),
        ({"stochastic_rounding": 1}, "stochastic_rounding must be True or False, got 1"),
        (
            {"stochastic_rounding": True, "master_weight_bits": 32},
            "stochastic_rounding is for bfloat16 parameters without",
        ),
    ),
)
def test_other_values_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        PACE(net().parameters(), **options)
    optimizer = PACE(net().parameters())
    optimizer.param_groups[0].update(options)
    before = bits(optimizer) if optimizer.state else None
    with pytest.raises(ValueError, match=sentence):
        step(optimizer, 0)
    assert before is None and not optimizer.state


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()))


def test_keys_of_checkpoints() -> None:
    _, optimizer = trained(PACKED)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["format_version"] == CODED_FORMAT  # older versions refuse it
    assert not {"exp_avg", "exp_avg_sq", "ema"} & saved["state"][0].keys()  # nobody takes codes for floats
    assert (
        "weights_hash" in saved["state"][0]
        and "weights_hash" not in optimizer.state[optimizer.param_groups[0]["params"][0]]
    )


def test_versions_that_would_take_rounded_moments_for_others_refuse_them() -> None:
    _, optimizer = trained({"state_bits": 16, "ema_bits": 32})
    saved = optimizer.state_dict()
    assert saved["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq", "ema"}
    assert saved["param_groups"][0]["format_version"] == CODED_FORMAT


def test_floats_for_torch_and_older_versions() -> None:
    model, optimizer = trained(PACKED)
    saved = optimizer.float_state_dict()
    assert saved["param_groups"][0]["format_version"] == 1 and OPTIONS.keys().isdisjoint(saved["param_groups"][0])
    assert set(saved["state"][0]) == {"step", "exp_avg", "exp_avg_sq", "ema"}
    assert saved["state"][0]["exp_avg"].dtype == torch.float32
    halves = trained({"state_bits": 16, "ema_bits": 32})[1].float_state_dict()["state"][0]
    assert {value.dtype for value in halves.values()} == {torch.float32}
    adamw = torch.optim.AdamW(model.parameters())
    adamw.load_state_dict(
        {**saved, "param_groups": [{**adamw.param_groups[0], "params": saved["param_groups"][0]["params"]}]}
    )
    PACE(model.parameters()).load_state_dict(saved)
    exported = ema_state_dict(model, optimizer)
    assert torch.equal(exported["0.weight"], saved["state"][0]["ema"].bfloat16())
    masters = master_state_dict(model, optimizer)
    assert masters["0.weight"].dtype == torch.float32 and torch.equal(masters["0.weight"].bfloat16(), model[0].weight)
    assert not torch.equal(masters["0.weight"], model[0].weight.float()) and masters.keys() == model.state_dict().keys()


def test_what_does_not_fit_is_refused() -> None:
    model, optimizer = trained(PACKED)
    for change, sentence in (
        (lambda state: state.pop("exp_avg_scales"), "exp_avg is in codes with exp_avg_codes, exp_avg_scales"),
        (
            lambda state: state.update(ema_codes=state["ema_codes"].float()),
            "ema_codes must be dense, of torch.bfloat16 or",
        ),
        (
            lambda state: state.update(exp_avg_scales=torch.zeros(3, dtype=torch.uint8)),
            "exp_avg_scales must be a tensor",
        ),
        (lambda state: state.update(weights_hash=torch.zeros(())), "weights_hash must be dense, of torch.int64"),
    ):
        saved = copy.deepcopy(optimizer.state_dict())
        change(saved["state"][0])
        other = PACE(net().parameters(), **PACKED)
        with pytest.raises(ValueError, match=sentence):
            other.load_state_dict(saved)
        assert not other.state
    with pytest.raises(ValueError, match="which is no state of ScheduleFreeAdamW"):
        ScheduleFreeAdamW(model.parameters()).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="can't have codes: it is not contiguous"):
        PACE([p.detach().t().contiguous().t() if p.dim() == 2 else p for p in net().parameters()]).load_state_dict(
            optimizer.state_dict()
        )


# ---- averages beside weights -----------------------------------------------------------------------------------------


def averages(model: nn.Module, optimizer: PACE) -> list[Tensor]:
    return [state["ema"] for state in floats(optimizer)]


def uses(model: nn.Module, optimizer: PACE) -> dict[str, Any]:
    return {
        "step()": lambda: step(optimizer, 9),
        "eval()": optimizer.eval,
        "ema_state_dict()": lambda: ema_state_dict(model, optimizer),
        "state_dict()": optimizer.state_dict,
        "float_state_dict()": optimizer.float_state_dict,
        "editing_weights()": lambda: optimizer.editing_weights().__enter__(),
    }


@pytest.mark.parametrize("use", uses(nn.Linear(1, 1), PACE([torch.ones(1)])))
@pytest.mark.parametrize("ema_bits", (8, 16))
def test_edited_weights_are_refused(ema_bits: int, use: str) -> None:
    model, optimizer = trained({"ema_bits": ema_bits})
    assert optimizer._plans.next is not None
    with torch.no_grad():
        model[0].weight.clamp_(-0.05, 0.05)
    before = bits(optimizer)
    with pytest.raises(RuntimeError, match=r"was written since the last step.*editing_weights\(\).*ema_bits=24"):
        uses(model, optimizer)[use]()
    assert bits(optimizer) == before


@pytest.mark.parametrize("ema_bits", (8, 16))
def test_editing_weights_keeps_averages_and_untouched_remainders(ema_bits: int) -> None:
    model, optimizer = trained({"ema_bits": ema_bits, "master_weight_bits": 32})
    before, rest = averages(model, optimizer), optimizer.state[model[0].weight]["remainder"].clone()
    weight = model[0].weight.detach().clone()
    with optimizer.editing_weights(), torch.no_grad():
        model[0].weight[:2].mul_(1.25)
    state = optimizer.state[model[0].weight]
    changed = model[0].weight != weight
    assert bool(changed[:2].any()) and not changed[2:].any()
    assert torch.equal(state["remainder"], torch.where(changed, 0, rest)) and bool(rest.any())
    after = averages(model, optimizer)
    apart = (before[0] - weight_in(model[0].weight, state)).view(-1, 32).abs().amax(1, keepdim=True)
    assert bool(((after[0] - before[0]).view(-1, 32).abs() <= apart * 2.0 ** -(ema_bits - 1) * 1.033).all())
    assert all(map(torch.equal, before[1:], after[1:]))
    step(optimizer, 9)
    with optimizer.averaged(model):
        assert torch.equal(model[0].weight, averages(model, optimizer)[0].bfloat16())


def test_an_outlier_among_edited_weights_leaves_its_neighbours_their_averages() -> None:
    model, optimizer = trained({"ema_bits": 8}, dtype=torch.float32)
    before = averages(model, optimizer)[0].view(-1, 32)[0]
    with optimizer.editing_weights(), torch.no_grad():
        model[0].weight[0, 0] = 1e6
    block = averages(model, optimizer)[0].view(-1, 32)[0]
    assert block[0] == 1e6 and bool(((block - before).abs()[1:] < 1e-3).all())


@pytest.mark.parametrize("use", uses(nn.Linear(1, 1), PACE([torch.ones(1)])))
def test_averages_of_other_weights_are_refused(use: str) -> None:
    _, first = trained(PACKED)
    saved = through_a_file(first.state_dict())
    other = net()
    second = PACE(other.parameters(), lr=1e-2, **PACKED)
    second.load_state_dict(saved)
    if use == "state_dict()":  # it says of which weights they were
        assert second.state_dict()["state"][0]["weights_hash"] == saved["state"][0]["weights_hash"]
        return
    with pytest.raises(
        RuntimeError,
        match=r"does not hold the weights of the checkpoint.*load_state_dict\(.*reset_average=True\), or `with",
    ):
        uses(other, second)[use]()
    second.load_state_dict(saved, reset_average=True)
    step(second, 5)
    assert "ema_codes" in second.state[other[0].weight]


def resumed(model: nn.Module, optimizer: PACE) -> tuple[nn.Module, PACE]:
    other = copy.deepcopy(model)
    second = PACE(other.parameters(), lr=1e-2, **PACKED)
    second.load_state_dict(through_a_file(optimizer.state_dict()))
    return other, second


def read_first(use: Any) -> Any:
    def found(model: nn.Module, optimizer: PACE) -> tuple[nn.Module, PACE]:
        other, second = resumed(model, optimizer)
        use(other, second)
        return other, second

    return found


def edited(model: nn.Module, optimizer: PACE) -> None:
    with optimizer.editing_weights(), torch.no_grad():
        model[0].weight.mul_(0.5)


def saved_swapped(model: nn.Module, optimizer: PACE) -> tuple[nn.Module, PACE]:
    optimizer.eval()
    found = resumed(model, optimizer)
    found[1].train()
    return found


BEGINNINGS: dict[str, Any] = {
    "loaded, then averaged()": read_first(lambda model, optimizer: (optimizer.eval(), optimizer.train())),
    "loaded, then ema_state_dict()": read_first(ema_state_dict),
    "loaded, then editing_weights()": read_first(edited),
    "loaded, of a swapped one": saved_swapped,
    "deepcopy": lambda *pair: copy.deepcopy(pair),
    "pickle": lambda *pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_weights_edited_before_the_first_step_are_noticed(beginning: str) -> None:
    model, optimizer = BEGINNINGS[beginning](*trained(PACKED))
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="was written since the last step"):
        step(optimizer, 9)


def without_average(model: nn.Module, optimizer: PACE) -> None:
    optimizer.param_groups[0].update(lambda_pullback=0.0, use_ema_eval=False)
    step(optimizer, 5)


def apart(model: nn.Module, optimizer: PACE) -> None:
    optimizer.param_groups[0].update(ema_bits=24)
    step(optimizer, 5)


def at_rest(model: nn.Module, optimizer: PACE) -> None:
    model[0].requires_grad_(False)
    for param in model.parameters():
        param.grad = torch.ones_like(param) if param.requires_grad else None
    optimizer.step()


@pytest.mark.parametrize("is_loaded", (False, True))
@pytest.mark.parametrize("drop", (without_average, apart, at_rest))
def test_weights_without_an_average_beside_them_may_be_edited(drop: Any, is_loaded: bool) -> None:
    """Also once averages come back, which begin then."""
    model, optimizer = trained(PACKED)
    if is_loaded:
        model, optimizer = resumed(model, optimizer)
    drop(model, optimizer)
    options = {"lambda_pullback": 0.15, "use_ema_eval": True, "ema_bits": 8}
    for back in ({}, options):
        with torch.no_grad():
            model[0].weight.mul_(0.5)
        if back:
            model[0].requires_grad_(True)
            optimizer.param_groups[0].update(back)
        step(optimizer, 6)
        assert ("ema_scales" in optimizer.state[model[0].weight]) == bool(back) and optimizer.state_dict()


@pytest.mark.parametrize("ema_bits", (32, 24, 16, 8))
def test_averages_are_reset_in_every_format(ema_bits: int) -> None:
    model, optimizer = trained({"ema_bits": ema_bits})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is missing: that is what was asked for
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()), reset_average=True)
    assert "exp_avg" in optimizer.state[model[0].weight] and not optimizer._entries(optimizer.param_groups)
    step(optimizer, 9)
    assert len(optimizer._entries(optimizer.param_groups)) == len(list(model.parameters()))


def test_other_optimizers_may_swap_in_between() -> None:
    model, optimizer = trained(PACKED)
    other = PACE(model.parameters(), lr=0.0, weight_decay=0.0)
    with optimizer.editing_weights():
        step(other, 0)
    for _ in range(3):
        with other.averaged(model):
            pass
        step(optimizer, 7)
        for _ in range(2):
            with other.averaged(model):
                pass
            with optimizer.averaged(model), other.averaged(model):
                pass
    step(optimizer, 7)


def test_editing_weights_around_a_step_or_around_nothing() -> None:
    model, optimizer = trained(PACKED)
    step(optimizer, 3)
    for param in model.parameters():
        param.grad.view(-1)[0] = torch.nan
    optimizer.step()
    before = bits(optimizer)
    with optimizer.editing_weights():
        pass
    assert bits(optimizer) == before  # NaN is not equal to itself
    model, optimizer = trained(PACKED)
    with optimizer.editing_weights():
        step(optimizer, 3)
    assert bits(optimizer) == bits(trained(PACKED, 4)[1])


def test_views_of_one_tensor_count_their_writes_together() -> None:
    flat = torch.randn(3, 64, 64)
    params = [nn.Parameter(part) for part in flat]
    optimizer = PACE([{"params": params[:2]}, {"params": params[2:]}], ema_bits=8)
    for t in range(4):
        step(optimizer, t)
        optimizer.state_dict()


def test_what_lies_in_its_format_is_not_made_again() -> None:
    model, optimizer = trained({"state_bits": 8, "ema_bits": 24, "master_weight_bits": 32}, 5)
    param = model[0].weight
    before = dict(optimizer.state[param])
    after = converted(before, param, Formats(8, 8, 32))
    assert all(after[name] is before[name] for name in before if name.startswith("exp_avg") or name == "remainder")
    mixed = {**before, "exp_avg_sq": in_floats(before, param)["exp_avg_sq"]}  # m in codes, v not
    del mixed["exp_avg_sq_codes"], mixed["exp_avg_sq_scales"]
    optimizer.state[param] = mixed
    optimizer.param_groups[0]["lr"] = 0.0
    v = mixed["exp_avg_sq"].clone()
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.allclose(in_floats(optimizer.state[param], param)["exp_avg_sq"], v, rtol=0.1)


def test_weights_loaded_during_an_evaluation_keep_the_average() -> None:
    model, optimizer = trained(PACKED)
    before = averages(model, optimizer)
    optimizer.eval()
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight * 1.5)
    loaded = model[0].weight.detach().clone()
    optimizer.train(keep="loaded")
    assert torch.equal(model[0].weight, loaded) and not optimizer.state[model[0].weight]["remainder"].any()
    apart = (before[0] - loaded.float()).view(-1, 32).abs().amax(1, keepdim=True)
    assert bool(((averages(model, optimizer)[0] - before[0]).view(-1, 32).abs() <= apart * 2.0**-7 * 1.033).all())
    step(optimizer, 9)


# ---- steps -----------------------------------------------------------------------------------------------------------


def test_steps_that_are_left_undone_change_nothing_and_a_resting_average_no_code() -> None:
    _, optimizer = trained({**PACKED, "skip_nonfinite": True})
    before = bits(optimizer)
    for group in optimizer.param_groups:
        group["params"][0].grad[0, 0] = torch.nan
    optimizer.step()
    assert bits(optimizer) == before and optimizer.skipped_steps == 1
    _, still = trained({**PACKED, "ema_bits": 16, "weight_decay": 0.0})
    state = still.state[still.param_groups[0]["params"][0]]
    weight, e = weight_in(still.param_groups[0]["params"][0], state), floats(still)[0]["ema"]
    for group in still.param_groups:
        group |= {"lr": 0.0, "ema_kappa": None, "beta_ema": 0.0}
    for t in range(5):
        step(still, t)
    assert torch.equal(weight_in(still.param_groups[0]["params"][0], state), weight)
    assert torch.equal(floats(still)[0]["ema"], e)


def test_parameters_over_one_memory_are_refused() -> None:
    one = torch.ones(64, 64)
    for options, in_groups in itertools.product(({"ema_bits": 8}, {"ema_bits": 16}), (False, True)):
        params = [nn.Parameter(one), nn.Parameter(one)]
        twins = PACE([{"params": [p]} for p in params] if in_groups else params, **options)
        with pytest.raises(RuntimeError, match="two parameters share one memory"):
            step(twins, 0)
        assert bool((one == 1).all()) and not twins.state
    step(PACE([nn.Parameter(one), nn.Parameter(one)], state_bits=8, ema_bits=24), 0)
    groups = [{"params": [nn.Parameter(one), nn.Parameter(one)]}, {"params": [nn.Parameter(one + 1)], "ema_bits": 8}]
    step(PACE(groups), 0)


@pytest.mark.parametrize("bits", (32, 16))
def test_a_flattened_checkpoint_of_another_format_is_refused_by_its_cause(bits: Any) -> None:
    from torch.distributed.checkpoint import state_dict as of_torch

    flat = of_torch.StateDictOptions(flatten_optimizer_state_dict=True)
    saved: dict[str, Any] = {}
    for options in ({"state_bits": 8}, {} if bits == 32 else {"state_bits": bits}):
        model = torch.nn.Linear(64, 64)
        optimizer = PACE(model.parameters(), **options)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.zero_grad()
        if not saved:
            saved = copy.deepcopy(of_torch.get_optimizer_state_dict(model, optimizer, options=flat))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"has no .*exp_avg.* flattened distributed .*save it without flattening"):
        of_torch.set_optimizer_state_dict(model, optimizer, saved, options=flat)
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(v, after[0][k]) for k, v in before["state"][0].items())
