"""The model card of an exported model: README.md, with what the folders of its runs say of how it was made.

card = model_card("runs/stage2/model", model=model, scores="runs/quickstart/results.json")
card.save(folder / "README.md")

model or checkpoint -> its run -> the run that this started from -> ... -> a base without a run
each run: config.yaml (method, seed, steps), index.json of its data (sources, licences, samples)
"""

from __future__ import annotations

import subprocess
from contextlib import suppress
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from omegaconf import DictConfig, OmegaConf

from src.cli.help import docstring
from src.io.errors import UserError
from src.io.files import read_json
from src.io.hub import hub_name
from src.io.shards import INDEX
from src.models.hf.folder import fingerprint
from src.models.llada_v import LLaDAV
from src.training.run_dir import CONFIG, read_config

CARD = "README.md"
SHOWN = ("quality", "factuality", "coverage", "syntax")  # metrics of the table, where the results have them
LIMITS = """\
- It may state what the picture does not show, in the same words as what it does show: do not rely on it.
- Refining repairs tokens and breaks others: compare with `sampler="plain"` on your own pictures.
- It knows only what the data above hold; no filter for harmful or private content was applied beyond theirs.
"""
DRAWN = "drawn by this program"  # origin of scenes
USE = """```python
from src.generation.captioner import Captioner

captioner = Captioner.load("FOLDER")
captioner.caption("picture.png")[0].text
```
"""
SCENES = "- Its data are drawn scenes of a few shapes on a flat background: of photographs it says nothing true.\n"


def model_card(source: str | Path, *, model: LLaDAV, scores: str | None = None) -> ModelCard:
    """The card of what is exported from a model folder, a checkpoint or a name on the hub.

    model: with its weights
    scores: results.json of `src.evaluate`, for a table of the rows of this model

    Raises UserError for scores of another model.
    """
    runs, base = lineage(source)
    weights, data, kind = fingerprint(model), data_table(runs), "image-to-text" if model.layout else "text-generation"
    tags = ["masked-diffusion", "rediff-lightning"]
    header = ModelCardData(base_model=hub_name(base), pipeline_tag=kind, tags=tags).to_yaml()
    parts = [
        f"---\n{header}\n---\n\n# {runs[-1].name if runs else Path(source).name}\n",
        "A masked diffusion model, which writes text by unmasking it and may rewrite what it has written. Trained with "
        f"ReDiff-Lightning and exported by its {commit()}; fingerprint of the weights {weights}.\n",
        USE if model.layout else "",
        f"## How it was made\n\nIt starts from `{base}`" + (":\n" if runs else "; more is not known here.\n"),
        *(f"{number}. {describe(run)}\n" for number, run in enumerate(runs, start=1)),
        f"## Data and licences\n\n{data}",
        "## Scores\n\n" + (score_table(scores, weights) if scores else "None were given.\n"),
        "## Limits\n\n" + LIMITS + (SCENES if DRAWN in data else ""),
    ]
    return ModelCard("\n".join(part for part in parts if part))


def lineage(source: str | Path) -> tuple[list[DictConfig], str | Path]:
    """The configs of the runs that made a model or checkpoint, the first one first, and what the first started from."""
    runs: list[DictConfig] = []
    folders: set[Path] = set()
    while True:
        path = Path(source).resolve()
        folder = next((parent for parent in path.parents[:2] if (parent / CONFIG).is_file()), None)
        if folder is None or folder in folders or hub_name(source):  # a run may have been made again from its own child
            return runs, source
        folders.add(folder)
        runs.insert(0, read_config(folder))
        following = OmegaConf.select(runs[0], "model.path")
        if following is None:
            return runs, "random weights"
        source = following


def describe(run: DictConfig) -> str:
    """Method, steps, seed and expert of a run."""
    target, about = run.objective.target, ""
    with suppress(OSError):
        about = (docstring(target.rpartition(".")[0]) or "").partition("\n")[0]
    parts = [
        f"{about} `{target}`",
        f"{run.trainer.max_steps} steps of {run.data.batch_size} samples",
        f"seed {run.seed}",
    ]
    if expert := OmegaConf.select(run, "callbacks.self_correction.expert.target"):
        parts.append(f"its own drafts corrected by `{expert}`")
    return f"{run.name}: {'; '.join(parts)}."


def data_table(runs: list[DictConfig]) -> str:
    """The sources of the data of all runs, each dataset once, from its index.json."""
    if not runs:
        return "Not known here: see what it starts from.\n"
    rows: dict[str, None] = {}
    for path in (OmegaConf.select(run, "data.path") for run in runs):
        index = Path(str(path)) / INDEX
        sources = read_json(index).get("sources", []) if index.is_file() else []
        for source in sources or [{"licence": f"not known: no {index} here"}]:
            cells = [f"`{path}`", *(str(source.get(key) or "") for key in ("name", "licence", "origin"))]
            rows.setdefault("| " + " | ".join(cells) + " |")
    return "\n".join(["| dataset | source | licence | origin |", "|---|---|---|---|", *rows]) + "\n"


def score_table(path: str, weights: str) -> str:
    """The rows of the model with this fingerprint in a results.json. Raises UserError if there are none."""
    results = read_json(Path(path))
    names = [name for name, value in results["meta"]["models"].items() if value == weights]
    if not names:
        raise UserError(f"scores={path} has no results of this model (fingerprint {weights})")
    samplers = results["methods"][names[0]]
    cells = [cell for speeds in samplers.values() for cell in speeds.values()]
    metrics = [name for name in SHOWN if all(name in cell and cell[name]["mean"] is not None for cell in cells)]
    lines = [f"| sampler | tokens per step | {' | '.join(metrics)} |", "|---" * (2 + len(metrics)) + "|"]
    for sampler, speeds in samplers.items():
        for speed, cell in speeds.items():
            values = [f"{cell[name]['mean']:.3f} ± {cell[name]['se'] or 0:.3f}" for name in metrics]
            lines.append(f"| {sampler} | {speed} | {' | '.join(values)} |")
    data = results["meta"]["data"]
    count = f"{data['taken']} samples of the split `{data['split']}`, seed {results['meta']['seed']}"
    return "\n".join(lines) + f"\n\nMean and standard error over {count}; what they are: docs/evaluation.md.\n"


def commit() -> str:
    """The commit of the code that runs, with -dirty if it has changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return f"commit {done.stdout.strip()}" if done.stdout.strip() else "unknown commit"
