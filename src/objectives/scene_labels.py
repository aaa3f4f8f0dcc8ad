"""Image labels: prepares the vision tower of the embedded base model, in place of SigLIP's own pre-training.

    image -> tower -> patches pooled to the 3x3 places of a scene -> shape (or nothing), colour and size of each place,
    and the background of the picture -> cross-entropy

Without it a tower with random weights learns to see only through the captions, which takes many times longer
(results/LOG.md). The linear heads are dropped afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.diffusion.corruption import Chain
from src.diffusion.losses import Term
from src.io.errors import UserError
from src.objectives.base import Objective
from src.objectives.optim import Training
from src.scenes.graph import BACKGROUNDS, COLOURS, COLUMNS, ROWS, SHAPES, SIZES, Scene
from src.types import Batch, Corrupted, Kind, Loss, SpecialIds

SIDE = len(ROWS)
CLASSES = {"shape": len(SHAPES) + 1, "colour": len(COLOURS), "size": len(SIZES), "background": len(BACKGROUNDS)}
UNKNOWN = -100


class TowerLabels(Objective):
    """Needs records with a `scene`, images of one tile, and a patch grid that is a multiple of 3."""

    def __init__(
        self, *, backbone: Callable[[], nn.Module], special: SpecialIds, training: Training, seed: int = 0
    ) -> None:
        terms = (Term("labels", Kind.CLEAN),)
        super().__init__(
            backbone=backbone, special=special, training=training, corruption=Chain(), terms=terms, t_min=0.0, seed=seed
        )
        self.heads = nn.Linear(self.backbone.vision.config.hidden_size, sum(CLASSES.values()))

    def losses(self, batch: Batch, corrupted: list[Corrupted]) -> Iterator[dict[str, Loss]]:
        """Sum over the rows of the mean loss of each head."""
        tiles = batch.prefix["pixel_values"].flatten(0, 1)  # (B, 3, S, S): the picture of a scene is one tile
        hidden = self.backbone.vision.features(tiles)  # (B, N, W)
        scores = self.heads(_places(hidden)).split(list(CLASSES.values()), -1)
        places, background = scene_labels([Scene.from_dict(r["scene"]) for r in batch.records])
        total = F.cross_entropy(scores[3].mean(1), background.to(hidden.device))
        for score, label in zip(scores[:3], places.to(hidden.device).unbind(-1), strict=True):
            total = total + F.cross_entropy(score.flatten(0, 1), label.flatten(), ignore_index=UNKNOWN)
        self._log_labels(scores[0], places[..., 0].to(hidden.device))
        yield {"labels": Loss(total * len(batch) * len(corrupted), torch.tensor(len(batch) * len(corrupted)))}

    def _log_labels(self, score: Tensor, label: Tensor) -> None:
        there = label < len(SHAPES)
        self.log("train/shape_accuracy", (score.argmax(-1) == label)[there].float().mean(), prog_bar=True)


def _places(hidden: Tensor) -> Tensor:
    """Patch features (B, N, W) averaged over each of the nine places: (B, 9, W)."""
    side = round(hidden.shape[1] ** 0.5)
    if side * side != hidden.shape[1] or side % SIDE:
        raise UserError(f"a patch grid of {hidden.shape[1]} tokens does not divide into {SIDE} x {SIDE} places")
    grid = hidden.unflatten(1, (SIDE, side // SIDE, SIDE, side // SIDE))
    return grid.mean((2, 4)).flatten(1, 2)


def scene_labels(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """(B, 9, 3) shape, colour and size of each place (no colour and size where it is empty), (B,) background."""
    places = torch.full((len(scenes), SIDE * SIDE, 3), UNKNOWN)
    places[..., 0] = len(SHAPES)
    for row, scene in enumerate(scenes):
        for item in scene.objects:
            place = item.cell[0] * len(COLUMNS) + item.cell[1]
            found = (SHAPES.index(item.shape), COLOURS.index(item.colour), SIZES.index(item.size))
            places[row, place] = torch.tensor(found)
    return places, torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes])
