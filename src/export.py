"""Export a model as a Hugging Face folder, in the layout of LLaDA-V or LLaDA-8B or in our own.

    python -m src.export conf=export model=runs/stage2/model out=exported format=llada_v
    python -m src.export conf=export model=runs/stage2/checkpoints/last.ckpt out=exported dtype=bfloat16
    python -m src.export conf=export model=runs/proseco/checkpoints/last.ckpt out=exported format=own weights=ema
    python -m src.export conf=export model=GSAI-ML/LLaDA-8B-Instruct out=converted format=own
    python -m src.export conf=export model=runs/stage2/checkpoints/last.ckpt out=whole.ckpt format=lightning

    tensors, config.json, tokenizer -> OUT, with the names and fields of the layout, and a model card (README.md)

The tensors of a model folder or .ckpt file are memory-mapped, those of a sharded checkpoint are read into memory. The
config.json and tokenizer of a checkpoint are those of the model folder `like`, default: the one its run started from.
`llada_v` and `llada` are for code that reads the released models: config.json fields that this project does not use
are kept, and so are the code files (*.py) beside it; for a model on the hub, `auto_map` refers to them there. `own` is
for this project. `lightning` merges a sharded checkpoint into one file that training can resume from. Adapters
(`src/models/lora.py`) are merged into the weights of their base, all of which are then in memory.
"""

from __future__ import annotations

import logging
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from src.cli.config import load_config, path_of
from src.cli.entrypoint import main_guard
from src.cli.help import NEEDS
from src.cli.instantiate import build, check, plain
from src.distributed.checkpoints import MANIFEST, is_intact, read_full
from src.io.errors import UserError
from src.io.files import FORMAT, atomic, replacing
from src.io.hub import local_folder
from src.io.words import counted, data_size
from src.models.hf.folder import ModelFolder, build_empty, check_tensors, describe, write_config
from src.models.hf.formats import FORMATS, Description
from src.models.hf.weights import check_finite, is_checkpoint, model_state, read_dtype, write_weights
from src.models.lora import LoRA
from src.text.tokenizer import FILES, NEEDED, PROMPT, Codec
from src.training.card import CARD, model_card
from src.training.run_dir import read_config

LIGHTNING = "lightning"  # a single checkpoint file instead of a model folder
LOST = 0.1  # share of an adapter's change that rounding may cost without a warning
logger = logging.getLogger(__name__)


@main_guard
def main(argv: list[str]) -> None:
    cfg = load_config(argv, verb="src.export", needs=NEEDS["src.export"])
    check(cfg)
    out = path_of(cfg, "out")
    if out.exists():
        raise UserError(f"out={out} already exists; choose another folder or remove it")
    if cfg.weights not in (None, "raw", "ema"):
        raise UserError(f"weights must be raw, ema or null, got {cfg.weights!r}")
    path = path_of(cfg, "model")
    if (path.is_file() or (path / MANIFEST).is_file()) and not is_intact(path):
        raise UserError(f"{path} is damaged: incomplete or changed since it was written; use another checkpoint")
    if cfg.format == LIGHTNING:
        merge_shards(path, out)
    elif cfg.format in FORMATS:
        export(cfg, out)
    else:
        raise UserError(f"format must be one of {', '.join([*FORMATS, LIGHTNING])}, got {cfg.format!r}")


def export(cfg: DictConfig, out: Path) -> None:
    """Write the model `cfg.model` to the new folder `out`."""
    form, dtype = FORMATS[cfg.format], read_dtype(cfg.dtype)
    # 1. The tensors, checked one at a time as they will be written, and in the order of the model
    state, description, tokenizer, origin = _source(cfg)
    if description.lora:
        state, lost = LoRA.of(description.lora).merge(state, dtype)
        description = replace(description, lora=None)
        if lost > LOST:
            logger.warning(
                "merging rounds the weights by %.0f %% of what the adapter changes: dtype=float32", 100 * lost
            )
    model = build_empty(description)
    check_tensors(model, state, cfg.model)
    for name, tensor in state.items():
        check_finite(name, tensor.to(dtype or tensor.dtype), cfg.model)
    model.load_state_dict(state, assign=True)
    card = model_card(cfg.model, model=model, scores=cfg.scores)
    state = {form.theirs(name): state[name] for name in model.state_dict()}
    # 2. config.json; a model that did not come in this layout has no special ids yet
    config, has_tokenizer = form.config(description), (tokenizer / "tokenizer.json").is_file()
    if form.name != "own":
        config["torch_dtype"] = str(dtype or next(iter(state.values())).dtype).removeprefix("torch.")
        if has_tokenizer and description.original.get("format") != form.name:
            codec = Codec.load(tokenizer)
            ids = {"eos_token_id": codec.eos_id, "pad_token_id": codec.eos_id, "mask_token_id": codec.mask_id}
            config = ids | config
    # 3. The folder, with the tokenizer's files and the code files as they are
    if not has_tokenizer:
        logger.warning("there is no tokenizer in %s, so the export contains none", tokenizer)
    with replacing(out) as folder:
        write_weights(folder, state, dtype=dtype, max_shard_bytes=cfg.max_shard_bytes)
        write_config(folder, config)
        card.save(folder / CARD)
        if form.name != "own":
            files = [file for pattern in (*FILES, PROMPT) for file in tokenizer.glob(pattern)]
            for file in (*files, *origin.glob("*.py")):
                shutil.copyfile(file, folder / file.name)
        elif has_tokenizer:
            Codec.load(tokenizer).save(folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    weights = f", {cfg.weights} weights" if cfg.weights else ""
    sys.stdout.write(f"{out}: {counted(len(state), 'tensor')}, {data_size(size)}, layout {form.name}{weights}\n")


def merge_shards(path: Path, out: Path) -> None:
    """Write a sharded checkpoint as the one file that a single process would have written."""
    if not is_checkpoint(path):
        raise UserError(f"format={LIGHTNING} is for checkpoints of a run, but {path} is not one")
    content = read_full(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic(out) as stream:
        torch.save(content, stream)
    sys.stdout.write(f"{out}: step {content['global_step']}, {counted(len(content['state_dict']), 'tensor')}\n")


def _source(cfg: DictConfig) -> tuple[dict[str, Tensor], Description, Path, Path]:
    """The tensors to export, the description of their model, and the folders of its tokenizer and its config.json."""
    path, vision = local_folder(path_of(cfg, "model")), plain(cfg.vision)
    if not is_checkpoint(path):
        if cfg.like:
            raise UserError(f"like={cfg.like} is for checkpoints of a run; the model folder {path} describes itself")
        if cfg.weights:
            raise UserError(f"weights={cfg.weights} is for checkpoints of a run; the model folder {path} has one kind")
        folder = ModelFolder.open(cfg.model)
        state = {name: folder.read(name) for name in folder.names}
        return state, folder.describe(vision=vision), folder.path, folder.path
    frozen: dict[str, Tensor] = {}  # of a checkpoint that holds only adapters
    if cfg.like:
        like = ModelFolder.open(cfg.like)
        frozen = {name: like.read(name) for name in like.names} if like.lora else {}
        description, tokenizer, origin = like.describe(vision=vision), like.path, like.path
    else:
        frozen, description, tokenizer, origin = _read_run(path, vision)
    if not (tokenizer / "tokenizer.json").is_file():
        raise UserError(
            f"there is no tokenizer in {tokenizer}, which the export of {path} needs: set like=DIR to a model "
            "folder that contains it"
        )
    return {**frozen, **model_state(path, weights=cfg.weights)}, description, tokenizer, origin


def _read_run(path: Path, vision: dict | None) -> tuple[dict[str, Tensor], Description, Path, Path]:
    """The model that the run of RUN/checkpoints/NAME started from: its tensors if it trains adapters, and the
    description and folders (see `_source`)."""
    config = path.resolve().parents[1] / "config.yaml"
    if not config.is_file():
        raise UserError(
            f"{path} is not in a run's folder (no {config}): set like=DIR to the model that it started from"
        )
    run = read_config(config.parent)
    if run.get("format") != FORMAT:
        raise UserError(f"{config.parent} holds a run of format {run.get('format', 1)}, not {FORMAT}: set like=DIR")
    node = {**plain(run.model), **({"vision": vision} if vision else {})}
    tokenizer = local_folder(run.tokenizer, patterns=NEEDED)
    response_length = OmegaConf.select(run, "data.response_length")
    state: dict[str, Tensor] = {}
    if "path" not in node:
        description, origin = describe(build(node, codec=Codec.load(tokenizer))), tokenizer
    else:
        lora = node.get("lora") and build(node["lora"])
        folder = ModelFolder.open(node["path"], lora=lora)
        state = {name: folder.read(name) for name in folder.names} if lora else {}
        description, origin = folder.describe(attention=node.get("attention"), vision=node.get("vision")), folder.path
    description = replace(description, response_length=response_length or description.response_length)
    return state, description, tokenizer, origin


if __name__ == "__main__":
    main()
