"""Stop at a signal: save a checkpoint at the end of the step and leave, so that the same command continues.

    with Stop() as stop:
        trainer = Trainer(callbacks=[..., SaveAndStop(stop=stop, run_dir="runs/x")])      last, to save what all hold
        trainer.fit(...)                                                                   raises Stopped

RUN/checkpoints/stopped.ckpt is that checkpoint. Before the first step there is none to save: nothing is lost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from callbacks.checkpoint import save_whole
from src.stop import Stop


class SaveAndStop(L.Callback):
    """Holds signals back while training is under way, and answers them at the end of a step."""

    def __init__(self, *, stop: Stop, run_dir: str | Path) -> None:
        super().__init__()
        self.stop, self.path = stop, Path(run_dir) / "checkpoints" / "stopped.ckpt"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stop.catch()  # Lightning has put a handler of its own in front, which ends a run without a checkpoint
        self.stop.held = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        self._save_if_asked(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        self._save_if_asked(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save_if_asked(trainer)

    def _save_if_asked(self, trainer: L.Trainer) -> None:
        if self.stop.asked:
            save_whole(trainer, self.path)
            self.stop.check()
