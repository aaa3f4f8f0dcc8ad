"""Running a model: a length check, and eval mode."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

logger = logging.getLogger(__name__)


def warn_if_length_differs(backbone: nn.Module, response_length: int, *, name: str) -> None:
    """Log a warning if the response length differs from the one that the model was trained with."""
    trained = getattr(backbone, "response_length", None)
    if trained and trained != response_length:
        message = "%s=%d, but the model was trained with response length %d, at which it writes best"
        logger.warning(message, name, response_length, trained)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Context in eval mode; afterwards every submodule returns to the mode that it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
