"""Evaluate: answer the prompts of a split with every model, sampler and speed (tokens per step), and compare.

    python -m src.evaluate conf=evaluate
    python -m src.evaluate conf=evaluate evaluate.num=64 evaluate.tokens_per_step=[1,8]
    python -m src.evaluate conf=evaluate evaluate.models.stage1=null +evaluate.models.mine=runs/mine/model
    python -m src.evaluate conf=sweep evaluate.models.model=runs/stage2/model
    python -m src.evaluate conf=eval/capmas captions=mine.jsonl    a benchmark, by evaluation/benchmark.py

    models x samplers x tokens/step -> captions -> metrics -> results.json, captions/METHOD-SAMPLER-N.jsonl
    -> table.md (also printed), *.png; curve.json with the best within each number of forward calls (evaluate.curve)

Every cell is written as soon as it is finished; a rerun redoes only cells whose model, data, settings or code changed.
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from omegaconf import OmegaConf

from src.cli.config import load_config
from src.cli.entrypoint import main_guard
from src.cli.help import NEEDS
from src.cli.instantiate import build, check, is_node, plain
from src.evaluation.cells import count_samples, evaluate_cell, evaluate_model, first_batches
from src.evaluation.grid import build_samplers, check_models, complete
from src.evaluation.report import check_names, write_report
from src.evaluation.results import ResultStore, code_hash, signature
from src.io.errors import UserError
from src.io.files import sha256
from src.io.lock import locked
from src.io.progress import Bar
from src.models.hf.folder import fingerprint, from_pretrained, outline
from src.models.inference import warn_if_length_differs, with_layout
from src.models.tiling import check_layout
from src.text.tokenizer import Codec

PACKAGES = ("torch", "transformers", "torchmetrics")
PROBES = {  # of a model, whatever its samplers
    "bound": "src.metrics.bound.Bound",
    "looks": "src.metrics.fixing.Looks",
    "words": "src.metrics.words.HiddenWords",
    "recovery": "src.metrics.recovery.Recovery",
}
EXAMPLES = 6  # images of captions.png: the first of the split, not a selection


@main_guard
def main(argv: list[str]) -> None:
    """Compute the missing cells of the evaluation that the config describes, then report on all of them."""
    # 1. Settings: named samplers are loaded, the grid is expanded.
    cfg = load_config(argv, verb="src.evaluate", needs=NEEDS["src.evaluate"])
    if is_node(plain(cfg.evaluate)):  # a benchmark: src/evaluation/benchmark.py
        sys.stdout.write(f"{build(cfg.evaluate).run()}\n")
        return
    settings = OmegaConf.create(complete(plain(cfg.evaluate)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    # 2. Models and their tokenizers, which may differ only in whether they have a gap token.
    check_models(plain(settings.models))
    codecs = {name: Codec.load(folder) for name, folder in settings.models.items()}
    if len({codec.fingerprint for codec in codecs.values()}) > 1:
        raise UserError(f"the models of evaluate.models differ in their tokenizers: {', '.join(codecs)}")
    codec = next(iter(codecs.values()))

    # 3. Samplers, data and metrics. A record that a metric cannot score fails here, before the first caption.
    layouts = [outline(settings.models[name], codec=codecs[name]).layout for name in codecs]
    settings.merge_with({"data": with_layout(plain(settings.data), layouts[0])})
    offers = {"codec": codec, "seed": settings.seed, "batch_size": settings.batch_size}
    check(settings, offers=offers)
    samplers = build_samplers(plain(settings.samplers), plain(settings.speeds), methods=codecs)
    nodes = [{"target": PROBES[name], **plain(settings[name])} for name in PROBES if settings.get(name) is not None]
    probes = [build(node, special=codec.special, **offers).to(device) for node in nodes]
    data = build(settings.data, **offers)
    for layout in layouts if hasattr(data, "layout") else ():  # a datamodule without images has none
        check_layout(data.layout, layout)
    loader = data.eval_dataloader(settings.split)
    metrics = [build(node, **offers).to(device) for node in plain(settings.metrics) or []]
    counts = count_samples(loader, settings.num, metrics, split=settings.split)

    with locked(settings.out):
        # 4. What an earlier run has finished, by hashes of all that the numbers depend on.
        meta = {
            "models": {name: fingerprint(folder) for name, folder in settings.models.items()},
            "model_configs": {name: sha256(Path(f) / "config.json")[:16] for name, f in settings.models.items()},
            "data": {"split": settings.split, "index_sha256": data.read_split(settings.split).digest, **counts},
            "seed": settings.seed,
            "settings": plain(settings),
            "code": code_hash(Path(__file__).parents[1]),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        }
        shared = [meta[name] for name in ("code", "data", "seed")] + [settings.num, plain(settings.data)]
        model = {name: [meta["models"][name], meta["model_configs"][name]] for name in codecs}
        sampled, ways = [*shared, plain(settings.metrics)], plain(settings.samplers)
        cells = {c: signature(*sampled, model[c.method], ways[c.sampler], c.tokens_per_step) for c in samplers}
        probed = {name: signature(*shared, model[name], nodes) for name in codecs if nodes}
        store = ResultStore(Path(settings.out), meta, signatures=cells, model_signatures=probed)

        # 5. The missing cells and probes, model by model.
        report = {name: plain(settings[name]) for name in ("headline", "curve")}
        missing = {name: [c for c in samplers if c.method == name and c not in store.table] for name in codecs}
        missing_probes = set(probed) - set(store.model_stats)
        total = (sum(map(len, missing.values())) + len(missing_probes)) * counts["taken"]
        with Bar(total=total, unit="caption", desc="evaluate", disable=not total) as bar:
            for method, missing_cells in missing.items():
                if not missing_cells and method not in missing_probes:
                    continue
                backbone = from_pretrained(settings.models[method]).to(device).eval()
                warn_if_length_differs(
                    backbone, settings.data.response_length, name=f"{method}: evaluate.data.response_length"
                )
                if method in missing_probes:
                    bar.set_description_str(f"{method} itself")
                    batches = first_batches(loader, counts["taken"], bar)
                    store.add_model_stats(method, evaluate_model(backbone, probes, batches))
                for cell in missing_cells:
                    bar.set_description_str(cell.name)
                    answers = (samplers[cell], codecs[method], first_batches(loader, counts["taken"], bar), metrics)
                    store.add(cell, *evaluate_cell(backbone, *answers, seed=settings.seed))
                    check_names(store.table[cell], **report)

        # 6. The report.
        shown = build(settings.data, **{**offers, "batch_size": EXAMPLES}).eval_dataloader(settings.split)
        sys.stdout.write(
            write_report(store, **report, metrics=metrics, examples=next(first_batches(shown, counts["taken"])))
        )


if __name__ == "__main__":
    main()
