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
import traceback
from collections.abc import Callable
from pathlib import Path

from src.cli.help import help_text
from src.cli.signals import EXIT_BASE, Stop, Stopped
from src.io.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
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
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        try:
            with Stop():
                main(argv)
        except UserError as error:
            message = str(error)
            sys.stderr.write(f"error: {message.rpartition('UserError: ')[2] if WORKER in message else message}\n")
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
    """Path, reason and place in the code of a fault of the machine; None for any other error."""
    rust = None if type(error).__module__ == "builtins" else RUST_ERROR.search(str(error))
    code = int(rust[1]) if rust else error.errno if isinstance(error, OSError) else None
    if code not in SYSTEM_ERRORS:
        return None
    path = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(f"{ROOT}/")]
    own = [frame for frame in own if "site-packages" not in frame.filename]
    place = f" ({Path(own[-1].filename).relative_to(ROOT)}, line {own[-1].lineno})" if own else ""
    reason = error.strerror if isinstance(error, OSError) else None
    return f"{path}{reason or os.strerror(code)}{place}"
