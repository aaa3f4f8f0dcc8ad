"""What drafting, generating and evaluating need of a model in eval mode."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

logger = logging.getLogger(__name__)


def warn_of_canvas(backbone: nn.Module, canvas: int, *, name: str) -> None:
    """Warn where responses are to be of another length than those that the model was trained with."""
    trained = getattr(backbone, "canvas", None)
    if trained and trained != canvas:
        logger.warning("%s=%d, but the model was trained with canvas %d: it writes best at that", name, canvas, trained)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode, after which every submodule is again in the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
