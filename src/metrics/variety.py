"""Variety of texts: unigram entropy, repeated n-grams, and distinct n-grams of the whole set.

Dull texts have a low generative perplexity, so read it together with these, as MDLM, ReMDM and ProSeCo report it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch

from src.io.errors import UserError
from src.metrics.caption import CaptionMetric, Stat, hash64
from src.metrics.text import words_of
from src.text.tokenizer import Codec


class Variety(CaptionMetric):
    """Per text: `entropy` of its units in nats, and for each size n `repeat_n`, the share of n-grams that repeat an
    earlier one (seq-rep-n, arXiv 1908.04319). Over all texts: `distinct_n`, the number of distinct n-grams divided by
    the number of n-grams, without a standard error.

    unit: `words`, or `tokens` of the model's tokenizer (`codec`, passed by the verb); names then start with `token_`

    Raises UserError for invalid sizes, an unknown unit, or tokens without a codec.
    """

    def __init__(
        self,
        *,
        sizes: Sequence[int] = (1, 2, 3),
        unit: Literal["words", "tokens"] = "words",
        codec: Codec | None = None,
    ) -> None:
        if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
            raise UserError(f"sizes must be distinct integers of at least 1, got {list(sizes)}")
        if unit not in ("words", "tokens") or (unit == "tokens" and codec is None):
            raise UserError(f"unit must be 'words', or 'tokens' with a codec, got {unit!r}")
        self.name_prefix = "token_" if unit == "tokens" else ""
        self.names = tuple(f"{self.name_prefix}{name}" for name in ("entropy", *(f"repeat_{n}" for n in sizes)))
        super().__init__()
        self.sizes, self.unit, self.codec = tuple(sizes), unit, codec
        for n in self.sizes:  # hashes
            self.add_state(f"grams_{n}", [], dist_reduce_fx="cat")

    def score(self, text: str, record: dict) -> dict[str, float]:
        units = self._units(text)
        ngrams_by_size = [_ngrams(units, n) for n in self.sizes]
        repeats = [1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0 for ngrams in ngrams_by_size]
        return dict(zip(self.names, [unigram_entropy(units), *repeats], strict=True))

    def update(self, texts: Sequence[str], records: Sequence[dict]) -> None:
        super().update(texts, records)
        for n in self.sizes:
            hashes = [hash64("\n".join(ngram)) for text in texts for ngram in _ngrams(self._units(text), n)]
            getattr(self, f"grams_{n}").append(torch.tensor(hashes, dtype=torch.int64, device=self.total.device))

    def compute(self) -> dict[str, Stat]:
        stats = super().compute()
        for n in self.sizes:
            state = getattr(self, f"grams_{n}")
            hashes = torch.cat(state) if isinstance(state, list) else state
            distinct = len(hashes.unique()) / len(hashes) if len(hashes) else 0.0
            stats[f"{self.name_prefix}distinct_{n}"] = Stat(mean=distinct, se=None, n=int(self.count))
        return stats

    def _units(self, text: str) -> list[str]:
        if self.codec is None or self.unit == "words":
            return words_of(text)
        return [str(token) for token in self.codec.encode(text)[0]]


def unigram_entropy(units: Sequence[str]) -> float:
    """Entropy in nats of the unit frequencies of one text; 0 for an empty text."""
    shares = [count / len(units) for count in Counter(units).values()]
    return -sum(share * math.log(share) for share in shares)


def _ngrams(units: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
