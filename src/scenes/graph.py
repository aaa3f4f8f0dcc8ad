"""Scene graphs: up to nine objects on a 3x3 board, each with shape, colour, size and place.

A place (row, column of the board) holds at most one object, so it identifies the object that a sentence is about.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from itertools import product
from random import Random

from src.io.errors import UserError

SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white", "black", "cyan")
SIZES = ("small", "large")
ROWS = ("upper", "middle", "lower")
COLUMNS = ("left", "center", "right")
BACKGROUNDS = ("gray", "brown", "pink", "beige")
RELATIONS = ("left of", "right of", "above", "below")
Look = tuple[str, str]  # colour and shape, by which captions name an object
LOOKS: frozenset[Look] = frozenset(product(COLOURS, SHAPES))


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


def draw_scene(
    rng: Random,
    *,
    objects: tuple[int, int] = (1, 3),
    looks: Collection[Look] = LOOKS,
    distinct: bool = False,
    jitter: float = 0.12,
) -> Scene:
    """A random scene.

    objects:  least and greatest number of objects
    looks:    the (colour, shape) that an object may have; distinct: no two objects share one, so that it names them
    jitter:   greatest shift of a centre, in cells
    """
    if not 1 <= objects[0] <= objects[1] <= len(ROWS) * len(COLUMNS):
        raise UserError(f"objects must be a range within 1..9, got {objects}")
    if len(looks) < (objects[1] if distinct else 1):
        raise UserError(f"{objects[1]} objects need more looks than the {len(looks)} that are allowed: hold fewer out")
    cells = rng.sample([(r, c) for r in ROWS for c in COLUMNS], rng.randint(*objects))
    cells.sort(key=lambda cell: (ROWS.index(cell[0]), COLUMNS.index(cell[1])))
    free, items = set(looks), []
    for row, column in cells:
        shape, colour = rng.choice(SHAPES), rng.choice(COLOURS)
        while (colour, shape) not in free:
            shape, colour = rng.choice(SHAPES), rng.choice(COLOURS)
        if distinct:
            free.remove((colour, shape))
        size, dx, dy = rng.choice(SIZES), rng.uniform(-jitter, jitter), rng.uniform(-jitter, jitter)
        items.append(SceneObject(shape, colour, size, row, column, round(dx, 3), round(dy, 3)))
    return Scene(tuple(items), rng.choice(BACKGROUNDS))
