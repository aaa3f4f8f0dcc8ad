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
import logging
import os
import re
import shlex
import subprocess
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import BinaryIO, Literal
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from filelock import FileLock

from src.io.errors import UserError
from src.io.files import atomic, sha256

STALL = 30.0  # seconds without a byte until a connection is given up
PATIENCE = 60.0  # seconds without a byte, over all attempts, until a file is
AT_START = 15.0  # the same for an index: someone waits for it
DEADLINE = 600.0  # seconds for a file in all, below the timeout of the ranks
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before the next attempts; the last one repeats
LOCKS = 64  # lock files of a cache; two files that share one are not downloaded at once
TRANSIENT = (408, 425, 429)  # HTTP status codes, beside those from 500
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
        with tempfile.TemporaryFile() as file:
            try:
                self._download(file, patience=AT_START)
            except OSError as error:
                raise UserError(f"{error}; check the URL, and whether you may read it") from None
            file.seek(0)
            return file.read()

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
                    raise UserError(f"{self}: {_problem(self.url, error)}; check whether you may read it") from None

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
            file = path.open("rb")  # before it can be removed
            self.cache.trim()
            return file

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
        wrong = 0
        for pause in chain(PAUSES, repeat(PAUSES[-1])):
            size = out.tell()
            try:
                self._attempt(out, begun + DEADLINE)
                _unreachable.discard(host)
                return
            except UserError:
                raise
            except Exception as error:  # noqa: BLE001 - every file system raises its own
                if getattr(error, "errno", None) in (ENOSPC, EDQUOT):
                    out.truncate(0)
                    raise UserError("data.cache: no space is left there; lower max_gb, or set another folder") from None
                problem, wrong = _problem(self.url, error), wrong + isinstance(error, WrongContentError)
                final = _is_final(error) or wrong > 1
            now = time.monotonic()
            last = now if out.tell() > size else last
            if now + pause > last + patience:
                _unreachable.add(host)
            if final or host in _unreachable or now + pause > begun + DEADLINE:
                raise OSError(f"{self}: {problem}")
            log.warning("%s: %s; trying again", self, problem)
            time.sleep(pause)

    def _attempt(self, out: BinaryIO, deadline: float) -> None:
        """Read on from where `out` ends, or from the start if the server cannot do that, and check the whole."""
        size = self.size
        if self.url.startswith("pipe:"):
            out.seek(0)
            out.truncate()
            _run(self.url.removeprefix("pipe:"), out)
        else:
            with _connect(self.url, out.tell()) as (read, offset, length):
                out.seek(offset)
                out.truncate()
                while data := read(1 << 20):
                    out.write(data)
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"only {out.tell()} bytes in {DEADLINE:.0f} seconds")
            size = length if size is None else size  # the index knows better than the server
        out.flush()
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


def _problem(url: str, error: Exception) -> str:
    """An error in words. That of a library may hold the URL as it was given: with the values of its variables."""
    told = isinstance(error, HTTPError | WrongContentError) or url.startswith("pipe:") or not VARIABLE.search(url)
    return (redact(error) if told else "") or type(error).__name__


def _run(command: str, out: BinaryIO) -> None:
    """Write what a command prints. Raises OSError if it fails."""
    try:
        status = subprocess.run(command, shell=True, stdout=out, timeout=DEADLINE, check=False).returncode
    except subprocess.TimeoutExpired:  # its text holds the command
        raise TimeoutError(f"the command did not end within {DEADLINE:.0f} seconds") from None
    out.seek(0, os.SEEK_END)
    if status:
        error = FileNotFoundError if status in (126, 127) else OSError  # the shell's numbers for no such command
        raise error(f"the command ended with status {status}")


@contextmanager
def _connect(url: str, offset: int) -> Iterator[tuple[Callable[[int], bytes], int, int | None]]:
    """(function that reads up to n bytes, offset that it begins at, size of the whole file if the server tells)."""
    if unset := [name for name in VARIABLE.findall(url) if name not in os.environ]:
        raise UserError(f"{redact(url)}: the environment variable {unset[0]} is not set")
    expand = partial(VARIABLE.sub, lambda name: os.environ[name[1]])
    if url.startswith(("http://", "https://")):  # plainer than fsspec's, and safe to use in forked workers
        parts = urlsplit(url)
        user, _, host = parts.netloc.rpartition("@")
        address = parts._replace(netloc=host).geturl()
        for name in VARIABLE.findall(address):
            if re.search(r"[^!-~]", os.environ[name]):
                raise UserError(
                    f"{redact(url)}: the environment variable {name} holds blanks or what else no URL holds"
                )
        request = Request(expand(address))
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
    except (ImportError, ValueError) as error:
        hint = "; pip install 'rediff-lightning[data]', and s3fs, gcsfs, ..." if isinstance(error, ImportError) else ""
        raise UserError(f"{redact(url)}: {_problem(url, error)}{hint}") from None
    with system.open(path, "rb") as file:
        file.seek(offset)
        yield file.read, offset, getattr(file, "size", None)
