"""What `src.generate` is asked: files of questions, the empty text, lengths, and tokenizers of other models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from src.generate import main
from src.io.shards import write_shards
from src.models.hf.folder import save_pretrained
from src.models.llada_v import LLaDAV
from src.samplers.sampler import Sampler
from src.text.tokenizer import Codec
from testing.files import read_jsonl

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
NOT_A_QUESTION = 'q.jsonl is not {"key": "a", "prompt": "Why?"}: '
VISION = {**SIZES, "image_size": 16, "patch_size": 8}


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.train(["Why is a red ring round?"], vocab_size=300, alphabet="bytes")


@pytest.fixture(scope="module")
def model(codec, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "model"
    decoder = {"vocab_size": codec.vocab_size, **SIZES}
    save_pretrained(LLaDAV(decoder=decoder, vision=VISION, image_id=codec.image_id, init_std=0.5), codec, path)
    return path


@pytest.fixture
def photo(tmp_path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def run(model: Path, out: Path, *settings: str) -> list[dict]:
    main(["conf=generate", f"model.path={model}", f"out={out}", "sampler=plain", "length=8", "steps=4", *settings])
    return read_jsonl(out)


def refused(capsys, model: Path, out: Path, *settings: str) -> str:
    with pytest.raises(SystemExit) as stop:
        run(model, out, *settings)
    assert stop.value.code == 2
    assert not out.exists()
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    return said


def asked(tmp_path: Path, content: str | bytes) -> str:
    file = tmp_path / "q.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return f"prompt={file}"


# The empty text


@pytest.mark.parametrize("setting", ["system="])
def test_no_system_text(setting, golden, golden_folder_v, golden_model, tmp_path):
    """A shell takes the quotes away: both mean that there is none, as the codec makes of an empty text."""
    heads = golden.meta["vision_config"]["num_attention_heads"]
    more = ("images=null", "prompt=Why?", "model.dtype=float32", f"model.vision={{num_attention_heads: {heads}}}")
    (line,) = run(golden_folder_v, tmp_path / "out.jsonl", *more, setting)
    assert line["system"] == ""
    own = Codec.load(golden_folder_v)
    bare = own.with_format(system="")
    assert bare.prompt_ids("Why?", images=0) != own.prompt_ids("Why?", images=0)
    prefix = golden_model.encode_prefix({"prompt_ids": torch.tensor([bare.prompt_ids("Why?", images=0)])})
    sampler = Sampler(length=8, steps=4, eos_last=True)
    found = sampler(golden_model, prefix, special=bare.special, keys=["prompt"], seed=0)
    assert line["text"] == bare.decode(found.ids[0].tolist())


def test_an_empty_prompt_goes_before_that_of_the_data(model, codec, photo, tmp_path):
    sample = {"__key__": "a", "json": {"prompt": "Why is a red ring round?"}, "png": photo.read_bytes()}
    write_shards(tmp_path / "test", [sample], prefix="test", per_shard=1, kind="captions", tokenizer=codec.fingerprint)
    (own,) = run(model, tmp_path / "own.jsonl", f"images={tmp_path / 'test'}")
    (bare,) = run(model, tmp_path / "bare.jsonl", f"images={tmp_path / 'test'}", "prompt=")
    (same,) = run(model, tmp_path / "same.jsonl", f"images={photo}", "prompt=")
    assert bare["text"] == same["text"] != own["text"]


def test_empty_paths_are_refused(model, tmp_path, capsys):
    assert "images: expected a path, got ''" in refused(capsys, model, tmp_path / "out", "images=", "prompt=Why?")


# Files of questions


def test_a_byte_order_mark_and_blank_lines_are_passed_over(model, tmp_path):
    lines = ['{"key": "a", "prompt": "Why?"}', "", '{"key": "b", "prompt": "Why\u2028not?"}', "  ", ""]
    plain = asked(tmp_path, "\n".join(lines[::2][:2]))
    expected = run(model, tmp_path / "plain.jsonl", "images=null", plain)
    marked = asked(tmp_path, b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    found = run(model, tmp_path / "marked.jsonl", "images=null", marked)
    assert [(line["key"], line["text"]) for line in found] == [(line["key"], line["text"]) for line in expected]
    assert [line["key"] for line in found] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"key": "a", "prompt": "Why?", "image": "a.png"}\n', NOT_A_QUESTION),
        ('{"key": 1, "prompt": "Why?"}\n', NOT_A_QUESTION),
        ('{"key": "b"}', NOT_A_QUESTION),
        ('{"key": "b", "prompt": 3}', NOT_A_QUESTION),
        ("not json", NOT_A_QUESTION),
        ('{"key": "a", "prompt": "Why?"}\n' * 2, "repeats the key 'a'"),
        ("", "no questions in"),
        ("\n \n", "no questions in"),
        (b"\xff\xfe\x00", "q.jsonl cannot be read"),
    ],
)
def test_mistakes_in_files_of_questions(content, words, model, tmp_path, capsys):
    assert words in refused(capsys, model, tmp_path / "out", "images=null", asked(tmp_path, content))


def test_a_file_of_questions_is_no_question_about_images(model, photo, tmp_path, capsys):
    prompt = asked(tmp_path, '{"key": "a", "prompt": "Why?"}\n')
    assert "is not a question: with images" in refused(capsys, model, tmp_path / "out", f"images={photo}", prompt)


# Lengths, and the tokenizer


@pytest.fixture
def small(model, tmp_path) -> Path:
    """The model as if it had come with an original config that knows its positions."""
    shutil.copytree(model, tmp_path / "small")
    config = json.loads((model / "config.json").read_text())
    config["original"] = {"format": "llada_v", "fields": {"max_position_embeddings": 40}}
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    return tmp_path / "small"


def test_more_tokens_than_the_model_is_for(small, tmp_path, capsys, caplog):
    said = refused(capsys, small, tmp_path / "out", "images=null", "prompt=Why?", "length=10000000", "steps=1")
    assert "10000000 after them exceed the model's 40 positions" in said
    long = f"prompt={'x ' * 3000}"
    assert "exceed the model's 40 positions" in refused(capsys, small, tmp_path / "out", "images=null", long)
    prompt = asked(tmp_path, "".join(json.dumps({"key": key, "prompt": key * 3}) + "\n" for key in ("a", "y" * 20)))
    found = run(small, tmp_path / "out", "images=null", prompt)
    assert len(found) == 2
    (warned,) = [record.getMessage() for record in caplog.records if "exceed the model's 40" in record.getMessage()]
    assert warned.startswith("y" * 20)


def test_a_long_question_is_no_path(model, tmp_path):
    assert len(run(model, tmp_path / "out", "images=null", "prompt=" + "why " * 400)) == 1


def test_the_tokenizer_of_another_model(model, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "m")
    rows = json.loads((model / "config.json").read_text())["decoder"]["vocab_size"]
    Codec.train(["What makes others so unlike this one?"], vocab_size=999, alphabet="bytes").save(tmp_path / "m")
    tokens = json.loads((tmp_path / "m" / "tokenizer.json").read_text())["model"]["vocab"]
    assert (most := max(tokens.values())) >= rows
    said = refused(capsys, tmp_path / "m", tmp_path / "out", "images=null", "prompt=Why?")
    assert f"the tokenizer has ids up to {most}, but the model in {tmp_path / 'm'} has a vocabulary of {rows}" in said


@pytest.mark.parametrize("text", ["Who won? #1 answer", "1", "yes", "ROMEO:", "[1]"])
def test_a_question_is_a_text_whatever_yaml_reads_in_it(text, model, codec, tmp_path):
    (found,) = run(model, tmp_path / "out", "images=null", f"prompt={text}", f"suffix={text}", f"system={text}")
    assert (found["prompt"], found["suffix"], found["system"]) == (text, text, text)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("sampler: plain", "sampler: expected a mapping with `target:`, got 'plain'"),
        ("sampler: {target: src.samplers.unmask.TopK}", "src.samplers.unmask.TopK is not a sampler"),
        ("sampler: {target: src.samplers.sampler.Sampler, length: 8, reviser: OverwriteAll}", "reviser: expected"),
    ],
)
def test_mistakes_in_the_file_of_a_sampler(content, words, model, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(content)
    settings = ["conf=generate", f"model.path={model}", "images=null", "prompt=a", f"out={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as stop:
        main([*settings, f"sampler={tmp_path / 'mine.yaml'}"])
    assert stop.value.code == 2 and words in capsys.readouterr().err
