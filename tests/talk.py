"""A judge's conversation about one item with a script of replies instead of a server."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from src.judges.base import Item, Judge, Reply, Request, Verdict


@dataclass
class Talk:
    """verdict: None if the judge raised `error`; requests: all that it sent"""

    verdict: Verdict | None = None
    error: Exception | None = None
    requests: list[Request] = field(default_factory=list)


def talk(judge: Judge, item: Item, replies: Iterable[str | None]) -> Talk:
    """Raises AssertionError if the judge asks for more replies than there are, or the same twice."""
    done, script, dialogue = Talk(), iter(replies), judge.verdict(item)
    try:
        request = next(dialogue)
        while True:
            done.requests.append(request)
            assert len({r.digest("judge") for r in done.requests}) == len(done.requests), "the same request twice"
            text = next(script, ...)
            assert text is not ..., "no reply left"
            reply = Reply(text=text) if text is not None else Reply(text=None, status="refused")
            request = dialogue.send(reply)
    except StopIteration as end:
        done.verdict = end.value
    except (ValueError, TypeError, IndexError) as error:
        done.error = error
    return done
