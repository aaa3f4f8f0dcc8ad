"""The prompt of an expert model: the templates of revise.md, the image of a draft, and an estimate of its tokens.

prompt, picture = Prompt(codec), show(draft.image, 1024)
prompt.first(draft, picture)                    messages of the first request
prompt.repair(messages, reply, problems)        messages of the repair, for unusable edits
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from PIL import Image

from src.chat.client import Unanswered
from src.experts.reply import SCHEMA
from src.io.images import ImageProblem, load, shrink
from src.text.tokenizer import Codec
from src.types import Draft, Edit

FILE = Path(__file__).with_name("revise.md")
PLAIN_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}  # formats that every server reads
JPEG_QUALITY = 90  # of a downscaled image
CHARS_PER_TOKEN = 3.5  # of English and JSON; a conservative estimate
PIXELS_PER_TOKEN = 600  # 640x480 is about 500 tokens for a hosted model
PROBLEMS = {
    "absent": "`org` is not in the draft; copy it character by character",
    "ambiguous": "`org` is in the draft more than once; take in a neighbouring word",
    "no_change": "`target` changes nothing",
    "unequal_length": "`target` has another number of tokens; `org` is about {org} tokens long, `target` {target}; "
    "find words of the same length",
    "unknown": "`target` has a character that the model cannot write",
    "overlap": "it overlaps with another edit",
    "misaligned": "it cannot be written as a replacement of whole tokens; take in the neighbouring words",
    "empty": "`org` is empty",
}
Messages = list[dict[str, Any]]


class Picture(NamedTuple):
    """An image as a data URL, and its size in pixels."""

    url: str
    width: int
    height: int


class Prompt:
    """The templates of revise.md. `digest`: a hash of them and of the reply's JSON schema."""

    def __init__(self, codec: Codec, *, detail: str | None = None, path: Path = FILE) -> None:
        """detail: the server's own hint about images, `low` or `high`"""
        parts = [part.strip() for part in re.split(r"^# (\w+)\n", path.read_text("utf-8"), flags=re.MULTILINE)]
        sections = dict(zip(parts[1::2], parts[2::2], strict=True))
        lengths = sections["Same" if codec.gap_id is None else "Any"]
        self._codec, self._detail = codec, detail
        self._system = Template(sections["System"]).substitute(lengths=lengths)
        self._question, self._repair = Template(sections["Question"]), Template(sections["Repair"])
        texts = (self._system, sections["Question"], sections["Repair"], json.dumps(SCHEMA))
        self.digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]

    def first(self, draft: Draft, picture: Picture | None) -> Messages:
        """The messages of the first request about a draft, with its image where there is one."""
        fields = {"prompt": draft.prompt, "reference": draft.reference or "(none)", "draft": draft.text}
        content: list[dict[str, Any]] = [{"type": "text", "text": self._question.substitute(fields)}]
        if picture:
            image_url = {"url": picture.url} | ({"detail": self._detail} if self._detail else {})
            content.insert(0, {"type": "image_url", "image_url": image_url})
        return [{"role": "system", "content": self._system}, {"role": "user", "content": content}]

    def repair(self, messages: Messages, reply: str, problems: Sequence[tuple[Edit, str]]) -> Messages:
        """The messages of a repair request. problems: edits, each with the reason as in src/text/align.py"""
        lines = []
        for number, (edit, reason) in enumerate(problems, 1):
            sizes = {name: len(self._codec.encode(f" {getattr(edit, name)}")[0]) for name in ("org", "target")}
            lines.append(f"{number}. `{edit.org}` -> `{edit.target}`: {PROBLEMS[reason].format(**sizes)}")
        repair = self._repair.substitute(problems="\n".join(lines))
        return [*messages, {"role": "assistant", "content": reply}, {"role": "user", "content": repair}]


def show(image: bytes, side: int) -> Picture | None:
    """An encoded image as a Picture; None where there is none. Raises Unanswered where it cannot be decoded.

    It becomes a JPEG only if its longer side exceeds `side` pixels or its format is not in PLAIN_TYPES.
    """
    if not image:
        return None
    try:
        with Image.open(io.BytesIO(image)) as opened:
            size, mime = opened.size, PLAIN_TYPES.get(opened.format or "")
            if mime is None or max(size) > side:
                picture = shrink(load(image, size=side), side)
                stream = io.BytesIO()
                picture.save(stream, "JPEG", quality=JPEG_QUALITY)
                image, size, mime = stream.getvalue(), picture.size, "image/jpeg"
    except (ImageProblem, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unanswered("bad_image") from error
    return Picture(f"data:{mime};base64,{base64.b64encode(image).decode()}", *size)


def tokens_of(messages: Messages, picture: Picture | None) -> int:
    """Estimate of the tokens of a request."""
    characters = 0
    for content in (message["content"] for message in messages):
        texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
        characters += sum(map(len, texts))
    pixels = picture.width * picture.height if picture else 0
    return int(characters / CHARS_PER_TOKEN + pixels / PIXELS_PER_TOKEN) + 1
