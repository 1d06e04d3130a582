"""``transformers.Trainer``: the average in every file that it writes, and in the model that training ends with."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import TrainerCallback


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
    average: train on with ``resume_from_checkpoint``. Optimizers without ``eval()`` are left as they are.

    >>> from transformers import Trainer
    >>> trainer = Trainer(model, args, optimizers=(PACE(...), None), callbacks=[UseAverage()])  # doctest: +SKIP
    """

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if control.should_save:
            _swap_in(optimizer)

    def on_epoch_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        # Also the last thing before Trainer loads the best model, and no step follows without train().
        _swap_in(optimizer)

    def on_save(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if any(group.get("use_ema_eval") and not group.get("swapped", True) for group in optimizer.param_groups):
            warnings.warn(
                f"checkpoint-{state.global_step} holds the live weights: a callback behind UseAverage asked for it. "
                "Put UseAverage last in callbacks",
                stacklevel=2,
            )


def _swap_in(optimizer: Any) -> None:
    if hasattr(optimizer, "eval"):
        optimizer.eval()
