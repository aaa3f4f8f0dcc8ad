"""Texts as batches: exact rows, hidden prompts, resuming; each kind trained, sampled and evaluated by its command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from datamodules.collate import Collate
from datamodules.shards import Reader, Sample
from datamodules.stream import Stream, read_index
from datamodules.text import TextData
from src.evaluate import main as evaluate
from src.generate import main as generate
from src.models.hf.folder import save_pretrained
from src.models.tiny import tiny
from src.prepare import main as prepare
from src.samplers.predictor import masked_prefix
from src.text.tokenizer import Codec
from src.train import main as train
from src.types import Batch
from testing.files import read_jsonl

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL = [f"model.decoder.{name}={value}" for name, value in SIZES.items()]
CANVAS = {"text": 12, "sft": 24, "smiles": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data of each kind, as the verb writes them."""
    path = tmp_path_factory.mktemp("texts")
    lines = [f"Line {n} of a book {chr(0x4E00 + 7 * n)}, {n * n} words from its end." for n in range(120)]
    (path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    rows = [{"question": f"What is {n} and {n}" + " again" * (n % 4), "answer": f"#### {2 * n}"} for n in range(60)]
    (path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    molecules = [f"{'C' * (n % 9 + 1)}{'C1CC1' * (n // 60)}{'N' * (n // 9 % 7)}" for n in range(70)]
    (path / "smiles.csv").write_text("smiles\n" + "".join(f"{text}\n" for text in molecules))
    for kind, ending in (("text", "txt"), ("sft", "jsonl"), ("smiles", "csv")):
        more = ["prepare.split=rows", "prepare.vocab_size=300"] if kind == "text" else []
        sizes = [f"prepare.response_length={CANVAS[kind]}", "prepare.per_shard=16"]
        prepare([f"conf={kind}", f"prepare.files={path / kind}.{ending}", f"prepare.out={path / kind}", *sizes, *more])
    return path


def data(folder: Path, kind: str, **changed: Any) -> TextData:
    settings: dict[str, Any] = {"batch_size": 4, "response_length": CANVAS[kind], "seed": 5, **changed}
    return TextData(path=str(folder / kind), codec=Codec.load(folder / kind / "tokenizer"), **settings)


def stored(folder: Path) -> list[Sample]:
    index = read_index(folder, image=False)
    stream = Stream([index], seed=0, shuffle=False)
    return list(Reader(stream).samples(stream.places(0, index.count)))


def at_epoch(module: TextData, epoch: int) -> list[Batch]:
    module.trainer = SimpleNamespace(current_epoch=epoch, global_rank=0, world_size=1)  # type: ignore[assignment]
    return list(module.train_dataloader())


def test_packed_rows_come_as_they_were_cut(folder: Path) -> None:
    module = data(folder, "text")
    batches = list(module.val_dataloader())
    cut = [sample.record["captions"][0]["ids"] for sample in stored(folder / "text" / "val")]
    assert [row for batch in batches for row in batch.response.tolist()] == cut
    for batch in batches:
        assert batch.editable.all() and torch.equal(batch.flawed, batch.response) and not batch.span.any()
        assert batch.prefix["prompt_ids"].tolist() == [[module.codec.bos_id]] * len(batch)
        assert set(batch.prefix) == {"prompt_ids"} and batch.images == [b""] * len(batch)
        assert not (batch.response == module.codec.eot_id).any()
    trained = [sample.record["captions"][0] for sample in stored(folder / "text" / "train")]
    assert any(module.codec.encode(row["text"])[0] != row["ids"] for row in trained)  # why the ids are kept
    assert not module.notes


def test_responses_end_in_eot_behind_prompts_of_different_length(folder: Path) -> None:
    module = data(folder, "sft")
    codec = module.codec
    for batch in module.val_dataloader():
        for row, record in enumerate(batch.records):
            answer = codec.encode(record["captions"][0]["text"])[0]
            fill = [codec.eos_id] * (CANVAS["sft"] - len(answer) - 1)
            assert batch.response[row].tolist() == [*answer, codec.eot_id, *fill]
            mask = batch.prefix.get("prompt_mask", torch.ones_like(batch.prefix["prompt_ids"], dtype=torch.bool))
            shown = batch.prefix["prompt_ids"][row][mask[row]].tolist()
            assert shown == codec.prompt_ids(record["prompt"], images=0)


def test_a_sample_without_an_image_is_damaged_only_where_there_should_be_one(folder: Path) -> None:
    text = read_index(folder / "sft" / "val", image=False)
    assert all(sample.image is None and sample.data == b"" for sample in stored(folder / "sft" / "val"))
    reader = Reader(Stream([read_index(folder / "sft" / "val")], seed=0, shuffle=False), stand_in=False)
    assert list(reader.samples(reader.stream.places(0, text.count))) == []
    assert sum(reader.damage.values()) == text.count


def hidden_keys(folder: Path, epoch: int, **changed: Any) -> set[str]:
    module = data(folder, "smiles", prompt_dropout=0.3, **changed)
    keys = set()
    for batch in at_epoch(module, epoch):
        rows = (batch.prefix["prompt_ids"] == module.codec.mask_id).all(1).tolist()
        keys |= {key for key, hidden in zip(batch.keys, rows, strict=True) if hidden}
    return keys


def test_hidden_prompts_are_a_function_of_seed_pass_and_key(folder: Path) -> None:
    first = hidden_keys(folder, 0, batch_size=1)
    assert first == hidden_keys(folder, 0, batch_size=1, workers=2)
    assert first == hidden_keys(folder, 0, batch_size=len(stored(folder / "smiles" / "train")))
    others = hidden_keys(folder, 1, batch_size=1), hidden_keys(folder, 0, batch_size=1, seed=6)
    assert len({frozenset(keys) for keys in (first, *others)}) == 3


def test_share_of_hidden_prompts(folder: Path) -> None:
    """Of 20000 draws with p = 0.1 the share is within 5 standard deviations; 0 hides none and 1 all."""
    codec = Codec.load(folder / "smiles" / "tokenizer")
    (sample, *_) = stored(folder / "smiles" / "train")
    for share in (0.0, 0.1, 1.0):
        collate = Collate(codec, response_length=8, layout=None, seed=3, prompt_dropout=share)
        shown = codec.prompt_ids(sample.record["prompt"], images=0)
        prompts = [collate.prompt_ids(replace(sample, passes=number)) for number in range(20_000)]
        assert {tuple(ids) for ids in prompts} <= {tuple(shown), (codec.mask_id,) * len(shown)}
        hidden = sum(ids != shown for ids in prompts) / len(prompts)
        assert abs(hidden - share) <= 5 * (share * (1 - share) / len(prompts)) ** 0.5
    with pytest.raises(ValueError, match=r"prompt_dropout must be within 0\.\.1, got 1\.5"):
        data(folder, "smiles", prompt_dropout=1.5)


def test_a_hidden_prompt_is_what_guidance_shows(folder: Path) -> None:
    """Embeddings of a batch whose prompts are all hidden are those of the sampler's hidden prefix; rows are padded."""
    mixed = {"bucket": None}  # prompts of several lengths in a batch
    dropped, shown = (next(iter(at_epoch(data(folder, "sft", prompt_dropout=p, **mixed), 0))) for p in (1.0, 0.0))
    assert dropped.keys == shown.keys and "prompt_mask" in shown.prefix
    codec = Codec.load(folder / "sft" / "tokenizer")
    backbone = tiny(codec, decoder=SIZES, vision=None)
    one, two = backbone.encode_prefix(dropped.prefix), backbone.encode_prefix(shown.prefix)
    expected = masked_prefix(backbone, two, codec.special)
    assert one.mask is not None and expected.mask is not None and torch.equal(one.mask, expected.mask)
    torch.testing.assert_close(one.embeds[one.mask], expected.embeds[one.mask], rtol=0, atol=0)


def test_evaluation_hides_no_prompt(folder: Path) -> None:
    module = data(folder, "smiles", prompt_dropout=1.0)
    drafted = [batch for _, batch in module.draft_dataloader(1, 3)]
    batches = [*module.val_dataloader(), *module.test_dataloader(), *drafted]
    assert not any((batch.prefix["prompt_ids"] == module.codec.mask_id).any() for batch in batches)


@pytest.mark.parametrize(
    ("kind", "conf", "more"),
    [
        ("text", "mask", []),
        ("sft", "stage1", ["objective.hallucination=none"]),
        ("smiles", "mask", ["data.prompt_dropout=0.5"]),
    ],
)
def test_each_kind_trains_and_samples(folder: Path, tmp_path: Path, kind: str, conf: str, more: list[str]) -> None:
    model, response_length = tmp_path / "run" / "model", CANVAS[kind]
    steps = ["trainer.max_steps=3", "optim.warmup_steps=1", "data.batch_size=8", "data.workers=0"]
    where = [f"data.path={folder / kind}", f"run_dir={tmp_path / 'run'}", f"data.response_length={response_length}"]
    train([f"conf={conf},task/{kind}", *where, *steps, *SMALL, *more])
    assert json.loads((tmp_path / "run" / "finished.json").read_text()) == {"steps": 3}
    assert json.loads((model / "config.json").read_text())["response_length"] == response_length

    def sampled(prompt: str, *options: str) -> list[dict]:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        given = [f"model.path={model}", "images=null", f"prompt={prompt}", f"out={out}", "sampler=plain", "steps=3"]
        generate(["conf=generate", *given, *options])
        return read_jsonl(out)

    keys = [sample.key for sample in stored(folder / kind / "test")]
    lines = sampled(str(folder / kind / "test"), "temperature=1")
    assert [line["key"] for line in lines] == keys and {line["forwards"] for line in lines} == {3}
    guided = sampled(str(folder / kind / "test"), "temperature=1", "cfg_scale=1")
    assert {line["forwards"] for line in guided} == {6}
    assert len(sampled("''")) == 1  # without a prompt


@pytest.mark.parametrize("kind", ["text", "smiles"])
def test_models_of_text_are_evaluated(folder: Path, tmp_path: Path, kind: str) -> None:
    codec = Codec.load(folder / kind / "tokenizer")
    save_pretrained(tiny(codec, decoder=SIZES, vision=None), codec, tmp_path / "model")
    settings = {
        "models": {"mask": None, "stage1": None, "stage2": None, "mine": str(tmp_path / "model")},
        "data": {"target": "datamodules.text.TextData", "path": str(folder / kind), "response_length": CANVAS[kind]},
        "metrics": [{"target": "src.metrics.text.TextHealth"}, {"target": "src.metrics.text.ReferenceOverlap"}],
        "headline": ["word_f1"], "tokens_per_step": [8], "num": 3, "out": str(tmp_path / "out"),
    }  # fmt: skip
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"base": ["evaluate"], "evaluate": settings}))
    evaluate([f"conf={file}"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())["methods"]["mine"]
    assert results["plain"]["8"]["word_f1"]["n"] == 3
