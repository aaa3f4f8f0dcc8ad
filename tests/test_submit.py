"""Jobs without a Slurm: the text of the batch job, its shell logic in a real bash, what is checked and kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from src.cli.config import load_config
from src.submit import main
from src.training.slurm import CODE, Cluster, script
from testing.verbs import refusal
from tests.test_stop import ROOT, arguments

SIZES = {"nodes": 2, "gpus_per_node": 8, "cpus_per_task": 12, "time": "1-00:00:00", "stop_before": 600}
GOLDEN = r"""#!/bin/bash
# python -m src.submit conf=stage2,cluster/mine 'cluster.seeds=[1,4]'
#SBATCH --job-name=stage2
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=1-00:00:00
#SBATCH --array=1,4
#SBATCH --dependency=afterok:77
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --signal=B:USR1@600
#SBATCH --open-mode=append
#SBATCH --output='/data/my runs/stage2-seed%a/slurm-%A_%a.log'
#SBATCH --requeue
#SBATCH --constraint=h100

run='/data/my runs/stage2'-seed$SLURM_ARRAY_TASK_ID
job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
submitted_in=/home/me
python=/opt/venv/bin/python
cpus=12
grace=480  # seconds from the signal until the job is requeued anyway
setup() {
    module load cuda
}
"""
# Stand in for Slurm's programs: what a job would see of them.
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> {folder}/calls
case "$*" in
    *hostnames*) printf 'n7\\nn8\\n' ;;
    *show*) echo "JobId=7 JobState={state} PreemptTime={preempted}" ;;
    *) exit {refuses} ;;
esac
"""
SRUN = """#!/bin/bash
echo "srun $*" >> {folder}/calls
echo "$MASTER_ADDR $MASTER_PORT $PYTHONPATH $PYTHONSAFEPATH" >> {folder}/seen
touch {folder}/started
{body}
"""
UNTIL_STOPPED = """for _ in $(seq 200); do
    if [ -e {run}/STOP ]; then touch {run}/REQUEUE; exit 0; fi
    sleep 0.05
done
exit 9"""


def cluster(**more) -> Cluster:
    return Cluster(**{**SIZES, **more})


def test_the_job_is_the_golden_one(monkeypatch):
    monkeypatch.setattr(Path, "cwd", lambda: Path("/home/me"))
    options = {"partition": "gpu", "account": "lab", "mem": "0", "after": 77, "seeds": [1, 4]}
    options |= {"extra": ["--constraint=h100"], "setup": ["module load cuda"]}
    command = ["conf=stage2,cluster/mine", "cluster.seeds=[1,4]"]
    names = {"name": "stage2", "run_dir": Path("/data/my runs/stage2"), "python": "/opt/venv/bin/python"}
    text = script(cluster(**options), command=command, **names)
    assert text == GOLDEN + (ROOT / "src" / "training" / "job.sbatch").read_text()


class Job:
    """The batch job in a real bash, with stand-ins for srun and scontrol in front of PATH."""

    def __init__(self, folder: Path, body: str, *, stop_before: int = 600, env: dict | None = None, **answers) -> None:
        self.folder, self.run = folder, folder / "a run"
        self.run.mkdir(exist_ok=True)
        names = {"folder": folder, **{"state": "RUNNING", "preempted": "None", "refuses": 0, **answers}}
        text = {"srun": SRUN.format(body=body.format(run="'" + str(self.run) + "'"), **names)}
        text["scontrol"] = SCONTROL.format(**names)
        for name, content in text.items():
            (folder / name).write_text(content)
            (folder / name).chmod(0o755)
        resources = cluster(gpus_per_node=0, stop_before=stop_before)
        job = script(resources, name="job", run_dir=self.run, command=["conf=a"])
        env = {
            **(env or {}),
            "PATH": f"{folder}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "15042",
            "SLURM_JOB_NODELIST": "n[7-8]",
        }
        for name in ("STOP", "REQUEUE"):  # of an earlier job
            (self.run / name).touch()
        command = ["bash", "-c", job]
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 20
        while not (folder / "started").exists() and self.process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def done(self) -> tuple[int, str]:
        """Exit code and stderr."""
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors

    def requeued(self) -> bool:
        return "scontrol requeue 15042" in (self.folder / "calls").read_text().splitlines()


def test_a_signal_stops_the_processes_and_queues_the_job_again(tmp_path):
    job = Job(tmp_path, UNTIL_STOPPED)
    for _ in range(3):  # Slurm may send it more than once
        job.process.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
    assert job.done() == (0, "")
    assert job.requeued()
    called = (tmp_path / "calls").read_text().splitlines()
    train = f"-m src.train conf={job.run}/config.yaml"
    assert called[1] == f"srun --cpus-per-task=12 --kill-on-bad-exit=1 --wait=120 {sys.executable} {train}"
    assert (tmp_path / "seen").read_text() == f"n7 15042 {job.run}/code 1\n"


@pytest.mark.parametrize(
    ("code", "state", "preempted", "leaves", "again"),
    [
        (0, "RUNNING", "None", "", False),  # finished
        (1, "RUNNING", "None", "", False),  # failed
        (0, "RUNNING", "None", "touch {run}/REQUEUE", True),  # stopped by SIGTERM to the processes
        (143, "RUNNING", "2026-11-21T13:36:50", "", True),  # preempted before they could answer
        (0, "RUNNING", "2026-11-21T13:36:50", "", False),  # preempted, but finished
        (0, "COMPLETING", "None", "touch {run}/REQUEUE", False),  # cancelled on the way: not done, so it fails
    ],
)
def test_who_is_queued_again(tmp_path, code, state, preempted, leaves, again):
    job = Job(tmp_path, f"{leaves}\nexit {code}", state=state, preempted=preempted)
    assert job.done() == (0 if again else max(code, bool(leaves)), "")
    assert job.requeued() == again


def test_a_job_that_only_ever_starts_is_given_up(tmp_path):
    """Restarts that leave a checkpoint or a draft more are not counted, nor is one that is submitted again."""
    run, left = tmp_path / "a run", []
    for number in range(12):
        made = {2: "checkpoints/a.ckpt", 4: "rounds/.round-0001.partial/drafts/0.tar"}.get(number)
        body = "touch {run}/REQUEUE" + (f"; mkdir -p {{run}}/{Path(made).parent}; touch {{run}}/{made}" if made else "")
        hidden = "; mkdir -p {run}/checkpoints; echo x >>{run}/checkpoints/.half.tmp"  # a save that was cut short
        job = Job(tmp_path, body + hidden, env={"SLURM_RESTART_COUNT": str(number)})
        left.append(job.done())
        (tmp_path / "started").unlink(missing_ok=True)
        if left[-1][0]:
            break
    assert len(left) == 4 + 1 + 5 + 1  # the last with news, the one that sees them, five without, and that is enough
    assert left[:-1] == [(0, "")] * 10
    code, errors = left[-1]
    assert code == 1
    assert errors.startswith("error: given up after 5 restarts without a new checkpoint or draft: ")
    assert errors.count("\n") == 1
    assert Job(tmp_path, "exit 0").done() == (0, "")
    assert (run / ".restarts").read_text().startswith("0 ")


def test_a_job_that_slurm_does_not_queue_again_fails_and_says_so(tmp_path):
    job = Job(tmp_path, "touch {run}/REQUEUE", refuses=1)
    code, errors = job.done()
    assert code == 1
    assert errors == f"could not requeue the job; sbatch {job.run}/job.sbatch continues it\n"


def job_arguments(scenes: Path, run_dir: Path, *more: str) -> list[str]:
    sizes = ["cluster.nodes=1", "cluster.gpus_per_node=0", "trainer.devices=1", "trainer.accelerator=cpu"]
    conf, *rest = arguments(scenes, run_dir, *sizes, *more)
    return [f"{conf},cluster/example", *rest]


@pytest.fixture
def sbatch(tmp_path, monkeypatch) -> Path:
    """Stand-ins for sbatch and squeue; the folder they are in notes what they were called with."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in {"sbatch": "echo 42", "squeue": f"cat {folder}/queue 2>/dev/null"}.items():
        (folder / name).write_text(f'#!/bin/bash\necho "{name} $*" >> {folder}/calls\n{body}\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def finish(run: Path) -> None:
    """What is left of a run that is done, as far as `src.submit` looks."""
    (run / "finished.json").write_text("{}")
    (run / "model").mkdir()
    (run / "model" / "model.safetensors").touch()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("trainer.max_step=5", "error: unknown key 'trainer.max_step'; did you mean 'trainer.max_steps'?\n"),
        ("trainer.devices=2", "error: trainer.devices=2, but the job of this cluster has 1; set it to 1\n"),
        ("callbacks.stop=null", "error: no callback is callbacks.stop.SaveAndStop"),
    ],
)
def test_a_wrong_config_is_one_error_and_nothing_is_written(scenes, tmp_path, sbatch, capsys, more, message):
    error = refusal(main, job_arguments(scenes, tmp_path / "run", more), capsys)
    assert error.startswith(message) and error.count("\n") == 1
    assert not (tmp_path / "run").exists() and not (sbatch / "calls").exists()


def test_without_a_cluster_or_sbatch(scenes, tmp_path, monkeypatch, capsys):
    assert "conf=stage2,cluster/NAME" in refusal(main, arguments(scenes, tmp_path / "run"), capsys)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "no sbatch on this machine" in refusal(main, job_arguments(scenes, tmp_path / "run"), capsys)


def test_a_folder_of_another_run_is_refused(scenes, tmp_path, sbatch, capsys):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "thesis.tex").touch()
    assert "is not a run's folder" in refusal(main, job_arguments(scenes, run_dir), capsys)
    (run_dir / "thesis.tex").unlink()
    main(job_arguments(scenes, run_dir))
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints" / "epoch=0-step=6.ckpt").touch()
    error = refusal(main, job_arguments(scenes, run_dir, "objective.rate=0.3"), capsys)
    assert "holds a run with other settings (objective.rate: 0.1 in the run, 0.3 now)" in error


def test_a_run_waits_for_the_job_that_makes_its_model(scenes, tmp_path, sbatch, capsys):
    first, node = tmp_path / "first", '{target: src.models.hf.folder.from_pretrained, path: "PATH"}'
    beside = "${run_dir}/../first/model"  # as in conf/stage2.yaml, where run_dir is not there yet
    then = job_arguments(scenes, tmp_path / "then", f"model={node.replace('PATH', beside)}")
    then = [argument for argument in then if not argument.startswith("model.")]
    assert f"{first}/model" in refusal(main, then, capsys)
    error = refusal(main, [*then, "cluster.after=42"], capsys)
    assert f"nor a run that trains it ({first}/config.yaml): submit that run first" in error
    main(job_arguments(scenes, first))
    error = refusal(main, [*then, "cluster.after=42", "data.image_size=96"], capsys)
    assert "mean one tile of 96" in error  # against the model that is to come
    main([*then, "cluster.after=42"])
    script = (tmp_path / "then" / "job.sbatch").read_text()
    assert "#SBATCH --dependency=afterok:42\n" in script


def test_what_a_refused_job_was_to_replace_stays(scenes, tmp_path, sbatch, capsys):
    run_dir = tmp_path / "run"
    main(job_arguments(scenes, run_dir))
    finish(run_dir)
    (sbatch / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid account' >&2\nexit 1\n")
    error = refusal(main, job_arguments(scenes, run_dir, "resume=false", "objective.rate=0.3"), capsys)
    assert error == "error: sbatch refuses the job: sbatch: error: invalid account\n"
    assert (run_dir / "model" / "model.safetensors").exists() and (run_dir / "finished.json").exists()
    assert OmegaConf.select(load_config([f"conf={run_dir}/config.yaml"]), "objective.rate") != 0.3


def test_dry_prints_the_job_and_writes_nothing(scenes, tmp_path, capsys):
    main([*job_arguments(scenes, tmp_path / "run"), "dry=true"])
    text = capsys.readouterr().out
    assert text.startswith("#!/bin/bash\n# python -m src.submit conf=stage1,model/tiny,cluster/example ")
    assert "--gpus-per-node" not in text and "#SBATCH --nodes=1\n" in text
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_its_config_and_the_program(scenes, tmp_path, sbatch, capsys):
    run_dir = tmp_path / "run"
    main(job_arguments(scenes, run_dir, "resume=false"))
    assert capsys.readouterr().out == f"job 42 runs in {run_dir}\n"
    assert (sbatch / "calls").read_text() == f"sbatch --test-only\nsbatch --parsable {run_dir}/job.sbatch\n"
    saved = load_config([f"conf={run_dir}/config.yaml"])
    assert saved.resume is True  # the job that is queued again must not start afresh
    assert OmegaConf.select(saved, "trainer.num_nodes") == 1
    for name in CODE:
        assert {
            p.relative_to(ROOT) for p in (ROOT / name).rglob("*") if p.is_file() and "__pycache__" not in str(p)
        } == {p.relative_to(run_dir / "code") for p in (run_dir / "code" / name).rglob("*") if p.is_file()}
    assert (run_dir / "code" / "VERSION").read_text().startswith(("commit ", "no commit: "))
    (sbatch / "queue").write_text("42 RUNNING\n")
    assert "belongs to job 42, which is not done" in refusal(main, job_arguments(scenes, run_dir), capsys)


def test_the_job_runs_the_kept_program(scenes, tmp_path, sbatch):
    """As the job calls it, in the folder of another version of the program, which is also the installed one."""
    run_dir = tmp_path / "run"
    main(job_arguments(scenes, run_dir))
    changed = run_dir / "code" / "src" / "train.py"
    changed.write_text("print('the kept one')\n")
    env = {**os.environ, "PYTHONPATH": f"{run_dir}/code", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "src.train"], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout == "the kept one\n"


def test_seeds_get_folders_of_their_own_and_finished_ones_are_left_out(scenes, tmp_path, sbatch, capsys):
    argv = job_arguments(scenes, tmp_path / "run", "cluster.seeds=[1,4,6]")
    main(argv)
    runs = [tmp_path / f"run-seed{seed}" for seed in (1, 4, 6)]
    assert [load_config([f"conf={run}/config.yaml"]).seed for run in runs] == [1, 4, 6]
    assert [(run / "job.id").read_text() for run in runs] == ["42_1\n", "42_4\n", "42_6\n"]
    finish(runs[1])
    (sbatch / "calls").unlink()
    main(argv)
    assert f"sbatch --parsable --array=1,6 {runs[0]}/job.sbatch" in (sbatch / "calls").read_text()
    for run in (runs[0], runs[2]):
        finish(run)
    capsys.readouterr()
    main(argv)
    assert capsys.readouterr().out == "nothing submitted: already finished; resume=false starts over\n"
