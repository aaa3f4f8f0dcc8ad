"""What judges make of replies in strict mode: every malformed kind is read rightly, asked again, or counted as failed.

Of each kind it is known what the released scorer makes of it: it crashes, drops the image, or takes a wrong value.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from src.io.errors import UserError
from src.judges.base import Item
from src.judges.caparena import CapArena, read_winner
from src.judges.clair import Clair, read_score
from src.judges.coverage import Coverage, read_letter
from src.judges.factuality import Factuality, read_claims, read_truth
from src.judges.numbered import answers
from tests.talk import talk

QUESTIONS = {"questions": ["What?\nA) red\nB) blue", "Who?\nA) Mr. Smith\nB) x", "Where?\nA) in\nB) on"]}
QUESTIONS |= {"answers": ["A", "b", "B"]}


def item(caption: str | None = "a cat", **extra) -> Item:
    return Item(key="k", row=0, caption=caption, references=("a dog",), image=Path(__file__), extra=extra)


# CLAIR


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('{"score": 85, "reason": "x"}', 0.85),
        ('{"Score": "85%", "reason": null}', 0.85),  # aborts the original; a null reason drops the image
        ('Sure:\n```json\n{"score": 7.5, "reason": "the {tall} one"}\n```', 0.075),
        ('<think>{"score": 3}</think>{"score": 0}', 0.0),
        ("85/100 because both show a cat", 0.85),
        ("**Score:** 64. It is close to 100.", 0.64),
        ("42", 0.42),
        ("I would say 85 out of 100, so 85%.", 0.85),
        ('{"score": 0.85}', None),  # 0.85 or 85 of 100?
        ("Score: 0.85. Reason: close", None),
        ('{"score": 150}', None),
        ('{"score": -5}', None),
        ("-5", None),
        ("Score: -5", None),
        ("Score: 8/10", None),
        ('{"score": null, "reason": "x"}', None),
        ('{"score": true}', None),
        ('{"score": NaN}', None),
        ('{"score": [85]}', None),
        ('{"score": 85} or rather {"score": 60}', None),
        ("On a scale from 0 to 100 I say 85", None),
        ("In 2024 terms: 70", None),
        ("Score: 1,000", None),
        ("cannot say", None),
        ("", None),
        ("[" * 50_000, None),
        ('{"score": 8', None),  # cut off
    ],
)
def test_scores(reply, score):
    assert read_score(reply) == (None if score is None else pytest.approx(score, abs=1e-12))


def test_a_score_is_asked_for_again_and_then_failed():
    ambiguous = '{"score": 0.85, "reason": "x"}'
    done = talk(Clair(), item(), [ambiguous, None, '{"score": 40, "reason": "r"}'])
    assert done.verdict == {"missing": 0, "score": 0.4, "failed": 0}
    assert [(r.attempt, r.sampling["temperature"]) for r in done.requests] == [(0, 0.0), (1, 0.5), (2, 0.5)]
    assert talk(Clair(attempts=2), item(), [ambiguous] * 2).verdict == {"missing": 0, "score": 0, "failed": 1}
    repeated = talk(Clair(mode="official"), item(), ["no", "no", "no"]).requests
    assert [(r.attempt, r.sampling["temperature"]) for r in repeated] == [(0, 0.0), (1, 0.0), (2, 0.0)]


def test_the_messages_hold_what_they_are_about():
    (request,) = talk(Clair(), item("a $5 cat {x}"), ['{"score": 1}']).requests
    assert "a $5 cat {x}" in request.user and "a dog" in request.user
    assert not request.images and request.schema is not None
    (split, check) = talk(Factuality(), item("a red cat"), ["1. A cat is there.", "1. True"]).requests
    assert "a red cat" in split.user and not split.images
    assert "1. A cat is there." in check.user and "a dog" in check.user and check.images == (Path(__file__),)
    (asked,) = talk(Coverage(), item(**QUESTIONS), ["0. A\n1. A\n2. A"]).requests
    assert "a cat" in asked.user and "2. Where?\nA) in\nB) on" in asked.user and not asked.images


# Coverage


@pytest.mark.parametrize(
    ("reply", "given"),
    [
        ("0. A) red\n1. B) x", "AB"),
        ("0. A) Mr. Smith\n1. B) y", "AB"),
        ("0) A\n1) B", "AB"),
        ("0.A\n1.B", "AB"),
        ("0: c\n1: d.", "CD"),
        ("**0.** **A**\n**1.** B - blue", "AB"),
        ("0. (A) red\n1. (B) blue", "AB"),
        ("0. A\n\n\n1. B\n", "AB"),
        ("Answers:\n- 0. A\n- Question 1: [B]", "AB"),
        ("1. B\n0. A", "AB"),
        ('{"answers": [{"number": 0, "answer": "A"}, {"number": 1, "answer": "B) x"}]}', "AB"),
        ('```json\n{"0": "A", "1": "B"}\n```', "AB"),
        ("0. I don't know\n1. I don\u2019t know.", "??"),
        ("0. Unknown\n1. B", "?B"),
        ("0. A", "A-"),
        ("0. A 1. B", "--"),  # the first answer would be "A 1"
        ("0. A\n0. B\n1. B", "-B"),  # contradicts itself
        ("0. A\n0. a) red\n1. B", "AB"),
        ("0. A red car\n1. Indeed", "--"),
        ("A\nB", "--"),
        ("1. A\n2. B", "--"),  # counted from 1: every answer would be another question's
        ("", "--"),
        ("[" * 50_000, "--"),
        ('{"answers": [{"number": {}, "answer": []}, 3], "0": null}', "--"),
    ],
)
def test_letters(reply, given):
    letters = answers(reply, range(2), read_letter)
    assert "".join({None: "-", "": "?"}.get(letters.get(n), letters.get(n) or "-") for n in range(2)) == given


def test_open_questions_alone_are_asked_again():
    replies = ["0. A\n2. I don't know", "1. B\n2. B"]
    done = talk(Coverage(), item(**QUESTIONS), replies)
    assert done.verdict == {"missing": 0, "correct": 2, "total": 3, "abstained": 1, "failed": 0, "skipped": 0}
    assert "Who?" in done.requests[1].user and "What?" not in done.requests[1].user


def test_questions_without_an_answer_fail_alone():
    replies = ["0. A", None, "no"]  # the original scores the single letter for all questions, or drops the image
    expected = {"missing": 0, "correct": 1, "total": 3, "abstained": 0, "failed": 2, "skipped": 0}
    assert talk(Coverage(), item(**QUESTIONS), replies).verdict == expected
    whole = talk(Coverage(), item(**QUESTIONS), ["I don't know."]).verdict
    assert whole == {"missing": 0, "correct": 0, "total": 3, "abstained": 3, "failed": 0, "skipped": 0}


# Factuality


@pytest.mark.parametrize(
    ("reply", "claims"),
    [
        ("Sure:\n1. Mr. Lee stands.\n2. Mr. Lee smiles.\n3. Mr. Lee waves.", 3),  # the original drops the image
        ("1. a b\n\n\n2. c d\n", 2),  # the original crashes
        ("1) a b\n2) c d", 2),
        ("**1.** a b\n**2.** c d", 2),
        ("- a cat\n* a dog", 2),
        ("1. " + "w " * 300, 1),
        ("There is nothing.", None),
        ("1.\n2. -", None),
        ("", None),
    ],
)
def test_claims(reply, claims):
    assert claims == (None if (read := read_claims(reply)) is None else len(read))


@pytest.mark.parametrize(
    ("reply", "truth"),
    [
        *((text, True) for text in ("True", "true.", "**True**", "TRUE - clearly", "(True)")),
        *((text, False) for text in ("False", "false (no dog)", "`False`.")),
        *((text, None) for text in ("", "yes", "Not true", "True/False", "True or False", "Untrue", "truely")),
    ],
)
def test_verdicts(reply, truth):
    assert read_truth(reply) is truth


def test_claims_without_a_verdict_are_asked_about_again_and_then_fail_alone():
    claims = "1. a b\n2. c d\n3. e f"
    done = talk(Factuality(), item(), [claims, "1. True\n3. false.", '{"answers": [{"number": 2, "answer": true}]}'])
    assert done.verdict == {"missing": 0, "true": 2, "total": 3, "failed": 0, "skipped": 0}
    assert "2. c d" in done.requests[2].user and "a b" not in done.requests[2].user
    done = talk(Factuality(), item(), ["no", claims, "", "1. True", None])  # an empty verdict crashes the original
    assert done.verdict == {"missing": 0, "true": 1, "total": 3, "failed": 2, "skipped": 0}
    done = talk(Factuality(), item(), ["no", "", None])
    assert done.verdict == {"missing": 0, "true": 0, "total": 0, "failed": 0, "skipped": 1}


def test_a_caption_without_words_has_no_claims():
    assert talk(Factuality(), item(" .. "), []).verdict == {
        "missing": 0, "true": 0, "total": 0, "failed": 0, "skipped": 0,
    }  # fmt: skip


def test_official_mode_ends_where_the_original_goes_on_for_ever():
    done = talk(Factuality(mode="official"), item(), ["1. a b", *["no"] * 99])
    assert done.verdict is not None and done.verdict["skipped"] == 1 and len(done.requests) == 100


# CapArena


@pytest.mark.parametrize(
    ("reply", "winner"),
    [
        ("Reason: a.\nJudgment: Caption 1 is better.", 1),
        ("Reason: a\nJudgment: <Caption 2 is better>", 2),
        ("**Reason:** a\n**Judgment:** caption 1 is better", 1),
        ("Reason: a\n\nJudgment:\nCaption 2", 2),
        ("Judgment: Tie", 0),
        ("Tie.", 0),
        ("Reason: The Judgment: Caption 2 is better? no.\nJudgment: Caption 1 is better.", 1),
        ("Judgment: Caption 1 is better than Caption 2", 1),
        ("Judgment: Caption 1 is better\nJudgment: Caption 2 is better", None),
        ("Judgment: Caption 1 or Caption 2", None),
        ("Judgment: neither", None),
        ("Caption 1 is better because it is long, caption 2 is not", None),
        ("", None),
    ],
)
def test_winners(reply, winner):
    assert read_winner(reply) == winner


def test_battles_are_fought_in_both_orders():
    battle = item("a cat", rival="a bird", baseline=2)
    counts = {"missing": 0, "baseline": 2, "asked": 2, "words": 2}
    done = talk(CapArena(), battle, ["Judgment: Caption 1 is better"] * 2)  # always the first
    assert done.verdict == {**counts, "as_first": 1, "as_second": -1}
    first, second = (request.user for request in done.requests)
    assert first.index("a cat") < first.index("a bird") and second.index("a bird") < second.index("a cat")
    done = talk(CapArena(attempts=2), battle, ["", "Judgment: Tie", None, "hm"])
    assert done.verdict == {**counts, "as_first": 0, "as_second": None}


# all


def test_a_missing_caption_asks_nothing():
    for judge in (Clair(), Coverage(), Factuality(), CapArena()):
        done = talk(judge, item(None, rival="r", baseline=0, **QUESTIONS), [])
        assert done.verdict is not None and done.verdict["missing"] == 1
    with pytest.raises(UserError, match="'k' has no image"):
        list(
            CapArena().verdict(
                Item(key="k", row=0, caption="c", references=("r",), extra={"rival": "r", "baseline": 0})
            )
        )


def test_prompts_of_a_clone_are_read_where_they_are(tmp_path):
    (tmp_path / "scorer.py").write_text(
        'NAME = "Rate {refs} and " \'{caps}\' " for $1"\ndef f(c):\n    USER = f"Say {c}"\n'
    )
    entry = {"file": "../scorer.py", "name": "NAME", "fields": {"caption": "{caps}", "references": "{refs}"}}
    user = {"file": "../scorer.py", "name": "USER", "fields": {"caption": "{c}"}}
    entries = {"version": 7, "score.system": entry, "score.user": user}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "clair.yaml").write_text(json.dumps(entries))
    judge = Clair(prompts=str(tmp_path / "mine"))
    (request,) = talk(judge, item("a cat"), ['{"score": 1}']).requests
    assert (request.system, request.user) == ("Rate a dog and a cat for $1", "Say a cat")
    assert judge.prompt.version == "7" and judge.prompt.digest != Clair().prompt.digest
    (tmp_path / "mine" / "clair.yaml").write_text(json.dumps({**entries, "score.system": "Rate ${refs}."}))
    with pytest.raises(UserError, match=r"must show \$caption, \$references; check references, refs"):
        next(Clair(prompts=tmp_path / "mine").verdict(item()))
    (tmp_path / "mine" / "clair.yaml").write_text(json.dumps({**entries, "score.user": {**entry, "name": "OTHER"}}))
    with pytest.raises(UserError, match=r"scorer\.py does not set OTHER to a string exactly once"):
        Clair(prompts=tmp_path / "mine")
    with pytest.raises(UserError, match=r"there is no .*coverage\.yaml; copy"):
        Coverage(prompts=tmp_path / "mine")
