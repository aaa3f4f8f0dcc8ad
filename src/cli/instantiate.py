"""Build components from the nodes of a config.

    check(config, offers=...)               imports every target and binds its arguments, calls nothing
    build(config.node, **offers)            the component
    nodes(config.section, "section")        {key: node} of a section, where null disables an entry

A node is a mapping with `target: package.module.Class`; its other keys are keyword arguments. Nested nodes are built
first. Targets must be in one of PACKAGES.
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

    offers: names of the arguments that `build` will offer; sections: keys of mappings of nodes or null

    Raises UserError with all problems, each with its dotted name in the config.
    """
    tree: Any = plain(cfg)
    for section in sections:
        nodes(tree[section], section)
    names = set(offers)
    problems = []
    for name, value in walk(tree):
        if is_node(value):
            problems += [(dotted(name, key), text) for key, text in _problems(value, names)]
    if problems:
        raise UserError("\n  ".join(f"{place}: {text}" if place else text for place, text in problems))


def build(node: Any, /, **offers: Any) -> Any:
    """Construct the component that a node describes, its nested nodes first; it gets plain lists and dicts.

    offers: arguments for every target whose signature names them (not `**kwargs`) and whose node does not set them
    """
    tree = plain(node)
    if not is_node(tree):
        raise UserError(f"nothing to build: expected a mapping with `target:`, got {tree!r}")
    check(tree, offers=offers)
    return _build(tree, offers)


def nodes(section: Any, name: str) -> dict[str, dict]:
    """The nodes of a mapping by key, without null entries. name: of the mapping in the config, for errors"""
    tree = plain(section)
    if not isinstance(tree, dict):
        raise UserError(f"{name}: expected a mapping, got {tree!r}")
    entries = {str(key): node for key, node in tree.items() if node is not None}
    for key, node in entries.items():
        if not is_node(node):
            raise UserError(f"{dotted(name, key)}: expected a mapping with `target:` or null, got {node!r}")
    return entries


def arguments(node: dict) -> list[str]:
    """Names of the arguments of a node's target. Raises UserError if the target cannot be imported."""
    return list(_parameters(_locate(node["target"]))[0])


def with_arguments(tree: Any, /, **values: Any) -> Any:
    """The tree as plain data, with `values` set at every node whose target takes an argument of that name."""
    tree = plain(tree)
    if isinstance(tree, list):
        return [with_arguments(item, **values) for item in tree]
    if not isinstance(tree, dict):
        return tree
    taken = arguments(tree) if is_node(tree) else []
    inner = {key: with_arguments(item, **values) for key, item in tree.items()}
    return inner | {name: value for name, value in values.items() if name in taken}


def walk(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of a tree and of everything nested in it."""
    yield name, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from walk(child, dotted(name, key))


def dotted(*parts: Any) -> str:
    return ".".join(str(part) for part in parts if part != "")


def hint(name: str, known: Iterable[str]) -> str:
    """Text suggesting the nearest known name, also by its last part (`lr`: `optimizer.lr`), or "" if there is none."""
    known, tail = list(known), name.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(name, known, 5)
    by_tail = {full.rsplit(".", 1)[-1]: full for full in reversed([*close, *known])}
    if tail in by_tail and not tail.isdigit():
        matches = [by_tail[tail]]
    else:
        matches = close or [by_tail[end] for end in difflib.get_close_matches(tail, by_tail, 1)]
    return f"; did you mean {matches[0]!r}?" if matches else ""


def one_line(error: Exception) -> str:
    """An error's message without line breaks and without OmegaConf's appendix."""
    return " ".join(str(error).split("\n    full_key")[0].split())


def plain(tree: Any) -> Any:
    return OmegaConf.to_container(tree, resolve=True) if OmegaConf.is_config(tree) else tree


def is_node(value: Any) -> bool:
    """Whether a value describes a component."""
    return isinstance(value, dict) and "target" in value


def _build(value: Any, offers: dict, name: str = "") -> Any:
    if isinstance(value, list):
        return [_build(item, offers, dotted(name, index)) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    inner = {key: _build(item, offers, dotted(name, key)) for key, item in value.items()}
    if not is_node(value):
        return inner
    target = inner.pop("target")
    component = _locate(target)
    kwargs = {key: offer for key, offer in offers.items() if key in _parameters(component)[0]} | inner
    place = f"{name} ({target})" if name else target
    try:
        return component(**kwargs)
    except UserError as error:
        raise UserError(f"{place}: {one_line(error)}") from error
    except (ValueError, TypeError, OSError) as error:
        if target.split(".")[0] in OWN:  # keep the traceback for our own components and those that a user adds
            raise
        raise UserError(f"{place}: {one_line(error)}") from error


def _locate(target: Any) -> Callable:
    """Import a class, a function, or a method such as `src.text.tokenizer.Codec.load`."""
    parts = str(target).split(".")
    if parts[0] not in PACKAGES:
        raise UserError(f"{target!r} is not in the packages {', '.join(PACKAGES)}")
    component: Any = _import(parts[0])
    for end, part in enumerate(parts[1:], start=1):
        owner, path = component, ".".join(parts[:end])
        component = getattr(owner, part, None)
        if component is None and hasattr(owner, "__path__"):
            component = _import(f"{path}.{part}")
        if component is None:
            names = [*dir(owner), *(m.name for m in pkgutil.iter_modules(getattr(owner, "__path__", [])))]
            raise UserError(f"{path} has no {part!r}{hint(part, names)}")
    if not callable(component):
        raise UserError(f"{target} is not a class or function")
    module = getattr(component, "__module__", None) or parts[0]
    if module.split(".")[0] not in PACKAGES:
        raise UserError(f"{target} is from {module}, which is not in the packages {', '.join(PACKAGES)}")
    return component


def _import(name: str) -> Any:
    """A module by name; None if its package has no such module. Raises UserError for a missing package of others."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name and "." in name:
            return None
        if str(error.name).split(".")[0] in OWN:  # a bug of ours or of a user's component: its traceback says where
            raise
        raise UserError(f"cannot import {name}: {error}") from error


def _parameters(component: Callable) -> tuple[dict[str, inspect.Parameter], bool]:
    """The parameters that can be passed by name, and whether there is a `**kwargs`.

    If a constructor has one, those of the next constructor above it as well; it may set them, so none is required.
    """
    try:
        parameters = inspect.signature(component).parameters.values()
    except (ValueError, TypeError):  # a C function without a signature
        return {}, True
    by_name = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    has_kwargs = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if has_kwargs and isinstance(component, type):
        owners = [number for number, kind in enumerate(component.__mro__) if "__init__" in vars(kind)]
        for above in component.__mro__[owners[0] + 1 : owners[0] + 2]:
            by_name = {p.name: p.replace(default=...) for p in _parameters(above)[0].values()} | by_name
    return by_name, has_kwargs


def _problems(node: dict, offers: set[str]) -> Iterator[tuple[str, str]]:
    target = node["target"]
    try:
        component = _locate(target)
    except UserError as error:
        yield "target", str(error)
        return
    parameters, has_kwargs = _parameters(component)
    for key in [key for key in node if key != "target"]:
        if key in parameters:
            kind = _annotation(component, parameters[key])
            if not fits(node[key], kind) and not (node[key] is None and parameters[key].default is None):
                yield key, f"expected {inspect.formatannotation(kind)}, got {node[key]!r}"
        elif not has_kwargs:
            yield key, f"{target} has no argument {key!r}{hint(str(key), parameters)}"
    required = {name for name, p in parameters.items() if p.default is p.empty}
    if missing := sorted(required - node.keys() - offers):
        yield "", f"{target} needs {', '.join(missing)}"


def _annotation(component: Callable, parameter: inspect.Parameter) -> Any:
    """The type of a parameter; Any if it cannot be evaluated, such as a name imported under TYPE_CHECKING."""
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    function: Any = component.__init__ if isinstance(component, type) else component
    try:
        return eval(parameter.annotation, getattr(inspect.unwrap(function), "__globals__", {}))
    except (NameError, AttributeError, TypeError, SyntaxError):
        return Any


def fits(value: Any, hint: Any) -> bool:
    """Whether a yaml value fits an annotation of scalars, lists and mappings of these.

    A scalar does not fit a class of ours, as it is built from a mapping. True for any other annotation.
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
