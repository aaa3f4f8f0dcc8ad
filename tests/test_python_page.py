"""docs/python.md and examples/tour.ipynb run as they stand, with the embedded model."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest

from src.generation.captioner import Caption, Captioner
from tests.test_player import unpacked

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "tour.ipynb"


@pytest.fixture
def run(monkeypatch):
    """Runs blocks of code one after another in one namespace, from the project's folder, and returns it."""
    monkeypatch.chdir(ROOT)

    def run(blocks: list[str], name: str) -> dict:
        names: dict = {"__name__": "__main__"}
        for block in blocks:
            exec(compile(block, name, "exec", dont_inherit=True), names)
        return names

    return run


def test_the_blocks_of_the_page(run, capsys):
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    names = run(re.findall(r"```python\n(.*?)```", page, re.S), "docs/python.md")
    captioner, pictures = names["captioner"], names["pictures"]
    assert isinstance(captioner, Captioner) and len(names["captions"]) == 3
    assert all(isinstance(caption, Caption) and caption.text for caption in names["captions"])
    assert len({caption.text for caption in names["several"]}) > 1
    assert names["edits"] and names["state"].caption is None  # it left at the first edit, before the end
    assert names["revised"] == captioner.revise(pictures[0], names["requests"][-1].text, post_steps=4)
    never = captioner.caption(pictures, sampler="plain", reviser=names["RewriteDoubtful"](below=0.0), steps=16)
    assert [c.edits for c in never] == [0, 0, 0] and never == captioner.caption(pictures, sampler="plain", steps=16)
    assert sum(caption.edits for caption in names["mine"]) > 0
    # one batch is as good as several calls
    sampler = captioner.sampler("refine", steps=16, post_steps=2)
    assert names["answers"] == captioner.answer(names["requests"], sampler, batch_size=1)
    assert unpacked(names["page"])["names"] == ["plain", "refine"]


def cells() -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_the_cells_of_the_notebook(run, capsys):
    """Here without a kernel; `test_the_notebook_in_a_kernel` has one."""
    assert [cell["outputs"] for cell in cells()] == [[]] * len(cells())
    names = run(["".join(cell["source"]) for cell in cells()], NOTEBOOK.name)
    shown = capsys.readouterr().out
    assert "true: " in shown and "refine: " in shown
    document = unescape(re.search('srcdoc="(.*?)"', names["Player"]()._repr_html_(), re.S)[1])  # type: ignore[index]
    (text,) = unpacked(document)["texts"]
    assert [len(side["steps"]) for side in text["sides"]] == [len(steps) for steps in names["traces"].values()]
    assert text["image"].startswith("data:image/")
    edits = [int(number) for number in re.findall(r"(\d+) edits  ", shown)]
    assert edits[0] == 0 < edits[-1] and len(edits) == 4


@pytest.mark.slow
def test_the_notebook_in_a_kernel():
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert {"image/png", "text/html"} <= {kind for output in outputs for kind in output.get("data", {})}
    assert not [output for output in outputs if output.output_type == "error"]
