"""Coverage: multiple-choice questions about an image, answered from the caption alone (CapMAS, arXiv 2412.15484).

    item.extra {"questions": [text with lettered options], "answers": [letter]}
    verdict {"correct", "total", "abstained", "failed", "skipped"}      numbers of questions; skipped: 1 if no reply

All questions of an image in one text-only request, numbered from 0. In strict mode what stays open is asked again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from src.judges.base import Dialogue, Item, Judge, Request, Verdict, again
from src.judges.numbered import ask_all

SAMPLING = {"temperature": 1e-7, "max_tokens": 4096}
OFFICIAL_ATTEMPTS = 3
UNKNOWN = "I don't know"  # the abstention that the prompt asks for
_ABSTAINS = re.compile(
    r"[\W_]*(?:i (?:do not|don['\u2019]?t) know|idk|unknown|unanswerable|not (?:stated|mentioned|specified|given)"
    r"|cannot (?:be )?(?:determined?|answered?|tell|say))\b",
    re.IGNORECASE,
)
_LETTER = re.compile(r"[\s*_\"'`(\[]*([A-Za-z])(?:[*_\"'`)\]]*$|[*_).:,;\]]|\s+-\s)")


class Coverage(Judge):
    """In official mode there are always three attempts."""

    name = "coverage"

    def verdict(self, item: Item) -> Dialogue:
        questions, key = dict(enumerate(item.need("questions"))), [answer.upper() for answer in item.need("answers")]
        if item.caption is None:
            return {**counts([], key), "missing": 1}
        caption = item.caption

        def request(listing: str) -> Request:
            return self.request("answer", {"caption": caption, "questions": listing}, sampling=SAMPLING)

        if self.mode == "official":
            listing = "\n\n".join(f"{number}. {question}" for number, question in questions.items())
            return (yield from official_dialogue(request(listing), key))
        letters = yield from ask_all(
            request, questions, read_letter, attempts=self.attempts, gap="\n\n", read_whole=read_abstention
        )
        return counts([letters.get(number) for number in questions], key)


def official_dialogue(request: Request, key: list[str]) -> Dialogue:
    """Three attempts to get as many answers as questions, told apart by their order alone."""
    values: list[str] = []
    for attempt in range(OFFICIAL_ATTEMPTS):
        reply = yield again(request, attempt, hotter=False)
        if not reply.text:
            return counts([], key)
        whole = reply.text.strip().removesuffix(".") == UNKNOWN
        values = [UNKNOWN] * len(key) if whole else official_values(reply.text)
        if len(values) == len(key):
            break
    # NumPy compares a single answer with every key, and raises ValueError for any other number that differs
    correct = np.array([value.upper() for value in values]) == np.array(key)
    abstained = sum(value == UNKNOWN for value in values)
    return {**counts([""] * len(key), key), "correct": float(correct.sum()), "abstained": abstained}


def counts(letters: Sequence[str | None], key: Sequence[str]) -> Verdict:
    """The verdict on the answers of an image: a capital letter, "" for an abstention, None for a failure."""
    return {
        "missing": 0,
        "correct": sum(answer == right for answer, right in zip(letters, key, strict=False)),
        "total": len(key),
        "abstained": letters.count(""),
        "failed": len(key) - sum(letter is not None for letter in letters),
        "skipped": float(not letters),
    }


def read_letter(text: str) -> str | None:
    """The capital letter of an answer, "" for an abstention, None for anything else."""
    if (match := _LETTER.match(text)) and not _ABSTAINS.match(text):
        return match[1].upper()
    return read_abstention(text)


def read_abstention(text: str) -> str | None:
    return "" if _ABSTAINS.match(text) else None


def official_values(text: str) -> list[str]:
    """The answers that the released scorer finds: every second piece of the text between ". " and line breaks."""
    return official_pieces(text)[1::2]


def official_pieces(text: str) -> list[str]:
    """The pieces of a reply, each up to its first closing parenthesis."""
    pieces = text.replace("\n\n", "\n").strip().replace(". ", "\n").split("\n")
    return [piece.split(")")[0] for piece in pieces]
