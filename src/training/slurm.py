"""A training as a Slurm job: what it asks of the cluster, the batch script, and its submission.

    text = script(cluster, name=..., run_dir=..., command=argv)
    submit(text, runs, cluster)             writes each run's folder with the code as it is now, then calls sbatch

`src.submit` says what the job does at its time limit and when it is preempted.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from src.cli.config import path_of
from src.io.errors import UserError
from src.io.lock import locked
from src.training.run_dir import REQUEUE, STOP, begin, restore

CODE = ("src", "callbacks", "datamodules", "conf")
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d{1,2}){0,2})")
EARLY = 60  # seconds by which Slurm may send a signal before it is due (sbatch(1), --signal)
TRIES = 5  # restarts in a row that a job may get no further


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a job asks of Slurm; conf/cluster/example.yaml explains it.

    Raises UserError where Slurm would not take it, or would not stop the job in time.
    """

    nodes: int
    gpus_per_node: int
    cpus_per_task: int
    time: str
    stop_before: int
    partition: str | None = None
    account: str | None = None
    mem: str | None = None
    after: int | None = None
    seeds: Sequence[int] = ()
    extra: Sequence[str] = ()
    setup: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("nodes", "cpus_per_task", "stop_before"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.gpus_per_node < 0:
            raise UserError(f"gpus_per_node must be at least 0, got {self.gpus_per_node}")
        if self.stop_before + EARLY >= seconds(self.time):
            raise UserError(
                f"time={self.time} must be more than stop_before={self.stop_before} s and the {EARLY} s by which Slurm "
                "may be early"
            )
        if self.after is not None and self.after < 1:
            raise UserError(f"after must be the number of a job, got {self.after}")
        for name in ("partition", "account", "mem"):
            if (value := getattr(self, name)) is not None and not re.fullmatch(r"[\w.,:+-]+", value):
                raise UserError(f"{name} must be one word, got {value!r}")
        if len(set(self.seeds)) < len(self.seeds) or any(seed < 0 for seed in self.seeds):
            raise UserError(f"seeds must differ and be at least 0, got {list(self.seeds)}")
        if wrong := [line for line in self.extra if not line.startswith("--") or "\n" in line]:
            raise UserError(f"extra must hold options of sbatch that begin with --, got {wrong[0]!r}")

    @property
    def tasks_per_node(self) -> int:
        return max(1, self.gpus_per_node)


def script(cluster: Cluster, *, name: str, run_dir: Path, command: Sequence[str], python: str = sys.executable) -> str:
    """The batch job. run_dir: of the run, without the seed where there are several; command: what asks for it."""
    array = bool(cluster.seeds)
    log = "-seed%a/slurm-%A_%a.log" if array else "/slurm-%j.log"
    options = {
        "job-name": name,
        "partition": cluster.partition,
        "account": cluster.account,
        "nodes": cluster.nodes,
        "ntasks-per-node": cluster.tasks_per_node,
        "gpus-per-node": cluster.gpus_per_node or None,
        "cpus-per-task": cluster.cpus_per_task,
        "mem": cluster.mem,
        "time": cluster.time,
        "array": ",".join(map(str, cluster.seeds)) or None,  # the seed is the number in the array
        "dependency": cluster.after and f"afterok:{cluster.after}",
        "kill-on-invalid-dep": cluster.after and "yes",  # else it would wait for ever for one that failed
        "signal": f"B:USR1@{cluster.stop_before}",
        "open-mode": "append",  # a job that was queued again goes on in its log
        "output": str(run_dir).replace("%", "%%") + log,
    }
    lines = [f"--{key}={shlex.quote(str(value))}" for key, value in options.items() if value is not None]
    return JOB.format(
        command=" ".join(map(shlex.quote, command)).replace("\n", " "),  # stays a comment
        options="\n".join(f"#SBATCH {line}" for line in [*lines, "--requeue", *cluster.extra]),
        run=shlex.quote(str(run_dir)) + ("-seed$SLURM_ARRAY_TASK_ID" if array else ""),
        job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if array else "$SLURM_JOB_ID",
        here=shlex.quote(str(Path.cwd())),
        setup="".join(f"{line}\n" for line in cluster.setup),
        cpus=cluster.cpus_per_task,
        python=shlex.quote(python),
        stop=STOP,
        requeue=REQUEUE,
        patience=max(1, cluster.stop_before * 4 // 5),
        tries=TRIES,
    )


JOB = """\
#!/bin/bash
# python -m src.submit {command}
{options}

run={run}
job={job}
rm -f "$run/{stop}" "$run/{requeue}"
end=
trap 'touch "$run/{stop}"; end=${{end:-$((SECONDS + {patience}))}}' USR1  # all processes save a checkpoint and end

# How far it has come: its checkpoints, and what is drafted and answered. Given up if it only ever starts.
cd "$run" || exit
mark=$({{ find checkpoints -type f -not -path '*/.*' -printf '%p %T@\\n'; find rounds -type f -printf '%p %s\\n'; }} \\
    2>/dev/null | sort | cksum)
idle=0
[[ ${{SLURM_RESTART_COUNT:-0}} -gt 0 && -e .restarts ]] && read -r idle before <.restarts
[[ $mark == "$before" ]] && idle=$((idle + 1)) || idle=0
echo "$idle $mark" >.restarts
if [[ $idle -ge {tries} ]]; then
    echo "error: given up after {tries} restarts without a new checkpoint or draft: it needs a longer cluster.time," \\
        "a shorter cluster.stop_before, or checkpoints more often" >&2
    exit 1
fi

cd {here} || exit
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
while (: <>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do  # taken by somebody else
    MASTER_PORT=$((MASTER_PORT + 1))
done
{setup}export PYTHONPATH=$run/code PYTHONSAFEPATH=1  # the program as it was submitted, whatever has changed since

# One process that fails, or ends much earlier, ends all.
srun --cpus-per-task={cpus} --kill-on-bad-exit=1 --wait=120 \\
    {python} -m src.train conf="$run/config.yaml" &
while kill -0 $! 2>/dev/null; do
    sleep 1  # and not `wait`: a signal is answered after each second
    if [[ $end && $SECONDS -ge $end ]]; then  # not done in time: the newest checkpoint has to do
        scontrol requeue "$job"
        exit 1
    fi
done
wait $!
code=$?
# Go on later, unless the job was cancelled. Slurm may also have taken the nodes away before anything could be saved.
state=$(scontrol -o show job "$job")
if [[ $state == *JobState=RUNNING* && ( -e $run/{requeue} || ( $code != 0 && $state == *PreemptTime=2* ) ) ]]; then
    scontrol requeue "$job" && exit
    echo "could not queue the job again; sbatch $run/job.sbatch continues it" >&2
fi
[[ -e $run/{requeue} ]] && exit 1  # what waits for this job must not take it for done
exit $code
"""


def submit(text: str, runs: Sequence[DictConfig], cluster: Cluster) -> str:
    """Prepare the folders and call sbatch; returns what to tell the user. Raises UserError if it refuses."""
    if not shutil.which("sbatch"):
        raise UserError("there is no sbatch here: submit from a login node of the cluster, or use dry=true")
    if cluster.after and not _is_known(str(cluster.after)):
        raise UserError(f"cluster.after={cluster.after}: Slurm knows no such job; leave it out if that is done")
    folders = [path_of(cfg, "run_dir") for cfg in runs]
    with ExitStack() as held:
        for folder in folders:
            held.enter_context(locked(folder / "job.id"))
            if job := _job_of(folder):
                raise UserError(f"{folder} belongs to job {job}, which is not done; `scancel {job}` ends it")
        for cfg, folder in zip(runs, folders, strict=True):
            with locked(folder):  # as a training has it, which the job is to get
                begin(cfg, folder)
                keep_code(folder / "code")
                (folder / "job.sbatch").write_text(text, encoding="utf-8")
        array = [f"--array={','.join(str(cfg.seed) for cfg in runs)}"] if cluster.seeds else []
        command = ["sbatch", "--parsable", *array, str(folders[0] / "job.sbatch")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            for folder in folders:
                restore(folder)
            raise UserError(f"sbatch refuses the job: {' '.join(done.stderr.split())}")
        job = done.stdout.strip().partition(";")[0]
        for cfg, folder in zip(runs, folders, strict=True):
            (folder / "job.id").write_text(f"{job}_{cfg.seed}\n" if array else f"{job}\n", encoding="utf-8")
    return f"job {job} runs in {', '.join(map(str, folders))}\n"


def keep_code(folder: Path) -> None:
    """Copy the program, and note its version."""
    root, new = Path(__file__).resolve().parents[2], folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    for name in CODE:
        if (root / name).is_dir():
            shutil.copytree(root / name, new / name, ignore=shutil.ignore_patterns("__pycache__"))
    (new / "VERSION").write_text(_version(root), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def seconds(time: str) -> int:
    """Slurm's way to write a duration: minutes, mm:ss, hh:mm:ss, d-hh, d-hh:mm or d-hh:mm:ss."""
    found = TIME.fullmatch(time)
    if not found:
        raise UserError(f"time must be written as d-hh:mm:ss, hh:mm:ss, mm:ss or minutes, got {time!r}")
    parts = [int(part) for part in found["rest"].split(":")]
    if found["days"]:
        hours, minutes, rest = (*parts, 0, 0)[:3]
    else:
        hours, minutes, rest = {1: (0, *parts, 0), 2: (0, *parts), 3: tuple(parts)}[len(parts)]
    return ((int(found["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def _job_of(run_dir: Path) -> str | None:
    """The job that was submitted for a run, while Slurm has it queued or running."""
    known = run_dir / "job.id"
    if not known.exists():
        return None
    job = known.read_text(encoding="utf-8").strip()
    return job if _is_known(job) else None


def _is_known(job: str) -> bool:
    """Whether Slurm has a job queued or running."""
    found = subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True, check=False)
    return bool(found.stdout.strip())  # an error means that Slurm has forgotten it


def _version(root: Path) -> str:
    """The commit and the difference to it; where there is no git, only that."""

    def git(*arguments: str) -> str | None:
        try:
            command = ["git", "-C", str(root), *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return None

    top = git("rev-parse", "--show-toplevel")
    commit, diff = git("rev-parse", "HEAD"), git("diff", "HEAD", "--", *CODE)
    if top is None or commit is None or Path(top.strip()) != root:
        return "no commit: the program is not run from a git repository\n"
    return f"commit {commit}" + (f"\n{diff}" if diff else "")
