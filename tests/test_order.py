"""Order: records of one key run one at a time, first what was first, whatever fails and whoever dies."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from datetime import timedelta
from typing import Any

import pytest
from working import Bench

from anton import Retry, Table
from anton.db import Database


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
    for found in seen.values():                                        # handled at least once; nothing after it before it
        assert list(dict.fromkeys(found)) == list(range(1, 26)), found
    assert len(seen) == 8 and await bench.left() == {} and await bench.count("anton.turn") == 0
