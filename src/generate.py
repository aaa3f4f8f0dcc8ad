"""Generate: caption images with a trained model, correct a flawed caption, or answer questions without an image.

    python -m src.generate conf=generate model.path=runs/stage2/model images=data/scenes/test
    python -m src.generate conf=generate model=llada_v model.path=... images=photos/ prompt="Describe it." steps=32
    python -m src.generate conf=generate model.path=... images=a.png prompt=... caption="A red ring is"
    python -m src.generate conf=generate model=llada model.path=... images=null prompt=questions.jsonl

    file, folder, split or questions -> batches of what can be read -> sampler -> OUT, one JSON line for each

The lines of a batch are written before the next one starts, so the same command continues a killed run.
Images that cannot be read are named and counted, the rest goes on; the exit code is 1 if none could be read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image
from tqdm import tqdm

from datamodules.captions import Collate
from datamodules.shards import Index, Sample, decode, read_index, read_tar
from src.batch import Batch, Sampled
from src.components import ConfigError, build, check, plain
from src.config import load_config, load_part, main_guard
from src.diffusion.sampler import Sampler
from src.drafting import describe
from src.importers.images import ImageProblem, fit, load
from src.models.checkpoint import ModelFolder, sketch
from src.prompts.format import IMAGE
from src.shards import INDEX
from src.tiling import Layout, Square
from src.tokenizer import Codec

logger = logging.getLogger(__name__)
SHOWN = 20  # captions printed at the end; all of them are in the file
Entry = tuple[str, Callable[[], Sample]]  # key of an image or question, and what reads it or raises ImageProblem
SAMPLER = ("length", "post_steps", "temperature", "cfg_scale", "early_stop")  # what of it the config may change


@dataclass
class Tally:
    """What became of the images."""

    texts: list[tuple[str, str]] = field(default_factory=list)
    skipped: int = 0
    bad: list[str] = field(default_factory=list)


@main_guard
def main(argv: list[str]) -> None:
    """Caption the images that the config names."""
    cfg = load_config(argv, verb="src.generate", needs=["images", "sampler"])
    try:
        sampler = choose_sampler(cfg)
        codec = Codec.load(cfg.model.path, prompt_format=cfg.prompt_format)
        codec = codec.with_format(system=cfg.system, join=cfg.join)
        _check_request(cfg, codec, sampler)
        backbone = build(cfg.model, device="cuda" if torch.cuda.is_available() else "cpu").eval()
        count, entries = find_entries(cfg, backbone.layout)
        out = Output(Path(cfg.out), settings=_settings(cfg, sampler), trace=cfg.trace)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    collate = Collate(codec, canvas=sampler.length, layout=backbone.layout, seed=cfg.seed, first=True)
    tally, device = Tally(), next(backbone.parameters()).device
    with out, memory_of(cfg.batch_size), tqdm(total=count, unit="text", desc="generate") as bar:
        for samples in _batches(entries, cfg, out.keys, tally, bar):
            batch = collate(samples, 0)[0].to(device)
            tally.texts += out.add(batch.keys, caption_batch(backbone, batch, sampler, codec, cfg), codec)
            bar.update(len(batch))
    _print(tally, out.path)


def choose_sampler(cfg: DictConfig) -> Sampler:
    """The sampler of the file conf/sampler/NAME.yaml, or of another .yaml file, with the settings of the config.

    Responses are as long as those that the model was trained on, where its folder tells.
    """
    node = load_part("sampler", cfg.sampler)
    canvas = ModelFolder.open(cfg.model.path).config.get("canvas")
    given = {"length": canvas} if canvas else {}
    given |= {name: cfg[name] for name in SAMPLER if cfg[name] is not None}
    if cfg.tokens_per_step is not None or cfg.steps is not None:
        given |= {"tokens_per_step": cfg.tokens_per_step, "steps": cfg.steps}
    return build({**node, **given})


def caption_batch(backbone: Any, batch: Batch, sampler: Sampler, codec: Codec, cfg: DictConfig) -> Sampled:
    """Responses for a batch, from masks or from the caption to correct."""
    start = None if cfg.caption is None else batch.response
    suffix = torch.tensor(codec.encode(cfg.suffix)[0]) if cfg.suffix else None
    options = {"special": codec.special, "keys": batch.keys, "seed": cfg.seed, "trace": cfg.trace}
    with torch.inference_mode():
        prefix = backbone.encode_prefix(batch.prefix)
        return sampler(backbone, prefix, start=start, suffix=suffix, **options)


@contextmanager
def memory_of(batch_size: int) -> Iterator[None]:
    """Says what to do when the memory is too small for a batch."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
            raise
        told = f"a batch of {batch_size} does not fit into memory; lower batch_size, or length"
        raise ConfigError(f"{told}; the same command then goes on behind the lines that are written") from error


def find_entries(cfg: DictConfig, layout: Layout | None) -> tuple[int, Iterator[Entry]]:
    """How many images or questions the config names, and their entries. `layout`: the model's, None for text only."""
    if cfg.images is None:
        return find_questions(cfg.prompt)
    if layout is None:
        raise ValueError("the model has no vision path, so it cannot caption images; images=null asks without one")
    return find_images(Path(cfg.images), layout=layout, prompt=cfg.prompt)


def find_questions(prompt: str | None) -> tuple[int, Iterator[Entry]]:
    """One question, or those of a .jsonl file, {"key": ..., "prompt": ...} in each line."""
    if not prompt:
        raise ValueError("images=null needs a prompt: a question, or a .jsonl file of them")
    if not prompt.endswith(".jsonl"):
        return 1, iter([("prompt", partial(_asked, "prompt", prompt))])
    if not Path(prompt).is_file():
        raise ValueError(f"prompt: no file {prompt}")
    lines = Path(prompt).read_text(encoding="utf-8").splitlines()
    asked: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        try:
            said = json.loads(line)
            key, question = said["key"], said["prompt"].strip()
        except (AttributeError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f'line {number} of {prompt} is no {{"key": "a", "prompt": "Why?"}}: {line}') from error
        if IMAGE in question:
            raise ValueError(f"line {number} of {prompt} has an image mark, but there are no images")
        if key in asked:
            raise ValueError(f"line {number} of {prompt} repeats the key {key!r}")
        asked[key] = question
    return len(asked), iter([(key, partial(_asked, key, question)) for key, question in asked.items()])


def _asked(key: str, question: str) -> Sample:
    return Sample(key, {"prompt": question}, b"", None)


def find_images(path: Path, *, layout: Layout, prompt: str | None) -> tuple[int, Iterator[Entry]]:
    """How many images there are in a file, below a folder or in a split of a dataset, and their entries.

    Keys are file names relative to the folder, or those of the dataset; `prompt` replaces the dataset's own.
    """
    if (path / INDEX).is_file():
        index = read_index(path)
        return index.count, _in_shards(index, prompt)
    if not path.exists():
        raise ValueError(f"images: no file or folder {path}")
    if prompt is None:
        raise ValueError('image files need a prompt, such as prompt="Describe the picture."')
    root, files = (path, _image_files(path)) if path.is_dir() else (path.parent, [path])
    if not files:
        raise ValueError(f"images: no image in {path}; of a dataset name one split, a folder with {INDEX}")
    named = [(file.relative_to(root).as_posix(), file) for file in files]
    return len(files), iter([(key, partial(_open, key, file, layout, prompt)) for key, file in named])


def _image_files(folder: Path) -> list[Path]:
    """Files with the ending of an image format, at any depth, without hidden ones."""
    endings = Image.registered_extensions()
    found = [path for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file()]
    return sorted(f for f in found if not any(p.startswith(".") for p in f.relative_to(folder).parts))


def _open(key: str, file: Path, layout: Layout, prompt: str) -> Sample:
    """A photograph as the layout wants it: a square layout does not keep its shape, so it is put on a grey square."""
    image = fit(load(file, size=layout.size), layout.size) if isinstance(layout, Square) else load(file)
    return Sample(key, {"prompt": prompt}, b"", image)


def _in_shards(index: Index, prompt: str | None) -> Iterator[Entry]:
    """All samples of a data folder; those that a cut shard lacks have an entry that fails."""
    for shard in index.shards:
        found = 0
        for raw in islice(read_tar(shard.path, strict=False), shard.count):
            found += 1
            yield raw["__key__"], partial(_decode, raw, prompt)
        for number in range(found, shard.count):
            yield f"{shard.path.name}#{number}", partial(_decode, {}, prompt)


def _decode(raw: dict[str, Any], prompt: str | None) -> Sample:
    sample = decode(raw)
    if sample is None:
        raise ImageProblem("damaged_sample")
    question = prompt or sample.record.get("prompt")
    if not question:
        raise ImageProblem("no_prompt")
    if question.count(IMAGE) > 1:
        raise ImageProblem("more_image_marks_than_images")
    return replace(sample, record={"prompt": question})


def _batches(
    entries: Iterator[Entry], cfg: DictConfig, done: set[str], tally: Tally, bar: tqdm
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


class Output:
    """The lines of captions, and those of traces beside them; a context manager. `keys`: images with a line.

    A trace has `steps`: the text after each, with _ for a mask, and the fields of `TraceStep`.

    A kill may leave half a line at the end, which is cut off. Raises ValueError when another line is broken,
    or when the captions in the file were made with other settings.
    """

    def __init__(self, path: Path, *, settings: dict[str, Any], trace: bool) -> None:
        self.path, self.settings = path, settings
        self.trace_path = path.with_suffix(".trace.jsonl") if trace else None
        lines = _restore(path)
        for line in lines:
            if changed := [name for name, value in settings.items() if line.get(name) != value]:
                named = [name for name in changed if name != "options"] or ["sampler or model option"]
                raise ValueError(f"{path} was made with another {', '.join(named)}; choose another out")
        self.keys = {line["key"] for line in lines}
        if self.trace_path:  # a trace is written before its caption, so a kill can leave one too many
            _restore(self.trace_path, keep=lambda line: line["key"] in self.keys)

    def __enter__(self) -> Output:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lines = self.path.open("a", encoding="utf-8")
        self._traces = self.trace_path.open("a", encoding="utf-8") if self.trace_path else None
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        if self._traces:
            self._traces.close()

    def add(self, keys: list[str], sampled: Sampled, codec: Codec) -> list[tuple[str, str]]:
        """Append a line for each row; returns (key, text) of each."""
        texts = [codec.decode(ids) for ids in sampled.ids.tolist()]
        if self._traces:
            for key, steps in zip(keys, sampled.traces or [], strict=True):
                shown = [{"text": _shown(codec, step.tokens), **asdict(step)} for step in steps]
                _append(self._traces, {"key": key, "steps": shown})
            self._traces.flush()
        for row, (key, text) in enumerate(zip(keys, texts, strict=True)):
            counts = {"forwards": int(sampled.forwards[row]), "edits": int(sampled.edits[row])}
            _append(self._lines, {"key": key, "text": text, **counts, **self.settings})
        self._lines.flush()
        return list(zip(keys, texts, strict=True))


def _shown(codec: Codec, ids: list[int]) -> str:
    """The text of an unfinished response, up to its first eot, with _ for each mask."""
    text, written = "", list[int]()
    for token in ids[: ids.index(codec.eot_id)] if codec.eot_id in ids else ids:
        if token == codec.mask_id:
            text, written = f"{text}{codec.decode(written)}_", []
        else:
            written.append(token)
    return text + codec.decode(written)


def _append(stream: Any, line: dict) -> None:
    stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _restore(path: Path, keep: Callable[[dict], bool] = lambda line: True) -> list[dict]:
    """The lines of a file. It is cut at the first one not to keep, and at half a line at its end."""
    raw = path.read_bytes() if path.is_file() else b""
    lines, end = [], 0
    for number, text in enumerate(raw.splitlines(keepends=True), start=1):
        if not text.endswith(b"\n"):
            break
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"line {number} of {path} is broken ({error}); choose another out") from error
        if not keep(line):
            break
        lines.append(line)
        end += len(text)
    if end < len(raw):
        with path.open("r+b") as stream:
            stream.truncate(end)
    return lines


def _settings(cfg: DictConfig, sampler: Sampler) -> dict[str, Any]:
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


def _check_request(cfg: DictConfig, codec: Codec, sampler: Sampler) -> None:
    """What a user can get wrong, before anything slow starts."""
    check(cfg)
    if cfg.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {cfg.batch_size}")
    if cfg.prompt is not None:  # its image marks are looked at
        codec.prompt_ids(cfg.prompt, images=0 if cfg.images is None else 1)
    if cfg.caption is None:
        return
    if not sampler.post_steps:
        raise ValueError(f"sampler={cfg.sampler} has no post_steps to correct a caption; take sampler=refine")
    ids = codec.encode(cfg.caption)[0]
    if len(ids) >= sampler.length:
        raise ValueError(f"the caption has {len(ids)} tokens, a response has room for {sampler.length - 1}")
    if codec.decode(ids) != cfg.caption:
        logger.warning("the tokenizer lacks some characters and reads the caption as %r", codec.decode(ids))


def _print(tally: Tally, out: Path) -> None:
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
