"""Queue: the Python names of the SQL functions in sql/20_job.sql, sql/22_steer.sql and sql/35_worker.sql.

    claim -> (handler) -> ack | ack_part | retry | bury | give_back | world_failed

One call each, no policy: what to do with a failure is in settle.py, the loop is in worker.py. A lease
token is 64 random bits, new for each claim; a call with one that is no longer held raises LeaseLost and changes
nothing. Durations are timedelta, times aware UTC. Ordinals count the records of a change from 1.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import asyncpg

from anton.db import Conn, Database

_random = random.SystemRandom()


@dataclass(slots=True, eq=False)
class Job:
    """A leased job: records lo..hi of one change, for one handler.

    ids, keys: their keys in that order (one of the two; both None for table events and tables without a key).
    cols: columns of the images, None when there are none. degraded: why images or filter are missing.
    attempt: runs that failed; crashes: runs alone that killed their process. probe: its handler is failing.
    left: ordinals that are not settled yet. waited: milliseconds since the change. order: of an ordered handler, the
    value of per's column by ordinal, once it was read.
    """

    token: int
    handler_id: int
    id: int
    change_id: int
    at: datetime
    cause: int | None
    trace: int | None
    lo: int
    hi: int
    attempt: int
    crashes: int
    depth: int
    op: str
    tenant: str | None
    origin: str | None
    ids: list[int] | None
    keys: list[Any] | None
    cols: list[str] | None
    degraded: str | None
    waited: float
    probe: bool
    left: Sequence[int] = field(default=())
    order: dict[int, Any] | None = None

    @property
    def size(self) -> int:
        """Records of the job, settled or not."""
        return self.hi - self.lo + 1

    def key(self, ordinal: int) -> Any:
        """The key of one record: an integer, a list of key columns, or None."""
        if self.ids is not None:
            return self.ids[ordinal - self.lo]
        return self.keys[ordinal - self.lo] if self.keys is not None else None


def array(numbers: Iterable[int]) -> str:
    """An array as text: asyncpg takes five times as long to encode a list of integers."""
    return "{" + ",".join(map(str, numbers)) + "}"


def token() -> int:
    """64 random bits as a signed integer."""
    return _random.getrandbits(64) - 2**63


def _jobs(lease: int, rows: list[asyncpg.Record]) -> list[Job]:
    jobs = []
    for row in rows:
        (handler_id, id, change_id, at, cause, trace, lo, hi, attempt, crashes, depth, op, tenant, origin, settled,
         ids, keys, cols, degraded, _, waited, probe) = row
        left: Sequence[int] = range(lo, hi + 1)
        if settled:
            done = set(settled)
            left = [ordinal for ordinal in left if ordinal not in done]
        jobs.append(
            Job(
                lease,
                handler_id,
                id,
                change_id,
                at,
                cause,
                trace,
                lo,
                hi,
                attempt,
                crashes,
                depth,
                op.decode(),
                tenant,
                origin,
                ids,
                keys,
                cols,
                degraded,
                waited,
                probe,
                left,
            )
        )
    return jobs


async def claim(db: Database, conn: Conn, worker: int, lease: timedelta, handlers: list[int], jobs: list[int],
                records: list[int], after: list[int], mine: int | None = None,
                turns: list[str | None] | None = None, known: list[int] | None = None) -> list[Job]:
    """Leases up to jobs[i] jobs of about records[i] records, id > after[i], of each handlers[i], by (handler, id).

    In a transaction of its own: its commit does not wait for the disk. mine: the token, of whoever has to know it
    before the answer; None: any. turns[i]: the tenant that had the last turn; of several each gets a share. known:
    tokens of what the worker holds of handlers that are ordered; None: none of these is.
    """
    mine = mine or token()
    name = "claim" if known is None else "claim_ordered"
    args = [worker, mine, handlers, jobs, records, after, lease, True, turns, *([] if known is None else [known])]
    return _jobs(mine, await db.call(conn, name, *args))


async def reclaim(
    db: Database, conn: Conn, worker: int, lease: timedelta, handlers: list[int], jobs: int = 1
) -> list[Job]:
    """Leases suspects: jobs whose worker died with them. Run each alone."""
    mine = token()
    return _jobs(mine, await db.call(conn, "reclaim", worker, mine, handlers, lease, jobs))


async def reclaim_together(
    db: Database, conn: Conn, worker: int, lease: timedelta, handlers: list[int], beside: bool = False
) -> list[Job]:
    """Leases several suspects that have not been run as such yet; else one that is to run alone.

    beside: only what may run beside other suspects; none else.
    """
    mine = token()
    return _jobs(mine, await db.call(conn, "reclaim_together", worker, mine, handlers, lease, beside))


async def thaw(db: Database, conn: Conn, lease: timedelta) -> None:
    """Ends the sessions of workers that froze while they sent what an ack of theirs writes."""
    await db.call(conn, "thaw", lease)


async def heartbeat(db: Database, conn: Conn, worker: int, tokens: list[int], lease: timedelta,
                    without: Sequence[int] = ()) -> set[int]:
    """Makes the leases last `lease` from now, but those of the jobs `without`; the tokens that still hold any."""
    return {row[0] for row in await db.call(conn, "heartbeat", worker, tokens, lease, without)}


async def ack(db: Database, conn: Conn, lease: int, ids: list[int], worker: int, ms: float, gone: int) -> int:
    """Settles whole jobs of one handler; the receipt's id. What the transaction writes next is caused by it."""
    return int(await db.call_value(conn, "ack", lease, ids, worker, ms, gone))


async def ack_part(db: Database, conn: Conn, lease: int, id: int, ordinals: Sequence[int], worker: int, ms: float,
                   gone: int) -> int:
    """Settles some records of one job; the receipt's id."""
    return int(await db.call_value(conn, "ack_part", lease, id, ordinals, worker, ms, gone))


async def put_output(db: Database, conn: Conn, receipt: int, table: int, ids: list[int] | None, keys: list[Any] | None,
                     owners: list[int]) -> None:
    """Notes what was written: keys, and the position (from 1; 0: the whole batch) of the input each belongs to."""
    await db.call(conn, "put_output_text", receipt, table, None if ids is None else array(ids), keys, array(owners))


async def retry(db: Database, conn: Conn, lease: int, id: int, ordinals: Sequence[int], after: timedelta, error: str,
                burn: bool) -> None:
    """Queues records of one job anew, each alone, after a wait. burn: this run counts as an attempt."""
    await db.call(conn, "retry", lease, id, ordinals, after, error, burn)


async def bury(db: Database, conn: Conn, lease: int, id: int, ordinal: int, reason: str, error: str,
               traceback: str | None) -> int:
    """Makes one record a dead letter. reason: failed | discarded | crashed | depth."""
    return int(await db.call_value(conn, "bury", lease, id, ordinal, reason, error, traceback))


async def orders(db: Database, conn: Conn) -> dict[int, str | None]:
    """The handlers with an order, and the column whose values it is for, None: the primary key."""
    return {row["handler_id"]: row["per"] for row in await db.call(conn, "orders")}


async def put_off(db: Database, conn: Conn, lease: int, id: int, ordinals: Sequence[int], keys: list[str]) -> None:
    """Settles records of one job here; they wait for what is before them of their keys."""
    await db.call(conn, "put_off", lease, id, ordinals, keys)


async def retry_in_turn(db: Database, conn: Conn, lease: int, id: int, ordinals: Sequence[int], keys: list[str],
                        after: timedelta, error: str, burn: bool) -> None:
    """As retry(), and their keys wait for them."""
    await db.call(conn, "retry_in_turn", lease, id, ordinals, keys, after, error, burn)


async def bury_in_turn(db: Database, conn: Conn, lease: int, id: int, ordinal: int, key: str, reason: str, error: str,
                       traceback: str | None) -> None:
    """As bury(); its key waits for it, or the next of its key goes on. What crashed before its turn waits for that."""
    await db.call(conn, "bury_in_turn", lease, id, ordinal, key, reason, error, traceback)


async def end_turn(db: Database, conn: Conn, handler: int, job: int) -> None:
    """The first record of a key is done: the next one is."""
    await db.call(conn, "end_turn", handler, job)


async def waiting_keys(db: Database, conn: Conn, handler: int, keys: list[str] | None = None) -> list[str]:
    """Of these keys, or of all, those some record of which waits."""
    return await db.call_value(conn, "waiting_keys", handler, keys) or []


async def heads(db: Database, conn: Conn, handler: int, jobs: list[int]) -> list[int]:
    """Which of these jobs are the first of a key of which others wait."""
    return await db.call_value(conn, "heads", handler, jobs) or []


async def give_back(db: Database, conn: Conn, lease: int, ids: list[int]) -> None:
    """The jobs are ready again at once; nothing counts against them."""
    await db.call(conn, "give_back", lease, ids)


async def world_failed(db: Database, conn: Conn, lease: int, ids: list[int], error: str,
                       after: timedelta | None = None) -> datetime:
    """Gives the jobs back and makes their handler wait, at least `after`; when one of them may probe."""
    when: datetime = await db.call_value(conn, "world_failed", lease, ids, error, after)
    return when


async def split(db: Database, conn: Conn, job: Job, parts: int) -> list[Job]:
    """Cuts what is left of a leased job into leases of their own, under the same token."""
    ids = [row["id"] for row in await db.call(conn, "split", job.token, job.id, parts)]
    return _jobs(job.token, await db.call(conn, "leased", job.token, ids))


async def parts_of(db: Database, conn: Conn, job: Job) -> list[Job]:
    """What a job was split into and is still held."""
    return [part for part in _jobs(job.token, await db.call(conn, "leased", job.token))
            if (part.handler_id, part.change_id) == (job.handler_id, job.change_id) and job.lo <= part.lo <= job.hi]


async def held(db: Database, conn: Conn, lease: int, ids: list[int]) -> dict[int, Sequence[int]]:
    """The jobs among these that are still held under this token, with what is not settled of them."""
    return {job.id: job.left for job in _jobs(lease, await db.call(conn, "leased", lease, ids))}


async def split_crashed(db: Database, conn: Conn, job: Job) -> int:
    """Cuts a suspect that killed its process into parts that are suspects; how many."""
    return int(await db.call_value(conn, "split_crashed", job.token, job.id))


async def permit(db: Database, conn: Conn, worker: int, handler: int, wanted: int, lease: timedelta,
                 more: bool = False, suspects: bool = False) -> int:
    """Takes permits of a handler with a limit, or gives back what is beyond `wanted`; how many this worker holds.

    more: beyond its share, too. suspects: for jobs of dead workers, to which others leave one.
    """
    return int(await db.call_value(conn, "permit", worker, handler, wanted, lease, more, suspects))


async def keep_permits(db: Database, conn: Conn, worker: int, lease: timedelta) -> dict[int, int]:
    """Makes the worker's permits last `lease` from now; how many it still holds of each handler."""
    return {row[0]: row[1] for row in await db.call(conn, "keep_permits", worker, lease)}


async def take_rate(db: Database, conn: Conn, worker: int, handler: int, wanted: int, slots: list[int],
                    unused: list[int], use: float, late: timedelta) -> asyncpg.Record | None:
    """Takes starts of a handler with a rate, and gives back what was not used of some slots; None: it has no rate.

    use: the part of what it took lately that it used. late: how long the answer takes.
    """
    return next(iter(await db.call(conn, "take_rate", worker, handler, wanted, slots, unused, use, late)), None)


async def key_starts(db: Database, conn: Conn, handler: int, keys: list[str]) -> dict[str, tuple[list[int], list[int]]]:
    """What was given of the rates of keys: ends of slots, in microseconds, and starts in each."""
    return {row["key"]: (row["ends"], row["counts"]) for row in await db.call(conn, "key_starts", handler, keys)}


async def note_starts(db: Database, conn: Conn, worker: int, handler: int,
                      rows: Mapping[str, tuple[list[int], list[int]]]) -> int | None:
    """Notes all that is given of the rates of keys; the time, in microseconds. None: the worker does not hold it."""
    ends, counts = ([f"{{{','.join(map(str, row[n]))}}}" for row in rows.values()] for n in (0, 1))
    at: int | None = await db.call_value(conn, "note_starts", worker, handler, [*rows], ends, counts)
    return at


async def defer(db: Database, conn: Conn, lease: int, job: int, ordinals: list[int], afters: list[timedelta],
                rated: bool) -> None:
    """Settles records that were not begun, and queues them anew, each after its wait. rated: for its key's rate."""
    await db.call(conn, "defer", lease, job, ordinals, afters, rated)


@dataclass(slots=True)
class Look:
    """What poll saw. ready: handlers with jobs; suspects: leases that ran out; wake_at: when there will be something.

    at: the database's time.
    """

    ready: list[int]
    suspects: int
    wake_at: datetime | None
    at: datetime


async def poll(db: Database, conn: Conn, worker: int, handlers: list[int], lease: timedelta) -> Look:
    """Readies delayed jobs that are due, and looks what there is to do; lease: what reclaim() would be asked with."""
    row = (await db.call(conn, "poll", worker, handlers, lease))[0]
    return Look(row["ready"] or [], row["suspects"], row["wake_at"], row["at"])


async def ready(db: Database, conn: Conn, handlers: list[int]) -> list[int]:
    """Which of these handlers have jobs: of poll() only this, for a worker that is busy and looks often."""
    return await db.call_value(conn, "ready", handlers) or []


async def passes(db: Database, conn: Conn, handler: int, job: Job) -> set[int]:
    """Ordinals of a degraded job whose records pass the handler's filter as they are now, or may: deleted ones."""
    found = await db.call_value(conn, "passes", handler, job.ids, job.keys, job.op.encode())
    return {job.lo + position - 1 for position in found}


async def images_sql(db: Database, conn: Conn, table: int, cols: list[str]) -> str:
    """The SELECT of images by ($1 change ids, $2 los, $3 his)."""
    return str(await db.call_value(conn, "images_sql", table, cols))


async def run_sql(db: Database, conn: Conn, lease: int, ids: list[int], worker: int) -> int | None:
    """Runs a SQL handler over whole jobs and settles them; the receipt's id, None when they have to wait."""
    receipt: int | None = await db.call_value(conn, "run_sql", lease, ids, worker)
    return receipt


async def chain(db: Database, conn: Conn, receipt: int) -> str:
    """The handlers and tables that led to what a receipt wrote, oldest first."""
    return str(await db.call_value(conn, "chain", receipt) or "")


async def register_worker(db: Database, conn: Conn, app: str, host: str, pid: int, version: str) -> int:
    """Makes this process known; its worker id."""
    return int(await db.call_value(conn, "register_worker", app, host, pid, version))


async def stop_worker(db: Database, conn: Conn, worker: int) -> None:
    """This worker has ended well."""
    await db.call(conn, "stop_worker", worker)


async def worker_died(db: Database, conn: Conn, worker: int) -> int:
    """Ends the leases of a worker whose process is known to be dead; how many."""
    return int(await db.call_value(conn, "worker_died", worker))
