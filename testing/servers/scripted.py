"""A server with just enough HTTP for a chat completion, which a test scripts and can make fail in any way.

    with Scripted(lambda request: reply("right")) as server:
        server.url, server.requests

A script gets each `Request` and returns what to send: an `Http`, or bytes that are sent unchanged before the connection
is closed.
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
    """A received request. number: from 0; at: seconds of `time.monotonic`"""

    number: int
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    at: float

    @property
    def text(self) -> str:
        """The texts of all messages, one per line."""
        contents = [message["content"] for message in self.body["messages"]]
        parts = [part for content in contents for part in ([content] if isinstance(content, str) else content)]
        return "\n".join(part if isinstance(part, str) else part.get("text", "") for part in parts)


@dataclass
class Http:
    """An HTTP response, sent after `delay` seconds."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0

    def encoded(self) -> bytes:
        headers = {"content-type": "application/json", "content-length": str(len(self.body)), **self.headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
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
    """An error in OpenAI's format. headers: for example `retry_after="1"`"""
    body = {"error": {"message": message, "type": "error", "code": code}}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Http(status, json.dumps(body).encode(), named)


class Scripted:
    """Context manager: the server in its own thread. `most` is the highest number of requests in flight."""

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
    """One connection, with one request after the other."""

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
        head, end, body = self.buffer.partition(END)
        if not end:
            return
        request_line, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        if len(body) < int(headers.get("content-length", 0)):
            return
        self.buffer = b""
        server = self.server
        request = Request(
            len(server.requests), request_line.split(" ")[1], headers, json.loads(body or b"{}"), time.monotonic()
        )
        server.requests.append(request)
        server.active += 1
        server.most = max(server.most, server.active)
        answer = server.script(request)
        delay = answer.delay if isinstance(answer, Http) else 0.0
        server._loop.call_at(self.began + delay, self._send, answer)  # the delay includes the server's own work

    def _send(self, answer: Http | bytes) -> None:
        self.server.active -= 1
        self.transport.write(answer.encoded() if isinstance(answer, Http) else answer)
        if isinstance(answer, bytes):
            self.transport.close()
