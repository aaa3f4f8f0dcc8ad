"""CHAIR: objects that captions mention and the image does not have (arXiv 1809.02156). No model, no network.

    Chair(annotations=["instances_val2014.json"], synonyms="synonyms.txt")

annotations: COCO's files of instances, {"images": [{"id", "file_name"}], "annotations": [{"image_id", "category_id"}],
"categories": [{"id", "name"}]}. synonyms: a line for each category, its name first: `person, girl, boy, ...`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from src.io.errors import UserError
from src.metrics.caption import CaptionMetric, Stat, image_name, plain
from src.metrics.text import words_of


class Chair(CaptionMetric):
    """`chair_s`, the share of captions with a false object, and `chair_i`, that of false ones in mentions of objects.

    Lower is better; captions that mention little do well, so `chair_recall`, the share of an image's objects that its
    caption mentions, stands beside. An image has the objects of its annotations and of its reference captions, if any.
    Mentions are the longest synonyms in the text, or regular plurals of them; irregular plurals, and phrases such as
    "bow tie" that are not what their words say, belong in the list.
    """

    higher_is_better = False
    names = ("chair_s", "chair_recall", "chair_false", "chair_mentions")

    def __init__(self, *, annotations: Sequence[str], synonyms: str) -> None:
        super().__init__()
        self.synonyms = read_synonyms(Path(synonyms))
        self.longest = max(map(len, self.synonyms))  # words
        self.objects = read_objects(annotations, self.synonyms)

    def mentions(self, text: str) -> Iterator[str]:
        """The category of each mention, in order."""
        words, place = words_of(text), 0
        while place < len(words):
            ends = range(min(place + self.longest, len(words)), place, -1)
            end = next((end for end in ends if tuple(words[place:end]) in self.synonyms), None)
            if end is not None:
                yield self.synonyms[tuple(words[place:end])]
            place = end or place + 1

    def score(self, text: str, record: dict) -> dict[str, float]:
        objects = set(self.objects_of(record))
        for caption in record.get("captions", ()):
            objects.update(self.mentions(caption["text"]))
        mentions = list(self.mentions(text))
        false = sum(name not in objects for name in mentions)
        recall = len(objects & set(mentions)) / len(objects) if objects else 1.0
        return {
            "chair_s": float(false > 0),
            "chair_recall": recall,
            "chair_false": float(false),
            "chair_mentions": float(len(mentions)),
        }

    def compute(self) -> dict[str, Stat]:
        stats = super().compute()
        false, mentions = (sum(self.columns()[name]) for name in ("chair_false", "chair_mentions"))
        return {**stats, "chair_i": plain(false / mentions if mentions else 0.0, stats["chair_s"]["n"])}

    def objects_of(self, record: dict) -> set[str]:
        """By the name of the record's image, or its number as in COCO, with or without zeros before it."""
        for name in (image := image_name(record), image.rpartition("_")[2].lstrip("0")):
            if name in self.objects:
                return self.objects[name]
        raise UserError(f"the annotations of CHAIR have no image {image!r}; name the file that has it in annotations")


def read_synonyms(path: Path) -> dict[tuple[str, ...], str]:
    """Category by words, of each synonym and its regular plural."""
    categories: dict[tuple[str, ...], str] = {}
    for line in path.read_text("utf-8").splitlines():
        names = [name.strip().lower() for name in line.split(",") if name.strip()]
        for name in names:
            for form in (name, plural(name)):
                categories.setdefault(tuple(words_of(form)), names[0])
    if not categories:
        raise UserError(f"{path} has no synonyms; write a line such as `person, girl, boy` for each category")
    return categories


def plural(name: str) -> str:
    if name.endswith("y") and name[-2:-1] not in "aeiou":
        return name[:-1] + "ies"
    return name + ("es" if name.endswith(("s", "x", "z", "ch", "sh")) else "s")


def read_objects(files: Sequence[str], synonyms: dict[tuple[str, ...], str]) -> dict[str, set[str]]:
    """Categories by the image's id and by its file name without the ending."""
    by_image: dict[str, set[str]] = defaultdict(set)
    for file in files:
        content = json.loads(Path(file).read_text("utf-8"))
        names = {row["id"]: row["name"].lower() for row in content["categories"]}
        if unknown := [name for name in names.values() if tuple(words_of(name)) not in synonyms]:
            raise UserError(f"the synonyms have no line for {unknown[0]!r}, a category of {file}")
        for row in content["images"]:
            by_image[Path(row["file_name"]).stem] = by_image[str(row["id"])]
        for row in content["annotations"]:
            by_image[str(row["image_id"])].add(synonyms[tuple(words_of(names[row["category_id"]]))])
    return dict(by_image)
