"""The folder of a training run: whether it may be used, whether it is the same run, where it goes on.

    with locked(run_dir):
        check_folder(cfg, run_dir)      refuses a folder that is no run's, and a run with other settings or inputs
        ...                             build everything
        begin(cfg, run_dir)             from here on the folder holds this run

Only what `OWN` names is ever removed, and nothing before the first step.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.cli.config import save_config
from src.cli.instantiate import one_line, plain
from src.distributed.checkpoints import is_whole, recover
from src.io.errors import UserError
from src.io.files import read_json, sha256, write_json
from src.io.hub import local_folder
from src.io.shards import INDEX
from src.models.hf.folder import fingerprint
from src.models.hf.weights import is_model_folder

ASIDE = ".replaced"  # in the folder of the run, what was there before
CONFIG, INPUTS, FINISHED, MODEL = "config.yaml", "inputs.json", "finished.json", "model"
OWN = (FINISHED, MODEL, "checkpoints", "rounds", "tensorboard", INPUTS, CONFIG)
# What a run may not change when it resumes; the learning rate's schedule spans `max_steps`.
FIXED = (
    *("data", "gap", "model", "objective", "seed", "tokenizer", "trainer.max_steps", "trainer.precision"),
    *(
        f"callbacks.self_correction.{name}"
        for name in (
            *("at_start", "drafts_per_round", "every_n_epochs", "expert"),
            *("rounds", "sampler", "tokens_per_step", "train_from"),
        )
    ),
)
# What it may change although it lies in these: how a step is computed, and what is checked where it matters.
FREE = (
    *("data.workers", "data.restart_epoch"),
    *(
        f"callbacks.self_correction.expert.{name}"
        for name in ("base_url", "key_env", "limits", "max_completion_tokens")
    ),
    *(f"objective.training.{name}" for name in ("sharding", "compile", "checkpointing", "micro_batch", "max_skipped")),
)
REMEDY = "give another run_dir, or resume=false to start it afresh"
log = logging.getLogger(__name__)


def check_folder(cfg: DictConfig, run_dir: Path) -> None:
    """Raise UserError where the folder is not this run's, or where `resume=false` would remove what the run reads."""
    if not run_dir.exists():
        return
    if not run_dir.is_dir():
        raise UserError(f"run_dir: {run_dir} is a file; name a folder")
    if not (run_dir / CONFIG).exists():
        if any(not item.name.startswith(".") for item in run_dir.iterdir()):
            raise UserError(f"{run_dir} is not a run's folder (no {CONFIG}): choose another run_dir")
        return
    old = _read_config(run_dir / CONFIG)
    if not {"model", "objective", "trainer", "run_dir"} <= set(old):
        raise UserError(f"{run_dir} is not a run's folder ({CONFIG} is of something else): choose another run_dir")
    if not cfg.resume:
        _check_outside(cfg, run_dir)
    elif is_finished(run_dir) or checkpoints(run_dir):
        _check_same(cfg, run_dir, old)


def begin(cfg: DictConfig, run_dir: Path) -> None:
    """Make the folder this run's. What `resume=false` replaces is put aside, until `forget` or `restore`."""
    if not cfg.resume:
        forget(run_dir)
        _move(run_dir, run_dir / ASIDE)
    run_dir.mkdir(parents=True, exist_ok=True)
    recover(run_dir / "checkpoints")
    save_config(OmegaConf.create({**cfg, "resume": True}), run_dir / CONFIG)  # repeating a run must not remove it
    if not checkpoints(run_dir):  # else they were compared, and weights take long to read
        write_json(run_dir / INPUTS, inputs(cfg))


def forget(run_dir: Path) -> None:
    """Remove what was put aside: training has begun."""
    shutil.rmtree(run_dir / ASIDE, ignore_errors=True)


def restore(run_dir: Path) -> None:
    """Take back what was put aside, if anything was: training could not begin."""
    if (run_dir / ASIDE).exists():
        for name in OWN:
            _remove(run_dir / name)
        _move(run_dir / ASIDE, run_dir)
        forget(run_dir)


def is_finished(run_dir: Path) -> bool:
    return (run_dir / FINISHED).exists()


def is_complete(run_dir: Path) -> bool:
    """Whether a run is finished and its model there. Raises UserError where it is gone, and no checkpoint left."""
    if not is_finished(run_dir) or is_model_folder(run_dir / MODEL):
        return is_finished(run_dir)
    if not checkpoints(run_dir):
        raise UserError(f"{run_dir} is finished, but holds neither its model nor a checkpoint; {REMEDY}")
    log.warning("%s is finished, but %s is gone: it is made again from the newest checkpoint", run_dir, MODEL)
    return False


def checkpoints(run_dir: Path) -> list[Path]:
    """The newest first, each once; before each online round one is written too."""
    found = [path for path in (run_dir / "checkpoints").glob("[!.]*.ckpt") if path.exists() and not path.is_symlink()]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def newest(run_dir: Path) -> Path | None:
    """The newest checkpoint that is whole."""
    found = checkpoints(run_dir)
    for number, path in enumerate(found, 1):
        if is_whole(path):
            return path
        older = found[number : number + 1]
        next_best = f"taking {older[0].name}, the one before it" if older else "no other is left: starting at step 0"
        log.warning("%s is damaged; %s", path, next_best)
    return None


def inputs(cfg: DictConfig) -> dict[str, str]:
    """Hashes of what the run reads: the weights it starts from and the index of its data, where they are there.

    The index of the training split is taken first, as it holds hashes of the shards.
    """
    found = {}
    model, data = (cfg[node].get("path") for node in ("model", "data"))
    if model:
        model = os.path.normpath(model)  # `run_dir/../stage1/model` has to be found before run_dir is made
        with suppress(ValueError):  # of a name on the hub that is not to be had: who builds the model says so
            model = local_folder(model)
    if model and is_model_folder(model):
        found["model.path"] = fingerprint(model)
    indexes = [Path(data, "train", INDEX), Path(data, INDEX)] if data else []
    if present := [index for index in indexes if index.is_file()]:
        found["data.path"] = sha256(present[0])
    return found


def _check_same(cfg: DictConfig, run_dir: Path, old: DictConfig) -> None:
    """Raise UserError if the run was made with other settings or from other files."""
    changed = [key for key in FIXED if _fixed(old, key) != _fixed(cfg, key)]
    if changed:
        raise UserError(f"{run_dir} holds a run with other settings ({', '.join(changed)}); {REMEDY}")
    record = run_dir / INPUTS
    known = read_json(record) if record.exists() else {}
    now = inputs(cfg)
    changed = [f"{key}={OmegaConf.select(cfg, key)}" for key in now if now[key] != known.get(key)]
    if changed:
        raise UserError(f"{run_dir} was trained from files that have changed since ({', '.join(changed)}); {REMEDY}")


def _fixed(cfg: DictConfig, key: str) -> Any:
    """What may not change under a key: its value without what is free."""
    value = plain(OmegaConf.select(cfg, key))
    for name in (name.removeprefix(f"{key}.") for name in FREE if name.startswith(f"{key}.")):
        *path, last = name.split(".")
        owner: Any = value
        for part in path:
            owner = owner.get(part) if isinstance(owner, dict) else None
        if isinstance(owner, dict):
            owner.pop(last, None)
    return value


def _check_outside(cfg: DictConfig, run_dir: Path) -> None:
    """Raise UserError where the run reads what `resume=false` would remove first."""
    keys = ("model.path", "data.path", "tokenizer")
    named: list[tuple[str, Any]] = [(key, OmegaConf.select(cfg, key)) for key in keys]
    named += [("data.rounds", path) for path in OmegaConf.select(cfg, "data.rounds") or ()]
    own = [(run_dir / name).resolve() for name in OWN]
    for key, path in named:
        if isinstance(path, str) and path and _is_within(Path(path).resolve(), own):
            raise UserError(f"{key}={path} is of {run_dir}, which resume=false would remove: copy it elsewhere first")


def _is_within(path: Path, folders: Iterable[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def _read_config(path: Path) -> DictConfig:
    try:
        found = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}; mend it, or choose another run_dir") from error
    if not isinstance(found, DictConfig):
        raise UserError(f"{path}: expected a mapping; mend it, or choose another run_dir")
    return found


def _move(source: Path, place: Path) -> None:
    """Move a run's own files; the config last, as without it the rest would be no run's."""
    place.mkdir(parents=True, exist_ok=True)
    for name in OWN:
        if (source / name).exists():
            (source / name).replace(place / name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


STOP, REQUEUE = "STOP", "REQUEUE"  # files in the run's folder: between a batch job and its processes
