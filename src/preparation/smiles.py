"""Molecules in SMILES notation with a class label, for guidance (`conf=smiles`).

    records -> SMILES with a property (a column, or the number of rings) -> class 1 from a percentile of it -> shards

The number of rings is bonds - atoms + molecules, the size of a smallest set of rings. In a SMILES, the atoms of a part
without dots form a tree, and each pair of equal ring numbers adds a bond: within a part it closes a ring, and between
two parts the first one joins them into one molecule (C1.C1 is ethane).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from src.preparation.counts import Counts, Skip
from src.preparation.items import Items
from src.preparation.records import text_of
from src.preparation.splits import SPLITS
from src.preparation.text import Text, Texts
from src.text.tokenizer import Codec

log = logging.getLogger(__name__)

# A bracket atom (its digits are not ring numbers), a ring number, or one of ( ) [ ] % and the dot.
TOKEN = re.compile(r"(?P<atom>\[[^\[\]]*\])|%\((?P<long>\d+)\)|%(?P<two>\d\d)|(?P<one>\d)|(?P<other>[()\[\]%.])")


def count_rings(smiles: str) -> int:
    """The number of rings. Raises ValueError if a bracket, a branch or a ring bond is left open."""
    open_rings: dict[int, int] = {}  # ring number -> part in which it was opened
    molecules, num_bonds, depth = [0], 0, 0  # molecules: of each part that dots separate
    for token in TOKEN.finditer(smiles):
        digits = token["long"] or token["two"] or token["one"]
        if digits and int(digits) not in open_rings:
            open_rings[int(digits)] = len(molecules) - 1
        elif digits:
            num_bonds += 1
            first, second = molecules[open_rings.pop(int(digits))], molecules[-1]
            molecules = [first if molecule == second else molecule for molecule in molecules]
        elif token["other"] == ".":
            molecules.append(len(molecules))
        elif token["other"] in ("(", ")"):
            depth += 1 if token["other"] == "(" else -1
            if depth < 0:
                raise ValueError(f"a branch is closed but was not opened: {smiles!r}")
        elif token["other"]:
            raise ValueError(f"a bracket is left open, or no number follows %: {smiles!r}")
    if depth or open_rings:
        raise ValueError(f"a {'branch' if depth else 'ring bond'} is left open: {smiles!r}")
    return num_bonds - (len(molecules) - len(set(molecules)))


@dataclass(kw_only=True)
class Smiles(Texts):
    """Molecules of class 1 if a property reaches a percentile of its values in the training split, else of class 0.

    The class is the prompt, so that guidance (`cfg_scale`) can steer towards it; the property is kept in the sample.
    A new tokenizer has one token per character (`vocab_size` 0 leaves no room for merges).

    field: column of the SMILES
    value: column of the property; null uses the number of rings
    """

    alphabet = "seen"
    words = ("0", "1")

    field: str = "smiles"
    value: str | None = None
    percentile: float = 90.0

    def parse(self, record: dict) -> tuple[str, str, dict]:
        smiles = text_of(record, self.field).strip()
        try:
            rings = count_rings(smiles)
        except ValueError:
            raise Skip("broken_smiles") from None
        if self.value is None:
            return "", smiles, {"rings": rings}
        if record.get(self.value) is None:
            raise Skip("missing_field")
        try:
            number = float(record[self.value])
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise Skip("not_a_number")
        return "", smiles, {self.value: number}

    def check(self, item: Text, codec: Codec) -> None:
        self.check_response(item.text, codec)

    @property
    def training(self) -> str:
        return "conf=stage1,task/smiles"

    def divide(self, items: Items, codec: Codec, counts: Mapping[str, Counts]) -> dict:
        super().divide(items, codec, counts)
        name = self.value or "rings"
        values = np.fromiter((item.extra[name] for item in items.of("train")), np.float64)
        threshold = float(np.percentile(values, self.percentile)) if len(values) else 0.0
        for split in SPLITS:
            for item in items.of(split):
                item.prompt = str(int(item.extra[name] >= threshold))
                items.update(item)
                counts[split]["class_1"] += item.prompt == "1"
        classes = {str(int(value >= threshold)) for value in values}
        if len(classes) == 1:
            log.warning(
                "all molecules of train are of class %s, as the percentile %g of %s is %g: the model cannot learn "
                "guidance by class; change prepare.percentile or prepare.value",
                classes.pop(), self.percentile, name, threshold,
            )  # fmt: skip
        return {"label": {"property": name, "percentile": self.percentile, "threshold": threshold}}
