"""Components as plain data, to compare the settings stored with an output folder to the present ones.

describe(sampler)                         {"class": "Sampler", "length": 64, ...}
differences(stored, {"sampler": ...})     names of the settings that differ
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any


def differences(stored: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Names of the settings that differ from those read from JSON."""
    present = as_json(present)
    return sorted(name for name in stored.keys() | present.keys() if stored.get(name) != present.get(name))


def describe(value: Any) -> Any:
    """A component as plain data: its class, and its `settings` or else its public attributes."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "fingerprint"):  # a tokenizer: its content, not its path
        return value.fingerprint
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): describe(item) for name, item in value.items()}
    if hasattr(value, "settings"):
        settings = value.settings
    elif is_dataclass(value):
        settings = {field.name: getattr(value, field.name) for field in fields(value)}
    elif hasattr(value, "__dict__"):
        settings = {name: vars(value)[name] for name in sorted(vars(value))}
    else:
        hint = "keep it in an attribute whose name starts with _, or define `settings`"
        raise ValueError(f"{value!r} is not a setting: {hint}")
    public = {name: describe(item) for name, item in settings.items() if not name.startswith("_")}
    return {"class": type(value).__name__, **public}


def as_json(settings: Mapping[str, Any]) -> dict:
    """The settings after a round trip through JSON: tuples become lists."""
    return json.loads(json.dumps(dict(settings)))
