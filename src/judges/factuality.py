"""Factuality: the share of a caption's atomic claims that are true of the image (CapMAS, arXiv 2412.15484).

    verdict {"true", "total", "failed", "skipped"}      numbers of claims; skipped: 1 if the caption was not taken apart

A text-only request takes the caption apart, one with image and reference checks all claims of it. In strict mode
claims without a verdict are asked about again; a caption without words has no claims, and nothing is asked.
"""

from __future__ import annotations

import functools
import re

from src.chat.reading import without_thoughts
from src.judges.base import Dialogue, Item, Judge, Request, Verdict, again, ask
from src.judges.coverage import official_pieces
from src.judges.numbered import ask_all
from src.judges.prompt import bullets

SAMPLING = {"temperature": 1e-7, "max_tokens": 4096}
OFFICIAL_ATTEMPTS = 3
MOST_REQUESTS = 100  # about one image in official mode: the released scorer would go on for ever
MOST_WORDS = 245  # of a claim in official mode
SKIPPED: Verdict = {"missing": 0, "true": 0, "total": 0, "failed": 0, "skipped": 1}
_CLAIM = re.compile(r"^[ \t*_]*(?:\d{1,4}[ \t*_]*[.):]|[-*\u2022][ \t])[ \t*_]*(.*\w.*)$", re.MULTILINE)
_TRUTH = re.compile(r"[\W_]*(true|false)(?!\w|\s*/|\s+or\b)", re.IGNORECASE)


class Factuality(Judge):
    """attempts: requests for the claims, and as many for all verdicts; in official mode there is no limit of them"""

    name = "factuality"

    def verdict(self, item: Item) -> Dialogue:
        if item.caption is None:
            return {**SKIPPED, "missing": 1}
        split = self.request("split", {"caption": item.caption}, sampling=SAMPLING)
        if self.mode == "official":
            return (yield from self._official(item, split))
        # 1. The claims.
        if not re.search(r"\w", item.caption):
            return {**SKIPPED, "skipped": 0}
        if (claims := (yield from ask(split, read_claims, attempts=self.attempts))) is None:
            return SKIPPED
        # 2. Their verdicts.
        check = functools.partial(self._check, item)
        truths = yield from ask_all(check, dict(enumerate(claims, 1)), read_truth, attempts=self.attempts)
        failed = len(claims) - len(truths)
        return {"missing": 0, "true": sum(truths.values()), "total": len(claims), "failed": failed, "skipped": 0}

    def _official(self, item: Item, split: Request) -> Dialogue:
        """As released: if the verdicts fit the claims only after a third misfit, the image starts again."""
        splits = checks = 0  # requests so far
        while splits + checks < MOST_REQUESTS:
            reply = yield again(split, splits, hotter=False)
            splits += 1
            if (lines := official_claims(reply.text or "")) is None:
                return SKIPPED
            for misfits in range(MOST_REQUESTS - splits - checks):
                reply = yield again(self._check(item, "\n".join(lines)), checks, hotter=False)
                checks += 1
                if len(values := official_verdicts(reply.text or "")) == len(lines):
                    if misfits >= OFFICIAL_ATTEMPTS:
                        break
                    true = values.count("True")
                    return {"missing": 0, "true": true, "total": len(lines), "failed": 0, "skipped": 0}
        return SKIPPED

    def _check(self, item: Item, claims: str) -> Request:
        """The request for the verdicts of numbered claims."""
        fields = {"references": bullets(item.need("references")), "claims": claims}
        return self.request("check", fields, images=(item.need("image"),), sampling=SAMPLING)


def read_claims(text: str) -> list[str] | None:
    """The claims in a reply, of its numbered or bulleted lines; None if there are none."""
    return [claim.strip() for claim in _CLAIM.findall(without_thoughts(text))] or None


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
