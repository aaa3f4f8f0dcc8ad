"""Generate: caption images with a trained model, correct a flawed caption, or answer questions without an image.

    python -m src.generate conf=generate model.path=runs/stage2/model images=data/scenes/test
    python -m src.generate conf=generate model=llada_v model.path=... images=photos/ prompt="Describe it." steps=32
    python -m src.generate conf=generate model.path=... images=a.png prompt=... caption="A red ring is"
    python -m src.generate conf=generate model=llada model.path=... images=null prompt=questions.jsonl
    python -m src.generate conf=generate model.path=... images=null prompt=data/smiles/test temperature=1 cfg_scale=1

    file, folder, split or questions -> batches of what can be read -> sampler -> OUT, one JSON line for each

The lines of a batch are written before the next one starts, so the same command continues a killed run.
Images that cannot be read are named and counted, the rest goes on; the exit code is 1 if none could be read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from datamodules.collate import Collate
from datamodules.shards import Sample
from src.cli.config import load_config, load_part, path_of
from src.cli.entrypoint import main_guard
from src.cli.help import NEEDS
from src.cli.instantiate import build, check, plain
from src.generation.requests import Entry, _is_split, find_entries
from src.generation.writer import Output
from src.io.errors import UserError
from src.io.images import ImageProblem
from src.io.lock import locked
from src.io.settings import describe
from src.models.hf.folder import ModelFolder, check_vocabulary, sketch
from src.samplers.uniform import AnySampler
from src.text.tokenizer import Codec
from src.types import Batch, Prefix, Sampled

logger = logging.getLogger(__name__)
SHOWN = 20  # captions printed at the end; all of them are in the file
TEXTS = ("prompt", "caption", "suffix", "system")  # taken as they stand on the command line
SAMPLER = ("length", "post_steps", "temperature", "cfg_scale", "early_stop")  # what of it the config may change


@dataclass
class Outcome:
    """What became of the images."""

    texts: list[tuple[str, str]] = field(default_factory=list)
    skipped: int = 0
    bad: list[str] = field(default_factory=list)


@main_guard
def main(argv: list[str]) -> None:
    """Caption the images that the config names."""
    cfg = load_config(argv, verb="src.generate", needs=NEEDS["src.generate"], texts=TEXTS)
    path = path_of(cfg, "out")
    sampler = choose_sampler(cfg)
    codec = Codec.load(cfg.model.path, prompt_format=cfg.prompt_format)
    codec = codec.with_format(system=cfg.system, join=cfg.join)
    _check_request(cfg, codec, sampler)
    out = Output(path, settings=_settings(cfg, sampler), trace=cfg.trace)
    with locked(path), out:  # before the model is loaded, as it can be refused
        _write(cfg, sampler, codec, out)


def _write(cfg: DictConfig, sampler: AnySampler, codec: Codec, out: Output) -> None:
    """Load the model and write what is still to be written, batch by batch."""
    backbone = build(cfg.model, device="cuda" if torch.cuda.is_available() else "cpu").eval()
    count, entries = find_entries(cfg, backbone.layout)
    collate = Collate(codec, response_length=sampler.length, layout=backbone.layout, seed=cfg.seed, first=True)
    tally, device = Outcome(), next(backbone.parameters()).device
    positions = ModelFolder.open(cfg.model.path).positions
    with memory_of(cfg.batch_size), tqdm(total=count, unit="text", desc="generate") as bar:
        for samples in _batches(entries, cfg, out.keys, tally, bar):
            batch = collate(samples, 0)[0].to(device)
            sampled = caption_batch(backbone, batch, sampler, codec, cfg, positions=positions)
            tally.texts += out.add(batch.keys, sampled, codec)
            bar.update(len(batch))
    _print(tally, out.path)


def choose_sampler(cfg: DictConfig) -> AnySampler:
    """The sampler of the file conf/sampler/NAME.yaml, or of another .yaml file, with the settings of the config.

    Responses are as long as those that the model was trained on, where its folder tells.
    """
    node = load_part("sampler", cfg.sampler)
    response_length = ModelFolder.open(cfg.model.path).config.get("response_length")
    given = {"length": response_length} if response_length else {}
    given |= {name: cfg[name] for name in SAMPLER if cfg[name] is not None}
    if cfg.tokens_per_step is not None or cfg.steps is not None:
        given |= {"tokens_per_step": cfg.tokens_per_step, "steps": cfg.steps}
    sampler = build({**node, **given})
    if not isinstance(sampler, AnySampler):
        raise UserError(f"sampler={cfg.sampler}: {node['target']} is no sampler")
    return sampler


def caption_batch(
    backbone: Any, batch: Batch, sampler: AnySampler, codec: Codec, cfg: DictConfig, *, positions: int | None
) -> Sampled:
    """Responses for a batch, from masks or from the caption to correct. positions: that the model is for, if known."""
    start = None if cfg.caption is None else batch.response
    suffix = torch.tensor(codec.encode(cfg.suffix)[0]) if cfg.suffix else None
    options = {"special": codec.special, "keys": batch.keys, "seed": cfg.seed, "trace": cfg.trace}
    with torch.inference_mode():
        prefix = backbone.encode_prefix(batch.prefix)
        _warn_if_long(batch.keys, prefix, _length_behind(sampler, codec, cfg), positions)
        return sampler(backbone, prefix, start=start, suffix=suffix, **options)


def _length_behind(sampler: AnySampler, codec: Codec, cfg: DictConfig) -> int:
    """Tokens of a response and of the suffix."""
    return sampler.length + len(codec.encode(cfg.suffix or "")[0])


@contextmanager
def memory_of(batch_size: int) -> Iterator[None]:
    """Says what to do when the memory is too small for a batch."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
            raise
        told = f"a batch of {batch_size} does not fit into memory; lower batch_size, or length"
        raise UserError(f"{told}; the same command then goes on behind the lines that are written") from error


def _warn_if_long(keys: list[str], prefix: Prefix, length: int, limit: int | None) -> None:
    """Names the rows that have more tokens, `length` behind the prefix, than positions that the model was made for."""
    taken = [prefix.embeds.shape[1]] * len(keys) if prefix.mask is None else prefix.mask.sum(1).tolist()
    for key, tokens in zip(keys, taken, strict=True):
        if limit is not None and tokens + length > limit:
            logger.warning("%s: %d tokens of prompt and %d behind it, the model is for %d", key, tokens, length, limit)


def _batches(
    entries: Iterator[Entry], cfg: DictConfig, done: set[str], tally: Outcome, bar: tqdm
) -> Iterator[list[Sample]]:
    """Readable images that have no caption yet; the others are counted."""
    samples: list[Sample] = []
    for key, read in entries:
        if key in done:
            tally.skipped += 1
            bar.update()
            continue
        try:
            sample = read()
        except ImageProblem as problem:
            logger.warning("%s: %s", key, problem)
            tally.bad.append(key)
            bar.update()
            continue
        sample.record["captions"] = [{"text": cfg.caption or ""}]
        samples.append(sample)
        if len(samples) == cfg.batch_size:
            yield samples
            samples = []
    if samples:
        yield samples


def _settings(cfg: DictConfig, sampler: AnySampler) -> dict[str, Any]:
    """What a caption depends on besides its image; part of every line."""
    schedule = asdict(sampler.schedule)
    speed = {name: schedule[name] for name in ("tokens_per_step", "steps") if schedule[name] is not None}
    other = {name: getattr(sampler, name) for name in SAMPLER}
    given = {name: cfg[name] for name in ("sampler", "seed", "prompt", "caption", "suffix")}
    prompt = {name: cfg[name] for name in ("prompt_format", "system", "join")}
    model = {name: value for name, value in plain(cfg.model).items() if name != "path"}
    rest = json.dumps([describe(sampler), model], sort_keys=True)  # too long for every line
    digest = hashlib.sha256(rest.encode()).hexdigest()[:16]
    return {**speed, **other, **given, **prompt, "options": digest, "model": sketch(cfg.model.path)}


def _check_request(cfg: DictConfig, codec: Codec, sampler: AnySampler) -> None:
    """What a user can get wrong, before anything slow starts."""
    check(cfg)
    if cfg.images is not None:
        path_of(cfg, "images")
    if cfg.batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {cfg.batch_size}")
    folder = ModelFolder.open(cfg.model.path)
    check_vocabulary(folder, codec)
    prompt = cfg.prompt
    question = None if prompt is None or prompt.endswith(".jsonl") or _is_split(prompt) else str(prompt)
    if cfg.images is not None and prompt is not None and question is None:
        raise UserError(f"prompt={prompt} is no question: with images it is one for all of them")
    # its image marks are looked at
    asked = [] if question is None else codec.prompt_ids(question, images=0 if cfg.images is None else 1)
    length = _length_behind(sampler, codec, cfg)
    if folder.positions is not None and len(asked) + length > folder.positions:
        raise UserError(
            f"{len(asked)} tokens of prompt and {length} behind it are more than the {folder.positions} positions that "
            f"the model is for (config.json): lower length={sampler.length}, or shorten the prompt"
        )
    if cfg.caption is None:
        return
    if not sampler.post_steps:
        raise UserError(f"sampler={cfg.sampler} has no post_steps to correct a caption; take sampler=refine")
    ids = codec.encode(cfg.caption)[0]
    if len(ids) >= sampler.length:
        raise UserError(f"the caption has {len(ids)} tokens, a response has room for {sampler.length - 1}")
    if codec.decode(ids) != cfg.caption:
        logger.warning("the tokenizer lacks some characters and reads the caption as %r", codec.decode(ids))


def _print(tally: Outcome, out: Path) -> None:
    """Captions to standard output, the summary to standard error; exit code 1 if no image could be read."""
    for key, text in tally.texts[:SHOWN]:
        sys.stdout.write(f"{key}: {text}\n")
    if len(tally.texts) > SHOWN:
        sys.stdout.write(f"... and {len(tally.texts) - SHOWN} more in {out}\n")
    parts = [f"{len(tally.texts)} captions written to {out}"]
    if tally.skipped:
        parts.append(f"{tally.skipped} were there already")
    if tally.bad:
        parts.append(f"{len(tally.bad)} images could not be read: {', '.join(tally.bad)}")
    sys.stderr.write("; ".join(parts) + "\n")
    if tally.bad and not tally.texts and not tally.skipped:
        sys.exit(1)


if __name__ == "__main__":
    main()
