"""Evaluation: the verb on real shards and small models, resuming, and the report on hand-made numbers."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import tarfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image, ImageDraw

import src.evaluate
from src.cli.config import load_config, load_part
from src.cli.instantiate import build
from src.evaluate import complete, main
from src.evaluation.drawing import Piece, layout, paint
from src.evaluation.report import (
    FILL,
    Example,
    Panel,
    claims,
    markdown_report,
    paired_difference,
    picture,
    plot,
    text_report,
)
from src.evaluation.results import Cell, ResultStore, code_hash
from src.generate import choose_sampler
from src.io.shards import read_manifest, read_shard
from src.metrics.caption import Mark
from src.metrics.text import ReferenceOverlap
from src.models.hf.folder import from_pretrained, save_pretrained
from src.models.llada_v import LLaDAV
from src.preparation.photos import Photos
from src.preparation.scenes import Scenes
from src.samplers.sampler import Sampler
from src.scenes.graph import Scene
from src.scenes.score import score_caption
from src.text.tokenizer import Codec
from src.types import Batch
from testing.files import read_jsonl

LENGTH, NUM = 48, 5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "scenes"
    counts = {"num_train": 40, "num_val": 2, "num_test": 8, "captions_per_image": 1, "objects": [1, 2]}
    Scenes(
        out=str(out),
        **counts,
        image_size=48,
        noise=2.0,
        vocab_size=300,
        response_length=LENGTH,
        prompt="Describe the picture.",
    ).run()
    return out


@pytest.fixture(scope="module")
def models(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(["mask", "stage2"]):
        write_model(folder / name, Codec.load(data / "tokenizer"), seed=seed)
    return folder


def write_model(path, codec, *, seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    decoder = {"vocab_size": codec.vocab_size, "num_hidden_layers": 1, "attention": "prefix", **sizes}
    vision = {"num_hidden_layers": 1, "image_size": 48, "patch_size": 16, **sizes}
    save_pretrained(LLaDAV(decoder=decoder, vision=vision, image_id=codec.image_id), codec, path)


@pytest.fixture
def conf(data, models, tmp_path):
    """A function: settings of the evaluation -> path of its yaml."""
    plain = {"target": "src.samplers.sampler.Sampler", "length": LENGTH}
    reviser = {"target": "src.samplers.rediff.OverwriteAll"}
    base = {
        "models": {name: str(models / name) for name in ("mask", "stage2")},
        "samplers": {"plain": plain, "refine": {**plain, "reviser": reviser, "post_steps": 2}},
        "tokens_per_step": [16, 32],
        "data": {
            "target": "datamodules.captions.CaptionData",
            "path": str(data),
            "response_length": LENGTH,
            "image_size": 48,
        },
        "split": "test",
        "num": NUM,
        "batch_size": 3,
        "metrics": [{"target": "src.metrics.scenes.SceneQuality"}, {"target": "src.metrics.text.Bleu"}],
        "headline": ["quality", "syntax"],
        "out": str(tmp_path / "out"),
        "seed": 0,
    }

    def write(**changed) -> str:
        path = tmp_path / "evaluate.yaml"
        path.write_text(yaml.safe_dump({"evaluate": {**base, **changed}}, sort_keys=False))
        return f"conf={path}"

    return write


def results(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "results.json").read_text())


def captions(tmp_path, name) -> list[dict]:
    return read_jsonl(tmp_path / "out" / "captions" / f"{name}.jsonl")


def records(data) -> list[dict]:
    index = read_manifest(data / "test")
    return [s["json"] for shard in index["shards"] for s in read_shard(data / "test" / shard["name"])]


def inodes(tmp_path) -> dict[str, int]:
    return {path.stem: path.stat().st_ino for path in (tmp_path / "out" / "captions").iterdir()}


def test_results_are_those_of_the_captions(conf, data, tmp_path, capsys):
    main([conf()])
    found = results(tmp_path)["methods"]
    assert [(m, s, list(cells)) for m, row in found.items() for s, cells in row.items()] == [
        (m, s, ["16", "32"]) for m in ("mask", "stage2") for s in ("plain", "refine")
    ]
    lines, known = captions(tmp_path, "stage2-refine-16"), records(data)[:NUM]
    assert [line["key"] for line in lines] == [record["key"] for record in known]
    scores = [score_caption(Scene.from_dict(r["scene"]), line["text"]) for line, r in zip(lines, known, strict=True)]
    cell = found["stage2"]["refine"]["16"]
    for name in ("coverage", "factuality", "syntax"):
        values = [getattr(score, name) for score in scores]
        assert cell[name]["mean"] == pytest.approx(statistics.mean(values))
        assert cell[name]["se"] == pytest.approx(statistics.stdev(values) / math.sqrt(NUM))
    assert cell["quality"]["mean"] == pytest.approx((cell["coverage"]["mean"] + cell["factuality"]["mean"]) / 2)
    assert {stat["n"] for name, stat in cell.items() if name != "seconds"} == {NUM}
    assert found["mask"]["plain"]["16"]["forwards"]["mean"] == LENGTH / 16
    assert found["mask"]["plain"]["32"]["forwards"]["mean"] == math.ceil(LENGTH / 32)
    assert found["mask"]["plain"]["16"]["edits"]["mean"] == 0
    printed = capsys.readouterr().out
    assert "forward calls (and seconds) per caption, mask plain: 3.0 (0." in printed
    assert "quality  sampler  16" in printed
    assert (tmp_path / "out" / "table.md").read_text().count("| stage2 | refine |") == 2
    for name in ("quality.png", "captions.png"):
        assert Image.open(tmp_path / "out" / name).size > (400, 300)


def test_captions_do_not_depend_on_the_batch_size(conf, tmp_path):
    main([conf(tokens_per_step=[16])])
    first = captions(tmp_path, "mask-refine-16")
    main([conf(tokens_per_step=[16], batch_size=1, out=str(tmp_path / "again"))])
    again = (tmp_path / "again" / "captions" / "mask-refine-16.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in again] == [line["text"] for line in first]


def test_a_rerun_does_only_what_is_missing(conf, tmp_path):
    main([conf(tokens_per_step=[32])])
    first = inodes(tmp_path)
    (tmp_path / "out" / "captions" / "stage2-plain-32.jsonl").write_text("")
    main([conf()])
    second = inodes(tmp_path)
    changed = {name for name in first if first[name] != second[name]}
    assert changed == {"stage2-plain-32"}
    assert len(second) == 8
    main([conf(seed=1, tokens_per_step=[32])])
    third = inodes(tmp_path)
    assert {name for name in second if second[name] != third[name]} == set(first)
    assert set(results(tmp_path)["meta"]["cells"]) == set(first)


def test_an_interrupted_run_keeps_finished_cells_and_a_new_model_is_evaluated_anew(
    conf, data, models, tmp_path, capsys
):
    broken = tmp_path / "broken"
    codec = Codec.load(data / "tokenizer")
    write_model(broken, codec, seed=5)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes((models / "mask" / "model.safetensors").read_bytes())
    settings = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(
        json.dumps({**settings, "decoder": {**settings["decoder"], "num_hidden_layers": 2}})
    )
    names = {"models": {"mask": str(models / "mask"), "stage2": str(broken)}, "tokens_per_step": [32]}
    with pytest.raises(SystemExit):
        main([conf(**names)])
    assert "does not match its config" in capsys.readouterr().err
    assert list(results(tmp_path)["methods"]) == ["mask"]
    first = inodes(tmp_path)
    assert set(first) == {"mask-plain-32", "mask-refine-32"}
    (broken / "config.json").write_text(json.dumps(settings))
    (broken / "model.safetensors").write_bytes(weights)
    main([conf(**names)])
    assert list(results(tmp_path)["methods"]) == ["mask", "stage2"]
    second = inodes(tmp_path)
    write_model(broken, codec, seed=6)
    main([conf(**names)])
    third = inodes(tmp_path)
    assert all(first[name] == second[name] == third[name] for name in first)
    assert all(second[name] != third[name] for name in second.keys() - first.keys())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"models": {"stage1": "nowhere/model"}},
            "no model 'stage1' in nowhere/model: train it with `python -m src.train",
        ),
        (
            {"models": {"mask": "nowhere/sft/mask/model"}},
            "nowhere/sft/mask/model: train it with `python -m src.train conf=mask,task/sft`",
        ),
        ({"samplers": {"plain": {"target": "src.samplers.unmask.TopK"}}}, "evaluate.samplers.plain: src.samplers."),
        (
            {"samplers": {"plain": {"target": "src.samplers.sampler.Sampler", "length": 4, "reviser": "OverwriteAll"}}},
            "samplers.plain.reviser: expected",
        ),
        ({"headline": ["qualty"]}, "no metric qualty; there are coverage"),
        ({"headline": []}, "evaluate.headline: name at least one metric, for example [quality]"),
        ({"split": "tests"}, "evaluate.split must be train, val or test, got 'tests'"),
        ({"samplers": {"plain": {"target": "src.samplers.sampler.Sampler"}}}, "length"),
        ({"num": 0}, "evaluate.num must be at least 1, got 0"),
        ({"tokens_per_step": 16}, "evaluate.tokens_per_step: expected a list of whole numbers such as [1, 8], got 16"),
        ({"tokens_per_step": []}, "such as [1, 8], got []"),
        ({"tokens_per_step": [0, 8]}, "such as [1, 8], got [0, 8]"),
        ({"models": {"mask": None, "stage1": None}}, "evaluate.models: none left to evaluate"),
        ({"samplers": {"plain": None}}, "evaluate.samplers: none left to evaluate"),
        ({"samplers": {"plain": 3}}, "evaluate.samplers.plain: expected a mapping with `target:` or null, got 3"),
        ({"samplers": {"plain": "plane"}}, "no configuration 'sampler/plane'; did you mean 'sampler/plain'?"),
    ],
)
def test_mistakes_are_said_in_one_line(changed, words, conf, capsys):
    with pytest.raises(SystemExit) as stop:
        main([conf(**{"tokens_per_step": [32], **changed})])
    assert stop.value.code == 2
    assert words in (said := capsys.readouterr().err)
    assert said.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in said


def test_a_null_leaves_out_and_a_plus_adds(conf, models, tmp_path):
    named = conf(tokens_per_step=[32])
    changes = ["evaluate.models.stage2=null", f"+evaluate.models.mine={models / 'stage2'}"]
    main([named, *changes, "evaluate.samplers.refine=null"])
    found = results(tmp_path)
    assert {method: list(row) for method, row in found["methods"].items()} == {"mask": ["plain"], "mine": ["plain"]}
    assert list(found["meta"]["settings"]["samplers"]) == ["plain"]


def settings_of(sampler: Sampler) -> dict:
    """What a sampler does besides its speed, as values that can be compared."""
    reviser = sampler.reviser and (type(sampler.reviser), vars(sampler.reviser))
    return {**vars(sampler), "reviser": reviser, "tokens_per_step": None, "steps": None}


def test_a_sampler_by_name_is_that_of_generate_with_the_response_length_of_the_data(conf, models):
    cfg = load_config([conf(), "evaluate.samplers.refine=refine", "+evaluate.samplers.mine=released"])
    samplers = complete(cfg.evaluate).samplers
    for name, file in (("refine", "refine"), ("mine", "released")):
        argv = [f"model.path={models / 'mask'}", "images=i", f"sampler={file}", f"length={LENGTH}"]
        generates = choose_sampler(load_config(["conf=generate", *argv]))
        assert settings_of(build(samplers[name])) == settings_of(generates)
        assert load_part("sampler", file)["length"] != LENGTH
    assert samplers.plain == cfg.evaluate.samplers.plain


@pytest.mark.parametrize("name", ["plain", "refine"])
def test_the_samplers_of_the_shipped_evaluation_are_those_of_generate(name):
    shipped = build(complete(load_config(["conf=evaluate"]).evaluate).samplers[name])
    assert settings_of(shipped) == settings_of(build(load_part("sampler", name)))
    other = load_config(["conf=evaluate", "evaluate.data.response_length=32"]).evaluate.samplers[name]
    assert build(other).length == 32


def test_a_split_with_fewer_images_says_so(conf, tmp_path, capsys, caplog):
    main([conf(tokens_per_step=[32], num=9)])
    assert "evaluate.num=9, but the split test has only 8 samples: evaluating those" in caplog.text
    assert "standard error over 8 captions" in capsys.readouterr().out
    assert results(tmp_path)["meta"]["data"]["taken"] == 8
    caplog.clear()
    main([conf(tokens_per_step=[32], num=8)])
    assert "evaluating those" not in caplog.text


def test_damaged_images_are_left_out_and_counted(conf, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    shard = tmp_path / "data" / "test" / "test-000000.tar"
    second = records(data)[1]["key"]
    with tarfile.open(shard) as tar:
        at = tar.getmember(f"{second}.png").offset_data
    shard.write_bytes(shard.read_bytes()[:at] + bytes(64) + shard.read_bytes()[at + 64 :])
    node = {"target": "datamodules.captions.CaptionData", "response_length": LENGTH, "image_size": 48}
    main([conf(data={**node, "path": str(tmp_path / "data")}, tokens_per_step=[32], num=8)])
    names = [record["key"] for record in records(data) if record["key"] != second]
    assert [line["key"] for line in captions(tmp_path, "mask-plain-32")] == names
    assert results(tmp_path)["meta"]["data"]["left_out"] == 1
    assert results(tmp_path)["methods"]["mask"]["plain"]["32"]["quality"]["n"] == 7


@pytest.mark.parametrize(
    "path",
    [
        "src/types.py",
        "src/evaluate.py",
        "src/evaluation/cells.py",
        "src/text/tokenizer.py",
        "src/io/shards.py",
        "src/models/tiling.py",
        "src/text/prompt_format.py",
        "src/metrics/text.py",
        "src/samplers/sampler.py",
        "src/models/llada.py",
        "src/scenes/score.py",
        "datamodules/captions.py",
        "datamodules/loader.py",
    ],
)
def test_code_that_makes_the_numbers_makes_them_stale(path, tmp_path):
    root = Path(src.evaluate.__file__).parents[1]
    for package in ("src", "datamodules"):
        shutil.copytree(root / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    before = code_hash(tmp_path)
    assert before == code_hash(root)
    (tmp_path / path).write_text((tmp_path / path).read_text() + "\n# changed\n")
    assert code_hash(tmp_path) != before


def test_fewer_captions_than_images_of_the_picture(conf, tmp_path):
    """A batch that is larger than `num` has images without captions behind the taken ones."""
    main([conf(batch_size=8, num=2, tokens_per_step=[48])])
    assert len(captions(tmp_path, "mask-plain-48")) == 2
    assert (tmp_path / "out" / "captions.png").is_file()


def test_a_response_length_that_no_model_was_trained_with_is_said(conf, models, data, tmp_path, caplog):
    model = from_pretrained(models / "mask")
    model.response_length = 32
    save_pretrained(model, Codec.load(data / "tokenizer"), tmp_path / "model")
    main([conf(models={"odd": str(tmp_path / "model")}, num=1, tokens_per_step=[48])])
    assert "odd: evaluate.data.response_length=48, but the model was trained with response length 32" in caplog.text


def test_photographs_are_compared_with_their_captions(tmp_path):
    """The shipped configuration, on pictures and captions of this test."""
    for number in range(12):
        Image.new("RGB", (20, 30), (number * 20, 0, 0)).save(tmp_path / f"{number}.png")
    lines = [
        json.dumps({"image": f"{n}.png", "captions": ["A red thing.", "One thing."], "split": split})
        for n, split in enumerate(["train"] * 6 + ["val"] * 2 + ["test"] * 4)
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    Photos(
        out=str(tmp_path / "photos"), images=str(tmp_path), annotations=str(tmp_path / "captions.jsonl"),
        image_size=48, vocab_size=300, response_length=64, prompt="What is it?",
    ).run()  # fmt: skip
    codec = Codec.load(tmp_path / "photos" / "tokenizer")
    for seed, name in enumerate(["mask", "stage1", "stage2"]):
        write_model(tmp_path / name, codec, seed=seed)
    settings = [f"models.{name}={tmp_path / name}" for name in ("mask", "stage1", "stage2")]
    settings += [f"data.path={tmp_path / 'photos'}", "data.image_size=48", f"out={tmp_path / 'out'}"]
    main(["conf=evaluate_photos", *(f"evaluate.{line}" for line in [*settings, "tokens_per_step=[32]"])])
    found = results(tmp_path)["methods"]["stage2"]["refine"]["32"]
    text = captions(tmp_path, "stage2-refine-32")[0]
    assert found["word_f1"]["n"] == found["bleu"]["n"] == 4
    assert text["scores"]["word_f1"] == ReferenceOverlap().score(text["text"], {"captions": [
        {"text": "A red thing."}, {"text": "One thing."}]})["word_f1"]  # fmt: skip
    assert "| stage2 | refine |" in (tmp_path / "out" / "table.md").read_text()


def test_models_with_other_tokenizers_are_refused(conf, models, tmp_path, capsys):
    codec = Codec.train(["another vocabulary"], vocab_size=40)
    write_model(tmp_path / "other", codec, seed=0)
    with pytest.raises(SystemExit):
        main([conf(models={"mask": str(models / "mask"), "other": str(tmp_path / "other")})])
    assert "tokenizers: mask, other" in capsys.readouterr().err


def test_the_captions_are_what_the_sampler_writes(conf, data, models, tmp_path):
    from datamodules.captions import CaptionData

    main([conf(tokens_per_step=[16])])
    codec = Codec.load(data / "tokenizer")
    loader = CaptionData(
        path=str(data), codec=codec, batch_size=NUM, response_length=LENGTH, image_size=48
    ).test_dataloader()
    batch: Batch = next(iter(loader))
    backbone = from_pretrained(models / "mask").eval()
    prefix = backbone.encode_prefix(batch.prefix)
    found = Sampler(length=LENGTH, tokens_per_step=16)(backbone, prefix, special=codec.special, keys=batch.keys, seed=0)
    texts = [line["text"] for line in captions(tmp_path, "mask-plain-16")]
    assert texts == [codec.decode(ids) for ids in found.ids.tolist()]


# two methods, two speeds; the baseline loses 0.4, the contender 0.1
HAND = {
    ("mask", "plain", 1): [1.0, 0.8],
    ("mask", "plain", 8): [0.4, 0.6],
    ("stage2", "refine", 1): [0.9, 0.9],
    ("stage2", "refine", 8): [0.8, 0.8],
}


@pytest.fixture
def hand():
    methods: dict = {}
    for (method, sampler, speed), values in HAND.items():
        se = statistics.stdev(values) / math.sqrt(2)
        stat = {"mean": statistics.mean(values), "se": se, "n": 2}
        methods.setdefault(method, {}).setdefault(sampler, {})[str(speed)] = {"quality": stat}
    return {"methods": methods}, {cell: {"quality": values} for cell, values in HAND.items()}


def test_paired_difference_by_hand():
    found = paired_difference([0.5, 0.9, 0.1], [0.1, 0.2, 0.3])
    differences = [0.4, 0.7, -0.2]
    assert found["mean"] == pytest.approx(0.3)
    assert found["se"] == pytest.approx(statistics.stdev(differences) / math.sqrt(3))
    with pytest.raises(ValueError, match="longer"):
        paired_difference([1.0], [1.0, 2.0])


def test_claims_by_hand(hand):
    # mask: -0.6, -0.2; stage2: -0.1, -0.1; at 8 tokens/step stage2 leads by 0.4 and 0.2, at 1 by -0.1 and 0.1
    assert claims(*hand, headline=["quality"]) == [
        "quality from 1 to 8 tokens/step: mask plain -0.400 ± 0.200",
        "quality from 1 to 8 tokens/step: stage2 refine -0.100 ± 0.000, 25% of the change of mask plain",
        "quality at 1 tokens/step: stage2 refine - mask plain +0.000 ± 0.100",
        "quality at 8 tokens/step: stage2 refine - mask plain +0.300 ± 0.100",
    ]


def test_a_gain_is_no_share_of_a_loss(hand):
    hand[1]["stage2", "refine", 8]["quality"] = [1.0, 1.0]
    gain = "quality from 1 to 8 tokens/step: stage2 refine +0.100 ± 0.000"
    assert claims(*hand, headline=["quality"])[1] == gain


def test_tables_are_aligned_and_leave_gaps(hand):
    del hand[0]["methods"]["mask"]["plain"]["1"]["quality"]
    lines = text_report(*hand, headline=["quality"]).split("\n\n")[1].splitlines()
    assert lines[:3] == [
        "quality  sampler  1             8",
        "mask     plain    -             0.500 ±0.100",
        "stage2   refine   0.900 ±0.000  0.800 ±0.000",
    ]
    assert "| stage2 | refine | 0.900 ±0.000 | 0.800 ±0.000 |" in markdown_report(*hand, headline=["quality"])


def test_the_head_says_what_a_row_costs_and_what_the_last_steps_do(hand):
    for sampler, calls in (("plain", [8.0, 1.0]), ("refine", [9.0, 2.5])):
        method = {"plain": "mask", "refine": "stage2"}[sampler]
        for cell, mean in zip(hand[0]["methods"][method][sampler].values(), calls, strict=True):
            cell["forwards"] = {"mean": mean, "se": 0.0, "n": 2}
    head = text_report(*hand, headline=["quality"]).split("\n\n")[0].splitlines()
    assert head == [
        "columns: 1, 8 tokens per step; mean ± standard error over 2 captions",
        "forward calls (and seconds) per caption, mask plain: 8.0, 1.0",
        "forward calls (and seconds) per caption, stage2 refine: 9.0, 2.5",
    ]
    hand[0]["meta"] = {"settings": {"samplers": {"plain": {"eos_last": True}}}}
    assert "only fill in end of text" in text_report(*hand, headline=["quality"])
    assert "- with eos_last" in markdown_report(*hand, headline=["quality"])


def test_a_plot_without_standard_errors_is_drawn(hand, tmp_path):
    hand[0]["methods"]["mask"]["plain"]["8"]["quality"]["se"] = None
    plot(hand[0], tmp_path / "a.png", headline=["quality"])
    colours = Image.open(tmp_path / "a.png").convert("RGB").getcolors(1 << 20)
    assert {(31, 119, 180), (255, 127, 14)} <= {colour for _, colour in colours or []}  # the lines of both methods


def test_the_picture_marks_flaws_and_only_flaws(tmp_path):
    def colours(marks):
        panels = [Panel("before", "A red ring. Red the is.", marks), Panel("after", "A blue ring.", [])]
        picture([Example(Image.new("RGB", (48, 48), (1, 2, 3)), panels)], tmp_path / "p.png")
        return {colour for _, colour in Image.open(tmp_path / "p.png").getcolors(1 << 20) or []}

    assert not colours([]) & set(FILL.values())
    assert set(FILL.values()) <= (found := colours([Mark(2, 5, "false"), Mark(12, 23, "ungrammatical")]))
    assert (1, 2, 3) in found


def test_layout_keeps_order_stays_inside_and_never_overlaps():
    words = [
        "a",
        "caption",
        "of",
        "several",
        "words",
        "and",
        "one",
        "extraordinarily" * 3,
        "long",
        "one",
        "at",
        "all",
    ]
    placed = layout([Piece(word) for word in words], width=100, size=13)
    assert [piece.text for piece, _ in placed.pieces] == words
    boxes = [box for _, box in placed.pieces]
    assert boxes == sorted(boxes, key=lambda box: (box[1], box[0]))
    for (_, top, right, _), (left, next_top, _, _) in pairwise(boxes):
        assert right < left or top < next_top
    assert all(right <= 100 or left == 0 for left, _, right, _ in boxes)
    assert placed.height >= max(box[3] for box in boxes)


def test_paint_puts_ink_into_the_box():
    image = Image.new("RGB", (120, 40), "white")
    placed = layout([Piece("word", ink=(255, 0, 0), fill=(0, 0, 255))], width=100, size=13)
    paint(ImageDraw.Draw(image), placed, at=(10, 10), size=13)
    left, top, right, bottom = placed.pieces[0][1]
    box = (10 + left - 1, 10 + top, 10 + right + 1, 10 + bottom + 1)
    assert image.crop(box).getpixel((0, 0)) == (0, 0, 255)
    image.paste((255, 255, 255), box)
    assert image.getcolors() == [(120 * 40, (255, 255, 255))]  # nothing was drawn outside


def test_nan_is_null_on_disk_and_nan_again_for_a_rerun(tmp_path):
    cell, nothing = Cell("m", "plain", 1), {"mean": math.nan, "se": None, "n": 0}
    store = ResultStore(tmp_path, {}, {cell: "s"}, {"m": "b"})
    store.add(cell, {"rings": nothing}, [{"key": "a", "text": "C\u2028C", "scores": {"rings": math.nan, "valid": 1.0}}])
    store.add_bound("m", {"nelbo": nothing})
    strict = lambda text: json.loads(text, parse_constant=pytest.fail)  # noqa: E731
    written = strict((tmp_path / "results.json").read_text())
    assert written["methods"]["m"]["plain"]["1"]["rings"] == {"mean": None, "se": None, "n": 0}
    assert written["bounds"]["m"]["nelbo"]["mean"] is None
    assert strict((tmp_path / "captions" / f"{cell.file}.jsonl").read_text())["scores"]["rings"] is None
    again = ResultStore(tmp_path, {}, {cell: "s"}, {"m": "b"})
    assert math.isnan(again.stats[cell]["rings"]["mean"]) and math.isnan(again.bounds["m"]["nelbo"]["mean"])
    (line,) = again.captions(cell)
    assert math.isnan(line["scores"]["rings"]) and line["scores"]["valid"] == 1.0 and line["text"] == "C\u2028C"
