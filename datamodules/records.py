"""Validate the JSON record of a sample before it is collated.

why = misfit(record, images=1, count=lambda text: len(codec.encode(text)[0]) + 1)      None: the record is valid
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from src.text.prompt_format import IMAGE

Count = Callable[[str], int]


def misfit(record: Any, *, images: int, count: Count) -> str | None:
    """Why a record cannot be used; None if it can.

    images: number of images of the sample; count: number of tokens of a caption, with eot
    """
    if not isinstance(record, dict):
        return f"it is a {type(record).__name__}, not a mapping"
    prompt = record.get("prompt")
    if not isinstance(prompt, str):
        return f"its prompt is {prompt!r}"
    if prompt.count(IMAGE) > images:
        return f"its prompt holds {prompt.count(IMAGE)} image marks for {images} images"
    if "draft_ids" in record:
        return _draft_misfit(record)
    captions = record.get("captions")
    if not isinstance(captions, list) or not captions:
        return f"its captions are {captions!r}"
    return next((why for caption in captions if (why := _caption_misfit(caption, count))), None)


def _caption_misfit(caption: Any, count: Count) -> str | None:
    if not isinstance(caption, dict):
        return f"a caption is {caption!r}"
    text, ids, swaps = caption.get("text"), caption.get("ids"), caption.get("swaps", [])
    if ids is None and not (isinstance(text, str) and text.strip()):
        return f"the text of a caption is {text!r}"
    if ids is not None and not (_is_ids(ids) and ids):
        return "the ids of a caption are not a list of token ids"
    if not isinstance(swaps, list):
        return f"the swaps of a caption are {swaps!r}"
    length = count(str(text)) if swaps and ids is None else len(ids or ())
    for swap in swaps:
        fields = swap.get("tokens") if isinstance(swap, dict) else None
        if not isinstance(fields, list) or len(fields) != 3 or not _is_span(fields, length):
            return f"the swap {swap!r} does not fit a caption of {length} tokens"
    return None


def _draft_misfit(record: dict) -> str | None:
    ids, spans = record["draft_ids"], record.get("spans")
    if not (_is_ids(ids) and ids):
        return "its draft_ids are not a list of token ids"
    if not isinstance(spans, list):
        return f"its spans are {spans!r}"
    for span in spans:
        fields = [span.get(name) for name in ("start", "end", "target_ids")] if isinstance(span, dict) else [None] * 3
        if not _is_span(fields, len(ids)):
            return f"the span {span!r} does not fit a draft of {len(ids)} tokens"
    return None


def _is_span(fields: list, length: int) -> bool:
    """Whether (start, end, ids) is a half-open range within `length` tokens with one id per token."""
    start, end, ids = fields
    return type(start) is type(end) is int and 0 <= start < end <= length and _is_ids(ids) and len(ids) == end - start


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
