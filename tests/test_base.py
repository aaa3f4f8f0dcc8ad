"""`make base` in its smallest form: each phase starts from the model of the one before, on the data made for it."""

from __future__ import annotations

import json
from random import Random

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.io.errors import UserError
from src.metrics.words import find_words
from src.models.hf.folder import from_pretrained
from src.objectives.base import Setup
from src.objectives.optim import Optim
from src.objectives.scene_relations import HiddenRelations
from src.prepare import main as prepare
from src.scenes.grammar import write_brief, write_caption
from src.scenes.graph import draw_scene
from src.text.tokenizer import Codec
from src.train import main as train
from src.types import Batch, Kind
from tests.test_sampler_configs import ROOT

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
    large, brief, pairs = tmp_path / "large", tmp_path / "brief", tmp_path / "pairs"
    prepare(["conf=scenes_large", f"prepare.out={large}", *FEW])
    prepare(["conf=base_phases/brief_scenes", f"prepare.out={brief}", *FEW])
    prepare(["conf=base_phases/pairs_scenes", f"prepare.out={pairs}", *FEW])
    runs = {name: tmp_path / f"{name}-run" for name in ("tower", "pairs", "brief", "detailed")}
    train(["conf=base_phases/tower", f"run_dir={runs['tower']}", f"data.path={brief}", *SHORT])
    words = ["callbacks.words.every_n_steps=1", "callbacks.words.num=8"]
    for name, start, data in (("pairs", "tower", pairs), ("brief", "pairs", brief), ("detailed", "brief", large)):
        conf = f"conf=base_phases/{name}{twin}"
        start_from = f"model.path={runs[start] / 'model'}"
        train([conf, f"run_dir={runs[name]}", f"data.path={data}", start_from, *SHORT, *words])
        (events,) = runs[name].rglob("events.out*")
        logged = EventAccumulator(str(events)).Reload()
        assert [event.step for event in logged.Scalars("hidden word/relation")] == [1, 2]
    config = json.loads((runs["detailed"] / "model" / "config.json").read_text())
    assert config["decoder"]["attention"] == ("full" if twin else "prefix")
    assert (runs["detailed"] / "model" / "model.safetensors").stat().st_size <= 12e6
    assert from_pretrained(runs["detailed"] / "model").response_length == 128


def test_hidden_relations_hide_the_words_that_the_probe_asks_for_and_nothing_else():
    """In as many rows as the share says; the words are found in the ids, and here in the text."""
    codec, rng = Codec.load(ROOT / "assets" / "base"), Random(0)
    scenes = [draw_scene(rng, objects=(2, 4), distinct=True) for _ in range(200)]
    texts = [write(scene, rng, relation_rates=[1.0, 1.0]) for scene in scenes for write in (write_brief, write_caption)]
    rows = [codec.encode(text) for text in texts]
    response = torch.full((len(rows), 128), codec.eos_id)
    for row, (ids, _) in enumerate(rows):
        response[row, : len(ids)] = torch.tensor(ids)
    batch = Batch(
        prefix={},
        response=response,
        editable=torch.ones_like(response, dtype=torch.bool),
        flawed=response,
        span=torch.zeros_like(response),
        drafted=torch.zeros(len(rows), dtype=torch.bool),
        keys=[str(row) for row in range(len(rows))],
    )
    setup = Setup(backbone=torch.nn.Identity, special=codec.special, optim=Optim(lr=1e-3))
    (state,) = HiddenRelations(setup, codec=codec, share=0.7, t_min=0.3).corrupt(batch)
    alone = 0
    for row, (text, (_, offsets)) in enumerate(zip(texts, rows, strict=True)):
        asked = [start for kind, start, _ in find_words(text) if kind == "relation"]
        words = {place for place, (first, last) in enumerate(offsets) if any(first <= start < last for start in asked)}
        hidden = set(state.where(Kind.MASK)[row].nonzero().flatten().tolist())
        assert hidden == set((state.tokens[row] == codec.mask_id).nonzero().flatten().tolist())
        alone += hidden == words
    assert alone / len(rows) == pytest.approx(0.7, abs=0.07)
    with pytest.raises(UserError, match="share must be within"):
        HiddenRelations(setup, codec=codec, share=2.0)
