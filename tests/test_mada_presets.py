"""Promise: each preset of MADA is the optimizer that it is named after, at that one's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pace_cases import gradients, weights
from torch import Tensor

from pace_kernels import MADA

STEPS = 40
LR = 1e-2


def run(make: Callable[[list[Any]], torch.optim.Optimizer], dtype: torch.dtype) -> list[Tensor]:
    params = weights(dtype)
    optimizer = make(params)
    for grads in gradients(STEPS, dtype):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3}, {"betas": (0.5, 0.9)}, {"maximize": True}], ids=str)
def test_adamw_and_amsgrad_are_those_of_torch(amsgrad: bool, options: dict[str, Any]) -> None:
    name = "amsgrad" if amsgrad else "adamw"
    ours = run(lambda p: MADA.preset(name, p, lr=LR, **options), torch.float64)
    adamw = {"lr": LR, "weight_decay": 0.01, **options}
    theirs = run(lambda p: torch.optim.AdamW(p, amsgrad=amsgrad, foreach=False, **adamw), torch.float64)
    for a, b in zip(ours, theirs, strict=True):
        # A step rounds about 10 times in either code, and later steps pass errors on with factors of at most 1.
        torch.testing.assert_close(a, b, rtol=20 * STEPS * 2.0**-53, atol=20 * STEPS * 2.0**-53)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_and_amsgrad_in_float32(amsgrad: bool) -> None:
    name = "amsgrad" if amsgrad else "adamw"
    ours = run(lambda p: MADA.preset(name, p, lr=LR), torch.float32)
    theirs = run(lambda p: torch.optim.AdamW(p, lr=LR, amsgrad=amsgrad, foreach=False), torch.float32)
    for a, b in zip(ours, theirs, strict=True):
        # As above, with u = 2^-24; the moments' own errors, of 3 roundings a step over a memory of at most STEPS
        # steps, enter through α m / sqrt(v), at most 10 α where gradients are of one size.
        torch.testing.assert_close(a, b, rtol=20 * STEPS * 2.0**-24, atol=(20 + 60 * 10 * LR) * STEPS * 2.0**-24)


class Textbook:
    """The published definitions, written out in float64 as their papers have them."""

    def __init__(self, params: list[Any], rule: Callable[[dict[str, Any], Tensor, int], Tensor], decay: float) -> None:
        self.params, self.rule, self.decay = params, rule, decay
        self.states: list[dict[str, Any]] = [{k: torch.zeros_like(p) for k in ("m", "v", "n", "last")} for p in params]
        self.t = 0

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        for p, s in zip(self.params, self.states, strict=True):
            move = self.rule(s, p.grad, self.t)
            p.mul_(1 - LR * self.decay).sub_(LR * move)


def lion(s: dict[str, Any], g: Tensor, t: int) -> Tensor:
    """Chen et al., "Symbolic Discovery of Optimization Algorithms", Algorithm 2."""
    update = (0.9 * s["m"] + 0.1 * g).sign()
    s["m"] = 0.99 * s["m"] + 0.01 * g
    return update


def yogi(s: dict[str, Any], g: Tensor, t: int) -> Tensor:
    """Zaheer et al., "Adaptive Methods for Nonconvex Optimization", Algorithm 2, with Adam's correction of bias."""
    s["m"] = 0.9 * s["m"] + 0.1 * g
    s["v"] = s["v"] - (1 - 0.999) * (s["v"] - g**2).sign() * g**2
    return (s["m"] / (1 - 0.9**t)) / ((s["v"] / (1 - 0.999**t)).sqrt() + 1e-3)


def adan(s: dict[str, Any], g: Tensor, t: int) -> Tensor:
    """Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm", Algorithm 1, decays written as 1 − β of the paper, with
    the correction of bias of its public code for m and v."""
    d = g - s["last"] if t > 1 else torch.zeros_like(g)
    s["last"] = g
    s["m"] = 0.98 * s["m"] + (1 - 0.98) * g
    s["n"] = 0.92 * s["n"] + (1 - 0.92) * d
    s["v"] = 0.99 * s["v"] + (1 - 0.99) * (g + 0.92 * d) ** 2
    return (s["m"] / (1 - 0.98**t) + 0.92 * s["n"]) / ((s["v"] / (1 - 0.99**t)).sqrt() + 1e-8)


def avgrad(s: dict[str, Any], g: Tensor, t: int) -> Tensor:
    """MADA, section 4.1: the mean of all second moments so far in place of their maximum."""
    s["m"] = 0.9 * s["m"] + 0.1 * g
    s["v"] = 0.999 * s["v"] + (1 - 0.999) * g**2
    s.setdefault("all", []).append(s["v"])
    mean = torch.stack(s["all"]).mean(dim=0)
    return (s["m"] / (1 - 0.9**t)) / ((mean / (1 - 0.999**t)).sqrt() + 1e-8)


@pytest.mark.parametrize(("name", "rule", "decay"), [
    ("lion", lion, 0.01), ("yogi", yogi, 0.0), ("adan", adan, 0.02), ("avgrad", avgrad, 0.01),
])  # fmt: skip
def test_the_published_definitions(name: str, rule: Callable[..., Tensor], decay: float) -> None:
    ours = run(lambda p: MADA.preset(name, p, lr=LR), torch.float64)
    theirs = run(lambda p: Textbook(p, rule, decay), torch.float64)
    for a, b in zip(ours, theirs, strict=True):
        # As for AdamW; AVGrad's running mean against a sum of all: STEPS roundings more, halved by the square root.
        torch.testing.assert_close(a, b, rtol=40 * STEPS * 2.0**-53, atol=40 * STEPS * 2.0**-53)


def test_hyperadam_learns_two_coefficients() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = MADA.preset("hyperadam", [param], lr=LR, hyper_warmup=0)
    for t in range(20):
        param.grad = torch.tensor([1.0, -0.5, 0.1]) * (1 + t % 3)
        optimizer.step()
    assert optimizer.hypergradients.keys() == {"beta1", "beta2"}
    q = optimizer.coefficients
    assert isinstance(q, dict)
    assert q["beta1"] != 0.9 and q["beta2"] != 0.999
    assert {k: v for k, v in q.items() if not k.startswith("beta1") and k != "beta2"} == {
        "beta3": 0.0, "rho": 1.0, "c": 1.0, "gamma": 1.0,
    }  # fmt: skip


BYTES = {"adamw": 8, "amsgrad": 12, "avgrad": 12, "adan": 16, "yogi": 8, "lion": 4, "hyperadam": 12}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_of_state_a_parameter(name: str) -> None:
    param = torch.nn.Parameter(torch.ones(1000))
    param.grad = torch.ones(1000)
    optimizer = MADA.preset(name, [param])
    optimizer.step()
    held = sum(v.numel() * v.element_size() for v in optimizer.state[param].values() if v.numel() >= 1000)
    assert held == 1000 * BYTES[name]


def test_presets_take_options_and_refuse_other_names() -> None:
    param = torch.nn.Parameter(torch.ones(1))
    group = MADA.preset("adan", [param], lr=0.5, weight_decay=0.7, lambda_pullback=0.1).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["beta3"], group["betas"]) == (0.5, 0.7, 0.92, (0.98, 0.99))
    assert MADA.preset("adamw", [param], learn=("rho",)).param_groups[0]["learn"] == ("rho",)
    with pytest.raises(ValueError, match="name must be one of adamw, amsgrad, avgrad, adan, yogi, lion, hyperadam"):
        MADA.preset("sgd", [param])


@pytest.mark.parametrize("name", ["lion", "yogi"])
def test_where_a_package_has_the_same_definition_it_has_the_same_result(name: str) -> None:
    """pytorch_optimizer's Lion and Yogi. Its Adan also corrects the bias of n, which MADA's N does not: see above."""
    package = pytest.importorskip("pytorch_optimizer")
    theirs = {
        "lion": lambda p: package.Lion(p, lr=LR, betas=(0.9, 0.99), weight_decay=0.1, weight_decouple=True),
        "yogi": lambda p: package.Yogi(p, lr=LR, betas=(0.9, 0.999), eps=1e-3, initial_accumulator=0.0),
    }[name]
    decay = 0.1 if name == "lion" else 0.0
    ours = run(lambda p: MADA.preset(name, p, lr=LR, weight_decay=decay), torch.float64)
    for a, b in zip(ours, run(theirs, torch.float64), strict=True):
        # As against torch.optim above.
        torch.testing.assert_close(a, b, rtol=20 * STEPS * 2.0**-53, atol=20 * STEPS * 2.0**-53)
