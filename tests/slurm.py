"""A real Slurm of two nodes on this machine, for tests: munged, slurmctld and two slurmd of Debian's packages, as root.

    with Slurm(folder) as slurm:                       partitions `low` (the default) and `high`, which preempts it
        slurm.run("sbatch", "job.sbatch")              a command with this Slurm's SLURM_CONF
        slurm.wait(job, {"RUNNING"}, seconds=60)

All its files are in `folder`; it does not touch another Slurm on the machine.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
DONE = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}
CONF = """\
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
JobRequeue=1
FirstJobId={first}
KillWait=5
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=4000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=4000
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF
"""


class Slurm:
    """Context manager of a cluster. folder: must not exist; needs a short path that all users may enter"""

    def __init__(self, folder: Path) -> None:
        self.folder, self.conf = folder, folder / "slurm.conf"
        self.env = {**os.environ, "SLURM_CONF": str(self.conf)}

    def __enter__(self) -> Slurm:
        self.folder.mkdir(mode=0o755)
        (self.folder / "state").mkdir()
        self.conf.write_text(
            CONF.format(folder=self.folder, ports=[free_port() for _ in range(3)], first=1 + secrets.randbelow(10000))
        )
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        files = {"key-file": key, "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
        files |= {"seed-file": "munged.seed"}
        try:
            self.run("munged", "--force", *(f"--{name}={self.folder / file}" for name, file in files.items()))
            self.run("slurmctld", "-c", "-f", str(self.conf))
            for node in ("n1", "n2"):
                self.run("slurmd", "-N", node, "-f", str(self.conf))
            until(lambda: len(self.run("sinfo", "-h", "-N", "-p", "low", "-t", "idle").splitlines()) == 2, seconds=30)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        quiet: dict = {"env": self.env, "capture_output": True, "text": True, "check": False}
        for state in ("PENDING", "RUNNING"):
            subprocess.run(["scancel", f"--state={state}"], **quiet)
        deadline = time.monotonic() + 30  # a running job would outlive its cluster
        while time.monotonic() < deadline and subprocess.run(["squeue", "-h"], **quiet).stdout:
            time.sleep(0.2)
        subprocess.run(["scontrol", "shutdown"], **quiet)
        time.sleep(1)
        for file in self.folder.glob("*.pid"):
            try:
                pid = int(file.read_text())
                os.kill(pid, signal.SIGKILL if "slurm" in file.name else signal.SIGTERM)
            except (ProcessLookupError, ValueError, FileNotFoundError):
                continue
            while (
                Path(f"/proc/{pid}").exists() and time.monotonic() < deadline + 10
            ):  # munged still writes while it exits
                time.sleep(0.1)

    def run(self, *command: str, **options) -> str:
        """The output of a command of the cluster; AssertionError if it fails."""
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=120, check=False, **options
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Slurm's fields of a job: JobState, Restarts, ExitCode, ..."""
        words = self.run("scontrol", "-o", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, states: Iterable[str], *, seconds: float, restarts: int = 0) -> dict[str, str]:
        """The job, once it is in one of `states` after at least `restarts`. AssertionError if it ends in another."""
        targets = set(states)

        def arrived() -> bool:
            job = self.job(number)
            if job["JobState"] in targets and int(job["Restarts"]) >= restarts:
                return True
            assert job["JobState"] not in DONE, job
            return False

        until(arrived, seconds=seconds)
        return self.job(number)


def until(condition, *, seconds: float) -> None:
    """Wait for a condition; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.2)


def missing() -> list[str]:
    """The programs that are not installed."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
