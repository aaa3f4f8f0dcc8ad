"""The trace player: one page, without any network, that shows how texts were written, step by step.

    python -m src.generate ... out=plain.jsonl trace=true
    python -m src.generate ... out=refine.jsonl html=trace.html compare=plain.trace.jsonl

    .trace.jsonl files + images -> what each step changed, gzipped in base64 -> player.html, which replays it

`compare` stands on the left and may be of another sampler, checkpoint or tokenizer: a trace file holds the text of its
tokens. Sides are named after their files.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from PIL import Image

from src.cli.config import path_of
from src.generation.requests import Request, readable
from src.generation.writer import trace_line
from src.io.errors import UserError
from src.io.files import write_bytes
from src.text.tokenizer import Codec
from src.types import TraceStep

NUM_SHOWN = 16  # texts of a page, so that it stays small; the trace files have all of them
TINY = 64  # pixels; at this size JPEG's blocks show
PIXELS = 256  # longest side of an image on the page
SUFFIX = ".trace.jsonl"
UNMASKED, REWRITTEN, REMASKED = range(3)  # kinds of changes, as in player.html
TEMPLATE, TOKENS = Path(__file__).with_suffix(".html"), Path(__file__).with_name("tokens.css")


def page_paths(cfg: DictConfig) -> tuple[Path | None, list[Path]]:
    """The page that a config asks for, if any, and the trace file that it names for the left side.

    Raises UserError if that file cannot be used.
    """
    if cfg.compare is None:
        return None if cfg.html is None else path_of(cfg, "html"), []
    if cfg.html is None:
        raise UserError(f"compare={cfg.compare} is for a page: name one, as in html=trace.html")
    read_traces(path_of(cfg, "compare"))
    return path_of(cfg, "html"), [path_of(cfg, "compare")]


def write_page(path: Path, files: Sequence[Path], requests: Iterable[Request]) -> None:
    """Write the page of the texts that all trace files have among their first ones. Raises UserError if there is none.

    requests: those of the run, to take images and prompts from
    """
    sides = [read_traces(file) for file in files]
    keys = {key for key in sides[-1] if all(key in side for side in sides)}
    if not keys:
        names = " and ".join(map(str, files))
        raise UserError(f"{names} share no key among their first {NUM_SHOWN}: trace the same images into both")
    samples = readable((request for request in requests if request[0] in keys), unreadable=[])
    texts = [
        {
            "key": sample.key,
            "prompt": sample.record.get("prompt") or "",
            "image": sample.image and data_url(sample.image),
            "sides": [replay(side[sample.key]) for side in sides],
        }
        for sample in islice(samples, len(keys))
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, _fill([file.name.removesuffix(SUFFIX) for file in files], texts).encode())


def trace_page(codec: Codec, sides: Mapping[str, list[TraceStep]], image: Image.Image | None = None) -> str:
    """The page, as HTML, of the traces of one text by one or two names, such as for a notebook."""
    replayed = [replay(trace_line(codec, "", steps)) for steps in sides.values()]
    return _fill([*sides], [{"key": "", "prompt": "", "image": image and data_url(image), "sides": replayed}])


def _fill(names: list[str], texts: list[dict[str, Any]]) -> str:
    data = json.dumps({"names": names, "texts": texts}).encode()
    page = TEMPLATE.read_text(encoding="utf-8").replace("{{tokens}}", TOKENS.read_text(encoding="utf-8"))
    return page.replace("{{data}}", base64.b64encode(gzip.compress(data, mtime=0)).decode())


def read_traces(file: Path) -> dict[str, dict[str, Any]]:
    """The first lines of a trace file by key. Raises UserError if it is not one."""
    try:
        with file.open(encoding="utf-8") as stream:
            lines = [json.loads(line) for line in islice(stream, NUM_SHOWN)]
        return {line["key"]: line for line in lines if line["pieces"] and line["steps"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is no trace file of this version ({error!r}): `src.generate ... trace=true out=NAME.jsonl` writes "
            f"NAME{SUFFIX}"
        ) from error


def replay(trace: dict[str, Any]) -> dict[str, Any]:
    """A line of a trace file as the text before the first step, and what each step changed.

    `steps` are [forward calls so far, changes], changes are a flat list of position, new id, kind, confidence in
    percent. A later change of a position wins: a token that is rewritten and remasked in one step becomes the mask.
    """
    mask, first = trace["special"]["mask"], trace["steps"][0]
    start = list(first["tokens"])
    for position in first["unmasked"]:
        start[position] = mask
    for position, old, _ in first["rewritten"]:
        start[position] = old
    steps = []
    for step in trace["steps"]:
        changes: list[int] = []
        for position, confidence in zip(step["unmasked"], step["confidence"], strict=True):
            changes += (position, step["tokens"][position], UNMASKED, round(100 * confidence))
        for (position, _, new), confidence in zip(step["rewritten"], step["rewrite_confidence"], strict=True):
            changes += (position, new, REWRITTEN, round(100 * confidence))
        for position in step["remasked"]:
            changes += (position, mask, REMASKED, 0)
        steps.append([step["forwards"], changes])
    return {**trace["special"], "pieces": trace["pieces"], "start": start, "steps": steps}


def data_url(image: Image.Image) -> str:
    """A small JPEG of an image, or a PNG of one that is small already."""
    small, stream = image.copy(), io.BytesIO()
    small.thumbnail((PIXELS, PIXELS))
    kind = "png" if max(small.size) <= TINY else "jpeg"
    small.convert("RGB").save(stream, kind, quality=85, subsampling=0)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
