"""CAPTURE: objects, attributes and relations that captions and references share (DetailCaps, arXiv 2405.19092).

    metric = Capture(graphs="graphs.jsonl", parser="flan-t5-base-VG-factual-sg", encoder="all-mpnet-base-v2")
    metric.update(texts, records)      references are record["captions"]
    metric.compute()                   {"capture": {mean, se, n}, "capture_object_precision": ..., ...}, 0 to 1

    text -> graph strings of its sentences (file or parser) -> merge -> filter by the nouns of the text -> SceneGraph
    candidate and reference -> exact matches -> synonyms -> cosines of the rest -> precision, recall, F1 of each kind

A line of `graphs` is {"text": ..., "graphs": ["( dog , on , grass )", one per sentence], "nouns": ["dog", ...]}. It may
come from any parser and tagger, so a text is parsed once and scored anywhere. Of a line without `nouns`, as ours are,
every word of the text passes the filter (the original tags nouns): `capture_tagged` is the share of captions scored
with given nouns alone. Without an encoder the third kind of match is left out and the metric named `capture_hard`.

The original matches in the order of Python's sets, which differs between processes. Here lists are sorted, or in the
order of the text (`order: text`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from src.io.errors import UserError
from src.metrics.caption import CaptionMetric
from src.metrics.graph_parser import embed, parse, sentences_of
from src.metrics.text import references_of
from src.metrics.wordnet import WordNet
from src.text.scene_graphs import EMPTY, SceneGraph, merge, read_graphs

EPS = 1e-6
KINDS = ("object", "attribute", "relation")
WEIGHTS = (5, 5, 2)
PARTS = ("precision", "recall", "f1")
STOP_WORDS = Path(__file__).with_name("capture_stop_words.txt")
_WORD = re.compile(r"\w+(?:[-']\w+)*")

Phrase = str | tuple[str, ...]  # a relation is its three parts
Related = Callable[[str], Iterable[str]]  # words with a sense in common
Encode = Callable[[list[str]], Tensor]  # (N, D)


class Match(NamedTuple):
    """hard: number of matches; what is left of candidate and reference"""

    hard: int
    candidate: list[Phrase]
    reference: list[Phrase]


def stop_words() -> frozenset[str]:
    lines = STOP_WORDS.read_text("utf-8").splitlines()
    return frozenset(line for line in lines if not line.startswith("#"))


def keep_nouns(graph: SceneGraph, nouns: Iterable[str], stop: frozenset[str]) -> SceneGraph:
    """Leave out objects that are stop words, and whatever is about a thing that the text does not name by nouns."""
    nouns = set(nouns)

    def named(name: str) -> bool:
        return name in nouns or all(piece in nouns for piece in name.split(" "))

    return SceneGraph(
        [name for name in graph.objects if name not in stop and named(name)],
        {name: values for name, values in graph.attributes.items() if named(name)},
        [triple for triple in graph.relations if named(triple[0]) and named(triple[2])],
    )


def similarity(a: str, b: str, related: Related) -> float:
    """1 if one string is part of the other ("man" of "woman", too), else IoU of the words with a common sense."""
    if a in b or b in a:
        return 1.0
    words, others = set(related(a)), set(related(b))
    return len(words & others) / (len(words | others) + EPS)


def match_hard(candidate: Sequence[Phrase], reference: Sequence[Phrase], related: Related | None) -> Match:
    """Match one to one and greedily, in the order of the lists: equal ones first, then synonyms, if `related` is given.

    A relation is a synonym of another if all three parts are.
    """

    def synonyms(a: Phrase, b: Phrase) -> bool:
        assert related is not None
        pairs = [(a, b)] if isinstance(a, str) and isinstance(b, str) else zip(a, b, strict=True)
        return all(similarity(one, other, related) > 0 for one, other in pairs)

    left, free = list(candidate), list(reference)
    for equal in [lambda a, b: a == b, *([synonyms] if related else [])]:
        unmatched = []
        for phrase in left:
            place = next((n for n, other in enumerate(free) if equal(phrase, other)), None)
            if place is None:
                unmatched.append(phrase)
            else:
                del free[place]
        left = unmatched
    return Match(len(candidate) - len(left), left, free)


def add_soft(match: Match, vectors: dict[str, Tensor]) -> tuple[float, float]:
    """Matches of candidate and of reference: to the hard ones each leftover adds its best cosine on the other side.

    Not one to one, and negative cosines count, as in the original. vectors: by phrase, (D,), of any length
    """
    if not (match.candidate and match.reference and vectors):
        return match.hard, match.hard
    sides = [torch.stack([vectors[text_of(phrase)] for phrase in side]).double() for side in match[1:]]
    c, r = (torch.nn.functional.normalize(side, dim=1) for side in sides)
    cosines = c @ r.T  # (leftovers of the candidate, of the reference)
    return match.hard + float(cosines.amax(1).sum()), match.hard + float(cosines.amax(0).sum())


def text_of(phrase: Phrase) -> str:
    return phrase if isinstance(phrase, str) else " ".join(phrase)


def score_graphs(pairs: Sequence[tuple[SceneGraph, SceneGraph]], related: Related | None, encode: Encode | None):
    """Of each pair of candidate and reference: CAPTURE, then precision, recall and F1 of each of KINDS.

    The leftovers of all pairs are encoded at once.
    """
    # 1. Exact matches and synonyms. The owner of an attribute is ignored, and the same one of two objects counts twice.
    matches = [
        [match_hard(c, r, related) for c, r in zip(lists_of(candidate), lists_of(reference), strict=True)]
        for candidate, reference in pairs
    ]
    # 2. The vectors of what is left on both sides.
    sides = [side for row in matches for match in row if match.candidate and match.reference for side in match[1:]]
    phrases = list(dict.fromkeys(text_of(phrase) for side in sides for phrase in side))
    vectors = dict(zip(phrases, encode(phrases), strict=True)) if encode and phrases else {}
    # 3. The scores.
    for (candidate, reference), row in zip(pairs, matches, strict=True):
        parts: list[list[float]] = []
        for c, r, match in zip(lists_of(candidate), lists_of(reference), row, strict=True):
            matched_c, matched_r = add_soft(match, vectors)
            precision, recall = matched_c / (len(c) + EPS), matched_r / (len(r) + EPS)
            parts.append([precision, recall, 2 * precision * recall / (precision + recall + EPS)])
        total = sum(weight * f1 for weight, (_, _, f1) in zip(WEIGHTS, parts, strict=True)) / sum(WEIGHTS)
        yield [total, *(value for kind in parts for value in kind)]


def lists_of(graph: SceneGraph) -> tuple[list[str], list[str], list[tuple[str, str, str]]]:
    return graph.objects, [value for values in graph.attributes.values() for value in values], graph.relations


def in_order(graph: SceneGraph) -> SceneGraph:
    attributes = {name: sorted(values) for name, values in sorted(graph.attributes.items())}
    return SceneGraph(sorted(graph.objects), attributes, sorted(graph.relations))


class Capture(CaptionMetric):
    """`capture` (without an encoder `capture_hard`), and its parts for objects, attributes and relations.

    Of a caption: the mean over its references. Dataset: the mean over captions. Papers print it times 100.

    graphs: file of graphs by text, see the top of this file; parser: model folder. With both, what the file lacks is
    parsed and added to it
    encoder: model folder of a sentence encoder; batch_size: sentences or phrases per forward call
    wordnet: folder of WordNet 3.0; None: the table of the package factualscenegraph
    """

    higher_is_better = True

    def __init__(
        self,
        *,
        graphs: str | None = None,
        parser: str | None = None,
        encoder: str | None = None,
        wordnet: str | None = None,
        order: Literal["sorted", "text"] = "sorted",
        batch_size: int = 64,
    ) -> None:
        name = "capture" if encoder else "capture_hard"
        self.names = (name, *(f"{name}_{kind}_{part}" for kind in KINDS for part in PARTS), "capture_tagged")
        super().__init__()
        if not (graphs or parser):
            raise UserError("CAPTURE needs graphs of the texts: set parser= to a model folder, or graphs= to a file")
        self.file, self.parser, self.encoder = graphs, parser, encoder
        self.settings = {"parser": parser, "encoder": encoder, "wordnet": wordnet, "order": order}
        self.order, self.batch_size = order, batch_size
        self.wordnet, self.stop = WordNet.load(wordnet), stop_words()
        self.lines = read_graphs(graphs) if graphs and (Path(graphs).exists() or not parser) else dict(EMPTY)

    def check(self, record: dict) -> None:
        if not self.parser:
            self.graphs_of([text.strip() for text in references_of(record)])

    def update(self, texts: Sequence[str], records: Sequence[dict]) -> None:
        texts = [text.strip() for text in texts]
        references = [[text.strip() for text in references_of(record)] for record in records]
        wanted = list(dict.fromkeys([*texts, *(text for some in references for text in some)]))
        graphs = dict(zip(wanted, self.graphs_of(wanted), strict=True))
        pairs = [(graphs[t], graphs[r]) for t, some in zip(texts, references, strict=True) for r in some]
        scores = score_graphs(pairs, self.wordnet.related, self.encode if self.encoder else None)
        self.latest = []
        for text, some in zip(texts, references, strict=True):
            values = [next(scores) for _ in some]
            means = [sum(column) / len(some) for column in zip(*values, strict=True)]
            tagged = float(all("nouns" in self.lines[each] for each in (text, *some)))
            self.latest.append(dict(zip(self.names, [*means, tagged], strict=True)))
        self.accumulate(records)

    def encode(self, phrases: list[str]) -> Tensor:
        assert self.encoder is not None
        return embed(phrases, folder=self.encoder, batch_size=self.batch_size, device=self.device)

    def graphs_of(self, texts: Sequence[str]) -> list[SceneGraph]:
        """The merged and filtered graphs of texts. Raises UserError for one that has no line, if there is no parser."""
        if missing := [text for text in dict.fromkeys(texts) if text not in self.lines]:
            if not self.parser:
                start = missing[0][:60]
                raise UserError(f"{self.file} has no graphs of {len(missing)} texts such as {start!r}; set parser=")
            self.parse_texts(missing)
        graphs = [self.graph_of(text) for text in texts]
        return [in_order(graph) for graph in graphs] if self.order == "sorted" else graphs

    def graph_of(self, text: str) -> SceneGraph:
        line, lemma = self.lines[text], self.wordnet.lemma
        words = line["nouns"] if "nouns" in line else _WORD.findall(text)
        return keep_nouns(merge(line["graphs"], lemma), [lemma(word, "n") for word in words], self.stop)

    def parse_texts(self, texts: list[str]) -> None:
        assert self.parser is not None
        sentences = [sentences_of(text) for text in texts]
        flat = [sentence for some in sentences for sentence in some]
        parsed = iter(parse(flat, folder=self.parser, batch_size=self.batch_size, device=self.device))
        new = [{"text": t, "graphs": [next(parsed) for _ in some]} for t, some in zip(texts, sentences, strict=True)]
        self.lines |= {line["text"]: line for line in new}
        if self.file:
            with Path(self.file).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in new)
