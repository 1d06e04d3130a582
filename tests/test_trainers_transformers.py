"""Promise: in ``transformers.Trainer`` PACE is a change of one line: it evaluates the average and trains the live
weights. With ``UseAverage`` all that it saves holds the average too, and a checkpoint goes on bit for bit."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_cases import AVERAGING, OPTIMIZERS, averages_of, same, state_of, weights_of

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from safetensors.torch import load_file  # noqa: E402

from pace_kernels import PACE  # noqa: E402
from pace_kernels.integrations.transformers import UseAverage  # noqa: E402

pytestmark = pytest.mark.usefixtures("many_small_steps")
Trainer, TrainingArguments = transformers.Trainer, transformers.TrainingArguments
STEPS = 8  # two epochs of four


def tiny_model(seed: int = 0, dropout: float = 0.1) -> Any:
    """The embedding and the head of GPT-2 are one parameter; dropout draws from the random state that Trainer saves."""
    transformers.set_seed(seed)
    config = transformers.GPT2Config(
        n_layer=1, n_embd=16, n_head=2, n_positions=8, vocab_size=32, bos_token_id=0, eos_token_id=0,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def samples(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(0, 32, (count, 8), generator=torch.Generator().manual_seed(seed))
    # The first token is predicted by none; Trainer's count of labels leaves it out only if told to.
    return [{"input_ids": row, "labels": torch.cat([torch.tensor([-100]), row[1:]])} for row in tokens]


TRAIN, VALIDATION = samples(16, seed=1), samples(8, seed=2)


class Watch(transformers.TrainerCallback):
    """Notes the average, the live weights and the optimizer's state where Trainer evaluates and saves."""

    def __init__(self) -> None:
        self.saved: dict[int, dict[str, torch.Tensor]] = {}
        self.evaluated: list[tuple[float, float, float]] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved[state.global_step] = averages_of(kwargs["model"], kwargs["optimizer"].optimizer)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"].optimizer
        average = validation_loss(model, averages_of(model, optimizer))
        optimizer.train()
        live = validation_loss(model, weights_of(model))
        optimizer.eval()
        self.evaluated.append((kwargs["metrics"]["eval_loss"], average, live))


def validation_loss(model: Any, weights: dict[str, torch.Tensor]) -> float:
    other = copy.deepcopy(model).eval()
    other.load_state_dict(weights)
    with torch.no_grad():
        batch = {key: torch.stack([sample[key] for sample in VALIDATION]) for key in VALIDATION[0]}
        return float(other(**batch).loss)


def arguments(directory: Path, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 0.01,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "lr_scheduler_type": "cosine",
    }
    return TrainingArguments(output_dir=str(directory), **{**defaults, **options})


def trainer_of(
    directory: Path, name: str = "PACE", seed: int = 0, callbacks: tuple[Any, ...] = (), **options: Any
) -> Any:
    cls, kwargs = OPTIMIZERS[name]
    return Trainer(
        tiny_model(seed, options.pop("dropout", 0.1)),
        arguments(directory, **options),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
        optimizer_cls_and_kwargs=(cls, kwargs),
        callbacks=list(callbacks),
    )


# When Trainer saves and evaluates, as data. Tokens are random: the first is the best.
SCHEDULES: dict[str, dict[str, Any]] = {
    "saved, never evaluated": {"save_strategy": "steps", "save_steps": 3},
    "evaluated just before each save": {
        "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3,
    },
    "evaluated and saved at different steps": {
        "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 2,
    },
    "at the end of each epoch": {"save_strategy": "epoch"},
    "evaluated in the epoch, saved at its end": {"save_strategy": "epoch", "eval_strategy": "steps", "eval_steps": 3},
    "the best at the end": {
        "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "loss",
    },
    "the best alone": {
        "save_strategy": "best", "eval_strategy": "steps", "eval_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "loss",
    },
    "accumulated, clipped, in bfloat16": {
        "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2,
        "max_grad_norm": 0.1, "bf16": True,
    },
}  # fmt: skip


def logged(trainer: Any) -> list[dict[str, float]]:
    """What Trainer logged, but for how long it took."""
    return [
        {k: v for k, v in entry.items() if not k.endswith(("runtime", "per_second", "flos")) and k != "train_loss"}
        for entry in trainer.state.log_history
    ]


@pytest.mark.parametrize("name", AVERAGING)
def test_it_evaluates_the_average_and_trains_the_live_weights(name: str, tmp_path: Path) -> None:
    watch = Watch()
    evaluated = trainer_of(tmp_path, name, callbacks=(watch,), dropout=0.0, eval_strategy="steps", eval_steps=2)
    evaluated.train()
    assert len(watch.evaluated) == STEPS // 2
    for loss, of_average, of_live in watch.evaluated:
        assert loss == of_average != of_live
    alone = trainer_of(tmp_path, name, dropout=0.0)
    alone.train()
    evaluated.optimizer.train()
    assert same(weights_of(evaluated.model), weights_of(alone.model))
    assert same(state_of(evaluated.optimizer), state_of(alone.optimizer))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_all_that_it_saves_is_the_average(schedule: str, tmp_path: Path) -> None:
    watch = Watch()
    trainer = trainer_of(tmp_path, callbacks=(UseAverage(), watch), **SCHEDULES[schedule])
    trainer.train()
    assert watch.saved
    for step, average in watch.saved.items():
        file = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        assert same(file, {name: average[name] for name in file}), step
    trainer.save_model(str(tmp_path / "end"))
    end = load_file(tmp_path / "end" / "model.safetensors")
    if best := trainer.state.best_global_step:
        assert best < STEPS
        assert same(end, {name: watch.saved[best][name] for name in end})
        trainer.remove_callback(watch)  # it would ask for the live weights
        assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    else:
        average = averages_of(trainer.model, trainer.optimizer.optimizer)
        assert same(end, {name: average[name] for name in end})


# What is saved and when does not depend on the optimizer: two schedules for the others.
@pytest.mark.parametrize(
    ("schedule", "name"), [(s, n) for i, s in enumerate(SCHEDULES) for n in OPTIMIZERS if n == "PACE" or i in (0, 2)]
)
def test_a_checkpoint_goes_on_bit_for_bit(schedule: str, name: str, tmp_path: Path) -> None:
    whole = trainer_of(tmp_path / "whole", name, callbacks=(UseAverage(),), **SCHEDULES[schedule])
    whole.train()
    first, *later = sorted((tmp_path / "whole").glob("checkpoint-*"))
    again = trainer_of(tmp_path / "again", name, seed=9, callbacks=(UseAverage(),), **SCHEDULES[schedule])
    again.train(resume_from_checkpoint=str(first))
    assert same(logged(again), logged(whole))
    assert same(weights_of(again.model), weights_of(whole.model))
    if not SCHEDULES[schedule].get("load_best_model_at_end"):  # otherwise the average is the best one, in both
        assert same(state_of(again.optimizer), state_of(whole.optimizer))
    for trainer in (again, whole):
        trainer.optimizer.optimizer.train(keep="live")  # the best average may have been loaded over the last
    assert same(weights_of(again.model), weights_of(whole.model))
    assert same(state_of(again.lr_scheduler), state_of(whole.lr_scheduler))
    for checkpoint in later:
        files = [tmp_path / run / checkpoint.name / "model.safetensors" for run in ("again", "whole")]
        assert same(*map(load_file, files))
        states = [torch.load(file.parent / "optimizer.pt", weights_only=True) for file in files]
        assert same(*states)


class Stop(transformers.TrainerCallback):
    """As a limit of time does: at a step that is neither evaluated nor saved."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 5


def test_why_the_callback_is_there(tmp_path: Path) -> None:
    """Trainer alone saves what it trains, unless it has just evaluated; and where the last step was not evaluated, it
    evaluates the last average in place of the best."""
    watch = Watch()
    options = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 6}
    trainer_of(tmp_path, callbacks=(watch,), **options).train()
    held = {}
    for step, average in watch.saved.items():
        file = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        held[step] = same(file, {name: average[name] for name in file})
    assert held == {3: False, 6: True, STEPS: True}
    for callbacks in ((Stop(),), (Stop(), UseAverage())):
        best = trainer_of(tmp_path / "best", callbacks=callbacks, **SCHEDULES["the best at the end"])
        best.train()
        assert best.state.best_global_step == 2
        assert (best.evaluate()["eval_loss"] == best.state.best_metric) == (len(callbacks) == 2)


def test_without_the_callback_a_checkpoint_goes_on_bit_for_bit_too(tmp_path: Path) -> None:
    options = SCHEDULES["evaluated and saved at different steps"]
    whole = trainer_of(tmp_path / "whole", **options)
    whole.train()
    for step in (3, 6):
        again = trainer_of(tmp_path / "again", seed=9, **options)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert same(logged(again), logged(whole))
        assert same(state_of(again.optimizer), state_of(whole.optimizer))


def test_without_an_average_nothing_is_swapped(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3}
    trainer = trainer_of(tmp_path, "MADA", callbacks=(UseAverage(),), **options)
    trainer.train()
    ended = weights_of(trainer.model)
    trainer.optimizer.train()
    assert same(weights_of(trainer.model), ended)
    assert len(set(trainer.optimizer.optimizer.coefficients.values())) > 1


def test_train_again_goes_on_from_the_live_weights(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, callbacks=(UseAverage(),), max_steps=3)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    optimizer.train()
    live, average = weights_of(trainer.model), averages_of(trainer.model, optimizer)
    optimizer.eval()
    assert same(weights_of(trainer.model), average)
    seen = []

    class First(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
            seen.append(weights_of(model))

    trainer.add_callback(First())
    trainer.train()
    assert same(seen[0], live)


@pytest.mark.parametrize("how", ["optimizers", "subclass", "optimizer_cls_and_kwargs"])
def test_each_way_to_hand_it_over_is_the_loop_by_hand(how: str, tmp_path: Path) -> None:
    """Accumulated, clipped and scheduled: the same steps as in a loop that does so by hand."""
    options = {"lr": 0.01, "weight_decay": 0.0, "lambda_pullback": 1.0}
    args = arguments(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.1, warmup_steps=2,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    model = tiny_model(dropout=0.0)
    cls, handed = Trainer, {}
    if how == "optimizers":
        own = PACE(model.parameters(), **options)
        handed = {"optimizers": (own, transformers.get_cosine_schedule_with_warmup(own, 2, STEPS))}
    elif how == "optimizer_cls_and_kwargs":
        handed = {"optimizer_cls_and_kwargs": (PACE, options)}
    else:

        class Subclass(Trainer):  # type: ignore[misc, valid-type]
            def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
                self.optimizer = PACE(self.model.parameters(), **options)
                return self.optimizer

        cls = Subclass
    trainer = cls(model, args, train_dataset=TRAIN, **handed)
    trainer.train()

    ours = tiny_model(dropout=0.0).train()
    optimizer = PACE(ours.parameters(), **options)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 2, STEPS)
    rows = iter(TRAIN * 2)
    for _ in range(STEPS):
        for _ in range(2):
            batch = torch.utils.data.default_collate([next(rows), next(rows)])
            ours(**batch, num_items_in_batch=torch.tensor(2 * 2 * 7)).loss.backward()
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 0.1)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert same(weights_of(trainer.model), weights_of(ours))


def test_a_save_that_the_callback_could_not_see_is_said(tmp_path: Path) -> None:
    class Late(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = state.global_step == 2

    with pytest.warns(UserWarning, match="checkpoint-2 holds the live weights.*Put UseAverage last"):
        trainer_of(tmp_path, callbacks=(UseAverage(), Late()), max_steps=3).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer_of(tmp_path, callbacks=(Late(), UseAverage()), max_steps=3).train()
        # One without an average has nothing else to save.
        trainer_of(tmp_path, "MADA", callbacks=(UseAverage(), Late()), max_steps=3).train()


SCRIPT = """
from torch.optim import AdamW

model = tiny_model(dropout=0.0)
optimizer = AdamW(model.parameters(), lr=0.02)
scheduler = transformers.get_constant_schedule_with_warmup(optimizer, 2)
trainer = Trainer(
    model,
    arguments(directory, eval_strategy="steps", eval_steps=10, max_steps=20),
    train_dataset=TRAIN,
    eval_dataset=TRAIN,
    optimizers=(optimizer, scheduler),
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
"""


@pytest.mark.parametrize("line", ["from torch.optim import AdamW", "from pace_kernels import PACE as AdamW"])
def test_one_line_changes(line: str, tmp_path: Path) -> None:
    script = SCRIPT.replace("from torch.optim import AdamW", line)
    ran: dict[str, Any] = {**globals(), "directory": tmp_path}
    exec(script, ran)
    assert ran["after"] < 0.8 * ran["before"]
