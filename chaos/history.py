"""History: what the producers were told, in an append-only file outside Postgres; and the producers.

Each operation is two lines: that it begins, and how it ended. ok: the commit was acknowledged. fail: it was refused or
rolled back for sure. unknown: the connection broke, so it may have been committed or not. Nothing is tried again.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import psycopg

Conn = psycopg.Connection[Any]


@dataclass
class Operation:
    """One transaction of a producer. rows: ids that it writes, or (id, v). state: begun, ok, fail or unknown."""

    number: int
    table: str
    kind: str
    rows: list[Any]
    state: str = "begun"


class History:
    """The file. Lines are written whole, from any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._numbers = itertools.count(1)
        self.states: dict[str, int] = {}
        self._lock = threading.Lock()

    def begin(self, table: str, kind: str, rows: Iterable[Any]) -> Operation:
        """Notes what is about to be tried."""
        operation = Operation(next(self._numbers), table, kind, list(rows))
        self._write([operation.number, table, kind, operation.rows])
        return operation

    def end(self, operation: Operation, state: str) -> None:
        """Notes how it ended."""
        operation.state = state
        self._write([operation.number, state])
        with self._lock:
            self.states[state] = self.states.get(state, 0) + 1

    def _write(self, line: list[Any]) -> None:
        os.write(self._file, json.dumps(line).encode() + b"\n")

    def close(self) -> None:
        """Nothing more is noted."""
        os.close(self._file)

    def read(self) -> Iterator[Operation]:
        """All operations, from the file."""
        os.fsync(self._file)
        found: dict[int, Operation] = {}
        for line in self.path.read_text().splitlines():
            number, *rest = json.loads(line)
            if len(rest) == 3:
                found[number] = Operation(number, *rest)
            else:
                found[number].state = rest[0]
        return iter(found.values())


def attempt(history: History, operation: Operation, conn: Conn, work: Callable[[Conn], Any]) -> bool:
    """Runs one operation in its transaction and notes how it ended; False when the connection is gone."""
    try:
        with conn.transaction():
            work(conn)
            if operation.kind == "rollback":
                raise psycopg.Rollback
    except psycopg.Rollback:  # comes through when the connection broke at the ROLLBACK
        history.end(operation, "fail")
        return False
    except (psycopg.OperationalError, psycopg.InterfaceError):
        history.end(operation, "unknown")
        return False
    except psycopg.Error:
        history.end(operation, "fail")
        return not conn.closed
    history.end(operation, "fail" if operation.kind == "rollback" else "ok")
    return True


class Producers:
    """Threads that write src and ups at about `rate` operations a second until stop()."""

    def __init__(self, history: History, url: str, seed: int, rate: float = 20, threads: int = 2) -> None:
        self.history, self.url = history, url
        self._keys = itertools.count(1)
        self._pause = threads / rate
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._main, args=(Random(seed * 100 + n),), daemon=True) for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends them; what is under way is finished and noted."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _main(self, random: Random) -> None:
        conn: Conn | None = None
        while not self._stop.wait(random.expovariate(1 / self._pause)):
            if conn is None or conn.closed:
                try:
                    conn = psycopg.connect(self.url, autocommit=True, connect_timeout=5)
                except psycopg.Error:
                    time.sleep(0.05)
                    continue
            if not self._one(conn, random):
                conn.close()
                conn = None
        if conn is not None:
            conn.close()

    def _one(self, conn: Conn, random: Random) -> bool:
        kind = random.choices(("single", "many", "copy", "upsert", "rollback"), (50, 15, 5, 25, 5))[0]
        if kind == "upsert":
            version = next(self._keys)
            rows: list[Any] = [(id, version) for id in random.sample(range(50), random.randint(1, 3))]
            operation = self.history.begin("ups", kind, rows)
            return attempt(
                self.history,
                operation,
                conn,
                lambda conn: conn.execute(
                    "insert into ups (id, v) select * from unnest(%s::bigint[], %s::bigint[]) on conflict (id) "
                    "do update set v = excluded.v",
                    tuple(map(list, zip(*sorted(rows), strict=True))),
                ),
            )
        n = {"single": 1, "many": random.randint(2, 40), "copy": 100, "rollback": random.randint(1, 40)}[kind]
        ids = [next(self._keys) for _ in range(n)]
        operation = self.history.begin("src", kind, ids)
        return attempt(self.history, operation, conn, lambda conn: write(conn, "src", ids, kind))


def write(conn: Conn, table: str, ids: list[int], kind: str) -> None:
    """Inserts these ids, by COPY when that is the kind; one in 20 of src fails its first run."""
    rows = [(id, "flaky" if table == "src" and id % 20 == 0 else kind) for id in ids]
    if kind == "copy":
        with conn.cursor() as cursor, cursor.copy(f"copy {table} (id, kind) from stdin") as copy:
            for row in rows:
                copy.write_row(row)
    else:
        conn.execute(
            f"insert into {table} (id, kind) select * from unnest(%s::bigint[], %s::text[])",
            tuple(map(list, zip(*rows, strict=True))),
        )
