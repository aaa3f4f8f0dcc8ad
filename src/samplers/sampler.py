"""From masks, or from a given text, to a response: predict -> refine -> unmask -> overwrite -> remask.

    sampler = Sampler(length=64, tokens_per_step=4, reviser=OverwriteAll(), post_steps=4)
    prefix = backbone.encode_prefix(inputs)
    sampled = sampler(backbone, prefix, special=codec.special, keys=["a", "b"], seed=0)
    codec.decode(sampled.ids[0].tolist())

B rows, L response positions, V vocabulary. Each row keeps its own block, step, end and noise, so its result does not
depend on the other rows. A step is a function of fixed shapes: it never waits for the device. Between two steps the
host asks which rows are done, and these leave the batch of the backbone.

The end of the text is the first eot of the finished response; all tokens behind it become end-of-text. Until then
these positions are ordinary ones, so that a reviser may still move the end; `early_stop` fixes it sooner.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from src.diffusion.corruption import text_positions
from src.diffusion.noise import Noise
from src.io.errors import UserError
from src.samplers.base import AnySampler, Step
from src.samplers.predictor import Prediction, Predictor, read
from src.samplers.reviser import Reviser, State
from src.samplers.schedule import Progress, Schedule
from src.samplers.unmask import TopK, Unmask, draw
from src.types import SpecialIds


@dataclass(kw_only=True)
class Run:
    """What the steps of a batch change. tokens, confidence, num_remasks: (B, L) and step: (B,) as in `State`; edits,
    remasks: (B,) made so far; unmasked_at: (B, L) as in `Sampled`; wrote_mask: (B,) bool, whether a reviser wrote the
    mask as a token."""

    tokens: Tensor
    confidence: Tensor
    num_remasks: Tensor
    step: Tensor
    edits: Tensor
    remasks: Tensor
    unmasked_at: Tensor
    wrote_mask: Tensor


@dataclass
class Plan:
    """What a step may do. where: (B, L) bool, positions whose logits it reads; eligible: masks that it may unmask;
    editable: visible tokens that it may change; post: (B,) bool, rows that it only revises; last: whose budget ends."""

    state: State
    where: Tensor
    eligible: Tensor
    editable: Tensor
    post: Tensor
    last: Tensor
    num_drawn: int | None = None  # number of true positions of `drawn`, if the host has asked

    @property
    def drawn(self) -> Tensor:
        """(B, L) bool: masks whose token is drawn; rows whose budget ends take the argmax."""
        return self.eligible & ~self.last[:, None]


@dataclass(frozen=True, kw_only=True)
class Sampler(AnySampler):
    """Writes responses of `length` tokens with a backbone.

    tokens_per_step, steps, cfg_scale, compile: see `AnySampler`
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
    eos_behind_eot: a token is rewritten to end-of-text only behind an eot, so that no hole is torn into a text
    early_stop: when a row is done before all its steps are made
        true: as soon as every mask left in the block is behind the last word and its proposal is eot or end-of-text;
            all are unmasked then, and the row is done if the block ends in one of them
        `block`: once a block is full and ends in end-of-text (LLaDA's evaluation, ProSeCo)
        `eot`: the earliest eot ever seen after a step ends the text, even if it is rewritten later; only masks before
        it are unmasked still, in other blocks too (ReDiff's released code)
    max_forwards: forward calls that a row may use, checked once a step; the last one fills every mask with its argmax
    check_every: the host asks after this many steps which rows are done, and which need no call as their text is still
        the same. 1 saves forward calls, as all calls until then are made and counted; more saves waiting for the device
    """

    length: int
    tokens_per_step: int | None = None
    steps: int | None = None
    blocks: int = 1
    shift: float = 1.0
    unmask: Unmask | None = None
    score: Literal["probability", "margin", "entropy", "random"] = "probability"
    reviser: Reviser | None = None
    post_steps: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    eos_last: bool = False
    eos_behind_eot: bool = False
    early_stop: bool | Literal["eot", "block"] = False
    cfg_scale: float = 0.0
    max_forwards: int | None = None
    check_every: int = 1
    compile: bool = False

    def __post_init__(self) -> None:
        """Raises UserError for settings that do not fit together, or that would be ignored."""
        super().__post_init__()
        policy, reviser = self.unmask or TopK(), self.reviser or Reviser()
        kind, cost = type(reviser), 2 if self.cfg_scale else 1
        if self.post_steps < 0 or (self.post_steps and self.reviser is None):
            raise UserError(f"post_steps must be at least 0, and 0 without a reviser, got {self.post_steps}")
        if self.post_steps and kind.overwrite is Reviser.overwrite:
            raise UserError(f"post_steps only rewrite, which {kind.__name__} never does: set post_steps=0")
        if not 0 < self.top_p <= 1 or (self.top_p < 1 and self.temperature == 0):
            raise UserError(f"top_p must be above 0 and at most 1, and 1 at temperature 0, got {self.top_p}")
        self._check_budget(cost)
        if policy.scores and self.score not in policy.scores:
            raise UserError(f"{type(policy).__name__} needs a score of {policy.scores}, got {self.score!r}")
        if not policy.scores and (self.eos_last or self.score != "probability"):
            raise UserError(
                f"{type(policy).__name__} unmasks by chance, so remove eos_last and score, "
                f"got eos_last={self.eos_last} score={self.score!r}"
            )
        if reviser.selects_positions and (policy, self.score, self.eos_last) != (TopK(), "probability", False):
            raise UserError(
                f"{kind.__name__} chooses what to unmask, so remove unmask, score and eos_last, "
                f"got unmask={policy} score={self.score!r} eos_last={self.eos_last}"
            )
        # NOTE: each step unmasks a token at least, unless the policy draws or the reviser remasks.
        too_many = self.steps is not None and self.steps > self.length
        if too_many and policy.scores and not reviser.uses_all_steps:
            raise UserError(f"{self.steps} steps are more than the {self.length} tokens of the response")
        scheduled = kind.chance is Reviser.chance and not reviser.selects_positions
        if self.shift != 1 and not (scheduled and policy.scheduled):
            raise UserError(f"shift={self.shift} is for samplers that unmask a scheduled number of masks")
        reviser.check(self.schedule)

    def _check_budget(self, cost: int) -> None:
        if self.max_forwards is not None and self.max_forwards < cost:
            raise UserError(f"max_forwards must be at least {cost}, got {self.max_forwards}")
        if self.check_every < 1 or (self.check_every > 1 and self.max_forwards is not None):
            raise UserError(f"check_every must be at least 1, and 1 with max_forwards, got {self.check_every}")

    @property
    def schedule(self) -> Schedule:
        return replace(super().schedule, blocks=self.blocks, shift=self.shift)

    def settled(self, tokens: Sequence[int], mask: int) -> int:
        """All before the first mask if visible tokens stay; the blocks before its block if only a block is revised."""
        first = tokens.index(mask) if mask in tokens else self.length
        if self.reviser is None:
            return first
        waits = self.post_steps or self.reviser.uses_all_steps or not self.reviser.within_block
        return 0 if waits else first - first % self.schedule.block_length

    def write(
        self, predict: Predictor, noise: dict[str, Noise], start: Tensor | None, *, trace: bool
    ) -> Generator[Step, None, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Step until every row is done; the host only asks which rows are."""
        reviser, look, step = self.reviser or Reviser(), self._look, self._step
        if self.compile:
            look, step = torch.compile(look), torch.compile(step)
        tokens = self._first_tokens(predict, start)
        options = {"early_stop": self.early_stop, "post_steps": self.post_steps, "random": reviser.random}
        progress = Progress(self.schedule, tokens, predict.special, uses_all_steps=reviser.uses_all_steps, **options)
        zeros = tokens.new_zeros(3, len(tokens))
        run = Run(
            tokens=tokens,
            confidence=torch.full(tokens.shape, torch.inf, dtype=torch.float64, device=tokens.device),
            num_remasks=torch.zeros_like(tokens),
            step=zeros[0],
            edits=zeros[1],
            remasks=zeros[2],
            unmasked_at=torch.full_like(tokens, -1),
            wrote_mask=torch.zeros_like(progress.active),
        )
        scheduled, active = self.schedule.block_steps * self.blocks, []
        ends = (scheduled, scheduled + self.post_steps)  # where rows end that take all steps: no call is made in vain
        for number in itertools.count():
            plan = look(run, progress, predict, noise)
            if number % self.check_every == 0 or number in ends:
                asks = plan.where.any(1) & ~predict.known(run.tokens)
                active, called, wrote_mask, drawn = read(progress.active, asks, run.wrote_mask, plan.drawn.sum(1))
                plan.num_drawn = sum(drawn)
                if any(wrote_mask):
                    raise ValueError(f"{type(reviser).__name__}.overwrite writes the mask: use `remask`")
                if not any(active):
                    break
            else:
                called = active
            first = predict.first(run.tokens, plan.where, called)
            changes = step(run, plan, first, progress, predict, noise, trace=trace)
            yield {**changes, "forwards": predict.forwards}
        return progress.text(run.tokens), run.edits, run.remasks, run.unmasked_at

    def _look(self, run: Run, progress: Progress, predict: Predictor, noise: dict[str, Noise]) -> Plan:
        """Where each row stands, and what its next step may do. Changes nothing of rows that are done."""
        reviser = self.reviser or Reviser()
        tokens, active, visible = run.tokens, progress.active, ~progress.masked
        max_forwards = torch.iinfo(torch.int64).max if self.max_forwards is None else self.max_forwards
        post = active & ~progress.unfinished  # (B,) rows that are only revised
        spare_passes = (max_forwards - predict.forwards) // predict.cost - 2  # after this step and a last one
        last = spare_passes < 0  # (B,) rows whose budget allows this step and none after it
        state = State(
            tokens=tokens,
            visible=visible,
            block=progress.in_block | post[:, None],
            step=run.step,
            steps=progress.steps,
            steps_left=progress.steps_left.masked_fill(post, 0),
            steps_done=progress.steps_done.masked_fill(post, -1),
            spare_passes=spare_passes,
            confidence=run.confidence,
            num_remasks=run.num_remasks,
            noise=noise["reviser"],
        )
        eligible = progress.pending & (progress.reach | last[:, None]) & active[:, None]
        editable = reviser.editable(state) & visible & active[:, None]
        asks_more = type(reviser).reads is not Reviser.reads  # than what it may change
        where = eligible | (reviser.reads(state) & active[:, None] if asks_more else editable)
        return Plan(state, where, eligible, editable, post, last)

    def _step(
        self,
        run: Run,
        plan: Plan,
        first: Prediction,
        progress: Progress,
        predict: Predictor,
        noise: dict[str, Noise],
        *,
        trace: bool,
    ) -> Step:
        """One step of every row: predict (done) -> refine -> unmask -> overwrite -> remask. Returns what it did."""
        special, policy, reviser = predict.special, self.unmask or TopK(), self.reviser or Reviser()
        state, eligible, editable, last = plan.state, plan.eligible, plan.editable, plan.last
        before, active = run.tokens, progress.active
        is_final = state.steps_left <= 1  # (B,) it unmasks all masks of the block and remasks nothing
        # 1. refine: the reviser may make further forward calls
        prediction = reviser.refine(state, first, predict)
        # 2. unmask: propose a token for each eligible mask, and choose which masks become it
        proposal, probability, score = self._propose(prediction, plan, special, noise)
        chance = reviser.chance(state, progress.schedule.chance(state.steps, state.steps_left))
        count, chance = progress.count(chance), chance.masked_fill(is_final, 1.0)
        unmasked = policy.select(score, eligible, count, chance, noise["unmask"]) | (eligible & last[:, None])
        if reviser.selects_positions:
            unmasked = eligible
        ended = self._ended(before, proposal, eligible, special)
        unmasked = unmasked | (eligible & ended[:, None])
        # 3. overwrite: new ids for visible tokens
        new_ids = reviser.overwrite(state, prediction)
        rewritten = editable & (new_ids != before)
        if self.eos_behind_eot:
            rewritten &= (new_ids != special.eos) | ~text_positions(before, special.eot)
        run.wrote_mask = run.wrote_mask | (rewritten & (new_ids == special.mask)).any(1)
        # 4. remask: visible tokens become masks again; with `can_veto` it may also cancel unmasks of 2.
        state.confidence = confidence = torch.where(unmasked, probability, run.confidence)
        to_mask = reviser.remask(state, prediction)
        to_mask = to_mask & ~(is_final | last | ended)[:, None]
        remasked = to_mask & editable
        if reviser.can_veto:
            unmasked = unmasked & ~to_mask
        # 5. the new text, and which rows are done
        tokens = torch.where(unmasked, proposal, torch.where(rewritten, new_ids, before))
        tokens = tokens.masked_fill(remasked, special.mask)
        run.tokens, run.confidence = tokens, confidence.masked_fill(tokens == special.mask, torch.inf)
        run.unmasked_at = torch.where(unmasked, run.step[:, None], run.unmasked_at)
        run.num_remasks, run.step = run.num_remasks + remasked, run.step + active
        run.edits, run.remasks = run.edits + rewritten.sum(1), run.remasks + remasked.sum(1)
        progress.finish(tokens, post=plan.post, last=last)
        if trace:
            probability = torch.where(rewritten, prediction.confidence(rewritten, new_ids), probability)
        changes = {"unmasked": unmasked, "rewritten": rewritten, "remasked": remasked}
        return {"rows": active, "before": before, "after": tokens, **changes, "confidence": probability}

    def _ended(self, tokens: Tensor, proposal: Tensor, eligible: Tensor, special: SpecialIds) -> Tensor:
        """(B,) bool: rows that have only their end left to write, behind their last word; see `early_stop`."""
        if self.early_stop is not True:
            return torch.zeros_like(eligible[:, 0])
        is_end = lambda ids: (ids == special.eot) | (ids == special.eos)  # noqa: E731
        words = ~is_end(tokens) & (tokens != special.mask)
        behind = words.flip(1).cumsum(1).flip(1) == 0  # (B, L)
        return eligible.any(1) & ~(eligible & ~(is_end(proposal) & behind)).any(1)

    def _first_tokens(self, predict: Predictor, start: Tensor | None) -> Tensor:
        """(B, L) int64: a copy of `start`, or all masks."""
        shape, device = (len(predict.forwards), self.length), predict.forwards.device
        if start is None:
            return torch.full(shape, predict.special.mask, dtype=torch.int64, device=device)
        if tuple(start.shape) != shape:
            raise ValueError(f"start has shape {tuple(start.shape)}, the sampler needs {shape}")
        return start.to(device=device, dtype=torch.int64, copy=True)

    def _propose(
        self, prediction: Prediction, plan: Plan, special: SpecialIds, noise: dict[str, Noise]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Token, its probability and its score, all (B, L), at eligible positions; rows in `last` take the argmax."""
        proposal, eligible = prediction.best, plan.eligible
        if self.temperature > 0:
            flat, at = plan.drawn.flatten(), torch.arange(proposal.numel(), device=proposal.device)
            if plan.num_drawn is not None:  # noise for a vocabulary is dear
                at = torch.nonzero_static(flat, size=plan.num_drawn)[:, 0]
            options = {"temperature": self.temperature, "top_p": self.top_p, "noise": noise["sampler"]}
            ids = draw(prediction.logits.flatten(0, 1), at, at, plan.drawn, special=special, **options)
            ids = torch.where(flat[at], ids, proposal.flatten()[at])
            proposal = proposal.flatten().index_copy(0, at, ids).view_as(proposal)
        score = probability = prediction.confidence(eligible, proposal)
        if self.score == "random":
            score = noise["score"].uniform(eligible).double()
        elif self.score != "probability":
            score = prediction.confidence(eligible, proposal, self.score)
        if self.eos_last:  # eot and end-of-text score below all others
            span = 1 + math.log(special.vocab_size) if self.score == "entropy" else 1.0  # no two scores differ by more
            score = score - span * ((proposal == special.eos) | (proposal == special.eot)).double()
        return proposal, probability, score
