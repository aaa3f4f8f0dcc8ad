"""Evaluate: caption the images of a split with every model, sampler and number of tokens a step, and compare.

    python -m src.evaluate conf=evaluate
    python -m src.evaluate conf=evaluate evaluate.num=64 evaluate.tokens_per_step=[1,8]
    python -m src.evaluate conf=evaluate evaluate.models.stage1=null +evaluate.models.mine=runs/mine/model

    models x samplers x tokens/step -> captions -> metrics -> results.json, captions/METHOD-SAMPLER-N.jsonl
                                                           -> table.md (also printed), *.png

Each finished cell is written at once; a rerun redoes only cells whose model, data, settings or code changed.
results.json holds just the cells of the config: methods -> sampler -> tokens/step -> metric -> {mean, se, n}.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torchmetrics import Metric
from tqdm import tqdm

from src.batch import Backbone, Batch
from src.components import ConfigError, build, check, fits, nodes
from src.config import load_config, load_part, main_guard
from src.diffusion.sampler import Sampler
from src.metrics.caption import CaptionMetric, Mark, Stat, summarise
from src.metrics.text import response_counts
from src.models.checkpoint import fingerprint, from_pretrained
from src.models.weights import is_model_folder
from src.report import Example, Panel, markdown_report, picture, plot, text_report
from src.shards import sha256, write_bytes, write_json
from src.tokenizer import Codec

CODE = (  # what makes kept results stale when it changes
    *("src/batch.py", "src/evaluate.py", "src/shards.py", "src/tiling.py", "src/tokenizer.py"),
    *("src/diffusion", "src/metrics", "src/models", "src/prompts", "src/scenes", "datamodules"),
)
PACKAGES = ("torch", "transformers", "torchmetrics")
STAGES = {"train": "fit", "val": "validate", "test": "test"}  # as Lightning names them
logger = logging.getLogger(__name__)
EXAMPLES = 6  # images of captions.png: the first ones of the split, not a selection


@dataclass(frozen=True)
class Cell:
    """One entry of the table."""

    method: str
    sampler: str
    tokens_per_step: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.sampler}-{self.tokens_per_step}"


@dataclass(frozen=True)
class Sampling:
    """What is the same in all cells: the images, how to read ids, the metrics' nodes and the seed."""

    loader: Any
    num: int
    codec: Codec
    metrics: list[dict]
    seed: int
    device: torch.device


class Ledger:
    """The results of an evaluation on disk: cells are added one by one and taken over from an earlier run."""

    def __init__(self, out: Path, meta: dict, signatures: dict[Cell, str]) -> None:
        self.out, self.signatures = out, signatures
        old = _read_json(out / "results.json")
        self.stats: dict[Cell, dict[str, Stat]] = {}
        self.hashes: dict[str, str] = {}
        for cell, signature in signatures.items():
            entry = old.get("meta", {}).get("cells", {}).get(cell.name)
            if entry and entry["signature"] == signature and self._intact(cell, entry["captions"]):
                self.stats[cell] = old["methods"][cell.method][cell.sampler][str(cell.tokens_per_step)]
                self.hashes[cell.name] = entry["captions"]
        self.meta = meta
        self.write()

    def add(self, cell: Cell, stats: dict[str, Stat], captions: list[dict]) -> None:
        """Write a finished cell: its captions first, then the results that name them."""
        path = self._path(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in captions).encode())
        self.stats[cell], self.hashes[cell.name] = stats, sha256(path)
        self.write()

    def captions(self, cell: Cell) -> list[dict]:
        """The captions of a finished cell, one dict for each image."""
        return [json.loads(line) for line in self._path(cell).read_text().splitlines()]

    @property
    def results(self) -> dict:
        """What results.json holds, methods and samplers in the order of the config."""
        known = [cell for cell in self.signatures if cell in self.stats]
        methods: dict[str, dict[str, dict[str, dict[str, Stat]]]] = {}
        for cell in known:
            row = methods.setdefault(cell.method, {}).setdefault(cell.sampler, {})
            row[str(cell.tokens_per_step)] = self.stats[cell]
        cells = {c.name: {"signature": self.signatures[c], "captions": self.hashes[c.name]} for c in known}
        return {"methods": methods, "meta": {**self.meta, "cells": cells}}

    def write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / "results.json", self.results)

    def _path(self, cell: Cell) -> Path:
        return self.out / "captions" / f"{cell.name}.jsonl"

    def _intact(self, cell: Cell, digest: str) -> bool:
        return self._path(cell).is_file() and sha256(self._path(cell)) == digest


@main_guard
def main(argv: list[str]) -> None:
    """Run the evaluation that the config describes."""
    cfg = load_config(argv, verb="src.evaluate", needs=["evaluate"])
    try:
        evaluate(complete(cfg.evaluate))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def evaluate(settings: DictConfig) -> None:
    """Fill the cells that are missing, then report on all."""
    folders = {str(name): Path(path) for name, path in settings.models.items()}
    for name, folder in folders.items():
        _check_model(name, folder)
    codec = _shared_codec(folders)
    offers = {"codec": codec, "seed": settings.seed, "batch_size": settings.batch_size}
    check(settings, offers=offers)
    loader = _loader(settings, offers)
    images = _count(loader, settings)
    meta = _meta(settings, folders, images)
    sampling = Sampling(
        loader=loader,
        num=images["taken"],
        codec=codec,
        metrics=_plain(settings.metrics),
        seed=settings.seed,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    ledger = Ledger(Path(settings.out), meta, _signatures(settings, meta))
    _fill(ledger, sampling, settings, folders)
    _report(ledger, sampling, list(settings.headline))


def complete(settings: DictConfig) -> DictConfig:
    """The settings with named samplers read, and without the models and samplers that are null.

    A named sampler writes `data.canvas` tokens, as the models learned to, whatever length its file has.
    """
    if settings.num < 1:
        raise ConfigError(f"evaluate.num must be at least 1, got {settings.num}")
    if settings.split not in STAGES:
        raise ConfigError(f"evaluate.split must be train, val or test, got {settings.split!r}")
    tree = _plain(settings)
    speeds = tree["tokens_per_step"]
    if not (speeds and fits(speeds, list[int]) and min(speeds) > 0):
        raise ConfigError(f"evaluate.tokens_per_step: expected a list of whole numbers such as [1, 8], got {speeds!r}")
    named = {name: sampler for name, sampler in (tree["samplers"] or {}).items() if isinstance(sampler, str)}
    read = {name: {**load_part("sampler", file), "length": tree["data"]["canvas"]} for name, file in named.items()}
    tree["samplers"] = nodes({**(tree["samplers"] or {}), **read}, "evaluate.samplers")
    tree["models"] = {str(name): folder for name, folder in (tree["models"] or {}).items() if folder is not None}
    if empty := [part for part in ("models", "samplers") if not tree[part]]:
        raise ConfigError(f"evaluate.{empty[0]}: there are none left to evaluate")
    return OmegaConf.create(tree)


def _fill(ledger: Ledger, sampling: Sampling, settings: DictConfig, folders: dict[str, Path]) -> None:
    """Do every cell that the ledger lacks; a model is loaded only where one of its cells is missing."""
    missing = [cell for cell in ledger.signatures if cell not in ledger.stats]
    with tqdm(total=len(missing) * sampling.num, unit="caption", desc="evaluate", disable=not missing) as bar:
        for method, folder in folders.items():
            cells = [cell for cell in missing if cell.method == method]
            backbone = from_pretrained(folder).to(sampling.device).eval() if cells else None
            for cell in cells:
                assert backbone is not None
                bar.set_description(cell.name)
                sampler: Sampler = build(settings.samplers[cell.sampler])
                sampler = sampler.with_steps(tokens_per_step=cell.tokens_per_step)
                ledger.add(cell, *evaluate_cell(backbone, sampler, sampling, bar=bar))
                _check_headline(ledger.stats[cell], settings.headline)


def evaluate_cell(
    backbone: Backbone, sampler: Sampler, sampling: Sampling, *, bar: tqdm | None = None
) -> tuple[dict[str, Stat], list[dict]]:
    """Caption all images with one sampler: statistics by name, and each caption with its scores."""
    metrics: list[Metric] = [build(node) for node in sampling.metrics]
    special = sampling.codec.special
    captions: list[dict] = []
    seconds: list[float] = []
    for batch in _batches(sampling.loader, sampling.num):
        moved = batch.to(sampling.device)
        with torch.inference_mode():
            prefix = backbone.encode_prefix(moved.prefix)
            found = sampler(backbone, prefix, special=special, keys=batch.keys, seed=sampling.seed)
        texts = [sampling.codec.decode(ids) for ids in found.ids.tolist()]
        seconds.append(found.wall_s / len(batch))
        counts = {"forwards": found.forwards, "edits": found.edits, "remasks": found.remasks}
        for row, text in enumerate(texts):
            scores = {name: float(values[row]) for name, values in counts.items()}
            scores |= response_counts(found.ids[row].tolist(), special)
            scores |= _scores(metrics, text, batch.records[row])
            captions.append({"key": batch.keys[row], "text": text, "scores": scores})
        for metric in metrics:
            metric.update(texts, batch.records)
        if bar is not None:
            bar.update(len(batch))
    return _statistics(metrics, captions, seconds), captions


def _scores(metrics: list[Metric], text: str, record: dict) -> dict[str, float]:
    """Values of one caption; corpus metrics such as BLEU have none."""
    found = (metric.score(text, record) for metric in metrics if isinstance(metric, CaptionMetric))
    return {name: value for scores in found for name, value in scores.items()}


def _statistics(metrics: list[Metric], captions: list[dict], seconds: list[float]) -> dict[str, Stat]:
    """What the metrics compute, means of the counts, and seconds a caption (there n counts batches)."""
    stats = {name: stat for metric in metrics for name, stat in metric.compute().items()}
    for name in captions[0]["scores"]:
        stats.setdefault(name, summarise([line["scores"][name] for line in captions]))
    return {**stats, "seconds": summarise(seconds)}


def _batches(loader: Any, num: int) -> Iterator[Batch]:
    """The first `num` samples of a loader."""
    left = num
    for batch in loader:
        yield batch.rows(slice(0, left)) if len(batch) > left else batch
        left -= min(left, len(batch))
        if not left:
            return


def _loader(settings: DictConfig, offers: dict) -> Any:
    data = build(settings.data, **offers)
    data.setup(STAGES[settings.split])
    return getattr(data, f"{settings.split}_dataloader")()


def _count(loader: Any, settings: DictConfig) -> dict[str, int]:
    """How many images are taken, and how many were left out as damaged; others follow in their place."""
    taken = sum(map(len, _batches(loader, settings.num)))
    if not taken:
        raise ConfigError(f"the split {settings.split} has no images to evaluate")
    if taken < settings.num:
        logger.warning(
            "evaluate.num=%d, but the split %s has %d images: took those", settings.num, settings.split, taken
        )
    return {
        "taken": taken,
        "left_out": sum(loader.notes[note] for note in loader.notes if note[1] in ("damaged", "missing")),
    }


def _shared_codec(folders: dict[str, Path]) -> Codec:
    codecs = {name: Codec.load(folder) for name, folder in folders.items()}
    if len({codec.fingerprint for codec in codecs.values()}) > 1:
        raise ConfigError(f"the models of evaluate.models differ in their tokenizers: {', '.join(codecs)}")
    return next(iter(codecs.values()))


def _check_headline(stats: dict[str, Stat], headline: Sequence[str]) -> None:
    if unknown := [name for name in headline if name not in stats]:
        raise ConfigError(f"evaluate.headline: no metric {', '.join(unknown)}; there are {', '.join(stats)}")


def _check_model(method: str, folder: Path) -> None:
    if not is_model_folder(folder):
        raise ConfigError(
            f"no model of {method!r} in {folder}: make it with `python -m src.train conf={method}`, or name "
            f"another model folder in evaluate.models.{method} (`make quickstart` makes those of the quickstart)"
        )


def _meta(settings: DictConfig, folders: dict[str, Path], images: dict[str, int]) -> dict:
    """What the results say about how they were made."""
    index = Path(settings.data.path) / settings.split / "index.json"
    return {
        "models": {name: fingerprint(folder) for name, folder in folders.items()},
        "model_configs": {name: sha256(folder / "config.json")[:16] for name, folder in folders.items()},
        "data": {"split": settings.split, "index_sha256": sha256(index), **images},
        "seed": settings.seed,
        "settings": _plain(settings),
        "code": _code_hash(Path(__file__).parents[1]),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def _code_hash(root: Path) -> str:
    places = [root / name for name in CODE]
    files = sorted(file for place in places for file in (place.rglob("*.py") if place.is_dir() else [place]))
    return hashlib.sha256("".join(sha256(path) for path in files).encode()).hexdigest()[:16]


def _signatures(settings: DictConfig, meta: dict) -> dict[Cell, str]:
    """For every cell of the config a hash of all that its numbers depend on."""
    shared = [
        meta["code"],
        meta["data"],
        settings.seed,
        settings.num,
        _plain(settings.data),
        _plain(settings.metrics),
    ]
    found = {}
    for method, sampler, count in product(settings.models, settings.samplers, sorted(set(settings.tokens_per_step))):
        model = [meta["models"][method], meta["model_configs"][method]]
        parts = [*shared, model, _plain(settings.samplers[sampler]), count]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        found[Cell(str(method), str(sampler), count)] = digest[:16]
    return found


def _report(ledger: Ledger, sampling: Sampling, headline: list[str]) -> None:
    """Print the table and write table.md, quality.png and captions.png."""
    captions = {cell: ledger.captions(cell) for cell in ledger.signatures}
    scores = {}
    for cell, lines in captions.items():
        columns = {name: [line["scores"][name] for line in lines] for name in lines[0]["scores"]}
        scores[cell.method, cell.sampler, cell.tokens_per_step] = columns
    results = ledger.results
    _check_headline(ledger.stats[next(iter(captions))], headline)
    sys.stdout.write(text_report(results, scores, headline=headline))
    write_bytes(ledger.out / "table.md", markdown_report(results, scores, headline=headline).encode())
    plot(results, ledger.out / "quality.png", headline=headline)
    picture(_examples(captions, sampling), ledger.out / "captions.png")


def _examples(captions: dict[Cell, list[dict]], sampling: Sampling) -> list[Example]:
    """The first images with captions at the largest tokens/step.

    Shown are the baseline, and the last method before and after refinement.
    """
    metrics = [build(node) for node in sampling.metrics]
    fastest = max(cell.tokens_per_step for cell in captions)
    cells = [cell for cell in captions if cell.tokens_per_step == fastest]
    last = [cell for cell in cells if cell.method == cells[-1].method]
    shown = list(dict.fromkeys([cells[0], last[0], last[-1]]))
    batch = next(_batches(sampling.loader, EXAMPLES))
    examples = []
    for row in range(min(EXAMPLES, len(batch))):
        record = batch.records[row]
        texts = {cell: captions[cell][row]["text"] for cell in shown}
        panels = [Panel(_title(cell), text, _marks(metrics, text, record)) for cell, text in texts.items()]
        examples.append(Example(Image.open(BytesIO(batch.images[row])).convert("RGB"), panels))
    return examples


def _title(cell: Cell) -> str:
    return f"{cell.method}, {cell.sampler}, {cell.tokens_per_step} tokens/step"


def _marks(metrics: list[Any], text: str, record: dict) -> list[Mark]:
    return [mark for m in metrics if isinstance(m, CaptionMetric) for mark in m.marks(text, record)]


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True)


if __name__ == "__main__":
    main()
