"""The journal of an expert: every answer is on disk before it is used, so none is paid for twice.

    with Journal(folder / "journal-rank-0000.jsonl", expert="scenes") as journal:
        journal.add(draft, answer)          one line, synced to disk
        journal.answer(draft)               the answer, also when an earlier process wrote it; None: ask

A line is `{"request": hash, "key": ..., "revision" | "failure": {...}}`. The hash covers all that an answer
depends on: expert, key (hence image), prompt, draft text and reference. A process that is killed may leave
half a line at the end; it is cut off when the journal is opened again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from src.batch import Draft, Edit, Failure, Revision

logger = logging.getLogger(__name__)
Answer = Revision | Failure


class Journal:
    """Answers of one expert by one process; a context manager.

    expert: its name and settings, as text. Raises ValueError when a line other than the last one is broken.
    """

    def __init__(self, path: str | Path, *, expert: str) -> None:
        self.path = Path(path)
        self.expert = expert
        self._answers: dict[str, Answer] = {}
        self._restore()
        self._stream = self.path.open("ab")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __len__(self) -> int:
        return len(self._answers)

    def answer(self, draft: Draft) -> Answer | None:
        """The answer to a draft, if there is one."""
        return self._answers.get(self.request(draft))

    def is_settled(self, draft: Draft) -> bool:
        """Whether there is an answer, and not a failure that asking again may cure."""
        answer = self.answer(draft)
        return answer is not None and not (isinstance(answer, Failure) and answer.retry)

    def add(self, draft: Draft, answer: Answer) -> None:
        """Append an answer; when this returns it is on disk."""
        request = self.request(draft)
        kind = "revision" if isinstance(answer, Revision) else "failure"
        line = {"request": request, "key": draft.key, kind: asdict(answer)}
        self._stream.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._answers[request] = answer

    def request(self, draft: Draft) -> str:
        """Hash of a question to this expert."""
        question = [self.expert, draft.key, draft.prompt, draft.text, draft.reference]
        return hashlib.sha256(json.dumps(question).encode()).hexdigest()[:32]

    def _restore(self) -> None:
        """Read the journal of an earlier process and cut off a torn last line."""
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                entry = json.loads(line)
                self._answers[entry["request"]] = _answer(entry)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}: line {number} is broken ({error!r}); remove it") from error
        if len(whole) < len(data):
            logger.warning("%s: dropped a torn last line", self.path)
            os.truncate(self.path, len(whole))


def _answer(entry: dict[str, Any]) -> Answer:
    if "failure" in entry:
        return Failure(**entry["failure"])
    revision = entry["revision"]
    return Revision(**{**revision, "edits": tuple(Edit(**edit) for edit in revision["edits"])})
