"""How an objective is trained, whatever it is: AdamW, its schedule, how a step is cut up and shared among devices.

objective: {training: {target: src.objectives.optim.Training, lr: 5.0e-4, ...}}
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from src.distributed.parallel import Sharding
from src.io.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Training:
    """AdamW and its schedule (linear warm-up, constant, decay to zero), and how a step is cut up.

    lr: peak learning rate; vision_lr: that of the vision tower (None: the same; 0: frozen)
    decay: `cosine` (from the end of the warm-up) or the share in 0..1 of the steps that decay linearly at the end
    views: noise draws per sample and step, which share one encoded prefix
    antithetic: spread the noise levels of a sample's views evenly (two views: t and t + 1/2, wrapped) instead of
        drawing each. Rows of a batch stay independent: noise belongs to a sample, whatever batch it is in
    micro_batch: rows in a forward pass (None: all); changes memory, not the result
    checkpointing: activations of the model's blocks: `none` keeps them for the backward pass, `full` computes them a
        second time, `selective` keeps only results of matrix products and attention
    compile: compile the model's blocks (torch.compile): slower to start, faster from then on
    sharding: how FSDP2 shares the model, where the trainer's strategy is `src.training.strategy.FSDP2`
    max_skipped: steps in a row that are skipped because their gradients are not finite; one more ends the training
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
    micro_batch: int | None = None
    checkpointing: str = "none"
    compile: bool = False
    sharding: Sharding | None = None
    max_skipped: int = 3

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.decay != "cosine" and not (isinstance(self.decay, int | float) and 0 <= self.decay <= 1):
            raise UserError(f"decay must be 'cosine' or a share within 0..1, got {self.decay!r}")
        if self.antithetic and self.views < 2:
            raise UserError("antithetic noise levels are those of one sample: they need views of at least 2")
        if self.compile and self.checkpointing == "selective":
            raise UserError("compiled blocks hide what selective checkpointing would keep: use checkpointing=full")

    def _check_numbers(self) -> None:
        least: dict[str, float | None] = {"lr": self.lr, "vision_lr": self.vision_lr, "clip_norm": self.clip_norm}
        least |= {"weight_decay": self.weight_decay, "warmup_steps": self.warmup_steps, "max_skipped": self.max_skipped}
        for name, value in least.items():
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UserError(f"objective.training.{name} must be a finite number of at least 0, got {value}")
        for name, value, otherwise in (("lr", self.lr, ""), ("clip_norm", self.clip_norm, " (null: no clipping)")):
            if value == 0:
                raise UserError(f"objective.training.{name} must be more than 0{otherwise}, got {value}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"objective.training.betas must be at least 0 and less than 1, got {list(self.betas)}")
        if self.views < 1 or (self.micro_batch is not None and self.micro_batch < 1):
            raise UserError(f"views and micro_batch must be at least 1, got {self.views} and {self.micro_batch}")

    def factor(self, step: int, total: int) -> float:
        """The learning rate's factor at an optimizer step of `total`."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.decay == "cosine":
            done = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
            return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))
        length = float(self.decay) * total
        return warm * (min(1.0, (total - step) / length) if length else 1.0)
