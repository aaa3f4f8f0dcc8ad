"""`make base` in its smallest form: each phase starts from the model of the one before, on the data made for it."""

from __future__ import annotations

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.models.hf.folder import from_pretrained
from src.prepare import main as prepare
from src.train import main as train

FEW = ["prepare.num_train=16", "prepare.num_val=8", "prepare.num_test=1", "prepare.processes=1"]
SHORT = [
    "data.batch_size=4",
    "data.workers=0",
    "trainer.max_steps=2",
    "trainer.limit_val_batches=1",
    "optim.warmup_steps=0",
]


@pytest.mark.slow
@pytest.mark.parametrize("twin", ["", ",base_phases/full"])
def test_the_phases_of_the_base_model_follow_each_other(tmp_path, twin):
    large, brief = tmp_path / "large", tmp_path / "brief"
    prepare(["conf=scenes_large", f"prepare.out={large}", *FEW])
    prepare(["conf=base_phases/brief_scenes", f"prepare.out={brief}", *FEW])
    runs = {name: tmp_path / name for name in ("tower", "brief-run", "detailed")}
    train(["conf=base_phases/tower", f"run_dir={runs['tower']}", f"data.path={brief}", *SHORT])
    words = ["callbacks.words.every_n_steps=1", "callbacks.words.num=8"]
    for name, start, data in (("brief-run", "tower", brief), ("detailed", "brief-run", large)):
        conf = f"conf=base_phases/{name.removesuffix('-run')}{twin}"
        start_from = f"model.path={runs[start] / 'model'}"
        train([conf, f"run_dir={runs[name]}", f"data.path={data}", start_from, *SHORT, *words])
        (events,) = runs[name].rglob("events.out*")
        logged = EventAccumulator(str(events)).Reload()
        assert [event.step for event in logged.Scalars("hidden word/relation")] == [1, 2]
    config = json.loads((runs["detailed"] / "model" / "config.json").read_text())
    assert config["decoder"]["attention"] == ("full" if twin else "prefix")
    assert (runs["detailed"] / "model" / "model.safetensors").stat().st_size <= 12e6
    assert from_pretrained(runs["detailed"] / "model").response_length == 128
