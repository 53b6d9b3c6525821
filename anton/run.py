"""Run: makes the calls of one batch, and answers each kind of failure.

    a record fails     the batch is split by 8 down to single records; those that are done are settled on the way, so
                       an innocent runs again at most 4 times and never after it was settled
    the world fails    what is left goes back, the handler waits (one record probes)
    a lease is lost    what was done under it is dropped, another worker has it; the others go on
    a thread is stuck  its record failed; the thread is given up

Handlers of single records (each=True) settle in parts: each.py. SQL handlers run inside their own ack.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import asyncpg

from anton import queue
from anton.app import App
from anton.call import MARGIN, Called, Caller, Interrupted, Stuck
from anton.db import Database
from anton.each import AGAIN, SLOW, Each, Pullers
from anton.errors import HandlerTimeout, LeaseLost, RowChanged, WriteRefused
from anton.fate import Fate, World, failed, fate_of, is_world, no_fit, say
from anton.lane import FEW, Batch, Lane
from anton.order import OutOfOrder
from anton.rate import Closed
from anton.read import Inputs, Reader
from anton.relation import forget
from anton.rights import explain
from anton.settle import Doing, Settler
from anton.threads import NoThread, Threads
from anton.write import WHOLE, Op, pick

log = logging.getLogger("anton.worker")

WAYS = 8  # a failed batch is cut into so many
PERMIT = 0.005  # seconds between two looks for a permit for what runs once more
LATE = timedelta(seconds=5)  # that what runs once more waits for a start of its key, before it goes back for as long
CONFLICTS = 20  # runs of one record whose row keeps changing, before it waits a moment


class _Late(Exception):
    """What runs once more has no start for long."""


@dataclass(eq=False)
class Run:
    """One batch on its way. overdue_at: loop time after which its leases are left to end, None while no call runs.

    last: its last part is being worked.
    """

    lane: Lane
    batch: Batch
    overdue_at: float | None = None
    stuck: list[int] = field(default_factory=list)
    last: bool = False

    @property
    def tokens(self) -> set[int]:
        """Of the jobs that are not settled."""
        return {job.token for job in self.batch.jobs if job.left}


class Runner:
    """Runs batches for one worker.

    wrote: told the tables of a commit; stuck: told of a thread that was given up; back: told that a probe went well;
    failed: told what is neither a record's fault nor the world's; later: told that something is to be done again.
    """

    def __init__(self, db: Database, app: App, threads: Threads, *,
                 wrote: Callable[[set[int] | None], None] = lambda tables: None,
                 stuck: Callable[[], None] = lambda: None, back: Callable[[], None] = lambda: None,
                 failed: Callable[[BaseException], None] = lambda error: None,
                 alive: Callable[[], bool] = lambda: True, later: Callable[[], None] = lambda: None) -> None:
        self.db = db
        self.caller = Caller(db, app, threads)
        self.settler = Settler(db, wrote, alive, later)
        self.reader = Reader(db)
        self.stuck = stuck
        self.back = back
        self.failed = failed
        self.pullers = Pullers(threads, stuck)
        self.depth_limit = 32
        self._again_now: dict[int, int] = {}                           # records that run once more, by lane

    async def run(self, run: Run) -> None:
        """Settles every record of the batch, or gives it back. Raises only CancelledError, after giving back."""
        lane = run.lane
        if lane.order is not None:
            lane.order.join(run)
        try:
            batch = await self._sift(run)
            if batch.size and lane.kind == "sql":
                await self._sql(run, batch)
            elif batch.size:
                if batch.parts[0][0].probe:
                    await self._part(run, batch.pick([0]))
                    batch = batch.pick(range(1, batch.size))           # the probe went well
                    lane.ready = True                                  # other slots need not wait for the rest of it
                    self.back()
                await self._parts(run, batch)
        except LeaseLost:
            log.warning("worker: %s: a lease was lost; another worker has these records", lane.name)
            self._out_of_order(lane)
            await self._leave(run, None)
        except Closed:
            await self._leave(run, None)
        except asyncio.CancelledError:
            self._out_of_order(lane)
            await asyncio.shield(self._leave(run, None))
            raise
        except Exception as error:
            reason = error.error if isinstance(error, World) else error
            if isinstance(reason, LeaseLost):                          # of another batch: all of it goes back
                await self._leave(run, None)
                return
            if not isinstance(error, World) and not is_world(error):   # ours, not the handler's: keep the jobs
                log.exception("worker: %s", lane.name)
                self.failed(error)
            else:
                reason = await self._explained(reason)
                if isinstance(reason, NoThread):
                    self.stuck()                                       # a process that starts anew can
                if lane.down is None:
                    log.warning("worker: %s waits: %s", lane.name, say(reason))
            lane.down = reason
            await self._leave(run, reason)
        finally:
            if lane.order is not None:
                lane.order.sent(run)

    def _out_of_order(self, lane: Lane) -> None:
        """Records of an ordered handler come back: nothing later is begun until all that was claimed is given back."""
        if lane.order is not None and lane.down is None:
            lane.down, lane.order.stopped = OutOfOrder(), True

    async def _explained(self, error: BaseException) -> BaseException:
        """What the world raised, with the GRANT where a right is missing. A table that is not as known is read anew."""
        missing = no_fit(error)
        if missing is not None and not isinstance(missing, asyncpg.UndefinedColumnError):
            forget(self.db)                                            # without the column records would be blamed
        return await explain(self.db, error)

    async def _parts(self, run: Run, batch: Batch) -> None:
        """In parts of at most the lane's batch, and of so many bytes."""
        lane, now = run.lane, time.monotonic()
        if batch.size > FEW and now - lane.wide_at > 0.25:
            lane.wide_at = now
            lane.wide = await self.settler.lend(lambda conn: self.db.call_value(conn, "wide", lane.table_id))
            if lane.wide and not lane.width:
                await self.read(lane, batch.pick(range(FEW)))          # only to see how wide they are
        at = 0
        while at < batch.size:
            end = min(batch.size, at + lane.most())
            run.last = end == batch.size
            await self._part(run, batch if end - at == batch.size else batch.pick(range(at, end)))
            at = end

    async def _part(self, run: Run, batch: Batch) -> None:
        await (self._each(run, batch) if run.lane.each else self.attempt(run, batch))

    async def attempt(self, run: Run, batch: Batch, conflicts: int = 0) -> None:
        """Reads, calls and settles; again for those that must run again. Raises World, LeaseLost."""
        lane = run.lane
        started = time.perf_counter()
        if not all(job.left for job in batch.jobs):                    # its lease was lost meanwhile
            batch = Batch([(job, ordinals) for job, ordinals in batch.parts if job.left])
            if not batch.size:
                return
        try:
            inputs = await self.read(lane, batch)
            called = await self._call(run, inputs) if inputs.items else Called([], {})
        except Interrupted as stop:
            await self._interrupted(run, inputs, stop)
            return
        except Stuck as stuck:
            self.stuck()
            await self._blame(run, inputs, stuck.item, stuck.error)
            return
        except _Late:
            await self.settler.fail(lane, batch, Fate("later", "", LATE, rated=True))
            return
        except (World, LeaseLost, Closed):
            raise
        except Exception as error:
            if is_world(error):
                raise World(error) from error
            await self._split(run, batch, error)
            return
        seconds = time.perf_counter() - started
        await self.finish(run, inputs, called, seconds * 1000, conflicts)
        lane.took(seconds, batch.size)

    async def read(self, lane: Lane, batch: Batch) -> Inputs:
        """The records of a batch. A table that is not as it was noted makes the handler wait, not its records fail."""
        try:
            inputs = await self.settler.lend(lambda conn: self.reader.read(conn, lane, batch))
        except asyncpg.SyntaxOrAccessError as error:
            raise World(error) from error
        lane.measured(inputs.width)
        if lane.order is not None:
            inputs.order = lane.order.note(batch, inputs.items, inputs.first, inputs.twins)
        return inputs

    async def finish(self, run: Run, inputs: Inputs, called: Called, ms: float, conflicts: int = 0,
                     items: list[int] | None = None, first: bool = True) -> None:
        """Settles a call that came back. Refused writes fail their records, changed rows run theirs again.

        items: those that it was about, None for all. first: also settle what had vanished or does not fit the model.
        """
        lane, batch, ops, fates = run.lane, inputs.batch, called.ops, dict(called.fates)
        again: set[int] = set()
        while True:
            doing = _doing(inputs, ops, fates, again, ms, items, first)
            try:
                if doing.done is None or doing.done or doing.fates:
                    await self.settler.settle(lane, batch, doing)
                break
            except RowChanged as error:
                bad = error.owners
                whole: BaseException = error
            except WriteRefused as error:
                whole = error.error
                bad = error.owners if error.owners is not None else await self.settler.blame(ops)
                if WHOLE not in bad:
                    fates |= dict.fromkeys(bad, failed(whole))
            if WHOLE in bad or not bad:
                part = batch if items is None else batch.pick(inputs.positions({*items, *fates}))
                if isinstance(whole, RowChanged):
                    await self._again(run, part, conflicts)
                else:
                    await self._split(run, part, whole)
                return
            if isinstance(whole, RowChanged):
                again |= bad
            ops = pick(ops, bad, keep=False)
        for item in sorted(again):
            await self._again(run, batch.pick(inputs.positions([item])), conflicts if batch.size == 1 else 0)

    async def _again(self, run: Run, batch: Batch, conflicts: int) -> None:
        """A row changed under a recorded update: the same once more, with the row as it is now."""
        if conflicts < CONFLICTS:
            if conflicts > 2:
                await asyncio.sleep(random.uniform(0, 0.001) * 2 ** min(conflicts, 7))
            await self.attempt(run, batch, conflicts + 1)
            return
        wait = Fate("retry", "its rows keep changing", timedelta(seconds=random.uniform(0.1, 1.0)))
        await self.settler.fail(run.lane, batch, wait)

    async def _split(self, run: Run, batch: Batch, error: BaseException) -> None:
        """The call failed as a whole: find the record."""
        if batch.size == 1:
            await self.settler.fail(run.lane, batch, failed(error))
            return
        for part in batch.split(batch.size if batch.retried or run.lane.each else WAYS):
            await self.attempt(run, part)

    async def _blame(self, run: Run, inputs: Inputs, item: int, error: BaseException) -> None:
        """The call failed at this item for sure: fail it, and run the others."""
        if item == WHOLE:
            await self._split(run, inputs.batch, error)
            return
        positions = inputs.positions([item])
        await self.settler.fail(run.lane, inputs.batch.pick(positions), failed(error))
        rest = inputs.batch.without(positions)
        if rest.size:
            await self._rest(run, rest)

    async def _interrupted(self, run: Run, inputs: Inputs, stop: Interrupted) -> None:
        batch = inputs.batch
        positions = inputs.positions([stop.item]) if stop.item != WHOLE else list(range(batch.size))
        await self.settler.fail(run.lane, batch.pick(positions), fate_of(stop.outcome))
        rest = batch.without(positions)
        if rest.size:
            await self._rest(run, rest)

    async def _rest(self, run: Run, batch: Batch) -> None:
        """What was not at fault, in parts: it may hold more that is."""
        for part in batch.split(WAYS):
            await self.attempt(run, part)

    # --- calls

    async def _each(self, run: Run, batch: Batch) -> None:
        """One call for each record; settles what is finished while the rest runs."""
        lane, started = run.lane, time.perf_counter()
        try:
            inputs = await self.read(lane, batch)
        except Exception as error:
            if isinstance(error, (World, LeaseLost)) or is_world(error):
                raise
            if lane.order is not None:
                await self._in_line(run, alone=True)
            await self._split(run, batch, error)
            return
        if lane.order is not None:
            await self._in_line(run)
        each = Each(self.db, lane, inputs, self.caller.context(lane.handler, inputs))
        if not each.count or inputs.gone or inputs.broken:
            await self.finish(run, inputs, Called([], {}), 0.0, 0, [])
        if lane.handler.is_async:
            await self.caller.stock(lane, min(lane.concurrency, each.count), each.count)
        each.send()
        if lane.order is not None and run.last:
            lane.order.sent(run)
        quiet = min(1.0, max(SLOW, lane.timeout.total_seconds() / 10))
        try:
            while not each.over:
                run.overdue_at = time.monotonic() + lane.timeout.total_seconds() + MARGIN
                self.pullers.pull(lane)
                await each.wait(SLOW if lane.items and not lane.handler.is_async else quiet)
                self.pullers.more(lane)
                if lane.ready and lane.wants():                        # before pullers find nothing
                    self.back()
                if each.world is not None or (lane.tap is not None and lane.tap.closed):
                    each.drop()
                if each.gather(self.pullers.open_chunks):
                    await self._flush(run, each, (time.perf_counter() - started) * 1000)
        finally:
            over = each.over
            if lane.order is not None and not over:
                lane.order.stopped = True                              # before what waits for its keys may have them
            each.ended = True
            if not over:
                each.drop()
            if lane.order is not None:
                lane.order.leave(each)
                self.pullers.pull(lane)
        if each.world is not None:
            raise World(each.world)
        if each.skipped:
            raise Closed
        lane.took(time.perf_counter() - started, batch.size)

    async def _flush(self, run: Run, each: Each, ms: float) -> None:
        again = {item for item, fate in each.fates.items() if fate is AGAIN}
        items = [item for item in each.finished if item not in again] if again else each.finished
        fates = {item: fate for item, fate in each.fates.items() if item not in again}
        inputs = each.inputs
        lane = each.lane
        lane.writes.update(op.relation.name for op in each.ops if op.relation)
        plain = len(items) == each.count and not inputs.gone and not inputs.broken
        await self.finish(run, inputs, Called(each.ops, fates), ms, 0, None if plain else items, first=False)
        if lane.order is not None:
            lane.order.settled(each, each.finished)
            self.pullers.pull(lane)
        each.flushed()

    async def _in_line(self, run: Run, alone: bool = False) -> None:
        """Until its records may be sent, and nothing before them runs where it is to be alone."""
        lane, order = run.lane, run.lane.order
        assert order is not None
        await order.first(run)
        while alone and lane.down is None and (lane.items or lane.running):  # noqa: ASYNC110 (as for a permit)
            await asyncio.sleep(PERMIT)
        if lane.down is not None:
            raise World(lane.down)
        assert lane.permits is not None
        if order.tenure != lane.permits.tenure:                        # another process may have had the handler
            tenure = lane.permits.tenure
            order.know((), await self.settler.lend(partial(queue.waiting_keys, self.db, handler=lane.id)))
            order.tenure = tenure
        if order.closed:
            ids = [job.id for job in run.batch.jobs if job.size == 1]
            order.heads |= set(await self.settler.lend(partial(queue.heads, self.db, handler=lane.id, jobs=ids)))

    async def _call(self, run: Run, inputs: Inputs) -> Called:
        if run.lane.each and run.lane.permits is not None:
            async with self._once_more(run.lane, inputs):
                return await self._made(run, inputs)
        return await self._made(run, inputs)

    @asynccontextmanager
    async def _once_more(self, lane: Lane, inputs: Inputs) -> AsyncIterator[None]:
        """A permit, and the gate, for records that run again one by one, outside of the pullers."""
        gate = lane.gate
        keys = set(map(gate.key, inputs.items)) if gate is not None else set()
        late = time.monotonic() + LATE.total_seconds()
        lane.again += 1
        try:
            while True:
                free = lane.running + self._again_now.get(lane.id, 0) < lane.room
                if free and (gate is None or gate.enter_all(keys)):
                    break
                if gate is not None and gate.starts is not None and time.monotonic() > late:
                    raise _Late
                await asyncio.sleep(PERMIT)
            self._again_now[lane.id] = self._again_now.get(lane.id, 0) + 1
            try:
                yield
            finally:
                self._again_now[lane.id] -= 1
                for key in keys:
                    entry = gate.leave(key) if gate is not None else None
                    if entry is not None:
                        lane.items.appendleft(entry)
        finally:
            lane.again -= 1
            if gate is not None:
                gate.gives_up(keys)
            self.pullers.pull(lane)

    async def _made(self, run: Run, inputs: Inputs) -> Called:
        if run.lane.tap is not None:
            await run.lane.tap.turn()
        run.overdue_at = time.monotonic() + run.lane.timeout.total_seconds() + MARGIN
        try:
            return await self.caller.call(run.lane, inputs)
        finally:
            run.overdue_at = None

    async def _sql(self, run: Run, batch: Batch) -> None:
        """A SQL handler over whole jobs, token by token."""
        by_token: dict[int, list[queue.Job]] = {}
        for job in batch.jobs:
            by_token.setdefault(job.token, []).append(job)
        for jobs in by_token.values():
            await self._sql_jobs(run, jobs)

    async def _sql_jobs(self, run: Run, jobs: list[queue.Job]) -> None:
        lane = run.lane
        if lane.tap is not None:
            await lane.tap.turn()
        started = time.perf_counter()
        try:
            await self.settler.run_sql(lane, jobs)
        except (World, LeaseLost):
            raise
        except Exception as error:
            cause: BaseException = error.error if isinstance(error, WriteRefused) else error
            if isinstance(cause, asyncpg.QueryCanceledError):
                cause = HandlerTimeout(lane.name, lane.timeout.total_seconds())
            if is_world(cause) or lane.model:                          # a SELECT over all records blames none of them
                raise World(cause) from error
            if len(jobs) > 1:
                step = -(-len(jobs) // WAYS)
                for at in range(0, len(jobs), step):
                    await self._sql_jobs(run, jobs[at:at + step])
            elif jobs[0].size > 1 and len(jobs[0].left) > 1:
                parts = await self.settler.split(jobs[0], WAYS)
                jobs[0].left = ()
                run.batch = Batch([*run.batch.parts, *((part, part.left) for part in parts)])
                for part in parts:
                    await self._sql_jobs(run, [part])
            else:
                await self.settler.fail(lane, Batch.of(jobs), failed(cause))
            return
        lane.took(time.perf_counter() - started, sum(job.size for job in jobs))

    # --- before and after

    async def _sift(self, run: Run) -> Batch:
        """Buries what is too deep in a chain, settles what a filter that had failed does not let pass."""
        batch = run.batch
        deep = [job for job in batch.jobs if job.depth >= self.depth_limit]
        unsure = [job for job in batch.jobs if job.degraded is not None and run.lane.where and job not in deep]
        if not deep and not unsure:
            return batch
        for job in deep:
            path = await self.settler.lend(partial(queue.chain, self.db, receipt=job.cause)) if job.cause else ""
            text = (
                f"{job.depth} handlers deep, and the limit is {self.depth_limit}: … -> {path} -> {run.lane.table} -> "
                f"{run.lane.name}. These handlers feed each other; stop the loop with where=, or write to another Table"
            )
            await self.settler.bury(run.lane, Batch.of([job]), "depth", text)
        for job in unsure:
            passing = await self.settler.lend(partial(queue.passes, self.db, handler=run.lane.id, job=job))
            out = [ordinal for ordinal in job.left if ordinal not in passing]
            if out:
                part = Batch([(job, out)])
                await self.settler.settle(run.lane, part, Doing(gone=range(part.size)))
        return Batch.of(job for job in batch.jobs if job.left)

    async def _leave(self, run: Run, error: BaseException | None) -> None:
        """Gives back what is not settled; with an error its handler waits for the world."""
        settler, jobs = self.settler, run.batch.jobs
        try:
            await (settler.give_back(jobs) if error is None else settler.world_failed(jobs, error))
        except Exception as again:  # no database: their lease will end
            log.warning("worker: %s: could not give records back; they come back when their lease ends: %s",
                        run.lane.name, again)


def _doing(inputs: Inputs, ops: list[Op], fates: dict[int, Fate], again: set[int], ms: float, items: list[int] | None,
           first: bool) -> Doing:
    if items is None and not (fates or again or inputs.broken):
        return Doing(ops, None, {}, inputs.first, inputs.gone, ms)                     # all of it
    ends = {position: fate for item, fate in fates.items() for position in inputs.positions([item])}
    if first:
        ends |= {position: failed(error) for position, error in inputs.broken.items()}
    good = (
        item
        for item in (range(len(inputs.items)) if items is None else items)
        if item not in fates and item not in again
    )
    gone = inputs.gone if first else []
    return Doing(ops, sorted([*inputs.positions(good), *gone]), ends, inputs.first, gone, ms)
