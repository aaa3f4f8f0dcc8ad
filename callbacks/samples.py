"""Samples: drafts and refined captions of a few fixed validation images, logged to TensorBoard during training.

callbacks: {samples: {target: callbacks.samples.Samples, sampler_plain: {...}, sampler_refine: {...}, num: 4, ...}}

first `num` validation samples -> draft (sampler_plain) and refined caption (sampler_refine)
  -> `samples/captions`: a table, changed words in **bold**
  -> `samples/tokens`: the images with the tokens of both in boxes: red are draft tokens missing from the refined
     caption, green are new tokens, and a blue edge marks a token edit by the reviser
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
from PIL import Image

from callbacks.look import Look
from src.evaluation import markdown
from src.evaluation.drawing import Colour, Piece, enlarge, sheet, text_box
from src.samplers.sampler import Sampler
from src.text.tokenizer import Codec
from src.types import Batch, Sampled

OLD: Colour = (250, 190, 190)
NEW: Colour = (190, 235, 190)
KEPT: Colour = (234, 238, 244)
REWRITTEN: Colour = (20, 60, 200)
SIDE, TEXT, WIDTH = 144, 13, 300  # pixels


class Samples(Look):
    """Logs drafts and refined captions of `num` fixed images (at most a batch of them).

    sampler_plain writes the drafts, sampler_refine the refined captions; both start fully masked with the same seed.
    """

    def __init__(
        self,
        *,
        sampler_plain: Sampler,
        sampler_refine: Sampler,
        codec: Codec,
        every_n_steps: int | None,
        num: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, num=num)
        self.samplers = {"draft": sampler_plain, "refined": sampler_refine}
        self.codec, self.seed = codec, seed

    def look(self, trainer: L.Trainer, pl_module: Any) -> None:
        batch, backbone = self.batches[0], pl_module.backbone
        prefix = backbone.encode_prefix(batch.to(pl_module.device).prefix)
        options = {"keys": batch.keys, "seed": self.seed, "special": self.codec.special, "trace": True}
        sampled = {name: sampler(backbone, prefix, **options) for name, sampler in self.samplers.items()}
        self.publish(self.writer(trainer), batch, sampled["draft"], sampled["refined"], trainer.global_step)

    def publish(self, writer: Any, batch: Batch, draft: Sampled, refined: Sampled, step: int) -> None:
        captions = [["image", "draft", "refined", "reference"]]
        blank = Image.new("RGB", (1, 1), "white")
        tokens = [[blank, *(text_box([Piece(name)], width=WIDTH, size=TEXT) for name in self.samplers)]]
        for row, (key, record) in enumerate(zip(batch.keys, batch.records, strict=True)):
            # 1. Captions: words that only one of the two has are in bold.
            words = [self.codec.decode(sampled.ids[row].tolist()).split() for sampled in (draft, refined)]
            cells = [
                " ".join(_escape(word) if n in kept else f"**{_escape(word)}**" for n, word in enumerate(text))
                for text, kept in zip(words, common(*words), strict=True)
            ]
            reference = (record.get("captions") or [{"text": ""}])[0]["text"]
            captions.append([_escape(key), *cells, _escape(reference)])
            # 2. Tokens of the text, before eot and without filler: the same in colour.
            ids = [self._visible(sampled.ids[row].tolist()) for sampled in (draft, refined)]
            boxes = []
            for sampled, visible, kept, new in zip((draft, refined), ids, common(*ids), (OLD, NEW), strict=True):
                assert sampled.traces is not None
                edited = {position for part in sampled.traces[row] for position, _, _ in part.rewritten}
                pieces = [
                    Piece(
                        self.codec.decode([token]).strip() or "\u00b7",
                        fill=KEPT if position in kept else new,
                        edge=REWRITTEN if position in edited else None,
                    )
                    for position, token in enumerate(visible)
                ]
                boxes.append(text_box(pieces, width=WIDTH, size=TEXT, gap=4))
            tokens.append([enlarge(batch.images[row], side=SIDE) if any(batch.images) else blank, *boxes])
        writer.add_text("samples/captions", markdown.table(captions), step)
        writer.add_image("samples/tokens", np.asarray(sheet(tokens)), step, dataformats="HWC")
        writer.flush()

    def _visible(self, ids: list[int]) -> list[int]:
        ids = ids[: ids.index(self.codec.eot_id)] if self.codec.eot_id in ids else ids
        return [token for token in ids if token != self.codec.eos_id]


def common(old: Sequence[Any], new: Sequence[Any]) -> tuple[set[int], set[int]]:
    """Positions in `old` and in `new` of the items that both have in common, in order."""
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks()
    return tuple({block[side] + n for block in blocks for n in range(block.size)} for side in (0, 1))  # type: ignore[return-value]


def _escape(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return "".join(f"\\{c}" if c in "\\`*_|<>[]" else c for c in " ".join(text.split()))
