"""Rates of keys: no window holds more starts of one key than rate= beside per= says, whoever has the handler."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Hashable
from contextlib import suppress
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import Server, kill, running
from working import PATIENCE, Bench, cutting, met, one_handler

from anton import Table, queue
from anton.app import App, declaring
from anton.db import Database, set_database
from anton.errors import BadOption
from anton.starts import Starts, text
from anton.testing import TestApp

MOVES = st.lists(st.tuples(st.integers(0, 90), st.integers(0, 30), st.sampled_from(["use", "half", "die", "over"])),
                 min_size=5, max_size=40)


@settings(max_examples=200, deadline=None)
@given(most=st.integers(1, 40), length=st.sampled_from([100_000, 1_000_000, 60_000_000]), moves=MOVES)
def test_no_window_holds_more_starts_of_a_key_whatever_is_planned_used_given_back_or_lost(
        most: int, length: int, moves: list[tuple[int, int, str]]) -> None:
    """Each start is as late as its slot allows for the windows before, as early as it allows for those after."""
    starts, noted, began = Starts(most, length), dict[str, tuple[list[int], list[int]]](), list[int]()
    starts.learn(["k"], noted)
    now = 1_000_000
    for pause, wanted, then in moves:
        now += pause
        starts.unused("k", now)
        plan = starts.plan("k", now, wanted)
        noted[text("k")] = starts.row("k")
        if then == "die":                                              # all that was noted may have begun
            began += [slot for slot, count in plan.items() for _ in range(count)]
        else:
            starts.grant("k", plan)
            for slot, count in plan.items():
                used = count if then == "use" else count // 2
                began += [slot] * used
                starts.keys["k"].left[slot] -= used
        if then in ("die", "over"):
            began += [slot for slot, count in starts.keys["k"].left.items() for _ in range(count) if then == "die"]
            starts = Starts(most, length)
            starts.learn(["k"], noted)
        else:
            assert starts.next("k", now) >= now
    began.sort()
    slot = starts.slot_us
    assert all((late - early - 1) * slot >= length for early, late in zip(began, began[most:], strict=False))


def test_what_is_equal_here_is_one_key_in_the_database() -> None:
    same: list[list[Hashable]] = [[1, 1.0, Decimal("1.00"), True], [Decimal("2.50"), Decimal("2.5")], [None], ["1"]]
    assert [len({text(key) for key in keys}) for keys in same] == [1, 1, 1, 1]
    assert len({text(keys[0]) for keys in same} | {text("x" * 5000), text("x" * 5001)}) == 6


def test_a_rate_for_each_key_needs_single_records_and_is_refused_beside_debounce_and_order() -> None:
    with declaring(App("t")):
        on = Table("a").on_new_records
        for options, why in (({"each": True, "debounce": "1s"}, "no rate= beside debounce="),
                             ({"each": True, "ordered": True}, "no rate= beside ordered"),
                             ({}, "a function with each=True")):
            with pytest.raises(BadOption, match=why):
                on(name="h", per="c", rate="1/s", **options)(lambda record: None)


async def test_records_of_a_key_begin_no_faster_than_its_rate_and_those_of_others_do_not_wait(db: Database) -> None:
    at: dict[str, list[float]] = {}
    bench = await one_handler(db, lambda record: at.setdefault(record["c"], []).append(time.monotonic()), each=True,
                              rate="10/500ms", per="c", table="orders")
    await bench.add("orders", ({"c": "hot"} for _ in range(25)))
    await bench.add("orders", ({"c": f"k{n}"} for n in range(200)))
    async with bench.running():
        await bench.until_done()
    hot = at.pop("hot")
    assert len(at) == 200 and len(hot) == 25
    assert all(late - early > 0.5 for early, late in zip(hot, hot[10:], strict=False))
    assert max(found[0] for found in at.values()) < hot[-1]
    assert await bench.count("anton.rate_key") == 201


async def test_records_that_would_wait_for_long_go_back_and_come_in_time(db: Database) -> None:
    done: list[str] = []
    bench = await one_handler(db, lambda record: done.append(record["c"]), each=True, rate="2/h", per="c")
    await bench.add("a", ({"c": c} for c in "aaaaaab"))
    await bench.work()
    assert sorted(done) == ["a", "b"]
    assert await bench.value("select sum(hi - lo + 1) from anton.delayed") == 5
    assert await bench.column("select distinct error from anton.delayed") == ["waits for the rate of its key"]


def test_time_that_moves_lets_records_of_a_key_begin_at_its_rate(app: TestApp) -> None:
    done: list[tuple[str, int]] = []
    with declaring(app.app):
        orders = Table("orders")
        orders.on_new_records(each=True, name="note", rate="3/h", per="customer")(
            lambda order: done.append((order["customer"], order["id"])))
    app.migrate()
    ids = [orders.append({"customer": "ann"}).id for _ in range(7)]
    orders.append({"customer": "bob"})
    app.run()
    assert sorted(name for name, _ in done) == ["ann", "bob"]
    left = next(iter({*ids} - {id for _, id in done}))
    assert [tuple(row) for row in app._fetch(f"select state, error from anton.why('orders', '{left}') where level > 0")
            ] == [("delayed", "waits for the rate of its key")]
    app.advance("1h")
    assert [name for name, _ in done].count("ann") in (3, 4)
    app.advance("1d")
    assert len(done) == 8 and {id for name, id in done if name == "ann"} == {*ids}


async def test_a_start_that_lapsed_unused_is_there_again_at_once(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    bench = await one_handler(db, lambda record: done.append(record["n"]), each=True, rate="1/m", per="k")
    await bench.add("a", [{"n": 1, "k": "a"}])
    note, late = queue.note_starts, timedelta(seconds=2)

    async def slow(*args: Any) -> Any:
        at = await note(*args)
        monkeypatch.setattr(queue, "note_starts", note)
        await bench.advance(late)                                      # its slot is over before the answer is here
        return at + late // timedelta(microseconds=1)

    monkeypatch.setattr(queue, "note_starts", slow)
    await bench.work()
    assert done == [1]


async def test_who_takes_over_knows_what_began_and_a_worker_that_ends_gives_back_the_rest(db: Database) -> None:
    done: list[int] = []
    bench = await one_handler(db, lambda record: done.append(record["n"]), each=True, rate="1/h", per="c")
    await bench.add("a", [{"c": "a", "n": 1}])
    async with bench.running():
        await met(lambda: len(done) == 1)
    await bench.sql("insert into anton.rate_key select handler_id, '[\"killed\"]', ends, counts, until "
                    "from anton.rate_key")
    await bench.add("a", [{"c": "a", "n": 2}, {"c": "b", "n": 3}, {"c": "killed", "n": 4}])
    await bench.work()
    assert done == [1, 3] and await bench.value("select sum(hi - lo + 1) from anton.delayed") == 2
    assert await bench.column("select counts from anton.rate_key order by key") == [[1], [1], [1]]


async def test_who_does_not_hold_the_handler_notes_no_starts(db: Database) -> None:
    bench = await one_handler(db, lambda record: None, each=True, rate="1/h", per="c")
    h = await bench.value("select id from anton.handler")
    note = "select anton.note_starts($1, $2, '{k}', array['{1000000}'], array['{1}'])"
    assert await bench.value(note, 1, h) is None and await bench.count("anton.rate_key") == 0
    await bench.sql("select anton.permit(1, $1, 1, '1 m')", h)
    assert await bench.value(note, 1, h) > 0 and await bench.value(note, 2, h) is None
    assert await bench.count("anton.rate_key") == 1
    while await bench.value("select anton.maintain()") is not None:
        pass
    assert await bench.count("anton.rate_key") == 0


OFF = "exists (select from anton.delayed where run_at > anton.now() + interval '50 m')"
NONE = "not exists (select from anton.lease)"
HERE = "(select count(*) = 2 from anton.lease)"                        # it has no room, and nobody puts it off


@pytest.mark.parametrize(("rate", "most", "meanwhile", "then", "runs"), [
    ("1/h", 4, OFF, OFF, [1]), ("1/h", 1, HERE, OFF, [1]), ("100/m", 1, HERE, NONE, [1, 2]),
], ids=["room and no start", "no room and no start", "no room and a start"])
async def test_a_record_that_comes_while_another_of_its_key_runs_goes_back_or_begins_at_its_end(
        db: Database, rate: str, most: int, meanwhile: str, then: str, runs: list[int]) -> None:
    begun, go, done = asyncio.Event(), asyncio.Event(), list[int]()

    async def handle(record: Any) -> None:
        begun.set()
        await go.wait()
        done.append(record["n"])

    bench = await one_handler(db, handle, each=True, rate=rate, per="c", concurrency=most)
    await bench.add("a", [{"c": "a", "n": 1}])
    async with bench.running() as worker:
        await asyncio.wait_for(begun.wait(), PATIENCE)
        await met(lambda: not any(books.starts.began for books in worker._keys._books.values()))  # nothing is to come
        await bench.add("a", [{"c": "a", "n": 2}])
        await bench.until(f"select {meanwhile}")
        go.set()
        await bench.until(f"select {then}")
    assert done == runs


async def test_a_record_that_fails_takes_another_start_of_its_key(db: Database) -> None:
    tried: list[Any] = []

    def handle(record: Any) -> None:
        tried.append(record["c"])
        raise ValueError("no")

    bench = await one_handler(db, handle, each=True, rate="1/h", per="c", concurrency=1, backoff="1ms")
    await bench.add("a", [{"c": "a"}, {"c": "b"}])
    await bench.work()
    assert sorted(tried) == ["a", "b"]
    shown = await bench.value("select anton.show_handler('handle')")
    assert (shown["rate"], shown["per"], shown["limit"], shown["rate_keys"]) == ("1/1h", "c", 1, 2)


async def test_rows_of_keys_do_not_keep_a_worker_from_its_other_housekeeping(
        db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anton.chores.STEP", 0.01)
    bench = await one_handler(db, lambda record: None, each=True, rate="1/s", per="c")
    await bench.sql("insert into anton.rate_key select 1, g::text, '{1}', '{1}', to_timestamp(0) "
                    "from generate_series(1, 10001) g")
    await bench.sql("insert into anton.delivery values ('web/hook', 'old', now() - interval '9 days', 200, '{}', '')")
    async with bench.running():
        await bench.until("select not exists (select from anton.delivery) and not exists (select from anton.rate_key)")


ODD = {
    "float8": ["'NaN'", "'NaN'", "'-0'", "0"],
    "numeric": ["1.0", "1.00", "'NaN'", "'NaN'", *(f"0.1{'0' * 29}{n}" for n in (1, 2))],
    "text": [r"E'a\\u0000'", r"E'a\\u0000'", "'a'", *(f"repeat('x', {n})" for n in (99999, 99999, 100000))],
    "int": ["null", "null", "0"],
    "jsonb": ["""'{"a": 1, "b": [2.50]}'""", """'{"b": [2.50], "a": 1}'""", "'null'", "null"],
}


@pytest.mark.parametrize(("type_", "values"), ODD.items(), ids=ODD)
async def test_what_is_one_value_in_the_database_is_one_key_however_odd(
        db: Database, type_: str, values: list[str]) -> None:
    async with db.conn() as conn:
        await conn.execute(f"create table odd (id int generated always as identity primary key, c {type_})")
        await conn.execute(f"insert into odd (c) values ({'), ('.join(values)})")
        keys = await conn.fetchval("select count(distinct coalesce(c::text, 'null')) from odd" if type_ == "jsonb" else
                                   "select count(distinct c) + max((c is null)::int) from odd")
        await conn.execute("truncate odd")
    done: list[int] = []
    bench = await one_handler(db, lambda record: done.append(record["id"]), each=True, rate="1/h", per="c", table="odd")
    await bench.sql(f"insert into odd (c) values ({'), ('.join(values)})")
    await bench.work()
    assert len(done) == keys == await bench.count("anton.rate_key")
    await bench.sql(f"insert into odd (c) values ({'), ('.join(values)})")
    await bench.work()                                                 # another worker, which reads what was given
    assert len(done) == keys and 2 * len(values) - keys == await bench.value(
        "select sum(hi - lo + 1) from anton.delayed")


async def test_starts_of_which_nobody_knows_whether_they_are_noted_are_not_used_and_not_lost(db: Database) -> None:
    done: list[str] = []
    bench = await one_handler(db, lambda record: done.append(record["c"]), each=True, rate="1/h", per="c")
    await bench.add("a", [{"c": "a"}, {"c": "b"}])
    async with cutting(db, b"note_starts") as (proxied, cuts):
        cuts.append(b"cut")
        async with Bench(proxied, bench.app).running():
            await met(lambda: len(done) == 2)
        await proxied.close()
    assert not cuts and await bench.column("select counts from anton.rate_key") == [[1], [1]]


async def test_no_window_holds_more_starts_when_the_server_is_killed_and_its_rates_go_on(server: Server) -> None:
    begun: dict[str, list[float]] = {}
    done: set[int] = set()

    def handle(record: Any) -> None:
        begun.setdefault(record["c"], []).append(time.monotonic())
        done.add(record["n"])

    def declare() -> None:
        Table("orders").on_new_records(each=True, name="keyed", rate="10/500ms", per="c")(handle)
        Table("calls").on_new_records(each=True, name="plain", rate="20/500ms")(handle)

    with running(server.kind) as own:                                  # the others' server stays up
        own.sql("create database killed")
        db = Database(own.url("killed"), source="the test")
        set_database(db)
        bench = await Bench.make(db, declare)
        await bench.add("orders", ({"c": "ab"[n % 2], "n": n} for n in range(50)))
        await bench.add("calls", ({"c": "plain", "n": n} for n in range(50, 100)))
        async with bench.running():
            await met(lambda: min(len(begun.get(name, ())) for name in ("a", "b", "plain")) > 5)
            await asyncio.to_thread(kill, own)
            with suppress(Exception):
                await bench.value("select 1")                          # connections of before
            await bench.until_done()
        await db.close()
        set_database(None)
    assert done == {*range(100)}
    for name, most in (("a", 10), ("b", 10), ("plain", 20)):
        at = sorted(begun[name])
        assert all(late - early > 0.5 for early, late in zip(at, at[most:], strict=False))
