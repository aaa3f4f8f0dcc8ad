"""Every file of conf/sampler with a small random model: it ends, keeps its budget, and its calls are those made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from src.cli.config import load_part
from src.cli.instantiate import build
from src.types import SpecialIds
from tests.backbones import Recording, small_model

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_BUDGET = ("flow", "uniform")  # every step of theirs is one call
NAMES = sorted(path.stem for path in (ROOT / "conf" / "sampler").glob("*.yaml"))
MASK, EOS, EOT, V = 0, 1, 2, 24
SPECIAL = SpecialIds(mask=MASK, eos=EOS, eot=EOT, banned=(MASK,), vocab_size=V)


@torch.no_grad()
def sample(sampler, **options):
    backbone = Recording(small_model(V, sharpness=1.0))
    prefix = backbone.encode_prefix({"prompt_ids": torch.tensor([[4, 9, 7], [5, 6, 21], [12, 4, 3]])})
    return sampler(backbone, prefix, special=SPECIAL, keys=["a", "b", "c"], seed=0, **options), len(backbone.texts)


@pytest.mark.parametrize(("tokens_per_step", "cfg_scale"), [(4, 0.0), (8, 0.5)])
@pytest.mark.parametrize("name", NAMES)
def test_it_ends_and_counts_what_it_calls(name, tokens_per_step, cfg_scale):
    sampler = build({**load_part("sampler", name, root=ROOT / "conf"), "cfg_scale": cfg_scale})
    sampler = sampler.with_steps(tokens_per_step=tokens_per_step)  # as src.evaluate asks for its speeds
    sampled, rows = sample(sampler)
    assert MASK not in sampled.ids
    assert int(sampled.forwards.sum()) == rows
    if tokens_per_step == 8:
        assert torch.equal(sampled.ids, sample(sampler)[0].ids)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT_BUDGET])
def test_a_budget_is_kept_with_every_mask_filled(name):
    node = load_part("sampler", name, root=ROOT / "conf")
    sampler = build({**node, "max_forwards": 7, "steps": None, "tokens_per_step": 4})
    sampled, rows = sample(sampler)
    assert MASK not in sampled.ids
    assert sampled.forwards.max() <= 7  # passes of a corrector are counted too
    assert int(sampled.forwards.sum()) == rows


@pytest.mark.parametrize("name", ["plain", "random", "threshold", "refine", "released", "edit_speed", "remdm_cap"])
def test_what_is_settled_stays(name):
    """Whatever a server has sent of a stream is the beginning of the response."""
    node = load_part("sampler", name, root=ROOT / "conf")
    node |= {"temperature": 1.0, "tokens_per_step": 4, "steps": None, **({"blocks": 4} if "blocks" in node else {})}
    sampler, most = build(node), 0
    sampled, _ = sample(sampler, trace=True)
    for ids, steps in zip(sampled.ids.tolist(), sampled.traces, strict=True):
        text = ids[: ids.index(EOT) + 1] if EOT in ids else ids
        for step in steps:
            count = sampler.settled(step.tokens, MASK)
            assert step.tokens[:count][: len(text)] == text[:count]
            most = max(most, count if MASK in step.tokens else 0)
    if name in ("plain", "refine", "random"):
        assert most >= 16  # words of a block at least, before the end
