"""The scenes expert: exact corrections of a draft from its scene graph. Offline, for the embedded scenes.

    expert: {target: src.experts.scenes.ScenesExpert}

    draft -> sentences -> readings (template, and which words fit it) -> true words -> single-word edits

A sentence keeps its template, and with `lengths: same` its number of words:

1. An ungrammatical sentence is read as the nearest template with as many words; where too many words differ,
   `lengths: any` takes the nearest template by word edit distance. A sentence without a near template is left alone.
2. Object sentences are assigned to objects, one to one. In order of priority: describe as many objects as possible;
   leave a sentence with the object at the place that it names; change as few words as possible. A surplus sentence is
   made true where it stands.
3. Introductions get the true number and background, relations the nearest true relation that no sentence before has
   said. Where there is none, the sentence is left alone.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from math import inf
from typing import Any

from src.io.errors import UserError
from src.scenes.grammar import (
    FACT_OF_FIELD,
    LEXICON,
    NUMBERS,
    TEMPLATES,
    Statement,
    read_caption,
    related,
    template_words,
    write_sentence,
)
from src.scenes.graph import Scene, SceneObject
from src.scenes.score import score_caption
from src.types import Draft, Edit, Expert, Failure, Revision

LENGTHS = ("same", "any")
MAX_MISMATCH = 0.45  # share of an ungrammatical sentence's words that may differ from a template
Slot = tuple[str, str | None, str]  # a template word: the word, its field or None, punctuation after a field


class ScenesExpert(Expert):
    """Corrects every sentence that it can read.

    lengths: `same` replaces words one for one; `any` also removes and inserts words. An insertion is an edit of a
        neighbouring word: `small` becomes `small red`.

    Fails with `no_scene` where the record holds no scene graph, with `damaged_scene` where it cannot be parsed, and
    with `no_local_edit` where the draft is wrong but no sentence can be corrected word by word.
    """

    name = "scenes"

    def __init__(self, *, lengths: str = "same") -> None:
        if lengths not in LENGTHS:
            raise UserError(f"lengths must be one of {', '.join(LENGTHS)}, got {lengths!r}")
        self.lengths = lengths

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the answers depend on; empty for the default."""
        return {} if self.lengths == "same" else {"lengths": self.lengths}

    async def revise(self, drafts: Sequence[Draft]) -> AsyncIterator[tuple[str, Revision | Failure]]:
        """Yield (key, answer) for each draft."""
        for draft in drafts:
            yield draft.key, self._answer(draft)

    def _answer(self, draft: Draft) -> Revision | Failure:
        if not draft.record.get("scene"):
            return Failure("no_scene")
        try:
            scene = Scene.from_dict(draft.record["scene"])
        except (KeyError, TypeError, ValueError, AttributeError):  # any malformed record
            return Failure("damaged_scene")
        edits = tuple(correct(scene, draft.text, lengths=self.lengths))
        if edits:
            return Revision(edits, raw=json.dumps([edit.to_dict() for edit in edits]), model=self.name)
        score = score_caption(scene, draft.text)
        if score.syntax == score.factuality == 1.0:
            return Revision((), raw="right", model=self.name)
        return Failure("no_local_edit")


@dataclass(frozen=True)
class Reading:
    """A sentence read as a template: its start in the text, its words, and the fields whose words fit.

    words: the text aligned with each word of the template; empty for a missing word, several words where some are
        surplus
    """

    start: int
    words: list[str]
    kind: str
    template: int
    fields: dict[str, str]

    def write(self, **fields: str) -> list[str]:
        """The words of the template filled with these fields."""
        return write_sentence(Statement(self.kind, self.template, fields)).split(" ")

    def describe(self, item: SceneObject) -> list[str]:
        """The words of an object sentence that is true of an object."""
        return self.write(**{name: getattr(item, name) for name in ("size", "colour", "shape", "row", "column")})

    def cost(self, words: list[str]) -> int:
        """The number of words that differ."""
        return sum(a != b for a, b in zip(self.words, words, strict=True))


def correct(scene: Scene, text: str, *, lengths: str = "same") -> list[Edit]:
    """The single-word edits, in order, that make the readable sentences of a text grammatical and true.

    lengths: whether edits may also insert and remove words (`any`) or not (`same`)
    """
    # 1. Read the sentences, choose an object for each object sentence, and change the words that are not true.
    readings = list(read_sentences(text, lengths))
    objects = iter(assign_objects(scene, [reading for reading in readings if reading.kind == "object"]))
    edits_at: dict[int | None, Edit] = {}
    said: set[tuple] = set()
    for reading in readings:
        if reading.kind == "object":
            words = reading.describe(next(objects))
        elif reading.kind == "intro":
            count = len(scene.objects)
            noun = LEXICON["noun"][count > 1]
            words = reading.write(number=NUMBERS[count - 1], noun=noun, background=scene.background)
        else:
            words = nearest_relation(scene, reading, said)
        edits_at |= {edit.start_char: edit for edit in word_edits(reading, words)}
    # 2. Extend the edits so that each sentence follows exactly one blank.
    for start in (reading.start for reading in readings):
        word = text[start:].split(" ")[0]
        edit = edits_at.get(start) or Edit(word, word, start, "blank", "syntax")
        if start and (previous := text[start - 1]) != " ":
            org, target = previous + edit.org, f"{previous} {edit.target}"
        elif start == 1:
            org, target = f" {edit.org}", edit.target
        else:
            continue
        edits_at.pop(start, None)
        edits_at[start - 1] = Edit(org, target, start - 1, edit.reason, edit.kind)
    return [edits_at[start] for start in sorted(edits_at, key=lambda start: start or 0)]


def read_sentences(text: str, lengths: str) -> Iterator[Reading]:
    """The sentences that are in the grammar or near it: as the template with the fewest mismatches.

    A word-for-word match is preferred: replacing words is easier to learn than moving them.
    """
    templates = [
        (kind, index, template_words(kind, index)) for kind in TEMPLATES for index in range(len(TEMPLATES[kind]))
    ]
    for sentence in read_caption(text):
        words = text[sentence.start : sentence.end].split(" ")
        if statement := sentence.statement:
            yield Reading(sentence.start, words, statement.kind, statement.template, statement.fields)
            continue
        for compare in (align_in_place, align)[: LENGTHS.index(lengths) + 1]:
            matches = [(compare(words, template), (kind, index, template)) for kind, index, template in templates]
            (mismatches, texts), (kind, index, template) = min(matches, key=lambda match: match[0][0])
            if mismatches <= MAX_MISMATCH * len(words):
                pairs = enumerate(zip(texts, template, strict=True))
                values = {slot[1]: fits(word, slot, first=not place) for place, (word, slot) in pairs}
                fields = {field: value for field, value in values.items() if field and value}
                yield Reading(sentence.start, texts, kind, index, fields)
                break


def assign_objects(scene: Scene, readings: list[Reading]) -> list[SceneObject]:
    """An object for each object sentence, by dynamic programming over the set of objects described so far.

    A plan is (-objects described, sentences moved away from the object at their place, words changed, choices); the
    smallest wins. Sentences and objects are in order, so ties go to the first.
    """
    plans: dict[int, tuple[int, int, int, tuple[int, ...]]] = {0: (0, 0, 0, ())}
    for reading in readings:
        costs = [reading.cost(reading.describe(item)) for item in scene.objects]
        at_place = scene.at(reading.fields.get("row", ""), reading.fields.get("column", ""))
        home = None if at_place is None else scene.objects.index(at_place)
        surplus = costs.index(min(costs)) if home is None else home
        extended: dict[int, tuple[int, int, int, tuple[int, ...]]] = {}
        for described, (neg_described, moved, words, choices) in plans.items():
            for choice, cost in enumerate(costs):
                new = not described >> choice & 1
                if new or choice == surplus:
                    away = home not in (None, choice)
                    plan = (neg_described - new, moved + away, words + cost, (*choices, choice))
                    key = described | 1 << choice
                    extended[key] = min(extended.get(key, plan), plan)
        plans = extended
    return [scene.objects[choice] for choice in min(plans.values())[-1]]


def nearest_relation(scene: Scene, reading: Reading, said: set[tuple]) -> list[str]:
    """The true relation sentence with the fewest changed words; on a tie the objects stay and the relation changes.

    The reading's own words where no relation of this template holds that is not `said`; adds the one that it returns.
    """
    options = []
    name = "side" if "side" in {field for _, field, _ in template_words("relation", reading.template)} else "level"
    for a, b in permutations(scene.objects, 2):
        pair = {"colour": a.colour, "shape": a.shape, "colour2": b.colour, "shape2": b.shape}
        for word in LEXICON[name]:
            relation = f"{word} of" if name == "side" else word
            fact = related({**pair, name: word})
            if fact not in said and scene.holds(relation, (a.colour, a.shape), (b.colour, b.shape)):
                words = reading.write(**pair, **{name: word})
                options.append((reading.cost(words), word == reading.fields.get(name), len(options), words, fact))
    if not options:
        return reading.words
    *_, words, fact = min(options)
    said.add(fact)
    return words


def word_edits(reading: Reading, words: list[str]) -> Iterator[Edit]:
    """An edit for each word that changes, without the punctuation that both words end with.

    A missing word is inserted by the edit of the word before it, or of the next word at the start.
    """
    char, parts = reading.start, list[tuple[int, str, list[str], str | None]]()
    leading = list[str]()  # missing words before the first one that is there
    template = template_words(reading.kind, reading.template)
    for old, new, (_, field, _) in zip(reading.words, words, template, strict=True):
        if old:
            parts.append((char, old, [*leading, new], field))
            leading, char = [], char + len(old) + 1
        elif new:
            (parts[-1][2] if parts else leading).append(new)
    for start, old, targets, field in parts:
        new = " ".join(targets)
        if old != new:
            tail = int(len(old) > 1 and old[-1] == new[-1] and old[-1] in ".,")
            single = field if len(targets) == 1 and " " not in old else None
            kind = FACT_OF_FIELD.get((single or "").rstrip("2"), "syntax")
            reason = f"wrong {single}" if single else "syntax"
            yield Edit(old[: len(old) - tail], new[: len(new) - tail], start, reason, kind)


def align_in_place(words: list[str], template: list[Slot]) -> tuple[float, list[str]]:
    """The number of words that do not fit, and the words.

    Infinite where words and template differ in length, or where there is an empty word, between two blanks.
    """
    if len(words) != len(template) or "" in words:
        return inf, words
    pairs = enumerate(zip(words, template, strict=True))
    return sum(not fits(word, slot, first=not index) for index, (word, slot) in pairs), words


def align(words: list[str], template: list[Slot]) -> tuple[int, list[str]]:
    """The edit distance in words (replace, insert, remove), and the text aligned with each word of the template.

    A surplus word joins the word before it, or the first one at the start. Of alignments with equal cost, the one that
    replaces words at the end wins over those that remove or insert. An empty word, between two blanks, is never
    replaced.
    """
    cost = [[inf] * (len(template) + 1) for _ in range(len(words) + 1)]
    step = [[""] * (len(template) + 1) for _ in range(len(words) + 1)]
    cost[0][0] = 0
    for i in range(len(words) + 1):
        for j in range(len(template) + 1):
            options = [(cost[i][j], step[i][j])]
            if i and j and words[i - 1]:
                mismatch = not fits(words[i - 1], template[j - 1], first=j == 1)
                options.append((cost[i - 1][j - 1] + mismatch, "replace"))
            if i:
                options.append((cost[i - 1][j] + 1, "remove"))
            if j:
                options.append((cost[i][j - 1] + 1, "insert"))
            cost[i][j], step[i][j] = min(options, key=lambda option: option[0])
    slots: list[list[str]] = [[] for _ in template]
    i, j, surplus = len(words), len(template), list[str]()
    while i or j:
        if step[i][j] == "replace":
            i, j = i - 1, j - 1
            slots[j], surplus = [words[i], *surplus], []
        elif step[i][j] == "remove":
            i -= 1
            surplus.insert(0, words[i])
        else:
            j -= 1
    first_filled = next((index for index, texts in enumerate(slots) if texts), 0)
    slots[first_filled] = [*surplus, *slots[first_filled]]
    return int(cost[-1][-1]), [" ".join(texts) for texts in slots]


def fits(word: str, slot: Slot, *, first: bool) -> str:
    """The field value that a word stands for (for a fixed slot the word itself); empty where it does not fit the slot.

    first: whether the word opens the sentence, where a field is capitalized
    """
    expected, field, tail = slot
    if field is None:
        return word if word == expected else ""
    value = word.removesuffix(tail)
    lowered = value[0].lower() + value[1:] if first and value[:1].isupper() else value
    return lowered if lowered in LEXICON[field] and word == value + tail and (not first or lowered != value) else ""
