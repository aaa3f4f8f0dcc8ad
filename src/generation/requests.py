"""Requests: image files, a split of a dataset, or questions, as a count and a stream of entries.

    count, entries = find_entries(cfg, layout)
    for key, read in entries: sample = read()        raises ImageProblem if the sample cannot be read

Files are opened only when `read` is called, so a damaged file costs one entry and not the run.
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

Entry = tuple[
    str, Callable[[], Sample]
]  # key of an image or question, and a function that reads it or raises ImageProblem


def find_entries(cfg: DictConfig, layout: Layout | None) -> tuple[int, Iterator[Entry]]:
    """Number of images or questions in the config, and their entries. layout: the model's; None for a text model."""
    if cfg.images is None:
        return find_questions(cfg.prompt)
    if layout is None:
        raise UserError("the model has no vision path, so it cannot caption images; use images=null")
    return find_images(Path(cfg.images), layout=layout, prompt=cfg.prompt)


def find_questions(prompt: str | None) -> tuple[int, Iterator[Entry]]:
    """One question, a .jsonl file with {"key": ..., "prompt": ...} per line, or a split of a text dataset."""
    if prompt is None:
        raise UserError("images=null needs a prompt: a question, a .jsonl file of them, or a split of a text dataset")
    if is_split(prompt):
        index = read_index(prompt, image=False)
        if index.kind != TextData.kind:
            raise UserError(f"{prompt} holds {index.kind!r}, not texts; pass it as images=")
        return index.count, _split_entries(index, None, image=False)
    if not prompt.endswith(".jsonl"):
        return 1, iter([("prompt", partial(_question, "prompt", prompt))])
    if not Path(prompt).is_file():
        raise UserError(f"prompt: no file {prompt}")
    questions = _read_questions(Path(prompt))
    return len(questions), iter([(key, partial(_question, key, text)) for key, text in questions.items()])


def is_split(prompt: str | None) -> bool:
    """Whether a prompt is the folder of a dataset split instead of a question."""
    with suppress(OSError):  # a question may be too long for a file name
        return bool(prompt) and (Path(prompt) / INDEX).is_file()
    return False


def _read_questions(file: Path) -> dict[str, str]:
    """The questions of a .jsonl file by key. Ignores a byte order mark and blank lines."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt: {file} cannot be read: {error}") from error
    questions: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            key, question = fields["key"], fields["prompt"].strip()
        except (AttributeError, ValueError, KeyError, TypeError) as error:
            raise UserError(f'line {number} of {file} is not {{"key": "a", "prompt": "Why?"}}: {line}') from error
        if not isinstance(key, str):
            raise UserError(f'line {number} of {file}: the key must be a string such as "{key}", got {key!r}')
        if unknown := sorted(fields.keys() - {"key", "prompt"}):
            hint = "; images=FOLDER takes images, and one prompt for all" if "image" in unknown else ""
            raise UserError(f"line {number} of {file} has {unknown[0]!r}, but only key and prompt are read{hint}")
        if IMAGE in question:
            raise UserError(f"line {number} of {file} has an image mark, but there are no images")
        if key in questions:
            raise UserError(f"line {number} of {file} repeats the key {key!r}")
        questions[key] = question
    if not questions:
        raise UserError(f"prompt: no questions in {file}")
    return questions


def _question(key: str, question: str) -> Sample:
    return Sample(key, {"prompt": question}, b"", None)


def find_images(path: Path, *, layout: Layout, prompt: str | None) -> tuple[int, Iterator[Entry]]:
    """Number of images in a file, below a folder or in a dataset split, and their entries.

    Keys are file names relative to the folder, or keys of the dataset; `prompt` replaces the dataset's prompts.
    """
    if (path / INDEX).is_file():
        index = read_index(path)
        return index.count, _split_entries(index, prompt, image=True)
    if not path.exists():
        raise UserError(f"images: no file or folder {path}")
    if prompt is None:
        raise UserError('image files need a prompt, such as prompt="Describe the picture."')
    root, files = (path, _image_files(path)) if path.is_dir() else (path.parent, [path])
    if not files:
        raise UserError(f"images: no image in {path}; for a dataset, name one split (a folder with {INDEX})")
    by_key = {file.relative_to(root).as_posix(): file for file in files}
    return len(files), iter([(key, partial(_read_image, key, file, layout, prompt)) for key, file in by_key.items()])


def _image_files(folder: Path) -> list[Path]:
    """Files with the extension of an image format, at any depth, without hidden ones."""
    extensions = Image.registered_extensions()
    images = [path for path in folder.rglob("*") if path.suffix.lower() in extensions and path.is_file()]
    return sorted(f for f in images if not any(p.startswith(".") for p in f.relative_to(folder).parts))


def _read_image(key: str, file: Path, layout: Layout, prompt: str) -> Sample:
    """An image for the layout. A square layout would distort it, so it is pasted onto a grey square."""
    image = fit(load(file, size=layout.size), layout.size) if isinstance(layout, Square) else load(file)
    return Sample(key, {"prompt": prompt}, b"", image)


def _split_entries(index: Index, prompt: str | None, *, image: bool) -> Iterator[Entry]:
    """Entries of all samples of a split; reading one that a truncated shard lacks raises ImageProblem."""
    for shard in index.shards:
        num_read = 0
        for raw in islice(read_tar(shard.path, strict=False), shard.count):
            num_read += 1
            yield raw["__key__"], partial(_decode, raw, prompt, image)
        for number in range(num_read, shard.count):
            yield f"{shard.path.name}#{number}", partial(_decode, {}, prompt, image)


def _decode(raw: dict[str, Any], prompt: str | None, image: bool) -> Sample:
    sample = decode(raw, image=image)
    if sample is None:
        raise ImageProblem("damaged_sample")
    question = (sample.record.get("prompt") or "") if prompt is None else prompt
    if not question and image and prompt is None:  # a text model can write without a prompt
        raise ImageProblem("no_prompt")
    if question.count(IMAGE) > int(image):
        raise ImageProblem("more_image_marks_than_images")
    return replace(sample, record={"prompt": question})
