"""The journal of an expert: every answer is on disk before it is used, so no answer is paid for twice.

    with Journal(folder / "journal-rank-0000.jsonl", expert="scenes") as journal:
        journal.add(draft, answer)          one line, synced to disk; `add_all` syncs once for several
        journal.answer(draft)               the answer, even of an earlier process; None: not answered yet

A line is `{"request": hash, "key": ..., "revision" | "failure": {...}}`. The hash covers everything that an answer
depends on: expert, key (hence image), prompt, draft text and reference. A process that is killed may leave a partial
last line, which is cut off when the journal is opened again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from src.io.files import with_filename
from src.types import Draft, Edit, Failure, Revision

logger = logging.getLogger(__name__)
Answer = Revision | Failure


class Answers:
    """The answers of one expert in several journals, read-only.

    expert: its name and settings, as text
    usage: the total of all answers, replaced ones included, by name as in `Revision.usage`

    A broken line is logged, and counts as unanswered.
    """

    def __init__(self, paths: Iterable[Path], *, expert: str) -> None:
        self.expert = expert
        self.usage: Counter[str] = Counter()
        self._answers: dict[str, Answer] = {}
        for path in paths:
            self._read(path)

    def __len__(self) -> int:
        return len(self._answers)

    def answer(self, draft: Draft) -> Answer | None:
        """The answer to a draft; None where there is none."""
        return self._answers.get(self.request(draft))

    def is_settled(self, draft: Draft) -> bool:
        """Whether the answer to a draft is final: a revision, or a failure that a retry cannot fix."""
        return _is_final(self.answer(draft))

    def request(self, draft: Draft) -> str:
        """Hash of a request to this expert."""
        content = [self.expert, draft.key, draft.prompt, draft.text, draft.reference]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    def _read(self, path: Path) -> int:
        """Read the complete lines of a journal; returns their size in bytes."""
        data = path.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]
        broken = []
        for number, line in enumerate(complete.split(b"\n")[:-1], 1):
            try:
                if line.strip():
                    request, answer = _parse(line)
                    self.usage.update(_numbers(answer.usage))
                    if not _is_final(self._answers.get(request)):  # a final answer, perhaps of another process, stays
                        self._answers[request] = answer
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                broken.append(f"line {number} ({error!r})")
        if broken:
            message = "%s: %d broken lines, the first of them %s; their drafts are sent to the expert again"
            logger.warning(message, path, len(broken), broken[0])
        return len(complete)


class Journal(Answers):
    """The journal of one process, open for appending; a context manager.

    also: journals of other processes, whose answers are read as well
    """

    def __init__(self, path: str | Path, *, expert: str, also: Iterable[Path] = ()) -> None:
        self.path = Path(path)
        super().__init__((other for other in also if other != self.path), expert=expert)
        if self.path.exists() and (size := self._read(self.path)) < self.path.stat().st_size:
            logger.warning("%s: dropped a partial last line", self.path)
            os.truncate(self.path, size)
        self._stream = self.path.open("ab", buffering=0)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def add(self, draft: Draft, answer: Answer) -> None:
        """Append an answer; when this returns it is on disk."""
        self.add_all([(draft, answer)])

    def add_all(self, answers: Sequence[tuple[Draft, Answer]]) -> None:
        """Append answers; when this returns all are on disk. A partial write is undone, as later lines may follow."""
        lines = []
        for draft, answer in answers:
            kind = "revision" if isinstance(answer, Revision) else "failure"
            line = {"request": self.request(draft), "key": draft.key, kind: asdict(answer)}
            lines.append(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        size, remaining = os.fstat(self._stream.fileno()).st_size, memoryview(b"".join(lines))
        with with_filename(self.path):
            try:
                while remaining:
                    remaining = remaining[self._stream.write(remaining) :]
                os.fsync(self._stream.fileno())
            except OSError:
                os.ftruncate(self._stream.fileno(), size)
                raise
        for draft, answer in answers:
            self._answers[self.request(draft)] = answer
            self.usage.update(_numbers(answer.usage))


def _parse(line: bytes) -> tuple[str, Answer]:
    """The request and the answer of a line. Raises an error of Python's where it has another form."""
    entry = json.loads(line)
    if "failure" in entry:
        return entry["request"], Failure(**entry["failure"])
    revision = entry["revision"]
    edits = tuple(Edit(**edit) for edit in revision["edits"])
    return entry["request"], Revision(**{**revision, "edits": edits})


def _numbers(usage: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in usage.items() if isinstance(value, int | float)}


def _is_final(answer: Answer | None) -> bool:
    return answer is not None and not (isinstance(answer, Failure) and answer.retry)
