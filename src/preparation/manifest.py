"""manifest.json and rejects.jsonl beside a dataset's index.json: what it is made of, for people.

manifest.json   sources with licence, origin, samples and what was left out of each; lengths of captions in tokens;
                hallucinated spans; splits with their shards, samples, bytes and sha256; and what became of all:
                records read = rejected + over_max + merged + kept, and of a split items = samples + left out
rejects.jsonl   everything that was left out, a line each: part (records, or a split), source, reason, place.
                Merged records are not listed. A record or sample that lost a caption or a turn is, and stays
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import numpy as np

from src.io.files import FORMAT
from src.preparation.counts import Reject
from src.preparation.splits import SPLITS

MANIFEST, REJECTS = "manifest.json", "rejects.jsonl"


class Manifest:
    """Collects what the manifest says; lengths: split -> tokens of a caption -> number of captions."""

    def __init__(self, sources: Iterable[Mapping[str, Any]]) -> None:
        self.sources = [dict(source) for source in sources]
        self.lengths: dict[str, Counter[int]] = {split: Counter() for split in SPLITS}
        self._shards: dict[str, list[dict]] = {split: [] for split in SPLITS}
        self._samples: Counter[int] = Counter()  # by the number of their source
        self._left_out: dict[str, dict[str, dict[str, dict]]] = {}  # source -> part -> reason

    def reject(self, part: str, stream: BinaryIO, reject: Reject) -> None:
        """Count what was left out, and write its line of rejects.jsonl."""
        source, reason, place = reject
        reasons = self._left_out.setdefault(source, {}).setdefault(part, {})
        reasons.setdefault(reason, {"count": 0, "example": place})["count"] += 1
        line = {"part": part, "source": source, "reason": reason, "place": place}
        stream.write((json.dumps(line, ensure_ascii=False) + "\n").encode())

    def shard(self, split: str, entry: Mapping[str, Any]) -> None:
        """Add a shard by its index entry."""
        self._samples.update(entry["source"] if "source" in entry else {0: entry["count"]})
        self._shards[split].append({name: entry[name] for name in ("name", "count", "bytes", "sha256")})

    def content(self, index: Mapping[str, Any], *, kept: int, sizes: Mapping[str, int]) -> dict:
        """The manifest of a dataset with this index.json.

        kept: items that the records became; sizes: items of each split
        """
        records = index["counts"].get("records", {})
        read, others = records.get("records", 0), {name: records.get(name, 0) for name in ("over_max", "merged")}
        equal, unequal = (
            sum(index["counts"].get(split, {}).get(reason, 0) for split in SPLITS)
            for reason in ("swaps", "swaps of unequal length")
        )
        return {
            "format": FORMAT,
            "kind": "manifest",
            "tokenizer": index["tokenizer"],
            "sources": [
                {**source, "samples": self._samples[number], "left_out": self._left_out.get(source["name"], {})}
                for number, source in enumerate(self.sources)
            ],
            "files": index["files"],
            "counts": index["counts"],
            "records": {"read": read, "rejected": read - kept - sum(others.values()), **others, "kept": kept}
            if read
            else None,  # none are read
            "caption_tokens": {split: percentiles(lengths) for split, lengths in self.lengths.items()},
            "hallucinated_spans": {
                "equal_length": equal,
                "unequal_length": unequal,
                "share_equal": round(equal / (equal + unequal), 4) if equal + unequal else None,
            },
            "splits": {
                split: {
                    "samples": (count := sum(entry["count"] for entry in entries)),
                    "left_out": sizes[split] - count,
                    "bytes": sum(entry["bytes"] for entry in entries),
                    "shards": entries,
                }
                for split, entries in self._shards.items()
            },
        }


def percentiles(lengths: Mapping[int, int]) -> dict:
    """Number, mean and percentiles of values that are counted. p95: the least value that 95 % do not exceed"""
    if not lengths:
        return {"count": 0}
    values = np.array(sorted(lengths))
    up_to = np.cumsum([lengths[value] for value in values.tolist()])
    count = int(up_to[-1])
    points = {f"p{q}": int(values[np.searchsorted(up_to, count * q / 100)]) for q in (5, 25, 50, 75, 95, 99)}
    mean = sum(value * number for value, number in lengths.items()) / count
    return {"count": count, "mean": round(mean, 2), **points, "max": int(values[-1])}
