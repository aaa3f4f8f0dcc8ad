"""Files of a dataset that lie elsewhere: http(s), what fsspec reads (s3://, gs://, ...), and the output of a command.

    folder = join("https://host/data", "train")                     or s3://bucket/data, or a local path
    locate(folder, "index.json", cache=Cache()).read_bytes()        always from the server
    locate(folder, "train-000000.tar", cache=Cache(), size=..., sha256=...).open()      from the cache, or into it first

    `pipe:ssh host cat /data/{}`        a command that prints a file, whose name takes the place of {}

Processes of a node share the cache: one of them downloads a file, under a temporary name until its size and sha256 are
those of the index, and the others wait for it. A connection that breaks is made again, and goes on where it was.

Passwords and queries (signatures, tokens) are neither shown nor stored: a URL names them as $VARIABLE, whose value is
taken from the environment when a connection is made.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import select
import shlex
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from filelock import FileLock
from webdataset.gopen import gopen

from src.io.errors import UserError
from src.io.files import atomic, sha256

STALL = 30.0  # seconds without a byte until a connection is given up
PATIENCE = 60.0  # seconds without a byte, over all attempts, until a file is
AT_START = 15.0  # the same for an index: someone waits for it
DEADLINE = 600.0  # seconds for a file in all, below the timeout of the ranks
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before the next attempts; the last one repeats
CHUNK = 1 << 20
LOCKS = 64  # lock files of a cache; two files that share one are not downloaded at once
TRANSIENT = (408, 425, 429)  # HTTP status codes, beside those from 500
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
VARIABLE = re.compile(r"\$(\w+)")
_unreachable: set[str] = set()  # hosts that PATIENCE was spent on: one attempt for their other files until one arrives
log = logging.getLogger(__name__)


def is_url(path: str | Path) -> bool:
    return re.match(r"pipe:|[a-zA-Z][\w+.-]*://", str(path)) is not None


def redact(text: object) -> str:
    """A text without the user names, passwords and query values in its URLs, and the arguments of a `pipe:` command.

    Names of variables, such as $TOKEN, stay.
    """

    def hide(secret: str) -> str:
        return secret if VARIABLE.fullmatch(secret) else "***"

    def hide_user(user: re.Match) -> str:
        name, _, password = user[0].partition(":")  # without a password the name is a token
        if "/" in name:  # a path with an @
            return user[0]
        return user[0] if VARIABLE.fullmatch(password or name) else "***:***" if password else "***"

    def hide_query(query: re.Match) -> str:
        pairs = [pair.rpartition("=") for pair in query[2].split("&")]
        return query[1] + "&".join(f"{name}{equals}{hide(value)}" for name, equals, value in pairs)

    text = re.sub(r"\bpipe:\s*([\w./-]*(?![\w./=-]))?.*", r"pipe:\1 ***", str(text), flags=re.DOTALL)
    text = re.sub(r"(?<=://)[^\s'\"]*(?=@)", hide_user, text)
    return re.sub(r"(://[^\s'\"?]*\?)([^\s'\"<>]*)", hide_query, text)


def join(folder: str | Path, name: str) -> str | Path:
    """A folder in a folder, which may be a URL."""
    if not is_url(folder):
        return Path(folder) / name
    if str(folder).startswith("pipe:"):
        return str(folder).replace("{}", f"{name}/{{}}")
    parts = urlsplit(str(folder))
    return parts._replace(path=f"{parts.path.rstrip('/')}/{name}").geturl()


@dataclass(frozen=True)
class Cache:
    """A folder for downloaded shards, best on a disk of the node. The least recently used ones are removed.

    max_gb: limit of its size; while shards are being downloaded it may be exceeded by these
    """

    folder: str = "~/.cache/rediff-lightning/shards"
    max_gb: float = 100.0

    def make(self) -> Path:
        path = Path(self.folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        return path

    def trim(self) -> None:
        """Remove what exceeds the limit, and what downloads left that were killed."""
        folder, total = self.make(), 0.0
        with FileLock(folder / ".trim.lock", timeout=DEADLINE):
            own = "[0-9a-f]" * 32 + "-*"  # the folder may hold other files
            files = [(path, path.stat()) for path in folder.glob(own)]
            for path, stat in sorted(files, key=lambda file: file[1].st_mtime_ns, reverse=True):
                total += stat.st_size / 1e9
                if total > self.max_gb:
                    path.unlink(missing_ok=True)
            for path in folder.glob(f".{own}.tmp"):
                with suppress(FileNotFoundError):
                    if path.stat().st_mtime < time.time() - DEADLINE:
                        path.unlink()


def locate(
    folder: str | Path, name: str, *, cache: Cache | None = None, size: int | None = None, sha256: str | None = None
) -> Path | Remote:
    """A file of a folder. size (bytes), sha256: of the file, if known; a download is checked against them.

    Raises UserError for a URL that holds a password or a signature, and for a command without {}.
    """
    if not is_url(folder):
        return Path(folder) / name
    url = str(folder)
    if not url.startswith("pipe:"):
        if redact(url) != url:
            raise UserError(
                f"{redact(url)} holds a password or a signature, which would be stored with the run: put it into an "
                "environment variable and write its name, as in 'https://user:$PASSWORD@host/data' (quoted)"
            )
        return Remote(str(join(url, name)), name, cache or Cache(), size, sha256)
    if "{}" not in url:
        raise UserError(f"{redact(url)}: the command must hold {{}}, which stands for the name of a file")
    return Remote(url.replace("{}", shlex.quote(name)), name, cache or Cache(), size, sha256)


@dataclass(frozen=True)
class Remote:
    """A file behind a URL or a command. Its methods raise OSError if it is not there or does not arrive."""

    url: str
    name: str
    cache: Cache
    size: int | None = None
    sha256: str | None = None

    def __str__(self) -> str:
        return f"{redact(self.url)} ({self.name})" if self.url.startswith("pipe:") else redact(self.url)

    def read_bytes(self) -> bytes:
        """Its content, always from the server. Raises UserError, as it is read when a command starts."""
        buffer = io.BytesIO()
        try:
            self._download(buffer, patience=AT_START)
        except OSError as error:
            raise UserError(f"{error}; check the URL, and whether you may read it") from None
        return buffer.getvalue()

    def probe(self, *, largest: int) -> None:
        """Raise UserError now if the server refuses the file, or the cache cannot hold one of `largest` bytes."""
        try:
            if largest > self.cache.max_gb * 1e9:
                raise OSError(f"max_gb={self.cache.max_gb} is less than a shard of {largest / 1e9:.3g} GB")
            self.cache.make()
        except OSError as error:
            raise UserError(f"data.cache: {error}") from None
        if not self.url.startswith("pipe:"):
            try:
                with _connect(self.url, 0):
                    pass
            except OSError as error:
                if _is_final(error):
                    raise UserError(f"{self}: {redact(error)}; check whether you may read it") from None

    def open(self, mode: Literal["rb"]) -> BinaryIO:
        """As `Path.open`: the file in the cache, downloaded if it is not there. It may be removed there meanwhile."""
        digest = self.sha256 or hashlib.sha256(self.url.encode()).hexdigest()
        folder = self.cache.make()
        path = folder / f"{digest[:32]}-{Path(self.name).name}"
        if file := self._cached(path):
            return file
        with FileLock(folder / f".{int(digest[:8], 16) % LOCKS:02}.lock", timeout=DEADLINE + PATIENCE):
            if file := self._cached(path):  # by another process meanwhile
                return file
            with atomic(path) as stream:
                self._download(stream, patience=PATIENCE)
            self.cache.trim()
            if file := self._cached(path):
                return file
        raise FileNotFoundError(f"{self} was removed from {folder} at once: raise data.cache.max_gb")

    def _cached(self, path: Path) -> BinaryIO | None:
        with suppress(FileNotFoundError):  # another process may remove it at any time
            file = path.open("rb")
            if self.size in (None, os.fstat(file.fileno()).st_size):
                os.utime(file.fileno())  # was used now
                return file
            file.close()
        return None

    def _download(self, out: BinaryIO, *, patience: float) -> None:
        """Write the file to `out`, with as many attempts as it takes and as time allows."""
        host = "/".join(self.url.split("/")[:3])
        begun = last = time.monotonic()  # `last`: when the last bytes came
        attempts = wrong = 0
        while True:
            size = out.tell()
            try:
                self._attempt(out, begun + DEADLINE)
                _unreachable.discard(host)
                return
            except UserError:
                raise
            except Exception as error:  # noqa: BLE001 - every file system raises its own
                if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT):
                    out.truncate(0)
                    raise UserError(
                        "data.cache: no space is left in its folder; lower max_gb, or choose another"
                    ) from None
                problem, final = redact(error) or type(error).__name__, _is_final(error)
                wrong += isinstance(error, WrongContentError)
            now, pause = time.monotonic(), PAUSES[min(attempts, len(PAUSES) - 1)]
            attempts += 1
            last = now if out.tell() > size else last
            silent = now + pause > last + patience or host in _unreachable
            if silent:
                _unreachable.add(host)
            if final or silent or wrong > 1 or now + pause > begun + DEADLINE:
                raise OSError(f"{self}: {problem}") from None
            log.warning("%s: %s; trying again", self, problem)
            time.sleep(pause)

    def _attempt(self, out: BinaryIO, deadline: float) -> None:
        """Read on from where `out` ends, or from the start if the server cannot do that, and check the whole."""
        with _connect(self.url, out.tell()) as (read, offset, length):
            out.seek(offset)
            out.truncate()
            while data := read(CHUNK):
                out.write(data)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"only {out.tell()} bytes in {DEADLINE:.0f} seconds")
        out.flush()
        size = length if self.size is None else self.size  # the index knows better than the server
        if size is not None and out.tell() < size:
            raise OSError(f"{out.tell()} of {size} bytes arrived")
        if out.tell() != (size or out.tell()) or (self.sha256 and sha256(Path(out.name)) != self.sha256):
            out.seek(0)
            raise WrongContentError("the content is not the one that the index describes")


class WrongContentError(OSError):
    """A whole file, but another one than expected. One more attempt is made, as the error may be one of transfer."""


def _is_final(error: Exception) -> bool:
    if isinstance(error, HTTPError):
        return error.code < 500 and error.code not in TRANSIENT
    return isinstance(error, FileNotFoundError | PermissionError)


@contextmanager
def _connect(url: str, offset: int) -> Iterator[tuple[Callable[[int], bytes], int, int | None]]:
    """(function that reads up to n bytes, offset that it begins at, size of the whole file if the server tells)."""
    if url.startswith("pipe:"):
        pipe: Any = gopen(url)
        try:
            yield partial(_read_pipe, pipe), 0, None
        finally:
            pipe.proc.kill()  # a shell that has ended does not mind
            with suppress(OSError):  # its text holds the command
                pipe.close()
        return
    if unset := [name for name in VARIABLE.findall(url) if name not in os.environ]:
        raise UserError(f"{redact(url)}: the environment variable {unset[0]} is not set")
    expand = partial(VARIABLE.sub, lambda name: os.environ[name[1]])
    if url.startswith(("http://", "https://")):  # plainer than fsspec's, and safe to use in forked workers
        parts = urlsplit(url)
        user, _, host = parts.netloc.rpartition("@")
        request = Request(expand(parts._replace(netloc=host).geturl()))
        if user:
            token = b64encode(expand(unquote(user)).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {token}")
        if offset:
            request.add_header("Range", f"bytes={offset}-")
        with urlopen(request, timeout=STALL) as answer:
            start = offset if answer.status == 206 else 0
            length = answer.headers.get("Content-Length")
            yield answer.read1, start, start + int(length) if length else None
        return
    try:
        from fsspec.core import url_to_fs  # of the extra `data`

        system, path = url_to_fs(expand(url))
    except ImportError as error:
        package = "'rediff-lightning[data]'" if "fsspec" in (error.name or "") else PACKAGES.get(url.split("://")[0])
        command = f": pip install {package}" if package else ""
        raise UserError(f"{redact(url)} needs a package that is not installed ({redact(error)}){command}") from None
    except ValueError as error:
        raise UserError(f"{redact(url)}: {redact(error)}") from None
    with system.open(path, "rb") as file:
        file.seek(offset)
        yield file.read, offset, getattr(file, "size", None)


def _read_pipe(pipe: Any, count: int) -> bytes:
    if not select.select([pipe.stream], [], [], STALL)[0]:
        raise TimeoutError(f"no output for {STALL:.0f} seconds")
    data = os.read(pipe.stream.fileno(), count)
    if not data and (status := pipe.proc.wait()):
        error = FileNotFoundError if status in (126, 127) else OSError  # the shell's numbers for no such command
        raise error(f"the command ended with status {status}")
    return data
