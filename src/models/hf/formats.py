"""The three layouts of a model folder: our own, and the released ones of LLaDA-V and LLaDA-8B.

    form = recognise(config)                     by its fields, as both released types call themselves "llada"
    names = form.names(config, shapes)           {our name: name in the files}, a pure rename
    form.describe(config, shapes, ...)           config.json -> Description, which builds the model
    form.config(description)                     Description -> config.json

`own` stores the description itself. `llada_v` uses Llama's tensor names, `llada` those of OLMo. Fields of a released
config that we do not use are kept in `Description.original`, so that an export to the same layout restores them. A
field that needs something not implemented is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from src.io.errors import UserError
from src.models.hf.vision_tower import Shapes, StoredTower

MODEL_TYPE = "rediff_llada_v"


@dataclass(frozen=True)
class Description:
    """Everything of a model but its weights: the arguments of `LLaDAV`, and the other fields of a released config."""

    decoder: dict[str, Any]
    vision: dict[str, Any] | None
    image_id: int
    tiling: dict[str, Any] | None = None
    response_length: int | None = None  # response length used in training
    original: dict[str, Any] = field(default_factory=dict)  # {"format": name, "fields": the fields that we do not use}
    lora: dict[str, Any] | None = None  # of an adapter: the folder of its `base`, and the fields of `LoRA`

    def with_attention(self, attention: str | None) -> Description:
        """The same model with another attention mode, unless that is None."""
        return replace(self, decoder={**self.decoder, "attention": attention}) if attention else self


class Format:
    """A layout: the fields of config.json and the tensor names. `shapes` are those of the files, by their names there.

    Each layout has `describe(config, shapes, vision=, image_id=)`, which raises UserError for fields that are not
    implemented (`vision`: tower fields that the config lacks; `image_id`: the image mark, if the config has none), and
    `config(description)`, which raises UserError if it cannot express the model.
    """

    name: str
    renames: tuple[tuple[str, str], ...] = ()  # (part of a name in the files, the same in our names), in this order
    dropped: tuple[str, ...] = ()  # fields that an export computes

    def names(self, config: dict, shapes: Shapes) -> dict[str, str]:
        """Our name -> name in the files, for all tensors but those that the released model stores and never uses."""
        names = {}
        for name in shapes:
            renamed = name
            for theirs, ours in self.renames:
                renamed = renamed.replace(theirs, ours)
            names[renamed] = name
        return names

    def theirs(self, name: str) -> str:
        """The name of one of our tensors in the files."""
        for theirs, ours in self.renames:
            name = name.replace(ours, theirs)
        return name

    def unused_fields(self, config: dict) -> dict[str, Any]:
        """`Description.original` of a released config."""
        return {"format": self.name, "fields": {key: config[key] for key in config if key not in self.dropped}}

    def original_fields(self, description: Description) -> dict[str, Any]:
        """A copy of the unused fields if the model came in this layout. Raises UserError if none can express it."""
        attention = description.decoder["attention"]
        if attention != "full":
            raise UserError(f"the model has attention={attention!r}, but the released layouts support only 'full'")
        if description.decoder.get("shift"):
            raise UserError("the model has shift=true, which the released layouts do not support")
        return dict(description.original["fields"]) if description.original.get("format") == self.name else {}


class Own(Format):
    name = "own"

    def describe(self, config: dict, shapes: Shapes, *, vision: dict | None, image_id: int) -> Description:
        if vision:
            raise UserError(f"vision={vision} is for released models; this folder describes its vision tower itself")
        if "canvas" in config:
            raise UserError("config.json is of a version before 0.2.0: rename its key canvas to response_length")
        return Description(**{field.name: config[field.name] for field in fields(Description) if field.name in config})

    def config(self, description: Description) -> dict:
        optional = ("tiling", "response_length", "original", "lora")
        stored = {key: value for key, value in asdict(description).items() if value or key not in optional}
        return {"model_type": MODEL_TYPE, **stored}


class LlamaStyle(Format):
    """LLaDA-V and ReDiff, and the text model that LLaDA-V was trained from."""

    name = "llada_v"
    tower = "model.vision_tower.vision_tower.vision_model."
    renames = (
        (tower, "vision.vision_tower."),
        ("model.mm_projector.", "vision.mm_projector."),
        ("model.image_newline", "vision.image_newline"),
    )
    decoder = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "rms_norm_eps"),
    )
    # The values that we implement. The first is that of the released config; None means that the field is absent.
    only: Mapping[str, tuple] = {
        "hidden_act": ("silu", None),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "attention_dropout": (0.0, None),
        "tie_word_embeddings": (False, None),
    }
    only_vision: Mapping[str, tuple] = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_patch_merge_type": ("spatial_unpad",),
        "mm_vision_select_layer": (-2,),
        "mm_vision_select_feature": ("patch", None),
        "mm_resampler_type": (None,),
        "mm_use_im_start_end": (False, None),
    }
    dropped = (
        *(*decoder, "rope_theta", "rope_parameters", "rope_scaling", "image_grid_pinpoints", "model_type"),
        *("mm_hidden_size", "image_aspect_ratio", "torch_dtype", "dtype", "head_dim"),
    )

    def describe(self, config: dict, shapes: Shapes, *, vision: dict | None, image_id: int) -> Description:
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        _refuse(config, {**self.only, "head_dim": (head_dim, None)})
        kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        config = {**config, "num_key_value_heads": kv_heads}
        decoder = {name: config[name] for name in self.decoder}
        decoder |= {"rope_theta": _rope_theta(config), "attention": "full"}
        original = self.unused_fields(config)
        if not config.get("mm_vision_tower"):
            if vision:
                raise UserError(f"vision={vision} is given, but config.json has no mm_vision_tower")
            return Description(decoder, None, image_id, original=original)
        _refuse(config, self.only_vision)
        grids = _grids(config, vision or {})
        tower = StoredTower(config, shapes, self.tower).describe(vision or {}, grids)
        ratio = re.fullmatch(r"anyres_max_(\d+)", str(config.get("image_aspect_ratio")))
        if not ratio:
            value = config.get("image_aspect_ratio")
            raise UserError(f"config.json: image_aspect_ratio is {value!r}, only anyres_max_N is implemented")
        tiling = {"size": tower["image_size"], "grids": grids, "max_tiles": int(ratio[1])}
        return Description(decoder, tower, image_id, tiling, original=original)

    def names(self, config: dict, shapes: Shapes) -> dict[str, str]:
        unused = StoredTower(config, shapes, self.tower).unused()
        return {ours: theirs for ours, theirs in super().names(config, shapes).items() if theirs not in unused}

    def config(self, description: Description) -> dict:
        decoder, tower, tiling = description.decoder, description.vision, description.tiling
        default = {"architectures": ["LLaDAModelLM"], **_released(self.only), "use_cache": False}
        fields = self.original_fields(description) or default
        fields |= {name: decoder[name] for name in (*self.decoder, "rope_theta")}
        fields |= {"rope_scaling": None, "model_type": "llada"}
        if not tower:
            return fields
        if not tiling:
            raise UserError("the model encodes each image as one tile, but format=llada_v needs any-resolution tiling")
        if "mm_vision_tower" not in fields:
            fields |= {"architectures": ["LlavaLLaDAModelLM"], "mm_vision_tower": "siglip", "use_mm_proj": True}
            fields |= {**_released(self.only_vision), "mm_newline_position": "grid"}
        if missing := StoredTower(fields, {}, self.tower).missing_fields(tower):
            fields["vision_config"] = {**(fields.get("vision_config") or {}), **missing}
        return fields | {
            "model_type": "llava_llada",
            "mm_hidden_size": tower["hidden_size"],
            "image_aspect_ratio": f"anyres_max_{tiling.get('max_tiles', 4)}",
            "image_grid_pinpoints": [list(grid) for grid in tiling["grids"]],
        }


class OlmoStyle(Format):
    """LLaDA-8B: the text model."""

    name = "llada"
    renames = (
        ("model.transformer.wte.", "model.embed_tokens."),
        ("model.transformer.ln_f.", "model.norm."),
        ("model.transformer.ff_out.", "lm_head."),  # before `ff_out` of the blocks, which is another
        ("model.transformer.blocks.", "model.layers."),
        *((".attn_norm.", ".input_layernorm."), (".ff_norm.", ".post_attention_layernorm.")),
        *((f".{name}.", f".self_attn.{name}.") for name in ("q_proj", "k_proj", "v_proj")),
        *((".attn_out.", ".self_attn.o_proj."), (".ff_proj.", ".mlp.gate_proj."), (".up_proj.", ".mlp.up_proj.")),
        (".ff_out.", ".mlp.down_proj."),
    )
    sizes: Mapping[str, str] = {  # ours: theirs
        "hidden_size": "d_model",
        "intermediate_size": "mlp_hidden_size",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "rms_norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
    }
    # As above; where None is not allowed, the class default differs from the value in the released config.
    only: Mapping[str, tuple] = {
        **{"block_type": ("llama",), "activation_type": ("silu",), "layer_norm_type": ("rms",), "rope": (True,)},
        **{"weight_tying": (False,), "include_bias": (False,), "include_qkv_bias": (False, None)},
        **{"bias_for_layer_norm": (False, None), "attention_layer_norm": (False, None), "alibi": (False, None)},
        **{"input_emb_norm": (False, None), "scale_logits": (False, None), "block_group_size": (1, None)},
        **{"multi_query_attention": (None, False), "clip_qkv": (None,), "layer_norm_with_affine": (True, None)},
        **{"attention_dropout": (0.0,), "residual_dropout": (0.0,), "embedding_dropout": (0.0,)},
    }
    dropped = (*sizes.values(), "n_kv_heads", "embedding_size", "model_type", "torch_dtype", "dtype")

    def describe(self, config: dict, shapes: Shapes, *, vision: dict | None, image_id: int) -> Description:
        if vision:
            raise UserError(f"vision={vision} is given, but LLaDA-8B's layout holds text models only")
        _refuse(config, self.only)
        decoder = {ours: config[theirs] for ours, theirs in self.sizes.items()}
        decoder["vocab_size"] = config.get("embedding_size") or config["vocab_size"]
        decoder["num_key_value_heads"] = config.get("n_kv_heads") or config["n_heads"]
        decoder["attention"] = "full"
        return Description(decoder, None, image_id, original=self.unused_fields(config))

    def config(self, description: Description) -> dict:
        decoder = description.decoder
        if description.vision:
            raise UserError("format=llada holds text models only, but this model has a vision path: use llada_v")
        fields = self.original_fields(description) or {
            "architectures": ["LLaDAModelLM"], **_released(self.only), "rope_full_precision": True,
            "max_sequence_length": 4096, "vocab_size": decoder["vocab_size"], "use_cache": False,
        }  # fmt: skip
        fields |= {theirs: decoder[ours] for ours, theirs in self.sizes.items()}
        fields |= {"n_kv_heads": decoder["num_key_value_heads"], "embedding_size": decoder["vocab_size"]}
        return fields | {"model_type": "llada"}


Layout = Own | LlamaStyle | OlmoStyle
FORMATS: dict[str, Layout] = {form.name: form for form in (Own(), LlamaStyle(), OlmoStyle())}


def recognise(config: dict) -> Layout:
    """The layout of a config.json. Raises UserError for an unknown one."""
    model_type = config.get("model_type")
    if model_type == MODEL_TYPE:
        return FORMATS["own"]
    if model_type in ("llada", "llava_llada") and "hidden_size" in config:
        return FORMATS["llada_v"]
    if model_type == "llada" and "d_model" in config:
        return FORMATS["llada"]
    raise UserError(
        f"model type {model_type!r} with these fields is unknown; supported are {MODEL_TYPE!r}, "
        "LLaDA-V ('llava_llada' with hidden_size) and LLaDA-8B ('llada' with d_model)"
    )


def _refuse(config: dict, only: Mapping[str, tuple]) -> None:
    """Raise one UserError that lists all fields whose value is not implemented."""
    problems = [
        f"{name} is {config.get(name)!r}, only {allowed[0]!r} is implemented"
        for name, allowed in only.items()
        if config.get(name) not in allowed
    ]
    if problems:
        raise UserError(f"config.json: {'; '.join(problems)}")


def _rope_theta(config: dict) -> float:
    """RoPE's base; transformers 5 stores it in `rope_parameters`. Raises UserError for scaled positions."""
    for name in ("rope_parameters", "rope_scaling"):
        value = config.get(name) or {}
        rope_type = value.get("rope_type", value.get("type", "default"))
        if rope_type != "default" or value.keys() - {"rope_type", "type", "rope_theta"}:
            raise UserError(f"config.json: {name} is {value!r}, only positions without scaling are implemented")
    parameters = config.get("rope_parameters") or {}
    return parameters["rope_theta"] if "rope_theta" in parameters else config["rope_theta"]


def _grids(config: dict, vision: dict) -> list:
    """Tile grids, (width, height) in pixels each. `(1x1),...,(6x6)` means all from the first to the last, in tiles."""
    pinpoints = config["image_grid_pinpoints"]
    if not isinstance(pinpoints, str):
        return pinpoints
    # the size of a tile in pixels is given, or ends the tower's name
    name = re.search(r"-(\d+)$", str(config["mm_vision_tower"]))
    size = vision.get("image_size") or (config.get("vision_config") or {}).get("image_size") or (name and int(name[1]))
    numbers = [int(number) for number in re.findall(r"\d+", pinpoints)]
    if not size or len(numbers) < 2:
        raise UserError(
            f"config.json: image_grid_pinpoints is {pinpoints!r}, in tiles of unknown size: set their size in pixels, "
            "for example with model.vision='{image_size: 384}' (src.export: vision=...)"
        )
    (wide, high), (last_wide, last_high) = numbers[:2], numbers[-2:]
    columns, rows = range(wide, last_wide + 1), range(high, last_high + 1)
    return [[column * size, row * size] for column in columns for row in rows]


def _released(only: Mapping[str, tuple]) -> dict[str, Any]:
    """The values of the released config, where it has the field."""
    return {name: allowed[0] for name, allowed in only.items() if allowed[0] is not None}
