"""Client of an OpenAI-compatible server: requests within limits, retried until there is a reply or a final error.

    client = Client(base_url=..., key_env="OPENAI_API_KEY", model="...", limits=Limits(...))
    async with client.session():
        text = await client.ask(make_request, call)          raises Unanswered(reason) where this draft gets no reply

    gate -> breaker -> budget -> pace -> one HTTP request -> reply | RetryableError: backoff, back to the gate

The SDK's own retries are off: they do not coordinate, and together fail against a rate limiter. An error that no retry
can fix (wrong key, unknown model, empty account) raises ExpertError at once; a server that stays down, or rejects every
request for as long, raises ServerDown. The key is read from the environment and never appears in messages, attributes
or logs of ours.
"""

from __future__ import annotations

import asyncio
import gc
import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from typing import NoReturn

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from src.chat.budget import Budget
from src.chat.limits import MAX_429S, POLL_S, Breaker, Clock, Gate, Limits, Pace, ServerDown, backoff, retry_after
from src.chat.link import Link, check_address, read_response
from src.chat.replies import RetryableError, Unanswered, read_body, read_error
from src.distributed.parallel import world_size
from src.io.errors import UserError
from src.types import DEADLINE, FailedRound

NO_KEY = "none"  # for servers without keys; the SDK requires one
RETRYABLE_4XX = (408, 409, 425)
UNAVAILABLE_5XX = (502, 503, 504)
MIN_SECRET_CHARS = 12  # shorter keys are not redacted
MAX_BAD_REQUESTS = 3  # before the first reply of a server
_MODERATED = re.compile(r"content.?(policy|filter|management)|moderation|flagged|safety", re.IGNORECASE)
_TOO_LONG = re.compile(r"context.?(length|window)|too (long|many tokens)|maximum.{0,20}tokens", re.IGNORECASE)


class ExpertError(FailedRound):
    """An error that no retry can fix."""


@dataclass
class Request:
    """body: JSON; expected: its largest possible usage, `prompt_tokens` and `completion_tokens`."""

    body: bytes
    expected: Mapping[str, float]


@dataclass
class Call:
    """The HTTP requests about one draft: their number, their replies, and the sum of their usage."""

    attempts: int = 0
    model: str = ""
    replies: list[str] = field(default_factory=list)
    usage: dict[str, float] = field(default_factory=dict)

    def add(self, usage: Mapping[str, float]) -> None:
        for name, value in usage.items():
            self.usage[name] = self.usage.get(name, 0) + value


class Client:
    """One server, one model. `counts`: replies, and errors by reason; `budget.spent`: the usage so far."""

    def __init__(self, *, base_url: str | None, key_env: str | None, model: str, limits: Limits) -> None:
        if key_env is not None and not os.environ.get(key_env):
            raise UserError(f"the environment variable {key_env} holds no key; key_env=null is for servers without one")
        key = os.environ.get(key_env, "") if key_env else ""
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"the key in {key_env} holds characters that no key has, such as a line break")
        if base_url is not None:
            check_address(base_url)
        self._base_url, self._key_env, self._model, self._limits = base_url, key_env, model, limits
        self._clock, self._random = Clock(), Random()
        self._requests = Pace(limits.requests_per_minute, self._clock)
        self._tokens = Pace(limits.tokens_per_minute, self._clock)
        self._breaker = Breaker(
            after=limits.pause_after, pause_s=limits.pause_s, give_up_s=limits.give_up_s, clock=self._clock
        )
        self.budget = Budget(limits.max_requests, limits.max_tokens, limits.max_cost, limits.prices)
        self.counts: Counter[str] = Counter()
        self._consecutive_429s = self._pauses = 0  # since the last reply
        self._first_429_at = 0.0
        self._link: Link | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._users = 0
        self.trouble = ""  # the last error since the last reply
        self._finished = False  # no further request of this session is sent
        self._fatal_error: ExpertError | ServerDown | None = None  # why it finished; None: a deadline
        self._waiting: set[asyncio.Task] = set()  # calls without a request in flight

    @asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        """Open connections, or share those of another session in this event loop; the last one closes them."""
        loop = asyncio.get_running_loop()
        if self._link is None or self._loop is not loop:
            self._link, self._loop, self._users = Link.open(self._base_url, self._key), loop, 0
            self._finished, self._fatal_error = False, None
            self._consecutive_429s = self._pauses = 0  # errors of an earlier session say nothing about this one
            self._breaker.answered()
            gc.freeze()  # a collection that scans all of PyTorch's objects stalls the event loop for 0.25 s
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                link, self._link = self._link, None
                gc.unfreeze()
                await link.close()

    async def ask(self, make: Callable[[], Awaitable[Request]], call: Call, *, first: bool = False) -> str:
        """The text of a reply. make: builds the request once the gate is open; first: go ahead of the queue.

        Raises Unanswered, or ExpertError or ServerDown. The latter two finish the session: no call sends anything more,
        but requests in flight complete, as they are billed.
        """
        task = asyncio.current_task()
        assert task is not None
        self._waiting.add(task)
        try:
            return await self._ask(make, call, first)
        except asyncio.CancelledError:
            if not self._finished:
                raise
            task.uncancel()
            raise self._finish_error() from None
        except (ExpertError, ServerDown) as error:
            if self._finished and not self._fatal_error:
                raise Unanswered(DEADLINE, retry=True) from None
            self._fatal_error = self._fatal_error or error
            self.finish()
            raise
        finally:
            self._waiting.discard(task)

    def finish(self) -> None:
        """Send nothing more in this session: requests in flight complete, all other calls end with `deadline`."""
        if not self._finished:
            self._finished = True
            for task in self._waiting - {asyncio.current_task()}:
                task.cancel()

    def _finish_error(self) -> Exception:
        """The error of a call that can no longer send: a copy of the fatal error, or `deadline`."""
        if self._fatal_error:
            return type(self._fatal_error)(str(self._fatal_error))
        return Unanswered(DEADLINE, retry=True)

    async def _ask(self, make: Callable[[], Awaitable[Request]], call: Call, first: bool) -> str:
        failures, began, request = 0, None, None
        while True:
            if self._finished:
                raise self._finish_error()
            await self._gate.enter(first=first)
            try:
                await self._breaker.ready()
                request = request or await make()
                began = self._clock.now() if began is None else began
                return await self._attempt(request, call)
            except RetryableError as retryable:
                server_down, error = self._record_failure(retryable), retryable
            finally:
                self._gate.leave()
            first = True
            if server_down and error.unavailable:
                began = None  # not the fault of this draft: its deadline starts again
            elif not error.rate_limited:
                failures += 1
            wait = backoff(max(1, failures), self._random, minimum=error.retry_after)
            past_deadline = began is not None and self._clock.now() + wait - began > self._limits.deadline_s
            if failures >= self._limits.attempts or past_deadline or self._finished:
                raise Unanswered(error.reason, retry=True)
            await self._clock.sleep(wait)

    def check_processes(self) -> None:
        """Raise UserError where a limit is too low to be shared by all processes."""
        self._limits.check_processes()

    @property
    def at_once(self) -> int:
        """The most requests of this process in flight."""
        return max(1, self._limits.concurrency // world_size())

    @cached_property
    def _gate(self) -> Gate:
        return Gate(self.at_once)  # built at the first request, when the number of processes is known

    @property
    def _server(self) -> str:
        """The server, and the proxy variables of the environment, for error messages."""
        proxies = [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]
        return f"{self._base_url or 'the default server'}{''.join(f', {name} is set' for name in proxies)}; "

    async def _attempt(self, request: Request, call: Call) -> str:
        """One HTTP request, within budget and pace. Raises RetryableError, Unanswered, ExpertError."""
        while (reservation := self.budget.reserve(request.expected)) is None:
            if not self.budget.pending:
                raise Unanswered("budget", retry=True)
            await self._clock.sleep(POLL_S)  # requests in flight may return a part of their reservation
        expected = sum(request.expected.values())
        usage: Mapping[str, float] = {}  # charged to the budget
        sent = False
        try:
            await self._requests.take(1)
            await self._tokens.take(expected)
            usage, began, sent = request.expected, self._clock.now(), True  # the worst case, until there is a reply
            call.attempts += 1
            call.add({"requests": 1})
            data, headers = await self._send(request.body)
            seconds = self._clock.now() - began
            reply = read_body(self._redacted(data.decode("utf-8", "replace")).encode())
            estimate = {**request.expected, "completion_tokens": len(reply.text) // 3}
            usage = reply.usage or estimate  # some servers report no usage
            call.add({**usage, "seconds": round(seconds, 3)} | self._cost(usage))
            call.model = reply.model or call.model
            call.replies.append(reply.text)
            self._record_reply(headers)
            return reply.checked()
        except RetryableError as error:
            usage = request.expected if error.billed else {}  # a lost reply may be billed all the same
            call.add({f"lost_{name}": tokens for name, tokens in usage.items()})
            if error.unsent:
                sent = False
                call.attempts -= 1
                call.add({"requests": -1})
            raise
        except (ExpertError, Unanswered):
            usage = usage if usage is not request.expected else {}
            raise
        finally:
            self.budget.settle(reservation, usage, sent=sent)
            self._tokens.settle(expected, sum(usage.get(name, 0) for name in request.expected))

    def _cost(self, usage: Mapping[str, float]) -> dict[str, float]:
        return {"cost": self.budget.prices.cost(usage)} if self.budget.prices else {}

    async def _send(self, body: bytes) -> tuple[bytes, Mapping[str, str]]:
        """POST a body; returns the response's body and headers. While in flight, `finish` does not cancel the task."""
        task = asyncio.current_task()
        assert self._link is not None
        assert task is not None
        self._waiting.discard(task)
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                response = await self._link.connections.post(self._link.url, data=body, **self._link.settings)
                data = await read_response(response)
        except TimeoutError:
            raise RetryableError("timeout", billed=True) from None
        except (aiohttp.ClientError, HttpProcessingError, OSError, UnicodeError) as error:
            unsent = isinstance(error, aiohttp.ClientConnectorError)
            detail = self._redacted(" ".join(str(error).split()))
            raise RetryableError(
                "connection", unavailable=True, billed=not unsent, unsent=unsent, detail=detail
            ) from None
        finally:
            self._waiting.add(task)
        if response.status >= 400:
            self._raise_for_status(response.status, response.headers, data)
        return data, response.headers

    def _raise_for_status(self, status: int, headers: Mapping[str, str], body: bytes) -> NoReturn:
        """Raise the error that a status of 400 or more stands for."""
        message, code = read_error(body)
        message = self._redacted(f"{status}: {message}")
        server = f"{self._base_url or 'the default server'} ({message})"
        if status == 401 or (status == 403 and not _MODERATED.search(message)):
            name = f"the key in {self._key_env}" if self._key_env else "requests without a key (set key_env)"
            raise ExpertError(f"{name} is refused by {server}")
        if status == 402 or (status == 429 and code == "insufficient_quota"):
            raise ExpertError(f"the account is empty: {server}")
        if status == 404 or code == "model_not_found":
            raise ExpertError(f"there is no model {self._model}, or no such address: {server}")
        if status == 429:
            self._requests.apply_headers(headers, "requests")
            self._tokens.apply_headers(headers, "tokens")
            raise RetryableError("rate_limited", rate_limited=True, retry_after=retry_after(headers))
        if status in RETRYABLE_4XX or status >= 500:
            raise RetryableError(
                "server_error", unavailable=status in UNAVAILABLE_5XX, retry_after=retry_after(headers)
            )
        if _MODERATED.search(f"{message} {code}"):
            raise Unanswered("content_filter")
        if _TOO_LONG.search(message) or status == 413:
            raise Unanswered("too_long")
        self.counts["bad_request"] += 1
        if not self.counts["answered"] and self.counts["bad_request"] >= MAX_BAD_REQUESTS:
            raise ExpertError(f"every request is rejected by {server}; see `profile`")
        raise Unanswered("bad_request", retry=not self.counts["answered"])  # after a reply, the draft is at fault

    def _record_reply(self, headers: Mapping[str, str]) -> None:
        self.counts["answered"] += 1
        self.trouble = ""
        self._consecutive_429s = self._pauses = 0
        self._gate.answered()
        self._breaker.answered()
        self._requests.apply_headers(headers, "requests")
        self._tokens.apply_headers(headers, "tokens")

    def _record_failure(self, error: RetryableError) -> bool:
        """Count an error and slow down; returns whether the server seems to be down. Raises ServerDown."""
        self.counts[error.reason] += 1
        self.trouble = f"{error.reason}, {self._server}{error.detail}".rstrip("; ")
        if error.rate_limited or error.unavailable or error.reason == "timeout":  # the server may be overloaded
            self._gate.refused()
        if not error.rate_limited:
            return self._breaker.failed(f"{error.reason} ({self._server}{error.detail})")
        now = self._clock.now()
        self._first_429_at = self._first_429_at if self._consecutive_429s else now
        self._consecutive_429s += 1
        if error.retry_after > self._limits.deadline_s:
            raise ServerDown(
                f"the expert's server asks to wait {error.retry_after:.5g} s, "
                f"longer than limits.deadline_s={self._limits.deadline_s:.0f}"
            )
        if now - self._first_429_at > self._limits.give_up_s:
            raise ServerDown(f"the expert's server has refused all requests for {now - self._first_429_at:.0f} s")
        if self._consecutive_429s >= MAX_429S and not self._requests.closed:
            self._pauses += 1
            self._requests.close(error.retry_after or backoff(self._pauses, self._random))
        return False

    @property
    def _key(self) -> str:
        return os.environ.get(self._key_env, NO_KEY) if self._key_env else NO_KEY

    def _redacted(self, text: str) -> str:
        """The text without the key, which servers may echo; a short key is no secret, and may be a plain word."""
        key = self._key
        return text.replace(key, "***") if len(key) >= MIN_SECRET_CHARS else text
