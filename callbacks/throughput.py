"""Throughput: how fast training goes, and what it waits for, logged every n optimizer steps.

    callbacks: [{target: callbacks.throughput.Throughput, every_n_steps: 50}]

    perf/tokens_per_s     response tokens, all ranks     perf/data_wait     share of the time spent waiting for data
    perf/samples_per_s    samples, all ranks             perf/memory_gib    peak: of the GPU, else of the process
    perf/tokens_seen      response tokens since the first step, over restarts

The clock runs from asking for a batch to the end of its step; validation and online rounds do not count.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning as L
import torch

from src.batch import Batch

GIB = 1 << 30


class Throughput(L.Callback):
    """Measures between logging points; each point averages over the steps since the one before."""

    def __init__(self, *, every_n_steps: int = 50) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.tokens_seen = self.samples_seen = 0
        self.last_step = 0
        self._clear()
        self._asked: float | None = None  # when the trainer turned to the next batch
        self._began = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "tokens_seen": self.tokens_seen,
            "samples_seen": self.samples_seen,
            "last_step": self.last_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens_seen, self.samples_seen = state_dict["tokens_seen"], state_dict["samples_seen"]
        self.last_step = state_dict["last_step"]

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._asked = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._began = time.perf_counter()
        if self._asked is not None:
            self.waited += self._began - self._asked

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        tokens, samples = int(batch.editable.sum()) * trainer.world_size, len(batch) * trainer.world_size
        self.tokens, self.samples = self.tokens + tokens, self.samples + samples
        self.tokens_seen, self.samples_seen = self.tokens_seen + tokens, self.samples_seen + samples
        self.worked += time.perf_counter() - self._began
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step != self.last_step:
            self.last_step = step
            for logger in trainer.loggers:
                logger.log_metrics(self._metrics(pl_module.device), step)
            self._clear()
        self._asked = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._asked = time.perf_counter()  # validation is no waiting for data

    def _metrics(self, device: torch.device) -> dict[str, float]:
        seconds = self.waited + self.worked
        return {
            "perf/tokens_per_s": self.tokens / seconds,
            "perf/samples_per_s": self.samples / seconds,
            "perf/data_wait": self.waited / seconds,
            "perf/memory_gib": peak_memory(device) / GIB,
            "perf/tokens_seen": float(self.tokens_seen),
            "perf/samples_seen": float(self.samples_seen),
        }

    def _clear(self) -> None:
        self.tokens = self.samples = 0
        self.waited = self.worked = 0.0


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, or the most that this process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
