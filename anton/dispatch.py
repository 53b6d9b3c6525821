"""Dispatch: which lanes are claimed for, and which get the free slots of a worker.

    wanted() -> Claim -> lane.waiting -> fill(): a batch for each free slot -> start() -> ended: fill() again

Lanes have their turn one after the other, so that a deep handler starves nobody. Where priorities differ, the highest
rank is first (rank.py). Bookkeeping and tasks: no database.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Literal

from anton.lane import Lane
from anton.queue import Job
from anton.rank import rank
from anton.run import Run

log = logging.getLogger("anton.worker")

MANY = 64  # lanes; with more, a look tells which are worth a claim


class Claim:
    """What is asked of the queue for some lanes.

    at: when, in the event loop's time. records, jobs, after: of each lane, how many at most, and from which id on.
    """

    def __init__(self, lanes: list[Lane]) -> None:
        self.lanes = lanes
        self.at = time.monotonic()
        self.records = [lane.wants() for lane in lanes]
        self.jobs = [lane.jobs_for(n) for lane, n in zip(lanes, self.records, strict=True)]
        self.after = [lane.start_from(self.at) for lane in lanes]

    def brought(self, claimed: Sequence[Job]) -> list[Lane]:
        """Gives each lane what was claimed for it; the lanes that got any."""
        took = time.monotonic() - self.at
        mine: dict[int, list[Job]] = {lane.id: [] for lane in self.lanes}
        for job in claimed:
            mine[job.handler_id].append(job)
        for lane, jobs, records, after in zip(self.lanes, self.jobs, self.records, self.after, strict=True):
            lane.claimed(mine[lane.id], jobs, records, after, self.at, took)
        return [lane for lane in self.lanes if mine[lane.id]] if claimed else []


class Dispatcher:
    """A worker's lanes, and what runs of them.

    slots: calls at a time, of all lanes together. run: makes the calls of a batch. ended: told of a lane when a batch
    of it has ended. wake: set then, and when a batch was held for long enough.
    lanes: by handler id; order: the same, whose turn is next first; active: what runs. hold: batches may wait to be
    full. closed: nothing is started any more.
    """

    def __init__(self, slots: int, run: Callable[[Run], Coroutine[Any, Any, None]], ended: Callable[[Lane], None],
                 wake: asyncio.Event) -> None:
        self.slots = slots
        self.lanes: dict[int, Lane] = {}
        self.order: deque[Lane] = deque()
        self.active: dict[asyncio.Task[None], Run] = {}
        self.hold = True
        self.closed = False
        self._ranked = False                                           # lanes have different priorities
        self._run = run
        self._ended = ended
        self._wake = wake

    def know(self, lanes: dict[int, Lane]) -> None:
        """The lanes there are now. Of many, a new one is asked for when a look has found something."""
        if len(lanes) > MANY:
            for id in lanes.keys() - self.lanes.keys():
                lanes[id].ready = False
        self.lanes = lanes
        self.order = deque(lanes.values())
        self._ranked = len({lane.priority for lane in lanes.values()}) > 1

    # Which may have jobs

    def wrote(self, tables: set[int] | None) -> None:
        """A commit of ours made work for these tables' handlers; None: perhaps for all. No bell is needed."""
        for lane in self.order:
            if tables is None or lane.table_id in tables:
                lane.ready = True

    def all_ready(self) -> None:
        """Any lane may have jobs: a claim asks them all, or with many, a look tells which to ask."""
        if len(self.lanes) <= MANY:
            for lane in self.order:
                lane.ready = True

    def wanted(self) -> list[Lane]:
        """Lanes to claim for, in turn: about as many as there are free slots."""
        most = 2 * (self.slots - len(self.active))
        if self._ranked:
            return self._first(lambda lane: lane.ready and bool(lane.wants()), "claim_since")[:max(2, most)]
        found: list[Lane] = []
        for lane in self.order:
            if len(found) >= most:
                break
            if lane.ready and lane.wants():
                found.append(lane)
        return found

    # Which get the slots

    @property
    def full(self) -> bool:
        """No slot is free."""
        return len(self.active) >= self.slots

    def fill(self) -> bool:
        """Starts batches in free slots. Whether some are held; then the worker wakes in time."""
        now = time.monotonic()
        until = self._fill_by_rank(now) if self._ranked else self._fill_in_turn(now)
        if until == float("inf"):
            return False
        asyncio.get_running_loop().call_later(max(0.001, until - now), self._wake.set)
        return True

    def _fill_in_turn(self, now: float) -> float:
        """One lane after the other, each as far as it may; until when what was held is."""
        until = float("inf")
        for _ in range(len(self.order)):
            if len(self.active) >= self.slots or self.closed:
                break
            lane = self.order[0]
            self.order.rotate(-1)
            while len(self.active) < self.slots and lane.free():
                batch = lane.take(now, self.hold)
                if batch is None:
                    until = min(until, lane.held_until or until)
                    break
                self.start(Run(lane, batch))
        return until

    def _fill_by_rank(self, now: float) -> float:
        """The highest rank first, one batch at a time; until when what was held is."""
        waiting, until = self._first(Lane.free, "slot_since"), float("inf")
        while waiting and len(self.active) < self.slots and not self.closed:
            lane = max(waiting, key=lambda lane: rank(lane.priority, now - lane.slot_since))
            waiting.remove(lane)
            batch = lane.take(now, self.hold)
            if batch is None:
                until = min(until, lane.held_until or until)
                continue
            self.start(Run(lane, batch))
            if lane.free():
                waiting.append(lane)
        return until

    def _first(self, waits: Callable[[Lane], bool], since: Literal["claim_since", "slot_since"]) -> list[Lane]:
        """The lanes that wait for something, the highest rank first; since when is noted of them.

        What waits for its rate has waited, too: starts come and go, and none would last until its turn.
        """
        now, found = time.monotonic(), list[Lane]()
        for lane in self.order:
            if waits(lane):
                found.append(lane)
            elif not lane.dry:
                setattr(lane, since, now)
        return sorted(found, key=lambda lane: -rank(lane.priority, now - getattr(lane, since)))

    def start(self, run: Run) -> asyncio.Task[None]:
        """Runs a batch, whether a slot is free or not."""
        lane = run.lane
        task = asyncio.create_task(self._run(run), name=lane.name)
        self.active[task] = run
        lane.started(run.batch)

        def ended(task: asyncio.Task[None]) -> None:
            del self.active[task]
            lane.ended(run.batch)
            if not task.cancelled() and task.exception() is not None:
                log.error("worker: %s", lane.name, exc_info=task.exception())
            self._ended(lane)
            self._wake.set()

        task.add_done_callback(ended)
        return task
