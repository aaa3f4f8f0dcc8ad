"""What all samplers share: their speed, their call, the end of a text, and the record of a step."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from src.diffusion.noise import Noise
from src.io.errors import UserError
from src.samplers.predictor import Predictor
from src.samplers.schedule import Schedule
from src.types import Backbone, Prefix, Sampled, SpecialIds, TraceStep

Step = dict[str, Tensor]  # what a step did to all rows: the input of `traces_of`
DRAWS = ("sampler", "unmask", "score", "reviser")  # noise for tokens, policies, the random score, revisers


class AnySampler:
    """Base class of what a file in conf/sampler describes: a dataclass with these settings that defines `write`.

    tokens_per_step or steps: give one of the two; neither means one token a step
    cfg_scale: classifier-free guidance, logits u + (scale + 1) (c - u), where u are the logits behind a prefix that is
        all masks. 0 is none; otherwise each step costs two forward calls
    compile: run the steps of `Sampler` under torch.compile; verbs that only sample compile the model's blocks as well
    """

    length: int
    tokens_per_step: int | None
    steps: int | None
    temperature: float
    cfg_scale: float
    post_steps: int = 0
    early_stop: bool | Literal["eot", "block"] = False
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("temperature", "cfg_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.early_stop not in (False, True, "eot", "block"):
            raise UserError(f"early_stop must be true, false, 'eot' or 'block', got {self.early_stop!r}")
        _ = self.schedule  # raises here, not at the first batch

    @property
    def schedule(self) -> Schedule:
        tokens = 1 if self.tokens_per_step is None and self.steps is None else self.tokens_per_step
        return Schedule(length=self.length, tokens_per_step=tokens, steps=self.steps)

    def with_steps(self, *, tokens_per_step: int | None = None, steps: int | None = None) -> Self:
        """The same sampler at another speed."""
        return type(self)(**{**vars(self), "tokens_per_step": tokens_per_step, "steps": steps})

    def settled(self, tokens: Sequence[int], mask: int) -> int:
        """How many leading tokens of an unfinished response no later step can change, for those who read along."""
        return 0

    @torch.no_grad()
    def __call__(self, backbone: Backbone, prefix: Prefix, *, trace: bool = False, **options: Any) -> Sampled:
        """Responses for the rows of `prefix`. options: the other arguments of `stepwise`

        trace: record every step of every row in `Sampled.traces`
        """
        run, steps = self.stepwise(backbone, prefix, trace=trace, **options), list[Step]()
        while True:
            try:
                step = next(run)
            except StopIteration as end:
                return replace(end.value, traces=traces_of(steps, len(end.value.ids)) if trace else None)
            if trace:
                steps.append(step)

    @torch.no_grad()
    def stepwise(
        self,
        backbone: Backbone,
        prefix: Prefix,
        *,
        special: SpecialIds,
        keys: list[str],
        seed: int | Sequence[int],
        start: Tensor | None = None,
        suffix: Tensor | None = None,
        trace: bool = True,
    ) -> Generator[Step, None, Sampled]:
        """Responses one step at a time: yields what each step did, and returns the responses. Closing it stops.

        keys: one for each row; seed: of all rows, or one for each
        start: (B, L) ids to begin with, filled with end-of-text; rows without masks only get the post steps
        suffix: (S,) ids behind every response, which the model attends to; not part of the result
        trace: with the confidence of token edits, which takes a little time

        Raises ValueError for keys or a start of another shape than the prefix and the response length demand.
        """
        started = time.perf_counter()
        if len(prefix.embeds) != len(keys):
            raise ValueError(f"{len(keys)} keys for a prefix of {len(prefix.embeds)} rows")
        predict = Predictor(backbone, prefix, special, length=self.length, cfg_scale=self.cfg_scale, suffix=suffix)
        noise = {name: Noise(keys, seed=seed, draw=name) for name in DRAWS}
        try:
            tokens, edits, remasks, unmasked_at = yield from self.write(predict, noise, start, trace=trace)
        finally:
            predict.release()
        # The first eot ends the text; behind it is end-of-text.
        eot = (tokens == special.eot).long()
        ids = tokens.masked_fill(eot.cumsum(1) - eot > 0, special.eos)
        seconds = time.perf_counter() - started
        return Sampled(ids, predict.forwards, edits, remasks, unmasked_at, seconds)

    def write(
        self, predict: Predictor, noise: dict[str, Noise], start: Tensor | None, *, trace: bool
    ) -> Generator[Step, None, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yields what each step did, for `traces_of`, and returns the tokens (B, L), how many were rewritten (B,) and
        remasked (B,), and `Sampled.unmasked_at` (B, L). noise: one of each of `DRAWS`; trace: as in `stepwise`
        """
        raise NotImplementedError


def traces_of(steps: list[Step], num_rows: int) -> list[list[TraceStep]]:
    """The trace of each row, from tensors of each step: its `rows` (B,) bool, `forwards` (B,), tokens `before` and
    `after` it, and the other fields of `TraceStep` as (B, L) masks and confidences."""
    traces: list[list[TraceStep]] = [[] for _ in range(num_rows)]
    host = {name: torch.stack([step[name] for step in steps]).tolist() for name in steps[0]} if steps else {}
    for number in range(len(steps)):
        step = {name: values[number] for name, values in host.items()}
        for row in (row for row, made in enumerate(step["rows"]) if made):
            old, new = step["before"][row], step["after"][row]
            places = {
                name: [i for i, true in enumerate(step[name][row]) if true]
                for name in ("unmasked", "rewritten", "remasked")
            }
            traces[row].append(
                TraceStep(
                    tokens=new,
                    unmasked=places["unmasked"],
                    # NOTE: a token can be rewritten and remasked in one step; its new id is the mask then.
                    rewritten=[(i, old[i], new[i]) for i in places["rewritten"]],
                    remasked=places["remasked"],
                    confidence=[step["confidence"][row][i] for i in places["unmasked"]],
                    forwards=step["forwards"][row],
                    rewrite_confidence=[step["confidence"][row][i] for i in places["rewritten"]],
                )
            )
    return traces
