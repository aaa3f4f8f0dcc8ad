"""What a model knows of a scene: one word of its true caption is hidden, all others are given, and the model names it.

    words = HiddenWords(codec=codec, seed=0)
    words.update(backbone, batch)      for each batch
    words.compute()                    {"hidden word=shape": {mean, se, n}, ...}

A forward call for each kind of word hides one such word of each response. `named`: colour and shape of an object in a
relation, which are not always determined, as two red objects may lie above the blue ring.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random

import torch
from torch import Tensor
from torchmetrics import Metric

from src.metrics.caption import Stat, stat_of
from src.scenes.grammar import NUMBERS
from src.scenes.graph import BACKGROUNDS, COLOURS, COLUMNS, ROWS, SHAPES, SIZES
from src.text.tokenizer import Codec
from src.types import Backbone, Batch

RELATION = r"(left|right)(?= of)|above|below"
IN_A_RELATION = {"relation": RELATION, "named": "|".join((*COLOURS, *SHAPES))}
ELSEWHERE = {
    "shape": "|".join(SHAPES),
    "colour": "|".join(COLOURS),
    "size": "|".join(SIZES),
    "place": "|".join((*ROWS, *COLUMNS)),
    "background": "|".join(BACKGROUNDS),
    "number": "|".join(NUMBERS),
}
KINDS = (*ELSEWHERE, *IN_A_RELATION)


class HiddenWords(Metric):
    """Shares of hidden words that a model names, over all responses that have such a word, detailed or brief."""

    is_differentiable = False
    full_state_update = False
    counts: Tensor

    def __init__(self, *, codec: Codec, seed: int = 0) -> None:
        super().__init__()
        self.codec, self.seed = codec, seed
        self.add_state("counts", torch.zeros(len(KINDS), 2, dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, backbone: Backbone, batch: Batch) -> None:
        prefix, special = backbone.encode_prefix(batch.prefix), self.codec.special
        hidden = torch.zeros(len(KINDS), *batch.response.shape, dtype=torch.bool)  # (K, B, L)
        for row, ids in enumerate(batch.response.tolist()):
            text = self.codec.decode(ids)
            offsets = self.codec.encode(text)[1]
            spans = list(find_words(text))
            for number, kind in enumerate(KINDS):
                if words := [span for name, *span in spans if name == kind]:
                    start, end = Random(f"{self.seed}/{batch.keys[row]}/{kind}").choice(words)
                    for place, (first, last) in enumerate(offsets):
                        hidden[number, row, place] = first < end and start < last
        for number, where in enumerate(hidden.to(batch.response.device)):  # (B, L)
            tokens = batch.response.masked_fill(where, special.mask)
            at = where.nonzero(as_tuple=True)
            named = torch.ones_like(where)
            named[at] = special.argmax(backbone(prefix, tokens, positions=at)) == batch.response[at]
            right, tried = (named.all(1) & where.any(1)).sum(), where.any(1).sum()
            self.counts[number] += torch.stack([right, tried]).to(self.counts)

    def compute(self) -> dict[str, Stat]:
        counts = zip(KINDS, self.counts.tolist(), strict=True)
        return {f"hidden word={kind}": stat_of(right, right, int(tried)) for kind, (right, tried) in counts if tried}


def find_words(text: str) -> Iterator[tuple[str, int, int]]:
    """(kind, start, end) of each word of a caption that states a fact."""
    for clause in re.finditer(r"[^.,]+", text):
        patterns = IN_A_RELATION if re.search(rf"\b({RELATION})\b", clause[0]) else ELSEWHERE
        for kind, pattern in patterns.items():
            for match in re.compile(rf"\b({pattern})\b", re.IGNORECASE).finditer(text, clause.start(), clause.end()):
                yield kind, *match.span()
