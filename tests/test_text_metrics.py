"""Metrics of texts against hand-computed ones: variety, final answers, molecules, generative perplexity."""

from __future__ import annotations

import math
import statistics
import sys
from collections import Counter
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from src.cli.instantiate import build, check
from src.io.shards import write_shards
from src.metrics.answer import ExactMatch, answer_of
from src.metrics.perplexity import GenerativePerplexity
from src.metrics.smiles import Smiles, chemistry
from src.metrics.variety import Variety
from src.text.tokenizer import Codec

with_rdkit = pytest.mark.skipif(find_spec("rdkit") is None, reason="rdkit is not installed (the extra `smiles`)")


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.train(["a red ring and a blue ring are here, the dog runs"] * 4, vocab_size=60)


def answered(number) -> dict:
    return {"key": "x", "captions": [{"text": f"so it is {number}.\n#### {number}"}]}


def test_entropy_and_repeats_by_hand():
    # a b a b c: shares 2/5, 2/5, 1/5; bigrams ab ba ab bc: one of four repeats; trigrams aba bab abc: none
    scores = Variety(sizes=[1, 2, 3]).score("A b, a b c!", {})
    entropy = -(2 * 0.4 * math.log(0.4) + 0.2 * math.log(0.2))
    assert scores == {"entropy": pytest.approx(entropy), "repeat_1": 0.4, "repeat_2": 0.25, "repeat_3": 0.0}
    assert set(Variety().score(" .. ", {}).values()) == {0.0}


def test_distinct_n_is_over_the_whole_set_and_merges():
    texts = ["a red ring", "a red cross a red", "", "b"]
    left, right = Variety(sizes=[1, 2]), Variety(sizes=[1, 2])
    left.update(texts[:1], [{}])
    right.update(texts[1:], [{}] * 3)
    left.merge_state(right)
    words = [text.split() for text in texts]
    bigrams = [pair for some in words for pair in pairwise(some)]
    stats = left.compute()
    assert stats["distinct_1"]["mean"] == len({w for some in words for w in some}) / sum(map(len, words))
    assert stats["distinct_2"]["mean"] == len(set(bigrams)) / len(bigrams)


def test_tokens_are_those_of_the_tokenizer(codec):
    text = "the dog runs and the dog runs"
    counts = Counter(codec.encode(text)[0])
    shares = [count / counts.total() for count in counts.values()]
    node = {"target": "src.metrics.variety.Variety", "unit": "tokens", "sizes": [2]}
    check(node, offers=["codec"])
    metric = build(node, codec=codec)
    metric.update([text], [{}])
    stats = metric.compute()
    assert list(stats) == ["token_entropy", "token_repeat_2", "token_distinct_2"]
    assert stats["token_entropy"]["mean"] == pytest.approx(-sum(p * math.log(p) for p in shares))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 * 7 = 42\n####42", 42),
        ("#### 1 234 567.50", 1234567.5),
        ("#### .5", 0.5),
        ("#### $18.", 18),
        ("#### -$1,000", -1000),
        ("#### $-2", -2),
        ("#### 12 34", 12),
        ("#### 5 apples\n#### 6", 5),
        ("#### 1,2345", 1),
        ("####\n72", None),
        ("### 72", None),
    ],
)
def test_answers(text, number):
    answer = answer_of(text)
    assert answer == number or float(answer) == number


def test_exact_match_compares_values():
    scores = [ExactMatch().score(text, answered("1,000")) for text in ("#### 1000.0", "#### 100", "1,000", "")]
    assert [score["exact_match"] for score in scores] == [1, 0, 0, 0]
    assert [score["answered"] for score in scores] == [1, 1, 0, 0]
    metric = ExactMatch()
    metric.update(["#### 5", "#### 6", "#### 5.0"], [{**answered(5), "key": key} for key in "abc"])
    assert metric.compute()["exact_match"]["mean"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="'x' has no answer after ####"):
        metric.update(["#### 5"], [{"key": "x", "captions": [{"text": "five"}]}])


def test_a_missing_rdkit_says_what_to_install(monkeypatch):
    chemistry.cache_clear()
    monkeypatch.setitem(sys.modules, "rdkit", None)  # what an absent package looks like to `import`
    try:
        with pytest.raises(ValueError, match=r"pip install rediff-lightning\[smiles\]"):
            Smiles()
    finally:
        chemistry.cache_clear()


@with_rdkit
def test_molecules_by_hand(tmp_path, capfd):
    # ethanol twice in two ways, benzene, cyclohexane, a pyridine that is new; no molecule: a ring left open, "", words
    texts = ["CCO", "OCC", "c1ccccc1", "C1CCCCC1", " n1ccccc1 ", "C1CC", "", "a ring"]
    training = ["C1=CC=CC=C1", "C(C)O", "N"]  # benzene and ethanol, written in another way
    samples = [
        {"__key__": str(i), "json": {"key": str(i), "captions": [{"text": t}]}}
        for i, t in enumerate([*training, "C(("])
    ]
    write_shards(tmp_path / "train", samples, prefix="train", per_shard=3, kind="text", tokenizer=None)
    metric = Smiles(property="rings", train=str(tmp_path))
    metric.update(texts, [{}] * len(texts))
    stats = metric.compute()
    assert stats["valid"]["mean"] == 5 / 8
    assert stats["unique"] == {"mean": 4 / 5, "se": None, "n": 5}
    assert stats["novel"] == {"mean": 2 / 4, "se": None, "n": 4}
    assert stats["num_novel"]["mean"] == 2
    assert stats["rings"] == {"mean": 1.0, "se": 0.0, "n": 2}
    assert [metric.score(text, {})["valid"] for text in texts] == [1, 1, 1, 1, 1, 0, 0, 0]
    assert capfd.readouterr().err == ""


@with_rdkit
def test_molecules_without_a_training_set_and_properties():
    metric = Smiles(property="weight")
    metric.update(["O", "CCO", "OCC", "X"], [{}] * 4)
    stats = metric.compute()
    assert list(stats) == ["valid", "unique", "weight"]
    weights = [2 * 1.008 + 15.999, 2 * 12.011 + 6 * 1.008 + 15.999]
    assert stats["weight"]["mean"] == pytest.approx(statistics.mean(weights), abs=1e-3)
    assert stats["weight"]["se"] == pytest.approx(statistics.stdev(weights) / math.sqrt(2), abs=1e-3)
    with pytest.raises(ValueError, match="holds no split 'train'"):
        Smiles(train="nowhere")
    nothing = Smiles(property="logp")
    nothing.update(["???"], [{}])
    assert nothing.compute()["unique"] == {"mean": 0.0, "se": None, "n": 0}
    assert math.isnan(nothing.compute()["logp"]["mean"])
    cages = Smiles(property="rings")
    cages.update(["C1CC2CC1C2", "C12C3C4C1C5C2C3C45", "c1ccc2ccccc2c1"], [{}] * 3)  # bonds - atoms + 1: 2, 5, 2
    assert cages.compute()["rings"]["mean"] == 3
    left, right = Smiles(property="qed"), Smiles(property="qed")
    left.update(["CCO", "C"], [{}] * 2)
    right.update(["OCC", "c1ccccc1"], [{}] * 2)
    left.merge_state(right)
    assert left.compute()["unique"]["mean"] == 3 / 4
    assert 0 < left.compute()["qed"]["mean"] < 1


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no-bos"])
def judge(request, codec, tmp_path_factory):
    """A tiny GPT-2 with a tokenizer of its own; its folder, and whether that has a token for the start."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=80, n_positions=24, n_embd=16, n_layer=2, n_head=2)).save_pretrained(folder)
    tokenizer = codec.tokenizer.__class__(tokenizer_object=codec.tokenizer.backend_tokenizer)
    if request.param:
        tokenizer.bos_token = codec.tokenizer.convert_ids_to_tokens(codec.eos_id)
    tokenizer.save_pretrained(folder)
    return folder


def test_perplexity_is_that_of_a_written_out_loop(judge, codec):
    texts = ["a red ring", "the dog runs and the dog runs", "", "ring ring ring a", "a", "the dog " * 30]
    model = GPT2LMHeadModel.from_pretrained(judge).eval()
    with_bos = '"bos_token": "' in (judge / "tokenizer_config.json").read_text()
    sums, counts = [], []
    for text in texts:
        ids = [*([codec.eos_id] if with_bos else []), *codec.encode(text)[0]][:24]
        total = 0.0
        for place in range(1, len(ids)):
            with torch.no_grad():
                logits = model(torch.tensor([ids[:place]])).logits[0, -1].double()
            total -= float(logits.log_softmax(-1)[ids[place]])
        sums.append(total)
        counts.append(max(0, len(ids) - 1))
    expected = sum(sums) / sum(counts)
    for batch_size in (1, 4):
        metric = GenerativePerplexity(model=str(judge), batch_size=batch_size)
        metric.update(texts[:2], [{}] * 2)
        metric.update(texts[2:], [{}] * 4)
        stats = metric.compute()
        assert stats["gen_nll"]["mean"] == pytest.approx(expected, rel=1e-5)
        assert stats["gen_perplexity"]["mean"] == pytest.approx(math.exp(expected), rel=1e-4)
        residuals = [s - expected * n for s, n in zip(sums, counts, strict=True)]
        error = math.sqrt(sum(r * r for r in residuals) / 5 / 6) / (sum(counts) / 6)
        assert stats["gen_nll"]["se"] == pytest.approx(error, rel=1e-4)
        assert stats["gen_nll"]["n"] == 6
