"""Corruptions: what a model is trained to undo. Each labels every response position with a `Kind`.

    state = start(batch, rate)                       everything CLEAN, padding FROZEN
    state = Chain(Absorb(...), Replace(...), Span())(batch, state, noise)

B rows, L response positions. A corruption touches only positions that are still CLEAN, so the order of a chain says
who goes first. Frozen positions never change; a replacement never equals the original. All randomness comes from
`src.diffusion.noise.Noise`, so a sample is damaged in the same way whatever batch it lands in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from src.diffusion.noise import Noise
from src.io.errors import UserError
from src.types import Batch, Corrupted, Corruption, Kind, SpecialIds


def start(batch: Batch, rate: Tensor) -> Corrupted:
    """The undamaged response at noise level `rate` (B,)."""
    kind = torch.where(batch.editable, int(Kind.CLEAN), int(Kind.FROZEN)).to(torch.uint8)
    return Corrupted(batch.response.clone(), batch.response, kind, rate)


def _write(state: Corrupted, where: Tensor, tokens: Tensor, kind: Kind) -> Corrupted:
    changed = state.kind.masked_fill(where, int(kind))
    return Corrupted(torch.where(where, tokens, state.tokens), state.target, changed, state.rate)


class Absorb:
    """Hide each clean token behind the mask with probability `rate` of its row (LLaDA, eq. 3)."""

    def __init__(self, *, special: SpecialIds) -> None:
        self.mask_id = special.mask

    def __call__(self, batch: Batch, state: Corrupted, noise: Noise) -> Corrupted:
        hit = noise.uniform(batch.editable) < state.rate[:, None]  # (B, L)
        hit &= state.where(Kind.CLEAN)
        return _write(state, hit, torch.full_like(state.tokens, self.mask_id), Kind.MASK)


class Replace:
    """Replace each visible clean token with probability `rate` by another one ("syntax" errors; ReDiff, section 3.2).

    source: `uniform` draws from all ordinary ids, `response` from the other tokens of the same response (plausible
    words in the wrong place; a draw that equals the original leaves it clean).
    dynamic: the rate is at most the row's noise level (an ablation of the paper, which found it worse).
    """

    def __init__(self, *, special: SpecialIds, rate: float, source: str = "uniform", dynamic: bool = False) -> None:
        if not 0 <= rate <= 1:
            raise UserError(f"the replacement rate must be within 0..1, got {rate}")
        if source not in ("uniform", "response"):
            raise UserError(f"source must be 'uniform' or 'response', got {source!r}")
        self.rate, self.source, self.dynamic = rate, source, dynamic
        forbidden = {*special.banned, *special.unwritten, special.mask, special.eos, special.eot}
        self.ordinary = torch.tensor([i for i in range(special.vocab_size) if i not in forbidden])
        self.rank = torch.full((special.vocab_size,), len(self.ordinary))  # place of an id among the ordinary ones
        self.rank[self.ordinary] = torch.arange(len(self.ordinary))

    def __call__(self, batch: Batch, state: Corrupted, noise: Noise) -> Corrupted:
        rate = state.rate.clamp(max=self.rate) if self.dynamic else torch.full_like(state.rate, self.rate)
        hit = noise.uniform(batch.editable) < rate[:, None]
        tokens = self.draw(batch, noise)
        hit &= state.where(Kind.CLEAN) & (tokens != state.target)
        return _write(state, hit, tokens, Kind.SYNTAX)

    def draw(self, batch: Batch, noise: Noise) -> Tensor:
        """(B, L) a replacement for each position."""
        original = batch.response
        if self.source == "uniform":
            index = noise.integers(batch.editable, len(self.ordinary) - 1)
            index += index >= self.rank.to(original.device)[original]  # skip the original: uniform over all the others
            return self.ordinary.to(original.device)[index]
        count = batch.editable.sum(1, keepdim=True)
        place = (noise.uniform(batch.editable) * count).long().clamp(max=original.shape[1] - 1)
        ordered = torch.argsort((~batch.editable).int(), dim=1, stable=True)  # editable positions first
        return original.gather(1, ordered.gather(1, place))


class Span:
    """Put false spans in place of true ones where the text is still visible (hallucinations, or mistakes of a draft).

    num: how many of a row's spans are used, chosen at random; None: all of them. kind: what their tokens become.
    """

    def __init__(self, *, num: int | None = 1, kind: Kind = Kind.HALLUCINATION) -> None:
        if num is not None and num < 1:
            raise UserError(f"num must be at least 1 or null, got {num}")
        self.num, self.kind = num, kind

    def __call__(self, batch: Batch, state: Corrupted, noise: Noise) -> Corrupted:
        hit = self._chosen(batch, noise) & state.where(Kind.CLEAN)
        return _write(state, hit, batch.flawed, self.kind)

    def _chosen(self, batch: Batch, noise: Noise) -> Tensor:
        if self.num is None:
            return batch.span > 0
        present = _spans_at(batch, batch.span > 0)  # (B, S)
        order = noise.uniform(present).argsort(1).argsort(1)  # rank of each span; absent ones come last
        return _within(batch, present & (order < self.num))


class ShowGaps:
    """Put some of the spans right again whose right tokens hold a gap: with probability `share` each.

    The next pass of a sampler sees the gaps that this one has written. Nothing else in the data shows that they stay.
    """

    def __init__(self, *, gap: int, share: float) -> None:
        if not 0 <= share <= 1:
            raise UserError(f"the share of settled spans must be within 0..1, got {share}")
        self.gap, self.share = gap, share

    def __call__(self, batch: Batch, state: Corrupted, noise: Noise) -> Corrupted:
        gapped = _spans_at(batch, batch.response == self.gap)  # (B, S)
        right = _within(batch, gapped & (noise.uniform(gapped) < self.share))
        return Corrupted(torch.where(right, state.target, state.tokens), state.target, state.kind, state.rate)


def _spans_at(batch: Batch, where: Tensor) -> Tensor:
    """(B, S) bool: which spans have a token at a true place of `where` (B, L)."""
    count = int(batch.span.max()) if batch.span.numel() else 0
    ids = torch.arange(1, count + 1, device=batch.span.device)
    return ((batch.span[:, :, None] == ids) & where[:, :, None]).any(1)


def _within(batch: Batch, chosen: Tensor) -> Tensor:
    """(B, L) bool: the places of the spans chosen (B, S)."""
    return torch.cat([chosen.new_zeros(len(chosen), 1), chosen], 1).gather(1, batch.span)


class Hybrid:
    """Masks and random tokens from one process (GIDD, arXiv 2503.04482, with g = 1).

    At noise level t a token stays with share 1 - t, is hidden with share t, and is replaced with share
    c = 2 p_u / (1 - p_u) sqrt(t (1 - t)); all divided by their sum. share: p_u, of random tokens at t = 1/2.
    Here a replacement never equals the original, so 1/V of that share is missing.
    """

    def __init__(self, *, special: SpecialIds, share: float) -> None:
        if not 0 <= share < 1:
            raise UserError(f"the share of random tokens must be at least 0 and less than 1, got {share}")
        self.share, self.mask_id = share, special.mask
        self.replace = Replace(special=special, rate=1.0)

    def __call__(self, batch: Batch, state: Corrupted, noise: Noise) -> Corrupted:
        t = state.rate
        replaced = 2 * self.share / (1 - self.share) * (t * (1 - t)).clamp(min=0).sqrt()  # c
        where, clean = noise.uniform(batch.editable) * (1 + replaced)[:, None], state.where(Kind.CLEAN)
        hidden = clean & (where < t[:, None])
        other = clean & ~hidden & (where < (t + replaced)[:, None])
        state = _write(state, hidden, torch.full_like(state.tokens, self.mask_id), Kind.MASK)
        return _write(state, other, self.replace.draw(batch, noise), Kind.SYNTAX)


OPERATIONS = ("substitute", "swap", "duplicate", "shift")


class EditNoise:
    """Random edits of the text, one after the other (SEED Diffusion, arXiv 2508.02193). No masks.

    Of a text of n tokens floor(a n) edits are made, a uniform on [0, rate]: `substitute` a random token, `swap` two
    neighbours, `duplicate` a token over its right neighbour, or `shift` up to `window` tokens by one place: one is
    deleted, and a random token inserted further on. Insertions and deletions come in such pairs, as one alone would
    move all that follows, and the model has no way to move text.
    """

    def __init__(
        self, *, special: SpecialIds, rate: float, operations: Sequence[str] = OPERATIONS, window: int = 4
    ) -> None:
        if not 0 <= rate <= 1:
            raise UserError(f"the rate of edits must be within 0..1, got {rate}")
        if not operations or set(operations) - set(OPERATIONS):
            raise UserError(f"operations must be some of {OPERATIONS}, got {list(operations)}")
        if window < 1:
            raise UserError(f"window must be at least 1, got {window}")
        self.rate, self.operations, self.window = rate, tuple(operations), window
        self.replace = Replace(special=special, rate=1.0)

    def __call__(self, batch: Batch, state: Corrupted, noise: Noise) -> Corrupted:
        share = noise.level().tolist()
        kinds, places, lengths = (noise.uniform(batch.editable).tolist() for _ in range(3))
        tokens = self.replace.draw(batch, noise).tolist()
        edited = state.tokens.tolist()
        for row, allowed in enumerate(state.where(Kind.CLEAN).tolist()):
            where = [place for place, ok in enumerate(allowed) if ok]
            text = [edited[row][place] for place in where]
            for edit in range(int(share[row] * self.rate * len(text))):
                at = where[edit]  # the numbers of an edit lie where the tokens do
                name = self.operations[int(kinds[row][at] * len(self.operations))]
                span = 1 + int(lengths[row][at] * self.window)
                _edit(text, name, int(places[row][at] * len(text)), span, tokens[row][at])
            for place, token in zip(where, text, strict=True):
                edited[row][place] = token
        after = torch.tensor(edited, device=state.tokens.device).reshape(state.tokens.shape)
        return _write(state, after != state.tokens, after, Kind.SYNTAX)


def _edit(text: list[int], name: str, place: int, span: int, token: int) -> None:
    """One edit of `text` at `place`, in place. Neighbours that the text does not have leave it as it is."""
    last = min(place + span, len(text) - 1)
    if name == "substitute":
        text[place] = token
    elif name == "shift":
        text[place : last + 1] = [*text[place + 1 : last + 1], token]
    elif place + 1 < len(text):
        right, left = text[place], text[place + 1] if name == "swap" else text[place]
        text[place : place + 2] = [left, right]


class Only:
    """One corruption and nothing else: the tokens that it leaves clean become `rest`."""

    def __init__(self, corruption: Corruption, *, rest: Kind) -> None:
        self.corruption, self.rest = corruption, rest

    def __call__(self, batch: Batch, state: Corrupted, noise: Noise) -> Corrupted:
        state = self.corruption(batch, state, noise)
        return _write(state, state.where(Kind.CLEAN), state.tokens, self.rest)


class Chain:
    """Several corruptions in order."""

    def __init__(self, *steps: Corruption) -> None:
        self.steps: Sequence[Corruption] = steps

    def __call__(self, batch: Batch, state: Corrupted, noise: Noise) -> Corrupted:
        for step in self.steps:
            state = step(batch, state, noise)
        return state


class Choose:
    """One corruption for some rows, another for the rest.

    when: `drafted` = rows of an online round, `spans` = rows with false spans; share: of those rows, chosen at random
    """

    def __init__(self, *, when: str, then: Corruption, otherwise: Corruption, share: float = 1.0) -> None:
        if when not in ("drafted", "spans"):
            raise UserError(f"when must be 'drafted' or 'spans', got {when!r}")
        if not 0 <= share <= 1:
            raise UserError(f"share must be within 0..1, got {share}")
        self.when, self.then, self.otherwise, self.share = when, then, otherwise, share

    def __call__(self, batch: Batch, state: Corrupted, noise: Noise) -> Corrupted:
        rows = batch.drafted if self.when == "drafted" else (batch.span > 0).any(1)
        pick = (rows & (noise.level(device=rows.device) < self.share))[:, None]
        a, b = self.then(batch, state, noise), self.otherwise(batch, state, noise)
        tokens, kind = torch.where(pick, a.tokens, b.tokens), torch.where(pick, a.kind, b.kind)
        return Corrupted(tokens, state.target, kind, state.rate)
