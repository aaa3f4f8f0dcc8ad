"""Generate: caption images with a trained model, correct a flawed caption, or answer questions without an image.

    python -m src.generate conf=generate model.path=runs/stage2/model images=data/scenes/test
    python -m src.generate conf=generate model=llada_v model.path=... images=photos/ prompt="Describe it." steps=32
    python -m src.generate conf=generate model.path=... images=a.png prompt=... caption="A red ring is"
    python -m src.generate conf=generate model=llada model.path=... images=null prompt=questions.jsonl
    python -m src.generate conf=generate model.path=... images=null prompt=data/smiles/test temperature=1 cfg_scale=1

    file, folder, split or questions -> batches of readable samples -> sampler -> OUT, one JSON line per response

The lines of a batch are written before the next batch starts, so the same command continues a killed run. Unreadable
images are named and counted and the rest continues; the exit code is 1 if no image could be read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from datamodules.collate import Collate
from src.cli.config import load_config, load_part, path_of
from src.cli.entrypoint import main_guard
from src.cli.help import NEEDS
from src.cli.instantiate import build, check, plain
from src.generation.batches import Outcome, caption_batch, memory_of, read_batches
from src.generation.requests import find_entries, is_split
from src.generation.writer import Output
from src.io.errors import UserError
from src.io.lock import locked
from src.io.settings import describe
from src.models.hf.folder import ModelFolder, check_vocabulary, sketch
from src.samplers.uniform import AnySampler
from src.text.tokenizer import Codec

logger = logging.getLogger(__name__)
SHOWN = 20  # responses printed at the end; the file has all of them
TEXTS = ("prompt", "caption", "suffix", "system")  # keys whose command-line values are not parsed as yaml
SAMPLER = ("length", "post_steps", "temperature", "cfg_scale", "early_stop")  # sampler settings that the config may set


@main_guard
def main(argv: list[str]) -> None:
    """Write a response for each image or question that the config names."""
    cfg = load_config(argv, verb="src.generate", needs=NEEDS["src.generate"], texts=TEXTS)
    path = path_of(cfg, "out")
    sampler = choose_sampler(cfg)
    codec = Codec.load(cfg.model.path, prompt_format=cfg.prompt_format)
    codec = codec.with_format(system=cfg.system, join=cfg.join)
    _check_request(cfg, codec, sampler)
    out = Output(path, settings=_settings(cfg, sampler), trace=cfg.trace)
    with locked(path), out:  # before the model is loaded, as either may refuse
        backbone = build(cfg.model, device="cuda" if torch.cuda.is_available() else "cpu").eval()
        device = next(backbone.parameters()).device
        count, entries = find_entries(cfg, backbone.layout)
        collate = Collate(codec, response_length=sampler.length, layout=backbone.layout, seed=cfg.seed, first=True)
        options = {
            "seed": cfg.seed,
            "correct": cfg.caption is not None,
            "suffix": torch.tensor(codec.encode(cfg.suffix)[0]) if cfg.suffix else None,
            "trace": cfg.trace,
            "max_positions": ModelFolder.open(cfg.model.path).positions,
        }
        outcome = Outcome()
        with memory_of(cfg.batch_size), tqdm(total=count, unit="text", desc="generate") as bar:
            for samples in read_batches(
                entries, batch_size=cfg.batch_size, caption=cfg.caption, done=out.keys, outcome=outcome, bar=bar
            ):
                batch = collate(samples, 0)[0].to(device)
                sampled = caption_batch(backbone, batch, sampler, codec, **options)
                outcome.texts += out.add(batch.keys, sampled, codec)
                bar.update(len(batch))
        _print(outcome, out.path)


def choose_sampler(cfg: DictConfig) -> AnySampler:
    """The sampler of conf/sampler/NAME.yaml, or of another .yaml file, with the settings of the config on top.

    Without `length` it writes the response length that the model was trained with, if its folder has it.
    """
    node = load_part("sampler", cfg.sampler)
    response_length = ModelFolder.open(cfg.model.path).config.get("response_length")
    settings = {"length": response_length} if response_length else {}
    settings |= {name: cfg[name] for name in SAMPLER if cfg[name] is not None}
    if cfg.tokens_per_step is not None or cfg.steps is not None:
        settings |= {"tokens_per_step": cfg.tokens_per_step, "steps": cfg.steps}
    sampler = build({**node, **settings})
    if not isinstance(sampler, AnySampler):
        raise UserError(f"sampler={cfg.sampler}: {node['target']} is not a sampler")
    return sampler


def _settings(cfg: DictConfig, sampler: AnySampler) -> dict[str, Any]:
    """What a response depends on besides its image or question; part of every line."""
    schedule = asdict(sampler.schedule)
    speed = {name: schedule[name] for name in ("tokens_per_step", "steps") if schedule[name] is not None}
    sampling = {name: getattr(sampler, name) for name in SAMPLER}
    request = {name: cfg[name] for name in ("sampler", "seed", "prompt", "caption", "suffix")}
    prompt = {name: cfg[name] for name in ("prompt_format", "system", "join")}
    model = {name: value for name, value in plain(cfg.model).items() if name != "path"}
    options = json.dumps([describe(sampler), model], sort_keys=True)  # hashed, as it is too long for every line
    digest = hashlib.sha256(options.encode()).hexdigest()[:16]
    return {**speed, **sampling, **request, **prompt, "options": digest, "model": sketch(cfg.model.path)}


def _check_request(cfg: DictConfig, codec: Codec, sampler: AnySampler) -> None:
    """Raise UserError for mistakes in the request before the model is loaded."""
    check(cfg)
    if cfg.images is not None:
        path_of(cfg, "images")
    if cfg.batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {cfg.batch_size}")
    folder = ModelFolder.open(cfg.model.path)
    check_vocabulary(folder, codec)
    prompt = cfg.prompt
    question = None if prompt is None or prompt.endswith(".jsonl") or is_split(prompt) else str(prompt)
    if cfg.images is not None and prompt is not None and question is None:
        raise UserError(f"prompt={prompt} is not a question: with images, one question serves for all of them")
    # raises UserError if the question's image marks do not match the images
    prompt_ids = [] if question is None else codec.prompt_ids(question, images=0 if cfg.images is None else 1)
    length = sampler.length + len(codec.encode(cfg.suffix or "")[0])
    if folder.positions is not None and len(prompt_ids) + length > folder.positions:
        raise UserError(
            f"{len(prompt_ids)} prompt tokens and {length} after them exceed the model's {folder.positions} positions "
            f"(config.json): lower length={sampler.length}, or shorten the prompt"
        )
    if cfg.caption is None:
        return
    if not sampler.post_steps:
        raise UserError(f"sampler={cfg.sampler} has no post_steps to correct a caption; use sampler=refine")
    ids = codec.encode(cfg.caption)[0]
    if len(ids) >= sampler.length:
        raise UserError(f"the caption has {len(ids)} tokens, but a response has room for {sampler.length - 1}")
    if codec.decode(ids) != cfg.caption:
        logger.warning("the tokenizer lacks some characters and reads the caption as %r", codec.decode(ids))


def _print(outcome: Outcome, out: Path) -> None:
    """Responses to standard output, a summary to standard error; exit code 1 if no image could be read."""
    for key, text in outcome.texts[:SHOWN]:
        sys.stdout.write(f"{key}: {text}\n")
    if len(outcome.texts) > SHOWN:
        sys.stdout.write(f"... and {len(outcome.texts) - SHOWN} more in {out}\n")
    parts = [f"{len(outcome.texts)} captions written to {out}"]
    if outcome.skipped:
        parts.append(f"{outcome.skipped} already there")
    if outcome.unreadable:
        parts.append(f"{len(outcome.unreadable)} images could not be read: {', '.join(outcome.unreadable)}")
    sys.stderr.write("; ".join(parts) + "\n")
    if outcome.unreadable and not outcome.texts and not outcome.skipped:
        sys.exit(1)


if __name__ == "__main__":
    main()
