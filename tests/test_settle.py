"""Settle: a record fails, the world fails, a write is refused, a row changed, a call takes too long."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections import Counter
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from pydantic import BaseModel
from working import PATIENCE, Bench, met, numbers, one_handler

from anton import Ctx, Discard, Records, Retry, Table, settle
from anton.db import Conn, Database
from anton.errors import WorldError
from anton.fate import World, is_world, starved


class Refused(Exception):
    """A service said no. status_code: as http clients have it."""

    def __init__(self, status_code: int) -> None:
        super().__init__(f"status {status_code}")
        self.status_code = status_code


@pytest.mark.parametrize("size", [1, 7, 1000, 4000])
async def test_a_poison_record_is_split_off_and_innocents_run_again_at_most_four_times(db: Database, size: int):
    runs: Counter[int] = Counter()
    done: set[int] = set()

    def handle(records: Records) -> None:
        asked = numbers(records)
        assert not done & set(asked), "settled records ran again"
        runs.update(asked)
        if 0 in asked:
            raise ValueError("poison")
        done.update(asked)
        tables["b"].extend({"n": n} for n in asked)

    bench = await one_handler(db, handle, attempts=1)
    tables = bench.app.tables
    await bench.add("a", ({"n": n} for n in range(size)))
    await bench.work()
    assert max(runs.values()) <= 5                                      # once, and again at most 4 times
    assert sorted(await bench.column("select (data->>'n')::int from b")) == list(range(1, size))
    dead = await bench.sql("select reason, error, traceback, attempt from anton.dead")
    assert len(dead) == 1 and dead[0]["reason"] == "failed" and dead[0]["error"] == "ValueError: poison"
    assert "in handle" in dead[0]["traceback"] and await bench.left() == {"dead": 1}


async def test_a_record_of_one_call_each_fails_alone(db: Database):
    runs: Counter[int] = Counter()

    async def handle(record: Any) -> None:
        runs[record["n"]] += 1
        if record["n"] % 10 == 0:
            raise ValueError(record["n"])

    bench = await one_handler(db, handle, each=True, attempts=1)
    await bench.add("a", ({"n": n} for n in range(300)))
    await bench.work()
    assert set(runs.values()) == {1} and await bench.left() == {"dead": 30}


async def test_a_failed_record_is_retried_with_backoff_until_it_is_dead(db: Database):
    attempts: list[tuple[int, str]] = []

    def handle(record: Any, ctx: Ctx) -> None:
        attempts.append((ctx.attempt, ctx.key))
        raise ValueError("never")

    bench = await one_handler(db, handle, each=True, attempts=3, backoff="10s")
    await bench.add("a", [{"n": 1}])
    await bench.work()
    first = await bench.value("select run_at - anton.now() from anton.delayed")
    assert timedelta(seconds=7) < first < timedelta(seconds=13)
    await bench.work()
    assert len(attempts) == 1                                           # it is not due
    await bench.advance(timedelta(seconds=13))
    await bench.work()
    second = await bench.value("select run_at - anton.now() from anton.delayed")
    assert timedelta(seconds=14) < second < timedelta(seconds=26)
    await bench.advance(timedelta(seconds=26))
    await bench.work()
    assert [attempt for attempt, _ in attempts] == [1, 2, 3] and len({key for _, key in attempts}) == 1
    assert await bench.value("select attempt from anton.dead") == 3 and await bench.left() == {"dead": 1}


async def test_a_dead_letter_is_replayed_under_its_old_key(db: Database):
    keys: list[str] = []
    broken = True

    def handle(record: Any, ctx: Ctx) -> None:
        keys.append(ctx.key)
        if broken:
            raise ValueError("not yet")

    bench = await one_handler(db, handle, each=True, attempts=1)
    await bench.add("a", [{"n": 1}])
    await bench.work()
    broken = False
    await bench.sql("select anton.replay('handle')")
    await bench.work()
    assert len(keys) == 2 and keys[0] == keys[1] and await bench.left() == {}


async def test_retry_and_discard_settle_the_record_that_raised_them(db: Database):
    runs: Counter[int] = Counter()

    def handle(records: Records) -> None:
        for record in records:
            runs[record["n"]] += 1
            if record["n"] == 3 and runs[3] == 1:
                raise Retry("later", after="1h")
            if record["n"] == 5:
                raise Discard("no use")
            tables["b"].append({"n": record["n"]})

    bench = await one_handler(db, handle)
    tables = bench.app.tables
    await bench.add("a", ({"n": n} for n in range(100)))
    await bench.work()
    assert await bench.value("select count(distinct data->>'n') from b") == 98 == await bench.count("b")
    assert [tuple(row) for row in await bench.sql("select reason, error from anton.dead")] == [("discarded", "no use")]
    assert [tuple(row) for row in await bench.sql("select attempt, error from anton.delayed")] == [(1, "later")]
    assert max(runs.values()) <= 5
    await bench.advance(timedelta(hours=1))
    await bench.work()
    assert await bench.count("b") == 99 and await bench.left() == {"dead": 1}


async def test_a_context_settles_single_records_of_a_batch_and_drops_their_writes(db: Database):
    def handle(records: Records, ctx: Ctx) -> None:
        for record in records:
            tables["b"].append({"n": record["n"]})
            if record["n"] % 10 == 1 and ctx.attempt == 1:
                ctx.retry(record, after="5m")
            if record["n"] % 10 == 2:
                ctx.discard(record, "two")

    bench = await one_handler(db, handle)
    tables = bench.app.tables
    await bench.add("a", ({"n": n} for n in range(50)))
    await bench.work()
    assert await bench.count("b") == 40 and await bench.left() == {"delayed": 5, "dead": 5}
    await bench.advance(timedelta(minutes=5))
    await bench.work()
    assert await bench.count("b") == 45 and await bench.left() == {"dead": 5}
    assert await bench.value("select sum(n) from anton.receipt") == 45


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("deferred", ["", "deferrable initially deferred"])
async def test_a_refused_write_is_blamed_on_its_record_and_no_handler_runs_again(
    db: Database, each: bool, deferred: str
):
    runs: Counter[int] = Counter()

    def batch(records: Records) -> None:
        for record in records:
            one(record)

    def one(record: Any) -> None:
        runs[record["n"]] += 1
        tables["out"].append({"n": record["n"], "parent": record["n"] % 20})
        tables["b"].append({"n": record["n"]})

    async with db.conn() as conn:
        await conn.execute("create table parent (id int primary key)")
        await conn.execute("insert into parent select generate_series(1, 19)")
        await conn.execute(f"create table out (id bigint generated always as identity primary key, n int, "
                           f"parent int references parent {deferred})")

    def declare() -> None:
        Table("b"), Table("out")
        Table("a").on_new_records(name="handle", attempts=1, each=each)(one if each else batch)

    bench = await Bench.make(db, declare)
    tables = bench.app.tables
    await bench.add("a", ({"n": n} for n in range(100)))
    await bench.work()
    assert set(runs.values()) == {1}
    assert await bench.count("out") == 95 == await bench.count("b")
    assert await bench.left() == {"dead": 5}
    assert all("out_parent_fkey" in error for error in await bench.column("select error from anton.dead"))


async def test_a_refused_write_that_nobody_can_be_found_for_runs_its_own_flush_again_and_nothing_that_was_settled(
    db: Database, caplog: Any
):
    runs: Counter[int] = Counter()
    go = threading.Event()

    def handle(record: Any) -> None:
        runs[record["n"]] += 1
        if runs.total() == 101:
            go.wait(PATIENCE)
        tables["b"].append({"n": record["n"]})

    bench = await one_handler(db, handle, each=True, concurrency=1)
    tables = bench.app.tables
    await bench.sql("create sequence checked")
    await bench.sql("""create function odd() returns trigger language plpgsql as $$
      begin
        if nextval('checked') = 150 then                                -- not when it is tried again
          raise check_violation using message = 'no, and it cannot be seen why';
        end if;
        return null;
      end $$""")
    await bench.sql("create constraint trigger odd after insert on b deferrable initially deferred "
                    "for each row execute function odd()")
    await bench.add("a", ({"n": n} for n in range(200)))
    async with bench.running():
        await bench.until("select count(*) = 100 from b")
        settled = await bench.column("select (data->>'n')::int from b")
        go.set()
        await bench.until_done()
    assert await bench.value("select count(distinct data->>'n') from b") == 200 == await bench.count("b")
    assert {runs[n] for n in settled} == {1} and max(runs.values()) == 2
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_refused_write_of_the_whole_batch_fails_the_call(db: Database):
    async with db.conn() as conn:
        await conn.execute(
            "create table total (id bigint generated always as identity primary key, n int check (n < 20))"
        )

    def handle(records: Records) -> None:
        tables["total"].append({"n": sum(numbers(records))}, of=records)

    def declare() -> None:
        Table("total")
        Table("a").on_new_records(name="handle", attempts=1)(handle)

    bench = await Bench.make(db, declare)
    tables = bench.app.tables
    await bench.add("a", ({"n": n} for n in (1, 2, 3, 40)))
    await bench.work()
    assert sorted(await bench.column("select n from total")) == [1, 2, 3] and await bench.left() == {"dead": 1}


async def test_a_row_that_changed_runs_its_record_again_and_only_that(db: Database):
    runs: Counter[int] = Counter()

    async def handle(records: Records) -> None:
        for record in records:
            runs[record["n"]] += 1
            count = (await tables["b"].select(id=1))[0]
            if record["n"] == 3 and runs[3] == 1:
                async with db.conn() as conn:
                    await conn.execute("update b set data = '{\"n\": 100}' where id = 1")
            if record["n"] == 3:
                tables["b"].select(id=1).update(n=count["n"] + 1)
            tables["c"].append({"n": record["n"]})

    def declare() -> None:
        Table("b"), Table("c")
        Table("a").on_new_records(name="handle")(handle)

    bench = await Bench.make(db, declare)
    tables = bench.app.tables
    await bench.add("b", [{"n": 0}])
    await bench.add("a", ({"n": n} for n in range(10)))
    await bench.work()
    assert await bench.value("select data->>'n' from b") == "101"
    assert await bench.count("c") == 10 and runs[3] == 2 and sum(runs.values()) == 11


@pytest.mark.parametrize("each", [False, True])
async def test_eight_workers_that_increment_one_row_end_at_the_exact_sum(db: Database, each: bool):
    async def one(record: Any) -> None:
        found = (await tables["b"].select(id=1))[0]
        tables["b"].select(id=1).update(n=found["n"] + record["n"])

    async def batch(records: Records) -> None:
        for record in records:
            await one(record)

    bench = await one_handler(db, one if each else batch, each=each, batch=5)
    tables = bench.app.tables
    await bench.add("b", [{"n": 0}])
    for n in range(12):
        await bench.add("a", ({"n": n * 5 + m} for m in range(5)))
    await asyncio.gather(*(bench.work() for _ in range(8)))
    for _ in range(20):
        if not await bench.count("anton.delayed"):
            break
        await bench.advance(timedelta(seconds=2))
        await bench.work()
    assert await bench.left() == {} and await bench.value("select (data->>'n')::int from b") == sum(range(60))


@pytest.mark.parametrize("each", [False, True])
async def test_when_the_world_fails_nothing_is_split_and_one_record_probes_until_it_is_back(db: Database, each: bool):
    calls: list[int] = []
    down = True

    def batch(records: Records) -> None:
        calls.append(len(records))
        if down:
            raise Refused(503)

    def one(record: Any) -> None:
        calls.append(1)
        if down:
            raise Refused(503)

    bench = await one_handler(db, one if each else batch, each=each, attempts=1, concurrency=1)
    await bench.add("a", ({"n": n} for n in range(500)))
    await bench.work()
    assert calls == [1 if each else 500] and "dead" not in await bench.left()
    assert (
        await bench.value("select failing_error from anton.handler where failing_since is not null")
        == "Refused: status 503"
    )
    calls.clear()
    await bench.work()
    assert calls == []                                                  # the probe is not due
    await bench.advance(timedelta(seconds=2))
    await bench.work()
    assert calls == [1]
    down = False
    await bench.advance(timedelta(minutes=2))
    await bench.work()
    assert sum(calls) == 501 and calls[1] == 1 and await bench.left() == {}
    assert await bench.value("select count(*) from anton.handler where failing_since is not null") == 0


async def test_records_that_were_done_before_the_world_failed_stay_done(db: Database):
    runs: Counter[int] = Counter()

    def handle(record: Any) -> None:
        runs[record["n"]] += 1
        if record["n"] == 50 and runs[50] == 1:
            raise ConnectionResetError
        tables["b"].append({"n": record["n"]})

    bench = await one_handler(db, handle, each=True, concurrency=1)
    tables = bench.app.tables
    await bench.add("a", ({"n": n} for n in range(100)))
    await bench.work()
    assert await bench.count("b") == 50 and await bench.left() == {"job": 1}
    await bench.advance(timedelta(seconds=2))
    await bench.work()
    assert await bench.count("b") == 100 and runs.total() == 101 and await bench.left() == {}


@pytest.mark.parametrize(("error", "world"), [
    (ConnectionRefusedError(), True), (TimeoutError(), True), (WorldError("down"), True), (Refused(429), True),
    (Refused(500), True), (Refused(404), False), (ValueError(), False), (FileNotFoundError(2, "no"), False),
    (OSError(113, "no route"), True), (ExceptionGroup("two", [TimeoutError(), Refused(502)]), True),
    (ExceptionGroup("two", [TimeoutError(), ValueError()]), False),
])
def test_what_the_world_is_to_blame_for(error: Exception, world: bool):
    assert is_world(error) is world
    outer = RuntimeError("wrapped")
    outer.__cause__ = error
    assert is_world(outer) is world


def test_an_error_that_is_its_own_cause_is_looked_at_once():
    error, other = ValueError("x"), KeyError("y")
    error.__cause__ = error
    assert not is_world(error)
    error.__cause__, other.__cause__ = other, error
    assert not is_world(error)


def test_http_clients_that_cannot_reach_their_server_blame_the_world():
    httpx = pytest.importorskip("httpx")
    with pytest.raises(httpx.ConnectError) as caught:
        httpx.get("http://127.0.0.1:9")
    assert is_world(caught.value)


async def test_a_chain_without_end_is_cut_at_the_depth_limit_and_named(db: Database):
    def declare() -> None:
        ping, pong = Table("ping"), Table("pong")

        @ping.on_new_records
        def to_pong(records: Records) -> None:
            for record in records:
                pong.append({"n": record["n"] + 1})

        @pong.on_new_records
        def to_ping(records: Records) -> None:
            for record in records:
                ping.append({"n": record["n"] + 1})

    bench = await Bench.make(db, declare)
    await bench.sql("update anton.setting set value = '6' where name = 'depth_limit'")
    await bench.add("ping", [{"n": 0}])
    await bench.work()
    dead = await bench.sql("select reason, error from anton.dead")
    assert [row["reason"] for row in dead] == ["depth"] and await bench.left() == {"dead": 1}
    assert "to_pong" in dead[0]["error"] and "to_ping" in dead[0]["error"] and "limit is 6" in dead[0]["error"]
    assert await bench.count("ping") + await bench.count("pong") == 7


async def test_a_sql_handler_fails_for_its_bad_record_alone(db: Database):
    def declare() -> None:
        a = Table("a")
        Table("b")
        a.on_new_records.sql(
            "insert into b (data) select jsonb_build_object('n', 10 / (data->>'n')::int) from new_records",
            name="divide",
            attempts=1,
        )

    bench = await Bench.make(db, declare)
    await bench.add("a", ({"n": n} for n in range(600)))
    await bench.add("a", ({"n": n} for n in range(1, 5)))
    await bench.work()
    assert await bench.count("b") == 603 and await bench.left() == {"dead": 1}
    assert "division by zero" in await bench.value("select error from anton.dead")


async def test_a_settlement_that_deadlocks_is_tried_again(db: Database):
    def handle(records: Records) -> None:
        for _ in records:
            tables["b"].select(id=1).update(by="handler", on_conflict="overwrite")
            tables["b"].select(id=2).update(by="handler", on_conflict="overwrite")

    bench = await one_handler(db, handle)
    tables = bench.app.tables
    await bench.add("b", [{}, {}])
    await bench.add("a", [{"n": 1}])
    async with db.conn() as conn, bench.running():
        async with conn.transaction():
            await conn.execute("set local deadlock_timeout = '10s'")    # the worker's backend is the victim
            await conn.execute("update b set data = '{}' where id = 2")
            await bench.until("select exists (select from pg_stat_activity where wait_event_type = 'Lock' "
                              "and datname = current_database())")
            await conn.execute("update b set data = '{}' where id = 1")
        await bench.until_done()
    assert await bench.column("select data->>'by' from b") == ["handler", "handler"]


async def test_deleted_records_whose_filter_fails_reach_the_handler(db: Database):
    seen: list[int] = []

    def declare() -> None:
        @Table("a").on_deleted_records(where="(data ->> 'n')::int >= 0")
        def gone(records: Records) -> None:
            seen.extend(change.key for change in records.changes)

    bench = await Bench.make(db, declare)
    await bench.add("a", [{"n": "1"}, {"n": "bad"}, {"n": "3"}])
    await bench.sql("delete from a")
    await bench.work()
    assert len(seen) == 3


async def test_a_key_that_moved_leaves_its_first_record_to_a_sql_handler(db: Database):
    def declare() -> None:
        table = Table("kept")
        table.on_updated_records(lambda records: None, name="updated")
        table.on_new_records.sql("insert into kept_out select id, s from new_records", name="keep")

    await _sql(db, "create table kept (id bigint primary key, s text); create table kept_out (id bigint, s text)")
    bench = await Bench.make(db, declare)
    await bench.sql("insert into kept values (1, 'a')")
    await bench.sql("update kept set id = 100")
    await bench.work()
    assert await bench.column("select id from kept_out order by id") == [1, 100]


async def test_two_reconciles_at_once_queue_what_was_missed_once(db: Database):
    bench = await one_handler(db, lambda records: None)
    async with db.tx() as conn:
        await conn.execute("set local session_replication_role = replica")
        await conn.execute("insert into a (data) values ('{}')")
    async with db.tx() as conn:
        assert await conn.fetchval("select found from anton.reconcile('a')") == 1
        second = asyncio.create_task(bench.value("select found from anton.reconcile('a')"))
        await bench.until("select exists (select from pg_locks where locktype = 'advisory' and not granted)")
    assert await asyncio.wait_for(second, PATIENCE) == 0
    assert await bench.count("anton.job") == 1


async def _sql(db: Database, text: str) -> None:
    async with db.conn() as conn:
        await conn.execute(text)


@pytest.mark.parametrize("each", [False, True])
async def test_a_handler_for_which_no_thread_can_be_started_waits_and_no_record_is_blamed(db: Database, each: bool):
    def batch(records: Records) -> None:
        tables["b"].extend({"n": n} for n in numbers(records))

    def one(record: Any) -> None:
        tables["b"].append({"n": record["n"]})

    bench = await one_handler(db, one if each else batch, each=each, attempts=1, concurrency=1)
    tables = bench.app.tables
    async with bench.running() as worker:
        await met(lambda: worker._heart is not None)
        usual = threading.stack_size(1 << 46)  # more than there is
        try:
            await bench.add("a", ({"n": n} for n in range(20)))
            error = await bench.until("select max(failing_error) from anton.handler")
        finally:
            threading.stack_size(usual)
        assert "no thread for a handler" in error
    await bench.advance(timedelta(minutes=2))
    await bench.work()
    assert await bench.count("b") == 20 and await bench.left() == {}


@pytest.mark.parametrize("each", [False, True])
async def test_a_handler_whose_table_lost_a_column_names_it_and_waits_until_it_is_back(db: Database, each: bool):
    def batch(records: Records) -> None:
        for record in records:
            one(record)

    def one(record: Any) -> None:
        tables["b"].append({"v": record["v"]})

    async with db.conn() as conn:
        await conn.execute("create table plain (id bigint primary key, v text)")
    bench = await one_handler(db, one if each else batch, "plain", each=each, attempts=1)
    tables = bench.app.tables
    await bench.sql("alter table plain rename v to w")
    await bench.sql("insert into plain select n, 'v' from generate_series(1, 20) n")
    await bench.work()
    assert 'no column "v" any more' in await bench.value("select failing_error from anton.handler")
    assert await bench.count("anton.dead") == 0
    await bench.sql("alter table plain rename w to v")
    await bench.advance(timedelta(minutes=2))
    await bench.work()
    assert await bench.left() == {} and await bench.count("b") == 20


class Typed(BaseModel):
    id: int
    v: str
    note: str = "none"


@pytest.mark.parametrize("column", ["v", "note"])
@pytest.mark.parametrize("each", [False, True])
async def test_a_model_whose_table_lost_a_column_makes_the_handler_wait(db: Database, each: bool, column: str):
    seen: list[int] = []

    def declare() -> None:
        typed = Table("typed", model=Typed, key="id")
        typed.on_new_records(name="h", each=each, attempts=1)(one if each else batch)

    def batch(records: Records[Typed]) -> None:
        for record in records:
            one(record)

    def one(record: Typed) -> None:
        seen.append(record.id)

    bench = await Bench.make(db, declare)
    await bench.sql(f"alter table typed rename {column} to elsewhere")
    other = "note" if column == "v" else "v"
    await bench.sql(f"insert into typed (id, {other}, elsewhere) select n, 'x', 'x' from generate_series(1, 20) n")
    await bench.work()
    assert f'no column "{column}" any more' in await bench.value("select failing_error from anton.handler")
    assert await bench.count("anton.dead") == 0 and not seen
    await bench.sql(f"alter table typed rename elsewhere to {column}")
    await bench.advance(timedelta(minutes=2))
    await bench.work()
    assert await bench.left() == {} and sorted(seen) == list(range(1, 21))


async def _plain(db: Database, handle: Any, op: str, **options: Any) -> Bench:
    async with db.conn() as conn:
        await conn.execute("create table plain (id bigint primary key, v text, n int)")

    def declare() -> None:
        getattr(Table("plain"), f"on_{op}_records")(name="h", attempts=1, **options)(handle)

    return await Bench.make(db, declare)


@pytest.mark.parametrize("each", [False, True])
async def test_a_deleted_record_of_which_only_the_key_is_left_fails_alone(db: Database, each: bool):
    seen: list[str] = []

    def one(record: Any) -> None:
        seen.append(record["v"])

    def batch(records: Records) -> None:
        for record in records:
            one(record)

    bench = await _plain(db, one if each else batch, "deleted", each=each, where="1 / n > 0")
    await bench.sql("insert into plain values (1, 'a', 0), (2, 'b', 1)")
    await bench.sql("delete from plain where id = 1")
    await bench.work()
    assert await bench.left() == {"dead": 1} and await bench.value("select failing_error from anton.handler") is None
    await bench.sql("delete from plain where id = 2")
    await bench.work()
    assert seen == ["b"]


@pytest.mark.parametrize("op", ["new", "deleted"])
async def test_an_image_captured_while_a_column_was_away_is_its_records_failure(db: Database, op: str):
    seen: list[str] = []

    def handle(record: Any) -> None:
        seen.append(record["v"])

    bench = await _plain(db, handle, op, each=True, read="change")
    await bench.sql("alter table plain rename v to w")
    await bench.sql("insert into plain values (1, 'a', 1)")
    await bench.sql("delete from plain")
    await bench.work()
    assert await bench.left() == {"dead": 1} and await bench.value("select failing_error from anton.handler") is None
    await bench.sql("alter table plain rename w to v")
    await bench.sql("insert into plain values (2, 'b', 1)")
    await bench.sql("delete from plain")
    await bench.work()
    assert seen == ["b"] and await bench.left() == {"dead": 1}


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("name", ["v", ["v"]])
async def test_a_key_error_of_something_else_is_the_records_failure_though_a_column_went(
    db: Database, each: bool, name: Any
):
    def one(record: Any) -> None:
        assert record.get("v") is None and dict(record) == {"id": 1, "n": 1}
        raise KeyError(name)

    def batch(records: Records) -> None:
        for record in records:
            one(record)

    bench = await _plain(db, one if each else batch, "new", each=each)
    await bench.sql("alter table plain drop column v")
    await bench.sql("insert into plain values (1, 1)")
    await bench.work()
    assert await bench.left() == {"dead": 1} and "KeyError" in await bench.value("select error from anton.dead")


async def test_a_transaction_that_is_cut_off_again_and_again_is_the_world_s_failure_in_the_end(
        db: Database, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(settle, "BREAKS", 3)
    tried = 0

    async def work(conn: Conn) -> None:
        nonlocal tried
        tried += 1
        await conn.fetchval("select pg_terminate_backend(pg_backend_pid())")

    with pytest.raises(World):
        await settle.Settler(db).transact(work)
    assert tried == 3


def test_that_there_is_no_memory_is_seen_behind_what_the_driver_says_of_it() -> None:
    def encode() -> None:
        try:
            raise MemoryError
        except MemoryError as error:
            raise asyncpg.DataError("invalid input for query argument $8: True ()") from error

    with pytest.raises(asyncpg.DataError) as raised:
        encode()
    assert starved(raised.value) and not starved(asyncpg.DataError("invalid input")) and not starved(None)


def test_a_worker_process_without_memory_for_its_own_work_ends_and_says_so() -> None:
    code = ("import logging; logging.basicConfig(); from anton.supervisor import _end_starved; "
            "_end_starved(ValueError()); print('lives', flush=True); _end_starved(MemoryError()); print('lives on')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "lives\n") and "no memory left" in done.stderr
