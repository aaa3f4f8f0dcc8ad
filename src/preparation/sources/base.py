"""What all formats of annotations share: captions of an image, and how images, captions and questions are spelt."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from src.preparation.counts import Skip
from src.preparation.records import clean
from src.preparation.tables import IMAGE_FILE
from src.scenes.grammar import Swap

IMAGE_KEYS = ("image", "images", "image_path", "image_file", "image_name", "file_name", "filename", "img", "image_id")
BYTES_KEYS = ("binary", "image_bytes", "image_base64")
CAPTION_KEYS = ("captions", "caption", "sentences", "text", "output", "description", "comment")
ANSWER_KEYS = ("answer", "answers")  # of a question, which may stand under a key of captions
PROMPT_KEYS = ("prompt", "problem", "instruction", "question")
TURN_KEYS = ("conversations", "messages")
IMAGE_MARK = re.compile(r"\s*(?:<image>|<ImageHere>)\s*", re.IGNORECASE)
LONG = 1000  # characters: a longer name of an image is the image, as base64


@dataclass
class Caption:
    """A true text with swaps that make it false."""

    text: str
    swaps: list[Swap] = field(default_factory=list)


@dataclass
class Entry:
    """The captions of one image in one record. image: its name as the record spells it; data: of an image file."""

    image: str
    captions: list[Caption]
    prompt: str | None
    split: str | None
    place: str
    data: bytes | None = None


def caption_text(value: Any) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Skip("empty_caption")
    if not isinstance(value, str):
        raise Skip("caption_not_text")
    return clean(value).strip()


def question_text(value: Any) -> str | None:
    """A question without the mark of its only image; its line ends stay. None for an empty one."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise Skip("question_not_text")
    if len(IMAGE_MARK.findall(value)) > 1:
        raise Skip("several_images")
    return IMAGE_MARK.sub(lambda mark: "\n" if "\n" in mark[0] else " ", clean(value)).strip() or None


def has_image(record: Mapping[str, Any]) -> bool:
    """Whether some key is that of an image."""
    return any(key in record for key in (*IMAGE_KEYS, *BYTES_KEYS)) or bool(IMAGE_FILE.fullmatch(str(record.get("id"))))


def image_of(record: Mapping[str, Any]) -> tuple[str, bytes | None]:
    """(name, data of the image file) of the only image of a record; "" or None where it has none of these."""
    # 1. its name, which may come with the bytes
    value = next((record[key] for key in IMAGE_KEYS if record.get(key) not in (None, "", [])), None)
    if isinstance(value, list):
        if len({str(item) for item in value}) > 1:
            raise Skip("several_images")
        value = value[0]
    data = next((record[key] for key in BYTES_KEYS if isinstance(record.get(key), str | bytes)), None)
    if isinstance(value, dict):
        data, value = value.get("bytes") or data, value.get("path")
    elif isinstance(value, bytes) or (isinstance(value, str) and len(value) > LONG):
        data, value = value, next((record[key] for key in IMAGE_KEYS[2:] if record.get(key)), None)
    if value is None and isinstance(name := record.get("id"), str) and IMAGE_FILE.fullmatch(name):
        value = name
    # 2. both as they are used
    if isinstance(data, str):
        try:
            data = base64.b64decode(data.partition("base64,")[2] or data)
        except (ValueError, binascii.Error):
            raise Skip("broken_base64") from None
    if not isinstance(value, str | int) or isinstance(value, bool):
        value = None
    if (value is None and not data) or not isinstance(data, bytes | None):
        raise Skip("no_image")
    return clean(str(value if value is not None else "")).strip(), data or None
