"""Skipped: how many samples of the shards could not be used, and an end to the run when these are too many.

    callbacks: {skipped: {target: callbacks.skipped.Skipped, every_n_steps: 10}}

    data/skipped/missing      lie behind the cut of a truncated shard
    data/skipped/damaged      hold no JSON or no image that can be decoded
    data/skipped/unreadable   the shard is gone, or the disk or the server fails
    data/skipped/misfit       do not fit the model or the config

Numbers are those of all ranks since the first step, over restarts; a reason that never occurs is not logged. The run
stops with UserError when more than `data.max_skipped` samples were skipped since it was started.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning as L

from src.distributed.parallel import Team
from src.io.errors import UserError
from src.types import Batch

REASONS = ("missing", "damaged", "unreadable", "misfit")
AT_LEAST = 100  # samples, where max_skipped is a share
SHOWN = 10  # places in the error


class Skipped(L.Callback):
    """Reads `notes` and `max_skipped` of the datamodule, if it has these. All ranks log and stop at the same step."""

    def __init__(self, *, every_n_steps: int = 10) -> None:
        super().__init__()
        self.every_n_steps = every_n_steps
        self.before = Counter[str]()  # by reason, in earlier processes of the run
        self.now = Counter[str]()  # in this one, at the last point
        self._read = self._epoch = self._last_step = 0

    def state_dict(self) -> dict[str, Any]:
        return dict(self.before + self.now)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = Counter(state_dict)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._team = Team()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        index = getattr(getattr(trainer, "datamodule", None), "index", None)
        if index and len(set(self._team.gather(index("train").digest))) > 1:
            raise UserError("data.path: the processes read different data; check that all see the same index.json")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._read += len(batch)
        self._epoch = int(trainer.num_training_batches) * len(batch) * trainer.world_size
        if trainer.global_step % self.every_n_steps == 0:
            self._check(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check(trainer)

    def _check(self, trainer: L.Trainer) -> None:
        """Sum over the ranks, log, and stop if too many were skipped."""
        data = getattr(trainer, "datamodule", None)
        notes = getattr(data, "notes", None)
        if notes is None or trainer.global_step == self._last_step:  # a step that was skipped ends again
            return
        self._last_step = trainer.global_step
        own = Counter({note: count for note, count in notes.items() if note[1] in REASONS})
        ranks = self._team.gather((self._read, own))
        skipped = sum((counts for _, counts in ranks), Counter[tuple[str, str]]())
        self.now = Counter[str]()
        for (_, reason), count in skipped.items():
            self.now[reason] += count
        metrics = {f"data/skipped/{reason}": float(count) for reason, count in (self.before + self.now).items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step)
        limit = getattr(data, "max_skipped", AT_LEAST)
        if isinstance(limit, float):  # of an epoch at least: a run may begin with a shard that is gone
            limit = max(AT_LEAST, limit * max(self._epoch, sum(read for read, _ in ranks)))
        if skipped.total() > limit:
            places = [f"{place}: {count} {reason}" for (place, reason), count in skipped.most_common(SHOWN)]
            more = [f"{len(skipped) - SHOWN} more places"] if len(skipped) > SHOWN else []
            raise UserError(
                f"{skipped.total()} samples were skipped, and data.max_skipped allows {limit:.0f}: make the data "
                f"again, or raise it. {'; '.join(places + more)}"
            )
