"""Memory per process and time per step of two processes that train one model: copies (DDP), shards (FSDP2), or alone.

    python -m benchmarks.strategies                on the CPU (gloo), one thread each
    python -m benchmarks.strategies --steps 8

The model (hidden size 512, 8 layers, vocabulary 32,000: 59 million parameters) is loaded from a folder, trained for
some steps on one row of 128 tokens in each process, and saved as a checkpoint. Memory is the peak growth of resident
memory over that of the process before the model is built, for the steps alone and with the checkpoint; of two
processes, the larger. The baseline is `copies` (DDP). Every variant runs in fresh processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import lightning as L
import torch
from torch.utils.data import DataLoader

from benchmarks.memory import MIB, SPECIAL, TEXT, make_batch, resident
from src.distributed.parallel import Sharding
from src.models.hf.folder import Deferred, from_pretrained
from src.models.hf.weights import write_weights
from src.models.llada_v import LLaDAV
from src.objectives.base import Setup
from src.objectives.optim import Optim
from src.objectives.revision import RevisionObjective
from src.training.launch import rendezvous
from src.training.strategy import DDP, FSDP2

VARIANTS = ("alone", "copies", "shares", "shares, not resharded", "shares, bfloat16", "shares, checkpointing")
SHARDING = {"shares, not resharded": Sharding(reshard=False), "shares, bfloat16": Sharding(compute="bfloat16")}


class Clock(L.Callback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: object) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def main() -> None:
    """Print one line per variant, and its ratios to `copies`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)  # the variant of a child process
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        train(options.one, options.steps, options.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        results = {variant: run(variant, options.steps, Path(folder)) for variant in VARIANTS}
    base = results["copies"]
    sys.stdout.write(f"{'':24}{'steps MiB':>10}{'+ saving':>10}{'s/step':>8}{'memory':>9}{'time':>7}\n")
    for variant, (steps, saving, seconds) in results.items():
        ratios = f"{steps / base[0]:9.2f}{seconds / base[2]:7.2f}"
        sys.stdout.write(f"{variant:24}{steps / MIB:10.0f}{saving / MIB:10.0f}{seconds:8.2f}{ratios}\n")


def write_model(folder: Path) -> None:
    """Write random weights as a model folder, without a tokenizer."""
    from src.models.hf.folder import describe, write_config
    from src.models.hf.formats import FORMATS

    torch.manual_seed(0)
    model = LLaDAV(**TEXT)
    write_weights(folder, model.state_dict())
    write_config(folder, FORMATS["own"].config(describe(model)))


def run(variant: str, steps: int, folder: Path) -> tuple[float, float, float]:
    """Peak bytes of the steps, peak bytes with the checkpoint, seconds per step: the maximum over processes."""
    threshold = str(64 << 10)  # bytes; larger blocks return to the system as soon as they are freed
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": threshold,
        "MALLOC_TRIM_THRESHOLD_": threshold,
    }
    for old in folder.glob("result-*"):
        old.unlink()
    command = [sys.executable, "-m", "benchmarks.strategies", "--one", variant, "--steps", str(steps)]
    done = subprocess.run([*command, "--folder", str(folder)], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("result-*"))]
    return tuple(max(column) for column in zip(*ranks, strict=True))  # type: ignore[return-value]


def train(variant: str, steps: int, folder: Path) -> None:
    """Train in this process and write its measurements to the folder."""
    sharding = SHARDING.get(variant)
    optim = Optim(lr=1e-4, checkpointing="full" if "checkpointing" in variant else "none", sharding=sharding)
    alone, shares = variant == "alone", variant.startswith("shares")
    clock, strategy = Clock(), "auto" if alone else FSDP2() if shares else DDP()
    trainer = L.Trainer(
        accelerator="cpu", devices=1 if alone else 2, strategy=strategy, max_steps=steps, callbacks=[clock],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    rendezvous(trainer, None, run=str(folder))
    before = resident("VmRSS")
    backbone = Deferred(str(folder), {"codec": None}) if shares else lambda: from_pretrained(folder)
    objective = RevisionObjective(Setup(backbone=backbone, special=SPECIAL, optim=optim))
    batch = make_batch({"model": TEXT})
    trainer.fit(objective, DataLoader([batch] * steps, batch_size=None))  # type: ignore[arg-type]
    peak = resident("VmHWM") - before
    trainer.save_checkpoint(folder / "state.ckpt")
    result = [peak, resident("VmHWM") - before, median(clock.seconds[1:])]
    (folder / f"result-{trainer.global_rank}").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
