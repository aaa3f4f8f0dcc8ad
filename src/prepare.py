"""Make the shards of a dataset: procedural scenes, photographs with annotation files, or texts without images.

    python -m src.prepare conf=scenes prepare.out=data/scenes
    python -m src.prepare conf=photos prepare.images=DIR prepare.annotations=FILE prepare.out=data/photos
    python -m src.prepare conf=text prepare.files=book.txt             plain text, packed into rows of equal length
    python -m src.prepare conf=sft prepare.files=gsm8k_train.jsonl     prompts with responses
    python -m src.prepare conf=smiles prepare.files=qm9_smiles.csv     molecules with a class label

    OUT/index.json  OUT/tokenizer/  OUT/{train,val,test}/{index.json, train-000000.tar, ...}

Annotations are JSON (a list or a mapping), JSONL, CSV or TSV. A record is one of these; its keys tell which:
    {"image": "a.jpg", "caption": "A cat."}          or image_id, file_name, ...; captions: a list, text, output, ...
    {"a.jpg": "A cat.", "b.jpg": ["A dog."]}         file names with captions
    {"images": [...], "annotations": [...]}          COCO
    {"image": "a.jpg", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    {"images": ["a.jpg"], "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    conversations and "revise": [{"org": "a dog", "target": "a cat"}]              ReDiff: the answer is flawed
    "original_caption", "changed_caption", "solution_original", "solution_target"  ViCrit: "image" as above
"split" (train, val or test) and "prompt" in a record are kept. Images without a split are split by a hash of their
names; from three images up, each split gets one.

Texts are read from .txt, .jsonl, .json, .csv and .tsv files and split by a hash of each text, or given as
prepare.files={train: FILE, val: FILE, test: FILE}. What cannot be used is left out and counted, with an example.

Everything is written into OUT.partial, which takes its name at the end: a killed run leaves nothing that
looks finished, and a second run of the same command finds OUT complete and does nothing. Equal settings make
equal bytes.
"""

from __future__ import annotations

import io
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tqdm import tqdm

from src.cli.config import load_config
from src.cli.entrypoint import main_guard
from src.cli.instantiate import ConfigError, build
from src.dataset import SPLITS, Dataset, check_splits, write_split
from src.importers.counts import Counts, table
from src.importers.photos import Album, Photo, fill_splits
from src.importers.records import Caption, read_entries
from src.io.images import ENCODINGS, ImageProblem, convert, load
from src.scenes.grammar import LEXICON, Swap, swaps, write_brief, write_caption
from src.scenes.graph import Scene, draw_scene
from src.scenes.render import render
from src.swaps import SwapLocator
from src.tokenizer import Codec

CHAT_WORDS = "system user assistant"  # roles that the chat template writes
EVALUATION_SEED = 0  # of val and test scenes: they stay the same, whatever the seed of a dataset
SMALLEST = 16  # pixels on the side of a scene
RESERVED = 512  # scenes of val, and of test, that no training set holds, however few of them a dataset has
MAX_DRAWS = 1000  # attempts at a new scene or a fitting caption before the settings count as impossible


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

    image_size: int
    vocab_size: int
    prompt: str
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
        if self.image_size < SMALLEST:
            raise ValueError(f"image_size must be at least {SMALLEST}, to tell shapes apart, got {self.image_size}")
        if len(self.objects) != 2:
            raise ValueError(f"objects must be [least, greatest], got {list(self.objects)}")

    def write(self, folder: Path) -> dict:
        scenes = self._draw_scenes()
        codec = make_codec(
            folder, self.tokenizer, self._texts(scenes["train"]), vocab_size=self.vocab_size, alphabet="seen"
        )
        counts = {}
        with tqdm(total=sum(map(len, scenes.values())), desc="scenes", unit="image", disable=None) as bar:
            for split in SPLITS:
                found: Counter[str] = Counter()
                samples = self._samples(split, scenes[split], codec, found, bar)
                counts[split] = write_split(folder, split, samples, codec, self.per_shard, found)
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
    canvas:      captions of more than canvas - 1 tokens are left out; the `data.canvas` of training should be as large
    prompt:      the question, for records that have none
    max_images:  use only the first so many photos; null means all
    """

    image_size: int
    vocab_size: int
    prompt: str
    images: str
    annotations: str | Sequence[str]
    encoding: str = "jpg"
    square: bool = True
    max_images: int | None = None

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise ValueError(f"encoding must be one of {', '.join(ENCODINGS)}, got {self.encoding!r}")
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {self.image_size}")

    @property
    def sources(self) -> Sequence[str]:
        return [self.images, *self._files]

    @property
    def _files(self) -> Sequence[str]:
        return [self.annotations] if isinstance(self.annotations, str) else self.annotations

    def write(self, folder: Path) -> dict:
        skipped = Counts()
        photos = self._collect(skipped)
        codec = make_codec(folder, self.tokenizer, self._texts(photos), vocab_size=self.vocab_size, alphabet="bytes")
        fill_splits(photos, lambda photo: self._is_usable(photo, codec))
        read = {reason: number for reason, number in skipped.items() if number}
        counts, examples = {"records": read}, {"records": skipped.examples}
        with tqdm(total=len(photos), desc="photos", unit="image", disable=None) as bar:
            for split in SPLITS:
                mine = [photo for photo in photos if photo.split == split]
                found = Counts()
                samples = self._samples(mine, codec, found, bar)
                counts[split] = write_split(folder, split, samples, codec, self.per_shard, found)
                examples[split] = found.examples
        remedy = ("take `split` out of the records", "a `split` to the records")
        check_splits(counts, examples, noun="image", remedy=remedy)
        return {"tokenizer": codec.fingerprint, "counts": counts, "examples": examples}

    def _collect(self, skipped: Counts) -> list[Photo]:
        album = Album(Path(self.images), prompt=self.prompt, seed=self.seed, counts=skipped)
        for file in self._files:
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

    def _is_usable(self, photo: Photo, codec: Codec) -> bool:
        """Whether the photo would become a sample."""
        if all(self._is_long(text, codec) for text in photo.captions):
            return False
        try:
            load(photo.path, size=self.image_size)
        except ImageProblem:
            return False
        return True

    def _is_long(self, text: str, codec: Codec) -> bool:
        return len(codec.encode(text)[0]) >= self.canvas

    def _samples(self, photos: list[Photo], codec: Codec, counts: Counts, bar: tqdm) -> Iterator[dict]:
        locate = SwapLocator(codec)
        for photo in photos:
            bar.update()
            file = photo.path.relative_to(self.images).as_posix()
            captions = [c for c in (self._caption(c, file, locate, counts) for c in photo.captions.values()) if c]
            if not captions:
                counts.note("no_usable_caption", file)
                continue
            try:
                data = convert(photo.path, size=self.image_size, encoding=self.encoding, square=self.square)
            except ImageProblem as reason:
                counts.note(str(reason), file)
                continue
            record = {"key": photo.key, "prompt": photo.prompt, "captions": captions}
            yield {"__key__": photo.key, "json": record, self.encoding: data}

    def _caption(self, caption: Caption, file: str, locate: SwapLocator, counts: Counts) -> dict | None:
        if self._is_long(caption.text, locate.codec):
            counts.note("captions too long", file)
            return None
        found = [Swap(s.start, s.start + len(s.right), s.right, s.wrong, "phrase") for s in caption.swaps]
        return {"text": caption.text, "swaps": locate(caption.text, found, counts)}


def make_codec(folder: Path, tokenizer: str | None, texts: Iterable[str], *, vocab_size: int, alphabet: str) -> Codec:
    """The given tokenizer or a new one, saved with the data."""
    codec = Codec.load(tokenizer) if tokenizer else Codec.train(texts, vocab_size=vocab_size, alphabet=alphabet)
    if not tokenizer and codec.vocab_size > vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: letters and special tokens alone take {codec.vocab_size}"
        )
    codec.save(folder / "tokenizer")
    return codec


def facts(scene: Scene) -> tuple:
    """A scene without jitter: two scenes with equal facts have the same true captions."""
    return scene.background, *((o.shape, o.colour, o.size, o.row, o.column) for o in scene.objects)


@main_guard
def main(argv: list[str]) -> None:
    config = load_config(argv, verb="src.prepare", needs=["prepare"])
    dataset = build(config.prepare)
    try:
        index = dataset.run()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    sys.stdout.write(table(index["counts"], index.get("examples", {})) + "\n")


if __name__ == "__main__":
    main()
