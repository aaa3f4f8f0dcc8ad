"""A lock on the output of a verb: one process at a time.

    with locked(out):       a folder or a file, which need not exist yet
        ...

    out -> .NAME.lock beside it, with the id of the process that holds it

The kernel releases the lock when the process ends, even if it is killed. Forked processes, such as dataloader workers,
do not hold it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from src.io.errors import UserError

log = logging.getLogger(__name__)


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Lock `path` until the end of the block. Raises UserError, with its process id, if another process holds it."""
    resolved = Path(path).resolve()
    file = resolved.with_name(f".{resolved.name}.lock")
    lock = FileLock(file, blocking=False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        file.write_text(f"{os.getpid()}\n", encoding="utf-8")
    except Timeout:
        holder = file.read_text(encoding="utf-8").strip() if file.exists() else ""
        raise UserError(
            f"{path} is in use by process {holder or 'unknown'}, which may be the same command: wait for it to end, or "
            "end it"
        ) from None
    except OSError as error:  # not writable: the first write inside the block raises
        log.warning("cannot lock %s: %s", path, error)
        yield
        return
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # before the release; a process that waits sees that the file is gone
        lock.release()
