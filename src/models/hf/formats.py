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
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from src.io.errors import UserError
from src.models.hf.vision_tower import Shapes, StoredTower
from src.models.sizes import check_sizes

MODEL_TYPE = "rediff_llada_v"


@dataclass(frozen=True)
class Description:
    """Everything of a model but its weights: the arguments of `LLaDAV`, and the other fields of a released config."""

    decoder: dict[str, Any]
    vision: dict[str, Any] | None
    image_id: int
    tiling: dict[str, Any] | None = None
    original: dict[str, Any] = field(default_factory=dict)  # {"format": name, "fields": the fields that we do not use}
    response_length: int | None = None  # response length used in training


class Format(Protocol):
    """A layout: the fields of config.json and the tensor names."""

    name: str

    def recognises(self, config: dict) -> bool: ...

    def describe(self, config: dict, shapes: Shapes, *, vision: dict | None, image_id: int) -> Description:
        """The model that a config.json describes. Raises UserError for fields that are missing or not implemented.

        shapes: of the stored tensors, by their names in the files; vision: tower fields that the config lacks;
        image_id: the image mark of prompts, if the config has none
        """
        ...

    def names(self, config: dict, shapes: Shapes) -> dict[str, str]:
        """Our name -> name in the files, for all tensors but those that the released model stores and never uses."""
        ...

    def theirs(self, name: str) -> str:
        """The name of one of our tensors in the files."""
        ...

    def config(self, description: Description) -> dict:
        """The fields of config.json. Raises UserError if the layout cannot express the model."""
        ...


class Own:
    """Our own layout."""

    name = "own"

    def recognises(self, config: dict) -> bool:
        return config.get("model_type") == MODEL_TYPE

    def describe(self, config: dict, shapes: Shapes, *, vision: dict | None, image_id: int) -> Description:
        if vision:
            raise UserError(f"vision={vision} is for released models; this folder describes its vision tower itself")
        if "canvas" in config:
            raise UserError("config.json is of a version before 0.2.0: rename its key canvas to response_length")
        more = {key: config[key] for key in ("tiling", "response_length", "original") if key in config}
        return Description(config["decoder"], config["vision"], config["image_id"], **more)

    def names(self, config: dict, shapes: Shapes) -> dict[str, str]:
        return {name: name for name in shapes}

    def theirs(self, name: str) -> str:
        return name

    def config(self, description: Description) -> dict:
        optional = {
            "tiling": description.tiling,
            "response_length": description.response_length,
            "original": description.original,
        }
        return {
            "model_type": MODEL_TYPE,
            "decoder": description.decoder,
            "vision": description.vision,
            "image_id": description.image_id,
            **{key: value for key, value in optional.items() if value},
        }


class LlamaStyle:
    """LLaDA-V and ReDiff, and the text model that LLaDA-V was trained from."""

    name = "llada_v"
    tower = "model.vision_tower.vision_tower.vision_model."
    prefixes = (
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
    used = frozenset({*decoder, "rope_theta", "rope_parameters", "rope_scaling", "image_grid_pinpoints"})
    computed = frozenset({"model_type", "mm_hidden_size", "image_aspect_ratio", "torch_dtype", "dtype", "head_dim"})

    def recognises(self, config: dict) -> bool:
        return config.get("model_type") in ("llada", "llava_llada") and "hidden_size" in config

    def describe(self, config: dict, shapes: Shapes, *, vision: dict | None, image_id: int) -> Description:
        sizes = {name: _need(config, name) for name in self.decoder if name != "num_key_value_heads"}
        sizes |= {"num_key_value_heads": config.get("num_key_value_heads"), "rope_theta": _rope_theta(config)}
        check_sizes(sizes)
        _refuse(config, {**self.only, "head_dim": (sizes["hidden_size"] // sizes["num_attention_heads"], None)})
        original = {"format": self.name, "fields": _without(config, self.used | self.computed)}
        if not config.get("mm_vision_tower"):
            if vision:
                raise UserError(f"vision={vision} is given, but config.json has no mm_vision_tower")
            return Description(_decoder(sizes), None, image_id, original=original)
        _refuse(config, self.only_vision)
        grids = _grids(config, vision or {})
        tower = StoredTower(config, shapes, self.tower).describe(vision or {}, grids)
        tiling = {"size": tower["image_size"], "grids": grids, "max_tiles": _max_tiles(config)}
        return Description(_decoder(sizes), tower, image_id, tiling, original)

    def names(self, config: dict, shapes: Shapes) -> dict[str, str]:
        unused = StoredTower(config, shapes, self.tower).unused()
        return _unique((_replace_prefix(name, self.prefixes), name) for name in shapes if name not in unused)

    def theirs(self, name: str) -> str:
        return _replace_prefix(name, [(ours, theirs) for theirs, ours in self.prefixes])

    def config(self, description: Description) -> dict:
        _check_attention(description)
        constants = {"architectures": ["LLaDAModelLM"], **_originals(self.only), "use_cache": False}
        fields = {**(_fields(description, self.name) or constants)}
        fields |= {name: description.decoder[name] for name in self.decoder}
        fields |= {"rope_theta": description.decoder["rope_theta"], "rope_scaling": None}
        return fields | (self._vision(description, fields) if description.vision else {"model_type": "llada"})

    def _vision(self, description: Description, fields: dict) -> dict:
        tower, tiling = description.vision or {}, description.tiling
        if not tiling:
            raise UserError("the model encodes each image as one tile, but format=llada_v needs any-resolution tiling")
        constants = {"architectures": ["LlavaLLaDAModelLM"], "mm_vision_tower": "siglip", "use_mm_proj": True}
        constants |= {**_originals(self.only_vision), "mm_newline_position": "grid"}
        fields = fields if "mm_vision_tower" in fields else {**fields, **constants}
        if missing := StoredTower(fields, {}, self.tower).missing_fields(tower):
            fields["vision_config"] = {**(fields.get("vision_config") or {}), **missing}
        return fields | {
            "model_type": "llava_llada",
            "mm_hidden_size": tower["hidden_size"],
            "image_aspect_ratio": f"anyres_max_{tiling.get('max_tiles', 4)}",
            "image_grid_pinpoints": [list(grid) for grid in tiling["grids"]],
        }


class OlmoStyle:
    """LLaDA-8B: the text model."""

    name = "llada"
    sizes = (
        *(("hidden_size", "d_model"), ("intermediate_size", "mlp_hidden_size"), ("num_hidden_layers", "n_layers")),
        *(("num_attention_heads", "n_heads"), ("rms_norm_eps", "rms_norm_eps"), ("rope_theta", "rope_theta")),
    )
    outside = (
        ("model.transformer.wte.weight", "model.embed_tokens.weight"),
        ("model.transformer.ln_f.weight", "model.norm.weight"),
        ("model.transformer.ff_out.weight", "lm_head.weight"),
    )
    blocks = (
        *(("attn_norm", "input_layernorm"), ("ff_norm", "post_attention_layernorm")),
        *(("q_proj", "self_attn.q_proj"), ("k_proj", "self_attn.k_proj"), ("v_proj", "self_attn.v_proj")),
        *(("attn_out", "self_attn.o_proj"), ("ff_proj", "mlp.gate_proj"), ("up_proj", "mlp.up_proj")),
        ("ff_out", "mlp.down_proj"),
    )
    # As above; where None is not allowed, the class default differs from the value in the released config.
    only: Mapping[str, tuple] = {
        **{"block_type": ("llama",), "activation_type": ("silu",), "layer_norm_type": ("rms",), "rope": (True,)},
        **{"weight_tying": (False,), "include_bias": (False,), "include_qkv_bias": (False, None)},
        **{"bias_for_layer_norm": (False, None), "attention_layer_norm": (False, None), "alibi": (False, None)},
        **{"input_emb_norm": (False, None), "scale_logits": (False, None), "block_group_size": (1, None)},
        **{"multi_query_attention": (None, False), "clip_qkv": (None,), "layer_norm_with_affine": (True, None)},
        **{"attention_dropout": (0.0,), "residual_dropout": (0.0,), "embedding_dropout": (0.0,)},
    }
    used = frozenset({*(theirs for _, theirs in sizes), "n_kv_heads", "embedding_size"})
    computed = frozenset({"model_type", "torch_dtype", "dtype"})

    def recognises(self, config: dict) -> bool:
        return config.get("model_type") == "llada" and "d_model" in config

    def describe(self, config: dict, shapes: Shapes, *, vision: dict | None, image_id: int) -> Description:
        if vision:
            raise UserError(f"vision={vision} is given, but LLaDA-8B's layout holds text models only")
        _refuse(config, self.only)
        decoder = {ours: _need(config, theirs) for ours, theirs in self.sizes}
        decoder["vocab_size"] = config.get("embedding_size") or _need(config, "vocab_size")
        decoder["num_key_value_heads"] = config.get("n_kv_heads")
        check_sizes(decoder, names={**dict(self.sizes), "num_key_value_heads": "n_kv_heads"})
        original = {"format": self.name, "fields": _without(config, self.used | self.computed)}
        return Description(_decoder(decoder), None, image_id, original=original)

    def names(self, config: dict, shapes: Shapes) -> dict[str, str]:
        outside, blocks = dict(self.outside), dict(self.blocks)
        return _unique(
            (_block_name(name, "model.transformer.blocks", "model.layers", outside, blocks), name) for name in shapes
        )

    def theirs(self, name: str) -> str:
        outside, blocks = ({ours: theirs for theirs, ours in table} for table in (self.outside, self.blocks))
        return _block_name(name, "model.layers", "model.transformer.blocks", outside, blocks)

    def config(self, description: Description) -> dict:
        _check_attention(description)
        if description.vision:
            raise UserError("format=llada holds text models only, but this model has a vision path: use llada_v")
        decoder = description.decoder
        constants = {"architectures": ["LLaDAModelLM"], **_originals(self.only), "rope_full_precision": True}
        constants |= {"max_sequence_length": 4096, "vocab_size": decoder["vocab_size"], "use_cache": False}
        fields = {**(_fields(description, self.name) or constants)}
        fields |= {theirs: decoder[ours] for ours, theirs in self.sizes}
        fields |= {"n_kv_heads": decoder["num_key_value_heads"], "embedding_size": decoder["vocab_size"]}
        return fields | {"model_type": "llada"}


FORMATS: dict[str, Format] = {form.name: form for form in (Own(), LlamaStyle(), OlmoStyle())}


def qualify(auto_map: Mapping[str, Any], hub: str) -> dict[str, Any]:
    """`auto_map` with the hub name prefixed to each class, so that the classes load from any folder."""

    def prefixed(value: Any) -> Any:
        if isinstance(value, list):
            return [prefixed(item) for item in value]
        return value if value is None or "--" in value else f"{hub}--{value}"

    return {name: prefixed(value) for name, value in auto_map.items()}


def recognise(config: dict) -> Format:
    """The layout of a config.json. Raises UserError for an unknown one."""
    for form in FORMATS.values():
        if form.recognises(config):
            return form
    raise UserError(
        f"model type {config.get('model_type')!r} with these fields is unknown; supported are {MODEL_TYPE!r}, "
        "LLaDA-V ('llava_llada' with hidden_size) and LLaDA-8B ('llada' with d_model)"
    )


def _decoder(sizes: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `DecoderConfig`. Both released models use full attention and may leave num_key_value_heads out."""
    heads = sizes["num_key_value_heads"] or sizes["num_attention_heads"]
    return {**sizes, "num_key_value_heads": heads, "attention": "full"}


def _need(config: dict, name: str) -> Any:
    if config.get(name) is None:
        raise UserError(f"config.json lacks {name}")
    return config[name]


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
    parameters = config.get("rope_parameters") or {}
    for name in ("rope_parameters", "rope_scaling"):
        value = config.get(name) or {}
        rope_type = value.get("rope_type", value.get("type", "default"))
        if rope_type != "default" or value.keys() - {"rope_type", "type", "rope_theta"}:
            raise UserError(f"config.json: {name} is {value!r}, only positions without scaling are implemented")
    return parameters["rope_theta"] if "rope_theta" in parameters else _need(config, "rope_theta")


def _grids(config: dict, vision: dict) -> list:
    """The tile grids, (width, height) in pixels each. `(1x1),...,(6x6)` means all from the first to the last, in tiles.

    The tile size in pixels is then `image_size` of `vision` or of `vision_config`, else the number that ends the
    tower's name.
    """
    pinpoints = _need(config, "image_grid_pinpoints")
    if not isinstance(pinpoints, str):
        return pinpoints
    match = re.fullmatch(r"\((\d+)x(\d+)\)(?:.*\((\d+)x(\d+)\))?", pinpoints.replace(" ", ""))
    if not match:
        raise UserError(
            f"config.json: image_grid_pinpoints is {pinpoints!r}, neither a list of [width, height] nor "
            "'(1x1),...,(6x6)'"
        )
    wide, high, *last = (int(number or 0) for number in match.groups())
    name = re.search(r"-(\d+)$", str(config["mm_vision_tower"]))
    size = vision.get("image_size") or (config.get("vision_config") or {}).get("image_size") or (name and int(name[1]))
    if not size:
        raise UserError(
            f"config.json: image_grid_pinpoints is {pinpoints!r}, in tiles, but the tile size in pixels is unknown: "
            "set it, for example with model.vision='{image_size: 384}' (src.export: vision=...)"
        )
    columns, rows = (range(start, max(start, end) + 1) for start, end in zip((wide, high), last, strict=True))
    return [[column * size, row * size] for column in columns for row in rows]


def _max_tiles(config: dict) -> int:
    """The N of `anyres_max_N`."""
    value = config.get("image_aspect_ratio")
    match = re.fullmatch(r"anyres_max_(\d+)", str(value))
    if not match:
        raise UserError(f"config.json: image_aspect_ratio is {value!r}, only anyres_max_N is implemented")
    return int(match[1])


def _check_attention(description: Description) -> None:
    attention = description.decoder["attention"]
    if attention != "full":
        raise UserError(f"the model has attention={attention!r}, but the released layouts support only 'full'")
    if description.decoder.get("shift"):
        raise UserError("the model has shift=true, which the released layouts do not support")


def _without(config: dict, names: Collection[str]) -> dict:
    return {key: value for key, value in config.items() if key not in names}


def _originals(only: Mapping[str, tuple]) -> dict[str, Any]:
    return {name: allowed[0] for name, allowed in only.items() if allowed[0] is not None}


def _fields(description: Description, name: str) -> dict:
    """The unused fields of the released config, if the model came in this layout."""
    return description.original["fields"] if description.original.get("format") == name else {}


def _replace_prefix(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    return next((new + name.removeprefix(old) for old, new in prefixes if name.startswith(old)), name)


def _block_name(name: str, old: str, new: str, outside: Mapping[str, str], blocks: Mapping[str, str]) -> str:
    """A tensor's name in the other layout; `ff_out` within a block differs from `ff_out` outside."""
    match = re.fullmatch(rf"{re.escape(old)}\.(\d+)\.(.+)\.weight", name)
    if match and match[2] in blocks:
        return f"{new}.{match[1]}.{blocks[match[2]]}.weight"
    return outside.get(name, name)


def _unique(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    names: dict[str, str] = {}
    for ours, theirs in pairs:
        if ours in names:
            raise UserError(f"the weights contain {theirs} and {names[ours]}, which are the same tensor")
        names[ours] = theirs
    return names
