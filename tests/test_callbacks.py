"""Samples and throughput in real small runs; what they wrote is read back from the event files."""

from __future__ import annotations

import io
import logging
import shutil
import tarfile

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from callbacks.probe import Probe
from callbacks.quality import Quality
from callbacks.samples import KEPT, NEW, OLD, REWRITTEN, SIDE, Samples
from callbacks.skipped import Skipped
from callbacks.throughput import Throughput
from datamodules.captions import CaptionData
from src.evaluation.drawing import PAD
from src.io.errors import UserError
from src.metrics.caption import CaptionMetric
from src.metrics.fixing import Looks, count_looks
from src.models.llada_v import LLaDAV
from src.objectives.base import Setup
from src.objectives.mask import MaskPrediction
from src.objectives.optim import Optim
from src.samplers.rediff import OverwriteAll
from src.samplers.sampler import Sampler
from src.text.tokenizer import Codec
from src.types import Sampled, TraceStep
from testing.scenes import write_scenes

LENGTH, BATCH = 48, 4


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    sizes = {"num_train": 40, "num_val": 6, "num_test": 1, "response_length": LENGTH, "per_shard": 64}
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", **sizes, tokenizer=None)


@pytest.fixture
def codec(path):
    return Codec.load(path / "tokenizer")


def fit(path, codec, run, callbacks, *, steps=4, ckpt=None, max_skipped=0.01, **options) -> L.Trainer:
    """A real training run; the checkpoint of its last step is `run/last.ckpt`."""

    def backbone():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
        decoder = {"vocab_size": codec.vocab_size, "attention": "prefix", **sizes}
        return LLaDAV(decoder=decoder, vision={"image_size": 48, "patch_size": 16, **sizes}, image_id=codec.image_id)

    setup = Setup(backbone=backbone, special=codec.special, optim=Optim(lr=1e-2, warmup_steps=1, decay=0.0))
    objective = MaskPrediction(setup)
    options = {"logger": TensorBoardLogger(run, name="tb", version=""), "limit_val_batches": 1, **options}
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    options |= {"max_steps": steps, "max_epochs": -1, "num_sanity_val_steps": 0, "log_every_n_steps": 1, **quiet}
    trainer = L.Trainer(callbacks=callbacks, accelerator="cpu", **options)
    sizes = {"batch_size": BATCH, "response_length": LENGTH, "image_size": 48, "max_skipped": max_skipped}
    data = CaptionData(path=str(path), codec=codec, **sizes)
    trainer.fit(objective, datamodule=data, ckpt_path=ckpt)
    trainer.save_checkpoint(run / "last.ckpt")
    return trainer


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def events(run) -> EventAccumulator:
    return EventAccumulator(str(run / "tb"), size_guidance={"images": 0, "tensors": 0, "scalars": 0}).Reload()


def samples(codec, **options) -> Samples:
    plain = Sampler(length=LENGTH, tokens_per_step=12)
    refine = Sampler(length=LENGTH, tokens_per_step=12, reviser=OverwriteAll(), post_steps=2)
    return Samples(sampler_plain=plain, sampler_refine=refine, codec=codec, **{"every_n_steps": 2, "num": 3, **options})


def test_samples_are_the_captions_of_the_model(path, codec, tmp_path):
    trainer = fit(path, codec, tmp_path, [samples(codec)])
    texts = events(tmp_path).Tensors("samples/captions/text_summary")
    assert [event.step for event in texts] == [2, 4]
    batch = validation_batch(path, codec, 3)
    backbone = trainer.lightning_module.backbone.eval()  # as it stands after step 4
    prefix = backbone.encode_prefix(batch.prefix)
    ids = Sampler(length=LENGTH, tokens_per_step=12)(
        backbone, prefix, special=codec.special, keys=batch.keys, seed=0
    ).ids.tolist()
    lines = texts[-1].tensor_proto.string_val[0].decode().splitlines()[2:]
    for line, key, row, record in zip(lines, batch.keys, ids, batch.records, strict=True):
        name, draft, _, reference = (cell.strip() for cell in line.strip("| ").split(" | "))
        assert name == key
        assert draft.replace("**", "").replace("\\", "").split() == codec.decode(row).split()
        assert reference == record["captions"][0]["text"]


def validation_batch(path, codec, num):
    data = CaptionData(path=str(path), codec=codec, batch_size=BATCH, response_length=LENGTH, image_size=48)
    return next(iter(data.val_dataloader())).rows(slice(0, num))


def sampled(codec, text, rewritten=()):
    """What a sampler returns for a text, with the places that its reviser rewrote."""
    ids = [*codec.encode(text)[0], codec.eot_id]
    step = TraceStep(ids, [], [(place, 0, ids[place]) for place in rewritten], [], [], 1, [])
    zero = torch.zeros(1, dtype=torch.int64)
    return Sampled(torch.tensor([ids + [codec.eos_id] * (LENGTH - len(ids))]), zero, zero, zero, zero, 0.0, [[step]])


@pytest.mark.parametrize(
    ("draft", "rewritten", "colours"),
    [
        ("A pink background carries two objects.", (), {KEPT}),
        ("A gray background carries two objects.", (1,), {KEPT, OLD, NEW, REWRITTEN}),
        ("", (), {NEW}),
    ],
)
def test_tokens_are_coloured_by_what_became_of_them(draft, rewritten, colours, path, codec, tmp_path):
    batch = validation_batch(path, codec, 1)
    refined = sampled(codec, "A pink background carries two objects.", rewritten)
    with SummaryWriter(str(tmp_path / "tb")) as writer:
        samples(codec).publish(writer, batch, sampled(codec, draft), refined, 7)
    (event,) = events(tmp_path).Images("samples/tokens")
    sheet = Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")
    assert event.step == 7
    assert colours == {KEPT, OLD, NEW, REWRITTEN} & {pixel for _, pixel in sheet.getcolors(1 << 20) or []}
    shown = np.asarray(sheet)[-PAD - SIDE : -PAD, PAD : PAD + SIDE]  # the last row of the sheet
    image = np.asarray(Image.open(io.BytesIO(batch.images[0])).convert("RGB"))
    assert (shown[1::3, 1::3] == image).all()  # 48 pixels at three times their size


def test_sampling_changes_nothing_in_training(path, codec, tmp_path):
    with_samples = fit(path, codec, tmp_path / "a", [samples(codec, every_n_steps=1)])
    without = fit(path, codec, tmp_path / "b", [])
    left, right = (t.lightning_module.state_dict() for t in (with_samples, without))
    assert all(torch.equal(left[name], right[name]) for name in right)
    assert all(module.training for module in with_samples.lightning_module.modules())


class Again(L.Callback):
    """Ends every batch twice: as where a step is skipped, the next batch ends at the same step."""

    def __init__(self, callback: L.Callback) -> None:
        self.callback = callback

    def on_train_batch_end(self, trainer, pl_module, *rest, **more):
        self.callback.on_train_batch_end(trainer, pl_module, *rest, **more)


def test_a_resumed_run_logs_each_step_once(path, codec, tmp_path):
    first = samples(codec)
    fit(path, codec, tmp_path, [first, Again(first), Throughput(every_n_steps=2)], steps=3)
    fit(path, codec, tmp_path, [samples(codec), Throughput(every_n_steps=2)], steps=6, ckpt=tmp_path / "last.ckpt")
    logged = events(tmp_path)
    assert [event.step for event in logged.Tensors("samples/captions/text_summary")] == [2, 3, 4, 6]  # 3: the last
    seen = logged.Scalars("perf/samples_seen")
    assert [(event.step, event.value) for event in seen] == [(2, 2 * BATCH), (4, 4 * BATCH), (6, 6 * BATCH)]
    assert [event.value for event in logged.Scalars("perf/tokens_seen")] == [LENGTH * event.value for event in seen]


def test_looks_are_logged_by_noise_level_and_once(path, codec, tmp_path):
    levels, options = [0.0, 0.5], {"every_n_steps": 2, "num": 5}
    first = Probe(metric=Looks(special=codec.special, levels=levels), **options)
    fit(path, codec, tmp_path, [first, Again(first)], steps=3)
    later = Probe(metric=Looks(special=codec.special, levels=levels), **options)
    trainer = fit(path, codec, tmp_path, [later], steps=4, ckpt=tmp_path / "last.ckpt")
    assert sum(len(batch) for batch in later.batches) == 5 and later.last_step == 4
    data = CaptionData(path=str(path), codec=codec, batch_size=5, response_length=LENGTH, image_size=48)
    batch = next(iter(data.val_dataloader()))
    backbone = trainer.lightning_module.backbone.eval()  # as it stands after step 4
    counts = count_looks(backbone, [batch], special=codec.special, levels=levels)
    for level, (fixed, wrong, broken, right) in zip(("0", "0.5"), counts.tolist(), strict=True):
        for name, share in {"p_fix": fixed / wrong, "p_break": broken / right}.items():
            seen = events(tmp_path).Scalars(f"{name}/t={level}")
            assert [event.step for event in seen] == [2, 3, 4]  # 3: the last of the first run
            assert seen[-1].value == pytest.approx(share)


class Length(CaptionMetric):
    names = ("length",)

    def score(self, text, record):
        return {"length": len(text)}


def test_quality_by_speed_is_measured_at_each_validation_and_continued(path, codec, tmp_path):
    speeds, options = [12, 48], {"val_check_interval": 2, "check_val_every_n_epoch": None}
    sampler = Sampler(length=LENGTH, tokens_per_step=1)

    def quality():
        return Quality(metric=Length(), sampler=sampler, codec=codec, tokens_per_step=speeds, num=3, name="length")

    fit(path, codec, tmp_path, [quality()], steps=2, **options)
    later = quality()
    trainer = fit(path, codec, tmp_path, [later], steps=4, ckpt=tmp_path / "last.ckpt", **options)
    logged, batch = events(tmp_path), validation_batch(path, codec, 3)
    assert [event.step for event in logged.Images("length/curve")] == list(later.curves) == [2, 4]
    backbone = trainer.lightning_module.backbone.eval()  # as it stands after step 4
    inputs = {"special": codec.special, "keys": batch.keys, "seed": 0}
    for speed in speeds:
        ids = sampler.with_steps(tokens_per_step=speed)(backbone, backbone.encode_prefix(batch.prefix), **inputs).ids
        seen = logged.Scalars(f"length/tokens_per_step={speed}")
        assert [event.step for event in seen] == [2, 4]
        assert seen[-1].value == pytest.approx(np.mean([len(codec.decode(row)) for row in ids.tolist()]))


class Rows:
    """A batch of vectors, as far as `Throughput` reads it."""

    def __init__(self, count: int) -> None:
        self.inputs, self.editable = torch.ones(count, 64), torch.ones(count, 8, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.inputs)


class OneLayer(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization, self.layer = False, torch.nn.Linear(64, 32, bias=False)

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.layer(batch.inputs).square().sum())
        self.optimizers().step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_utilization_counts_the_products_of_forward_and_backward(tmp_path):
    """mfu / samples per second * peak: 2 * 64 * 32 operations of a sample, as many for the gradient."""
    options = {"logger": TensorBoardLogger(tmp_path, name="tb", version=""), "enable_checkpointing": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    throughput = Throughput(every_n_steps=2, peak_tflops=1e-6)
    trainer = L.Trainer(max_steps=4, accelerator="cpu", callbacks=[throughput], default_root_dir=tmp_path, **options)
    batches = torch.utils.data.DataLoader([Rows(3), Rows(3), Rows(5), Rows(5)], batch_size=None, collate_fn=lambda b: b)
    trainer.fit(OneLayer(), batches)
    shares, rates = (events(tmp_path).Scalars(f"perf/{name}") for name in ("mfu", "samples_per_s"))
    operations = [share.value / rate.value * 1e6 for share, rate in zip(shares, rates, strict=True)]
    assert operations == [pytest.approx(4 * 64 * 32, rel=1e-4)] * 2


def test_throughput_tells_slow_data_from_slow_steps(path, codec, tmp_path, monkeypatch):
    """On a clock that only data and steps move, the share is exact: 3 s for a batch, 1 s for its step."""
    now = [0.0]
    monkeypatch.setattr("callbacks.throughput.time.perf_counter", lambda: now[0])

    class Clock(L.Callback):
        def on_train_batch_start(self, *_):
            now[0] += 1.0

        def on_train_batch_end(self, *_):
            now[0] += 3.0

        def on_validation_start(self, *_):
            now[0] += 1000.0

        def on_train_epoch_end(self, *_):
            now[0] += 1000.0

    fit(path, codec, tmp_path, [Throughput(every_n_steps=4), Clock()], steps=12, val_check_interval=5)
    waits, rates = (events(tmp_path).Scalars(f"perf/{name}") for name in ("data_wait", "samples_per_s"))
    assert all(wait.value <= 0.75 and rate.value <= BATCH for wait, rate in zip(waits, rates, strict=True))
    # steps 1 to 4: four steps of 1 s, three waits of 3 s (the first batch was there at once)
    assert waits[0].value == pytest.approx(9 / 13)
    assert rates[0].value == pytest.approx(4 * BATCH / 13)


def test_skipped_samples_are_logged_by_reason_over_restarts_and_limited(path, codec, tmp_path):
    """The only shard of 40 samples lacks its last quarter and has two broken images: 12 of each pass."""
    data = shutil.copytree(path, tmp_path / "data")
    (shard,) = (data / "train").glob("*.tar")
    with tarfile.open(shard) as tar:
        members = sorted((member.offset, member) for member in tar if member.name.endswith(".png"))
    content = bytearray(shard.read_bytes()[: members[30][0]])  # sample 30 has its JSON only
    for _, member in members[4:6]:
        content[member.offset_data : member.offset_data + member.size] = bytes(member.size)
    shard.write_bytes(content)
    pass_of_data = 40 // BATCH
    fit(data, codec, tmp_path, [Skipped(every_n_steps=5)], steps=pass_of_data)
    more = {"steps": 2 * pass_of_data, "ckpt": tmp_path / "last.ckpt"}
    fit(data, codec, tmp_path, [Skipped(every_n_steps=pass_of_data)], **more)
    logged = {tag: events(tmp_path).Scalars(tag) for tag in events(tmp_path).Tags()["scalars"] if "skipped" in tag}
    last = {tag: [(event.step, event.value) for event in points][-2:] for tag, points in logged.items()}
    assert last == {
        "data/skipped/missing": [(pass_of_data, 9), (2 * pass_of_data, 18)],
        "data/skipped/damaged": [(pass_of_data, 3), (2 * pass_of_data, 6)],
    }
    assert logged["data/skipped/missing"][0].step == 5
    message = rf"1\d samples were skipped, and data.max_skipped allows 9: .* {shard}: \d missing; {shard}: \d damaged$"
    with pytest.raises(UserError, match=message):
        fit(data, codec, tmp_path, [Skipped(every_n_steps=1)], steps=99, max_skipped=9)
    # a share is one of the epoch, and at least 100 samples: 96 after 8 passes, 108 after 9
    with pytest.raises(UserError, match=r"10\d samples were skipped, and data.max_skipped allows 100"):
        fit(data, codec, tmp_path, [Skipped(every_n_steps=1)], steps=99)
