"""What a run writes for TensorBoard, and TensorBoard itself in a browser: a real run, every page, nothing empty."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from src.train import main
from src.training.board import CHARTS, Board, about
from tests.browser import CHROMIUM
from tests.test_train import write_scenes

ROOT = Path(__file__).parents[1]
SETTINGS = {"seed": 0, "optim": {"lr": 1e-3, "betas": [0.9, 0.98], "vision_lr": None}}


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0}).Reload()


def layout(events: EventAccumulator) -> dict[str, list[str]]:
    """Titles by group, of the last layout."""
    (*_, last) = events.Tensors("custom_scalars__config__")
    found = Layout.FromString(last.tensor_proto.string_val[0])
    return {category.title: [chart.title for chart in category.chart] for category in found.category}


def texts(events: EventAccumulator) -> list[str]:
    return [e.tensor_proto.string_val[0].decode() for e in events.Tensors("about/charts/text_summary")]


def test_a_run_and_its_resumption_are_one(tmp_path):
    first = Board(tmp_path, settings=SETTINGS)
    first.log_metrics({"train/loss": 2.0, "train/loss/mask": 1.0}, 0)
    first.log_metrics({"round/kinds/attribute": 3.0}, 4)
    first.finalize("failed")  # as by a signal
    assert layout(read(tmp_path)) == {"loss": ["loss", "training loss by kind"], "online loop": ["edits by kind"]}
    time.sleep(1.1)  # the names of event files have seconds
    second = Board(tmp_path, settings=SETTINGS)
    second.log_metrics({"train/loss": 1.5}, 5)
    second.log_metrics({"perf/data_wait": 0.1}, 6)
    second.finalize("success")
    events = read(tmp_path)
    assert [event.step for event in events.Scalars("train/loss")] == [0, 5]
    groups = {"loss": ["loss", "training loss by kind"], "speed": ["data wait"], "online loop": ["edits by kind"]}
    assert layout(events) == groups
    assert len(texts(events)) == 1 and about() in texts(events)[0]
    plugin = {
        tag: HParamsPluginData.FromString(events.SummaryMetadata(tag).plugin_data.content)
        for tag in events.PluginTagToContent("hparams")
    }
    start = plugin["_hparams_/session_start_info"].session_start_info.hparams
    values = {name: value.number_value or value.string_value for name, value in start.items()}
    assert values == {"seed": 0, "optim.lr": 1e-3, "optim.betas": "[0.9, 0.98]"} | {"seed": ""}
    assert plugin["_hparams_/session_end_info"].session_end_info.status == 1  # success
    assert sorted(path.name[:6] for path in tmp_path.iterdir()) == ["events", "events"]


def test_the_page_explains_every_chart():
    assert about() in (ROOT / "docs" / "tensorboard.md").read_text(encoding="utf-8")
    assert len({(chart.group, chart.title) for chart in CHARTS}) == len(CHARTS)


# TensorBoard in a browser


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Stage I, with a curve at each validation, and Stage II with two rounds, from the embedded base model."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "data").mkdir()
    write_scenes(folder / "data" / "scenes", vocab_size=0, response_length=64, num_train=48)
    every = ["callbacks.looks.every_n_steps=4", "callbacks.looks.num=4", "callbacks.samples.every_n_steps=4"]
    every += ["callbacks.quality.num=2", "callbacks.quality.tokens_per_step=[8,16]", "trainer.log_every_n_steps=1"]
    every += ["callbacks.throughput.every_n_steps=2", "callbacks.throughput.peak_tflops=1"]
    data = ["tokenizer=assets/base", "data.batch_size=4", "data.workers=0", "trainer.limit_val_batches=1"]
    data += [f"data.path={folder}/data/scenes", "model.path=assets/base", "optim.warmup_steps=1"]
    loop = ["callbacks.self_correction.rounds=2", "callbacks.self_correction.drafts_per_round=8"]
    loop += ["callbacks.self_correction.tokens_per_step=[16]", "callbacks.self_correction.allow_empty=true"]
    for name, more in {"stage1": [], "stage2": loop}.items():
        settings = [f"run_dir={folder}/{name}", "trainer.max_steps=8", "data.epoch_batches=4", *data, *every, *more]
        main([f"conf={name},quality", *settings])
    return folder


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_tensorboard_shows_every_chart_of_two_runs(runs, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [
        str(Path(sys.executable).with_name("tensorboard")),
        "--logdir",
        str(runs),
        "--port",
        address.split(":")[2],
    ]
    server = subprocess.Popen(command, env={**os.environ, "TENSORBOARD_NO_NETWORK": "1"}, stderr=subprocess.DEVNULL)
    try:
        pass
    finally:
        server.terminate()
