"""Jobs on a real Slurm of two nodes (tests/slurm.py): `make test-slurm`, as root, with Debian's packages of Slurm.

Each test submits by `src.submit`, as a user does, and compares with a run that nothing interrupted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from testing.scenes import BASE, write_scenes
from tests.slurm import Slurm, missing, until
from tests.test_stop import ROOT, arguments, same_weights

pytestmark = pytest.mark.slurm
STEPS, EPOCH, DRAFTS = 40, 20, 64
CLUSTER = """\
cluster:
  target: src.training.slurm.Cluster
  nodes: 2
  gpus_per_node: 0
  cpus_per_task: 1
  time: "{time}"
  stop_before: {stop_before}
  after: null
  setup: [export MASTER_ADDR=127.0.0.1 OMP_NUM_THREADS=1]  # the nodes' names mean nothing outside this Slurm
trainer:
  accelerator: cpu
  num_nodes: ${{cluster.nodes}}
  devices: 1
"""
ALONE = "cluster.nodes=1"


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    if lacking := missing():
        pytest.skip(
            f"no {', '.join(lacking)}: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
        )
    if os.geteuid():
        pytest.skip("the daemons of this Slurm run as root")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # the socket needs a short path
    folder.chmod(0o755)
    with Slurm(folder / "x") as cluster:
        yield cluster
    shutil.rmtree(folder, ignore_errors=True)  # a daemon may still remove files of its own


def command(folder: Path, argv: list[str], *, time: str = "30", stop_before: int = 60) -> list[str]:
    cluster = folder / "cluster.yaml"
    cluster.write_text(CLUSTER.format(time=time, stop_before=stop_before))
    return [sys.executable, "-m", "src.submit", f"{argv[0]},{cluster}", *argv[1:]]


def submit(slurm: Slurm, folder: Path, argv: list[str], **limits) -> str:
    """The number of the job."""
    found = re.fullmatch(r"job (\d+) runs in .*", slurm.run(*command(folder, argv, **limits), cwd=ROOT))
    assert found
    return found[1]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Scenes of which the embedded base model gets some wrong, as there is to be something to correct."""
    sizes = {"num_train": 64, "objects": [2, 3], "noise": 4.0, "prompt": "Describe the picture."}
    return write_scenes(tmp_path_factory.mktemp("data") / "pictures", **sizes)


def stage_two(pictures: Path, run_dir: Path, parallel: str) -> list[str]:
    """Two rounds whose drafts take a while, and an epoch after each."""
    start = [f"model.path={BASE}", f"tokenizer={BASE}", f"data.path={pictures}", f"run_dir={run_dir}"]
    data = ["data.batch_size=2", "data.workers=1", f"data.epoch_batches={EPOCH}", "trainer.limit_val_batches=2"]
    steps = [f"trainer.max_steps={STEPS}", "optim.warmup_steps=1", "trainer.log_every_n_steps=1"]
    rounds = ["rounds=2", f"drafts_per_round={DRAFTS}", "tokens_per_step=[1]"]
    rest = ["optim.views=2", "callbacks.checkpoint.every_n_train_steps=6", "callbacks.samples=null"]
    more = [*start, *data, *steps, *rest, *(f"callbacks.self_correction.{setting}" for setting in rounds)]
    return [f"conf=stage2,parallel/{parallel}", *more]


def log_of(run_dir: Path) -> str:
    return "".join(path.read_text() for path in sorted(run_dir.glob("slurm-*.log")))


def stops(run_dir: Path) -> list[int]:
    """The steps at which a job stopped and was queued again."""
    return [int(step) for step in re.findall(r"stopped at step (\d+) of \d+ by SIG(?:USR1|TERM)", log_of(run_dir))]


def logged_steps(run_dir: Path) -> list[int]:
    """The steps of the loss in all logs of a run, in order."""
    found: list[int] = []
    for path in sorted(run_dir.glob("events.*")):
        events = EventAccumulator(str(path)).Reload()
        if "train/loss" in events.Tags()["scalars"]:
            found += [event.step for event in events.Scalars("train/loss")]
    return found


def preempt(slurm: Slurm, job: str, *, restarts: int) -> None:
    """Another job takes both nodes away for a moment; the first is queued again."""
    options = ["--parsable", "--partition=high", "--nodes=2", "--ntasks-per-node=1", "--output=/dev/null"]
    other = slurm.run("sbatch", *options, "--wrap=srun sleep 3")
    slurm.wait(other, {"COMPLETED"}, seconds=300)
    slurm.wait(job, {"RUNNING"}, restarts=restarts, seconds=300)


def has(run_dir: Path, pattern: str) -> Callable[[], bool]:
    return lambda: any(run_dir.glob(pattern))


def drafts(run_dir: Path, number: int) -> dict[str, int]:
    """The shards drawn so far of a round, and when."""
    folders = [run_dir / "rounds" / name for name in (f".round-000{number}.partial", f"round-000{number}")]
    found = (path for folder in folders for path in folder.glob("drafts/*.tar"))
    return {path.name: path.stat().st_mtime_ns for path in found}


@pytest.mark.parametrize("parallel", ["fsdp2", "ddp"])
def test_two_nodes_are_preempted_in_a_round_and_in_a_step_and_make_the_same_weights(
    slurm, pictures, tmp_path, parallel
):
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    number = {"fsdp2": 1, "ddp": 2}[parallel]  # the round in which the first is stopped
    job = submit(slurm, tmp_path, stage_two(pictures, run_dir, parallel))
    until(lambda: len(drafts(run_dir, number)) >= 2, seconds=400)
    preempt(slurm, job, restarts=1)
    kept = drafts(run_dir, number)
    assert not has(run_dir, f"rounds/round-000{number}")()
    assert 2 <= len(kept) < DRAFTS // 2  # of two drafts each
    after = {1: 0, 2: EPOCH}[number]
    assert stops(run_dir) == [after]
    until(has(run_dir, f"checkpoints/epoch=*-step={(after // 6 + 1) * 6}.ckpt"), seconds=400)
    preempt(slurm, job, restarts=2)
    slurm.wait(job, {"COMPLETED"}, restarts=2, seconds=600)
    assert kept.items() <= drafts(run_dir, number).items()  # not one is drawn again
    first, second = stops(run_dir)
    assert first == after < second < after + EPOCH
    steps = logged_steps(run_dir)  # but for the last before the stop in a step: Lightning logs it after the callbacks
    assert steps == sorted(set(steps)) and len(steps) == STEPS - 1
    assert f"{STEPS} steps done" in log_of(run_dir)
    job = submit(slurm, tmp_path, stage_two(pictures, whole, parallel))
    slurm.wait(job, {"COMPLETED"}, seconds=600)
    assert not stops(whole)
    assert same_weights(run_dir, whole)
    for name in ("round-0001", "round-0002"):
        one, other = (json.loads((folder / "rounds" / name / "index.json").read_text()) for folder in (run_dir, whole))
        assert one["counts"] == other["counts"]
        assert one["counts"]["drafted"] == DRAFTS and one["counts"]["written"]


def test_a_job_that_is_preempted_as_it_starts_is_queued_again(slurm, scenes, tmp_path):
    job = submit(slurm, tmp_path, arguments(scenes, tmp_path / "run", conf="stage1,parallel/ddp"))
    slurm.wait(job, {"RUNNING"}, seconds=60)
    until(lambda: processes(tmp_path / "run"), seconds=60)  # which import for some seconds
    preempt(slurm, job, restarts=1)
    slurm.wait(job, {"COMPLETED"}, restarts=1, seconds=300)
    assert "16 steps done" in log_of(tmp_path / "run")


def test_a_process_that_dies_ends_the_job_and_the_same_command_continues(slurm, scenes, tmp_path):
    run_dir = tmp_path / "run"
    argv = arguments(scenes, run_dir, "trainer.max_steps=400", "data.batch_size=2", conf="stage1,parallel/ddp")
    job = submit(slurm, tmp_path, argv)
    until(has(run_dir, "checkpoints/epoch=*"), seconds=300)
    (second,) = [number for number in processes(run_dir) if rank_of(number) == "1"]
    os.kill(second, signal.SIGKILL)
    assert slurm.wait(job, {"FAILED"}, seconds=60)["Restarts"] == "0"
    until(lambda: not processes(run_dir), seconds=20)
    assert slurm.wait(submit(slurm, tmp_path, argv), {"COMPLETED"}, seconds=300)["Restarts"] == "0"
    assert "400 steps done" in log_of(run_dir)


def processes(run_dir: Path) -> list[int]:
    """The processes of a training on all nodes, without their workers."""
    found = subprocess.run(["pgrep", "-f", f"src.train conf={run_dir}/"], capture_output=True, text=True, check=False)
    numbers = [int(number) for number in found.stdout.split()]
    return [number for number in numbers if parent_of(number) not in numbers and rank_of(number)]


def parent_of(number: int) -> int:
    return int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])


def rank_of(number: int) -> str:
    """SLURM_PROCID of a process; empty for what is none of srun's tasks."""
    variables = Path(f"/proc/{number}/environ").read_bytes().decode().split("\0")
    return next((text.partition("=")[2] for text in variables if text.startswith("SLURM_PROCID=")), "")


def test_the_time_limit_queues_the_job_again_and_it_goes_on(slurm, scenes, tmp_path):
    run_dir = tmp_path / "run"
    steps = [
        "trainer.max_steps=100000",
        "callbacks.checkpoint.every_n_train_steps=100000",
        "trainer.log_every_n_steps=1",
    ]
    job = submit(slurm, tmp_path, arguments(scenes, run_dir, *steps, ALONE), time="3", stop_before=60)
    slurm.wait(job, {"RUNNING"}, restarts=1, seconds=400)
    (step,) = stops(run_dir)
    until(lambda: logged_steps(run_dir)[-1] > step, seconds=100)
    slurm.run("scancel", job)
    until(lambda: slurm.job(job)["JobState"] == "CANCELLED", seconds=60)
    steps = logged_steps(run_dir)
    missing = set(range(steps[-1] + 1)) - set(steps)  # that of the stop at most, see above
    assert 0 < step < len(steps) == len(set(steps)) and len(missing) <= 1 and steps == sorted(steps)


def test_a_job_that_gets_nowhere_is_given_up(slurm, scenes, tmp_path):
    """It is stopped before its first step, whenever it starts."""
    early = "cluster.setup=[export MASTER_ADDR=127.0.0.1 OMP_NUM_THREADS=1, kill -USR1 $$]"
    job = submit(slurm, tmp_path, arguments(scenes, tmp_path / "run", ALONE, early))
    slurm.wait(job, {"FAILED"}, restarts=5, seconds=600)
    said = [line for line in log_of(tmp_path / "run").splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and said[0].startswith("error: given up after 5 restarts without a new checkpoint or draft")
    assert stops(tmp_path / "run") == [0] * 5


def test_an_array_trains_each_seed_in_a_folder_of_its_own(slurm, scenes, tmp_path):
    """One of them is stopped and queued again, and the other one is not."""
    steps = ["trainer.max_steps=400", "trainer.limit_val_batches=0", ALONE]
    job = submit(slurm, tmp_path, arguments(scenes, tmp_path / "run", *steps, "cluster.seeds=[3,5]"))
    runs = {seed: tmp_path / f"run-seed{seed}" for seed in (3, 5)}
    until(lambda: all(has(run, "checkpoints/epoch=*")() for run in runs.values()), seconds=300)
    slurm.run("scancel", "--batch", "--signal=USR1", f"{job}_5")
    assert int(slurm.wait(f"{job}_5", {"COMPLETED"}, restarts=1, seconds=600)["Restarts"]) == 1
    assert int(slurm.wait(f"{job}_3", {"COMPLETED"}, seconds=600)["Restarts"]) == 0
    assert (stops(runs[3]), len(stops(runs[5]))) == ([], 1)
    assert all("400 steps done" in log_of(run) for run in runs.values())
    assert not same_weights(runs[3], runs[5])


def test_a_run_waits_for_the_one_that_makes_its_model(slurm, scenes, tmp_path):
    """Also while that is stopped and queued again; and for nothing when it fails. The folder's name is an odd one."""
    first, then, never = (tmp_path / "50% of mine" / name for name in ("first", "then", "never"))
    job = submit(slurm, tmp_path, arguments(scenes, first, "trainer.max_steps=200", ALONE))
    follow = [f"model={{target: src.models.hf.folder.from_pretrained, path: {first}/model}}", ALONE]
    follow = [argument for argument in arguments(scenes, then, *follow) if not argument.startswith("model.")]
    second = submit(slurm, tmp_path, [*follow, f"cluster.after={job}"])
    until(has(first, "checkpoints/epoch=*"), seconds=300)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.wait(job, {"RUNNING"}, restarts=1, seconds=300)
    assert slurm.job(second)["JobState"] == "PENDING" and slurm.job(second)["Reason"] == "Dependency"
    slurm.wait(job, {"COMPLETED"}, seconds=300)
    slurm.wait(second, {"COMPLETED"}, seconds=300)
    assert "16 steps done" in log_of(then)
    job = submit(slurm, tmp_path, arguments(scenes, never, ALONE, "cluster.extra=[--hold]"))
    other = submit(slurm, tmp_path, [*follow, f"run_dir={never}2", f"cluster.after={job}"])
    slurm.run("scancel", job)
    until(lambda: slurm.job(other)["JobState"] == "CANCELLED", seconds=60)
