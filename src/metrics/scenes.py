"""Exact caption quality on scenes: coverage, factuality, syntax, and quality, the mean of the first two.

metric = SceneQuality()
metric.update(texts, records)      records with a `scene`, as in the shards of the embedded data
metric.compute()                   {"coverage": {"mean", "se", "n"}, ...}
"""

from __future__ import annotations

from src.io.errors import UserError
from src.metrics.caption import CaptionMetric, Mark
from src.scenes.grammar import false_fields, read_caption
from src.scenes.graph import Scene
from src.scenes.score import score_caption


class SceneQuality(CaptionMetric):
    """Scores of `src.scenes.score`, as means over captions. Raises UserError for a record without a scene."""

    higher_is_better = True
    names = ("coverage", "factuality", "syntax", "quality")

    def score(self, text: str, record: dict) -> dict[str, float]:
        score = score_caption(scene_of(record), text)
        quality = (score.coverage + score.factuality) / 2
        values = (score.coverage, score.factuality, score.syntax, quality)
        return dict(zip(self.names, values, strict=True))

    def marks(self, text: str, record: dict) -> list[Mark]:
        """Sentences that the grammar rejects, and in the other sentences the words that contradict the scene."""
        scene, marks = scene_of(record), []
        for sentence in read_caption(text):
            if sentence.statement is None:
                marks.append(Mark(sentence.start, sentence.end, "ungrammatical"))
                continue
            wrong = false_fields(scene, sentence.statement)
            spans = sorted(sentence.places[name] for name in wrong if name in sentence.places)
            marks += [Mark(start, end, "false") for start, end in spans]
        return marks


def scene_of(record: dict) -> Scene:
    if "scene" not in record:
        raise UserError(f"record {record.get('key', '?')!r} has no scene; use the metrics of src.metrics.text")
    return Scene.from_dict(record["scene"])
