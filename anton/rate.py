"""Rate: which records, or calls, of a handler with rate="100/m" may begin now, over all processes.

    lane has work -> the meter asks, 100 ms ahead -> starts of slots, 10 ms each -> a record begins inside a slot
                     what was not used goes back with the next asking             no start left: it waits

Slots are in the database's time. How far that is from here is known from the askings, as bounds; both must agree.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, Protocol

from anton import queue
from anton.db import Database
from anton.duration import duration, say
from anton.errors import BadOption

EVERY, RARELY = 0.04, 1.0  # seconds between two askings while there is work; at most, where there is nothing to be had
NEAR = 0.25  # seconds: a wait that is shorter is no wait for run_until_idle
VAGUE = 0.002  # seconds that the database's time may be between
DRIFT = 0.0005  # seconds that two clocks part in a second, at most
FEW = 16  # starts that are asked for before it is known how many are used
MOST_LATE = 0.2  # seconds that answers are expected to take, at most
LAST = 5.0  # seconds that an answer is waited for at the end
SHORTEST, LONGEST = timedelta(milliseconds=100), timedelta(days=30)

log = logging.getLogger("anton.worker")


class Closed(Exception):
    """The worker ends: what has not begun goes back."""


def normal(value: Any, of: str) -> str:
    """ "100 / 60s" as "100/1m". Raises BadOption."""
    allowed = 'a number of starts and a time from 100ms to 30d: "100/m", "1000/s", "20/10s"'
    match = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(.+?)\s*", value) if isinstance(value, str) else None
    if match is None or not int(match[1]):
        raise BadOption("rate", value, of, allowed)
    try:
        length = duration(match[2] if match[2][0].isdigit() else f"1{match[2]}", "rate", of)
    except BadOption:
        raise BadOption("rate", value, of, allowed) from None
    if not SHORTEST <= length <= LONGEST:
        raise BadOption("rate", value, of, allowed)
    return f"{int(match[1])}/{say(length)}"


class Clock:
    """How far the database's time, in seconds of 1970, is ahead of time.monotonic(): between low and high."""

    def __init__(self) -> None:
        self.low, self.high, self._heard = float("-inf"), float("inf"), 0.0

    @property
    def vague(self) -> bool:
        """It should be asked for the time alone, which is the quickest."""
        return self.high - self.low > VAGUE

    def heard(self, before: float, at: float, after: float) -> None:
        """It was `at` there between two times here."""
        wider = DRIFT * (after - self._heard)
        low, high = self.low - wider, self.high + wider
        if at - after > high or at - before < low:                     # a clock was put
            low, high = float("-inf"), float("inf")
        self.low, self.high, self._heard = max(low, at - after), min(high, at - before), after


class Tap:
    """The starts that one lane has: taken from any thread, at time.monotonic(). Seconds, the database's are of 1970.

    a_second: starts in a second, at most, rounded up. closed: nothing starts any more. waiting: calls that wait for a
    start. began: starts since the last asking.
    """

    def __init__(self, a_second: int = 1) -> None:
        self.a_second = a_second
        self.clock = Clock()
        self.closed = False
        self.waiting = 0
        self.began = 0
        self.use = 1.0                                                 # the part that it uses of what it takes
        self.usual = 0.0                                               # starts from one asking to the next
        self.asked = False
        self.due = 0.0                                                 # of the next asking
        self.next = 0.0                                                # when there is a start, where there was none
        self.timer: asyncio.TimerHandle | None = None
        self._slots: dict[int, int] = {}
        self._length = 1.0
        self._lock = threading.Lock()
        self._came = asyncio.Event()

    def got(self, length: float, slots: dict[int, int]) -> None:
        """Starts, by the number of their slot, which is so long. Called in the event loop."""
        with self._lock:
            if length != self._length:
                self._slots.clear()
            self._length = length
            for slot, count in slots.items():
                self._slots[slot] = self._slots.get(slot, 0) + count
        self._came.set()

    def take(self) -> bool:
        """Whether one may begin now; it is to begin at once."""
        with self._lock:
            now = time.monotonic()
            slot = int((now + self.clock.low) // self._length) if self._slots else 0
            left = self._slots.get(slot, 0)
            if not left or self.closed or now + self.clock.high >= (slot + 1) * self._length:
                return False
            self._slots[slot] = left - 1
            self.began += 1
            return True

    def free(self) -> int:
        """Starts there are now."""
        if not self._slots:
            return 0
        now = time.monotonic()
        with self._lock:
            slot = int((now + self.clock.low) // self._length)
            return self._slots.get(slot, 0) if now + self.clock.high < (slot + 1) * self._length else 0

    def soon(self) -> int:
        """Starts there are now and in slots to come."""
        if not self._slots:
            return 0
        at = time.monotonic() + self.clock.high
        with self._lock:
            return sum(count for slot, count in self._slots.items() if (slot + 1) * self._length > at)

    def opens(self) -> float | None:
        """Seconds until the next slot with starts begins; None without one."""
        if not self._slots:
            return None
        at = time.monotonic() + self.clock.low
        with self._lock:
            found = [slot for slot, count in self._slots.items() if count and slot * self._length > at]
        return min(found) * self._length - at if found else None

    def unused(self, future: bool) -> dict[int, int]:
        """Takes out what slots of the past have left, or those to come too."""
        at = time.monotonic() + self.clock.high
        with self._lock:
            gone = {slot: count for slot, count in self._slots.items() if future or (slot + 1) * self._length <= at}
            for slot in gone:
                del self._slots[slot]
        return {slot: count for slot, count in gone.items() if count}

    def keep(self, slots: dict[int, int]) -> None:
        """What was taken out could not be given back: it is to be, another time."""
        with self._lock:
            for slot, count in slots.items():
                self._slots[slot] = self._slots.get(slot, 0) + count

    @property
    def holds(self) -> bool:
        """There may be something to give back."""
        return any(self._slots.values())

    @property
    def far(self) -> bool:
        """There is no start, none to give back for another, and none for a while."""
        return self.asked and not self.holds and self.next - time.monotonic() > NEAR

    async def turn(self) -> None:
        """Waits for a start. Raises Closed."""
        self.waiting += 1
        try:
            while not self.closed:
                if self.take():
                    return
                self._came.clear()                                     # a slot is over sooner than EVERY
                opens = self.opens()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._came.wait(), EVERY if opens is None else min(EVERY, max(0.001, opens)))
            raise Closed
        finally:
            self.waiting -= 1


class Rated(Protocol):
    """A lane, as far as it matters here. room: calls at a time. calls, running: that are under way, of records."""

    id: int
    each: bool
    batch: int
    ready: bool
    tap: Tap | None
    calls: int
    running: int
    waiting_records: int
    items: Any

    @property
    def still(self) -> bool: ...

    @property
    def starved(self) -> bool: ...

    @property
    def room(self) -> int: ...


class Meter:
    """Asks for the starts of a worker's lanes with a rate. opened: told of a lane that may begin some."""

    def __init__(self, db: Database, worker: int, opened: Callable[[Any], None]) -> None:
        self._db, self._worker, self._opened = db, worker, opened
        self._poked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._ended = False
        self._clock = Clock()
        self._late = 0.003                                             # seconds that an answer takes lately
        self.lanes: list[tuple[Rated, Tap]] = []

    def know(self, lanes: Iterable[Rated]) -> None:
        """The lanes there are now."""
        self.lanes = [(lane, lane.tap) for lane in lanes if lane.tap is not None]
        for _, tap in self.lanes:
            tap.clock = self._clock
        if self.lanes and self._task is None:
            self._task = asyncio.create_task(self._run())

    def poke(self) -> None:
        """There may be work."""
        self._poked.set()

    def stalls(self, lanes: Iterable[Rated]) -> bool:
        """Whether all that these can do is wait, and for longer than a moment. True of no lanes."""
        return all(lane.tap is not None and lane.tap.far and lane.starved for lane in lanes)

    def close(self) -> None:
        """Nothing starts any more."""
        for _, tap in self.lanes:
            tap.closed = True

    async def end(self) -> None:
        """Asks no more, and gives back what was not used."""
        self._ended = True
        if self._task is not None:
            self._poked.set()
            await asyncio.wait({self._task}, timeout=LAST)             # what nobody hears of counts as begun
            self._task.cancel()
            await asyncio.wait({self._task})
        for lane, tap in self.lanes:
            if tap.holds:
                await self._ask(lane, tap, 0)

    async def _run(self) -> None:
        while not self._ended:
            self._poked.clear()
            pause = 60.0
            for lane, tap in list(self.lanes):
                try:
                    pause = min(pause, await self._turn(lane, tap))
                except Exception as error:                             # the database is away: again
                    log.warning("worker: rate: %s; asking again", error)
                    pause = min(pause, RARELY)
            timer = asyncio.get_running_loop().call_later(pause, self._poked.set)
            await self._poked.wait()
            timer.cancel()

    async def _turn(self, lane: Rated, tap: Tap) -> float:
        """Asks where it is time to; seconds until the next time."""
        now = time.monotonic()
        work = lane.ready or not lane.still
        if not work or tap.closed:
            if tap.holds:
                await self._ask(lane, tap, 0)
            return 60.0
        if now < tap.due:
            return tap.due - now
        await self._ask(lane, tap, self._wanted(lane, tap))
        tap.due = now + min(RARELY, max(EVERY, tap.next - now))
        return tap.due - time.monotonic()

    def _wanted(self, lane: Rated, tap: Tap) -> int:
        """Starts that it can use until the next asking but one."""
        can = lane.room - (lane.running if lane.each else lane.calls - tap.waiting) + 2 * tap.usual
        batches = -(-lane.waiting_records // lane.batch)
        have = lane.waiting_records + len(lane.items) if lane.each else tap.waiting + batches
        more = FEW + 2 * tap.usual if lane.ready else 0
        return max(1, int(min(can, have + more))) - tap.soon()

    async def _ask(self, lane: Rated, tap: Tap, wanted: int) -> None:
        back = tap.unused(tap.closed or not lane.ready and lane.still)
        if wanted <= 0 and not back:
            return
        tap.usual += (tap.began - tap.usual) * 0.3
        if tap.began + sum(back.values()) and (lane.items or tap.waiting):  # else there was nothing to use them for
            tap.use += (tap.began / (tap.began + sum(back.values())) - tap.use) * 0.1
        tap.began = 0
        if back:                                                       # another may be had at once
            tap.next = 0.0
        late, kept = timedelta(seconds=min(MOST_LATE, self._late)), back
        try:
            async with self._db.conn() as conn:
                if self._clock.vague:
                    before = time.monotonic()
                    at = (await self._db.call_value(conn, "now")).timestamp()
                    self._clock.heard(before, at, time.monotonic())
                kept, before = {}, time.monotonic()                    # once it is asked, nobody knows
                found = await queue.take_rate(self._db, conn, self._worker, lane.id, max(0, wanted), [*back],
                                              [*back.values()], tap.use, late)
                after = time.monotonic()
        finally:
            tap.keep(kept)
        self._late += (after - before - self._late) * 0.3
        tap.asked = True
        if found is None:                                              # its rate was taken out just now
            return
        at = found["at_us"] / 1e6
        self._clock.heard(before, at, after)
        tap.got(found["slot_us"] / 1e6, dict(zip(found["slots"], found["counts"], strict=True)))
        tap.next = after + found["next_us"] / 1e6 - at if found["next_us"] is not None else 0.0
        self._open(lane, tap)

    def _open(self, lane: Rated, tap: Tap) -> None:
        """Tells of starts there are, and again when the next slot begins."""
        self._opened(lane)
        if tap.timer is not None:
            tap.timer.cancel()
        opens = None if tap.closed else tap.opens()
        tap.timer = None if opens is None else asyncio.get_running_loop().call_later(opens, self._open, lane, tap)
