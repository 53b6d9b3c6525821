"""What status, findings and why say, against what is so."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from anton import status
from anton.db import Conn, Database
from anton.errors import BadOption, UnknownTable

SCHEMA = """
create table a (id bigint generated always as identity primary key, s text);
create table b (id bigint generated always as identity primary key, s text);
create table c (x text, y int, primary key (x, y));
select anton.handler('to_b', 'a', 'new', 'insert into b (s) select s from new_records');
select anton.handler('to_c', 'b', 'new', 'insert into c select s, id from new_records');
select anton.handler('end', 'c', 'new', 'select from new_records');
"""


@pytest.fixture
def ready(db: Database) -> Database:
    """a -> to_b -> b -> to_c -> c, all watched."""

    async def make() -> None:
        async with db.conn() as conn:
            await conn.execute(SCHEMA)

    db.run(make())
    return db


async def claim(conn: Conn, handler: str) -> list[int]:
    rows = await conn.fetch(
        "select id from anton.claim(1, 7, array[anton.find_handler($1)], array[99], array[9999], array[0::bigint], "
        "'30 s')", handler)
    return [row["id"] for row in rows]


async def run(conn: Conn, *handlers: str) -> None:
    """Works all ready jobs of SQL handlers, as a worker would."""
    for handler in handlers:
        async with conn.transaction():
            ids = await claim(conn, handler)
            await conn.execute("select anton.run_sql(7, $1, 1)", ids)


async def of(db: Database, conn: Conn, handler: str) -> dict[str, Any]:
    return next(row for row in await status.status(db, conn) if row["handler"] == handler)


async def test_records_are_counted_where_they_are(ready: Database) -> None:
    async with ready.conn() as conn:
        await conn.execute("insert into a (s) select 's' from generate_series(1, 30) i")
        assert (await of(ready, conn, "to_b"))["ready"] == 30
        [job] = await claim(conn, "to_b")
        row = await of(ready, conn, "to_b")
        assert (row["ready"], row["in_flight"]) == (0, 30)
        await conn.execute("select anton.retry(7, $1, array[1, 2], '1 h', 'no', true)", job)
        await conn.execute("select anton.bury(7, $1, 3, 'failed', 'boom', null)", job)
        row = await of(ready, conn, "to_b")
        assert (row["ready"], row["in_flight"], row["delayed"], row["dead"]) == (0, 27, 2, 1)
        assert row["oldest"] > timedelta(0)


async def test_speed_is_of_the_last_minute(ready: Database) -> None:
    async with ready.conn() as conn:
        await conn.execute("insert into a (s) select 's' from generate_series(1, 120) i")
        await run(conn, "to_b")
        assert (await of(ready, conn, "to_b"))["per_second"] == 2
        await conn.execute("update anton.receipt set at = at - interval '61 s'")
        assert (await of(ready, conn, "to_b"))["per_second"] == 0


async def test_the_state_says_what_holds_a_handler_up(ready: Database) -> None:
    async with ready.conn() as conn:

        async def state() -> tuple[str, str | None]:
            row = await of(ready, conn, "to_b")
            return row["state"], row["why"]

        assert await state() == ("ok", None)
        await conn.execute("insert into a (s) values ('s')")
        assert await state() == ("idle", "records wait and no worker of app sql lives; anton work")
        await ready.call(conn, "register_worker", "any", "host", 1, "0.9")
        assert await state() == ("ok", None)
        await conn.execute("update anton.handler set max_lag = '0 s' where name = 'to_b'")
        assert (await state())[0] == "behind"
        await conn.execute("update anton.handler set failing_since = now(), failing_error = 'refused'")
        assert "refused" in str((await state())[1])
        await conn.execute("select anton.pause('to_b')")
        assert await state() == ("paused", "paused; anton handlers resume to_b")
        await conn.execute("update anton.handler set missing_at = now()")
        assert (await state())[0] == "missing"


async def test_live_workers_and_their_versions_are_shown(ready: Database) -> None:
    async with ready.conn() as conn:
        for version in ("1.0", "1.1"):
            await ready.call(conn, "register_worker", "any", "host", 1, version)
        row = await of(ready, conn, "to_b")
        assert (row["workers"], row["versions"]) == (2, ["1.0", "1.1"])
        await conn.execute("select anton.stop_worker(1)")
        await conn.execute("update anton.worker set seen_at = seen_at - interval '2 min' where id = 2")
        assert (await of(ready, conn, "to_b"))["workers"] == 0
        assert [row["state"] for row in await status.ask(ready, conn, "workers")] == ["stopped", "lost"]


async def test_a_disabled_or_dropped_trigger_is_found_and_mended(ready: Database) -> None:
    async with ready.conn() as conn:
        await ready.call(conn, "register_worker", "any", "host", 1, "0.9")

        async def found() -> list[tuple[str, str]]:
            return [(row["kind"], row["subject"]) for row in await status.ask(ready, conn, "findings")]

        assert await found() == []
        await conn.execute("alter table a disable trigger all")
        mine = "select tgname from pg_trigger where tgrelid = 'b'::regclass and not tgisinternal"
        for [name] in await conn.fetch(mine):
            await conn.execute(f'drop trigger "{name}" on b')
        assert {("trigger", "public.a"), ("trigger", "public.b")} == set(await found())
        await ready.call(conn, "repair")
        assert await found() == []
        await conn.execute("insert into a (s) values ('s'); insert into b (s) values ('s')")
        assert await conn.fetchval("select count(*) from anton.job") == 2


async def test_dead_letters_and_dropped_tables_are_found(ready: Database) -> None:
    async with ready.conn() as conn:
        await conn.execute("insert into a (s) values ('s')")
        [job] = await claim(conn, "to_b")
        await conn.execute("select anton.bury(7, $1, 1, 'failed', 'boom', 'Traceback …')", job)
        await conn.execute("drop table c")
        found = {(row["kind"], row["subject"]) for row in await status.ask(ready, conn, "findings")}
        assert {("dead", "sql.to_b"), ("table", "public.c")} <= found


async def why(db: Database, conn: Conn, table: str, key: str) -> list[tuple[int, str | None, str | None, str]]:
    rows = await status.ask(db, conn, "why", table, key)
    return [(row["level"], row["record"], row["handler"], row["state"]) for row in rows]


async def test_why_follows_a_record_both_ways(ready: Database) -> None:
    async with ready.conn() as conn:
        await conn.execute("insert into a (s) values ('s')")
        await run(conn, "to_b", "to_c")
        assert await why(ready, conn, "b", "1") == [
            (-1, "a/1", None, "origin"),
            (0, "b/1", "to_b", "written"),
            (1, "c/s,1", "to_c", "done"),
            (2, None, "end", "ready"),
        ]
        assert await why(ready, conn, "c", "s,1") == [
            (-2, "a/1", None, "origin"),
            (-1, "b/1", "to_b", "written"),
            (0, "c/s,1", "to_c", "written"),
            (1, None, "end", "ready"),
        ]


async def test_why_knows_each_output_of_a_batch_by_its_owner(ready: Database) -> None:
    async with ready.conn() as conn:
        await conn.execute("insert into a (s) values ('x')")
        await conn.execute("insert into a (s) select 's' from generate_series(2, 40) i")
        ids = await claim(conn, "to_b")
        async with conn.transaction():
            table = await conn.fetchval("select id from anton.watched where table_name = 'b'")
            receipt = await conn.fetchval("select anton.ack(7, $1, 1, 2.5, 0)", ids)
            await conn.execute("insert into b (s) select 's' from generate_series(1, 40) i")
            await conn.execute(
                "select anton.put_output($1, $2, array(select i from generate_series(1, 40) i), null, "
                "array(select i from generate_series(40, 1, -1) i))", receipt, table)
        for record, output in ((1, 40), (2, 39), (40, 1)):
            assert (1, f"b/{output}", "to_b", "done") in await why(ready, conn, "a", str(record))
            assert (await why(ready, conn, "b", str(output)))[0][:2] == (-1, f"a/{record}")


async def test_why_tells_what_sql_wrote_for_a_batch_as_that(ready: Database) -> None:
    async with ready.conn() as conn:
        await conn.execute("insert into a (s) select 's' from generate_series(1, 3) i")
        await run(conn, "to_b")
        assert (1, "b (for the batch)", "to_b", "done") in await why(ready, conn, "a", "2")
        assert (await why(ready, conn, "b", "2"))[0] == (-1, "a (a batch of 3)", None, "origin")


async def test_why_shows_what_waits_and_what_died(ready: Database) -> None:
    async with ready.conn() as conn:
        await conn.execute("insert into a (s) select 's' from generate_series(1, 20) i")
        [job] = await claim(conn, "to_b")
        await conn.execute("select anton.retry(7, $1, array[1], '1 h', 'not yet', true)", job)
        await conn.execute("select anton.bury(7, $1, 2, 'failed', 'boom', null)", job)
        rows = [await status.ask(ready, conn, "why", "a", str(key)) for key in (1, 2, 3)]
        assert [(row[1]["state"], row[1]["error"]) for row in rows] == [
            ("delayed", "not yet"), ("dead", "boom"), ("in flight", None)]
        assert "to_b -> dead" in status.draw_why(rows[1])


async def test_why_says_what_it_cannot_find(ready: Database) -> None:
    async with ready.conn() as conn:
        await conn.execute("create table unwatched (id int primary key)")
        with pytest.raises(UnknownTable, match='table "unwatched" is not watched'):
            await status.ask(ready, conn, "why", "unwatched", "1")
        with pytest.raises(BadOption, match=r'"s" is no key of public\.c.*Its key is x, y'):
            await status.ask(ready, conn, "why", "c", "s")
        assert await why(ready, conn, "a", "99") == [(0, "a/99", None, "origin")]


async def test_flow_tells_what_happened_since(ready: Database) -> None:
    async with ready.conn() as conn:
        start = (await status.ask(ready, conn, "flow_from"))[0]
        await conn.execute("insert into a (s) values ('s')")
        await run(conn, "to_b")
        [job] = await claim(conn, "to_c")
        await conn.execute("select anton.bury(7, $1, 1, 'failed', 'boom', null)", job)
        rows = await status.ask(ready, conn, "flow", start["after"], start["after_action"])
        assert [(row["kind"], row["name"], row["input"]) for row in rows] == [
            ("done", "to_b", "a/1"), ("dead", "to_c", "b/1")]


@pytest.mark.parametrize(("seconds", "text"), [
    (0.25, "250 ms"), (1, "1 s"), (62, "1 min 2 s"), (3600, "1 h"), (90000, "1 d 1 h"), (-1, "0 ms")])
def test_durations_are_shown_in_their_two_largest_units(seconds: float, text: str) -> None:
    assert status.show_duration(timedelta(seconds=seconds)) == text


def test_columns_that_say_nothing_are_left_out() -> None:
    rows = [{"name": "a", "n": 1, "why": None}, {"name": "bb", "n": 20, "why": None}]
    assert status.layout(rows, ("name", "n", "why")) == "name   n\na      1\nbb    20"
