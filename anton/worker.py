"""Worker: one process's loop from claimed jobs to settled ones.

    look -> claim -> lanes -> batches in slots -> Runner -> settled        nothing there: the doorbell, or a poll

One event loop. Each lane (a handler) has slots of its own and the worker a total, filled in turn, so that a deep
handler starves nobody; a slot is refilled as soon as it is free, and the next claim overlaps with what runs.
Where priorities differ, the highest rank is first (rank.py). Leases are kept alive from a thread (heartbeat.py). What a
dead worker held is suspect: a process of its own runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from datetime import timedelta
from typing import Any, Literal

from anton import queue, schedule
from anton.action import set_effects
from anton.app import App
from anton.catalogue import feed, read_lanes
from anton.db import Database
from anton.doorbell import Answer, Doorbell
from anton.each import put_off
from anton.errors import LeaseLost
from anton.fate import World, disconnected
from anton.heartbeat import Heartbeat
from anton.keyrate import KeyMeter
from anton.lane import Lane
from anton.leases import Pulse, drop, kept
from anton.pace import Pace
from anton.permits import AGAIN, Office
from anton.queue import Job, Look
from anton.rank import rank
from anton.rate import NEAR, Meter
from anton.run import Run, Runner
from anton.share import version
from anton.suspects import work_suspects
from anton.threads import Threads
from anton.write import as_worker

log = logging.getLogger("anton.worker")

SLOTS = 32  # calls at a time, of all handlers together
REFRESH, SOON = 5.0, 0.5  # seconds between readings of the handler catalogue; when there is a reason to look
HOUSEKEEPING, WATCH = 60.0, 20.0  # seconds between them; WATCH: for tables that dbt made anew without hooks
STEP = 1.0  # seconds between two steps of housekeeping, as long as there is something to do
LOOK, LOOK_ALL = 0.03, 0.3  # seconds between looks while claims bring work: for the others' jobs; for suspects, too
MANY = 64  # lanes; with more, a look tells which are worth a claim
GRACE = 30.0  # seconds that a drain waits for what runs


class Worker:
    """Works an app's jobs until it is stopped.

    slots: calls at a time. lease: how long a claim lasts without a heartbeat; default the setting "lease" (30 s).
    capture: effects are kept instead of sent. grace: what a drain waits for running calls before it gives their
    jobs back, in seconds. on_suspects: told when jobs of dead workers are there, to run them elsewhere; None: here,
    with nothing beside them. on_stuck: told when a thread does not come back from its handler; None: go on with
    another thread. started: told the worker's id.

        worker = Worker(db, app); await worker.run()      # until drain() or stop()
        await worker.run_until_idle()                     # everything that is due, then return
    """

    def __init__(
        self,
        db: Database,
        app: App,
        *,
        slots: int = SLOTS,
        lease: timedelta | None = None,
        capture: bool = False,
        grace: float = GRACE,
        on_suspects: Callable[[], None] | None = None,
        on_stuck: Callable[[], None] | None = None,
        on_error: Callable[[BaseException], None] = lambda error: None,
        started: Callable[[int], None] | None = None,
    ) -> None:
        self.db = db
        self.app = app
        self.slots = slots
        self.id = 0
        self.draining = False
        self._lease = lease
        self._grace = grace
        self._on_suspects = on_suspects
        self._on_error = on_error
        self._started = started
        self._lanes: dict[int, Lane] = {}
        self._order: deque[Lane] = deque()
        self._active: dict[asyncio.Task[None], Run] = {}
        self._rung = False
        self._called = False                                           # by a ring; nothing was claimed since
        self._stale = False                                            # the catalogue may be
        self._late = False                                             # what the last look saw to be due later
        self._asleep = False                                           # the announced worker may be
        self._pace = Pace()
        self._quiet = False                                            # suspects wait for an empty process
        self._hold = True
        self._ranked = False                                           # handlers have different priorities
        self._claiming = self._unsure = 0
        self._overdue = False                                          # a call that blocks the loop, and was told
        self._refreshed = 0.0
        self._looked = self._peeked = 0.0
        self._helped = 0.0
        self._errands: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._errand = asyncio.Event()
        self._bell = Doorbell(db, self._ring)
        self._runner = Runner(db, app, Threads(), wrote=self._wrote, stuck=on_stuck or (lambda: None),
                              back=self._wake.set, failed=on_error, alive=lambda: not self.draining or self._grace > 0,
                              later=self._postponed)
        if capture:
            set_effects("capture")

    async def run(self) -> None:
        """Works until drain() or stop(); then what runs is finished within the grace, and the rest given back."""
        while not self.draining and not await self._begin():
            await self._nap(self._pace.failed())
        chores = asyncio.create_task(self._chores())
        try:
            while not self.draining:
                try:
                    self._wake.clear()
                    if not await self._claim():
                        self._unknown()
                        await self._rest()
                    elif time.monotonic() - self._looked > LOOK_ALL:
                        await self._look()
                    elif time.monotonic() - self._peeked > LOOK:
                        await self._peek()                             # a deep handler must not hide the others' work
                    self._pace.failures = 0
                except Exception as error:                             # the database is away, or we are wrong: go on
                    self._start_chore(self._bell.hush())               # a held bell makes every writer pay
                    if disconnected(error):
                        log.warning("worker: %s; trying again", error)
                    else:
                        log.exception("worker: trying again")
                        self._on_error(error)
                    await self._nap(self._pace.failed())
        finally:
            chores.cancel()
            await self._end()

    async def run_until_idle(self) -> None:
        """Works everything that is ready or due by anton.now(), and returns when nothing runs and nothing is due."""
        self._hold = False
        await self._begin(patient=False)
        try:
            while True:
                self._wake.clear()
                if await self._claim():
                    continue
                held = self._dispatch()                                # for more, which did not come
                if self._active or held:
                    if self._active and self._meter.stalls(run.lane for run in self._active.values()):
                        return                                         # the rest waits for its rate
                    await self._wake.wait()
                elif self._errands:
                    await asyncio.wait(self._errands)
                elif not await self._more():
                    return
                elif self._office.hungry:                              # another process has the permits
                    await self._nap(AGAIN)
                elif self._meter.lanes and not self._wanted():         # no start for what is there
                    waiting = [lane for lane in self._order if lane.ready or lane.feeding]
                    if waiting and self._meter.stalls(waiting):
                        return
                    await self._nap(AGAIN)
        finally:
            await self._end()

    async def run_suspects(self) -> int:
        """Runs the jobs of dead workers, with nothing beside them; how many records were settled. 0: no database."""
        if not await self._begin():
            return 0                                                   # whoever meets them next asks again
        try:
            return await self._suspects()
        finally:
            await self._end()

    def drain(self) -> None:
        """Claims nothing more; run() returns when what runs is done, or after the grace. For the worker's loop."""
        self.draining = True
        self._wake.set()

    def stop(self) -> None:
        """Stops now: what runs is cancelled and given back. Call it in the worker's loop."""
        self._grace = 0.0
        self.drain()
        for task in self._active:
            task.cancel()

    # Beginning and end

    async def _begin(self, patient: bool = True) -> bool:
        """Registers this worker and reads its handlers; False when the database is away."""
        try:
            async with self.db.conn() as conn:
                settings = {row["name"]: row["value"] for row in await self.db.call(conn, "worker_settings")}
                self._length = self._lease or await conn.fetchval("select $1::text::interval", settings["lease"])
                self.id = await queue.register_worker(self.db, conn, self.app.name, socket.gethostname(), os.getpid(),
                                                      version())
            if self._started is not None:
                self._started(self.id)
            self._runner.settler.worker = self.id
            self._runner.depth_limit = int(settings["depth_limit"])
            self._office = Office(self.db, self.id, self._length)
            self._meter = Meter(self.db, self.id, self._opened)
            self._keys = KeyMeter(self.db, self.id, self._runner.pullers.pull, put_off, None if self._hold else NEAR)
            await self._refresh()
        except Exception as error:
            if patient and disconnected(error):
                log.warning("worker: %s; trying again", error)
                return False
            raise
        as_worker(+1)
        self._loop = asyncio.get_running_loop()
        self._pulse = Pulse(self._loop)
        self._heart = Heartbeat(self.db, self.id, self._length, self._tokens, self._lost, self._office.keep)
        return True

    async def _end(self) -> None:
        self.draining = True
        if not self.id:
            return
        with contextlib.suppress(Exception):
            await self._runner.settler.give_back([job for lane in self._order for job in lane.put_back()])
        self._close()
        if self._active:
            await asyncio.wait(self._active, timeout=self._grace)
        with contextlib.suppress(Exception):
            await self._keys.end()
        if not self._active:                                           # else they run out by themselves
            with contextlib.suppress(Exception):
                await self._office.end()
        with contextlib.suppress(Exception):
            await self._meter.end()
        for task in self._active:
            task.cancel()
        if self._active:
            await asyncio.wait(self._active, timeout=5)
        if self._errands:
            await asyncio.wait(self._errands, timeout=5)
        self._heart.stop()
        await self._bell.close()
        with contextlib.suppress(Exception):
            async with self.db.conn() as conn:
                await queue.stop_worker(self.db, conn, self.id)
        as_worker(-1)

    def _close(self) -> None:
        """What waits for its rate is not waited for."""
        self._meter.close()
        for lane in self._order:
            if lane.tap is not None:
                self._runner.pullers.close(lane)

    async def _refresh(self) -> None:
        """Reads the catalogue: handlers of this app that the code still has, and SQL handlers made from psql."""
        lanes = await read_lanes(self.db, self.app, self._lanes)
        self._refreshed = time.monotonic()
        self._runner.caller.tables.update({lane.id: lane.table_id for lane in lanes.values()})
        if len(lanes) > MANY:
            for id in lanes.keys() - self._lanes.keys():
                lanes[id].ready = False
        self._lanes = lanes
        self._order = deque(lanes.values())
        self._ranked = len({lane.priority for lane in lanes.values()}) > 1
        self._office.know(lanes.values())
        self._meter.know(lanes.values())
        self._keys.know(lanes.values())
        self._runner.reader.forget()

    # Claiming

    async def _claim(self) -> bool:
        """Starts what waits, claims for lanes with room that may have jobs. Whether it got any."""
        if self._office.lanes and not self.draining:
            await self._permits()
        self._meter.poke()
        self._dispatch()
        wanted = [] if self._quiet or self.draining else self._wanted()
        if not wanted:
            return False
        now = time.monotonic()
        records = [lane.wants() for lane in wanted]
        jobs = [lane.jobs_for(n) for lane, n in zip(wanted, records, strict=True)]
        after = [lane.start_from(now) for lane in wanted]
        turns = [lane.turn for lane in wanted]
        self._claiming = queue.token()                                 # a blocked loop reads the answer late
        try:
            async with self.db.conn() as conn:
                claimed = await queue.claim(self.db, conn, self.id, self._length, [lane.id for lane in wanted], jobs,
                                            records, after, self._claiming, turns, self._in_order(wanted))
        finally:
            self._claiming = 0
        took = time.monotonic() - now
        mine: dict[int, list[Job]] = {lane.id: [] for lane in wanted}
        for job in claimed:
            mine[job.handler_id].append(job)
        for lane, asked_jobs, asked, start in zip(wanted, jobs, records, after, strict=True):
            lane.claimed(mine[lane.id], asked_jobs, asked, start, now, took)
        if claimed:
            self._pace.claimed(now, [lane for lane in wanted if mine[lane.id]], len(claimed))
        self._dispatch()
        if any(lane.ready and not lane.wants() for lane in wanted):
            await self._help()
        if self._bell.others and any(job.waited > 1500 and not job.attempt for job in claimed):
            self._asleep = True                                        # is the announcer?
            self._errand.set()
        self._called = self._called and not claimed
        return bool(claimed)

    def _in_order(self, lanes: list[Lane]) -> list[int] | None:
        """Tokens of what is claimed of those that are ordered; None: none of these is."""
        ordered = [lane for lane in lanes if lane.order is not None]
        if not ordered:
            return None
        tokens = {job.token for lane in ordered for job in lane.waiting}
        return [*tokens.union(*(run.tokens for run in self._active.values() if run.lane.order is not None))]

    async def _permits(self) -> None:
        """Takes what lanes with a limit can use, and gives back what they cannot."""
        await self._office.turn()
        for lane in self._order:
            if lane.permits is not None and lane.items:
                self._runner.pullers.pull(lane)

    def _opened(self, lane: Lane) -> None:
        """A lane with a rate may begin some."""
        if lane.items:
            self._runner.pullers.pull(lane)
        if lane.waiting or lane.ready or lane.tap is None or lane.tap.far:
            self._wake.set()

    def _wanted(self) -> list[Lane]:
        """Lanes to claim for, in turn: about as many as there are free slots."""
        most = 2 * (self.slots - len(self._active))
        if self._ranked:
            return self._first(lambda lane: lane.ready and bool(lane.wants()), "claim_since")[:max(2, most)]
        found: list[Lane] = []
        for lane in self._order:
            if len(found) >= most:
                break
            if lane.ready and lane.wants():
                found.append(lane)
        return found

    def _work(self) -> bool:
        """There is something to claim, or to take a permit for."""
        return bool(self._wanted()) or self._office.hungry

    def _dispatch(self) -> bool:
        """Starts batches in free slots, one lane after the other. Whether some are held, and a timer wakes for them."""
        now, until = time.monotonic(), float("inf")
        if self._ranked:
            until = self._dispatch_first(now)
        for _ in range(0 if self._ranked else len(self._order)):
            if len(self._active) >= self.slots or self.draining:
                break
            lane = self._order[0]
            self._order.rotate(-1)
            while len(self._active) < self.slots and lane.free():
                batch = lane.take(now, self._hold)
                if batch is None:
                    until = min(until, lane.held_until or until)
                    break
                self._start(Run(lane, batch))
        if until < float("inf"):
            self._loop.call_later(max(0.001, until - now), self._wake.set)
        return until < float("inf")

    def _dispatch_first(self, now: float) -> float:
        """As _dispatch(), of the highest rank first, one batch at a time; until when what was held is."""
        waiting, until = self._first(Lane.free, "slot_since"), float("inf")
        while waiting and len(self._active) < self.slots and not self.draining:
            lane = max(waiting, key=lambda lane: rank(lane.priority, now - lane.slot_since))
            waiting.remove(lane)
            batch = lane.take(now, self._hold)
            if batch is None:
                until = min(until, lane.held_until or until)
                continue
            self._start(Run(lane, batch))
            if lane.free():
                waiting.append(lane)
        return until

    def _first(self, waits: Callable[[Lane], bool], since: Literal["claim_since", "slot_since"]) -> list[Lane]:
        """The lanes that wait for something, the highest rank first; since when is noted of them.

        What waits for its rate has waited, too: starts come and go, and none would last until its turn.
        """
        now, found = time.monotonic(), list[Lane]()
        for lane in self._order:
            if waits(lane):
                found.append(lane)
            elif not lane.dry:
                setattr(lane, since, now)
        return sorted(found, key=lambda lane: -rank(lane.priority, now - getattr(lane, since)))

    def _start(self, run: Run) -> asyncio.Task[None]:
        lane = run.lane
        task = asyncio.create_task(self._runner.run(run), name=lane.name)
        self._active[task] = run
        lane.started(run.batch)

        def ended(task: asyncio.Task[None]) -> None:
            del self._active[task]
            lane.ended(run.batch)
            if lane.down is not None and not lane.calls:
                self._start_chore(self._surface(lane))
            if not task.cancelled() and task.exception() is not None:
                log.error("worker: %s", lane.name, exc_info=task.exception())
            if lane.table == f"{self.db.schema}.tick":
                self._errand.set()                                     # another firing may wait for this one
            self._wake.set()

        task.add_done_callback(ended)
        return task

    async def _surface(self, lane: Lane) -> None:
        """The world failed and all calls have ended: what was claimed ahead waits in the queue, not here."""
        jobs, lane.ready = lane.put_back(), False
        try:
            await self._runner.settler.give_back(jobs)
        except (LeaseLost, World) as error:
            log.warning("worker: %s: %s", lane.name, error)
        lane.down = None
        if lane.order is not None and lane.order.over:
            lane.order = lane.order.heir
        if lane.order is not None:
            lane.order.stopped = False
        self._wake.set()

    def _start_chore(self, chore: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(chore)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    # Waiting

    async def _rest(self) -> None:
        """Nothing to claim: look, announce, look once more, wait."""
        if len(self._active) >= self.slots or self._quiet:
            await self._bell.step_down()
            await self._nap(1.0)
            if not self._quiet or not self._active:
                await self._look()
            return
        if self._office.lanes:
            await self._permits()                                  # what the claim found empty
            if self._office.hungry:                                    # others have the permits: ask again soon
                await (self._look() if time.monotonic() - self._looked > LOOK_ALL else self._peek())
                if not self._wanted():
                    await self._nap(AGAIN)
                return
        flowing = self._pace.flowing(time.monotonic())
        if flowing and await self._paced(flowing):
            return
        look = await self._look()
        if self._work():
            return
        answer = None if self._pace.flapping(time.monotonic()) else await self._bell.announce()
        if answer is Answer.BELL:
            look = await self._look()
        longest = self._pace.wait(answer, self._length.total_seconds())
        if look.wake_at is not None:
            longest = min(longest, max(0.001, (look.wake_at - look.at).total_seconds()))
        deadline = time.monotonic() + longest
        while not (self.draining or self._quiet or self._rung or self._late or self._work()):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            await self._nap(min(left, AGAIN) if self._office.holds else left)
            if self._office.holds:
                await self._permits()
            self._dispatch()
        self._start_chore(self._bell.hush())                           # on its own connection, before the claim's
        if self._rung:
            self._rung = False
            self._all_ready()
            self._called = True

    async def _paced(self, lanes: Sequence[Lane]) -> bool:
        """Waits until the next claim is due, without a look, for those who had jobs just now. Whether one is."""
        while not (self.draining or self._quiet or self._work()):
            left = self._pace.next_claim() - time.monotonic()
            if left <= 0:
                for lane in lanes:
                    lane.ready = True
                break
            await self._nap(left)
            self._dispatch()
        return self._work()

    async def _look(self) -> Look:
        self._late = False
        async with self.db.conn() as conn:
            look = await queue.poll(self.db, conn, self.id, list(self._lanes), self._length)
        self._looked = self._peeked = time.monotonic()
        for id in look.ready:
            self._lanes[id].ready = True
        self._quiet = bool(look.suspects) and self._on_suspects is None
        if look.suspects and self._on_suspects is not None:
            self._on_suspects()
        elif self._quiet and not self._active:
            try:
                await self._suspects()
            finally:
                self._quiet = False
        return look

    async def _peek(self) -> None:
        """Which lanes that were found empty have something."""
        self._peeked = time.monotonic()
        flowing = self._pace.flowing(self._peeked)
        empty = [lane.id for lane in self._order if not (lane.ready or lane in flowing)]
        if empty:
            async with self.db.conn() as conn:
                for id in await queue.ready(self.db, conn, empty):
                    self._lanes[id].ready = True

    def _ring(self) -> None:
        self._rung = True
        self._pace.rung(time.monotonic())
        self._wake.set()

    def _unknown(self) -> None:
        """The bell rang and nothing was there: perhaps for a handler that was made just now."""
        if self._called:
            self._called, self._stale = False, True
            self._loop.call_later(max(0.0, self._refreshed + SOON - time.monotonic()), self._errand.set)

    async def _help(self) -> None:
        """There is more than this worker takes: the others may look, once a second."""
        if time.monotonic() - self._helped > 1.0:
            self._helped = time.monotonic()
            await self._bell.call_help()

    async def _nap(self, seconds: float) -> None:
        """Until something wakes the worker, at most so long."""
        if not self._wake.is_set():
            timer = asyncio.get_running_loop().call_later(seconds, self._wake.set)
            await self._wake.wait()
            timer.cancel()
        self._wake.clear()

    # What happens around it

    def _wrote(self, tables: set[int] | None) -> None:
        """Our own commit made work for these tables' handlers: no bell is needed."""
        for lane in self._order:
            if tables is None or lane.table_id in tables:
                lane.ready = True

    def _postponed(self) -> None:
        """We put something off: the next look says until when."""
        self._late = True
        self._wake.set()

    def _all_ready(self) -> None:
        """Any lane may have jobs: a claim asks them all, or with many, a look tells which to ask."""
        self._peeked = 0.0
        if len(self._lanes) <= MANY:
            for lane in self._order:
                lane.ready = True

    def _tokens(self) -> tuple[list[int], list[int]]:
        """Leases to keep alive, and jobs that are left out. Asked by the heartbeat's thread."""
        tokens, overdue = kept(list(self._lanes.values()), list(self._active.values()))
        blocked = self._pulse.missed()
        self._unsure = self._claiming if blocked else 0                # an answer that only waits to be read
        if blocked and overdue and not self._overdue:                  # a call blocks this loop, which cannot say so
            self._overdue = True
            self._runner.stuck()
        return [*tokens, self._unsure] if self._unsure else tokens, overdue

    def _lost(self, tokens: set[int]) -> None:
        """These leases went to somebody else. Called in the heartbeat's thread."""
        tokens.discard(self._unsure)
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._drop, tokens)

    def _drop(self, tokens: set[int]) -> None:
        drop(tokens, self._order, self._active, self._runner.settler.settling)
        for lane in self._order:
            if lane.order is not None and lane.down is not None and not lane.calls:
                self._start_chore(self._surface(lane))

    async def _suspects(self) -> int:
        """Jobs whose worker died, with none of the living's beside them."""
        asking = asyncio.create_task(self._ask())
        try:
            return await work_suspects(
                self._runner.settler, self._length, self._lanes, self.slots,
                lambda run: asyncio.wait({self._start(run)}), lambda: not self.draining, self._room)
        finally:
            asking.cancel()

    async def _ask(self) -> None:
        """While suspects run: permits that were lost meanwhile, which nobody else would ask for; a drain."""
        while self._office.lanes or self._meter.lanes:
            await asyncio.sleep(AGAIN)
            if self.draining:
                self._close()
            with contextlib.suppress(Exception):                       # no database: again
                for lane in self._order:
                    if lane.permits is not None and (lane.items or lane.again) and not lane.room:
                        await self._office.take(lane.id, lane.permits, suspects=True)
                        self._runner.pullers.pull(lane)

    async def _room(self, lane: Lane) -> int:
        """Calls of a lane that may run; 0 when others have held all its permits for a while."""
        if lane.permits is None:
            return lane.concurrency
        end = time.monotonic() + self._length.total_seconds() / 4
        while not await self._office.take(lane.id, lane.permits, suspects=True):
            if self.draining or time.monotonic() > end:
                return 0
            await asyncio.sleep(AGAIN)
        return lane.room

    async def _more(self) -> bool:
        """Nothing runs and nothing is claimed: whether something is due all the same."""
        async with self.db.conn() as conn:
            await schedule.fire(self.db, conn)
        self._refreshed = 0.0
        look = await self._look()
        fed = await feed(self.db, self._lanes.values())
        late = look.wake_at is not None and look.wake_at <= look.at    # changes that are not folded yet
        return bool(look.ready or look.suspects or fed or late)

    async def _chores(self) -> None:
        """Schedules, backfills, housekeeping, the catalogue: beside the loop, at their times or when called."""
        kept = watched = 0.0
        while True:
            self._errand.clear()                                       # who calls from here on is heard
            pause = min(self._length.total_seconds(), WATCH)
            try:
                async with self.db.conn() as conn:
                    due = await schedule.fire(self.db, conn)
                    if due is not None:
                        now = await self.db.call_value(conn, "now")
                        pause = min(pause, max(0.0, (due - now).total_seconds()))
                    if time.monotonic() - kept > HOUSEKEEPING:
                        if await self.db.call_value(conn, "maintain") is None:
                            kept = time.monotonic()
                        else:
                            pause = min(pause, STEP)
                    if time.monotonic() - watched > WATCH:
                        watched = time.monotonic()
                        await self.db.call(conn, "dbt_watchdog")
                if time.monotonic() - self._refreshed > (SOON if self._stale else REFRESH):
                    self._stale = False
                    await self._refresh()
                    self._all_ready()
                if not self._bell.held:
                    pause = min(pause, REFRESH)
                if await feed(self.db, self._lanes.values()):
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
                await asyncio.wait_for(self._errand.wait(), max(0.02, pause))
