"""The online loop inside real trainings: when rounds come, what training sees of them, and what a kill leaves."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import random
import shutil
import signal
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import src.draft
import src.revise
from callbacks.self_correction import SelfCorrection
from datamodules.captions import CaptionData
from src.io.shards import read_manifest, write_shards
from src.models.hf.folder import save_pretrained
from src.models.tiny import tiny
from src.objectives.base import Setup
from src.objectives.optim import Optim
from src.objectives.refine import Refine
from src.samplers.sampler import Sampler
from src.scenes.grammar import write_caption
from src.scenes.graph import draw_scene
from src.scenes.render import render
from src.text.tokenizer import Codec
from src.types import Edit, Expert, Revision
from testing.child import in_child

NUM, LENGTH, STEPS_PER_EPOCH = 6, 64, 3  # NUM drafts a round


class Rewriter(Expert):
    """Wants another word for the first tokens of every draft."""

    name = "rewriter"

    def __init__(self, codec: Codec, *, lost: bool = False, kill_at: int | None = None) -> None:
        self.codec = codec
        self._lost = lost  # the connection, after one answer
        self._left = kill_at  # answers before its process is killed

    async def revise(self, drafts):
        for number, draft in enumerate(drafts):
            if self._lost and number == 1:
                raise ConnectionError("the expert is gone")
            ends = [len(self.codec.decode(draft.token_ids[:n])) for n in range(4)]
            words = [draft.text[a:b] for a, b in pairwise(ends)]
            if self._left is not None:
                self._left -= 1
                if self._left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            yield draft.key, Revision(tuple(Edit(w, " ring", a) for w, a in zip(words, ends, strict=False) if w))


class Careless(Rewriter):
    """Draws from the global generators, as any component of a round may."""

    async def revise(self, drafts):
        async for answer in super().revise(drafts):
            torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
            yield answer


class Steps(L.Callback):
    """Keeps the loss, and the number of drafted rows, of every step."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.drafted: dict[int, int] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses[trainer.global_step] = float(trainer.callback_metrics["train/loss"])
        self.drafted[trainer.global_step] = int(batch.drafted.sum())


class Noisy(L.LightningModule):
    """Takes noise from every global generator, so that a draw too many anywhere shows in its weights."""

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.backbone = backbone(codec)
        self.backbone.vision.eval()  # a part that is not in training mode must stay so

    def training_step(self, batch, batch_idx):
        assert self.backbone.training
        assert not self.backbone.vision.training
        hide = torch.rand(batch.response.shape) < random.random() * np.random.rand()  # noqa: NPY002
        tokens = torch.where(hide, 0, batch.response)
        logits = self.backbone(self.backbone.encode_prefix(batch.prefix), tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.response.flatten())
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Deaf(CaptionData):
    """Takes note of rounds but does not train on them."""

    taken: tuple[str, ...] = ()

    def add_round(self, path):
        self.taken = (*self.taken, Path(path).name)


def backbone(codec: Codec):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    decoder = {**sizes, "num_hidden_layers": 2, "attention": "prefix"}
    return tiny(codec, decoder=decoder, vision={**sizes, "num_hidden_layers": 1, "image_size": 48, "patch_size": 16})


def make_data(folder: Path) -> None:
    rng = random.Random(1)
    codec = Codec.train([write_caption(draw_scene(rng), rng) for _ in range(200)], vocab_size=350)
    codec.save(folder / "tokenizer")

    def samples():
        for number in range(16):
            scene, stream = draw_scene(rng), io.BytesIO()
            render(scene, rng).save(stream, "PNG")
            caption = {"text": write_caption(scene, rng), "swaps": []}
            key = f"s{number:02d}"
            record = {"key": key, "prompt": "Describe.", "captions": [caption], "scene": scene.to_dict()}
            yield {"__key__": key, "json": record, "png": stream.getvalue()}

    write_shards(
        folder / "train", samples(), prefix="train", per_shard=8, kind="captions", tokenizer=codec.fingerprint
    )  # fmt: skip


def correction(codec: Codec, run: Path, **changed) -> SelfCorrection:
    values = {
        "expert": Rewriter(codec), "sampler": Sampler(length=LENGTH), "codec": codec, "run_dir": run,
        "tokens_per_step": [16, 32], "drafts_per_round": NUM, "rounds": 2, "seed": 7,
    }  # fmt: skip
    return SelfCorrection(**{**values, **changed})


def trainer_for(run: Path, callbacks: list, **changed) -> L.Trainer:
    values = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "max_epochs": -1,
        "max_steps": 3 * STEPS_PER_EPOCH, "reload_dataloaders_every_n_epochs": 1, "enable_progress_bar": False,
        "enable_model_summary": False, "limit_val_batches": 0, "default_root_dir": run,
    }  # fmt: skip
    return L.Trainer(callbacks=callbacks, **{**values, **changed})


def data_for(data: Path, codec: Codec, kind: type[CaptionData] = CaptionData, **changed) -> CaptionData:
    values = {"batch_size": 4, "response_length": LENGTH, "image_size": 48, "epoch_batches": STEPS_PER_EPOCH, "seed": 7}
    return kind(path=str(data), codec=codec, **{**values, **changed})


class Weights(L.Callback):
    """Keeps the weights before every step."""

    def __init__(self) -> None:
        self.before: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before[trainer.global_step] = {name: t.clone() for name, t in pl_module.state_dict().items()}


def train(
    data: Path,
    run: Path,
    *,
    lost: bool = False,
    kill_at: int | None = None,
    resume: Path | None = None,
    save: bool = False,
    also: Sequence[L.Callback] = (),
    **changed,
) -> tuple[Steps, dict, CaptionData]:
    """Stage II: losses, final weights, and the datamodule with its rounds.

    It goes on from `resume`, else from the newest checkpoint if there is one; save: keep a checkpoint of every step.
    """
    torch.set_num_threads(1)
    codec = Codec.load(data / "tokenizer")
    module = Refine(Setup(backbone=partial(backbone, codec), special=codec.special, optim=Optim(lr=1e-3, decay=0.0)))
    steps, datamodule = Steps(), data_for(data, codec)
    callbacks: list[L.Callback] = [
        correction(codec, run, expert=Rewriter(codec, lost=lost, kill_at=kill_at), **changed),
        steps,
        *also,
    ]
    if save:
        every_step = {"save_top_k": -1, "every_n_train_steps": 1, "save_on_train_epoch_end": False}
        callbacks.append(ModelCheckpoint(run / "steps", filename="{step}", **every_step))
    trainer = trainer_for(run, callbacks, enable_checkpointing=save)
    newest = max((run / "checkpoints").glob("*.ckpt"), default=None)
    trainer.fit(module, datamodule=datamodule, ckpt_path=resume or newest)
    return steps, module.state_dict(), datamodule


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


@pytest.fixture(scope="module")
def codec(data) -> Codec:
    return Codec.load(data / "tokenizer")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted Stage II: its folder, steps, weights, datamodule."""
    run = tmp_path_factory.mktemp("whole")
    return run, *train(data, run, save=True)


def shards(run: Path) -> dict[str, str]:
    files = sorted((run / "rounds").glob("round-*/*.tar"))
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_rounds_come_before_the_first_and_after_the_first_epoch(whole):
    run, steps, _, datamodule = whole
    assert [path.name for path in sorted((run / "rounds").iterdir())] == ["round-0001", "round-0002"]
    assert [index.path.name for index in datamodule.rounds] == ["round-0001", "round-0002"]
    assert list(steps.drafted.values()) == [3] * 3 * STEPS_PER_EPOCH, "a quarter of 4 rows are captions"
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"pre-round-0002.ckpt", "last.ckpt"}
    assert (run / "checkpoints" / "last.ckpt").readlink() == Path("pre-round-0002.ckpt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of os.fork
def test_killed_training_goes_on_as_if_nothing_had_happened(data, whole, tmp_path):
    """Killed in the first round, killed in the second, and then left by the expert."""
    for answers in (3, (NUM - 3) + 2):
        assert in_child(partial(train, data, tmp_path, kill_at=answers)) == -signal.SIGKILL
    checkpoint = tmp_path / "checkpoints" / "pre-round-0002.ckpt"
    saved = checkpoint.stat().st_mtime_ns
    with pytest.raises(ConnectionError):
        train(data, tmp_path, lost=True)
    assert checkpoint.stat().st_mtime_ns == saved
    steps, weights, datamodule = train(data, tmp_path)
    run, expected_steps, expected, _ = whole
    assert min(steps.losses) == STEPS_PER_EPOCH + 1
    assert steps.losses == {n: loss for n, loss in expected_steps.losses.items() if n in steps.losses}
    assert max(steps.losses) == 3 * STEPS_PER_EPOCH
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert [index.path.name for index in datamodule.rounds] == ["round-0001", "round-0002"]
    assert shards(tmp_path) == shards(run)
    assert not list((tmp_path / "rounds").glob(".*"))
    for journal in (tmp_path / "rounds").glob("*/journal*"):
        keys = [line.split('"key": "')[1].split('"')[0] for line in journal.read_text().splitlines()]
        assert len(keys) == len(set(keys)) == NUM


@pytest.mark.parametrize(
    "step", [*(pytest.param(step, marks=pytest.mark.slow) for step in (2, STEPS_PER_EPOCH)), STEPS_PER_EPOCH + 1]
)
def test_training_resumes_at_any_step(data, whole, tmp_path, step):
    """Mid-epoch before the second round, right before it, and mid-epoch after it."""
    run, expected_steps, expected, _ = whole
    num_done = 1 + (step > STEPS_PER_EPOCH)
    for number in range(1, num_done + 1):
        shutil.copytree(run / "rounds" / f"round-000{number}", tmp_path / "rounds" / f"round-000{number}")
    saved = run / "steps" / f"step={step}.ckpt"
    steps, weights, datamodule = train(data, tmp_path, resume=saved)
    assert steps.losses == {n: loss for n, loss in expected_steps.losses.items() if n > step}
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert shards(tmp_path) == shards(run)
    assert [index.path.name for index in datamodule.rounds] == ["round-0001", "round-0002"]


def test_drafting_leaves_training_untouched(data, codec, tmp_path):
    """Bit for bit: weights with two rounds whose data are not used equal those without rounds."""
    weights, taken = [], []
    careless = correction(codec, tmp_path / "with", expert=Careless(codec))
    for name, callbacks in (("with", [careless]), ("without", [])):
        L.seed_everything(3, verbose=False)
        module, datamodule = Noisy(codec), data_for(data, codec, Deaf)
        trainer_for(tmp_path / name, callbacks).fit(module, datamodule=datamodule)
        weights.append(module.state_dict())
        taken.append(datamodule.taken)
    assert taken == [("round-0001", "round-0002"), ()]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.slow
def test_rounds_may_train_from_the_start(data, whole, tmp_path):
    """The newest weights draft, those before the first round are trained on; lost in the second round and resumed."""
    seen = Weights()
    _, expected, _ = train(data, tmp_path / "whole", also=[seen], train_from="start")
    first, second, last = (seen.before[number * STEPS_PER_EPOCH] for number in range(3))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    assert any(not torch.equal(last[name], tensor) for name, tensor in first.items())
    assert shards(tmp_path / "whole") == shards(whole[0]), "drafts are those of the newest weights"

    with pytest.raises(ConnectionError):
        train(data, tmp_path / "lost", lost=True, train_from="start")  # in the first round
    folder = tmp_path / "lost" / "rounds"
    shutil.copytree(tmp_path / "whole" / "rounds" / "round-0001", folder / "round-0001")
    with pytest.raises(ConnectionError):
        train(data, tmp_path / "lost", lost=True, train_from="start")  # in the second
    names = {path.name for path in (tmp_path / "lost" / "checkpoints").iterdir()}
    assert names == {"pre-round-0001.ckpt", "pre-round-0002.ckpt", "last.ckpt"}
    _, weights, _ = train(data, tmp_path / "lost", train_from="start")
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_state_survives_a_checkpoint(data, codec, tmp_path):
    first = correction(codec, tmp_path, rounds=1)
    module = Noisy(codec)
    trainer = trainer_for(tmp_path, [first], max_steps=STEPS_PER_EPOCH)
    trainer.fit(module, datamodule=data_for(data, codec))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    second, datamodule = correction(codec, tmp_path, rounds=1, expert=Expert()), data_for(data, codec)
    trainer_for(tmp_path, [second], max_steps=2 * STEPS_PER_EPOCH).fit(
        Noisy(codec), datamodule=datamodule, ckpt_path=tmp_path / "end.ckpt"
    )
    assert second.state_dict() == first.state_dict() == {"num_done": 1, "saved_for": 1}
    assert [index.path.name for index in datamodule.rounds] == ["round-0001"]


@pytest.mark.parametrize("limit", [{"max_epochs": 2, "max_steps": -1}, {"max_steps": 2 * STEPS_PER_EPOCH}])
def test_no_round_after_the_last_epoch(data, codec, tmp_path, caplog, limit):
    """The first epoch has 4 batches of 4 captions, the second one 2 with 3 drafts each; then it is over."""
    L.seed_everything(1, verbose=False)  # what the model learns decides what it drafts
    callback = correction(codec, tmp_path, at_start=False)
    datamodule = data_for(data, codec, epoch_batches=None)
    with caplog.at_level(logging.WARNING):
        trainer_for(tmp_path, [callback], **limit).fit(Noisy(codec), datamodule=datamodule)
    assert "training ended after 1 of 2 rounds" in caplog.text
    assert [path.name for path in (tmp_path / "rounds").iterdir()] == ["round-0001"]


def test_metrics_of_a_round_are_logged(data, codec, tmp_path):
    trainer = trainer_for(tmp_path, [correction(codec, tmp_path)], max_steps=6, logger=CSVLogger(tmp_path))
    trainer.fit(Noisy(codec), datamodule=data_for(data, codec))
    header, *rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    drafted = [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]
    rounds = [row for row in drafted if row.get("round/drafted")]
    assert [(float(row["round/drafted"]), row["step"]) for row in rounds] == [(NUM, "0"), (NUM, str(STEPS_PER_EPOCH))]
    for number, row in enumerate(rounds, 1):
        manifest = read_manifest(tmp_path / "rounds" / f"round-000{number}")
        counts, look = manifest["counts"], manifest["one_look"]
        assert float(row["round/edits_per_draft"]) == pytest.approx(counts["edits"] / NUM)
        assert float(row["round/right_share"]) == pytest.approx(counts["right"] / NUM)
        assert float(row["round/seconds"]) > 0
        for name in ("p_fix", "p_break"):
            assert float(row[f"round/{name}"]) == pytest.approx(look[name])
            assert 0 <= look[name] <= 1
        assert float(row["round/yield"]) == 1
        assert float(row["round/drafts_per_s"]) > 0


@pytest.mark.parametrize(
    ("settings", "limit", "message"),
    [
        ({"rounds": 2}, {"max_steps": 3}, r"more than 1 epoch of 3 steps, .*=3; set data.epoch_batches=1,"),
        ({"rounds": 2, "at_start": False}, {"max_steps": 6}, "more than 2 epochs of 3 steps"),
        ({"rounds": 2, "every_n_epochs": 3}, {"max_steps": 9}, "more than 3 epochs of 3 steps"),
        ({"rounds": 3}, {"max_steps": -1, "max_epochs": 2}, "more than 2 epochs, but max_epochs=2"),
    ],
)
def test_rounds_that_would_never_be_due_are_refused(data, codec, tmp_path, settings, limit, message):
    trainer = trainer_for(tmp_path, [correction(codec, tmp_path, **settings)], **limit)
    with pytest.raises(ValueError, match=message):
        trainer.fit(Noisy(codec), datamodule=data_for(data, codec))
    assert not (tmp_path / "rounds").exists()


def test_trainer_that_keeps_its_loader_is_refused(data, codec, tmp_path):
    trainer = trainer_for(tmp_path, [correction(codec, tmp_path)], reload_dataloaders_every_n_epochs=0)
    with pytest.raises(ValueError, match="reload_dataloaders_every_n_epochs=1"):
        trainer.fit(Noisy(codec), datamodule=data_for(data, codec))


# --- the verbs ----------------------------------------------------------------------------------------------------


def draft_arguments(data: Path, model: Path, out: Path) -> list[str]:
    sizes = [f"data.response_length={LENGTH}", "data.batch_size=4", f"num={NUM}", "tokens_per_step=[16,32]", "seed=7"]
    sizes += [f"sampler.{name}=false" for name in ("eos_last", "eos_behind_eot", "early_stop")]
    sizes.append("sampler.reviser=null")
    return ["conf=draft", f"model.path={model}", f"data.path={data}", f"out={out}", *sizes]


@pytest.fixture
def model(codec, tmp_path) -> Path:
    save_pretrained(backbone(codec), codec, tmp_path / "model")
    return tmp_path / "model"


def test_draft_verb_draws_what_the_callback_draws(data, whole, model, tmp_path):
    src.draft.main(draft_arguments(data, model, tmp_path / "drafts"))
    online = whole[0] / "rounds" / "round-0001" / "drafts"
    names = sorted(path.name for path in online.glob("*.tar"))
    assert sorted(path.name for path in (tmp_path / "drafts").glob("*.tar")) == names
    assert all((tmp_path / "drafts" / name).read_bytes() == (online / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("change", "changes"),
    [
        (["round=2", "seed=6"], "round: 1 in the drafts, 2 now; data_seed: 7 in the drafts, 6 now"),
    ],
)
def test_drafts_of_other_data_are_refused(data, model, tmp_path, capsys, change, changes):
    src.draft.main(draft_arguments(data, model, tmp_path / "drafts"))
    with pytest.raises(SystemExit):
        src.draft.main([*draft_arguments(data, model, tmp_path / "drafts"), *change])
    message = f"error: {tmp_path / 'drafts'} holds drafts made with other settings ({changes}); choose another folder"
    assert capsys.readouterr().err.splitlines()[-1] == message
    other = tmp_path / "data"
    shutil.copytree(data, other)
    index = json.loads((other / "train" / "index.json").read_text())
    (other / "train" / "index.json").write_text(json.dumps({**index, "note": "other data"}))
    with pytest.raises(SystemExit):
        src.draft.main(draft_arguments(other, model, tmp_path / "drafts"))
    hashes = [hashlib.sha256((path / "train" / "index.json").read_bytes()).hexdigest() for path in (data, other)]
    assert f"(data: {hashes[0]} in the drafts, {hashes[1]} now);" in capsys.readouterr().err
