"""What drafting, generating and evaluating need of a model in eval mode."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

logger = logging.getLogger(__name__)


def warn_if_length_differs(backbone: nn.Module, response_length: int, *, name: str) -> None:
    """Warn where responses are to be of another length than those that the model was trained with."""
    trained = getattr(backbone, "response_length", None)
    if trained and trained != response_length:
        logger.warning(
            "%s=%d, but the model was trained with response length %d: it writes best at that",
            name,
            response_length,
            trained,
        )


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
