"""Samplers that start from random tokens; a model has to be trained on such noise.

    random ids -> T times: logits -> p(x0) over the states -> new ids -> end of text

B rows, L response positions, V vocabulary, K states: the ids that a text may contain, which are all but the mask and
the banned and unwritten ids. Noise is uniform over the ordinary ids, as in training (`Replace`): eot and end-of-text
are never noise, or texts would end where no model meant it.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from src.diffusion.noise import Noise
from src.io.errors import UserError
from src.samplers.base import AnySampler, Step
from src.samplers.predictor import Predictor
from src.samplers.unmask import PART


@dataclass(frozen=True, kw_only=True)
class FromNoise(AnySampler):
    """Base class: time runs from 1 (noise) to 0 (text) in T equal steps; a subclass defines `transition`.

    T is `steps`, or length / tokens_per_step, rounded up
    temperature: p is softmax(logits / temperature); at 0 the argmax has probability 1
    """

    length: int
    tokens_per_step: int | None = None
    steps: int | None = None
    temperature: float = 1.0
    cfg_scale: float = 0.0
    compile: bool = False

    def write(
        self, predict: Predictor, noise: dict[str, Noise], start: Tensor | None, *, trace: bool
    ) -> Generator[Step, None, tuple[Tensor, Tensor, Tensor, Tensor]]:
        if start is not None:
            raise UserError("this sampler starts from noise and cannot begin with a given text: leave start out")
        # 1. noise: random ordinary ids
        special, device, rows = predict.special, predict.forwards.device, len(predict.forwards)
        excluded = {special.mask, *special.banned, *special.unwritten}
        ids = [token for token in range(special.vocab_size) if token not in excluded]
        states = torch.tensor(ids, device=device)  # (K,)
        random = torch.tensor([token not in (special.eos, special.eot) for token in ids], device=device)  # (K,) bool
        everywhere = torch.ones(rows, self.length, dtype=torch.bool, device=device)
        nowhere, edits = ~everywhere, torch.zeros_like(predict.forwards)
        ordinary = states[random]
        place = noise["sampler"].uniform(everywhere, dtype=torch.float64) * len(ordinary)
        tokens = ordinary[place.long()]  # (B, L)
        num_steps = self.schedule.block_steps
        for left in range(num_steps, 0, -1):
            # 2. predict all positions, and draw the next id of each; in parts, as float64 takes gigabytes
            prediction = predict.first(tokens, everywhere, [True] * rows)
            logits = prediction.logits.flatten(0, 1)  # (B * L, V)
            chance = noise["sampler"].uniform(everywhere, dtype=torch.float64).flatten()
            place = torch.searchsorted(states, tokens).flatten()  # index of each token among the states
            drawn = []
            parts = (values.split(PART) for values in (logits, place, chance))
            for part, its_place, its_chance in zip(*parts, strict=True):
                own = part[:, states]
                if self.temperature == 0:
                    probs = torch.zeros_like(own, dtype=torch.float64).scatter_(1, own.argmax(1, keepdim=True), 1.0)
                else:
                    probs = (own.double() / self.temperature).softmax(-1)
                weight = self.transition(probs, its_place, random, left=left, steps=num_steps)
                drawn.append(states[pick(weight, its_chance)])
            before, tokens = tokens, torch.cat(drawn).view_as(tokens)
            rewritten = tokens != before
            edits = edits + rewritten.sum(1)
            changes = {"unmasked": nowhere, "rewritten": rewritten, "remasked": nowhere}
            confidence = prediction.confidence(rewritten, tokens) if trace else nowhere.double()
            made = {"rows": everywhere[:, 0], "forwards": predict.forwards, "before": before, "after": tokens}
            yield {**made, **changes, "confidence": confidence}
        return tokens, edits, torch.zeros_like(edits), torch.full_like(tokens, -1)

    def transition(self, probs: Tensor, place: Tensor, random: Tensor, *, left: int, steps: int) -> Tensor:
        """(N, K) float64 weights of the next state, not normalized; from time left / steps to (left - 1) / steps.

        probs: (N, K) float64, p(x0); place: (N,) index of the current state; random: (K,) bool, the states of noise.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Posterior(FromNoise):
    """Uniform-noise diffusion (D3PM, arXiv 2107.03006; UDLM, arXiv 2412.10193) that keeps a_t = 1 - t until time t.

    The next state is drawn from q(s | t, z, r) ~ [a_ts z + (1 - a_ts) / n] * [a_s r + (1 - a_s) noise], where z is the
    current state, a_ts = a_t / a_s, and noise is 1 / n for each of the n ordinary ids. r is the distribution of x0
    given the other positions; a network trained by cross-entropy has seen z too, so p ~ r * q(z | x0), r is p divided
    by that, and the draw is exact: the sum over x0 of p(x0) q(s | x0, z). Noise never makes an eot or end-of-text, so
    by Bayes' rule one could not be undone once written; z is therefore treated as ordinary.
    """

    def transition(self, probs: Tensor, place: Tensor, random: Tensor, *, left: int, steps: int) -> Tensor:
        before, after = 1 - left / steps, 1 - (left - 1) / steps  # a_t, a_s
        noise = random.double() / random.sum()  # (K,)
        stay, jump = before / after, (1 - before / after) * noise.max()  # a_ts, (1 - a_ts) / n
        chance = (stay * (1 - after) * noise[place] + jump)[:, None]  # q(z | x0) where x0 is not z
        # 1. r ~ p / q(z | x0): only the entry of z changes, up to a constant factor
        own = probs.gather(1, place[:, None]) * chance / (before + chance)
        r = probs.scatter(1, place[:, None], own)
        # 2. a_s r + (1 - a_s) noise
        weight = r / r.sum(1, keepdim=True) * after + noise * (1 - after)
        # 3. times a_ts z + (1 - a_ts) / n
        own = weight.gather(1, place[:, None]) * (stay + jump)
        return (weight * jump).scatter(1, place[:, None], own)


@dataclass(frozen=True, kw_only=True)
class Jumps(FromNoise):
    """Discrete flow matching along the mixture path (arXiv 2407.15595) in Euler steps, with kappa = 1 - t.

    Each position draws x1 from p and becomes it with probability 1 - exp(-h kappa' / (1 - kappa)); in the last step 1.
    """

    def transition(self, probs: Tensor, place: Tensor, random: Tensor, *, left: int, steps: int) -> Tensor:
        stay = math.exp(-1 / left) if left > 1 else 0.0  # h = 1 / steps, 1 - kappa = left / steps
        return (probs * (1 - stay)).scatter_add(1, place[:, None], probs.new_full((len(place), 1), stay))


def pick(weight: Tensor, chance: Tensor) -> Tensor:
    """(N,) indices drawn in proportion to weight (N, K) float64, at the quantiles `chance` (N,) on [0, 1)."""
    total = weight.cumsum(1)
    return torch.searchsorted(total, (chance * total[:, -1])[:, None], right=True)[:, 0].clamp(max=weight.shape[1] - 1)
