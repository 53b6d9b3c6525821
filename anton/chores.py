"""Chores: what a worker does beside its loop, at its time or when called.

    schedules -> housekeeping -> dbt's tables -> the catalogue -> backfills -> a pause, until the next is due
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta

from anton import schedule
from anton.catalogue import feed
from anton.db import Database
from anton.dispatch import Dispatcher
from anton.doorbell import Doorbell
from anton.fate import disconnected

log = logging.getLogger("anton.worker")

REFRESH, SOON = 5.0, 0.5  # seconds between readings of the handler catalogue; when there is a reason to look
HOUSEKEEPING, WATCH = 60.0, 20.0  # seconds between them; WATCH: for tables that dbt made anew without hooks
STEP = 1.0  # seconds between two steps of housekeeping, as long as there is something to do


class Chores:
    """Does them until it is cancelled, at least once a lease. refresh: reads the catalogue.

    wake: set after each round. on_error: told what failed, unless the database is away.
    """

    def __init__(self, db: Database, dispatcher: Dispatcher, bell: Doorbell, refresh: Callable[[], Awaitable[None]],
                 wake: asyncio.Event, on_error: Callable[[BaseException], None]) -> None:
        self._db, self._dispatcher, self._bell = db, dispatcher, bell
        self._refresh, self._wake, self._on_error = refresh, wake, on_error
        self.lease = timedelta.max
        self._called = asyncio.Event()
        self._refreshed = 0.0
        self._stale = False                                            # the catalogue may be
        self._asleep = False                                           # the announced worker may be

    def call(self) -> None:
        """Something is due."""
        self._called.set()

    def stale(self) -> None:
        """There may be a handler that was made just now: the catalogue is read soon."""
        self._stale = True
        again = max(0.0, self._refreshed + SOON - time.monotonic())
        asyncio.get_running_loop().call_later(again, self._called.set)

    def asleep(self) -> None:
        """The announced worker may be."""
        self._asleep = True
        self._called.set()

    async def run(self) -> None:
        """Begins when the catalogue was read just now."""
        self._refreshed = time.monotonic()
        kept, watched, again = 0.0, 0.0, True
        while True:
            self._called.clear()                                       # who calls from here on is heard
            pause = min(self.lease.total_seconds(), WATCH)
            try:
                async with self._db.conn() as conn:
                    due = await schedule.fire(self._db, conn)
                    if due is not None:
                        now = await self._db.call_value(conn, "now")
                        pause = min(pause, max(0.0, (due - now).total_seconds()))
                    if time.monotonic() - kept > HOUSEKEEPING:
                        if await self._db.call_value(conn, "maintain") is None:
                            kept = time.monotonic()
                        else:
                            pause = min(pause, STEP)
                    if time.monotonic() - watched > WATCH:
                        watched = time.monotonic()
                        await self._db.call(conn, "dbt_watchdog")
                if time.monotonic() - self._refreshed > (SOON if self._stale else REFRESH):
                    self._stale = again = False
                    await self._refresh()
                    self._refreshed = time.monotonic()
                if self._stale:                                        # it was told so while the catalogue was read
                    pause = min(pause, SOON)
                if again or not self._bell.held:                       # a handler made before it was rings for nobody
                    pause = min(pause, REFRESH)
                if await feed(self._db, self._dispatcher.lanes.values()):
                    pause = min(pause, 0.2)
                if self._asleep:
                    self._asleep = False
                    await self._bell.unfreeze()
                self._wake.set()
            except Exception as error:
                if not disconnected(error):
                    log.exception("worker: chores")
                    self._on_error(error)
                pause = 5.0
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._called.wait(), max(0.02, pause))
