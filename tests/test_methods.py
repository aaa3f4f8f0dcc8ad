"""Every objective trains and samples in seconds; and on a toy language ProSeCo's training does what it is for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from src.generate import main as generate
from src.models.llada_v import LLaDAV
from src.objectives.base import Objective, Setup
from src.objectives.mask import MaskPrediction
from src.objectives.optim import Optim
from src.objectives.proseco import ProSeCo
from src.samplers.proseco import Corrector
from src.samplers.rediff import OverwriteAll
from src.samplers.sampler import Sampler
from src.train import main
from src.types import Batch, SpecialIds
from testing.files import read_jsonl
from testing.scenes import write_scenes
from tests.test_train import arguments

SAMPLERS = {
    "proseco": ("proseco", []),
    "complementary": ("shifted", []),
    "edit_noise": ("edit_quality", ["length=40"]),
    "hybrid": ("refine", []),
    "uniform": ("flow", []),
    "sampler_levels": ("refine", []),
    "self_draft": ("refine", []),
    "calibrated": ("calibrated", []),
}
QUICK = {"proseco", "uniform", "self_draft"}  # two passes, no masks, drafts of its own


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    sizes = {"num_train": 24, "response_length": 40, "objects": [1, 1], "tokenizer": None, "prompt": "Describe."}
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", **sizes)


@pytest.mark.parametrize(
    "conf", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SAMPLERS]
)
def test_a_method_trains_and_samples(conf, scenes, tmp_path):
    main(arguments(scenes, tmp_path / "run", "trainer.max_steps=2", "data.batch_size=4", conf=conf))
    sampler, more = SAMPLERS[conf]
    out = tmp_path / "captions.jsonl"
    model = f"model.path={tmp_path / 'run' / 'model'}"
    generate(["conf=generate", model, f"images={scenes}/test", f"out={out}", f"sampler={sampler}", "steps=4", *more])
    assert len({line["key"] for line in read_jsonl(out)}) == 8


# a toy language of eight words, whose letters count up from any start: one wrong letter shows

LENGTH, FIRST, SIZE = 12, 4, 8
TOY = SpecialIds(mask=0, eos=1, eot=2, banned=(0, 3), vocab_size=FIRST + SIZE)


def toy_batches(count: int, rows: int = 64) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        start = torch.randint(SIZE, (rows, 1), generator=generator)
        response = FIRST + (start + torch.arange(LENGTH)) % SIZE
        everywhere, nothing = torch.ones_like(response, dtype=torch.bool), torch.zeros_like(response)
        keys = [f"{number}-{row}" for row in range(rows)]
        drafted = torch.zeros(rows, dtype=torch.bool)
        prefix = {"prompt_ids": torch.full((rows, 1), TOY.eot)}
        yield Batch(prefix, response, everywhere, response, nothing, drafted, keys)


def is_word(tokens: torch.Tensor) -> torch.Tensor:
    """(B,) bool: whether a response is of the language."""
    return (tokens.diff(dim=1) % SIZE == 1).all(1) & (tokens >= FIRST).all(1)


def trained(kind: type[Objective], steps: int) -> nn.Module:
    def backbone() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        return LLaDAV(decoder={"vocab_size": TOY.vocab_size, **sizes, "rope_theta": 100.0}, vision=None, init_std=0.1)

    settings = {"weight": "one", "reduce": "answer_len", "t_min": 0.1}
    settings |= {"correct_weight": "one"} if kind is ProSeCo else {}
    objective = kind(Setup(backbone=backbone, special=TOY, optim=Optim(lr=3e-3)), **settings)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    for batch in toy_batches(steps):
        optimizer.zero_grad()
        views = objective.corrupt(batch)
        objective.forward_backward(batch, views, objective.denominators([(batch, views)]))
        optimizer.step()
    return objective.backbone.eval()


@pytest.fixture(scope="module")
def toys() -> dict[str, nn.Module]:
    """Both have made as many forward and backward passes."""
    return {"mask": trained(MaskPrediction, 600), "proseco": trained(ProSeCo, 300)}


def write(model: nn.Module, *, start: torch.Tensor | None = None, rows: int = 200, **settings) -> tuple[float, float]:
    """Share of words of the language, and forward calls."""
    prefix = model.encode_prefix({"prompt_ids": torch.full((rows, 1), TOY.eot)})
    keys = [str(row) for row in range(rows)]
    found = Sampler(length=LENGTH, **settings)(model, prefix, special=TOY, keys=keys, seed=0, start=start)
    return is_word(found.ids).double().mean().item(), found.forwards.double().mean().item()


def test_a_corrector_recovers_from_one_wrong_token_and_a_denoiser_cannot(toys):
    """Spec 5.5: with one token of a finished text made wrong. What is written stays, without a corrector."""
    (batch,) = toy_batches(1, rows=200)
    wrong = batch.response.clone()
    place = torch.arange(200) % LENGTH
    wrong[torch.arange(200), place] = FIRST + (wrong[torch.arange(200), place] - FIRST + 3) % SIZE
    assert not is_word(wrong).any()
    plain, _ = write(toys["proseco"], start=wrong, tokens_per_step=2)
    assert plain == 0
    shares = {name: write(model, start=wrong, reviser=OverwriteAll(), post_steps=2)[0] for name, model in toys.items()}
    assert shares["proseco"] > 0.9
    assert shares["proseco"] > shares["mask"] + 0.3


def test_few_steps_are_better_with_a_corrector_at_no_more_forward_calls(toys):
    settings = {"temperature": 1.0}
    plain = {name: write(model, tokens_per_step=2, **settings) for name, model in toys.items()}
    corrected = write(toys["proseco"], tokens_per_step=4, reviser=Corrector(every=1, passes=1), **settings)
    assert corrected[1] <= min(calls for _, calls in plain.values())
    assert corrected[0] > max(share for share, _ in plain.values()) + 0.1
