"""The backbone against independent implementations: transformers' Llama without causality, and itself, uncached."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from src.models.hf.folder import fingerprint
from src.models.llada import RMSNorm
from src.models.llada_v import LLaDAV
from src.models.tiny import tiny
from src.text.tokenizer import Codec
from src.training.memory_plan import Live
from src.types import Prefix

DECODER = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 48,
    "patch_size": 16,
}  # fmt: skip
IMAGE = 90


def make(attention: str = "full", *, kv_heads: int = 4, vision: dict | None = None, shift: bool = False) -> LLaDAV:
    torch.manual_seed(0)
    decoder = {**DECODER, "num_key_value_heads": kv_heads, "attention": attention, "shift": shift}
    return LLaDAV(decoder=decoder, vision=vision, image_id=IMAGE, init_std=0.2).eval()


def pictures(*rows: int) -> dict[str, Tensor]:
    """Inputs for rows of so many images of one tile, of noise."""
    torch.manual_seed(0)
    num_tiles = torch.tensor([[i < count for i in range(max(rows))] for count in rows]).long()
    sizes = num_tiles[..., None] * torch.tensor([60, 48])
    pixels = torch.randint(0, 256, (len(rows), max(rows), 3, 48, 48), dtype=torch.uint8)
    return {"pixel_values": pixels, "num_tiles": num_tiles, "image_sizes": sizes}


def oracle(model: LLaDAV) -> LlamaForCausalLM:
    """transformers' Llama with our weights and bidirectional attention."""
    fields = model.config.to_dict()
    rope = {"rope_type": "default", "rope_theta": fields["rope_theta"]}
    sizes = {name: value for name, value in fields.items() if name not in ("attention", "shift")}
    config = LlamaConfig(**sizes, rope_parameters=rope, tie_word_embeddings=False)
    config.is_causal = False
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict({name: t for name, t in model.state_dict().items() if not name.startswith("vision")})
    return llama


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("attention", "kv_heads"), [("full", 4), ("full", 2), ("prefix", 4)])
@torch.no_grad()
def test_the_decoder_equals_a_bidirectional_llama(attention, kv_heads, shift):
    """With Dream's shift, the logits of a token are those of the place before it.

    In `prefix` mode the cached prefix is exact: the same as one pass in which the prefix sees only itself.
    """
    model = make(attention, kv_heads=kv_heads, shift=shift)
    prompt, response = torch.randint(0, 90, (2, 5)), torch.randint(0, 90, (2, 7))
    ours = model(model.encode_prefix({"prompt_ids": prompt}), response)
    allowed = torch.ones(12, 12, dtype=torch.bool)
    allowed[:5, 5:] = attention == "full"
    bias = torch.zeros(12, 12).masked_fill(~allowed, float("-inf"))[None, None].expand(2, 1, 12, 12)
    theirs = oracle(model)(torch.cat([prompt, response], 1), attention_mask=bias).logits[:, 5 - shift : 12 - shift]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_norm_of_low_precision_is_computed_in_float32():
    """One rounding before the weight and one behind it, of the numbers that float64 gives."""
    torch.manual_seed(0)
    x, norm = (torch.randn(64, 256) * 7).bfloat16(), RMSNorm(256, 1e-5).bfloat16()
    norm.weight.normal_()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    output, expected = norm(x), norm.weight * exact.bfloat16()
    assert output.dtype == torch.bfloat16
    assert float((output != expected).double().mean()) < 0.001  # a float32 next to a tie may fall on its other side


@torch.no_grad()
def test_square_images_are_put_among_float32_words_under_autocast():
    """Their tokens are bfloat16 there: no newline vector in float32 is joined to them, as with a grid of tiles."""
    model, response = make(vision=VISION), torch.arange(20)[None]
    inputs = {"prompt_ids": torch.tensor([[5, IMAGE, 6]]), **pictures(1)}
    expected = model(model.encode_prefix(inputs), response)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(model.encode_prefix(inputs), response)
    assert logits.dtype == torch.bfloat16
    assert float((logits.float() - expected).abs().mean() / expected.std()) < 0.04


@torch.no_grad()
def test_with_shift_the_first_token_of_all_keeps_its_own_logits():
    """As in Dream: l'[0] = l[0], l'[i] = l[i - 1]."""
    plain, shifted = (make(shift=shift).model for shift in (False, True))
    embeds = plain.embed_tokens(torch.randint(0, 90, (2, 7)))
    own = plain(embeds, Prefix(embeds[:, :0]), None)
    torch.testing.assert_close(shifted(embeds, Prefix(embeds[:, :0]), None), torch.cat([own[:, :1], own[:, :-1]], 1))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("attention", ["full", "prefix"])
@torch.no_grad()
def test_padded_rows_give_what_they_give_alone(attention, shift):
    model = make(attention, vision=VISION, shift=shift)
    images = pictures(1, 0, 2)
    prompts = [[IMAGE, 5, 6, 7], [5, 3], [8, IMAGE, 9, IMAGE]]
    responses = [[11, 12, 13], [14, 15, 16, 17, 18], [19]]
    pad = lambda rows, width: torch.tensor([r + [IMAGE] * (width - len(r)) for r in rows])  # noqa: E731
    here = lambda rows, width: torch.tensor([[i < len(r) for i in range(width)] for r in rows])  # noqa: E731
    prefix = model.encode_prefix({"prompt_ids": pad(prompts, 4), "prompt_mask": here(prompts, 4), **images})
    assert prefix.mask is not None and prefix.mask.sum(1).tolist() == [3 + 9, 2, 2 + 2 * 9]
    assert not prefix.embeds[~prefix.mask].any()
    together = model(prefix, pad(responses, 5), attend=here(responses, 5))
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        own = {name: tensor[row : row + 1] for name, tensor in images.items()} if row != 1 else {}
        alone = model.encode_prefix({"prompt_ids": torch.tensor([prompt]), **own})
        assert alone.mask is None
        logits = model(alone, torch.tensor([response]))
        torch.testing.assert_close(together[row, : len(response)], logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 2, 5])
@torch.no_grad()
def test_the_tower_encodes_in_chunks_and_no_padding(chunk):
    model = make(vision=VISION)
    tiles = pictures(5)["pixel_values"][0]
    expected = model.vision.mm_projector(model.vision.features(tiles))
    sizes = []
    model.vision.vision_tower.encoder.register_forward_hook(lambda *call: sizes.append(len(call[2].last_hidden_state)))
    model.vision.chunk = chunk
    torch.testing.assert_close(torch.stack(model.vision(tiles, [(9, 9)] * 5)), expected)
    assert (sum(sizes), max(sizes)) == (5, chunk)
    sizes.clear()
    model.encode_prefix({"prompt_ids": torch.tensor([[IMAGE, 5, 6], [IMAGE, IMAGE, IMAGE]]), **pictures(1, 3)})
    assert sum(sizes) == 4


@pytest.mark.parametrize("attention", ["full", "prefix"])
def test_logits_only_where_asked_and_gradients_of_a_shared_prefix(attention):
    model = make(attention, vision=VISION)
    inputs = {"prompt_ids": torch.tensor([[IMAGE, 5]]), **pictures(1)}
    views = [torch.randint(0, 90, (1, 6)) for _ in range(2)]
    gradients = []
    for shared in (True, False):
        model.zero_grad()
        once = model.encode_prefix(inputs)
        loss = sum(model(once if shared else model.encode_prefix(inputs), v).square().mean() for v in views)
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    where = torch.tensor([[True, False, True, True, False, False]])
    torch.testing.assert_close(model(once, views[0], positions=where), model(once, views[0])[where])


def test_the_fingerprint_sees_names_shapes_types_and_every_number():
    """One number in the middle of many; the same bytes under another name, in another shape, or of another type."""
    table = torch.arange(6000.0)
    changed = table.clone()
    changed[3001] = -1.0
    states = [{"a": table}, {"b": table}, {"a": changed}, {"a": table.view(60, 100)}, {"a": table.view(torch.int32)}]
    states.append({"a": table.bfloat16(), "count": torch.tensor(3)})
    fingerprints = []
    for state in states:
        module = nn.Module()
        for name, tensor in state.items():
            module.register_buffer(name, tensor)
        fingerprints.append(fingerprint(module))
        assert fingerprint(copy.deepcopy(module)) == fingerprints[-1]
    assert len(set(fingerprints)) == len(states)


def test_tiny_models_follow_their_seed():
    codec = Codec.train(["a red ring"], vocab_size=80)
    state = torch.random.get_rng_state()
    a, b, c = (tiny(codec, decoder=DECODER, vision=None, seed=s).lm_head.weight for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("decoder", "more", "message"),
    [
        ({"attention": "causal"}, {}, "causal"),
        ({"num_attention_heads": 5}, {}, "5 heads"),
        ({"num_key_value_heads": 3}, {}, "3 key"),
        ({}, {"vision": VISION, "tiling": {"size": 32, "grids": [[32, 32]]}}, "the tower takes 48 pixels"),
        ({}, {"tiling": {"size": 32, "grids": [[32, 32]]}}, "no vision path"),
    ],
)
def test_settings_that_contradict_each_other_are_named(decoder, more, message):
    with pytest.raises(ValueError, match=message):
        LLaDAV(decoder={**DECODER, **decoder}, **{"vision": None, **more})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt_ids": torch.tensor([[IMAGE, 4], [3, 4]])}, "row 1: the prompt holds 0 image marks, .* 1 images"),
        ({"num_tiles": torch.tensor([[1], [0]])}, "row 1: the prompt holds 1 image marks, but there are 0 images"),
        ({"num_tiles": torch.tensor([[1], [2]])}, r"row 1: an image of 60 x 48 pixels comes as 2 tiles.* makes 1 "),
        ({"pixel_values": torch.zeros(2, 1, 3, 48, 48)}, "other pixels"),
    ],
)
def test_prompts_and_images_must_agree(changed, message):
    inputs = {"prompt_ids": torch.tensor([[IMAGE, 4], [3, IMAGE]]), **pictures(1, 1)}
    make(vision=VISION).encode_prefix(inputs)
    with pytest.raises((ValueError, AssertionError), match=message):
        make(vision=VISION).encode_prefix({**inputs, **changed})
    with pytest.raises(ValueError, match="no vision path"):
        make().encode_prefix(inputs)


@pytest.mark.parametrize("vision", [None, VISION])
@pytest.mark.parametrize("attention", ["full", "prefix"])
def test_checkpointing_changes_no_gradient_and_keeps_less(attention, vision):
    kept, gradients = {}, {}
    inputs = {"prompt_ids": torch.tensor([[5, IMAGE if vision else 4, 6]] * 8)} | (pictures(*[1] * 8) if vision else {})
    response = torch.randint(0, 90, (8, 40))
    for mode in ("none", "selective", "full"):
        model = make(attention, vision=vision).train()
        model.checkpoint(mode)
        live = Live()
        with live:
            live.enter("forward", "made")
            loss = model(model.encode_prefix(inputs), response).logsumexp(-1).sum()
            kept[mode] = live.now["made"]
        loss.backward()
        gradients[mode] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert torch.equal(gradients["none"], gradients["full"]) and torch.equal(gradients["none"], gradients["selective"])
    assert kept["full"] < 0.4 * kept["none"] and kept["full"] < kept["selective"] < 0.8 * kept["none"]
    with pytest.raises(ValueError, match=r"checkpointing must be one of .*, got 'some'"):
        model.checkpoint("some")
