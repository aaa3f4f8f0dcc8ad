"""An expert behind any OpenAI-compatible server with a vision model: hosted, vLLM, SGLang, transformers serve.

    expert: {target: src.experts.openai.OpenAIExpert, model: o4-mini, profile: reasoning}

    draft -> messages (revise.md, image) -> client (limits, retries) -> reply -> edits
          -> repair: edits that cannot be placed (src/text/align.py) are sent back once -> Revision | Failure

An answer keeps the raw replies in `raw`, which `read_replies` parses again without a request. Edits that a repair does
not fix stay in the answer: the round drops and counts them by reason. `usage` sums all requests of a draft: tokens,
cost and seconds, and the edits that were `proposed`, `returned` (sent back) and `repaired`.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from src.chat.budget import cost_text
from src.chat.client import Call, ChatError, Client, Unanswered, read_completion
from src.chat.limits import Limits
from src.chat.profiles import THOUGHT_TOKENS, Profile, choose
from src.experts.prompt import Prompt, show, tokens_of
from src.experts.reply import SCHEMA, UNREADABLE, read_reply
from src.io.errors import UserError
from src.io.words import counted
from src.text.align import locate
from src.text.tokenizer import Codec
from src.types import Draft, Edit, Expert, Failure, Revision

BETWEEN = "\x1e"  # between the replies in `raw`: ASCII's record separator
RESERVED_FIELDS = {"model", "messages", "n", "stream", "max_tokens", "max_completion_tokens", "response_format"}
DRAFTS_PER_REQUEST = 2  # drafts in progress for each request that may be in flight
REPLY_TOKENS = 150  # of an average reply, for the estimate of a dry run


class OpenAIExpert(Expert):
    """Sends each draft to `model`, as many at once as `limits` allow. The arguments: conf/expert/openai.yaml."""

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
        if repair not in (0, 1):
            raise UserError(f"repair must be 0 or 1, got {repair}")
        if reserved := RESERVED_FIELDS & set(extra or ()):
            raise UserError(f"extra must not hold {', '.join(sorted(reserved))}: limits and answers depend on it")
        self._codec, self._prompt = codec, Prompt(codec, detail=detail)
        self._image_side, self._repair, self._reply_limit = image_side, repair, max_completion_tokens
        self._profile, sampling = choose(profile, model), {"temperature": temperature, "effort": effort, "seed": seed}
        parameters = self._profile.parameters(
            limit=max_completion_tokens, sampling=sampling, name="revision", schema=SCHEMA
        )
        self.client = Client(
            base_url=base_url, key_env=key_env, model=model, parameters={**parameters, **(extra or {})},
            limits=limits or Limits(),
        )  # fmt: skip
        # what an answer depends on: no address or limit, as the length of a reply only decides whether it fails
        self.settings = {
            "model": model,
            "words": self._prompt.digest,
            "image_side": image_side,
            "detail": detail,
            "output": self._profile.output,
            **sampling,
            "extra": dict(extra or {}),
            "repair": repair,
        }

    async def revise(self, drafts: Sequence[Draft]) -> AsyncIterator[tuple[str, Revision | Failure]]:
        """Yield (key, answer) for each draft, in order of completion. Raises ChatError."""
        waiting, running, error = iter(drafts), set[asyncio.Task](), None
        async with self.client.session():
            try:
                while True:
                    # a caller that takes no answers stops new requests
                    while not error and len(running) < DRAFTS_PER_REQUEST * self.client.at_once:
                        if (draft := next(waiting, None)) is None:
                            break
                        running.add(asyncio.create_task(self._answer(draft)))
                    if not running:
                        break
                    done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        if not task.exception():
                            yield task.result()
                        else:
                            error = error or task.exception()  # requests in flight complete, as they are billed
                if error:
                    raise error
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    async def _answer(self, draft: Draft) -> tuple[str, Revision | Failure]:
        """Ask about a draft, and send unusable edits back once. Raises ChatError."""
        call, edits, failure = Call(), (), None
        try:
            if not draft.text.strip():
                raise Unanswered("empty_draft")
            async with self.client.slot():
                # 1. The first request.
                picture = await asyncio.to_thread(show, draft.image, self._image_side)
                messages, limit = self._prompt.first(draft, picture), {"completion_tokens": self._reply_limit}
                max_usage = {"prompt_tokens": tokens_of(messages, picture), **limit}
                replies = [await self.client.ask(messages, max_usage, call)]
                edits, problems, counts = read_replies(self._codec, draft, replies)
                # 2. The repair. Where it fails the first reply stands; a fatal error shows again at the next request.
                if problems and self._repair:
                    messages = self._prompt.repair(messages, replies[0], problems)
                    max_usage = {"prompt_tokens": tokens_of(messages, picture), **limit}
                    call.usage["returned"] = len(problems)
                    try:
                        replies.append(await self.client.ask(messages, max_usage, call))
                        edits, _, counts = read_replies(self._codec, draft, replies)
                    except (Unanswered, ChatError):
                        call.usage["repair_failed"] = 1
            call.usage.update(counts)
        except Unanswered as error:
            failure = error
        # 3. `raw` holds all replies, also a repair that was cut off.
        fields: dict[str, Any] = {"raw": BETWEEN.join(call.replies), "model": call.model or self.settings["model"]}
        fields |= {"usage": dict(call.usage), "attempts": call.usage["requests"]}
        return draft.key, Failure(failure.reason, failure.retry, **fields) if failure else Revision(edits, **fields)

    def session(self) -> AbstractAsyncContextManager[None]:
        return self.client.session()

    def finish(self) -> None:
        self.client.finish()

    @property
    def trouble(self) -> str:
        return self.client.trouble

    def charge(self, usage: Mapping[str, float]) -> None:
        """Charge earlier usage. Raises UserError where a limit is too low to be shared by all processes."""
        self.client.limits.check_processes()
        self.client.budget.charge(usage)

    def estimate(self, drafts: Sequence[Draft], *, total: int) -> str:
        """Expected requests, tokens and dollars, and the most: all drafts repaired, all replies of maximum length."""
        sizes = []
        for draft in drafts:
            try:
                picture = show(draft.image, self._image_side)
            except Unanswered:
                picture = None
            sizes.append(tokens_of(self._prompt.first(draft, picture), picture))
        prompts = round(sum(sizes) / max(1, len(sizes)) * total)
        replies = total * min(self._reply_limit, REPLY_TOKENS + THOUGHT_TOKENS * self._profile.thinks)
        requests = total * (1 + self._repair)  # at most
        expected = {"prompt_tokens": prompts, "completion_tokens": replies}
        most = {
            "prompt_tokens": prompts * (1 + self._repair) + replies,
            "completion_tokens": requests * self._reply_limit,
        }
        cost, most_cost = (cost_text(self.client.budget.prices, usage) for usage in (expected, most))
        tokens = f"{counted(prompts, 'prompt token')}, {counted(replies, 'completion token')}"
        return (
            f"{counted(total, 'draft')}: {counted(total, 'request')}, {tokens}{cost}\n"
            f"at most {counted(requests, 'request')}, {counted(sum(most.values()), 'token')}{most_cost}"
        )

    def body(self, draft: Draft) -> dict[str, Any]:
        if not draft.text.strip():
            raise Unanswered("empty_draft")
        return self.client.body(self._prompt.first(draft, show(draft.image, self._image_side)))

    def read(self, draft: Draft, body: Mapping[str, Any]) -> Revision | Failure:
        raw, usage = "", {}
        try:
            reply = read_completion(json.dumps(body))
            raw, usage = reply.text, {"requests": 1, **reply.usage}
            edits, _, counts = read_replies(self._codec, draft, [reply.checked()])
        except Unanswered as error:
            return Failure(error.reason, error.retry, raw=raw, usage=usage)
        return Revision(edits, raw, reply.model or self.settings["model"], {**usage, **counts})

    def reread(self, draft: Draft, answer: Revision | Failure) -> Revision | Failure:
        if isinstance(answer, Failure) and answer.reason not in UNREADABLE:
            return answer  # there is no complete reply
        fields = {"raw": answer.raw, "model": answer.model, "usage": answer.usage, "attempts": answer.attempts}
        try:
            return Revision(read_replies(self._codec, draft, answer.raw.split(BETWEEN))[0], **fields)
        except Unanswered as error:
            return Failure(error.reason, error.retry, **fields)


def read_replies(
    codec: Codec, draft: Draft, replies: Sequence[str]
) -> tuple[tuple[Edit, ...], list[tuple[Edit, str]], Counter[str]]:
    """Parse a reply, and the reply to a repair where there is one. Raises Unanswered for the first reply only.

    Returns the edits, those that cannot be placed at the end; these with the reason; and counts by outcome. Each
    repaired edit replaces one that was sent back.
    """
    edits, malformed_items = read_reply(replies[0])
    usable, problems = placeable(codec, draft, edits)
    counts = Counter(proposed=len(edits), malformed_items=malformed_items)
    if len(replies) > 1:
        try:
            extended, _ = placeable(codec, draft, [*usable, *read_reply(replies[1])[0]])
        except Unanswered:
            extended = usable
        repaired = extended[len(usable) :][: len(problems)]
        counts["repaired"] = len(repaired)
        usable, problems = [*usable, *repaired], problems[len(repaired) :]
    return (*usable, *(edit for edit, _ in problems)), problems, +counts


def placeable(codec: Codec, draft: Draft, edits: Sequence[Edit]) -> tuple[list[Edit], list[tuple[Edit, str]]]:
    """The edits that can be placed together, and the others with the reason. Earlier edits take precedence."""
    usable: list[Edit] = []
    problems: list[tuple[Edit, str]] = []
    for edit in edits:
        if rejected := locate(codec, draft.token_ids, [*usable, edit]).rejected:
            problems.append((edit, next(iter(rejected))))
        else:
            usable.append(edit)
    return usable, problems
