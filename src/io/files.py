"""Atomic file writes: to a temporary name, fsync, rename. Appends that are on disk before they count."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from src.io.errors import UserError

# Format of what this version writes: saved configs, checkpoints, datasets, drafts, rounds. Others are refused.
# 1: versions 0.1; 2: `canvas` became `response_length`
FORMAT = 2


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    with atomic(path) as stream:
        stream.write(data)


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which is synced to disk and gets its name when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.tmp")
    with with_filename(path), temporary.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    sync_path(path.parent)


@contextmanager
def with_filename(path: Path) -> Iterator[None]:
    """Add the file name to an OSError, such as a full disk's, that has none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def append(stream: FileIO, data: bytes, *, sync: bool = True) -> None:
    """Append to an unbuffered file; with `sync` it is on disk when this returns. A partial write is undone."""
    size, remaining = os.fstat(stream.fileno()).st_size, memoryview(data)
    with with_filename(Path(stream.name)):
        try:
            while remaining:
                remaining = remaining[stream.write(remaining) :]
            if sync:
                os.fsync(stream.fileno())
        except OSError:
            os.ftruncate(stream.fileno(), size)
            raise


def read_json(path: Path) -> dict:
    """Read a JSON file that contains a mapping. Raises UserError for any other content."""
    return parse_json(path.read_bytes(), str(path))


def parse_json(data: bytes, name: str) -> dict:
    """What `read_json` returns for a file of this content. name: of the file, for errors"""
    try:
        content = json.loads(data)
        if not isinstance(content, dict):
            raise ValueError(f"expected a mapping, got a {type(content).__name__}")
    except ValueError as error:
        raise UserError(f"{name} is damaged ({error}); remove or recreate it") from error
    return content


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def publish(temporary: Path, path: Path) -> None:
    """Sync a file, or a folder and its files, to disk and rename it to its final name."""
    for item in [*temporary.rglob("*"), temporary]:
        sync_path(item)
    os.replace(temporary, path)
    sync_path(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new folder that replaces `path` when the block ends; readers never see a partial folder."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial)
        raise
    shutil.rmtree(path, ignore_errors=True)
    publish(partial, path)


def sync_path(path: Path) -> None:
    """Sync a file, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
