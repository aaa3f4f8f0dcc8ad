"""Results of an evaluation on disk, written cell by cell, so that a kill loses only the cell it interrupts.

    results.json             methods -> sampler -> tokens/step -> metric -> {mean, se, n}; bounds -> method -> metric
    captions/CELL.jsonl      the captions of a cell, each with its scores

The mean of no values is NaN in memory and null on disk, because JSON has no NaN.
Every entry has a signature of all that its numbers depend on; a rerun keeps entries whose signature is unchanged.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.io.errors import UserError
from src.io.files import read_json, sha256, write_bytes, write_json
from src.metrics.caption import Stat

CODE = (  # a change in any of these makes stored results stale
    *("src/types.py", "src/evaluate.py", "src/evaluation/cells.py", "src/io/shards.py"),
    *("src/diffusion", "src/samplers", "src/metrics", "src/models", "src/text", "src/scenes", "datamodules"),
)
MAX_NAME = 120  # characters of a cell's file name, without its hash


@dataclass(frozen=True)
class Cell:
    """One entry of the table: a model (`method`), a sampler and a speed."""

    method: str
    sampler: str
    tokens_per_step: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.sampler}-{self.tokens_per_step}"

    @property
    def file(self) -> str:
        """`name` as a safe file name; if that differs from `name`, a hash keeps it unique."""
        plain = re.sub(r"[^\w.=-]+", "_", self.name, flags=re.ASCII)[:MAX_NAME]
        digest = hashlib.sha256(self.name.encode()).hexdigest()[:8]
        return plain if plain == self.name and not plain.startswith(".") else f"{plain.lstrip('.')}-{digest}"


class ResultStore:
    """Entries are added one by one, and kept from an earlier run if their signature is the same.

    signatures: by cell, in the order of the table
    bounds: signatures of the likelihood bounds, by model

    Raises UserError if two cells have the same file name.
    """

    def __init__(self, out: Path, meta: dict, signatures: dict[Cell, str], bounds: dict[str, str]) -> None:
        self.out, self.meta, self.signatures, self.bound_signatures = out, meta, signatures, bounds
        if len({cell.file for cell in signatures}) < len(signatures):
            raise UserError("two cells of the evaluation have the same name; rename a model or a sampler")
        old = read_json(path) if (path := out / "results.json").is_file() else {}
        self.stats: dict[Cell, dict[str, Stat]] = {}
        self.hashes: dict[str, str] = {}
        for cell, signature in signatures.items():
            entry = old.get("meta", {}).get("cells", {}).get(cell.name)
            if entry and entry["signature"] == signature and self._intact(cell, entry["captions"]):
                self.stats[cell] = _read(old["methods"][cell.method][cell.sampler][str(cell.tokens_per_step)])
                self.hashes[cell.name] = entry["captions"]
        stored = old.get("meta", {}).get("bounds", {})
        kept = [name for name, signature in bounds.items() if stored.get(name) == signature]
        self.bounds = {name: _read(old["bounds"][name]) for name in kept}
        self.write()

    def add(self, cell: Cell, stats: dict[str, Stat], captions: list[dict]) -> None:
        """Write a finished cell: first its captions, then results.json with their hash."""
        path = self._path(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(
            path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in without_nan(captions)).encode()
        )
        self.stats[cell], self.hashes[cell.name] = stats, sha256(path)
        self.write()

    def add_bound(self, method: str, stats: dict[str, Stat]) -> None:
        """Write the likelihood bound of a model."""
        self.bounds[method] = stats
        self.write()

    def captions(self, cell: Cell) -> list[dict]:
        """The captions of a finished cell, one dict per sample."""
        lines = [json.loads(line) for line in self._path(cell).read_text(encoding="utf-8").split("\n") if line]
        return [{**line, "scores": {k: _number(v) for k, v in line["scores"].items()}} for line in lines]

    def missing(self, method: str) -> tuple[list[Cell], bool]:
        """The missing cells of a model, and whether its bound is missing."""
        cells = [cell for cell in self.signatures if cell.method == method and cell not in self.stats]
        return cells, method in self.bound_signatures and method not in self.bounds

    @property
    def results(self) -> dict:
        """The content of results.json, methods and samplers in the order of the config."""
        finished = [cell for cell in self.signatures if cell in self.stats]
        methods: dict[str, dict[str, dict[str, dict[str, Stat]]]] = {}
        for cell in finished:
            row = methods.setdefault(cell.method, {}).setdefault(cell.sampler, {})
            row[str(cell.tokens_per_step)] = self.stats[cell]
        cells = {c.name: {"signature": self.signatures[c], "captions": self.hashes[c.name]} for c in finished}
        bounds = {name: self.bounds[name] for name in self.bound_signatures if name in self.bounds}
        signatures = {name: self.bound_signatures[name] for name in bounds}
        return {"methods": methods, "bounds": bounds, "meta": {**self.meta, "cells": cells, "bounds": signatures}}

    def write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / "results.json", without_nan(self.results))

    def _path(self, cell: Cell) -> Path:
        return self.out / "captions" / f"{cell.file}.jsonl"

    def _intact(self, cell: Cell, digest: str) -> bool:
        return self._path(cell).is_file() and sha256(self._path(cell)) == digest


def without_nan(tree: Any) -> Any:
    """Plain data with None in place of every NaN."""
    if isinstance(tree, dict):
        return {key: without_nan(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [without_nan(value) for value in tree]
    return None if isinstance(tree, float) and math.isnan(tree) else tree


def _read(stats: dict[str, Stat]) -> dict[str, Stat]:
    """Statistics read from JSON: a mean that is null becomes NaN again."""
    return {name: Stat(mean=_number(stat["mean"]), se=stat["se"], n=stat["n"]) for name, stat in stats.items()}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def signature(*parts: Any) -> str:
    """A hash of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def code_hash(root: Path) -> str:
    """A hash of the source files that determine the numbers."""
    paths = [root / name for name in CODE]
    files = sorted(file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path]))
    return hashlib.sha256("".join(sha256(path) for path in files).encode()).hexdigest()[:16]
