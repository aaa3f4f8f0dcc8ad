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
from pathlib import Path

from src.io.errors import UserError
from src.io.files import write_bytes
from src.rounds.drafts import read_drafts
from src.rounds.round import journal_of, unfinished
from src.types import Draft, Expert, Failure

URL = "/v1/chat/completions"
log = logging.getLogger(__name__)


def write_requests(file: Path, out: Path, drafts: Path, expert: Expert) -> tuple[int, int]:
    """Write a request per unanswered draft. Returns (requests written, drafts for which none could be built)."""
    lines, num_skipped, journal = [], 0, journal_of(unfinished(out), expert)
    for draft in (draft for chunk in read_drafts(drafts) for draft in chunk):
        if journal.is_settled(draft):
            continue
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
    """Add the answers in `file` to the journal. Raises UserError with the line number if a line is not a result.

    Returns counts: `answered`, `failed`, `known` (answered earlier), `unknown` (no such request).
    """
    counts: Counter[str] = Counter()
    with journal_of(unfinished(out), expert, rank=0) as journal, file.open("rb") as stream:
        by_request: dict[str, Draft] = {journal.request(d): d for chunk in read_drafts(drafts) for d in chunk}
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                draft = by_request.get(entry["custom_id"])
                response = entry.get("response") or {"error": entry["error"]}
                status, body = response.get("status_code"), response.get("body")
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{file}: line {number} is not a batch result: {line[:80]!r}") from None
            if draft is None or journal.is_settled(draft):
                counts["unknown" if draft is None else "known"] += 1
                continue
            if status == 200 and body:
                answer = expert.read(draft, body)
            else:
                answer = Failure(f"status_{status}" if status else "not_processed", retry=True)
            journal.add_all([(draft, answer)])
            counts["failed" if isinstance(answer, Failure) else "answered"] += 1
    return counts
