"""The report of an evaluation: tables, claims in words, a plot and a picture. Functions of plain data.

    results["methods"][method][sampler][tokens/step][metric] = {mean, se, n}       from results.json
    results["bounds"][method][metric] = {mean, se, n}                              likelihood bounds, if any
    scores[method, sampler, tokens/step][metric] = [score of each caption, ...]    same order of captions in all cells

The first row (first method and sampler) is the baseline, the last row the contender.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from src.evaluation.drawing import Colour, Piece, Placed, enlarge, font, layout, paint
from src.metrics.caption import Mark, Stat, summarise

Row = tuple[str, str]
Table = list[list[str]]
Scores = Mapping[tuple[str, str, int], Mapping[str, Sequence[float]]]
FILL: dict[str, Colour] = {"ungrammatical": (255, 226, 150), "false": (250, 190, 190)}
INK: dict[str, Colour] = {"ungrammatical": (90, 60, 0), "false": (170, 0, 0)}
MEANING = {"false": "contradicts the image", "ungrammatical": "not a sentence of the grammar"}
BUDGETS = "each best cell was chosen on these same captions, so its value is optimistic; differences are paired"
SIDE, COLUMN, PAD, TEXT, HEAD = 150, 310, 14, 14, 15  # pixels of captions.png


@dataclass(frozen=True)
class Panel:
    """One caption of an image, with its flaws marked."""

    title: str
    text: str
    marks: list[Mark]


@dataclass(frozen=True)
class Example:
    """An image with captions by several methods."""

    image: Image.Image
    panels: list[Panel]


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Stat:
    """Mean of a - b over captions of the same images, with the standard error of the paired differences."""
    return summarise([x - y for x, y in zip(a, b, strict=True)])


def rows_of(results: dict) -> list[Row]:
    """(method, sampler) of each row, in the order of the results."""
    return [(method, sampler) for method, samplers in results["methods"].items() for sampler in samplers]


def speeds_of(results: dict) -> list[int]:
    """The speeds in tokens per step, ascending."""
    rows = (cells for samplers in results["methods"].values() for cells in samplers.values())
    return sorted({int(speed) for cells in rows for speed in cells})


def text_report(results: dict, scores: Scores, *, headline: Sequence[str], budgets: Table | None = None) -> str:
    """Notes on the tables, the tables of the headline metrics, and the claims, as aligned plain text.

    budgets: a table of the best cells within budgets of forward calls; replaces the claims
    """
    blocks = ["\n".join(_aligned(table)) for table in _tables(results, headline, budgets)]
    lines = [BUDGETS] if budgets else claims(results, scores, headline=headline)
    return "\n\n".join(["\n".join(notes(results, scores)), *blocks, "\n".join(lines)]) + "\n"


def markdown_report(results: dict, scores: Scores, *, headline: Sequence[str], budgets: Table | None = None) -> str:
    """The text report as Markdown."""
    blocks = ["\n".join(_piped(table)) for table in _tables(results, headline, budgets)]
    lines = [BUDGETS] if budgets else claims(results, scores, headline=headline)
    head, foot = ("\n".join(f"- {line}" for line in part) for part in (notes(results, scores), lines))
    return "\n\n".join([head, *blocks, foot]) + "\n"


def _tables(results: dict, headline: Sequence[str], budgets: Table | None) -> list[Table]:
    """Tables of the bounds if there are any, of each headline metric, and of the budgets."""
    bounds = [_bounds(results["bounds"])] if results.get("bounds") else []
    return [*bounds, *(_grid(results, metric) for metric in headline), *([budgets] if budgets else [])]


def _bounds(bounds: dict[str, dict[str, Stat]]) -> Table:
    names = list(next(iter(bounds.values())))
    lines = [[method, *(stat_text(stats[name]) for name in names)] for method, stats in bounds.items()]
    return [["bound per token", *names], *lines]


def notes(results: dict, scores: Scores) -> list[str]:
    """Notes for reading the tables: the columns, the cost of each row, and the effect of `eos_last`."""
    speeds = ", ".join(str(n) for n in speeds_of(results))
    num_captions = max(len(values) for columns in scores.values() for values in columns.values())
    lines = [f"columns: {speeds} tokens per step; mean ± standard error over {num_captions} captions"]
    for method, sampler in rows_of(results):
        cells = results["methods"][method][sampler]
        costs = ", ".join(_cost(cells.get(str(n), {})) for n in speeds_of(results))
        lines.append(f"forward calls (and seconds) per caption, {method} {sampler}: {costs}")
    samplers = results.get("meta", {}).get("settings", {}).get("samplers", {}).values()
    if any(sampler.get("eos_last") for sampler in samplers):
        lines.append(
            "with eos_last, the last steps of a sampler without a reviser only fill in end of text; a reviser goes on "
            "rewriting the text in them"
        )
    return lines


def _cost(cell: dict[str, Stat]) -> str:
    calls, seconds = cell.get("forwards"), cell.get("seconds")
    if calls is None:
        return "-"
    return f"{calls['mean']:.1f}" + (f" ({seconds['mean']:.2g})" if seconds else "")


def claims(results: dict, scores: Scores, *, headline: Sequence[str]) -> list[str]:
    """For each metric: the change of each row from the lowest to the highest speed, and contender minus baseline.

    A loss is also given as a share of the baseline's loss. Rows that lack a speed are left out.
    """
    speeds = speeds_of(results)
    rows = [row for row in rows_of(results) if all((*row, n) in scores for n in speeds)]
    lines = []
    for metric in headline:
        if not rows or metric not in scores[*rows[0], speeds[0]]:
            continue  # a corpus metric has no scores to pair
        if len(speeds) > 1:
            lines += _drops(rows, speeds, scores, metric)
        if len(rows) > 1:
            lines += _gains(rows, speeds, scores, metric)
    return lines


def _drops(rows: list[Row], speeds: list[int], scores: Scores, metric: str) -> list[str]:
    first, last = speeds[0], speeds[-1]
    drops = [paired_difference(scores[*row, last][metric], scores[*row, first][metric]) for row in rows]
    lines = []
    for row, drop in zip(rows, drops, strict=True):
        base = drops[0]["mean"]
        line = f"{metric} from {first} to {last} tokens/step: {_name(row)} {_signed(drop)}"
        if row != rows[0] and base < 0 and drop["mean"] <= 0:
            line += f", {drop['mean'] / base:.0%} of the change of {_name(rows[0])}"
        lines.append(line)
    return lines


def _gains(rows: list[Row], speeds: list[int], scores: Scores, metric: str) -> list[str]:
    best, base = rows[-1], rows[0]
    gains = [paired_difference(scores[*best, n][metric], scores[*base, n][metric]) for n in speeds]
    pair = f"{_name(best)} - {_name(base)}"
    return [f"{metric} at {n} tokens/step: {pair} {_signed(d)}" for n, d in zip(speeds, gains, strict=True)]


def _name(row: Row) -> str:
    return " ".join(row)


def _signed(stat: Stat) -> str:
    return f"{stat['mean']:+.3f}" + (f" ± {stat['se']:.3f}" if stat["se"] is not None else "")


def _grid(results: dict, metric: str) -> Table:
    """A header and one line per row; a cell without the metric is a dash."""
    speeds = speeds_of(results)
    lines = [[metric, "sampler", *(str(n) for n in speeds)]]
    for method, sampler in rows_of(results):
        cells = results["methods"][method][sampler]
        lines.append([method, sampler, *(stat_text(cells.get(str(n), {}).get(metric)) for n in speeds)])
    return lines


def stat_text(stat: Stat | None, *, signed: bool = False) -> str:
    """A mean and its standard error, or a dash for None."""
    if stat is None:
        return "-"
    digits = 3 if abs(stat["mean"]) < 2 else 1  # shares, and counts such as forward calls
    mean = f"{stat['mean']:{'+' if signed else ''}.{digits}f}"
    return mean + (f" ±{stat['se']:.{digits}f}" if stat["se"] is not None else "")


def _aligned(grid: Table) -> list[str]:
    widths = [max(len(line[i]) for line in grid) for i in range(len(grid[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in grid]


def _piped(grid: Table) -> list[str]:
    lines = ["| " + " | ".join(line) + " |" for line in grid]
    return [lines[0], "|" + "---|" * len(grid[0]), *lines[1:]]


def plot(results: dict, path: Path, *, headline: Sequence[str]) -> None:
    """Plot each headline metric against tokens/step: one colour per method, one line style per sampler."""
    figure = Figure(figsize=(4.8 * len(headline), 4.4), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(1, len(headline), squeeze=False)[0]
    for axis, metric in zip(axes, headline, strict=True):
        _draw_axis(axis, results, metric)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _draw_axis(axis: Axes, results: dict, metric: str) -> None:
    methods = list(results["methods"])
    samplers = list(dict.fromkeys(sampler for _, sampler in rows_of(results)))
    for number, (method, sampler) in enumerate(rows_of(results)):
        cells = results["methods"][method][sampler]
        points = sorted((int(n), cell[metric]) for n, cell in cells.items() if metric in cell)
        shift = 1.012**number  # so that error bars do not hide each other
        style = ("--", "-", ":", "-.")[samplers.index(sampler) % 4]
        axis.errorbar(
            [n * shift for n, _ in points],
            [stat["mean"] for _, stat in points],
            yerr=[2 * (stat["se"] or 0.0) for _, stat in points],
            color=f"C{methods.index(method)}", linestyle=style, marker="os^D"[samplers.index(sampler) % 4],
            markersize=5, linewidth=1.8, capsize=3, label=f"{method}, {sampler}",
        )  # fmt: skip
    speeds = speeds_of(results)
    axis.set_xscale("log", base=2)
    axis.set_xticks(speeds, [str(n) for n in speeds])
    axis.minorticks_off()
    axis.set_xlabel("tokens per step")
    axis.set_title(f"{metric} (bars: ± 2 standard errors)", fontsize=11)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_ylim(bottom=0, top=1.03 if axis.get_ylim()[1] <= 1.2 else None)


def picture(examples: Sequence[Example], path: Path) -> None:
    """Draw one image per row with its captions side by side and flaws in colour; a legend below names the colours."""
    texts = [[_caption(panel) for panel in example.panels] for example in examples]
    heights = [max([SIDE, *(placed.height for placed in row)]) + PAD for row in texts]
    titles = [panel.title for panel in examples[0].panels]
    width = PAD + SIDE + len(titles) * (PAD + COLUMN) + PAD
    head = HEAD + 2 * PAD
    sheet = Image.new("RGB", (width, head + sum(heights) + head), "white")
    draw = ImageDraw.Draw(sheet)
    for number, title in enumerate(titles):
        draw.text((_left(number), head // 2), title, fill=(0, 0, 0), font=font(HEAD), anchor="lm")
    top = head
    for example, row, height in zip(examples, texts, heights, strict=True):
        draw.line((PAD, top - PAD // 2, width - PAD, top - PAD // 2), fill=(215, 215, 215))
        sheet.paste(enlarge(example.image, side=SIDE), (PAD, top))
        for number, placed in enumerate(row):
            paint(draw, placed, at=(_left(number), top), size=TEXT)
        top += height
    paint(draw, _legend(examples, width), at=(_left(0), top), size=TEXT)
    sheet.save(path)


def _left(number: int) -> int:
    return PAD + SIDE + PAD + number * (COLUMN + PAD)


def _caption(panel: Panel) -> Placed:
    if not panel.text.strip():
        return layout([Piece("(empty)", ink=(140, 140, 140))], width=COLUMN, size=TEXT)
    pieces, at = [], 0
    for word in panel.text.split():
        start = panel.text.index(word, at)
        at = start + len(word)
        mark = next((m for m in panel.marks if m.start < at and start < m.end), None)
        pieces.append(_piece(word, mark.flaw, wide=at < mark.end) if mark else Piece(word))
    return layout(pieces, width=COLUMN, size=TEXT)


def _piece(word: str, flaw: str, *, wide: bool = False) -> Piece:
    return Piece(word, ink=INK[flaw], fill=FILL[flaw], wide=wide)


def _legend(examples: Sequence[Example], width: int) -> Placed:
    flaws = {mark.flaw for example in examples for panel in example.panels for mark in panel.marks}
    pieces = [_piece(MEANING[flaw], flaw) for flaw in MEANING if flaw in flaws]
    return layout(pieces, width=width, size=TEXT, gap=24)
