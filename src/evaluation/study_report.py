"""Report of a study: means and error bars over training seeds, paired comparisons, and what did not run.

    write_study(plan) -> out/README.md, out/TABLE-SPLIT.png

A row is an arm with a sampler. A value is the mean over captions of one training seed; all statistics are over seeds,
as captions of one model share its weights. A row is compared with the table's reference seed by seed, by a paired
t-test at each speed, and Holm's correction over the speeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from src.evaluation import markdown
from src.evaluation.pareto import plot, points_of
from src.evaluation.report import stat_text
from src.evaluation.results import Cell as Entry
from src.evaluation.statistics import holm, paired_p
from src.evaluation.study import STAGES, Plan, Table
from src.io.files import read_json, write_bytes
from src.io.words import counted
from src.metrics.caption import summarise

NOT_RUN = "not run"
Row = tuple[str, str]  # arm, sampler
Values = dict[tuple[Row, int], dict[str, dict[int, float]]]  # (row, speed) -> metric -> seed -> mean over captions


def write_study(plan: Plan, *, metrics: Sequence[str], command: str) -> str:
    """Write README.md and plots. Returns the text. metrics: that get a table each; command: that makes the report"""
    parts = ["# Study", f"`{command}` continues it and writes this page. Values are means over training seeds ± their "
             "standard error; each seed's value is the mean over the captions of the split."]  # fmt: skip
    parts.append(markdown.bullets([*status(plan), tried(plan)]))
    for split in STAGES:
        for table in plan.tables.values():
            values = values_of(plan, table, split)
            if not values and split == "test":
                continue  # the final stage has not come
            parts.append(f"## {table.name}, {split}\n\n{table.about}".strip())
            parts += [*table_parts(table, values, metrics), *model_parts(plan, table, split)]
            entries = {
                Entry(*row, speed): {name: summarise(list(seeds.values())) for name, seeds in stats.items()}
                for (row, speed), stats in values.items()
            }
            panels = {metric: points for metric in metrics if (points := points_of(entries, metric))}
            if panels:
                image = f"{table.name}-{split}.png"
                plot(panels, Path(plan.out) / image, front=False)
                parts.append(f"![quality against forward calls]({image})")
    text = "\n\n".join(parts) + "\n"
    write_bytes(Path(plan.out) / "README.md", text.encode())
    return text


def table_parts(table: Table, values: Values, metrics: Sequence[str]) -> list[str]:
    """A table of each metric, of forward calls and of each kind of fact; the comparisons; what is missing and why."""
    rows = [(arm.name, sampler) for arm in table.arms.values() for sampler in arm.samplers]
    speeds = table.tokens_per_step

    def cell(row: Row, speed: int, metric: str) -> str:
        seeds = values.get((row, speed), {}).get(metric)
        return f"{stat_text(summarise(list(seeds.values())))} ({len(seeds)})" if seeds else NOT_RUN

    parts = []
    for metric in [*metrics, "forwards"]:
        lines = [[*row, *(cell(row, n, metric) for n in speeds)] for row in rows]
        parts.append(markdown.table([[f"{metric} (seeds)", "sampler", *map(str, speeds)], *lines]))
    kinds = sorted({name for stats in values.values() for name in stats if name.startswith(("precision_", "recall_"))})
    if kinds:
        lines = [[*row, str(n), *(cell(row, n, kind).partition(" ")[0] for kind in kinds)]
                 for row in rows for n in speeds if (row, n) in values]  # fmt: skip
        parts.append(markdown.table([["arm", "sampler", "tokens/step", *kinds], *lines]))
    parts += [markdown.bullets(lines) for metric in metrics if (lines := comparisons(table, values, metric))]
    parts += [markdown.bullets([f"{arm.name}: {NOT_RUN}: {arm.missing}" for arm in table.arms.values() if arm.missing])]
    return [part for part in parts if part]


def model_parts(plan: Plan, table: Table, split: str) -> list[str]:
    """What the models alone are measured by, a table for each title of `TITLE=COLUMN`; and the edits of the experts."""
    values: dict[str, dict[str, dict[str, list[float]]]] = {}  # title -> column -> arm -> mean of each seed
    edits = {name: Counter[str]() for name in table.arms}
    for cell in (cell for cell in plan.cells(split) if cell.table is table):
        result = plan.result(cell) or {}
        for name, stat in result.get("model", {}).items():
            title, _, column = name.rpartition("=")
            if stat["mean"] is not None:
                values.setdefault(title, {}).setdefault(column, {}).setdefault(cell.arm.name, []).append(stat["mean"])
        edits[cell.arm.name].update(result.get("edits", {}))
    parts = []
    for title, columns in values.items():
        names = [name for name in table.arms if any(name in arms for arms in columns.values())]
        texts = {c: {name: stat_text(summarise(seeds)) for name, seeds in arms.items()} for c, arms in columns.items()}
        rows = ([name, *(texts[column].get(name, "-") for column in columns)] for name in names)
        parts.append(markdown.table([[title, *columns], *rows]))
    lines = []
    for name, count in edits.items():
        if total := count.total():
            shares = f"{count['truer'] / total:.1%} make the caption truer, {count['falser'] / total:.1%} less true"
            lines.append(f"{name}: of {counted(total, 'edit')}, by a second reader, {shares}")
    return [*parts, *([markdown.bullets(lines)] if lines else [])]


def comparisons(table: Table, values: Values, metric: str) -> list[str]:
    """Each row against the reference: at each speed the mean difference over shared seeds, and p after Holm."""
    arm, _, sampler = table.reference.partition("/")
    lines = []
    for row in dict.fromkeys(row for row, _ in values):
        differences: dict[int, list[float]] = {}
        for speed in table.tokens_per_step:
            own, other = (values.get((r, speed), {}).get(metric, {}) for r in (row, (arm, sampler)))
            if seeds := sorted(own.keys() & other.keys()):
                differences[speed] = [own[seed] - other[seed] for seed in seeds]
        if row == (arm, sampler) or not differences:
            continue
        adjusted = holm({speed: p for speed, values in differences.items() if (p := paired_p(values)) is not None})
        texts = [
            f"{stat_text(summarise(values), signed=True)} at {speed}"
            + (f" (p = {adjusted[speed]:.3f})" if speed in adjusted else "")
            for speed, values in differences.items()
        ]
        lines.append(f"{metric}, {' '.join(row)} - {table.reference.replace('/', ' ')}: {', '.join(texts)} tokens/step")
    return lines


def values_of(plan: Plan, table: Table, split: str) -> Values:
    """The finished cells of a table, by row, speed, metric and seed."""
    values: Values = {}
    for cell in plan.cells(split):
        result = plan.result(cell) or {}
        if cell.table is table:
            for sampler, speeds in result.get("results", {}).items():
                for speed, stats in speeds.items():
                    of_row = values.setdefault(((cell.arm.name, sampler), int(speed)), {})
                    for metric, stat in stats.items():
                        if stat["mean"] is not None:
                            of_row.setdefault(metric, {})[cell.seed] = stat["mean"]
    return values


def status(plan: Plan) -> list[str]:
    """How many cells of each split are done, and the error of each that failed."""
    lines = []
    for split in STAGES:
        cells = plan.cells(split)
        results = {cell.name: plan.result(cell) or {} for cell in cells}
        done = sum("results" in result for result in results.values())
        lines.append(f"{split}: {done} of {counted(len(cells), 'cell')} done")
        lines += [f"failed: {name}: {r['failed']}" for name, r in results.items() if "failed" in r]
    return lines


def tried(plan: Plan) -> str:
    """Rows that were ever evaluated on validation, those of earlier versions of the plan included, by arm.

    A row counts once, whatever its seeds and speeds; an arm that changed counts again.
    """
    variants: dict[str, set[tuple[str, str]]] = {}
    for path in sorted((Path(plan.out) / "val").glob("*.json")):
        result = read_json(path)
        if "results" in result:
            key = path.stem.rpartition("-")[2]
            variants.setdefault(result["arm"], set()).update((key, sampler) for sampler in result["results"])
    counts = ", ".join(f"{arm} {len(rows)}" for arm, rows in variants.items())
    total = sum(map(len, variants.values()))
    return f"variants tried on val: {total}" + (f" ({counts})" if counts else "")
