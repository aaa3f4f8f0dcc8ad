"""The training verb on a tiny data set: what a run leaves, how it resumes, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from src.prepare import Scenes
from src.train import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "scenes"
    Scenes(out=str(out), image_size=48, vocab_size=300, canvas=40, prompt="Describe.", num_train=48, num_val=8, num_test=8,
           captions_per_image=1, objects=[1, 1], noise=2.0, per_shard=16).run()  # fmt: skip
    return out


def arguments(scenes: Path, run_dir: Path, *more: str, conf: str = "stage1") -> list[str]:
    sizes = ["model.decoder.hidden_size=32", "model.decoder.intermediate_size=32", "model.decoder.num_hidden_layers=1"]
    sizes += ["model.vision.hidden_size=32", "model.vision.intermediate_size=32", "model.vision.num_hidden_layers=1"]
    data = [f"data.path={scenes}", f"tokenizer={scenes}/tokenizer", "data.batch_size=8", "data.canvas=40", "data.workers=0"]
    quick = ["callbacks.samples=null"]
    steps = ["trainer.max_steps=10", "callbacks.checkpoint.every_n_train_steps=4", "trainer.limit_val_batches=1"]
    return [f"conf={conf},model/tiny", f"run_dir={run_dir}", *sizes, *data, *quick, *steps, *more]


def run(argv: list[str]) -> None:
    main(argv)


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    run(arguments(scenes, run_dir))
    return run_dir


def test_a_run_leaves_its_config_logs_checkpoints_and_model(finished):
    assert json.loads((finished / "finished.json").read_text()) == {"steps": 10}
    assert {p.name for p in (finished / "model").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert list((finished / "tensorboard").glob("events*"))
    assert "target: src.objectives.revision.Revision" in (finished / "config.yaml").read_text()


def test_checkpoints_hold_tensors_and_plain_containers_only(finished):
    state = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 8 and len(state["optimizer_states"]) == 1


def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(scenes, finished, tmp_path):
    """A real process is killed after its first checkpoint; the same command finishes the run, bit for bit."""
    run_dir = tmp_path / "killed"
    argv = arguments(scenes, run_dir)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "src.train", *argv], cwd=ROOT, env=env, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (run_dir / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run_dir / "model").exists()
    run(argv)
    assert json.loads((run_dir / "finished.json").read_text()) == {"steps": 10}
    whole, again = (load_file(d / "model" / "model.safetensors") for d in (finished, run_dir))
    assert whole.keys() == again.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_a_finished_run_is_left_alone_and_can_be_started_afresh(scenes, finished, tmp_path):
    run_dir = tmp_path / "again"
    argv = arguments(scenes, run_dir, "trainer.max_steps=2")
    run(argv)
    stamp = (run_dir / "model" / "model.safetensors").stat().st_mtime_ns
    run(argv)
    assert (run_dir / "model" / "model.safetensors").stat().st_mtime_ns == stamp
    run([*argv, "resume=false"])
    assert (run_dir / "model" / "model.safetensors").stat().st_mtime_ns != stamp


def test_the_saved_config_repeats_the_run(scenes, finished, tmp_path):
    run_dir = tmp_path / "repeated"
    run([f"conf={finished}/config.yaml", f"run_dir={run_dir}", f"callbacks.checkpoint.dirpath={run_dir}/checkpoints"])
    whole, again = (load_file(d / "model" / "model.safetensors") for d in (finished, run_dir))
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("objective.rate=0.2", r"holds a run with other settings \(objective\)"),
        ("objective.rats=0.2", "did you mean 'objective.rate'"),
        ("objective.hallucination=sometimes", "'sometimes'"),
        ("data.path=/nowhere", "/nowhere"),
        ("tokenizer=/nowhere", "no tokenizer in /nowhere"),
    ],
)
def test_mistakes_end_in_one_clear_line(scenes, finished, tmp_path, capsys, change, message):
    run_dir = finished if "rate=" in change else tmp_path / "fresh"
    with pytest.raises(SystemExit) as stop:
        run([*arguments(scenes, run_dir), change])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ")
    assert re.search(message, error), error


def test_a_folder_that_is_no_run_is_never_removed(scenes, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit):
        run([*arguments(scenes, tmp_path), "resume=false"])
    assert "is not a run's folder" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").exists()
