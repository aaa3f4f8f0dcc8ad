"""Export a model as a Hugging Face folder, in the layout of LLaDA-V or LLaDA-8B or in our own.

    python -m src.export conf=export model=runs/stage2/model out=exported format=llada_v
    python -m src.export conf=export model=runs/stage2/checkpoints/last.ckpt out=exported dtype=bfloat16
    python -m src.export conf=export model=GSAI-ML/LLaDA-8B-Instruct out=converted format=own
    python -m src.export conf=export model=runs/stage2/checkpoints/last.ckpt out=whole.ckpt format=lightning

    model folder            read tensor by tensor, so a large model needs little memory
    Lightning checkpoint    a .ckpt file, or the folder of a sharded checkpoint; `like` is the model folder whose
                            config.json and tokenizer belong to it, default: the one its run started from

    tensors, config.json, tokenizer -> OUT, with the names and fields of the layout

`llada_v` and `llada` are for code that reads the released models: config.json fields that this project does not use
are kept, and so are the code files named by `auto_map` if they are in the model folder; for a model on the hub,
`auto_map` refers to them there. `own` is for this project. `lightning` merges a sharded checkpoint into one file that
training can resume from.
"""

from __future__ import annotations

import logging
import re
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
from src.io.files import publish
from src.io.hub import local_folder
from src.models.hf.folder import ModelFolder, build_empty, check_tensors, describe, read_dtype, replacing, write_config
from src.models.hf.formats import FORMATS, Description, Format
from src.models.hf.stored import Stored, in_checkpoint, in_folder, is_checkpoint
from src.models.hf.weights import check_finite, write_weights
from src.text.tokenizer import FILES, NEEDED, PROMPT, Codec

LIGHTNING = "lightning"  # a single checkpoint file instead of a model folder
logger = logging.getLogger(__name__)


@main_guard
def main(argv: list[str]) -> None:
    """Export the model of a config."""
    cfg = load_config(argv, verb="src.export", needs=NEEDS["src.export"])
    check(cfg)
    export(cfg)


def export(cfg: DictConfig) -> None:
    """Write the model `cfg.model` to the folder `cfg.out`."""
    out = path_of(cfg, "out")
    if out.exists():
        raise UserError(f"out={out} already exists; choose another folder or remove it")
    if cfg.format == LIGHTNING:
        _merge_shards(path_of(cfg, "model"), out)
        return
    form = _format(cfg.format)
    if Path(cfg.model).resolve() in out.resolve().parents:
        raise UserError(f"out={out} is inside the model folder {cfg.model}; choose a folder outside of it")
    stored, description, tokenizer, origin = _source(cfg)
    model = build_empty(description)
    check_tensors(model, {name: tuple(tensor.shape) for name, tensor in stored.tensors.items()}, cfg.model)
    # 1. Names and dtypes of the layout, in the order of the model
    dtype = read_dtype(cfg.dtype)
    tensors = {form.theirs(name): _cast(stored.tensors[name], dtype) for name in model.state_dict()}
    ours = {form.theirs(name): name for name in stored.tensors}
    config, code_files = _with_code_files(form.config(description), origin)
    if form.name != "own":
        torch_dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        config = {**_special_ids(tokenizer, description, form), **config, "torch_dtype": torch_dtype}

    def read(names: list[str]) -> dict[str, Tensor]:
        loaded = stored.read([ours[name] for name in names])
        cast = {name: _cast(loaded[ours[name]], dtype) for name in names}
        for name, tensor in cast.items():
            check_finite(name, tensor, cfg.model)
        return cast

    # 2. The folder
    with replacing(out) as folder:
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        write_weights(folder, sizes, read, max_shard_bytes=cfg.max_shard_bytes)
        write_config(folder, config)
        _write_tokenizer(tokenizer, folder, form)
        for file in code_files:
            shutil.copyfile(file, folder / file.name)
    sys.stdout.write(f"{out}: {len(tensors)} tensors, {sum(sizes.values()) / 1e9:.2f} GB, layout {form.name}\n")


def _merge_shards(path: Path, out: Path) -> None:
    """Write a sharded checkpoint as the one file that a single process would have written."""
    if not is_checkpoint(path):
        raise UserError(f"format={LIGHTNING} is for checkpoints of a run, but {path} is not one")
    _check_whole(path)
    content = read_full(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    torch.save(content, temporary)
    publish(temporary, out)
    sys.stdout.write(f"{out}: step {content['global_step']}, {len(content['state_dict'])} tensors\n")


def _check_whole(path: Path) -> None:
    """Raise UserError for a checkpoint that is incomplete or changed."""
    if (path.is_file() or (path / MANIFEST).is_file()) and not is_intact(path):
        raise UserError(f"{path} is damaged: incomplete or changed since it was written; use another checkpoint")


def _source(cfg: DictConfig) -> tuple[Stored, Description, Path, Path]:
    """The tensors to export, the description of their model, and the folders of its tokenizer and its config.json."""
    path = local_folder(path_of(cfg, "model"))
    vision, like = plain(cfg.vision), ModelFolder.open(cfg.like) if cfg.like else None
    if is_checkpoint(path):
        _check_whole(path)
        if like:
            description, tokenizer, origin = like.describe(vision=vision), like.path, like.path
        else:
            description, tokenizer, origin = _read_run(path, vision)
        if not (tokenizer / "tokenizer.json").is_file():
            raise UserError(
                f"there is no tokenizer in {tokenizer}, which the export of {path} needs: set like=DIR to a model "
                "folder that contains it"
            )
        return in_checkpoint(path), description, tokenizer, origin
    if like:
        raise UserError(
            f"like={cfg.like} is for checkpoints of a run, but {path} is not one; a model folder describes itself"
        )
    folder = ModelFolder.open(cfg.model)
    return in_folder(folder), folder.describe(vision=vision), folder.path, folder.path


def _read_run(path: Path, vision: dict | None) -> tuple[Description, Path, Path]:
    """The description and folders (see `_source`) of the model that the run of RUN/checkpoints/NAME started from."""
    config = path.resolve().parents[1] / "config.yaml"
    if not config.is_file():
        raise UserError(
            f"{path} is not in a run's folder (no {config}): set like=DIR to the model that it started from"
        )
    run = OmegaConf.load(config)
    node = {**plain(run.model), **({"vision": vision} if vision else {})}
    tokenizer = local_folder(run.tokenizer, patterns=NEEDED)
    response_length = OmegaConf.select(run, "data.response_length")
    if "path" not in node:
        description, origin = describe(build(node, codec=Codec.load(tokenizer))), tokenizer
    else:
        folder = ModelFolder.open(node["path"])
        description, origin = folder.describe(attention=node.get("attention"), vision=node.get("vision")), folder.path
    return replace(description, response_length=response_length or description.response_length), tokenizer, origin


def _with_code_files(config: dict, origin: Path) -> tuple[dict, list[Path]]:
    """The config, and the files named by its `auto_map`; drops that field if they are not all in `origin`."""
    classes = [value if isinstance(value, list) else [value] for value in config.get("auto_map", {}).values()]
    local = [name for names in classes for name in names if name and "--" not in name]  # REPO--FILE.CLASS: on the hub
    files = {origin / f"{name.split('.')[0]}.py" for name in local if re.fullmatch(r"\w+\.\w+", name)}
    if all(file.is_file() for file in files) and len({name.split(".")[0] for name in local}) == len(files):
        return config, sorted(files)
    logger.warning("the code files named by auto_map are not in %s, so the export drops that field", origin)
    return {key: value for key, value in config.items() if key != "auto_map"}, []


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise UserError(f"format must be one of {', '.join([*FORMATS, LIGHTNING])}, got {name!r}")
    return FORMATS[name]


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def _special_ids(tokenizer: Path, description: Description, form: Format) -> dict[str, int]:
    """Special ids for config.json, if the model did not come in this layout, which would have them."""
    if description.original.get("format") == form.name or not (tokenizer / "tokenizer.json").is_file():
        return {}
    codec = Codec.load(tokenizer)
    return {"eos_token_id": codec.eos_id, "pad_token_id": codec.eos_id, "mask_token_id": codec.mask_id}


def _write_tokenizer(tokenizer: Path, folder: Path, form: Format) -> None:
    """Copy the tokenizer files unchanged; the `own` layout also stores the prompt format."""
    if not (tokenizer / "tokenizer.json").is_file():
        logger.warning("there is no tokenizer in %s, so the export contains none", tokenizer)
    elif form.name == "own":
        Codec.load(tokenizer).save(folder)
    else:
        for file in {match for pattern in (*FILES, PROMPT) for match in tokenizer.glob(pattern)}:
            shutil.copyfile(file, folder / file.name)


if __name__ == "__main__":
    main()
