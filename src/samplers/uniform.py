"""Samplers that start from random tokens: every position holds an ordinary token at every step, never a mask.

    sampler = Posterior(length=64, steps=32)
    sampled = sampler(backbone, prefix, special=codec.special, keys=["a", "b"], seed=0)

    random ids -> T times: logits -> p(x0) over the states -> new ids -> end of text

B rows, L response positions, V vocabulary, K states: the ids that a text may contain, which are all but the mask and
the banned and unwritten ids. Noise is uniform over the ordinary ids, as in training (`Replace`): eot and end-of-text
are never noise, or texts would end where no model meant it. These samplers have the interface and counts of `Sampler`;
all tokens may change in every step, so there is no reviser. A model has to be trained on such noise.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from src.diffusion.noise import Noise
from src.io.errors import UserError
from src.samplers.predictor import Predictor
from src.samplers.sampler import Sampler, end_text
from src.samplers.schedule import Schedule
from src.samplers.unmask import PART
from src.types import Backbone, Prefix, Sampled, SpecialIds, TraceStep


@dataclass(frozen=True, kw_only=True)
class FromNoise:
    """Base class: time runs from 1 (noise) to 0 (text) in T equal steps; a subclass defines `transition`.

    tokens_per_step or steps: T is `steps`, or length / tokens_per_step, rounded up; give one, neither means T = length
    temperature: p is softmax(logits / temperature); at 0 the argmax has probability 1
    cfg_scale: classifier-free guidance as in `Sampler`; above 0 each step costs two forward calls
    """

    length: int
    tokens_per_step: int | None = None
    steps: int | None = None
    temperature: float = 1.0
    cfg_scale: float = 0.0
    post_steps: ClassVar[int] = 0  # read from every sampler, as is early_stop
    early_stop: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature must be at least 0, got {self.temperature}")
        if self.cfg_scale < 0:
            raise UserError(f"cfg_scale must be at least 0, got {self.cfg_scale}")
        _ = self.schedule  # raises here, not at the first batch

    @property
    def schedule(self) -> Schedule:
        tokens = 1 if self.tokens_per_step is None and self.steps is None else self.tokens_per_step
        return Schedule(length=self.length, tokens_per_step=tokens, steps=self.steps, blocks=1)

    def with_steps(self, *, tokens_per_step: int | None = None, steps: int | None = None) -> Self:
        """The same sampler at another speed."""
        return replace(self, tokens_per_step=tokens_per_step, steps=steps)

    @torch.no_grad()
    def __call__(
        self,
        backbone: Backbone,
        prefix: Prefix,
        *,
        special: SpecialIds,
        keys: list[str],
        seed: int,
        start: Tensor | None = None,
        suffix: Tensor | None = None,
        trace: bool = False,
    ) -> Sampled:
        """Responses for the rows of `prefix`, one key each.

        suffix: (S,) ids behind every response, which the model attends to; not part of the result

        Raises UserError if `start` is given, and ValueError if the number of keys is not that of the rows.
        """
        started = time.perf_counter()
        if start is not None:
            raise UserError("this sampler starts from noise and cannot begin with a given text: leave start out")
        if len(prefix.embeds) != len(keys):
            raise ValueError(f"{len(keys)} keys for a prefix of {len(prefix.embeds)} rows")
        device = prefix.embeds.device
        predict = Predictor(backbone, prefix, special, cfg_scale=self.cfg_scale, suffix=suffix)
        states, random = (tensor.to(device) for tensor in states_of(special))  # (K,), (K,) bool
        noise = Noise(keys, seed=seed, draw="sampler")
        everywhere = torch.ones(len(keys), self.length, dtype=torch.bool, device=device)
        tokens = states[random][(noise.uniform(everywhere, dtype=torch.float64) * random.sum()).long()]  # (B, L)
        edits = torch.zeros_like(predict.forwards)
        traces: list[list[TraceStep]] = [[] for _ in keys]
        steps = self.schedule.block_steps
        for left in range(steps, 0, -1):
            logits, chance = (
                predict(tokens, everywhere).logits,
                noise.uniform(everywhere, dtype=torch.float64),
            )  # (B * L, V), (B, L)
            place = torch.searchsorted(states, tokens)  # index of each token among the states
            parts = zip(logits.split(PART), place.flatten().split(PART), chance.flatten().split(PART), strict=True)
            drawn = [self._draw(states, random, *part, left=left, steps=steps) for part in parts]
            new_tokens = torch.cat(drawn).view_as(tokens)
            edits += (new_tokens != tokens).sum(1)
            if trace:
                record(traces, tokens, new_tokens, predict.forwards)
            tokens = new_tokens
        ids, wall_s = end_text(tokens, special), time.perf_counter() - started
        return Sampled(ids, predict.forwards, edits, torch.zeros_like(edits), wall_s, traces if trace else None)

    def _draw(
        self, states: Tensor, random: Tensor, logits: Tensor, place: Tensor, chance: Tensor, *, left: int, steps: int
    ) -> Tensor:
        """(N,) the next ids, drawn at the quantiles `chance` (N,).

        logits: (N, V); states: (K,) ids; random, place, left and steps as in `transition`.
        """
        probs = probabilities(logits[:, states], self.temperature)
        return states[pick(self.transition(probs, place, random, left=left, steps=steps), chance)]

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


AnySampler = Sampler | FromNoise  # what a file in conf/sampler describes


def states_of(special: SpecialIds) -> tuple[Tensor, Tensor]:
    """(K,) the ids that a text may contain, ascending, and (K,) bool: whether they are ordinary."""
    excluded = {special.mask, *special.banned, *special.unwritten}
    states = [token for token in range(special.vocab_size) if token not in excluded]
    return torch.tensor(states), torch.tensor([token not in (special.eos, special.eot) for token in states])


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """(N, K) float64 softmax(logits / temperature) of logits (N, K); at 0 all of it at the argmax."""
    if temperature == 0:
        return torch.zeros_like(logits, dtype=torch.float64).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    return (logits.double() / temperature).softmax(-1)


def pick(weight: Tensor, chance: Tensor) -> Tensor:
    """(N,) indices drawn in proportion to weight (N, K) float64, at the quantiles `chance` (N,) on [0, 1)."""
    total = weight.cumsum(1)
    return torch.searchsorted(total, (chance * total[:, -1])[:, None], right=True)[:, 0].clamp(max=weight.shape[1] - 1)


def record(traces: list[list[TraceStep]], before: Tensor, after: Tensor, forwards: Tensor) -> None:
    """Append a step to the trace of each row: every change counts as a rewrite."""
    rows = zip(traces, before.tolist(), after.tolist(), forwards.tolist(), strict=True)
    for trace, old, new, calls in rows:
        rewritten = [(i, a, b) for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
        trace.append(TraceStep(new, [], rewritten, [], [], calls))
