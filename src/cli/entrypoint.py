"""What every verb's `main` shares: --help, one line for a user's mistake, exit codes of signals.

@main_guard
def main(argv): ...
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from src.cli.config import available, config_root
from src.cli.signals import SIGNALLED, Stop, Stopped
from src.io.errors import UserError

USAGE = """\
arguments: conf=NAME[,NAME...] [key=value ...] [+key=value ...] [--print]
    NAME may be the path of a .yaml file; +key=value adds a key to a mapping; --print prints the config and stops
"""


def help_text(verb_doc: str | None, root: str | Path = "conf") -> str:
    """What a verb prints for --help: its own docstring, the arguments and the configurations there are."""
    return f"{(verb_doc or '').strip()}\n\n{USAGE}configurations: {', '.join(available(config_root(root)))}\n"


def main_guard(main: Callable[[list[str]], None]) -> Callable[..., None]:
    """Decorator of a verb's `main(argv)`: --help, and one line instead of a traceback where nothing is wrong with it.

    Exit code 2 for a UserError, 1 where the system cannot read or write, and 128 + number for a signal.
    """

    @functools.wraps(main)
    def guarded(argv: list[str] | None = None) -> None:
        argv = sys.argv[1:] if argv is None else argv
        if {"-h", "--help"} & set(argv):
            sys.stdout.write(help_text(sys.modules[main.__module__].__doc__))
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
            told = _told_by_system(error)
            if told is None:
                raise
            sys.stderr.write(f"\nerror: {told}; once that is mended, the same command continues\n")
            sys.exit(1)

    return guarded


def _told_by_system(error: Exception) -> str | None:
    """What the system refused, and where. None for any other error."""
    text = (str(error).strip().splitlines() or [""])[-1]  # of an error in a worker, behind its traceback
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or text or type(error).__name__}"
    return text if "(os error " in text else None  # of a library in Rust, which keeps the system's words
