"""The training verb on a tiny data set: what a run leaves, how it resumes, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import signal
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src import types as nouns
from src.cli.config import load_config
from src.cli.help import NEEDS
from src.cli.signals import Stop
from src.distributed.checkpoints import read_full
from src.io.shards import INDEX
from src.objectives.revision import RevisionObjective
from src.train import main
from src.training.build import assemble, load_codec
from testing.child import in_child
from testing.verbs import refusal

ROOT = Path(__file__).parents[1]


def arguments(scenes: Path, run_dir: Path, *more: str, conf: str = "stage1") -> list[str]:
    sizes = ["model.decoder.hidden_size=32", "model.decoder.intermediate_size=32", "model.decoder.num_hidden_layers=1"]
    sizes += ["model.vision.hidden_size=32", "model.vision.intermediate_size=32", "model.vision.num_hidden_layers=1"]
    data = [
        f"data.path={scenes}",
        f"tokenizer={scenes}/tokenizer",
        "data.batch_size=8",
        "data.response_length=40",
        "data.workers=0",
    ]
    quick = ["callbacks.samples=null", "optim.warmup_steps=1"]
    steps = ["trainer.max_steps=10", "callbacks.checkpoint.every_n_train_steps=4", "trainer.limit_val_batches=1"]
    return [f"conf={conf},model/tiny", f"run_dir={run_dir}", *sizes, *data, *quick, *steps, *more]


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_file(run_dir / "model" / "model.safetensors") for run_dir in (one, other))
    return first.keys() == second.keys() and all(torch.equal(second[name], tensor) for name, tensor in first.items())


def test_a_run_leaves_its_config_logs_checkpoints_and_model(finished):
    assert [step for step, _ in logged(finished, "train/loss")] == [9]  # though the log takes every fiftieth
    assert json.loads((finished / "finished.json").read_text()) == {"steps": 10}
    assert {p.name for p in (finished / "model").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert json.loads((finished / "model" / "config.json").read_text())["response_length"] == 40
    assert list(finished.glob("events*"))
    state = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)  # tensors and plain containers only
    assert (state["global_step"], len(state["optimizer_states"])) == (10, 1)
    assert "target: src.objectives.revision.RevisionObjective" in (finished / "config.yaml").read_text()


class Call:
    """Its pickle makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_checkpoint_that_holds_code_is_refused(scenes, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "finished.json").unlink()
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        torch.save({"state_dict": {}, "call": Call(tmp_path / "made")}, path)
    with pytest.raises(pickle.UnpicklingError):
        main(arguments(scenes, tmp_path / "run"))
    with pytest.raises(pickle.UnpicklingError):
        read_full(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of os.fork
def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(scenes, finished, tmp_path):
    """A process is killed in its seventh step, after a checkpoint; the same command finishes the run, bit for bit."""
    run_dir, step, calls = tmp_path / "killed", RevisionObjective.training_step, []
    argv = arguments(scenes, run_dir)

    def counted(self, *args):
        calls.append(0)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args)

    def killed():
        RevisionObjective.training_step = counted
        main(argv)

    assert in_child(killed) == -signal.SIGKILL
    assert (run_dir / "checkpoints" / "last.ckpt").exists() and not (run_dir / "model").exists()
    main(argv)
    assert json.loads((run_dir / "finished.json").read_text()) == {"steps": 10}
    assert same_weights(finished, run_dir)


def test_a_finished_run_is_left_alone_and_can_be_started_afresh(scenes, tmp_path, caplog):
    caplog.set_level("INFO")
    run_dir = tmp_path / "again"
    argv = arguments(scenes, run_dir, "trainer.max_steps=2")
    main(argv)
    stamp = (run_dir / "model" / "model.safetensors").stat().st_mtime_ns
    main(argv)
    assert (run_dir / "model" / "model.safetensors").stat().st_mtime_ns == stamp
    main([*argv, "resume=false"])
    afresh = (run_dir / "model" / "model.safetensors").stat().st_mtime_ns
    assert afresh != stamp
    assert "resuming" not in caplog.text
    main([f"conf={run_dir}/config.yaml"])  # what is saved does not start afresh once more
    assert (run_dir / "model" / "model.safetensors").stat().st_mtime_ns == afresh


def test_the_saved_config_repeats_the_run(scenes, finished, tmp_path):
    run_dir = tmp_path / "repeated"
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    main([f"conf={finished}/config.yaml", f"run_dir={run_dir}"])
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {
        "last.ckpt", "epoch=1-step=8.ckpt", "epoch=2-step=10.ckpt"
    }  # fmt: skip
    assert same_weights(finished, run_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "objective.rate=0.2",
            r"with other settings \(objective\.rate: 0\.1 in the run, 0\.2 now\); set another run_dir",
        ),
        (
            "trainer.max_steps=20",
            r"other settings \(trainer\.max_steps: 10 in the run, 20 now\);.* To train its model for more steps: "
            r"run_dir=NEW model=trained model\.path=.*/model",
        ),
        ("optim.warmup_steps=11", "optim.warmup_steps=11 is more than trainer.max_steps=10.* add optim.warmup_steps=1"),
        (
            "model.vision.image_size=96",
            "data.image_size and data.tiling mean one tile of 48 .* model means .* 96 pixels",
        ),
        (
            "model={target: src.models.hf.folder.from_pretrained, path: runs/no/../stage1/model}",
            "model.path: there is no runs/stage1/model; train it first with `python -m src.train conf=stage1`, or set",
        ),
        ("data.path=/nowhere", "/nowhere"),
    ],
)
def test_mistakes_end_in_one_clear_line(scenes, finished, tmp_path, capsys, change, message):
    run_dir = finished if "other settings" in message else tmp_path / "fresh"
    error = refusal(main, [*arguments(scenes, run_dir), change], capsys)
    assert error.startswith("error: ")
    assert re.search(message, error), error


def logged(run_dir: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of a scalar; empty if there is none."""
    events = EventAccumulator(str(run_dir)).Reload()
    return [(e.step, e.value) for e in events.Scalars(name)] if name in events.Tags()["scalars"] else []


@pytest.fixture(scope="module")
def stepwise(scenes, tmp_path_factory) -> tuple[Path, list[str], list[tuple[float, float]]]:
    """A run of 10 steps that logs and saves each: its folder, its command, and (rate, norm) as each step was made."""
    run_dir, rates, norms = tmp_path_factory.mktemp("runs") / "stepwise", list[float](), list[float]()
    step, clip = torch.optim.AdamW.step, torch.nn.utils.clip_grad_norm_

    def noted_step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    def noted_clip(*args, **kwargs):
        norms.append(float(norm := clip(*args, **kwargs)))
        return norm

    argv = arguments(scenes, run_dir, "trainer.log_every_n_steps=1", "optim.warmup_steps=4", "optim.decay=cosine")
    argv += ["callbacks.checkpoint.every_n_train_steps=1", "callbacks.checkpoint.keep=20", "callbacks.looks.num=4"]
    argv += ["callbacks.throughput.every_n_steps=2", "callbacks.looks.every_n_steps=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", noted_step)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", noted_clip)
        main(argv)
    return run_dir, argv, list(zip(rates, norms, strict=True))


def test_what_is_logged_at_a_step_is_of_that_step(stepwise):
    """train/* at n: of the step that n steps precede. All else at n: of the weights after n steps."""
    run_dir, argv, made = stepwise
    assert made[0][0] == pytest.approx(5e-4 / 4) and made[3][0] == pytest.approx(5e-4)  # warm-up in 4 steps
    for name, values in zip(("train/lr", "train/grad_norm"), zip(*made, strict=True), strict=True):
        assert logged(run_dir, name) == [(step, pytest.approx(value)) for step, value in enumerate(values)]
    assert [step for step, _ in logged(run_dir, "val/loss")] == [6]  # 48 samples in batches of 8: the end of an epoch
    assert logged(run_dir, "perf/samples_seen") == [(step, 8 * step) for step in (2, 4, 6, 8, 10)]
    assert [step for step, _ in logged(run_dir, "p_break/t=0")] == [2, 4, 6, 8, 10]
    # the loss at 4: of the weights of the checkpoint of step 4, on the fifth batch
    cfg = load_config(argv, verb="src.train", needs=NEEDS["src.train"])
    data, objective, _ = assemble(cfg, load_codec(cfg), stop=Stop(), is_rank0=False)
    (path,) = (run_dir / "checkpoints").glob("*step=4.ckpt")
    objective.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    batch = list(islice(data.train_dataloader(), 5))[4]
    views = objective.corrupt(batch)
    totals = objective.denominators([(batch, views)])
    with torch.no_grad():
        sums = objective.forward_backward(batch, views, totals)
    loss = objective.weighted({name: value / totals[name] for name, value in sums.items()})
    assert dict(logged(run_dir, "train/loss"))[4] == pytest.approx(float(loss), rel=1e-5)


def test_a_resumed_run_logs_what_the_whole_one_does(stepwise, tmp_path):
    """From the middle of an epoch, and from its end, before which the whole run has validated."""
    whole, argv, _ = stepwise
    names = EventAccumulator(str(whole)).Reload().Tags()["scalars"]
    names = [name for name in names if name in ("perf/samples_seen", "perf/tokens_seen") or "perf/" not in name]
    assert {"train/loss", "train/lr", "val/loss", "p_break/t=0", "perf/samples_seen"} <= set(names)
    for step in (4, 6):
        run_dir = tmp_path / f"run{step}"
        shutil.copytree(whole, run_dir, ignore=shutil.ignore_patterns("events*", "model", "finished.json", "last*"))
        for path in (run_dir / "checkpoints").iterdir():
            if int(path.stem.split("=")[-1]) > step:
                path.unlink()
        main([*argv, f"run_dir={run_dir}"])
        for name in names:
            first = step if name.startswith("train/") else step + 1
            logs = [[(n, value) for n, value in logged(run, name) if n >= first] for run in (whole, run_dir)]
            assert logs[0] == logs[1], name


def test_without_validation_samples_training_goes_on(scenes, tmp_path, caplog):
    """Two epochs; the pictures that TensorBoard would get are of validation samples too."""
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    index = json.loads((data / "val" / INDEX).read_text())
    (data / "val" / INDEX).write_text(json.dumps({**index, "shards": []}))
    argv = [a for a in arguments(data, tmp_path / "run", "callbacks.samples.every_n_steps=2") if "samples=" not in a]
    main(argv)
    assert caplog.text.count("val holds no samples: training runs without validation") == 1
    assert json.loads((tmp_path / "run" / "finished.json").read_text()) == {"steps": 10}
    assert not logged(tmp_path / "run", "val/loss")
    assert logged(tmp_path / "run", "train/loss")


STAGE_TWO = [f"callbacks.self_correction.{setting}" for setting in ("drafts_per_round=8", "tokens_per_step=[20,40]")]


async def agrees(self, drafts):
    for draft in drafts:
        yield draft.key, nouns.Revision(())


def test_a_round_without_corrections_stops_in_one_line(scenes, tmp_path, monkeypatch, capsys, caplog):
    """Nothing is drawn again by the command that goes on."""
    monkeypatch.setattr("src.experts.scenes.ScenesExpert.revise", agrees)
    argv = arguments(scenes, tmp_path / "run", *STAGE_TWO, "data.epoch_batches=5", conf="stage2")
    for _ in range(2):
        error = refusal(main, argv, capsys).splitlines()[-1]
        assert re.match(r"error: .*round-0001 has no corrected draft .* 8 revised, 8 right, .*allow_empty=true", error)
    shards = sorted((tmp_path / "run" / "rounds" / "round-0001" / "drafts").glob("*.tar"))
    stamps = [path.stat().st_mtime_ns for path in shards]
    main([*argv, "callbacks.self_correction.allow_empty=true"])
    assert "training continues without it" in caplog.text
    assert json.loads((tmp_path / "run" / "finished.json").read_text()) == {"steps": 10}
    assert [path.stat().st_mtime_ns for path in shards] == stamps


def test_a_missing_shard_ends_in_one_clear_line(scenes, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    next((data / "train").glob("*.tar")).unlink()
    error = refusal(main, arguments(data, tmp_path / "run"), capsys)
    assert re.fullmatch(r"error: .*train-000\d+\.tar.*\n", error), error


def test_other_numbers_of_processes_than_were_started_are_refused(scenes, tmp_path, monkeypatch, capsys):
    """Each would train alone, in the same folder."""
    for name, value in {"TORCHELASTIC_RUN_ID": "one", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    error = refusal(main, arguments(scenes, tmp_path / "run"), capsys)
    assert "2 processes were started, but trainer.devices=1 and num_nodes=1" in error


def test_out_of_memory_says_what_to_do(scenes, tmp_path, monkeypatch, capsys):
    def corrupt(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(RevisionObjective, "corrupt", corrupt)
    error = refusal(main, arguments(scenes, tmp_path / "run"), capsys).splitlines()[-1]
    assert re.match(r"error: out of memory at step 0 .*plan\.gpus=1 .* optim\.micro_batch", error)


def test_changed_inputs_are_named(scenes, finished, tmp_path, capsys):
    """A model that was trained again, and data that were made again, under the same names."""
    data, model, run_dir = tmp_path / "data", tmp_path / "model", tmp_path / "run"
    shutil.copytree(scenes, data)
    shutil.copytree(finished / "model", model)
    argv = [f"conf={finished}/config.yaml", f"run_dir={run_dir}", f"data.path={data}", "trainer.max_steps=1"]
    argv.append(f"model={{target: src.models.hf.folder.from_pretrained, path: {model}}}")
    main(argv)
    main(argv)
    state = load_file(model / "model.safetensors")
    save_file({**state, "lm_head.weight": state["lm_head.weight"] * 1.01}, model / "model.safetensors")
    error = refusal(main, argv, capsys)
    assert re.search(rf"changed since \(hash of model\.path={model}: \w+ in the run, \w+ now\);", error), error
    assert "resume=false" in error
    index = data / "train" / INDEX
    before = hashlib.sha256(index.read_bytes()).hexdigest()[:12]
    index.write_text(index.read_text() + "\n")
    after = hashlib.sha256(index.read_bytes()).hexdigest()[:12]
    assert f"; hash of data.path={data}: {before} in the run, {after} now);" in refusal(main, argv, capsys)
    main([*argv, "resume=false"])
    main(argv)
