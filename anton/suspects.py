"""Suspects: jobs whose worker died with them. Most are innocent, so they are run together once.

    reclaim_together -> run -> settled       that killed the process: each is run with nothing beside it
                                             killed it again: cut into parts, a single record buried at last
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from functools import partial

from anton import queue
from anton.lane import Batch, Lane
from anton.run import Run
from anton.settle import Settler


async def work_suspects(settler: Settler, lease: timedelta, lanes: Mapping[int, Lane],
                        alone: Callable[[Run], Awaitable[object]], alive: Callable[[], bool]) -> int:
    """Runs them batch after batch while alive(); how many records were settled. alone: runs one batch to its end."""
    db, done = settler.db, 0
    while alive():
        async with db.conn() as conn:
            jobs = await queue.reclaim_together(db, conn, settler.worker, lease, list(lanes))
        if not jobs:
            break
        job = jobs[0]
        if job.crashes and len(job.left) > 1:
            await settler.transact(partial(queue.split_crashed, db, job=job))
        elif job.crashes >= lanes[job.handler_id].attempts:
            await settler.bury(
                Batch.of(jobs), "crashed", f"its process died {job.crashes} times while this record ran alone"
            )
        else:
            left = sum(len(job.left) for job in jobs)
            await alone(Run(lanes[job.handler_id], Batch.of(jobs)))
            done += left - sum(len(job.left) for job in jobs)
    return done
