"""Checkpoints to resume from, in the run folder.

    callbacks: {checkpoint: {target: callbacks.checkpoint.Checkpoint, every_n_train_steps: 250, keep: 2}}

    RUN/checkpoints/epoch=E-step=S.ckpt     the newest `keep`; a damaged one costs the steps since the previous one
    RUN/checkpoints/last.ckpt               link to the newest one, also of those that a stop or an online round saves

A checkpoint is a file, or a folder if the model is sharded (FSDP2): see `src/distributed/checkpoints.py`.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint

from src.distributed.checkpoints import read_full, remove
from src.io.errors import UserError
from src.io.files import FORMAT, publish, with_filename


class Checkpoint(LightningCheckpoint):
    """Saves every `every_n_train_steps` optimizer steps and at the end; keeps the newest `keep` checkpoints.

    NOTE: Lightning's `ModelCheckpoint` never removes the checkpoint that a run has resumed from, so every restart would
    leave one behind, and does not save at the end of training.
    """

    def __init__(self, *, run_dir: str | Path, every_n_train_steps: int, keep: int = 2) -> None:
        for name, value in {"every_n_train_steps": every_n_train_steps, "keep": keep}.items():
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        self.folder, self.every_n_train_steps, self.keep = Path(run_dir) / "checkpoints", every_n_train_steps, keep
        self.last_step = 0  # step saved last; a skipped batch ends at the same step and is not saved again

    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_step = state_dict["last_step"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["format"] = FORMAT

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if (form := checkpoint.get("format", 1)) != FORMAT:
            raise UserError(
                f"the checkpoint has format {form}, this version resumes format {FORMAT}: train anew with resume=false"
            )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        write_atomically(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        if trainer.global_step % self.every_n_train_steps == 0:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        step = trainer.global_step
        if step == self.last_step:
            return
        self.last_step = step
        path = self.folder / f"epoch={trainer.current_epoch}-step={step}.ckpt"
        save_as_last(trainer, path)
        if trainer.is_global_zero:
            by_age = sorted(self.folder.glob("epoch=*-step=*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
            for older in [*by_age[: -self.keep], *self.folder.glob("stopped*.ckpt")]:
                remove(older)


def save_as_last(trainer: L.Trainer, path: Path) -> None:
    """Save a checkpoint, then replace the link `last.ckpt` beside it by one to it."""
    trainer.save_checkpoint(path)
    if trainer.is_global_zero:
        link, last = path.with_name(".last.ckpt.tmp"), path.with_name("last.ckpt")
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        if not last.is_symlink():  # of a run that was copied with its links followed
            remove(last)
        os.replace(link, last)


def write_atomically(trainer: L.Trainer) -> None:
    trainer.strategy.checkpoint_io = AtomicCheckpointIO()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes next to the target, syncs and renames, so no name ever holds half a checkpoint. Reads sharded folders too.

    NOTE: Lightning's own writer needs the memory of a whole checkpoint, and room in the system's temporary folder.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with with_filename(path):
                torch.save(checkpoint, temporary)
        except RuntimeError as error:  # of PyTorch's writer, which says no more
            temporary.unlink(missing_ok=True)
            raise OSError(errno.EIO, "cannot be written; is the disk full?", str(path)) from error
        if path.is_dir():
            remove(path)
        publish(temporary, path)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if Path(path).is_dir():
            return read_full(Path(path))
        kwargs.setdefault("map_location", "cpu")  # Lightning's default is a function, which 8-bit states cannot take
        return super().load_checkpoint(path, *args, **kwargs)
