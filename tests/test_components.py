"""Nodes of a config: checks before anything is built, and what is built.

Components come from a module written into a temporary folder of the `src` package.
"""

import sys

import pytest
from omegaconf import OmegaConf

import src
from src.cli.instantiate import arguments, build, check, nodes
from src.io.errors import UserError

PARTS = '''
from __future__ import annotations
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional
from src.io.errors import UserError
if TYPE_CHECKING:
    from nowhere import Unknown

class Inner:
    """What a nested node makes."""
    def __init__(self, size: int = 1) -> None:
        if size < 0:
            raise UserError(f"size must not be negative,\\n got {size}")
        self.size = size

class Wider(Inner):
    def __init__(self, *, extra: int = 0, **options) -> None:
        super().__init__(**options)

class Outer:
    def __init__(
        self, *, name: str, rate: float = 0.5, deep: bool = False, mode: Literal["full", "prefix"] = "full",
        limit: int | None = None, sizes: Sequence[int] = (), pair: tuple[int, float] = (1, 2.0),
        odd: Unknown = None, parts: list[Inner] | None = None, table: dict | None = None,
        codec: object = None, maybe: Optional[float] = None, loose: int = None,
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


def failure(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


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
     ({"name": 3}, "m.name: expected str, got 3"), ({"name": None}, "m.name: expected str, got None"),
     ({"deep": 1}, "m.deep: expected bool, got 1"), ({"limit": 1.5}, "m.limit: expected int | None, got 1.5"),
     ({"mode": "ful"}, "m.mode: expected Literal['full', 'prefix'], got 'ful'"),
     ({"sizes": [1, "2"]}, "m.sizes: expected collections.abc.Sequence[int], got [1, '2']"),
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
    check({"m": {"target": "src.parts.closed", "anything": 1}})
    assert failure(check, typed).startswith("m.steps: ")


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(
    ("target", "expected"),
    [("os.system", "'os.system' is not in the packages src, callbacks"),
     ("torch.os.system", "which is not in the packages"), ("src.parts.Path", "is from pathlib"),
     ("src.parts.Iner", "src.parts has no 'Iner'; did you mean 'Inner'?"),
     ("src.tpyes.Batch", "src has no 'tpyes'; did you mean 'types'?"),
     ("src.parts.Outer.laod", "src.parts.Outer has no 'laod'; did you mean 'load'?"),
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


@pytest.mark.parametrize(
    ("section", "expected"),
    [({"a": True}, "callbacks.a: expected a mapping with `target:` or null, got True"),
     ({"a": {"x": 1}}, "callbacks.a: expected a mapping with `target:` or null, got {'x': 1}"),
     ([], "callbacks: expected a mapping, got []"), (None, "callbacks: expected a mapping, got None")],
)  # fmt: skip
def test_what_is_no_node_is_named_with_its_place(section, expected):
    assert failure(nodes, section, "callbacks").startswith(expected)


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
    assert build({"target": "src.parts.Outer.load", "path": "x"}).name == "x"
    assert build({"target": "src.parts.Outer", "name": "x"}, codec=codec, seed=1).codec is codec
    assert build({"target": "src.parts.Outer", "name": "x", "codec": None}, codec=codec).codec is None
    assert build({"target": "src.parts.closed", "a": 1}, codec=codec, seed=1) == {"a": 1}
    assert build({"target": "src.parts.open_ended", "a": 1}, codec=codec, seed=1) == {"codec": codec, "a": 1}
    nested = {"target": "src.parts.closed", "plain": {"target": "src.parts.Plain", "steps": 3}}
    assert build(nested, codec=codec)["plain"].codec is codec
    assert build({"target": "src.parts.closed", "node": 1}, node=2) == {"node": 1}


@pytest.mark.usefixtures("parts")
def test_building_checks_first_and_names_who_refused(tmp_path):
    assert "did you mean 'size'" in failure(build, {"target": "src.parts.Inner", "sise": 1})
    bad = {"target": "src.parts.Inner", "size": -1}
    assert failure(build, bad) == "src.parts.Inner: size must not be negative, got -1"
    nested = {"target": "src.parts.Outer", "name": "x", "parts": [bad]}
    assert failure(build, nested) == "parts.0 (src.parts.Inner): size must not be negative, got -1"


# options that a subclass hands on


@pytest.mark.usefixtures("parts")
def test_options_of_the_base_class_are_those_of_a_subclass_with_kwargs():
    node = {"target": "src.parts.Wider", "size": 3}
    check(node)
    assert arguments(node) == ["size", "extra"]
    assert build(node).size == 3
    assert failure(check, {"m": {**node, "size": "many"}}) == "m.size: expected int, got 'many'"
