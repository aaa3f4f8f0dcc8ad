"""Corruptions: damage that a model is trained to undo. Each labels every response position with a `Kind`.

    state = start(batch, rate)                       everything CLEAN, padding FROZEN
    state = Chain(Absorb(...), Replace(...), Span())(batch, state, noise)

B rows, L response positions, S spans. A corruption changes only positions that are still CLEAN, so earlier ones of a
chain take precedence; `ShowGaps` alone changes what `Span` has written. Frozen positions never change. A random
replacement never equals the original; a hallucinated span is written as a whole, with the tokens of it that happen to
be right. All randomness comes from `src.diffusion.noise.Noise`, so the damage to a sample does not depend on its batch.
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


def write(state: Corrupted, where: Tensor, tokens: Tensor, kind: Kind) -> Corrupted:
    """The state with `tokens` (B, L), labelled `kind`, at the true positions of `where` (B, L)."""
    kinds = state.kind.masked_fill(where, int(kind))
    return Corrupted(torch.where(where, tokens, state.tokens), state.target, kinds, state.rate)


def text_positions(response: Tensor, eot: int) -> Tensor:
    """(B, L) bool: everything up to the first eot, and that eot; all of a row without one."""
    ends = (response == eot).int()
    return ends.cumsum(1) - ends == 0


class Absorb:
    """Mask each clean token with probability `rate` of its row (LLaDA, eq. 3)."""

    def __init__(self, *, special: SpecialIds) -> None:
        self.mask_id = special.mask

    def __call__(self, batch: Batch, state: Corrupted, noise: Noise) -> Corrupted:
        hit = noise.uniform(batch.editable) < state.rate[:, None]  # (B, L)
        hit &= state.where(Kind.CLEAN)
        return write(state, hit, torch.full_like(state.tokens, self.mask_id), Kind.MASK)


class Replace:
    """Replace each clean token by another one with probability `rate` ("syntax" errors; ReDiff, section 3.2).

    source: `uniform` draws from all ordinary ids, `response` from the text of the same response without eot (plausible
        words in the wrong place; a draw that equals the original leaves it clean)
    dynamic: cap the rate at the row's noise level (an ablation of the paper, which found it worse)
    filler: also replace the end-of-text filler behind the text, as the released code does. It teaches that junk becomes
        end of text, which a sampler that rewrites then writes inside texts
    """

    def __init__(
        self,
        *,
        special: SpecialIds,
        rate: float,
        source: str = "uniform",
        dynamic: bool = False,
        filler: bool = False,
    ) -> None:
        if not 0 <= rate <= 1:
            raise UserError(f"the replacement rate must be within 0..1, got {rate}")
        if source not in ("uniform", "response"):
            raise UserError(f"source must be 'uniform' or 'response', got {source!r}")
        self.rate, self.source, self.dynamic, self.filler = rate, source, dynamic, filler
        self.eos, self.eot = special.eos, special.eot
        forbidden = {*special.banned, *special.unwritten, special.mask, special.eos, special.eot}
        self.ordinary = torch.tensor([i for i in range(special.vocab_size) if i not in forbidden])
        self.rank = torch.full((special.vocab_size,), len(self.ordinary))  # index of an id among the ordinary ones
        self.rank[self.ordinary] = torch.arange(len(self.ordinary))

    def __call__(self, batch: Batch, state: Corrupted, noise: Noise) -> Corrupted:
        rate = state.rate.clamp(max=self.rate) if self.dynamic else torch.full_like(state.rate, self.rate)
        hit = noise.uniform(batch.editable) < rate[:, None]
        tokens = self.draw(batch, noise)
        hit &= state.where(Kind.CLEAN) & (tokens != state.target)
        if not self.filler:
            hit &= text_positions(state.target, self.eot)
        return write(state, hit, tokens, Kind.SYNTAX)

    def draw(self, batch: Batch, noise: Noise) -> Tensor:
        """(B, L) a replacement id for each position."""
        original = batch.response
        # the tables stay on the device of the batches, where the first one takes them
        self.ordinary, self.rank = (table.to(original.device) for table in (self.ordinary, self.rank))
        if self.source == "uniform":
            index = noise.integers(batch.editable, len(self.ordinary) - 1)
            index += index >= self.rank[original]  # skip the original: uniform over all others
            return self.ordinary[index]
        words = batch.editable & (original != self.eos) & (original != self.eot)
        place = (noise.uniform(batch.editable) * words.sum(1, keepdim=True)).long().clamp(max=original.shape[1] - 1)
        ordered = torch.argsort((~words).int(), dim=1, stable=True)  # words first
        return original.gather(1, ordered.gather(1, place))


class Span:
    """Replace spans by their flawed versions where the text is still clean (hallucinations, or mistakes of a draft).

    num: number of spans used in each row, chosen at random; None: all. kind: label of their tokens
    """

    def __init__(self, *, num: int | None = 1, kind: Kind = Kind.HALLUCINATION) -> None:
        if num is not None and num < 1:
            raise UserError(f"num must be at least 1 or null, got {num}")
        self.num, self.kind = num, kind

    def __call__(self, batch: Batch, state: Corrupted, noise: Noise) -> Corrupted:
        hit = self._span_positions(batch, noise) & state.where(Kind.CLEAN)
        return write(state, hit, batch.flawed, self.kind)

    def _span_positions(self, batch: Batch, noise: Noise) -> Tensor:
        """(B, L) bool: the positions of the spans to use."""
        if self.num is None:
            return batch.span > 0
        present = _spans_at(batch, batch.span > 0)  # (B, S)
        rank = noise.uniform(present).argsort(1).argsort(1)  # random order; absent spans come last
        return _within(batch, present & (rank < self.num))


class ShowGaps:
    """Show spans whose correction contains a gap token already corrected, each with probability `correct_rate`.

    The next pass of a sampler sees the gaps that this one has written; only these spans teach a model to keep them.
    """

    def __init__(self, *, gap: int, correct_rate: float) -> None:
        if not 0 <= correct_rate <= 1:
            raise UserError(
                f"the share of spans with gaps that are shown corrected must be within 0..1, got {correct_rate}"
            )
        self.gap, self.correct_rate = gap, correct_rate

    def __call__(self, batch: Batch, state: Corrupted, noise: Noise) -> Corrupted:
        gapped = _spans_at(batch, batch.response == self.gap)  # (B, S)
        corrected = _within(batch, gapped & (noise.uniform(gapped) < self.correct_rate))
        return Corrupted(torch.where(corrected, state.target, state.tokens), state.target, state.kind, state.rate)


class Trajectory:
    """Take drafts back to a state that the sampler passed through: mask what it had not unmasked yet.

    A draft that took S steps is shown after step S - floor(t S), so that about t of it is masked; t < 1/S shows all of
    it. Tokens that a reviser rewrote later are shown as they were in the end. Other rows stay as they are.

    Raises UserError if a draft does not say when its tokens were unmasked.
    """

    def __init__(self, *, special: SpecialIds) -> None:
        self.mask_id = special.mask

    def __call__(self, batch: Batch, state: Corrupted, noise: Noise) -> Corrupted:
        if batch.unmasked_at is None:
            raise UserError(
                "a round was drafted by a version that did not keep when each token was unmasked: draft and revise it "
                "again, or train on finished drafts with conf=stage2"
            )
        num_steps = batch.unmasked_at.amax(1) + 1  # (B,)
        shown = num_steps - (state.rate * num_steps).long()  # (B,) steps made
        hit = (batch.unmasked_at >= shown[:, None]) & state.where(Kind.CLEAN)
        return write(state, hit, torch.full_like(state.tokens, self.mask_id), Kind.MASK)


def _spans_at(batch: Batch, where: Tensor) -> Tensor:
    """(B, S) bool: the spans with a token at a true position of `where` (B, L)."""
    spans = torch.zeros(len(where), where.shape[1] + 1, dtype=torch.bool, device=where.device)
    return spans.scatter_(1, batch.span * where, True)[:, 1:]  # a text has at most as many spans as tokens


def _within(batch: Batch, spans: Tensor) -> Tensor:
    """(B, L) bool: the positions inside the true ones of `spans` (B, S)."""
    return torch.cat([spans.new_zeros(len(spans), 1), spans], 1).gather(1, batch.span)


class Hybrid:
    """Masks and random tokens from one process (GIDD, arXiv 2503.04482, with g = 1).

    At noise level t a token stays with weight 1 - t, is masked with weight t, and replaced with weight
    c = 2 p_u / (1 - p_u) sqrt(t (1 - t)); the probabilities are these divided by their sum, 1 + c. A replacement never
    equals the original here, which lacks 1/V of that weight. share: p_u, the probability of a random token at t = 1/2
    """

    def __init__(self, *, special: SpecialIds, share: float) -> None:
        if not 0 <= share < 1:
            raise UserError(f"the share of random tokens must be at least 0 and less than 1, got {share}")
        self.share, self.mask_id = share, special.mask
        self.replace = Replace(special=special, rate=1.0)

    def __call__(self, batch: Batch, state: Corrupted, noise: Noise) -> Corrupted:
        t = state.rate
        c = 2 * self.share / (1 - self.share) * (t * (1 - t)).clamp(min=0).sqrt()
        chance, clean = noise.uniform(batch.editable) * (1 + c)[:, None], state.where(Kind.CLEAN)
        masked = clean & (chance < t[:, None])
        replaced = clean & ~masked & (chance < (t + c)[:, None])
        state = write(state, masked, torch.full_like(state.tokens, self.mask_id), Kind.MASK)
        return write(state, replaced, self.replace.draw(batch, noise), Kind.SYNTAX)


OPERATIONS = ("substitute", "swap", "duplicate", "shift")


class EditNoise:
    """Random edits of the text, one after another (SEED Diffusion, arXiv 2508.02193). No masks.

    A text of n tokens, eot included, gets floor(a n) edits, a uniform on [0, rate]: `substitute` a random token, `swap`
    two neighbours, `duplicate` a token over its right neighbour, or `shift` up to `window` tokens left by one position:
    the token before them is deleted, and a random one inserted behind them. Insertions and deletions come in such
    pairs, because one alone would move all text behind it, and the model cannot move text.
    """

    def __init__(
        self, *, special: SpecialIds, rate: float, operations: Sequence[str] = OPERATIONS, window: int = 4
    ) -> None:
        if not 0 <= rate <= 1:
            raise UserError(f"the rate of edits must be within 0..1, got {rate}")
        if not operations or set(operations) - set(OPERATIONS):
            raise UserError(f"operations must be one or more of {OPERATIONS}, got {list(operations)}")
        if window < 1:
            raise UserError(f"window must be at least 1, got {window}")
        self.rate, self.operations, self.window, self.eot = rate, tuple(operations), window, special.eot
        self.replace = Replace(special=special, rate=1.0)

    def __call__(self, batch: Batch, state: Corrupted, noise: Noise) -> Corrupted:
        level = noise.level().tolist()  # (B,), a / rate
        operations, places, lengths = (noise.uniform(batch.editable).tolist() for _ in range(3))
        tokens = self.replace.draw(batch, noise).tolist()
        edited = state.tokens.tolist()
        for row, clean in enumerate((state.where(Kind.CLEAN) & text_positions(state.target, self.eot)).tolist()):
            where = [place for place, is_clean in enumerate(clean) if is_clean]
            text = [edited[row][place] for place in where]
            for edit in range(int(level[row] * self.rate * len(text))):
                at = where[edit]  # the random numbers of the n-th edit are those of the n-th clean position
                operation = self.operations[int(operations[row][at] * len(self.operations))]
                span = 1 + int(lengths[row][at] * self.window)
                _edit(text, operation, int(places[row][at] * len(text)), span, tokens[row][at])
            for place, token in zip(where, text, strict=True):
                edited[row][place] = token
        new_tokens = torch.tensor(edited, device=state.tokens.device).reshape(state.tokens.shape)
        return write(state, new_tokens != state.tokens, new_tokens, Kind.SYNTAX)


def _edit(text: list[int], operation: str, place: int, span: int, token: int) -> None:
    """Edit `text` in place, at index `place`. Without a right neighbour, `swap` and `duplicate` do nothing."""
    last = min(place + span, len(text) - 1)
    if operation == "substitute":
        text[place] = token
    elif operation == "shift":
        text[place : last + 1] = [*text[place + 1 : last + 1], token]
    elif place + 1 < len(text):
        right, left = text[place], text[place + 1] if operation == "swap" else text[place]
        text[place : place + 2] = [left, right]


class Only:
    """One corruption and no further one: the tokens that it leaves clean get the kind `rest`."""

    def __init__(self, corruption: Corruption, *, rest: Kind) -> None:
        self.corruption, self.rest = corruption, rest

    def __call__(self, batch: Batch, state: Corrupted, noise: Noise) -> Corrupted:
        state = self.corruption(batch, state, noise)
        return write(state, state.where(Kind.CLEAN), state.tokens, self.rest)


class Chain:
    """Several corruptions, one after another."""

    def __init__(self, *steps: Corruption) -> None:
        self.steps: Sequence[Corruption] = steps

    def __call__(self, batch: Batch, state: Corrupted, noise: Noise) -> Corrupted:
        for step in self.steps:
            state = step(batch, state, noise)
        return state


class Choose:
    """`then` for some rows, `otherwise` for the others.

    when: `drafted` = rows of an online round, `spans` = rows with hallucinated spans
    share: fraction of these rows that get `then`, chosen at random
    """

    def __init__(self, *, when: str, then: Corruption, otherwise: Corruption, share: float = 1.0) -> None:
        if when not in ("drafted", "spans"):
            raise UserError(f"when must be 'drafted' or 'spans', got {when!r}")
        if not 0 <= share <= 1:
            raise UserError(f"share must be within 0..1, got {share}")
        self.when, self.then, self.otherwise, self.share = when, then, otherwise, share

    def __call__(self, batch: Batch, state: Corrupted, noise: Noise) -> Corrupted:
        rows = batch.drafted if self.when == "drafted" else (batch.span > 0).any(1)
        rows = (rows & (noise.level(device=rows.device) < self.share))[:, None]
        then, otherwise = self.then(batch, state, noise), self.otherwise(batch, state, noise)
        tokens = torch.where(rows, then.tokens, otherwise.tokens)
        kind = torch.where(rows, then.kind, otherwise.kind)
        return Corrupted(tokens, state.target, kind, state.rate)
