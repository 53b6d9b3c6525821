"""Suspects: jobs whose worker died with them. Most are innocent, so they are run together.

    reclaim_together -> run -> settled       that killed the process: a tenth of one handler's, then each by itself
                                             killed it again: cut into parts, a single record buried at last
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from functools import partial

from anton import queue
from anton.lane import Batch, Lane
from anton.queue import Job
from anton.run import Run
from anton.settle import Settler


async def work_suspects(settler: Settler, lease: timedelta, lanes: Mapping[int, Lane], slots: int,
                        run: Callable[[Run], Awaitable[object]], alive: Callable[[], bool],
                        room: Callable[[Lane], Awaitable[int]]) -> int:
    """Runs them while alive(), so many calls at a time; how many records were settled. run: one batch to its end.

    room: how many calls of a lane may run; 0: others hold all its permits, and its jobs wait in the queue.
    """
    db, done, free = settler.db, 0, asyncio.Semaphore(slots)

    async def work(lane: Lane, jobs: list[Job]) -> None:
        nonlocal done
        left = sum(len(job.left) for job in jobs)
        runs = [Run(lane, Batch.of(some)) for like in _alike(jobs) for some in _batches(like, lane.batch)]
        while runs:
            most = await room(lane)
            if not most:
                await settler.give_back([job for waits in runs for job in waits.batch.jobs])
                break
            await asyncio.gather(*map(one, runs[:most]))
            runs = runs[most:]
        done += left - sum(len(job.left) for job in jobs)

    async def one(batch: Run) -> None:
        async with free:
            if batch.lane.order is not None:
                batch.lane.order.tenure = -1                           # the dead may have settled something just now
            await run(batch)

    async def next_jobs() -> tuple[list[Job], bool]:
        """What may run beside what runs, or, when nothing runs, what is to run apart; whether it is the latter."""
        async with db.conn() as conn:
            reclaim = partial(queue.reclaim_together, db, conn, settler.worker, lease)
            for ids in asked:
                jobs = await reclaim([id for id in ids if id not in busy], beside=True)
                if jobs:
                    return jobs, False
                if not busy and (jobs := await reclaim(ids)):
                    return jobs, True
            if not busy:                                               # or those there are cannot be had
                await queue.thaw(db, conn, lease)
        return [], False

    rated = [id for id, lane in lanes.items() if lane.tap is not None]
    others = [id for id in lanes if id not in rated]
    asked = [others, rated] if rated else [others]                     # those with a rate may have to wait for long

    busy: dict[int, asyncio.Task[None]] = {}                           # a handler that is done waits for no other
    try:
        while alive():
            jobs, apart = await next_jobs()
            if not jobs:
                if not busy:
                    break
                await asyncio.wait(busy.values(), return_when=asyncio.FIRST_COMPLETED)
            elif (job := jobs[0]).crashes and len(job.left) > 1:
                await settler.transact(partial(queue.split_crashed, db, job=job))
            elif job.crashes >= lanes[job.handler_id].attempts:
                await settler.bury(
                    lanes[job.handler_id], Batch.of(jobs), "crashed",
                    f"its process died {job.crashes} times while this record ran alone"
                )
            else:
                by_lane = dict[int, list[Job]]()
                for job in jobs:
                    by_lane.setdefault(job.handler_id, []).append(job)
                busy |= {id: asyncio.create_task(work(lanes[id], some)) for id, some in by_lane.items()}
                if apart:
                    await asyncio.wait(busy.values())
            for id in [id for id, task in busy.items() if task.done()]:
                await busy.pop(id)
        await asyncio.gather(*busy.values())
    except BaseException:
        for task in busy.values():
            task.cancel()
        await asyncio.gather(*busy.values(), return_exceptions=True)
        raise
    return done


def _alike(jobs: list[Job]) -> list[list[Job]]:
    """Apart by tenant, and what failed before from what is new, as Lane.take() has them."""
    found: dict[tuple[str | None, bool], list[Job]] = {}
    for job in jobs:
        found.setdefault((job.tenant, job.attempt > 0), []).append(job)
    return list(found.values())


def _batches(jobs: list[Job], most: int) -> list[list[Job]]:
    """In their order, of at most so many records each, and of one job at least."""
    found: list[list[Job]] = []
    size = 0
    for job in jobs:
        if not found or size + len(job.left) > most:
            found.append([])
            size = 0
        found[-1].append(job)
        size += len(job.left)
    return found
