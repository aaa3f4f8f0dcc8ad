"""Nodes of a config -> components.

    check(config, offers=...)               imports every target and binds its arguments, calls nothing
    build(config.node, **offers)            the component
    nodes(config.section, "section")        {key: node} of a section in which null switches one off

A node is a mapping with `target: package.module.Class`; its other keys are keyword arguments. Nested nodes are built
first. Targets come from an allow-list of packages.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from src.io.errors import UserError

PACKAGES = ("src", "callbacks", "datamodules", "torch", "lightning", "torchmetrics", "transformers")
OWN = PACKAGES[:3]
SCALARS = {bool: (bool,), int: (int,), float: (float, int), str: (str,), type(None): (type(None),)}


def check(cfg: DictConfig | ListConfig | dict, *, offers: Iterable[str] = (), sections: Iterable[str] = ()) -> None:
    """Import every `target:` and bind its arguments without calling it.

    offers: the names `build` will get; sections: keys of mappings in which every value is a node or null

    Raises UserError with all problems, each with its dotted place in the config.
    """
    tree: Any = plain(cfg)
    for section in sections:
        nodes(tree[section], section)
    names, there = set(offers), [(name, value) for name, value in walk(tree) if is_node(value)]
    found = [(dotted(name, key), text) for name, node in there for key, text in _problems(node, names)]
    if found:
        raise UserError("\n  ".join(f"{place}: {text}" if place else text for place, text in found))


def build(node: Any, /, **offers: Any) -> Any:
    """Construct the component that a node describes, its nested nodes first.

    An offer reaches a target only where the signature names it (not through `**kwargs`) and the yaml does not
    give it. Components get plain lists and dicts.
    """
    tree = plain(node)
    if not is_node(tree):
        raise UserError(f"nothing to build: expected a mapping with `target:`, got {tree!r}")
    check(tree, offers=offers)
    return _build(tree, offers)


def nodes(section: Any, name: str) -> dict[str, dict]:
    """The nodes of a mapping by key, without those that are null. UserError, with its place, for anything else.

    name: the place of the mapping in the config
    """
    tree = plain(section)
    if not isinstance(tree, dict):
        raise UserError(f"{name}: expected a mapping, got {tree!r}")
    found = {str(key): node for key, node in tree.items() if node is not None}
    if wrong := next((key for key, node in found.items() if not is_node(node)), None):
        raise UserError(f"{dotted(name, wrong)}: expected a mapping with `target:` or null, got {found[wrong]!r}")
    return found


def arguments(node: dict) -> list[str]:
    """The arguments that the target of a node takes by name. UserError if the target cannot be imported."""
    return list(_parameters(_locate(node["target"]))[0])


def walk(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of a tree and all that is in it."""
    yield name, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from walk(child, dotted(name, key))


def dotted(*parts: Any) -> str:
    """The parts of a place in the config, joined by dots."""
    return ".".join(str(part) for part in parts if part != "")


def hint(name: str, known: Iterable[str]) -> str:
    """The nearest known name, or one that ends in nearly the same word: `lr` means `optimizer.lr`."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1)
    if not near:
        last = {full.rsplit(".", 1)[-1]: full for full in reversed(known)}
        near = [last[end] for end in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, 1)]
    return f"; did you mean {near[0]!r}?" if near else ""


def one_line(error: Exception) -> str:
    """An error's message without line breaks and without OmegaConf's appendix."""
    return " ".join(str(error).split("\n    full_key")[0].split())


def plain(tree: Any) -> Any:
    """A config as plain lists and dicts, interpolations resolved."""
    return OmegaConf.to_container(tree, resolve=True) if OmegaConf.is_config(tree) else tree


def is_node(value: Any) -> bool:
    """Whether a value describes a component."""
    return isinstance(value, dict) and "target" in value


def _build(value: Any, offers: dict, name: str = "") -> Any:
    if isinstance(value, list):
        return [_build(item, offers, dotted(name, place)) for place, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    inner = {key: _build(item, offers, dotted(name, key)) for key, item in value.items()}
    if not is_node(value):
        return inner
    target = inner.pop("target")
    component = _locate(target)
    given = {key: offer for key, offer in offers.items() if key in _parameters(component)[0]} | inner
    place = f"{name} ({target})" if name else target
    try:
        return component(**given)
    except UserError as error:
        raise UserError(f"{place}: {one_line(error)}") from error
    except (ValueError, TypeError, OSError) as error:
        if target.split(".")[0] in OWN:  # also a component that a user has added here: its traceback says more
            raise
        raise UserError(f"{place}: {one_line(error)}") from error


def _locate(target: Any) -> Callable:
    """Import what `target:` names: a class or function, or a method such as `src.text.tokenizer.Codec.load`."""
    parts = str(target).split(".")
    if parts[0] not in PACKAGES:
        raise UserError(f"{target!r} is not in the packages {', '.join(PACKAGES)}")
    found: Any = _import(parts[0])
    for end, part in enumerate(parts[1:], start=1):
        owner, path = found, ".".join(parts[:end])
        found = getattr(owner, part, None)
        if found is None and hasattr(owner, "__path__"):
            found = _import(f"{path}.{part}")
        if found is None:
            known = [*dir(owner), *(m.name for m in pkgutil.iter_modules(getattr(owner, "__path__", [])))]
            raise UserError(f"{path} has no {part!r}{hint(part, known)}")
    if inspect.ismodule(found) or not callable(found):
        raise UserError(f"{target} is not a class or function")
    home = getattr(found, "__module__", None) or parts[0]
    if home.split(".")[0] not in PACKAGES:
        raise UserError(f"{target} is from {home}, which is not in the packages {', '.join(PACKAGES)}")
    return found


def _import(name: str) -> Any:
    """The module of that name; None where a package has no such module."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name and "." in name:
            return None
        raise UserError(f"cannot import {name}: {error}") from error


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
    target = node["target"]
    try:
        component = _locate(target)
    except UserError as error:
        yield "target", str(error)
        return
    parameters, takes_any = _parameters(component)
    for key in [key for key in node if key != "target"]:
        if key in parameters:
            kind = _annotation(component, parameters[key])
            if not fits(node[key], kind) and not (node[key] is None and parameters[key].default is None):
                yield key, f"expected {inspect.formatannotation(kind)}, got {node[key]!r}"
        elif not takes_any:
            yield key, f"{target} has no argument {key!r}{hint(str(key), parameters)}"
    required = {name for name, p in parameters.items() if p.default is p.empty}
    if missing := sorted(required - node.keys() - offers):
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


def fits(value: Any, hint: Any) -> bool:
    """Whether a yaml value fits an annotation of scalars, lists and mappings of these.

    A component of ours is made from a mapping, so no scalar fits it. True where nothing can be judged.
    """
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, choice) for choice in inner)
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner)
    if allowed := [fitting for kind, fitting in SCALARS.items() if origin is kind]:
        return type(value) in allowed[0]
    if origin in (dict, Mapping) and not is_node(value):
        return isinstance(value, dict) and (not inner or all(fits(item, inner[1]) for item in value.values()))
    if origin not in (list, tuple, Sequence):
        ours = isinstance(origin, type) and origin.__module__.split(".")[0] in OWN
        return not (ours and isinstance(value, str | int | float))
    if not isinstance(value, list):
        return False
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        return len(value) == len(inner) and all(map(fits, value, inner))
    return not inner or all(fits(item, inner[0]) for item in value)
