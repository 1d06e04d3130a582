"""Promise: PACE is a torch.optim optimizer: what its users rely on holds."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pace_kernels
from pace_kernels import PACE, backends

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS = [name for name, row in backends().items() if row.available]


def param(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def fill_grads(params: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: range) -> None:
    for t in steps:
        fill_grads(params, t)
        optimizer.step()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- signature and table ----


def test_positional_order_is_that_of_the_published_optimizer() -> None:
    p = param(3)
    group = PACE([p], 1e-2, (0.8, 0.9), 1e-7, 0.2, 0.3, False, 0.05, False, 0.4, 1.0, 2.0, 3, True).param_groups[0]
    expected = {
        "lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-7, "weight_decay": 0.2, "lambda_pullback": 0.3,
        "clamp_pullback": False, "beta_ema": 0.05, "use_ema_eval": False, "ema_kappa": 0.4, "ema_rho": 1.0,
        "ema_gamma": 2.0, "ema_update_freq": 3, "log_stats": True,
    }  # fmt: skip
    assert {k: group[k] for k in expected} == expected


def test_backends_table() -> None:
    table = backends()
    assert list(table) == ["cuda", "triton", "cpu", "torch"]
    for row in table.values():
        assert isinstance(row.available, bool)
        assert (row.reason is None) == row.available


def test_backend_by_name_works_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="backend='cuda' is not available: "):
        PACE([param(2)], backend="cuda")
    with pytest.raises(ValueError, match="backend must be one of cuda, triton, cpu, torch, got 'gpu'"):
        PACE([param(2)], backend="gpu")
    with pytest.raises(RuntimeError, match=r"backend='cpu' can't step this parameter: it covers .* not torch.float64"):
        PACE([param(2, dtype=torch.float64)], backend="cpu")
    monkeypatch.setenv("PACE_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="PACE_BACKEND='triton' is not available: "):
        PACE([param(2)])
    PACE([param(2)], backend="torch")  # the argument wins


# ---- groups, schedules, gradients ----


def test_groups_have_their_own_options() -> None:
    params = [param(40, 7), param(9)]
    both = PACE(
        [{"params": [params[0]], "lr": 1e-2, "lambda_pullback": 3.0}, {"params": [params[1]], "betas": (0.0, 0.9)}]
    )
    run(both, params, range(5))
    alone = [param(40, 7), param(9)]
    first, second = PACE([alone[0]], lr=1e-2, lambda_pullback=3.0), PACE([alone[1]], betas=(0.0, 0.9))
    for t in range(5):
        fill_grads(alone, t)
        first.step()
        second.step()
    for a, b in zip(params, alone, strict=True):
        assert torch.equal(a, b)


def test_a_group_added_in_mid_training_starts_at_its_own_step_one() -> None:
    a, b, c = param(5), param(6, seed=1), param(6, seed=1)
    optimizer = PACE([a])
    run(optimizer, [a], range(3))
    optimizer.add_param_group({"params": [b], "lr": 0.1})
    run(optimizer, [a, b], range(3, 5))
    assert [optimizer.state[p]["step"].item() for p in (a, b)] == [5, 2]
    fresh = PACE([c], lr=0.1)
    for t in range(3, 5):
        fill_grads([param(5), c], t)
        generator = torch.Generator().manual_seed(t)
        torch.randn(5, generator=generator)
        c.grad = torch.randn(6, generator=generator)
        fresh.step()
    assert torch.equal(b, c)


def test_mixed_dtypes_in_one_group() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    together, alone = ([param(50, dtype=d) for d in dtypes] for _ in range(2))
    run(PACE(together), together, range(4))
    singles = [PACE([p]) for p in alone]
    for t in range(4):
        fill_grads(alone, t)
        for optimizer in singles:
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b)


def test_bfloat16_parameters_take_float32_gradients() -> None:
    a, b = param(64, dtype=torch.bfloat16), param(64)
    b.data.copy_(a.data)
    gradient = torch.randn(64)
    a.grad_dtype = torch.float32
    a.grad, b.grad = gradient, gradient.clone()
    PACE([a]).step()
    PACE([b]).step()
    assert torch.equal(a, b.bfloat16())


def test_learning_rate_schedules() -> None:
    a, b = param(20), param(20)
    scheduled, by_hand = PACE([a], lr=0.1), PACE([b], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(scheduled, T_max=10)
    for t in range(6):
        fill_grads([a], t)
        fill_grads([b], t)
        by_hand.param_groups[0]["lr"] = scheduler.get_last_lr()[0]
        scheduled.step()
        scheduler.step()
        by_hand.step()
    assert torch.equal(a, b)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(scheduled, max_lr=0.1, total_steps=5)  # cycles betas[0] too
    scheduled.step()
    one_cycle.step()
    assert scheduled.param_groups[0]["betas"][0] != 0.9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("capturable", [False, True])
def test_tensor_learning_rate(backend: str, capturable: bool) -> None:
    a, b = param(20), param(20)
    lr = torch.tensor(0.125)  # exact in float32
    run(PACE([a], lr=lr, backend=backend, capturable=capturable), [a], range(3))
    run(PACE([b], lr=0.125, backend=backend, capturable=capturable), [b], range(3))
    assert torch.equal(a, b)
    assert lr.item() == 0.125


def test_a_parameter_without_a_gradient_rests() -> None:
    a, b = param(5), param(6, seed=1)
    optimizer = PACE([a, b])
    run(optimizer, [a, b], range(2))
    before = {k: v.clone() for k, v in optimizer.state[b].items()} | {"weights": b.detach().clone()}
    b.grad = None
    a.grad = torch.ones(5)
    optimizer.step()
    assert same(before, optimizer.state[b] | {"weights": b.detach()})
    assert optimizer.state[a]["step"].item() == 3
    b.grad = torch.ones(6)
    optimizer.step()
    assert optimizer.state[b]["step"].item() == 3


def test_closures_hooks_and_names() -> None:
    p = param(4)
    optimizer = PACE([("weight", p)])
    assert optimizer.param_groups[0]["param_names"] == ["weight"]
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        seen.append("closure")
        return loss

    loss = optimizer.step(closure)
    assert loss.requires_grad and loss.item() > 0
    assert seen == ["before", "closure", "after"]


def test_tied_parameters_step_once() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Linear(4, 4, bias=False)
            self.b = torch.nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

    model = Tied()
    optimizer = PACE(model.parameters())
    model.b(model.a(torch.ones(1, 4))).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 1
    assert optimizer.state[model.a.weight]["step"].item() == 1
    exported = optimizer.ema_state_dict(model)
    assert torch.equal(exported["a.weight"], exported["b.weight"])


def test_weights_changed_in_place_are_noticed_by_autograd() -> None:
    """As with torch.optim: a backward pass through the old weights must fail, not silently use the new ones."""
    p = param(4)
    loss = (p * p).sum()
    p.grad = torch.ones(4)
    PACE([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_reference_cycle_keeps_the_memory() -> None:
    p = param(3)
    optimizer = PACE([p])
    run(optimizer, [p], range(2))
    gone = weakref.ref(optimizer.state[p]["ema"])
    gc.disable()
    try:
        optimizer.state.clear()
        run(optimizer, [p], [2])  # a plan has them until it ends
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("names", ["as they are", "torch 2.10"])
@pytest.mark.slow
def test_a_step_warns_of_nothing(names: str) -> None:
    """torch 2.10 has its check of captured graphs under one name, of which a later torch warns."""
    code = """
import sys, torch, warnings
base, called = torch.optim.Optimizer, []
if sys.argv[1] == "torch 2.10":
    if hasattr(base, "_accelerator_graph_capture_health_check"):
        del base._accelerator_graph_capture_health_check
    base._cuda_graph_capture_health_check = lambda self: called.append(self)
import pace_kernels
warnings.simplefilter("error")
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
pace_kernels.PACE([param]).step()
print(len(called))
"""
    done = subprocess.run([sys.executable, "-c", code, names], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout == f"{int(names == 'torch 2.10')}\n"


@pytest.mark.slow
def test_a_compiled_training_step() -> None:
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [PACE(model.parameters(), lr=1e-2) for model in models]

    def step(model: torch.nn.Module, optimizer: PACE, x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    compiled = torch.compile(step)
    for t in range(4):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(t))
        losses = step(models[0], optimizers[0], x), compiled(models[1], optimizers[1], x)
        torch.testing.assert_close(*losses)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)
        assert optimizers[1].state[b]["step"].item() == 4


# ---- the average ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", [None, "torch"])
def test_eval_and_train_swap_exactly(dtype: torch.dtype, backend: str | None) -> None:
    p, untouched = param(300, 4, dtype=dtype), param(3, dtype=dtype)
    optimizer = PACE([{"params": [p]}, {"params": [untouched], "use_ema_eval": False}], lr=1e-2, backend=backend)
    run(optimizer, [p, untouched], range(3))
    live, average = p.detach().clone(), optimizer.state[p]["ema"].clone()
    rest = untouched.detach().clone()
    for _ in range(2):  # twice is harmless
        optimizer.eval()
        assert torch.equal(p, average.to(dtype))
        assert torch.equal(untouched, rest)
    with pytest.raises(RuntimeError, match="weights are swapped in"):
        optimizer.step()
    for _ in range(2):
        optimizer.train()
        assert torch.equal(p, live)
    assert torch.equal(optimizer.state[p]["ema"], average)
    assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq", "ema"}
    optimizer.step()


def test_a_copy_of_the_weights_only_while_swapped() -> None:
    """A swap changes contents, never where weights and averages lie: captured CUDA graphs read addresses."""
    p = param(10)
    optimizer = PACE([p])
    run(optimizer, [p], range(2))
    places = p.data_ptr(), optimizer.state[p]["ema"].data_ptr()
    optimizer.eval()
    assert {k: v.numel() for k, v in optimizer.state[p].items() if k == "live"} == {"live": 10}
    assert (p.data_ptr(), optimizer.state[p]["ema"].data_ptr()) == places
    optimizer.train()
    assert (p.data_ptr(), optimizer.state[p]["ema"].data_ptr()) == places
    assert sum(s.numel() for s in optimizer.state[p].values()) == 3 * p.numel() + 1


def test_eval_before_the_first_step_and_with_unused_parameters() -> None:
    p = param(3)
    optimizer = PACE([p])
    optimizer.eval()
    with pytest.raises(RuntimeError, match="weights are swapped in"):
        optimizer.step()
    optimizer.train()
    assert len(optimizer.state) == 0
    optimizer.step()


def test_averaged_comes_back_whatever_happens() -> None:
    p = param(8)
    optimizer = PACE([p])
    run(optimizer, [p], range(3))
    live = p.detach().clone()
    with pytest.raises(KeyboardInterrupt), optimizer.averaged():
        assert not torch.equal(p, live)
        raise KeyboardInterrupt
    assert torch.equal(p, live)
    optimizer.eval()
    with optimizer.averaged():
        pass
    with pytest.raises(RuntimeError, match="weights are swapped in"):  # it was swapped before: it stays so
        optimizer.step()


def test_ema_state_dict() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).to(torch.bfloat16)
    optimizer = PACE(model[0].parameters())
    run(optimizer, list(model[0].parameters()), range(3))
    exported = optimizer.ema_state_dict(model)
    assert exported.keys() == model.state_dict().keys()
    with optimizer.averaged():
        assert same(exported, {k: v.clone() for k, v in model.state_dict().items()})
        assert same(exported, optimizer.ema_state_dict(model))
    kept = {k: v.clone() for k, v in exported.items()}
    run(optimizer, list(model[0].parameters()), range(3, 6))
    assert same(exported, kept)  # a copy: training goes on without it
    assert all(not v.requires_grad for v in exported.values())
    with pytest.raises(RuntimeError, match="no group of this optimizer keeps an average"):
        PACE(model.parameters(), lambda_pullback=0.0, use_ema_eval=False).ema_state_dict(model)


def test_a_swap_is_noticed_by_autograd() -> None:
    p = param(4)
    optimizer = PACE([p])
    run(optimizer, [p], range(2))
    for swap in (optimizer.eval, optimizer.train):
        loss = (p * p).sum()
        swap()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_closure_may_not_leave_the_average_in() -> None:
    p = param(4)
    optimizer = PACE([p])
    run(optimizer, [p], range(2))
    before = p.detach().clone()

    def closure() -> float:
        optimizer.eval()
        return 0.0

    with pytest.raises(RuntimeError, match="weights are swapped in"):
        optimizer.step(closure)
    optimizer.train()
    assert torch.equal(p, before)


def test_an_option_that_comes_back_starts_anew() -> None:
    p = param(6)
    optimizer = PACE([p], lr=0.1, lambda_pullback=0.5, use_ema_eval=False)
    run(optimizer, [p], range(3))
    optimizer.param_groups[0]["lambda_pullback"] = 0.0
    run(optimizer, [p], range(3, 6))
    assert "ema" not in optimizer.state[p]
    optimizer.param_groups[0]["lambda_pullback"] = 0.5
    before = p.detach().clone()
    run(optimizer, [p], range(6, 7))
    weight = 8**-0.2  # w_t at t = 7
    torch.testing.assert_close(optimizer.state[p]["ema"], (1 - weight) * before + weight * p.detach())


def test_ema_state_dict_of_a_stranger_is_refused() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = PACE(model.parameters())
    run(optimizer, list(model.parameters()), range(2))
    with pytest.raises(ValueError, match="model has no parameter that this optimizer steps"):
        optimizer.ema_state_dict(copy.deepcopy(model))
    assert hasattr(optimizer.ema_state_dict(model), "_metadata")


# ---- bad input ----

BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1e-3}, "lr must be finite and >= 0, got -0.001"),
    ({"lr": float("nan")}, "lr must be finite"),
    ({"lr": float("inf")}, "lr must be finite"),
    ({"lr": torch.tensor(-1.0)}, "lr must be finite and >= 0, got -1.0"),
    ({"lr": torch.ones(2)}, "lr must be a number or a tensor with one element"),
    ({"betas": (1.0, 0.9)}, r"betas\[0\] must be in \[0, 1\), got 1.0"),
    ({"betas": (0.9, -0.1)}, r"betas\[1\] must be in \[0, 1\), got -0.1"),
    ({"betas": 0.9}, r"betas must be two numbers in \[0, 1\), got 0.9"),
    ({"eps": 0.0}, r"eps must be finite and at least 2\*\*-126, got 0.0"),
    ({"eps": 1e-40}, "eps must be finite"),
    ({"maximize": 1}, "maximize must be True or False, got 1"),
    ({"clamp_pullback": None}, "clamp_pullback must be True or False"),
    ({"ema_update_freq": True}, "ema_update_freq must be an integer >= 1"),
    ({"weight_decay": -0.1}, "weight_decay must be finite and >= 0"),
    ({"lambda_pullback": -0.1}, "lambda_pullback must be finite and >= 0"),
    ({"beta_ema": 1.5}, r"beta_ema must be in \[0, 1\], got 1.5"),
    ({"ema_kappa": -1.0}, "ema_kappa must be None, or finite and >= 0"),
    ({"ema_rho": float("inf")}, "ema_rho must be finite and >= 0"),
    ({"ema_gamma": -1.0}, "ema_gamma must be finite and >= 0"),
    ({"ema_update_freq": 0}, "ema_update_freq must be an integer >= 1, got 0"),
    ({"ema_update_freq": 1.5}, "ema_update_freq must be an integer >= 1, got 1.5"),
    ({"pullback_from": "start"}, 'pullback_from must be "weights" or "step", got \'start\''),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=str)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PACE([param(3)], **options)
    optimizer = PACE([param(3)])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [param(3)], **options})
    assert len(optimizer.param_groups) == 1
    # Set behind our back, as a scheduler would: refused at the step, and no group has moved.
    p, q = param(3), param(3, seed=1)
    optimizer = PACE([{"params": [p]}, {"params": [q]}])
    run(optimizer, [p, q], range(2))
    before = copy.deepcopy((p, optimizer.state[p]))
    optimizer.param_groups[1].update(options)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(p, before[0]) and same(optimizer.state[p], before[1])


@pytest.mark.parametrize("options", [{"lr": "fast"}, {"eps": None}, {"weight_decay": True}], ids=str)
def test_options_of_the_wrong_type(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(options))} must be a number"):
        PACE([param(3)], **options)


BAD_PARAMETERS: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "parameters must be dense"),
    "complex": (lambda: torch.zeros(3, dtype=torch.complex64), "is torch.complex64: parameters must be one of"),
    "integer": (lambda: torch.zeros(3, dtype=torch.int32), "is torch.int32: parameters must be one of"),
    "expanded": (lambda: torch.zeros(1).expand(3), "overlaps itself in memory"),
    "overlapping": (lambda: torch.zeros(4).as_strided((3, 2), (1, 1)), "overlaps itself in memory"),
    # Rows 3 apart, columns 2 apart: [2, 0] and [0, 3] are the same place.
    "interleaved": (lambda: torch.zeros(20).as_strided((3, 4), (3, 2)), "overlaps itself in memory"),
}


@pytest.mark.parametrize("kind", BAD_PARAMETERS)
def test_bad_parameters_are_refused(kind: str) -> None:
    """At once where they are trained; frozen ones at the first step that finds a gradient, before it writes."""
    make, message = BAD_PARAMETERS[kind]
    refused = pytest.raises(ValueError, match=rf"param_groups\[0\]\['params'\]\[1\].*{message}")
    if kind != "integer":
        with refused:
            PACE([param(2), make().requires_grad_()])
    good, bad = param(2), make()
    optimizer = PACE([good, bad])
    good.grad = torch.ones(2)
    optimizer.step()
    before = copy.deepcopy((good, optimizer.state[good]))
    bad.grad = torch.zeros_like(bad)
    with refused:
        optimizer.step()
    assert torch.equal(good, before[0]) and same(optimizer.state[good], before[1])
    assert bad not in optimizer.state


def test_a_parameter_twice_is_refused() -> None:
    p = param(2)
    with pytest.raises(ValueError, match="more than one parameter group"):
        PACE([{"params": [p]}, {"params": [p]}])
    with pytest.warns(UserWarning, match="duplicate parameters"), pytest.raises(ValueError, match="more than once"):
        PACE([p, p])


def test_numbers_of_numpy_are_numbers() -> None:
    np = pytest.importorskip("numpy")
    a, b = param(20), param(20)
    odd = PACE([a], lr=np.float32(0.125), ema_update_freq=np.int64(2), ema_kappa=np.float64(0.5))
    torch.optim.lr_scheduler.LambdaLR(odd, lambda k: np.float32(1.0))
    run(odd, [a], range(3))
    run(PACE([b], lr=0.125, ema_update_freq=2, ema_kappa=0.5), [b], range(3))
    assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_learning_rate_with_a_dimension(backend: str) -> None:
    a, b = param(), param()
    lr = torch.tensor([0.125])
    run(PACE([a], lr=lr, backend=backend, log_stats=True), [a], range(3))
    run(PACE([b], lr=0.125, backend=backend), [b], range(3))
    assert torch.equal(a, b)


def test_a_parameter_changed_by_hand_takes_its_states_along_or_is_refused() -> None:
    p, q = param(3), param(2, 2, seed=1)
    optimizer = PACE([{"params": [p]}, {"params": [q]}])
    run(optimizer, [p, q], range(2))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        q.grad, q.data = None, q.data.to(dtype)
        run(optimizer, [p, q], range(1))
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert {v.dtype for k, v in optimizer.state[q].items() if k != "step"} == {expected}
    before = p.detach().clone()
    q.grad, q.data = None, torch.ones(3, 3)
    q.grad = torch.ones(3, 3, dtype=q.dtype)
    with pytest.raises(RuntimeError, match=r"shape \(3, 3\) has a state of shape \(2, 2\)"):
        optimizer.step()
    assert torch.equal(p, before)


def test_lazy_parameters() -> None:
    model = torch.nn.LazyLinear(2)
    optimizer = PACE(model.parameters())
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["step"].item() == 1


def test_gradients_that_do_not_fit_change_nothing() -> None:
    p, q = param(3), param(2, 2, seed=1)
    optimizer = PACE([{"params": [p]}, {"params": [q]}])
    run(optimizer, [p, q], range(2))
    before = copy.deepcopy(optimizer.state_dict())
    weights = p.detach().clone()
    fill_grads([p, q], 5)
    q.grad = q.grad.to_sparse()
    with pytest.raises(RuntimeError, match=r"gradient of param_groups\[1\]\['params'\]\[0\] is torch.sparse_coo"):
        optimizer.step()
    q.grad = None
    q.grad_dtype = None
    q.grad = torch.ones(2, 2, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"is torch\.float16, not torch\.float32"):
        optimizer.step()
    q.grad = torch.ones(2, 2)
    q.data = torch.ones(3, 3)
    with pytest.raises(RuntimeError, match=r"has shape \(2, 2\), not \(3, 3\)"):
        optimizer.step()
    assert torch.equal(p, weights)
    after = optimizer.state_dict()
    assert all(same(before["state"][k], after["state"][k]) for k in before["state"])


# ---- any sequence of events ----


@st.composite
def scripts(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[tuple[Any, ...]]]:
    groups = []
    for _ in range(draw(st.integers(1, 3))):
        shapes = draw(st.lists(st.lists(st.integers(0, 6), max_size=3), min_size=1, max_size=3))
        options = {
            "lr": draw(st.sampled_from([1e-3, 0.1])),
            "betas": draw(st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.5, 0.0)])),
            "lambda_pullback": draw(st.sampled_from([0.0, 0.05, 0.1])),
            "ema_update_freq": draw(st.integers(1, 3)),
            "use_ema_eval": draw(st.booleans()),
            "weight_decay": draw(st.sampled_from([0.0, 0.1])),
            "ema_kappa": draw(st.sampled_from([None, 0.2])),
            "ema_rho": draw(st.sampled_from([0.0, 2.0])),
            "pullback_from": draw(st.sampled_from(["weights", "step"])),
            "maximize": draw(st.booleans()),
            "clamp_pullback": draw(st.booleans()),
            "log_stats": draw(st.booleans()),
            "eps": 1e-2,  # keeps the gain of an unclamped pullback below 1
        }
        groups.append({"shapes": shapes, "dtype": draw(st.sampled_from(DTYPES)), **options})
    n = sum(len(g["shapes"]) for g in groups)
    events = draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=6))
    return groups, [(draw(st.sampled_from(["step", "swap, then step", "reload, then step"])), e) for e in events]


@given(scripts())
@settings(max_examples=60, deadline=None)
def test_any_training_ends_where_single_tensors_alone_end(script: tuple[list[Any], list[Any]]) -> None:
    """Groups, gradients that are None, swaps and reloads: each parameter ends, bit for bit, where it would have ended
    in an optimizer of its own that knows only its own steps."""
    groups, events = script

    def build() -> list[dict[str, Any]]:
        seeds = iter(range(100))
        return [
            {k: v for k, v in g.items() if k not in ("shapes", "dtype")}
            | {"params": [param(*s, dtype=g["dtype"], seed=next(seeds)) for s in g["shapes"]]}
            for g in groups
        ]

    grouped, alone = build(), build()
    optimizer = PACE(grouped)
    together = [p for g in grouped for p in g["params"]]
    singles = [(p, PACE([{**g, "params": [p]}])) for g in alone for p in g["params"]]
    for t, (event, has_grad) in enumerate(events):
        if event.startswith("swap"):
            optimizer.eval()
            optimizer.train()
        if event.startswith("reload"):
            optimizer.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
        for k, (p, (q, single)) in enumerate(zip(together, singles, strict=True)):
            fill_grads([p], 1000 * t + k)
            fill_grads([q], 1000 * t + k)
            if not has_grad[k]:
                p.grad = q.grad = None
            single.step()
        optimizer.step()
    for p, (q, single) in zip(together, singles, strict=True):
        assert torch.equal(p, q)
        assert same(optimizer.state.get(p, {}), single.state.get(q, {}))


def test_public_names() -> None:
    assert set(pace_kernels.__all__) >= {"PACE", "backends"}
