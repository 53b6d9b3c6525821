"""Suspects: jobs whose worker died with them, each run with nothing beside it.

    reclaim -> run alone -> settled        killed its process again: cut into parts, a single record buried at last
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
    """Runs them one after the other while alive(); how many records were settled. alone: runs one batch to its end."""
    db, done = settler.db, 0
    while alive():
        async with db.conn() as conn:
            jobs = await queue.reclaim(db, conn, settler.worker, lease, list(lanes))
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
            left = len(job.left)
            await alone(Run(lanes[job.handler_id], Batch.of(jobs)))
            done += left - len(job.left)
    return done
