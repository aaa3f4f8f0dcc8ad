"""A training run as a Slurm job: its resources, the batch script, and its submission.

    text = script(cluster, name=..., run_dir=..., command=argv)
    submit(text, runs, cluster)             writes each run folder with a copy of the code, then calls sbatch

src/submit.py describes what the job does at its time limit and when it is preempted.
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
from src.training.run_dir import REQUEUE, STOP, begin

CODE = ("src", "callbacks", "datamodules", "conf")
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<time>\d+(?::\d{1,2}){0,2})")
EARLY = 60  # seconds by which Slurm may send a signal early (sbatch(1), --signal)
MAX_IDLE_RESTARTS = 5  # restarts in a row without a new checkpoint, draft or answer


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Resources that a job requests from Slurm; conf/cluster/example.yaml documents each field.

    Raises UserError for values that Slurm would reject, or with which the job could not stop in time.
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
                f"time={self.time} must be more than stop_before={self.stop_before} s and the {EARLY} s by which "
                "Slurm may be early"
            )
        if self.after is not None and self.after < 1:
            raise UserError(f"after must be a job id, got {self.after}")
        for name in ("partition", "account", "mem"):
            if (value := getattr(self, name)) is not None and not re.fullmatch(r"[\w.,:+-]+", value):
                raise UserError(f"{name} must be one word, got {value!r}")
        if len(set(self.seeds)) < len(self.seeds) or any(seed < 0 for seed in self.seeds):
            raise UserError(f"seeds must differ and be at least 0, got {list(self.seeds)}")
        if invalid := [line for line in self.extra if not line.startswith("--") or "\n" in line]:
            raise UserError(f"extra must hold options of sbatch that begin with --, got {invalid[0]!r}")

    @property
    def tasks_per_node(self) -> int:
        return max(1, self.gpus_per_node)


def script(cluster: Cluster, *, name: str, run_dir: Path, command: Sequence[str], python: str = sys.executable) -> str:
    """The batch script. run_dir: without the `-seedN` of an array; command: arguments of `src.submit`."""
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
        "array": ",".join(map(str, cluster.seeds)) or None,  # the array index is the seed
        "dependency": cluster.after and f"afterok:{cluster.after}",
        "kill-on-invalid-dep": cluster.after and "yes",  # otherwise it would wait forever for a failed job
        "signal": f"B:USR1@{cluster.stop_before}",
        "open-mode": "append",  # a requeued job appends to its log
        "output": str(run_dir).replace("%", "%%") + log,
    }
    lines = [f"--{key}={shlex.quote(str(value))}" for key, value in options.items() if value is not None]
    return JOB.format(
        command=" ".join(map(shlex.quote, command)).replace("\n", " "),  # stays a comment
        options="\n".join(f"#SBATCH {line}" for line in [*lines, "--requeue", *cluster.extra]),
        run=shlex.quote(str(run_dir)) + ("-seed$SLURM_ARRAY_TASK_ID" if array else ""),
        job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if array else "$SLURM_JOB_ID",
        cwd=shlex.quote(str(Path.cwd())),
        setup="".join(f"{line}\n" for line in cluster.setup),
        cpus=cluster.cpus_per_task,
        python=shlex.quote(python),
        stop=STOP,
        requeue=REQUEUE,
        grace=max(1, cluster.stop_before * 4 // 5),
        max_idle=MAX_IDLE_RESTARTS,
    )


JOB = """\
#!/bin/bash
# python -m src.submit {command}
{options}

run={run}
job={job}
rm -f "$run/{stop}" "$run/{requeue}"
end=
trap 'touch "$run/{stop}"; end=${{end:-$((SECONDS + {grace}))}}' USR1  # all processes save a checkpoint and end

# Progress is a new checkpoint, draft or answer. Give up after several restarts without any.
cd "$run" || exit
mark=$({{ find checkpoints -type f -not -path '*/.*' -printf '%p %T@\\n'; find rounds -type f -printf '%p %s\\n'; }} \\
    2>/dev/null | sort | cksum)
idle=0
[[ ${{SLURM_RESTART_COUNT:-0}} -gt 0 && -e .restarts ]] && read -r idle before <.restarts
[[ $mark == "$before" ]] && idle=$((idle + 1)) || idle=0
echo "$idle $mark" >.restarts
if [[ $idle -ge {max_idle} ]]; then
    echo "error: given up after {max_idle} restarts without a new checkpoint or draft: set a longer cluster.time," \\
        "a shorter cluster.stop_before, or save checkpoints more often" >&2
    exit 1
fi

cd {cwd} || exit
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
while (: <>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do  # in use
    MASTER_PORT=$((MASTER_PORT + 1))
done
{setup}export PYTHONPATH=$run/code PYTHONSAFEPATH=1  # the code as it was submitted

# A process that fails, or ends two minutes before the others, ends all.
srun --cpus-per-task={cpus} --kill-on-bad-exit=1 --wait=120 \\
    {python} -m src.train conf="$run/config.yaml" &
while kill -0 $! 2>/dev/null; do
    sleep 1  # not `wait`: the trap runs only between commands
    if [[ $end && $SECONDS -ge $end ]]; then  # not done in time: continue from the newest checkpoint
        scontrol requeue "$job"
        exit 1
    fi
done
wait $!
code=$?
# Requeue, unless the job was cancelled. A preempted job may have lost its nodes before it could save.
state=$(scontrol -o show job "$job")
if [[ $state == *JobState=RUNNING* && ( -e $run/{requeue} || ( $code != 0 && $state == *PreemptTime=2* ) ) ]]; then
    scontrol requeue "$job" && exit
    echo "could not requeue the job; sbatch $run/job.sbatch continues it" >&2
fi
[[ -e $run/{requeue} ]] && exit 1  # the run is not finished: dependent jobs must not start
exit $code
"""


def submit(text: str, runs: Sequence[DictConfig], cluster: Cluster) -> str:
    """Write the run folders and call sbatch; returns a message for the user. Raises UserError if sbatch refuses."""
    if not shutil.which("sbatch"):
        raise UserError("no sbatch on this machine: submit from a login node of the cluster, or use dry=true")
    if cluster.after and not _is_active(str(cluster.after)):
        raise UserError(
            f"cluster.after={cluster.after}: no such job is queued or running; leave it out if that is done"
        )
    folders = [path_of(cfg, "run_dir") for cfg in runs]
    with ExitStack() as locks:
        for folder in folders:
            locks.enter_context(locked(folder / "job.id"))
            if job := _job_of(folder):
                raise UserError(f"{folder} belongs to job {job}, which is not done; `scancel {job}` ends it")
        array = [f"--array={','.join(str(cfg.seed) for cfg in runs)}"] if cluster.seeds else []
        if not all(cfg.resume for cfg in runs):  # what `begin` removes must not be lost to a wrong account
            _sbatch("--test-only", *array, text=text)
        for cfg, folder in zip(runs, folders, strict=True):
            with locked(folder):  # a training outside Slurm may hold it
                begin(cfg, folder)
                keep_code(folder / "code")
                (folder / "job.sbatch").write_text(text, encoding="utf-8")
        job = _sbatch("--parsable", *array, str(folders[0] / "job.sbatch")).strip().partition(";")[0]
        for cfg, folder in zip(runs, folders, strict=True):
            (folder / "job.id").write_text(f"{job}_{cfg.seed}\n" if array else f"{job}\n", encoding="utf-8")
    return f"job {job} runs in {', '.join(map(str, folders))}\n"


def _sbatch(*arguments: str, text: str | None = None) -> str:
    """The output of sbatch. text: the script, if no argument names it. Raises UserError if sbatch refuses the job."""
    result = subprocess.run(["sbatch", *arguments], input=text, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"sbatch refuses the job: {' '.join(result.stderr.split())}")
    return result.stdout


def keep_code(folder: Path) -> None:
    """Copy the code into `folder`, with its version."""
    root, new = Path(__file__).resolve().parents[2], folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    for name in CODE:
        if (root / name).is_dir():
            shutil.copytree(root / name, new / name, ignore=shutil.ignore_patterns("__pycache__"))
    (new / "VERSION").write_text(_version(root), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def seconds(time: str) -> int:
    """Seconds of a duration in Slurm's format: minutes, mm:ss, hh:mm:ss, d-hh, d-hh:mm or d-hh:mm:ss.

    Raises UserError for any other format.
    """
    match = TIME.fullmatch(time)
    if not match:
        raise UserError(f"time must be written as d-hh:mm:ss, hh:mm:ss, mm:ss or minutes, got {time!r}")
    parts = [int(part) for part in match["time"].split(":")]
    if match["days"]:
        hours, minutes, secs = (*parts, 0, 0)[:3]
    else:
        hours, minutes, secs = {1: (0, *parts, 0), 2: (0, *parts), 3: tuple(parts)}[len(parts)]
    return ((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + secs


def _job_of(run_dir: Path) -> str | None:
    """The id of the queued or running job of a run, None without one."""
    file = run_dir / "job.id"
    if not file.exists():
        return None
    job = file.read_text(encoding="utf-8").strip()
    return job if _is_active(job) else None


def _is_active(job: str) -> bool:
    """Whether a job is queued or running."""
    result = subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True, check=False)
    return bool(result.stdout.strip())  # squeue fails for a job that Slurm has forgotten


def _version(root: Path) -> str:
    """The git commit and the diff to it, or a line saying that there is none."""

    def git(*arguments: str) -> str | None:
        try:
            command = ["git", "-C", str(root), *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return None

    top = git("rev-parse", "--show-toplevel")
    commit, diff = git("rev-parse", "HEAD"), git("diff", "HEAD", "--", *CODE)
    if top is None or commit is None or Path(top.strip()) != root:
        return "no commit: the code is not in a git repository\n"
    return f"commit {commit}" + (f"\n{diff}" if diff else "")
