"""ProSeCo: a denoiser that learns to correct its own outputs (arXiv 2602.11590).

1. hide tokens with probability t -> cross-entropy on the hidden ones                                     (eq. of MDLM)
2. fill the response with the network's own guesses; no gradient goes through them
3. read that draft, in which nothing is hidden -> cross-entropy on all tokens, with the same weight 1/t

One network: where it sees masks it is a denoiser, where it sees none a corrector. The first pass is propagated back
before the second one runs, so that both take the memory of one; the draft is a constant, so that is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from src.diffusion.corruption import Absorb, Replace
from src.diffusion.losses import Term, editable
from src.diffusion.noise import Noise
from src.io.errors import UserError
from src.objectives.base import Objective
from src.objectives.optim import Training
from src.samplers.unmask import draw
from src.types import Batch, Corrupted, Kind, Loss, Prefix, SpecialIds

FILLS = ("all", "masked")
PICKS = ("argmax", "sample")


class ProSeCo(Objective):
    """Two terms, `mask` and `correct`; with `errors` the second is two, `wrong` and `right`.

    fill:   the draft has the network's guess at `all` places, as visible tokens have no privilege in the first pass
            and may come out damaged (paper), or at the `masked` ones and the true tokens elsewhere (self-generated
            token edits, arXiv 2606.17175)
    pick:   the guess is the `argmax`, or a `sample`. Never the mask or an id that a response does not contain
    rate:   share of the draft's right tokens that are replaced at random besides
    errors: where the draft is right, the term is -p(token) in place of the cross-entropy: wrong tokens weigh more
    begin:  optimizer steps of mask prediction alone before drafts are corrected
    correct, correct_weight: coefficient and weight (`one` or `inverse_rate`) of the second term
    weight, reduce, floor: of both, see `Term`; views and antithetic noise levels: see `Training`
    """

    def __init__(
        self,
        *,
        backbone: Callable[[], nn.Module],
        special: SpecialIds,
        training: Training,
        t_min: float = 0.1,
        fill: str = "all",
        pick: str = "argmax",
        rate: float = 0.0,
        errors: bool = False,
        begin: int = 0,
        correct: float = 1.0,
        correct_weight: str = "inverse_rate",
        weight: str = "inverse_rate",
        reduce: str = "batch_tokens",
        floor: float = 0.0,
        seed: int = 0,
    ) -> None:
        if fill not in FILLS:
            raise UserError(f"fill must be one of {FILLS}, got {fill!r}")
        if pick not in PICKS:
            raise UserError(f"pick must be one of {PICKS}, got {pick!r}")
        if reduce not in ("batch_tokens", "answer_len"):
            raise UserError(f"reduce must be 'batch_tokens' or 'answer_len', got {reduce!r}")
        if begin < 0:
            raise UserError(f"begin must be at least 0, got {begin}")
        self.denoising = (Term("mask", Kind.MASK, weight, reduce, floor=floor),)
        second = partial(Term, kind=None, weight=correct_weight, reduce=reduce, coef=correct, floor=floor)
        if errors:
            self.correcting = (second("wrong", only="wrong"), second("right", only="right", form="probability"))
        else:
            self.correcting = (second("correct"),)
        super().__init__(
            backbone=backbone,
            special=special,
            training=training,
            corruption=Absorb(special=special),
            terms=(*self.denoising, *self.correcting),
            t_min=t_min,
            seed=seed,
        )
        self.fill, self.pick, self.begin = fill, pick, begin
        self.replace = Replace(special=special, rate=rate)

    def passes(self, batch: Batch, prefix: Prefix, state: Corrupted, noise: Noise) -> Iterator[dict[str, Loss]]:
        if self.global_step < self.begin:
            yield self.one_pass(batch, prefix, state, self.denoising)
            return
        everything = editable(state)
        filled = everything if self.fill == "all" else state.where(Kind.MASK)  # (B, L)
        logits = self.logits(batch, prefix, state, filled)
        guess = self._guess(logits.detach(), filled, noise)
        losses = self.reduce(logits, filled, state, self.denoising)
        del logits
        yield losses
        draft = self._draft(batch, state, filled, guess, noise)
        self.tally("draft_error_rate", everything & (draft.tokens != draft.target), everything)
        logits = self.logits(batch, prefix, draft, everything)
        yield self.reduce(logits, everything, draft, self.correcting)

    def _guess(self, logits: Tensor, where: Tensor, noise: Noise) -> Tensor:
        """(N,) tokens that a response may contain, at the N true places of `where` (B, L)."""
        logits = logits.clone()
        logits[:, [self.special.mask, *self.special.banned]] = -torch.inf
        logits[:, self.special.vocab_size :] = -torch.inf
        if self.pick == "argmax":
            return logits.argmax(-1)
        return draw(logits, temperature=1.0, noise=noise, counts=where.sum(1).tolist())

    def _draft(self, batch: Batch, state: Corrupted, filled: Tensor, guess: Tensor, noise: Noise) -> Corrupted:
        """The second pass's input: a MISTAKE where the network was wrong, else CLEAN, or SYNTAX if replaced."""
        tokens = state.target.masked_scatter(filled, guess)
        kind = torch.where(tokens == state.target, int(Kind.CLEAN), int(Kind.MISTAKE)).to(state.kind.dtype)
        kind = kind.masked_fill(state.where(Kind.FROZEN), int(Kind.FROZEN))
        return self.replace(batch, Corrupted(tokens, state.target, kind, state.rate), noise)
