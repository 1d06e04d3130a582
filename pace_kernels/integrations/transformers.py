"""``transformers.Trainer``: the average in every file that it writes, and in the model at the end of training."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from ..backend import say_once
from ..batchnorm import Batches
from ..pace import PACE
from ..schedule_free import ScheduleFreeAdamW
from .around import for_arguments
from .callbacks import OURS, RunningStatistics, averages, averaging, step_statistics, stepping


def optimizer_from(
    args: Any, optimizer: type[torch.optim.Optimizer] = PACE, **options: Any
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The value of ``Trainer``'s argument ``optimizer_cls_and_kwargs``, from its own arguments.

    ``learning_rate``, ``adam_beta1``, ``adam_beta2``, ``adam_epsilon`` and ``weight_decay`` come from ``args``, and
    Trainer makes the groups with and without weight decay. Since Trainer makes the optimizer itself, this also works
    with ``model_init``, a hyperparameter search and FSDP2. A warning says if ScheduleFreeAdamW gets a falling rate.

    Arguments:
        args: ``TrainingArguments``.
        optimizer: the class: PACE, MADA, ScheduleFreeAdamW, or ``integrations.around.PullbackAround``, whose base gets
            the values of ``args``.
        options: arguments of that class, which override those of ``args``.

    >>> trainer = Trainer(model, args, optimizer_cls_and_kwargs=optimizer_from(args, PACE))  # doctest: +SKIP
    """
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if optimizer is ScheduleFreeAdamW and not schedule.startswith("constant"):
        say_once(
            f"ScheduleFreeAdamW is made for a constant learning rate, and lr_scheduler_type is {schedule!r}: pass "
            'lr_scheduler_type="constant" or "constant_with_warmup"'
        )
    given = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }
    return optimizer, for_arguments(optimizer, given, options)


class AveragingMixin:
    """A base to list before ``Trainer``, or a trainer of TRL. It logs ``get_step_stats()`` with each training loss, to
    TensorBoard, W&B and others, as ``optimizer/lambda_mean``. Callbacks run too late for that.

    It warns once if live weights are saved, as Trainer does without :class:`UseAverage`.

    >>> class MyTrainer(AveragingMixin, Trainer): pass  # doctest: +SKIP
    """

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(step_statistics(self.optimizer))  # type: ignore[attr-defined]
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        ours = stepping(getattr(self, "optimizer", None))
        callbacks = self.callback_handler.callbacks  # type: ignore[attr-defined]
        alone = isinstance(ours, OURS) and not any(isinstance(callback, UseAverage) for callback in callbacks)
        if alone and ours._entries(averages(ours)) and not ours._swapped:
            say_once("Trainer saves the live weights, not their average: add the callback UseAverage()")
        super().save_model(*args, **kwargs)  # type: ignore[misc]


class UseAverage(TrainerCallback):  # type: ignore[misc]
    """Saves and ends with the averaged weights.

    Trainer calls ``optimizer.eval()`` before it evaluates and ``optimizer.train()`` before each forward pass of
    training, but neither before it saves nor at the end of training. By itself it saves the average only if it has
    evaluated since the last step, and the live weights otherwise; and the evaluation after ``load_best_model_at_end``
    would replace the best average by the last one. With this callback:

    - every checkpoint holds the average in its model file and the live weights in its ``optimizer.pt``, and
      ``resume_from_checkpoint`` continues from the live weights;
    - the model holds the average after ``train()``, the best one with ``load_best_model_at_end``:
      ``save_model()``, ``evaluate()`` and ``predict()`` use it as it is.

    It costs two swaps per evaluation, save or epoch, and nothing per step. Put it after callbacks that ask for saves;
    it warns if one asks too late. After ``load_best_model_at_end`` the live weights do not belong to the best average:
    continue with ``resume_from_checkpoint``. The callback leaves optimizers without ``eval()`` alone. DeepSpeed's
    engine is refused (RuntimeError when training begins): it steps weights of its own.

    Arguments:
        update_bn: batches, or a function of the model that passes batches through it. They recompute the running
            statistics of batch normalization for each average that is evaluated or saved; the live statistics come back
            before training goes on. ``resume_from_checkpoint`` finds those of the average. By default the average uses
            the live model's, and a warning says so once; False: without the warning.

    >>> from transformers import Trainer
    >>> trainer = Trainer(model, args, optimizers=(PACE(...), None), callbacks=[UseAverage()])  # doctest: +SKIP
    """

    def __init__(self, update_bn: Batches | Literal[False] | None = None) -> None:
        super().__init__()
        self._statistics = RunningStatistics(update_bn)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        ours = averaging(optimizer, model)
        if ours is None:
            return
        self._statistics.say(model)
        if not averages(ours):
            say_once(
                f"UseAverage: no group of {type(stepping(optimizer)).__name__} has use_ema_eval=True, so the weights "
                "that are evaluated and saved are the live ones"
            )

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        ours = averaging(optimizer, model)
        if ours is not None:
            ours.train(model)
            self._statistics.put_back(model)

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if control.should_save or control.should_evaluate:
            self._swap_in(optimizer, model)

    def on_epoch_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        # Also the last thing before Trainer loads the best model, and no step follows without train().
        self._swap_in(optimizer, model)

    def on_save(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        ours = averaging(optimizer, kwargs.get("model"))
        if ours is None or ours._swapped:
            return
        if averages(ours):
            warnings.warn(
                f"checkpoint-{state.global_step} holds the live weights: a callback after UseAverage asked for it. "
                "Put UseAverage last in callbacks",
                stacklevel=2,
            )

    def _swap_in(self, optimizer: Any, model: Any) -> None:
        ours = averaging(optimizer, model)
        if ours is None:
            if hasattr(optimizer, "eval"):
                optimizer.eval()
            return
        ours.eval(model)
        self._statistics.recompute(model)
