"""From masks, or from a flawed caption, to a response: predict -> refine -> unmask -> overwrite -> remask.

    sampler = Sampler(length=64, tokens_per_step=4, reviser=OverwriteAll(), post_steps=4)
    prefix = backbone.encode_prefix(inputs)
    sampled = sampler(backbone, prefix, special=codec.special, keys=["a", "b"], seed=0)
    codec.decode(sampled.ids[0].tolist())

B rows, L response positions, N asked positions, V vocabulary. Each row keeps its own block, step, end and
noise: what it becomes does not depend on the other rows. Rows that are done leave the batch of the backbone.

The end of the text is the first eot of the finished response; what is behind it becomes end-of-text. Until
then these positions are ordinary ones, so that a reviser may still move the end.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from src.batch import Backbone, Prefix, Sampled, SpecialIds, TraceStep
from src.diffusion.noise import Noise
from src.diffusion.revisers import Prediction, Reviser, Settled, State
from src.diffusion.schedule import Progress, Schedule
from src.diffusion.unmask import TopK, Unmask, draw, low_confidence


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Writes responses of `length` tokens with a backbone.

    tokens_per_step or steps: how fast masks are revealed, one of the two; neither means one token a step
    blocks: the response is written in this many equal parts, left to right; `steps` are shared among them
    unmask: which masks to reveal (default `TopK()`)
    reviser: what happens to visible tokens (default nothing)
    post_steps: passes that only revise, once no mask is left; a row stops earlier when its text comes back
    temperature: 0 takes the argmax, otherwise revealed tokens are drawn from softmax(logits / temperature)
    eos_last: proposals of eot and end-of-text are revealed after all others. They are the surest guesses of a canvas
        that is all masks, and revealed first they make every text as short as it can be
    max_forwards: forward calls a row may use, checked once a step; the last fills every mask with its argmax
    """

    length: int
    tokens_per_step: int | None = None
    steps: int | None = None
    blocks: int = 1
    unmask: Unmask | None = None
    reviser: Reviser | None = None
    post_steps: int = 0
    temperature: float = 0.0
    eos_last: bool = False
    max_forwards: int | None = None

    def __post_init__(self) -> None:
        if self.post_steps < 0 or (self.post_steps and self.reviser is None):
            raise ValueError(f"post_steps must be at least 0, and 0 without a reviser, got {self.post_steps}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.max_forwards is not None and self.max_forwards < 1:
            raise ValueError(f"max_forwards must be at least 1, got {self.max_forwards}")
        _ = self.schedule  # wrong numbers fail here, not at the first batch

    @property
    def schedule(self) -> Schedule:
        tokens = 1 if self.tokens_per_step is None and self.steps is None else self.tokens_per_step
        return Schedule(length=self.length, tokens_per_step=tokens, steps=self.steps, blocks=self.blocks)

    def with_steps(self, *, tokens_per_step: int | None = None, steps: int | None = None) -> Sampler:
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
        trace: bool = False,
    ) -> Sampled:
        """Responses for the rows of `prefix`, one key each.

        start: (B, L) ids to begin with, filled with end-of-text; rows without masks only get the post steps.
        """
        began = time.perf_counter()
        tokens = self._canvas(prefix, special, keys, start)
        predict, noise = _Predictor(backbone, prefix, special), Noise(keys, seed=seed, draw="sampler")
        run = _Run(self, tokens, predict, noise)
        traces: list[list[TraceStep]] | None = [[] for _ in keys] if trace else None
        while run.active.any():
            run.step(traces)
        ids = end_text(run.tokens, special)
        return Sampled(ids, run.predict.forwards, run.edits, run.remasks, time.perf_counter() - began, traces)

    def _canvas(self, prefix: Prefix, special: SpecialIds, keys: list[str], start: Tensor | None) -> Tensor:
        rows, device = prefix.embeds.shape[0], prefix.embeds.device
        if rows != len(keys):
            raise ValueError(f"{len(keys)} keys for a prefix of {rows} rows")
        shape = (rows, self.length)
        if start is None:
            return torch.full(shape, special.mask, dtype=torch.int64, device=device)
        if tuple(start.shape) != shape:
            raise ValueError(f"start has shape {tuple(start.shape)}, the sampler needs {shape}")
        return start.to(device=device, dtype=torch.int64, copy=True)


@dataclass
class _Step:
    """What a step did, all (B, L): tokens after it, where it revealed, rewrote, hid again, and how surely."""

    tokens: Tensor
    unmasked: Tensor
    rewritten: Tensor
    remasked: Tensor
    confidence: Tensor


class _Run:
    """One call of a sampler: the state of its rows."""

    def __init__(self, sampler: Sampler, tokens: Tensor, predict: _Predictor, noise: Noise) -> None:
        self.sampler, self.predict, self.noise = sampler, predict, noise
        self.mask_id = predict.special.mask
        self.unmask, self.reviser = sampler.unmask or TopK(), sampler.reviser or Reviser()
        self.tokens = tokens
        self.progress = Progress(sampler.schedule, tokens, self.mask_id)
        self.settled = Settled(tokens, passes=sampler.post_steps)
        self.steps, self.passes, self.edits, self.remasks = (tokens.new_zeros(len(tokens)) for _ in range(4))
        self.active = (tokens == self.mask_id).any(1) | (sampler.post_steps > 0)

    def step(self, traces: list[list[TraceStep]] | None) -> None:
        """One pass of the loop, over all rows that are not done."""
        before, active, last = self.tokens, self.active, self._is_last_forward()
        masked = before == self.mask_id
        post = active & ~masked.any(1)  # only to be revised
        self.progress.enter(before)
        count = self.progress.take(before).masked_fill(last, self.sampler.length)
        state = State(before, ~masked, self.progress.in_block | post[:, None], self.steps)
        eligible = masked & (self.progress.before_end | last[:, None]) & active[:, None]
        editable = self.reviser.editable(state) & ~masked & active[:, None]
        hideable = editable & ~(post | last | (self.progress.steps_left == 0))[:, None]

        prediction = self.predict(before, eligible | editable)
        prediction = self.reviser.refine(state, prediction, self.predict)
        proposal, confidence = self._propose(prediction, eligible, drawn=eligible & ~last[:, None])
        unmasked = self.unmask.select(self._score(proposal, confidence), eligible, count)
        written = self.reviser.overwrite(state, prediction)
        rewritten = editable & (written != before)
        remasked = hideable & self.reviser.remask(state, prediction)

        tokens = torch.where(unmasked, proposal, torch.where(rewritten, written, before))
        tokens = tokens.masked_fill(remasked, self.mask_id)
        step = _Step(tokens, unmasked, rewritten, remasked, confidence)
        if traces is not None:
            self._record(traces, step)
        self._finish(step, post, last)

    def _is_last_forward(self) -> Tensor:
        """(B,) bool: whether the next forward call of a row is the last that its budget allows."""
        limit = self.sampler.max_forwards
        if limit is None:
            return torch.zeros_like(self.active)
        return self.predict.forwards + 1 >= limit

    def _propose(self, prediction: Prediction, eligible: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Token and confidence, both (B, L), of the eligible places; sampled where `drawn`, else argmax."""
        proposal, temperature = prediction.best.clone(), self.sampler.temperature
        if temperature > 0:
            logits, counts = prediction.at(drawn), drawn.sum(1).tolist()
            proposal[drawn] = draw(logits, temperature=temperature, noise=self.noise, counts=counts)
        confidence = torch.zeros(eligible.shape, dtype=torch.float64, device=eligible.device)
        confidence[eligible] = low_confidence(prediction.at(eligible), proposal[eligible])
        return proposal, confidence

    def _score(self, proposal: Tensor, confidence: Tensor) -> Tensor:
        """The confidence by which places are chosen: with `eos_last` below 0 where the text would end."""
        if not self.sampler.eos_last:
            return confidence
        special = self.predict.special
        return confidence - ((proposal == special.eos) | (proposal == special.eot)).double()

    def _finish(self, step: _Step, post: Tensor, last: Tensor) -> None:
        """Count. Rows are done when no mask is left and revising is over, or when their budget is spent."""
        self.tokens = step.tokens
        self.steps = self.steps + self.active
        self.edits += step.rewritten.sum(1)
        self.remasks += step.remasked.sum(1)
        self.passes += post
        seen = self.settled.update(self.tokens, self.passes) & post
        over = seen | (self.passes >= self.sampler.post_steps)
        self.active = self.active & ~last & ((self.tokens == self.mask_id).any(1) | ~over)

    def _record(self, traces: list[list[TraceStep]], step: _Step) -> None:
        """Append the step to the trace of each row that took part."""
        host = {name: value.tolist() for name, value in vars(step).items()}
        before, forwards = self.tokens.tolist(), self.predict.forwards.tolist()
        for row in self.active.nonzero()[:, 0].tolist():
            tokens, confidence = host["tokens"][row], host["confidence"][row]
            unmasked, rewritten, remasked = (_true(host[name][row]) for name in ("unmasked", "rewritten", "remasked"))
            traces[row].append(
                TraceStep(
                    tokens=tokens,
                    unmasked=unmasked,
                    # NOTE: a token can be rewritten and hidden in one step; its new id is the mask then.
                    rewritten=[(i, before[row][i], tokens[i]) for i in rewritten],
                    remasked=remasked,
                    confidence=[confidence[i] for i in unmasked],
                    forwards=forwards[row],
                )
            )


class _Predictor:
    """Forward calls for the rows that ask for something; counts them per row, never proposes a banned id."""

    def __init__(self, backbone: Backbone, prefix: Prefix, special: SpecialIds) -> None:
        self.backbone, self.prefix, self.special = backbone, prefix, special
        device = prefix.embeds.device
        self.forwards = torch.zeros(prefix.embeds.shape[0], dtype=torch.int64, device=device)
        self.banned = torch.tensor(sorted({special.mask, *special.banned}), device=device)
        self.rows, self.selected = torch.arange(len(self.forwards), device=device), prefix

    def __call__(self, tokens: Tensor, where: Tensor) -> Prediction:
        """Logits and argmax at the true places of `where` (B, L)."""
        asked = where.any(1)
        self.forwards = self.forwards + asked
        rows = asked.nonzero()[:, 0]
        logits = self.backbone(self._prefix_of(rows), tokens[rows], positions=where[rows])  # (N, V)
        logits = logits.to(torch.float32, copy=True)
        logits[:, self.special.vocab_size :] = -torch.inf  # a head can have more rows than the tokenizer ids
        logits[:, self.banned] = -torch.inf
        best = tokens.clone()
        best[where] = logits.argmax(-1)
        return Prediction(where, logits, best)

    def _prefix_of(self, rows: Tensor) -> Prefix:
        if not torch.equal(rows, self.rows):
            self.rows, self.selected = rows, self.prefix.select(rows)
        return self.selected


def _true(row: list[bool]) -> list[int]:
    """The places of the true values."""
    return [place for place, value in enumerate(row) if value]


def end_text(tokens: Tensor, special: SpecialIds) -> Tensor:
    """`tokens` (B, L) with end-of-text everywhere behind the first eot of a row."""
    eot = (tokens == special.eot).long()
    return tokens.masked_fill(eot.cumsum(1) - eot > 0, special.eos)
