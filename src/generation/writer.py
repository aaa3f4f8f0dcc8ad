"""The file that `src.generate` writes: a JSON line per response, and a file of traces beside it.

    with Output(Path("captions.jsonl"), settings={...}, trace=False) as out:
        out.keys                            keys that already have a line
        out.add(keys, sampled, codec)

A killed run leaves whole lines and at most one partial line, which the next run cuts off before it continues.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any

from src.io.errors import UserError
from src.text.tokenizer import Codec
from src.types import Sampled

START = b'{"key": "'  # every line starts so


class Output:
    """Context manager of the caption file and its trace file. `keys` are the keys that have a line.

    settings: what the captions depend on; part of every line
    trace: also write `steps`: the text after each step, with _ for a mask, and the fields of `TraceStep`

    Raises UserError if the path is not that of a regular file. Entering raises UserError if a line of the file is
    broken or its captions were made with other settings, and OSError if it cannot be written. Leaves no empty file.
    NOTE: one process at a time (`src.io.lock`).
    """

    def __init__(self, path: Path, *, settings: dict[str, Any], trace: bool) -> None:
        self.path, self.settings = path, settings
        self.trace_path = path.with_suffix(".trace.jsonl") if trace else None
        self.keys: set[str] = set()
        self._open: dict[Path, FileIO] = {}
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        if not parent.is_dir():
            raise UserError(f"out={path} cannot be created: {parent} is not a folder")
        for file in filter(None, (path, self.trace_path)):
            if file.exists() and not file.is_file():
                raise UserError(f"out={file} is {'a folder' if file.is_dir() else 'not a regular file'}")

    def __enter__(self) -> Output:
        try:
            with writing(self.path):
                self._start()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with suppress(*([OSError] if kind else [])), writing(self.path):  # keep the first error
            self._close()

    def add(self, keys: list[str], sampled: Sampled, codec: Codec) -> list[tuple[str, str]]:
        """Append a line per row. Returns (key, text) of each. Raises OSError with the file's name on a full disk."""
        texts = [codec.decode(ids) for ids in sampled.ids.tolist()]
        counts = zip(sampled.forwards.tolist(), sampled.edits.tolist(), strict=True)
        lines = [
            {"key": key, "text": text, "forwards": int(forwards), "edits": int(edits), **self.settings}
            for key, text, (forwards, edits) in zip(keys, texts, counts, strict=True)
        ]
        with writing(self.path):
            if self.trace_path:
                pairs = zip(keys, sampled.traces or [], strict=True)
                _append(self._open[self.trace_path], [_trace_line(key, steps, codec) for key, steps in pairs])
            _append(self._open[self.path], lines)
        return list(zip(keys, texts, strict=True))

    def _start(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open[self.path] = self.path.open("ab", buffering=0)
        lines = _restore(self.path)
        for line in lines:
            if changed := [name for name, value in self.settings.items() if line.get(name) != value]:
                names = [name for name in changed if name != "options"] or ["sampler or model option"]
                raise UserError(f"{self.path} was made with another {', '.join(names)}; choose another out")
        self.keys = {line["key"] for line in lines}
        if self.trace_path:  # a trace is written before its caption, so a kill can leave one trace too many
            self._open[self.trace_path] = self.trace_path.open("ab", buffering=0)
            _restore(self.trace_path, keep=lambda line: line["key"] in self.keys)

    def _close(self) -> None:
        """Close both files and remove those that are empty."""
        for path, stream in self._open.items():
            try:
                if os.fstat(stream.fileno()).st_size == 0:
                    path.unlink(missing_ok=True)
            finally:
                stream.close()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Add the file name to an OSError, which lacks it if the disk is full."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _append(stream: FileIO, lines: list[dict]) -> None:
    data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    while data:  # a nearly full disk accepts only a part, and fails at the next write
        data = data[stream.write(data) :]


def _trace_line(key: str, steps: list, codec: Codec) -> dict[str, Any]:
    return {"key": key, "steps": [{"text": _text_with_masks(codec, step.tokens), **asdict(step)} for step in steps]}


def _text_with_masks(codec: Codec, ids: list[int]) -> str:
    """The text of an unfinished response up to its first eot, with _ for each mask."""
    text, span = "", list[int]()
    for token in ids[: ids.index(codec.eot_id)] if codec.eot_id in ids else ids:
        if token == codec.mask_id:
            text, span = f"{text}{codec.decode(span)}_", []
        else:
            span.append(token)
    return text + codec.decode(span)


def _restore(path: Path, keep: Callable[[dict], bool] = lambda line: True) -> list[dict]:
    """The lines of a file, truncated at the first line not to keep and at a partial last line."""
    raw = path.read_bytes()
    lines, end = [], 0
    for number, text in enumerate(raw.splitlines(keepends=True), start=1):
        try:
            if not text.endswith(b"\n"):
                if text.startswith(START[: len(text)]):
                    break
                raise ValueError("no line end")
            line = json.loads(text)
            if not isinstance(line, dict) or "key" not in line:
                raise ValueError("not an object with a key")
        except ValueError as error:
            raise UserError(f"line {number} of {path} is broken ({error}); choose another out") from error
        if not keep(line):
            break
        lines.append(line)
        end += len(text)
    if end < len(raw):
        os.truncate(path, end)
    return lines
