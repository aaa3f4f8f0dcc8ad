"""Parquet: rows with an image as {"bytes", "path"}, as bytes, or as bytes or base64 in `binary` (DetailCaps), and
captions in one or several columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from src.io.errors import UserError

ROWS = 16  # of one batch, whose images are in memory


def read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, record) of each row. Raises UserError if the file is damaged or pyarrow is missing."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"{path}: Parquet needs pyarrow: pip install -e '.[data]'") from error
    try:
        with ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path.name}#{number}", record
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error
