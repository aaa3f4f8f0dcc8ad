"""The installed project: an editable install used from elsewhere, other packages of our names, dependencies."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("src", "callbacks", "datamodules")
THIRD_PARTY = sysconfig.get_paths()["purelib"]  # where torch and the others of this environment are


def run(command: list[str], *, cwd: Path, path: list[Path] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command with these folders in PYTHONPATH, then the dependencies, and none of this environment's .pth."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env["PYTHONPATH"] = os.pathsep.join([*map(str, path or []), THIRD_PARTY])
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project's files, so that installing leaves nothing in the real folder."""
    folder = tmp_path_factory.mktemp("project")
    for name in (*PACKAGES, "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "tests").mkdir()
    return folder


@pytest.fixture(scope="module")
def python(project: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of a new virtual environment with an editable install of the project."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    interpreter = str(home / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-deps", "--no-build-isolation"]
    done = run([*pip, "--no-index", "--ignore-installed", "--editable", str(project)], cwd=home)
    assert done.returncode == 0, done.stderr
    return interpreter


def test_installed_packages_come_from_the_project(python: str, project: Path, tmp_path: Path) -> None:
    show = "import src, callbacks, datamodules as d; print(src.__file__, callbacks.__file__, d.__file__, sep='\\n')"
    done = run([python, "-c", show], cwd=tmp_path)
    assert done.stdout.split() == [str(project / name / "__init__.py") for name in PACKAGES], done.stderr


def test_verb_runs_in_another_folder_with_empty_folders_of_our_names(python: str, tmp_path: Path) -> None:
    for name in PACKAGES:  # such as a user's own project has; they are importable, as namespace packages
        (tmp_path / name).mkdir()
    done = run([python, "-m", "src.train", "--help"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "objective/rediff_paper" in done.stdout  # the configurations are found too


@pytest.mark.slow
def test_a_wheel_has_the_files_that_code_reads(project: Path, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = run([*build, "--wheel-dir", str(tmp_path), str(project)], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    read = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.suffix in (".yaml", ".md")]
    assert {path.relative_to(ROOT).as_posix() for path in read} <= packed
    assert {"src/text/prompt_format.py", "src/text/prompts/llada_v.yaml", "src/training/job.sbatch"} <= packed


@pytest.mark.parametrize(("name", "as_package"), [("callbacks", True), ("datamodules", False)])
def test_another_package_of_our_name_is_an_error(name: str, as_package: bool, tmp_path: Path) -> None:
    other = tmp_path / name / "__init__.py" if as_package else tmp_path / f"{name}.py"
    other.parent.mkdir(exist_ok=True)
    other.touch()
    done = run([sys.executable, "-m", "src.train", "--help"], cwd=ROOT / "conf", path=[tmp_path, ROOT])
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: ReDiff-Lightning needs its own package `{name}` in {ROOT}")
    assert str(tmp_path / name) in last
    assert "remove or rename" in last


def test_every_import_is_a_dependency() -> None:
    """Of the project, or of an extra that users may install; lmms-eval asks for another torch, so it has none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [names for extra, names in project["optional-dependencies"].items() if extra != "dev"]
    named = [*project["dependencies"], *(name for names in extras for name in names)]
    dependencies = {re.split(r"[^A-Za-z0-9_.-]", name)[0].lower() for name in named}
    distributions = packages_distributions()
    missing = {
        top
        for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
        for top in top_level_imports(path) - sys.stdlib_module_names - {*PACKAGES, "lmms_eval"}
        if not dependencies
        & {top.lower(), top.replace("_", "-"), *(name.lower() for name in distributions.get(top, []))}
    }
    assert missing == set()


def top_level_imports(path: Path) -> set[str]:
    """First parts of the names of modules that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names
