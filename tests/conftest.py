"""Shared by all tests: one thread for tensors, and the golden set (tests/golden/README.md) as fixtures.

Tests and the processes that they start use one thread. The tensors are so small that more threads only cost time, and a
process forked while its parent has worker threads (as in tests with a kill) would wait for those threads forever.

The environment variable GOLDEN_LLADA_V names another golden set of the same layout. Its default is set here, because
test modules read the set when they are imported.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"  # for child processes
torch.set_num_threads(1)
GOLDEN = "GOLDEN_LLADA_V"
REQUIRED = (
    *("meta.json", "tokenizer.json", "prompt_case.json", "sampler_traces.json", "text_samplers.json"),
    *("train_results.json", "train_expected_fp64.json"),
    *(f"{name}{end}" for name in ("llada_v_tiny", "llada_text_tiny_olmo") for end in (".config.json", ".safetensors")),
)
os.environ[GOLDEN] = os.environ.get(GOLDEN) or str(Path(__file__).parent / "golden")


def pytest_configure() -> None:
    """Fail with one line, instead of an error in each test, if the golden set is incomplete."""
    folder = Path(os.environ[GOLDEN])
    missing = [name for name in REQUIRED if not (folder / name).is_file()]
    if missing or not any(folder.glob("vision_*.npz")):
        reason = f"it lacks {', '.join(missing or ['vision_*.npz'])}" if folder.is_dir() else "no such folder"
        raise pytest.UsageError(f"{GOLDEN}={folder} is not a golden set: {reason} (tests/golden/README.md)")
    os.environ[GOLDEN] = str(folder.resolve())


@dataclass(frozen=True)
class Golden:
    """A golden set: results of the reference programs on tiny models. Tests take all sizes and ids from it."""

    folder: Path

    @property
    def meta(self) -> dict:
        """Special ids and constants."""
        return self.json("meta")

    def json(self, name: str) -> dict:
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))

    def npz(self, name: str) -> dict[str, np.ndarray]:
        with np.load(self.folder / f"{name}.npz") as arrays:
            return dict(arrays)

    def link(self, name: str, folder: Path, *files: str) -> Path:
        """Make `folder` a Hugging Face directory of the model `name`, with further `files` of the set."""
        (folder / "config.json").symlink_to(self.folder / f"{name}.config.json")
        (folder / "model.safetensors").symlink_to(self.folder / f"{name}.safetensors")
        for file in files:
            (folder / file).symlink_to(self.folder / file)
        return folder


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden(Path(os.environ[GOLDEN]))


@pytest.fixture(scope="session")
def golden_folder_v(golden, tmp_path_factory) -> Path:
    """The multimodal model, in LLaDA-V's layout."""
    return golden.link("llada_v_tiny", tmp_path_factory.mktemp("llada_v"), "tokenizer.json")


@pytest.fixture(scope="session")
def golden_folder_text(golden, tmp_path_factory) -> Path:
    """The text model, in LLaDA-8B's layout. The set has no tokenizer for it."""
    return golden.link("llada_text_tiny_olmo", tmp_path_factory.mktemp("llada_text"))


@pytest.fixture(scope="session")
def golden_model(golden, golden_folder_v):
    """The multimodal model in float32. Shared: do not change its weights or mode."""
    from src.models.hf.folder import from_pretrained

    return from_pretrained(golden_folder_v, dtype="float32", vision=golden.meta["vision_config"]).eval()


@pytest.fixture(scope="session")
def golden_text_model(golden_folder_text):
    """The text model in float32. Shared: do not change its weights or mode."""
    from src.models.hf.folder import from_pretrained

    return from_pretrained(golden_folder_text, dtype="float32").eval()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """A dataset of 48 training scenes with its own small tokenizer."""
    from testing.scenes import write_scenes

    sizes = {"response_length": 40, "objects": [1, 1], "tokenizer": None, "prompt": "Describe."}
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", **sizes)


@pytest.fixture(scope="session")
def finished(scenes, tmp_path_factory) -> Path:
    """The folder of a finished run of ten steps on `scenes`. Shared: copy it before you change it."""
    from src.train import main
    from tests.test_train import arguments

    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    main(arguments(scenes, run_dir))
    return run_dir
