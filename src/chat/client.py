"""Requests to an OpenAI-compatible server, within limits, until there is a reply or a reason why there is none.

    client = Client(base_url=..., key_env="OPENAI_API_KEY", model="...", limits=Limits(...))
    async with client.session():
        text = await client.ask(make_request, call)          Unanswered(reason) where the draft has to do without

    gate -> breaker -> budget -> pace -> one HTTP request -> reply | trouble: backoff, from the gate again

The SDK's own retries are not used: they know nothing of each other, and together fail against a rate limiter. What no
request can mend (a wrong key, an unknown model, an empty account) raises ExpertError at once; a server that stays down,
or refuses all requests for as long, raises ServerDown. The key is read from the environment, and is in no message,
attribute or log of ours.
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
from src.chat.limits import RECHECK_S, ROW, Breaker, Clock, Gate, Limits, Pace, ServerDown, backoff, retry_after
from src.chat.link import Link, body_of, check_address
from src.chat.replies import Trouble, Unanswered, read_body, read_error
from src.distributed.parallel import world
from src.io.errors import UserError
from src.types import DEADLINE, FailedRound

NO_KEY = "none"  # for servers that ask for no key; the SDK wants one
AGAIN = (408, 409, 425)  # of the 4xx, those that may be tried again
DOWN = (502, 503, 504)
SECRET = 12  # characters of the shortest key that is kept out of texts
TRIES = 3  # requests that a server may refuse before it has answered any
_MODERATED = re.compile(r"content.?(policy|filter|management)|moderation|flagged|safety", re.IGNORECASE)
_LONG = re.compile(r"context.?(length|window)|too (long|many tokens)|maximum.{0,20}tokens", re.IGNORECASE)


class ExpertError(FailedRound):
    """What no further request can mend."""


@dataclass
class Request:
    """body: JSON; expected: the greatest use of tokens, `prompt_tokens` and `completion_tokens`."""

    body: bytes
    expected: Mapping[str, float]


@dataclass
class Call:
    """What asking about one draft took: HTTP requests, replies, and the sums of the usage that was told of them."""

    attempts: int = 0
    model: str = ""
    replies: list[str] = field(default_factory=list)
    usage: dict[str, float] = field(default_factory=dict)

    def add(self, more: Mapping[str, float]) -> None:
        for name, value in more.items():
            self.usage[name] = self.usage.get(name, 0) + value


class Client:
    """One server, one model. `counts`: replies, and troubles by reason; `budget.spent`: what was used so far."""

    def __init__(self, *, base_url: str | None, key_env: str | None, model: str, limits: Limits) -> None:
        if key_env is not None and not os.environ.get(key_env):
            raise UserError(f"the environment variable {key_env} holds no key; key_env=null is for servers without one")
        key = os.environ.get(key_env, "") if key_env else ""
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"the key in {key_env} holds characters that no key has, such as the end of a line")
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
        self._row = self._closings = 0  # since the last answer: 429s, and how often all had to wait
        self._row_began = 0.0
        self._link: Link | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._users = 0
        self.trouble = ""  # since the last answer
        self._over = False  # no further request of this session is sent
        self._hopeless: ExpertError | ServerDown | None = None  # why, if it is not a deadline
        self._waiting: set[asyncio.Task] = set()  # calls that have no request under way

    @asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        """Connections, shared by all who are in a session of this event loop, and closed by the last one."""
        loop = asyncio.get_running_loop()
        if self._link is None or self._loop is not loop:
            self._link, self._loop, self._users = Link.open(self._base_url, self._key), loop, 0
            self._over, self._hopeless = False, None
            self._row = self._closings = 0  # what came before a pause says nothing of now
            self._breaker.answered()
            gc.freeze()  # a collection that looks at all of PyTorch's objects stops the answers for a quarter second
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
        """The text of a reply. make: called once there is room; first: go ahead of requests that were never sent.

        Raises Unanswered, or ExpertError or ServerDown: then no call sends anything more, but requests that are under
        way come to their end, as they are paid.
        """
        task = asyncio.current_task()
        assert task is not None
        self._waiting.add(task)
        try:
            return await self._ask(make, call, first)
        except asyncio.CancelledError:
            if not self._over:
                raise
            task.uncancel()
            raise self._reason() from None
        except (ExpertError, ServerDown) as error:
            if self._over and not self._hopeless:
                raise Unanswered(DEADLINE, retry=True) from None
            self._hopeless = self._hopeless or error
            self.finish()
            raise
        finally:
            self._waiting.discard(task)

    def finish(self) -> None:
        """Send no more in this session: what is under way comes to its end, all other calls end with `deadline`."""
        if not self._over:
            self._over = True
            for task in self._waiting - {asyncio.current_task()}:
                task.cancel()

    def _reason(self) -> Exception:
        """Why nothing more is sent."""
        return type(self._hopeless)(str(self._hopeless)) if self._hopeless else Unanswered(DEADLINE, retry=True)

    async def _ask(self, make: Callable[[], Awaitable[Request]], call: Call, first: bool) -> str:
        failures, began, request = 0, None, None
        while True:
            if self._over:
                raise self._reason()
            await self._gate.enter(first=first)
            try:
                await self._breaker.ready()
                request = request or await make()
                began = self._clock.now() if began is None else began
                return await self._attempt(request, call)
            except Trouble as trouble:
                down, found = self._note(trouble), trouble
            finally:
                self._gate.leave()
            first = True
            if down and found.elsewhere:
                began = None  # the draft has nothing to do with it
            elif not found.limited:
                failures += 1
            wait = backoff(max(1, failures), self._random, asked=found.wait)
            over = began is not None and self._clock.now() + wait - began > self._limits.deadline_s
            if failures >= self._limits.attempts or over or self._over:
                raise Unanswered(found.reason, retry=True)
            await self._clock.sleep(wait)

    def check_processes(self) -> None:
        """Raise UserError where there is less of something than processes that share it."""
        self._limits.check_processes()

    @property
    def at_once(self) -> int:
        """Requests of this process that may be under way at once."""
        return max(1, self._limits.concurrency // world())

    @cached_property
    def _gate(self) -> Gate:
        return Gate(self.at_once)  # at the first request: the processes are known by then

    @property
    def _where(self) -> str:
        """The server, and the proxy that the environment names."""
        proxies = [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]
        return f"{self._base_url or 'the default server'}{''.join(f', {name} is set' for name in proxies)}; "

    async def _attempt(self, request: Request, call: Call) -> str:
        """One HTTP request, within budget and pace. Raises Trouble, Unanswered, ExpertError."""
        while (aside := self.budget.reserve(request.expected)) is None:
            if not self.budget.pending:
                raise Unanswered("budget", retry=True)
            await self._clock.sleep(RECHECK_S)  # others may give back some of what was put aside for them
        expected = sum(request.expected.values())
        usage: Mapping[str, float] = {}  # what the budget is charged with
        sent = False
        try:
            await self._requests.take(1)
            await self._tokens.take(expected)
            usage, began, sent = request.expected, self._clock.now(), True  # until something else is known
            call.attempts += 1
            call.add({"requests": 1})
            data, headers = await self._send(request.body)
            seconds = self._clock.now() - began
            reply = read_body(self._redacted(data.decode("utf-8", "replace")).encode())
            guessed = {**request.expected, "completion_tokens": len(reply.text) // 3}  # where the server does not count
            usage = reply.usage or guessed
            call.add({**usage, "seconds": round(seconds, 3)} | self._cost(usage))
            call.model = reply.model or call.model
            call.replies.append(reply.text)
            self._answered(headers)
            return reply.checked()
        except Trouble as trouble:
            # a reply that was lost on the way may have to be paid all the same
            usage = request.expected if trouble.billed else {}
            call.add({f"lost_{name}": tokens for name, tokens in usage.items()})
            if trouble.unsent:
                sent = False
                call.attempts -= 1
                call.add({"requests": -1})
            raise
        except (ExpertError, Unanswered):
            usage = usage if usage is not request.expected else {}
            raise
        finally:
            self.budget.settle(aside, usage, sent=sent)
            self._tokens.settle(expected, sum(usage.get(name, 0) for name in request.expected))

    def _cost(self, usage: Mapping[str, float]) -> dict[str, float]:
        return {"cost": self.budget.prices.cost(usage)} if self.budget.prices else {}

    async def _send(self, body: bytes) -> tuple[bytes, Mapping[str, str]]:
        task = asyncio.current_task()
        assert self._link is not None
        assert task is not None
        self._waiting.discard(task)
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                found = await self._link.connections.post(self._link.url, data=body, **self._link.settings)
                data = await body_of(found)
        except TimeoutError:
            raise Trouble("timeout", billed=True) from None
        except (aiohttp.ClientError, HttpProcessingError, OSError, UnicodeError) as error:
            unsent, why = isinstance(error, aiohttp.ClientConnectorError), self._redacted(" ".join(str(error).split()))
            raise Trouble("connection", elsewhere=True, billed=not unsent, unsent=unsent, why=why) from None
        finally:
            self._waiting.add(task)
        if found.status >= 400:
            self._refused(found.status, found.headers, data)
        return data, found.headers

    def _refused(self, status: int, headers: Mapping[str, str], body: bytes) -> NoReturn:
        """What a status of 400 or more means."""
        message, code = read_error(body)
        told = self._redacted(f"{status}: {message}")
        where = f"{self._base_url or 'the default server'} ({told})"
        if status == 401 or (status == 403 and not _MODERATED.search(told)):
            name = f"the key in {self._key_env}" if self._key_env else "requests without a key (set key_env)"
            raise ExpertError(f"{name} is refused by {where}")
        if status == 402 or (status == 429 and code == "insufficient_quota"):
            raise ExpertError(f"the account is empty, says {where}")
        if status == 404 or code == "model_not_found":
            raise ExpertError(f"there is no model {self._model}, or no such address: {where}")
        if status == 429:
            self._requests.heed(headers, "requests")
            self._tokens.heed(headers, "tokens")
            raise Trouble("rate_limited", limited=True, wait=retry_after(headers))
        if status in AGAIN or status >= 500:
            raise Trouble("server_error", elsewhere=status in DOWN, wait=retry_after(headers))
        if _MODERATED.search(f"{told} {code}"):
            raise Unanswered("content_filter")
        if _LONG.search(told) or status == 413:
            raise Unanswered("too_long")
        self.counts["bad_request"] += 1
        if not self.counts["answered"] and self.counts["bad_request"] >= TRIES:
            raise ExpertError(f"no request is understood by {where}; see `profile`")
        raise Unanswered("bad_request", retry=not self.counts["answered"])  # else it is about this draft

    def _answered(self, headers: Mapping[str, str]) -> None:
        self.counts["answered"] += 1
        self.trouble = ""
        self._row = self._closings = 0
        self._gate.answered()
        self._breaker.answered()
        self._requests.heed(headers, "requests")
        self._tokens.heed(headers, "tokens")

    def _note(self, trouble: Trouble) -> bool:
        """Count a trouble and slow down; whether the server seems to be down."""
        self.counts[trouble.reason] += 1
        self.trouble = f"{trouble.reason}, {self._where}{trouble.why}".rstrip("; ")
        if trouble.limited or trouble.elsewhere or trouble.reason == "timeout":  # it may be too much for the server
            self._gate.refused()
        if not trouble.limited:
            return self._breaker.failed(f"{trouble.reason} ({self._where}{trouble.why})")
        now = self._clock.now()
        self._row_began = self._row_began if self._row else now
        self._row += 1
        if trouble.wait > self._limits.deadline_s:
            asks = f"asks to wait {trouble.wait:.5g} s, longer than limits.deadline_s={self._limits.deadline_s:.0f}"
            raise ServerDown(f"the expert's server {asks}")
        if now - self._row_began > self._limits.give_up_s:
            raise ServerDown(f"the expert's server has refused all requests for {now - self._row_began:.0f} s")
        if self._row >= ROW and not self._requests.closed:
            self._closings += 1
            self._requests.close(trouble.wait or backoff(self._closings, self._random))
        return False

    @property
    def _key(self) -> str:
        return os.environ.get(self._key_env, NO_KEY) if self._key_env else NO_KEY

    def _redacted(self, text: str) -> str:
        """Without the key, which servers may echo; a short one is no secret, and may be a word."""
        key = self._key
        return text.replace(key, "***") if len(key) >= SECRET else text
