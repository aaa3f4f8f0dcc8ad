"""The caption grammar: one table of sentence templates that both generates captions and parses them.

    write_caption(scene, rng) -> str           several sentences, varied wording, objects in raster order
    write_brief(scene, rng) -> str             the same facts as a list, outside the grammar
    read_caption(text) -> [Sentence]           every sentence with its statement, or None if it is ungrammatical
    false_fields(scene, statement) -> {field}  the fields of a statement that contradict the scene
    swaps(scene, text, rng) -> [Swap]          one-word replacements that make a fact false

A template is a sequence of words with one blank between them; a word such as `{colour}` is a field. Every generated
caption parses without loss.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from random import Random

from src.scenes.graph import BACKGROUNDS, COLOURS, COLUMNS, LOOKS, ROWS, SHAPES, SIZES, Look, Scene, relations

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LEXICON: dict[str, tuple[str, ...]] = {
    "size": SIZES,
    "colour": COLOURS,
    "shape": SHAPES,
    "row": ROWS,
    "column": COLUMNS,
    "background": BACKGROUNDS,
    "number": NUMBERS,
    "noun": ("object", "objects"),
    "side": ("left", "right"),
    "level": ("above", "below"),
    "colour2": COLOURS,
    "shape2": SHAPES,
}
TEMPLATES: dict[str, tuple[str, ...]] = {
    "object": (
        "A {size} {colour} {shape} is in the {row} {column}.",
        "In the {row} {column} there is a {size} {colour} {shape}.",
        "The {row} {column} holds a {colour} {shape} that is {size}.",
        "A {colour} {shape}, quite {size}, sits in the {row} {column}.",
        "There is a {shape} in the {row} {column}, {size} and {colour}.",
        "At the {row} {column} we see a {size} {shape} of {colour} color.",
    ),
    "intro": (
        "The picture shows {number} {noun} on a {background} background.",
        "On a {background} background we find {number} {noun}.",
        "{number} {noun} can be seen on a {background} background.",
        "A {background} background carries {number} {noun}.",
    ),
    "relation": (
        "The {colour} {shape} is {side} of the {colour2} {shape2}.",
        "To the {side} of the {colour2} {shape2} lies the {colour} {shape}.",
        "The {colour} {shape} is {level} the {colour2} {shape2}.",
        "One finds the {colour} {shape} {level} the {colour2} {shape2}.",
    ),
}
FACT_OF_FIELD = {
    "shape": "object",
    "colour": "attribute",
    "size": "attribute",
    "background": "attribute",
    "number": "count",
    "row": "place",
    "column": "place",
    "side": "relation",
    "level": "relation",
}
_SLOT = re.compile(r"\{(\w+)\}([.,]?)")
_SENTENCE = re.compile(r"\S[^.]*(?:\.|$)", re.DOTALL)


@dataclass(frozen=True)
class Statement:
    """The meaning of a sentence: template kind (`object`, `intro`, `relation`), template index, and field values."""

    kind: str
    template: int
    fields: dict[str, str]


@dataclass(frozen=True)
class Sentence:
    """A sentence of a text: its character range, its statement (None: ungrammatical), and the range of each field."""

    start: int
    end: int
    statement: Statement | None
    places: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Swap:
    """A replacement that makes a caption false: `wrong` for `text[start:end] == right`; `fact`: the kind of fact."""

    start: int
    end: int
    right: str
    wrong: str
    fact: str


def template_words(kind: str, index: int) -> list[tuple[str, str | None, str]]:
    """The words of a template as (word, field or None, trailing punctuation)."""
    words: list[tuple[str, str | None, str]] = []
    for word in TEMPLATES[kind][index].split(" "):
        slot = _SLOT.fullmatch(word)
        words.append((word, slot[1], slot[2]) if slot else (word, None, ""))
    return words


def write_sentence(statement: Statement) -> str:
    """The sentence of a statement, capitalized."""
    text = TEMPLATES[statement.kind][statement.template].format(**statement.fields)
    return text[0].upper() + text[1:]


def write_caption(scene: Scene, rng: Random, *, relation_rates: Sequence[float] = (0.6,)) -> str:
    """A true, detailed caption: an introduction first or last, the objects in raster order, relations between them.

    relation_rates: see `draw_relations`
    """
    # 1. a sentence for each object
    sentences = []
    for item in scene.objects:
        fields = {name: getattr(item, name) for name in ("size", "colour", "shape", "row", "column")}
        sentences.append(write_sentence(Statement("object", rng.randrange(len(TEMPLATES["object"])), fields)))
    # 2. relations between two objects
    for fields in draw_relations(scene, rng, relation_rates):
        templates = (0, 1) if "side" in fields else (2, 3)
        sentences.append(write_sentence(Statement("relation", rng.choice(templates), fields)))
    # 3. the introduction
    count = len(scene.objects)
    fields = {"number": NUMBERS[count - 1], "noun": LEXICON["noun"][count > 1], "background": scene.background}
    intro = write_sentence(Statement("intro", rng.randrange(len(TEMPLATES["intro"])), fields))
    sentences.insert(0 if rng.random() < 0.7 else len(sentences), intro)
    return " ".join(sentences)


def write_brief(scene: Scene, rng: Random, *, relation_rates: Sequence[float] = (0.6,)) -> str:
    """The facts of a detailed caption as a list: the short captions of the base model's alignment phase.

    Such as `Two on pink, upper left small red circle, lower right large blue ring, red circle left of blue ring.`
    """
    parts = [f"{NUMBERS[len(scene.objects) - 1].capitalize()} on {scene.background}"]
    parts += [f"{o.row} {o.column} {o.size} {o.colour} {o.shape}" for o in scene.objects]
    for fields in draw_relations(scene, rng, relation_rates):
        relation = f"{fields['side']} of" if "side" in fields else fields["level"]
        parts.append(f"{fields['colour']} {fields['shape']} {relation} {fields['colour2']} {fields['shape2']}")
    return ", ".join(parts) + "."


def draw_relations(scene: Scene, rng: Random, rates: Sequence[float]) -> Iterator[dict[str, str]]:
    """Fields of the relation sentences of a true caption.

    rates: probability of a first sentence, of a second, ... Two objects may stand in two relations, one for each axis;
        a sentence says one of them, and one that says again how two objects lie on an axis is left out.
    """
    said = set()
    for rate in rates:
        if len(scene.objects) > 1 and rng.random() < rate:
            a, b = rng.sample(scene.objects, 2)
            relation = rng.choice(sorted(relations(a, b)))
            fields = {"colour": a.colour, "shape": a.shape, "colour2": b.colour, "shape2": b.shape}
            fields["side" if relation.endswith(" of") else "level"] = relation.removesuffix(" of")
            if related(fields) not in said:
                said.add(related(fields))
                yield fields


def related(fields: dict[str, str]) -> tuple[str, Look, Look]:
    """What a relation sentence says, whichever object it begins with: `left` or `above`, and of which two objects."""
    one, other = (fields["colour"], fields["shape"]), (fields["colour2"], fields["shape2"])
    if "side" in fields:
        return ("left", one, other) if fields["side"] == "left" else ("left", other, one)
    return ("above", one, other) if fields["level"] == "above" else ("above", other, one)


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Character ranges of the sentences; an unfinished last one counts."""
    return [(m.start(), m.start() + len(m[0].rstrip())) for m in _SENTENCE.finditer(text)]


def read_caption(text: str) -> list[Sentence]:
    """Parse every sentence of a text. One wrong word, blank or capital makes a sentence ungrammatical.

    The blank before a sentence belongs to it: exactly one, and none before the first.
    """
    sentences: list[Sentence] = []
    for start, end in split_sentences(text):
        gap = text[sentences[-1].end : start] if sentences else text[:start]
        sentence = Sentence(start, end, None, {})
        if gap == (" " if sentences else ""):
            for (kind, index), pattern in _patterns().items():
                match = pattern.fullmatch(text, start, end)
                fields = {name: word.lower() for name, word in match.groupdict().items()} if match else {}
                if match and _agrees(fields):
                    places = {name: match.span(name) for name in fields}
                    sentence = Sentence(start, end, Statement(kind, index, fields), places)
                    break
        sentences.append(sentence)
    return sentences


@cache
def _patterns() -> dict[tuple[str, int], re.Pattern[str]]:
    """(kind, template index) -> a pattern with a group for each field. A field that opens a sentence is capitalized."""
    patterns = {}
    for kind, templates in TEMPLATES.items():
        for index in range(len(templates)):
            words = []
            for position, (word, field, punctuation) in enumerate(template_words(kind, index)):
                if field is None:
                    words.append(re.escape(word))
                else:
                    values = "|".join(LEXICON[field])
                    group = f"(?=[A-Z])(?ai:{values})" if position == 0 else values
                    words.append(f"(?P<{field}>{group}){re.escape(punctuation)}")
            patterns[kind, index] = re.compile(" ".join(words))
    return patterns


def _agrees(fields: dict[str, str]) -> bool:
    """Number agreement: one object, two objects."""
    return "noun" not in fields or (fields["noun"] == "object") == (fields["number"] == "one")


def false_fields(scene: Scene, statement: Statement) -> set[str]:
    """Fields of a statement that contradict the scene.

    An object sentence is about the object at its place: if the place is empty, all its fields are false. A relation is
    one fact: all its fields are false unless such a pair exists.
    """
    fields = statement.fields
    if statement.kind == "intro":
        wrong = {"number"} if fields["number"] != NUMBERS[len(scene.objects) - 1] else set()
        return wrong | ({"background"} if fields["background"] != scene.background else set())
    if statement.kind == "object":
        item = scene.at(fields["row"], fields["column"])
        if item is None:
            return {"row", "column", "shape", "colour", "size"}
        return {name for name in ("shape", "colour", "size") if getattr(item, name) != fields[name]}
    relation = f"{fields['side']} of" if "side" in fields else fields["level"]
    pair = (fields["colour"], fields["shape"]), (fields["colour2"], fields["shape2"])
    return set() if scene.holds(relation, *pair) else set(fields)


def swaps(scene: Scene, text: str, rng: Random, *, looks: Collection[Look] = LOOKS) -> list[Swap]:
    """At most one replacement for every sentence and field of a true caption that makes the sentence false.

    looks: the (colour, shape) that a false sentence may name
    """
    replacements = []
    for sentence in read_caption(text):
        statement = sentence.statement
        for field, (start, end) in sentence.places.items():
            if statement is None or field not in FACT_OF_FIELD:
                continue
            options = [word for word in LEXICON[field] if word != statement.fields[field]]
            rng.shuffle(options)
            for word in options:
                changed = replace(statement, fields={**statement.fields, field: word})
                named = statement.kind == "intro" or (changed.fields["colour"], changed.fields["shape"]) in looks
                if named and _agrees(changed.fields) and false_fields(scene, changed):
                    wrong = word.capitalize() if text[start].isupper() else word
                    replacements.append(Swap(start, end, text[start:end], wrong, FACT_OF_FIELD[field]))
                    break
    return replacements
