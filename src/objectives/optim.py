"""Optimization settings of every objective: AdamW, its schedule, micro-batches, checkpointing and sharding.

optim: {target: src.objectives.optim.Optim, lr: 5.0e-4, ...}
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch

from src.distributed.parallel import Sharding
from src.io.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW, its schedule (linear warm-up, constant, decay to zero) and the execution of a step.

    lr: peak learning rate; vision_lr: peak learning rate of the vision tower (None: the same; 0: frozen)
    decay: `cosine` (from the end of the warm-up), or the share (0..1) of steps at the end that decay linearly
    views: noise draws per sample and step; they share one encoded prefix
    antithetic: spread the noise levels of a sample's views evenly (two views: t and t + 1/2, wrapped) instead of
        drawing each. Rows of a batch stay independent, as noise depends on the sample and not on its batch
    strata: spread the noise levels of this many consecutive samples of the stream evenly over [t_min, 1), one in each
        equal part, as ProSeCo does for the rows of a batch (None: each level is drawn alone)
    micro_batch: rows per forward call (None: all); affects memory, not the result
    checkpointing: activations of the model's blocks: `none` keeps them for the backward pass, `full` recomputes them,
        `selective` keeps only the outputs of matrix products and attention
    compile: compile the model's blocks with torch.compile: slower start, faster steps
    sharding: how FSDP2 shards the model, if the trainer's strategy is `src.training.strategy.FSDP2`
    max_skipped: consecutive steps with non-finite gradients to skip; one more ends the training
    filler_loss: whether the end-of-text filler behind eot has a loss; it is corrupted and attended to either way
    states: of AdamW: `full`, of the dtype of the weights, or `8bit` (torchao): a quarter of the memory of float32
    rounding: of updated bfloat16 weights: `nearest`, which loses updates below half their spacing, or `stochastic`
        (torchao), which is right on average

    Raises UserError for invalid values and combinations.
    """

    lr: float
    vision_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay: float | str = "cosine"
    clip_norm: float | None = 1.0
    views: int = 1
    antithetic: bool = False
    strata: int | None = None
    micro_batch: int | None = None
    checkpointing: str = "none"
    compile: bool = False
    sharding: Sharding | None = None
    max_skipped: int = 3
    filler_loss: bool = True
    states: str = "full"
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        self._check_numbers()
        for name, known in (("states", ("full", "8bit")), ("rounding", ("nearest", "stochastic"))):
            if getattr(self, name) not in known:
                raise UserError(f"optim.{name} must be {' or '.join(known)}, got {getattr(self, name)!r}")
        if (self.states, self.rounding) != ("full", "nearest"):
            try:  # now, as only then can a checkpoint with its tensors be loaded
                import torchao.optim  # noqa: F401 # pyright: ignore[reportMissingImports]
            except ImportError as error:
                message = (
                    "optim.states=8bit and rounding=stochastic need torchao: pip install 'rediff-lightning[lowbit]'"
                )
                raise UserError(message) from error
        if self.decay != "cosine" and not (isinstance(self.decay, int | float) and 0 <= self.decay <= 1):
            raise UserError(f"decay must be 'cosine' or a share within 0..1, got {self.decay!r}")
        if self.antithetic and self.views < 2:
            raise UserError("antithetic spreads the noise levels of a sample's views, so it needs views >= 2")
        if self.compile and self.checkpointing == "selective":
            raise UserError("selective checkpointing does not work on compiled blocks: use checkpointing=full")

    def _check_numbers(self) -> None:
        minimums: dict[str, float | None] = {"lr": self.lr, "vision_lr": self.vision_lr, "clip_norm": self.clip_norm}
        minimums |= {
            "weight_decay": self.weight_decay,
            "warmup_steps": self.warmup_steps,
            "max_skipped": self.max_skipped,
        }
        for name, value in minimums.items():
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UserError(f"optim.{name} must be a finite number of at least 0, got {value}")
        for name, value, hint in (("lr", self.lr, ""), ("clip_norm", self.clip_norm, " (null: no clipping)")):
            if value == 0:
                raise UserError(f"optim.{name} must be more than 0{hint}, got {value}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas must be at least 0 and less than 1, got {list(self.betas)}")
        for name in ("views", "micro_batch", "strata"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"optim.{name} must be at least 1, got {value}")

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """AdamW over groups of parameters, each with its `lr`. Raises UserError without torchao, if that is needed."""
        options = {"betas": (self.betas[0], self.betas[1]), "weight_decay": self.weight_decay}
        parameters = [parameter for group in groups for parameter in group["params"]]
        if self.states == "full" and self.rounding == "nearest":
            fused = all(parameter.device.type == "cuda" for parameter in parameters)
            return torch.optim.AdamW(groups, **options, fused=fused or None)
        if self.rounding == "stochastic" and any(p.dtype != torch.bfloat16 for p in parameters):
            raise UserError(
                "optim.rounding=stochastic is for bfloat16 weights, but some are trained in another dtype: set "
                "model.dtype=bfloat16 and trainer.precision=bf16-true"
            )
        from torchao.optim import AdamW8bit, _AdamW  # pyright: ignore[reportMissingImports]

        kind = AdamW8bit if self.states == "8bit" else _AdamW
        return kind(groups, **options, bf16_stochastic_round=self.rounding == "stochastic")

    def factor(self, step: int, total: int) -> float:
        """Learning rate at optimizer step `step` of `total`, as a factor of the peak."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.decay == "cosine":
            progress = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
            return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
        decay_steps = float(self.decay) * total
        return warmup * (min(1.0, (total - step) / decay_steps) if decay_steps else 1.0)


def init_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the state of every parameter now: a checkpoint that lacks that of unused parameters cannot be loaded."""
    quantizing: Any = optimizer if hasattr(optimizer, "_new_buffer") else None  # torchao's
    for parameter in [parameter for group in optimizer.param_groups for parameter in group["params"]]:
        if quantizing:
            moments = [quantizing._new_buffer(parameter, signed) for signed in (True, False)]
        else:
            moments = [torch.zeros_like(parameter), torch.zeros_like(parameter)]
        step = torch.tensor(0.0, device=parameter.device if optimizer.defaults.get("fused") else None)
        optimizer.state[parameter] = {"step": step, "exp_avg": moments[0], "exp_avg_sq": moments[1]}


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of torch's generator for dropout and rounding: a function of the run's seed, optimizer step and rank."""
    return zlib.crc32(f"{seed}/{step}/{rank}".encode())
