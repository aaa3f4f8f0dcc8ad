"""Where a model's folder is: on this machine, or behind its name on the Hugging Face hub.

local_folder("runs/mask/model")               that folder, whether it exists or not
local_folder("GSAI-ML/LLaDA-8B-Instruct")     a folder of that name if there is one here, else its download
hub_name("GSAI-ML/LLaDA-8B-Instruct")         that name, None for a folder
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from src.io.errors import UserError

FILES = ("*.json", "*.jinja", "*.safetensors", "*.txt", "*.yaml")  # no program text
NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_revisions: dict[str, str] = {}  # all files of a process come from one


def hub_name(path: str | Path) -> str | None:
    """The name that stands for a download, None where `path` is a folder's."""
    return None if Path(path).exists() or not NAME.fullmatch(str(path)) else str(path)


def local_folder(path: str | Path, *, patterns: tuple[str, ...] = FILES) -> Path:
    """The folder of a model. Raises UserError where OWNER/NAME is neither a folder here nor can be downloaded.

    patterns: the files to download; others may be there or not
    """
    name = hub_name(path)
    return _download(name, patterns) if name else Path(path)


@functools.cache
def _download(name: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download  # only here, as it is slow to import

    try:
        found = Path(snapshot_download(name, revision=_revisions.get(name), allow_patterns=list(patterns)))
        _revisions.setdefault(name, found.name)
        return found
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"there is no folder {name} here, and the Hugging Face hub did not give it: {reason[:300]}; "
            "name a folder, or download the model first where there is a network"
        ) from error
