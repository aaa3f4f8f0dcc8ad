"""A grid of sampler settings -> named samplers.

    grid:                              proseco[every=1,passes=1], proseco[every=1,passes=4], ...
      proseco:
        reviser: {every: [1, 2], passes: [1, 4]}      or, as one key, reviser.every: [1, 2]

Every list is an axis; a sampler takes all combinations of its axes. A name says what varies: a list of one value is a
setting, no part of a name. Nor is `tokens_per_step`, which replaces the numbers of the evaluation for that sampler.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import Any

from src.cli.instantiate import arguments, dotted, fits, hint, is_node, walk
from src.io.errors import UserError

SPEED = "tokens_per_step"


def expand(samplers: dict[str, dict], grid: Any, speeds: list[int], *, known: set[str]) -> tuple[dict, dict]:
    """(samplers by name, their numbers of tokens a step by name), in the order of `samplers`.

    samplers: nodes by name; grid: sampler -> options, as above; known: names that a grid may hold without effect, as
    those samplers are left out. Raises UserError for what is no option of a sampler, with the nearest one.
    """
    axes = _axes(grid or {}, known | set(samplers))
    expanded, own_speeds = {}, {}
    for name, node in samplers.items():
        options = dict(axes.get(name, {}))
        counts = check_speeds(options.pop(SPEED, speeds), f"evaluate.grid.{name}.{SPEED}")
        labels = _labels([option for option, values in options.items() if len(values) > 1])
        for values in product(*options.values()):
            chosen = dict(zip(options, values, strict=True))
            inside = ",".join(
                f"{labels[option]}={_text(value)}" for option, value in chosen.items() if option in labels
            )
            full = f"{name}[{inside}]" if inside else name
            expanded[full] = copy.deepcopy(node)
            own_speeds[full] = counts
            for option, value in chosen.items():
                _set(expanded[full], option, value, place=f"evaluate.grid.{name}")
    return expanded, own_speeds


def family(name: str) -> str:
    """The sampler that a name of the grid is a variant of."""
    return name.partition("[")[0]


def check_speeds(counts: Any, place: str) -> list[int]:
    """Numbers of tokens a step, ascending and each once. Raises UserError for anything else."""
    if not (counts and fits(counts, list[int]) and min(counts) > 0):
        raise UserError(f"{place}: expected a list of whole numbers such as [1, 8], got {counts!r}")
    return sorted(set(counts))


def _axes(grid: Any, known: set[str]) -> dict[str, dict[str, list]]:
    """sampler -> {dotted option: values}."""
    if not isinstance(grid, dict):
        raise UserError(f"evaluate.grid: expected a mapping of samplers to options, got {grid!r}")
    if unknown := [name for name in grid if name not in known]:
        raise UserError(f"evaluate.grid: there is no sampler {unknown[0]!r}{hint(str(unknown[0]), known)}")
    return {name: dict(_leaves(options or {}, f"evaluate.grid.{name}", "")) for name, options in grid.items()}


def _leaves(options: Any, place: str, name: str) -> Iterator[tuple[str, list]]:
    """(dotted option, values) of a mapping of mappings; options that are null are left out."""
    if options is None:
        return
    if isinstance(options, dict):
        for key, inner in options.items():
            yield from _leaves(inner, place, dotted(name, key))
        return
    scalars = isinstance(options, list) and not any(isinstance(value, dict | list) for value in options)
    if not (scalars and options and len({_text(value) for value in options}) == len(options)):
        raise UserError(f"{dotted(place, name)}: expected a list of different plain values, got {options!r}")
    yield name, options


def _labels(options: list[str]) -> dict[str, str]:
    """What stands in a name for each option: its last part, where no other option ends in the same."""
    ends = Counter(option.rpartition(".")[2] for option in options)
    return {option: end if ends[end := option.rpartition(".")[2]] == 1 else option for option in options}


def _set(node: dict, option: str, value: Any, *, place: str) -> None:
    """Give a sampler's node, or a node inside it, an argument that its target takes."""
    owner: Any = node
    *above, last = option.split(".")
    for part in above:
        owner = owner.get(part) if isinstance(owner, dict) else None
    if option == "steps":
        raise UserError(f"{place}: the steps follow from {SPEED}, give that")
    if not is_node(owner) or last not in arguments(owner):
        options = [dotted(inner, argument) for inner, at in walk(node) if is_node(at) for argument in arguments(at)]
        raise UserError(f"{place}: the sampler has no option {option!r}{hint(option, options)}")
    owner[last] = value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
