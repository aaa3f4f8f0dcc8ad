"""The report of an evaluation: tables and claims as Markdown, a plot, and images with their captions.

    write_report(store, headline=["quality"], curve=None, metrics=metrics, examples=batch)

    store -> table.md (also returned), captions.png, and quality.png or curve.png with curve.json

    scores[cell][metric] = [score of each caption, ...]         same order of captions in all cells

The first row (first method and sampler) is the baseline, the last row the contender.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

from torchmetrics import Metric

from src.evaluation.drawing import draw_examples
from src.evaluation.pareto import Point, budgets_of, plot, points_of, to_dict
from src.evaluation.results import Cell, ResultStore, Stats, Table
from src.io.errors import UserError
from src.io.files import write_bytes, write_json
from src.io.words import counted
from src.metrics.caption import Stat, summarise
from src.types import Batch

Scores = Mapping[Cell, Mapping[str, Sequence[float]]]
BUDGETS = "each best cell was chosen on these same captions, so its value is optimistic; differences are paired"
logger = logging.getLogger(__name__)


def check_names(stats: Stats, *, headline: Sequence[str], curve: dict | None) -> None:
    """Raise UserError for a metric of the config that a finished cell does not have."""
    for place, names in (("headline", headline), ("curve", [curve["metric"]] if curve else [])):
        if unknown := [name for name in names if name not in stats]:
            raise UserError(f"evaluate.{place}: no metric {', '.join(unknown)}; there are {', '.join(stats)}")


def write_report(
    store: ResultStore, *, headline: Sequence[str], curve: dict | None, metrics: Sequence[Metric], examples: Batch
) -> str:
    """Write all files of the report. Returns the text of table.md.

    curve: {metric, best}: plot that metric alone, and name the best cells within budgets of forward calls
    examples: samples whose images are shown, the first ones of the split
    """
    check_names(next(iter(store.table.values())), headline=headline, curve=curve)
    captions = {cell: store.captions(cell) for cell in store.table}
    scores = {
        cell: {name: [line["scores"][name] for line in lines] for name in lines[0]["scores"]}
        for cell, lines in captions.items()
    }
    budgets = None
    if curve is None:
        plot({metric: points_of(store.table, metric) for metric in headline}, store.out / "quality.png", front=False)
    elif points := points_of(store.table, curve["metric"], lowest=curve["best"] == "lowest"):
        write_json(store.out / "curve.json", to_dict(points, **curve))
        plot({curve["metric"]: points}, store.out / "curve.png", front=True)
        budgets = budget_table(points, scores, curve["metric"])
    else:
        logger.warning("no cell has a value of %s: no curve is drawn", curve["metric"])
    breakdown = [] if budgets else [name for metric in metrics for name in getattr(metric, "breakdown", ())]
    columns = {"headline": headline, "breakdown": breakdown, "budgets": budgets}
    text = report_text(store.table, store.model_stats, scores, **columns)
    write_bytes(store.out / "table.md", text.encode())
    if any(examples.images):
        draw_examples(captions, metrics, examples).save(store.out / "captions.png")
    logger.info("%s: table.md (below), plots, captions/ and results.json", store.out)
    return text


def report_text(
    table: Table,
    model_stats: Mapping[str, Stats],
    scores: Scores,
    *,
    headline: Sequence[str],
    breakdown: Sequence[str] = (),
    budgets: list[list[str]] | None = None,
) -> str:
    """Notes, tables of the models and of the headline metrics, and the claims or, in their place, the budgets."""
    # 1. Notes: the columns, and the cost of each row.
    rows, speeds = _axes(table)
    num_captions = max(len(values) for columns in scores.values() for values in columns.values())
    columns = ", ".join(map(str, speeds))
    notes = [f"columns: {columns} tokens per step; mean ± standard error over {counted(num_captions, 'caption')}"]
    for row in rows:
        cells = [table.get(Cell(*row, n)) for n in speeds]
        costs = [f"{cell['forwards']['mean']:.1f} ({cell['seconds']['mean']:.2g})" if cell else "-" for cell in cells]
        notes.append(f"forward calls (and seconds) per caption, {' '.join(row)}: {', '.join(costs)}")
    # 2. Tables; a cell without a value is a dash.
    tables = []
    columns_of: dict[str, list[str]] = {}  # a table of models -> its columns: "p_fix at t=0" is "0" of "p_fix at t"
    for name in next(iter(model_stats.values()), {}):
        table_name, _, column = name.rpartition("=")
        columns_of.setdefault(table_name or "bound per token", []).append(column)
    for title, names in columns_of.items():
        keys = [f"{title}={name}" if title != "bound per token" else name for name in names]
        lines = [[method, *(stat_text(stats[key]) for key in keys)] for method, stats in model_stats.items()]
        tables.append([[title, *names], *lines])
    for metric in headline:
        lines = [[*row, *(stat_text(table.get(Cell(*row, n), {}).get(metric)) for n in speeds)] for row in rows]
        tables.append([[metric, "sampler", *map(str, speeds)], *lines])
    if breakdown:
        lines = [[cell.name, *(stat_text(stats.get(name)) for name in breakdown)] for cell, stats in table.items()]
        tables.append([["cell", *breakdown], *lines])
    # 3. Budgets or claims.
    if budgets:
        tables.append(budgets)
    lines = [BUDGETS] if budgets else [claim for metric in headline for claim in claims(scores, metric)]
    blocks = [_bullets(notes), *map(markdown, tables), _bullets(lines)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def claims(scores: Scores, metric: str) -> list[str]:
    """The change of each row from the lowest to the highest speed, and contender minus baseline at each speed.

    A loss is also given as a share of the baseline's loss, if both are larger than two standard errors. Rows that lack
    a speed are left out; a corpus metric has no scores to pair, so there are no claims.
    """
    rows, speeds = _axes(scores)
    values = {cell: columns[metric] for cell, columns in scores.items() if metric in columns}
    rows = [row for row in rows if all(Cell(*row, n) in values for n in speeds)]
    lines, base_loss = [], 0.0  # of the first row; 0: not significant, or a gain
    for row in rows if len(speeds) > 1 else ():
        change = paired_difference(values[Cell(*row, speeds[-1])], values[Cell(*row, speeds[0])])
        mean, error = change["mean"], change["se"]
        line = f"{metric} from {speeds[0]} to {speeds[-1]} tokens/step: {' '.join(row)} {_signed(change)}"
        if error is None or abs(mean) <= 2 * error:
            line += ", no significant change"
        elif row == rows[0]:
            base_loss = min(0.0, mean)
        elif base_loss < 0 and mean < 0:
            line += f", {mean / base_loss:.0%} of the change of {' '.join(rows[0])}"
        lines.append(line)
    for n in speeds if len(rows) > 1 else ():
        gain = paired_difference(values[Cell(*rows[-1], n)], values[Cell(*rows[0], n)])
        difference = f"{' '.join(rows[-1])} - {' '.join(rows[0])} {_signed(gain)}"
        lines.append(f"{metric} at {counted(n, 'token')}/step: {difference}")
    return lines


def budget_table(points: Sequence[Point], scores: Scores, metric: str) -> list[list[str]]:
    """A header and one line per budget, without lines that repeat the one above."""
    header = [f"calls up to: best {metric}", "cell", "calls", "seconds", metric]
    lines = [[*header, f"best of {' '.join(points[0].row)}", "difference"]]
    for forwards, best, base in budgets_of(points):
        cells = [best.cell.name, f"{best.calls:.1f}", f"{best.seconds['mean']:.3g}", stat_text(best.value)]
        if base is None or base == best:
            cells += [stat_text(base and base.value), "-"]
        elif metric in scores[best.cell] and metric in scores[base.cell]:  # else a corpus metric: nothing to pair
            difference = paired_difference(scores[best.cell][metric], scores[base.cell][metric])
            cells += [stat_text(base.value), stat_text(difference, signed=True)]
        else:
            cells += [stat_text(base.value), f"{best.value['mean'] - base.value['mean']:+.3f}"]
        if cells != lines[-1][1:]:
            lines.append([str(forwards), *cells])
    return lines


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Stat:
    """Mean of a - b over captions of the same images, with the standard error of the paired differences."""
    return summarise([x - y for x, y in zip(a, b, strict=True)])


def stat_text(stat: Stat | None, *, signed: bool = False) -> str:
    """A mean and its standard error, or a dash for no value."""
    if stat is None or math.isnan(stat["mean"]):
        return "-"
    digits = 3 if abs(stat["mean"]) < 2 else 1  # shares, and counts such as forward calls
    mean = f"{stat['mean']:{'+' if signed else ''}.{digits}f}"
    return mean + (f" ±{stat['se']:.{digits}f}" if stat["se"] is not None else "")


def _signed(stat: Stat) -> str:
    return f"{stat['mean']:+.3f}" + (f" ± {stat['se']:.3f}" if stat["se"] is not None else "")


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _axes(cells: Mapping[Cell, object]) -> tuple[list[tuple[str, str]], list[int]]:
    """The rows (method, sampler) in the order of the cells, and the speeds."""
    rows = dict.fromkeys((cell.method, cell.sampler) for cell in cells)
    return list(rows), sorted({cell.tokens_per_step for cell in cells})
