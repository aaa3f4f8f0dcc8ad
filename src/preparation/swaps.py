"""Swaps of captions as shards hold them: the changed characters, and the tokens that change with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from src.preparation.counts import Counts
from src.scenes.grammar import Swap
from src.text.align import locate_swap
from src.text.tokenizer import Codec


def locate_swaps(codec: Codec, text: str, swaps: Sequence[Swap], counts: Counts) -> list[dict]:
    """The swaps of a caption with their tokens; those that change the number of tokens, or whose false words the
    tokenizer cannot give back, are left out and counted."""
    located, encodable = [], [swap for swap in swaps if not codec.loses(swap.wrong)]
    encoded = codec.encode(text) if encodable else None
    for swap in encodable:
        tokens = locate_swap(codec, text, swap.start, swap.end, swap.wrong, encoded=encoded)
        if tokens:
            located.append({**asdict(swap), "tokens": list(tokens)})
    counts["swaps of unequal length"] += len(encodable) - len(located)
    counts["swaps not in vocabulary"] += len(swaps) - len(encodable)
    counts["swaps"] += len(located)
    return located
