"""Lanes: which handler runs next, in how many calls at a time, and when its records are settled."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from working import PATIENCE, Bench, one_handler

from anton import Records, Table
from anton.db import Database
from anton.errors import WorldError
from anton.lane import Batch, Lane


async def test_a_worker_claims_only_what_it_has_code_for(db: Database):
    def declare() -> None:
        a, b = Table("a"), Table("b")

        @a.on_new_records
        def known(records: Records) -> None:
            b.extend({} for _ in records)

    bench = await Bench.make(db, declare)
    await bench.add("a", ({} for _ in range(3)))
    await Bench(db, type(bench.app)("other")).work()
    assert await bench.count("anton.job") == 1
    await bench.work()
    assert await bench.count("b") == 3 and await bench.left() == {}


async def test_a_paused_handler_waits_and_costs_the_others_nothing(db: Database):
    def declare() -> None:
        a, b = Table("a"), Table("b")

        @a.on_new_records
        def one(records: Records) -> None:
            b.extend({"by": "one"} for _ in records)

        @a.on_new_records
        def two(records: Records) -> None:
            b.extend({"by": "two"} for _ in records)

    bench = await Bench.make(db, declare)
    await bench.sql("select anton.pause('one')")
    await bench.add("a", ({} for _ in range(3)))
    await bench.work()
    assert await bench.column("select distinct data->>'by' from b") == ["two"]
    await bench.sql("select anton.resume('one')")
    await bench.work()
    assert await bench.count("b") == 6


async def test_no_handler_runs_in_more_calls_than_its_concurrency_and_all_in_no_more_than_the_slots(db: Database):
    now: Counter[str] = Counter()
    most: Counter[str] = Counter()

    def declare() -> None:
        a = Table("a")

        def enter(name: str) -> None:
            now[name] += 1
            most[name] = max(most[name], now[name])
            most["all"] = max(most["all"], sum(now.values()))

        for name, limit in (("one", 1), ("two", 2), ("three", 3)):
            @a.on_new_records(name=name, batch=1, concurrency=limit)
            async def count(records: Records, name: str = name) -> None:
                enter(name)
                await asyncio.sleep(0.002)
                now[name] -= 1

    bench = await Bench.make(db, declare)
    await bench.add("a", ({} for _ in range(30)))
    await bench.work(slots=5)
    assert most["one"] == 1 and most["two"] == 2 and most["three"] <= 3 and most["all"] <= 5
    assert await bench.left() == {}


async def test_records_of_one_call_each_run_side_by_side_up_to_the_concurrency(db: Database):
    most = {"async": 0, "threads": 0}
    inside = {"async": 0, "threads": 0}
    all_in = threading.Event()
    met = asyncio.Event()

    def declare() -> None:
        a = Table("a")

        @a.on_new_records(each=True, concurrency=7)
        async def coroutines(record: Any) -> None:
            inside["async"] += 1
            most["async"] = max(most["async"], inside["async"])
            if inside["async"] == 7:
                met.set()
            await met.wait()
            inside["async"] -= 1

        @a.on_new_records(each=True, concurrency=5)
        def threads(record: Any) -> None:
            inside["threads"] += 1
            most["threads"] = max(most["threads"], inside["threads"])
            if inside["threads"] == 5:
                all_in.set()
            assert all_in.wait(PATIENCE)
            inside["threads"] -= 1

    bench = await Bench.make(db, declare)
    await bench.add("a", ({} for _ in range(40)))
    await bench.work()
    assert most == {"async": 7, "threads": 5} and await bench.left() == {}


async def test_a_slow_record_does_not_keep_finished_ones_from_being_settled(db: Database):
    go = asyncio.Event()

    def declare() -> None:
        a, b = Table("a"), Table("b")

        @a.on_new_records(each=True, concurrency=2)
        async def handle(record: Any) -> None:
            if record["n"] == 0:
                await go.wait()
            b.append({"n": record["n"]})

        @a.on_new_records(each=True, concurrency=1)
        def one_thread(record: Any) -> None:
            if record["n"] == 49:
                asyncio.run_coroutine_threadsafe(go.wait(), loop).result(2 * PATIENCE)
            b.append({"n": record["n"] + 1000})

    loop = asyncio.get_running_loop()
    bench = await Bench.make(db, declare)
    await bench.add("a", ({"n": n} for n in range(50)))
    async with bench.running():
        await bench.until("select (select count(*) from b) = 98")
        assert await bench.value("select sum(hi - lo + 1 - coalesce(cardinality(settled), 0)) from anton.lease") == 2
        go.set()
        await bench.until_done()
    assert await bench.count("b") == 100


async def test_many_records_of_one_call_each_are_settled_by_hundreds(db: Database):
    def declare() -> None:
        a, b = Table("a"), Table("b")

        @a.on_new_records(each=True)
        def handle(record: Any) -> None:
            b.append({"n": record["n"]})

    bench = await Bench.make(db, declare)
    await bench.add("a", ({"n": n} for n in range(5000)))
    await bench.work()
    assert await bench.value("select count(distinct data->>'n') from b") == 5000 == await bench.count("b")
    assert await bench.left() == {} and await bench.value("select sum(n) from anton.receipt") == 5000


async def test_a_deep_handler_does_not_starve_a_shallow_one(db: Database):
    done: list[str] = []

    def declare() -> None:
        deep, shallow = Table("deep"), Table("shallow")

        @deep.on_new_records(batch=10)
        async def slow(records: Records) -> None:
            await asyncio.sleep(0.001)
            done.append("slow")

        @shallow.on_new_records
        async def quick(records: Records) -> None:
            done.append("quick")

    bench = await Bench.make(db, declare)
    await bench.add("deep", ({} for _ in range(3000)))
    await bench.add("shallow", [{}])
    await bench.work(slots=4)
    assert "quick" in done[:20] and done.count("slow") == 300


async def test_max_wait_gathers_records_of_several_commits_into_one_call(db: Database):
    sizes: list[int] = []

    def declare() -> None:
        a = Table("a")

        @a.on_new_records(batch=10, max_wait="30s")
        def full(records: Records) -> None:
            sizes.append(len(records))

        @a.on_new_records(max_wait="200ms", name="soon")
        def soon(records: Records) -> None:
            pass

    bench = await Bench.make(db, declare)
    async with bench.running():
        for _ in range(9):
            await bench.add("a", [{}])
        await bench.until("select exists (select from anton.receipt r join anton.handler h on h.id = r.handler_id "
                          "where h.name = 'soon')")
        assert sizes == []
        await bench.add("a", [{}])
        await bench.until_done()
    assert sizes == [10]


async def test_after_a_probe_that_went_well_the_other_calls_do_not_wait_for_the_rest_of_its_job(db: Database):
    down, together = True, threading.Barrier(2)

    def handle(records: Records) -> None:
        if down:
            raise WorldError("away")
        if len(records) > 1:
            together.wait(PATIENCE)

    bench = await one_handler(db, handle, batch=10, concurrency=2, attempts=1)
    for _ in range(2):
        await bench.add("a", ({"n": n} for n in range(10)))
    await bench.work()
    assert await bench.left() == {"job": 2}
    down = False
    await bench.advance(timedelta(seconds=2))
    await bench.work()
    assert await bench.left() == {}


@pytest.mark.parametrize(("concurrency", "rate", "ahead"), [
    (300, 300.0, 150),                                                 # a second each: pullers never find nothing
    (20, 0.1, 0),                                                      # minutes each: others may have them
    (20, 10_000.0, 1250),                                              # quick: an eighth of a second's
])
def test_what_half_a_second_takes_is_claimed_ahead(concurrency: int, rate: float, ahead: int) -> None:
    lane = Lane(1, "h", None, "python", True, "now", False, 100, timedelta(0), concurrency, timedelta(minutes=5), 5,
                timedelta(seconds=1), 1, "public.t", ("id",), "int", None, rate=rate, running=concurrency)
    assert lane.wants() == ahead
    lane.items.extend(range(ahead // 2 + 1))
    assert lane.wants() == 0                                           # half of it is left: not yet


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), max_size=12), max_size=8), st.data())
def test_records_by_job_are_those_at_their_positions_and_so_are_parts_of_a_batch(left: list[list[bool]], data: Any):
    jobs: list[Any] = [SimpleNamespace(id=n, left=[ordinal for ordinal, is_left in enumerate(some, 3) if is_left])
                       for n, some in enumerate(left)]
    batch = Batch.of(reversed(jobs))
    records = [(job, ordinal) for job in jobs for ordinal in job.left]
    assert [batch.at(position) for position in range(batch.size)] == [*batch] == records
    taken = [position for position in range(batch.size) if data.draw(st.booleans())]
    by_job = [*batch.by_job(iter(taken))]
    assert [place for _, places, _ in by_job for place in places] == taken
    assert [(job, ordinal) for job, _, ordinals in by_job for ordinal in ordinals] == [records[n] for n in taken]
    assert [job for job, _, _ in by_job] == [job for job in jobs if any(records[n][0] is job for n in taken)]
    assert all(len(places) == len(ordinals) for _, places, ordinals in by_job)
    assert [*batch.pick(iter(taken))] == [records[n] for n in taken]
    assert batch.pick(taken).jobs == [job for job, _, _ in by_job]
    assert [*batch.without(taken)] == [record for n, record in enumerate(records) if n not in taken]
    ways = data.draw(st.integers(1, 10))
    parts = batch.split(ways)
    assert [record for part in parts for record in part] == records and len(parts) <= ways
    assert len({part.size for part in parts[:-1]}) <= 1 and all(part.size for part in parts[1:])
