"""The algorithm of docs/samplers.md, run as it stands there, against the sampler; its worked example, too."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from src.cli.config import load_config
from src.io.errors import UserError
from src.samplers.rediff import OverwriteAll
from src.samplers.reviser import Reviser
from src.samplers.sampler import Sampler
from tests.test_sampler_reference import KEYS, PROMPTS, SPECIAL, encode, ending, tiny

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(?:python|yaml)\n(.*?)```", (ROOT / "docs" / "samplers.md").read_text(), re.S)
ALGORITHM, REVISER, YAML, _ = BLOCKS


@pytest.mark.parametrize("attention", ["full", "prefix"])
@pytest.mark.parametrize("tokens_per_step", [1, 3, 5])
@pytest.mark.parametrize(("rewrite", "post_steps"), [(False, 0), (True, 0), (True, 3)])
def test_the_function_of_the_page_is_the_sampler(attention, tokens_per_step, rewrite, post_steps):
    names: dict = {}
    exec(compile(ALGORITHM, "docs/samplers.md", "exec"), names)
    sampler = Sampler(
        length=14,
        tokens_per_step=tokens_per_step,
        reviser=OverwriteAll() if rewrite else None,
        post_steps=post_steps,
    )
    edits = 0
    for model in (tiny(attention), ending(1)):
        sampled = sampler(model, encode(model, PROMPTS), special=SPECIAL, keys=KEYS, seed=0)
        edits += int(sampled.edits.sum())
        for row, prompt in enumerate(PROMPTS):
            options = {"length": 14, "tokens_per_step": tokens_per_step, "post_steps": post_steps, "rewrite": rewrite}
            ids, forwards = names["rediff"](model, encode(model, [prompt]), SPECIAL, **options)
            assert torch.equal(ids, sampled.ids[row])
            assert forwards == int(sampled.forwards[row])
    assert (edits > 0) == rewrite


def test_the_worked_example_runs(tmp_path, monkeypatch):
    module = ModuleType("src.samplers.rewrite_doubtful")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(REVISER, "docs/samplers.md", "exec"), module.__dict__)
    (tmp_path / "mine.yaml").write_text(YAML.replace("base: sampler/plain", f"base: {ROOT}/conf/sampler/plain.yaml"))
    reviser = load_config([f"conf={tmp_path}/mine.yaml"]).sampler.reviser
    model = tiny()
    sampler = Sampler(length=12, tokens_per_step=3, reviser=module.RewriteDoubtful(below=reviser.below))
    sampled = sampler(model, encode(model, PROMPTS), special=SPECIAL, keys=KEYS, seed=0)
    assert int(sampled.edits.sum()) > 0


def test_a_misspelt_hook_is_refused():
    with pytest.raises(UserError, match="overwite is no hook of Reviser; did you mean 'overwrite'"):
        type("Mine", (OverwriteAll,), {"overwite": OverwriteAll.overwrite})
    type("Mine", (Reviser,), {"_overwite": None, "below": 0.3, "overwrite": Reviser.overwrite})
