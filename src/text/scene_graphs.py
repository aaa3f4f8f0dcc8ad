"""Scene graphs of texts: objects, attributes and relations, read from the strings that a parser writes per sentence.

    "( dogs , is , brown ) , ( dogs , on , grass )"  -> read_graph -> entities and relations of one sentence
    graphs of all sentences of a text                -> merge      -> SceneGraph of the text

The strings are those of FACTUAL's parsers (arXiv 2305.17497), which CAPTURE builds on (arXiv 2405.19092).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from src.io.errors import UserError

Triple = tuple[str, str, str]
Lemma = Callable[[str, Literal["n", "a"]], str]  # base form of a noun or an adjective
EMPTY = {"": {"graphs": [], "nouns": []}}  # of an empty text
_BETWEEN = re.compile(r"\)\s*,")


@dataclass
class Entity:
    quantity: str = ""
    attributes: list[str] = field(default_factory=list)


@dataclass
class SceneGraph:
    """Of a whole text, without repeats, in the order of first mention. attributes: by the object they belong to."""

    objects: list[str] = field(default_factory=list)
    attributes: dict[str, list[str]] = field(default_factory=dict)
    relations: list[Triple] = field(default_factory=list)


def read_graph(text: str) -> tuple[dict[str, Entity], list[Triple]]:
    """Entities by name and relations of one graph string.

    A triple with `is` gives an attribute, or a quantity if it is a number. What has not three parts is dropped, unless
    it is all there is: then its first part is an entity.
    """
    entities: dict[str, Entity] = {}
    relations: list[Triple] = []
    items = _BETWEEN.split(text.strip())
    for item in items:
        parts = [part.strip() for part in item.strip().strip("()").split(",")]
        if len(parts) != 3:
            if len(items) == 1:
                entities[parts[0]] = Entity()
            continue
        subject, predicate, value = parts
        entity = entities.setdefault(subject, Entity())
        if predicate != "is":
            entities.setdefault(value, Entity())
            if (subject, predicate, value) not in relations:
                relations.append((subject, predicate, value))
        elif value.isdigit():
            entity.quantity = value
        elif value not in entity.attributes:
            entity.attributes.append(value)
    return entities, relations


def merge(graphs: Iterable[str], lemma: Lemma = lambda word, part: word) -> SceneGraph:
    """The graph of a text from those of its sentences: base forms of objects and attributes, predicates as they are.

    Attributes such as "made of wood" are left out, and numbers, as CAPTURE does.
    """
    objects: dict[str, None] = {}  # as ordered sets
    attributes: dict[str, dict[str, None]] = {}
    triples: dict[Triple, None] = {}
    for graph in graphs:
        entities, relations = read_graph(graph)
        for head, entity in entities.items():
            objects[name := lemma(head, "n")] = None
            for value in entity.attributes:
                if " of" not in value:
                    attributes.setdefault(name, {})[lemma(value, "a")] = None
        triples |= {(lemma(subject, "n"), predicate, lemma(end, "n")): None for subject, predicate, end in relations}
    return SceneGraph(list(objects), {name: list(values) for name, values in attributes.items()}, list(triples))


def read_graphs(file: str | Path) -> dict[str, dict[str, Any]]:
    """Lines {"text": ..., "graphs": [one per sentence], "nouns"?: [...]} by their text, and that of the empty text.

    Raises UserError for a file that is not there, or a line without `text` and `graphs`.
    """
    if not Path(file).is_file():
        raise UserError(f"there is no {file}, the graphs of the texts; conf=eval/capture writes one with its parser")
    lines = dict(EMPTY)
    for number, row in enumerate(Path(file).read_text("utf-8").strip().split("\n"), 1):
        try:
            line = json.loads(row)
            lines[line["text"].strip()] = {**line, "graphs": list(line["graphs"])}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'line {number} of {file} is not {{"text": ..., "graphs": [...]}}: {row[:80]}') from error
    return lines
