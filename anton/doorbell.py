"""Doorbell: how a commit wakes an idle worker without NOTIFY on the write path.

    nothing to do -> announce (hold the bell) -> look once more -> wait --a writer meets it: NOTIFY--> hush -> claim

One worker announces itself at a time; the others wait for its call for help and look every second or two.
It is an accelerator only: each answer of announce() but BELL means "poll". Off behind a transaction pooler,
where setting doorbell is off, and where writers use two-phase commit (Postgres refuses PREPARE after NOTIFY).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from datetime import datetime
from enum import Enum
from typing import Any

import asyncpg

from anton.db import Database
from anton.errors import AntonError

FROZEN = 1.0  # seconds that an announcer may leave a ring unanswered
BROKEN = (OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError, asyncpg.InternalClientError,
          asyncpg.OperatorInterventionError, AntonError)


class Answer(Enum):
    """What came of an announcement."""

    BELL = "writers ring us"
    WRITER = "an open writer holds the bell"
    OTHER = "another worker is announced"
    OFF = "there is no bell"


class Doorbell:
    """One worker's listening connection. wake: called, in this loop, at each ring or call for help."""

    def __init__(self, db: Database, wake: Callable[[], None]) -> None:
        self._db = db
        self._wake = wake
        self._conn: asyncpg.Connection[asyncpg.Record] | None = None
        self._channel = ""
        self._retry_at = 0.0
        self._failures = 0
        self.elected = False
        self.held = False
        self.others = False  # another worker was announced lately
        self._one = asyncio.Lock()

    async def announce(self) -> Answer:
        """Says that this worker is idle. BELL: look once more, then wait. Never waits for a lock."""
        await self.hush()                                              # a lock taken twice would outlast one hush
        conn = await self._connected()
        if conn is None:
            return Answer.OFF
        try:
            async with self._one:
                row = (await self._db.call(conn, "announce", self.elected))[0]
                if row["elected"] and not self.elected:                # what was rung before this, the next look sees
                    await conn.add_listener(self._channel, self._rung)
        except BROKEN:
            await self._drop()
            return Answer.OFF
        self.elected, self.held, self.others = row["elected"], row["bell"], not row["elected"]
        return Answer.BELL if self.held else Answer.WRITER if self.elected else Answer.OTHER

    async def hush(self) -> None:
        """Lets go of the bell. Call it at any wake-up, before claiming: a held bell makes every writer pay."""
        if self.held:
            self.held = False
            await self._say("hush")

    async def step_down(self) -> None:
        """A worker with no slot free lets another announce itself."""
        await self.hush()
        if self.elected and self._conn is not None:
            self.elected = False
            await self._say("step_down")
            async with self._one:
                with contextlib.suppress(*BROKEN, AttributeError):
                    await self._conn.remove_listener(self._channel, self._rung)

    async def call_help(self) -> None:
        """There is more work than this worker takes: wakes the others."""
        await self._say("call_help")

    async def unfreeze(self) -> bool:
        """Ends an announcer's session that leaves a ring unanswered for a second. Takes up to FROZEN."""
        conn = await self._connected()
        if conn is None:
            return False
        try:
            async with self._one:
                holder = (await self._db.call(conn, "bell_holder"))[0]
                if holder["pid"] is None or self.held:
                    return False
                rung: datetime = await self._db.call_value(conn, "ring_at")
            await asyncio.sleep(FROZEN)
            async with self._one:
                return bool(await self._db.call_value(conn, "unfreeze", holder["pid"], rung))
        except BROKEN:
            await self._drop()
            return False

    async def close(self) -> None:
        """Closes the connection; the locks go with it."""
        conn, self._conn, self.held, self.elected = self._conn, None, False, False
        if conn is not None:
            with contextlib.suppress(*BROKEN, TimeoutError):
                await conn.close(timeout=2)

    async def _say(self, function: str) -> None:
        if self._conn is None:
            return
        try:
            async with self._one:
                await self._db.call(self._conn, function)
        except BROKEN:
            await self._drop()

    async def _drop(self) -> None:
        conn, self._conn, self.held, self.elected = self._conn, None, False, False
        if conn is not None:
            conn.terminate()

    async def _connected(self) -> asyncpg.Connection[asyncpg.Record] | None:
        if self._conn is not None and not self._conn.is_closed():
            return self._conn
        now = asyncio.get_running_loop().time()
        if self._db.pooled or now < self._retry_at:
            return None
        await self._drop()
        conn: asyncpg.Connection[asyncpg.Record] | None = None
        try:
            conn = await self._db.connect()
            bell = (await self._db.call(conn, "doorbell"))[0]
            if bell["enabled"]:
                await self._db.call(conn, "keep_alive")
                await conn.add_listener(bell["channel"] + "_help", self._rung)
                conn.add_termination_listener(self._rung)
                self._conn, self._channel, self._failures = conn, bell["channel"], 0
                return conn
            self._retry_at = now + 5                                   # someone may switch it on
        except BROKEN:
            self._failures += 1
            self._retry_at = now + min(30.0, 0.2 * 2**self._failures) * random.uniform(0.5, 1.0)
        finally:
            if conn is not None and conn is not self._conn:
                conn.terminate()
        return None

    def _rung(self, *_: Any) -> None:
        self._wake()
