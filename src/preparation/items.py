"""The items of a dataset between reading and writing: on disk, so that memory does not grow with their number.

    items = Items(folder / "items.db")
    items.add(item)  items[key]  items.update(item)  items.remove(item)  items.move(name, "val")  items.of("train")
    items.number()                  fixes the order of each split
    items.between("train", 0, 512)  the items of a shard, in any process

An iteration yields what was there when it began, in the order in which it was read; items may be changed, removed and
added meanwhile.
"""

from __future__ import annotations

import errno
import pickle
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from src.preparation.splits import SPLITS, hash64

PAGE = 1000  # items in memory
TABLES = """
    PRAGMA journal_mode = OFF;
    PRAGMA synchronous = OFF;
    CREATE TABLE items (
        id INTEGER PRIMARY KEY, key TEXT UNIQUE NOT NULL, name BLOB NOT NULL, split TEXT NOT NULL, share REAL,
        data BLOB NOT NULL);
    CREATE INDEX by_split ON items (split, id);
    CREATE INDEX by_name ON items (name);
    CREATE TABLE numbers (split TEXT, number INTEGER, id INTEGER, PRIMARY KEY (split, number))
        WITHOUT ROWID;
"""


class Items:
    """Items by key, in an SQLite file.

    path: of a new file, in place of an old one; read_only: for worker processes, once `number` has been called
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        # No locks of SQLite's own, which some network file systems lack: the builder locks the whole dataset.
        mode = "mode=ro&immutable=1" if read_only else "nolock=1"
        if not read_only:
            path.unlink(missing_ok=True)
        # A tokenizer is trained in a thread of its own, which reads texts while this one waits.
        self._db = sqlite3.connect(f"{path.resolve().as_uri()}?{mode}", uri=True, check_same_thread=False)
        if not read_only:
            self._db.executescript(TABLES)

    def close(self) -> None:
        self._db.close()

    def add(self, item: Any) -> bool:
        """Append an item; False, and nothing is done, if there is one of that key."""
        values = item.key, _name(item.name), item.split, item.share, pickle.dumps(item)
        insert = "INSERT OR IGNORE INTO items (key, name, split, share, data) VALUES (?, ?, ?, ?, ?)"
        return self._db.execute(insert, values).rowcount == 1

    def __getitem__(self, key: str) -> Any:
        split, data = self._db.execute("SELECT split, data FROM items WHERE key = ?", (key,)).fetchone()
        return _load(split, data)

    def __len__(self) -> int:
        return self._db.execute("SELECT COUNT(*) FROM items").fetchone()[0]

    def __iter__(self) -> Iterator[Any]:
        return self._iterate("")

    def of(self, split: str) -> Iterator[Any]:
        """The items of a split."""
        return self._iterate("split = ? AND", split)

    def _iterate(self, condition: str, *values: str) -> Iterator[Any]:
        last, end = 0, self._db.execute("SELECT MAX(id) FROM items").fetchone()[0] or 0
        query = f"SELECT id, split, data FROM items WHERE {condition} id > ? AND id <= ? ORDER BY id LIMIT {PAGE}"
        while page := self._db.execute(query, (*values, last, end)).fetchall():
            for _, split, data in page:
                yield _load(split, data)
            last = page[-1][0]

    def update(self, item: Any) -> None:
        """Store an item that was changed; its key and name stay."""
        values = item.split, item.share, pickle.dumps(item), item.key
        self._db.execute("UPDATE items SET split = ?, share = ?, data = ? WHERE key = ?", values)

    def remove(self, item: Any) -> None:
        self._db.execute("DELETE FROM items WHERE key = ?", (item.key,))

    def move(self, name: str, split: str) -> None:
        """Move all items of a name into a split."""
        self._db.execute("UPDATE items SET split = ? WHERE name = ?", (split, _name(name)))

    def unite(self) -> None:
        """One split for the items of a name: a given one, or that of the first. Splits that are given stay."""
        self._db.execute(
            "UPDATE items SET (split, share) = (SELECT split, share FROM items AS first WHERE first.name = items.name "
            "ORDER BY share IS NOT NULL, id LIMIT 1) WHERE share IS NOT NULL AND name IN (SELECT name FROM items "
            "GROUP BY name HAVING COUNT(DISTINCT split) > 1 OR COUNT(share) BETWEEN 1 AND COUNT(*) - 1)"
        )

    def in_several_splits(self) -> Iterator[Any]:
        """The items of each name that has items in several splits, in the order in which they were read."""
        for (key,) in self._db.execute(
            "SELECT key FROM items WHERE name IN (SELECT name FROM items GROUP BY name "
            "HAVING COUNT(DISTINCT split) > 1) ORDER BY id"
        ).fetchall():
            yield self[key]

    def movable(self) -> Iterator[tuple[str, str, str, float]]:
        """(key, name, split, share) of the items whose split is not given."""
        for key, name, *rest in self._db.execute(
            "SELECT key, name, split, share FROM items WHERE share IS NOT NULL ORDER BY id"
        ):
            yield key, name.decode("utf-8", "surrogatepass"), *rest

    def sizes(self) -> dict[str, int]:
        """The number of names in each split that has one."""
        return dict(self._db.execute("SELECT split, COUNT(DISTINCT name) FROM items GROUP BY split"))

    def number(self, seed: int | None) -> dict[str, int]:
        """Fix the order of each split: by a hash of seed and key, or (None) as read. Returns their numbers of items."""
        self._db.create_function("rank", 1, lambda key: 0 if seed is None else hash64(f"{seed}/order/{key}") >> 1)
        self._db.execute(
            "INSERT INTO numbers SELECT split, ROW_NUMBER() OVER (PARTITION BY split ORDER BY rank(key), id) - 1, id "
            "FROM items"
        )
        self._db.commit()
        return dict(self._db.execute("SELECT split, COUNT(*) FROM numbers GROUP BY split"))

    def between(self, split: str, start: int, stop: int) -> list[Any]:
        """The items of a split with numbers from `start` to `stop` (exclusive)."""
        query = "SELECT number, data FROM numbers JOIN items USING (id) WHERE numbers.split = ? AND number >= ? "
        rows = self._db.execute(query + "AND number < ? ORDER BY number", (split, start, stop)).fetchall()
        return [_load(split, data, number) for number, data in rows]


@contextmanager
def new_items(path: Path) -> Iterator[Items]:
    """Items in a new file; a full disk is an OSError that names it."""
    try:
        with closing(Items(path)) as items:
            yield items
    except sqlite3.OperationalError as error:
        raise OSError(errno.ENOSPC, str(error), str(path)) from error


def fill_splits(items: Items, usable: Callable[[Any], bool]) -> None:
    """Move an item into each split without a usable one, from the largest split, in the order of hashes.

    Train comes first; val and test take an item only if its split keeps another usable one. An item whose split is
    given stays.
    """
    is_usable = cache(lambda key: usable(items[key]))
    for split in SPLITS:
        if any(is_usable(item.key) for item in items.of(split)):
            continue
        sizes, sign = items.sizes(), 1 if split == "train" else -1
        for key, name, old, _ in sorted(items.movable(), key=lambda row: (-sizes[row[2]], sign * row[3])):
            others = (other.key for other in items.of(old) if other.name != name)
            if is_usable(key) and (split == "train" or any(map(is_usable, others))):
                items.move(name, split)
                break


def _name(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")  # of a file: it need not be Unicode


def _load(split: str, data: bytes, number: int = 0) -> Any:
    item = pickle.loads(data)
    item.split, item.number = split, number
    return item
