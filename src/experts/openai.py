"""An expert behind any OpenAI-compatible server that shows images to a model: hosted, vLLM, SGLang, transformers serve.

    expert: {target: src.experts.openai.OpenAIExpert, model: o4-mini, profile: reasoning}

    draft -> messages (revise.md, image) -> client (limits, retries) -> reply -> edits
          -> those that cannot be placed (src/text/align.py) are sent back once -> Revision | Failure

An answer keeps the model's words in `raw`, so `read_raw` reads it again without a call. Edits that stay useless remain
in it: the round drops and counts them by reason. `usage` sums all requests of a draft; besides tokens, cost and seconds
it counts `proposed` edits, `returned` ones that were sent back, and `repaired` ones.
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
from src.chat.replies import Trouble, Unanswered, read_body
from src.experts.prompt import BadImage, Messages, Picture, Words, again, first, show, tokens_of
from src.experts.reply import SCHEMA, UNREADABLE, UnreadableReply, read_reply
from src.io.errors import UserError
from src.text.align import locate
from src.text.tokenizer import Codec
from src.types import Draft, Edit, Failure, Revision

BETWEEN = "\x1e"  # the replies in `raw`: ASCII's record separator
OURS = {"model", "messages", "n", "stream", "max_tokens", "max_completion_tokens", "response_format"}  # of a request
AHEAD = 2  # drafts that are under way for each request that may be
MARK = "\0picture"
IN_THREAD = 100_000  # bytes of an image from which on it is made smaller outside the event loop
REPLY_TOKENS = 150  # of an average reply, for a dry run
THOUGHT_TOKENS = 1000  # hidden tokens before it, of a model that thinks


@dataclass(frozen=True)
class Estimate:
    """What asking would take. `most`: with every draft sent back once and every reply as long as allowed."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    most_requests: int
    most_tokens: int
    most_cost: float | None


class OpenAIExpert:
    """Asks `model` about each draft, all drafts of a call at once as far as `limits` allow.

    base_url: null for the address that the `openai` package chooses (OPENAI_BASE_URL, or its maker's)
    key_env: the environment variable that holds the key; null for a server that wants none
    profile: what the model accepts, see src/chat/profiles.py; effort: of models that think, `low` for example
    image_side, detail: the longer side of the image in pixels, and the server's own hint (`low`, `high`)
    extra: more fields of a request, for one server only, such as {chat_template_kwargs: {enable_thinking: false}}
    max_completion_tokens: longer replies are a failure, `length`, which a later round asks about again
    repair: how often edits that cannot be used are sent back, 0 or 1
    """

    name = "openai"

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
            raise UserError("model must name one, got an empty text")
        if taken := OURS & set(extra or ()):
            raise UserError(f"extra must not hold {', '.join(sorted(taken))}: limits and answers depend on it")
        self._codec, self._model, self._repair = codec, model, repair
        self._image_side, self._detail = image_side, detail
        self._words = Words.load(any_length=codec.gap_id is not None)
        self._profile, self._reply_limit = choose(profile, model), max_completion_tokens
        self._given, self._extra = {"temperature": temperature, "effort": effort, "seed": seed}, dict(extra or {})
        limit = max_completion_tokens
        parameters = self._profile.parameters(limit=limit, given=self._given, name="revision", schema=SCHEMA)
        self._chosen = parameters | self._extra
        self._client = Client(base_url=base_url, key_env=key_env, model=model, limits=limits or Limits())

    @property
    def settings(self) -> dict[str, Any]:
        """What an answer depends on. Not the address, nor any limit: the length of a reply only decides if it fails."""
        return {
            "model": self._model,
            "words": self._words.digest,
            "image_side": self._image_side,
            "detail": self._detail,
            "output": self._profile.output,
            **self._given,
            "extra": self._extra,
            "repair": self._repair,
        }

    async def revise(self, drafts: Sequence[Draft]) -> AsyncIterator[tuple[str, Revision | Failure]]:
        """Yield (key, answer) for every draft, as they come. Raises ExpertError, ServerDown."""
        async with self._client.session():
            room = asyncio.Semaphore(AHEAD * self._client.at_once)  # answers that nobody takes stop the questions
            done: asyncio.Queue[asyncio.Task] = asyncio.Queue()
            asked: set[asyncio.Task] = set()

            async def ask_all() -> None:
                for draft in drafts:
                    await room.acquire()
                    task = asyncio.create_task(self._answer(draft))
                    asked.add(task)
                    task.add_done_callback(done.put_nowait)

            asking, wrong = asyncio.create_task(ask_all()), None
            try:
                for _ in drafts:
                    task = await done.get()
                    asked.discard(task)
                    if task.exception() is None:
                        yield task.result()
                    else:
                        wrong = wrong or task.exception()
                        self._client.finish()  # what is under way is paid: it comes to its end
                    room.release()
                if wrong:
                    raise wrong
            finally:
                rest = [asking, *asked]
                for task in rest:
                    task.cancel()
                await asyncio.gather(*rest, return_exceptions=True)

    def session(self) -> AbstractAsyncContextManager[None]:
        """Connections that several calls of `revise` share; without, each call opens its own."""
        return self._client.session()

    def finish(self) -> None:
        """Ask no more in this round; drafts without an answer fail with `deadline`. In the loop of `revise` only."""
        self._client.finish()

    @property
    def trouble(self) -> str:
        """What the server's last failure was, where it has not answered since; else empty."""
        return self._client.trouble

    def charge(self, usage: Mapping[str, float]) -> None:
        """Count what an earlier process of this run used; `usage` of an answer, or of a manifest.

        Raises UserError where a limit is too low to be shared by the processes, which are known by now.
        """
        self._client.check_processes()
        self._client.budget.charge(usage)

    def report(self) -> dict[str, Any]:
        """What this process did so far: requests by outcome, and what was spent."""
        return {"counts": dict(self._client.counts), "spent": dict(self._client.budget.spent)}

    def estimate(self, drafts: Sequence[Draft], *, total: int | None = None) -> Estimate:
        """What asking about `total` drafts like these would take. Nothing is sent."""
        total = len(drafts) if total is None else total
        asked = [self._expected(draft) for draft in drafts]
        prompts = round(sum(asked) / max(1, len(asked)) * total)
        replies = total * min(self._reply_limit, REPLY_TOKENS + THOUGHT_TOKENS * self._profile.thinks)
        times = 1 + self._repair
        most = {"prompt_tokens": prompts * times + replies, "completion_tokens": self._reply_limit * total * times}
        likely = {"prompt_tokens": prompts, "completion_tokens": replies}
        prices = self._client.budget.prices
        cost, most_cost = (prices.cost(usage) if prices else None for usage in (likely, most))
        return Estimate(total, prompts, replies, cost, total * times, sum(most.values()), most_cost)

    def body(self, draft: Draft) -> dict[str, Any]:
        """The body of the first request about a draft, for a batch file. Raises UserError for a damaged image."""
        if not draft.text.strip():
            raise ValueError("the draft is empty")
        picture = show(draft.image, self._image_side)
        messages = first(self._words, draft, picture=picture, detail=self._detail)
        return {"model": self._model, "messages": messages, **self._chosen}

    def reread(self, draft: Draft, answer: Revision | Failure) -> Revision | Failure:
        """A kept answer as its words are read now. One whose words were cut off, or never came, stays a failure."""
        if isinstance(answer, Failure) and answer.reason not in UNREADABLE:
            return answer
        kept = {"raw": answer.raw, "model": answer.model, "usage": answer.usage, "attempts": answer.attempts}
        try:
            return Revision(read_raw(self._codec, draft, answer.raw), **kept)
        except UnreadableReply as error:
            return Failure(str(error), retry=True, **kept)

    def read(self, draft: Draft, body: Mapping[str, Any]) -> Revision | Failure:
        """The answer in the body of a response that came by file. Nothing is sent back."""
        raw, usage = "", {}
        try:
            reply = read_body(json.dumps(body).encode())
            raw, usage = reply.text, {"requests": 1, **reply.usage}
            found = read_replies(self._codec, draft, [reply.checked()])
        except UnreadableReply as error:
            return Failure(str(error), retry=True, raw=raw, usage=usage)
        except (Unanswered, Trouble) as error:
            return Failure(error.reason, getattr(error, "retry", True), raw=raw, usage=usage)
        return Revision(found.edits, raw, reply.model or self._model, {**usage, **found.counts})

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
        asked: list[tuple[Messages, Picture | None]] = []

        async def question() -> Request:
            large = len(draft.image) > IN_THREAD
            shown = (show, draft.image, self._image_side)
            picture = await asyncio.to_thread(*shown) if large else show(*shown[1:])
            mark = picture and replace(picture, url=MARK)
            asked.append((first(self._words, draft, picture=mark, detail=self._detail), picture))
            return self._request(*asked[0])

        replies = [await self._client.ask(question, call)]
        found = read_replies(self._codec, draft, replies)
        if found.problems and self._repair:
            told = [(edit, reason, _length_told(self._codec, edit, reason)) for edit, reason in found.problems]

            async def repair() -> Request:
                messages, picture = asked[0]
                return self._request(again(self._words, messages, replies[0], told), picture)

            call.add({"returned": len(found.problems)})
            try:
                replies.append(await self._client.ask(repair, call, first=True))
                found = read_replies(self._codec, draft, replies)
            except (Unanswered, ExpertError, ServerDown):
                call.add({"repair_failed": 1})  # the first answer counts; what is wrong will be met again
        call.add(found.counts)
        raw = BETWEEN.join(call.replies)  # also of a repair that was cut short
        return Revision(found.edits, raw, call.model or self._model, call.usage, call.attempts)

    def _request(self, messages: Messages, picture: Picture | None) -> Request:
        """messages: with MARK in the place of the picture, as what needs no escaping need not be looked through."""
        body = json.dumps({"model": self._model, "messages": messages, **self._chosen})
        body = body.replace(json.dumps(MARK), f'"{picture.url}"', 1) if picture else body
        expected = {"prompt_tokens": tokens_of(messages, picture), "completion_tokens": self._reply_limit}
        return Request(body.encode(), expected)

    def _expected(self, draft: Draft) -> int:
        """Tokens of the first request about a draft."""
        try:
            picture = show(draft.image, self._image_side)
        except BadImage:
            picture = None
        return tokens_of(first(self._words, draft, picture=picture, detail=self._detail), picture)


@dataclass(frozen=True)
class Found:
    """What replies come to: edits, those that can be placed first; the others with the reason; how many were what."""

    usable: list[Edit]
    problems: list[tuple[Edit, str]]
    counts: Counter[str]

    @property
    def edits(self) -> tuple[Edit, ...]:
        return (*self.usable, *(edit for edit, _ in self.problems))


def read_raw(codec: Codec, draft: Draft, raw: str) -> tuple[Edit, ...]:
    """The edits of an answer that was kept. Raises UnreadableReply."""
    return read_replies(codec, draft, raw.split(BETWEEN)).edits


def read_replies(codec: Codec, draft: Draft, replies: Sequence[str]) -> Found:
    """Read a reply, and that to a repair where there is one. Raises UnreadableReply for the first.

    A repaired edit takes the place of one that was sent back; those without one stay, to be counted by reason.
    """
    read = read_reply(replies[0])
    usable, problems = placeable(codec, draft, read.edits)
    counts = Counter(proposed=len(read.edits), malformed_items=read.malformed_items)
    if len(replies) > 1:
        try:
            better, _ = placeable(codec, draft, [*usable, *read_reply(replies[1]).edits])
        except UnreadableReply:
            better = usable
        repaired = better[len(usable) :][: len(problems)]
        counts.update(repaired=len(repaired))
        usable, problems = [*usable, *repaired], problems[len(repaired) :]
    return Found(usable, problems, +counts)


def placeable(codec: Codec, draft: Draft, edits: Sequence[Edit]) -> tuple[list[Edit], list[tuple[Edit, str]]]:
    """The edits that can be placed all together, and the others with the reason; the first one wins."""
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


def _length_told(codec: Codec, edit: Edit, reason: str) -> str:
    """How many tokens both sides of an edit have, where that is what is wrong."""
    if reason != "unequal_length":
        return ""
    org, target = (len(codec.encode(f" {text}")[0]) for text in (edit.org, edit.target))
    return f"; `org` is about {org} tokens long, `target` {target}; find words of the same length"
