"""Small datasets of scenes for tests: 48 images for the embedded base model, in shards of 16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from src.preparation.scenes import Scenes

BASE = Path(__file__).resolve().parents[1] / "assets" / "base"


def write_scenes(out: Path, **changed: Any) -> Path:
    """The dataset in `out`, which is returned; changed: arguments of `Scenes` (tokenizer=None trains one)."""
    counts = {"num_train": 48, "num_val": 8, "num_test": 8, "captions_per_image": 1, "objects": [1, 2], "per_shard": 16}
    sizes = {"image_size": 48, "vocab_size": 300, "response_length": 64, "noise": 2.0}
    text = {"prompt": "Describe the image in detail.", "tokenizer": str(BASE)}
    Scenes(out=str(out), **{**counts, **sizes, **text, **changed}).run()
    return out
