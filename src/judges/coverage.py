"""Coverage: multiple-choice questions about an image, answered from the caption alone (CapMAS, arXiv 2412.15484).

    item.extra {"questions": [text with lettered options], "answers": [letter]}
    verdict {"correct", "total", "abstained", "failed", "skipped"}      numbers of questions; skipped: 1 if no reply

All questions of an image in one text-only request, numbered from 0. In strict mode what stays open is asked again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from src.chat.reading import said
from src.judges.base import Dialogue, Item, Judge, Mode, Verdict, again
from src.judges.numbered import answers, pairs
from src.judges.prompt import Prompt

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
    """prompts: folder with a coverage.yaml (None: ours); attempts: requests until every question has an answer"""

    def __init__(self, *, mode: Mode = "strict", prompts: str | Path | None = None, attempts: int = 3) -> None:
        self.mode, self.attempts = mode, attempts
        self.prompt = Prompt.load("coverage", prompts)

    def verdict(self, item: Item) -> Dialogue:
        questions, key = item.need("questions"), [answer.upper() for answer in item.need("answers")]
        if item.caption is None:
            return {**counts([], key), "missing": 1}
        if self.mode == "official":
            return (yield from self._official(item.caption, questions, key))
        given: dict[int, str] = {}
        for attempt in range(self.attempts):
            if not (left := [number for number in range(len(questions)) if number not in given]):
                break
            listing = "\n\n".join(f"{number}. {questions[number]}" for number in left)
            fields = {"caption": item.caption, "questions": listing}
            reply = yield again(self.prompt.request("answer", fields, sampling=SAMPLING), attempt)
            text = reply.text or ""
            if not pairs(text) and _ABSTAINS.match(said(text)):
                given |= dict.fromkeys(left, "")
            given = {**answers(text, range(len(questions)), read_letter), **given}
        return counts([given.get(number) for number in range(len(questions))], key)

    def _official(self, caption: str, questions: Sequence[str], key: list[str]) -> Dialogue:
        """Three attempts to get as many answers as questions, told apart by their order alone."""
        listing = "\n\n".join(f"{number}. {question}" for number, question in enumerate(questions))
        fields = {"caption": caption, "questions": listing}
        request = self.prompt.request("answer", fields, sampling=SAMPLING)
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


def counts(given: Sequence[str | None], key: Sequence[str]) -> Verdict:
    """The verdict on the answers of an image: a capital letter, "" for an abstention, None for a failure."""
    return {
        "missing": 0,
        "correct": sum(answer == right for answer, right in zip(given, key, strict=False)),
        "total": len(key),
        "abstained": sum(answer == "" for answer in given),
        "failed": len(key) - sum(answer is not None for answer in given),
        "skipped": float(not given),
    }


def read_letter(text: str) -> str | None:
    """The capital letter of an answer, "" for an abstention, None for anything else."""
    if _ABSTAINS.match(text):
        return ""
    return match[1].upper() if (match := _LETTER.match(text)) else None


def official_values(text: str) -> list[str]:
    """The answers that the released scorer finds: every second piece of the text between ". " and line breaks."""
    return official_pieces(text)[1::2]


def official_pieces(text: str) -> list[str]:
    """The pieces of a reply, each up to its first closing parenthesis."""
    pieces = text.replace("\n\n", "\n").strip().replace(". ", "\n").split("\n")
    return [piece.split(")")[0] for piece in pieces]
