"""Check the memory plan (`src.training.memory_plan`) against the measured memory of real training steps.

    python -m benchmarks.memory                    all cases on the CPU, one thread, each in a fresh process
    python -m benchmarks.memory mid "mid, mixed"   some of them

A case is a model with random weights and the Stage I objective. Its process trains for two steps with Lightning, after
a step of a small model that loads libraries and kernels. Measured is the peak growth of resident memory over what the
process holds with the model built; planned is the plan's peak without the parameters, and on the CPU
without the temporaries of the optimizer. The allocator is set to return freed memory at once.

`--device cuda` takes the count of the CUDA allocator instead, and the optimizer as it runs on a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from src.models.llada_v import LLaDAV
from src.models.tiling import anyres
from src.objectives.base import Setup
from src.objectives.optim import Optim
from src.objectives.revision import RevisionObjective
from src.training.memory_plan import PARAMETERS, TEMPORARY, TYPES, measure
from src.types import Batch, SpecialIds

MIB = 1 << 20
SPECIAL = SpecialIds(mask=0, eos=1, eot=2, banned=(0, 1), vocab_size=283)
IMAGE = -200
SMALL = {"vocab_size": 283, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
SMALL_TOWER = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
MID = {"vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
MID_TOWER = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 6}
TEXT = {"decoder": {**MID, "num_attention_heads": 8}, "vision": None}
MULTIMODAL = {
    "decoder": {**MID, "num_attention_heads": 8},
    "vision": {**MID_TOWER, "image_size": 224, "patch_size": 14},
    "tiling": anyres(224).to_dict(),
}
CASES: dict[str, dict] = {
    "tiny": {
        "model": {
            "decoder": {**SMALL, "num_attention_heads": 4, "attention": "prefix"},
            "vision": {**SMALL_TOWER, "image_size": 48, "patch_size": 16},
        },
        "rows": 64,
        "prompt": 20,
        "length": 64,
    },
    "mid": {"model": TEXT},
    "mid, mixed": {"model": TEXT, "precision": "bf16-mixed"},
    "mid, half": {"model": TEXT, "precision": "bf16-true"},
    "mid, 2 views": {
        "model": {**TEXT, "decoder": {**TEXT["decoder"], "attention": "prefix"}},
        "training": {"views": 2},
    },
    "mid, checkpointing": {"model": TEXT, "training": {"checkpointing": "full"}},
    "mid, selective": {"model": TEXT, "training": {"checkpointing": "selective"}},
    "mid, 2 micro-batches": {"model": TEXT, "rows": 2, "training": {"micro_batch": 1}},
    "mid, image": {"model": MULTIMODAL, "prompt": 40},
    "mid, image, tower frozen": {"model": MULTIMODAL, "prompt": 40, "training": {"vision_lr": 0.0}},
}


def main() -> None:
    """Print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--one", choices=("measured", "planned"), help=argparse.SUPPRESS)  # the task of a child process
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no case {sorted(unknown)[0]!r}; there are {', '.join(CASES)}")
    if options.one:
        function = measured if options.one == "measured" else planned
        sys.stdout.write(json.dumps(function(CASES[options.cases[0]], options.device)))
        return
    sys.stdout.write(f"{'MiB without parameters':28}{'measured':>10}{'planned':>10}{'ratio':>8}\n")
    for case in options.cases:
        actual, plan = (in_process(case, task, options.device) for task in ("measured", "planned"))
        sys.stdout.write(f"{case:28}{actual / MIB:10.0f}{plan / MIB:10.0f}{plan / actual:8.2f}\n")
        sys.stdout.flush()


def in_process(case: str, task: str, device: str) -> int:
    """The bytes that a fresh process measures or plans."""
    threshold = str(64 << 10)  # bytes; larger blocks return to the system as soon as they are freed
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": threshold,
        "MALLOC_TRIM_THRESHOLD_": threshold,
    }
    command = [sys.executable, "-m", "benchmarks.memory", case, "--one", task, "--device", device]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def planned(case: dict, device: str) -> int:
    with torch.device("meta"):
        model = LLaDAV(**case["model"])
    precision = case.get("precision", "32-true")
    objective, batch = build(case, model), make_batch(case)
    plan = measure(objective, batch, gpus=1, precision=precision)
    if device == "cpu":  # AdamW updates parameter by parameter there, with temporaries of one of them
        plan.phases["optimizer"][TEMPORARY] = 0
    return plan.peak - plan.phases["saved"][PARAMETERS]


def measured(case: dict, device: str) -> int:
    """Peak bytes of two steps on top of the model. On the CPU, Linux only."""
    small = {**CASES["tiny"], "rows": 1, "precision": case.get("precision", "32-true")}
    train(small, LLaDAV(**small["model"]), device)
    model = LLaDAV(**case["model"]).to(device, TYPES[case.get("precision", "32-true")][0])
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(case, model, device)
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    train(case, model, device)
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Resident bytes of this process, now (VmRSS) or at their peak (VmHWM)."""
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert match
    return int(match[1]) << 10


def train(case: dict, model: LLaDAV, device: str) -> None:
    """Two steps; the second one runs with the optimizer states allocated."""
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    precision = case.get("precision", "32-true")
    trainer = L.Trainer(
        accelerator=device, devices=1, max_steps=2, precision=precision, enable_model_summary=False, **quiet
    )
    trainer.fit(build(case, model), DataLoader([make_batch(case)] * 2, batch_size=None))  # type: ignore[arg-type]


def build(case: dict, model: LLaDAV) -> RevisionObjective:
    optim = Optim(lr=1e-4, **case.get("training", {}))
    return RevisionObjective(Setup(backbone=lambda: model, special=SPECIAL, optim=optim), hallucination="none")


def make_batch(case: dict) -> Batch:
    """Random ids, and black images of 640 x 480 if the model has a vision tower."""
    rows, length = case.get("rows", 1), case.get("length", 128)
    draw = partial(torch.randint, 3, SPECIAL.vocab_size)
    prefix = {"prompt_ids": draw((rows, case.get("prompt", 1000)))}
    if tower := case["model"]["vision"]:
        num = anyres(tower["image_size"]).num_tiles((640, 480)) if "tiling" in case["model"] else 1
        prefix["prompt_ids"][:, 3] = IMAGE
        prefix["pixel_values"] = torch.zeros(rows, num, 3, *[tower["image_size"]] * 2, dtype=torch.uint8)
        prefix |= {"num_tiles": torch.full((rows, 1), num), "image_sizes": torch.tensor([[[640, 480]]] * rows)}
    response = draw((rows, length))
    return Batch(
        prefix=prefix,
        response=response,
        editable=torch.ones_like(response, dtype=torch.bool),
        flawed=response,
        span=torch.zeros_like(response),
        drafted=torch.zeros(rows, dtype=torch.bool),
        keys=[str(row) for row in range(rows)],
    )


if __name__ == "__main__":
    main()
