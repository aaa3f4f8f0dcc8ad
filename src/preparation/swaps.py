"""Swaps of captions as shards hold them: the changed characters, and the tokens that change with them.

locate = SwapLocator(codec)
locate("A red ring.", [Swap(2, 5, "red", "blue", "attribute")], counts)    [{"start": 2, ..., "tokens": [1, 2, [17]]}]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache

from src.scenes.grammar import Swap, split_sentences
from src.text.align import locate_swap
from src.text.tokenizer import Codec

CACHE_SIZE = 200_000  # texts of a few hundred bytes


class CachedCodec(Codec):
    """A codec that caches `encode`."""

    def __init__(self, codec: Codec) -> None:
        super().__init__(codec.tokenizer)
        self.encode = lru_cache(CACHE_SIZE)(super().encode)


class SwapLocator:
    """Finds the tokens that each swap of a caption changes; swaps that change the number of tokens are dropped.

    Sentences of scenes repeat, so results are cached per sentence. This is valid only if a sentence has the same tokens
    alone as in its caption, which is checked by encoding the caption with all swaps applied; if the check fails, every
    swap is located in the whole caption.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = CachedCodec(codec)
        self._locate = lru_cache(CACHE_SIZE)(lambda *swap: locate_swap(self.codec, *swap))

    def __call__(self, text: str, swaps: Sequence[Swap], counts: Counter[str]) -> list[dict]:
        spans = self._by_sentence(text, swaps) if swaps else []
        if spans is None:
            spans = [locate_swap(self.codec, text, s.start, s.end, s.wrong) for s in swaps]
        counts["swaps of unequal length"] += spans.count(None)
        located = [{**asdict(swap), "tokens": list(span)} for swap, span in zip(swaps, spans, strict=True) if span]
        counts["swaps"] += len(located)
        return located

    def _by_sentence(self, text: str, swaps: Sequence[Swap]) -> list[tuple[int, int, list[int]] | None] | None:
        """(start, end, new ids) of each swap, None for unequal lengths; None as a whole if the check fails."""
        ids, offsets = self.codec.encode(text)
        sentences = [(start - (start > 0), end) for start, end in split_sentences(text)]  # with the space before
        wrong_ids, wrong_text, spans = list(ids), text, []
        for swap in reversed(swaps):  # from the back, so that earlier offsets stay valid
            a, b = next((s for s in sentences if s[0] <= swap.start and swap.end <= s[1]), (0, len(text)))
            span = self._locate(text[a:b], swap.start - a, swap.end - a, swap.wrong)
            if span:
                shift = sum(end <= a for _, end in offsets)
                span = (span[0] + shift, span[1] + shift, span[2])
                wrong_ids[span[0] : span[1]] = span[2]
                wrong_text = wrong_text[: swap.start] + swap.wrong + wrong_text[swap.end :]
            spans.append(span)
        return spans[::-1] if self.codec.encode(wrong_text)[0] == wrong_ids else None
