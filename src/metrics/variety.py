"""Variety of texts: unigram entropy, repeated n-grams, and distinct n-grams of the whole set.

A generative perplexity can be bought with dull texts, so read it beside these, as MDLM, ReMDM and ProSeCo report it.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch

from src.io.errors import UserError
from src.metrics.caption import CaptionMetric, Stat
from src.metrics.text import words_of
from src.text.tokenizer import Codec


class Variety(CaptionMetric):
    """Per text: `entropy`, of its units in nats, and for each size n `repeat_n`, the share of its n-grams that repeat
    an earlier one (seq-rep-n, arXiv 1908.04319). Over all texts `distinct_n`, different n-grams over all n-grams,
    without a standard error.

    unit: `words`, or `tokens` of the models' tokenizer (`codec`, which the verb offers); names then start with `token_`
    """

    def __init__(
        self,
        *,
        sizes: Sequence[int] = (1, 2, 3),
        unit: Literal["words", "tokens"] = "words",
        codec: Codec | None = None,
    ) -> None:
        if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
            raise UserError(f"sizes must be different whole numbers from 1 on, got {list(sizes)}")
        if unit not in ("words", "tokens") or (unit == "tokens" and codec is None):
            raise UserError(f"unit must be 'words', or 'tokens' with a codec, got {unit!r}")
        self.start = "token_" if unit == "tokens" else ""
        self.names = tuple(f"{self.start}{name}" for name in ("entropy", *(f"repeat_{n}" for n in sizes)))
        super().__init__()
        self.sizes, self.unit, self.codec = tuple(sizes), unit, codec
        for n in self.sizes:  # hashes: only tensors are reduced over ranks
            self.add_state(f"grams_{n}", [], dist_reduce_fx="cat")

    def score(self, text: str, record: dict) -> dict[str, float]:
        units = self._units(text)
        grams = [_grams(units, n) for n in self.sizes]
        repeats = [1 - len(set(some)) / len(some) if some else 0.0 for some in grams]
        return dict(zip(self.names, [unigram_entropy(units), *repeats], strict=True))

    def update(self, texts: Sequence[str], records: Sequence[dict]) -> None:
        super().update(texts, records)
        for n in self.sizes:
            hashes = [_hash(gram) for text in texts for gram in _grams(self._units(text), n)]
            getattr(self, f"grams_{n}").append(torch.tensor(hashes, dtype=torch.int64, device=self.total.device))

    def compute(self) -> dict[str, Stat]:
        found = super().compute()
        for n in self.sizes:
            state = getattr(self, f"grams_{n}")
            hashes = torch.cat(state) if isinstance(state, list) else state
            distinct = len(hashes.unique()) / len(hashes) if len(hashes) else 0.0
            found[f"{self.start}distinct_{n}"] = Stat(mean=distinct, se=None, n=int(self.count))
        return found

    def _units(self, text: str) -> list[str]:
        if self.codec is None or self.unit == "words":
            return words_of(text)
        return [str(token) for token in self.codec.encode(text)[0]]


def unigram_entropy(units: Sequence[str]) -> float:
    """Entropy in nats of the frequencies of the units of one text; 0 for none."""
    shares = [count / len(units) for count in Counter(units).values()]
    return -sum(share * math.log(share) for share in shares)


def _grams(units: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]


def _hash(gram: tuple[str, ...]) -> int:
    digest = hashlib.blake2b("\n".join(gram).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
