"""Rates: no window of time holds more starts than rate= says, over all processes; what is not used is given back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pg import Pg
from working import PATIENCE, Bench, met, one_handler

from anton import Table, queue
from anton.app import App, declaring
from anton.db import Database
from anton.errors import BadOption, DatabaseUnreachable
from anton.lane import Lane
from anton.rate import Meter, Tap, normal
from anton.testing import TestApp

SECOND = 1_000_000
ANTON = [sys.executable, "-c", "import sys; from anton.cli import main; sys.exit(main())"]


class Desk(Pg):
    """A session on a database with a handler h that has a rate, and a clock that stands still."""

    h: int

    def at(self, us: int) -> None:
        """Sets anton.now() to so many microseconds after the year 2030."""
        self.sql("create or replace function anton.now() returns timestamptz language sql volatile as "
                 f"$$select timestamptz '2030-01-01 00:00:00Z' + interval '{us} microseconds'$$")

    def take(self, wanted: int, back: dict[int, int] | None = None) -> dict[int, int]:
        back = back or {}
        ((slots, counts),) = self.sql("select slots, counts from anton.take_rate(1, %s, %s, %s::bigint[], %s::int[])",
                                      args=(self.h, wanted, [*back], [*back.values()]))
        return dict(zip(slots, counts, strict=True))


@pytest.fixture
def desk(pg: Pg) -> Iterator[Desk]:
    desk = Desk(pg.url)
    desk.sql("create table orders (id bigint generated always as identity primary key)")
    desk.h = desk.listen("orders", "new", name="h")
    desk.at(0)
    yield desk
    desk.conn.close()


MOVES = st.lists(st.tuples(st.integers(0, 400_000), st.integers(0, 30), st.sampled_from(["use", "give back", "die"])),
                 min_size=5, max_size=25)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(most=st.integers(1, 25), length=st.sampled_from(["100ms", "1s", "3s"]), moves=MOVES)
def test_no_window_holds_more_than_the_rate_whatever_is_asked_used_given_back_or_lost(
        desk: Desk, most: int, length: str, moves: list[tuple[int, int, str]]) -> None:
    """Each start is as late as its slot allows for the windows before, as early as it allows for those after."""
    desk.sql("select anton.set_rate(%s, null), anton.set_rate(%s, %s)", args=(desk.h, desk.h, f"{most}/{length}"))
    window = int(desk.value("select length_us from anton.rate"))
    slot = int(desk.value("select slot_us from anton.rate_slots(%s)", window))
    began: list[int] = []
    now, unused = 0, dict[int, int]()
    for pause, wanted, then in moves:
        now += pause
        desk.at(now)
        got = desk.take(wanted, unused)
        unused = {}
        for number, count in got.items():
            used = count // 2 if then == "give back" else count
            began += [number] * used
            if used < count:
                unused[number] = count - used
    began.sort()
    assert all((late - early - 1) * slot >= window for early, late in zip(began, began[most:], strict=False))


def test_what_is_given_back_is_there_again_and_what_is_lost_is_after_its_window(desk: Desk) -> None:
    desk.sql("select anton.set_rate(%s, '5/s')", args=(desk.h,))
    got = desk.take(9)
    assert got and desk.take(9) == {}
    assert desk.take(9, got) == got
    for n in range(1, 20):
        desk.at(n * 100_000)
        desk.take(1)
    assert 4 <= desk.value("select anton.rate_used(%s)", desk.h) <= 5
    desk.at(10 * SECOND)
    assert desk.take(1) != {}


def test_a_window_that_changes_and_a_clock_that_is_put_back_forget_no_start(desk: Desk) -> None:
    desk.sql("select anton.set_rate(%s, '2/10s')", args=(desk.h,))
    assert sum(desk.take(2).values()) == 1
    desk.sql("select anton.set_rate(%s, '1/20s')", args=(desk.h,))
    assert desk.take(2) == {}
    desk.at(-100 * SECOND)
    assert desk.take(2) == {}
    desk.at(-70 * SECOND)
    assert sum(desk.take(2).values()) == 1
    assert desk.value("select anton.waits_for(%s)", desk.h).startswith("waits for its rate, 1/20s: 1 begun")


@pytest.mark.parametrize(("typed", "is_"), [("100/m", "100/1m"), ("1000/s", "1000/1s"), ("5 / 1h30m", "5/1h30m"),
                                            ("20/10s", "20/10s")])
def test_a_rate_is_read_alike_here_and_in_the_database(pg: Pg, typed: str, is_: str) -> None:
    assert normal(typed, "x") == is_
    read = pg.sql("select most, length_us from anton.parse_rate(%s, 'x')", args=(typed,))
    assert read == pg.sql("select most, length_us from anton.parse_rate(%s, 'x')", args=(is_,))


@pytest.mark.parametrize("bad", ["fast", "0/s", "5/ms", "5/y", "5", 5, "1/365d", "-1/s"])
def test_what_is_no_rate_is_refused(bad: Any) -> None:
    with declaring(App("t")), pytest.raises(BadOption, match="a number of starts and a time"):
        Table("a").on_new_records(name="h", rate=bad)(lambda record: None)


def test_a_start_is_taken_only_within_its_slot_by_both_bounds_of_the_clock() -> None:
    tap = Tap()
    now = time.monotonic()
    tap.clock.heard(now, 5_000.0, now + 1000.0)                        # it is from 4,000 to 5,000 there
    tap.got(10_000.0, {0: 2})
    assert tap.take() and tap.soon() == 1
    tap.got(1.0, {4_500: 3})
    assert not tap.take() and tap.free() == 0
    assert tap.unused(future=True) == {4_500: 3} and not tap.holds


def test_a_start_that_lapsed_unused_is_one_that_comes_back_soon() -> None:
    tap, now = Tap(), time.monotonic()
    tap.clock.heard(now, 5_000.0, now)
    tap.asked, tap.next = True, now + 3600
    tap.got(1.0, {4_000: 1})
    assert not tap.soon() and not tap.far
    assert tap.unused(future=False) == {4_000: 1} and tap.far


async def test_starts_that_no_database_takes_back_are_given_back_another_time() -> None:
    meter = Meter(Database("postgresql://127.0.0.1:1/none"), 1, lambda lane: None)  # nobody listens there
    tap = Tap()
    tap.closed = True
    tap.got(1.0, {7: 3})
    lane: Any = SimpleNamespace(id=1, tap=tap, ready=False, still=True, items=[])
    meter.know([lane])
    with pytest.raises(DatabaseUnreachable):
        await meter.end()
    assert tap.unused(future=True) == {7: 3}


async def test_starts_whose_answer_is_on_its_way_as_the_worker_ends_are_given_back(
        db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = await one_handler(db, lambda record: None, each=True, rate="1/h")
    asked, answer, take = asyncio.Event(), asyncio.Event(), queue.take_rate

    async def slow(*args: Any) -> Any:
        found = await take(*args)
        asked.set()
        await answer.wait()
        return found

    monkeypatch.setattr(queue, "take_rate", slow)
    lane: Any = SimpleNamespace(id=await bench.value("select id from anton.handler"), tap=Tap(), each=True, batch=1,
                                ready=True, still=False, room=1, running=0, waiting_records=1, items=[])
    meter = Meter(db, await bench.value("select anton.register_worker('t', 'here', 1, '1')"), lambda lane: None)
    meter.know([lane])
    await asked.wait()
    meter.close()
    end = asyncio.create_task(meter.end())
    await asyncio.sleep(0)
    answer.set()
    await end
    assert await bench.value("select sum(g)::int from anton.rate, unnest(given) g") == 0


async def test_a_call_that_waits_hears_at_once_of_a_start() -> None:
    tap = Tap()
    now = time.monotonic()
    tap.clock.heard(now, 5_000.0, now)
    call = asyncio.create_task(tap.turn())
    await asyncio.sleep(0)
    tap.got(10_000.0, {0: 1})
    for _ in range(50):                                                # turns of the loop, which take no time
        await asyncio.sleep(0)
    assert call.done()


async def test_records_begin_no_faster_than_the_rate_says(db: Database) -> None:
    at: list[float] = []
    bench = await one_handler(db, lambda record: at.append(time.monotonic()), each=True, rate="10/500ms")
    await bench.add("a", ({"n": n} for n in range(25)))
    async with bench.running():
        await bench.until_done()
    assert len(at) == 25 and all(late - early > 0.5 for early, late in zip(at, at[10:], strict=False))


async def test_calls_of_batches_and_of_sql_begin_no_faster_either(db: Database) -> None:
    at: list[float] = []
    bench = await one_handler(db, lambda records: at.append(time.monotonic()), batch=1, rate="2/400ms")
    await bench.add("a", ({"n": n} for n in range(5)))
    await bench.sql("""select anton.handler('copy', 'a', 'new', 'insert into b (data) select data from new_records',
                                            '{"rate": "3/s", "batch": 1}')""")
    await bench.sql("update anton.handler set app = 't' where name = 'copy'")
    async with bench.running():
        for n in range(3):
            await bench.add("a", [{"n": 10 + n}])
        await bench.until_done()
    assert len(at) >= 2 and all(late - early > 0.4 for early, late in zip(at, at[2:], strict=False))
    assert await bench.count("b") == 3


async def test_what_waits_for_its_rate_is_told_and_given_back_when_the_worker_ends(db: Database) -> None:
    done: list[int] = []
    bench = await one_handler(db, lambda record: done.append(record["n"]), each=True, rate="1/h")
    await bench.add("a", ({"n": n} for n in range(3)))
    await bench.work()                                                 # does not wait for an hour
    assert len(done) == 1 and await bench.left() == {"job": 1}
    await bench.sql("select anton.register_worker('t', 'here', 1, '1')")
    assert (await bench.value("select why from anton.status")).startswith("waits for its rate, 1/1h: 1 begun")
    shown = await bench.value("select anton.show_handler('handle')")
    assert (shown["rate"], shown["rate_used"]) == ("1/1h", 1)


async def test_a_record_whose_start_lapses_as_it_is_claimed_has_another_before_its_worker_is_idle(
        db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    bench = await one_handler(db, lambda record: done.append(record["n"]), each=True, rate="1/10s")
    await bench.add("a", [{"n": 1}])
    worker, claim = bench.worker(), queue.claim

    async def slow(*args: Any) -> Any:
        jobs = await claim(*args)
        if jobs:
            monkeypatch.setattr(queue, "claim", claim)
            await bench.advance(timedelta(seconds=1))                  # its slot is over
            (lane,) = [lane for lane in worker._dispatcher.order if lane.tap is not None]
            lane.tap.clock.low += 1
            lane.tap.clock.high += 1
        return jobs

    monkeypatch.setattr(queue, "claim", slow)
    await asyncio.wait_for(worker.run_until_idle(), PATIENCE)
    assert done == [1] and await bench.left() == {}


async def test_what_came_meanwhile_is_done_before_what_waits_for_its_rate_is_left(db: Database) -> None:
    done: list[str] = []

    def declare() -> None:
        async def rated(record: Any) -> None:
            done.append("rated")
            await bench.add("b", [{}])                                 # nobody tells the worker

        Table("a").on_new_records(rated, each=True, rate="1/h", name="rated")
        Table("b").on_new_records(lambda record: done.append("plain"), each=True, name="plain")

    bench = await Bench.make(db, declare)
    await bench.add("a", [{}, {}])
    await bench.work()
    assert done == ["rated", "plain"] and await bench.left() == {"job": 1}


def test_a_lane_whose_calls_wait_for_starts_is_not_starved_while_a_record_of_them_is_to_be_settled() -> None:
    class Two:
        left = 2

    tap, each = Tap(), Two()
    lane = Lane(1, "h", None, "python", True, "now", False, 1, timedelta(0), 2, timedelta(minutes=5), 5, timedelta(0),
                1, "public.a", ("id",), "id", None, tap=tap, calls=1)
    lane.items.append((each, 1))                                       # the other one is done
    assert not lane.starved
    each.left = 1
    assert lane.starved
    lane.calls = 2                                                     # of the second nothing waits
    assert not lane.starved
    tap.waiting = 1                                                    # but it does, alone
    assert lane.starved
    each.left = 2
    assert not lane.starved
    each.left, lane.running = 1, 1
    assert not lane.starved


async def test_a_handler_with_a_rate_and_a_limit_begins_what_both_let_it(db: Database) -> None:
    done: list[int] = []
    bench = await one_handler(db, lambda record: done.append(record["n"]), each=True, rate="1/h", concurrency=2)
    await bench.add("a", ({"n": n} for n in range(3)))
    await bench.work()
    assert len(done) == 1 and await bench.left() == {"job": 1} and await bench.count("anton.permit") == 2


def test_a_record_that_waits_for_its_rate_says_so_and_begins_as_time_moves(app: TestApp) -> None:
    done: list[int] = []
    with declaring(app.app):
        orders = Table("orders")
        orders.on_new_records(each=True, name="note", rate="1/h")(lambda order: done.append(order["id"]))
    app.migrate()
    ids = {orders.append({}).id for _ in range(3)}

    def why() -> set[tuple[str, str | None]]:
        found = [row for id in ids - {*done} for row in app._fetch(
            f"select state, error from anton.why('orders', '{id}') where level > 0")]
        return {(state, error and error.partition(", the next")[0]) for state, error in found}

    app.run()
    waits = ("ready", "waits for its rate, 1/1h: 1 begun in the last window")
    assert len(done) == 1 and why() == {waits}
    app.advance("30m")
    assert len(done) == 1 and why() == {waits}
    app.advance("1h")                                                  # the second began on the way
    assert len(done) == 2 and why() == {waits}
    app.advance("1d")
    assert {*done} == ids and len(done) == 3
    assert [tuple(row) for row in app._fetch("select ready, in_flight, why from anton.status")] == [(0, 0, None)]


async def test_a_worker_that_ends_gives_back_the_starts_and_the_records_that_it_has_not_begun(db: Database) -> None:
    began: list[int] = []
    go = asyncio.Event()

    async def handle(record: Any) -> None:
        began.append(record["n"])
        await go.wait()

    bench = await one_handler(db, handle, each=True, concurrency=2, rate="100/h")
    await bench.add("a", ({"n": n} for n in range(5)))
    given = "select sum(g)::int from anton.rate, unnest(given) g"
    async with bench.running():
        await bench.until(f"select ({given}) > 2")
        await met(lambda: len(began) == 2)
        go.set()
    assert await bench.value(given) == len(began)
    left = "select coalesce(sum(hi - lo + 1 - coalesce(cardinality(settled), 0)), 0)::int from anton.job"
    assert await bench.value(left) == 5 - len(began)
    assert await bench.count("anton.lease") == 0


async def test_suspects_that_wait_for_their_rate_hold_up_no_others_and_no_end(db: Database) -> None:
    done: list[str] = []

    def declare() -> None:
        a = Table("a")
        for name, rate in (("rated", "1/h"), ("plain", None)):
            async def note(record: Any, name: str = name) -> None:
                done.append(name)
                if len(done) == 3:
                    worker.drain()                                     # the fourth would begin in an hour

            a.on_new_records(note, each=True, rate=rate, name=name)

    bench = await Bench.make(db, declare)
    for _ in range(2):
        await bench.add("a", [{}])
    await bench.sql("select count(c) from (select array_agg(id) as ids from anton.handler) h, "
                    "anton.claim(0, 5, h.ids, '{9, 9}', '{9, 9}', '{0, 0}', '1 h') c")
    await bench.sql("update anton.lease l set lease_until = '-infinity', alone = h.name = 'plain' from anton.handler h "
                    "where h.id = l.handler_id")
    worker = bench.worker()
    assert await asyncio.wait_for(worker.run_suspects(), PATIENCE) == 3
    assert sorted(done) == ["plain", "plain", "rated"] and await bench.left() == {"job": 1}


async def test_a_rate_that_is_taken_out_of_the_code_is_taken_out_of_the_database(db: Database) -> None:
    await one_handler(db, lambda records: None, rate="7/s")
    bench = await one_handler(db, lambda records: None, rate="8/s")
    assert await bench.column("select said from anton.rate") == ["8/1s"]
    bench = await one_handler(db, lambda records: None)
    assert await bench.count("anton.rate") == 0


def test_the_starts_of_a_tenth_of_a_window_are_little_more_than_a_tenth(desk: Desk) -> None:
    desk.sql("select anton.set_rate(%s, '1000/s')", args=(desk.h,))
    given: list[tuple[int, int]] = []
    for n in range(60):
        desk.at(n * 20_000)
        given += desk.take(500).items()
    by = dict[int, int]()
    for slot, count in given:
        by[slot // 6] = by.get(slot // 6, 0) + count
    assert max(by.values()) <= 2 * 120 and sum(by.values()) >= 1000
    assert all(a < b for a, b in pairwise(sorted(by)))


def test_the_heads_of_sql_files_have_rates_and_limits(shop: Any) -> None:
    shop.file("sql/copy.sql", "-- anton: handler\n-- on: orders new\n-- rate: 100/m\n-- concurrency: 2\n"
                              "insert into copies (data) select data from new_records")
    shop.declare(lambda: (Table("orders"), Table("copies")))
    shop.migrate()
    assert shop.sql("select said from anton.rate") == [("100/1m",)]
    assert shop.sql("select count(*) from anton.permit") == [(2,)]
    assert not shop.migrate(check=True).drift


MAIN = """
import os, time, psycopg
from anton import Table

a = Table("a")

def begun(name):
    with open(os.environ["TEST_STARTS"], "a") as file:
        file.write(f"{name} {time.monotonic()} {os.getpid()}\\n")

@a.on_new_records(each=True, rate="20/s")
def of_all(record):
    begun("of_all")

@a.on_new_records(each=True, rate="20/s", per="c")
def of_a_key(record):
    begun("of_a_key")
"""


def test_no_window_holds_more_over_processes_that_are_killed(pg: Pg, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(MAIN)
    (tmp_path / "autonomous.json").write_text('{"name": "t"}')
    starts = tmp_path / "starts"
    starts.touch()
    environment = {**os.environ, "DATABASE_URL": pg.url, "TEST_STARTS": str(starts)}

    def anton(*words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*ANTON, *words], cwd=tmp_path, env=environment, start_new_session=True,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def begun(name: str) -> list[list[str]]:
        return [line.split() for line in starts.read_text().splitlines() if line.startswith(f"{name} ")]

    assert anton("migrate").wait(60) == 0
    for _ in range(8):
        pg.sql("insert into a (data) select '{}' from generate_series(1, 10) g")
    work = anton("work", "--processes", "2")
    try:
        for kill, name in enumerate(("of_a_key", "of_all"), 1):
            until(lambda kill=kill, name=name: len(begun(name)) >= 20 * kill)
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(begun(name)[-1][2]), signal.SIGKILL)
        until(lambda: pg.value("select not exists (select from anton.job) and not exists (select from anton.lease) "
                                   "and not exists (select from anton.delayed)"))
    finally:
        work.terminate()
        work.wait(60)
    for name in ("of_a_key", "of_all"):
        at = sorted(float(line[1]) for line in begun(name))
        assert len(at) >= 80 and all(late - early > 1.0 for early, late in zip(at, at[20:], strict=False)), name


def until(met: Any, patience: float = 90.0) -> None:
    end = time.monotonic() + patience
    while not met():
        assert time.monotonic() < end
        time.sleep(0.02)
