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
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    return message


def questions(tmp_path: Path, content: str | bytes) -> str:
    file = tmp_path / "q.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return f"prompt={file}"


def test_no_system_text(golden, golden_folder_v, golden_model, tmp_path):
    """A shell takes the quotes of system="" away; the codec makes no system text of an empty one."""
    heads = golden.meta["vision_config"]["num_attention_heads"]
    more = ("images=null", "prompt=Why?", "model.dtype=float32", f"model.vision={{num_attention_heads: {heads}}}")
    (line,) = run(golden_folder_v, tmp_path / "out.jsonl", *more, "system=")
    own = Codec.load(golden_folder_v)
    bare = own.with_format(system="")
    assert bare.prompt_ids("Why?", images=0) != own.prompt_ids("Why?", images=0)
    prefix = golden_model.encode_prefix({"prompt_ids": torch.tensor([bare.prompt_ids("Why?", images=0)])})
    sampler = Sampler(length=8, steps=4, eos_last=True)
    sampled = sampler(golden_model, prefix, special=bare.special, keys=["prompt"], seed=0)
    assert (line["system"], line["text"]) == ("", bare.decode(sampled.ids[0].tolist()))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"key": "a", "prompt": "Why?", "image": "a.png"}\n', NOT_A_QUESTION),
        ('{"key": 1, "prompt": "Why?"}\n', NOT_A_QUESTION),
        ("not json", NOT_A_QUESTION),
        ('{"key": "a", "prompt": "Why?"}\n' * 2, "repeats the key 'a'"),
        (b"\xff\xfe\x00", "q.jsonl cannot be read"),
    ],
)
def test_mistakes_in_files_of_questions(content, words, model, photo, tmp_path, capsys):
    prompt = questions(tmp_path, content)
    assert words in refused(capsys, model, tmp_path / "out", "images=null", prompt)
    assert "is not a question: with images" in refused(capsys, model, tmp_path / "out", f"images={photo}", prompt)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("images=", "images: expected a path, got ''"),
        ("sampler.reviser.scop=all", "in a .yaml of your own with `base: sampler/refine`, as in docs/samplers.md; "
         "sampler.reviser takes begin, scope, share"),
        ("sampler.length=3", "did you mean 'length'?"),
    ],
)  # fmt: skip
def test_wrong_settings(setting, message, model, tmp_path, capsys):
    argv = ["images=null", "prompt=Why?", "sampler=refine", setting]
    assert message in refused(capsys, model, tmp_path / "out", *argv)


@pytest.fixture
def small(model, tmp_path) -> Path:
    """The model as if it had come with an original config that knows its positions."""
    shutil.copytree(model, tmp_path / "small")
    config = json.loads((model / "config.json").read_text())
    config["original"] = {"format": "llada_v", "fields": {"max_position_embeddings": 40}}
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    return tmp_path / "small"


def test_more_tokens_than_the_model_is_for(small, tmp_path, capsys, caplog):
    long = ("images=null", "prompt=Why?", "length=10000000", "steps=1")
    message = "10000000 after them exceed the model's 40 positions"
    assert message in refused(capsys, small, tmp_path / "out", *long)
    lines = [json.dumps({"key": key, "prompt": key * 3}) + "\n" for key in ("a", "y" * 20)]
    assert len(run(small, tmp_path / "out", "images=null", questions(tmp_path, "".join(lines)))) == 2
    (warned,) = [record.getMessage() for record in caplog.records if "exceed the model's 40" in record.getMessage()]
    assert warned.startswith("y" * 20)


@pytest.mark.parametrize("text", ["Who won? #1 answer", "1", "ROMEO:", "why " * 400])  # the last is too long for a path
def test_a_question_is_a_text_whatever_yaml_reads_in_it(text, model, codec, tmp_path):
    (line,) = run(model, tmp_path / "out", "images=null", f"prompt={text}", f"suffix={text}", f"system={text}")
    assert (line["prompt"], line["suffix"], line["system"]) == (text, text, text)
