"""How often the host waits for the device: counted on the CPU, where a wait costs nothing (`testing/syncs.py`)."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch

from src.cli.config import load_part
from src.cli.instantiate import build
from src.models.llada_v import LLaDAV
from src.objectives.base import Setup
from src.objectives.complementary import ComplementaryMasks
from src.objectives.mask import MaskPrediction
from src.objectives.optim import Optim
from src.objectives.proseco import ProSeCo
from src.objectives.refine import Refine
from src.objectives.revision import RevisionObjective
from src.samplers.rediff import OverwriteAll
from src.samplers.sampler import Sampler
from src.samplers.unmask import Bernoulli
from src.types import SpecialIds
from testing.syncs import CountSyncs
from tests.backbones import small_model
from tests.test_corruption import SPECIAL
from tests.test_objectives import QUIET, batch_with_prompt, tiny_backbone

ROOT = Path(__file__).resolve().parents[1]
IDS = SpecialIds(mask=0, eos=1, eot=2, banned=(0,), vocab_size=24)
NAMES = sorted(path.stem for path in (ROOT / "conf" / "sampler").glob("*.yaml"))


@torch.no_grad()
def count(sampler, *, trace=False):
    """(waits of the host, forward calls of the batch)."""
    model, calls = small_model(24, sharpness=1.0), []
    prefix = model.encode_prefix({"prompt_ids": torch.tensor([[4, 9, 7], [5, 6, 21], [12, 4, 3]])})
    model.register_forward_hook(lambda *_: calls.append(1))
    with CountSyncs(root=str(ROOT)) as syncs:
        sampled = sampler(model, prefix, special=IDS, keys=["a", "b", "c"], seed=0, trace=trace)
    return syncs.total, len(calls), sampled


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9}, {"trace": True}])
@pytest.mark.parametrize("check_every", [1, 4])
def test_the_host_waits_once_for_every_check(options, check_every):
    trace = options.pop("trace", False)
    waits = {}
    for steps in (8, 24):
        options = {**options, "reviser": OverwriteAll(), "check_every": check_every}
        waits[steps], calls, sampled = count(Sampler(length=24, steps=steps, **options), trace=trace)
        assert calls == steps
        assert sampled.forwards.tolist() == [steps] * 3
    assert waits[24] - waits[8] == 16 / check_every
    assert waits[8] - 8 / check_every <= (10 if trace else 2)  # once a response


@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_waits_at_most_once_for_a_check_and_a_further_call(name):
    node = load_part("sampler", name, root=ROOT / "conf")
    sampler = build({**node, "tokens_per_step": 4, "steps": None})
    waits, calls, sampled = count(sampler, trace=True)
    assert sampled.traces is not None
    # of each step one, also if no row asks; a correction ends with one that finds nothing more to do
    steps = max(map(len, sampled.traces))
    assert waits <= calls + 2 * steps + 10


@pytest.mark.parametrize("settings", [{}, {"early_stop": True}, {"unmask": Bernoulli(), "temperature": 1.0}])
def test_a_rarer_check_writes_the_same_and_counts_what_it_calls(settings):
    sampler = {"length": 24, "tokens_per_step": 3, "reviser": OverwriteAll(), "post_steps": 6, **settings}
    _, _, expected = count(Sampler(**sampler))
    _, calls, sampled = count(Sampler(**sampler, check_every=5))
    assert torch.equal(sampled.ids, expected.ids)
    assert sampled.edits.tolist() == expected.edits.tolist()
    assert (sampled.forwards >= expected.forwards).all()
    assert int(sampled.forwards.max()) == calls


@torch.no_grad()
def test_a_cached_step_is_few_operations():
    """Each is a kernel, which a GPU takes microseconds to start. Of 387 at 8 layers, 256 are the blocks: 7 matrix
    products, attention, 2 writes of keys and values, 6 rotary, 2 SwiGLU, 2 sums, and 12 of norms, which are 4 on a GPU,
    where RMSNorm is one kernel. 18 are the rest of the model, and 113 the sampler."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 8, "num_attention_heads": 2}
    model = LLaDAV(decoder={"vocab_size": 24, "attention": "prefix", **sizes}, vision=None)
    operations = {}
    for steps in (8, 24):
        prefix = model.encode_prefix({"prompt_ids": torch.tensor([[4, 9, 7]])})
        with CountSyncs(root=str(ROOT)) as count:
            sampler = Sampler(length=128, steps=steps, reviser=OverwriteAll())
            sampler(model, prefix, special=IDS, keys=["a"], seed=0)
        operations[steps] = count.operations
    assert (operations[24] - operations[8]) / 16 <= 387


def test_settings_that_do_not_fit_are_refused():
    for settings in ({"check_every": 0}, {"check_every": 2, "max_forwards": 9}):
        with pytest.raises(ValueError, match="check_every must be at least 1, and 1 with max_forwards, got"):
            Sampler(length=8, **settings)


class Counting(L.Callback):
    """Counts from the forward pass of a step to the end of its `training_step`."""

    def __init__(self):
        self.counts = []

    def on_train_batch_start(self, trainer, module, *_):
        step, module.training_step = module.training_step, None

        def counted(*arguments):
            with CountSyncs(root=str(ROOT)) as syncs:
                step(*arguments)
            self.counts.append(syncs)
            module.training_step = step

        module.training_step = counted


@pytest.mark.parametrize("cls", [MaskPrediction, RevisionObjective, Refine, ComplementaryMasks, ProSeCo])
def test_a_training_step_waits_three_times(cls, tmp_path):
    batch = batch_with_prompt()
    objective = cls(Setup(backbone=tiny_backbone, special=SPECIAL, optim=Optim(lr=1e-3)))
    counting = Counting()
    trainer = L.Trainer(max_steps=2, accelerator="cpu", callbacks=[counting], default_root_dir=tmp_path, **QUIET)
    trainer.fit(objective, torch.utils.data.DataLoader([batch, batch], batch_size=None, collate_fn=lambda b: b))
    for syncs in counting.counts:
        print(syncs.table())
        assert syncs.total <= 3
