"""Scenes of a study: several relations in a caption, objects named by their looks, and looks that no model is shown."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

import pytest
import torch
from torch.nn.functional import one_hot

from src.experts.scenes import correct
from src.metrics.words import HiddenWords
from src.preparation.scenes import Scenes
from src.scenes.grammar import swaps, write_brief, write_caption
from src.scenes.graph import COLOURS, COLUMNS, LOOKS, ROWS, SHAPES, Scene, SceneObject, draw_scene
from src.scenes.score import score_caption
from src.text.tokenizer import Codec
from src.types import Batch, Prefix
from tests.test_prepare import samples

ASSETS = Path(__file__).parents[1] / "assets" / "base"
HELD_OUT = [["red", "ring"], ["green", "cross"], ["blue", "circle"]]
NAMES = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
ALWAYS = [1.0, 1.0, 1.0, 1.0]
# the red ring lies in the upper left, the blue cross in the lower right: left of and above
SCENE = Scene(
    (SceneObject("ring", "red", "small", "upper", "left"), SceneObject("cross", "blue", "large", "lower", "right")),
    "pink",
)


def settings(**changed) -> dict:
    sizes = {"num_train": 40, "num_val": 4, "num_test": 12, "captions_per_image": 2, "objects": [2, 3], "noise": 0.0}
    text = {"prompt": "Describe the picture.", "response_length": 128, "tokenizer": str(ASSETS)}
    return {**sizes, **text, "image_size": 16, "distinct": True, "held_out": HELD_OUT, "relations": ALWAYS, **changed}


def place(scene: Scene, name: str) -> tuple[int, int]:
    """(row, column) of the only object of that colour and shape."""
    (item,) = [o for o in scene.objects if f"{o.colour} {o.shape}" == name]
    return ROWS.index(item.row), COLUMNS.index(item.column)


def lies(scene: Scene, one: str, word: str, other: str) -> bool:
    (row, column), (row2, column2) = place(scene, one), place(scene, other)
    return {"left": column < column2, "right": column > column2, "above": row < row2, "below": row > row2}[word]


def test_looks_that_are_held_out_are_in_no_image_and_in_no_true_or_false_text(tmp_path):
    Scenes(out=str(tmp_path / "seen"), **settings()).run()
    Scenes(out=str(tmp_path / "unseen"), **settings(unseen=True)).run()
    held_out, texts = {tuple(look) for look in HELD_OUT}, list[str]()
    for split in ("train", "val", "test"):
        for sample in samples(tmp_path / "seen" / split):
            assert not {(o["colour"], o["shape"]) for o in sample.record["scene"]["objects"]} & held_out
            for caption in sample.record["captions"]:
                text = caption["text"]
                texts += [text, *(text[: s["start"]] + s["wrong"] + text[s["end"] :] for s in caption["swaps"])]
    assert len(texts) > 1000 and not {look for text in texts for look in re.findall(NAMES, text)} & held_out
    assert any(("red", "cross") in re.findall(NAMES, text) for text in texts)  # each of the two words is known
    looks = [
        {(o["colour"], o["shape"]) for o in s.record["scene"]["objects"]} for s in samples(tmp_path / "unseen/test")
    ]
    assert set.union(*looks) == held_out and {len(some) for some in looks} == {2, 3}


def test_captions_say_several_relations_each_once_and_each_true():
    """Read with expressions of their own, against the places of the two objects."""
    rng, numbers, two_axes = Random(0), set[int](), 0
    for _ in range(200):
        scene = draw_scene(rng, objects=(2, 6), distinct=True)
        assert len({(o.colour, o.shape) for o in scene.objects}) == len(scene.objects)
        text = write_caption(scene, rng, relation_rates=ALWAYS)
        said = [(f"{a} {b}", word, f"{c} {d}") for a, b, word, c, d in re.findall(
            rf"{NAMES} (?:is )?(left|right|above|below)(?: of)? the {NAMES}\.", text)]  # fmt: skip
        said += [(f"{c} {d}", word, f"{a} {b}") for word, a, b, c, d in re.findall(
            rf"To the (left|right) of the {NAMES} lies the {NAMES}\.", text)]  # fmt: skip
        brief = write_brief(scene, rng, relation_rates=ALWAYS)
        listed = [(f"{a} {b}", word, f"{c} {d}") for a, b, word, c, d in re.findall(
            rf"{NAMES} (left of|right of|above|below) {NAMES}", brief)]  # fmt: skip
        for relations in (said, [(one, word.split()[0], other) for one, word, other in listed]):
            assert relations and all(lies(scene, *relation) for relation in relations)
            facts = [(frozenset((one, other)), word in ("left", "right")) for one, word, other in relations]
            assert len(set(facts)) == len(facts)
            numbers.add(len(facts))
            two_axes += len({pair for pair, _ in facts}) < len(facts)
        assert brief.startswith(
            f"{('Two', 'Three', 'Four', 'Five', 'Six')[len(scene.objects) - 2]} on {scene.background}, "
        )
        for o in scene.objects:
            assert f" {o.row} {o.column} {o.size} {o.colour} {o.shape}" in brief
    assert numbers == {1, 2, 3, 4} and two_axes > 40


def test_a_relation_that_was_said_before_is_a_false_claim():
    left, mirrored = "The red ring is left of the blue cross.", "The blue cross is right of the red ring."
    above, wrong = "One finds the red ring above the blue cross.", "To the right of the blue cross lies the red ring."
    for text, true in ((left, 1), (f"{left} {above}", 2), (f"{left} {left}", 1), (f"{left} {mirrored}", 1),
                       (f"{wrong} {mirrored} {above}", 2)):  # fmt: skip
        score = score_caption(SCENE, text)
        assert (score.true_claims["relation"], score.claims["relation"]) == (true, text.count("."))
        assert score.covered["relation"] == score.facts["relation"] == 1
    # the expert says another one in its place, with the words of that template
    text = f"{left} {above} {above}"
    assert correct(SCENE, text) == []  # of these two objects there is no more to say
    scene = Scene((*SCENE.objects, SceneObject("circle", "cyan", "small", "lower", "left")), "pink")
    edits = correct(scene, text)
    assert [(edit.org, edit.target) for edit in edits] == [("blue", "cyan"), ("cross", "circle")]
    assert all(edit.start_char is not None and edit.start_char > len(f"{left} {above}") for edit in edits)


def test_swaps_may_name_only_some_looks():
    rng, looks = Random(0), LOOKS - {("red", shape) for shape in SHAPES}
    for _ in range(50):
        scene = draw_scene(rng, objects=(2, 4), looks=looks, distinct=True)
        text = write_caption(scene, rng, relation_rates=ALWAYS)
        made = swaps(scene, text, rng, looks=looks)
        assert made and not any(swap.wrong == "red" for swap in made)


class Knows:
    """A backbone that answers with the true response, but for the words of `unknown`."""

    def __init__(self, batch: Batch, codec: Codec, unknown: str) -> None:
        ids = codec.encode(f"{unknown} {unknown}")[0]
        self.batch, self.codec, self.unknown, self.seen = batch, codec, ids[-1], list[list[str]]()

    def encode_prefix(self, prefix):
        return Prefix(torch.zeros(len(self.batch), 1, 1), None)

    def __call__(self, prefix, tokens, *, attend=None, positions=None):
        hidden = tokens != self.batch.response
        assert bool((tokens[hidden] == self.codec.mask_id).all()) and int(hidden.sum(1).max()) == 1
        rows = zip(self.batch.response, hidden, strict=True)
        self.seen.append([self.codec.decode(row[at].tolist()).strip() for row, at in rows])
        says = self.batch.response.clone()
        says[says == self.unknown] = self.codec.encode("the")[0][0]
        return one_hot(says[positions], self.codec.vocab_size).float()


def test_hidden_words_are_of_their_kind_and_counted_by_it():
    codec, rng = Codec.load(ASSETS), Random(0)
    scenes = [draw_scene(rng, objects=(2, 4), distinct=True) for _ in range(40)]
    texts = [write(s, rng, relation_rates=[1.0]) for s in scenes for write in (write_caption, write_brief)]
    ids = [[*codec.encode(text)[0], codec.eot_id] for text in texts]
    response = torch.tensor([row + [codec.eos_id] * (100 - len(row)) for row in ids])
    zeros, true = torch.zeros_like(response), torch.ones_like(response, dtype=torch.bool)
    batch = Batch({}, response, true, response, zeros, true[:, 0], keys=[str(row) for row in range(len(ids))])
    model = Knows(batch, codec, "left")
    metric = HiddenWords(codec=codec)
    metric.update(model, batch)
    stats = metric.compute()
    kinds = {
        "shape": set(SHAPES), "colour": set(COLOURS), "size": {"small", "large"}, "place": {*ROWS, *COLUMNS},
        "background": {"gray", "brown", "pink", "beige"}, "number": {"two", "three", "four"},
        "relation": {"left", "right", "above", "below"}, "named": {*SHAPES, *COLOURS},
    }  # fmt: skip
    assert list(stats) == [f"hidden word={kind}" for kind in kinds]
    for (kind, words), seen in zip(kinds.items(), model.seen, strict=True):
        assert {word.lower() for word in seen} == words
        left = sum(word == "left" for word in seen)
        assert stats[f"hidden word={kind}"]["mean"] == pytest.approx(1 - left / len(texts))
        assert (left > 0) == (kind in ("place", "relation"))
