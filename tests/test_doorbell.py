"""Doorbell: a commit wakes an idle worker at once; nobody waits for it, and polling alone is enough."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from working import Bench

from anton import Records, Table
from anton.db import Conn, Database
from anton.doorbell import Answer, Doorbell

HELD = """select exists (select from anton.doorbell() d join pg_locks l on l.locktype = 'advisory' and l.objsubid = 2
  and l.classid = d.k1::oid and l.objid = d.k2::oid and l.mode = 'ExclusiveLock' and l.granted
  and l.database = (select oid from pg_database where datname = current_database()))"""


async def idle_worker(db: Database) -> tuple[Bench, asyncio.Queue[int]]:
    arrived: asyncio.Queue[int] = asyncio.Queue()

    def declare() -> None:
        a = Table("a")

        @a.on_new_records
        async def handle(records: Records) -> None:
            for record in records:
                arrived.put_nowait(record["n"])

    bench = await Bench.make(db, declare)
    if not await bench.value("select enabled from anton.doorbell()"):
        pytest.skip("this server has max_prepared_transactions > 0, so the doorbell is off")
    return bench, arrived


async def test_an_idle_worker_is_announced_and_woken_by_a_commit_without_polling(db: Database):
    bench, arrived = await idle_worker(db)
    async with bench.running():
        for n in range(20):
            await bench.until(HELD)
            await bench.add("a", [{"n": n}])
            assert await asyncio.wait_for(arrived.get(), 15) == n       # it would look again in 30 s


async def test_an_idle_worker_asks_the_database_next_to_nothing(db: Database):
    bench, _ = await idle_worker(db)
    watch = await db.connect()                                          # not of the pool that the worker uses
    async with bench.running():
        await bench.until(HELD)
        rows = await watch.fetch(
            "select pid, query_start from pg_stat_activity where datname = current_database() "
            "and pid <> pg_backend_pid() and backend_type = 'client backend'"
        )
        pids, seen = [row["pid"] for row in rows], {row["query_start"] for row in rows}
        end = time.monotonic() + 2
        while time.monotonic() < end:
            rows = await watch.fetch("select query_start from pg_stat_activity where pid = any ($1::int[])", pids)
            seen |= {row["query_start"] for row in rows}
            await asyncio.sleep(0.01)
        assert len(seen) - len(pids) <= 4                               # in 2 s
    await watch.close()


async def test_one_worker_is_announced_and_another_takes_its_place(db: Database):
    bench, _ = await idle_worker(db)
    first, second = Doorbell(db, lambda: None), Doorbell(db, lambda: None)
    assert await first.announce() is Answer.BELL
    assert await second.announce() is Answer.OTHER and second.others
    assert await bench.value(HELD)
    await first.hush()
    assert not await bench.value(HELD)
    assert await second.announce() is Answer.OTHER                     # elected is elected
    await first.step_down()
    assert await second.announce() is Answer.BELL
    await second.close()
    await bench.until(f"select not ({HELD})")
    assert await first.announce() is Answer.BELL
    await first.close()


async def test_an_open_writer_keeps_the_bell_and_the_worker_polls(db: Database):
    bench, arrived = await idle_worker(db)
    async with db.conn() as conn, conn.transaction():
        await conn.execute("insert into a (data) values ('{\"n\": 1}')")
        bell = Doorbell(db, lambda: None)
        assert await bell.announce() is Answer.WRITER
        await bell.close()
        async with bench.running():
            await bench.add("a", [{"n": 2}])
            assert await asyncio.wait_for(arrived.get(), 15) == 2
            assert not await bench.value(HELD)
    async with bench.running():
        assert await asyncio.wait_for(arrived.get(), 15) == 1


async def test_a_call_for_help_wakes_workers_that_are_not_announced(db: Database):
    await idle_worker(db)
    woken = asyncio.Event()
    announced, waiting = Doorbell(db, lambda: None), Doorbell(db, woken.set)
    assert await announced.announce() is Answer.BELL and await waiting.announce() is Answer.OTHER
    await announced.call_help()
    await asyncio.wait_for(woken.wait(), 15)
    await announced.close()
    await waiting.close()


async def test_with_the_bell_switched_off_polling_is_enough(db: Database):
    bench, arrived = await idle_worker(db)
    await bench.sql("update anton.setting set value = 'off' where name = 'doorbell'")
    await bench.sql("select anton.sync_triggers(id) from anton.watched where table_name = 'a'")
    async with bench.running():
        for n in range(5):
            await bench.add("a", [{"n": n}])
            assert await asyncio.wait_for(arrived.get(), 15) == n
        assert not await bench.value(HELD)


async def test_the_bell_comes_back_when_its_connection_is_lost(db: Database):
    bench, arrived = await idle_worker(db)
    async with bench.running():
        await bench.until(HELD)
        await bench.sql("select pg_terminate_backend(pid) from anton.bell_holder()")
        await bench.until(HELD)
        await bench.add("a", [{"n": 1}])
        assert await asyncio.wait_for(arrived.get(), 15) == 1


FROZEN = """
import asyncio, sys
from anton.db import Conn, Database
from anton.doorbell import Doorbell
async def main():
    bell = Doorbell(Database(sys.argv[1]), lambda: None)
    await bell.announce()
    print("announced", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_an_announcer_that_is_frozen_is_ended_by_a_worker_that_finds_old_jobs(db: Database):
    bench, arrived = await idle_worker(db)
    process = await asyncio.to_thread(
        subprocess.Popen, [sys.executable, "-c", FROZEN, str(db.dsn)], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"announced\n"
        process.send_signal(signal.SIGSTOP)
        holder = await bench.value("select pid from anton.bell_holder()")
        async with bench.running():
            n = 0
            end = time.monotonic() + 30
            while await bench.value("select exists (select from pg_stat_activity where pid = $1)", holder):
                assert time.monotonic() < end
                await bench.add("a", [{"n": n}])
                assert await asyncio.wait_for(arrived.get(), 15) == n
                n += 1
            await bench.until(HELD)                                    # and the worker is announced in its place
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


async def test_an_announcer_that_lives_is_left_alone(db: Database):
    bench, _ = await idle_worker(db)
    async with bench.running():
        await bench.until(HELD)
        holder = await bench.value("select pid from anton.bell_holder()")
        other = Doorbell(db, lambda: None)
        assert await other.announce() is Answer.OTHER
        assert not await other.unfreeze()
        await other.close()
        assert await bench.value("select pid from anton.bell_holder()") in (holder, None)


def test_behind_a_transaction_pooler_there_is_no_bell():
    async def announce() -> Any:
        return await Doorbell(Database("postgresql://127.0.0.1:1/x", pooled=True), lambda: None).announce()

    assert asyncio.run(announce()) is Answer.OFF and os.getpid()


async def test_the_bell_is_let_go_when_the_look_after_an_announcement_fails(db: Database):
    bench, arrived = await idle_worker(db)
    await bench.sql("alter function anton.poll(int, int[], interval) rename to poll_before")
    await bench.sql("create table failed (n int)")
    await bench.sql(f"""create function anton.poll(p_worker int, p_handlers int[], p_lease interval,
        out ready int[], out suspects int, out wake_at timestamptz, out at timestamptz) language plpgsql as $$
        begin
          if ({HELD}) and not exists (select from public.failed) then
            perform pg_advisory_xact_lock_shared(7);
            raise exception 'no look while the bell is held';
          end if;
          select * into ready, suspects, wake_at, at from anton.poll_before(p_worker, p_handlers, p_lease);
        end $$""")
    async with bench.running():
        async with db.tx() as conn:                                    # the look waits, so that the bell is seen held
            await conn.execute("select pg_advisory_xact_lock(7)")
            await bench.until(HELD)
        await bench.until(f"select not ({HELD})")
        await bench.sql("insert into failed values (1)")
        await bench.add("a", [{"n": 1}])
        assert await asyncio.wait_for(arrived.get(), 15) == 1


async def test_an_announcement_that_is_cancelled_leaves_no_connection_open(database: str):
    came: list[Conn] = []

    class Cancels(Database):
        async def call(self, conn: Conn, function: str, *args: Any, **named: Any) -> Any:
            came.append(conn)
            await conn.execute("select pg_cancel_backend(pg_backend_pid()), pg_sleep(60)")

    assert await Doorbell(Cancels(database), lambda: None).announce() is Answer.OFF
    assert len(came) == 1 and came[0].is_closed()
