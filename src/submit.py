"""Submit a training run to Slurm: check the config, copy it and the code into the run folder, call sbatch.

    python -m src.submit conf=stage2,cluster/NAME [key=value ...] [dry=true]

    conf/cluster/NAME.yaml   resources of the job (conf/cluster/example.yaml)
    cluster.seeds=[0,1,2]    a job array, in RUN-seed0, RUN-seed1, ...
    cluster.after=JOB        start when that job is done; the model that it trains need not exist yet
    dry=true                 print the batch script, and write and submit nothing

    RUN/config.yaml          config of the job       RUN/job.sbatch    the script; `sbatch RUN/job.sbatch` resubmits it
    RUN/code/                copy of the code        RUN/slurm-ID.log  output of all processes
    RUN/code/VERSION         its commit and the diff to it

At the time limit, and when it is preempted, the job saves a checkpoint and is requeued; after a node failure it
continues from the newest checkpoint (docs/slurm.md). `scancel` ends it for good.
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
from src.cli.instantiate import build, check, nodes, plain, with_arguments
from src.io.errors import UserError
from src.models.hf.weights import is_model_folder
from src.training.build import OFFERS, STORED, check_trainer, rehearse
from src.training.run_dir import CONFIG, check_folder, check_format, is_complete
from src.training.slurm import script, submit

SAVES = "callbacks.stop.SaveAndStop"


@main_guard
def main(argv: list[str]) -> None:
    dry, argv = "dry=true" in argv, [argument for argument in argv if argument not in ("dry=true", "dry=false")]

    # 1. The config, and one more for each seed.
    cfg = _checked(argv)
    cluster, run_dir = build(cfg.cluster), path_of(cfg, "run_dir")
    runs = [_checked([*argv, f"seed={seed}", f"run_dir={run_dir}-seed{seed}"]) for seed in cluster.seeds] or [cfg]
    for run in runs:
        check_folder(run, path_of(run, "run_dir"))
    unfinished = [run for run in runs if not (run.resume and is_complete(path_of(run, "run_dir")))]

    # 2. All that can be built on this machine.
    if unfinished:
        model = _existing_model(plain(cfg.model), pending=cluster.after is not None)
        run = {**plain(unfinished[0]), "model": model}
        run = with_arguments(run, key_env=None) if dry else run  # the job asks its expert, and needs the key
        rehearse(OmegaConf.create(run), world=cluster.nodes * cluster.tasks_per_node)

    # 3. The job.
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
    cluster = build(cfg.cluster)
    for key, expected in {"num_nodes": cluster.nodes, "devices": cluster.tasks_per_node}.items():
        if (value := cfg.trainer.get(key, 1)) != expected and (key, value) != ("devices", "auto"):
            raise UserError(f"trainer.{key}={value}, but the job of this cluster has {expected}; set it to {expected}")
    if not any(node["target"] == SAVES for node in nodes(cfg.callbacks, "callbacks").values()):
        raise UserError(f"no callback is {SAVES}: the job would lose what it did since the last checkpoint")
    check_trainer(cfg)
    return cfg


def _existing_model(model: dict[str, Any], *, pending: bool) -> dict[str, Any]:
    """The model's node, checked to have weights.

    pending: an earlier job may still have to train it. For a missing RUN/model this is then the model that RUN starts
    from, which has the same layout.
    """
    while model["target"] == STORED:
        path = os.path.normpath(model["path"])  # resolves `run_dir/../stage1/model` before run_dir exists
        if Path(path).is_dir() and not is_model_folder(path):
            raise UserError(f"model.path: {path} holds no weights")
        if Path(path).exists() or not pending:
            return {**model, "path": path}
        source = Path(path).parent / CONFIG
        if not source.is_file():
            raise UserError(
                f"model.path={path} does not exist, nor a run that trains it ({source}): submit that run first"
            )
        initial = plain(OmegaConf.load(source).model)
        model = {**model, "path": initial["path"]} if initial["target"] == STORED else initial
    return model


if __name__ == "__main__":
    main()
