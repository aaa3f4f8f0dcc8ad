"""What benchmarks share: options, a random model, sides measured in turn (data.py, too), rows of a table.

    options = parse(__doc__, {"prefix": 1000, "length": 128, "runs": 5})
    seconds = in_turn({"slow": f, "fast": g}, options)      {side: [seconds of each run]}
    write(options, "step", seconds, {"slow": "slow", "fast": "slow"})         each side, and what it is compared with

Times are CPU seconds where one thread does everything, so that other programs disturb them less, else wall time.
Sides alternate within a run; a ratio is the median of the ratios of the runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from src.models.llada_v import LLaDAV

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "60m": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "num_attention_heads": 32},
}
VOCABULARY = {"tiny": 512, "60m": 32_000, "8b": 126_464}


def parse(description: str | None, numbers: Mapping[str, int]) -> argparse.Namespace:
    """--shape, --device, --table, --threads, and an option for each of `numbers`; also `size` and `dtype`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="60m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--table", action="store_true", help="print rows of a Markdown table")
    for name, number in {**numbers, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.size = VOCABULARY[options.shape]
    options.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    return options


def random_model(options: argparse.Namespace, attention: str) -> LLaDAV:
    torch.manual_seed(0)
    with torch.device(options.device):
        sizes = {"vocab_size": options.size, "attention": attention, **SHAPES[options.shape]}
        return LLaDAV(decoder=sizes, vision=None).to(options.dtype)


def in_turn(
    sides: Mapping[str, Callable[[], Any]],
    options: argparse.Namespace,
    check: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each side in each of `options.runs` runs, after one that warms up. `check` gets what they returned."""
    clock = time.process_time if options.device == "cpu" and options.threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run in range(options.runs + 1):
        results = {}
        for name, side in sides.items():
            began = clock()
            results[name] = side()
            if options.device == "cuda":
                torch.cuda.synchronize()
            seconds[name] += [clock() - began] if run else []
        if check:
            check(results)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def write(
    options: argparse.Namespace,
    unit: str,
    seconds: Mapping[str, list[float]],
    compared: Mapping[str, str],
    per: int = 1,
) -> None:
    """Print the seconds of each side, divided by `per`, and their ratio to those that it is `compared` with."""
    title = f"{options.shape} {options.device}, prefix {options.prefix}, {options.dtype}"
    line = "| {} | {} | {} |\n" if options.table else "{:26} {:>12} {}\n"
    sys.stdout.write(line.format(title, f"s a {unit}", "against"))
    if options.table:
        sys.stdout.write("|---|---|---|\n")
    for name, times in seconds.items():
        against = f"{ratio(seconds[compared[name]], times):.2f} x {compared[name]}" if name in compared else ""
        sys.stdout.write(line.format(name, f"{statistics.median(times) / per:.4g}", against))
