"""Rights: what a worker may not do, or does not find, makes its handler wait and say why; no record is blamed."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import pytest
from working import Bench

from anton import Records, Table, sql
from anton.db import Database, set_database
from anton.rights import rights_of


@pytest.fixture
def role(db: Database, server: Any) -> Iterator[Database]:
    """The database as a role that may run the worker, and read and write what is granted to it."""
    name = f"worker_{db.name}"
    server.sql(f"create role {name} login in role anton_owner")
    url = urlsplit(str(db.dsn))
    limited = Database(url._replace(netloc=f"{name}@{url.netloc.rpartition('@')[2]}").geturl(), source="the test")
    set_database(limited)
    yield limited
    limited.run(limited.close())
    server.sql(f"drop owned by {name}", database=db.name)
    server.sql(f"drop role {name}")


async def run(bench: Bench, *statements: str) -> None:
    for statement in statements:
        await bench.sql(statement)


async def failing(bench: Bench) -> Any:
    """Works what is due; then what the status says of the one handler."""
    await bench.work()
    [row] = await bench.sql("select state, why, ready, failures from anton.status")
    return row


async def handled(bench: Bench, role: Database, count: int = 30) -> Bench:
    """The same app as the role sees it, with records to handle."""
    me = f"worker_{bench.db.name}"
    await run(bench, f"grant select on table a to {me}", f"grant usage on all sequences in schema public to {me}")
    await bench.add("a", ({"n": n} for n in range(count)))
    return Bench(role, bench.app)


def copy_a_to_b(each: bool) -> None:
    b = Table("b")

    def batch(records: Records) -> None:
        for record in records:
            one(record)

    def one(record: Any) -> None:
        b.append({"n": record["n"]})

    Table("a").on_new_records(name="handle", attempts=1, each=each)(one if each else batch)


@pytest.mark.parametrize("each", [False, True])
async def test_a_right_to_insert_that_is_missing_makes_the_handler_wait_and_is_named(
    db: Database, role: Database, each: bool, caplog: Any
):
    bench = await Bench.make(db, lambda: copy_a_to_b(each))
    there = await handled(bench, role)
    await there.work()
    [row] = await bench.sql("select state, why, ready from anton.status")
    grant = f"grant insert on table public.b to worker_{db.name};"
    assert row["state"] == "failing" and row["ready"] == 30 and "insert on table public.b" in row["why"]
    assert grant in row["why"]
    assert not [record for record in caplog.records if record.exc_info]
    await bench.advance(timedelta(seconds=2))
    await there.work()                                                  # the probe: one record, in vain
    assert (await bench.left()).keys() == {"job"} and await bench.value("select sum(hi - lo + 1) from anton.job") == 30
    assert await bench.count("b") == 0 and await bench.value("select max(attempt) from anton.job") == 0
    await bench.sql(grant)
    await bench.advance(timedelta(minutes=2))
    await there.work()
    assert await bench.left() == {}
    assert await bench.value("select count(distinct data->>'n') from b") == 30 == await bench.count("b")
    assert await bench.value("select state from anton.status") == "ok"


async def test_rights_that_a_handler_reads_updates_and_deletes_with_are_named_one_by_one(db: Database, role: Database):
    def handle(records: Records) -> None:
        for record in records:
            if record["n"] == 0:
                assert not list(sql("select 1 from other where id = {n}", n=record["n"]))
            tables["b"].select(id=record["n"]).update(n=1, on_conflict="overwrite")
            tables["c"].select(id=record["n"]).delete(on_conflict="overwrite")

    def declare() -> None:
        Table("b"), Table("c")
        Table("a").on_new_records(name="handle", attempts=1)(handle)

    bench = await Bench.make(db, declare)
    tables = bench.app.tables
    await bench.sql("create table other (id int)")
    there = await handled(bench, role, 3)
    told = []
    for _ in range(4):
        await there.work()
        why = await bench.value("select why from anton.status")
        if why is None:
            break
        told.append(why[why.index("grant"):why.index(";") + 1])
        await bench.sql(told[-1])
        await bench.advance(timedelta(minutes=2))
    me = f"worker_{db.name}"
    assert told == [f"grant select on table public.other to {me};", f"grant select, update on table public.b to {me};",
                    f"grant delete, select on table public.c to {me};"]
    assert await bench.left() == {}


async def test_a_right_that_a_sql_handler_misses_is_named_and_no_record_is_split(db: Database, role: Database):
    def declare() -> None:
        Table("b")
        Table("a").on_new_records.sql("insert into b (data) select data from new_records", name="copy", attempts=1)

    bench = await Bench.make(db, declare)
    there = await handled(bench, role)
    await there.work()
    why = await bench.value("select why from anton.status")
    grant = f"grant insert on table public.b to worker_{db.name};"
    assert grant in why and await bench.count("anton.job") == 1
    await bench.sql(grant)
    await bench.advance(timedelta(minutes=2))
    await there.work()
    assert await bench.left() == {} and await bench.count("b") == 30


async def test_a_table_to_read_that_is_denied_makes_the_handler_wait(db: Database, role: Database):
    seen: list[int] = []

    def declare() -> None:
        Table("a").on_new_records(name="handle", attempts=1)(lambda records: seen.extend(r["n"] for r in records))

    bench = await Bench.make(db, declare)
    there = await handled(bench, role)
    me = f"worker_{db.name}"
    await bench.sql(f"revoke select on table a from {me}")
    await there.work()
    assert f"grant select on table public.a to {me};" in await bench.value("select why from anton.status")
    await bench.sql(f"grant select on table a to {me}")
    await bench.advance(timedelta(minutes=2))
    await there.work()
    assert len(seen) == 30 and await bench.left() == {}


GONE = {
    "table": ("alter table b rename to b_gone", "alter table b_gone rename to b",
              r'relation "(public\.)?b" does not exist'),                  # no schema once a probe looked for it
    "column": ("alter table b rename data to data_gone", "alter table b rename data_gone to data", '"data"'),
}


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("what", GONE)
async def test_what_is_gone_from_the_schema_makes_the_handler_wait_until_it_is_back(
    db: Database, each: bool, what: str, caplog: Any
):
    away, back, says = GONE[what]

    bench = await Bench.make(db, lambda: copy_a_to_b(each))
    await bench.add("a", [{"n": -1}])
    await bench.work()                                                  # so that the process knows the table
    await bench.sql(away)
    await bench.add("a", ({"n": n} for n in range(30)))
    row = await failing(bench)
    assert row["state"] == "failing" and re.search(says, row["why"]) and row["ready"] == 30
    await bench.advance(timedelta(minutes=2))
    row = await failing(bench)                                          # nothing is known of the table any more
    assert row["state"] == "failing" and row["ready"] == 30 and row["failures"] >= 1
    assert "dead" not in await bench.left() and not [record for record in caplog.records if record.exc_info]
    await bench.sql(back)
    await bench.advance(timedelta(minutes=3))
    await bench.work()
    assert await bench.left() == {} and await bench.count("b") == 31


async def test_a_row_that_a_policy_refuses_is_the_records_own_fault(db: Database, role: Database):
    def handle(records: Records) -> None:
        for record in records:
            tables["b"].append({"n": record["n"]})

    def declare() -> None:
        Table("b")
        Table("a").on_new_records(name="handle", attempts=1)(handle)

    bench = await Bench.make(db, declare)
    tables = bench.app.tables
    there = await handled(bench, role)
    await run(bench, f"grant select, insert on table b to worker_{db.name}", "alter table b enable row level security",
              "create policy low on b using (true) with check ((data ->> 'n')::int < 20)")
    await there.work()
    assert await bench.left() == {"dead": 10} and await bench.count("b") == 20


async def test_a_value_too_large_for_an_index_is_the_records_own_fault(db: Database):
    long = random.Random(1).randbytes(9000).hex()                       # does not get shorter when it is compressed

    def handle(records: Records) -> None:
        for record in records:
            tables["b"].append({"text": long if record["n"] == 3 else "short"})

    def declare() -> None:
        Table("b")
        Table("a").on_new_records(name="handle", attempts=1)(handle)

    bench = await Bench.make(db, declare)
    tables = bench.app.tables
    await bench.sql("create index on b ((data ->> 'text'))")
    await bench.add("a", ({"n": n} for n in range(10)))
    await bench.work()
    assert await bench.left() == {"dead": 1} and await bench.count("b") == 9


@pytest.mark.parametrize(("text", "rights"), [
    ('copy public.b("data") from stdin', ["insert"]),
    ("insert into b (data) select data from new_records", ["insert"]),
    ("insert into public.b (id) values (1) on conflict (id) do update set id = excluded.id",
     ["insert", "select", "update"]),
    ('insert into "b" (id) values (1) returning id', ["insert", "select"]),
    ("update only b set n = 1", ["select", "update"]),
    ("DELETE FROM shop.b using c", ["delete", "select"]),
    ("select * from c join b on true", ["select"]),
    ("select * from bb", []),
])
def test_a_statement_shows_what_it_needs(text: str, rights: list[str]):
    assert rights_of(text, "b") == rights
