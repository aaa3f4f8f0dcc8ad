"""Factuality: the share of a caption's atomic claims that are true of the image (CapMAS, arXiv 2412.15484).

    verdict {"true", "total", "failed", "skipped"}      numbers of claims; skipped: 1 if the caption was not taken apart

A text-only request takes the caption apart, one with image and reference checks all claims of it. In strict mode
claims without a verdict are asked about again; a caption without words has no claims, and nothing is asked.
"""

from __future__ import annotations

import re
from pathlib import Path

from src.chat.reading import said
from src.judges.base import Dialogue, Item, Judge, Mode, Request, Verdict, again, ask
from src.judges.coverage import official_pieces
from src.judges.numbered import answers
from src.judges.prompt import Prompt, bullets

SAMPLING = {"temperature": 1e-7, "max_tokens": 4096}
OFFICIAL_ATTEMPTS = 3
MOST_REQUESTS = 100  # about one image in official mode: the released scorer would go on for ever
MOST_WORDS = 245  # of a claim in official mode
SKIPPED: Verdict = {"missing": 0, "true": 0, "total": 0, "failed": 0, "skipped": 1}
_CLAIM = re.compile(r"^[ \t*_]*(?:\d{1,4}[ \t*_]*[.):]|[-*\u2022][ \t])[ \t*_]*(.*\w.*)$", re.MULTILINE)
_TRUTH = re.compile(r"[\W_]*(true|false)(?!\w|\s*/|\s+or\b)", re.IGNORECASE)


class Factuality(Judge):
    """prompts: folder with a factuality.yaml (None: ours); attempts: requests for the claims, and for all verdicts"""

    def __init__(self, *, mode: Mode = "strict", prompts: str | Path | None = None, attempts: int = 3) -> None:
        self.mode, self.attempts = mode, attempts
        self.prompt = Prompt.load("factuality", prompts)

    def verdict(self, item: Item) -> Dialogue:
        if item.caption is None:
            return {**SKIPPED, "missing": 1}
        split = self.prompt.request("split", {"caption": item.caption}, sampling=SAMPLING)
        if self.mode == "official":
            return (yield from self._official(item, split))
        # 1. The claims.
        if not re.search(r"\w", item.caption):
            return {**SKIPPED, "skipped": 0}
        if (claims := (yield from ask(split, read_claims, attempts=self.attempts))) is None:
            return SKIPPED
        # 2. Their verdicts.
        numbers, given = range(1, len(claims) + 1), dict[int, bool]()
        for attempt in range(self.attempts):
            if not (left := [number for number in numbers if number not in given]):
                break
            listing = "\n".join(f"{number}. {claims[number - 1]}" for number in left)
            reply = yield again(self._check(item, listing), attempt)
            given = {**answers(reply.text or "", numbers, read_truth), **given}
        failed = len(claims) - len(given)
        return {"missing": 0, "true": sum(given.values()), "total": len(claims), "failed": failed, "skipped": 0}

    def _official(self, item: Item, split: Request) -> Dialogue:
        """As released: if the verdicts fit the claims only after a third misfit, the image starts again."""
        begun = asked = 0
        while begun + asked < MOST_REQUESTS:
            reply = yield again(split, begun, hotter=False)
            begun += 1
            if (lines := official_claims(reply.text or "")) is None:
                return SKIPPED
            for misfits in range(MOST_REQUESTS - begun - asked):
                reply = yield again(self._check(item, "\n".join(lines)), asked, hotter=False)
                asked += 1
                if len(values := official_verdicts(reply.text or "")) == len(lines):
                    if misfits >= OFFICIAL_ATTEMPTS:
                        break
                    true = values.count("True")
                    return {"missing": 0, "true": true, "total": len(lines), "failed": 0, "skipped": 0}
        return SKIPPED

    def _check(self, item: Item, claims: str) -> Request:
        """The request for the verdicts of numbered claims."""
        fields = {"references": bullets(item.need("references")), "claims": claims}
        return self.prompt.request("check", fields, images=(item.need("image"),), sampling=SAMPLING)


def read_claims(text: str) -> list[str] | None:
    """The claims in a reply, of its numbered or bulleted lines; None if there are none."""
    return [claim.strip() for claim in _CLAIM.findall(said(text))] or None


def read_truth(text: str) -> bool | None:
    """A verdict; None for what is neither true nor false."""
    return match[1].lower() == "true" if (match := _TRUTH.match(text)) else None


def official_claims(text: str) -> list[str] | None:
    """The lines that the released scorer takes for claims; None where it skips the image.

    It skips a reply without claims, one where three in a row start alike (up to ". "), and one with a claim of more
    than 245 words.
    Raises IndexError for an empty line, which aborts its run.
    """
    if not text:
        return None
    lines = [line for line in text.replace("\n\n", "\n").split("\n") if line[0].isdigit() and ". " in line]
    starts = [line.split(". ")[1] for line in lines]
    repeated = any(starts[n] == starts[n + 1] == starts[n + 2] for n in range(len(starts) - 2))
    too_long = any(len(line.split(" ")) > MOST_WORDS for line in lines)
    return None if not lines or repeated or too_long else lines


def official_verdicts(text: str) -> list[str]:
    """The verdicts that the released scorer finds. Raises IndexError for an empty piece, which aborts its run."""
    return [piece.split()[0] for piece in official_pieces(text)][1::2]
