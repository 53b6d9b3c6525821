"""Load: files into Tables, whatever is in them, each row once."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from loading import MODELS, Order
from obstore.store import S3Store
from pydantic import BaseModel
from stores import Store, s3_server

from anton import load
from anton.db import Database
from anton.errors import BadOption, LoadFailed, WriteError
from anton.files import File, Files
from anton.table import Table
from anton.write import transaction


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def store(request: pytest.FixtureRequest, db: Database, tmp_path: Path, endpoint: str,
          monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("S3_SECRET", "secret")
    return Store(db, tmp_path, endpoint, getattr(request, "param", "disk"))


def loaded(store: Store, path: str, data: bytes | str, model: type[BaseModel] | None = Order,
           **how: Any) -> tuple[load.Loaded, list[tuple[Any, ...]]]:
    """The file put there and loaded into a new table; what came of it, and the table's rows."""
    store.put(path, data)
    files, orders = store.declare(lambda: (Files(store.kind), Table("orders", model) if model else Table("orders")))
    done = store.db.run(files.find(path)).load(orders, **how)
    return done, rows(store)


def rows(store: Store) -> list[tuple[Any, ...]]:
    return store.sql("select * from orders order by id")


def rejects(store: Store) -> list[tuple[Any, ...]]:
    return store.sql("select row_number, data, error from anton.load_reject order by load_id, row_number")


@pytest.mark.parametrize("store", ["disk", "s3"], indirect=True)
@pytest.mark.parametrize("model", MODELS)
def test_a_csv_becomes_records(store: Store, model: str) -> None:
    text = ("\N{ZERO WIDTH NO-BREAK SPACE}customer,id,total,at\r\n"
            'Ann,1,2.50,2026-01-02T03:04:05\r\n\r\n"Ö ""X"",\r\nY",2,,\r\n,3,1e3,2026-01-02 03:04:05+02')
    done, found = loaded(store, "a.csv", text, MODELS[model])
    assert done == load.Loaded(3, 0)
    assert found == [(1, "Ann", Decimal("2.50"), "new", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
                     (2, 'Ö "X",\r\nY', None, "new", None),
                     (3, "", Decimal(1000), "new", datetime(2026, 1, 2, 1, 4, 5, tzinfo=UTC))]
    assert rejects(store) == []


@pytest.mark.parametrize("model", MODELS)
def test_rows_that_do_not_fit_are_kept_and_the_rest_goes_in(store: Store, model: str) -> None:
    lines = ["id,customer,total,status"] + [f"{n},c{n},{n},new" for n in range(1, 101)]
    lines[10] = "10,c,much,new"
    lines[20] = '20,"c\nd",1,lost'
    lines[30] = "30,too,few"
    lines[40] = '40,"\udcff",1,new'
    lines[50] = "7,again,1,new"                                        # a key that is there
    lines[60] = '60,"a"b,1,new,"x"'
    done, found = loaded(store, "a.csv", "\n".join(lines).encode("utf-8", "surrogateescape"), MODELS[model])
    assert (done.rows, done.rejected) == (94, 6)
    assert [row[0] for row in found] == [n for n in range(1, 101) if n not in (10, 20, 30, 40, 50, 60)]
    kept = rejects(store)
    assert [row[0] for row in kept] == [10, 20, 30, 40, 50, 60]
    assert kept[0][1] == "10,c,much,new" and "total" in kept[0][2]
    assert kept[1][1] == '20,"c\nd",1,lost'
    assert store.sql("select kind, problem from anton.findings() where kind = 'load'") == [
        ("load", "6 of its rows did not fit public.orders")]


def test_without_a_model_a_row_is_a_document(store: Store) -> None:
    assert loaded(store, "a.csv", "who,n\nAnn,1\nBob,\n", None)[0].rows == 2
    assert [row for row, in store.sql("select data from orders order by id")] == [
        {"who": "Ann", "n": "1"}, {"who": "Bob", "n": None}]


def test_a_table_that_was_there_gets_what_postgres_reads(store: Store) -> None:
    store.sql("create table orders (id int primary key, tags text[], day date not null default '2026-01-01', "
              "note text not null)")
    done, found = loaded(store, "a.csv", 'id;tags;note\n1;"{a,b}";\n2;;x\n', None, delimiter=";")
    assert done.rows == 2 and [row[:2] + row[3:] for row in found] == [(1, ["a", "b"], ""), (2, None, "x")]


@pytest.mark.parametrize("store", ["disk", "s3"], indirect=True)
def test_json_lines_become_records(store: Store) -> None:
    text = "\n".join([json.dumps({"id": 1, "customer": "Ann", "total": "1.5"}), "", "[1]", '{"id": 2, "custom": 1}',
                      "{", json.dumps({"id": 3, "customer": "Öl\n", "at": "2026-01-02T03:04:05Z"})])
    done, found = loaded(store, "a.jsonl", text)
    assert (done.rows, done.rejected) == (2, 3)
    assert [row[:2] for row in found] == [(1, "Ann"), (3, "Öl\n")]
    assert [row[0] for row in rejects(store)] == [2, 3, 4]
    assert 'no column "custom". Did you mean "customer"?' in rejects(store)[1][2]


def parquet(n: int, group: int = 1000) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({
        "id": list(range(n)), "who": [f"c{i}" for i in range(n)], "total": [Decimal(i) for i in range(n)]}), out,
        row_group_size=group)
    return out.getvalue()


@pytest.mark.parametrize("store", ["disk", "s3"], indirect=True)
def test_parquet_becomes_records(store: Store) -> None:
    done, found = loaded(store, "a.parquet", parquet(25), map={"customer": "who"})
    assert done == load.Loaded(25, 0)
    assert found[7][:3] == (7, "c7", Decimal(7))


def test_gzip_is_unpacked(store: Store) -> None:
    assert loaded(store, "a.csv.gz", gzip.compress(b"id,customer\n1,Ann\n") + gzip.compress(b"2,Bob\n"))[0].rows == 2


def test_an_upsert_replaces_what_is_there(store: Store) -> None:
    loaded(store, "a.csv", "id,customer,total\n1,Ann,1\n2,Bob,2\n")
    done, found = loaded(store, "b.csv", "id,customer,total\n2,Bo,9\n3,Cy,3\n2,B,8\n", upsert=True)
    assert done.rows == 3
    assert [row[:3] for row in found] == [(1, "Ann", 1), (2, "B", 8), (3, "Cy", 3)]


def test_a_quote_that_never_closes_hides_no_rows(store: Store) -> None:
    with pytest.raises(LoadFailed, match='the quote that row 2 opens, from byte 18 on, never closes. It begins: 2,'):
        loaded(store, "a.csv", 'id,customer\n1,Ann\n2,"Bob\n3,Cy\n')
    assert [row[0] for row in rows(store)] == [1]


@pytest.mark.parametrize(("data", "how", "reason"), [
    ("id,custom\n", {}, 'it has a column "custom", and the table has none. Did you mean "customer"?'),
    ("id\n", {}, "it has no column for customer, which may not be null and has no default. It has: id"),
    ("id,id,customer\n", {}, "it has more than one column for id"),
    ("id,customer\n", {"map": {"total": "sum"}}, 'map= or skip= names "sum", which the file has not'),
    ("\n1,Ann\n", {}, "it has no header: its first line is empty"),
    ("\ufeffid,customer\n".encode("utf-16"), {}, "it is UTF-16"),
    ("id,customer\n1,A,\n2,B,\n", {"rejects": 1}, "more than 1 rows do not fit. Row 1: "),
    ("id,customer\n1,A,\n", {"rejects": 0}, "a row does not fit. Row 1: "),
])
def test_a_file_that_cannot_be_loaded_says_why(store: Store, data: str | bytes, how: dict[str, Any],
                                               reason: str) -> None:
    with pytest.raises(LoadFailed) as raised:
        loaded(store, "a.csv", data, **how)
    assert reason in str(raised.value) and '"a.csv" cannot be loaded into table "orders"' in str(raised.value)
    assert rows(store) == [] and store.sql("select state from anton.load") == [("failed",)]


@pytest.mark.parametrize(("option", "value"), [
    ("format", "xls"), ("delimiter", ";;"), ("delimiter", '"'), ("encoding", "utf-16"), ("encoding", "nope"),
    ("skip", "id"), ("columns", "id"), ("rejects", -1)])
def test_an_option_that_cannot_be_is_refused(store: Store, option: str, value: object) -> None:
    with pytest.raises(BadOption, match=option):
        loaded(store, "a.csv", "id,customer\n1,A\n", **{option: value})


def test_names_can_be_mapped_left_out_or_given(store: Store) -> None:
    done, found = loaded(store, "a.csv", "Nr;Kunde;Notiz\n1;Jörg;x\n".encode("cp1252"), delimiter=";",
                         encoding="cp1252", map={"id": "Nr", "customer": "Kunde"}, skip=["Notiz"])
    assert [row[:2] for row in found] == [(1, "Jörg")]
    done, found = loaded(store, "b.txt", "2,Ann\n", format="csv", columns=["id", "customer"])
    assert [row[:2] for row in found] == [(1, "Jörg"), (2, "Ann")]


@pytest.mark.parametrize("model", MODELS)
def test_a_line_that_ends_copy_is_a_row_like_others(store: Store, model: str) -> None:
    done, found = loaded(store, "a.csv", 'customer,id\nAnn,1\n"x\n\\.\ny",2\nt\tb\\n,3\n', MODELS[model])
    assert done == load.Loaded(3, 0) and [row[1] for row in found] == ["Ann", "x\n\\.\ny", "t\tb\\n"]


@pytest.mark.parametrize("model", MODELS)
def test_a_foreign_key_is_found_with_its_row(store: Store, model: str) -> None:
    store.sql("create table customer (name text primary key)", "insert into customer values ('Ann')")
    store.declare(lambda: Table("orders", MODELS[model]))
    store.sql("alter table orders add foreign key (customer) references customer deferrable initially deferred")
    done, found = loaded(store, "a.csv", "id,customer\n1,Ann\n2,Ann\n3,Bo\n4,Ann\n5,Cy\n", MODELS[model])
    assert [row[0] for row in found] == [1, 2, 4] and [row[0] for row in rejects(store)] == [3, 5]


def test_a_file_is_loaded_once_and_a_changed_one_again(store: Store) -> None:
    files, orders = store.declare(lambda: (Files(store.kind), Table("orders", Order)))
    store.put("a.csv", "id,customer\n1,Ann\n")
    first: File = store.db.run(files.find("a.csv"))
    assert first.load(orders) == first.load(orders) == load.Loaded(1, 0)
    store.put("a.csv", "id,customer\n1,Ann\n2,Bob\n")
    assert store.db.run(files.find("a.csv")).load(orders) == load.Loaded(1, 1)        # 1 is there
    assert store.db.run(files.find("a.csv")).load(orders, upsert=True) == load.Loaded(1, 1)


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_file_that_is_touched_is_not_loaded_again_and_one_that_is_put_back_is(store: Store) -> None:
    files, orders = store.declare(lambda: (Files(store.kind), Table("orders", Order)))

    def put(customer: str) -> File:
        store.put("a.csv", f"id,customer,total\n1,{customer},1\n2,Bob,much\n")
        found: File = store.db.run(files.find("a.csv"))
        return found

    first = put("Ann")
    assert first.load(orders, upsert=True) == load.Loaded(1, 1)
    store.sql("update orders set customer = 'by hand'")
    touched = first.model_copy(update={"modified": first.modified + timedelta(days=1)})
    assert touched.etag and touched.load(orders, upsert=True) == load.Loaded(1, 1)
    assert rows(store)[0][1] == "by hand"
    assert put("Anna").load(orders, upsert=True) == load.Loaded(1, 1) and rows(store)[0][1] == "Anna"
    assert put("Ann").load(orders, upsert=True) == load.Loaded(1, 1) and rows(store)[0][1] == "Ann"
    assert put("Ann").load(orders, upsert=True) == load.Loaded(1, 1) and len(rejects(store)) == 3
    assert store.sql("select n::int, state from anton.load order by id") == [(1, "done")] * 3


def test_who_is_at_a_version_that_was_begun_anew_goes_on_with_the_new_load(store: Store) -> None:
    files, orders = store.declare(lambda: (Files(store.kind), Table("orders", Order)))
    store.put("a.csv", "id,customer\n1,Ann\n2,Bob\n")
    first: File = store.db.run(files.find("a.csv"))
    begin = "select id::int, reached::int from anton.begin_load('store', 'disk', 'a.csv', '{}', 'public.orders')"
    (old,) = store.sql(begin.format(first.etag))
    store.sql(begin.format("other"))
    assert first.load(orders) == load.Loaded(2, 0)
    assert store.sql(f"select anton.lock_load({old[0]}, {old[1]})") == [(False,)]
    assert store.sql("select n::int, state from anton.load order by id") == [
        (0, "changed"), (0, "loading"), (2, "done")]


@pytest.mark.parametrize("store", ["disk", "s3"], indirect=True)
def test_a_file_that_was_replaced_or_is_gone_is_left_to_its_next_version(store: Store) -> None:
    files, orders = store.declare(lambda: (Files(store.kind), Table("orders", Order)))
    store.put("a.csv", "id,customer\n1,Ann\n")
    first: File = store.db.run(files.find("a.csv"))
    store.put("a.csv", "id,customer\n1,Ann\n2,Bob\n")
    assert first.load(orders) == load.Loaded(0, 0, changed=True)
    store.drop("a.csv")
    assert first.load(orders) == load.Loaded(0, 0, changed=True)
    assert rows(store) == []


def test_a_load_is_part_of_no_transaction(store: Store) -> None:
    store.put("a.csv", "id,customer\n1,Ann\n")
    files, orders = store.declare(lambda: (Files(store.kind), Table("orders", Order)))
    first: File = store.db.run(files.find("a.csv"))
    with pytest.raises(WriteError, match="piece by piece"), transaction():
        first.load(orders)


@pytest.mark.parametrize("store", ["disk", "s3"], indirect=True)
def test_new_and_changed_files_are_loaded_by_a_handler(store: Store) -> None:
    def declare() -> Files:
        files, orders = Files(store.kind, "in/*.csv", settle=0), Table("orders", Order)
        files.load(into=orders, upsert=True)
        return files

    files = store.declare(declare)
    store.put("in/a.csv", "id,customer\n1,Ann\n")
    files.scan()
    store.work()
    store.put("in/a.csv", "id,customer\n1,Anna\n2,Bob\n")
    files.scan()
    store.work()
    assert [row[:2] for row in rows(store)] == [(1, "Anna"), (2, "Bob")]
    assert store.sql("select count(*)::int from anton.dead") == [(0,)]


def test_a_load_that_fails_is_a_dead_letter_and_goes_on_when_it_is_replayed(store: Store) -> None:
    def declare() -> Files:
        files, orders = Files(store.kind, settle=0), Table("orders", Order)
        files.load(into=orders, attempts=1, rejects=0)
        return files

    files = store.declare(declare)
    store.sql("insert into orders values (2, 'in the way')")
    store.put("a.csv", "id,customer\n1,Ann\n2,Bob\n")
    files.scan()
    store.work()
    assert [row[0].partition(":")[0] for row in store.sql("select error from anton.dead")] == ["LoadFailed"]
    assert "up to row 0: a row does not fit. Row 2: duplicate key" in store.sql(
        "select problem from anton.findings() where kind = 'load'")[0][0]
    store.sql("delete from orders", "select anton.replay('load_orders')")
    store.work()
    assert [row[:2] for row in rows(store)] == [(1, "Ann"), (2, "Bob")]
    assert store.sql("select state from anton.load") == [("done",)] and store.sql("select from anton.dead") == []


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_storage_that_is_away_blames_no_file(store: Store) -> None:
    def declare() -> Files:
        files, orders = Files(store.kind, settle=0), Table("orders", Order)
        files.load(into=orders)
        return files

    files = store.declare(declare)
    store.put("a.csv", "id,customer\n1,Ann\n")
    files.scan()
    there = files.storage().store
    object.__setattr__(files.storage(), "store", S3Store(
        "bucket", endpoint="http://127.0.0.1:9", client_options={"allow_http": True}, access_key_id="key",
        secret_access_key="secret", region="us-east-1", retry_config={"max_retries": 0}))
    store.work()
    assert "StorageError" in store.sql("select failing_error from anton.handler where name = 'load_orders'")[0][0]
    object.__setattr__(files.storage(), "store", there)
    store.sql("update anton.handler set probe_at = anton.now() where probe_at is not null")
    store.work()
    assert [row[:2] for row in rows(store)] == [(1, "Ann")] and store.sql("select from anton.dead") == []
