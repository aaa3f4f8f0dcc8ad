"""What replies to the requests of judges: a model behind a server (`src.judges.ask`), or a stand-in without one.

reader.ask([Conversation(Clair(), item), ...], store, on_done)        stage `judge`: the replies that the store lacks
reader.replay(Conversation(Clair(), item), store).verdict             stage `score`; None: a reply is missing
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from src.judges.base import Dialogue, Item, Judge, Reply, Request, Verdict
from src.judges.store import ReplyStore


class Conversation(NamedTuple):
    """A judge's questions about one item. replicate: which of several independent times, to see how replies vary"""

    judge: Judge
    item: Item
    replicate: int = 0

    def start(self) -> Dialogue:
        dialogue, reply = self.judge.verdict(self.item), None
        try:
            while True:
                reply = yield replace(dialogue.send(reply), replicate=self.replicate)  # pyright: ignore[reportArgumentType]
        except StopIteration as end:
            return end.value


@dataclass
class Replay:
    """What the store has of a conversation. verdict: None if a reply is missing; replies: lines of the store"""

    verdict: Verdict | None = None
    replies: list[dict[str, Any]] = field(default_factory=list)


class Reader(ABC):
    """settings: all that a reply depends on besides its request; no address and no limit"""

    settings: dict[str, Any]

    def digest(self, request: Request) -> str:
        return request.digest(json.dumps(self.settings, sort_keys=True))

    def replay(self, conversation: Conversation, store: ReplyStore) -> Replay:
        """The verdict that the replies in the store lead to."""
        replay, dialogue = Replay(), conversation.start()
        try:
            request = next(dialogue)
            while entry := store.replies.get(self.digest(request)):
                replay.replies.append(entry)
                request = dialogue.send(reply_of(entry))
        except StopIteration as end:
            replay.verdict = end.value
        return replay

    @abstractmethod
    def ask(
        self, conversations: Sequence[Conversation], store: ReplyStore, on_done: Callable[[], object]
    ) -> Counter[str]:
        """Bring every conversation to its end. Returns the number of those that did not get there, by reason.

        on_done: called after each conversation
        """

    @abstractmethod
    def estimate(self, conversations: Sequence[Conversation], store: ReplyStore) -> str:
        """What `ask` would take: requests, tokens, dollars. Sends nothing."""


def send(dialogue: Dialogue, entry: Mapping[str, Any]) -> Request | None:
    """The next request after a reply, which is a line of the store; None if the dialogue has ended."""
    try:
        return dialogue.send(reply_of(entry))
    except StopIteration:
        return None


def reply_of(entry: Mapping[str, Any]) -> Reply:
    """A line of the store for its judge, which reads no text that is cut off or filtered."""
    text = entry["text"] if entry["status"] == "ok" else None
    return Reply(text=text, status=entry["status"], model=entry["model"], usage=entry["usage"])


def identity_of(request: Request, item: Item) -> dict[str, Any]:
    """What a line of the store says its request is about."""
    return {"key": item.key, "step": request.step, "attempt": request.attempt, "replicate": request.replicate}
