"""CLIPScore: cosine of image and caption under a CLIP model in a local folder (arXiv 2104.08718). No references.

    ClipScore(model="clip-vit-large-patch14", images="photos")

WARN: CLIP reads the first 77 tokens, and detailed captions are longer: `clip_cut` is the share of those it has cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoProcessor, CLIPModel

from src.io.errors import UserError
from src.io.images import load
from src.metrics.caption import CaptionMetric, image_name
from src.metrics.pretrained import load_pretrained


class ClipScore(CaptionMetric):
    """`clip_score`, 100 * max(cos, 0) as in torchmetrics (the paper has 2.5 * max(cos, 0)), and `clip_cut`.

    model: folder of a CLIP model
    images: folder of the files; None: each record names its own in `image`
    batch_size: pairs per forward call
    """

    higher_is_better = True
    names = ("clip_score", "clip_cut")

    def __init__(self, *, model: str, images: str | None = None, batch_size: int = 32) -> None:
        super().__init__()
        self.model, self.processor = load_pretrained(model, CLIPModel, AutoProcessor)
        self.max_length = self.model.config.text_config.max_position_embeddings
        self.files = {path.stem: path for path in Path(images).iterdir()} if images else {}
        self.batch_size = batch_size

    def check(self, record: dict) -> None:
        self.file_of(record)

    def file_of(self, record: dict) -> Path:
        if file := self.files.get(name := image_name(record)) or record.get("image"):
            return Path(file)
        raise UserError(f"CLIPScore has no image of {record['key']!r}; set images= to a folder with {name}.jpg")

    @torch.no_grad()
    def update(self, texts: Sequence[str], records: Sequence[dict]) -> None:
        self.latest, device = [], self.device
        for start in range(0, len(texts), self.batch_size):
            batch = list(texts[start : start + self.batch_size])
            images = [load(self.file_of(record)) for record in records[start : start + self.batch_size]]
            lengths = [len(ids) for ids in self.processor.tokenizer(batch)["input_ids"]]
            inputs = self.processor(
                text=batch,
                images=images,
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(device)
            out = self.model.to(device)(**inputs)
            cosines = (out.image_embeds * out.text_embeds).sum(-1)  # of unit vectors
            self.latest += [
                {"clip_score": 100 * max(cosine, 0.0), "clip_cut": float(length > self.max_length)}
                for cosine, length in zip(cosines.tolist(), lengths, strict=True)
            ]
        self.accumulate(records)
