"""`Batch`es of text without images: packed rows, prompts with responses, molecules with a class.

    data = TextData(path="data/smiles", codec=codec, batch_size=64, response_length=40, prompt_dropout=0.1)

A packed row is used as stored, as token ids without eot. Everything else is as for captions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from datamodules.captions import ShardData
from datamodules.collate import Collate, choice
from datamodules.shards import Index, Sample
from src.io.errors import UserError
from src.text.tokenizer import Codec

RESOLUTION = 2**32  # of a probability drawn by `choice`


class TextData(ShardData):
    """Text shards under `path`, as `src.prepare` writes them (conf=text, conf=sft, conf=smiles).

    response_length: in tokens; shorter responses are filled with eos behind eot, longer ones are cut. Must equal the
        length of packed rows
    prompt_dropout:  fraction of prompts masked in training, for classifier-free guidance (`cfg_scale`)
    Other arguments: see `ShardData`.
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
        response_length = self.collate.response_length
        row = index.content.get("row", response_length)
        if row != response_length:
            raise UserError(
                f"{index.path} holds rows of {row} tokens, but the response length is {response_length}; set "
                f"data.response_length={row}, or prepare the text again with prepare.response_length={response_length}"
            )
        return index


class TextCollate(Collate):
    """Masks the prompt of a sample with probability `prompt_dropout`, by a hash of (seed, epoch, key)."""

    def __init__(self, codec: Codec, *, response_length: int, seed: int, prompt_dropout: float) -> None:
        super().__init__(codec, response_length=response_length, layout=None, seed=seed)
        self.prompt_dropout = prompt_dropout

    def prompt_ids(self, sample: Sample, epoch: int) -> list[int]:
        """The prompt, or as many masks: the unconditional prompt of the sampler (`masked_prefix`)."""
        ids = super().prompt_ids(sample, epoch)
        masked = choice(f"{self.seed}/{epoch}/{sample.key}/prompt", RESOLUTION) < self.prompt_dropout * RESOLUTION
        return [self.codec.mask_id] * len(ids) if masked else ids
