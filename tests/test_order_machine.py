"""Order, whatever happens: workers of a handler with ordered, in any order, against Lines in chaos/model.py.

Each worker is an anton.order.Order and the SQL functions that a worker calls; what it has in memory dies with it. Two
writers, people, and a clock that the test moves. A record that a lease is held for begins only as the first of its key
(I11), and what waits in the database is, of each key, what the model has, in its order (I1). In the end all is done
(I9): at first all whose key is not closed, then, when what waited is due and the dead are replayed, the rest.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule, run_state_machine_as_test
from machine import AHEAD, RARER, SETTINGS, WORKERS, WRITERS, Blocked, Sessions, finding, finds, opened
from servers import Server

from anton.order import Order
from chaos.bugs import MORE, SUSPECT, Bug, planted
from chaos.model import LEASE, Lines, Record, Refused

KEYS = range(1, 5)
LONGER = 2 * LEASE  # how long a permit lasts in the database
LATE = 100_000  # seconds: later than the last lease and permit has run out
ATTEMPTS = 3  # crashes of a record that runs alone
NTH, RARELY = st.integers(0, 5), st.sampled_from([False, False, False, False, True])
FATES = st.sampled_from(["good", "good", "good", "failed", "dead", "away"])
ORDER = "sql/27_order.sql"
WAITING = """
  select 'job', id, change_id, o, null, null::int from anton.job cross join generate_series(lo, hi) o
   where handler_id = %(h)s and o <> all (coalesce(settled, '{}'))
  union all select 'delayed', id, change_id, lo, null, null from anton.delayed where handler_id = %(h)s
  union all select 'lease', id, change_id, o, null, null from anton.lease cross join generate_series(lo, hi) o
   where handler_id = %(h)s and o <> all (coalesce(settled, '{}'))
  union all (select 'turn', id, change_id, ordinal, state, (key::jsonb ->> 0)::int from anton.turn order by n)"""


class Batch:
    """What a claim brought: what Order asks of an Each. at: job and record of each item. fates: of what has ended."""

    def __init__(self, worker: Worker, token: int, rows: list[Any], keys: dict[Record, int]) -> None:
        self.lane = worker.lane
        self.token = token
        self.at = [
            (id, (change, o)) for id, change, lo, hi, settled in rows for o in range(lo, hi + 1) if o not in settled
        ]
        self.order: list[Hashable] = [keys[record] for _, record in self.at]
        self.fates: dict[int, str] = {}
        self.done: set[int] = set()
        self.world: str | None = None
        self.ended = self.awaited = False
        self.ran: set[int] = set()
        self.off: dict[Hashable, list[int]] = {}

    def tell(self) -> None:
        """It is looked at when the machine likes."""

    def job(self, item: int) -> int:
        """The id of an item's job."""
        return self.at[item][0]

    @property
    def over(self) -> bool:
        """All of it is settled."""
        return len(self.done) == len(self.at)


@dataclass(eq=False)
class Worker:
    """A process: what it has in memory. until: it believes to hold the handler. closed: told by what it settles now."""

    id: int
    order: Order
    lane: Any = field(default_factory=lambda: SimpleNamespace(items=deque(), down=None))
    batches: list[Batch] = field(default_factory=list)
    running: list[tuple[Batch, int]] = field(default_factory=list)
    until: float = float("-inf")


def can_claim(worker: Worker) -> bool:
    """It has not stopped."""
    return worker.lane.down is None


def can_begin(worker: Worker) -> bool:
    """It has something to begin."""
    return bool(worker.lane.items)


def can_reclaim(worker: Worker) -> bool:
    """What it reclaims would run alone."""
    return worker.lane.down is None and not worker.batches


def can_settle(worker: Worker) -> bool:
    """Something has ended, or is to be put off."""
    return any(batch.fates or batch.off for batch in worker.batches)


def is_down(worker: Worker) -> bool:
    """It has stopped."""
    return worker.lane.down is not None


def pick(some: list[Any], nth: int) -> Any:
    """One of these."""
    return some[nth % len(some)]


@dataclass
class Flush:
    """A transaction that settles items of a batch, and is open."""

    batch: Batch
    ends: dict[int, tuple[str, float]]  # item: how, and until when it waits
    closed: tuple[set[str], list[str]] | None = None


class InOrder(Sessions):
    """Workers, writers and people of a handler with an order."""

    made: Any = Order  # with a bug, where one is planted

    def __init__(self) -> None:
        super().__init__()
        self.random = random.Random(0)
        self.now = 0.0
        self.last = 0
        self.model = Lines()
        self.workers = {n: self.born() for n in WORKERS}
        self.flushes: dict[int, Flush] = {}
        self.open: dict[int, set[int]] = {}  # writer: keys it has changed
        self.known: set[int] = set()  # changes
        self.key_of: dict[int, int] = {}  # of each row
        self.next_id = 1
        self.sql(
            "delete from anton.job; delete from anton.lease; delete from anton.delayed; delete from anton.dead; "
            "delete from anton.turn; delete from anton.receipt; truncate moves; "
            "update anton.permit set worker_id = null, lease_until = '-infinity'; "
            "update anton.handler set paused = false, failing_since = null, probe_at = null, failures = 0; "
            f"update test_clock set ahead = interval '{AHEAD} s'"
        )

    def born(self) -> Worker:
        """A new process."""
        self.last += 1
        return Worker(self.last, self.made(None))

    @initialize(block=st.booleans(), sizes=st.lists(st.integers(1, 3), min_size=2, max_size=4))
    def begin(self, block: bool, sizes: list[int]) -> None:
        self.blocks(block)
        for n in sizes:
            self.changes(0, n, True)
        self.claim(0, 3, 9)

    def blocks(self, block: bool) -> None:
        """What a dead one does to its key."""
        self.model.block = block
        self.sql("update anton.handler set on_dead = %s where id = %s", "block" if block else "skip", self.handler)

    def teardown(self) -> None:
        """All workers are gone; one that comes then does all that is not closed, and in its time the rest."""
        if sys.exc_info()[0] is not None:
            return
        for n in list(self.flushes):
            self.end_flush(n, "roll back")
        for writer in list(self.open):
            self.ends_write(writer, True)
        self.sql("select anton.resume('inorder')")
        for n in WORKERS:
            self.die(n, False)
        self.move(12_000)
        self.works_all()
        wait = [record for record in self.model.left() if self.model.until.get(self.model.keys[record], 0) <= self.now]
        assert not wait, "I9: records wait though nothing of their key does"
        for record in list(self.model.dead):
            self.decide(record, True)
        self.move(LATE)
        self.works_all()
        assert not self.model.left() and not self.sql("select count(*) from anton.turn"), "I9: not all is ever done"

    def works_all(self) -> None:
        """A worker by itself, until it finds nothing."""
        worker = self.workers[0]
        while self.reclaim(0) or self.claim(0, 100, 1000):
            for _ in range(100):
                while self.start(0):
                    self.end(0, 0, "good")
                for batch in list(worker.batches):
                    self.settle(0, batch, 1000, False)
                if not worker.batches:
                    break
            assert not worker.batches, "I9: a worker is stuck"
            self.waits_as_in_the_model()

    # Writers

    def changes(self, writer: int, n: int, ends: bool) -> None:
        """n rows; those of one key by one writer at a time."""
        other = set[int]().union(*(keys for of, keys in self.open.items() if of != writer))
        keys = [key for key in KEYS if key not in other]
        self.insert(writer, self.random.choices(keys, k=n) if keys else [], ends)

    def insert(self, writer: int, keys: list[int], ends: bool = True) -> None:
        """Rows of these keys, in a statement."""
        rows = {self.next_id + at: key for at, key in enumerate(keys)}
        self.next_id += len(rows)
        self.key_of |= rows
        conn = self.conns[WRITERS[writer]]
        if writer not in self.open:
            conn.execute("begin")
            self.open[writer] = set()
        if rows:
            query = "insert into moves select * from unnest(%s::bigint[], %s::int[])"
            conn.execute(query, ([*rows], [*rows.values()]))
        self.open[writer] |= {*rows.values()}
        if ends:
            self.ends_write(writer, True)

    @rule(writer=st.sampled_from([0, 1]), n=st.integers(1, 3), ends=st.sampled_from([True, True, False]))
    def writes(self, writer: int, n: int, ends: bool) -> None:
        if sum(map(len, self.model.lines.values())) < 20:
            self.changes(writer, n, ends)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), commit=st.sampled_from([True, True, False]))
    def commits(self, data: Any, commit: bool) -> None:
        self.ends_write(data.draw(st.sampled_from(sorted(self.open))), commit)

    def ends_write(self, writer: int, commit: bool) -> None:
        """What is committed is behind all there is."""
        del self.open[writer]
        self.conns[WRITERS[writer]].execute("commit" if commit else "rollback")
        query = "select change_id, ids from anton.job where handler_id = %s order by id"
        for change, ids in self.look.execute(query, (self.handler,)).fetchall():
            if change not in self.known:
                assert commit, "I2: a job without its commit"
                self.known.add(change)
                for o, id in enumerate(ids, 1):
                    self.model.add(self.key_of[id], (change, o))

    # Workers

    def some(self, meets: Callable[[Worker], Any]) -> list[int]:
        """Workers of that kind which are not in a transaction."""
        return [n for n, worker in self.workers.items() if n not in self.flushes and meets(worker)]

    def holds(self, worker: Worker) -> bool:
        """What it believes."""
        return worker.until > self.now

    def asks_permit(self, n: int, suspects: bool = False) -> bool:
        """Whether it has the handler."""
        worker = self.workers[n]
        if not self.holds(worker):
            worker.order.tenure = -1
        ((held,),) = self.ask(
            n, "select anton.permit(%s, %s, 1, make_interval(secs => %s), true, %s)",
            worker.id, self.handler, LONGER, suspects,
        )
        worker.until = self.now + LEASE if held else float("-inf")
        return bool(held)

    @precondition(lambda self: self.some(can_claim))
    @rule(nth=NTH, jobs=st.integers(1, 2), lost=st.booleans())
    def claims(self, nth: int, jobs: int, lost: bool) -> None:
        self.claim(self.first(can_claim, nth), jobs, 9, lost)

    def first(self, meets: Callable[[Worker], Any], nth: int) -> int:
        """One of these: mostly who holds the handler."""
        some = self.some(meets)
        return pick([n for n in some if self.holds(self.workers[n])] * (nth > 0) or some, nth)

    def claim(self, n: int, jobs: int, records: int, lost: bool = False) -> bool:
        """Whether it brought anything. lost: the answer."""
        worker = self.workers[n]
        self.ask(n, "select anton.poll(%s, array[%s]::int[], %s)", worker.id, self.handler, f"{LEASE} s")
        if not self.asks_permit(n):
            return False
        token = self.random.getrandbits(63)
        rows = self.ask(
            n, "select id, change_id, lo, hi, coalesce(settled, '{}') from anton.claim_ordered(%s, %s, "
            "array[%s]::int[], array[%s]::int[], array[%s]::int[], array[0]::bigint[], %s, false, null, %s::bigint[])",
            worker.id, token, self.handler, jobs, records, f"{LEASE} s", [batch.token for batch in worker.batches],
        )
        if rows and not lost:
            self.sends(n, Batch(worker, token, rows, self.model.keys))
        return bool(rows)

    def sends(self, n: int, batch: Batch) -> None:
        """Its records are where they are begun, after what is to be known of their keys."""
        worker, order = self.workers[n], self.workers[n].order
        worker.batches.append(batch)
        if order.tenure < 0:
            order.know((), self.ask(n, "select anton.waiting_keys(%s)", self.handler)[0][0])
            order.tenure = 0
        if order.closed:
            ids = [id for id, _ in batch.at]
            order.heads |= set(self.ask(n, "select anton.heads(%s, %s::bigint[])", self.handler, ids)[0][0])
        order.send(batch)

    @precondition(lambda self: self.some(can_reclaim))
    @rule(nth=NTH, later=RARELY)
    def reclaims(self, nth: int, later: bool) -> None:
        if later:
            self.move(3700)
        self.reclaim(pick(self.some(can_reclaim), nth))

    def reclaim(self, n: int) -> bool:
        """One job of the dead, run alone. Whether there was any."""
        worker = self.workers[n]
        token = self.random.getrandbits(63)
        rows = self.ask(
            n, "select id, change_id, lo, hi, coalesce(settled, '{}'), crashes from anton.reclaim_together(%s, %s, "
            "array[%s]::int[], %s)",
            worker.id, token, self.handler, f"{LEASE} s",
        )
        assert len(rows) < 2, "I11: several jobs of the dead at a time"
        if not rows:
            return False
        batch = Batch(worker, token, [row[:5] for row in rows], self.model.keys)
        id, crashes = rows[0][0], rows[0][5]
        if crashes and len(batch.at) > 1:
            self.ask(n, "select anton.split_crashed(%s, %s)", token, id)
        elif crashes >= ATTEMPTS:
            ((_, record),) = batch.at
            key = worker.order.text(batch.order[0])
            with suppress(Blocked):  # it stays a suspect, when its lease has run out
                query = "select anton.bury_in_turn(%s, %s, %s, %s, 'crashed', 'died', null)"
                ((dead,),) = self.ask(n, query, token, id, record[1], key)
                first = self.model.lines[self.model.keys[record]][0] == record
                opens = self.model.keys[record] not in self.model.until
                assert first or opens if dead else not first, f"I11: what waits is in another order: {record} {dead}"
                if dead:
                    self.model.bury(record)
                worker.order.know((), [key])
        elif not self.asks_permit(n, suspects=True):
            self.ask(n, "select anton.give_back(%s, array[%s]::bigint[])", token, id)
        else:
            worker.order.tenure = -1
            self.sends(n, batch)
        return True

    @precondition(lambda self: any(can_begin(worker) for worker in self.workers.values()))
    @rule(nth=NTH, times=st.integers(1, 3))
    def begins(self, nth: int, times: int) -> None:
        n = pick([n for n, worker in self.workers.items() if can_begin(worker)], nth)
        for _ in range(times):
            self.start(n)

    def start(self, n: int) -> bool:
        """The next record of those that may run. Whether there is one."""
        worker = self.workers[n]
        while worker.lane.items and self.holds(worker):
            batch, item = worker.lane.items.popleft()
            if batch.world is not None or worker.lane.down is not None or not worker.order.may(batch):
                worker.order.skip(batch, item)
                self.stop(worker, batch)
                continue
            id, record = batch.at[item]
            if self.held(batch, [id]):
                assert self.model.may(record, self.now), f"I11: {record} begins before its turn"
                for other in self.workers.values():
                    for one, at in other.running:
                        assert one.at[at][1] != record or not self.held(one, [id]), "I11: it runs already"
            worker.running.append((batch, item))
            return True
        return False

    def held(self, batch: Batch, ids: list[int]) -> bool:
        """Whether these jobs are its own, in the database."""
        return self.sql(
            "select count(*) from anton.lease where token = %s and id = any(%s)", batch.token, ids) == len(ids)

    def stop(self, worker: Worker, batch: Batch, why: str = "stopped") -> None:
        """It begins nothing more until all that it has is given back."""
        batch.world = batch.world or why
        worker.order.stopped = True
        worker.lane.down = batch.world

    @precondition(lambda self: any(worker.running for worker in self.workers.values()))
    @rule(nth=NTH, which=NTH, fate=FATES)
    def ends(self, nth: int, which: int, fate: str) -> None:
        self.end(pick([n for n, worker in self.workers.items() if worker.running], nth), which, fate)

    @precondition(lambda self: self.some(can_claim))
    @rule(nth=NTH, fates=st.lists(FATES, min_size=1, max_size=4), settled=st.sampled_from(["no", "yes", "yes", "open"]))
    def works(self, nth: int, fates: list[str], settled: str) -> None:
        """Claims, and makes calls."""
        worker = self.workers[n := self.first(can_claim, nth)]
        if len(self.model.left()) < 4:
            self.changes(0, 3, True)
        if not worker.lane.items and not (worker.batches or self.reclaim(n)):
            self.claim(n, 3, 9)
        for fate in fates:
            if worker.lane.down is None and self.start(n):
                self.end(n, -1, fate)
        for batch in self.ended(n) if settled != "no" else ():
            if n not in self.flushes and batch in worker.batches:
                self.settle(n, batch, 1000, settled == "open")

    def end(self, n: int, which: int, fate: str) -> None:
        """A call ends."""
        worker = self.workers[n]
        batch, item = worker.running.pop(which % len(worker.running))
        if fate == "away":
            self.stop(worker, batch, fate)
        else:
            batch.fates[item] = fate
        worker.order.ended(batch, item)

    # Settling

    @precondition(lambda self: self.some(can_settle))
    @rule(nth=NTH, which=NTH, after=st.sampled_from([1000, LATE]), stays_open=st.booleans())
    def settles(self, nth: int, which: int, after: int, stays_open: bool) -> None:
        n = pick(self.some(can_settle), nth)
        self.settle(n, pick(self.ended(n), which), after, stays_open)

    def ended(self, n: int) -> list[Batch]:
        """Batches of which something has ended, or is to be put off."""
        return [batch for batch in self.workers[n].batches if batch.fates or batch.off]

    def settle(self, n: int, batch: Batch, after: int, stays_open: bool) -> None:
        """What has ended of a batch, and what is to be put off."""
        worker = self.workers[n]
        off = worker.order.put_off(batch)
        batch.fates |= dict.fromkeys(off, "off")
        ends = {item: (fate, self.now + after) for item, fate in sorted(batch.fates.items())}
        if not ends:
            return
        flush = Flush(batch, ends)
        held = self.held(batch, sorted({batch.job(item) for item in ends}))
        try:
            self.ask(n, "begin")
            self.flush(n, flush, after)
            assert held, "I4: a stale token changed something"
        except (Refused, Blocked) as error:
            self.ask(n, "rollback")
            batch.fates = {item: how for item, (how, _) in ends.items()}
            if isinstance(error, Refused):
                assert not held, "I4: what is held is refused"
                self.loses(n, batch)
            return
        batch.fates = {}
        self.flushes[n] = flush
        if not stays_open:
            self.end_flush(n, "commit")

    def flush(self, n: int, flush: Flush, after: int) -> None:
        """As anton/settle.py does it."""
        worker, batch, order = self.workers[n], flush.batch, self.workers[n].order
        by: dict[tuple[str, int], list[int]] = {}
        for item, (how, _) in flush.ends.items():
            by.setdefault((how, batch.job(item)), []).append(item)
        for (how, id), items in sorted(by.items(), key=lambda one: one[0][0] != "good"):
            ordinals = [batch.at[item][1][1] for item in items]
            keys = [order.text(batch.order[item]) for item in items]
            left = [at for at in range(len(batch.at)) if batch.job(at) == id and at not in batch.done]
            if how == "good" and sorted(items) == left:
                self.ask_on(n, "select anton.ack(%s, array[%s]::bigint[], %s, 1)", batch.token, id, worker.id)
            elif how == "good":
                self.ask_on(n, "select anton.ack_part(%s, %s, %s::int[], %s, 1)", batch.token, id, ordinals, worker.id)
            elif how == "failed":
                self.ask_on(
                    n, "select anton.retry_in_turn(%s, %s, %s::int[], %s::text[], %s, 'no', true)",
                    batch.token, id, ordinals, keys, f"{after} s",
                )
            elif how == "off":
                self.ask_on(n, "select anton.put_off(%s, %s, %s::int[], %s::text[])", batch.token, id, ordinals, keys)
            else:
                for ordinal, key in zip(ordinals, keys, strict=True):
                    query = "select anton.bury_in_turn(%s, %s, %s, %s, 'discarded', 'no', null)"
                    self.ask_on(n, query, batch.token, id, ordinal, key)
        if order.closed or any(how != "good" for how, _ in flush.ends.values()):
            failed = {batch.job(item) for item, (how, _) in flush.ends.items() if how != "good"}
            for id in sorted({batch.job(item) for item in flush.ends} & order.heads - failed):
                self.ask(n, "select anton.end_turn(%s, %s)", self.handler, id)
            texts = {order.text(batch.order[item]) for item in flush.ends}
            flush.closed = texts, self.ask(n, "select anton.waiting_keys(%s, %s::text[])", self.handler, [*texts])[0][0]

    @precondition(lambda self: self.flushes)
    @rule(data=st.data(), how=st.sampled_from(["commit", "commit", "roll back", "terminate", "lose the reply"]))
    def ends_flush(self, data: Any, how: str) -> None:
        self.end_flush(data.draw(st.sampled_from(sorted(self.flushes))), how)

    def end_flush(self, n: int, how: str) -> None:
        """A worker that is not told of its commit gives its batch up."""
        worker, flush = self.workers[n], self.end_tx(n, how)
        batch = flush.batch
        if how != "commit":
            self.loses(n, batch)
            return
        batch.done |= set(flush.ends)
        if flush.closed is not None:
            worker.order.know(*flush.closed)
        worker.order.settled(batch, list(flush.ends))
        if batch.over:
            worker.batches.remove(batch)
            batch.ended = True
            worker.order.leave(batch)

    def end_tx(self, n: int, how: str) -> Flush:
        """What is committed is so."""
        flush, conn = self.flushes.pop(n), self.conns[n]
        batch, committed = flush.batch, how == "commit"
        if how in ("commit", "roll back"):
            self.ask(n, how.replace(" ", ""))
        else:
            if how == "terminate":
                self.sql("select pg_terminate_backend(%s)", conn.info.backend_pid)
            else:
                conn.pgconn.send_query(b"commit")
                conn.pgconn.flush()
            self.replace(n)
        if how == "lose the reply":  # then nobody knows but the database
            id, (_, o) = batch.at[next(iter(flush.ends))]
            query = "select count(*) from anton.lease where token = %s and id = %s and (%s = any (settled)) is not true"
            committed = not self.sql(query, batch.token, id, o)
        for item, (fate, until) in flush.ends.items() if committed else ():
            record = batch.at[item][1]
            if fate == "good":
                self.model.over(record)
            elif fate == "failed":
                self.model.retry(record, until)
            elif fate == "dead":
                self.model.bury(record)
        return flush

    # What a worker loses or leaves

    def loses(self, n: int, batch: Batch) -> None:
        """Its run ends, whatever of it is settled; what was claimed beside it goes back, too."""
        self.stop(self.workers[n], batch)
        self.leave(n, batch)

    def leave(self, n: int, batch: Batch) -> None:
        """Its run has ended. What is not settled is given back, if it is its own."""
        worker = self.workers[n]
        mine = [entry for entry in worker.lane.items if entry[0] is batch]
        for entry in mine:
            worker.lane.items.remove(entry)
        batch.ended = True
        worker.order.drop(batch)
        for _, item in mine:
            worker.order.skip(batch, item)
        worker.order.leave(batch)
        for entry in [entry for entry in worker.running if entry[0] is batch]:
            worker.running.remove(entry)
            worker.order.ended(*entry)
        worker.batches.remove(batch)
        query = "select array_agg(id) from anton.lease where token = %s and id = any(%s)"
        left = self.sql(query, batch.token, [id for id, _ in batch.at])
        with suppress(Blocked):  # its leases run out
            if left and batch.world == "away":
                self.ask(n, "select anton.world_failed(%s, %s::bigint[], 'away', '2000 s')", batch.token, left)
            elif left:
                self.ask(n, "select anton.give_back(%s, %s::bigint[])", batch.token, left)

    @precondition(lambda self: self.some(is_down))
    @rule(nth=NTH, which=NTH)
    def leaves(self, nth: int, which: int) -> None:
        """One batch of a worker that has stopped. With the last one it goes on."""
        worker = self.workers[n := pick(self.some(is_down), nth)]
        if worker.batches:
            self.leave(n, pick(worker.batches, which))
        if not worker.batches:
            worker.lane.down, worker.order.stopped = None, False

    @precondition(lambda self: any(worker.batches for worker in self.workers.values()))
    @rule(nth=NTH, unseen=RARELY, how=st.sampled_from(["terminate", "lose the reply"]), really=RARELY)
    def dies(self, nth: int, unseen: bool, how: str, really: bool) -> None:
        if really:
            self.die(pick([n for n, worker in self.workers.items() if worker.batches], nth), not unseen, how)

    def die(self, n: int, seen: bool, how: str = "terminate") -> None:
        """And its memory with it. how: what it was settling ends. seen: by its parent."""
        if n in self.flushes:
            self.end_tx(n, how)
        if seen:
            self.sql("select anton.worker_died(%s)", self.workers[n].id)
        self.workers[n] = self.born()

    def beat(self, n: int) -> None:
        """Its heart. What others have taken is lost."""
        worker = self.workers[n]
        query = "select * from anton.keep_permits(%s, make_interval(secs => %s))"
        kept = self.look.execute(query, (worker.id, LONGER)).fetchall()
        worker.until = self.now + LEASE if kept and self.holds(worker) else float("-inf")
        tokens = [batch.token for batch in worker.batches]
        query = "select anton.heartbeat(%s, %s::bigint[], %s)"
        held = {row[0] for row in self.look.execute(query, (worker.id, tokens, f"{LEASE} s")).fetchall()}
        for batch in [batch for batch in worker.batches if batch.token not in held]:
            self.loses(n, batch)

    # Time and people

    @rule(seconds=st.sampled_from([1000, 3700, 12_000]), beats=st.booleans())
    def moves(self, seconds: int, beats: bool) -> None:
        """beats: the hearts of all workers, meanwhile."""
        for part in (3000,) * (seconds // 3000 or 1) if beats else (seconds,):
            self.move(part)
            for n in self.some(lambda worker: worker.batches) if beats else ():
                self.beat(n)

    def move(self, seconds: int) -> None:
        """The clock."""
        self.now += seconds
        self.sql("update test_clock set ahead = ahead + make_interval(secs => %s)", seconds)

    @precondition(lambda self: not self.flushes)
    @rule(data=st.data())
    def cancels(self, data: Any) -> None:
        """What waits."""
        rows = sorted(row for row in self.waiting() if row[0] != "lease" and row[4] not in ("first", "dead"))
        if rows:
            id = data.draw(st.sampled_from(rows))[1]
            assert self.sql("select anton.cancel(%s)", id) is True
            for record in [(row[2], row[3]) for row in rows if row[1] == id]:
                self.model.over(record)

    @precondition(lambda self: self.model.dead and not self.flushes)
    @rule(data=st.data(), replay=st.booleans())
    def decides(self, data: Any, replay: bool) -> None:
        self.decide(data.draw(st.sampled_from(sorted(self.model.dead))), replay)

    def decide(self, record: Record, replay: bool) -> None:
        """A dead letter is replayed, or dropped."""
        id = self.sql("select id from anton.dead where change_id = %s and ordinal = %s", *record)
        if not replay:
            assert self.sql("select anton.drop_dead(%s)", id) is True
            self.model.drop(record)
            return
        job = self.sql("select anton.replay(%s)", id)
        change = self.sql("select change_id from anton.job where id = %s", job)
        self.known.add(change)
        self.model.replay(record, (change, 1))

    # What holds after every step

    def waiting(self) -> list[Any]:
        """Where each record is: place, id of job or dead letter, change, ordinal; of a turn its state and its key."""
        return self.look.execute(WAITING, {"h": self.handler}).fetchall()

    @invariant()
    def waits_as_in_the_model(self) -> None:
        rows = self.waiting()
        places = sorted((row[2], row[3]) for row in rows if row[4] != "first")
        assert places == sorted(self.model.left()), "I1: a record is in no place, or in two"
        jobs = {row[1]: (row[2], row[3]) for row in rows if row[0] != "turn"}
        turns: dict[int, list[tuple[str, Record]]] = {}
        for _, id, change, o, state, key in (row for row in rows if row[0] == "turn"):
            assert state != "first" or id in jobs, "I1: the first of a key has no job"
            turns.setdefault(key, []).append((state, jobs[id] if state == "first" else (change, o)))
        for key, found in turns.items():
            line, (state, first) = self.model.lines[key], found[0]
            assert first == line[0], "I11: another record is the first of its key"
            places = [line.index(record) for _, record in found]
            assert places == sorted(places), "I11: what waits is in another order"
            assert state != "waits" and {state for state, _ in found[1:]} <= {"waits"}, "I11: nobody is the first"
            assert (state == "dead") == (self.model.until.get(key) == float("inf")), "I7: another record is dead"


@pytest.fixture
def inorder(server: Server, template: str, request: pytest.FixtureRequest) -> Iterator[type[InOrder]]:
    bug = getattr(request, "param", None)
    with opened(InOrder, server, template, bug) as pg:
        pg.sql(
            "create table moves (id bigint primary key, k int not null)",
        )
        InOrder.handler = pg.listen("moves", "new", name="inorder", each_record=True, ordered=True, per="k")
        InOrder.made = order_of(bug)
        yield InOrder


def order_of(bug: Bug | None) -> Any:
    """The worker's Order, with the bug where it is in there."""
    if bug is None or all(path != "anton/order.py" for path, _, _ in bug.edits):
        return Order
    with planted(bug) as (files, _):
        spec = importlib.util.spec_from_file_location("order_with_a_bug", files["anton.order"])
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module.Order


def test_no_key_is_out_of_order_whatever_happens(inorder: type[InOrder]) -> None:
    run_state_machine_as_test(inorder, settings=SETTINGS)


EARLY = "I11: .* begins before its turn|I11: what waits is in another order"
WAITS = "I11: another record is the first|I11: nobody is the first"
RELEASED = next(bug for bug in MORE if bug.name == "order key released before the ack")


@pytest.mark.once("it asks what the machine sees, not what a server does")
@pytest.mark.parametrize("inorder", [RELEASED], indirect=True, ids=[RELEASED.name])
def test_a_bug_in_the_order_is_found(inorder: type[InOrder]) -> None:
    finds(inorder, EARLY, RARER)


def one_comes_after_a_retry(machine: InOrder) -> None:
    """Its key is closed."""
    machine.insert(0, [1])
    machine.claim(0, 1, 9)
    machine.start(0)
    machine.end(0, 0, "failed")
    machine.settle(0, machine.workers[0].batches[0], 1000, False)
    machine.insert(0, [1])
    machine.claim(0, 1, 9)
    machine.start(0)


def a_retry_is_done(machine: InOrder) -> None:
    """And the next of its key is put off."""
    one_comes_after_a_retry(machine)
    worker = machine.workers[0]
    machine.settle(0, worker.batches[0], 1000, False)
    machine.move(1000)
    machine.claim(0, 1, 9)
    machine.start(0)
    machine.end(0, 0, "good")
    machine.settle(0, worker.batches[0], 1000, False)
    machine.waits_as_in_the_model()


def suspects_come_first(machine: InOrder) -> None:
    """Who has the handler, as it works one job of the dead, claims beside the next one."""
    for _ in range(2):
        machine.insert(0, [1])
    machine.claim(0, 2, 9)
    machine.die(0, False)
    machine.insert(0, [1])
    machine.move(12_000)
    machine.reclaim(1)
    machine.start(1)
    machine.end(1, 0, "good")
    machine.settle(1, machine.workers[1].batches[0], 0, False)
    machine.claim(1, 9, 9)
    machine.start(1)


def an_answer_is_lost(machine: InOrder) -> None:
    """What it brought is leased by a worker that does not know of it, and lives."""
    machine.insert(0, [1])
    machine.claim(0, 1, 9, lost=True)
    machine.insert(0, [1])
    machine.claim(0, 1, 9)
    machine.start(0)


def one_of_two_batches_goes_back(machine: InOrder) -> None:
    """Then its worker dies, with the later one."""
    for _ in range(2):
        machine.insert(0, [1])
        machine.claim(0, 1, 9)
    worker = machine.workers[0]
    machine.stop(worker, worker.batches[0])
    machine.leave(0, worker.batches[0])
    machine.die(0, True)
    machine.reclaim(1)
    machine.start(1)


def one_crashes_behind_the_dead(machine: InOrder) -> None:
    """Whoever reclaims it dies before it is put off, again and again."""
    machine.blocks(True)
    for _ in range(2):
        machine.insert(0, [1])
        machine.claim(0, 1, 9)
        machine.start(0)
        if machine.workers[0].running:
            machine.end(0, 0, "dead")
            machine.settle(0, machine.workers[0].batches[0], 1000, False)
    machine.die(0, True)
    for _ in range(ATTEMPTS + 1):
        machine.reclaim(1)
        machine.die(1, True)
    machine.reclaim(1)
    machine.waits_as_in_the_model()


def one_crashes_alone(machine: InOrder) -> None:
    """Nothing is before it."""
    machine.blocks(True)
    machine.insert(0, [1])
    machine.claim(0, 1, 9)
    machine.die(0, True)
    for _ in range(ATTEMPTS + 1):
        machine.reclaim(1)
        machine.die(1, True)
    machine.reclaim(1)


# (what is wrong, how, the way that leads there, what the machine has to say): too far off to be found by chance soon
RARE = (
    (
        "a retry that does not close its key",
        ((ORDER, "perform put_turn(v, p_ordinals[i], p_keys[i], 'first', v_job, v_attempt);", "null;"),),
        one_comes_after_a_retry,
        EARLY,
    ),
    (
        "a key that does not go on",
        ((ORDER, "  if found then\n    perform next_turn(p_handler, v_key);", "  if false then\n    null;"),),
        a_retry_is_done,
        WAITS,
    ),
    (
        "a dead one behind the dead",
        ((ORDER, "if p_reason = 'crashed' and", "if false and"),),
        one_crashes_behind_the_dead,
        EARLY,
    ),
    (
        "what crashes is never dead",
        ((ORDER, "p_key <> '?' and exists", "true or exists"),),
        one_crashes_alone,
        EARLY,
    ),
    (
        "a claim of what is behind jobs of the dead",
        ((ORDER, " and not held_up(p_worker, w.h, now(), p_known);", ";"),),
        suspects_come_first,
        EARLY,
    ),
    (
        "a claim of what is behind one whose answer was lost",
        (("sql/23_permit.sql", " or l.token <> all (p_known)", ""),),
        an_answer_is_lost,
        EARLY,
    ),
    (
        "jobs of the dead before what they had given back",
        ((SUSPECT, "  if v_job is not null then", "  if false then"),),
        one_of_two_batches_goes_back,
        EARLY,
    ),
)


@pytest.mark.once("it asks what the machine sees, not what a server does")
@pytest.mark.parametrize(
    ("inorder", "way", "says"),
    [(Bug(name, edits, "", 0, ""), way, says) for name, edits, way, says in RARE],
    indirect=["inorder"],
    ids=lambda value: value.name if isinstance(value, Bug) else "",
)
def test_a_bug_that_chance_seldom_meets_is_found_on_its_way(
    inorder: type[InOrder], way: Callable[..., None], says: str
) -> None:
    with finding(says):
        way(inorder())


def test_on_the_ways_to_such_bugs_all_is_done_in_order(inorder: type[InOrder]) -> None:
    for _, _, way, _ in RARE:
        machine = inorder()
        way(machine)
        machine.waits_as_in_the_model()
        machine.teardown()
