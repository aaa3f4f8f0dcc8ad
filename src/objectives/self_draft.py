"""Stage I with the model's own guesses as mistakes: a draft in every step, and no expert. Ours, not from a paper.

1. As Stage I: z is the caption x with masks, random and hallucinated tokens -> its four terms.
2. Guess, without gradient: y_i = argmax p(. | z) at every mask. As one large step of a sampler would, unmask the
   fraction u of them with the highest p(y_i | z), u uniform on [0, 1) for each row; eot and end-of-text come last.
   That is z', where the other masks stay.
3. Second pass, on z'. The truth is known, so what is wrong needs no expert:
   L' = mistake * mean over {i unmasked, y_i != x_i} of -log p(x_i | z')
      + keep * mean over {i unmasked, y_i = x_i} of -log p(x_i | z')

ProSeCo's second pass (`src.objectives.proseco`) shows no mask and trains every token with one weight. A step has two
passes: compare with Stage II at half the steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from src.diffusion.losses import Term
from src.diffusion.noise import Noise
from src.objectives.base import Setup
from src.objectives.revision import RevisionObjective
from src.samplers.unmask import log_probability, top
from src.types import Batch, Corrupted, Kind


class SelfDraft(RevisionObjective):
    """Two more terms, `mistake` on wrong guesses and `keep` on right ones, both means over their kind in a row.

    mistake, keep: their coefficients; stage1: see `RevisionObjective`
    """

    def __init__(self, setup: Setup, *, mistake: float = 1.0, keep: float = 1.0, **stage1: Any) -> None:
        terms = (Term("mistake", Kind.MISTAKE, coef=mistake), Term("keep", Kind.DRAFT, coef=keep))
        super().__init__(setup, second_terms=tuple(term for term in terms if term.coef), **stage1)

    def second_input(
        self, batch: Batch, state: Corrupted, where: Tensor, logits: Tensor, noise: Noise
    ) -> Corrupted | None:
        """z': MISTAKE and DRAFT where a mask became a wrong or a right guess, all else as in `state`."""
        # 1. guesses, and how sure the model is of them
        guess = self.special.argmax(logits)  # (N,)
        confidence = log_probability(logits, guess).exp()
        confidence = confidence - ((guess == self.special.eos) | (guess == self.special.eot)).double()
        masked = state.where(Kind.MASK)  # (B, L), inside `where`
        guesses = state.tokens.masked_scatter(where, guess)
        ranks = torch.zeros(where.shape, dtype=torch.float64, device=where.device).masked_scatter(where, confidence)
        # 2. unmask the surest of them
        count = (noise.level(device=where.device) * masked.sum(1)).ceil().long()  # (B,)
        unmasked = top(ranks, masked, count)
        tokens = torch.where(unmasked, guesses, state.tokens)
        # 3. the truth says which are wrong
        wrong = unmasked & (tokens != state.target)
        kind = state.kind.masked_fill(unmasked, int(Kind.DRAFT)).masked_fill(wrong, int(Kind.MISTAKE))
        self.tally("draft_error_rate", wrong, unmasked)
        return Corrupted(tokens, state.target, kind, state.rate)
