"""Settle: how what a call did becomes committed, and what is done about each kind of failure.

    records done -> ack + their writes + receipt            }
    record failed -> retry later, or dead letter            } one transaction
    the world failed -> give back, the handler waits

A write that the database refuses is blamed on its owner record alone; a lost lease drops everything. When the
connection breaks, even at COMMIT, the same transaction is tried anew: the fence tells whether it had been committed.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import asyncpg

from anton import queue
from anton.db import Conn, Database, translating
from anton.errors import BadOption, LeaseLost, WriteRefused
from anton.fate import TEXT, Fate, World, backoff, disconnected, say
from anton.lane import Batch, Lane
from anton.order import Order
from anton.queue import Job
from anton.relation import Relation
from anton.write import WHOLE, Op, Output, Rows, apply, pick

T = TypeVar("T")

log = logging.getLogger("anton.worker")

TRIES = 6  # of a transaction that another one got in the way of
BREAKS = 10  # of its connection, within a transaction: a loop that is blocked again and again is cut off each time

BLOCKED = (asyncpg.SerializationError, asyncpg.DeadlockDetectedError, asyncpg.LockNotAvailableError,
           asyncpg.InsufficientResourcesError, asyncpg.PostgresSystemError, asyncpg.InvalidCachedStatementError,
           asyncpg.OutdatedSchemaCacheError)
IN_THE_WAY = (*BLOCKED, asyncpg.QueryCanceledError)
class Unsure(LeaseLost):
    """The connection broke and what was to be settled is not there any more: that was COMMIT's doing, or it is lost."""


@dataclass(slots=True)
class Doing:
    """What one transaction settles of a batch.

    done: positions that are done, rising; None: all that have no fate. first: position of each owner, None: its own
    number. gone: positions among done whose records had vanished. ms: how long the handler took. closed: keys that it
    was about, and those of them of which records wait after it.
    """

    ops: list[Op] = field(default_factory=list)
    done: Sequence[int] | None = None
    fates: dict[int, Fate] = field(default_factory=dict)
    first: list[int] | None = None
    gone: Sequence[int] = ()
    ms: float = 0.0
    closed: tuple[set[str], list[str]] = field(default_factory=lambda: (set(), []))


@dataclass(slots=True)
class _Unit:
    """One receipt: whole jobs of one token, or ordinals of one job. places: receipt position by batch position."""

    jobs: list[Job]
    ordinals: list[int] | None
    places: dict[int, int]
    gone: int = 0


class Settler:
    """Makes the transactions of one worker. wrote: told the tables that a commit wrote to, None when it may be
    any. alive: False to give up on a database that is away. later: told that something is to be done again, later."""

    def __init__(self, db: Database, wrote: Callable[[set[int] | None], None] = lambda tables: None,
                 alive: Callable[[], bool] = lambda: True, later: Callable[[], None] = lambda: None) -> None:
        self.db = db
        self.worker = 0
        self._wrote = wrote
        self._alive = alive
        self._later = later
        self._tables: dict[int, int] = {}
        self.settling: set[asyncio.Task[Any] | None] = set()  # in a transaction now: the fence tells them what is lost

    async def settle(self, lane: Lane, batch: Batch, doing: Doing) -> None:
        """Commits all of it. Raises WriteRefused, RowChanged, LeaseLost, World."""
        outputs: list[Output] = []
        for relation in {op.relation.oid: op.relation for op in doing.ops if op.relation}.values():
            await self._table(relation)

        async def work(conn: Conn) -> None:
            outputs.clear()
            outputs.extend(await self._write(conn, lane, batch, doing))

        if not await self._settled(batch, doing, work):
            self._wrote({self._tables[op.relation.oid] for op in doing.ops if op.relation})
        elif outputs:
            self._wrote({self._tables[output.relation.oid] for output in outputs if output.keys})
        if lane.order is not None:
            lane.order.know(*doing.closed)
        if doing.fates:
            self._later()

    async def _settled(self, batch: Batch, doing: Doing, work: Callable[[Conn], Awaitable[None]]) -> bool:
        """Commits work, which settles what doing says; False when nothing of that was ours any more, done or lost.

        Raises LeaseLost when some of it still is; then job.left is what the database says.
        """
        try:
            await self.transact(work)
        except LeaseLost as error:
            await self.refresh(batch.jobs)
            left = {job: set(job.left) for job in batch.jobs}
            if any(ordinal in left[job] for job, ordinal in _records(batch, doing)):
                raise
            if not isinstance(error, Unsure):
                log.warning("worker: the lease was lost; another worker has these records")
            return False
        _forget(batch, doing)
        return True

    async def refresh(self, jobs: Iterable[Job]) -> None:
        """Sets what is left of these jobs by the database: nothing of those that are not ours any more."""
        jobs = list(jobs)
        for token, ids in _by_token(jobs).items():
            held = await self.lend(partial(queue.held, self.db, lease=token, ids=ids))
            for job in jobs:
                if job.token == token:
                    job.left = held.get(job.id, ())

    async def blame(self, ops: list[Op]) -> set[int]:
        """The owners of writes that the database refuses, found by halves, in a transaction that is rolled back.

        Handlers are not run again. WHOLE among them: what belongs to the batch is refused.
        """
        owners = sorted(_owners(ops))
        found: set[int] = set()

        async def search(conn: Conn, some: list[int]) -> None:
            try:
                async with conn.transaction():
                    await apply(conn, pick(ops, set(some)))
                    await conn.execute("set constraints all immediate")
            except (WriteRefused, asyncpg.IntegrityConstraintViolationError):
                if len(some) == 1:
                    found.update(some)
                    return
                await search(conn, some[:len(some) // 2])
                await search(conn, some[len(some) // 2:])

        async def work(conn: Conn) -> None:
            found.clear()
            await search(conn, owners)
            raise _Undo

        try:
            await self.transact(work)
        except _Undo:
            pass
        return found

    async def fail(self, lane: Lane, batch: Batch, fate: Fate) -> None:
        """Settles every record of the batch by one fate."""
        await self.settle(lane, batch, Doing(done=(), fates=dict.fromkeys(range(batch.size), fate)))

    async def bury(self, lane: Lane, batch: Batch, reason: str, error: str) -> None:
        """Makes dead letters of all records of the batch, whatever attempts they have left."""
        async def work(conn: Conn) -> None:
            for job, ordinal in batch:
                await self._bury(conn, lane, job, ordinal, reason, error[:TEXT], None)

        await self._settled(batch, Doing(), work)
        if lane.order is not None:
            lane.order.know((), [lane.order.text(lane.order.of_job(job, ordinal)) for job, ordinal in batch])

    async def give_back(self, jobs: Iterable[Job]) -> None:
        """Jobs that were not finished are ready again; nothing counts against them. Those that were lost are left."""
        await self._give(jobs, partial(_give_back, self.db))

    async def world_failed(self, jobs: Iterable[Job], error: BaseException) -> None:
        """Gives the jobs back and lets their handler wait for the world. Those that were lost are left."""
        await self._give(jobs, partial(_world_failed, self.db, say(error), getattr(error, "after", None)))

    async def _give(self, jobs: Iterable[Job], give: Callable[[int, list[int], Conn], Awaitable[None]]) -> None:
        jobs = [job for job in jobs if job.left]
        for _ in range(TRIES):
            try:
                for token, ids in _by_token(jobs).items():
                    await self.transact(partial(give, token, ids))
                self._later()
                return
            except LeaseLost:                                          # of one of them
                await self.refresh(jobs)

    async def split(self, job: Job, ways: int) -> list[Job]:
        """Cuts what is left of a leased job into leases of their own."""
        try:
            return await self.transact(partial(queue.split, self.db, job=job, parts=ways))
        except Unsure:                                                 # it is cut already
            return await self.lend(partial(queue.parts_of, self.db, job=job))

    async def run_sql(self, lane: Lane, jobs: list[Job]) -> None:
        """Runs a SQL handler over whole jobs of one token, which are settled in the same transaction."""
        async def work(conn: Conn) -> None:
            await self.db.call(conn, "limit_statement", max(1, round(lane.timeout.total_seconds() * 1000)))
            await queue.run_sql(self.db, conn, jobs[0].token, [job.id for job in jobs], self.worker)

        try:
            await self.transact(work, BLOCKED)
        except LeaseLost as error:
            await self.refresh(jobs)
            if not isinstance(error, Unsure) or any(job.left for job in jobs):
                raise
        for job in jobs:
            job.left = ()
        self._wrote(None)

    async def lend(self, work: Callable[[Conn], Awaitable[T]]) -> T:
        """Runs work that only reads, outside a transaction; anew when the connection broke."""
        lost = 0
        while True:
            try:
                with translating():
                    async with self.db.conn() as conn:
                        return await work(conn)
            except Exception as error:
                if not disconnected(error) or not self._alive():
                    raise
                lost += 1
                await asyncio.sleep(random.uniform(0.5, 1.0) * min(2.0, 0.05 * 2**lost))

    async def transact(
        self, work: Callable[[Conn], Awaitable[T]], again: tuple[type[Exception], ...] = IN_THE_WAY
    ) -> T:
        """Runs work in a transaction, anew when another one was in its way or the connection broke. Raises Unsure."""
        task = asyncio.current_task()
        self.settling.add(task)
        try:
            return await self._transact(work, again)
        finally:
            self.settling.discard(task)

    async def _transact(self, work: Callable[[Conn], Awaitable[T]], again: tuple[type[Exception], ...]) -> T:
        lost, tries, breaks = 0, 0, 0
        while True:
            begun = False
            try:
                with translating():
                    async with self.db.tx() as conn:
                        begun = True
                        return await work(conn)
            except asyncpg.IntegrityConstraintViolationError as error:  # deferred, so COMMIT said it
                raise WriteRefused(None, error) from error
            except Exception as error:
                if disconnected(error):
                    lost += 1
                    breaks += begun
                    if not self._alive() or breaks >= BREAKS:
                        raise World(error) from error
                    pause = min(2.0, 0.05 * 2**lost)
                elif isinstance(error, again):
                    tries += 1
                    if tries >= TRIES:
                        raise World(error) from error
                    pause = 0.02 * 2**tries
                elif lost and isinstance(error, (LeaseLost, BadOption)):  # gone, or "settled already"
                    raise Unsure from error
                else:
                    raise
            await asyncio.sleep(random.uniform(0.5, 1.0) * pause)

    async def _write(self, conn: Conn, lane: Lane, batch: Batch, doing: Doing) -> list[Output]:
        units = _units(batch, doing)
        outputs: list[Output] = []
        if len(units) == 1:
            outputs = await self._unit(conn, units[0], doing.ops, doing)
        else:
            where = {position: n for n, unit in enumerate(units) for position in unit.places}
            first = doing.first
            for n, unit in enumerate(units):
                owners = {who for who in _owners(doing.ops)
                          if (0 if who == WHOLE else where[who if first is None else first[who]]) == n}
                outputs += await self._unit(conn, unit, pick(doing.ops, owners), doing)
        later: dict[tuple[Job, bool], list[tuple[int, timedelta]]] = {}
        for (job, fate), ordinals in _by_fate(batch, doing.fates).items():
            if fate.kind == "later" and lane.order is None:
                waits = later.setdefault((job, fate.rated), [])
                waits += [(ordinal, fate.after or timedelta(0)) for ordinal in ordinals]
            else:
                await self._fate(conn, lane, job, ordinals, fate)
        for (job, rated), waits in later.items():
            await queue.defer(self.db, conn, job.token, job.id, [ordinal for ordinal, _ in waits],
                              [after for _, after in waits], rated)
        if lane.order is not None:
            await self._order(conn, lane, lane.order, batch, doing)
        return outputs

    async def _order(self, conn: Conn, lane: Lane, order: Order, batch: Batch, doing: Doing) -> None:
        """The next of a key whose first record is done; and which keys are closed after this."""
        records = list(_records(batch, doing)) if order.closed or doing.fates else []
        keys = {order.text(order.of_job(job, ordinal)) for job, ordinal in records}
        failed = {batch.at(position)[0].id for position in doing.fates}
        for job in {job.id: job for job, _ in records if job.id in order.heads}.values():
            if job.id not in failed:
                await queue.end_turn(self.db, conn, lane.id, job.id)
        if keys:
            doing.closed = keys, await queue.waiting_keys(self.db, conn, lane.id, list(keys))

    async def _unit(self, conn: Conn, unit: _Unit, ops: list[Op], doing: Doing) -> list[Output]:
        job = unit.jobs[0]
        if unit.ordinals is None:
            receipt = await queue.ack(
                self.db, conn, job.token, [job.id for job in unit.jobs], self.worker, doing.ms, unit.gone
            )
        else:
            receipt = await queue.ack_part(
                self.db, conn, job.token, job.id, unit.ordinals, self.worker, doing.ms, unit.gone
            )
        if not ops:
            return []
        outputs = await apply(conn, ops)
        first, places = doing.first, unit.places
        for output in outputs:
            if not output.keys:
                continue
            if first is None and not places:                           # all of whole jobs: positions are the receipt's
                owners = [who + 1 for who in output.owners]
            else:
                owners = [0 if who == WHOLE else places[who if first is None else first[who]] for who in output.owners]
            table = self._tables[output.relation.oid]
            if isinstance(output.keys[0], int):
                await queue.put_output(self.db, conn, receipt, table, output.keys, None, owners)
            else:
                keys = [key if isinstance(key, list) else [key] for key in output.keys]
                await queue.put_output(self.db, conn, receipt, table, None, keys, owners)
        return outputs

    async def _fate(self, conn: Conn, lane: Lane, job: Job, ordinals: list[int], fate: Fate) -> None:
        last = fate.kind == "failed" and job.attempt + 1 >= lane.attempts
        if fate.kind == "discarded" or last:
            for ordinal in ordinals:
                await self._bury(conn, lane, job, ordinal, fate.kind, fate.error, fate.traceback)
            return
        after = fate.after if fate.after is not None else backoff(lane, job.attempt)
        if lane.order is not None:
            keys = [lane.order.text(lane.order.of_job(job, ordinal)) for ordinal in ordinals]
            if fate.kind == "later":
                await queue.put_off(self.db, conn, job.token, job.id, ordinals, keys)
            else:
                await queue.retry_in_turn(self.db, conn, job.token, job.id, ordinals, keys, after, fate.error,
                                          fate.kind == "failed")
            return
        await queue.retry(self.db, conn, job.token, job.id, ordinals, after, fate.error, fate.kind == "failed")

    async def _bury(self, conn: Conn, lane: Lane, job: Job, ordinal: int, reason: str, error: str,
                    traceback: str | None) -> None:
        if lane.order is None:
            await queue.bury(self.db, conn, job.token, job.id, ordinal, reason, error, traceback)
        else:
            key = lane.order.text(lane.order.of_job(job, ordinal))
            await queue.bury_in_turn(self.db, conn, job.token, job.id, ordinal, key, reason, error, traceback)

    async def _table(self, relation: Relation) -> None:
        if relation.oid in self._tables:
            return
        table = relation.table_id
        if table is None:                                              # written to, not yet noted as a table of ours
            table = int(await self.transact(lambda conn: self.db.call_value(conn, "watch", relation.sql)))
        self._tables[relation.oid] = table


async def _give_back(db: Database, token: int, ids: list[int], conn: Conn) -> None:
    await queue.give_back(db, conn, token, ids)


async def _world_failed(db: Database, error: str, after: timedelta | None, token: int, ids: list[int],
                        conn: Conn) -> None:
    await queue.world_failed(db, conn, token, ids, error, after)


class _Undo(Exception):
    """Rolls a trial back."""


def _units(batch: Batch, doing: Doing) -> list[_Unit]:
    """The receipts that this takes, one for whole jobs of each token and one for each job that is settled in part."""
    whole_batch = doing.done is None and not doing.fates
    if whole_batch and all(
        len(ordinals) == job.size and job.token == batch.parts[0][0].token for job, ordinals in batch.parts
    ):
        return [_Unit(batch.jobs, None, {} if doing.first is None else _places(range(batch.size)), len(doing.gone))]
    done = doing.done if doing.done is not None else [n for n in range(batch.size) if n not in doing.fates]
    gone, whole, units = set(doing.gone), dict[int, _Unit](), list[_Unit]()
    for job, positions, ordinals in batch.by_job(done):
        lost = sum(position in gone for position in positions) if gone else 0
        if len(ordinals) == job.size:
            if job.token not in whole:
                units.append(whole.setdefault(job.token, _Unit([], None, {})))
            unit = whole[job.token]
            unit.jobs.append(job)
            unit.places |= {position: n for n, position in enumerate(positions, len(unit.places) + 1)}
            unit.gone += lost
        else:
            units.append(_Unit([job], ordinals, _places(positions), lost))
    if not units and doing.ops:  # only writes of the whole: a receipt to hang them on
        units.append(_Unit([batch.parts[0][0]], [], {}))
    return units


def _owners(ops: Iterable[Op]) -> set[int]:
    return {who for op in ops for who in (op.owners if isinstance(op, Rows) else (op.owner,))}


def _places(positions: Iterable[int]) -> dict[int, int]:
    return {position: n for n, position in enumerate(positions, 1)}


def _by_fate(batch: Batch, fates: dict[int, Fate]) -> dict[tuple[Job, Fate], list[int]]:
    grouped: dict[tuple[Job, Fate], list[int]] = {}
    for position in sorted(fates):
        job, ordinal = batch.at(position)
        grouped.setdefault((job, fates[position]), []).append(ordinal)
    return grouped


def _by_token(jobs: Iterable[Job]) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    for job in jobs:
        if job.left:
            tokens.setdefault(job.token, []).append(job.id)
    return tokens


def _records(batch: Batch, doing: Doing) -> Iterable[tuple[Job, int]]:
    """All that doing settles, one way or the other."""
    return batch if doing.done is None else (batch.at(position) for position in (*doing.done, *doing.fates))


def _forget(batch: Batch, doing: Doing) -> None:
    """What is settled is no longer left of its job."""
    if doing.done is None:                                             # all of the batch, one way or the other
        for job, ordinals in batch.parts:
            _done(job, ordinals)
        return
    for positions in (doing.done, sorted(doing.fates)):
        for job, _, ordinals in batch.by_job(positions):
            _done(job, ordinals)


def _done(job: Job, ordinals: Sequence[int]) -> None:
    if len(ordinals) == len(job.left):
        job.left = ()
    else:
        out = set(ordinals)
        job.left = [ordinal for ordinal in job.left if ordinal not in out]
