"""Housekeeping: what is forgotten, what is kept, and that nobody waits for it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from working import PATIENCE

from anton.db import Conn, Database

SLOTTED = ("change", "receipt", "output")
NOON = 129_600 - time.time() % 86_400                                  # seconds until tomorrow's noon


async def at(conn: Conn, days: float) -> None:
    """Moves the clock of this database to so many days after noon, as slots go by dates."""
    await conn.execute(
        "create or replace function anton.now() returns timestamptz language sql volatile as "
        f"$$ select pg_catalog.clock_timestamp() + interval '{NOON + days * 86_400} s' $$"
    )


async def work(conn: Conn, n: int = 20) -> None:
    """Inserts n records and works them all: a change, a receipt and an output."""
    await conn.execute("insert into a (s) select 's' from generate_series(1, $1) i", n)
    handler = await conn.fetchval("select id from anton.handler where name = 'h'")
    jobs = await conn.fetch(
        "select id from anton.claim(1, 5, array[$1::int], array[99], array[9999], array[0::bigint], '30 s')", handler)
    async with conn.transaction():
        await conn.execute(
            "select anton.put_output(r, (select min(id) from anton.watched), array[1::bigint], null, array[1]) "
            "from anton.ack(5, $1, 1, 1.0, 0) r", [job["id"] for job in jobs])


async def counts(conn: Conn) -> dict[str, int]:
    return {name: await conn.fetchval(f"select count(*) from anton.{name}") for name in SLOTTED}


async def maintain(db: Database, conn: Conn) -> list[str]:
    """Calls it until there is nothing more to do."""
    done: list[str] = []
    while (step := await db.call_value(conn, "maintain")) is not None:
        done.append(step)
    return done


@pytest.fixture
def ready(db: Database) -> Database:
    async def make() -> None:
        async with db.conn() as conn:
            await at(conn, 0)
            await conn.execute("create table a (id bigint generated always as identity primary key, s text)")
            await conn.execute("select anton.handler('h', 'a', 'new', 'select 1')")

    db.run(make())
    return db


async def test_a_slot_is_emptied_once_it_is_older_than_the_days_kept(ready: Database) -> None:
    async with ready.conn() as conn:
        await work(conn)
        kept = await counts(conn)
        assert min(kept.values()) > 0
        await at(conn, 7)
        assert await maintain(ready, conn) == []
        assert await counts(conn) == kept
        await at(conn, 8.01)
        done = await maintain(ready, conn)
        assert [step.partition("_")[0] for step in done] == ["output", "receipt", "change"]
        assert set((await counts(conn)).values()) == {0}


async def test_changes_stay_while_a_job_needs_them_and_receipts_go(ready: Database) -> None:
    async with ready.conn() as conn:
        await work(conn)
        await conn.execute("select anton.pause('h')")
        await conn.execute("insert into a (s) select 's' from generate_series(1, 20) i")
        await at(conn, 8.01)
        await maintain(ready, conn)
        assert await conn.fetchval("select count(*) from anton.receipt") == 0
        held = await conn.fetchval("select count(*) from anton.change")
        assert held > 0
        await conn.execute("delete from anton.job")
        assert len(await maintain(ready, conn)) == 1
        assert await conn.fetchval("select count(*) from anton.change") == 0


@pytest.mark.parametrize("days", [0, 3, 9, 20])
async def test_what_was_written_lately_is_never_emptied(ready: Database, days: int) -> None:
    async with ready.conn() as conn:
        await at(conn, days)
        await work(conn)
        before = await counts(conn)
        for later in (0, 1, 6.9):
            await at(conn, days + later)
            await maintain(ready, conn)
            assert await counts(conn) == before


async def test_fewer_days_are_kept_where_the_setting_says_so(ready: Database) -> None:
    async with ready.conn() as conn:
        await conn.execute("update anton.setting set value = '2' where name = 'retention_days'")
        await work(conn)
        await at(conn, 2)
        assert await maintain(ready, conn) == []
        await at(conn, 3.01)
        await maintain(ready, conn)
        assert set((await counts(conn)).values()) == {0}


async def test_a_reader_is_not_waited_for_and_keeps_nobody_else_waiting(ready: Database) -> None:
    reader, writer = await ready.connect(), await ready.connect()
    async with ready.conn() as conn:
        await work(conn)
        await at(conn, 8.01)
        async with reader.transaction():
            await reader.fetch("select * from anton.change, anton.receipt, anton.output")
            await writer.execute("set lock_timeout = '2s'")            # what waits for longer raises

            async def write() -> None:
                while not done.is_set():
                    await writer.execute("insert into a (s) values ('x')")

            done = asyncio.Event()
            writing = asyncio.create_task(write())
            assert await asyncio.wait_for(maintain(ready, conn), PATIENCE) == []
            done.set()
            await writing
        assert len(await maintain(ready, conn)) == 3
    await reader.close()
    await writer.close()


async def test_two_at_once_do_not_wait_for_each_other(ready: Database) -> None:
    async with ready.conn() as one, ready.conn() as other:
        async with one.transaction():
            await ready.call(one, "maintain")
            assert await ready.call_value(other, "maintain") is None


async def test_workers_and_ticks_are_forgotten_and_leases_hold_their_worker(ready: Database) -> None:
    async with ready.conn() as conn:
        gone, holding = [await ready.call_value(conn, "register_worker", "x", "host", n, "0") for n in (1, 2)]
        await conn.execute("insert into a (s) values ('x')")
        handler = await conn.fetchval("select id from anton.handler where name = 'h'")
        await conn.fetch(
            "select id from anton.claim($1, 5, array[$2::int], array[1], array[9], array[0::bigint], '30 s')",
            holding, handler)
        await conn.execute("select anton.schedule('s', '@every 60', 'select 1')")
        await conn.execute(
            "insert into anton.tick select id, now(), 'done' from anton.schedule union all "
            "select id, now() - interval '1 s', 'planned' from anton.schedule")
        await at(conn, 8)
        await maintain(ready, conn)
        left: list[Any] = [row["id"] for row in await conn.fetch("select id from anton.worker")]
        assert gone not in left
        assert holding in left
        assert [row["state"] for row in await conn.fetch("select state from anton.tick")] == ["planned"]


async def test_keys_fed_by_a_backfill_are_forgotten_after_it(ready: Database) -> None:
    async with ready.conn() as conn:
        await conn.execute("insert into anton.fed select id, '[1]' from anton.handler where name = 'h'")
        assert await maintain(ready, conn) == ["1 fed keys forgotten"]
