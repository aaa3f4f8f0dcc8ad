"""`Batch`es of text without images: packed rows, prompts with responses, molecules with a class.

A packed row is used as stored, as token ids without eot. Everything else is as for captions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from datamodules.captions import ShardData
from datamodules.collate import Collate
from datamodules.stream import Index
from src.io.errors import UserError


@dataclass(kw_only=True, eq=False, repr=False)
class TextData(ShardData):
    """Text shards under `path`, as `src.prepare` writes them (conf=text, conf=sft, conf=smiles).

    prompt_dropout: fraction of prompts masked in training, for classifier-free guidance (`cfg_scale`)
    Other arguments: see `ShardData`. With packed rows, `response_length` must equal their length.
    """

    kind: ClassVar[str] = "text"
    image: ClassVar[bool] = False

    prompt_dropout: float = 0.0

    def make_collate(self) -> Collate:
        if not 0 <= self.prompt_dropout <= 1:
            raise UserError(f"prompt_dropout must be within 0..1, got {self.prompt_dropout}")
        settings = {"response_length": self.response_length, "prompt_dropout": self.prompt_dropout, "seed": self.seed}
        return Collate(self.codec, layout=None, **settings)

    def read_split(self, split: str) -> Index:
        index = super().read_split(split)
        row = index.content.get("row", self.response_length)
        if row != self.response_length:
            raise UserError(
                f"{index.path} holds rows of {row} tokens, but the response length is {self.response_length}; set "
                f"data.response_length={row}, or prepare the text again with "
                f"prepare.response_length={self.response_length}"
            )
        return index
