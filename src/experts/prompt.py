"""What an expert model is asked: the words of revise.md, the image of a draft, and how many tokens that is.

words = Words.load()
first(words, draft, image_side=1024, detail="auto")      the messages of the first request
again(words, messages, reply, problems)                  those of the second, about edits that cannot be used
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
PLAIN_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}  # what every server reads
QUALITY = 90  # of a JPEG that was made smaller
CHARS_PER_TOKEN = 3.5  # of English and JSON; on the safe side
PIXELS_PER_TOKEN = 600  # 640x480 is about 500 tokens for a hosted model
WHY = {
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
    """Bytes that are no image."""


@dataclass(frozen=True)
class Picture:
    """An image as a data URL, and its size in pixels."""

    url: str
    width: int
    height: int


@dataclass(frozen=True)
class Words:
    """The templates of revise.md, and a hash of them and of the form that is asked for."""

    system: str
    question: Template
    repair: Template
    digest: str

    @classmethod
    def load(cls, path: str | Path = FILE, *, any_length: bool = False) -> Words:
        """Read a file with the sections of SECTIONS. any_length: whether an edit may change the number of tokens."""
        text = Path(path).read_text(encoding="utf-8")
        parts = re.split(r"^# (\w+)\n", text, flags=re.MULTILINE)[1:]
        if tuple(parts[::2]) != SECTIONS:
            raise UserError(f"{path} must have the sections {', '.join(SECTIONS)}, got {', '.join(parts[::2])}")
        told, same, free, question, repair = (part.strip() for part in parts[1::2])
        system = Template(told).substitute(lengths=free if any_length else same)
        digest = hashlib.sha256("\0".join((system, question, repair, json.dumps(SCHEMA))).encode()).hexdigest()[:16]
        return cls(system, Template(question), Template(repair), digest)


def first(words: Words, draft: Draft, *, picture: Picture | None, detail: str | None) -> Messages:
    """The messages that ask about a draft, with its image where there is one."""
    known = {"prompt": draft.prompt, "reference": draft.reference or "(none)", "draft": draft.text}
    content: list[dict[str, Any]] = [{"type": "text", "text": words.question.substitute(known)}]
    if picture:
        shown = {"url": picture.url} | ({"detail": detail} if detail else {})
        content.insert(0, {"type": "image_url", "image_url": shown})
    return [{"role": "system", "content": words.system}, {"role": "user", "content": content}]


def again(words: Words, messages: Messages, reply: str, problems: Sequence[tuple[Edit, str, str]]) -> Messages:
    """The messages that send edits back. problems: (edit, reason as in src/text/align.py, what else helps)"""
    told = [
        f"{number}. {_quoted(edit)}: {WHY.get(reason, reason)}{more}"
        for number, (edit, reason, more) in enumerate(problems, 1)
    ]
    asked = words.repair.substitute(problems="\n".join(told))
    return [*messages, {"role": "assistant", "content": reply}, {"role": "user", "content": asked}]


def show(image: bytes, side: int) -> Picture | None:
    """An encoded image, its longer side at most `side` pixels; as it is where it can be. None: there is none.

    Raises BadImage.
    """
    if not image:
        return None
    try:
        with Image.open(io.BytesIO(image)) as opened:
            size, kind = opened.size, PLAIN_TYPES.get(opened.format or "")
            if kind is None or max(size) > side:
                image, size = _smaller(opened, side)
                kind = "image/jpeg"
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImage(str(error)) from error
    return Picture(f"data:{kind};base64,{base64.b64encode(image).decode()}", *size)


def tokens_of(messages: Messages, picture: Picture | None) -> int:
    """About how many tokens a request has."""
    texts = (text for message in messages for text in _texts(message["content"]))
    pixels = picture.width * picture.height if picture else 0
    return int(sum(map(len, texts)) / CHARS_PER_TOKEN + pixels / PIXELS_PER_TOKEN) + 1


def _texts(content: str | Sequence[Mapping[str, Any]]) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def _smaller(opened: Image.Image, side: int) -> tuple[bytes, tuple[int, int]]:
    """A JPEG and its size."""
    upright = ImageOps.exif_transpose(opened)
    upright.thumbnail((side, side), Image.Resampling.LANCZOS)
    if upright.mode not in ("RGB", "L"):  # transparent places become white
        layered = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    stream = io.BytesIO()
    upright.save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue(), upright.size


def _quoted(edit: Edit) -> str:
    return f"`{edit.org}` -> `{edit.target}`"
