"""CapArena: which caption of an image is better, that of the model under test or a rival's? (arXiv 2503.12329.)

    item.extra {"rival": caption, "baseline": number of the model that wrote it, in `CapArenaScore.baselines`}
    verdict {"baseline", "orders", "as_first", "as_second", "words"}

`as_first`: 1 if the caption under test won when it was shown first, 0 for a tie, -1 if it lost, None if it was not
shown so or no reply could be read; `orders`: in how many it was shown; `words`: of the caption under test, as the
released scorer counts them. Judges prefer one place to the other, so strict mode shows the captions in both orders.
Official mode shows one, drawn for each image from `seed` (the released scorer draws again in every run).
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from src.chat.reading import without_thoughts
from src.judges.base import Dialogue, Item, Judge, Mode, ask
from src.judges.prompt import bullets

ORDERS = ("as_first", "as_second")
OFFICIAL_ATTEMPTS = 5
STRICT_SAMPLING = {"temperature": 0.0, "max_tokens": 1500}
OFFICIAL_SAMPLING = {"temperature": 0.1, "top_p": 0.9, "max_tokens": 1500}
OFFICIAL_WINNERS = {"Caption 1 is better": 1, "Caption 2 is better": 2, "Tie": 0}  # each also with a full stop
_JUDGMENT = re.compile(r"^\s*(?:final )?(?:judge?ment|verdict)\s*:\s*(.*)$", re.IGNORECASE | re.MULTILINE)
_WINNER = re.compile(r"(?:caption )?([12])(?: is (?:the )?better| wins)?(?: than (?:caption )?[12])?", re.IGNORECASE)
_TIE = re.compile(r"(?:it is |it's )?(?:a )?tie", re.IGNORECASE)


class CapArena(Judge):
    """both_orders: None: in strict mode only; seed: of the order in which a single battle shows the captions"""

    name = "caparena"

    def __init__(
        self,
        *,
        mode: Mode = "strict",
        prompts: str | Path | None = None,
        attempts: int = 3,
        both_orders: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(mode=mode, prompts=prompts, attempts=attempts if mode == "strict" else OFFICIAL_ATTEMPTS)
        self.seed, self.both_orders = seed, mode == "strict" if both_orders is None else both_orders

    def verdict(self, item: Item) -> Dialogue:
        outcomes: dict[str, float | None] = dict.fromkeys(ORDERS)
        counts = {"missing": 0, "baseline": item.extra["baseline"], "orders": 0, "words": 0}
        if item.caption is None:
            return {**counts, **outcomes, "missing": 1}
        drawn = ORDERS[hashlib.sha256(f"{self.seed}:{item.key}".encode()).digest()[0] % 2]
        orders = ORDERS if self.both_orders else (drawn,)
        sampling = STRICT_SAMPLING if self.mode == "strict" else OFFICIAL_SAMPLING
        for order in orders:
            first, second = item.caption, item.need("rival")
            if order == "as_second":
                first, second = second, first
            fields = {"references": bullets(item.need("references")), "first": first, "second": second}
            request = self.request("compare", fields, images=(item.need("image"),), sampling=sampling)
            if self.mode == "strict":
                winner = yield from ask(request, read_winner, attempts=self.attempts)
            else:
                judgment = yield from ask(request, official_judgment, attempts=self.attempts, hotter=False)
                winner = OFFICIAL_WINNERS.get((judgment or "").removesuffix("."))
            won, lost = (1, 2) if order == "as_first" else (2, 1)
            outcomes[order] = None if winner is None else {won: 1, lost: -1, 0: 0}[winner]
        return {**counts, **outcomes, "orders": len(orders), "words": len(item.caption.split(" "))}


def read_winner(text: str) -> int | None:
    """1 or 2 for the better caption, 0 for a tie; None unless all judgments of the reply say the same, and no more.

    A judgment begins its line; without one the reply as a whole must be a judgment. Markup is ignored.
    """
    text = re.sub(r"[*_<>`\"#\[\]]", "", without_thoughts(text))
    winners = {_winner(judgment) for judgment in _JUDGMENT.findall(text) or [text]}
    return winners.pop() if len(winners) == 1 else None


def _winner(judgment: str) -> int | None:
    judgment = judgment.strip(" \t\n.!")
    if match := _WINNER.fullmatch(judgment):
        return int(match[1])
    return 0 if _TIE.fullmatch(judgment) else None


def official_judgment(text: str) -> str | None:
    """What the released scorer stores as the judgment of a reply, usable or not; None if it asks again."""
    judgment = re.search(r"Judgment:\s*(.*)", text)
    return judgment[1].strip() if judgment and re.search(r"Reason:.*?Judgment:", text, re.DOTALL) else None
