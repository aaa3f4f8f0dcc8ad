"""A stand-in for a judging model that compares words: to try the stages without a key, a network or a cost.

    python -m src.evaluate conf=eval/capmas,judge/stand_in captions=mine.jsonl

WARN: it knows no language. Its scores say that the pipeline works, and nothing about captions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from src.judges.base import Request
from src.judges.reader import Conversation, Reader, identity_of, send
from src.judges.store import ReplyStore

MODEL = "a stand-in that compares words"  # what stands beside its scores
LITTLE = frozenset(re.findall(r"\w+", "a an the of in on at to is are and or with there this that it its one"))
REASON = "This is said by a stand-in that compares words and knows nothing about language or images."
_OPTION = re.compile(r"^([A-Z])\) *(.*)$", re.MULTILINE)
_NUMBERED = re.compile(r"^(\d+)\. ", re.MULTILINE)


class StandIn(Reader):
    """Replies by `stand_in_reply`, in the forms that the prompts ask for."""

    def __init__(self) -> None:
        self.settings = {"model": MODEL}

    def ask(
        self, conversations: Sequence[Conversation], store: ReplyStore, on_done: Callable[[], object]
    ) -> Counter[str]:
        for conversation in conversations:
            dialogue = conversation.start()
            request = next(dialogue, None)
            while request:
                digest = self.digest(request)
                if not (entry := store.replies.get(digest)):
                    line = {"status": "ok", "text": stand_in_reply(request), "usage": {}, "at": "", **self.settings}
                    entry = store.add(digest, {**identity_of(request, conversation.item), **line})
                request = send(dialogue, entry)
            on_done()
        return Counter()

    def estimate(self, conversations: Sequence[Conversation], store: ReplyStore) -> str:
        return f"the stand-in has {len(conversations)} verdicts to give, and sends no request"


def stand_in_reply(request: Request) -> str:
    """A usable reply to a request of any of our judges, by the words that its fields share.

    Its length is about that of a model's reply, so that a dry run can estimate with it.
    """
    fields = request.fields
    match request.step:
        case "score":
            return f'{{"score": {round(100 * overlap(fields["caption"], fields["references"]))}, "reason": "{REASON}"}}'
        case "answer":
            known = words(fields["caption"])
            lines = ((number, _choice(question, known)) for number, question in _listed(fields["questions"]))
            return "\n".join(f"{number}. {letter}" for number, letter in lines)
        case "split":
            claims = [part.strip() for part in re.split(r"(?<=[.!?;,])\s+", fields["caption"]) if words(part)]
            return "\n".join(f"{number}. {claim}" for number, claim in enumerate(claims, 1))
        case "compare":
            first, second = (overlap(fields[name], fields["references"]) for name in ("first", "second"))
            winner = "Tie" if first == second else f"Caption {1 if first > second else 2} is better"
            return f"Reason: {REASON}\nJudgment: {winner}"
        case _:  # statements or claims that a text supports
            text, statements, replies = fields.get("text"), fields.get("statements"), ("no", "yes")
            if text is None or statements is None:
                text, statements, replies = fields["references"], fields["claims"], ("False", "True")
            known = words(text)
            return "\n".join(f"{number}. {replies[words(line) <= known]}" for number, line in _listed(statements))


def words(text: str) -> set[str]:
    """The words of a text that mean something, in lower case."""
    return set(re.findall(r"\w+", text.lower())) - LITTLE


def overlap(one: str, other: str) -> float:
    """F1 of the words of two texts, 0 to 1."""
    shared, total = len(words(one) & words(other)), len(words(one)) + len(words(other))
    return 2 * shared / total if total else 0.0


def _choice(question: str, known: set[str]) -> str:
    """The letter of the only option whose words are all known."""
    letters = [letter for letter, option in _OPTION.findall(question) if words(option) and words(option) <= known]
    return letters[0] if len(letters) == 1 else "I don't know"


def _listed(listing: str) -> list[tuple[str, str]]:
    """(number, text) of a numbered listing."""
    _, *parts = _NUMBERED.split(listing)
    return list(zip(parts[::2], parts[1::2], strict=True))
