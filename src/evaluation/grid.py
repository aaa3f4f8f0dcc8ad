"""Settings of an evaluation, checked: grids of sampler settings, speeds, samplers, `curve` and `bound`.

    grid:                              -> proseco[every=1,passes=1], proseco[every=1,passes=4], ...
      proseco:
        reviser: {every: [1, 2], passes: [1, 4]}      or, as one key, reviser.every: [1, 2]

Every list is an axis; a sampler gets all combinations of its axes. Its name holds what varies: a list of one value
sets that value and is not part of the name. `tokens_per_step` is not part of it either: it replaces
`evaluate.tokens_per_step` for that sampler.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

from src.cli.instantiate import arguments, build, dotted, fits, hint, is_node, walk
from src.evaluation.results import Cell
from src.io.errors import UserError
from src.samplers.uniform import AnySampler

SPEED = "tokens_per_step"
BEST = ("highest", "lowest")  # which values of a metric are good


def expand(samplers: dict[str, dict], grid: Any, speeds: list[int], *, known: set[str]) -> tuple[dict, dict]:
    """(sampler nodes by name, speeds in tokens per step by name), in the order of `samplers`.

    samplers: nodes by name
    grid: sampler -> options, as above
    known: names that the grid may hold without effect, because those samplers are null

    Raises UserError for an unknown option of a sampler, with the nearest one.
    """
    axes = _axes(grid or {}, known | set(samplers))
    expanded, own_speeds = {}, {}
    for name, node in samplers.items():
        options = dict(axes.get(name, {}))
        counts = check_speeds(options.pop(SPEED, speeds), f"evaluate.grid.{name}.{SPEED}")
        labels = _labels([option for option, values in options.items() if len(values) > 1])
        for values in product(*options.values()):
            settings = dict(zip(options, values, strict=True))
            suffix = ",".join(f"{labels[option]}={_text(settings[option])}" for option in labels)
            variant = f"{name}[{suffix}]" if suffix else name
            expanded[variant] = copy.deepcopy(node)
            own_speeds[variant] = counts
            for option, value in settings.items():
                _set(expanded[variant], option, value, place=f"evaluate.grid.{name}")
    return expanded, own_speeds


def family(name: str) -> str:
    """The sampler of a variant: `proseco` for `proseco[every=1]`."""
    return name.partition("[")[0]


def check_speeds(counts: Any, place: str) -> list[int]:
    """Speeds in tokens per step, ascending and without repeats. Raises UserError for anything else."""
    if not (counts and fits(counts, list[int]) and min(counts) > 0):
        raise UserError(f"{place}: expected a list of whole numbers such as [1, 8], got {counts!r}")
    return sorted(set(counts))


def check_curve(curve: Any) -> dict | None:
    """`evaluate.curve`: a metric, and whether its highest or its lowest values are best."""
    if curve is None:
        return None
    settings = {"best": "highest", **curve} if isinstance(curve, dict) else {}
    if set(settings) != {"metric", "best"} or not isinstance(settings["metric"], str) or settings["best"] not in BEST:
        raise UserError(f"evaluate.curve: expected null or {{metric: NAME, best: highest or lowest}}, got {curve!r}")
    return settings


def check_bound(bound: Any) -> dict | None:
    """`evaluate.bound`: the number of draws and the estimator; None without draws."""
    defaults = {"draws": None, "estimator": "count"}
    settings = {**defaults, **(bound or {})} if bound is None or isinstance(bound, dict) else {}
    if set(settings) != set(defaults) or not fits(settings["draws"], int | None):
        raise UserError(f"evaluate.bound: expected {{draws: NUMBER or null, estimator: count or iid}}, got {bound!r}")
    return None if settings["draws"] is None else settings


def build_samplers(
    nodes: dict[str, dict], speeds: dict[str, list[int]], *, methods: Iterable[str]
) -> dict[Cell, AnySampler]:
    """The sampler of every cell, in the order of the table. Raises UserError where a node and a speed do not fit."""
    samplers = {}
    for name, node in nodes.items():
        place, base = f"evaluate.samplers.{name}", family(name)
        try:
            sampler = build(node)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        if not isinstance(sampler, AnySampler):
            raise UserError(f"{place}: {node['target']} is not a sampler")
        for speed in speeds[name]:
            try:
                samplers[name, speed] = sampler.with_steps(tokens_per_step=speed)
            except UserError as error:
                raise UserError(
                    f"{place} at {speed} tokens/step: {error}; leave it out with evaluate.samplers.{base}=null, or "
                    f"give it its own speeds in evaluate.grid.{base}.{SPEED}"
                ) from error
    return {Cell(method, *key): sampler for method in methods for key, sampler in samplers.items()}


def _axes(grid: Any, known: set[str]) -> dict[str, dict[str, list]]:
    """sampler -> {dotted option: values}."""
    if not isinstance(grid, dict):
        raise UserError(f"evaluate.grid: expected a mapping of samplers to options, got {grid!r}")
    if unknown := [name for name in grid if name not in known]:
        raise UserError(f"evaluate.grid: there is no sampler {unknown[0]!r}{hint(str(unknown[0]), known)}")
    return {name: dict(_leaves(options or {}, f"evaluate.grid.{name}", "")) for name, options in grid.items()}


def _leaves(options: Any, place: str, name: str) -> Iterator[tuple[str, list]]:
    """(dotted option, values) of nested mappings, without the options that are null."""
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
    """The label of each option in a name: its last part, or all of it if another option ends in the same part."""
    ends = Counter(option.rpartition(".")[2] for option in options)
    return {option: end if ends[end := option.rpartition(".")[2]] == 1 else option for option in options}


def _set(node: dict, option: str, value: Any, *, place: str) -> None:
    """Set an argument of a sampler's node, or of a node inside it."""
    owner: Any = node
    *above, last = option.split(".")
    for part in above:
        owner = owner.get(part) if isinstance(owner, dict) else None
    if option == "steps":
        raise UserError(f"{place}: the steps follow from {SPEED}; set that instead")
    if not is_node(owner) or last not in arguments(owner):
        options = [dotted(inner, argument) for inner, at in walk(node) if is_node(at) for argument in arguments(at)]
        raise UserError(f"{place}: the sampler has no option {option!r}{hint(option, options)}")
    owner[last] = value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
