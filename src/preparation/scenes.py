"""Procedural scenes with true captions and hallucinated spans, the built-in training data (`conf=scenes`)."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from random import Random

from src.io.errors import UserError
from src.preparation.builder import Dataset
from src.preparation.counts import Counts
from src.preparation.splits import Item
from src.preparation.swaps import locate_swaps
from src.scenes.grammar import LEXICON, swaps, write_brief, write_caption
from src.scenes.graph import LOOKS, Look, Scene, draw_scene
from src.scenes.render import render
from src.text.tokenizer import Codec

EVALUATION_SEED = 0  # val and test scenes are the same for every `seed` of a dataset
SMALLEST = 16  # pixels, side of an image whose shapes can be told apart
RESERVED = 512  # scenes of val and of test each that no training set holds, even if a dataset has fewer
MAX_DRAWS = 1000  # attempts at a new scene or a caption that fits, before an error is raised


@dataclass(kw_only=True)
class SceneItem(Item):
    """A scene; everything random about its sample depends on `name`, seed/split/number."""

    scene: Scene


@dataclass(kw_only=True)
class Scenes(Dataset):
    """Apart from jitter, no scene is in two splits. Val and test do not depend on `seed`, and no training set holds one
    of their first 512 scenes, so no model has trained on the test scenes of another dataset of such objects.

    objects:   [least, greatest] number of objects in a scene
    distinct:  no two objects of a scene share colour and shape, so that these name an object
    held_out:  [[colour, shape], ...] that no object has; unseen: that all objects have, to test what no model was shown
    relations: probabilities of a first relation sentence in a caption, of a second, ...
    noise:     sensor noise, standard deviation in grey levels
    brief:     short lists of the facts instead of detailed captions
    """

    alphabet = "seen"
    order = "read"

    image_size: int
    prompt: str
    num_train: int
    num_val: int
    num_test: int
    captions_per_image: int
    objects: tuple[int, int]
    noise: float
    distinct: bool = False
    held_out: list[list[str]] = field(default_factory=list)
    unseen: bool = False
    relations: list[float] = field(default_factory=lambda: [0.6])
    brief: bool = False

    def __post_init__(self) -> None:
        least = {"num_train": 1, "num_val": 1, "num_test": 1, "captions_per_image": 1, "image_size": SMALLEST}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise UserError(f"{name} must be at least {minimum}, got {getattr(self, name)}")
        if unknown := [pair for pair in self.held_out if tuple(pair) not in LOOKS]:
            raise UserError(f"held_out must list pairs of a colour and a shape, such as [red, ring], got {unknown[0]}")

    @property
    def looks(self) -> frozenset[Look]:
        """The colours and shapes that objects have."""
        held_out = frozenset((colour, shape) for colour, shape in self.held_out)
        return held_out if self.unseen else LOOKS - held_out

    def write(self, scene: Scene, rng: Random) -> str:
        """A true caption."""
        return (write_brief if self.brief else write_caption)(scene, rng, relation_rates=self.relations)

    @property
    def mixture(self) -> list[dict]:
        return [{"name": "", "weight": 1.0, "licence": "none needed", "origin": "drawn by this program"}]

    @property
    def training(self) -> str:
        return "conf=mask" if self.tokenizer else "conf=mask,model/tiny"  # that of the embedded base model, or its own

    def read(self, counts: Counts) -> Iterator[SceneItem]:
        """Scenes of every split. Val and test hold distinct scenes, and train holds none of these."""
        reserved: set[tuple] = set()
        for split, size in (("test", self.num_test), ("val", self.num_val), ("train", self.num_train)):
            seed = self.seed if split == "train" else EVALUATION_SEED
            rng = Random(f"{seed}/{split}/scenes")
            for number in range(size if split == "train" else max(size, RESERVED)):
                for _ in range(MAX_DRAWS):
                    scene = draw_scene(rng, objects=self.objects, looks=self.looks, distinct=self.distinct)
                    # without jitter: scenes with equal facts have the same true captions
                    facts = scene.background, *((o.shape, o.colour, o.size, o.row, o.column) for o in scene.objects)
                    if facts not in reserved:
                        break
                else:
                    raise UserError(
                        f"objects={list(self.objects)} gives too few different scenes; "
                        "set a wider range, or smaller num_val and num_test"
                    )
                if split != "train":
                    reserved.add(facts)
                if number < size:
                    key, name = f"{split}-{number:06d}", f"{seed}/{split}/{number}"
                    yield SceneItem(key=key, name=name, source=key, split=split, scene=scene)

    def texts(self, items: Iterable[SceneItem]) -> Iterator[str]:
        rng = Random(f"{self.seed}/tokenizer")
        words = " ".join(word for words in LEXICON.values() for word in words)
        yield f"{self.prompt} system user assistant {words}"
        for scene in islice((item.scene for item in items if item.split == "train"), 2000):
            text = write_caption(scene, rng, relation_rates=self.relations)
            yield text
            yield from (text[: s.start] + s.wrong + text[s.end :] for s in swaps(scene, text, rng, looks=self.looks))

    def samples(self, items: Iterable[SceneItem], codec: Codec, counts: Counts) -> Iterator[dict]:
        for item in items:
            rng, captions = Random(item.name), []
            for _ in range(self.captions_per_image):
                for _ in range(MAX_DRAWS):
                    text = self.write(item.scene, rng)
                    if len(codec.encode(text)[0]) < self.response_length:
                        break
                    counts["captions redrawn"] += 1
                else:
                    raise UserError(
                        f"no caption of a scene fits {self.response_length} tokens; set a larger response_length or "
                        "fewer objects"
                    )
                located = locate_swaps(codec, text, swaps(item.scene, text, rng, looks=self.looks), counts)
                captions.append({"text": text, "swaps": located})
            record = {"key": item.key, "prompt": self.prompt, "captions": captions, "scene": item.scene.to_dict()}
            stream = io.BytesIO()
            render(item.scene, rng, size=self.image_size, noise=self.noise).save(stream, "PNG")
            yield {"__key__": item.key, "json": record, "png": stream.getvalue()}
