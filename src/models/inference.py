"""Running a model: its size of images, a length check, and eval mode."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from src.io.errors import UserError
from src.models.tiling import AnyRes, Layout

logger = logging.getLogger(__name__)


def with_layout(data: dict[str, Any], layout: Layout | None) -> dict[str, Any]:
    """The node of a datamodule. If its `image_size` is null, it and `tiling` become those of a model with `layout`."""
    if data.get("image_size", 0) is not None:
        return data
    if layout is None:
        raise UserError("the data have images, but the model has no vision path")
    tiling = {"target": f"{AnyRes.__module__}.AnyRes", **layout.to_dict()} if isinstance(layout, AnyRes) else None
    return {**data, "image_size": layout.size, "tiling": tiling}


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
