"""Heartbeat: keeps leases alive from a thread of its own: a handler that blocks the event loop loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta

import asyncpg

from anton import queue
from anton.db import Conn, Database
from anton.errors import AntonError

SEEN = 10.0  # an idle worker says that it lives at most so often, in seconds
_LOST = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, AntonError)

log = logging.getLogger("anton.worker")


class Heartbeat:
    """Extends the leases that `tokens()` names every lease / 3 until stop().

    tokens: the tokens, and ids of jobs under them whose leases are left to run out. lost: told tokens that were asked
    for and hold nothing any more. also: what else is to be kept alive. All are called in the heartbeat's thread.
    """

    def __init__(self, db: Database, worker: int, lease: timedelta, tokens: Callable[[], tuple[list[int], list[int]]],
                 lost: Callable[[set[int]], None], also: Callable[[Conn], Awaitable[None]] | None = None) -> None:
        self._also = also
        self._db, self._worker, self._lease, self._tokens, self._lost = db, worker, lease, tokens, lost
        self._every = lease.total_seconds() / 3
        self._stop = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._main, name="anton-heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and closes its connection; a beat that is under way is cut short."""
        self._stop.set()
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):                    # it has ended just now
                loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
        self._thread.join(3)

    def _main(self) -> None:
        if not self._stop.wait(self._every):                           # short work never needs a connection here
            with contextlib.suppress(asyncio.CancelledError):
                asyncio.run(self._beat())

    async def _beat(self) -> None:
        self._loop = asyncio.get_running_loop()
        conn: asyncpg.Connection[asyncpg.Record] | None = None
        seen = 0.0
        try:
            while not self._stop.is_set():
                pause = self._every
                try:
                    tokens, without = self._tokens()
                    if tokens or time.monotonic() - seen >= SEEN:
                        if conn is None or conn.is_closed():
                            conn = await self._db.connect()
                        held = await asyncio.wait_for(
                            queue.heartbeat(self._db, conn, self._worker, tokens, self._lease, without),
                            max(self._every, 1.0))
                        if self._also is not None:
                            await asyncio.wait_for(self._also(conn), max(self._every, 1.0))
                        seen = time.monotonic()
                        if len(held) < len(tokens):
                            self._lost(set(tokens) - held)
                except Exception as error:                             # whatever it is, the leases need the next beat
                    if not isinstance(error, _LOST):
                        log.exception("worker: heartbeat")
                    pause = min(1.0, self._every)
                    if conn is not None:
                        conn.terminate()
                        conn = None
                await asyncio.sleep(pause)
        finally:
            if conn is not None:
                conn.terminate()
