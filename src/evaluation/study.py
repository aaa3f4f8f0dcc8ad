"""A study: arms, each trained with several seeds by the verbs and evaluated at several speeds, under one budget.

    plan = read_plan(cfg)           tables -> arms -> commands, checked: every arm of a table makes as many passes
    cell = plan.cells("val")[0]     an arm of a table with one seed
    run_cell(plan, cell)            its commands as processes, then `src.evaluate` -> out/val/CELL.json

A cell is one JSON file, written when it is finished, and its name holds a hash of its commands: a changed arm is a new
cell and the old file stays, so that what was tried can be counted. The folder of a run is named alike. Commands are as
at a shell, without `python -m src.`; {seed}, {run} (folder of the cell's runs) and {data} are filled in.
"""

from __future__ import annotations

import ctypes
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from src.cli.config import load_config
from src.cli.help import NEEDS
from src.cli.instantiate import build, hint
from src.evaluation.results import signature
from src.io.errors import UserError
from src.io.files import read_json, write_json
from src.metrics.edits import count_edits
from src.text.tokenizer import Codec

STAGES = ("val", "test")
PR_SET_PDEATHSIG = 1  # of Linux's prctl


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train, and the samplers that its models are evaluated with.

    commands: run in this order, `train conf=... run_dir={run}/1`; each continues what a kill has left
    model: the model folder that they leave; samplers: names in the evaluation's config
    passes: forward and backward passes of a training step, 2 for ProSeCo; missing: why the arm cannot be run yet
    """

    name: str
    samplers: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    model: str = "{run}/model"
    passes: int = 1
    missing: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Arms that are compared with each other.

    passes: steps times passes of each arm; reference: the row ARM/SAMPLER that all others are compared with
    evaluate: settings of its evaluation, such as other data; arms of another table with the same commands and name are
        not trained again for it
    """

    name: str
    seeds: list[int]
    passes: int
    tokens_per_step: list[int]
    reference: str
    arms: Mapping[str, Arm]
    about: str = ""
    evaluate: list[str] = field(default_factory=list)


class Cell(NamedTuple):
    """An arm of a table with one training seed, on a split."""

    table: Table
    arm: Arm
    seed: int
    split: str
    key: str  # hash of its commands

    @property
    def name(self) -> str:
        return f"{self.table.name}-{self.arm.name}-seed{self.seed}-{self.key}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All of a study. Arguments as in conf/study.yaml; rows of `tables` are described above."""

    tables: Mapping[str, Table]
    out: str
    runs: str
    data: str
    evaluation: str
    settings: Mapping[str, list[str]]
    setup: list[str]

    def cells(self, split: str) -> list[Cell]:
        """The cells that can be run, all arms of a seed before the next seed."""
        return [
            Cell(table, arm, seed, split, self.key(table, arm))
            for table in self.tables.values()
            for seed in table.seeds
            for arm in table.arms.values()
            if not arm.missing
        ]

    def key(self, table: Table, arm: Arm) -> str:
        evaluation = [self.evaluation, *table.evaluate, arm.samplers, table.tokens_per_step]
        return signature(arm.commands, arm.model, dict(self.settings), evaluation)[:8]

    def file(self, cell: Cell) -> Path:
        return Path(self.out) / cell.split / f"{cell.name}.json"

    def folder(self, cell: Cell) -> Path:
        """Of its runs, evaluation and log. Arms of equal commands share it in all tables, and are trained once."""
        recipe = signature(cell.arm.commands, {verb: s for verb, s in self.settings.items() if verb != "evaluate"})[:8]
        return Path(self.runs) / f"{cell.arm.name}-{recipe}" / f"seed{cell.seed}"

    def result(self, cell: Cell) -> dict | None:
        """What a finished or failed cell left."""
        return read_json(self.file(cell)) if self.file(cell).is_file() else None

    def is_done(self, cell: Cell) -> bool:
        return "results" in (self.result(cell) or {})

    def filled(self, command: str, cell: Cell) -> list[str]:
        """A command as arguments, with the settings of its verb. Raises UserError for a verb that does not exist."""
        verb, _, rest = command.partition(" ")
        if f"src.{verb}" not in NEEDS:
            raise UserError(f"{command!r}: no verb {verb!r}{hint(verb, [name.removeprefix('src.') for name in NEEDS])}")
        text = " ".join([rest, *self.settings.get(verb, [])])
        for name, value in {"seed": cell.seed, "run": self.folder(cell) / "run", "data": self.data}.items():
            text = text.replace(f"{{{name}}}", str(value))
        return [f"src.{verb}", *shlex.split(text)]

    def commands(self, cell: Cell) -> list[list[str]]:
        """The arm's, then that of the evaluation, without the samplers that are of other arms."""
        train = [self.filled(command, cell) for command in cell.arm.commands]
        verb, *settings = self.filled(
            " ".join([self.evaluation, *cell.table.evaluate, f"evaluate.models.model={cell.arm.model}"]), cell
        )
        if unknown := [name for name in cell.arm.samplers if name not in self.samplers]:
            where = f"{cell.table.name}.{cell.arm.name}.samplers"
            raise UserError(f"{where}: the evaluation has no {unknown[0]!r}{hint(unknown[0], self.samplers)}")
        settings += [f"evaluate.samplers.{name}=null" for name in self.samplers if name not in cell.arm.samplers]
        settings += [f"evaluate.tokens_per_step={cell.table.tokens_per_step}".replace(" ", "")]
        settings += [f"evaluate.{name}={value}" for name, value in self._outputs(cell).items()]
        return [*train, [verb, *settings]]

    @cached_property
    def samplers(self) -> list[str]:
        """Names of all samplers of the evaluation."""
        settings = self.filled(f"{self.evaluation} evaluate.models.model=model", self.cells("val")[0])[1:]
        nodes = load_config(settings, verb="src.evaluate", needs=NEEDS["src.evaluate"]).evaluate.samplers
        return [str(name) for name, node in nodes.items() if node is not None]

    def _outputs(self, cell: Cell) -> dict[str, Any]:
        return {"split": cell.split, "seed": cell.seed, "out": self.folder(cell) / f"{cell.split}-{cell.key}"}

    def results_of_evaluation(self, cell: Cell) -> dict:
        return read_json(self._outputs(cell)["out"] / "results.json")


def read_plan(cfg: Mapping[str, Any]) -> Plan:
    """The plan of a config like conf/study.yaml.

    Raises UserError for a table without arms, an unknown reference, and arms of unequal passes.
    """
    node = lambda kind, values: {"target": f"{__name__}.{kind}", **values}  # noqa: E731
    tables = {
        name: node("Table", {**table, "name": name, "arms": {a: node("Arm", {**arm, "name": a}) for a, arm in
                                                             (table.get("arms") or {}).items() if arm}})
        for name, table in cfg["tables"].items() if table
    }  # fmt: skip
    names = ("out", "runs", "data", "evaluation", "settings", "setup")
    plan: Plan = build(node("Plan", {"tables": tables, **{name: cfg[name] for name in names}}))
    if not plan.tables:
        raise UserError("the study has no tables: use conf=study/a or another plan of conf/study")
    for table in plan.tables.values():
        rows = [f"{arm.name}/{sampler}" for arm in table.arms.values() for sampler in arm.samplers]
        if table.reference not in rows:
            raise UserError(f"tables.{table.name}.reference: no row {table.reference!r}; there are {', '.join(rows)}")
    for cell in {(cell.table.name, cell.arm.name): cell for cell in plan.cells("val")}.values():
        plan.commands(cell)  # its names of verbs and samplers are checked before hours of training
        if (total := total_passes(plan, cell)) != cell.table.passes:
            raise UserError(
                f"tables.{cell.table.name}.arms.{cell.arm.name}: {total} passes ({total_steps(plan, cell)} steps of "
                f"{cell.arm.passes}), but every arm of the table makes {cell.table.passes}: change trainer.max_steps"
            )
    return plan


def total_steps(plan: Plan, cell: Cell) -> int:
    """Optimizer steps of all the trainings of an arm, as their configs say."""
    trainings = [plan.filled(command, cell)[1:] for command in cell.arm.commands if command.startswith("train ")]
    options = {"verb": "src.train", "needs": NEEDS["src.train"]}
    return sum(load_config(settings, **options).trainer.max_steps for settings in trainings)


def total_passes(plan: Plan, cell: Cell) -> int:
    return total_steps(plan, cell) * cell.arm.passes


def check_stage(plan: Plan, split: str) -> None:
    """Raise UserError for a test before all of validation is done, or one of arms that have changed since a test."""
    if split not in STAGES:
        raise UserError(f"split must be val or test, got {split!r}")
    if split == "val":
        return
    cells = plan.cells("val")
    if missing := [cell.name for cell in cells if not plan.is_done(cell)]:
        raise UserError(
            f"split=test is the final stage, for choices already made: {len(missing)} of {len(cells)} cells of val are "
            f"not done ({', '.join(missing[:3])}, ...); run the study without split=test until they are"
        )
    planned = {plan.file(cell).name for cell in plan.cells("test")}
    if others := sorted(path.name for path in (Path(plan.out) / "test").glob("*.json") if path.name not in planned):
        raise UserError(
            f"the test split has been used with other arms ({', '.join(others[:3])}): what is chosen after that is "
            "chosen on it. Take another `out`, with test data that no arm has seen"
        )


def run_cell(plan: Plan, cell: Cell, *, commit: str) -> dict:
    """Run a cell and write its JSON, which is returned: with `results`, or with what `failed`. commit: of the code"""
    log, started = plan.folder(cell) / "log.txt", time.monotonic()
    steps, commands = total_steps(plan, cell), plan.commands(cell)
    result: dict[str, Any] = {"table": cell.table.name, "arm": cell.arm.name, "seed": cell.seed, "split": cell.split}
    result |= {"commands": [shlex.join(["python", "-m", *command]) for command in commands], "commit": commit}
    result |= {"steps": steps, "passes": steps * cell.arm.passes, "samplers": cell.arm.samplers}
    failed = next((failure for command in commands if (failure := run(command, log))), None)
    result["seconds"] = round(time.monotonic() - started, 1)
    if failed:
        result["failed"] = failed
    else:
        evaluation = plan.results_of_evaluation(cell)
        result |= {name: evaluation["meta"][name] for name in ("data", "settings", "versions")}
        result["results"], result["model"] = evaluation["methods"]["model"], evaluation["model_stats"].get("model", {})
        if rounds := sorted((plan.folder(cell) / "run").glob("**/round-*/index.json")):
            codec = Codec.load(plan.filled(f"evaluate {cell.arm.model}", cell)[1])
            result["edits"] = sum((count_edits(index.parent, codec) for index in rounds), Counter())
    plan.file(cell).parent.mkdir(parents=True, exist_ok=True)
    write_json(plan.file(cell), result)
    return result


def run(command: Sequence[str], log: Path) -> str | None:
    """Run `python -m COMMAND`, its output appended to a log. Returns why it failed, None if it did not.

    The process gets no Ctrl-C of the terminal, but one SIGTERM when this one stops: a training then saves a checkpoint.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        stream.write(f"$ {shlex.join(command)}\n".encode())
        stream.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=partial(_end_with_parent, ctypes.CDLL(None)) if sys.platform == "linux" else None,
        )  # fmt: skip
        try:
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"{shlex.join(command[:2])}: exit code {code}: {lines[-1][-300:]} ({log})" if code else None


def _end_with_parent(libc: ctypes.CDLL) -> None:
    """Have the kernel send SIGTERM to this process when its parent ends, be it by SIGKILL."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def hours_of_cell(plan: Plan, table: Table, split: str) -> float | None:
    """Expected hours of a cell of a table; None before any cell of the split is done.

    The seconds per training pass of the table's finished cells, or of all if it has none, times its passes.
    """
    results = [(cell.table, result) for cell in plan.cells(split) if "results" in (result := plan.result(cell) or {})]
    own = [result for of, result in results if of is table] or [result for _, result in results]
    seconds, passes = (sum(result[name] for result in own) for name in ("seconds", "passes"))
    return table.passes * seconds / passes / 3600 if own else None


def hours_left(plan: Plan, split: str) -> str:
    """The plan in hours: cells that are left, and what they will take, by table. Needs a finished cell."""
    cells = plan.cells(split)
    missing = [cell.table.name for cell in cells if not plan.is_done(cell)]
    hours = {
        name: missing.count(name) * (hours_of_cell(plan, table, split) or 0.0) for name, table in plan.tables.items()
    }
    shares = ", ".join(f"{name} {value:.2f}" for name, value in hours.items())
    return f"{len(missing)} of {len(cells)} cells left, {sum(hours.values()):.2f} hours ({shares})"
