"""The scenes expert: exact corrections of a draft from its scene graph. Offline, for embedded scenes.

    expert: {target: src.experts.scenes.ScenesExpert}

    draft -> sentences -> readings (which template, which words fit it) -> true words -> single-word edits

A sentence keeps its template, and with `lengths: same` its number of words:

1. A sentence that the grammar rejects is read as the nearest template of equally many words; where too many words
   differ, with `lengths: any` as the nearest by word edit distance; where too many differ even so, it is left alone.
2. Object sentences are given objects one to one. First, as many objects as possible are described; then, a
   sentence stays with the object at the place that it names; then, as few words as possible change. Surplus
   sentences are made true where they stand.
3. Introductions get the number and the background, relations the nearest true relation. A relation that no
   pair of objects satisfies is left alone.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from math import inf
from typing import Any

from src.experts.scene_template import Slot, align, fits
from src.io.errors import UserError
from src.scenes.grammar import (
    FACT_OF_FIELD,
    LEXICON,
    NUMBERS,
    TEMPLATES,
    Statement,
    read_caption,
    template_words,
    write_sentence,
)
from src.scenes.graph import Scene, SceneObject
from src.scenes.score import score_caption
from src.types import Draft, Edit, Failure, Revision

LENGTHS = ("same", "any")
MAX_MISMATCH = 0.45  # share of the words of an ungrammatical sentence that may differ from a template


class ScenesExpert:
    """Corrects every sentence that it can read.

    lengths: `same` replaces words one for one; `any` also removes words, and inserts them. An insertion is an edit of a
    word beside it: `small` becomes `small red`.

    Fails with `no_scene` where the record holds no scene graph, with `damaged_scene` where that is of no use, and with
    `no_local_edit` where the draft is wrong but no sentence can be corrected word by word.
    """

    name = "scenes"

    def __init__(self, *, lengths: str = "same") -> None:
        if lengths not in LENGTHS:
            raise UserError(f"lengths must be one of {', '.join(LENGTHS)}, got {lengths!r}")
        self.lengths = lengths

    @property
    def settings(self) -> dict[str, Any]:
        """What the answers depend on, but for the default."""
        return {} if self.lengths == "same" else {"lengths": self.lengths}

    async def revise(self, drafts: Sequence[Draft]) -> AsyncIterator[tuple[str, Revision | Failure]]:
        """Yield (key, answer) for every draft."""
        for draft in drafts:
            yield draft.key, self._answer(draft)

    def _answer(self, draft: Draft) -> Revision | Failure:
        if not draft.record.get("scene"):
            return Failure("no_scene")
        try:
            scene = Scene.from_dict(draft.record["scene"])
        except (KeyError, TypeError, ValueError, AttributeError):  # whatever a record of another form leads to
            return Failure("damaged_scene")
        edits = tuple(correct(scene, draft.text, lengths=self.lengths))
        if edits:
            return Revision(edits, raw=json.dumps([edit.to_dict() for edit in edits]), model=self.name)
        score = score_caption(scene, draft.text)
        if score.syntax == score.factuality == 1.0:
            return Revision((), raw="right", model=self.name)
        return Failure("no_local_edit")


@dataclass(frozen=True)
class _Reading:
    """A sentence as a use of a template: its start in the text, its words, and the legible fields.

    words: the text that stands for each word of the template; empty where the word is missing, and several words where
        some are surplus
    """

    start: int
    words: list[str]
    kind: str
    template: int
    fields: dict[str, str]

    def say(self, **fields: str) -> list[str]:
        """The words of a sentence with the same template and these fields."""
        return write_sentence(Statement(self.kind, self.template, fields)).split(" ")

    def cost(self, words: list[str]) -> int:
        """How many words differ."""
        return sum(a != b for a, b in zip(self.words, words, strict=True))


def correct(scene: Scene, text: str, *, lengths: str = "same") -> list[Edit]:
    """Single-word edits, in order, that make the readable sentences of a text grammatical and true.

    lengths: whether they may also insert and remove words (`any`) or not (`same`)
    """
    readings = list(_readings(text, lengths))
    about = [r for r in readings if r.kind == "object"]
    objects = dict(zip((r.start for r in about), _assign(scene, about), strict=True))
    edits = [edit for r in readings for edit in _edits(r, _true_words(scene, r, objects))]
    return _with_joints(text, [r.start for r in readings], edits)


def _with_joints(text: str, starts: list[int], edits: list[Edit]) -> list[Edit]:
    """The edits, and the blank put in or taken out where a sentence does not start behind exactly one."""
    found = {edit.start_char: edit for edit in edits}
    for start in starts:
        word = text[start:].split(" ")[0]
        edit = found.get(start) or Edit(word, word, start, "blank", "syntax")
        if start and text[start - 1] != " ":
            end = text[start - 1]
            found.pop(start, None)
            found[start - 1] = Edit(end + edit.org, f"{end} {edit.target}", start - 1, edit.reason, edit.kind)
        elif start == 1:
            found.pop(start, None)
            found[0] = Edit(f" {edit.org}", edit.target, 0, edit.reason, edit.kind)
    return [found[place] for place in sorted(found, key=lambda place: place or 0)]


def _true_words(scene: Scene, reading: _Reading, objects: dict[int, SceneObject]) -> list[str]:
    if reading.kind == "object":
        return _say_object(reading, objects[reading.start])
    if reading.kind == "intro":
        count = len(scene.objects)
        noun = LEXICON["noun"][count > 1]
        return reading.say(number=NUMBERS[count - 1], noun=noun, background=scene.background)
    return _nearest_relation(scene, reading)


def _say_object(reading: _Reading, item: SceneObject) -> list[str]:
    return reading.say(**{name: getattr(item, name) for name in ("size", "colour", "shape", "row", "column")})


def _nearest_relation(scene: Scene, reading: _Reading) -> list[str]:
    """The true relation sentence with the fewest new words; on a tie the relation changes, not the objects.

    The words as they are, where no relation of this template holds.
    """
    options = []
    templates = {field for _, field, _ in template_words("relation", reading.template)}
    name = "side" if "side" in templates else "level"
    for a, b in permutations(scene.objects, 2):
        pair = {"colour": a.colour, "shape": a.shape, "colour2": b.colour, "shape2": b.shape}
        for word in LEXICON[name]:
            relation = f"{word} of" if name == "side" else word
            if scene.holds(relation, (a.colour, a.shape), (b.colour, b.shape)):
                words = reading.say(**pair, **{name: word})
                options.append((reading.cost(words), word == reading.fields.get(name), len(options), words))
    return min(options)[-1] if options else reading.words


def _assign(scene: Scene, readings: list[_Reading]) -> list[SceneObject]:
    """An object for every object sentence, by dynamic programming over the sets of objects already described.

    A plan is (objects described, negated; sentences that leave the object at their place; words; choices),
    and the least one wins. Sentences and objects are in order, so ties go to the first.
    """
    plans: dict[int, tuple[int, int, int, tuple[int, ...]]] = {0: (0, 0, 0, ())}
    for reading in readings:
        costs = [reading.cost(_say_object(reading, item)) for item in scene.objects]
        home = _home(scene, reading)
        surplus = costs.index(min(costs)) if home is None else home
        longer: dict[int, tuple[int, int, int, tuple[int, ...]]] = {}
        for described, (fresh, left, words, choices) in plans.items():
            for choice, cost in enumerate(costs):
                new = not described >> choice & 1
                if new or choice == surplus:
                    away = home not in (None, choice)
                    plan = (fresh - new, left + away, words + cost, (*choices, choice))
                    key = described | 1 << choice
                    longer[key] = min(longer.get(key, plan), plan)
        plans = longer
    return [scene.objects[choice] for choice in min(plans.values())[-1]]


def _home(scene: Scene, reading: _Reading) -> int | None:
    """The object at the place that a sentence names."""
    item = scene.at(reading.fields.get("row", ""), reading.fields.get("column", ""))
    return None if item is None else scene.objects.index(item)


def _readings(text: str, lengths: str) -> Iterator[_Reading]:
    for sentence in read_caption(text):
        words = text[sentence.start : sentence.end].split(" ")
        if sentence.statement:
            statement = sentence.statement
            yield _Reading(sentence.start, words, statement.kind, statement.template, statement.fields)
        else:
            nearest = _nearest_template(words, lengths)
            if nearest is not None:
                yield _Reading(sentence.start, *nearest)


def _nearest_template(words: list[str], lengths: str) -> tuple[list[str], str, int, dict[str, str]] | None:
    """(words, kind, index, legible fields) of the template with the fewest misfit words, if they are few enough.

    One that is near enough word for word goes first: to move words is harder to learn than to replace them.
    """
    known = [(kind, index, template_words(kind, index)) for kind in TEMPLATES for index in range(len(TEMPLATES[kind]))]
    for compare in (_in_place, align)[: LENGTHS.index(lengths) + 1]:
        found = [(compare(words, template), (kind, index, template)) for kind, index, template in known]
        (wrong, slots), (kind, index, template) = min(found, key=lambda reading: reading[0][0])
        if wrong <= MAX_MISMATCH * len(words):
            return slots, kind, index, _fields(slots, template)
    return None


def _in_place(words: list[str], template: list[Slot]) -> tuple[float, list[str]]:
    """How many words do not fit, and the words; all are too many where they are not one for one.

    Nor is there a word to replace between two blanks.
    """
    if len(words) != len(template) or "" in words:
        return inf, words
    pairs = enumerate(zip(words, template, strict=True))
    return sum(not fits(word, slot, first=not place) for place, (word, slot) in pairs), words


def _fields(words: list[str], template: list[Slot]) -> dict[str, str]:
    """The fields of a template whose words fit."""
    pairs = enumerate(zip(words, template, strict=True))
    found = {slot[1]: fits(word, slot, first=not place) for place, (word, slot) in pairs}
    return {field: value for field, value in found.items() if field and value}


def _edits(reading: _Reading, words: list[str]) -> Iterator[Edit]:
    """An edit for every word that changes; punctuation behind both words stays outside.

    A missing word becomes part of the edit of the word before it, or of the next one where there is none.
    """
    template = template_words(reading.kind, reading.template)
    char, parts = reading.start, list[tuple[int, str, list[str], str | None]]()
    first = list[str]()
    for old, new, (_, field, _) in zip(reading.words, words, template, strict=True):
        if old:
            parts.append((char, old, [*first, new], field))
            first, char = [], char + len(old) + 1
        elif new:
            (parts[-1][2] if parts else first).append(new)
    for start, old, several, field in parts:
        new = " ".join(several)
        if old != new:
            tail = int(len(old) > 1 and old[-1] == new[-1] and old[-1] in ".,")
            single = field if len(several) == 1 and " " not in old else None
            reason = f"wrong {single}" if single else "syntax"
            yield Edit(old[: len(old) - tail], new[: len(new) - tail], start, reason, _kind(single))


def _kind(field: str | None) -> str:
    """The kind of mistake that a wrong word of a field is; `syntax` where none of the facts is concerned."""
    return FACT_OF_FIELD.get((field or "").rstrip("2"), "syntax")
