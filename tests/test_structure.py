"""The shape of the project: who imports whom, what files look like, and that configs, verbs and commands exist."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from src.cli.config import load_config
from src.cli.instantiate import check
from src.io.errors import UserError
from src.training.build import OFFERS
from testing.verbs import refusal

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("src", "callbacks", "datamodules")
MAX_LINES = 400
LONGER: dict[str, str] = {}  # file: why it may be longer
VERBS = ("train", "submit", "generate", "evaluate", "study", "prepare", "draft", "revise", "export", "serve", "demo")

# Who may import whom: a room, and the rooms below it that it may use and no other.
# `types` is src/types.py, `root` src/__init__.py. Every room may raise `src.io.errors.UserError`.
ROOMS = {
    row.split("<-")[0].strip(): set(row.split("<-")[1].split())
    for row in """
        root         <- cli
        io           <-
        scenes       <-
        cli          <- io
        types        <- io
        diffusion    <- types
        distributed  <- types io
        text         <- types io
        samplers     <- types diffusion
        models       <- types io text distributed
        metrics      <- types io diffusion text scenes
        chat         <- types io distributed
        objectives   <- types diffusion text samplers distributed scenes
        experts      <- types io text scenes chat
        judges       <- types io text scenes chat
        rounds       <- types io text distributed chat models
        preparation  <- types io text scenes models
        datamodules  <- types io text models
        generation   <- types io cli text models samplers datamodules
        serving      <- types io cli text models samplers datamodules generation
        evaluation   <- types io cli text models samplers datamodules metrics judges preparation generation
        adapters     <- types io text models samplers datamodules metrics generation
        callbacks    <- types io cli text models samplers distributed metrics rounds evaluation
    """.strip().splitlines()
}
TRAINING, VERB = set(ROOMS), {*ROOMS, "training"}  # src/training stands on all rooms, a verb on that too
FOR_ALL = "src.io.errors"

# Which rooms may use a package of others; one outside the table may be used nowhere. The maths knows no Lightning,
# no config and no tokenizer. Some rooms answer before torch is imported, which takes seconds.
WITHOUT_TORCH = {"root", "io", "scenes", "cli", "chat", "preparation", "prepare", "submit"}
THIRD_PARTY: dict[str, set[str]] = {
    "torch": {*VERB, *VERBS, "training"} - WITHOUT_TORCH,
    "numpy": {*VERB, *VERBS} - {"root", "cli", "chat"},
    "tqdm": {"io"},
    "tensorboard": {"training"},
    "PIL": {*VERB, *VERBS} - {"root", "cli", "chat", "types", "diffusion", "samplers", "objectives", "distributed"},
    "lightning": {"training", "objectives", "callbacks", "datamodules", "train"},
    "omegaconf": {"cli", "generation", "training", *VERBS},
    "yaml": {"cli", "judges", "text", "training"},
    "transformers": {"metrics", "models", "text"},
    "tokenizers": {"text"},
    "jinja2": {"text"},
    "rdkit": {"metrics"},
    "peft": {"models"},
    "torchao": {"objectives"},
    "openai": {"chat"},
    "aiohttp": {"chat"},
    "matplotlib": {"evaluation"},
    "safetensors": {"models"},
    "huggingface_hub": {"io", "models", "training"},
    "filelock": {"io"},
    "webdataset": {"io"},
    "pyarrow": {"preparation"},
    "fsspec": {"io"},
    "torchmetrics": {"metrics", "evaluation", "callbacks"},
    "scipy": {"evaluation"},
    "starlette": {"serving"},
    "pydantic": {"serving"},
    "uvicorn": {"serve"},
    "gradio": {"generation"},
    "lmms_eval": {"adapters"},
    "lm_eval": {"adapters"},
}

# How a yaml file is checked: the lowest layer it stands on -> its verb, what that offers, values for its `???`.
SCHEMAS: dict[str, tuple[str, tuple[str, ...], list[str]]] = {
    "base": ("train", OFFERS, []),
    "scenes": ("prepare", (), []),
    "photos": ("prepare", (), ["prepare.images=photos", "prepare.annotations=captions.json"]),
    "text": ("prepare", (), ["prepare.files=book.txt"]),
    "sft": ("prepare", (), ["prepare.files=gsm8k_train.jsonl"]),
    "smiles": ("prepare", (), ["prepare.files=qm9_smiles.csv"]),
    "generate": ("generate", (), ["model.path=model", "images=photos"]),
    "draft": ("draft", ("codec", "seed"), ["model.path=model", "data.path=data", "out=drafts"]),
    "revise": ("revise", ("codec",), ["drafts=drafts", "out=rounds/round-0001", "tokenizer=model"]),
    "evaluate": ("evaluate", ("codec", "seed", "batch_size"), []),
    "eval/capmas": ("evaluate", (), ["captions=mine.jsonl"]),
    "eval/report": ("evaluate", (), ["evaluate.runs=[runs/eval/capmas]"]),
    "study": ("study", (), []),
    "export": ("export", (), ["model=model", "out=exported"]),
    "serve": ("serve", (), ["model.path=model"]),
    "demo": ("demo", (), []),
}
# A layer, or a folder of layers, that is made to lie on top of others -> those.
ON_TOP: dict[str, list[str]] = {
    "quickstart": ["mask", "stage1", "stage2"],
    "ema": ["mask", "proseco", "stage2", "stage2,parallel/fsdp2"],
    "lora": ["stage1", "stage2", "stage1,llada_v", "stage2,llada_v,parallel/fsdp2", "mask,ema"],
    "quality": ["mask", "stage2", "proseco"],
    "metrics/": ["evaluate_photos"],
    "sampler/": ["draft"],
    "judge/": ["eval/capmas", "eval/caparena", "eval/rubric"],
    "judge/stand_in": ["eval/detailcaps"],  # on one without a judge, as others want `judge.model` here
    "expert/": ["revise", "stage2", "quickstart/stage2"],
    "base_phases/full": ["base_phases/pairs", "base_phases/brief", "base_phases/detailed"],
    "model/": ["mask", "stage1"],
    "cluster/": ["stage1", "stage2", "stage2,parallel/fsdp2"],
    "parallel/": ["mask", "stage1", "stage2", "proseco"],
    "task/": ["mask", "stage1"],
    "model/trained": ["mask,task/text", "stage1,task/smiles", "stage2,task/sft"],
    "llada_v": ["mask", "stage1", "stage2", "stage1,objective/rediff_released"],
    "model/llada": ["mask", "stage1", "stage2", "generate", "serve"],
    "model/llada_v": ["mask", "stage1", "stage2", "generate", "serve"],
    "objective/": ["stage1", "stage2"],
    "objective/rediff_released_stage2": ["stage2", "stage2,objective/rediff_released"],
}
# Values for the `???` of such a layer.
FILL: dict[str, list[str]] = {
    **{name: ["model.path=model"] for name in ("llada_v", "model/llada", "model/llada_v", "model/trained")},
    **{f"eval/{name}": ["judge.model=model"] for name in ("capmas", "caparena", "rubric")},
    "eval/calibrate": ["judge.model=model", "evaluate.old=verdicts.jsonl"],
    **{name: ["evaluate.models.model=model"] for name in ("sweep", "study/evaluate")},
    "data/rediff_260k": ["prepare.tokenizer=model"],
    "correct": ["captions=theirs.jsonl"],
    "expert/reading": ["expert.readings=readings.jsonl"],
}


def source_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    return short(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports anywhere, `a.b.c` for `from a.b import c`; relative imports are resolved."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str:
    """The room of a module: its folder, or the name of a file that lies flat in src/."""
    parts = module.split(".")
    return parts[0] if parts[0] != "src" else parts[1] if len(parts) > 1 else "root"


def forbidden(module: str, imported: list[str]) -> list[str]:
    """Those of the imported names that the room of a module may not use."""
    own = room_of(module)
    below = {own} | (VERB if own in VERBS else TRAINING if own == "training" else ROOMS[own])
    bad = []
    for name in imported:
        top = name.split(".")[0]
        if top in PACKAGES:
            allowed = room_of(name) in below or name.startswith(f"{FOR_ALL}.")
        else:
            allowed = top in sys.stdlib_module_names or own in THIRD_PARTY.get(top, set())
        if not allowed:
            bad.append(name)
    return bad


@pytest.mark.parametrize("path", source_files(), ids=short)
def test_rooms(path: Path) -> None:
    assert forbidden(module_name(path), list(imports(path))) == []


def test_no_module_imports_itself_in_a_circle() -> None:
    """Each level that is taken away imports nothing that is left; what stays goes in a circle."""
    modules = {module_name(path) for path in source_files()}
    uses = {module_name(path): {module_in(name, modules) for name in imports(path)} for path in source_files()}
    left = {module: users - {None, module} for module, users in uses.items()}
    while free := {module for module, needs in left.items() if not needs & left.keys()}:
        left = {module: needs for module, needs in left.items() if module not in free}
    assert left == {}


def module_in(name: str, modules: set[str]) -> str | None:
    """The module that an imported name is of, or is."""
    parts = name.split(".")
    return next((m for n in range(len(parts), 0, -1) if (m := ".".join(parts[:n])) in modules), None)


def test_no_file_is_too_long() -> None:
    lengths = {short(path): len(path.read_text(encoding="utf-8").splitlines()) for path in source_files()}
    too_long = {name for name, length in lengths.items() if length > MAX_LINES}
    assert too_long == set(LONGER)


def test_modules_say_what_they_are() -> None:
    silent = [short(path) for path in source_files() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


# configs


def config_names() -> list[str]:
    return sorted(path.relative_to(ROOT / "conf").with_suffix("").as_posix() for path in ROOT.glob("conf/**/*.yaml"))


def stacks(name: str) -> list[str]:
    """What to give to `conf=` in order to check a file: itself if it can stand alone, and on top of others."""
    below = ON_TOP.get(name, ON_TOP.get(f"{name.split('/')[0]}/", []))
    return [*([name] if lowest(name) in SCHEMAS else []), *(f"{lower},{name}" for lower in below)]


def lowest(name: str) -> str:
    """The file that a stack of layers stands on."""
    first = name.split(",")[0]
    bases = yaml.safe_load((ROOT / "conf" / f"{first}.yaml").read_text(encoding="utf-8")).get("base", [])
    return lowest(bases if isinstance(bases, str) else bases[0]) if bases else first


def compose(stack: str, settings: list[str], *, fill: bool = True) -> str:
    """Read a stack with the settings and bind every target of it; `fill` adds what must be given. Returns the verb."""
    schema = lowest(stack)
    assert schema in SCHEMAS, f"{schema}.yaml has no row in SCHEMAS: say which verb reads it"
    verb, offers, needed = SCHEMAS[schema]
    needed = [*needed, *(setting for layer in stack.split(",") for setting in FILL.get(layer, []))]
    given = {setting.partition("=")[0] for setting in settings}
    more = [setting for setting in needed if fill and setting.partition("=")[0] not in given]
    check(load_config([f"conf={stack}", *settings, *more], root=ROOT / "conf"), offers=offers)
    return verb


@pytest.mark.parametrize("name", config_names())
def test_every_config_composes_and_binds(name: str) -> None:
    assert stacks(name), f"{name}.yaml stands on no known schema: give it a row in SCHEMAS or ON_TOP"
    for stack in stacks(name):
        compose(stack, [])


@pytest.mark.parametrize(
    ("settings", "place", "value"),
    [
        ("conf=mask optim.micro_batch=8", "optim.micro_batch", 8),
        ("conf=mask trainer.accumulate_grad_batches=2", "trainer.accumulate_grad_batches", 2),
        ("conf=stage1 data.rounds=[rounds/round-0001]", "data.rounds", ["rounds/round-0001"]),
        ("conf=stage2 callbacks.self_correction.per_shard=64", "callbacks.self_correction.per_shard", 64),
        ("conf=mask +callbacks.mine={target: callbacks.stop.SaveAndStop}", "callbacks.mine.target", None),
        ("conf=stage2 expert=reference expert.max_words=2", "callbacks.self_correction.expert.max_words", 2),
        ("conf=scenes", "prepare.tokenizer", "assets/base"),
    ],
)
def test_settings_of_shipped_configs(settings: str, place: str, value: object) -> None:
    """What a user may say of a shipped config although its yaml does not, and what follows from it."""
    conf, *more = re.split(r" (?=\+?[\w.]+=)", settings)
    name = conf.removeprefix("conf=")
    _, offers, needed = SCHEMAS[lowest(name)]
    cfg = load_config([conf, *more, *needed], root=ROOT / "conf")
    check(cfg, offers=offers)
    selected = OmegaConf.select(cfg, place)
    assert selected == value if value is not None else selected


# verbs


def test_only_verbs_and_types_lie_flat() -> None:
    flat = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "src").glob("*.py")}
    assert flat.keys() == {"__init__", "types", *VERBS}
    assert {name for name, text in flat.items() if '__name__ == "__main__"' in text} == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_verb_answers_help_without_importing_torch(verb: str) -> None:
    tree = ast.parse((ROOT / "src" / f"{verb}.py").read_text(encoding="utf-8"))
    assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    command = [sys.executable, "-X", "importtime", "-m", f"src.{verb}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert {"yaml"} <= (imported := {line.split("|")[-1].strip() for line in done.stderr.splitlines()})
    assert not imported & {"torch", "lightning", "transformers", f"src.{verb}"}
    assert (ast.get_docstring(tree) or "?").splitlines()[0] in done.stdout
    assert f"python -m src.{verb} conf=" in done.stdout
    own = {name for name, row in SCHEMAS.items() if row[0] == ("train" if verb == "submit" else verb)}
    others = {name for name, row in SCHEMAS.items() if row[0] != ("train" if verb == "submit" else verb)}
    named = set(re.findall(r"(?m)^    ([\w/]+)", done.stdout.partition("configurations:")[2]))
    assert own <= named and not others & named


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_refuses_the_configs_of_others(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module(f"src.{verb}").main
    own = "train" if verb == "submit" else verb  # trainings are what it submits
    for name in sorted(schema for schema, row in SCHEMAS.items() if row[0] != own):
        error = refusal(main, [f"conf={name}"], capsys)
        assert re.fullmatch(rf"error: conf={name} is not for src\.{verb}: it has no key '\w+'; see --help\n", error)


# commands in README and Makefile


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def page_commands() -> list[str]:
    """Lines of shell in code blocks, and code within the text, of README and docs that run a verb or make."""
    commands = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)
        commands += [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
        commands += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    yours = ("...", "conf=keep_more", "conf=focal", "conf=poems", "cluster/mine")  # of files that the reader writes
    commands = [line for line in commands if not any(word in line for word in yours)]
    return [line for line in commands if re.match(r"(python -m src\.\w+ \w+=|make )", line)]


def check_verb(command: str, *, fill: bool = True) -> None:
    """`... -m src.VERB conf=NAME key=value ...`: that verb reads that configuration, and it composes and binds."""
    verb, *arguments = shlex.split(command.partition("-m src.")[2])
    assert verb in VERBS
    conf = [argument.removeprefix("conf=") for argument in arguments if argument.startswith("conf=")]
    if conf and not conf[0].endswith(".yaml"):
        settings = [argument for argument in arguments if not argument.startswith("conf=")]
        assert compose(conf[0], settings, fill=fill) == ("train" if verb == "submit" else verb)


def make_targets() -> set[str]:
    return set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split())  # type: ignore[index]


@pytest.mark.parametrize("command", sorted(set(page_commands())))
def test_command_of_a_page(command: str) -> None:
    if command.startswith("make "):
        assert {word for word in command.split()[1:] if "=" not in word} <= make_targets()
    else:
        check_verb(command)


def page_errors() -> list[tuple[str, str]]:
    """(command, what it says) of the mistakes that the pages show."""
    blocks = [b for page in PAGES for b in re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.S)]
    return [pair for block in blocks for pair in re.findall(r"^\$ (.*)\nerror: (.*)$", block, re.M)]


@pytest.mark.parametrize(("command", "message"), page_errors())
def test_error_of_a_page(command: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        check_verb(command, fill=False)
    assert str(error.value) == message


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_is_in_the_index() -> None:
    links = set(re.findall(r"\]\(([^)]+)\)", (ROOT / "docs" / "index.md").read_text(encoding="utf-8")))
    assert links == {page.name for page in PAGES[1:]} - {"index.md"}


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize("target", sorted(make_targets()))
def test_make_target_runs_existing_verbs(target: str) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(["make", "-n", target], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    for line in done.stdout.replace("\\\n", " ").splitlines():
        if "-m src." in line:
            check_verb(line.partition(" 2>&1")[0])
