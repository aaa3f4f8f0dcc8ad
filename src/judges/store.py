"""The store of a judge's raw replies: a JSONL file that is only appended to.

    with ReplyStore(folder / "replies.jsonl") as store:
        store.begin(digest, max_usage)        a request is about to be sent
        store.add(digest, {"text": ...})      its reply: on disk before anyone reads it
    ReplyStore(path).replies[digest]          what `score` reads; nothing is written

A request is known by `Request.digest`, so a reply serves every run that asks the same, and whatever depends on another
caption, prompt, image or model is asked anew. A process that is killed may leave a partial last line, which is cut off,
and requests that have a beginning and no reply: `lost`, which the server may have billed.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

from src.io.files import append

logger = logging.getLogger(__name__)


class ReplyStore:
    """Read at once; a context manager to write.

    replies: by digest, each {"text", "status", "model", "usage", "parameters", "raw", "at", "key", "step", ...}
    lost: by digest, the most that a request in flight may have used when its process ended
    usage: the sum over all replies and failed requests
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replies: dict[str, dict[str, Any]] = {}
        self.lost: dict[str, dict[str, int]] = {}
        self.usage: Counter[str] = Counter()
        data = path.read_bytes() if path.exists() else b""
        self._size = data.rfind(b"\n") + 1
        for number, line in enumerate(data[: self._size].split(b"\n")[:-1], 1):
            try:
                self._keep(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                logger.warning("%s: line %d is broken (%r) and counts as not there", path, number, error)

    def __enter__(self) -> ReplyStore:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self.path.open("ab", buffering=0)
        if self.path.stat().st_size > self._size:
            logger.warning("%s: dropped a partial last line", self.path)
            os.truncate(self.path, self._size)
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def begin(self, digest: str, max_usage: dict[str, int]) -> None:
        """A request is about to be sent. Not synced: that costs as much as a reply, and a kill of the process loses
        nothing of it."""
        self._add({"begun": digest, "most": max_usage}, sync=False)

    def fail(self, digest: str, reason: str, usage: dict[str, Any]) -> None:
        """A request has ended without a reply that would be the same another time."""
        self._add({"unanswered": digest, "reason": reason, "usage": usage}, sync=False)

    def add(self, digest: str, reply: dict[str, Any]) -> dict[str, Any]:
        self._add({"reply": digest, **reply}, sync=True)
        return reply

    def _add(self, line: dict[str, Any], *, sync: bool) -> None:
        append(self._stream, json.dumps(line, ensure_ascii=False).encode() + b"\n", sync=sync)
        self._keep(line)

    def _keep(self, line: dict[str, Any]) -> None:
        if "begun" in line:
            lost = self.lost.get(line["begun"], {})  # begun a second time: the first one is not to come
            self.usage.update({f"lost_{name}": value for name, value in lost.items()})
            self.lost[line["begun"]] = line["most"]
            return
        digest = line["reply"] if "reply" in line else line["unanswered"]
        self.usage.update({name: value for name, value in line["usage"].items() if isinstance(value, int | float)})
        self.lost.pop(digest, None)
        if "reply" in line:
            self.replies[digest] = line
