"""PgQueuer with asyncpg, a pool, uvloop and large batches (its guide to performance)."""

import asyncio
import sys
from datetime import timedelta

import asyncpg
import uvloop
from common import LEASE, Handler, command
from pgqueuer import PgQueuer, Queries
from pgqueuer.db import AsyncpgPoolDriver

BATCH = 500
running = set()


async def main() -> None:
    pool = await asyncpg.create_pool(min_size=5, max_size=20)
    queries = Queries(AsyncpgPoolDriver(pool))

    async def bulk(count: int) -> None:
        jobs = [str(job).encode() for job in range(count)]
        await queries.enqueue(["trivial"] * count, jobs, [0] * count)

    async def work(handler: Handler) -> None:
        pgq = PgQueuer.from_asyncpg_pool(pool)

        @pgq.entrypoint("trivial")
        async def trivial(job):
            await handler(int(job.payload))

        lease = {"heartbeat_timeout": timedelta(seconds=LEASE)} if LEASE else {}
        running.add(asyncio.create_task(pgq.run(batch_size=BATCH, **lease)))

    await command(
        sys.argv[1:],
        install=queries.install,
        bulk=bulk,
        one=lambda job: queries.enqueue("trivial", str(job).encode()),
        work=work,
        insert=lambda job: pool.execute("insert into effects (job) values ($1)", job),
    )


uvloop.run(main())
