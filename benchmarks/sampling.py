"""Time of a sampler step: cached prefix and logits of the response only, against a full forward pass every step.

    python -m benchmarks.sampling                      a mid-size random model on the CPU, one thread
    python -m benchmarks.sampling --prefix 1000 --steps 8 --runs 3

Both sides decode the same response greedily with the same weights in `prefix` attention, in turn, in one process; the
ratio is taken run by run. The baseline encodes the prefix at every step, as code without a cache must, and computes
logits at every position. Both must write the same tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch

from src.models.llada_v import LLaDAV
from src.samplers.sampler import Sampler
from src.types import SpecialIds


def main() -> None:
    """Print seconds of both sides and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"prefix": 500, "length": 64, "steps": 8, "runs": 5, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8}
    model = LLaDAV(decoder={"vocab_size": 16_000, "attention": "prefix", **sizes}, vision=None).eval()
    prompt = torch.randint(10, 16_000, (1, options.prefix))
    special = SpecialIds(mask=0, eos=1, eot=2, banned=(0, 1, 2), vocab_size=16_000)
    pairs = []
    for number in range(options.runs + 1):
        (slow, expected), (fast, tokens) = (
            timed(baseline, model, prompt, special, options),
            timed(ours, model, prompt, special, options),
        )
        if not torch.equal(expected, tokens):
            sys.exit("the two sides wrote different tokens")
        if number:  # the first pair warms up
            pairs.append((slow, fast))
    ratios = [slow / fast for slow, fast in pairs]
    slow, fast = (statistics.median(column) for column in zip(*pairs, strict=True))
    sys.stdout.write(
        f"prefix {options.prefix}, response {options.length}, {options.steps} steps, {options.threads} thread(s)\n"
        f"full pass every step: {slow:.3f} s   cached prefix, response logits: {fast:.3f} s\n"
        f"ratio: median {statistics.median(ratios):.2f}, min {min(ratios):.2f}, max {max(ratios):.2f}\n"
    )


def timed(function, *arguments) -> tuple[float, torch.Tensor]:
    """(seconds, result)."""
    began = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - began, result


def ours(model: LLaDAV, prompt: torch.Tensor, special: SpecialIds, options: argparse.Namespace) -> torch.Tensor:
    """The project's sampler."""
    with torch.no_grad():
        prefix = model.encode_prefix({"prompt_ids": prompt})
    sampler = Sampler(length=options.length, steps=options.steps)
    return sampler(model, prefix, special=special, keys=["a"], seed=0).ids


@torch.no_grad()
def baseline(model: LLaDAV, prompt: torch.Tensor, special: SpecialIds, options: argparse.Namespace) -> torch.Tensor:
    """LLaDA's published loop: prefix and logits of all positions at every step."""
    tokens = torch.full((1, options.length), special.mask)
    per_step = options.length // options.steps
    for _ in range(options.steps):
        prefix = model.encode_prefix({"prompt_ids": prompt})
        hidden = model.model(model.model.embed_tokens(tokens), prefix, None)
        all_hidden = torch.cat([prefix.embeds, hidden], 1)  # stands for the hidden states of all positions
        logits = model.lm_head(all_hidden)[:, prompt.shape[1] :].clone()
        logits[..., list(special.banned)] = -torch.inf
        probability, choice = logits.double().softmax(-1).max(-1)
        probability[tokens != special.mask] = -torch.inf
        place = probability.topk(per_step, 1).indices
        tokens.scatter_(1, place, choice.gather(1, place))
    return tokens


if __name__ == "__main__":
    main()
