"""Worker: one process's loop from claimed jobs to settled ones, its beginning and its end.

    look -> claim -> lanes -> batches in slots -> Runner -> settled        nothing there: the doorbell, or a poll

One event loop. Each lane (a handler) has slots of its own and the worker a total (dispatch.py); a slot is refilled as
soon as it is free, and the next claim overlaps with what runs. Looks into the queue are in lookout.py, what goes on
beside the loop in chores.py. Leases are kept alive from a thread (heartbeat.py). What a dead worker held is suspect: a
process of its own runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from datetime import timedelta
from typing import Any

from anton import queue, schedule
from anton.action import set_effects
from anton.app import App
from anton.catalogue import feed, read_lanes
from anton.chores import Chores
from anton.db import Database
from anton.dispatch import Claim, Dispatcher
from anton.doorbell import Answer, Doorbell
from anton.each import put_off
from anton.errors import LeaseLost
from anton.fate import World, disconnected
from anton.heartbeat import Heartbeat
from anton.keyrate import KeyMeter
from anton.lane import Lane
from anton.leases import Pulse, drop, kept
from anton.lookout import Lookout
from anton.pace import Pace
from anton.permits import AGAIN, Office
from anton.queue import Look
from anton.rate import NEAR, Meter
from anton.run import Runner
from anton.share import version
from anton.suspects import work_suspects
from anton.threads import Threads
from anton.write import as_worker

log = logging.getLogger("anton.worker")

SLOTS = 32  # calls at a time, of all handlers together
HELD_UP = 0.02  # seconds between two claims for what is ordered and waits for what went before
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
        self.id = 0
        self._lease = lease
        self._grace = grace
        self._on_suspects = on_suspects
        self._on_error = on_error
        self._started = started
        self._rung = False
        self._called = False                                           # by a ring; nothing was claimed since
        self._late = False                                             # what the last look saw to be due later
        self._coming = False                                           # something is due, of lanes that do not know yet
        self._pace = Pace()
        self._heart: Heartbeat | None = None
        self._quiet = False                                            # suspects wait for an empty process
        self._claiming = self._unsure = 0
        self._overdue = False                                          # a call that blocks the loop, and was told
        self._helped = 0.0
        self._errands: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._bell = Doorbell(db, self._ring)
        self._runner = Runner(db, app, Threads(), stuck=on_stuck or (lambda: None), back=self._wake.set,
                              failed=on_error, alive=lambda: not self.draining or self._grace > 0,
                              wrote=lambda tables: self._dispatcher.wrote(tables), later=self._postponed)
        self._dispatcher = Dispatcher(slots, self._runner.run, self._ended, self._wake)
        self._chores = Chores(db, self._dispatcher, self._bell, self._reread, self._wake, on_error)
        if capture:
            set_effects("capture")

    async def run(self) -> None:
        """Works until drain() or stop(); then what runs is finished within the grace, and the rest given back."""
        while not self.draining and not await self._begin():
            await self._nap(self._pace.failed())
        chores = asyncio.create_task(self._chores.run())
        try:
            while not self.draining:
                try:
                    self._wake.clear()
                    if not await self._claim():
                        self._unknown()
                        await self._rest()
                    elif self._lookout.due:
                        await self._look()
                    elif self._lookout.peek_due:                       # a deep handler must not hide the others' work
                        self._beside(self._lookout.peek_beside())
                    self._pace.failures = 0
                except Exception as error:                             # the database is away, or we are wrong: go on
                    self._beside(self._bell.hush())                    # a held bell makes every writer pay
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
        """Works everything that is ready or due by anton.now(), and returns when nothing runs and nothing is due.

        What waits for its rate for longer than a moment (rate.NEAR) is left: it goes back to the queue.
        """
        self._dispatcher.hold = False
        await self._begin(patient=False)
        try:
            while not self.draining:
                self._wake.clear()
                if await self._claim():
                    continue
                held = self._dispatcher.fill()                         # for more, which did not come
                active = [run.lane for run in self._dispatcher.active.values()]
                if held or active and not self._meter.stalls(active):
                    await (self._nap(AGAIN) if self._meter.lanes else self._wake.wait())
                elif self._errands:
                    await asyncio.wait(self._errands)
                elif active and self._quiet or await self._idle():     # suspects wait for what waits for its rate
                    return
                elif self._office.hungry:                              # another process has the permits
                    await self._nap(AGAIN)
                elif self._held_up():
                    await self._nap(HELD_UP)
                elif self._meter.lanes and not self._dispatcher.wanted():  # no start for what is there
                    waiting = [lane for lane in self._dispatcher.order if lane.ready or lane.feeding or not lane.idle]
                    if waiting and not self._coming and self._meter.stalls(waiting):
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
        self._dispatcher.closed = True
        self._wake.set()

    def stop(self) -> None:
        """Stops now: what runs is cancelled and given back. Call it in the worker's loop."""
        self._grace = 0.0
        self.drain()
        for task in self._dispatcher.active:
            task.cancel()

    @property
    def draining(self) -> bool:
        """It claims and starts nothing more."""
        return self._dispatcher.closed

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
            self._chores.lease = self._length
            self._office = Office(self.db, self.id, self._length)
            self._meter = Meter(self.db, self.id, self._opened)
            self._keys = KeyMeter(self.db, self.id, self._runner.pullers.pull, put_off,
                                  None if self._dispatcher.hold else NEAR)
            self._lookout = Lookout(self.db, self.id, self._length, self._dispatcher, self._pace, self._on_error)
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
        self._dispatcher.closed = True
        if not self.id:
            return
        with contextlib.suppress(Exception):
            await self._runner.settler.give_back([job for lane in self._dispatcher.order for job in lane.put_back()])
        self._close()
        if self._dispatcher.active:
            await asyncio.wait(self._dispatcher.active, timeout=self._grace)
        with contextlib.suppress(Exception):
            await self._keys.end()
        if not self._dispatcher.active:                                # else they run out by themselves
            with contextlib.suppress(Exception):
                await self._office.end()
        with contextlib.suppress(Exception):
            await self._meter.end()
        for task in self._dispatcher.active:
            task.cancel()
        if self._dispatcher.active:
            await asyncio.wait(self._dispatcher.active, timeout=5)
        if self._errands:
            await asyncio.wait(self._errands, timeout=5)
        if self._heart is not None:                                    # it had begun
            self._heart.stop()
        await self._bell.close()
        with contextlib.suppress(Exception):
            async with self.db.conn() as conn:
                await queue.stop_worker(self.db, conn, self.id)
        as_worker(-1)

    def _close(self) -> None:
        """What waits for its rate is not waited for."""
        self._meter.close()
        for lane in self._dispatcher.order:
            if lane.tap is not None:
                self._runner.pullers.close(lane)

    async def _refresh(self) -> None:
        """Reads the catalogue: handlers of this app that the code still has, and SQL handlers made from psql."""
        lanes = await read_lanes(self.db, self.app, self._dispatcher.lanes)
        self._runner.caller.tables.update({lane.id: lane.table_id for lane in lanes.values()})
        self._dispatcher.know(lanes)
        self._office.know(lanes.values())
        self._meter.know(lanes.values())
        self._keys.know(lanes.values())
        self._runner.reader.forget()

    async def _reread(self) -> None:
        await self._refresh()
        self._all_ready()

    # Claiming

    async def _claim(self) -> bool:
        """Starts what waits, claims for lanes with room that may have jobs. Whether it got any."""
        if self._office.lanes and not self.draining:
            await self._permits()
        self._meter.poke()
        self._dispatcher.fill()
        wanted = [] if self._quiet or self.draining else self._dispatcher.wanted()
        if not wanted:
            return False
        claim = Claim(wanted)
        self._claiming = queue.token()                                 # a blocked loop reads the answer late
        try:
            async with self.db.conn() as conn:
                claimed = await queue.claim(self.db, conn, self.id, self._length, [lane.id for lane in wanted],
                                            claim.jobs, claim.records, claim.after, self._claiming,
                                            [lane.turn for lane in wanted], self._in_order(wanted))
        finally:
            self._claiming = 0
        lanes = claim.brought(claimed)
        if claimed:
            self._pace.claimed(claim.at, lanes, len(claimed))
        self._dispatcher.fill()
        if any(lane.ready and not lane.wants() for lane in wanted):
            await self._help()
        if self._bell.others and any(job.waited > 1500 and not job.attempt for job in claimed):
            self._chores.asleep()                                      # is the announcer?
        self._called = self._called and not claimed
        return bool(claimed)

    def _in_order(self, lanes: list[Lane]) -> list[int] | None:
        """Tokens of what is claimed of those that are ordered; None: none of these is."""
        ordered = [lane for lane in lanes if lane.order is not None]
        if not ordered:
            return None
        tokens = {job.token for lane in ordered for job in lane.waiting}
        return [*tokens.union(*(run.tokens for run in self._dispatcher.active.values() if run.lane.order is not None))]

    async def _permits(self) -> None:
        """Takes what lanes with a limit can use, and gives back what they cannot."""
        await self._office.turn()
        for lane in self._dispatcher.order:
            if lane.permits is not None and lane.items:
                self._runner.pullers.pull(lane)

    def _opened(self, lane: Lane) -> None:
        """A lane with a rate may begin some."""
        if lane.items:
            self._runner.pullers.pull(lane)
        if lane.waiting or lane.ready or lane.tap is None or lane.tap.far:
            self._wake.set()

    def _work(self) -> bool:
        """There is something to claim, or to take a permit for."""
        return bool(self._dispatcher.wanted()) or self._office.hungry

    def _held_up(self) -> bool:
        """All that is wanted is ordered: a claim that brought none of it may wait for what went before."""
        wanted = self._dispatcher.wanted()
        return bool(wanted) and all(lane.order is not None for lane in wanted)

    def _ended(self, lane: Lane) -> None:
        """A batch of it ended."""
        if lane.down is not None and not lane.calls:
            self._beside(self._surface(lane))
        if lane.table == f"{self.db.schema}.tick":
            self._chores.call()                                        # another firing may wait for this one

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

    def _beside(self, chore: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(chore)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    # Waiting

    async def _rest(self) -> None:
        """Nothing to claim: look, announce, look once more, wait."""
        if self._dispatcher.full or self._quiet:
            await self._bell.step_down()
            await self._nap(1.0)
            if not self._quiet or not self._dispatcher.active:
                await self._look()
            return
        if self._office.lanes:
            await self._permits()                                      # what the claim found empty
            if self._office.hungry:                                    # others have the permits: ask again soon
                await (self._look() if self._lookout.due else self._lookout.peek())
                if not self._dispatcher.wanted():
                    await self._nap(AGAIN)
                return
        flowing = self._pace.flowing(time.monotonic())
        if flowing and await self._paced(flowing):
            return
        look = await self._look()
        if self._work():
            if self._held_up():
                await self._nap(HELD_UP)
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
            self._dispatcher.fill()
        self._beside(self._bell.hush())                                # on its own connection, before the claim's
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
            self._dispatcher.fill()
        return self._work()

    async def _look(self) -> Look:
        self._late = False
        look = await self._lookout.look()
        self._quiet = bool(look.suspects) and self._on_suspects is None
        if look.suspects and self._on_suspects is not None:
            self._on_suspects()
        elif self._quiet and not self._dispatcher.active:
            try:
                await self._suspects()
            finally:
                self._quiet = False
        return look

    def _ring(self) -> None:
        self._rung = True
        self._pace.rung(time.monotonic())
        self._wake.set()

    def _unknown(self) -> None:
        """The bell rang and nothing was there: perhaps for a handler that was made just now."""
        if self._called:
            self._called = False
            self._chores.stale()

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

    def _postponed(self) -> None:
        """We put something off: the next look says until when."""
        self._late = True
        self._wake.set()

    def _all_ready(self) -> None:
        """Any lane may have jobs."""
        self._lookout.hurry()
        self._dispatcher.all_ready()

    def _tokens(self) -> tuple[list[int], list[int]]:
        """Leases to keep alive, and jobs that are left out. Asked by the heartbeat's thread."""
        tokens, overdue = kept(list(self._dispatcher.lanes.values()), list(self._dispatcher.active.values()))
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
        drop(tokens, self._dispatcher.order, self._dispatcher.active, self._runner.settler.settling)
        for lane in self._dispatcher.order:
            if lane.order is not None and lane.down is not None and not lane.calls:
                self._beside(self._surface(lane))

    async def _suspects(self) -> int:
        """Jobs whose worker died, with none of the living's beside them."""
        return await work_suspects(self._runner, self._dispatcher, self._office, self._meter, self._length, self._close)

    async def _idle(self) -> bool:
        """Nothing is due, nothing came while that was asked, and all that is claimed waits for its rate."""
        return not await self._more() and not self._dispatcher.wanted() and self._meter.stalls(
            lane for lane in self._dispatcher.order if not lane.idle)

    async def _more(self) -> bool:
        """Nothing runs, or all that does waits for its rate: whether something is due all the same."""
        async with self.db.conn() as conn:
            await schedule.fire(self.db, conn)
        look = await self._look()
        fed = await feed(self.db, self._dispatcher.lanes.values())
        late = look.wake_at is not None and look.wake_at <= look.at    # changes that are not folded yet
        self._coming = bool(look.suspects or fed or late)
        return bool(look.ready) or self._coming
