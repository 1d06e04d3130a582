"""Promise: every optimizer trains on an XLA device as on the CPU, and compiles few graphs, whatever changes from step
to step: counts, learning rates, averaging weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch_xla
import torch_xla.debug.metrics as metrics

from pace_kernels import MADA, PACE, Pullback, ScheduleFreeAdamW

warnings.filterwarnings("ignore", message="pace_kernels computes through torch")

DEVICE = torch_xla.device()
AdamW, SGD = torch.optim.AdamW, torch.optim.SGD
LEARNED = ("beta1", "beta2", "beta3", "rho", "c", "gamma")
PULLED = {"lambda_pullback": 2.0, "use_ema_eval": True}


def on_xla(params: Any) -> bool:  # AdamW is not capturable on the CPU
    return next(iter(params)).device.type == "xla"


# Name: the optimizer. Every option that makes another graph is on in one of them.
CASES: dict[str, Callable[..., Any]] = {
    "PACE": PACE,
    "PACE, every 3": lambda p, **k: PACE(p, ema_update_freq=3, **k),
    "PACE, w = 1 first": lambda p, **k: PACE(p, ema_kappa=0.6, ema_rho=5.0, **k),
    "PACE, constant weight": lambda p, **k: PACE(p, ema_kappa=None, beta_ema=0.1, **k),
    "PACE, log_stats": lambda p, **k: PACE(p, log_stats=True, **k),
    "PACE, from the step": lambda p, **k: PACE(p, pullback_from="step", lambda_pullback=30.0, **k),
    "PACE, no momentum": lambda p, **k: PACE(p, betas=(0.0, 0.99), **k),
    "PACE, capturable": lambda p, **k: PACE(p, capturable=True, ema_update_freq=3, log_stats=True, **k),
    "PACE, skip_nonfinite": lambda p, **k: PACE(p, skip_nonfinite=True, **k),
    "MADA": lambda p, **k: MADA(p, hyper_warmup=3, hyper_lr=1e-3, gamma=0.5, c=0.5, rho=0.5, **k),
    "MADA, pullback": lambda p, **k: MADA(p, hyper_warmup=0, learn=("beta1", "rho"), rho=0.5, **PULLED, **k),
    "MADA, skip_nonfinite": lambda p, **k: MADA(p, hyper_warmup=3, skip_nonfinite=True, **k),
    "MADA, every 3, nothing learned": lambda p, **k: MADA(p, learn=(), ema_update_freq=3, **PULLED, **k),
    **{
        f"MADA.{name}": lambda p, name=name, **k: MADA.preset(name, p, **k)
        for name in ("adamw", "amsgrad", "avgrad", "adan", "yogi", "lion")
    },
    "MADA.hyperadam": lambda p, **k: MADA.preset("hyperadam", p, hyper_warmup=3, **k),
    "schedule-free": lambda p, **k: ScheduleFreeAdamW(p, warmup_steps=8, r=0.5, weight_decay=0.1, **k),
    "schedule-free, capturable": lambda p, **k: ScheduleFreeAdamW(p, warmup_steps=8, capturable=True, **k),
    "schedule-free, skip_nonfinite": lambda p, **k: ScheduleFreeAdamW(p, skip_nonfinite=True, **k),
    "Pullback": lambda p, **k: Pullback(AdamW(p, **k)),
    "Pullback, every 3": lambda p, **k: Pullback(AdamW(p, **k), ema_update_freq=3, log_stats=True),
    "Pullback, capturable": lambda p, **k: Pullback(AdamW(p := list(p), capturable=on_xla(p), **k)),
    "Pullback, constant gain": lambda p, **k: Pullback(SGD(p, **k), gain=0.05, pullback_from="step"),
}
each_case = pytest.mark.parametrize("make", CASES.values(), ids=CASES)


def weights(seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 4, generator=g, dtype=torch.float64), torch.randn(3, generator=g, dtype=torch.float64)]


def trained(make: Callable[..., Any], device: Any, dtype: torch.dtype, steps: int, lr: float = 1e-2) -> tuple[Any, Any]:
    """An optimizer after steps on gradients that are float32 numbers and depend on no weights, so that no rounding is
    amplified: what comes out differs by the roundings of the steps alone."""
    params = [torch.nn.Parameter(w.to(torch.float32).to(device, dtype)) for w in weights()]
    optimizer = make(params, lr=lr)
    g = torch.Generator().manual_seed(7)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=g).to(device, dtype)
        optimizer.step()
        torch_xla.sync()
    return optimizer, params


def largest(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(
        (x.detach().cpu().double() - y.detach().cpu().double()).abs().max().item() for x, y in zip(a, b, strict=True)
    )


STEPS = 20


@each_case
def test_weights_averages_and_statistics_agree_with_the_cpu(make: Callable[..., Any]) -> None:
    """Against the same steps in float64, XLA's are allowed twice the error of the CPU's in float32, and one rounding of
    each weight a step: XLA may contract and order operations in another way, with no more roundings than there are."""
    (xla, here), (cpu, there), (_, exact) = (
        trained(make, device, dtype, STEPS)
        for device, dtype in ((DEVICE, torch.float32), ("cpu", torch.float32), ("cpu", torch.float64))
    )
    roundings = STEPS * 2.0**-24 * max(p.abs().max().item() for p in exact)
    assert all(p.device.type == "xla" for p in here)
    assert largest(here, exact) <= 2 * largest(there, exact) + roundings
    if hasattr(xla, "get_step_stats") and (expected := cpu.get_step_stats()):
        # Sums, in float64, of float32 values that differ by roundings of the states: 20 steps of 8 operations each. The
        # terms of hypergradients cancel, so that roundings are no small part of their sums; what they move is below.
        found = xla.get_step_stats()
        assert found.keys() == expected.keys()
        kept = {name: value for name, value in expected.items() if not name.startswith("hypergradient_")}
        assert {name: found[name] for name in kept} == pytest.approx(kept, rel=8 * STEPS * 2.0**-24)
    if getattr(xla, "coefficients", None) and xla.param_groups[0]["learn"]:
        learned = xla.coefficients
        assert learned == pytest.approx(cpu.coefficients, rel=1e-5)
        assert any(learned[name] != trained(make, "cpu", torch.float32, 0)[0].coefficients[name] for name in learned)


def compilations() -> int:
    counted = metrics.metric_data("CompileTime")
    return int(counted[0]) if counted else 0


@contextmanager
def at_most(graphs: int) -> Iterator[None]:
    torch_xla.sync()
    before = compilations()
    yield
    torch_xla.sync()
    assert compilations() - before <= graphs, f"{compilations() - before} graphs were compiled, {graphs} are allowed"


def test_compilations_are_counted() -> None:
    before = compilations()
    for k in range(3):
        torch.ones(7, 11 + k, device=DEVICE).cos().sum().item()
    assert compilations() - before >= 3


def scheduled(t: int, special: bool) -> float:
    """A warm-up, then a cosine; now and then a value that torch_xla would take for a constant, as 0 and 1, or for the
    same as another number of the step."""
    values = {30: 0.9, 31: 0.1, 40: 1.0, 41: 0.5, 50: 0.0, 51: 0.01, 60: 0.001, 61: 1e-8} if special else {}
    return values.get(t, 0.05 * min(1.0, (t + 1) / 20) * (1 + math.cos(math.pi * t / 200)) / 2)


def model_and_batches() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 1).to(DEVICE)
    return model, torch.randn(200, 8, 6)


def train(model: torch.nn.Module, optimizer: Any, batches: torch.Tensor, start: int = 0) -> None:
    for t, batch in enumerate(batches, start):
        for group in optimizer.param_groups:
            group["lr"] = scheduled(
                t, special=not isinstance(optimizer, Pullback)
            )  # torch's AdamW compiles anew at 0, 1
        x = batch.to(DEVICE)
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        torch_xla.sync()


@each_case
def test_few_graphs_are_compiled(make: Callable[..., Any]) -> None:
    model, batches = model_and_batches()
    optimizer = make(model.parameters(), lr=0.05)
    with at_most(3):
        train(model, optimizer, batches)
    averages = any("ema" in s or "z" in s for s in optimizer.state.values())
    for round_ in range(3):
        new = 1 if round_ == 0 else 0
        if getattr(optimizer, "get_step_stats", None):
            with at_most(new):
                optimizer.get_step_stats()
        if averages:
            with at_most(new):
                optimizer.eval()
            with at_most(new):
                optimizer.train()
            with at_most(new):
                optimizer.ema_state_dict(model)
        with at_most(0):
            train(model, optimizer, batches[:3], start=100)
