"""An offline expert made worse on purpose: what do its corrections have to be worth?

    expert=noisy expert.misses=0.2
    expert=noisy expert.wrong=0.3
    expert=noisy expert.shuffled=true      as many edits with the same words, at other words of the draft

    draft -> the wrapped expert -> edits -> some missed, some wrong, or all moved -> edits

What becomes of a draft is a function of the seed and its key, so a round is the same on any number of ranks.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from random import Random

from src.io.errors import UserError
from src.scenes.grammar import LEXICON
from src.types import Draft, Edit, Expert, Failure, Revision

WORDS = sorted({word for words in LEXICON.values() for word in words})


class NoisyExpert(Expert):
    """Damages the edits of another expert.

    expert: one that asks no server; misses: share of its edits that are left out, one by one; a draft that loses all
        its edits counts as right
    wrong: share of the other edits whose new word is another one of its kind (colour, shape, ...), neither the true
        one nor the one that it replaces; where there is none, any word of the scenes
    shuffled: each edit goes to a word of the draft that the expert found right, drawn at random
    """

    name = "noisy"

    def __init__(
        self, *, expert: Expert, misses: float = 0.0, wrong: float = 0.0, shuffled: bool = False, seed: int = 0
    ) -> None:
        for name, share in {"misses": misses, "wrong": wrong}.items():
            if not 0 <= share <= 1:
                raise UserError(f"{name} must be within 0..1, got {share}")
        if type(expert).charge is not Expert.charge:
            raise UserError(f"noisy is for experts without a server: {expert.name} would lose count of its budget")
        self.expert, self.misses, self.wrong, self.shuffled, self.seed = expert, misses, wrong, shuffled, seed

    async def revise(self, drafts: Sequence[Draft]) -> AsyncIterator[tuple[str, Revision | Failure]]:
        """Yield (key, answer) for each draft."""
        by_key = {draft.key: draft for draft in drafts}
        async for key, answer in self.expert.revise(drafts):
            yield key, self._damage(by_key[key], answer) if isinstance(answer, Revision) else answer

    def _damage(self, draft: Draft, revision: Revision) -> Revision:
        rng = Random(f"{self.seed}/{draft.key}")
        edits = [edit for edit in revision.edits if rng.random() >= self.misses]
        edits = [replace(e, target=wrong_word(e, rng)) if rng.random() < self.wrong else e for e in edits]
        if self.shuffled:
            edits = shuffle(draft.text, edits, rng)
        return replace(revision, edits=tuple(edits))


def wrong_word(edit: Edit, rng: Random) -> str:
    """A word of the same kind as the edit's new one, capitalized like it."""
    known = {edit.target.lower(), edit.org.lower()}
    kinds = [words for words in LEXICON.values() if edit.target.lower() in words and set(words) - known]
    word = rng.choice([word for word in (kinds or [WORDS])[0] if word not in known])
    return word.capitalize() if edit.target[:1].isupper() else word


def shuffle(text: str, edits: Sequence[Edit], rng: Random) -> list[Edit]:
    """The edits with other words of the text to replace, each another one; fewer edits where words run out."""
    taken = {place for e in edits for place in range(e.start_char or 0, (e.start_char or 0) + len(e.org))}
    free = [match for match in re.finditer(r"\w+", text) if match.start() not in taken]
    rng.shuffle(free)
    moved = []
    for edit in edits:
        if match := next((match for match in free if match[0] != edit.target), None):
            free.remove(match)
            moved.append(replace(edit, org=match[0], start_char=match.start()))
    return sorted(moved, key=lambda edit: edit.start_char or 0)
