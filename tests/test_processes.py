"""Trainings of several processes through the command line: what they leave, what a kill leaves, what they say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from src.prepare import Scenes
from tests.ranks import RENAME, ROOT, Ranks
from tests.test_rounds import digests, journaled

pytestmark = pytest.mark.dist
BASE = ROOT / "assets" / "base"
NUM = 11  # drafts of a round: ranks get unequal shares of them


@pytest.fixture(scope="module")
def ranks():
    with Ranks() as server:
        yield server


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "scenes"
    Scenes(out=str(out), image_size=48, canvas=64, prompt="Describe the image in detail.", num_train=48, num_val=8,
           num_test=8, captions_per_image=1, objects=[1, 2], noise=2.0, per_shard=16, vocab_size=400,
           tokenizer=str(BASE)).run()  # fmt: skip
    return out


def common(scenes: Path) -> list[str]:
    data = [f"data.path={scenes}", f"tokenizer={BASE}", "data.batch_size=4"]
    quick = ["callbacks.samples=null", "callbacks.progress=null", "callbacks.throughput=null", "data.workers=0"]
    steps = ["objective.training.warmup_steps=1", "trainer.accelerator=cpu", "trainer.limit_val_batches=1"]
    return [*data, *quick, *steps]


def stage2(scenes: Path, run_dir: Path, *more: str, parallel: str = "fsdp2", world: int = 2) -> list[str]:
    """Two rounds, at the start and after four steps; eight steps."""
    rounds = ["rounds=2", f"drafts_per_round={NUM}", "tokens_per_step=[8,16]", "per_shard=4"]
    return [
        f"conf=stage2{f',parallel/{parallel}' if world > 1 else ''}",
        f"run_dir={run_dir}",
        f"model.path={BASE}",
        *common(scenes),
        *(f"callbacks.self_correction.{setting}" for setting in rounds),
        *("trainer.max_steps=8", "data.epoch_batches=4", "callbacks.checkpoint.every_n_train_steps=3"),
        f"trainer.devices={world}",
        *more,
    ]


@pytest.fixture(scope="module")
def whole(ranks, scenes, tmp_path_factory) -> Path:
    """A run of two ranks that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    done = ranks.run(stage2(scenes, folder / "run"), out=folder)
    assert done.codes == [0, 0], done.printed
    return folder / "run"


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(second[name], tensor) for name, tensor in first.items())


def rounds(run_dir: Path) -> dict[str, dict[str, str]]:
    return {folder.name: digests(folder) | digests(folder / "drafts") for folder in (run_dir / "rounds").iterdir()}


# --- what several ranks leave -------------------------------------------------------------------------------------


def test_ranks_leave_one_run(whole):
    names = {path.name for path in (whole / "checkpoints").iterdir()}
    assert names == {"epoch=1-step=6.ckpt", "epoch=2-step=8.ckpt", "last.ckpt", "pre-round-0002.ckpt"}
    assert (whole / "checkpoints" / "last.ckpt").readlink() == Path("epoch=2-step=8.ckpt")
    assert json.loads((whole / "finished.json").read_text()) == {"steps": 8}
    assert len(list((whole / "tensorboard").glob("events*"))) == 1
    for number in (1, 2):
        folder = whole / "rounds" / f"round-000{number}"
        assert json.loads((folder / "index.json").read_text())["counts"]["drafted"] == NUM
        assert all(len(path.read_bytes()) for path in folder.glob("journal-rank-000[01].jsonl"))
        assert len(journaled(folder)) == len(set(journaled(folder))) == NUM


@pytest.mark.parametrize(("parallel", "world"), [("ddp", 2), ("fsdp2", 3), ("fsdp2", 1)])
def test_drafts_and_rounds_do_not_depend_on_the_ranks(ranks, scenes, whole, tmp_path, parallel, world):
    """The first round: weights then have taken other batches."""
    argv = stage2(scenes, tmp_path / "run", "trainer.max_steps=1", parallel=parallel, world=world)
    argv += ["callbacks.self_correction.rounds=1"]
    done = ranks.run(argv, out=tmp_path, world=world)
    assert done.codes == [0] * world, done.printed
    assert rounds(tmp_path / "run")["round-0001"] == rounds(whole)["round-0001"]


def test_copies_and_shares_train_alike(ranks, scenes, whole, tmp_path):
    done = ranks.run(stage2(scenes, tmp_path / "run", parallel="ddp"), out=tmp_path)
    assert done.codes == [0, 0], done.printed
    first, second = weights(whole), weights(tmp_path / "run")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4)
    moved = load_file(BASE / "model.safetensors")
    assert max((moved[name] - tensor).abs().max() for name, tensor in first.items()) > 1e-3


# --- kills --------------------------------------------------------------------------------------------------------

STEP = "src.objectives.base:Objective.training_step"
DRAFT = "callbacks.self_correction:draft_batch"
ANSWER = "src.journal:Journal.add"
BOTH = (0, 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("who", "what", "number"),
    [
        ((1,), STEP, 1),
        ((0,), STEP, 5),
        (BOTH, STEP, 7),
        ((1,), DRAFT, 1),
        (BOTH, DRAFT, 1),
        ((1,), ANSWER, 2),
        ((0,), ANSWER, 6),
        ((1,), RENAME, 1),  # of a shard of drafts
        *(((0,), RENAME, number) for number in (4, 12, 15, 20)),  # drafts, rounds, manifests, checkpoints
        ((1,), "src.strategy:entries", 1),  # in the middle of a checkpoint
        ((0,), "src.strategy:write_manifest", 2),
        ((0,), "src.rounds:_write", 1),
        ((0,), "callbacks.checkpoint:link", 1),
        ((0,), "src.train:save_pretrained", 0),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(ranks, scenes, whole, tmp_path, who, what, number):
    argv = stage2(scenes, tmp_path / "run")
    killed = ranks.run(argv, out=tmp_path, kill=[(rank, what, number) for rank in who])
    assert -9 in [killed.codes[rank] for rank in who], killed.printed
    assert 0 not in killed.codes
    for rank in (rank for rank, code in enumerate(killed.codes) if code != -9):
        assert f"rank {rank}: error: another process of this run has ended" in killed.printed[rank]
        assert "Traceback" not in killed.printed[rank]
    done = ranks.run(argv, out=tmp_path)
    assert done.codes == [0, 0], done.printed
    assert same(whole, tmp_path / "run")
    assert rounds(tmp_path / "run") == rounds(whole)
    for folder in (tmp_path / "run" / "rounds").iterdir():
        assert len(journaled(folder)) == len(set(journaled(folder))) == NUM
    assert not list((tmp_path / "run").rglob(".*.tmp"))


# --- checkpoints --------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    """The run before its last steps."""
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    (tmp_path / "run" / "finished.json").unlink()
    for name in ("model", "checkpoints/epoch=2-step=8.ckpt"):
        shutil.rmtree(tmp_path / "run" / name)
    return tmp_path / "run"


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "no list"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(ranks, scenes, whole, copied, tmp_path, damage):
    folder = copied / "checkpoints" / "epoch=1-step=6.ckpt"
    part = folder / "__1_0.distcp"
    if damage == "truncated":
        part.write_bytes(part.read_bytes()[:-10])
    elif damage == "changed":
        content = bytearray(part.read_bytes())
        content[len(content) // 2] ^= 1
        part.write_bytes(bytes(content))
    elif damage == "missing":
        part.unlink()
    else:
        (folder / "files.json").unlink()
    done = ranks.run(stage2(scenes, copied), out=tmp_path)
    assert done.codes == [0, 0], done.printed
    assert "epoch=1-step=6.ckpt is damaged; taking pre-round-0002.ckpt, the one before it" in done.printed[0]
    assert same(whole, copied)
