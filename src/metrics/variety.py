"""Variety of texts: unigram entropy, repeated n-grams, and distinct n-grams of the whole set.

Dull texts have a low generative perplexity, so read it together with these, as MDLM, ReMDM and ProSeCo report it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from src.io.errors import UserError
from src.metrics.caption import Ngram, NgramMetric, repeated_share
from src.metrics.text import words_of
from src.text.tokenizer import Codec


class Variety(NgramMetric):
    """Per text: `entropy` of its units in nats (0 for an empty text), and for each size n `repeat_n`, the share of
    n-grams that repeat an earlier one (seq-rep-n, arXiv 1908.04319). Over all texts: `distinct_n`.

    unit: `words`, or `tokens` of the model's tokenizer (`codec`, passed by the verb); names then start with `token_`
    """

    def __init__(
        self,
        *,
        sizes: Sequence[int] = (1, 2, 3),
        unit: Literal["words", "tokens"] = "words",
        codec: Codec | None = None,
    ) -> None:
        if unit == "tokens" and codec is None:
            raise UserError("unit='tokens' needs a codec")
        start = "token_" if unit == "tokens" else ""
        self.names = tuple(f"{start}{name}" for name in ("entropy", *(f"repeat_{n}" for n in sizes)))
        super().__init__(distinct=[f"{start}distinct_{n}" for n in sizes])
        self.sizes, self.codec = tuple(sizes), codec if unit == "tokens" else None

    def units(self, text: str) -> list[str]:
        return words_of(text) if self.codec is None else [str(token) for token in self.codec.encode(text)[0]]

    def ngrams(self, text: str) -> dict[str, list[Ngram]]:
        units = self.units(text)
        by_size = [[tuple(units[i : i + n]) for i in range(len(units) - n + 1)] for n in self.sizes]
        return dict(zip(self.distinct, by_size, strict=True))

    def score(self, text: str, record: dict) -> dict[str, float]:
        units = self.units(text)
        shares = [count / len(units) for count in Counter(units).values()]
        entropy = -sum(share * math.log(share) for share in shares)
        return dict(zip(self.names, [entropy, *map(repeated_share, self.ngrams(text).values())], strict=True))
