"""Scene labels: pre-training of the embedded base model's vision tower, in place of SigLIP's.

    image -> tower -> patches pooled to the 3x3 cells of a scene -> shape (or empty), colour and size of each cell,
    and the background -> cross-entropy

From captions alone, a randomly initialized tower takes many times longer to learn (results/LOG.md). The linear heads
are discarded afterwards.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.diffusion.corruption import Chain
from src.diffusion.losses import Term
from src.distributed.parallel import world_size
from src.io.errors import UserError
from src.objectives.base import Objective, Setup
from src.scenes.graph import BACKGROUNDS, COLOURS, COLUMNS, ROWS, SHAPES, SIZES, Scene
from src.types import Batch, Corrupted, Kind

SIDE = len(ROWS)
CLASSES = {"shape": len(SHAPES) + 1, "colour": len(COLOURS), "size": len(SIZES), "background": len(BACKGROUNDS)}
UNKNOWN = -100


class TowerLabels(Objective):
    """Classifies the cells of a scene. Needs records with a `scene`, one tile per image, a patch grid of 3n x 3n.

    Raises UserError if the patch grid is not 3n x 3n.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, corruption=Chain(), terms=(Term("labels", Kind.CLEAN),), t_min=0.0)
        self.heads = nn.Linear(self.backbone.vision.config.hidden_size, sum(CLASSES.values()))

    def forward_backward(self, batch: Batch, views: list[Corrupted], totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum of the heads' mean losses, times the number of rows and views, which `totals` divides by."""
        tiles = batch.prefix["pixel_values"].flatten(0, 1)  # (B, 3, S, S): one tile per scene
        hidden = self.backbone.vision.features(tiles)  # (B, N, W)
        logits = self.heads(_pool_cells(hidden)).split(list(CLASSES.values()), -1)  # each (B, 9, classes)
        cells, background = scene_labels([Scene.from_dict(r["scene"]) for r in batch.records])
        total = F.cross_entropy(logits[3].mean(1), background.to(hidden.device))
        for head_logits, label in zip(logits[:3], cells.to(hidden.device).unbind(-1), strict=True):
            total = total + F.cross_entropy(head_logits.flatten(0, 1), label.flatten(), ignore_index=UNKNOWN)
        self._log_accuracy(logits[0], cells[..., 0].to(hidden.device))
        labels = total * len(batch) * len(views)
        if torch.is_grad_enabled():
            (world_size() * labels / totals["labels"]).backward()
        return {"labels": labels.detach()}

    def _log_accuracy(self, logits: Tensor, label: Tensor) -> None:
        occupied = label < len(SHAPES)
        self.log("train/shape_accuracy", (logits.argmax(-1) == label)[occupied].float().mean(), prog_bar=True)


def _pool_cells(hidden: Tensor) -> Tensor:
    """Mean of the patch features (B, N, W) over each of the nine cells: (B, 9, W)."""
    side = round(hidden.shape[1] ** 0.5)
    if side * side != hidden.shape[1] or side % SIDE:
        raise UserError(f"a patch grid of {hidden.shape[1]} tokens does not divide into {SIDE} x {SIDE} cells")
    grid = hidden.unflatten(1, (SIDE, side // SIDE, SIDE, side // SIDE))
    return grid.mean((2, 4)).flatten(1, 2)


def scene_labels(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Class indices: (B, 9, 3) shape, colour and size of each cell, and (B,) background.

    Empty cells have shape len(SHAPES), and UNKNOWN colour and size.
    """
    labels = torch.full((len(scenes), SIDE * SIDE, 3), UNKNOWN)
    labels[..., 0] = len(SHAPES)
    for row, scene in enumerate(scenes):
        for item in scene.objects:
            cell = item.cell[0] * len(COLUMNS) + item.cell[1]
            indices = (SHAPES.index(item.shape), COLOURS.index(item.colour), SIZES.index(item.size))
            labels[row, cell] = torch.tensor(indices)
    return labels, torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes])
