"""A training step: the released recipe, ours, views on one prefix, ProSeCo's second pass, in turn in one process.

    python -m benchmarks.training                             60M parameters, one row, prefix 1000, about 8 minutes
    python -m benchmarks.training --rows 4 --table            more rows; rows of results/speed/README.md
    python -m benchmarks.training --shape 8b --device cuda --rows 2 --prefix 3400      random weights; not measured yet

Forward and backward of mask prediction with everything masked, without the optimizer; gradients accumulate. `released`
computes logits and their float32 copy at every position of prefix and response, and the loss row by row; its loss must
be ours. Four copies are a batch with each row four times, which encodes the prefix of each; four views share it.
ProSeCo makes a second pass. `recomputed`: checkpointing `full`, which keeps only the input of each block.
benchmarks/turns.py says how time is measured.

Memory of the loss, by shapes alone: what a step of two layers allocates at its peak beyond one without head and loss,
with the vocabulary of LLaDA in bfloat16, two rows and prefix 3400.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.turns import SHAPES, VOCABULARY, in_turn, parse, random_model, write
from src.models.llada_v import LLaDAV
from src.objectives.base import Objective, Setup
from src.objectives.mask import MaskPrediction
from src.objectives.optim import Optim
from src.objectives.proseco import ProSeCo
from src.training.memory_plan import Live, Shapes
from src.types import Batch, Prefix, SpecialIds

LEVEL = 0.999999  # everything is masked
COMPARED = {
    "ours, full": "released",
    "ours, prefix": "released",
    "ours, full, recomputed": "released, recomputed",
    "ours, prefix, recomputed": "released, recomputed",
    "four views": "four copies",
    "ProSeCo, prefix": "ours, full",
}


def main() -> None:
    """Print seconds of each side, and ratios; then the memory of the loss."""
    options = parse(__doc__, {"rows": 1, "prefix": 1000, "length": 128, "runs": 5})
    special = SpecialIds(mask=0, eos=1, eot=2, banned=(0, 1), vocab_size=options.size)
    batch = random_batch(options.rows, options.prefix, options.length, options.size).to(options.device)
    copies = random_batch(4 * options.rows, options.prefix, options.length, options.size).to(options.device)
    full, prefix = random_model(options, "full"), random_model(options, "prefix")

    def step(
        model: LLaDAV,
        cls: type[Objective] | None = None,
        *,
        views: int = 1,
        checkpointing: str = "none",
        batch: Batch = batch,
    ) -> Tensor:
        model.checkpoint(checkpointing)
        return ours(objective(cls, model, special, views), batch) if cls else released(model, batch, special)

    sides: dict[str, Callable[[], Tensor]] = {
        "released": lambda: step(full),
        "ours, full": lambda: step(full, MaskPrediction),
        "ours, prefix": lambda: step(prefix, MaskPrediction),
        "released, recomputed": lambda: step(full, checkpointing="full"),
        "ours, full, recomputed": lambda: step(full, MaskPrediction, checkpointing="full"),
        "ours, prefix, recomputed": lambda: step(prefix, MaskPrediction, checkpointing="full"),
        "four copies": lambda: step(prefix, MaskPrediction, batch=copies),
        "four views": lambda: step(prefix, MaskPrediction, views=4),
        "ProSeCo, prefix": lambda: step(prefix, ProSeCo),
    }

    def check(losses: dict[str, Tensor]) -> None:
        torch.testing.assert_close(losses["released"], losses["ours, full"], rtol=1e-3, atol=0, check_dtype=False)

    seconds = in_turn(sides, options, check)
    write(options, "training step", seconds, COMPARED)
    memory = {name: loss_memory(name, rows=2, prefix=3400, length=options.length) for name in ("released", "ours")}
    times = memory["released"] / memory["ours"]
    sys.stdout.write(f"\nmemory of the loss: released {memory['released'] / 1e6:,.0f} MB, ours ")
    sys.stdout.write(f"{memory['ours'] / 1e6:,.0f} MB ({times:.0f} x less)\n")


def objective(cls: type[Objective], model: LLaDAV, special: SpecialIds, views: int = 1) -> Objective:
    setup = Setup(backbone=lambda: model, special=special, optim=Optim(lr=1.0, views=views))
    return cls(setup, t_min=LEVEL)  # type: ignore[call-arg]


def loss_memory(side: str, *, rows: int, prefix: int, length: int) -> int:
    """Bytes at the peak of a step, less those of the same step from hidden states, without head and loss."""
    size = VOCABULARY["8b"]
    special = SpecialIds(mask=0, eos=1, eot=2, banned=(0, 1), vocab_size=size)
    batch, peaks = random_batch(rows, prefix, length, size), {}
    for name in ("base", side):
        with Shapes():
            sizes = {**SHAPES["8b"], "num_hidden_layers": 2, "vocab_size": size, "attention": "full"}
            torch.set_default_dtype(torch.bfloat16)
            model = LLaDAV(decoder=sizes, vision=None)
            torch.set_default_dtype(torch.float32)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        training = objective(MaskPrediction, model, special)
        views = training.corrupt(batch)
        totals = training.denominators([(batch, views)])
        with Shapes(), Live() as live:
            live.enter("step", "new")
            if name == "base":
                whole = model.model.embed_tokens(torch.cat([batch.prefix["prompt_ids"], batch.response], 1))
                model.model(whole, Prefix(whole[:, :0]), None).sum().backward()
            elif side == "ours":
                training.forward_backward(batch, views, totals)
            else:
                released(model, batch, special)
        peaks[name] = sum(live.peaks["step"].values())
    return peaks[side] - peaks["base"]


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
