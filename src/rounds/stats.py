"""Counts of the drafts and edits of a round, for its manifest, for TensorBoard, and as a line of text.

stats.add(answer); stats.place(codec, draft, edits) -> spans; stats.close()
summary(manifest)       "40 drafted, 33 revised, ...; edits rejected: 2 absent"
yields(manifest)        {"yield": .92, "yield_unrepaired": .81}
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from src.chat.journal import Answer
from src.io.words import counted
from src.text.align import Aligned, locate
from src.text.tokenizer import Codec
from src.types import Draft, Edit, Revision

COUNTS = ("drafted", "late", "revised", "right", "unusable", "failed", "unanswered", "edits")


@dataclass
class RoundStats:
    """Counts of a round; each field is a key of its manifest.

    counts: drafted + late = revised + failed + unanswered, revised = right + written + unusable (no edit placed);
        `late` are drafts of the previous round that were asked about again, `edits` are placed edits
    kinds: placed edits by kind of mistake
    rejected: edits that could not be placed, by reason
    failures: failed drafts by reason
    again: drafts for which asking again may help, by reason
    latency: percentiles, in seconds, of the answers whose expert reports it
    """

    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTS, 0)))
    kinds: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    again: Counter[str] = field(default_factory=Counter)
    latency: dict[str, float] = field(default_factory=dict)
    _seconds: list[float] = field(default_factory=list)

    def add(self, answer: Answer | None, *, late: bool = False) -> None:
        """Count a draft and its answer."""
        self.counts["late" if late else "drafted"] += 1
        if answer is None:
            self.counts["unanswered"] += 1
            self.again["unanswered"] += 1
            return
        if isinstance(answer, Revision):
            self.counts["revised"] += 1
            self.counts["right"] += not answer.edits
        else:
            self.counts["failed"] += 1
            self.failures[answer.reason] += 1
            self.again.update([answer.reason] * answer.retry)
        if "seconds" in answer.usage:
            self._seconds.append(answer.usage["seconds"])

    def place(self, codec: Codec, draft: Draft, edits: Sequence[Edit]) -> Aligned:
        """Place the edits of a draft as token spans and count them."""
        aligned = locate(codec, draft.token_ids, edits)
        self.rejected += aligned.rejected
        self.kinds.update(span.kind for span in aligned.spans if span.kind)
        self.counts["edits"] += len(aligned.spans)
        self.counts["unusable"] += not aligned.spans
        self.counts.update(aligned.resized)
        return aligned

    def close(self) -> None:
        """Compute the percentiles of the latency, after the last answer."""
        if len(self._seconds) > 1:
            cuts = statistics.quantiles(self._seconds, n=100, method="inclusive")
            self.latency.update({f"p{number}": round(cuts[number - 1], 3) for number in (50, 90, 99)})

    @property
    def manifest(self) -> dict[str, Any]:
        """All fields but `counts`, by name; live objects that later calls still update."""
        names = ("kinds", "rejected", "failures", "again", "latency")
        return {name: getattr(self, name) for name in names}


def summary(manifest: Mapping[str, Any]) -> str:
    """One line of text: the counts, then rejected edits and failed drafts by reason."""
    parts = [
        ", ".join(
            counted(count, "edit") if name == "edits" else f"{count} {name}"
            for name, count in manifest["counts"].items()
            if count or name != "late"
        )
    ]
    for kind, label in (("rejected", "edits rejected"), ("failures", "drafts failed")):
        if reasons := manifest[kind]:
            parts.append(f"{label}: " + ", ".join(f"{count} {reason}" for reason, count in reasons.items()))
    return "; ".join(parts)


def yields(manifest: Mapping[str, Any]) -> dict[str, float]:
    """Share of the edits that could be placed (`yield`), and the same before repairs (`yield_unrepaired`).

    `yield` is missing if there are no edits, `yield_unrepaired` if the expert was not asked to repair any.
    """
    placed, usage = manifest["counts"]["edits"], manifest.get("usage", {})
    shares = {}
    if total := placed + sum(manifest["rejected"].values()):
        shares["yield"] = placed / total
    if usage.get("returned") and usage.get("proposed"):
        shares["yield_unrepaired"] = 1 - usage["returned"] / usage["proposed"]
    return shares
