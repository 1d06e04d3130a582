"""Promise: whatever torch.optim takes as an option works here, means the same, and is refused before anything changes
where it is not allowed: when it is given, when it is replaced, and when it is edited in place."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from collections import UserList
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from pace_kernels import MADA, PACE, ScheduleFreeAdamW
from pace_kernels.definitions import DEFINITIONS
from pace_kernels.definitions.kit import Option
from pace_kernels.states import moved

Make = Callable[..., Any]


def lion(params: Any, **options: Any) -> MADA:
    return MADA.preset("lion", params, **options)


def adamw(params: Any, **options: Any) -> MADA:
    return MADA.preset("adamw", params, **options)


def param(*values: float) -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.tensor(values or (1.0, -2.0, 3.0)))
    p.grad = torch.full_like(p, 0.5)
    return p


def trained(make: Make, options: dict[str, Any], steps: int = 3) -> torch.Tensor:
    p = param()
    optimizer = make([p], **options)
    for k in range(steps):
        p.grad = torch.tensor([0.5, -0.25, 1.0]) * (-1) ** k
        optimizer.step()
    return p.detach()


# ---- what is given ----

SEQUENCES: dict[str, Callable[[Sequence[Any]], Any]] = {
    "tuple": tuple,
    "list": list,
    "a sequence of another library": UserList,  # such as ListConfig: no tuple and no list
    "array": np.array,
    "tensor": lambda values: torch.tensor(values, dtype=torch.float64),
    "numbers of NumPy": lambda values: [np.float64(value) for value in values],
    "tensors": lambda values: tuple(torch.tensor(value, dtype=torch.float64) for value in values),
    "arrays without a dimension": lambda values: [np.array(value) for value in values],
    "fractions": lambda values: [Fraction(value) for value in values],
}
SIX = (1e-3, 2e-3, 0.1, 0.2, 0.3, 0.4)
PLAIN: list[tuple[Make, str, Any, Callable[[Any, Any], Any]]] = [
    (PACE, "betas", (0.75, 0.875), lambda form, value: form(value)),
    (adamw, "betas", (0.75, 0.875), lambda form, value: form(value)),
    (lion, "lion_betas", (0.75, 0.875), lambda form, value: form(value)),
    (MADA, "hyper_lr", SIX, lambda form, value: form(value)),
    (MADA, "bounds", {"c": (0.25, 1.0), "rho": (0.0, 0.5)}, lambda form, v: {k: form(pair) for k, pair in v.items()}),
]


@pytest.mark.parametrize("form", SEQUENCES)
@pytest.mark.parametrize(("make", "name", "value", "in_form"), PLAIN, ids=lambda case: getattr(case, "__name__", ""))
def test_sequences_of_any_library(make: Make, name: str, value: Any, in_form: Any, form: str) -> None:
    given = in_form(SEQUENCES[form], value)
    plain = make([param()], **{name: value}).param_groups[0][name]
    optimizer = make([param()], **{name: given})
    for kept in (optimizer.defaults[name], optimizer.param_groups[0][name]):
        numbers = [number for item in kept for number in (item if isinstance(item, tuple) else (item,))]
        assert all(type(number) is float for number in numbers)
        assert type(kept) is (list if isinstance(given, list) and name.endswith("betas") else tuple)
        assert tuple(kept) == tuple(plain)
    assert torch.equal(trained(make, {name: given}), trained(make, {name: value}))


@pytest.mark.parametrize(
    "names", [["beta1"], ("beta1",), {"beta1"}, UserList(["beta1"]), np.array(["beta1"])], ids=repr
)
def test_names_to_learn_in_any_sequence(names: Any) -> None:
    assert MADA([param()], learn=names).param_groups[0]["learn"] == ("beta1",)


NUMBERS: dict[str, Callable[[float], Any]] = {
    "NumPy": np.float64,
    "array": np.array,
    "tensor": lambda value: torch.tensor(value, dtype=torch.float64),
    "tensor with one element": lambda value: torch.tensor([value], dtype=torch.float64),
    "fraction": Fraction,
}


@pytest.mark.parametrize("form", NUMBERS)
@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (PACE, "weight_decay", 0.25),
        (PACE, "eps", 2.0**-20),
        (PACE, "ema_kappa", 0.5),
        (MADA, "rho", 0.5),
        (MADA, "hyper_momentum", 0.5),
        (MADA, "hyper_clip", 2.0),
    ],
)
def test_numbers_of_any_library(make: Make, name: str, value: float, form: str) -> None:
    assert torch.equal(trained(make, {name: NUMBERS[form](value)}), trained(make, {name: value}))


@pytest.mark.parametrize("make", [torch.optim.AdamW, PACE, MADA, adamw])
def test_options_that_change_nothing(make: Make) -> None:
    for options in (
        {"foreach": True},
        {"foreach": False},
        {"fused": False},
        {"fused": True},
        {"differentiable": False},
    ):
        optimizer = make([param()], **options)
        assert getattr(optimizer, "_step_supports_amp_scaling", False) is options.get("fused", False)
        optimizer.step()
        if make is not torch.optim.AdamW:  # there a copy forgets it
            copies = (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)))
            assert all(c._step_supports_amp_scaling is options.get("fused", False) for c in copies)
            assert torch.equal(trained(make, options), trained(make, {}))
    make([{"params": [param()], "foreach": False, "fused": None, "differentiable": False}]).step()


@pytest.mark.parametrize("make", [PACE, MADA])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"differentiable": True}, "differentiable must be False.*got True"),
        ({"fused": "yes"}, "fused must be None, True or False, got 'yes'"),
        ({"foreach": 1}, "foreach must be None, True or False, got 1"),
        ({"ema_update_freq": 2**63}, r"ema_update_freq must be an integer >= 1 and < 2\*\*63"),
        ({"ema_update_freq": 1.5}, "ema_update_freq must be an integer >= 1, got 1.5"),
        ({"eps": 10**400}, "eps must be finite"),
        ({"betas": torch.tensor(0.5)}, r"betas must be two numbers in \[0, 1\), got tensor"),
        ({"betas": "ab"}, r"betas must be two numbers in \[0, 1\), got 'ab'"),
        ({"betas": {0.9: 1, 0.99: 2}}, "betas must be two numbers"),
        ({"betas": (torch.tensor(0.9), torch.tensor(1.5))}, r"betas\[1\] must be in \[0, 1\)"),
    ],
    ids=str,
)
def test_refused(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make([param()], **options)
    with pytest.raises(ValueError, match=message):
        make([{"params": [param()], **options}])


DEFINED = [
    (kind, option)
    for kind in (PACE, MADA, ScheduleFreeAdamW)
    for option in DEFINITIONS[kind._OPERATOR].options
    if option.name in inspect.signature(kind).parameters and (option.allowed or option.type == "bool")
]


@pytest.mark.parametrize(("make", "option"), DEFINED, ids=lambda value: getattr(value, "name", None))
def test_what_a_definition_does_not_allow_is_refused(make: Make, option: Option) -> None:
    for wrong in (-1, "one", [0.5, 0.5]):
        with pytest.raises((ValueError, TypeError), match=f"^{option.name} must be "):
            make([param()], **{option.name: wrong})
        optimizer = make([param()])
        optimizer.param_groups[0][option.name] = wrong
        with pytest.raises((ValueError, TypeError), match=f"^{option.name} must be "):
            optimizer.step()


# ---- what is replaced, or edited in place ----

EDITED: list[tuple[Make, str]] = [(PACE, "betas"), (adamw, "betas"), (lion, "lion_betas"), (MADA, "lion_betas")]


@pytest.mark.parametrize(("make", "name"), EDITED)
def test_a_list_that_is_edited_in_place_is_heeded(make: Make, name: str) -> None:
    ends = []
    for how in ("in place", "replaced", "given", "not at all"):
        p = param()
        optimizer = make([p], lr=0.1, **{name: [0.5, 0.75] if how == "given" else [0.9, 0.99]})
        group = optimizer.param_groups[0]
        if how == "in place":
            group[name][0] = 0.5
            group[name][1] = 0.75
        elif how == "replaced":
            group[name] = (torch.tensor(0.5), 0.75)
        for k in range(4):
            # The sign of what Lion steps by depends on both coefficients.
            p.grad = torch.tensor([8.0, 1.0, 0.3]) if k == 0 else torch.tensor([-1.0, -0.5, -0.25])
            optimizer.step()
        ends.append(p.detach().clone())
        assert tuple(group[name]) == ((0.9, 0.99) if how == "not at all" else (0.5, 0.75))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])
    assert not torch.equal(ends[0], ends[3]) or make is MADA  # there γ starts at 1, so that u comes in later


@pytest.mark.parametrize(("make", "name"), EDITED)
@pytest.mark.parametrize("value", [float("nan"), 1.0, -0.1, "x"])
def test_an_illegal_value_set_in_place_is_refused(make: Make, name: str, value: Any) -> None:
    p = param()
    optimizer = make([{"params": [param()]}, {"params": [p], name: [0.9, 0.99]}])
    optimizer.step()
    before = copy.deepcopy((p, optimizer.state_dict()))
    optimizer.param_groups[1][name][1] = value
    with pytest.raises((ValueError, TypeError), match=rf"{name}\[1\] must be"):
        optimizer.step()
    assert torch.equal(p, before[0])
    optimizer.param_groups[1][name][1] = 0.99
    for key, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[1]["state"][key][k]) for k, value in state.items())
    optimizer.step()
    assert not torch.equal(p, before[0])


@pytest.mark.parametrize("make", [PACE, adamw])
@pytest.mark.parametrize("scheduler", ["CyclicLR", "OneCycleLR"])
def test_schedulers_that_put_tensors_there(make: Make, scheduler: str) -> None:
    def trained(kind: Make, number: Callable[[float], Any]) -> torch.Tensor:
        p = param()
        optimizer = kind([p], lr=0.1, weight_decay=0.0, **({"lambda_pullback": 0.0} if kind is PACE else {}))
        if scheduler == "CyclicLR":
            momenta = {"base_momentum": number(0.5), "max_momentum": number(0.75)}
            s: Any = torch.optim.lr_scheduler.CyclicLR(optimizer, number(0.125), number(0.25), 2, **momenta)
        else:
            momenta = {"base_momentum": number(0.5), "max_momentum": number(0.75)}
            s = torch.optim.lr_scheduler.OneCycleLR(optimizer, number(0.25), total_steps=6, **momenta)
        for k in range(5):
            p.grad = torch.tensor([0.5, -0.25, 1.0]) * (-1) ** k
            optimizer.step()
            s.step()
        return p.detach()

    for number in (torch.tensor, float):
        theirs = trained(torch.optim.AdamW, number)
        torch.testing.assert_close(trained(make, number), theirs, rtol=1e-6, atol=1e-6)  # a few roundings a step


def test_a_checkpoint_of_adamw_with_tensor_betas() -> None:
    p = param()
    theirs = torch.optim.AdamW([p], betas=(torch.tensor(0.5), torch.tensor(0.75)))
    theirs.step()
    for make in (PACE, adamw):
        ours = make([param()])
        ours.load_state_dict(theirs.state_dict())
        assert ours.param_groups[0]["betas"] == (0.5, 0.75)
        ours.step()


# ---- whose options they are ----


class Wrapper(torch.optim.Optimizer):
    """As SAM does it: its own options are in the groups that it hands over."""

    def __init__(self, params: Any, base: Make, own: dict[str, Any], **options: Any) -> None:
        super().__init__(params, {**own, **options})
        self.base = base(self.param_groups, **options)


@pytest.mark.parametrize(
    ("make", "own", "name"),
    [
        (MADA, {"rho": 0.05, "adaptive": False}, "rho"),
        (MADA, {"gamma": 0.5, "alpha": 0.1}, "gamma"),
        (MADA, {"coefficients": "global", "k": 5}, "coefficients"),
        (PACE, {"beta_ema": 0.5, "k": 5}, "beta_ema"),
        (PACE, {"log_stats": True, "k": 5}, "log_stats"),
    ],
    ids=str,
)
def test_options_of_a_wrapper_are_refused_by_name(make: Make, own: dict[str, Any], name: str) -> None:
    (stranger,) = own.keys() - {name}
    message = rf"param_groups\[0\] has {name} beside {stranger}, which {make.__name__} does not know"
    with pytest.raises(ValueError, match=message):
        Wrapper([param()], make, own, lr=0.1)
    Wrapper([param()], torch.optim.AdamW, own, lr=0.1).base.step()
    # The ways out that the sentence names.
    Wrapper(
        [param()], lambda groups, **o: make([{"params": g["params"]} for g in groups], **o), own, lr=0.1
    ).base.step()
    # Options of a wrapper that have no name of ours change nothing.
    Wrapper([param()], make, {stranger: own[stranger]}, lr=0.1).base.step()


@pytest.mark.parametrize("make", [PACE, MADA])
def test_a_checkpoint_with_options_of_a_wrapper_is_refused(make: Make) -> None:
    name = "rho" if make is MADA else "beta_ema"
    wrapped = Wrapper([param()], torch.optim.AdamW, {name: 0.05, "adaptive": False}, lr=0.1)
    wrapped.base.step()
    optimizer = make([param()])
    before = optimizer.param_groups[0][name]
    with pytest.raises(ValueError, match=f"has {name} beside adaptive"):
        optimizer.load_state_dict(wrapped.base.state_dict())
    assert optimizer.param_groups[0][name] == before and not optimizer.state


KEYS_OF_OTHERS = ["initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "name", "lr_scale", "swa_lr"]


@pytest.mark.parametrize("key", KEYS_OF_OTHERS)
def test_keys_of_torch_beside_an_option_of_a_group(key: str) -> None:
    p = param()
    optimizer = MADA([{"params": [p], "rho": 0.5, key: 0.1}], learn=())
    assert optimizer.param_groups[0]["rho"] == 0.5 and optimizer.param_groups[0][key] == 0.1
    optimizer.step()
    optimizer.param_groups[0]["tag of the user"] = 1
    saved = optimizer.state_dict()
    MADA([param()], learn=()).load_state_dict(saved)


# ---- groups that others rebuild ----

REBUILT: dict[str, Callable[[list[dict[str, Any]]], list[dict[str, Any]]]] = {
    "copies": lambda groups: [dict(group) for group in groups],
    "deep copies but of the parameters": lambda groups: [
        {k: v if k == "params" else copy.deepcopy(v) for k, v in group.items()} for group in groups
    ],
    "in another order": lambda groups: [dict(sorted(group.items())) for group in groups],
}


@pytest.mark.parametrize("how", REBUILT)
@pytest.mark.parametrize(
    ("make", "options"),
    [(torch.optim.AdamW, {}), (PACE, {}), (adamw, {}), (MADA, {"hyper_warmup": 0}), (MADA, {"coefficients": "group"})],
)
def test_param_groups_are_replaced(make: Make, options: dict[str, Any], how: str) -> None:
    def trained(rebuilt: bool) -> list[torch.Tensor]:
        params = [param(), param(0.5)]
        optimizer = make([{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.5}], **options)
        for k in range(6):
            for p in params:
                p.grad = torch.full_like(p, 0.5 - k)
            if rebuilt and k in (1, 2, 4):
                optimizer.param_groups = REBUILT[how](optimizer.param_groups)
            if k == 3:  # MADA's last step is redone by the options that it was taken with
                optimizer.param_groups[0]["eps"] = 1e-3
            optimizer.step()
        return [p.detach() for p in params]

    assert all(map(torch.equal, trained(True), trained(False)))


@pytest.mark.parametrize("make", [torch.optim.AdamW, PACE, MADA])
def test_a_removed_group_is_freed(make: Make) -> None:
    kept, removed = param(), param(2.0)
    optimizer = make([{"params": [kept]}, {"params": [removed]}])
    optimizer.step()
    gone = weakref.ref(removed)
    del optimizer.param_groups[1], optimizer.state[removed], removed
    gc.collect()
    assert gone() is None
    optimizer.step()


# ---- frozen parameters ----

FROZEN: dict[str, Callable[[], torch.Tensor]] = {
    "uint8": lambda: torch.zeros(4, dtype=torch.uint8),
    "int8": lambda: torch.zeros(4, dtype=torch.int8),
    "bool": lambda: torch.zeros(4, dtype=torch.bool),
    "float8": lambda: torch.zeros(4).to(torch.float8_e4m3fn),
    "complex": lambda: torch.zeros(4, dtype=torch.complex64),
    "expanded": lambda: torch.zeros(1).expand(4),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("kind", FROZEN)
@pytest.mark.parametrize("make", [torch.optim.AdamW, PACE, MADA])
def test_frozen_parameters_of_any_kind(make: Make, kind: str) -> None:
    adapter, alone = param(), param()
    optimizer = make([torch.nn.Parameter(FROZEN[kind](), requires_grad=False), adapter])
    reference = make([alone])
    for _ in range(2):
        optimizer.step()
        reference.step()
    assert torch.equal(adapter, alone)
    again = make([torch.nn.Parameter(FROZEN[kind](), requires_grad=False), param()])
    again.load_state_dict(optimizer.state_dict())
    if make is not torch.optim.AdamW:
        with optimizer.averaged():
            assert torch.equal(adapter, reference.state[alone].get("ema", alone))


def test_pinned_memory_is_read_before_the_caller_may_write_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its copy to a GPU is made later, when the GPU gets there; within a capture each replay reads it."""
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda t: True)
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *_, **__: sent.append(t) or t)
    value = torch.tensor(0.5)
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda its=capturing: its)
        moved(value, torch.device("cuda"))
    value.fill_(2.0)
    assert [t.item() for t in sent] == [0.5, 2.0]
