"""Files that tests and benchmarks read and write alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_jsonl(path: str | Path) -> list[Any]:
    """The values of a JSONL file. NOTE: `str.splitlines` would also break lines at U+2028, U+0085 and others."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def contents(folder: Path) -> dict[str, bytes]:
    """What each file below a folder holds, by its path there."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
