"""Procrastinate: batch_defer, 20 jobs at a time in a worker, jobs deleted when done, woken by NOTIFY.

Its worker does not take back what a dead one held: the documented way is a periodic task of one's own that retries
the jobs of workers without a heartbeat. It runs here every second when a lease is given.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Sequence

import procrastinate
from common import LEASE, Handler, command

logging.getLogger("procrastinate").setLevel(logging.ERROR)
running = set()


async def main() -> None:
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo="", min_size=16, max_size=25))
    handlers: list[Handler] = []

    @app.task(name="trivial")
    async def trivial(job: int) -> None:
        await handlers[0](job)

    if LEASE and sys.argv[1] == "work":

        @app.periodic(cron="* * * * * *")
        @app.task(name="retry_stalled", queueing_lock="retry_stalled", pass_context=True)
        async def retry_stalled(context: procrastinate.JobContext, timestamp: int) -> None:
            for job in await app.job_manager.get_stalled_jobs(seconds_since_heartbeat=LEASE):
                await app.job_manager.retry_job(job)

    async with app.open_async():

        async def bulk(jobs: Sequence[int]) -> None:
            await trivial.batch_defer_async(*({"job": job} for job in jobs))

        async def work(handler: Handler) -> None:
            handlers.append(handler)
            # A worker at its start deletes the rows of those it finds stalled; what they held is stalled all the same.
            lease = {"update_heartbeat_interval": LEASE / 2, "stalled_worker_timeout": LEASE} if LEASE else {}
            working = app.run_worker_async(
                concurrency=int(os.environ.get("PEER_SLOTS", 20)),
                delete_jobs="always",
                listen_notify=True,
                install_signal_handlers=False,
                **lease,
            )
            running.add(asyncio.create_task(working))

        await command(
            sys.argv[1:],
            install=app.schema_manager.apply_schema_async,
            bulk=bulk,
            one=lambda job: trivial.defer_async(job=job),
            work=work,
            write=lambda job: app.connector.execute_query_async(
                "insert into effects (job) values (%(job)s)", job=job
            ),
        )


asyncio.run(main())
