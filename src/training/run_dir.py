"""The run folder: whether a run may use it, whether it holds the same run, and the checkpoint to resume from.

    with locked(run_dir):
        check_folder(cfg, run_dir)      refuses a folder that is not a run's, and a run with other settings or inputs
        ...                             build everything
        begin(cfg, run_dir)             from here on the folder holds this run
        newest_checkpoint(run_dir)      to resume from

Only names in `OWN` are ever removed, by `begin` with `resume=false`.
"""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.cli.config import save_config
from src.cli.instantiate import one_line, plain
from src.distributed.checkpoints import is_intact, remove
from src.io.errors import UserError
from src.io.files import FORMAT, read_json, sha256, write_json
from src.io.hub import local_folder
from src.io.remote import is_url, join, locate
from src.io.settings import changes
from src.io.shards import INDEX
from src.models.hf.folder import fingerprint
from src.models.hf.weights import is_model_folder
from src.training.board import EVENTS

STOP, REQUEUE = "STOP", "REQUEUE"  # files in the run folder, between a batch job and its processes
CONFIG, INPUTS, FINISHED, MODEL = "config.yaml", "inputs.json", "finished.json", "model"
OWN = (FINISHED, MODEL, "checkpoints", "rounds", EVENTS, INPUTS, CONFIG)  # patterns
LOOP = "callbacks.self_correction"
# Settings that must not change on resume. `max_steps` is one: the learning rate schedule spans it.
FIXED = (
    *("data", "gap", "model", "objective", "optim", "seed", "tokenizer", "trainer.max_steps", "trainer.precision"),
    "callbacks.ema",
    *(f"{LOOP}.{name}" for name in ("at_start", "drafts_per_round", "every_n_epochs", "expert", "rounds", "sampler")),
    *(f"{LOOP}.{name}" for name in ("tokens_per_step", "train_from")),
)
# Settings below these that may change: how a step is computed, and what is checked where it is used.
FREE = (
    *("data.workers", "data.max_skipped", "data.cache", "callbacks.ema.use_for"),
    *(f"{LOOP}.expert.{name}" for name in ("base_url", "key_env", "limits", "max_completion_tokens")),
    *(f"optim.{name}" for name in ("sharding", "compile", "checkpointing", "micro_batch", "max_skipped")),
)
REMEDY = "set another run_dir, or resume=false to start over"
log = logging.getLogger(__name__)


def check_format(cfg: DictConfig) -> None:
    """Raise UserError for the saved config of a run that another version wrote."""
    if cfg.get("format") != FORMAT:
        raise UserError(
            f"this config has format {cfg.get('format', 1)}, this version reads format {FORMAT}: train the run again "
            "from today's configurations, as in `python -m src.train conf=NAME run_dir=NEW key=value`"
        )


def check_folder(cfg: DictConfig, run_dir: Path) -> None:
    """Raise UserError if the folder is not this run's, or if `resume=false` would remove inputs of the run."""
    if not run_dir.exists():
        return
    if not run_dir.is_dir():
        raise UserError(f"run_dir: {run_dir} is a file; name a folder")
    if not (run_dir / CONFIG).exists():
        if any(not item.name.startswith(".") for item in run_dir.iterdir()):
            raise UserError(f"{run_dir} is not a run's folder (no {CONFIG}): choose another run_dir")
        return
    old = read_config(run_dir)
    if cfg.resume and old.get("format") != FORMAT:
        raise UserError(f"{run_dir} holds a run of format {old.get('format', 1)}, not {FORMAT}; {REMEDY}")
    if cfg.resume and ((run_dir / FINISHED).exists() or checkpoints(run_dir)):
        _check_same(cfg, run_dir, old)
    if not cfg.resume:
        names = [(key, OmegaConf.select(cfg, key)) for key in ("model.path", "data.path", "tokenizer")]
        names += [("data.rounds", path) for path in OmegaConf.select(cfg, "data.rounds") or ()]
        own = [(run_dir / name).resolve() for name in OWN]
        for key, path in names:
            if isinstance(path, str) and path and any(Path(path).resolve().is_relative_to(folder) for folder in own):
                raise UserError(f"{key}={path} is in {run_dir}, which resume=false would remove: copy it first")


def begin(cfg: DictConfig, run_dir: Path) -> None:
    """Write the config and the input hashes of this run into the folder. `resume=false` first removes the old run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    leftovers = list((run_dir / "checkpoints").glob(".*.tmp"))  # of a save that was killed
    for path in leftovers if cfg.resume else [path for name in OWN for path in run_dir.glob(name)]:
        remove(path)
    if not SLURMEnvironment.detect():  # in a Slurm job the batch script removes it
        (run_dir / STOP).unlink(missing_ok=True)
    save_config(OmegaConf.create({**cfg, "resume": True}), run_dir / CONFIG)  # rerunning it must not remove the run
    if not checkpoints(run_dir):  # otherwise `check_folder` compared them, and hashing weights is slow
        write_json(run_dir / INPUTS, inputs(cfg))


def is_complete(run_dir: Path) -> bool:
    """Whether a run is finished and has its model; without the model it continues from its newest checkpoint."""
    return (run_dir / FINISHED).exists() and is_model_folder(run_dir / MODEL)


def checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints of the run, newest first, without links."""
    paths = [path for path in (run_dir / "checkpoints").glob("[!.]*.ckpt") if path.exists() and not path.is_symlink()]
    return sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint that is not damaged. None: training starts at step 0."""
    for path in checkpoints(run_dir):
        if is_intact(path):
            log.info("resuming from %s", path.name)
            return path
        log.warning("%s is damaged; looking for the one before it", path)
    return None


def inputs(cfg: DictConfig) -> dict[str, str]:
    """Hashes of the initial weights and of the data index, where these exist.

    NOTE: the index of the training split comes first, as it holds hashes of the shards.
    """
    hashes = {}
    model, data = (cfg[node].get("path") for node in ("model", "data"))
    if model:
        model = os.path.normpath(model)  # resolves `run_dir/../stage1/model` before run_dir exists
        with suppress(ValueError):  # a hub name that cannot be downloaded: building the model reports it
            model = local_folder(model)
    if model and is_model_folder(model):
        hashes["model.path"] = fingerprint(model)
    indexes = [Path(data, "train", INDEX), Path(data, INDEX)] if data else []
    if data and is_url(data):
        with suppress(ValueError):  # building the data reports it
            hashes["data.path"] = hashlib.sha256(locate(join(data, "train"), INDEX).read_bytes()).hexdigest()
    elif index := next((index for index in indexes if index.is_file()), None):
        hashes["data.path"] = sha256(index)
    return hashes


def _check_same(cfg: DictConfig, run_dir: Path, old: DictConfig) -> None:
    if changed := changes(fixed_settings(old), fixed_settings(cfg), "in the run"):
        longer = ""
        if old.trainer.max_steps < cfg.trainer.max_steps:  # the learning rate was planned for those
            longer = f". To train its model for more steps: run_dir=NEW model=trained model.path={run_dir / MODEL}"
        raise UserError(f"{run_dir} holds a run with other settings ({changed}); {REMEDY}{longer}")
    recorded = read_json(run_dir / INPUTS) if (run_dir / INPUTS).exists() else {}
    current = inputs(cfg)
    names = {key: f"hash of {key}={OmegaConf.select(cfg, key)}" for key in current}
    before, now = ({name: str(of.get(key))[:12] for key, name in names.items()} for of in (recorded, current))
    if changed := changes(before, now, "in the run"):
        raise UserError(f"{run_dir} was trained from files that have changed since ({changed}); {REMEDY}")


def fixed_settings(cfg: DictConfig) -> dict[str, Any]:
    """The values of the keys in FIXED, without the settings in FREE."""
    settings = OmegaConf.create(plain(cfg))
    for key in FREE:
        parent, _, name = key.rpartition(".")
        if isinstance(node := OmegaConf.select(settings, parent), DictConfig):
            node.pop(name, None)
    return {key: plain(OmegaConf.select(settings, key)) for key in FIXED}


def read_config(run_dir: Path) -> DictConfig:
    """The config that a run saved. Raises UserError if it cannot be read or is no training config."""
    path = run_dir / CONFIG
    try:
        cfg = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}; fix it, or choose another run_dir") from error
    if not isinstance(cfg, DictConfig) or not {"model", "objective", "trainer", "run_dir"} <= set(cfg):
        raise UserError(f"{path} is no training config, so {run_dir} is not a run's folder: choose another run_dir")
    return cfg
