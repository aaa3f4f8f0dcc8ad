"""Every file of conf/sampler with a small random model: it ends, keeps its budget, and its calls are those made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from src.cli.config import load_part
from src.cli.instantiate import build
from src.models.llada_v import LLaDAV
from src.types import SpecialIds

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_BUDGET = ("flow", "uniform")  # every step of theirs is one call
NAMES = sorted(path.stem for path in (ROOT / "conf" / "sampler").glob("*.yaml"))
MASK, EOS, EOT, V = 0, 1, 2, 24
SPECIAL = SpecialIds(mask=MASK, eos=EOS, eot=EOT, banned=(MASK,), vocab_size=V)
KEYS = ["a", "b", "c"]


class Counting:
    """A model, and how many rows it was given."""

    def __init__(self, model):
        self.model, self.rows, self.encode_prefix = model, 0, model.encode_prefix

    def __call__(self, prefix, tokens, **where):
        self.rows += len(tokens)
        return self.model(prefix, tokens, **where)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LLaDAV(decoder={"vocab_size": V, **sizes}, vision=None).eval()


@torch.no_grad()
def sample(model, sampler):
    counting = Counting(model)
    prefix = model.encode_prefix({"prompt_ids": torch.tensor([[4, 9, 7], [5, 6, 21], [12, 4, 3]])})
    return sampler(counting, prefix, special=SPECIAL, keys=KEYS, seed=0), counting.rows


@pytest.mark.parametrize(("tokens_per_step", "cfg_scale"), [(4, 0.0), (8, 0.5)])
@pytest.mark.parametrize("name", NAMES)
def test_it_ends_and_counts_what_it_calls(model, name, tokens_per_step, cfg_scale):
    sampler = build({**load_part("sampler", name, root=ROOT / "conf"), "cfg_scale": cfg_scale})
    sampler = sampler.with_steps(tokens_per_step=tokens_per_step)  # as src.evaluate asks for its speeds
    found, rows = sample(model, sampler)
    assert MASK not in found.ids
    assert int(found.forwards.sum()) == rows
    if tokens_per_step == 8:
        assert torch.equal(found.ids, sample(model, sampler)[0].ids)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT_BUDGET])
def test_a_budget_is_kept_with_every_mask_filled(model, name):
    node = load_part("sampler", name, root=ROOT / "conf")
    sampler = build({**node, "max_forwards": 7, "steps": None, "tokens_per_step": 4})
    found, rows = sample(model, sampler)
    assert MASK not in found.ids
    assert found.forwards.max() <= 7  # passes of a corrector are counted too
    assert int(found.forwards.sum()) == rows
