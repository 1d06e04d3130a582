"""Promise: behind ``Accelerator.prepare`` PACE and MADA take the steps of a loop by hand, and the average can be had:
``prepare`` passes ``eval()`` and ``train()`` through, and the optimizer that was handed over stays the one that steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_cases import AVERAGING, OPTIMIZERS, averages_of, same, state_of, weights_of

import pace_kernels

accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.usefixtures("many_small_steps", "one_accelerator")
STEPS, BATCH = 8, 4
ROWS = torch.randn(STEPS * BATCH, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def one_accelerator() -> Any:
    """Its state is one a process: each test begins with none."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def tiny(seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4, generator=generator)
    return model


def parts_of(name: str, seed: int = 0) -> tuple[torch.nn.Module, Any, Any, Any]:
    cls, options = OPTIMIZERS[name]
    model = tiny(seed)
    optimizer = cls(model.parameters(), **options)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    return model, optimizer, torch.utils.data.DataLoader(ROWS, batch_size=BATCH), scheduler  # type: ignore[arg-type]


def loss_of(model: Any, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch).float() - batch.sum(1, keepdim=True).sin()).square().mean()


def train(accelerator: Any, model: Any, optimizer: Any, batches: Any, scheduler: Any, max_norm: float = 0.1) -> None:
    """The loop of Accelerate's documentation."""
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_loop_by_hand(name: str, accumulate: int, precision: str) -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate)
    model, original, loader, plan = parts_of(name)
    prepared = accelerator.prepare(model, original, loader, plan)
    assert prepared[1].optimizer is original
    train(accelerator, *prepared)

    ours, optimizer, loader, scheduler = parts_of(name)
    for i, batch in enumerate(loader):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = ours(batch)
        loss = (output.float() - batch.sum(1, keepdim=True).sin()).square().mean() / accumulate
        loss.backward()
        if (i + 1) % accumulate == 0:
            torch.nn.utils.clip_grad_norm_(ours.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert original.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != OPTIMIZERS[name][1]["lr"]
    assert same(weights_of(model), weights_of(ours))
    assert same(state_of(original), state_of(optimizer))


@pytest.mark.parametrize("name", AVERAGING)
def test_three_ways_to_the_average(name: str) -> None:
    """``eval()`` and ``train()`` of what ``prepare`` returned; ``averaged()`` of what was handed over, which what was
    returned has as ``optimizer.optimizer``. What was returned has no ``averaged()`` of its own."""
    accelerator = accelerate.Accelerator(cpu=True)
    model, original, loader, plan = parts_of(name)
    wrapped, optimizer, loader, scheduler = accelerator.prepare(model, original, loader, plan)
    train(accelerator, wrapped, optimizer, loader, scheduler)
    live, average = weights_of(model), averages_of(model, original)
    assert not same(live, average)
    optimizer.eval()
    assert same(weights_of(model), average)
    assert same(accelerator.get_state_dict(wrapped), average)
    optimizer.train()
    assert same(weights_of(model), live)
    for owner in (original, optimizer.optimizer):
        with owner.averaged():
            assert same(weights_of(accelerator.unwrap_model(wrapped)), average)
        assert same(weights_of(model), live)
    with pace_kernels.averaged(wrapped, optimizer):
        assert same(weights_of(accelerator.unwrap_model(wrapped)), average)
    assert same(weights_of(model), live)
    assert same(dict(pace_kernels.ema_state_dict(model, optimizer)), average)
    assert not hasattr(optimizer, "averaged")
    assert not hasattr(optimizer, "ema_state_dict")


@pytest.mark.parametrize("name", AVERAGING)
def test_a_step_with_the_average_swapped_in_is_refused(name: str) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model, original, loader, plan = parts_of(name)
    prepared = accelerator.prepare(model, original, loader, plan)
    train(accelerator, *prepared)
    prepared[1].eval()
    loss_of(model, ROWS).backward()
    with pytest.raises(RuntimeError, match=r"train\(\)"):
        prepared[1].step()


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_state_goes_on_bit_for_bit(name: str, swapped: bool, tmp_path: Path) -> None:
    """Saved with the live weights in, or with the average: the state says which."""
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, loader, scheduler = accelerator.prepare(*parts_of(name))
    train(accelerator, model, optimizer, loader, scheduler)
    if swapped:
        optimizer.eval()
    accelerator.save_state(str(tmp_path))
    saved = weights_of(model)
    optimizer.train()
    train(accelerator, model, optimizer, loader, scheduler)
    whole, state = weights_of(model), state_of(optimizer.optimizer)

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True)
    again, optimizer, loader, scheduler = accelerator.prepare(*parts_of(name, seed=9))
    accelerator.load_state(str(tmp_path))
    assert same(weights_of(again), saved)
    optimizer.train()
    train(accelerator, again, optimizer, loader, scheduler)
    assert same(weights_of(again), whole)
    assert same(state_of(optimizer.optimizer), state)


@pytest.mark.parametrize("name", AVERAGING)
def test_saved_with_the_average_in_the_model_file_holds_it(name: str, tmp_path: Path) -> None:
    load_file = pytest.importorskip("safetensors.torch").load_file
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, loader, scheduler = accelerator.prepare(*parts_of(name))
    train(accelerator, model, optimizer, loader, scheduler)
    average, live = averages_of(model, optimizer.optimizer), weights_of(model)
    for directory, swap, expected in (("live", optimizer.train, live), ("average", optimizer.eval, average)):
        swap()
        accelerator.save_state(str(tmp_path / directory))
        accelerator.save_model(model, str(tmp_path / f"{directory} model"))
        for file in (tmp_path / directory, tmp_path / f"{directory} model"):
            assert same(load_file(file / "model.safetensors"), expected)
