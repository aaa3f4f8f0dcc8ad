"""The folder of a run: what is refused before anything is lost, and what damage to it is survived or named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from src.distributed.checkpoints import is_intact
from src.io.settings import changes
from src.train import main
from testing.files import contents
from testing.verbs import refusal
from tests.test_train import arguments, same_weights


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


# --- folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [["thesis.txt"], ["config.yaml", "model/mine.bin"]])
def test_a_foreign_folder_stays_as_it_is_whatever_is_tried(scenes, tmp_path, capsys, files):
    """A first command that fails must not make the folder look like a run's, for the second one to remove."""
    home = tmp_path / "home"
    for file in files:
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).write_text("years: of work\n")
    before = contents(home)
    for more in (["objective.t_min=5"], [], ["resume=false"]):
        assert "home is not a run's folder" in refusal(main, [*arguments(scenes, home), *more], capsys)
        assert contents(home) == before


@pytest.mark.parametrize("change", ["data.path=/nope", "objective.t_min=5", "trainer.max_steps=-1"])
def test_a_mistake_beside_resume_false_costs_nothing(scenes, copied, capsys, change):
    before = contents(copied)
    refusal(main, [*arguments(scenes, copied), "resume=false", change], capsys)
    assert contents(copied) == before


def test_resume_false_keeps_what_the_run_reads_and_what_is_not_its_own(scenes, copied, capsys):
    (copied / "notes.txt").write_text("mine")
    before = contents(copied)
    model = f"model={{target: src.models.hf.folder.from_pretrained, path: {copied}/model}}"
    error = refusal(main, [f"conf={copied}/config.yaml", f"run_dir={copied}", "resume=false", model], capsys)
    assert f"error: model.path={copied}/model is in {copied}, which resume=false would remove" in error
    assert contents(copied) == before
    main([*arguments(scenes, copied), "resume=false", "trainer.max_steps=1"])
    assert json.loads((copied / "finished.json").read_text()) == {"steps": 1}
    assert (copied / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(("file", "content"), [("config.yaml", "{"), ("config.yaml", "- 1"), ("inputs.json", "{")])
def test_a_damaged_record_is_named(scenes, copied, capsys, file, content):
    (copied / file).write_text(content)
    error = refusal(main, arguments(scenes, copied), capsys)
    assert error.count("\n") == 1
    assert str(copied / file) in error


# --- checkpoints and models ---------------------------------------------------------------------------------------


def overwrite(path: Path, at: float, data: bytes) -> None:
    """`data` at a share of the file."""
    content = path.read_bytes()
    start = int(at * len(content))
    path.write_bytes(content[:start] + data + content[start + len(data) :])


@pytest.mark.parametrize(("at", "data"), [(0.5, bytes(range(256)) * 8), (0.0, bytes(4096)), (0.25, b"\x01" * 64)])
def test_damage_to_a_checkpoint_is_seen(finished, tmp_path, at, data):
    path = Path(shutil.copy(finished / "checkpoints" / "last.ckpt", tmp_path))
    assert is_intact(path)
    overwrite(path, at, data)
    assert not is_intact(path)


@pytest.mark.parametrize("damaged", ["last.ckpt", "*.ckpt"])
def test_a_damaged_checkpoint_is_passed_over(scenes, finished, copied, caplog, damaged):
    """All of them: training starts at step 0."""
    caplog.set_level("INFO")
    for path in (copied / "checkpoints").glob(damaged):
        overwrite(path, 0.5, b"\x01" * 4096)
    (copied / "finished.json").unlink()
    shutil.rmtree(copied / "model")
    main(arguments(scenes, copied))
    assert "last.ckpt is damaged; looking for the one before it" in caplog.text
    assert ("resuming from epoch=" in caplog.text) == (damaged == "last.ckpt")
    assert same_weights(finished, copied)
    assert not list((copied / "checkpoints").glob(".*"))


def test_a_finished_run_without_its_model_makes_it_again(scenes, finished, copied):
    shutil.rmtree(copied / "model")
    main(arguments(scenes, copied))
    assert same_weights(finished, copied)


# --- words --------------------------------------------------------------------------------------------------------


def test_changes_are_told_with_both_values():
    old = {"seed": 0, "optim": {"lr": 1e-3, "betas": [0.9, 0.98], "gone": 1}, "prompt": "a" * 200 + "x" * 9, "n": None}
    new = {"seed": 0, "optim": {"lr": 2e-3, "betas": (0.9, 0.98)}, "prompt": "a" * 200 + "y" * 9}
    assert changes(old, new, "in the run") == (
        "optim.lr: 0.001 in the run, 0.002 now; optim.gone: 1 in the run, null now; "
        f"prompt: ...{'a' * 20}{'x' * 9} in the run, ...{'a' * 20}{'y' * 9} now"
    )
    assert not changes(old, old, "in the run")
    many = changes({}, {f"k{n}": n for n in range(11)}, "there")
    assert many.startswith("k0: null there, 0 now; ") and many.endswith("; and 3 more")
    assert changes({"a": "no"}, {"a": {"b": 1}}, "there") == 'a: no there, {"b": 1} now'


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("run_dir=null", "run_dir: expected a path, got None"),
        (
            "optim.lr=1e30",
            r"the gradients are not finite after step \d \(samples train-0\d+, .*\), 4 times in a row: .*",
        ),
        ("data.rounds=[/nope]", "data.rounds: no folder /nope; make a round with `python -m src.revise`"),
        ("trainer.limit_train_batches=0", "stopped at step 0 .*: raise or unset .*limit_train_batches"),
    ],
)
def test_settings_that_cannot_work(scenes, tmp_path, capsys, change, message):
    error = refusal(main, [*arguments(scenes, tmp_path / "run"), change], capsys)
    assert error.splitlines()[-1].startswith("error: ")
    assert re.search(message, error), error


def test_a_likely_mistake_is_a_warning(scenes, finished, tmp_path, caplog):
    """The second stage without a round, and responses of another length than the model has learned."""
    more = ["callbacks.self_correction=null", "trainer.max_steps=1", "data.response_length=48"]
    model = f"model={{target: src.models.hf.folder.from_pretrained, path: {finished}/model}}"
    conf, *rest = arguments(scenes, tmp_path / "run", *more, conf="stage2")
    main([conf.split(",")[0], *(setting for setting in rest if not setting.startswith("model.")), model, *more])
    assert "the objective corrects drafts, but there are none: set data.rounds" in caplog.text
    assert "data.response_length=48, but the model was trained with response length 40" in caplog.text
