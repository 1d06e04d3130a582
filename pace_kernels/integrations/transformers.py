"""``transformers.Trainer``: the average in every file that it writes, and in the model that training ends with."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from ..averaging import Averaging
from ..backend import say_once
from ..batchnorm import Batches
from ..pace import PACE
from .around import for_arguments
from .callbacks import RunningStatistics, averaging, step_statistics, stepping


def optimizer_from(
    args: Any, optimizer: type[torch.optim.Optimizer] = PACE, **options: Any
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """What ``Trainer`` takes for ``optimizer_cls_and_kwargs``, from its own arguments.

    ``learning_rate``, ``adam_beta1``, ``adam_beta2``, ``adam_epsilon`` and ``weight_decay`` are those of ``args``, and
    Trainer makes the groups with and without weight decay. As Trainer makes the optimizer by itself, it works with
    ``model_init``, a hyperparameter search and FSDP2 too.

    Arguments:
        args: ``TrainingArguments``.
        optimizer: the class: PACE, MADA, ScheduleFreeAdamW, or ``integrations.around.PullbackAround``, whose base gets
            what comes from ``args``.
        options: arguments of that class, which go before those of ``args``.

    >>> trainer = Trainer(model, args, optimizer_cls_and_kwargs=optimizer_from(args, PACE))  # doctest: +SKIP
    """
    given = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }
    return optimizer, for_arguments(optimizer, given, options)


class AveragingMixin:
    """Before ``Trainer``, or a trainer of TRL, in the list of bases: logs ``get_step_stats()`` with each training loss,
    where TensorBoard, W&B and others see it, as ``optimizer/lambda_mean``. Callbacks come too late for that.

    It warns once where live weights are saved, which is what Trainer does without :class:`UseAverage`.

    >>> class MyTrainer(AveragingMixin, Trainer): pass  # doctest: +SKIP
    """

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(step_statistics(self.optimizer))  # type: ignore[attr-defined]
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        ours = stepping(getattr(self, "optimizer", None))
        callbacks = self.callback_handler.callbacks  # type: ignore[attr-defined]
        if isinstance(ours, Averaging) and not any(isinstance(callback, UseAverage) for callback in callbacks):
            groups = [group for group in ours.param_groups if ours._option(group, "use_ema_eval")]
            if ours._entries(groups) and not ours._swapped:
                say_once("Trainer saves the live weights, not their average: add the callback UseAverage()")
        super().save_model(*args, **kwargs)  # type: ignore[misc]


class UseAverage(TrainerCallback):  # type: ignore[misc]
    """Saves and ends with the averaged weights.

    Trainer calls ``optimizer.eval()`` before it evaluates and ``optimizer.train()`` before each forward pass of
    training, but nothing before it saves, nor at the end of training. By itself it writes the average only where it
    evaluated since the last step, and otherwise the live weights; and the evaluation after ``load_best_model_at_end``
    would swap the last average in over the best one. With this callback:

    - every checkpoint holds the average in its model file, the live weights in its ``optimizer.pt``, and
      ``resume_from_checkpoint`` goes on from the live weights;
    - the model holds the average after ``train()``, the best one with ``load_best_model_at_end``:
      ``save_model()``, ``evaluate()`` and ``predict()`` use it as it is.

    It costs two swaps an evaluation, save or epoch, and nothing a step. Put it behind callbacks that ask for saves;
    where one came too late it warns. After ``load_best_model_at_end`` the live weights do not belong to the best
    average: train on with ``resume_from_checkpoint``. Optimizers without ``eval()`` are left as they are. DeepSpeed's
    engine is refused (RuntimeError as training begins): it steps weights of its own.

    Arguments:
        update_bn: batches, or a function of the model that passes batches through it. Running statistics of batch
            normalization are recomputed with them for each average that is evaluated or saved, and the live ones come
            back before training goes on. ``resume_from_checkpoint`` finds those of the average. By default they are the
            live model's, which is said once; False: not even that.

    >>> from transformers import Trainer
    >>> trainer = Trainer(model, args, optimizers=(PACE(...), None), callbacks=[UseAverage()])  # doctest: +SKIP
    """

    def __init__(self, update_bn: Batches | Literal[False] | None = None) -> None:
        super().__init__()
        self._statistics = RunningStatistics(update_bn)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if averaging(optimizer, model) is not None:
            self._statistics.say(model)

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
        if any(ours._option(group, "use_ema_eval") for group in ours.param_groups):
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
