"""The body of a chat completion -> its text and token usage, or an error.

read_body(bytes) -> Reply          raises RetryableError where the server is at fault
reply.checked() -> text            raises Unanswered where the text is unusable
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_TOKENS = 10**8  # a larger token count in a usage is an error of the server
MAX_MESSAGE_CHARS = 300  # of a server's error message
DETAILS = {"cached_tokens": "prompt_tokens_details", "reasoning_tokens": "completion_tokens_details"}


class RetryableError(Exception):
    """A failed request that may succeed on a retry.

    rate_limited: rejected by a rate limiter
    unavailable: the server cannot be reached, whatever the request
    billed: the server may have generated a reply, and may charge for it
    unsent: the request reached no server
    retry_after: seconds that the server asks the client to wait
    detail: the error in its own words
    """

    def __init__(
        self,
        reason: str,
        *,
        rate_limited: bool = False,
        unavailable: bool = False,
        billed: bool = False,
        unsent: bool = False,
        retry_after: float = 0.0,
        detail: str = "",
    ) -> None:
        super().__init__(reason)
        self.reason, self.rate_limited, self.unavailable, self.billed = reason, rate_limited, unavailable, billed
        self.unsent, self.retry_after, self.detail = unsent, retry_after, detail


class Unanswered(Exception):
    """A draft without a usable reply. retry: asking again in another round may help."""

    def __init__(self, reason: str, *, retry: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.retry = reason, retry


@dataclass(frozen=True)
class Reply:
    """One completion. usage: token counts, empty where the server reports none; finish: its `finish_reason`."""

    text: str
    finish: str
    refusal: bool
    model: str
    usage: dict[str, int]

    def checked(self) -> str:
        """The text. Raises Unanswered where it is refused, filtered, cut off or empty."""
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
    """The first choice of a completion. Raises RetryableError where there is none, even with status 200."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise RetryableError("malformed_body", billed=True) from None
    if not isinstance(body, dict):
        raise RetryableError("malformed_body", billed=True)
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise RetryableError("server_error" if body.get("error") else "no_choices", billed=not body.get("error"))
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
    """The message of an error body, on one line and truncated, and its code ("" where there is none)."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return _one_line(data.decode("utf-8", "replace")), ""
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return _one_line(error), ""
    message = error.get("message") or error.get("detail") or error
    return _one_line(message), str(error.get("code") or "")


def _one_line(text: Any) -> str:
    return clean(" ".join(str(text).split()))[:MAX_MESSAGE_CHARS]


def _text(content: Any) -> str:
    """The text of a message; some servers send a list of parts."""
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return clean(content) if isinstance(content, str) else ""


def _usage(usage: Any) -> dict[str, int]:
    """Token counts by name; empty where the server reports none."""
    if not isinstance(usage, dict) or not _count(usage, "prompt_tokens"):
        return {}
    counts = {name: _count(usage, name) for name in ("prompt_tokens", "completion_tokens")}
    for name, group in DETAILS.items():
        if count := _count(usage.get(group), name):
            counts[name] = count
    return counts


def _count(usage: Any, name: str) -> int:
    value = usage.get(name) if isinstance(usage, Mapping) else None
    return value if isinstance(value, int) and 0 < value <= MAX_TOKENS else 0


def clean(text: str) -> str:
    """Without lone surrogates, which JSON can escape but UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode("utf-8")
