"""Several processes give the numbers of one: losses, norm, weights and average, for every objective and strategy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from callbacks.ema import EMA
from src.distributed.parallel import Sharding, full_tensor
from src.models.llada_v import LLaDAV
from src.models.lora import LoRA
from src.objectives.base import Objective, Setup
from src.objectives.complementary import ComplementaryMasks
from src.objectives.edit_noise import EditNoiseObjective
from src.objectives.hybrid import HybridNoise
from src.objectives.mask import MaskPrediction
from src.objectives.optim import Optim
from src.objectives.proseco import ProSeCo
from src.objectives.refine import Refine
from src.objectives.revision import RevisionObjective
from src.objectives.uniform import UniformNoise
from src.training.strategy import FSDP2
from tests.adapters import with_adapters
from tests.test_corruption import SPECIAL
from tests.test_objectives import QUIET, batch_with_prompt, make, tiny_backbone

ROOT = Path(__file__).parents[1]
SETTINGS = {"lr": 1e-2, "warmup_steps": 2, "decay": 0.5, "clip_norm": 0.05}
CASES = {
    "mask": (MaskPrediction, {"weight": "one", "reduce": "tokens"}, {}),
    "answers": (MaskPrediction, {}, {"micro_batch": 2}),
    "revision": (RevisionObjective, {"rate": 0.3}, {"micro_batch": 2}),
    "refine": (Refine, {"rate": 0.3, "keep": 0.5}, {}),
    "proseco": (ProSeCo, {"errors": True}, {"micro_batch": 2, "views": 2, "antithetic": True}),
    "edits": (EditNoiseObjective, {"rate": 0.5, "begin": 0.5}, {}),
    "complementary": (ComplementaryMasks, {}, {}),
    "hybrid": (HybridNoise, {"share": 0.3}, {}),
    "uniform": (UniformNoise, {"reduce": "batch_tokens"}, {"micro_batch": 1}),
    "checkpointed": (ProSeCo, {}, {"checkpointing": "full"}),
    "compiled": (RevisionObjective, {"rate": 0.3}, {"micro_batch": 2, "compile": True}),
    "selective": (RevisionObjective, {"rate": 0.3}, {"checkpointing": "selective"}),
    "adapters": (RevisionObjective, {"rate": 0.3}, {"micro_batch": 2}),
    "adapters and head": (ProSeCo, {}, {"checkpointing": "full"}),
}
LORA = {"adapters": LoRA(rank=2), "adapters and head": LoRA(rank=3, decoder=("q_proj", "up_proj"), train=("lm_head",))}
OPTIONS = {
    "full": {"attention": "full"},
    "prefix": {"attention": "prefix"},
    "shift": {"attention": "prefix", "shift": True},
}
STEPS = 3


def backbone(name: str, attention: str) -> LLaDAV:
    base = tiny_backbone(**OPTIONS[attention])
    return with_adapters(base, LORA[name], seed=1) if name in LORA else base


class Watch(L.Callback):
    """What each step logged."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, *_) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def run(
    name: str, attention: str, *, rank: int = 0, world: int = 1, sharding: Sharding | None = None, **trainer
) -> dict:
    """Three steps on the rows of one rank: whole weights, their average and all that was logged."""
    cls, options, training = CASES[name]
    objective: Objective = make(
        cls,
        **options,
        backbone=lambda: backbone(name, attention),
        optim=Optim(**{**SETTINGS, **training}, sharding=sharding),
    )
    batch = batch_with_prompt(8, padding=3)
    batch.drafted[::3] = True
    part = batch.rows(slice(rank * 8 // world, (rank + 1) * 8 // world))
    watch, ema = Watch(), EMA(decay=0.9)
    settings = {**QUIET, **trainer, "max_steps": STEPS, "accelerator": "cpu", "use_distributed_sampler": False}
    fit = L.Trainer(callbacks=[ema, watch], **settings)
    fit.fit(objective, DataLoader([part] * STEPS, batch_size=None))
    weights = torch.cat([full_tensor(p.detach()).flatten() for p in objective.parameters()])
    average = torch.cat([full_tensor(tensor).flatten() for tensor in ema.average.values()])
    return {"weights": weights, "average": average, "logged": watch.seen}


SCRIPT = """
import os, sys
from functools import partial
sys.path.insert(0, {root!r})
import torch
from src.distributed.parallel import Sharding
from src.training.strategy import DDP, FSDP2
from tests.test_ranks import run

rank = int(os.environ.get("LOCAL_RANK", 0))
strategy = {strategy}
results = {{}}
for case in {cases!r}:
    results[case] = run(*case, rank=rank, world={world}, devices={world}, strategy=strategy(), sharding={sharding})
torch.save(results, {out!r} + str(rank))
"""


def on_ranks(
    folder: Path, cases: list[tuple[str, str]], strategy: str, sharding: str = "None", world: int = 2
) -> list[dict]:
    """Real processes: Lightning starts the others by running the script again."""
    script = folder / "job.py"
    out = str(folder / "out-")
    script.write_text(
        SCRIPT.format(root=str(ROOT), strategy=strategy, cases=cases, sharding=sharding, out=out, world=world)
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(f"{out}{rank}") for rank in range(world)]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("strategy", "sharding", "world", "cases"),
    [
        ("FSDP2", "None", 2, [("proseco", "prefix"), ("mask", "full"), ("refine", "full"), ("adapters", "full")]),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("FSDP2", "None", 2, [(name, "full") for name in CASES if name != "compiled"]),
                (
                    "FSDP2",
                    "None",
                    2,
                    [(name, "prefix") for name in ("proseco", "revision", *LORA)] + [("proseco", "shift")],
                ),
                ("FSDP2", "Sharding(reshard=False)", 2, [("proseco", "prefix"), ("refine", "full")]),
                ("DDP", "None", 2, [("mask", "full"), ("proseco", "prefix"), ("refine", "full"), ("adapters", "full")]),
                ("partial(FSDP2, replicas=2)", "None", 4, [("proseco", "prefix"), ("revision", "full")]),
            ]
        ),
    ],
)
def test_ranks_give_the_numbers_of_one(tmp_path, strategy, sharding, world, cases):
    ranks = on_ranks(tmp_path, cases, strategy, sharding, world)
    for case in cases:
        one = run(*case)
        first, *others = (rank[case] for rank in ranks)
        for other in others:
            assert torch.equal(first["weights"], other["weights"]) and torch.equal(first["average"], other["average"])
            assert first["logged"] == other["logged"]
        start = torch.cat([p.detach().flatten() for p in backbone(*case).parameters()])
        assert (one["weights"] - start).abs().max() > 1e-3
        torch.testing.assert_close(first["weights"], one["weights"], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(first["average"], one["average"], rtol=1e-4, atol=2e-5)
        for step, expected in zip(first["logged"], one["logged"], strict=True):
            assert step == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.slow
@pytest.mark.dist
def test_computing_in_bfloat16_keeps_float32_parameters_and_nearly_the_same_loss(tmp_path):
    first, _ = on_ranks(tmp_path, [("revision", "prefix")], "FSDP2", "Sharding(compute='bfloat16')")
    lower, one = first["revision", "prefix"], run("revision", "prefix")
    assert lower["weights"].dtype == torch.float32
    assert lower["logged"][0]["train/loss"] == pytest.approx(one["logged"][0]["train/loss"], rel=0.02)
    assert lower["logged"][0]["train/loss"] != one["logged"][0]["train/loss"]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_blocks_give_the_same_numbers(tmp_path):
    """In one process and in two that share the model; the prefix and the response have lengths of their own."""
    expected = run("revision", "prefix")
    assert run("compiled", "prefix")["logged"][-1] == pytest.approx(expected["logged"][-1], rel=1e-4, abs=1e-6)
    first, second = on_ranks(tmp_path, [("compiled", "prefix")], "FSDP2")
    assert torch.equal(first["compiled", "prefix"]["weights"], second["compiled", "prefix"]["weights"])
    torch.testing.assert_close(first["compiled", "prefix"]["weights"], expected["weights"], rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.dist
def test_what_gets_no_gradient_can_be_saved_and_resumed(tmp_path):
    """A vision path that no image reaches, trained or with its tower frozen: straight on, and over a checkpoint."""
    script = tmp_path / "text.py"
    script.write_text(TEXT.format(root=str(ROOT), folder=str(tmp_path)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    for rate in (None, 0.0):
        straight, resumed = (torch.load(tmp_path / f"{name}-{rate}.pt") for name in ("straight", "resumed"))
        assert all(torch.equal(straight[name], tensor) for name, tensor in resumed.items())
        (used,) = {name: tensor for name, tensor in straight.items() if name.endswith("lm_head.weight")}.values()
        assert (used - backbone_with_images().lm_head.weight).abs().max() > 1e-3


def backbone_with_images() -> LLaDAV:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LLaDAV(decoder={"vocab_size": 40, **sizes}, vision={**sizes, "image_size": 16, "patch_size": 8})


def on_texts(folder: Path, name: str, rate: float | None, steps: int) -> None:
    """Up to so many steps on texts; goes on from the checkpoint of that name, if there is one."""
    optim = Optim(lr=1e-2, vision_lr=rate, warmup_steps=1, decay=0.0, weight_decay=0.1)
    objective = MaskPrediction(Setup(backbone=backbone_with_images, special=SPECIAL, optim=optim))
    path = folder / f"{name}-{rate}.ckpt"
    trainer = L.Trainer(max_steps=steps, accelerator="cpu", devices=2, strategy=FSDP2(), **QUIET)
    data = DataLoader([batch_with_prompt(4, padding=0)] * steps, batch_size=None)
    trainer.fit(objective, data, ckpt_path=path if path.exists() else None)
    trainer.save_checkpoint(path)
    state = {name: full_tensor(tensor.detach()) for name, tensor in objective.state_dict().items()}
    if trainer.is_global_zero:
        torch.save(state, path.with_suffix(".pt"))


TEXT = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.test_ranks import on_texts

for rate in (None, 0.0):
    on_texts(Path({folder!r}), "straight", rate, 4)
    on_texts(Path({folder!r}), "resumed", rate, 2)
    on_texts(Path({folder!r}), "resumed", rate, 4)
"""
