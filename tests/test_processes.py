"""Trainings of several processes through the command line: what they leave, what a kill leaves, what they say."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from src.distributed.checkpoints import is_intact, read_full
from src.export import main as export
from src.rounds.drafts import read_drafts
from testing.scenes import BASE, write_scenes
from testing.verbs import refusal
from tests.ranks import RENAME, Ranks
from tests.test_rounds import digests, journaled

pytestmark = pytest.mark.dist
LOST = re.compile(r"rank (\d): error: .*\n.*another process of this run has ended or does not answer")
NUM = 11  # drafts of a round: ranks get unequal shares of them


@pytest.fixture(scope="module")
def ranks():
    with Ranks() as server:
        yield server


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes")


def common(scenes: Path) -> list[str]:
    data = [f"data.path={scenes}", f"tokenizer={BASE}", "data.batch_size=4"]
    quick = ["callbacks.samples=null", "callbacks.progress=null", "callbacks.throughput=null", "data.workers=0"]
    steps = ["optim.warmup_steps=1", "trainer.accelerator=cpu", "trainer.limit_val_batches=1"]
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
    assert len(list(whole.glob("events*"))) == 1
    for number in (1, 2):
        folder = whole / "rounds" / f"round-000{number}"
        assert json.loads((folder / "index.json").read_text())["counts"]["drafted"] == NUM
        assert all((folder / f"journal-rank-000{rank}.jsonl").read_bytes() for rank in (0, 1))
        assert len(journaled(folder)) == len(set(journaled(folder))) == NUM


@pytest.mark.parametrize(
    ("parallel", "world"),
    [("fsdp2", 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in [("ddp", 2), ("fsdp2", 1)])],
)
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
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=3e-4)
    moved = load_file(BASE / "model.safetensors")
    assert max((moved[name] - tensor).abs().max() for name, tensor in first.items()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_ranks_go_back_to_the_start_before_they_train_on_a_further_round(ranks, scenes, whole, tmp_path, parallel):
    """Killed twice right after the second round, which newer weights have drafted; as if it had not been."""
    argv = stage2(scenes, tmp_path / "run", "callbacks.self_correction.train_from=start", parallel=parallel)
    argv += ["callbacks.checkpoint.every_n_train_steps=100"]
    done = ranks.run(argv, out=tmp_path, kill=[(1, "src.objectives.base:Objective.training_step", 4)])
    assert done.codes[1] == -9, done.printed
    folder = tmp_path / "run" / "rounds"
    models = [json.loads((folder / f"round-000{n}/index.json").read_text())["settings"]["model"] for n in (1, 2)]
    assert models[0] != models[1]
    done = ranks.run(argv, out=tmp_path, kill=[(1, "src.objectives.base:Objective.training_step", 0)])
    before = read_full(tmp_path / "run" / "checkpoints" / "pre-round-0001.ckpt")["state_dict"]
    base = load_file(BASE / "model.safetensors")
    assert all(torch.equal(before[f"backbone.{name}"], tensor) for name, tensor in base.items())
    done = ranks.run(argv, out=tmp_path)
    assert done.codes == [0, 0], done.printed
    straight = tmp_path / "straight"
    done = ranks.run([*argv, f"run_dir={straight}"], out=tmp_path)
    assert done.codes == [0, 0], done.printed
    assert same(straight, tmp_path / "run")
    assert not same(straight, whole)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_by_hand_on_many_processes_is_the_same_round(ranks, scenes, whole, tmp_path):
    """The verbs, as torchrun starts them; the first time one is killed."""
    made = {"environment": {"TORCHELASTIC_RUN_ID": "one"}, "out": tmp_path}
    draft = ["conf=draft", f"model.path={BASE}", f"data.path={scenes}", f"out={tmp_path}/drafts", f"num={NUM}"]
    draft += ["tokens_per_step=[8,16]", "data.batch_size=4", "data.workers=0"]
    killed = ranks.run(draft, verb="draft", kill=[(1, "src.rounds.drafts:Drafter.draw", 1)], **made)
    assert killed.codes[1] == -9
    assert killed.codes[0] == 1
    assert LOST.search(killed.printed[0])[1] == "0"
    done = ranks.run(draft, verb="draft", **made)
    assert done.codes == [0, 0], done.printed
    assert f"{tmp_path}/drafts: {NUM} drafts\nnext: python -m src.revise" in done.printed[0]
    revise = ["conf=revise", f"drafts={tmp_path}/drafts", f"out={tmp_path}/round", f"tokenizer={BASE}", "per_shard=4"]
    killed = ranks.run(revise, verb="revise", kill=[(1, ANSWER, 1)], **made)
    assert killed.codes == [1, -9], killed.printed
    done = ranks.run(revise, verb="revise", **made)
    assert done.codes == [0, 0], done.printed
    assert len(journaled(tmp_path / "round")) == len(set(journaled(tmp_path / "round"))) == NUM
    files = digests(tmp_path / "round") | digests(tmp_path / "drafts")
    assert files.keys() == rounds(whole)["round-0001"].keys()
    online = whole / "rounds" / "round-0001" / "drafts"
    for ours, theirs in zip(read_drafts(tmp_path / "drafts"), read_drafts(online), strict=True):
        assert [(one.key, one.token_ids) for one in ours] == [(one.key, one.token_ids) for one in theirs]


# --- kills --------------------------------------------------------------------------------------------------------

STEP = "src.objectives.base:Objective.training_step"
DRAFT = "src.rounds.drafts:Drafter.draw"
ANSWER = "src.rounds.expert_thread:ExpertThread._keep"  # right before an answer goes to the journal
BOTH = (0, 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("who", "what", "number"),
    [
        ((0,), "src.distributed.checkpoints:publish", 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ((1,), STEP, 5),
                ((1,), ANSWER, 2),
                (BOTH, STEP, 7),
                ((1,), DRAFT, 1),
                ((0,), ANSWER, 6),
                *(((0,), RENAME, number) for number in (4, 12, 15, 20)),  # drafts, rounds, manifests, checkpoints
                ((1,), "src.training.strategy:written_files", 1),  # in the middle of a checkpoint
                ((0,), "src.distributed.checkpoints:remove", 2),
                ((0,), "src.rounds.round:_write", 1),
                ((0,), "src.train:save_pretrained", 0),
            ]
        ),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(ranks, scenes, whole, tmp_path, who, what, number):
    argv = stage2(scenes, tmp_path / "run")
    killed = ranks.run(argv, out=tmp_path, kill=[(rank, what, number) for rank in who])
    assert -9 in [killed.codes[rank] for rank in who], killed.printed
    assert 0 not in killed.codes
    for rank in (rank for rank, code in enumerate(killed.codes) if code != -9):
        assert LOST.search(killed.printed[rank])[1] == str(rank)
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


def damage(part: Path) -> None:
    """Flip one bit."""
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(bytes(content))


def test_a_damaged_checkpoint_is_passed_over(ranks, scenes, whole, copied, tmp_path):
    folder = copied / "checkpoints" / "epoch=1-step=6.ckpt"
    assert is_intact(folder)
    damage(folder / "__1_0.distcp")
    assert not is_intact(folder)
    done = ranks.run(stage2(scenes, copied), out=tmp_path)
    assert done.codes == [0, 0], done.printed
    assert re.search("epoch=1-step=6.ckpt is damaged; .*\nresuming from pre-round-0002.ckpt", done.printed[0])
    assert same(whole, copied)


def test_a_full_disk_leaves_the_checkpoints_that_are_there(ranks, scenes, whole, copied, tmp_path):
    before = sorted((copied / "checkpoints").glob("[!.]*"))
    done = ranks.run(stage2(scenes, copied), out=tmp_path, file_limit={1: 1 << 20})
    assert done.codes == [1, 1], done.printed
    error = f"error: {copied}/checkpoints/epoch=2-step=8.ckpt: the checkpoint cannot be written; is a disk full?"
    assert all(error in text and "Traceback" not in text for text in done.printed)
    assert sorted((copied / "checkpoints").glob("[!.]*")) == before
    assert ranks.run(stage2(scenes, copied), out=tmp_path).codes == [0, 0]
    assert same(whole, copied)


def at_the_second_epoch(run_dir: Path) -> None:
    for path in [*(run_dir / "checkpoints").glob("epoch*"), run_dir / "checkpoints" / "last.ckpt"]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.mark.slow
def test_at_the_start_of_an_epoch_other_ranks_go_on(ranks, scenes, copied, tmp_path):
    """Two ranks wrote it. One that shares with nobody and one without any strategy read it in different ways."""
    at_the_second_epoch(copied)
    ends = {}
    for name, parallel, world in (("shared", 2, 1), ("alone", 1, 1), ("three", 3, 3)):
        shutil.copytree(copied, tmp_path / name, symlinks=True)
        argv = [*stage2(scenes, tmp_path / name, world=parallel), f"trainer.devices={world}"]
        done = ranks.run(argv, out=tmp_path, world=world)
        assert done.codes == [0] * world, done.printed
        ends[name] = weights(tmp_path / name)
    for name, tensor in ends["alone"].items():
        torch.testing.assert_close(ends["shared"][name], tensor, rtol=1e-5, atol=1e-6)
    differences = [(ends["three"][name] - tensor).abs().max() for name, tensor in ends["alone"].items()]
    assert max(differences) > 1e-5  # three ranks see other batches


def test_a_run_goes_on_with_another_strategy(ranks, scenes, whole, copied, tmp_path):
    """One process without a strategy writes the checkpoint of an epoch's start; two read it, with all moments."""
    at_the_second_epoch(copied)
    shutil.copytree(copied, tmp_path / "one", symlinks=True)
    alone = [*stage2(scenes, tmp_path / "one", world=1), "callbacks.checkpoint.every_n_train_steps=1"]
    killed = ranks.run(alone, out=tmp_path, world=1, kill=[(0, STEP, 0)])
    assert killed.codes == [-9]
    folder = tmp_path / "one" / "checkpoints" / "pre-round-0002.ckpt"
    content = read_full(folder)
    shutil.rmtree(folder)
    torch.save(content, folder)
    done = ranks.run(stage2(scenes, tmp_path / "one"), out=tmp_path)
    assert done.codes == [0, 0], done.printed
    assert same(whole, tmp_path / "one")


def test_in_the_middle_of_an_epoch_other_ranks_go_on(ranks, scenes, copied, tmp_path):
    done = ranks.run(stage2(scenes, copied, "trainer.devices=3"), out=tmp_path, world=3)
    assert done.codes == [0, 0, 0], done.printed
    assert "resuming from epoch=1-step=6.ckpt" in done.printed[0]
    assert json.loads((copied / "finished.json").read_text()) == {"steps": 8}


def test_a_damaged_checkpoint_is_not_exported(copied, tmp_path, capsys):
    folder = copied / "checkpoints" / "epoch=1-step=6.ckpt"
    damage(folder / "__0_0.distcp")
    argv = ["conf=export", f"model={folder}", f"out={tmp_path}/out", "format=own"]
    assert "epoch=1-step=6.ckpt is damaged" in refusal(export, argv, capsys)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_becomes_one_file_and_a_model_folder(whole, tmp_path, capsys):
    folder = whole / "checkpoints" / "last.ckpt"
    export(["conf=export", f"model={folder}", f"out={tmp_path}/whole.ckpt", "format=lightning"])
    content = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    assert content["global_step"] == 8
    export(["conf=export", f"model={folder}", f"out={tmp_path}/model", "format=own"])
    exported = load_file(tmp_path / "model" / "model.safetensors")
    for name, tensor in weights(whole).items():
        assert torch.equal(exported[name], tensor)
        assert torch.equal(content["state_dict"][f"backbone.{name}"], tensor)
    (optimizer,) = content["optimizer_states"]
    assert {int(state["step"]) for state in optimizer["state"].values()} == {8}
    assert sorted(optimizer["state"]) == sorted(n for group in optimizer["param_groups"] for n in group["params"])


# --- what goes wrong ----------------------------------------------------------------------------------------------


def test_gradients_that_are_not_finite_on_one_rank_stop_all_and_name_its_samples(ranks, scenes, tmp_path):
    argv = stage2(scenes, tmp_path / "run", "callbacks.self_correction.rounds=1")
    done = ranks.run(argv, out=tmp_path, patches=["tests.ranks:flawed"])
    assert done.codes == [2, 2], done.printed
    lines = [text.strip().splitlines()[-1].removeprefix("rank 1: ") for text in done.printed]
    assert lines[0] == lines[1]
    assert "error: the gradients are not finite after step 0 (samples train-" in lines[0]
    assert "4 times in a row" in lines[0]
    assert lines[0].split("(samples ")[1].split(")")[0].count(",") == 3  # of the four rows of one rank
    assert done.printed[0].count("the step is skipped") == 3


def test_an_expert_that_never_answers_is_given_up(ranks, scenes, tmp_path):
    argv = stage2(scenes, tmp_path / "run", "callbacks.self_correction.patience_minutes=0.05")
    done = ranks.run(argv, out=tmp_path, patches=["tests.ranks:silent"])
    assert done.codes[1] == 2, done.printed
    assert done.codes[0] == 1, done.printed
    assert "error: expert scenes has not answered for 3 s; its 0 answers are kept" in done.printed[1]
    assert LOST.search(done.printed[0])[1] == "0"
    assert ranks.run(argv, out=tmp_path).codes == [0, 0]


def test_a_stop_in_a_round_is_one_on_all_ranks(ranks, scenes, whole, tmp_path):
    """By the file of a batch job, while rank 0 waits for the drafts of rank 1; the mark is left in any case."""
    argv = stage2(scenes, tmp_path / "run")
    job = {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "job", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7", "SLURM_NNODES": "1"}
    job |= {"SLURM_NTASKS_PER_NODE": "2", "SLURM_NODELIST": "localhost", "SLURM_NODEID": "0"}
    done = ranks.run(argv, out=tmp_path, patches=["tests.ranks:stops_in_a_round"], environment=job)
    assert done.codes == [0, 0], done.printed
    assert (tmp_path / "run" / "REQUEUE").exists()
    assert f"stopped at step 0 of 8 by SIGUSR1 ({tmp_path}/run/STOP); the same command continues" in done.printed[0]
    for name in ("REQUEUE", "STOP"):
        (tmp_path / "run" / name).unlink()  # as the job does
    done = ranks.run(argv, out=tmp_path)
    assert done.codes == [0, 0], done.printed
    assert same(whole, tmp_path / "run")


@pytest.mark.slow
def test_a_port_in_use_ends_all_ranks(ranks, scenes, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        argv = stage2(scenes, tmp_path / "run", "trainer.strategy.timeout_minutes=0.1")
        port = str(taken.getsockname()[1])
        done = ranks.run(argv, out=tmp_path, environment={"MASTER_PORT": port})
    assert done.codes == [1, 1], done.printed
    assert LOST.search(done.printed[0])
    assert f"rank 1: error: no process of this run answers at 127.0.0.1, port {port}" in done.printed[1]


def test_a_rank_that_does_not_come_ends_the_others(ranks, scenes, tmp_path):
    argv = stage2(scenes, tmp_path / "run", "trainer.strategy.timeout_minutes=0.1")
    done = ranks.run(argv, out=tmp_path, ranks=[0])
    assert done.codes == [1], done.printed
    assert LOST.search(done.printed[0])[1] == "0"
