"""How a new judge shifts the scale of an old one, on captions that both have judged.

    python -m src.evaluate conf=eval/calibrate "captions={a: a.json, b: b.json}" evaluate.old=old.jsonl judge.model=NEW

    old.jsonl      {"system": "a", "key": "test_00012", "metric": "clair", "value": 0.85} a line

It is the verdicts.jsonl of an earlier run, or made from any log of the old judge; values are from 0 to 1, of CapArena
100, 0 or -100. A published number may be carried over to the new judge's scale only as far as these say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from src.evaluation import markdown
from src.evaluation.statistics import scipy_stats
from src.io.errors import UserError
from src.metrics.caption import summarise

NEAR = 0.1  # two values from 0 to 1 that agree
HEAD = ["metric", "images", "old", "new", "shift", "rank correlation of images", "of systems", "agreement"]


def calibration_text(old_path: Path, new: Sequence[dict[str, Any]]) -> str:
    """A row for each metric: mean of old and new, shift with standard error, Spearman's correlations, agreement.

    Agreement is the share of images whose values differ by at most 0.1; of CapArena, that have the same winner.
    Raises UserError without SciPy, or if no image was judged by both.
    """
    stats = scipy_stats()
    old = [json.loads(line) for line in old_path.read_text("utf-8").splitlines() if line.strip()]
    old_values = {(line["metric"], line["system"], line["key"]): line["value"] for line in old}
    pairs: dict[str, list[tuple[str, float, float]]] = {}  # metric -> (system, old, new)
    for line in new:
        if (before := old_values.get((line["metric"], line["system"], line["key"]))) is not None:
            pairs.setdefault(line["metric"], []).append((line["system"], before, line["value"]))
    if not pairs:
        raise UserError(f"{old_path} has no image, system and metric in common with this run; check their names")

    def rank(one: np.ndarray, other: np.ndarray) -> str:
        constant = len(one) < 3 or len(set(one)) == 1 or len(set(other)) == 1
        return "" if constant else f"{stats.spearmanr(one, other)[0]:.3f}"

    rows = [HEAD]
    for metric, some in pairs.items():
        systems = np.array([system for system, _, _ in some])
        before, after = np.array([[a, b] for _, a, b in some], dtype=np.float64).T
        shift = summarise((after - before).tolist())
        means = [[values[systems == name].mean() for name in sorted(set(systems))] for values in (before, after)]
        signed = metric == "caparena"
        agree = np.sign(before) == np.sign(after) if signed else np.abs(after - before) <= NEAR + 1e-9
        error = math.nan if shift["se"] is None else shift["se"]
        cells = [
            metric,
            str(len(some)),
            f"{before.mean():.4g}",
            f"{after.mean():.4g}",
            f"{shift['mean']:+.4g} ± {error:.2g}",
        ]
        cells += [rank(before, after), rank(*map(np.array, means)), f"{agree.mean():.3f}"]
        rows.append(cells)
    return markdown.table(rows) + "\n"
