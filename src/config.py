"""Yaml layers and key=value settings -> one checked, resolved, read-only config -> components.

    python -m src.train conf=stage2,debug seed=1 optimizer.lr=1e-4

    conf=a,b       reads ROOT/a.yaml, then ROOT/b.yaml on top; a name may be `cluster/NAME`; a value that ends
                   in `.yaml` is a path, so that the `config.yaml` in a run's folder repeats that run
    base: [x, y]   inside a yaml: layers that apply before it, each once
    key=value      changes a key that exists (dotted, list places are numbers); the value is read as yaml

Mappings merge, lists replace, and a mapping whose `target:` changes is replaced whole. The lowest layer fixes
the keys of the top level. `???` marks what has to be given.

    load_config(argv) -> DictConfig -> check(config, offers=...) -> build(config.node, **offers) -> component

A node is a mapping with `target: package.module.Class`; its other keys are keyword arguments. Nested nodes
are built first, and `partial: true` makes a `functools.partial` of a node.

WARN: `${oc.env:NAME}` is resolved like any other interpolation, so its value is written to the saved config.
For a secret give a component the *name* of the variable and let it read the environment.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import logging
import os
import pkgutil
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

PACKAGES = ("src", "callbacks", "datamodules", "torch", "lightning", "torchmetrics", "transformers")
SCALARS = {bool: (bool,), int: (int,), float: (float, int), str: (str,), type(None): (type(None),)}


class ConfigError(ValueError):
    """A mistake in the config or on the command line; the message is meant for the user."""


def load_config(argv: Iterable[str], *, root: str | Path = "conf") -> DictConfig:
    """The config that `conf=NAME[,NAME] key=value ...` describes, resolved and read-only.

    root: the folder of the yaml files; if a relative one is not here, the one beside this package is taken.
    """
    folder = _folder(root)
    names, settings = _parse(argv, folder)
    tree = _compose(_layers(names, folder))
    for name, value in settings:
        _set(tree, name, value)
    if missing := [name for name, value in _walk(tree) if value == "???"]:
        raise ConfigError(f"these keys must be given: {', '.join(missing)}")
    try:
        plain = _plain(OmegaConf.create(tree))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {_line(error)}") from error
    if escaped := [name for name, value in _walk(plain) if isinstance(value, str) and "${" in value]:
        raise ConfigError(f"{', '.join(escaped)}: an escaped '${{' would not survive the saved config")
    return OmegaConf.create(plain, flags={"readonly": True})


def save_config(cfg: DictConfig, path: str | Path) -> None:
    """Write the resolved config as yaml; a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(OmegaConf.to_yaml(cfg, resolve=True))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def check(cfg: DictConfig | ListConfig | dict, *, offers: Iterable[str] = ()) -> None:
    """Import every `target:` and bind its arguments without calling it; offers: the names `build` will get.

    Raises ConfigError with all problems, each with its dotted place in the config.
    """
    nodes = [(name, value) for name, value in _walk(_plain(cfg)) if _is_node(value)]
    names = set(offers)
    found = [(_dotted(name, key), text) for name, node in nodes for key, text in _problems(node, names)]
    if found:
        raise ConfigError("\n  ".join(f"{place}: {text}" if place else text for place, text in found))


def build(node: Any, /, **offers: Any) -> Any:
    """Construct the component that a node describes, its nested nodes first.

    An offer reaches a target only where the signature names it (not through `**kwargs`) and the yaml does not
    give it. Components get plain lists and dicts.
    """
    tree = _plain(node)
    if not _is_node(tree):
        raise ConfigError(f"nothing to build: expected a mapping with `target:`, got {tree!r}")
    check(tree, offers=offers)
    return _build(tree, offers)


def help_text(verb_doc: str | None, root: str | Path = "conf") -> str:
    """What a verb prints for --help: its own docstring, the arguments and the configurations there are."""
    usage = "arguments: conf=NAME[,NAME...] [key=value ...]     (a NAME may be the path of a .yaml file)"
    return f"{(verb_doc or '').strip()}\n\n{usage}\nconfigurations: {', '.join(_available(_folder(root)))}\n"


def main_guard(main: Callable[[list[str]], None]) -> Callable[..., None]:
    """Decorator of a verb's `main(argv)`: --help, and one line and exit code 2 instead of a ConfigError."""

    @functools.wraps(main)
    def guarded(argv: list[str] | None = None) -> None:
        argv = sys.argv[1:] if argv is None else argv
        if {"-h", "--help"} & set(argv):
            sys.stdout.write(help_text(sys.modules[main.__module__].__doc__))
            return
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        try:
            main(argv)
        except ConfigError as error:
            sys.stderr.write(f"error: {error}\n")
            sys.exit(2)

    return guarded


def _folder(root: str | Path) -> Path:
    return Path(root) if Path(root).is_dir() else Path(__file__).resolve().parents[1] / root


def _available(root: Path) -> list[str]:
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def _parse(argv: Iterable[str], root: Path) -> tuple[list[str], list[tuple[str, Any]]]:
    """The names after `conf=` and the (dotted name, value) of all other arguments."""
    names, settings = None, []
    for argument in argv:
        key, equals, text = argument.partition("=")
        if not equals:
            raise ConfigError(f"expected key=value, got {argument!r}")
        if key != "conf":
            settings.append((key, _value(key, text)))
        elif names is None:
            names = [name for name in text.split(",") if name]
        else:
            raise ConfigError("conf= is given twice; stack layers with a comma: conf=a,b")
    if not names:
        raise ConfigError(f"conf=NAME is missing; available: {', '.join(_available(root))}")
    return names, settings


def _value(key: str, text: str) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{key}: cannot read {text!r} as yaml: {_line(error)}") from error


def _layers(names: list[str], root: Path) -> list[tuple[str, dict]]:
    """(name, content) of each file, lowest first: before a name what its `base:` lists, every file once."""
    found: dict[Path, tuple[str, dict]] = {}

    def apply(name: str, *above: str) -> None:
        if name in above:
            raise ConfigError(f"`base:` goes in a circle: {' -> '.join([*above[above.index(name) :], name])}")
        path = _find(name, root)
        if path in found:
            return
        tree, bases = _read(path)
        lowest = next(iter(found.values()), ("", {}))[0]
        if bases and lowest.endswith(".yaml"):  # a complete config, such as the saved one of a run
            raise ConfigError(f"{name} brings a base, which would undo {lowest}; stack one without `base:`")
        for base in bases:
            apply(base, *above, name)
        found[path] = (name, tree)

    for name in names:
        apply(name)
    return list(found.values())


def _find(name: str, root: Path) -> Path:
    path = Path(name) if name.endswith(".yaml") else root / f"{name}.yaml"
    if path.is_file():
        return path.resolve()
    known = _available(root)
    raise ConfigError(f"no configuration {name!r}{_hint(name, known)}; available: {', '.join(known)}")


def _read(path: Path) -> tuple[dict, list[str]]:
    """The content of a yaml file and the names under its `base:`."""
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {_line(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, got a {type(tree).__name__}")
    bases = tree.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not _fits(bases, list[str]):
        raise ConfigError(f"{path}: base: expected a list of names, got {bases!r}")
    return tree, bases


def _compose(layers: list[tuple[str, dict]]) -> dict:
    (lowest, schema), *upper = layers
    tree = schema
    for name, layer in upper:
        if unknown := [str(key) for key in layer if key not in schema]:
            near = _hint(unknown[0], map(str, schema))
            raise ConfigError(f"{name}: {lowest} has no top-level key {unknown[0]!r}{near}")
        tree = _merge(tree, layer)
    return tree


def _merge(lower: Any, upper: Any) -> Any:
    if not (isinstance(lower, dict) and isinstance(upper, dict)) or _retargets(lower, upper):
        return upper
    return lower | {key: _merge(lower[key], value) if key in lower else value for key, value in upper.items()}


def _retargets(old: dict, new: dict) -> bool:
    return "target" in new and new["target"] != old.get("target")


def _set(tree: dict, name: str, value: Any) -> None:
    """Replace an existing value; a mapping replaces key by key, unless it is another target."""
    owner, key, old = None, None, tree
    for part in name.split("."):
        owner, key = old, _key(old, part)
        if key is None:
            raise ConfigError(f"unknown key {name!r}{_hint(name, [known for known, _ in _walk(tree)])}")
        old = owner[key]
    if old and value and isinstance(old, dict) and isinstance(value, dict) and not _retargets(old, value):
        for child, inner in value.items():
            _set(tree, f"{name}.{child}", inner)
    else:
        owner[key] = value  # type: ignore[index]


def _key(owner: Any, part: str) -> Any:
    """The key or list place that a part of a dotted name means; None if there is no such thing."""
    keys = owner if isinstance(owner, dict) else range(len(owner)) if isinstance(owner, list) else ()
    return next((key for key in keys if str(key) == part), None)


def _walk(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of a tree and all that is in it."""
    yield name, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from _walk(child, _dotted(name, key))


def _dotted(*parts: Any) -> str:
    return ".".join(str(part) for part in parts if part != "")


def _hint(name: str, known: Iterable[str]) -> str:
    """The nearest known name, or one that ends in nearly the same word: `lr` means `optimizer.lr`."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1)
    if not near:
        last = {full.rsplit(".", 1)[-1]: full for full in reversed(known)}
        near = [last[end] for end in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, 1)]
    return f"; did you mean {near[0]!r}?" if near else ""


def _line(error: Exception) -> str:
    return " ".join(str(error).split("\n    full_key")[0].split())


def _plain(tree: Any) -> Any:
    return OmegaConf.to_container(tree, resolve=True) if OmegaConf.is_config(tree) else tree


def _is_node(value: Any) -> bool:
    return isinstance(value, dict) and "target" in value


def _build(value: Any, offers: dict, name: str = "") -> Any:
    if isinstance(value, list):
        return [_build(item, offers, _dotted(name, place)) for place, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    inner = {key: _build(item, offers, _dotted(name, key)) for key, item in value.items()}
    if not _is_node(value):
        return inner
    target, partial = inner.pop("target"), inner.pop("partial", False)
    component = _locate(target)
    given = {key: offer for key, offer in offers.items() if key in _parameters(component)[0]} | inner
    if partial:
        return functools.partial(component, **given)
    try:
        return component(**given)
    except (ValueError, OSError) as error:
        place = f"{name} ({target})" if name else target
        raise ConfigError(f"{place}: {_line(error)}") from error


def _locate(target: Any) -> Callable:
    """Import what `target:` names: a class or function, or a method such as `src.tokenizer.Codec.load`."""
    parts = str(target).split(".")
    if parts[0] not in PACKAGES:
        raise ConfigError(f"{target!r} is not in the packages {', '.join(PACKAGES)}")
    found: Any = _import(parts[0])
    for end, part in enumerate(parts[1:], start=1):
        owner, path = found, ".".join(parts[:end])
        found = getattr(owner, part, None)
        if found is None and hasattr(owner, "__path__"):
            found = _import(f"{path}.{part}")
        if found is None:
            known = [*dir(owner), *(m.name for m in pkgutil.iter_modules(getattr(owner, "__path__", [])))]
            raise ConfigError(f"{path} has no {part!r}{_hint(part, known)}")
    if inspect.ismodule(found) or not callable(found):
        raise ConfigError(f"{target} is not a class or function")
    home = getattr(found, "__module__", None) or parts[0]
    if home.split(".")[0] not in PACKAGES:
        raise ConfigError(f"{target} is from {home}, which is not in the packages {', '.join(PACKAGES)}")
    return found


def _import(name: str) -> Any:
    """The module of that name; None where a package has no such module."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name and "." in name:
            return None
        raise ConfigError(f"cannot import {name}: {error}") from error


def _parameters(component: Callable) -> tuple[dict[str, inspect.Parameter], bool]:
    """The parameters that can be given by name, and whether any other name is taken too."""
    try:
        found = inspect.signature(component).parameters.values()
    except (ValueError, TypeError):  # written in C, without a signature
        return {}, True
    by_name = {p.name: p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return by_name, any(p.kind is p.VAR_KEYWORD for p in found)


def _problems(node: dict, offers: set[str]) -> Iterator[tuple[str, str]]:
    """(key, problem) for one node, without a look into nested ones."""
    target, partial = node["target"], node.get("partial", False)
    try:
        component = _locate(target)
    except ConfigError as error:
        yield "target", str(error)
        return
    if not isinstance(partial, bool):
        yield "partial", f"expected bool, got {partial!r}"
    parameters, takes_any = _parameters(component)
    for key in [key for key in node if key not in ("target", "partial")]:
        if key in parameters:
            hint = _annotation(component, parameters[key])
            if not _fits(node[key], hint) and not (node[key] is None and parameters[key].default is None):
                yield key, f"expected {inspect.formatannotation(hint)}, got {node[key]!r}"
        elif not takes_any:
            yield key, f"{target} has no argument {key!r}{_hint(str(key), parameters)}"
    required = {name for name, p in parameters.items() if p.default is p.empty}
    if not partial and (missing := sorted(required - node.keys() - offers)):
        yield "", f"{target} needs {', '.join(missing)}"


def _annotation(component: Callable, parameter: inspect.Parameter) -> Any:
    """The type of a parameter; Any where it cannot be evaluated, such as an import for type checkers only."""
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    function: Any = component.__init__ if isinstance(component, type) else component
    try:
        return eval(parameter.annotation, getattr(inspect.unwrap(function), "__globals__", {}))
    except (NameError, AttributeError, TypeError, SyntaxError):
        return Any


def _fits(value: Any, hint: Any) -> bool:
    """Whether a yaml value fits an annotation of scalars and lists; true where that cannot be judged."""
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in inner)
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner)
    if allowed := [fitting for kind, fitting in SCALARS.items() if origin is kind]:
        return type(value) in allowed[0]
    if origin not in (list, tuple, Sequence):
        return True
    if not isinstance(value, list):
        return False
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        return len(value) == len(inner) and all(map(_fits, value, inner))
    return not inner or all(_fits(item, inner[0]) for item in value)
