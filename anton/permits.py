"""Permits: how many records, or calls, of a handler with a limit over all processes this worker may run now.

    lane has work -> permit() leases some -> at most so many run -> the heartbeat keeps them -> idle: given back
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from anton import queue
from anton.db import Conn, Database

SHARE = 0.1  # seconds that a worker keeps to its share, to leave some to the others
AGAIN, RARELY = 0.05, 0.25  # seconds between two askings, at first; when the last ones brought nothing
LONGER = 2  # leases of jobs that a permit lasts in the database: one that is claimed with it may outlast it by one
FEW = 64  # permits to ask for first: each is a row to write


@dataclass(eq=False)
class Permits:
    """What one lane holds, until a time of time.monotonic(), which goes on in a frozen process.

    most: how many there are. each: how many may run with one of them.
    """

    most: int
    each: int = 1
    held: int = 0
    until: float = 0.0
    asked: float = 0.0
    pause: float = AGAIN                                               # until it asks for more
    short: float | None = None                                         # since when it has had fewer than all
    tenure: int = 0                                                    # times that it began to hold any

    @property
    def valid(self) -> int:
        """How many it holds now."""
        return self.held if time.monotonic() < self.until else 0

    def room(self) -> int:
        """How many may run. Asked for each record."""
        return self.held * self.each if time.monotonic() < self.until else 0

    def got(self, held: int, before: float, lease: timedelta) -> None:
        """So many are held, as of a time before the database was asked: here they run out sooner than there."""
        self.held, self.until = held, before + lease.total_seconds()


class Limited(Protocol):
    """A lane, as far as it matters here. still: nothing of it is claimed or runs."""

    id: int
    ready: bool
    permits: Permits | None

    @property
    def still(self) -> bool: ...


class Office:
    """Asks for a worker's permits and gives them back. lanes: those with a limit; without any, nothing is asked."""

    def __init__(self, db: Database, worker: int, lease: timedelta) -> None:
        self._db, self._worker, self._lease = db, worker, lease
        self.lanes: list[tuple[Limited, Permits]] = []

    def know(self, lanes: Iterable[Limited]) -> None:
        """The lanes there are now."""
        self.lanes = [(lane, lane.permits) for lane in lanes if lane.permits is not None]

    @property
    def holds(self) -> bool:
        """Some are to be kept, and to be given back."""
        return any(own.held for _, own in self.lanes)

    @property
    def hungry(self) -> bool:
        """A lane that may have work has no permit for it."""
        return any((lane.ready or not lane.still) and not own.valid for lane, own in self.lanes)

    async def turn(self) -> None:
        """Takes permits for lanes that have work, gives back those of idle ones."""
        for lane, own in list(self.lanes):
            if lane.ready or not lane.still:
                if own.valid < own.most and time.monotonic() - own.asked >= own.pause:
                    await self.take(lane.id, own)
            elif own.held:
                await self._give_back(lane.id, own)

    async def take(self, id: int, own: Permits, suspects: bool = False) -> int:
        """Takes what is free, at first of this worker's share; how many it may run. suspects: to run such jobs."""
        before = own.asked = time.monotonic()
        more = own.short is not None and before - own.short > SHARE
        own.tenure += not own.valid
        had, wanted = own.held, min(own.most, max(FEW, 2 * own.held))
        async with self._db.conn() as conn:
            own.got(await queue.permit(self._db, conn, self._worker, id, wanted, self._lease * LONGER, more, suspects),
                    before, self._lease)
        own.pause = AGAIN if own.held > had else min(RARELY, 2 * own.pause)
        own.short = None if own.held >= own.most else own.short or before
        return own.room()

    async def end(self) -> None:
        """Gives back all of lanes of which nothing runs."""
        for lane, own in self.lanes:
            if own.held and lane.still:
                await self._give_back(lane.id, own)

    async def _give_back(self, id: int, own: Permits) -> None:
        own.held, own.short = 0, None                                  # nothing starts while it is asked
        async with self._db.conn() as conn:
            await queue.permit(self._db, conn, self._worker, id, 0, self._lease * LONGER)

    async def keep(self, conn: Conn) -> None:
        """Extends what is held. Called in the heartbeat's thread."""
        if not self.holds:
            return
        before = time.monotonic()
        kept = await queue.keep_permits(self._db, conn, self._worker, self._lease * LONGER)
        for lane, own in list(self.lanes):
            own.got(min(own.held, kept.get(lane.id, 0)), before, self._lease)
