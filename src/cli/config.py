"""Yaml layers and key=value settings -> one resolved, read-only config.

    python -m src.train conf=stage2,debug seed=1 optimizer.lr=1e-4

    conf=a,b       reads ROOT/a.yaml, then ROOT/b.yaml on top; a name may be `cluster/NAME`; a name that ends
                   in `.yaml` is a path: the `config.yaml` in a run's folder repeats that run
    base: [x, y]   inside a yaml: layers that apply before it, each once
    key=value      changes an existing key (dotted; list indices are numbers), or gives a node an argument that its
                   target accepts; the value is read as yaml, and an empty one (key= or key="") is the empty string;
                   text keys of a verb, such as prompt= of src.generate, are taken literally: only null is None, and
                   a value that is wholly quoted loses its quotes
    +key=value     adds a key to a mapping, as in +evaluate.models.mine=runs/mine/model
    key=NAME       for a top-level key that holds a mapping: applies the layer ROOT/key/NAME.yaml, as in
                   model=llada_v; a NAME that ends in `.yaml` is a path
    --print        prints the config and stops

Mappings merge, lists replace, and a mapping whose `target:` changes is replaced as a whole. The lowest layer fixes
the top-level keys. `???` marks a value that must be given.

    load_config(argv, verb="src.train", needs=["trainer"]) -> DictConfig
    -> `src.cli.instantiate`: check(config, offers=...), build(config.node, **offers)

WARN: `${oc.env:NAME}` is resolved like any other interpolation, so its value is written to the saved config.
For a secret, give a component the *name* of the variable and let it read the environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.cli.help import available, config_root
from src.cli.instantiate import SCALARS, arguments, dotted, fits, hint, is_node, one_line, plain, walk
from src.io.errors import UserError

PRINT = "--print"


def load_config(
    argv: Iterable[str],
    *,
    verb: str = "this",
    needs: Iterable[str] = (),
    texts: Iterable[str] = (),
    root: str | Path = "conf",
) -> DictConfig:
    """The config that `conf=NAME[,NAME] key=value ...` describes, resolved and read-only.

    verb: the verb that reads it, for errors; needs: top-level keys that the config must have
    texts: keys whose command-line value is literal text, not yaml: a question may contain `: ` and ` #`
    root: the folder of the yaml files; a relative one that does not exist is looked up beside this package

    With --print among the arguments, prints the config and exits.
    """
    argv, folder = list(argv), config_root(root)
    names, settings = _parse([argument for argument in argv if argument != PRINT], folder, set(texts))
    tree = _compose(_layers(names, folder))
    if missing_keys := [key for key in needs if key not in tree]:
        raise UserError(f"conf={','.join(names)} is not for {verb}: it has no key {missing_keys[0]!r}; see --help")
    layers = [(key, value) for key, value in settings if _names_layer(tree, key, value, folder)]
    if layers:
        tree = _compose(_layers([*names, *(_layer_name(key, value) for key, value in layers)], folder))
    for name, value in [setting for setting in settings if setting not in layers]:
        _set(tree, name, value)
    resolved = _resolve(tree)
    if PRINT in argv:
        sys.stdout.write(OmegaConf.to_yaml(resolved))
        sys.exit()
    return OmegaConf.create(resolved, flags={"readonly": True})


def load_part(key: str, name: str, *, root: str | Path = "conf") -> dict:
    """The resolved node under KEY in the layer ROOT/KEY/NAME.yaml, or in the .yaml file NAME."""
    node = plain(load_config([f"conf={_layer_name(key, name)}"], verb=key, needs=[key], root=root))[key]
    if not is_node(node):
        raise UserError(f"{_layer_name(key, name)}: {key}: expected a mapping with `target:`, got {node!r}")
    return node


def save_config(cfg: DictConfig, path: str | Path) -> None:
    """Write the resolved config as yaml, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(OmegaConf.to_yaml(cfg, resolve=True))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def path_of(cfg: DictConfig, key: str) -> Path:
    """The path under a key. Raises UserError if it is missing or not a path."""
    value = OmegaConf.select(cfg, key)
    if not isinstance(value, str) or not value:
        raise UserError(f"{key}: expected a path, got {value!r}")
    return Path(value)


def _names_layer(tree: dict, key: str, value: Any, root: Path) -> bool:
    """Whether key=value selects a layer: the key holds a mapping, or is null and ROOT/key is a folder."""
    old = tree.get(key, value)
    return isinstance(value, str) and (isinstance(old, dict) or (old is None and (root / key).is_dir()))


def _layer_name(key: str, name: str) -> str:
    return name if name.endswith(".yaml") else f"{key}/{name}"


def _resolve(tree: dict) -> dict:
    """The tree with its interpolations resolved. Raises UserError for a remaining `???`."""
    if missing := [name for name, value in walk(tree) if value == "???"]:
        raise UserError(f"these keys must be given: {', '.join(missing)}")
    try:
        resolved = plain(OmegaConf.create(tree))
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {one_line(error)}") from error
    if escaped := [name for name, value in walk(resolved) if isinstance(value, str) and "${" in value]:
        raise UserError(f"{', '.join(escaped)}: an escaped '${{' would not survive the saved config")
    return resolved


def _parse(argv: Iterable[str], root: Path, texts: set[str]) -> tuple[list[str], list[tuple[str, Any]]]:
    """The names in `conf=` and the (dotted name, value) of every other argument."""
    names, settings = None, []
    for argument in argv:
        key, equals, text = argument.partition("=")
        if not equals:
            suggestion = f"; did you mean conf={argument}?" if (root / f"{argument}.yaml").is_file() else ""
            raise UserError(f"expected key=value, got {argument!r}{suggestion}")
        if key != "conf":
            settings.append((key, (_text if key in texts else _value)(key, text)))
        elif names is None:
            names = [name for name in text.split(",") if name]
        else:
            raise UserError("conf= is given twice; stack layers with a comma: conf=a,b")
    if not names:
        raise UserError("conf=NAME is missing; --help lists the configurations")
    return names, settings


def _value(key: str, text: str) -> Any:
    """The value of a setting, read as yaml. Empty is the empty string: the shell removes the quotes of key=""."""
    if not text:
        return ""
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{key}: cannot read {text!r} as yaml: {one_line(error)}") from error


def _text(key: str, text: str) -> str | None:
    """The value of a text key: literal, but without quotes if it is one quoted string."""
    if "${" in text:
        raise UserError(f"{key}: '${{' stands for the value of a key, so a text must not contain it, got {text!r}")
    if text[:1] in ("'", '"'):
        with suppress(yaml.YAMLError):
            node = yaml.compose(text)
            if isinstance(node, yaml.ScalarNode) and node.end_mark.index == len(text):
                return node.value
    return None if text == "null" else text


def _layers(names: list[str], root: Path) -> list[tuple[str, dict]]:
    """(name, content) of each file, once each, lowest first: the layers in `base:` come before their file."""
    layers: dict[Path, tuple[str, dict]] = {}

    def apply(name: str, *above: str) -> None:
        if name in above:
            raise UserError(f"`base:` is circular: {' -> '.join([*above[above.index(name) :], name])}")
        path = _find(name, root)
        if path in layers:
            return
        tree, bases = _read(path)
        lowest = next(iter(layers.values()), ("", {}))[0]
        if bases and lowest.endswith(".yaml"):  # a complete config, such as the saved one of a run
            raise UserError(f"{name} brings a base, which would undo {lowest}; stack one without `base:`")
        for base in bases:
            apply(base, *above, name)
        layers[path] = (name, tree)

    for name in names:
        apply(name)
    return list(layers.values())


def _find(name: str, root: Path) -> Path:
    path = Path(name) if name.endswith(".yaml") else root / f"{name}.yaml"
    if path.is_file():
        return path.resolve()
    raise UserError(f"no configuration {name!r}{hint(name, available(root))} (--help lists them)")


def _read(path: Path) -> tuple[dict, list[str]]:
    """The content of a yaml file and the names under its `base:`."""
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping at the top, got a {type(tree).__name__}")
    bases = tree.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not fits(bases, list[str]):
        raise UserError(f"{path}: base: expected a list of names, got {bases!r}")
    return tree, bases


def _compose(layers: list[tuple[str, dict]]) -> dict:
    (lowest, schema), *upper = layers
    tree = schema
    for name, layer in upper:
        if unknown := [str(key) for key in layer if key not in schema]:
            suggestion = hint(unknown[0], map(str, schema))
            raise UserError(f"{name}: {lowest} has no top-level key {unknown[0]!r}{suggestion}")
        if problem := next(_mistyped(tree, layer), None):
            raise UserError(f"{name}: {problem}")
        tree = _merge(tree, layer)
    return tree


def _merge(lower: Any, upper: Any) -> Any:
    if not (isinstance(lower, dict) and isinstance(upper, dict)) or _retargets(lower, upper):
        return upper
    return lower | {key: _merge(lower[key], value) if key in lower else value for key, value in upper.items()}


def _mistyped(lower: Any, upper: Any, name: str = "") -> Iterator[str]:
    """Messages for values whose type differs from the one they replace. Nodes are left to `check`."""
    if is_node(upper) or _is_open(lower) or _is_open(upper):
        return
    if is_node(lower):  # a string may name a layer
        if not isinstance(upper, dict | str):
            yield f"{name}: expected a mapping with `target:` or null, got {upper!r}"
    elif isinstance(lower, dict) and isinstance(upper, dict):
        for key in lower.keys() & upper.keys():
            yield from _mistyped(lower[key], upper[key], dotted(name, key))
    elif isinstance(lower, list) and isinstance(upper, list):
        for index, item in enumerate(upper if lower else []):
            yield from _mistyped(lower[0], item, dotted(name, index))
    elif type(upper) not in SCALARS.get(type(lower), (type(lower),)):
        suggestion = f"; write [{upper}]" if isinstance(lower, list) and not isinstance(upper, dict) else ""
        if isinstance(lower, dict) and lower:
            suggestion = f"; set a key of it, such as {dotted(name, next(iter(lower)))}=..."
        yield f"{name}: expected {_type_name(lower)}, got {upper!r}{suggestion}"


def _is_open(value: Any) -> bool:
    """Whether a value leaves its type open: null, `???` or an interpolation."""
    return value is None or (isinstance(value, str) and (value == "???" or "${" in value))


def _type_name(value: Any) -> str:
    return {dict: "a mapping", list: "a list"}.get(type(value), type(value).__name__)


def _retargets(old: dict, new: dict) -> bool:
    return "target" in new and new["target"] != old.get("target")


def _set(tree: dict, name: str, value: Any) -> None:
    """Replace a value, or give a node another argument of its target; with a + add a key to a mapping.

    A mapping is merged key by key, unless its `target:` changes.
    """
    parts = name.removeprefix("+").split(".")
    chain = _chain(tree, parts)
    if len(chain) <= len(parts):
        _add(tree, chain, name, value)
        return
    if name.startswith("+"):
        raise UserError(f"{name[1:]!r} exists already: set it without the +")
    owner, old = chain[-2:]
    if not any(map(is_node, chain[:-1])) and (problem := next(_mistyped(old, value, name), None)):
        raise UserError(problem)
    if old and value and isinstance(old, dict) and isinstance(value, dict) and not _retargets(old, value):
        for child, inner in value.items():
            _set(tree, f"{name}.{child}", inner)
    else:
        owner[_key(owner, parts[-1])] = value


def _add(tree: dict, chain: list[Any], name: str, value: Any) -> None:
    """Add a missing key to the last value of `chain`. Raises UserError with the nearest key if it cannot take it.

    No key can be added at the top level.
    """
    parts, owner = name.removeprefix("+").split("."), chain[-1]
    owner_name = dotted(*parts[: len(chain) - 1])
    names = [existing for existing, _ in walk(tree)]
    accepted = _arguments(owner, owner_name)
    is_owner = isinstance(owner, dict) and owner is not tree and len(chain) == len(parts)
    if is_owner and (name.startswith("+") or parts[-1] in accepted):
        owner[parts[-1]] = value
        return
    adds = f" (+{name}=... adds it)" if is_owner and not is_node(owner) else ""
    suggestion = hint(dotted(*parts), [*names, *(dotted(owner_name, argument) for argument in accepted)])
    raise UserError(f"unknown key {dotted(*parts)!r}{suggestion}{adds}")


def _arguments(owner: Any, owner_name: str) -> list[str]:
    """Arguments that the target of an owner accepts; none if it is no node or its target is still open."""
    if not is_node(owner) or _is_open(owner["target"]):
        return []
    try:
        return arguments(owner)
    except UserError as error:
        raise UserError(f"{dotted(owner_name, 'target')}: {error}") from error


def _chain(tree: dict, parts: list[str]) -> list[Any]:
    """The tree and the nested values along `parts`, up to the first part that does not exist."""
    chain: list[Any] = [tree]
    for part in parts:
        key = _key(chain[-1], part)
        if key is None:
            break
        chain.append(chain[-1][key])
    return chain


def _key(owner: Any, part: str) -> Any:
    """The key or list index that a part of a dotted name refers to; None if it does not exist."""
    keys = owner if isinstance(owner, dict) else range(len(owner)) if isinstance(owner, list) else ()
    return next((key for key in keys if str(key) == part), None)
