"""Export: write a model as a Hugging Face directory, in the layout of LLaDA-V, of LLaDA-8B, or in our own.

    python -m src.export conf=export model=runs/stage2/model out=exported format=llada_v
    python -m src.export conf=export model=runs/stage2/checkpoints/last.ckpt out=exported dtype=bfloat16
    python -m src.export conf=export model=GSAI-ML/LLaDA-8B-Instruct out=converted format=own
    python -m src.export conf=export model=runs/stage2/checkpoints/last.ckpt out=whole.ckpt format=lightning

    model folder            read tensor by tensor, so a large model needs little memory
    Lightning checkpoint    a .ckpt file, or the folder that several processes write; `like` names the model folder
                            whose config.json and tokenizer belong to it, default: what its run started from

    tensors, config.json, tokenizer -> OUT, with the names and fields of the layout

`llada_v` and `llada` are for programs that read the released models: what the config.json of an original says beyond
what this project uses is kept. So are the program files that its `auto_map` names, where they lie in the model folder;
of a model of the hub the field names them there. `own` is for this project. `lightning` is one file with the whole
state of a training, made of the folder that several processes have written.
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
from src.distributed.checkpoints import MANIFEST, is_whole, read_whole
from src.io.errors import UserError
from src.io.files import publish
from src.io.hub import local_folder
from src.models.hf.folder import ModelFolder, build_empty, check_tensors, describe, read_dtype, replacing, write_config
from src.models.hf.formats import FORMATS, Description, Format
from src.models.hf.stored import Stored, in_checkpoint, in_folder, is_checkpoint
from src.models.hf.weights import check_finite, write_weights
from src.text.tokenizer import FILES, NEEDED, PROMPT, Codec

LIGHTNING = "lightning"  # a format that is no model folder
logger = logging.getLogger(__name__)


@main_guard
def main(argv: list[str]) -> None:
    """Export as the config says."""
    cfg = load_config(argv, verb="src.export", needs=NEEDS["src.export"])
    check(cfg)
    export(cfg)


def export(cfg: DictConfig) -> None:
    """Write the model that the config names to the folder `out`."""
    out = path_of(cfg, "out")
    if out.exists():
        raise UserError(f"out={out} exists already; choose another folder or remove it")
    if cfg.format == LIGHTNING:
        _join(path_of(cfg, "model"), out)
        return
    form = _format(cfg.format)
    if Path(cfg.model).resolve() in out.resolve().parents:
        raise UserError(f"out={out} is in the model folder {cfg.model}, which the export must not change")
    stored, description, tokenizer, origin = _source(cfg)
    model = build_empty(description)
    check_tensors(model, {name: tuple(tensor.shape) for name, tensor in stored.tensors.items()}, cfg.model)
    # 1. names and dtypes of the layout, in the order of the model
    dtype = read_dtype(cfg.dtype)
    tensors = {form.theirs(name): _cast(stored.tensors[name], dtype) for name in model.state_dict()}
    ours = {form.theirs(name): name for name in stored.tensors}
    config, programs = _with_programs(form.config(description), origin)
    if form.name != "own":
        config = {**_ids(tokenizer, description, form), **config, "torch_dtype": _name(next(iter(tensors.values())))}

    def read(names: list[str]) -> dict[str, Tensor]:
        found = stored.read([ours[name] for name in names])
        cast = {name: _cast(found[ours[name]], dtype) for name in names}
        for name, tensor in cast.items():
            check_finite(name, tensor, cfg.model)
        return cast

    # 2. the folder
    with replacing(out) as folder:
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        write_weights(folder, sizes, read, max_shard_bytes=cfg.max_shard_bytes)
        write_config(folder, config)
        _write_tokenizer(tokenizer, folder, form)
        for file in programs:
            shutil.copyfile(file, folder / file.name)
    sys.stdout.write(f"{out}: {len(tensors)} tensors, {sum(sizes.values()) / 1e9:.2f} GB, layout {form.name}\n")


def _join(path: Path, out: Path) -> None:
    """Write a checkpoint of several processes as the one file that a single process would have written."""
    if not is_checkpoint(path):
        raise UserError(f"format={LIGHTNING} is for checkpoints of a run, but {path} is none")
    _check_whole(path)
    content = read_whole(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    torch.save(content, temporary)
    publish(temporary, out)
    sys.stdout.write(f"{out}: step {content['global_step']}, {len(content['state_dict'])} tensors\n")


def _check_whole(path: Path) -> None:
    """Raise UserError for a checkpoint that is not as it was written."""
    if (path.is_file() or (path / MANIFEST).is_file()) and not is_whole(path):
        raise UserError(f"{path} is damaged: it is not as it was written; take another checkpoint of the run")


def _source(cfg: DictConfig) -> tuple[Stored, Description, Path, Path]:
    """The tensors to export, what else makes their model, and the folders of its tokenizer and of its config.json."""
    path = local_folder(path_of(cfg, "model"))
    vision, like = plain(cfg.vision), ModelFolder.open(cfg.like) if cfg.like else None
    if is_checkpoint(path):
        _check_whole(path)
        of_like = like and (like.describe(vision=vision), like.path, like.path)
        description, tokenizer, origin = of_like or _of_run(path, vision)
        if not (tokenizer / "tokenizer.json").is_file():
            raise UserError(
                f"there is no tokenizer in {tokenizer}, and {path} is of no use without: set like=DIR to a model "
                "folder that has it"
            )
        return in_checkpoint(path), description, tokenizer, origin
    if like:
        raise UserError(
            f"like={cfg.like} is for checkpoints of a run, but {path} is none: a model folder describes itself"
        )
    folder = ModelFolder.open(cfg.model)
    return in_folder(folder), folder.describe(vision=vision), folder.path, folder.path


def _of_run(path: Path, vision: dict | None) -> tuple[Description, Path, Path]:
    """What the run of a checkpoint, RUN/checkpoints/NAME, started from: the model, and the folders as in `_source`."""
    config = path.resolve().parents[1] / "config.yaml"
    if not config.is_file():
        raise UserError(f"{path} is in no run's folder (no {config}): set like=DIR to the model folder it started from")
    run = OmegaConf.load(config)
    node = {**plain(run.model), **({"vision": vision} if vision else {})}
    tokenizer = local_folder(run.tokenizer, patterns=NEEDED)
    response_length = OmegaConf.select(run, "data.response_length")
    if "path" not in node:
        found, origin = describe(build(node, codec=Codec.load(tokenizer))), tokenizer
    else:
        folder = ModelFolder.open(node["path"])
        found, origin = folder.describe(attention=node.get("attention"), vision=node.get("vision")), folder.path
    return replace(found, response_length=response_length or found.response_length), tokenizer, origin


def _with_programs(config: dict, origin: Path) -> tuple[dict, list[Path]]:
    """The config, and the files that its `auto_map` names; without that field where they are not all in `origin`."""
    named = [value if isinstance(value, list) else [value] for value in config.get("auto_map", {}).values()]
    here = [name for names in named for name in names if name and "--" not in name]
    files = {origin / f"{name.split('.')[0]}.py" for name in here if re.fullmatch(r"\w+\.\w+", name)}
    if all(file.is_file() for file in files) and len({name.split(".")[0] for name in here}) == len(files):
        return config, sorted(files)
    logger.warning("the program files of auto_map are not in %s, so the export is without that field", origin)
    return {key: value for key, value in config.items() if key != "auto_map"}, []


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise UserError(f"format must be one of {', '.join([*FORMATS, LIGHTNING])}, got {name!r}")
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
        for file in {found for pattern in (*FILES, PROMPT) for found in tokenizer.glob(pattern)}:
            shutil.copyfile(file, folder / file.name)


if __name__ == "__main__":
    main()
