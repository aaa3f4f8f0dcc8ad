"""A training run as a Slurm job: its resources, the batch script, and its submission.

    text = script(cluster, name=..., run_dir=..., command=argv)     options and paths, then job.sbatch as it stands
    submit(text, runs, cluster)             writes each run folder with a copy of the code, then calls sbatch

src/submit.py describes what the job does at its time limit and when it is preempted.
"""

from __future__ import annotations

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
from src.training.run_dir import begin

CODE = ("src", "callbacks", "datamodules", "conf")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Resources that a job requests from Slurm; conf/cluster/example.yaml documents each field."""

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

    @property
    def tasks_per_node(self) -> int:
        return max(1, self.gpus_per_node)


def script(cluster: Cluster, *, name: str, run_dir: Path, command: Sequence[str], python: str = sys.executable) -> str:
    """The batch script. run_dir: without the `-seedN` of an array; command: arguments of `src.submit`."""
    array = bool(cluster.seeds)
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
        "output": str(run_dir).replace("%", "%%") + ("-seed%a/slurm-%A_%a.log" if array else "/slurm-%j.log"),
    }
    options = [f"--{key}={shlex.quote(str(value))}" for key, value in options.items() if value is not None]
    lines = [
        "#!/bin/bash",
        "# python -m src.submit " + " ".join(map(shlex.quote, command)).replace("\n", " "),  # stays a comment
        *(f"#SBATCH {option}" for option in [*options, "--requeue", *cluster.extra]),
        "",
        f"run={shlex.quote(str(run_dir))}" + ("-seed$SLURM_ARRAY_TASK_ID" if array else ""),
        "job=" + ("${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if array else "$SLURM_JOB_ID"),
        f"submitted_in={shlex.quote(str(Path.cwd()))}",
        f"python={shlex.quote(python)}",
        f"cpus={cluster.cpus_per_task}",
        f"grace={max(1, cluster.stop_before * 4 // 5)}  # seconds from the signal until the job is requeued anyway",
        "setup() {",
        *(f"    {line}" for line in cluster.setup or [":"]),
        "}",
    ]
    return "\n".join(lines) + "\n" + Path(__file__).with_name("job.sbatch").read_text(encoding="utf-8")


def submit(text: str, runs: Sequence[DictConfig], cluster: Cluster) -> str:
    """Write the run folders and call sbatch; returns a message for the user. Raises UserError if sbatch refuses."""
    if not shutil.which("sbatch"):
        raise UserError("no sbatch on this machine: submit from a login node of the cluster, or use dry=true")
    folders = [path_of(cfg, "run_dir") for cfg in runs]
    with ExitStack() as locks:
        for folder in folders:
            locks.enter_context(locked(folder / "job.id"))
            job = (folder / "job.id").read_text(encoding="utf-8").strip() if (folder / "job.id").exists() else ""
            command = ["squeue", "-h", "-j", job]  # it fails for a job that Slurm has forgotten
            if job and subprocess.run(command, capture_output=True, check=False).stdout.strip():
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


def keep_code(folder: Path) -> None:
    """Copy the code into `folder`, with its git commit and the diff to it in VERSION."""
    root, new = Path(__file__).resolve().parents[2], folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    for name in CODE:
        if (root / name).is_dir():
            shutil.copytree(root / name, new / name, ignore=shutil.ignore_patterns("__pycache__"))
    version = "no commit: the code is not in a git repository\n"
    if (root / ".git").exists() and shutil.which("git"):
        version = ""
        for command in (["show", "--no-patch", "--format=commit %H", "HEAD"], ["diff", "HEAD", "--", *CODE]):
            git = ["git", "-C", str(root), *command]
            version += subprocess.run(git, capture_output=True, text=True, check=True).stdout
    (new / "VERSION").write_text(version, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def _sbatch(*arguments: str, text: str | None = None) -> str:
    """The output of sbatch. text: the script, if no argument names it"""
    result = subprocess.run(["sbatch", *arguments], input=text, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"sbatch refuses the job: {' '.join(result.stderr.split())}")
    return result.stdout
