"""Limits: concurrency=N holds over all processes, whoever dies; nobody but a handler with a limit has permits."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pg import Pg
from working import Bench, met, one_handler

from anton import Table
from anton.app import App, declaring
from anton.db import Database
from anton.errors import BadOption
from anton.gate import Gate
from anton.permits import Permits

LEASE = "30 s"
WAITS = "waits for a permit: all 1 of its concurrency are in use"
ANTON = [sys.executable, "-c", "import sys; from anton.cli import main; sys.exit(main())"]


class Desk(Pg):
    """A session on a database with a handler h that has a limit."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.h = self.ahead = 0

    def take(self, worker: int, wanted: int, more: bool = True) -> int:
        return int(self.value("select anton.permit(%s, %s, %s, %s, %s)", worker, self.h, wanted, LEASE, more))

    def valid(self) -> int:
        return int(self.value("select anton.permits_used(%s)", self.h))

    def advance(self, seconds: int) -> None:
        """Moves anton.now(), from now on."""
        self.ahead += seconds
        self.sql("create or replace function anton.now() returns timestamptz language sql volatile as "
                 f"$$select pg_catalog.clock_timestamp() + interval '{self.ahead} s'$$")

    def keep(self, worker: int) -> dict[int, int]:
        return dict(self.sql("select * from anton.keep_permits(%s, %s)", args=(worker, LEASE)))


@pytest.fixture
def desk(pg: Pg) -> Iterator[Desk]:
    desk = Desk(pg.url)
    desk.sql("create table orders (id bigint generated always as identity primary key)")
    desk.h = desk.listen("orders", "new", name="h")
    desk.sql("select anton.set_limit(%s, 5)", args=(desk.h,))
    yield desk
    desk.conn.close()


def test_no_more_permits_are_held_than_the_limit_and_what_is_given_back_is_free(desk: Desk) -> None:
    assert (desk.take(1, 3), desk.take(2, 3), desk.take(3, 1)) == (3, 2, 0)
    assert desk.valid() == 5
    assert desk.take(1, 1) == 1 and desk.take(3, 9) == 2
    assert desk.take(1, 0) == 0 and desk.valid() == 4


def test_two_who_take_at_once_never_get_the_same(desk: Desk) -> None:
    other = Desk(desk.url)
    other.h = desk.h
    with desk.conn.transaction():
        assert desk.take(1, 3) == 3
        assert other.take(2, 5) == 2                                   # the others are locked, and not waited for
    assert desk.valid() == 5
    other.conn.close()


def test_permits_run_out_and_are_not_revived(desk: Desk) -> None:
    assert desk.take(1, 4) == 4
    desk.advance(20)
    assert desk.keep(1) == {desk.h: 4}
    desk.advance(20)
    assert desk.valid() == 4
    desk.advance(20)
    assert desk.valid() == 0 and desk.keep(1) == {}
    assert desk.take(2, 5) == 5 and desk.take(1, 5) == 0


def test_what_is_kept_of_permits_that_are_given_back_lasts_a_lease_from_then(desk: Desk) -> None:
    assert desk.take(1, 4) == 4
    desk.advance(20)
    assert desk.take(1, 2) == 2
    desk.advance(20)
    assert desk.valid() == 2 and desk.take(2, 5) == 3


def test_who_sees_a_worker_die_frees_its_permits(desk: Desk) -> None:
    worker = desk.value("select anton.register_worker('test', 'here', 1, '1')")
    assert desk.take(worker, 5) == 5
    desk.sql("select anton.worker_died(%s)", args=(worker,))
    assert desk.valid() == 0


def suspect(desk: Desk, worker: int, until: str) -> None:
    """A job of the handler that this worker holds until then."""
    desk.sql("insert into orders default values")
    job = desk.value("select id from anton.claim(%s, 7, array[%s], array[1], array[1], array[0], '30 s')", worker,
                     desk.h)
    desk.sql("update anton.lease set lease_until = %s where id = %s", args=(until, job))


def test_one_permit_is_left_to_whoever_runs_the_jobs_of_the_dead(desk: Desk) -> None:
    suspect(desk, 1, "-infinity")
    assert desk.take(2, 5) == 4
    assert desk.value("select anton.permit(3, %s, 5, %s, true, true)", desk.h, LEASE) == 1


def test_who_has_a_handler_with_per_alone_is_told_only_when_nobody_else_holds_any_of_it(desk: Desk) -> None:
    desk.sql("update anton.handler set per = 'id'")
    desk.sql("select anton.set_limit(%s, 1)", args=(desk.h,))
    suspect(desk, 1, "infinity")
    assert desk.take(2, 1) == 0
    assert desk.take(1, 1) == 1 and desk.take(1, 0) == 0
    desk.sql("delete from anton.lease")
    assert desk.take(2, 1) == 1


def test_a_worker_takes_its_share_first(desk: Desk) -> None:
    workers = [desk.value("select anton.register_worker('test', 'here', 1, '1')") for _ in range(2)]
    assert desk.take(workers[0], 5, more=False) == 3
    assert desk.take(workers[1], 5, more=False) == 2
    assert desk.take(workers[1], 0) == 0
    assert desk.take(workers[0], 5, more=False) == 3 and desk.take(workers[0], 5) == 5


def test_a_lower_limit_takes_permits_away_and_none_takes_all(desk: Desk) -> None:
    assert desk.take(1, 5) == 5
    desk.sql("select anton.set_limit(%s, 2)", args=(desk.h,))
    assert desk.valid() == 2 and desk.keep(1) == {desk.h: 2}
    desk.sql("select anton.set_limit(%s, null)", args=(desk.h,))
    assert desk.value("select count(*) from anton.permit") == 0


STEPS = st.lists(st.one_of(
    st.tuples(st.just("take"), st.integers(1, 3), st.integers(0, 6)),
    st.tuples(st.just("keep"), st.integers(1, 3), st.just(0)),
    st.tuples(st.just("pass"), st.just(0), st.integers(1, 40)),
    st.tuples(st.just("die"), st.integers(1, 3), st.just(0)),
), max_size=20)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_whatever_is_done_what_workers_believe_to_hold_is_within_the_limit(desk: Desk, steps: Any) -> None:
    """Each believes what it was told, for a lease from then on: that is never more than there are."""
    desk.sql("update anton.permit set worker_id = null, lease_until = '-infinity'")
    held, until, at = {1: 0, 2: 0, 3: 0}, {1: 0, 2: 0, 3: 0}, 0
    for step, worker, n in steps:
        if step == "take":
            held[worker], until[worker] = desk.take(worker, n), at + 30
        elif step == "keep":
            held[worker], until[worker] = desk.keep(worker).get(desk.h, 0), at + 30
        elif step == "pass":
            desk.advance(n)
            at += n
        else:
            desk.sql("select anton.worker_died(%s)", args=(worker,))
            held[worker] = 0
        assert sum(held[one] for one in held if until[one] > at) <= 5


def test_a_permit_counts_no_longer_than_a_lease_from_before_it_was_asked_for() -> None:
    own = Permits(5)
    own.got(3, time.monotonic() - 31, timedelta(seconds=30))
    assert own.room() == 0
    own.got(3, time.monotonic(), timedelta(seconds=30))
    assert own.room() == 3


@pytest.mark.parametrize("each", [True, False])
async def test_the_limit_holds_over_several_workers_and_all_is_done(db: Database, each: bool) -> None:
    inside = {"now": 0, "most": 0, "done": 0}

    async def handle(what: Any) -> None:
        inside["now"] += 1
        inside["most"] = max(inside["most"], inside["now"])
        await asyncio.sleep(0.001)
        inside["now"] -= 1
        inside["done"] += 1 if each else len(what)

    bench = await one_handler(db, handle, each=each, concurrency=3, batch=5)
    async with bench.running(), bench.running(), bench.running():
        for _ in range(4):
            await bench.add("a", ({} for _ in range(40)))
        await bench.until_done()
        await bench.until("select anton.permits_used(id) = 0 from anton.handler")   # idle: given back
    assert inside["done"] == 160 and 1 <= inside["most"] <= 3
    assert await bench.left() == {}


async def test_each_key_has_its_own_limit_over_all_workers_and_none_waits_for_another(db: Database) -> None:
    inside: dict[str, int] = {}
    most: dict[str, int] = {}
    together = 0

    async def handle(record: Any) -> None:
        nonlocal together
        key = record["c"]
        inside[key] = inside.get(key, 0) + 1
        most[key] = max(most.get(key, 0), inside[key])
        together = max(together, sum(inside.values()))
        await asyncio.sleep(0.001)
        inside[key] -= 1

    bench = await one_handler(db, handle, each=True, concurrency=2, per="c", batch=5)
    async with bench.running(), bench.running(), bench.running():
        for _ in range(4):
            await bench.add("a", ({"c": "hot" if n % 2 else str(n)} for n in range(60)))
        await bench.until_done()
        await bench.until("select anton.permits_used(id) = 0 from anton.handler")
    assert await bench.left() == {}
    assert most["hot"] == 2 and max(most.values()) == 2 and together > 4


async def test_threads_keep_to_the_limit_of_a_key_and_a_failing_record_frees_it(db: Database) -> None:
    lock, inside, most, seen = threading.Lock(), {"now": 0}, {"now": 0}, set[int]()

    def handle(record: Any) -> None:
        with lock:
            inside["now"] += 1
            most["now"] = max(most["now"], inside["now"])
            first = record["n"] not in seen
            seen.add(record["n"])
        time.sleep(0.012)                                              # slow enough for more threads to help
        with lock:
            inside["now"] -= 1
        if first and record["n"] % 3 == 0:
            raise ValueError("once")

    bench = await one_handler(db, handle, each=True, concurrency=2, per="c", backoff="1ms")
    await bench.add("a", ({"c": None, "n": n} for n in range(30)))
    async with bench.running():
        await bench.until_done()
    assert most["now"] == 2 and len(seen) == 30
    assert await bench.left() == {}


@pytest.mark.parametrize("per", [None, "c"])
async def test_a_record_that_runs_again_as_its_row_changed_keeps_to_the_limit_too(
        db: Database, per: str | None) -> None:
    inside, most, runs = 0, 0, list[int]()

    async def handle(record: Any) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        row = await tally.aget(1)
        assert row is not None
        runs.append(record["n"])
        if runs.count(record["n"]) == 1:                               # somebody else changes what it has read
            await bench.sql("update tally set data = data || '{\"n\": 1}'")
        await asyncio.sleep(0.002)
        tally.select(id=1).update(by=record["n"])
        inside -= 1

    def declare() -> None:
        nonlocal tally
        tally = Table("tally")
        Table("a").on_new_records(each=True, concurrency=1, name="handle", per=per)(handle)

    tally: Any = None
    bench = await Bench.make(db, declare)
    await bench.add("tally", [{}])
    await bench.add("a", ({"c": 1, "n": n} for n in range(30)))
    async with bench.running():
        await bench.until_done()
    assert len(runs) > 30 and most == 1


async def test_when_the_world_fails_what_waits_for_its_key_goes_back(db: Database) -> None:
    calls = 0

    async def handle(record: Any) -> None:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0)
        if calls == 3:
            raise ConnectionError("away")

    bench = await one_handler(db, handle, each=True, concurrency=1, per="c")
    await bench.add("a", ({"c": 1} for _ in range(40)))
    async with bench.running():
        await bench.until_done()
    assert calls >= 41 and await bench.left() == {}


@pytest.mark.parametrize(("options", "says"), [
    ({"per": "c", "concurrency": 2}, "each=True"),
    ({"per": "c", "each": True}, "concurrency=N"),
    ({"per": 3, "each": True, "concurrency": 2}, "the name of a column"),
])
def test_per_is_refused_where_it_could_not_hold(options: dict[str, Any], says: str) -> None:
    with declaring(App("t")), pytest.raises(BadOption, match=says):
        Table("a").on_new_records(name="h", **options)(lambda record: None)


async def test_per_names_a_column_that_the_table_has(db: Database) -> None:
    async with db.conn() as conn:
        await conn.execute("create table public.old (id int primary key, customer text)")
    with pytest.raises(Exception, match='no column "custmer"'):
        await one_handler(db, lambda record: None, "old", each=True, concurrency=1, per="custmer")
    bench = await one_handler(db, lambda record: None, "old", each=True, concurrency=3, per="customer")
    shown = await bench.value("select anton.show_handler('handle')")
    assert (shown["limit"], shown["per"], shown["held_by"]) == (3, "customer", None)


MOVES = st.lists(st.tuples(st.sampled_from(["enter", "leave", "drop"]), st.sampled_from("abc")), max_size=60)


@given(most=st.integers(1, 3), moves=MOVES)
def test_a_gate_lets_in_no_more_than_the_limit_and_nobody_waits_in_vain(most: int, moves: Any) -> None:
    gate, inside, aside = Gate("c", most), dict.fromkeys("abc", 0), {key: list[Any]() for key in "abc"}

    def enter(key: str, entry: Any) -> None:
        if gate.enter(key, entry):
            inside[key] += 1
        else:
            aside[key].append(entry)

    for n, (move, key) in enumerate(moves):
        if move == "enter":
            enter(key, (key, n))
        elif move == "leave" and inside[key]:
            inside[key] -= 1
            entry = gate.leave(key)
            assert (entry is not None) == bool(aside[key])
            if entry is not None:
                aside[key].remove(entry)
                enter(key, entry)
        elif move == "drop":
            assert sorted(gate.drop(key)) == sorted(item for _, item in aside[key])
            aside[key].clear()
        assert all(inside[one] <= most and (not aside[one] or inside[one] == most) for one in "abc")


async def test_who_runs_the_jobs_of_the_dead_asks_again_for_a_permit_that_was_lost_meanwhile(db: Database) -> None:
    taken, done = asyncio.Event(), list[int]()

    async def handle(record: Any) -> None:
        if not done:
            await bench.sql("update anton.permit set worker_id = 0, lease_until = 'infinity'")
            taken.set()
            await met(lambda: not worker._dispatcher.lanes[id].room)              # the heart told it
        done.append(record["n"])

    bench = await one_handler(db, handle, each=True, concurrency=1)
    id = await bench.value("select id from anton.handler")
    await bench.add("a", ({"n": n} for n in range(3)))
    await bench.sql("select count(*) from anton.claim(0, 7, array[$1::int], array[1], array[9], array[0], '30 s')", id)
    await bench.sql("update anton.lease set lease_until = '-infinity'")
    worker = bench.worker(lease=timedelta(seconds=0.6))
    running = asyncio.create_task(worker.run_suspects())
    await taken.wait()
    await met(lambda: bool(done))
    await bench.sql("update anton.permit set lease_until = '-infinity'")
    assert await asyncio.wait_for(running, 20) == 3
    assert sorted(done) == [0, 1, 2] and await bench.left() == {}


async def test_without_the_option_no_permit_is_there(db: Database) -> None:
    bench = await one_handler(db, lambda records: None)
    await bench.add("a", [{}])
    await bench.work()
    assert await bench.count("anton.permit") == 0


async def test_a_limit_that_is_taken_out_of_the_code_is_taken_out_of_the_database(db: Database) -> None:
    await one_handler(db, lambda records: None, concurrency=7)
    async with db.conn() as conn:
        assert await conn.fetchval("select count(*) from anton.permit") == 7
    bench = await one_handler(db, lambda records: None)
    assert await bench.count("anton.permit") == 0


MAIN = """
import os, psycopg
from anton import Table

@Table("a").on_new_records(each=True, concurrency=3, timeout="20s", per=os.environ["TEST_PER"] or None)
def hold(record):
    with psycopg.connect(os.environ["TEST_URL"], autocommit=True) as conn:
        row = (os.getpid(), record["c"])
        n = conn.execute("insert into seen (pid, c) values (%s, %s) returning id", row).fetchone()[0]
        conn.execute("select pg_sleep(0.02)")
        conn.execute("update seen set till = clock_timestamp() where id = %s", (n,))
"""


@pytest.mark.parametrize("per", ["", "c"])
def test_the_limit_holds_when_workers_are_killed_and_what_they_held_comes_back(
        pg: Pg, tmp_path: Path, per: str) -> None:
    """What a killed process ran counts until just before it was killed; all others until they were done."""
    (tmp_path / "main.py").write_text(MAIN)
    (tmp_path / "autonomous.json").write_text('{"name": "t"}')
    pg.sql("create table seen (id bigint generated always as identity, pid int, c int, "
           "since timestamptz default clock_timestamp(), till timestamptz)")
    environment = {**os.environ, "DATABASE_URL": pg.url, "TEST_URL": pg.url, "TEST_PER": per}

    def anton(*words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*ANTON, *words], cwd=tmp_path, env=environment, start_new_session=True,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert anton("migrate").wait(60) == 0
    for _ in range(10):
        pg.sql("insert into a (data) select jsonb_build_object('c', g % 3) from generate_series(1, 20) g")
    work = anton("work", "--processes", "3")
    try:
        for kill in range(1, 5):
            pid = until(pg, "select pid from seen where till is null and exists (select from seen having count(*) >= "
                            f"{kill * 25}) order by id desc limit 1")
            pg.sql("update seen set till = clock_timestamp() where till is null and pid = %s", args=(pid,))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(pg, "select not exists (select from anton.job) and not exists (select from anton.lease) "
                  "and not exists (select from anton.delayed)")
    finally:
        work.terminate()
        work.wait(60)
    same = "and t.c = s.c" if per else ""
    most = pg.value("select max((select count(*) from seen t where t.since <= s.since "
                    f"and t.till > s.since {same})) from seen s")
    assert 1 <= most <= 3
    assert pg.value("select count(*) from anton.dead") == 0
    assert pg.value("select sum(n) from anton.receipt") == 200


def until(pg: Pg, text: str, patience: float = 60.0) -> Any:
    """What the query gives as soon as that is a row with something true."""
    end = time.monotonic() + patience
    while not (rows := pg.sql(text)) or not rows[0][0]:
        assert time.monotonic() < end, text
        time.sleep(0.01)
    return rows[0][0]


async def test_status_why_and_show_say_that_records_wait_for_a_permit(db: Database) -> None:
    bench = await one_handler(db, lambda records: None, concurrency=1)
    await bench.add("a", [{}])
    id = await bench.value("select id from anton.handler")
    assert await bench.value("select why from anton.status") != WAITS
    await bench.sql("select anton.permit(1, $1, 1, '30 s')", id)
    await bench.sql("select anton.register_worker('t', 'here', 1, '1')")
    assert await bench.value("select why from anton.status") == WAITS
    assert WAITS in await bench.column("select error from anton.why('a', (select id::text from a))")
    shown = await bench.value("select anton.show_handler('handle')")
    assert (shown["limit"], shown["permits_used"]) == (1, 1)


async def test_a_handler_made_from_psql_has_a_limit_too(db: Database) -> None:
    bench = await one_handler(db, lambda records: None)
    await bench.sql("""select anton.handler('copy', 'a', 'new', 'select 1', '{"concurrency": 2}')""")
    assert await bench.count("anton.permit") == 2
    await bench.add("a", [{}])
    await bench.work()
    assert await bench.left() == {}


def test_asking_for_permits_reads_one_handlers_rows(desk: Desk) -> None:
    desk.sql("insert into anton.permit (handler_id, n) select id, g from generate_series(6, 20000) g, anton.handler")
    other = desk.listen("orders", "new", name="other")
    desk.sql("select anton.set_limit(%s, 3)", args=(other,))
    desk.sql("analyze anton.permit")
    desk.h = other
    before = scans(desk)
    assert desk.take(1, 2) == 2 and desk.take(1, 3) == 3 and desk.take(1, 0) == 0
    assert scans(desk) == before


def scans(desk: Desk) -> int:
    desk.sql("select pg_stat_force_next_flush()")
    return int(desk.value("select seq_scan from pg_stat_user_tables where relid = 'anton.permit'::regclass"))
