"""Inference-time scaling: a metric against forward calls, over all cells of an evaluation.

    table of results -> points -> curve.json: {metric, best, points, budgets}, a plot, and a table of budgets

A line joins the points of one sampler over tokens/step; variants of a sampler that run at a single tokens/step share
one line. A point is on the Pareto front if no other one is as good with fewer calls, or better with as many.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib import colormaps
from matplotlib.figure import Figure

from src.evaluation.grid import family
from src.evaluation.results import Cell, Table
from src.metrics.caption import Stat

MARKERS = "osD^vP*Xh<>"
STYLES = ("-", "--", "-.", ":")


class Point(NamedTuple):
    """A cell: forward calls and seconds per caption, and a metric. good: its mean, negative if low is best"""

    cell: Cell
    forwards: Stat
    seconds: Stat
    value: Stat
    good: float

    @property
    def row(self) -> tuple[str, str]:
        return self.cell.method, family(self.cell.sampler)

    @property
    def calls(self) -> float:
        return self.forwards["mean"]


class Budget(NamedTuple):
    """The best point within a number of forward calls, and the baseline's best (None: it needs more calls)."""

    forwards: int
    best: Point
    baseline: Point | None


def points_of(table: Table, metric: str, *, lowest: bool = False) -> list[Point]:
    """One point per cell that has a value of the metric. lowest: low values are good."""
    points, sign = [], -1 if lowest else 1
    for cell, stats in table.items():
        if metric in stats and not math.isnan(mean := stats[metric]["mean"]):
            points.append(Point(cell, stats["forwards"], stats["seconds"], stats[metric], sign * mean))
    return points


def front_of(points: Sequence[Point]) -> list[Point]:
    """The Pareto front, by increasing forward calls."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.calls, -p.good)):
        if not front or point.good > front[-1].good:
            front.append(point)
    return front


def lines_of(points: Sequence[Point]) -> dict[tuple[str, str], list[Point]]:
    """(method, name of the line) -> its points, by increasing forward calls."""
    lines: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        method, sampler, _ = point.cell
        speeds = {p.cell.tokens_per_step for p in points if p.cell[:2] == (method, sampler)}
        lines.setdefault((method, sampler if len(speeds) > 1 else family(sampler)), []).append(point)
    return {name: sorted(line, key=lambda p: p.calls) for name, line in lines.items()}


def budgets_of(points: Sequence[Point]) -> list[Budget]:
    """The best point within each power of two of forward calls. The baseline is the sampler of the first point."""
    calls = [point.calls for point in points]
    budgets = []
    for power in range(math.ceil(math.log2(min(calls))), math.ceil(math.log2(max(calls))) + 1):
        within = [point for point in points if point.calls <= 2**power]
        base = [point for point in within if point.row == points[0].row]
        budgets.append(Budget(2**power, front_of(within)[-1], front_of(base)[-1] if base else None))
    return budgets


def to_dict(points: Sequence[Point], *, metric: str, best: str) -> dict:
    """The content of curve.json."""
    front, listed = front_of(points), []
    for point in points:
        stats = {"forwards": point.forwards, "seconds": point.seconds, "value": point.value}
        listed.append({"cell": point.cell.name, **point.cell._asdict(), **stats, "front": point in front})
    budgets = [
        {"forwards": b.forwards, "best": b.best.cell.name, "baseline": b.baseline and b.baseline.cell.name}
        for b in budgets_of(points)
    ]
    return {"metric": metric, "best": best, "points": listed, "budgets": budgets}


def plot(panels: Mapping[str, Sequence[Point]], path: Path, *, front: bool) -> None:
    """Plot each metric against forward calls per caption: one colour per method and sampler.

    panels: metric -> its points; front: mark the Pareto front in grey
    """
    lines = {metric: lines_of(points) for metric, points in panels.items()}
    rows = list(dict.fromkeys(point.row for points in panels.values() for point in points))
    several_methods = len({method for method, _ in rows}) > 1
    colours = colormaps["tab10" if len(rows) <= 10 else "tab20"]
    height = max(5.2, 1.0 + 0.19 * max(map(len, lines.values())))
    figure = Figure(figsize=(4.5 + 6 * len(panels), height), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (metric, points) in zip(axes, panels.items(), strict=True):
        numbers = dict.fromkeys(rows, 0)  # of the lines of a method and sampler
        for (method, name), line in lines[metric].items():
            row = line[0].row
            axis.errorbar(
                [point.calls for point in line],
                [point.value["mean"] for point in line],
                xerr=[2 * (point.forwards["se"] or 0.0) for point in line],
                yerr=[2 * (point.value["se"] or 0.0) for point in line],
                color=colours(rows.index(row) % colours.N), marker=MARKERS[numbers[row] % len(MARKERS)],
                linestyle=STYLES[numbers[row] % len(STYLES)], markersize=5, linewidth=1.4, elinewidth=0.7, capsize=2,
                alpha=0.85, label=f"{method}, {name}" if several_methods else name,
            )  # fmt: skip
            numbers[row] += 1
        if front:
            best = front_of(points)
            calls, values = [point.calls for point in best], [point.value["mean"] for point in best]
            axis.step(calls, values, where="post", color="0.65", linewidth=4, alpha=0.6, zorder=0, label="Pareto front")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("forward calls per caption")
        axis.set_title(f"{metric} (bars: ± 2 standard errors)", fontsize=11)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def speed_figure(speeds: Sequence[int], curves: Mapping[int, Sequence[float]], *, metric: str) -> Figure:
    """A metric against tokens per step, a line for each training step of `curves`; the newest one stands out."""
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axis = figure.subplots()
    *earlier, newest = curves
    for number, step in enumerate(earlier):
        axis.plot(speeds, curves[step], color=str(0.9 - 0.4 * number / len(earlier)), linewidth=1)
    axis.plot(speeds, curves[newest], color="C0", marker="o", linewidth=2, label=f"step {newest}")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xticks(speeds)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("tokens per step")
    axis.set_ylabel(metric)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower left")
    return figure
