"""The export verb: what is written is the same model, under the names and with the fields of its layout."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from src.export import main
from src.models.hf.folder import describe, fingerprint, from_pretrained, save_pretrained
from src.models.hf.weights import weight_files
from src.models.llada_v import LLaDAV
from src.models.tiny import tiny
from src.text.tokenizer import Codec
from testing.verbs import refusal

ROOT = Path(__file__).resolve().parents[1]
DECODER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "rope_theta": 77.0,
}  # fmt: skip
VISION = {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 6,
    "patch_size": 3, "num_channels": 3,
}  # fmt: skip
TILING = {"size": 6, "grids": [[6, 12], [12, 6]], "max_tiles": 4}


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.train(["a red ring", "a blue ring user Describe assistant"], vocab_size=80)


@pytest.fixture
def model(codec) -> LLaDAV:
    decoder = {**DECODER, "vocab_size": codec.vocab_size}
    return LLaDAV(decoder=decoder, vision=VISION, tiling=TILING, image_id=codec.image_id)


def export(**settings) -> None:
    main(["conf=export", *(f"{key}={value}" for key, value in settings.items())])


def state(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


# Model folders


def test_an_original_comes_back_as_it_was(golden, golden_folder_v, golden_folder_text, tmp_path):
    """Tensors under the same names, every field of config.json, the tokenizer's file; also by way of our own layout."""
    heads = golden.meta["vision_config"]["num_attention_heads"]
    vision = f"{{num_attention_heads: {heads}}}"
    for form, folder, more in (("llada_v", golden_folder_v, {"vision": vision}), ("llada", golden_folder_text, {})):
        own, direct, round_trip = (tmp_path / form / name for name in ("own", "direct", "round-trip"))
        export(model=folder, out=direct, format=form, **more)
        export(model=folder, out=own, format="own", max_shard_bytes=20000, **more)
        export(model=own, out=round_trip, format=form)
        for out in (direct, round_trip):
            assert same(state(out), state(folder))
            added = {"vision_config": {"num_attention_heads": heads}} if more else {}
            assert config(out) == {**config(folder), "torch_dtype": "bfloat16", **added}
            assert fingerprint(out) == fingerprint(folder)
        assert len(weight_files(own)) > 2 and config(own)["model_type"] == "rediff_llada_v"
        assert fingerprint(own) == fingerprint(folder)
        ours, theirs = (replace(describe(from_pretrained(out)), original={}) for out in (own, round_trip))
        assert ours == theirs
    codec, direct = Codec.load(golden_folder_v), tmp_path / "llada_v" / "direct"
    assert (direct / "tokenizer.json").read_bytes() == (golden_folder_v / "tokenizer.json").read_bytes()
    for folder in (direct, tmp_path / "llada_v" / "own"):
        assert Codec.load(folder).prompt_ids("What is this?") == codec.prompt_ids("What is this?")
        assert from_pretrained(folder, codec=codec).image_id == codec.image_id


def test_files_of_the_tokenizer_survive_training(golden_folder_text, golden, tmp_path):
    """As an earlier version of transformers wrote them, byte for byte: from_pretrained, save_pretrained, export."""
    shutil.copytree(golden_folder_text, tmp_path / "start")
    shutil.copy(golden.folder / "tokenizer.json", tmp_path / "start")
    special = {"additional_special_tokens": ["<|eot_id|>"], "eos_token": "<|endoftext|>"}
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True, **special}
    (tmp_path / "start" / "tokenizer_config.json").write_text(json.dumps(fields, indent=7))
    (tmp_path / "start" / "special_tokens_map.json").write_text(json.dumps(special))
    (tmp_path / "start" / "generation_config.json").write_text('{"eos_token_id": 1}')
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
    original = {name: (tmp_path / "start" / name).read_bytes() for name in names}
    codec = Codec.load(tmp_path / "start")
    save_pretrained(from_pretrained(tmp_path / "start"), codec, tmp_path / "model")
    for form in ("llada", "own"):
        export(model=tmp_path / "model", out=tmp_path / form, format=form)
        assert {name: (tmp_path / form / name).read_bytes() for name in names} == original
        assert Codec.load(tmp_path / form).fingerprint == codec.fingerprint


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """Where a download `somebody/NAME` lies in a cache, without a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)

    def make(name: str) -> Path:
        folder = tmp_path / "hub" / f"models--somebody--{name}"
        for name in ("refs", "snapshots"):
            (folder / name).mkdir(parents=True)
        (folder / "refs" / "main").write_text("b" * 40)
        return folder / "snapshots" / ("b" * 40)

    return make


def test_code_files_are_copied_or_named_on_the_hub(golden_folder_text, cached, codec, tmp_path):
    """On the hub also after training, when nothing but our own folder is left."""
    auto_map = {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": ["modeling_llada.LLaDAModelLM", None],
        "AutoTokenizer": "somebody/else--tokens.Tokenizer",
    }
    for folder in (tmp_path / "start", download := cached("programs")):
        shutil.copytree(golden_folder_text, folder, symlinks=True)
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(config(golden_folder_text) | {"auto_map": auto_map}))
    programs = {name: f"# {name}" for name in ("configuration_llada.py", "modeling_llada.py")}
    for name, text in programs.items():
        (tmp_path / "start" / name).write_text(text)
    export(model=tmp_path / "start", out=tmp_path / "out", format="llada")
    assert config(tmp_path / "out")["auto_map"] == auto_map
    assert {file.name: file.read_text() for file in (tmp_path / "out").glob("*.py")} == programs
    on_hub = {
        "AutoConfig": "somebody/programs--configuration_llada.LLaDAConfig",
        "AutoModel": ["somebody/programs--modeling_llada.LLaDAModelLM", None],
        "AutoTokenizer": "somebody/else--tokens.Tokenizer",
    }
    assert download.is_dir()
    export(model="somebody/programs", out=tmp_path / "direct", format="llada")
    save_pretrained(from_pretrained("somebody/programs"), codec, tmp_path / "model")
    export(model=tmp_path / "model", out=tmp_path / "trained", format="llada")
    assert [config(tmp_path / name)["auto_map"] for name in ("direct", "trained")] == [on_hub, on_hub]


@torch.no_grad()
def test_a_trained_model_computes_the_same_in_the_layout_of_llada_v(model, codec, tmp_path):
    """Without any original: the file says all that is needed, and where the special ids are."""
    save_pretrained(model, codec, tmp_path / "model")
    export(model=tmp_path / "model", out=tmp_path / "out")
    again = from_pretrained(tmp_path / "out", codec=codec)
    batch = {
        "prompt_ids": torch.tensor([codec.prompt_ids("Describe")]),
        "pixel_values": torch.randint(0, 256, (1, 3, 3, 6, 6), dtype=torch.uint8),
        "num_tiles": torch.tensor([[3]]),
        "image_sizes": torch.tensor([[[6, 12]]]),
    }
    response = torch.randint(7, codec.vocab_size, (1, 5))
    assert torch.equal(again(again.encode_prefix(batch), response), model(model.encode_prefix(batch), response))
    fields = config(tmp_path / "out")
    assert (fields["eos_token_id"], fields["mask_token_id"]) == (codec.eos_id, codec.mask_id)
    assert (fields["model_type"], fields["architectures"]) == ("llava_llada", ["LlavaLLaDAModelLM"])
    assert {"model.image_newline", "model.mm_projector.2.bias"} < state(tmp_path / "out").keys()


@torch.no_grad()
@pytest.mark.parametrize("form", ["llada", "llada_v", "own"])
def test_a_text_model_fits_every_layout(codec, tmp_path, form):
    model = tiny(codec, decoder=DECODER, vision=None, seed=3)
    save_pretrained(model, codec, tmp_path / "model")
    export(model=tmp_path / "model", out=tmp_path / form, format=form)
    again = from_pretrained(tmp_path / form, codec=codec)
    assert again.config == model.config and again.image_id == model.image_id
    assert same(again.state_dict(), model.state_dict())
    names = {"llada": "model.transformer.ff_out.weight", "llada_v": "model.layers.1.mlp.down_proj.weight"}
    assert names.get(form, "lm_head.weight") in state(tmp_path / form)


# Checkpoints of a run


class Step(L.LightningModule):
    """One step that changes every weight."""

    def __init__(self, backbone: LLaDAV) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.backbone, self.other = backbone, torch.nn.Linear(2, 2)

    def training_step(self, batch, index):
        for parameter in self.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizers().step()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


def train(backbone: LLaDAV, checkpoint: Path, **settings) -> LLaDAV:
    step = Step(backbone)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **settings,
    )  # fmt: skip
    trainer.fit(step, DataLoader(torch.ones(1, 1)))  # type: ignore[arg-type]
    trainer.save_checkpoint(checkpoint)
    return step.backbone


TINY = {"target": "src.models.tiny.tiny", "decoder": DECODER, "vision": None}


@pytest.fixture
def run(codec, tmp_path):
    """Makes the folder of a run with its config, and gives its checkpoint's place."""

    def make(**node) -> Path:
        codec.save(tmp_path / "tokenizer")
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        config = {"format": 2, "name": "mine", "seed": 0, "model": node, "tokenizer": str(tmp_path / "tokenizer")}
        config |= {"data": {"response_length": 96, "batch_size": 1}, "trainer": {"max_steps": 1}}
        config |= {"objective": {"target": "src.objectives.mask.Mask"}, "run_dir": str(tmp_path / "run")}
        OmegaConf.save(OmegaConf.create(config), tmp_path / "run" / "config.yaml")
        return tmp_path / "run" / "checkpoints" / "last.ckpt"

    return make


def test_a_checkpoint_is_exported_with_what_its_run_started_from(golden, golden_folder_v, run, tmp_path):
    heads = golden.meta["vision_config"]["num_attention_heads"]
    options = {"vision": {"num_attention_heads": heads}, "dtype": "float32"}
    checkpoint = run(target="src.models.hf.folder.from_pretrained", path=str(golden_folder_v), **options)
    start = from_pretrained(golden_folder_v, **options)
    before = fingerprint(start)
    model = train(start, checkpoint)
    export(model=checkpoint, out=tmp_path / "out")
    again = from_pretrained(tmp_path / "out")
    assert same(again.state_dict(), model.state_dict())
    assert fingerprint(again) != before
    export(model=checkpoint, out=tmp_path / "own", format="own")
    assert config(tmp_path / "own")["response_length"] == 96  # of the data it was trained on, not of the start
    fields = {"torch_dtype": "float32", "vision_config": options["vision"]}
    assert config(tmp_path / "out") == {**config(golden_folder_v), **fields}


def test_a_checkpoint_of_fresh_weights_and_one_that_was_moved(codec, run, cached, tmp_path, capsys):
    """The tokenizer of the run may be of the hub, and must be there; a checkpoint elsewhere is told what it is like."""
    checkpoint = run(**TINY)
    model = train(tiny(codec, decoder=DECODER, vision=None, seed=4), checkpoint)
    file = tmp_path / "run" / "config.yaml"
    (tmp_path / "tokenizer").rename(cached("tokens"))
    assert f"no tokenizer in {tmp_path / 'tokenizer'}" in error(capsys, model=checkpoint, out=tmp_path / "out")
    OmegaConf.save({**OmegaConf.load(file), "tokenizer": "somebody/tokens"}, file)
    export(model=checkpoint, out=tmp_path / "out", format="llada")
    assert same(from_pretrained(tmp_path / "out", codec=codec).state_dict(), model.state_dict())
    moved = checkpoint.rename(tmp_path / "last.ckpt")
    assert "set like=DIR" in error(capsys, model=moved, out=tmp_path / "moved")
    save_pretrained(tiny(codec, decoder=DECODER, vision=None), codec, tmp_path / "start")
    export(model=moved, like=tmp_path / "start", out=tmp_path / "moved", format="own")
    assert same(from_pretrained(tmp_path / "moved", codec=codec).state_dict(), model.state_dict())


# Mistakes


def error(capsys, **settings) -> str:
    return refusal(lambda settings: export(**settings), settings, capsys).strip()


def test_mistakes_are_explained_in_a_line(model, codec, tmp_path, capsys):
    folder, out = tmp_path / "model", tmp_path / "out"
    save_pretrained(model, codec, folder)
    assert "out=" in error(capsys, model=folder, out=folder)
    assert "one of own, llada_v, llada, lightning, got 'hf'" in error(capsys, model=folder, out=out, format="hf")
    assert "text models only" in error(capsys, model=folder, out=out, format="llada")
    assert "is not a model folder" in error(capsys, model=tmp_path / "none", out=out)
    assert "like=" in error(capsys, model=folder, out=out, like=folder)
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"junk", "is damaged: incomplete or changed"),
        ({"epoch": 1}, "is missing, damaged or incomplete (KeyError: 'state_dict')"),
        ({"state_dict": {"backbone.a": Path("code")}}, "is missing, damaged or incomplete (UnpicklingError"),
        ({"state_dict": {"head.weight": torch.zeros(1)}}, "contains no model: it has no tensor named backbone"),
        ({"state_dict": {"backbone.lm_head.weight": torch.zeros(1)}}, "model.embed_tokens.weight is missing"),
    ],
)
def test_damaged_checkpoints_are_explained(run, tmp_path, capsys, content, message):
    checkpoint = run(**TINY)
    checkpoint.write_bytes(content) if isinstance(content, bytes) else torch.save(content, checkpoint)
    line = error(capsys, model=checkpoint, out=tmp_path / "out")
    assert message in line and "\n" not in line
