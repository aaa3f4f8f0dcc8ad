"""CHAIR and POPE by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from src.io.errors import UserError
from src.metrics.chair import Chair
from src.metrics.pope import Pope

INSTANCES = {
    "images": [{"id": 42, "file_name": "COCO_val2014_000000000042.jpg"}, {"id": 7, "file_name": "000000000007.jpg"}],
    "annotations": [{"image_id": 42, "category_id": 18}, {"image_id": 42, "category_id": 18}],
    "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 52, "name": "hot dog"}],
}


@pytest.fixture
def chair(tmp_path: Path) -> Chair:
    (tmp_path / "instances.json").write_text(json.dumps(INSTANCES))
    (tmp_path / "synonyms.txt").write_text("dog, puppy\nperson, man, men, lady\nhot dog, hotdog, dog bun\n")
    return Chair(annotations=[str(tmp_path / "instances.json")], synonyms=str(tmp_path / "synonyms.txt"))


def test_false_objects(chair: Chair):
    records = [
        {"key": "000000000042-0123456789abcdef"},
        {"key": "x", "image": "val/COCO_val2014_000000000042.jpg", "captions": [{"text": "A lady."}]},
        {"key": "7"},
    ]
    texts = ["Two Puppies and a dog eat hot dogs.", "A man, ladies and a puppy.", "A lake."]
    chair.update(texts, records)
    # puppies, dog, hot dogs (false): a hot dog is no dog | man, ladies, puppy, all true | nothing
    stats = {name: stat["mean"] for name, stat in chair.compute().items()}
    assert stats["chair_s"] == pytest.approx(1 / 3)
    assert stats["chair_i"] == pytest.approx(1 / 6)
    assert stats["chair_recall"] == 1.0
    assert [row["chair_mentions"] for row in chair.latest] == [3, 3, 0]
    assert list(chair.mentions("A dog bun and a dog.")) == ["hot dog", "dog"]
    assert chair.score("A man.", {"key": "7"})["chair_false"] == 1
    assert chair.score("Nothing.", records[1])["chair_recall"] == 0.0
    with pytest.raises(UserError, match="no image '9'"):
        chair.check({"key": "9"})


def test_a_category_without_synonyms_is_named(tmp_path: Path):
    (tmp_path / "instances.json").write_text(json.dumps(INSTANCES))
    (tmp_path / "synonyms.txt").write_text("dog\nperson\n")
    with pytest.raises(UserError, match="'hot dog'"):
        Chair(annotations=[str(tmp_path / "instances.json")], synonyms=str(tmp_path / "synonyms.txt"))


def test_yes_and_no(tmp_path: Path):
    labels = {1: "yes", 2: "yes", 3: "no", 4: "no", 5: "no"}
    lines = [json.dumps({"question_id": n, "text": "?", "label": label}) for n, label in labels.items()]
    (tmp_path / "pope.json").write_text("\n".join(lines) + "\n")
    pope = Pope(questions=str(tmp_path / "pope.json"))
    texts = ["Yes, there is.", "There is not a dog, yes?", "Yes", "No.", "I know nothing"]
    pope.update(texts, [{"key": str(n)} for n in labels])
    stats = {name: stat["mean"] for name, stat in pope.compute().items()}
    # TP 1, FN 1, FP 1, TN 1, one unreadable
    expected = {"pope_accuracy": 2 / 5, "pope_precision": 1 / 2, "pope_recall": 1 / 2, "pope_f1": 1 / 2}
    assert {name: stats[name] for name in expected} == pytest.approx(expected)
    assert stats["pope_yes"] == pytest.approx(2 / 5)
    assert stats["pope_unreadable"] == pytest.approx(1 / 5)
    with pytest.raises(UserError, match="no question '6'"):
        pope.check({"key": "6"})
