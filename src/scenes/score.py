"""Exact scores of a caption against its scene: the fractions of facts that are covered (coverage), of claims that are
true (factuality) and of sentences that are grammatical (syntax). No model is involved.

Facts of a scene: four per object (its place is occupied, its shape, its colour, its size), the number of objects, the
background. Claims of a caption: the same four per object sentence, two per introduction, one per relation. An object
sentence is about the object at the place that it names, so a wrong place makes all four claims false.
"""

from __future__ import annotations

from dataclasses import dataclass

from src.scenes.grammar import Statement, false_fields, read_caption
from src.scenes.graph import Scene


@dataclass(frozen=True)
class CaptionScore:
    facts: int
    covered: int
    claims: int
    true_claims: int
    sentences: int
    grammatical: int

    @property
    def coverage(self) -> float:
        return self.covered / self.facts

    @property
    def factuality(self) -> float:
        return self.true_claims / self.claims if self.claims else 0.0

    @property
    def syntax(self) -> float:
        return self.grammatical / self.sentences if self.sentences else 0.0


def score_caption(scene: Scene, text: str) -> CaptionScore:
    """Score a text against a scene. Ungrammatical sentences make no claims and lower `syntax`."""
    sentences = read_caption(text)
    statements = [s.statement for s in sentences if s.statement]
    claims = [claim for statement in statements for claim in _claims(scene, statement)]
    return CaptionScore(
        facts=4 * len(scene.objects) + 2,
        covered=len({fact for fact, true in claims if true and fact[0] != "relation"}),
        claims=len(claims),
        true_claims=sum(true for _, true in claims),
        sentences=len(sentences),
        grammatical=len(statements),
    )


def _claims(scene: Scene, statement: Statement) -> list[tuple[tuple[str, ...], bool]]:
    """(fact, whether it is true) of each claim of a statement."""
    wrong = false_fields(scene, statement)
    if statement.kind == "intro":
        return [((name,), name not in wrong) for name in ("number", "background")]
    if statement.kind == "object":
        place = (statement.fields["row"], statement.fields["column"])
        return [((name, *place), name not in wrong) for name in ("row", "shape", "colour", "size")]
    return [(("relation",), not wrong)]
