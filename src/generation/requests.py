"""Requests: image files, a split of a dataset, or questions, as a count and a stream.

    count, requests = find_requests("photos", prompt="Describe it.", layout=backbone.layout)
    for sample in readable(requests, unreadable=[]): ...

A request is a key and a function that reads its sample. Files are opened only when it is called, so a damaged file
costs one request and not the run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from datamodules.shards import Sample, decode
from datamodules.stream import Index, read_index
from datamodules.text import TextData
from src.io.errors import UserError
from src.io.images import ImageProblem, fit, load, to_rgb
from src.io.shards import INDEX, read_tar
from src.models.tiling import Layout, Square

Request = tuple[str, Callable[[], Sample]]  # the function raises ImageProblem if the sample cannot be read
logger = logging.getLogger(__name__)


def find_requests(images: str | None, *, prompt: str | None, layout: Layout | None) -> tuple[int, Iterator[Request]]:
    """The number of requests, and the requests.

    images: an image, a folder of images, or a dataset split, whose own prompts `prompt` replaces; None: questions only
    prompt: one question; without images also a .jsonl file of questions, or a split of a text dataset
    layout: the model's; None for a text model
    """
    if images is None:
        return _find_questions(prompt)
    layout = _with_vision(layout)
    if is_split(images):
        index = read_index(images)
        return index.count, _of_split(index, prompt, image=True)
    path = Path(images)
    if not path.exists():
        raise UserError(f"images: no file or folder {path}")
    if prompt is None:
        raise UserError('image files need a prompt, such as prompt="Describe the picture."')
    root, files = (path, _image_files(path)) if path.is_dir() else (path.parent, [path])
    if not files:
        raise UserError(f"images: no image in {path}; for a dataset, name one split (a folder with {INDEX})")
    return of_files({file.relative_to(root).as_posix(): file for file in files}, prompt=prompt, layout=layout)


def of_files(files: Mapping[str, Path], *, prompt: str, layout: Layout | None) -> tuple[int, Iterator[Request]]:
    """The requests of image files by key, all with the same question."""
    layout = _with_vision(layout)
    return len(files), ((key, partial(_read_image, key, file, layout, prompt)) for key, file in files.items())


def _with_vision(layout: Layout | None) -> Layout:
    if layout is None:
        raise UserError("the model has no vision path, so it cannot caption images; use images=null")
    return layout


def readable(requests: Iterable[Request], *, unreadable: list[str]) -> Iterator[Sample]:
    """The samples of the requests. Logs those that cannot be read, and adds their keys to `unreadable`."""
    for key, read in requests:
        try:
            yield read()
        except ImageProblem as problem:
            logger.warning("%s: %s", key, problem)
            unreadable.append(key)


def is_split(path: str) -> bool:
    """Whether a text is the folder of a dataset split."""
    with suppress(OSError):  # a question may be too long for a file name
        return bool(path) and (Path(path) / INDEX).is_file()
    return False


def _find_questions(prompt: str | None) -> tuple[int, Iterator[Request]]:
    if prompt is None:
        raise UserError("images=null needs a prompt: a question, a .jsonl file of them, or a split of a text dataset")
    if is_split(prompt):
        index = read_index(prompt, image=False)
        if index.kind != TextData.kind:
            raise UserError(f"{prompt} holds {index.kind!r}, not texts; pass it as images=")
        return index.count, _of_split(index, None, image=False)
    texts = _read_questions(Path(prompt)) if prompt.endswith(".jsonl") else {"prompt": prompt}
    return len(texts), ((key, partial(Sample, key, {"prompt": text}, b"", None)) for key, text in texts.items())


def _image_files(folder: Path) -> list[Path]:
    """Files with the extension of an image format, at any depth, without hidden ones."""
    extensions = Image.registered_extensions()
    images = [path for path in folder.rglob("*") if path.suffix.lower() in extensions and path.is_file()]
    return sorted(f for f in images if not any(p.startswith(".") for p in f.relative_to(folder).parts))


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
            key, question = fields.pop("key"), fields.pop("prompt").strip()
            if fields or not isinstance(key, str):
                raise ValueError("another key, or a key that is no string")
        except (AttributeError, ValueError, KeyError, TypeError) as error:
            raise UserError(f'line {number} of {file} is not {{"key": "a", "prompt": "Why?"}}: {line}') from error
        if key in questions:
            raise UserError(f"line {number} of {file} repeats the key {key!r}")
        questions[key] = question
    return questions


def read_image(source: Path | str | bytes | Image.Image, layout: Layout, **limits: Any) -> Image.Image:
    """An image file, the bytes of one, or an image, as RGB for a model. limits: of `load`, for images of strangers.

    Raises ImageProblem if it cannot be read.
    """
    if isinstance(source, Image.Image):
        image = to_rgb(source, tags={})
    else:
        source = Path(source) if isinstance(source, str) else source
        image = load(source, size=layout.size if isinstance(layout, Square) else 0, **limits)
    # a square layout would distort an image, so it is pasted onto a grey square
    return fit(image, layout.size) if isinstance(layout, Square) else image


def _read_image(key: str, file: Path, layout: Layout, prompt: str) -> Sample:
    return Sample(key, {"prompt": prompt}, b"", read_image(file, layout))


def _of_split(index: Index, prompt: str | None, *, image: bool) -> Iterator[Request]:
    """One request per sample of a split, also for those that a truncated shard lacks."""
    for shard in index.shards:
        raws = islice(read_tar(shard.path), shard.count)
        for number, raw in zip_longest(range(shard.count), raws, fillvalue={}):
            yield raw.get("__key__", f"{shard.path.name}#{number}"), partial(_decode, raw, prompt, image)


def _decode(raw: dict[str, Any], prompt: str | None, image: bool) -> Sample:
    sample = decode(raw, image=image)
    if sample is None:
        raise ImageProblem("damaged_sample")
    question = (sample.record.get("prompt") or "") if prompt is None else prompt
    if not question and image and prompt is None:  # a text model can write without a prompt
        raise ImageProblem("no_prompt")
    return replace(sample, record={"prompt": question})
