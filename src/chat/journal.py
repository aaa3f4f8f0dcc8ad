"""The journal of an expert: every answer is on disk before it is used, so no answer is paid for twice.

    with Journal(folder / "journal-rank-0000.jsonl", expert="scenes") as journal:
        journal.add_all([(draft, answer)])    a line for each, synced to disk once
        journal.answer(draft)                 the answer, even of an earlier process; None: not answered yet

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
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from src.io.files import append
from src.types import Draft, Edit, Failure, Revision

logger = logging.getLogger(__name__)
Answer = Revision | Failure


class Journal:
    """The answers of one expert; a context manager.

    path: the file of this process, which answers are appended to; None: read-only
    expert: its name and settings, as text
    others: files of other processes, which are read as well
    usage: the total of all answers, replaced ones included, by name as in `Revision.usage`

    A broken line is logged, and counts as unanswered.
    """

    def __init__(self, path: Path | None, *, expert: str, others: Iterable[Path] = ()) -> None:
        self.path, self.expert = path, expert
        self.usage: Counter[str] = Counter()
        self._answers: dict[str, Answer] = {}
        for other in others:
            if other != path:
                self._read(other)
        if path is None:
            return
        if path.exists() and (size := self._read(path)) < path.stat().st_size:
            logger.warning("%s: dropped a partial last line", path)
            os.truncate(path, size)
        self._stream = path.open("ab", buffering=0)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __len__(self) -> int:
        return len(self._answers)

    def request(self, draft: Draft) -> str:
        """Hash of a request to this expert."""
        content = [self.expert, draft.key, draft.prompt, draft.text, draft.reference]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    def answer(self, draft: Draft) -> Answer | None:
        """The answer to a draft; None where there is none."""
        return self._answers.get(self.request(draft))

    def is_settled(self, draft: Draft) -> bool:
        """Whether the answer to a draft is final: a revision, or a failure that a retry cannot fix."""
        return _is_final(self.answer(draft))

    def add_all(self, answers: Sequence[tuple[Draft, Answer]]) -> None:
        """Append answers; when this returns all are on disk."""
        lines = []
        for draft, answer in answers:
            kind = "revision" if isinstance(answer, Revision) else "failure"
            line = {"request": self.request(draft), "key": draft.key, kind: asdict(answer)}
            lines.append(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        append(self._stream, b"".join(lines))
        for draft, answer in answers:
            self._keep(self.request(draft), answer)

    def _read(self, path: Path) -> int:
        """Read the complete lines of a journal; returns their size in bytes."""
        data = path.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]
        broken = []
        for number, line in enumerate(complete.split(b"\n")[:-1], 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                if "failure" in entry:
                    answer = Failure(**entry["failure"])
                else:
                    edits = tuple(Edit(**edit) for edit in entry["revision"]["edits"])
                    answer = Revision(**{**entry["revision"], "edits": edits})
                self._keep(entry["request"], answer)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                broken.append(f"line {number} ({error!r})")
        if broken:
            message = "%s: %d broken lines, the first of them %s; their drafts are sent to the expert again"
            logger.warning(message, path, len(broken), broken[0])
        return len(complete)

    def _keep(self, request: str, answer: Answer) -> None:
        self.usage.update({name: value for name, value in answer.usage.items() if isinstance(value, int | float)})
        if not _is_final(self._answers.get(request)):  # a final answer, perhaps of another process, stays
            self._answers[request] = answer


def _is_final(answer: Answer | None) -> bool:
    return answer is not None and not (isinstance(answer, Failure) and answer.retry)
