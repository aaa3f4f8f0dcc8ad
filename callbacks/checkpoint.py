"""Checkpoints to resume from, in the run folder.

    callbacks: {checkpoint: {target: callbacks.checkpoint.Checkpoint, every_n_train_steps: 250, keep: 2}}

    RUN/checkpoints/epoch=E-step=S.ckpt     the newest `keep`; a damaged one costs the steps since the previous one
    RUN/checkpoints/last.ckpt               link to the newest one

A checkpoint is a file, or a folder if the model is sharded (FSDP2): see `src/distributed/checkpoints.py`.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint

from src.distributed.checkpoints import REFUSED, link, read_full, remove
from src.io.errors import UserError
from src.io.files import FORMAT, publish, with_filename

LAST = "last.ckpt"
_NAME = re.compile(r"epoch=(\d+)-step=(\d+)\.ckpt")


class Checkpoint(LightningCheckpoint):
    """Saves every `every_n_train_steps` optimizer steps and at the end; keeps the newest `keep` checkpoints."""

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
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            link(path, self.folder / LAST)
            for older in [*self._checkpoints()[self.keep :], *self.folder.glob("stopped*.ckpt")]:
                remove(older)

    def _checkpoints(self) -> list[Path]:
        """Checkpoints of this callback on disk, the newest first."""
        by_step = [(int(match[2]), path) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(by_step, reverse=True)]


def write_atomically(trainer: L.Trainer) -> None:
    """Make a trainer write all of its checkpoints atomically."""
    trainer.strategy.checkpoint_io = AtomicCheckpointIO()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes next to the target, syncs and renames, so no name ever holds half a checkpoint. Reads sharded folders too.

    NOTE: Lightning's own writer uses the system's temporary folder, which may be small or on another disk, from where
    a file is copied, not renamed.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise TypeError(f"local files take no storage options, got {storage_options!r}")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        with with_filename(path):
            try:
                torch.save(checkpoint, temporary)
            except (OSError, RuntimeError) as error:
                temporary.unlink(missing_ok=True)
                if not REFUSED.search(str(error)):
                    raise
                raise OSError(errno.EIO, "cannot be written; is the disk full?", str(path)) from error
        if path.is_dir():
            remove(path)
        publish(temporary, path)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if Path(path).is_dir():
            return read_full(Path(path))
        return super().load_checkpoint(path, *args, **kwargs)
