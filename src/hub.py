"""Where a model's folder is: on this machine, or behind its name on the Hugging Face hub.

local_folder("runs/mask/model")               that folder, whether it exists or not
local_folder("GSAI-ML/LLaDA-8B-Instruct")     a folder of that name if there is one here, else its download
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

FILES = ["*.json", "*.jinja", "*.safetensors", "*.txt", "*.yaml"]  # no program text
NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def local_folder(path: str | Path) -> Path:
    """The folder of a model. Raises ValueError where OWNER/NAME is neither a folder here nor can be downloaded."""
    if Path(path).exists() or not NAME.fullmatch(str(path)):
        return Path(path)
    return _download(str(path))


@functools.cache  # all files of a process come from one revision
def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download  # only here, as it is slow to import

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"there is no folder {name} here, and the Hugging Face hub did not give it: {reason[:300]}; "
            "name a folder, or download the model first where there is a network"
        ) from error
