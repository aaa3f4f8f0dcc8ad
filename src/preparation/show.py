"""Look at a dataset, one split of it, or a round: its counts, what looks wrong, and a page of samples.

    python -m src.prepare show=data/photos            prints a summary, and writes data/photos/contact.html
    python -m src.prepare show=data/photos seed=1     other samples

    index.json, manifest.json -> summary
    shards, in an order drawn by the seed, up to LOOKED_AT samples -> findings, lengths -> summary
                                               the first ON_SHEET -> contact.html, which needs no other file

A finding names what may be wrong, not what is: a caption may quote an apology.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from itertools import islice
from pathlib import Path
from random import Random
from tarfile import TarError
from textwrap import fill, shorten
from typing import Any

import numpy as np
from PIL import Image

from src.io.errors import UserError
from src.io.files import atomic, read_json
from src.io.shards import DATASET, INDEX, read_manifest, read_shard
from src.io.words import counted, data_size
from src.preparation.counts import Counts, grid, table
from src.preparation.manifest import MANIFEST, percentiles
from src.preparation.splits import SPLITS
from src.text.tokenizer import Codec

SHEET, LOOKED_AT, ON_SHEET, THUMBNAIL = "contact.html", 4096, 24, 256  # pixels
TINY, FLAT = 16, 8  # pixels of the shorter side; grey levels between the darkest and the brightest pixel
LONG = 20  # words of a caption that is expected to end like a sentence
REFUSAL = re.compile(
    r"\b(i['\u2019]?m|i am) (sorry|unable|not able)\b|^\W*i (cannot|can['\u2019]?t)\b|\bas an? (ai|artificial)\b|"
    r"\bi (cannot|can['\u2019]?t) (assist|help|see|view|access|process|provide|describe|identify|determine)\b|"
    r"\b(message|image|input) is empty\b|\bno (image|picture|photo) (was|is|has been) |\blanguage model\b|"
    r"\bplease (provide|upload|share) (the|an?|your) (image|picture|photo)",
    re.IGNORECASE,
)
CONTROL = re.compile(r"<\|[^|<>\s]+\|>|<image>|</?s>|<(pad|unk|bos|eos|mask)>|\[/?INST\]", re.IGNORECASE)
SENTENCE_END = re.compile(r"[.!?\u2026\u3002\uff01\uff1f][\"'\u201d\u2019\u00bb)\]*_]*\s*$")
STYLE = (
    "body{font:14px sans-serif;margin:16px}article{display:inline-block;vertical-align:top;width:260px;margin:8px}"
    "img{max-width:256px;display:block}small{color:#666}del{background:#fcc}ins{background:#cfc}"
)


@dataclass
class View:
    """A sample as it is shown. texts: each with its false words, as (start, end, false, true) of characters"""

    key: str
    split: str
    prompt: str
    texts: list[tuple[str, list[tuple[int, int, str, str]]]]
    lengths: list[int] = field(default_factory=list)  # in tokens, where they are known
    image: bytes = b""
    packed: bool = False  # rows cut from documents, which end anywhere


def show_arguments(argv: Sequence[str]) -> dict[str, Any]:
    """The arguments of `show` on a command line. Raises UserError for others."""
    values = {name: value for name, _, value in (argument.partition("=") for argument in argv)}
    path, seed = values.pop("show"), values.pop("seed", "0")
    if values or not path or not seed.isdecimal():
        raise UserError(f"expected show=PATH and perhaps seed=NUMBER, got {' '.join(argv)}")
    return {"path": path, "seed": int(seed)}


def show(path: str | Path, *, seed: int = 0) -> str:
    """Write the page of samples into the folder, and return the summary.

    Raises UserError if the folder is no finished dataset, split or round.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"show: no folder {folder}")
    # 1. what the folder says of itself
    index = read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
    if index.get("kind") == DATASET:
        indexes = {split: read_manifest(folder / split) for split in SPLITS if (folder / split / INDEX).is_file()}
        shards = [(split, folder / split / entry["name"]) for split in indexes for entry in indexes[split]["shards"]]
    else:
        index = read_manifest(folder)
        indexes, shards = {folder.name: index}, [(folder.name, folder / entry["name"]) for entry in index["shards"]]
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    # 2. its samples
    codec = next((Codec.load(f / "tokenizer") for f in (folder, folder.parent) if (f / "tokenizer").is_dir()), None)
    Random(seed).shuffle(shards)
    findings, total = Counts(), sum(entry["count"] for content in indexes.values() for entry in content["shards"])
    looked_at = min(total, LOOKED_AT)
    chosen = set(Random(seed).sample(range(looked_at), min(looked_at, ON_SHEET)))
    settings = index.get("settings", {})
    views, lengths = _look(islice(_views(shards, codec, findings), looked_at), settings, chosen, findings)
    for source in manifest.get("sources", []):
        if source["samples"] == 0:
            findings.skip("a source without samples", source["name"])
    for split, numbers in index["counts"].items() if index.get("kind") == DATASET else ():
        found = sum(entry["count"] for entry in indexes.get(split, {"shards": ()})["shards"])
        if found < (written := numbers.get("written", 0)):
            findings.skip("a split that has lost samples", f"{split}: {found:,} of {written:,} are in its {INDEX}")
    # 3. the page and the summary
    with atomic(folder / SHEET) as stream:
        stream.write(_page(folder, views).encode())
    lines = [f"looks wrong, of {looked_at:,} samples looked at" + (f" (seed {seed})" if looked_at < total else "")]
    for name, number in findings.most_common():
        lines.append(f"  {number:6,}  {number / max(looked_at, 1):6.1%}  {name}, such as {findings.examples[name]}")
    lines += ["  nothing"] * (not findings)
    kind = ", ".join(sorted({content["kind"] for content in indexes.values()}))
    return "\n\n".join([
        f"{folder}: {kind}, {counted(total, 'sample')} in {counted(len(shards), 'shard')}",
        *_tables(index, indexes, manifest, settings, percentiles(Counter(lengths))),
        "\n".join(lines),
        f"contact sheet of {counted(len(views), 'sample')}: {folder / SHEET}",
    ])  # fmt: skip


def _tables(
    index: Mapping, indexes: Mapping[str, Mapping], manifest: Mapping, settings: Mapping, looked_at: Mapping
) -> Iterator[str]:
    """Settings, sources, splits, records and spans. looked_at: percentiles, for a folder without a manifest"""
    # 1. settings, and sources that have names
    given = [f"{name} {value}" for name, value in settings.items() if name != "sources" and value not in (None, {}, [])]
    if given:
        yield fill(", ".join(given), 120)
    columns = ("name", "samples", "weight", "licence", "origin")
    rows = [[source[column] or "" for column in columns] for source in manifest.get("sources", []) if source["name"]]
    if rows:
        yield grid([("source", *columns[1:]), *rows])
    # 2. splits, and the lengths of their captions in tokens
    points, rows = ("p5", "p50", "p95", "p99", "max"), []
    for split, content in indexes.items():
        size = data_size(sum(entry["bytes"] for entry in content["shards"]))
        tokens = manifest["caption_tokens"][split] if manifest else looked_at
        cells = (tokens.get(name, "") for name in ("count", "mean", *points))
        rows.append((split, content["counts"]["written"], len(content["shards"]), size, *cells))
    yield grid([("split", "samples", "shards", "size", "captions", "tokens, mean", *points), *rows])
    # 3. what became of the records
    if records := manifest.get("records"):
        parts = (f"{number:,} {name.replace('_', ' ')}" for name, number in records.items() if name != "read")
        yield f"{counted(records['read'], 'record')} = {' + '.join(parts)}"
    counts = index["counts"] if manifest else {split: content["counts"] for split, content in indexes.items()}
    yield table(counts, index.get("examples", {}))
    # 4. spans
    equal, unequal = (sum(n.get(name, 0) for n in counts.values()) for name in ("swaps", "swaps of unequal length"))
    if equal + unequal:
        share = equal / (equal + unequal)
        yield f"hallucinated spans: {equal:,} of equal length ({share:.1%}); {unequal:,} of unequal length are left out"


def _views(shards: Sequence[tuple[str, Path]], codec: Codec | None, findings: Counts) -> Iterator[View]:
    """The samples of the shards; one that cannot be read to its end is a finding."""
    for split, path in shards:
        try:
            for raw in read_shard(path):
                yield _view(raw, split, codec)
        except (OSError, EOFError, TarError, ValueError, KeyError, TypeError) as error:
            findings.skip("a shard that cannot be read to its end", f"{path}: {type(error).__name__}: {error}")


def _view(raw: Mapping, split: str, codec: Codec | None) -> View:
    record, image = raw["json"], raw.get("png") or raw.get("jpg") or b""
    view = View(raw["__key__"], split, record.get("prompt") or "", [], image=image)
    if "captions" not in record:  # a draft: the edits of the expert, where it wrote what they quote
        spans, ids = [], record.get("draft_ids") or record.get("token_ids") or []
        for edit in record.get("spans", ()):
            if (start := record["text"].find(edit["org"])) >= 0:
                spans.append((start, start + len(edit["org"]), edit["org"], edit["target"]))
        view.texts, view.lengths = [(record["text"], spans)], [len(ids)]
    for caption in record.get("captions", ()):
        swaps = [(s["start"], s["end"], s["wrong"], s["right"]) for s in caption.get("swaps", ())]
        view.texts.append((caption["text"], swaps))
        view.packed |= "ids" in caption
        if "ids" in caption:
            view.lengths.append(len(caption["ids"]))
        elif codec:
            view.lengths.append(len(codec.encode(caption["text"])[0]))
    return view


def _look(views: Iterable[View], settings: Mapping, chosen: set[int], findings: Counts) -> tuple[list[View], list[int]]:
    """The views with the chosen numbers, and the lengths of all captions in tokens; counts what looks wrong."""
    kept, lengths, num = list[View](), list[int](), 0
    keys_of_text = defaultdict[str, list[str]](list)
    views_of_image = defaultdict[bytes, list[View]](list)  # by a hash
    for num, view in enumerate(views, start=1):
        for name in _wrong(view, settings.get("response_length")):
            findings.skip(name, view.key)
        lengths += view.lengths
        for text in {text for text, _ in view.texts}:
            keys_of_text[text].append(view.key)
        if view.image:
            views_of_image[hashlib.blake2b(view.image, digest_size=16).digest()].append(replace(view, image=b""))
        kept += [view] * (num - 1 in chosen)
    for text, keys in sorted(keys_of_text.items(), key=lambda pair: -len(pair[1]))[:5]:
        if views_of_image and len(keys) > max(4, num / 200):  # 0.5 %
            name = f'one caption on {len(keys)} samples: "{shorten(text, 60, placeholder="...")}"'
            findings[name], findings.examples[name] = len(keys), keys[0]
    for same in views_of_image.values():
        names = {"image in several splits"} if len({view.split for view in same}) > 1 else set()
        if len(same) >= 10 or max(Counter(view.prompt for view in same).values()) > 1:
            names.add("image under several keys")
        for name in names:
            findings[name] += len(same)
            findings.examples.setdefault(name, " and ".join(view.key for view in same[:3]))
    return kept, lengths


def _wrong(view: View, limit: int | None) -> list[str]:
    """What looks wrong with a sample. limit: the response length, in tokens"""
    texts = [text for text, _ in view.texts]
    near_limit = [limit is not None and length >= 0.9 * limit for length in view.lengths] or [False] * len(texts)
    checks: dict[str, object] = {
        "refusal of a labelling model": any(map(REFUSAL.search, texts)),
        "special token in a prompt": CONTROL.search(view.prompt),
        "special token in a caption": any(map(CONTROL.search, texts)),
        "caption that is cut off": not view.packed and any(map(_is_cut, texts, near_limit)),
        "caption that repeats its words": any(map(_repeats, texts)),
        "broken character (U+FFFD)": any("\ufffd" in text for text in texts),
    }
    checks |= _image_checks(view.image) if view.image else {}
    return [name for name, is_wrong in checks.items() if is_wrong]


def _image_checks(data: bytes) -> dict[str, object]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            tiny = min(image.size) < TINY
            image.draft("L", (64, 64))  # JPEG only: decode a small version
            grey = np.asarray(image.convert("L")).astype(int)
    except (OSError, ValueError, SyntaxError):  # what Pillow raises on damaged bytes
        return {"image that cannot be decoded": True}
    return {f"image of less than {TINY} pixels": tiny, "image of one colour": np.ptp(grey) < FLAT}


def _is_cut(text: str, near_limit: bool) -> bool:
    """Whether a text ends in the middle of a sentence: a long one, of several sentences, or one near the limit."""
    if SENTENCE_END.search(text):
        return False
    return near_limit or (len(text.split()) >= LONG and re.search(r"\w[.!?]\s+\w", text) is not None)


def _repeats(text: str) -> bool:
    """Whether one run of four words makes up half of a text, or stands in it six times and more."""
    words = text.lower().split()
    if len(words) < 12:
        return False
    (_, number), *_ = Counter(zip(*(words[start:] for start in range(4)), strict=False)).most_common(1)
    return number > 5 or number * 4 > len(words) / 2 > 8


def _page(folder: Path, views: Sequence[View]) -> str:
    articles = []
    for view in views:
        image = f'<img src="data:image/jpeg;base64,{_thumbnail(view.image)}">' if view.image else ""
        texts = "".join(f"<p>{_marked(text, spans)}</p>" for text, spans in view.texts)
        title = escape(f"{view.split} {view.key}")
        articles.append(f"<article>{image}<small>{title}</small><p><b>{escape(view.prompt)}</b></p>{texts}</article>")
    head = f"<!doctype html><meta charset=utf-8><title>{escape(folder.name)}</title><style>{STYLE}</style>"
    has_spans = any(spans for view in views for _, spans in view.texts)
    legend = "<p>marked: <del>false</del> <ins>true</ins> words</p>" if has_spans else ""
    return f"{head}<h1>{escape(str(folder))}</h1>{legend}\n" + "\n".join(articles) + "\n"


def _thumbnail(data: bytes) -> str:
    stream = io.BytesIO()
    try:
        with Image.open(io.BytesIO(data)) as image:
            small = image.convert("RGB")
    except (OSError, ValueError, SyntaxError):
        return ""
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(stream, "JPEG", quality=80)
    return base64.b64encode(stream.getvalue()).decode()


def _marked(text: str, spans: Sequence[tuple[int, int, str, str]]) -> str:
    """HTML of a text, each span replaced by its false words and its true ones; of overlapping spans the first."""
    out, done = "", 0
    for start, end, false, true in sorted(spans):
        if start >= done:
            out += f"{escape(text[done:start])}<del>{escape(false)}</del> <ins>{escape(true)}</ins>"
            done = end
    return out + escape(text[done:])
