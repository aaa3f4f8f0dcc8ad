"""Caption metrics against hand-computed captions and brute force."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch.nn.functional import one_hot

from src.metrics.caption import Mark, summarise
from src.metrics.fixing import count_fixes, count_looks
from src.metrics.overlap import Bleu, Cider, RougeL
from src.metrics.scenes import SceneQuality
from src.metrics.text import ReferenceOverlap, TextHealth, response_counts, words_of
from src.scenes.graph import Scene
from src.scenes.score import score_caption
from src.types import Prefix, SpecialIds
from tests.test_corruption import SPECIAL, make_batch, with_text

SCENE = {
    "objects": [
        {"shape": "circle", "colour": "red", "size": "small", "row": "upper", "column": "left"},
        {"shape": "ring", "colour": "blue", "size": "large", "row": "lower", "column": "right"},
    ],
    "background": "pink",
}
REFERENCES = [{"text": "A red dog runs."}, {"text": "A dog on the grass."}]
RECORD = {"key": "a", "scene": SCENE, "captions": REFERENCES}
PERFECT = (
    "The picture shows two objects on a pink background. A small red circle is in the upper left. "
    "In the lower right there is a large blue ring. The red circle is above the blue ring."
)
# introduction: number wrong, background right. Object: all right but one of two attributes. The last sentence is broken
# and names two attributes and an object. (true claims, claims, covered facts, facts) of each kind:
#   object 1 2 1 2, attribute 1 4 1 4, place 1 1 1 2, background 1 1 1 1, number 0 1 0 1, relation 0 0 0 1
FLAWED = "On a pink background we find three objects. A small green circle is in the upper left. A red red is ring."
# a wrong place costs the place alone: object 1 1 1 2, attribute 2 2 2 4, place 0 1 0 2, no introduction
ELSEWHERE = "A small red circle is in the middle left."
HAND = {
    PERFECT: {"coverage": 1.0, "factuality": 1.0, "syntax": 1.0, "quality": 1.0},
    FLAWED: {"coverage": 0.4, "factuality": 4 / 9, "syntax": 2 / 3, "quality": (1 / 2 + 1 / 4 + 2 / 3 + 1 + 0 + 0) / 6},
    "": {"coverage": 0.0, "factuality": 0.0, "syntax": 0.0, "quality": 0.0},
    ELSEWHERE: {"coverage": 0.3, "factuality": 0.75, "syntax": 1.0, "quality": (2 / 3 + 2 / 3) / 6},
}
KINDS = {  # precision and recall of each kind over the four captions
    "object": (1.0 * (2 + 1 + 1) / (2 + 2 + 1), (2 + 1 + 0 + 1) / 8),
    "attribute": ((4 + 1 + 2) / (4 + 4 + 2), (4 + 1 + 0 + 2) / 16),
    "place": ((2 + 1 + 0) / (2 + 1 + 1), (2 + 1 + 0 + 0) / 8),
    "background": (2 / 2, 2 / 4),
    "number": (1 / 2, 1 / 4),
    "relation": (1 / 1, 1 / 4),
}


@pytest.mark.parametrize("text", HAND)
def test_scene_quality_of_hand_made_captions(text):
    assert SceneQuality().score(text, RECORD) == pytest.approx(HAND[text])


def test_means_and_standard_errors_match_the_definition():
    metric = SceneQuality()
    metric.update(list(HAND), [RECORD] * len(HAND))
    stats = metric.compute()
    for name in SceneQuality.names:
        stat, values = stats[name], [hand[name] for hand in HAND.values()]
        assert stat["mean"] == pytest.approx(sum(values) / 4)
        assert stat["se"] == pytest.approx(statistics.stdev(values) / math.sqrt(4))
        assert stat["n"] == 4
    with pytest.raises(ValueError, match="'photo-7' has no scene"):
        metric.check({"key": "photo-7"})
    assert summarise([3.0]) == {"mean": 3.0, "se": None, "n": 1}


def test_precision_and_recall_of_each_kind_of_fact():
    metric = SceneQuality()
    metric.update(list(HAND), [RECORD] * len(HAND))
    stats = metric.compute()
    for kind, (precision, recall) in KINDS.items():
        assert stats[f"precision_{kind}"]["mean"] == pytest.approx(precision), kind
        assert stats[f"recall_{kind}"]["mean"] == pytest.approx(recall), kind
    shares = [3 / 7] + 4 * [1 / 7]  # "A small ... is in the ..." three times, four other sentences once
    assert stats["templates"]["mean"] == pytest.approx(math.exp(-sum(share * math.log(share) for share in shares)))


def test_each_object_is_described_once():
    scene, ring = Scene.from_dict(SCENE), "A large blue ring is in the lower right."
    thrice = score_caption(scene, " ".join([ring] * 3))
    assert (thrice.claims["object"], thrice.true_claims["object"], thrice.covered["object"]) == (3, 1, 1)
    # the better of two sentences about one object keeps it, whatever their order
    worse = "A large blue ring is in the lower left."
    for text in (f"{ring} {worse}", f"{worse} {ring}"):
        score = score_caption(scene, text)
        assert score.true_claims["place"] == 1 and score.true_claims["attribute"] == 2


@pytest.mark.parametrize("kind", [SceneQuality, TextHealth, ReferenceOverlap, Bleu, RougeL, Cider])
def test_two_merged_metrics_equal_one(kind):
    texts = [*HAND, "A red dog runs on the grass today.", "The the dog."]
    records = [{**RECORD, "key": str(number)} for number in range(len(texts))]
    whole, left, right = kind(), kind(), kind()
    whole.update(texts, records)
    left.update(texts[:2], records[:2])
    for text, record in zip(texts[2:], records[2:], strict=True):
        right.update([text], [record])
    left.merge_state(right)
    merged = left.compute()
    for name, stat in whole.compute().items():
        assert merged[name] == pytest.approx(stat)


def test_scene_marks_name_the_wrong_words():
    marks = SceneQuality().marks(FLAWED, RECORD)
    assert [(FLAWED[m.start : m.end], m.flaw) for m in marks] == [
        ("three", "false"),
        ("green", "false"),
        ("A red red is ring.", "ungrammatical"),
    ]
    assert SceneQuality().marks(PERFECT, RECORD) == []
    assert TextHealth().marks("red red", RECORD) == list[Mark]()


def test_text_health_by_hand():
    # words: the the dog the the dog; bigrams the-the, the-dog, dog-the, the-the, the-dog: 3 of 5 differ
    expected = {
        "words": 6,
        "duplicate_bigrams": pytest.approx(0.4),
        "doubled_words": 2,
        "longest_repeat": 3,
        "empty": 0,
    }
    clean = {"punctuation_runs": 0, "unfinished": 0, "special_tokens": 0}
    assert TextHealth().score("The the dog, the the dog.", {}) == {**expected, **clean}
    nothing = {"words": 0, "duplicate_bigrams": 0, "doubled_words": 0, "longest_repeat": 0, "empty": 1}
    assert TextHealth().score(" .. ", {}) == {**nothing, **clean, "punctuation_runs": 1}


@pytest.mark.parametrize(
    ("text", "longest", "runs", "unfinished", "special"),
    [
        ("A red dog. A red cat.", 2, 0, 0, 0),
        ("very very very good", 2, 0, 1, 0),
        ("A dog,, a cat. . Then ... nothing", 1, 3, 1, 0),
        ('It says "stop."', 0, 0, 0, 0),
        ("A dog<|eot_id|> and [MASK] <mask></s> of 3.5 m.", 1, 0, 0, 4),
        ("a < b | c [sic] <tag>.", 0, 0, 0, 0),
    ],
)
def test_signs_of_degeneration(text, longest, runs, unfinished, special):
    score = TextHealth().score(text, {})
    names = ("longest_repeat", "punctuation_runs", "unfinished", "special_tokens")
    assert [score[name] for name in names] == [longest, runs, unfinished, special]


def test_word_f1_takes_the_best_reference():
    # against "A dog on the grass.": shared a, dog, the; 3 words against 5
    assert ReferenceOverlap().score("the dog, a", RECORD)["word_f1"] == pytest.approx(2 * 3 / (3 + 5))
    # against "A red dog runs.": shared a, red; a repeated word counts once
    assert ReferenceOverlap().score("red red a", RECORD)["word_f1"] == pytest.approx(2 * 2 / (3 + 4))
    assert ReferenceOverlap().score("", RECORD)["word_f1"] == 0.0
    assert " ".join(words_of("A man's well-lit, 3-legged Dog -- ok.")) == "a man's well-lit 3-legged dog ok"
    with pytest.raises(ValueError, match="no captions"):
        ReferenceOverlap().score("a", {"key": "x", "captions": []})


def test_bleu_by_hand():
    record = {"captions": [{"text": "a b c d e f"}]}
    metric = Bleu()
    metric.update(["A b c d e x."], [record])
    # n-gram precisions 5/6, 4/5, 3/4, 2/3 (product 1/3), no brevity penalty
    assert metric.compute()["bleu"]["mean"] == pytest.approx((1 / 3) ** 0.25, rel=1e-5)


@pytest.mark.parametrize(
    ("ids", "tokens", "cut", "leftover_masks", "inner_eos"),
    [
        ([5, 6, 2, 1, 0], 2, 0, 0, 0),
        ([5, 0, 6], 3, 1, 1, 0),
        ([5, 1, 6, 1, 2, 1, 1], 2, 0, 0, 0.5),
        ([5, 1, 6, 6, 1, 1], 3, 0, 0, 0.25),
        ([1, 1], 0, 0, 0, 0),
    ],
)
def test_response_counts_stop_at_eot(ids, tokens, cut, leftover_masks, inner_eos):
    special = SpecialIds(mask=0, eos=1, eot=2, banned=(0,), vocab_size=9)
    expected = {"tokens": tokens, "cut": cut, "leftover_masks": leftover_masks, "inner_eos": inner_eos}
    assert response_counts(ids, special) == expected


def test_fixes_and_breaks_against_written_out_loops():
    """A backbone that says 1 more than each token, on drafts with filler 9 behind the end."""
    right = [[3, 4, 5, 9, 9], [7, 2, 8, 1, 9]]
    drafts = [[3, 3, 5, 9, 9], [7, 1, 7, 1, 9]]

    class Next:
        def encode_prefix(self, prefix):
            return Prefix(torch.zeros(2, 1, 1), None)

        def __call__(self, prefix, tokens, **_):
            return one_hot((tokens + 1) % 10, 10).float()

    batch = make_batch(2, 5, padding=0)
    batch.response, batch.flawed = torch.tensor(right), torch.tensor(drafts)
    special = SpecialIds(mask=0, eos=9, eot=8, banned=(), vocab_size=10)
    expected = [0, 0, 0, 0]
    for row, draft in zip(right, drafts, strict=True):
        for true, said in zip(row, draft, strict=True):
            seen = (said + 1) % 10
            if said != true:
                expected[0] += seen == true
                expected[1] += 1
            elif true != 9:
                expected[2] += seen != said
                expected[3] += 1
    assert count_fixes(Next(), [batch, batch], special=special).tolist() == [2 * count for count in expected]
    assert expected == [3, 3, 4, 4]


class Fixer:
    """Predicts the true text wherever a token is masked or wrong, and `broken` at one visible position."""

    def __init__(self, response, place):
        self.response, self.place, self.seen = response, place, []

    def encode_prefix(self, prefix):
        return Prefix(torch.zeros(len(self.response), 1, 1), None)

    def __call__(self, prefix, tokens, **_):
        self.seen.append(tokens)
        says = self.response.clone()
        says[:, self.place] = 5
        return one_hot(says, SPECIAL.vocab_size).float()


def test_looks_by_noise_level():
    """At every level, 0 included, a model is shown the true text, and the text with replaced tokens."""
    batch = with_text(300, 16)
    batch.response[:, 0] = 6  # the place at which the model says 5
    batch.flawed = batch.response.clone()
    model = Fixer(batch.response, 0)
    levels = [0, 0.5]
    counts = count_looks(model, [batch], special=SPECIAL, levels=levels, rate=0.2)
    inside = torch.arange(16) <= (batch.response == SPECIAL.eot).int().argmax(1, keepdim=True)
    for level, (fixed, wrong, broken, right), (true, flawed) in zip(
        levels, counts.tolist(), (model.seen[:2], model.seen[2:]), strict=True
    ):
        visible = (true != SPECIAL.mask) & inside
        assert torch.equal(true[visible], batch.response[visible]) and right == visible.sum()
        assert abs(right / inside.sum() - (1 - level)) < 0.05
        assert broken == visible[:, 0].sum()
        changed = flawed != true
        assert wrong == changed.sum() and abs(wrong / right - 0.2) < 0.04
        assert fixed == changed[:, 1:].sum()
