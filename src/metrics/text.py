"""Text diagnostics that need no model and no network: degeneration, words shared with references, counts of token ids.

Quality metrics can look good while a text degenerates; these are cheap enough to be always on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from src.io.errors import UserError
from src.metrics.caption import CaptionMetric, Ngram, NgramMetric, repeated_share
from src.text.captions import SPECIAL
from src.types import SpecialIds

_MARK = re.compile(r"[.,;:!?](?:\s*[.,;:!?])+")
_END = re.compile(r"[.!?][\"'\u201d\u2019)\]]*\s*\Z")
_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")


def words_of(text: str) -> list[str]:
    """Lower-case words of a text, without punctuation."""
    return _WORD.findall(text.lower())


def response_counts(ids: Sequence[int], special: SpecialIds) -> dict[str, float]:
    """Counts of one response's ids (L,).

    tokens: number of text tokens, without gaps; gaps: number of gap tokens in the text, if the tokenizer has one
    cut: 1 if the text fills the response length without an end
    leftover_masks: number of masks in the text
    inner_eos: share of end-of-text ids before eot (without eot: before the filler); decoding drops them
    """
    ended = special.eot in ids or ids[-1] == special.eos
    inner = list(ids[: ids.index(special.eot)] if special.eot in ids else ids)
    while special.eot not in ids and inner and inner[-1] == special.eos:
        inner = inner[:-1]
    text = [i for i in inner if i != special.eos]
    gaps = sum(i == special.gap for i in text)
    return {
        "tokens": float(len(text) - gaps),
        "cut": float(not ended),
        "leftover_masks": float(text.count(special.mask)),
        "inner_eos": 1 - len(text) / len(inner) if inner else 0.0,
        **({} if special.gap is None else {"gaps": float(gaps)}),
    }


class TextHealth(NgramMetric):
    """Signs of degenerate text, whoever wrote it. Over all captions `distinct_2`, the number of distinct bigrams
    divided by the number of bigrams, without a standard error. Per caption:

    words: number of words; empty: 1 if there are none
    duplicate_bigrams: share of bigrams that repeat an earlier one
    longest_repeat: words of the longest sequence that occurs twice
    doubled_words: number of words equal to the word before
    punctuation_runs: number of runs of punctuation marks, such as `..` or `. ,`
    unfinished: 1 if a text with words does not end a sentence, as one that was cut off
    special_tokens: number of special tokens left in the text, such as `<|eot_id|>` or `[MASK]`
    """

    names = (
        *("words", "empty", "duplicate_bigrams", "longest_repeat", "doubled_words"),
        *("punctuation_runs", "unfinished", "special_tokens"),
    )

    def __init__(self) -> None:
        super().__init__(distinct=["distinct_2"])

    def ngrams(self, text: str) -> dict[str, list[Ngram]]:
        return {"distinct_2": list(pairwise(words_of(text)))}

    def score(self, text: str, record: dict) -> dict[str, float]:
        words = words_of(text)
        pairs = list(pairwise(words))
        return {
            "words": float(len(words)),
            "empty": float(not words),
            "duplicate_bigrams": repeated_share(pairs),
            "longest_repeat": float(longest_repeat(words)),
            "doubled_words": float(sum(a == b for a, b in pairs)),
            "punctuation_runs": float(len(_MARK.findall(text))),
            "unfinished": float(bool(words) and not _END.search(text)),
            "special_tokens": float(len(SPECIAL.findall(text))),
        }


def longest_repeat(words: Sequence[str]) -> int:
    """Length of the longest sequence of words that occurs twice; the two may overlap."""
    longest = 0
    while len({tuple(words[i : i + longest + 1]) for i in range(len(words) - longest)}) < len(words) - longest:
        longest += 1
    return longest


class ReferenceOverlap(CaptionMetric):
    """`word_f1`: F1 of the bags of words of caption and reference, for the best reference."""

    higher_is_better = True
    names = ("word_f1",)

    def score(self, text: str, record: dict) -> dict[str, float]:
        words, best = words_of(text), 0.0
        for reference in map(words_of, references_of(record)):
            if shared := (Counter(words) & Counter(reference)).total():
                best = max(best, 2 * shared / (len(words) + len(reference)))
        return {"word_f1": best}


def references_of(record: dict) -> list[str]:
    """All reference captions of a record. Raises UserError if there are none."""
    texts = [caption["text"] for caption in record.get("captions", ())]
    if not texts:
        raise UserError(f"record {record.get('key', '?')!r} has no captions to compare with")
    return texts
