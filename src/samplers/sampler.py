"""From masks, or from a given text, to a response: predict -> refine -> unmask -> overwrite -> remask.

    sampler = Sampler(length=64, tokens_per_step=4, reviser=OverwriteAll(), post_steps=4)
    prefix = backbone.encode_prefix(inputs)
    sampled = sampler(backbone, prefix, special=codec.special, keys=["a", "b"], seed=0)
    codec.decode(sampled.ids[0].tolist())

One step, for all rows that are not done (`_Run.step`):

    predict     one forward call: logits of the masks in reach and of the visible tokens that the step may change
    refine      the reviser may make further calls on its own draft, and returns the prediction that the rest uses
    unmask      propose a token for each mask; the policy chooses, by confidence or by chance, which masks become it
    overwrite   the reviser gives new ids to visible tokens (token edits)
    remask      the reviser turns visible tokens into masks again

B rows, L response positions, N positions with logits, V vocabulary. Each row keeps its own block, step, end and noise,
so its result does not depend on the other rows. Rows that are done leave the batch of the backbone.

The end of the text is the first eot of the finished response; all tokens behind it become end-of-text. Until then
these positions are ordinary ones, so that a reviser may still move the end; `early_stop` fixes it sooner.

The backbone gets no time, so a row that a step leaves unchanged would get the same logits: its next step costs no call.
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

DRAWS = ("sampler", "unmask", "score", "reviser")  # noise for tokens, policies, the random score, revisers
Score = Literal["probability", "margin", "entropy", "random"]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Writes responses of `length` tokens with a backbone.

    tokens_per_step or steps: how fast masks are unmasked; give one of the two, neither means one token a step
    blocks: the response is written in this many equal parts, left to right, which share `steps` equally
    shift: how unevenly a block's steps share its masks, see `Schedule`
    unmask: policy that chooses which masks to unmask (default `TopK()`)
    score: what it ranks masks by: `probability` of the proposal, `margin` between the two best, (negative) `entropy`,
        all of the logits before temperature, or `random`
    reviser: what happens to visible tokens (default nothing)
    post_steps: passes that only revise, once no mask is left; fewer if the text equals one that the row had before
    temperature: 0 takes the argmax, otherwise unmasked tokens are drawn from softmax(logits / temperature)
    top_p: draw from the smallest set of tokens that has this probability; 1 is all tokens
    eos_last: unmask proposals of eot and end-of-text after all others. They are the most confident proposals while all
        tokens are masks, and unmasked first they make every text as short as possible
    early_stop: the earliest eot ever seen after a step ends the text, even if it is rewritten later. The masks before
        it are then unmasked, in other blocks too, and the row is done; the positions behind it are left as they are.
        `block`: a row is done when a block is full and ends in end-of-text (LLaDA's evaluation, ProSeCo)
    cfg_scale: classifier-free guidance, logits u + (scale + 1) (c - u), where u are the logits behind a prefix that is
        all masks. 0 is none; otherwise each step costs two forward calls
    max_forwards: forward calls that a row may use, checked once a step; the last one fills every mask with its argmax
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
        if not isinstance(reviser, Reviser):
            raise UserError(f"reviser: {type(reviser).__name__} must be a subclass of src.samplers.reviser.Reviser")
        if self.post_steps < 0 or (self.post_steps and self.reviser is None):
            raise UserError(f"post_steps must be at least 0, and 0 without a reviser, got {self.post_steps}")
        if self.post_steps and type(reviser).overwrite is Reviser.overwrite:
            raise UserError(f"post_steps only rewrite, which {type(reviser).__name__} never does: set post_steps=0")
        for name in ("temperature", "cfg_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1 or (self.top_p < 1 and self.temperature == 0):
            raise UserError(f"top_p must be above 0 and at most 1, and 1 at temperature 0, got {self.top_p}")
        if self.max_forwards is not None and self.max_forwards < self.step_forwards:
            raise UserError(f"max_forwards must be at least {self.step_forwards}, got {self.max_forwards}")
        self._check_score()
        schedule = self.schedule  # raises here, not at the first batch
        # NOTE: each step unmasks a token at least, unless the policy draws or the reviser remasks.
        too_many = self.steps is not None and self.steps > self.length
        if too_many and (self.unmask or TopK()).scores and not reviser.uses_all_steps:
            raise UserError(f"{self.steps} steps are more than the {self.length} tokens of the response")
        scheduled = type(reviser).count is Reviser.count and not reviser.selects_positions
        if self.shift != 1 and not (scheduled and (self.unmask or TopK()).scheduled):
            raise UserError(f"shift={self.shift} is for samplers that unmask a scheduled number of masks")
        reviser.check(schedule)

    def _check_score(self) -> None:
        """Raises UserError for a score that is unknown, or that the policy or the reviser would not use."""
        policy = self.unmask or TopK()
        if self.score not in TopK.scores:
            raise UserError(f"score must be one of {TopK.scores}, got {self.score!r}")
        if policy.scores and self.score not in policy.scores:
            raise UserError(f"{type(policy).__name__} needs a score of {policy.scores}, got {self.score!r}")
        if not policy.scores and (self.eos_last or self.score != "probability"):
            raise UserError(
                f"{type(policy).__name__} unmasks by chance, so remove eos_last and score, "
                f"got eos_last={self.eos_last} score={self.score!r}"
            )
        selects = self.reviser is not None and self.reviser.selects_positions
        if selects and (policy, self.score, self.eos_last) != (TopK(), "probability", False):
            raise UserError(
                f"{type(self.reviser).__name__} chooses what to unmask, so remove unmask, score and eos_last, "
                f"got unmask={policy} score={self.score!r} eos_last={self.eos_last}"
            )

    @property
    def schedule(self) -> Schedule:
        tokens = 1 if self.tokens_per_step is None and self.steps is None else self.tokens_per_step
        return Schedule(
            length=self.length, tokens_per_step=tokens, steps=self.steps, blocks=self.blocks, shift=self.shift
        )

    @property
    def step_forwards(self) -> int:
        """Forward calls of a pass: two with guidance."""
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

        start: (B, L) ids to begin with, filled with end-of-text; rows without masks only get the post steps
        suffix: (S,) ids behind every response, which the model attends to; not part of the result
        trace: record every step of every row in `Sampled.traces`

        Raises ValueError for keys or a start of another shape than the prefix and the response length demand.
        """
        started = time.perf_counter()
        tokens = self._initial_tokens(prefix, special, keys, start)
        predict = Predictor(backbone, prefix, special, cfg_scale=self.cfg_scale, suffix=suffix)
        noise = {name: Noise(keys, seed=seed, draw=name) for name in DRAWS}
        run = _Run(self, tokens, predict, noise)
        traces: list[list[TraceStep]] | None = [[] for _ in keys] if trace else None
        while run.active.any():
            run.step(traces)
        ids = end_text(run.text(), special)
        return Sampled(ids, run.predict.forwards, run.edits, run.remasks, time.perf_counter() - started, traces)

    def _initial_tokens(self, prefix: Prefix, special: SpecialIds, keys: list[str], start: Tensor | None) -> Tensor:
        """(B, L) int64: a copy of `start`, or all masks."""
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
    """What a step did, all (B, L): tokens after it; where it unmasked, rewrote, remasked; confidence of proposals."""

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
        self.seen_states = SeenStates(tokens, passes=sampler.post_steps)
        self.steps, self.passes, self.edits, self.remasks = (tokens.new_zeros(len(tokens)) for _ in range(4))
        self.confidence = torch.full(tokens.shape, torch.inf, dtype=torch.float64, device=tokens.device)
        self.num_remasks = torch.zeros_like(tokens)
        self.active = (tokens == self.mask_id).any(1) | (sampler.post_steps > 0)

    def step(self, traces: list[list[TraceStep]] | None) -> None:
        """One step of all rows that are not done: predict -> refine -> unmask -> overwrite -> remask."""
        before, active, last, reviser = self.tokens, self.active, self._is_last_forward(), self.reviser
        pending, visible = self.progress.pending(before), before != self.mask_id
        post = active & ~self.progress.unfinished(before)  # (B,) rows that are only revised
        self.progress.enter(before)
        state = self._state(visible, post)
        scheduled = self.progress.take(before)  # NOTE: takes a step off `progress.steps_left`; `state` has it before
        # NOTE: a count of length + 1 marks the last forward call of a budget, which unmasks everything.
        count = reviser.count(state, scheduled).masked_fill(last, self.sampler.length + 1)
        chance = reviser.chance(state).masked_fill(last | (state.steps_left <= 1), 1.0)
        eligible = pending & (self.progress.reach | last[:, None]) & active[:, None]
        editable = reviser.editable(state) & visible & active[:, None]
        may_remask = ~(post | last | (self.progress.steps_left == 0))[:, None]

        # 1. predict: one forward call, or none for rows that the previous step left unchanged
        where = eligible | (reviser.reads(state) & active[:, None])
        first = self.predict.reuse(before, where | editable if reviser.needs_logits else where)
        # 2. refine: the reviser may make further forward calls
        prediction = reviser.refine(state, first, self.predict)
        # 3. unmask: propose a token for each eligible mask, and choose which masks become it
        proposal, confidence = self._propose(prediction, eligible, drawn=eligible & ~last[:, None])
        score = self._score(prediction, eligible, proposal, confidence)
        unmasked = self.unmask.select(score, eligible, count, chance, self.noise["unmask"])
        if reviser.selects_positions:
            unmasked = eligible
        # 4. overwrite: new ids for visible tokens
        new_ids = reviser.overwrite(state, prediction)
        if new_ids.shape != before.shape or new_ids.dtype != before.dtype:
            form = f"{tuple(new_ids.shape)} {new_ids.dtype}"
            raise ValueError(f"{type(reviser).__name__}.overwrite returns {form}, not {tuple(before.shape)} int64 ids")
        rewritten = editable & (new_ids != before)
        if (rewritten & (new_ids == self.mask_id)).any():
            raise ValueError(f"{type(reviser).__name__}.overwrite writes the mask: use `remask`")
        # 5. remask: visible tokens become masks again; with `can_veto` it may also cancel unmasks of 3.
        state = replace(state, confidence=torch.where(unmasked, confidence, self.confidence))
        to_mask = may_remask & reviser.remask(state, prediction)
        remasked = to_mask & editable
        if reviser.can_veto:
            unmasked = unmasked & ~to_mask

        tokens = torch.where(unmasked, proposal, torch.where(rewritten, new_ids, before))
        tokens = tokens.masked_fill(remasked, self.mask_id)
        step = _Step(tokens, unmasked, rewritten, remasked, confidence)
        if traces is not None:
            self._record(traces, step)
        self._finish(step, post, last)
        self.predict.keep(first, self.active & (self.tokens == before).all(1))

    def text(self) -> Tensor:
        """(B, L) the tokens, with the end of each row that stopped early: eot there, or end-of-text from there on."""
        special, place, stop = self.predict.special, self.progress.place, self.progress.stop[:, None]
        if self.sampler.early_stop == "block":
            return self.tokens.masked_fill(place >= stop, special.eos)
        return self.tokens.masked_fill(place == stop, special.eot)

    def _state(self, visible: Tensor, post: Tensor) -> State:
        """The step as its reviser sees it."""
        progress = self.progress
        return State(
            tokens=self.tokens,
            visible=visible,
            block=progress.in_block | post[:, None],
            step=self.steps,
            steps=progress.steps,
            steps_left=progress.steps_left.masked_fill(post, 0),
            steps_done=progress.steps_done.masked_fill(post, -1),
            spare_passes=self._spare_passes(),
            confidence=self.confidence,
            num_remasks=self.num_remasks,
            noise=self.noise["reviser"],
        )

    def _spare_passes(self) -> Tensor:
        """(B,) further passes that a row's budget allows, after those of this step and of the last one."""
        limit, cost = self.sampler.max_forwards, self.sampler.step_forwards
        if limit is None:
            return torch.full_like(self.steps, torch.iinfo(torch.int64).max)
        return (limit - self.predict.forwards) // cost - 2

    def _is_last_forward(self) -> Tensor:
        """(B,) bool: whether a row's budget allows this step but none after it."""
        limit = self.sampler.max_forwards
        if limit is None:
            return torch.zeros_like(self.active)
        return self.predict.forwards + 2 * self.sampler.step_forwards > limit

    def _propose(self, prediction: Prediction, eligible: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Token and confidence, both (B, L), at eligible positions: sampled where `drawn`, else the argmax."""
        proposal, temperature = prediction.best.clone(), self.sampler.temperature
        if temperature > 0:
            logits = prediction.at(drawn)[:, : self.predict.special.vocab_size]
            logits[:, self.mask_id] = -torch.inf
            if self.sampler.top_p < 1:
                keep_nucleus(logits, temperature=temperature, top_p=self.sampler.top_p)
            proposal[drawn] = draw(logits, drawn, temperature=temperature, noise=self.noise["sampler"])
        return proposal, prediction.confidence(eligible, proposal)

    def _score(self, prediction: Prediction, eligible: Tensor, proposal: Tensor, confidence: Tensor) -> Tensor:
        """(B, L) float64 score of each proposal; `eos_last` puts eot and end-of-text below all others."""
        name, special = self.sampler.score, self.predict.special
        if name == "random":
            score = self.noise["score"].uniform(eligible).double()
        else:
            score = confidence if name == "probability" else prediction.confidence(eligible, proposal, name)
        if not self.sampler.eos_last:
            return score
        span = 1 + math.log(special.vocab_size) if name == "entropy" else 1.0  # no two scores differ by more
        return score - span * ((proposal == special.eos) | (proposal == special.eot)).double()

    def _finish(self, step: _Step, post: Tensor, last: Tensor) -> None:
        """Update the counts. A row is done when nothing is pending and it is revised, or when its budget is spent."""
        self.tokens = step.tokens
        if self.sampler.early_stop == "block":
            self.progress.stop_behind(self.tokens, self.predict.special.eos)
        elif self.sampler.early_stop:
            self.progress.stop_at(self.tokens, self.predict.special.eot)
        self.steps = self.steps + self.active
        self.edits += step.rewritten.sum(1)
        self.remasks += step.remasked.sum(1)
        confidence = torch.where(step.unmasked, step.confidence, self.confidence)
        self.confidence = confidence.masked_fill(step.remasked, torch.inf)
        self.num_remasks = self.num_remasks + step.remasked
        self.passes += post
        repeated = self.seen_states.update(self.tokens, self.passes) & post & (not self.reviser.random)
        revised = repeated | (self.passes >= self.sampler.post_steps)
        self.active = self.active & ~last & (self.progress.unfinished(self.tokens) | ~revised)

    def _record(self, traces: list[list[TraceStep]], step: _Step) -> None:
        """Append the step to the trace of each active row."""
        host = {name: value.tolist() for name, value in vars(step).items()}
        before, forwards = self.tokens.tolist(), self.predict.forwards.tolist()
        for row in self.active.nonzero()[:, 0].tolist():
            tokens, confidence = host["tokens"][row], host["confidence"][row]
            unmasked, rewritten, remasked = (
                [i for i, true in enumerate(host[name][row]) if true] for name in ("unmasked", "rewritten", "remasked")
            )
            traces[row].append(
                TraceStep(
                    tokens=tokens,
                    unmasked=unmasked,
                    # NOTE: a token can be rewritten and remasked in one step; its new id is the mask then.
                    rewritten=[(i, before[row][i], tokens[i]) for i in rewritten],
                    remasked=remasked,
                    confidence=[confidence[i] for i in unmasked],
                    forwards=forwards[row],
                )
            )


def end_text(tokens: Tensor, special: SpecialIds) -> Tensor:
    """`tokens` (B, L) with end-of-text everywhere behind the first eot of a row."""
    eot = (tokens == special.eot).long()
    return tokens.masked_fill(eot.cumsum(1) - eot > 0, special.eos)


class SeenStates:
    """Remembers all texts of each row's post steps, to detect a fixed point or a cycle.

    Greedy revision may alternate between two texts forever; from a text seen before it can only repeat itself.
    """

    def __init__(self, tokens: Tensor, *, passes: int) -> None:
        self.states = tokens.new_full((len(tokens), passes + 1, tokens.shape[1]), -1)
        self.states[:, 0] = tokens

    def update(self, tokens: Tensor, passes: Tensor) -> Tensor:
        """(B,) bool: whether `tokens` (B, L) were seen before; stores them as the state after `passes` (B,)."""
        seen = (self.states == tokens[:, None]).all(-1).any(1)
        self.states[torch.arange(len(tokens), device=tokens.device), passes] = tokens
        return seen
