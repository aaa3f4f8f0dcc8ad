"""What every verb's `main` shares: --help, one line for a user's mistake, exit codes of signals.

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
from src.cli.signals import SIGNALLED, Stop, Stopped
from src.io.errors import UserError

NUMBER = re.compile(r"(?:\[Errno |os error )(\d+)")
REFUSALS = {  # what a machine refuses whatever the code: space, quota, size, rights, a broken disk, too many open files
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.EMFILE, errno.ENFILE),
}


def main_guard(main: Callable[[list[str]], None]) -> Callable[..., None]:
    """Decorator of a verb's `main(argv)`: --help, exit codes, and one line for what the user can mend.

    Exit code 2 for a UserError, 1 where the machine refuses to read or write, 128 + number for a signal. Every other
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
            sys.exit(SIGNALLED + stopped.signal)
        except Exception as error:
            refusal = _refused_by_system(error)
            if refusal is None:
                raise
            sys.stderr.write(f"\nerror: {refusal}; once that is mended, the same command continues\n")
            sys.exit(1)

    return guarded


def _refused_by_system(error: Exception) -> str | None:
    """What the machine refused and where, such as a full disk; None for an error that code may be to blame for."""
    message = (str(error).strip().splitlines() or [""])[-1]  # from a worker process it comes behind a traceback
    number = NUMBER.search(message)  # also in the words of a library in Rust, which raises no OSError
    code = getattr(error, "errno", None) or (int(number[1]) if number else None)
    if code not in REFUSALS and not isinstance(error, ConnectionError):  # a server that is away
        return None
    if isinstance(error, OSError) and error.errno:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or message}"
    return message
