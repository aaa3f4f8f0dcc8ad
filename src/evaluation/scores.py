"""Scores of one system from the stored replies, and the table of several.

    scores, verdicts = score_system(items, judges, metrics, model, store, max_failed=0.01)
    check_protocols({"ours": scores, "theirs": ...})       one table has one protocol
    table_text(...)

An item whose replies are not all in the store is `missing`, like one without a caption: both count as failures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from torchmetrics import Metric

from src.io.errors import UserError
from src.io.progress import Bar
from src.io.settings import changes
from src.judges.ask import JudgeModel
from src.judges.base import Item, Judge
from src.judges.caparena import CapArena
from src.judges.clair import Clair
from src.judges.coverage import Coverage
from src.judges.factuality import Factuality
from src.judges.rubric import Rubric
from src.judges.store import ReplyStore
from src.metrics import caparena, clair, coverage, factuality, rubric
from src.metrics.caption import Stat
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


def judge_protocol(judge: Judge) -> dict[str, Any]:
    """What a metric's numbers depend on besides the judging model: its settings, its words by their hash."""
    settings = {name: value for name, value in vars(judge).items() if name != "prompt"}
    if prompt := getattr(judge, "prompt", None):
        settings |= {"prompt": prompt.digest, "version": prompt.version}
    return settings


def score_system(
    items: Sequence[Item],
    judges: Mapping[str, Judge],
    metrics: Sequence[Metric],
    model: JudgeModel | None,
    store: ReplyStore,
    *,
    max_failed: float,
) -> tuple[Score, list[dict[str, Any]]]:
    """Statistics and counts of a system, and a line for each of its judged images: {"key", "metric", "value"}.

    Raises UserError if more than `max_failed` of a metric's verdicts failed or are missing.
    """
    stats: dict[str, Stat] = {}
    counts: dict[str, Counter[str]] = {}
    lines: list[dict[str, Any]] = []
    served: set[str] = set()
    days: set[str] = set()
    for name, judge in judges.items():
        assert model
        # 1. Verdicts, from the store alone.
        metric = METRICS[type(judge)](num_images=len(items), max_failed=max_failed)
        counts[name] = Counter(no_caption=sum(item.caption is None for item in items))
        for item in items:
            done = model.replay(judge, item, store)
            verdict = done.verdict
            if verdict is None:
                counts[name]["no_reply"] += 1
                verdict = model.replay(judge, replace(item, caption=None), store).verdict
            assert verdict is not None  # no caption, no question
            metric.update(verdict, item.row)
            counts[name].update(entry["status"] for entry in done.replies)
            served |= {entry["model"] for entry in done.replies if entry["model"]}
            days |= {entry["at"][:10] for entry in done.replies}
        # 2. Their statistics, and the value of each image.
        stats |= metric.compute()
        parts = zip(items, *(part.tolist() for part in metric.parts()), strict=True)
        lines += [{"key": item.key, "metric": name, "value": c / t} for item, c, t in parts if t]
    # 3. What needs no judge.
    present = [item for item in items if item.caption is not None]
    texts = [item.caption or "" for item in present]
    records = [
        {"key": item.key, "image": str(item.image), "captions": [{"text": text} for text in item.references]}
        for item in present
    ]
    with Bar(total=len(metrics) * len(texts), unit="caption", desc="score") as bar:
        for metric in metrics:
            metric.reset()
            for start in range(0, len(texts), CHUNK):
                part = slice(start, start + CHUNK)
                metric.update(texts[part], records[part])
                bar.update(len(texts[part]))
            stats |= metric.compute()
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
        stated = [{k: v for k, v in score["protocol"].items() if v not in (None, [])} for score in (one, other)]
        first, second = ({k: p[k] for k in stated[0] if k in stated[1]} for p in stated)
        if different := changes(first, second, f"in {name}"):
            raise UserError(
                f"{other_name} does not belong in one table with {name} ({different}): evaluate them alike, or apart"
            )


def table_text(scores: Mapping[str, Score]) -> str:
    """Markdown: the judged metrics with a row per system, all statistics with a row each, what may have gone wrong."""
    names = list(dict.fromkeys(name for score in scores.values() for name in score["stats"]))
    judged = [name for name in names if any(name in score["counts"] for score in scores.values())]
    rows = [[system, *(_cell(name, score["stats"].get(name)) for name in judged)] for system, score in scores.items()]
    headline = [*_markdown([["system", *judged], *rows]), ""] if judged else []
    details = [[name, *(_cell(name, score["stats"].get(name)) for score in scores.values())] for name in names]
    notes = [_note(system, score) for system, score in scores.items()]
    return "\n".join([*headline, *_markdown([["statistic", *scores], *details]), "", *notes]) + "\n"


def _cell(name: str, stat: Stat | None) -> str:
    if stat is None or stat["mean"] is None:  # nothing to divide by
        return ""
    times = 100 if name.startswith(SHARES) and not name.endswith("_claims") else 1
    error = "" if stat["se"] is None else f" ± {times * stat['se']:.2f}"
    return f"{times * stat['mean']:.2f}{error}"


def _note(system: str, score: Score) -> str:
    """A line on what is behind a row."""
    captions, protocol = score["captions"], score["protocol"]
    parts = [f"captions {captions['sha256'][:12]}"]
    parts += [
        f"{name} {protocol[name] if protocol[name] is not None else 'not stated'}" for name in ("prompt", "length")
    ]
    parts += [f"{captions[name]} {name.replace('_', ' ')}" for name in ("cleaned", "other_images") if captions[name]]
    for name, count in score["counts"].items():
        problems = [f"{reason} {number}" for reason, number in count.items() if number and reason != "ok"]
        parts += [f"{name}: {', '.join(problems)}"] if problems else []
    if score["judged"]:
        first, last = score["judged"]
        judge = ", ".join(score["served"]) or protocol["judge"]["model"]
        parts.append(f"judged by {judge} on {first if first == last else f'{first} to {last}'}")
    return f"- {system}: {'; '.join(parts)}"


def _markdown(rows: Iterable[Sequence[str]]) -> list[str]:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return [head, "|---" * (head.count("|") - 1) + "|", *body]
