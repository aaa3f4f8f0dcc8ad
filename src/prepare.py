"""Make the shards of a dataset: of procedural scenes, or of a folder of photographs with an annotation file.

    python -m src.prepare conf=scenes prepare.out=data/scenes
    python -m src.prepare conf=photos prepare.images=DIR prepare.annotations=FILE prepare.out=data/photos

    OUT/index.json  OUT/tokenizer/  OUT/{train,val,test}/{index.json, train-000000.tar, ...}

Everything is written into OUT.partial, which takes its name at the end: a killed run leaves nothing that
looks finished, and a second run of the same command finds OUT complete and does nothing. Equal settings make
equal bytes.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

from tqdm import tqdm

from src.align import locate_swap
from src.components import ConfigError, build
from src.config import load_config, main_guard
from src.importers.images import ENCODINGS, ImageProblem, convert
from src.importers.photos import Album, Photo
from src.importers.records import Caption, read_entries
from src.scenes.grammar import LEXICON, Swap, split_sentences, swaps, write_brief, write_caption
from src.scenes.graph import Scene, draw_scene
from src.scenes.render import render
from src.shards import FORMAT, INDEX, publish, write_json, write_shards
from src.tokenizer import Codec

log = logging.getLogger(__name__)

CHAT_WORDS = "system user assistant"  # roles that the chat template writes
EVALUATION_SEED = 0  # of val and test scenes: they stay the same, whatever the seed of a dataset
RESERVED = 512  # scenes of val, and of test, that no training set holds, however few of them a dataset has
MAX_DRAWS = 1000  # attempts at a new scene or a fitting caption before the settings count as impossible
CACHE_SIZE = 200_000  # texts, of some hundred bytes each


@dataclass(kw_only=True)
class Dataset(ABC):
    """A folder with splits, written whole or not at all. A subclass makes the samples.

    overwrite: replace `out`; otherwise it is kept if it was made with the same settings, and refused if not
    """

    out: str
    image_size: int
    vocab_size: int
    canvas: int
    prompt: str
    tokenizer: str | None = None
    seed: int = 0
    per_shard: int = 512
    overwrite: bool = False

    @property
    def settings(self) -> dict:
        """What the content depends on."""
        return {name: value for name, value in asdict(self).items() if name not in ("out", "overwrite")}

    def run(self) -> dict:
        """Write the dataset, unless it is there, and return its index.json."""
        out = Path(self.out)
        if out.exists() and not self.overwrite:
            return self._existing(out)
        partial = out.with_name(f"{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            index = {"format": FORMAT, "kind": "dataset", "settings": self.settings, **self.write(partial)}
            write_json(partial / INDEX, index)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if out.exists():
            shutil.rmtree(out)
        publish(partial, out)
        return index

    @abstractmethod
    def write(self, folder: Path) -> dict:
        """Write splits and tokenizer into a folder; the result goes into index.json."""

    def _existing(self, out: Path) -> dict:
        if not (out / INDEX).is_file():
            raise ValueError(f"{out} exists but is no finished dataset; remove it, or choose another `out`")
        index = json.loads((out / INDEX).read_text(encoding="utf-8"))
        old, new = index.get("settings", {}), self.settings
        changed = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
        if changed:
            raise ValueError(
                f"{out} was made with other settings ({', '.join(changed)}); "
                "set overwrite=true to make it again, or choose another `out`"
            )
        log.info("%s is finished already: nothing to do", out)
        return index


@dataclass(kw_only=True)
class Scenes(Dataset):
    """Procedural scenes with true captions and hallucinated facts. No scene is in two splits, jitter aside.

    Val and test do not depend on `seed`, and no training set of any seed holds one of their first 512 scenes; so
    datasets can be compared, and no model was trained on the test scenes of another dataset.

    objects:   least and greatest number of objects; noise: grey levels of sensor noise
    tokenizer: folder of a tokenizer to use; null trains one of `vocab_size` on the captions
    canvas:    captions have at most canvas - 1 tokens, so that eot fits
    brief:     short lists of the objects instead of detailed captions
    """

    num_train: int
    num_val: int
    num_test: int
    captions_per_image: int
    objects: Sequence[int]
    noise: float
    brief: bool = False

    def __post_init__(self) -> None:
        for name in ("num_train", "num_val", "num_test", "captions_per_image", "per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if len(self.objects) != 2:
            raise ValueError(f"objects must be [least, greatest], got {list(self.objects)}")

    def write(self, folder: Path) -> dict:
        scenes = self._draw_scenes()
        codec = _codec(
            folder, self.tokenizer, self._texts(scenes["train"]), vocab_size=self.vocab_size, alphabet="seen"
        )
        counts = {}
        with tqdm(total=sum(map(len, scenes.values())), desc="scenes", unit="image", disable=None) as bar:
            for split in ("train", "val", "test"):
                found: Counter[str] = Counter()
                samples = self._samples(split, scenes[split], codec, found, bar)
                counts[split] = _write_split(folder, split, samples, codec, self.per_shard, found)
        return {"tokenizer": codec.fingerprint, "counts": counts}

    def _draw_scenes(self) -> dict[str, list[Scene]]:
        """Scenes of every split. Test and validation hold each scene once and training none of them."""
        taken: set[tuple] = set()
        drawn: dict[str, list[Scene]] = {}
        for split, size in (("test", self.num_test), ("val", self.num_val), ("train", self.num_train)):
            rng = Random(f"{self._seed(split)}/{split}/scenes")
            reserved = size if split == "train" else max(size, RESERVED)
            drawn[split] = [self._new_scene(rng, taken, split) for _ in range(reserved)][:size]
        return drawn

    def _seed(self, split: str) -> int:
        return self.seed if split == "train" else EVALUATION_SEED

    def _new_scene(self, rng: Random, taken: set[tuple], split: str) -> Scene:
        for _ in range(MAX_DRAWS):
            scene = draw_scene(rng, objects=(self.objects[0], self.objects[1]))
            content = facts(scene)
            if content not in taken:
                if split != "train":
                    taken.add(content)
                return scene
        raise ValueError(f"too few scenes differ with objects={list(self.objects)}; ask for fewer val and test")

    def _texts(self, scenes: list[Scene]) -> Iterator[str]:
        """What a tokenizer for scenes has to know."""
        rng = Random(f"{self.seed}/tokenizer")
        yield f"{self.prompt} {CHAT_WORDS} {' '.join(word for words in LEXICON.values() for word in words)}"
        for scene in scenes[:2000]:
            text = write_caption(scene, rng)
            yield text
            yield from (text[: s.start] + s.wrong + text[s.end :] for s in swaps(scene, text, rng))

    def _samples(
        self, split: str, scenes: list[Scene], codec: Codec, counts: Counter[str], bar: tqdm
    ) -> Iterator[dict]:
        locate = SwapLocator(codec)
        for number, scene in enumerate(scenes):
            rng = Random(f"{self._seed(split)}/{split}/{number}")
            key = f"{split}-{number:06d}"
            captions = [self._caption(scene, rng, locate, counts) for _ in range(self.captions_per_image)]
            record = {"key": key, "prompt": self.prompt, "captions": captions, "scene": scene.to_dict()}
            stream = io.BytesIO()
            render(scene, rng, size=self.image_size, noise=self.noise).save(stream, "PNG")
            yield {"__key__": key, "json": record, "png": stream.getvalue()}
            bar.update()

    def _caption(self, scene: Scene, rng: Random, locate: SwapLocator, counts: Counter[str]) -> dict:
        for _ in range(MAX_DRAWS):
            text = write_brief(scene) if self.brief else write_caption(scene, rng)
            if len(locate.codec.encode(text)[0]) < self.canvas:
                return {"text": text, "swaps": locate(text, swaps(scene, text, rng), counts)}
            counts["captions redrawn"] += 1
        raise ValueError(f"no caption of a scene fits {self.canvas} tokens; set a larger canvas or fewer objects")


@dataclass(kw_only=True)
class Photos(Dataset):
    """Photographs with captions, from annotation files in any format that `src.importers.records` reads.

    images:      folder that the image names in the annotations are relative to
    annotations: one file or several: JSON, JSONL, CSV or TSV
    image_size:  side of the stored square image: the whole picture, on grey; encoding: jpg or png
    square:      false stores images in their own shape, the longer side at most `image_size`, to be cut into tiles
    tokenizer:   folder of a tokenizer to use; null trains one on the captions, which can write any text
    canvas:      captions of more than canvas - 1 tokens are left out
    prompt:      the question, for records that have none
    max_images:  use only the first so many photos; null means all
    """

    images: str
    annotations: str | Sequence[str]
    encoding: str = "jpg"
    square: bool = True
    max_images: int | None = None

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise ValueError(f"encoding must be one of {', '.join(ENCODINGS)}, got {self.encoding!r}")

    def write(self, folder: Path) -> dict:
        skipped: Counter[str] = Counter()
        photos = self._collect(skipped)
        codec = _codec(folder, self.tokenizer, self._texts(photos), vocab_size=self.vocab_size, alphabet="bytes")
        counts = {}
        with tqdm(total=len(photos), desc="photos", unit="image", disable=None) as bar:
            for split in ("train", "val", "test"):
                mine = [photo for photo in photos if photo.split == split]
                found: Counter[str] = Counter()
                samples = self._samples(mine, codec, found, bar)
                counts[split] = _write_split(folder, split, samples, codec, self.per_shard, found)
        counts["records"] = {reason: number for reason, number in skipped.items() if number}
        if not any(counts[split]["written"] for split in ("train", "val", "test")):
            raise ValueError(f"nothing could be used; why, by reason:\n{report(counts)}")
        return {"tokenizer": codec.fingerprint, "counts": counts}

    def _collect(self, skipped: Counter[str]) -> list[Photo]:
        files = [self.annotations] if isinstance(self.annotations, str) else self.annotations
        album = Album(Path(self.images), prompt=self.prompt, seed=self.seed, counts=skipped)
        for file in files:
            for entry in read_entries(Path(file), skipped):
                album.add(entry)
        return album.photos()[: self.max_images]

    def _texts(self, photos: list[Photo]) -> Iterator[str]:
        yield f"{self.prompt} {CHAT_WORDS}"
        for photo in photos:
            yield photo.prompt
            for caption in photo.captions.values():
                yield caption.text
                yield from (swap.wrong for swap in caption.swaps)

    def _samples(self, photos: list[Photo], codec: Codec, counts: Counter[str], bar: tqdm) -> Iterator[dict]:
        locate = SwapLocator(codec)
        for photo in photos:
            bar.update()
            captions = [c for c in (self._caption(c, locate, counts) for c in photo.captions.values()) if c]
            if not captions:
                counts["no_usable_caption"] += 1
                continue
            try:
                data = convert(photo.path, size=self.image_size, encoding=self.encoding, square=self.square)
            except ImageProblem as reason:
                counts[str(reason)] += 1
                continue
            record = {"key": photo.key, "prompt": photo.prompt, "captions": captions}
            yield {"__key__": photo.key, "json": record, self.encoding: data}

    def _caption(self, caption: Caption, locate: SwapLocator, counts: Counter[str]) -> dict | None:
        if len(locate.codec.encode(caption.text)[0]) >= self.canvas:
            counts["captions too long"] += 1
            return None
        found = [Swap(s.start, s.start + len(s.right), s.right, s.wrong, "phrase") for s in caption.swaps]
        return {"text": caption.text, "swaps": locate(caption.text, found, counts)}


class CachedCodec(Codec):
    """The same codec, which remembers what it encoded."""

    def __init__(self, codec: Codec) -> None:
        super().__init__(codec.tokenizer)
        self.encode = lru_cache(CACHE_SIZE)(super().encode)


class SwapLocator:
    """Swaps of a caption as shards hold them, with the tokens that change; unequal lengths are dropped.

    Most sentences of scenes come up again and again, so each is worked out once. That a sentence has the same
    tokens by itself as in its caption is checked by encoding the caption with all swaps made; where it fails,
    nothing is reused.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = CachedCodec(codec)
        self._locate = lru_cache(CACHE_SIZE)(lambda *place: locate_swap(self.codec, *place))

    def __call__(self, text: str, found: Sequence[Swap], counts: Counter[str]) -> list[dict]:
        places = self._by_sentence(text, found) if found else []
        if places is None:
            places = [locate_swap(self.codec, text, s.start, s.end, s.wrong) for s in found]
        counts["swaps of unequal length"] += places.count(None)
        kept = [(swap, place) for swap, place in zip(found, places, strict=True) if place]
        counts["swaps"] += len(kept)
        return [
            {
                "start": s.start,
                "end": s.end,
                "right": s.right,
                "wrong": s.wrong,
                "fact": s.fact,
                "tokens": list(place),
            }
            for s, place in kept
        ]

    def _by_sentence(self, text: str, found: Sequence[Swap]) -> list[tuple[int, int, list[int]] | None] | None:
        ids, offsets = self.codec.encode(text)
        sentences = [(start - (start > 0), end) for start, end in split_sentences(text)]  # with the blank before
        flawed, falsified, places = list(ids), text, []
        for swap in reversed(found):  # from the back, so that the places before stay valid
            a, b = next((s for s in sentences if s[0] <= swap.start and swap.end <= s[1]), (0, len(text)))
            place = self._locate(text[a:b], swap.start - a, swap.end - a, swap.wrong)
            if place:
                shift = sum(end <= a for _, end in offsets)
                place = (place[0] + shift, place[1] + shift, place[2])
                flawed[place[0] : place[1]] = place[2]
                falsified = falsified[: swap.start] + swap.wrong + falsified[swap.end :]
            places.append(place)
        return places[::-1] if self.codec.encode(falsified)[0] == flawed else None


def facts(scene: Scene) -> tuple:
    """A scene without jitter: two scenes with equal facts have the same true captions."""
    return scene.background, *((o.shape, o.colour, o.size, o.row, o.column) for o in scene.objects)


def report(counts: dict[str, dict[str, int]]) -> str:
    """Counts per split and reason as a table."""
    rows = [(part, reason, number) for part, some in counts.items() for reason, number in some.items()]
    width = max((len(reason) for _, reason, _ in rows), default=0)
    return "\n".join(f"{part:8} {reason:{width}} {number:>8}" for part, reason, number in rows)


def _codec(folder: Path, tokenizer: str | None, texts: Iterable[str], *, vocab_size: int, alphabet: str) -> Codec:
    """The given tokenizer or a new one, saved with the data."""
    codec = Codec.load(tokenizer) if tokenizer else Codec.train(texts, vocab_size=vocab_size, alphabet=alphabet)
    codec.save(folder / "tokenizer")
    return codec


def _write_split(
    folder: Path, split: str, samples: Iterable[dict], codec: Codec, per_shard: int, counts: Counter[str]
) -> dict:
    index = write_shards(
        folder / split,
        samples,
        prefix=split,
        per_shard=per_shard,
        kind="captions",
        tokenizer=codec.fingerprint,
        counts=counts,
    )
    return index["counts"]


@main_guard
def main(argv: list[str]) -> None:
    config = load_config(argv)
    dataset = build(config.prepare)
    try:
        index = dataset.run()
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    sys.stdout.write(report(index["counts"]) + "\n")


if __name__ == "__main__":
    main()
