"""Config: layers, settings, and the errors a user meets. Yaml files come from a temporary root."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ReadonlyConfigError

import src
from src.cli.config import load_config, load_part, save_config
from src.io.errors import UserError

BASE = """
seed: 0
path: ???
model: {target: src.parts.Outer, name: small, sizes: [1, 2, 3], table: {a: 1, b: 2}}
optimizer: {lr: 1e-3, betas: [0.9, 0.95]}
callbacks: []
"""


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
    with pytest.raises(UserError) as caught:
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


def test_a_shared_base_applies_once(conf):
    root = conf(
        base="x: base\ny: base\nz: base\n",
        left="base: [base]\nx: left\ny: left\n",
        right="base: [base]\ny: right\n",
        both="base: [left, right]\nz: both\n",
    )
    # applied twice, the base under `right` would undo x of `left`
    assert plain(load_config(["conf=both"], root=root)) == {"x": "left", "y": "right", "z": "both"}


def test_a_path_is_a_layer_and_its_base_is_looked_up_in_the_root(conf, tmp_path):
    root = conf(base="x: 1\ny: 1\n")
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: [base]\ny: 2\n")
    assert plain(load_config([f"conf={mine}"], root=root)) == {"x": 1, "y": 2}
    assert "gone.yaml" in failure(load_config, [f"conf={tmp_path / 'gone.yaml'}"], root=root)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("- 1\n- 2\n", "expected a mapping"), ("a: [1\n", "cannot read"), ("a: 1\na: 2\n", "duplicate key a")],
)
def test_a_bad_file_is_named(conf, text, expected):
    message = failure(load_config, ["conf=bad"], root=conf(bad=text))
    assert "bad.yaml" in message
    assert expected in message


# the command line


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "conf=NAME is missing; --help lists the configurations"),
        (["conf=stge1"], "no configuration 'stge1'; did you mean 'stage1'? (--help lists them)"),
        (["stage1"], "expected key=value, got 'stage1'; did you mean conf=stage1?"),
        (["conf=stage1", "conf=stage1"], "conf= is given twice; stack layers with a comma: conf=a,b"),
        (["conf=stage1", "seed=[1,"], "seed: cannot read '[1,' as yaml: "),
        (["conf=stage1,odd"], "odd: stage1 has no top-level key 'optimiser'; did you mean 'optimizer'?"),
        (["conf=stage1", "images=a"], "conf=stage1 is not for src.add: it has no key 'images'; see --help"),
        (["conf=whole"], "these keys must be given: seed, optimizer.lr, images.0.a"),
    ],
)
def test_what_a_command_line_cannot_be(conf, argv, expected):
    root = conf(
        stage1="seed: 0\noptimizer: {lr: 1}\n",
        odd="optimiser: {lr: 1}\n",
        whole="seed: ???\noptimizer:\n  lr: ???\nimages:\n- a: ???\n",
    )
    assert failure(load_config, argv, verb="src.add", needs=["seed", "images"], root=root).startswith(expected)


@pytest.mark.parametrize("text", ["Who won? #1 answer", "1", "ROMEO:", "[1]", "", "null", ' "a" and "b"'])
def test_a_text_is_taken_literally(conf, text):
    cfg = load_config(["conf=base", f"say={text}"], root=conf(base="say: null\n"), texts=["say"])
    assert cfg.say == (None if text == "null" else text)
    with pytest.raises(ReadonlyConfigError):
        cfg.say = ""


@pytest.mark.parametrize(
    ("setting", "value"),
    [("m.x=1e-4", 1e-4), ("m.x=7", 7), ("m.x=null", None), ("m.x=", ""), ("m.x='1'", "1"), ("m.x=a=b", "a=b"),
     ("m.x=[1,2.5]", [1, 2.5]), ("m.x=/a,b", "/a,b"), ("m.x={a: '${m.y}/b'}", {"a": "1/b"})],
)  # fmt: skip
def test_a_setting_is_read_as_yaml(conf, setting, value):
    cfg = plain(load_config(["conf=base", setting], root=conf(base="m: {x: null, y: 1}\n")))
    assert cfg == {"m": {"x": value, "y": 1}}
    assert type(cfg["m"]["x"]) is type(value)


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


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("n=abc", "n: expected int, got 'abc'"), ("n=1.5", "n: expected int, got 1.5"), ("rate=x", "rate: expected float"),
     ("flag=1", "flag: expected bool, got 1"), ("steps=[1,a]", "steps.1: expected int, got 'a'"),
     ("steps=4", "steps: expected a list, got 4"), ("a=3", "a: expected a mapping, got 3"),
     ("a.node=[1]", "a.node: expected a mapping with `target:` or null, got [1]")],
)  # fmt: skip
def test_a_plain_setting_keeps_its_type(conf, setting, expected):
    text = "n: 1\nrate: 0.5\nflag: true\nsteps: [1, 2]\na: {x: 1, node: {target: a.B}}\nopen: null\n"
    root = conf(base=f"{text}node: {{target: a.B}}\n")
    assert failure(load_config, ["conf=base", setting], root=root).startswith(expected)
    fine = load_config(["conf=base", "rate=1", "n=null", "open=abc", "steps=[]", "a={x: 2}", "node=null"], root=root)
    assert (fine.rate, fine.n, fine.open, fine.steps, fine.a.x) == (1, None, "abc", [], 2)


def test_a_layer_keeps_types_too(conf):
    root = conf(base="n: 1\nm: {target: a.B, x: 1}\n", top="base: base\nn: many\nm: {x: a}\n", other="n: ${m.x}\n")
    assert failure(load_config, ["conf=top"], root=root) == "top: n: expected int, got 'many'"
    assert load_config(["conf=base,other", "m.x=later"], root=root).n == "later"  # signatures judge what is in a node


def test_a_name_for_a_mapping_of_the_top_level_takes_a_layer(conf):
    root = conf(base="model: {target: a.B, x: 1}\nn: 1\n", model__big="model: {x: 9, y: 2}\nn: 5\n")
    chosen = load_config(["conf=base", "model=big", "model.y=3"], root=root)
    assert plain(chosen) == {"model": {"target": "a.B", "x": 9, "y": 3}, "n": 5}
    assert "did you mean 'model/big'" in failure(load_config, ["conf=base", "model=bog"], root=root)
    assert load_config(["conf=base", f"model={root}/model/big.yaml", "model.y=3"], root=root) == chosen


def test_a_null_of_the_top_level_takes_a_layer_where_there_are_some(conf):
    root = conf(
        base="expert: null\nnote: null\nloop: {target: a.Loop, expert: '${expert}'}\n",
        top="base: base\nexpert: {target: a.Own}\n",
        expert__other="expert: {target: a.Other, x: 1}\n",
    )
    other = {"target": "a.Other", "x": 1}
    for name in ("base", "top"):
        cfg = plain(load_config([f"conf={name}", "expert=other"], root=root))
        assert cfg == {"expert": other, "note": None, "loop": {"target": "a.Loop", "expert": other}}
    assert load_config(["conf=top"], root=root).loop.expert == {"target": "a.Own"}
    assert load_config(["conf=base", "note=other"], root=root).note == "other"
    assert "did you mean 'expert/other'" in failure(load_config, ["conf=base", "expert=othr"], root=root)


def test_a_part_is_what_a_layer_holds_under_its_key(conf):
    root = conf(
        sampler__plain="sampler: {target: a.B, x: 1}\n", sampler__fast="base: sampler/plain\nsampler: {y: '${.x}'}\n"
    )
    assert load_part("sampler", "fast", root=root) == {"target": "a.B", "x": 1, "y": 1}
    assert load_part("sampler", f"{root}/sampler/plain.yaml", root=root) == {"target": "a.B", "x": 1}
    conf(sampler__odd="other: 1\n")
    assert "conf=sampler/odd is not for sampler: it has no key 'sampler'" in failure(
        load_part, "sampler", "odd", root=root
    )


def test_print_shows_the_composed_config_and_stops(conf, tmp_path, capsys):
    root = conf(base="x: 1\nm: {target: a.B, twin: '${x}'}\n")
    with pytest.raises(SystemExit) as stop:
        load_config(["conf=base", "--print", "x=5"], root=root)
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown) == {"x": 5, "m": {"target": "a.B", "twin": 5}}
    (tmp_path / "shown.yaml").write_text(shown)
    assert load_config([f"conf={tmp_path / 'shown.yaml'}"], root=root).m.twin == 5


@pytest.mark.parametrize(
    ("setting", "nearest"),
    [("optimizer.lrr=1", "optimizer.lr"), ("optimiser.lr=1", "optimizer.lr"), ("lr=1", "optimizer.lr"),
     ("--optimizer.lr=1", "optimizer.lr"), ("sede=1", "seed"), ("optimizer.betas.2=1", "optimizer.betas.1"),
     ("optimizer={lrate: 1}", "optimizer.lr"), ("seed.x=1", "seed"), ("+optimiser.lr=1", "optimizer.lr")],
)  # fmt: skip
def test_a_typo_suggests_the_nearest_full_name(conf, setting, nearest):
    message = failure(load_config, ["conf=base", "path=x", setting], root=conf(base=BASE))
    assert message.startswith("unknown key")
    assert message.partition(" (+")[0].endswith(f"did you mean '{nearest}'?")


NODES = """
outer:
  samplers:
  - target: src.samplers.sampler.Sampler
    length: 8
    reviser: {target: src.samplers.rediff.OverwriteAll}
"""


@pytest.mark.parametrize(
    ("setting", "place", "value"),
    [("outer.samplers.0.temperature=0.5", "temperature", 0.5), ("outer.samplers.0={cfg_scale: 2}", "cfg_scale", 2),
     ("outer.samplers.0.reviser.scope=all", "reviser.scope", "all"),
     ("outer.samplers.0.unmask={target: a.B, tau: 1}", "unmask", {"target": "a.B", "tau": 1})],
)  # fmt: skip
def test_an_argument_of_a_target_need_not_stand_in_the_yaml(conf, setting, place, value):
    sampler = load_config(["conf=base", setting], root=conf(base=NODES)).outer.samplers[0]
    assert OmegaConf.select(sampler, place) == value
    assert (sampler.length, sampler.reviser.target) == (8, "src.samplers.rediff.OverwriteAll")


def test_a_plus_adds_a_key_to_a_mapping(conf):
    root = conf(base="names: {a: one}\nouter: {inner: {}}\nseed: 0\n")
    argv = ["conf=base", "+names.b=two", "+outer.inner.mine={target: a.B, x: 1}", "outer.inner.mine.x=2"]
    outer = {"inner": {"mine": {"target": "a.B", "x": 2}}}
    assert plain(load_config(argv, root=root)) == {"names": {"a": "one", "b": "two"}, "outer": outer, "seed": 0}
    assert failure(load_config, [*argv, "names.b=3"], root=root) == "names.b: expected str, got 3"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("+names.a=1", "'names.a' exists already: set it without the +"),
     ("+sede=1", "unknown key 'sede'; did you mean 'seed'?"),
     ("+list.1=1", "unknown key 'list.1'; did you mean 'list.0'?"),
     ("names.qqqq=1", "unknown key 'names.qqqq'; did you mean 'names.a'? (+names.qqqq=... adds it)"),
     ("node.tempratur=1", "unknown key 'node.tempratur'; did you mean 'node.temperature'?"),
     ("broken.length=1", "broken.target: src.samplers.sampler has no 'Smapler'; did you mean 'Sampler'?")],
)  # fmt: skip
def test_what_cannot_be_set(conf, setting, expected):
    nodes = "node: {target: src.samplers.sampler.Sampler}\nbroken: {target: src.samplers.sampler.Smapler}\n"
    root = conf(base=f"names: {{a: one}}\nseed: 0\nlist: [1]\n{nodes}")
    message = failure(load_config, ["conf=base", setting], root=root)
    assert message.startswith(expected)
    assert message.endswith("adds it)") == ("adds it" in expected)


# resolution and saving


def test_interpolations_are_resolved_after_all_layers(conf, monkeypatch):
    monkeypatch.setenv("REDIFF_TEST_HOME", "here")
    text = "name: a\nout: runs/${name}\nhome: ${oc.env:REDIFF_TEST_HOME}\ntwin: ${tree}\ntree: {x: [1]}\n"
    root = conf(base=text)
    cfg = load_config(["conf=base", "name=b", "tree.x=[2]"], root=root)
    assert (cfg.out, cfg.home, cfg.twin) == ("runs/b", "here", {"x": [2]})


@pytest.mark.parametrize(
    ("value", "expected"),
    [("${nmae}", "m.k: Interpolation key 'nmae' not found"), ("${foo:1}", "m.k: Unsupported interpolation type foo"),
     ("${oc.env:REDIFF_NOT_SET}", "REDIFF_NOT_SET")],
)  # fmt: skip
def test_a_bad_interpolation_is_one_line_that_names_its_place(conf, value, expected):
    message = failure(load_config, ["conf=base"], root=conf(base=f"name: a\nm: {{k: '{value}'}}\n"))
    assert expected in message
    assert len(message.splitlines()) == 1


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


# verbs

VERB = '''"""Add numbers.

    python add.py conf=base
"""
import sys
from src.cli.instantiate import build, check
from src.cli.config import load_config
from src.cli.entrypoint import main_guard

@main_guard
def main(argv):
    cfg = load_config(argv)
    check(cfg)
    sys.stdout.write(build(cfg.cache).folder + " " + str(cfg.total))

if __name__ == "__main__":
    main()
'''


def test_a_real_verb_prints_one_line_and_exits_with_2(conf, tmp_path):
    conf(base="cache: {target: src.io.remote.Cache, folder: here, max_gb: 1}\ntotal: 4\n")
    (tmp_path / "add.py").write_text(VERB)

    def run(*argv: str) -> subprocess.CompletedProcess:
        path = {**os.environ, "PYTHONPATH": str(Path(src.__file__).parents[1])}
        command = [sys.executable, "add.py", *argv]
        return subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, text=True, check=False)

    good, helped = run("conf=base"), run("--help")
    typo, unbound = run("conf=base", "totl=1"), run("conf=base", "cache.max_gb=x")
    assert (good.returncode, good.stdout, good.stderr) == (0, "here 4", "")
    assert helped.returncode == 0
    assert "Add numbers." in helped.stdout
    assert re.search(r"configurations:\n +base\n", helped.stdout)
    assert (typo.returncode, typo.stdout) == (2, "")
    assert typo.stderr == "error: unknown key 'totl'; did you mean 'total'?\n"
    assert (unbound.returncode, unbound.stderr) == (2, "error: cache.max_gb: expected float, got 'x'\n")
