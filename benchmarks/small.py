"""What small models gain from tensors written in place and from memory that glibc keeps, on the embedded base model.

    python -m benchmarks.small                two threads, five pairs
    python -m benchmarks.small --threads 1

1. Drafting a batch, without gradients: SwiGLU and rotary embedding in place, against new tensors, in turn.
   Both must write the same tokens.
2. Drafting and training with the allocator's thresholds of `src/__init__.py`, against those of glibc; in child
   processes, in turn, because a process cannot go back.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from src.diffusion.corruption import Absorb, start
from src.diffusion.noise import Noise
from src.models import llada
from src.models.hf.folder import from_pretrained
from src.samplers.rediff import OverwriteAll
from src.samplers.sampler import Sampler
from src.text.tokenizer import Codec
from src.types import Batch

BASE, ROWS, LENGTH = "assets/base", 64, 64


def main() -> None:
    """Print the ratios of both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"threads": 2, "pairs": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--child", action="store_true", help="print the seconds of one process (used by part 2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        json.dump({"drafting": timed(draft)[0], "training": timed(train)[0]}, sys.stdout)
        return
    # 1. in place
    pairs = []
    for number in range(options.pairs + 1):
        with new_tensors():
            slow, expected = timed(draft)
        fast, tokens = timed(draft)
        if not torch.equal(expected, tokens):
            sys.exit("the two sides wrote different tokens")
        pairs += [(slow, fast)] if number else []  # the first pair warms up
    report(f"drafting {ROWS} captions, new tensors against in place", pairs)
    # 2. the allocator
    times = []
    for _ in range(options.pairs):
        pair = []
        for extra in ({"MALLOC_ARENA_TEST": "8"}, {}):  # any setting of glibc's keeps ours away
            command = [sys.executable, "-m", "benchmarks.small", "--child", f"--threads={options.threads}"]
            done = subprocess.run(command, env={**os.environ, **extra}, check=True, capture_output=True, text=True)
            pair.append(json.loads(done.stdout))
        times.append(pair)
    for name in ("drafting", "training"):
        report(f"{name}, thresholds of glibc against ours", [(slow[name], fast[name]) for slow, fast in times])


def report(title: str, pairs: list[tuple[float, float]]) -> None:
    ratios = [slow / fast for slow, fast in pairs]
    slow, fast = (statistics.median(column) for column in zip(*pairs, strict=True))
    sys.stdout.write(
        f"{title}: {slow:.2f} s against {fast:.2f} s, "
        f"ratio {statistics.median(ratios):.2f} (min {min(ratios):.2f}, max {max(ratios):.2f})\n"
    )


def timed(function) -> tuple[float, torch.Tensor]:
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def prefix_inputs(codec: Codec) -> dict[str, torch.Tensor]:
    """Random pictures, all with the same question."""
    pixels = torch.randint(0, 256, (ROWS, 1, 3, 48, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    ids = codec.prompt_ids("Describe the picture.")
    shapes = {"num_tiles": torch.ones(ROWS, 1, dtype=torch.int64), "image_sizes": torch.full((ROWS, 1, 2), 48)}
    return {"prompt_ids": torch.tensor([ids] * ROWS), "pixel_values": pixels, **shapes}


def draft() -> torch.Tensor:
    """(ROWS, LENGTH) ids of the refining sampler at four tokens a step."""
    model, codec = from_pretrained(BASE).eval(), Codec.load(BASE)
    sampler = Sampler(length=LENGTH, tokens_per_step=4, eos_last=True, reviser=OverwriteAll())
    with torch.no_grad():
        prefix = model.encode_prefix(prefix_inputs(codec))
    return sampler(model, prefix, special=codec.special, keys=[str(n) for n in range(ROWS)], seed=0).ids


def train() -> torch.Tensor:
    """Five steps of mask prediction on random texts."""
    model, codec = from_pretrained(BASE).train(), Codec.load(BASE)
    optimizer, inputs = torch.optim.AdamW(model.parameters(), lr=1e-5), prefix_inputs(codec)
    response = torch.randint(20, 200, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    everywhere, keys = torch.ones_like(response, dtype=torch.bool), [str(n) for n in range(ROWS)]
    nothing = torch.zeros_like(response)
    batch = Batch(inputs, response, everywhere, response, nothing, torch.zeros(ROWS, dtype=torch.bool), keys)
    loss = torch.zeros(())
    for step in range(5):
        noise = Noise(keys, seed=step)
        state = Absorb(special=codec.special)(batch, start(batch, noise.level(0.1)), noise)
        where = state.tokens == codec.mask_id
        logits = model(model.encode_prefix(inputs), state.tokens, positions=where)
        loss = F.cross_entropy(logits, response[where])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.detach()


@contextmanager
def new_tensors() -> Iterator[None]:
    """The model's forward pass without writing in place."""
    rotate, forward = llada.rotate, llada.MLP.forward

    def rotate_with_cat(x, rope):
        wide = x.float()
        first, second = wide.chunk(2, -1)
        return (wide * rope[0] + torch.cat([-second, first], -1) * rope[1]).to(x.dtype)

    llada.rotate = rotate_with_cat
    llada.MLP.forward = lambda self, x: self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
    try:
        yield
    finally:
        llada.rotate, llada.MLP.forward = rotate, forward


if __name__ == "__main__":
    main()
