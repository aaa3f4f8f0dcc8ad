"""Training asks what inference asks: new noise in each pass over the data, and texts down to the last mask and none."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from datamodules.captions import CaptionData
from src.metrics.fixing import count_looks
from src.models.hf.folder import from_pretrained
from src.objectives.base import Setup
from src.objectives.optim import Optim, init_state
from src.objectives.revision import RevisionObjective
from src.prepare import main as prepare
from src.text.tokenizer import Codec
from src.train import main as train
from tests.test_captions import CANVAS, codec, folder, round_folder  # noqa: F401  (fixtures)
from tests.test_objectives import tiny_backbone


@pytest.mark.parametrize(("epochs", "batches"), [(1, 20), (4, 5), (2, 10)])
def test_four_passes_have_four_noise_levels_and_their_own_captions(folder, codec, epochs, batches):  # noqa: F811
    """20 samples seen four times: in one epoch that wraps, as in Stage II, in epochs of one pass, and of two."""
    data = CaptionData(
        path=str(folder), codec=codec, batch_size=4, response_length=CANVAS, image_size=4, epoch_batches=batches
    )
    loader = data.train_dataloader()
    objective = RevisionObjective(Setup(backbone=tiny_backbone, special=codec.special, optim=Optim(lr=1e-3)))
    levels, captions = defaultdict(list), defaultdict(list)
    for epoch in range(epochs):
        loader.epoch = lambda epoch=epoch: epoch
        for batch in loader:
            (state,) = objective.corrupt(batch)
            rows = zip(batch.keys, batch.passes, state.rate.tolist(), batch.response.tolist(), strict=True)
            for key, number, level, ids in rows:
                levels[key].append((number, level))
                captions[key].append(tuple(ids))
    assert len(levels) == 20
    for seen in levels.values():
        assert [number for number, _ in seen] == [0, 1, 2, 3]
        assert len({level for _, level in seen}) == 4
    assert sum(len(set(texts)) > 1 for texts in captions.values()) > 10  # of two captions, drawn anew in each pass


@pytest.mark.slow
def test_a_short_training_breaks_no_more_of_a_text_without_masks(tmp_path):
    """P(break) on texts without masks is at most 1.25 times that with a tenth of the tokens masked.

    With noise levels from 0.1 on, as this project once trained, it is larger: such texts were never seen.
    """
    shared = [f"data.path={tmp_path / 'data'}", "data.workers=0", "trainer.max_steps=150", "seed=0"]
    prepare(["conf=quickstart/scenes", f"prepare.out={tmp_path / 'data'}", "prepare.num_train=2000"])
    ratios = {}
    for t_min in (0.0, 0.1):
        run = tmp_path / f"run-{t_min}"
        train(["conf=stage1,quickstart", *shared, f"objective.t_min={t_min}", f"run_dir={run}"])
        model, codec = from_pretrained(run / "model").eval(), Codec.load(run / "model")  # noqa: F811
        data = CaptionData(path=str(tmp_path / "data"), codec=codec, batch_size=64, response_length=64, image_size=48)
        counts = count_looks(model, data.val_dataloader(), special=codec.special, levels=[0.0, 0.1])
        broken, right = counts[:, 2], counts[:, 3]
        ratios[t_min] = float((broken / right)[0] / (broken / right)[1])
    assert ratios[0.0] <= 1.25 < ratios[0.1]


@pytest.mark.parametrize("fused", [False, True])
def test_the_state_of_an_optimizer_made_in_advance_changes_no_step(fused):
    """Fused, as on a GPU, too."""
    weights = []
    for in_advance in (False, True):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 7))
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
        if in_advance:
            init_state(optimizer)
        for step in range(1, 4):
            weight.grad = torch.arange(7.0) / step
            optimizer.step()
        weights.append(weight.detach())
    assert torch.equal(*weights)
