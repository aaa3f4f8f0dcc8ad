"""Checkpoints to resume from, in the folder of the run.

callbacks: {checkpoint: {target: callbacks.checkpoint.Checkpoint, every_n_train_steps: 250}}

RUN/checkpoints/epoch=E-step=S.ckpt, last.ckpt    twice the newest state, so that one damaged file costs nothing
"""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from src.shards import naming, publish

_REFUSED = re.compile("inline_container|PytorchStreamWriter|unexpected pos")


class Checkpoint(ModelCheckpoint):
    """Saves every `every_n_train_steps` optimizer steps. All checkpoints of the trainer are written as whole files."""

    def __init__(self, *, run_dir: str | Path, every_n_train_steps: int) -> None:
        if every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps must be at least 1, got {every_n_train_steps}")
        super().__init__(
            dirpath=Path(run_dir) / "checkpoints",
            every_n_train_steps=every_n_train_steps,
            save_last=True,
            save_top_k=1,
            save_on_train_epoch_end=False,
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        trainer.strategy.checkpoint_io = WholeFiles()


def save_whole(trainer: L.Trainer, path: Path) -> None:
    """Save a checkpoint under a name that never holds half of one, whatever writes the trainer's checkpoints."""
    temporary = path.with_name(f".{path.name}.tmp")
    trainer.save_checkpoint(temporary)
    publish(temporary, path)


class WholeFiles(TorchCheckpointIO):
    """Writes beside the target, syncs and renames.

    Lightning's own goes through the system's folder for temporary files, which may be small, or on another disk, from
    where a file is copied and not renamed.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise TypeError(f"storage options have no meaning for local files, got {storage_options!r}")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        with naming(path):
            try:
                torch.save(checkpoint, temporary)
            except RuntimeError as error:  # PyTorch's writer drops the words of the system
                if not _REFUSED.search(str(error)):
                    raise
                raise OSError(errno.EIO, "cannot be written; is the disk full?", str(path)) from error
        publish(temporary, path)
