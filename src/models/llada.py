"""The LLaDA decoder: a Llama-style transformer with bidirectional attention (arXiv 2502.09992).

    prefix embeddings (B, P, D) -> prefix_cache -> keys and values of each layer (attention mode `prefix`)
    those, response embeddings (B, L, D) -> forward -> hidden states of the response (B, L, D)

Attention modes. `full`: prefix and response see each other, as LLaDA-V was released. `prefix`: the prefix sees only
itself, so its keys and values are computed once and reused exactly, at every denoising step and for every noise draw.

Shift, as in Dream (adapted from autoregressive models): the hidden state at a position predicts the token after it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from src.io.errors import UserError
from src.types import Prefix

KeyValue = tuple[Tensor, Tensor]
KEPT = (  # selective checkpointing keeps these activations: they are expensive to recompute
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)
CHECKPOINTING = ("none", "selective", "full")


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder, under the names of the released config.json.

    Raises UserError for numbers of heads that do not divide, and for an unknown attention mode.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    rope_theta: float = 500_000.0
    rms_norm_eps: float = 1e-5
    attention: str = "full"  # or `prefix`
    shift: bool = False  # the logits of a token come from the position before it

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or self.num_attention_heads)
        if self.attention not in ("full", "prefix"):
            raise UserError(f"attention must be 'full' or 'prefix', got {self.attention!r}")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads")
        if self.num_attention_heads % self.kv_heads:
            raise UserError(f"{self.num_attention_heads} heads are not a multiple of {self.kv_heads} key/value heads")

    @property
    def kv_heads(self) -> int:
        assert self.num_key_value_heads is not None  # filled in above
        return self.num_key_value_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def to_dict(self) -> dict:
        return asdict(self)


class Attention(nn.Module):
    """Multi-head attention with rotary positions; queries may also attend to cached keys and values (`past`)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def keys_values(self, x: Tensor, rope: KeyValue) -> KeyValue:
        """Rotated keys and values (B, H, T, d) of `x` (B, T, D)."""
        return rotate(self._split(self.k_proj(x), self.kv_heads), rope), self._split(self.v_proj(x), self.kv_heads)

    def forward(
        self, x: Tensor, rope: KeyValue, mask: Tensor | None, past: KeyValue | None, in_place: bool = False
    ) -> tuple[Tensor, KeyValue]:
        """in_place: `past` has room for the keys and values of `x` at its end; they are written there."""
        query = rotate(self._split(self.q_proj(x), self.heads), rope)
        own = self.keys_values(x, rope)
        if past is None:
            key, value = own
        elif in_place:
            key, value = past
            key[:, :, -x.shape[1] :], value[:, :, -x.shape[1] :] = own
        else:
            key, value = torch.cat([past[0], own[0]], 2), torch.cat([past[1], own[1]], 2)
        gqa = self.heads != self.kv_heads
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=gqa)  # (B, H, T, d)
        return self.o_proj(out.transpose(1, 2).flatten(2)), own

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if torch.is_grad_enabled():
            return self.down_proj(F.silu(gate) * up)
        return self.down_proj(F.silu(gate, inplace=True).mul_(up))  # no new tensors of the intermediate size


class RMSNorm(nn.Module):
    """RMSNorm computed in float32 and cast back before the weight, as in the released code."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)


class Block(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def keys_values(self, x: Tensor, rope: KeyValue) -> KeyValue:
        """Those of its attention, without the block's output."""
        return self.self_attn.keys_values(self.input_layernorm(x), rope)

    def forward(
        self, x: Tensor, rope: KeyValue, mask: Tensor | None, past: KeyValue | None, in_place: bool = False
    ) -> tuple[Tensor, KeyValue]:
        attended, own = self.self_attn(self.input_layernorm(x), rope, mask, past, in_place)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), own


class Decoder(nn.Module):
    """Embedding, blocks and final norm. The head is in `LLaDAV`, under its released name."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers: Any = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.checkpointing = "none"

    def prefix_cache(self, embeds: Tensor, mask: Tensor | None) -> tuple[list[KeyValue], Tensor | None]:
        """The cache of a prefix, which attends only to itself (`prefix` mode).

        Keys and values per layer, each (B, H, P, d); with `shift` the state (B, 1, D) of its last token, else None.
        """
        rope = self._rope(embeds)
        bias = None if mask is None else mask[:, None, None, :]
        cache: list[KeyValue] = []
        x = embeds
        for block in self.layers[:-1]:
            x, own = self._run(block, x, rope, bias, None)
            cache.append(own)
        last = self.layers[-1]
        if self.config.shift:
            x, own = self._run(last, x, rope, bias, None)
            return [*cache, own], self.norm(_last(x, mask))
        cache.append(last.keys_values(x, rope))  # its output is never read
        return cache, None

    def forward(self, embeds: Tensor, prefix: Prefix, attend: Tensor | None) -> Tensor:
        """Hidden states (B, L, D) that predict the tokens of a response with embeddings `embeds` (B, L, D)."""
        length = prefix.embeds.shape[1]
        # a response starts right behind the unpadded prefix of its row
        rope = self._rope(embeds, length if prefix.mask is None else prefix.mask.sum(1, keepdim=True))
        mask = _join_masks(embeds, length, prefix.mask, attend)
        if prefix.cache is not None:
            x, last = embeds, prefix.last
            in_place = prefix.room >= x.shape[1] and not torch.is_grad_enabled()
            end = length + x.shape[1] if in_place else length
            for block, (keys, values) in zip(self.layers, prefix.cache, strict=True):
                x, _ = self._run(block, x, rope, mask, (keys[:, :, :end], values[:, :, :end]), in_place)
            x = self.norm(x)
        else:
            left = self._rope(prefix.embeds)
            cos, sin = (torch.cat([a.expand(b.shape[0], -1, -1, -1), b], 2) for a, b in zip(left, rope, strict=True))
            x = torch.cat([prefix.embeds, embeds], 1)
            for block in self.layers:
                x, _ = self._run(block, x, (cos, sin), mask, None)
            shifted = self.config.shift and length
            last = self.norm(_last(x[:, :length], prefix.mask)) if shifted else None
            x = self.norm(x[:, length:])
        if not self.config.shift:
            return x
        # without a prefix the first token has none before it, and keeps its own hidden state
        return torch.cat([x[:, :1] if last is None else last, x[:, :-1]], 1)

    def _run(self, block: nn.Module, *inputs: Any) -> tuple[Tensor, KeyValue]:
        """Run a block. `checkpointing` decides which activations are kept for the backward pass, not recomputed.

        none: all; full: only the input; selective: the input and the outputs of matrix products and attention (`KEPT`)
        """
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return block(*inputs)
        options = {}
        if self.checkpointing == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, list(KEPT))
        run: Any = checkpoint
        return run(block, *inputs, use_reentrant=False, **options)

    def _rope(self, x: Tensor, offset: int | Tensor = 0) -> KeyValue:
        """cos and sin (B or 1, 1, T, d) in float32, half-split layout, for `x` (B, T, D) from position `offset` on."""
        positions = torch.arange(x.shape[1], device=x.device)[None] + offset  # (B or 1, T)
        d = self.config.head_dim
        inverse = self.config.rope_theta ** (-torch.arange(0, d, 2, device=positions.device, dtype=torch.float32) / d)
        angle = positions[:, None, :, None].float() * torch.cat([inverse, inverse])
        return angle.cos(), angle.sin()


def _last(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, 1, D) of `x` (B, P, D) at the last true position of `mask` (B, P) in each row."""
    if mask is None:
        return x[:, -1:]
    return x[torch.arange(len(x), device=x.device), mask.sum(1) - 1][:, None]


def rotate(x: Tensor, rope: KeyValue) -> Tensor:
    """Rotary embedding of `x` (B, H, T, d), computed in float32."""
    wide = x.float()
    first, second = wide.chunk(2, -1)
    out = wide * rope[0]
    if torch.is_grad_enabled():
        return torch.addcmul(out, torch.cat([-second, first], -1), rope[1]).to(x.dtype)
    (left, right), (out_first, out_second) = rope[1].chunk(2, -1), out.chunk(2, -1)
    out_first.addcmul_(second, left, value=-1)
    out_second.addcmul_(first, right)
    return out.to(x.dtype)


def _join_masks(embeds: Tensor, length: int, prefix_mask: Tensor | None, attend: Tensor | None) -> Tensor | None:
    """(B, 1, 1, P + L) bool over keys, or None if all are attended to."""
    if prefix_mask is None and attend is None:
        return None
    batch, response = embeds.shape[:2]
    ones = torch.ones(batch, max(length, response), dtype=torch.bool, device=embeds.device)
    left = ones[:, :length] if prefix_mask is None else prefix_mask
    right = ones[:, :response] if attend is None else attend
    return torch.cat([left, right], 1)[:, None, None, :]
