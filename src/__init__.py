"""ReDiff-Lightning: train and sample masked diffusion models that revise what they have already written."""

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


_check_neighbours()
