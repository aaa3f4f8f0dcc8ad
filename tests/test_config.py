"""Config: layers, settings, checks before anything is built, and the errors a user meets.

Components come from a module written into a temporary folder of the `src` package, yaml files from a
temporary root.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ReadonlyConfigError

import src
from src.config import ConfigError, build, check, help_text, load_config, save_config

PARTS = '''
from __future__ import annotations
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional
if TYPE_CHECKING:
    from nowhere import Unknown

class Inner:
    """What a nested node makes."""
    def __init__(self, size: int = 1) -> None:
        if size < 0:
            raise ValueError(f"size must not be negative,\\n got {size}")
        self.size = size

class Outer:
    def __init__(
        self, *, name: str, rate: float = 0.5, deep: bool = False, mode: Literal["full", "prefix"] = "full",
        limit: int | None = None, sizes: Sequence[int] = (), pair: tuple[int, float] = (1, 2.0),
        odd: Unknown = None, parts: list[Inner] | None = None, table: dict | None = None,
        codec: object = None, maybe: Optional[float] = None, loose: int = None, level: Literal[0, 1] = 0,
    ) -> None:
        self.__dict__.update({k: v for k, v in locals().items() if k != "self"})

    @classmethod
    def load(cls, path: str) -> Outer:
        return cls(name=path)

@dataclass
class Plain:
    steps: int
    codec: Any

def open_ended(codec: Any = None, **rest: Any) -> dict:
    return {"codec": codec, **rest}

def closed(**rest: Any) -> dict:
    return rest

def where(path: Path) -> str:
    return open(path).read()

NUMBER = 3
'''

BASE = """
seed: 0
path: ???
model: {target: src.parts.Outer, name: small, sizes: [1, 2, 3], table: {a: 1, b: 2}}
optimizer: {lr: 1e-3, betas: [0.9, 0.95]}
callbacks: []
"""


@pytest.fixture
def parts(tmp_path, monkeypatch):
    folder = tmp_path / "components"
    folder.mkdir()
    (folder / "parts.py").write_text(PARTS)
    (folder / "broken.py").write_text("import a_library_that_is_not_there\n")
    monkeypatch.setattr(src, "__path__", [*src.__path__, str(folder)])
    yield
    for name in ("parts", "broken"):
        sys.modules.pop(f"src.{name}", None)
        src.__dict__.pop(name, None)


@pytest.fixture
def conf(tmp_path):
    """A writer of yaml files: `root = conf(base="...", other="...")`; `__` in a name stands for a folder."""

    def write(**files: str) -> Path:
        root = tmp_path / "conf"
        for name, text in files.items():
            path = root / f"{name.replace('__', '/')}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return root

    return write


def plain(cfg: DictConfig) -> dict:
    return OmegaConf.to_container(cfg)  # type: ignore[return-value]


def failure(function, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


# layers


def test_mappings_merge_and_lists_replace(conf):
    root = conf(
        base="a: {x: 1, y: {z: 2, w: 3}}\nsteps: [1, 2, 4]\nkeep: yes\n",
        top="base: base\na: {y: {z: 20}, new: 5}\nsteps: [8]\n",
    )
    expected = {"a": {"x": 1, "y": {"z": 20, "w": 3}, "new": 5}, "steps": [8], "keep": True}
    assert plain(load_config(["conf=top"], root=root)) == expected


def test_another_target_replaces_the_mapping_whole(conf):
    root = conf(
        base="m: {target: a.B, x: 1, inner: {target: a.C, y: 2}}\nn: {x: 1}\n",
        same="base: [base]\nm: {target: a.B, x: 5}\n",
        other="base: [base]\nm: {inner: {target: a.D, z: 3}}\nn: {target: a.E}\n",
    )
    assert load_config(["conf=same"], root=root).m == {
        "target": "a.B",
        "x": 5,
        "inner": {"target": "a.C", "y": 2},
    }
    other = plain(load_config(["conf=other"], root=root))
    assert other["m"] == {"target": "a.B", "x": 1, "inner": {"target": "a.D", "z": 3}}
    assert other["n"] == {"target": "a.E"}


def test_a_mapping_gives_way_to_null_and_back(conf):
    root = conf(base="m: {x: 1}\nn: null\n", top="base: [base]\nm: null\nn: {y: 2}\n")
    assert plain(load_config(["conf=top"], root=root)) == {"m": None, "n": {"y": 2}}


def test_layers_stack_from_left_to_right(conf):
    root = conf(base="x: 0\ny: 0\n", a="base: [base]\nx: 1\ny: 1\n", cluster__big="y: 2\n")
    assert plain(load_config(["conf=a,cluster/big"], root=root)) == {"x": 1, "y": 2}
    assert plain(load_config(["conf=base,cluster/big,a"], root=root)) == {"x": 1, "y": 1}


def test_a_shared_base_applies_once(conf):
    root = conf(
        base="x: base\ny: base\nz: base\n",
        left="base: [base]\nx: left\ny: left\n",
        right="base: [base]\ny: right\n",
        both="base: [left, right]\nz: both\n",
    )
    # applied twice, the base under `right` would undo x of `left`
    assert plain(load_config(["conf=both"], root=root)) == {"x": "left", "y": "right", "z": "both"}


def test_a_circle_of_bases_is_named(conf):
    root = conf(a="base: [b]\n", b="base: [cluster/c]\n", cluster__c="base: [b]\n")
    assert "b -> cluster/c -> b" in failure(load_config, ["conf=a"], root=root)


def test_the_lowest_layer_fixes_the_top_level(conf):
    root = conf(base="model: {}\noptimizer: {}\n", top="base: [base]\noptimiser: {lr: 1}\n")
    message = failure(load_config, ["conf=top"], root=root)
    assert message == "top: base has no top-level key 'optimiser'; did you mean 'optimizer'?"


def test_a_path_is_a_layer_and_its_base_is_looked_up_in_the_root(conf, tmp_path):
    root = conf(base="x: 1\ny: 1\n")
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: [base]\ny: 2\n")
    assert plain(load_config([f"conf={mine}"], root=root)) == {"x": 1, "y": 2}
    assert "gone.yaml" in failure(load_config, [f"conf={tmp_path / 'gone.yaml'}"], root=root)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("- 1\n- 2\n", "expected a mapping"), ("a: [1\n", "cannot read"), ("a: 1\na: 2\n", "duplicate key a"),
     ("base: {a: 1}\n", "expected a list of names"), ("base: [1]\n", "expected a list of names")],
)  # fmt: skip
def test_a_bad_file_is_named(conf, text, expected):
    message = failure(load_config, ["conf=bad"], root=conf(bad=text))
    assert "bad.yaml" in message
    assert expected in message


def test_a_relative_root_falls_back_to_the_folder_beside_the_package(conf, tmp_path, monkeypatch):
    deep = tmp_path.joinpath(*"abcdefghijklmnop")  # deeper than the repository
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    repository = Path(src.__file__).parents[1]
    relative = os.path.relpath(conf(base="x: 1\n"), repository)
    assert not Path(relative).exists()
    assert load_config(["conf=base"], root=relative).x == 1


# the command line


@pytest.mark.parametrize("argv", [[], ["seed=1"], ["conf="]])
def test_without_conf_the_choices_are_listed(conf, argv):
    message = failure(load_config, argv, root=conf(base="seed: 0\n", cluster__slurm="seed: 1\n"))
    assert message == "conf=NAME is missing; available: base, cluster/slurm"


def test_an_unknown_configuration_suggests_the_nearest(conf):
    message = failure(load_config, ["conf=stge1"], root=conf(stage1="x: 1\n", mask="x: 1\n"))
    assert message == "no configuration 'stge1'; did you mean 'stage1'?; available: mask, stage1"


@pytest.mark.parametrize(
    ("setting", "value"),
    [("m.x=1e-4", 1e-4), ("m.x=7", 7), ("m.x=null", None), ("m.x=", None), ("m.x=true", True),
     ("m.x='1'", "1"), ("m.x=a=b", "a=b"), ("m.x=[1,2.5]", [1, 2.5]), ("m.x={new: 1}", {"new": 1}),
     ("m.x=/a,b", "/a,b")],
)  # fmt: skip
def test_a_setting_is_read_as_yaml(conf, setting, value):
    found = plain(load_config(["conf=base", setting], root=conf(base="m: {x: 0, y: 1}\n")))
    assert found == {"m": {"x": value, "y": 1}}
    assert type(found["m"]["x"]) is type(value)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("m={x: 3}", {"m": {"x": 3, "l": [1, 2]}, "n": {4: "y"}}), ("m={}", {"m": {}, "n": {4: "y"}}),
     ("m={target: a.Z, w: 1}", {"m": {"target": "a.Z", "w": 1}, "n": {4: "y"}}),
     ("m.l.1=5", {"m": {"x": 0, "l": [1, 5]}, "n": {4: "y"}}),
     ("n.4=z", {"m": {"x": 0, "l": [1, 2]}, "n": {4: "z"}})],
)  # fmt: skip
def test_settings_reach_into_mappings_and_lists(conf, setting, expected):
    root = conf(base="m: {x: 0, l: [1, 2]}\nn: {4: y}\n")
    assert plain(load_config(["conf=base", setting], root=root)) == expected


def test_the_last_setting_wins_over_every_layer(conf):
    root = conf(base="x: 1\n", top="base: base\nx: 2\n")
    assert load_config(["x=3", "conf=top", "x=4"], root=root).x == 4


@pytest.mark.parametrize(
    ("setting", "nearest"),
    [("optimizer.lrr=1", "optimizer.lr"), ("optimiser.lr=1", "optimizer.lr"), ("lr=1", "optimizer.lr"),
     ("--optimizer.lr=1", "optimizer.lr"), ("sede=1", "seed"), ("optimizer.betas.2=1", "optimizer.betas.1"),
     ("optimizer={lrate: 1}", "optimizer.lr"), ("seed.x=1", "seed")],
)  # fmt: skip
def test_a_typo_suggests_the_nearest_full_name(conf, setting, nearest):
    message = failure(load_config, ["conf=base", "path=x", setting], root=conf(base=BASE))
    assert message.startswith("unknown key")
    assert message.endswith(f"did you mean '{nearest}'?")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [("seed", "expected key=value, got 'seed'"), ("seed=[1,", "seed: cannot read '[1,' as yaml"),
     ("conf=base", "conf= is given twice"), ("seed=${a", "seed: cannot read")],
)  # fmt: skip
def test_a_malformed_argument_is_named(conf, argument, expected):
    assert expected in failure(load_config, ["conf=base", argument], root=conf(base=BASE))


def test_all_missing_values_are_listed_together(conf):
    root = conf(base="path: ???\nmodel:\n  size: ???\n  heads: 2\nlist:\n- a: ???\n")
    message = failure(load_config, ["conf=base"], root=root)
    assert message == "these keys must be given: path, model.size, list.0.a"
    argv = ["conf=base", "path=x", "model.size=1"]
    assert failure(load_config, argv, root=root) == "these keys must be given: list.0.a"
    assert load_config([*argv, "list.0.a=2"], root=root).list[0].a == 2


# resolution and saving


def test_interpolations_are_resolved_after_all_layers(conf, monkeypatch):
    monkeypatch.setenv("REDIFF_TEST_HOME", "here")
    text = "name: a\nout: runs/${name}\nhome: ${oc.env:REDIFF_TEST_HOME}\ntwin: ${tree}\ntree: {x: [1]}\n"
    root = conf(base=text)
    cfg = load_config(["conf=base", "name=b", "tree.x=[2]"], root=root)
    assert (cfg.out, cfg.home, cfg.twin) == ("runs/b", "here", {"x": [2]})


@pytest.mark.parametrize(
    ("value", "expected"),
    [("${nmae}", "m.k: Interpolation key 'nmae' not found"),
     ("${foo:1}", "m.k: Unsupported interpolation type foo"), ("${m.k}", "m.k: "),
     ("${oc.env:REDIFF_NOT_SET}", "REDIFF_NOT_SET"), ("\\${name}", "m.k: an escaped '${'")],
)  # fmt: skip
def test_a_bad_interpolation_is_one_line_that_names_its_place(conf, value, expected):
    message = failure(load_config, ["conf=base"], root=conf(base=f"name: a\nm: {{k: '{value}'}}\n"))
    assert expected in message
    assert len(message.splitlines()) == 1


def test_the_config_is_read_only(conf):
    cfg = load_config(["conf=base", "path=x"], root=conf(base=BASE))
    with pytest.raises(ReadonlyConfigError):
        cfg.seed = 1
    with pytest.raises(ReadonlyConfigError):
        cfg.model.table.a = 1
    with pytest.raises(ReadonlyConfigError):
        cfg.optimizer.betas.append(1)


def test_a_saved_config_repeats_the_run(conf, tmp_path):
    root = conf(base=BASE, top="base: base\nmodel: {name: '${path}-1e-4'}\n", debug="seed: 5\n")
    cfg = load_config(["conf=top", "path=x", "optimizer.lr=3e-05"], root=root)
    saved = tmp_path / "runs" / "one" / "config.yaml"
    save_config(cfg, saved)
    assert [path.name for path in saved.parent.iterdir()] == ["config.yaml"]
    assert yaml.safe_load(saved.read_text())["model"]["name"] == "x-1e-4"
    nowhere = tmp_path / "no-such-root"
    assert load_config([f"conf={saved}"], root=nowhere) == cfg
    assert load_config([f"conf={saved}", "optimizer.lr=1"], root=nowhere).optimizer.lr == 1
    stacked = load_config([f"conf={saved},debug"], root=root)
    assert (stacked.seed, stacked.optimizer.lr) == (5, 3e-05)
    assert "would undo" in failure(load_config, [f"conf={saved},top"], root=root)


def test_saving_replaces_an_older_file(conf, tmp_path):
    root = conf(base="x: 1\n")
    target = tmp_path / "config.yaml"
    target.write_text("x: older and much longer\n")
    save_config(load_config(["conf=base"], root=root), target)
    assert target.read_text() == "x: 1\n"


# check


@pytest.mark.usefixtures("parts")
def test_a_right_config_passes():
    nested = {"target": "src.parts.Inner", "size": 2}
    node = {
        "target": "src.parts.Outer", "name": "x", "rate": 1, "deep": True, "mode": "prefix", "limit": None,
        "sizes": [1, 2], "pair": [1, 2], "odd": "unjudged", "parts": [nested], "table": {"in": nested},
        "maybe": 0.5, "loose": None,
    }  # fmt: skip
    linear = {"target": "torch.nn.Linear", "in_features": 2, "out_features": 3}
    check(OmegaConf.create({"a": node, "b": [{"c": node}], "d": linear}))


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({"rate": "1e-3"}, "m.rate: expected float, got '1e-3'"),
     ({"rate": True}, "m.rate: expected float, got True"),
     ({"name": 3}, "m.name: expected str, got 3"), ({"name": None}, "m.name: expected str, got None"),
     ({"deep": 1}, "m.deep: expected bool, got 1"), ({"limit": 1.5}, "m.limit: expected int | None, got 1.5"),
     ({"limit": False}, "m.limit: expected int | None, got False"),
     ({"mode": "ful"}, "m.mode: expected Literal['full', 'prefix'], got 'ful'"),
     ({"sizes": [1, "2"]}, "m.sizes: expected collections.abc.Sequence[int], got [1, '2']"),
     ({"sizes": "12"}, "m.sizes: expected"), ({"pair": [1]}, "m.pair: expected tuple[int, float], got [1]"),
     ({"pair": [1.5, 2]}, "m.pair: expected"), ({"maybe": "x"}, "m.maybe: expected Optional[float], got 'x'"),
     ({"level": True}, "m.level: expected Literal[0, 1], got True"),
     ({"loose": 1.5}, "m.loose: expected int, got 1.5"), ({"partial": "yes"}, "m.partial: expected bool"),
     ({"raet": 1}, "m.raet: src.parts.Outer has no argument 'raet'; did you mean 'rate'?")],
)  # fmt: skip
def test_a_wrong_argument_is_named_with_its_place(arguments, expected):
    message = failure(check, {"m": {"target": "src.parts.Outer", "name": "x", **arguments}})
    assert message.startswith(expected)
    assert len(message.splitlines()) == 1


@pytest.mark.usefixtures("parts")
def test_required_arguments_come_from_the_yaml_or_the_offers():
    cfg = {"m": {"target": "src.parts.Plain"}}
    typed = {"m": {"target": "src.parts.Plain", "steps": "1", "codec": 1}}
    assert failure(check, cfg) == "m: src.parts.Plain needs codec, steps"
    assert failure(check, cfg, offers=["codec", "seed"]) == "m: src.parts.Plain needs steps"
    check({"m": {"target": "src.parts.Plain", "steps": 1}}, offers=["codec"])
    check({"m": {"target": "src.parts.Plain", "partial": True}})
    check({"m": {"target": "src.parts.closed", "anything": 1}})
    assert failure(check, typed).startswith("m.steps: ")


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(
    ("target", "expected"),
    [("os.system", "'os.system' is not in the packages src, callbacks"),
     ("srcs.parts.Inner", "'srcs.parts.Inner' is not in the packages"), (3, "3 is not in the packages"),
     ("torch.os.system", "which is not in the packages"), ("src.parts.Path", "is from pathlib"),
     ("src.parts.Iner", "src.parts has no 'Iner'; did you mean 'Inner'?"),
     ("src.batsh.Batch", "src has no 'batsh'; did you mean 'batch'?"),
     ("src.parts.Outer.laod", "src.parts.Outer has no 'laod'; did you mean 'load'?"),
     ("src.parts", "src.parts is not a class or function"),
     ("src.parts.NUMBER", "src.parts.NUMBER is not a class or function"),
     ("src.broken.Thing", "cannot import src.broken: No module named 'a_library_that_is_not_there'")],
)  # fmt: skip
def test_a_bad_target_is_refused(target, expected):
    message = failure(check, {"deep": [{"m": {"target": target}}]})
    assert message.startswith("deep.0.m.target: ")
    assert expected in message


@pytest.mark.usefixtures("parts")
def test_all_problems_are_reported_together():
    inner = {"target": "src.parts.Inner", "sise": 1}
    cfg = {"a": {"target": "src.parts.Outer", "rate": "x", "parts": [inner]}, "b": [{"target": "json.loads"}]}
    lines = [line.strip() for line in failure(check, cfg).splitlines()]
    assert [line.split(": ")[0] for line in lines] == ["a.rate", "a", "a.parts.0.sise", "b.0.target"]


# build


@pytest.mark.usefixtures("parts")
def test_nested_nodes_are_built_and_containers_are_plain():
    inner = {"target": "src.parts.Inner", "size": 2}
    node = {
        "target": "src.parts.Outer",
        "name": "x",
        "sizes": [1],
        "parts": [inner, inner],
        "table": {"k": [inner]},
    }
    outer = build(OmegaConf.create({"m": node}).m)
    assert [part.size for part in outer.parts] == [2, 2]
    assert outer.parts[0] is not outer.parts[1]
    assert outer.table["k"][0].size == 2
    assert (type(outer.sizes), type(outer.table), type(outer.table["k"])) == (list, dict, list)


@pytest.mark.usefixtures("parts")
def test_offers_reach_only_the_names_of_a_signature():
    codec = object()
    assert build({"target": "src.parts.Outer", "name": "x"}, codec=codec, seed=1).codec is codec
    assert build({"target": "src.parts.Outer", "name": "x", "codec": None}, codec=codec).codec is None
    assert build({"target": "src.parts.closed", "a": 1}, codec=codec, seed=1) == {"a": 1}
    assert build({"target": "src.parts.open_ended", "a": 1}, codec=codec, seed=1) == {"codec": codec, "a": 1}
    nested = {"target": "src.parts.closed", "plain": {"target": "src.parts.Plain", "steps": 3}}
    assert build(nested, codec=codec)["plain"].codec is codec
    assert build({"target": "src.parts.closed", "node": 1}, node=2) == {"node": 1}


@pytest.mark.usefixtures("parts")
def test_partial_methods_and_third_party_targets():
    codec = object()
    make = build({"target": "src.parts.Plain", "partial": True}, codec=codec)
    assert isinstance(make, functools.partial)
    assert make(steps=4).steps == 4
    assert make(steps=4).codec is codec
    assert build({"target": "src.parts.Outer.load", "path": "here"}).name == "here"
    assert build({"target": "src.parts.closed", "partial": False}) == {}
    optimizer = build({"target": "torch.optim.AdamW", "partial": True, "lr": 0.5, "betas": [0.8, 0.9]})
    linear = build({"target": "torch.nn.Linear", "in_features": 2, "out_features": 3})
    assert optimizer(linear.parameters()).param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("node", [{"name": "x"}, None, [], "src.parts.Outer", {}])
def test_only_a_node_with_a_target_can_be_built(node):
    assert "target:" in failure(build, node)


@pytest.mark.usefixtures("parts")
def test_building_checks_first_and_names_who_refused(tmp_path):
    assert "did you mean 'size'" in failure(build, {"target": "src.parts.Inner", "sise": 1})
    bad = {"target": "src.parts.Inner", "size": -1}
    assert failure(build, bad) == "src.parts.Inner: size must not be negative, got -1"
    nested = {"target": "src.parts.Outer", "name": "x", "parts": [bad]}
    assert failure(build, nested) == "parts.0 (src.parts.Inner): size must not be negative, got -1"
    gone = str(tmp_path / "gone")
    assert gone in failure(build, {"target": "src.parts.where", "path": gone})


# verbs

VERB = '''"""Add numbers.

    python add.py conf=base
"""
import sys
from src.config import build, check, load_config, main_guard

@main_guard
def main(argv):
    cfg = load_config(argv)
    check(cfg)
    sys.stdout.write(str(build(cfg.noise).generators[0].initial_seed() >= 0) + " " + str(cfg.total))

if __name__ == "__main__":
    main()
'''


def test_a_real_verb_prints_one_line_and_exits_with_2(conf, tmp_path):
    conf(base="noise: {target: src.diffusion.noise.Noise, keys: [a], seed: 1}\ntotal: 4\n")
    (tmp_path / "add.py").write_text(VERB)

    def run(*argv: str) -> subprocess.CompletedProcess:
        path = {**os.environ, "PYTHONPATH": str(Path(src.__file__).parents[1])}
        command = [sys.executable, "add.py", *argv]
        return subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, text=True, check=False)

    good, helped = run("conf=base"), run("--help")
    typo, unbound = run("conf=base", "totl=1"), run("conf=base", "noise.seed=x")
    assert (good.returncode, good.stdout, good.stderr) == (0, "True 4", "")
    assert helped.returncode == 0
    assert "Add numbers." in helped.stdout
    assert "configurations: base" in helped.stdout
    assert (typo.returncode, typo.stdout) == (2, "")
    assert typo.stderr == "error: unknown key 'totl'; did you mean 'total'?\n"
    assert (unbound.returncode, unbound.stderr) == (2, "error: noise.seed: expected int, got 'x'\n")


def test_help_lists_what_there_is(conf):
    text = help_text("Do it.", conf(base="x: 1\n", cluster__slurm="x: 2\n"))
    assert text.startswith("Do it.\n")
    assert "base, cluster/slurm" in text
    assert "conf=NAME" in text
