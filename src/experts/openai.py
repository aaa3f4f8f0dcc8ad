"""An expert behind any OpenAI-compatible server with a vision model: hosted, vLLM, SGLang, transformers serve.

    expert: {target: src.experts.openai.OpenAIExpert, model: o4-mini, profile: reasoning}

    draft -> messages (revise.md, image) -> client (limits, retries) -> reply -> edits
          -> repair: edits that cannot be placed (src/text/align.py) are sent back once -> Revision | Failure

An answer keeps the raw replies in `raw`, which `read_raw` parses again without a request. Edits that a repair does not
fix stay in the answer: the round drops and counts them by reason. `usage` sums all requests of a draft: tokens, cost
and seconds, and the edits that were `proposed`, `returned` (sent back) and `repaired`.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Any

from src.chat.client import Call, Client, ExpertError, Request
from src.chat.limits import Limits, ServerDown
from src.chat.profiles import Profile, choose
from src.chat.replies import RetryableError, Unanswered, read_body
from src.experts.prompt import BadImage, Messages, Picture, Words, again, first, show, tokens_of
from src.experts.reply import SCHEMA, UNREADABLE, UnreadableReply, read_reply
from src.io.errors import UserError
from src.text.align import locate
from src.text.tokenizer import Codec
from src.types import Draft, Edit, Expert, Failure, Revision

BETWEEN = "\x1e"  # between the replies in `raw`: ASCII's record separator
RESERVED_FIELDS = {"model", "messages", "n", "stream", "max_tokens", "max_completion_tokens", "response_format"}
DRAFTS_PER_REQUEST = 2  # drafts in progress for each request that may be in flight
PICTURE_MARK = "\0picture"  # placeholder of the data URL
MAX_INLINE_BYTES = 100_000  # a larger image is re-encoded outside the event loop
REPLY_TOKENS = 150  # of an average reply, for the estimate of a dry run
THOUGHT_TOKENS = 1000  # hidden tokens before the reply of a reasoning model


@dataclass(frozen=True)
class Estimate:
    """Expected cost of a run. `most_*`: the same with a repair for each draft and replies of the maximum length."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    most_requests: int
    most_tokens: int
    most_cost: float | None

    def __str__(self) -> str:
        cost, max_cost = (
            f", {value:.2f} dollars" if value is not None else "" for value in (self.cost, self.most_cost)
        )
        expected = f"{self.prompt_tokens:,} prompt tokens, {self.completion_tokens:,} completion tokens{cost}"
        at_most = f"at most {self.most_requests} requests, {self.most_tokens:,} tokens{max_cost}"
        return f"{self.requests} drafts: {self.requests} requests, {expected}\n{at_most}"


class OpenAIExpert(Expert):
    """Sends each draft to `model`, as many at once as `limits` allow.

    base_url: null for the default of the `openai` package (OPENAI_BASE_URL, or the hosted service)
    key_env: the environment variable that holds the key; null for a server without keys
    profile: what the model accepts, see src/chat/profiles.py; effort: of reasoning models, such as `low`
    image_side, detail: the longer side of the image in pixels, and the server's own hint (`low`, `high`)
    extra: server-specific fields of a request, such as {chat_template_kwargs: {enable_thinking: false}}
    max_completion_tokens: a longer reply is a failure, `length`, which a later round retries
    repair: how often unusable edits are sent back, 0 or 1
    """

    name, can_finish = "openai", True

    def __init__(
        self,
        *,
        codec: Codec,
        model: str,
        base_url: str | None = None,
        key_env: str | None = "OPENAI_API_KEY",
        profile: str | Profile = "auto",
        image_side: int = 1024,
        detail: str | None = None,
        temperature: float | None = None,
        effort: str | None = None,
        seed: int | None = None,
        extra: Mapping[str, Any] | None = None,
        max_completion_tokens: int = 2500,
        repair: int = 1,
        limits: Limits | None = None,
    ) -> None:
        for name, value in {"image_side": image_side, "max_completion_tokens": max_completion_tokens}.items():
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if repair not in (0, 1):
            raise UserError(f"repair must be 0 or 1, got {repair}")
        if not model:
            raise UserError("model must name one, got an empty string")
        if reserved := RESERVED_FIELDS & set(extra or ()):
            raise UserError(f"extra must not hold {', '.join(sorted(reserved))}: limits and answers depend on it")
        self._codec, self._model, self._repair = codec, model, repair
        self._image_side, self._detail = image_side, detail
        self._words = Words.load(any_length=codec.gap_id is not None)
        self._profile, self._reply_limit = choose(profile, model), max_completion_tokens
        self._sampling, self._extra = {"temperature": temperature, "effort": effort, "seed": seed}, dict(extra or {})
        limit = max_completion_tokens
        parameters = self._profile.parameters(limit=limit, sampling=self._sampling, name="revision", schema=SCHEMA)
        self._parameters = parameters | self._extra
        self._client = Client(base_url=base_url, key_env=key_env, model=model, limits=limits or Limits())

    @property
    def settings(self) -> dict[str, Any]:
        """What an answer depends on. No address or limit: the length of a reply only decides whether it fails."""
        return {
            "model": self._model,
            "words": self._words.digest,
            "image_side": self._image_side,
            "detail": self._detail,
            "output": self._profile.output,
            **self._sampling,
            "extra": self._extra,
            "repair": self._repair,
        }

    async def revise(self, drafts: Sequence[Draft]) -> AsyncIterator[tuple[str, Revision | Failure]]:
        """Yield (key, answer) for each draft, in order of completion. Raises ExpertError, ServerDown."""
        async with self._client.session():
            # backpressure: a caller that takes no answers stops new requests
            slots = asyncio.Semaphore(DRAFTS_PER_REQUEST * self._client.at_once)
            done: asyncio.Queue[asyncio.Task] = asyncio.Queue()
            pending: set[asyncio.Task] = set()

            async def start_all() -> None:
                for draft in drafts:
                    await slots.acquire()
                    task = asyncio.create_task(self._answer(draft))
                    pending.add(task)
                    task.add_done_callback(done.put_nowait)

            starter, error = asyncio.create_task(start_all()), None
            try:
                for _ in drafts:
                    task = await done.get()
                    pending.discard(task)
                    if task.exception() is None:
                        yield task.result()
                    else:
                        error = error or task.exception()
                        self._client.finish()  # requests in flight complete, as they are billed
                    slots.release()
                if error:
                    raise error
            finally:
                unfinished = [starter, *pending]
                for task in unfinished:
                    task.cancel()
                await asyncio.gather(*unfinished, return_exceptions=True)

    def session(self) -> AbstractAsyncContextManager[None]:
        """Connections for several calls of `revise` to share; otherwise each call opens its own."""
        return self._client.session()

    def finish(self) -> None:
        """Send nothing more in this round: open drafts fail with `deadline`. Call it in the event loop of `revise`."""
        self._client.finish()

    @property
    def trouble(self) -> str:
        """The last error of the server since its last reply, else empty."""
        return self._client.trouble

    def charge(self, usage: Mapping[str, float]) -> None:
        """Charge the budget with the usage of an earlier process of this run, as in an answer or a manifest.

        Raises UserError where a limit is too low to be shared by all processes.
        """
        self._client.check_processes()
        self._client.budget.charge(usage)

    def report(self) -> dict[str, Any]:
        """Requests of this process by outcome, and its spending."""
        return {"counts": dict(self._client.counts), "spent": dict(self._client.budget.spent)}

    def estimate(self, drafts: Sequence[Draft], *, total: int | None = None) -> Estimate:
        """Estimate the cost of `total` drafts like these. Nothing is sent."""
        total = len(drafts) if total is None else total
        sizes = [self._prompt_tokens(draft) for draft in drafts]
        prompts = round(sum(sizes) / max(1, len(sizes)) * total)
        replies = total * min(self._reply_limit, REPLY_TOKENS + THOUGHT_TOKENS * self._profile.thinks)
        num_requests = 1 + self._repair  # the most for one draft
        expected = {"prompt_tokens": prompts, "completion_tokens": replies}
        bound = {
            "prompt_tokens": prompts * num_requests + replies,
            "completion_tokens": self._reply_limit * total * num_requests,
        }
        prices = self._client.budget.prices
        cost, max_cost = (prices.cost(usage) if prices else None for usage in (expected, bound))
        return Estimate(total, prompts, replies, cost, total * num_requests, sum(bound.values()), max_cost)

    def body(self, draft: Draft) -> dict[str, Any]:
        """The body of the first request about a draft, for a batch file. Raises ValueError or BadImage."""
        if not draft.text.strip():
            raise ValueError("the draft is empty")
        picture = show(draft.image, self._image_side)
        messages = first(self._words, draft, picture=picture, detail=self._detail)
        return {"model": self._model, "messages": messages, **self._parameters}

    def reread(self, draft: Draft, answer: Revision | Failure) -> Revision | Failure:
        """Parse the replies of a journaled answer again. A failure without a complete reply stays as it is."""
        if isinstance(answer, Failure) and answer.reason not in UNREADABLE:
            return answer
        fields = {"raw": answer.raw, "model": answer.model, "usage": answer.usage, "attempts": answer.attempts}
        try:
            return Revision(read_raw(self._codec, draft, answer.raw), **fields)
        except UnreadableReply as error:
            return Failure(str(error), retry=True, **fields)

    def read(self, draft: Draft, body: Mapping[str, Any]) -> Revision | Failure:
        """The answer in a response body of a batch file; without a repair."""
        raw, usage = "", {}
        try:
            reply = read_body(json.dumps(body).encode())
            raw, usage = reply.text, {"requests": 1, **reply.usage}
            parsed = read_replies(self._codec, draft, [reply.checked()])
        except UnreadableReply as error:
            return Failure(str(error), retry=True, raw=raw, usage=usage)
        except (Unanswered, RetryableError) as error:
            return Failure(error.reason, getattr(error, "retry", True), raw=raw, usage=usage)
        return Revision(parsed.edits, raw, reply.model or self._model, {**usage, **parsed.counts})

    async def _answer(self, draft: Draft) -> tuple[str, Revision | Failure]:
        if not draft.text.strip():
            return draft.key, Failure("empty_draft")
        call = Call()
        try:
            return draft.key, await self._revision(draft, call)
        except BadImage:
            return draft.key, Failure("bad_image")
        except UnreadableReply as error:
            reason, retry = str(error), True
        except Unanswered as error:
            reason, retry = error.reason, error.retry
        raw, model = BETWEEN.join(call.replies), call.model or self._model
        return draft.key, Failure(reason, retry, raw, model, call.usage, call.attempts)

    async def _revision(self, draft: Draft, call: Call) -> Revision:
        """Send a draft, and unusable edits back once. Raises BadImage, UnreadableReply, and as `Client.ask`."""
        prompt: list[tuple[Messages, Picture | None]] = []  # of the first request, once it is built

        async def make_request() -> Request:
            if len(draft.image) > MAX_INLINE_BYTES:
                picture = await asyncio.to_thread(show, draft.image, self._image_side)
            else:
                picture = show(draft.image, self._image_side)
            mark = picture and replace(picture, url=PICTURE_MARK)
            prompt.append((first(self._words, draft, picture=mark, detail=self._detail), picture))
            return self._request(*prompt[0])

        replies = [await self._client.ask(make_request, call)]
        parsed = read_replies(self._codec, draft, replies)
        if parsed.problems and self._repair:
            problems = [(edit, reason, _length_hint(self._codec, edit, reason)) for edit, reason in parsed.problems]

            async def make_repair() -> Request:
                messages, picture = prompt[0]
                return self._request(again(self._words, messages, replies[0], problems), picture)

            call.add({"returned": len(parsed.problems)})
            try:
                replies.append(await self._client.ask(make_repair, call, first=True))
                parsed = read_replies(self._codec, draft, replies)
            except (Unanswered, ExpertError, ServerDown):
                call.add({"repair_failed": 1})  # the first reply stands; a fatal error shows again at the next request
        call.add(parsed.counts)
        raw = BETWEEN.join(call.replies)  # includes a repair that was cut off
        return Revision(parsed.edits, raw, call.model or self._model, call.usage, call.attempts)

    def _request(self, messages: Messages, picture: Picture | None) -> Request:
        """messages: with PICTURE_MARK for the data URL, which needs no escaping and is put in after json.dumps."""
        body = json.dumps({"model": self._model, "messages": messages, **self._parameters})
        body = body.replace(json.dumps(PICTURE_MARK), f'"{picture.url}"', 1) if picture else body
        expected = {"prompt_tokens": tokens_of(messages, picture), "completion_tokens": self._reply_limit}
        return Request(body.encode(), expected)

    def _prompt_tokens(self, draft: Draft) -> int:
        """Estimated prompt tokens of the first request about a draft."""
        try:
            picture = show(draft.image, self._image_side)
        except BadImage:
            picture = None
        return tokens_of(first(self._words, draft, picture=picture, detail=self._detail), picture)


@dataclass(frozen=True)
class ParsedReplies:
    """usable: edits that can be placed; problems: the others, with the reason; counts: edits by outcome."""

    usable: list[Edit]
    problems: list[tuple[Edit, str]]
    counts: Counter[str]

    @property
    def edits(self) -> tuple[Edit, ...]:
        return (*self.usable, *(edit for edit, _ in self.problems))


def read_raw(codec: Codec, draft: Draft, raw: str) -> tuple[Edit, ...]:
    """The edits of an answer's raw replies. Raises UnreadableReply."""
    return read_replies(codec, draft, raw.split(BETWEEN)).edits


def read_replies(codec: Codec, draft: Draft, replies: Sequence[str]) -> ParsedReplies:
    """Parse a reply, and the reply to a repair where there is one. Raises UnreadableReply for the first reply only.

    Each repaired edit replaces one that was sent back; the remaining problems are kept, to be counted by reason.
    """
    reading = read_reply(replies[0])
    usable, problems = placeable(codec, draft, reading.edits)
    counts = Counter(proposed=len(reading.edits), malformed_items=reading.malformed_items)
    if len(replies) > 1:
        try:
            extended, _ = placeable(codec, draft, [*usable, *read_reply(replies[1]).edits])
        except UnreadableReply:
            extended = usable
        repaired = extended[len(usable) :][: len(problems)]
        counts.update(repaired=len(repaired))
        usable, problems = [*usable, *repaired], problems[len(repaired) :]
    return ParsedReplies(usable, problems, +counts)


def placeable(codec: Codec, draft: Draft, edits: Sequence[Edit]) -> tuple[list[Edit], list[tuple[Edit, str]]]:
    """The edits that can be placed together, and the others with the reason. Earlier edits take precedence."""
    if not locate(codec, draft.token_ids, edits).rejected:
        return list(edits), []
    usable: list[Edit] = []
    problems: list[tuple[Edit, str]] = []
    for edit in edits:
        rejected = locate(codec, draft.token_ids, [*usable, edit]).rejected
        if rejected:
            problems.append((edit, next(iter(rejected))))
        else:
            usable.append(edit)
    return usable, problems


def _length_hint(codec: Codec, edit: Edit, reason: str) -> str:
    """For `unequal_length`: the number of tokens on both sides of an edit; else empty."""
    if reason != "unequal_length":
        return ""
    org, target = (len(codec.encode(f" {text}")[0]) for text in (edit.org, edit.target))
    return f"; `org` is about {org} tokens long, `target` {target}; find words of the same length"
