"""Edits to token spans: an expert corrects characters, a diffusion model is trained on tokens.

    locate(codec, draft_ids, edits) -> Aligned          edits of a draft, as spans of its tokens
    apply_spans(ids, spans) -> ids                      the corrected draft
    locate_swap(codec, text, start, end, wrong)         tokens of a false version of one phrase in a caption

The token ids of a draft come from a model, so they may differ from the tokenizer's encoding of the same text. Hence:

    edit -> characters of the draft text -> widened to token boundaries of the draft -> new text of those tokens
         -> encoded -> same number of tokens? -> without tokens that stay the same -> Span

If the codec has a gap, a token that decodes to nothing, an edit may change the number of tokens: a shorter target is
padded with gaps, and for a longer one gaps are inserted into the draft (`Aligned.ids`), whose text stays the same.

An edit that cannot be expressed as such a replacement is dropped and counted by reason:

    empty           it quotes nothing
    no_change       it changes no token
    absent          the quoted text is not in the draft
    ambiguous       the quoted text occurs several times, and the edit gives no (valid) position
    unequal_length  the new text has more or fewer tokens, and the codec has no gap
    overlap         it touches characters or tokens of an edit accepted before
    unknown         the tokenizer lacks a character of the new text and would drop it
    misaligned      the new tokens do not decode to the new text
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, takewhile

from src.text.tokenizer import Codec
from src.types import Edit

Encoded = tuple[list[int], list[tuple[int, int]]]  # ids, and the characters of each
RESIZED = ("stretched", "shortened", "filled")  # how edits with gaps change the number of tokens, see `Aligned`


@dataclass(frozen=True)
class Span:
    """Wrong tokens `start` to `end` (exclusive) of a draft, and as many right ones."""

    start: int
    end: int
    target_ids: list[int]
    org: str  # as in the edit, like the next two
    target: str
    kind: str = ""


@dataclass(frozen=True)
class Aligned:
    """The sorted, disjoint spans of a draft, and the number of dropped edits by reason.

    ids: the draft with the gaps inserted into it; spans index into these
    resized: number of edits that changed the number of tokens: `stretched` inserted gaps into the draft, `shortened`
        have gaps in their target, `filled` replaced gaps of the draft by tokens
    """

    spans: list[Span]
    rejected: Counter[str]
    ids: list[int] = field(default_factory=list)
    resized: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Placed:
    """An edit as characters, `text[start:end]` becomes `new`, and as tokens.

    The span indexes the draft before any gap is inserted. A target longer than its span needs gaps inserted at the
    span's end; a shorter one is already padded with gaps.
    """

    start: int
    end: int
    new: str
    span: Span


class _RejectedError(Exception):
    """The reason why an edit is dropped."""


def locate(codec: Codec, draft_ids: Sequence[int], edits: Sequence[Edit]) -> Aligned:
    """Find the token span of every edit; of overlapping edits the first one wins."""
    ids, rejected = list(draft_ids), Counter[str]()
    placed: list[_Placed] = []
    if edits:
        text = codec.decode(ids)
        boundaries = _boundaries(codec, ids, text)
        for edit in edits:
            try:
                candidate = _place(codec, ids, text, boundaries, edit)
                _check(codec, ids, text, placed, candidate)
                placed.append(candidate)
            except _RejectedError as reason:
                rejected[str(reason)] += 1
    return _insert_gaps(codec, ids, placed, rejected)


def apply_spans(ids: Sequence[int], spans: Sequence[Span]) -> list[int]:
    out = list(ids)
    for span in spans:
        out[span.start : span.end] = span.target_ids
    return out


def locate_swap(
    codec: Codec, text: str, start: int, end: int, wrong: str, *, encoded: Encoded | None = None
) -> tuple[int, int, list[int]] | None:
    """Tokens of a caption that change when `text[start:end]` becomes `wrong`: (first, end, wrong ids).

    None if the number of tokens changes, or tokens outside the phrase do. encoded: `codec.encode(text)`, if known
    """
    right_ids, offsets = encoded or codec.encode(text)
    wrong_ids, wrong_offsets = codec.encode(text[:start] + wrong + text[end:])
    if len(right_ids) != len(wrong_ids) or right_ids == wrong_ids:
        return None
    first, stop = _differing(right_ids, wrong_ids)
    inside = offsets[first][1] > start and offsets[stop - 1][0] < end
    encodable = _covers(wrong_offsets, wrong, start)
    return (first, stop, wrong_ids[first:stop]) if inside and encodable else None


def _boundaries(codec: Codec, ids: list[int], text: str) -> list[tuple[int, int]]:
    """(character, token) pairs: the first `token` ids decode to exactly the first `character` characters.

    There is none inside a character that several tokens share; a special token has one on each side, at the same
    character. Where `Codec.pieces` is None every prefix of the draft is decoded, which works for any decoder and any
    ids but is quadratic in the length.
    """
    if (pieces := codec.pieces(ids)) is not None:
        return [(char, token) for token, char in enumerate(accumulate(map(len, pieces), initial=0))]
    length = ids.index(codec.eot_id) if codec.eot_id in ids else len(ids)
    heads = ((codec.decode(ids[:token]), token) for token in range(length + 1))
    return [(len(head), token) for head, token in heads if text.startswith(head)]


def _place(codec: Codec, ids: list[int], text: str, boundaries: list[tuple[int, int]], edit: Edit) -> _Placed:
    if not edit.org:
        raise _RejectedError("empty")
    # 1. The characters, without the words that quote and target share at both ends
    head, tail = _shared_words(edit.org, edit.target)
    first_char = _position(text, edit) + head
    stop_char = first_char - head + len(edit.org) - tail
    new = edit.target[head : len(edit.target) - tail]
    if text[first_char:stop_char] == new:
        raise _RejectedError("no_change")
    # 2. The tokens that contain them, and what takes their place
    left, start = max((b for b in boundaries if b[0] <= first_char), key=lambda b: b[1])
    right, end = min((b for b in boundaries if b[0] >= stop_char and b[1] > start), key=lambda b: b[1])
    target, offsets = codec.encode(text[left:first_char] + new + text[stop_char:right])
    if not _covers(offsets, new, first_char - left):
        raise _RejectedError("unknown")
    # 3. The tokens that differ
    first, stop, target = _minimal_span(codec, ids, start, end, target)
    if first == stop and not target:
        raise _RejectedError("no_change")
    return _Placed(first_char, stop_char, new, Span(first, stop, target, edit.org, edit.target, edit.kind))


def _minimal_span(codec: Codec, ids: list[int], start: int, end: int, target: list[int]) -> tuple[int, int, list[int]]:
    """(first, end, new ids): the tokens of start..end that differ from a target, and their replacements.

    There are at least as many new ids as tokens: a shorter target is padded with gaps. A longer one first uses up
    adjacent gaps of the draft; if it stays longer (the token range may even be empty), gaps are inserted later.
    """
    if len(target) != end - start:
        if codec.gap_id is None:
            raise _RejectedError("unequal_length")
        old = ids[start:end]
        kept = [position for position, token in enumerate(old) if token != codec.gap_id]
        if len(kept) == len(target):  # the gaps of the draft stay in place
            new = dict(zip(kept, target, strict=True))
            target = [new.get(position, token) for position, token in enumerate(old)]
        else:
            head = _num_shared(old, target)
            tail = _num_shared(old[head:][::-1], target[head:][::-1])
            start, end, target = start + head, end - tail, target[head : len(target) - tail]
            while end - start < len(target) and ids[end : end + 1] == [codec.gap_id]:
                end += 1
            while end - start < len(target) and start and ids[start - 1] == codec.gap_id:
                start -= 1
            if end - start < len(target):
                return start, end, target
            target = target + (end - start - len(target)) * [codec.gap_id]
    first, stop = _differing(ids[start:end], target)
    return start + first, start + stop, target[first:stop]


def _covers(offsets: Sequence[tuple[int, int]], part: str, start: int) -> bool:
    """Whether tokens cover all characters of `part`, at `start` of an encoded text, except whitespace."""
    covered = {char for a, b in offsets for char in range(a, b)}
    return all(char in covered for char, letter in enumerate(part, start) if not letter.isspace())


def _insert_gaps(codec: Codec, ids: list[int], placed: list[_Placed], rejected: Counter[str]) -> Aligned:
    """Insert the gaps that the edits need into the draft, behind the tokens that each edit replaces."""
    gap = [] if codec.gap_id is None else [codec.gap_id]
    out, spans, resized, done = list[int](), list[Span](), Counter[str](), 0
    for change in sorted(placed, key=lambda p: (p.span.start, p.span.end, p.start)):  # insertions before their token
        span, old = change.span, ids[change.span.start : change.span.end]
        out += ids[done : span.start]
        start, done, num_inserted = len(out), span.end, len(span.target_ids) - len(old)
        out += old + num_inserted * gap
        spans.append(replace(span, start=start, end=len(out)))
        added_gaps = sum(map(span.target_ids.count, gap)) - sum(map(old.count, gap))
        if num_inserted or added_gaps:
            resized["stretched" if num_inserted else "shortened" if added_gaps > 0 else "filled"] += 1
    return Aligned(spans, rejected, out + ids[done:], resized)


def _check(codec: Codec, ids: list[int], text: str, placed: list[_Placed], candidate: _Placed) -> None:
    """Reject an edit that overlaps an earlier one, or whose corrected tokens do not decode to the corrected text."""
    span = candidate.span
    for other in placed:
        same_text = candidate.start < other.end and other.start < candidate.end
        same_tokens = span.start < other.span.end and other.span.start < span.end
        if same_text or same_tokens:
            raise _RejectedError("overlap")
    changes = sorted([*placed, candidate], key=lambda p: p.start, reverse=True)
    for change in changes:
        text = text[: change.start] + change.new + text[change.end :]
    changed = _insert_gaps(codec, ids, changes, Counter())
    if codec.decode(apply_spans(changed.ids, changed.spans)) != text:
        raise _RejectedError("misaligned")


def _position(text: str, edit: Edit) -> int:
    """Where the quoted text starts: at `start_char` if it occurs there, else at its only occurrence.

    Whole words take precedence: "red" matches inside "scattered" only if it never occurs as a word.
    """
    org, start_char = edit.org, edit.start_char
    if start_char is not None and start_char >= 0 and text.startswith(org, start_char):
        return start_char

    def cuts_a_word(place: int) -> bool:
        return 0 < place < len(text) and text[place - 1].isalnum() and text[place].isalnum()

    matches = [i for i in range(len(text)) if text.startswith(org, i)]
    matches = [i for i in matches if not cuts_a_word(i) and not cuts_a_word(i + len(org))] or matches
    if len(matches) != 1:
        raise _RejectedError("ambiguous" if matches else "absent")
    return matches[0]


def _shared_words(org: str, target: str) -> tuple[int, int]:
    """Number of characters of whole words that two texts share at their start and at their end."""
    head = max(org[: _num_shared(org, target)].rfind(" "), 0)
    behind = org[head:]
    tail = behind[len(behind) - _num_shared(behind[::-1], target[head:][::-1]) :]
    return head, len(tail) - tail.find(" ") if " " in tail else 0


def _num_shared(one: Sequence[str | int], two: Sequence[str | int]) -> int:
    """Length of the longest common prefix."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False))))


def _differing(old: Sequence[int], new: Sequence[int]) -> tuple[int, int]:
    """The shortest range outside of which two lists of equal length agree; empty if they are equal."""
    positions = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    return (positions[0], positions[-1] + 1) if positions else (0, 0)
