"""One page, without any network, of images with the captions of several systems beside each other, sorted by score.

    runs/*/items.jsonl, verdicts.jsonl + images -> gzipped in base64 -> caption_page.html

Tokens that a sampler has rewritten are marked, if the captions were written with `trace: true`; the mark says what was
there before.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from src.evaluation.scores import scale
from src.generation.player import data_url
from src.io.files import write_bytes

TEMPLATE = Path(__file__).with_suffix(".html")


def write_caption_page(path: Path, runs: Sequence[Path], *, num: int) -> None:
    """Write the page of the first `num` images of each run."""
    packed = gzip.compress(json.dumps([run_data(run, num) for run in runs]).encode(), mtime=0)
    text = TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", base64.b64encode(packed).decode())
    write_bytes(path, text.encode())


def run_data(run: Path, num: int) -> dict[str, Any]:
    """What the page shows of a run: systems, metrics, and by image a caption, marks and scores of each system."""
    with (run / "items.jsonl").open(encoding="utf-8") as lines:
        items = [json.loads(line) for line in islice(lines, num)]
    keys, scores = {item["key"] for item in items}, dict[tuple[str, str, str], float]()
    with (run / "verdicts.jsonl").open(encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            if line["key"] in keys:
                value = scale(line["metric"]) * line["value"]
                scores[line["key"], line["system"], line["metric"]] = round(value, 2)
    systems = list(dict.fromkeys(system for item in items for system in item["captions"]))
    metrics = list(dict.fromkeys(metric for _, _, metric in scores))
    shown = [
        {
            "key": item["key"],
            "image": picture(item["image"]),
            "references": item["references"],
            "captions": [item["captions"].get(system) for system in systems],
            "edits": [item["edits"].get(system, []) for system in systems],
            "scores": [{m: scores.get((item["key"], system, m)) for m in metrics} for system in systems],
        }
        for item in items
    ]
    return {"name": run.name, "systems": systems, "metrics": metrics, "items": shown}


def picture(file: str | None) -> str | None:
    """A small JPEG, or None if the image is no longer there."""
    if file is None or not Path(file).exists():
        return None
    with Image.open(file) as image:
        return data_url(image)
