"""Train: build the data, the objective and its callbacks from a config, fit, and write a model folder.

    python -m src.train conf=mask
    python -m src.train conf=stage2 seed=1 trainer.max_steps=500 resume=false
    python -m src.train conf=runs/stage1/config.yaml run_dir=runs/again
    python -m src.train conf=stage1 plan.gpus=8         prints what memory it takes, and trains nothing

    RUN/config.yaml      repeats the run          RUN/checkpoints/  to resume from
    RUN/inputs.json      hashes of what it reads  RUN/model/        the result, written last
    RUN/tensorboard/     logs                     RUN/rounds/       online rounds (Stage II)

A rerun of the same command resumes where the run stopped, and does nothing when it is finished; `resume=false` removes
what is there and starts afresh. A rerun with other settings, or after a change of the model it starts from or of its
data, is refused. SIGTERM and Ctrl-C save a checkpoint at the end of the step first (exit code 143 and 130), a second
one does not wait.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from datamodules.shards import Sample
from src.batch import Batch
from src.components import ConfigError, build, check
from src.config import load_config, main_guard, save_config
from src.hub import local_folder
from src.models.checkpoint import fingerprint, save_pretrained
from src.models.weights import is_model_folder
from src.plan import measure
from src.rounds import EmptyRound
from src.shards import INDEX, sha256, write_json
from src.stop import Stop, Stopped
from src.tiling import check_layout
from src.tokenizer import Codec

OFFERS = ("backbone", "codec", "run_dir", "seed", "special", "stop")
# What a run may not change when it resumes; the learning rate's schedule spans `max_steps`.
FIXED = (
    *("data", "model", "objective", "seed", "tokenizer", "trainer.max_steps", "trainer.precision"),
    *(
        f"callbacks.self_correction.{name}"
        for name in ("at_start", "drafts_per_round", "every_n_epochs", "expert", "rounds", "sampler", "tokens_per_step")
    ),
)
SIGNALLED = 128  # exit code of a program that a signal ended, without the number of the signal
MISTAKES = (ValueError, MisconfigurationException)
log = logging.getLogger(__name__)


@main_guard
def main(argv: list[str]) -> None:
    """Train as the config says, or plan what memory it takes."""
    cfg = load_config(argv, verb="src.train", needs=["objective", "trainer", "callbacks", "plan"])
    check(cfg, offers=OFFERS, sections=["callbacks"])
    if cfg.plan.gpus:
        sys.stdout.write(plan(cfg))
    else:
        train(cfg)


def train(cfg: DictConfig) -> None:
    """Build everything, fit from the last checkpoint if there is one, and export the model."""
    run_dir = Path(cfg.run_dir)
    _quiet()
    try:
        if not _open_run(cfg, run_dir):
            log.info("%s is finished already; resume=false would start it afresh", run_dir)
            return
        L.seed_everything(cfg.seed, verbose=False)
        codec = Codec.load(cfg.tokenizer)
        stop, began = Stop(), Event()
        offers = {"codec": codec, "run_dir": run_dir, "seed": cfg.seed, "special": codec.special, "stop": stop}
        data = build(cfg.data, **offers)
        objective = build(cfg.objective, backbone=partial(build, cfg.model, codec=codec), **offers)
        if hasattr(data, "layout"):  # a datamodule without images has none
            check_layout(data.layout, objective.backbone.layout)
        trainer = _trainer(cfg, LambdaCallback(on_train_batch_start=lambda *_: began.set()), **offers)
    except MISTAKES as error:
        raise ConfigError(str(error)) from error
    try:
        with stop:
            trainer.fit(objective, datamodule=data, ckpt_path=_newest(run_dir))
    except Stopped as stopped:
        sys.stderr.write(f"\n{_where(trainer)} by {stopped}; the same command continues\n")
        sys.exit(SIGNALLED + stopped.signal)
    except MISTAKES as error:
        if began.is_set() and not isinstance(error, EmptyRound):  # what is wrong by now is no mistake of the user's
            raise
        raise ConfigError(str(error)) from error
    if trainer.global_step < cfg.trainer.max_steps:
        raise ConfigError(f"{_where(trainer)}; the same command continues")
    objective.backbone.canvas = cfg.data.canvas
    save_pretrained(objective.backbone, codec, run_dir / "model")
    write_json(run_dir / "finished.json", {"steps": trainer.global_step})
    sys.stdout.write(f"{trainer.global_step} steps done; the model is in {run_dir / 'model'}\n")


def _where(trainer: L.Trainer) -> str:
    return f"stopped at step {trainer.global_step} of {trainer.max_steps}"


def plan(cfg: DictConfig) -> str:
    """The memory that a step takes of each of `plan.gpus` GPUs, as a table. Reads neither weights nor data."""
    _quiet()
    try:
        codec = Codec.load(cfg.tokenizer)
        offers = {"codec": codec, "run_dir": Path(cfg.run_dir), "seed": cfg.seed, "special": codec.special}
        data = build(cfg.data, **offers)
        objective = build(cfg.objective, backbone=partial(_outline, cfg.model, codec), **offers)
        micro = objective.options.micro_batch or cfg.data.batch_size
        batch = _imagined(cfg, data.collate, rows=min(cfg.data.batch_size, micro + 1))
        found = measure(objective, batch, gpus=cfg.plan.gpus, precision=str(cfg.trainer.precision))
    except MISTAKES as error:
        raise ConfigError(str(error)) from error
    except KeyError as error:
        raise ConfigError(f"no plan: the objective needs {error} of the records, and no data are read") from error
    return (
        f"{cfg.name}: {cfg.data.batch_size} rows on each of {found.gpus} GPUs, {min(micro, len(batch))} at a time; "
        f"{objective.options.views} x {cfg.data.canvas} tokens behind a prefix of {found.prefix}; "
        f"{cfg.trainer.precision}\n{found.parameters:,} parameters, {found.trained:,} of them trained\n\n"
        f"{found.table()}\nat most {found.shown(found.peak)} on each GPU; docs/memory.md says what comes on top\n"
    )


def _outline(node: DictConfig, codec: Codec) -> Any:
    """The model of a config on the meta device."""
    with torch.device("meta"):
        if node.target == "src.models.checkpoint.from_pretrained":
            return build({**node, "target": "src.models.outline.outline"}, codec=codec)
        return build(node, codec=codec)


def _imagined(cfg: DictConfig, collate: Callable, *, rows: int) -> Batch:
    """A batch as the data would make it of black pictures of the size of `plan.image`."""
    size = cfg.plan.image
    if size is not None and len(size) != 2:
        raise ConfigError(f"plan.image: expected [width, height] or null, got {list(size)}")
    image: Any = size and Image.new("RGB", (size[0], size[1]))
    record = {"prompt": cfg.plan.prompt, "captions": [{"text": ""}]}
    return collate([Sample(str(row), record, b"", image) for row in range(rows)], 0)[0]


def _trainer(cfg: DictConfig, *callbacks: L.Callback, run_dir: Path, **offers: Any) -> L.Trainer:
    """The trainer with the callbacks of the config, and then those given."""
    built = [build(node, run_dir=run_dir, **offers) for node in cfg.callbacks.values() if node]
    logger = TensorBoardLogger(run_dir, name="tensorboard", version="")
    node = {**cfg.trainer, "log_every_n_steps": _log_interval(cfg)}
    trainer = build(node, logger=logger, callbacks=[*built, *callbacks], default_root_dir=run_dir)
    if trainer.world_size > 1:
        raise ConfigError(f"trainer: {trainer.world_size} devices; training runs on one so far, several come later")
    return trainer


def _log_interval(cfg: DictConfig) -> int:
    """Steps between two points of the log: a run that is shorter has one at its end."""
    interval, steps = cfg.trainer.log_every_n_steps, cfg.trainer.max_steps
    return min(interval, steps) if steps > 0 else interval


def _open_run(cfg: DictConfig, run_dir: Path) -> bool:
    """Prepare the run's folder; false if the run is finished. Raises ConfigError where resuming would mix two runs."""
    saved, finished = run_dir / "config.yaml", run_dir / "finished.json"
    if run_dir.exists() and not cfg.resume:
        if any(run_dir.iterdir()) and not saved.exists():
            raise ConfigError(f"{run_dir} is not a run's folder (no config.yaml): choose another run_dir")
        shutil.rmtree(run_dir)
    inputs = _inputs(cfg)
    if saved.exists() and (finished.exists() or _checkpoints(run_dir)):
        _check_same(cfg, run_dir, inputs)
    if finished.exists():
        return False
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "inputs.json", inputs)
    save_config(OmegaConf.create({**cfg, "resume": True}), saved)  # repeating a run must not remove it
    return True


def _check_same(cfg: DictConfig, run_dir: Path, inputs: dict[str, str]) -> None:
    """Raise ConfigError if the run was made with other settings or from other files."""
    remedy = "give another run_dir, or resume=false to start it afresh"
    old = OmegaConf.load(run_dir / "config.yaml")
    changed = [key for key in FIXED if OmegaConf.select(old, key) != OmegaConf.select(cfg, key)]
    if changed:
        raise ConfigError(f"{run_dir} holds a run with other settings ({', '.join(changed)}); {remedy}")
    record = run_dir / "inputs.json"
    known = json.loads(record.read_text()) if record.exists() else {}
    changed = [f"{key}={OmegaConf.select(cfg, key)}" for key in inputs if inputs[key] != known.get(key)]
    if changed:
        raise ConfigError(f"{run_dir} was trained from files that have changed since ({', '.join(changed)}); {remedy}")


def _inputs(cfg: DictConfig) -> dict[str, str]:
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


def _quiet() -> None:
    """Lightning's banners, and warnings about its own internals, tell a user nothing."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*LeafSpec.*",
        ".*smaller than the logging interval.*",
        ".*does not have many workers.*",
        "Using ModelCheckpoint with manual optimization.*",
        "Checkpoint directory .* exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def _checkpoints(run_dir: Path) -> list[Path]:
    """The newest first; before each online round one is written too."""
    return sorted((run_dir / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _newest(run_dir: Path) -> Path | None:
    """The newest checkpoint that is whole: the directory of the archive stands at the end of the file."""
    for path in _checkpoints(run_dir):
        if zipfile.is_zipfile(path):
            return path
        log.warning("%s is damaged; taking the checkpoint before it", path)
    return None


if __name__ == "__main__":
    main()
