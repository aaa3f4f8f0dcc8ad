"""What every verb's `main` shares: --help, user errors as one line, exit codes after signals.

@main_guard
def main(argv): ...
"""

from __future__ import annotations

import errno
import functools
import logging
import re
import sys
from collections.abc import Callable

from src.cli.help import help_text
from src.cli.signals import EXIT_BASE, Stop, Stopped
from src.io.errors import UserError

NUMBER = re.compile(r"(?:\[Errno |os error )(\d+)")
SYSTEM_ERRORS = {  # faults of the machine: disk full, quota, file size, permissions, I/O error, too many open files
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.EMFILE, errno.ENFILE),
}


def main_guard(main: Callable[[list[str]], None]) -> Callable[..., None]:
    """Decorator of a verb's `main(argv)`: --help, exit codes, and one line for errors that the user can fix.

    Exit code 2 for a UserError, 1 for a system error such as a full disk, 128 + number for a signal. Every other
    exception keeps its traceback.
    """

    @functools.wraps(main)
    def guarded(argv: list[str] | None = None) -> None:
        argv = sys.argv[1:] if argv is None else argv
        if {"-h", "--help"} & set(argv):
            module = sys.modules[main.__module__]
            sys.stdout.write(help_text(module.__spec__.name if module.__spec__ else "", module.__doc__))
            return
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        try:
            with Stop():
                main(argv)
        except UserError as error:
            sys.stderr.write(f"error: {error}\n")
            sys.exit(2)
        except Stopped as stopped:
            sys.stderr.write(f"\nstopped by {stopped}; the same command continues\n")
            sys.exit(EXIT_BASE + stopped.signal)
        except Exception as error:
            message = _system_error(error)
            if message is None:
                raise
            sys.stderr.write(f"\nerror: {message}; once that is fixed, the same command continues\n")
            sys.exit(1)

    return guarded


def _system_error(error: Exception) -> str | None:
    """Message for a fault of the machine, such as a full disk, with its path; None for an error that may be a bug."""
    message = (str(error).strip().splitlines() or [""])[-1]  # a worker process puts its traceback in front
    number = NUMBER.search(message)  # Rust libraries raise other types and put it in the message
    code = getattr(error, "errno", None) or (int(number[1]) if number else None)
    if code not in SYSTEM_ERRORS and not isinstance(error, ConnectionError):  # such as a server that is down
        return None
    if isinstance(error, OSError) and error.errno:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or message}"
    return message
