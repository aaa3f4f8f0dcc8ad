"""Stop on a signal: save a checkpoint at the end of the step and exit; the same command continues the run.

    with Stop() as stop:
        trainer = Trainer(callbacks=[..., SaveAndStop(stop=stop, run_dir="runs/x")])      last: saves the others' state
        trainer.fit(...)                                                                  raises Stopped

The checkpoint is RUN/checkpoints/stopped-step=S.ckpt, where last.ckpt then leads; the next regular one replaces it.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import lightning as L

from callbacks.checkpoint import save_as_last, write_atomically
from src.cli.signals import Stop
from src.distributed.checkpoints import remove
from src.distributed.parallel import Team


class SaveAndStop(L.Callback):
    """Defers signals to the end of the step. Ranks agree: if one got a signal, all save and stop at the same step."""

    def __init__(self, *, stop: Stop, run_dir: str | Path) -> None:
        super().__init__()
        self.stop, self.folder = stop, Path(run_dir) / "checkpoints"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        write_atomically(trainer)
        self._team = Team()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stop.catch()  # replaces Lightning's own handler, which ends a run without a checkpoint
        self.stop.deferred = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        self._save_and_stop(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        self._save_and_stop(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save_and_stop(trainer)

    def _save_and_stop(self, trainer: L.Trainer) -> None:
        """Save and raise `Stopped` if any rank has got a signal."""
        number = self._team.all_reduce_max(int(self.stop.received or 0))
        if not number:
            return
        self.stop.received = signal.Signals(number)
        path = self.folder / f"stopped-step={trainer.global_step}.ckpt"
        save_as_last(trainer, path)
        if trainer.is_global_zero:
            for older in set(self.folder.glob("stopped*.ckpt")) - {path}:
                remove(older)
        self.stop.check()
