"""Settings of an evaluation: models, samplers by name, grids of their options, speeds.

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
from pathlib import Path
from typing import Any

from datamodules.captions import SPLITS
from src.cli.config import load_config, load_part
from src.cli.help import config_root, fitting
from src.cli.instantiate import arguments, build, dotted, fits, hint, is_node, nodes, walk
from src.evaluation.results import Cell
from src.io.errors import UserError
from src.io.words import counted
from src.models.hf.weights import is_model_folder
from src.samplers.base import AnySampler

SPEED = "tokens_per_step"
BEST = ("highest", "lowest")  # which values of a metric are good


def complete(settings: dict) -> dict:
    """The settings, with named samplers loaded, the grid expanded, and null models and samplers removed.

    Adds `speeds`: the tokens per step of each sampler.
    """
    # 1. Values that would fail only after hours, or never.
    if settings["num"] < 1:
        raise UserError(f"evaluate.num must be at least 1, got {settings['num']}")
    if not settings["headline"]:
        raise UserError("evaluate.headline: name at least one metric, for example [quality]")
    if settings["split"] not in SPLITS:
        raise UserError(f"evaluate.split must be train, val or test, got {settings['split']!r}")
    curve = given = settings.get("curve")
    if given is not None:
        curve = {"best": BEST[0], **given} if isinstance(given, dict) else {}
        if set(curve) != {"metric", "best"} or curve["best"] not in BEST:
            raise UserError(f"evaluate.curve: expected {{metric: NAME, best: highest or lowest}}, got {given!r}")
    bound = {"draws": None, "estimator": "count", **(settings.get("bound") or {})}
    if len(bound) > 2:
        raise UserError(f"evaluate.bound: expected {{draws: NUMBER or null, estimator: count or iid}}, got {bound!r}")

    # 2. Samplers and models. A named sampler writes the length that the models were trained for, whatever its file has.
    listed, length = settings["samplers"] or {}, settings["data"]["response_length"]
    files = {name: file for name, file in listed.items() if isinstance(file, str)}
    loaded = {name: {**load_part("sampler", file), "length": length} for name, file in files.items()}
    samplers = nodes({**listed, **loaded}, "evaluate.samplers")
    samplers, speeds = expand(samplers, settings.get("grid") or {}, settings[SPEED], known=set(listed))
    models = {str(name): folder for name, folder in (settings["models"] or {}).items() if folder is not None}
    if not models or not samplers:
        raise UserError("evaluate.models and evaluate.samplers: one of each must be left to evaluate")
    changed = {"models": models, "samplers": samplers, "speeds": speeds, "curve": curve}
    return {**settings, **changed, "bound": bound if bound["draws"] is not None else None}


def check_models(models: dict[str, str]) -> None:
    """Raise UserError for the models that have no folder, each with the command that trains it if conf/ has one."""
    problems = []
    for name, folder in models.items():
        if is_model_folder(Path(folder)):
            continue
        run = Path(folder).parent
        is_shipped = run.name in fitting("src.train", config_root("conf"))[0]
        trains_it = is_shipped and Path(load_config([f"conf={run.name}"]).run_dir) == run
        command = f": train it with `python -m src.train conf={run.name}`" if trains_it else ""
        problems.append(f"no model {name!r} in {folder}{command}")
    if problems:
        advice = "or set evaluate.models.NAME to another model folder or to null"
        raise UserError("\n  ".join([*problems, advice]))


def expand(samplers: dict[str, dict], grid: dict, speeds: list[int], *, known: set[str]) -> tuple[dict, dict]:
    """(sampler nodes by name, speeds in tokens per step by name), in the order of `samplers`.

    known: names that the grid may hold without effect, because those samplers are null
    """
    known = known | set(samplers)
    if unknown := [name for name in grid if name not in known]:
        raise UserError(f"evaluate.grid: there is no sampler {unknown[0]!r}{hint(str(unknown[0]), known)}")
    expanded, own_speeds = {}, {}
    for name, node in samplers.items():
        place = f"evaluate.grid.{name}"
        axes = dict(_axes(grid.get(name), place))
        counts = axes.pop(SPEED, speeds)
        if not (counts and fits(counts, list[int]) and min(counts) > 0):
            raise UserError(f"evaluate.{SPEED}: expected a list of whole numbers such as [1, 8], got {counts!r}")
        # the label of an option is its last part, or all of it if another one ends alike
        varying = [option for option, values in axes.items() if len(values) > 1]
        ends = Counter(option.rpartition(".")[2] for option in varying)
        labels = {option: end if ends[end := option.rpartition(".")[2]] == 1 else option for option in varying}
        for values in product(*axes.values()):
            options = dict(zip(axes, values, strict=True))
            texts = {o: v if isinstance(v, str) else json.dumps(v) for o, v in options.items()}
            suffix = ",".join(f"{label}={texts[option]}" for option, label in labels.items())
            variant = f"{name}[{suffix}]" if suffix else name
            expanded[variant], own_speeds[variant] = copy.deepcopy(node), sorted(set(counts))
            for option, value in options.items():
                _set(expanded[variant], option, value, place=place)
    return expanded, own_speeds


def family(name: str) -> str:
    """The sampler of a variant: `proseco` for `proseco[every=1]`."""
    return name.partition("[")[0]


def build_samplers(
    nodes: dict[str, dict], speeds: dict[str, list[int]], *, methods: Iterable[str]
) -> dict[Cell, AnySampler]:
    """The sampler of every cell, in the order of the table."""
    samplers = {}
    for name, node in nodes.items():
        place, base = f"evaluate.samplers.{name}", family(name)
        advice = f"set evaluate.samplers.{base}=null, or its own speeds in evaluate.grid.{base}.{SPEED}"
        try:
            sampler = build(node)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        for speed in speeds[name]:
            try:
                samplers[name, speed] = sampler.with_steps(tokens_per_step=speed)
            except UserError as error:
                raise UserError(f"{place} at {counted(speed, 'token')}/step: {error}; {advice}") from error
    return {Cell(method, *key): sampler for method in methods for key, sampler in samplers.items()}


def _axes(options: Any, place: str, name: str = "") -> Iterator[tuple[str, list]]:
    """(dotted option, values) of nested mappings, without the options that are null."""
    if isinstance(options, dict):
        for key, inner in options.items():
            yield from _axes(inner, place, dotted(name, key))
    elif options is not None:
        if not (options and isinstance(options, list)) or any(isinstance(value, dict | list) for value in options):
            raise UserError(f"{dotted(place, name)}: expected a list of plain values, got {options!r}")
        yield name, options


def _set(node: dict, option: str, value: Any, *, place: str) -> None:
    """Set an argument of a sampler's node, or of a node inside it."""
    if option == "steps":
        raise UserError(f"{place}: the steps follow from {SPEED}; set that instead")
    owner_name, _, last = option.rpartition(".")
    owner = dict(walk(node)).get(owner_name) or {}
    if not is_node(owner) or last not in arguments(owner):
        options = [dotted(inner, argument) for inner, at in walk(node) if is_node(at) for argument in arguments(at)]
        raise UserError(f"{place}: the sampler has no option {option!r}{hint(option, options)}")
    owner[last] = value
