"""Experts that are wrong on purpose or know only the model's own reading, and the second reader that tells."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from random import Random

import pytest

from src.experts.noisy import NoisyExpert
from src.experts.openai import OpenAIExpert
from src.experts.reading import ReadingExpert
from src.experts.scenes import ScenesExpert
from src.io.errors import UserError
from src.io.shards import write_shards
from src.metrics.edits import count_edits
from src.scenes.grammar import LEXICON, read_caption, swaps, write_caption
from src.scenes.graph import draw_scene
from src.scenes.second_reader import count_claims
from src.text.align import locate
from src.text.tokenizer import Codec
from src.types import Draft, Revision
from tests.test_experts import _apply, _ask, _draft, _samples

ASSETS = Path(__file__).parents[1] / "assets" / "base"


def wrong_drafts(count: int, seed: int = 0) -> list[Draft]:
    """Captions of scenes with one to three false words each."""
    drafts = []
    for number, (scene, text, rng) in enumerate(_samples(count, seed)):
        made = sorted(rng.sample(options := swaps(scene, text, rng), min(3, len(options))), key=lambda s: -s.start)
        for swap in made:
            text = text[: swap.start] + swap.wrong + text[swap.end :]
        drafts.append(_draft(text, key=f"{number}@s8", scene=scene.to_dict()))
    return drafts


def edits_of(expert, drafts):
    return {key: answer.edits for key, answer in _ask(expert, drafts) if isinstance(answer, Revision)}


def test_some_edits_are_missed_or_wrong_and_by_the_key_alone():
    drafts = wrong_drafts(400)
    right = edits_of(ScenesExpert(), drafts)
    total = sum(map(len, right.values()))

    kept = edits_of(NoisyExpert(expert=ScenesExpert(), misses=0.2), drafts)
    assert all(set(edits) <= set(right[key]) for key, edits in kept.items())
    assert 1 - sum(map(len, kept.values())) / total == pytest.approx(0.2, abs=0.04)  # three standard errors

    noisy = NoisyExpert(expert=ScenesExpert(), wrong=0.3)
    made = edits_of(noisy, drafts)
    pairs = [pair for key in right for pair in zip(right[key], made[key], strict=True)]
    wrong = [(good, bad) for good, bad in pairs if good.target != bad.target]
    assert len(wrong) / total == pytest.approx(0.3, abs=0.05)
    for good, bad in wrong:
        assert (bad.org, bad.start_char) == (good.org, good.start_char) and bad.target != good.org
        assert bad.target.istitle() == good.target.istitle()
        kinds = [words for words in LEXICON.values() if good.target.lower() in words and len(words) > 2]
        assert not kinds or bad.target.lower() in kinds[0]

    shares = edits_of(noisy, drafts[250:]) | edits_of(noisy, drafts[:250][::-1])  # as two ranks would ask
    assert shares == made
    assert edits_of(NoisyExpert(expert=ScenesExpert(), wrong=0.3, seed=1), drafts) != made
    assert not any(edits_of(NoisyExpert(expert=ScenesExpert(), misses=1.0), drafts).values())


def test_shuffled_edits_are_as_many_and_at_words_that_were_right():
    drafts = wrong_drafts(100)
    right = edits_of(ScenesExpert(), drafts)
    for draft in drafts:
        made = edits_of(NoisyExpert(expert=ScenesExpert(), shuffled=True), [draft])[draft.key]
        assert Counter(edit.target for edit in made) == Counter(edit.target for edit in right[draft.key])
        assert len({edit.start_char for edit in made} - {edit.start_char for edit in right[draft.key]}) == len(made)
        assert all(edit.org != edit.target for edit in made)
        assert _apply(draft.text, made).count(" ") == draft.text.count(" ")


def test_a_noisy_expert_that_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"misses must be within 0\.\.1, got 1\.5"):
        NoisyExpert(expert=ScenesExpert(), misses=1.5)
    server = OpenAIExpert(model="m", key_env=None, base_url="http://127.0.0.1:1", codec=Codec.load(ASSETS))
    with pytest.raises(UserError, match="for experts without a server: openai"):
        NoisyExpert(expert=server)


def test_the_own_reading_corrects_instead_of_the_truth(tmp_path):
    path = tmp_path / "readings.jsonl"
    path.write_text(json.dumps({"key": "a@b", "text": "A blue ring."}) + "\n")
    draft = _draft("A red ring.", key="a@b@s8", reference="A red cross.", captions=[{"text": "A red ring."}])
    answers = dict(_ask(ReadingExpert(readings=str(path)), [draft, _draft("A red ring.", key="b@s8", reference="A")]))
    assert [(edit.org, edit.target) for edit in answers["a@b@s8"].edits] == [("red", "blue")]
    assert answers["b@s8"].reason == "no_reference"
    with pytest.raises(UserError, match="there is no nowhere"):
        ReadingExpert(readings="nowhere")


def test_the_second_reader_finds_every_claim_true_and_every_swap_false():
    """Of true captions it counts what they say, and one false word costs a claim, whichever sentence it is in."""
    rng, seen = Random(0), Counter()
    for _ in range(150):
        scene = draw_scene(rng, objects=(2, 6), distinct=True)
        text = write_caption(scene, rng, relation_rates=[1.0, 0.8])
        kinds = Counter(s.statement.kind for s in read_caption(text) if s.statement)
        claims = 4 * kinds["object"] + kinds["relation"] + 2 * kinds["intro"]
        assert count_claims(scene, text) == (claims, claims)
        for swap in swaps(scene, text, rng):
            true, total = count_claims(scene, text[: swap.start] + swap.wrong + text[swap.end :])
            assert (true, total) == (claims - 1, claims), (text, swap)
            seen[swap.fact] += 1
    assert min(seen[fact] for fact in ("object", "attribute", "place", "count", "relation")) > 100


def test_edits_of_a_round_are_told_apart_by_what_they_do(tmp_path):
    codec, drafts = Codec.load(ASSETS), wrong_drafts(30)
    damages = {"right": {}, "wrong": {"wrong": 1.0}, "moved": {"shuffled": True}}
    for name, damage in damages.items():
        expert = NoisyExpert(expert=ScenesExpert(), **damage)
        edits, rows = edits_of(expert, drafts), []
        for draft in drafts:
            ids = [*codec.encode(draft.text)[0], codec.eot_id]
            spans = [asdict(span) for span in locate(codec, ids, edits[draft.key]).spans]
            rows.append(
                {"__key__": draft.key, "json": {"scene": draft.record["scene"], "draft_ids": ids, "spans": spans}}
            )
        options = {"prefix": "round", "per_shard": 16, "kind": "round", "tokenizer": codec.fingerprint, "counts": {}}
        write_shards(tmp_path / name, iter(rows), **options)
        counts = count_edits(tmp_path / name, codec)
        assert counts.total() == sum(len(row["json"]["spans"]) for row in rows) > 50
        if name == "right":
            assert counts["truer"] == counts.total()  # each undoes a false word
        else:  # another wrong word for a wrong one changes little; a word for a right one harms where it says something
            assert counts["truer"] < 0.05 * counts.total() and counts["falser"] > 0
