"""Rates: no window of time holds more starts than rate= says, over all processes, and what is not used is given back."""

from __future__ import annotations

import time
from typing import Any

import pytest
from working import Bench, one_handler

from anton.db import Database


async def test_no_more_records_begin_than_the_rate_says(db: Database) -> None:
    at: list[float] = []

    def handle(record: Any) -> None:
        at.append(time.monotonic())

    bench = await one_handler(db, handle, each=True, rate="20/s")
    await bench.add("a", ({"n": n} for n in range(50)))
    await bench.work()
    assert len(at) == 50 and await bench.left() == {}
    assert all(after - before > 1.0 for before, after in zip(at, at[20:], strict=False))
