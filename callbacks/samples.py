"""Samples: drafts and refined captions of a few fixed validation images, logged to TensorBoard during training.

    callbacks: {samples: {target: callbacks.samples.Samples, sampler_plain: {...}, sampler_refine: {...}, num: 4, ...}}

    first `num` validation samples -> draft (sampler_plain) and refined caption (sampler_refine)
      -> `samples/captions`: a table, changed words in **bold**
      -> `samples/tokens`: the images with the tokens of both in boxes

TensorBoard shows no HTML colours in text, so the tokens are drawn as an image: red boxes are draft tokens missing from
the refined caption, green boxes are new tokens, and a blue edge marks a token edit by the reviser.
"""

from __future__ import annotations

import difflib
import io
from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw

from src.distributed.parallel import gathered
from src.evaluation.drawing import Colour, Piece, enlarge, layout, paint
from src.io.errors import UserError
from src.models.inference import evaluating
from src.samplers.sampler import Sampler
from src.text.tokenizer import Codec
from src.types import Backbone, Batch, Sampled

OLD: Colour = (250, 190, 190)
NEW: Colour = (190, 235, 190)
KEPT: Colour = (234, 238, 244)
LABEL: Colour = (120, 120, 120)
REWRITTEN: Colour = (20, 60, 200)
SIDE, TEXT, PAD, WIDTH = 144, 13, 10, 460  # pixels


class Samples(L.Callback):
    """Logs drafts and refined captions of `num` fixed images every `every_n_steps` optimizer steps.

    sampler_plain writes the drafts, sampler_refine the refined captions; both start fully masked with the same seed.
    Logs nothing without validation samples. Raises UserError if the trainer has no TensorBoard logger or no datamodule.
    """

    def __init__(
        self,
        *,
        sampler_plain: Sampler,
        sampler_refine: Sampler,
        codec: Codec,
        every_n_steps: int,
        num: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in {"every_n_steps": every_n_steps, "num": num}.items():
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        self.samplers = {"draft": sampler_plain, "refined": sampler_refine}
        self.codec, self.every_n_steps, self.num, self.seed = codec, every_n_steps, num, seed
        self.last_step = 0  # step logged last, so a resumed run does not log it twice
        self.batch: Batch | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_step = state_dict["last_step"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.batch = first_samples(trainer, self.num)
        _writer(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        step = trainer.global_step
        if self.batch is None or step % self.every_n_steps or step == self.last_step:
            return
        self.last_step = step
        with gathered(pl_module.backbone):  # on all ranks, so that rank 0 can then sample alone
            if trainer.is_global_zero:
                sampled = self.write(pl_module, self.batch.to(pl_module.device))
                self.publish(_writer(trainer), self.batch, sampled, step)

    def write(self, pl_module: L.LightningModule, batch: Batch) -> dict[str, Sampled]:
        """Sample the `draft` and `refined` responses of a batch."""
        backbone: Backbone = pl_module.backbone  # type: ignore[assignment]
        special = self.codec.special
        with evaluating(pl_module), torch.no_grad():
            prefix = backbone.encode_prefix(batch.prefix)
            return {
                name: sampler(backbone, prefix, special=special, keys=batch.keys, seed=self.seed, trace=True)
                for name, sampler in self.samplers.items()
            }

    def publish(self, writer: Any, batch: Batch, sampled: dict[str, Sampled], step: int) -> None:
        """Write the table and the image of one step to TensorBoard."""
        texts = {name: [self.codec.decode(ids) for ids in rows.ids.tolist()] for name, rows in sampled.items()}
        references = [(record.get("captions") or [{"text": ""}])[0]["text"] for record in batch.records]
        writer.add_text("samples/captions", table(batch.keys, texts["draft"], texts["refined"], references), step)
        sheets = [self._sheet(batch, sampled, row) for row in range(len(batch))]
        writer.add_image("samples/tokens", _stack(sheets), step, dataformats="HWC")
        writer.flush()

    def _sheet(self, batch: Batch, sampled: dict[str, Sampled], row: int) -> Image.Image:
        """One validation image beside the tokens of its draft and of its refined caption."""
        ids = {name: self._visible(rows.ids[row].tolist()) for name, rows in sampled.items()}
        common = _common(ids["draft"], ids["refined"])
        edited = {name: _rewritten(rows, row) for name, rows in sampled.items()}
        texts = []
        for name, changed in (("draft", OLD), ("refined", NEW)):
            kept = {pair[name == "refined"] for pair in common}
            boxes = [
                Piece(
                    self.codec.decode([token]).strip() or "\u00b7",
                    fill=KEPT if position in kept else changed,
                    edge=REWRITTEN if position in edited[name] else None,
                )
                for position, token in enumerate(ids[name])
            ]
            texts.append([Piece(f"{name}:", ink=LABEL), *boxes])
        return _draw(batch.images[row] if batch.images else None, texts)

    def _visible(self, ids: list[int]) -> list[int]:
        """The tokens of the text: those before eot, without eos padding."""
        ids = ids[: ids.index(self.codec.eot_id)] if self.codec.eot_id in ids else ids
        return [token for token in ids if token != self.codec.eos_id]


def first_samples(trainer: L.Trainer, num: int) -> Batch | None:
    """The first `num` validation samples of the trainer's datamodule, at most one batch; None if it has none."""
    data = getattr(trainer, "datamodule", None)
    if data is None:
        raise UserError("samples are drawn for validation images: the trainer needs a datamodule")
    batch = next(iter(data.val_dataloader()), None)
    return batch and batch.rows(slice(0, num))


def table(keys: Sequence[str], drafts: Sequence[str], refined: Sequence[str], references: Sequence[str]) -> str:
    """Markdown table of captions; words that only the draft or only the refined caption has are in bold."""
    lines = ["| image | draft | refined | reference |", "|---|---|---|---|"]
    for key, draft, refinement, reference in zip(keys, drafts, refined, references, strict=True):
        old, new = draft.split(), refinement.split()
        common = _common(old, new)
        cells = [_bold(old, {a for a, _ in common}), _bold(new, {b for _, b in common}), _escape(reference)]
        lines.append("| " + " | ".join([_escape(key), *cells]) + " |")
    return "\n".join(lines)


def _bold(words: list[str], kept: set[int]) -> str:
    return " ".join(_escape(word) if n in kept else f"**{_escape(word)}**" for n, word in enumerate(words))


def _escape(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    text = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*_|<>[]" else c for c in text)


def _common(old: Sequence[Any], new: Sequence[Any]) -> list[tuple[int, int]]:
    """Positions (in old, in new) of the items that both have in common, in order."""
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks()
    return [(block.a + n, block.b + n) for block in blocks for n in range(block.size)]


def _rewritten(sampled: Sampled, row: int) -> set[int]:
    """Positions of the token edits of all steps."""
    assert sampled.traces is not None
    return {position for step in sampled.traces[row] for position, _, _ in step.rewritten}


def _draw(image: bytes | None, texts: Sequence[Sequence[Piece]]) -> Image.Image:
    layouts = [layout(pieces, width=WIDTH, size=TEXT) for pieces in texts]
    height = max(SIDE, sum(text.height + PAD for text in layouts))
    sheet = Image.new("RGB", (SIDE + WIDTH + 3 * PAD, height + PAD), "white")
    if image:
        sheet.paste(enlarge(Image.open(io.BytesIO(image)).convert("RGB"), side=SIDE), (PAD, PAD))
    top = PAD
    for text in layouts:
        paint(ImageDraw.Draw(sheet), text, at=(SIDE + 2 * PAD, top), size=TEXT)
        top += text.height + PAD
    return sheet


def _stack(sheets: list[Image.Image]) -> np.ndarray:
    """Stack sheets of equal width: (H, W, 3) uint8."""
    return np.concatenate([np.asarray(sheet) for sheet in sheets])


def _writer(trainer: L.Trainer) -> Any:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            return logger.experiment
    raise UserError("samples are logged to TensorBoard: the trainer needs a TensorBoardLogger")
