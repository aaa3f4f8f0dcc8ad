"""Evaluate: answer the prompts of a split with every model, sampler and speed (tokens per step), and compare.

    python -m src.evaluate conf=evaluate
    python -m src.evaluate conf=evaluate evaluate.num=64 evaluate.tokens_per_step=[1,8]
    python -m src.evaluate conf=evaluate evaluate.models.stage1=null +evaluate.models.mine=runs/mine/model
    python -m src.evaluate conf=sweep evaluate.models.model=runs/stage2/model

    models x samplers x tokens/step -> captions -> metrics -> results.json, captions/METHOD-SAMPLER-N.jsonl
                                                           -> table.md (also printed), *.png
    models -> likelihood bound (evaluate.bound)            -> results.json, table.md
    evaluate.grid, evaluate.curve: many sampler settings, and a metric against forward calls (curve.json)

Every cell is written as soon as it is finished; a rerun redoes only cells whose model, data, settings or code changed.
results.json holds only the cells of the config: methods -> sampler -> tokens/step -> metric -> {mean, se, n}.
"""

from __future__ import annotations

import logging
import platform
import sys
from dataclasses import replace
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from tqdm import tqdm

from src.cli.config import load_config, load_part
from src.cli.entrypoint import main_guard
from src.cli.help import NEEDS
from src.cli.instantiate import build, check, nodes, plain
from src.evaluation.cells import Sampling, count_samples, evaluate_bound, evaluate_cell, first_batches
from src.evaluation.grid import build_samplers, check_bound, check_curve, check_speeds, expand
from src.evaluation.pareto import budget_table, plot_curve, points_of, to_dict
from src.evaluation.report import Example, Panel, Scores, Table, markdown_report, picture, plot, text_report
from src.evaluation.results import Cell, ResultStore, code_hash, signature
from src.io.errors import UserError
from src.io.files import sha256, write_bytes, write_json
from src.io.lock import locked
from src.metrics.bound import Bound
from src.metrics.caption import CaptionMetric, Stat
from src.models.hf.folder import fingerprint, from_pretrained
from src.models.hf.weights import is_model_folder
from src.models.inference import warn_if_length_differs
from src.samplers.uniform import AnySampler
from src.text.tokenizer import Codec

TASKS = Path(__file__).resolve().parents[1] / "conf" / "task"  # layers that train on data without images
PACKAGES = ("torch", "transformers", "torchmetrics")
STAGES = {"train": "fit", "val": "validate", "test": "test"}  # Lightning's names
logger = logging.getLogger(__name__)
EXAMPLES = 6  # images of captions.png: the first of the split, not a selection


@main_guard
def main(argv: list[str]) -> None:
    """Compute the missing cells of the evaluation that the config describes, then report on all of them."""
    cfg = load_config(argv, verb="src.evaluate", needs=NEEDS["src.evaluate"])
    settings = complete(cfg.evaluate)
    folders = {str(name): Path(path) for name, path in settings.models.items()}
    for name, folder in folders.items():
        _check_model(name, folder)
    codec = _shared_codec(folders)
    offers = {"codec": codec, "seed": settings.seed, "batch_size": settings.batch_size}
    check(settings, offers=offers)
    samplers = build_samplers(plain(settings.samplers), plain(settings.speeds), methods=folders)
    data = build(settings.data, **offers)
    data.setup(STAGES[settings.split])
    loader = getattr(data, f"{settings.split}_dataloader")()
    metrics = [build(node, **offers) for node in plain(settings.metrics)]
    counts = count_samples(loader, settings.num, metrics, split=settings.split)
    meta = _meta(settings, folders, counts)
    sampling = Sampling(
        loader=loader,
        num=counts["taken"],
        codec=codec,
        metrics=plain(settings.metrics),
        offers=offers,
        seed=settings.seed,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    bound = Bound(special=codec.special, seed=settings.seed, **settings.bound) if settings.bound else None
    with locked(settings.out):
        store = ResultStore(Path(settings.out), meta, *_signatures(settings, meta, list(samplers)))
        _fill(store, sampling, settings, samplers, bound)
        _report(store, sampling, settings)


def complete(settings: DictConfig) -> DictConfig:
    """The settings, checked, with named samplers loaded, the grid expanded and null models and samplers removed.

    A named sampler writes `data.response_length` tokens, whatever length its file has, because the models were trained
    for that. Adds `speeds`: the tokens per step of each sampler.
    """
    if settings.num < 1:
        raise UserError(f"evaluate.num must be at least 1, got {settings.num}")
    if not settings.headline:
        raise UserError("evaluate.headline: name at least one metric, for example [quality]")
    if settings.split not in STAGES:
        raise UserError(f"evaluate.split must be train, val or test, got {settings.split!r}")
    tree = plain(settings)
    tree = {**tree, "curve": check_curve(tree.get("curve")), "bound": check_bound(tree.get("bound"))}
    speeds = check_speeds(tree["tokens_per_step"], "evaluate.tokens_per_step")
    listed = tree["samplers"] or {}
    loaded = {
        name: {**load_part("sampler", file), "length": tree["data"]["response_length"]}
        for name, file in listed.items()
        if isinstance(file, str)
    }
    samplers = nodes({**listed, **loaded}, "evaluate.samplers")
    tree["samplers"], tree["speeds"] = expand(samplers, tree.get("grid"), speeds, known=set(listed))
    tree["models"] = {str(name): folder for name, folder in (tree["models"] or {}).items() if folder is not None}
    if empty := [part for part in ("models", "samplers") if not tree[part]]:
        raise UserError(f"evaluate.{empty[0]}: none left to evaluate")
    return OmegaConf.create(tree)


def _fill(
    store: ResultStore, sampling: Sampling, settings: DictConfig, samplers: dict[Cell, AnySampler], bound: Bound | None
) -> None:
    """Compute every cell and bound that the store lacks. Loads only models with something missing."""
    missing = {method: store.missing(method) for method in settings.models}
    total = sum(len(cells) + lacks_bound for cells, lacks_bound in missing.values()) * sampling.num
    with tqdm(total=total, unit="caption", desc="evaluate", disable=not total) as bar:
        for method, (cells, lacks_bound) in missing.items():
            if not (cells or lacks_bound):
                continue
            backbone = from_pretrained(settings.models[method]).to(sampling.device).eval()
            warn_if_length_differs(
                backbone, settings.data.response_length, name=f"{method}: evaluate.data.response_length"
            )
            if bound is not None and lacks_bound:
                bar.set_description(f"bound of {method}")
                store.add_bound(method, evaluate_bound(backbone, bound, sampling, bar=bar))
            # models may differ in whether their codec has a gap token
            own_sampling = replace(sampling, codec=Codec.load(settings.models[method]))
            for cell in cells:
                bar.set_description(cell.name)
                store.add(cell, *evaluate_cell(backbone, samplers[cell], own_sampling, bar=bar))
                _check_headline(store.stats[cell], settings)


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
            f"no model {method!r} in {folder}: train it with `python -m src.train conf={layers}`, or set "
            f"evaluate.models.{method} to another model folder (`make quickstart` trains those of the quickstart)"
        )


def _meta(settings: DictConfig, folders: dict[str, Path], counts: dict[str, int]) -> dict:
    """`meta` of results.json: models, data, settings, code and versions behind the numbers."""
    index = Path(settings.data.path) / settings.split / "index.json"
    return {
        "models": {name: fingerprint(folder) for name, folder in folders.items()},
        "model_configs": {name: sha256(folder / "config.json")[:16] for name, folder in folders.items()},
        "data": {"split": settings.split, "index_sha256": sha256(index), **counts},
        "seed": settings.seed,
        "settings": plain(settings),
        "code": code_hash(Path(__file__).parents[1]),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def _signatures(settings: DictConfig, meta: dict, cells: list[Cell]) -> tuple[dict[Cell, str], dict[str, str]]:
    """Hashes of all that the numbers depend on: of each cell, and of each model's bound."""
    data = [meta["code"], meta["data"], settings.seed, settings.num, plain(settings.data)]
    model = {name: [meta["models"][name], meta["model_configs"][name]] for name in meta["models"]}
    sampled = [*data, plain(settings.metrics)]
    cell_signatures = {
        cell: signature(*sampled, model[cell.method], plain(settings.samplers[cell.sampler]), cell.tokens_per_step)
        for cell in cells
    }
    bound = plain(settings.bound) if settings.bound else None
    return cell_signatures, {name: signature(*data, model[name], bound) for name in model} if bound else {}


def _report(store: ResultStore, sampling: Sampling, settings: DictConfig) -> None:
    """Print the table and write table.md, captions.png, and curve.json with curve.png or quality.png."""
    captions = {cell: store.captions(cell) for cell in store.signatures}
    scores = {}
    for cell, lines in captions.items():
        columns = {name: [line["scores"][name] for line in lines] for name in lines[0]["scores"]}
        scores[cell.method, cell.sampler, cell.tokens_per_step] = columns
    results, headline, budgets = store.results, list(settings.headline), None
    _check_headline(store.stats[next(iter(captions))], settings)
    if settings.curve:
        budgets = _draw_curve(store, scores, metric=settings.curve.metric, lowest=settings.curve.best == "lowest")
    else:
        plot(results, store.out / "quality.png", headline=headline)
    sys.stdout.write(text_report(results, scores, headline=headline, budgets=budgets))
    table = markdown_report(results, scores, headline=headline, budgets=budgets)
    write_bytes(store.out / "table.md", table.encode())
    if examples := _examples(captions, sampling):
        picture(examples, store.out / "captions.png")


def _draw_curve(store: ResultStore, scores: Scores, *, metric: str, lowest: bool) -> Table | None:
    """Write curve.json and curve.png. Returns the table of the best cells within budgets of forward calls."""
    points = points_of(store.results, metric)
    if not points:
        logger.warning("no cell has a value of %s: no curve is drawn", metric)
        return None
    write_json(store.out / "curve.json", to_dict(points, metric=metric, lowest=lowest))
    plot_curve(points, store.out / "curve.png", metric=metric, lowest=lowest)
    return budget_table(points, scores, metric=metric, lowest=lowest)


def _examples(captions: dict[Cell, list[dict]], sampling: Sampling) -> list[Example]:
    """The first images with their captions at the highest tokens/step; none for data without images.

    Shows the baseline, and the last method with its first and its last sampler.
    """
    metrics = [metric for metric in sampling.build_metrics() if isinstance(metric, CaptionMetric)]
    fastest = max(cell.tokens_per_step for cell in captions)
    cells = [cell for cell in captions if cell.tokens_per_step == fastest]
    last_method = [cell for cell in cells if cell.method == cells[-1].method]
    shown = list(dict.fromkeys([cells[0], last_method[0], last_method[-1]]))
    batch = next(first_batches(sampling.loader, EXAMPLES))
    examples = []
    for row, image in enumerate(batch.images[: min(EXAMPLES, sampling.num)]):
        if not image:
            continue
        record = batch.records[row]
        panels = []
        for cell in shown:
            text = captions[cell][row]["text"]
            title = f"{cell.method}, {cell.sampler}, {cell.tokens_per_step} tokens/step"
            panels.append(Panel(title, text, [mark for metric in metrics for mark in metric.marks(text, record)]))
        examples.append(Example(Image.open(BytesIO(image)).convert("RGB"), panels))
    return examples


if __name__ == "__main__":
    main()
