"""Exact caption quality on scenes (`src/scenes/score.py`).

    metric = SceneQuality()
    metric.update(texts, records)      records with a `scene`, as in the shards of the embedded data
    metric.compute()                   {"quality": {"mean", "se", "n"}, "precision_object": ..., ...}

Per caption: `quality` (the mean over kinds of fact of F1), `coverage`, `factuality`, `syntax`. Over all captions:
`precision_KIND` and `recall_KIND`, and `templates`, the effective number of sentence templates in use: the exponential
of their entropy, of at most 14. A model that always writes the same sentences gets a high quality and few templates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from src.io.errors import UserError
from src.metrics.caption import CaptionMetric, Mark, Stat, ratio_stat
from src.scenes.grammar import TEMPLATES
from src.scenes.graph import Scene
from src.scenes.score import KINDS, score_caption

NUMBER = {
    (kind, index): n for n, (kind, index) in enumerate((k, i) for k in TEMPLATES for i in range(len(TEMPLATES[k])))
}


class SceneQuality(CaptionMetric):
    """Scores of captions against their scenes. Raises UserError for a record without a scene."""

    higher_is_better = True
    names = headline = ("coverage", "factuality", "syntax", "quality")
    breakdown = (*(f"precision_{kind}" for kind in KINDS), "recall_relation", "templates")
    sums: Tensor
    uses: Tensor

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(len(KINDS), 2, 5, dtype=torch.float64)  # s, n, s^2, s n, n^2 of precision and recall
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        self.add_state("uses", torch.zeros(len(NUMBER), dtype=torch.float64), dist_reduce_fx="sum")

    def score(self, text: str, record: dict) -> dict[str, float]:
        score = score_caption(scene_of(record), text)
        return {name: getattr(score, name) for name in self.names}

    def update(self, texts: Sequence[str], records: Sequence[dict]) -> None:
        super().update(texts, records)
        for text, record in zip(texts, records, strict=True):
            score = score_caption(scene_of(record), text)
            for row, kind in enumerate(KINDS):
                ratios = [(score.true_claims[kind], score.claims[kind]), (score.covered[kind], score.facts[kind])]
                self.sums[row] += self.sums.new_tensor([[s, n, s * s, s * n, n * n] for s, n in ratios])
            for sentence in score.sentences:
                if sentence.statement:
                    self.uses[NUMBER[sentence.statement.kind, sentence.statement.template]] += 1

    def compute(self) -> dict[str, Stat]:
        stats = super().compute()
        count = stats["quality"]["n"]
        for kind, ratios in zip(KINDS, self.sums.tolist(), strict=True):
            for name, sums in zip(("precision", "recall"), ratios, strict=True):
                no_value = Stat(mean=math.nan, se=None, n=count)  # if no caption claims such a fact
                stats[f"{name}_{kind}"] = ratio_stat(sums, count) if sums[1] else no_value
        effective = torch.special.entr(self.uses / self.uses.sum()).sum().exp()  # NaN without a grammatical sentence
        return {**stats, "templates": Stat(mean=float(effective), se=None, n=count)}

    def marks(self, text: str, record: dict) -> list[Mark]:
        """Sentences that the grammar rejects, and in the other sentences the words that contradict the scene."""
        score, marks = score_caption(scene_of(record), text), []
        for sentence, wrong in zip(score.sentences, score.wrong, strict=True):
            if wrong is None:
                marks.append(Mark(sentence.start, sentence.end, "ungrammatical"))
                continue
            spans = sorted(sentence.places[name] for name in wrong if name in sentence.places)
            marks += [Mark(start, end, "false") for start, end in spans]
        return marks


def scene_of(record: dict) -> Scene:
    if "scene" not in record:
        raise UserError(f"record {record.get('key', '?')!r} has no scene; use the metrics of src.metrics.text")
    return Scene.from_dict(record["scene"])
