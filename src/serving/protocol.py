"""OpenAI's chat-completions protocol: a request in; its parts, or an error in OpenAI's form, out.

    chat = read_chat(body)
    system, turns, question, url = conversation(chat.messages, image="<image>\n")

Fields of a request that this server does not know are refused, not ignored: an answer that silently disregards
`tools` would be wrong. Those that ask for what happens anyway (`n: 1`), or only label a request (`user`), may be sent.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from src.cli.instantiate import hint

LABELS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
NEUTRAL = {
    **{"n": 1, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "stop": [], "tools": []},
    **{"response_format": {"type": "text"}, "modalities": ["text"]},
}


class Refused(Exception):
    """A request that is not answered: the HTTP status, and the body with OpenAI's `code` and `param` of the error."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}
        kind = kinds.get(status, "invalid_request_error")
        self.status, self.body = status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Address(BaseModel):
    url: str


class Text(BaseModel):
    type: Literal["text"]
    text: str


class Picture(BaseModel):
    type: Literal["image_url"]
    image_url: Address


Part = Annotated[Text | Picture, Field(discriminator="type")]


def as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(as_parts)]


class StreamOptions(BaseModel):
    include_usage: bool = False


class Chat(BaseModel):
    """A request. steps, tokens_per_step, sampler: as in conf/generate.yaml, default the server's; trace: every step of
    a stream; max_tokens: of the text; the others are OpenAI's."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(None, ge=1, validation_alias=AliasChoices("max_completion_tokens", "max_tokens"))
    temperature: float | None = Field(None, ge=0, le=2)
    seed: int = 0
    steps: int | None = Field(None, ge=1)
    tokens_per_step: int | None = Field(None, ge=1)
    sampler: str | None = None
    trace: bool = False


def read_chat(body: bytes) -> Chat:
    """The request in a body. Raises Refused."""
    try:
        fields = dict(json.loads(body))
    except (ValueError, TypeError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON object: {error}", code="invalid_json") from error
    neutral = {name for name, value in fields.items() if name in NEUTRAL and NEUTRAL[name] == value}
    fields = {n: v for n, v in fields.items() if v is not None and n not in LABELS and n not in neutral}
    try:
        chat = Chat.model_validate(fields)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"]))
        message = f"{name}: {problem['msg']}"
        if problem["type"] == "extra_forbidden":
            message = f"{name}={json.dumps(fields[name])[:60]} is not supported{hint(name, Chat.model_fields)}"
        raise Refused(400, message, code="invalid_value", param=name) from error
    if chat.trace and not chat.stream:
        raise Refused(400, "trace is for streams: set stream to true", code="invalid_value", param="trace")
    return chat


def conversation(
    messages: Sequence[Message], *, image: str
) -> tuple[str | None, list[tuple[str, str]], str, str | None]:
    """System text if there is one, earlier (question, answer) pairs, the question, and the address of the image if any.

    image: stands in the text of the message that shows it. Raises Refused.
    """
    system, texts, urls = list[str](), list[str](), list[str]()
    for number, message in enumerate(messages):
        text = "".join(part.text for part in message.content if isinstance(part, Text))
        text = text.encode("utf-8", "replace").decode()  # JSON may hold half characters
        shown = [part.image_url.url for part in message.content if isinstance(part, Picture)]
        if message.role in ("system", "developer"):
            system.append(text)
        elif message.role != ("user", "assistant")[len(texts) % 2] or (shown and message.role == "assistant"):
            rule = "user and assistant must take turns, and only a user shows images"
            raise Refused(400, f"messages.{number}: {rule}", code="invalid_value", param="messages")
        else:
            texts.append(image * len(shown) + text)
            urls += shown
    if len(texts) % 2 == 0 or len(urls) > 1:
        rule = "the last message must be the user's, and all together show one image at most"
        raise Refused(400, rule, code="invalid_value", param="messages")
    turns = list[tuple[str, str]](zip(texts[:-1:2], texts[1::2], strict=True))
    return "\n\n".join(system) if system else None, turns, texts[-1], urls[0] if urls else None


def event(content: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(content)}\n\n".encode()


def chunk(head: dict[str, Any], delta: dict[str, Any], *, finish: str | None = None, **more: Any) -> bytes:
    """An event of a stream. head: its `id`, `created` and `model`; more: further fields"""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return event({**head, "object": "chat.completion.chunk", "choices": [choice], **more})
