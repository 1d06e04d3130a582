"""Promise: what scripts do around an optimizer does to the average what the page "With other software" says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainer_cases import same, weights_of

from pace_kernels import PACE

pytestmark = pytest.mark.usefixtures("many_small_steps")
BATCHES = list(torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(1)))


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1).square().mean()


@pytest.mark.parametrize("fused", [False, True])
def test_what_a_gradient_scaler_leaves_in_grad(fused: bool) -> None:
    """By default unscaled gradients, as with AdamW; with fused=True scaled ones, as with AdamW(fused=True)."""
    model = net()
    optimizer = PACE(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(model, BATCHES[0])).backward()
    scaled = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    scaler.step(optimizer)
    for p, grad in zip(model.parameters(), scaled, strict=True):
        assert torch.equal(p.grad, grad if fused else grad / 8)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.double()])
def test_a_model_cast_after_construction_goes_on(change: Callable[[nn.Module], Any]) -> None:
    """The parameters stay the same objects; states follow in float32, for float64 weights in float64."""
    model = net()
    optimizer = PACE(model.parameters(), lr=0.1)
    loss_of(model, BATCHES[0]).backward()
    optimizer.step()
    averages = {name: optimizer.state[p]["ema"].clone() for name, p in model.named_parameters()}
    change(model)
    dtype = next(model.parameters()).dtype
    with optimizer.averaged(model):
        for name, p in model.named_parameters():
            assert torch.equal(p, averages[name].to(dtype))
    optimizer.zero_grad()
    loss_of(model, BATCHES[1].to(dtype)).backward()
    optimizer.step()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for p in model.parameters():
        assert {optimizer.state[p][key].dtype for key in ("ema", "exp_avg", "exp_avg_sq")} == {wide}
        assert optimizer.state[p]["step"] == 2


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("micro", [1, 3])
def test_the_averaging_weight_counts_steps_that_were_taken(micro: int, skipped: bool) -> None:
    """Not micro-batches, and not steps that a scaler skipped, the first one too."""
    model = net()
    optimizer = PACE(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for t in range(4 + skipped):
        optimizer.zero_grad()
        for _ in range(micro):
            scaler.scale(loss_of(model, BATCHES[t])).backward()
        if skipped and t == 0:
            model[0].weight.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.get_ema_beta_t() == pytest.approx((1 + 4) ** -0.2, rel=1e-6)  # docs/pace.md: γ = 1, ρ = 0, κ = 0.2
    assert {optimizer.state[p]["step"].item() for p in model.parameters()} == {4.0}


def alternating(toggles: bool) -> list[Any]:
    """A GAN: the discriminator requires no gradient while the generator steps, where ``toggles``, and the other way
    round; validated while the discriminator is frozen."""
    models = [net(0), net(1)]
    optimizers = [PACE(m.parameters(), lr=0.05) for m in models]
    seen = []
    for batch in BATCHES:
        for k in (0, 1):
            if toggles:
                models[1 - k].requires_grad_(False)
            models[k].zero_grad()
            (loss_of(models[1], models[0](batch)) * (1 - 2 * k)).backward()
            optimizers[k].step()
            if not k:
                with optimizers[0].averaged(models[0]), optimizers[1].averaged(models[1]), torch.no_grad():
                    seen.append(models[1](models[0](batch)))
            models[1 - k].requires_grad_(True)
    exported = [dict(o.ema_state_dict(m)) for o, m in zip(optimizers, models, strict=True)]
    return [*seen, *exported, *map(weights_of, models)]


def test_a_gan_that_freezes_one_network_at_a_time() -> None:
    with_toggles, without = alternating(True), alternating(False)
    assert same(with_toggles, without)
    average, live = with_toggles[-4:-2], with_toggles[-2:]
    assert not any(torch.equal(a[n], x[n]) for a, x in zip(average, live, strict=True) for n in a)


def test_peft_evaluates_without_its_adapter() -> None:
    """Which sets requires_grad around the evaluation: the average stays that of the adapter, and training goes on."""
    peft = pytest.importorskip("peft")
    ended, averages = [], []
    for evaluated in (True, False):
        model = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["0", "2"], r=2, init_lora_weights=False))
        optimizer = PACE([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for batch in BATCHES:
            model.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
            if evaluated:
                with torch.no_grad(), optimizer.averaged(model):
                    adapted = model(batch)
                    with model.disable_adapter():
                        assert torch.equal(model(batch), net()(batch))
                    assert torch.equal(model(batch), adapted)
                with model.disable_adapter():
                    averages.append(dict(optimizer.ema_state_dict(model)))
                assert same(averages[-1], dict(optimizer.ema_state_dict(model)))
        ended.append((weights_of(model), dict(optimizer.ema_state_dict(model))))
    assert same(*ended)
    live, average = ended[0]
    assert all(torch.equal(live[name], average[name]) != ("lora" in name) for name in live)
