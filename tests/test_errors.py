"""What a verb says of a mistake: one line for a user's, a traceback for an exception out of a component.

The components are a user's own, in a module of a temporary folder that the `src` package finds.
"""

from __future__ import annotations

import errno
import importlib
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import src
from src.cli.entrypoint import main_guard
from src.models.hf.folder import from_pretrained
from src.preparation.scenes import Scenes

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "assets" / "base"
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

class Shapes(MaskPrediction):
    def positions(self, *given):
        return super().positions(*given) @ torch.zeros(3, 3)

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
    path = tmp_path_factory.mktemp("errors") / "scenes"
    Scenes(
        out=str(path), num_train=16, num_val=8, num_test=8, captions_per_image=1, objects=[1, 1], image_size=48,
        noise=0.0, vocab_size=512, prompt="Describe the picture.", response_length=64, tokenizer=str(BASE),
    ).run()  # fmt: skip
    return path


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


@pytest.fixture(params=[ValueError, RuntimeError])
def error(request: pytest.FixtureRequest, install: Callable[[str], None]) -> type[Exception]:
    """The kind of exception that every component of the module `src.mine` raises."""
    install(request.param.__name__)
    return request.param


def raised(verb: str, *argv: object) -> BaseException:
    """What comes out of a verb's main."""
    main = importlib.import_module(f"src.{verb}").main
    with pytest.raises(BaseException) as caught:  # noqa: PT011 -- also a SystemExit, which the callers tell apart
        main([str(word) for word in argv])
    return caught.value


def check(found: BaseException, error: type[Exception], message: str) -> None:
    """The user's own exception, from the line of the user's own file."""
    assert type(found) is error, repr(found)
    assert message in str(found)
    assert traceback.extract_tb(found.__traceback__)[-1].filename.endswith("mine.py")


def training(scenes: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        *("conf=mask", f"data.path={scenes}", f"run_dir={run_dir}", "data.batch_size=4", "trainer.max_steps=2"),
        *("optim.warmup_steps=1", "callbacks.samples=null", "callbacks.progress=null", *more),
    ]


@pytest.mark.parametrize(("target", "message"), [("Objective", "my objective"), ("Unbuilt", "my constructor")])
def test_train_shows_where_an_objective_failed(target, message, error, scenes, tmp_path):
    settings = training(scenes, tmp_path / "run", f"objective.target=src.mine.{target}")
    check(raised("train", *settings), error, f"{message} is broken")


def test_submit_shows_where_an_objective_failed(error, scenes, tmp_path):
    settings = training(scenes, tmp_path / "run", "objective.target=src.mine.Unbuilt", "dry=true")
    settings[0] = "conf=mask,cluster/example,parallel/fsdp2"
    found = raised("submit", *settings, "trainer.num_nodes=2", "trainer.devices=8")
    check(found, error, "my constructor is broken")


def test_generate_shows_where_a_sampler_failed(error, scenes, tmp_path):
    sampler = tmp_path / "mine.yaml"
    sampler.write_text(
        "sampler: {target: src.samplers.sampler.Sampler, length: 16, reviser: {target: src.mine.Broken}}\n"
    )
    images, out = scenes / "test", tmp_path / "out.jsonl"
    found = raised(
        "generate", "conf=generate", f"model.path={BASE}", f"images={images}", f"out={out}", f"sampler={sampler}"
    )
    check(found, error, "my reviser is broken")


def test_evaluate_shows_where_a_metric_failed(error, scenes, tmp_path):
    found = raised(
        "evaluate", "conf=evaluate", f"evaluate.models.mask={BASE}", "evaluate.models.stage1=null",
        "evaluate.models.stage2=null",
        f"evaluate.data.path={scenes}", f"evaluate.out={tmp_path / 'out'}", "evaluate.num=2",
        "evaluate.metrics=[{target: src.mine.Metric}]", "evaluate.tokens_per_step=[8]",
    )  # fmt: skip
    check(found, error, "my metric is broken")


def test_prepare_shows_where_a_dataset_failed(error, tmp_path):
    found = raised(
        "prepare", "conf=scenes", "prepare={target: src.mine.Files, out: %s, response_length: 4}" % (tmp_path / "d")
    )
    check(found, error, "my dataset is broken")


def test_an_error_of_the_system_keeps_its_traceback_too(install, tmp_path):
    install("OSError")
    settings = f"prepare={{target: src.mine.Files, out: {tmp_path / 'd'}, response_length: 4}}"
    check(raised("prepare", "conf=scenes", settings), OSError, "my dataset is broken")


def test_draft_and_revise_show_where_a_component_failed(error, scenes, tmp_path):
    drafting = ["conf=draft", f"model.path={BASE}", f"data.path={scenes}", "num=4", "tokens_per_step=[8]"]
    found = raised("draft", *drafting, f"out={tmp_path / 'bad'}", "sampler.reviser={target: src.mine.Broken}")
    check(found, error, "my reviser is broken")
    importlib.import_module("src.draft").main([*drafting, f"out={tmp_path / 'drafts'}"])
    found = raised(
        "revise", "conf=revise", f"drafts={tmp_path / 'drafts'}", f"out={tmp_path / 'round'}", f"tokenizer={BASE}",
        "expert={target: src.mine.Mine}",
    )  # fmt: skip
    check(found, error, "my expert is broken")


def test_export_shows_where_a_model_failed(error, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    config = f"{{format: 2, model: {{target: src.mine.model}}, tokenizer: {BASE}, objective: , trainer: , run_dir: }}"
    (run / "config.yaml").write_text(config)
    torch.save({"state_dict": {"backbone.x": torch.zeros(1)}, "global_step": 1}, run / "checkpoints" / "a.ckpt")
    found = raised("export", "conf=export", f"model={run / 'checkpoints' / 'a.ckpt'}", f"out={tmp_path / 'out'}")
    check(found, error, "my model is broken")


def test_wrong_shapes_keep_their_traceback(install, scenes, tmp_path):
    install("ValueError")
    found = raised("train", *training(scenes, tmp_path / "run", "objective.target=src.mine.Shapes"))
    assert type(found) is RuntimeError
    assert "mat1 and mat2" in str(found)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "conf=mask", "trainer.max_step=3"], "error: unknown key 'trainer.max_step'; did you mean"),
        (
            ["train", "conf=mask", "objective.floor=2"],
            "error: src.objectives.mask.MaskPrediction: floor must be at least",
        ),
        (["train", "conf=mask", "trainer.precision=8"], "error: trainer"),
        (["evaluate", "conf=evaluate", "evaluate.num=0"], "error: evaluate.num must be at least 1"),
        (["export", "conf=export", "model=nowhere", "out={out}"], "error: "),
    ],
)
def test_a_mistake_of_the_user_is_one_line(argv, message, tmp_path):
    run_dir = [f"run_dir={tmp_path / 'run'}"] if argv[0] == "train" else []
    command = [
        sys.executable,
        "-m",
        f"src.{argv[0]}",
        *(word.format(out=tmp_path / "o") for word in argv[1:]),
        *run_dir,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(message)
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_mistake_that_a_component_reports_is_one_line(install, scenes, tmp_path, capsys):
    install("UserError")
    found = raised("train", *training(scenes, tmp_path / "run", "objective.target=src.mine.Objective"))
    assert isinstance(found, SystemExit)
    assert found.code == 2
    assert "error: my objective is broken\n" in capsys.readouterr().err


def test_a_fault_of_the_machine_is_one_line_that_says_where(capsys):
    @main_guard
    def main(argv):
        raise PermissionError(errno.EACCES, "Permission denied", "/my/cache")

    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 1
    place = r"\(tests/test_errors\.py, line \d+\)"
    assert re.fullmatch(rf"\nerror: /my/cache: Permission denied {place}; once that .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("mistake", [IndexError("bad [Errno 13] x"), ConnectionResetError("peer"), OSError("plain")])
def test_what_only_looks_like_a_fault_of_the_machine_keeps_its_traceback(mistake):
    @main_guard
    def main(argv):
        raise mistake

    with pytest.raises(type(mistake)):
        main([])


def test_a_bug_in_the_model_is_no_damaged_folder(monkeypatch):
    monkeypatch.setattr("src.models.llada.RMSNorm.__init__", lambda self, *_, **__: self.no_such_thing)
    with pytest.raises(AttributeError, match="no_such_thing"):
        from_pretrained(str(BASE))


def test_a_mistake_in_a_worker_process_is_one_line(scenes, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    for shard in (data / "train").glob("*.tar"):
        shard.write_bytes(b"\0" * shard.stat().st_size)
    found = raised("train", *training(data, tmp_path / "run", "data.workers=1"))
    assert isinstance(found, SystemExit)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"error: .*readable", message)
    assert "Traceback" not in message
