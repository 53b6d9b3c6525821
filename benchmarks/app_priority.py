"""Twenty handlers of priority 0 with a backlog, and two of priority 9: one notes when it starts, one has a backlog."""

import asyncio
import time
from typing import Any

from anton import Records, Table

CALL = 0.02  # seconds

lows, highs, probes, starts = Table("lows"), Table("highs"), Table("probes"), Table("starts")


async def call(records: Records[Any]) -> None:
    await asyncio.sleep(CALL)


for _number in range(20):
    lows.on_new_records(name=f"low_{_number}", priority=0, batch=1)(call)

highs.on_new_records(name="high", priority=9, batch=1, concurrency=8)(call)


@probes.on_new_records(priority=9)
def start(records: Records[Any]) -> None:
    at = time.monotonic_ns()
    starts.extend({"n": record["n"], "at": at} for record in records)
