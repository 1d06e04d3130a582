"""Promise: the operators keep torch's rules on a GPU, and compile into a graph."""

from __future__ import annotations

from typing import Any

import on_gpu
import pytest
import torch
from on_gpu import DEVICE, both, need
from torch import Tensor

from pace_kernels import PACE, backends, ops
from pace_kernels.ops import LAST_SCALARS

OPTIONS: dict[str, Any] = {
    "lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01, "lambda_pullback": 5.0,
    "clamp_pullback": True, "beta_ema": 0.01, "ema_kappa": 0.2, "ema_rho": 0.0, "ema_gamma": 1.0, "ema_update_freq": 1,
    "pullback_from_step": False, "maximize": False,
}  # fmt: skip
MADA_OPTIONS: dict[str, Any] = {
    **OPTIONS, "learn": 63, "beta3": 0.9, "rho": 0.5, "c": 0.5, "gamma": 0.5, "lion_beta1": 0.95, "lion_beta2": 0.98,
    "second_max": False,
}  # fmt: skip
LEARN: dict[str, Any] = {
    "learn": 63, "hyper_lr": [0.1] * 6, "hyper_momentum": [0.5] * 6, "lower": [0.0] * 6, "upper": [1.0] * 6,
    "clip": 10.0, "warmup": 0,
}  # fmt: skip


def operator(backend: str, name: str) -> Any:
    found = backends()[need(backend)].op(name)
    if not isinstance(found, torch._ops.OpOverload):
        if not on_gpu.DRY:
            pytest.skip(f"{name} of backend {backend} is not an operator")
        found = getattr(torch.ops.pace_kernels, name).default
    return found


def tensors(n: int = 2) -> list[Tensor]:
    return [torch.rand(7, 3).to(DEVICE) for _ in range(n)]


def steps(capturable: bool, n: int = 2) -> list[Tensor]:
    return [torch.full((), 4.0, device=DEVICE if capturable else "cpu") for _ in range(n)]


def pace_operands(capturable: bool) -> list[list[Tensor]]:
    return [tensors(), tensors(), tensors(), tensors(), tensors(), steps(capturable)]


@both
@pytest.mark.parametrize("capturable", [False, True])
def test_opcheck_of_pace(backend: str, capturable: bool) -> None:
    stats = torch.zeros(len(ops.PACE_STATS), dtype=torch.float64, device=DEVICE)
    arguments = (*pace_operands(capturable), stats)
    torch.library.opcheck(operator(backend, "pace_step_"), arguments, {**OPTIONS, "capturable": capturable})


@both
@pytest.mark.parametrize("capturable", [False, True])
def test_opcheck_of_mada(backend: str, capturable: bool) -> None:
    row = torch.tensor([1.0, 1e-2, 0.9, 0.95, 0.9, 0.5, 0.5, 0.5], dtype=torch.float64, device=DEVICE)
    assert len(row) == len(LAST_SCALARS)
    lists = {name: tensors() for name in ("params", "grads", *ops.MADA_STATES)}
    lists |= {"steps": steps(capturable), "last_scalars": [row.clone(), row.clone()]}
    sums = torch.zeros(len(ops.HYPERGRADIENTS), dtype=torch.float64, device=DEVICE)
    arguments = (*lists.values(), row[2:].clone(), sums)
    torch.library.opcheck(operator(backend, "mada_step_"), arguments, {**MADA_OPTIONS, "capturable": capturable})


@both
def test_opcheck_of_learning(backend: str) -> None:
    def row(n: int) -> Tensor:
        return torch.rand(n, dtype=torch.float64).to(DEVICE)

    count = torch.zeros((), dtype=torch.float64, device=DEVICE)
    arguments = (row(6), row(6), row(6), count, [row(len(ops.HYPERGRADIENTS)) for _ in range(2)])
    torch.library.opcheck(operator(backend, "mada_learn_"), arguments, LEARN)


@both
def test_an_operator_compiles_into_a_graph(backend: str) -> None:
    step_ = operator(backend, "pace_step_")
    options = {**OPTIONS, "capturable": True}
    lists = pace_operands(capturable=True)
    twins = [[t.clone() for t in some] for some in lists]
    # A dry run stops before the compiler's own back end, which is torch's to test.
    compiled = torch.compile(
        lambda operands: step_(*operands, None, **options),
        fullgraph=True,
        backend="aot_eager" if on_gpu.DRY else "inductor",
    )
    compiled(lists)
    step_(*twins, None, **options)
    for some, others in zip(lists, twins, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@both
def test_a_compiled_training_step(backend: str) -> None:
    """torch.compile runs `optimizer.step()` as it is, between its graphs."""
    found = []
    for compiled in (True, False):
        params = on_gpu.parameters()
        optimizer = PACE(params, lr=1e-2, backend=need(backend))

        def step(params: list[Any] = params, optimizer: Any = optimizer) -> None:
            for param in params:
                param.grad = param.detach() * 0.5
            optimizer.step()

        run = torch.compile(step, backend="aot_eager") if compiled else step
        for _ in range(3):
            run()
        found.append(on_gpu.contents(params, optimizer))
    on_gpu.assert_same(found[0], found[1])
