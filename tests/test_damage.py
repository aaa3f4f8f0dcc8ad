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
from src.experts.scenes import ScenesExpert
from src.io.files import read_json
from src.io.shards import INDEX, read_manifest, read_shard, write_shard
from src.models.tiling import Square
from src.preparation.photos import Photos
from src.preparation.scenes import Scenes
from src.text.tokenizer import Codec
from src.types import Draft, Failure

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "assets" / "base"
NUM = 8
SIZES: dict[str, Any] = {
    "image_size": 48, "vocab_size": 300, "response_length": 64, "prompt": "Describe.", "num_train": NUM, "num_val": 1,
    "num_test": 1, "captions_per_image": 1, "objects": [1, 1], "noise": 2.0, "tokenizer": str(BASE),
}  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "scenes"
    Scenes(out=str(out), **SIZES).run()
    return out


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


def refusal(main: Callable, argv: list[str], capsys) -> str:
    """The only line of an error, beside progress."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    (error,) = [line for line in lines if line.startswith("error: ")]
    return error


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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


def test_drafting_says_how_many_images_it_could_not_read(scenes, tmp_path, capsys):
    data = Path(shutil.copytree(scenes, tmp_path / "data"))
    rewrite(data, BAD[0], which=(1, 4))
    src.draft.main(draft_arguments(data, tmp_path / "drafts", f"num={NUM}"))
    assert f"{tmp_path / 'drafts'}: 6 drafts (2 images could not be read)\n" in capsys.readouterr().out


# --- drafts and rounds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [(["tokens_per_step=[]"], "tokens_per_step must name at least one"), (["round=0"], "round must be at least 1"),
     (["round=-5"], "round must be at least 1"), (["out=null"], "out: expected a path, got None")],
)  # fmt: skip
def test_drafts_that_cannot_be(scenes, tmp_path, capsys, settings, message):
    assert message in refusal(src.draft.main, draft_arguments(scenes, tmp_path / "d", *settings), capsys)
    assert not (tmp_path / "d" / INDEX).exists()


def test_without_a_readable_image_nothing_is_finished(scenes, tmp_path, capsys):
    """Once the data are mended, the same command draws."""
    data = Path(shutil.copytree(scenes, tmp_path / "data"))
    (shard,) = (data / "train").glob("*.tar")
    content = shard.read_bytes()
    shard.write_bytes(b"")
    argv = draft_arguments(data, tmp_path / "d")
    assert "nothing was drafted, as no training sample could be read" in refusal(src.draft.main, argv, capsys)
    shard.write_bytes(content)
    src.draft.main(argv)
    assert f"{NUM} drafts\n" in capsys.readouterr().out


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other(path: Path) -> None:
    """A whole shard, with other text than was drawn."""
    samples = list(read_shard(path))
    samples[0]["json"]["text"] = "something else"
    write_shard(path, samples)


DAMAGES = [cut, empty, Path.unlink, other]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("finished", [True, False])
def test_a_damaged_shard_of_drafts_is_drawn_again(scenes, drawn, drafts, damage, finished):
    """Without its index, a shard that is whole cannot be known to be another one."""
    damage(drafts / "drafts-000001-00.tar")
    if not finished:
        (drafts / INDEX).unlink()
    src.draft.main(draft_arguments(scenes, drafts))
    same = contents(drafts).items() - contents(drawn).items()
    changed = {name for name, _ in same} - {INDEX}  # it holds how long drawing took
    assert changed == ({"drafts-000001-00.tar"} if damage is other and not finished else set())


@pytest.mark.parametrize("damage", DAMAGES)
def test_revising_damaged_drafts_names_the_shard(drafts, tmp_path, capsys, damage):
    damage(drafts / "drafts-000001-00.tar")
    error = refusal(src.revise.main, revise_arguments(drafts, tmp_path / "round"), capsys)
    assert error.startswith(f"error: {drafts}/drafts-000001-00.tar is damaged (")
    assert error.endswith("); repeat the `src.draft` command, which draws it again")


def test_what_are_no_drafts_is_named(scenes, drafts, tmp_path, capsys):
    argv = revise_arguments(scenes / "train", tmp_path / "round")
    assert "train holds 'captions', not drafts" in refusal(src.revise.main, argv, capsys)
    index = read_json(drafts / INDEX)
    del index["settings"]
    (drafts / INDEX).write_text(json.dumps(index))
    error = refusal(src.revise.main, revise_arguments(drafts, tmp_path / "round"), capsys)
    assert f"{drafts / INDEX} is damaged" in error


def test_the_wrong_tokenizer_is_noticed_before_anything_is_asked(drafts, tmp_path, capsys):
    Codec.train(["a red ring"], vocab_size=300).save(tmp_path / "codec")
    argv = revise_arguments(drafts, tmp_path / "round", tmp_path / "codec")
    assert "was written with tokenizer" in refusal(src.revise.main, argv, capsys)
    assert not list(tmp_path.rglob("journal*"))


def test_a_record_without_a_real_scene_fails_alone():
    draft = Draft(
        key="k", prompt="", text="a ring", token_ids=[1], reference="", record={"scene": {"bad": 1}}, image=b"",
        steps=1, sampler={}, fingerprint="", seed=0,
    )  # fmt: skip
    assert ScenesExpert()._answer(draft) == Failure("damaged_scene")


# --- records of folders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["{", "[1]", "{}", '{"format": 2, "kind": "captions", "tokenizer": null}'])
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ValueError, match=rf"{tmp_path / INDEX} is damaged"):
        read_manifest(tmp_path)


def test_damaged_settings_of_drafts_are_named(scenes, drafts, capsys):
    (drafts / "settings.json").write_text("{")
    error = refusal(src.draft.main, draft_arguments(scenes, drafts), capsys)
    assert error.startswith(f"error: {drafts / 'settings.json'} is damaged")


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
