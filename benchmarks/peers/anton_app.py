"""Anton's side of the comparison: one record a job, a call for each, by PEER_KIND; or, as "batch", a call for many."""

import asyncio
import os
import time
from typing import Any

import asyncpg

from anton import Records, Table
from benchmarks.peers.python.common import pause

jobs = Table("jobs")
KIND = os.environ.get("PEER_KIND", "noop")
pools: list[asyncio.Task[Any]] = []


async def pool() -> Any:
    return await asyncpg.create_pool(os.environ["PEER_URL"], min_size=1, max_size=20)


if KIND == "start":

    @jobs.on_new_records(each=True, batch=1, into=Table("starts"))
    def work(record: Any) -> dict[str, int]:
        return {"job": record["job"], "at": time.monotonic_ns()}

elif KIND == "commit":

    @jobs.on_new_records(each=True, batch=1, into=Table("effects"))
    async def work(record: Any) -> dict[str, int]:
        await asyncio.sleep(pause(record["job"]))
        return {"job": record["job"]}

elif KIND == "own":

    @jobs.on_new_records(each=True, batch=1)
    async def work(record: Any) -> None:
        await asyncio.sleep(pause(record["job"]))
        if not pools:  # made in the process that uses it
            pools.append(asyncio.ensure_future(pool()))
        await (await pools[0]).execute("insert into effects (job) values ($1)", record["job"])

elif KIND == "batch":

    @jobs.on_new_records
    def work(records: Records[Any]) -> None:
        pass

else:

    @jobs.on_new_records(each=True, batch=1)
    def work(record: Any) -> None:
        pass
