"""SMILES, the line notation of molecules, as far as counting rings needs it.

    count_rings("c1ccc2ccccc2c1")     2
    count_rings("C1CC")               ValueError: a ring bond is left open

Rings are counted as bonds - atoms + molecules, the size of a smallest set of rings. In a SMILES the atoms of a part
without dots form a tree, to which each pair of equal ring numbers adds a bond; so parts that dots separate count only
where ring numbers tie them together (C1.C1 is ethane).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from src.io.errors import UserError
from src.preparation.annotations import Skip
from src.preparation.counts import Counts
from src.preparation.jsonl import note, read_records, text_of
from src.preparation.text import Item, Texts, check_name
from src.text.tokenizer import Codec

log = logging.getLogger(__name__)

# A bracket atom, whose digits are no ring numbers; a ring number; a branch; a dot.
TOKEN = re.compile(r"(?P<atom>\[[^\[\]]*\])|%\((?P<long>\d+)\)|%(?P<two>\d\d)|(?P<one>\d)|(?P<other>[()\[\]%.])")


def count_rings(smiles: str) -> int:
    """The number of rings. Raises UserError where a bracket, a branch or a ring bond is left open."""
    opened: dict[int, int] = {}  # ring number -> the part in which it was opened
    parts, bonds, depth = [0], 0, 0  # parts[n]: another part that part n is tied to, or itself
    for found in TOKEN.finditer(smiles):
        digits = found["long"] or found["two"] or found["one"]
        if digits:
            number, here = int(digits), len(parts) - 1
            if number not in opened:
                opened[number] = here
                continue
            bonds += 1
            one, two = _root(parts, opened.pop(number)), _root(parts, here)
            parts[max(one, two)] = min(one, two)
        elif found["other"] == ".":
            parts.append(len(parts))
        elif found["other"] in ("(", ")"):
            depth += 1 if found["other"] == "(" else -1
            if depth < 0:
                raise ValueError(f"a branch is closed that was not opened: {smiles!r}")
        elif found["other"]:
            raise ValueError(f"a bracket is left open, or no number follows %: {smiles!r}")
    if depth or opened:
        raise ValueError(f"a {'branch' if depth else 'ring bond'} is left open: {smiles!r}")
    molecules = sum(place == parent for place, parent in enumerate(parts))
    return bonds - (len(parts) - molecules)


def _root(parts: list[int], place: int) -> int:
    while parts[place] != place:
        place = parts[place]
    return place


@dataclass(kw_only=True)
class Smiles(Texts):
    """Molecules with the class 1 where a property reaches a percentile of it over the training split, else 0.

    The class is the prompt, so that guidance (`cfg_scale`) can ask for it; the property is kept in the sample.
    A new tokenizer has one token for each character (a `vocab_size` of 0 leaves no room for others).

    field: the column of the SMILES; value: the column of the property, null: the number of rings
    """

    alphabet: ClassVar[str] = "seen"
    words: ClassVar[Sequence[str]] = ("0", "1")

    field: str = "smiles"
    value: str | None = None
    percentile: float = 90.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.percentile <= 100:
            raise UserError(f"prepare.percentile must be from 0 to 100, got {self.percentile}")
        if self.value is not None:
            check_name("prepare.value", self.value)

    def read(self, path: Path, skipped: Counts) -> Iterator[tuple[str, str, str, dict]]:
        for place, record in read_records(path, skipped):
            try:
                text = text_of(record, self.field).strip()
                yield place, "", text, self._property(text, record)
            except Skip as reason:
                note(skipped, reason, place, record)

    def _property(self, smiles: str, record: dict) -> dict:
        try:
            rings = count_rings(smiles)
        except ValueError:
            raise Skip("broken_smiles") from None
        if self.value is None:
            return {"rings": rings}
        if record.get(self.value) is None:
            raise Skip("missing_field")
        try:
            number = float(record[self.value])
        except (TypeError, ValueError):
            raise Skip("not_a_number") from None
        if not np.isfinite(number):
            raise Skip("not_a_number")
        return {self.value: number}

    def check(self, item: Item, codec: Codec) -> None:
        super().check(item, codec)
        if len(codec.encode(item.text)[0]) >= self.response_length:
            raise Skip("responses too long")

    def divide(
        self, items: Sequence[Item], codec: Codec, counts: Mapping[str, Counts]
    ) -> tuple[dict[str, Iterable[dict]], dict]:
        name = self.value or "rings"
        trained = [item.more[name] for item in items if item.split == "train"]
        threshold = float(np.percentile(trained, self.percentile)) if trained else 0.0
        for item in items:
            item.prompt = str(int(item.more[name] >= threshold))
            counts[item.split]["class_1"] += item.prompt == "1"
        classes = {item.prompt for item in items if item.split == "train"}
        if len(classes) == 1:
            log.warning(
                "all molecules of train are of class %s, as the percentile %g of %s is %g: guidance by the class has "
                "nothing to learn; change prepare.percentile or prepare.value",
                classes.pop(), self.percentile, name, threshold,
            )  # fmt: skip
        found, _ = super().divide(items, codec, counts)
        return found, {"label": {"property": name, "percentile": self.percentile, "threshold": threshold}}
