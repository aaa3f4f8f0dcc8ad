"""A gap, the token that stands for nothing: written, stripped, trained on, and kept with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import src.draft
import src.evaluate
import src.generate
import src.revise
import src.train
from datamodules.collate import draft_row
from src.diffusion.corruption import Only, ShowGaps, Span, start
from src.diffusion.noise import Noise
from src.io.files import read_json
from src.io.shards import read_manifest, read_shard
from src.metrics.text import response_counts
from src.rounds.drafts import read_drafts
from src.samplers.rediff import OverwriteAll
from src.samplers.sampler import Sampler
from src.text.align import Span as TokenSpan
from src.text.align import apply_spans, locate
from src.text.tokenizer import BOS, Codec
from src.types import Batch, Edit, Kind, Prefix
from testing.scenes import BASE, write_scenes
from testing.verbs import refusal

ROOT = Path(__file__).resolve().parents[1]
NUM, PROMPT = 24, "Describe the picture."


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load(BASE).with_format(gap=BOS)


def correction(codec: Codec, text: str, *edits: Edit) -> dict[str, Any]:
    """The record of a corrected draft."""
    aligned = locate(codec, [*codec.encode(text)[0], codec.eot_id], edits)
    assert not aligned.rejected
    return {"draft_ids": aligned.ids, "spans": [vars(span) for span in aligned.spans]}


class Ringer:
    """A backbone that wants a gap at every second place, and `ring` at the others."""

    def __init__(self, codec: Codec) -> None:
        self.codec, self.wanted = codec, torch.tensor([codec.encode(" ring")[0][0], codec.bos_id])

    def __call__(self, prefix: Prefix, tokens: Tensor, *, attend: Any = None, positions: Any = None) -> Tensor:
        logits = torch.zeros(*tokens.shape, self.codec.vocab_size)
        places = torch.arange(tokens.shape[1])
        logits[:, places, self.wanted[places % 2]] = 9.0
        logits[:, places, self.codec.eot_id] = 5.0
        return logits[positions] if positions is not None else logits


@pytest.mark.parametrize("gapped", [True, False])
def test_a_sampler_writes_gaps_only_where_there_is_one(codec: Codec, gapped: bool) -> None:
    one = codec if gapped else codec.with_format(gap="")
    sampler = Sampler(length=8, tokens_per_step=2, reviser=OverwriteAll(), post_steps=1)
    prefix = Prefix(torch.zeros(1, 1, 1))
    ids = sampler(Ringer(codec), prefix, special=one.special, keys=["a"], seed=0).ids[0].tolist()
    ring = codec.encode(" ring")[0]
    if gapped:
        assert ids == [*ring, codec.gap_id] * 4  # gaps stay ordinary places: they neither end a text nor fill it up
        assert one.decode(ids) == " ring" * 4
    else:
        assert ids == [*ring, *[one.eot_id], *[one.eos_id] * 6]
    counts = response_counts(ids, one.special)
    assert counts["tokens"] == (4 if gapped else 1)
    assert counts.get("gaps") == (4 if gapped else None)
    assert counts["inner_eos"] == 0


def test_a_corrected_draft_in_a_batch(codec: Codec) -> None:
    """Flawed is the draft and response the corrected text, whatever was removed and put in."""
    text, right = "A a small ring is red.", "A small blue ring is red."
    record = correction(codec, text, Edit("A a", "A"), Edit("small", "small blue"))
    row = draft_row(record).fit(16, codec.eos_id)
    assert codec.decode(row.flawed) == text
    assert codec.decode(row.response) == right
    assert [a != b for a, b in zip(row.flawed, row.response, strict=True)] == [n > 0 for n in row.span]
    assert sorted(set(row.span)) == [0, 1, 2]


def spans_with_gaps(codec: Codec, rows: int = 400) -> Batch:
    """Four spans a row: one that removes, one that replaces, one that removes, one that puts in."""
    text = "A a small red ring is is red."
    edits = Edit("A a", "A"), Edit("red ring", "blue ring"), Edit("is is", "is"), Edit("red.", "red red.")
    row = draft_row(correction(codec, text, *edits)).fit(16, codec.eos_id)
    response, flawed, span = (torch.tensor([part] * rows) for part in (row.response, row.flawed, row.span))
    keys = [f"k{number}" for number in range(rows)]
    everywhere = torch.ones_like(span, dtype=torch.bool)
    return Batch({}, response, everywhere, flawed, span, torch.ones(rows, dtype=torch.bool), keys)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_corrections_with_gaps_are_shown_as_made_by_their_share(codec: Codec, share: float) -> None:
    assert codec.gap_id is not None
    with pytest.raises(ValueError, match=r"spans with gaps that are shown corrected must be within 0\.\.1"):
        ShowGaps(gap=2, correct_rate=share + 1.1)
    batch = spans_with_gaps(codec)
    first = start(batch, torch.ones(len(batch)))
    shown = Only(Span(num=None, kind=Kind.MISTAKE), rest=Kind.DRAFT)(batch, first, Noise(batch.keys, seed=0))
    state = ShowGaps(gap=codec.gap_id, correct_rate=share)(batch, shown, Noise(batch.keys, seed=1))
    assert torch.equal(state.kind, shown.kind)  # they are still what the term of the mistakes looks at
    corrected = {}
    for number in (1, 2, 3, 4):
        where = batch.span == number
        right = (state.tokens == batch.response) | ~where
        wrong = (state.tokens == batch.flawed) | ~where
        assert (right.all(1) | wrong.all(1)).all()  # a correction is shown as a whole
        corrected[number] = right.all(1).float()
    assert corrected[2].sum() == corrected[4].sum() == 0
    assert abs(corrected[1].mean() - share) < 0.08
    assert abs(corrected[3].mean() - share) < 0.08
    if share == 0.5:
        assert abs(torch.stack([corrected[1], corrected[3]]).corrcoef()[0, 1]) < 0.15  # each by itself


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", num_train=NUM, num_val=1, num_test=2, prompt=PROMPT)


@pytest.fixture(scope="module")
def drafts(data: Path) -> Path:
    out = data.parent / "drafts"
    src.draft.main([
        "conf=draft", f"model.path={BASE}", f"data.path={data}", f"out={out}", "tokens_per_step=[16]",
    ])  # fmt: skip
    return out


def revise(drafts: Path, out: Path, tokenizer: Path, *settings: str) -> dict[str, Any]:
    places = [f"drafts={drafts}", f"out={out}", f"tokenizer={tokenizer}"]
    src.revise.main(["conf=revise,expert/scenes", *places, *settings])
    return read_manifest(out)


def test_a_round_with_a_gap_places_what_a_round_without_drops(drafts: Path, tmp_path: Path, codec: Codec) -> None:
    any_length = "expert.lengths=any"
    same = revise(drafts, tmp_path / "same", BASE)
    dropped = revise(drafts, tmp_path / "dropped", BASE, any_length)
    gapped = revise(drafts, tmp_path / "gapped", BASE, any_length, f"gap={BOS}")
    assert not same["rejected"]
    unequal = dropped["rejected"]["unequal_length"]
    assert unequal > 0
    assert not gapped["rejected"]
    assert gapped["counts"]["edits"] == dropped["counts"]["edits"] + unequal
    assert gapped["counts"]["stretched"] + gapped["counts"]["shortened"] == unequal
    assert not {"stretched", "shortened"} & (same["counts"].keys() | dropped["counts"].keys())
    written = {draft.key: draft for chunk in read_drafts(drafts) for draft in chunk}
    for shard in gapped["shards"]:
        for sample in read_shard(tmp_path / "gapped" / shard["name"]):
            record, before = sample["json"], written[sample["json"]["key"]]
            ids = record["draft_ids"]
            assert codec.decode(ids) == record["text"] == before.text
            assert [token for token in ids if token != codec.gap_id] == before.token_ids
            row = draft_row(record)
            assert row.flawed == ids
            assert row.response == apply_spans(ids, [TokenSpan(**span) for span in record["spans"]])


@pytest.mark.slow
def test_a_gap_is_given_once_and_then_known(data: Path, drafts: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Train with it: the model's folder has it, for drafting, revising, captions and evaluation."""
    monkeypatch.chdir(tmp_path)
    revise(drafts, tmp_path / "round", BASE, "expert.lengths=any", f"gap={BOS}")
    train = [
        "conf=stage2", f"data.rounds=[{tmp_path / 'round'}]", "callbacks.self_correction=null", "run_dir=run",
        "data.batch_size=4", "data.workers=0", "trainer.max_steps=2", "trainer.limit_val_batches=0",
        "callbacks.samples=null", "optim.warmup_steps=1", f"model.path={BASE}", f"tokenizer={BASE}",
        f"data.path={data}",
    ]  # fmt: skip
    message = "was made with a gap token, but this run has none: set gap=TOKEN"
    assert f"{tmp_path / 'round'} {message}" in refusal(src.train.main, train, capsys)
    src.train.main([*train, f"gap={BOS}"])
    model = tmp_path / "run" / "model"
    assert yaml.safe_load((model / "prompt.yaml").read_text())["gap"] == BOS
    assert Codec.load(model).gap_id is not None
    (Path("run") / "finished.json").unlink()
    assert f"holds a run with other settings (gap: {BOS} in the run, null now)" in refusal(
        src.train.main, train, capsys
    )

    again = ["conf=draft", f"model.path={model}", f"data.path={data}", "out=drafts", "tokens_per_step=[16]", "num=4"]
    src.draft.main(again)
    assert read_manifest("drafts")["settings"]["gap"] == BOS
    assert "gap" not in read_manifest(drafts)["settings"]
    made = revise(tmp_path / "drafts", tmp_path / "next", model, "expert.lengths=any")
    assert "unequal_length" not in made["rejected"]
    src.generate.main([
        "conf=generate", f"model.path={model}", f"images={data / 'test'}", "out=captions.jsonl", "tokens_per_step=16",
    ])  # fmt: skip
    src.evaluate.main([
        "conf=evaluate", f"evaluate.models.mask={BASE}", f"evaluate.models.stage1={model}", "evaluate.out=table",
        "evaluate.models.stage2=null", "evaluate.samplers.plain=null", "evaluate.tokens_per_step=[16]",
        f"evaluate.data.path={data}", "evaluate.num=2",
    ])  # fmt: skip
    methods = read_json(Path("table/results.json"))["methods"]
    assert ["gaps" in methods[name]["refine"]["16"] for name in ("mask", "stage1")] == [
        False,
        True,
    ]  # each model with its own gap
