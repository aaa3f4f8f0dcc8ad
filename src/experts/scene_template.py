"""Words of a sentence against the words of a template: which fits which, by word edit distance.

align("A a small red ring.".split(), template_words("object", 0))    (cost, ["A a", "small", "red", "ring.", "", ...])
"""

from __future__ import annotations

from math import inf

from src.scenes.grammar import LEXICON

Slot = tuple[str, str | None, str]  # a word of a template: itself, its field or None, punctuation behind a field


def fits(word: str, slot: Slot, *, first: bool) -> str:
    """The value of a word that fits, which for a fixed word is itself; empty where it does not fit.

    first: of a sentence, where a field has a capital letter
    """
    expected, field, tail = slot
    if field is None:
        return word if word == expected else ""
    value = word.removesuffix(tail)
    known = value[0].lower() + value[1:] if first and value[:1].isupper() else value
    return known if known in LEXICON[field] and word == value + tail and (not first or known != value) else ""


def align(words: list[str], template: list[Slot]) -> tuple[int, list[str]]:
    """The least number of words to replace, insert or remove, and the text that stands for each word of a template.

    A surplus word goes with the one before it, or at the start with the first. Where several alignments cost the same,
    words at the end are replaced rather than removed or inserted. An empty word, between two blanks, is never replaced.
    """
    cost = [[inf] * (len(template) + 1) for _ in range(len(words) + 1)]
    step = [[""] * (len(template) + 1) for _ in range(len(words) + 1)]
    cost[0][0] = 0
    for i in range(len(words) + 1):
        for j in range(len(template) + 1):
            options = [(cost[i][j], step[i][j])]
            if i and j and words[i - 1]:
                wrong = not fits(words[i - 1], template[j - 1], first=j == 1)
                options.append((cost[i - 1][j - 1] + wrong, "replace"))
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
    held = next((place for place, texts in enumerate(slots) if texts), 0)
    slots[held] = [*surplus, *slots[held]]
    return int(cost[-1][-1]), [" ".join(texts) for texts in slots]
