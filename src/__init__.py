"""ReDiff-Lightning: train and sample masked diffusion models that revise their own output."""

import ctypes
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path


def _check_sibling_packages() -> None:
    """Raise ImportError if another package shadows `callbacks` or `datamodules`, whose names are common."""
    root = Path(__file__).resolve().parents[1]
    for name in ("callbacks", "datamodules"):
        spec = find_spec(name)
        locations = list(spec.submodule_search_locations or [spec.origin]) if spec else []
        if root / name in [Path(location).resolve() for location in locations if location]:
            continue
        problem = f"Python finds {', '.join(map(str, locations))} instead" if locations else "Python does not find it"
        raise ImportError(
            f"ReDiff-Lightning needs its own package `{name}` in {root}, but {problem}. Run from {root}, or remove "
            f"or rename the other `{name}`, or put {root} first in PYTHONPATH."
        )


def _handle_help_and_signals() -> None:
    """In `python -m src.VERB`: handle --help and signals before the verb's imports, which take seconds."""
    verb = next((word for word in sys.orig_argv if word.startswith("src.")), "")
    if sys.argv[:1] != ["-m"] or not Path(__file__).with_name(f"{verb.removeprefix('src.')}.py").is_file():
        return
    if {"-h", "--help"} & set(sys.orig_argv):
        from src.cli.help import docstring, help_text

        sys.stdout.write(help_text(verb, docstring(verb)))
        sys.exit()

    def exit_before_start(number: int, _: object) -> None:
        name = signal.Signals(number).name
        sys.stderr.write(f"\nstopped by {name} before it started; the same command starts it\n")
        sys.stderr.flush()
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, exit_before_start)


def _keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MB, its maximum, for the next tensor instead of returning them at once.

    Training and drafting allocate the same sizes in every step; each return costs a system call and page faults.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: free memory at the end of the heap that is kept


# Waiting threads of torch spin for some microseconds and then sleep: they meet soon on idle cores, and take no time
# from another process (results/threads.md). Has to be set before torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "500")
_keep_freed_memory()
_check_sibling_packages()
_handle_help_and_signals()
