"""Inference-time scaling: one metric against forward calls, over all cells of an evaluation.

    results.json -> points -> curve.json: {metric, best, points, budgets}, curve.png, and a table

A point is a cell. A line joins the points of one sampler over tokens/step; variants of a sampler that run at a single
tokens/step share one line. A point is on the Pareto front if no other point is as good with fewer calls, or better with
as many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from src.evaluation.report import Scores, paired_difference, stat_text
from src.metrics.caption import Stat

MARKERS = "osD^vP*Xh<>"
STYLES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Point:
    """A cell: forward calls and seconds per caption, and the value of the metric."""

    cell: str
    method: str
    sampler: str
    tokens_per_step: int
    forwards: Stat
    seconds: Stat
    value: Stat

    @property
    def key(self) -> tuple[str, str, int]:
        return self.method, self.sampler, self.tokens_per_step

    @property
    def family(self) -> str:
        return self.sampler.partition("[")[0]

    @property
    def calls(self) -> float:
        return self.forwards["mean"]


@dataclass(frozen=True)
class Budget:
    """The best point within a number of forward calls, and the baseline's best (None: it needs more calls)."""

    forwards: int
    best: Point
    baseline: Point | None


def points_of(results: dict, metric: str) -> list[Point]:
    """One point per cell of results.json that has a value of the metric."""
    return [
        Point(f"{m}-{s}-{n}", m, s, int(n), stats["forwards"], stats["seconds"], stats[metric])
        for m, samplers in results["methods"].items()
        for s, cells in samplers.items()
        for n, stats in cells.items()
        if metric in stats and not math.isnan(stats[metric]["mean"])
    ]


def front_of(points: Sequence[Point], *, lowest: bool = False) -> list[Point]:
    """The Pareto front, by increasing forward calls. lowest: low values are good."""
    sign = -1 if lowest else 1
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.calls, -sign * p.value["mean"])):
        if not front or sign * point.value["mean"] > sign * front[-1].value["mean"]:
            front.append(point)
    return front


def lines_of(points: Sequence[Point]) -> dict[tuple[str, str], list[Point]]:
    """(method, name of the line) -> its points by increasing forward calls."""
    lines: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        speeds = {p.tokens_per_step for p in points if (p.method, p.sampler) == (point.method, point.sampler)}
        name = point.sampler if len(speeds) > 1 else point.family
        lines.setdefault((point.method, name), []).append(point)
    return {name: sorted(line, key=lambda p: p.calls) for name, line in lines.items()}


def budgets_of(points: Sequence[Point], *, lowest: bool = False) -> list[Budget]:
    """The best point within each power of two of forward calls. The baseline is the sampler of the first point."""
    calls = [point.calls for point in points]
    powers = range(math.ceil(math.log2(min(calls))), math.ceil(math.log2(max(calls))) + 1)
    first, budgets = points[0], []
    for limit in (2**power for power in powers):
        within = [point for point in points if point.calls <= limit]
        base = [p for p in within if (p.method, p.family) == (first.method, first.family)]
        best = front_of(within, lowest=lowest)[-1]
        budgets.append(Budget(limit, best, front_of(base, lowest=lowest)[-1] if base else None))
    return budgets


def to_dict(points: Sequence[Point], *, metric: str, lowest: bool) -> dict:
    """The content of curve.json."""
    front = {point.key for point in front_of(points, lowest=lowest)}
    budgets = [
        {"forwards": b.forwards, "best": b.best.cell, "baseline": b.baseline and b.baseline.cell}
        for b in budgets_of(points, lowest=lowest)
    ]
    listed = [{**asdict(point), "front": point.key in front} for point in points]
    return {"metric": metric, "best": "lowest" if lowest else "highest", "points": listed, "budgets": budgets}


def budget_table(points: Sequence[Point], scores: Scores, *, metric: str, lowest: bool) -> list[list[str]]:
    """A header and one line per budget, without lines that repeat the one above.

    The difference to the baseline is paired over captions if the metric scores each caption.
    """
    first = points[0]
    base = f"{first.method} {first.family}"
    lines = [[f"calls up to: best {metric}", "cell", "calls", "seconds", metric, f"best of {base}", "difference"]]
    for budget in budgets_of(points, lowest=lowest):
        best, other = budget.best, budget.baseline
        cells = [best.cell, f"{best.calls:.1f}", f"{best.seconds['mean']:.3g}", stat_text(best.value)]
        against = ["-", "-"] if other is None else [stat_text(other.value), _difference(best, other, scores, metric)]
        if [*cells, *against] != lines[-1][1:]:
            lines.append([str(budget.forwards), *cells, *against])
    return lines


def _difference(best: Point, other: Point, scores: Scores, metric: str) -> str:
    if best == other:
        return "-"
    best_scores, other_scores = scores[best.key], scores[other.key]
    if metric not in best_scores or metric not in other_scores:
        return f"{best.value['mean'] - other.value['mean']:+.3f}"
    return stat_text(paired_difference(best_scores[metric], other_scores[metric]), signed=True)


def plot_curve(points: Sequence[Point], path: Path, *, metric: str, lowest: bool) -> None:
    """Plot the metric against forward calls per caption: one colour per method and sampler, the front in grey."""
    lines = lines_of(points)
    figure = Figure(figsize=(10.5, max(5.2, 1.0 + 0.19 * len(lines))), layout="constrained")
    axis = figure.subplots()
    families = list(dict.fromkeys((point.method, point.family) for point in points))
    several_methods = len({method for method, _ in families}) > 1
    colours = colormaps["tab10" if len(families) <= 10 else "tab20"]
    counts = dict.fromkeys(families, 0)
    for (method, name), line in lines.items():
        key = (method, line[0].family)
        label = f"{method}, {name}" if several_methods else name
        _draw_line(axis, line, label, colour=colours(families.index(key) % colours.N), number=counts[key])
        counts[key] += 1
    _draw_front(axis, front_of(points, lowest=lowest))
    _label_axis(axis, points, metric)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _draw_line(axis: Axes, line: list[Point], label: str, *, colour: tuple[float, ...], number: int) -> None:
    axis.errorbar(
        [point.calls for point in line],
        [point.value["mean"] for point in line],
        xerr=[2 * (point.forwards["se"] or 0.0) for point in line],
        yerr=[2 * (point.value["se"] or 0.0) for point in line],
        color=colour, linestyle=STYLES[number % len(STYLES)], marker=MARKERS[number % len(MARKERS)],
        markersize=5, linewidth=1.4, elinewidth=0.7, capsize=2, alpha=0.85, label=label,
    )  # fmt: skip


def _draw_front(axis: Axes, front: list[Point]) -> None:
    calls, values = [point.calls for point in front], [point.value["mean"] for point in front]
    axis.step(calls, values, where="post", color="0.65", linewidth=4, alpha=0.6, zorder=0)
    axis.plot(
        calls,
        values,
        linestyle="",
        marker="o",
        markersize=13,
        markerfacecolor="none",
        color="0.3",
        label="Pareto front",
    )


def _label_axis(axis: Axes, points: Sequence[Point], metric: str) -> None:
    calls = [point.calls for point in points]
    low, high = math.floor(math.log2(min(calls))), math.ceil(math.log2(max(calls)))
    ticks = [2.0**power for power in range(low, high + 1)]
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("forward calls per caption")
    axis.set_ylabel(f"{metric} (bars: ± 2 standard errors)")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
