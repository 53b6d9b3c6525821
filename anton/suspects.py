"""Suspects: jobs whose worker died with them. Most are innocent, so they are run together.

    reclaim_together -> run -> settled       that killed the process: a tenth of one handler's, then each by itself
                                             killed it again: cut into parts, a single record buried at last
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

from anton import queue
from anton.dispatch import Dispatcher
from anton.lane import Batch, Lane
from anton.permits import AGAIN, Office
from anton.queue import Job
from anton.rate import Meter
from anton.run import Run, Runner
from anton.settle import Settler


async def work_suspects(runner: Runner, dispatcher: Dispatcher, office: Office, meter: Meter, lease: timedelta,
                        close: Callable[[], None]) -> int:
    """Runs them, as many calls at a time as there are slots, until a drain; how many records were settled.

    close: called then, so that none waits for its rate.
    """
    asking = asyncio.create_task(_ask(runner, dispatcher, office, meter, close))
    try:
        return await _work(runner.settler, dispatcher, office, lease)
    finally:
        asking.cancel()


async def _ask(runner: Runner, dispatcher: Dispatcher, office: Office, meter: Meter, close: Callable[[], None]) -> None:
    """While they run: permits that were lost meanwhile, which nobody else would ask for; a drain."""
    while office.lanes or meter.lanes:
        await asyncio.sleep(AGAIN)
        if dispatcher.closed:
            close()
        with contextlib.suppress(Exception):                           # no database: again
            for lane in dispatcher.order:
                if lane.permits is not None and (lane.items or lane.again) and not lane.room:
                    await office.take(lane.id, lane.permits, suspects=True)
                    runner.pullers.pull(lane)


async def _work(settler: Settler, dispatcher: Dispatcher, office: Office, lease: timedelta) -> int:
    db, lanes, done, free = settler.db, dispatcher.lanes, 0, asyncio.Semaphore(dispatcher.slots)

    async def room(lane: Lane) -> int:
        """Calls of a lane that may run; 0: others have held all its permits for a while, its jobs go to the queue."""
        if lane.permits is None:
            return lane.concurrency
        end = time.monotonic() + lease.total_seconds() / 4
        while not await office.take(lane.id, lane.permits, suspects=True):
            if dispatcher.closed or time.monotonic() > end:
                return 0
            await asyncio.sleep(AGAIN)
        return lane.room

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
            await asyncio.wait({dispatcher.start(batch)})

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
        while not dispatcher.closed:
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
