"""The prompt of an expert model: the templates of revise.md, the image of a draft, and an estimate of its tokens.

words = Words.load()
first(words, draft, picture=show(draft.image, 1024), detail=None)      messages of the first request
again(words, messages, reply, problems)                                messages of the repair, for unusable edits
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from src.experts.reply import SCHEMA
from src.io.errors import UserError
from src.types import Draft, Edit

FILE = Path(__file__).with_name("revise.md")
SECTIONS = ("System", "Same", "Any", "Question", "Repair")
PLAIN_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}  # formats that every server reads
JPEG_QUALITY = 90  # of a downscaled image
CHARS_PER_TOKEN = 3.5  # of English and JSON; a conservative estimate
PIXELS_PER_TOKEN = 600  # 640x480 is about 500 tokens for a hosted model
PROBLEMS = {
    "absent": "`org` is not in the draft; copy it character by character",
    "ambiguous": "`org` is in the draft more than once; take in a neighbouring word",
    "no_change": "`target` changes nothing",
    "unequal_length": "`target` has another number of tokens",
    "unknown": "`target` has a character that the model cannot write",
    "overlap": "it overlaps with another edit",
    "misaligned": "it cannot be written as a replacement of whole tokens; take in the neighbouring words",
    "empty": "`org` is empty",
}
Messages = list[dict[str, Any]]


class BadImage(ValueError):
    """Raised for bytes that cannot be decoded as an image."""


@dataclass(frozen=True)
class Picture:
    """An image as a data URL, and its size in pixels."""

    url: str
    width: int
    height: int


@dataclass(frozen=True)
class Words:
    """The templates of revise.md, and a hash of them and of the reply's JSON schema."""

    system: str
    question: Template
    repair: Template
    digest: str

    @classmethod
    def load(cls, path: str | Path = FILE, *, any_length: bool = False) -> Words:
        """Read a file with the sections SECTIONS. any_length: whether an edit may change the number of tokens."""
        text = Path(path).read_text(encoding="utf-8")
        parts = re.split(r"^# (\w+)\n", text, flags=re.MULTILINE)[1:]
        if tuple(parts[::2]) != SECTIONS:
            raise UserError(f"{path} must have the sections {', '.join(SECTIONS)}, got {', '.join(parts[::2])}")
        system_template, same_length, free_length, question, repair = (part.strip() for part in parts[1::2])
        system = Template(system_template).substitute(lengths=free_length if any_length else same_length)
        digest = hashlib.sha256("\0".join((system, question, repair, json.dumps(SCHEMA))).encode()).hexdigest()[:16]
        return cls(system, Template(question), Template(repair), digest)


def first(words: Words, draft: Draft, *, picture: Picture | None, detail: str | None) -> Messages:
    """The messages of the first request about a draft, with its image where there is one."""
    fields = {"prompt": draft.prompt, "reference": draft.reference or "(none)", "draft": draft.text}
    content: list[dict[str, Any]] = [{"type": "text", "text": words.question.substitute(fields)}]
    if picture:
        image_url = {"url": picture.url} | ({"detail": detail} if detail else {})
        content.insert(0, {"type": "image_url", "image_url": image_url})
    return [{"role": "system", "content": words.system}, {"role": "user", "content": content}]


def again(words: Words, messages: Messages, reply: str, problems: Sequence[tuple[Edit, str, str]]) -> Messages:
    """The messages of a repair request. problems: (edit, reason as in src/text/align.py, hint)"""
    lines = [
        f"{number}. {_quoted(edit)}: {PROBLEMS.get(reason, reason)}{hint}"
        for number, (edit, reason, hint) in enumerate(problems, 1)
    ]
    repair = words.repair.substitute(problems="\n".join(lines))
    return [*messages, {"role": "assistant", "content": reply}, {"role": "user", "content": repair}]


def show(image: bytes, side: int) -> Picture | None:
    """An encoded image as a Picture; None where there is none. Raises BadImage.

    It is re-encoded only if its longer side exceeds `side` pixels or its format is not in PLAIN_TYPES.
    """
    if not image:
        return None
    try:
        with Image.open(io.BytesIO(image)) as opened:
            size, mime = opened.size, PLAIN_TYPES.get(opened.format or "")
            if mime is None or max(size) > side:
                image, size = _downscaled(opened, side)
                mime = "image/jpeg"
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImage(str(error)) from error
    return Picture(f"data:{mime};base64,{base64.b64encode(image).decode()}", *size)


def tokens_of(messages: Messages, picture: Picture | None) -> int:
    """Estimate of the tokens of a request."""
    texts = (text for message in messages for text in _texts(message["content"]))
    pixels = picture.width * picture.height if picture else 0
    return int(sum(map(len, texts)) / CHARS_PER_TOKEN + pixels / PIXELS_PER_TOKEN) + 1


def _texts(content: str | Sequence[Mapping[str, Any]]) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def _downscaled(opened: Image.Image, side: int) -> tuple[bytes, tuple[int, int]]:
    """The image as a JPEG of at most `side` pixels, and its size."""
    image = ImageOps.exif_transpose(opened)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    if image.mode not in ("RGB", "L"):  # transparent pixels become white
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue(), image.size


def _quoted(edit: Edit) -> str:
    return f"`{edit.org}` -> `{edit.target}`"
