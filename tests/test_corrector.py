"""ProSeCo's corrector on a small random model: against a loop written out, and in its limits.

The released sampler's own steps and calls are in tests/test_golden_sampler.py.
"""

from __future__ import annotations

import pytest
import torch

from src.batch import SpecialIds
from src.diffusion.corrector import Corrector
from src.diffusion.sampler import Sampler
from src.diffusion.unmask import Threshold
from src.models.llada_v import LLaDAV

MASK, EOS, EOT, V, LENGTH = 0, 1, 2, 24, 12
SPECIAL = SpecialIds(mask=MASK, eos=EOS, eot=V, banned=(), vocab_size=V)
PROMPTS = torch.tensor([[4, 9, 7], [5, 6, 21], [12, 4, 3]])
KEYS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LLaDAV(decoder={"vocab_size": V, **sizes}, vision=None).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model


def sample(model, sampler, rows=slice(None)):
    prefix = model.encode_prefix({"prompt_ids": PROMPTS[rows]})
    return sampler(model, prefix, special=SPECIAL, keys=KEYS[rows], seed=0, trace=True)


def by_hand(model, prompt, *, steps, blocks, every, passes):
    """One row, as lists: (tokens after each step, forward calls)."""
    prefix, size, x = model.encode_prefix({"prompt_ids": prompt[None]}), LENGTH // blocks, [MASK] * LENGTH
    states, calls = [], 0

    def say(tokens):
        nonlocal calls
        calls += 1
        return model(prefix, torch.tensor([tokens]))[0].double()

    def best_of(logits):  # the mask is never written
        return logits.index_fill(1, torch.tensor([MASK]), -torch.inf).argmax(-1).tolist()

    for block in range(blocks):
        end = (block + 1) * size
        for step in range(steps // blocks):
            logits = say(x)
            if (step + 1) % every == 0 and passes:
                draft = [b if t == MASK else t for b, t in zip(best_of(logits), x, strict=True)]
                for _ in range(passes):
                    second = say(draft)
                    better = best_of(second[:end])
                    logits[:end] = second[:end]
                    if better == draft[:end]:
                        break
                    draft[:end] = better
                x = [draft[i] if t != MASK and i < end else t for i, t in enumerate(x)]
            hidden = [i for i in range(end) if x[i] == MASK]
            best, sure = best_of(logits), logits.softmax(-1)
            count = -(-len(hidden) // (steps // blocks - step))
            for i in sorted(hidden, key=lambda i: -float(sure[i, best[i]]))[:count]:
                x[i] = best[i]
            states.append(list(x))
    return states, calls


@pytest.mark.parametrize(("blocks", "every", "passes"), [(1, 1, 1), (1, 2, 5), (2, 1, 3), (2, 3, 2), (3, 2, 4)])
@torch.no_grad()
def test_it_is_the_loop_written_out(model, blocks, every, passes):
    sampler = Sampler(length=LENGTH, steps=6, blocks=blocks, reviser=Corrector(every=every, passes=passes))
    found = sample(model, sampler)
    for row, prompt in enumerate(PROMPTS):
        states, calls = by_hand(model, prompt, steps=6, blocks=blocks, every=every, passes=passes)
        assert [step.tokens for step in found.traces[row]] == states
        assert int(found.forwards[row]) == calls
    assert found.edits.sum() > 0


@torch.no_grad()
def test_without_passes_it_is_the_plain_sampler(model):
    plain = sample(model, Sampler(length=LENGTH, steps=6, blocks=2))
    for reviser in (Corrector(passes=0), Corrector(every=4, passes=3)):  # a block has three steps: it never fires
        found = sample(model, Sampler(length=LENGTH, steps=6, blocks=2, reviser=reviser))
        assert torch.equal(found.ids, plain.ids)
        assert found.forwards.tolist() == plain.forwards.tolist() == [6] * 3


@torch.no_grad()
def test_a_row_does_not_depend_on_the_others(model):
    sampler = Sampler(length=LENGTH, steps=6, blocks=2, reviser=Corrector(every=1, passes=6))
    together = sample(model, sampler)
    assert len(set(together.forwards.tolist())) > 1  # rows agree with themselves after different numbers of passes
    for row in range(len(KEYS)):
        alone = sample(model, sampler, slice(row, row + 1))
        assert torch.equal(alone.ids[0], together.ids[row])
        assert alone.forwards[0] == together.forwards[row]


@torch.no_grad()
def test_the_scope_leaves_earlier_blocks_alone(model):
    changed = {}
    for scope in ("block", "written"):
        sampler = Sampler(length=LENGTH, steps=6, blocks=2, reviser=Corrector(passes=3, scope=scope))
        steps = [step for row in sample(model, sampler).traces for step in row[3:]]  # those of the second block
        changed[scope] = {place for step in steps for place, _, _ in step.rewritten}
    assert min(changed["block"], default=LENGTH) >= LENGTH // 2
    assert min(changed["written"]) < LENGTH // 2


@torch.no_grad()
def test_a_threshold_without_a_schedule_reveals_at_least_one(model):
    found = sample(model, Sampler(length=LENGTH, steps=2, unmask=Threshold(1.0, scheduled=False)))
    assert [len(step.unmasked) for step in found.traces[0]] == [1] * LENGTH
    budget = Sampler(length=LENGTH, steps=2, unmask=Threshold(1.0, scheduled=False), max_forwards=3)
    assert [len(step.unmasked) for step in sample(model, budget).traces[0]] == [1, 1, LENGTH - 2]


@pytest.mark.parametrize("wrong", [{"every": 0}, {"passes": -1}, {"scope": "all"}])
def test_wrong_settings(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        Corrector(**wrong)
