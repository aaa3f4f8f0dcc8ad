"""Build the components of a training run from its config, checked against each other. Writes nothing.

data, objective, trainer = assemble(cfg, load_codec(cfg), ...)
rehearse(cfg)                       the same checks without weights, trainer or devices
"""

from __future__ import annotations

import logging
import os
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
from omegaconf import DictConfig

from callbacks.self_correction import SelfCorrection
from datamodules.captions import ShardData
from src.cli.help import available, config_root
from src.cli.instantiate import build, plain
from src.cli.signals import Stop
from src.io.errors import UserError
from src.io.hub import hub_name
from src.models.hf.folder import Deferred
from src.models.hf.weights import is_adapter
from src.models.inference import warn_if_length_differs
from src.models.tiling import check_layout
from src.objectives.base import Objective, Setup
from src.text.tokenizer import Codec
from src.training.board import Board
from src.training.run_dir import fixed_settings
from src.training.strategy import DDP, FSDP2
from src.types import Kind

OFFERS = ("codec", "run_dir", "seed", "setup", "special", "stop")
STORED = "src.models.hf.folder.from_pretrained"
log = logging.getLogger(__name__)


def assemble(
    cfg: DictConfig, codec: Codec, *, stop: Stop, is_rank0: bool
) -> tuple[L.LightningDataModule, Any, L.Trainer]:
    """Build data, objective and trainer. is_rank0: whether this process logs warnings"""
    L.seed_everything(cfg.seed, verbose=False)
    offers = component_args(cfg, codec, stop)
    trainer = _trainer(cfg, **offers)
    factory = partial(build, cfg.model, codec=codec)
    if isinstance(trainer.strategy, FSDP2) and cfg.model.target == STORED:
        options = {key: value for key, value in plain(cfg.model).items() if key not in ("target", "path")}
        if options.get("lora"):
            options["lora"] = build(options["lora"])
        factory = Deferred(cfg.model.path, {**options, "codec": codec})
    data, objective = data_and_objective(cfg, factory, **offers)
    if isinstance(data, ShardData):
        data.index("train")  # raises for damaged data before `resume=false` replaces anything
    if is_rank0:
        if cfg.optim.get("sharding") and not isinstance(trainer.strategy, FSDP2):
            log.warning("optim.sharding has no effect without parallel/fsdp2")
        mistakes = any(term.kind == Kind.MISTAKE for term in objective.first_terms)
        if mistakes and not (cfg.callbacks.get("self_correction") or cfg.data.get("rounds")):
            log.warning(
                "the objective corrects drafts, but there are none: set data.rounds or callbacks.self_correction"
            )
        warn_if_length_differs(objective.backbone, cfg.data.response_length, name="data.response_length")
    return data, objective, trainer


def rehearse(cfg: DictConfig, *, world: int = 1) -> None:
    """Build all but weights and trainer, on a machine without the devices. Raises UserError where training would.

    world: number of processes of the run
    """
    silence_lightning()
    check_trainer(cfg)
    codec = load_codec(cfg)
    offers = component_args(cfg, codec, Stop())
    data, _ = data_and_objective(cfg, partial(build_on_meta, cfg.model, codec), **offers)
    data.place = (0, world)
    steps = len(data.train_dataloader())
    for callback in _callbacks(cfg, **offers):
        if isinstance(callback, SelfCorrection) and data.epoch_batches:
            callback.check_length(max_epochs=cfg.trainer.max_epochs, max_steps=cfg.trainer.max_steps, steps=steps)


def load_codec(cfg: DictConfig) -> Codec:
    return Codec.load(cfg.tokenizer).with_format(gap=cfg.get("gap"))


def component_args(cfg: DictConfig, codec: Codec, stop: Stop | None = None) -> dict[str, Any]:
    """Arguments that components may take by name (OFFERS), without `setup`."""
    return {"codec": codec, "run_dir": Path(cfg.run_dir), "seed": cfg.seed, "special": codec.special, "stop": stop}


def data_and_objective(cfg: DictConfig, backbone: Callable, *, images: bool = True, **offers: Any) -> tuple[Any, Any]:
    """Build the datamodule and the objective.

    Raises UserError if the model to start from does not exist, and with `images` if the two tile images differently.
    """
    if cfg.model.target == STORED and not hub_name(cfg.model.path):
        path = Path(os.path.normpath(cfg.model.path))  # resolves `run_dir/../stage1/model` before run_dir exists
        if not path.exists():
            run = path.parent.name
            known = run in available(config_root("conf"))
            first = f"train it first with `python -m src.train conf={run}`, or " if known else ""
            raise UserError(f"model.path: there is no {path}; {first}set model.path")
        if is_adapter(path) and not cfg.model.get("lora"):
            raise UserError(
                f"model.path: {path} is an adapter: train it further with conf=...,lora, or merge it into its base "
                f"first: python -m src.export conf=export model={path} out=NEW format=own"
            )
    data = build(cfg.data, **offers)
    setup = Setup(backbone=backbone, special=offers["special"], optim=build(cfg.optim), seed=cfg.seed)
    objective = build(cfg.objective, setup=setup, **offers)
    if not isinstance(objective, Objective):
        raise UserError(f"objective: {cfg.objective.target} must be a subclass of src.objectives.base.Objective")
    if cfg.model.get("lora"):
        check_adapters(cfg, {parameter.dtype for parameter in objective.backbone.parameters()})
    if images and hasattr(data, "layout"):  # a datamodule without images has none
        check_layout(data.layout, objective.backbone.layout)
    return data, objective


def build_on_meta(node: DictConfig, codec: Codec) -> Any:
    with torch.device("meta"):
        if node.target == STORED:
            return build({**plain(node), "target": "src.models.hf.folder.outline"}, codec=codec)
        return build(node, codec=codec)


def check_trainer(cfg: DictConfig) -> None:
    """Raise UserError for settings with which training would go wrong silently, or after a while."""
    if cfg.trainer.get("precision") == "16-mixed":
        raise UserError("trainer.precision=16-mixed needs loss scaling, which is not supported; use bf16-mixed")
    if cfg.trainer.max_steps < 1:
        raise UserError(f"trainer.max_steps must be at least 1, got {cfg.trainer.max_steps}")
    if (warmup := cfg.optim.get("warmup_steps", 0)) > cfg.trainer.max_steps:
        raise UserError(
            f"optim.warmup_steps={warmup} is more than trainer.max_steps={cfg.trainer.max_steps}, so the learning rate "
            "would never be reached: for a short trial add optim.warmup_steps=1"
        )
    devices, nodes = cfg.trainer.get("devices", 1), cfg.trainer.get("num_nodes", 1)
    started = int(os.environ["WORLD_SIZE"]) if TorchElasticEnvironment.detect() else None
    if started and type(devices) is int and devices * nodes != started:  # each would train alone, in the same folder
        raise UserError(f"{started} processes were started, but trainer.devices={devices} and num_nodes={nodes}")


def check_adapters(cfg: DictConfig, dtypes: set[torch.dtype]) -> None:
    """Raise UserError for settings with which adapters would be trained wrongly, or not. dtypes: of the weights"""
    precision, whole = cfg.trainer.get("precision"), set(cfg.model.lora.get("train") or ())
    if precision in ("bf16-true", "16-true"):
        raise UserError(
            f"trainer.precision={precision} would train adapters in 16 bits: use bf16-mixed; the frozen weights "
            "stay in model.dtype"
        )
    if len(dtypes) > 1 and precision != "bf16-mixed":
        raise UserError(
            f"the adapters are float32 and the frozen weights are not, but trainer.precision={precision}: use "
            "bf16-mixed, or model.dtype=float32"
        )
    if cfg.get("gap") and not {"model.embed_tokens", "lm_head"} <= whole:
        raise UserError(
            f"gap={cfg.gap} is a new token, but adapters train neither its embedding nor its logit: add "
            "model.embed_tokens and lm_head to model.lora.train"
        )


def silence_lightning() -> None:
    for name in ("lightning.pytorch", "lightning.fabric", "tensorboard"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.strategies.launchers").setLevel(logging.INFO)  # names the failed process
    for message in (
        ".*LeafSpec.*",
        ".*smaller than the logging interval.*",
        ".*does not have many workers.*",
        "Checkpoint directory .* exists and is not empty.*",
        ".*`srun` command is available on your system but is not used.*",
        ".*FSDP2-wrapped module .* returned a view tensor.*",  # harmless: no in-place write
        ".*sync_dist=True.*",  # objectives log values that are already reduced over ranks
    ):
        warnings.filterwarnings("ignore", message=message)


def _trainer(cfg: DictConfig, *, run_dir: Path, **offers: Any) -> L.Trainer:
    node = plain(cfg.trainer)
    node["log_every_n_steps"] = min(node["log_every_n_steps"], node["max_steps"])  # a short run logs once
    callbacks = _callbacks(cfg, run_dir=run_dir, **offers)
    if not any(isinstance(callback, ProgressBar) for callback in callbacks):
        node.setdefault("enable_progress_bar", False)  # otherwise Lightning adds its own
    if node.get("strategy", "auto") in ("auto", "ddp") and (node.get("devices", 1), node.get("num_nodes", 1)) != (1, 1):
        node["strategy"] = DDP()
    started_by_srun = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()  # a job may use torchrun
    try:
        return build(
            node,
            logger=Board(run_dir, settings=fixed_settings(cfg)),
            callbacks=callbacks,
            # Lightning's own requeue saves inside a signal handler, where ranks can deadlock
            plugins=[SLURMEnvironment(auto_requeue=False)] if started_by_srun else None,
            default_root_dir=run_dir,
        )
    except MisconfigurationException as error:
        raise UserError(f"trainer: {error}") from error


def _callbacks(cfg: DictConfig, **offers: Any) -> list[L.Callback]:
    return [build(node, **offers) for node in cfg.callbacks.values() if node]
