"""CLAIR: how likely is it that a caption and a reference describe the same picture? (arXiv 2310.12971, as in CapMAS.)

    verdict {"score", "failed"}     score from 0 to 1; failed: 1 if there is none, so that the image is left out

One request, text only; repeated if the reply has no number.
"""

from __future__ import annotations

import json
import re

from src.chat.reading import json_values, without_thoughts
from src.judges.base import Dialogue, Item, Judge, Verdict, ask
from src.judges.prompt import bullets

SCHEMA = {
    "type": "object",
    "properties": {"score": {"type": "number", "minimum": 0, "maximum": 100}, "reason": {"type": "string"}},
    "required": ["score", "reason"],
    "additionalProperties": False,
}
SAMPLING = {"temperature": 0.0, "max_tokens": 4096}
_VALUE = r"(?<![\d.-])(\d+(?:\.\d+)?)(?![.,]?\d)"
_NUMBER = re.compile(rf"\s*{_VALUE}\s*(?:%|/\s*100)?\s*")
# a labelled number that is not out of something else than 100; one out of 100; a percentage; or nothing but a number
_SCORES = re.compile(
    rf"score[\s*_:=\"'`]*(?:is\s+)?{_VALUE}(?!\s*(?:/|out of)\s*(?!100\b))"
    rf"|{_VALUE}\s*(?:/|out of)\s*100\b|{_VALUE}\s*%|\A[\s*_\"'`]*{_VALUE}[\s*_\"'`.]*\Z",
    re.IGNORECASE,
)


class Clair(Judge):
    """In official mode an unreadable reply is asked for again in the same words at the same temperature."""

    name = "clair"

    def verdict(self, item: Item) -> Dialogue:
        if item.caption is None:
            return {"missing": 1, "score": 0, "failed": 0}
        schema = SCHEMA if self.mode == "strict" else None
        fields = {"caption": item.caption, "references": bullets(item.need("references"))}
        request = self.request("score", fields, sampling=SAMPLING, schema=schema)
        if self.mode == "strict":
            score = yield from ask(request, read_score, attempts=self.attempts)
            verdict = None if score is None else {"missing": 0, "score": score, "failed": 0}
        else:
            verdict = yield from ask(request, official_verdict, attempts=self.attempts, hotter=False)
        return verdict or {"missing": 0, "score": 0.0, "failed": 1}


def read_score(text: str) -> float | None:
    """The score in a reply, from 0 to 1. None if there is none, there are several, or it is not from 0 to 100.

    Above 0 and below 1 it is ambiguous: a reply may be on a scale from 0 to 1.
    """
    text = without_thoughts(text)
    objects = [{key.lower(): value for key, value in v.items()} for v in json_values(text) if isinstance(v, dict)]
    if values := [value["score"] for value in objects if "score" in value]:
        matches = [None if isinstance(value, bool) else _NUMBER.fullmatch(str(value)) for value in values]
        scores = {float(match[1]) if match else -1.0 for match in matches}
    elif "{" in text:  # JSON that is cut off or of another form: a number in it may be another one
        return None
    else:
        scores = {float(next(filter(None, groups))) for groups in _SCORES.findall(text)}
    score = scores.pop() if len(scores) == 1 else -1.0
    return score / 100 if score == 0 or 1 <= score <= 100 else None


def official_verdict(text: str) -> Verdict | None:
    """What the released scorer makes of a reply, None if it asks again. Raises what aborts its run.

    It trusts JSON, whatever the number; without JSON it takes the first number, and from 0 to 1 as a share. A reason
    that is null counts as a failure, although the score is added.
    """
    try:
        reply = json.loads("{" + text.split("{")[1].split("}")[0] + "}")
        score, reason = float(reply["score"]), reply.get("reason", "")
    except (json.JSONDecodeError, KeyError, IndexError):
        if not (number := re.search(r"\d*\.?\d+", text)):
            return None
        score, reason = float(number[0]), ""
        score = 100 * score if score < 1 else score
    return {"missing": 0, "score": score / 100, "failed": float(reason is None)}
