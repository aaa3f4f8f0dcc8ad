"""The embedded data: procedural scenes with true captions and hallucinated facts (`conf=scenes`)."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tqdm import tqdm

from src.io.errors import UserError
from src.preparation.builder import SPLITS, Dataset, write_split
from src.preparation.swaps import SwapLocator
from src.scenes.grammar import LEXICON, swaps, write_brief, write_caption
from src.scenes.graph import Scene, draw_scene
from src.scenes.render import render
from src.text.tokenizer import Codec

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
    response_length:    captions have at most response_length - 1 tokens, so that eot fits
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
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.image_size < SMALLEST:
            raise UserError(f"image_size must be at least {SMALLEST}, to tell shapes apart, got {self.image_size}")
        if len(self.objects) != 2:
            raise UserError(f"objects must be [least, greatest], got {list(self.objects)}")

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
        raise UserError(f"too few scenes differ with objects={list(self.objects)}; ask for fewer val and test")

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
            if len(locate.codec.encode(text)[0]) < self.response_length:
                return {"text": text, "swaps": locate(text, swaps(scene, text, rng), counts)}
            counts["captions redrawn"] += 1
        raise UserError(
            f"no caption of a scene fits {self.response_length} tokens; set a larger response length or fewer objects"
        )


def make_codec(folder: Path, tokenizer: str | None, texts: Iterable[str], *, vocab_size: int, alphabet: str) -> Codec:
    """The given tokenizer or a new one, saved with the data."""
    codec = Codec.load(tokenizer) if tokenizer else Codec.train(texts, vocab_size=vocab_size, alphabet=alphabet)
    if not tokenizer and codec.vocab_size > vocab_size:
        raise UserError(
            f"vocab_size={vocab_size} is too small: letters and special tokens alone take {codec.vocab_size}"
        )
    codec.save(folder / "tokenizer")
    return codec


def facts(scene: Scene) -> tuple:
    """A scene without jitter: two scenes with equal facts have the same true captions."""
    return scene.background, *((o.shape, o.colour, o.size, o.row, o.column) for o in scene.objects)
