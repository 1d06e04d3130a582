"""Promise: step_in_backward() takes the steps of its optimizer within backward(), frees each gradient, and refuses what
it can't do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ranks import run
from torch import Tensor, nn

from pace_kernels import MADA, PACE, ScheduleFreeAdamW, averaged, step_in_backward

OPTIONS: dict[str, Any] = {"lr": 1e-2, "ema_kappa": 0.5, "state_bits": 8, "master_weight_bits": 32, "log_stats": True}
X = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)).bfloat16()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(6))).bfloat16()


def factory(params: Any) -> PACE:
    return PACE(params, **OPTIONS)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, a.parameters(), b.parameters()))


@pytest.mark.parametrize("bucket_bytes", (1, 20_000, 10**9))
def test_it_has_the_bits_of_its_optimizer(bucket_bytes: int) -> None:
    model, other = net(), net()
    plain, ours = factory(model.parameters()), step_in_backward(other, factory, bucket_bytes=bucket_bytes)
    assert isinstance(ours, PACE) and ours.state_dict().keys() == plain.state_dict().keys()
    schedules = [torch.optim.lr_scheduler.OneCycleLR(each, 1e-2, total_steps=20) for each in (plain, ours)]
    for t in range(9):
        for each, optimizer, schedule in zip((model, other), (plain, ours), schedules, strict=True):
            optimizer.zero_grad()
            each(X).square().mean().backward()
            if optimizer is ours:
                assert all(p.grad is None for p in other.parameters())
            optimizer.step()
            schedule.step()
        assert same(model, other), t
    assert plain.get_step_stats() == pytest.approx(ours.get_step_stats(), rel=1e-12)  # sums in another order
    assert ours.memory().gradients == 0 and ours.memory().states == plain.memory().states
    with averaged(model, plain), averaged(other, ours):
        assert same(model, other)
    last = step_in_backward(net(), factory)
    last.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert last.state_dict()["state"].keys() == plain.state_dict()["state"].keys()


def test_gradients_take_the_memory_of_a_bucket() -> None:
    model, most = net(), [0]
    optimizer = step_in_backward(model, factory, bucket_bytes=2 * 64 * 65)

    def count(_: Tensor) -> None:
        most[0] = max(most[0], sum(p.grad is not None for p in model.parameters()))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(count)
    model(X).square().mean().backward()
    assert most[0] <= 2 and optimizer.memory().gradients == 0  # a weight and a bias


def test_parameters_that_were_not_used_wait_for_nobody() -> None:
    model, other = net(), net()
    plain, ours = factory(model.parameters()), step_in_backward(other, factory)
    for t in range(4):
        for each, optimizer in ((model, plain), (other, ours)):
            each[:3](X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert same(model, other), t


def test_clipping_by_the_norm_of_the_iteration_before() -> None:
    model, other = net(), net()
    plain, ours = factory(model.parameters()), step_in_backward(other, factory, max_norm=1e-3, bucket_bytes=20_000)
    norm = None
    for t in range(5):
        model(X).square().mean().backward()
        grads = [p.grad.float() for p in model.parameters()]
        plain.step(clip_coef=None if norm is None else (1e-3 / (norm + 1e-6)).clamp(max=1))
        norm = torch.stack([g.square().sum() for g in grads[::-1]]).sum().sqrt()
        plain.zero_grad()
        other(X).square().mean().backward()
        ours.step()
        assert torch.allclose(norm, ours._norm, rtol=1e-3)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=0, atol=2**-9), t  # sums in another order


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_a_norm_that_is_not_finite_clips_nothing(bad: float) -> None:
    """Clipped by it all weights would be NaN in the next iteration, or not move."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    optimizer = step_in_backward(model, lambda params: PACE(params, lr=1e-3), max_norm=1.0)

    def spoil(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad[0, 0] = bad
        return grad

    handle = model[2].weight.register_hook(spoil)
    model(torch.ones(4, 64)).square().mean().backward()
    optimizer.step()
    handle.remove()
    with torch.no_grad():
        model[2].weight[0, 0] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(4, 64)).square().mean().backward()
    optimizer.step()
    assert sum(int((~p.isfinite()).sum()) for p in model.parameters()) <= 1  # v of that one element stays infinite
    assert not any(torch.equal(was, p) for was, p in zip(before, model.parameters(), strict=True))


def test_accumulation_is_refused_and_zero_grad_ends_an_iteration() -> None:
    model = net()
    optimizer = step_in_backward(model, factory)
    model(X).square().mean().backward()
    with pytest.raises(RuntimeError, match="can't accumulate"):
        model(X).square().mean().backward()
    with pytest.raises(RuntimeError, match="after a refused accumulation"):
        optimizer.step()
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


def counts(optimizer: PACE) -> list[float]:
    return [optimizer.state[p]["step"].item() for group in optimizer.param_groups for p in group["params"]]


def test_gradients_of_before_and_of_parameters_unfrozen_later_step_once() -> None:
    model = net()
    model[5].requires_grad_(False)
    model(X).square().mean().backward()
    optimizer = step_in_backward(model, factory, bucket_bytes=1)
    model[5].requires_grad_(True)
    for t in range(1, 3):
        model(X).square().mean().backward()
        optimizer.step()
        assert counts(optimizer) == [t] * 12 and all(p.grad is None for p in model.parameters())


def test_a_frozen_parameter_with_a_gradient_keeps_its_average_until_it_steps() -> None:
    model, other = net(), net()
    optimizer, plain = step_in_backward(model, factory, bucket_bytes=1), factory(other.parameters())
    for t in range(5):
        plain.zero_grad()
        for one, its in ((model, optimizer), (other, plain)):
            if t == 3:
                one[5].weight.requires_grad_(False)
                one[5].weight.grad = torch.ones_like(one[5].weight)
            one(X).square().mean().backward()
            its.step()
    assert same(model, other)


def test_a_failed_iteration_leaves_no_norm() -> None:
    model, other = net(), net()
    first, second = (step_in_backward(m, factory, max_norm=1.0, bucket_bytes=1) for m in (model, other))
    for m, optimizer in ((model, first), (other, second)):
        m(X).square().mean().backward()
        optimizer.step()
    with pytest.raises(ZeroDivisionError):
        handle = model[0].weight.register_hook(lambda _: 1 / 0)
        model(X).square().mean().backward()
    handle.remove()
    first.zero_grad()
    norms = []
    for m, optimizer in ((model, first), (other, second)):
        m.load_state_dict(net().state_dict())
        optimizer.load_state_dict(factory(net().parameters()).state_dict())
        m(X).square().mean().backward()
        optimizer.step()
        norms.append(optimizer._norm)
    assert torch.equal(*norms)


def test_two_optimizers_over_a_model_are_refused() -> None:
    model = net()
    optimizers = [step_in_backward(model, factory) for _ in range(2)]
    with pytest.raises(RuntimeError, match="has freed a gradient before it was used"):
        model(X).square().mean().backward()
    assert not optimizers[1].state


def test_hooks_of_steps_run_once_an_iteration() -> None:
    model, calls = net(), []
    optimizer = step_in_backward(model, factory, bucket_bytes=1)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    model(X).square().mean().backward()
    optimizer.step()
    assert calls == ["before", "after"]


@pytest.mark.parametrize("unscales", (False, True))
@pytest.mark.parametrize("fused", (None, False, True))
def test_a_scaler_is_refused_in_a_sentence_and_training_goes_on_without(fused: bool | None, unscales: bool) -> None:
    model = net()
    optimizer = step_in_backward(model, lambda params: PACE(params, fused=fused, **OPTIONS))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(X).square().mean()).backward()
    if unscales:
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) by a GradScaler.*scaled gradients.*load the last checkpoint"):
        scaler.step(optimizer)
    optimizer.zero_grad()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    twin = net()
    for trained, its in ((model, optimizer), (twin, step_in_backward(twin, factory))):
        trained(X).square().mean().backward()
        its.step()
    assert same(model, twin)


def test_what_is_refused() -> None:
    model = net()
    for make, error, sentence in (
        (lambda p: MADA(p), TypeError, "factory must return a PACE, got MADA"),
        (lambda p: ScheduleFreeAdamW(p), TypeError, "got ScheduleFreeAdamW"),
        (lambda p: PACE(p, skip_nonfinite=True), ValueError, "skip_nonfinite must be False"),
    ):
        with pytest.raises(error, match=sentence):
            step_in_backward(model, make)
    for make, given, sentence in (
        (PACE(model.parameters()), {}, "got one that is made already"),
        ("PACE", {}, "got 'PACE'"),
        (PACE, {"lr": 1e-3, "eps": 1e-6}, "got lr, eps, which factory gives"),
    ):
        with pytest.raises(TypeError, match=rf"{sentence}.*lambda params: PACE\(params"):
            step_in_backward(model, make, **given)
    for given, sentence in (({"bucket_bytes": 0}, "bucket_bytes must be"), ({"max_norm": 0.0}, "max_norm must be")):
        with pytest.raises(ValueError, match=sentence):
            step_in_backward(model, factory, **given)
    optimizer = step_in_backward(model, factory)
    for call, error, sentence in (
        (lambda: optimizer.step(lambda: None), RuntimeError, "a closure"),
        (lambda: optimizer.step(clip_coef=0.5), RuntimeError, "clip_coef"),
        (lambda: optimizer.add_param_group({"params": [torch.ones(1)]}), RuntimeError, "make a new one"),
        (lambda: copy.deepcopy(optimizer), TypeError, "can't be copied"),
    ):
        with pytest.raises(error, match=sentence):
            call()
    skipping = PACE(net().parameters(), skip_nonfinite=True)
    with pytest.raises(ValueError, match="skip_nonfinite must be False"):
        optimizer.load_state_dict(skipping.state_dict())


def test_hooks_go_with_the_optimizer() -> None:
    model = net()
    step_in_backward(model, factory)
    model(X).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())  # nobody steps them any more


def on_ranks() -> list[str]:
    from test_sharded import mesh_of
    from torch.distributed.fsdp import fully_shard

    model, other = fully_shard(net(), mesh=mesh_of("fsdp")), fully_shard(net(), mesh=mesh_of("fsdp"))
    plain = factory(model.parameters())
    ours = step_in_backward(other, factory, bucket_bytes=10_000, max_norm=1e3)
    found = []
    for t in range(3):
        for each, optimizer in ((model, plain), (other, ours)):
            each(X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            if not torch.equal(p.to_local(), q.to_local()):
                found.append(f"step {t}")
    replicated = net()
    step = step_in_backward(replicated, factory)
    try:
        replicated(X).square().mean().backward()
        found.append("replicas are stepped")
    except RuntimeError as error:
        found += [] if "fully_shard" in str(error) else [str(error)]
    del step
    return found


def test_sharded() -> None:
    assert run(2, on_ranks) == [[], []]
