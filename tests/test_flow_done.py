"""Whatever limits a handler has: all that comes is done once, when time goes on, and no worker hangs on what waits."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest
from working import Bench, one_handler

from anton.db import Database

LIMITS: list[dict[str, Any]] = [
    {"rate": "3/h"},
    {"rate": "5/h", "concurrency": 2},
    {"rate": "1/h", "per": "k"},
    {"rate": "2/h", "per": "k", "concurrency": 2},
    {"rate": "70/h", "per": "k", "concurrency": 1},
    {"concurrency": 2},
    {"concurrency": 1, "per": "k"},
    {"concurrency": 2, "per": "k"},
    {"ordered": True},
    {"ordered": True, "per": "k"},
    {"ordered": True, "concurrency": 2},
]
PERIOD = timedelta(hours=2)  # longer than a window
MOST = 100  # periods


@pytest.mark.once("limits are the worker's, and what is of Postgres in them has tests on both")
@pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: " ".join(f"{k}={v}" for k, v in limits.items()))
async def test_all_is_done_once_within_the_limits_whenever_it_comes_and_fails(
        db: Database, limits: dict[str, Any]) -> None:
    """Records come before a worker, beside it, and while it drains; some fail once or twice."""
    chance = random.Random(str(limits))
    fails, done, began, period, last = dict[int, int](), Counter[int](), Counter[tuple[int, str]](), 0, 0

    async def handle(record: Any) -> None:
        await asyncio.sleep(chance.choice([0, 0, 0.001, 0.02]))
        began[period, record["k"] if "per" in limits else ""] += 1
        fails[record["n"]] -= 1
        if fails[record["n"]] >= 0:
            raise ValueError("not yet")
        done[record["n"]] += 1

    async def come(bench: Bench, times: int) -> None:
        nonlocal last
        for _ in range(times):
            new = range(last + 1, last + 1 + chance.randint(1, 4))
            last = new[-1]
            fails.update({n: chance.choice([0, 0, 1, 2]) for n in new})
            await bench.add("a", [{"n": n, "k": chance.choice("ab")} for n in new])

    backoff = chance.choice(["1ms", "50ms", "30m"])
    bench = await one_handler(db, handle, each=True, backoff=backoff, attempts=9, **limits)
    await bench.full_hour()
    await come(bench, 1)
    await asyncio.gather(bench.work(), come(bench, 3))
    async with bench.running():
        await come(bench, 3)
    await bench.work()
    while await bench.left() and period < MOST:
        await bench.advance(PERIOD)
        period += 1
        await bench.work()
    assert await bench.left() == {} and done == Counter(range(1, last + 1))
    if "rate" in limits:
        assert max(began.values()) <= int(limits["rate"].split("/")[0])
