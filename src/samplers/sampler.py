"""From masks, or from a flawed caption, to a response: predict -> refine -> unmask -> overwrite -> remask.

    sampler = Sampler(length=64, tokens_per_step=4, reviser=OverwriteAll(), post_steps=4)
    prefix = backbone.encode_prefix(inputs)
    sampled = sampler(backbone, prefix, special=codec.special, keys=["a", "b"], seed=0)
    codec.decode(sampled.ids[0].tolist())

B rows, L response positions, N asked positions, V vocabulary. Each row keeps its own block, step, end and
noise: what it becomes does not depend on the other rows. Rows that are done leave the batch of the backbone.

The end of the text is the first eot of the finished response; what is behind it becomes end-of-text. Until
then these positions are ordinary ones, so that a reviser may still move the end; `early_stop` fixes it sooner.

A row that a step leaves as it is costs no call in the next: backbones are told no time and would say the same again.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from src.diffusion.noise import Noise
from src.io.errors import UserError
from src.samplers.predictor import Predictor
from src.samplers.reviser import Prediction, Reviser, State
from src.samplers.schedule import Progress, Schedule
from src.samplers.unmask import TopK, Unmask, draw, keep_nucleus
from src.types import Backbone, Prefix, Sampled, SpecialIds, TraceStep

DRAWS = ("sampler", "unmask", "score", "reviser")  # noise of tokens, of policies, of the random score, of revisers
Score = Literal["probability", "margin", "entropy", "random"]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Writes responses of `length` tokens with a backbone.

    tokens_per_step or steps: how fast masks are unmasked, one of the two; neither means one token a step
    blocks: the response is written in this many equal parts, left to right; `steps` are shared among them
    shift: how unevenly a block's steps share its masks, see `Schedule`
    unmask: which masks to unmask (default `TopK()`)
    score: what masks are chosen by: `probability` of the proposal, `margin` between the two best, (negative) `entropy`,
        or `random`, of the logits before temperature
    reviser: what happens to visible tokens (default nothing)
    post_steps: passes that only revise, once no mask is left; a row stops earlier when its text comes back
    temperature: 0 takes the argmax, otherwise unmasked tokens are drawn from softmax(logits / temperature)
    top_p: they are drawn from the smallest set of tokens that has this share, 1 is all
    eos_last: proposals of eot and end-of-text are unmasked after all others. They are the surest guesses of a response length
        that is all masks, and unmasked first they make every text as short as it can be
    early_stop: the earliest eot ever seen after a step ends the text, even if it is rewritten later. The masks before
        it are then unmasked, those of other blocks as well, and the row is over; what is behind it is left alone.
        `block`: a row is over when a block is full and ends in end-of-text (LLaDA's evaluation, ProSeCo)
    cfg_scale: classifier-free guidance, logits u + (scale + 1) (c - u), where u is said behind a prefix that is all
        masks. 0 is none; otherwise each step costs two forward calls
    max_forwards: forward calls a row may use, checked once a step; the last fills every mask with its argmax
    """

    length: int
    tokens_per_step: int | None = None
    steps: int | None = None
    blocks: int = 1
    shift: float = 1.0
    unmask: Unmask | None = None
    score: Score = "probability"
    reviser: Reviser | None = None
    post_steps: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    eos_last: bool = False
    early_stop: bool | Literal["block"] = False
    cfg_scale: float = 0.0
    max_forwards: int | None = None

    def __post_init__(self) -> None:
        reviser = self.reviser or Reviser()
        if self.post_steps < 0 or (self.post_steps and self.reviser is None):
            raise UserError(f"post_steps must be at least 0, and 0 without a reviser, got {self.post_steps}")
        if self.post_steps and type(reviser).overwrite is Reviser.overwrite:
            raise UserError(f"post_steps only rewrite, which {type(reviser).__name__} never does: leave them 0")
        for name in ("temperature", "cfg_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1 or (self.top_p < 1 and self.temperature == 0):
            raise UserError(f"top_p must be above 0 and at most 1, and 1 at temperature 0, got {self.top_p}")
        if self.max_forwards is not None and self.max_forwards < self.step_forwards:
            raise UserError(f"max_forwards must be at least {self.step_forwards}, got {self.max_forwards}")
        self._check_score()
        schedule = self.schedule  # wrong numbers fail here, not at the first batch
        idle = self.steps is not None and self.steps > self.length  # a step unmasks a token, unless by chance
        if idle and (self.unmask or TopK()).scores and not reviser.uses_all_steps:
            raise UserError(f"{self.steps} steps are more than the {self.length} tokens of the response")
        counted = type(reviser).count is Reviser.count and not reviser.selects_positions
        if self.shift != 1 and not (counted and (self.unmask or TopK()).scheduled):
            raise UserError(f"shift={self.shift} is for samplers that unmask a scheduled number of the surest masks")
        reviser.check(schedule)

    def _check_score(self) -> None:
        """Refuse a score that is unknown, or that the policy cannot work with, or would ignore."""
        policy, known = self.unmask or TopK(), TopK.scores
        if self.score not in known:
            raise UserError(f"score must be one of {known}, got {self.score!r}")
        if policy.scores and self.score not in policy.scores:
            raise UserError(f"{type(policy).__name__} needs a score of {policy.scores}, got {self.score!r}")
        if not policy.scores and (self.eos_last or self.score != "probability"):
            given = f"eos_last={self.eos_last} score={self.score!r}"
            raise UserError(f"{type(policy).__name__} unmasks by chance, so leave eos_last and score, got {given}")
        selects = self.reviser is not None and self.reviser.selects_positions
        if selects and (policy, self.score, self.eos_last) != (TopK(), "probability", False):
            what = f"{type(self.reviser).__name__} chooses what is unmasked"
            raise UserError(f"{what}, so leave unmask, score and eos_last, got {policy} {self.score!r} {self.eos_last}")

    @property
    def schedule(self) -> Schedule:
        tokens = 1 if self.tokens_per_step is None and self.steps is None else self.tokens_per_step
        return Schedule(
            length=self.length, tokens_per_step=tokens, steps=self.steps, blocks=self.blocks, shift=self.shift
        )

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
        tokens = self._response_length(prefix, special, keys, start)
        predict = Predictor(backbone, prefix, special, cfg_scale=self.cfg_scale, suffix=suffix)
        noise = {draw: Noise(keys, seed=seed, draw=draw) for draw in DRAWS}
        run = _Run(self, tokens, predict, noise)
        traces: list[list[TraceStep]] | None = [[] for _ in keys] if trace else None
        while run.active.any():
            run.step(traces)
        ids = end_text(run.text(), special)
        return Sampled(ids, run.predict.forwards, run.edits, run.remasks, time.perf_counter() - began, traces)

    def _response_length(self, prefix: Prefix, special: SpecialIds, keys: list[str], start: Tensor | None) -> Tensor:
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
    """What a step did, all (B, L): tokens after it, where it unmasked, rewrote, hid again, and how surely."""

    tokens: Tensor
    unmasked: Tensor
    rewritten: Tensor
    remasked: Tensor
    confidence: Tensor


class _Run:
    """One call of a sampler: the state of its rows."""

    def __init__(self, sampler: Sampler, tokens: Tensor, predict: Predictor, noise: dict[str, Noise]) -> None:
        self.sampler, self.predict, self.noise = sampler, predict, noise
        self.mask_id = predict.special.mask
        self.unmask, self.reviser = sampler.unmask or TopK(), sampler.reviser or Reviser()
        self.tokens = tokens
        self.progress = Progress(sampler.schedule, tokens, self.mask_id, uses_all_steps=self.reviser.uses_all_steps)
        self.settled = SeenStates(tokens, passes=sampler.post_steps)
        self.steps, self.passes, self.edits, self.remasks = (tokens.new_zeros(len(tokens)) for _ in range(4))
        self.sure = torch.full(tokens.shape, torch.inf, dtype=torch.float64, device=tokens.device)
        self.hidden = torch.zeros_like(tokens)
        self.active = (tokens == self.mask_id).any(1) | (sampler.post_steps > 0)

    def step(self, traces: list[list[TraceStep]] | None) -> None:
        """One pass of the loop, over all rows that are not done."""
        before, active, last, reviser = self.tokens, self.active, self._is_last_forward(), self.reviser
        wanted, visible = self.progress.wanted(before), before != self.mask_id
        post = active & ~self.progress.busy(before)  # only to be revised
        self.progress.enter(before)
        state = self._state(visible, post)
        count = reviser.count(state, self.progress.take(before)).masked_fill(last, self.sampler.length + 1)
        chance = reviser.chance(state).masked_fill(last | (state.left <= 1), 1.0)
        eligible = wanted & (self.progress.reach | last[:, None]) & active[:, None]
        editable = reviser.editable(state) & visible & active[:, None]
        hides = ~(post | last | (self.progress.steps_left == 0))[:, None]

        read = reviser.reads(state) & active[:, None]
        asked = self.predict.next(before, eligible | read | editable if reviser.needs_logits else eligible | read)
        prediction = reviser.refine(state, asked, self.predict)
        proposal, confidence = self._propose(prediction, eligible, drawn=eligible & ~last[:, None])
        score = self._score(prediction, eligible, proposal, confidence)
        unmasked = self.unmask.select(score, eligible, count, chance, self.noise["unmask"])
        if reviser.selects_positions:
            unmasked = eligible
        written = reviser.overwrite(state, prediction)
        rewritten = editable & (written != before)
        state = replace(state, sure=torch.where(unmasked, confidence, self.sure))
        hidden = hides & reviser.remask(state, prediction)
        remasked = hidden & editable
        if reviser.can_veto:
            unmasked = unmasked & ~hidden

        tokens = torch.where(unmasked, proposal, torch.where(rewritten, written, before))
        tokens = tokens.masked_fill(remasked, self.mask_id)
        step = _Step(tokens, unmasked, rewritten, remasked, confidence)
        if traces is not None:
            self._record(traces, step)
        self._finish(step, post, last)
        self.predict.keep(asked, self.active & (self.tokens == before).all(1))

    def text(self) -> Tensor:
        """(B, L) the tokens; where an early stop has ended a row an eot, or end-of-text from there on."""
        special, place, stop = self.predict.special, self.progress.place, self.progress.stop[:, None]
        if self.sampler.early_stop == "block":
            return self.tokens.masked_fill(place >= stop, special.eos)
        return self.tokens.masked_fill(place == stop, special.eot)

    def _state(self, visible: Tensor, post: Tensor) -> State:
        """The step as its reviser sees it."""
        progress = self.progress
        left, made = progress.steps_left.masked_fill(post, 0), progress.made.masked_fill(post, -1)
        return State(
            tokens=self.tokens, visible=visible, block=progress.in_block | post[:, None], step=self.steps,
            steps=progress.steps, left=left, made=made, spare=self._spare(), sure=self.sure, hidden=self.hidden,
            noise=self.noise["reviser"],
        )  # fmt: skip

    def _spare(self) -> Tensor:
        """(B,) further passes that the budget of a row allows, besides that of the step and the last one."""
        limit, cost = self.sampler.max_forwards, self.sampler.step_forwards
        if limit is None:
            return torch.full_like(self.steps, torch.iinfo(torch.int64).max)
        return (limit - self.predict.forwards) // cost - 2

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
            if self.sampler.top_p < 1:
                keep_nucleus(logits, temperature=temperature, top_p=self.sampler.top_p)
            proposal[drawn] = draw(logits, temperature=temperature, noise=self.noise["sampler"], counts=counts)
        return proposal, prediction.confidence(eligible, proposal)

    def _score(self, prediction: Prediction, eligible: Tensor, proposal: Tensor, confidence: Tensor) -> Tensor:
        """(B, L) float64 by which places are chosen: with `eos_last` below all others where the text would end."""
        name, special = self.sampler.score, self.predict.special
        if name == "random":
            score = self.noise["score"].uniform(eligible).double()
        else:
            score = confidence if name == "probability" else prediction.confidence(eligible, proposal, name)
        if not self.sampler.eos_last:
            return score
        span = 1 + math.log(special.vocab_size) if name == "entropy" else 1.0  # more than scores may differ by
        return score - span * ((proposal == special.eos) | (proposal == special.eot)).double()

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
        self.sure = torch.where(step.unmasked, step.confidence, self.sure).masked_fill(step.remasked, torch.inf)
        self.hidden = self.hidden + step.remasked
        self.passes += post
        seen = self.settled.update(self.tokens, self.passes) & post & (not self.reviser.random)
        over = seen | (self.passes >= self.sampler.post_steps)
        self.active = self.active & ~last & (self.progress.busy(self.tokens) | ~over)

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


def _true(row: list[bool]) -> list[int]:
    """The places of the true values."""
    return [place for place, value in enumerate(row) if value]


def end_text(tokens: Tensor, special: SpecialIds) -> Tensor:
    """`tokens` (B, L) with end-of-text everywhere behind the first eot of a row."""
    eot = (tokens == special.eot).long()
    return tokens.masked_fill(eot.cumsum(1) - eot > 0, special.eos)


class SeenStates:
    """Remembers the full responses of each row, to tell that one has come back: a fixed point or a cycle.

    Greedy revision may swing between two texts for ever; from a state seen before it can only repeat itself.
    """

    def __init__(self, tokens: Tensor, *, passes: int) -> None:
        self.states = tokens.new_full((len(tokens), passes + 1, tokens.shape[1]), -1)
        self.states[:, 0] = tokens

    def update(self, tokens: Tensor, passes: Tensor) -> Tensor:
        """(B,) bool: whether `tokens` (B, L) were seen before; notes them as the state after `passes`."""
        known = (self.states == tokens[:, None]).all(-1).any(1)
        self.states[torch.arange(len(tokens), device=tokens.device), passes] = tokens
        return known
