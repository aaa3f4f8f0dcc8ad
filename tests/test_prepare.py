"""Preparing data: reproducible and true scenes, photographs from any format, and what goes wrong."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules.captions import CaptionData
from datamodules.shards import Reader, Sample
from datamodules.stream import Stream, read_index
from src.io.errors import UserError
from src.io.images import ImageProblem, convert, fit, load
from src.preparation.counts import Counts
from src.preparation.photos import Photo, Photos
from src.preparation.scenes import Scenes
from src.preparation.sources.formats import Entry
from src.preparation.sources.source import read_entries
from src.preparation.splits import hashed_share, split_of
from src.prepare import main
from src.scenes.graph import Scene, draw_scene
from src.scenes.render import render
from src.scenes.score import score_caption
from src.text.prompt_format import IMAGE
from src.text.tokenizer import SPECIAL, Codec
from testing.files import contents

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
needs_real_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of real data is not there")
SCENES: dict[str, Any] = {
    "num_train": 30, "num_val": 8, "num_test": 8, "captions_per_image": 2, "objects": [1, 2], "noise": 2.0,
    "image_size": 24, "vocab_size": 300, "response_length": 64, "prompt": "Describe the picture.", "seed": 1,
    "per_shard": 16,
}  # fmt: skip
PHOTOS: dict[str, Any] = {"image_size": 16, "vocab_size": 400, "response_length": 64, "prompt": "What is there?"}
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "out"
    Scenes(out=str(out), **SCENES).run()
    return out


def samples(folder: Path) -> list[Sample]:
    index = read_index(folder)
    if not index.count:
        return []
    stream = Stream([index], seed=0, shuffle=False)
    return list(Reader(stream).samples(stream.places(0, index.count)))


# --- scenes ------------------------------------------------------------------------------------------


def test_equal_settings_make_equal_bytes(tmp_path: Path, scenes: Path) -> None:
    Scenes(out=str(tmp_path / "again"), **SCENES).run()
    assert contents(tmp_path / "again") == contents(scenes)
    Scenes(out=str(tmp_path / "other"), **{**SCENES, "seed": 2}).run()
    assert contents(tmp_path / "other")["train/train-000000.tar"] != contents(scenes)["train/train-000000.tar"]


def scenes_of(folder: Path) -> list[Scene]:
    return [Scene.from_dict(sample.record["scene"]) for sample in samples(folder)]


def without_jitter(scene: Scene) -> str:
    for item in (plain := scene.to_dict())["objects"]:
        item["dx"] = item["dy"] = 0
    return json.dumps(plain, sort_keys=True)


def test_val_and_test_do_not_depend_on_the_seed_and_are_never_trained_on(tmp_path: Path) -> None:
    """With one object there are 3456 scenes, and the 1024 reserved ones would be met soon."""
    few = {**SCENES, "objects": [1, 1], "num_train": 60, "num_test": 4, "num_val": 3, "captions_per_image": 1}
    for seed in (1, 2):
        Scenes(out=str(tmp_path / f"{seed}"), **{**few, "seed": seed}).run()
    for split in ("val", "test"):
        one, two = (samples(tmp_path / seed / split) for seed in "12")
        assert [(s.key, s.data, s.record["scene"]) for s in one] == [(s.key, s.data, s.record["scene"]) for s in two]
        assert [s.record["captions"][0]["text"] for s in one] == [s.record["captions"][0]["text"] for s in two]
    reserved: dict[str, None] = {}
    for split in ("test", "val"):
        rng, full = Random(f"0/{split}/scenes"), len(reserved) + 512
        while len(reserved) < full:
            reserved[without_jitter(draw_scene(rng, objects=(1, 1)))] = None
    for seed in "12":
        assert not {without_jitter(scene) for scene in scenes_of(tmp_path / seed / "train")} & set(reserved)
        assert [without_jitter(scene) for scene in scenes_of(tmp_path / seed / "test")] == list(reserved)[:4]


def test_splits_have_their_sizes_and_share_no_scene(scenes: Path) -> None:
    train, val, test = ([without_jitter(scene) for scene in scenes_of(scenes / split)] for split in SPLITS)
    assert [len(train), len(set(val)), len(set(test))] == [SCENES[f"num_{split}"] for split in SPLITS]
    assert not (set(train) & set(val) or set(train) & set(test) or set(val) & set(test))


def check_swaps(codec: Codec, prepared: list[Sample]) -> Counter[str]:
    """Every caption is true, and every swap makes it false and changes the tokens that it says; returns the facts."""
    facts: Counter[str] = Counter()
    for s in prepared:
        scene = Scene.from_dict(s.record["scene"])
        assert len(s.record["captions"]) == SCENES["captions_per_image"]
        for caption in s.record["captions"]:
            text, ids = caption["text"], codec.encode(caption["text"])[0]
            score = score_caption(scene, text)
            assert (score.factuality, score.syntax) == (1, 1)
            for swap in caption["swaps"]:
                facts[swap["fact"]] += 1
                assert text[swap["start"] : swap["end"]] == swap["right"]
                false = text[: swap["start"]] + swap["wrong"] + text[swap["end"] :]
                assert score_caption(scene, false).factuality < 1
                start, end, wrong = swap["tokens"]
                assert codec.encode(false)[0] == [*ids[:start], *wrong, *ids[end:]]
                assert len(wrong) == end - start
    return facts


def test_captions_are_true_swaps_are_false_and_tokens_are_where_they_say(scenes: Path) -> None:
    codec, prepared = Codec.load(scenes / "tokenizer"), samples(scenes / "train")
    assert set(check_swaps(codec, prepared)) == {"object", "attribute", "count", "place", "relation"}
    lengths = [len(codec.encode(caption["text"])[0]) for s in prepared for caption in s.record["captions"]]
    assert max(lengths) < SCENES["response_length"]


def test_images_show_the_scene(scenes: Path) -> None:
    for s in samples(scenes / "val"):
        assert s.image.size == (24, 24)
        clean = render(Scene.from_dict(s.record["scene"]), Random(0), size=24, noise=0)
        difference = np.asarray(s.image, dtype=float) - np.asarray(clean, dtype=float)
        assert 1 < difference.std() < 3  # noise of 2 grey levels


def test_a_rerun_does_nothing_and_other_settings_are_refused(tmp_path: Path, scenes: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(scenes, out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert Scenes(out=str(out), **SCENES).run() == json.loads((out / "index.json").read_text())
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    changed = {**SCENES, "num_val": 7, "noise": 0.0}
    with pytest.raises(ValueError, match=r"made with other settings \(.*num_val: \d+ before, 7 now"):
        Scenes(out=str(out), **changed).run()
    Scenes(out=str(out), overwrite=True, **changed).run()
    assert len(samples(out / "val")) == 7
    (out / "index.json").unlink()
    with pytest.raises(ValueError, match="no finished dataset"):
        Scenes(out=str(out), **changed).run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_val": 0}, "num_val must be at least 1, got 0"),
        ({"image_size": 1}, "image_size must be at least 16, got 1"),
        ({"response_length": 10}, "no caption of a scene fits 10 tokens"),
        ({"vocab_size": 10}, "vocab_size=10 is too small"),
    ],
)
def test_impossible_settings_are_named(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Scenes(out=str(tmp_path / "a"), **{**SCENES, **change}).run()
    assert list(tmp_path.iterdir()) == []


def _settings(values: dict[str, Any]) -> list[str]:
    return [f"prepare.{name}={json.dumps(value)}" for name, value in values.items() if name != "per_shard"]


# --- photographs -------------------------------------------------------------------------------------


def picture(path: Path, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)


def entries(path: Path) -> tuple[list[Entry], Counts]:
    counts = Counts()
    return list(read_entries(path, counts)), counts


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


GOOD = b'{"image": "a.jpg", "caption": "\xc3\x89t\xc3\xa9. "}'


@pytest.mark.parametrize(
    ("name", "content", "images", "skipped"),
    [
        # lines with a byte order mark, CRLF, blank and broken ones
        ("a.jsonl", b"\xef\xbb\xbf" + GOOD + b'\r\n\r\n{"image": "b.jpg", "capt\r\n' + GOOD, ["a.jpg"] * 2,
         {"broken_json": "a.jsonl:3"}),
        ("a.jsonl", GOOD + b"\n" + b"[" * 100_000 + b'\n\xff\n["a"]\n' + GOOD, ["a.jpg"] * 2,
         {"broken_json": "a.jsonl:2", "not_utf-8": "a.jsonl:3", "not_a_record": "a.jsonl:4"}),
        # lines and objects over several lines, whatever the file is called
        ("a.json", b'{\n "image_id": 42,\n "text": "one",\n "question_id": 1, "prompt": "p"}\n{\n' + GOOD,
         ["42", "a.jpg"], {"broken_json": "a.json:5"}),
        ("a.json", b"\xef\xbb\xbf[" + GOOD + b", 2]", ["a.jpg"], {"not_a_record": "a.json#2"}),
        # tables: a comma that is not quoted, a quotation mark that is not closed, a text of 140 kB
        ("a.csv", b'\xef\xbb\xbfimage,caption\na.jpg,x\nb.jpg,"y ""z"",\n"\nc.jpg,red, and grey\nd.jpg,"e\nf.jpg,g\n',
         ["a.jpg", "b.jpg"], {"broken_row": "a.csv:5 (3 cells for 2 columns)"}),
        ("a.tsv", b"image\tcaption\r\na.jpg\tx\r\n\xff\ty\r\nc.jpg\t" + b"z" * 140_000 + b"\r\nd.jpg\tw\r\n",
         ["a.jpg", "c.jpg", "d.jpg"], {"not_utf-8": "a.tsv:3"}),
    ],
    ids=["lines", "worse lines", "several lines", "list", "csv", "tsv"],
)  # fmt: skip
def test_one_reader_for_all_files(tmp_path, name, content, images, skipped):
    (tmp_path / name).write_bytes(content)
    records, counts = entries(tmp_path / name)
    assert [entry.image for entry in records] == images
    assert counts.examples == skipped
    assert records[0].captions[0].text in ("\u00c9t\u00e9.", "one", "a cat", "a", "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"picture": "a.jpg", "words": "x"}]', "keys picture, words.* needs an image .*file_name.* and a caption"),
        (b"[]", r"holds no records\. "),
        (b'[{"image": "a.jpg", "caption": "x"},', "not valid JSON"),
        (b'[{"image": "\xff", "caption": "x"}]', "holds no records; not_utf-8: a.json#1"),
        (None, "no file"),
    ],
)
def test_files_without_annotations_are_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        entries(tmp_path / "a.json")


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def rediff(text: str, *pairs: tuple[str, str]) -> dict:
    revise = [{"org": org, "target": target} for org, target in pairs]
    return {"image": "a.jpg", "conversations": turns("<image>Q", text), "revise": revise}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"conversations": turns("<image>\nQ", "A")}, "no_image"),
        ({"image": ["a.jpg", "b.jpg"], "conversations": turns("Q", "A")}, "several_images"),
        ({"image": "a.jpg", "conversations": turns("<image><image>Q", "A")}, "several_images"),
        ({"image": "a.jpg", "conversations": turns("Q", "A", "<image>R", "B")}, "image_in_later_turn"),
        ({"image": "a.jpg", "conversations": turns("<image>Q")}, "no_answer"),
        ({"image": "a.jpg", "video": "v", "conversations": turns("Q", "A")}, "video"),
        ({"image": True, "caption": "x"}, "no_image"),
        ({"image": "a.jpg", "caption": ""}, "empty_caption"),
        ({"image": "a.jpg", "captions": []}, "empty_caption"),
        (rediff("A man.", ("dog", "cat")), "revise_not_found"),
        (rediff("A man, a man.", ("man", "cat")), "revise_ambiguous"),
        (rediff("A man.", ("", "cat")), "revise_empty_span"),
        (rediff("A big red man.", ("big red", "x y"), ("red man", "x y")), "revise_overlap"),
    ],
)
def test_unusable_records_are_counted(tmp_path: Path, record: dict, reason: str) -> None:
    usable, counts = entries(write_json(tmp_path / "a.json", [record]))
    assert (usable, counts[reason]) == ([], 1)


def test_conversations_give_their_first_answer(tmp_path: Path) -> None:
    talk = turns("What is it?\n<image>", " A cat. ", "Sure?", "Yes.")
    path = write_json(tmp_path / "a.json", [{"id": 1, "image": "a.jpg", "conversations": talk}, 5])
    (entry,), counts = entries(path)
    assert (entry.image, entry.captions[0].text, entry.prompt) == ("a.jpg", "A cat.", "What is it?")
    assert counts == {"records": 2, "later_turns": 1, "not_a_record": 1}
    roles = (("system", ""), ("user", "<image>Q"), ("assistant", "A"))
    chat = {"images": ["a.jpg"], "messages": [{"role": role, "content": text} for role, text in roles]}
    (entry,), _ = entries(write_json(path, [chat]))
    assert (entry.image, entry.captions[0].text, entry.prompt) == ("a.jpg", "A", "Q")


def vicrit(true: str, false: str, right: str, wrong: str) -> dict:
    return {"image": "a.jpg", "problem": "<image>Q", "original_caption": true, "changed_caption": false,
            "solution_original": right, "solution_target": wrong}  # fmt: skip


@pytest.mark.parametrize(
    ("record", "start"),
    [
        (vicrit("A red cat.", "A blue cat.", "red", "blue"), 2),
        (vicrit("A red cat on red.", "A red cat on blue.", "red", "blue"), 13),  # the second of two places
        (vicrit("THE RED CAT", "The blue cat.", "RED", "blue"), None),  # a full stop that no swap explains
        (vicrit("THE RED CAT", "the blue cat", "RED", "blue"), 4),
        (vicrit("A red cat.", "A blue cat.", "", ""), None),
    ],
)
def test_vicrit_swaps_are_placed_where_the_captions_differ(tmp_path: Path, record: dict, start: int | None) -> None:
    (entry,), counts = entries(write_json(tmp_path / "a.json", [record]))
    assert entry.captions[0].text == record["original_caption"]
    assert [swap.start for swap in entry.captions[0].swaps] == ([] if start is None else [start])
    assert counts["swap_not_found"] == (start is None)


def test_rediff_pairs_turn_the_flawed_text_true(tmp_path: Path) -> None:
    draft = "A man in a red coat holds an apple. A woman."
    record = rediff(draft, ("an apple", "a pear"), ("red coat", "very blue coat"), ("man", "dog"))
    (entry,), _ = entries(write_json(tmp_path / "a.json", [record]))
    caption = entry.captions[0]
    assert caption.text == "A dog in a very blue coat holds a pear. A woman."  # not the `man` inside of `woman`
    pairs = [(swap.right, swap.wrong) for swap in caption.swaps]
    assert pairs == [("dog", "man"), ("very blue coat", "red coat"), ("a pear", "an apple")]
    assert all(caption.text[swap.start : swap.end] == swap.right for swap in caption.swaps)


def test_records_of_one_image_are_merged_and_stay_in_one_split(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "000000000042.jpg")
    swap = vicrit("A red cat.", "A blue cat.", "red", "blue")
    rows = [
        {**swap, "image": "images/000000000042.jpg", "split": "test"},
        {**swap, "image": "COCO_val2014_000000000042.jpg", "split": "test"},
        {**swap, "image": "42", "split": "test"},
        {**vicrit("A red cat.", "A red dog.", "cat", "dog"), "image": "coco/x/000000000042", "split": "train"},
        {**swap, "image": "/images/42", "problem": "R", "split": "Test"},
        {**swap, "image": "42", "split": "unheard of"},
        {**swap, "image": "../../etc/passwd"},
    ]
    annotations = write_json(tmp_path / "a.json", rows)
    dataset = Photos(out="", **PHOTOS, images=str(tmp_path / "images"), annotations=str(annotations))
    photos: dict[str, Photo] = {}
    for photo in dataset.read(counts := Counts()):
        if first := photos.get(photo.key):
            dataset.merge(first, photo, counts)
        photos.setdefault(photo.key, photo)
    one, other = photos.values()
    assert (one.prompt, other.prompt) == ("Q", "R")
    assert one.key != other.key
    assert one.split == other.split == "test"
    assert [(s.right, s.wrong) for s in one.captions["A red cat."].swaps] == [("red", "blue")]
    assert +counts == {
        "records": 7, "merged": 2, "missing_image": 1, "duplicate_caption": 2, "unknown_split": 1,
        "image_in_two_splits": 1,
    }  # fmt: skip
    assert counts.examples == {
        "missing_image": "../../etc/passwd",
        "unknown_split": "a.json#6 (unheard of)",
        "image_in_two_splits": "000000000042.jpg (test and train)",
    }


def test_hashed_splits_have_their_shares() -> None:
    counts = Counter(split_of(hashed_share(f"image-{n}", 0)) for n in range(4000))
    assert abs(counts["train"] - 3600) < 80  # 4 standard deviations
    assert abs(counts["val"] - 200) < 60
    assert abs(counts["test"] - 200) < 60


def test_whole_picture_on_grey() -> None:
    wide = fit(Image.new("RGB", (40, 10), "red"), 16)
    assert wide.size == (16, 16)
    assert [wide.getpixel((8, y)) for y in (0, 5, 8, 15)] == [(128,) * 3, (128,) * 3, (255, 0, 0), (128,) * 3]
    assert fit(Image.new("RGB", (300, 1), "red"), 16).getpixel((3, 7)) == (255, 0, 0)


def grey(value: float, dtype: str) -> Image.Image:
    """Black, but for one column of a value."""
    values = np.zeros((4, 4), dtype=dtype)
    values[:, 1] = value
    return Image.fromarray(values)


def cmyk() -> Image.Image:
    return Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK")


@pytest.mark.parametrize(
    ("image", "form", "options", "pixel"),
    [
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG", {}, (255, 255, 255)),  # transparent
        (Image.new("LA", (4, 4), (9, 255)), "PNG", {}, (9, 9, 9)),
        (Image.new("LA", (4, 4), (9, 0)), "PNG", {}, (255, 255, 255)),
        (Image.new("1", (4, 4), 1), "PNG", {}, (255, 255, 255)),
        (Image.new("1", (4, 4), 0), "TIFF", {}, (0, 0, 0)),
        (Image.new("RGB", (4, 4), "red").quantize(4), "PNG", {"transparency": 0}, (255, 255, 255)),
        (Image.new("RGB", (4, 4), "red").quantize(4), "GIF", {}, (255, 0, 0)),
        (cmyk(), "JPEG", {"quality": 100}, (200, 30, 60)),
        (cmyk(), "TIFF", {}, (200, 30, 60)),
        (grey(32768, "uint16"), "PNG", {}, (128, 128, 128)),
        (grey(200, "uint16"), "PNG", {}, (1, 1, 1)),  # 200 of 65,535
        (grey(65535, "uint16"), "PNG", {"transparency": 65535}, (255, 255, 255)),
        (grey(32768, ">u2"), "TIFF", {}, (128, 128, 128)),
        (grey(200, ">u2"), "TIFF", {}, (1, 1, 1)),
        (grey(200, "uint16"), "PPM", {}, (1, 1, 1)),
        (grey(65535, "uint16"), "TIFF", {"tiffinfo": {262: 0}}, (0, 0, 0)),  # white is zero
        (grey(0.5, "float32"), "TIFF", {}, (128, 128, 128)),
        (grey(1.0, "float32"), "TIFF", {}, (255, 255, 255)),
        (grey(200.0, "float32"), "TIFF", {}, (200, 200, 200)),
        (grey(32768.0, "float32"), "TIFF", {}, (128, 128, 128)),
        (grey(np.nan, "float32"), "TIFF", {}, (0, 0, 0)),
        (grey(200, "int32"), "TIFF", {}, (200, 200, 200)),
    ],
)
def test_images_of_any_mode_become_rgb(tmp_path, image, form, options, pixel):
    image.save(tmp_path / "a", form, **options)
    for source in (tmp_path / "a", (tmp_path / "a").read_bytes()):
        assert np.abs(np.subtract(load(source).getpixel((1, 1)), pixel)).max() <= (form == "JPEG")


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "AVIF", "TIFF"])
def test_the_first_frame_of_an_animation(form: str) -> None:
    frames = [Image.new("RGB", (24, 16), colour) for colour in ("red", "blue", "green")]
    stream = io.BytesIO()
    frames[0].save(stream, form, save_all=True, append_images=frames[1:], quality=95)
    assert Image.open(io.BytesIO(stream.getvalue())).n_frames == 3
    with Image.open(io.BytesIO(convert(stream.getvalue(), size=24, encoding="png", square=False))) as image:
        assert image.size == (24, 16)
        assert np.abs(np.asarray(image, dtype=int) - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize("form", ["AVIF", "GIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP"])
def test_damaged_bytes_are_an_image_or_a_reason(form: str) -> None:
    rng, stream = np.random.default_rng(0), io.BytesIO()
    Image.effect_noise((60, 40), 90).convert("RGB").save(stream, form)
    for number in range(60):
        data = np.frombuffer(stream.getvalue(), dtype=np.uint8).copy()
        data[rng.integers(0, len(data), 8)] = rng.integers(0, 256, 8)
        data[rng.integers(0, 60, 2)] = rng.integers(0, 256, 2)  # of the header
        with suppress(ImageProblem):
            assert load(data[: rng.integers(len(data) // 2, len(data)) if number % 2 else None].tobytes()).mode == "RGB"
    with pytest.raises(ImageProblem, match="empty_image_file"):
        load(b"")


def test_images_are_upright_and_decoded_small(tmp_path: Path) -> None:
    turned = Image.new("RGB", (8, 4), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert load(tmp_path / "turned.jpg").size == (4, 8)
    picture(tmp_path / "large.jpg", size=(1600, 800))
    assert load(tmp_path / "large.jpg", size=50).size == (200, 100)  # decoded at an eighth of the size


def test_photos_may_keep_their_shape(tmp_path: Path) -> None:
    """Larger ones are shrunk without bars; those that are small enough keep every pixel."""
    own = Image.effect_noise((30, 21), 80).convert("RGB")
    own.save(tmp_path / "own.png")
    Image.new("RGB", (1600, 500), "red").save(tmp_path / "large.png")
    annotations = write_json(
        tmp_path / "a.json", [{"image": f"{n}.png", "caption": "A box."} for n in ("own", "large")]
    )
    settings = {**PHOTOS, "image_size": 64, "images": str(tmp_path), "annotations": str(annotations)}
    Photos(out=str(tmp_path / "out"), encoding="png", square=False, **settings).run()
    images = {s.key.split("-")[0]: s.image for split in SPLITS for s in samples(tmp_path / "out" / split)}
    np.testing.assert_array_equal(np.asarray(images["own"]), np.asarray(own))
    assert images["large"].size == (64, 20)
    assert images["large"].getcolors() == [(64 * 20, (255, 0, 0))]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty_image_file"),
        (b"<html><body>Not found</body></html>", "undecodable_image"),
        (b"GIF89a" + b"\xff\xff" * 2 + b"\x00\x00\x00" + b"," + b"\x00" * 20, "image_too_large"),
        (None, "missing_image"),
    ],
)
def test_broken_images_have_reasons(tmp_path: Path, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ImageProblem, match=reason):
        load(tmp_path / "a.jpg")


def test_photos_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    for number in range(6):
        picture(images / f"p{number}.jpg", size=(20, 10))
    (images / "bad.jpg").write_text("<html>")
    rows: list[dict] = [{"image": f"p{n}.jpg", "captions": ["A red box.", f"Box {n}."]} for n in range(6)]
    for row in rows:
        row["split"] = "val" if row["image"] == "p5.jpg" else "train"
    rows += [{"image": "bad.jpg", "caption": "x", "split": "train"}, {"image": "none.jpg", "caption": "x"}]
    rows += [{"image": "p0.jpg", "caption": "word " * 100}, {"image": "p1.jpg", "caption": " "}]
    rows += [vicrit("A red box.", "A blue box.", "red", "blue") | {"image": "p2.jpg", "problem": None}]
    annotations = write_json(tmp_path / "a.json", rows)
    out = tmp_path / "out"
    main([
        "conf=photos", f"prepare.out={out}", f"prepare.images={images}", f"prepare.annotations={annotations}",
        *_settings(PHOTOS),
    ])  # fmt: skip
    *lines, wrote, look, command = capsys.readouterr().out.splitlines()
    limit = PHOTOS["response_length"]
    num_tokens = len(Codec.load(out / "tokenizer").encode(("word " * 100).strip())[0])
    # the photos of train lie in the order of their hashes, and so do the reasons
    assert [*lines[:6], *sorted(lines[6:8]), *lines[8:]] == [
        "records  11  records",
        "records   1  missing image (left out), such as none.jpg",
        "records   2  merged",
        "records   1  empty caption (left out), such as a.json#10",
        "train     5  written",
        "train     1  swaps of unequal length",
        f"train     1  captions too long (left out), such as p0.jpg: {num_tokens} tokens, and prepare.response_length="
        f"{limit} holds {limit - 1}",
        "train     1  undecodable image (left out), such as bad.jpg",
        "val       1  written",
        "test      0  written",
    ]
    assert wrote.startswith("wrote 6 images in 2 shards (30.7 KB) to ") and f"show={out}" in look
    assert "conf=mask,model/tiny" in command
    assert json.loads((out / "index.json").read_text())["counts"]["train"]["undecodable_image"] == 1
    photos = {s.key[:2]: s for s in samples(out / "train")}
    assert [c["text"] for c in photos["p3"].record["captions"]] == ["A red box.", "Box 3."]
    assert (photos["p3"].record["prompt"], photos["p3"].image.size) == ("What is there?", (16, 16))
    codec = Codec.load(out / "tokenizer")
    assert codec.decode(codec.encode("Ünseen 日本 text")[0]) == "Ünseen 日本 text"
    data = CaptionData(path=str(out), codec=codec, batch_size=5, response_length=64, image_size=16)
    assert len(list(data.train_dataloader())) == 1


def test_text_that_spells_special_tokens_stays_text_up_to_the_batch(tmp_path: Path) -> None:
    """Captions, questions, false captions, and the mark of an image in a caption."""
    rows: list[dict] = []
    for number, token in enumerate(SPECIAL):
        picture(tmp_path / f"p{number}.png")
        false = vicrit(f"A {token} dog.", f"A {token} cat.", "dog", "cat")
        flawed = rediff(f"A {token} red dog.", ("red", "big"), (token, f"{token}{token}"))
        rows += [{**row, "image": f"p{number}.png", "split": "train"} for row in (false, flawed)]
        rows[-2]["problem"] = f"Is {token} there?" if token != IMAGE else "Why?"
        rows[-1]["conversations"][0]["value"] = f"<image>\n{token.strip('<>')}> {token if token != IMAGE else ''}"
    annotations = write_json(tmp_path / "a.json", rows)
    settings = {**PHOTOS, "annotations": str(annotations), "vocab_size": 0}
    index = Photos(out=str(tmp_path / "out"), images=str(tmp_path), **settings).run()
    assert index["counts"]["train"]["written"] == 2 * len(SPECIAL)
    codec = Codec.load(tmp_path / "out" / "tokenizer")
    data = CaptionData(path=str(tmp_path / "out"), codec=codec, batch_size=1, response_length=64, image_size=16)
    control, seen = set(codec.special.unwritten), set()
    plain = sum(token in control for token in codec.prompt_ids("Why?"))
    for batch in data.train_dataloader():
        prompt, response, flawed = (x[0].tolist() for x in (batch.prefix["prompt_ids"], batch.response, batch.flawed))
        assert sum(token in control for token in prompt) == plain
        text = codec.decode(response)
        assert control.isdisjoint([*response[: response.index(codec.eot_id)], *flawed[: flawed.index(codec.eot_id)]])
        assert text == batch.records[0]["captions"][0]["text"] and (batch.span > 0).any()
        seen |= {token for token in SPECIAL if token in text}
    assert seen == set(SPECIAL)


def test_what_the_tokenizer_lacks_is_left_out_and_counted(tmp_path: Path) -> None:
    """The base model's letters are few: captions, questions and false words that it would garble are not trained on."""
    texts = ["A red ring.", "A Zebra & 3 quick foxes.", "一只猫。", "A red ring 🙂.", "A blue ring."]
    rows = [{"image": f"p{n}.png", "caption": text} for n, text in enumerate(texts)]
    rows += [{"image": "p0.png", "caption": "A ring.", "question": "Quo vadis?"}]
    rows += [vicrit("A red cross.", "A réd cross.", "red", "réd") | {"image": "p5.png", "problem": None}]
    rows += [vicrit("A red cross.", "A tan cross.", "red", "tan") | {"image": "p5.png", "problem": None}]
    for number in range(6):
        picture(tmp_path / f"p{number}.png")
    annotations = write_json(tmp_path / "a.json", [{**row, "split": "train"} for row in rows])
    settings = {**PHOTOS, "prompt": "Describe.", "tokenizer": str(ROOT / "assets" / "base")}
    index = Photos(out=str(tmp_path / "out"), images=str(tmp_path), annotations=str(annotations), **settings).run()
    counts = index["counts"]["train"]
    names = ("written", "not_in_vocabulary", "prompt_not_in_vocabulary", "swaps not in vocabulary")
    assert [counts.get(name) for name in names] == [3, 3, 1, 1]
    written = [caption for s in samples(tmp_path / "out" / "train") for caption in s.record["captions"]]
    assert {caption["text"] for caption in written} == {"A red ring.", "A blue ring.", "A red cross."}
    assert not any(swap["wrong"] == "réd" for caption in written for swap in caption["swaps"])
    assert index["examples"]["train"]["prompt_not_in_vocabulary"] == "p0.png: Quo vadis?"


# --- real files --------------------------------------------------------------------------------------


@needs_real_data
def test_odd_images_decode_or_are_reported() -> None:
    manifest = json.loads((SHARED / "odd_images" / "manifest.json").read_text())
    assert Counter(row["decodes"] for row in manifest) == {True: 27, False: 6}
    for row in manifest:
        path = SHARED / "odd_images" / row["image"]
        if not row["decodes"]:
            with pytest.raises(ImageProblem):
                convert(path, size=16, encoding="jpg")
            continue
        with Image.open(io.BytesIO(convert(path, size=16, encoding="png"))) as small:
            assert (small.size, small.mode) == ((16, 16), "RGB")
        if size := row.get("rgb_size_after_exif_transpose"):
            assert list(load(path).size) == size, path.name


FORMATS: dict[str, tuple[int | None, dict[str, int]]] = {  # file -> usable records (None: refused), what is left out
    "CompreCap__GPT-4o_first5.json": (5, {}),
    "InternLM-XComposer__multi_turn_multi_images_example.json": (0, {"several_images": 2, "later_turns": 20}),
    "InternLM-XComposer__only_text_example.json": (0, {"no_image": 2}),
    "InternLM-XComposer__single_turn_single_image_example.json": (2, {}),
    "LLaMA-Factory__mllm_demo.json": (6, {"later_turns": 6}),
    "LLaVA__caps_boxes_coco2014_val_80.jsonl": (80, {}),
    "LLaVA__coco2014_val_gpt4_qa_30x3.jsonl": (90, {}),
    "LLaVA__qa90_gpt4_answer.jsonl": (None, {}),
    "LLaVA__qa90_questions.jsonl": (None, {}),
    "POPE__Instruction1_llava_first12.json": (12, {}),
    "POPE__coco_pope_random_first30.json": (None, {}),
    "ReDiff__readme_sample.json": (1, {}),
    "lmms-finetune__multi_images.json": (0, {"system_text": 2}),
    "lmms-finetune__single_image.json": (1, {"system_text": 1}),
    "lmms-finetune__single_image_has_text_only.json": (1, {"no_image": 2, "system_text": 1}),
    "lmms-finetune__video.json": (0, {"video": 1, "system_text": 1}),
}


@needs_real_data
@pytest.mark.parametrize("name", FORMATS)
def test_real_annotations_are_read(name: str) -> None:
    usable, left_out = FORMATS[name]
    if usable is None:
        with pytest.raises(UserError, match="no known annotation format: the first record has the keys question_id"):
            entries(SHARED / "formats" / name)
        return
    records, counts = entries(SHARED / "formats" / name)
    read = usable + sum(number for reason, number in left_out.items() if reason != "later_turns")
    assert (len(records), dict(counts)) == (usable, {"records": read, **left_out})
