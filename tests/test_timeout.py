"""Timeouts: a coroutine is cancelled, a stuck thread given up, a SQL handler stopped; the record at hand has failed."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from working import Bench, numbers, one_handler

from anton import Records, Table
from anton.db import Database


async def test_a_timeout_cancels_a_coroutine_and_fails_its_record(db: Database):
    cancelled: list[int] = []

    async def handle(record: Any) -> None:
        if record["n"] == 1:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.append(1)
        tables["b"].append({"n": record["n"]})

    bench = await one_handler(db, handle, each=True, timeout="1s", attempts=1)
    tables = bench.app.tables
    await bench.add("a", ({"n": n} for n in range(20)))
    await bench.work()
    assert cancelled == [1] and await bench.count("b") == 19
    assert "longer than its timeout of 1 s" in await bench.value("select error from anton.dead")


async def test_a_coroutine_of_a_batch_that_takes_too_long_is_split(db: Database):
    async def handle(records: Records) -> None:
        if 1 in numbers(records):
            await asyncio.Event().wait()
        tables["b"].extend({"n": n} for n in numbers(records))

    bench = await one_handler(db, handle, timeout="600ms", attempts=1)
    tables = bench.app.tables
    await bench.add("a", ({"n": n} for n in range(20)))
    await bench.work()
    assert await bench.count("b") == 19 and await bench.left() == {"dead": 1}


@pytest.mark.parametrize("each", [False, True])
async def test_a_stuck_thread_is_given_up_its_record_fails_and_the_others_are_done(db: Database, each: bool):
    never, stuck = threading.Event(), []

    def one(record: Any) -> None:
        if record["n"] == 1:
            never.wait(60)
        tables["b"].append({"n": record["n"]})

    def batch(records: Records) -> None:
        for record in records:
            one(record)

    bench = await one_handler(db, one if each else batch, each=each, timeout="1s", attempts=1)
    tables = bench.app.tables
    await bench.add("a", ({"n": n} for n in range(20)))
    try:
        await bench.work(on_stuck=lambda: stuck.append(1))
        assert stuck == [1] and await bench.count("b") == 19 and await bench.left() == {"dead": 1}
        assert await bench.column("select key ->> 0 from anton.dead") == ["2"]
    finally:
        never.set()


async def test_a_sql_handler_that_runs_too_long_is_stopped(db: Database):
    def declare() -> None:
        a = Table("a")
        Table("b")
        a.on_new_records.sql("insert into b (data) select jsonb_build_object('n', 1) from new_records, "
                             "lateral (select pg_sleep(case when (data->>'n')::int = 1 then 20 else 0 end)) x",
                             name="slow", attempts=1, timeout="1s")

    bench = await Bench.make(db, declare)
    await bench.add("a", ({"n": n} for n in range(3)))
    await bench.work()
    assert await bench.count("b") == 2 and await bench.left() == {"dead": 1}
    assert "longer than its timeout" in await bench.value("select error from anton.dead")
