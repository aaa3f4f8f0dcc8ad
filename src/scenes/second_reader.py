"""A second reader of scene captions, which shares nothing with the grammar but the words: it looks for them.

    count_claims(scene, text) -> (true claims, claims)

    a sentence with            claims
    `background`               2: background and number
    a relation word            1: that the two objects it names lie so
    anything else              4: size, colour, shape and place of the object that it fits best

A claim whose word is missing, or not the only one of its kind, is false. Grammar does not matter.
"""

from __future__ import annotations

from itertools import pairwise

from src.scenes.graph import BACKGROUNDS, COLOURS, COLUMNS, ROWS, SHAPES, SIZES, Scene, SceneObject

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def count_claims(scene: Scene, text: str) -> tuple[int, int]:
    """Number of true claims, and of all."""
    true = claims = 0
    for sentence in text.lower().split("."):
        words = sentence.replace(",", " ").split()
        if "background" in words:
            true += _only(words, BACKGROUNDS) == scene.background
            true += _only(words, DIGITS) == DIGITS[len(scene.objects)]
            claims += 2
        elif word := _relation(words):
            true += _is_true(scene, words, word)
            claims += 1
        elif words:
            true += max(_num_shared(item, words) for item in scene.objects)
            claims += 4
    return true, claims


def _only(words: list[str], options: tuple[str, ...]) -> str | None:
    named = [word for word in words if word in options]
    return named[0] if len(named) == 1 else None


def _relation(words: list[str]) -> str | None:
    for word, after in pairwise([*words, ""]):
        if word in ("above", "below") or (word in ("left", "right") and after == "of"):
            return word
    return None


def _is_true(scene: Scene, words: list[str], relation: str) -> bool:
    """Whether the first object named lies so from the second; the other way round after `To the left of ...`."""
    named = [(a, b) for a, b in pairwise(words) if a in COLOURS and b in SHAPES]
    if len(named) != 2:
        return False
    one, other = reversed(named) if words[0] == "to" else named
    for a in (item for item in scene.objects if (item.colour, item.shape) == one):
        for b in (item for item in scene.objects if (item.colour, item.shape) == other):
            (row, column), (row2, column2) = a.cell, b.cell
            lies = {"left": column < column2, "right": column > column2, "above": row < row2, "below": row > row2}
            if lies[relation]:
                return True
    return False


def _num_shared(item: SceneObject, words: list[str]) -> int:
    named = [_only(words, options) for options in (SIZES, COLOURS, SHAPES, ROWS, COLUMNS)]
    size, colour, shape, *place = named
    return (size == item.size) + (colour == item.colour) + (shape == item.shape) + (place == [item.row, item.column])
