"""Results of an evaluation on disk, written cell by cell, so that a kill loses only the cell it interrupts.

    results.json             methods -> sampler -> tokens/step -> metric -> {mean, se, n}; model_stats -> method -> ...
    captions/CELL.jsonl      the captions of a cell, each with its scores

The mean of no values is NaN in memory and null on disk, because JSON has no NaN.
Every entry has a signature of all that its numbers depend on; a rerun keeps entries whose signature is unchanged, and
whose captions are as they were written.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from src.io.errors import UserError
from src.io.files import read_json, sha256, write_bytes, write_json
from src.metrics.caption import Stat

CODE = (  # a change in any of these makes stored results stale
    *("src/types.py", "src/evaluate.py", "src/evaluation/cells.py", "src/io/shards.py"),
    *("src/diffusion", "src/samplers", "src/metrics", "src/models", "src/text", "src/scenes", "datamodules"),
)


class Cell(NamedTuple):
    """One entry of the table: a model (`method`), a sampler and a speed."""

    method: str
    sampler: str
    tokens_per_step: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.sampler}-{self.tokens_per_step}"

    @property
    def file(self) -> str:
        """`name` as a file name that no other cell has."""
        return quote(self.name, safe="[],= ")


Stats = dict[str, Stat]  # by metric
Table = dict[Cell, Stats]


class ResultStore:
    """Statistics of cells (`table`) and of models alone (`model_stats`), in the order of their signatures."""

    def __init__(
        self, out: Path, meta: dict, *, signatures: Mapping[Cell, str], model_signatures: Mapping[str, str]
    ) -> None:
        self.out, self.meta, self._signatures, self._model_signatures = out, meta, signatures, model_signatures
        if len({cell.name for cell in signatures}) < len(signatures):
            raise UserError("two cells of the evaluation have the same name; rename a model or a sampler")
        old = read_json(path) if (path := out / "results.json").is_file() else {}
        entries, models = (old.get("meta", {}).get(name, {}) for name in ("cells", "model_stats"))
        self.table: Table = {
            cell: _with_nan(old["methods"][cell.method][cell.sampler][str(cell.tokens_per_step)])
            for cell in signatures
            if entries.get(cell.name) == self._entry(cell)
        }
        kept = [name for name, signature in model_signatures.items() if models.get(name) == signature]
        self.model_stats: dict[str, Stats] = {name: _with_nan(old["model_stats"][name]) for name in kept}
        self._write()

    def add(self, cell: Cell, stats: Stats, captions: list[dict]) -> None:
        """Write a finished cell: first its captions, then results.json with their hash."""
        lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in without_nan(captions))
        self._path(cell).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self._path(cell), lines.encode())
        self.table[cell] = stats
        self._write()

    def add_model_stats(self, method: str, stats: Stats) -> None:
        self.model_stats[method] = stats
        self._write()

    def captions(self, cell: Cell) -> list[dict]:
        """The captions of a finished cell, one dict per sample: key, text, scores."""
        lines = [json.loads(line) for line in self._path(cell).read_text(encoding="utf-8").split("\n") if line]
        for line in lines:
            line["scores"] = {name: math.nan if s is None else s for name, s in line["scores"].items()}
        return lines

    def _write(self) -> None:
        self.table = {cell: self.table[cell] for cell in self._signatures if cell in self.table}
        self.model_stats = {name: self.model_stats[name] for name in self._model_signatures if name in self.model_stats}
        methods: dict[str, dict[str, dict[str, Stats]]] = {}
        for cell, stats in self.table.items():
            methods.setdefault(cell.method, {}).setdefault(cell.sampler, {})[str(cell.tokens_per_step)] = stats
        cells = {cell.name: self._entry(cell) for cell in self.table}
        meta = {
            **self.meta,
            "cells": cells,
            "model_stats": {name: self._model_signatures[name] for name in self.model_stats},
        }
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(
            self.out / "results.json", without_nan({"methods": methods, "model_stats": self.model_stats, "meta": meta})
        )

    def _path(self, cell: Cell) -> Path:
        return self.out / "captions" / f"{cell.file}.jsonl"

    def _entry(self, cell: Cell) -> dict:
        path = self._path(cell)
        return {"signature": self._signatures[cell], "captions": sha256(path) if path.is_file() else None}


def signature(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def code_hash(root: Path) -> str:
    """A hash of the source files that determine the numbers."""
    paths = [root / name for name in CODE]
    files = sorted(file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path]))
    return hashlib.sha256("".join(sha256(path) for path in files).encode()).hexdigest()[:16]


def without_nan(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: without_nan(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [without_nan(value) for value in tree]
    return None if isinstance(tree, float) and math.isnan(tree) else tree


def _with_nan(stats: dict) -> Stats:
    return {
        name: Stat(mean=math.nan if stat["mean"] is None else stat["mean"], se=stat["se"], n=stat["n"])
        for name, stat in stats.items()
    }
