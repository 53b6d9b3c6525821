"""Load: killed, raced and cut off, each row is there once."""

from __future__ import annotations

import gzip
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pyarrow
import pyarrow.parquet
import pytest
from loading import MODELS
from stores import Store, s3_server

from anton.db import Database
from anton.files import Files
from anton.table import Table

ROWS = 5000
BAD = ROWS // 1000


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def store(db: Database, tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("S3_SECRET", "secret")
    return Store(db, tmp_path, endpoint, "disk")


def content(path: str) -> bytes:
    """ROWS rows; of a text file one in 1,000 does not fit."""
    if path.endswith(".parquet"):
        out = io.BytesIO()
        table = pyarrow.table({"id": list(range(ROWS)), "customer": ["x"] * ROWS})
        pyarrow.parquet.write_table(table, out, row_group_size=3000)
        return out.getvalue()
    lines = [f'{n},"customer\n{n}",{"much" if n % 1000 == 7 else n}' for n in range(ROWS)]
    data = ("id,customer,total\n" + "\n".join(lines)).encode()
    return gzip.compress(data) if path.endswith(".gz") else data


def start(store: Store, kind: str, path: str, model: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).parent / "loading.py"), str(store.folder), str(store.db.dsn), kind,
               path, model]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={
        **os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


def reached(conn: psycopg.Connection[Any], more_than: int) -> int:
    """Waits until the load has gone so far; where it is."""
    while True:
        row = conn.execute("select coalesce(max(reached), 0), max(state) from anton.load").fetchone()
        assert row is not None
        if row[0] > more_than or row[1] in ("done", "failed"):
            return int(row[0])


@contextmanager
def stopped(conn: psycopg.Connection[Any]) -> Iterator[int]:
    """The load waits in the middle of its next piece. Yields the pid of its backend."""
    with conn.transaction():
        conn.execute("lock table orders in share mode")
        while True:
            row = conn.execute("select pid from pg_locks where not granted and relation = 'orders'::regclass "
                               "union all select 0 from anton.load where state <> 'loading'").fetchone()
            if row is not None:
                break
        assert row[0], "it was done before it could be stopped"
        yield row[0]


@pytest.mark.parametrize(("kind", "path", "model"), [
    ("disk", "a.csv", "copied"), ("disk", "a.csv.gz", "copied"), ("s3", "a.csv", "checked"),
    ("disk", "a.parquet", "copied")])
def test_a_load_that_is_killed_goes_on_and_each_row_comes_once(store: Store, kind: str, path: str, model: str) -> None:
    store.kind = kind
    store.put(path, content(path))
    store.declare(lambda: (Files(kind), Table("orders", MODELS[model])))
    at = 0
    with psycopg.connect(str(store.db.dsn), autocommit=True) as conn:
        for _ in range(2):
            process = start(store, kind, path, model)
            at = reached(conn, at)
            with stopped(conn):
                os.kill(process.pid, signal.SIGKILL)
                process.communicate()
            assert process.returncode == -signal.SIGKILL
        state = conn.execute("select state, n, rejected from anton.load").fetchone()
        assert state is not None and state[0] == "loading" and 0 < state[1] < ROWS
    out, errors = start(store, kind, path, model).communicate()
    bad = 0 if path.endswith(".parquet") else BAD
    assert out == f"{ROWS - bad} {bad}\n", errors
    assert store.sql("select count(*)::int, count(distinct id)::int, sum(id)::int from orders") == [
        (ROWS - bad, ROWS - bad, sum(n for n in range(ROWS) if not bad or n % 1000 != 7))]
    assert [row[0] for row in store.sql("select row_number::int from anton.load_reject order by 1")] == [
        n + 1 for n in range(ROWS) if bad and n % 1000 == 7]


def test_two_that_load_one_file_share_its_rows(store: Store) -> None:
    store.put("a.csv", content("a.csv"))
    store.declare(lambda: (Files("disk"), Table("orders", MODELS["copied"])))
    processes = [start(store, "disk", "a.csv", model) for model in ("copied", "checked", "copied")]
    assert [process.communicate()[0] for process in processes] == [f"{ROWS - BAD} {BAD}\n"] * 3
    assert store.sql("select count(*)::int from orders") == [(ROWS - BAD,)]


def test_a_load_whose_connection_breaks_goes_on_when_it_is_called_again(store: Store) -> None:
    store.put("a.csv", content("a.csv"))
    store.declare(lambda: (Files("disk"), Table("orders", MODELS["copied"])))
    with psycopg.connect(str(store.db.dsn), autocommit=True) as conn:
        process = start(store, "disk", "a.csv", "copied")
        reached(conn, 0)
        with stopped(conn) as pid:
            conn.execute("select pg_terminate_backend(%s)", [pid])
        assert process.communicate()[1] and process.returncode == 1
    assert start(store, "disk", "a.csv", "copied").communicate()[0] == f"{ROWS - BAD} {BAD}\n"
    assert store.sql("select count(*)::int from orders") == [(ROWS - BAD,)]
