"""The reference expert: corrects a draft towards its reference caption. Offline, for any captioned images.

    expert: {target: src.experts.reference.ReferenceExpert, max_words: 4}

Draft and reference are compared word by word. Only *local* differences become edits: a few words replaced by equally
many (so that the token counts are likely to agree), words by words and punctuation by punctuation. Any other difference
counts as a paraphrase, not as a mistake. Of several references the most similar one is used: all are true.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from difflib import SequenceMatcher

from src.io.errors import UserError
from src.types import Draft, Edit, Expert, Failure, Revision

_WORD = re.compile(r"\w+|[^\w\s]")
Words = list[re.Match[str]]


class ReferenceExpert(Expert):
    """Edits of at most `max_words` words towards the most similar reference.

    Fails with `no_reference` where there is none, and with `no_local_edit` where the draft differs from every reference
    but has no local difference: then it may be right or wrong.
    """

    name = "reference"

    def __init__(self, *, max_words: int = 4) -> None:
        if max_words < 1:
            raise UserError(f"max_words must be at least 1, got {max_words}")
        self.max_words = max_words

    async def revise(self, drafts: Sequence[Draft]) -> AsyncIterator[tuple[str, Revision | Failure]]:
        """Yield (key, answer) for each draft."""
        for draft in drafts:
            yield draft.key, self._answer(draft)

    def _answer(self, draft: Draft) -> Revision | Failure:
        if not draft.reference:
            return Failure("no_reference")
        references = [draft.reference, *(caption["text"] for caption in draft.record.get("captions", ()))]
        words = [list(_WORD.finditer(text)) for text in (draft.text, *references)]
        matchers = [_matcher(words[0], reference) for reference in words[1:]]
        best = max(range(len(references)), key=lambda i: matchers[i].ratio())
        if references[best] == draft.text:
            return Revision((), raw="right", model=self.name)
        edits = tuple(_local_edits(matchers[best], words[0], words[1 + best], self.max_words))
        if not edits:
            return Failure("no_local_edit")
        return Revision(edits, raw=json.dumps([edit.to_dict() for edit in edits]), model=self.name)


def _matcher(draft: Words, reference: Words) -> SequenceMatcher[str]:
    return SequenceMatcher(None, [m[0] for m in draft], [m[0] for m in reference], autojunk=False)


def _local_edits(matcher: SequenceMatcher[str], words: Words, reference: Words, max_words: int) -> Iterator[Edit]:
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag == "replace" and b - a == d - c <= max_words and _same_classes(words[a:b], reference[c:d]):
            org, target = _text(words[a:b]), _text(reference[c:d])
            yield Edit(org, target, words[a].start(), "differs from the reference")


def _text(words: Words) -> str:
    """The text from the first word to the last, with the characters between the words."""
    return words[0].string[words[0].start() : words[-1].end()]


def _same_classes(words: Words, others: Words) -> bool:
    """Whether each word faces a word, and each punctuation mark a punctuation mark."""
    return all(a[0][0].isalnum() == b[0][0].isalnum() for a, b in zip(words, others, strict=True))
