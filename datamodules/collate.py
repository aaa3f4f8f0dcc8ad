"""Collate samples of shards into a `Batch`: token ids, hallucinated spans, prompts and pixels."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.loader import Notes
from datamodules.shards import Sample
from datamodules.stream import Shard
from src.models.tiling import Layout
from src.text.tokenizer import Codec
from src.types import Batch

RESOLUTION = 2**32  # of a probability drawn by `choice`
PATCH = 14  # pixels on the side of a vision tower's patch, about; for `Collate.length` only


@dataclass
class Row:
    """A sample, as lists of equal length: correct ids, flawed ids, span number (0: no span).

    unmasked_at: of a draft, of a length of its own, see `Batch`; empty if it is not known
    """

    response: list[int]
    flawed: list[int]
    span: list[int]
    unmasked_at: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, ids: Sequence[int], spans: Sequence[tuple[int, int, Sequence[int], Sequence[int]]]) -> Row:
        """spans: (start, end, correct ids, flawed ids); a span that overlaps an earlier one is left out.

        Raises ValueError for what are not token ids, and for a span that does not fit them.
        """
        row = cls(list(ids), list(ids), [0] * len(ids))
        number = 0
        for start, end, correct, flawed in spans:
            if not (0 <= start < end <= len(ids) and len(correct) == len(flawed) == end - start):
                raise ValueError(f"the span {start} to {end} with {len(flawed)} ids does not fit {len(ids)} tokens")
            if any(row.span[start:end]):
                continue
            number += 1
            row.response[start:end], row.flawed[start:end] = correct, flawed
            row.span[start:end] = [number] * (end - start)
        if not all(type(token) is int and token >= 0 for token in (*row.response, *row.flawed)):
            raise ValueError("the ids are not a list of token ids")
        return row

    def fit(self, response_length: int, fill: int) -> Row:
        """Cut or filled to `response_length` tokens; a span that the cut splits is dropped."""
        last, following = self.span[response_length - 1 : response_length], self.span[response_length:][:1]
        split = set(last) & set(following) - {0}
        span = [0 if number in split else number for number in self.span]
        flawed = [bad if number else good for good, bad, number in zip(self.response, self.flawed, span, strict=True)]
        padding = response_length - len(span)
        fit = lambda ids: ids[:response_length] + [fill] * padding  # noqa: E731
        steps = self.unmasked_at[:response_length]
        steps += steps[-1:] * (response_length - len(steps))
        return Row(fit(self.response), fit(flawed), span[:response_length] + [0] * padding, steps)


@dataclass(frozen=True)
class Collate:
    """Samples of one batch -> (`Batch`, notes). A pure function of the samples.

    layout: the model's layout, which cuts images into tiles; None for samples without images
    first:  for evaluation: take the first caption of every image instead of one chosen by a hash, and mask no prompt
    prompt_dropout: probability of masking a prompt, drawn by a hash of (seed, pass, key)
    resize: how images come to the size of tiles, torch or pillow (see `src.models.tiling`)
    """

    codec: Codec
    _: KW_ONLY
    response_length: int
    layout: Layout | None
    seed: int
    first: bool = False
    prompt_dropout: float = 0.0
    resize: str = "pillow"

    def __call__(self, samples: list[Sample]) -> tuple[Batch, Notes]:
        # 1. one caption of every sample, or its draft, cut or filled to the response length
        uncut = []
        for sample in samples:
            if "draft_ids" in sample.record:
                uncut.append(draft_row(sample.record))
                continue
            captions = sample.record["captions"]
            number = 0 if self.first else choice(f"{self.seed}/{sample.passes}/{sample.key}/caption", len(captions))
            uncut.append(caption_row(captions[number], self.codec))
        rows = [row.fit(self.response_length, self.codec.eos_id) for row in uncut]
        num_cut = sum(len(row.span) > self.response_length for row in uncut)
        response = torch.tensor([row.response for row in rows])  # (B, L)
        # 2. prompts, filled to the longest, and images
        prompts = [self.prompt_ids(sample) for sample in samples]
        lengths = torch.tensor([len(ids) for ids in prompts])
        longest = int(lengths.max())
        filled = [ids + [self.codec.eos_id] * (longest - len(ids)) for ids in prompts]
        prefix = {"prompt_ids": torch.tensor(filled)}  # (B, T)
        images = [[] if sample.image is None else [sample.image] for sample in samples]
        if self.layout and any(images):
            prefix |= image_inputs(images, self.layout, resize=self.resize)
        if lengths.min() < longest:
            prefix["prompt_mask"] = torch.arange(longest) < lengths[:, None]  # (B, T)
        drafted = ["draft_ids" in sample.record for sample in samples]
        steps = [
            row.unmasked_at if of_draft else [-1] * self.response_length
            for row, of_draft in zip(rows, drafted, strict=True)
        ]
        batch = Batch(
            prefix=prefix,
            response=response,
            editable=torch.ones_like(response, dtype=torch.bool),  # the filler behind eot is trained too
            flawed=torch.tensor([row.flawed for row in rows]),
            span=torch.tensor([row.span for row in rows]),
            drafted=torch.tensor(drafted),
            keys=[sample.key for sample in samples],
            passes=[sample.passes for sample in samples],
            order=[sample.position for sample in samples],
            records=[sample.record for sample in samples],
            images=[sample.data for sample in samples] if self.first else [],  # nobody reads those of a training batch
            unmasked_at=torch.tensor(steps) if all(steps) else None,
        )
        return batch, Counter({(str(self.response_length), "cut"): num_cut} if num_cut else {})

    def misfit(self, sample: Sample) -> str | None:
        """Why a sample cannot be used, whichever of its captions is chosen; None if it can."""
        record = sample.record
        try:
            if not isinstance(record["prompt"], str):
                return "its prompt is no text"
            if "draft_ids" in record:
                draft_row(record)
                return None
            if not all(caption.get("ids") or caption["text"].strip() for caption in record["captions"]):
                return "the text of a caption is empty"
            rows = [caption_row(caption, self.codec) for caption in record["captions"]]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return None if rows else "it has no captions"

    def length(self, shard: Shard, index: int) -> int | None:
        """About the tokens of a sample's prefix, by the index of its shard; None if that does not say."""
        if shard.prompt_tokens is None or (self.layout and shard.sizes is None):
            return None
        tokens = int(shard.prompt_tokens[index])
        if self.layout and shard.sizes is not None:
            tokens += image_tokens(self.layout, *shard.sizes[index].tolist())
        return tokens

    def prompt_ids(self, sample: Sample) -> list[int]:
        """The prompt, or as many masks: the unconditional prompt of the sampler (`masked_prefix`)."""
        earlier = {name: sample.record[name] for name in ("turns", "system") if name in sample.record}
        ids = self.codec.prompt_ids(sample.record["prompt"], images=int(sample.image is not None), **earlier)
        if self.first or not self.prompt_dropout:
            return ids
        drawn = choice(f"{self.seed}/{sample.passes}/{sample.key}/prompt", RESOLUTION)
        return [self.codec.mask_id] * len(ids) if drawn < self.prompt_dropout * RESOLUTION else ids


def caption_row(caption: dict, codec: Codec) -> Row:
    """A true caption whose non-overlapping swaps are the hallucinated spans. Stored `ids` are used without encoding."""
    ids = caption["ids"] if "ids" in caption else [*codec.encode(caption["text"])[0], codec.eot_id]
    swaps = [swap["tokens"] for swap in caption.get("swaps", ())]
    return Row.of(ids, [(start, end, ids[start:end], wrong) for start, end, wrong in swaps])


def draft_row(record: dict) -> Row:
    ids = record["draft_ids"]
    spans = [(s["start"], s["end"], s["target_ids"], ids[s["start"] : s["end"]]) for s in record["spans"]]
    row = Row.of(ids, spans)
    row.unmasked_at = list(record.get("unmasked_at", ()))
    return row


def choice(name: str, count: int) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") % count


@lru_cache(maxsize=2**16)
def image_tokens(layout: Layout, width: int, height: int) -> int:
    return layout.num_tokens((width, height), side=max(1, layout.size // PATCH))


def image_inputs(
    images: Sequence[Sequence[Image.Image]], layout: Layout, *, resize: str = "pillow"
) -> dict[str, Tensor]:
    """A backbone's inputs for the images of each row (zero or more); shorter rows are padded with empty tiles.

    pixel_values (B, T, 3, S, S) uint8, num_tiles (B, M) int64, image_sizes (B, M, 2) int64 (width, height).
    NOTE: the channels of pixel_values come last in memory, as images hold them; the model sorts them on its device.
    """
    shape = len(images), max(map(len, images))
    num_tiles, image_sizes = np.zeros(shape, dtype=np.int64), np.zeros((*shape, 2), dtype=np.int64)
    for row, pictures in enumerate(images):
        for index, picture in enumerate(pictures):
            num_tiles[row, index], image_sizes[row, index] = layout.num_tiles(picture.size), picture.size
    longest = num_tiles.sum(1).max()
    pixels = np.zeros((len(images), longest, layout.size, layout.size, 3), dtype=np.uint8)
    for row, pictures in enumerate(images):
        start = 0
        for picture in pictures:
            stop = start + layout.num_tiles(picture.size)
            layout.tiles(picture, resize=resize, out=pixels[row, start:stop])
            start = stop
    arrays = {"pixel_values": pixels, "num_tiles": num_tiles, "image_sizes": image_sizes}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {**tensors, "pixel_values": tensors["pixel_values"].permute(0, 1, 4, 2, 3)}
