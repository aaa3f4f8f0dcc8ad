"""The HTTP side of the server: /v1/chat/completions, /v1/models, /health.

    Host and key -> body within its limit -> `Chat` -> sampler, image, prompt within their limits -> `Engine`
    -> a completion, or server-sent events

Answers have no CORS headers and requests must be JSON, so a browser lets no page of another origin use the server;
that Host names this server keeps out pages whose own name was made to point here (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import base64
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
from src.generation.captioner import Caption, Captioner, noise_key
from src.generation.requests import read_image
from src.generation.writer import text_with_masks
from src.io.errors import UserError
from src.io.images import ImageProblem
from src.io.words import counted
from src.samplers.base import AnySampler
from src.serving.engine import Engine, Job
from src.serving.protocol import Chat, Refused, chunk, conversation, event, read_chat
from src.types import TraceStep

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # not all of Pillow's: some of them start other programs
DISCARDED = 8  # times the limit of a body that is read, so that its sender sees the answer
CLIENT_GONE = 499


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of a request: bytes of its body, pixels of its image, tokens of its prompt with those of the image, steps."""

    body_bytes: int = 2**24
    image_pixels: int = 25_000_000
    prompt_tokens: int = 4096
    steps: int = 1024


class Service:
    """What the paths of the server do.

    name: of the model, for clients; sampler, settings: of `Captioner.sampler`, for requests that say nothing else
    """

    def __init__(
        self, captioner: Captioner, engine: Engine, *, name: str, limits: Limits, sampler: str, settings: dict[str, Any]
    ) -> None:
        self.captioner, self.engine, self.name, self.limits = captioner, engine, name, limits
        self.default, self.settings = sampler, settings
        self.samplers = {sampler, *available(config_root("conf") / "sampler")}  # no paths: a request names no files
        self.sampler = lru_cache(maxsize=256)(self._sampler)
        self.sampler(None, None, None, None)  # a mistake of the config shows now

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": len(self.engine.waiting), **self.engine.counts})

    async def models(self, _: Request) -> Response:
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "rediff-lightning"}
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
            sampler = self.sampler(chat.sampler, chat.tokens_per_step, chat.steps, chat.temperature)
            sample, prompt_tokens = await asyncio.to_thread(self._read_sample, chat, sampler)
        except UserError as error:
            raise Refused(400, str(error), code="invalid_value") from error
        # 2. The answer.
        self.engine.submit(job := Job(sample=sample, sampler=sampler, seed=chat.seed, watched=chat.stream))
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        if chat.stream:
            stream = self._stream(chat, job, head, prompt_tokens)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        gone, done = (asyncio.ensure_future(task) for task in (request.receive(), job.events.get()))
        try:
            await asyncio.wait((gone, done), return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                return Response(status_code=CLIENT_GONE)
        finally:
            for task in (gone, done):
                task.cancel()
            self.engine.cancel(job)
        if isinstance(caption := done.result(), Refused):
            raise caption
        assert isinstance(caption, Caption)  # steps are for streams
        text, finish, usage = self._finish(chat, job, caption, prompt_tokens)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})

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

    def _sampler(
        self, name: str | None, tokens_per_step: int | None, steps: int | None, temperature: float | None
    ) -> AnySampler:
        if (name := name or self.default) not in self.samplers:
            raise UserError(f"no sampler {name!r} in conf/sampler")
        settings = dict(self.settings)
        if (steps, tokens_per_step) != (None, None):
            settings |= {"steps": steps, "tokens_per_step": tokens_per_step}
        if temperature is not None:
            settings["temperature"] = temperature
        sampler = self.captioner.sampler(name, **settings)
        if (num_steps := sampler.schedule.block_steps * sampler.schedule.blocks) > self.limits.steps:
            raise UserError(f"{num_steps:,} steps are more than the {self.limits.steps:,} allowed")
        return sampler

    def _read_sample(self, chat: Chat, sampler: AnySampler) -> tuple[Sample, int]:
        """The sample that a request describes, and its number of prompt tokens."""
        codec, vision = self.captioner.codec, self.captioner.backbone.vision
        system, turns, question, url = conversation(chat.messages, image=codec.prompt_format.image)
        image = None if url is None else self._read_image(url)
        tokens = len(codec.prompt_ids(question, images=int(image is not None), turns=turns, system=system))
        if image is not None and vision is not None:
            tokens += vision.layout.num_tokens(image.size, side=vision.side) - 1
        allowed = min(self.limits.prompt_tokens, (self.captioner.positions or 2**31) - sampler.length)
        if tokens > allowed:
            message = f"the prompt has {counted(tokens, 'token')}, more than the {allowed:,} allowed"
            raise Refused(400, message, code="context_length_exceeded", param="messages")
        record = {"prompt": question, "turns": turns, **({} if system is None else {"system": system})}
        return Sample(noise_key(image, question), record, b"", image), tokens

    def _read_image(self, url: str) -> Image.Image:
        kind, _, data = url.partition(";base64,")
        status, code, why = 400, "invalid_image", ""
        if not kind.startswith("data:"):
            code, why = "invalid_image_url", "an image must be a data: URL, as this server fetches nothing"
        elif (layout := self.captioner.backbone.layout) is None:
            why = "the model has no vision path, so it cannot read images"
        else:
            try:
                content = base64.b64decode(data, validate=True)
                return read_image(content, layout, max_pixels=self.limits.image_pixels, formats=FORMATS)
            except ValueError as error:
                why = f"the image is not base64: {error}"
            except ImageProblem as problem:
                why = f"the image cannot be read ({problem}); {', '.join(FORMATS)} can"
                if str(problem) == "image_too_large":
                    status, code = 413, str(problem)
                    why = f"the image has more than the {self.limits.image_pixels:,} pixels allowed"
        raise Refused(status, why, code=code, param="messages")

    async def _stream(self, chat: Chat, job: Job, head: dict[str, Any], prompt_tokens: int) -> AsyncIterator[bytes]:
        """Server-sent events. Clients join the texts, so one is sent once no later step can change it."""
        codec, num_sent, number = self.captioner.codec, 0, 0
        try:
            yield chunk(head, {"role": "assistant", "content": ""})
            while isinstance(step := await job.events.get(), TraceStep):
                number += 1
                if chat.trace:
                    text = text_with_masks(codec, step.tokens)
                    yield chunk(head, {}, trace={"step": number, "text": text, **asdict(step)})
                settled = step.tokens[: job.sampler.settled(step.tokens, codec.mask_id)][: chat.max_tokens]
                text = "".join(codec.pieces(settled) or ())  # None where a character is not complete yet
                if len(text) > num_sent:
                    yield chunk(head, {"content": text[num_sent:]})
                    num_sent = len(text)
            if isinstance(step, Refused):
                yield event(step.body)
                return
            text, finish, usage = self._finish(chat, job, step, prompt_tokens)
            if len(text) > num_sent:
                yield chunk(head, {"content": text[num_sent:]})
            yield chunk(head, {}, finish=finish)
            if chat.stream_options.include_usage:
                yield event({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"
        finally:
            self.engine.cancel(job)

    def _finish(self, chat: Chat, job: Job, caption: Caption, prompt_tokens: int) -> tuple[str, str, dict[str, int]]:
        """Text, OpenAI's `finish_reason`, and usage."""
        ids = caption.ids[: chat.max_tokens]
        finish = "length" if len(ids) < len(caption.ids) or len(caption.ids) == job.sampler.length else "stop"
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": len(ids),
            "total_tokens": prompt_tokens + len(ids),
        }
        usage |= {"forward_calls": caption.forward_calls, "edits": caption.edits}
        return self.captioner.codec.decode(ids), finish, usage


class Guard:
    """Middleware that refuses requests to another host name, or without the key. /health needs no key."""

    def __init__(self, app: ASGIApp, *, key: str | None, hosts: Collection[str]) -> None:
        self.app, self.key, self.hosts = app, key, {"localhost", *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, app = Headers(raw=scope.get("headers", [])), self.app
        key = headers.get("authorization", "").removeprefix("Bearer ")
        if not self._names_us(headers.get("host", "")):
            message = f"Host: {headers.get('host')} is not a name of this server; its setting `hosts` adds names"
            app = refusal(Refused(403, message, code="host_not_allowed"))
        elif self.key and scope["path"] != "/health" and not hmac.compare_digest(key.encode(), self.key.encode()):
            app = refusal(Refused(401, "a wrong key, or none", code="invalid_api_key"))
        await app(scope, receive, send)

    def _names_us(self, host: str) -> bool:
        """Whether a Host header is one of our names, or an address, which no one can make point elsewhere."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in self.hosts or bool(ipaddress.ip_address(name))
        except ValueError:
            return False


def refusal(refused: Refused) -> Response:
    return JSONResponse(refused.body, refused.status, {"retry-after": "1"} if refused.status == 429 else None)


def build_app(service: Service, *, key: str | None, hosts: Collection[str]) -> Starlette:
    """key: that clients must send, if any; hosts: names of this server besides localhost and addresses"""

    async def refuse(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            message = f"{error.detail}: the paths here are {', '.join(route.path for route in routes)}"
            error = Refused(error.status_code, message, code=error.detail.lower().replace(" ", "_"))
        return refusal(error if isinstance(error, Refused) else Refused(500, "the server failed", code="internal"))

    routes = [
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/models", service.models),
        Route("/health", service.health),
    ]
    guard = Middleware(Guard, key=key, hosts=hosts)
    handlers = dict.fromkeys((Refused, HTTPException, Exception), refuse)
    return Starlette(routes=routes, middleware=[guard], exception_handlers=handlers)
