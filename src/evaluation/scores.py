"""Scores of one system from the stored replies, and the table of several.

    scores, lines = score_system(items, judges, metrics, reader, store, max_failed=0.01, replicates=Replicates())
    check_protocols({"ours": scores, "theirs": ...})       one table has one protocol
    table_text(...)

An item whose replies are not all in the store is `missing`, like one without a caption: both count as failures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from torchmetrics import Metric

from src.evaluation import markdown
from src.io.errors import UserError
from src.io.progress import Bar
from src.io.settings import changes
from src.judges.base import Item, Judge
from src.judges.caparena import CapArena
from src.judges.clair import Clair
from src.judges.coverage import Coverage
from src.judges.factuality import Factuality
from src.judges.reader import Conversation, Reader, Replay
from src.judges.rubric import Rubric
from src.judges.store import ReplyStore
from src.metrics import caparena, clair, coverage, factuality, rubric
from src.metrics.caption import CaptionMetric, Stat, plain, summarise
from src.metrics.judged import JudgedMetric

METRICS: dict[type[Judge], type[JudgedMetric]] = {
    CapArena: caparena.CapArenaScore,
    Clair: clair.Clair,
    Coverage: coverage.Coverage,
    Factuality: factuality.Factuality,
    Rubric: rubric.Rubric,
}
CHUNK = 256  # captions scored between two movements of the bar
SHARES = ("clair", "coverage", "factuality", "rubric", "capture")  # printed times 100, as in the papers
Score = dict[str, Any]


@dataclass(frozen=True)
class Replicates:
    """How often the first `images` are judged, each time anew, to see how far the judge agrees with itself."""

    times: int = 1
    images: int = 100

    def __post_init__(self) -> None:
        if self.times < 1 or self.images < 2:
            raise UserError(f"replicates: times must be at least 1 and images at least 2, got {self}")

    def conversations(self, items: Sequence[Item], judge: Judge) -> list[Conversation]:
        """All that have to be held, the repeated ones included."""
        times = ((item, self.times if item.row < self.images else 1) for item in items)
        return [Conversation(judge, item, number) for item, several in times for number in range(several)]

    def spread(self, items: Sequence[Item], judge: Judge, reader: Reader, store: ReplyStore) -> dict[str, Stat]:
        """Standard deviations over the times: `NAME_replicate_sd` of the metric of these images, and
        `NAME_image_sd` of an image, the mean over images. {} if they are judged once.
        """
        if self.times < 2:
            return {}
        some, values = items[: self.images], list[float]()
        by_image: dict[int, list[float]] = {}
        for replicate in range(self.times):
            metric, _ = judged_metric(some, judge, reader, store, replicate=replicate, max_failed=1.0)
            values.append(metric.compute()[metric.name]["mean"])
            for row, (c, t) in enumerate(zip(*(part.tolist() for part in metric.parts()), strict=True)):
                by_image.setdefault(row, []).extend([c / t] if t else [])
        of_images = [float(np.std(image, ddof=1)) for image in by_image.values() if len(image) > 1]
        spread = {f"{judge.name}_replicate_sd": plain(float(np.std(values, ddof=1)), self.times)}
        return {**spread, **({f"{judge.name}_image_sd": summarise(of_images)} if of_images else {})}


def judged_metric(
    items: Sequence[Item], judge: Judge, reader: Reader, store: ReplyStore, *, replicate: int = 0, max_failed: float
) -> tuple[JudgedMetric, list[Replay]]:
    """The metric with the verdicts on all items, from the store alone, and the replies behind each verdict."""
    metric = METRICS[type(judge)](num_images=len(items), max_failed=max_failed)
    replays = [reader.replay(Conversation(judge, item, replicate), store) for item in items]
    for item, replay in zip(items, replays, strict=True):
        verdict = replay.verdict
        if verdict is None:  # as without a caption, for which there is no question
            verdict = reader.replay(Conversation(judge, replace(item, caption=None)), store).verdict
        assert verdict is not None
        metric.update(verdict, item.row)
    return metric, replays


def score_system(
    items: Sequence[Item],
    judges: Mapping[str, Judge],
    metrics: Sequence[Metric],
    reader: Reader | None,
    store: ReplyStore,
    *,
    max_failed: float,
    replicates: Replicates,
) -> tuple[Score, list[dict[str, Any]]]:
    """Statistics and counts of a system, and a line for each image and metric: {"key", "metric", "value", "weight"}.

    A metric is the mean of its values with these weights. Of one without a judge it is its headline.
    Raises UserError if more than `max_failed` of a metric's verdicts failed or are missing.
    """
    stats: dict[str, Stat] = {}
    counts: dict[str, Counter[str]] = {}
    lines: list[dict[str, Any]] = []
    served: set[str] = set()
    days: set[str] = set()
    no_caption = sum(item.caption is None for item in items)
    for name, judge in judges.items():
        assert reader
        # 1. Statistics of the verdicts, the value of each image, and the spread of repeated verdicts.
        metric, replays = judged_metric(items, judge, reader, store, max_failed=max_failed)
        stats |= metric.compute()
        parts = zip(items, *(part.tolist() for part in metric.parts()), strict=True)
        lines += [{"key": item.key, "metric": name, "value": c / t, "weight": t} for item, c, t in parts if t]
        stats |= replicates.spread(items, judge, reader, store)
        # 2. What the replies were.
        replies = [entry for replay in replays for entry in replay.replies]
        counts[name] = Counter(entry["status"] for entry in replies)
        counts[name]["no_caption"] = no_caption
        if no_reply := sum(replay.verdict is None for replay in replays):
            counts[name]["no_reply"] = no_reply
        served |= {entry["model"] for entry in replies if entry["model"]}
        days |= {entry["at"][:10] for entry in replies if entry["at"]}
    # 3. What needs no judge, of the images with a caption.
    present = [item for item in items if item.caption is not None]
    with Bar(total=len(metrics) * len(present), unit="caption", desc="score") as bar:
        for metric in metrics:
            metric.reset()
            for start in range(0, len(present), CHUNK):
                part = present[start : start + CHUNK]
                metric.update([item.caption or "" for item in part], [item.record for item in part])
                bar.update(len(part))
                if isinstance(metric, CaptionMetric):
                    pairs = list(zip(part, metric.latest, strict=True))
                    for name in metric.headline or metric.names[:1]:
                        lines += [{"key": i.key, "metric": name, "value": row[name], "weight": 1} for i, row in pairs]
            new = metric.compute()
            if twice := stats.keys() & new.keys():
                raise UserError(f"two metrics have a statistic {min(twice)!r}: leave one out")
            stats |= new
    return {
        "stats": stats,
        "counts": {name: dict(count) for name, count in counts.items()},
        "served": sorted(served),
        "judged": [min(days), max(days)] if days else None,
    }, lines


def check_protocols(scores: Mapping[str, Score]) -> None:
    """Raise UserError for systems that were not treated alike: images, questions, prompt, length, judge.

    What is not stated, such as the prompt of a caption file by others, cannot be compared.
    """
    for (name, one), (other_name, other) in combinations(scores.items(), 2):
        stated = []
        for protocol in (one["protocol"], other["protocol"]):
            metrics = {f"metrics.{metric}": settings for metric, settings in protocol.get("metrics", {}).items()}
            flat = {**{k: v for k, v in protocol.items() if k != "metrics"}, **metrics}
            stated.append({k: v for k, v in flat.items() if v not in (None, [])})
        first, second = ({k: p[k] for k in stated[0] if k in stated[1]} for p in stated)
        if different := changes(first, second, f"in {name}"):
            raise UserError(
                f"{other_name} does not belong in one table with {name} ({different}): evaluate them alike, or apart"
            )


def table_text(scores: Mapping[str, Score]) -> str:
    """Markdown: the judged metrics with a row per system, all statistics with a row each, what may have gone wrong."""
    names = list(dict.fromkeys(name for score in scores.values() for name in score["stats"]))
    protocol = next(iter(scores.values()))["protocol"]
    legend = f"{protocol['benchmark']}, {protocol['images'][0]:,} texts: mean ± standard error over texts"
    if shares := [share for share in SHARES if any(name.startswith(share) for name in names)]:
        legend += f"; times 100: {', '.join(shares)} and their parts, but not numbers of claims"
    judged = [name for name in names if any(name in score["counts"] for score in scores.values())]
    rows = [
        [system, *(cell_text(name, score["stats"].get(name)) for name in judged)] for system, score in scores.items()
    ]
    headline = markdown.table([["system", *judged], *rows]) if judged else ""
    details = [[name, *(cell_text(name, score["stats"].get(name)) for score in scores.values())] for name in names]
    notes = markdown.bullets(note(system, score) for system, score in scores.items())
    return markdown.page([f"{legend}.", headline, markdown.table([["statistic", *scores], *details]), notes])


def scale(name: str) -> int:
    """What a statistic is multiplied with to be printed."""
    return 100 if name.startswith(SHARES) and not name.endswith("_claims") else 1


def cell_text(name: str, stat: Stat | None) -> str:
    if stat is None or stat["mean"] is None:  # nothing to divide by
        return ""
    error = "" if stat["se"] is None else f" ± {scale(name) * stat['se']:.2f}"
    return f"{scale(name) * stat['mean']:.2f}{error}"


def note(system: str, score: Score) -> str:
    """A line on what is behind a row."""
    captions, protocol = score["captions"], score["protocol"]
    parts = [f"captions {captions['sha256'][:12]}"]
    parts += [
        f"{name} {protocol[name] if protocol[name] is not None else 'not stated'}" for name in ("prompt", "length")
    ]
    counts = {"missing": "missing", "empty": "empty", "cleaned": "cleaned of special tokens"}
    counts |= {"other_images": "of other images"}
    parts += [f"{captions[name]} {words}" for name, words in counts.items() if captions.get(name)]
    for name, count in score["counts"].items():
        problems = [f"{reason} {number}" for reason, number in count.items() if number and reason != "ok"]
        parts += [f"{name}: {', '.join(problems)}"] if problems else []
    if score["served"]:
        days = " to ".join(dict.fromkeys(score["judged"] or []))
        parts.append(f"judged by {', '.join(score['served'])}{f' on {days}' if days else ''}")
    return f"{system}: {'; '.join(parts)}"
