"""Resolve a model's path: a local folder, or a name on the Hugging Face hub.

local_folder("runs/mask/model")               that folder, whether it exists or not
local_folder("GSAI-ML/LLaDA-8B-Instruct")     a local folder of that name if it exists, else the download
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from src.io.errors import UserError

FILES = ("*.json", "*.jinja", "*.safetensors", "*.txt", "*.yaml")  # no code
NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_revisions: dict[str, str] = {}  # hub name -> commit, so that a process downloads all files from one revision


def hub_name(path: str | Path) -> str | None:
    """`path` if it is a name on the hub, None if it is a folder."""
    return None if Path(path).exists() or not NAME.fullmatch(str(path)) else str(path)


def local_folder(path: str | Path, *, patterns: tuple[str, ...] = FILES) -> Path:
    """The folder of a model. Raises UserError if OWNER/NAME is not a local folder and cannot be downloaded."""
    name = hub_name(path)
    return _download(name, patterns) if name else Path(path)


@functools.cache
def _download(name: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download  # slow to import

    try:
        folder = Path(snapshot_download(name, revision=_revisions.get(name), allow_patterns=list(patterns)))
        _revisions.setdefault(name, folder.name)
        return folder
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"there is no local folder {name}, and its download from the Hugging Face hub failed: {reason[:300]}; "
            "give a folder, or download the model first on a machine with network access"
        ) from error
