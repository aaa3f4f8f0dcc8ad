"""LLaVA, ShareGPT4V, InternLM: {"image", "conversations": [{"from", "value"}]}; LLaMA-Factory, OpenAI: {"images",
"messages": [{"role", "content"}]}. The first question and its answer are used."""

from __future__ import annotations

from typing import Any

from src.preparation.counts import Counts, Skip
from src.preparation.sources.base import IMAGE_MARK, Caption, caption_text

KEYS = ("conversations", "messages")
ROLES = {
    **dict.fromkeys(("human", "user"), "question"),
    **dict.fromkeys(("gpt", "bot", "assistant", "model"), "answer"),
    "system": "system",
}


def matches(record: dict) -> bool:
    return any(record.get(key) is not None for key in KEYS)


def parse(record: dict, place: str, counts: Counts) -> tuple[list[Caption], Any]:
    question, answer = first_turns(record, place, counts)
    return [Caption(caption_text(answer))], question


def first_turns(record: dict, place: str, counts: Counts) -> tuple[str, Any]:
    """The first question, "" if there is none, and its answer. Raises Skip for a system text, as it would be lost."""
    turns = next((record[key] for key in KEYS if record.get(key)), None)
    turns = [turn if isinstance(turn, dict) else {} for turn in (turns if isinstance(turns, list) else [])]
    roles = [ROLES.get(str(turn.get("from", turn.get("role"))).lower(), "unknown") for turn in turns]
    texts = [_plain(turn.get("value", turn.get("content"))) for turn in turns]
    systems = [text for role, text in zip(roles, texts, strict=True) if role == "system"]
    if any((*systems, record.get("system"), record.get("system_prompt"))):
        raise Skip("system_text")
    texts = [text for role, text in zip(roles, texts, strict=True) if role != "system"]
    roles = [role for role in roles if role != "system"]
    if "answer" not in roles:
        raise Skip("no_answer")
    if record.get("video") is not None:
        raise Skip("video")
    if roles[:2] != ["question", "answer"] and roles != ["answer"]:
        raise Skip("turns_out_of_order")
    marks = [isinstance(text, str) and bool(IMAGE_MARK.search(text)) for text in texts]
    if roles[0] == "question" and any(marks[2:]) and not marks[0]:
        raise Skip("image_in_later_turn")
    for _ in range(roles.count("answer") - 1):
        counts.skip("later_turns", place)
    return (texts[0] or "", texts[1]) if len(texts) > 1 else ("", texts[0])


def _plain(content: Any) -> Any:
    """The text of a turn; one in parts is joined, with the mark of an image for each image."""
    if not isinstance(content, list):
        return content
    parts = (part if isinstance(part, dict) else {"text": part} for part in content)
    is_image = lambda part: str(part.get("type")).startswith("image")  # noqa: E731
    return "".join("<image>" if is_image(part) else str(part.get("text") or "") for part in parts)
