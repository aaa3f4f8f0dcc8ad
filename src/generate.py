"""Generate: caption images with a trained model, correct a flawed caption, or answer questions without an image.

    python -m src.generate conf=generate model.path=runs/stage2/model images=data/scenes/test
    python -m src.generate conf=generate model=llada_v model.path=... images=photos/ prompt="Describe it." steps=32
    python -m src.generate conf=generate model.path=... images=a.png prompt=... caption="A red ring is"
    python -m src.generate conf=generate model=llada model.path=... images=null prompt=questions.jsonl
    python -m src.generate conf=generate model.path=... images=null prompt=data/smiles/test temperature=1 cfg_scale=1
    python -m src.generate conf=generate model.path=... images=photos/ prompt=... num=8 html=trace.html

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
from functools import partial
from itertools import islice
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from src.cli.config import load_config, path_of
from src.cli.entrypoint import main_guard
from src.cli.help import NEEDS
from src.cli.instantiate import build, check, plain
from src.generation.player import SUFFIX, page_paths, write_page
from src.generation.requests import find_requests, is_split, readable
from src.generation.responder import SAMPLER, Responder, choose_sampler
from src.generation.writer import Output
from src.io.errors import UserError
from src.io.lock import locked
from src.io.settings import describe
from src.io.words import counted
from src.models.hf.folder import ModelFolder, check_vocabulary, sketch
from src.samplers.base import AnySampler
from src.text.prompt_format import IMAGE
from src.text.tokenizer import Codec

logger = logging.getLogger(__name__)
SHOWN = 20  # responses printed at the end; the file has all of them
TEXTS = ("prompt", "caption", "suffix", "system")  # keys whose command-line values are not parsed as yaml


@main_guard
def main(argv: list[str]) -> None:
    """Write a response for each image or question that the config names."""
    # 1. Sampler and tokenizer, and all mistakes that can be seen without the model.
    cfg = load_config(argv, verb="src.generate", needs=NEEDS["src.generate"], texts=TEXTS)
    check(cfg)
    path, html, compared = path_of(cfg, "out"), *page_paths(cfg)
    sampler = choose_sampler(cfg)
    codec = Codec.load(cfg.model.path, prompt_format=cfg.prompt_format)
    codec = codec.with_format(system=cfg.system, join=cfg.join)
    folder = ModelFolder.open(cfg.model.path)
    check_vocabulary(folder, codec)
    _check_request(cfg, codec, sampler, positions=folder.positions)

    with locked(path):
        # 2. What an earlier run has written; then the model and the requests.
        trace = cfg.trace or html is not None
        out = Output(path, settings=_settings(cfg, sampler), trace=trace)
        backbone = build(cfg.model, device="cuda" if torch.cuda.is_available() else "cpu").eval()
        options = {"seed": cfg.seed, "caption": cfg.caption, "suffix": cfg.suffix, "trace": trace}
        respond = Responder(backbone, codec, sampler, positions=folder.positions, **options)
        find = partial(find_requests, cfg.images, prompt=cfg.prompt, layout=backbone.layout)
        count, requests = find()
        if cfg.num is not None:
            count, requests = min(count, cfg.num), islice(requests, cfg.num)

        # 3. Responses, batch by batch.
        unreadable: list[str] = []
        texts: list[tuple[str, str]] = []
        samples = readable((request for request in requests if request[0] not in out.keys), unreadable=unreadable)
        with tqdm(total=count, initial=min(count, len(out.keys)), unit="text", desc="generate") as bar:
            while batch := list(islice(samples, cfg.batch_size)):
                texts += out.add([sample.key for sample in batch], respond(batch), codec)
                bar.update(len(batch))

    # 4. Responses to standard output, a summary to standard error.
    sys.stdout.writelines(f"{key}: {text}\n" for key, text in texts[:SHOWN])
    if len(texts) > SHOWN:
        sys.stdout.write(f"... and {len(texts) - SHOWN} more in {path}\n")
    parts = [f"{counted(len(texts), 'caption')} written to {path}"]
    if skipped := count - len(texts) - len(unreadable):
        parts.append(f"{skipped} already there")
    if unreadable:
        parts.append(f"{counted(len(unreadable), 'image')} could not be read: {', '.join(unreadable)}")
    sys.stderr.write("; ".join(parts) + "\n")
    if unreadable and not texts and not skipped:
        sys.exit(1)

    # 5. The page.
    if html is not None:
        write_page(html, [*compared, path.with_suffix(SUFFIX)], find()[1])
        sys.stderr.write(f"to watch how they were written, open {html} in a browser\n")


def _check_request(cfg: DictConfig, codec: Codec, sampler: AnySampler, *, positions: int | None) -> None:
    """Raise UserError for a request that would be answered wrongly without a word, or not in hours."""
    if has_image := cfg.images is not None:
        path_of(cfg, "images")
    if cfg.batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {cfg.batch_size}")
    many = cfg.prompt is not None and (cfg.prompt.endswith(".jsonl") or is_split(cfg.prompt))
    if many and has_image:
        raise UserError(f"prompt={cfg.prompt} is not a question: with images, one question serves for all of them")
    if not many and cfg.prompt and cfg.prompt.count(IMAGE) > int(has_image):
        logger.warning("the prompt has more image marks than images: %s in it is read as text", IMAGE)
    prompt_ids = [] if many or cfg.prompt is None else codec.prompt_ids(cfg.prompt, images=int(has_image))
    if positions is not None and len(prompt_ids) + sampler.length > positions:
        raise UserError(
            f"{counted(len(prompt_ids), 'prompt token')} and {sampler.length} after them exceed the model's "
            f"{positions} positions (config.json): lower length={sampler.length}, or shorten the prompt"
        )
    if cfg.caption is None:
        return
    if not sampler.post_steps:
        raise UserError(
            f"sampler={cfg.sampler} rewrites no finished text; use sampler=refine, with post_steps of at least 1"
        )
    ids = codec.encode(cfg.caption)[0]
    if len(ids) >= sampler.length:
        raise UserError(
            f"the caption has {counted(len(ids), 'token')}, but a response has room for {sampler.length - 1}"
        )
    if codec.decode(ids) != cfg.caption:
        logger.warning("the tokenizer lacks some characters and reads the caption as %r", codec.decode(ids))


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


if __name__ == "__main__":
    main()
