"""Two processes give the numbers of one: losses, gradient norm and weights, for every objective, sharded or copied."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from src.objectives.base import Objective
from src.objectives.complementary import ComplementaryMasks
from src.objectives.edits import EditNoise
from src.objectives.hybrid import HybridNoise
from src.objectives.mask import MaskPrediction
from src.objectives.proseco import ProSeCo
from src.objectives.refine import Refine
from src.objectives.revision import Revision
from src.objectives.training import Training
from src.objectives.uniform import UniformNoise
from src.parallel import Sharding
from tests.test_objectives import batch_with_prompt, make, tiny_backbone

ROOT = Path(__file__).parents[1]
SETTINGS = {"lr": 1e-2, "warmup_steps": 2, "decay": 0.5, "clip_norm": 0.05}
CASES = {
    "mask": (MaskPrediction, {"weight": "one", "reduce": "tokens"}, {}),
    "answers": (MaskPrediction, {}, {"micro_batch": 2}),
    "revision": (Revision, {"rate": 0.3}, {"micro_batch": 2}),
    "refine": (Refine, {"rate": 0.3, "keep": 0.5}, {}),
    "proseco": (ProSeCo, {"errors": True}, {"micro_batch": 2, "views": 2, "antithetic": True}),
    "edits": (EditNoise, {"rate": 0.5, "begin": 0.5}, {}),
    "complementary": (ComplementaryMasks, {}, {}),
    "hybrid": (HybridNoise, {"share": 0.3}, {}),
    "uniform": (UniformNoise, {"reduce": "batch_tokens"}, {"micro_batch": 1}),
    "checkpointed": (ProSeCo, {}, {"checkpointing": "full"}),
    "selective": (Revision, {"rate": 0.3}, {"checkpointing": "selective"}),
}
OPTIONS = {
    "full": {"attention": "full"},
    "prefix": {"attention": "prefix"},
    "shift": {"attention": "prefix", "shift": True},
}
STEPS = 3


class Watch(L.Callback):
    """What each step logged."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, *_) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def run(
    name: str, attention: str, *, rank: int = 0, world: int = 1, sharding: Sharding | None = None, **trainer
) -> dict:
    """Three steps on the rows of one rank: whole weights and all that was logged."""
    cls, options, training = CASES[name]
    objective: Objective = make(
        cls,
        **options,
        backbone=lambda: tiny_backbone(**OPTIONS[attention]),
        training=Training(**{**SETTINGS, **training}, sharding=sharding),
    )
    batch = batch_with_prompt(8, padding=3)
    batch.drafted[::3] = True
    part = batch.rows(slice(rank * 8 // world, (rank + 1) * 8 // world))
    watch = Watch()
    settings = {**QUIET, **trainer, "max_steps": STEPS, "accelerator": "cpu", "use_distributed_sampler": False}
    fit = L.Trainer(callbacks=[watch], **settings)
    fit.fit(objective, DataLoader([part] * STEPS, batch_size=None))
    whole = lambda p: p.full_tensor() if hasattr(p, "full_tensor") else p  # noqa: E731
    weights = torch.cat([whole(p.detach()).flatten() for p in objective.parameters()])
    return {"weights": weights, "logged": watch.seen}


SCRIPT = """
import os, sys
sys.path.insert(0, {root!r})
import torch
from lightning.pytorch.strategies import DDPStrategy
from src.parallel import Sharding
from src.strategy import FSDP2
from tests.test_ranks import run

rank = int(os.environ.get("LOCAL_RANK", 0))
strategy = {strategy}
found = {{}}
for case in {cases!r}:
    found[case] = run(*case, rank=rank, world=2, devices=2, strategy=strategy(), sharding={sharding})
torch.save(found, {out!r} + str(rank))
"""


def on_two_ranks(folder: Path, cases: list[tuple[str, str]], strategy: str, sharding: str = "None") -> list[dict]:
    """Real processes: Lightning starts the second one by running the script again."""
    script = folder / "job.py"
    out = str(folder / "out-")
    script.write_text(SCRIPT.format(root=str(ROOT), strategy=strategy, cases=cases, sharding=sharding, out=out))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(f"{out}{rank}") for rank in range(2)]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("strategy", "sharding", "cases"),
    [
        ("FSDP2", "None", [(name, "full") for name in CASES]),
        ("FSDP2", "None", [("proseco", "prefix"), ("proseco", "shift"), ("revision", "prefix")]),
        ("FSDP2", "Sharding(reshard=False)", [("proseco", "prefix"), ("refine", "full")]),
        ("DDPStrategy", "None", [("mask", "full"), ("proseco", "prefix"), ("refine", "full")]),
    ],
)
def test_two_ranks_give_the_numbers_of_one(tmp_path, strategy, sharding, cases):
    ranks = on_two_ranks(tmp_path, cases, strategy, sharding)
    for case in cases:
        one = run(*case)
        first, second = (rank[case] for rank in ranks)
        assert torch.equal(first["weights"], second["weights"])
        assert first["logged"] == second["logged"]
        start = torch.cat([p.detach().flatten() for p in tiny_backbone(**OPTIONS[case[1]]).parameters()])
        assert (one["weights"] - start).abs().max() > 1e-3
        torch.testing.assert_close(first["weights"], one["weights"], rtol=1e-4, atol=2e-5)
        for step, expected in zip(first["logged"], one["logged"], strict=True):
            assert step == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.dist
def test_computing_in_bfloat16_keeps_float32_parameters_and_nearly_the_same_loss(tmp_path):
    first, _ = on_two_ranks(tmp_path, [("revision", "prefix")], "FSDP2", "Sharding(compute='bfloat16')")
    found, one = first["revision", "prefix"], run("revision", "prefix")
    assert found["weights"].dtype == torch.float32
    assert found["logged"][0]["train/loss"] == pytest.approx(one["logged"][0]["train/loss"], rel=0.02)
    assert found["logged"][0]["train/loss"] != one["logged"][0]["train/loss"]
