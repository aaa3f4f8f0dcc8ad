"""Data types and protocols shared by the whole project.

B batch, P prefix length, L response length, V vocabulary, D width.

    shards -> Batch -> Corruption -> Corrupted -> Backbone(Prefix, tokens) -> logits -> objective
    Batch -> Sampler -> Draft -> Expert -> Revision -> token spans -> shards of a Round
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import register_dataclass

from src.io.errors import UserError
from src.io.words import counted


class Kind(IntEnum):
    """What a response position holds after corruption. An objective has one loss term per kind or group of kinds."""

    FROZEN = 0  # padding, or excluded from training
    CLEAN = 1  # visible and correct
    MASK = 2  # replaced by the mask token
    SYNTAX = 3  # visible, replaced by a random token
    HALLUCINATION = 4  # visible, inside a hallucinated span: fluent but false
    MISTAKE = 5  # visible, inside a span of a draft that the expert corrected
    DRAFT = 6  # visible, written by the model and not corrected


@dataclass(frozen=True)
class SpecialIds:
    """Special token ids, read from the tokenizer.

    banned:    ids that a response must never contain
    unwritten: other special ids, never drawn as random replacements
    gap:       token that stands for no text (`src.text.prompt_format.PromptFormat`), None if the tokenizer has none
    """

    mask: int
    eos: int  # end of text: fills the response length after eot
    eot: int  # end of turn: ends the response text
    banned: tuple[int, ...]
    vocab_size: int
    unwritten: tuple[int, ...] = ()
    gap: int | None = None

    def ban(self, logits: Tensor) -> Tensor:
        """A copy of logits (N, V) with -inf at what is never written: mask, banned ids, ids past the tokenizer."""
        logits = logits.clone()
        for token in (self.mask, *self.banned):
            logits[:, token] = -torch.inf
        logits[:, self.vocab_size :] = -torch.inf
        return logits

    def argmax(self, logits: Tensor) -> Tensor:
        """(N,) the most likely ids that a response may hold, of logits (N, V); copies a part of them at a time."""
        parts = [self.ban(part).argmax(-1) for part in logits.detach().split(1024)]
        return torch.cat(parts) if parts else logits.new_zeros(0, dtype=torch.int64)


@dataclass
class Batch:
    """Samples of one step. `response` always holds the *correct* tokens, `flawed` the version with mistakes.

    prefix:   inputs of `Backbone.encode_prefix`, tensors with B rows: `prompt_ids`, `prompt_mask`, and for images
              `pixel_values`, `num_tiles`, `image_sizes` (see `src/models/llada_v.py`)
    response: (B, L) int64, the target text, eot, then end-of-text filler or padding
    editable: (B, L) bool, false on padding, which corruptions and losses ignore
    flawed:   (B, L) int64, `response` with wrong tokens inside the spans
    span:     (B, L) int64, number of the span (1, 2, ...), 0 outside spans
    drafted:  (B,) bool, true for rows of an online round: `flawed` is a draft, its spans are the corrected mistakes
    unmasked_at: (B, L) int64, the step of the sampler that unmasked each token of a draft, -1 in other rows; None if a
              draft of the batch is of a round that did not keep it
    keys:     one key per row; its noise is a function of the key
    passes:   how often the stream of each row had been read before: its noise is new in each pass; empty: 0
    order:    position of each row in its stream, over all passes and ranks; empty outside training
    records:  JSON record of each row from the shard (text, scene, ...), for callbacks and metrics
    images:   encoded image of each row from the shard, for drafts and logging; empty in training
    """

    prefix: dict[str, Tensor]
    response: Tensor
    editable: Tensor
    flawed: Tensor
    span: Tensor
    drafted: Tensor
    keys: list[str]
    passes: list[int] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    records: list[dict] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)
    unmasked_at: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> Batch:
        """Copy with all tensors on `device` (called by Lightning); the host does not wait for copies to a GPU."""
        non_blocking = torch.device(device).type != "cpu"
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._map(Tensor.pin_memory)

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of at most `size` rows, in order."""
        return [self.rows(slice(start, start + size)) for start in range(0, len(self), size)]

    def rows(self, index: slice) -> Batch:
        lists = {name: getattr(self, name)[index] for name in ("keys", "passes", "order", "records", "images")}
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
    """Everything before the response, encoded by the backbone.

    embeds: (B, P, D)
    mask:   (B, P) bool, false on padding; None if no row is padded
    cache:  (keys, values) of each decoder layer, each (B, H, P + room, d); None if the attention mode allows no exact
            cache
    last:   (B, 1, D) final hidden state of the last token; None unless there is a cache and logits are shifted
    room:   slots of the cache behind the prefix, which a response overwrites in each forward call without gradient
    """

    embeds: Tensor
    mask: Tensor | None = None
    cache: list[tuple[Tensor, Tensor]] | None = None
    last: Tensor | None = None
    room: int = 0

    def reserve(self, slots: int) -> None:
        """Give the cache room for `slots` response tokens, a layer at a time, as two caches may not fit."""
        if self.cache is None or self.room >= slots:
            return
        length = self.embeds.shape[1]
        for layer in range(len(self.cache)):
            keys, values = (F.pad(tensor[:, :, :length], (0, 0, 0, slots)) for tensor in self.cache[layer])
            self.cache[layer] = (keys, values)
        self.room = slots

    def swap(self, a: int, b: int) -> None:
        """Let the rows a and b of the cache change places; the other tensors stay as they are (see `first`)."""
        for tensor in (tensor for pair in self.cache or () for tensor in pair):
            row = tensor[a].clone()
            tensor[a] = tensor[b]
            tensor[b] = row

    def first(self, rows: Tensor) -> Prefix:
        """The prefix of `rows` (n,) int64, whose cache is that of the first n rows."""
        cache = self.cache and [(keys[: len(rows)], values[: len(rows)]) for keys, values in self.cache]
        mask, last = (None if tensor is None else tensor[rows] for tensor in (self.mask, self.last))
        return Prefix(self.embeds[rows], mask, cache, last, self.room)


register_dataclass(Prefix)  # lets FSDP2 find its tensors, even in torch 2.11


@dataclass
class Corrupted:
    """A corrupted response. tokens, target: (B, L) int64; kind: (B, L) uint8 of `Kind`; rate: (B,) noise level t."""

    tokens: Tensor
    target: Tensor
    kind: Tensor
    rate: Tensor

    def where(self, kind: Kind) -> Tensor:
        """(B, L) bool: positions of one kind."""
        return self.kind == int(kind)


@dataclass(frozen=True)
class Edit:
    """An expert's correction: replace `org` at character `start_char` of the draft by `target`.

    start_char: None: wherever `org` occurs
    reason: in the expert's words
    kind: type of the mistake (`colour`, `count`, `syntax`, ...), used to count edits
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
    """A response written by the model.

    key: key of the sample, and the speed it was drafted at (`KEY@s8`); steps: of the sampler's schedule
    token_ids: cut after eot; reference: the true response, or ""; fingerprint: hash of the model's weights
    unmasked_at: as in `Sampled`, of the whole response, the filler behind eot included; empty in older drafts
    """

    key: str
    prompt: str
    text: str
    token_ids: list[int]
    steps: int
    reference: str
    sampler: dict
    fingerprint: str
    seed: int
    record: dict = field(default_factory=dict)  # JSON record of the sample, from the shard
    image: bytes = b""  # encoded image of the sample, from the shard
    unmasked_at: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Revision:
    """An expert's answer. No edits means that the draft is correct."""

    edits: tuple[Edit, ...]
    raw: str = ""
    model: str = ""
    usage: dict = field(default_factory=dict)
    attempts: int = 1


DEADLINE = "deadline"  # `Failure.reason` if the expert was stopped before it answered


@dataclass(frozen=True)
class Failure:
    """Why an expert gave no usable answer. retry: whether a later request may succeed.

    The other fields are those of `Revision`, so that the usage of failed requests is recorded, too.
    """

    reason: str
    retry: bool = False
    raw: str = ""
    model: str = ""
    usage: dict = field(default_factory=dict)
    attempts: int = 1


class FailedRound(UserError):
    """Raised if a round cannot be completed or is useless, and the user can fix the cause. Its files are kept."""


@dataclass
class Round:
    """A finished online round on disk: its folder and manifest (counts, sha256 of each shard)."""

    path: Path
    manifest: dict


@dataclass
class TraceStep:
    """One sampler step of one row."""

    tokens: list[int]  # after the step
    unmasked: list[int]  # positions
    rewritten: list[tuple[int, int, int]]  # (position, old, new) of each token edit
    remasked: list[int]  # positions
    confidence: list[float]  # of the tokens at `unmasked`
    forwards: int  # forward calls so far
    rewrite_confidence: list[float]  # of the new tokens of `rewritten`


@dataclass
class Sampled:
    """Output of a sampler for B rows."""

    ids: Tensor  # (B, L)
    forwards: Tensor  # (B,) number of forward calls
    edits: Tensor  # (B,) number of token edits
    remasks: Tensor  # (B,) number of remasked tokens
    unmasked_at: Tensor  # (B, L) the row's step (0, 1, ...) that last unmasked a position; -1: none did
    wall_s: float  # wall time of the batch in seconds
    traces: list[list[TraceStep]] | None = None  # the steps of each row


# Positions of a response: the true ones of a mask (B, L), or rows (N,) and columns (N,) int64. Only on a CPU or where
# waiting for the device does no harm is a mask as good.
Positions = Tensor | tuple[Tensor, ...]


class Backbone(Protocol):
    """A (vision-)language model with bidirectional attention over the response."""

    def encode_prefix(self, prefix: dict[str, Tensor]) -> Prefix:
        """Encode everything before the response."""
        ...

    def __call__(
        self, prefix: Prefix, tokens: Tensor, *, attend: Tensor | None = None, positions: Positions | None = None
    ) -> Tensor:
        """Logits (B, L, V) of a response `tokens` (B, L), or (N, V) at N of its `positions`.

        attend: (B, L) bool, false on padding; None: attend to every position
        """
        ...

    def compile_blocks(self) -> None:
        """Compile each decoder block, for training or where a model only samples; called again, it does nothing."""
        ...


class Corruption(Protocol):
    """Corrupts a response. Frozen positions never change; a random replacement never equals the original."""

    def __call__(self, batch: Batch, state: Corrupted, noise: Any) -> Corrupted: ...


class Expert:
    """Base class of what corrects drafts: `name` and `revise` are all that an offline expert needs.

    Stored answers are reused as long as the name and the public attributes (or a dict `settings`, if there is one) are
    unchanged. The other members are for experts that send requests; their defaults do nothing.

    can_finish: `finish` lets open requests complete; otherwise `revise` is cancelled when asking must end
    """

    name: str
    can_finish: bool = False

    @property
    def trouble(self) -> str:
        """The last error of a server that does not answer, for a warning."""
        return ""

    def revise(self, drafts: Sequence[Draft]) -> AsyncIterator[tuple[str, Revision | Failure]]:
        """Yield (key of the draft, answer), exactly one for each draft, in any order."""
        raise NotImplementedError

    def session(self) -> AbstractAsyncContextManager[None]:
        """Connections that the calls of `revise` in one round share."""
        return nullcontext()

    def finish(self) -> None:
        """Send no further requests: open ones complete, other drafts fail with DEADLINE. Called in the event loop."""

    def charge(self, usage: Mapping[str, float]) -> None:
        """Count the usage of earlier rounds or processes against the limits of the run."""

    def estimate(self, drafts: Sequence[Draft], *, total: int) -> object:
        """What `total` drafts like these would take, printed by a dry run."""
        return f"{counted(total, 'draft')}; expert {self.name} uses no server"

    def reread(self, draft: Draft, answer: Revision | Failure) -> Revision | Failure:
        """The same answer, its raw reply parsed again."""
        return answer

    def body(self, draft: Draft) -> dict[str, Any]:
        """Request about a draft, for a batch file. Raises ValueError if none can be built."""
        raise UserError(f"expert {self.name} uses no server, so it has no requests to export; use expert=openai")

    def read(self, draft: Draft, body: Mapping[str, Any]) -> Revision | Failure:
        """The answer in the body of a batch result."""
        raise UserError(f"expert {self.name} uses no server, so it cannot read results; use expert=openai")
