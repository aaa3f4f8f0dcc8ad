"""Text diagnostics that need no model and no network: degeneration, overlap with references.

    TextHealth         words, repeated bigrams, doubled words, empty captions, variety of the whole set (distinct-2)
    ReferenceOverlap   word F1 against the best reference
    Bleu               corpus BLEU-4 against all references
    response_counts    from token ids: text length, truncation, leftover masks and end-of-text ids

Quality metrics can look good while a text degenerates; these are cheap enough to be always on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torchmetrics.text import BLEUScore

from src.io.errors import UserError
from src.metrics.caption import CaptionMetric, Stat, hash64
from src.types import SpecialIds

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
    ids = list(ids)
    ended = special.eot in ids or ids[-1] == special.eos
    inner = ids[: ids.index(special.eot)] if special.eot in ids else ids
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


class TextHealth(CaptionMetric):
    """Signs of degeneration.

    Per caption: `words`, the number of words; `duplicate_bigrams`, the share of bigrams that repeat an earlier one;
    `doubled_words`, the number of words equal to the word before; `empty`, 1 if there are no words. Over all captions:
    `distinct_2`, the number of distinct bigrams divided by the number of bigrams, without a standard error.
    """

    names = ("words", "duplicate_bigrams", "doubled_words", "empty")
    bigrams: list[Tensor] | Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("bigrams", [], dist_reduce_fx="cat")  # hashes

    def score(self, text: str, record: dict) -> dict[str, float]:
        words = words_of(text)
        pairs = list(pairwise(words))
        return {
            "words": float(len(words)),
            "duplicate_bigrams": 1 - len(set(pairs)) / len(pairs) if pairs else 0.0,
            "doubled_words": float(sum(a == b for a, b in pairs)),
            "empty": float(not words),
        }

    def update(self, texts: Sequence[str], records: Sequence[dict]) -> None:
        super().update(texts, records)
        assert isinstance(self.bigrams, list)
        hashes = [hash64("\n".join(pair)) for text in texts for pair in pairwise(words_of(text))]
        self.bigrams.append(torch.tensor(hashes, dtype=torch.int64, device=self.total.device))

    def compute(self) -> dict[str, Stat]:
        stats = super().compute()
        hashes: Tensor = torch.cat(self.bigrams) if isinstance(self.bigrams, list) else self.bigrams
        distinct = len(hashes.unique()) / len(hashes) if len(hashes) else 0.0
        return {**stats, "distinct_2": Stat(mean=distinct, se=None, n=int(self.count))}


class ReferenceOverlap(CaptionMetric):
    """`word_f1`: F1 of the bags of words of caption and reference, for the best reference."""

    higher_is_better = True
    names = ("word_f1",)

    def score(self, text: str, record: dict) -> dict[str, float]:
        words = words_of(text)
        return {"word_f1": max(_f1(words, words_of(reference)) for reference in references_of(record))}


class Bleu(BLEUScore):
    """`bleu`: corpus BLEU-4 of the words against all references, without a standard error."""

    full_state_update = False  # the states are sums
    count: Tensor

    def __init__(self) -> None:
        super().__init__(n_gram=4)
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, texts: Sequence[str], records: Sequence[dict]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        captions = [" ".join(words_of(text)) for text in texts]
        references = [[" ".join(words_of(text)) for text in references_of(record)] for record in records]
        super().update(captions, references)
        self.count += len(texts)

    def compute(self) -> dict[str, Stat]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return {"bleu": Stat(mean=float(super().compute()), se=None, n=int(self.count))}


def references_of(record: dict) -> list[str]:
    """All reference captions of a record. Raises UserError if there are none."""
    texts = [caption["text"] for caption in record.get("captions", ())]
    if not texts:
        raise UserError(f"record {record.get('key', '?')!r} has no captions to compare with")
    return texts


def _f1(words: list[str], reference: list[str]) -> float:
    shared = sum((Counter(words) & Counter(reference)).values())
    return 2 * shared / (len(words) + len(reference)) if shared else 0.0
