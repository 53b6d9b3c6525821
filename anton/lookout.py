"""Lookout: what a worker's looks into the queue find, and when they are due while claims bring work.

    look(): which lanes have jobs, jobs of dead workers, what is due later        reads all leases: seldom
    peek(): which of the lanes that were found empty have jobs                    cheap: a deep handler hides nobody's
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import timedelta

from anton import queue
from anton.db import Database
from anton.dispatch import Dispatcher
from anton.fate import disconnected
from anton.pace import Pace
from anton.queue import Look

log = logging.getLogger("anton.worker")

LOOK, LOOK_ALL = 0.03, 0.3  # seconds between looks while claims bring work: for the others' jobs; for suspects, too
LOOKS = 0.02  # of the time is what the latter may take, at one a second at least: they read all leases


class Lookout:
    """Looks for a worker. on_error: told when a peek beside the claims fails, and the database is not away."""

    def __init__(self, db: Database, worker: int, lease: timedelta, dispatcher: Dispatcher, pace: Pace,
                 on_error: Callable[[BaseException], None]) -> None:
        self._db, self._worker, self._lease = db, worker, lease
        self._dispatcher, self._pace, self._on_error = dispatcher, pace, on_error
        self._looked = self._peeked = 0.0
        self._peeking = False
        self._pause = LOOK_ALL                                         # till the next look

    @property
    def due(self) -> bool:
        """A look is."""
        return time.monotonic() - self._looked > self._pause

    @property
    def peek_due(self) -> bool:
        """A peek is, and none is under way beside the claims."""
        return time.monotonic() - self._peeked > LOOK and not self._peeking

    def hurry(self) -> None:
        """A peek is due now."""
        self._peeked = 0.0

    async def look(self) -> Look:
        """Looks for everything. Lanes with jobs are ready then."""
        began = time.monotonic()
        async with self._db.conn() as conn:
            look = await queue.poll(self._db, conn, self._worker, list(self._dispatcher.lanes), self._lease)
        self._looked = self._peeked = time.monotonic()
        self._pause = min(1.0, max(LOOK_ALL, (self._looked - began) / LOOKS))
        self._ready(look.ready)
        return look

    async def peek(self) -> None:
        """Which lanes that were found empty have something: they are ready then."""
        self._peeked = time.monotonic()
        flowing = self._pace.flowing(self._peeked)
        empty = [lane.id for lane in self._dispatcher.order if not (lane.ready or lane in flowing)]
        if empty:
            async with self._db.conn() as conn:
                self._ready(await queue.ready(self._db, conn, empty))

    def _ready(self, ids: list[int]) -> None:
        for id in ids:
            lane = self._dispatcher.lanes.get(id)
            if lane is not None:                                       # else the handler was dropped meanwhile
                lane.ready = True

    async def peek_beside(self) -> None:
        """While claims go on, which do not wait for it. That the database is away they say."""
        self._peeking = True
        try:
            await self.peek()
        except Exception as error:
            if not disconnected(error):
                log.exception("worker: a look")
                self._on_error(error)
                self._peeked = time.monotonic() + 1.0                  # one that fails each time is told now and then
        finally:
            self._peeking = False
