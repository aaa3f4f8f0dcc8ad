"""Swaps of captions as shards hold them: what becomes wrong, and which tokens change with it.

locate = SwapLocator(codec)
locate("A red ring.", [Swap(2, 5, "red", "blue", "attribute")], counts)    [{"start": 2, ..., "tokens": [1, 2, [17]]}]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from src.scenes.grammar import Swap, split_sentences
from src.text.align import locate_swap
from src.text.tokenizer import Codec

CACHE_SIZE = 200_000  # texts, of some hundred bytes each


class CachedCodec(Codec):
    """The same codec, which remembers what it encoded."""

    def __init__(self, codec: Codec) -> None:
        super().__init__(codec.tokenizer)
        self.encode = lru_cache(CACHE_SIZE)(super().encode)


class SwapLocator:
    """Swaps of a caption as shards hold them, with the tokens that change; unequal lengths are dropped.

    Most sentences of scenes come up again and again, so each is worked out once. That a sentence has the same
    tokens by itself as in its caption is checked by encoding the caption with all swaps made; where it fails,
    nothing is reused.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = CachedCodec(codec)
        self._locate = lru_cache(CACHE_SIZE)(lambda *place: locate_swap(self.codec, *place))

    def __call__(self, text: str, found: Sequence[Swap], counts: Counter[str]) -> list[dict]:
        places = self._by_sentence(text, found) if found else []
        if places is None:
            places = [locate_swap(self.codec, text, s.start, s.end, s.wrong) for s in found]
        counts["swaps of unequal length"] += places.count(None)
        kept = [(swap, place) for swap, place in zip(found, places, strict=True) if place]
        counts["swaps"] += len(kept)
        return [
            {
                "start": s.start,
                "end": s.end,
                "right": s.right,
                "wrong": s.wrong,
                "fact": s.fact,
                "tokens": list(place),
            }
            for s, place in kept
        ]

    def _by_sentence(self, text: str, found: Sequence[Swap]) -> list[tuple[int, int, list[int]] | None] | None:
        ids, offsets = self.codec.encode(text)
        sentences = [(start - (start > 0), end) for start, end in split_sentences(text)]  # with the blank before
        flawed, falsified, places = list(ids), text, []
        for swap in reversed(found):  # from the back, so that the places before stay valid
            a, b = next((s for s in sentences if s[0] <= swap.start and swap.end <= s[1]), (0, len(text)))
            place = self._locate(text[a:b], swap.start - a, swap.end - a, swap.wrong)
            if place:
                shift = sum(end <= a for _, end in offsets)
                place = (place[0] + shift, place[1] + shift, place[2])
                flawed[place[0] : place[1]] = place[2]
                falsified = falsified[: swap.start] + swap.wrong + falsified[swap.end :]
            places.append(place)
        return places[::-1] if self.codec.encode(falsified)[0] == flawed else None
