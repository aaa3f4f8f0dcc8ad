"""A lock on the output of a verb, so that one process writes at a time: `.NAME.lock` beside it, with the process's id.

The kernel releases the lock when the process ends, even if it is killed. Forked processes, such as dataloader workers,
do not hold it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from src.io.errors import UserError


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Lock a folder or file, which need not exist yet. Raises UserError if another process holds it."""
    with held(path) as is_held:
        if not is_held:
            file = _file(path)
            holder = file.read_text(encoding="utf-8").strip() if file.exists() else ""
            raise UserError(
                f"{path} is in use by process {holder or 'unknown'}, which may be the same command: wait for it to "
                "end, or end it"
            )
        yield


@contextmanager
def held(path: str | Path) -> Iterator[bool]:
    """Lock a folder or file, which need not exist yet, unless another process holds it: then this is false."""
    file = _file(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        file.write_text(f"{os.getpid()}\n", encoding="utf-8")
        yield True
    finally:
        file.unlink(missing_ok=True)  # before the release; a process that waits sees that the file is gone
        lock.release()


def _file(path: str | Path) -> Path:
    resolved = Path(path).resolve()
    return resolved.with_name(f".{resolved.name}.lock")
