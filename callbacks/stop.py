"""Stop when asked to: save a checkpoint at the end of the step and leave, so that the same command continues.

    with Stop() as stop:
        trainer = Trainer(callbacks=[..., SaveAndStop(stop=stop, run_dir="runs/x")])      last, to save what all hold
        trainer.fit(...)                                                                   raises Stopped

RUN/checkpoints/stopped-step=S.ckpt is that checkpoint; the next regular one replaces it. Before the first step there is
none to save: nothing is lost.

Ranks agree at the end of every step: as soon as one was asked, all of them save and stop at the same step.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import lightning as L

from callbacks.checkpoint import write_whole_files
from src.cli.signals import Stop
from src.distributed.checkpoints import remove
from src.distributed.parallel import Team


class SaveAndStop(L.Callback):
    """Holds signals back while training is under way, and answers them at the end of a step."""

    def __init__(self, *, stop: Stop, run_dir: str | Path) -> None:
        super().__init__()
        self.stop, self.folder = stop, Path(run_dir) / "checkpoints"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        write_whole_files(trainer)
        self._team = Team()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stop.catch()  # Lightning has put a handler of its own in front, which ends a run without a checkpoint
        self.stop.held = True
        if self._agreed():
            self.stop.check()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        self._save_if_asked(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        self._save_if_asked(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save_if_asked(trainer)

    def _save_if_asked(self, trainer: L.Trainer) -> None:
        if self._agreed():
            path = self.folder / f"stopped-step={trainer.global_step}.ckpt"
            trainer.save_checkpoint(path)
            if trainer.is_global_zero:
                for older in set(self.folder.glob("stopped*.ckpt")) - {path}:
                    remove(older)
            self.stop.check()

    def _agreed(self) -> bool:
        """Whether any rank was asked to stop; if so all of them are, by the same signal."""
        if found := self._team.all_reduce_max(int(self.stop.asked or 0)):
            self.stop.asked = signal.Signals(found)
        return bool(found)
