"""The model's own reading as the expert: its slow caption of an image corrects its fast draft.

python -m src.generate conf=generate model.path=MODEL images=DATA/train tokens_per_step=1 out=readings.jsonl
python -m src.train conf=stage2 model.path=MODEL expert=reading expert.readings=readings.jsonl

readings.jsonl, draft -> the reading as the reference -> local differences (src/experts/reference.py) -> edits
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from src.experts.reference import ReferenceExpert
from src.io.errors import UserError
from src.types import Draft, Failure, Revision


class ReadingExpert(ReferenceExpert):
    """Edits towards a text of the model's own instead of the true captions.

    readings: what `src.generate` has written of the images of the training split; a draft of an image without a
        reading fails with `no_reference`
    """

    name = "reading"

    def __init__(self, *, readings: str, max_words: int = 4) -> None:
        super().__init__(max_words=max_words)
        if not Path(readings).is_file():
            raise UserError(f"readings: there is no {readings}; write it with src.generate tokens_per_step=1")
        self.readings = readings
        lines = map(json.loads, Path(readings).read_text(encoding="utf-8").splitlines())
        self._texts = {line["key"]: line["text"] for line in lines}

    def answer(self, draft: Draft) -> Revision | Failure:
        key, _, _ = draft.key.rpartition("@s")
        return super().answer(replace(draft, reference=self._texts.get(key, ""), record={}))
