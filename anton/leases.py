"""Leases: which a worker keeps alive, and what it drops when they went to somebody else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection, Iterable, Mapping

from anton.lane import Lane
from anton.order import OutOfOrder
from anton.run import Run

log = logging.getLogger("anton.worker")


class Pulse:
    """Whether an event loop runs, as another thread sees it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._asked = loop, False

    def missed(self) -> bool:
        """True when the loop has run nothing since the last call."""
        missed, self._asked = self._asked, True
        with contextlib.suppress(RuntimeError):                        # it has ended just now
            self._loop.call_soon_threadsafe(self._answer)
        return missed

    def _answer(self) -> None:
        self._asked = False


def kept(lanes: Iterable[Lane], runs: Iterable[Run]) -> tuple[list[int], list[int]]:
    """Tokens of the leases to keep alive, and ids of jobs under them that are left to run out. From any thread.

    Left to run out are the jobs of a call that is long overdue: others may try them.
    """
    now = time.monotonic()
    tokens = {job.token for lane in lanes for job in list(lane.waiting)}
    overdue: list[int] = []
    for run in runs:
        if run.overdue_at is not None and now > run.overdue_at:
            overdue += [job.id for job in run.batch.jobs if job.left]
        else:
            tokens |= run.tokens
    return list(tokens), overdue


def drop(tokens: set[int], lanes: Collection[Lane], active: Mapping[asyncio.Task[None], Run],
         settling: set[asyncio.Task[None] | None]) -> None:
    """Cancels what runs under leases that are lost, and forgets what waits.

    settling: tasks in a transaction. It may have been their own COMMIT that ended the lease; else the fence tells them.
    """
    lost = sum(job.token in tokens for lane in lanes for job in lane.waiting)
    for task, run in active.items():
        if run.tokens & tokens and task not in settling:
            lost += 0 if task.cancelling() else sum(job.token in tokens for job in run.batch.jobs if job.left)
            task.cancel()
    for lane in lanes:
        if lane.order is not None and any(job.token in tokens for job in lane.waiting):
            lane.down, lane.order.stopped = lane.down or OutOfOrder(), True
        lane.drop(tokens)
    if lost:
        log.warning("worker: a lease was lost, of %s jobs; another worker has these records", lost)
