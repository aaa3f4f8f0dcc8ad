"""Responses to requests, batch by batch, into a file: what `src.generate` does, for benchmarks as well.

    done = respond(cfg)                          cfg: conf/generate.yaml, resolved
    done = respond(cfg, images={"a": Path("a.jpg")})

    check -> lock OUT -> model -> batches of readable samples -> sampler -> OUT, a line per response

The lines of a batch are written before the next batch starts, so a killed run is continued.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from src.cli.config import path_of
from src.cli.instantiate import build, check, plain
from src.generation.captioner import Captioner, best_device, check_request, choose_sampler
from src.generation.correct import TheirCaptions, report
from src.generation.player import SUFFIX, page_paths, write_page
from src.generation.requests import find_requests, is_split, of_files, readable
from src.generation.writer import Output
from src.io.errors import UserError
from src.io.lock import locked
from src.io.progress import Bar
from src.io.settings import describe
from src.io.words import counted
from src.models.hf.folder import ModelFolder, check_vocabulary, sketch
from src.samplers.base import AnySampler
from src.samplers.sampler import Sampler
from src.samplers.token_edit import ThresholdEdit
from src.text.prompt_format import IMAGE
from src.text.tokenizer import Codec

logger = logging.getLogger(__name__)
SAMPLER = ("length", "post_steps", "temperature", "cfg_scale", "early_stop")  # sampler settings that a config may set
TEXTS = ("prompt", "caption", "suffix", "system")  # keys whose command-line values are not parsed as yaml


@dataclass(frozen=True)
class Responses:
    """path: the file; texts: (key, text) of the new lines; skipped: already there; unreadable: keys of images; page: of
    the traces, if one was asked for; corrected: a report on captions of others, if some were given"""

    path: Path
    texts: list[tuple[str, str]]
    skipped: int
    unreadable: list[str]
    page: Path | None
    corrected: str | None


def respond(
    cfg: DictConfig, *, images: Mapping[str, Path] | None = None, prompts: Mapping[str, str] | None = None
) -> Responses:
    """Write a response for each image or question that the config names.

    images: files by key, to be answered instead of all that `cfg.images` holds
    prompts: the question of each of them, where `cfg.prompt` is not that of all
    """
    # 1. Sampler and tokenizer, and all mistakes that can be seen without the model.
    check(cfg)
    path, html, compared = path_of(cfg, "out"), *page_paths(cfg)
    sampler = sampler_of(cfg)
    codec = Codec.load(cfg.model.path, prompt_format=cfg.prompt_format)
    codec = codec.with_format(system=cfg.system, join=cfg.join)
    folder = ModelFolder.open(cfg.model.path)
    check_vocabulary(folder, codec)
    _check_request(cfg, codec, sampler, positions=folder.positions)
    theirs = None
    if cfg.captions is not None:
        theirs = TheirCaptions(path_of(cfg, "captions"), codec, length=sampler.length)

    with locked(path):
        # 2. What an earlier run has written; then the model and the requests.
        trace = cfg.trace or html is not None
        settings = {**_settings(cfg, sampler), "captions": theirs.sha256 if theirs else None}
        out = Output(path, settings=settings, trace=trace)
        captioner = Captioner(build(cfg.model, device=best_device()), codec, positions=folder.positions)
        options = {"sampler": sampler, "seed": cfg.seed, "suffix": cfg.suffix, "trace": trace or bool(theirs)}
        source: Any = partial(find_requests, cfg.images) if images is None else partial(of_files, images)
        find = partial(source, prompt=prompts or cfg.prompt, layout=captioner.backbone.layout)
        count, requests = find()
        if theirs:
            count, requests = min(count, len(theirs.texts)), theirs.select(requests)
        if cfg.num is not None:
            count, requests = min(count, cfg.num), islice(requests, cfg.num)

        # 3. Responses, batch by batch.
        unreadable: list[str] = []
        texts: list[tuple[str, str]] = []
        samples = readable((request for request in requests if request[0] not in out.keys), unreadable=unreadable)
        with Bar(total=count, initial=min(count, len(out.keys)), unit="text", desc="generate") as bar:
            while batch := list(islice(samples, cfg.batch_size)):
                given = [sample.record.get("caption", cfg.caption) for sample in batch]
                sampled = captioner.sample(batch, texts=given, **options)
                more = theirs.lines(batch, sampled) if theirs else None
                texts += out.add([sample.key for sample in batch], sampled, codec, more=more)
                bar.update(len(batch))
            if theirs:
                count = bar.total = len(theirs.used)
    # 4. The page.
    if html is not None:
        write_page(html, [*compared, path.with_suffix(SUFFIX)], find()[1])
    if theirs:
        alone = [name for name in theirs.texts if name not in theirs.used]
        if cfg.num is None and alone:
            what = counted(len(alone), "caption has", "captions have")
            logger.warning("%s: %s no image, such as that of %s", theirs.path, what, alone[0])
    corrected = report(path, codec) if theirs else None
    return Responses(path, texts, count - len(texts) - len(unreadable), unreadable, html, corrected)


def sampler_of(cfg: DictConfig) -> AnySampler:
    """The sampler that conf/generate.yaml describes, of the response length that the model's folder tells."""
    settings = {name: cfg[name] for name in (*SAMPLER, "tokens_per_step", "steps", "compile")}
    response_length = ModelFolder.open(cfg.model.path).config.get("response_length")
    revising = cfg.caption is not None or cfg.captions is not None
    sampler = choose_sampler(cfg.sampler, response_length=response_length, revising=revising, **settings)
    if cfg.threshold is None:
        return sampler
    if not isinstance(sampler, Sampler) or not isinstance(sampler.reviser, ThresholdEdit):
        raise UserError(f"threshold={cfg.threshold}: sampler={cfg.sampler} has none; use edit_quality")
    return replace(sampler, reviser=replace(sampler.reviser, tau=cfg.threshold))


def _check_request(cfg: DictConfig, codec: Codec, sampler: AnySampler, *, positions: int | None) -> None:
    """Raise UserError for a request that would be answered wrongly without a word, or not in hours."""
    if has_image := cfg.images is not None:
        path_of(cfg, "images")
    for name in ("batch_size", "num"):
        if cfg[name] is not None and cfg[name] < 1:
            raise UserError(f"{name} must be at least 1, got {cfg[name]}")
    many = cfg.prompt is not None and (cfg.prompt.endswith(".jsonl") or is_split(cfg.prompt))
    if many and has_image:
        raise UserError(f"prompt={cfg.prompt} is not a question: with images, one question serves for all of them")
    if not many and cfg.prompt and cfg.prompt.count(IMAGE) > int(has_image):
        logger.warning("the prompt has more image marks than images: %s in it is read as text", IMAGE)
    if cfg.captions is not None and (cfg.caption is not None or not has_image):
        raise UserError(f"captions={cfg.captions} are of images: give images, and no other caption")
    prompt, text = None if many else cfg.prompt, cfg.caption if cfg.captions is None else ""
    check_request(codec, sampler, prompt=prompt, text=text, positions=positions, images=int(has_image))


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
