"""Exact scores of a caption against its scene, each kind of fact apart. No model is involved.

    kind          facts of a scene                              claims of a caption
    object        the shape of each object                      the shape in each object sentence
    attribute     colour and size of each object                colour and size in each object sentence
    place         row and column of each object                 row and column in each object sentence
    background    1                                             1 per introduction
    number        1                                             1 per introduction
    relation      1 if there are two objects: that the caption  1 per relation sentence
                  says how some two of them lie

Each object sentence is about another object, and the whole is read as favourably as possible: the pair that shares most
of shape, colour, size and place first; a sentence that is left over is false, and so is a relation that an earlier
sentence said. A sentence that the grammar rejects makes one false claim for each of its words that names something, so
that broken text costs like false text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from src.scenes.grammar import NUMBERS, Sentence, Statement, false_fields, read_caption, related
from src.scenes.graph import BACKGROUNDS, COLOURS, ROWS, SHAPES, SIZES, Scene

KINDS = ("object", "attribute", "place", "background", "number", "relation")
FIELDS = {"shape": "object", "colour": "attribute", "size": "attribute", "place": "place"}
RELATION = re.compile(r"\b(?:left of|right of|above|below)\b")
NAMED = {  # what counts as naming something in a broken sentence; a place is counted by its row
    "object": re.compile(rf"\b(?:{'|'.join(SHAPES)})\b"),
    "attribute": re.compile(rf"\b(?:{'|'.join((*COLOURS, *SIZES))})\b"),
    "place": re.compile(rf"\b(?:{'|'.join(ROWS)})\b"),
    "background": re.compile(rf"\b(?:{'|'.join(BACKGROUNDS)})\b"),
    "number": re.compile(rf"\b(?:{'|'.join(NUMBERS[1:])}|one object)\b"),  # "one" also begins a relation
    "relation": RELATION,
}


@dataclass(frozen=True)
class CaptionScore:
    """Counts by kind, and of sentences. wrong: of each sentence its false fields, None if it is ungrammatical."""

    facts: Counter[str]
    covered: Counter[str]
    claims: Counter[str]
    true_claims: Counter[str]
    sentences: tuple[Sentence, ...]
    wrong: tuple[set[str] | None, ...]

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
        grammatical = sum(wrong is not None for wrong in self.wrong)
        return grammatical / len(self.sentences) if self.sentences else 0.0

    @property
    def quality(self) -> float:
        """Mean over kinds of F1, the harmonic mean of precision and recall.

        Of a single object there are no relations: that kind is then left out, unless the caption claims one.
        """
        scores = []
        for kind in KINDS:
            if self.facts[kind] or self.claims[kind]:
                precision = self.true_claims[kind] / max(self.claims[kind], 1)
                recall = self.covered[kind] / max(self.facts[kind], 1)
                scores.append(2 * precision * recall / (precision + recall) if precision and recall else 0.0)
        return sum(scores) / len(scores)


def score_caption(scene: Scene, text: str) -> CaptionScore:
    """Score a text against a scene."""
    sentences = tuple(read_caption(text))
    number = len(scene.objects)
    facts = {"object": number, "attribute": 2 * number, "place": number, "background": 1, "number": 1}
    claims: Counter[str] = Counter()
    true_claims: Counter[str] = Counter()
    covered: Counter[str] = Counter()
    stated: set[str] = set()  # facts of which a scene has one
    said: set[tuple] = set()  # true relations
    wrong: list[set[str] | None] = []
    objects = _match(scene, [s.statement for s in sentences if s.statement and s.statement.kind == "object"])
    for sentence in sentences:
        statement = sentence.statement
        if statement is None:
            broken = text[sentence.start : sentence.end].lower()
            claims.update({kind: len(pattern.findall(broken)) for kind, pattern in NAMED.items()})
            wrong.append(None)
        elif statement.kind == "object":
            shared = next(objects)
            for name, kind in FIELDS.items():
                claims[kind] += 1
                true_claims[kind] += shared[name]
                covered[kind] += shared[name]
            false = {name for name, true in shared.items() if not true}
            wrong.append(false - {"place"} | ({"row", "column"} if "place" in false else set()))
        else:
            false = false_fields(scene, statement)
            if statement.kind == "relation" and not false:
                false = set(statement.fields) if related(statement.fields) in said else false
                said.add(related(statement.fields))
            wrong.append(false)
            for kind in ("number", "background") if statement.kind == "intro" else ("relation",):
                true = kind not in false if statement.kind == "intro" else not false
                claims[kind] += 1
                true_claims[kind] += true
                stated |= {kind} if true else set()
    covered.update(stated)
    counts = (Counter({**facts, "relation": int(number > 1)}), covered, +claims, true_claims)
    return CaptionScore(*counts, sentences, tuple(wrong))


def _match(scene: Scene, statements: list[Statement]) -> Iterator[dict[str, bool]]:
    """Yield, for each object statement in order, which of its fields are true of its object."""
    rows: dict[int, dict[str, bool]] = {}
    pairs = []
    for row, statement in enumerate(statements):
        fields = statement.fields
        for column, item in enumerate(scene.objects):
            equal = {name: getattr(item, name) == fields[name] for name in ("shape", "colour", "size")}
            equal["place"] = (item.row, item.column) == (fields["row"], fields["column"])
            pairs.append((-sum(equal.values()), row, column, equal))
    taken: set[int] = set()
    for _, row, column, equal in sorted(pairs, key=lambda pair: pair[:3]):
        if row not in rows and column not in taken:
            rows[row] = equal
            taken.add(column)
    nothing = dict.fromkeys(FIELDS, False)
    yield from (rows.get(row, nothing) for row in range(len(statements)))
