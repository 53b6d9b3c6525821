"""Leases: kept while their calls run, lost, given back; connections that break take nothing along."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from servers import free_port, migrate, restart, running
from working import PATIENCE, Bench, cutting, met, numbers, one_handler

from anton import Ctx, Records, Table, queue
from anton.app import App
from anton.db import Database, set_database
from anton.heartbeat import Heartbeat
from anton.worker import Worker


async def take(db: Database) -> list[Any]:
    """Lets the one lease that there is run out, and takes its jobs before a heartbeat can renew it."""
    async with db.tx() as conn:
        await conn.execute("update anton.lease set lease_until = '-infinity'")
        taken = await queue.reclaim(db, conn, 0, timedelta(minutes=1), [1])
    assert len(taken) == 1
    return taken


async def test_a_worker_that_lost_its_lease_changes_nothing(db: Database):
    inside, go = asyncio.Event(), asyncio.Event()

    async def handle(records: Records) -> None:
        inside.set()
        await go.wait()
        tables["b"].extend({"n": n} for n in numbers(records))

    bench = await one_handler(db, handle)
    tables = bench.app.tables
    await bench.add("a", ({"n": n} for n in range(5)))
    async with bench.running(on_suspects=lambda: None):
        await inside.wait()
        taken = await take(db)
        go.set()
    assert await bench.count("b") == 0 and await bench.count("anton.receipt") == 0
    assert await bench.value("select token from anton.lease") == taken[0].token


async def test_the_heartbeat_says_that_a_lease_was_lost_when_it_ends_the_run(db: Database, caplog: Any):
    inside, ended = asyncio.Event(), asyncio.Event()

    async def handle(records: Records) -> None:
        inside.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    bench = await one_handler(db, handle)
    await bench.add("a", [{"n": 1}])
    async with bench.running(lease=timedelta(seconds=0.6), on_suspects=lambda: None):
        await inside.wait()
        await take(db)
        await ended.wait()
        await met(lambda: "a lease was lost, of 1 jobs" in caplog.text)


async def test_the_heartbeat_keeps_a_lease_while_the_handler_blocks_the_loop(db: Database):
    blocked = threading.Event()

    async def handle(records: Records) -> None:
        blocked.wait(2.5)                                               # bad manners, and several leases long
        tables["b"].extend({"n": n} for n in numbers(records))

    bench = await one_handler(db, handle)
    tables = bench.app.tables
    await bench.add("a", ({"n": n} for n in range(5)))
    async with bench.running(lease=timedelta(seconds=0.6), on_suspects=lambda: None):
        await bench.until_done()
    assert await bench.count("b") == 5


@pytest.mark.parametrize("when", [b"COMMIT;", b"COPY", b"BEGIN"])
async def test_a_connection_that_breaks_while_settling_loses_and_doubles_nothing(db: Database, when: bytes):
    runs: Counter[int] = Counter()

    def handle(records: Records) -> None:
        runs.update(numbers(records))
        for record in records:
            tables["b"].append({"n": record["n"]})

    bench = await one_handler(db, handle)
    tables = bench.app.tables
    async with cutting(db, when) as (proxied, cuts):
        there = Bench(proxied, bench.app)
        async with there.running():
            for n in range(5):
                cuts.append(b"cut")
                await bench.add("a", ({"n": n * 20 + m} for m in range(20)))
                await bench.until("select count(*) = $1 from b", (n + 1) * 20)
                await bench.until_done()
                assert not cuts
        await proxied.close()
    assert await bench.value("select count(distinct data->>'n') from b") == 100 == await bench.count("b")
    assert set(runs.values()) == {1} and await bench.left() == {}


async def test_a_restart_of_every_backend_burns_no_attempt(db: Database):
    attempts: set[int] = set()

    async def handle(record: Any, ctx: Ctx) -> None:
        attempts.add(ctx.attempt)
        tables["b"].append({"n": record["n"]})

    bench = await one_handler(db, handle, each=True)
    tables = bench.app.tables
    async with bench.running():
        async with db.conn() as conn:                                   # of its own: the writer's is not ended
            for n in range(30):
                await conn.execute("insert into a (data) select jsonb_build_object('n', $1::int * 10 + m) "
                                   "from generate_series(0, 9) m", n)
                if n % 5 == 0:
                    await conn.execute("select pg_terminate_backend(pid) from pg_stat_activity "
                                       "where datname = current_database() and pid <> pg_backend_pid()")
        await bench.until_done()
    assert await bench.value("select count(distinct data->>'n') from b") == 300 == await bench.count("b")
    assert attempts == {1} and await bench.left() == {}


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_restart_of_the_server_burns_no_attempt_and_loses_nothing(server: Any, mode: str):
    attempts: set[int] = set()
    with running(server.kind) as own:                                   # the others' server stays up
        own.sql("create database restarted")
        await asyncio.to_thread(migrate, own.url("restarted"))
        db = Database(own.url("restarted"), source="the test")
        set_database(db)

        def handle(records: Records, ctx: Ctx) -> None:
            attempts.add(ctx.attempt)
            tables["b"].extend({"n": n} for n in numbers(records))

        bench = await one_handler(db, handle, batch=5)
        tables = bench.app.tables
        async with bench.running(lease=timedelta(seconds=2)):
            for n in range(3):
                await bench.add("a", ({"n": n * 100 + m} for m in range(100)))
                await bench.until("select count(*) > $1 from b", n * 100)
                await asyncio.to_thread(restart, own, mode)
                await asyncio.to_thread(own.sql, "select 1")
                with suppress(Exception):
                    await bench.value("select 1")                       # connections of before
            await bench.until_done()
        assert await bench.value("select count(distinct data->>'n') from b") == 300 == await bench.count("b")
        assert await bench.left() == {} and attempts == {1}
        await db.close()
        set_database(None)


async def test_a_record_whose_lease_was_lost_leaves_its_handler_working_when_the_world_fails_late(db: Database):
    seen: list[int] = []
    hold = threading.Event()

    def handle(record: Any) -> None:
        seen.append(record["n"])
        if record["n"] == 1:
            hold.wait(PATIENCE)
            raise ConnectionError("the peer is away")

    bench = await one_handler(db, handle, each=True)
    async with bench.running() as worker:
        await bench.add("a", [{"n": 1}])
        await bench.until("select exists (select from anton.lease)")
        await met(lambda: bool(seen))
        await bench.sql("delete from anton.lease")                      # another worker has finished it
        worker._lost(set(worker._tokens()[0]))
        await met(lambda: not worker._dispatcher.active)
        hold.set()
        await bench.add("a", [{"n": 2}])
        await bench.until_done()
    assert seen == [1, 2]


async def test_leases_of_a_dead_worker_are_freed_beside_one_that_its_backend_still_settles(db: Database):
    bench = await one_handler(db, lambda records: None, batch=1)
    await bench.add("a", [{"n": 1}, {"n": 2}])
    await bench.sql(
        "select id from anton.claim(7, 42, array(select id from anton.handler), '{10}', '{10}', '{0}', '30 s')"
    )
    async with db.tx() as conn:
        await conn.execute("select anton.ack(42, array(select min(id) from anton.lease), 7, 0)")
        assert await asyncio.wait_for(bench.value("select anton.worker_died(7)"), PATIENCE) == 1


@pytest.mark.parametrize("jobs", [1, 8])
async def test_when_the_answer_to_a_commit_is_lost_the_other_parts_of_a_split_batch_go_on(
    db: Database, jobs: int, caplog: Any
):
    runs: Counter[int] = Counter()

    def handle(records: Records) -> None:
        runs.update(numbers(records))
        if len(records) == 8:
            cuts.append(b"cut")                                         # of the first part that is settled
            raise ValueError("find the one")
        for record in records:
            tables["b"].append({"n": record["n"]})

    bench = await one_handler(db, handle)
    tables = bench.app.tables
    for n in range(jobs):
        await bench.add("a", ({"n": m} for m in range(n * 8 // jobs, (n + 1) * 8 // jobs)))
    async with cutting(db, b"COMMIT;") as (proxied, cuts):
        async with Bench(proxied, bench.app).running():
            await bench.until_done()                                    # before the lease of 30 s ends
        await proxied.close()
    assert set(runs.values()) == {2} and not cuts
    assert sorted(await bench.column("select (data->>'n')::int from b")) == list(range(8))
    assert not [record for record in caplog.records if record.exc_info]


async def test_when_the_answer_to_a_commit_is_lost_records_of_one_call_each_run_once(db: Database, caplog: Any):
    runs: Counter[int] = Counter()
    go = threading.Event()

    def handle(record: Any) -> None:                                    # in a thread: the wire is in the loop
        runs[record["n"]] += 1
        if record["n"] == 99:
            cuts.append(b"cut")                                         # of what settles the others of its job
            go.wait(PATIENCE)
        tables["b"].append({"n": record["n"]})

    bench = await one_handler(db, handle, each=True, concurrency=1)
    tables = bench.app.tables
    async with cutting(db, b"COMMIT;") as (proxied, cuts):
        async with Bench(proxied, bench.app).running():
            await bench.add("a", ({"n": n} for n in range(100)))
            await bench.until("select count(*) = 99 from b")
            assert await bench.value("select settled is not null from anton.lease")
            go.set()
            await bench.until_done()
        await proxied.close()
    assert await bench.value("select count(distinct data->>'n') from b") == 100 == await bench.count("b")
    assert set(runs.values()) == {1} and not [record for record in caplog.records if record.exc_info]


async def test_a_sql_handler_goes_on_when_the_answer_to_a_commit_is_lost(db: Database, caplog: Any):
    def declare() -> None:
        a = Table("a")
        Table("b")
        a.on_new_records.sql(
            "insert into b (data) select jsonb_build_object('n', 10 / (data->>'n')::int) from new_records",
            name="divide", attempts=1,
        )

    bench = await Bench.make(db, declare)
    await bench.add("a", ({"n": n} for n in range(60)))
    async with cutting(db, b"COMMIT;") as (proxied, cuts):
        cuts += [b"cut", b"cut", b"cut"]
        async with Bench(proxied, bench.app).running():
            await bench.until("select count(*) = 59 from b")
            await bench.until_done()
        await proxied.close()
    assert await bench.left() == {"dead": 1} and not cuts
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_run_whose_own_commit_ended_its_lease_is_not_cancelled_for_it(db: Database):
    def handle(records: Records) -> None:
        cuts.append(b"hold")                                            # the answer to the COMMIT that settles these
        tables["b"].extend({"n": n} for n in numbers(records))

    bench = await one_handler(db, handle)
    tables = bench.app.tables
    answer = asyncio.Event()
    async with cutting(db, b"COMMIT;", answer) as (proxied, cuts):
        async with Bench(proxied, bench.app).running(lease=timedelta(seconds=0.3)) as worker:
            await bench.add("a", [{"n": 1}])
            try:
                await bench.until("select exists (select from b) and not exists (select from anton.lease)")
                [task] = worker._dispatcher.active
                for _ in range(2):                                      # heartbeats that find nothing
                    seen = await bench.value("select max(seen_at) from anton.worker")
                    await bench.until("select max(seen_at) > $1 from anton.worker", seen)
                assert not task.cancelling()
            finally:
                answer.set()
            await met(task.done)
            assert not task.cancelled()
        await proxied.close()
    assert await bench.count("b") == 1 and await bench.left() == {}


async def test_a_call_that_is_long_overdue_loses_its_own_lease_alone(db: Database):
    inside: set[str] = set()
    go, stuck = asyncio.Event(), list[int]()

    def declare() -> None:
        a = Table("a")

        @a.on_new_records(name="one")
        async def one(records: Records) -> None:
            inside.add("one")
            await go.wait()

        @a.on_new_records(name="two")
        async def two(records: Records) -> None:
            inside.add("two")
            await go.wait()

    bench = await Bench.make(db, declare)
    await bench.add("a", [{}])
    async with bench.running(lease=timedelta(seconds=0.6), on_suspects=lambda: None,
                             on_stuck=lambda: stuck.append(1)) as worker:
        await met(lambda: len(inside) == 2)
        assert await bench.value("select count(distinct token) from anton.lease") == 1
        [one] = [run for run in worker._dispatcher.active.values() if run.lane.name == "one"]
        one.overdue_at = time.monotonic() - 1
        await bench.until("select exists (select from anton.lease l join anton.handler h on h.id = l.handler_id "
                          "where h.name = 'one' and lease_until < anton.now() - interval '1 second')")
        assert await bench.value("select lease_until > anton.now() from anton.lease l join anton.handler h "
                                 "on h.id = l.handler_id where h.name = 'two'")
        assert not stuck                                                # the loop runs: nobody is replaced
        go.set()
        await bench.until_done()


async def test_the_heartbeat_goes_on_whatever_it_meets(db: Database, caplog: Any):
    asked: list[int] = []
    lost: list[set[int]] = []

    def tokens() -> tuple[list[int], list[int]]:
        asked.append(1)
        if len(asked) == 1:
            raise RuntimeError("dictionary changed size during iteration")
        return ([7] if len(asked) < 4 else []), []

    def tell(some: set[int]) -> None:
        lost.append(some)
        if len(lost) == 1:
            raise ValueError("the loop has ended")

    heart = Heartbeat(db, 0, timedelta(seconds=0.06), tokens, tell)
    try:
        await met(lambda: len(asked) > 4)
        assert lost == [{7}, {7}]
    finally:
        heart.stop()
    assert "dictionary changed size" in caplog.text


async def test_of_jobs_that_go_back_the_lost_ones_keep_nobody(db: Database):
    bench = await one_handler(db, lambda records: None)
    for n in range(3):
        await bench.add("a", [{"n": n}])
    worker = bench.worker()
    handlers = await bench.column("select id from anton.handler")
    async with db.conn() as conn:
        jobs = await queue.claim(db, conn, 1, timedelta(minutes=1), handlers, [10], [100], [0])
    await bench.sql("delete from anton.lease where id = $1", jobs[1].id)
    await worker._runner.settler.give_back(jobs)
    assert await bench.left() == {"job": 2}
    async with db.conn() as conn:
        jobs = await queue.claim(db, conn, 1, timedelta(minutes=1), handlers, [10], [100], [0])
    await bench.sql("delete from anton.lease where id = $1", jobs[0].id)
    await worker._runner.settler.world_failed(jobs, ConnectionError("away"))
    assert await bench.left() == {"job": 1}
    assert await bench.value("select failing_error from anton.handler") == "ConnectionError: away"


async def test_after_the_server_came_back_nobody_asks_for_suspects_that_are_not_to_be_had(db: Database):
    lease = timedelta(days=3650)                                        # the server is up for less than that
    bench = await one_handler(db, lambda records: None)
    await bench.add("a", [{"n": 1}])
    handlers = await bench.column("select id from anton.handler")
    async with db.conn() as conn:
        await queue.claim(db, conn, 1, lease, handlers, [1], [1], [0])
        await conn.execute("update anton.lease set lease_until = now() - interval '1 minute'")
        look = await queue.poll(db, conn, 1, handlers, lease)
        assert look.suspects == 0 and await queue.reclaim(db, conn, 1, lease, handlers) == []
        assert look.wake_at == await conn.fetchval("select pg_postmaster_start_time() + $1::interval", lease)
        told: list[int] = []
        async with bench.running(lease=lease, on_suspects=lambda: told.append(1)):
            await bench.add("a", [{"n": 2}])
            await bench.until("select exists (select from anton.receipt)")
        assert not told
        await conn.execute("update anton.lease set lease_until = '-infinity'")     # its parent saw it die
        assert (await queue.poll(db, conn, 1, handlers, lease)).suspects == 1
        assert len(await queue.reclaim(db, conn, 1, lease, handlers)) == 1


async def test_a_clock_set_back_to_before_the_servers_start_keeps_no_leases_of_the_dead(db: Database):
    lease = timedelta(seconds=1)
    bench = await one_handler(db, lambda records: None)
    await bench.advance(-timedelta(days=3650))
    await bench.add("a", [{"n": 1}])
    handlers = await bench.column("select id from anton.handler")
    async with db.conn() as conn:
        await queue.claim(db, conn, 1, lease, handlers, [1], [1], [0])
        await bench.advance(timedelta(seconds=2))
        assert (await queue.poll(db, conn, 2, handlers, lease)).suspects == 1
        assert len(await queue.reclaim(db, conn, 2, lease, handlers)) == 1


async def test_a_worker_that_made_room_for_suspects_goes_on_when_another_took_them(db: Database):
    inside, go = asyncio.Event(), asyncio.Event()

    async def handle(records: Records) -> None:
        inside.set()
        await go.wait()

    bench = await one_handler(db, handle)
    handlers = await bench.column("select id from anton.handler")
    await bench.add("a", [{"n": 1}])
    async with bench.running() as worker:
        await inside.wait()
        async with db.conn() as conn:
            async with conn.transaction():                              # a job that this worker never sees ready
                await conn.execute("insert into a (data) values ($1)", {"n": 2})
                lost = await queue.claim(db, conn, 0, timedelta(minutes=1), handlers, [9], [9], [0])
                await conn.execute("update anton.lease set lease_until = '-infinity' where worker_id = 0")
            assert len(lost) == 1
            await met(lambda: worker._quiet)
            [job] = await queue.reclaim(db, conn, 0, timedelta(minutes=1), handlers)
            await queue.ack(db, conn, job.token, [job.id], 0, 0.0, 0)
        go.set()
        await bench.add("a", [{"n": 3}])
        await bench.until_done()
    assert await bench.value("select sum(n) from anton.receipt") == 3


async def test_a_lazy_claim_leaves_no_other_transaction_without_the_disk(db: Database):
    async with db.conn() as conn:
        await conn.execute("set synchronous_commit = on")
        for lazy, kept in ((True, "off"), (False, "on")):
            async with conn.transaction():
                await db.call(conn, "claim", 1, 1, [], [], [], [], timedelta(seconds=30), lazy)
                assert await conn.fetchval("show synchronous_commit") == kept
            assert await conn.fetchval("show synchronous_commit") == "on"


async def two_handlers(db: Database, slow: Any, quick: Any, jobs: int, records: int) -> Bench:
    """Both have so many jobs whose worker died."""
    def declare() -> None:
        Table("a").on_new_records(slow, name="slow", batch=100)
        Table("c").on_new_records(quick, name="quick", batch=100)

    bench = await Bench.make(db, declare)
    handlers = await bench.column("select id from anton.handler order by name desc")
    for table in ("a", "c"):
        for _ in range(jobs):
            await bench.add(table, ({"n": n} for n in range(records)))
    async with db.conn() as conn:
        await queue.claim(db, conn, 1, timedelta(minutes=1), handlers, [9, 9], [999, 999], [0, 0])
    await bench.sql("update anton.lease set lease_until = '-infinity'")
    return bench


async def test_suspects_of_a_quick_handler_wait_for_no_slow_one(db: Database):
    go, done = asyncio.Event(), 0

    async def slow(records: Records) -> None:
        await go.wait()

    async def quick(records: Records) -> None:
        nonlocal done
        done += len(records)

    bench = await two_handlers(db, slow, quick, jobs=4, records=50)    # two groups of a hundred records each
    suspects = asyncio.create_task(bench.worker().run_suspects())
    await met(lambda: done == 200)
    go.set()
    assert await asyncio.wait_for(suspects, PATIENCE) == 400 and await bench.left() == {}


async def test_suspects_that_died_in_a_group_have_the_process_to_themselves(db: Database):
    inside: set[str] = set()
    beside: list[set[str]] = []

    def handler(name: str) -> Any:
        async def handle(records: Records) -> None:
            inside.add(name)
            for _ in range(20):                                        # longer than it takes to claim the next ones
                await bench.value("select 1")
                beside.append(set(inside))
            inside.remove(name)

        return handle

    bench = await two_handlers(db, handler("slow"), handler("quick"), jobs=2, records=2)
    await bench.sql("update anton.lease l set together = 1 from anton.handler h "
                    "where h.id = l.handler_id and h.name = 'slow'")
    assert await asyncio.wait_for(bench.worker().run_suspects(), PATIENCE) == 8 and await bench.left() == {}
    assert {frozenset(found) for found in beside} == {frozenset({"slow"}), frozenset({"quick"})}


async def test_a_process_for_suspects_that_finds_no_database_ends_in_peace():
    away = Database(f"postgresql://postgres@127.0.0.1:{free_port()}/nowhere", source="test")
    assert await Worker(away, App("lease")).run_suspects() == 0


async def test_leases_whose_claim_a_blocked_loop_has_not_read_are_kept_and_no_others(db: Database):
    worker = Worker(db, App("lease"))
    await worker._begin()
    try:
        worker._claiming = 5
        assert worker._tokens()[0] == []                               # the loop was not blocked before
        assert worker._tokens()[0] == [5]                              # it has run nothing since
        lost = {5}
        worker._lost(lost)
        assert lost == set()                                           # it may hold nothing yet
        await met(lambda: not worker._pulse._asked)
        assert worker._tokens()[0] == []
    finally:
        worker._claiming = 0
        await worker._end()
