"""The HTTP side of the server: /v1/chat/completions, /v1/models, /health.

    app = build_app(service, key=None, hosts=["localhost"])

    Host and key -> body within its limit -> `Chat` -> sampler, image, prompt within their limits -> `Engine`
    -> a completion, or server-sent events

Answers have no CORS headers and requests must be JSON, so a browser lets no page of another origin use the server;
that Host names this server keeps out pages whose own name was made to point here (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import time
import uuid
from collections.abc import AsyncIterator, Collection
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from PIL import Image
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from datamodules.shards import Sample
from src.cli.help import available, config_root
from src.generation.captioner import Captioner, noise_key
from src.generation.requests import read_image
from src.generation.writer import text_with_masks
from src.io.errors import UserError
from src.io.images import ImageProblem
from src.io.words import counted
from src.samplers.base import AnySampler
from src.serving.engine import Engine, Job, Written
from src.serving.protocol import Chat, Refused, chunk, completion, conversation, event, read_chat
from src.types import TraceStep

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # not all of Pillow's: some of them start other programs
DISCARDED = 8  # times the limit of a body that is read, so that its sender sees the answer
CLIENT_GONE = 499


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of a request: bytes of its body, pixels of its image, tokens of its prompt with those of the image, steps."""

    body_bytes: int
    image_pixels: int
    prompt_tokens: int
    steps: int


class Service:
    """What the paths of the server do.

    name: of the model, for clients; sampler, settings: of `Captioner.sampler`, for requests that say nothing else
    """

    def __init__(
        self, captioner: Captioner, engine: Engine, *, name: str, limits: Limits, sampler: str, settings: dict[str, Any]
    ) -> None:
        self.captioner, self.engine, self.name, self.limits = captioner, engine, name, limits
        self.default, self.settings, self.started = sampler, settings, int(time.time())
        self.samplers = {sampler, *available(config_root("conf") / "sampler")}  # no paths: a request names no files
        self.choose_sampler = lru_cache(maxsize=256)(self._choose_sampler)
        self.choose_sampler(None, None, None, None)  # a mistake of the config shows now

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": len(self.engine.waiting), **self.engine.counts})

    async def models(self, _: Request) -> Response:
        model = {"id": self.name, "object": "model", "created": self.started, "owned_by": "rediff-lightning"}
        return JSONResponse({"object": "list", "data": [model]})

    async def chat(self, request: Request) -> Response:
        # 1. The request, within all limits.
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise Refused(415, "the content type must be application/json", code="invalid_content_type")
        chat = read_chat(await self._read_body(request))
        self.engine.check_room()  # before an image is decoded in vain
        if chat.model != self.name:
            raise Refused(
                404, f"no model {chat.model!r} here, but {self.name!r}", code="model_not_found", param="model"
            )
        try:
            sampler = self.choose_sampler(chat.sampler, chat.tokens_per_step, chat.steps, chat.temperature)
            sample, prompt_tokens = await asyncio.to_thread(self._read_sample, chat, sampler)
        except UserError as error:
            raise Refused(400, str(error), code="invalid_value") from error
        # 2. The answer.
        job = self.engine.submit(sample, sampler, seed=chat.seed or 0, watched=chat.stream)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        if chat.stream:
            stream = self._stream(chat, job, head, prompt_tokens)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        written = await self._wait(job, request)
        if written is None:
            return Response(status_code=CLIENT_GONE)
        text, finish, usage = self._finish(written, chat.limit, prompt_tokens)
        return JSONResponse(completion(head, text, finish=finish, usage=usage))

    async def _read_body(self, request: Request) -> bytes:
        limit, size, body = self.limits.body_bytes, 0, bytearray()
        async for part in request.stream():
            size += len(part)
            if size <= limit:
                body += part
            elif size > DISCARDED * limit:
                break
        if size > limit:
            raise Refused(413, f"the body has more than the {limit:,} bytes allowed", code="body_too_large")
        return bytes(body)

    def _choose_sampler(
        self, name: str | None, tokens_per_step: int | None, steps: int | None, temperature: float | None
    ) -> AnySampler:
        if (name := name or self.default) not in self.samplers:
            raise Refused(400, f"no sampler {name!r} in conf/sampler", code="invalid_value", param="sampler")
        settings = dict(self.settings)
        if steps is not None or tokens_per_step is not None:
            settings |= {"steps": steps, "tokens_per_step": tokens_per_step}
        if temperature is not None:
            settings["temperature"] = temperature
        sampler = self.captioner.sampler(name, **settings)
        if (num_steps := sampler.schedule.block_steps * sampler.schedule.blocks) > self.limits.steps:
            message = f"{num_steps:,} steps are more than the {self.limits.steps:,} allowed"
            raise Refused(400, message, code="invalid_value", param="steps")
        return sampler

    def _read_sample(self, chat: Chat, sampler: AnySampler) -> tuple[Sample, int]:
        """The sample that a request describes, and its number of prompt tokens."""
        codec, vision = self.captioner.codec, self.captioner.backbone.vision
        dialogue = conversation(chat.messages, image=codec.prompt_format.image)
        image = None if dialogue.url is None else self._read_image(dialogue.url)
        record: dict[str, Any] = {"prompt": dialogue.question, "turns": dialogue.turns}
        if dialogue.system is not None:
            record["system"] = dialogue.system
        ids = codec.prompt_ids(
            dialogue.question, images=int(image is not None), turns=dialogue.turns, system=dialogue.system
        )
        tokens, positions = len(ids), self.captioner.positions or self.limits.prompt_tokens + sampler.length
        if image is not None and vision is not None:
            tokens += vision.layout.num_tokens(image.size, side=vision.side) - 1
        allowed = min(self.limits.prompt_tokens, positions - sampler.length)
        if tokens > allowed:
            message = f"the prompt has {counted(tokens, 'token')}, more than the {allowed:,} allowed"
            raise Refused(400, message, code="context_length_exceeded", param="messages")
        return Sample(noise_key(image, dialogue.question), record, b"", image), tokens

    def _read_image(self, url: str) -> Image.Image:
        kind, comma, data = url.partition(",")
        if not kind.startswith("data:"):
            refusal = "an image must be a data: URL, as this server fetches nothing"
            raise Refused(400, refusal, code="invalid_image_url", param="messages")
        if (layout := self.captioner.backbone.layout) is None:
            raise UserError("the model has no vision path, so it cannot read images")
        try:
            if not (comma and kind.endswith(";base64")):
                raise ValueError("expected data:image/...;base64,...")
            content = base64.b64decode(data, validate=True)
            return read_image(content, layout, max_pixels=self.limits.image_pixels, formats=FORMATS)
        except (binascii.Error, ValueError) as error:
            raise Refused(400, f"the image is not base64: {error}", code="invalid_image", param="messages") from error
        except ImageProblem as problem:
            if str(problem) == "image_too_large":
                message = f"the image has more than the {self.limits.image_pixels:,} pixels allowed"
                raise Refused(413, message, code="image_too_large", param="messages") from problem
            message = f"the image cannot be read ({problem}); {', '.join(FORMATS)} can"
            raise Refused(400, message, code="invalid_image", param="messages") from problem

    async def _wait(self, job: Job, request: Request) -> Written | None:
        """The response; None once its client is gone. Raises Refused."""
        gone, done = (asyncio.ensure_future(task) for task in (request.receive(), job.events.get()))
        try:
            await asyncio.wait((gone, done), return_when=asyncio.FIRST_COMPLETED)
            result = done.result() if done.done() else None
        finally:
            gone.cancel()
            done.cancel()
            self.engine.cancel(job)
        if isinstance(result, Refused):
            raise result
        return result if isinstance(result, Written) else None

    async def _stream(self, chat: Chat, job: Job, head: dict[str, Any], prompt_tokens: int) -> AsyncIterator[bytes]:
        """Server-sent events. Clients join the texts, so one is sent once no later step can change it."""
        codec, num_sent, number = self.captioner.codec, 0, 0
        yield chunk(head, {"role": "assistant", "content": ""})
        try:
            while isinstance(step := await job.events.get(), TraceStep):
                number += 1
                if chat.trace:
                    text = text_with_masks(codec, step.tokens)
                    yield chunk(head, {}, trace={"step": number, "text": text, **asdict(step)})
                settled = step.tokens[: job.sampler.settled(step.tokens, codec.mask_id)][: chat.limit]
                text = "".join(codec.pieces(settled) or ())  # None where a character is not complete yet
                if len(text) > num_sent:
                    yield chunk(head, {"content": text[num_sent:]})
                    num_sent = len(text)
            if isinstance(step, Refused):
                yield event(step.body)
                return
            text, finish, usage = self._finish(step, chat.limit, prompt_tokens)
            if len(text) > num_sent:
                yield chunk(head, {"content": text[num_sent:]})
            yield chunk(head, {}, finish=finish)
            if chat.stream_options.include_usage:
                yield chunk(head, None, usage=usage)
            yield b"data: [DONE]\n\n"
        finally:
            self.engine.cancel(job)

    def _finish(self, written: Written, limit: int | None, prompt_tokens: int) -> tuple[str, str, dict[str, int]]:
        """Text, OpenAI's `finish_reason`, and usage. limit: most tokens of the text"""
        codec, ids = self.captioner.codec, written.ids
        words = ids[: ids.index(codec.eot_id)] if codec.eot_id in ids else ids
        has_end = len(words) < len(ids) or codec.eos_id in ids
        cut = words[:limit]
        num_tokens = sum(token != codec.eos_id for token in cut)
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": num_tokens}
        usage |= {"total_tokens": prompt_tokens + num_tokens, "forward_calls": written.forward_calls}
        finish = "stop" if has_end and len(cut) == len(words) else "length"
        return codec.decode(cut), finish, {**usage, "edits": written.edits}


class Guard:
    """Middleware that refuses requests to another host name, or without the key. /health needs no key."""

    def __init__(self, app: ASGIApp, *, key: str | None, hosts: Collection[str]) -> None:
        self.app, self.key, self.hosts = app, key, {"localhost", *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, app = Headers(scope=scope), self.app
        if not self._names_us(headers.get("host", "")):
            message = f"Host: {headers.get('host')} is not a name of this server; the setting `hosts` adds names"
            app = refusal(Refused(403, message, code="host_not_allowed"))
        elif self.key and scope["path"] != "/health":
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self.key.encode()):
                app = refusal(Refused(401, "a wrong key, or none", code="invalid_api_key"))
        return await app(scope, receive, send)

    def _names_us(self, host: str) -> bool:
        """Whether a Host header is one of our names, or an address, which no one can make point elsewhere."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in self.hosts or bool(ipaddress.ip_address(name))
        except ValueError:
            return False


def refusal(refused: Refused) -> Response:
    headers = {"retry-after": "1"} if refused.status == 429 else None
    return JSONResponse(refused.body, refused.status, headers)


def build_app(service: Service, *, key: str | None, hosts: Collection[str]) -> Starlette:
    """key: that clients must send, if any; hosts: names of this server besides localhost and addresses"""

    async def refuse(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return refusal(Refused(error.status_code, error.detail, code=error.detail.lower().replace(" ", "_")))
        return refusal(error if isinstance(error, Refused) else Refused(500, "the server failed", code="internal"))

    routes = [
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/models", service.models),
        Route("/health", service.health),
    ]
    handlers = dict.fromkeys((Refused, HTTPException, Exception), refuse)
    return Starlette(routes=routes, middleware=[Middleware(Guard, key=key, hosts=hosts)], exception_handlers=handlers)
