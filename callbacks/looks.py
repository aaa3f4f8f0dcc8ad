"""P(fix) and P(break) by noise level, logged during training (`src/metrics/fixing.py`).

    callbacks: {looks: {target: callbacks.looks.Looks, every_n_steps: 150, num: 64, levels: [0, 0.1, 0.5]}}

    first `num` validation samples -> masked at each level -> one forward call
      -> `p_break/t=0`: right tokens that it changes; `p_fix/t=0`: random wrong tokens that it corrects

A model that decodes with a reviser is asked for texts with few masks and none: a P(break) that rises towards level 0
says that its training did not show it such texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L

from callbacks.ema import weights_for
from src.distributed.parallel import gathered
from src.io.errors import UserError
from src.metrics.fixing import count_looks
from src.models.inference import evaluating
from src.text.tokenizer import Codec
from src.types import Batch


class Looks(L.Callback):
    """Logs both shares on `num` fixed samples every `every_n_steps` optimizer steps; nothing without validation data.

    levels: shares of masked tokens; rate: share of the visible tokens that are replaced for P(fix)
    """

    def __init__(
        self,
        *,
        codec: Codec,
        every_n_steps: int,
        num: int = 64,
        levels: Sequence[float] = (0.0, 0.1, 0.5),
        rate: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(every_n_steps, num) < 1:
            raise UserError(f"every_n_steps and num must be at least 1, got {every_n_steps} and {num}")
        self.codec, self.every_n_steps, self.num = codec, every_n_steps, num
        self.levels, self.rate, self.seed = list(levels), rate, seed
        self.last_step = 0  # step logged last, so a resumed run does not log it twice
        self.batches: list[Batch] = []

    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_step = state_dict["last_step"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.batches, missing = [], self.num
        for batch in trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            self.batches.append(batch.rows(slice(0, missing)))
            missing -= len(self.batches[-1])
            if not missing:
                break

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        step = trainer.global_step
        if not self.batches or step % self.every_n_steps or step == self.last_step:
            return
        self.last_step = step
        backbone: Any = pl_module.backbone
        settings = {"special": self.codec.special, "levels": self.levels, "rate": self.rate, "seed": self.seed}
        with weights_for(trainer, "evaluate"), gathered(backbone):  # on all ranks, so that rank 0 can then look alone
            if not trainer.is_global_zero:
                return
            with evaluating(pl_module):
                counts = count_looks(backbone, self.batches, device=pl_module.device, **settings).tolist()
        values = {}
        for level, (fixed, wrong, broken, right) in zip(self.levels, counts, strict=True):
            shares = {"p_fix": (fixed, wrong), "p_break": (broken, right)}
            values |= {f"{name}/t={level:g}": hits / tries for name, (hits, tries) in shares.items() if tries}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
