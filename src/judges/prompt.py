"""The words of a judge's requests: a yaml file of templates, ours in src/judges/prompts or your own.

    prompt = Prompt.load("clair")                        src/judges/prompts/clair.yaml
    prompt = Prompt.load("clair", Path("originals"))     originals/clair.yaml
    prompt.messages("score", {"caption": ..., "references": ...})       {"system": ..., "user": ...}

A file holds `version` and, for each step of its judge, `STEP.system` and `STEP.user`; `$name` is filled in. A message
that is absent is not sent. To use the words of a released scorer, which may not be copied into this project, write a
file with the same keys that says where in your clone of its repository they are:

    score.system: {file: ../clone/scorer.py, name: PROMPT, fields: {caption: "{captions}", references: "{refs}"}}

`file` is relative to the yaml file; `name`: of a Python variable that is set to a string there, without it the whole
file is taken; `fields`: what stands there for `$caption` and the others of ours.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import yaml

from src.io.errors import UserError

FOLDER = Path(__file__).with_name("prompts")


@dataclass(frozen=True)
class Prompt:
    """texts: template by `STEP.system` or `STEP.user`; digest: a hash of them; version: as the file says"""

    texts: Mapping[str, str]
    digest: str
    version: str

    @classmethod
    def load(cls, name: str, folder: str | Path | None = None) -> Prompt:
        """The file NAME.yaml of a folder (None: ours). Raises UserError if there is none."""
        path = Path(folder or FOLDER) / f"{name}.yaml"
        if not path.is_file():
            raise UserError(f"there is no {path}; copy {FOLDER / path.name} there and change it")
        entries = yaml.safe_load(path.read_text("utf-8"))
        version = str(entries.pop("version", ""))
        texts = {key: _text(entry, path) for key, entry in entries.items()}
        digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:16]
        return cls(texts, digest, version)

    def messages(self, step: str, fields: Mapping[str, str]) -> dict[str, str]:
        """`system` and `user` of a step, with the fields filled in.

        Raises UserError if they do not show every field, and no other.
        """
        system, user = (Template(self.texts.get(f"{step}.{role}", "")) for role in ("system", "user"))
        shown = {*system.get_identifiers(), *user.get_identifiers()}
        if wrong := shown ^ fields.keys():
            names = ", ".join(f"${name}" for name in fields)
            raise UserError(f"{step}.system and {step}.user must show {names}; check {', '.join(sorted(wrong))}")
        return {"system": system.substitute(fields), "user": user.substitute(fields)}


def bullets(texts: Sequence[str]) -> str:
    """The texts as a list; a single one stays as it is."""
    return texts[0] if len(texts) == 1 else "\n".join(f"- {text}" for text in texts)


def _text(entry: str | dict[str, Any], path: Path) -> str:
    """A template, given as itself or by where it is. Raises UserError for a string that is not there."""
    if isinstance(entry, str):
        return entry
    file = path.parent / entry["file"]
    text = file.read_text("utf-8")
    if name := entry.get("name"):
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assign)]
        values = [node.value for node in nodes if name in map(ast.unparse, node.targets)]
        if len(values) != 1 or not isinstance(values[0], ast.Constant | ast.JoinedStr):
            raise UserError(f"{file} does not set {name} to a string exactly once (named in {path})")
        text = _string(values[0])
    text = text.replace("$", "$$")
    for field, placeholder in entry.get("fields", {}).items():
        text = text.replace(placeholder, f"${{{field}}}")
    return text


def _string(node: ast.Constant | ast.JoinedStr) -> str:
    """The value of a string literal; of an f-string with its expressions in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(
        f"{{{ast.unparse(part.value)}}}" if isinstance(part, ast.FormattedValue) else ast.literal_eval(part)
        for part in node.values
    )
