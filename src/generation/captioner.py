"""A model that captions images, from Python; what `generate`, `serve` and `demo` do with a model.

    captioner = Captioner.load("assets/base")
    captions = captioner.caption(["a.png", "b.png"], sampler="refine", tokens_per_step=4)
    captioner.revise("a.png", "A small red ring is in the upper left.").text
    for state in captioner.stream("a.png", tokens_per_step=4):
        state.text, state.tokens

    images, prompts, texts, seeds -> samples -> prefix of the backbone -> sampler, step by step -> captions

A response depends on its image, prompt, text and seed, not on the other responses of its batch.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from PIL import Image

from datamodules.collate import Collate
from datamodules.shards import Sample
from src.cli.config import load_part
from src.cli.instantiate import build
from src.generation.requests import read_image
from src.generation.writer import text_with_masks
from src.io.errors import UserError
from src.io.images import ImageProblem
from src.io.words import counted
from src.models.hf.folder import ModelFolder, check_vocabulary, from_pretrained
from src.models.llada_v import LLaDAV
from src.samplers.base import AnySampler, Step, traces_of
from src.text.tokenizer import Codec
from src.types import Sampled, TraceStep

PROMPT = "Describe the picture."  # the one that the embedded model was trained with
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A response to be written.

    image: a file, the bytes of one, or an image; None for a question to a text model
    text: a text to revise; None: write one from masks
    key: names the noise together with the seed; "": a hash of the pixels, or of the prompt if there is no image
    """

    image: Path | str | bytes | Image.Image | None
    prompt: str = PROMPT
    text: str | None = None
    seed: int = 0
    key: str = ""


@dataclass(frozen=True)
class Caption:
    """ids: of the text; edits: tokens that the sampler rewrote; trace: every step, if asked for"""

    text: str
    ids: list[int]
    forward_calls: int
    edits: int
    trace: list[TraceStep] | None = None


TokenState = Literal["mask", "new", "kept", "rewritten", "remasked"]


@dataclass(frozen=True)
class Token:
    """A token after a step. text: `_` for a mask; confidence: its probability when it was written, None for masks and
    for a given text; old: the token that the step rewrote."""

    text: str
    state: TokenState
    confidence: float | None
    old: str | None = None


@dataclass(frozen=True)
class State:
    """A response after a step, up to its end of turn.

    text: with _ for masks; caption: the result, in the last state only
    """

    text: str
    tokens: list[Token]
    forward_calls: int
    caption: Caption | None = None


class Captioner:
    """A backbone with its tokenizer. positions: that the model was made for, if known; longer rows are warned about"""

    def __init__(self, backbone: LLaDAV, codec: Codec, *, positions: int | None = None) -> None:
        self.backbone, self.codec, self.positions = backbone.eval(), codec, positions

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        prompt_format: str | Path | None = None,
        system: str | None = None,
        join: str | None = None,
        **options: Any,
    ) -> Self:
        """The model and tokenizer of a folder of any layout, or of a name on the hub.

        device: default a CUDA device if there is one; options: `dtype`, `attention`, `vision` of `from_pretrained`
        prompt_format, system, join: as in conf/generate.yaml, default those of the folder

        Raises UserError as `from_pretrained` and `Codec.load` do.
        """
        codec = Codec.load(path, prompt_format=prompt_format).with_format(system=system, join=join)
        folder = ModelFolder.open(path)
        check_vocabulary(folder, codec)
        return cls(from_pretrained(path, device=device or best_device(), **options), codec, positions=folder.positions)

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def sampler(self, name: str | AnySampler = "refine", *, revising: bool = False, **settings: Any) -> AnySampler:
        """See `choose_sampler`; the response length is the model's. A sampler keeps what `settings` does not name."""
        if not isinstance(name, AnySampler):
            return choose_sampler(name, response_length=self.backbone.response_length, revising=revising, **settings)
        speed = dict.fromkeys(("tokens_per_step", "steps")) if {"tokens_per_step", "steps"} & settings.keys() else {}
        return type(name)(**{**vars(name), **speed, **settings})

    def caption(
        self,
        images: Any,
        *,
        prompt: str = PROMPT,
        sampler: str | AnySampler = "refine",
        seed: int | Sequence[int] = 0,
        trace: bool = False,
        batch_size: int = 16,
        **settings: Any,
    ) -> list[Caption]:
        """A caption of each image.

        images: one of what `Request.image` takes, or a sequence of them; seed: of all, or one for each image
        sampler, settings: as in `sampler`, for example tokens_per_step=4, steps=16 or temperature=1.0
        """
        images = list(images) if isinstance(images, list | tuple) else [images]
        seeds = [seed] * len(images) if isinstance(seed, int) else seed
        requests = [Request(image=i, prompt=prompt, seed=s) for i, s in zip(images, seeds, strict=True)]
        return self.answer(requests, self.sampler(sampler, **settings), trace=trace, batch_size=batch_size)

    def revise(
        self,
        image: Any,
        text: str,
        *,
        prompt: str = PROMPT,
        sampler: str | AnySampler = "refine",
        seed: int = 0,
        trace: bool = False,
        **settings: Any,
    ) -> Caption:
        """A text with what the model rewrites in it: `post_steps` passes (default 1) of a sampler with a reviser."""
        request = Request(image=image, prompt=prompt, text=text, seed=seed)
        return self.answer([request], self.sampler(sampler, revising=True, **settings), trace=trace)[0]

    def stream(
        self,
        image: Any,
        *,
        prompt: str = PROMPT,
        text: str | None = None,
        sampler: str | AnySampler = "refine",
        seed: int = 0,
        **settings: Any,
    ) -> Iterator[State]:
        """The state after each step of a caption, or of the revision of `text`; the last one holds the `Caption`.

        Closing the iterator stops the sampler.
        """
        request = Request(image=image, prompt=prompt, text=text, seed=seed)
        for states in self.watch([request], self.sampler(sampler, revising=text is not None, **settings)):
            yield from (state for state in states if state)

    def answer(
        self, requests: Sequence[Request], sampler: AnySampler, *, trace: bool = False, batch_size: int = 16
    ) -> list[Caption]:
        """A caption for each request; those with a text are revised, in the same batches.

        Raises UserError for an image that cannot be read, or a text or prompt that does not fit.
        """
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        captions = []
        for start in range(0, len(requests), batch_size):
            arguments = self._arguments(requests[start : start + batch_size], sampler)
            captions += self.captions_of(self.sample(sampler=sampler, trace=trace, **arguments))
        return captions

    def watch(self, requests: Sequence[Request], sampler: AnySampler) -> Generator[list[State | None], None, None]:
        """One batch, step by step: the state of each request after a step, None if the step did not concern it.

        The last list has a state with a `Caption` for every request. Closing the generator stops the sampler.
        """
        steps = self.steps(sampler=sampler, **self._arguments(requests, sampler))
        confidence: list[dict[int, float]] = [{} for _ in requests]
        while True:
            try:
                rows = traces_of([next(steps)], len(requests))
            except StopIteration as end:
                captions = self.captions_of(end.value)
                yield [self._last(caption, seen) for caption, seen in zip(captions, confidence, strict=True)]
                return
            yield [self._state(row[0], seen) if row else None for row, seen in zip(rows, confidence, strict=True)]

    @torch.inference_mode()
    def sample(self, samples: Sequence[Sample], *, sampler: AnySampler, trace: bool = False, **options: Any) -> Sampled:
        """What the sampler writes for samples, whose records hold a prompt; options as in `steps`."""
        return sampler(**self._inputs(samples, sampler, **options), trace=trace)

    @torch.inference_mode()
    def steps(
        self, samples: Sequence[Sample], *, sampler: AnySampler, **options: Any
    ) -> Generator[Step, None, Sampled]:
        """The same step by step, see `AnySampler.stepwise`.

        seed: of all samples, or one for each; texts: to revise, None: write from masks; default None for all
        suffix: a text after every response
        """
        return (yield from sampler.stepwise(**self._inputs(samples, sampler, **options)))

    def _inputs(
        self,
        samples: Sequence[Sample],
        sampler: AnySampler,
        *,
        seed: int | Sequence[int] = 0,
        texts: Sequence[str | None] | None = None,
        suffix: str | None = None,
    ) -> dict[str, Any]:
        """The arguments of a sampler."""
        if sampler.compile:
            self.backbone.compile_blocks()
        texts = texts or [None] * len(samples)
        records = [{**s.record, "captions": [{"text": text or ""}]} for s, text in zip(samples, texts, strict=True)]
        collate = Collate(self.codec, response_length=sampler.length, layout=self.backbone.layout, seed=0, first=True)
        batch, _ = collate([Sample(s.key, record, s.data, s.image) for s, record in zip(samples, records, strict=True)])
        batch = batch.to(self.device)
        prefix = self.backbone.encode_prefix(batch.prefix)
        behind = torch.tensor(self.codec.encode(suffix)[0]) if suffix else None
        lengths = [prefix.embeds.shape[1]] * len(batch) if prefix.mask is None else prefix.mask.sum(1).tolist()
        after = sampler.length + (0 if behind is None else len(behind))
        for key, tokens in zip(batch.keys, lengths, strict=True):
            if self.positions is not None and tokens + after > self.positions:
                message = "%s: %d prompt tokens and %d after them exceed the model's %d positions (config.json)"
                logger.warning(message, key, tokens, after, self.positions)
        start = None
        if any(text is not None for text in texts):
            written = torch.tensor([text is None for text in texts], device=batch.response.device)
            start = batch.response.masked_fill(written[:, None], self.codec.mask_id)
        arguments = {"backbone": self.backbone, "prefix": prefix, "keys": batch.keys, "start": start, "suffix": behind}
        return {**arguments, "special": self.codec.special, "seed": seed}

    def _arguments(self, requests: Sequence[Request], sampler: AnySampler) -> dict[str, Any]:
        """Samples, seeds and texts of requests, checked."""
        samples = []
        for request in requests:
            options = {"text": request.text, "positions": self.positions, "images": int(request.image is not None)}
            check_request(self.codec, sampler, prompt=request.prompt, **options)
            if request.image is None:
                image = None
            elif self.backbone.layout is None:
                raise UserError("the model has no vision path, so it cannot caption images")
            else:
                try:
                    image = read_image(request.image, self.backbone.layout)
                except ImageProblem as problem:
                    name = request.image if isinstance(request.image, str | Path) else "image"
                    raise UserError(f"{name}: {problem}") from problem
            key = request.key or noise_key(image, request.prompt)
            samples.append(Sample(key, {"prompt": request.prompt}, b"", image))
        texts, seeds = [request.text for request in requests], [request.seed for request in requests]
        return {"samples": samples, "seed": seeds, "texts": texts}

    def captions_of(self, sampled: Sampled) -> list[Caption]:
        counts = zip(sampled.ids.tolist(), sampled.forwards.tolist(), sampled.edits.tolist(), strict=True)
        traces = sampled.traces or [None] * len(sampled.ids)
        return [
            Caption(self.codec.decode(ids), self._to_end(ids), forwards, edits, trace)
            for (ids, forwards, edits), trace in zip(counts, traces, strict=True)
        ]

    def _to_end(self, ids: list[int]) -> list[int]:
        return ids[: ids.index(self.codec.eot_id)] if self.codec.eot_id in ids else ids

    def _state(self, step: TraceStep, confidence: dict[int, float]) -> State:
        """The state after a step; `confidence` of all visible tokens by position is brought up to date."""
        edited = {place: old for place, old, _ in step.rewritten}
        confidence |= dict(zip(step.unmasked, step.confidence, strict=True))
        confidence |= dict(zip(edited, step.rewrite_confidence, strict=True))
        for place in step.remasked:
            confidence.pop(place, None)
        states: dict[int, TokenState] = dict.fromkeys(step.unmasked, "new")
        states |= dict.fromkeys(edited, "rewritten")
        states |= dict.fromkeys(step.remasked, "remasked")
        tokens = []
        for place, token in enumerate(self._to_end(step.tokens)):
            is_mask = token == self.codec.mask_id
            text, unchanged = ("_", "mask") if is_mask else (self.codec.decode([token]), "kept")
            old = self.codec.decode([edited[place]]) if place in edited else None
            tokens.append(Token(text, states.get(place, unchanged), confidence.get(place), old))
        return State(text_with_masks(self.codec, step.tokens), tokens, step.forwards)

    def _last(self, caption: Caption, confidence: dict[int, float]) -> State:
        pieces = [self.codec.decode([token]) for token in caption.ids]
        tokens = [Token(text, "kept", confidence.get(place)) for place, text in enumerate(pieces)]
        return State(caption.text, tokens, caption.forward_calls, caption)


def noise_key(image: Image.Image | None, prompt: str) -> str:
    """The key of a request without one: a hash of the pixels that the model reads, or of a prompt without an image."""
    return hashlib.blake2b(prompt.encode() if image is None else image.tobytes(), digest_size=16).hexdigest()


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_sampler(
    name: str,
    *,
    response_length: int | None,
    revising: bool = False,
    tokens_per_step: int | None = None,
    steps: int | None = None,
    **settings: Any,
) -> AnySampler:
    """The sampler of conf/sampler/NAME.yaml, or of another .yaml file, with `settings` that are not None on top.

    response_length: that the model was trained with; the default of `length`, if known
    revising: for texts without masks, which have no steps but post steps: a sampler with a reviser makes one at least
    """
    node = load_part("sampler", name)
    given = {"length": response_length} if response_length else {}
    if revising and node.get("reviser"):
        given["post_steps"] = max(1, node.get("post_steps", 0))
    given |= {key: value for key, value in settings.items() if value is not None}
    if tokens_per_step is not None or steps is not None:
        given |= {"tokens_per_step": tokens_per_step, "steps": steps}
    return build({**node, **given})


def check_request(
    codec: Codec, sampler: AnySampler, *, prompt: str | None, text: str | None, positions: int | None, images: int
) -> None:
    """Raise UserError for a prompt that exceeds the model's `positions`, or a text that cannot be revised.

    prompt: None is not checked; images: of the prompt
    """
    prompt_ids = [] if prompt is None else codec.prompt_ids(prompt, images=images)
    if positions is not None and len(prompt_ids) + sampler.length > positions:
        raise UserError(
            f"{counted(len(prompt_ids), 'prompt token')} and {sampler.length} after them exceed the model's "
            f"{positions} positions (config.json): lower length={sampler.length}, or shorten the prompt"
        )
    if text is None:
        return
    if not sampler.post_steps:
        raise UserError("a sampler without post steps rewrites no finished text; use sampler=refine")
    ids = codec.encode(text)[0]
    if len(ids) >= sampler.length:
        raise UserError(
            f"the caption has {counted(len(ids), 'token')}, but a response has room for {sampler.length - 1}"
        )
    if codec.decode(ids) != text:
        logger.warning("the tokenizer lacks some characters and reads the caption as %r", codec.decode(ids))
