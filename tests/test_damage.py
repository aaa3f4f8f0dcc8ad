"""Damaged data in every form: what is left out and counted, what is drawn or asked again, and what is named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import src.draft
import src.revise
from datamodules.captions import CaptionData
from datamodules.collate import Collate
from datamodules.shards import Sample
from src.io.shards import INDEX, read_manifest, read_shard, write_shard
from src.models.tiling import Square
from src.preparation.photos import Photos
from src.text.tokenizer import Codec
from testing.files import contents
from testing.scenes import BASE, write_scenes
from testing.verbs import refusal

ROOT = Path(__file__).resolve().parents[1]
NUM = 8


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    counts = {"num_train": NUM, "num_val": 1, "num_test": 1, "objects": [1, 1]}
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", **counts)


@pytest.fixture(scope="module")
def drawn(scenes, tmp_path_factory) -> Path:
    """Two shards of drafts."""
    out = tmp_path_factory.mktemp("drafts") / "drafts"
    src.draft.main(draft_arguments(scenes, out))
    return out


@pytest.fixture
def drafts(drawn, tmp_path) -> Path:
    return Path(shutil.copytree(drawn, tmp_path / "drafts"))


def draft_arguments(data: Path, out: Path, *more: str) -> list[str]:
    sizes = ["tokens_per_step=[32]", "data.batch_size=4"]
    return ["conf=draft", f"model.path={BASE}", f"data.path={data}", f"out={out}", *sizes, *more]


def revise_arguments(drafts: Path, out: Path, tokenizer: Path = BASE) -> list[str]:
    return ["conf=revise", f"drafts={drafts}", f"out={out}", f"tokenizer={tokenizer}"]


def error_of(main: Callable, argv: list[str], capsys) -> str:
    """The only line of an error, beside progress."""
    lines = refusal(main, argv, capsys).replace("\r", "\n").splitlines()
    (error,) = [line for line in lines if line.startswith("error: ")]
    return error


# --- records ------------------------------------------------------------------------------------------------------

CAPTION = {"ids": [9, 8, 7, 6, 5], "swaps": [{"tokens": [1, 2, [7]]}]}
SPAN = {"start": 0, "end": 2, "target_ids": [5, 6]}


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"prompt": "<image> What?", "captions": [CAPTION, {"ids": [3, 4]}, {"text": "a red ring"}]}, None),
        ({"prompt": "What?", "draft_ids": [1, 2, 3], "spans": [SPAN]}, None),
        ({"captions": [CAPTION]}, "KeyError: 'prompt'"),
        ({"prompt": "<image><image>", "captions": [CAPTION]}, None),
        ({"prompt": ["What?"], "captions": [CAPTION]}, "its prompt is no text"),
        ({"prompt": "What?", "captions": []}, "it has no captions"),
        ({"prompt": "What?", "captions": ["a ring"]}, "AttributeError|TypeError"),
        ({"prompt": "What?", "captions": [{"text": " "}]}, "the text of a caption is empty"),
        ({"prompt": "What?", "captions": [{"ids": [1, "2"]}]}, "not a list of token ids"),
        ({"prompt": "", "captions": [{**CAPTION, "swaps": [{"tokens": [3, 6, [1, 2, 3]]}]}]}, "does not fit 5 tokens"),
        ({"prompt": "", "captions": [{**CAPTION, "swaps": [{"tokens": [0, 2, [1]]}]}]}, "does not fit 5 tokens"),
        ({"prompt": "", "captions": [{**CAPTION, "swaps": [{"tokens": [0, 1, [-4]]}]}]}, "not a list of token"),
        ({"prompt": "", "draft_ids": [4], "spans": [SPAN]}, "does not fit 1 tokens"),
    ],
)
def test_what_a_record_has_to_hold(record, why):
    collate = Collate(Codec.load(BASE), response_length=8, layout=Square(4), seed=0)
    message = collate.misfit(Sample("k", record, b"", Image.new("RGB", (4, 4))))
    assert (message is None) if why is None else re.search(why, message or "")


def rewrite(data: Path, change: Callable[[dict], Any], *, which: tuple[int, ...]) -> list[str]:
    """Change the JSON of some training samples; returns their keys."""
    (shard,) = (data / "train").glob("*.tar")
    samples, keys = list(read_shard(shard)), []
    for number, sample in enumerate(samples):
        if number in which:
            keys.append(sample["__key__"])
            sample["json"] = json.dumps(change(sample["json"])).encode()
    write_shard(shard, samples)
    return keys


BAD: list[Callable[[dict], Any]] = [
    lambda record: {**record, "captions": []},
    lambda record: {**record, "captions": [{**record["captions"][0], "swaps": [{"tokens": [60, 64, [1] * 4]}]}]},
]


def captions(data: Path) -> CaptionData:
    return CaptionData(path=str(data), codec=Codec.load(BASE), batch_size=4, response_length=64, image_size=48)


@pytest.mark.parametrize("change", BAD)
def test_samples_of_a_wrong_form_are_left_out_counted_and_named(scenes, tmp_path, caplog, change):
    data = Path(shutil.copytree(scenes, tmp_path / "data"))
    lost = rewrite(data, change, which=(1, 4))
    made = captions(data)
    train = [key for batch in made.train_dataloader() for key in batch.keys]
    assert len(train) == NUM  # others stand in
    assert not set(train) & set(lost)
    drafted = [key for _, batch in made.draft_dataloader(1, NUM) for key in batch.keys]
    assert len(drafted) == NUM - 2
    for notes in (made.notes, made.other_notes):
        assert sum(count for (_, reason), count in notes.items() if reason == "misfit") == 2
    (shard,) = (data / "train").glob("*.tar")
    named = [r.getMessage() for r in caplog.records if f"of {shard}: " in r.getMessage()]
    assert named
    assert all(message.split()[0] in lost for message in named)


# --- drafts and rounds --------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def other(path: Path) -> None:
    """A whole shard, with other text than was drawn."""
    samples = list(read_shard(path))
    samples[0]["json"]["text"] = "something else"
    write_shard(path, samples)


@pytest.mark.parametrize(
    ("damage", "finished"), [(cut, True), (Path.unlink, True), (other, True), (cut, False), (other, False)]
)
def test_a_damaged_shard_of_drafts_is_drawn_again(scenes, drawn, drafts, damage, finished):
    """Without its index, a shard that is whole cannot be known to be another one."""
    damage(drafts / "drafts-000001-00.tar")
    if not finished:
        (drafts / INDEX).unlink()
    src.draft.main(draft_arguments(scenes, drafts))
    same = contents(drafts).items() - contents(drawn).items()
    changed = {name for name, _ in same} - {INDEX}  # it holds how long drawing took
    assert changed == ({"drafts-000001-00.tar"} if damage is other and not finished else set())


@pytest.mark.parametrize("damage", [cut, Path.unlink, other])
def test_revising_damaged_drafts_names_the_shard(drafts, tmp_path, capsys, damage):
    damage(drafts / "drafts-000001-00.tar")
    error = error_of(src.revise.main, revise_arguments(drafts, tmp_path / "round"), capsys)
    assert error.startswith(f"error: {drafts}/drafts-000001-00.tar is damaged (")
    assert error.endswith("); repeat the `src.draft` command, which draws it again")


# --- records of folders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["{", "[1]", "{}", '{"format": 2, "kind": "captions", "tokenizer": null}'])
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ValueError, match=rf"{tmp_path / INDEX} is damaged"):
        read_manifest(tmp_path)


# --- preparing ----------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path) -> Path:
    """Images and annotations in one folder, as a user may keep them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    (folder / "a.json").write_text(json.dumps([{"image": f"{n}.png", "caption": "A ring."} for n in range(4)]))
    return folder


def prepare(photos: Path, out: Path) -> None:
    settings = {
        "image_size": 48,
        "response_length": 64,
        "prompt": "Describe.",
        "tokenizer": str(BASE),
        "overwrite": True,
    }
    Photos(out=str(out), images=str(photos), annotations=str(photos / "a.json"), **settings).run()


def test_overwriting_never_takes_the_pictures(photos, tmp_path):
    before = contents(tmp_path)
    for out in (photos, photos.parent, photos / "." / "", photos / "a.json"):
        with pytest.raises(ValueError, match=r"would take the place of .*, which is read: choose another"):
            prepare(photos, out)
        assert contents(tmp_path) == before
    partial = photos.rename(tmp_path / "out.partial")
    with pytest.raises(ValueError, match="would take the place of"):
        prepare(partial, tmp_path / "out")
    assert (partial / "0.png").exists()


def test_overwriting_replaces_datasets_only(photos, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    prepare(photos, home)  # an empty folder is nobody's
    prepare(photos, home)
    (home / INDEX).write_text('{"format": 2, "kind": "round", "tokenizer": null, "shards": []}')
    with pytest.raises(ValueError, match="exists but is no finished dataset"):
        prepare(photos, home)
    (home / INDEX).unlink()
    before = contents(home)
    with pytest.raises(ValueError, match="exists but is no finished dataset"):
        prepare(photos, home)
    assert contents(home) == before
