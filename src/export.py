"""Export: write a model as a Hugging Face directory, in the layout of LLaDA-V, of LLaDA-8B, or in our own.

    python -m src.export conf=export model=runs/stage2/model out=exported format=llada_v
    python -m src.export conf=export model=runs/stage2/checkpoints/last.ckpt out=exported dtype=bfloat16
    python -m src.export conf=export model=GSAI-ML/LLaDA-8B-Instruct out=converted format=own

    model folder            read tensor by tensor, so a large model needs little memory
    Lightning checkpoint    a .ckpt file, or the folder that several processes write; `like` names the model folder
                            whose config.json and tokenizer belong to it, default: what its run started from

    tensors, config.json, tokenizer -> OUT, with the names and fields of the layout

`llada_v` and `llada` are for programs that read the released models: what the config.json of an original says beyond
what this project uses is kept; program files of an original are not copied. `own` is for this project.
"""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from src.components import ConfigError, build, check, plain
from src.config import load_config, main_guard
from src.hub import local_folder
from src.models.checkpoint import ModelFolder, build_empty, check_tensors, describe, read_dtype, replacing, write_config
from src.models.formats import FORMATS, Description, Format
from src.models.stored import Stored, in_checkpoint, in_folder, is_checkpoint
from src.models.weights import write_weights
from src.tokenizer import Codec

logger = logging.getLogger(__name__)
TOKENIZER = ("*token*.json", "vocab.json", "merges.txt", "chat_template.*", "prompt.yaml", "generation_config.json")


@main_guard
def main(argv: list[str]) -> None:
    """Export as the config says."""
    cfg = load_config(argv)
    check(cfg)
    try:
        export(cfg)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error


def export(cfg: DictConfig) -> None:
    """Write the model that the config names to the folder `out`."""
    out, form = Path(cfg.out), _format(cfg.format)
    if out.exists():
        raise ValueError(f"out={out} exists already; choose another folder or remove it")
    stored, description, tokenizer = _source(cfg)
    model = build_empty(description)
    check_tensors(model, {name: tuple(tensor.shape) for name, tensor in stored.tensors.items()}, cfg.model)
    # 1. names and dtypes of the layout, in the order of the model
    dtype = read_dtype(cfg.dtype)
    tensors = {form.theirs(name): _cast(stored.tensors[name], dtype) for name in model.state_dict()}
    ours = {form.theirs(name): name for name in stored.tensors}
    config = form.config(description)
    if form.name != "own":
        config = {**_ids(tokenizer, description, form), **config, "torch_dtype": _name(next(iter(tensors.values())))}

    def read(names: list[str]) -> dict[str, Tensor]:
        found = stored.read([ours[name] for name in names])
        return {name: _cast(found[ours[name]], dtype) for name in names}

    # 2. the folder
    with replacing(out) as folder:
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        write_weights(folder, sizes, read, max_shard_bytes=cfg.max_shard_bytes)
        write_config(folder, config)
        _write_tokenizer(tokenizer, folder, form)
    sys.stdout.write(f"{out}: {len(tensors)} tensors, {sum(sizes.values()) / 1e9:.2f} GB, layout {form.name}\n")


def _source(cfg: DictConfig) -> tuple[Stored, Description, Path]:
    """The tensors to export, what else makes their model, and the folder with its tokenizer."""
    path = local_folder(cfg.model)
    vision, like = plain(cfg.vision), ModelFolder.open(cfg.like) if cfg.like else None
    if is_checkpoint(path):
        of_like = like and (like.describe(vision=vision), like.path)
        description, tokenizer = of_like or _of_run(path, vision)
        return in_checkpoint(path), description, tokenizer
    if like:
        raise ValueError(
            f"like={cfg.like} is for checkpoints of a run, but {path} is none: a model folder describes itself"
        )
    folder = ModelFolder.open(path)
    return in_folder(folder), folder.describe(vision=vision), folder.path


def _of_run(path: Path, vision: dict | None) -> tuple[Description, Path]:
    """What the run of a checkpoint, RUN/checkpoints/NAME, started from: the model, and the folder of the tokenizer."""
    config = path.resolve().parents[1] / "config.yaml"
    if not config.is_file():
        raise ValueError(
            f"{path} is in no run's folder (no {config}): set like=DIR to the model folder it started from"
        )
    run = OmegaConf.load(config)
    node = {**plain(run.model), **({"vision": vision} if vision else {})}
    tokenizer = Path(run.tokenizer)
    if "path" not in node:
        return describe(build(node, codec=Codec.load(tokenizer))), tokenizer
    folder = ModelFolder.open(node["path"])
    return folder.describe(attention=node.get("attention"), vision=node.get("vision")), tokenizer


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _ids(tokenizer: Path, description: Description, form: Format) -> dict[str, int]:
    """Special ids for the config.json of a model that did not come with one of that layout."""
    if description.original.get("format") == form.name or not (tokenizer / "tokenizer.json").is_file():
        return {}
    codec = Codec.load(tokenizer)
    return {"eos_token_id": codec.eos_id, "pad_token_id": codec.eos_id, "mask_token_id": codec.mask_id}


def _write_tokenizer(tokenizer: Path, folder: Path, form: Format) -> None:
    """Files of an original are copied as they are; our own folders also say what their prompts look like."""
    if not (tokenizer / "tokenizer.json").is_file():
        logger.warning("there is no tokenizer in %s, so the export has none either", tokenizer)
    elif form.name == "own":
        Codec.load(tokenizer).save(folder)
    else:
        for file in {found for pattern in TOKENIZER for found in tokenizer.glob(pattern)}:
            shutil.copyfile(file, folder / file.name)


if __name__ == "__main__":
    main()
