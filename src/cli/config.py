"""Yaml layers and key=value settings -> one resolved, read-only config.

    python -m src.train conf=stage2,debug seed=1 optim.lr=1e-4

    conf=a,b       reads ROOT/a.yaml, then ROOT/b.yaml on top; a name may be `cluster/NAME`; a name that ends
                   in `.yaml` is a path: the `config.yaml` in a run's folder repeats that run
    base: [x, y]   inside a yaml: layers that apply before it, each once
    key=value      changes an existing key (dotted; list indices are numbers), or gives a node an argument that its
                   target accepts; the value is read as yaml, and an empty one (key= or key="") is the empty string;
                   text keys of a verb, such as prompt= of src.generate, are taken literally: only null is None
    +key=value     adds a key to a mapping, as in +evaluate.models.mine=runs/mine/model
    key=NAME       for a top-level key that holds a mapping: applies the layer ROOT/key/NAME.yaml, as in
                   model=llada_v; a NAME that ends in `.yaml` is a path
    --print        prints the config and stops

Mappings merge, lists replace, and a mapping whose `target:` changes is replaced as a whole. The lowest layer fixes
the top-level keys. `???` marks a value that must be given.

WARN: `${oc.env:NAME}` is resolved like any other interpolation, so its value is written to the saved config.
For a secret, give a component the *name* of the variable and let it read the environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.cli.help import available, config_root
from src.cli.instantiate import SCALARS, arguments, dotted, hint, is_node, one_line, plain, walk
from src.io.errors import UserError
from src.io.files import write_bytes

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

    # 1. The layers of conf=.
    tree = _compose(names, folder)
    if missing := [key for key in needs if key not in tree]:
        raise UserError(f"conf={','.join(names)} is not for {verb}: it has no key {missing[0]!r}; see --help")

    # 2. Settings that name a further layer: key=NAME for a mapping, or for a null where the folder ROOT/key exists.
    layers = [
        (key, value)
        for key, value in settings
        if isinstance(value, str)
        and (isinstance(tree.get(key), dict) or (key in tree and tree[key] is None and (folder / key).is_dir()))
    ]
    if layers:
        tree = _compose([*names, *(_layer_name(key, value) for key, value in layers)], folder)

    # 3. All other settings, then interpolations.
    for key, value in settings:
        if (key, value) not in layers:
            top, _, below = key.partition(".")
            if below and isinstance(tree.get(top), str) and below not in tree and (folder / top).is_dir():
                raise UserError(_below_name(key, load_part(top, tree[top], root=folder), tree[top]))
            _set(tree, key, value)
    if missing := [name for name, value in walk(tree) if value == "???"]:
        raise UserError(f"these keys must be given: {', '.join(missing)}")
    try:
        resolved = plain(OmegaConf.create(tree))
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {one_line(error)}") from error
    if PRINT in argv:
        sys.stdout.write(OmegaConf.to_yaml(resolved))
        sys.exit()
    return OmegaConf.create(resolved, flags={"readonly": True})


def load_part(key: str, name: str, *, root: str | Path = "conf") -> dict:
    """The resolved node under KEY in the layer ROOT/KEY/NAME.yaml, or in the .yaml file NAME."""
    return plain(load_config([f"conf={_layer_name(key, name)}"], verb=key, needs=[key], root=root))[key]


def save_config(cfg: DictConfig, path: str | Path) -> None:
    """Write the resolved config as yaml, atomically."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(Path(path), OmegaConf.to_yaml(cfg, resolve=True).encode())


def path_of(cfg: DictConfig, key: str) -> Path:
    """The path under a key. Raises UserError if it is missing or not a path."""
    value = OmegaConf.select(cfg, key)
    if not isinstance(value, str) or not value:
        raise UserError(f"{key}: expected a path, got {value!r}")
    return Path(value)


def _layer_name(key: str, name: str) -> str:
    return name if name.endswith(".yaml") else f"{key}/{name}"


def _parse(argv: Iterable[str], root: Path, texts: set[str]) -> tuple[list[str], list[tuple[str, Any]]]:
    """The names in `conf=` and the (dotted name, value) of every other argument."""
    names, settings = None, []
    for argument in argv:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            suggestion = f"; did you mean conf={argument}?" if (root / f"{argument}.yaml").is_file() else ""
            raise UserError(f"expected key=value, got {argument!r}{suggestion}")
        if key != "conf":
            literal = None if text == "null" else text
            settings.append((key, literal if key in texts else _value(key, text)))
        elif names is None:
            names = [name for name in text.split(",") if name]
        else:
            raise UserError("conf= is given twice; stack layers with a comma: conf=a,b")
    if not names:
        raise UserError("conf=NAME is missing; --help lists the configurations")
    return names, settings


def _value(key: str, text: str) -> Any:
    """The value of a setting, read as yaml. Empty is the empty string: the shell removes the quotes of key=""."""
    if text.startswith("~/"):  # the shell expands it at the start of a word only
        return os.path.expanduser(text)
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"] if text else ""  # type: ignore[index]
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeEncodeError) as error:  # the last: not UTF-8
        raise UserError(f"{key}: cannot read {text!r} as yaml: {one_line(error)}") from error


def _compose(names: list[str], root: Path) -> dict:
    """The layers merged, lowest first. Raises UserError for a new top-level key or a value of another type."""
    layers: dict[Path, tuple[str, dict]] = {}
    for name in names:
        _add_layers(layers, name, root)
    (lowest, schema), *upper = layers.values()
    tree = schema
    for name, layer in upper:
        if unknown := [str(key) for key in layer if key not in schema]:
            suggestion = hint(unknown[0], map(str, schema))
            raise UserError(f"{name}: {lowest} has no top-level key {unknown[0]!r}{suggestion}")
        if problem := next(_mistyped(tree, layer), None):
            raise UserError(f"{name}: {problem}")
        tree = _merge(tree, layer)
    return tree


def _add_layers(layers: dict[Path, tuple[str, dict]], name: str, root: Path) -> None:
    """Add the (name, content) of a file under its path, after those of the layers in its `base:`."""
    path = (Path(name) if name.endswith(".yaml") else root / f"{name}.yaml").resolve()
    if not path.is_file():
        raise UserError(f"no configuration {name!r}{hint(name, available(root))} (--help lists them)")
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping at the top, got a {type(tree).__name__}")
    bases = tree.pop("base", [])
    lowest = next(iter(layers.values()), ("", {}))[0]
    if bases and lowest.endswith(".yaml"):  # a complete config, such as the saved one of a run
        raise UserError(f"{name} brings a base, which would undo {lowest}; stack one without `base:`")
    for base in [bases] if isinstance(bases, str) else bases:
        _add_layers(layers, base, root)
    layers[path] = (name, tree)  # a second time keeps the first place


def _merge(lower: Any, upper: Any) -> Any:
    """`upper` on top of `lower`. OmegaConf.merge would merge a node into one of another target."""
    both = isinstance(lower, dict) and isinstance(upper, dict)
    if not both or upper.get("target", lower.get("target")) != lower.get("target"):
        return upper
    return lower | {key: _merge(lower[key], value) if key in lower else value for key, value in upper.items()}


def _mistyped(lower: Any, upper: Any, name: str = "") -> Iterator[str]:
    """Messages for values whose type differs from the one they replace. Nodes are left to `check`."""
    if is_node(upper) or _is_open(lower) or _is_open(upper):
        return
    if is_node(lower):
        if not isinstance(upper, dict | str):  # a string may name a layer
            yield f"{name}: expected a mapping with `target:` or null, got {upper!r}"
    elif isinstance(lower, dict) and isinstance(upper, dict):
        for key in lower.keys() & upper.keys():
            yield from _mistyped(lower[key], upper[key], dotted(name, key))
    elif isinstance(lower, list) and isinstance(upper, list):
        for index, item in enumerate(upper if lower else []):
            yield from _mistyped(lower[0], item, dotted(name, index))
    elif type(upper) not in SCALARS.get(type(lower), ()):
        kind = {dict: "a mapping", list: "a list"}.get(type(lower), type(lower).__name__)
        yield f"{name}: expected {kind}, got {upper!r}"


def _is_open(value: Any) -> bool:
    """Whether a value leaves its type open: null, `???` or an interpolation."""
    return value is None or (isinstance(value, str) and (value == "???" or "${" in value))


def _set(tree: dict, name: str, value: Any) -> None:
    """Set a value of the tree by its dotted name; a name with a + adds a key to a mapping.

    A mapping is merged key by key, unless its `target:` changes. Raises UserError for an unknown key.
    """
    full = name.removeprefix("+")
    parent, _, last = full.rpartition(".")
    values = dict(walk(tree))  # dotted name -> value
    if full not in values:
        while parent not in values:
            parent = parent.rpartition(".")[0]
        _add(values[parent], parent, full, value, plus=name.startswith("+"), names=list(values))
        return
    if name.startswith("+"):
        raise UserError(f"{full!r} exists already: set it without the +")
    old = values[full]
    parts = full.split(".")
    within_node = any(is_node(values[".".join(parts[:end])]) for end in range(1, len(parts)))
    if not within_node and (problem := next(_mistyped(old, value, full), None)):
        raise UserError(problem)
    if old and value and isinstance(old, dict) and isinstance(value, dict) and _merge(old, value) is not value:
        for child, inner in value.items():
            _set(tree, f"{full}.{child}", inner)
    else:
        owner = values[parent]
        keys = range(len(owner)) if isinstance(owner, list) else owner
        owner[next(key for key in keys if str(key) == last)] = value


def _below_name(key: str, node: dict, name: str) -> str:
    """What to say of a key below a part that the config only names: `sampler.reviser.x` with `sampler: refine`."""
    top, _, below = key.partition(".")
    place = below.rpartition(".")[0]
    owner: Any = dict(walk(node)).get(place)
    keys = f"; {dotted(top, place)} takes {', '.join(arguments(owner))}" if is_node(owner) else ""
    base = f"`base: {_layer_name(top, name)}`, as in docs/samplers.md"
    return f"unknown key {key!r}: {top}={name} names a file; set its keys in a .yaml of your own with {base}{keys}"


def _add(owner: Any, owner_name: str, name: str, value: Any, *, plus: bool, names: list[str]) -> None:
    """Add a key to a mapping below the top level: any with a +, otherwise an argument of a node's target.

    owner: the innermost existing value on the way to `name`; names: all existing ones, for the hint
    """
    key = name.removeprefix(f"{owner_name}.")
    can_take = isinstance(owner, dict) and owner_name != "" and "." not in key
    accepted: list[str] = []
    if is_node(owner) and not _is_open(owner["target"]):
        try:
            accepted = arguments(owner)
        except UserError as error:
            raise UserError(f"{dotted(owner_name, 'target')}: {error}") from error
    if can_take and (plus or key in accepted):
        owner[key] = value
        return
    suggestion = hint(name, [*names, *(dotted(owner_name, argument) for argument in accepted)])
    head, _, below = key.partition(".")
    is_near = hint(head, accepted) and not (below and head in accepted)
    if accepted and not is_near and not suggestion.endswith(f".{key}'?"):
        suggestion = f"; {owner_name} takes {', '.join(accepted)}"
    adds = f" (+{name}=... adds it)" if can_take and not is_node(owner) else ""
    raise UserError(f"unknown key {name!r}{suggestion}{adds}")
