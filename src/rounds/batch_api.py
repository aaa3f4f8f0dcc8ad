"""OpenAI Batch API: export unanswered requests, import results.

    write_requests("requests.jsonl", out, drafts, expert)     one line per draft without an answer
    read_results("results.jsonl", out, drafts, expert)        into the journal; then `revise_round(..., ask=False)`

A request is `{"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}`, a result
`{"custom_id": ..., "response": {"status_code": 200, "body": {...}}, "error": null}`. The id is the journal's hash of
the request, so a result only ever answers its own request; importing it twice changes nothing.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from src.chat.journal import Journal
from src.io.errors import UserError
from src.io.files import write_bytes
from src.rounds.drafts import read_drafts
from src.rounds.round import journal_of
from src.types import Draft, Expert, Failure, Revision

URL = "/v1/chat/completions"
log = logging.getLogger(__name__)


def write_requests(file: Path, out: Path, drafts: Path, expert: Expert) -> tuple[int, int]:
    """Write a request per unanswered draft. Returns (requests written, drafts for which none could be built)."""
    lines, num_skipped = [], 0
    with journal_of(out, expert) as journal:
        for draft in _unsettled(drafts, journal):
            try:
                body = expert.body(draft)
            except UserError:  # an expert without a server
                raise
            except ValueError as error:
                log.warning("%s: %s", draft.key, error)
                num_skipped += 1
                continue
            line = {"custom_id": journal.request(draft), "method": "POST", "url": URL, "body": body}
            lines.append(json.dumps(line, ensure_ascii=False))
    write_bytes(file, "".join(f"{line}\n" for line in lines).encode())
    return len(lines), num_skipped


def read_results(file: Path, out: Path, drafts: Path, expert: Expert) -> Counter[str]:
    """Add the answers in `file` to the journal.

    Returns counts: `answered`, `failed`, `known` (answered earlier), `unknown` (no such request).
    """
    counts: Counter[str] = Counter()
    with journal_of(out, expert) as journal:
        by_request = {journal.request(draft): draft for chunk in read_drafts(drafts) for draft in chunk}
        for request, response in _results(file):
            draft = by_request.get(request)
            if draft is None or journal.is_settled(draft):
                counts["unknown" if draft is None else "known"] += 1
                continue
            answer = _answer(expert, draft, response)
            journal.add(draft, answer)
            counts["failed" if isinstance(answer, Failure) else "answered"] += 1
    return counts


def _unsettled(drafts: Path, journal: Journal) -> Iterator[Draft]:
    for chunk in read_drafts(drafts):
        yield from (draft for draft in chunk if not journal.is_settled(draft))


def _results(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(custom id, response) of each line. Raises UserError with the line number if a line is not a result."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                name, response = entry["custom_id"], entry.get("response") or {"status_code": 0, "body": entry["error"]}
                if not (isinstance(name, str) and isinstance(response, dict)):
                    raise TypeError
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UserError(f"{file}: line {number} is not a batch result: {line[:80]!r}") from None
            yield name, response


def _answer(expert: Expert, draft: Draft, response: Mapping[str, Any]) -> Revision | Failure:
    status, body = response.get("status_code"), response.get("body")
    if status != 200 or not isinstance(body, dict):
        return Failure(f"status_{status}" if isinstance(status, int) and status else "not_processed", retry=True)
    return expert.read(draft, body)
