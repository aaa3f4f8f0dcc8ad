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

import logging
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig
from PIL import Image

from datamodules.captions import ShardData
from datamodules.shards import Sample
from src.batch import Batch, Kind
from src.components import ConfigError, build, check, plain
from src.config import load_config, main_guard, path_of
from src.drafting import warn_of_canvas
from src.importers.images import MAX_PIXELS
from src.lock import locked
from src.models.checkpoint import save_pretrained
from src.objectives.base import Diverged
from src.plan import measure
from src.rounds import EmptyRound
from src.runs import FINISHED, MODEL, begin, check_folder, checkpoints, forget, is_complete, newest, restore
from src.shards import write_json
from src.stop import SIGNALLED, Stop, Stopped
from src.tiling import check_layout
from src.tokenizer import Codec

OFFERS = ("backbone", "codec", "run_dir", "seed", "special", "stop")
MISTAKES = (ValueError, MisconfigurationException)
log = logging.getLogger(__name__)


@main_guard
def main(argv: list[str]) -> None:
    """Train as the config says, or plan what memory it takes."""
    cfg = load_config(argv, verb="src.train", needs=["objective", "trainer", "callbacks", "plan"])
    check(cfg, offers=OFFERS, sections=["callbacks"])
    if cfg.plan.gpus is not None:
        sys.stdout.write(plan(cfg))
    else:
        with locked(path_of(cfg, "run_dir")):
            train(cfg)


def train(cfg: DictConfig) -> None:
    """Build everything, fit from the last checkpoint if there is one, and export the model."""
    run_dir = path_of(cfg, "run_dir")
    _quiet()
    try:
        check_folder(cfg, run_dir)
        if cfg.resume and is_complete(run_dir):
            log.info("%s is finished already; resume=false would start it afresh", run_dir)
            return
        _check_stops(cfg)
        run_dir.mkdir(parents=True, exist_ok=True)  # paths such as `run_dir/../stage1/model` need it
        codec, stop, began = Codec.load(cfg.tokenizer), Stop(), Event()
        data, objective, trainer = _build(cfg, codec, run_dir, stop, began)
        begin(cfg, run_dir)
        start, before = newest(run_dir), _saved_at(run_dir)
    except MISTAKES as error:
        raise ConfigError(str(error)) from error
    try:
        with stop:
            trainer.fit(objective, datamodule=data, ckpt_path=start)
    except Stopped as stopped:
        sys.stderr.write(f"\n{_where(trainer)} by {stopped}; the same command continues\n")
        sys.exit(SIGNALLED + stopped.signal)
    except Diverged as error:
        raise ConfigError(str(error)) from error
    except MISTAKES as error:
        if began.is_set() and not isinstance(error, EmptyRound):  # what is wrong by now is no mistake of the user's
            raise
        if not isinstance(error, EmptyRound):
            restore(run_dir)
        raise ConfigError(str(error)) from error
    if trainer.global_step < cfg.trainer.max_steps:
        raise ConfigError(f"{_where(trainer)}; {_way_on(saved=_saved_at(run_dir) > before)}")
    objective.backbone.canvas = cfg.data.canvas
    save_pretrained(objective.backbone, codec, run_dir / MODEL)
    write_json(run_dir / FINISHED, {"steps": trainer.global_step})
    sys.stdout.write(f"{trainer.global_step} steps done; the model is in {run_dir / MODEL}\n")


def _build(
    cfg: DictConfig, codec: Codec, run_dir: Path, stop: Stop, began: Event
) -> tuple[L.LightningDataModule, Any, L.Trainer]:
    """Data, objective and trainer, as far as can be told fit for each other. Writes nothing."""
    L.seed_everything(cfg.seed, verbose=False)
    offers = {"codec": codec, "run_dir": run_dir, "seed": cfg.seed, "special": codec.special, "stop": stop}
    data = build(cfg.data, **offers)
    objective = build(cfg.objective, backbone=partial(build, cfg.model, codec=codec), **offers)
    if hasattr(data, "layout"):  # a datamodule without images has none
        check_layout(data.layout, objective.backbone.layout)
    if isinstance(data, ShardData):
        data.index("train")  # what is wrong with it has to be said before anything is replaced
    _warn(cfg, objective)
    trainer = _trainer(cfg, LambdaCallback(on_train_batch_start=lambda *_: _note(began, run_dir)), **offers)
    return data, objective, trainer


def _note(began: Event, run_dir: Path) -> None:
    """Take note of the first step, from which on a run that it replaces is gone."""
    if not began.is_set():
        began.set()
        forget(run_dir)


def _where(trainer: L.Trainer) -> str:
    return f"stopped at step {trainer.global_step} of {trainer.max_steps}"


def _saved_at(run_dir: Path) -> int:
    """When the newest checkpoint was written, in nanoseconds; 0 before the first."""
    return max((path.stat().st_mtime_ns for path in checkpoints(run_dir)), default=0)


def _way_on(*, saved: bool) -> str:
    """What to do about a training that its trainer has ended early."""
    if saved:
        return "the same command continues"
    return (
        "no checkpoint was saved on the way, so the same command would do the same again: raise or unset what ended it "
        "(trainer.max_epochs, max_time, limit_train_batches), or lower callbacks.checkpoint.every_n_train_steps"
    )


def _warn(cfg: DictConfig, objective: Any) -> None:
    """Say what is allowed, and rarely meant."""
    mistakes = any(term.kind == Kind.MISTAKE for term in objective.terms)
    if mistakes and not (cfg.callbacks.get("self_correction") or cfg.data.get("rounds")):
        log.warning("the objective corrects drafts, but there are none: give data.rounds=[...], or an online round")
    begin = getattr(objective, "begin", 0)
    if isinstance(begin, int) and begin >= cfg.trainer.max_steps:
        log.warning(
            "objective.begin=%d, but the run has %d steps: drafts are never corrected", begin, cfg.trainer.max_steps
        )
    warn_of_canvas(objective.backbone, cfg.data.canvas, name="data.canvas")


def _check_stops(cfg: DictConfig) -> None:
    """Raise ConfigError for a trainer that would end before it has trained, or could not even be seeded."""
    if not 0 <= cfg.seed < 2**32:
        raise ConfigError(f"seed must be at least 0 and less than 2**32, got {cfg.seed}")
    if cfg.trainer.max_steps == 0:
        raise ConfigError("trainer.max_steps must be at least 1, got 0")
    if cfg.trainer.get("fast_dev_run"):
        raise ConfigError("trainer.fast_dev_run saves nothing; for a trial set trainer.max_steps and another run_dir")
    if cfg.trainer.get("limit_train_batches") == 0:
        raise ConfigError("trainer.limit_train_batches=0 leaves nothing to train on; set it higher, or to null")


def plan(cfg: DictConfig) -> str:
    """The memory that a step takes of each of `plan.gpus` GPUs, as a table. Reads neither weights nor data."""
    if type(cfg.plan.gpus) is not int or cfg.plan.gpus < 1:
        raise ConfigError(f"plan.gpus: a plan is for at least 1 GPU, got {cfg.plan.gpus!r}; plan.gpus=null trains")
    _quiet()
    try:
        codec = Codec.load(cfg.tokenizer)
        offers = {"codec": codec, "run_dir": Path(cfg.run_dir), "seed": cfg.seed, "special": codec.special}
        data = build(cfg.data, **offers)
        objective = build(cfg.objective, backbone=partial(_outline, cfg.model, codec), **offers)
        if hasattr(data, "layout") and cfg.plan.image is not None:
            check_layout(data.layout, objective.backbone.layout)
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
    size = plain(cfg.plan.image)
    if size is not None and not _is_size(size):
        most = f"numbers of pixels, at most {MAX_PIXELS:,} in all"
        raise ConfigError(f"plan.image: expected [width, height] or null, got {size} ({most})")
    if not isinstance(cfg.plan.prompt, str):
        raise ConfigError(f"plan.prompt: expected a text, got {cfg.plan.prompt!r}")
    image: Any = size and Image.new("RGB", (size[0], size[1]))
    record = {"prompt": cfg.plan.prompt, "captions": [{"text": ""}]}
    return collate([Sample(str(row), record, b"", image) for row in range(rows)], 0)[0]


def _is_size(size: Any) -> bool:
    if not isinstance(size, list) or len(size) != 2 or any(type(length) is not int or length < 1 for length in size):
        return False
    return size[0] * size[1] <= MAX_PIXELS


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


if __name__ == "__main__":
    main()
