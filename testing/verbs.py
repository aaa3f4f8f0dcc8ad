"""What a verb says when it refuses its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def refusal(main: Callable, argv: Any, capsys: pytest.CaptureFixture[str], *, code: int = 2) -> str:
    """The lines on stderr of a call of `main(argv)` that exits with `code`."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == code
    return capsys.readouterr().err
