"""Exact scores of a caption against its scene, each kind of fact apart. No model is involved.

    kind          facts of a scene                              claims of a caption
    object        the shape of each object                      the shape in each object sentence
    attribute     colour and size of each object                colour and size in each object sentence
    place         row and column of each object                 row and column in each object sentence
    background    1                                             1 per introduction
    number        1                                             1 per introduction
    relation      1 if there are two objects: that the caption  1 per relation sentence
                  says how some two of them lie

An object sentence is about the object that it describes best: the one that shares most of shape, colour, size and place
with it. An ungrammatical sentence makes one false claim of each kind that its words name, so that broken text costs as
much as false text.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from src.scenes.grammar import NUMBERS, Statement, false_fields, read_caption
from src.scenes.graph import BACKGROUNDS, COLOURS, COLUMNS, ROWS, SHAPES, SIZES, Scene

KINDS = ("object", "attribute", "place", "background", "number", "relation")
WORDS = {
    **dict.fromkeys(SHAPES, "object"),
    **dict.fromkeys((*COLOURS, *SIZES), "attribute"),
    **dict.fromkeys((*ROWS, *COLUMNS), "place"),
    **dict.fromkeys(BACKGROUNDS, "background"),
    **dict.fromkeys(NUMBERS[1:], "number"),  # "one" also begins a relation
}
RELATION = re.compile(r"\b(left of|right of|above|below)\b")

Fact = tuple  # (kind, object number or None, field)


@dataclass(frozen=True)
class CaptionScore:
    """Counts by kind, and of sentences."""

    facts: Counter[str]
    covered: Counter[str]
    claims: Counter[str]
    true_claims: Counter[str]
    sentences: int
    grammatical: int

    @property
    def coverage(self) -> float:
        """Fraction of the scene's facts, without relations, that some sentence states."""
        kinds = [kind for kind in KINDS if kind != "relation"]
        return sum(self.covered[kind] for kind in kinds) / sum(self.facts[kind] for kind in kinds)

    @property
    def factuality(self) -> float:
        """Fraction of the caption's claims that are true; 0 without claims."""
        return self.true_claims.total() / self.claims.total() if self.claims else 0.0

    @property
    def syntax(self) -> float:
        """Fraction of the caption's sentences that are grammatical; 0 for an empty caption."""
        return self.grammatical / self.sentences if self.sentences else 0.0

    @property
    def quality(self) -> float:
        """Mean over kinds of F1, the harmonic mean of precision and recall.

        Relations count by their precision, if the caption claims any: true captions may leave them out.
        """
        scores = []
        for kind in KINDS:
            precision = self.true_claims[kind] / self.claims[kind] if self.claims[kind] else 0.0
            recall = precision if kind == "relation" else self.covered[kind] / self.facts[kind]
            if kind != "relation" or self.claims[kind]:
                scores.append(2 * precision * recall / (precision + recall) if precision and recall else 0.0)
        return sum(scores) / len(scores)


def score_caption(scene: Scene, text: str) -> CaptionScore:
    """Score a text against a scene."""
    sentences = read_caption(text)
    claims: list[tuple[Fact, bool]] = []
    for sentence in sentences:
        if sentence.statement:
            claims += _claims(scene, sentence.statement)
        else:
            claims += [((kind, None, "broken"), False) for kind in _kinds_named(text[sentence.start : sentence.end])]
    number = len(scene.objects)
    facts = {"object": number, "attribute": 2 * number, "place": number, "background": 1, "number": 1}
    return CaptionScore(
        facts=Counter({**facts, "relation": int(number > 1)}),
        covered=Counter(kind for kind, *_ in {fact for fact, true in claims if true}),
        claims=Counter(kind for (kind, *_), _ in claims),
        true_claims=Counter(kind for (kind, *_), true in claims if true),
        sentences=len(sentences),
        grammatical=sum(sentence.statement is not None for sentence in sentences),
    )


def _claims(scene: Scene, statement: Statement) -> list[tuple[Fact, bool]]:
    """(fact, whether it is true) of each claim of a statement."""
    fields = statement.fields
    if statement.kind == "relation":
        return [(("relation", None, "relation"), not false_fields(scene, statement))]
    if statement.kind == "intro":
        wrong = false_fields(scene, statement)
        return [((name, None, name), name not in wrong) for name in ("number", "background")]

    def shared(number: int) -> dict[str, bool]:
        item = scene.objects[number]
        equal = {name: getattr(item, name) == fields[name] for name in ("shape", "colour", "size")}
        return {**equal, "place": (item.row, item.column) == (fields["row"], fields["column"])}

    best = max(range(len(scene.objects)), key=lambda number: sum(shared(number).values()))
    kinds = {"shape": "object", "colour": "attribute", "size": "attribute", "place": "place"}
    return [((kinds[name], best, name), true) for name, true in shared(best).items()]


def _kinds_named(sentence: str) -> set[str]:
    """The kinds of fact that the words of an ungrammatical sentence are about."""
    words = re.findall(r"[a-z]+", sentence.lower())
    return {WORDS[word] for word in words if word in WORDS} | ({"relation"} if RELATION.search(sentence) else set())
