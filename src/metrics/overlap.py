"""BLEU, ROUGE-L and CIDEr-D, with the numbers of the COCO caption evaluation (pycocoevalcap), without its Java.

They come from short captions: of detailed ones they say little about what is true. Texts are split as in the Penn
Treebank, as far as captions need it; METEOR and SPICE, which need Java and downloads, are left to that package.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.text import BLEUScore

from src.metrics.caption import CaptionMetric, Ngram, Stat, summarise
from src.metrics.text import references_of

SIZES = (1, 2, 3, 4)  # of n-grams
TINY, SMALL = 1e-15, 1e-9  # added to numbers of matches and of n-grams, so that BLEU is never 0 and never 0 / 0
BETA = 1.2  # weight of recall in ROUGE-L
SIGMA = 6.0  # words of difference in length that CIDEr-D forgives
_CLITIC = r"n't|'(?:s|re|ve|ll|d|m)"
_SPLIT = re.compile(rf"(?<=\w)({_CLITIC})\b")
_TOKEN = re.compile(rf"(?:{_CLITIC})\b|-[lr][rsc]b-|\w+(?:[-.,:/]\w+)*|[$%&#@*+=]")
_BRACKETS = {"(": "lrb", ")": "rrb", "[": "lsb", "]": "rsb", "{": "lcb", "}": "rcb"}


def tokens_of(text: str) -> list[str]:
    """Lower-case tokens of a text as the COCO evaluation counts them: without punctuation, with names for brackets."""
    text = _SPLIT.sub(r" \1", text.lower().replace("\u2019", "'"))
    return _TOKEN.findall(re.sub(r"[()\[\]{}]", lambda bracket: f" -{_BRACKETS[bracket[0]]}- ", text))


class Bleu(BLEUScore):
    """`bleu`: corpus BLEU-4 of the captions against all references, and `bleu_1` to `bleu_3`; no standard errors."""

    full_state_update = False  # the states are sums
    numerator: Tensor
    denominator: Tensor
    preds_len: Tensor
    target_len: Tensor

    def __init__(self) -> None:
        super().__init__(n_gram=len(SIZES))
        self.add_state("count", self.preds_len.new_zeros(()), dist_reduce_fx="sum")

    def update(self, texts: Sequence[str], records: Sequence[dict]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        captions = [" ".join(tokens_of(text)) for text in texts]
        references = [[tokens_of(text) for text in references_of(record)] for record in records]
        # of two references as near in length, the shorter one counts: torchmetrics takes the first
        super().update(captions, [[" ".join(tokens) for tokens in sorted(some, key=len)] for some in references])
        self.count += len(texts)

    def compute(self) -> dict[str, Stat]:  # pyright: ignore[reportIncompatibleMethodOverride]
        matches, ngrams = self.numerator.tolist(), self.denominator.tolist()
        ratio = (float(self.preds_len) + TINY) / (float(self.target_len) + SMALL)
        brevity = min(1.0, math.exp(1 - 1 / ratio))
        logs = [math.log((m + TINY) / (n + SMALL)) for m, n in zip(matches, ngrams, strict=True)]
        means = {n: brevity * math.exp(sum(logs[:n]) / n) for n in SIZES}
        names = {n: f"bleu_{n}" if n < SIZES[-1] else "bleu" for n in SIZES}
        return {names[n]: Stat(mean=means[n], se=None, n=int(self.count)) for n in SIZES}


class RougeL(CaptionMetric):
    """`rouge_l`: F-measure of the longest common subsequence, of the best precision and the best recall."""

    higher_is_better = True
    names = ("rouge_l",)

    def score(self, text: str, record: dict) -> dict[str, float]:
        caption, precision, recall = tokens_of(text), 0.0, 0.0
        for reference in map(tokens_of, references_of(record)):
            if common := longest_common(caption, reference):
                precision, recall = max(precision, common / len(caption)), max(recall, common / len(reference))
        both = (1 + BETA**2) * precision * recall
        return {"rouge_l": both / (recall + BETA**2 * precision) if both else 0.0}


def longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = row
        row = [0]
        for place, rival in enumerate(other):
            row.append(before[place] + 1 if word == rival else max(row[-1], before[place + 1]))
    return row[-1]


class Cider(Metric):
    """`cider`: CIDEr-D on its scale of 0 to 10 (arXiv 1411.5726), with document frequencies from the references given.

    A text is a vector of n-grams for each size, weighed by how few images have them in a reference. A caption's score
    is 10 times the mean over sizes and references of the cosine, where an n-gram counts at most as often as in the
    reference, times a Gaussian of the difference in length.

    The score of a caption depends on all references, so the texts are kept, by key, and gathered from all ranks.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[str, tuple[str, list[str]]] = {}

    def reset(self) -> None:
        super().reset()
        self.texts = {}

    def merge_state(self, incoming_state: Cider) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.texts |= incoming_state.texts

    def update(self, texts: Sequence[str], records: Sequence[dict]) -> None:
        self.texts |= {r["key"]: (text, references_of(r)) for text, r in zip(texts, records, strict=True)}

    def compute(self) -> dict[str, Stat]:
        return {"cider": summarise(list(self.per_image().values()))}

    def per_image(self) -> dict[str, float]:
        """The score of each image, by key, over all ranks."""
        parts: list = [self.texts]
        if dist.is_available() and dist.is_initialized():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, self.texts)
        texts = {key: pair for part in parts for key, pair in part.items()}
        # 1. n-grams of all texts, and for each n-gram the number of images with a reference that has it.
        counts = {key: (_ngrams(text), [_ngrams(ref) for ref in refs]) for key, (text, refs) in texts.items()}
        images = Counter(ngram for _, refs in counts.values() for ngram in set().union(*refs))
        rarity = {ngram: math.log(len(counts)) - math.log(number) for ngram, number in images.items()}
        unseen = math.log(len(counts)) if counts else 0.0  # of an n-gram that is in no reference
        # 2. Vectors, and their similarities.
        scores = {}
        for key, (caption, references) in counts.items():
            own = _vector(caption, rarity, unseen)
            pairs = [(_vector(reference, rarity, unseen), reference) for reference in references]
            similar = [_similarity(own, vector) * _near(caption, reference) for vector, reference in pairs]
            scores[key] = 10 * sum(similar) / len(similar)
        return scores


def _ngrams(text: str) -> Counter[Ngram]:
    tokens = tokens_of(text)
    return Counter(tuple(tokens[i : i + n]) for n in SIZES for i in range(len(tokens) - n + 1))


def _vector(counts: Counter[Ngram], rarity: dict[Ngram, float], unseen: float) -> dict[Ngram, float]:
    return {ngram: count * rarity.get(ngram, unseen) for ngram, count in counts.items()}


def _similarity(own: dict[Ngram, float], reference: dict[Ngram, float]) -> float:
    """Mean over sizes of the cosine, where a weight of the caption counts at most as much as the reference's."""
    total = 0.0
    for size in SIZES:
        one, other = ({n: w for n, w in vector.items() if len(n) == size} for vector in (own, reference))
        norms = math.hypot(*one.values()) * math.hypot(*other.values())
        product = sum(min(weight, other[ngram]) * other[ngram] for ngram, weight in one.items() if ngram in other)
        total += product / norms if norms else 0.0
    return total / len(SIZES)


def _near(one: Counter[Ngram], other: Counter[Ngram]) -> float:
    """Gaussian of the difference in length, of which the original counts the bigrams."""
    bigrams = [sum(count for ngram, count in counts.items() if len(ngram) == 2) for counts in (one, other)]
    return math.exp(-((bigrams[0] - bigrams[1]) ** 2) / (2 * SIGMA**2))
