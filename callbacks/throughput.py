"""Throughput: speed, data wait, memory and utilization of training, logged every n optimizer steps.

    callbacks: {throughput: {target: callbacks.throughput.Throughput, every_n_steps: 50}}

    perf/tokens_per_s     response tokens, all ranks    perf/data_wait    share of the time between two steps
    perf/samples_per_s    samples, all ranks            perf/memory_gib   peak: of the GPU, else of the process
    perf/tokens_seen, perf/samples_seen                 since the first step, over restarts
    perf/mfu             share of the device's peak that the multiplications of the steps use, of rank 0

The clock stops during validation and between epochs. All time between the end of a step and the start of the next one
counts as waiting for data, also that of callbacks listed after this one and of saving checkpoints.

The operations of a sample are counted in the first step, which runs without `optim.compile`: matrix products and
attention, forward and backward, with what `optim.checkpointing` computes again. Tokens of an image and padding vary, so
`perf/mfu` is an estimate. It is logged on devices in PEAKS, in bfloat16, or with `peak_tflops`.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from src.types import Batch

GIB = 1 << 30
# Name of a GPU -> its peak in bfloat16 without sparsity, TFLOP/s (data sheets); the first row that fits. Lightning's
# table (`get_available_flops`) has the peaks with sparsity for some, which are twice as high.
PEAKS = {
    **{"B200": 2250, "H200 NVL": 835, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "A100": 312},
    **{"L40S": 362, "L4": 121, "A40": 150, "A10G": 70, "A10": 125},
}


class Throughput(L.Callback):
    """Logs throughput; each point averages over the steps since the previous one.

    peak_tflops: of one device in the precision of training; None: that of PEAKS
    """

    def __init__(self, *, every_n_steps: int = 50, peak_tflops: float | None = None) -> None:
        super().__init__()
        self.every_n_steps, self.peak_tflops = every_n_steps, peak_tflops
        self._sample_flops = 0.0
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
        if self.peak_tflops is None and trainer.precision in ("bf16-mixed", "bf16-true"):
            self.peak_tflops = peak_of(pl_module.device)
        if self.peak_tflops:
            self._count_next_step(pl_module)

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
            if self.peak_tflops:
                flops = self._sample_flops * samples / self._world / seconds
                metrics["perf/mfu"] = flops / (1e12 * self.peak_tflops)
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step)
            self._tokens = self._samples = 0
            self.waited = self.worked = 0.0
        self._requested_at = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._requested_at = time.perf_counter()

    def _count_next_step(self, pl_module: Any) -> None:
        """Count the operations of the next training step, per sample."""
        step = pl_module.training_step

        def counted(batch: Batch, batch_idx: int) -> Any:
            del pl_module.training_step  # from the object: the method of its class is back
            with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
                output = step(batch, batch_idx)
            self._sample_flops = counter.get_total_flops() / len(batch)
            return output

        pl_module.training_step = counted

    def _unlogged(self) -> tuple[int, int]:
        """Tokens and samples of all ranks since the last point."""
        return int(self._tokens) * self._world, self._samples * self._world


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: allocated by tensors on a GPU, else resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def peak_of(device: torch.device) -> float | None:
    """Peak in bfloat16 in TFLOP/s; None for an unknown device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((float(peak) for part, peak in PEAKS.items() if part in name), None)
