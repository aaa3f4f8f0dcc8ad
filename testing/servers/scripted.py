"""A server that speaks just enough HTTP for a chat completion, and breaks it in every way a test asks for.

    with Scripted(lambda request: reply("right")) as server:
        server.url, server.requests

A script gets each request (number from 0, path, headers, body, text) and returns what to send: an `Http`, bytes that go
out as they are before the connection is cut.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

END = b"\r\n\r\n"


@dataclass
class Request:
    """A request as it arrived. at: seconds of `time.monotonic`"""

    number: int
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    at: float

    @property
    def text(self) -> str:
        """All texts of the messages."""
        parts = [
            p
            for m in self.body["messages"]
            for p in ([m["content"]] if isinstance(m["content"], str) else m["content"])
        ]
        return "\n".join(p if isinstance(p, str) else p.get("text", "") for p in parts)


@dataclass
class Http:
    """An HTTP response, sent after `delay` seconds."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0

    def encoded(self) -> bytes:
        given = {"content-type": "application/json", "content-length": str(len(self.body)), **self.headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
        return f"HTTP/1.1 {self.status} X\r\n{head}\r\n".encode() + self.body


Script = Callable[[Request], "Http | bytes"]


def completion(content: Any, *, finish: str = "stop", tokens: tuple[int, int] = (700, 12), **message: Any) -> dict:
    """The body of a chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "served",
        "choices": [choice],
        "usage": usage,
    }


def reply(content: Any, *, delay: float = 0.0, headers: Mapping[str, str] | None = None, **more: Any) -> Http:
    return Http(200, json.dumps(completion(content, **more)).encode(), headers or {}, delay)


def error(status: int, message: str = "no", *, code: str | None = None, **headers: str) -> Http:
    """An error as OpenAI words it; headers: `retry_after="1"` for example."""
    body = {"error": {"message": message, "type": "error", "code": code}}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Http(status, json.dumps(body).encode(), named)


class Scripted:
    """A context manager: the server, in a thread of its own. `most`: the greatest number of requests at once."""

    def __init__(self, script: Script, *, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.script, self.port, self.tls = script, port, tls
        self.requests: list[Request] = []
        self.active = self.most = 0

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Scripted:
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> None:
        self._open: set[Connection] = set()
        self._server = await self._loop.create_server(lambda: Connection(self), "127.0.0.1", self.port, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        self._server.close()
        for connection in list(self._open):
            connection.transport.abort()
        await asyncio.sleep(0)


class Connection(asyncio.Protocol):
    """One connection; requests come one after the other."""

    transport: asyncio.Transport

    def __init__(self, server: Scripted) -> None:
        self.server, self.buffer, self.began = server, b"", 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.server._open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.server._open.discard(self)

    def data_received(self, data: bytes) -> None:
        self.began = self.began if self.buffer else self.server._loop.time()
        self.buffer += data
        head, found, rest = self.buffer.partition(END)
        if not found:
            return
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        if len(rest) < int(headers.get("content-length", 0)):
            return
        self.buffer = b""
        server = self.server
        request = Request(
            len(server.requests), first.split(" ")[1], headers, json.loads(rest or b"{}"), time.monotonic()
        )
        server.requests.append(request)
        server.active += 1
        server.most = max(server.most, server.active)
        answer = server.script(request)
        delay = answer.delay if isinstance(answer, Http) else 0.0
        server._loop.call_at(self.began + delay, self._send, answer)  # so the server's own work is part of the delay

    def _send(self, answer: Http | bytes) -> None:
        self.server.active -= 1
        self.transport.write(answer.encoded() if isinstance(answer, Http) else answer)
        if isinstance(answer, bytes):
            self.transport.close()
