"""Hand a training to Slurm: check the config, keep it and the program with the run, write a batch job, submit it.

    python -m src.submit conf=stage2,cluster/NAME [key=value ...] [dry=true]

    conf/cluster/NAME.yaml   what the cluster needs (conf/cluster/example.yaml)
    cluster.seeds=[0,1,2]    an array of jobs, in RUN-seed0, RUN-seed1, ...
    cluster.after=JOB        start when that job is done; the model that it makes need not be there yet
    dry=true                 prints the job, and writes and submits nothing

    RUN/config.yaml          what the job runs           RUN/job.sbatch    the job; `sbatch RUN/job.sbatch` repeats it
    RUN/code/                the program as it is now    RUN/slurm-ID.log  what all its processes print
    RUN/code/VERSION         its commit, with what differs from it

Some time before the limit Slurm sends the batch shell SIGUSR1. The shell makes RUN/STOP; all processes save a
checkpoint at the end of the step, or leave off drafting, and end; rank 0 leaves RUN/REQUEUE; the shell queues the job
again, and it continues. If they are not done after four fifths of that time, the shell does so all the same. So it goes
when another job takes this one's place (Slurm may then send SIGTERM to the processes instead), and after the failure of
a node, from the newest checkpoint. A job that starts again and again without getting any further is given up; `scancel`
ends one for good.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.cli.config import load_config, path_of
from src.cli.entrypoint import main_guard
from src.cli.instantiate import build, check, is_node, nodes, plain
from src.io.errors import UserError
from src.models.hf.weights import is_model_folder
from src.training.build import OFFERS, STORED, check_stops, rehearse
from src.training.run_dir import CONFIG, check_folder, is_complete
from src.training.slurm import Cluster, script, submit

DRY = {"dry=true": True, "dry=false": False}
TARGET, SAVES = "src.training.slurm.Cluster", "callbacks.stop.SaveAndStop"
UNSEEN = ("bash", "interactive")  # names of jobs that Lightning does not take for one


@main_guard
def main(argv: list[str]) -> None:
    """Check, prepare the folder of each run, submit."""
    dry = any(DRY.get(argument, False) for argument in argv)
    argv = [argument for argument in argv if argument not in DRY]
    cfg = _checked(argv)
    cluster, run_dir = build(cfg.cluster), path_of(cfg, "run_dir")
    runs = [_checked([*argv, f"seed={seed}", f"run_dir={run_dir}-seed{seed}"]) for seed in cluster.seeds] or [cfg]
    waiting = [run for run in runs if _is_open(run)]
    if waiting:
        world = cluster.nodes * cluster.tasks_per_node
        _rehearse(waiting[0], world=world, waits=cluster.after is not None)
    text = script(cluster, name=cfg.name, run_dir=run_dir.absolute(), command=argv)
    if dry:
        sys.stdout.write(text)
    elif not waiting:
        sys.stdout.write("nothing submitted: finished already; resume=false would start it afresh\n")
    else:
        sys.stdout.write(submit(text, waiting, cluster))


def _checked(argv: Sequence[str]) -> DictConfig:
    """A config that `src.train` takes, and that its cluster can run."""
    cfg = load_config(argv, verb="src.submit", needs=["cluster", "objective", "trainer", "callbacks", "plan"])
    if cfg.cluster is None:
        raise UserError("no cluster is given; conf=stage2,cluster/NAME takes conf/cluster/NAME.yaml")
    check(cfg, offers=OFFERS, sections=["callbacks"])
    if cfg.cluster.get("target") != TARGET:
        raise UserError(f"cluster.target must be {TARGET}, got {cfg.cluster.get('target')!r}")
    _check_processes(cfg, build(cfg.cluster))
    if cfg.plan.gpus is not None:
        raise UserError(f"plan.gpus={cfg.plan.gpus} prints a plan and trains nothing; use src.train for it")
    if cfg.name in UNSEEN:
        raise UserError(f"name={cfg.name}: Lightning takes a job of that name for a session; choose another")
    if not any(node["target"] == SAVES for node in nodes(cfg.callbacks, "callbacks").values()):
        raise UserError(f"no callback is {SAVES}: the job would lose what it did since the last checkpoint")
    check_stops(cfg)
    return cfg


def _check_processes(cfg: DictConfig, cluster: Cluster) -> None:
    """Raise UserError where the trainer counts on other processes than the job starts, or cannot run so many."""
    for key, wanted in {"num_nodes": cluster.nodes, "devices": cluster.tasks_per_node}.items():
        if (found := cfg.trainer.get(key, 1)) != wanted and (key, found) != ("devices", "auto"):
            raise UserError(f"trainer.{key}={found}, but the job of this cluster has {wanted}; set it to that")
    if (processes := cluster.nodes * cluster.tasks_per_node) == 1:
        return
    strategy = plain(cfg.trainer).get("strategy", "auto")
    name = strategy["target"] if is_node(strategy) else str(strategy)
    if name != "auto" and not name.startswith(("ddp", "src.training.strategy.")):
        raise UserError(f"trainer.strategy: {processes} processes need parallel/ddp or parallel/fsdp2, got {name}")
    if is_node(strategy) and processes % (replicas := strategy.get("replicas", 1)):
        raise UserError(f"trainer.strategy.replicas={replicas} does not divide the {processes} processes")


def _rehearse(cfg: DictConfig, *, world: int, waits: bool) -> None:
    """Build what can be built here, for `world` processes. waits: the model may be one that a job is still to make."""
    model = plain(cfg.model)
    if model["target"] == STORED:
        model["path"] = os.path.normpath(model["path"])  # `run_dir/../stage1/model`, before there is run_dir
    if waits:
        model = _origin(model)
    rehearse(OmegaConf.create({**cfg, "model": model}), world=world)
    if model["target"] == STORED and Path(model["path"]).is_dir() and not is_model_folder(model["path"]):
        raise UserError(f"model.path: {model['path']} holds no weights")


def _origin(model: dict[str, Any]) -> dict[str, Any]:
    """The same model as long as it is not made: that from which the run starts that makes it, RUN/model."""
    known = set()
    while model["target"] == STORED and not Path(model["path"]).exists() and model["path"] not in known:
        known.add(model["path"])
        source = Path(model["path"]).parent / CONFIG
        if not source.is_file():
            raise UserError(
                f"model.path={model['path']} is not there, nor a run that would make it ({source}): submit that first"
            )
        made = plain(OmegaConf.load(source).model)
        model = {**model, "path": os.path.normpath(made["path"])} if made["target"] == STORED else made
    return model


def _is_open(cfg: DictConfig) -> bool:
    """Whether there is something left to do. Raises UserError where the folder is not this run's."""
    run_dir = path_of(cfg, "run_dir")
    check_folder(cfg, run_dir)
    return not (cfg.resume and is_complete(run_dir))


if __name__ == "__main__":
    main()
