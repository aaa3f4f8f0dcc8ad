"""Exact caption quality on scenes: coverage, factuality, syntax, and `quality`, the mean of the first two.

metric = SceneQuality()
metric.update(texts, records)      records with a `scene`, as the shards of the embedded data hold them
metric.compute()                   {"coverage": {"mean", "se", "n"}, ...}
"""

from __future__ import annotations

from src.io.errors import UserError
from src.metrics.caption import CaptionMetric, Mark
from src.scenes.grammar import Sentence, false_fields, read_caption
from src.scenes.graph import Scene
from src.scenes.score import score_caption


class SceneQuality(CaptionMetric):
    """Means over captions. Raises UserError for a record without a scene."""

    higher_is_better = True
    names = ("coverage", "factuality", "syntax", "quality")

    def score(self, text: str, record: dict) -> dict[str, float]:
        found = score_caption(_scene(record), text)
        return {
            "coverage": found.coverage,
            "factuality": found.factuality,
            "syntax": found.syntax,
            "quality": (found.coverage + found.factuality) / 2,
        }

    def marks(self, text: str, record: dict) -> list[Mark]:
        """Whole sentences that the grammar rejects; in the others the words that contradict the scene."""
        scene = _scene(record)
        return [mark for sentence in read_caption(text) for mark in _flaws(scene, sentence)]


def _scene(record: dict) -> Scene:
    if "scene" not in record:
        raise UserError(f"record {record.get('key', '?')!r} has no scene; src.metrics.text can score it")
    return Scene.from_dict(record["scene"])


def _flaws(scene: Scene, sentence: Sentence) -> list[Mark]:
    if sentence.statement is None:
        return [Mark(sentence.start, sentence.end, "ungrammatical")]
    wrong = false_fields(scene, sentence.statement)
    places = sorted(sentence.places[name] for name in wrong if name in sentence.places)
    return [Mark(start, end, "false") for start, end in places]
