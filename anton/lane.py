"""Lane: one handler as one worker works it. What is claimed and waits, what runs, how much more to claim.

    claim -> lane.waiting -> Batch (one tenant, up to `batch` records) -> a call of the handler       tenants take turns

Pure bookkeeping: no database, no clock of its own; `now` is the event loop's time in seconds.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import accumulate
from typing import Any

from anton.gate import Gate
from anton.order import Order
from anton.permits import Permits
from anton.queue import Job
from anton.rank import PRIORITY
from anton.rate import Tap
from anton.turns import Turns

BYTES = 8_000_000  # of the rows of one call, about
FEW = 16  # records that are read whatever their width
NARROW = 2_000  # bytes of a row below which nothing is counted
FAST = 0.5  # seconds: a lane whose calls are quicker claims a batch ahead
AHEAD = 4  # batches that a lane claims ahead whose calls are five times quicker than that
GATHER = 0.25  # seconds that a batch waits for claims that are under way
TOGETHER = 1000  # records that a lane with each=True reads and settles together; each has a call of its own anyway
SKIP = 256  # jobs that failed before, or that are new, that a batch of the others looks past
MOST_JOBS = 1000  # jobs of one claim
TENANTS = 32  # of which one claim takes; see jobs_in_turn()
GATED = 8  # batches at a time whose records may all wait for others of their key; or for their tenant's turn


class Batch:
    """Records that one call is made with: parts of leased jobs, in the order of their changes.

    parts: (job, ordinals). A position counts the records of all parts from 0.
    """

    __slots__ = ("_starts", "parts", "size")

    def __init__(self, parts: list[tuple[Job, Sequence[int]]]) -> None:
        self.parts = parts
        self._starts = list(accumulate((len(ordinals) for _, ordinals in parts), initial=0))
        self.size = self._starts[-1]

    @classmethod
    def of(cls, jobs: Iterable[Job]) -> Batch:
        """All that is left of these jobs."""
        return cls([(job, job.left) for job in sorted(jobs, key=lambda job: job.id)])

    def at(self, position: int) -> tuple[Job, int]:
        """The job and the ordinal at a position."""
        part = bisect_right(self._starts, position) - 1
        job, ordinals = self.parts[part]
        return job, ordinals[position - self._starts[part]]

    def __iter__(self) -> Iterator[tuple[Job, int]]:
        return ((job, ordinal) for job, ordinals in self.parts for ordinal in ordinals)

    def by_job(self, positions: Iterable[int]) -> Iterator[tuple[Job, list[int], list[int]]]:
        """The records at these positions, which are given in rising order: job, positions, ordinals of each part."""
        part, start, end = 0, 0, 0
        places, picked = list[int](), list[int]()
        for position in positions:
            if position >= end:
                if places:
                    yield self.parts[part][0], places, picked
                part = bisect_right(self._starts, position) - 1
                start, end = self._starts[part], self._starts[part + 1]
                places, picked = [], []
            places.append(position)
            picked.append(self.parts[part][1][position - start])
        if places:
            yield self.parts[part][0], places, picked

    def pick(self, positions: Iterable[int]) -> Batch:
        """The records at these positions, which are given in rising order."""
        return Batch([(job, ordinals) for job, _, ordinals in self.by_job(positions)])

    def without(self, positions: Iterable[int]) -> Batch:
        """The records at all other positions."""
        out = set(positions)
        return self.pick(position for position in range(self.size) if position not in out)

    def split(self, ways: int) -> list[Batch]:
        """Up to `ways` batches of about the same size, of at least one record each."""
        if ways == 1:
            return [self]
        step = max(1, math.ceil(self.size / max(1, ways)))
        return [self.pick(range(at, min(at + step, self.size))) for at in range(0, self.size, step)]

    @property
    def jobs(self) -> list[Job]:
        """Its jobs, in order."""
        return [job for job, _ in self.parts]

    @property
    def retried(self) -> bool:
        """True when its records have failed before."""
        return self.parts[0][0].attempt > 0


@dataclass(eq=False)
class Lane:
    """A handler's state in this worker.

    items: (Each, item) that wait for a puller. handler: what runs it: a Handler, a Schedule, or None for SQL.
    concurrency: calls (records, with each) at a time; with permits, over all processes, and here as many as it holds.
    again: records that are to run once more, outside of the pullers, which leave their permits to them.
    gate: with per=, which records may run. order: with ordered=, which, and in which order. tap: with rate=, which may
    begin.
    ready: the queue may hold more of it. after: the last job id claimed. width: bytes of its widest rows lately, 0: not
    known; wide: its table has values stored out of line.
    serves: calls by tenant. turn: the tenant that had the last turn in a claim, "" for none. priority: before which
    lanes it goes; since when it waits to be claimed for, and for a slot: claim_since, slot_since.
    rate: records/s settled lately; seconds: of a call lately. document: the table has no model and was made by Anton.
    had: every column that its table was ever seen with. model: it refreshes one; a job brings all others with it.
    make: an instance of the table's model from a row. down: what the world raised; nothing starts until calls ended.
    """

    id: int
    name: str
    handler: Any
    kind: str
    each: bool
    read: str
    where: bool
    batch: int
    max_wait: timedelta
    concurrency: int
    timeout: timedelta
    attempts: int
    backoff: timedelta
    table_id: int
    table: str
    key_columns: tuple[str, ...]
    key_kind: str
    fetch_sql: str | None
    feeding: bool = False
    had: frozenset[str] = frozenset()
    document: bool = False
    model: bool = False
    make: Callable[[Mapping[str, Any]], Any] | None = None
    permits: Permits | None = None
    gate: Gate | None = None
    priority: int = PRIORITY
    order: Order | None = None
    tap: Tap | None = None
    waiting: Turns[str | None, Job] = field(default_factory=Turns)
    waiting_records: int = 0
    items: deque[Any] = field(default_factory=deque)
    calls: int = 0
    serves: Counter[str | None] = field(default_factory=Counter)
    running: int = 0
    again: int = 0
    down: BaseException | None = None
    writes: set[str] = field(default_factory=set)
    ready: bool = True
    after: int = 0
    turn: str | None = None
    claim_since: float = 0.0
    slot_since: float = 0.0
    from_start_at: float = 0.0
    from_start_took: float = 0.0
    per_job: float = 0.0
    seconds: float = 1.0
    rate: float = 0.0
    wide: bool = False
    wide_at: float = 0.0
    width: float = 0.0
    held_until: float | None = None
    since: float = 0.0

    @property
    def idle(self) -> bool:
        """Nothing claimed waits or runs."""
        return not (self.calls or self.waiting)

    @property
    def still(self) -> bool:
        """As idle, and no record of a call that ended runs on."""
        return self.idle and not (self.running or self.items)

    @property
    def starved(self) -> bool:
        """All its calls wait for a start, and no record of them is done and yet to be settled."""
        if self.running:                                               # which takes from items, perhaps in a thread
            return False
        alone = self.tap.waiting if self.tap is not None else 0        # one by one, after a failure
        waiting = Counter(each for each, _ in list(self.items))
        whole = [each for each, n in waiting.items() if each.left == n]
        return len(whole) + alone >= self.calls

    @property
    def room(self) -> int:
        """Calls (records, with each) that may run at a time now."""
        return self.concurrency if self.permits is None else min(self.concurrency, self.permits.room())

    @property
    def together(self) -> int:
        """Records that are read and settled together at most."""
        return max(self.batch, TOGETHER) if self.each else self.batch

    def free(self) -> bool:
        """Another batch may start: a slot is free, or with each, pullers would soon have nothing.

        With one call at a time batches run one after the other: read at once, a later one could be ready first.
        """
        room = self.room
        if self.down is not None or not room or ((self.gate or self.order) is not None and self.calls >= GATED):
            return False
        if self.tap is not None and self.tap.soon() <= self.tap.waiting:
            return False
        if self.each and (self.concurrency > 1 or self.order is not None):
            return bool(self.waiting) and (not self.items or len(self.items) < room or self._left_out())
        return bool(self.waiting) and self.calls < room

    @property
    def dry(self) -> bool:
        """It has something to do and no start for it: its turn is yet to come."""
        return self.tap is not None and self.tap.soon() <= self.tap.waiting and (self.ready or bool(self.waiting))

    def _left_out(self) -> bool:
        """The tenant whose turn it is has nothing among what runs."""
        return self.order is None and self.calls < GATED and self.waiting.key not in self.serves

    def _tenant(self, job: Job) -> str | None:
        """With whose jobs it stands; an order is one for all."""
        return None if self.order is not None else job.tenant

    def started(self, batch: Batch) -> None:
        """A call, or records with each, began."""
        self.calls += 1
        self.serves[batch.parts[0][0].tenant] += 1

    def ended(self, batch: Batch) -> None:
        """It ended, well or not."""
        self.calls -= 1
        self.serves -= Counter([batch.parts[0][0].tenant])

    def wants(self) -> int:
        """How many records to claim now, 0 for none."""
        wants = self._wants()
        if wants and self.tap is not None:
            wants = min(wants, 2 * self.tap.soon() * (1 if self.each else self.batch))
        return wants

    def _wants(self) -> int:
        room = self.room
        if self.down is not None or not room:
            return 0
        if self.model:
            return 0 if self.calls or self.waiting else self.batch
        have = self.waiting_records + len(self.items)
        if self.each:
            free = room - self.running
            soon = int(self.rate * FAST)                               # slow records: no more than half a second's
            ahead = min(8192, max(self.batch, int(self.rate / 8))) if soon > room else soon
            return max(0, free + ahead - have) if have <= ahead // 2 or have < free else 0
        free = room - self.calls
        ahead = AHEAD if self.seconds < FAST / 5 else 1 if self.seconds < FAST else 0
        target = (free + ahead) * self.batch
        return target - have if have < free * self.batch or 2 * have <= target else 0

    def jobs_for(self, records: int) -> int:
        """How many jobs to ask for, to get that many records."""
        if self.model:
            return 1
        return max(1, min(MOST_JOBS, math.ceil(records / max(1.0, self.per_job or self.batch / 16))))

    def start_from(self, now: float) -> int:
        """The id to claim after. Now and then 0: a job with a smaller id may have been committed later."""
        if self.order is not None:                                     # or it would be claimed after what is later
            return 0
        if self.after and now - self.from_start_at < max(1.0, 20 * self.from_start_took):
            return self.after
        self.from_start_at = now
        return 0

    def claimed(
        self, jobs: list[Job], asked_jobs: int, asked_records: int, after: int, now: float, took: float
    ) -> None:
        """Takes what a claim brought that was asked for so many jobs and records after an id."""
        records = sum(len(job.left) for job in jobs)
        full = len(jobs) >= asked_jobs or records >= asked_records
        tenants = {job.tenant or "" for job in jobs}
        shared = self.order is None and bool(tenants - {""})           # an order is one for all tenants
        if shared:                                                     # claimed of each in turn, from self.turn on
            last = self.turn or ""
            jobs = sorted(jobs, key=lambda job: ((job.tenant or "") <= last, job.tenant or ""))
            self.turn = max([name for name in tenants if name <= last] or tenants)
        self.ready = full or after > 0 or len(tenants) >= TENANTS      # only the tail, or some tenants, were looked at
        self.after = jobs[-1].id if full and jobs and not shared else 0
        self.claim_since = now
        if not after:
            self.from_start_took = took
        if jobs:
            self.per_job = records / len(jobs)
            if not self.waiting:
                self.since = now
            for job in jobs:
                self.waiting.add(self._tenant(job), job)
            self.waiting_records += records

    def take(self, now: float, hold: bool = True) -> Batch | None:
        """The next batch to run; None when none is full and the oldest may still wait (then held_until says how long).

        One tenant, whose turn it is; what failed before stays apart from what is new, and a probe of a failing
        handler alone.
        """
        self.held_until = None
        if not self.waiting:
            return None
        queue = self.waiting.queue
        first = queue[0]
        if hold and self.max_wait and self.waiting_records < self.batch and not first.probe:
            until = self.since + self.max_wait.total_seconds() - first.waited / 1000
            if until > now:
                self.held_until = until
                return None
        if (
            self.ready
            and self.waiting_records < self.batch
            and self.wants()
            and now < self.since + GATHER
            and not first.probe
        ):
            self.held_until = self.since + GATHER                      # there is more: the next claim fills it up
            return None
        most = self.together
        taken: list[Job] = []
        passed: list[Job] = []
        size = 0
        while queue and size < most and len(passed) < SKIP:
            job = queue.popleft()
            fits = not taken or (size + len(job.left) <= most and not job.probe)
            if fits and job.tenant == first.tenant and (job.attempt > 0) == (first.attempt > 0):
                taken.append(job)
                size += len(job.left)
                if job.probe:
                    break
            else:
                passed.append(job)
                if not fits or self.order is not None:                 # nothing overtakes
                    break
        queue.extendleft(reversed(passed))
        self.waiting.end()
        self.waiting_records -= size
        self.slot_since = now
        return Batch.of(taken)

    def drop(self, tokens: set[int]) -> None:
        """Forgets jobs that wait and whose lease is lost."""
        self.waiting.keep((self._tenant(job), job) for job in self.waiting if job.token not in tokens)
        self.waiting_records = sum(len(job.left) for job in self.waiting)

    def turn_into(self, new: Lane) -> None:
        """Takes over what the catalogue says now; what is claimed and runs goes on."""
        for name in (
            "name",
            "handler",
            "kind",
            "each",
            "read",
            "where",
            "batch",
            "max_wait",
            "concurrency",
            "timeout",
            "attempts",
            "backoff",
            "table_id",
            "table",
            "key_columns",
            "key_kind",
            "fetch_sql",
            "feeding",
            "had",
            "document",
            "model",
            "make",
            "permits",
            "gate",
            "priority",
            "order",
            "tap",
        ):
            setattr(self, name, getattr(new, name))
        self.waiting.weights = new.waiting.weights

    def most(self) -> int:
        """Records to read and settle together: those of a batch, as long as they take about BYTES."""
        most = max(self.batch, TOGETHER) if self.each else self.batch
        if self.wide or self.width > NARROW:
            most = min(most, int(BYTES / max(1.0, self.width)))
        if self.each and self.tap is not None:                         # read them when they are about to begin
            most = min(most, max(self.concurrency, self.tap.a_second))
        return max(1, most)

    def measured(self, width: float) -> None:
        """What the widest of some rows took."""
        self.width = max(width, self.width * 0.9)

    def put_back(self) -> list[Job]:
        """All that waits and was not started, for giving back."""
        jobs, self.waiting_records = list(self.waiting), 0
        self.waiting.keep(())
        return jobs

    def took(self, seconds: float, records: int) -> None:
        """A call ended well."""
        self.seconds += (seconds - self.seconds) * (0.3 if self.seconds < 1 or seconds > self.seconds else 0.6)
        now_rate = records / max(seconds, 1e-6)
        self.rate += (now_rate - self.rate) * (0.3 if self.rate else 1.0)


def lane_of(row: Any, handler: Any) -> Lane:
    """A lane from a row of catalogue(). handler: the code that runs it; its own options win over the row's."""
    each = bool(getattr(handler, "each", row["each_record"])) and row["kind"] != "sql"
    concurrency = getattr(handler, "concurrency", None) or row["concurrency"] or (50 if each else 4)
    return Lane(
        row["id"], row["name"], handler, row["kind"], each, row["read"], row["where_sql"] is not None,
        row["batch"], row["max_wait"], concurrency, row["timeout"], row["attempts"],
        row["backoff"], row["table_id"], f"{row['schema_name']}.{row['table_name']}", tuple(row["key_columns"]),
        row["key_kind"], row["fetch_sql"], row["feeding"], frozenset(row["had"]))
