"""The papers' tables for the runs given, beside the published numbers: Markdown, JSON, plots, a page of captions.

    python -m src.evaluate conf=eval/report "evaluate.runs=[runs/eval/capmas,runs/eval/caparena,runs/eval/capture]"

    runs/*/scores.json, verdicts.jsonl, items.jsonl and published.json
    -> report.md, report.json, quality_by_tokens.png, quality_by_calls.png, captions.html

A row is a system at its tokens per step, whoever made its captions. Systems NAME-seed0, NAME-seed1, ... are one row:
the mean over training seeds with its standard error; of one seed the error is over images. Rows that were not made
alike (images, judge, prompts of judge and model, length) are refused. The published numbers stand as they were
published, and were judged by a model that is gone: compare measured rows with each other. Scores of another benchmark
than a published column's (the exact ones of scenes, say) have a table of their own.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from src.evaluation import markdown
from src.evaluation.caption_page import write_caption_page
from src.evaluation.captions import SPEED
from src.evaluation.pareto import Point, plot
from src.evaluation.results import Cell, without_nan
from src.evaluation.scores import Score, cell_text, check_protocols, note, scale
from src.evaluation.statistics import compare, holm
from src.io.errors import UserError
from src.io.files import read_json, write_bytes, write_json
from src.metrics.caption import Stat, plain, summarise
from src.text.captions import SETTINGS

PUBLISHED = Path(__file__).with_name("published.json")
FILES = ("scores.json", "verdicts.jsonl", "items.jsonl")
MOST_COLUMNS = 8  # of a table; one with more is split by metric
BESIDE = {  # statistics without which the scores mislead, and their names in the report
    "factuality_claims": "claims",
    "coverage_abstained": "% of questions left open",
    "words": "words",
    "duplicate_bigrams": "share of repeated bigrams",
    "unfinished": "share unfinished",
    "empty": "share empty",
}
GENERATED = 128  # tokens of a published caption: a forward call per step


@dataclass
class Value:
    """A metric of a row at a speed, by seed. parts: (numerator, denominator) of each image, summed over seeds"""

    seeds: list[Stat] = field(default_factory=list)
    forwards: list[Stat] = field(default_factory=list)
    parts: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def stat(self) -> Stat:
        return self.seeds[0] if len(self.seeds) == 1 else summarise([stat["mean"] for stat in self.seeds])


Values = dict[tuple[str, int | None, str], Value]  # system, tokens per step (None: not a diffusion model), column


class PaperTables:
    """The arguments: conf/eval/report.yaml.

    runs: folders of benchmarks; columns: of the tables, and the statistic in each
    rows: by system, the published rows that it is set beside; official: what the released scorers would print
    reference: the system that all others are compared with; None: the first
    images: how many of each run are on the page
    """

    def __init__(
        self,
        *,
        runs: Sequence[str],
        out: str,
        columns: Mapping[str, str],
        rows: Mapping[str, Sequence[str]],
        reference: str | None = None,
        official: bool = False,
        images: int = 60,
        published: str | None = None,
    ) -> None:
        self.runs, self.out = [Path(run) for run in runs], Path(out)
        self.columns, self.rows, self.reference = dict(columns), rows, reference
        self.official, self.images = official, images
        self.published = read_json(Path(published) if published else PUBLISHED)

    def run(self) -> str:
        """Write all files. Returns the text of report.md, and where it lies."""
        for run in self.runs:
            if missing := [name for name in FILES if not (run / name).is_file()]:
                raise UserError(f"{run} has no {missing[0]}: run its benchmark with the stage `score` first")
        # 1. The runs, and what may stand in one table.
        scores = {run: read_json(run / "scores.json") for run in self.runs}
        check_runs(scores)
        values = self.read_values(scores)
        if not values:
            names = ", ".join(self.columns.values())
            raise UserError(f"these runs have none of the statistics {names}: set evaluate.columns")
        tables = {name: self.lines(name, values) for name in self.published["tables"]}
        differences = self.differences(values)
        # 2. Files.
        self.out.mkdir(parents=True, exist_ok=True)
        plots = self.plot(values)
        text = markdown.page(self.blocks(scores, values, tables, differences, plots))
        write_bytes(self.out / "report.md", text.encode())
        content = {"published": self.published["source"], "tables": tables, "differences": differences}
        write_json(self.out / "report.json", without_nan({**content, "runs": {str(k): v for k, v in scores.items()}}))
        write_caption_page(self.out / "captions.html", self.runs, num=self.images)
        return f"{text}\nall files are in {self.out}"

    def read_values(self, scores: Mapping[Path, Mapping[str, Score]]) -> Values:
        """Raises UserError for a number that two runs have."""
        values: Values = {}
        runs: dict[tuple[str, int | None, str], Path] = {}
        for run, systems in scores.items():
            weighed = read_verdicts(run / "verdicts.jsonl")
            for name, score in systems.items():
                speed, benchmark = score["speed"][SPEED], score["protocol"]["benchmark"]
                published = self.published["benchmarks"].get(benchmark, {"columns": ()})["columns"]
                of_seed = name.removesuffix(f"-{speed}")
                row = re.sub(r"-seed\d+$", "", of_seed)
                for title, statistic in self.columns.items():
                    column = title if title in published else f"{title} of {benchmark}"
                    official = f"{statistic}_official" if self.official else statistic
                    chosen = official if official in score["stats"] else statistic
                    stat = score["stats"].get(chosen)
                    if stat is None or stat["mean"] is None:
                        continue
                    if (first := runs.setdefault((of_seed, speed, column), run)) != run:
                        raise UserError(f"{first} and {run} both have {statistic} of {name}: give one of these runs")
                    value, times = values.setdefault((row, speed, column), Value()), scale(statistic)
                    error = None if stat["se"] is None else times * stat["se"]
                    value.seeds.append(Stat(mean=times * stat["mean"], se=error, n=stat["n"]))
                    value.forwards += [score["speed"]["forwards"]] if score["speed"]["forwards"] else []
                    for key, (c, t) in weighed.get((name, chosen), {}).items():
                        before = value.parts.get(key, (0.0, 0.0))
                        value.parts[key] = before[0] + c * times, before[1] + t
        return values

    def lines(self, name: str, values: Values) -> list[dict[str, Any]]:
        """The lines of a table: each published row with the measured ones that are set beside it, then the others.

        Into tables that are `open` every system may enter that has one of their numbers of tokens per step.
        """
        published: dict[str, dict[str, dict[str, Stat]]] = {
            row: {column: by_speed(numbers) for column, numbers in columns.items()}
            for row, columns in self.published["tables"][name].items()
        }
        columns = next(iter(published.values()))
        measured = {system: pick(values, system, columns) for system in dict.fromkeys(key[0] for key in values)}
        measured = {system: stats for system, stats in measured.items() if any(stats.values())}

        def line(row: str, source: str, stats: Any) -> dict[str, Any]:
            return {"row": row, "source": source, "values": stats}

        lines, placed = [], set[str]()
        for row, stats in published.items():
            beside = [system for system in measured if row in self.rows.get(system, ())]
            placed.update(beside)
            lines += [line(row, "published", stats), *(line(system, "measured", measured[system]) for system in beside)]
        others = [system for system in measured if system not in placed and name in self.published["open"]]
        return [*lines, *(line(system, "measured", measured[system]) for system in others)]

    def differences(self, values: Values) -> list[dict[str, Any]]:
        """Each system minus the reference at the same speed, paired by image; p-values adjusted for all of them.

        A reference that states no speed, such as an autoregressive model, is compared with all speeds.
        """
        systems = list(dict.fromkeys(system for system, _, _ in values))
        reference = self.reference or systems[0]
        if reference not in systems:
            raise UserError(f"evaluate.reference: there is no system {reference!r}; there are {', '.join(systems)}")
        lines = []
        for (system, speed, column), value in values.items():
            other = values.get((reference, speed, column)) or values.get((reference, None, column))
            if system == reference or other is None:
                continue
            keys = [key for key in value.parts if key in other.parts]
            if len(keys) < 2:
                continue
            one, two = ([*zip(*(v.parts[key] for key in keys), strict=True)] for v in (value, other))
            where = {"system": system, "reference": reference, "column": column, SPEED: speed}
            lines.append({**where, **compare((one[0], one[1]), (two[0], two[1]))})
        adjusted = holm({number: line["p"] for number, line in enumerate(lines)})
        return [{**line, "p_holm": adjusted[number]} for number, line in enumerate(lines)]

    def blocks(
        self,
        scores: Mapping[Path, Mapping[str, Score]],
        values: Values,
        tables: Mapping[str, list[dict[str, Any]]],
        differences: Sequence[Mapping[str, Any]],
        plots: Sequence[str],
    ) -> Iterator[str]:
        """The parts of report.md."""
        published = self.published
        yield f"# {published['title']}: the tables of the paper"
        yield (
            f"`published` is as in {published['source']}. `measured` is of {', '.join(map(str, self.runs))}: mean ± "
            "standard error, over images, or over training seeds where there are several; behind a metric stand the "
            "tokens per step, and what states none stands at 1. Published rows were judged by another model: compare "
            "measured rows with each other."
        )
        yield markdown.bullets([*self.what_was_measured(scores), *published["notes"]])
        # 1. The tables, split by metric where they are wide.
        for name, lines in tables.items():
            yield f"## Table {name.removeprefix('table')}: {published['captions'][name]}"
            columns = {column: list(by) for column, by in lines[0]["values"].items()}
            wide = sum(map(len, columns.values())) > MOST_COLUMNS
            groups = [{column: speeds} for column, speeds in columns.items()] if wide else [columns]
            for group in groups:
                yield markdown.table([*table_rows(lines, group)])
            if all(line["source"] == "published" for line in lines):
                hint = "" if name in published["open"] else "; `evaluate.rows` sets systems beside rows"
                yield f"No run given belongs here{hint}."
        if rows := self.other_rows(values):
            yield "## Other benchmarks, without published numbers"
            yield markdown.table(rows)
        if rows := beside_rows(scores):
            yield "## Beside the scores"
            yield "Means over captions. Factuality rises when text collapses, as fewer claims are left to be wrong."
            yield markdown.table(rows)
        # 2. Differences, and what seeds do.
        if differences:
            yield f"## Differences from {differences[0]['reference']}"
            yield (
                "Paired bootstrap over images (10,000 resamples); p-values adjusted for all lines (Holm). Images alone "
                "vary in it, training seeds and the judge do not. Of a few images its errors are too small."
            )
            head = ["system", "metric", "tokens/step", "difference", "95 % interval", "p", "p (Holm)", "images"]
            yield markdown.table([head, *map(difference_row, differences)])
        if any(len(value.seeds) > 1 for value in values.values()):
            yield "## Seeds"
            head = ["system", "metric", "tokens/step", "seeds", "each", "sd over seeds", "se over images of one"]
            yield markdown.table([head, *seed_rows(values)])
        yield "## Plots and captions"
        yield from (f"![{file.removesuffix('.png').replace('_', ' ')}]({file})" for file in plots)
        yield "[The captions beside each other](captions.html)"
        # 3. What is behind the rows.
        yield "## Runs"
        yield markdown.bullets(f"{run}: {note(*row)}" for run, systems in scores.items() for row in systems.items())

    def what_was_measured(self, scores: Mapping[Path, Mapping[str, Score]]) -> Iterator[str]:
        """A line for each benchmark, whose rows have all the same images and judge: how many, and which."""
        protocols = [score["protocol"] for systems in scores.values() for score in systems.values()]
        for benchmark, protocol in {protocol["benchmark"]: protocol for protocol in protocols}.items():
            images, judge = protocol["images"][0], protocol["judge"]
            published = self.published["benchmarks"].get(benchmark, {"images": images})["images"]
            text = f"Measured on {images:,} images of {benchmark}"
            text += "" if images == published else f", published on {published:,}"
            yield f"{text}; {'judge: ' + judge['model'] if judge else 'without a judge'}."

    def other_rows(self, values: Values) -> list[list[str]]:
        """A table of the columns that no published one is of; [] if there are none."""
        published = {column for by in self.published["benchmarks"].values() for column in by["columns"]}
        columns = list(dict.fromkeys(key[2] for key in values if key[2] not in published))
        systems = dict.fromkeys(key[:2] for key in values if key[2] in columns)
        head = ["row", "tokens/step", *columns]
        rows = []
        for system, speed in systems:
            some = (values.get((system, speed, column)) for column in columns)
            rows.append([system, str(speed or "-"), *(number_text(value and value.stat) for value in some)])
        return [head, *rows] if rows else []

    def plot(self, values: Values) -> list[str]:
        """Quality by tokens per step and by forward calls, beside the published curves. Returns the names of files."""
        measured: dict[str, list[Point]] = {column: [] for _, _, column in values}
        for (system, speed, column), value in values.items():
            if speed is not None:
                calls = summarise([stat["mean"] for stat in value.forwards]) if value.forwards else plain(math.nan, 0)
                measured[column].append(Point.of(Cell(system, "", speed), calls, value.stat))
        published: dict[str, list[Point]] = {column: [] for column in measured}
        for name in self.published["open"]:
            for row, columns in self.published["tables"][name].items():
                for column, numbers in columns.items():
                    for speed, stat in by_speed(numbers).items() if isinstance(numbers, Mapping) else ():
                        cell, steps = Cell(row, "published", int(speed)), GENERATED / int(speed)
                        if column in published and cell not in [point.cell for point in published[column]]:
                            published[column].append(Point.of(cell, plain(steps, 0), stat))
        shown = {column: [*points, *published[column]] for column, points in measured.items() if points}
        files = ["quality_by_tokens.png"] if shown else []
        if shown:
            plot(shown, self.out / files[0], front=False, against=SPEED)
        with_calls = {c: [point for point in points if point.calls > 0] for c, points in shown.items()}
        if any(not point.cell.sampler for points in with_calls.values() for point in points):
            files.append("quality_by_calls.png")
            plot(with_calls, self.out / files[1], front=False)
        return files


def beside_rows(scores: Mapping[Path, Mapping[str, Score]]) -> list[list[str]]:
    """A row for each system of each run with what they have of `BESIDE`; [] if that is nothing."""
    systems = [(run, name, score["stats"]) for run, some in scores.items() for name, score in some.items()]
    names = [name for name in BESIDE if any(name in stats for _, _, stats in systems)]
    rows = [[str(run), name, *(cell_text(n, stats.get(n)) for n in names)] for run, name, stats in systems]
    return [["run", "system", *(BESIDE[name] for name in names)], *rows] if names else []


def check_runs(scores: Mapping[Path, Mapping[str, Score]]) -> None:
    """Raise UserError for rows that were not treated alike: within a benchmark in all, and one system everywhere."""
    benchmarks: dict[str, dict[str, Score]] = {}
    systems: dict[str, dict[str, Score]] = {}
    for run, rows in scores.items():
        for name, score in rows.items():
            place, protocol = f"{name} of {run}", score["protocol"]
            benchmarks.setdefault(protocol["benchmark"], {})[place] = score
            systems.setdefault(name, {})[place] = {"protocol": {key: protocol[key] for key in SETTINGS}}
    for group in (*benchmarks.values(), *systems.values()):
        check_protocols(group)
    for benchmark in benchmarks.values():
        for (place, one), (other_place, other) in combinations(benchmark.items(), 2):
            is_one_system = place.partition(" of ")[0] == other_place.partition(" of ")[0]
            if is_one_system and one["captions"]["sha256"] != other["captions"]["sha256"]:
                raise UserError(f"{place} and {other_place} are of different captions: rename one of the systems")


def read_verdicts(file: Path) -> dict[tuple[str, str], dict[str, tuple[float, float]]]:
    """(numerator, denominator) of each image by its key, by system and metric."""
    parts: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
    with file.open(encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            value, weight = line["value"], line["weight"]
            parts.setdefault((line["system"], line["metric"]), {})[line["key"]] = value * weight, weight
    return parts


def by_speed(numbers: float | Mapping[str, float]) -> dict[str, Stat]:
    """Published numbers by tokens per step; a single one is at 1."""
    numbers = numbers if isinstance(numbers, Mapping) else {"1": numbers}
    return {speed: plain(number, 0) for speed, number in numbers.items()}


def pick(values: Values, system: str, columns: Mapping[str, Mapping[str, Stat]]) -> dict[str, dict[str, Stat]]:
    """What a system has of the columns of a table; one that states no tokens per step stands at 1."""
    picked: dict[str, dict[str, Stat]] = {}
    for column, speeds in columns.items():
        keys: dict[str, list[tuple[str, int | None, str]]] = {s: [(system, int(s), column)] for s in speeds}
        if "1" in keys:
            keys["1"].append((system, None, column))
        picked[column] = {s: values[key].stat for s, some in keys.items() for key in some if key in values}
    return picked


def table_rows(lines: Iterable[Mapping[str, Any]], columns: Mapping[str, Sequence[str]]) -> Iterator[list[str]]:
    one_speed = all(len(speeds) == 1 for speeds in columns.values())
    pairs = [(column, speed) for column, speeds in columns.items() for speed in speeds]
    yield ["row", "source", *(column if one_speed else f"{column}, {speed}" for column, speed in pairs)]
    for line in lines:
        stats = (line["values"].get(column, {}).get(speed) for column, speed in pairs)
        yield [line["row"], line["source"], *map(number_text, stats)]


def number_text(stat: Stat | None) -> str:
    """Two digits, as in the papers."""
    if stat is None:
        return "-"
    return f"{stat['mean']:.2f}" + ("" if stat["se"] is None else f" ± {stat['se']:.2f}")


def difference_row(line: Mapping[str, Any]) -> list[str]:
    speed = "-" if line[SPEED] is None else str(line[SPEED])
    interval = f"{line['low']:+.2f} to {line['high']:+.2f}"
    p_values = (f"{line[name]:.4f}" for name in ("p", "p_holm"))
    number = f"{line['difference']:+.2f} ± {line['se']:.2f}"
    return [line["system"], line["column"], speed, number, interval, *p_values, str(line["n"])]


def seed_rows(values: Values) -> Iterator[list[str]]:
    for (system, speed, column), value in values.items():
        if len(value.seeds) > 1:
            means = [stat["mean"] for stat in value.seeds]
            errors = [stat["se"] for stat in value.seeds if stat["se"] is not None]
            error = f"{statistics.mean(errors):.2f}" if errors else "-"
            each = ", ".join(f"{mean:.2f}" for mean in means)
            yield [system, column, str(speed or "-"), str(len(means)), each, f"{statistics.stdev(means):.2f}", error]
