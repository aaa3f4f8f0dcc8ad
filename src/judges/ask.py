"""The judging model: verdicts on items, from a server (stage `judge`) or from the store of its replies (stage `score`).

    model = JudgeModel(model="gpt-4.1-2025-04-14")
    with ReplyStore(path) as store:
        model.ask([Conversation(Clair(), item), ...], store, bar.update)   the missing replies, many at once
    model.replay(Conversation(Clair(), item), store).verdict           no network; None: a reply is missing

    judge.verdict(item) -> Request -> store? -> client (limits, budget, retries) -> store -> Reply -> judge

What is wished for and the model does not accept (`src/chat/profiles.py`) is not sent; the store has what was. A reply
that would come out the same again, a refusal or one that is cut off, is stored with its status and without text. One
that did not come (network, rate limits, budget) is not stored: the next run asks again.
"""

from __future__ import annotations

import asyncio
import base64
import mimetypes
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from src.chat.budget import cost_text
from src.chat.client import Call, ChatError, Client, Unanswered
from src.chat.limits import Limits
from src.chat.profiles import THOUGHT_TOKENS, Profile, choose
from src.io.words import counted
from src.judges.base import Item, Request
from src.judges.reader import Conversation, Reader, identity_of, send
from src.judges.stand_in import stand_in_reply
from src.judges.store import ReplyStore

CHARS_PER_TOKEN = 3  # fewer than in English text, so that budgets are not exceeded
IMAGE_TOKENS = 1600  # of an image at high detail
SETTLED = ("length", "empty")  # failures that may be retried, but not with the same request


class JudgeModel(Reader):
    """A model behind an OpenAI-compatible server. The arguments: conf/eval/capmas.yaml."""

    def __init__(
        self,
        *,
        model: str,
        base_url: str | None = None,
        key_env: str | None = "OPENAI_API_KEY",
        profile: str | Profile = "auto",
        detail: str | None = None,
        effort: str | None = None,
        seed: int | None = None,
        max_tokens: int | None = None,
        extra: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.model, self._server = model, {"base_url": base_url, "key_env": key_env}
        self._profile, self._limits = choose(profile, model), limits or Limits()
        self._wished = {"effort": effort, "seed": seed}
        self._detail, self._max_tokens, self._extra = detail, max_tokens, dict(extra or {})
        self.settings = {
            "model": model,
            "detail": detail,
            "max_tokens": max_tokens,
            "extra": self._extra,
            "profile": asdict(self._profile),
            **self._wished,
        }

    def ask(
        self, conversations: Sequence[Conversation], store: ReplyStore, on_done: Callable[[], object]
    ) -> Counter[str]:
        """Raises ChatError for what no repetition mends, such as a wrong key; what is in flight is kept."""
        return asyncio.run(self._ask(conversations, store, on_done))

    async def _ask(
        self, conversations: Sequence[Conversation], store: ReplyStore, on_done: Callable[[], object]
    ) -> Counter[str]:
        # 1. A client, whose budget is that of all runs that wrote to this store.
        client = Client(**self._server, model=self.model, parameters=self._extra, limits=self._limits)
        for usage in (store.usage, *({f"lost_{k}": n for k, n in usage.items()} for usage in store.lost.values())):
            client.budget.charge(usage)
        unfinished: Counter[str] = Counter()
        locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # two systems may have written the same

        async def finish(conversation: Conversation) -> None:
            try:
                async with client.slot():
                    dialogue = conversation.start()
                    request = next(dialogue, None)
                    while request:
                        digest = self.digest(request)
                        async with locks[digest]:
                            entry = store.replies.get(digest)
                            entry = entry or await self._request(client, request, digest, conversation.item, store)
                        request = send(dialogue, entry)
                on_done()
            except Unanswered as error:
                unfinished[error.reason] += 1
                on_done()
            except ChatError:
                raise
            except Exception:  # a full disk, say: no further reply could be kept
                client.finish()
                raise

        # 2. All conversations; those in flight end before an error is raised, as they are billed.
        async with client.session():
            results = await asyncio.gather(*map(finish, conversations), return_exceptions=True)
        errors = [result for result in results if result]
        if errors:
            raise errors[0]
        return unfinished

    async def _request(
        self, client: Client, request: Request, digest: str, item: Item, store: ReplyStore
    ) -> dict[str, Any]:
        """Ask, and store the reply. Raises Unanswered if there is none to store, or ChatError."""
        parameters, messages, max_usage = self.parameters(request), self.messages(request), self._max_usage(request)
        store.begin(digest, max_usage)
        call, status = Call(), "ok"
        try:
            await client.ask(messages, max_usage, call, **parameters)
        except (Unanswered, ChatError) as error:
            fatal = isinstance(error, ChatError)
            if fatal or (error.retry and error.reason not in SETTLED):
                store.fail(digest, "stopped" if fatal else error.reason, dict(call.usage))
                raise
            status = error.reason
        return store.add(
            digest,
            {
                **identity_of(request, item),
                "status": status,
                "text": call.replies[-1] if call.replies else None,
                "model": call.model,
                "usage": dict(call.usage),
                "parameters": {**self._extra, **parameters},
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )

    def _max_usage(self, request: Request) -> dict[str, int]:
        prompt = len(request.system + request.user) // CHARS_PER_TOKEN + IMAGE_TOKENS * len(request.images) + 1
        return {"prompt_tokens": prompt, "completion_tokens": self.parameters(request)[self._profile.limit]}

    def estimate(self, conversations: Sequence[Conversation], store: ReplyStore) -> str:
        """A line for each judge and one for all, if replies are as long as a stand-in's and can be read at once."""
        expected: defaultdict[str, Counter[str]] = defaultdict(Counter)
        most, new = Counter[str](), set[str]()
        for conversation in conversations:
            dialogue = conversation.start()
            request = next(dialogue, None)
            while request:
                text, digest = stand_in_reply(request), self.digest(request)
                if not (entry := store.replies.get(digest)):
                    entry = {"status": "ok", "text": text, "model": self.model, "usage": {}}
                    if digest not in new:  # two systems may have written the same
                        new.add(digest)
                        max_usage = self._max_usage(request)
                        tokens = len(text) // CHARS_PER_TOKEN + THOUGHT_TOKENS * self._profile.thinks
                        usage = {"requests": 1, **max_usage, "completion_tokens": tokens}
                        expected[conversation.judge.name].update(usage)
                        for name, value in {"requests": 1, **max_usage}.items():
                            most[name] += conversation.judge.attempts * value
                request = send(dialogue, entry)
        prices, total = self._limits.prices, sum(expected.values(), Counter[str]())

        def line(name: str, usage: Mapping[str, int]) -> str:
            counts = {"requests": "request", "prompt_tokens": "prompt token", "completion_tokens": "completion token"}
            texts = (counted(usage.get(key, 0), word) for key, word in counts.items())
            return f"{name}: {', '.join(texts)}{cost_text(prices, usage)}"

        return "\n".join(line(*row) for row in {**expected, "in all": total, "at most": most}.items())

    def parameters(self, request: Request) -> dict[str, Any]:
        """The fields of a request besides model and messages, as far as the model accepts what is wished for."""
        wished = {**request.sampling, **self._wished}
        limit = self._max_tokens or wished["max_tokens"]
        sampling = {name: wished[name] for name in wished if name != "max_tokens" and self._profile.accepts(name)}
        return self._profile.parameters(limit=limit, sampling=sampling, name=request.step, schema=request.schema)

    def messages(self, request: Request) -> list[dict[str, Any]]:
        """The messages of a request, images as data URLs before the text."""
        detail = {"detail": self._detail} if self._detail else {}
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_url(image), **detail}} for image in request.images
        ]
        user = [*content, {"type": "text", "text": request.user}] if content else request.user
        roles = {"system": request.system, "user": user}
        return [{"role": role, "content": content} for role, content in roles.items() if content]


def data_url(image: Path) -> str:
    """The file as it is, in base64."""
    mime = mimetypes.guess_type(image.name)[0] or "image/jpeg"
    return f"data:{mime};base64,{base64.b64encode(image.read_bytes()).decode()}"
