"""Components as plain data, to compare the settings stored with an output folder to the present ones.

describe(sampler)                         {"class": "Sampler", "length": 64, ...}
differences(stored, {"sampler": ...})     names of the settings that differ
changes(stored, present, "in the run")    the same with both values, for an error: `seed: 0 in the run, 1 now`
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

LISTED, SHOWN = 8, 80  # settings in an error, characters of a value


def differences(stored: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Names of the settings that differ from those read from JSON."""
    present = as_json(present)
    return sorted(name for name in stored.keys() | present.keys() if stored.get(name) != present.get(name))


def changes(stored: Mapping[str, Any], present: Mapping[str, Any], where: str) -> str:
    """The settings that differ, each with both values: `optim.lr: 0.001 in the run, 0.002 now; ...`.

    where: what the stored ones belong to. A setting that is missing counts as null.
    """
    parts = []

    def compare(name: str, old: Any, new: Any) -> None:
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            for key in {**old, **new}:
                compare(f"{name}.{key}" if name else str(key), old.get(key), new.get(key))
        elif old != new:
            texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in (old, new)]
            if max(map(len, texts)) > SHOWN:  # from a little before they differ
                same = next((n for n, pair in enumerate(zip(*texts, strict=False)) if len({*pair}) > 1), SHOWN)
                start = max(0, same - SHOWN // 4)
                texts = ["..." * bool(start) + text[start:][:SHOWN] for text in texts]
            parts.append(f"{name}: {texts[0]} {where}, {texts[1]} now")

    compare("", dict(stored), as_json(present))
    return "; ".join(parts[:LISTED]) + (f"; and {len(parts) - LISTED} more" if len(parts) > LISTED else "")


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
