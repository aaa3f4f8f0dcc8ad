"""Reading and writing model folders: shards, damage, memory, the hub, and parameters that FSDP2 has sharded."""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from src.io.errors import UserError
from src.io.hub import local_folder
from src.models.hf.folder import fingerprint, from_pretrained, load_weights, outline, save_pretrained
from src.models.hf.weights import INDEX, weight_files
from src.models.llada_v import LLaDAV
from src.models.tiny import tiny
from src.text.tokenizer import Codec
from src.training.run_dir import inputs

ROOT = Path(__file__).resolve().parents[1]
DECODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 6,
    "patch_size": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.train(["a red ring", "a blue ring user Describe assistant"], vocab_size=80)


@pytest.fixture(scope="module")
def model(codec) -> LLaDAV:
    return tiny(codec, decoder=DECODER, vision=VISION, seed=1)


@pytest.fixture
def sharded(model, codec, tmp_path) -> Path:
    save_pretrained(model, codec, tmp_path / "model", max_shard_bytes=4000)
    return tmp_path / "model"


def same(one: LLaDAV, other: LLaDAV) -> bool:
    expected = other.state_dict()
    return all(torch.equal(tensor, expected[name]) for name, tensor in one.state_dict().items())


# Shards and dtypes


def test_a_sharded_folder_is_the_same_model(model, codec, sharded, tmp_path):
    """Every tensor once, files no larger than they may be, and readable by those who may read the folder."""
    save_pretrained(model, codec, tmp_path / "single")
    assert [file.name for file in weight_files(tmp_path / "single")] == ["model.safetensors"]
    again = from_pretrained(sharded)
    assert same(again, model) and again.config == model.config
    assert fingerprint(sharded) == fingerprint(tmp_path / "single") == fingerprint(model)
    shards = {file.name: load_file(file) for file in weight_files(sharded)}
    assert len(shards) > 2
    assert sorted(name for shard in shards.values() for name in shard) == sorted(model.state_dict())
    for shard in shards.values():
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= 4000
    index = json.loads((sharded / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert index["weight_map"] == {name: file for file, shard in shards.items() for name in shard}
    assert {file.stat().st_mode & 0o666 for file in sharded.iterdir()} == {sharded.stat().st_mode & 0o666}


def test_the_fingerprint_is_a_hash_of_the_sorted_tensors(model, codec, tmp_path):
    """Of the embedded base model too: drafts and results name models by it, so it must not change."""
    save_pretrained(model, codec, tmp_path / "model")
    for folder in (tmp_path / "model", ROOT / "assets" / "base"):
        digest = hashlib.sha256()
        for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
        assert fingerprint(folder) == digest.hexdigest()[:16]


def test_weights_are_cast_when_they_are_read(model, sharded):
    again = from_pretrained(sharded, dtype="bfloat16")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.bfloat16())
    with pytest.raises(ValueError, match=r"dtype must be one of .*, got 'int8'"):
        from_pretrained(sharded, dtype="int8")


def test_an_allocated_model_keeps_its_dtype_and_one_on_meta_is_allocated_first(model, codec, sharded):
    other = tiny(codec, decoder=DECODER, vision=VISION, seed=2).bfloat16()
    kept = other.lm_head.weight
    load_weights(other, sharded)
    assert other.lm_head.weight is kept and torch.equal(kept, model.lm_head.weight.bfloat16())
    bare = from_pretrained(sharded, device="meta")
    assert {tensor.device.type for tensor in [*bare.parameters(), *bare.buffers()]} == {"meta"}
    with pytest.raises(AssertionError, match="is on the meta device"):
        load_weights(bare, sharded)
    load_weights(bare.to_empty(device="cpu"), sharded)
    assert same(bare, model)
    assert torch.equal(bare.vision.vision_tower.embeddings.position_ids, torch.arange(4)[None])


# Damage


def test_all_that_does_not_fit_is_listed_at_once_up_to_five(sharded):
    for file in weight_files(sharded):
        state = load_file(file)
        if state.pop("model.norm.weight", None) is not None:
            state["model.norm.bias"] = torch.zeros(3)
        if "lm_head.weight" in state:
            state["lm_head.weight"] = state["lm_head.weight"][:-1]
        save_file(state, file)
    parts = (
        r"lm_head.weight is \(\d+, 16\), expected \(\d+, 16\)",
        r"model.norm.bias is \(3,\), expected no such tensor",
        r"model.norm.weight is missing, expected \(16,\)",
    )
    with pytest.raises(UserError, match=f"does not match its config: {'; '.join(parts)}$"):
        from_pretrained(sharded)
    config = json.loads((sharded / "config.json").read_text())
    config["decoder"]["num_hidden_layers"] = 30
    (sharded / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"lm_head.* is .*; and {28 * 9 + 3 - 5} more$"):
        from_pretrained(sharded)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def with_decoder(folder: Path, **decoder: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "decoder": decoder}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: weight_files(folder)[1].unlink(), r"model-00002-of-\d+.safetensors is missing, damaged"),
        (lambda folder: cut(weight_files(folder)[1]), r"model-00002-of-\d+.safetensors is missing, damaged"),
        (lambda folder: cut(folder / INDEX), "index.json is missing, damaged"),
        (lambda folder: (folder / INDEX).unlink(), "is not a model folder: it needs"),
        (lambda folder: cut(folder / "config.json"), "config.json is missing, damaged"),
        (lambda folder: with_decoder(folder, **DECODER, vocab_size=9, hiden_size=16), "config.json is .*'hiden_size'"),
        (
            lambda folder: save_file({"a": torch.zeros(2, dtype=torch.int8)}, folder / "model.safetensors"),
            "a has dtype torch.int8; supported are",
        ),
    ],
)
def test_damage_is_explained(sharded, damage, message):
    damage(sharded)
    with pytest.raises(UserError, match=message) as error:
        from_pretrained(sharded)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(codec, value, tmp_path):
    broken = tiny(codec, decoder=DECODER, vision=None)
    with torch.no_grad():
        broken.model.norm.weight[3] = value
    save_pretrained(broken, codec, tmp_path / "model")
    for read in (from_pretrained, partial(load_weights, tiny(codec, decoder=DECODER, vision=None))):
        with pytest.raises(UserError, match=r"model.norm.weight .* has NaN or infinite values as float32"):
            read(tmp_path / "model")


def test_a_folder_is_whole_or_absent(model, codec, tmp_path):
    """A save that fails leaves what was there, and nothing else."""
    save_pretrained(model, codec, tmp_path / "model")
    first = fingerprint(tmp_path / "model")
    other = tiny(codec, decoder=DECODER, vision=VISION, seed=9)
    unwritable = Codec(codec.tokenizer, codec.prompt_format, files={"no/such/folder.json": b""})
    with pytest.raises(FileNotFoundError):
        save_pretrained(other, unwritable, tmp_path / "model")
    assert fingerprint(tmp_path / "model") == first
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    save_pretrained(other, codec, tmp_path / "model")
    assert fingerprint(tmp_path / "model") == fingerprint(other)


def test_a_model_belongs_to_its_tokenizer(sharded, codec):
    from_pretrained(sharded, codec=codec)
    with pytest.raises(UserError, match="was trained with a different tokenizer than"):
        from_pretrained(sharded, codec=Codec.train(["another text altogether"], vocab_size=80))


# Names on the hub


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A cache of downloads without a network. Returns the folder of a model somebody/NAME, not made yet."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)

    def snapshot(name: str) -> Path:
        cached = tmp_path / "hub" / f"models--somebody--{name}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("c" * 40)
        return cached / "snapshots" / ("c" * 40)

    return snapshot


def test_a_name_on_the_hub_is_downloaded_or_explained(offline, model, codec, tmp_path):
    """A local folder of that name takes precedence, and a run records the model that it starts from."""
    cfg = OmegaConf.create({"model": {"path": "somebody/model-1.5"}, "data": {}})
    with pytest.raises(ValueError, match=r"no local folder somebody/model-1.5, and its download .* failed"):
        from_pretrained("somebody/model-1.5")
    assert inputs(cfg) == {}
    save_pretrained(model, codec, offline("model-1.5"))
    assert same(from_pretrained("somebody/model-1.5", codec=codec), model)
    assert fingerprint("somebody/model-1.5") == fingerprint(model)
    assert inputs(cfg) == {"model.path": fingerprint(model)}
    other = tiny(codec, decoder=DECODER, vision=VISION, seed=2)
    save_pretrained(other, codec, tmp_path / "somebody" / "model-1.5")
    assert same(from_pretrained("somebody/model-1.5"), other)


@pytest.mark.parametrize("path", ["model", "runs/stage1/model", "/runs/model", "./model", "../model", "a/b/"])
def test_paths_are_no_names(path):
    """They are not asked for on the hub, also when they do not exist."""
    assert local_folder(path) == Path(path)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with folders `remote/OWNER/NAME`; downloads go to `cache`, the requested revisions to `revisions`."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    revisions: list[str | None] = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        revisions.append(revision)
        cache = tmp_path / "cache" / name / ("a" * 40)
        cache.mkdir(parents=True, exist_ok=True)
        files = [file.name for file in (tmp_path / "remote" / name).iterdir()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            shutil.copy(tmp_path / "remote" / name / file, cache)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return SimpleNamespace(remote=tmp_path / "remote", cache=tmp_path / "cache", revisions=revisions)


def test_a_tokenizer_and_an_outline_need_no_weights_of_the_hub(hub, codec, golden):
    """Each reader downloads what it reads, all of one revision; program text never."""
    text = tiny(codec, decoder=DECODER, vision=None)
    name = "somebody/in-parts"
    save_pretrained(text, codec, hub.remote / name, max_shard_bytes=4000)
    (hub.remote / name / "modeling_llada.py").write_text("")
    files = {file.name for file in (hub.remote / name).iterdir()}
    some = {"config.json", "prompt.yaml", *(f for f in files if f.startswith(("token", "special", "chat")))}
    here = lambda: {file.name for file in (hub.cache / name / ("a" * 40)).iterdir()}  # noqa: E731
    assert Codec.load(name).fingerprint == codec.fingerprint
    assert here() == some and len(some) > 3
    assert outline(name, codec=codec).config == text.config
    assert here() == some
    assert same(from_pretrained(name, codec=codec), text)
    assert here() == files - {"modeling_llada.py"}
    assert hub.revisions == [None, "a" * 40]
    assert outline(name, codec=codec).config == text.config
    (hub.remote / "somebody" / "tower").mkdir()
    config = hub.remote / "somebody" / "tower" / "config.json"
    config.write_text(json.dumps(golden.json("llada_v_tiny.config")))
    with pytest.raises(ValueError, match=r"config\.json names the vision tower .* download the whole model"):
        outline("somebody/tower", codec=codec)


# FSDP2
