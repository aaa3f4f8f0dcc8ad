"""Scene graphs: up to nine objects on a 3x3 board, each with shape, colour, size and place.

A place (row, column of the board) holds at most one object, so it identifies the object that a sentence is about.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from random import Random

from src.io.errors import UserError

SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white", "black", "cyan")
SIZES = ("small", "large")
ROWS = ("upper", "middle", "lower")
COLUMNS = ("left", "center", "right")
BACKGROUNDS = ("gray", "brown", "pink", "beige")
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class SceneObject:
    """One object. `row` and `column` are words of `ROWS` and `COLUMNS`; `dx`, `dy` shift its centre, in cells."""

    shape: str
    colour: str
    size: str
    row: str
    column: str
    dx: float = 0.0
    dy: float = 0.0

    @property
    def cell(self) -> tuple[int, int]:
        """(row index, column index) on the board."""
        return ROWS.index(self.row), COLUMNS.index(self.column)


@dataclass(frozen=True)
class Scene:
    """Objects in raster order (top to bottom, left to right) on a background."""

    objects: tuple[SceneObject, ...]
    background: str

    def at(self, row: str, column: str) -> SceneObject | None:
        return next((o for o in self.objects if (o.row, o.column) == (row, column)), None)

    def holds(self, relation: str, subject: tuple[str, str], other: tuple[str, str]) -> bool:
        """Whether some object (colour, shape) is in `relation` to a different object (colour, shape)."""
        return any(
            relation in relations(a, b)
            for a in self.objects
            for b in self.objects
            if a is not b and (a.colour, a.shape) == subject and (b.colour, b.shape) == other
        )

    def to_dict(self) -> dict:
        return {"objects": [asdict(o) for o in self.objects], "background": self.background}

    @classmethod
    def from_dict(cls, data: dict) -> Scene:
        return cls(tuple(SceneObject(**o) for o in data["objects"]), data["background"])


def relations(a: SceneObject, b: SceneObject) -> set[str]:
    """The `RELATIONS` that hold between two objects, by their cells."""
    (row_a, col_a), (row_b, col_b) = a.cell, b.cell
    names = set()
    if col_a != col_b:
        names.add("left of" if col_a < col_b else "right of")
    if row_a != row_b:
        names.add("above" if row_a < row_b else "below")
    return names


def draw_scene(rng: Random, *, objects: tuple[int, int] = (1, 3), jitter: float = 0.12) -> Scene:
    """A random scene of `objects` (inclusive range) objects, their centres shifted by up to `jitter` cells."""
    if not 1 <= objects[0] <= objects[1] <= len(ROWS) * len(COLUMNS):
        raise UserError(f"objects must be a range within 1..9, got {objects}")
    cells = rng.sample([(r, c) for r in ROWS for c in COLUMNS], rng.randint(*objects))
    cells.sort(key=lambda cell: (ROWS.index(cell[0]), COLUMNS.index(cell[1])))
    items = tuple(
        SceneObject(
            shape=rng.choice(SHAPES),
            colour=rng.choice(COLOURS),
            size=rng.choice(SIZES),
            row=row,
            column=column,
            dx=round(rng.uniform(-jitter, jitter), 3),
            dy=round(rng.uniform(-jitter, jitter), 3),
        )
        for row, column in cells
    )
    return Scene(items, rng.choice(BACKGROUNDS))
