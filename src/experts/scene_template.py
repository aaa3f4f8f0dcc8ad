"""Alignment of a sentence's words with the words of a template, by word edit distance.

align("A a small red ring.".split(), template_words("object", 0))    (cost, ["A a", "small", "red", "ring.", "", ...])
"""

from __future__ import annotations

from math import inf

from src.scenes.grammar import LEXICON

Slot = tuple[str, str | None, str]  # a template word: the word, its field or None, punctuation after a field


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
