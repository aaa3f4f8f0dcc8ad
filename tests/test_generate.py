"""The verb `generate` on real files: images, folders, dataset splits, resuming, mistakes."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.collate import image_inputs
from src.generate import main
from src.io.shards import write_shards
from src.models.hf.folder import save_pretrained
from src.models.llada_v import LLaDAV
from src.models.tiling import Square
from src.samplers.rediff import OverwriteAll
from src.samplers.sampler import Sampler
from src.text.tokenizer import Codec
from testing.files import read_jsonl

TEXTS = ["A small red ring is in the top left.", "There is a large blue square below it."]
PROMPT = "Describe the picture."
LENGTH = 24


@pytest.fixture(scope="module")
def codec():
    return Codec.train([*TEXTS, PROMPT], vocab_size=96)


@pytest.fixture(scope="module")
def backbone(codec):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    decoder = {"vocab_size": codec.vocab_size, "num_hidden_layers": 2, "attention": "prefix", **sizes}
    vision = {"num_hidden_layers": 1, "image_size": 32, "patch_size": 16, **sizes}
    model = LLaDAV(decoder=decoder, vision=vision, image_id=codec.image_id).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)  # fresh weights are nearly uniform: this makes them choose
    return model


@pytest.fixture(scope="module")
def model(codec, backbone, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model"
    save_pretrained(backbone, codec, path)
    return path


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(["a.png", "b.png", "more/c.png"]):
        pixels = np.random.default_rng(number).normal(128, 40 + 60 * number, (32, 32)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).convert("RGB").save(folder / name)
    return folder


def run(model, images, out, *settings):
    main(
        ["conf=generate", f"model.path={model}", f"images={images}", f"out={out}", f"length={LENGTH}",
         *({"tokens_per_step=4"} if not any("steps=" in s for s in settings) else ()), *settings]
    )  # fmt: skip
    return lines(out)


def lines(path):
    return read_jsonl(path)


ENDS = {"eos_last": True, "eos_behind_eot": True, "early_stop": True}  # as in conf/sampler/plain.yaml


def ask(text=PROMPT):
    return f"prompt={text}"


def directly(backbone, codec, photo, sampler, *, start=None, prompt=PROMPT):
    """The sampler called without the verb, on one image."""
    pixels = image_inputs([[Image.open(photo).convert("RGB")]], Square(32))
    with torch.no_grad():
        prefix = backbone.encode_prefix({"prompt_ids": torch.tensor([codec.prompt_ids(prompt)]), **pixels})
    return sampler(backbone, prefix, special=codec.special, keys=[photo.name], seed=0, start=start)


@pytest.mark.parametrize("name", ["plain", "refine"])
def test_captions_are_those_of_the_sampler(name, model, backbone, codec, photos, tmp_path):
    """A photograph that is not square is put on a grey square: the whole picture is kept, and its shape."""
    wide = Image.effect_noise((64, 16), 90).convert("RGB")
    wide.save(photos / "wide.png")
    captions = run(model, photos, tmp_path / "out.jsonl", ask(), f"sampler={name}", "batch_size=2")
    assert [line["key"] for line in captions] == ["a.png", "b.png", "more/c.png", "wide.png"]
    square = Image.new("RGB", (32, 32), (128, 128, 128))
    square.paste(wide.resize((32, 8), Image.Resampling.BICUBIC, reducing_gap=3.0), (0, 12))
    square.save(photos / "wide.png")
    extra = {} if name == "plain" else {"reviser": OverwriteAll()}
    sampler = Sampler(length=LENGTH, tokens_per_step=4, **ENDS, **extra)
    for line in captions:
        expected = directly(backbone, codec, photos / line["key"], sampler)
        assert line["text"] == codec.decode(expected.ids[0].tolist())
        assert (line["forwards"], line["edits"]) == (int(expected.forwards), int(expected.edits))
        assert (line["tokens_per_step"], line["seed"], line["sampler"]) == (4, 0, name)


def test_a_caption_to_correct_is_what_the_sampler_starts_from(model, backbone, codec, photos, tmp_path):
    (line,) = run(model, photos / "a.png", tmp_path / "o.jsonl", ask(), f"caption={TEXTS[0]}")
    ids = [*codec.encode(TEXTS[0])[0], codec.eot_id]
    start = torch.tensor([ids + [codec.eos_id] * (LENGTH - len(ids))])
    sampler = Sampler(length=LENGTH, reviser=OverwriteAll(), post_steps=1, **ENDS)
    expected = directly(backbone, codec, photos / "a.png", sampler, start=start)
    assert (line["text"], line["caption"]) == (codec.decode(expected.ids[0].tolist()), TEXTS[0])
    assert line["edits"] == int(expected.edits) > 0


def test_a_split_brings_its_own_prompts_and_keys(model, backbone, codec, photos, tmp_path, capsys):
    image = {name: (photos / f"{name}.png").read_bytes() for name in "ab"}
    samples = [("a", PROMPT, image["a"]), ("b", "Describe it.", image["b"]), ("broken", PROMPT, image["a"][:60])]
    samples += [("marks", "<image> or <image>?", image["a"]), ("mark", f"<image>{PROMPT}", image["a"])]
    shards = [{"__key__": key, "json": {"key": key, "prompt": text}, "png": png} for key, text, png in samples]
    split = tmp_path / "data" / "test"
    write_shards(split, shards, prefix="test", per_shard=2, kind="captions", tokenizer=codec.fingerprint)
    own = run(model, split, tmp_path / "out.jsonl", "sampler=plain")
    assert [line["key"] for line in own] == ["a", "b", "marks", "mark"]
    assert "1 image could not be read: broken" in capsys.readouterr().err
    assert own[0]["text"] == own[3]["text"]  # the mark is where it would have been put
    same = run(model, split, tmp_path / "same.jsonl", "sampler=plain", ask())
    own[2]["key"] = "a"  # its two marks for one image are text
    pairs = [
        (own[0], PROMPT),
        (own[1], "Describe it."),
        (own[2], "<image> or <image>?"),
        (same[0], PROMPT),
        (same[1], PROMPT),
    ]
    for line, prompt in pairs:  # one by one, without the padding of the shorter prompt
        sampler = Sampler(length=LENGTH, tokens_per_step=4, eos_last=True)
        expected = directly(backbone, codec, photos / f"{line['key']}.png", sampler, prompt=prompt)
        assert line["text"] == codec.decode(expected.ids[0].tolist())
    assert own[1]["text"] != same[1]["text"]


def test_a_run_goes_on_where_it_was_killed(model, photos, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    whole = run(model, photos, out, ask(), "batch_size=1", "trace=true")
    text, trace = out.read_text(), out.with_suffix(".trace.jsonl")
    kept = text.splitlines(keepends=True)[0]
    half = trace.read_text().splitlines(keepends=True)[:2]  # killed between the trace and the line of b.png
    out.write_text(kept + text.splitlines()[1][:25])
    trace.write_text("".join(half) + '{"key"')
    capsys.readouterr()
    assert run(model, photos, out, ask(), "batch_size=1", "trace=true") == whole
    assert out.read_text() == text
    assert [line["key"] for line in lines(trace)] == ["a.png", "b.png", "more/c.png"]
    printed = capsys.readouterr()
    assert "2 captions written" in printed.err and "1 already there" in printed.err
    assert printed.out == "".join(f"{line['key']}: {line['text']}\n" for line in whole[1:])
    before = out.stat().st_mtime_ns
    run(model, photos, out, ask())
    assert out.stat().st_mtime_ns == before


def test_a_trace_can_be_read(model, codec, photos, tmp_path):
    """The text after each step, with _ for a mask: put together from the ids by hand; the last one is the caption."""
    captions = run(model, photos, tmp_path / "out.jsonl", ask(), "trace=true")
    for line, trace in zip(captions, lines(tmp_path / "out.trace.jsonl"), strict=True):
        steps = trace["steps"]
        for step in steps:
            ids = step["tokens"]
            ids = ids[: ids.index(codec.eot_id)] if codec.eot_id in ids else ids
            assert step["text"] == "".join("_" if i == codec.mask_id else codec.decode([i]) for i in ids)
        assert "_" in steps[0]["text"]
        assert (trace["key"], steps[-1]["text"], steps[-1]["forwards"]) == (line["key"], line["text"], line["forwards"])
        assert sum(len(step["unmasked"]) for step in steps) == LENGTH


def test_unreadable_images_are_named_and_the_rest_goes_on(model, photos, tmp_path, capsys):
    (photos / "bad.png").write_bytes(b"this is no image")
    (photos / "cut.png").write_bytes((photos / "a.png").read_bytes()[:100])
    (photos / ".hidden.png").write_bytes(b"")
    (photos / "notes.txt").write_text("not an image and not meant as one")
    captions = run(model, photos, tmp_path / "out.jsonl", ask())
    assert [line["key"] for line in captions] == ["a.png", "b.png", "more/c.png"]
    assert "3 captions written" in (message := capsys.readouterr().err)
    assert "2 images could not be read: bad.png, cut.png" in message
    with pytest.raises(SystemExit) as stop:
        run(model, photos / "bad.png", tmp_path / "none.jsonl", ask())
    assert stop.value.code == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], "image files need a prompt"),
        ([ask(), "sampler=refin"], "did you mean 'sampler/refine'"),
        ([ask(), "steps=8", "tokens_per_step=2"], "tokens_per_step=2 steps=8"),
        ([ask(), "sampler=plain", "caption=A ring."], "rewrites no finished text; use sampler=refine"),
        ([ask(), f"caption={TEXTS[0] * 9}"], "a response has room for 23"),
        (["images=FOLDER"], "is a whole dataset; choose a split, such as"),
        ([ask(), "prompt_format=FOLDER/broken.yaml"], "the chat template fails: Expected an expression"),
        (["images=null"], "images=null needs a prompt"),
        ([ask(), "model.path=TEXT"], "the model has no vision path"),
    ],
)
def test_mistakes_are_one_line(settings, words, model, text_model, photos, tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text("template: '{% if %}'")
    index = {"format": 2, "kind": "dataset", "tokenizer": "x", "counts": {}}
    (tmp_path / "index.json").write_text(json.dumps(index))
    settings = [s.replace("FOLDER", str(tmp_path)).replace("TEXT", str(text_model[1])) for s in settings]
    with pytest.raises(SystemExit) as stop:
        run(model, photos, tmp_path / "out.jsonl", *settings)
    assert stop.value.code == 2
    assert words in (message := capsys.readouterr().err)
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_captions_of_other_settings_or_models_are_not_mixed(model, backbone, codec, photos, tmp_path, capsys):
    """Other weights or another config, wherever the folder is; the same model may lie somewhere else."""

    def refused(folder, *settings) -> str:
        with pytest.raises(SystemExit):
            run(folder, photos, out, ask(), *settings)
        return capsys.readouterr().err

    out, other, mine = tmp_path / "out.jsonl", tmp_path / "other", tmp_path / "mine.yaml"
    mine.write_text(
        "base: sampler/refine\nsampler: {reviser: {target: src.samplers.rediff.OverwriteAll, scope: all}}\n"
    )
    run(model, photos, out, ask(), f"sampler={mine}")
    text = out.read_text()
    shutil.copytree(model, other)
    run(other, photos, out, ask(), f"sampler={mine}")
    changes = ("seed=1", "temperature=0.5", "join=upstream")
    values = "temperature: 0.0 in the file, 0.5 now; seed: 0 in the file, 1 now; join: null in the file, upstream now"
    assert f"made with other settings ({values})" in refused(model, f"sampler={mine}", *changes)
    # what the lines do not name one by one
    assert "other settings (an option of the sampler or of the model)" in refused(
        model, f"sampler={mine}", "model.attention=full"
    )
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    trained = copy.deepcopy(backbone)
    with torch.no_grad():
        trained.get_submodule("model.layers")[1].mlp.down_proj.weight.add_(1e-4)
    save_pretrained(trained, codec, tmp_path / "trained")
    for folder in (other, tmp_path / "trained"):
        assert "was made with other settings (model: " in refused(folder, f"sampler={mine}")
    mine.write_text("base: sampler/refine\nsampler: {eos_last: false}\n")
    assert "other settings (an option of the sampler or of the model)" in refused(model, f"sampler={mine}")
    assert out.read_text() == text


@pytest.fixture(scope="module")
def text_model(codec, tmp_path_factory):
    """A model that takes no images, and its folder."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    backbone = LLaDAV(decoder={"vocab_size": codec.vocab_size, **sizes}, vision=None, init_std=0.3).eval()
    with torch.no_grad():
        backbone.lm_head.weight[codec.eot_id] *= 3  # so that a text ends now and then
    path = tmp_path_factory.mktemp("models") / "text"
    save_pretrained(backbone, codec, path)
    return backbone, path


def answer(backbone, codec, question, key, sampler):
    """The sampler called without the verb, on one question without an image."""
    with torch.no_grad():
        prefix = backbone.encode_prefix({"prompt_ids": torch.tensor([codec.prompt_ids(question, images=0)])})
    return codec.decode(sampler(backbone, prefix, special=codec.special, keys=[key], seed=0).ids[0].tolist())


def test_questions_without_images(text_model, backbone, model, codec, tmp_path):
    sampler = Sampler(length=LENGTH, tokens_per_step=4, eos_last=True)
    (line,) = run(text_model[1], "null", tmp_path / "one.jsonl", ask(TEXTS[0]), "sampler=plain")
    assert (line["key"], line["text"]) == ("prompt", answer(text_model[0], codec, TEXTS[0], "prompt", sampler))
    questions = {"a": PROMPT, "b": TEXTS[0], "c": TEXTS[1]}
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"key": key, "prompt": text}) + "\n" for key, text in questions.items()))
    for folder, network in [(text_model[1], text_model[0]), (model, backbone)]:  # one with a vision path as well
        out = tmp_path / f"{folder.name}.jsonl"
        answers = run(folder, "null", out, f"prompt={file}", "sampler=plain", "batch_size=2")
        expected = {key: answer(network, codec, text, key, sampler) for key, text in questions.items()}
        assert {line["key"]: line["text"] for line in answers} == expected


def test_settings_reach_the_sampler(text_model, codec, tmp_path):
    """Guidance, a suffix, early stop and the response length that a model knows; a length that is given goes first."""
    backbone = copy.deepcopy(text_model[0])
    backbone.response_length = 20
    save_pretrained(backbone, codec, tmp_path / "m")
    prefix = backbone.encode_prefix({"prompt_ids": torch.tensor([codec.prompt_ids(PROMPT, images=0)])})
    suffix = torch.tensor(codec.encode(TEXTS[1])[0])
    cases = [
        ("length=null", 20, {}, None),
        ("cfg_scale=1.5", LENGTH, {"cfg_scale": 1.5}, None),
        ("early_stop=eot", LENGTH, {"early_stop": "eot"}, None),
        (f"suffix={TEXTS[1]}", LENGTH, {}, suffix),
    ]
    for number, (setting, length, options, after) in enumerate(cases):
        (line,) = run(tmp_path / "m", "null", tmp_path / f"{number}.jsonl", ask(), "sampler=plain", setting)
        sampler = Sampler(length=length, tokens_per_step=4, **{**ENDS, **options})
        sampled = sampler(backbone, prefix, special=codec.special, keys=["prompt"], seed=0, suffix=after)
        assert (line["text"], line["forwards"]) == (codec.decode(sampled.ids[0].tolist()), int(sampled.forwards))
