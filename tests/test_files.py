"""Files: a storage as a Table, on a disk and on a real S3 protocol server."""

from __future__ import annotations

import asyncio
import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stores import Store, client, s3_server

from anton import Records
from anton.action import effects, set_effects
from anton.app import App, declaring
from anton.db import Database
from anton.errors import BadOption, ConfigError, DuplicateName, FileChanged, FileGone, NoScope, StorageError, SyncInLoop
from anton.files import File, Files, _Scan
from anton.table import Table
from anton.write import transaction

pytestmark = pytest.mark.once("wires: the server is asked for the same")


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


def test_a_file_is_read_as_the_version_that_was_seen(store: Store) -> None:
    files = store.declare(lambda: Files(store.kind))
    store.put("a/b.txt", "one")
    file: File = store.db.run(files.find("a/b.txt"))
    assert (file.path, file.name, file.size, file.read()) == ("a/b.txt", "b.txt", 3, b"one")
    assert asyncio.run(file.aread()) == b"one"
    with file.open() as opened:
        assert opened.seek(-2, io.SEEK_END) == 1 and opened.read() == b"ne"
    store.put("a/b.txt", "other")
    for read in (file.read, lambda: file.open().read()):
        with pytest.raises(FileChanged, match='file "a/b.txt" in storage'):
            read()
    store.drop("a/b.txt")
    with pytest.raises(FileGone, match='no file "a/b.txt"'):
        file.read()
    store.put("empty", "")
    assert store.db.run(files.find("empty")).read() == b""


def test_files_are_written_and_deleted_from_handlers(store: Store) -> None:
    def declare() -> Files:
        files, orders = Files(store.kind, settle=0), Table("orders")

        @orders.on_new_records
        def write(records: Records) -> None:
            files.write("out/sync.txt", "ü")
            files.delete("old.txt")

        @orders.on_new_records
        async def awrite(records: Records) -> None:
            await files.awrite("out/async.txt", b"bytes")
            await files.adelete("gone.txt")

        return files

    files = store.declare(declare)
    store.put("old.txt", "")
    store.sql("insert into orders default values")
    store.work()
    assert files.scan() == 2
    assert store.sql("select path, size::int from " + files.name + " order by path") == [
        ("out/async.txt", 5), ("out/sync.txt", 2)]
    path = store.folder / "local.bin"
    path.write_bytes(b"x" * 10)
    files.write("big", path)
    with path.open("rb") as opened:
        files.write("open", opened)
    assert store.db.run(files.find("big")).read() == store.db.run(files.find("open")).read() == b"x" * 10


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "a//b", "", ".", "a/./b", "a\\b", "a\0b", "a\nb",
                                  7])
def test_a_path_that_leaves_the_storage_is_refused(store: Store, path: Any) -> None:
    files = store.declare(lambda: Files(store.kind))
    for use in (lambda: files.write(path, b""), lambda: files.delete(path), lambda: store.db.run(files.find(path))):
        with pytest.raises(BadOption, match="a path inside of it"):
            use()


@pytest.mark.parametrize("store", ["disk"], indirect=True)
def test_links_that_lead_out_of_a_folder_are_neither_listed_nor_followed(store: Store, tmp_path: Path) -> None:
    files = store.declare(lambda: Files("disk", settle=0))
    store.put("real/a.txt", "a")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("key")
    (tmp_path / "data" / "file").symlink_to(tmp_path / "secret" / "key")
    (tmp_path / "data" / "folder").symlink_to(tmp_path / "secret")
    (tmp_path / "data" / "within").symlink_to(tmp_path / "data" / "real")
    files.scan()
    assert [row[0] for row in store.sql(f"select path from {files.name} order by 1")] == ["real/a.txt", "within/a.txt"]
    for path in ("file", "folder/key"):
        with pytest.raises(BadOption):
            store.db.run(files.find(path))
        with pytest.raises(BadOption):
            files.write(path, "x")
    assert (tmp_path / "secret" / "key").read_text() == "key"


@pytest.mark.parametrize("store", ["disk"], indirect=True)
def test_odd_names_and_links_that_lead_round_stop_no_scan(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    files = store.declare(lambda: Files("disk", settle=0, name="f"))
    odd = ["per%cent", "%zz", "a#b", "q?", "*", "a[b]", 'a"b', "a|b", "ü", " ", "~"]
    for name in odd:
        store.put(f"fine/{name}", name)
    data = store.folder / "data"
    for bad in (b"bad\xff.csv", b"tab\t", b"new\nline", b"back\\slash"):
        Path(os.fsdecode(os.fsencode(data) + b"/" + bad)).write_text("x")
    folder = Path(os.fsdecode(os.fsencode(data) + b"/folder\xfe"))
    folder.mkdir()
    (folder / "a").write_text("x")
    os.mkfifo(data / "pipe")
    (data / "self").symlink_to("self")
    (data / "nowhere").symlink_to("/no/such")
    (data / "fine" / "up").symlink_to(data)
    assert files.scan() == files.scan() == len(odd)
    assert sorted(row[0] for row in store.sql("select path from f")) == sorted(f"fine/{name}" for name in odd)
    assert all(store.db.run(files.find(f"fine/{name}")).read() == name.encode() for name in odd)
    said = [record.getMessage() for record in caplog.records if record.name == "anton.storage"]
    assert len(said) == 5 and all("is left out" in one for one in said)


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_the_mark_of_a_folder_in_s3_is_no_file(store: Store) -> None:
    files = store.declare(lambda: Files("s3", settle=0, name="f"))
    client(store.endpoint).put_object(Bucket="bucket", Key=f"{store.folder.name}/in/sub/", Body=b"")
    client(store.endpoint).put_object(Bucket="bucket", Key=f"{store.folder.name}/in/back\\slash", Body=b"")
    store.put("in/empty", b"")
    assert files.scan() == 1
    assert store.sql("select path from f") == [("in/empty",)]


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_key_that_no_path_is_stops_a_scan_of_s3_and_is_named(store: Store) -> None:
    files = store.declare(lambda: Files("s3", settle=0, name="f"))
    store.put("a", "a")
    assert files.scan() == 1
    client(store.endpoint).put_object(Bucket="bucket", Key=f"{store.folder.name}/in//b", Body=b"")
    with pytest.raises(StorageError, match=f"cannot list.*{store.folder.name}/in//b"):
        files.scan()
    assert store.sql("select path from f") == [("a",)]


@pytest.mark.parametrize("store", ["disk"], indirect=True)
def test_a_file_that_may_still_be_written_waits_for_the_next_scan(store: Store) -> None:
    files = store.declare(lambda: Files("disk", name="f"))
    store.put("a", "half")
    store.put("old", "whole")
    os.utime(store.folder / "data" / "old", (1, 1))
    assert files.scan() == 2
    assert store.sql("select path from f") == [("old",)]
    os.utime(store.folder / "data" / "a", (1, 1))
    files.scan()
    assert store.sql("select count(*)::int from f") == [(2,)]
    store.put("a", "grows")                                            # known, and being written: it stays as it was
    files.scan()
    assert store.sql("select size::int from f where path = 'a'") == [(4,)]


def test_a_scan_that_cannot_list_changes_nothing_and_its_schedule_waits(store: Store) -> None:
    files = store.declare(lambda: Files(store.kind, settle=0, name="f"))
    store.put("a", "a")
    files.scan()
    if store.kind == "disk":
        (store.folder / "data").rename(store.folder / "away")
    else:
        client(store.endpoint).create_bucket(Bucket="other")
        object.__setattr__(files.storage(), "store", type(files.storage().store)(
            "nobucket", endpoint=store.endpoint, client_options={"allow_http": True}, region="us-east-1",
            access_key_id="key", secret_access_key="secret"))
    with pytest.raises(StorageError, match="cannot list"):
        files.scan()
    assert store.sql("select path from f") == [("a",)]
    store.sql("select anton.run_schedule('scan_f')")
    store.work()
    assert store.sql("select state from anton.status where handler = 'scan_f'") == [("failing",)]
    assert store.sql("select count(*)::int from anton.dead") == [(0,)]


def test_a_scan_that_was_thought_dead_changes_nothing_any_more(store: Store) -> None:
    files = store.declare(lambda: Files(store.kind, settle=0, name="f"))
    store.put("a", "a")

    async def overtaken() -> None:
        slow = _Scan(store.db, files, "public.f")
        slow.token = await slow._call("begin_scan", slow.table)
        assert await files.ascan() == 0                                # one at a time
        async with store.db.conn() as conn:
            await conn.execute("update anton.file_scan set busy_until = anton.now() - interval '1 s'")
        assert await files.ascan() == 1                                # it is taken for dead
        for late in (slow._sweep(set()), slow._alive()):
            with pytest.raises(Exception, match="another scan of public.f has begun"):
                await late

    store.db.run(overtaken())
    assert store.sql("select path from f") == [("a",)]


def test_scans_at_once_bring_each_file_once(store: Store) -> None:
    files = seen(store)
    for n in range(30):
        store.put(f"incoming/{n}.csv", "x")
    threads = [threading.Thread(target=files.scan) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files.scan()
    store.work()
    assert len(log(store)) == 30 and {row[2] for row in log(store)} == {"new"}


def test_elsewhere_is_captured_unless_live_and_never_reached_from_tests(store: Store,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    def declare() -> Files:
        files, orders = Files(store.kind, name="f"), Table("orders")

        @orders.on_new_records
        def write(records: Records) -> None:
            files.write("a.txt", "12345")

        return files

    files = store.declare(declare)
    object.__setattr__(files.storage(), "local", False)                # as if it were on another machine
    store.sql("insert into orders default values")
    store.work()
    assert store.sql("select name, args, state from anton.action") == [
        ("files.write", {"storage": store.kind, "path": "a.txt", "size": 5}, "captured")]
    assert files.scan() == 0
    with pytest.raises(NoScope, match="would be captured"):
        files.write("a.txt", "1")
    with transaction():
        files.delete("a.txt")
    assert store.sql("select name from anton.action order by id desc limit 1") == [("files.delete",)]
    before = effects()
    try:
        set_effects("offline")
        with pytest.raises(StorageError, match="this process stays on this machine"):
            files.scan()
        set_effects("live")
        files.write("a.txt", "12345")
    finally:
        set_effects(before)
    assert files.scan() == 1


async def test_in_a_loop_the_twin_is_named(db: Database, tmp_path: Path) -> None:
    with declaring(App("x", tmp_path)):
        files = Files("disk")
    with pytest.raises(SyncInLoop, match="await files.ascan()"):
        files.scan()


@pytest.mark.parametrize(("given", "reason"), [
    ({"storage": ""}, "the name of a storage"), ({"pattern": "/a"}, "a pattern of paths"),
    ({"pattern": "../*"}, "a pattern of paths"), ({"pattern": ""}, "a pattern of paths"),
    ({"every": "soon"}, "every='soon'"), ({"every": 0}, "at least 1 s"), ({"settle": "-1"}, "settle='-1'")])
def test_a_declaration_that_cannot_be_is_refused(given: dict[str, Any], reason: str) -> None:
    with declaring(App("x")), pytest.raises(BadOption, match=reason):
        Files(**{"storage": "s3-fs", "pattern": "*", **given})


def test_two_of_one_pattern_need_names() -> None:
    with declaring(App("x")):
        assert Files("s3-fs", "in/*.csv").name == "s3_fs_in_csv"
        with pytest.raises(DuplicateName):
            Files("s3-fs", "in/*.csv")
        assert Files("s3-fs", "in/*.csv", name="other").name == "other"


def test_a_storage_that_is_not_configured_is_named(store: Store) -> None:
    files = store.declare(lambda: Files("dsk"))
    with pytest.raises(ConfigError, match=r'no storage "dsk" of type "files" in autonomous.json. Did you mean "disk"'):
        files.scan()


@pytest.mark.parametrize(("pattern", "fitting", "others"), [
    ("*.csv", ["a.csv", ".csv"], ["a/b.csv", "a.csvx"]), ("in/?.csv", ["in/a.csv"], ["in/ab.csv", "in//.csv"]),
    ("**/*.csv", ["a.csv", "x/y/a.csv"], ["a.txt"]), ("in/**", ["in/a", "in/b/c"], ["on/a"]),
    ("a[1].csv", ["a[1].csv"], ["a1.csv"])])
def test_a_pattern_fits_what_it_says(pattern: str, fitting: list[str], others: list[str]) -> None:
    with declaring(App("x")):
        matches = Files("s3-fs", pattern)._matches
    assert all(matches(path) for path in fitting) and not any(matches(path) for path in others)
