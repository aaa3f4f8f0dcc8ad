"""The offline experts, judged by what their edits make of a draft: by the scorer of scenes, or the reference."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from random import Random

import pytest

from src.experts.reference import ReferenceExpert
from src.experts.scenes import ScenesExpert, align, correct, fits
from src.io.settings import describe
from src.scenes.grammar import (
    LEXICON,
    NUMBERS,
    TEMPLATES,
    Statement,
    swaps,
    template_words,
    write_caption,
    write_sentence,
)
from src.scenes.graph import Scene, SceneObject, draw_scene
from src.scenes.score import score_caption
from src.text.align import apply_spans, locate
from src.text.tokenizer import BOS, Codec
from src.types import Draft, Edit, Expert, Failure, Revision

WORDS = sorted({w for words in LEXICON.values() for w in words} | {"A", "the", "is", "in", "of", "xx", "there", "On"})


def _draft(text: str, *, key: str = "k", reference: str = "", **record: object) -> Draft:
    return Draft(key, "Describe.", text, [], 8, reference, {}, "f", 0, dict(record))


def _ask(expert: Expert, drafts: Sequence[Draft]) -> list[tuple[str, Revision | Failure]]:
    async def collect() -> list[tuple[str, Revision | Failure]]:
        return [answer async for answer in expert.revise(drafts)]

    return asyncio.run(collect())


def _edits(expert: Expert, draft: Draft) -> tuple[Edit, ...]:
    ((key, answer),) = _ask(expert, [draft])
    assert key == draft.key
    assert isinstance(answer, Revision)
    return answer.edits


def _apply(text: str, edits: Sequence[Edit]) -> str:
    """Plain replacement; every edit quotes what stands at its place."""
    for edit in sorted(edits, key=lambda e: e.start_char or 0, reverse=True):
        start = edit.start_char
        assert start is not None
        assert edit.org
        assert text[start : start + len(edit.org)] == edit.org
        text = text[:start] + edit.target + text[start + len(edit.org) :]
    return text


def _samples(count: int, seed: int, objects: tuple[int, int] = (1, 5)) -> list[tuple[Scene, str, Random]]:
    rng = Random(seed)
    out = []
    for _ in range(count):
        scene = draw_scene(rng, objects=objects)
        out.append((scene, write_caption(scene, rng), Random(rng.random())))
    return out


def _quality(scene: Scene, text: str) -> tuple[float, float, float]:
    score = score_caption(scene, text)
    return score.factuality, score.syntax, score.coverage


def _thing(shape: str, colour: str, size: str, row: str, column: str) -> SceneObject:
    return SceneObject(shape, colour, size, row, column)


RING = _thing("ring", "red", "small", "upper", "left")
SQUARE = _thing("square", "blue", "large", "upper", "right")
PAIR = Scene((RING, SQUARE), "gray")


def test_scenes_leaves_true_captions_alone() -> None:
    for scene, text, _ in _samples(150, 1, (1, 9)):
        ((_, answer),) = _ask(ScenesExpert(), [_draft(text, scene=scene.to_dict())])
        assert isinstance(answer, Revision)
        assert answer.edits == ()
        assert answer.raw == "right"


def test_scenes_undoes_any_single_swap_with_one_word() -> None:
    count = 0
    for scene, text, rng in _samples(50, 2):
        for swap in swaps(scene, text, rng):
            wrong = text[: swap.start] + swap.wrong + text[swap.end :]
            assert score_caption(scene, wrong).factuality < 1
            edits = _edits(ScenesExpert(), _draft(wrong, scene=scene.to_dict()))
            assert len(edits) == 1
            assert " " not in edits[0].org + edits[0].target
            assert _quality(scene, _apply(wrong, edits)) == (1.0, 1.0, 1.0)
            count += 1
    assert count > 400


def test_scenes_makes_captions_of_other_scenes_true() -> None:
    """Grammatical and false throughout: true afterwards, but for relations that no pair of objects satisfies."""
    others = [text for _, text, _ in _samples(150, 5)]
    for (scene, _, _), text in zip(_samples(150, 6), others, strict=True):
        fixed = _apply(text, correct(scene, text))
        score = score_caption(scene, fixed)
        assert score.syntax == 1.0
        count = sum(len(re.findall(r" (?:upper|middle|lower) ", s)) for s in text.split("."))
        surplus = 4 * max(0, count - len(scene.objects))  # sentences that no object is left for
        assert surplus <= score.claims.total() - score.true_claims.total() <= surplus + 1  # at most one relation
        assert score.covered.total() - score.covered["relation"] == 4 * min(count, len(scene.objects)) + 2


@pytest.mark.parametrize(("lengths", "rate"), [("same", 0.1), ("same", 0.6), ("any", 0.05), ("any", 0.3)])
def test_scenes_never_makes_a_caption_worse(lengths: str, rate: float) -> None:
    """However heavy the damage, no score falls; with `same` a second call finds nothing more to do."""
    gains, unlike = 0.0, (lambda w: ([], [w, w], ["", w])) if lengths == "any" else (lambda w: ())
    for scene, text, rng in _samples(120, 4, (1, 6)):
        words = []
        for word in text.split(" "):
            damages = [[rng.choice([*WORDS, "ring."])], *unlike(word)]
            words += rng.choice(damages) if rng.random() < rate else [word]
        damaged = " ".join(words) or "A"
        fixed = _apply(damaged, correct(scene, damaged, lengths=lengths))
        before, after = _quality(scene, damaged), _quality(scene, fixed)
        assert all(a >= b for a, b in zip(after[lengths == "any" :], before[lengths == "any" :], strict=True))
        if lengths == "same":
            assert len(fixed.split(" ")) == len(damaged.split(" "))
            assert correct(scene, fixed) == []
        assert correct(scene, text, lengths=lengths) == []
        gains += sum(after) - sum(before)
    assert gains > 10


UPPER_LEFT = "A small red ring is in the upper left."


@pytest.mark.parametrize(
    ("lengths", "text", "fixed"),
    [
        # the place is taken: its object is what the sentence is about, even if another one looks more like it
        ("same", "A large blue square is in the upper left.", UPPER_LEFT),
        # the place is empty: the object that agrees with most words
        ("same", "A large red square is in the lower right.", "A large blue square is in the upper right."),
        # said twice while another object goes without: the second sentence moves on
        ("same", f"{UPPER_LEFT} {UPPER_LEFT}", f"{UPPER_LEFT} A large blue square is in the upper right."),
        # a surplus sentence is made true where it stands
        ("same", f"{UPPER_LEFT} A large blue square is in the upper right. A small blue ring is in the upper left.",
         f"{UPPER_LEFT} A large blue square is in the upper right. {UPPER_LEFT}"),
        ("same", "On a pink background we find one object.", "On a gray background we find two objects."),
        ("same", "The red cross is left of the blue square.", "The red ring is left of the blue square."),
        ("same", "The red ring is above the blue square.", None),  # they share a row
        # ungrammatical
        ("same", "A small the ring is is the upper left.", UPPER_LEFT),
        ("same", "a small red ring is in the upper left.", UPPER_LEFT),
        ("same", "A red ring, quite or, sits in the upper left,", "A red ring, quite small, sits in the upper left."),
        ("same", "the the the the ring the the the the.", None),
        ("same", "A small  ring is in the upper left.", None),
        ("same", "A small ring is in the upper left.", None),
        ("same", "", None),
        # of any length
        ("any", "A a small red ring is in the upper left.", UPPER_LEFT),
        ("any", "A small ring is in the upper left.", UPPER_LEFT),
        ("any", "small red ring is in the upper left.", UPPER_LEFT),
        ("any", "A small red ring is in the upper left left.", UPPER_LEFT),
        ("any", "A  small red ring is in the upper left.", UPPER_LEFT),
        ("any", "A small red ring is in the", UPPER_LEFT),
        ("any", "A small blue blue ring in the upper left.", UPPER_LEFT),
        ("any", "zz zz zz zz zz zz", None),
    ],
)  # fmt: skip
def test_scenes_known_cases(lengths: str, text: str, fixed: str | None) -> None:
    ((_, answer),) = _ask(ScenesExpert(lengths=lengths), [_draft(text, scene=PAIR.to_dict())])
    if fixed is None:
        assert answer == Failure("no_local_edit")
    else:
        assert isinstance(answer, Revision)
        assert _apply(text, answer.edits) == fixed


@pytest.mark.parametrize(
    ("expert", "draft", "reason"),
    [
        (ScenesExpert(), _draft("A ring."), "no_scene"),
        (ScenesExpert(), _draft("A ring.", scene={"objects": 3}), "damaged_scene"),
        (ReferenceExpert(), _draft("A dog."), "no_reference"),
        (ReferenceExpert(), _draft("Dogs.", reference="Two brown dogs run."), "no_local_edit"),
    ],
)
def test_failures(expert: Expert, draft: Draft, reason: str) -> None:
    assert _ask(expert, [draft]) == [("k", Failure(reason))]


@pytest.mark.parametrize("kind", sorted(TEMPLATES))
def test_scenes_reads_every_template(kind: str) -> None:
    fields = {"size": "small", "colour": "red", "shape": "ring", "row": "upper", "column": "left", "noun": "objects"}
    fields |= {"side": "left", "level": "above", "colour2": "blue", "shape2": "square", "number": NUMBERS[1]}
    low = _thing("square", "blue", "large", "lower", "right")
    for template in range(len(TEMPLATES[kind])):
        text = write_sentence(Statement(kind, template, {**fields, "background": "gray"}))
        words = text.split(" ")
        for place in range(len(words)):
            damaged = " ".join([*words[:place], "zz", *words[place + 1 :]])
            assert _apply(damaged, correct(Scene((RING, low), "gray"), damaged)) == text


@pytest.mark.parametrize("expert", [ScenesExpert(), ReferenceExpert()])
def test_every_draft_is_answered_once_and_the_raw_answer_is_json(expert: Expert) -> None:
    drafts = [
        _draft(text.replace("small", "large"), key=f"k{i}", reference=text, scene=scene.to_dict())
        for i, (scene, text, _) in enumerate(_samples(20, 10))
    ]
    answers = _ask(expert, drafts)
    assert sorted(key for key, _ in answers) == sorted(d.key for d in drafts)
    for _, answer in answers:
        assert isinstance(answer, Revision)
        assert answer.model == expert.name
        raw = [] if answer.raw == "right" else json.loads(answer.raw)
        assert raw == [e.to_dict() for e in answer.edits]
    assert any(answer.edits for _, answer in answers if isinstance(answer, Revision))


REFERENCE = "Two brown dogs run on the wet sand, near a small boat. The sky is grey."


@pytest.mark.parametrize(
    ("changes", "edits"),
    [
        ({}, []),
        ({"dogs": "cats"}, [("cats", "dogs")]),
        ({"grey": "blue", "Two": "Three"}, [("Three", "Two"), ("blue", "grey")]),
        ({"wet sand": "green grass"}, [("green grass", "wet sand")]),
        # another number of words is another way of telling: not an edit
        ({"small": "big blue", "brown": "black"}, [("black", "brown")]),
        # too long a segment
        ({"brown dogs run on the": "w1 w2 w3 w4 w5", "sky": "sea"}, [("sea", "sky")]),
        # a word in the place of a comma
        ({"sand,": "sand and", "sky": "sea"}, [("sea", "sky")]),
    ],
)
def test_reference_edits(changes: dict[str, str], edits: list[tuple[str, str]]) -> None:
    text = REFERENCE
    for right, wrong in changes.items():
        text = text.replace(right, wrong)
    edits_made = _edits(ReferenceExpert(), _draft(text, reference=REFERENCE))
    assert [(e.org, e.target) for e in edits_made] == edits
    assert [e.start_char for e in edits_made] == [text.index(org) for org, _ in edits]


def test_reference_max_words_bounds_the_edits() -> None:
    draft = _draft(REFERENCE.replace("wet sand", "green grass").replace("sky", "sea"), reference=REFERENCE)
    assert [e.org for e in _edits(ReferenceExpert(max_words=1), draft)] == ["sea"]
    with pytest.raises(ValueError, match="max_words must be at least 1, got 0"):
        ReferenceExpert(max_words=0)


def test_reference_takes_the_most_similar_of_several() -> None:
    other = "A man in a red coat holds an umbrella."
    draft = _draft(other.replace("red", "blue"), reference=REFERENCE, captions=[{"text": REFERENCE}, {"text": other}])
    (edit,) = _edits(ReferenceExpert(), draft)
    assert (edit.org, edit.target) == ("blue", "red")
    right = _draft(other, reference=REFERENCE, captions=[{"text": REFERENCE}, {"text": other}])
    assert _edits(ReferenceExpert(), right) == ()


@pytest.mark.parametrize("damage", [lambda t: t.replace(". ", ".", 1), lambda t: f" {t}"])
def test_a_missing_or_leading_blank_is_an_error_that_one_edit_mends(damage):
    rng = Random(5)
    for _ in range(30):
        scene = draw_scene(rng, objects=(2, 3))
        text = write_caption(scene, rng)
        flawed = damage(text)
        assert score_caption(scene, flawed).syntax < 1.0
        edits = correct(scene, flawed)
        assert len(edits) == 1
        (edit,) = edits
        assert flawed[: edit.start_char] + edit.target + flawed[edit.start_char + len(edit.org) :] == text


def _distance(words: list[str], template: list[tuple[str, str | None, str]]) -> int:
    """Word edit distance by its definition: the first words replaced, removed, or one inserted before them."""

    def rest(i: int, j: int) -> int:
        if (i, j) not in known:
            if not words[i:] or not template[j:]:
                known[i, j] = len(words[i:]) + len(template[j:])
            else:
                wrong = 99 if not words[i] else int(not fits(words[i], template[j], first=j == 0))
                known[i, j] = min(rest(i + 1, j + 1) + wrong, rest(i + 1, j) + 1, rest(i, j + 1) + 1)
        return known[i, j]

    known: dict[tuple[int, int], int] = {}
    return rest(0, 0)


def test_words_are_aligned_by_edit_distance() -> None:
    rng = Random(21)
    for _, text, _ in _samples(30, 20):
        for sentence in re.findall(r"[^.]+\.", text):
            words = sentence.strip().split(" ")
            for _ in range(rng.randint(0, 4)):
                place = rng.randrange(len(words))
                words[place : place + rng.randint(0, 1)] = rng.choices([*WORDS, ""], k=rng.randint(0, 2))
                words = words or ["A"]
            for kind in TEMPLATES:
                template = template_words(kind, rng.randrange(len(TEMPLATES[kind])))
                cost, slots = align(words, template)
                assert cost == _distance(words, template)
                assert " ".join(slot for slot in slots if slot) == " ".join(words)


@pytest.mark.parametrize("lengths", ["same", "any"])
def test_scenes_mends_words_too_many_and_too_few(lengths: str) -> None:
    """One word of a sentence doubled or gone: nearly always undone; `same` keeps the number of words."""
    expert, exact, total = ScenesExpert(lengths=lengths), 0, 0
    for scene, text, rng in _samples(80, 22):
        words = text.split(" ")
        place = rng.randrange(len(words) - 1)
        if "." in words[place] or (place and "." in words[place - 1]):
            continue
        for change in ([words[place]] * 2, []):
            damaged = " ".join([*words[:place], *change, *words[place + 1 :]])
            ((_, answer),) = _ask(expert, [_draft(damaged, scene=scene.to_dict())])
            fixed = _apply(damaged, getattr(answer, "edits", ()))
            if lengths == "same":
                assert len(fixed.split(" ")) == len(damaged.split(" "))
            exact, total = exact + (fixed == text), total + 1
    # a few are near enough to another template of as many words
    assert exact == 0 if lengths == "same" else 0.8 * total < exact < total, (exact, total)


def test_scenes_lengths_are_checked_and_part_of_what_answers_depend_on() -> None:
    with pytest.raises(ValueError, match="lengths must be one of same, any, got 'other'"):
        ScenesExpert(lengths="other")
    assert describe(ScenesExpert()) == {"class": "ScenesExpert"}  # as in rounds made before there was a choice
    assert describe(ScenesExpert(lengths="any")) == {"class": "ScenesExpert", "lengths": "any"}


def test_scenes_edits_of_any_length_are_placed_with_a_gap() -> None:
    """Expert and alignment together: what the expert says is what the tokens read."""
    codec = Codec.train([text for _, text, _ in _samples(150, 9, (1, 9))], vocab_size=600)
    gapped, unequal = codec.with_format(gap=BOS), 0
    for scene, text, rng in _samples(60, 24):
        words = text.split(" ")
        for _ in range(3):
            place = rng.randrange(len(words))
            words[place : place + rng.randint(0, 1)] = rng.choices(words, k=rng.randint(0, 1))
        damaged = " ".join(words)
        edits = correct(scene, damaged, lengths="any")
        ids = [*gapped.encode(damaged)[0], gapped.eot_id]
        unequal += locate(codec, ids, edits).rejected["unequal_length"]
        aligned = locate(gapped, ids, edits)
        assert not aligned.rejected
        assert gapped.decode(apply_spans(aligned.ids, aligned.spans)) == _apply(damaged, edits)
    assert unequal > 40
