"""From masks, or from a flawed caption, to a response: predict -> refine -> unmask -> overwrite -> remask.

    sampler = Sampler(length=64, tokens_per_step=4, reviser=OverwriteAll(), post_steps=4)
    prefix = backbone.encode_prefix(inputs)
    sampled = sampler(backbone, prefix, special=codec.special, keys=["a", "b"], seed=0)
    codec.decode(sampled.ids[0].tolist())

B rows, L response positions, N asked positions, V vocabulary. Each row keeps its own block, step, end and
noise: what it becomes does not depend on the other rows. Rows that are done leave the batch of the backbone.

The end of the text is the first eot of the finished response; what is behind it becomes end-of-text. Until
then these positions are ordinary ones, so that a reviser may still move the end; `early_stop` fixes it sooner.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from src.batch import Backbone, Prefix, Sampled, SpecialIds, TraceStep
from src.diffusion.noise import Noise
from src.diffusion.revisers import Prediction, Reviser, Settled, State
from src.diffusion.schedule import Progress, Schedule
from src.diffusion.unmask import TopK, Unmask, draw


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
    early_stop: the earliest eot ever seen after a step ends the text, even if it is rewritten later. The masks before
        it are then revealed, those of other blocks as well, and the row is over; what is behind it is left alone.
        `block`: a row is over when a block is full and ends in end-of-text (LLaDA's evaluation, ProSeCo)
    cfg_scale: classifier-free guidance, logits u + (scale + 1) (c - u), where u is said behind a prefix that is all
        masks. 0 is none; otherwise each step costs two forward calls
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
    early_stop: bool | Literal["block"] = False
    cfg_scale: float = 0.0
    max_forwards: int | None = None

    def __post_init__(self) -> None:
        if self.post_steps < 0 or (self.post_steps and self.reviser is None):
            raise ValueError(f"post_steps must be at least 0, and 0 without a reviser, got {self.post_steps}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.cfg_scale < 0:
            raise ValueError(f"cfg_scale must be at least 0, got {self.cfg_scale}")
        if self.max_forwards is not None and self.max_forwards < self.step_forwards:
            raise ValueError(f"max_forwards must be at least {self.step_forwards}, got {self.max_forwards}")
        _ = self.schedule  # wrong numbers fail here, not at the first batch

    @property
    def schedule(self) -> Schedule:
        tokens = 1 if self.tokens_per_step is None and self.steps is None else self.tokens_per_step
        return Schedule(length=self.length, tokens_per_step=tokens, steps=self.steps, blocks=self.blocks)

    @property
    def step_forwards(self) -> int:
        """Forward calls of a step: two when it is guided."""
        return 2 if self.cfg_scale else 1

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
        suffix: Tensor | None = None,
        trace: bool = False,
    ) -> Sampled:
        """Responses for the rows of `prefix`, one key each.

        start: (B, L) ids to begin with, filled with end-of-text; rows without masks only get the post steps.
        suffix: (S,) ids behind every response, which is written in sight of them; not part of what is returned.
        """
        began = time.perf_counter()
        tokens = self._canvas(prefix, special, keys, start)
        predict = _Predictor(self, backbone, prefix, special, suffix)
        noise = Noise(keys, seed=seed, draw="sampler")
        run = _Run(self, tokens, predict, noise)
        traces: list[list[TraceStep]] | None = [[] for _ in keys] if trace else None
        while run.active.any():
            run.step(traces)
        ids = end_text(run.text(), special)
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
        wanted, visible = self.progress.wanted(before), before != self.mask_id
        post = active & ~wanted.any(1)  # only to be revised
        self.progress.enter(before)
        state = self._state(visible, post)
        count = self.progress.take(before).masked_fill(last, self.sampler.length)
        eligible = wanted & (self.progress.reach | last[:, None]) & active[:, None]
        editable = self.reviser.editable(state) & visible & active[:, None]
        hideable = editable & ~(post | last | (self.progress.steps_left == 0))[:, None]

        prediction = self.predict(before, eligible | editable | self.reviser.reads(state) & active[:, None])
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

    def text(self) -> Tensor:
        """(B, L) the tokens; where an early stop has ended a row an eot, or end-of-text from there on."""
        special, place, stop = self.predict.special, self.progress.place, self.progress.stop[:, None]
        if self.sampler.early_stop == "block":
            return self.tokens.masked_fill(place >= stop, special.eos)
        return self.tokens.masked_fill(place == stop, special.eot)

    def _state(self, visible: Tensor, post: Tensor) -> State:
        """The step as its reviser sees it."""
        progress = self.progress
        left = progress.steps_left.masked_fill(post, 0)
        return State(self.tokens, visible, progress.in_block | post[:, None], self.steps, progress.steps, left)

    def _is_last_forward(self) -> Tensor:
        """(B,) bool: whether the budget of a row allows no step after the next one."""
        limit = self.sampler.max_forwards
        if limit is None:
            return torch.zeros_like(self.active)
        return self.predict.forwards + 2 * self.sampler.step_forwards > limit

    def _propose(self, prediction: Prediction, eligible: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Token and confidence, both (B, L), of the eligible places; sampled where `drawn`, else argmax."""
        proposal, temperature = prediction.best.clone(), self.sampler.temperature
        if temperature > 0:
            logits, counts = prediction.at(drawn)[:, : self.predict.special.vocab_size], drawn.sum(1).tolist()
            logits[:, self.mask_id] = -torch.inf
            proposal[drawn] = draw(logits, temperature=temperature, noise=self.noise, counts=counts)
        return proposal, prediction.confidence(eligible, proposal)

    def _score(self, proposal: Tensor, confidence: Tensor) -> Tensor:
        """The confidence by which places are chosen: with `eos_last` below 0 where the text would end."""
        if not self.sampler.eos_last:
            return confidence
        special = self.predict.special
        return confidence - ((proposal == special.eos) | (proposal == special.eot)).double()

    def _finish(self, step: _Step, post: Tensor, last: Tensor) -> None:
        """Count. Rows are done when no mask is wanted and revising is over, or when their budget is spent."""
        self.tokens = step.tokens
        if self.sampler.early_stop == "block":
            self.progress.stop_behind(self.tokens, self.predict.special.eos)
        elif self.sampler.early_stop:
            self.progress.stop_at(self.tokens, self.predict.special.eot)
        self.steps = self.steps + self.active
        self.edits += step.rewritten.sum(1)
        self.remasks += step.remasked.sum(1)
        self.passes += post
        seen = self.settled.update(self.tokens, self.passes) & post
        over = seen | (self.passes >= self.sampler.post_steps)
        self.active = self.active & ~last & (self.progress.wanted(self.tokens).any(1) | ~over)

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
    """Forward calls for the rows that ask for something; counts them per row, never proposes a banned id or the mask.

    The logits that a backbone returns are changed in place where they are float32 already: a copy may take gigabytes.
    prefixes: what the calls of a step are made behind: the prefix and, for guidance, one that is all masks.
    """

    def __init__(
        self, sampler: Sampler, backbone: Backbone, prefix: Prefix, special: SpecialIds, suffix: Tensor | None
    ) -> None:
        self.backbone, self.special, self.scale = backbone, special, sampler.cfg_scale
        self.prefixes = [prefix, hidden_prefix(backbone, prefix, special)] if self.scale else [prefix]
        device = prefix.embeds.device
        self.forwards = torch.zeros(prefix.embeds.shape[0], dtype=torch.int64, device=device)
        self.banned = torch.tensor(special.banned, dtype=torch.int64, device=device)
        if suffix is not None and suffix.ndim != 1:
            raise ValueError(f"suffix must be one row of ids, (S,), got shape {tuple(suffix.shape)}")
        self.suffix = torch.tensor([] if suffix is None else suffix.tolist(), dtype=torch.int64, device=device)
        self.rows, self.selected = torch.arange(len(self.forwards), device=device), self.prefixes

    def __call__(self, tokens: Tensor, where: Tensor) -> Prediction:
        """Logits and argmax at the true places of `where` (B, L)."""
        asked = where.any(1)
        self.forwards = self.forwards + asked * len(self.prefixes)
        rows = asked.nonzero()[:, 0]
        logits = self._logits(rows, tokens[rows], where[rows])  # (N, V)
        logits[:, self.banned] = -torch.inf
        logits[:, self.special.vocab_size :] = -torch.inf
        best = tokens.clone()
        best[where] = argmax_without(logits, self.special.mask)
        return Prediction(where, logits, best)

    def _logits(self, rows: Tensor, tokens: Tensor, where: Tensor) -> Tensor:
        """(N, V) float32 logits of some rows in sight of the suffix, guided if asked for."""
        if not torch.equal(rows, self.rows):
            self.rows, self.selected = rows, [prefix.select(rows) for prefix in self.prefixes]
        suffix = self.suffix.expand(len(rows), -1)  # (n, S)
        tokens, where = torch.cat([tokens, suffix], 1), F.pad(where, (0, len(self.suffix)))  # (n, L + S)
        said = [self.backbone(p, tokens, positions=where).float() for p in self.selected]
        if not self.scale:
            return said[0]
        told, blind = said
        return told.sub_(blind).mul_(self.scale + 1).add_(blind)


def _true(row: list[bool]) -> list[int]:
    """The places of the true values."""
    return [place for place, value in enumerate(row) if value]


def argmax_without(logits: Tensor, mask: int) -> Tensor:
    """(N,) argmax of logits (N, V) among the ids that are not `mask`."""
    kept = logits[:, mask].clone()
    logits[:, mask] = -torch.inf  # and back again: cheaper than a copy of all
    best = logits.argmax(-1)
    logits[:, mask] = kept
    return best


def hidden_prefix(backbone: Backbone, prefix: Prefix, special: SpecialIds) -> Prefix:
    """A prefix of the same lengths that tells nothing: the mask at every place, also where an image was."""
    device = prefix.embeds.device
    inputs = {"prompt_ids": torch.full(prefix.embeds.shape[:2], special.mask, dtype=torch.int64, device=device)}
    if prefix.mask is not None:
        inputs["prompt_mask"] = prefix.mask
    return backbone.encode_prefix(inputs)


def end_text(tokens: Tensor, special: SpecialIds) -> Tensor:
    """`tokens` (B, L) with end-of-text everywhere behind the first eot of a row."""
    eot = (tokens == special.eot).long()
    return tokens.masked_fill(eot.cumsum(1) - eot > 0, special.eos)
