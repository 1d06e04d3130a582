"""Promise: with hyper_order="published" each step has the bits of the other order's step with the coefficients that the
step's own gradient made. tests/test_mada_exactness.py compares these with the paper's, in float64."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from mada_cases import CASES
from pace_cases import assert_same_bits, gradients, weights

from pace_kernels import MADA, backends

STEPS = 8
BACKENDS = [name for name in ("cpu", "torch") if backends()[name].available]
LEARNING = {name: o for name, o in CASES.items() if o.get("learn") != () and not o.get("capturable")}


def train(dtype: torch.dtype, path: list[list[float]] | None, order: str, **options: Any) -> tuple[list[Any], MADA]:
    """``path``: the coefficients after each step of the published order, or before each of the other."""
    params = weights(dtype)
    optimizer = MADA(params, **{"lr": 1e-2, **options}, hyper_order=order)
    values = optimizer.param_groups[0]["coefficient_values"]
    for t, grads in enumerate(gradients(STEPS, dtype)):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        if path is not None and order == "algorithm":
            values.copy_(torch.tensor(path[t], dtype=torch.float64))
        optimizer.step()
        if path is not None and order == "published":
            path.append(values.tolist())
    return params, optimizer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", LEARNING)
def test_a_step_takes_the_coefficients_that_its_gradient_made(case: str, dtype: torch.dtype, backend: str) -> None:
    options = {"rho": 0.3, **LEARNING[case], "backend": backend, "hyper_lr": 0.01}
    path: list[list[float]] = []
    ours = train(dtype, path, "published", **{**options, "hyper_warmup": 2})
    assert path[0] == path[1] != path[-1]
    theirs = train(dtype, path, "algorithm", **{**options, "hyper_warmup": 1000})
    assert_same_bits(ours, theirs)
    assert ours[1].hypergradients == theirs[1].hypergradients


@pytest.mark.parametrize(
    "options", [{"master_weight_bits": 24}, {"master_weight_bits": 32}, {"stochastic_rounding": True}]
)
def test_weights_of_more_bits_are_written_once(options: dict[str, Any]) -> None:
    path: list[list[float]] = []
    ours = train(torch.bfloat16, path, "published", hyper_warmup=2, **options)
    assert_same_bits(ours, train(torch.bfloat16, path, "algorithm", hyper_warmup=1000, **options))


def step(params: list[Any], optimizer: Any, t: int, bad: bool = False) -> None:
    for k, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * t + k))
    if bad:
        params[-1].grad.view(-1)[0] = torch.inf
    optimizer.step()


def two_groups(**options: Any) -> tuple[list[torch.nn.Parameter], MADA]:
    params = [torch.nn.Parameter(torch.ones(n)) for n in (40, 3, 7)]
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]
    return params, MADA(groups, lr=1e-2, hyper_warmup=1, hyper_lr=0.01, hyper_order="published", **options)


@pytest.mark.parametrize("coefficients", ["global", "group"])
@pytest.mark.parametrize("way", ["load_state_dict", "deepcopy", "undone", "frozen"])
def test_training_goes_on(way: str, coefficients: str) -> None:
    """With the bits of one that nothing came between."""
    one = two_groups(coefficients=coefficients, skip_nonfinite=True)
    other = two_groups(coefficients=coefficients, skip_nonfinite=True)
    for t in range(9):
        if t in (0, 4) and way == "undone":
            step(*one, 100 + t, bad=True)
        elif t == 4 and way == "load_state_dict":
            fresh = two_groups(coefficients=coefficients, skip_nonfinite=True)
            with torch.no_grad():
                torch._foreach_copy_(fresh[0], one[0])
            fresh[1].load_state_dict(copy.deepcopy(one[1].state_dict()))
            one = fresh
        elif t == 4 and way == "deepcopy":
            one = copy.deepcopy(one)
        elif t == 4 and way == "frozen":
            before = one[1].coefficients
            for each in (one, other):
                each[1].freeze()
            assert one[1].coefficients == before
        step(*one, t)
        step(*other, t)
    assert_same_bits(one, other)
    assert one[1].coefficients == other[1].coefficients
    assert one[1].skipped_steps == (2 if way == "undone" else 0)


def test_an_interrupted_first_pass_is_no_step() -> None:
    """Moments are up to date by then, and weights are not: a state that nobody may save."""
    params, optimizer = two_groups()
    for t in range(3):
        step(params, optimizer, t)

    def stop() -> Any:
        raise KeyboardInterrupt

    optimizer._learning = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        step(params, optimizer, 3)
    with pytest.raises(RuntimeError, match=re.escape("state_dict() in the middle of a step")):
        optimizer.state_dict()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hyper_order": "paper"}, 'hyper_order must be "algorithm" or "published", got \'paper\''),
    ({"hyper_order": "published", "learn": ()}, "hyper_order was given, but learn is empty"),
    (
        {"hyper_order": "published", "capturable": True},
        'capturable must be False with hyper_order="published", got True',
    ),
    ({"hyper_order": "published", "state_bits": 8}, 'state_bits must be 32 with hyper_order="published", got 8'),
    (
        {"hyper_order": "published", "ema_bits": 24, "use_ema_eval": True},
        "ema_bits must be None or 32 with hyper_order",
    ),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSED, ids=lambda a: str(a))
def test_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        MADA([torch.nn.Parameter(torch.ones(64, 64))], **options)


def test_groups_have_one_order() -> None:
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(3))], "hyper_order": order} for order in ("published", "algorithm")
    ]
    with pytest.raises(ValueError, match="hyper_order must be the same in all groups, got 'algorithm'"):
        MADA(groups, coefficients="group")
