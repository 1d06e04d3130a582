"""Promise: with ``UseAverage`` Lightning evaluates, saves and ends with the average, trains the live weights, and goes
on from a checkpoint bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_cases import AVERAGING, OPTIMIZERS, averages_of, same, state_of, weights_of

lightning = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402

from pace_kernels.integrations.lightning import UseAverage  # noqa: E402
from pace_kernels.torch_rules.schedule_free import schedule_free_average  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("many_small_steps"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
]
STEPS = 8  # two epochs of four


class Tiny(lightning.LightningModule):
    """Notes the weights that validation, test and prediction see, and the average that there is then."""

    def __init__(self, name: str = "PACE", seed: int = 0) -> None:
        super().__init__()
        self.name = name
        generator = torch.Generator().manual_seed(seed)
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
        for p in self.net.parameters():
            torch.nn.init.normal_(p, std=0.4, generator=generator)
        self.seen: list[tuple[str, dict[str, torch.Tensor], dict[str, torch.Tensor] | None]] = []
        self.fail_at: int | None = None

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return (self.net(batch) - batch.sum(1, keepdim=True).sin()).square().mean()

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.loss(batch)

    def note(self, stage: str) -> None:
        ours = self.trainer.optimizers if self.name in AVERAGING else []
        self.seen.append((stage, weights_of(self), averages_of(self, ours[0]) if ours else None))

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.note("validation")
        self.log("val_loss", self.loss(batch))
        if self.global_step == self.fail_at:
            raise RuntimeError("validation failed")

    def test_step(self, batch: torch.Tensor, index: int) -> None:
        self.note("test")

    def predict_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        self.note("predict")
        return self.net(batch)

    def configure_optimizers(self) -> Any:
        cls, options = OPTIMIZERS[self.name]
        optimizer = cls(self.parameters(), **options)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Batches:
    """Lightning goes on in the middle of an epoch where the loader can: a plain DataLoader starts anew there."""

    def __init__(self, count: int, seed: int) -> None:
        self.batches = torch.randn(count, 4, 6, generator=torch.Generator().manual_seed(seed))
        self.at = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.at < len(self):
            self.at += 1
            yield self.batches[self.at - 1]
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"] % len(self)


VALIDATION = torch.utils.data.DataLoader(torch.randn(4, 6), batch_size=4)  # type: ignore[arg-type]


def trainer_of(directory: Path, *callbacks: Any, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "default_root_dir": str(directory),
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "max_steps": STEPS,
        "num_sanity_val_steps": 0,
    }
    return lightning.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def fit(model: Tiny, trainer: Any, validate: bool = False, ckpt_path: Any = None) -> Any:
    trainer.fit(model, Batches(4, seed=1), VALIDATION if validate else None, ckpt_path=ckpt_path)
    return trainer.optimizers[0]


def live_of(model: Tiny, optimizer: Any) -> dict[str, torch.Tensor]:
    optimizer.train()
    return weights_of(model)


# What Trainer does beside plain steps, as data.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sanity check": {"num_sanity_val_steps": 2},
    "clipped and accumulated": {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
    "bfloat16, clipped": {"precision": "bf16-mixed", "gradient_clip_val": 0.1},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", AVERAGING)
def test_it_evaluates_the_average_and_trains_the_live_weights(name: str, options: str, tmp_path: Path) -> None:
    model, alone = Tiny(name), Tiny(name)
    every = {"val_check_interval": 2, **OPTIONS[options]}
    evaluated = fit(model, trainer_of(tmp_path, UseAverage(), **every), validate=True)
    assert len(model.seen) >= STEPS // 2
    for _, weights, average in model.seen:
        assert same(weights, average)
    assert same(weights_of(model), averages_of(model, evaluated))
    live = live_of(model, evaluated)
    assert not same(live, averages_of(model, evaluated))
    trained = fit(alone, trainer_of(tmp_path, **OPTIONS[options]))
    assert same(live, weights_of(alone))
    assert same(state_of(evaluated), state_of(trained))


def test_without_the_callback_it_evaluates_the_live_weights(tmp_path: Path) -> None:
    """Why the callback is there."""
    model = Tiny()
    fit(model, trainer_of(tmp_path, val_check_interval=2), validate=True)
    assert all(not same(weights, average) for _, weights, average in model.seen)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_after_fit_each_stage_uses_the_average(stage: str, tmp_path: Path) -> None:
    model = Tiny()
    trainer = trainer_of(tmp_path, UseAverage())
    average = averages_of(model, fit(model, trainer))
    getattr(trainer, stage)(model, VALIDATION, **({"verbose": False} if stage != "predict" else {}))
    assert same(model.seen[-1][1], average)
    assert same(weights_of(model), average)


def test_train_again_goes_on_from_the_live_weights(tmp_path: Path) -> None:
    """fit() makes a new optimizer, so what goes on are weights; with the same optimizer they are the live ones."""
    model = Tiny()
    trainer = trainer_of(tmp_path, UseAverage(), max_steps=3)
    optimizer = fit(model, trainer)
    live = live_of(model, optimizer)
    optimizer.eval()
    model.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
    seen = []
    model.on_train_batch_start = lambda *_: seen.append(weights_of(model))  # type: ignore[method-assign, assignment]
    trainer.fit_loop.epoch_loop.max_steps = STEPS
    trainer.fit(model, Batches(4, seed=1))
    assert same(seen[0], live)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("checkpoints", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_goes_on_bit_for_bit(name: str, checkpoints: bool, options: str, tmp_path: Path) -> None:
    def run(directory: str, seed: int, ckpt_path: Any = None) -> tuple[Tiny, Any, Any]:
        saves = ModelCheckpoint(tmp_path / directory, filename="{step}", every_n_train_steps=step, save_top_k=-1)
        trainer = trainer_of(tmp_path, UseAverage(checkpoints), saves, **OPTIONS[options])
        model = Tiny(name, seed)
        return model, fit(model, trainer, validate=True, ckpt_path=ckpt_path), trainer

    step = 2 if "accumulate_grad_batches" in OPTIONS[options] else 3  # in the first epoch's middle, or at its end
    whole, of_whole, trainer = run("whole", 0)
    again, of_again, other = run("again", 9, tmp_path / "whole" / f"step={step}.ckpt")
    assert trainer.global_step == other.global_step == STEPS
    assert same(weights_of(again), weights_of(whole))
    assert same(state_of(of_again), state_of(of_whole))
    for optimizer in (of_again, of_whole) if name in AVERAGING else ():
        optimizer.train()
    assert same(weights_of(again), weights_of(whole))
    later = sorted((tmp_path / "again").glob("*.ckpt"))
    assert later
    for file in later:
        a, b = (torch.load(tmp_path / d / file.name, weights_only=True) for d in ("again", "whole"))
        assert all(same(a[key], b[key]) for key in ("state_dict", "optimizer_states", "lr_schedulers"))


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("checkpoints", [True, False])
@pytest.mark.parametrize("name", AVERAGING)
def test_what_checkpoints_hold(name: str, checkpoints: bool, weights_only: bool, tmp_path: Path) -> None:
    class Watch(lightning.Callback):
        def __init__(self) -> None:
            self.live: dict[int, Any] = {}
            self.average: dict[int, Any] = {}

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.live[trainer.global_step] = weights_of(pl_module)
            self.average[trainer.global_step] = averages_of(pl_module, trainer.optimizers[0])

    watch = Watch()
    by_steps = ModelCheckpoint(
        tmp_path / "steps", filename="{step}", every_n_train_steps=3, save_top_k=-1, save_weights_only=weights_only
    )
    by_loss = ModelCheckpoint(
        tmp_path / "best", filename="{step}", monitor="val_loss", save_top_k=-1, save_weights_only=weights_only
    )
    # Saved in the hook in which, with checkpoints=True, the average comes in to stay.
    last = ModelCheckpoint(tmp_path / "last", every_n_train_steps=100, save_last=True, save_weights_only=weights_only)
    trainer = trainer_of(tmp_path, UseAverage(checkpoints), watch, by_steps, by_loss, last)
    model = Tiny(name)
    fit(model, trainer, validate=True)
    files = sorted(tmp_path.glob("*/*.ckpt"))
    assert {f.parent.name for f in files} == {"steps", "best", "last"}
    for file in files:
        saved = torch.load(file, weights_only=True)
        step = saved["global_step"]
        assert not same(watch.live[step], watch.average[step])
        assert same(saved["state_dict"], (watch.average if checkpoints else watch.live)[step]), file
        if weights_only:
            assert "optimizer_states" not in saved
            continue
        states = saved["optimizer_states"][0]["state"]
        other, key = (watch.live, "live") if checkpoints else (watch.average, "ema")
        if name == "schedule-free" and not checkpoints:  # whose average follows from the live weights and z
            for state, y in zip(states.values(), saved["state_dict"].values(), strict=True):
                state["ema"] = schedule_free_average(y, state["z"], 0.9)
        assert same({n: states[i][key] for i, n in enumerate(other[step])}, other[step]), file
    # By hand after fit(): the model holds the average then.
    trainer.save_checkpoint(tmp_path / "by hand.ckpt")
    by_hand = torch.load(tmp_path / "by hand.ckpt", weights_only=True)
    assert same(by_hand["state_dict"], watch.average[STEPS])


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_a_checkpoint_that_is_loaded_is_used_as_it_is(stage: str, tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    model = Tiny()
    trainer = trainer_of(tmp_path, UseAverage(), saves)
    optimizer = fit(model, trainer)
    file = tmp_path / "step=3.ckpt"
    saved = torch.load(file, weights_only=True)["state_dict"]
    assert not same(saved, weights_of(model))
    optimizer.train()  # the average of the last step could be swapped in over what is loaded
    getattr(trainer, stage)(model, VALIDATION, ckpt_path=str(file), verbose=False)
    assert same(model.seen[-1][1], saved)
    trainer.save_checkpoint(tmp_path / "loaded.ckpt")
    assert same(torch.load(tmp_path / "loaded.ckpt", weights_only=True)["state_dict"], saved)
    fresh = trainer_of(tmp_path, UseAverage())  # one that never trained
    other = Tiny(seed=9)
    getattr(fresh, stage)(other, VALIDATION, ckpt_path=str(file), verbose=False)
    assert same(other.seen[-1][1], saved)


def test_an_exception_in_validation_restores_the_live_weights(tmp_path: Path) -> None:
    model, alone = Tiny(), Tiny()
    model.fail_at = 4
    trainer = trainer_of(tmp_path, UseAverage(), val_check_interval=2)
    with pytest.raises(RuntimeError, match="validation failed"):
        fit(model, trainer, validate=True)
    optimizer = trainer.optimizers[0]
    assert not any(group["swapped"] for group in optimizer.param_groups)
    trained = fit(alone, trainer_of(tmp_path, max_steps=4))
    assert same(weights_of(model), weights_of(alone))
    assert same(state_of(optimizer), state_of(trained))


def test_without_an_average_nothing_is_swapped(tmp_path: Path) -> None:
    model, alone = Tiny("MADA"), Tiny("MADA")
    with_it = fit(model, trainer_of(tmp_path, UseAverage(), val_check_interval=2), validate=True)
    without = fit(alone, trainer_of(tmp_path))
    assert same(weights_of(model), weights_of(alone))
    assert same(state_of(with_it), state_of(without))


def test_optimizers_of_torch_are_left_as_they_are(tmp_path: Path) -> None:
    model, alone = Tiny("MADA"), Tiny("MADA")  # so that no average is asked for
    for m in (model, alone):
        m.configure_optimizers = lambda m=m: torch.optim.AdamW(m.parameters(), lr=0.01)  # type: ignore[method-assign]
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit(model, trainer_of(tmp_path, UseAverage(), saves, val_check_interval=2), validate=True)
    fit(alone, trainer_of(tmp_path))
    assert same(weights_of(model), weights_of(alone))


def test_clipping_and_accumulation_are_the_loop_by_hand(tmp_path: Path) -> None:
    model, ours = Tiny(), Tiny()
    optimizer = fit(model, trainer_of(tmp_path, UseAverage(), max_steps=4, **OPTIONS["clipped and accumulated"]))
    by_hand = ours.configure_optimizers()
    mine, scheduler = by_hand["optimizer"], by_hand["lr_scheduler"]["scheduler"]
    batches = [batch for _ in range(2) for batch in Batches(4, seed=1)]
    for i, batch in enumerate(batches):
        (ours.loss(batch) / 2).backward()
        if i % 2:
            torch.nn.utils.clip_grad_norm_(ours.parameters(), 0.1)
            mine.step()
            scheduler.step()
            mine.zero_grad()
    assert same(live_of(model, optimizer), weights_of(ours))


@pytest.mark.parametrize("checkpoints", [1, None, "all"])
def test_bad_arguments_are_refused(checkpoints: Any) -> None:
    with pytest.raises(ValueError, match="checkpoints must be True or False"):
        UseAverage(checkpoints)


def test_it_warns_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=lightning.utilities.warnings.PossibleUserWarning)
        warnings.filterwarnings("ignore", message=".*LeafSpec")
        fit(Tiny(), trainer_of(tmp_path, UseAverage(), val_check_interval=2), validate=True)
