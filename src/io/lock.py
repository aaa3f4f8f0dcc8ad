"""A lock on the output of a verb: one process at a time.

    with locked(out):       a folder or a file, which need not exist yet
        ...

    out -> .NAME.lock beside it, with the id of the process that holds it

The kernel releases the lock when the process ends, even if it is killed. Forked processes, such as dataloader workers,
do not hold it.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from src.io.errors import UserError

log = logging.getLogger(__name__)


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Lock `path` until the end of the block. Raises UserError, with its process id, if another process holds it."""
    resolved = Path(path).resolve()
    lock_file = resolved.with_name(f".{resolved.name}.lock")
    try:
        handle = _acquire(lock_file, path)
    except OSError as error:  # not writable: the first write inside the block raises
        log.warning("cannot lock %s: %s", path, error)
        yield
        return
    try:
        yield
    finally:
        lock_file.unlink(missing_ok=True)  # before the release, so that `_acquire` elsewhere sees that it is gone
        os.close(handle)


def _acquire(lock_file: Path, path: str | Path) -> int:
    """Open and lock the lock file; returns its file descriptor."""
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise UserError(
                f"{path} is in use by process {holder}, which may be the same command: wait for it to end, or end it"
            ) from None
        if _is_current(handle, lock_file):
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()}\n".encode())
            return handle
        os.close(handle)  # the previous holder has just removed this file


def _is_current(handle: int, lock_file: Path) -> bool:
    """Whether the open file is still the one at the path of the lock file."""
    try:
        return os.path.samestat(os.fstat(handle), lock_file.stat())
    except FileNotFoundError:
        return False
