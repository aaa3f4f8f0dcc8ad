"""The body of a chat completion -> its text and usage, or what is wrong with it.

read_body(bytes) -> Reply          Trouble: the server's fault, ask again; Reply.checked: why the text is of no use
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST_TOKENS = 10**8  # that a usage may tell of; more is a mistake
LONGEST_MESSAGE = 300  # characters of a server's message
DETAILS = {"cached_tokens": "prompt_tokens_details", "reasoning_tokens": "completion_tokens_details"}


class Trouble(Exception):
    """A request that may succeed if it is made again.

    limited: refused by a rate limiter; elsewhere: the server cannot be reached, whatever is asked; billed: a reply may
    have been made; unsent: no server got the request; wait: seconds that the server asks for; why: in its own words
    """

    def __init__(
        self,
        reason: str,
        *,
        limited: bool = False,
        elsewhere: bool = False,
        billed: bool = False,
        unsent: bool = False,
        wait: float = 0.0,
        why: str = "",
    ) -> None:
        super().__init__(reason)
        self.reason, self.limited, self.elsewhere, self.billed = reason, limited, elsewhere, billed
        self.unsent, self.wait, self.why = unsent, wait, why


class Unanswered(Exception):
    """A draft to which there is no answer; `retry`: asking again in another round may help."""

    def __init__(self, reason: str, *, retry: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.retry = reason, retry


@dataclass(frozen=True)
class Reply:
    """What came back. usage: as far as the server says; finish: why the model stopped."""

    text: str
    finish: str
    refusal: bool
    model: str
    usage: dict[str, int]

    def checked(self) -> str:
        """The text. Raises Unanswered where the model did not get to the end of one."""
        if self.refusal:
            raise Unanswered("refusal")
        if self.finish == "content_filter":
            raise Unanswered("content_filter")
        if self.finish == "length":
            raise Unanswered("length", retry=True)
        if not self.text.strip():
            raise Unanswered("empty", retry=True)
        return self.text


def read_body(data: bytes) -> Reply:
    """The first choice of a completion. Raises Trouble where there is none: some servers say so with status 200."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise Trouble("malformed_body", billed=True) from None
    if not isinstance(body, dict):
        raise Trouble("malformed_body", billed=True)
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Trouble("server_error" if body.get("error") else "no_choices", billed=not body.get("error"))
    message = choices[0].get("message")
    message = message if isinstance(message, dict) else {}
    return Reply(
        text=_text(message.get("content")),
        finish=str(choices[0].get("finish_reason")),
        refusal=bool(message.get("refusal")),
        model=clean(str(body.get("model") or "")),
        usage=_usage(body.get("usage")),
    )


def read_error(data: bytes) -> tuple[str, str]:
    """The message of an error, short and in one line, and its code ("" where there is none)."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return _one_line(data.decode("utf-8", "replace")), ""
    told = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(told, dict):
        return _one_line(told), ""
    message = told.get("message") or told.get("detail") or told
    return _one_line(message), str(told.get("code") or "")


def _one_line(text: Any) -> str:
    return clean(" ".join(str(text).split()))[:LONGEST_MESSAGE]


def _text(content: Any) -> str:
    """Some servers give a list of parts."""
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return clean(content) if isinstance(content, str) else ""


def _usage(given: Any) -> dict[str, int]:
    """Tokens by kind; empty where the server does not count."""
    if not isinstance(given, dict) or not _count(given, "prompt_tokens"):
        return {}
    found = {name: _count(given, name) for name in ("prompt_tokens", "completion_tokens")}
    for name, group in DETAILS.items():
        if count := _count(given.get(group), name):
            found[name] = count
    return found


def _count(given: Any, name: str) -> int:
    value = given.get(name) if isinstance(given, Mapping) else None
    return value if isinstance(value, int) and 0 < value <= MOST_TOKENS else 0


def clean(text: str) -> str:
    """Without halves of characters, which JSON can spell but no file can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
