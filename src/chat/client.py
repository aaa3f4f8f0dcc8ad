"""Client of an OpenAI-compatible server: messages in, the text of a reply and its usage out.

    client = Client(base_url=..., key_env="OPENAI_API_KEY", model="...", parameters={...}, limits=Limits(...))
    async with client.session(), client.slot():
        text = await client.ask(messages, max_usage, call)      raises Unanswered(reason) where there is no usable reply

    attempt: server's pause -> budget -> rates -> one HTTP request -> reply | RetryableError: backoff, next attempt

The SDK sends and receives; its retries are off, as ours count and charge every attempt and coordinate all requests. The
key is read from the environment, and never appears in messages, attributes or logs of ours.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import openai
from aiohttp.http_exceptions import HttpProcessingError

from src.chat.budget import Budget
from src.chat.limits import Limits, Rate, backoff, retry_after
from src.distributed.parallel import world_size
from src.io.errors import UserError
from src.types import DEADLINE, FailedRound

POLL_S = 0.1  # how often a request that the budget has no room for looks for what others have returned
MIN_SECRET_CHARS = 12  # shorter keys are not redacted, as they may be plain words
MAX_BAD_REQUESTS = 3  # before the first reply of a server
MAX_MESSAGE_CHARS = 300  # of a server's error message
COUNTED = ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens")  # of a usage
_MODERATED = re.compile(r"content.?(policy|filter|management)|moderation|flagged|safety", re.IGNORECASE)
_TOO_LONG = re.compile(r"context.?(length|window)|too (long|many tokens)|maximum.{0,20}tokens", re.IGNORECASE)
# the SDK's transport lets through the errors of aiohttp that it has no name for
_CONNECTION_ERRORS = (openai.APIConnectionError, aiohttp.ClientError, HttpProcessingError, OSError, UnicodeError)
Messages = Sequence[Mapping[str, Any]]


class ChatError(FailedRound):
    """An error that no retry can fix: a wrong key, an unknown model, an empty account."""


class ServerDown(ChatError):
    """A server has been unreachable, failing or rejecting every request for longer than `give_up_s`."""


@dataclass(eq=False)
class Unanswered(ValueError):
    """There is no usable reply. retry: asking again in another round may help."""

    reason: str
    retry: bool = False


@dataclass(eq=False, kw_only=True)
class RetryableError(Unanswered):
    """A failed request that may succeed on a retry."""

    retry: bool = True
    detail: str = ""
    unavailable: bool = False  # the server cannot be reached, whatever the request
    sent: bool = True  # the request reached a server
    billed: bool = False  # the server may charge for a reply
    retry_after: float = 0.0  # seconds that the server asks the client to wait


@dataclass
class Call:
    """The requests about one thing: their replies, and the sum of their usage."""

    model: str = ""
    replies: list[str] = field(default_factory=list)
    usage: Counter[str] = field(default_factory=Counter)


class Client:
    """One server, one model. `counts`: replies, and errors by reason; `budget.spent`: the usage so far.

    parameters: fields of every request besides model and messages, see src/chat/profiles.py
    """

    def __init__(
        self, *, base_url: str | None, key_env: str | None, model: str, parameters: Mapping[str, Any], limits: Limits
    ) -> None:
        if key_env is not None and not re.fullmatch(r"[!-~]+", os.environ.get(key_env, "")):
            raise UserError(
                f"the environment variable {key_env} holds no key, or one with blanks or line breaks; key_env=null is "
                "for servers without one"
            )
        if fixed := parameters.keys() & {"model", "messages"}:
            raise UserError(f"extra: {min(fixed)!r} is not to be replaced; it holds further fields of a request")
        parts = urlsplit(base_url or "http://default")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise UserError(
                "base_url must begin with http:// or https:// and name a host, without a password (the key goes into "
                f"the variable of key_env), got {(base_url or '').rpartition('@')[2]!r}"
            )
        self._base_url, self._key_env, self._model = base_url, key_env, model
        self._parameters, self.limits = dict(parameters), limits
        self.budget = Budget(
            max_requests=limits.max_requests, max_tokens=limits.max_tokens, max_cost=limits.max_cost,
            prices=limits.prices,
        )  # fmt: skip
        self.counts: Counter[str] = Counter()
        self.trouble = ""  # the last error since the last reply
        self._failures = 0  # since the last reply
        self._failing_since = self._resume_at = 0.0  # seconds of `time.monotonic`
        self._sdk: openai.AsyncOpenAI | None = None
        self._sessions = 0

    @property
    def at_once(self) -> int:
        """The most requests of this process in flight."""
        return max(1, self.limits.concurrency // world_size())

    def body(self, messages: Messages) -> dict[str, Any]:
        return {"model": self._model, "messages": messages, **self._parameters}

    @asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        """Open connections, or share those of another session in this event loop; the last one closes them."""
        if self._sdk is None:
            http_client = openai.DefaultAioHttpClient()
            self._sdk = openai.AsyncOpenAI(
                api_key=self._key or "none", base_url=self._base_url, max_retries=0, http_client=http_client,
                timeout=None,  # `_send` limits a request as a whole, the SDK each of its parts
            )  # fmt: skip
            self._slots, self._finished = asyncio.Semaphore(self.at_once), asyncio.Event()
            self._requests = Rate(self.limits.requests_per_minute)
            self._tokens = Rate(self.limits.tokens_per_minute)
            self._fatal_error: ChatError | None = None  # why the session is finished; None: a deadline
            self._failures, self._resume_at = 0, 0.0  # errors of an earlier session say nothing about this one
        self._sessions += 1
        try:
            yield
        finally:
            self._sessions -= 1
            if not self._sessions:
                sdk, self._sdk = self._sdk, None
                await sdk.close()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Context for the requests about one thing, which `at_once` may enter. A ChatError in it ends the session."""
        async with self._slots:
            self._check_finished()
            try:
                yield
            except ChatError as error:
                self._fatal_error = self._fatal_error or error
                self.finish()
                raise

    def finish(self) -> None:
        """Send nothing more in this session: requests in flight complete, as they are billed; all other calls fail."""
        if self._sdk is not None:
            self._finished.set()

    async def ask(self, messages: Messages, max_usage: Mapping[str, float], call: Call, **parameters: Any) -> str:
        """The text of a reply, which is recorded in `call` together with all usage. Call it in a slot.

        max_usage: the most `prompt_tokens` and `completion_tokens` that one request may use
        parameters: fields of this request besides those of all

        Raises Unanswered or ChatError.
        """
        began, num_attempts, num_failed = time.monotonic(), 0, 0
        while True:
            try:
                while (pause := self._resume_at - time.monotonic()) > 0:
                    await self._sleep(pause)
                reply = await self._attempt(messages, max_usage, call, parameters)
                return reply.checked()
            except RetryableError as error:
                if self._record_failure(error) and error.unavailable:
                    began = time.monotonic()  # not the fault of this call: its deadline starts again
                else:
                    num_attempts += 1
                    num_failed += error.reason != "rate_limited"
                wait = error.retry_after + backoff(max(1, num_attempts))  # jitter, or all rejected return at once
                past_deadline = time.monotonic() + wait - began > self.limits.deadline_s
                if num_failed >= self.limits.attempts or past_deadline:
                    raise
            await self._sleep(wait)

    async def _attempt(
        self, messages: Messages, max_usage: Mapping[str, float], call: Call, parameters: Mapping[str, Any]
    ) -> Reply:
        """One HTTP request, within budget and rates. Its usage is charged, whatever becomes of it."""
        now, max_tokens = time.monotonic(), sum(max_usage.values())
        await self._sleep(max(self._requests.take(1, now), self._tokens.take(max_tokens, now)))
        while not self.budget.reserve(max_usage):
            if not self.budget.pending:
                raise Unanswered("budget", retry=True)
            await self._sleep(POLL_S)
        used = {"requests": 1, **{f"lost_{name}": value for name, value in max_usage.items()}}  # the worst case
        began = time.monotonic()
        try:
            reply = read_completion(await self._send(messages, parameters))
            estimate = {**max_usage, "completion_tokens": len(reply.text) // 3}
            usage = reply.usage or estimate  # some servers report none
            used = {"requests": 1, **usage, "seconds": round(time.monotonic() - began, 3)}
            if self.budget.prices:
                used["cost"] = self.budget.prices.cost(usage)
        except RetryableError as error:
            if not error.billed:
                used = {"requests": int(error.sent)}
            raise
        except (ChatError, Unanswered):
            used = {"requests": 1}
            raise
        finally:
            self.budget.settle(max_usage, used)
            used_tokens = sum(used.get(name, used.get(f"lost_{name}", 0)) for name in max_usage)
            self._tokens.give_back(max_tokens - used_tokens)
            call.usage.update(used)
        call.model = reply.model or call.model
        call.replies.append(reply.text)
        self.counts["answered"] += 1
        self._failures, self.trouble = 0, ""
        return reply

    async def _send(self, messages: Messages, parameters: Mapping[str, Any]) -> str:
        """POST one request; returns the body of the response. Raises RetryableError, Unanswered, ChatError."""
        assert self._sdk is not None
        create, payload = self._sdk.chat.completions.with_raw_response.create, list[Any](messages)
        fields = {**self._parameters, **parameters}
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                response = await create(model=self._model, messages=payload, extra_body=fields)
            return self._redacted(response.text)
        except TimeoutError:
            raise RetryableError("timeout", billed=True) from None
        except openai.APIStatusError as error:
            raise self._status_error(error) from None
        except _CONNECTION_ERRORS as error:
            cause, sent = error.__cause__ or error, True
            message = self._line(cause)
            while cause:
                sent, cause = sent and not isinstance(cause, aiohttp.ClientConnectorError), cause.__cause__
            raise RetryableError("connection", detail=message, unavailable=True, sent=sent, billed=sent) from None

    def _status_error(self, error: openai.APIStatusError) -> Exception:
        """The error that a status of 400 or more stands for."""
        status, message, wait = error.status_code, self._line(error), retry_after(error.response.headers)
        server = f"{self._server} ({message})"
        if status == 401 or (status == 403 and not _MODERATED.search(message)):
            name = f"the key in {self._key_env}" if self._key_env else "requests without a key (set key_env)"
            return ChatError(f"{name} is refused by {server}")
        if status == 402 or (status == 429 and error.code == "insufficient_quota"):
            return ChatError(f"the account is empty: {server}")
        if status == 404 or error.code == "model_not_found":
            return ChatError(f"there is no model {self._model}, or no such address: {server}")
        if status == 429:
            return RetryableError("rate_limited", detail=message, retry_after=wait)
        if status in (408, 409, 425) or status >= 500:
            away = status in (502, 503, 504)
            return RetryableError("server_error", detail=message, unavailable=away, retry_after=wait)
        if _MODERATED.search(message):
            return Unanswered("content_filter")
        if _TOO_LONG.search(message) or status == 413:
            return Unanswered("too_long")
        self.counts["bad_request"] += 1
        if not self.counts["answered"] and self.counts["bad_request"] >= MAX_BAD_REQUESTS:
            return ChatError(f"every request is rejected by {server}; see `profile`")
        return Unanswered("bad_request", retry=not self.counts["answered"])  # after a reply, this request is at fault

    def _record_failure(self, error: RetryableError) -> bool:
        """Count an error and pause all requests where it calls for it. Returns whether the server seems to be down.

        Raises ServerDown where it has been for too long.
        """
        now, limits, rate_limited = time.monotonic(), self.limits, error.reason == "rate_limited"
        self.counts[error.reason] += 1
        self.trouble = f"{error.reason}, {self._server} ({error.detail})".removesuffix(" ()")
        self._failing_since = self._failing_since if self._failures else now
        self._failures += 1
        elapsed, down = now - self._failing_since, self._failures >= limits.pause_after and not rate_limited
        if error.retry_after > limits.deadline_s:
            wait = f"{error.retry_after:.5g} s, longer than limits.deadline_s={limits.deadline_s:.0f}"
            raise ServerDown(f"the server asks to wait {wait}: {self.trouble}")
        if (rate_limited or down) and elapsed > limits.give_up_s:
            raise ServerDown(f"the server has not answered for {elapsed:.0f} s: {self.trouble}")
        pause = error.retry_after if rate_limited else limits.pause_s if down else 0.0
        self._resume_at = max(self._resume_at, now + pause)
        return down

    async def _sleep(self, seconds: float) -> None:
        """Sleep. Raises Unanswered or ChatError once the session is finished."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._finished.wait()
        self._check_finished()

    def _check_finished(self) -> None:
        if self._finished.is_set():
            fatal = self._fatal_error
            raise type(fatal)(str(fatal)) if fatal else Unanswered(DEADLINE, retry=True)

    @property
    def _server(self) -> str:
        """The server, and the proxy variables of the environment, for error messages."""
        proxies = [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]
        return f"{self._base_url or 'the default server'}{''.join(f', {name} is set' for name in proxies)}"

    @property
    def _key(self) -> str:
        return os.environ.get(self._key_env, "") if self._key_env else ""

    def _redacted(self, text: str) -> str:
        """The text without the key, which servers may echo."""
        return text.replace(self._key, "***") if len(self._key) >= MIN_SECRET_CHARS else text

    def _line(self, error: BaseException) -> str:
        """The message of an error, for one of ours: one line, without the key."""
        return self._redacted(" ".join(str(error).split()))[:MAX_MESSAGE_CHARS]


@dataclass(frozen=True)
class Reply:
    """One completion. problem: why the text is unusable, or empty; usage: token counts, empty where not reported."""

    text: str
    problem: str
    model: str
    usage: dict[str, int]

    def checked(self) -> str:
        """The text. Raises Unanswered where it is refused, filtered, cut off or empty."""
        if self.problem:
            raise Unanswered(self.problem, retry=self.problem in ("length", "empty"))
        return self.text


def read_completion(body: str) -> Reply:
    """The first choice in the body of a response. Raises RetryableError where there is none, even with status 200."""
    try:
        content = json.loads(body)
        if content.get("error"):
            raise RetryableError("server_error")
        if not (choices := content.get("choices")) or not choices[0]:
            raise RetryableError("no_choices", billed=True)
        message, finish = choices[0].get("message") or {}, choices[0].get("finish_reason")
        text = message.get("content") or ""
        if isinstance(text, list):  # some servers send parts
            text = "".join(part.get("text") or "" for part in text)
        text, usage = clean(text), content.get("usage") or {}
        for group in ("prompt_tokens_details", "completion_tokens_details"):
            usage = {**usage, **(usage.get(group) or {})}
    except RetryableError:
        raise
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError):  # of another form than a completion
        raise RetryableError("malformed_body", billed=True) from None
    counts = {name: usage[name] for name in COUNTED if isinstance(usage.get(name), int) and usage[name] > 0}
    ended = finish if finish in ("content_filter", "length") else "" if text.strip() else "empty"
    problem = "refusal" if message.get("refusal") else ended
    return Reply(text, problem, clean(str(content.get("model") or "")), counts if "prompt_tokens" in counts else {})


def clean(text: str) -> str:
    """Without lone surrogates, which JSON can escape but UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode("utf-8")
