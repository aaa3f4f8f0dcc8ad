"""Models of transformers in local folders, for metrics that need one. Nothing is downloaded."""

from __future__ import annotations

import functools
from typing import Any

from transformers import AutoTokenizer

from src.io.errors import UserError


@functools.cache
def load_pretrained(folder: str, kind: Any, reader: Any = AutoTokenizer) -> tuple[Any, Any]:
    """Model and tokenizer of a folder, cached over all cells of an evaluation. Raises UserError for another folder.

    kind, reader: classes of transformers, such as AutoModel and AutoProcessor
    """
    try:
        model = kind.from_pretrained(folder, local_files_only=True)
        return model.eval().requires_grad_(False), reader.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} holds no {kind.__name__} with its {reader.__name__}: {error}") from error
