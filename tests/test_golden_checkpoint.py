"""Released checkpoints: both golden models load and compute what the originals do; names and shapes at full size."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import EuroBertConfig, EuroBertForMaskedLM

from src.cli.config import load_config
from src.cli.instantiate import build, check
from src.models.hf.folder import ModelFolder, build_empty, fingerprint, from_pretrained
from src.models.hf.formats import FORMATS
from tests.rounding import in_float64, tolerance

TOWER = "model.vision_tower.vision_tower.vision_model."
LOGITS = 1e-3  # tolerance of the golden set
ROUNDING = 1e-4  # of float32 sums in another order, in two layers


@torch.no_grad()
def logits(model, ids: Tensor) -> Tensor:
    """Logits (B, T, V) of a plain forward: everything is response, behind an empty prompt."""
    return model(model.encode_prefix({"prompt_ids": ids[:, :0]}), ids)


@pytest.fixture(scope="module")
def wide(golden_model, golden_text_model) -> dict:
    """Each model in float64."""
    return {model: in_float64(model) for model in (golden_model, golden_text_model)}


@pytest.fixture(scope="module")
def prompts(golden) -> dict[str, Tensor]:
    return {name: torch.tensor(array) for name, array in golden.npz("text_samplers").items() if "/" not in name}


def far(model, wide: dict, ids: Tensor, expected: Tensor, least: float) -> bool:
    """Whether the logits of a model are further from the expected ones than rounding allows."""
    found = logits(model, ids)
    return bool((found - expected).abs().max() > tolerance(least, found, logits(wide[model], ids)))


def test_the_text_model_gives_the_logits_of_the_original(golden_text_model, wide, prompts):
    assert not far(golden_text_model, wide, prompts["prompt"], prompts["logits_nomask"], LOGITS)


def test_rows_without_their_padding_give_the_masked_logits(golden_text_model, wide, prompts):
    """The original counts positions from the padding on; rotary positions are relative."""
    for ids, mask, expected in zip(
        prompts["prompt"], prompts["attention_mask"].bool(), prompts["logits_masked"], strict=True
    ):
        assert not far(golden_text_model, wide, ids[None, mask], expected[None, mask], LOGITS)
    assert not prompts["attention_mask"].all()  # else this is the test before


def test_every_stored_tensor_is_loaded(golden, golden_model, golden_text_model):
    """The numbers in the files, sorted by size and content, are those in the models."""
    for model, name in ((golden_model, "llada_v_tiny"), (golden_text_model, "llada_text_tiny_olmo")):
        stored = load_file(golden.folder / f"{name}.safetensors").values()
        order = lambda tensors: sorted((tuple(t.shape), t.float().flatten().tolist()) for t in tensors)  # noqa: E731
        assert order(model.state_dict().values()) == order(stored)
        assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_weights_keep_their_dtype_unless_told(golden, golden_folder_v, golden_model):
    vision = golden.meta["vision_config"]
    model = from_pretrained(golden_folder_v, vision=vision)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert fingerprint(model) == fingerprint(golden_folder_v) != fingerprint(golden_model)
    assert fingerprint(from_pretrained(golden_folder_v, dtype="float32", vision=vision)) == fingerprint(golden_model)


def test_what_is_never_used_stays_frozen(golden_model):
    frozen = {name for name, parameter in golden_model.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"vision.vision_tower.post_layernorm.{end}" for end in ("weight", "bias")}


# The same numbers under other names


def as_llama(golden) -> tuple[dict[str, Tensor], dict]:
    """The text model under Llama's names, by the golden table and not by ours, and the fields of a Llama's config."""
    names = golden.json("real_checkpoint_manifest")["olmo_style_names"]
    patterns = {re.escape(old).replace(r"\{i\}", r"(\d+)"): new.replace("{i}", r"\1") for old, new in names.items()}
    state = {}
    for name, tensor in load_file(golden.folder / "llada_text_tiny_olmo.safetensors").items():
        [new] = [re.sub(old, new, name) for old, new in patterns.items() if re.fullmatch(old, name)]
        state[new] = tensor
    config = golden.json("llada_text_tiny_olmo.config")
    fields = {
        "model_type": "llada",
        "vocab_size": config["embedding_size"],
        "hidden_size": config["d_model"],
        "intermediate_size": config["mlp_hidden_size"],
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": config["n_heads"],
        "num_key_value_heads": config["n_kv_heads"],
        "rms_norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_theta"],
    }
    return state, fields


def oracle(state: dict[str, Tensor], fields: dict) -> EuroBertForMaskedLM:
    """transformers' bidirectional Llama."""
    sizes = {name: value for name, value in fields.items() if name not in ("model_type", "rope_theta")}
    rope = {"rope_type": "default", "rope_theta": fields["rope_theta"]}
    ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "mask_token_id": 0}
    model = EuroBertForMaskedLM(EuroBertConfig(**sizes, **ids, rope_parameters=rope)).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model


def test_both_layouts_of_a_model_give_the_same_logits(golden, golden_text_model, prompts, tmp_path):
    state, fields = as_llama(golden)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model = from_pretrained(tmp_path, dtype="float32")
    assert (logits(model, prompts["prompt"]) - logits(golden_text_model, prompts["prompt"])).abs().max() == 0.0
    assert fingerprint(model) == fingerprint(golden_text_model)


@torch.no_grad()
def test_transformers_own_bidirectional_llama_agrees(golden, golden_model, golden_text_model, wide, prompts):
    ids = prompts["prompt"]
    expected = oracle(*as_llama(golden))(ids).logits
    assert not far(golden_text_model, wide, ids, expected, ROUNDING)
    # the language model of the multimodal one is Llama's by its names already
    config = golden.json("llada_v_tiny.config")
    state = load_file(golden.folder / "llada_v_tiny.safetensors")
    language = {name: tensor for name, tensor in state.items() if re.match(r"model\.(embed|layers|norm)|lm_head", name)}
    fields = {name: config[name] for name in (*FORMATS["llada_v"].decoder, "rope_theta")}
    ids = ids % config["vocab_size"]
    expected = oracle(language, fields)(ids).logits
    assert not far(golden_model, wide, ids, expected, ROUNDING)
    other = oracle(language, fields | {"rope_theta": 1.01 * fields["rope_theta"]})(ids).logits
    assert far(golden_model, wide, ids, other, ROUNDING)


# Towers that are stored whole


@pytest.fixture
def whole_tower(golden, golden_folder_v, tmp_path):
    """The golden folder with what the original drops: the last layer of the tower and its pooling head."""
    state = load_file(golden_folder_v / "model.safetensors")
    last = f"{TOWER}encoder.layers.{golden.meta['vision_layers_stored'] - 1}."
    more = f"{TOWER}encoder.layers.{golden.meta['vision_layers_stored']}."
    state |= {name.replace(last, more): tensor * 2 for name, tensor in state.items() if name.startswith(last)}
    state |= {f"{TOWER}head.probe": torch.zeros(1, 1, 4)}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").symlink_to(golden_folder_v / "config.json")
    return tmp_path


def test_what_the_original_drops_of_a_tower_is_left_out(golden, golden_folder_v, golden_model, whole_tower):
    model = from_pretrained(whole_tower, dtype="float32", vision=golden.meta["vision_config"])
    assert fingerprint(model) == fingerprint(golden_model)
    assert fingerprint(whole_tower) == fingerprint(golden_folder_v)


# The full size


def expand(tensors: dict) -> dict[str, tuple[int, ...]]:
    return {
        name.replace("{i}", str(i)): tuple(entry["shape"])
        for name, entry in tensors.items()
        for i in range(entry["count"])
    }


@pytest.fixture(scope="module")
def manifest(golden) -> dict:
    return golden.json("real_checkpoint_manifest")


def full_config(golden, shapes: dict) -> dict:
    """config.json of the full size: what the tensors show is taken from them, the rest is as published."""
    side = 384
    return golden.json("llada_v_tiny.config") | {
        "vocab_size": shapes["lm_head.weight"][0],
        "hidden_size": shapes["lm_head.weight"][1],
        "intermediate_size": shapes["model.layers.0.mlp.up_proj.weight"][0],
        "num_hidden_layers": 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("model.layers.")),
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "image_grid_pinpoints": [[side * i, side * j] for i in range(1, 7) for j in range(1, 7)],
        "mm_vision_tower": "google/siglip2-so400m-patch14-384",
        "image_aspect_ratio": "anyres_max_4",
    }


def test_the_full_llada_v_has_exactly_the_published_tensors(golden, manifest):
    shapes = expand(manifest["tensors"])
    form = FORMATS["llada_v"]
    config = full_config(golden, shapes)
    model = build_empty(form.describe(config, shapes, vision=None, image_id=-200))
    found = {form.theirs(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert found == shapes
    assert form.names(config, shapes) == {name: form.theirs(name) for name in model.state_dict()}
    assert len(found) == manifest["total_tensors"]
    assert sum(p.numel() for p in model.parameters()) == manifest["total_parameters"]
    tower = model.vision.config
    assert (tower.num_attention_heads, tower.image_size, tower.num_hidden_layers) == (16, 384, 26)
    assert tower.num_hidden_layers == manifest["vision"]["layers_kept"]
    parts = {"projector": model.vision.mm_projector, "vision": model.vision.vision_tower}
    for name, part in parts.items():
        assert sum(p.numel() for p in part.parameters()) == manifest[name]["parameters"], name


def test_the_full_llada_has_exactly_the_published_tensors(golden, manifest):
    published = {theirs: manifest["tensors"][ours] for theirs, ours in manifest["olmo_style_names"].items()}
    shapes = expand(published)
    config = golden.json("llada_text_tiny_olmo.config") | {
        "embedding_size": shapes["model.transformer.wte.weight"][0],
        "d_model": shapes["model.transformer.wte.weight"][1],
        "mlp_hidden_size": shapes["model.transformer.blocks.0.ff_proj.weight"][0],
        "n_layers": published["model.transformer.blocks.{i}.ff_proj.weight"]["count"],
        "n_heads": 32,
        "n_kv_heads": 32,
    }
    form = FORMATS["llada"]
    model = build_empty(form.describe(config, shapes, vision=None, image_id=-200))
    assert {form.theirs(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes
    assert form.names(config, shapes) == {name: form.theirs(name) for name in model.state_dict()}
    assert len(shapes) == manifest["language_model"]["tensors"]
    assert sum(p.numel() for p in model.parameters()) == manifest["language_model"]["parameters"]


# From the command line


def test_a_released_model_is_one_word_on_the_command_line(golden, golden_folder_v):
    heads = golden.meta["vision_config"]["num_attention_heads"]
    settings = [f"model.path={golden_folder_v}", f"model.vision={{num_attention_heads: {heads}}}", "images=photos"]
    cfg = load_config(["conf=generate", "model=llada_v", *settings])
    check(cfg)
    model = build(cfg.model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.attention == "full"


def test_only_headers_are_read_to_open_a_folder(golden_folder_v):
    folder = ModelFolder.open(golden_folder_v)
    assert folder.form.name == "llada_v"
    assert set(folder.names.values()) == set(load_file(golden_folder_v / "model.safetensors"))
