"""Keyrate: starts for the records of handlers with rate= beside per=, from whichever keys wait.

    records wait in the gate -> read what is known of new keys -> plan -> note them in one statement -> they begin
                                 no start for long -> the record goes back to the queue until its turn

What is noted counts as begun, so whoever comes to hold the handler goes on exactly. See starts.py.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Hashable, Iterable
from datetime import timedelta
from typing import Any, Protocol

from anton import queue
from anton.db import Conn, Database
from anton.gate import Gate
from anton.permits import Permits
from anton.rate import EVERY, MOST_LATE, RARELY
from anton.starts import Starts, text

FEW = 16  # starts that are planned before it is known how many are used

log = logging.getLogger("anton.worker")


class Keyed(Protocol):
    """A lane, as far as it matters here. room: records at a time; running: that are under way."""

    id: int
    gate: Gate | None
    permits: Permits | None
    running: int
    items: Any

    @property
    def room(self) -> int: ...


class _Books:
    """What is kept of one lane. due: of the next asking; usual: starts from one to the next."""

    def __init__(self, lane: Keyed, gate: Gate, starts: Starts, permits: Permits) -> None:
        self.lane, self.gate, self.starts, self.permits = lane, gate, starts, permits
        self.tenure = -1
        self.due = 0.0
        self.usual = 0.0
        self.late = 0.003                                              # seconds that noting takes lately


class KeyMeter:
    """Sees to the starts of a worker's lanes that have a rate for each key.

    opened: told of a lane that may begin some. put_off: told of an entry and of seconds after which it is to come back.
    patience: seconds that records wait here; None: the default.
    """

    def __init__(self, db: Database, worker: int, opened: Callable[[Any], None],
                 put_off: Callable[[Any, timedelta], None], patience: float | None = None) -> None:
        self._db, self._worker, self._opened, self._put_off, self._patience = db, worker, opened, put_off, patience
        self._loop = asyncio.get_running_loop()
        self._poked = asyncio.Event()
        self._told = False
        self._task: asyncio.Task[None] | None = None
        self._books: dict[int, _Books] = {}

    def know(self, lanes: Iterable[Keyed]) -> None:
        """The lanes there are now."""
        old, self._books = self._books, {}
        for lane in lanes:
            if lane.gate is None or lane.gate.starts is None or lane.permits is None:
                continue
            books = old.pop(lane.id, None)
            if books is None or books.starts is not lane.gate.starts:
                books = _Books(lane, lane.gate, lane.gate.starts, lane.permits)
            self._books[lane.id] = books
            books.gate.short = self._short
            if self._patience is not None:
                books.starts.patience = self._patience
        for books in old.values():                                     # its rate was taken out
            books.gate.starts = None
            books.lane.items.extend(books.gate.served(books.gate.waiting()))
            self._opened(books.lane)
        if self._books and self._task is None:
            self._task = asyncio.create_task(self._run())

    async def end(self) -> None:
        """Plans no more, and gives back what did not begin."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        for books in self._books.values():
            with books.gate.lock:
                for key in books.starts.keys:
                    books.starts.unused(key, math.inf)
                over = [*books.starts.over]
            if over and books.permits.valid:
                async with self._db.conn() as conn:
                    await self._note(conn, books, over)

    def _short(self) -> None:
        """A record wants a start. From any thread."""
        if not self._told:
            self._told = True
            self._loop.call_soon_threadsafe(self._poked.set)

    async def _run(self) -> None:
        while True:
            self._poked.clear()
            self._told, pause = False, 60.0
            for books in list(self._books.values()):
                try:
                    pause = min(pause, await self._turn(books))
                except Exception as error:                             # the database is away: again
                    log.warning("worker: rate: %s; asking again", error)
                    pause = min(pause, RARELY)
            timer = self._loop.call_later(pause, self._poked.set)
            await self._poked.wait()
            timer.cancel()

    async def _turn(self, books: _Books) -> float:
        """Plans where it is time to; seconds until the next time."""
        now, starts = time.monotonic(), books.starts
        if not books.permits.valid:
            return RARELY
        if now < books.due:
            return books.due - now
        if books.tenure != books.permits.tenure:
            with books.gate.lock:
                starts.clear()
            books.tenure = books.permits.tenure
        wanted, many, pause = self._wanted(books, now)
        if many:
            self._wait(books, many, starts.first(books.late))
        if not wanted:
            return pause
        books.due = now + EVERY
        async with self._db.conn() as conn:
            if starts.clock.vague:
                before = time.monotonic()
                at = (await self._db.call_value(conn, "now")).timestamp()
                starts.clock.heard(before, at, time.monotonic())
            await self._learn(conn, books, wanted)
            if books.tenure != books.permits.tenure:
                return 0.0
            before = time.monotonic()
            with books.gate.lock:
                first = starts.first(min(MOST_LATE, books.late))
                plans = {key: starts.plan(key, first, count) for key, count in wanted.items()}
            given = {key: plan for key, plan in plans.items() if plan}
            try:
                noted = not given or await self._note(conn, books, given)
            except BaseException:                                      # nobody knows whether it is noted: none begins
                with books.gate.lock:
                    starts.take_back(given)
                raise
            if not noted:
                books.tenure = -1                                      # somebody else holds the handler
                return RARELY
            if given:
                books.late += (time.monotonic() - before - books.late) * 0.3
        with books.gate.lock:
            for key, plan in given.items():
                starts.grant(key, plan)
        self._wait(books, wanted, first)
        self._open(books, [*given])
        for slot in {slot for plan in given.values() for slot in plan}:
            if (wait := starts.opens(slot)) > 0:
                self._loop.call_later(wait, self._open, books, [key for key, plan in given.items() if slot in plan])
        return books.due - time.monotonic()

    def _wanted(self, books: _Books, now: float) -> tuple[dict[Hashable, int], list[Hashable], float]:
        """Starts that can be used until the next asking but one, by key; keys that have too many records here; seconds
        until there is to look again, where none is wanted.
        """
        gate, starts, lane = books.gate, books.starts, books.lane
        books.usual += (starts.began - books.usual) * 0.3
        starts.began = 0
        can = max(0, int(lane.room - lane.running + 2 * books.usual + FEW) - len(lane.items))
        found, many = dict[Hashable, int](), list[Hashable]()
        keys, past, pause = gate.waiting(), starts.past if starts.keys else 0, 60.0
        with gate.lock:
            starts.forget(keys)
            for key in keys:
                known, count = starts.keys.get(key), gate.wanted(key)
                if known is not None and known.left and starts.unused(key, past):
                    known.again = 0.0
                if known is not None and known.again > now:
                    pause = min(pause, known.again - now, starts.lapses(key))
                    if gate.aside(key) > known.few + sum(known.left.values()):
                        many.append(key)
                    continue
                if known is not None:
                    count -= sum(known.left.values())
                if count > 0 and can > 0:
                    found[key] = min(count, can)
                    can -= found[key]
                else:
                    pause = min(pause, EVERY)
        return found, many, pause

    async def _learn(self, conn: Conn, books: _Books, keys: Iterable[Hashable]) -> None:
        """What was given of keys that are met for the first time."""
        new = [key for key in keys if key not in books.starts.keys]
        if new:
            rows = await queue.key_starts(self._db, conn, books.lane.id, [*map(text, new)])
            with books.gate.lock:
                books.starts.learn(new, rows)

    async def _note(self, conn: Conn, books: _Books, keys: Iterable[Hashable]) -> bool:
        """Has the database know all that is given of these keys; False: this worker does not hold the handler."""
        before, starts = time.monotonic(), books.starts
        with books.gate.lock:
            rows = {text(key): starts.row(key) for key in keys}
            starts.over.difference_update(keys)
        at = await queue.note_starts(self._db, conn, self._worker, books.lane.id, rows)
        if at is not None:
            starts.clock.heard(before, at / 1e6, time.monotonic())
        return at is not None

    def _wait(self, books: _Books, keys: Iterable[Hashable], first: int) -> None:
        """Of keys that have no start for all their records: until when they wait, here or in the queue."""
        gate, starts = books.gate, books.starts
        soon = starts.opens(first) - (starts.patience / 2 if self._patience is None else 0.0)
        with gate.lock:
            for key in keys:
                known = starts.keys[key]
                coming = sum(known.left.values())
                kept = coming + starts.kept(key, first)
                if out := gate.beyond(key, kept, max(coming, kept // 2)):
                    slots = starts.put_off(key, first, gate.aside(key) - coming, len(out))
                    for entry, slot in zip(out, slots, strict=True):
                        self._put_off(entry, timedelta(seconds=max(0.0, soon + (slot - first) * starts.slot)))
                known.few = kept - coming
                known.again = time.monotonic() + starts.opens(starts.next(key, first))

    def _open(self, books: _Books, keys: Iterable[Hashable]) -> None:
        """A slot with starts of these keys has begun, or may have."""
        entries = books.gate.served(keys)
        if entries:
            books.lane.items.extendleft(reversed(entries))
            self._opened(books.lane)
