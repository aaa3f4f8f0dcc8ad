"""Cost of ProSeCo's second forward pass: pass by pass as we do it, and as one graph, beside mask prediction.

    python -m benchmarks.passes                    on the CPU
    python -m benchmarks.passes --device cuda --steps 20

Ours runs the backward pass of each forward pass before the next one; the baseline sums both losses first. Both give the
same gradients (compared here). Memory is the peak that a step allocates on top of weights and gradients: counted by
storage on the CPU, by the allocator on a GPU. Times are medians, the three measured in turn.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.memory import MID, SPECIAL
from src.models.llada_v import LLaDAV
from src.objectives.base import Objective, Setup
from src.objectives.mask import MaskPrediction
from src.objectives.optim import Optim
from src.objectives.proseco import ProSeCo
from src.training.memory_plan import Live
from src.types import Batch, SpecialIds
from testing.one_graph import one_graph

MIB = 1 << 20
VOCABULARY = MID["vocab_size"]


def main() -> None:
    """Print one line per variant, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    special = SpecialIds(mask=SPECIAL.mask, eos=1, eot=2, banned=(0, 1), vocab_size=VOCABULARY)
    classes = {"mask prediction": MaskPrediction, "ours": ProSeCo, "one graph": ProSeCo}
    batch = _batch(options.rows, options.length).to(options.device)
    torch.manual_seed(0)
    model = LLaDAV(decoder={**MID, "num_attention_heads": 8}, vision=None).to(options.device)
    objectives = {
        name: cls(Setup(backbone=lambda: model, special=special, optim=Optim(lr=1.0)), t_min=0.999999)
        for name, cls in classes.items()
    }
    steps: dict[str, Callable[[Objective, Batch], None]] = dict.fromkeys(objectives, _pass_by_pass)
    steps["one graph"] = one_graph
    gradients, seconds, peaks = {}, {name: [] for name in objectives}, {}
    for name, objective in objectives.items():
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        step = lambda name=name, objective=objective: steps[name](objective, batch)  # noqa: E731
        peaks[name] = _peak(options.device, step)
        gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    for _ in range(options.steps):
        for name, objective in objectives.items():
            began = time.perf_counter()
            steps[name](objective, batch)
            if options.device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    for name in objectives:
        sys.stdout.write(f"{name:16} {peaks[name] / MIB:9.1f} MiB {median(seconds[name]):8.3f} s\n")
    difference = (gradients["ours"] - gradients["one graph"]).norm() / gradients["one graph"].norm()
    ratio = {name: peaks[name] / peaks["mask prediction"] for name in ("ours", "one graph")}
    slower = {name: median(seconds[name]) / median(seconds["mask prediction"]) for name in ratio}
    sys.stdout.write(
        f"memory of mask prediction: ours x {ratio['ours']:.2f}, one graph x {ratio['one graph']:.2f}; "
        f"time: x {slower['ours']:.2f}, x {slower['one graph']:.2f}; gradients differ by {difference:.1e}\n"
    )


def _batch(rows: int, length: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    response = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    prompt = torch.randint(5, VOCABULARY, (rows, 8), generator=generator)
    editable, span = torch.ones_like(response, dtype=torch.bool), torch.zeros_like(response)
    keys = [str(row) for row in range(rows)]
    return Batch({"prompt_ids": prompt}, response, editable, response, span, torch.zeros(rows, dtype=torch.bool), keys)


def _pass_by_pass(objective: Objective, batch: Batch) -> None:
    views = objective.corrupt(batch)
    objective.forward_backward(batch, views, objective.denominators([(batch, views)]))


def _peak(device: str, step: Callable[[], None]) -> int:
    """Peak bytes that a step allocates; gradients exist already."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with Live() as live:
        live.enter("step", "new")
        step()
    return live.peaks["step"]["new"]


if __name__ == "__main__":
    main()
