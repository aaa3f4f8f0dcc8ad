"""Throughput: speed, data wait and memory of training, logged every n optimizer steps.

    callbacks: {throughput: {target: callbacks.throughput.Throughput, every_n_steps: 50}}

    perf/tokens_per_s     response tokens, all ranks    perf/data_wait    share of the time between two steps
    perf/samples_per_s    samples, all ranks            perf/memory_gib   peak: of the GPU, else of the process
    perf/tokens_seen, perf/samples_seen                 since the first step, over restarts

The clock stops during validation and between epochs. All time between the end of a step and the start of the next one
counts as waiting for data, also that of callbacks listed after this one and of saving checkpoints.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning as L
import torch
from torch import Tensor

from src.types import Batch

GIB = 1 << 30


class Throughput(L.Callback):
    """Logs throughput; each point averages over the steps since the previous one."""

    def __init__(self, *, every_n_steps: int = 50) -> None:
        super().__init__()
        self.every_n_steps = every_n_steps
        self.tokens_seen = self.samples_seen = 0  # up to the last point
        self.last_step = 0
        self.waited = self.worked = 0.0  # seconds since the last point
        self._tokens: Tensor | int = 0  # stays on the device, as reading it would synchronize every step
        self._samples = 0
        self._world = 1
        self._requested_at = self._received_at = 0.0  # when the trainer requested the batch, and when it got it

    def state_dict(self) -> dict[str, Any]:
        tokens, samples = self._unlogged()
        seen = {"tokens_seen": self.tokens_seen + tokens, "samples_seen": self.samples_seen + samples}
        return {**seen, "last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens_seen, self.samples_seen = state_dict["tokens_seen"], state_dict["samples_seen"]
        self.last_step = state_dict["last_step"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._world = trainer.world_size

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._requested_at = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._received_at = time.perf_counter()
        self.waited += self._received_at - self._requested_at

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._tokens = self._tokens + batch.editable.sum()
        self._samples += len(batch)
        step = trainer.global_step
        due = step % self.every_n_steps == 0 and step != self.last_step
        counts = self._unlogged() if due else None  # synchronizes the device, so read the clock after it
        self.worked += time.perf_counter() - self._received_at
        if counts:
            tokens, samples = counts
            self.last_step = step
            self.tokens_seen, self.samples_seen = self.tokens_seen + tokens, self.samples_seen + samples
            seconds = self.waited + self.worked
            metrics = {
                "perf/tokens_per_s": tokens / seconds,
                "perf/samples_per_s": samples / seconds,
                "perf/data_wait": self.waited / seconds,
                "perf/memory_gib": peak_memory(pl_module.device) / GIB,
                "perf/tokens_seen": float(self.tokens_seen),
                "perf/samples_seen": float(self.samples_seen),
            }
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step)
            self._tokens = self._samples = 0
            self.waited = self.worked = 0.0
        self._requested_at = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._requested_at = time.perf_counter()

    def _unlogged(self) -> tuple[int, int]:
        """Tokens and samples of all ranks since the last point."""
        return int(self._tokens) * self._world, self._samples * self._world


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: allocated by tensors on a GPU, else resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
