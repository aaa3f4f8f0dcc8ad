"""OpenAI's chat-completions protocol: a request in; a completion, its chunks or an error out.

    chat = read_chat(body)                      raises Refused, whose `body` is an error in OpenAI's form
    system, turns, question, url = conversation(chat.messages, image="<image>\n")

Fields of a request that this server does not know are refused, not ignored: an answer that silently disregards
`tools` would be wrong. Those that ask for what happens anyway (`n: 1`), or only label a request (`user`), may be sent.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from src.cli.instantiate import hint

LABELS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
NEUTRAL = {
    "n": 1,
    "top_p": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logprobs": False,
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "stop": [],
    "tools": [],
}


class Refused(Exception):
    """A request that is not answered, with the HTTP status and OpenAI's `code` and `param` of its error."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        kind = "server_error" if status >= 500 else kind
        self.status, self.body = status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Address(BaseModel):
    url: str


class Part(BaseModel):
    type: Literal["text", "image_url"]
    text: str = ""
    image_url: Address | None = None


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]


class StreamOptions(BaseModel):
    include_usage: bool = False


class Chat(BaseModel):
    """A request. steps, tokens_per_step, sampler: as in conf/generate.yaml, default the server's; trace: every step of
    a stream; the others are OpenAI's."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    seed: int | None = None
    steps: int | None = Field(None, ge=1)
    tokens_per_step: int | None = Field(None, ge=1)
    sampler: str | None = None
    trace: bool = False

    @property
    def limit(self) -> int | None:
        """The most tokens of the text."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class Conversation(NamedTuple):
    """system: None if no message is of that role; turns: earlier (question, answer) pairs; url: of the image, if any"""

    system: str | None
    turns: list[tuple[str, str]]
    question: str
    url: str | None


def read_chat(body: bytes) -> Chat:
    """The request in a body. Raises Refused."""
    try:
        fields = json.loads(body)
        if not isinstance(fields, dict):
            raise ValueError("expected an object")
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}", code="invalid_json") from error
    neutral = {name for name, value in fields.items() if name in NEUTRAL and NEUTRAL[name] == value}
    fields = {n: v for n, v in fields.items() if v is not None and n not in LABELS and n not in neutral}
    try:
        chat = Chat.model_validate(fields)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"])
        message = f"{name}: {problem['msg']}"
        if problem["type"] == "extra_forbidden":
            suggestion = hint(name, Chat.model_fields)
            message = f"{name}={json.dumps(fields[name])[:60]} is not supported{suggestion}"
        raise Refused(400, message, code="invalid_value", param=name) from error
    if chat.trace and not chat.stream:
        raise Refused(400, "trace is for streams: set stream to true", code="invalid_value", param="trace")
    return chat


def conversation(messages: Sequence[Message], *, image: str) -> Conversation:
    """What the messages say. image: stands in the text of the message that the image is of. Raises Refused."""
    system, texts, urls = [], [], []
    for number, message in enumerate(messages):
        parts = [Part(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        text = "".join(part.text for part in parts).encode("utf-8", "replace").decode()  # JSON may hold half characters
        new = [part.image_url.url for part in parts if part.image_url]
        if message.role in ("system", "developer"):
            system.append(text)
            continue
        if message.role != ("user", "assistant")[len(texts) % 2] or (new and message.role == "assistant"):
            expected = "user and assistant must take turns, and only a user shows images"
            raise Refused(400, f"messages.{number}: {expected}", code="invalid_value", param="messages")
        texts.append(image * len(new) + text)
        urls += new
    if len(texts) % 2 == 0:
        raise Refused(400, "the last message must be the user's", code="invalid_value", param="messages")
    if len(urls) > 1:
        raise Refused(400, f"one image at most, got {len(urls)}", code="invalid_value", param="messages")
    turns = list(zip(texts[:-1:2], texts[1::2], strict=True))
    return Conversation("\n\n".join(system) if system else None, turns, texts[-1], urls[0] if urls else None)


def completion(head: dict[str, Any], text: str, *, finish: str, usage: dict[str, int]) -> dict[str, Any]:
    """head: `id`, `created` and `model`, as below"""
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
    return {**head, "object": "chat.completion", "choices": [choice], "usage": usage}


def chunk(head: dict[str, Any], delta: dict[str, Any] | None, *, finish: str | None = None, **more: Any) -> bytes:
    """A server-sent event. delta: None for a chunk without choices; more: further fields of the chunk"""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    choices = [] if delta is None else [choice]
    return event({**head, "object": "chat.completion.chunk", "choices": choices, **more})


def event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()
