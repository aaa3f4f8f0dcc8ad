"""What every verb's `main` shares: --help, user errors as one line, exit codes after signals.

@main_guard
def main(argv): ...
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
import sys
from collections.abc import Callable

from src.cli.help import help_text
from src.cli.signals import EXIT_BASE, Stop, Stopped
from src.io.errors import UserError
from src.io.progress import LogHandler, closing_bars

RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # of safetensors and tokenizers, which raise types of their own
WORKER = "in DataLoader worker process"  # such an error holds the traceback, then type and message
SYSTEM_ERRORS = {  # of the machine: disk full, quota, permissions, I/O error, too many open files; or of a path
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE),
    *(errno.ENFILE, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
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
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[LogHandler()])
        try:
            with Stop(), closing_bars():
                main(argv)
        except UserError as error:
            message = str(error)
            sys.stderr.write(f"error: {message.rpartition('UserError: ')[2] if WORKER in message else message}\n")
            sys.exit(2)
        except Stopped as stopped:
            sys.stderr.write(f"\nstopped by {stopped}; the same command continues\n")
            sys.exit(EXIT_BASE + stopped.signal)
        except Exception as error:
            rust = None if type(error).__module__ == "builtins" else RUST_ERROR.search(str(error))
            code = int(rust[1]) if rust else error.errno if isinstance(error, OSError) else None
            if code not in SYSTEM_ERRORS:
                raise
            filename, reason = getattr(error, "filename", None), getattr(error, "strerror", None) or os.strerror(code)
            place = f"{filename}: " if filename else ""
            sys.stderr.write(f"error: {place}{reason}; once that is fixed, the same command continues\n")
            sys.exit(1)

    return guarded
