"""PgQueuer with asyncpg, a pool, uvloop and large batches (its guide to performance)."""

import asyncio
import sys
from collections.abc import Sequence
from datetime import timedelta

import asyncpg
import uvloop
from common import LEASE, Handler, command
from pgqueuer import PgQueuer, Queries
from pgqueuer.db import AsyncpgPoolDriver

BATCH = 500
running = set()


async def main() -> None:
    pool = await asyncpg.create_pool(min_size=16, max_size=20)
    queries = Queries(AsyncpgPoolDriver(pool))

    async def bulk(jobs: Sequence[int]) -> None:
        await queries.enqueue(["trivial"] * len(jobs), [str(job).encode() for job in jobs], [0] * len(jobs))

    async def work(handler: Handler) -> None:
        pgq = PgQueuer.from_asyncpg_pool(pool)

        @pgq.entrypoint("trivial")
        async def trivial(job):
            await handler(int(job.payload))

        # An idle worker looks for stale jobs each dequeue_timeout.
        times = {"heartbeat_timeout": LEASE, "dequeue_timeout": 1} if LEASE else {}
        lease = {name: timedelta(seconds=seconds) for name, seconds in times.items()}
        running.add(asyncio.create_task(pgq.run(batch_size=BATCH, **lease)))

    await command(
        sys.argv[1:],
        install=queries.install,
        bulk=bulk,
        one=lambda job: queries.enqueue("trivial", str(job).encode()),
        work=work,
        write=lambda job: pool.execute("insert into effects (job) values ($1)", job),
    )


uvloop.run(main())
