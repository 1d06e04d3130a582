"""Lightning: the average for validation, test and prediction, in checkpoints, and in the model that fit() ends with."""

from __future__ import annotations

import functools
import importlib
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any, Literal

from ..averaging import Averaging
from ..batchnorm import Batches
from .callbacks import RunningStatistics, averaging, step_statistics


def _callback() -> Any:
    """Lightning's Callback, from the package that was imported already; both trainers take either in a list."""
    names = [name for name in ("lightning.pytorch", "pytorch_lightning") if name in sys.modules] or [
        name for name in ("lightning.pytorch", "pytorch_lightning") if find_spec(name.split(".")[0])
    ]
    if not names:
        raise ModuleNotFoundError("pace_kernels.integrations.lightning needs Lightning: pip install lightning")
    return importlib.import_module(f"{names[0]}.callbacks").Callback


class UseAverage(_callback()):  # type: ignore[misc]
    """Swaps the averaged weights in when Lightning evaluates and saves, and out before training goes on.

    Lightning calls neither ``eval()`` nor ``train()`` of an optimizer. With this callback validation, test and
    prediction use the average, the model holds it after ``fit()``, and live weights come back after an exception.
    ``validate``, ``test`` and ``predict`` use a checkpoint that they load (``ckpt_path=...``) as it is.

    Arguments:
        checkpoints: whether checkpoints hold the average in ``state_dict``, also those with ``save_weights_only=True``,
            and the live weights among the optimizer's states. With False they hold the live weights in ``state_dict``
            and the average among the states. ``fit(ckpt_path=...)`` continues from the live weights in both cases; if
            checkpoints hold the average, it needs this callback.
        update_bn: batches, or a function of the module that passes batches through it. They recompute the running
            statistics of batch normalization for each average that is evaluated or saved; the live statistics come back
            before training goes on, also from a checkpoint. By default the average uses the live module's, and a
            warning says so once; False: without the warning.
        statistics: whether the loggers get each optimizer's ``get_step_stats()`` every ``log_every_n_steps`` steps, as
            ``optimizer/lambda_mean``, or ``optimizer0/lambda_mean`` if there are several.

    Several optimizers may have averages; the callback leaves others alone. DeepSpeed's engine is refused (RuntimeError
    when training begins): it steps weights of its own.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(callbacks=[UseAverage()])  # doctest: +SKIP
    """

    def __init__(
        self,
        checkpoints: bool = True,
        update_bn: Batches | Literal[False] | None = None,
        statistics: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(statistics, bool):
            raise ValueError(f"statistics must be True or False, got {statistics!r}")
        self.statistics = statistics
        self._logged = 0
        if not isinstance(checkpoints, bool):
            raise ValueError(f"checkpoints must be True or False, got {checkpoints!r}")
        self.checkpoints = checkpoints
        self._statistics = RunningStatistics(update_bn)
        self._evaluation = ExitStack()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit" and self.checkpoints:
            self._save_averages(trainer)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if _averaging(trainer):
            self._statistics.say(pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        # Restored from a checkpoint that holds the average, or after a fit() that ended with it.
        for optimizer in _averaging(trainer):
            optimizer.train(pl_module)
        self._statistics.put_back(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if not self.statistics or step == self._logged or step % trainer.log_every_n_steps:
            return
        self._logged = step  # once, where gradients are accumulated
        several = len(trainer.optimizers) > 1
        for number, optimizer in enumerate(trainer.optimizers):
            found = step_statistics(optimizer, f"optimizer{number if several else ''}/")
            for logger in trainer.loggers if found else ():
                logger.log_metrics(found, step=step)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if _fitting(trainer) or trainer.ckpt_path is None:
            self._evaluation.close()
            self._evaluation = self._averaged(trainer)

    on_test_start = on_predict_start = on_validation_start

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._evaluation.close()

    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._evaluation.close()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.checkpoints:  # otherwise ModelCheckpoint, which comes later, may have to save the live weights
            self.on_fit_end(trainer, pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in _averaging(trainer):
            optimizer.eval(pl_module)
            self._statistics.recompute(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"live_buffers": self._statistics.live}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._statistics.live = dict(state_dict["live_buffers"])

    def _averaged(self, trainer: Any) -> ExitStack:
        """Swaps the averages in; closing the returned stack swaps out those that were not in before."""
        module = trainer.lightning_module
        with ExitStack() as stack:
            for optimizer in _averaging(trainer):
                stack.enter_context(optimizer.averaged(module))
            if _averaging(trainer) and not self._statistics.live:
                self._statistics.recompute(module)
                stack.callback(self._statistics.put_back, module)
            swapped = stack.pop_all()
        return swapped

    def _save_averages(self, trainer: Any) -> None:
        """All checkpoints go through ``trainer.save_checkpoint``. No hook runs before it, and none at all if only
        weights are saved."""
        save = trainer.save_checkpoint
        if getattr(save, "swaps", False):
            return

        @functools.wraps(save)
        def save_averaged(*args: Any, **kwargs: Any) -> None:
            with self._averaged(trainer) if _fitting(trainer) else ExitStack():
                save(*args, **kwargs)

        save_averaged.swaps = True  # type: ignore[attr-defined]
        trainer.save_checkpoint = save_averaged


def _fitting(trainer: Any) -> bool:
    return bool(trainer.state.fn == "fit")


def _averaging(trainer: Any) -> list[Averaging]:
    found = [averaging(optimizer, trainer.lightning_module) for optimizer in trainer.optimizers]
    return [optimizer for optimizer in found if optimizer is not None]
