"""A sampler's step and caption: the released algorithm, ours, and an ideal loop by hand, in turn in one process.

    python -m benchmarks.sampler                              60M parameters, prefix 1000, on the CPU, half a minute
    python -m benchmarks.sampler --prefix 3400 --table        a longer prefix; rows of results/speed/README.md
    python -m benchmarks.sampler --shape 8b --device cuda --prefix 3400 --steps 32     random weights; not measured yet

`released` is ReDiff's published loop: one full pass over prefix and response a step, logits and a float64 softmax at
every position. `by hand` is what remains if the keys and values of the prefix are known, and nothing is general. All
three rewrite visible tokens in every step and must write the same text (`full`: released and ours; `prefix`: ours and
by hand). tests/test_benchmarks.py holds `released` against the golden traces. benchmarks/turns.py says how time
is measured.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.turns import in_turn, parse, random_model, write
from src.models.llada import rotate
from src.models.llada_v import LLaDAV
from src.samplers.rediff import OverwriteAll
from src.samplers.sampler import Sampler
from src.types import Prefix, SpecialIds


def main() -> None:
    """Print seconds of each side, and ratios."""
    options = parse(__doc__, {"prefix": 1000, "length": 128, "steps": 2, "runs": 5})
    special = SpecialIds(mask=0, eos=1, eot=2, banned=(0, 1, 2), vocab_size=options.size)
    model = random_model(options, "prefix").eval()
    with torch.no_grad():
        prompt = torch.randint(10, options.size, (1, options.prefix)).to(options.device)
        prefix = model.encode_prefix({"prompt_ids": prompt})
    full = Prefix(prefix.embeds)  # without keys and values, prefix and response see each other
    sizes = {"length": options.length, "steps": options.steps}
    sides = {
        "released": lambda: released(model, prefix.embeds, special, **sizes)[-1],
        "ours, full": lambda: ours(model, full, special, **sizes),
        "ours, prefix": lambda: ours(model, prefix, special, **sizes),
        "by hand, prefix": lambda: by_hand(model, prefix, special, **sizes),
    }

    def check(texts: dict[str, Tensor]) -> None:
        for a, b in (("released", "ours, full"), ("ours, prefix", "by hand, prefix")):
            if not torch.equal(texts[a], texts[b]):
                sys.exit(f"{a} and {b} wrote different tokens")

    seconds = in_turn(sides, options, check)
    write(options, "step", seconds, dict.fromkeys(list(sides)[1:], "released"), per=options.steps)


def ours(model: LLaDAV, prefix: Prefix, special: SpecialIds, *, length: int, steps: int) -> Tensor:
    sampler = Sampler(length=length, steps=steps, reviser=OverwriteAll())
    return sampler(model, prefix, special=special, keys=["a"], seed=0).ids[0]


@torch.no_grad()
def released(
    model: LLaDAV, embeds: Tensor, special: SpecialIds, *, length: int, steps: int, blocks: int = 1, revise: bool = True
) -> list[Tensor]:
    """The response (L,) after each step, for prompt embeddings (1, P, D), attention `full` and steps that divide."""
    x = torch.full((1, length), special.mask, device=embeds.device)
    states = []
    for block in range(blocks):
        start, end = (length // blocks * number for number in (block, block + 1))
        block_steps = steps // blocks
        total = (end - start) // block_steps, (end - start) % block_steps
        for step in range(block_steps):
            # 1. logits and probabilities of the whole sequence
            whole = torch.cat([embeds, model.model.embed_tokens(x)], 1)  # (1, P + L, D)
            logits = model.lm_head(model.model(whole, Prefix(whole[:, :0]), None)).float()
            logits[..., list(special.banned)] = -torch.inf
            logits[..., special.mask] = -torch.inf
            best = logits.argmax(-1)[:, -length:]
            chance = logits.double().softmax(-1).gather(-1, logits.argmax(-1, keepdim=True))[:, -length:, 0]
            # 2. unmask the surest masks of the block, rewrite its visible tokens
            masked = x == special.mask
            inside = torch.arange(length, device=x.device).sub(start) // (end - start) == 0
            sure = chance.masked_fill(~(masked & inside), -torch.inf)
            chosen = torch.zeros_like(masked).scatter_(1, sure.topk(total[0] + (step < total[1])).indices, True)
            x = torch.where(chosen | (~masked & inside if revise else chosen), best, x)
            states.append(x[0])
    return states


@torch.no_grad()
def by_hand(model: LLaDAV, prefix: Prefix, special: SpecialIds, *, length: int, steps: int) -> Tensor:
    """One block, rewriting, without any option: keys and values of the prefix in a buffer, the response behind them."""
    assert prefix.cache is not None
    past, layers = prefix.embeds.shape[1], model.model.layers
    caches = [tuple(F.pad(part[:, :, :past], (0, 0, 0, length)) for part in pair) for pair in prefix.cache]
    x = torch.full((1, length), special.mask, device=prefix.embeds.device)
    for _ in range(steps):
        hidden = model.model.embed_tokens(x)
        rope = model.model._rope(hidden, past)
        for block, (keys, values) in zip(layers, caches, strict=True):
            normed, attention = block.input_layernorm(hidden), block.self_attn
            query, key, value = (
                linear(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            keys[:, :, past:], values[:, :, past:] = rotate(key, rope), value
            out = F.scaled_dot_product_attention(rotate(query, rope), keys, values)
            hidden = hidden + attention.o_proj(out.transpose(1, 2).flatten(2))
            hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        logits = model.lm_head(model.model.norm(hidden))[0].float()
        logits[:, list(special.banned)] = -torch.inf
        best, masked = logits.argmax(-1), x[0] == special.mask
        sure = logits.double().log_softmax(-1).gather(-1, best[:, None])[:, 0].masked_fill(~masked, -torch.inf)
        chosen = torch.zeros_like(masked).scatter_(0, sure.topk(length // steps).indices, True)
        x = torch.where(chosen | ~masked, best, x[0])[None]
    return x[0]


if __name__ == "__main__":
    main()
