"""SMILES, the line notation of molecules, as far as counting rings needs it.

    count_rings("c1ccc2ccccc2c1")     2
    count_rings("C1CC")               ValueError: a ring bond is left open

Rings are counted as bonds - atoms + molecules, the size of a smallest set of rings. In a SMILES the atoms of a part
without dots form a tree, to which each pair of equal ring numbers adds a bond; so parts that dots separate count only
where ring numbers tie them together (C1.C1 is ethane).
"""

from __future__ import annotations

import re

# A bracket atom, whose digits are no ring numbers; a ring number; a branch; a dot.
TOKEN = re.compile(r"(?P<atom>\[[^\[\]]*\])|%\((?P<long>\d+)\)|%(?P<two>\d\d)|(?P<one>\d)|(?P<other>[()\[\]%.])")


def count_rings(smiles: str) -> int:
    """The number of rings. Raises ValueError where a bracket, a branch or a ring bond is left open."""
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
