"""The file that `src.generate` writes: a JSON line per response, and a file of traces beside it.

A killed run leaves whole lines and at most one partial line, which the next run cuts off before it continues.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from src.io.errors import UserError
from src.io.files import with_filename
from src.io.settings import changes
from src.text.tokenizer import Codec
from src.types import Sampled, TraceStep

START = b'{"key": "'  # every line starts so


class Output:
    """The caption file and its trace file, for one process at a time. `keys`: those that already have a line.

    settings: what the captions depend on; part of every line, so that no file mixes them
    trace: also write `steps`: the text after each step, with _ for a mask, and the fields of `TraceStep`; and what an
        id in them stands for: `special` are those of mask, eot and end-of-text, `pieces` the text of each one
    """

    def __init__(self, path: Path, *, settings: dict[str, Any], trace: bool) -> None:
        self.path, self.settings = path, settings
        self.trace_path = path.with_suffix(".trace.jsonl") if trace else None
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = _restore(path)
        for line in lines:
            old = {name: line.get(name) for name in settings}
            if old != settings:
                hashed = {"options": None}  # of sampler and model: their values are not in the file
                changed = changes({**old, **hashed}, {**settings, **hashed}, "in the file")
                changed = changed or "an option of the sampler or of the model"
                raise UserError(f"{path} was made with other settings ({changed}); choose another out")
        self.keys = {line["key"] for line in lines}
        if self.trace_path:  # traces are written before their captions, so a kill can leave some too many
            _restore(self.trace_path, keep=lambda line: line["key"] in self.keys)

    def add(
        self, keys: list[str], sampled: Sampled, codec: Codec, *, more: list[dict[str, Any]] | None = None
    ) -> list[tuple[str, str]]:
        """Append a line per row, with `more` fields, also instead of ours. Returns (key, text) of each."""
        if self.trace_path:
            traces = zip(keys, sampled.traces or [], strict=True)
            _append(self.trace_path, [trace_line(codec, key, steps) for key, steps in traces])
        columns = (keys, sampled.ids.tolist(), sampled.forwards.tolist(), sampled.edits.tolist())
        lines = [
            {"key": key, "text": codec.decode(ids), "forwards": int(forwards), "edits": int(edits)}
            | extra
            | self.settings
            for key, ids, forwards, edits, extra in zip(*columns, more or [{}] * len(keys), strict=True)
        ]
        _append(self.path, lines)
        return [(line["key"], line["text"]) for line in lines]


def trace_line(codec: Codec, key: str, steps: list[TraceStep]) -> dict[str, Any]:
    """A line of a trace file, see `Output`."""
    special = {"mask": codec.mask_id, "eot": codec.eot_id, "eos": codec.eos_id}
    rows = [{"text": text_with_masks(codec, step.tokens), **asdict(step)} for step in steps]
    return {"key": key, "special": special, "pieces": _pieces(codec, steps), "steps": rows}


def _append(path: Path, lines: Iterable[dict]) -> None:
    with with_filename(path), path.open("a", encoding="utf-8", newline="\n") as stream:
        stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def text_with_masks(codec: Codec, ids: list[int]) -> str:
    """The text of an unfinished response up to its first eot, with _ for each mask."""
    text, span = "", list[int]()
    for token in ids[: ids.index(codec.eot_id)] if codec.eot_id in ids else ids:
        if token == codec.mask_id:
            text, span = f"{text}{codec.decode(span)}_", []
        else:
            span.append(token)
    return text + codec.decode(span)


def _pieces(codec: Codec, steps: list[TraceStep]) -> dict[int, str]:
    """The text of each id in a trace; a special token, which has none, has its name."""
    ids = {token for step in steps for token in (*step.tokens, *(old for _, old, _ in step.rewritten))}
    return {token: codec.decode([token]) or str(codec.tokenizer.convert_ids_to_tokens(token)) for token in sorted(ids)}


def _restore(path: Path, keep: Callable[[dict], bool] = lambda line: True) -> list[dict]:
    """The lines of a file, truncated at the first line not to keep and at a partial last line."""
    if not path.exists():
        return []
    raw = path.read_bytes()
    lines, end = [], 0
    for number, text in enumerate(raw.splitlines(keepends=True), start=1):
        if not text.endswith(b"\n") and text.startswith(START[: len(text)]):
            break
        try:
            line = json.loads(text)
            if not text.endswith(b"\n") or "key" not in line:
                raise ValueError("no key, or no end of the line")
        except (ValueError, TypeError) as error:
            raise UserError(f"line {number} of {path} is broken ({error}); choose another out") from error
        if not keep(line):
            break
        lines.append(line)
        end += len(text)
    if end < len(raw):
        os.truncate(path, end)
    return lines
