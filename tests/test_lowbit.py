"""8-bit states and stochastic rounding, by torchao: their bias, their size, and that a resumed run draws the same."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from callbacks.checkpoint import AtomicCheckpointIO
from src.io.errors import UserError
from src.objectives.mask import MaskPrediction
from src.objectives.optim import Optim
from tests.test_objectives import QUIET, batch_with_prompt, make, tiny_backbone

pytest.importorskip("torchao", reason="needs the extra lowbit")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def eager():
    """torchao compiles each step, which takes longer than all tests."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize(("rounding", "share"), [("nearest", 0.0), ("stochastic", 1.0)])
@pytest.mark.parametrize("states", ["full", "8bit"])
def test_small_updates_are_lost_or_right_on_average(rounding, share, states):
    """Each step is 1/64 of the spacing of bfloat16 below 1; a constant gradient makes Adam's steps equal lr."""
    weights, lr, steps = torch.nn.Parameter(torch.ones(64, 1024, dtype=torch.bfloat16)), 2.0**-14, 8
    if (rounding, states) == ("nearest", "full"):
        optimizer = torch.optim.AdamW([weights], lr=lr, weight_decay=0.0)
    else:
        optim = Optim(lr=lr, rounding=rounding, states=states)
        optimizer = optim.optimizer([{"params": [weights], "lr": lr}])
    torch.manual_seed(0)
    for _ in range(steps):
        weights.grad = torch.ones_like(weights)
        optimizer.step()
    moved = (1 - weights.detach().double()).mean().item()
    # the spacing d below 1 is 2**-8: a share p = lr / d of the weights takes it, deviation d sqrt(p / n)
    deviation = 2.0**-8 * (steps * lr * 2**8 / weights.numel()) ** 0.5
    assert moved == pytest.approx(share * steps * lr, abs=4 * deviation)


class Watch(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.weights = torch.cat([p.detach().flatten() for p in pl_module.parameters()])


def fit(steps: int, ckpt=None) -> tuple[L.Trainer, torch.Tensor]:
    optim = Optim(lr=1e-2, warmup_steps=1, decay=0.0, states="8bit", rounding="stochastic")
    backbone = lambda: tiny_backbone(hidden_size=64, intermediate_size=64, vocab_size=64).bfloat16()  # noqa: E731
    watch, objective = Watch(), make(MaskPrediction, optim=optim, backbone=backbone)
    options = {**QUIET, "accelerator": "cpu", "precision": "bf16-true", "plugins": [AtomicCheckpointIO()]}
    trainer = L.Trainer(max_steps=steps, callbacks=[watch], **options)
    trainer.fit(objective, DataLoader([batch_with_prompt(4)] * steps, batch_size=None), ckpt_path=ckpt)
    return trainer, watch.weights


def test_a_resumed_run_rounds_as_one_that_was_not_interrupted(tmp_path):
    _, straight = fit(4)
    trainer, _ = fit(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    torch.manual_seed(99)
    _, resumed = fit(4, tmp_path / "half.ckpt")
    assert torch.equal(resumed, straight)
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["optimizer_states"][0]["state"].values()
    large = [values["exp_avg"] for values in state if values["exp_avg"].numel() >= 4096]
    assert large and all(values.codes.dtype == torch.uint8 for values in large)


def test_stochastic_rounding_of_float32_weights_is_refused():
    optim = Optim(lr=1e-3, rounding="stochastic")
    with pytest.raises(UserError, match="rounding=stochastic is for bfloat16 weights"):
        make(MaskPrediction, optim=optim).make_optimizer()
