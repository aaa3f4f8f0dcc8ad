"""Shards behind URLs and commands: a real server that fails in every way, a cache that processes share, no secrets."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.shards import Reader
from datamodules.stream import Stream, read_index
from src.io import remote
from src.io.errors import UserError
from src.io.files import sha256
from src.io.remote import Cache, Remote, locate
from testing.scenes import BASE, write_scenes
from tests.ranks import Ranks
from tests.test_reading import read_all
from tests.test_shards import keys, loader, make

WAITS = {name: getattr(remote, name) for name in ("PAUSES", "STALL", "PATIENCE", "AT_START")}  # seconds, as shipped


class Server(ThreadingHTTPServer):
    """Serves a folder. faults: of a file, one for each request, in turn; then it is served well.

    `503`, `403`: a status; `cut 100`: the connection ends behind as many bytes; `stall 100`: it goes silent;
    `302 URL`: it is elsewhere;
    `short 100`, `long 100`: a Content-Length that is wrong by as many bytes; `other`: another file of that size
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults = folder, dict[str, list[str]]()
        self.requests: list[tuple[str, str | None]] = []  # (name, Range)
        self.authorization: str | None = None  # refuse requests without
        self.authorizations: list[str | None] = []  # of the requests
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        pass  # a client that leaves is what these tests are about


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.split("?")[0].lstrip("/")
        asked = self.headers.get("Range")
        self.server.requests.append((name, asked))
        self.server.authorizations.append(self.headers.get("Authorization"))
        faults = self.server.faults.get(name, [])
        fault, _, number = (faults.pop(0) if faults else "").partition(" ")
        path = self.server.folder / name
        if self.server.authorization not in (None, self.headers.get("Authorization")):
            fault = "401"
        if fault == "302":
            self.send_response(302)
            self.send_header("Location", number)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault.isdigit() or not path.is_file():
            self.send_error(int(fault or 404))
            return
        data = path.read_bytes()
        start = int(asked[len("bytes=") : -1]) if asked else 0
        body = data[::-1] if fault == "other" else data[start:]
        length = len(body) + {"short": -1, "long": 1}.get(fault, 0) * int(number or 0)
        self.send_response(206 if asked and fault != "other" else 200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body[: int(number)] if fault in ("cut", "stall") else body[:length])
        self.wfile.flush()
        if fault == "stall":
            time.sleep(2)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote, "PAUSES", (0.01,))
    monkeypatch.setattr(remote, "STALL", 0.3)
    monkeypatch.setattr(remote, "PATIENCE", 1.0)
    monkeypatch.setattr(remote, "AT_START", 0.5)
    monkeypatch.setattr(remote, "_unreachable", set())
    make(tmp_path / "site" / "train", 30)
    with Server(tmp_path / "site") as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def shard(server: Server, cache: Cache, number: int = 0) -> Remote:
    entry = json.loads((server.folder / "train" / "index.json").read_bytes())["shards"][number]
    place = locate(f"{server.url}/train", entry["name"], cache=cache, size=entry["bytes"], sha256=entry["sha256"])
    assert isinstance(place, Remote)
    return place


def content(place: Remote) -> bytes:
    with place.open("rb") as file:
        return file.read()


def cached(cache: Cache) -> list[Path]:
    """Every file of a cache but its locks."""
    return sorted(p for p in Path(cache.folder).iterdir() if not p.name.endswith(".lock"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_url_gives_the_batches_of_the_folder_and_is_downloaded_once(server, tmp_path, workers) -> None:
    cache = Cache(str(tmp_path / "cache"))
    local = Stream([read_index(server.folder / "train")], seed=1)
    index = read_index(f"{server.url}/train", cache=cache)
    assert (index.count, index.digest) == (30, sha256(server.folder / "train" / "index.json"))
    server.requests.clear()
    distant = loader(Stream([index], seed=1), workers=workers)
    assert keys(distant) == keys(loader(local, workers=workers))
    assert keys(distant) == keys(loader(local, workers=workers))
    assert Counter(name for name, _ in server.requests) == {f"train/train-{n:06}.tar": 1 for n in range(3)}
    assert [p.read_bytes() for p in sorted(cached(cache), key=lambda p: p.name[33:])] == [
        p.read_bytes() for p in sorted((server.folder / "train").glob("*.tar"))
    ]


@pytest.mark.parametrize(
    "faults",
    [
        ["503", "503"],
        ["429", "500"],
        ["cut 0"],
        ["cut 700", "cut 900", "cut 5000"],
        ["stall 1000"],
        ["stall 0", "503", "cut 10"],
        ["short 500"],
        ["long 500"],
        ["other"],
    ],
    ids=" ".join,
)
def test_a_file_arrives_whole_whatever_the_server_does(server, tmp_path, faults) -> None:
    cache, name = Cache(str(tmp_path / "cache")), "train/train-000000.tar"
    server.faults[name] = list(faults)
    assert content(shard(server, cache)) == (server.folder / name).read_bytes()
    assert len(cached(cache)) == 1
    # what has arrived is not asked for again, unless it was wrong
    arrived = [int(fault.split()[1]) for fault in faults if fault.startswith(("cut", "stall"))]
    expected = [f"bytes={sum(arrived[: n + 1])}-" for n in range(len(arrived)) if sum(arrived[: n + 1])]
    if faults[0] not in ("short 500", "long 500"):
        assert sorted({asked for _, asked in server.requests if asked}) == sorted(set(expected))


def test_another_content_is_refused_and_never_in_the_cache(server, tmp_path) -> None:
    cache, name = Cache(str(tmp_path / "cache")), "train/train-000000.tar"
    server.faults[name] = ["other"] * 9
    with pytest.raises(OSError, match="not the one that the index describes"):
        shard(server, cache).open("rb")
    assert len(server.requests) == 2
    assert not [path for path in cached(cache) if not path.name.startswith(".")]
    server.faults.clear()
    assert content(shard(server, cache)) == (server.folder / name).read_bytes()
    # nor is a file of another size taken from it
    (path,) = cached(cache)
    path.write_bytes(path.read_bytes()[:-1])
    assert content(shard(server, cache)) == (server.folder / name).read_bytes()


def test_a_server_that_stays_silent_is_given_up_in_time(server, tmp_path) -> None:
    cache, name = Cache(str(tmp_path / "cache")), "train/train-000000.tar"
    server.faults = {name: ["stall 0"] * 99, "train/train-000001.tar": ["503"] * 99}
    with pytest.raises(OSError, match="timed out"):
        shard(server, cache).open("rb")
    server.requests.clear()
    with pytest.raises(OSError, match="HTTP Error 503"):  # the next file of that server gets one attempt
        shard(server, cache, 1).open("rb")
    assert len(server.requests) == 1
    server.faults.clear()
    assert content(shard(server, cache, 1))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            ("train/index.json", "404"),
            r"^http://127.0.0.1:\d+/train/index.json: HTTP Error 404: Not Found; check the URL",
        ),
        (
            ("train/index.json", "403"),
            r"index.json: HTTP Error 403: Forbidden; check the URL, and whether you may read",
        ),
        (("train/train-000000.tar", "403"), r"train-000000.tar: HTTP Error 403: Forbidden; check whether you may read"),
        (("train/index.json", "cut 30"), r"index.json is damaged"),
    ],
)
def test_what_cannot_be_read_is_one_clear_error_at_the_start(server, tmp_path, fault, message) -> None:
    name, how = fault
    server.faults[name] = [how]
    if how == "cut 30":
        server.faults.clear()
        (server.folder / name).write_text('{"format": 2')
    with pytest.raises(UserError, match=message):
        read_index(f"{server.url}/train", cache=Cache(str(tmp_path / "cache")))
    assert len(server.requests) <= 2


def test_a_shard_that_disappears_from_the_server_is_replaced(server, tmp_path) -> None:
    index = read_index(f"{server.url}/train", cache=Cache(str(tmp_path / "cache")))
    (server.folder / "train" / "train-000001.tar").unlink()
    server.requests.clear()
    reader = Reader(Stream([index], seed=1))
    samples = read_all(reader)
    assert len(samples) == 30
    assert not {s.key for s in samples} & {f"s{n:03}" for n in range(10, 20)}
    assert reader.damage == {(f"{server.url}/train/train-000001.tar", "unreadable"): 10}
    assert [name for name, _ in server.requests].count("train/train-000001.tar") == 1


def test_the_least_recently_used_shards_leave_a_full_cache(server, tmp_path) -> None:
    sizes = [(server.folder / "train" / f"train-{n:06}.tar").stat().st_size for n in range(3)]
    cache = Cache(str(tmp_path / "cache"), max_gb=(sum(sizes) - 1) / 1e9)
    mine = Path(cache.folder) / "not-a-shard.tar"
    mine.parent.mkdir()
    mine.write_bytes(b"x" * sum(sizes))
    held = [shard(server, cache, number).open("rb") for number in (0, 1)]
    time.sleep(0.01)
    content(shard(server, cache, 0))  # used again, so that 1 is the oldest
    content(shard(server, cache, 2))
    assert sorted(path.name[-16:] for path in cached(cache)) == [
        *("not-a-shard.tar", "train-000000.tar", "train-000002.tar"),  # files of others count for nothing
    ]
    assert held[1].read() == (server.folder / "train" / "train-000001.tar").read_bytes()  # still open
    for file in held:
        file.close()
    with pytest.raises(UserError, match=r"data\.cache: max_gb=1e-06 is less than a shard"):
        read_index(f"{server.url}/train", cache=Cache(str(tmp_path / "cache"), max_gb=1e-6))


def read_shards(url: str, folder: Path, first: int, out: Path) -> None:
    """Write the keys of all samples into `out`, from shard `first` on; run in a process of its own."""
    for name, value in WAITS.items():
        setattr(remote, name, value)
    index = read_index(url, cache=Cache(str(folder)))
    reader = Reader(Stream([index], seed=0))
    shards = [*index.shards[first:], *index.shards[:first]]
    out.write_text(" ".join(sorted(reader.read(shard, n).key for shard in shards for n in range(10))))


def start(*arguments: object) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=read_shards, args=arguments)
    process.start()
    return process


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of os.fork
@pytest.mark.dist
def test_processes_share_a_cache_and_a_killed_one_leaves_nothing_that_looks_whole(server, tmp_path) -> None:
    folder, names = tmp_path / "cache", [f"train/train-{n:06}.tar" for n in range(3)]
    everything = " ".join(f"s{n:03}" for n in range(30))
    server.faults = {name: ["cut 600"] for name in names}  # the first one is the probe's
    outs = [tmp_path / f"keys-{number}" for number in range(3)]
    processes = [start(f"{server.url}/train", folder, first, outs[first]) for first in (0, 1)]
    for process in processes:
        process.join()
    assert [out.read_text() for out in outs[:2]] == [everything] * 2
    begun = Counter(name for name, asked in server.requests if name in names and asked is None)
    assert begun[names[1]] == begun[names[2]] == 1  # downloaded by one of them
    # killed in the middle of a download
    shutil.rmtree(folder)
    server.requests.clear()
    server.faults = {name: ["", "stall 600"] if name == names[0] else ["stall 600"] for name in names}
    killed = start(f"{server.url}/train", folder, 0, outs[2])
    while not any(path.stat().st_size for path in folder.glob(".*.tmp")) and killed.is_alive():
        time.sleep(0.01)
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert not list(folder.glob("*.tar"))
    server.faults.clear()
    start(f"{server.url}/train", folder, 0, outs[2]).join()
    assert outs[2].read_text() == everything


# --- training and fsspec ----------


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_train_from_a_server_that_loses_a_shard(server, tmp_path) -> None:
    """Their losses are summed, the run goes on, and a limit ends it on both; the password is nowhere.

    Two servers with different data end it too.
    """
    write_scenes(tmp_path / "site" / "scenes")
    server.authorization = "Basic bWU6aHVudC8yQA=="
    server.faults = {"scenes/train/train-000001.tar": ["404"] * 99}
    url = f"{server.url.replace('://', '://me:$SECRET@')}/scenes"
    run_dir = tmp_path / "run"
    argv = [
        *("conf=stage1,parallel/ddp", f"model.path={BASE}", f"tokenizer={BASE}", f"run_dir={run_dir}"),
        *("data.batch_size=4", "data.workers=1", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.max_steps=6"),
        *("callbacks.samples=null", "callbacks.progress=null", "optim.warmup_steps=1", f"data.path={url}"),
        f"data.cache={{target: src.io.remote.Cache, folder: {tmp_path / 'cache'}, max_gb: 1}}",
    ]
    environment = {"SECRET": "hunt/2@", "no_proxy": "127.0.0.1"}
    with Ranks() as ranks:
        done = ranks.run(argv, out=tmp_path, environment=environment)
        assert done.codes == [0, 0], done.printed
        again = [*argv, "resume=false", "data.max_skipped=3"]
        stopped = ranks.run(again, out=tmp_path / "stopped", environment=environment)
        shutil.copytree(server.folder / "scenes", tmp_path / "0")
        index = json.loads((shutil.copytree(tmp_path / "0", tmp_path / "1") / "train" / "index.json").read_bytes())
        index["shards"].reverse()
        (tmp_path / "1" / "train" / "index.json").write_text(json.dumps(index))
        pipe = [f"data.path=pipe:cat {tmp_path}/$LOCAL_RANK/{{}}", f"run_dir={tmp_path / 'torn'}"]
        torn = ranks.run([*argv, *pipe], out=tmp_path / "torn_out", environment=environment)
    points = EventAccumulator(str(next(run_dir.rglob("events*")).parent)).Reload().Scalars("data/skipped/unreadable")
    assert (points[-1].step, points[-1].value) == (6, 16)
    assert stopped.codes == [2, 2], stopped.printed
    for text in stopped.printed:
        assert re.search(r"allows 3: .*train-000001.tar: \d+ unreadable", text)
    assert torn.codes == [2, 2], torn.printed
    assert all("error: data.path: the processes read different data" in text for text in torn.printed), torn.printed
    everything = "".join([*done.printed, *stopped.printed]).encode()
    everything += b"".join(path.read_bytes() for path in run_dir.rglob("*") if path.is_file())
    assert b"$SECRET" in everything and b"hunt/2" not in everything and b"bWU6aHVudC8yQA" not in everything


# --- fsspec ---------------------------------------------------------------------------------------------------------


def test_file_systems_of_fsspec(server, tmp_path, monkeypatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(server.folder / "train"), "/site/train", recursive=True)
    cache = Cache(str(tmp_path / "cache"))
    stream = Stream([read_index("memory://site/train", cache=cache)], seed=1)
    assert keys(loader(stream)) == keys(loader(Stream([read_index(server.folder / "train")], seed=1)))
    memory.rm("/site/train/train-000000.tar")
    with pytest.raises(UserError, match=r"memory://site/train/train-000000.tar: .*check whether"):
        read_index("memory://site/train", cache=cache)
    with pytest.raises(UserError, match="Protocol not known: nosuch"):
        read_index("nosuch://site/train", cache=cache)
    for name, problem in (("s3fs", "Install s3fs to access S3"), ("fsspec", "import of fsspec")):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
        monkeypatch.setitem(sys.modules, f"{name}.core", None)
        command = r"; pip install 'rediff-lightning\[data\]', and s3fs"
        with pytest.raises(UserError, match=rf"s3://bucket/train/index.json: {problem}.*{command}"):
            read_index("s3://bucket/train", cache=cache)
