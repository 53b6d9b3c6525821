"""Order: records of one key run one at a time, first what was first, whatever fails and whoever dies."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from datetime import timedelta
from typing import Any

from working import Bench

from anton import Table
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
