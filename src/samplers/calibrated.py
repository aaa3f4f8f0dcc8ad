"""Token edits by Bayes' rule, at the share of wrong tokens that each text seems to have. Ours, not from a paper."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from src.io.errors import UserError
from src.samplers.predictor import Prediction
from src.samplers.reviser import Reviser, State

LEAST = 1e-6  # of a share or probability, so that the odds stay finite


@dataclass(frozen=True, kw_only=True)
class CalibratedEdit(Reviser):
    """A visible token becomes its argmax where that is more likely than the token, at this text's share of errors.

    With conf=calibrated, p is the posterior at the share rho of wrong tokens in training; a draft has another share pi.
    Over the n visible tokens z_i of the current block, and w_i = 1 - p(z_i):

    1. pi = rho, then `rounds` times (Saerens, Latinne and Decaestecker, 2002, for two classes)
       pi <- mean of w_i pi / rho / (w_i pi / rho + (1 - w_i) (1 - pi) / (1 - rho))
    2. z_i becomes its argmax v where p(v) pi / rho >= p(z_i) (1 - pi) / (1 - rho)

    So a text with fewer errors than those of training is edited more timidly than by `OverwriteAll`, no text more
    boldly. rounds=0 is `OverwriteAll`.

    prior: rho among words, logged in training as visible_wrong
    """

    prior: float
    rounds: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.prior < 1:
            raise UserError(f"prior must be above 0 and less than 1, got {self.prior}")
        if self.rounds < 0:
            raise UserError(f"rounds must be at least 0, got {self.rounds}")

    def overwrite(self, state: State, prediction: Prediction) -> Tensor:
        where = self.editable(state) & prediction.where  # (B, L)
        own, best = (prediction.confidence(where, ids) for ids in (state.tokens, prediction.best))
        odds = self._share(1 - own, where) / self.prior  # (B, 1) pi / rho
        rest = (1 - odds * self.prior) / (1 - self.prior)  # (1 - pi) / (1 - rho)
        better = where & (prediction.best != state.tokens) & (best * odds >= own * rest)
        return torch.where(better, prediction.best, state.tokens)

    def _share(self, wrong: Tensor, where: Tensor) -> Tensor:
        """(B, 1) pi, from the probability (B, L) that a token is wrong, at the true positions of `where`."""
        share, count = wrong.new_full((len(wrong), 1), self.prior), where.sum(1, keepdim=True).clamp(min=1)
        for _ in range(self.rounds):
            bad, good = wrong * share / self.prior, (1 - wrong) * (1 - share) / (1 - self.prior)
            posterior = bad / (bad + good).clamp(min=LEAST)
            share = (posterior.masked_fill(~where, 0).sum(1, keepdim=True) / count).clamp(LEAST, 1 - LEAST)
        return share
