"""What to generate for: image files, a split of a dataset, or questions, as a count and a stream of entries.

    count, entries = find_entries(cfg, layout)
    for key, read in entries: sample = read()        raises ImageProblem where it cannot be read

Nothing is opened before its `read` is called, so that a damaged file costs one entry and not the run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from PIL import Image

from datamodules.shards import Index, Sample, decode, read_index, read_tar
from datamodules.text import TextData
from src.io.errors import UserError
from src.io.images import ImageProblem, fit, load
from src.io.shards import INDEX
from src.models.tiling import Layout, Square
from src.text.prompt_format import IMAGE

Entry = tuple[str, Callable[[], Sample]]  # key of an image or question, and what reads it or raises ImageProblem


def find_entries(cfg: DictConfig, layout: Layout | None) -> tuple[int, Iterator[Entry]]:
    """How many images or questions the config names, and their entries. `layout`: the model's, None for text only."""
    if cfg.images is None:
        return find_questions(cfg.prompt)
    if layout is None:
        raise UserError("the model has no vision path, so it cannot caption images; images=null asks without one")
    return find_images(Path(cfg.images), layout=layout, prompt=cfg.prompt)


def find_questions(prompt: str | None) -> tuple[int, Iterator[Entry]]:
    """One question, those of a .jsonl file, {"key": ..., "prompt": ...} in each line, or of a split of texts."""
    if prompt is None:
        raise UserError("images=null needs a prompt: a question, a .jsonl file of them, or a split of a text dataset")
    if _is_split(prompt):
        index = read_index(prompt, image=False)
        if index.kind != TextData.kind:
            raise UserError(f"{prompt} holds {index.kind!r}, not texts; name it as images=")
        return index.count, _in_shards(index, None, image=False)
    if not prompt.endswith(".jsonl"):
        return 1, iter([("prompt", partial(_asked, "prompt", prompt))])
    if not Path(prompt).is_file():
        raise UserError(f"prompt: no file {prompt}")
    asked = _read_questions(Path(prompt))
    return len(asked), iter([(key, partial(_asked, key, question)) for key, question in asked.items()])


def _is_split(prompt: str | None) -> bool:
    """Whether a prompt is no question, but the folder of a split of a dataset."""
    with suppress(OSError):  # a question may be too long for the name of a file
        return bool(prompt) and (Path(prompt) / INDEX).is_file()
    return False


def _read_questions(file: Path) -> dict[str, str]:
    """The questions of a .jsonl file by their keys; without a byte order mark and blank lines."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt: {file} cannot be read: {error}") from error
    asked: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            said = json.loads(line)
            key, question = said["key"], said["prompt"].strip()
        except (AttributeError, ValueError, KeyError, TypeError) as error:
            raise UserError(f'line {number} of {file} is no {{"key": "a", "prompt": "Why?"}}: {line}') from error
        if not isinstance(key, str):
            raise UserError(f'line {number} of {file}: the key must be a text, such as "{key}", got {key!r}')
        if unknown := sorted(said.keys() - {"key", "prompt"}):
            hint = "; images=FOLDER takes images, and one prompt for all" if "image" in unknown else ""
            raise UserError(f"line {number} of {file} has {unknown[0]!r}, but only key and prompt are read{hint}")
        if IMAGE in question:
            raise UserError(f"line {number} of {file} has an image mark, but there are no images")
        if key in asked:
            raise UserError(f"line {number} of {file} repeats the key {key!r}")
        asked[key] = question
    if not asked:
        raise UserError(f"prompt: there is no question in {file}")
    return asked


def _asked(key: str, question: str) -> Sample:
    return Sample(key, {"prompt": question}, b"", None)


def find_images(path: Path, *, layout: Layout, prompt: str | None) -> tuple[int, Iterator[Entry]]:
    """How many images there are in a file, below a folder or in a split of a dataset, and their entries.

    Keys are file names relative to the folder, or those of the dataset; `prompt` replaces the dataset's own.
    """
    if (path / INDEX).is_file():
        index = read_index(path)
        return index.count, _in_shards(index, prompt, image=True)
    if not path.exists():
        raise UserError(f"images: no file or folder {path}")
    if prompt is None:
        raise UserError('image files need a prompt, such as prompt="Describe the picture."')
    root, files = (path, _image_files(path)) if path.is_dir() else (path.parent, [path])
    if not files:
        raise UserError(f"images: no image in {path}; of a dataset name one split, a folder with {INDEX}")
    named = [(file.relative_to(root).as_posix(), file) for file in files]
    return len(files), iter([(key, partial(_open, key, file, layout, prompt)) for key, file in named])


def _image_files(folder: Path) -> list[Path]:
    """Files with the ending of an image format, at any depth, without hidden ones."""
    endings = Image.registered_extensions()
    found = [path for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file()]
    return sorted(f for f in found if not any(p.startswith(".") for p in f.relative_to(folder).parts))


def _open(key: str, file: Path, layout: Layout, prompt: str) -> Sample:
    """A photograph as the layout wants it: a square layout does not keep its shape, so it is put on a grey square."""
    image = fit(load(file, size=layout.size), layout.size) if isinstance(layout, Square) else load(file)
    return Sample(key, {"prompt": prompt}, b"", image)


def _in_shards(index: Index, prompt: str | None, *, image: bool) -> Iterator[Entry]:
    """All samples of a data folder; those that a cut shard lacks have an entry that fails."""
    for shard in index.shards:
        found = 0
        for raw in islice(read_tar(shard.path, strict=False), shard.count):
            found += 1
            yield raw["__key__"], partial(_decode, raw, prompt, image)
        for number in range(found, shard.count):
            yield f"{shard.path.name}#{number}", partial(_decode, {}, prompt, image)


def _decode(raw: dict[str, Any], prompt: str | None, image: bool) -> Sample:
    sample = decode(raw, image=image)
    if sample is None:
        raise ImageProblem("damaged_sample")
    question = (sample.record.get("prompt") or "") if prompt is None else prompt
    if not question and image and prompt is None:  # a text model may write without one
        raise ImageProblem("no_prompt")
    if question.count(IMAGE) > int(image):
        raise ImageProblem("more_image_marks_than_images")
    return replace(sample, record={"prompt": question})
