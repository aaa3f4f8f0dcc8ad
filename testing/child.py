"""A forked process, for what a kill leaves: nothing is imported again, and nothing of it returns to the test."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable


def in_child(run: Callable[[], object]) -> int:
    """Exit code of `run` in a forked process: 0, 1 after an exception, or minus the number of the signal it died of."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        run()
        code = 0
    except BaseException:  # noqa: BLE001 -- whatever it is, this process must not go on as a second test session
        traceback.print_exc()
    os._exit(code)
