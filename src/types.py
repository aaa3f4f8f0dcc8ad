"""The nouns and protocols that every part of the project shares.

B batch, P prefix length, L response length, V vocabulary, D width.

    shards -> Batch -> Corruption -> Corrupted -> Backbone(Prefix, tokens) -> logits -> objective
    Batch -> Sampler -> Draft -> Expert -> Revision -> Round -> shards
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.export import register_dataclass

from src.io.errors import UserError


class Kind(IntEnum):
    """What a response position is, as a corruption leaves it. An objective is a table over kinds."""

    FROZEN = 0  # padding or not to be trained
    CLEAN = 1  # visible and right
    MASK = 2  # hidden behind the mask token
    SYNTAX = 3  # visible, replaced by a random token
    HALLUCINATION = 4  # visible, part of a fluent but false span
    MISTAKE = 5  # visible, part of a span of a model's draft that the expert corrected
    DRAFT = 6  # visible, written by the model itself (two-pass objectives)


@dataclass(frozen=True)
class SpecialIds:
    """Token ids that the maths needs; they come from the tokenizer.

    banned: may never be written into a response; unwritten: other special ids, which no random replacement draws
    gap: stands for nothing in a response (`src.text.prompt_format.PromptFormat`); None: there is no such token
    """

    mask: int
    eos: int  # end of text: fills a response behind eot
    eot: int  # end of turn: ends a response
    banned: tuple[int, ...]
    vocab_size: int
    unwritten: tuple[int, ...] = ()
    gap: int | None = None


@dataclass
class Batch:
    """Samples for one step. `response` always holds the *right* tokens; flawed versions live in `flawed`.

    prefix:   inputs of `Backbone.encode_prefix`, tensors with B rows: `prompt_ids`, `prompt_mask`, and for images
              `pixel_values`, `num_tiles`, `image_sizes` (see `src/models/llada_v.py`)
    response: (B, L) int64, the target text, eot, then end-of-text filler or padding
    editable: (B, L) bool, false on padding; corruptions and losses never touch those
    flawed:   (B, L) int64, equal to `response` but with wrong tokens inside the spans
    span:     (B, L) int64, 0 outside spans, otherwise the number (1, 2, ...) of the span
    drafted:  (B,) bool, true for rows of an online round: `flawed` is a model's draft, spans are its corrected mistakes
    keys:     one name per row; noise is a function of it
    epoch:    the epoch that the noise of this batch belongs to
    records:  the shard's JSON of each row (text, scene, ...), for callbacks and metrics
    images:   the encoded image of each row, as it stands in the shard, for drafts and pictures
    """

    prefix: dict[str, Tensor]
    response: Tensor
    editable: Tensor
    flawed: Tensor
    span: Tensor
    drafted: Tensor
    keys: list[str]
    epoch: int = 0
    records: list[dict] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch with all tensors on a device (Lightning calls this)."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._map(Tensor.pin_memory)

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of at most `size` rows, in order."""
        return [self.rows(slice(start, start + size)) for start in range(0, len(self), size)]

    def rows(self, index: slice) -> Batch:
        """The rows of a slice."""
        lists = {name: getattr(self, name)[index] for name in ("keys", "records", "images")}
        return self._map(lambda t: t[index], **lists)

    def _map(self, function, **changed: Any) -> Batch:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = function(value)
        values["prefix"] = {name: function(value) for name, value in self.prefix.items()}
        return Batch(**{**values, **changed})


@dataclass
class Prefix:
    """What a backbone makes of everything before the response.

    embeds: (B, P, D); mask: (B, P) bool or None when no row is padded; cache: per decoder layer (keys, values), each
    (B, H, P, d), where the attention mode makes it exact, else None; last: (B, 1, D) or None, with a cache the final
    state of the last token, where the backbone reads what to say of a token off the one before it.
    """

    embeds: Tensor
    mask: Tensor | None = None
    cache: list[tuple[Tensor, Tensor]] | None = None
    last: Tensor | None = None

    def select(self, rows: Tensor) -> Prefix:
        """The prefix of some rows: `rows` (N,) int64, repeats allowed."""
        cache = self.cache and [(k[rows], v[rows]) for k, v in self.cache]
        mask, last = (None if tensor is None else tensor[rows] for tensor in (self.mask, self.last))
        return Prefix(self.embeds[rows], mask, cache, last)


register_dataclass(Prefix)  # so that FSDP2 finds the tensors in it, also with torch 2.11


@dataclass
class Corrupted:
    """A corrupted response. tokens, target: (B, L) int64; kind: (B, L) uint8 of `Kind`; rate: (B,) noise level t."""

    tokens: Tensor
    target: Tensor
    kind: Tensor
    rate: Tensor

    def where(self, kind: Kind) -> Tensor:
        """(B, L) bool: the positions of one kind."""
        return self.kind == int(kind)


@dataclass(frozen=True)
class Loss:
    """A sum and what to divide it by, kept apart so that micro-batches and ranks can be added before the division."""

    numerator: Tensor
    denominator: Tensor


@dataclass(frozen=True)
class Edit:
    """Replace `org`, which starts at character `start_char` of the draft (None: wherever it occurs), by `target`.

    reason: in the expert's words; kind: of mistake (`colour`, `count`, `syntax`, ...), by which edits are counted
    """

    org: str
    target: str
    start_char: int | None = None
    reason: str = ""
    kind: str = ""

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Draft:
    """A caption that a model wrote. `token_ids`: the response, cut after eot; `reference`: the true caption or ""."""

    key: str
    prompt: str
    text: str
    token_ids: list[int]
    steps: int
    reference: str
    sampler: dict
    fingerprint: str
    seed: int
    record: dict = field(default_factory=dict)  # the shard's JSON of the sample it was drafted for
    image: bytes = b""  # the encoded image, as it stood in the shard


@dataclass(frozen=True)
class Revision:
    """An expert's answer. No edits means that the draft is right."""

    edits: tuple[Edit, ...]
    raw: str = ""
    model: str = ""
    usage: dict = field(default_factory=dict)
    attempts: int = 1


DEADLINE = "deadline"  # why an expert that was told to finish has not answered


@dataclass(frozen=True)
class Failure:
    """Why an expert gave no usable answer; `retry` tells whether asking again later may help.

    The rest as of `Revision`: what was paid for is kept, too.
    """

    reason: str
    retry: bool = False
    raw: str = ""
    model: str = ""
    usage: dict = field(default_factory=dict)
    attempts: int = 1


class FailedRound(UserError):
    """A round that cannot be made, or is of no use, for a reason that the user can mend; what there is is kept."""


@dataclass
class Round:
    """One finished online round on disk: its folder and the manifest (counts, sha256 of each shard)."""

    path: Path
    manifest: dict


@dataclass
class TraceStep:
    """One step of a sampler, for one row: tokens after it, places unmasked, and rewritten (position, old, new)."""

    tokens: list[int]
    unmasked: list[int]
    rewritten: list[tuple[int, int, int]]
    remasked: list[int]
    confidence: list[float]  # of the tokens in `unmasked`
    forwards: int  # forward calls so far


@dataclass
class Sampled:
    """What a sampler returns for B rows: ids (B, L), counts per row (B,), wall seconds of the batch, traces."""

    ids: Tensor
    forwards: Tensor
    edits: Tensor
    remasks: Tensor
    wall_s: float
    traces: list[list[TraceStep]] | None = None


class Backbone(Protocol):
    """A (vision-)language model with bidirectional attention over the response."""

    def encode_prefix(self, prefix: dict[str, Tensor]) -> Prefix:
        """Encode everything before the response."""
        ...

    def __call__(
        self, prefix: Prefix, tokens: Tensor, *, attend: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Logits of a response `tokens` (B, L): (B, L, V), or (N, V) at the N true places of `positions` (B, L) bool.

        `attend` (B, L) bool hides padding from attention; None means that every position is attended.
        """
        ...


class Corruption(Protocol):
    """Damage a response. Frozen positions never change; a replacement never equals the original."""

    def __call__(self, batch: Batch, state: Corrupted, noise: Any) -> Corrupted: ...


class Expert(Protocol):
    """Corrects drafts. Answers come in any order, each exactly once.

    What its answers depend on is its name and its public attributes, or a dict `settings` where it has one; an
    answer is never reused after these have changed.

    It may also have: `session()`, connections for a round, `finish()`, to ask no more at a deadline, and `trouble`, its
    last one (src/rounds/expert_thread.py); `charge(usage)`, what the run has used before, and `reread(draft, answer)`, a kept answer
    read once more (src/rounds/round.py); `estimate`, for a dry run (src/revise.py); `body` and `read`, to be asked by file
    (src/rounds/batch_api.py).
    """

    name: str

    def revise(self, drafts: Sequence[Draft]) -> AsyncIterator[tuple[str, Revision | Failure]]:
        """Yield (key of the draft, answer)."""
        ...
