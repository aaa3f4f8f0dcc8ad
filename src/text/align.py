"""Text edits to token spans: an expert corrects characters, a diffusion model is trained on tokens.

    locate(codec, draft_ids, edits) -> Aligned          edits of a draft, as spans of its tokens
    apply_spans(ids, spans) -> ids                      the corrected draft
    locate_swap(codec, text, start, end, wrong)         a false version of one phrase of a caption, as tokens

The draft is whatever a model wrote, so its ids need not be the tokenizer's own choice for its text. Hence:

    edit -> characters of the draft text -> widened to token borders of the draft -> new text of those tokens
         -> encoded -> equally many tokens? -> without the tokens that stay the same -> Span

With a gap in the codec, a token that decodes to nothing, an edit may change the number of tokens: a shorter text gets
gaps as targets, and where the text is longer, gaps are put into the draft (`Aligned.ids`), whose text stays the same.

An edit that cannot be had by replacing tokens in this way is dropped and counted under its reason:

    empty           nothing is quoted
    no_change       it changes no token
    absent          the quoted text is not in the draft
    ambiguous       it occurs several times, and no (valid) place is given
    unequal_length  the new text has more or fewer tokens, and the codec has no gap
    overlap         an edit accepted before touches the same characters or tokens
    unknown         the tokenizer lacks a character of the new text, and would leave it out
    misaligned      the new tokens do not decode to the new text
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from src.text.tokenizer import Codec
from src.types import Edit

RESIZED = ("stretched", "shortened", "filled")  # what edits with gaps do, see `Aligned`


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `end` (exclusive) of a draft are wrong: `target_ids`, equally many, are right.

    `org`, `target` and `kind` are those of the edit that it came from.
    """

    start: int
    end: int
    target_ids: list[int]
    org: str
    target: str
    kind: str = ""


@dataclass(frozen=True)
class Aligned:
    """The spans of a draft, in order and apart from each other; how many edits were dropped, by reason.

    ids: the draft, with the gaps that were put into it; the spans are places in these
    resized: how many edits changed the number of tokens (RESIZED): `stretched` with gaps put into the draft,
        `shortened` to tokens and gaps, or `filled` gaps that it had
    """

    spans: list[Span]
    rejected: Counter[str]
    ids: list[int] = field(default_factory=list)
    resized: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Placed:
    """An edit in both worlds: `text[start:end]` becomes `new`, and the same as tokens.

    The span is one of the draft as it was; its target is longer by the gaps to put in at its end, or fewer tokens than
    before are followed by gaps.
    """

    start: int
    end: int
    new: str
    span: Span

    @property
    def room(self) -> int:
        """How many gaps the draft needs."""
        return len(self.span.target_ids) - (self.span.end - self.span.start)


class _RejectedError(Exception):
    """The reason why an edit is dropped."""


def locate(codec: Codec, draft_ids: Sequence[int], edits: Sequence[Edit]) -> Aligned:
    """Find the token span of every edit; of edits that overlap the first one wins."""
    ids, rejected = list(draft_ids), Counter[str]()
    placed: list[_Placed] = []
    if edits:
        text = codec.decode(ids)
        borders = _borders(codec, ids, text)
        for edit in edits:
            try:
                found = _place(codec, ids, text, borders, edit)
                _check(codec, ids, text, placed, found)
                placed.append(found)
            except _RejectedError as reason:
                rejected[str(reason)] += 1
    return _stretched(codec, ids, placed, rejected)


def apply_spans(ids: Sequence[int], spans: Sequence[Span]) -> list[int]:
    """The ids with every span replaced by its target."""
    out = list(ids)
    for span in spans:
        out[span.start : span.end] = span.target_ids
    return out


def locate_swap(codec: Codec, text: str, start: int, end: int, wrong: str) -> tuple[int, int, list[int]] | None:
    """Tokens of a caption that change when `text[start:end]` becomes `wrong`: (first, end, the wrong ids).

    None where that is no replacement of equally many tokens of the phrase itself.
    """
    right_ids, offsets = codec.encode(text)
    wrong_ids, wrong_offsets = codec.encode(text[:start] + wrong + text[end:])
    if len(right_ids) != len(wrong_ids):
        return None
    first, stop = _differing(right_ids, wrong_ids)
    if first == stop:
        return None
    inside = offsets[first][1] > start and offsets[stop - 1][0] < end
    known = _covers(wrong_offsets, wrong, start)
    return (first, stop, wrong_ids[first:stop]) if inside and known else None


def _borders(codec: Codec, ids: list[int], text: str) -> list[tuple[int, int]]:
    """(character, token) pairs: the first `token` ids decode to exactly the first `character` characters.

    Inside a character that is spread over several tokens there is no border; a special token has one on both sides at
    the same character. Where the texts of single tokens do not say it, every beginning of the draft is decoded, which
    holds for any decoder and any ids, but takes time quadratic in the length.
    """
    if (pieces := codec.pieces(ids)) is not None:
        return [(char, token) for token, char in enumerate(accumulate(map(len, pieces), initial=0))]
    length = ids.index(codec.eot_id) if codec.eot_id in ids else len(ids)
    heads = ((codec.decode(ids[:token]), token) for token in range(length + 1))
    return [(len(head), token) for head, token in heads if text.startswith(head)]


def _place(codec: Codec, ids: list[int], text: str, borders: list[tuple[int, int]], edit: Edit) -> _Placed:
    """Characters, then tokens, then the tokens that really differ."""
    if not edit.org:
        raise _RejectedError("empty")
    head, tail = _shared_words(edit.org, edit.target)
    first_char = _position(text, edit) + head
    stop_char = first_char - head + len(edit.org) - tail
    new = edit.target[head : len(edit.target) - tail]
    if text[first_char:stop_char] == new:
        raise _RejectedError("no_change")
    left, start = max((b for b in borders if b[0] <= first_char), key=lambda b: b[1])
    right, end = min((b for b in borders if b[0] >= stop_char and b[1] > start), key=lambda b: b[1])
    target, offsets = codec.encode(text[left:first_char] + new + text[stop_char:right])
    if not _covers(offsets, new, first_char - left):
        raise _RejectedError("unknown")
    first, stop, target = _smallest(codec, ids, start, end, target)
    if first == stop and not target:
        raise _RejectedError("no_change")
    return _Placed(first_char, stop_char, new, Span(first, stop, target, edit.org, edit.target, edit.kind))


def _smallest(codec: Codec, ids: list[int], start: int, end: int, target: list[int]) -> tuple[int, int, list[int]]:
    """(first, end, new ids) of the tokens within start..end that differ from a target, at least one new id for each.

    More new ids than tokens, perhaps for none, stand for gaps that are put in; gaps that are there already are used
    up first. Fewer are filled up with gaps.
    """
    if len(target) != end - start:
        if codec.gap_id is None:
            raise _RejectedError("unequal_length")
        old = ids[start:end]
        kept = [place for place, token in enumerate(old) if token != codec.gap_id]
        if len(kept) == len(target):  # the gaps of the draft stay where they are
            new = dict(zip(kept, target, strict=True))
            target = [new.get(place, token) for place, token in enumerate(old)]
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
    """Whether tokens stand for all characters of a part of an encoded text, blanks aside."""
    covered = {char for a, b in offsets for char in range(a, b)}
    return all(char in covered for char, letter in enumerate(part, start) if not letter.isspace())


def _stretched(codec: Codec, ids: list[int], placed: list[_Placed], rejected: Counter[str]) -> Aligned:
    """The draft with the gaps that its edits need, each behind the tokens that its edit replaces."""
    gap = [] if codec.gap_id is None else [codec.gap_id]
    out, spans, resized, done = list[int](), list[Span](), Counter[str](), 0
    for change in sorted(placed, key=lambda p: (p.span.start, p.span.end, p.start)):  # insertions before their token
        span, old = change.span, ids[change.span.start : change.span.end]
        out += ids[done : span.start]
        start, done = len(out), span.end
        out += old + change.room * gap
        spans.append(replace(span, start=start, end=len(out)))
        more = sum(map(span.target_ids.count, gap)) - sum(map(old.count, gap))
        if change.room or more:
            resized["stretched" if change.room else "shortened" if more > 0 else "filled"] += 1
    return Aligned(spans, rejected, out + ids[done:], resized)


def _check(codec: Codec, ids: list[int], text: str, placed: list[_Placed], found: _Placed) -> None:
    """An edit must not meet an earlier one, and the corrected tokens must read as the corrected text."""
    for other in placed:
        same_text = found.start < other.end and other.start < found.end
        same_tokens = found.span.start < other.span.end and other.span.start < found.span.end
        if same_text or same_tokens:
            raise _RejectedError("overlap")
    together = sorted([*placed, found], key=lambda p: p.start, reverse=True)
    for change in together:
        text = text[: change.start] + change.new + text[change.end :]
    changed = _stretched(codec, ids, together, Counter())
    if codec.decode(apply_spans(changed.ids, changed.spans)) != text:
        raise _RejectedError("misaligned")


def _position(text: str, edit: Edit) -> int:
    """Where the quoted text starts: at the given place if it stands there, else at its only occurrence.

    Whole words go first: "red" is not looked for in "scattered" as long as it stands alone somewhere.
    """
    org, given = edit.org, edit.start_char
    if given is not None and given >= 0 and text.startswith(org, given):
        return given
    found = [i for i in range(len(text)) if text.startswith(org, i)]
    found = [i for i in found if _is_whole(text, i, i + len(org))] or found
    if len(found) != 1:
        raise _RejectedError("ambiguous" if found else "absent")
    return found[0]


def _is_whole(text: str, start: int, end: int) -> bool:
    """Whether no word goes on over the ends of a range."""
    opens = start == 0 or not (text[start - 1].isalnum() and text[start].isalnum())
    return opens and (end == len(text) or not (text[end - 1].isalnum() and text[end].isalnum()))


def _shared_words(org: str, target: str) -> tuple[int, int]:
    """How many characters of whole words two texts share at their start and at their end."""
    head = max(org[: _num_shared(org, target)].rfind(" "), 0)
    rest = org[head:]
    tail = rest[len(rest) - _num_shared(rest[::-1], target[head:][::-1]) :]
    return head, len(tail) - tail.find(" ") if " " in tail else 0


def _num_shared(one: Sequence[str | int], two: Sequence[str | int]) -> int:
    """How many characters or tokens two texts share at their start."""
    pairs = enumerate(zip(one, two, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(two)))


def _differing(old: Sequence[int], new: Sequence[int]) -> tuple[int, int]:
    """The shortest range outside of which two lists of equal length agree; empty where they are equal."""
    places = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    return (places[0], places[-1] + 1) if places else (0, 0)
