"""Captions of any other model, with the mistakes revised out: what `captions=` adds to a run of `src.generate`.

    theirs = TheirCaptions(path, codec, length=64)
    requests = theirs.select(requests)          those that have a caption, as `caption` of their record
    theirs.lines(batch, sampled)                what a line of the output says of it, besides the corrected text

    caption -> ids -> passes of a reviser that rewrites only what it is sure of -> ids -> words that changed, how surely

A caption that the model cannot read whole is left as it is, with the reason: too many tokens, or characters that the
tokenizer lacks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from datamodules.shards import Sample
from src.generation.requests import Request
from src.io.errors import UserError
from src.text.captions import key_finder, read_captions
from src.text.tokenizer import Codec
from src.types import Sampled, TraceStep

SHOWN = 20  # corrected captions that a report lists; the file has all of them


class TheirCaptions:
    """The captions of a file, matched with requests by name. length: of a response, with its end of turn"""

    def __init__(self, path: Path, codec: Codec, *, length: int) -> None:
        self.path, self.codec, self.length = path, codec, length
        captions = read_captions(path)
        self.texts, self.sha256 = captions.texts, captions.sha256
        self.find = key_finder({name: [name] for name in self.texts})
        self.used: set[str] = set()

    def select(self, requests: Iterator[Request]) -> Iterator[Request]:
        """Raises UserError for two images of one caption, and at the end if no caption is of any image."""
        key = ""
        for key, read in requests:
            if (name := self.find(key)) is None:
                continue
            if name in self.used:
                raise UserError(
                    f"captions: {self.path} has one caption for several images, {name!r}: name their folders"
                )
            self.used.add(name)
            yield key, partial(_with_caption, read, self.texts[name])
        if not self.used:
            name = next(iter(self.texts), "nothing")
            raise UserError(f"captions: {self.path} is about other images: it has {name!r}, images has {key!r}")

    def lines(self, batch: Sequence[Sample], sampled: Sampled) -> list[dict[str, Any]]:
        """For each row, the caption `before`, its `corrections`, and why it was `left` as it is, if it was."""
        lines = []
        for sample, ids, steps in zip(batch, sampled.ids.tolist(), sampled.traces or [], strict=True):
            before, after = sample.record["caption"], self.codec.decode(ids)
            old = self.codec.encode(before)[0]
            new = ids[: ids.index(self.codec.eot_id)] if self.codec.eot_id in ids else ids
            left = "too_long" if len(old) >= self.length else None
            if not before or self.codec.decode(old) != before:
                left = "unknown_characters" if before else "empty"
            corrections = [] if left or old == new else find_corrections(self.codec, old, new, confidences(steps))
            text = after.strip() if corrections else before
            lines.append({"text": text, "before": before, "corrections": corrections, "left": left})
        return lines


def confidences(steps: Sequence[TraceStep]) -> dict[int, float]:
    """The probability of each rewritten token by position, when it was written last."""
    pairs = (zip(step.rewritten, step.rewrite_confidence, strict=True) for step in steps)
    return {place: value for step in pairs for (place, _, _), value in step}


def find_corrections(
    codec: Codec, before: Sequence[int], after: Sequence[int], confidence: Mapping[int, float]
) -> list[dict[str, Any]]:
    """The words that differ between a text and its revision, both as ids without their ends of turn.

    org, target: the words; start_char: where they begin in the text before; tokens: how many differ in them
    confidence: the lowest of these tokens when they were written; None if all of them are behind a new, earlier end
    """
    length = max(len(before), len(after))
    differs = [before[place : place + 1] != after[place : place + 1] for place in range(length)]
    old, new = codec.pieces(before), codec.pieces(after)
    if old is None or new is None:  # characters that tokens share: all of it is one correction
        spans, old, new = [[0, length]], [codec.decode(before)], [codec.decode(after)]
    else:
        old, new = ([*pieces, *[""] * (length - len(pieces))] for pieces in (old, new))
        within = lambda i: any(p[i - 1][-1:].isalnum() and p[i][:1].isalnum() for p in (old, new))  # noqa: E731
        spans = list[list[int]]()
        for place in (place for place in range(length) if differs[place]):
            start, stop = place, place + 1
            while start > 0 and within(start):
                start -= 1
            while stop < length and within(stop):
                stop += 1
            if spans and start <= spans[-1][1]:
                spans[-1][1] = stop
            else:
                spans.append([start, stop])
    corrections = []
    for start, stop in spans:
        org, target = "".join(old[start:stop]), "".join(new[start:stop])
        values = [confidence[place] for place in range(start, stop) if differs[place] and place in confidence]
        first = len("".join(old[:start])) + len(org) - len(org.lstrip())
        lowest = round(min(values), 4) if values else None
        words = {"org": org.strip(), "target": target.strip(), "start_char": first}
        corrections.append({**words, "confidence": lowest, "tokens": sum(differs[start:stop])})
    return corrections


def report(path: Path, codec: Codec) -> str:
    """The first corrections of a file of corrected captions, and a table of how much was changed."""
    lines = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    changed = [line for line in lines if line["corrections"]]
    shown = []
    for line in changed[:SHOWN]:
        edits = (f"{c['org']} -> {c['target']} ({c['confidence']})" for c in line["corrections"])
        shown.append(f"{line['key']}: {'; '.join(edits)}")
    if len(changed) > SHOWN:
        shown.append(f"... and {len(changed) - SHOWN} more in {path}")
    num_tokens = sum(len(codec.encode(line["before"])[0]) for line in lines)
    num_changed = sum(correction["tokens"] for line in changed for correction in line["corrections"])
    left = Counter(line["left"] for line in lines if line["left"])
    rows = [
        f"| all | {len(lines):,} | {num_tokens:,} |",
        f"| changed | {len(changed):,} | {num_changed:,} |",
        *(f"| left as they are: {reason} | {count:,} | |" for reason, count in left.items()),
    ]
    return "\n".join([*shown, "", "| captions of others | captions | tokens |", "|---|---|---|", *rows]) + "\n"


def _with_caption(read: Callable[[], Sample], text: str) -> Sample:
    sample = read()
    return replace(sample, record={**sample.record, "caption": text})
