"""Captions and rounds as batches: what is in them, how rounds are mixed in, resuming a real trainer."""

from __future__ import annotations

import io
import logging
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.captions import CaptionData
from datamodules.collate import image_inputs
from src.io.errors import UserError
from src.io.shards import write_shards
from src.models.tiling import anyres
from src.models.tiny import tiny
from src.text.tokenizer import Codec

TEXTS = ("A red ring.", "A blue cross is here.")
WORDS = "Describe the picture. Which? user assistant red blue green ring cross A is here."
CANVAS = 12


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.train([WORDS] * 3 + list(TEXTS) * 3, vocab_size=400, alphabet="bytes")


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def picture(number: int) -> bytes:
    return png(Image.new("RGB", (4, 4), (number, 255, 0)))


def swap(codec: Codec, text: str, right: str, wrong: str) -> dict:
    """A swap with its tokens, found by comparing the two encodings."""
    start = text.index(right)
    ids = codec.encode(text)[0]
    false = codec.encode(text[:start] + wrong + text[start + len(right) :])[0]
    assert len(ids) == len(false)
    changed = [i for i, (a, b) in enumerate(zip(ids, false, strict=True)) if a != b]
    first, end = changed[0], changed[-1] + 1
    return {"start": start, "end": start + len(right), "tokens": [first, end, false[first:end]]}


def record(codec: Codec, number: int) -> dict:
    swaps = [swap(codec, TEXTS[0], "red", "blue"), swap(codec, TEXTS[0], "ring", "cross")]
    captions = [{"text": TEXTS[0], "swaps": swaps}, {"text": TEXTS[1], "swaps": []}]
    prompt = "Describe the picture." if number % 2 else "Which?"
    return {"key": f"k{number:03d}", "prompt": prompt, "captions": captions}


def write(folder: Path, codec: Codec, records: list[dict], kind: str, images: list[bytes] | None = None) -> Path:
    images = images or [picture(number) for number in range(len(records))]
    samples = ({"__key__": r["key"], "json": r, "png": image} for r, image in zip(records, images, strict=True))
    write_shards(folder, samples, prefix="s", per_shard=8, kind=kind, tokenizer=codec.fingerprint)
    return folder


def draft(codec: Codec, number: int) -> dict:
    """A draft that says "A blue ring." where "red" is right."""
    ids = [*codec.encode("A blue ring.")[0], codec.eot_id]
    right = swap(codec, "A blue ring.", "blue", "red")["tokens"]
    spans = [{"start": right[0], "end": right[1], "target_ids": right[2]}]
    return {"key": f"d{number:03d}", "prompt": "Which?", "draft_ids": ids, "spans": spans}


@pytest.fixture
def folder(tmp_path: Path, codec: Codec) -> Path:
    for split, count in (("train", 20), ("val", 5), ("test", 3)):
        write(tmp_path / "data" / split, codec, [record(codec, n) for n in range(count)], "captions")
    return tmp_path / "data"


@pytest.fixture
def round_folder(tmp_path: Path, codec: Codec) -> Path:
    return write(tmp_path / "round-0001", codec, [draft(codec, n) for n in range(9)], "round")


def data(folder: Path, codec: Codec, **changed: Any) -> CaptionData:
    settings: dict[str, Any] = {"batch_size": 4, "response_length": CANVAS, "image_size": 4, "seed": 5}
    return CaptionData(path=str(folder), codec=codec, **{**settings, **changed})


def test_an_evaluation_batch_by_hand(folder: Path, codec: Codec) -> None:
    first, second = data(folder, codec).val_dataloader()
    assert first.keys == ["k000", "k001", "k002", "k003"]
    assert second.keys == ["k004"]
    right, wrong = codec.encode("A red ring.")[0], codec.encode("A blue cross.")[0]
    length = len(right)
    fill = [codec.eos_id] * (CANVAS - length - 1)
    assert first.response.tolist() == [[*right, codec.eot_id, *fill]] * 4
    assert first.flawed.tolist() == [[*wrong, codec.eot_id, *fill]] * 4
    numbers = first.span[0].tolist()
    assert [n > 0 for n in numbers[:length]] == [a != b for a, b in zip(right, wrong, strict=True)]
    assert sorted(set(numbers)) == [0, 1, 2]
    assert not any(numbers[length:])
    assert first.editable.all()
    assert not first.drafted.any()
    assert (first.passes, first.order) == ([0] * 4, [0, 1, 2, 3])
    assert (first.records[1]["key"], first.images[1]) == ("k001", picture(1))
    pixels = first.prefix["pixel_values"]
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (4, 1, 3, 4, 4))
    assert [channel.unique().tolist() for channel in pixels[3, 0]] == [[3], [255], [0]]
    assert first.prefix["num_tiles"].tolist() == [[1]] * 4
    assert first.prefix["image_sizes"].tolist() == [[[4, 4]]] * 4


def test_rows_of_several_images_are_filled_with_empty_tiles() -> None:
    values = np.random.default_rng(0).integers(1, 256, (3, 16, 16, 3), dtype=np.uint8)
    wide, tall, small = (Image.fromarray(values[n]).resize(size) for n, size in enumerate([(16, 8), (8, 24), (8, 8)]))
    layout = anyres(8, columns=3, rows=3)
    inputs = image_inputs([[wide, small], [], [tall]], layout)
    assert inputs["num_tiles"].tolist() == [[3, 2], [0, 0], [4, 0]]
    assert inputs["image_sizes"].tolist() == [[[16, 8], [8, 8]], [[0, 0], [0, 0]], [[8, 24], [0, 0]]]
    pixels = inputs["pixel_values"].permute(0, 1, 3, 4, 2).numpy()  # (B, T, S, S, 3)
    np.testing.assert_array_equal(pixels[0], np.concatenate([layout.tiles(wide), layout.tiles(small)]))
    np.testing.assert_array_equal(pixels[2, :4], layout.tiles(tall))
    assert not pixels[1].any() and not pixels[2, 4:].any()


def test_tiled_images_reach_a_model_of_the_same_layout(tmp_path: Path, codec: Codec) -> None:
    """Images of different shapes in one batch, as shards hold them, and micro-batches of it."""
    shapes = [(20, 12), (8, 8), (9, 40), (31, 33)]
    records = [record(codec, n) for n in range(4)]
    noise = [Image.effect_noise(shape, 20 * n + 20).convert("RGB") for n, shape in enumerate(shapes)]
    for split in ("train", "val"):
        write(tmp_path / split, codec, records, "captions", [png(image) for image in noise])
    layout = anyres(8, columns=3, rows=3)
    module = data(tmp_path, codec, image_size=8, tiling=layout)
    (batch,) = module.val_dataloader()
    assert batch.prefix["image_sizes"][:, 0].tolist() == [list(shape) for shape in shapes]
    assert batch.prefix["num_tiles"][:, 0].tolist() == [layout.num_tiles(shape) for shape in shapes]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    backbone = tiny(codec, decoder=sizes, vision=vision, tiling=layout)
    prefix = backbone.encode_prefix(batch.prefix)
    tokens = [layout.num_tokens(shape, side=2) + len(codec.prompt_ids(r["prompt"])) - 1
              for shape, r in zip(shapes, records, strict=True)]  # fmt: skip
    assert prefix.mask is not None and prefix.mask.sum(1).tolist() == tokens
    for row, part in enumerate(batch.split(1)):
        torch.testing.assert_close(backbone.encode_prefix(part.prefix).embeds[0], prefix.embeds[row, : tokens[row]])
    assert module.draft_settings()["tiling"] == layout.to_dict()
    with pytest.raises(ValueError, match=r"row 0: an image of 20 x 12 pixels comes as 1 tiles, .* makes 7 of it"):
        backbone.encode_prefix(next(iter(data(tmp_path, codec, image_size=8).val_dataloader())).prefix)


def test_training_takes_each_image_once_and_captions_by_pass(folder: Path, codec: Codec) -> None:
    module = data(folder, codec)
    module.trainer = trainer = SimpleNamespace(current_epoch=0, global_rank=0, world_size=1)  # type: ignore[assignment]
    taken: dict[str, list[str]] = {}
    for trainer.current_epoch in range(6):
        batches = list(module.train_dataloader())
        assert sorted(k for b in batches for k in b.keys) == [f"k{n:03d}" for n in range(20)]
        assert {number for b in batches for number in b.passes} == {trainer.current_epoch}
        for b in batches:
            for key, ids in zip(b.keys, b.response.tolist(), strict=True):
                taken.setdefault(key, []).append(codec.decode(ids))
    assert set(taken["k003"]) == set(TEXTS)  # 6 epochs: one caption only has a chance of 1 in 32, fixed by the seed
    trainer.current_epoch = 2
    batches = list(module.train_dataloader())
    rows = [row for b in batches for row in zip(b.keys, b.response.tolist(), strict=True)]
    assert {key: codec.decode(ids) for key, ids in rows} == {key: texts[2] for key, texts in taken.items()}


def test_too_long_responses_are_cut_and_reported_once(folder, codec, caplog):
    right, wrong = codec.encode("A red ring.")[0], codec.encode("A blue cross.")[0]
    changed = [i for i, (a, b) in enumerate(zip(right, wrong, strict=True)) if a != b]
    length = changed[-1]  # the cut goes through or before the second span
    module = data(folder, codec, response_length=length)
    with caplog.at_level(logging.WARNING):
        batches = [*module.val_dataloader(), *module.val_dataloader()]
    assert batches[0].response.tolist() == [right[:length]] * 4
    assert set(batches[0].span[0].tolist()) == {0, 1}
    assert torch.equal(batches[0].flawed != batches[0].response, batches[0].span > 0)
    assert module.other_notes[str(length), "cut"] == 10
    assert caplog.text.count("tokens and are cut") == 1


def test_rounds_are_mixed_in_by_share(folder: Path, round_folder: Path, codec: Codec) -> None:
    module = data(folder, codec)
    assert len(module.train_dataloader()) == 5
    module.add_round(round_folder)
    module.add_round(round_folder)
    batches = list(module.train_dataloader())
    assert len(batches) == 9 // 3  # one pass over the drafts, 3 of the 4 rows
    assert all(b.drafted.tolist() == [False, True, True, True] for b in batches)
    assert sorted(k for b in batches for k in b.keys[1:]) == [f"d{n:03d}" for n in range(9)]
    row = batches[0].rows(slice(1, 2))
    draft_ids = batches[0].records[1]["draft_ids"]
    fill = [codec.eos_id] * (CANVAS - len(draft_ids))
    assert row.flawed[0].tolist() == draft_ids + fill
    assert codec.decode(row.response[0].tolist()) == "A red ring."
    assert torch.equal(row.flawed != row.response, row.span == 1)
    assert not row.images  # a training batch carries no encoded images


@pytest.mark.parametrize(("share", "drafts"), [(0.0, 4), (0.5, 2), (0.99, 1)])
def test_share_of_captions(folder: Path, round_folder: Path, codec: Codec, share: float, drafts: int) -> None:
    module = data(folder, codec, rounds=(str(round_folder),), data_share=share)
    assert {int(b.drafted.sum()) for b in module.train_dataloader()} == {drafts}


def test_ranks_get_equal_and_different_parts(folder: Path, round_folder: Path, codec: Codec) -> None:
    def keys(rank: int, loader: str, *rounds: str) -> list[list[str]]:
        module = data(folder, codec, batch_size=2, data_share=0.5, rounds=rounds)
        module.trainer = SimpleNamespace(current_epoch=1, global_rank=rank, world_size=2)  # type: ignore[assignment]
        return [b.keys for b in getattr(module, loader)()]

    for rounds in ([], [str(round_folder)]):
        one, two = keys(0, "train_dataloader", *rounds), keys(1, "train_dataloader", *rounds)
        assert [len(k) for k in one] == [len(k) for k in two]
        assert not {k for ks in one for k in ks} & {k for ks in two for k in ks}
    shares = [[k for ks in keys(rank, "val_dataloader") for k in ks] for rank in (0, 1)]
    assert shares == [["k000", "k001", "k002"], ["k003", "k004", "k000"]]


def test_drafting_takes_turns_through_the_data(folder: Path, codec: Codec) -> None:
    module = data(folder, codec)
    rounds = [[k for _, b in module.draft_dataloader(number, 7) for k in b.keys] for number in (1, 2, 3)]
    assert [len(set(keys)) for keys in rounds] == [7, 7, 7]
    assert not set(rounds[0]) & set(rounds[1])
    assert [k for _, b in module.draft_dataloader(2, 7) for k in b.keys] == rounds[1]
    with pytest.raises(ValueError, match="1 to 20 images, got 21"):
        module.draft_dataloader(1, 21)


def test_limit(folder: Path, codec: Codec) -> None:
    module = data(folder, codec, limit={"train": 8, "val": 2})
    assert {k for b in module.train_dataloader() for k in b.keys} == {f"k{n:03d}" for n in range(8)}
    assert [b.keys for b in module.val_dataloader()] == [["k000", "k001"]]
    assert len(list(module.test_dataloader())) == 1


def test_fewer_samples_than_a_batch_are_repeated_equally_often(folder: Path, codec: Codec, caplog) -> None:
    """20 samples in steps of 2 ranks x 16 rows: over 5 epochs each is seen 8 times, with another pass each time."""
    seen = []
    for rank in (0, 1):
        module = data(folder, codec, batch_size=16)
        module.trainer = trainer = SimpleNamespace(global_rank=rank, world_size=2)  # type: ignore[assignment]
        for trainer.current_epoch in range(5):
            (batch,) = module.train_dataloader()
            assert len(batch) == 16
            seen += zip(batch.keys, batch.passes, strict=True)
    assert len(set(seen)) == len(seen)
    assert set(Counter(key for key, _ in seen).values()) == {8}
    assert caplog.text.count("a step has 32 rows, but there are 20 training samples: samples repeat") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"tiling": anyres(8)}, r"image_size 4 and tiling.size 8 must be equal"),
        ({"data_share": 1}, r"data_share .* got 1"),
        ({"limit": {"dev": 3}}, r"limit names .*dev"),
        ({"limit": -3}, r"data.limit must be at least 0, got -3"),
        ({"path": "/none"}, "no data folder"),
        ({"codec": Codec.train(["something else"], vocab_size=300)}, r"src\.prepare with this tokenizer"),
    ],
)
def test_mistakes_are_named(folder: Path, codec: Codec, settings: dict[str, Any], message: str) -> None:
    given = {"path": str(folder), "codec": codec, "batch_size": 4, "response_length": CANVAS, "image_size": 4}
    with pytest.raises(UserError, match=message):
        CaptionData(**{**given, **settings}).train_dataloader()


def test_a_folder_of_another_kind_or_tokenizer_is_refused(tmp_path, round_folder: Path, codec: Codec) -> None:
    write(tmp_path / "mixed" / "train", codec, [draft(codec, 0)], "round")
    with pytest.raises(UserError, match="'round', expected 'captions'"):
        data(tmp_path / "mixed", codec).train_dataloader()
    other = Codec.train(["something else"], vocab_size=300, alphabet="bytes")
    with pytest.raises(UserError, match=rf"round-0001 .* {other.fingerprint}; .*src\.draft"):
        data(tmp_path, other).add_round(round_folder)


def test_state_holds_the_rounds(tmp_path: Path, folder: Path, round_folder: Path, codec: Codec) -> None:
    state = data(folder, codec, rounds=(str(round_folder),)).state_dict()
    fresh = data(folder, codec)
    fresh.load_state_dict(state)
    assert fresh.state_dict() == state
    assert len(fresh.train_dataloader()) == 3
    shutil.rmtree(round_folder)
    write(round_folder, codec, [draft(codec, n) for n in range(4)], "round")
    with pytest.raises(ValueError, match="not the round of the checkpoint"):
        data(folder, codec).load_state_dict(state)


class Recorder(L.LightningModule):
    """Notes the keys of every batch, saves after step `save_at`, and adds a round after epoch 0."""

    def __init__(self, path: Path, save_at: int = -1, round_folder: Path | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.path, self.save_at, self.round_folder = path, save_at, round_folder
        self.keys: list[tuple[int, int, list[str]]] = []

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        self.keys.append((self.current_epoch, self.global_step, batch.keys))
        return self.weight.sum()

    def validation_step(self, *_: Any) -> None:
        """Lightning warns about a val_dataloader without it."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self.global_step == self.save_at:
            self.trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self) -> None:
        if self.current_epoch == 0 and self.round_folder:
            self.trainer.datamodule.add_round(self.round_folder)  # type: ignore[attr-defined]
        self.on_train_batch_end()


def fit(module: Recorder, datamodule: CaptionData, **settings: Any) -> list[tuple[int, int, list[str]]]:
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, reload_dataloaders_every_n_epochs=1, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=datamodule, **settings)
    return module.keys


@pytest.mark.parametrize(("save_at", "workers"), [(3, 0), (5, 0), (6, 0), (6, 2)])
def test_a_trainer_resumes_on_the_very_next_batch(tmp_path, folder, round_folder, codec, save_at, workers):
    """Epochs of 5, 3 and 3 batches; a checkpoint within epoch 0, at its end, within epoch 1 (on a round)."""
    path = tmp_path / "saved.ckpt"
    whole = fit(Recorder(path, save_at, round_folder), data(folder, codec, workers=workers))
    assert [epoch for epoch, _, _ in whole] == [0] * 5 + [1] * 3 + [2] * 3
    again = Recorder(path, -1, round_folder)
    resumed = fit(again, data(folder, codec, workers=workers), ckpt_path=str(path), weights_only=True)
    assert resumed == whole[save_at:]
