"""Real processes of one training, for tests: a server that has imported everything forks the ranks of each job.

    with Ranks() as ranks:
        done = ranks.run(["conf=stage1", ...], world=2)      -> exit codes and the output of each rank
        ranks.run(argv, world=2, kill=[(1, "src.objectives.base:Objective.training_step", 3)])

The ranks find each other through environment variables, as under `srun` or `torchrun`. A kill is a SIGKILL right before
the n-th call (from 0) of one of our functions, or before the n-th `os.rename` of the process.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RENAME = "os.rename"
SERVER = "import sys; sys.path.insert(0, {root!r}); from tests.ranks import serve; serve()"
Kill = tuple[int, str, int]  # rank, function ("module:name") or RENAME, number of the call


@dataclass
class Done:
    """A finished job: exit code (negative: a signal) and output of each rank."""

    codes: list[int]
    printed: list[str]


class Ranks:
    """Context manager of the server."""

    def __enter__(self) -> Ranks:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-c", SERVER.format(root=str(ROOT))]
        pipe = subprocess.PIPE
        self._server = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True, cwd=ROOT)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=120)

    def run(
        self,
        argv: list[str],
        *,
        out: Path,
        verb: str = "train",
        world: int = 2,
        ranks: list[int] | None = None,
        kill: list[Kill] | None = None,
        environment: dict[str, str] | None = None,
        patches: list[str] | None = None,
        file_limit: dict[int, int] | None = None,
        timeout: float = 300.0,
    ) -> Done:
        """Run `src.VERB` on some ranks (None: all) of a world.

        out: folder for their output
        patches: functions "module:name" that each rank calls first
        file_limit: by rank, the bytes that no file may exceed, as if the disk were full
        timeout: seconds until the ranks are killed
        """
        assert self._server.stdin is not None and self._server.stdout is not None
        out.mkdir(parents=True, exist_ok=True)
        job = {
            "argv": argv, "verb": verb, "out": str(out), "world": world,
            "ranks": list(range(world)) if ranks is None else ranks,
            "kill": kill or [], "environment": environment or {}, "patches": patches or [],
            "limits": {str(rank): limit for rank, limit in (file_limit or {}).items()},
            "timeout": timeout,
        }  # fmt: skip
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        codes = json.loads(self._server.stdout.readline())
        return Done(codes, [(out / f"rank-{rank}.txt").read_text() for rank in job["ranks"]])


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def serve() -> None:
    """Run jobs until stdin ends. Forked ranks have everything imported, which takes most of the time of a start."""
    for name in ("src.train", "src.export", "src.models.tiny", "callbacks.samples", "callbacks.self_correction"):
        importlib.import_module(name)
    for name in ("callbacks.throughput", "src.experts.scenes", "src.objectives.refine", "src.objectives.proseco"):
        importlib.import_module(name)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_run(json.loads(line))) + "\n")
        sys.stdout.flush()


def _run(job: dict[str, Any]) -> list[int]:
    began, port = time.monotonic(), str(free_port())
    running = {_fork(job, rank, port): rank for rank in job["ranks"]}
    codes: dict[int, int] = {}
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() - began > job["timeout"]:
            for process in running:
                os.kill(process, signal.SIGKILL)
        else:
            time.sleep(0.02)
    return [codes[rank] for rank in job["ranks"]]


def _fork(job: dict[str, Any], rank: int, port: str) -> int:
    child = os.fork()
    if child:
        return child
    try:
        code = _rank(job, rank, port)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


_argv: list[str] = []  # arguments of this rank


def _rank(job: dict[str, Any], rank: int, port: str) -> int:
    """Run the verb as one rank. Returns its exit code."""
    file = os.open(Path(job["out"]) / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": job["world"], "NODE_RANK": 0}
    variables |= {"LOCAL_RANK": rank, **job["environment"]}
    os.environ.update({name: str(value) for name, value in variables.items()})
    if "TORCHELASTIC_RUN_ID" in os.environ:
        os.environ["RANK"] = str(rank)
    for killed_rank, function, number in job["kill"]:
        if killed_rank == rank:
            _kill_at(function, number)
    _argv.extend(job["argv"])
    for name in job["patches"]:
        module, _, function = name.partition(":")
        getattr(importlib.import_module(module), function)(rank)
    if limit := job["limits"].get(str(rank)):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    rank_zero_only.rank = rank
    try:
        importlib.import_module(f"src.{job['verb']}").main(job["argv"])
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def flawed(rank: int) -> None:
    """Patch: non-finite gradients on rank 1."""
    import src.objectives.base as base

    term_sum = base.term_sum
    if rank == 1:
        base.term_sum = lambda *arguments: term_sum(*arguments) * float("inf")


def stops_in_a_round(rank: int) -> None:
    """Patch: while rank 0 waits for the drafts of rank 1, rank 1 creates the STOP file of a batch job."""
    from src.rounds.drafts import Drafter

    os.environ["SLURM_PROCID"] = os.environ["SLURM_LOCALID"] = str(rank)
    draw = Drafter.draw

    def slow(*arguments: Any, **named: Any) -> Any:
        time.sleep(2)
        run_dir = next(argument for argument in _argv if argument.startswith("run_dir=")).removeprefix("run_dir=")
        (Path(run_dir) / "STOP").touch()
        time.sleep(4)
        return draw(*arguments, **named)

    if rank == 1:
        Drafter.draw = slow


def silent(rank: int) -> None:
    """Patch: an expert on rank 1 that never answers and cannot be cancelled."""
    from src.experts.scenes import ScenesExpert

    async def revise(self: Any, drafts: Any) -> Any:
        time.sleep(10**6)
        yield

    if rank == 1:
        ScenesExpert.revise = revise


def _kill_at(target: str, number: int) -> None:
    """Kill this process right before call `number` of a function, or of `os.rename`."""
    calls = iter(range(10**9))

    def count() -> None:
        if next(calls) == number:
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    if target == RENAME:
        sys.addaudithook(lambda event, _: count() if event == RENAME else None)
        return
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    function = getattr(owner, name)

    def counted(*arguments: Any, **named: Any) -> Any:
        count()
        return function(*arguments, **named)

    setattr(owner, name, counted)
