"""What a verb says of a mistake: one line for a user's, a traceback for an exception out of a component.

The components are a user's own, in a module of a temporary folder that the `src` package finds.
"""

from __future__ import annotations

import errno
import importlib
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import src
from src.cli.entrypoint import main_guard
from testing.scenes import BASE, write_scenes

ROOT = Path(__file__).resolve().parents[1]
MINE = """
import torch
from src.io.errors import UserError
from src.metrics.caption import CaptionMetric
from src.objectives.mask import MaskPrediction
from src.preparation.builder import Dataset
from src.samplers.reviser import Reviser
from src.types import Expert, Revision

class Objective(MaskPrediction):
    def corrupt(self, batch):
        raise ERROR("my objective is broken")

class Unbuilt(MaskPrediction):
    def __init__(self, setup, **options):
        super().__init__(setup, **options)
        raise ERROR("my constructor is broken")

class Metric(CaptionMetric):
    names = ("mine",)

    def score(self, text, record):
        raise ERROR("my metric is broken")

class Broken(Reviser):
    def refine(self, state, prediction, predict):
        raise ERROR("my reviser is broken")

class Mine(Expert):
    name = "mine"
    async def revise(self, drafts):
        raise ERROR("my expert is broken")
        yield

class Files(Dataset):
    def read(self, counts):
        raise ERROR("my dataset is broken")
    texts = samples = read

def model():
    raise ERROR("my model is broken")
"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("errors") / "scenes", num_train=16, objects=[1, 1])


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes the module `src.mine`, whose components raise an exception of that name."""

    def write(kind: str) -> None:
        (tmp_path / "components").mkdir()
        (tmp_path / "components" / "mine.py").write_text(MINE.replace("ERROR", kind))
        monkeypatch.setattr(src, "__path__", [*src.__path__, str(tmp_path / "components")])

    yield write
    sys.modules.pop("src.mine", None)
    src.__dict__.pop("mine", None)


TRAINING = [
    *("conf=mask", "data.path=SCENES", "run_dir=OUT", "data.batch_size=4", "trainer.max_steps=2"),
    *("optim.warmup_steps=1", "callbacks.samples=null", "callbacks.progress=null"),
]


def raised(verb: str, *argv: str, scenes: Path, out: Path) -> BaseException | None:
    """What comes out of a verb's main, if anything. SCENES and OUT in the arguments stand for these paths."""
    main = importlib.import_module(f"src.{verb}").main
    try:
        main([argument.replace("SCENES", str(scenes)).replace("OUT", str(out)) for argument in argv])
    except BaseException as error:  # noqa: BLE001 -- also a SystemExit, which the callers tell apart
        return error
    return None


SAMPLER = "{target: src.samplers.sampler.Sampler, length: 16, reviser: {target: src.mine.Broken}}"
DATASET = "prepare={target: src.mine.Files, out: OUT, response_length: 4}"
DRAFT = ["draft", "conf=draft", f"model.path={BASE}", "data.path=SCENES", "num=4", "tokens_per_step=[8]"]
REVISE = [
    "revise",
    "conf=revise",
    "drafts=OUT-drafts",
    "out=OUT",
    f"tokenizer={BASE}",
    "expert={target: src.mine.Mine}",
]
EVALUATE = [
    *("evaluate", "conf=evaluate", f"evaluate.models.mask={BASE}", "evaluate.models.stage1=null", "evaluate.num=2"),
    *("evaluate.models.stage2=null", "evaluate.data.path=SCENES", "evaluate.out=OUT", "evaluate.tokens_per_step=[8]"),
]
GENERATE = ["generate", "conf=generate", f"model.path={BASE}", "images=SCENES/test", "out=OUT", "sampler=OUT.yaml"]
SUBMIT = [
    *("submit", "conf=mask,cluster/example", *TRAINING[1:], "objective.target=src.mine.Unbuilt"),
    *("trainer.num_nodes=2", "trainer.devices=8", "dry=true"),
]


@pytest.mark.parametrize(
    ("kind", "part", "argv"),
    [
        (RuntimeError, "objective", ["train", *TRAINING, "objective.target=src.mine.Objective"]),
        (ValueError, "constructor", SUBMIT),
        (ValueError, "reviser", GENERATE),
        (ValueError, "metric", [*EVALUATE, "evaluate.metrics=[{target: src.mine.Metric}]"]),
        (OSError, "dataset", ["prepare", "conf=scenes", DATASET]),
        (ValueError, "reviser", [*DRAFT, "out=OUT", "sampler.reviser={target: src.mine.Broken}"]),
        (ValueError, "expert", REVISE),
        (ValueError, "model", ["export", "conf=export", "model=OUT-run/checkpoints/a.ckpt", "out=OUT"]),
    ],
)
def test_an_exception_of_a_component_keeps_its_traceback(kind, part, argv, install, scenes, tmp_path):
    """It leaves the verb's main as it is, from the line of the user's own file."""
    install(kind.__name__)
    out = tmp_path / "out"
    out.with_suffix(".yaml").write_text(f"sampler: {SAMPLER}\n")
    if argv is REVISE:
        raised(*DRAFT, f"out={out}-drafts", scenes=scenes, out=out)
    if argv[0] == "export":
        (tmp_path / "out-run" / "checkpoints").mkdir(parents=True)
        config = f"format: 2\nmodel: {{target: src.mine.model}}\ntokenizer: {BASE}\n"
        (tmp_path / "out-run" / "config.yaml").write_text(f"{config}objective:\ntrainer:\nrun_dir:\n")
        state = {"state_dict": {"backbone.x": torch.zeros(1)}, "global_step": 1}
        torch.save(state, tmp_path / "out-run" / "checkpoints" / "a.ckpt")
    error = raised(*argv, scenes=scenes, out=out)
    assert type(error) is kind, repr(error)
    assert f"my {part} is broken" in str(error)
    assert traceback.extract_tb(error.__traceback__)[-1].filename.endswith("mine.py")


def test_a_mistake_that_a_component_reports_is_one_line(install, scenes, tmp_path, capsys):
    install("UserError")
    error = raised("train", *TRAINING, "objective.target=src.mine.Objective", scenes=scenes, out=tmp_path / "run")
    assert isinstance(error, SystemExit)
    assert error.code == 2
    assert "error: my objective is broken\n" in capsys.readouterr().err


def test_a_fault_of_the_machine_is_one_line(capsys):
    @main_guard
    def main(argv):
        raise PermissionError(errno.EACCES, "Permission denied", "/my/cache")

    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 1
    assert re.fullmatch(r"error: /my/cache: Permission denied; once that .*\n", capsys.readouterr().err)


def test_a_mistake_in_a_worker_process_is_one_line(scenes, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    for shard in (data / "train").glob("*.tar"):
        shard.write_bytes(b"\0" * shard.stat().st_size)
    error = raised("train", *TRAINING, "data.workers=1", scenes=data, out=tmp_path / "run")
    assert isinstance(error, SystemExit)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"error: .*readable", message)
    assert "Traceback" not in message
