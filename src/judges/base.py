"""What a judge is: a function that asks questions about one caption, one after another, and returns a verdict.

    class MyJudge(Judge):
        name = "mine"                                                        src/judges/prompts/mine.yaml

        def verdict(self, item: Item) -> Dialogue:
            reply = yield self.request("score", {"caption": item.caption})
            return {"score": float(reply.text)}

The same generator serves two stages. `judge` sends each request that the store of replies does not hold to a server and
stores the reply before it is used; `score` runs it on the store alone. So a verdict depends on nothing but its item and
raw replies, a new way of reading replies costs no new request, and a killed run asks nothing twice.

A request is known by the hash of all that the reply depends on (`Request.digest`), the attempt and replicate included:
a judge that asks the same again counts `attempt` up.
"""

from __future__ import annotations

import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from src.io.errors import UserError
from src.io.files import sha256
from src.judges.prompt import Prompt

RETRY_TEMPERATURE = 0.5  # of a request that is repeated: at 0 the reply would be as unusable as before
Mode = Literal["strict", "official"]  # reading replies safely, or as the released scorer does, with its faults
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image of a benchmark with the caption under test.

    key: of the image, unique in the benchmark; row: its place there, counted from 0
    caption: None if the system under test gave none, so that the image is counted as missing and nothing is asked
    image: its file; references: captions by humans; extra: what only this benchmark has (questions, a rival's caption)
    """

    key: str
    row: int
    caption: str | None
    image: Path | None = None
    references: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def record(self) -> dict[str, Any]:
        """As metrics that need no judge take it."""
        captions = [{"text": text} for text in self.references]
        return {"key": self.key, "image": str(self.image), "captions": captions, **self.extra}

    def need(self, name: str) -> Any:
        """A field, or an entry of `extra`. Raises UserError if there is none or it is empty."""
        value = getattr(self, name, None) or self.extra.get(name)
        if not value:
            raise UserError(f"the image {self.key!r} has no {name}, which this metric asks about")
        return value


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request to the judging model.

    step: which question of the judge it is; images: files that the user message shows
    system, user: the messages; an empty one is not sent. fields: what was filled into their templates
    sampling: temperature, top_p, max_tokens, ... as wished; what the model does not accept is not sent
    schema: JSON schema of the reply, for servers that enforce one
    attempt: counted up when an unusable reply is asked for again; replicate: of independent repetitions
    """

    step: str
    user: str = ""
    system: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    images: tuple[Path, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)
    schema: dict[str, Any] | None = None
    attempt: int = 0
    replicate: int = 0

    def digest(self, model: str) -> str:
        """Hash of all that the reply depends on; images count by their contents."""
        content = {**asdict(self), "images": [_image_digest(image) for image in self.images], "model": model}
        del content["fields"]  # the messages have them
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _image_digest(image: Path) -> str:
    """Hash of a file, which is read once as long as it does not change."""
    stat = image.stat()
    return _read_digest(image, stat.st_mtime_ns, stat.st_size)


@functools.cache
def _read_digest(image: Path, _changed_at: int, _size: int) -> str:
    return sha256(image)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A raw reply. text: None if there is none; status: `ok`, or why there is no text (`refused`, `empty`, ...)."""

    text: str | None
    status: str = "ok"
    model: str = ""  # as the server names it
    usage: dict[str, int] = field(default_factory=dict)


Verdict = dict[str, float | None]  # numbers by name; None: not asked, or no usable reply
Dialogue = Generator[Request, Reply, Verdict]


class Judge(ABC):
    """One metric's questions. Has no state besides its settings: two calls with equal replies give equal verdicts.

    prompts: folder with a file NAME.yaml of your own words (None: ours); attempts: requests until a reply can be read
    """

    name: ClassVar[str]

    def __init__(self, *, mode: Mode = "strict", prompts: str | Path | None = None, attempts: int = 3) -> None:
        self.mode, self.attempts = mode, attempts
        self.prompt = Prompt.load(self.name, prompts)

    @property
    def settings(self) -> dict[str, Any]:
        """What the metric's numbers depend on besides the judging model; of the prompt its hash."""
        settings = {name: value for name, value in vars(self).items() if name != "prompt"}
        return {**settings, "prompt": self.prompt.digest, "version": self.prompt.version}

    def request(self, step: str, fields: Mapping[str, str], **settings: Any) -> Request:
        """The request of a step, with the fields filled in. settings: further fields of `Request`"""
        return Request(step=step, fields=fields, **self.prompt.messages(step, fields), **settings)

    @abstractmethod
    def verdict(self, item: Item) -> Dialogue:
        """Ask about an item; return what the metric's `update` takes, besides the item's row."""


def ask(
    request: Request, read: Callable[[str], T | None], *, attempts: int, hotter: bool = True
) -> Generator[Request, Reply, T | None]:
    """Repeat a request until `read` makes something of a reply; None if it makes nothing of `attempts` of them."""
    for attempt in range(attempts):
        reply = yield again(request, attempt, hotter=hotter)
        if (value := read(reply.text or "")) is not None:
            return value
    return None


def again(request: Request, attempt: int, *, hotter: bool = True) -> Request:
    """The request as another attempt. hotter: at a higher temperature from the second on"""
    change = {"temperature": RETRY_TEMPERATURE} if hotter and attempt else {}
    return replace(request, attempt=attempt, sampling={**request.sampling, **change})
