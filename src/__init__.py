"""ReDiff-Lightning: train and sample masked diffusion models that revise what they have already written."""

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path


def _check_neighbours() -> None:
    """Raise ImportError where another package hides `callbacks` or `datamodules`, whose names are common."""
    home = Path(__file__).resolve().parents[1]
    for name in ("callbacks", "datamodules"):
        spec = find_spec(name)
        places = list(spec.submodule_search_locations or [spec.origin]) if spec else []
        if home / name in [Path(place).resolve() for place in places if place]:
            continue
        found = f"Python finds {', '.join(map(str, places))} instead" if places else "Python does not find it"
        raise ImportError(
            f"ReDiff-Lightning needs its own package `{name}` in {home}, but {found}. Run from {home}, or remove "
            f"or rename the other `{name}`, or put {home} first in PYTHONPATH."
        )


def _stop_before_start(number: int, _: object) -> None:
    name = signal.Signals(number).name
    sys.stderr.write(f"\nstopped by {name} before it began; the same command begins\n")
    sys.stderr.flush()
    os._exit(128 + number)


def _verb() -> str | None:
    """The verb that `python -m src.VERB` is about to import; None where this package is imported otherwise."""
    if sys.argv[:1] != ["-m"]:
        return None
    return next((word for word in sys.orig_argv if word.startswith("src.")), None)


def _before_imports() -> None:
    """Answer --help and signals while a verb's imports, which take seconds, have not run; then `main_guard` does."""
    verb = _verb()
    if verb is None:
        return
    if {"-h", "--help"} & set(sys.orig_argv):
        from src.cli.help import docstring, help_text

        sys.stdout.write(help_text(verb, docstring(verb)))
        sys.exit()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop_before_start)


_check_neighbours()
_before_imports()
