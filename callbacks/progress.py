"""Progress of a training run: a bar over its steps, one over the batches of each validation.

callbacks: {progress: {target: callbacks.progress.Progress}}
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from src.io.progress import Bar


class Progress(ProgressBar):
    """Rank 0 draws. Lightning's own bar counts the steps of an epoch, which here may be of any length."""

    def __init__(self) -> None:
        super().__init__()
        self._disabled = False
        self._train: Bar | None = None
        self._val: Bar | None = None

    def disable(self) -> None:  # Lightning calls it on ranks other than 0
        self._disabled = True

    def enable(self) -> None:
        self._disabled = False

    # Not at the start of training: rounds before the first step have bars of their own.
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        if self._train is None:
            steps = {"total": trainer.max_steps, "initial": trainer.global_step}

            def losses() -> str:
                return ", ".join(
                    f"{name.removeprefix('train/')} {value:.4g}" for name, value in trainer.progress_bar_metrics.items()
                )

            self._train = Bar(desc="train", unit="step", status=losses, disable=self._disabled, **steps)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        if self._train is not None:
            self._train.update(trainer.global_step - self._train.n)  # 0 after a skipped step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total = sum(trainer.num_val_batches)  # inf for a loader without a length
        self._val = Bar(
            desc="validate", unit="batch", total=int(total) if total < math.inf else None, disable=self._disabled
        )

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        if self._val is not None:
            self._val.update()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._val is not None:
            self._val.close()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._train is not None:
            self._train.close()
