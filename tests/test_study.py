"""Studies: what a plan may say, statistics against closed forms, and a real study that is killed and resumes."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from src.cli.config import load_config
from src.cli.instantiate import plain
from src.evaluation.statistics import holm, paired_p
from src.evaluation.study import Cell, Plan, check_stage, read_plan
from src.evaluation.study_report import write_study
from src.io.errors import UserError
from src.objectives.base import Objective
from src.study import WHOLE, main

ROOT = Path(__file__).resolve().parents[1]
ARM = {"commands": ["train conf=mask,quickstart trainer.max_steps=4 run_dir={run}"], "samplers": ["plain", "refine"]}


def plan_of(out: Path, *, seeds: int = 3, arms: dict | None = None, **table) -> Plan:
    arms = arms or {"one": ARM, "two": ARM}
    values = {"passes": 4, "tokens_per_step": [1, 8], "reference": "one/plain", "seeds": list(range(seeds)), **table}
    cfg = plain(load_config(["conf=study", f"out={out}", f"runs={out}/runs"]))
    return read_plan({**cfg, "tables": {"t": {**values, "arms": arms}}})


def finish(plan: Plan, cell: Cell, value: float, **more) -> None:
    """Write the result of a cell, as if it had run: `value` for its first sampler, and half of it for the others."""
    stat = lambda mean: {"mean": mean, "se": 0.1, "n": 8}  # noqa: E731
    results = {
        sampler: {
            str(speed): {"quality": stat(value / (1 + number) / speed), "forwards": stat(60.0 / speed),
                         "seconds": stat(0.1), "precision_place": stat(None), "recall_place": stat(0.25)}
            for speed in cell.table.tokens_per_step
        }
        for number, sampler in enumerate(cell.arm.samplers)
    }  # fmt: skip
    content = {"arm": cell.arm.name, "seconds": 36.0, "passes": 4, "results": results, **more}
    plan.file(cell).parent.mkdir(parents=True, exist_ok=True)
    plan.file(cell).write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


# the plan


def shipped() -> list[tuple[Plan, Cell]]:
    plan = read_plan(plain(load_config([WHOLE])))
    return [(plan, cell) for cell in plan.cells("val") if cell.seed == 0]


def test_shipped_arms_make_as_many_passes_as_they_say():
    """An objective with a second pass says so in the plan, which counts steps times that when it is read."""
    for plan, cell in shipped():
        passes = set()
        for command in (command for command in cell.arm.commands if command.startswith("train ")):
            cfg = load_config(plan.filled(command, cell)[1:])
            module, _, name = cfg.objective.target.rpartition(".")
            kind = getattr(importlib.import_module(module), name)
            passes.add((1 if kind.second_input is Objective.second_input else 2) * cfg.optim.views)
        assert passes == {cell.arm.passes}, cell.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"passes": 5}, r"arms\.one: 4 passes \(4 steps of 1\), but every arm of the table makes 5"),
        ({"arms": {"one": ARM, "two": {**ARM, "passes": 2}}}, r"arms\.two: 8 passes \(4 steps of 2\), but .* makes 4"),
        ({"reference": "one/plane"}, r"no row 'one/plane'; there are one/plain, one/refine"),
        ({"arms": {"one": {**ARM, "samplers": ["plain", "refin"]}}}, r"no 'refin'; did you mean 'refine'"),
        ({"arms": {"one": {**ARM, "comands": []}}}, r"no argument 'comands'; did you mean 'commands'"),
        ({"arms": {"one": {**ARM, "commands": ["train conf=msk"]}}}, "no configuration 'msk'"),
        ({"arms": {"one": {**ARM, "commands": ["trian conf=mask"]}}}, "no verb 'trian'; did you mean 'train'"),
    ],
)
def test_a_plan_that_is_not_fair_or_cannot_run_is_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        plan_of(tmp_path, **change)


def test_the_test_split_is_the_last_stage_and_used_once(tmp_path):
    plan = plan_of(tmp_path, seeds=1)
    first, second = plan.cells("val")
    finish(plan, first, 1.0)
    with pytest.raises(UserError, match=r"split=test is the final stage.* 1 of 2 cells of val are not done"):
        check_stage(plan, "test")
    finish(plan, second, 1.0)
    check_stage(plan, "test")
    for cell in plan.cells("test"):
        finish(plan, cell, 1.0)
    check_stage(plan, "test")  # a rerun
    changed = plan_of(tmp_path, seeds=1, tokens_per_step=[1, 4])
    for cell in changed.cells("val"):
        finish(changed, cell, 1.0)
    with pytest.raises(UserError, match="the test split has been used with other arms"):
        check_stage(changed, "test")


# statistics


def test_holm_equals_the_textbook():
    assert holm({1: 0.01, 2: 0.04, 4: 0.03, 8: 0.005}) == pytest.approx({1: 0.03, 2: 0.06, 4: 0.06, 8: 0.02})
    assert holm({1: 0.6, 2: 0.7}) == {1: 1.0, 2: 1.0}


@pytest.mark.parametrize("differences", [[0.1, 0.3], [-2.0, 1.0], [0.1, 0.2, 0.4], [-1.0, -1.1, -1.3]])
def test_p_equals_students_closed_forms(differences):
    """t of 1 degree of freedom is Cauchy's; of 2 its two-sided tail is 1 - |t| / sqrt(2 + t^2)."""
    n, mean = len(differences), sum(differences) / len(differences)
    t = abs(mean) / math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    expected = 1 - 2 / math.pi * math.atan(t) if n == 2 else 1 - t / math.sqrt(2 + t * t)
    assert paired_p(differences) == pytest.approx(expected)


def test_there_is_no_p_of_one_seed_or_of_equal_differences():
    assert paired_p([0.3]) is paired_p([0.2, 0.2, 0.2]) is None


def test_the_report_has_means_over_seeds_differences_and_what_did_not_run(tmp_path):
    arms = {"one": ARM, "two": ARM, "three": ARM, "later": {"missing": "there is no such thing"}}
    plan = plan_of(tmp_path, arms=arms)
    one, two = {0: 0.5, 1: 0.6, 2: 0.7}, {0: 0.4, 1: 0.9}
    for cell in plan.cells("val"):
        values = {"one": one, "two": two}.get(cell.arm.name, {})
        if cell.seed in values:
            finish(plan, cell, values[cell.seed])
        elif cell.arm.name == "two":
            finish(plan, cell, 0.0, results=None, failed="src.train: exit code 2: error: no disk")
    text = write_study(plan, metrics=["quality"], command="x")
    assert (tmp_path / "README.md").read_text() == text
    se = math.sqrt(0.01 / 3)
    assert f"| one             | plain   | 0.600 ±{se:.3f} (3) |" in text
    assert "| two             | plain   | 0.650 ±0.250 (2) |" in text
    assert "| three           | plain   | not run          | not run          |" in text
    assert "- later: not run: there is no such thing" in text
    assert "val: 5 of 9 cells done" in text
    assert f"failed: t-two-seed2-{plan.cells('val')[1].key}: src.train: exit code 2: error: no disk" in text
    # differences of -0.1 and 0.3, and an eighth of that: p = .70 twice, and 1 after Holm
    assert "quality, two plain - one plain: +0.100 ±0.200 at 1 (p = 1.000), +0.013 ±0.025 at 8 (p = 1.000)" in text
    assert "quality, one refine - one plain: -0.300" in text
    assert (tmp_path / "t-val.png").read_bytes().startswith(b"\x89PNG")
    assert "## t, test" not in text


def test_a_table_may_evaluate_the_models_of_another_on_other_data(tmp_path):
    table = {"passes": 4, "tokens_per_step": [1], "reference": "one/plain", "seeds": [0], "arms": {"one": ARM}}
    other = {**table, "evaluate": ["evaluate.data.path={data}-other"]}
    cfg = plain(load_config(["conf=study", f"out={tmp_path}", f"runs={tmp_path}/runs", f"data={tmp_path}/data"]))
    plan = read_plan({**cfg, "tables": {"t": table, "other": other}})
    here, there = plan.cells("val")
    assert plan.folder(here) == plan.folder(there) and plan.commands(here)[:-1] == plan.commands(there)[:-1]
    paths = [load_config(plan.commands(cell)[-1][1:]).evaluate for cell in (here, there)]
    assert [str(path.data.path) for path in paths] == [f"{tmp_path}/data", f"{tmp_path}/data-other"]
    assert paths[0].out != paths[1].out and plan.file(here) != plan.file(there)


# the verb


def settings(folder: Path) -> str:
    """The smallest study with more steps, so that there is something to kill, and with an arm that fails."""
    command = "train conf={},quickstart trainer.max_steps=30 run_dir={{run}}"
    broken = {"commands": [command.format("mask") + " model.path=nowhere"], "samplers": ["plain"]}
    arms = {name: {"commands": [command.format(name)]} for name in ("mask", "stage1")}
    arms = {"mask": arms["mask"], "broken": broken, "stage1": arms["stage1"]}
    places = {"out": f"{folder}/out", "runs": f"{folder}/runs", "data": f"{folder}/data"}
    content = {"base": ["study/small"], **places, "tables": {"small": {"passes": 30, "arms": arms}}}
    (folder / "plan.yaml").write_text(json.dumps(content))
    return f"conf={folder}/plan.yaml"


def wait_for(condition, process: subprocess.Popen | None = None, *, seconds: float = 1200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_study_resumes_its_training_and_goes_on_past_an_arm_that_fails(tmp_path, capsys):
    argv = [settings(tmp_path), "budget=60"]
    # 1. budget=0 runs nothing, not even the setup.
    main([argv[0], "budget=0"])
    assert "budget=0 minutes: small-mask-seed0-" in capsys.readouterr().out
    assert not (tmp_path / "data").exists() and (tmp_path / "out" / "README.md").exists()
    # 2. A study is killed in its first training, which stops with it.
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "src.study", *argv]
    study = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: list(tmp_path.glob("runs/mask-*/seed0/run/checkpoints/last.ckpt")), study)
        children = Path(f"/proc/{study.pid}/task/{study.pid}/children").read_text().split()
    finally:
        study.send_signal(signal.SIGKILL)
        study.wait()
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    assert len(children) == 1 and not list(tmp_path.glob("runs/*/seed0/run/finished.json"))
    assert not list(tmp_path.glob("out/val/*.json"))
    # 3. The same command finishes it, and names the arm that fails.
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "1 of the cells failed" in done.stderr
    assert "src.train conf=mask,quickstart: exit code 2: error: model.path: there is no nowhere" in done.stdout
    assert "cells left" in done.stdout  # the plan in hours, after the first cell
    (log,) = tmp_path.glob("runs/mask-*/seed0/log.txt")

    cells = {json.loads(path.read_text())["arm"]: json.loads(path.read_text()) for path in tmp_path.glob("out/val/*")}
    assert cells.keys() == {"mask", "broken", "stage1"} and "results" not in cells["broken"]
    assert cells["mask"]["steps"] == cells["mask"]["passes"] == 30 and cells["mask"]["seed"] == 0
    assert list(cells["mask"]["results"]) == ["plain", "refine"] and list(cells["stage1"]["results"]) == ["refine"]
    assert cells["mask"]["results"]["plain"]["8"]["quality"]["n"] == 8
    assert cells["mask"]["model"]["repaired by wrong tokens=2"]["n"] == 16  # two in each of eight captions
    assert "resuming from" in log.read_text() and cells["mask"]["commit"]


@pytest.mark.slow
def test_two_calls_share_the_cells(tmp_path):
    """Both start at once; each runs one of the two cells, and the last report has both."""
    argv = ["conf=study/small", "budget=60", *(f"{name}={tmp_path / name}" for name in ("out", "runs", "data"))]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "src.study", *argv]
    calls = [subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    ran = [re.findall(r"^\d/2 (small-\w+)-seed0\S*: \d+ s$", call.communicate()[0], re.M) for call in calls]
    assert [call.returncode for call in calls] == [0, 0]
    assert sorted(ran) == [["small-mask"], ["small-stage1"]]
    for log in tmp_path.glob("runs/*/seed0/log.txt"):
        assert log.read_text().count("$ src.train") == 1
    rows = re.findall(r"^\| (\w+) +\|", (tmp_path / "out" / "README.md").read_text(), re.M)
    assert {"mask", "stage1"} <= set(rows)
