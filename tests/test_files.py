"""Files: a storage as a Table, on a disk and on a real S3 protocol server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stores import Store, s3_server

from anton import Records
from anton.db import Database
from anton.files import File, Files
from anton.table import Table


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, db: Database, tmp_path: Path, endpoint: str,
          monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("S3_SECRET", "secret")
    return Store(db, tmp_path, endpoint, request.param)


def seen(store: Store) -> Any:
    """Files and what its events wrote."""
    def declare() -> Files:
        files, log = Files(store.kind, "incoming/*.csv", settle=0, name="incoming"), Table("log")

        @files.on_changes
        def note(records: Records[File]) -> None:
            for change in records.changes:
                file = change.new or change.old
                assert file is not None
                log.append({"path": file.path, "size": file.size, "op": change.op}, of=records)

        return files

    return store.declare(declare)


def log(store: Store) -> list[tuple[Any, ...]]:
    return store.sql("select data ->> 'path', (data ->> 'size')::int, data ->> 'op' from log order by id")


def test_new_changed_and_vanished_files_fire_events(store: Store) -> None:
    files = seen(store)
    store.put("incoming/a.csv", "a\n1\n")
    store.put("incoming/sub/b.csv", "not of the pattern")
    store.put("other/c.csv", "nor this")
    assert files.scan() == 1
    store.work()
    assert log(store) == [("incoming/a.csv", 4, "new")]
    assert files.scan() == 1                                           # nothing new: no event
    store.put("incoming/a.csv", "a\n1\n2\n")
    store.put("incoming/ü b.csv", "x")
    assert files.scan() == 2
    store.work()
    assert sorted(log(store)[1:]) == [("incoming/a.csv", 6, "updated"), ("incoming/ü b.csv", 1, "new")]
    store.drop("incoming/a.csv")
    assert files.scan() == 1
    store.work()
    assert log(store)[3:] == [("incoming/a.csv", 6, "deleted")]
    assert store.sql("select path from incoming") == [("incoming/ü b.csv",)]
