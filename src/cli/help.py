"""Text of --help: a verb's docstring, the arguments, and the configurations that fit it, one line each.

`src/__init__.py` prints it before a verb's own imports run, as torch takes seconds to import.
"""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import yaml

# Verb -> top-level keys that its configurations must have.
NEEDS: dict[str, tuple[str, ...]] = {
    "src.train": ("data", "model", "objective", "optim", "trainer", "callbacks", "plan"),
    "src.submit": ("cluster", "data", "model", "objective", "optim", "trainer", "callbacks", "plan"),
    "src.generate": ("images", "sampler"),
    "src.evaluate": ("evaluate",),
    "src.study": ("budget", "tables"),
    "src.prepare": ("prepare",),
    "src.draft": ("data", "num", "round", "sampler"),
    "src.revise": ("drafts", "expert"),
    "src.export": ("format", "like"),
    "src.serve": ("model", "limits", "hosts"),
    "src.demo": ("pictures", "samplers"),
}
NAME = 30  # columns for the name of a configuration
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
USAGE = """\
arguments: conf=NAME[,NAME...] [key=value ...] [+key=value ...] [--print]
    NAME may be the path of a .yaml file; +key=value adds a key to a mapping; --print prints the config and stops
"""


def help_text(verb: str, doc: str | None, root: str | Path = "conf") -> str:
    """The full text. verb: such as `src.train`; one that is not in NEEDS lists every configuration."""
    folder = config_root(root)
    alone, layers = fitting(verb, folder)
    lines = ["configurations:", *(_entry(folder, name) for name in alone)]
    if layers:
        lines += ["layers on top of one of these, as in conf=A,B:", *(_entry(folder, name) for name in layers)]
    return f"{(doc or '').strip()}\n\n{USAGE}" + "\n".join(lines) + "\n"


def docstring(verb: str) -> str | None:
    path = Path(__file__).resolve().parents[2].joinpath(*verb.split(".")).with_suffix(".py")
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def fitting(verb: str, root: Path) -> tuple[list[str], list[str]]:
    """Names of the complete configurations for a verb, and of the layers that fit on top of one of them."""
    trees = {}
    for name in available(root):
        with (root / f"{name}.yaml").open(encoding="utf-8") as file:
            trees[name] = yaml.load(file, Loader=LOADER) or {}
    if verb not in NEEDS:
        return list(trees), []

    def lowest(tree: dict) -> dict:
        """The lowest layer that a file stands on: the first of its `base:`, followed down."""
        bases = tree.get("base")
        return lowest(trees.get(bases if isinstance(bases, str) else bases[0], {})) if bases else tree

    lowest_trees = {name: lowest(tree) for name, tree in trees.items()}
    alone = [name for name, tree in lowest_trees.items() if tree.keys() >= set(NEEDS[verb])]
    complete = [name for name, tree in lowest_trees.items() if any(tree.keys() >= set(n) for n in NEEDS.values())]

    def fits(layer: dict, tree: dict) -> bool:
        """Whether each key of a layer is in the tree, and no mapping replaces a name or a path there."""
        keys = [key for key in layer if key != "base"]
        return all(key in tree and not (isinstance(layer[key], dict) and isinstance(tree[key], str)) for key in keys)

    names = [name for name in trees if name not in complete and trees[name]]
    return alone, [name for name in names if any(fits(trees[name], lowest_trees[base]) for base in alone)]


def available(root: Path) -> list[str]:
    """Names of all configurations, in subfolders as `folder/name`."""
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def config_root(root: str | Path) -> Path:
    """The folder of the configurations; a relative one that does not exist is looked up beside this package."""
    return Path(root) if Path(root).is_dir() else Path(__file__).resolve().parents[2] / root


def _entry(root: Path, name: str) -> str:
    """A name and the first comment line of its file, wrapped to 120 columns."""
    first = (root / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    about = first.removeprefix("#").strip() if first.startswith("#") else ""
    indent = " " * (NAME + 5)
    return textwrap.fill(f"    {name:<{NAME}} {about}", 120, subsequent_indent=indent, break_on_hyphens=False)
