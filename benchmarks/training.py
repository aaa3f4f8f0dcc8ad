"""A training step: the released recipe, ours, views on one prefix, ProSeCo's second pass, in turn in one process.

    python -m benchmarks.training                                60M parameters, batch 4, prefix 1000, on the CPU
    python -m benchmarks.training --shape 8b --device cuda --rows 2 --prefix 3400       random weights, bfloat16

Forward and backward of mask prediction with everything masked, without the optimizer. `released` computes logits and
their float32 copy at every position of prefix and response, and the loss row by row; its loss must be ours. Four
views: each as a batch of its own, of which every one encodes the prefix, against four on one prefix. Times are medians,
ratios run by run.
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

from benchmarks.sampler import SHAPES, VOCABULARY
from src.models.llada_v import LLaDAV
from src.objectives.base import Objective, Setup
from src.objectives.mask import MaskPrediction
from src.objectives.optim import Optim
from src.objectives.proseco import ProSeCo
from src.types import Batch, Prefix, SpecialIds

LEVEL = 0.999999  # everything is masked


def main() -> None:
    """Print seconds of each side, and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="60m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    for name, number in {"rows": 4, "prefix": 1000, "length": 128, "runs": 5, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size, dtype = VOCABULARY[options.shape], torch.bfloat16 if options.device == "cuda" else torch.float32
    special = SpecialIds(mask=0, eos=1, eot=2, banned=(0, 1), vocab_size=size)
    batch = random_batch(options.rows, options.prefix, options.length, size).to(options.device)
    models = {}
    for attention in ("full", "prefix"):
        torch.manual_seed(0)
        with torch.device(options.device):
            model = LLaDAV(decoder={"vocab_size": size, "attention": attention, **SHAPES[options.shape]}, vision=None)
        models[attention] = model.to(dtype)

    def objective(cls: type[Objective], attention: str, views: int = 1) -> Objective:
        setup = Setup(backbone=lambda: models[attention], special=special, optim=Optim(lr=1.0, views=views))
        return cls(setup, t_min=LEVEL)  # type: ignore[call-arg]

    full, one, views, twice = (
        objective(MaskPrediction, "full"),
        objective(MaskPrediction, "prefix"),
        objective(MaskPrediction, "prefix", views=4),
        objective(ProSeCo, "prefix"),
    )
    sides: dict[str, Callable[[], Tensor]] = {
        "released": lambda: released(models["full"], batch, special),
        "ours, full": lambda: ours(full, batch),
        "ours, prefix": lambda: ours(one, batch),
        "four copies": lambda: torch.stack([ours(one, batch) for _ in range(4)]).mean(),
        "four views": lambda: ours(views, batch),
        "ProSeCo": lambda: ours(twice, batch),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run in range(options.runs + 1):  # the first one warms up
        losses = {}
        for name, side in sides.items():
            for model in models.values():
                model.zero_grad(set_to_none=True)
            began = time.perf_counter()
            losses[name] = side()
            if options.device == "cuda":
                torch.cuda.synchronize()
            seconds[name] += [time.perf_counter() - began] if run else []
        torch.testing.assert_close(losses["released"], losses["ours, full"], rtol=1e-3, atol=0, check_dtype=False)
    sys.stdout.write(f"{options.shape} {options.device}, batch {options.rows}, prefix {options.prefix}, {dtype}\n")
    for name, times in seconds.items():
        sys.stdout.write(f"{name:14} {statistics.median(times):8.3f} s\n")
    for slow, fast in (
        ("released", "ours, full"),
        ("released", "ours, prefix"),
        ("four copies", "four views"),
        ("ProSeCo", "ours, full"),
        ("ProSeCo", "ours, prefix"),
    ):
        ratio = statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))
        sys.stdout.write(f"{slow} / {fast}: {ratio:.2f}\n")


def random_batch(rows: int, prefix: int, length: int, size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    response = torch.randint(5, size, (rows, length), generator=generator)
    prompt = {"prompt_ids": torch.randint(5, size, (rows, prefix), generator=generator)}
    everywhere, nothing = torch.ones_like(response, dtype=torch.bool), torch.zeros_like(response)
    keys = [str(row) for row in range(rows)]
    return Batch(prompt, response, everywhere, response, nothing, torch.zeros(rows, dtype=torch.bool), keys)


def ours(objective: Objective, batch: Batch) -> Tensor:
    views = objective.corrupt(batch)
    totals = objective.denominators([(batch, views)])
    sums = objective.forward_backward(batch, views, totals)
    return sums["mask"] / totals["mask"]


def released(model: LLaDAV, batch: Batch, special: SpecialIds) -> Tensor:
    """LLaDA-V's recipe: logits of the whole sequence, in float32, then the masked ones of each row."""
    tokens = torch.full_like(batch.response, special.mask)
    ids = torch.cat([batch.prefix["prompt_ids"], tokens], 1)
    whole = model.model.embed_tokens(ids)
    logits = model.lm_head(model.model(whole, Prefix(whole[:, :0]), None)).float()
    losses = []
    for row, target in zip(logits, batch.response, strict=True):
        labels = torch.cat([target.new_full((len(row) - len(target),), -100), target])
        losses.append(F.cross_entropy(row, labels, reduction="sum") / len(target))
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.detach()


if __name__ == "__main__":
    main()
