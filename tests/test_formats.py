"""Layouts of model folders: what is recognised, what is refused, and that names and fields survive a round trip."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from src.models.hf.folder import from_pretrained
from src.models.hf.formats import FORMATS, MODEL_TYPE, Description, LlamaStyle, OlmoStyle, recognise

TOWER = "model.vision_tower.vision_tower.vision_model."


@pytest.fixture
def edited(golden, golden_folder_v, golden_folder_text, tmp_path):
    """Makes a copy of a golden folder with other fields in its config.json; None removes one."""

    def edit(which: str, **fields) -> Path:
        source = golden_folder_v if which == "llada_v" else golden_folder_text
        shutil.copytree(source, tmp_path / "model", symlinks=True)
        config = json.loads((source / "config.json").read_text()) | fields
        (tmp_path / "model" / "config.json").unlink()
        kept = {name: value for name, value in config.items() if name not in fields or value is not None}
        (tmp_path / "model" / "config.json").write_text(json.dumps(kept))
        return tmp_path / "model"

    return edit


def load(folder: Path, golden, **vision):
    """The model of a folder; the tower's fields as the golden set has them, `vision` in their place."""
    config = json.loads((folder / "config.json").read_text())
    given = (vision or golden.meta["vision_config"]) if config.get("mm_vision_tower") else None
    return from_pretrained(folder, dtype="float32", vision=given)


def test_the_layout_follows_from_the_fields_not_from_the_type(golden):
    llama, olmo = golden.json("llada_v_tiny.config"), golden.json("llada_text_tiny_olmo.config")
    assert recognise(llama).name == recognise({**llama, "model_type": "llada"}).name == "llada_v"
    assert recognise(olmo).name == "llada"
    assert recognise({"model_type": MODEL_TYPE}).name == "own"
    for config in ({}, {"model_type": "llama", "hidden_size": 8}, {"model_type": "llava_llada", "d_model": 8}):
        with pytest.raises(ValueError, match=f"type {config.get('model_type')!r} .* is unknown; supported are"):
            recognise(config)


ONLY = {"llada": OlmoStyle.only, "llada_v": {**LlamaStyle.only, **LlamaStyle.only_vision}}
REFUSED = {
    "llada": {
        "block_type": "sequential", "activation_type": "swiglu", "layer_norm_type": "default", "rope": False,
        "weight_tying": True, "include_bias": True, "include_qkv_bias": True, "attention_layer_norm": True,
        "bias_for_layer_norm": True, "layer_norm_with_affine": False, "alibi": True, "input_emb_norm": True,
        "scale_logits": True, "block_group_size": 2, "multi_query_attention": True, "clip_qkv": 8.0,
        "attention_dropout": 0.1, "residual_dropout": 0.1, "embedding_dropout": 0.1,
    },
    "llada_v": {
        "hidden_act": "gelu", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
        "attention_dropout": 0.1, "mm_projector_type": "linear", "mm_patch_merge_type": "flat",
        "mm_vision_select_layer": -1, "mm_vision_select_feature": "cls_patch", "mm_resampler_type": "qformer",
        "mm_use_im_start_end": True,
    },
}  # fmt: skip
COMPUTED = {  # what is allowed follows from other fields
    "head_dim": 7, "rope_scaling": {"type": "linear", "factor": 2.0}, "image_aspect_ratio": "pad",
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4},
}  # fmt: skip


def test_every_field_that_is_checked_has_a_case():
    assert {name: only.keys() for name, only in ONLY.items()} == {name: REFUSED[name].keys() for name in ONLY}


@pytest.mark.parametrize(
    ("which", "field", "value"),
    [
        *((which, name, value) for which, cases in REFUSED.items() for name, value in cases.items()),
        *(("llada_v", name, value) for name, value in COMPUTED.items()),
        *((which, name, None) for which, only in ONLY.items() for name, allowed in only.items() if None not in allowed),
    ],
)
def test_what_is_not_implemented_is_refused(golden, edited, which, field, value):
    with pytest.raises(ValueError, match=rf"config.json: .*{field} is ") as error:
        load(edited(which, **{field: value}), golden)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("which", "fields", "message"),
    [
        ("llada", {"block_type": "a", "rope": False}, r"block_type is 'a'.*; rope is False"),
        *(("llada", {name: None}, f"'{name}'") for name in ("mlp_hidden_size", "n_layers", "rms_norm_eps")),
        *(("llada_v", {name: None}, f"'{name}'") for name in ("rope_theta", "vocab_size", "image_grid_pinpoints")),
    ],
)
def test_several_fields_are_named_at_once_and_missing_ones_too(golden, edited, which, fields, message):
    with pytest.raises(ValueError, match=rf"config.json.*{message}"):
        load(edited(which, **fields), golden)


def test_the_rope_base_may_stand_where_transformers_5_writes_it(golden, edited, golden_model):
    base = golden.json("llada_v_tiny.config")["rope_theta"]
    parameters = {"rope_type": "default", "rope_theta": base}
    for more in ({"rope_scaling": None}, {"rope_scaling": parameters}):
        folder = edited("llada_v", rope_theta=None, rope_parameters=parameters, **more)
        assert load(folder, golden).config == golden_model.config
        shutil.rmtree(folder)
    assert load(edited("llada_v", rope_theta=base * 2), golden).config.rope_theta == base * 2


def test_the_tower_is_described_by_its_tensors(golden, golden_model):
    expected = golden.meta["vision_config"] | {"num_hidden_layers": golden.meta["vision_layers_stored"]}
    assert golden_model.vision_config == expected
    assert golden_model.tiling["grids"] == golden.json("llada_v_tiny.config")["image_grid_pinpoints"]
    assert golden_model.tiling["size"] == expected["image_size"]


def test_heads_come_from_what_is_given_or_nested_or_the_name_or_nowhere(golden, edited, golden_folder_v):
    heads = golden.meta["vision_config"]["num_attention_heads"]
    with pytest.raises(ValueError, match=r"number of attention heads .*model.vision='\{num_attention_heads"):
        from_pretrained(golden_folder_v)
    assert load(golden_folder_v, golden, num_attention_heads=1).vision_config["num_attention_heads"] == 1
    folder = edited("llada_v", vision_config={"num_attention_heads": heads, "model_type": "siglip"})
    assert from_pretrained(folder).vision_config["num_attention_heads"] == heads
    assert load(folder, golden, num_attention_heads=1).vision_config["num_attention_heads"] == 1


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"hidden_size": 2}, r"vision.mm_projector.0.weight is .*, expected \(\d+, 2\)"),
        ({"num_hidden_layers": 2}, r"vision.*layers.1.* expected no such tensor"),
        ({"patch_size": 2}, r"patch_embedding.weight is \(.*\), expected"),
        ({"image_size": 1}, "cannot be made of tiles of 1 pixels"),
        ({"heads": 4}, "vision has no field 'heads'"),
    ],
)
def test_what_is_given_must_agree_with_the_weights(golden, golden_folder_v, vision, message):
    with pytest.raises(ValueError, match=message):
        load(golden_folder_v, golden, **{"num_attention_heads": 1, **vision})


def test_grids_tell_the_size_of_a_tile_and_are_made_of_tiles(golden, edited):
    side = golden.meta["vision_config"]["image_size"]
    folder = edited("llada_v", image_grid_pinpoints=[[2 * side, 4 * side]])
    assert from_pretrained(folder, vision={"num_attention_heads": 1}).layout.size == side
    shutil.rmtree(folder)
    folder = edited("llada_v", image_grid_pinpoints=[[side, side], [side, side + 1]])
    with pytest.raises(ValueError, match="image_grid_pinpoints cannot be made of tiles of any pixels"):
        from_pretrained(folder, vision={"num_attention_heads": 1})


def test_grids_may_be_written_in_tiles(golden, edited):
    """From the first to the last, the width as the outer loop; the pixels of a tile are given or in the name."""
    side = golden.meta["vision_config"]["image_size"]
    expected = [[side, side], [side, 2 * side], [side, 3 * side],
                [2 * side, side], [2 * side, 2 * side], [2 * side, 3 * side]]  # fmt: skip
    for text, grids in (("(1x1),...,(2x3)", expected), ("(1x1), (1x2), (2x3)", expected), ("(1x1)", [[side, side]])):
        folder = edited("llada_v", image_grid_pinpoints=text)
        given = {"num_attention_heads": 1, "image_size": side}
        assert from_pretrained(folder, vision=given).tiling["grids"] == grids
        with pytest.raises(ValueError, match=r"image_grid_pinpoints is '\(1x1\).*in tiles of unknown size"):
            from_pretrained(folder, vision={"num_attention_heads": 1})
        shutil.rmtree(folder)
    folder = edited("llada_v", image_grid_pinpoints="(1x1),...,(2x3)", mm_vision_tower=f"here/tower-patch4-{side}")
    assert from_pretrained(folder, vision={"num_attention_heads": 1}).tiling["grids"] == expected


def description(**changes) -> Description:
    decoder = {
        "vocab_size": 9, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "rope_theta": 123.0, "rms_norm_eps": 1e-4, "attention": "full",
    }  # fmt: skip
    return Description(**{"decoder": decoder, "vision": None, "image_id": -200, **changes})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llada", {"vision": {"hidden_size": 8}, "tiling": {"size": 6, "grids": [[6, 6]]}}, "text models only"),
        ("llada_v", {"vision": {"hidden_size": 8}}, "encodes each image as one tile"),
        ("llada_v", {"decoder": {**description().decoder, "attention": "prefix"}}, "attention='prefix'"),
        ("llada", {"decoder": {**description().decoder, "attention": "prefix"}}, "attention='prefix'"),
    ],
)
def test_what_a_layout_cannot_express_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        FORMATS[name].config(description(**changes))
