"""``transformers.Trainer``: the average in every file that it writes, and in the model that training ends with."""

from __future__ import annotations

import warnings
from typing import Any, Literal

from transformers import TrainerCallback

from ..batchnorm import Batches
from .callbacks import RunningStatistics, averaging


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
                f"checkpoint-{state.global_step} holds the live weights: a callback behind UseAverage asked for it. "
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
