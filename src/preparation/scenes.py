"""Procedural scenes with true captions and hallucinated spans, the built-in training data (`conf=scenes`)."""

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

CHAT_WORDS = "system user assistant"  # role names in the chat template
EVALUATION_SEED = 0  # val and test scenes are the same for every `seed` of a dataset
SMALLEST = 16  # pixels, side of an image
RESERVED = 512  # scenes of val and of test each that no training set holds, even if a dataset has fewer
MAX_DRAWS = 1000  # attempts at a new scene or a caption that fits, before an error is raised


@dataclass(kw_only=True)
class Scenes(Dataset):
    """Procedural scenes with true captions and hallucinated spans. Apart from jitter, no scene is in two splits.

    Val and test do not depend on `seed`, and no training set holds one of their first 512 scenes, whatever its seed. So
    datasets can be compared, and no model has trained on the test scenes of another dataset.

    objects:         [least, greatest] number of objects in a scene
    noise:           sensor noise, standard deviation in grey levels
    tokenizer:       folder of a tokenizer; null trains one of `vocab_size` on the captions
    response_length: captions have at most response_length - 1 tokens, so that end-of-turn fits
    brief:           short lists of the objects instead of detailed captions
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
                split_counts: Counter[str] = Counter()
                samples = self._samples(split, scenes[split], codec, split_counts, bar)
                counts[split] = write_split(folder, split, samples, codec, self.per_shard, split_counts)
        return {"tokenizer": codec.fingerprint, "counts": counts}

    def _draw_scenes(self) -> dict[str, list[Scene]]:
        """Scenes of every split. Val and test hold distinct scenes, and train holds none of these."""
        held_out: set[tuple] = set()
        scenes: dict[str, list[Scene]] = {}
        for split, size in (("test", self.num_test), ("val", self.num_val), ("train", self.num_train)):
            rng = Random(f"{self._seed(split)}/{split}/scenes")
            num_drawn = size if split == "train" else max(size, RESERVED)
            scenes[split] = [self._new_scene(rng, held_out, split) for _ in range(num_drawn)][:size]
        return scenes

    def _seed(self, split: str) -> int:
        return self.seed if split == "train" else EVALUATION_SEED

    def _new_scene(self, rng: Random, held_out: set[tuple], split: str) -> Scene:
        for _ in range(MAX_DRAWS):
            scene = draw_scene(rng, objects=(self.objects[0], self.objects[1]))
            content = facts(scene)
            if content not in held_out:
                if split != "train":
                    held_out.add(content)
                return scene
        raise UserError(
            f"objects={list(self.objects)} gives too few different scenes; "
            "set a wider range, or smaller num_val and num_test"
        )

    def _texts(self, scenes: list[Scene]) -> Iterator[str]:
        """Texts that a new tokenizer is trained on."""
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
        for index, scene in enumerate(scenes):
            rng = Random(f"{self._seed(split)}/{split}/{index}")
            key = f"{split}-{index:06d}"
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
            f"no caption of a scene fits {self.response_length} tokens; set a larger response_length or fewer objects"
        )


def make_codec(folder: Path, tokenizer: str | None, texts: Iterable[str], *, vocab_size: int, alphabet: str) -> Codec:
    """Load a tokenizer, or train one on the texts; save it in the dataset."""
    codec = Codec.load(tokenizer) if tokenizer else Codec.train(texts, vocab_size=vocab_size, alphabet=alphabet)
    if not tokenizer and codec.vocab_size > vocab_size:
        raise UserError(
            f"vocab_size={vocab_size} is too small: the alphabet and the special tokens alone take {codec.vocab_size}"
        )
    codec.save(folder / "tokenizer")
    return codec


def facts(scene: Scene) -> tuple:
    """A scene without jitter. Scenes with equal facts have the same true captions."""
    return scene.background, *((o.shape, o.colour, o.size, o.row, o.column) for o in scene.objects)
