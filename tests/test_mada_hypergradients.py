"""Promise: the float32 kernels' hypergradients are those of float64 within a derived bound.

One step is taken from states that both have exactly. The bound is carried along with the values as in `pace_bound`:
each line of the rule turns the errors of its operands into that of its result, in the order of csrc/rules/mada.h.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mada_cases import CASES
from pace_bound import Bounded, U
from pace_cases import gradients, weights

from pace_kernels import MADA, backends
from pace_kernels.ops import COEFFICIENTS

BACKENDS = [name for name, row in backends().items() if row.available]
LEARNING = [case for case, o in CASES.items() if o.get("learn") != () and not o.get("pullback_from")]


def sqrt(a: Bounded) -> Bounded:
    root = a.value.sqrt()
    # |sqrt(s + δ) − sqrt(s)| is at most δ / sqrt(s), and at most sqrt(δ).
    return Bounded(root, torch.minimum(a.error / root.clamp(min=1e-300), a.error.sqrt())).rounded()


def over(a: Bounded, b: Bounded) -> Bounded:
    low = (b.value.abs() - b.error).clamp(min=1e-300)
    return Bounded(a.value / b.value, (a.error + (a.value / b.value).abs() * b.error) / low).rounded()


def sign(a: Bounded) -> Bounded:
    """The sign, and no idea of it where the error is as large as the value."""
    unsure = (a.error >= a.value.abs()) & (a.error > 2.0**-140)
    return Bounded(a.value.sign(), torch.where(unsure, 2.0, 0.0).double())


def terms(o: dict[str, Any], t: int, lr: float, q: list[float], new_g: torch.Tensor, s: dict[str, Any]) -> list[Any]:
    """new_g · ∂x/∂q of step ``t``, from the states ``s`` before it; None where q is not in play."""
    beta1, beta2, beta3, rho, c, gamma = q
    b1, b2 = 1 - beta1**t, 1 - beta2**t
    new_g, g, m_, v_ = (Bounded.exact(a) for a in (new_g, s["last_grad"], s["exp_avg"], s["exp_avg_sq"]))
    zero = Bounded.exact(torch.zeros_like(new_g.value))
    diff, second = "exp_avg_diff" in s, s.get("mean_exp_avg_sq", s.get("max_exp_avg_sq"))
    n_ = Bounded.exact(s["exp_avg_diff"]) if diff else zero
    d = g - Bounded.exact(s["older_grad"]) if diff else zero
    g_hat = g + d.times(beta3)
    square = g_hat * g_hat
    s_v = sign(square - v_)
    g_tilde = square.times(c) + (v_ + square * s_v).times(1 - c)
    m = m_.times(beta1) + g.times(1 - beta1)
    n = n_.times(beta3) + d.times(1 - beta3)
    v = v_.times(beta2) + g_tilde.times(1 - beta2)
    V = v
    if second is not None:
        old = Bounded.exact(second)
        mean = v.times(1 / t) + old.times((t - 1) / t)
        larger = Bounded(torch.maximum(v.value, old.value), v.error)
        w = larger if o["second_moment"] == "max" else mean
        V = v.times(rho) + w.times(1 - rho)
    V = V.times(1 / b2)
    N = m.times(1 / b1) + n.times(beta3)
    root = sqrt(V)
    eps = Bounded(torch.full_like(root.value, o["eps"]), torch.full_like(root.value, U * o["eps"]))
    D = root + eps
    one = Bounded.exact(torch.ones_like(root.value))
    # The kernels take 1 / (root D) times root or D: two roundings more than 1 / D and 1 / root have.
    inv_D = over(one, D).rounded(2.0)
    positive = V.value > 0
    halves = over(one, Bounded(torch.where(positive, root.value, 1.0), torch.where(positive, root.error, 0.0))).times(
        0.5
    )
    half_inv_root = Bounded(torch.where(positive, halves.value, 0.0), torch.where(positive, halves.error, 0.0)).rounded(
        2.0
    )
    A = inv_D.times(lr * gamma)
    step = N * inv_D
    R = A * step * half_inv_root
    square_slope = rho * (1 - beta2) / b2
    found: list[Any] = [None] * 6
    found[0] = zero - A * ((m_ - g).times(1 / b1) + m.times(t * beta1 ** (t - 1) / b1**2))
    found[1] = R * ((v_ - g_tilde).times(rho / b2) + V.times(t * beta2 ** (t - 1) / b2))
    if diff:
        c_s = Bounded(torch.full_like(root.value, c), torch.full_like(root.value, U * c)) + s_v.times(1 - c)
        found[2] = R * (g_hat * c_s * d).times(2 * square_slope) - A * (n + (n_ - d).times(beta3))
    if second is not None:
        found[3] = R * (v - w).times(1 / b2)
    found[4] = R * (square - v_ - square * s_v).times(square_slope)
    if "exp_avg_lion" in s:
        l1 = o["lion_betas"][0]
        u = Bounded.exact(s["exp_avg_lion"]).times(l1) + g.times(1 - l1)
        found[5] = (sign(u) - step).times(lr)
    return [None if f is None else f * new_g for f in found]


@pytest.mark.parametrize("case", LEARNING)
@pytest.mark.parametrize("backend", BACKENDS)
def test_within_the_derived_bound_of_float64(case: str, backend: str) -> None:
    params = weights(torch.float32)
    optimizer = MADA(params, **{"lr": 1e-2, **CASES[case]}, backend=backend)
    group = optimizer.param_groups[0]
    for t, grads in enumerate(gradients(9, torch.float32)):
        wanted = {name: [0.0, 0.0, 0.0] for name in group["learn"]}
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
            if t not in (1, 2, 8):
                continue
            state = optimizer.state[param]
            _, lr, *q = state["last_scalars"].tolist()
            found = terms(group, t, lr, q, -grad if group["maximize"] else grad, state)
            for name, term in zip(COEFFICIENTS, found, strict=True):
                if name in wanted and param.numel() > 0:
                    wanted[name][0] += term.value.sum().item()
                    wanted[name][1] += term.error.sum().item()
                    wanted[name][2] += term.value.abs().sum().item()
        optimizer.step()
        if t not in (1, 2, 8):
            continue
        for name, (value, error, size) in wanted.items():
            # A float sum of a tile's 256 terms in at least 4 lanes rounds at most 64 times, and 3 times over lanes.
            assert abs(optimizer.hypergradients[name] - value) <= error + 67 * U * (size + error), (t, name)
            # And the bound must mean something, but at first steps, where terms cancel: ∂x/∂β1 is 0 at t = 1.
            assert t < 8 or error <= 1e-3 * size + 1e-30, (name, error, size)


@pytest.mark.parametrize(
    "case", [case for case in LEARNING if case != "capturable"]
)  # torch's powers of tensors differ
def test_native_and_torch_give_the_same_bits(case: str) -> None:
    """On tensors of one element, where no order of summation is in the way."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(40, generator=generator)
    grads = torch.randn((12, 40), generator=generator) * 10.0 ** torch.empty(40).uniform_(-9, 3, generator=generator)
    found = []
    for backend in ("cpu", "torch"):
        params = [torch.nn.Parameter(x.reshape(1)) for x in start.clone()]
        optimizer = MADA(params, **{"lr": 1e-2, **CASES[case]}, backend=backend)
        path = []
        for row in grads:
            for param, grad in zip(params, row, strict=True):
                param.grad = grad.reshape(1)
            optimizer.step()
            path.append((optimizer.hypergradients, optimizer.coefficients))
        found.append((path, [p.item() for p in params]))
    assert found[0] == found[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_divides_by_a_second_moment_of_zero(backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(6))
    optimizer = MADA([param], lr=0.1, weight_decay=0.0, gamma=0.5, c=0.5, rho=0.5, hyper_warmup=0, backend=backend)
    for grad in ([0.0] * 6, [0.0] * 6, [0.0, 0.0, 0.0, 1.0, 1e-30, 1e15], [0.0] * 6, [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]):
        param.grad = torch.tensor(grad)
        optimizer.step()
        assert all(abs(h) < float("inf") for h in optimizer.hypergradients.values())
    assert param.isfinite().all()
    assert param[0] == 1.0 and param[2] == 1.0
