"""The journal of an expert: every answer is on disk before it is used, so none is paid for twice.

    with Journal(folder / "journal-rank-0000.jsonl", expert="scenes") as journal:
        journal.add(draft, answer)          one line, synced to disk; `add_all` syncs once for several
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
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from src.io.files import naming
from src.types import Draft, Edit, Failure, Revision

logger = logging.getLogger(__name__)
Answer = Revision | Failure


class Answers:
    """The answers of one expert in some journals, which are only read.

    expert: its name and settings, as text. A broken line is told, and counts as no answer.
    usage: what all answers took, with those that others came in the place of: numbers by name, as in `Revision.usage`
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
        """The answer to a draft, if there is one."""
        return self._answers.get(self.request(draft))

    def is_settled(self, draft: Draft) -> bool:
        """Whether there is an answer, and not a failure that asking again may cure."""
        return _is_settled(self.answer(draft))

    def request(self, draft: Draft) -> str:
        """Hash of a question to this expert."""
        question = [self.expert, draft.key, draft.prompt, draft.text, draft.reference]
        return hashlib.sha256(json.dumps(question).encode()).hexdigest()[:32]

    def _read(self, path: Path) -> int:
        """Read the whole lines of a journal; returns how many bytes these take."""
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        broken = []
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                if line.strip():
                    entry = json.loads(line)
                    request, answer = _typed(entry["request"], str), _answer(entry)
                    self.usage.update(_numbers(answer.usage))
                    if not _is_settled(self._answers.get(request)):  # of another process, maybe
                        self._answers[request] = answer
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                broken.append(f"line {number} ({error!r})")
        if broken:
            logger.warning(
                "%s: %d broken lines, the first of them %s: what they answered is asked again",
                path, len(broken), broken[0],
            )  # fmt: skip
        return len(whole)


class Journal(Answers):
    """Answers of one expert by one process, and new ones; a context manager.

    also: journals of other processes, whose answers count as well
    """

    def __init__(self, path: str | Path, *, expert: str, also: Iterable[Path] = ()) -> None:
        self.path = Path(path)
        super().__init__((other for other in also if other != self.path), expert=expert)
        self._restore()
        self._stream = self.path.open("ab", buffering=0)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def add(self, draft: Draft, answer: Answer) -> None:
        """Append an answer; when this returns it is on disk."""
        self.add_all([(draft, answer)])

    def add_all(self, answers: Sequence[tuple[Draft, Answer]]) -> None:
        """Append answers; when this returns all are on disk."""
        lines = []
        for draft, answer in answers:
            kind = "revision" if isinstance(answer, Revision) else "failure"
            line = {"request": self.request(draft), "key": draft.key, kind: asdict(answer)}
            lines.append(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        with naming(self.path):
            self._append(b"".join(lines))
        for draft, answer in answers:
            self._answers[self.request(draft)] = answer
            self.usage.update(_numbers(answer.usage))

    def _append(self, data: bytes) -> None:
        """Write and sync; what can be written only in part is not written at all, as more may follow."""
        before, rest = os.fstat(self._stream.fileno()).st_size, memoryview(data)
        try:
            while rest:
                rest = rest[self._stream.write(rest) :]
            os.fsync(self._stream.fileno())
        except OSError:
            os.ftruncate(self._stream.fileno(), before)
            raise

    def _restore(self) -> None:
        """Read the journal of an earlier process and cut off a torn last line."""
        if not self.path.exists():
            return
        whole = self._read(self.path)
        if whole < self.path.stat().st_size:
            logger.warning("%s: dropped a torn last line", self.path)
            os.truncate(self.path, whole)


def _numbers(usage: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in usage.items() if isinstance(value, int | float)}


def _is_settled(answer: Answer | None) -> bool:
    return answer is not None and not (isinstance(answer, Failure) and answer.retry)


def _answer(entry: dict[str, Any]) -> Answer:
    """The answer of a line. Raises TypeError or KeyError where one of its values is not what an expert gives."""
    if "failure" in entry:
        answer: Answer = Failure(**entry["failure"])
        _typed(answer.reason, str)
        _typed(answer.retry, bool)
    else:
        answer = Revision(**{**entry["revision"], "edits": tuple(map(_edit, entry["revision"]["edits"]))})
    for text in (answer.raw, answer.model):
        _typed(text, str)
    _typed(answer.usage, dict)
    _typed(answer.attempts, int)
    return answer


def _edit(content: dict[str, Any]) -> Edit:
    edit = Edit(**content)
    for text in (edit.org, edit.target, edit.reason, edit.kind):
        _typed(text, str)
    _typed(edit.start_char, int, type(None))
    return edit


def _typed(value: Any, *kinds: type) -> Any:
    """The value, if it is of one of these types."""
    if type(value) not in kinds:
        raise TypeError(f"expected {' or '.join(kind.__name__ for kind in kinds)}, got {value!r}")
    return value
