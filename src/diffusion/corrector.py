"""ProSeCo's corrector: between two reveals the model reads its own full draft until it agrees (arXiv 2602.11590).

    Corrector(every=2, passes=4)

The same network is a denoiser where it sees masks and a corrector where it sees none. A corrector step fills every
mask with the best guess, runs the network on that draft up to `passes` times, each time replacing it by the argmax, and
stops where nothing changes. Visible tokens take the last draft, and masks are revealed by the last logits.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from src.diffusion.revisers import Predict, Prediction, Reviser, State

SCOPES = ("written", "block")


class Corrector(Reviser):
    """Every `every`-th step of a block corrects; post steps do as well.

    every:  counts from 1 in each block, as in the released code. WARN: it never fires where a block has fewer steps
    passes: the most forward calls of one correction; 0 never corrects
    scope:  `written` corrects the current block and all before it, `block` the current one alone
    """

    def __init__(self, *, every: int = 1, passes: int = 1, scope: Literal["written", "block"] = "written") -> None:
        if every < 1 or passes < 0:
            raise ValueError(f"every must be at least 1 and passes at least 0, got {every} and {passes}")
        if scope not in SCOPES:
            raise ValueError(f"scope must be one of {SCOPES}, got {scope!r}")
        self.every, self.passes, self.scope = every, passes, scope

    def editable(self, state: State) -> Tensor:
        return self._region(state) & state.visible

    def reads(self, state: State) -> Tensor:
        """The whole draft is filled, later blocks too."""
        return ~state.visible & self._fires(state)[:, None]

    def refine(self, state: State, prediction: Prediction, predict: Predict) -> Prediction:
        """The logits of the last draft where it is corrected, those of the first pass elsewhere."""
        region, draft = self._region(state) & prediction.where, prediction.best
        draft = torch.where(state.visible, state.tokens, draft)
        logits, best = prediction.logits.clone(), prediction.best.clone()
        for _ in range(self.passes):
            if not region.any():
                break
            found = predict(draft, region)
            logits[region[prediction.where]] = found.logits
            best = torch.where(region, found.best, best)
            changed = (region & (found.best != draft)).any(1)
            draft = torch.where(region, found.best, draft)
            region = region & changed[:, None]  # a row that agrees with itself is done
        return Prediction(prediction.where, logits, best)

    def overwrite(self, state: State, prediction: Prediction) -> Tensor:
        return prediction.best

    def _fires(self, state: State) -> Tensor:
        """(B,) bool: whether this step corrects. `left` is 0 in post steps."""
        done = state.steps - state.left + 1
        return ((done % self.every == 0) | (state.left == 0)) & (self.passes > 0)

    def _region(self, state: State) -> Tensor:
        """(B, L) bool: what a correction may change."""
        up_to_block = state.block.flip(1).cumsum(1).flip(1) > 0
        where = up_to_block if self.scope == "written" else state.block
        return where & self._fires(state)[:, None]
