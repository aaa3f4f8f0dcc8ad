"""One process at a time on what a verb writes.

    with locked(out):       a folder or a file, which need not be there yet
        ...

    out -> .NAME.lock beside it, with the id of the process that holds it

The kernel gives the lock up when the process ends, however it ends, so a killed one blocks nobody. Processes that it
has forked, such as the workers of a loader, do not hold it.
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
    """Hold `path` until the end of the block. Raises UserError, with its id, where another process holds it."""
    place = Path(path).resolve()
    name = place.with_name(f".{place.name}.lock")
    try:
        handle = _acquire(name, path)
    except OSError as error:  # where nothing can be written; what tries to says so
        log.warning("cannot lock %s: %s", path, error)
        yield
        return
    try:
        yield
    finally:
        name.unlink(missing_ok=True)  # before it is free: who waits for it in `_acquire` sees that it is gone
        os.close(handle)


def _acquire(name: Path, path: str | Path) -> int:
    """A handle of the lock file, locked."""
    name.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise UserError(
                f"{path} is in use by process {holder}, which may be the same command: wait for it to end, or end it"
            ) from None
        if _is_named(handle, name):
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()}\n".encode())
            return handle
        os.close(handle)  # its holder has just removed it


def _is_named(handle: int, name: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), name.stat())
    except FileNotFoundError:
        return False
