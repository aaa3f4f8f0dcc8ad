"""What a judge is: a function that asks questions about one caption, one after another, and returns a verdict.

    class MyJudge(Judge):
        def verdict(self, item: Item) -> Dialogue:
            reply = yield Request(step="score", user=f"Rate this caption: {item.caption}")
            return float(reply.text)

The same generator serves two stages. `judge` sends each request that the store of replies does not hold to a server and
stores the reply before it is used; `score` runs it on the store alone. So a verdict depends on nothing but its item and
raw replies, a new way of reading replies costs no new request, and a killed run asks nothing twice.

A request is known by the hash of all that the reply depends on (`Request.digest`), the attempt and replicate included:
a judge that asks the same again counts `attempt` up.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from src.io.files import sha256


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image of a benchmark with the caption under test.

    key: of the image, unique in the benchmark; row: its place there, counted from 0
    image: its file; references: captions by humans; extra: what only this benchmark has (questions, a rival's caption)
    """

    key: str
    row: int
    caption: str
    image: Path | None = None
    references: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request to the judging model.

    step: which question of the judge it is; system, user: the messages; images: files that the user message shows
    sampling: temperature, top_p, max_tokens, ... as wished; what the model does not accept is not sent
    schema: JSON schema of the reply, for servers that enforce one
    attempt: counted up when an unusable reply is asked for again; replicate: of independent repetitions
    """

    step: str
    user: str
    system: str | None = None
    images: tuple[Path, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)
    schema: dict[str, Any] | None = None
    attempt: int = 0
    replicate: int = 0

    def digest(self, model: str) -> str:
        """Hash of all that the reply depends on; images count by their contents."""
        content = {**asdict(self), "images": [sha256(image) for image in self.images], "model": model}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A raw reply. text: None if there is none; status: `ok`, or why there is no text (`refused`, `empty`, ...)."""

    text: str | None
    status: str = "ok"
    model: str = ""  # as the server names it
    usage: dict[str, int] = field(default_factory=dict)


Dialogue = Generator[Request, Reply, Any]


class Judge(ABC):
    """One metric's questions. Has no state besides its settings: two calls with equal replies give equal verdicts."""

    @abstractmethod
    def verdict(self, item: Item) -> Dialogue:
        """Ask about an item; return what the metric's `update` takes."""
