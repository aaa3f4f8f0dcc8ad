"""Evaluate: answer the prompts of a split with every model, sampler and number of tokens a step, and compare.

    python -m src.evaluate conf=evaluate
    python -m src.evaluate conf=evaluate evaluate.num=64 evaluate.tokens_per_step=[1,8]
    python -m src.evaluate conf=evaluate evaluate.models.stage1=null +evaluate.models.mine=runs/mine/model
    python -m src.evaluate conf=sweep evaluate.models.model=runs/stage2/model

    models x samplers x tokens/step -> captions -> metrics -> results.json, captions/METHOD-SAMPLER-N.jsonl
                                                           -> table.md (also printed), *.png
    models -> likelihood bound (evaluate.bound)            -> results.json, table.md
    evaluate.grid, evaluate.curve: many settings of the samplers, and a metric against forward calls (curve.json)

Each finished cell is written at once; a rerun redoes only cells whose model, data, settings or code changed.
results.json holds just the cells of the config: methods -> sampler -> tokens/step -> metric -> {mean, se, n}.
"""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torchmetrics import Metric
from tqdm import tqdm

from src.cli.config import load_config, load_part
from src.cli.entrypoint import main_guard
from src.cli.help import NEEDS
from src.cli.instantiate import build, check, fits, nodes, plain
from src.evaluation.grid import SPEED, check_speeds, expand, family
from src.evaluation.pareto import budget_table, plot_curve, points_of, to_dict
from src.evaluation.report import Example, Panel, Scores, Table, markdown_report, picture, plot, text_report
from src.evaluation.results import Cell, ResultStore, code_hash, signature
from src.io.errors import UserError
from src.io.files import sha256, write_bytes, write_json
from src.io.lock import locked
from src.metrics.bound import Bound
from src.metrics.caption import CaptionMetric, Stat, summarise
from src.metrics.text import response_counts
from src.models.hf.folder import fingerprint, from_pretrained
from src.models.hf.weights import is_model_folder
from src.models.inference import warn_if_length_differs
from src.samplers.uniform import AnySampler
from src.text.tokenizer import Codec
from src.types import Backbone, Batch

TASKS = Path(__file__).resolve().parents[1] / "conf" / "task"  # layers for data without images
PACKAGES = ("torch", "transformers", "torchmetrics")
STAGES = {"train": "fit", "val": "validate", "test": "test"}  # as Lightning names them
logger = logging.getLogger(__name__)
BEST = ("highest", "lowest")  # values of a metric that are good
EXAMPLES = 6  # images of captions.png: the first ones of the split, not a selection


@dataclass(frozen=True)
class Sampling:
    """What is the same in all cells: the samples, how to read ids, the metrics' nodes and what they are offered."""

    loader: Any
    num: int
    codec: Codec
    metrics: list[dict]
    offers: dict
    seed: int
    device: torch.device

    def build_metrics(self) -> list[Metric]:
        return [build(node, **self.offers).to(self.device) for node in self.metrics]


@main_guard
def main(argv: list[str]) -> None:
    """Run the evaluation that the config describes."""
    cfg = load_config(argv, verb="src.evaluate", needs=NEEDS["src.evaluate"])
    evaluate(complete(cfg.evaluate))


def evaluate(settings: DictConfig) -> None:
    """Fill the cells that are missing, then report on all."""
    folders = {str(name): Path(path) for name, path in settings.models.items()}
    for name, folder in folders.items():
        _check_model(name, folder)
    codec = _shared_codec(folders)
    offers = {"codec": codec, "seed": settings.seed, "batch_size": settings.batch_size}
    check(settings, offers=offers)
    samplers = _samplers(settings)
    data = build(settings.data, **offers)
    data.setup(STAGES[settings.split])
    loader = getattr(data, f"{settings.split}_dataloader")()
    images = _count(loader, settings, [build(node, **offers) for node in plain(settings.metrics)])
    meta = _meta(settings, folders, images)
    sampling = Sampling(
        loader=loader,
        num=images["taken"],
        codec=codec,
        metrics=plain(settings.metrics),
        offers=offers,
        seed=settings.seed,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    bound = Bound(special=codec.special, seed=settings.seed, **settings.bound) if settings.bound else None
    with locked(settings.out):
        ledger = ResultStore(Path(settings.out), meta, *_signatures(settings, meta, list(samplers)))
        _fill(ledger, sampling, settings, samplers, bound)
        _report(ledger, sampling, settings)


def complete(settings: DictConfig) -> DictConfig:
    """The settings with named samplers read, without the models and samplers that are null, and with `speeds`.

    A named sampler writes `data.response_length` tokens, as the models learned to, whatever length its file has. The grid is
    spread over the samplers; `speeds` are the numbers of tokens a step of each.
    """
    if settings.num < 1:
        raise UserError(f"evaluate.num must be at least 1, got {settings.num}")
    if not settings.headline:
        raise UserError("evaluate.headline: name at least one metric, for example [quality]")
    if settings.split not in STAGES:
        raise UserError(f"evaluate.split must be train, val or test, got {settings.split!r}")
    tree = plain(settings)
    tree = {**tree, "curve": _curve(tree.get("curve")), "bound": _bound(tree.get("bound"))}
    speeds = check_speeds(tree["tokens_per_step"], "evaluate.tokens_per_step")
    given = tree["samplers"] or {}
    named = {name: sampler for name, sampler in given.items() if isinstance(sampler, str)}
    read = {
        name: {**load_part("sampler", file), "length": tree["data"]["response_length"]} for name, file in named.items()
    }
    samplers = nodes({**given, **read}, "evaluate.samplers")
    tree["samplers"], tree["speeds"] = expand(samplers, tree.get("grid"), speeds, known=set(given))
    tree["models"] = {str(name): folder for name, folder in (tree["models"] or {}).items() if folder is not None}
    if empty := [part for part in ("models", "samplers") if not tree[part]]:
        raise UserError(f"evaluate.{empty[0]}: there are none left to evaluate")
    return OmegaConf.create(tree)


def _curve(given: Any) -> dict | None:
    """`curve`, checked: a metric, and whether its best values are the highest or the lowest."""
    if given is None:
        return None
    curve = {"best": "highest", **given} if isinstance(given, dict) else {}
    if set(curve) != {"metric", "best"} or not isinstance(curve["metric"], str) or curve["best"] not in BEST:
        raise UserError(f"evaluate.curve: expected null or {{metric: NAME, best: highest or lowest}}, got {given!r}")
    return curve


def _bound(given: Any) -> dict | None:
    """`bound`, checked: the number of draws and the estimator; None where there is nothing to draw."""
    bound = {"draws": None, "estimator": "count", **(given or {})} if given is None or isinstance(given, dict) else {}
    if set(bound) != {"draws", "estimator"} or not fits(bound["draws"], int | None):
        raise UserError(f"evaluate.bound: expected {{draws: NUMBER or null, estimator: count or iid}}, got {given!r}")
    return None if bound["draws"] is None else bound


def _samplers(settings: DictConfig) -> dict[Cell, AnySampler]:
    """The sampler of every cell, in the order of the table; numbers that do not fit together are an error here."""
    found = {}
    for name, node in settings.samplers.items():
        place, short = f"evaluate.samplers.{name}", family(str(name))
        try:
            sampler = build(node)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        if not isinstance(sampler, AnySampler):
            raise UserError(f"{place}: {node.target} is no sampler")
        for count in settings.speeds[name]:
            try:
                found[name, count] = sampler.with_steps(tokens_per_step=count)
            except UserError as error:
                raise UserError(
                    f"{place} at {count} tokens/step: {error}; leave it out with evaluate.samplers.{short}=null, or "
                    f"give it speeds of its own in evaluate.grid.{short}.{SPEED}"
                ) from error
    return {Cell(str(method), *key): sampler for method in settings.models for key, sampler in found.items()}


def _fill(
    ledger: ResultStore, sampling: Sampling, settings: DictConfig, samplers: dict[Cell, AnySampler], bound: Bound | None
) -> None:
    """Do every cell and bound that the ledger lacks; a model is loaded only where one of its own is missing."""
    missing = {method: ledger.missing(method) for method in settings.models}
    total = sum(len(cells) + unbounded for cells, unbounded in missing.values()) * sampling.num
    with tqdm(total=total, unit="caption", desc="evaluate", disable=not total) as bar:
        for method, (cells, unbounded) in missing.items():
            if not (cells or unbounded):
                continue
            backbone = from_pretrained(settings.models[method]).to(sampling.device).eval()
            warn_if_length_differs(
                backbone, settings.data.response_length, name=f"{method}: evaluate.data.response_length"
            )
            if bound is not None and unbounded:
                bar.set_description(f"bound of {method}")
                ledger.add_bound(method, evaluate_bound(backbone, bound, sampling, bar=bar))
            own = replace(sampling, codec=Codec.load(settings.models[method]))  # one may write gaps, another not
            for cell in cells:
                bar.set_description(cell.name)
                ledger.add(cell, *evaluate_cell(backbone, samplers[cell], own, bar=bar))
                _check_headline(ledger.stats[cell], settings)


def evaluate_bound(
    backbone: Backbone, metric: Bound, sampling: Sampling, *, bar: tqdm | None = None
) -> dict[str, Stat]:
    """The likelihood bound of a model on the responses of the data, by name."""
    metric.reset()
    for batch in _batches(sampling.loader, sampling.num):
        with torch.inference_mode():
            metric.update(backbone, batch.to(sampling.device))
        if bar is not None:
            bar.update(len(batch))
    return metric.compute()


def evaluate_cell(
    backbone: Backbone, sampler: AnySampler, sampling: Sampling, *, bar: tqdm | None = None
) -> tuple[dict[str, Stat], list[dict]]:
    """Caption all images with one sampler: statistics by name, and each caption with its scores."""
    metrics = sampling.build_metrics()
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


def _count(loader: Any, settings: DictConfig, metrics: list[Metric]) -> dict[str, int]:
    """How many images are taken, and how many were left out as damaged; others follow in their place.

    Every record is scored with the empty text, so that one a metric cannot use stops before the first caption.
    """
    taken = 0
    for batch in _batches(loader, settings.num):
        taken += len(batch)
        for record in batch.records:
            _scores(metrics, "", record)
    if not taken:
        raise UserError(f"the split {settings.split} has no images to evaluate")
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
        raise UserError(f"the models of evaluate.models differ in their tokenizers: {', '.join(codecs)}")
    return next(iter(codecs.values()))


def _check_headline(stats: dict[str, Stat], settings: DictConfig) -> None:
    curve = [settings.curve.metric] if settings.curve else []
    for place, names in (("headline", settings.headline), ("curve", curve)):
        if unknown := [name for name in names if name not in stats]:
            raise UserError(f"evaluate.{place}: no metric {', '.join(unknown)}; there are {', '.join(stats)}")


def _check_model(method: str, folder: Path) -> None:
    if not is_model_folder(folder):
        task = folder.parent.parent.name  # as in runs/sft/mask/model
        layers = f"{method},task/{task}" if (TASKS / f"{task}.yaml").is_file() else method
        raise UserError(
            f"no model of {method!r} in {folder}: make it with `python -m src.train conf={layers}`, or name "
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
        "settings": plain(settings),
        "code": code_hash(Path(__file__).parents[1]),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def _signatures(settings: DictConfig, meta: dict, cells: list[Cell]) -> tuple[dict[Cell, str], dict[str, str]]:
    """For every cell, and for the bound of every model, a hash of all that its numbers depend on."""
    data = [meta["code"], meta["data"], settings.seed, settings.num, plain(settings.data)]
    model = {name: [meta["models"][name], meta["model_configs"][name]] for name in meta["models"]}
    sampled = [*data, plain(settings.metrics)]
    cell_signatures = {
        cell: signature(*sampled, model[cell.method], plain(settings.samplers[cell.sampler]), cell.tokens_per_step)
        for cell in cells
    }
    bound = plain(settings.bound) if settings.bound else None
    return cell_signatures, {name: signature(*data, model[name], bound) for name in model} if bound else {}


def _report(ledger: ResultStore, sampling: Sampling, settings: DictConfig) -> None:
    """Print the table and write table.md, captions.png, and curve.json with curve.png or quality.png."""
    captions = {cell: ledger.captions(cell) for cell in ledger.signatures}
    scores = {}
    for cell, lines in captions.items():
        columns = {name: [line["scores"][name] for line in lines] for name in lines[0]["scores"]}
        scores[cell.method, cell.sampler, cell.tokens_per_step] = columns
    results, headline, budgets = ledger.results, list(settings.headline), None
    _check_headline(ledger.stats[next(iter(captions))], settings)
    if settings.curve:
        budgets = _draw_curve(ledger, scores, metric=settings.curve.metric, lowest=settings.curve.best == "lowest")
    else:
        plot(results, ledger.out / "quality.png", headline=headline)
    sys.stdout.write(text_report(results, scores, headline=headline, budgets=budgets))
    table = markdown_report(results, scores, headline=headline, budgets=budgets)
    write_bytes(ledger.out / "table.md", table.encode())
    if examples := _examples(captions, sampling):
        picture(examples, ledger.out / "captions.png")


def _draw_curve(ledger: ResultStore, scores: Scores, *, metric: str, lowest: bool) -> Table | None:
    """Write curve.json and curve.png; the table of the best within so many forward calls."""
    points = points_of(ledger.results, metric)
    if not points:
        logger.warning("no cell has a value of %s: there is no curve", metric)
        return None
    write_json(ledger.out / "curve.json", to_dict(points, metric=metric, lowest=lowest))
    plot_curve(points, ledger.out / "curve.png", metric=metric, lowest=lowest)
    return budget_table(points, scores, metric=metric, lowest=lowest)


def _examples(captions: dict[Cell, list[dict]], sampling: Sampling) -> list[Example]:
    """The first images with captions at the largest tokens/step; none for data without images.

    Shown are the baseline, and the last method before and after refinement.
    """
    metrics = [metric for metric in sampling.build_metrics() if isinstance(metric, CaptionMetric)]
    fastest = max(cell.tokens_per_step for cell in captions)
    cells = [cell for cell in captions if cell.tokens_per_step == fastest]
    last = [cell for cell in cells if cell.method == cells[-1].method]
    shown = list(dict.fromkeys([cells[0], last[0], last[-1]]))
    batch = next(_batches(sampling.loader, EXAMPLES))
    examples = []
    for row in [row for row, image in enumerate(batch.images[: min(EXAMPLES, sampling.num)]) if image]:
        record = batch.records[row]
        panels = []
        for cell in shown:
            text, title = (
                captions[cell][row]["text"],
                f"{cell.method}, {cell.sampler}, {cell.tokens_per_step} tokens/step",
            )
            panels.append(Panel(title, text, [mark for metric in metrics for mark in metric.marks(text, record)]))
        examples.append(Example(Image.open(BytesIO(batch.images[row])).convert("RGB"), panels))
    return examples


if __name__ == "__main__":
    main()
