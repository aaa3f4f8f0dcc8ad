"""Submit a training run to Slurm: check the config, copy it and the code into the run folder, call sbatch.

    python -m src.submit conf=stage2,cluster/NAME [key=value ...] [dry=true]

    conf/cluster/NAME.yaml   resources of the job (conf/cluster/example.yaml)
    cluster.seeds=[0,1,2]    a job array, in RUN-seed0, RUN-seed1, ...
    cluster.after=JOB        start when that job is done; the model that it trains need not exist yet
    dry=true                 print the batch script, and write and submit nothing

    RUN/config.yaml          config of the job       RUN/job.sbatch    the script; `sbatch RUN/job.sbatch` resubmits it
    RUN/code/                copy of the code        RUN/slurm-ID.log  output of all processes
    RUN/code/VERSION         its commit and the diff to it

`cluster.stop_before` seconds before the time limit Slurm sends SIGUSR1 to the batch shell, which creates RUN/STOP. All
processes save a checkpoint at the end of the step, or stop drafting, and exit; rank 0 creates RUN/REQUEUE; the shell
requeues the job, which then continues. If they are not done after four fifths of that time, the shell requeues it
anyway. Preemption works the same (Slurm may send SIGTERM to the processes instead); after a node failure the job
continues from the newest checkpoint. A job that restarts repeatedly without progress is given up; `scancel` ends a job
for good.
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
from src.cli.help import NEEDS
from src.cli.instantiate import build, check, is_node, nodes, plain
from src.io.errors import UserError
from src.models.hf.weights import is_model_folder
from src.training.build import OFFERS, STORED, check_trainer, rehearse
from src.training.run_dir import CONFIG, check_folder, check_format, is_complete
from src.training.slurm import Cluster, script, submit

DRY = {"dry=true": True, "dry=false": False}
TARGET, SAVES = "src.training.slurm.Cluster", "callbacks.stop.SaveAndStop"
INTERACTIVE = ("bash", "interactive")  # job names that Lightning treats as an interactive session


@main_guard
def main(argv: list[str]) -> None:
    """Check the config of each run, prepare its folder, submit."""
    dry = any(DRY.get(argument, False) for argument in argv)
    argv = [argument for argument in argv if argument not in DRY]
    cfg = _checked(argv)
    cluster, run_dir = build(cfg.cluster), path_of(cfg, "run_dir")
    runs = [_checked([*argv, f"seed={seed}", f"run_dir={run_dir}-seed{seed}"]) for seed in cluster.seeds] or [cfg]
    unfinished = [run for run in runs if not _is_finished(run)]
    if unfinished:
        world = cluster.nodes * cluster.tasks_per_node
        _rehearse(unfinished[0], world=world, model_pending=cluster.after is not None)
    text = script(cluster, name=cfg.name, run_dir=run_dir.absolute(), command=argv)
    if dry:
        sys.stdout.write(text)
    elif not unfinished:
        sys.stdout.write("nothing submitted: already finished; resume=false starts over\n")
    else:
        sys.stdout.write(submit(text, unfinished, cluster))


def _checked(argv: Sequence[str]) -> DictConfig:
    """The config, checked like `src.train` does and against its cluster. Raises UserError."""
    cfg = load_config(argv, verb="src.submit", needs=NEEDS["src.submit"])
    if cfg.cluster is None:
        raise UserError("no cluster is set; conf=stage2,cluster/NAME reads conf/cluster/NAME.yaml")
    check_format(cfg)
    check(cfg, offers=OFFERS, sections=["callbacks"])
    if cfg.cluster.get("target") != TARGET:
        raise UserError(f"cluster.target must be {TARGET}, got {cfg.cluster.get('target')!r}")
    _check_processes(cfg, build(cfg.cluster))
    if cfg.plan.gpus is not None:
        raise UserError(f"plan.gpus={cfg.plan.gpus} prints a plan and trains nothing; use src.train for it")
    if cfg.name in INTERACTIVE:
        raise UserError(f"name={cfg.name}: Lightning treats a job of that name as interactive; choose another")
    if not any(node["target"] == SAVES for node in nodes(cfg.callbacks, "callbacks").values()):
        raise UserError(f"no callback is {SAVES}: the job would lose what it did since the last checkpoint")
    check_trainer(cfg)
    return cfg


def _check_processes(cfg: DictConfig, cluster: Cluster) -> None:
    """Raise UserError if the trainer expects other processes than the job starts, or cannot run that many."""
    for key, expected in {"num_nodes": cluster.nodes, "devices": cluster.tasks_per_node}.items():
        if (value := cfg.trainer.get(key, 1)) != expected and (key, value) != ("devices", "auto"):
            raise UserError(f"trainer.{key}={value}, but the job of this cluster has {expected}; set it to {expected}")
    if (processes := cluster.nodes * cluster.tasks_per_node) == 1:
        return
    strategy = plain(cfg.trainer).get("strategy", "auto")
    name = strategy["target"] if is_node(strategy) else str(strategy)
    if name != "auto" and not name.startswith(("ddp", "src.training.strategy.")):
        raise UserError(f"trainer.strategy: {processes} processes need parallel/ddp or parallel/fsdp2, got {name}")
    if is_node(strategy) and processes % (replicas := strategy.get("replicas", 1)):
        raise UserError(f"trainer.strategy.replicas={replicas} does not divide the {processes} processes")


def _rehearse(cfg: DictConfig, *, world: int, model_pending: bool) -> None:
    """Build what can be built on this machine, for `world` processes. Raises UserError.

    model_pending: whether an earlier job may still have to train the model
    """
    model = plain(cfg.model)
    if model["target"] == STORED:
        model["path"] = os.path.normpath(model["path"])  # resolves `run_dir/../stage1/model` before run_dir exists
    if model_pending:
        model = _initial_model(model)
    rehearse(OmegaConf.create({**cfg, "model": model}), world=world)
    if model["target"] == STORED and Path(model["path"]).is_dir() and not is_model_folder(model["path"]):
        raise UserError(f"model.path: {model['path']} holds no weights")


def _initial_model(model: dict[str, Any]) -> dict[str, Any]:
    """An existing model with the same layout: for a missing RUN/model, the one that RUN starts from.

    Raises UserError if there is no such run.
    """
    seen = set()
    while model["target"] == STORED and not Path(model["path"]).exists() and model["path"] not in seen:
        seen.add(model["path"])
        source = Path(model["path"]).parent / CONFIG
        if not source.is_file():
            raise UserError(
                f"model.path={model['path']} does not exist, nor a run that trains it ({source}): submit that run first"
            )
        initial = plain(OmegaConf.load(source).model)
        model = {**model, "path": os.path.normpath(initial["path"])} if initial["target"] == STORED else initial
    return model


def _is_finished(cfg: DictConfig) -> bool:
    """Whether there is nothing left to do. Raises UserError if the folder is not this run's."""
    run_dir = path_of(cfg, "run_dir")
    check_folder(cfg, run_dir)
    return cfg.resume and is_complete(run_dir)


if __name__ == "__main__":
    main()
