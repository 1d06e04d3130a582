"""Promise: batch normalization beside an average. Running statistics are the live model's, which callbacks say once;
recomputed for the average they are what ``update_bn`` gives, and the live ones come back bit for bit."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainer_cases import same, weights_of

import pace_kernels
from pace_kernels import PACE

pytestmark = pytest.mark.usefixtures("many_small_steps")
BATCHES = list(torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(1)))


class Norm(nn.Module):
    """Dropout draws random numbers in training mode; the frozen layer is in evaluation mode within one that trains."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Linear(6, 5), nn.BatchNorm1d(5, momentum=0.3), nn.Dropout(dropout), nn.Linear(5, 5)
        )
        self.frozen = nn.BatchNorm1d(5)
        self.head = nn.Sequential(nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 1))
        self.frozen.eval()

    def forward(self, x: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
        output = self.head(self.frozen(self.body(x)))
        return output if labels is None else {"loss": (output - labels).square().mean(), "logits": output}


def trained(model: nn.Module, steps: int = 4) -> PACE:
    optimizer = PACE(model.parameters(), lr=0.05)
    for batch in BATCHES[:steps]:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    return optimizer


def with_update_bn(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """What torch's own ``update_bn`` gives for a copy that holds the average."""
    shipped = copy.deepcopy(model)
    shipped.load_state_dict(optimizer.ema_state_dict(model))
    torch.optim.swa_utils.update_bn(BATCHES, shipped)
    return weights_of(shipped)


def function(model: nn.Module) -> None:
    for batch in BATCHES:
        model(batch)


WAYS: dict[str, Any] = {
    "tensors": BATCHES,
    "pairs": [(batch, None) for batch in BATCHES],
    "mappings": [{"x": batch} for batch in BATCHES],
    "an iterator": "iterator",
    "a function": function,
}


@pytest.mark.parametrize("way", WAYS)
def test_within_the_context_they_are_those_of_the_average_and_afterwards_the_live_ones(way: str) -> None:
    model = Norm()
    optimizer = trained(model)
    random = torch.get_rng_state()
    wanted = with_update_bn(model, optimizer)
    torch.set_rng_state(random)
    live, modes = weights_of(model), [m.training for m in model.modules()]
    batches = iter(BATCHES) if way == "an iterator" else WAYS[way]
    with pace_kernels.averaged(model, optimizer, update_bn=batches):
        assert same(weights_of(model), wanted)
        assert [m.training for m in model.modules()] == modes
    assert same(weights_of(model), live)
    assert [m.training for m in model.modules()] == modes and model.body[1].momentum == 0.3
    assert torch.equal(torch.get_rng_state(), random)
    assert not same(live, wanted)


def test_training_goes_on_as_if_they_had_not_been_recomputed() -> None:
    ended = []
    for evaluated in (True, False):
        model = Norm()
        optimizer = trained(model)
        if evaluated:
            with pace_kernels.averaged(model, optimizer, update_bn=BATCHES), torch.no_grad():
                model.eval()
                model(BATCHES[0])
                model.train()
                model.frozen.eval()
        for batch in BATCHES:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
        ended.append(weights_of(model))
    assert same(*ended)


def test_an_exception_in_a_pass_puts_everything_back() -> None:
    model = Norm()
    optimizer = trained(model)
    live, modes = weights_of(model), [m.training for m in model.modules()]

    def fails(model: nn.Module) -> None:
        model(BATCHES[0])
        raise ZeroDivisionError("in a pass")

    with pytest.raises(ZeroDivisionError), pace_kernels.averaged(model, optimizer, update_bn=fails):
        raise AssertionError("it was entered")
    assert same(weights_of(model), live) and [m.training for m in model.modules()] == modes
    assert not optimizer.param_groups[0]["swapped"] and model.body[1].momentum == 0.3


def test_a_model_without_such_layers_gets_no_pass() -> None:
    model = nn.Linear(6, 1)
    optimizer = trained(model)

    def passes(model: nn.Module) -> None:
        raise AssertionError("it was called")

    with pace_kernels.averaged(model, optimizer, update_bn=passes):
        assert torch.equal(model.weight, optimizer.state[model.weight]["ema"])


# ---- the callbacks ---------------------------------------------------------------------------------------------------

SAID = "2 layers of batch normalization"


def lightning_fit(directory: Path, ckpt_path: Any = None, **options: Any) -> Any:
    lightning = pytest.importorskip("lightning.pytorch")
    from pace_kernels.integrations.lightning import UseAverage

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = Norm(dropout=0.0)
            self.validated: list[dict[str, Tensor]] = []

        def forward(self, batch: Tensor) -> Tensor:
            return self.net(batch)

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.net(batch).square().mean()

        def validation_step(self, batch: Tensor, index: int) -> None:
            self.validated.append(weights_of(self.net))

        def configure_optimizers(self) -> Any:
            return PACE(self.net.parameters(), lr=0.05)

    callback = UseAverage(**options)
    saves = lightning.callbacks.ModelCheckpoint(directory, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=8,
        num_sanity_val_steps=0, callbacks=[callback, saves], val_check_interval=2, default_root_dir=directory,
    )  # fmt: skip
    module = Module()
    loader = torch.utils.data.DataLoader(torch.cat(BATCHES), batch_size=8)  # type: ignore[arg-type]
    trainer.fit(module, loader, loader, ckpt_path=ckpt_path)
    return module, trainer.optimizers[0], callback, trainer


@pytest.mark.parametrize(("update_bn", "said"), [(None, 1), (False, 0), (BATCHES, 0)], ids=["by default", "no", "yes"])
def test_lightning_says_it_once(update_bn: Any, said: int, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lightning_fit(tmp_path, update_bn=update_bn)
    assert len([w for w in caught if SAID in str(w.message)]) == said


@pytest.mark.parametrize("checkpoints", [True, False])
def test_lightning_recomputes_them_and_goes_on_with_the_live_ones(checkpoints: bool, tmp_path: Path) -> None:
    module, optimizer, callback, trainer = lightning_fit(tmp_path / "with", checkpoints=checkpoints, update_bn=BATCHES)
    alone, other, *_ = lightning_fit(tmp_path / "without", checkpoints=checkpoints, update_bn=False)
    assert len(module.validated) == 4 * len(BATCHES)
    buffers = {name for name, _ in module.net.named_buffers()}
    for seen, unlike in zip(module.validated, alone.validated, strict=True):
        assert all(torch.equal(seen[name], unlike[name]) == (name not in buffers) for name in seen if "num" not in name)
    ended = weights_of(module.net)
    callback.on_train_start(trainer, module)  # as the next fit() begins
    other.train()
    assert same(weights_of(module.net), weights_of(alone.net))
    assert same(with_update_bn(module.net, optimizer), ended)

    again, _, callback, trainer = lightning_fit(
        tmp_path / "again", checkpoints=checkpoints, update_bn=BATCHES, ckpt_path=tmp_path / "with" / "step=4.ckpt"
    )
    assert same(weights_of(again.net), ended)
    callback.on_train_start(trainer, again)
    assert same(weights_of(again.net), weights_of(alone.net))


def transformers_train(directory: Path, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from pace_kernels.integrations.transformers import UseAverage

    rows = [{"x": row, "labels": row[:1]} for batch in BATCHES for row in batch]
    args = transformers.TrainingArguments(
        output_dir=str(directory), max_steps=4, per_device_train_batch_size=8, report_to=[], disable_tqdm=True,
        use_cpu=True, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, logging_steps=1,
    )  # fmt: skip
    model = Norm(dropout=0.0)
    seen: list[dict[str, Tensor]] = []

    class Watch(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_evaluate(self, *_: Any, **__: Any) -> None:
            seen.append(weights_of(model))

    optimizer = PACE(model.parameters(), lr=0.05)
    callback = UseAverage(**options)
    trainer = transformers.Trainer(
        model, args, train_dataset=rows, eval_dataset=rows, optimizers=(optimizer, None), callbacks=[callback, Watch()]
    )
    trainer.train()
    return model, optimizer, callback, seen


@pytest.mark.parametrize(("update_bn", "said"), [(None, 1), (False, 0), (BATCHES, 0)], ids=["by default", "no", "yes"])
def test_transformers_says_it_once(update_bn: Any, said: int, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        transformers_train(tmp_path, update_bn=update_bn)
    assert len([w for w in caught if SAID in str(w.message)]) == said


def test_transformers_recomputes_them_and_goes_on_with_the_live_ones(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, optimizer, callback, seen = transformers_train(tmp_path / "with", update_bn=BATCHES)
    alone, other, _, unlike = transformers_train(tmp_path / "without", update_bn=False)
    buffers = {name for name, _ in model.named_buffers()}
    assert len(seen) == len(unlike) == 2
    for step, ours, theirs in zip((2, 4), seen, unlike, strict=True):
        assert all(torch.equal(ours[n], theirs[n]) == (n not in buffers) for n in ours if "num" not in n)
        file = tmp_path / "with" / f"checkpoint-{step}" / "model.safetensors"
        assert same(load_file(file), ours)
    ended = weights_of(model)
    callback.on_step_begin(None, None, None, model=model, optimizer=optimizer)  # as the next train() begins
    other.train()
    assert same(weights_of(model), weights_of(alone))
    assert same(with_update_bn(model, optimizer), ended)


@pytest.mark.parametrize("library", ["lightning", "transformers"])
def test_true_names_no_batches(library: str) -> None:
    pytest.importorskip(library)
    module = __import__(f"pace_kernels.integrations.{library}", fromlist=["UseAverage"])
    with pytest.raises(ValueError, match="update_bn must be batches"):
        module.UseAverage(update_bn=True)
