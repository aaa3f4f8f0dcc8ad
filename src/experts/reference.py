"""The reference expert: corrects a draft towards its reference caption. Offline, for any captioned images.

    expert: {target: src.experts.reference.ReferenceExpert, max_words: 4}

Draft and reference are compared word by word. Only *local* differences become edits: a few words replaced by equally
many (so that the token counts are likely to agree), words by words and punctuation by punctuation. Any other difference
counts as a paraphrase, not as a mistake. Of several references the most similar one is used: all are true.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Sequence
from difflib import SequenceMatcher

from src.io.errors import UserError
from src.types import Draft, Edit, Expert, Failure, Revision

_WORD = re.compile(r"\w+|[^\w\s]")


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
            yield draft.key, self.answer(draft)

    def answer(self, draft: Draft) -> Revision | Failure:
        if not draft.reference:
            return Failure("no_reference")
        # 1. The most similar reference.
        texts = [draft.text, draft.reference, *(caption["text"] for caption in draft.record.get("captions", ()))]
        words, *references = [list(_WORD.finditer(text)) for text in texts]
        strings = [word[0] for word in words]
        matchers = [SequenceMatcher(None, strings, [w[0] for w in other], autojunk=False) for other in references]
        best = max(range(len(references)), key=lambda i: matchers[i].ratio())
        if texts[1 + best] == draft.text:
            return Revision((), raw="right", model=self.name)
        # 2. Its local differences. Each word faces a word, and each punctuation mark a punctuation mark.
        edits = []
        for tag, a, b, c, d in matchers[best].get_opcodes():
            old, new = words[a:b], references[best][c:d]
            if tag != "replace" or not len(old) == len(new) <= self.max_words:
                continue
            if all(x[0][0].isalnum() == y[0][0].isalnum() for x, y in zip(old, new, strict=True)):
                edits.append(Edit(_text(old), _text(new), old[0].start(), "differs from the reference"))
        if not edits:
            return Failure("no_local_edit")
        return Revision(tuple(edits), raw=json.dumps([edit.to_dict() for edit in edits]), model=self.name)


def _text(words: list[re.Match[str]]) -> str:
    """The text from the first word to the last, with the characters between the words."""
    return words[0].string[words[0].start() : words[-1].end()]
