"""Order: records of one key run one at a time, first what was first, whatever fails and whoever dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pg import Pg
from working import Bench, met, one_handler

from anton import Discard, Retry, Table, sqlfile
from anton.app import App, declaring
from anton.catalogue import read_lanes
from anton.db import Database
from anton.errors import BadOption
from anton.order import Order

ANTON = [sys.executable, "-c", "import sys; from anton.cli import main; sys.exit(main())"]


async def updates(bench: Bench, keys: int, each: int) -> None:
    """Rows 1..keys, each of which is set to 1..each in statements of their own, all of them in each."""
    await bench.add("a", ({"n": 0} for _ in range(keys)))
    for n in range(1, each + 1):
        await bench.sql("update a set data = jsonb_build_object('n', $1::int)", n)


def on_updates(handle: Any, **options: Any) -> Any:
    return lambda: Table("a").on_updated_records(each=True, ordered=True, name="handle", **options)(handle)


async def test_changes_of_one_row_are_handled_in_commit_order_and_one_at_a_time(db: Database) -> None:
    seen, inside, together = defaultdict[int, list[int]](list), set[int](), 0

    async def handle(record: Any) -> None:
        nonlocal together
        assert record.id not in inside
        inside.add(record.id)
        together = max(together, len(inside))
        await asyncio.sleep(0.001 * (record.id % 3))
        seen[record.id].append(record["n"])
        inside.discard(record.id)

    bench = await Bench.make(db, on_updates(handle, batch=7))
    await updates(bench, 20, 12)
    async with bench.running(), bench.running():
        await bench.until_done()
    assert seen == {id: list(range(1, 13)) for id in range(1, 21)} and together > 5
    assert await bench.left() == {}


async def test_a_key_waits_for_its_record_that_is_tried_again_and_others_go_on(db: Database) -> None:
    seen, failed = list[tuple[int, int]](), 0

    async def handle(record: Any) -> None:
        nonlocal failed
        if record.id == 3 and record["n"] == 2 and failed < 2:
            failed += 1
            raise ValueError("not yet")
        seen.append((record.id, record["n"]))

    bench = await Bench.make(db, on_updates(handle, backoff="1h"))
    await updates(bench, 5, 6)
    await bench.work()
    assert sorted(seen) == [(id, n) for id in range(1, 6) for n in range(1, 7) if id != 3 or n == 1]
    assert await bench.column("select state from anton.turn order by n") == ["first", *["waits"] * 4]
    await bench.sql("update a set data = jsonb_build_object('n', 7)")
    await bench.work()
    for _ in range(2):
        await bench.advance(timedelta(hours=3))
        await bench.work()
    assert [n for id, n in seen if id == 3] == [1, 2, 3, 4, 5, 6, 7]
    assert await bench.left() == {} and await bench.count("anton.turn") == 0


@pytest.mark.parametrize("seed", range(3))
async def test_no_key_is_out_of_order_whatever_fails(db: Database, seed: int) -> None:
    """Records fail, ask to be tried again, or say that the world is away; changes go on meanwhile."""
    dice, seen, inside = random.Random(seed), defaultdict[int, list[int]](list), set[int]()

    async def handle(record: Any) -> None:
        assert record.id not in inside, "two of one key at a time"
        inside.add(record.id)
        try:
            if dice.random() < 0.3:
                await asyncio.sleep(0.001)
            if dice.random() < 0.05:
                raise ValueError("at first")
            if dice.random() < 0.03:
                raise Retry("1ms")
            if dice.random() < 0.002:
                raise ConnectionError("away")
            seen[record.id].append(record["n"])
        finally:
            inside.discard(record.id)

    bench = await Bench.make(db, on_updates(handle, backoff="1ms", attempts=50, batch=10))
    async with bench.running(), bench.running():
        await updates(bench, 8, 25)
        await bench.sql("update anton.handler set probe_at = now() where failing_since is not null")
        await bench.until_done()
    assert all(list(dict.fromkeys(found)) == list(range(1, 26)) for found in seen.values()), seen
    assert len(seen) == 8 and await bench.left() == {} and await bench.count("anton.turn") == 0


@pytest.mark.parametrize("decide", ["replay", "drop_dead"])
async def test_a_key_that_is_blocked_by_a_dead_letter_goes_on_when_that_is_decided(db: Database, decide: str) -> None:
    seen, broken = list[tuple[int, int]](), True

    async def handle(record: Any) -> None:
        if record.id == 2 and record["n"] == 2 and broken:
            raise Discard("no")
        seen.append((record.id, record["n"]))

    bench = await Bench.make(db, on_updates(handle, on_dead="block"))
    await updates(bench, 3, 4)
    await bench.work()
    assert [n for id, n in seen if id == 2] == [1] and len(seen) == 9
    dead = await bench.value("select id from anton.dead")
    (why,) = await bench.column("select distinct error from anton.why('a', '2') where state = 'waits'")
    assert why == f"waits for a/2, which is dead: anton dead replay {dead}, or anton dead drop {dead}"
    assert (await bench.sql("select delayed, dead, why from anton.status"))[0] == (
        2, 1, "2 records wait for an earlier one of their key")
    broken = False
    await bench.sql(f"select anton.{decide}($1::bigint)", dead)
    await bench.work()
    assert [n for id, n in seen if id == 2] == ([1, 2, 3, 4] if decide == "replay" else [1, 3, 4])
    await bench.sql("update a set data = jsonb_build_object('n', 5)")
    await bench.work()
    assert seen[-3:] == [(1, 5), (2, 5), (3, 5)] and await bench.left() == {} and not await bench.count("anton.turn")


async def test_after_a_dead_letter_its_key_goes_on(db: Database) -> None:
    seen = list[tuple[int, int]]()

    async def handle(record: Any) -> None:
        if record.id == 2 and record["n"] in (2, 3):
            raise ValueError("never")
        seen.append((record.id, record["n"]))

    bench = await Bench.make(db, on_updates(handle, attempts=2, backoff="1h"))
    await updates(bench, 3, 5)
    for _ in range(3):
        await bench.work()
        await bench.advance(timedelta(hours=2))
    assert [n for id, n in seen if id == 2] == [1, 4, 5] and len(seen) == 13
    assert await bench.left() == {"dead": 2} and await bench.count("anton.turn") == 0


async def test_a_job_that_is_cancelled_lets_the_next_of_its_key_go_on(db: Database) -> None:
    seen = list[int]()

    async def handle(record: Any) -> None:
        if record["n"] == 1:
            raise ValueError("not yet")
        seen.append(record["n"])

    bench = await Bench.make(db, on_updates(handle, backoff="1h"))
    await updates(bench, 1, 4)
    await bench.work()
    (third,) = await bench.column("select id from anton.list_jobs('handle') where state = 'waits' "
                                "order by id limit 1 offset 1")
    assert "waits for a retry at" in (await bench.value("select anton.show_job($1)", third))["error"]
    assert await bench.value("select anton.cancel($1)", third)
    assert await bench.value("select anton.cancel((select id from anton.delayed))")
    await bench.work()
    assert seen == [2, 4] and await bench.left() == {} and await bench.count("anton.turn") == 0


async def test_a_column_of_per_has_an_order_of_its_own_and_records_without_one_share_theirs(db: Database) -> None:
    seen, failed = list[tuple[Any, int]](), set[int]()

    def handle(record: Any) -> None:
        if record["n"] == 0 and record.id not in failed:
            failed.add(record.id)
            raise ValueError("at first")
        seen.append((record.get("c"), record["n"]))

    bench = await one_handler(db, handle, each=True, ordered=True, per="c", backoff="1h")
    for n in range(6):
        await bench.add("a", [{"c": "x", "n": n}, {"n": n}, {"c": "y", "n": n + 1}])
    await bench.work()
    assert seen == [("y", n) for n in range(1, 7)]
    await bench.advance(timedelta(hours=2))
    await bench.work()
    assert [n for c, n in seen if c == "x"] == [n for c, n in seen if c is None] == list(range(6))


async def test_what_crashed_unread_is_dead_in_a_line_of_its_own_and_its_key_goes_on(db: Database) -> None:
    """Behind a dead one that nobody could read either, which may be of any key."""
    seen, broken = list[int](), True

    async def handle(record: Any) -> None:
        if broken:
            raise ValueError("not yet")
        seen.append(record["n"])

    bench = await one_handler(db, handle, each=True, ordered=True, per="c", on_dead="block", backoff="1h")
    worker = await bench.value("select anton.register_worker('test', 'here', 1, '1')")

    async def crashes() -> Any:
        ((id, ordinal),) = await bench.sql(
            "select c.id, c.lo from anton.handler h, anton.claim($1, 7, array[h.id], '{1}', '{1}', '{0}', '9 s') c",
            worker)
        return await bench.value("select anton.bury_in_turn(7, $1, $2, '?', 'crashed', 'died', null)", id, ordinal)

    await bench.add("a", [{"c": "x", "n": 0}])
    first = await crashes()
    await bench.add("a", [{"c": "b", "n": 1}, {"c": "b", "n": 2}])
    await bench.work()                                                 # one is tried again, two waits for it
    await bench.advance(timedelta(hours=2))
    await bench.sql("select anton.promote()")
    assert 0 < first < await crashes()
    broken = False
    await bench.work()
    assert seen == [2] and await bench.left() == {"dead": 2}


async def test_without_the_option_again_nothing_waits(db: Database) -> None:
    seen = list[int]()

    async def handle(record: Any) -> None:
        if record["n"] == 1:
            raise Discard("no")
        seen.append(record["n"])

    bench = await Bench.make(db, on_updates(handle, on_dead="block"))
    await updates(bench, 1, 3)
    await bench.work()
    assert not seen
    bench = await Bench.make(db, lambda: Table("a").on_updated_records(each=True, name="handle")(handle))
    await bench.work()
    assert sorted(seen) == [2, 3] and await bench.left() == {"dead": 1}
    assert await bench.value("select anton.show_handler('handle') ->> 'ordered'") == "false"


async def test_a_record_with_another_key_when_it_is_tried_again_lets_those_of_the_old_one_go_on(db: Database) -> None:
    seen, fails = list[int](), 2

    async def handle(record: Any) -> None:
        nonlocal fails
        if record["n"] == 0 and fails:
            fails -= 1
            raise ValueError("not yet")
        seen.append(record["n"])

    bench = await one_handler(db, handle, each=True, ordered=True, per="c", backoff="1h")
    await bench.add("a", ({"c": "x", "n": n} for n in range(3)))
    await bench.work()
    assert not seen
    await bench.sql("""update a set data = data || '{"c": "y"}' where data ->> 'n' = '0'""")
    for _ in range(2):
        await bench.advance(timedelta(hours=3))
        await bench.work()
    assert seen == [1, 2, 0] and await bench.left() == {} and await bench.count("anton.turn") == 0


def waits_by(**options: Any) -> Callable[[Any], Callable[[], Any]]:
    return lambda handle: lambda: Table("a").on_new_records(each=True, name="handle", **options)(handle)


@pytest.mark.parametrize(("before", "after"), [
    (waits_by(per="c", concurrency=1), waits_by()),
    (waits_by(per="c", concurrency=1), waits_by(per="d", concurrency=1)),
    (waits_by(per="c", rate="1/h"), waits_by()),
    (waits_by(per="c", ordered=True), waits_by()),
    (waits_by(per="c", ordered=True), waits_by(per="d", ordered=True)),
    (waits_by(per="c", ordered=True), waits_by(per="c", concurrency=1)),
], ids=["per", "per of another", "rate and per", "ordered", "ordered per another", "ordered to per"])
async def test_what_waits_for_its_key_goes_on_when_a_migrate_takes_the_option_away_or_changes_it(
        db: Database, before: Any, after: Any) -> None:
    begun, may, seen = asyncio.Event(), asyncio.Event(), list[int]()

    async def handle(record: Any) -> None:
        begun.set()
        await may.wait()
        seen.append(record["n"])

    bench = await Bench.make(db, before(handle))
    for at in range(0, 30, 10):
        await bench.add("a", ({"c": "x", "d": n % 3, "n": n} for n in range(at, at + 10)))
    async with bench.running() as worker:
        await begun.wait()
        if await bench.count("anton.rate"):
            await bench.until("select sum(hi - lo + 1) = 29 from anton.delayed")
        await Bench.make(db, after(handle))
        await worker._refresh()
        may.set()
        await bench.until_done()
    assert sorted(seen) == list(range(30)) and await bench.count("anton.turn") == 0


async def test_what_is_put_off_after_a_migrate_took_the_order_away_does_not_wait(db: Database) -> None:
    """A worker learns of it seconds later."""
    bench = await Bench.make(db, on_updates(lambda record: None))
    await updates(bench, 1, 1)
    handler, job = (await bench.sql("select handler_id, id from anton.job"))[0]
    await bench.sql("select anton.permit(1, $1, 1, '1 m')", handler)
    claim = "select count(*) from anton.claim_ordered(1, 7, array[$1::int], '{1}', '{1}', '{0}', '1 m')"
    assert await bench.value(claim, handler) == 1
    await bench.sql("update anton.handler set ordered = false")
    await bench.sql("select anton.retry_in_turn(7, $1, '{1}', '{\"[1]\"}', '1 h', 'no', true)", job)
    assert await bench.left() == {"delayed": 1} and await bench.count("anton.turn") == 0


async def test_a_worker_claims_nothing_behind_jobs_of_its_own_that_it_does_not_know_of(db: Database) -> None:
    """The answer to a claim was lost. Whenever a record of b is done, it has claimed of a, too, as far as it may."""
    seen, marks = list[int](), list[int]()

    def declare() -> None:
        on_updates(lambda record: seen.append(record["n"]))()
        Table("b").on_new_records(each=True, name="mark")(lambda record: marks.append(record["n"]))

    bench = await Bench.make(db, declare)
    await updates(bench, 1, 1)
    await bench.sql("select anton.pause('handle')")
    async with bench.running() as worker:
        async with db.conn() as conn, conn.transaction():
            handler = await conn.fetchval("select id from anton.handler where name = 'handle'")
            await conn.execute("select anton.resume('handle')")
            assert await conn.fetchval("select anton.permit($1, $2, 1, '1 h')", worker.id, handler) == 1
            assert await conn.fetchval("select count(*) from anton.claim_ordered($1, 7, array[$2::int], '{9}', '{9}', "
                                       "'{0}', '1 h')", worker.id, handler) == 1
            await conn.execute("update a set data = jsonb_build_object('n', 2)")
        for n in range(3):
            await bench.add("b", [{"n": n}])
            await met(lambda n=n: n in marks)                          # type: ignore[misc]
        assert not seen
        await bench.sql("update anton.lease set lease_until = '-infinity'")
        await bench.until_done()
    assert seen == [1, 2]


async def test_a_limit_that_becomes_one_for_each_key_is_asked_for_anew(db: Database) -> None:
    bench = await Bench.make(db, waits_by(concurrency=3)(lambda record: None))
    lanes = await read_lanes(db, bench.app, {})
    (lane,) = lanes.values()
    assert lane.permits is not None
    lane.permits.got(2, time.monotonic(), timedelta(minutes=1))
    await read_lanes(db, bench.app, lanes)
    assert lane.permits.valid == 2
    await Bench.make(db, waits_by(concurrency=3, per="c")(lambda record: None))
    await read_lanes(db, bench.app, lanes)
    assert lane.permits.valid == 0


async def test_a_handler_shows_its_order_and_who_has_it(db: Database) -> None:
    bench = await Bench.make(db, on_updates(lambda record: None, concurrency=7))
    shown = await bench.value("select anton.show_handler('handle')")
    assert (shown["ordered"], shown["on_dead"], shown["limit"], shown["held_by"]) == (True, "skip", 7, None)


@pytest.mark.parametrize(("options", "says"), [
    ({"ordered": True}, "each=True"),
    ({"ordered": 3, "each": True}, "ordered"),
    ({"each": True, "on_dead": "block"}, "ordered=True"),
    ({"each": True, "ordered": True, "on_dead": "stop"}, "skip"),
])
def test_an_order_that_cannot_be_kept_is_refused(options: dict[str, Any], says: str) -> None:
    with declaring(App("x")), pytest.raises(BadOption, match=says):
        Table("a").on_new_records(name="handle", **options)(lambda record: None)


async def test_of_several_tenants_there_is_one_order_and_no_turns(db: Database) -> None:
    seen = list[int]()

    async def handle(record: Any) -> None:
        seen.append(record["n"])

    bench = await Bench.make(db, on_updates(handle, read="change"))
    await bench.add("a", [{"n": 0}])
    for n, tenant in enumerate("bacab", 1):
        async with db.conn() as conn, conn.transaction():
            await conn.execute("select set_config('anton.tenant', $1, true)", tenant)
            await conn.execute("update a set data = jsonb_build_object('n', $1::int)", n)
    assert "tenants" not in await bench.value("select anton.show_handler('handle')")
    await bench.work()
    assert seen == [1, 2, 3, 4, 5] and await bench.left() == {}


async def test_an_order_by_a_column_has_as_many_records_at_a_time_as_it_says(db: Database) -> None:
    bench = await Bench.make(db, on_updates(lambda record: None, per="n", concurrency=3))
    lanes = await read_lanes(db, bench.app, {})
    for known in (lanes, await read_lanes(db, bench.app, lanes)):
        (lane,) = known.values()
        assert lane.permits is not None
        assert (lane.concurrency, lane.permits.most, lane.permits.each, lane.gate) == (3, 1, 3, None)


def test_sql_with_an_order_is_refused(pg: Pg) -> None:
    pg.sql("create table a (id bigint primary key)")
    with pytest.raises(psycopg.Error, match="single records"):
        pg.sql("select anton.handler('h', 'a', 'new', 'select 1', '{\"ordered\": true}')")


def test_a_table_without_a_key_has_no_order(pg: Pg) -> None:
    pg.sql("create table a (id bigint)")
    with pytest.raises(psycopg.Error, match="no primary key"):
        pg.sql("select anton.put_handler('{\"app\": \"x\", \"name\": \"h\", \"table\": \"a\", \"ops\": [\"new\"], "
               "\"each_record\": true, \"ordered\": true}')")


class Batch:
    """Of the model below: what Order asks of an Each."""

    def __init__(self, lane: Any, keys: list[int]) -> None:
        self.lane, self.order, self.world, self.ended, self.awaited = lane, keys, None, False, False
        self.ran: set[int] = set()
        self.off: dict[Any, list[int]] = {}

    def tell(self) -> None:
        pass

    def job(self, item: int) -> int:
        return -1


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=6), st.data())
@settings(max_examples=300, deadline=None)
def test_a_key_has_one_inside_its_records_come_in_order_and_none_is_left(sent: list[list[int]], data: Any) -> None:
    """Batches are sent, records begin, end and are settled in any order; a closed key's are put off, in order. Whoever
    has to settle what others wait for knows.
    """
    lane: Any = SimpleNamespace(items=deque(), down=None)
    turns = Order(None)
    coming, begun, running, over = [Batch(lane, keys) for keys in sent], list[Batch](), set[Any](), set[Any]()
    came = defaultdict[int, list[tuple[int, int]]](list)
    closed = data.draw(st.sets(st.integers(0, 3), max_size=1))
    turns.know((), map(turns.text, closed))
    waiting = list(coming)
    while waiting or len(over) < sum(map(len, sent)):
        moves = [*(["send"] if waiting else []), *(["begin"] if lane.items else []), *(["end"] if running else []),
                 *(["settle"] if any(batch.ran or batch.off for batch in begun) else [])]
        move = data.draw(st.sampled_from(moves))                       # empty: something is stuck, and this fails
        if move == "send":
            batch = waiting.pop(0)
            begun.append(batch)
            turns.send(batch)
        elif move == "begin":
            entry = lane.items.popleft()
            key = entry[0].order[entry[1]]
            assert key not in closed and key not in [each.order[item] for each, item in running]
            running.add(entry)
            came[key].append((coming.index(entry[0]), entry[1]))
        elif move == "end":
            entry = data.draw(st.sampled_from(sorted(running, key=lambda one: (coming.index(one[0]), one[1]))))
            running.discard(entry)
            turns.ended(*entry)
        elif move == "settle":
            batch = data.draw(st.sampled_from([one for one in begun if one.ran or one.off]))
            batch.awaited = False
            off = turns.put_off(batch)
            for item in off:
                came[batch.order[item]].append((coming.index(batch), item))
            done = batch.ran | set(off)
            turns.settled(batch, done)
            over |= {(batch, item) for item in done}
        idle = {each.order[item] for each in begun for item in range(len(each.order))
                if (each, item) not in over and (each, item) not in running and item not in each.ran}
        assert all(each.awaited for each in begun for item in each.ran if each.order[item] in idle)
    assert all(found == sorted(found) for found in came.values())
    assert sum(map(len, came.values())) == sum(map(len, sent))


MAIN = """
import os, time
from anton import Table

notes = os.open(os.environ["TEST_NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

@Table("a").on_new_records(each=True, ordered=True, per="c", attempts=99, backoff="1ms")
def note(record):
    os.write(notes, b"%d %d %d\\n" % (os.getpid(), record["c"], record["n"]))
    time.sleep(0.01)
    if (record["n"] + os.getpid()) % 29 == 0 and int(time.time() * 1000) % 2:
        raise ValueError("now and then")
"""


def test_the_order_holds_when_who_has_the_handler_is_killed(pg: Pg, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(MAIN)
    (tmp_path / "autonomous.json").write_text('{"name": "t"}')
    notes = tmp_path / "notes"
    notes.touch()
    environment = {**os.environ, "DATABASE_URL": pg.url, "TEST_NOTES": str(notes)}

    def anton(*words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*ANTON, *words], cwd=tmp_path, env=environment, start_new_session=True,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def runs() -> list[tuple[int, int, int]]:
        return [tuple(map(int, line.split())) for line in notes.read_text().splitlines()]  # type: ignore[misc]

    assert anton("migrate").wait(60) == 0
    for first in range(0, 200, 20):
        pg.sql(f"insert into a (data) select jsonb_build_object('c', g % 5, 'n', {first} + g) "
               "from generate_series(1, 20) g")
    work = anton("work", "--processes", "2")
    try:
        for kill in range(1, 4):
            until(lambda kill=kill: len(runs()) >= kill * 40)          # type: ignore[misc]
            with contextlib.suppress(ProcessLookupError):
                os.kill(runs()[-1][0], signal.SIGKILL)
        until(lambda: bool(pg.value("select not exists (select from anton.job) and not exists (select from anton.lease)"
                                    " and not exists (select from anton.delayed)")))
    finally:
        work.terminate()
        work.wait(60)
    last = dict[int, int]()
    for _, key, n in runs():
        assert n >= last.get(key, 0), f"{n} ran after {last[key]}"
        last[key] = n
    assert pg.value("select sum(n) from anton.receipt") == 200 and not pg.value("select count(*) from anton.turn")
    assert len({pid for pid, _, _ in runs()}) > 1


def until(met: Callable[[], bool], patience: float = 60.0) -> None:
    end = time.monotonic() + patience
    while not met():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_suspects_come_one_at_a_time_in_order_and_given_back_stay_suspects(pg: Pg) -> None:
    pg.sql("create table a (id bigint primary key)")
    h = pg.value("select anton.put_handler('{\"app\": \"x\", \"name\": \"h\", \"table\": \"a\", \"ops\": [\"new\"], "
                 "\"each_record\": true, \"ordered\": true}')")
    pg.sql("select anton.sync_triggers(table_id) from anton.handler", *(f"insert into a values ({n})" for n in (1, 2)))
    assert claimed(pg, h, worker=1) == []                              # without the permit
    pg.sql(f"select anton.permit(1, {h}, 1, '60 s')")
    first, second = claimed(pg, h, worker=1)
    pg.sql("select anton.worker_died(1)")
    assert pg.value(f"select anton.permit(2, {h}, 1, '60 s')") == 0
    for token in (7, 8):
        assert reclaimed(pg, h, token) == [first] and reclaimed(pg, h, 9) == []
        pg.sql(f"select anton.give_back({token}, array[{first}])")
    assert pg.value("select count(*) from anton.job") == 0
    assert reclaimed(pg, h, 10) == [first]
    pg.sql(f"select anton.ack(10, array[{first}], 2, 1)")
    assert reclaimed(pg, h, 11) == [second]
    assert pg.value(f"select anton.permit(2, {h}, 1, '60 s', true, true)") == 1
    pg.sql("insert into a values (3)")
    pg.sql("update anton.lease set lease_until = anton.now() - interval '1 s'")
    assert claimed(pg, h, worker=2) == []                              # not past what ran out


def claimed(pg: Pg, handler: int, worker: int) -> list[int]:
    return [row[0] for row in pg.sql(f"select id from anton.claim_ordered({worker}, 5, array[{handler}], array[9], "
                                     "array[99], array[0], '30 s')")]


def reclaimed(pg: Pg, handler: int, token: int) -> list[int]:
    return [row[0] for row in pg.sql(f"select id from anton.reclaim_together(2, {token}, array[{handler}], '30 s')")]


def test_a_file_of_sql_with_an_order_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mirror.sql").write_text("-- anton: handler\n-- on: orders new\n-- ordered: true\nselect 1\n")
    with pytest.raises(BadOption, match="SQL is given batches"):
        sqlfile.handler(sqlfile.read(tmp_path)[0], "t")
