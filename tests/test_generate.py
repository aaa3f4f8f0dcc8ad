"""The verb `generate` on real files: images, folders, dataset splits, resuming, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from datamodules.captions import to_pixels
from src.diffusion.revisers import OverwriteAll
from src.diffusion.sampler import Sampler
from src.generate import main
from src.models.checkpoint import save_pretrained
from src.models.llada_v import LLaDAV
from src.shards import write_shards
from src.tokenizer import Codec

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
        Image.effect_noise((32, 32), 40 + 60 * number).convert("RGB").save(folder / name)
    return folder


def run(model, images, out, *settings):
    main(
        ["conf=generate", f"model.path={model}", f"images={images}", f"out={out}", f"length={LENGTH}",
         *({"tokens_per_step=4"} if not any("steps=" in s for s in settings) else ()), *settings]
    )  # fmt: skip
    return lines(out)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def ask(text=PROMPT):
    return f"prompt={text}"


def directly(backbone, codec, photo, sampler, *, start=None, prompt=PROMPT):
    """The sampler called without the verb, on one image."""
    pixels = to_pixels(Image.open(photo).convert("RGB"), 32)[None]
    with torch.no_grad():
        prefix = backbone.encode_prefix(
            {"prompt_ids": torch.tensor([codec.prompt_ids(prompt)]), "pixel_values": pixels}
        )
    return sampler(backbone, prefix, special=codec.special, keys=[photo.name], seed=0, start=start)


@pytest.mark.parametrize("name", ["plain", "refine"])
def test_captions_are_those_of_the_sampler(name, model, backbone, codec, photos, tmp_path):
    found = run(model, photos, tmp_path / "out.jsonl", ask(), f"sampler={name}", "batch_size=2")
    assert [line["key"] for line in found] == ["a.png", "b.png", "more/c.png"]
    extra = {} if name == "plain" else {"reviser": OverwriteAll(), "post_steps": 1}
    sampler = Sampler(length=LENGTH, tokens_per_step=4, eos_last=True, **extra)
    for line in found:
        expected = directly(backbone, codec, photos / line["key"], sampler)
        assert line["text"] == codec.decode(expected.ids[0].tolist())
        assert (line["forwards"], line["edits"]) == (int(expected.forwards), int(expected.edits))
        assert (line["tokens_per_step"], line["seed"], line["sampler"]) == (4, 0, name)


def test_a_caption_to_correct_is_what_the_sampler_starts_from(model, backbone, codec, photos, tmp_path):
    (line,) = run(model, photos / "a.png", tmp_path / "o.jsonl", ask(), f"caption={TEXTS[0]}", "post_steps=2")
    ids = [*codec.encode(TEXTS[0])[0], codec.eot_id]
    start = torch.tensor([ids + [codec.eos_id] * (LENGTH - len(ids))])
    sampler = Sampler(length=LENGTH, reviser=OverwriteAll(), post_steps=2, eos_last=True)
    expected = directly(backbone, codec, photos / "a.png", sampler, start=start)
    assert line["text"] == codec.decode(expected.ids[0].tolist())
    assert line["edits"] == int(expected.edits) > 0
    assert 1 <= line["forwards"] <= 2
    assert line["caption"] == TEXTS[0]


def test_a_split_brings_its_own_prompts_and_keys(model, backbone, codec, photos, tmp_path):
    samples = [
        {
            "__key__": name,
            "json": {"key": name, "prompt": prompt},
            "png": (photos / f"{name}.png").read_bytes(),
        }
        for name, prompt in [("a", PROMPT), ("b", "Describe it.")]
    ]
    samples.append({"__key__": "broken", "json": {"prompt": PROMPT}, "png": samples[0]["png"][:60]})
    split = tmp_path / "data" / "test"
    write_shards(split, samples, prefix="test", per_shard=2, kind="captions", tokenizer=codec.fingerprint)
    found = run(model, split, tmp_path / "out.jsonl", "sampler=plain")
    assert [line["key"] for line in found] == ["a", "b"]
    same = run(model, split, tmp_path / "same.jsonl", "sampler=plain", ask())
    asked = [
        (found[0], "a", PROMPT),
        (found[1], "b", "Describe it."),
        (same[0], "a", PROMPT),
        (same[1], "b", PROMPT),
    ]
    for line, name, prompt in asked:  # one by one, without the padding of the shorter prompt
        sampler = Sampler(length=LENGTH, tokens_per_step=4)
        expected = directly(backbone, codec, photos / f"{name}.png", sampler, prompt=prompt)
        assert line["text"] == codec.decode(expected.ids[0].tolist())
    assert found[1]["text"] != same[1]["text"]


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
    said = capsys.readouterr()
    assert "2 captions written" in said.err
    assert "1 were there already" in said.err
    assert said.out == "".join(f"{line['key']}: {line['text']}\n" for line in whole[1:])
    before = out.stat().st_mtime_ns
    run(model, photos, out, ask())
    assert out.stat().st_mtime_ns == before


def test_a_trace_ends_in_the_caption(model, codec, photos, tmp_path):
    found = run(model, photos, tmp_path / "out.jsonl", ask(), "trace=true")
    for line, trace in zip(found, lines(tmp_path / "out.trace.jsonl"), strict=True):
        assert trace["key"] == line["key"]
        assert codec.decode(trace["steps"][-1]["tokens"]) == line["text"]
        assert trace["steps"][-1]["forwards"] == line["forwards"]
        assert sum(len(step["unmasked"]) for step in trace["steps"]) == LENGTH


def test_unreadable_images_are_named_and_the_rest_goes_on(model, photos, tmp_path, capsys):
    (photos / "bad.png").write_bytes(b"this is no image")
    (photos / "cut.png").write_bytes((photos / "a.png").read_bytes()[:100])
    (photos / ".hidden.png").write_bytes(b"")
    (photos / "notes.txt").write_text("not an image and not meant as one")
    found = run(model, photos, tmp_path / "out.jsonl", ask())
    assert [line["key"] for line in found] == ["a.png", "b.png", "more/c.png"]
    assert "3 captions written" in (said := capsys.readouterr().err)
    assert "2 images could not be read: bad.png, cut.png" in said


def test_exit_code_1_when_no_image_could_be_read(model, photos, tmp_path):
    bad = photos / "bad.png"
    bad.write_bytes(b"this is no image")
    with pytest.raises(SystemExit) as stop:
        run(model, bad, tmp_path / "out.jsonl", ask())
    assert stop.value.code == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], "image files need a prompt"),
        ([ask(), "sampler=refin"], "did you mean 'sampler/refine'"),
        ([ask(), "steps=8", "tokens_per_step=2"], "tokens_per_step=2 steps=8"),
        ([ask(), "sampler=plain", "caption=A ring."], "sampler=plain has no post_steps"),
        ([ask(), f"caption={TEXTS[0] * 9}"], "a response has room for 23"),
        ([ask(), "batch_size=0"], "batch_size must be at least 1, got 0"),
        ([ask(), "images=nowhere"], "no file or folder nowhere"),
        ([ask(), "model.path=nowhere"], "no tokenizer in nowhere"),
        ([ask(), "temprature=1"], "did you mean 'temperature'"),
    ],
)
def test_mistakes_are_said_in_one_line(settings, words, model, photos, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(model, photos, tmp_path / "out.jsonl", *settings)
    assert stop.value.code == 2
    assert words in (said := capsys.readouterr().err)
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_captions_of_other_settings_are_not_mixed(model, photos, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    run(model, photos, out, ask())
    text = out.read_text()
    with pytest.raises(SystemExit):
        run(model, photos, out, ask(), "seed=1", "temperature=0.5")
    assert "made with another temperature, seed" in capsys.readouterr().err
    out.write_text("not json\n" + text)
    with pytest.raises(SystemExit):
        run(model, photos, out, ask())
    assert "line 1 of" in capsys.readouterr().err
