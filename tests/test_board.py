"""What a run writes for TensorBoard, and TensorBoard itself in a browser: a real run, every page, nothing empty."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from src.preparation.scenes import Scenes
from src.train import main
from src.training.board import CHARTS, Board, about
from tests.browser import CHROMIUM, Chromium

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
    """Stage I, and Stage II with two rounds, both with a curve at each validation, from the embedded base model."""
    out = tmp_path_factory.mktemp("board")
    sizes = {"num_train": 48, "num_val": 4, "num_test": 4, "captions_per_image": 1, "objects": [1, 2], "noise": 2.0}
    settings = {"tokenizer": "assets/base", "image_size": 48, "response_length": 64, "prompt": "Describe."}
    Scenes(out=str(out / "data"), **sizes, **settings).run()
    every = ["callbacks.looks.every_n_steps=4", "callbacks.looks.num=4", "callbacks.samples.every_n_steps=4"]
    every += ["callbacks.quality.num=2", "callbacks.quality.tokens_per_step=[8,16]", "trainer.log_every_n_steps=1"]
    every += ["callbacks.throughput.every_n_steps=2", "callbacks.throughput.peak_tflops=1"]
    every += [f"data.path={out}/data", "data.batch_size=4", "data.workers=0", "model.path=assets/base"]
    every += ["trainer.max_steps=8", "data.epoch_batches=4", "trainer.limit_val_batches=1", "optim.warmup_steps=1"]
    loop = [f"callbacks.self_correction.{name}" for name in ("rounds=2", "drafts_per_round=8", "tokens_per_step=[16]")]
    for name, more in {"stage1": [], "stage2": loop}.items():
        main([f"conf={name},quality", f"run_dir={out}/runs/{name}", *every, *more])
    return out / "runs"


# All text of the page, also of its components, and the width of each picture that has loaded.
WALK = """(function walk(node) {
    let out = []
    for (const child of node.childNodes) {
        if (child.nodeType == 3 && child.data.trim()) out.push(child.data.trim())
        if (child.nodeType != 1 || ['STYLE', 'SCRIPT', 'TEMPLATE'].includes(child.tagName)) continue
        if (child.tagName == 'IMG' && child.naturalWidth > 8) out.push('image ' + child.naturalWidth)
        out = out.concat(child.shadowRoot ? walk(child.shadowRoot) : [], walk(child))
    }
    return out
})(document.body || document)"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_tensorboard_shows_every_chart_of_two_runs_and_asks_no_other_host(runs, tmp_path):
    layouts = [layout(read(runs / name)) for name in ("stage1", "stage2")]
    charts = {(group, title) for groups in layouts for group, titles in groups.items() for title in titles}
    assert {group for group, _ in charts} == {chart.group for chart in CHARTS}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [str(Path(sys.executable).with_name("tensorboard")), "--logdir", str(runs), "--port", port]
    server = subprocess.Popen([*command, "--host", "127.0.0.1"], stderr=subprocess.DEVNULL)
    expected = {
        "custom_scalars": {"stage1", "stage2", *(title for _, title in charts)},
        "text": {"about/charts/text_summary", "samples/captions/text_summary", "what it shows", "reference"},
        "images": {"samples/tokens", "quality/curve"},
        "hparams": {"stage1", "stage2", "objective.target", "trainer.max_steps"},
        "scalars": {"train", "val", "p_fix", "p_break", "quality", "perf", "round"},
    }
    try:
        deadline = time.monotonic() + 120
        while not served(f"http://127.0.0.1:{port}/data/runs"):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        with Chromium(tmp_path / "profile") as page:
            for name, words in expected.items():
                page.open(f"http://127.0.0.1:{port}/#{name}", height=6000)
                page.until(f"{json.dumps(sorted(words))}.every(word => {WALK}.includes(word))")
                if name == "custom_scalars":
                    page.until(f"{WALK}.filter(text => text.match(/^Matches .[1-9]/)).length == {len(charts)}")
                if name == "images":
                    page.until(f"{WALK}.filter(text => text.startsWith('image ')).length == 4")
                page.screenshot(tmp_path / f"{name}.png")
            assert page.errors == []
            hosts = {request.split("/")[2] for request in page.requests if not request.startswith("data:")}
            assert hosts == {f"127.0.0.1:{port}"}
    finally:
        server.terminate()
        server.wait()


def served(url: str) -> bool:
    """Whether TensorBoard has read both runs."""
    try:
        with urlopen(url) as answer:
            return set(json.load(answer)) == {"stage1", "stage2"}
    except OSError:
        return False
