"""The worked examples of the pages: each file is made as it stands there, and used."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from src.cli.instantiate import build
from src.diffusion.corruption import start
from src.diffusion.noise import Noise
from src.objectives.base import Objective
from src.types import Draft, Kind
from tests.test_objectives import batch_with_prompt, gradients, make, means

ROOT = Path(__file__).parents[1]


@pytest.fixture
def example(monkeypatch):
    """Imports a file of a page under the name that its first line gives it."""

    def load(page: str, name: str) -> ModuleType:
        text = (ROOT / page).read_text(encoding="utf-8")
        (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if block.startswith(f"# {name}\n")]
        module = ModuleType(name.removesuffix(".py").replace("/", "."))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(code, page, "exec", dont_inherit=True), module.__dict__)
        return module

    return load


def test_the_objective(example):
    focal = example("docs/training.md", "src/objectives/focal.py")
    batch, terms, gradient = batch_with_prompt(), {}, {}
    for gamma in (0.0, 2.0):
        objective: Objective = make(focal.Focal, gamma=gamma, rate=0.3)
        terms[gamma] = means(objective, batch)
        gradient[gamma] = gradients(objective)
    assert terms[2.0]["mask"] < terms[0.0]["mask"]  # each factor is below 1
    assert terms[2.0]["syntax"] == terms[0.0]["syntax"] > 0
    assert not torch.equal(gradient[0.0], gradient[2.0])


def test_the_corruption(example):
    """Neighbours change places, and every kind of token but a clean one stays."""
    swap = example("docs/training.md", "src/diffusion/swap_neighbours.py").SwapNeighbours(rate=1.0)
    batch = batch_with_prompt()
    state = swap(batch, start(batch, torch.zeros(len(batch))), Noise(batch.keys, seed=0))
    moved = state.where(Kind.SYNTAX)
    assert torch.equal(state.tokens[~moved], batch.response[~moved])
    rows = zip(batch.response.tolist(), state.tokens.tolist(), batch.editable.tolist(), strict=True)
    for before, after, editable in rows:
        for at in range(0, len(before) - 1, 2):
            pair = before[at : at + 2]
            assert after[at : at + 2] == (pair[::-1] if all(editable[at : at + 2]) else pair)
    assert moved.any()


def test_the_objective_of_the_readme(example):
    keep_more = example("README.md", "src/objectives/keep_more.py")
    assert {term.name: term.coef for term in make(keep_more.KeepMore).terms}["clean"] == 2.0


def test_the_expert(example):
    glossary = example("docs/online.md", "src/experts/glossary.py")
    expert = glossary.Glossary(words={"large": "small"})
    text = "A large ring. The largest one is large."
    draft = Draft("a", "", text, [], 4, "", {}, "f", 0)

    async def answers():
        return [answer async for answer in expert.revise([draft])]

    ((key, revision),) = asyncio.run(answers())
    assert key == "a"
    assert [(edit.org, edit.target, edit.start_char) for edit in revision.edits] == [
        ("large", "small", 2),
        ("large", "small", 33),
    ]


def test_the_dataset(example, tmp_path):
    poems = example("docs/data.md", "src/preparation/poems.py")
    records = [{"title": f"Poem {n}", "text": f"Roses are red, number {n}."} for n in range(60)]
    records.append({"title": "Long", "text": "red " * 80})
    (tmp_path / "poems.jsonl").write_text("\n".join(map(json.dumps, [*records, {"title": "No text"}, {"text": 3}])))
    index = poems.Poems(out=str(tmp_path / "out"), file=str(tmp_path / "poems.jsonl"), response_length=64).run()
    written = {split: index["counts"][split]["written"] for split in ("train", "val", "test")}
    assert sum(written.values()) == 60 and min(written.values()) > 0
    assert index["counts"]["records"]["missing_field"] == 2
    assert sum(index["counts"][split].get("responses too long", 0) for split in written) == 1
    data = build(
        {"target": "datamodules.text.TextData", "path": str(tmp_path / "out"), "batch_size": 4, "response_length": 64},
        codec=poems.Codec.load(tmp_path / "out" / "tokenizer"), seed=0,
    )  # fmt: skip
    batch = next(iter(data.val_dataloader()))
    assert batch.response.shape[1] == 64
