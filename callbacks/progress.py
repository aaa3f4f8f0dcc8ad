"""Progress of a training run: a bar over its steps, and one over the batches of each validation.

callbacks: {progress: {target: callbacks.progress.Progress}}
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L

from src.io.progress import Bar


class Progress(L.Callback):
    """Rank 0 draws. Lightning's own bar counts the steps of an epoch, which here may be of any length."""

    train: Bar | None = None
    val: Bar | None = None

    # Not at the start of training: rounds before the first step have bars of their own.
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        if self.train is None:

            def losses() -> str:
                values = trainer.progress_bar_metrics.items()
                return ", ".join(f"{name.removeprefix('train/')} {value:.4g}" for name, value in values)

            options: dict[str, Any] = {"total": trainer.max_steps, "initial": trainer.global_step, "status": losses}
            self.train = Bar(desc="train", unit="step", disable=not trainer.is_global_zero, **options)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        if self.train is not None:
            self.train.update(trainer.global_step - self.train.n)  # 0 after a skipped step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.train is not None:
            self.train.close()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total = sum(trainer.num_val_batches)  # inf for a loader without a length
        options: dict[str, Any] = {
            "total": int(total) if total < math.inf else None,
            "disable": not trainer.is_global_zero,
        }
        self.val = Bar(desc="validate", unit="batch", **options)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        if self.val is not None:
            self.val.update()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.val is not None:
            self.val.close()
