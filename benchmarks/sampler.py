"""A sampler's step and caption: the released algorithm, ours, and an ideal loop by hand, in turn in one process.

    python -m benchmarks.sampler                                    60M parameters, prefix 1000, on the CPU
    python -m benchmarks.sampler --prefix 3400 --steps 2            a longer prefix; a step is a caption's share
    python -m benchmarks.sampler --shape 8b --device cuda --prefix 3400 --steps 32     random weights, bfloat16

`released` is ReDiff's published loop: one full pass over prefix and response a step, logits and a float64 softmax at
every position. `by_hand` is what remains if the keys and values of the prefix are known, and nothing is general. All
three rewrite visible tokens in every step and must write the same text (`full`: released and ours; `prefix`: ours and
by hand). tests/test_benchmarks.py holds `released` against the golden traces. Times are medians, ratios run by run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from src.models.llada import rotate
from src.models.llada_v import LLaDAV
from src.samplers.rediff import OverwriteAll
from src.samplers.sampler import Sampler
from src.types import Prefix, SpecialIds

SHAPES = {
    "60m": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "num_attention_heads": 32},
}
VOCABULARY = {"60m": 32_000, "8b": 126_464}


def main() -> None:
    """Print seconds of each side, and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="60m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    for name, number in {"prefix": 1000, "length": 128, "steps": 4, "runs": 5, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    size = VOCABULARY[options.shape]
    special = SpecialIds(mask=0, eos=1, eot=2, banned=(0, 1, 2), vocab_size=size)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    with torch.device(options.device):
        model = LLaDAV(decoder={"vocab_size": size, "attention": "prefix", **SHAPES[options.shape]}, vision=None)
        prompt = {"prompt_ids": torch.randint(10, size, (1, options.prefix))}
    model = model.to(dtype).eval()
    with torch.no_grad():
        prefix = model.encode_prefix(prompt)
    full = Prefix(prefix.embeds)  # without keys and values, prefix and response see each other
    sides: dict[str, Callable[[], Tensor]] = {
        "released": lambda: released(model, prefix.embeds, special, length=options.length, steps=options.steps)[-1],
        "ours, full": lambda: ours(model, full, special, options),
        "ours, prefix": lambda: ours(model, prefix, special, options),
        "by hand, prefix": lambda: by_hand(model, prefix, special, length=options.length, steps=options.steps),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run in range(options.runs + 1):  # the first one warms up
        texts = {}
        for name, side in sides.items():
            began = time.perf_counter()
            texts[name] = side()
            if options.device == "cuda":
                torch.cuda.synchronize()
            seconds[name] += [time.perf_counter() - began] if run else []
        for a, b in (("released", "ours, full"), ("ours, prefix", "by hand, prefix")):
            if not torch.equal(texts[a], texts[b]):
                sys.exit(f"{a} and {b} wrote different tokens")
    sys.stdout.write(f"{options.shape} {options.device}, prefix {options.prefix}, {options.steps} steps, {dtype}\n")
    for name, times in seconds.items():
        ratio = statistics.median(slow / fast for slow, fast in zip(seconds["released"], times, strict=True))
        sys.stdout.write(f"{name:16} {statistics.median(times) / options.steps:8.4f} s a step   {ratio:6.2f} x\n")
    pairs = zip(seconds["ours, prefix"], seconds["by hand, prefix"], strict=True)
    sys.stdout.write(f"ours over by hand: {statistics.median(a / b for a, b in pairs):.3f}\n")


def ours(model: LLaDAV, prefix: Prefix, special: SpecialIds, options: argparse.Namespace) -> Tensor:
    sampler = Sampler(length=options.length, steps=options.steps, reviser=OverwriteAll())
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
