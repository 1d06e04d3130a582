"""Promise: whatever a checkpoint holds, in whichever place, load_state_dict either takes it, and the next step works,
or raises ValueError or TypeError and has changed nothing."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint_failures import assert_untouched, snapshot, training_of
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from pace_kernels import MADA, PACE

HUGE = 10**400
# Options that hold what nothing here writes. Each is refused by a sentence that names the option.
ODD: dict[str, tuple[str, Any]] = {
    "weight_decay, a matrix": ("weight_decay", torch.zeros(3, 4)),
    "weight_decay, complex": ("weight_decay", torch.tensor(1j)),
    "weight_decay, on meta": ("weight_decay", torch.zeros((), device="meta")),
    "weight_decay, an array": ("weight_decay", np.zeros(3)),
    "ema_rho, beyond floats": ("ema_rho", HUGE),
    "ema_rho, a fraction beyond floats": ("ema_rho", Fraction(HUGE)),
    "ema_rho, a decimal": ("ema_rho", Decimal("NaN")),
    "beta_ema, a tensor of truth": ("beta_ema", torch.tensor(True)),
    "betas, a tensor": ("betas", torch.tensor(0.5)),
    "betas, matrices": ("betas", torch.ones(2, 2) / 2),
    "betas, beyond floats": ("betas", (0.9, HUGE)),
    "betas, None": ("betas", None),
    "lr, beyond floats": ("lr", HUGE),
    "lr, a string": ("lr", "0.1"),
    "ema_update_freq, beyond 64 bits": ("ema_update_freq", 2**63),
    "ema_update_freq, many digits": ("ema_update_freq", 10**5000),
    "ema_update_freq, a matrix": ("ema_update_freq", torch.ones(2, 2)),
    "pullback_from, an array": ("pullback_from", np.array(["step", "weights"])),
    "maximize, a tensor": ("maximize", torch.tensor([True, False])),
    "skipped_steps, beyond 64 bits": ("skipped_steps", 2**63),
    "skipped_steps, two": ("skipped_steps", torch.ones(2)),
    "format_version, a tensor": ("format_version", torch.ones(2)),
    "state_names, a tensor": ("state_names", torch.ones(2)),
    "param_names, of one": ("param_names", ["weight"]),
    "param_names, an array": ("param_names", np.array([1, 2])),
}
ODD_OF_MADA: dict[str, tuple[str, Any]] = {
    "hyper_clip, beyond floats": ("hyper_clip", HUGE),
    "hyper_warmup, beyond 64 bits": ("hyper_warmup", 2**63),
    "bounds, of one": ("bounds", {"rho": (0.5,)}),
    "bounds, a string": ("bounds", "wide"),
    "bounds, beyond floats": ("bounds", {"rho": (0, HUGE)}),
    "lion_betas, a matrix": ("lion_betas", np.ones((2, 2))),
    "learn, numbers": ("learn", (1, 2)),
    "coefficient_values, a list": ("coefficient_values", [0.5] * 6),
    "last_options, of strings": ("last_options", (("x",) * 10, ())),
    "frozen, of strings": ("frozen", ("x",) * 6),
}


@pytest.mark.parametrize(
    ("script", "how"), [("PACE", how) for how in ODD] + [("MADA, pulled", how) for how in (*ODD, *ODD_OF_MADA)]
)
def test_an_odd_option_is_refused_by_name(script: str, how: str) -> None:
    name, value = {**ODD, **ODD_OF_MADA}[how]
    training = training_of(script)
    saved = copy.deepcopy(training.optimizer.state_dict())
    saved["param_groups"][1][name] = value
    assert_untouched(training, lambda optimizer: optimizer.load_state_dict(saved), name)


# ---- anything, anywhere ----

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 2**24, 2**63, -(2**63) - 1, HUGE, 10**5000),
    *(0.0, 0.5, 1.0, 1e-300, 1e300, math.nan, math.inf, -math.inf, 1j, Fraction(1, 3), Decimal("0.5")),
    *("", "x", "step", b"x", (), [], {}, set(), (0.5, 0.5), [0.9, 0.99], {"beta1": 0.5}, ("exp_avg",), object()),
    *(np.float64(0.5), np.int64(3), np.array(0.5), np.ones(2), np.array(["a", "b"]), np.bool_(True)),
    *(torch.tensor(0.5), torch.tensor(3), torch.tensor(True), torch.ones(2), torch.ones(2, 2), torch.empty(0)),
    *(torch.tensor(1j), torch.ones((), device="meta"), torch.eye(2).to_sparse(), torch.tensor(math.nan)),
    *(torch.ones(6, dtype=torch.float64), torch.full((8,), math.nan), torch.ones(4, 3, 2, 2) / 2, torch.ones(4) / 2),
    torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """All places in nested containers, the keys that lead there."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value in one place; without one, nothing is there."""
    key, *rest = path
    if isinstance(value, tuple):
        return tuple(changed(list(value), path, new))
    copied = copy.copy(value)
    if rest:
        copied[key] = changed(copied[key], tuple(rest), new)
    elif new is None and isinstance(copied, dict):
        del copied[key]
    else:
        copied[key] = new
    return copied


SCRIPTS = ["PACE", "PACE, capturable, lr a tensor", "MADA, pulled", "MADA, by group", "Adan"]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
@given(data=st.data(), swapped=st.booleans())
@settings(max_examples=150, deadline=None)
def test_whatever_a_checkpoint_holds(script: str, data: st.DataObject, swapped: bool) -> None:
    other = training_of(script, swapped)
    other.optimizer.train() if not swapped else None
    saved = other.optimizer.state_dict()
    for _ in range(data.draw(st.integers(1, 3))):
        if not (found := list(places(saved))):
            break
        path = data.draw(st.sampled_from(found))
        saved = changed(saved, path, data.draw(st.sampled_from(VALUES)))
    training = training_of(script)
    before = snapshot(training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is loaded from elsewhere
        try:
            training.optimizer.load_state_dict(saved)
        except (ValueError, TypeError):
            assert snapshot(training) == before
            return
    training.optimizer.train()
    training.step(20, set(), 1.0)
    assert all("must be" not in text and "finite" not in text for text in training.refused), training.refused


# ---- flat checkpoints, and those of others ----

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def model_with_gradients() -> torch.nn.Module:
    model = torch.nn.Linear(3, 2)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model


@pytest.mark.parametrize("kind", [PACE, MADA])
def test_a_flat_checkpoint_that_lost_its_states_is_refused(kind: Any) -> None:
    """torch makes no states to fill where parameters have gradients."""
    model, other = model_with_gradients(), model_with_gradients()
    saved = kind(model.parameters())
    saved.step()
    flat = get_optimizer_state_dict(model, saved, options=FLAT)
    optimizer = kind(other.parameters())
    with pytest.raises(ValueError, match=r"was saved with states \(.*exp_avg.*and none of them came along.*zero_grad"):
        set_optimizer_state_dict(other, optimizer, flat, options=FLAT)
    assert not any(optimizer.state.values())
    optimizer.zero_grad()  # the way out
    set_optimizer_state_dict(other, optimizer, flat, options=FLAT)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[q].keys() == saved.state[p].keys()
        assert all(torch.equal(value, saved.state[p][name]) for name, value in optimizer.state[q].items())


def test_a_flat_checkpoint_of_an_optimizer_that_never_stepped_loads() -> None:
    model, other = torch.nn.Linear(3, 2), model_with_gradients()
    state = PACE(model.parameters()).state_dict()
    PACE(other.parameters()).load_state_dict(state)


@pytest.mark.parametrize("named", [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, PACE, MADA])
def test_named_and_unnamed(kind: Any, named: tuple[bool, bool]) -> None:
    models = [model_with_gradients() for _ in named]
    first, second = (
        kind(m.named_parameters() if names else m.parameters()) for m, names in zip(models, named, strict=True)
    )
    first.step()
    second.load_state_dict(first.state_dict())
    second.step()
    assert ("param_names" in second.param_groups[0]) == any(named)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_checkpoint_of_adamw_is_a_start_and_says_once_where_the_average_begins(groups: int) -> None:
    model = model_with_gradients()
    params = [[p] for p in model.parameters()] if groups == 2 else [list(model.parameters())]
    theirs = torch.optim.AdamW([{"params": some} for some in params])
    theirs.step()
    saved = theirs.state_dict()
    ours = PACE([{"params": some} for some in params], ema_kappa=None, beta_ema=0.0)
    with pytest.warns(UserWarning) as said:
        ours.load_state_dict(saved)
    assert [str(w.message) for w in said] == [
        "the checkpoint has no averages: they start at the weights before the next step"
    ]
    start = [p.detach().clone() for p in model.parameters()]
    ours.step()
    assert all(torch.equal(ours.state[p]["ema"], x) for p, x in zip(model.parameters(), start, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PACE([{"params": some} for some in params], use_ema_eval=False, lambda_pullback=0.0).load_state_dict(saved)
        ours.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("step", [2**24 - 1, 2**24, 2**24 + 1, 2**40 + 1, 2**53])
@pytest.mark.parametrize("kind", [PACE, MADA])
def test_steps_that_float32_does_not_count_are_kept(kind: Any, step: int) -> None:
    (p,) = params = [torch.nn.Parameter(torch.ones(3))]
    p.grad = torch.ones(3)
    optimizer = kind(params)
    optimizer.step()
    for value in (step, torch.tensor(float(step), dtype=torch.float64)):
        saved = optimizer.state_dict()
        saved["state"][0] = {**saved["state"][0], "step": value}
        other = kind([torch.nn.Parameter(torch.ones(3))])
        other.load_state_dict(saved)
        (kept,) = (state["step"] for state in other.state.values())
        assert int(kept.item()) == step and kept.dtype == (torch.float32 if step <= 2**24 else torch.float64)


def test_statistics_that_nobody_asked_for_are_said_to_be_missing_once() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    silent, telling = PACE([p]), PACE([p], log_stats=True)
    with pytest.warns(UserWarning, match="no group has log_stats=True"):
        assert silent.get_step_stats() == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert silent.get_step_stats() == {}
        assert telling.get_step_stats() == {}  # no step yet
        telling.step()
        assert telling.get_step_stats()["adam_step_norm"] > 0
