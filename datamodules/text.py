"""Texts without images as `Batch`es: packed rows, prompts with responses, molecules with a class.

    data = TextData(path="data/smiles", codec=codec, batch_size=64, response_length=40, prompt_dropout=0.1)

A packed row is taken by the ids that it was cut into, without eot behind it. Everything else is as for captions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from datamodules.captions import ShardData
from datamodules.collate import Collate, choice
from datamodules.shards import Index, Sample
from src.io.errors import UserError
from src.text.tokenizer import Codec

PARTS = 2**32  # of a probability


class TextData(ShardData):
    """Text shards under `path`, as `src.prepare` writes them (conf=text, conf=sft, conf=smiles).

    response_length:         response length in tokens: filled with end of text behind eot; longer responses are cut. For packed
        rows it has to be their length
    prompt_dropout: share of the prompts that training hides, so that the model can be guided (`cfg_scale`)
    The rest: see `ShardData`.
    """

    kind, image = "text", False

    def __init__(
        self,
        *,
        path: str,
        codec: Codec,
        batch_size: int,
        response_length: int,
        prompt_dropout: float = 0.0,
        seed: int = 0,
        workers: int = 0,
        rounds: Sequence[str] = (),
        data_share: float = 0.25,
        limit: int | Mapping[str, int] | None = None,
        epoch_batches: int | None = None,
        restart_epoch: bool = False,
    ) -> None:
        if not 0 <= prompt_dropout <= 1:
            raise UserError(f"prompt_dropout must be within 0..1, got {prompt_dropout}")
        super().__init__(
            path=path,
            codec=codec,
            batch_size=batch_size,
            collate=TextCollate(codec, response_length=response_length, seed=seed, prompt_dropout=prompt_dropout),
            seed=seed,
            workers=workers,
            rounds=rounds,
            data_share=data_share,
            limit=limit,
            epoch_batches=epoch_batches,
            restart_epoch=restart_epoch,
        )

    def _read(self, split: str) -> Index:
        index = super()._read(split)
        row = index.content.get("row", self.collate.response_length)
        if row != self.collate.response_length:
            raise UserError(
                f"{index.path} holds rows of {row} tokens, but response length is {self.collate.response_length}; "
                f"set data.response_length={row}, or prepare the text again with prepare.response_length={self.collate.response_length}"
            )
        return index


class TextCollate(Collate):
    """Hides the prompt of a sample with probability `prompt_dropout`, by a hash of (seed, epoch, key)."""

    def __init__(self, codec: Codec, *, response_length: int, seed: int, prompt_dropout: float) -> None:
        super().__init__(codec, response_length=response_length, layout=None, seed=seed)
        self.prompt_dropout = prompt_dropout

    def prompt_ids(self, sample: Sample, epoch: int) -> list[int]:
        """The prompt, or as many masks: what the sampler shows the model without a prompt (`masked_prefix`)."""
        ids = super().prompt_ids(sample, epoch)
        hidden = choice(f"{self.seed}/{epoch}/{sample.key}/prompt", PARTS) < self.prompt_dropout * PARTS
        return [self.codec.mask_id] * len(ids) if hidden else ids
