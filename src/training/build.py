"""What a training run is made of, from its config.

    codec = codec_of(cfg)
    data, objective, trainer = assemble(cfg, codec, ...)      everything, as far as can be told fit for each other
    rehearse(cfg)                                             the same without weights, trainer or devices

Nothing is written.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig

from callbacks.self_correction import SelfCorrection
from datamodules.captions import ShardData
from src.cli.instantiate import build, plain
from src.cli.signals import Stop
from src.io.errors import UserError
from src.models.hf.meta import Deferred
from src.models.inference import warn_if_length_differs
from src.models.tiling import check_layout
from src.text.tokenizer import Codec
from src.training.strategy import DDP, FSDP2
from src.types import Kind

OFFERS = ("backbone", "codec", "run_dir", "seed", "special", "stop")
STORED = "src.models.hf.folder.from_pretrained"
log = logging.getLogger(__name__)


def assemble(
    cfg: DictConfig, codec: Codec, *callbacks: L.Callback, stop: Stop, first: bool
) -> tuple[L.LightningDataModule, Any, L.Trainer]:
    """Data, objective and trainer, the latter with the callbacks of the config and then those given.

    first: whether this process warns of what all of them know
    """
    L.seed_everything(cfg.seed, verbose=False)
    offers = offered(cfg, codec, stop)
    trainer = _trainer(cfg, *callbacks, **offers)
    if first and cfg.objective.get("training", {}).get("sharding") and not isinstance(trainer.strategy, FSDP2):
        log.warning("objective.training.sharding is for parallel/fsdp2 only; here nothing is shared")
    factory = partial(build, cfg.model, codec=codec)
    if isinstance(trainer.strategy, FSDP2) and cfg.model.target == STORED:
        options = {key: value for key, value in plain(cfg.model).items() if key not in ("target", "path")}
        factory = Deferred(cfg.model.path, {**options, "codec": codec})
    data, objective = data_and_objective(cfg, factory, **offers)
    if isinstance(data, ShardData):
        data.index("train")  # what is wrong with it has to be said before anything is replaced
    if first:
        _warn(cfg, objective)
    return data, objective, trainer


def rehearse(cfg: DictConfig, *, world: int = 1) -> None:
    """Build everything but weights and trainer, as on a machine without the devices. Raises UserError as training.

    world: number of processes of the run
    """
    quiet()
    check_stops(cfg)
    codec = codec_of(cfg)
    offers = offered(cfg, codec, Stop())
    data, _ = data_and_objective(cfg, partial(outlined, cfg.model, codec), **offers)
    data.place = (0, world)
    steps = len(data.train_dataloader())
    for callback in _callbacks(cfg, **offers):
        if isinstance(callback, SelfCorrection) and data.epoch_batches:
            callback.check_length(max_epochs=cfg.trainer.max_epochs, max_steps=cfg.trainer.max_steps, steps=steps)


def codec_of(cfg: DictConfig) -> Codec:
    """The tokenizer of a config, with the gap that it names."""
    return Codec.load(cfg.tokenizer).with_format(gap=cfg.get("gap"))


def offered(cfg: DictConfig, codec: Codec, stop: Stop | None = None) -> dict[str, Any]:
    """What components may ask for by name (OFFERS), but for the backbone."""
    return {"codec": codec, "run_dir": Path(cfg.run_dir), "seed": cfg.seed, "special": codec.special, "stop": stop}


def data_and_objective(cfg: DictConfig, backbone: Callable, *, images: bool = True, **offers: Any) -> tuple[Any, Any]:
    """The two; with `images`, once they cut these alike."""
    data = build(cfg.data, **offers)
    objective = build(cfg.objective, backbone=backbone, **offers)
    if images and hasattr(data, "layout"):  # a datamodule without images has none
        check_layout(data.layout, objective.backbone.layout)
    return data, objective


def outlined(node: DictConfig, codec: Codec) -> Any:
    """The model of a config on the meta device."""
    with torch.device("meta"):
        if node.target == STORED:
            return build({**plain(node), "target": "src.models.hf.meta.outline"}, codec=codec)
        return build(node, codec=codec)


def check_stops(cfg: DictConfig) -> None:
    """Raise UserError for a trainer that would end before it has trained, or could not even be seeded."""
    if not 0 <= cfg.seed < 2**32:
        raise UserError(f"seed must be at least 0 and less than 2**32, got {cfg.seed}")
    if cfg.trainer.get("precision") == "16-mixed":
        raise UserError("trainer.precision: float16 needs its losses scaled, which is not done here; use bf16-mixed")
    if cfg.trainer.max_steps == 0:
        raise UserError("trainer.max_steps must be at least 1, got 0")
    if cfg.trainer.get("fast_dev_run"):
        raise UserError("trainer.fast_dev_run saves nothing; for a trial set trainer.max_steps and another run_dir")
    if cfg.trainer.get("limit_train_batches") == 0:
        raise UserError("trainer.limit_train_batches=0 leaves nothing to train on; set it higher, or to null")


def quiet() -> None:
    """Lightning's banners, and warnings about its own internals, tell a user nothing."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.strategies.launchers").setLevel(logging.INFO)  # which process has failed
    for message in (
        ".*LeafSpec.*",
        ".*smaller than the logging interval.*",
        ".*does not have many workers.*",
        "Checkpoint directory .* exists and is not empty.*",
        ".*`srun` command is available on your system but is not used.*",
        ".*FSDP2-wrapped module .* returned a view tensor.*",  # nobody writes into it
        ".*sync_dist=True.*",  # what objectives log are numbers of all ranks
    ):
        warnings.filterwarnings("ignore", message=message)


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
    warn_if_length_differs(objective.backbone, cfg.data.response_length, name="data.response_length")


def _trainer(cfg: DictConfig, *callbacks: L.Callback, run_dir: Path, **offers: Any) -> L.Trainer:
    """The trainer with the callbacks of the config, and then those given."""
    node = {**plain(cfg.trainer), "log_every_n_steps": _log_interval(cfg)}
    built = [*_callbacks(cfg, run_dir=run_dir, **offers), *callbacks]
    if not any(isinstance(callback, ProgressBar) for callback in built):
        node.setdefault("enable_progress_bar", False)  # else Lightning takes one of its own
    if node.get("strategy", "auto") in ("auto", "ddp") and (node.get("devices", 1), node.get("num_nodes", 1)) != (1, 1):
        node["strategy"] = DDP()
    try:
        return build(
            node,
            logger=TensorBoardLogger(run_dir, name="tensorboard", version=""),
            callbacks=built,
            # Lightning's own requeuing saves within a signal handler, where ranks may wait for each other for ever
            plugins=[SLURMEnvironment(auto_requeue=False)] if _by_slurm() else None,
            default_root_dir=run_dir,
        )
    except MisconfigurationException as error:
        raise UserError(f"trainer: {error}") from error


def _by_slurm() -> bool:
    """Whether `srun` has started the processes; torchrun may have, within a job."""
    return SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()


def _callbacks(cfg: DictConfig, **offers: Any) -> list[L.Callback]:
    return [build(node, **offers) for node in cfg.callbacks.values() if node]


def _log_interval(cfg: DictConfig) -> int:
    """Steps between two points of the log: a run that is shorter has one at its end."""
    interval, steps = cfg.trainer.log_every_n_steps, cfg.trainer.max_steps
    return min(interval, steps) if steps > 0 else interval
